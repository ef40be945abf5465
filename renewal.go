package estenroll

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"estenroll/engine"
)

// RenewalState is why a renewal is made in a run now, or not.
type RenewalState string

// The states of a renewal.
const (
	RenewalNotDue     RenewalState = "not due"    // by the policy
	RenewalWaits      RenewalState = "waiting"    // it is due, and so is not the next attempt
	RenewalDue        RenewalState = "due"        // and so is an attempt
	RenewalExpired    RenewalState = "expired"    // as due, and only an enrolment helps
	RenewalUnfinished RenewalState = "unfinished" // an operation is gone on with at once
)

// Renewal is what the policy makes of the current certificate.
type Renewal struct {
	State RenewalState `json:"state"`
	// Due is when the policy wants the certificate to be renewed.
	Due time.Time `json:"due"`
	// NextAttempt is when RenewDue does something again, if it is called.
	NextAttempt time.Time `json:"next_attempt"`
}

func (r *Renewal) waits() bool { return r.State == RenewalNotDue || r.State == RenewalWaits }

// RenewDue is what a device calls every few minutes or once a day: it renews the
// certificate, with the same key, when the policy says that it is due, and tries
// again what failed when the policy says so. Between that it asks no server, changes
// nothing and returns a result without a Kind. What a killed run left, and a request
// whose pending time is over, it goes on with at once. A certificate that has
// expired is enrolled again with the IDevID, unless NoFallback is set: ErrExpired.
// Otherwise as Renew.
func (c *Credential) RenewDue(ctx context.Context) (*Result, error) {
	if err := c.checkUse(); err != nil {
		return nil, err
	}
	if err := c.restoreSecurity(ctx); err != nil {
		return nil, err
	}
	renewal, current, err := c.renewal(ctx)
	if err == nil && c.journal.Operation != nil && (renewal == nil || !renewal.waits()) {
		if done, err := c.Recover(ctx); err != nil || done != nil {
			return done, err
		}
		renewal, current, err = c.renewal(ctx) // it was given up
	}
	if err != nil {
		return nil, err
	}
	switch c.begins(renewal) {
	case "":
		c.say(StepPrepare, "%s: the renewal is due at %s, the next attempt at %s", renewal.State, stamp(renewal.Due), stamp(renewal.NextAttempt))
		return current, nil
	case KindEnroll:
		return c.Enroll(ctx)
	}
	return c.renew(ctx, KindRenew, false)
}

// begins returns the kind of the operation that RenewDue begins where none is to be
// gone on with, "" for none.
func (c *Credential) begins(renewal *Renewal) Kind {
	switch {
	case renewal == nil: // which is an error there
	case renewal.waits():
		return ""
	case renewal.State == RenewalExpired && !c.cfg.NoFallback:
		return KindEnroll
	}
	return KindRenew
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// renewal judges the current certificate by the policy and by the last attempt; nil
// if there is none, or the token has lost it.
func (c *Credential) renewal(ctx context.Context) (*Renewal, *Result, error) {
	kept, enrolled := c.current()
	if !enrolled || c.forgotten {
		return nil, nil, nil
	}
	leaf, err := c.certificate(ctx, kept.Certificates[0].Address)
	if errors.Is(err, engine.ErrNotFound) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	now, err := c.verificationTime()
	if err != nil {
		return nil, nil, err
	}
	schedule := c.cfg.Policy.Schedule(leaf.NotBefore, leaf.NotAfter, c.identity(ctx, leaf))
	current := &Result{Certificate: leaf, CertificateAddress: kept.Certificates[0].Address, Key: kept.Key.Address}
	return c.judge(schedule, now), current, nil
}

// judge compares a schedule with the time and with what was tried.
func (c *Credential) judge(schedule Schedule, now time.Time) *Renewal {
	last := c.lastAttempt(now)
	r := &Renewal{State: RenewalNotDue, Due: schedule.Due.UTC(), NextAttempt: schedule.Next(last).UTC()}
	if !last.IsZero() && c.journal.LastAttempt.Result == attemptDone {
		// It got this certificate, and is no attempt to replace it; but one that was due
		// when it was issued is not replaced in each run.
		r.NextAttempt = schedule.First.UTC()
		if !last.Before(schedule.First) {
			r.NextAttempt = earlier(schedule.Next(last), schedule.expired()).UTC()
		}
	}
	switch op := c.journal.Operation; {
	case op != nil && !op.Tried:
		r.State, r.NextAttempt = RenewalUnfinished, now.UTC()
		return r
	case op != nil && last.Before(schedule.First):
		// Begun before it was due, by a person perhaps: it is not left for months.
		r.NextAttempt = schedule.again(last).UTC()
	}
	switch {
	case now.Before(r.NextAttempt) && now.Before(schedule.First) && c.journal.Operation == nil:
	case now.Before(r.NextAttempt):
		r.State = RenewalWaits
	case !now.Before(schedule.expired()):
		r.State = RenewalExpired
	default:
		r.State = RenewalDue
	}
	return r
}

// lastAttempt is when the last attempt began, on the time line of the verification
// time, which can be ahead of the system clock; zero if there was none. One that
// lies in the future was recorded by a clock that has been set back since: it says
// nothing, and were it believed, the device would wait for that time.
func (c *Credential) lastAttempt(now time.Time) time.Time {
	system := c.cfg.Now()
	if c.journal.LastAttempt == nil || c.journal.LastAttempt.Time.After(system) {
		return time.Time{}
	}
	return c.journal.LastAttempt.Time.Add(now.Sub(system))
}

// identity is what the jitter of the device is made of: the factory certificate,
// which no renewal changes and no other device has. Where that cannot be read, the
// issuer and the Subject of the current one: a renewal does not depend on it.
func (c *Credential) identity(ctx context.Context, leaf *x509.Certificate) []byte {
	if idevid, err := c.certificate(ctx, c.cfg.IDevID.Certificate); err == nil {
		return idevid.Raw
	}
	return slices.Concat(leaf.RawIssuer, leaf.RawSubject)
}
