//go:build cgo

package pkcs11

import (
	"bytes"
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

// curves by the OIDs that stand in CKA_EC_PARAMS, DER (RFC 5480 §2.1.1.1). We
// generate on the first; a factory key may be on another.
var curves = []struct {
	params []byte
	curve  elliptic.Curve
}{
	{[]byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}, elliptic.P256()},
	{[]byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}, elliptic.P384()},
	{[]byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23}, elliptic.P521()},
}

const idSize = 16 // bytes of a CKA_ID that we make

// NewKeyAddress implements engine.Engine. The CKA_ID is random, for one module
// silently replaces the old key when an id is used again.
func (e *Engine) NewKeyAddress(label string) (engine.Address, error) {
	const op = "new key address"
	if err := e.open(); err != nil {
		return nil, fail(op, e.uri, e.uri.ModulePath, err)
	}
	id := make([]byte, idSize)
	if _, err := rand.Read(id); err != nil {
		return nil, fail(op, e.uri, e.uri.ModulePath, err)
	}
	u := URI{Token: e.label, Object: label, ID: string(id), Type: engine.ClassPrivateKey}
	if again, err := ParseURI(u.String()); label == "" || err != nil || again != u {
		return nil, fail(op, e.uri, e.uri.ModulePath, fmt.Errorf("label %q: want 1 to %d bytes of UTF-8", label, maxText))
	}
	return u, nil
}

// open returns ErrClosed after Close.
func (e *Engine) open() error {
	_ = e.module.enter(context.Background()) // ends only with the gate
	defer e.module.leave()
	if e.closed {
		return engine.ErrClosed
	}
	return nil
}

// privatePolicy is what a private key must be: set explicitly, because the
// defaults of tokens differ, and read back, because some do not do as they are
// told. A token need not report what is optional.
var privatePolicy = []struct {
	name     string
	kind     uint
	want     bool
	optional bool
}{
	{"CKA_TOKEN", pkcs11.CKA_TOKEN, true, false},
	{"CKA_PRIVATE", pkcs11.CKA_PRIVATE, true, false},
	{"CKA_SENSITIVE", pkcs11.CKA_SENSITIVE, true, false},
	{"CKA_EXTRACTABLE", pkcs11.CKA_EXTRACTABLE, false, false},
	{"CKA_SIGN", pkcs11.CKA_SIGN, true, false},
	{"CKA_SIGN_RECOVER", pkcs11.CKA_SIGN_RECOVER, false, true},
	{"CKA_DECRYPT", pkcs11.CKA_DECRYPT, false, true},
	{"CKA_UNWRAP", pkcs11.CKA_UNWRAP, false, true},
	{"CKA_DERIVE", pkcs11.CKA_DERIVE, false, true},
}

// pairAddress is the address of a pair that we make or destroy: with its id.
func (e *Engine) pairAddress(at engine.Address) (URI, error) {
	u, err := e.objectAddress(at, engine.ClassPrivateKey)
	if err == nil && u.ID == "" {
		err = errors.New("it has no id, by which both halves of a pair are found")
	}
	return u, err
}

// GenerateKey implements engine.Engine.
func (e *Engine) GenerateKey(ctx context.Context, at engine.Address, spec engine.KeySpec) (crypto.PublicKey, error) {
	const op = "generate key"
	u, err := e.pairAddress(at)
	if err == nil && spec.Algorithm != "" && spec.Algorithm != engine.ECP256 {
		err = fmt.Errorf("algorithm %q: %w", spec.Algorithm, engine.ErrUnsupported)
	}
	if err != nil {
		return nil, fail(op, at, e.uri.ModulePath, err)
	}
	var public *ecdsa.PublicKey
	err = e.write(ctx, op, u, func(s *session) error {
		taken, err := s.find(URI{ID: u.ID})
		if err != nil {
			return err
		}
		if len(taken) > 0 {
			return engine.ErrExists
		}
		public, err = s.generate(u)
		if err == nil || s.lost(err) {
			return err
		}
		// The id is fresh: what carries it is of this attempt.
		if cleaning := s.destroyID(u.ID); cleaning != nil {
			err = errors.Join(err, fmt.Errorf("remove what it left: %w", cleaning))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return public, nil
}

func (s *session) generate(u URI) (*ecdsa.PublicKey, error) {
	named := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object),
		pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)),
	}
	public := append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curves[0].params),
	}, named...)
	private := append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)}, named...)
	for _, policy := range privatePolicy {
		private = append(private, pkcs11.NewAttribute(policy.kind, policy.want))
	}
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)}
	s.changed = true
	publicHandle, privateHandle, err := s.module.ctx.GenerateKeyPair(s.handle, mechanism, public, private)
	if err != nil {
		return nil, explain(err)
	}
	if err := s.checkPolicy(privateHandle); err != nil {
		return nil, err
	}
	return s.publicKey(publicHandle)
}

// checkPolicy reads back what a private key is.
func (s *session) checkPolicy(private pkcs11.ObjectHandle) error {
	for _, policy := range privatePolicy {
		got, err := s.flag(private, policy.kind)
		if err != nil {
			return err
		}
		switch {
		case got == nil && !policy.optional:
			return fmt.Errorf("the token does not say whether the key is %s: it is destroyed", policy.name)
		case got != nil && *got != policy.want:
			return fmt.Errorf("the token made another key than it was asked for, with %s %t: it is destroyed", policy.name, *got)
		}
	}
	return nil
}

// flag reads a boolean attribute; nil is one that the token does not report.
func (s *session) flag(handle pkcs11.ObjectHandle, kind uint) (*bool, error) {
	value, err := s.value(handle, kind)
	if err != nil && !errors.Is(err, errUnreadable) {
		return nil, err
	}
	if err != nil || len(value) != 1 {
		return nil, nil
	}
	set := value[0] != 0
	return &set, nil
}

// publicKey reads the public key of an object that has CKA_EC_POINT.
func (s *session) publicKey(handle pkcs11.ObjectHandle) (*ecdsa.PublicKey, error) {
	values, err := s.values(handle, pkcs11.CKA_EC_PARAMS, pkcs11.CKA_EC_POINT)
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	for _, known := range curves {
		if bytes.Equal(values[0], known.params) {
			return parsePoint(known.curve, values[1])
		}
	}
	return nil, fmt.Errorf("read public key: %w: a curve other than P-256, P-384 and P-521", engine.ErrUnsupported)
}

// parsePoint takes an uncompressed point wrapped in an OCTET STRING (PKCS #11
// v2.40 mechanisms §2.3.3), or raw as some modules have it. Its length tells which: both
// begin with 0x04.
func parsePoint(curve elliptic.Curve, point []byte) (*ecdsa.PublicKey, error) {
	size := 1 + 2*((curve.Params().BitSize+7)/8)
	var wrapped []byte
	if len(point) != size {
		if rest, err := asn1.Unmarshal(point, &wrapped); err != nil || len(rest) > 0 || len(wrapped) != size {
			return nil, errors.New("read public key: the point is malformed")
		}
		point = wrapped
	}
	key, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	return key, nil
}

// Signer implements engine.Engine.
func (e *Engine) Signer(ctx context.Context, at engine.Address) (crypto.Signer, error) {
	const op = "open key"
	u, err := e.objectAddress(at, engine.ClassPrivateKey)
	if err != nil {
		return nil, fail(op, at, e.uri.ModulePath, err)
	}
	k := &signer{engine: e, uri: u}
	err = e.read(ctx, op, u, func(s *session) error {
		private, err := s.one(u)
		if err != nil {
			return err
		}
		k.handle, k.connection = private.handle, s.connection
		k.public, err = s.publicHalf(private)
		return err
	})
	if err != nil {
		return nil, err
	}
	return k, nil
}

// publicHalf finds the public key of a private one, by its CKA_ID: the public
// object; or, where a factory has put none into the token, the point that some
// tokens show of the private key; or a certificate of it. Each signature is
// verified with it, so that a wrong one does no harm.
func (s *session) publicHalf(private match) (*ecdsa.PublicKey, error) {
	if len(private.ID) > 0 {
		public, err := s.one(URI{Token: s.token, ID: string(private.ID), Type: engine.ClassPublicKey})
		if err == nil {
			return s.publicKey(public.handle)
		}
		if !errors.Is(err, engine.ErrNotFound) {
			return nil, fmt.Errorf("find public key: %w", err)
		}
	}
	if key, err := s.publicKey(private.handle); err == nil || s.lost(err) {
		return key, err
	}
	if len(private.ID) > 0 {
		certs, err := s.certificates(URI{Token: s.token, ID: string(private.ID)})
		if err != nil {
			return nil, err
		}
		for _, found := range certs {
			if key, ok := found.cert.PublicKey.(*ecdsa.PublicKey); ok {
				return key, nil
			}
		}
	}
	return nil, fmt.Errorf("%w: its public key, or it is not an EC key", engine.ErrNotFound)
}

// signer is a private key in the token.
type signer struct {
	engine *Engine
	uri    URI
	public *ecdsa.PublicKey

	// Guarded by the module's gate.
	handle     pkcs11.ObjectHandle
	connection int // of the token, when the handle was found
}

var _ crypto.Signer = (*signer)(nil)

// Public implements crypto.Signer.
func (k *signer) Public() crypto.PublicKey { return k.public }

// Sign implements crypto.Signer: ECDSA over a digest, in DER. The source of
// randomness is the token's.
func (k *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	const op = "sign with"
	if opts != nil && opts.HashFunc() != 0 && len(digest) != opts.HashFunc().Size() {
		return nil, fail(op, k.uri, k.engine.uri.ModulePath, fmt.Errorf("a digest of %d bytes, %s has %d", len(digest), opts.HashFunc(), opts.HashFunc().Size()))
	}
	// crypto.Signer has no context, and the call could not be interrupted.
	err = k.engine.read(context.Background(), op, k.uri, func(s *session) error {
		if k.connection != s.connection { // handles end with their session
			private, err := s.one(k.uri)
			if err != nil {
				return err
			}
			k.handle, k.connection = private.handle, s.connection
		}
		signature, err = s.sign(k.handle, k.public, digest)
		return err
	})
	return signature, err
}

// sign makes a signature and verifies it: a token that errs, or a public key that
// is another's, must not be found out by a server.
func (s *session) sign(private pkcs11.ObjectHandle, public *ecdsa.PublicKey, digest []byte) ([]byte, error) {
	size := (public.Curve.Params().BitSize + 7) / 8
	input := digest
	if len(input) > size {
		input = input[:size] // its leftmost bits (FIPS 186-5 §6.4.1); some modules refuse more
	}
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}
	if err := s.module.ctx.SignInit(s.handle, mechanism, private); err != nil {
		return nil, explain(err)
	}
	raw, err := s.module.ctx.Sign(s.handle, input)
	if err != nil {
		return nil, explain(err)
	}
	half := len(raw) / 2
	if half == 0 || len(raw)%2 != 0 {
		return nil, fmt.Errorf("the token made a signature of %d bytes", len(raw))
	}
	signature, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:half]), new(big.Int).SetBytes(raw[half:])})
	if err != nil {
		return nil, err
	}
	if !ecdsa.VerifyASN1(public, digest, signature) {
		return nil, errors.New("the token's signature does not verify with the public key")
	}
	return signature, nil
}

// RecoverKey implements engine.KeyRecoverer.
func (e *Engine) RecoverKey(ctx context.Context, at engine.Address) (crypto.PublicKey, error) {
	const op = "recover key"
	u, err := e.pairAddress(at)
	if err != nil {
		return nil, fail(op, at, e.uri.ModulePath, err)
	}
	var public *ecdsa.PublicKey
	err = e.write(ctx, op, u, func(s *session) error {
		key, reason := s.wholePair(u)
		if reason == nil {
			public = key
			return nil
		}
		if s.lost(reason) {
			return reason
		}
		if err := s.destroyID(u.ID); err != nil {
			return fmt.Errorf("remove what a crash left: %w", err)
		}
		if errors.Is(reason, engine.ErrNotFound) {
			return reason
		}
		return fmt.Errorf("%w: %w", engine.ErrNotFound, reason)
	})
	if err != nil {
		return nil, err
	}
	return public, nil
}

// wholePair returns the public key of a pair that is as it was asked for, of
// which both halves are there, and whose test signature verifies.
func (s *session) wholePair(u URI) (*ecdsa.PublicKey, error) {
	private, err := s.one(u)
	if err != nil {
		return nil, err
	}
	half := u
	half.Type = engine.ClassPublicKey
	public, err := s.one(half)
	if err != nil {
		return nil, err
	}
	if err := s.checkPolicy(private.handle); err != nil {
		return nil, err
	}
	key, err := s.publicKey(public.handle)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, sha256.Size)
	if _, err := rand.Read(nonce); err != nil {
		return nil, err
	}
	_, err = s.sign(private.handle, key, nonce)
	return key, err
}

// RemoveKey implements engine.Engine.
func (e *Engine) RemoveKey(ctx context.Context, at engine.Address) error {
	const op = "remove key"
	u, err := e.pairAddress(at)
	if err != nil {
		return fail(op, at, e.uri.ModulePath, err)
	}
	return e.write(ctx, op, u, func(s *session) error {
		var doomed []pkcs11.ObjectHandle
		for _, class := range []engine.Class{engine.ClassPrivateKey, engine.ClassPublicKey} {
			half := u
			half.Type = class
			whole, broken, err := s.matches(half)
			if err != nil {
				return err
			}
			if len(whole) > 1 {
				return ambiguous(half, whole)
			}
			for _, m := range append(whole, broken...) {
				doomed = append(doomed, m.handle)
			}
		}
		if len(doomed) == 0 {
			return engine.ErrNotFound
		}
		return s.destroy(doomed...)
	})
}

// KeyAttributes implements engine.KeyInspector.
func (e *Engine) KeyAttributes(ctx context.Context, at engine.Address) (engine.KeyAttributes, error) {
	const op = "read key attributes"
	var attributes engine.KeyAttributes
	u, err := e.objectAddress(at, engine.ClassPrivateKey)
	if err != nil {
		return attributes, fail(op, at, e.uri.ModulePath, err)
	}
	err = e.read(ctx, op, u, func(s *session) error {
		private, err := s.one(u)
		if err != nil {
			return err
		}
		for kind, field := range map[uint]**bool{
			pkcs11.CKA_PRIVATE: &attributes.Private, pkcs11.CKA_SENSITIVE: &attributes.Sensitive, pkcs11.CKA_EXTRACTABLE: &attributes.Extractable,
			pkcs11.CKA_ALWAYS_SENSITIVE: &attributes.AlwaysSensitive, pkcs11.CKA_NEVER_EXTRACTABLE: &attributes.NeverExtractable,
			pkcs11.CKA_LOCAL: &attributes.Local, pkcs11.CKA_SIGN: &attributes.Sign, pkcs11.CKA_DECRYPT: &attributes.Decrypt,
			pkcs11.CKA_UNWRAP: &attributes.Unwrap, pkcs11.CKA_DERIVE: &attributes.Derive,
		} {
			if *field, err = s.flag(private.handle, kind); err != nil {
				return err
			}
		}
		return nil
	})
	return attributes, err
}
