package testserver

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"estenroll/est"
)

// EventKind says what an Event records.
type EventKind string

// The kinds of events.
const (
	// EventIssuance is a new certificate of the EST CA.
	EventIssuance EventKind = "issuance"
	// EventReplay is an earlier certificate, answered once more.
	EventReplay EventKind = "replay"
	// EventIDevID is a new certificate of the factory CA.
	EventIDevID EventKind = "idevid"
)

// Event is one line of the record. Fingerprints are SHA-256 in hexadecimal.
type Event struct {
	Time      time.Time     `json:"time"`
	Kind      EventKind     `json:"kind"`
	Operation est.Operation `json:"operation,omitempty"`
	// Path of the resource that was asked, so whether it was discovered.
	Path string `json:"path,omitempty"`
	// Client is the fingerprint of the certificate that authenticated the
	// request, ClientSubject its subject; empty for an IDevID, and where a password
	// or a pre-shared key, of PSKIdentity, did that alone.
	Client        string `json:"client_sha256,omitempty"`
	ClientSubject string `json:"client_subject,omitempty"`
	PSKIdentity   string `json:"psk_identity,omitempty"`
	// CSR is the digest of the request's DER; empty if there was none.
	CSR string `json:"csr_sha256,omitempty"`
	// PublicKey is the digest of the certificate's SubjectPublicKeyInfo.
	PublicKey string `json:"public_key_sha256"`
	Serial    string `json:"serial"` // hexadecimal
	Subject   string `json:"subject"`
	// Certificate is the fingerprint of the certificate.
	Certificate string `json:"certificate_sha256"`
	// Faults that shaped the certificate.
	Faults []string `json:"faults,omitempty"`
}

func newEvent(kind EventKind, now time.Time, cert *x509.Certificate) Event {
	return Event{
		Time:        now.UTC(),
		Kind:        kind,
		PublicKey:   fingerprint(cert.RawSubjectPublicKeyInfo),
		Serial:      cert.SerialNumber.Text(16),
		Subject:     cert.Subject.String(),
		Certificate: fingerprint(cert.Raw),
	}
}

func fingerprint(data []byte) string {
	digest := sha256.Sum256(data)
	return hex.EncodeToString(digest[:])
}

// record is the append-only list of events, in memory and, if wanted, in a
// file of JSON lines.
type record struct {
	mu     sync.Mutex
	events []Event
	file   *os.File
}

func openRecord(path string) (*record, error) {
	if path == "" {
		return &record{}, nil
	}
	file, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open record: %w", err)
	}
	return &record{file: file}, nil
}

// add returns when the event is on disk: a certificate that is not recorded
// must not leave the server.
func (r *record) add(event Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file != nil {
		line, err := json.Marshal(event)
		if err != nil {
			return fmt.Errorf("write record: %w", err)
		}
		// One write: with O_APPEND a reader never sees half a line of another.
		if _, err := r.file.Write(append(line, '\n')); err != nil {
			return fmt.Errorf("write record: %w", err)
		}
		if err := r.file.Sync(); err != nil {
			return fmt.Errorf("write record: %w", err)
		}
	}
	r.events = append(r.events, event)
	return nil
}

func (r *record) all() []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

func (r *record) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file = nil
	return err
}
