package estenroll

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
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
	RenewalLost       RenewalState = "lost"       // as expired: the device was enrolled, and has no pair that is in use
	RenewalUnfinished RenewalState = "unfinished" // an operation is gone on with at once
)

// Renewal is what the policy makes of the current certificate.
type Renewal struct {
	State RenewalState `json:"state"`
	// Due is when the policy wants the certificate to be renewed; zero where it is lost.
	Due time.Time `json:"due,omitzero"`
	// NextAttempt is when RenewDue does something again, if it is called.
	NextAttempt time.Time `json:"next_attempt"`

	isDue bool // that it is, whatever is waited for
}

// String says what is waited for.
func (r *Renewal) String() string {
	due := "there is no certificate to renew"
	if !r.Due.IsZero() {
		due = "the renewal is due at " + stamp(r.Due)
	}
	return fmt.Sprintf("%s: %s, the next attempt at %s", r.State, due, stamp(r.NextAttempt))
}

func (r *Renewal) waits() bool { return r.State == RenewalNotDue || r.State == RenewalWaits }

// RenewDue is what a device calls every few minutes or once a day: it renews the
// certificate, for the same key or with a new one, when the policy says that it is due,
// and tries again what failed when the policy says so. Between that it asks no server,
// changes nothing and returns a result without a Kind. What a killed run left, and a
// request whose pending time is over, it goes on with at once. A certificate that has
// expired is enrolled again with the IDevID, and so is one that the token has lost or
// that was given up for the IDevID; with NoFallback that is ErrExpired or
// ErrNotEnrolled, and so is a device that was never enrolled. Otherwise as Renew.
func (c *Credential) RenewDue(ctx context.Context) (*Result, error) {
	if err := c.checkUse(); err != nil {
		return nil, err
	}
	if err := c.restoreSecurity(ctx); err != nil {
		return nil, err
	}
	renewal, current, err := c.renewal(ctx)
	if begun := c.journal.Operation; err == nil && begun != nil && (renewal == nil || !renewal.waits()) {
		done, failure := c.Recover(ctx)
		if renewal != nil && renewal.isDue && c.cameToNothing(begun, failure) {
			return c.attempt(KindRenew, func() (*Result, error) { return c.renewInstead(ctx, false, failure) })
		}
		if failure != nil || done != nil {
			return done, failure
		}
		renewal, current, err = c.renewal(ctx) // it was given up
	}
	if err != nil {
		return nil, err
	}
	switch c.begins(renewal) {
	case "":
		c.say(StepPrepare, "%s", renewal)
		return current, nil
	case KindEnroll:
		return c.enrollAgain(ctx)
	}
	result, err := c.renew(ctx, byPolicy, false)
	if renewal != nil && !c.cfg.NoFallback && errors.Is(err, ErrNotEnrolled) {
		return c.enrollAgain(ctx) // the token has lost the key alone
	}
	return result, err
}

// enrollAgain is Enroll for a device that was enrolled, and says why where Enroll, for
// which it is as one that was not, does not.
func (c *Credential) enrollAgain(ctx context.Context) (*Result, error) {
	if _, enrolled := c.current(); !enrolled {
		c.warn("the server has refused the enrolled pairs, the device uses the IDevID: enrolling again with it")
	}
	return c.Enroll(ctx)
}

// begins returns the kind of the operation that RenewDue begins where none is to be
// gone on with, "" for none.
func (c *Credential) begins(renewal *Renewal) Kind {
	switch {
	case renewal == nil: // which is an error there
	case renewal.waits():
		return ""
	case c.cfg.NoFallback:
	case renewal.State == RenewalExpired, renewal.State == RenewalLost:
		return KindEnroll
	}
	return c.kindOfRenewal()
}

// kindOfRenewal is what the policy makes of the next renewal.
func (c *Credential) kindOfRenewal() Kind {
	kept, _ := c.current()
	return c.cfg.Policy.kind(kept.Renewals)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// renewal judges the current certificate by the policy and by the last attempt; nil
// if there was never one.
func (c *Credential) renewal(ctx context.Context) (*Renewal, *Result, error) {
	kept, enrolled := c.current()
	if c.forgotten || !enrolled && len(c.journal.Pairs) == 0 {
		return nil, nil, nil
	}
	now, err := c.verificationTime()
	if err != nil {
		return nil, nil, err
	}
	if enrolled {
		leaf, err := c.certificate(ctx, kept.Certificates[0].Address)
		if err == nil {
			current := &Result{Certificate: leaf, CertificateAddress: kept.Certificates[0].Address, Key: kept.Key.Address}
			return c.judge(c.schedule(ctx, leaf), now), current, nil
		}
		if !errors.Is(err, engine.ErrNotFound) {
			return nil, nil, err
		}
	}
	renewal, err := c.judgeLost(ctx, now)
	return renewal, new(Result), err
}

func (c *Credential) schedule(ctx context.Context, leaf *x509.Certificate) Schedule {
	return c.cfg.Policy.Schedule(leaf.NotBefore, leaf.NotAfter, c.identity(ctx, leaf))
}

// judgeLost judges a device that was enrolled and has no certificate to renew: it is
// enrolled again at once, and after that, whatever it came to, with such a pause as the
// newest of its certificates had that the token still has.
func (c *Credential) judgeLost(ctx context.Context, now time.Time) (*Renewal, error) {
	r := &Renewal{State: RenewalLost, NextAttempt: now.UTC()}
	last := c.lastAttempt(now)
	op := c.journal.Operation
	switch {
	case op != nil && !op.Tried:
		r.State = RenewalUnfinished
		return r, nil
	case last.IsZero():
		return r, nil
	case op == nil && (c.cfg.NoFallback || c.journal.LastAttempt.Kind != KindEnroll):
		return r, nil // without the way back there is no attempt, but an error that each run says
	}
	pause := Schedule{Interval: maxPause}
	for _, kept := range c.journal.Pairs {
		leaf, err := c.certificate(ctx, kept.Certificates[0].Address)
		if err == nil {
			pause = c.schedule(ctx, leaf)
			break
		}
		if !errors.Is(err, engine.ErrNotFound) {
			return nil, err
		}
	}
	if r.NextAttempt = pause.again(last).UTC(); now.Before(r.NextAttempt) {
		r.State = RenewalWaits
	}
	return r, nil
}

// judge compares a schedule with the time and with what was tried.
func (c *Credential) judge(schedule Schedule, now time.Time) *Renewal {
	last := c.lastAttempt(now)
	r := &Renewal{State: RenewalNotDue, Due: schedule.Due.UTC(), NextAttempt: schedule.Next(last).UTC(), isDue: !now.Before(schedule.Due)}
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
// which no renewal changes and no other device has. Where there is none that can be read, the
// issuer and the Subject of the current one: a renewal does not depend on it.
func (c *Credential) identity(ctx context.Context, leaf *x509.Certificate) []byte {
	if !c.withoutIDevID() {
		if idevid, err := c.certificate(ctx, c.cfg.IDevID.Certificate); err == nil {
			return idevid.Raw
		}
	}
	return slices.Concat(leaf.RawIssuer, leaf.RawSubject)
}
