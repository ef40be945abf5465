package estenroll

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"

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
		for len(c.journal.Pairs) > 1+keepPrevious {
			last := len(c.journal.Pairs) - 1
			old := c.journal.Pairs[last]
			c.journal.Pairs = c.journal.Pairs[:last]
			if err := c.removeCredential(ctx, old.Certificates, old.ownKey()); err != nil {
				// The record of the attempt is saved next: it must not forget this one.
				c.journal.Pairs = append(c.journal.Pairs, old)
				return "", err
			}
			retired++
		}
		c.journal.Operation = nil // on the disk with the record of the attempt, which is saved next
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

// ownKey returns the key that goes with the pair, nil for one that was there before.
func (c credential) ownKey() engine.Address {
	if c.ExistingKey {
		return nil
	}
	return c.Key.Address
}

// removeCredential destroys certificates and, when no kept certificate and no
// Security instance uses it, their key, unless that is nil.
func (c *Credential) removeCredential(ctx context.Context, certs []reference, key engine.Address) error {
	if len(certs) > 0 {
		if err := c.store.RemoveCertificates(ctx, addresses(certs)); err != nil {
			return err
		}
	}
	if key == nil || c.keyInUse(key) {
		return nil
	}
	if err := c.engine.RemoveKey(ctx, key); err != nil && !errors.Is(err, engine.ErrNotFound) {
		return err
	}
	return nil
}

// keyInUse reports whether a factory credential, a pair that is kept, a Security
// instance or an operation that did not make it has the key: of whatever name,
// since names can share a key.
func (d *shared) keyInUse(key engine.Address) bool {
	for _, c := range d.credentials {
		if key == c.cfg.IDevID.Key {
			return true
		}
	}
	for _, r := range d.journal.Credentials {
		for _, c := range r.Pairs {
			if c.Key.Address == key {
				return true
			}
		}
		if op := r.Operation; op != nil && op.ExistingKey && op.Key.Address == key {
			return true
		}
	}
	for _, instance := range d.security.All() {
		if at, ok := instance.PrivateKey.Engine(); ok && at == key {
			return true
		}
	}
	return false
}

// discard removes what the operation created, ends it and returns the cause.
func (c *Credential) discard(ctx context.Context, cause error) error {
	op := c.journal.Operation
	if cause != nil {
		op.Reason = truncate(cause.Error(), maxRecorded)
	}
	if err := c.advance(StepDiscard); err != nil {
		return errors.Join(cause, err)
	}
	// Ctrl-C does not stop the cleaning up: it is short, and asked for.
	ctx = context.WithoutCancel(ctx)
	key := engine.Address(nil)
	if op.NewKey {
		key = op.Key.Address
	}
	if err := c.removeCredential(ctx, op.Certificates, key); err != nil {
		return errors.Join(cause, &StepError{Step: StepDiscard, Err: err})
	}
	c.journal.Operation = nil
	return errors.Join(cause, c.save(), c.removeUnreferencedFiles())
}
