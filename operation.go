package estenroll

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
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
func (d *Credential) Enroll(ctx context.Context) (*Result, error) {
	return d.attempt(KindEnroll, func() (*Result, error) {
		renewal := d.journal.Operation != nil && d.journal.Operation.Kind == KindRenew
		recovered, err := d.recover(ctx)
		if err != nil && renewal && ctx.Err() == nil && !isEngineError(err) {
			// The device is enrolled: that its renewal waits, or failed, is no
			// failure of an enrolment.
			if usable, usableErr := d.usable(ctx); usableErr == nil && usable != nil {
				d.warn("the renewal that was begun is not done: %v", err)
				return usable, nil
			}
		}
		if err != nil || recovered != nil && recovered.Changed {
			return recovered, err
		}
		if usable, err := d.usable(ctx); err != nil || usable != nil {
			return usable, err
		}
		if err := d.startEnroll(ctx); err != nil {
			return nil, &StepError{Step: StepPrepare, Err: err}
		}
		return d.proceed(ctx, false)
	})
}

// Renew gets a new certificate for the same key, authenticated by the current
// one (simplereenroll). It does so whether the current certificate is near its
// end or not. ErrNotEnrolled, also where the token has lost the key or the
// certificate, ErrExpired, and as Enroll.
func (d *Credential) Renew(ctx context.Context) (*Result, error) {
	return d.attempt(KindRenew, func() (*Result, error) {
		recovered, err := d.recover(ctx)
		if err != nil || recovered != nil && recovered.Kind == KindRenew {
			return recovered, err
		}
		if err := d.startRenew(ctx); err != nil {
			return nil, &StepError{Step: StepPrepare, Err: err}
		}
		return d.proceed(ctx, false)
	})
}

// Recover finishes, or undoes, the operation that a killed run left, and
// removes what nothing refers to. The result is nil if there was none.
func (d *Credential) Recover(ctx context.Context) (*Result, error) {
	if d.journal.Operation == nil {
		return d.recover(ctx)
	}
	return d.attempt(d.journal.Operation.Kind, func() (*Result, error) { return d.recover(ctx) })
}

func (d *Credential) recover(ctx context.Context) (*Result, error) {
	if err := d.restoreSecurity(ctx); err != nil {
		return nil, err
	}
	op := d.journal.Operation
	if op == nil {
		return nil, d.removeUnreferencedFiles()
	}
	d.sent = true // as far as this run knows
	d.say(op.Step, "going on with the %s of %s, interrupted at step %q", op.Kind, op.StartedAt.UTC().Format(time.RFC3339), op.Step)
	result, err := d.proceed(ctx, true)
	if result != nil {
		result.Recovered = true
	}
	return result, err
}

// attempt records what a run tried and how it ended: the one thing that a
// failure changes.
func (d *Credential) attempt(kind Kind, do func() (*Result, error)) (*Result, error) {
	if err := d.checkInstance(); err != nil {
		return nil, err
	}
	began := d.cfg.Now()
	result, err := do()
	record := &Attempt{Kind: kind, Time: began, Result: "done"}
	var pending *PendingError
	switch {
	case errors.As(err, &pending):
		record.Result = "pending"
	case err != nil:
		record.Result, record.Error = "failed", truncate(err.Error(), 512)
	case result == nil || result.Kind == "":
		return result, nil // nothing was tried
	case !result.Changed:
		record.Result = "unchanged"
	}
	d.journal.LastAttempt = record
	return result, errors.Join(err, d.save())
}

func truncate(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return text[:limit] + "…"
}

// usable returns the current certificate if there is no reason to enrol.
func (d *Credential) usable(ctx context.Context) (*Result, error) {
	c, enrolled := d.current()
	if !enrolled {
		return nil, nil
	}
	p, err := d.openCredential(ctx, c)
	if errors.Is(err, engine.ErrNotFound) {
		d.warn("the enrolled credential is not in the token any more (%v): enrolling again with the IDevID", err)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	now, err := d.verificationTime()
	if err != nil {
		return nil, err
	}
	if leaf := p.chain[0]; now.After(leaf.NotAfter) {
		d.warn("the enrolled certificate expired at %s: enrolling again with the IDevID", leaf.NotAfter.UTC().Format(time.RFC3339))
		return nil, nil
	}
	return &Result{Certificate: p.chain[0], CertificateAddress: c.Certificates[0].Address, Key: c.Key.Address}, nil
}

func (d *Credential) startEnroll(ctx context.Context) error {
	if err := d.checkSecurity(); err != nil {
		return err
	}
	if _, err := d.prepare(ctx); err != nil {
		return err
	}
	key, err := d.engine.NewKeyAddress(d.cfg.Name)
	if err != nil {
		return err
	}
	d.begin(&operation{Kind: KindEnroll, Step: StepGenerate, NewKey: true, Key: reference{Address: key}})
	return d.save()
}

func (d *Credential) startRenew(ctx context.Context) error {
	if err := d.checkSecurity(); err != nil {
		return err
	}
	c, enrolled := d.current()
	if !enrolled {
		return ErrNotEnrolled
	}
	p, err := d.openCredential(ctx, c)
	if errors.Is(err, engine.ErrNotFound) {
		return fmt.Errorf("%w: %w", ErrNotEnrolled, err)
	}
	if err != nil {
		return err
	}
	now, err := d.verificationTime()
	if err != nil {
		return err
	}
	if end := p.chain[0].NotAfter; now.After(end) {
		return fmt.Errorf("valid until %s: %w", end.UTC().Format(time.RFC3339), ErrExpired)
	}
	d.adopt(c) // the journal may have been lost
	d.begin(&operation{Kind: KindRenew, Step: StepRequest, Key: c.Key, Force: true})
	return d.save()
}

func (d *Credential) begin(op *operation) {
	op.StartedAt = d.cfg.Now()
	op.Deadline = op.StartedAt.Add(d.cfg.PendingLimit)
	d.sent = false
	d.journal.Operation = op
}

// proceed does the steps of the operation in the journal, from the one that is
// named there. Each may have been done in part by a run that was killed.
func (d *Credential) proceed(ctx context.Context, resumed bool) (*Result, error) {
	op := d.journal.Operation
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var result *Result
		var err error
		if resumed {
			if why, err := d.hopeless(ctx, op); err != nil {
				return nil, &StepError{Step: op.Step, Err: err}
			} else if why != "" {
				d.warn("the interrupted %s is given up, what it created is removed: %s", op.Kind, why)
				return nil, d.discard(ctx, nil)
			}
		}
		switch op.Step {
		case StepGenerate:
			err = d.generate(ctx, resumed)
		case StepRequest:
			result, err = d.request(ctx)
		case StepStore:
			err = d.storeCertificates(ctx)
		case StepProve:
			err = d.prove(ctx)
		case StepCommit:
			err = d.commit()
		case StepRetire:
			return d.retire(ctx)
		case StepDiscard:
			d.say(StepDiscard, "removing what the failed %s created: %s", op.Kind, op.Reason)
			return nil, d.discard(ctx, nil)
		}
		if err != nil || result != nil {
			return result, err
		}
		resumed = false
	}
}

// hopeless says why an interrupted operation cannot be gone on with, "" if it
// can: time has passed since, and a token can have been cleared. Without it the
// device would try in vain for ever instead of beginning anew.
func (d *Credential) hopeless(ctx context.Context, op *operation) (why string, err error) {
	switch op.Step {
	case StepRequest, StepStore, StepProve:
	default:
		return "", nil
	}
	if _, err := d.engine.Signer(ctx, op.Key.Address); errors.Is(err, engine.ErrNotFound) {
		return "its key is not in the token any more", nil
	} else if err != nil {
		return "", err
	}
	var needed *x509.Certificate
	switch {
	case op.Step != StepRequest:
		chain, err := op.chain()
		if err != nil {
			return "", err
		}
		needed, why = chain[0], "its certificate has expired before it was proven"
	case op.Kind == KindRenew:
		old, err := d.authenticator(ctx)
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
	if now, err := d.verificationTime(); err != nil || !now.After(needed.NotAfter) {
		return "", err
	}
	return why, nil
}

func (d *Credential) generate(ctx context.Context, resumed bool) error {
	op := d.journal.Operation
	return d.timed(StepGenerate, func() (string, error) {
		if resumed {
			_, err := d.recoverer.RecoverKey(ctx, op.Key.Address)
			if err == nil {
				return fmt.Sprintf("the key of the interrupted run is whole: %s", op.Key), d.advance(StepRequest)
			}
			if !errors.Is(err, engine.ErrNotFound) {
				return "", err
			}
		}
		_, err := d.engine.GenerateKey(ctx, op.Key.Address, engine.KeySpec{})
		if errors.Is(err, engine.ErrDeviceLost) {
			// The outcome is unknown, and generating again could leave two.
			if _, recoverErr := d.recoverer.RecoverKey(ctx, op.Key.Address); recoverErr != nil {
				return "", fmt.Errorf("%w; then %w", err, recoverErr)
			}
			err = nil
		}
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("generated %s in the token: %s", engine.ECP256, op.Key), d.advance(StepRequest)
	})
}
