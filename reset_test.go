package estenroll_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"estenroll"
	"estenroll/engine"
	"estenroll/testserver"
)

func (d *device) reset() (plan *estenroll.ResetPlan, err error) {
	d.t.Helper()
	err = d.run(func(c *estenroll.Credential) error {
		if plan, err = c.PlanReset(d.ctx); err != nil {
			return err
		}
		return c.Reset(d.ctx)
	})
	return plan, err
}

// factory holds a device to what it was before its first boot, but for the
// Security object, which points at the IDevID.
func (d *device) factory() {
	d.t.Helper()
	if objects := d.objects(); len(objects) != 0 {
		d.t.Errorf("objects:\n%s", strings.Join(objects, "\n"))
	}
	if files := d.files(); !slices.Equal(files, []string{"lock", "security.json"}) {
		d.t.Errorf("files %q", files)
	}
	if security := d.read("security.json"); strings.Count(security, "object=idevid;") != 2 || strings.Count(security, "object=") != 2 {
		d.t.Errorf("Security object %s", security)
	}
}

// A reset destroys what the plan says and leaves what the first boot begins with.
func TestReset(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "reset")
	if plan, err := d.reset(); err != nil || !plan.IsEmpty() || d.read("journal.json") != "" {
		t.Errorf("before the first boot: %+v, %v", plan, err)
	}
	var first string
	d.hook = func(when, call string) error {
		if when == "before" && call == "GenerateKey" {
			first = d.read("security.json")
		}
		return nil
	}
	d.mustEnroll()
	d.hook = nil
	d.mustRenew()
	kept := d.journal().Pairs
	plan, err := d.reset()
	if err != nil {
		t.Fatal(err)
	}
	d.factory()
	if diff := cmp.Diff(first, d.read("security.json")); diff != "" {
		t.Errorf("the Security object (-first boot +reset):\n%s", diff)
	}
	if len(plan.Keys) != 1 || len(plan.Certificates) != 2 || len(plan.Chain) != 1 || plan.Keys[0].String() != kept[0].Key {
		t.Errorf("plan %+v", plan)
	}
	_, err = d.renew()
	wantError(t, err, estenroll.ErrNotEnrolled)
	if result := d.mustEnroll(); result.Recovered || result.Key == plan.Keys[0] {
		t.Errorf("result %+v", result)
	}
	d.tidy(1)
}

// An operation that is unfinished, at any point, goes with a reset.
func TestResetUnfinished(t *testing.T) {
	for _, s := range stories {
		t.Run(s.name, func(t *testing.T) {
			site := newSite(t, testserver.Config{ServerKeyGen: true, PSKs: preShared})
			points := s.points(t, site)
			for n := 0; n < len(points); n += 5 {
				d := s.prepare(t, site, "reset")
				if _, err := d.interrupt(n, harms[0], s.run); err == nil {
					t.Fatalf("%s: not killed", points[n])
				}
				if _, err := d.reset(); err != nil {
					t.Errorf("%s: %v", points[n], err)
				}
				if d.read("security.json") != "" {
					d.factory()
				}
				site.clear(t)
			}
		})
	}
}

// A reset that is killed before or after any of its calls into the engine is gone
// on with by the next run, whatever that is.
func TestResetInterrupted(t *testing.T) {
	site := newSite(t, testserver.Config{})
	for n := 0; ; n += 2 {
		d := site.device(t, "interrupted")
		d.mustEnroll()
		d.mustRenew()
		before := d.snapshot()
		at, err := d.interrupt(n, harms[0], func(d *device) (*estenroll.Result, error) { _, err := d.reset(); return nil, err })
		if err == nil {
			if n < 10 {
				t.Errorf("%d points", n)
			}
			break
		}
		op := d.journal().Operation
		if op == nil {
			d.unchangedSince(before)
		}
		if status := d.status(); status.Current == nil || status.Current.Problem != "" {
			t.Errorf("%s: status %+v", at, status.Current)
		}
		switch {
		case op == nil || n%4 == 0:
			if _, err := d.reset(); err != nil {
				t.Errorf("%s: %v", at, err)
			}
			d.factory()
		default:
			d.mustEnroll()
			d.tidy(1)
		}
		site.clear(t)
	}
}

// What stands against a reset is said before anything is changed.
func TestResetRefused(t *testing.T) {
	site := newSite(t, testserver.Config{})
	for name, c := range map[string]struct {
		spoil func(*device)
		want  error
	}{
		"the token is another": {func(d *device) { site.clear(t) }, estenroll.ErrWrongToken},
		"the journal is lost":  {func(d *device) { d.remove("journal.json") }, estenroll.ErrState},
		"the IDevID is not there": {func(d *device) {
			d.cfg.IDevID.Certificate = site.address(t, "pkcs11:object=nothing;type=cert")
		}, estenroll.ErrIDevID},
	} {
		t.Run(name, func(t *testing.T) {
			d := site.device(t, "refused")
			d.mustEnroll()
			c.spoil(d)
			before, journal := d.snapshot(), d.read("journal.json")
			_, err := d.reset()
			wantError(t, err, c.want)
			d.unchangedSince(before)
			if diff := cmp.Diff(journal, d.read("journal.json")); diff != "" {
				t.Errorf("the journal changed:\n%s", diff)
			}
			site.clear(t)
		})
	}
}

// What the token has lost in part does not stand against the reset of the rest.
func TestResetAfterLoss(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "lost")
	d.mustEnroll()
	site.clear(t)
	d.mustEnroll()
	if _, err := d.reset(); err != nil {
		t.Error(err)
	}
	d.factory()
}

// A reset of one credential leaves the others alone; one that the configuration
// has no more takes its Security instance with it.
func TestResetOne(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "one")
	other := d.cfg.CredentialConfig
	other.Name, other.Security.Instance, other.Request.RawSubject = "other", 1, subject(t, "CN=other")
	d.others = []estenroll.CredentialConfig{other}
	d.mustEnroll()
	d.name = "other"
	d.mustEnroll()
	chain := func() int { return strings.Count(strings.Join(d.objects(), "\n"), "est-enroll-ca-") }
	if _, err := d.reset(); err != nil {
		t.Fatal(err)
	}
	if len(d.objects()) != 4 || chain() != 1 || !strings.Contains(d.read("security.json"), `"id": 1`) {
		t.Errorf("objects:\n%s\nSecurity object %s", strings.Join(d.objects(), "\n"), d.read("security.json"))
	}
	d.mustEnroll()
	d.others = nil
	d.name = "one"
	device, err := estenroll.Open(t.Context(), d.cfg.config())
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(device.Credential("other").Reset(t.Context()), device.Close())
	if err != nil {
		t.Fatal(err)
	}
	d.tidy(1)
	if security := d.read("security.json"); strings.Contains(security, `"id": 1`) {
		t.Errorf("Security object %s", security)
	}
	// The key of the IDevID is nobody's to destroy.
	if _, err := site.engine.Signer(t.Context(), site.idevid.Key); errors.Is(err, engine.ErrNotFound) {
		t.Error(err)
	}
}

// A key that was there before is no part of a reset, and the IDevID's even less.
func TestResetExistingKey(t *testing.T) {
	site := newSite(t, testserver.Config{})
	for name, key := range map[string]engine.Address{
		"another program's": site.owned(t, "EC:prime256v1", "owned", "77"),
		"the IDevID's":      site.idevid.Key,
	} {
		t.Run(name, func(t *testing.T) {
			d := site.device(t, "existing")
			d.cfg.Key = key
			before := d.objects()
			d.mustEnroll()
			d.mustRenew()
			plan, err := d.reset()
			if err != nil || len(plan.Keys) != 0 || len(plan.Certificates) != 2 {
				t.Errorf("plan %+v, %v", plan, err)
			}
			if diff := cmp.Diff(before, d.objects()); diff != "" {
				t.Errorf("objects (-before +after):\n%s", diff)
			}
			site.signs(t, key)
			d.mustEnroll()
			if _, err := d.reset(); err != nil {
				t.Error(err)
			}
		})
	}
}
