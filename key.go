package estenroll

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"estenroll/engine"
)

func (c *Credential) keyType() engine.Algorithm {
	return cmp.Or(c.cfg.KeySpec.Algorithm, engine.ECP256)
}

func (op *operation) keyType() engine.Algorithm { return cmp.Or(op.KeyType, engine.ECP256) }

// existingKey returns where the key is that the configuration names, when it is
// one key that may be used and can sign: before anything is asked of a server.
func (c *Credential) existingKey(ctx context.Context) (engine.Address, error) {
	at, err := c.findKey(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.checkKeyPolicy(ctx, at); err != nil {
		return nil, err
	}
	signer, err := c.engine.Signer(ctx, at)
	if err == nil {
		err = signsHandshakes(signer)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrKey)
	}
	return at, nil
}

// findKey returns the whole address of the key: the configuration may name it by
// its label or its id alone, and addresses are compared.
func (c *Credential) findKey(ctx context.Context) (engine.Address, error) {
	lister, ok := c.engine.(engine.Lister)
	if !ok {
		return nil, fmt.Errorf("find %s: the engine does not list its objects: %w", c.cfg.Key, engine.ErrUnsupported)
	}
	objects, err := lister.List(ctx, c.cfg.Key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrKey)
	}
	objects = slices.DeleteFunc(objects, func(o engine.Object) bool { return o.Class != engine.ClassPrivateKey || o.Err != nil })
	switch {
	case len(objects) == 0:
		return nil, fmt.Errorf("find %s: %w: %w", c.cfg.Key, engine.ErrNotFound, ErrKey)
	case len(objects) > 1:
		return nil, fmt.Errorf("find %s: %w: %w", c.cfg.Key, &engine.AmbiguousError{Address: c.cfg.Key, Matches: objects}, ErrKey)
	case objects[0].Address == nil || len(objects[0].ID) == 0:
		return nil, fmt.Errorf("find %s: it has no CKA_ID, by which its certificate is found: %w", c.cfg.Key, ErrKey)
	}
	return objects[0].Address, nil
}

// warnOfOtherKey says where the configuration asks for another key than the enrolled
// one, which an enrolment leaves in its place.
func (c *Credential) warnOfOtherKey(ctx context.Context, enrolled *Result) error {
	const stays = "the enrolled key stays in its place: %s"
	if c.cfg.Key == nil {
		if got := engine.AlgorithmOf(enrolled.Certificate.PublicKey); got != c.keyType() {
			c.warn(stays, fmt.Sprintf("it is of type %s, a rekey makes one of type %s, as it is configured", got, c.keyType()))
		}
		return nil
	}
	same, err := c.named(ctx, c.cfg.Key, enrolled.Key)
	if err == nil && !same {
		c.warn(stays, fmt.Sprintf("the configuration names %s, which is used after a reset", c.cfg.Key))
	}
	return err
}

// checkKeyPolicy wants of an existing key what a generated one is: not
// extractable, sensitive, for signing. What a token does not report it does not
// promise; only that a key signs, a signature shows.
func (c *Credential) checkKeyPolicy(ctx context.Context, at engine.Address) error {
	inspector, ok := c.engine.(engine.KeyInspector)
	if !ok {
		return fmt.Errorf("check %s: the engine does not show a key's attributes: %w", at, engine.ErrUnsupported)
	}
	attributes, err := inspector.KeyAttributes(ctx, at)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrKey)
	}
	if attributes.Sign != nil && !*attributes.Sign {
		return fmt.Errorf("check %s: it is not for signing: %w", at, ErrKeyPolicy)
	}
	var loose []string
	for _, rule := range []struct {
		got          *bool
		want         bool
		not, unknown string
	}{
		{attributes.Extractable, false, "it is extractable", "the token does not say whether it is extractable"},
		{attributes.Sensitive, true, "it is not sensitive", "the token does not say whether it is sensitive"},
	} {
		switch {
		case rule.got == nil:
			loose = append(loose, rule.unknown)
		case *rule.got != rule.want:
			loose = append(loose, rule.not)
		}
	}
	switch reason := strings.Join(loose, ", "); {
	case reason == "":
	case c.cfg.AllowExtractable:
		c.warnOnce("the key at %s is used although %s", at, reason)
	default:
		return fmt.Errorf("check %s: %s: %w", at, reason, ErrKeyPolicy)
	}
	return nil
}

// signsHandshakes makes a signature as a handshake does: of an RSA key with
// PKCS #1 v1.5, which is all that pion v3.1.15 has for DTLS 1.2. A token that
// refuses it could ask for a certificate and never use it.
func signsHandshakes(signer crypto.Signer) error {
	digest := sha256.Sum256([]byte("est-enroll tests a key"))
	_, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	return err
}

// anotherKey says why the key of an interrupted enrolment or rekey is not the one
// that is wanted by now. Once there is a certificate for it, it is gone on with.
func (c *Credential) anotherKey(ctx context.Context, op *operation) (why string, err error) {
	if op.Kind != KindEnroll && op.Kind != KindRekey || op.Step != StepGenerate && op.Step != StepRequest {
		return "", nil
	}
	wanted, err := c.wanted(op)
	if err != nil {
		return "", err
	}
	kind, err := c.keyTypeFor(wanted)
	switch existing := c.cfg.Key != nil; {
	case err != nil:
		return err.Error(), nil
	case existing != op.ExistingKey:
		return "the configuration names another key now", nil
	case !existing && op.ServerMade != c.cfg.ServerKeyGen:
		return fmt.Sprintf("the configuration has the %s make the key now", map[bool]string{true: "server", false: "token"}[c.cfg.ServerKeyGen]), nil
	case !existing && op.keyType() != kind:
		return fmt.Sprintf("the configuration asks for a key of type %s now, not %s", kind, op.keyType()), nil
	case !existing:
		return "", nil
	}
	at, err := c.findKey(ctx)
	var ambiguous *engine.AmbiguousError
	if errors.As(err, &ambiguous) && slices.ContainsFunc(ambiguous.Matches, func(o engine.Object) bool { return o.Address == op.Key.Address }) {
		at, err = op.Key.Address, nil // another has its name since: the choice was made
	}
	if err == nil && at != op.Key.Address {
		return "the configuration names another key now", nil
	}
	if err == nil {
		err = c.checkKeyPolicy(ctx, at)
	}
	switch {
	case errors.Is(err, engine.ErrNotFound):
		return "its key is not in the token any more", nil
	case errors.Is(err, ErrKeyPolicy):
		return err.Error(), nil
	}
	return "", err
}

// certificate finds one certificate.
func (c *Credential) certificate(ctx context.Context, at engine.Address) (*x509.Certificate, error) {
	if c.isIDevID(at) {
		return c.foreignCertificate(ctx, at)
	}
	return c.store.Certificate(ctx, at)
}

// foreignCertificate finds a certificate that is not ours: where an address of the
// factory certificate names it by its id alone, and its key got certificates of ours
// (Key), those do not count.
func (c *Credential) foreignCertificate(ctx context.Context, at engine.Address) (*x509.Certificate, error) {
	cert, err := c.store.Certificate(ctx, at)
	var ambiguous *engine.AmbiguousError
	if !errors.As(err, &ambiguous) {
		return cert, err
	}
	foreign := slices.DeleteFunc(slices.Clone(ambiguous.Matches), func(o engine.Object) bool { return o.Address == nil || c.isOurs(o.Address) })
	if len(foreign) != 1 {
		return nil, err
	}
	return c.store.Certificate(ctx, foreign[0].Address)
}

// isOurs reports whether the journal knows a certificate as one that we stored.
func (d *shared) isOurs(cert engine.Address) bool {
	for _, r := range d.journal.Credentials {
		if r.names(cert) {
			return true
		}
	}
	return false
}

// named reports whether an address of the configuration names a key, of which it
// may have the label or the id alone.
func (d *shared) named(ctx context.Context, at, key engine.Address) (bool, error) {
	lister, ok := d.engine.(engine.Lister)
	if at == nil || at == key || !ok {
		return at == key, nil
	}
	objects, err := lister.List(ctx, at)
	if errors.Is(err, engine.ErrNotFound) { // an address that names nothing in any token
		err = nil
	}
	return slices.ContainsFunc(objects, func(o engine.Object) bool { return o.Address == key }), err
}
