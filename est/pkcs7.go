package est

// The one file that knows the PKCS#7 library, so that another can take its place.

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"

	"go.mozilla.org/pkcs7"
)

// Limits of what a server's answer may be.
const (
	maxAnswer       = 64 << 10 // bytes
	maxCertificates = 16
	maxDepth        = 32 // nested ASN.1 values
)

// ParseCertsOnly parses a certs-only CMC Simple PKI Response: a PKCS#7 SignedData
// without content and signers (RFC 7030 §4.1.3, RFC 9148 §4.3). It is DER, of at
// most 64 KiB, with 1 to 16 certificates and nothing after any end. The order is
// the server's.
func ParseCertsOnly(der []byte) ([]*x509.Certificate, error) {
	certs, err := parseCertsOnly(der)
	if err != nil {
		return nil, fmt.Errorf("certs-only PKCS#7: %w", err)
	}
	return certs, nil
}

func parseCertsOnly(der []byte) ([]*x509.Certificate, error) {
	if len(der) == 0 {
		return nil, errors.New("empty")
	}
	if len(der) > maxAnswer {
		return nil, fmt.Errorf("%d bytes, more than %d", len(der), maxAnswer)
	}
	// Measured: pkcs7 v0.10.0 converts BER to DER first, which takes quadratic
	// time on deeply nested input (0.5 s for 60 kB), ignores what follows an end,
	// and ignores that the SignedData does not parse: signers it cannot read
	// are none to it. So it sees only what has passed these two.
	if err := checkDepth(der, maxDepth); err != nil {
		return nil, err
	}
	if err := checkCertsOnly(der); err != nil {
		return nil, err
	}
	message, err := pkcs7.Parse(der)
	if err != nil {
		return nil, err
	}
	switch n := len(message.Certificates); {
	case n == 0:
		return nil, errors.New("no certificate")
	case n > maxCertificates:
		return nil, fmt.Errorf("%d certificates, more than %d", n, maxCertificates)
	}
	return message.Certificates, nil
}

// MarshalCertsOnly is the reverse of ParseCertsOnly.
func MarshalCertsOnly(certs []*x509.Certificate) ([]byte, error) {
	var der []byte
	for _, cert := range certs {
		der = append(der, cert.Raw...)
	}
	message, err := pkcs7.DegenerateCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("certs-only PKCS#7: %w", err)
	}
	return message, nil
}

// contentInfo is a ContentInfo that holds a SignedData (RFC 5652 §3, §5.1).
type contentInfo struct {
	ContentType asn1.ObjectIdentifier
	SignedData  struct {
		Version          int
		DigestAlgorithms asn1.RawValue
		EncapContentInfo struct {
			ContentType asn1.ObjectIdentifier
			Content     asn1.RawValue `asn1:"optional,tag:0"`
		}
		Certificates asn1.RawValue   `asn1:"optional,tag:0"`
		CRLs         asn1.RawValue   `asn1:"optional,tag:1"`
		SignerInfos  []asn1.RawValue `asn1:"set"`
	} `asn1:"explicit,tag:0"`
}

// checkCertsOnly checks that data is a SignedData without signers, for which "the
// content field of the EncapsulatedContentInfo value MUST be omitted" (RFC 5652 §5.2).
func checkCertsOnly(data []byte) error {
	var message contentInfo
	if _, err := asn1.Unmarshal(data, &message); err != nil {
		return err
	}
	switch {
	case !message.ContentType.Equal(pkcs7.OIDSignedData):
		return fmt.Errorf("content type %s, want signedData", message.ContentType)
	case len(message.SignedData.SignerInfos) > 0 || len(message.SignedData.EncapContentInfo.Content.FullBytes) > 0:
		return errors.New("it has a signer or a content")
	}
	// encoding/asn1 passes over what follows the last field of a SEQUENCE.
	again, err := asn1.Marshal(message)
	if err == nil && !bytes.Equal(again, data) {
		err = errors.New("more in it than a SignedData has, or not DER")
	}
	return err
}

// verifySignedData verifies a SignedData with its content and one signer, whose
// certificate is in it, and returns the content and the certificates, the signer's
// first. The content is a part of the data, or a copy of what is in pieces there.
func verifySignedData(der []byte) (content []byte, chain []*x509.Certificate, err error) {
	var message contentInfo
	message.ContentType = pkcs7.OIDSignedData
	if rest, err := asn1.Unmarshal(der, &message.SignedData); err != nil || len(rest) > 0 {
		return nil, nil, errors.New("not a SignedData")
	}
	encapsulated := &message.SignedData.EncapContentInfo
	var octets asn1.RawValue
	if _, err := asn1.Unmarshal(encapsulated.Content.Bytes, &octets); err != nil || octets.Tag != asn1.TagOctetString {
		return nil, nil, errors.New("signed content: it is not there")
	}
	kind, content := encapsulated.ContentType, octets.Bytes
	if octets.IsCompound {
		if content, err = joined(content); err != nil {
			return nil, nil, fmt.Errorf("signed content: %w", err)
		}
	}
	// The library sees no secret, of which it would make copies.
	encapsulated.Content = asn1.RawValue{}
	detached, err := asn1.Marshal(message)
	if err != nil {
		return nil, nil, err
	}
	signed, err := pkcs7.Parse(detached)
	if err != nil {
		return nil, nil, fmt.Errorf("signed content: %w", err)
	}
	signed.Content = content
	signer := signed.GetOnlySigner()
	switch {
	case signer == nil:
		return nil, nil, errors.New("signed content: not one signer whose certificate is there by issuer and serial number")
	case len(signed.Certificates) > maxCertificates:
		return nil, nil, fmt.Errorf("signed content: %d certificates, more than %d", len(signed.Certificates), maxCertificates)
	}
	// "The message digest" covers the content alone, so its type is signed too, where it
	// is not data (RFC 5652 §5.3). Measured: pkcs7 v0.10.0 does not compare it.
	var signedKind asn1.ObjectIdentifier
	err = signed.UnmarshalSignedAttribute(pkcs7.OIDAttributeContentType, &signedKind)
	if !kind.Equal(pkcs7.OIDData) && (err != nil || !kind.Equal(signedKind)) {
		return nil, nil, errors.New("signed content: its type is not signed")
	}
	if err := signed.Verify(); err != nil {
		return nil, nil, fmt.Errorf("signed content: %w", err)
	}
	chain = []*x509.Certificate{signer}
	for _, cert := range signed.Certificates {
		if !cert.Equal(signer) {
			chain = append(chain, cert)
		}
	}
	return content, chain, nil
}

// checkDepth checks that data is one value with definite lengths, nested no
// deeper than depth, and that nothing follows it.
func checkDepth(data []byte, depth int) error {
	rest, err := checkValue(data, depth)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes after the end", len(rest))
	}
	return err
}

func checkValue(data []byte, depth int) (rest []byte, err error) {
	if depth == 0 {
		return nil, fmt.Errorf("nested deeper than %d", maxDepth)
	}
	var value asn1.RawValue
	if rest, err = asn1.Unmarshal(data, &value); err != nil {
		return nil, err
	}
	for inner := value.Bytes; value.IsCompound && len(inner) > 0; {
		if inner, err = checkValue(inner, depth-1); err != nil {
			return nil, err
		}
	}
	return rest, nil
}
