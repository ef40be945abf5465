package estenroll

import (
	"context"
	"crypto/x509"

	"estenroll/engine"
)

// Public is what of an enrolled credential is public, for other programs: where
// its key and its certificates are, and the certificates themselves.
type Public struct {
	Key engine.Address
	// Certificates are the addresses of the chain, Chain is the chain: leaf first.
	Certificates []engine.Address
	Chain        []*x509.Certificate
	// TrustAnchors judge the EST server: the Explicit TA, or the Implicit TA where
	// there is none.
	TrustAnchors []*x509.Certificate
}

// Public returns the enrolled credential that the Security object points at,
// whole and a pair, expired or not. It changes nothing. ErrNotEnrolled,
// engine.ErrNotFound, ErrState.
func (c *Credential) Public(ctx context.Context) (*Public, error) {
	kept, enrolled := c.current()
	if !enrolled {
		return nil, ErrNotEnrolled
	}
	p, err := c.openCredential(ctx, kept)
	if err != nil {
		return nil, err
	}
	trust, err := c.judges(p)
	if err != nil {
		return nil, err
	}
	return &Public{Key: p.key, Certificates: addresses(kept.Certificates), Chain: p.chain, TrustAnchors: trust.Certificates()}, nil
}
