package engine

import (
	"fmt"
	"io"
	"log/slog"
	"time"
)

const redacted = "REDACTED"

// Secret is a PIN or a pre-shared key. No way of printing or encoding it shows
// it; only Reveal does. The zero value is the absence of a secret.
type Secret struct{ value *string }

// NewSecret wraps a secret.
func NewSecret(value string) Secret { return Secret{value: &value} }

// IsSet reports whether there is a secret, which may be empty.
func (s Secret) IsSet() bool { return s.value != nil }

// Reveal returns the secret: for the call that needs it, and for nothing else.
func (s Secret) Reveal() string {
	if s.value == nil {
		return ""
	}
	return *s.value
}

// String returns REDACTED.
func (Secret) String() string { return redacted }

// GoString returns REDACTED.
func (Secret) GoString() string { return redacted }

// Format writes REDACTED for every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns REDACTED.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns REDACTED.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// PINSource identifies where a PIN came from without telling anything of the
// PIN: neither the PIN nor a digest of it is ever kept. It is comparable; a
// source that was written again compares unequal.
type PINSource struct {
	// Path of the file, or a description where there is no file, such as
	// "environment EST_ENROLL_ENGINE".
	Path string `json:"path"`
	// Inode, Size in bytes and ChangedAt (ctime) of the file; zero without one.
	Inode     uint64    `json:"inode,omitempty"`
	Size      int64     `json:"size,omitempty"`
	ChangedAt time.Time `json:"changed_at,omitzero"`
}

// IsZero reports whether no source is named.
func (s PINSource) IsZero() bool { return s.Path == "" }

// Same reports whether both name the same, unchanged source.
func (s PINSource) Same(other PINSource) bool {
	return s.Path == other.Path && s.Inode == other.Inode && s.Size == other.Size && s.ChangedAt.Equal(other.ChangedAt)
}
