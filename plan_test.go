package estenroll_test

import (
	"context"
	"crypto"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

type planner func(*estenroll.Credential, context.Context) (*estenroll.Plan, error)

// dryRun holds a dry run to changing nothing, not even the journal, and to asking for
// nothing but crts and att; what it generated it would have left.
func (d *device) dryRun(plan planner) (p *estenroll.Plan, err error) {
	d.t.Helper()
	before, journal, issued := d.snapshot(), d.read("journal.json"), d.issued()
	err = d.run(func(c *estenroll.Credential) (err error) {
		if p, err = plan(c, d.ctx); err != nil {
			return err
		}
		return c.DryRun(d.ctx, p)
	})
	requests := slices.Clone(d.requests)
	d.unchangedSince(before)
	if d.read("journal.json") != journal {
		d.t.Error("the journal was written")
	}
	if csrs := slices.DeleteFunc(requests, func(r sent) bool { return r.operation.Asks() }); len(csrs) > 0 || d.issued() != issued {
		d.t.Errorf("a certificate was asked for: %d, %d issued", len(csrs), d.issued()-issued)
	}
	return p, err
}

// A dry run says what a run does then, having had the server and the token do all
// that comes before the request: in each state that a device can be in.
func TestDryRun(t *testing.T) {
	down := func(r *renewing) { // an attempt that leaves an operation behind
		r.down = true
		if _, err := r.renew(); err == nil {
			r.t.Fatal("it did not fail")
		}
		r.down = false
	}
	for name, c := range map[string]struct {
		configure func(*device)
		before    func(*renewing)
		plan      planner
		want      estenroll.Plan // but for the time
		run       func(*renewing) (*estenroll.Result, error)
	}{
		"not due": {plan: (*estenroll.Credential).PlanRenewDue, want: estenroll.Plan{Kind: estenroll.KindRenew}},
		"due": {
			before: func(r *renewing) { r.clock.set(r.renewal().NextAttempt) },
			plan:   (*estenroll.Credential).PlanRenewDue, want: estenroll.Plan{Acts: true, Kind: estenroll.KindRenew},
			run: func(r *renewing) (*estenroll.Result, error) { return r.renewDue() },
		},
		"forced": {
			plan: (*estenroll.Credential).PlanRenew, want: estenroll.Plan{Acts: true, Kind: estenroll.KindRenew},
			run: func(r *renewing) (*estenroll.Result, error) { return r.renew() },
		},
		"rekey": {
			configure: func(d *device) { d.cfg.KeySpec.Algorithm = engine.ECP384 },
			plan:      (*estenroll.Credential).PlanRekey, want: estenroll.Plan{Acts: true, Kind: estenroll.KindRekey, NewKey: engine.ECP384},
			run: func(r *renewing) (*estenroll.Result, error) { return r.rekey() },
		},
		"rekey by policy": {
			configure: func(d *device) { d.cfg.Policy.RekeyEvery = 1 },
			before:    func(r *renewing) { r.dueNow() },
			plan:      (*estenroll.Credential).PlanRenewDue, want: estenroll.Plan{Acts: true, Kind: estenroll.KindRekey, NewKey: engine.ECP256},
			run: func(r *renewing) (*estenroll.Result, error) { return r.renewDue() },
		},
		"rekey by policy, forced": {
			configure: func(d *device) { d.cfg.Policy.RekeyEvery = 1 },
			plan:      (*estenroll.Credential).PlanRenew, want: estenroll.Plan{Acts: true, Kind: estenroll.KindRekey, NewKey: engine.ECP256},
			run: func(r *renewing) (*estenroll.Result, error) { return r.renew() },
		},
		"expired": {
			before: func(r *renewing) { r.clock.advance(100 * day) },
			plan:   (*estenroll.Credential).PlanRenewDue, want: estenroll.Plan{Acts: true, Kind: estenroll.KindEnroll, NewKey: engine.ECP256},
			run: func(r *renewing) (*estenroll.Result, error) { return r.renewDue() },
		},
		"enrolled": {
			before: func(r *renewing) { r.clock.advance(100 * day) },
			plan:   (*estenroll.Credential).PlanEnroll, want: estenroll.Plan{Acts: true, Kind: estenroll.KindEnroll, NewKey: engine.ECP256},
			run: func(r *renewing) (*estenroll.Result, error) { return r.enroll() },
		},
		"waiting": {
			before: func(r *renewing) { r.clock.set(r.renewal().NextAttempt); down(r) },
			plan:   (*estenroll.Credential).PlanRenewDue, want: estenroll.Plan{Kind: estenroll.KindRenew, Step: estenroll.StepRequest},
		},
		"unfinished": {
			before: func(r *renewing) {
				reach := r.hook
				r.hook = func(when, call string) error {
					if call == "GenerateKey" && when == "before" {
						panic(killed{"before the key"})
					}
					return nil
				}
				if _, err := r.rekey(); err == nil {
					r.t.Fatal("it was not killed")
				}
				r.hook = reach
			},
			plan: (*estenroll.Credential).PlanRenewDue,
			want: estenroll.Plan{Acts: true, Kind: estenroll.KindRekey, Step: estenroll.StepGenerate, NewKey: engine.ECP256},
			run:  func(r *renewing) (*estenroll.Result, error) { return r.renewDue() },
		},
		"unproven": {
			before: func(r *renewing) {
				reach := r.hook
				r.hook = after(2, "before Dial", func() error { return fmt.Errorf("injected: %w", est.ErrUnreachable) })
				_, err := r.renew()
				wantError(r.t, err, estenroll.ErrUnproven)
				r.hook = reach
			},
			plan: (*estenroll.Credential).PlanRenew, want: estenroll.Plan{Acts: true, Kind: estenroll.KindRenew, Step: estenroll.StepProve},
			run: func(r *renewing) (*estenroll.Result, error) { return r.renew() },
		},
		"slept": { // with a renewal that is hopeless by now
			before: func(r *renewing) { down(r); r.clock.advance(100 * day) },
			plan:   (*estenroll.Credential).PlanRenewDue, want: estenroll.Plan{Acts: true, Kind: estenroll.KindEnroll, NewKey: engine.ECP256},
			run: func(r *renewing) (*estenroll.Result, error) { return r.renewDue() },
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRenewing(t, "dry", 90*day, c.configure)
			if c.before != nil {
				c.before(r)
			}
			next, dials := r.renewal(), r.dials
			p, err := r.dryRun(c.plan)
			if err != nil {
				t.Fatal(err)
			}
			if r.dials == dials {
				t.Error("the server was not met")
			}
			if at := p.At; c.want.Acts != at.Equal(r.clock.now()) || !c.want.Acts && !at.Equal(next.NextAttempt) {
				t.Errorf("at %s, of %+v", at, next)
			}
			p.At = time.Time{}
			if c.want.Step != estenroll.StepProve {
				c.want.Wants = []string{} // it was asked
			}
			if diff := cmp.Diff(c.want, *p); diff != "" {
				t.Errorf("plan (-want +got)\n%s", diff)
			}
			if c.run == nil {
				r.idle(next.State)
				return
			}
			if result, err := c.run(r); err != nil || result.Kind != p.Kind || !result.Changed {
				t.Errorf("then %+v, %v", result, err)
			}
			r.tidy(2)
		})
	}
}

// Where the token has lost the pair, the enrolment is planned, now or later.
func TestDryRunLost(t *testing.T) {
	r := newRenewing(t, "lost", 90*day, nil)
	r.site.clear(t)
	for _, acts := range []bool{false, true} {
		if acts {
			r.dueNow()
		}
		at := r.clock.now()
		p, err := r.dryRun((*estenroll.Credential).PlanRenewDue)
		if err != nil || p.Acts != acts || p.Kind != estenroll.KindEnroll || p.NewKey != engine.ECP256 || acts != p.At.Equal(at) {
			t.Errorf("at %s: plan %+v, %v", at, p, err)
		}
	}
	if result := must(t, r.renewDue); result.Kind != estenroll.KindEnroll {
		t.Errorf("then %+v", result)
	}
}

// What stands against a run stands against a dry run, with the same error.
func TestDryRunRefused(t *testing.T) {
	for name, c := range map[string]struct {
		before func(*renewing)
		plan   planner
		want   error
	}{
		"no answer":  {func(r *renewing) { r.down = true }, (*estenroll.Credential).PlanRenewDue, est.ErrUnreachable},
		"refused":    {func(r *renewing) { r.site.faults(r.t, testserver.Faults{RefuseIssued: true}) }, (*estenroll.Credential).PlanRenew, est.ErrCredentialRefused},
		"other name": {func(r *renewing) { r.cfg.ServerName = "other.example" }, (*estenroll.Credential).PlanRenew, est.ErrNotTrusted},
		"no use for the key": {
			func(r *renewing) { r.accepts = func(crypto.PublicKey) bool { return false } }, (*estenroll.Credential).PlanRenew, est.ErrKeyUnsuitable,
		},
		"expired": {
			func(r *renewing) { r.cfg.NoFallback = true; r.clock.advance(100 * day) }, (*estenroll.Credential).PlanRenewDue, estenroll.ErrExpired,
		},
		"key named": {
			func(r *renewing) { r.cfg.Key = r.cfg.IDevID.Key }, (*estenroll.Credential).PlanRekey, estenroll.ErrKeyNamed,
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRenewing(t, "dry", 90*day, nil)
			c.before(r)
			_, err := r.dryRun(c.plan)
			wantError(t, err, c.want)
		})
	}
}

// A dry run says what the server wants and what comes of it, and what stands against
// it, before there is a request.
func TestDryRunWanted(t *testing.T) {
	template, err := csr.WantRequest(csr.RequestTemplate{Subject: &csr.NameTemplate{{{Type: asn1.ObjectIdentifier{2, 5, 4, 4}}}}})
	if err != nil {
		t.Fatal(err)
	}
	linked := []csr.Attribute{wantedKey("EC", "P-384"), csr.WantChallengePassword(), wantedOID("2.5.4.5")}
	wants := []string{"key of type EC P-384", "link to the session", "serialNumber in the Subject"}
	ofKey := func(d *device) {
		d.cfg.Key, d.cfg.AllowExtractable = d.site.owned(d.t, "EC:prime256v1", "owned", "77"), true
	}
	for name, c := range map[string]struct {
		attributes []csr.Attribute
		configure  func(*device)
		newKey     engine.Algorithm
		wants      []string
		warned     string
		signatures int // of the handshake, the CSR, and that of a key that is named
		err        error
	}{
		"another key":    {linked, nil, engine.ECP384, wants, "serialNumber in the Subject", 1, nil},
		"not asked":      {linked, func(d *device) { d.cfg.IgnoreAttributes = true }, engine.ECP256, nil, "", 1, nil},
		"nothing":        {[]csr.Attribute{}, ofKey, "", []string{}, "", 3, nil},
		"a linked CSR":   {linked[1:2], ofKey, "", wants[1:2], "", 3, nil},
		"no link":        {linked[1:2], func(d *device) { d.cfg.PoP = estenroll.PoPOff }, engine.ECP256, wants[1:2], "linked to their session", 1, nil},
		"the key named":  {linked, ofKey, "", wants, "", 2, estenroll.ErrKeyWanted},
		"no value":       {[]csr.Attribute{template}, nil, engine.ECP256, []string{"Subject 2.5.4.4="}, "", 1, csr.ErrNoValue},
		"contradictory":  {[]csr.Attribute{wantedKey("RSA", "2048"), linked[0]}, nil, engine.ECP256, nil, "", 1, csr.ErrContradictory},
		"no such key":    {[]csr.Attribute{wantedKey("EC", "1.3.36.3.3.2.8.1.1.11")}, nil, engine.ECP256, nil, "", 1, estenroll.ErrKeyWanted},
		"no such signer": {[]csr.Attribute{wantedOID("1.2.840.10045.4.3.4")}, func(d *device) { ofKey(d); d.lacks = crypto.SHA512 }, "", []string{"key of type EC", "signature with SHA-512"}, "", 2, csr.ErrSignature},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{CSRAttributes: wanting(c.attributes...)}).device(t, "dry")
			if c.configure != nil {
				c.configure(d)
			}
			if err := d.run(func(*estenroll.Credential) error { return nil }); err != nil { // which makes the directory
				t.Fatal(err)
			}
			p, err := d.dryRun((*estenroll.Credential).PlanEnroll)
			if !errors.Is(err, c.err) || p == nil || p.NewKey != c.newKey {
				t.Fatalf("plan %+v, %v, want %v", p, err, c.err)
			}
			if diff := cmp.Diff(c.wants, p.Wants); diff != "" {
				t.Errorf("wants (-want +got)\n%s", diff)
			}
			if c.warned != "" && !d.warned(c.warned) || d.signatures != c.signatures {
				t.Errorf("%d signatures, want %d; events %v", d.signatures, c.signatures, d.events)
			}
		})
	}
}

// A pending answer is waited for by a dry run too, which has met the server all the
// same; when its time has come, it says that a run goes on.
func TestDryRunPending(t *testing.T) {
	r := newRenewing(t, "dry", 90*day, nil)
	hour := time.Hour
	r.site.faults(t, testserver.Faults{Defer: 1, DeferMaxAge: &hour})
	var pending *estenroll.PendingError
	if _, err := r.renew(); !errors.As(err, &pending) {
		t.Fatal(err)
	}
	dials := r.dials
	p, err := r.dryRun((*estenroll.Credential).PlanRenewDue)
	var again *estenroll.PendingError
	if !errors.As(err, &again) || !again.NotBefore.Equal(pending.NotBefore) || p.Acts || !p.At.Equal(pending.NotBefore) || r.dials == dials {
		t.Errorf("plan %+v, %v", p, err)
	}
	r.clock.set(pending.NotBefore)
	if p, err := r.dryRun((*estenroll.Credential).PlanRenewDue); err != nil || !p.Acts || p.Kind != estenroll.KindRenew || p.Step != estenroll.StepRequest {
		t.Errorf("plan %+v, %v", p, err)
	}
	if result := must(t, r.renewDue); !result.Changed {
		t.Errorf("result %+v", result)
	}
}

// A Security object that was lost is not restored by a dry run, which sees what a run
// would see; a device that was never enrolled has nothing to renew, and an enrolled one
// nothing to enrol.
func TestDryRunSecurityLost(t *testing.T) {
	r := newRenewing(t, "dry", 90*day, nil)
	if err := r.run(func(c *estenroll.Credential) error {
		if p, err := c.PlanEnroll(r.ctx); p != nil || err != nil {
			t.Errorf("plan %+v, %v", p, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	current := r.device.status().Current.Certificate
	r.write("security.json", `{"version":1}`)
	p, err := r.dryRun(func(c *estenroll.Credential, ctx context.Context) (*estenroll.Plan, error) {
		p, err := c.PlanRenew(ctx)
		if status, statusErr := c.Status(ctx); statusErr != nil || status.Enrolled {
			t.Errorf("what a run would restore is taken for what there is: %+v, %v", status, statusErr)
		}
		return p, err
	})
	if err != nil || p.Kind != estenroll.KindRenew {
		t.Errorf("plan %+v, %v", p, err)
	}
	if must(t, r.renewDue); r.device.status().Current.Certificate != current {
		t.Error("the Security object does not point at the pair that it had")
	}

	fresh := r.site.device(t, "fresh")
	wantError(t, fresh.run(func(c *estenroll.Credential) error { _, err := c.PlanRenewDue(fresh.ctx); return err }), estenroll.ErrNotEnrolled)
}

// A dry run asks for crts though it was asked for not long ago, and keeps nothing of
// what comes of it: what follows in the same process learns of a new root itself.
func TestDryRunRollover(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now})
	d := site.device(t, "dry")
	d.now, d.cfg.CACertsInterval = c.now, time.Hour
	d.mustEnroll()
	made := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverAnnounced})
	if _, err := d.dryRun((*estenroll.Credential).PlanRenew); err != nil {
		t.Fatal(err)
	}
	if len(d.requests) == 0 {
		t.Error("crts was not asked for")
	}
	d.trusts("dry", made.OldWithOld)
	c.advance(2 * time.Hour)
	if err := d.run(func(c *estenroll.Credential) error {
		p, err := c.PlanRenew(d.ctx)
		if err == nil {
			err = c.DryRun(d.ctx, p)
		}
		if err == nil {
			_, err = c.Renew(d.ctx)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	d.trusts("renewed", made.OldWithOld, made.NewWithNew)
}
