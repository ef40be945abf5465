package estenroll

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"time"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
)

// Plan is what a run would do to a credential.
type Plan struct {
	// Acts says that a run now would do it; one that does not would do it at At.
	Acts bool      `json:"now"`
	At   time.Time `json:"at"`
	// Kind of the operation.
	Kind Kind `json:"kind"`
	// Step that an operation which was begun is gone on with at; empty for one that
	// is yet to begin.
	Step Step `json:"step,omitempty"`
	// NewKey is the type of the key that is generated for it, empty where none is.
	NewKey engine.Algorithm `json:"new_key,omitempty"`
	// ServerMade says that the server makes it.
	ServerMade bool `json:"server_made,omitempty"`
	// Wants is what the server wants of the request (CSR attributes), as DryRun has
	// learned it, a few words each; nil where it is not known.
	Wants []string `json:"wants,omitzero"`
}

// PlanRenewDue says what RenewDue would do. It asks no server and changes nothing.
// The errors are RenewDue's of before an operation begins.
func (c *Credential) PlanRenewDue(ctx context.Context) (*Plan, error) {
	return c.plan(ctx, func(renewal *Renewal) Kind { return c.begins(renewal) })
}

// PlanRenew is PlanRenewDue for Renew.
func (c *Credential) PlanRenew(ctx context.Context) (*Plan, error) {
	return c.plan(ctx, func(*Renewal) Kind { return c.kindOfRenewal() })
}

// PlanRekey is PlanRenewDue for Rekey.
func (c *Credential) PlanRekey(ctx context.Context) (*Plan, error) {
	if err := c.checkRekey(); err != nil {
		return nil, err
	}
	return c.plan(ctx, func(*Renewal) Kind { return KindRekey })
}

// PlanEnroll is PlanRenewDue for Enroll: nil where there is nothing to do, now or later.
func (c *Credential) PlanEnroll(ctx context.Context) (*Plan, error) {
	if op := c.journal.Operation; op == nil {
		if usable, err := c.usable(ctx); err != nil || usable != nil {
			return nil, err
		}
	}
	return c.plan(ctx, func(*Renewal) Kind { return KindEnroll })
}

// plan is the decision of a run, which begins the kind of operation that is chosen
// where there is none to go on with, "" for none now.
func (c *Credential) plan(ctx context.Context, begins func(*Renewal) Kind) (*Plan, error) {
	if err := c.checkUse(); err != nil {
		return nil, err
	}
	restore, err := c.assumeRestored(ctx)
	if err != nil {
		return nil, err
	}
	defer restore()
	op := c.journal.Operation
	if op != nil {
		why, err := c.hopeless(ctx, op)
		if err != nil {
			return nil, &StepError{Step: op.Step, Err: err}
		}
		if why != "" {
			c.warn("the interrupted %s would be given up, and what it created removed: %s", op.Kind, why)
			c.journal.Operation = nil
			defer func(given *operation) { c.journal.Operation = given }(op)
			op = nil
		}
	}
	renewal, current, err := c.renewal(ctx)
	if err != nil {
		return nil, err
	}
	now := c.cfg.Now().UTC()
	kind := begins(renewal)
	if op != nil {
		return c.planToGoOn(op, kind != "", now, renewal), nil
	}
	p := &Plan{Acts: kind != "", At: now, Kind: kind}
	if kind == "" {
		verification, err := c.verificationTime()
		if err != nil {
			return nil, err
		}
		then := &Renewal{State: RenewalDue}
		switch {
		case current.Certificate == nil:
			then.State = RenewalLost
		case verification.After(current.Certificate.NotAfter):
			then.State = RenewalExpired
		}
		p.At, p.Kind = renewal.NextAttempt, c.begins(then)
	}
	if err := c.checkSecurity(); err != nil {
		return nil, &StepError{Step: StepPrepare, Err: err}
	}
	if p.Kind == KindRekey || p.Kind == KindEnroll && c.cfg.Key == nil {
		p.NewKey, p.ServerMade = c.keyType(), c.cfg.ServerKeyGen
	}
	if _, err := c.authenticates(ctx, p); err != nil {
		return nil, &StepError{Step: StepPrepare, Err: err}
	}
	return p, nil
}

// planToGoOn is the plan where an operation was begun, and a run now goes on with it or
// waits. A pending answer is waited for by every run.
func (c *Credential) planToGoOn(op *operation, acts bool, now time.Time, renewal *Renewal) *Plan {
	p := &Plan{Acts: acts, At: now, Kind: op.Kind, Step: op.Step}
	if op.Step == StepGenerate {
		p.NewKey, p.ServerMade = op.keyType(), op.ServerMade
	}
	switch pending := c.pending(op); {
	case op.Step == StepRequest && pending != nil:
		p.Acts, p.At = false, pending.NotBefore.UTC()
	case !acts:
		p.At = renewal.NextAttempt
	}
	return p
}

// assumeRestored makes the Security object what restoreSecurity would make it, for a
// look at what follows and not on the disk; the function takes it back.
func (c *Credential) assumeRestored(ctx context.Context) (func(), error) {
	before := c.security
	restored, err := c.restored(ctx)
	if err != nil {
		return nil, err
	}
	if restored != nil {
		c.security = restored
	}
	return func() { c.security = before }, nil
}

// DryRun does for a plan what the run would do before it asks for a certificate, and
// changes nothing: it opens the pair that authenticates the request, has the server
// answer crts and judges it by them, asks what it wants of the request, which it adds to
// the plan, and has the token sign the CSR where its key is there already, or say whether
// it takes in the one that the server makes. The errors are those of the run: a
// *PendingError too, where the server has not decided and the time to ask again has not
// come.
func (c *Credential) DryRun(ctx context.Context, p *Plan) error {
	restore, err := c.assumeRestored(ctx)
	if err != nil {
		return err
	}
	defer restore()
	op := c.journal.Operation
	if p.Step == "" {
		op = nil
	}
	if p.Kind == KindReset {
		return nil // no server's matter
	}
	auth, err := c.authenticates(ctx, p)
	if err != nil {
		return &StepError{Step: StepPrepare, Err: err}
	}
	if p.ServerMade { // of the type that is configured: the server may want another one
		if err := c.checkImport(ctx, p.NewKey); err != nil {
			return &StepError{Step: StepGenerate, Err: err}
		}
	}
	if p.ServerMade || op != nil && op.asksForKey() {
		if _, err := c.decryptionKey(ctx); err != nil {
			return &StepError{Step: StepGenerate, Err: err}
		}
	}
	err = c.timed(StepRequest, func() (string, error) {
		at, err := c.rehearsedKey(ctx, p, op, auth)
		if err == nil && at != nil {
			err = c.checkPadding(ctx, at, c.cfg.Request.PSS)
		}
		if err != nil {
			return "", err
		}
		_, err = retry(ctx, c, func() (struct{}, error) { return struct{}{}, c.rehearse(ctx, p, op, auth, at) })
		return fmt.Sprintf("%s answers %s, and is the server that it should be", c.cfg.ServerURI, c.showing(auth)), err
	})
	if err != nil || op == nil || op.Step != StepRequest {
		return err
	}
	if pending := c.pending(op); pending != nil {
		return pending
	}
	return nil
}

// authenticates opens the pair that authenticates what is planned.
func (c *Credential) authenticates(ctx context.Context, p *Plan) (*pair, error) {
	if p.Kind == KindEnroll {
		return c.openIDevID(ctx)
	}
	kept, enrolled := c.current()
	if !enrolled {
		return nil, ErrNotEnrolled
	}
	current, err := c.openCredential(ctx, kept)
	if errors.Is(err, engine.ErrNotFound) {
		return nil, fmt.Errorf("%w: %w", ErrNotEnrolled, err)
	}
	if err != nil {
		return nil, err
	}
	now, err := c.verificationTime()
	if err != nil {
		return nil, err
	}
	if end := current.chain[0].NotAfter; now.After(end) {
		return nil, fmt.Errorf("valid until %s: %w", stamp(end), ErrExpired)
	}
	return current, nil
}

// rehearsedKey is the key that a certificate is asked for: nil where that is yet to be
// generated, or there is no request to send.
func (c *Credential) rehearsedKey(ctx context.Context, p *Plan, op *operation, auth *pair) (engine.Address, error) {
	switch {
	case p.NewKey != "", op != nil && (op.Step != StepRequest || op.asksForKey()):
		return nil, nil
	case op != nil:
		return op.Key.Address, nil
	case p.Kind == KindEnroll:
		return c.existingKey(ctx)
	}
	return auth.key, nil
}

// rehearse is an exchange that ends before sen or sren.
func (c *Credential) rehearse(ctx context.Context, p *Plan, op *operation, auth *pair, at engine.Address) error {
	defer c.asksAnew()()
	session, err := c.dial(ctx, auth)
	if err != nil {
		return err
	}
	defer c.closeSession(session)
	var key crypto.PublicKey
	if at != nil {
		signer, err := c.signer(ctx, at)
		if err != nil {
			return err
		}
		key = signer.Public()
	}
	anchors, _, err := c.meet(ctx, session, auth, key)
	if err != nil || op != nil && op.Step != StepRequest && op.Step != StepGenerate {
		return err
	}
	wanted, err := c.rehearseAttributes(ctx, p, op, session, anchors, key)
	if err != nil {
		return err
	}
	template, err := c.template(p.Kind, auth, wanted)
	if err != nil {
		return &est.ResponseError{Operation: est.CSRAttrs, Err: err}
	}
	if c.links(wanted) {
		if template.ChallengePassword, err = c.link(session); err != nil {
			return err
		}
	}
	if at == nil || p.NewKey != "" {
		return nil
	}
	_, err = c.signCSR(ctx, at, template, wanted)
	return err
}

// rehearseAttributes adds to the plan what the server wants, or has said that it
// wants, and the key that is generated because of that.
func (c *Credential) rehearseAttributes(ctx context.Context, p *Plan, op *operation, session est.Session, anchors *est.TrustAnchors, key crypto.PublicKey) (csr.Wanted, error) {
	wanted, err := c.wanted(op)
	if err == nil && c.asksAttributes(op) {
		_, wanted, err = c.wishes(ctx, session, anchors)
	}
	if err != nil || c.cfg.IgnoreAttributes {
		return wanted, err
	}
	p.Wants = append([]string{}, wanted.Describe()...)
	if key != nil {
		err = c.checkWantedKey(p.Kind, op != nil && op.NewKey, wanted, engine.AlgorithmOf(key))
	}
	if p.NewKey != "" || errors.Is(err, errAnotherKey) {
		p.NewKey, err = c.keyTypeFor(wanted)
	}
	if err == nil && p.ServerMade {
		err = c.checkImport(ctx, p.NewKey)
	}
	return wanted, err
}

// asksAnew has the server asked for crts whenever it was last, for a look at it. The
// function takes that back, and the trust anchors that came of it.
func (c *Credential) asksAnew() func() {
	asked, explicit, name, caughtUp := c.journal.CACertsAt, c.explicitTA, c.explicitName, c.caughtUp
	c.journal.CACertsAt = time.Time{}
	return func() {
		c.journal.CACertsAt, c.explicitTA, c.explicitName, c.caughtUp = asked, explicit, name, caughtUp
	}
}
