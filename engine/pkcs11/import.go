//go:build cgo

package pkcs11

import (
	"context"
	"crypto"
	"crypto/aes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

var _ engine.KeyImporter = (*Engine)(nil)

// CanImportKey implements engine.KeyImporter: it imports a key of the kind for this
// session alone, and destroys it.
func (e *Engine) CanImportKey(ctx context.Context, spec engine.KeySpec) error {
	const op = "import a key to see whether it can be"
	kind := spec.Algorithm
	if slices.Contains([]engine.Algorithm{engine.RSA3072, engine.RSA4096}, kind) {
		kind = engine.RSA2048 // a larger one takes long to make, and says no more
	}
	key, err := engine.NewSoftwareKey(kind)
	if err != nil {
		return fail(op, e.uri, e.uri.ModulePath, err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fail(op, e.uri, e.uri.ModulePath, err)
	}
	defer clear(pkcs8)
	return e.write(ctx, op, e.uri, func(s *session) error {
		handle, _, err := s.importPrivate(pkcs8, nil)
		s.changed = false // but for the session
		if err != nil {
			return err
		}
		return s.destroy(handle)
	})
}

// ImportKey implements engine.KeyImporter.
func (e *Engine) ImportKey(ctx context.Context, at engine.Address, pkcs8 []byte) (crypto.PublicKey, error) {
	const op = "import key"
	u, err := e.pairAddress(at)
	if err != nil {
		return nil, fail(op, at, e.uri.ModulePath, err)
	}
	return e.createPair(ctx, op, u, func(s *session) (crypto.PublicKey, error) { return s.importPair(u, pkcs8) })
}

func (s *session) importPair(u URI, pkcs8 []byte) (crypto.PublicKey, error) {
	private, parts, err := s.importPrivate(pkcs8, &u)
	if err != nil {
		return nil, err
	}
	if err := s.checkPolicy(private); err != nil {
		return nil, err
	}
	public, err := s.create(append(append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
	}, parts.public...), nameOf(u)...))
	if err != nil {
		return nil, err
	}
	key, err := s.publicKey(match{handle: public, value: parts.keyType})
	if err != nil {
		return nil, err
	}
	return key, s.testSignature(private, key)
}

func nameOf(u URI) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object), pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID))}
}

// importPrivate creates a private key, without an address for the session alone: as it
// is, or, where the module refuses that, out of a wrapped one. ErrUnsupported.
func (s *session) importPrivate(pkcs8 []byte, at *URI) (pkcs11.ObjectHandle, *keyParts, error) {
	parts, err := partsOf(pkcs8)
	if err != nil {
		return 0, nil, err
	}
	defer parts.clear()
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, parts.keyType),
	}
	if at != nil {
		template = append(template, nameOf(*at)...)
	}
	for _, policy := range privatePolicy {
		template = append(template, pkcs11.NewAttribute(policy.kind, policy.want && (at != nil || policy.kind != pkcs11.CKA_TOKEN)))
	}
	handle, refused := s.create(slices.Concat(template, parts.private))
	if refused == nil || s.lost(refused) || errors.Is(refused, engine.ErrTokenFull) {
		return handle, parts, refused
	}
	if at != nil { // it may have been made all the same
		if err := s.destroyID(at.ID); err != nil {
			return 0, nil, err
		}
	}
	handle, err = s.unwrap(pkcs8, template)
	if err != nil && !s.lost(err) {
		err = fmt.Errorf("%w: %w, nor does it unwrap one: %w", engine.ErrUnsupported, refused, err)
	}
	return handle, parts, err
}

// unwrap has the token unwrap a key with CKM_AES_KEY_WRAP_PAD (RFC 5649), under a key
// that is there for the session and for this.
func (s *session) unwrap(pkcs8 []byte, template []*pkcs11.Attribute) (handle pkcs11.ObjectHandle, err error) {
	secret := make([]byte, 32)
	defer clear(secret)
	if _, err := rand.Read(secret); err != nil {
		return 0, err
	}
	wrapped, err := wrapPadded(secret, pkcs8)
	if err != nil {
		return 0, err
	}
	wrapping, err := s.create(sessionAES(pkcs11.CKA_UNWRAP, pkcs11.NewAttribute(pkcs11.CKA_VALUE, secret)))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.destroy(wrapping)) }()
	handle, err = s.module.ctx.UnwrapKey(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil)}, wrapping, wrapped, template)
	if err != nil {
		return 0, fmt.Errorf("unwrap key: %w", explain(err))
	}
	return handle, nil
}

// wrapPadded wraps data with AES (RFC 5649 §4.1).
func wrapPadded(secret, data []byte) ([]byte, error) {
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, err
	}
	integrity := []byte{0xa6, 0x59, 0x59, 0xa6}
	integrity = binary.BigEndian.AppendUint32(integrity, uint32(len(data)))
	padded := make([]byte, (len(data)+7)/8*8)
	defer clear(padded)
	copy(padded, data)
	out := append(integrity, padded...)
	if len(padded) == 8 {
		block.Encrypt(out, out)
		return out, nil
	}
	// RFC 3394 §2.2.1, with the integrity check value in the place of the first block.
	buffer, n := make([]byte, aes.BlockSize), len(padded)/8
	for j := range 6 {
		for i := 1; i <= n; i++ {
			copy(buffer, out[:8])
			copy(buffer[8:], out[8*i:8*i+8])
			block.Encrypt(buffer, buffer)
			binary.BigEndian.PutUint64(out, binary.BigEndian.Uint64(buffer)^uint64(n*j+i))
			copy(out[8*i:], buffer[8:])
		}
	}
	return out, nil
}

// keyParts are the attributes that a pair is made of. Those of the private key are
// secret.
type keyParts struct {
	keyType         []byte
	private, public []*pkcs11.Attribute
}

func (p *keyParts) clear() {
	for _, attribute := range p.private {
		clear(attribute.Value)
	}
}

// partsOf takes a PKCS#8 key apart.
func partsOf(pkcs8 []byte) (*keyParts, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, errors.New("not a private key in PKCS#8") // the library's may show what it read
	}
	switch key := parsed.(type) {
	case *ecdsa.PrivateKey:
		return ecParts(key)
	case *rsa.PrivateKey:
		return rsaParts(key), nil
	}
	return nil, fmt.Errorf("a key of type %T: %w", parsed, engine.ErrUnsupported)
}

func ecParts(key *ecdsa.PrivateKey) (*keyParts, error) {
	i := slices.IndexFunc(curves, func(known struct {
		params []byte
		curve  elliptic.Curve
	}) bool {
		return known.curve == key.Curve
	})
	if i < 0 {
		return nil, fmt.Errorf("curve %s: %w", key.Curve.Params().Name, engine.ErrUnsupported)
	}
	scalar, err := key.Bytes()
	if err != nil {
		return nil, err
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		return nil, err
	}
	//lint:ignore SA1019 nobody uses the key again: its value is overwritten
	wipe(key.D)
	wrapped, err := asn1.Marshal(point) // PKCS #11 v2.40 §2.3.3: "DER-encoding of ANSI X9.62 ECPoint value"
	if err != nil {
		return nil, err
	}
	params := pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curves[i].params)
	return &keyParts{
		keyType: keyTypeEC,
		private: []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, slices.Clone(curves[i].params)), pkcs11.NewAttribute(pkcs11.CKA_VALUE, scalar)},
		public:  []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyTypeEC), params, pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, wrapped)},
	}, nil
}

func rsaParts(key *rsa.PrivateKey) *keyParts {
	exponent := big.NewInt(int64(key.E)).Bytes()
	parts := &keyParts{
		keyType: keyTypeRSA,
		private: []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_MODULUS, key.N.Bytes()),
			pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, slices.Clone(exponent)),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE_EXPONENT, key.D.Bytes()),
		},
		public: []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyTypeRSA),
			pkcs11.NewAttribute(pkcs11.CKA_MODULUS, key.N.Bytes()), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, exponent),
		},
	}
	secrets := []*big.Int{key.D}
	if len(key.Primes) == 2 {
		for kind, n := range map[uint]*big.Int{
			pkcs11.CKA_PRIME_1: key.Primes[0], pkcs11.CKA_PRIME_2: key.Primes[1],
			pkcs11.CKA_EXPONENT_1: key.Precomputed.Dp, pkcs11.CKA_EXPONENT_2: key.Precomputed.Dq, pkcs11.CKA_COEFFICIENT: key.Precomputed.Qinv,
		} {
			parts.private = append(parts.private, pkcs11.NewAttribute(kind, n.Bytes()))
			secrets = append(secrets, n)
		}
	}
	wipe(secrets...)
	return parts
}

// wipe overwrites the digits of numbers.
func wipe(numbers ...*big.Int) {
	for _, n := range numbers {
		clear(n.Bits())
	}
}
