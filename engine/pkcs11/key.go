//go:build cgo

package pkcs11

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

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

// generation is how pairs of one algorithm are made.
type generation struct {
	keyType   []byte
	mechanism uint
	// parameters go into the template of the public key, which says nothing of what
	// that is for: everybody has it. Measured: tpm2-pkcs11 1.9.0 wants a public key's
	// CKA_VERIFY to be its private key's CKA_DECRYPT, and CKA_ENCRYPT its CKA_SIGN.
	parameters []*pkcs11.Attribute
}

// fermat4 is the public exponent that we ask for, 65537 (FIPS 186-5 §5.1 wants
// more than 2^16).
var fermat4 = []byte{1, 0, 1}

// generations by the algorithm that is asked for.
var generations = map[engine.Algorithm]generation{
	engine.ECP256:  onCurve(curves[0].params),
	engine.ECP384:  onCurve(curves[1].params),
	engine.ECP521:  onCurve(curves[2].params),
	engine.RSA2048: withModulus(2048),
	engine.RSA3072: withModulus(3072),
	engine.RSA4096: withModulus(4096),
}

func onCurve(params []byte) generation {
	return generation{keyTypeEC, pkcs11.CKM_EC_KEY_PAIR_GEN, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, params)}}
}

func withModulus(bits uint) generation {
	return generation{keyTypeRSA, pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, bits),
		pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, fermat4),
	}}
}

// GenerateKey implements engine.Engine.
func (e *Engine) GenerateKey(ctx context.Context, at engine.Address, spec engine.KeySpec) (crypto.PublicKey, error) {
	const op = "generate key"
	u, err := e.pairAddress(at)
	algorithm := cmp.Or(spec.Algorithm, engine.ECP256)
	how, known := generations[algorithm]
	if err == nil && !known {
		err = fmt.Errorf("algorithm %q: %w", algorithm, engine.ErrUnsupported)
	}
	if err != nil {
		return nil, fail(op, at, e.uri.ModulePath, err)
	}
	return e.createPair(ctx, op, u, func(s *session) (crypto.PublicKey, error) { return s.generate(u, algorithm, how) })
}

// createPair makes a pair under an id that nothing has yet, and leaves nothing of one
// that is not what was wanted.
func (e *Engine) createPair(ctx context.Context, op string, u URI, create func(*session) (crypto.PublicKey, error)) (public crypto.PublicKey, err error) {
	refused := false
	err = e.write(ctx, op, u, func(s *session) error {
		taken, err := s.find(URI{ID: u.ID})
		if err != nil {
			return err
		}
		if len(taken) > 0 {
			return engine.ErrExists
		}
		public, err = create(s)
		refused = err != nil && !s.lost(err)
		return err
	})
	if refused { // the id is fresh: what carries it is of this attempt
		cleaning := e.write(context.WithoutCancel(ctx), "remove what is left of", u, func(s *session) error { return s.destroyID(u.ID) })
		err = errors.Join(err, cleaning)
	}
	if err != nil {
		return nil, err
	}
	return public, nil
}

func (s *session) generate(u URI, algorithm engine.Algorithm, how generation) (crypto.PublicKey, error) {
	named := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, how.keyType),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object),
		pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)),
	}
	public := slices.Concat([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
	}, how.parameters, named)
	private := append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)}, named...)
	for _, policy := range privatePolicy {
		private = append(private, pkcs11.NewAttribute(policy.kind, policy.want))
	}
	s.changed = true
	publicHandle, privateHandle, err := s.module.ctx.GenerateKeyPair(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(how.mechanism, nil)}, public, private)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", algorithm, explain(err))
	}
	if err := s.checkPolicy(privateHandle); err != nil {
		return nil, err
	}
	key, err := s.publicKey(match{handle: publicHandle, value: how.keyType})
	switch {
	case err != nil && s.lost(err):
		return nil, err
	case err != nil:
		// Measured: tpm2-pkcs11 1.9.0 writes a point of P-521 that it cannot read itself.
		return nil, fmt.Errorf("%s: %w: %w", algorithm, engine.ErrUnsupported, err)
	case engine.AlgorithmOf(key) != algorithm:
		return nil, fmt.Errorf("the token made another key than it was asked for, %s and not %s: it is destroyed", engine.AlgorithmOf(key), algorithm)
	case how.mechanism == pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN:
		// Measured: tpm2-pkcs11 1.9.0 makes an RSA key for signing only, but signs by
		// decrypting, which such a key may not.
		if err := s.testSignature(privateHandle, key); err != nil && !s.lost(err) {
			return nil, fmt.Errorf("%s for signing only: %w: a test signature: %w", algorithm, engine.ErrUnsupported, err)
		} else if err != nil {
			return nil, err
		}
	}
	return key, nil
}

// testSignature finds out whether a private key signs, for a public key.
func (s *session) testSignature(private pkcs11.ObjectHandle, public crypto.PublicKey) error {
	nonce := make([]byte, sha256.Size)
	if _, err := rand.Read(nonce); err != nil {
		return err
	}
	how, err := signingWith(public, nonce, crypto.SHA256)
	if err != nil {
		return err
	}
	_, err = s.sign(private, how)
	// Measured: tpm2-pkcs11 1.9.0 does not destroy a key of which a signature has
	// failed (CKR_FUNCTION_FAILED).
	s.held = err != nil
	return err
}

// checkPolicy reads back what a private key is.
func (s *session) checkPolicy(private pkcs11.ObjectHandle) error {
	kinds := make([]uint, len(privatePolicy))
	for i, policy := range privatePolicy {
		kinds[i] = policy.kind
	}
	flags, err := s.flags(private, kinds...)
	if err != nil {
		return err
	}
	for i, policy := range privatePolicy {
		got := flags[i]
		switch {
		case got == nil && !policy.optional:
			return fmt.Errorf("the token does not say whether the key is %s: it is destroyed", policy.name)
		case got != nil && *got != policy.want:
			return fmt.Errorf("the token made another key than it was asked for, with %s %t: it is destroyed", policy.name, *got)
		}
	}
	return nil
}

// flags reads boolean attributes; nil is one that the token does not report.
func (s *session) flags(handle pkcs11.ObjectHandle, kinds ...uint) ([]*bool, error) {
	values, err := s.values(handle, kinds...)
	if values == nil {
		return nil, err
	}
	flags := make([]*bool, len(kinds))
	for i, value := range values {
		if len(value) == 1 {
			flags[i] = new(value[0] != 0)
		}
	}
	return flags, nil
}

// RecoverKey implements engine.KeyRecoverer.
func (e *Engine) RecoverKey(ctx context.Context, at engine.Address) (crypto.PublicKey, error) {
	const op = "recover key"
	u, err := e.pairAddress(at)
	if err != nil {
		return nil, fail(op, at, e.uri.ModulePath, err)
	}
	var public crypto.PublicKey
	var reason error // why the pair is not kept
	err = e.write(ctx, op, u, func(s *session) error {
		if public, reason = s.wholePair(u); reason != nil && s.lost(reason) {
			return reason
		}
		return nil
	})
	if err == nil && reason != nil {
		err = e.write(ctx, op, u, func(s *session) error {
			if err := s.destroyID(u.ID); err != nil {
				return fmt.Errorf("remove what a crash left: %w", err)
			}
			if errors.Is(reason, engine.ErrNotFound) {
				return reason
			}
			return fmt.Errorf("%w: %w", engine.ErrNotFound, reason)
		})
	}
	if err != nil {
		return nil, err
	}
	return public, nil
}

// wholePair returns the public key of a pair that is as it was asked for, of
// which both halves are there, and whose test signature verifies.
func (s *session) wholePair(u URI) (crypto.PublicKey, error) {
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
	key, err := s.publicKey(public)
	if err != nil {
		return nil, err
	}
	return key, s.testSignature(private.handle, key)
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
		flags, err := s.flags(private.handle, pkcs11.CKA_PRIVATE, pkcs11.CKA_SENSITIVE, pkcs11.CKA_EXTRACTABLE, pkcs11.CKA_ALWAYS_SENSITIVE,
			pkcs11.CKA_NEVER_EXTRACTABLE, pkcs11.CKA_LOCAL, pkcs11.CKA_SIGN, pkcs11.CKA_DECRYPT, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE)
		if err != nil {
			return err
		}
		attributes = engine.KeyAttributes{
			Private: flags[0], Sensitive: flags[1], Extractable: flags[2], AlwaysSensitive: flags[3],
			NeverExtractable: flags[4], Local: flags[5], Sign: flags[6], Decrypt: flags[7], Unwrap: flags[8], Derive: flags[9],
		}
		return nil
	})
	return attributes, err
}
