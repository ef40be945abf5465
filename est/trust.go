package est

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"
)

// TrustAnchors judge the certificates of servers, of clients and of answers.
// They are the Implicit TA, if configured, or the Explicit TA, if they came with
// cacerts (RFC 7030 §1.1). They are immutable.
type TrustAnchors struct {
	certificates  []*x509.Certificate
	anchors       []*x509.Certificate
	roots         *x509.CertPool // of the anchors
	intermediates []*x509.Certificate
}

// NewTrustAnchors makes trust anchors of CA certificates: the self-signed ones
// are anchors, the others lead to them. A server's answer holds at least "the
// current root CA certificate" (RFC 7030 §4.1.3), which for it may be a
// subordinate one: if none is self-signed those that no other has signed are
// anchors, and all of them where there is none either.
func NewTrustAnchors(certs []*x509.Certificate) (*TrustAnchors, error) {
	if len(certs) == 0 {
		return nil, errors.New("trust anchors: no certificate")
	}
	t := &TrustAnchors{roots: x509.NewCertPool()}
	for _, cert := range certs {
		if slices.ContainsFunc(t.certificates, cert.Equal) {
			continue
		}
		t.certificates = append(t.certificates, cert)
		switch {
		case !isCA(cert):
			return nil, fmt.Errorf("trust anchors: %q is not a CA certificate: %w", cert.Subject, ErrNotTrusted)
		case signedBy(cert, cert):
			t.anchors = append(t.anchors, cert)
		default:
			t.intermediates = append(t.intermediates, cert)
		}
	}
	if len(t.anchors) == 0 {
		t.anchors = slices.DeleteFunc(slices.Clone(t.certificates), func(cert *x509.Certificate) bool {
			return slices.ContainsFunc(certs, func(other *x509.Certificate) bool { return signedBy(cert, other) })
		})
	}
	if len(t.anchors) == 0 {
		t.anchors = slices.Clone(t.certificates)
	}
	for _, anchor := range t.anchors {
		t.roots.AddCert(anchor)
	}
	return t, nil
}

// NoTrustAnchors are those of a device that has none yet. They judge nobody's
// certificate; only a root that an operator vouches for by its fingerprint succeeds
// them (RFC 7030 §4.1.1).
func NoTrustAnchors() *TrustAnchors { return &TrustAnchors{roots: x509.NewCertPool()} }

// signedBy reports whether a CA, by its name and its key, signed a certificate.
func signedBy(cert, ca *x509.Certificate) bool {
	return bytes.Equal(cert.RawIssuer, ca.RawSubject) && cert.CheckSignatureFrom(ca) == nil
}

// isCA accepts version 1 and 2 certificates too, which cannot say that they are:
// the operator, or the server, has named them.
func isCA(cert *x509.Certificate) bool {
	return cert.Version < 3 || cert.BasicConstraintsValid && cert.IsCA
}

// Join returns anchors that judge as either of the two does.
func (t *TrustAnchors) Join(other *TrustAnchors) *TrustAnchors {
	joined := &TrustAnchors{roots: t.roots.Clone()}
	for _, anchor := range other.anchors {
		joined.roots.AddCert(anchor)
	}
	joined.certificates = slices.Concat(t.certificates, other.certificates)
	joined.anchors = slices.Concat(t.anchors, other.anchors)
	joined.intermediates = slices.Concat(t.intermediates, other.intermediates)
	return joined
}

// Certificates returns all of them, anchors and those that lead to them.
func (t *TrustAnchors) Certificates() []*x509.Certificate { return slices.Clone(t.certificates) }

// Anchors returns those that are anchors.
func (t *TrustAnchors) Anchors() []*x509.Certificate { return slices.Clone(t.anchors) }

var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	// id-kp-cmcRA marks an EST server that is a registration authority
	// (RFC 6402 §2.10, RFC 7030 §3.6.1).
	oidCMCRA = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 28}
)

// VerifyServer judges the chain of a server (leaf first) at a time: it leads to
// an anchor, is for servers, and carries the name, a DNS name or an IP literal
// (RFC 7030 §3.6.1). A new Explicit TA judges the live session with it too: the
// chain is then the session's PeerChain (RFC 9148 §3). ErrServerCertificate, and
// beside it ErrNotTrusted or ErrNotValidNow, and ErrNoAnchor.
func (t *TrustAnchors) VerifyServer(chain []*x509.Certificate, name string, now time.Time) error {
	if len(chain) == 0 {
		return fmt.Errorf("%w: none: %w", ErrServerCertificate, ErrNotTrusted)
	}
	if err := t.verifyServer(chain, name, now); err != nil {
		return fmt.Errorf("%w %q: %w", ErrServerCertificate, chain[0].Subject, err)
	}
	return nil
}

func (t *TrustAnchors) verifyServer(chain []*x509.Certificate, name string, now time.Time) error {
	leaf := chain[0]
	if name == "" {
		return fmt.Errorf("no name to compare with: %w", ErrNotTrusted)
	}
	if _, err := t.verify(chain, now); err != nil {
		return err
	}
	if !slices.ContainsFunc(leaf.UnknownExtKeyUsage, oidCMCRA.Equal) && !allows(leaf, x509.ExtKeyUsageServerAuth) {
		return fmt.Errorf("its extended key usage is not for servers: %w", ErrNotTrusted)
	}
	// An IP literal is compared with the IP SANs: VerifyHostname wants brackets.
	compare := name
	if net.ParseIP(name) != nil {
		compare = "[" + name + "]"
	}
	if err := leaf.VerifyHostname(compare); err != nil {
		return fmt.Errorf("it is not for %q: %w: %w", name, err, ErrNotTrusted)
	}
	return nil
}

// VerifyClient judges the chain of a client (leaf first) at a time and returns
// it up to its anchor. ErrNotTrusted, ErrNotValidNow.
func (t *TrustAnchors) VerifyClient(chain []*x509.Certificate, now time.Time) ([]*x509.Certificate, error) {
	if len(chain) == 0 {
		return nil, fmt.Errorf("client certificate: none: %w", ErrNotTrusted)
	}
	verified, err := t.verify(chain, now)
	if err == nil && !allows(chain[0], x509.ExtKeyUsageClientAuth) {
		err = fmt.Errorf("its extended key usage is not for clients: %w", ErrNotTrusted)
	}
	if err != nil {
		return nil, fmt.Errorf("client certificate %q: %w", chain[0].Subject, err)
	}
	return verified, nil
}

// VerifyIssued judges the answer to a CSR: one of its certificates is for the
// public key, no other is an end-entity certificate, and it leads to an anchor
// and is valid at a time. It returns the chain to store and to send, leaf first,
// without its anchor. ErrKeyMismatch, ErrNotTrusted, ErrNotValidNow; and a
// *ResponseError with ErrNoCertificate or ErrSeveralCertificates.
func (t *TrustAnchors) VerifyIssued(answer []*x509.Certificate, publicKey crypto.PublicKey, now time.Time) ([]*x509.Certificate, error) {
	leaf, err := issuedLeaf(answer, publicKey)
	if err != nil {
		return nil, fmt.Errorf("issued certificate: %w", err)
	}
	others := slices.DeleteFunc(slices.Clone(answer), leaf.Equal)
	verified, err := t.verify(append([]*x509.Certificate{leaf}, others...), now)
	if err != nil {
		return nil, fmt.Errorf("issued certificate %q: %w", leaf.Subject, err)
	}
	return verified[:len(verified)-1], nil
}

// VerifySigner judges who signed an enveloped key (signer first), at a time: it is an
// anchor or leads to one. RFC 7030 §4.4.2: "The SignedData is signed by the party that
// generated the private key, which may or may not be the EST server or the EST CA."
// ErrNotTrusted, ErrNotValidNow.
func (t *TrustAnchors) VerifySigner(chain []*x509.Certificate, now time.Time) error {
	if len(chain) == 0 {
		return fmt.Errorf("signer of the key: none: %w", ErrNotTrusted)
	}
	signer := chain[0]
	var err error
	switch {
	case !slices.ContainsFunc(t.anchors, signer.Equal):
		_, err = t.verify(chain, now)
	case now.Before(signer.NotBefore) || now.After(signer.NotAfter):
		err = &ValidityError{Certificate: signer, Time: now}
	}
	if err != nil {
		return fmt.Errorf("signer of the key %q: %w", signer.Subject, err)
	}
	return nil
}

func issuedLeaf(answer []*x509.Certificate, publicKey crypto.PublicKey) (*x509.Certificate, error) {
	wanted, ok := publicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok {
		return nil, fmt.Errorf("public key of type %T: %w", publicKey, ErrKeyMismatch)
	}
	var leaf *x509.Certificate
	for _, cert := range answer {
		switch {
		case cert.IsCA && !wanted.Equal(cert.PublicKey):
			continue
		case cert.IsCA:
			return nil, fmt.Errorf("%q is a CA certificate for the key of this device: %w", cert.Subject, ErrNotTrusted)
		case leaf != nil && leaf.Equal(cert):
			continue
		case leaf != nil:
			return nil, &ResponseError{Err: fmt.Errorf("%w: %q and %q", ErrSeveralCertificates, leaf.Subject, cert.Subject)}
		}
		leaf = cert
	}
	if leaf == nil {
		return nil, &ResponseError{Err: ErrNoCertificate}
	}
	if !wanted.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("%q: %w", leaf.Subject, ErrKeyMismatch)
	}
	return leaf, nil
}

// allows reports whether the certificate's extended key usage, if it has one,
// names a use (RFC 5280 §4.2.1.12).
func allows(cert *x509.Certificate, use x509.ExtKeyUsage) bool {
	if len(cert.ExtKeyUsage) == 0 && len(cert.UnknownExtKeyUsage) == 0 {
		return true
	}
	return slices.Contains(cert.ExtKeyUsage, use) || slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageAny)
}

// verify builds the chain from the first certificate to an anchor.
func (t *TrustAnchors) verify(chain []*x509.Certificate, now time.Time) ([]*x509.Certificate, error) {
	for _, cert := range chain {
		if err := checkWhole(cert); err != nil {
			return nil, fmt.Errorf("%w: %w", err, ErrNotTrusted)
		}
	}
	intermediates := x509.NewCertPool()
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
	}
	for _, cert := range t.intermediates {
		intermediates.AddCert(cert)
	}
	verified, err := withoutOtherNames(chain[0]).Verify(x509.VerifyOptions{
		Roots: t.roots, Intermediates: intermediates, CurrentTime: now,
		// The use of the leaf is judged by its own rules above.
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, t.classify(chain[0], now, err)
	}
	// The shortest: what is sent in every handshake.
	shortest := slices.MinFunc(verified, func(a, b []*x509.Certificate) int { return len(a) - len(b) })
	if len(shortest) < 2 {
		return nil, fmt.Errorf("it is a trust anchor itself: %w", ErrNotTrusted)
	}
	shortest[0] = chain[0]
	return shortest, nil
}

// checkWhole checks that a certificate is "a SEQUENCE of three required fields"
// (RFC 5280 §4.1). Measured: crypto/x509 of Go 1.26 passes over what follows the
// third, which no signature covers.
func checkWhole(cert *x509.Certificate) error {
	var fields []asn1.RawValue
	if _, err := asn1.Unmarshal(cert.Raw, &fields); err != nil {
		return fmt.Errorf("certificate %q: %w", cert.Subject, err)
	}
	if len(fields) != 3 {
		return fmt.Errorf("certificate %q: it goes on after its signature", cert.Subject)
	}
	return nil
}

// withoutOtherNames returns the certificate as x509 can verify it. A critical
// SAN that holds only an otherName, as that of an IDevID with a hwModuleName
// (RFC 4108 §5), is one that x509 parses nothing of and therefore refuses; no
// decision here depends on it.
func withoutOtherNames(cert *x509.Certificate) *x509.Certificate {
	if !slices.ContainsFunc(cert.UnhandledCriticalExtensions, oidSubjectAltName.Equal) {
		return cert
	}
	handled := *cert
	handled.UnhandledCriticalExtensions = slices.DeleteFunc(slices.Clone(cert.UnhandledCriticalExtensions), oidSubjectAltName.Equal)
	return &handled
}

func (t *TrustAnchors) classify(leaf *x509.Certificate, now time.Time, err error) error {
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		validity := &ValidityError{Certificate: cmp.Or(invalid.Cert, leaf), Time: now}
		if !validity.Certificate.Equal(leaf) { // the server has another CA above it by now
			return fmt.Errorf("%w: %w", validity, ErrNoAnchor)
		}
		return validity
	}
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) {
		return &noAnchorError{err}
	}
	return fmt.Errorf("%w: %w", err, ErrNotTrusted)
}

// noAnchorError is an ErrNotTrusted whose cause says enough.
type noAnchorError struct{ cause error }

func (e *noAnchorError) Error() string   { return e.cause.Error() + ": " + ErrNotTrusted.Error() }
func (e *noAnchorError) Unwrap() []error { return []error{e.cause, ErrNotTrusted, ErrNoAnchor} }
