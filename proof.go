package estenroll

import (
	"context"
	"errors"
	"fmt"

	"estenroll/engine"
	"estenroll/est"
)

// verdict is the result of a proof.
type verdict string

const (
	accepted  verdict = "accepted"
	undecided verdict = "undecided" // unreachable, or not yet valid there
	refused   verdict = "refused"
)

// prove shows the new pair to the server it is for, on a new connection, and
// decides by the three results of DESIGN.md §7 rule 3.
func (c *Credential) prove(ctx context.Context) error {
	op := c.journal.Operation
	fresh, err := c.openCredential(ctx, op.credential())
	if err != nil {
		return &StepError{Step: StepProve, Err: err}
	}
	if c.anotherServer(op) {
		c.warn("the new certificate is of %s: it is proven to %s", op.Server, c.cfg.ServerURI)
	}
	var why error
	var got verdict
	err = c.timed(StepProve, func() (string, error) {
		if got, why = c.show(ctx, fresh); got != accepted {
			return "", why
		}
		return fmt.Sprintf("%s accepts the new certificate", c.cfg.ServerURI), c.advance(StepCommit)
	})
	if got == accepted {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if isEngineError(why) {
		return &StepError{Step: StepProve, Err: why}
	}
	if got == undecided {
		return &StepError{Step: StepProve, Err: fmt.Errorf("%w: %w", ErrUnproven, why)}
	}
	return c.newPairRefused(ctx, why)
}

// newPairRefused asks whether the server refuses the new pair or everything:
// the new one is removed only if the old one is accepted.
func (c *Credential) newPairRefused(ctx context.Context, why error) error {
	op := c.journal.Operation
	old, err := c.authenticator(ctx)
	if errors.Is(err, ErrNotEnrolled) {
		// Killed inside fallBack, between its two writes.
		return c.endFallBack(fmt.Errorf("%w: %w", ErrRefused, why))
	}
	cause := &StepError{Step: StepProve, Err: fmt.Errorf("%w: %w", ErrRefused, why)}
	if err != nil {
		unproven := &StepError{Step: StepProve, Err: fmt.Errorf("%w: %w; then %w", ErrUnproven, why, err)}
		if !errors.Is(err, engine.ErrNotFound) || op.Kind == KindEnroll || c.cfg.NoFallback {
			return unproven
		}
		return c.fallBack(ctx, cause, unproven) // the token has lost the old one: nobody accepts it
	}
	if old.leaf() == nil && !c.byPSK(old) {
		// There is no other pair to be accepted: until it expires, or the operator
		// cancels, this one may be.
		return &StepError{Step: StepProve, Err: fmt.Errorf("%w: %w", ErrUnproven, why)}
	}
	verdictOnOld, whyOld := c.show(ctx, old)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if verdictOnOld == accepted {
		c.say(StepProve, "the server accepts %s: the new one is removed", c.showing(old))
		return c.discard(ctx, cause)
	}
	unproven := &StepError{Step: StepProve, Err: fmt.Errorf("%w: %w; %s is %s too: %w", ErrUnproven, why, c.showing(old), verdictOnOld, whyOld)}
	if verdictOnOld == undecided || op.Kind == KindEnroll || c.cfg.NoFallback {
		return unproven
	}
	return c.fallBack(ctx, cause, unproven)
}

// fallBack points the Security object at the IDevID when the server refuses
// both enrolled pairs, or the one that the token still has, and accepts it. Both are kept: the next Enroll begins anew.
// Without an IDevID there is nothing that the Security object could point at instead,
// even if a pre-shared key is accepted.
func (c *Credential) fallBack(ctx context.Context, cause, unproven error) error {
	if c.withoutIDevID() {
		return unproven
	}
	idevid, err := c.openIDevID(ctx)
	if err != nil {
		return errors.Join(unproven, err)
	}
	if got, _ := c.show(ctx, idevid); got != accepted {
		return unproven
	}
	if err := c.pointSecurityAt(c.cfg.IDevID.Key, c.cfg.IDevID.Certificate, nil); err != nil {
		return errors.Join(cause, err)
	}
	return c.endFallBack(cause)
}

func (c *Credential) endFallBack(cause error) error {
	c.adopt(c.journal.Operation.credential())
	c.journal.Operation = nil
	c.warn("the server accepts neither the new nor the current certificate, but the IDevID: the Security object points at the IDevID again")
	return errors.Join(cause, c.save())
}

// show is one proof: the server asked for a certificate, ours was sent in a full
// handshake, and one response was read afterwards.
func (c *Credential) show(ctx context.Context, p *pair) (verdict, error) {
	_, err := retry(ctx, c, func() (struct{}, error) {
		session, err := c.open(ctx, p)
		if err != nil {
			return struct{}{}, err
		}
		defer c.closeSession(session)
		trust, err := c.judges(p)
		if err != nil {
			return struct{}{}, err
		}
		carrier, err := carrying(ctx, session, est.CACerts, trust)
		if err != nil {
			return struct{}{}, err
		}
		if asked, ok := carrier.(est.ClientAuthenticator); !ok || !asked.ClientAuthenticated() {
			return struct{}{}, errors.New("the server did not ask for our certificate: its answer proves nothing")
		}
		_, err = carrier.RoundTrip(ctx, &est.Request{Operation: est.CACerts})
		return struct{}{}, err
	})
	var status *est.StatusError
	switch {
	case err == nil:
		return accepted, nil
	case errors.Is(err, est.ErrCredentialRefused), errors.Is(err, est.ErrKeyUnsuitable), errors.As(err, &status) && status.Class == 4:
		// 4.03 as well: whether it is this pair that is refused, the other shows.
		return refused, err
	}
	return undecided, err
}
