package estenroll

import (
	"cmp"
	"context"
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
)

// PoP says when a CSR is linked to the session that it is sent in, which proves that
// who has the key is who has the session (RFC 7030 §3.5). One that is linked is made
// again for each session.
type PoP string

// The ways to decide it.
const (
	PoPAuto    PoP = ""        // when the server wants it
	PoPRequire PoP = "require" // always
	PoPOff     PoP = "off"     // never
)

// errAnotherKey says that the server wants another kind of key than the one that was
// generated before it was asked.
var errAnotherKey = errors.New("another kind of key is wanted")

// noAttributes is the answer of a server that wants nothing: an empty list.
var noAttributes = []byte{0x30, 0}

// askAttributes asks once for each operation what the server wants of the CSR
// (RFC 7030 §4.5), so that a repetition sends the same.
func (c *Credential) askAttributes(ctx context.Context, session est.Session, anchors *est.TrustAnchors, key crypto.PublicKey) error {
	op := c.journal.Operation
	if !c.asksAttributes(op) {
		return nil
	}
	der, wanted, err := c.wishes(ctx, session, anchors)
	if err != nil {
		return err
	}
	op.Attributes = der
	if err := c.checkWantedKey(op.Kind, op.NewKey, wanted, cmp.Or(engine.AlgorithmOf(key), op.keyType())); err != nil || len(op.CSR) == 0 {
		return err // they are saved with the key that takes its place, or with the CSR
	}
	return c.save() // before what it wants is sent
}

// wishes asks what the server wants, and whether it is something that can be had.
func (c *Credential) wishes(ctx context.Context, session est.Session, anchors *est.TrustAnchors) (der []byte, wanted csr.Wanted, err error) {
	carrier, err := carrying(ctx, session, est.CSRAttrs, anchors)
	if err != nil {
		return nil, wanted, err
	}
	client := est.Client{Session: carrier}
	der, err = client.CSRAttrs(ctx)
	var status *est.StatusError
	switch {
	case errors.As(err, &status) && !status.Unauthorized:
		// What the server wants is for it to say: it may do without.
		c.warnOnce("%v: the CSR is what the configuration says", err)
	case err != nil:
		return nil, wanted, err
	}
	if der == nil {
		der = noAttributes
	}
	attributes, err := csr.ParseAttributes(der)
	if err == nil {
		wanted, err = attributes.Wanted()
	}
	if err == nil {
		_, err = c.keyTypeFor(wanted)
	}
	if err != nil {
		return nil, wanted, &est.ResponseError{Operation: est.CSRAttrs, Err: err}
	}
	return der, wanted, nil
}

// asksAttributes reports an operation, nil for one that is yet to begin, of which the
// server has not said yet what it wants. What is under decision is repeated as it is.
func (c *Credential) asksAttributes(op *operation) bool {
	return !c.cfg.IgnoreAttributes && (op == nil || len(op.Attributes) == 0 && op.AskedAt.IsZero())
}

// checkWantedKey compares the key of an operation with the one that is wanted. A key
// that was made for the operation gives way; a renewal is for the key that it is for.
func (c *Credential) checkWantedKey(kind Kind, newKey bool, wanted csr.Wanted, has engine.Algorithm) error {
	switch {
	case wanted.Key.Allows(string(has)):
		return nil
	case newKey:
		return errAnotherKey
	case kind == KindRenew:
		c.warnOnce("the server wants a key of type %s, and this one is of type %s: a rekey gets it", wanted.Key, has)
		return nil
	}
	return &est.ResponseError{Operation: est.CSRAttrs, Err: fmt.Errorf("the server wants a key of type %s, and the one that was named is of type %s: %w", wanted.Key, has, ErrKeyWanted)}
}

// replaceKey has another key generated, of the type that the server wants. The one in
// its place goes first: where the journal names one that is gone, the operation begins anew.
func (c *Credential) replaceKey(ctx context.Context) error {
	op := c.journal.Operation
	wanted, err := c.wanted(op)
	if err != nil {
		return err
	}
	kind, err := c.keyTypeFor(wanted)
	if err != nil {
		return err
	}
	if err := c.removeCredential(ctx, nil, op.Key.Address, nil, nil); err != nil {
		return err
	}
	at, err := c.engine.NewKeyAddress(c.cfg.Name)
	if err != nil {
		return err
	}
	if op.asksForKey() {
		c.say(StepRequest, "the server wants to make a key of type %s, not %s", kind, op.keyType())
	} else {
		c.say(StepRequest, "the server wants a key of type %s: the one of type %s is removed", kind, op.keyType())
	}
	op.Key, op.KeyType, op.CSR = reference{Address: at}, kind, nil
	return c.advance(StepGenerate)
}

// wanted is what the server has said that it wants; nothing where it was not asked.
func (c *Credential) wanted(op *operation) (csr.Wanted, error) {
	if c.cfg.IgnoreAttributes || op == nil || len(op.Attributes) == 0 {
		return csr.Wanted{}, nil
	}
	attributes, err := csr.ParseAttributes(op.Attributes)
	if err != nil {
		return csr.Wanted{}, fmt.Errorf("read the CSR attributes of the journal: %w: %w", err, ErrState)
	}
	return attributes.Wanted()
}

// keyTypeFor is the type of a key to generate: the configured one where the server
// allows it, else the first that it does.
func (c *Credential) keyTypeFor(wanted csr.Wanted) (engine.Algorithm, error) {
	for _, one := range append([]engine.Algorithm{c.keyType()}, engine.Algorithms()...) {
		if wanted.Key.Allows(string(one)) {
			return one, nil
		}
	}
	return "", fmt.Errorf("the server wants a key of type %s, which no engine generates: %w", wanted.Key, ErrKeyWanted)
}

// links reports whether a CSR is linked to its session.
func (c *Credential) links(wanted csr.Wanted) bool {
	if c.cfg.PoP == PoPOff && wanted.ChallengePassword {
		c.warnOnce("the server wants CSRs that are linked to their session, and the configuration does not")
	}
	return c.cfg.PoP == PoPRequire || c.cfg.PoP == PoPAuto && wanted.ChallengePassword
}

// link is the challengePassword that links a CSR to a session.
func (c *Credential) link(session est.Session) (string, error) {
	binding, err := session.ChannelBinding()
	switch {
	case errors.Is(err, est.ErrUnreachable): // the next session may have one
		return "", fmt.Errorf("link the CSR to the session: %w", err)
	case err != nil:
		return "", fmt.Errorf("link the CSR to the session: %w: %w", err, ErrNoPoP)
	}
	return base64.StdEncoding.EncodeToString(binding), nil
}
