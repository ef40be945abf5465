package testserver

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/csr"
	"estenroll/est"
)

// refusal is an answer that is no certificate, without a transport: each front
// door has its own words for it.
type refusal struct {
	kind   refusalKind
	detail string
	// retryAfter belongs to refusedForNow; nil leaves it out.
	retryAfter *time.Duration
	// code belongs to refusedAs.
	code codes.Code
}

type refusalKind int

const (
	refusedRequest refusalKind = iota // the request is wrong
	refusedClient                     // this client may not ask this
	refusedForNow                     // the same request may succeed later
	refusedAs                         // by the fault answer
)

func (r *refusal) Error() string { return r.detail }

// enrollment is a request for a certificate.
type enrollment struct {
	operation est.Operation
	path      string            // of the resource that was asked
	client    *x509.Certificate // nil for one that has shown a password or a pre-shared key alone
	csr       []byte            // DER
	binding   []byte            // of the session, nil where it is not known
	identity  string            // of the pre-shared key, "" for none
}

// replayKey is one enrolment: who asked what. A repetition has the same key, in
// another session too, where a CSR that is linked to it is another one.
type replayKey struct {
	operation     est.Operation
	client, asked [sha256.Size]byte
}

func newReplayKey(asked enrollment, request *x509.CertificateRequest) replayKey {
	what := asked.csr
	if csr.ChallengePassword(request) != "" {
		what = slices.Concat(request.RawSubject, request.RawSubjectPublicKeyInfo)
		for _, extension := range request.Extensions {
			what = append(what, extension.Value...)
		}
	}
	client := asked.client
	if client == nil {
		client = new(x509.Certificate)
	}
	return replayKey{asked.operation, sha256.Sum256(client.Raw), sha256.Sum256(what)}
}

// shapedKey adds the faults that shaped a certificate: it is not given again
// once they are gone.
type shapedKey struct {
	replayKey
	faults string
}

type issued struct {
	cert  *x509.Certificate
	pkcs8 []byte // the key that the server has made for it
	at    time.Time
	// sealing is that of the request that is answered; nil for a key in the clear.
	sealing *sealing
}

// enroll does sen and sren: RFC 7030 §4.2.1 and §4.2.2. Its error is a
// *refusal, or a failure of the server.
func (s *Server) enroll(ctx context.Context, asked enrollment) (*x509.Certificate, error) {
	made, err := s.issueOnce(ctx, asked)
	return made.cert, err
}

// issueOnce answers a request for a certificate: two equal ones at once, and within
// the replay window, issue one.
func (s *Server) issueOnce(ctx context.Context, asked enrollment) (made issued, err error) {
	request, err := parseCSR(asked.csr)
	if err == nil {
		err = cmp.Or(checkNames(request.RawSubject, subjectAltName(request.Extensions)), checkUsage(request))
	}
	if err == nil {
		err = s.checkLink(request, asked.binding)
	}
	var sealing *sealing
	if err == nil && generates(asked.operation) {
		sealing, err = s.sealingOf(request)
	}
	if err != nil {
		return made, &refusal{kind: refusedRequest, detail: err.Error()}
	}
	if asked.operation == est.SimpleReenroll {
		if err := s.checkReenrollment(request, asked.client); err != nil {
			return made, err
		}
	}
	faults := s.Faults()
	if faults.Delay > 0 {
		select {
		case <-time.After(faults.Delay):
		case <-ctx.Done():
			return made, ctx.Err()
		}
	}
	if faults.Answer != "" {
		code, err := parseCode(faults.Answer)
		if err != nil {
			return made, err
		}
		return made, &refusal{kind: refusedAs, code: code, detail: "refused by a fault"}
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	key := newReplayKey(asked, request)
	if s.deferred[key] < faults.Defer {
		s.deferred[key]++
		return made, &refusal{kind: refusedForNow, detail: "not decided yet, come again", retryAfter: faults.DeferMaxAge}
	}
	now := s.now()
	shaped := shapedKey{key, strings.Join(faults.issuing(), " ")}
	kind := EventReplay
	earlier, known := s.issued[shaped]
	if !known || !s.replays(earlier, now) {
		kind = EventIssuance
		if earlier, err = s.make(asked.operation, request, faults, now); err != nil {
			return made, err
		}
	}
	event := newEvent(kind, now, earlier.cert)
	event.Operation, event.Path = asked.operation, asked.path
	if asked.client != nil {
		event.Client, event.ClientSubject = fingerprint(asked.client.Raw), asked.client.Subject.String()
	}
	event.PSKIdentity = asked.identity
	event.CSR = fingerprint(asked.csr)
	event.Faults = faults.issuing()
	if err := s.record.add(event); err != nil {
		return made, err
	}
	if kind == EventIssuance && !s.cfg.NoReplay {
		for key, old := range s.issued {
			if !s.replays(old, now) {
				delete(s.issued, key)
			}
		}
		s.issued[shaped] = earlier
	}
	earlier.sealing = sealing
	return earlier, nil
}

// replays reports whether an earlier certificate answers a repeated request:
// within the window, and while it is of use.
func (s *Server) replays(earlier issued, now time.Time) bool {
	return now.Sub(earlier.at) < s.cfg.ReplayWindow && now.Before(earlier.cert.NotAfter)
}

// checkLink holds a request to the session that it came in: whoever got hold of one
// cannot use it in another (RFC 7030 §3.5).
func (s *Server) checkLink(request *x509.CertificateRequest, binding []byte) error {
	password := csr.ChallengePassword(request)
	switch {
	case password == "" && s.cfg.RequirePoP:
		return errors.New("the request has no challengePassword that links it to this session")
	case password != "" && len(binding) == 0:
		return errors.New("the request has a challengePassword, and this door does not know what links one to its session")
	case password != "" && password != base64.StdEncoding.EncodeToString(binding):
		return errors.New("the challengePassword is not that of this session")
	}
	return nil
}

// checkReenrollment holds the request to the identity of the client certificate:
// RFC 7030 §4.2.2, "The request Subject field and SubjectAltName extension MUST
// be identical to the corresponding fields in the certificate being
// renewed/rekeyed." They are compared as bytes, as servers in the field do.
func (s *Server) checkReenrollment(csr *x509.CertificateRequest, client *x509.Certificate) error {
	if !s.ca.Load().issued(client) {
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

// make issues for the key of the request, or for one that it makes.
func (s *Server) make(operation est.Operation, request *x509.CertificateRequest, faults Faults, now time.Time) (made issued, err error) {
	made.at = now
	pub := crypto.PublicKey(request.PublicKey)
	if generates(operation) {
		key, err := keyLike(pub)
		if faults.ServerKey == otherType {
			key, err = keyUnlike(pub)
		}
		if err != nil {
			return made, fmt.Errorf("generate key: %w", err)
		}
		if made.pkcs8, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			return made, err
		}
		pub = key.Public()
	}
	made.cert, err = s.issue(request, pub, faults, now)
	return made, err
}

// issue signs what the CSR asks for, or what the faults make of it.
func (s *Server) issue(request *x509.CertificateRequest, pub crypto.PublicKey, faults Faults, now time.Time) (*x509.Certificate, error) {
	now = now.Truncate(time.Second)
	notBefore, notAfter := now.Add(-s.cfg.Backdate), now.Add(s.cfg.Lifetime)
	switch {
	case faults.NotYetValid:
		notBefore, notAfter = now.Add(time.Hour), now.Add(time.Hour+s.cfg.Lifetime)
	case faults.Expired:
		notBefore, notAfter = now.Add(-time.Hour-s.cfg.Lifetime), now.Add(-time.Hour)
	}
	subject, san := request.RawSubject, subjectAltName(request.Extensions)
	if faults.Subject != "" {
		var err error
		if subject, err = csr.ParseSubject(faults.Subject); err != nil {
			return nil, err
		}
	}
	if faults.DropSAN {
		san = nil
	}
	template := leafTemplate(subject, san, notBefore, notAfter)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if !faults.IgnoreUsage {
		// As they were asked for, which stands before the template's own.
		template.ExtraExtensions = append(template.ExtraExtensions, usages(request)...)
	}
	if faults.CAFlag {
		template.BasicConstraintsValid, template.IsCA = true, true
	}
	ca := s.ca.Load().issuing
	if faults.ForeignChain {
		ca = s.ca.Load().foreign
	}
	if faults.WrongKey {
		key, err := keyLike(pub)
		if err != nil {
			return nil, fmt.Errorf("generate foreign key: %w", err)
		}
		pub = key.Public()
	}
	return ca.sign(template, pub)
}

// verifyClient judges a client's chain in the handshake.
func (s *Server) verifyClient(chain []*x509.Certificate) error {
	ca := s.ca.Load()
	verified, err := ca.clients.VerifyClient(chain, s.now())
	if err != nil {
		return err
	}
	if faults := s.Faults(); faults.RefuseCode == "" && faults.refuses(verified[0], ca) {
		return fmt.Errorf("client certificate %s: refused by a fault", verified[0].SerialNumber.Text(16))
	}
	return nil
}
