// Package csr builds certification requests (PKCS#10, RFC 2986) that are signed
// by a crypto.Signer, the key of an HSM as a rule, and verified before they
// leave. It never sees a private key, and it copies the names of a certificate
// as DER where they must be the same (RFC 7030 §4.2.2).
package csr

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
)

// OIDSubjectAltName is the extension of the SANs (RFC 5280 §4.2.1.6).
var OIDSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// Template is what a CSR asks for. The public key is the signer's.
type Template struct {
	// RawSubject is the DER of the Subject, from ParseSubject or a certificate.
	// Default: the empty name.
	RawSubject []byte
	// SANs to ask for. Default: none.
	SANs []SAN
	// RawSAN is a whole extension, copied from a certificate; not beside SANs.
	RawSAN *pkix.Extension
	// KeyUsage and ExtKeyUsage to ask for, from ParseKeyUsage and
	// ParseExtKeyUsage. Default: none, the CA decides.
	KeyUsage    x509.KeyUsage
	ExtKeyUsage []asn1.ObjectIdentifier
	// PSS has an RSA key sign with RSASSA-PSS (RFC 4055 §3) instead of PKCS #1
	// v1.5. The key in the request is an RSA key all the same (rsaEncryption), whose
	// certificate may be used with either.
	PSS bool
}

// ForReenrollment returns the template with the Subject and SAN of a
// certificate as DER: "The request Subject field and SubjectAltName extension
// MUST be identical to the corresponding fields in the certificate being
// renewed/rekeyed" (RFC 7030 §4.2.2), and servers compare bytes.
func ForReenrollment(cert *x509.Certificate) Template {
	return Template{RawSubject: cert.RawSubject, RawSAN: extension(cert.Extensions, OIDSubjectAltName)}
}

// SANExtension returns the extension that the CSR will carry, the zero one if none.
func (t Template) SANExtension() (pkix.Extension, error) {
	switch {
	case t.RawSAN != nil && len(t.SANs) > 0:
		return pkix.Extension{}, errors.New("csr: SANs and a copied SAN: want one of them")
	case t.RawSAN != nil:
		return *t.RawSAN, nil
	case len(t.SANs) == 0:
		return pkix.Extension{}, nil
	}
	value, err := marshalSANs(t.SANs)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("csr: %w", err)
	}
	// With an empty subject the SAN MUST be critical (RFC 5280 §4.2.1.6).
	return pkix.Extension{Id: OIDSubjectAltName, Critical: bytes.Equal(t.subject(), emptyName), Value: value}, nil
}

// Extensions returns what the CSR will ask for beside the Subject
// (extensionRequest, RFC 2985 §5.4.2): SAN, key usage and extended key usage.
func (t Template) Extensions() ([]pkix.Extension, error) {
	var extensions []pkix.Extension
	san, err := t.SANExtension()
	if err != nil {
		return nil, err
	}
	if san.Id != nil {
		extensions = append(extensions, san)
	}
	if t.KeyUsage != 0 {
		usage, err := keyUsageExtension(t.KeyUsage)
		if err != nil {
			return nil, fmt.Errorf("csr: %w", err)
		}
		extensions = append(extensions, usage)
	}
	if len(t.ExtKeyUsage) > 0 {
		purposes, err := extKeyUsageExtension(t.ExtKeyUsage)
		if err != nil {
			return nil, fmt.Errorf("csr: %w", err)
		}
		extensions = append(extensions, purposes)
	}
	return extensions, nil
}

var emptyName = []byte{0x30, 0x00}

func (t Template) subject() []byte {
	if len(t.RawSubject) == 0 {
		return emptyName
	}
	return t.RawSubject
}

// Build returns the DER of a CSR that asks for what the template says, signed by
// the signer: with the hash that is as strong as its curve (SHA-256, SHA-384 or
// SHA-512), or SHA-256 for an RSA key. The signature is verified before it
// leaves, since a token can fail. A nil random source is crypto/rand.
func Build(random io.Reader, template Template, signer crypto.Signer) ([]byte, error) {
	if random == nil {
		random = rand.Reader
	}
	extensions, err := template.Extensions()
	if err != nil {
		return nil, err
	}
	request := &x509.CertificateRequest{RawSubject: template.subject(), ExtraExtensions: extensions}
	if _, isRSA := signer.Public().(*rsa.PublicKey); isRSA && template.PSS {
		request.SignatureAlgorithm = x509.SHA256WithRSAPSS
	}
	der, err := x509.CreateCertificateRequest(random, request, signer)
	if err != nil {
		return nil, fmt.Errorf("csr: sign: %w", err)
	}
	parsed, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("csr: read back: %w", err)
	}
	if err := parsed.CheckSignature(); err != nil {
		return nil, fmt.Errorf("csr: the signature that the key made does not verify: %w", err)
	}
	return der, nil
}
