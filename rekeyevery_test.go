package estenroll_test

import (
	"crypto"
	"fmt"
	"slices"
	"testing"
	"time"

	"estenroll"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// rekeying is a device that rekeys with every n-th renewal.
func rekeying(t *testing.T, name string, every int) *renewing {
	t.Helper()
	return newRenewing(t, name, 90*day, func(d *device) { d.cfg.Policy.RekeyEvery = every })
}

// dueNow sets the clock to the next attempt.
func (r *renewing) dueNow() {
	r.t.Helper()
	r.clock.set(r.renewal().NextAttempt)
}

// The policy rekeys never, each time, or with every n-th renewal of a key, whoever
// asks; a rekey that a person asks for begins the count anew.
func TestRekeyEvery(t *testing.T) {
	renew, rekey := estenroll.KindRenew, estenroll.KindRekey
	for every, want := range map[int][]estenroll.Kind{
		0: {renew, renew, renew},
		1: {rekey, rekey},
		2: {renew, rekey, renew, rekey},
		3: {renew, renew, rekey, renew, renew, rekey},
	} {
		t.Run(fmt.Sprint(every), func(t *testing.T) {
			r := rekeying(t, "every", every)
			var got []estenroll.Kind
			for round := range want {
				run := r.renewDue
				if round%2 == 1 {
					run = r.renew // --force
				}
				r.dueNow()
				result := must(t, run)
				got = append(got, result.Kind)
				r.tidy(2)
			}
			if !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
	t.Run("asked for", func(t *testing.T) {
		r := rekeying(t, "asked-for", 2)
		var got []estenroll.Kind
		for _, run := range []func() (*estenroll.Result, error){r.renew, r.device.rekey, r.renew, r.renew} {
			r.clock.advance(time.Hour)
			got = append(got, must(t, run).Kind)
		}
		if want := []estenroll.Kind{renew, rekey, renew, rekey}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// A rekey by policy that is killed anywhere is gone on with as one that is asked for,
// and is one.
func TestRekeyEveryKilled(t *testing.T) {
	for _, at := range []string{"before GenerateKey", "after GenerateKey", "before simplereenroll", "after StoreCertificates"} {
		t.Run(at, func(t *testing.T) {
			r := rekeying(t, "killed", 2)
			r.mustRenew()
			r.dueNow()
			reach := r.hook
			r.hook = after(1, at, func() error { panic(killed{at}) })
			if _, err := r.renewDue(); err == nil {
				t.Fatal("not killed")
			}
			r.hook = reach
			if result := must(t, r.renewDue); result.Kind != estenroll.KindRekey || !result.Recovered {
				t.Errorf("result %+v", result)
			}
			r.tidy(2)
			r.idle(estenroll.RenewalNotDue)
			r.dueNow()
			if result := must(t, r.renewDue); result.Kind != estenroll.KindRenew {
				t.Errorf("the next is %+v", result)
			}
		})
	}
}

// A rekey by policy that the token, or the server, does not do is followed by a renewal
// of the current key in the same run. That stays to be seen until one is done.
func TestRekeyEveryFails(t *testing.T) {
	engineError := func(cause error) func() error {
		return func() error { return &engine.Error{Op: "injected", Err: cause} }
	}
	for name, c := range map[string]struct {
		at    string
		do    func(*renewing) error
		takes bool // another kind of key
	}{
		"full":           {"before GenerateKey", func(*renewing) error { return engineError(engine.ErrTokenFull)() }, false},
		"no generation":  {"before GenerateKey", func(*renewing) error { return engineError(engine.ErrUnsupported)() }, false},
		"no room for it": {"before StoreCertificates", func(*renewing) error { return engineError(engine.ErrTokenFull)() }, false},
		"refused": {"after simplereenroll", func(*renewing) error {
			return &est.StatusError{Operation: est.SimpleReenroll, Code: "4.03 Forbidden", Class: 4}
		}, false},
		"refused as a new": {"after simplereenroll", func(r *renewing) error { return r.refuseNewest() }, false},
		"another type":     {"", nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			r := rekeying(t, "fails", 2)
			key := r.mustRenew().Key
			r.dueNow()
			reach := r.hook
			if c.takes {
				r.cfg.KeySpec.Algorithm = engine.ECP521
				r.accepts = func(public crypto.PublicKey) bool { return engine.AlgorithmOf(public) == engine.ECP256 }
			} else {
				r.hook = after(1, c.at, func() error { return c.do(r) })
			}
			result := must(t, r.renewDue)
			if result.Kind != estenroll.KindRenew || !result.Changed || result.Key != key || !r.warned("came to nothing, the current key is renewed") {
				t.Errorf("result %+v, events %+v", result, r.events)
			}
			r.tidy(2)
			r.hook, r.accepts, r.cfg.KeySpec.Algorithm = reach, nil, ""
			if last := r.journal().LastAttempt; last.Kind != estenroll.KindRenew || last.Result != "done" {
				t.Errorf("last attempt %+v", last)
			}
			r.idle(estenroll.RenewalNotDue)
			if failed := r.device.status().FailedRekey; failed == nil || failed.Error == "" || !failed.Time.Equal(r.clock.now()) {
				t.Errorf("failed rekey %+v", failed)
			}
			r.site.faults(t, testserver.Faults{})
			r.dueNow()
			if result := must(t, r.renewDue); result.Kind != estenroll.KindRekey {
				t.Errorf("the next is %+v", result)
			}
			if failed := r.device.status().FailedRekey; failed != nil {
				t.Errorf("failed rekey %+v", failed)
			}
			r.tidy(2)
		})
	}
}

// refuseNewest lets the server refuse the certificate that it has issued last.
func (d *device) refuseNewest() error {
	issued := d.site.server.Issuances()
	return d.site.server.SetFaults(testserver.Faults{RefuseClients: []string{issued[len(issued)-1].Certificate}})
}

// With both pairs refused there is nothing to renew instead: the device has fallen back
// to the IDevID, and is enrolled again.
func TestRekeyEveryFallsBack(t *testing.T) {
	r := rekeying(t, "falls", 1)
	reach := r.hook
	r.refuseAfter(testserver.Faults{RefuseIssued: true})
	_, err := r.renew()
	wantError(t, err, estenroll.ErrRefused)
	if failed := r.device.status().FailedRekey; failed != nil {
		t.Errorf("failed rekey %+v", failed)
	}
	r.hook = reach
	r.site.faults(t, testserver.Faults{})
	if result := must(t, r.renewDue); result.Kind != estenroll.KindEnroll {
		t.Errorf("result %+v", result)
	}
	r.tidy(2)
}

// A rekey that gets no answer, or none in time, gives way to a renewal of the current
// key when half of what was left of the certificate has gone.
func TestRekeyEveryGivesWay(t *testing.T) {
	for name, c := range map[string]struct {
		lifetime time.Duration
		pending  bool
	}{"minutes, pending": {10 * time.Minute, true}, "months, pending": {90 * day, true}, "months, no answer": {90 * day, false}} {
		t.Run(name, func(t *testing.T) {
			r := newRenewing(t, "gives-way", c.lifetime, func(d *device) { d.cfg.Policy.RekeyEvery = 1 })
			current := r.device.status().Current
			r.dueNow()
			if r.down = !c.pending; c.pending {
				r.site.deferring(t, 1, 100*day)
			}
			half := r.clock.now().Add(current.NotAfter.Sub(r.clock.now()) / 2)
			attempts, csr := 0, ""
			for ; !r.clock.now().After(half); attempts++ {
				if _, err := r.renewDue(); err == nil {
					t.Fatal("no error")
				}
				op := r.journal().Operation
				if op == nil || op.Kind != "rekey" || csr != "" && string(op.CSR) != csr {
					t.Fatalf("operation %+v", op)
				}
				csr = string(op.CSR)
				if c.pending {
					r.clock.advance(c.lifetime / 60)
				} else {
					r.dueNow()
				}
			}
			if attempts < 3 {
				t.Errorf("%d attempts", attempts)
			}
			r.site.faults(t, testserver.Faults{})
			if r.down = false; !c.pending {
				r.hook = after(1, "before Dial", func() error { return est.ErrUnreachable })
			}
			result := must(t, r.renewDue)
			if result.Kind != estenroll.KindRenew || result.Key.String() != current.Key || !r.warned("taken too long") {
				t.Errorf("result %+v, events %+v", result, r.events)
			}
			r.tidy(2)
			if r.privateKeys() != 1 {
				t.Errorf("%d keys", r.privateKeys())
			}
		})
	}
}

// A rekey that a person began, and that is given up before the certificate is due, is
// no cause for a renewal by policy.
func TestRekeyGivenUpNotDue(t *testing.T) {
	r := rekeying(t, "not-due", 0)
	r.down = true
	if _, err := r.device.rekey(); err == nil {
		t.Fatal("no error")
	}
	r.clock.advance(8 * day)
	_, err := r.renewDue()
	wantError(t, err, estenroll.ErrRekeyGivenUp)
	r.down = false
	r.idle(estenroll.RenewalNotDue)
	r.tidy(1)
}

// A new key that was asked for by policy alone, and whose certificate does not last
// longer, goes; the server is not asked again before the next attempt.
func TestRekeyEveryNotLater(t *testing.T) {
	r := rekeying(t, "not-later", 1)
	r.dueNow()
	end := r.device.status().Current.NotAfter
	r.behind.Store(int64(r.clock.now().Sub(end.Add(-90*day - 30*time.Second)))) // to the server the current one is valid
	before := r.snapshot()
	result := must(t, r.renewDue)
	if result.Changed || result.Kind != estenroll.KindRekey || !r.warned("no renewal") {
		t.Errorf("result %+v, events %+v", result, r.events)
	}
	r.unchangedSince(before)
	r.idle(estenroll.RenewalWaits)
}

// The configuration says which key it is, and asks for others: before anything is opened.
func TestRekeyEveryOfExistingKey(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "existing")
	d.cfg.Key, d.cfg.Policy.RekeyEvery = d.site.owned(t, "EC:secp384r1", "owned", "77"), 3
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrConfig)
	wantError(t, err, estenroll.ErrKeyNamed)
	for _, every := range []int{-1, 1001} {
		d.cfg.Key, d.cfg.Policy.RekeyEvery = nil, every
		_, err := d.enroll()
		wantError(t, err, estenroll.ErrConfig)
	}
	if d.read("journal.json") != "" {
		t.Error("something was begun")
	}
}
