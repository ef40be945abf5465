package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"regexp"
	"time"

	"estenroll"
	"estenroll/internal/durable"
)

// Told is the memory of hook-after: which certificate it was last told of. It makes
// the hook one of a state and not of a moment: what a run could not tell, because the
// power failed or the hook did, the next one tells.
type Told struct {
	// Dir is the state directory, which exists.
	Dir string
	// LockTimeout bounds the wait for another run's hook.
	LockTimeout time.Duration
	// Command is what others are told that wait for this one.
	Command string
	// Warn is told of a memory that is not usable: what is in it is told again.
	Warn func(string)
}

const (
	toldName     = "hooks.json"
	toldLockName = "hooks.lock"
	toldVersion  = 1
	toldLimit    = 64 << 10 // bytes
	toldMode     = 0o600
)

// told is the file: the SHA-256 of a certificate by the name of its credential.
type told struct {
	Version int               `json:"version"`
	Told    map[string]string `json:"told"`
}

var toldFingerprint = regexp.MustCompile(`^[0-9a-f]{64}$`)

func parseTold(data []byte) (*told, error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	t := new(told)
	if err := decoder.Decode(t); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the object")
	}
	if t.Version != toldVersion {
		return nil, fmt.Errorf("version %d is not known", t.Version)
	}
	for name, fingerprint := range t.Told {
		if err := estenroll.CheckName(name); err != nil {
			return nil, err
		}
		if !toldFingerprint.MatchString(fingerprint) {
			return nil, fmt.Errorf("%s: not a SHA-256", name)
		}
	}
	return t, nil
}

// load reads the memory. One that is missing or not usable remembers nothing.
func (t Told) load() (*told, error) {
	none := &told{Version: toldVersion, Told: map[string]string{}}
	path := filepath.Join(t.Dir, toldName)
	data, err := durable.ReadFile(path, toldLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return none, nil
	}
	if errors.Is(err, durable.ErrTooLarge) {
		t.Warn(fmt.Sprintf("%v: hook-after is told again", err))
		return none, nil
	}
	if err != nil {
		return nil, err
	}
	got, err := parseTold(data)
	if err != nil {
		t.Warn(fmt.Sprintf("read %s: %v: hook-after is told again", path, err))
		return none, nil
	}
	if got.Told == nil {
		got.Told = map[string]string{}
	}
	return got, nil
}

func fingerprint(cert *x509.Certificate) string {
	digest := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(digest[:])
}

// Tell runs hook-after for a certificate that it was not told of yet, and remembers
// it where the hook succeeds. It reports whether the hook was run. No two runs tell at
// once: the second waits, and finds it done. ErrHook, estenroll.ErrBusy, the context's
// error.
func (t Told) Tell(ctx context.Context, name string, cert *x509.Certificate, hook Hook) (ran bool, err error) {
	if known, err := t.load(); err != nil || known.Told[name] == fingerprint(cert) {
		return false, err
	}
	err = t.locked(ctx, func(known *told) (bool, error) {
		if known.Told[name] == fingerprint(cert) {
			return false, nil
		}
		ran = true
		if err := hook.Run(ctx); err != nil {
			return false, err
		}
		known.Told[name] = fingerprint(cert)
		return true, nil
	})
	return ran, err
}

// Forget forgets a credential, for one that is enrolled anew is another.
func (t Told) Forget(ctx context.Context, name string) error {
	if known, err := t.load(); err != nil || known.Told[name] == "" {
		return err
	}
	return t.locked(ctx, func(known *told) (bool, error) {
		delete(known.Told, name)
		return true, nil
	})
}

// locked changes the memory, which is written if the function says so; one that
// remembers nothing is removed.
func (t Told) locked(ctx context.Context, change func(*told) (bool, error)) (err error) {
	waiting, cancel := context.WithTimeout(ctx, t.LockTimeout)
	defer cancel()
	lock, err := durable.Acquire(waiting, filepath.Join(t.Dir, toldLockName), toldMode, t.Command)
	var held *durable.LockedError
	switch {
	case errors.As(err, &held):
		return errors.Join(ctx.Err(), fmt.Errorf("wait for another run's hook: %w: %w", estenroll.ErrBusy, err))
	case err != nil:
		return err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	if err := durable.RemoveTemporary(t.Dir, toldName); err != nil {
		return err
	}
	known, err := t.load()
	if err != nil {
		return err
	}
	if changed, err := change(known); !changed || err != nil {
		return err
	}
	path := filepath.Join(t.Dir, toldName)
	if len(known.Told) == 0 {
		return durable.Remove(path)
	}
	data, err := json.MarshalIndent(known, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(path, append(data, '\n'), toldMode)
}
