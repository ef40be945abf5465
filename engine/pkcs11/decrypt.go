//go:build cgo

package pkcs11

//lint:file-ignore SA1019 PKCS #1 v1.5 is how servers transport keys (RFC 3370 §4.2.1)

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

var _ engine.Decrypter = (*Engine)(nil)

// DecryptionKey implements engine.Decrypter.
func (e *Engine) DecryptionKey(ctx context.Context, at engine.Address) (*engine.DecryptionKey, error) {
	const op = "open decryption key"
	class := engine.ClassPrivateKey
	if u, ok := at.(URI); ok && u.Type == engine.ClassSecretKey {
		class = engine.ClassSecretKey
	}
	u, err := e.objectAddress(at, class)
	if err != nil {
		return nil, fail(op, at, e.uri.ModulePath, err)
	}
	key := new(engine.DecryptionKey)
	err = e.read(ctx, op, u, func(s *session) (err error) {
		if class == engine.ClassSecretKey {
			err = s.openKEK(key, &kek{held: held{engine: e, uri: u}})
		} else {
			err = s.openDecrypter(key, &decrypter{held: held{engine: e, uri: u}})
		}
		if err == nil && len(key.ID) == 0 {
			err = errors.New("it has no id (CKA_ID), by which a server could know it")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return key, nil
}

// decrypter is an RSA key for decryption in the token.
type decrypter struct {
	held
	public *rsa.PublicKey
}

var _ crypto.Decrypter = (*decrypter)(nil)

// openDecrypter finds an RSA key, and finds out what it decrypts.
func (s *session) openDecrypter(key *engine.DecryptionKey, k *decrypter) error {
	private, err := k.find(s)
	if err != nil {
		return err
	}
	public, err := s.publicHalf(private)
	if err != nil {
		return err
	}
	var isRSA bool
	if k.public, isRSA = public.(*rsa.PublicKey); !isRSA {
		return fmt.Errorf("%w: an EC key, which decrypts nothing: want an RSA key", engine.ErrUnsupported)
	}
	flags, err := s.flags(private.handle, pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN)
	switch {
	case flags == nil:
		return err
	case flags[0] != nil && !*flags[0]:
		return fmt.Errorf("%w: the key is not for decryption (CKA_DECRYPT)", engine.ErrUnsupported)
	case flags[1] != nil && *flags[1]:
		return fmt.Errorf("%w: the key signs too (CKA_SIGN): want one that is for decryption alone", engine.ErrUnsupported)
	}
	key.ID, key.RSA = private.ID, k
	var reasons []error
	for _, scheme := range []struct {
		can     *bool
		opts    crypto.DecrypterOpts
		encrypt func(message []byte) ([]byte, error)
	}{
		{&key.OAEP, &rsa.OAEPOptions{Hash: crypto.SHA1}, func(message []byte) ([]byte, error) {
			return rsa.EncryptOAEP(crypto.SHA1.New(), rand.Reader, k.public, message, nil)
		}},
		{&key.PKCS1v15, &rsa.PKCS1v15DecryptOptions{}, func(message []byte) ([]byte, error) {
			return rsa.EncryptPKCS1v15(rand.Reader, k.public, message)
		}},
	} {
		message := make([]byte, 16)
		if _, err := rand.Read(message); err != nil {
			return err
		}
		ciphertext, err := scheme.encrypt(message)
		if err != nil {
			return err
		}
		plain, err := s.decrypt(k, ciphertext, scheme.opts)
		if err != nil && s.lost(err) {
			return err
		}
		if *scheme.can = err == nil && bytes.Equal(plain, message); !*scheme.can {
			reasons = append(reasons, err)
		}
	}
	if !key.OAEP && !key.PKCS1v15 {
		return fmt.Errorf("%w: a test: %w", engine.ErrUnsupported, errors.Join(reasons...))
	}
	return nil
}

// Public implements crypto.Decrypter.
func (k *decrypter) Public() crypto.PublicKey { return k.public }

// Decrypt implements crypto.Decrypter.
func (k *decrypter) Decrypt(_ io.Reader, ciphertext []byte, opts crypto.DecrypterOpts) (plain []byte, err error) {
	size := 0
	if pkcs1, ok := opts.(*rsa.PKCS1v15DecryptOptions); ok && pkcs1 != nil {
		size = pkcs1.SessionKeyLen
	}
	random := make([]byte, size)
	if _, err := rand.Read(random); err != nil {
		return nil, err
	}
	err = k.use("decrypt with", func(s *session) error {
		plain, err = s.decrypt(k, ciphertext, opts)
		return err
	})
	if size > 0 && (errors.Is(err, rsa.ErrDecryption) || err == nil && len(plain) != size) {
		clear(plain)
		return random, nil // whose use tells nobody that the padding was wrong
	}
	return plain, err
}

// decrypt decrypts what is as long as the modulus. rsa.ErrDecryption, whatever the
// module says of a ciphertext: it depends on the plaintext.
func (s *session) decrypt(k *decrypter, ciphertext []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	name, mechanism := "CKM_RSA_PKCS", pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)
	switch o := opts.(type) {
	case nil, *rsa.PKCS1v15DecryptOptions:
	case *rsa.OAEPOptions:
		mgf := o.MGFHash
		if mgf == 0 {
			mgf = o.Hash
		}
		hash, known := oaepHashes[o.Hash]
		generator, knownToo := oaepHashes[mgf]
		if !known || !knownToo || len(o.Label) > 0 {
			return nil, fmt.Errorf("RSA-OAEP with a label, or a hash other than SHA-1 and SHA-2: %w", engine.ErrUnsupported)
		}
		name = fmt.Sprintf("CKM_RSA_PKCS_OAEP with %s", o.Hash)
		mechanism = pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.NewOAEPParams(hash.mechanism, generator.mgf, pkcs11.CKZ_DATA_SPECIFIED, nil))
	default:
		return nil, fmt.Errorf("RSA decryption with options of type %T: %w", opts, engine.ErrUnsupported)
	}
	if len(ciphertext) != k.public.Size() {
		return nil, rsa.ErrDecryption
	}
	if err := s.module.ctx.DecryptInit(s.handle, []*pkcs11.Mechanism{mechanism}, k.handle); err != nil {
		if s.lost(err) {
			return nil, err
		}
		return nil, fmt.Errorf("%s: %w: %w", name, engine.ErrUnsupported, explain(err))
	}
	plain, err := s.module.ctx.Decrypt(s.handle, ciphertext)
	switch {
	case err != nil && s.lost(err):
		return nil, err
	case err != nil:
		return nil, rsa.ErrDecryption
	}
	return plain, nil
}

// oaepHashes are those of RSA-OAEP (PKCS #11 v2.40 mechanisms §2.1.8).
var oaepHashes = map[crypto.Hash]struct{ mechanism, mgf uint }{
	crypto.SHA1:   {pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1},
	crypto.SHA256: {pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256},
	crypto.SHA384: {pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384},
	crypto.SHA512: {pkcs11.CKM_SHA512, pkcs11.CKG_MGF1_SHA512},
}

// kek is an AES key in the token that unwraps others.
type kek struct {
	held
	size int
}

var _ engine.KEK = (*kek)(nil)

var keyTypeAES = pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES).Value

// openKEK finds an AES key, and finds out whether it unwraps: by something that it has
// not wrapped, for what it has nobody here can make.
func (s *session) openKEK(key *engine.DecryptionKey, k *kek) error {
	secret, err := k.find(s)
	if err != nil {
		return err
	}
	if !bytes.Equal(secret.value, keyTypeAES) {
		return fmt.Errorf("%w: a secret key that is not one of AES", engine.ErrUnsupported)
	}
	length, err := s.value(secret.handle, pkcs11.CKA_VALUE_LEN)
	if err != nil {
		return err
	}
	// CK_ULONG, as this machine writes it.
	for _, size := range []int{16, 24, 32} {
		if bytes.Equal(length, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, size).Value) {
			k.size = size
		}
	}
	if k.size == 0 {
		return fmt.Errorf("%w: an AES key of a length that AES does not have", engine.ErrUnsupported)
	}
	if _, err := s.decryptContent(k, make([]byte, 24), make([]byte, aes.BlockSize), nil); err != nil && !errors.Is(err, rsa.ErrDecryption) {
		return err
	}
	key.ID, key.KEK = secret.ID, k
	return nil
}

// Size implements engine.KEK.
func (k *kek) Size() int { return k.size }

// DecryptContent implements engine.KEK.
func (k *kek) DecryptContent(wrappedKey, iv, ciphertext []byte) (padded []byte, err error) {
	err = k.use("decrypt with", func(s *session) error {
		padded, err = s.decryptContent(k, wrappedKey, iv, ciphertext)
		return err
	})
	return padded, err
}

// decryptContent unwraps a key for the session, and decrypts with it: it is never in
// the memory of this program, and no module has to let it out.
func (s *session) decryptContent(k *kek, wrappedKey, iv, ciphertext []byte) (padded []byte, err error) {
	ctx := s.module.ctx
	content, err := ctx.UnwrapKey(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP, nil)}, k.handle, wrappedKey, sessionAES(pkcs11.CKA_DECRYPT))
	if err != nil {
		err = fmt.Errorf("CKM_AES_KEY_WRAP: %w", explain(err))
		if s.lost(err) || errors.Is(err, engine.ErrUnsupported) {
			return nil, err
		}
		return nil, rsa.ErrDecryption
	}
	defer func() {
		if destroyed := ctx.DestroyObject(s.handle, content); err == nil && destroyed != nil {
			err = fmt.Errorf("destroy content key: %w", explain(destroyed))
		}
	}()
	if err := ctx.DecryptInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_CBC, iv)}, content); err != nil {
		return nil, fmt.Errorf("CKM_AES_CBC: %w", explain(err))
	}
	if padded, err = ctx.Decrypt(s.handle, ciphertext); err != nil {
		return nil, fmt.Errorf("CKM_AES_CBC: %w", explain(err))
	}
	return padded, nil
}

// sessionAES describes an AES key that is for one use, and is gone with the session.
func sessionAES(use uint, more ...*pkcs11.Attribute) []*pkcs11.Attribute {
	return append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(use, true),
	}, more...)
}
