package estenroll

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"
)

// BuildTime returns the commit time of this build, or a constant where the
// build does not say: no certificate that matters to a device is older than
// the program it runs.
func BuildTime() time.Time {
	// The day this file was written.
	constant := time.Date(2026, time.November, 24, 0, 0, 0, 0, time.UTC)
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return constant
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.time" {
			if t, err := time.Parse(time.RFC3339, setting.Value); err == nil {
				return t
			}
		}
	}
	return constant
}

// sleep waits by the machine's timer, which a clock that is set does not change.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// verificationTime is the latest of the system clock, the build's time
// and the newest notBefore this device has verified: a device without a battery
// boots in 1970. Only verified certificates move it forward, since one wrong
// jump would poison the device for ever.
func (d *shared) verificationTime() (time.Time, error) {
	now := d.cfg.Now()
	floor, source := d.clockFloor()
	if !now.Before(floor) {
		return now, nil
	}
	if d.cfg.RequireClock {
		return time.Time{}, fmt.Errorf("system clock says %s, %s is %s: %w",
			now.UTC().Format(time.RFC3339), source, floor.UTC().Format(time.RFC3339), ErrClock)
	}
	if !d.clockWarned {
		d.clockWarned = true
		d.warn("%s", d.clockProblem())
	}
	return floor, nil
}

// clockProblem says that the system clock is behind, and what stands for it; "" where
// it is not.
func (d *shared) clockProblem() string {
	now := d.cfg.Now()
	floor, source := d.clockFloor()
	if !now.Before(floor) {
		return ""
	}
	return fmt.Sprintf("the system clock says %s: verifying with %s, %s", stamp(now), stamp(floor), source)
}

// clockFloor is the earliest time that it can be, and how that is known.
func (d *shared) clockFloor() (floor time.Time, source string) {
	if d.journal.VerifiedNotBefore.After(d.cfg.BuildTime) {
		return d.journal.VerifiedNotBefore, "the newest certificate this device has verified"
	}
	return d.cfg.BuildTime, "the build's time"
}

// sawVerified moves the verification time's floor; the caller saves the journal.
func (d *shared) sawVerified(notBefore time.Time) {
	if notBefore.After(d.journal.VerifiedNotBefore) {
		d.journal.VerifiedNotBefore = notBefore
	}
}
