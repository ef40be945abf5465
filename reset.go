package estenroll

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"estenroll/engine"
	"estenroll/internal/durable"
	"estenroll/lwm2m"
)

// ResetPlan is what a Reset destroys for ever.
type ResetPlan struct {
	// Keys that were generated for the credential and that nothing else uses.
	Keys []engine.Address
	// Certificates of its keys, and Chain, those below which they were issued: of
	// these go the ones that this program stored and no other certificate needs.
	Certificates, Chain []engine.Address
	// Anchors are trust anchors that were stored for it and for no other credential.
	Anchors []engine.Address
}

// IsEmpty reports whether nothing is destroyed.
func (p *ResetPlan) IsEmpty() bool { return len(p.Keys)+len(p.Certificates)+len(p.Anchors) == 0 }

// PlanReset says what Reset would destroy, when nothing stands against it. It
// changes nothing. ErrWrongToken, ErrIDevID, ErrState.
func (c *Credential) PlanReset(ctx context.Context) (*ResetPlan, error) {
	if err := c.checkReset(ctx); err != nil {
		return nil, err
	}
	plan := new(ResetPlan)
	add := func(list *[]engine.Address, at engine.Address) {
		if at != nil && !slices.Contains(*list, at) {
			*list = append(*list, at)
		}
	}
	pairs := c.journal.Pairs
	var keys []engine.Address
	if op := c.journal.Operation; op != nil {
		pairs = append([]credential{op.credential()}, pairs...)
		if op.NewKey && !op.keyToCome() {
			add(&keys, op.Key.Address)
		}
	}
	for _, kept := range c.journal.Pairs {
		add(&keys, kept.ownKey())
	}
	for _, key := range keys {
		used, err := c.usedElsewhere(ctx, key)
		if err != nil {
			return nil, err
		}
		if !used {
			add(&plan.Keys, key)
		}
	}
	for _, kept := range pairs {
		for i, at := range kept.Certificates {
			if i == 0 {
				add(&plan.Certificates, at.Address)
			} else {
				add(&plan.Chain, at.Address)
			}
		}
		for _, anchor := range kept.Anchors {
			if !c.anchorWanted(anchor.Address.Address, nil, c.journal) {
				add(&plan.Anchors, anchor.Address.Address)
			}
		}
	}
	return plan, nil
}

// Reset brings a credential back to its factory state: the Security object points
// at the IDevID again, and what was generated, stored and written for it goes. A
// Reset that was begun is gone on with by the next run. The errors of PlanReset
// come before anything is changed.
func (c *Credential) Reset(ctx context.Context) error {
	if err := c.checkReset(ctx); err != nil {
		return err
	}
	op := c.journal.Operation
	if op == nil {
		op = &operation{StartedAt: c.cfg.Now()}
	}
	// What an unfinished operation has created so far, it goes on naming.
	op.Kind, op.Step = KindReset, StepReset
	c.journal.Operation = op
	if err := c.save(); err != nil {
		return err
	}
	return c.reset(ctx)
}

// checkReset refuses a reset that would destroy on the wrong token, leave the
// Security object without a credential, or forget one that the journal does not name.
func (c *Credential) checkReset(ctx context.Context) error {
	if op := c.journal.Operation; op != nil && op.Kind == KindReset {
		return nil // what is missing by now, it has destroyed itself
	}
	instance, exists := c.instance()
	if exists && !c.forgotten {
		at, ok := instance.ClientCertificate.Engine()
		if ok && !c.isIDevID(at) && !c.isOurs(at) {
			return fmt.Errorf("the Security object points at %s, which the journal does not name: %w", at, ErrState)
		}
	}
	if err := c.checkToken(ctx); err != nil {
		return err
	}
	if exists && !c.forgotten {
		_, err := c.openIDevID(ctx)
		return err
	}
	return nil
}

// checkToken wants something of what the journal names in the token: where
// nothing is, it is another token, and the right one keeps what would be forgotten.
func (c *Credential) checkToken(ctx context.Context) error {
	for _, kept := range c.journal.Pairs {
		_, err := c.engine.Signer(ctx, kept.Key.Address)
		if errors.Is(err, engine.ErrNotFound) {
			_, err = c.store.Certificate(ctx, kept.Certificates[0].Address)
		}
		if !errors.Is(err, engine.ErrNotFound) {
			return err
		}
	}
	if len(c.journal.Pairs) > 0 {
		return fmt.Errorf("look for %s, %w: %w", c.journal.Pairs[0].Key, engine.ErrNotFound, ErrWrongToken)
	}
	return nil
}

// reset does what Reset has written down. Each part of it may have been done.
func (c *Credential) reset(ctx context.Context) error {
	return c.timed(StepReset, func() (string, error) {
		if err := c.resetSecurity(ctx); err != nil {
			return "", err
		}
		op := c.journal.Operation
		var key engine.Address
		if op.NewKey {
			key = op.Key.Address
		}
		if err := c.removeCredential(ctx, op.Certificates, key, op.Anchors, op); err != nil {
			return "", err
		}
		for len(c.journal.Pairs) > 0 {
			if err := ctx.Err(); err != nil {
				return "", err
			}
			last := len(c.journal.Pairs) - 1
			old := c.journal.Pairs[last]
			c.journal.Pairs = c.journal.Pairs[:last]
			if err := c.removeCredential(ctx, old.Certificates, old.ownKey(), old.Anchors, op); err != nil {
				c.journal.Pairs = append(c.journal.Pairs, old)
				return "", err
			}
			if err := c.save(); err != nil {
				return "", err
			}
		}
		op.ExplicitTA = ""
		if err := c.removeUnreferencedFiles(); err != nil {
			return "", err
		}
		*c.journal = record{}
		return "it is as it left the factory", c.saveOrRemove()
	})
}

// resetSecurity makes the Security object point at the IDevID where it points at
// a pair of this credential. An instance that is not configured goes with its pair.
func (c *Credential) resetSecurity(ctx context.Context) error {
	next, changed, configured := new(lwm2m.SecurityObject), false, false
	for id, instance := range c.security.All() {
		at, ok := instance.ClientCertificate.Engine()
		switch own := ok && c.journal.names(at); {
		case own && !c.forgotten && id == c.cfg.Security.Instance:
			changed, configured = true, true
			// As before the first boot: the server has not been met.
			instance.ServerPublicKey, instance.CertificateUsage = nil, nil
		case own:
			changed = true
			continue
		}
		next.Set(id, instance)
	}
	switch {
	case configured && c.withoutIDevID():
		next.Delete(c.cfg.Security.Instance)
	case configured:
		if _, err := c.openIDevID(ctx); err != nil {
			return err
		}
		next = c.securityWith(next, c.cfg.IDevID.Key, c.cfg.IDevID.Certificate, nil)
	}
	if !changed {
		return nil
	}
	return c.saveSecurity(next)
}

// saveOrRemove saves the journal; one that remembers no credential is none.
func (d *shared) saveOrRemove() error {
	for _, r := range d.journal.Credentials {
		if !r.isEmpty() {
			return d.save()
		}
	}
	*d.journal = journal{Version: journalVersion, Credentials: d.journal.Credentials}
	if err := durable.Remove(filepath.Join(d.cfg.StateDir, journalName)); err != nil {
		return fmt.Errorf("remove journal: %w", err)
	}
	return nil
}
