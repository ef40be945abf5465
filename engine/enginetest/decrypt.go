package enginetest

//lint:file-ignore SA1019 PKCS #1 v1.5 is how servers transport keys (RFC 3370 §4.2.1)

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"

	"estenroll/engine"
)

// decrypter is the engine as one that holds decryption keys; nil for one that never does.
func (s *suite) decrypter(e opened) engine.Decrypter {
	s.Helper()
	d, ok := e.Engine.(engine.Decrypter)
	if !ok {
		return nil
	}
	return d
}

// decrypts wants an RSA key at an address, and what its public key encrypts.
func (s *suite) decrypts(d engine.Decrypter, at string) *engine.DecryptionKey {
	s.Helper()
	key, err := d.DecryptionKey(s.Context(), s.parse(at))
	if err != nil {
		s.Fatal(err)
	}
	public, isRSA := key.RSA.Public().(*rsa.PublicKey)
	if !isRSA || key.KEK != nil || !bytes.Equal(key.ID, []byte{0xd1}) || !key.OAEP || !key.PKCS1v15 {
		s.Fatalf("got %+v", key)
	}
	message := []byte("a key of 16 byte")
	pkcs1, err := rsa.EncryptPKCS1v15(rand.Reader, public, message)
	if err != nil {
		s.Fatal(err)
	}
	for _, opts := range []crypto.DecrypterOpts{nil, &rsa.PKCS1v15DecryptOptions{}, &rsa.PKCS1v15DecryptOptions{SessionKeyLen: len(message)}} {
		if got, err := key.RSA.Decrypt(rand.Reader, pkcs1, opts); err != nil || !bytes.Equal(got, message) {
			s.Errorf("PKCS #1 v1.5, %+v: got %q, %v", opts, got, err)
		}
	}
	for _, hash := range []crypto.Hash{crypto.SHA1, crypto.SHA256} {
		ciphertext, err := rsa.EncryptOAEP(hash.New(), rand.Reader, public, message, nil)
		if err != nil {
			s.Fatal(err)
		}
		got, err := key.RSA.Decrypt(rand.Reader, ciphertext, &rsa.OAEPOptions{Hash: hash})
		switch {
		case errors.Is(err, engine.ErrUnsupported) && hash != crypto.SHA1: // SoftHSM
		case err != nil || !bytes.Equal(got, message):
			s.Errorf("OAEP, %s: got %q, %v", hash, got, err)
		}
	}
	return key
}

var decryptRules = []rule{
	{"an RSA key for decryption opens what is encrypted for it", func(s *suite) {
		e := s.open()
		d := s.decrypter(e)
		if d == nil {
			return
		}
		e = s.elsewhere(e, func() error { return s.GenerateDecryption("decryption", "d1", false) })
		d = s.decrypter(e)
		if s.NoDecryption {
			_, err := d.DecryptionKey(s.Context(), s.parse("pkcs11:id=%d1;type=private"))
			s.wants(err, engine.ErrUnsupported)
			return
		}
		for _, at := range []string{"pkcs11:id=%d1", "pkcs11:object=decryption;type=private"} {
			s.decrypts(d, at)
		}
		s.holds(e, 1, 1, 0)
	}},
	{"a wrong padding is one error, and no error for a session key", func(s *suite) {
		e := s.open()
		if s.decrypter(e) == nil || s.NoDecryption {
			return
		}
		e = s.elsewhere(e, func() error { return s.GenerateDecryption("decryption", "d1", false) })
		key := s.decrypts(s.decrypter(e), "pkcs11:id=%d1")
		size := key.RSA.Public().(*rsa.PublicKey).Size()
		wrong := bytes.Repeat([]byte{5}, size) // padded as nothing is
		for name, opts := range map[string]crypto.DecrypterOpts{"PKCS #1 v1.5": &rsa.PKCS1v15DecryptOptions{}, "OAEP": &rsa.OAEPOptions{Hash: crypto.SHA1}} {
			for _, ciphertext := range [][]byte{wrong, wrong[1:], nil} {
				got, err := key.RSA.Decrypt(rand.Reader, ciphertext, opts)
				if s.ImplicitRejection && name != "OAEP" && len(ciphertext) == size {
					if err != nil {
						s.Errorf("%s: got %v, want something", name, err)
					}
				} else if len(got) > 0 || !errors.Is(err, rsa.ErrDecryption) {
					s.Errorf("%s, %d bytes: got %q, %v, want rsa.ErrDecryption", name, len(ciphertext), got, err)
				}
			}
		}
		var keys [2][]byte
		for i := range keys {
			var err error
			if keys[i], err = key.RSA.Decrypt(rand.Reader, wrong, &rsa.PKCS1v15DecryptOptions{SessionKeyLen: 16}); err != nil || len(keys[i]) != 16 {
				s.Errorf("a session key: got %x, %v", keys[i], err)
			}
		}
		if !s.ImplicitRejection && bytes.Equal(keys[0], keys[1]) {
			s.Error("two wrong paddings give one session key")
		}
		s.decrypts(s.decrypter(e), "pkcs11:id=%d1") // the session is as it was
	}},
	{"a key for signing decrypts nothing", func(s *suite) {
		e := s.open()
		if s.decrypter(e) == nil {
			return
		}
		at, _ := s.generate(e, "name")
		e = s.elsewhere(e, func() error { return s.GenerateDecryption("both", "d2", true) })
		for address, want := range map[string]error{
			at.String():                     engine.ErrUnsupported,
			"pkcs11:id=%d2":                 engine.ErrUnsupported,
			"pkcs11:id=%d3":                 engine.ErrNotFound,
			"pkcs11:id=%d3;type=secret-key": engine.ErrNotFound,
			"pkcs11:id=%d2;type=public":     nil,
		} {
			_, err := s.decrypter(e).DecryptionKey(s.Context(), s.parse(address))
			s.wants(err, want)
		}
	}},
	{"a secret key unwraps into the token, where it stays", func(s *suite) {
		e := s.open()
		if s.decrypter(e) == nil {
			return
		}
		// RFC 3394 §4.6, and AES in CBC mode with the key that is wrapped there.
		secret, wrapped, content := s.decode("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"),
			s.decode("28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"),
			s.decode("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f")
		iv, plain := bytes.Repeat([]byte{9}, aes.BlockSize), []byte("two blocks of AES are 32 bytes..")
		block, err := aes.NewCipher(content)
		if err != nil {
			s.Fatal(err)
		}
		ciphertext := make([]byte, len(plain))
		cipher.NewCBCEncrypter(block, iv).CryptBlocks(ciphertext, plain)

		if s.WriteSecret == nil { // the foreign tool has no way, so neither has anybody here
			return
		}
		e = s.elsewhere(e, func() error { return s.WriteSecret(secret, "kek", "ca") })
		key, err := s.decrypter(e).DecryptionKey(s.Context(), s.parse("pkcs11:id=%ca;type=secret-key"))
		if s.NoKEK {
			s.wants(err, engine.ErrUnsupported)
			return
		}
		if err != nil {
			s.Fatal(err)
		}
		if key.RSA != nil || key.KEK.Size() != 32 || !bytes.Equal(key.ID, []byte{0xca}) {
			s.Errorf("got %+v", key)
		}
		before := len(s.list(e))
		got, err := key.KEK.DecryptContent(wrapped, iv, ciphertext)
		if err != nil || !bytes.Equal(got, plain) {
			s.Errorf("got %q, %v", got, err)
		}
		wrong := bytes.Clone(wrapped)
		wrong[20] ^= 1
		for _, wrapped := range [][]byte{wrong, wrapped[:16], wrapped[:9]} {
			if got, err := key.KEK.DecryptContent(wrapped, iv, ciphertext); len(got) > 0 || !errors.Is(err, rsa.ErrDecryption) {
				s.Errorf("%d bytes: got %q, %v, want rsa.ErrDecryption", len(wrapped), got, err)
			}
		}
		if after := len(s.list(e)); after != before {
			s.Errorf("%d objects, %d before", after, before)
		}
		if s.Token.LoseAfter != nil {
			s.LoseAfter(s.T, "C_UnwrapKey")
			if got, err := key.KEK.DecryptContent(wrapped, iv, ciphertext); err != nil || !bytes.Equal(got, plain) {
				s.Errorf("after the loss of the device: got %q, %v", got, err)
			}
		}
	}},
}

func (s *suite) decode(digits string) []byte {
	s.Helper()
	data, err := hex.DecodeString(digits)
	if err != nil {
		s.Fatal(err)
	}
	return data
}
