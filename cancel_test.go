package estenroll_test

import (
	"context"
	"testing"
	"time"

	"estenroll"
	"estenroll/est"
	"estenroll/testserver"
)

func (d *device) cancel() (ended *estenroll.Cancellation, err error) {
	d.t.Helper()
	err = d.run(func(c *estenroll.Credential) (err error) { ended, err = c.Cancel(d.ctx); return err })
	return ended, err
}

// What was begun and is not committed is ended, wherever a kill has left it, without the
// server: the token, the Security object and the files are as before, and the next run
// begins anew. What is committed is completed.
func TestCancel(t *testing.T) {
	for _, s := range []struct {
		kind   estenroll.Kind
		before []func(*device) (*estenroll.Result, error)
		run    func(*device) (*estenroll.Result, error)
		ask    est.Operation
	}{
		{estenroll.KindEnroll, nil, (*device).enroll, est.SimpleEnroll},
		{estenroll.KindRenew, []func(*device) (*estenroll.Result, error){(*device).enroll, (*device).renew}, (*device).renew, est.SimpleReenroll},
		{estenroll.KindRekey, []func(*device) (*estenroll.Result, error){(*device).enroll, (*device).rekey}, (*device).rekey, est.SimpleReenroll},
	} {
		for at, step := range map[string]estenroll.Step{
			"before GenerateKey": estenroll.StepGenerate, "after GenerateKey": estenroll.StepGenerate, "before " + string(s.ask): estenroll.StepRequest,
			"before StoreCertificates": estenroll.StepStore, "after StoreCertificates": estenroll.StepStore, "proof": estenroll.StepProve,
			"committed": estenroll.StepCommit, "before RemoveCertificates": estenroll.StepRetire,
		} {
			if s.kind == estenroll.KindRenew && step == estenroll.StepGenerate || s.kind == estenroll.KindEnroll && step == estenroll.StepRetire {
				continue
			}
			t.Run(string(s.kind)+" "+at, func(t *testing.T) {
				d := story{name: "cancelled", before: s.before}.prepare(t, newSite(t, testserver.Config{}), "device")
				before := d.snapshotOfEnrolled(s.kind)
				kill := func() error { panic(killed{at}) }
				switch at {
				case "proof":
					d.hook = after(2, "before Dial", kill)
				case "committed":
					// The proof is the only session that ends with crts.
					d.hook = after(2, "after "+string(est.CACerts), func() error {
						d.onProgress = func(e estenroll.Event) {
							if e.Step == estenroll.StepProve {
								panic(killed{at})
							}
						}
						return nil
					})
				default:
					d.hook = after(1, at, kill)
				}
				if _, err := s.run(d); err == nil {
					t.Fatal("not killed")
				}
				op := d.journal().Operation
				if op == nil || op.Step != string(step) {
					t.Fatalf("operation %+v, want one at step %s", op, step)
				}
				d.onProgress, d.hook = nil, func(when, call string) error {
					if call == "Dial" {
						t.Error("the server was asked")
					}
					return nil
				}
				ended, err := d.cancel()
				if err != nil || ended == nil || ended.Kind != s.kind || ended.Step != step {
					t.Fatalf("ended %+v, %v", ended, err)
				}
				pairs := len(s.before)
				if committed := step == estenroll.StepCommit || step == estenroll.StepRetire; committed {
					if ended.Completed == nil || !ended.Completed.Changed || ended.Key != nil {
						t.Errorf("ended %+v", ended)
					}
					pairs = max(pairs, 1)
				} else {
					d.unchangedSince(before)
					if hasKey, hasCert := ended.Key != nil, ended.Certificate != nil; ended.Completed != nil || hasKey != (s.kind != estenroll.KindRenew) || hasKey && ended.Key.String() != op.Key || hasCert != (len(op.Certificates) > 0) {
						t.Errorf("ended %+v of %+v", ended, op)
					}
					if last := d.status().LastAttempt; last.Kind != s.kind || last.Result != "cancelled" {
						t.Errorf("last attempt %+v", last)
					}
				}
				if journal := d.journal(); journal.Operation != nil || len(journal.Pairs) != pairs {
					t.Errorf("journal %+v", journal)
				}
				if again, err := d.cancel(); again != nil || err != nil {
					t.Errorf("a second time: %+v, %v", again, err)
				}
				d.hook = nil
				if result := must(t, func() (*estenroll.Result, error) { return s.run(d) }); result.Recovered {
					t.Errorf("result %+v", result)
				}
				d.tidy(min(len(d.journal().Pairs), 2))
			})
		}
	}
}

// snapshotOfEnrolled is what a device is brought back to: one that is not enrolled has
// had its Security object since the begin of its first boot.
func (d *device) snapshotOfEnrolled(kind estenroll.Kind) snapshot {
	d.t.Helper()
	if kind == estenroll.KindEnroll {
		d.hook = after(1, "before GenerateKey", func() error { panic(killed{"before the key"}) })
		if _, err := d.enroll(); err == nil {
			d.t.Fatal("not killed")
		}
		d.hook = nil
		if ended, err := d.cancel(); err != nil || ended == nil {
			d.t.Fatalf("ended %+v, %v", ended, err)
		}
	}
	return d.snapshot()
}

// A cancelled renewal is not begun again before the policy says so.
func TestCancelWaits(t *testing.T) {
	r := newRenewing(t, "cancelled", 90*day, nil)
	r.dueNow()
	r.site.deferring(t, 1, time.Hour)
	_, err := r.renewDue()
	r.wantPending(err)
	if _, err := r.cancel(); err != nil {
		t.Fatal(err)
	}
	r.idle(estenroll.RenewalWaits)
	r.site.faults(t, testserver.Faults{})
	r.dueNow()
	if result := must(t, r.renewDue); !result.Changed || result.Recovered {
		t.Errorf("result %+v", result)
	}
}

// What a reset has destroyed does not come back.
func TestCancelReset(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "reset")
	d.mustEnroll()
	reset := func() error { return d.run(func(c *estenroll.Credential) error { return c.Reset(t.Context()) }) }
	d.hook = after(1, "before RemoveKey", func() error { panic(killed{"before RemoveKey"}) })
	if reset() == nil {
		t.Fatal("not killed")
	}
	d.hook = nil
	_, err := d.cancel()
	wantError(t, err, estenroll.ErrReset)
	if err := reset(); err != nil || len(d.objects()) != 0 {
		t.Errorf("%v, left in the token: %q", err, d.objects())
	}
}

// A cancellation that is killed is gone on with by the next run, and Ctrl-C does not
// stop it in the middle.
func TestCancelInterrupted(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "interrupted")
	d.mustEnroll()
	for _, interrupt := range []func(context.CancelFunc) error{
		func(context.CancelFunc) error { panic(killed{"before RemoveKey"}) },
		func(stop context.CancelFunc) error { stop(); return nil },
	} {
		before := d.snapshot()
		d.hook = after(1, "before StoreCertificates", func() error { panic(killed{"before StoreCertificates"}) })
		if _, err := d.rekey(); err == nil {
			t.Fatal("not killed")
		}
		ctx, stop := context.WithCancel(t.Context())
		d.ctx, d.hook = ctx, after(1, "before RemoveKey", func() error { return interrupt(stop) })
		_, _ = d.cancel()
		d.ctx, d.hook = t.Context(), nil
		if _, err := d.cancel(); err != nil {
			t.Fatal(err)
		}
		stop()
		d.unchangedSince(before)
		d.tidy(1)
	}
}
