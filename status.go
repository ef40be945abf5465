package estenroll

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"estenroll/csr"
	"estenroll/engine"
)

// Status is what the device has, for a person or, as JSON, for a program. No
// field can hold a PIN.
type Status struct {
	Name string `json:"name"`
	// Enrolled says that the Security object points at an enrolled credential.
	Enrolled bool `json:"enrolled"`
	// Current is the credential that the Security object points at; nil before
	// the first boot.
	Current *CredentialStatus `json:"current,omitempty"`
	// Previous are the enrolled credentials that are kept beside it.
	Previous []CredentialStatus `json:"previous,omitempty"`
	// Problem says why the credential as a whole cannot be used.
	Problem string `json:"problem,omitempty"`
	// Server is the EST server.
	Server string `json:"server,omitempty"`
	// Clock says that the system clock is behind, and what stands for it; empty where
	// it is not known to be wrong.
	Clock string `json:"clock,omitempty"`
	// Pending is the operation that the next run goes on with.
	Pending     *OperationStatus `json:"operation,omitempty"`
	LastAttempt *Attempt         `json:"last_attempt,omitempty"`
	// FailedRekey is a rekey that came to nothing: the key is renewed instead, and
	// the policy asks for another rekey with the next renewal.
	FailedRekey *Attempt `json:"failed_rekey,omitempty"`
	// Renewal is what RenewDue makes of the device; nil where it was never enrolled, or
	// where the clock cannot be right and RequireClock is set.
	Renewal *Renewal `json:"renewal,omitempty"`
}

// CredentialStatus is one credential as the token shows it.
type CredentialStatus struct {
	Key         string   `json:"key"`
	Certificate string   `json:"certificate"`
	Chain       []string `json:"chain,omitempty"`
	// Anchors are the trust anchors of the pair's time that are in the token.
	Anchors   []string  `json:"anchors,omitempty"`
	Subject   string    `json:"subject,omitempty"`
	Issuer    string    `json:"issuer,omitempty"`
	Serial    string    `json:"serial,omitempty"` // hexadecimal
	NotBefore time.Time `json:"not_before,omitzero"`
	NotAfter  time.Time `json:"not_after,omitzero"`
	// KeyType is the algorithm of the certificate's key.
	KeyType engine.Algorithm `json:"key_type,omitempty"`
	// ServerMade says that the server made the key, outside of the HSM.
	ServerMade bool `json:"server_made,omitempty"`
	// KeyAttributes are what the token reports, nil where it reports nothing.
	KeyAttributes *engine.KeyAttributes `json:"key_attributes,omitempty"`
	// Problem says why the credential cannot be used.
	Problem string `json:"problem,omitempty"`
}

// OperationStatus is an operation that was begun and not ended.
type OperationStatus struct {
	Kind      Kind      `json:"kind"`
	Step      Step      `json:"step"`
	StartedAt time.Time `json:"started_at"`
	NotBefore time.Time `json:"not_before,omitzero"` // of the next request, if it is pending
	Detail    string    `json:"detail,omitempty"`    // the server's text then
}

// Status reports what the state directory and the token hold. It changes nothing.
func (c *Credential) Status(ctx context.Context) (*Status, error) {
	s := &Status{Name: c.Name(), Server: c.cfg.ServerURI, Clock: c.clockProblem(), LastAttempt: c.journal.LastAttempt, FailedRekey: c.journal.FailedRekey}
	if err := c.checkUse(); err != nil {
		s.Problem = err.Error()
	}
	s.Pending = c.journal.Operation.status()
	current, enrolled := c.current()
	s.Enrolled = enrolled
	instance, exists := c.instance()
	if !enrolled && exists {
		key, hasKey := instance.PrivateKey.Engine()
		cert, hasCert := instance.ClientCertificate.Engine()
		if hasKey && hasCert {
			current = credential{Key: reference{Address: key}, Certificates: []reference{{Address: cert}}}
		}
	}
	if current.Key.Address != nil {
		shown, err := c.credentialStatus(ctx, current)
		if err != nil {
			return nil, err
		}
		s.Current = shown
	}
	renewal, _, err := c.renewal(ctx)
	if err != nil && !errors.Is(err, ErrClock) {
		return nil, err
	}
	s.Renewal = renewal
	for _, kept := range c.journal.Pairs {
		if current.Key.Address != nil && kept.sameLeaf(current.Certificates[0].Address) {
			continue
		}
		shown, err := c.credentialStatus(ctx, kept)
		if err != nil {
			return nil, err
		}
		s.Previous = append(s.Previous, *shown)
	}
	return s, nil
}

// status is what there is to say of an operation, if there is one.
func (op *operation) status() *OperationStatus {
	if op == nil {
		return nil
	}
	s := &OperationStatus{Kind: op.Kind, Step: op.Step, StartedAt: op.StartedAt}
	if !op.AskedAt.IsZero() {
		s.NotBefore, s.Detail = op.AskedAt.Add(op.RetryAfter), op.Detail
	}
	return s
}

func (c *Credential) credentialStatus(ctx context.Context, kept credential) (*CredentialStatus, error) {
	s := &CredentialStatus{Key: kept.Key.String(), Certificate: kept.Certificates[0].String(), ServerMade: kept.ServerMade}
	for _, at := range kept.Certificates[1:] {
		s.Chain = append(s.Chain, at.String())
	}
	for _, anchor := range kept.Anchors {
		s.Anchors = append(s.Anchors, anchor.Address.String())
	}
	cert, err := c.certificate(ctx, kept.Certificates[0].Address)
	if err == nil {
		s.describe(cert)
		s.Problem, err = c.problemOf(ctx, kept, cert)
	}
	if errors.Is(err, engine.ErrNotFound) {
		s.Problem, err = "not in the token: "+err.Error(), nil
	}
	if err != nil {
		return nil, err
	}
	if inspector, ok := c.engine.(engine.KeyInspector); ok {
		attributes, err := inspector.KeyAttributes(ctx, kept.Key.Address)
		if err == nil {
			s.KeyAttributes = &attributes
		} else if !errors.Is(err, engine.ErrNotFound) && !errors.Is(err, engine.ErrUnsupported) {
			return nil, err
		}
	}
	return s, nil
}

func (s *CredentialStatus) describe(cert *x509.Certificate) {
	s.Subject, s.Issuer = csr.FormatSubject(cert.RawSubject), csr.FormatSubject(cert.RawIssuer)
	s.Serial = fmt.Sprintf("%x", cert.SerialNumber)
	if len(s.Serial)%2 == 1 {
		s.Serial = "0" + s.Serial // whole bytes, as OpenSSL and p11tool print it
	}
	s.NotBefore, s.NotAfter = cert.NotBefore.UTC(), cert.NotAfter.UTC()
	s.KeyType = engine.AlgorithmOf(cert.PublicKey)
}

func (c *Credential) problemOf(ctx context.Context, kept credential, cert *x509.Certificate) (string, error) {
	signer, err := c.engine.Signer(ctx, kept.Key.Address)
	if err != nil {
		return "", err
	}
	if !samePublicKey(cert.PublicKey, signer.Public()) {
		return "the certificate is not that of the key", nil
	}
	now, err := c.verificationTime()
	if errors.Is(err, ErrClock) {
		return "whether it is valid cannot be said: " + err.Error(), nil
	}
	if err != nil {
		return "", err
	}
	switch {
	case now.After(cert.NotAfter):
		return "expired", nil
	case now.Before(cert.NotBefore):
		return "not yet valid", nil
	}
	return "", nil
}
