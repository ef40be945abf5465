package estenroll_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"estenroll"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// stopped is a clock that shows what a test sets.
type stopped struct{ at atomic.Pointer[time.Time] }

func newStopped() *stopped {
	c := new(stopped)
	c.set(time.Now().Truncate(time.Second))
	return c
}

func (c *stopped) now() time.Time           { return *c.at.Load() }
func (c *stopped) set(to time.Time)         { c.at.Store(&to) }
func (c *stopped) advance(by time.Duration) { c.set(c.now().Add(by)) }

// renewing is an enrolled device with a clock that stands still, which the
// server shares, and a switch for the way to the server.
type renewing struct {
	*device
	clock  *stopped
	behind atomic.Int64 // how much the server's clock is, as a time.Duration
	down   bool
	dials  int
}

func newRenewing(t *testing.T, name string, lifetime time.Duration, configure func(*device)) *renewing {
	t.Helper()
	r := &renewing{clock: newStopped()}
	r.device = newSite(t, testserver.Config{Lifetime: lifetime, ServerKeyGen: true, Now: func() time.Time { return r.clock.now().Add(-time.Duration(r.behind.Load())) }}).device(t, name)
	r.device.now = r.clock.now
	r.hook = func(when, call string) error {
		if call != "Dial" || when != "before" {
			return nil
		}
		r.dials++
		if r.down {
			return fmt.Errorf("no way: %w", est.ErrUnreachable)
		}
		return nil
	}
	if configure != nil {
		configure(r.device)
	}
	r.mustEnroll()
	return r
}

// idle holds a run to nothing: no session, no change, not even in the journal.
func (r *renewing) idle(state estenroll.RenewalState) {
	r.t.Helper()
	before, journal, dials := r.snapshot(), r.read("journal.json"), r.dials
	result := must(r.t, r.renewDue)
	if result.Kind != "" || result.Changed || result.Certificate == nil || r.dials != dials {
		r.t.Errorf("at %s: result %+v, %d sessions", r.clock.now(), result, r.dials-dials)
	}
	r.unchangedSince(before)
	if r.read("journal.json") != journal {
		r.t.Error("the journal was written")
	}
	if got := r.renewal(); got.State != state {
		r.t.Errorf("state %+v, want %q", got, state)
	}
}

func (r *renewing) renewal() estenroll.Renewal {
	r.t.Helper()
	status := r.device.status()
	if status.Renewal == nil {
		r.t.Fatal("no renewal in the status")
	}
	return *status.Renewal
}

// tried holds a run to an attempt that reaches no server and changes nothing but
// its record.
func (r *renewing) tried() {
	r.t.Helper()
	before, dials := r.snapshot(), r.dials
	_, err := r.renewDue()
	wantError(r.t, err, est.ErrUnreachable)
	if r.dials == dials {
		r.t.Error("nothing was tried")
	}
	r.unchangedSince(before)
}

// Nothing is done until a renewal is due, and then it is done once: for
// certificates of ten minutes, of 90 days and of ten years, several times over.
func TestRenewDue(t *testing.T) {
	for name, lifetime := range map[string]time.Duration{"minutes": 10 * time.Minute, "months": 90 * day, "years": 3652 * day} {
		t.Run(name, func(t *testing.T) {
			r := newRenewing(t, name, lifetime, nil)
			key := r.device.status().Current.Key
			for range 3 {
				r.idle(estenroll.RenewalNotDue)
				old, renewal := r.device.status().Current, r.renewal()
				margin := min((old.NotAfter.Sub(old.NotBefore))/10, 30*day)
				if got := old.NotAfter.Sub(renewal.Due); got != margin {
					t.Errorf("due %s before the end, want %s", got, margin)
				}
				if wait := renewal.NextAttempt.Sub(renewal.Due); wait < 0 || wait >= margin/10 {
					t.Errorf("due at %s, the first attempt at %s", renewal.Due, renewal.NextAttempt)
				}
				r.clock.set(renewal.NextAttempt.Add(-time.Nanosecond))
				r.idle(estenroll.RenewalNotDue)
				r.clock.set(renewal.NextAttempt)
				if got := r.renewal(); got.State != estenroll.RenewalDue {
					t.Errorf("state %+v", got)
				}
				result := must(t, r.renewDue)
				if !result.Changed || result.Kind != estenroll.KindRenew || result.Key.String() != key || !result.Certificate.NotAfter.After(old.NotAfter) {
					t.Errorf("result %+v", result)
				}
				r.tidy(2)
			}
			if n := r.issued(); n != 4 {
				t.Errorf("%d certificates issued, want 4", n)
			}
		})
	}
}

// A server that is down for the whole margin is tried ten times by a job that runs
// each hour, silently between, with one CSR; the certificate's end is not waited
// out, and the device comes back with the IDevID by itself.
func TestRenewAttempts(t *testing.T) {
	r := newRenewing(t, "attempts", 90*day, nil)
	r.clock.set(r.renewal().Due)
	end := r.device.status().Current.NotAfter
	r.down = true
	attempts, csr, next := 0, "", r.renewal().NextAttempt
	for ; !r.clock.now().After(end); r.clock.advance(time.Hour) {
		if r.clock.now().Before(next) {
			continue // each of these runs is idle, as the one below
		}
		r.tried()
		attempts++
		op := r.journal().Operation
		if op == nil || csr != "" && csr != string(op.CSR) {
			t.Fatalf("attempt %d: operation %+v", attempts, op)
		}
		csr = string(op.CSR)
		r.idle(estenroll.RenewalWaits)
		next = r.renewal().NextAttempt
	}
	if attempts != 10 {
		t.Errorf("%d attempts, want 10", attempts)
	}
	if next := r.renewal(); next.State != estenroll.RenewalExpired || next.NextAttempt.After(end.Add(31*time.Second)) { // the last attempt may have been just before
		t.Errorf("after the end at %s: %+v", end, next)
	}
	r.down = false
	result := must(t, r.renewDue)
	if result.Kind != estenroll.KindEnroll || !r.warned("expired") {
		t.Errorf("result %+v, events %+v", result, r.events)
	}
	r.tidy(2)
	r.idle(estenroll.RenewalNotDue)
}

// With NoFallback an expired certificate stays, and is no cause for an error in each run.
func TestRenewExpiredNoFallback(t *testing.T) {
	r := newRenewing(t, "no-fallback", 90*day, func(d *device) { d.cfg.NoFallback = true })
	r.clock.advance(100 * day)
	before, dials := r.snapshot(), r.dials
	_, err := r.renewDue()
	wantError(t, err, estenroll.ErrExpired)
	if r.dials != dials {
		t.Error("the server was asked")
	}
	r.unchangedSince(before)
	r.idle(estenroll.RenewalWaits)
	r.clock.advance(day)
	_, err = r.renewDue()
	wantError(t, err, estenroll.ErrExpired)
}

// A run that was killed, or interrupted, is gone on with by the next one at once;
// one that failed when the policy says so, also where a person had begun it long
// before it was due.
func TestRenewUnfinished(t *testing.T) {
	for name, c := range map[string]struct {
		fail func(cancel func()) error
		want estenroll.RenewalState
	}{
		"killed":      {func(func()) error { panic(killed{"before the request"}) }, estenroll.RenewalUnfinished},
		"interrupted": {func(cancel func()) error { cancel(); return context.Canceled }, estenroll.RenewalUnfinished},
		"failed":      {func(func()) error { return fmt.Errorf("no way: %w", est.ErrUnreachable) }, estenroll.RenewalWaits},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRenewing(t, name, 90*day, nil)
			reach, whole := r.hook, r.ctx
			var cancel func()
			r.ctx, cancel = context.WithCancel(whole)
			defer cancel()
			r.hook = func(when, call string) error {
				if when == "before" && call == "Dial" {
					return c.fail(cancel)
				}
				return nil
			}
			if _, err := r.renew(); err == nil {
				t.Fatal("it did not fail")
			}
			r.hook, r.ctx = reach, whole
			renewal := r.renewal()
			if renewal.State != c.want {
				t.Errorf("renewal %+v, want %q", renewal, c.want)
			}
			if c.want == estenroll.RenewalWaits {
				r.idle(c.want)
				if wait := renewal.NextAttempt.Sub(r.clock.now()); wait <= 0 || wait > day {
					t.Errorf("tried again after %s", wait)
				}
				r.clock.set(renewal.NextAttempt)
			}
			if result := must(t, r.renewDue); !result.Changed || !result.Recovered || result.Kind != estenroll.KindRenew {
				t.Errorf("result %+v", result)
			}
			r.tidy(2)
		})
	}
}

// A renewal that was killed, and slept through until the certificate expired, is
// given up and the device enrolled again, in one run.
func TestRenewSlept(t *testing.T) {
	r := newRenewing(t, "slept", 90*day, nil)
	reach := r.hook
	r.hook = func(_, call string) error {
		if call == "Dial" {
			panic(killed{"before the request"})
		}
		return nil
	}
	if _, err := r.renew(); err == nil {
		t.Fatal("it was not killed")
	}
	r.hook = reach
	r.clock.advance(100 * day)
	if result := must(t, r.renewDue); result.Kind != estenroll.KindEnroll || !r.warned("given up") || !r.warned("expired") {
		t.Errorf("result %+v, events %+v", result, r.events)
	}
	r.tidy(2)
}

// A renewal that is due is none if the certificate does not expire later: nothing
// is changed, a warning, and the server is not asked again before the next attempt.
func TestRenewNotLater(t *testing.T) {
	r := newRenewing(t, "not-later", 90*day, nil)
	first := must(t, r.renew).Certificate
	for range 2 { // by then it is not one of the pairs any more
		r.clock.advance(time.Hour)
		r.mustRenew()
	}
	r.answer = func(operation est.Operation) []*x509.Certificate {
		if operation == est.CACerts {
			return nil
		}
		return []*x509.Certificate{first}
	}
	r.clock.set(r.renewal().NextAttempt)
	before := r.snapshot()
	if result := must(t, r.renewDue); result.Changed || !r.warned("no renewal") {
		t.Errorf("result %+v, events %+v", result, r.events)
	}
	r.unchangedSince(before)
	r.idle(estenroll.RenewalWaits)
	r.clock.set(r.renewal().NextAttempt)
	r.answer = nil
	if result := must(t, r.renewDue); !result.Changed {
		t.Errorf("result %+v", result)
	}
}

// A certificate that was due when it was issued is not renewed in each run, though
// by its end; one that falls due soon is, then.
func TestRenewDueWhenIssued(t *testing.T) {
	for name, c := range map[string]struct {
		lifetime time.Duration // and a minute before
		usage    string
		state    estenroll.RenewalState
		next     func(issued, end time.Time) time.Time
	}{
		"due before": {20 * time.Minute, "1/100", estenroll.RenewalWaits, func(issued, _ time.Time) time.Time {
			// The first of ten parts began 47.4s before.
			return issued.Add(-47400 * time.Millisecond).Add(124740 * time.Millisecond)
		}},
		"no time left": {20 * time.Second, "1/100", estenroll.RenewalWaits, func(_, end time.Time) time.Time { return end.Add(time.Second) }},
		"due soon":     {4 * time.Minute, "7/30", estenroll.RenewalNotDue, func(issued, _ time.Time) time.Time { return issued.Add(10 * time.Second) }},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRenewing(t, "when-issued", c.lifetime, func(d *device) { d.cfg.Policy = estenroll.Policy{NominalUsage: fraction(t, c.usage), NoJitter: true} })
			r.idle(c.state)
			issued, end := r.clock.now(), r.device.status().Current.NotAfter
			if got, want := r.renewal().NextAttempt, c.next(issued, end); !got.Equal(want) {
				t.Errorf("issued at %s, next attempt at %s, want %s; the end is at %s", issued, got, want, end)
			}
		})
	}
}

// The jitter is that of the factory certificate, whatever is renewed; without it
// that of the certificate's names, and no reason not to renew.
func TestRenewJitter(t *testing.T) {
	r := newRenewing(t, "jitter", 90*day, nil)
	store := r.site.engine.(engine.CertificateStore)
	idevid, err := store.Certificate(t.Context(), r.site.idevid.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	first := func(identity []byte) time.Time {
		current := r.device.status().Current
		return estenroll.Policy{}.Schedule(current.NotBefore, current.NotAfter, identity).First
	}
	for range 2 {
		if got, want := r.renewal().NextAttempt, first(idevid.Raw); !got.Equal(want) {
			t.Errorf("next attempt at %s, want %s", got, want)
		}
		r.clock.advance(time.Hour)
		r.mustRenew()
	}
	r.cfg.IDevID.Certificate = r.site.address(t, "pkcs11:object=gone;type=cert")
	leaf := must(t, r.renewDue).Certificate
	if got, want := r.renewal().NextAttempt, first(slices.Concat(leaf.RawIssuer, leaf.RawSubject)); !got.Equal(want) {
		t.Errorf("next attempt at %s, want %s", got, want)
	}
	r.clock.set(r.renewal().NextAttempt)
	if result := must(t, r.renewDue); !result.Changed {
		t.Errorf("result %+v", result)
	}
}

// A Security object that was lost is made up for, and that is no reason to renew.
func TestRenewDueRestores(t *testing.T) {
	r := newRenewing(t, "restored", 90*day, nil)
	security, dials := r.read("security.json"), r.dials
	r.remove("security.json")
	if result := must(t, r.renewDue); result.Kind != "" || r.dials != dials {
		t.Errorf("result %+v", result)
	}
	if !strings.Contains(r.read("security.json"), r.journal().Pairs[0].Certificates[0]) {
		t.Errorf("the Security object was %s, is %s", security, r.read("security.json"))
	}
}

func TestRenewDueNotEnrolled(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "factory")
	_, err := d.renewDue()
	wantError(t, err, estenroll.ErrNotEnrolled)
	if d.status().Renewal != nil {
		t.Error("there is a renewal of nothing")
	}
}

// A clock that shows 1970, or is set back before the certificate begins: the age
// is judged by the newest time that was verified, which each run says.
func TestRenewClockBack(t *testing.T) {
	for name, to := range map[string]time.Time{"1970": time.Unix(60, 0), "a year ago": time.Now().Add(-365 * day)} {
		t.Run(name, func(t *testing.T) {
			r := newRenewing(t, "back", 90*day, nil)
			right, due := r.clock.now(), r.renewal().NextAttempt
			r.clock.set(to)
			for range 2 {
				r.idle(estenroll.RenewalNotDue)
				if _, err := r.renewDue(); err != nil || !r.warned("the system clock says") {
					t.Errorf("%v, events %+v", err, r.events)
				}
				if clock := r.device.status().Clock; !strings.Contains(clock, "verifying with") {
					t.Errorf("status says %q", clock)
				}
				r.clock.advance(100 * day)
				if r.clock.now().After(right) {
					break
				}
			}
			r.clock.set(due) // set right, and none too early
			if result := must(t, r.renewDue); !result.Changed {
				t.Errorf("result %+v", result)
			}
			r.tidy(2)
		})
	}
}

// The program is newer than the date on which a renewal was due, the clock is not
// set: the renewal is tried, and tried again by the time that the wrong clock counts.
func TestRenewDueIn1970(t *testing.T) {
	site := newStopped()
	s := newSite(t, testserver.Config{Lifetime: 90 * day, Now: site.now})
	d := s.device(t, "battery")
	device := newStopped()
	device.set(site.now())
	d.now = device.now
	r := &renewing{device: d, clock: device}
	r.hook = func(when, call string) error {
		if call == "Dial" && when == "before" {
			r.dials++
			if r.down {
				return fmt.Errorf("no way: %w", est.ErrUnreachable)
			}
		}
		return nil
	}
	d.mustEnroll()
	r.down = true
	site.advance(85 * day)
	d.cfg.BuildTime = site.now()
	device.set(time.Unix(60, 0))
	r.tried()
	r.idle(estenroll.RenewalWaits)
	for range 2 {
		device.advance(10 * time.Hour)
		r.idle(estenroll.RenewalWaits)
		device.advance(12 * time.Hour)
		r.tried()
	}
	r.down = false
	device.advance(day)
	site.set(d.cfg.BuildTime.Add(time.Minute)) // the new certificate begins no later than what the device knows
	if result := must(t, r.renewDue); !result.Changed {
		t.Errorf("result %+v", result)
	}
	r.tidy(2)
}

// The same, and the server answers by a clock that is right: the device takes what it
// gets for expired, and has what it had. It tries again once a day at most.
func TestRenewClockForwardAlone(t *testing.T) {
	r := newRenewing(t, "alone", 90*day, nil)
	right, before := r.clock.now(), r.snapshot()
	const jump = 3650 * day
	r.behind.Store(int64(jump))
	r.clock.set(right.Add(jump))
	for range 2 {
		_, err := r.renewDue()
		wantError(t, err, est.ErrNotValidNow)
		if !r.warned("and it is 20") {
			t.Errorf("events %+v", r.events)
		}
		r.unchangedSince(before)
		r.idle(estenroll.RenewalWaits)
		r.clock.advance(day)
	}
	r.behind.Store(0)
	r.clock.set(right.Add(3 * day))
	r.idle(estenroll.RenewalNotDue)
	r.dueNow()
	if result := must(t, r.renewDue); result.Kind != estenroll.KindRenew {
		t.Errorf("result %+v", result)
	}
	r.tidy(2)
}

// A clock that jumps past the end of the certificate: a new one is asked for with
// the IDevID, and what the server does not answer destroys nothing. When the clock is
// right again, the attempt of the future is not waited for.
func TestRenewClockForward(t *testing.T) {
	r := newRenewing(t, "forward", 90*day, nil)
	right, pair := r.clock.now(), r.read("security.json")
	r.clock.set(right.Add(3650 * day))
	r.down = true
	if _, err := r.renewDue(); err == nil || !r.warned("expired") {
		t.Errorf("%v, events %+v", err, r.events)
	}
	if r.read("security.json") != pair || len(r.journal().Pairs) != 1 {
		t.Error("the pair was given up")
	}
	r.clock.set(right.Add(time.Hour))
	r.down = false
	if status := r.device.status(); !status.Enrolled || status.Current.Problem != "" || status.Renewal.NextAttempt.After(status.Current.NotAfter) {
		t.Errorf("status %+v, renewal %+v", status, status.Renewal)
	}
	must(t, r.renewDue) // what was begun is ended
	r.tidy(2)
	r.clock.set(r.renewal().NextAttempt)
	if result := must(t, r.renewDue); !result.Changed {
		t.Errorf("result %+v", result)
	}
}

// A request that failed at first and that the server then keeps pending is asked for
// again when the server has said so, and not at the next attempt of the schedule.
func TestRenewPendingAfterFailure(t *testing.T) {
	r := newRenewing(t, "late-pending", 90*day, nil)
	r.dueNow()
	r.down = true
	_, err := r.renewDue()
	wantError(t, err, est.ErrUnreachable)
	r.down = false
	r.site.deferring(t, 1, 10*time.Minute)
	r.clock.set(r.renewal().NextAttempt)
	_, err = r.renewDue()
	r.wantPending(err)
	r.clock.advance(11 * time.Minute)
	if result := must(t, r.renewDue); !result.Changed {
		t.Errorf("result %+v, renewal %+v", result, r.renewal())
	}
	r.tidy(2)
}

// A token that does not let go of old pairs is no reason to go without renewals: they
// are named, tried again with each renewal, and gone when it does.
func TestRenewTokenKeepsOld(t *testing.T) {
	for _, refused := range []string{"RemoveCertificates", "RemoveKey"} {
		t.Run(refused, func(t *testing.T) {
			r := newRenewing(t, "hoarding", 90*day, func(d *device) { d.cfg.Policy.RekeyEvery = 1 })
			prohibited := func(when, call string) error {
				if when+" "+call == "before "+refused {
					return &engine.Error{Op: "remove", Err: errors.New("CKR_ACTION_PROHIBITED")}
				}
				return nil
			}
			next := func() {
				t.Helper()
				r.clock.set(r.renewal().NextAttempt)
				if result := must(t, r.renewDue); !result.Changed {
					t.Errorf("result %+v", result)
				}
			}
			r.hook = prohibited
			next()
			next()
			if !r.warned("stays in the token until the next renewal") || len(r.journal().Pairs) != 3 {
				t.Errorf("%d pairs, events %+v", len(r.journal().Pairs), r.events)
			}
			r.hook = nil
			next()
			r.tidy(2)
			r.hook = prohibited
			for range 16 { // as many as the journal has room for
				next()
			}
			if !r.warned("for a person to remove") {
				t.Errorf("events %+v", r.events)
			}
			r.idle(estenroll.RenewalNotDue)
		})
	}
}

// Nor is one that does not let go of a pair that the server has refused.
func TestRenewTokenKeepsRefused(t *testing.T) {
	r := newRenewing(t, "keeping", 90*day, func(d *device) { d.cfg.Policy.RekeyEvery = 1 })
	r.dueNow()
	r.hook = func(when, call string) error {
		switch when + " " + call {
		case "after simplereenroll":
			return r.refuseNewest()
		case "before RemoveCertificates":
			return &engine.Error{Op: "remove", Err: errors.New("CKR_ACTION_PROHIBITED")}
		}
		return nil
	}
	_, err := r.renewDue()
	wantError(t, err, estenroll.ErrRefused)
	r.hook = func(when, call string) error {
		if when+" "+call == "before RemoveCertificates" {
			return &engine.Error{Op: "remove", Err: errors.New("CKR_ACTION_PROHIBITED")}
		}
		return nil
	}
	r.site.faults(t, testserver.Faults{})
	r.clock.set(r.renewal().NextAttempt)
	if result := must(t, r.renewDue); !result.Changed {
		t.Errorf("result %+v", result)
	}
	r.hook = nil
	r.clock.set(r.renewal().NextAttempt)
	must(t, r.renewDue)
	r.tidy(2)
}
