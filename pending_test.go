package estenroll_test

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// deferring lets the server put off each CSR n times.
func (s *site) deferring(t *testing.T, n int, maxAge time.Duration) {
	t.Helper()
	s.faults(t, testserver.Faults{Defer: n, DeferMaxAge: &maxAge})
}

func (d *device) wantPending(err error) *estenroll.PendingError {
	d.t.Helper()
	var pending *estenroll.PendingError
	if !errors.As(err, &pending) {
		d.t.Fatalf("error %v, want a *PendingError", err)
	}
	if last := d.journal().LastAttempt; last.Result != "pending" || last.Error != "" {
		d.t.Errorf("last attempt %+v", last)
	}
	return pending
}

// A pending answer is kept with its key and its CSR; the server is not asked
// before the time that it said, and then with the same bytes (RFC 9148 §4.7).
func TestPending(t *testing.T) {
	t.Attr("shows", "RFC 9148 §4.7 (1)")
	t.Attr("shows", "RFC 9148 §4.7 (2)")
	t.Attr("shows", "RFC 7030 §4.2.3 (1)")
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now})
	d := site.device(t, "pending")
	d.now = c.now
	site.deferring(t, 2, 10*time.Minute)
	_, err := d.enroll()
	pending := d.wantPending(err)
	if in := pending.NotBefore.Sub(c.now()); in < 9*time.Minute || in > 10*time.Minute {
		t.Errorf("come back in %s", in)
	}
	if limit := pending.Deadline.Sub(c.now()); limit < 7*24*time.Hour-time.Minute || limit > 7*24*time.Hour {
		t.Errorf("given up in %s", limit)
	}
	first, op := d.csrs(), d.journal().Operation
	if len(first) != 1 || op == nil || string(op.CSR) != first[0] {
		t.Fatalf("%d requests, operation %+v", len(first), op)
	}
	objects := d.objects()

	c.advance(9 * time.Minute)
	sessions := d.opened
	_, err = d.enroll()
	if again := d.wantPending(err); !again.NotBefore.Equal(pending.NotBefore) || d.opened != sessions {
		t.Errorf("before its time: %v, %d sessions", again, d.opened-sessions)
	}
	if status := d.status(); status.Pending == nil || !status.Pending.NotBefore.Equal(pending.NotBefore) {
		t.Errorf("status %+v", status)
	}

	c.advance(2 * time.Minute)
	_, err = d.enroll()
	d.wantPending(err)
	if csrs := d.csrs(); len(csrs) != 1 || csrs[0] != first[0] {
		t.Errorf("%d requests, or other bytes", len(csrs))
	}
	if got := d.objects(); strings.Join(got, "\n") != strings.Join(objects, "\n") {
		t.Errorf("objects %q, want %q", got, objects)
	}

	c.advance(11 * time.Minute)
	if result := d.mustEnroll(); !result.Recovered || result.Key.String() != op.Key {
		t.Errorf("result %+v", result)
	}
	if csrs := d.csrs(); len(csrs) != 1 || csrs[0] != first[0] {
		t.Errorf("%d requests, or other bytes", len(csrs))
	}
	d.tidy(1)
	if d.issued() != 1 {
		t.Errorf("%d certificates issued", d.issued())
	}
}

// A run that may wait asks itself, with the same bytes, as often as its time allows, and
// a server that wants no pause gets one.
func TestPendingWait(t *testing.T) {
	for name, c := range map[string]struct {
		wait, maxAge time.Duration
		pauses       []time.Duration
		done         bool
	}{
		"long enough":      {time.Hour, 10 * time.Minute, []time.Duration{10 * time.Minute, 10 * time.Minute}, true},
		"for one":          {15 * time.Minute, 10 * time.Minute, []time.Duration{10 * time.Minute}, false},
		"not long enough":  {9 * time.Minute, 10 * time.Minute, nil, false},
		"not at all":       {0, 0, nil, false},
		"at once, it says": {time.Minute, 0, []time.Duration{time.Second, time.Second}, true},
	} {
		t.Run(name, func(t *testing.T) {
			now := newStopped()
			site := newSite(t, testserver.Config{Now: now.now})
			d := site.device(t, "waits")
			var pauses []time.Duration
			d.now, d.cfg.Wait, d.cfg.RetryInterval = now.now, c.wait, time.Second
			d.cfg.Sleep = func(_ context.Context, pause time.Duration) error {
				pauses = append(pauses, pause)
				now.advance(pause)
				return nil
			}
			site.deferring(t, 2, c.maxAge)
			result, err := d.enroll()
			if diff := cmp.Diff(c.pauses, pauses); diff != "" {
				t.Errorf("pauses (-want +got):\n%s", diff)
			}
			if csrs := d.csrs(); len(csrs) != 1+len(pauses) || len(slices.Compact(csrs)) != 1 {
				t.Errorf("%d requests, or other bytes", len(csrs))
			}
			if !c.done {
				d.wantPending(err)
				return
			}
			if err != nil || !result.Changed {
				t.Fatalf("result %+v, %v", result, err)
			}
			d.tidy(1)
			if d.issued() != 1 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
	}
}

// Ctrl-C ends the wait, and loses nothing.
func TestPendingWaitCancelled(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now})
	d := site.device(t, "interrupted")
	d.now, d.cfg.Wait = c.now, 2*time.Hour
	site.deferring(t, 1, time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	d.ctx = ctx
	d.onProgress = func(e estenroll.Event) {
		if strings.Contains(e.Message, "asking again at") {
			cancel()
		}
	}
	_, err := d.enroll() // by the timer that a run has
	wantError(t, err, context.Canceled)
	asked, op := d.csrs(), d.journal().Operation
	if op == nil || len(asked) != 1 {
		t.Fatalf("operation %+v, %d requests", op, len(asked))
	}
	d.ctx, d.cfg.Wait, d.onProgress = t.Context(), 0, nil
	_, err = d.enroll()
	d.wantPending(err)
	c.advance(time.Hour)
	d.mustEnroll()
	if csrs := d.csrs(); len(csrs) != 1 || csrs[0] != asked[0] {
		t.Errorf("%d requests, or other bytes", len(csrs))
	}
	d.tidy(1)
}

// Another server has not said that it wants to think: it is asked at once, with the
// same bytes, whatever the one before has said, and how long it may think begins anew.
func TestPendingServerChanged(t *testing.T) {
	for name, run := range map[string]func(*device) (*estenroll.Result, error){"enroll": (*device).enroll, "renew": (*device).renew, "rekey": (*device).rekey} {
		t.Run(name, func(t *testing.T) {
			c := new(clock)
			site := newSite(t, testserver.Config{Now: c.now})
			d := site.device(t, "moved")
			if d.now = c.now; name != "enroll" {
				d.mustEnroll()
			}
			site.deferring(t, 2, 24*time.Hour)
			_, err := run(d)
			before := d.wantPending(err)
			first := d.csrs()
			c.advance(time.Hour)
			d.cfg.ServerURI += "/moved" // for the same server answers
			_, err = run(d)
			pending := d.wantPending(err)
			if csrs := d.csrs(); len(csrs) != 1 || csrs[0] != first[0] || !d.warned("was begun with "+site.uri.String()) {
				t.Errorf("%d requests, or other bytes; events %+v", len(csrs), d.events)
			}
			if !pending.NotBefore.After(before.NotBefore) || pending.Deadline.Sub(before.Deadline) < 59*time.Minute {
				t.Errorf("pending %+v, before %+v", pending, before)
			}
			sessions := d.opened
			_, err = run(d)
			if d.wantPending(err); d.opened != sessions || d.warned("was begun with") {
				t.Errorf("asked again, events %+v", d.events)
			}
			c.advance(25 * time.Hour)
			d.cfg.ServerURI = site.uri.String() // and back
			result := must(t, func() (*estenroll.Result, error) { return run(d) })
			if csrs := d.csrs(); !result.Recovered || len(csrs) != 1 || csrs[0] != first[0] {
				t.Errorf("result %+v, %d requests", result, len(csrs))
			}
		})
	}
}

// What another server has issued is proven to the one that is configured by now, which
// the run says.
func TestProofServerChanged(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "moved")
	d.hook = after(2, "before Dial", func() error { return est.ErrUnreachable })
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrUnproven)
	d.hook = nil
	d.cfg.ServerURI += "/moved"
	if result := d.mustEnroll(); !result.Recovered || !d.warned("the new certificate is of "+d.site.uri.String()) {
		t.Errorf("result %+v, events %+v", result, d.events)
	}
	d.tidy(1)
}

// A clock that was set back does not keep the device waiting.
func TestPendingClockSetBack(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "set-back")
	site.deferring(t, 1, time.Minute)
	d.now = func() time.Time { return time.Now().Add(time.Hour) }
	_, err := d.enroll()
	d.wantPending(err)
	d.now = time.Now
	d.mustEnroll()
	d.tidy(1)
	if d.issued() != 1 {
		t.Errorf("%d certificates issued", d.issued())
	}
}

// A device that boots in 1970 is told to wait, and its clock is set before it
// asks again: nobody has waited for decades.
func TestPendingClockSet(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "set")
	d.cfg.BuildTime = site.born
	site.deferring(t, 2, time.Minute)
	d.now = func() time.Time { return time.Unix(100, 0) }
	_, err := d.enroll()
	d.wantPending(err)
	c := new(clock)
	c.advance(time.Minute)
	d.now = c.now
	_, err = d.enroll()
	if left := d.wantPending(err).Deadline.Sub(c.now()); left < 6*24*time.Hour {
		t.Errorf("given up in %s", left)
	}
	c.advance(2 * time.Minute)
	d.mustEnroll()
	d.tidy(1)
	if d.issued() != 1 {
		t.Errorf("%d certificates issued", d.issued())
	}
}

// A request that stays pending for too long is given up, and what was created
// for it is removed.
func TestGivenUp(t *testing.T) {
	for name, enrolled := range map[string]bool{"enroll": false, "renew": true} {
		t.Run(name, func(t *testing.T) {
			c := new(clock)
			site := newSite(t, testserver.Config{Now: c.now, Lifetime: 30 * 24 * time.Hour})
			d := site.device(t, "given-up")
			d.now, d.cfg.PendingLimit = c.now, time.Hour
			run, credentials := d.enroll, 1
			var before snapshot
			if enrolled {
				d.mustEnroll()
				run, credentials, before = d.renew, 2, d.snapshot()
			}
			site.deferring(t, 9, time.Minute)
			_, err := run()
			d.wantPending(err)
			c.advance(59 * time.Minute)
			_, err = run()
			d.wantPending(err)
			c.advance(2 * time.Minute)
			sessions := d.opened
			_, err = run()
			wantError(t, err, estenroll.ErrGivenUp)
			if d.opened != sessions+1 {
				t.Errorf("the server was asked %d times before the request was given up, want once", d.opened-sessions)
			}
			if enrolled {
				d.unchangedSince(before)
			} else if objects := d.objects(); len(objects) != 0 {
				t.Errorf("left in the token: %q", objects)
			}
			if journal := d.journal(); journal.Operation != nil {
				t.Errorf("operation %+v", journal.Operation)
			}
			site.faults(t, testserver.Faults{})
			must(t, run)
			d.tidy(credentials)
		})
	}
}

// A server that says to come back after the deadline is asked then, once.
func TestPendingPastDeadline(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now})
	d := site.device(t, "patient")
	d.now, d.cfg.PendingLimit = c.now, time.Hour
	site.deferring(t, 1, 3*time.Hour)
	_, err := d.enroll()
	d.wantPending(err)
	c.advance(2 * time.Hour)
	sessions := d.opened
	_, err = d.enroll()
	d.wantPending(err)
	if d.opened != sessions {
		t.Error("the server was asked before its time")
	}
	c.advance(2 * time.Hour)
	if result := d.mustEnroll(); !result.Recovered {
		t.Errorf("result %+v", result)
	}
	d.tidy(1)
	if d.issued() != 1 {
		t.Errorf("%d certificates issued", d.issued())
	}
}

// Another padding is another CSR for an RSA key, and the same one for an EC key.
func TestPaddingChanged(t *testing.T) {
	for algorithm, want := range map[engine.Algorithm]bool{engine.RSA2048: true, engine.ECP256: false} {
		t.Run(string(algorithm), func(t *testing.T) {
			d := newSite(t, testserver.Config{}).device(t, "padded")
			d.cfg.KeySpec.Algorithm = algorithm
			d.site.deferring(t, 1, time.Second)
			_, err := d.enroll()
			d.wantPending(err)
			first := d.csrs()
			d.cfg.Request.PSS = true
			d.now = func() time.Time { return time.Now().Add(time.Minute) }
			if _, err := d.enroll(); want {
				d.wantPending(err) // it is a question of its own to the server
			} else if err != nil {
				t.Fatal(err)
			}
			if second := d.csrs(); len(first) != 1 || len(second) != 1 || (first[0] != second[0]) != want {
				t.Errorf("%d and %d requests, another CSR wanted: %t", len(first), len(second), want)
			}
		})
	}
}

// Another Subject or SAN in the configuration is another question: it is asked at
// once, for the same key.
func TestRequestChanged(t *testing.T) {
	san, err := csr.DNSName("device.example")
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*csr.Template){
		"subject": func(c *csr.Template) { c.RawSubject = subject(t, "CN=renamed") },
		"san":     func(c *csr.Template) { c.SANs = []csr.SAN{san} },
	} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "first-name")
			site.deferring(t, 1, time.Hour)
			_, err := d.enroll()
			d.wantPending(err)
			first, key := d.csrs(), d.journal().Operation.Key
			site.faults(t, testserver.Faults{})
			change(&d.cfg.Request)
			result := d.mustEnroll()
			csrs := d.csrs()
			if len(csrs) != 1 || csrs[0] == first[0] {
				t.Fatalf("%d requests, or the same bytes", len(csrs))
			}
			asked, err := x509.ParseCertificateRequest([]byte(csrs[0]))
			if err != nil {
				t.Fatal(err)
			}
			if string(asked.RawSubject) != string(d.cfg.Request.RawSubject) || len(asked.DNSNames) != len(d.cfg.Request.SANs) {
				t.Errorf("asked for %s, %q", asked.Subject, asked.DNSNames)
			}
			if result.Key.String() != key {
				t.Errorf("key %s, want %s", result.Key, key)
			}
			d.tidy(1)
		})
	}
}

// A renewal that is pending ends with the certificate that it renews, or with
// its key: the device is enrolled anew instead of asking in vain for ever.
func TestPendingRenewalHopeless(t *testing.T) {
	for name, lose := range map[string]func(*device, *clock){
		"expired":     func(_ *device, c *clock) { c.advance(2 * time.Hour) },
		"key gone":    func(d *device, _ *clock) { d.site.clear(d.t) },
		"not current": func(d *device, _ *clock) { d.write("security.json", d.initial) },
	} {
		t.Run(name, func(t *testing.T) {
			c := new(clock)
			site := newSite(t, testserver.Config{Now: c.now, Lifetime: time.Hour})
			d := site.device(t, "hopeless")
			d.now = c.now
			d.hook = after(1, "before GenerateKey", func() error { d.initial = d.read("security.json"); return nil })
			d.mustEnroll()
			site.deferring(t, 1, time.Second)
			_, err := d.renew()
			d.wantPending(err)
			site.faults(t, testserver.Faults{})
			lose(d, c)
			result := d.mustEnroll()
			if !result.Changed || result.Kind != estenroll.KindEnroll || !d.warned("is given up") {
				t.Errorf("result %+v, events %+v", result, d.events)
			}
			d.mustRenew()
			d.tidy(2)
		})
	}
}

// A new pair whose certificate expires before it could be proven is removed, and
// the run goes on with another request.
func TestExpiredUnproven(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now, Lifetime: time.Hour})
	d := site.device(t, "unproven")
	d.now = c.now
	d.hook = after(2, "before Dial", func() error { return errors.New("injected") })
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrUnproven)
	d.hook = nil
	c.advance(2 * time.Hour)
	if result := d.mustEnroll(); result.Recovered || !d.warned("expired before it was proven") {
		t.Errorf("result %+v, events %+v", result, d.events)
	}
	d.tidy(1)
	if d.issued() != 2 {
		t.Errorf("%d certificates issued", d.issued())
	}
}
