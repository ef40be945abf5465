package est

// The one file that knows the PKCS#7 library, so that another can take its place.

import (
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
// most 64 KiB, with 1 to 16 certificates and nothing after the end. The order is
// the server's.
func ParseCertsOnly(der []byte) ([]*x509.Certificate, error) {
	if len(der) > maxAnswer {
		return nil, fmt.Errorf("certs-only PKCS#7: %d bytes, more than %d", len(der), maxAnswer)
	}
	// Measured: pkcs7 v0.10.0 converts BER to DER first, ignores what follows the
	// end, and takes quadratic time on deeply nested input. What is DER to begin
	// with, and shallow, it leaves as it is.
	if err := checkDER(der, maxDepth); err != nil {
		return nil, fmt.Errorf("certs-only PKCS#7: %w", err)
	}
	message, err := pkcs7.Parse(der)
	if err != nil {
		return nil, fmt.Errorf("certs-only PKCS#7: %w", err)
	}
	switch n := len(message.Certificates); {
	case len(message.Signers) > 0 || len(message.Content) > 0:
		return nil, errors.New("certs-only PKCS#7: it has a signer or a content")
	case n == 0:
		return nil, errors.New("certs-only PKCS#7: no certificate")
	case n > maxCertificates:
		return nil, fmt.Errorf("certs-only PKCS#7: %d certificates, more than %d", n, maxCertificates)
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

// checkDER checks that data is one value with definite lengths, nested no
// deeper than depth, and that nothing follows it.
func checkDER(data []byte, depth int) error {
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
