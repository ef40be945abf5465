package estenroll

import (
	"context"
	"errors"

	"estenroll/engine"
)

// Cancellation is what a Cancel has ended.
type Cancellation struct {
	// Kind of the operation, and Step that it stood at.
	Kind Kind
	Step Step
	// Key and Certificate of it that were in the token, or about to be, and are
	// destroyed: the key is nil where it is not the operation's own or the server has not
	// made it yet, the certificate where there was none yet.
	Key         engine.Address
	Certificate engine.Address
	// Completed says that the operation was committed: it is not cancelled but completed,
	// and nothing is destroyed that the next run would not have destroyed.
	Completed *Result
}

// Cancel ends an operation that was begun and is not committed, such as a request that
// the server keeps pending: what it created is removed, the current pair stays. It asks
// no server. The result is nil where there is nothing to cancel. ErrReset.
func (c *Credential) Cancel(ctx context.Context) (*Cancellation, error) {
	if err := c.checkUse(); err != nil {
		return nil, err
	}
	op := c.journal.Operation
	if op == nil {
		return nil, nil
	}
	ended := &Cancellation{Kind: op.Kind, Step: op.Step}
	switch op.Step {
	case StepReset:
		return nil, ErrReset
	case StepCommit, StepRetire:
		var err error
		ended.Completed, err = c.Recover(ctx)
		return ended, err
	}
	certs, key := c.created(op)
	if !op.keyToCome() {
		ended.Key = key
	}
	if len(certs) > 0 {
		ended.Certificate = certs[0].Address
	}
	op.Reason = "it was cancelled"
	c.journal.LastAttempt = &Attempt{Kind: op.Kind, Time: c.cfg.Now(), Result: attemptCancelled}
	if err := c.discard(ctx, nil); err != nil {
		if c.shared.journal.rememberPIN(err) { // that of a device which came back
			err = errors.Join(err, c.save())
		}
		return nil, err
	}
	return ended, nil
}
