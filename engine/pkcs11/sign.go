//go:build cgo

package pkcs11

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// Signer implements engine.Engine.
func (e *Engine) Signer(ctx context.Context, at engine.Address) (crypto.Signer, error) {
	const op = "open key"
	u, err := e.objectAddress(at, engine.ClassPrivateKey)
	if err != nil {
		return nil, fail(op, at, e.uri.ModulePath, err)
	}
	k := &signer{held: held{engine: e, uri: u}}
	err = e.read(ctx, op, u, func(s *session) error {
		private, err := k.find(s)
		if err != nil {
			return err
		}
		k.public, err = s.publicHalf(private)
		return err
	})
	if err != nil {
		return nil, err
	}
	return k, nil
}

// held is an object in the token that is used again and again.
type held struct {
	engine *Engine
	uri    URI

	// Guarded by the module's gate.
	handle     pkcs11.ObjectHandle
	connection int // of the token, when the handle was found
}

func (h *held) find(s *session) (match, error) {
	object, err := s.one(h.uri)
	if err == nil {
		h.handle, h.connection = object.handle, s.connection
	}
	return object, err
}

// use does something with the object that changes nothing. What it is for has no
// context, and the calls could not be interrupted.
func (h *held) use(op string, do func(*session) error) error {
	return h.engine.read(context.Background(), op, h.uri, func(s *session) error {
		if h.connection != s.connection { // handles end with their session
			if _, err := h.find(s); err != nil {
				return err
			}
		}
		return do(s)
	})
}

// signer is a private key in the token.
type signer struct {
	held
	public crypto.PublicKey
}

var _ crypto.Signer = (*signer)(nil)

// Public implements crypto.Signer.
func (k *signer) Public() crypto.PublicKey { return k.public }

// Sign implements crypto.Signer. The source of randomness is the token's.
func (k *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	const op = "sign with"
	if opts != nil && opts.HashFunc() != 0 && len(digest) != opts.HashFunc().Size() {
		return nil, fail(op, k.uri, k.engine.uri.ModulePath, fmt.Errorf("a digest of %d bytes, %s has %d", len(digest), opts.HashFunc(), opts.HashFunc().Size()))
	}
	how, err := signingWith(k.public, digest, opts)
	if err != nil {
		return nil, fail(op, k.uri, k.engine.uri.ModulePath, err)
	}
	err = k.use(op, func(s *session) error {
		signature, err = s.sign(k.handle, how)
		return err
	})
	return signature, err
}

// signing is how a digest is signed and the signature verified.
type signing struct {
	name      string // of the mechanism
	mechanism *pkcs11.Mechanism
	input     []byte
	// finish turns what the token made into the signature that verifies, or fails.
	finish func(raw []byte) (signature []byte, verifies bool)
}

// hashes are those of RSA signatures: the DigestInfo without the digest, DER
// (RFC 8017 §9.2, note 1), and the names that PSS has for them (PKCS #11 v2.40
// mechanisms §2.1.11).
var hashes = map[crypto.Hash]struct {
	prefix         []byte
	mechanism, mgf uint
}{
	crypto.SHA256: {[]byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}, pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256},
	crypto.SHA384: {[]byte{0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0x04, 0x30}, pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384},
	crypto.SHA512: {[]byte{0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05, 0x00, 0x04, 0x40}, pkcs11.CKM_SHA512, pkcs11.CKG_MGF1_SHA512},
}

// signingWith chooses by the key and, for RSA, by the options.
func signingWith(public crypto.PublicKey, digest []byte, opts crypto.SignerOpts) (*signing, error) {
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		return signingECDSA(key, digest), nil
	case *rsa.PublicKey:
		if opts == nil {
			return nil, errors.New("an RSA signature names its hash: no options are given")
		}
		if _, known := hashes[opts.HashFunc()]; !known {
			return nil, fmt.Errorf("an RSA signature over a hash other than SHA-256, SHA-384 and SHA-512: %w", engine.ErrUnsupported)
		}
		if pss, ok := opts.(*rsa.PSSOptions); ok {
			return signingPSS(key, digest, opts.HashFunc(), pss.SaltLength)
		}
		return signingPKCS1(key, digest, opts.HashFunc()), nil
	}
	return nil, engine.ErrUnsupported
}

// signingECDSA gives a signature in DER (RFC 3279 §2.2.3); the token's is r‖s.
func signingECDSA(key *ecdsa.PublicKey, digest []byte) *signing {
	// Its leftmost bits (FIPS 186-5 §6.4.1); some modules refuse more.
	input := digest[:min(len(digest), (key.Curve.Params().BitSize+7)/8)]
	return &signing{"CKM_ECDSA", pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil), input, func(raw []byte) ([]byte, bool) {
		half := len(raw) / 2
		if half == 0 || len(raw)%2 != 0 {
			return nil, false
		}
		signature, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:half]), new(big.Int).SetBytes(raw[half:])})
		return signature, err == nil && ecdsa.VerifyASN1(key, digest, signature)
	}}
}

// signingPKCS1 hands the token a DigestInfo, which CKM_RSA_PKCS pads and signs.
func signingPKCS1(key *rsa.PublicKey, digest []byte, hash crypto.Hash) *signing {
	input := slices.Concat(hashes[hash].prefix, digest)
	return &signing{"CKM_RSA_PKCS", pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil), input, func(raw []byte) ([]byte, bool) {
		return raw, rsa.VerifyPKCS1v15(key, hash, digest, raw) == nil
	}}
}

// signingPSS obeys the salt's length as crypto/rsa does: a number of bytes, or
// one of its two constants.
func signingPSS(key *rsa.PublicKey, digest []byte, hash crypto.Hash, salt int) (*signing, error) {
	longest := (key.N.BitLen()+6)/8 - 2 - hash.Size() // RFC 8017 §9.1.1: emLen - hLen - 2
	switch salt {
	case rsa.PSSSaltLengthAuto:
		salt = longest
	case rsa.PSSSaltLengthEqualsHash:
		salt = hash.Size()
	}
	if salt < 0 || salt > longest {
		return nil, fmt.Errorf("a PSS salt of %d bytes, want 0 to %d", salt, longest)
	}
	parameters := pkcs11.NewPSSParams(hashes[hash].mechanism, hashes[hash].mgf, uint(salt))
	return &signing{"CKM_RSA_PKCS_PSS", pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS, parameters), digest, func(raw []byte) ([]byte, bool) {
		return raw, rsa.VerifyPSS(key, hash, digest, raw, &rsa.PSSOptions{SaltLength: salt}) == nil
	}}, nil
}

// sign makes a signature and verifies it: a token that errs, or a public key that
// is another's, must not be found out by a server.
func (s *session) sign(private pkcs11.ObjectHandle, how *signing) ([]byte, error) {
	if err := s.module.ctx.SignInit(s.handle, []*pkcs11.Mechanism{how.mechanism}, private); err != nil {
		return nil, fmt.Errorf("%s: %w", how.name, explain(err))
	}
	raw, err := s.module.ctx.Sign(s.handle, how.input)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", how.name, explain(err))
	}
	signature, verifies := how.finish(raw)
	if !verifies {
		return nil, fmt.Errorf("%s: the token's signature does not verify with the public key", how.name)
	}
	return signature, nil
}
