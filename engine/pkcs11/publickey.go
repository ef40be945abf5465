//go:build cgo

package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// curves by the OIDs that stand in CKA_EC_PARAMS, DER (RFC 5480 §2.1.1.1).
var curves = []struct {
	params []byte
	curve  elliptic.Curve
}{
	{[]byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}, elliptic.P256()},
	{[]byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}, elliptic.P384()},
	{[]byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23}, elliptic.P521()},
}

// Bounds of the RSA keys that are used. Below, a key is too weak to sign with;
// above, a token's answer would cost a device more time than any key is worth,
// and crypto/tls refuses such a key too.
const (
	minModulusBits  = 2048
	maxModulusBits  = 8192
	maxExponentBits = 31 // what crypto/rsa takes
)

// Values of CKA_KEY_TYPE, as a module writes them.
var (
	keyTypeEC  = pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC).Value
	keyTypeRSA = pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA).Value
)

// publicKey reads the public key of an object that shows it: a public key, and
// on many tokens a private one.
func (s *session) publicKey(object match) (crypto.PublicKey, error) {
	kinds := []uint{pkcs11.CKA_EC_PARAMS, pkcs11.CKA_EC_POINT}
	if bytes.Equal(object.value, keyTypeRSA) {
		kinds = []uint{pkcs11.CKA_MODULUS, pkcs11.CKA_PUBLIC_EXPONENT}
	}
	values, err := s.values(object.handle, kinds...)
	if err == nil {
		var key crypto.PublicKey
		if key, err = parsePublicKey(object.value, values[0], values[1]); err == nil {
			return key, nil
		}
	}
	return nil, fmt.Errorf("read public key: %w", err)
}

// parsePublicKey takes the parameters and the point of an EC key, or the modulus
// and the exponent of an RSA key. The bytes are a token's, which is not trusted
// to have made sense of them.
func parsePublicKey(keyType, first, second []byte) (crypto.PublicKey, error) {
	switch {
	case bytes.Equal(keyType, keyTypeRSA):
		return parseModulus(first, second)
	case !bytes.Equal(keyType, keyTypeEC):
		return nil, fmt.Errorf("%w: neither an EC nor an RSA key", engine.ErrUnsupported)
	}
	for _, known := range curves {
		if bytes.Equal(first, known.params) {
			return parsePoint(known.curve, second)
		}
	}
	return nil, fmt.Errorf("%w: a curve other than P-256, P-384 and P-521", engine.ErrUnsupported)
}

// parsePoint takes an uncompressed point wrapped in an OCTET STRING (PKCS #11
// v2.40 mechanisms §2.3.3), or raw as some modules have it. Its length tells which: both
// begin with 0x04.
func parsePoint(curve elliptic.Curve, point []byte) (crypto.PublicKey, error) {
	size := 1 + 2*((curve.Params().BitSize+7)/8)
	var wrapped []byte
	if len(point) != size {
		if rest, err := asn1.Unmarshal(point, &wrapped); err != nil || len(rest) > 0 || len(wrapped) != size {
			return nil, errors.New("the point is malformed")
		}
		point = wrapped
	}
	key, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil, err
	}
	return key, nil
}

// parseModulus takes two big-endian numbers (PKCS #11 v2.40 mechanisms §2.1.2).
func parseModulus(modulus, exponent []byte) (crypto.PublicKey, error) {
	if len(modulus) > maxModulusBits/8+1 || len(exponent) > maxModulusBits/8+1 { // some write a sign byte
		return nil, fmt.Errorf("%w: an RSA key of more than %d bits", engine.ErrUnsupported, maxModulusBits)
	}
	n, e := new(big.Int).SetBytes(modulus), new(big.Int).SetBytes(exponent)
	switch {
	case n.BitLen() < minModulusBits || n.BitLen() > maxModulusBits:
		return nil, fmt.Errorf("%w: an RSA key of %d bits, want %d to %d", engine.ErrUnsupported, n.BitLen(), minModulusBits, maxModulusBits)
	case n.Bit(0) == 0:
		return nil, errors.New("the modulus is even")
	case e.BitLen() < 2 || e.BitLen() > maxExponentBits || e.Bit(0) == 0:
		return nil, fmt.Errorf("%w: an RSA key whose exponent is not odd and from 3 to 2^%d", engine.ErrUnsupported, maxExponentBits)
	}
	return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
}

// publicHalf finds the public key of a private one, by its CKA_ID: the public
// object; or, where a factory has put none into the token, what some tokens
// show of the private key; or a certificate of it. Each signature is verified
// with it, so that a wrong one does no harm.
func (s *session) publicHalf(private match) (crypto.PublicKey, error) {
	if len(private.ID) > 0 {
		public, err := s.one(URI{Token: s.token, ID: string(private.ID), Type: engine.ClassPublicKey})
		if err == nil {
			return s.publicKey(public)
		}
		if !errors.Is(err, engine.ErrNotFound) {
			return nil, fmt.Errorf("find public key: %w", err)
		}
	}
	key, reason := s.publicKey(private)
	if reason == nil || s.lost(reason) {
		return key, reason
	}
	if len(private.ID) > 0 {
		certs, err := s.certificates(URI{Token: s.token, ID: string(private.ID)})
		if err != nil {
			return nil, err
		}
		for _, found := range certs {
			if key, err := usable(found.cert.PublicKey); err == nil {
				return key, nil
			}
		}
	}
	if errors.Is(reason, engine.ErrUnsupported) {
		return nil, reason // nothing that is missing would help
	}
	return nil, fmt.Errorf("%w: its public key", engine.ErrNotFound)
}

// usable holds the public key of a certificate to the bounds of a token's.
func usable(public crypto.PublicKey) (crypto.PublicKey, error) {
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		for _, known := range curves {
			if key.Curve == known.curve {
				return key, nil
			}
		}
	case *rsa.PublicKey:
		return parseModulus(key.N.Bytes(), big.NewInt(int64(key.E)).Bytes())
	}
	return nil, engine.ErrUnsupported
}
