package main

import (
	"context"
	"errors"
	"fmt"

	"estenroll"
	"estenroll/engine"
)

// turn is one credential's turn in a command, with its own settings.
type turn struct {
	*settings
	credential *estenroll.Credential
}

// withCredentials opens the device, gives each credential that the command is for
// its turn, in the order of the configuration, and closes the device: one lock and
// one login for all. What one credential comes to does not keep the others from
// their turn, unless it is the matter of all.
func withCredentials(ctx context.Context, s *settings, out *output, do func(context.Context, turn) error) error {
	return withDevice(ctx, s, out, func(ctx context.Context, device *estenroll.Device) error {
		turns, err := s.turns(device, false)
		if err != nil {
			return err
		}
		return out.inTurn(ctx, turns, do)
	})
}

// withDevice opens the device, does something with it and closes it.
func withDevice(ctx context.Context, s *settings, out *output, do func(context.Context, *estenroll.Device) error) error {
	device, err := s.openDevice(ctx, out)
	if err != nil {
		return err
	}
	err = do(ctx, device)
	if closeErr := device.Close(); closeErr != nil {
		err = errors.Join(err, closeErr)
	}
	return err
}

// turns returns the turns of the credentials that a command is for: the one that
// is chosen, or all; forgotten ones, which the configuration has no more, on demand.
func (s *settings) turns(device *estenroll.Device, forgotten bool) ([]turn, error) {
	var turns []turn
	for _, c := range device.Credentials() {
		if (c.Configured() || forgotten) && (!s.chosen || c.Name() == s.credential) {
			turns = append(turns, turn{s.settingsOf(c.Name()), c})
		}
	}
	if len(turns) == 0 {
		return nil, &usageError{fmt.Errorf("credential: the configuration has no %q", s.credential)}
	}
	return turns, nil
}

// settingsOf returns a credential's own settings; of a forgotten one, those at the top.
func (s *settings) settingsOf(name string) *settings {
	for _, one := range s.credentials {
		if one.credential == name {
			return one
		}
	}
	return s
}

// byName says that what is printed as JSON is an object by the credentials' names.
func (s *settings) byName() bool { return len(s.credentials) > 0 && !s.chosen }

// inTurn gives each its turn, and names it in every line where there are several.
func (o *output) inTurn(ctx context.Context, turns []turn, do func(context.Context, turn) error) error {
	if len(turns) == 1 {
		return do(ctx, turns[0])
	}
	defer func() { o.about = "" }()
	worst := exitDone
	for i, one := range turns {
		o.about = one.credential.Name()
		err := do(ctx, one)
		if err == nil {
			continue
		}
		worst = worse(worst, o.fail(err, ctx.Err() != nil))
		if ctx.Err() == nil && !isOfAll(err) {
			continue
		}
		for _, left := range turns[i+1:] {
			o.about = left.credential.Name()
			o.warning(noTurn)
		}
		break
	}
	if worst == exitDone {
		return nil
	}
	return &toldError{worst}
}

const noTurn = "it had no turn in this run"

// toldError is the outcome of several credentials, each of which has been told of.
type toldError struct{ code int }

func (e *toldError) Error() string { return "not all credentials are done" }

// worstFirst is the order of the exit codes where a run has several outcomes.
var worstFirst = []int{exitToken, exitInterrupted, exitRefused, exitUsage, exitTryLater, exitPending, exitRenewed, exitDone}

func worse(a, b int) int {
	for _, code := range worstFirst {
		if code == a || code == b {
			return code
		}
	}
	return a
}

// isOfAll reports an error of what the credentials share: another one's turn
// would end alike, or spend another try of a PIN.
func isOfAll(err error) bool {
	var pin *engine.PINError
	if errors.As(err, &pin) || errors.Is(err, context.Canceled) {
		return true
	}
	for _, shared := range []error{engine.ErrDeviceLost, engine.ErrClosed, engine.ErrLocked, engine.ErrTokenNotFound, engine.ErrModule} {
		if errors.Is(err, shared) {
			return true
		}
	}
	return false
}
