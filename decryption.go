package estenroll

import (
	"context"
	"fmt"
	"time"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
)

// A key that the server makes may be encrypted for one that is in the HSM (RFC 7030
// §4.4.1): whoever stands between the two, and ends the session, does not see it.

// decryptionKey opens the key that is configured to decrypt with, once, and finds out
// that it does: before anything is asked of a server. nil if none is configured.
// ErrDecryptKey.
func (c *Credential) decryptionKey(ctx context.Context) (*engine.DecryptionKey, error) {
	if c.cfg.DecryptKey == nil || c.decryption != nil {
		return c.decryption, nil
	}
	decrypter, ok := c.engine.(engine.Decrypter)
	if !ok {
		return nil, fmt.Errorf("%w: %w", &engine.Error{Op: "open decryption key", Address: c.cfg.DecryptKey, Err: fmt.Errorf("%w by this engine", engine.ErrUnsupported)}, ErrDecryptKey)
	}
	key, err := decrypter.DecryptionKey(ctx, c.cfg.DecryptKey)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrDecryptKey)
	}
	c.decryption = key
	return key, nil
}

// protection is what the CSR says of it.
func (c *Credential) protection(ctx context.Context) (*csr.KeyProtection, error) {
	key, err := c.decryptionKey(ctx)
	if err != nil || key == nil {
		return nil, err
	}
	protection := &csr.KeyProtection{ID: key.ID, OAEP: key.OAEP, PKCS1v15: key.PKCS1v15}
	if key.KEK != nil {
		protection.KEK = key.KEK.Size()
	}
	return protection, nil
}

// opener is what opens the answer.
func (c *Credential) opener(ctx context.Context) (*est.DecryptionKey, error) {
	key, err := c.decryptionKey(ctx)
	if err != nil || key == nil {
		return nil, err
	}
	return &est.DecryptionKey{ID: key.ID, RSA: key.RSA, KEK: key.KEK}, nil
}

// judgeSigner judges who has signed a key that came encrypted. RFC 7030 §4.4.2 has the
// party sign that made it, and says nothing of what a client does with that: one that
// nobody vouches for is refused, as any other signature is. RFC 9148 §4.8 does without
// it; the key is then as good as the session, and as its certificate, which it has been
// found to match.
func (c *Credential) judgeSigner(anchors *est.TrustAnchors, made *est.ServerKey, now time.Time) error {
	switch {
	case made == nil || !made.Enveloped:
		return nil
	case made.Signer == nil:
		c.warn("the server has encrypted the key, and nobody has signed it")
		return nil
	}
	if err := anchors.VerifySigner(made.Signer, now); err != nil {
		return &est.ResponseError{Operation: est.ServerKeyGen, Err: err}
	}
	return nil
}
