package estenroll

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"estenroll/engine"
	"estenroll/est"
)

// maxAnchors bounds the trust anchors of one pair in the token: in a rollover there
// are two or three.
const maxAnchors = 8

// anchorReference is a trust anchor of ours in the token.
type anchorReference struct {
	SHA256  string    `json:"sha256"` // of its DER, hexadecimal
	Address reference `json:"address"`
}

func (a anchorReference) check() error {
	if digest, err := hex.DecodeString(a.SHA256); err != nil || len(digest) != len(est.Fingerprint{}) {
		return errors.New("the sha256 of a trust anchor is none")
	}
	return nil
}

// placeAnchors says which trust anchors of the Explicit TA will be stored, and
// where: the callback has chosen their addresses. What is there already and is not
// ours stays another's.
func (c *Credential) placeAnchors(ctx context.Context, trust *est.TrustAnchors) (placed []anchorReference, err error) {
	if c.cfg.AnchorAddress == nil {
		return nil, nil
	}
	store, ok := c.engine.(engine.AnchorStore)
	if !ok {
		c.warnOnce("the engine does not store trust anchors: they are in the state directory alone")
		return nil, nil
	}
	for _, anchor := range trust.Anchors() {
		chosen := c.cfg.AnchorAddress(anchor)
		if chosen == nil {
			continue
		}
		at, there, err := store.AnchorAddress(ctx, chosen, anchor)
		taken := slices.ContainsFunc(placed, func(other anchorReference) bool { return other.Address.Address == at })
		switch {
		case passes(ctx, err):
			return nil, err
		case err != nil:
			c.notStored(anchor, err)
		case taken:
			c.notStored(anchor, fmt.Errorf("%s is another trust anchor's", at))
		case len(placed) == maxAnchors:
			c.notStored(anchor, fmt.Errorf("there are %d already", maxAnchors))
		case there && !c.anchorWanted(at, nil, nil):
			c.say(StepRequest, "the trust anchor %q is in the token already: %s", anchor.Subject, at)
		default:
			placed = append(placed, anchorReference{est.FingerprintOf(anchor).String(), reference{Address: at}})
		}
	}
	return placed, nil
}

// passes reports a failure that the next run may not have. Any other of a trust
// anchor is no reason to go without a certificate.
func passes(ctx context.Context, err error) bool {
	var pin *engine.PINError
	return err != nil && (ctx.Err() != nil || errors.Is(err, engine.ErrDeviceLost) || errors.Is(err, engine.ErrLocked) || errors.As(err, &pin))
}

func (c *Credential) notStored(anchor *x509.Certificate, err error) {
	c.warn("the trust anchor %q is not stored in the token: %v", anchor.Subject, err)
}

// storeAnchors stores what placeAnchors has written down. What the token cannot
// store is not referred to any more.
func (c *Credential) storeAnchors(ctx context.Context) error {
	op := c.journal.Operation
	if len(op.Anchors) == 0 {
		return nil
	}
	trust, err := c.loadExplicitTA(op.ExplicitTA)
	if err != nil {
		c.warn("%v: no trust anchor is stored in the token", err)
		op.Anchors = nil
		return nil
	}
	var stored []anchorReference
	for _, anchor := range trust.Anchors() {
		i := slices.IndexFunc(op.Anchors, func(a anchorReference) bool { return a.SHA256 == est.FingerprintOf(anchor).String() })
		if i < 0 {
			continue
		}
		err := c.store.StoreCertificates(ctx, []engine.Address{op.Anchors[i].Address.Address}, []*x509.Certificate{anchor})
		switch {
		case passes(ctx, err):
			return err
		case err != nil:
			c.notStored(anchor, err)
		default:
			stored = append(stored, op.Anchors[i])
		}
	}
	op.Anchors = stored
	return nil
}

// makeRoom removes the credential's trust anchors from a token that has no room for
// its certificate: the state directory has them. It reports whether there is room now
// that there was not.
func (c *Credential) makeRoom(ctx context.Context) bool {
	var anchors []anchorReference
	pairs := slices.Clone(c.journal.Pairs)
	for i := range c.journal.Pairs {
		anchors = append(anchors, pairs[i].Anchors...)
		c.journal.Pairs[i].Anchors = nil
	}
	if len(anchors) == 0 {
		return false
	}
	c.warn("the token is full: its trust anchors give way to the certificate")
	if err := c.removeAnchors(ctx, anchors, c.journal.Operation); err != nil {
		c.journal.Pairs = pairs // which names them until they are gone
		c.warn("make room in the token: %v", err)
		return false
	}
	return true
}

// removeAnchors destroys trust anchors that nothing wants any more but the operation
// that ends, if any: one object may serve several pairs and credentials.
func (c *Credential) removeAnchors(ctx context.Context, anchors []anchorReference, ends *operation) error {
	for _, anchor := range anchors {
		if c.anchorWanted(anchor.Address.Address, ends, nil) {
			continue
		}
		if err := c.store.RemoveCertificates(ctx, []engine.Address{anchor.Address.Address}); err != nil {
			return err
		}
	}
	return nil
}

// anchorWanted reports whether a pair or an operation of any credential has a trust
// anchor at an address, apart from an operation that ends and from a record.
func (d *shared) anchorWanted(at engine.Address, ends *operation, apart *record) bool {
	has := func(a anchorReference) bool { return a.Address.Address == at }
	for _, r := range d.journal.Credentials {
		if r == apart {
			continue
		}
		if op := r.Operation; op != nil && op != ends && slices.ContainsFunc(op.Anchors, has) {
			return true
		}
		if slices.ContainsFunc(r.Pairs, func(c credential) bool { return slices.ContainsFunc(c.Anchors, has) }) {
			return true
		}
	}
	return false
}
