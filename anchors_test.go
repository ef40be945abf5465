package estenroll_test

import (
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"testing"

	"estenroll"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// anchorLabel is where the tests have a trust anchor stored.
func anchorLabel(anchor *x509.Certificate) string {
	return "ta-" + est.FingerprintOf(anchor).String()[:16]
}

// storesAnchors has the device keep its trust anchors in the token.
func (d *device) storesAnchors() {
	d.cfg.AnchorAddress = func(anchor *x509.Certificate) engine.Address {
		return d.site.address(d.t, "pkcs11:object="+anchorLabel(anchor))
	}
}

// anchors lists the trust anchors in the token.
func (s *site) anchors(t *testing.T) (labels []string) {
	t.Helper()
	for _, object := range s.objects(t) {
		if class, rest, _ := strings.Cut(object, " "); class == string(engine.ClassCertificate) && strings.HasPrefix(rest, "ta-") {
			label, _, _ := strings.Cut(rest, " ")
			labels = append(labels, label)
		}
	}
	return labels
}

func (s *site) holdsAnchors(t *testing.T, when string, anchors ...*x509.Certificate) {
	t.Helper()
	var want []string
	for _, anchor := range anchors {
		want = append(want, anchorLabel(anchor))
	}
	slices.Sort(want)
	if got := s.anchors(t); !slices.Equal(got, want) {
		t.Errorf("%s: the token has the trust anchors %q, want %q", when, got, want)
	}
}

// Trust anchors are stored where the callback says, counted over pairs and
// credentials, and removed with the last pair that has them.
func TestAnchorsInToken(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "storing")
	d.storesAnchors()
	d.mustEnroll()
	old := site.server.Root()
	site.holdsAnchors(t, "enrolled", old)
	if status := d.status(); len(status.Current.Anchors) != 1 || !strings.Contains(status.Current.Anchors[0], "object="+anchorLabel(old)) {
		t.Errorf("status %+v", status.Current)
	}
	made := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched})
	d.mustRenew()
	site.holdsAnchors(t, "switched", old, made.NewWithNew)
	d.tidy(2)

	// For another device of the same token they are somebody else's.
	other := site.device(t, "sharing")
	other.storesAnchors()
	other.cfg.ImplicitTA = d.cfg.ImplicitTA
	other.mustEnroll()
	site.holdsAnchors(t, "shared", old, made.NewWithNew)

	// So does another credential of the device, whose reset leaves them.
	second := d.cfg.CredentialConfig
	second.Name, second.Security.Instance, second.Request.RawSubject = "second", 1, subject(t, "CN=second")
	d.others = []estenroll.CredentialConfig{second}
	d.name = "second"
	d.mustEnroll()
	plan, err := d.reset()
	if err != nil || len(plan.Anchors) != 0 {
		t.Errorf("plan %+v, %v", plan, err)
	}
	site.holdsAnchors(t, "one of two is reset", old, made.NewWithNew)
	d.name, d.others = "storing", nil

	// Once nothing has the old one it goes, with the pair before the previous.
	site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverFinished})
	if _, err := other.reset(); err != nil {
		t.Fatal(err)
	}
	d.mustRenew()
	d.mustRenew()
	site.holdsAnchors(t, "finished", made.NewWithNew)
	d.tidy(2)

	// The setting is taken back.
	d.cfg.AnchorAddress = nil
	d.mustRenew()
	site.holdsAnchors(t, "the previous pair has it", made.NewWithNew)
	d.mustRenew()
	site.holdsAnchors(t, "not wanted any more")
	d.storesAnchors()
	d.mustRenew()
	site.holdsAnchors(t, "wanted again", made.NewWithNew)
	if plan, err := d.reset(); err != nil || len(plan.Anchors) != 1 {
		t.Errorf("plan %+v, %v", plan, err)
	}
	if objects := d.objects(); len(objects) != 0 {
		t.Errorf("after the reset there are %q", objects)
	}
}

// What the token does not store, or somebody else has stored, is no reason to go
// without a certificate, and is not removed.
func TestAnchorsNotStored(t *testing.T) {
	site := newSite(t, testserver.Config{})
	root := site.server.Root()
	for _, c := range []struct {
		name, warning string
		prepare       func(*device)
		leaves        []*x509.Certificate
	}{
		{name: "refused", warning: "is not stored in the token: ", prepare: func(d *device) {
			stored := 0
			d.hook = func(when, call string) error {
				if when+" "+call == "before StoreCertificates" {
					if stored++; stored > 1 { // the chain is
						return &engine.Error{Op: "store certificates", Err: engine.ErrTokenFull}
					}
				}
				return nil
			}
		}},
		{name: "a key's id", warning: "its id is that of a key", prepare: func(d *device) {
			key, err := site.engine.(engine.Lister).List(t.Context(), site.idevid.Key)
			if err != nil {
				t.Fatal(err)
			}
			d.cfg.AnchorAddress = func(anchor *x509.Certificate) engine.Address {
				return site.address(t, fmt.Sprintf("pkcs11:object=ta;id=%%%02x", key[0].ID[0]))
			}
		}},
		{name: "nowhere", prepare: func(d *device) { d.cfg.AnchorAddress = func(*x509.Certificate) engine.Address { return nil } }},
		{name: "another's", leaves: []*x509.Certificate{root}, prepare: func(d *device) {
			at, there, err := site.engine.(engine.AnchorStore).AnchorAddress(t.Context(), d.cfg.AnchorAddress(root), root)
			if err != nil || there {
				t.Fatal(there, err)
			}
			if err := site.engine.(engine.CertificateStore).StoreCertificates(t.Context(), []engine.Address{at}, []*x509.Certificate{root}); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer site.clear(t)
			d := site.device(t, "unstored-"+strings.NewReplacer(" ", "-", "'", "").Replace(c.name))
			d.storesAnchors()
			c.prepare(d)
			d.mustEnroll()
			if c.warning != "" && !d.warned(c.warning) {
				t.Errorf("events %+v", d.events)
			}
			site.holdsAnchors(t, "enrolled", c.leaves...)
			if pair := d.journal().Pairs[0]; len(pair.Anchors) != 0 {
				t.Errorf("the journal has %+v", pair.Anchors)
			}
			if _, err := d.reset(); err != nil {
				t.Error(err)
			}
			site.holdsAnchors(t, "reset", c.leaves...)
		})
	}
}

// The trust anchors in a token that is full by them give way to the certificate.
func TestAnchorsGiveWay(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "full")
	d.storesAnchors()
	d.mustEnroll()
	d.hook = func(when, call string) error {
		if when+" "+call == "before StoreCertificates" && len(site.anchors(t)) > 0 {
			return &engine.Error{Op: "store certificates", Err: engine.ErrTokenFull}
		}
		return nil
	}
	for range 2 {
		if result := d.mustRenew(); !result.Changed || !d.warned("give way to the certificate") {
			t.Errorf("result %+v, events %+v", result, d.events)
		}
		d.tidy(2)
	}
	// The token does not let go of them: as full as before, and nothing is forgotten.
	full := d.hook
	d.hook = func(when, call string) error {
		if when+" "+call == "before RemoveCertificates" {
			return &engine.Error{Op: "remove certificates", Err: engine.ErrDeviceLost}
		}
		return full(when, call)
	}
	_, err := d.renew()
	wantError(t, err, engine.ErrTokenFull)
	d.hook = nil
	d.mustRenew()
	d.tidy(2)
}

// A renewal that is refused takes its trust anchors with it, and no other.
func TestAnchorsOfRefused(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "refused")
	d.storesAnchors()
	d.mustEnroll()
	old := site.server.Root()
	site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverAnnounced})
	d.hook = func(when, call string) error {
		if when+" "+call == "after simplereenroll" {
			serial := site.server.Issuances()[len(site.server.Issuances())-1].Serial
			return site.server.SetFaults(testserver.Faults{RefuseClients: []string{serial}})
		}
		return nil
	}
	_, err := d.renew()
	wantError(t, err, estenroll.ErrRefused)
	site.holdsAnchors(t, "refused", old)
	d.tidy(1)
}

// The removal of an anchor that nothing wants any more is interrupted, by a kill or by
// an error: it is not forgotten.
func TestInterruptedAnchorRemoval(t *testing.T) {
	site := newSite(t, testserver.Config{})
	story := story{name: "old anchor", before: []func(*device) (*estenroll.Result, error){
		(*device).newRoot, (*device).enroll, (*device).sleepThroughRollover, (*device).renew, (*device).finishRollover, (*device).renew,
	}, run: (*device).renew, credentials: 2}
	points := story.points(t, site)
	interrupted := 0
	for n, point := range points {
		if !strings.HasSuffix(point, "RemoveCertificates") {
			continue
		}
		for _, h := range harms {
			interrupted++
			d := story.prepare(t, site, fmt.Sprintf("%s-%d", h.name, n))
			site.holdsAnchors(t, "before", d.cfg.ImplicitTA.Anchors()[0], site.server.Root())
			if at, err := d.interrupt(n, h, story.run); at != point || err == nil {
				t.Fatalf("at %q instead of %q: error %v", at, point, err)
			}
			must(t, func() (*estenroll.Result, error) { return story.run(d) })
			site.holdsAnchors(t, h.name+" "+point, site.server.Root())
			d.tidy(2)
			site.clear(t)
		}
	}
	if interrupted != 8 { // before and after the pair's certificates, and the anchor
		t.Errorf("%d interruptions, want 8: %q", interrupted, points)
	}
}

func (d *device) finishRollover() (*estenroll.Result, error) {
	d.site.rollOver(d.t, testserver.Rollover{Phase: testserver.RolloverFinished})
	return new(estenroll.Result), nil
}
