package file

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"

	"estenroll/engine"
	"estenroll/internal/durable"
)

// NewKeyAddress implements engine.Engine.
func (e *Engine) NewKeyAddress(label string) (engine.Address, error) {
	var at Address
	err := e.read(context.Background(), "name a key", nil, func() error {
		if !isLabel(label) {
			return errors.New("label: want up to 100 letters, digits, dots, dashes, underscores and spaces")
		}
		id := make([]byte, 16)
		if _, err := rand.Read(id); err != nil {
			return err
		}
		at = Address{Label: label, ID: hex.EncodeToString(id), Type: engine.ClassPrivateKey}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return at, nil
}

// GenerateKey implements engine.Engine. Nothing here is private, sensitive or not
// extractable but for the mode of a file.
func (e *Engine) GenerateKey(ctx context.Context, at engine.Address, spec engine.KeySpec) (crypto.PublicKey, error) {
	return e.createKey(ctx, "generate key", at, func() ([]byte, error) {
		key, err := engine.NewSoftwareKey(spec.Algorithm)
		if err != nil {
			return nil, err
		}
		return x509.MarshalPKCS8PrivateKey(key)
	})
}

// CanImportKey implements engine.KeyImporter.
func (e *Engine) CanImportKey(ctx context.Context, spec engine.KeySpec) error {
	return e.write(ctx, "import a key to see whether it can be", nil, func() error {
		if spec.Algorithm != "" && !slices.Contains(engine.Algorithms(), spec.Algorithm) {
			return fmt.Errorf("%s: %w", spec.Algorithm, engine.ErrUnsupported)
		}
		return nil
	})
}

// ImportKey implements engine.KeyImporter. A key in a file is as good, or as bad, as one
// that was generated there.
func (e *Engine) ImportKey(ctx context.Context, at engine.Address, pkcs8 []byte) (crypto.PublicKey, error) {
	return e.createKey(ctx, "import key", at, func() ([]byte, error) {
		parsed, err := x509.ParsePKCS8PrivateKey(pkcs8)
		if err != nil {
			return nil, errors.New("not a private key in PKCS#8") // the cause could repeat some of it
		}
		signer, ok := parsed.(crypto.Signer)
		if !ok || !slices.Contains(engine.Algorithms(), engine.AlgorithmOf(signer.Public())) {
			return nil, fmt.Errorf("a key of type %T: %w", parsed, engine.ErrUnsupported)
		}
		if err := signs(signer); err != nil {
			return nil, err
		}
		return slices.Clone(pkcs8), nil
	})
}

// createKey writes the key that was made (PKCS#8, DER, which is cleared) where there is
// none, and reads it back.
func (e *Engine) createKey(ctx context.Context, op string, at engine.Address, made func() ([]byte, error)) (crypto.PublicKey, error) {
	var public crypto.PublicKey
	err := e.write(ctx, op, at, func() error {
		a, err := objectOf(at, engine.ClassPrivateKey)
		if err == nil && (a.Label == "" || a.ID == "") {
			err = errors.New("want an address of NewKeyAddress")
		}
		if err != nil {
			return err
		}
		all, err := e.objects()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(all, func(o object) bool { return o.id == a.ID }) {
			return engine.ErrExists
		}
		der, err := made()
		if err != nil {
			return err
		}
		text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		clear(der)
		defer clear(text)
		if err := durable.WriteFile(e.path(a.fileName()), text, 0o600); err != nil {
			return err
		}
		back, err := e.readKey(a)
		if err != nil {
			return err
		}
		public = back.Public()
		return nil
	})
	return public, err
}

// readKey reads the one key that an address names.
func (e *Engine) readKey(a Address) (crypto.Signer, error) {
	o, err := e.one(a, true)
	if err == nil {
		err = o.err
	}
	return o.key, err
}

// parseKey parses PEM as OpenSSL writes it.
func parseKey(data []byte) (crypto.Signer, error) {
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("no private key in PEM")
		}
		data = rest
		var key any
		var err error
		switch block.Type {
		case "EC PARAMETERS":
			continue // which stand before the key
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			return nil, errors.New("neither PKCS#8 nor a key of OpenSSL's without a password")
		}
		clear(block.Bytes)
		if err != nil {
			return nil, errors.New("the private key does not parse") // the cause could repeat some of it
		}
		signer, ok := key.(crypto.Signer)
		if !ok || engine.AlgorithmOf(signer.Public()) == "" {
			return nil, fmt.Errorf("a key that is neither EC nor RSA: %w", engine.ErrUnsupported)
		}
		return signer, nil
	}
}

// Signer implements engine.Engine.
func (e *Engine) Signer(ctx context.Context, at engine.Address) (crypto.Signer, error) {
	var opened *signer
	err := e.read(ctx, "open key", at, func() error {
		a, err := objectOf(at, engine.ClassPrivateKey)
		if err != nil {
			return err
		}
		key, err := e.readKey(a)
		opened = &signer{engine: e, at: a, key: key}
		return err
	})
	if err != nil {
		return nil, err
	}
	return opened, nil
}

// DecryptionKey implements engine.Decrypter: of a file nobody knows what its key is for,
// and a secret key it never is.
func (e *Engine) DecryptionKey(ctx context.Context, at engine.Address) (*engine.DecryptionKey, error) {
	var opened *engine.DecryptionKey
	err := e.read(ctx, "open decryption key", at, func() error {
		a, err := objectOf(at, engine.ClassPrivateKey)
		if err != nil {
			return err
		}
		o, err := e.one(a, true)
		if err == nil {
			err = o.err
		}
		if err != nil {
			return err
		}
		key, isRSA := o.key.(*rsa.PrivateKey)
		if !isRSA {
			return fmt.Errorf("%w: an EC key, which decrypts nothing: want an RSA key", engine.ErrUnsupported)
		}
		id, err := hex.DecodeString(o.id)
		opened = &engine.DecryptionKey{ID: id, RSA: &decrypter{e, a, key}, PKCS1v15: true, OAEP: true}
		return err
	})
	if err != nil {
		return nil, err
	}
	return opened, nil
}

// decrypter is an RSA key in memory, until the engine is closed.
type decrypter struct {
	engine *Engine
	at     Address
	key    *rsa.PrivateKey
}

func (d *decrypter) Public() crypto.PublicKey { return d.key.Public() }

func (d *decrypter) Decrypt(random io.Reader, ciphertext []byte, opts crypto.DecrypterOpts) (plain []byte, err error) {
	err = d.engine.read(context.Background(), "decrypt", d.at, func() error {
		plain, err = d.key.Decrypt(random, ciphertext, opts)
		return err
	})
	return plain, err
}

// signer is a key in memory, until the engine is closed.
type signer struct {
	engine *Engine
	at     Address
	key    crypto.Signer
}

func (s *signer) Public() crypto.PublicKey { return s.key.Public() }

func (s *signer) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	err = s.engine.read(context.Background(), "sign", s.at, func() error {
		_, isRSA := s.key.Public().(*rsa.PublicKey)
		switch {
		case isRSA && (opts == nil || opts.HashFunc() < crypto.SHA256):
			return errors.New("an RSA signature names its hash, SHA-256 or better")
		case opts != nil && opts.HashFunc() != 0 && len(digest) != opts.HashFunc().Size():
			return fmt.Errorf("%d bytes are no digest of %s", len(digest), opts.HashFunc())
		}
		signature, err = s.key.Sign(random, digest, opts)
		return err
	})
	return signature, err
}

// signs makes a signature and verifies it.
func signs(key crypto.Signer) error {
	digest := sha256.Sum256([]byte("est-enroll tests a key"))
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return err
	}
	switch public := key.Public().(type) {
	case *ecdsa.PublicKey:
		if !ecdsa.VerifyASN1(public, digest[:], signature) {
			err = errors.New("its signature does not verify")
		}
	case *rsa.PublicKey:
		err = rsa.VerifyPKCS1v15(public, crypto.SHA256, digest[:], signature)
	}
	return err
}

// removable parses the address of a key that may go, and removes what a kill has left of
// the way to its file: that is a key too.
func (e *Engine) removable(at engine.Address) (Address, error) {
	a, err := objectOf(at, engine.ClassPrivateKey)
	if err == nil {
		err = durable.RemoveTemporary(e.dir.Dir, a.fileName())
	}
	return a, err
}

// RecoverKey implements engine.KeyRecoverer.
func (e *Engine) RecoverKey(ctx context.Context, at engine.Address) (crypto.PublicKey, error) {
	var public crypto.PublicKey
	err := e.write(ctx, "recover key", at, func() error {
		a, err := e.removable(at)
		if err != nil {
			return err
		}
		o, err := e.one(a, true)
		if err != nil {
			return err
		}
		if o.err == nil && signs(o.key) == nil {
			public = o.key.Public()
			return nil
		}
		return errors.Join(engine.ErrNotFound, durable.Remove(e.path(o.name)))
	})
	return public, err
}

// RemoveKey implements engine.Engine.
func (e *Engine) RemoveKey(ctx context.Context, at engine.Address) error {
	return e.write(ctx, "remove key", at, func() error {
		a, err := e.removable(at)
		if err != nil {
			return err
		}
		o, err := e.one(a, true)
		if err != nil {
			return err
		}
		return durable.Remove(e.path(o.name))
	})
}

// KeyAttributes implements engine.KeyInspector: what a file is.
func (e *Engine) KeyAttributes(ctx context.Context, at engine.Address) (engine.KeyAttributes, error) {
	err := e.read(ctx, "read key attributes", at, func() error {
		a, err := objectOf(at, engine.ClassPrivateKey)
		if err == nil {
			_, err = e.one(a, true)
		}
		return err
	})
	if err != nil {
		return engine.KeyAttributes{}, err
	}
	return engine.KeyAttributes{Private: new(false), Sensitive: new(false), Extractable: new(true), Sign: new(true)}, nil
}
