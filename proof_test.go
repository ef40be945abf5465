package estenroll_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"estenroll"
	"estenroll/est"
	"estenroll/testserver"
)

// after does something when a call has happened n times.
func after(n int, want string, do func() error) func(when, call string) error {
	return func(when, call string) error {
		if when+" "+call != want {
			return nil
		}
		n--
		if n != 0 {
			return nil
		}
		return do()
	}
}

// A proof without an answer, or by a server whose clock is behind, decides
// nothing: the pair stays and the next run proves it, without a new request.
func TestProofUndecided(t *testing.T) {
	for name, cause := range map[string]error{
		"unreachable":   est.ErrUnreachable,
		"not yet valid": est.ErrCredentialNotYetValid,
		"server error":  &est.StatusError{Operation: est.CACerts, Code: "5.00 Internal Server Error", Class: 5},
		"crts pending":  &est.PendingError{Operation: est.CACerts},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{}).device(t, "undecided")
			// The second session is the proof.
			d.hook = after(2, "before Dial", func() error { return fmt.Errorf("injected: %w", cause) })
			_, err := d.enroll()
			wantError(t, err, estenroll.ErrUnproven)
			wantError(t, err, cause)
			if op := d.journal().Operation; op == nil || op.Step != "prove" {
				t.Fatalf("operation %+v", op)
			}
			if !strings.Contains(d.read("security.json"), "object=idevid") {
				t.Error("the Security object does not point at the IDevID any more")
			}
			d.hook = nil
			result := d.mustEnroll()
			if !result.Recovered || !result.Changed {
				t.Errorf("result %+v", result)
			}
			for _, r := range d.requests {
				if r.operation != est.CACerts {
					t.Errorf("%s was sent again", r.operation)
				}
			}
			d.tidy(1)
			if d.issued() != 1 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
	}
}

// The same on real sockets: nobody listens, or nobody answers.
func TestProofUnreachable(t *testing.T) {
	site := newSite(t, testserver.Config{})
	for name, closed := range map[string]bool{"refused": true, "silent": false} {
		t.Run(name, func(t *testing.T) {
			silent, err := net.ListenPacket("udp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer silent.Close()
			if closed {
				if err := silent.Close(); err != nil {
					t.Fatal(err)
				}
			}
			d := site.device(t, name)
			d.cfg.Tries = 2
			d.hook = after(2, "before Dial", func() error { d.elsewhere = silent.LocalAddr().String(); return nil })
			_, err = d.enroll()
			wantError(t, err, estenroll.ErrUnproven)
			wantError(t, err, est.ErrUnreachable)
			d.hook, d.elsewhere = nil, ""
			if result := d.mustEnroll(); !result.Recovered {
				t.Errorf("result %+v", result)
			}
			d.tidy(1)
			if d.issued() != 1 {
				t.Errorf("%d certificates issued", d.issued())
			}
			site.clear(t)
		})
	}
}

// The server goes away exactly for the proof, and asks for nothing when it is
// back: what is tried is bounded, and tried again.
func TestProofIsRetried(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "retried")
	d.cfg.Tries = 3
	dials := 0
	d.hook = func(when, call string) error {
		if when+" "+call == "before Dial" {
			if dials++; dials == 2 || dials == 3 {
				return est.ErrUnreachable
			}
		}
		return nil
	}
	d.mustEnroll()
	if dials != 4 {
		t.Errorf("%d connections, want 4", dials)
	}
	d.tidy(1)
}

// A server that asks for no certificate proves nothing.
func TestProofWithoutAuthentication(t *testing.T) {
	for name, breakSession := range map[string]func(*device){
		"not asked": func(d *device) { d.authenticated = new(bool) },
		"not known": func(d *device) {
			dial := d.cfg.Dial
			d.cfg.Dial = func(ctx context.Context, with estenroll.Connection) (est.Session, error) {
				session, err := dial(ctx, with)
				return struct{ est.Session }{session}, err
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{}).device(t, "silent")
			whole := d.cfg
			breakSession(d)
			_, err := d.enroll()
			wantError(t, err, estenroll.ErrUnproven)
			if strings.Contains(d.read("security.json"), "silent") {
				t.Error("the Security object points at a pair that was not proven")
			}
			d.authenticated, d.cfg = nil, whole
			d.mustEnroll()
			d.tidy(1)
			if d.issued() != 1 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
	}
}

// refusals are the ways in which a server refuses a certificate.
var refusals = map[string]string{"in the handshake": "", "by 4.01": "4.01", "by 4.03": "4.03"}

// The server refuses the new pair and accepts the old one: the new one goes and
// everything is as before.
func TestNewPairRefused(t *testing.T) {
	for name, code := range refusals {
		t.Run("enroll, "+name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "refused")
			site.faults(t, testserver.Faults{RefuseIssued: true, RefuseCode: code})
			_, err := d.enroll()
			wantError(t, err, estenroll.ErrRefused)
			if objects := d.objects(); len(objects) != 0 {
				t.Errorf("left in the token: %q", objects)
			}
			if !strings.Contains(d.read("security.json"), "object=idevid;type=cert") {
				t.Error("the Security object does not point at the IDevID")
			}
			if journal := d.journal(); journal.Operation != nil || len(journal.Pairs) != 0 || journal.LastAttempt.Result != "failed" {
				t.Errorf("journal %+v", journal)
			}
			site.faults(t, testserver.Faults{})
			d.mustEnroll()
			d.tidy(1)
		})
		t.Run("renew, "+name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "refused")
			d.mustEnroll()
			d.mustRenew()
			before := d.snapshot()
			// The newest is refused, and no other.
			d.hook = after(1, "after simplereenroll", func() error {
				issued := site.server.Issuances()
				return site.server.SetFaults(testserver.Faults{RefuseClients: []string{issued[len(issued)-1].Certificate}, RefuseCode: code})
			})
			_, err := d.renew()
			wantError(t, err, estenroll.ErrRefused)
			d.unchangedSince(before)
			d.tidy(2)
			d.hook = nil
			site.faults(t, testserver.Faults{})
			d.mustRenew()
			d.tidy(2)
		})
	}
}

// The new pair is refused and the old one gets no answer: whether it is the new one or
// everything that is refused is not known, and both stay.
func TestOldPairUndecided(t *testing.T) {
	for name, run := range map[string]func(*device) (*estenroll.Result, error){"renew": (*device).renew, "rekey": (*device).rekey} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "undecided")
			old := d.mustEnroll()
			dials := 0
			d.hook = func(when, call string) error {
				switch when + " " + call {
				case "after simplereenroll":
					return d.refuseNewest()
				case "before Dial":
					if dials++; dials == 3 { // the request, the new pair's proof, the old one's
						return est.ErrUnreachable
					}
				}
				return nil
			}
			_, err := run(d)
			wantError(t, err, estenroll.ErrUnproven)
			wantError(t, err, est.ErrCredentialRefused)
			op := d.journal().Operation
			if op == nil || op.Step != "prove" || dials != 3 {
				t.Fatalf("operation %+v, %d sessions", op, dials)
			}
			if status := d.status(); status.Current.Certificate != old.CertificateAddress.String() || status.Current.Problem != "" {
				t.Errorf("status %+v", status.Current)
			}
			d.hook = nil
			site.faults(t, testserver.Faults{})
			if result := must(t, func() (*estenroll.Result, error) { return run(d) }); !result.Recovered || len(d.csrs()) != 0 {
				t.Errorf("result %+v, %d requests", result, len(d.csrs()))
			}
			d.tidy(2)
			if d.issued() != 2 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
	}
}

// refuseAfter lets the server refuse from the moment that the renewal has its
// certificate.
func (d *device) refuseAfter(faults testserver.Faults) {
	d.hook = after(1, "after simplereenroll", func() error { return d.site.server.SetFaults(faults) })
}

// Ctrl-C while a refused pair is removed: it is removed whole.
func TestDiscardCancelled(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "discarded")
	ctx, cancel := context.WithCancel(t.Context())
	d.ctx = ctx
	d.hook = func(when, call string) error {
		switch when + " " + call {
		case "after simpleenroll":
			return site.server.SetFaults(testserver.Faults{RefuseIssued: true})
		case "before RemoveCertificates":
			cancel()
		}
		return nil
	}
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrRefused)
	if ctx.Err() == nil {
		t.Fatal("nothing was removed")
	}
	if op, left := d.journal().Operation, d.objects(); op != nil || len(left) != 0 {
		t.Errorf("operation %+v, left in the token %q", op, left)
	}
}

// The server refuses everything: that says nothing of the new pair, and nothing
// is removed.
func TestAllPairsRefused(t *testing.T) {
	for name, code := range refusals {
		t.Run("enroll, "+name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "all-refused")
			d.hook = after(1, "after simpleenroll", func() error { return site.server.SetFaults(testserver.Faults{RefuseAll: true, RefuseCode: code}) })
			_, err := d.enroll()
			wantError(t, err, estenroll.ErrUnproven)
			if op := d.journal().Operation; op == nil || op.Step != "prove" {
				t.Fatalf("operation %+v", op)
			}
			d.hook = nil
			site.faults(t, testserver.Faults{})
			d.mustEnroll()
			d.tidy(1)
			if d.issued() != 1 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
		t.Run("renew, "+name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "all-refused")
			d.mustEnroll()
			security := d.read("security.json")
			d.refuseAfter(testserver.Faults{RefuseAll: true, RefuseCode: code})
			_, err := d.renew()
			wantError(t, err, estenroll.ErrUnproven)
			if d.read("security.json") != security {
				t.Error("the Security object changed")
			}
			d.hook = nil
			site.faults(t, testserver.Faults{})
			if result := d.mustRenew(); !result.Recovered {
				t.Errorf("result %+v", result)
			}
			d.tidy(2)
			if d.issued() != 2 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
	}
}

// The server refuses the new and the old pair and accepts the IDevID: the
// Security object points at that again, both pairs are kept, and the next
// enrolment begins anew.
func TestFallBack(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "fallen")
	old := d.mustEnroll()
	d.refuseAfter(testserver.Faults{RefuseIssued: true})
	_, err := d.renew()
	wantError(t, err, estenroll.ErrRefused)
	if !d.warned("points at the IDevID again") {
		t.Errorf("no warning: %+v", d.events)
	}
	d.fallenBack(old)

	d.hook = nil
	if _, err := d.renew(); !errors.Is(err, estenroll.ErrNotEnrolled) {
		t.Errorf("renew after the fall: %v", err)
	}
	site.faults(t, testserver.Faults{})
	result := d.mustEnroll()
	if !result.Changed || result.Recovered || result.Key == old.Key {
		t.Errorf("result %+v", result)
	}
	// The new pair and the newest of those that were kept: the next renewal
	// retires that one, and with it its key.
	d.tidy(2)
	d.mustRenew()
	d.tidy(2)
	keys := 0
	for _, o := range d.objects() {
		if strings.HasPrefix(o, "private ") {
			keys++
		}
	}
	if keys != 1 {
		t.Errorf("%d keys left", keys)
	}
}

// fallenBack: the Security object points at the IDevID and both pairs are there.
func (d *device) fallenBack(old *estenroll.Result) {
	d.t.Helper()
	security, journal := d.read("security.json"), d.journal()
	if !strings.Contains(security, "object=idevid;type=cert") || !strings.Contains(security, "object=idevid;type=private") {
		d.t.Error("the Security object does not point at the IDevID")
	}
	if journal.Operation != nil || len(journal.Pairs) != 2 || journal.Pairs[1].Certificates[0] != old.CertificateAddress.String() {
		d.t.Errorf("journal %+v", journal)
	}
	certs := 0
	for _, o := range d.objects() {
		if strings.HasPrefix(o, "cert "+d.name) {
			certs++
		}
	}
	if certs != 2 {
		d.t.Errorf("objects %q", d.objects())
	}
}

// A kill between the two writes of the fall: the Security object points at the
// IDevID, the journal still is at the proof.
func TestFallBackKilled(t *testing.T) {
	for name, restored := range map[string]bool{"still refused": false, "accepted again": true} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "killed-falling")
			// The Security object of before the first boot is the one of the fall.
			var idevid string
			d.hook = after(1, "before GenerateKey", func() error { idevid = d.read("security.json"); return nil })
			old := d.mustEnroll()
			d.refuseAfter(testserver.Faults{RefuseIssued: true})
			d.cfg.NoFallback = true
			_, err := d.renew()
			wantError(t, err, estenroll.ErrUnproven)
			d.write("security.json", idevid)
			d.hook, d.cfg.NoFallback = nil, false

			if restored {
				site.faults(t, testserver.Faults{})
				if result := d.mustRenew(); !result.Recovered || !result.Changed {
					t.Errorf("result %+v", result)
				}
				d.tidy(2)
				return
			}
			_, err = d.renew()
			wantError(t, err, estenroll.ErrRefused)
			d.fallenBack(old)
			site.faults(t, testserver.Faults{})
			d.mustEnroll()
			d.tidy(2)
		})
	}
}

func TestNoFallback(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "no-fallback")
	d.cfg.NoFallback = true
	d.mustEnroll()
	security := d.read("security.json")
	d.refuseAfter(testserver.Faults{RefuseIssued: true})
	_, err := d.renew()
	wantError(t, err, estenroll.ErrUnproven)
	if d.read("security.json") != security {
		t.Error("the Security object changed")
	}
	if op := d.journal().Operation; op == nil || op.Step != "prove" {
		t.Errorf("operation %+v", op)
	}
	d.hook = nil
	site.faults(t, testserver.Faults{})
	d.mustRenew()
	d.tidy(2)
}

// A session that cannot be closed cleanly does not undo what came through it.
func TestCloseFails(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "close-fails")
	d.closeErr = errors.New("injected: cannot close")
	d.mustEnroll()
	if !d.warned("injected: cannot close") {
		t.Errorf("no warning: %+v", d.events)
	}
	d.mustRenew()
	d.tidy(2)
	if d.issued() != 2 {
		t.Errorf("%d certificates issued", d.issued())
	}
}
