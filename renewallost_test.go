package estenroll_test

import (
	"testing"
	"time"

	"estenroll"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// A device that fell back to the IDevID is enrolled again by the next run that cron
// calls; where that fails, with the pauses of the policy and not in each run.
func TestRenewFallenBack(t *testing.T) {
	r := newRenewing(t, "fallen", 90*day, nil)
	r.dueNow()
	r.fall()
	if got := r.renewal(); got.State != estenroll.RenewalLost || !got.Due.IsZero() || got.NextAttempt.After(r.clock.now()) {
		t.Errorf("renewal %+v", got)
	}
	r.clock.advance(time.Minute)
	r.down = true
	_, err := r.renewDue()
	wantError(t, err, est.ErrUnreachable)
	if !r.warned("uses the IDevID") {
		t.Errorf("events %+v", r.events)
	}
	interval := r.renewal().NextAttempt.Sub(r.clock.now())
	if interval < 21*time.Hour || interval > 22*time.Hour {
		t.Errorf("the next attempt is %s later, want a tenth of nine days", interval)
	}
	for range 2 {
		last := r.clock.now()
		r.waits()
		if next := r.renewal().NextAttempt; !next.Equal(last.Add(interval)) {
			t.Errorf("tried at %s, next attempt at %s, want %s later", last, next, interval)
		}
		r.clock.set(last.Add(interval - time.Nanosecond))
		r.waits()
		r.clock.set(last.Add(interval))
		_, err := r.renewDue()
		wantError(t, err, est.ErrUnreachable)
	}
	r.down = false
	r.clock.advance(interval)
	if result := must(t, r.renewDue); result.Kind != estenroll.KindEnroll || !result.Changed {
		t.Errorf("result %+v", result)
	}
	r.tidy(2)
	r.idle(estenroll.RenewalNotDue)
}

// fall lets the server refuse both pairs of a renewal that is due, and be itself again.
func (r *renewing) fall() {
	r.t.Helper()
	reach := r.hook
	r.refuseAfter(testserver.Faults{RefuseIssued: true})
	_, err := r.renewDue()
	wantError(r.t, err, estenroll.ErrRefused)
	if !r.device.warned("points at the IDevID again") {
		r.t.Errorf("events %+v", r.events)
	}
	r.hook = reach
	r.site.faults(r.t, testserver.Faults{})
}

// waits holds a run to nothing where there is no certificate to renew.
func (r *renewing) waits() {
	r.t.Helper()
	before, journal, dials := r.snapshot(), r.read("journal.json"), r.dials
	if result := must(r.t, r.renewDue); result.Kind != "" || result.Certificate != nil || r.dials != dials {
		r.t.Errorf("result %+v, %d sessions", result, r.dials-dials)
	}
	r.unchangedSince(before)
	if r.read("journal.json") != journal {
		r.t.Error("the journal was written")
	}
	if got := r.renewal(); got.State != estenroll.RenewalWaits {
		r.t.Errorf("renewal %+v", got)
	}
}

// What it got is refused again: the enrolment that follows waits, too.
func TestRenewFallenBackAgain(t *testing.T) {
	r := newRenewing(t, "again", 90*day, nil)
	r.dueNow()
	r.fall()
	r.site.faults(t, testserver.Faults{RefuseIssued: true})
	_, err := r.renewDue()
	wantError(t, err, estenroll.ErrRefused)
	r.waits()
}

// A token that has lost the pair is enrolled again at once, and after that with pauses of a
// day, since nothing says how long its certificate lived.
func TestRenewLost(t *testing.T) {
	r := newRenewing(t, "lost", 90*day, nil)
	r.clock.advance(2 * day)
	r.site.clear(t)
	if got := r.renewal(); got.State != estenroll.RenewalLost {
		t.Errorf("renewal %+v", got)
	}
	r.down = true
	_, err := r.renewDue()
	wantError(t, err, est.ErrUnreachable)
	if !r.warned("not in the token any more") {
		t.Errorf("events %+v", r.events)
	}
	r.waits()
	r.down = false
	r.clock.advance(day)
	if result := must(t, r.renewDue); result.Kind != estenroll.KindEnroll {
		t.Errorf("result %+v", result)
	}
	// A token that loses what it gets does not get another in each run.
	r.clock.advance(time.Minute)
	r.site.clear(t)
	r.waits()
}

// Of a pair whose key alone is gone that is noticed when it is due.
func TestRenewKeyLost(t *testing.T) {
	r := newRenewing(t, "key-lost", 90*day, nil)
	if err := r.site.engine.RemoveKey(t.Context(), r.site.address(t, r.journal().Pairs[0].Key)); err != nil {
		t.Fatal(err)
	}
	r.dueNow()
	if result := must(t, r.renewDue); result.Kind != estenroll.KindEnroll || !r.warned("not in the token any more") {
		t.Errorf("result %+v, events %+v", result, r.events)
	}
	r.idle(estenroll.RenewalNotDue)
}

// Without the way back to the IDevID a device that has lost its pair says so, and is
// not enrolled.
func TestRenewLostNoFallback(t *testing.T) {
	r := newRenewing(t, "no-way-back", 90*day, func(d *device) { d.cfg.NoFallback = true })
	r.site.clear(t)
	dials := r.dials
	_, err := r.renewDue()
	wantError(t, err, estenroll.ErrNotEnrolled)
	wantError(t, err, engine.ErrNotFound)
	if r.dials != dials {
		t.Error("the server was asked")
	}
}

// The token has lost the old pair of a renewal that is not proven yet: the server is
// asked with the pauses of the policy, and where it refuses the new pair, the device
// falls back to the IDevID.
func TestRenewOldLostUnproven(t *testing.T) {
	r := newRenewing(t, "old-lost", 90*day, func(d *device) { d.cfg.Policy.RekeyEvery = 1 })
	r.dueNow()
	reach := r.hook
	r.hook = func(when, call string) error {
		r.down = r.down || when+" "+call == "after simplereenroll"
		return reach(when, call)
	}
	_, err := r.renewDue()
	wantError(t, err, estenroll.ErrUnproven)
	r.hook = reach
	old := r.journal().Pairs[0]
	if err := r.site.engine.RemoveKey(t.Context(), r.site.address(t, old.Key)); err != nil {
		t.Fatal(err)
	}
	if err := r.site.engine.(engine.CertificateStore).RemoveCertificates(t.Context(), []engine.Address{r.site.address(t, old.Certificates[0])}); err != nil {
		t.Fatal(err)
	}
	dials, failed := r.dials, 0
	for range 100 { // a day, with an attempt in each interval of it
		r.clock.advance(15 * time.Minute)
		if _, err := r.renewDue(); err != nil {
			wantError(t, err, estenroll.ErrUnproven)
			failed++
		}
	}
	if failed == 0 || failed > 2 || r.dials-dials != failed {
		t.Errorf("%d attempts in a day, %d sessions", failed, r.dials-dials)
	}
	r.down = false
	r.site.faults(t, testserver.Faults{RefuseIssued: true})
	r.clock.set(r.renewal().NextAttempt)
	_, err = r.renewDue()
	wantError(t, err, estenroll.ErrRefused)
	if !r.warned("points at the IDevID again") {
		t.Errorf("events %+v", r.events)
	}
	r.site.faults(t, testserver.Faults{})
	if result := must(t, r.renewDue); result.Kind != estenroll.KindEnroll || !result.Changed {
		t.Errorf("result %+v", result)
	}
	r.idle(estenroll.RenewalNotDue)
}
