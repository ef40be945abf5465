package estenroll

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"estenroll/engine"
)

// Result is what a run reached.
type Result struct {
	// Kind of the operation that was completed; empty if there was none.
	Kind Kind
	// Changed says that the Security object points at another certificate now.
	Changed bool
	// Recovered says that the operation was begun by an earlier run.
	Recovered bool
	// Certificate that is current, where it is and where its key is.
	Certificate        *x509.Certificate
	CertificateAddress engine.Address
	Key                engine.Address
}

// Enroll gets the first certificate: it generates a key in the HSM, asks the EST
// server for a certificate with the IDevID and ends with the Security object
// pointing at the new pair. A device that is enrolled already is left alone; one
// whose certificate has expired, or is gone from the token, is enrolled again.
//
// *PendingError, ErrRefused, ErrUnproven, and what est and engine report.
func (c *Credential) Enroll(ctx context.Context) (*Result, error) {
	return c.attempt(KindEnroll, func() (*Result, error) {
		renewal := c.journal.Operation != nil && c.journal.Operation.Kind.reenrolls()
		recovered, err := c.recover(ctx)
		if err != nil && renewal && ctx.Err() == nil && !isEngineError(err) {
			// The device is enrolled: that its renewal waits, or failed, is no
			// failure of an enrolment.
			if usable, usableErr := c.usable(ctx); usableErr == nil && usable != nil {
				c.warn("the renewal that was begun is not done: %v", err)
				return usable, nil
			}
		}
		if err != nil || recovered != nil && recovered.Changed {
			return recovered, err
		}
		if usable, err := c.usable(ctx); err != nil || usable != nil {
			if err == nil {
				err = c.warnOfOtherKey(ctx, usable)
			}
			return usable, err
		}
		if err := c.startEnroll(ctx); err != nil {
			return nil, &StepError{Step: StepPrepare, Err: err}
		}
		return c.proceed(ctx, false)
	})
}

// Renew gets a new certificate, authenticated by the current one (simplereenroll),
// for the same key or, where the policy says so, for a new one. It does so whether
// the current certificate is near its end or not. A rekey that comes to nothing is
// followed by a renewal of the current key. ErrNotEnrolled, also where the token has
// lost the key or the certificate, ErrExpired, and as Enroll.
func (c *Credential) Renew(ctx context.Context) (*Result, error) {
	return c.renew(ctx, byPolicy, true)
}

// Rekey is Renew with a new key of the configured kind, generated beside the old
// one, which stays with its certificate until the next completed renewal. A renewal
// that was begun is completed first. What the token cannot do is given up, and so is
// what the server has not answered by the deadline of the request: the current key
// can be renewed then. ErrKeyNamed, ErrRekeyGivenUp, and as Renew.
func (c *Credential) Rekey(ctx context.Context) (*Result, error) {
	if err := c.checkRekey(); err != nil {
		return nil, err
	}
	return c.renew(ctx, KindRekey, true)
}

func (c *Credential) checkRekey() error {
	if c.cfg.Key != nil {
		return fmt.Errorf("generate a key beside %s: %w", c.cfg.Key, ErrKeyNamed)
	}
	return nil
}

// byPolicy is no kind: the policy chooses it.
const byPolicy Kind = ""

// renew begins a renewal, or a rekey, which is one too: where one was begun it is
// what a Renew is for, but a renewal is not what a Rekey is for. One that is not
// forced is a renewal only if the new certificate expires later.
func (c *Credential) renew(ctx context.Context, kind Kind, force bool) (*Result, error) {
	return c.attempt(cmp.Or(kind, KindRenew), func() (*Result, error) {
		begun := c.journal.Operation
		result, err := c.recover(ctx)
		if err == nil && (result == nil || !result.Kind.reenrolls() || result.Kind == KindRenew && kind == KindRekey) {
			if err := c.startRenew(ctx, kind, force); err != nil {
				return nil, &StepError{Step: StepPrepare, Err: err}
			}
			begun = c.journal.Operation
			result, err = c.proceed(ctx, false)
		}
		if kind == byPolicy && c.cameToNothing(begun, err) {
			return c.renewInstead(ctx, force, err)
		}
		return result, err
	})
}

// cameToNothing reports whether an operation was a rekey that has ended with an error:
// its key is destroyed, and the current one can be renewed.
func (c *Credential) cameToNothing(op *operation, err error) bool {
	_, enrolled := c.current() // but where the device fell back to the IDevID
	return err != nil && op != nil && op.Kind == KindRekey && c.journal.Operation == nil && enrolled
}

// renewInstead renews the current key after a rekey that came to nothing, and
// remembers why: it is not said again until the next is due.
func (c *Credential) renewInstead(ctx context.Context, force bool, why error) (*Result, error) {
	c.warn("the rekey came to nothing, the current key is renewed instead: %v", why)
	c.journal.FailedRekey = &Attempt{Kind: KindRekey, Time: c.cfg.Now(), Result: attemptFailed, Error: truncate(why.Error(), maxRecorded)}
	if err := c.startRenew(ctx, KindRenew, force); err != nil {
		return nil, &StepError{Step: StepPrepare, Err: err}
	}
	return c.proceed(ctx, false)
}

// Recover finishes, or undoes, the operation that a killed run left, and
// removes what nothing refers to. The result is nil if there was none.
func (c *Credential) Recover(ctx context.Context) (*Result, error) {
	if c.journal.Operation == nil {
		if err := c.checkUse(); err != nil {
			return nil, err
		}
		return c.recover(ctx)
	}
	return c.attempt(c.journal.Operation.Kind, func() (*Result, error) { return c.recover(ctx) })
}

func (c *Credential) recover(ctx context.Context) (*Result, error) {
	if err := c.restoreSecurity(ctx); err != nil {
		return nil, err
	}
	op := c.journal.Operation
	if op == nil {
		return nil, c.removeUnreferencedFiles()
	}
	c.sent = true // as far as this run knows
	c.say(op.Step, "going on with the %s of %s, interrupted at step %q", op.Kind, op.StartedAt.UTC().Format(time.RFC3339), op.Step)
	result, err := c.proceed(ctx, true)
	if result != nil {
		result.Recovered = true
	}
	return result, err
}

// attempt records what a run tried and how it ended: the one thing that a
// failure changes.
func (c *Credential) attempt(kind Kind, do func() (*Result, error)) (*Result, error) {
	if err := c.checkUse(); err != nil {
		return nil, err
	}
	began := c.cfg.Now()
	result, err := do()
	last := &Attempt{Kind: kind, Time: began, Result: attemptDone}
	var pending *PendingError
	switch {
	case errors.As(err, &pending):
		last.Result = "pending"
		if op := c.journal.Operation; op != nil {
			op.Tried = false // whatever it came to before: the server has said when to come back
		}
	case err != nil:
		last.Result, last.Error = attemptFailed, truncate(err.Error(), maxRecorded)
		if op := c.journal.Operation; op != nil {
			op.Tried = !errors.Is(err, context.Canceled) // interrupted: the next run goes on
		}
	case result == nil || result.Kind == "":
		return result, nil // nothing was tried
	case !result.Changed:
		last.Result = "unchanged"
	}
	c.journal.LastAttempt = last
	c.shared.journal.rememberPIN(err) // that of a device which came back
	saved := c.save()
	if errors.Is(err, errJournal) {
		saved = nil // what is in the way is said once
	}
	if err := errors.Join(err, saved); err != nil {
		return result, err
	}
	return result, c.removeUnreferencedFiles()
}

const (
	// maxRecorded bounds an error in the journal: a server's text has 512 bytes at
	// most, and twice as many where each is quoted.
	maxRecorded = 2048
	maxShown    = 512 // bytes of a name in a warning
)

func truncate(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + "…"
}

// usable returns the current certificate if there is no reason to enrol.
func (c *Credential) usable(ctx context.Context) (*Result, error) {
	kept, enrolled := c.current()
	if !enrolled {
		return nil, nil
	}
	p, err := c.openCredential(ctx, kept)
	if errors.Is(err, engine.ErrNotFound) {
		c.warn("the enrolled credential is not in the token any more (%v): enrolling again with %s", err, c.bootstrap())
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := c.held(); err != nil { // a loss of it is said now, and not when it is needed
		return nil, err
	}
	now, err := c.verificationTime()
	if err != nil {
		return nil, err
	}
	if leaf := p.chain[0]; now.After(leaf.NotAfter) {
		// A clock that has jumped forward is seen by a person alone.
		c.warn("the enrolled certificate expired at %s, and it is %s now: enrolling again with %s", stamp(leaf.NotAfter), stamp(now), c.bootstrap())
		return nil, nil
	}
	return &Result{Certificate: p.chain[0], CertificateAddress: kept.Certificates[0].Address, Key: kept.Key.Address}, nil
}

func (c *Credential) startEnroll(ctx context.Context) error {
	if err := c.checkSecurity(); err != nil {
		return err
	}
	if _, err := c.verificationTime(); err != nil {
		return err // before a key is made
	}
	if _, err := c.prepare(ctx); err != nil {
		return err
	}
	if c.cfg.Key != nil {
		key, err := c.existingKey(ctx)
		if err != nil {
			return err
		}
		c.say(StepPrepare, "using the key in the token: %s", key)
		return c.begin(&operation{Kind: KindEnroll, Step: StepRequest, ExistingKey: true, Key: reference{Address: key}}, nil)
	}
	return c.beginWithNewKey(KindEnroll, false, nil)
}

// beginWithNewKey writes down which key will be generated, or made by the server.
func (c *Credential) beginWithNewKey(kind Kind, force bool, current *x509.Certificate) error {
	key, err := c.engine.NewKeyAddress(c.cfg.Name)
	if err != nil {
		return err
	}
	return c.begin(&operation{Kind: kind, Step: StepGenerate, NewKey: true, Key: reference{Address: key}, KeyType: c.keyType(), ServerMade: c.cfg.ServerKeyGen, Force: force}, current)
}

func (c *Credential) startRenew(ctx context.Context, kind Kind, force bool) error {
	if err := c.checkSecurity(); err != nil {
		return err
	}
	kept, enrolled := c.current()
	if !enrolled {
		return ErrNotEnrolled
	}
	p, err := c.openCredential(ctx, kept)
	if errors.Is(err, engine.ErrNotFound) {
		return fmt.Errorf("%w: %w", ErrNotEnrolled, err)
	}
	if err != nil {
		return err
	}
	now, err := c.verificationTime()
	if err != nil {
		return err
	}
	if end := p.chain[0].NotAfter; now.After(end) {
		return fmt.Errorf("valid until %s: %w", end.UTC().Format(time.RFC3339), ErrExpired)
	}
	c.adopt(kept) // the journal may have been lost
	if cmp.Or(kind, c.kindOfRenewal()) == KindRekey {
		return c.beginWithNewKey(KindRekey, force, p.chain[0])
	}
	return c.begin(&operation{Kind: KindRenew, Step: StepRequest, Key: kept.Key, ExistingKey: kept.ExistingKey, ServerMade: kept.ServerMade, Renewals: kept.Renewals + 1, Force: force}, p.chain[0])
}

// begin writes down an operation; current is the certificate that it is to replace.
func (c *Credential) begin(op *operation, current *x509.Certificate) (err error) {
	op.StartedAt, op.Server = c.cfg.Now(), c.cfg.ServerURI
	if op.Deadline, err = c.deadline(op.Kind, current); err != nil {
		return err
	}
	c.sent = false
	c.journal.Operation = op
	return c.save()
}

// deadline is when something that is asked now is given up. A rekey stands in the way
// of the renewal of the current key: half of the time that is left is for that.
func (c *Credential) deadline(kind Kind, current *x509.Certificate) (time.Time, error) {
	limit := c.cfg.PendingLimit
	if kind == KindRekey {
		now, err := c.verificationTime()
		if err != nil {
			return time.Time{}, err
		}
		limit = min(limit, current.NotAfter.Sub(now)/2)
	}
	return c.cfg.Now().Add(limit), nil
}

// proceed does the steps of the operation in the journal, from the one that is
// named there. Each may have been done in part by a run that was killed.
func (c *Credential) proceed(ctx context.Context, resumed bool) (*Result, error) {
	op := c.journal.Operation
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var result *Result
		var err error
		if resumed {
			if why, err := c.hopeless(ctx, op); err != nil {
				return nil, &StepError{Step: op.Step, Err: err}
			} else if why != "" {
				return nil, c.giveUp(ctx, why)
			}
		}
		switch op.Step {
		case StepGenerate:
			err = c.generate(ctx, resumed)
		case StepRequest:
			result, err = c.request(ctx)
		case StepImport: // of an interrupted run, for the request goes on with it at once
			if err = c.recoverImport(ctx); errors.Is(err, errKeyLost) {
				return nil, c.giveUp(ctx, err.Error())
			}
		case StepStore:
			err = c.storeCertificates(ctx)
		case StepProve:
			err = c.prove(ctx)
		case StepCommit:
			err = c.commit()
		case StepRetire:
			return c.retire(ctx)
		case StepReset:
			return nil, c.reset(ctx)
		case StepDiscard:
			c.say(StepDiscard, "removing what the failed %s created: %s", op.Kind, op.Reason)
			return nil, c.discard(ctx, nil)
		}
		if err != nil || result != nil {
			return result, err
		}
		resumed = false
	}
}

// giveUp ends an interrupted operation that cannot be gone on with.
func (c *Credential) giveUp(ctx context.Context, why string) error {
	op := c.journal.Operation
	c.warn("the interrupted %s is given up, what it created is removed: %s", op.Kind, why)
	op.Reason = truncate(why, maxRecorded)
	return c.discard(ctx, nil)
}

// hopeless says why an interrupted operation cannot be gone on with, "" if it
// can: time has passed since, and a token can have been cleared. Without it the
// device would try in vain for ever instead of beginning anew.
func (c *Credential) hopeless(ctx context.Context, op *operation) (why string, err error) {
	if why, err := c.anotherKey(ctx, op); why != "" || err != nil {
		return why, err
	}
	switch op.Step {
	case StepGenerate, StepImport: // which look for the key themselves
	case StepRequest, StepStore, StepProve:
		if op.Step == StepRequest && op.asksForKey() {
			break
		}
		if _, err := c.signer(ctx, op.Key.Address); errors.Is(err, engine.ErrNotFound) {
			return "its key is not in the token any more", nil
		} else if err != nil {
			return "", err
		}
	default:
		return "", nil
	}
	var needed *x509.Certificate
	switch {
	case op.Step == StepImport || op.Step == StepStore || op.Step == StepProve:
		chain, err := op.chain()
		if err != nil {
			return "", err
		}
		needed, why = chain[0], "its certificate has expired before it was proven"
	case op.Kind.reenrolls():
		old, err := c.authenticator(ctx)
		if errors.Is(err, ErrNotEnrolled) || errors.Is(err, engine.ErrNotFound) {
			return "the certificate to renew is gone", nil
		}
		if err != nil {
			return "", err
		}
		needed, why = old.chain[0], "the certificate to renew has expired"
	default:
		return "", nil
	}
	if now, err := c.verificationTime(); err != nil || !now.After(needed.NotAfter) {
		return "", err
	}
	return why, nil
}

func (c *Credential) generate(ctx context.Context, resumed bool) error {
	op := c.journal.Operation
	err := c.timed(StepGenerate, func() (string, error) {
		if op.ServerMade {
			if err := c.checkImport(ctx, op.keyType()); err != nil {
				return "", err
			}
			if _, err := c.decryptionKey(ctx); err != nil {
				return "", err
			}
			return fmt.Sprintf("the token takes in a key of type %s: the server makes it", op.keyType()), c.advance(StepRequest)
		}
		if resumed {
			_, err := c.recoverer.RecoverKey(ctx, op.Key.Address)
			if err == nil {
				return fmt.Sprintf("the key of the interrupted run is whole: %s", op.Key), c.advance(StepRequest)
			}
			if !errors.Is(err, engine.ErrNotFound) {
				return "", err
			}
		}
		_, err := c.engine.GenerateKey(ctx, op.Key.Address, engine.KeySpec{Algorithm: op.keyType()})
		if errors.Is(err, engine.ErrDeviceLost) {
			// The outcome is unknown, and generating again could leave two.
			if _, recoverErr := c.recoverer.RecoverKey(ctx, op.Key.Address); recoverErr != nil {
				return "", fmt.Errorf("%w; then %w", err, recoverErr)
			}
			err = nil
		}
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("generated %s in the token: %s", op.keyType(), op.Key), c.advance(StepRequest)
	})
	if errors.Is(err, engine.ErrUnsupported) && op.keyType() != c.keyType() {
		// It was the server's wish, of which the next run asks anew.
		return c.discard(ctx, fmt.Errorf("the server wants a key of type %s: %w", op.keyType(), err))
	}
	return c.giveUpRekey(ctx, err)
}

// giveUpRekey ends a rekey that the token does not allow: it would stand in the way
// of each renewal with the key that is there. What may pass by itself ends nothing
// before the deadline: a device may be gone because of what was asked of it.
func (c *Credential) giveUpRekey(ctx context.Context, err error) error {
	op := c.journal.Operation
	if err == nil || op.Kind != KindRekey || ctx.Err() != nil || !isEngineError(err) {
		return err
	}
	if errors.Is(err, engine.ErrDeviceLost) || errors.Is(err, engine.ErrLocked) {
		if !c.cfg.Now().After(op.Deadline) {
			return err
		}
		err = fmt.Errorf("%w: %w", ErrRekeyGivenUp, err)
	}
	return c.discard(ctx, err)
}
