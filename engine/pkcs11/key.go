//go:build cgo

package pkcs11

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// ecParamsP256 is the OID of secp256r1 (RFC 5480 §2.1.1.1), DER.
var ecParamsP256 = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}

const idSize = 16 // bytes of a CKA_ID that we make

// NewKeyAddress implements engine.Engine: a random CKA_ID, because one module
// silently replaces the old key when an ID is used again.
func (e *Engine) NewKeyAddress(label string) (engine.Address, error) {
	u := URI{Token: e.label, Object: label, Type: engine.ClassPrivateKey}
	if _, reason := text(label); reason != "" || label == "" || len(label) > maxText {
		return nil, fail("new key address", u, e.moduleName(), errors.New("a label that no address can hold"))
	}
	id := make([]byte, idSize)
	if _, err := rand.Read(id); err != nil {
		return nil, fail("new key address", u, e.moduleName(), err)
	}
	u.ID = string(id)
	return u, nil
}

// keyPolicy is what a private key must be, set explicitly because the defaults
// of tokens differ, and read back because some do not do as they are told.
var keyPolicy = []struct {
	name  string
	kind  uint
	want  bool
	mayBe bool // a token need not report it
}{
	{"CKA_TOKEN", pkcs11.CKA_TOKEN, true, false},
	{"CKA_PRIVATE", pkcs11.CKA_PRIVATE, true, false},
	{"CKA_SENSITIVE", pkcs11.CKA_SENSITIVE, true, false},
	{"CKA_EXTRACTABLE", pkcs11.CKA_EXTRACTABLE, false, false},
	{"CKA_SIGN", pkcs11.CKA_SIGN, true, false},
	{"CKA_DECRYPT", pkcs11.CKA_DECRYPT, false, true},
	{"CKA_UNWRAP", pkcs11.CKA_UNWRAP, false, true},
	{"CKA_DERIVE", pkcs11.CKA_DERIVE, false, true},
	{"CKA_SIGN_RECOVER", pkcs11.CKA_SIGN_RECOVER, false, true},
}

// GenerateKey implements engine.Engine.
func (e *Engine) GenerateKey(ctx context.Context, at engine.Address, spec engine.KeySpec) (public crypto.PublicKey, err error) {
	u, err := e.keyAddress(at)
	if err == nil && spec.Algorithm != "" && spec.Algorithm != engine.ECP256 {
		err = fmt.Errorf("algorithm %q: %w", spec.Algorithm, engine.ErrUnsupported)
	}
	if err != nil {
		return nil, fail("generate key", at, e.moduleName(), err)
	}
	err = e.write(ctx, "generate key", u, func() error {
		taken, err := e.search([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID))})
		if err != nil {
			return err
		}
		if len(taken) > 0 {
			return engine.ErrExists
		}
		publicHandle, privateHandle, err := e.generatePair(u)
		if err != nil {
			return err
		}
		if public, err = e.checkPair(u, publicHandle, privateHandle); err != nil {
			return errors.Join(err, e.destroy(privateHandle), e.destroy(publicHandle))
		}
		return nil
	})
	return public, err
}

// keyAddress is the address of a pair of ours: it has its identifier.
func (e *Engine) keyAddress(at engine.Address) (URI, error) {
	u, err := e.objectAddress(at, engine.ClassPrivateKey)
	if err == nil && u.ID == "" {
		err = errors.New("it has no id: both halves of a pair are found by it")
	}
	return u, err
}

func (e *Engine) generatePair(u URI) (public, private pkcs11.ObjectHandle, err error) {
	privateTemplate := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object),
		pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)),
	}
	for _, policy := range keyPolicy {
		privateTemplate = append(privateTemplate, pkcs11.NewAttribute(policy.kind, policy.want))
	}
	public, private, err = e.module.ctx.GenerateKeyPair(e.session,
		[]*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		[]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
			pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object),
			pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)),
			pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, ecParamsP256),
		}, privateTemplate)
	return public, private, err
}

// checkPair reads a generated pair back.
func (e *Engine) checkPair(u URI, public, private pkcs11.ObjectHandle) (crypto.PublicKey, error) {
	for _, policy := range keyPolicy {
		got, err := e.flag(private, policy.kind)
		if err != nil {
			return nil, err
		}
		if got == nil && policy.mayBe {
			continue
		}
		if got == nil || *got != policy.want {
			return nil, fmt.Errorf("the token made a key that was not asked for: %s is %s, want %t: it is destroyed", policy.name, show(got), policy.want)
		}
	}
	key, err := e.ecPublicKey(public)
	if err != nil {
		return nil, err
	}
	return key, e.tryKey(private, key)
}

func show(flag *bool) string {
	if flag == nil {
		return "not reported"
	}
	return fmt.Sprint(*flag)
}

// tryKey signs and verifies something: a found or made key is proven before use.
func (e *Engine) tryKey(private pkcs11.ObjectHandle, public *ecdsa.PublicKey) error {
	var random [32]byte
	if _, err := rand.Read(random[:]); err != nil {
		return err
	}
	digest := sha256.Sum256(random[:])
	signature, err := e.sign(private, public, digest[:])
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(public, digest[:], signature) {
		return errors.New("a test signature of the key does not verify")
	}
	return nil
}

// ecPublicKey reads the public key of an object that has CKA_EC_POINT.
func (e *Engine) ecPublicKey(handle pkcs11.ObjectHandle) (*ecdsa.PublicKey, error) {
	params, err := e.value(handle, pkcs11.CKA_EC_PARAMS)
	if err != nil {
		return nil, fmt.Errorf("read the key's curve: %w", err)
	}
	if string(params) != string(ecParamsP256) {
		return nil, fmt.Errorf("the key is not on the curve P-256: %w", engine.ErrUnsupported)
	}
	point, err := e.value(handle, pkcs11.CKA_EC_POINT)
	if err != nil {
		return nil, fmt.Errorf("read the public key: %w", err)
	}
	return parsePoint(point)
}

// parsePoint takes a point wrapped in an OCTET STRING (PKCS #11 v2.40 §2.3.3)
// or raw, as older modules have it.
func parsePoint(point []byte) (*ecdsa.PublicKey, error) {
	var wrapped []byte
	if rest, err := asn1.Unmarshal(point, &wrapped); err == nil && len(rest) == 0 {
		point = wrapped
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return nil, fmt.Errorf("read the public key: %w", err)
	}
	return key, nil
}

// Signer implements engine.Engine.
func (e *Engine) Signer(ctx context.Context, at engine.Address) (crypto.Signer, error) {
	u, err := e.objectAddress(at, engine.ClassPrivateKey)
	if err != nil {
		return nil, fail("open key", at, e.moduleName(), err)
	}
	s := &signer{engine: e, uri: u}
	err = e.read(ctx, "open key", u, func() error {
		if err := s.find(); err != nil {
			return err
		}
		s.public, err = e.publicHalf(s.handle)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// publicHalf finds the public key of a private one by its CKA_ID.
func (e *Engine) publicHalf(private pkcs11.ObjectHandle) (*ecdsa.PublicKey, error) {
	id, err := e.value(private, pkcs11.CKA_ID)
	if err != nil {
		return nil, fmt.Errorf("read CKA_ID: %w", err)
	}
	if len(id) > 0 {
		handle, err := e.findOne(URI{Token: e.label, ID: string(id), Type: engine.ClassPublicKey})
		if err == nil {
			return e.ecPublicKey(handle)
		}
		if !errors.Is(err, engine.ErrNotFound) {
			return nil, fmt.Errorf("find the public key: %w", err)
		}
	}
	// Some tokens show the point of the private key and keep no public object.
	key, err := e.ecPublicKey(private)
	if err != nil && isUnreadable(err) {
		return nil, fmt.Errorf("its public key is not in the token: %w", engine.ErrNotFound)
	}
	return key, err
}

// signer is a private key in the token.
type signer struct {
	engine *Engine
	uri    URI
	public *ecdsa.PublicKey

	// Guarded by module.mu.
	handle     pkcs11.ObjectHandle
	generation int // of the module, when handle was found
}

var _ crypto.Signer = (*signer)(nil)

// find looks the key up in the session's generation.
func (s *signer) find() (err error) {
	s.handle, err = s.engine.findOne(s.uri)
	s.generation = s.engine.generation
	return err
}

// Public implements crypto.Signer.
func (s *signer) Public() crypto.PublicKey { return s.public }

// Sign implements crypto.Signer: ECDSA over a digest, in ASN.1 DER. The random
// source is the token's.
func (s *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	if hash := opts.HashFunc(); hash != 0 && len(digest) != hash.Size() {
		return nil, fail("sign with", s.uri, s.engine.moduleName(), fmt.Errorf("digest of %d bytes, want %d", len(digest), hash.Size()))
	}
	// The call cannot be interrupted, and crypto.Signer has no context.
	err = s.engine.read(context.Background(), "sign with", s.uri, func() error {
		if s.generation != s.engine.generation {
			if err := s.find(); err != nil {
				return err
			}
		}
		signature, err = s.engine.sign(s.handle, s.public, digest)
		return err
	})
	return signature, err
}

func (e *Engine) sign(private pkcs11.ObjectHandle, public *ecdsa.PublicKey, digest []byte) ([]byte, error) {
	size := (public.Curve.Params().BitSize + 7) / 8
	if len(digest) > size {
		digest = digest[:size] // the leftmost bits (FIPS 186-5 §6.4.1)
	}
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}
	if err := e.module.ctx.SignInit(e.session, mechanism, private); err != nil {
		return nil, err
	}
	raw, err := e.module.ctx.Sign(e.session, digest)
	if err != nil {
		return nil, err
	}
	if len(raw) != 2*size {
		return nil, fmt.Errorf("the token made a signature of %d bytes, want %d", len(raw), 2*size)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:size]), new(big.Int).SetBytes(raw[size:])})
}

// RecoverKey implements engine.KeyRecoverer.
func (e *Engine) RecoverKey(ctx context.Context, at engine.Address) (public crypto.PublicKey, err error) {
	u, err := e.keyAddress(at)
	if err != nil {
		return nil, fail("recover key", at, e.moduleName(), err)
	}
	err = e.write(ctx, "recover key", u, func() error {
		handles, err := e.search([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID))})
		if err != nil {
			return err
		}
		private, err := e.findOne(u)
		if err == nil {
			var key *ecdsa.PublicKey
			if key, err = e.publicHalf(private); err == nil {
				err = e.tryKey(private, key)
			}
			if err == nil {
				public = key
				return nil
			}
		}
		if isLost(err) {
			return err
		}
		for _, handle := range handles {
			if err := e.destroy(handle); err != nil {
				return err
			}
		}
		return engine.ErrNotFound
	})
	return public, err
}

// RemoveKey implements engine.Engine.
func (e *Engine) RemoveKey(ctx context.Context, at engine.Address) error {
	u, err := e.keyAddress(at)
	if err != nil {
		return fail("remove key", at, e.moduleName(), err)
	}
	return e.write(ctx, "remove key", u, func() error {
		removed := false
		for _, class := range []engine.Class{engine.ClassPrivateKey, engine.ClassPublicKey} {
			half := u
			half.Type = class
			handles, err := e.search(template(half))
			if err != nil {
				return err
			}
			for _, handle := range handles {
				if err := e.destroy(handle); err != nil {
					return err
				}
				removed = true
			}
		}
		if !removed {
			return engine.ErrNotFound
		}
		return nil
	})
}

// destroy destroys an object by its handle.
func (e *Engine) destroy(handle pkcs11.ObjectHandle) error {
	if err := e.module.ctx.DestroyObject(e.session, handle); err != nil {
		return fmt.Errorf("destroy object: %w", err)
	}
	return nil
}

// KeyAttributes implements engine.KeyInspector.
func (e *Engine) KeyAttributes(ctx context.Context, at engine.Address) (attributes engine.KeyAttributes, err error) {
	u, err := e.objectAddress(at, engine.ClassPrivateKey)
	if err != nil {
		return attributes, fail("read key attributes", at, e.moduleName(), err)
	}
	err = e.read(ctx, "read key attributes", u, func() error {
		handle, err := e.findOne(u)
		if err != nil {
			return err
		}
		for kind, field := range map[uint]**bool{
			pkcs11.CKA_PRIVATE: &attributes.Private, pkcs11.CKA_SENSITIVE: &attributes.Sensitive, pkcs11.CKA_EXTRACTABLE: &attributes.Extractable,
			pkcs11.CKA_ALWAYS_SENSITIVE: &attributes.AlwaysSensitive, pkcs11.CKA_NEVER_EXTRACTABLE: &attributes.NeverExtractable,
			pkcs11.CKA_LOCAL: &attributes.Local, pkcs11.CKA_SIGN: &attributes.Sign, pkcs11.CKA_DECRYPT: &attributes.Decrypt,
			pkcs11.CKA_UNWRAP: &attributes.Unwrap, pkcs11.CKA_DERIVE: &attributes.Derive,
		} {
			if *field, err = e.flag(handle, kind); err != nil {
				return err
			}
		}
		return nil
	})
	return attributes, err
}
