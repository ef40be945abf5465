package testserver

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"strings"
	"time"

	"estenroll/est"
)

// refusal is an answer that is no certificate, without a transport: each front
// door has its own words for it.
type refusal struct {
	kind   refusalKind
	detail string
	// retryAfter belongs to refusedForNow; nil leaves it out.
	retryAfter *time.Duration
}

type refusalKind int

const (
	refusedRequest refusalKind = iota // the request is wrong
	refusedClient                     // this client may not ask this
	refusedForNow                     // the same request may succeed later
)

func (r *refusal) Error() string { return r.detail }

// replayKey is one enrolment: who asked what. A repetition has the same key.
type replayKey struct {
	operation   est.Operation
	client, csr [sha256.Size]byte
}

// shapedKey adds the faults that shaped a certificate: it is not given again
// once they are gone.
type shapedKey struct {
	replayKey
	faults string
}

type issued struct {
	cert *x509.Certificate
	at   time.Time
}

// enroll does sen and sren: RFC 7030 §4.2.1 and §4.2.2. Its error is a
// *refusal, or a failure of the server. Two equal requests at once issue one
// certificate.
func (s *Server) enroll(ctx context.Context, operation est.Operation, client *x509.Certificate, der []byte) (*x509.Certificate, error) {
	csr, err := parseCSR(der)
	if err == nil {
		err = checkNames(csr.RawSubject, subjectAltName(csr.Extensions))
	}
	if err != nil {
		return nil, &refusal{kind: refusedRequest, detail: err.Error()}
	}
	if operation == est.SimpleReenroll {
		if err := s.checkReenrollment(csr, client); err != nil {
			return nil, err
		}
	}
	faults := s.Faults()
	if faults.Delay > 0 {
		select {
		case <-time.After(faults.Delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	key := replayKey{operation, sha256.Sum256(client.Raw), sha256.Sum256(der)}
	if s.deferred[key] < faults.Defer {
		s.deferred[key]++
		return nil, &refusal{kind: refusedForNow, detail: "not decided yet, come again", retryAfter: faults.DeferMaxAge}
	}
	now := s.now()
	shaped := shapedKey{key, strings.Join(faults.issuing(), " ")}
	kind := EventReplay
	earlier, known := s.issued[shaped]
	if !known || !s.replays(earlier, now) {
		kind = EventIssuance
		if earlier.cert, err = s.issue(csr, faults, now); err != nil {
			return nil, err
		}
		earlier.at = now
	}
	event := newEvent(kind, now, earlier.cert)
	event.Operation = operation
	event.Client, event.ClientSubject = fingerprint(client.Raw), client.Subject.String()
	event.CSR = fingerprint(der)
	event.Faults = faults.issuing()
	if err := s.record.add(event); err != nil {
		return nil, err
	}
	if kind == EventIssuance && !s.cfg.NoReplay {
		for key, old := range s.issued {
			if !s.replays(old, now) {
				delete(s.issued, key)
			}
		}
		s.issued[shaped] = earlier
	}
	return earlier.cert, nil
}

// replays reports whether an earlier certificate answers a repeated request:
// within the window, and while it is of use.
func (s *Server) replays(earlier issued, now time.Time) bool {
	return now.Sub(earlier.at) < s.cfg.ReplayWindow && now.Before(earlier.cert.NotAfter)
}

// checkReenrollment holds the request to the identity of the client certificate:
// RFC 7030 §4.2.2, "The request Subject field and SubjectAltName extension MUST
// be identical to the corresponding fields in the certificate being
// renewed/rekeyed." They are compared as bytes, as servers in the field do.
func (s *Server) checkReenrollment(csr *x509.CertificateRequest, client *x509.Certificate) error {
	if !s.ca.issuing.issued(client) {
		return &refusal{kind: refusedClient, detail: "the client certificate was not issued by this CA"}
	}
	if !bytes.Equal(csr.RawSubject, client.RawSubject) {
		return &refusal{kind: refusedClient, detail: "the subject is not the client certificate's"}
	}
	asked, has := subjectAltName(csr.Extensions), subjectAltName(client.Extensions)
	if (asked == nil) != (has == nil) || asked != nil && !bytes.Equal(asked.Value, has.Value) {
		return &refusal{kind: refusedClient, detail: "the subjectAltName is not the client certificate's"}
	}
	return nil
}

// issue signs what the CSR asks for, or what the faults make of it.
func (s *Server) issue(csr *x509.CertificateRequest, faults Faults, now time.Time) (*x509.Certificate, error) {
	now = now.Truncate(time.Second)
	notBefore, notAfter := now.Add(-s.cfg.Backdate), now.Add(s.cfg.Lifetime)
	switch {
	case faults.NotYetValid:
		notBefore, notAfter = now.Add(time.Hour), now.Add(time.Hour+s.cfg.Lifetime)
	case faults.Expired:
		notBefore, notAfter = now.Add(-time.Hour-s.cfg.Lifetime), now.Add(-time.Hour)
	}
	template := leafTemplate(csr.RawSubject, subjectAltName(csr.Extensions), notBefore, notAfter)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	ca, pub := s.ca.issuing, crypto.PublicKey(csr.PublicKey)
	if faults.ForeignChain {
		ca = s.ca.foreign
	}
	if faults.WrongKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("generate foreign key: %w", err)
		}
		pub = key.Public()
	}
	return ca.sign(template, pub)
}

// verifyClient judges a client's chain in the handshake.
func (s *Server) verifyClient(chain []*x509.Certificate) error {
	verified, err := s.clients.VerifyClient(chain, s.now())
	if err != nil {
		return err
	}
	if faults := s.Faults(); faults.RefuseCode == "" && faults.refuses(verified[0], s.ca.issuing) {
		return fmt.Errorf("client certificate %s: refused by a fault", verified[0].SerialNumber.Text(16))
	}
	return nil
}
