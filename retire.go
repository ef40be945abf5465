package estenroll

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"estenroll/engine"
)

// keepPrevious is how many pairs older than the current one stay until the
// next completed renewal.
const keepPrevious = 1

// retire removes what is older than the previous pair and ends the operation.
func (c *Credential) retire(ctx context.Context) (*Result, error) {
	op := c.journal.Operation
	err := c.timed(StepRetire, func() (string, error) {
		retired := 0
		for i := len(c.journal.Pairs) - 1; i > keepPrevious; i-- {
			old := c.journal.Pairs[i]
			c.journal.Pairs = slices.Delete(c.journal.Pairs, i, i+1)
			err := c.removeCredential(ctx, old.Certificates, old.ownKey(), old.Anchors, nil)
			if err == nil {
				retired++
				continue
			}
			// The record of the attempt is saved next: it must not forget this one.
			c.journal.Pairs = slices.Insert(c.journal.Pairs, i, old)
			if !stays(ctx, err) {
				return "", err
			}
			c.warn("the old certificate stays in the token until the next renewal: %v", err)
		}
		c.forgetOldest()
		c.journal.Operation = nil // on the disk with the record of the attempt, which is saved next
		if op.Kind != KindRenew || c.cfg.Policy.RekeyEvery == 0 {
			c.journal.FailedRekey = nil
		}
		if retired > 0 {
			return fmt.Sprintf("removed %d certificates older than the previous one", retired), nil
		}
		return "nothing is old enough to go", nil
	})
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(op.Chain[0])
	if err != nil {
		return nil, fmt.Errorf("read the certificate of the journal: %w: %w", err, ErrState)
	}
	return &Result{Kind: op.Kind, Changed: true, Certificate: leaf, CertificateAddress: op.Certificates[0].Address, Key: op.Key.Address}, nil
}

// stays reports that the token does not let go of an object, for which no renewal
// waits: the next that is completed tries again.
func stays(ctx context.Context, err error) bool { return isEngineError(err) && !passes(ctx, err) }

// forgetOldest makes room in the journal for the next pair, where the token has not
// let go of so many.
func (c *Credential) forgetOldest() {
	for len(c.journal.Pairs) >= maxPairs {
		last := len(c.journal.Pairs) - 1
		c.warn("there are %d pairs that the token keeps: %s is for a person to remove", len(c.journal.Pairs), c.journal.Pairs[last].Certificates[0])
		c.journal.Pairs = c.journal.Pairs[:last]
	}
}

// ownKey returns the key that goes with the pair, nil for one that was there before.
func (c credential) ownKey() engine.Address {
	if c.ExistingKey {
		return nil
	}
	return c.Key.Address
}

// removeCredential destroys certificates; trust anchors that nothing else wants, but
// for the operation that ends; and, when no kept certificate and no Security instance
// uses it, the key, unless that is nil.
func (c *Credential) removeCredential(ctx context.Context, certs []reference, key engine.Address, anchors []anchorReference, ends *operation) error {
	if len(certs) > 0 {
		if err := c.store.RemoveCertificates(ctx, addresses(certs)); err != nil {
			return err
		}
	}
	if err := c.removeAnchors(ctx, anchors, ends); err != nil {
		return err
	}
	if key == nil || slices.ContainsFunc(c.journal.Pairs, func(kept credential) bool { return kept.Key.Address == key }) {
		return nil
	}
	if used, err := c.usedElsewhere(ctx, key); used || err != nil {
		return err
	}
	if err := c.engine.RemoveKey(ctx, key); err != nil && !errors.Is(err, engine.ErrNotFound) {
		return err
	}
	return nil
}

// usedElsewhere reports whether a key is not this credential's alone, whatever made
// it, for credentials can share one: the configuration names it, for a factory
// credential or to be used as it is; a pair or an operation was given it; or another
// credential's pair or Security instance has it.
func (c *Credential) usedElsewhere(ctx context.Context, key engine.Address) (bool, error) {
	for _, r := range c.shared.journal.Credentials {
		for _, kept := range r.Pairs {
			if kept.Key.Address == key && (kept.ExistingKey || r != c.journal) {
				return true, nil
			}
		}
		if op := r.Operation; op != nil && op.ExistingKey && op.Key.Address == key {
			return true, nil
		}
	}
	for _, instance := range c.security.All() {
		cert, ok := instance.ClientCertificate.Engine()
		if at, hasKey := instance.PrivateKey.Engine(); hasKey && at == key && !(ok && c.journal.names(cert)) {
			return true, nil
		}
	}
	for _, one := range c.credentials {
		for _, at := range []engine.Address{one.cfg.IDevID.Key, one.cfg.Key} {
			if named, err := c.named(ctx, at, key); named || err != nil {
				return named, err
			}
		}
	}
	return false, nil
}

// discard removes what the operation created, ends it and returns the cause.
func (c *Credential) discard(ctx context.Context, cause error) error {
	op := c.journal.Operation
	if cause != nil {
		op.Reason = truncate(cause.Error(), maxRecorded)
	}
	again := op.Step == StepDiscard
	if err := c.advance(StepDiscard); err != nil {
		return errors.Join(cause, err)
	}
	// Ctrl-C does not stop the cleaning up: it is short, and asked for.
	ctx = context.WithoutCancel(ctx)
	certs, key := c.created(op)
	switch err := c.removeCredential(ctx, certs, key, op.Anchors, op); {
	case err == nil:
	case !again || !stays(ctx, err):
		return errors.Join(cause, &StepError{Step: StepDiscard, Err: err})
	case len(certs) > 0: // it goes as the oldest
		c.warn("what the %s created stays in the token until the next renewal: %v", op.Kind, err)
		c.journal.Pairs = append(c.journal.Pairs, op.credential())
		c.forgetOldest()
	default:
		c.warn("what the %s created stays in the token: it is for a person to remove: %v", op.Kind, err)
	}
	c.journal.Operation = nil
	return errors.Join(cause, c.save(), c.removeUnreferencedFiles())
}

// created is what of an operation is in the token, or about to be, and nobody else's.
func (c *Credential) created(op *operation) (certs []reference, key engine.Address) {
	if op.NewKey {
		key = op.Key.Address
	}
	if certs = op.Certificates; len(certs) > 0 && c.journal.has(certs[0].Address) {
		certs = nil // a kept pair's, which the server gave once more
	}
	return certs, key
}
