package testserver

import (
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"slices"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/internal/coap"
)

// The faults of a body, and what they are for the help text.
var bodyFaults = map[string]string{
	"none":                  "the CA certificates, and not the issued one",
	"empty":                 "a PKCS#7 without certificates",
	"nothing":               "no byte",
	"two-leaves":            "the server's own certificate beside the issued one",
	"pkcs7-truncated":       "the first half of the PKCS#7",
	"pkcs7-trailing":        "the PKCS#7 and bytes after its end",
	"certificate-truncated": "a certificate without its signature",
	"certificate-trailing":  "a certificate with a value after its signature",
	"pkix-truncated":        "the first half of the certificate, as 287",
	"pkix-trailing":         "the certificate and bytes after its end, as 287",
	"wrong-format":          "content-format 50",
	"no-format":             "no content-format",
	"swapped-format":        "a PKCS#7 as 287",
}

// shape makes the body of an answer what a fault asks for.
func (s *Server) shape(kind string, resp *coap.Response, certs []*x509.Certificate) error {
	var err error
	leaf := certs[0].Raw
	switch kind {
	case "none":
		resp.Body, err = est.MarshalCertsOnly(s.ca.Load().own())
	case "empty":
		resp.Body, err = est.MarshalCertsOnly(nil)
	case "nothing":
		resp.Body = nil
	case "two-leaves":
		resp.Body, err = est.MarshalCertsOnly(append(slices.Clone(certs), s.ca.Load().leaf))
	case "pkcs7-truncated":
		resp.Body = resp.Body[:len(resp.Body)/2]
	case "pkcs7-trailing":
		resp.Body = append(slices.Clone(resp.Body), trailing...)
	case "certificate-truncated", "certificate-trailing":
		var changed []byte
		if changed, err = changeCertificate(leaf, kind == "certificate-trailing"); err == nil {
			resp.Body, err = est.MarshalCertsOnly([]*x509.Certificate{{Raw: changed}})
		}
	case "pkix-truncated":
		resp.Body, resp.ContentFormat = leaf[:len(leaf)/2], new(uint16(est.ContentFormatPKIXCert))
	case "pkix-trailing":
		resp.Body, resp.ContentFormat = append(slices.Clone(leaf), trailing...), new(uint16(est.ContentFormatPKIXCert))
	case "wrong-format":
		resp.ContentFormat = new(uint16(formatJSON))
	case "no-format":
		resp.ContentFormat = nil
	case "swapped-format":
		resp.ContentFormat = new(uint16(est.ContentFormatPKIXCert))
	default:
		err = fmt.Errorf("no such body: %q", kind)
	}
	return err
}

var trailing = []byte{asn1.TagNull, 0}

// formatJSON is application/json (RFC 7252 §12.3), which is no format of EST.
const formatJSON = 50

// changeCertificate takes the signature off a certificate, or puts a NULL after
// it, with lengths that fit.
func changeCertificate(der []byte, trail bool) ([]byte, error) {
	var parts []asn1.RawValue
	if _, err := asn1.Unmarshal(der, &parts); err != nil {
		return nil, err
	}
	if trail {
		parts = append(parts, asn1.RawValue{FullBytes: trailing})
	} else {
		parts = parts[:len(parts)-1]
	}
	return asn1.Marshal(parts)
}

// The faults of a crts answer.
var crtsFaults = map[string]string{
	"foreign": "a CA of the same name and another key",
	"leaf":    "the server's own certificate",
}

// crts is what /crts answers.
func (s *Server) crts() []*x509.Certificate {
	switch s.Faults().CRTS {
	case "foreign":
		return []*x509.Certificate{s.ca.Load().foreign.cert}
	case "leaf":
		return []*x509.Certificate{s.ca.Load().leaf}
	}
	return s.ca.Load().caCerts()
}

// The faults of an answer of att and csrattrs.
var attributesFaults = map[string]string{
	"malformed":    "a text, and no DER",
	"truncated":    "the first half of the list",
	"trailing":     "the list and bytes after its end",
	"nothing":      "no byte",
	"wrong-format": "content-format 50",
}

// attributes is the answer of att and csrattrs.
func (s *Server) attributes() *coap.Response {
	resp := &coap.Response{Code: codes.Content, ContentFormat: new(uint16(est.ContentFormatCSRAttrs)), Body: s.cfg.CSRAttributes}
	switch s.Faults().CSRAttrs {
	case "malformed":
		resp.Body = []byte("whatever you like")
	case "truncated":
		resp.Body = resp.Body[:len(resp.Body)/2]
	case "trailing":
		resp.Body = append(slices.Clone(resp.Body), trailing...)
	case "nothing":
		resp.Body = nil
	case "wrong-format":
		resp.ContentFormat = new(uint16(formatJSON))
	}
	return resp
}

const (
	// noMultipart is a fault of an answer with a key that a door has to know.
	noMultipart = "no-multipart"
	// otherType is one that the key is made by.
	otherType = "other-type"
)

// The faults of an answer with a key.
var serverKeyFaults = map[string]string{
	"reversed":       "the certificate before the key, which a client has to take (RFC 9148 §4.8)",
	"no-key":         "the certificate alone, in a multipart",
	"no-certificate": "the key alone, in a multipart",
	noMultipart:      "the certificate alone, as that of sen",
	"two-keys":       "the key twice",
	"key-truncated":  "the first half of the key",
	"key-trailing":   "the key and bytes after its end",
	"key-format":     "the key as content-format 50",
	otherType:        "for an EC key on P-521, or on P-256 where that was asked for",
}

// serverKey is the answer of skg, skc and serverkeygen (RFC 9148 §4.8, RFC 7030 §4.4.2):
// "[284, key, 281, PKCS#7]", or the certificate as it is in the place of the latter.
func (s *Server) serverKey(operation est.Operation, made issued) ([]est.Part, error) {
	key := est.Part{ContentFormat: est.ContentFormatPKCS8, Body: made.pkcs8}
	if fault := s.Faults().Envelope; made.sealing != nil && fault != "clear" {
		body, err := s.envelop(made.pkcs8, made.sealing, fault)
		if err != nil {
			return nil, err
		}
		key = est.Part{ContentFormat: est.ContentFormatPKCS7ServerKey, Body: body}
	}
	certificate := est.Part{ContentFormat: est.ContentFormatPKIXCert, Body: made.cert.Raw}
	if operation == est.ServerKeyGen {
		body, err := est.MarshalCertsOnly(s.answered(made.cert))
		if err != nil {
			return nil, err
		}
		certificate = est.Part{ContentFormat: est.ContentFormatPKCS7CertsOnly, Body: body}
	}
	switch s.Faults().ServerKey {
	case "reversed":
		return []est.Part{certificate, key}, nil
	case "no-key", noMultipart:
		return []est.Part{certificate}, nil
	case "no-certificate":
		return []est.Part{key}, nil
	case "two-keys":
		return []est.Part{key, key, certificate}, nil
	case "key-truncated":
		key.Body = key.Body[:len(key.Body)/2]
	case "key-trailing":
		key.Body = append(slices.Clone(key.Body), trailing...)
	case "key-format":
		key.ContentFormat = formatJSON
	}
	return []est.Part{key, certificate}, nil
}

// The faults of the certificate that the server shows.
var serverCertificateFaults = map[string]string{
	"other-name":    "for another server",
	"expired":       "ended an hour ago",
	"not-yet-valid": "begins an hour from now",
	"foreign":       "under a CA of the same name and another key",
	"client":        "for clients only",
	"truncated":     "without its signature",
	"trailing":      "with a value after its signature",
}

// presentedChain is what the server shows in a handshake, or what the fault
// makes of it, always for the same key.
func (s *Server) presentedChain(pub crypto.PublicKey) ([][]byte, error) {
	leaf := s.ca.Load().leaf.Raw
	var err error
	switch kind := s.Faults().ServerCertificate; kind {
	case "":
	case "truncated", "trailing":
		leaf, err = changeCertificate(leaf, kind == "trailing")
	default:
		leaf, err = s.wrongServerCertificate(kind, pub)
	}
	if err != nil {
		return nil, err
	}
	chain := [][]byte{leaf}
	for _, cert := range s.ca.Load().chain() {
		chain = append(chain, cert.Raw)
	}
	return chain, nil
}

func (s *Server) wrongServerCertificate(kind string, pub crypto.PublicKey) ([]byte, error) {
	template, issuer, now := *s.ca.Load().leaf, s.ca.Load().issuing, s.now()
	template.SerialNumber, template.ExtraExtensions, template.Raw = nil, nil, nil
	switch kind {
	case "other-name":
		template.DNSNames, template.IPAddresses = []string{"other.example"}, nil
	case "expired":
		template.NotAfter = now.Add(-time.Hour)
	case "not-yet-valid":
		template.NotBefore = now.Add(time.Hour)
	case "foreign":
		issuer = s.ca.Load().foreign
	case "client":
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	cert, err := issuer.sign(&template, pub)
	if err != nil {
		return nil, err
	}
	return cert.Raw, nil
}
