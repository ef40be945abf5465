package est

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
)

// What a server may make of a wish for an encrypted key.
var (
	// ErrKeyEnveloped says that a server has encrypted the key that it made, and that
	// there is no decryption key.
	ErrKeyEnveloped = errors.New("the key is encrypted (CMS EnvelopedData)")
	// ErrKeyNotEnveloped says that a server has sent the key in the clear although it was
	// told the decryption key.
	ErrKeyNotEnveloped = errors.New("the key is not encrypted for the decryption key")
)

// ServerKey is a key that a server has made, and the certificate for it (RFC 7030
// §4.4, RFC 9148 §4.8). Whoever gets one clears it.
type ServerKey struct {
	// PKCS8 is the private key in the clear, DER (RFC 5958).
	PKCS8 []byte
	// Certificates of the answer, the issued one among them, not yet judged.
	Certificates []*x509.Certificate
	// Enveloped says that the key was encrypted.
	Enveloped bool
	// Signer is who has signed an enveloped key, with the certificates beside its own,
	// not yet judged; nil if nobody has.
	Signer []*x509.Certificate
}

// Clear overwrites the private key, if there is one.
func (k *ServerKey) Clear() {
	if k != nil {
		clear(k.PKCS8)
	}
}

// serverKeyOf parses an answer of skg, skc or serverkeygen, whose buffers are
// cleared: the ServerKey has one of its own.
func (c *Client) serverKeyOf(resp *Response) (*ServerKey, error) {
	defer clear(resp.Body)
	parts := resp.Parts
	if parts == nil {
		if resp.ContentFormat != ContentFormatMultipartCore {
			return nil, fmt.Errorf("content-format %d, want %d", resp.ContentFormat, ContentFormatMultipartCore)
		}
		var err error
		if parts, err = ParseMultipartCore(resp.Body); err != nil {
			return nil, err
		}
	}
	return ParseServerKey(parts, c.DecryptionKey)
}

// ParseServerKey parses the parts of an answer of serverkeygen: one key and one
// certificate, in any order (RFC 9148 §4.8); parts that are neither are ignored. The
// bodies of the parts are the ServerKey's then, or cleared where there is none. With a
// decryption key the key must be encrypted for it, without one it must not: OpenKey's
// errors, ErrKeyNotEnveloped, ErrKeyEnveloped.
func ParseServerKey(parts []Part, with *DecryptionKey) (key *ServerKey, err error) {
	key = new(ServerKey)
	defer func(made *ServerKey) {
		if err != nil {
			made.Clear()
			clearParts(parts)
		}
	}(key)
	for _, part := range parts {
		switch part.ContentFormat {
		case ContentFormatPKCS7ServerKey, ContentFormatPKCS8:
			if key.PKCS8 != nil {
				return nil, errors.New("two keys")
			}
			if err := key.take(part, with); err != nil {
				return nil, err
			}
		case ContentFormatPKCS7CertsOnly, ContentFormatPKIXCert:
			if key.Certificates != nil {
				return nil, errors.New("two answers of certificates")
			}
			if key.Certificates, err = ParseCertificates(&Response{ContentFormat: part.ContentFormat, Body: part.Body}); err != nil {
				return nil, err
			}
		}
	}
	switch {
	case key.PKCS8 == nil:
		return nil, errors.New("no key")
	case key.Certificates == nil:
		return nil, ErrNoCertificate
	}
	return key, nil
}

func (k *ServerKey) take(part Part, with *DecryptionKey) error {
	switch enveloped := part.ContentFormat == ContentFormatPKCS7ServerKey; {
	case enveloped && with == nil:
		return ErrKeyEnveloped
	case !enveloped && with != nil:
		return ErrKeyNotEnveloped
	case !enveloped:
		k.PKCS8 = part.Body
		return nil
	}
	opened, err := OpenKey(part.Body, *with)
	if err != nil {
		return err
	}
	k.PKCS8, k.Enveloped, k.Signer = opened.PKCS8, true, opened.Signer
	return nil
}

// clearParts overwrites what may be a key.
func clearParts(parts []Part) {
	for _, part := range parts {
		clear(part.Body)
	}
}

// Public returns the public key of the private one, EC or RSA, of which it keeps
// nothing: what was parsed is cleared as far as Go allows.
func (k *ServerKey) Public() (crypto.PublicKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(k.PKCS8)
	if err != nil {
		return nil, fmt.Errorf("PKCS#8: %w", errNoKey) // of the library's, which may show what it read
	}
	var whole asn1.RawValue
	if rest, err := asn1.Unmarshal(k.PKCS8, &whole); err != nil || len(rest) > 0 { // which the library passes over
		return nil, errors.New("PKCS#8: bytes after its end")
	}
	switch key := parsed.(type) {
	case *ecdsa.PrivateKey:
		//lint:ignore SA1019 nobody uses the key again: its value is overwritten
		wipe(key.D)
		return &key.PublicKey, nil
	case *rsa.PrivateKey:
		wipe(append(append([]*big.Int{key.D}, key.Primes...), key.Precomputed.Dp, key.Precomputed.Dq, key.Precomputed.Qinv)...)
		return &key.PublicKey, nil
	}
	return nil, fmt.Errorf("PKCS#8: a key of type %T", parsed)
}

var errNoKey = errors.New("not a private key")

// wipe overwrites the digits of numbers.
func wipe(numbers ...*big.Int) {
	for _, n := range numbers {
		if n != nil {
			clear(n.Bits())
		}
	}
}
