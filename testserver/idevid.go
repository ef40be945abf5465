package testserver

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
)

// IDevIDRequest asks the factory CA for a factory credential (IEEE 802.1AR):
// for a CSR, or for a public key that the factory read from the token itself.
type IDevIDRequest struct {
	// CSR is the DER of a PKCS#10 request; its signature is verified.
	CSR []byte
	// PublicKey stands in for CSR. Exactly one of the two is set.
	PublicKey crypto.PublicKey
	// RawSubject is the DER of the subject. Default: the CSR's.
	RawSubject []byte
	// SAN is the subjectAltName extension's value and its critical flag.
	// Default: the CSR's, if any.
	SAN *pkix.Extension
}

// IssueIDevID signs a factory credential that does not expire, as IEEE 802.1AR
// asks. It looks a year old, so that a device whose clock is behind can use it.
func (s *Server) IssueIDevID(req IDevIDRequest) (*x509.Certificate, error) {
	cert, err := s.issueIDevID(req)
	if err != nil {
		return nil, fmt.Errorf("idevid: %w", err)
	}
	return cert, nil
}

func (s *Server) issueIDevID(req IDevIDRequest) (*x509.Certificate, error) {
	pub, rawSubject, san := req.PublicKey, req.RawSubject, req.SAN
	switch {
	case (req.CSR == nil) == (pub == nil):
		return nil, errors.New("either a CSR or a public key is needed")
	case req.CSR != nil:
		csr, err := parseCSR(req.CSR)
		if err != nil {
			return nil, err
		}
		pub = csr.PublicKey
		if rawSubject == nil {
			rawSubject = csr.RawSubject
		}
		if san == nil {
			san = subjectAltName(csr.Extensions)
		}
	case rawSubject == nil:
		return nil, errors.New("a public key needs a subject")
	}
	if err := errors.Join(checkKey(pub), checkNames(rawSubject, san)); err != nil {
		return nil, err
	}
	now := s.now()
	cert, err := s.ca.Load().factory.sign(leafTemplate(rawSubject, san, now.Add(-caAge), noExpiry), pub)
	if err != nil {
		return nil, err
	}
	event := newEvent(EventIDevID, now, cert)
	if req.CSR != nil {
		event.CSR = fingerprint(req.CSR)
	}
	return cert, s.record.add(event)
}
