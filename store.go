package estenroll

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"estenroll/engine"
)

func (op *operation) chain() ([]*x509.Certificate, error) {
	chain := make([]*x509.Certificate, len(op.Chain))
	for i, der := range op.Chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read the certificate of the journal: %w: %w", err, ErrState)
		}
		chain[i] = cert
	}
	return chain, nil
}

func (op *operation) credential() credential {
	return credential{Key: op.Key, Certificates: op.Certificates, ExplicitTA: op.ExplicitTA, Anchors: op.Anchors, ExistingKey: op.ExistingKey, ServerMade: op.ServerMade, Renewals: op.Renewals}
}

func addresses(refs []reference) []engine.Address {
	out := make([]engine.Address, len(refs))
	for i, r := range refs {
		out[i] = r.Address
	}
	return out
}

func (c *Credential) storeCertificates(ctx context.Context) error {
	op := c.journal.Operation
	err := c.timed(StepStore, func() (string, error) {
		chain, err := op.chain()
		if err != nil {
			return "", err
		}
		err = c.store.StoreCertificates(ctx, addresses(op.Certificates), chain)
		if errors.Is(err, engine.ErrTokenFull) && c.makeRoom(ctx) {
			err = c.store.StoreCertificates(ctx, addresses(op.Certificates), chain)
		}
		if err != nil {
			return "", err
		}
		if err := c.storeAnchors(ctx); err != nil {
			return "", err
		}
		return fmt.Sprintf("stored the certificate and its chain (%d) in the token: %s", len(chain)-1, op.Certificates[0]), c.advance(StepProve)
	})
	return c.giveUpRekey(ctx, err)
}

// commit makes the Security object point at the new pair.
func (c *Credential) commit() error {
	op := c.journal.Operation
	return c.timed(StepCommit, func() (string, error) {
		if err := c.pointSecurityAt(op.Key.Address, op.Certificates[0].Address, op.ServerCertificate); err != nil {
			return "", err
		}
		c.adopt(op.credential())
		return fmt.Sprintf("security instance /0/%d points at the new pair", c.cfg.Security.Instance), c.advance(StepRetire)
	})
}

// adopt puts a credential at the head of the list, once: what is last goes first.
func (c *Credential) adopt(kept credential) {
	others := slices.DeleteFunc(c.journal.Pairs, func(known credential) bool { return known.sameLeaf(kept.Certificates[0].Address) })
	c.journal.Pairs = append([]credential{kept}, others...)
}
