package estenroll

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
)

// A key that the server makes (RFC 7030 §4.4, RFC 9148 §4.8) is in the memory of a run
// between the answer and the HSM, and nowhere else: neither it nor the answer is
// written down, so that one which a kill has lost is asked for anew.

// errKeyLost says that a run was interrupted between the answer and the HSM.
var errKeyLost = errors.New("the key that the server made was lost on its way into the token")

// asksForKey reports an operation whose key the server makes.
func (op *operation) asksForKey() bool { return op.NewKey && op.ServerMade }

// keyToCome reports an operation whose key the server has not made yet: its address is
// chosen, and there is nothing at it.
func (op *operation) keyToCome() bool {
	return op.asksForKey() && (op.Step == StepGenerate || op.Step == StepRequest)
}

// importer is the engine, if it takes in the key of another; an error of an engine, else.
func (c *Credential) importer() (engine.KeyImporter, error) {
	importer, ok := c.engine.(engine.KeyImporter)
	if !ok {
		return nil, &engine.Error{Op: "import key", Err: fmt.Errorf("%w by this engine", engine.ErrUnsupported)}
	}
	return importer, nil
}

// checkImport wants a token that takes in a key of a type, before one is made for it:
// a key that was made in vain is one more that somebody may have.
func (c *Credential) checkImport(ctx context.Context, kind engine.Algorithm) error {
	importer, err := c.importer()
	if err == nil {
		err = importer.CanImportKey(ctx, engine.KeySpec{Algorithm: kind})
	}
	if errors.Is(err, engine.ErrUnsupported) {
		return fmt.Errorf("%w of type %s: %w", ErrNoImport, kind, err)
	}
	return err
}

// signForServerKey makes the CSR for a key that the server makes. The server "MUST
// ignore the public key values and signature in the CSR" (RFC 7030 §4.4.1), so that the
// type of its key is all that can say which one is wanted, and no more need be true of
// it: it is made for this and forgotten, whatever types the keys in the HSM have, and
// none of those is asked for a signature that vouches for nothing.
func (c *Credential) signForServerKey(kind engine.Algorithm, template csr.Template) ([]byte, error) {
	key, err := engine.NewSoftwareKey(kind)
	if err != nil {
		return nil, err
	}
	return csr.Build(c.cfg.Rand, template, key)
}

// requestKey is the public key that a certificate is asked for. Of one that the server
// makes it is that of the CSR, as good an example as any of its type; nil where the CSR
// is linked to a session and there was none yet.
func (c *Credential) requestKey(ctx context.Context) (crypto.PublicKey, error) {
	op := c.journal.Operation
	switch {
	case !op.asksForKey():
		signer, err := c.signer(ctx, op.Key.Address)
		if err != nil {
			return nil, err
		}
		return signer.Public(), nil
	case len(op.CSR) == 0:
		return nil, nil
	}
	request, err := op.request()
	if err != nil {
		return nil, err
	}
	return request.PublicKey, nil
}

// keyOfAnswer is the public key that the certificate of an answer must be for: the
// one of the CSR, or of the private key that came with it.
func (c *Credential) keyOfAnswer(session est.Session, request *x509.CertificateRequest, current crypto.PublicKey, made *est.ServerKey) (crypto.PublicKey, error) {
	if made == nil {
		return request.PublicKey, nil
	}
	refuse := func(format string, args ...any) (crypto.PublicKey, error) {
		return nil, &est.ResponseError{Operation: est.ServerKeyGen, Err: fmt.Errorf(format, args...)}
	}
	public, err := made.Public()
	if err != nil {
		return refuse("%w", err)
	}
	asked, kind := engine.AlgorithmOf(request.PublicKey), engine.AlgorithmOf(public)
	known, accepts := session.(est.KeyAccepter)
	switch {
	case samePublicKey(public, current):
		return refuse("the key is not new, it is that of the current certificate")
	case kind == asked:
		return public, nil
	case c.cfg.RefuseOtherNames:
		return refuse("a key of type %s, asked for was %s: %w", kind, asked, ErrOtherKey)
	case !slices.Contains(engine.Algorithms(), kind):
		return refuse("a key of type %s, which no engine has, asked for was %s: %w", kind, asked, ErrOtherKey)
	case accepts && !known.AcceptsKey(public):
		return refuse("a key of type %s, with which the server accepts no certificate, asked for was %s: %w", kind, asked, ErrOtherKey)
	}
	c.warn("the server has made another key than was asked for: it is of type %s, asked for was %s", kind, asked)
	return public, nil
}

// importKey puts the key that the server has made into the token, at the address that
// the journal names beside its certificate.
func (c *Credential) importKey(ctx context.Context, made *est.ServerKey) error {
	op := c.journal.Operation
	err := c.timed(StepImport, func() (string, error) {
		importer, err := c.importer()
		if err != nil {
			return "", err
		}
		public, err := importer.ImportKey(ctx, op.Key.Address, made.PKCS8)
		if errors.Is(err, engine.ErrDeviceLost) {
			// The outcome is unknown, and importing again could leave two.
			var recoverErr error
			if public, recoverErr = c.recoverer.RecoverKey(ctx, op.Key.Address); recoverErr != nil {
				return "", fmt.Errorf("%w; then %w", err, recoverErr)
			}
			err = nil
		}
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("imported the key that the server has made, %s: %s", engine.AlgorithmOf(public), op.Key), c.imported(public)
	})
	if errors.Is(err, engine.ErrUnsupported) || errors.Is(err, est.ErrKeyMismatch) {
		return c.discard(ctx, err) // the token said that it would: the next run asks it anew, before it asks the server
	}
	return c.giveUpRekey(ctx, err)
}

// recoverImport judges what an interrupted run has left of an import: the whole key, or
// nothing that is of use. errKeyLost.
func (c *Credential) recoverImport(ctx context.Context) error {
	op := c.journal.Operation
	err := c.timed(StepImport, func() (string, error) {
		public, err := c.recoverer.RecoverKey(ctx, op.Key.Address)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("the key of the interrupted run is whole: %s", op.Key), c.imported(public)
	})
	if errors.Is(err, engine.ErrNotFound) || errors.Is(err, est.ErrKeyMismatch) {
		return errKeyLost
	}
	return err
}

// imported goes on with the certificate of a key that is in the token.
func (c *Credential) imported(key crypto.PublicKey) error {
	op := c.journal.Operation
	chain, err := op.chain()
	if err != nil {
		return err
	}
	if !samePublicKey(key, chain[0].PublicKey) {
		return fmt.Errorf("the key at %s: %w", op.Key, est.ErrKeyMismatch)
	}
	c.warn("the private key was made by %s, outside of the HSM: whoever had it there can use it", op.Server)
	return c.advance(StepStore)
}
