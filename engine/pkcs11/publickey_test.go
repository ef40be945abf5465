//go:build cgo

package pkcs11

// An internal test: what a token shows is parsed where it is read.

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"math/big"
	"testing"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// halves are the two attributes that a token shows of a public key.
type halves struct{ keyType, first, second []byte }

func ecHalves(t testing.TB, curve int) (halves, *ecdsa.PublicKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(curves[curve].curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return halves{keyTypeEC, curves[curve].params, point}, &key.PublicKey
}

func rsaHalves(bits uint, exponent ...byte) halves {
	n := new(big.Int).Lsh(big.NewInt(1), bits-1)
	n.SetBit(n, 0, 1) // a number of the form of a modulus: what a token would make of it is not asked
	return halves{keyTypeRSA, n.Bytes(), exponent}
}

// Both encodings of a point are read on each curve, and a number with a sign byte.
func TestParsePublicKey(t *testing.T) {
	for i, known := range curves {
		h, want := ecHalves(t, i)
		wrapped, err := asn1.Marshal(h.second)
		if err != nil {
			t.Fatal(err)
		}
		for _, point := range [][]byte{h.second, wrapped} {
			got, err := parsePublicKey(h.keyType, h.first, point)
			if err != nil || !want.Equal(got) {
				t.Errorf("%s: %v, %v", known.curve.Params().Name, got, err)
			}
		}
	}
	for _, modulus := range []halves{rsaHalves(2048, 1, 0, 1), rsaHalves(4096, 1, 0, 1), rsaHalves(8192, 3), rsaHalves(2048, 0x7f, 0xff, 0xff, 0xff)} {
		for _, sign := range [][]byte{nil, {0}} {
			got, err := parsePublicKey(modulus.keyType, append(sign, modulus.first...), append(sign, modulus.second...))
			if err != nil || !bytes.Equal(got.(*rsa.PublicKey).N.Bytes(), modulus.first) {
				t.Errorf("%d bytes: %v, %v", len(modulus.first), got, err)
			}
		}
	}
}

// What a token must not make us work with.
func TestParsePublicKeyRefused(t *testing.T) {
	p256, _ := ecHalves(t, 0)
	offCurve := bytes.Clone(p256.second)
	offCurve[40] ^= 1
	even := rsaHalves(2048, 1, 0, 1)
	even.first[len(even.first)-1]--
	ed25519 := pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, 0x40).Value // CKK_EC_EDWARDS, PKCS #11 v3.0
	for name, c := range map[string]struct {
		halves
		unsupported bool
	}{
		"Ed25519":                {halves{ed25519, p256.first, p256.second}, true},
		"no key type":            {halves{nil, p256.first, p256.second}, true},
		"an unknown curve":       {halves{keyTypeEC, []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x21}, p256.second}, true}, // secp224r1
		"no point":               {halves{keyTypeEC, p256.first, nil}, false},
		"a point of another":     {halves{keyTypeEC, curves[1].params, p256.second}, false},
		"a point off the curve":  {halves{keyTypeEC, p256.first, offCurve}, false},
		"a short modulus":        {rsaHalves(2047, 1, 0, 1), true},
		"a long modulus":         {rsaHalves(8193, 1, 0, 1), true},
		"an endless modulus":     {rsaHalves(1<<20, 1, 0, 1), true},
		"an endless exponent":    {halves{keyTypeRSA, rsaHalves(2048, 3).first, make([]byte, 1<<20)}, true},
		"no modulus":             {halves{keyTypeRSA, nil, []byte{1, 0, 1}}, true},
		"an even modulus":        {even, false},
		"no exponent":            {rsaHalves(2048), true},
		"exponent 1":             {rsaHalves(2048, 1), true},
		"an even exponent":       {rsaHalves(2048, 1, 0, 0), true},
		"an exponent of 32 bits": {rsaHalves(2048, 0x80, 0, 0, 1), true},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := parsePublicKey(c.keyType, c.first, c.second)
			if err == nil {
				t.Fatalf("accepted: %v", engine.AlgorithmOf(key))
			}
			if errors.Is(err, engine.ErrUnsupported) != c.unsupported {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A certificate stands in for a public object only with a key that is used here.
func TestUsable(t *testing.T) {
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.PublicKey{&small.PublicKey, &p224.PublicKey, nil} {
		if _, err := usable(key); !errors.Is(err, engine.ErrUnsupported) {
			t.Errorf("%s: got %v", engine.AlgorithmOf(key), err)
		}
	}
	_, p521 := ecHalves(t, 2)
	if key, err := usable(p521); err != nil || !p521.Equal(key) {
		t.Errorf("%v, %v", key, err)
	}
}

// FuzzParsePublicKey: whatever a token shows, the key is one that the standard
// library can encode and read again, of a bounded size; or there is an error.
func FuzzParsePublicKey(f *testing.F) {
	for i := range curves {
		h, _ := ecHalves(f, i)
		f.Add(h.keyType, h.first, h.second)
	}
	h := rsaHalves(2048, 1, 0, 1)
	f.Add(h.keyType, h.first, h.second)
	f.Fuzz(func(t *testing.T, keyType, first, second []byte) {
		key, err := parsePublicKey(keyType, first, second)
		if err != nil {
			if len(err.Error()) > 200 {
				t.Fatalf("a long error: %v", err)
			}
			return
		}
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		again, err := x509.ParsePKIXPublicKey(der)
		if err != nil || len(der) > maxModulusBits/8+64 {
			t.Fatalf("%d bytes, %v", len(der), err)
		}
		if engine.AlgorithmOf(again) != engine.AlgorithmOf(key) {
			t.Fatalf("%s became %s", engine.AlgorithmOf(key), engine.AlgorithmOf(again))
		}
	})
}
