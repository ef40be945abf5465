package estenroll_test

import (
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// story is a run that is interrupted, and what came before it.
type story struct {
	name        string
	before      []func(*device) (*estenroll.Result, error)
	run         func(*device) (*estenroll.Result, error)
	issued      int // in the end
	credentials int
	every       int // of the points
	server      testserver.Config
}

var stories = []story{
	{"first boot", nil, (*device).enroll, 1, 1, 1, testserver.Config{}},
	// The second renewal: it retires a certificate.
	{"renewal", []func(*device) (*estenroll.Result, error){(*device).enroll, (*device).renew}, (*device).renew, 3, 2, 1, testserver.Config{}},
	// The second rekey: it retires a certificate and destroys its key. Most of its
	// points are those of the others, and TestCrash has them all.
	{"rekey", []func(*device) (*estenroll.Result, error){(*device).enroll, (*device).rekey}, (*device).rekey, 3, 2, 3, testserver.Config{}},
	// The server wants another key than the one that is there when it is asked, and a
	// CSR that is linked to its session: the key is replaced, the CSR made in each.
	{"wanted", nil, (*device).enroll, 1, 1, 2, testserver.Config{CSRAttributes: wanting(csr.WantChallengePassword(), wantedKey("EC", "P-384")), RequirePoP: true}},
	// The server makes the key. Most points are those of the others, and TestCrash has
	// them all.
	{"skg", nil, (*device).enrollWithServerKey, 1, 1, 3, testserver.Config{ServerKeyGen: true}},
	// The same without an IDevID.
	{"psk", nil, func(d *device) (*estenroll.Result, error) { return d.withPSK().enrollWithServerKey() }, 1, 1, 5, testserver.Config{ServerKeyGen: true, PSKs: preShared}},
	// A renewal through a rollover that the device has slept through, with the trust
	// anchors in the token. It is the last: the others' devices trust the first root.
	{"rollover", []func(*device) (*estenroll.Result, error){(*device).newRoot, (*device).enroll, (*device).sleepThroughRollover}, (*device).renew, 2, 2, 2, testserver.Config{}},
}

func (d *device) enrollWithServerKey() (*estenroll.Result, error) {
	d.t.Helper()
	d.cfg.ServerKeyGen = true
	return d.enroll()
}

// newRoot ends the rollover before, if any, and has the device trust the root that
// issues: the site's own may be gone.
func (d *device) newRoot() (*estenroll.Result, error) {
	d.site.rollOver(d.t, testserver.Rollover{Phase: testserver.RolloverFinished, NoLinks: true})
	d.storesAnchors()
	var err error
	d.cfg.ImplicitTA, err = est.NewTrustAnchors([]*x509.Certificate{d.site.server.Root()})
	return new(estenroll.Result), err
}

func (d *device) sleepThroughRollover() (*estenroll.Result, error) {
	d.site.rollOver(d.t, testserver.Rollover{Phase: testserver.RolloverSwitched})
	return new(estenroll.Result), nil
}

// harm is what happens at a point.
type harm struct {
	name string
	do   func(at, call string) error
}

var harms = []harm{
	{"killed", func(at, _ string) error { panic(killed{at}) }},
	{"failed", func(_, call string) error {
		if isExchange(call) {
			return fmt.Errorf("injected: %w", est.ErrUnreachable)
		}
		return &engine.Error{Op: call, Err: fmt.Errorf("injected: %w", engine.ErrDeviceLost)}
	}},
}

func isExchange(call string) bool {
	return slices.Contains([]string{"Dial", string(est.CACerts), string(est.CSRAttrs), string(est.SimpleEnroll), string(est.SimpleReenroll), string(est.ServerKeyGen)}, call)
}

// points records the calls of the story, once uninterrupted.
func (s story) points(t *testing.T, site *site) (points []string) {
	d := s.prepare(t, site, "uninterrupted")
	d.hook = func(when, call string) error {
		points = append(points, when+" "+call)
		return nil
	}
	must(t, func() (*estenroll.Result, error) { return s.run(d) })
	d.tidy(s.credentials)
	site.clear(t)
	return points
}

func (s story) prepare(t *testing.T, site *site, name string) *device {
	d := site.device(t, strings.ReplaceAll(s.name, " ", "-")+"-"+name)
	for _, run := range s.before {
		must(t, func() (*estenroll.Result, error) { return run(d) })
	}
	return d
}

// interrupt does harm at the n-th point of a run.
func (d *device) interrupt(n int, h harm, run func(*device) (*estenroll.Result, error)) (at string, err error) {
	count := 0
	d.hook = func(when, call string) error {
		count++
		if count != n+1 {
			return nil
		}
		at = when + " " + call
		return h.do(at, call)
	}
	defer func() { d.hook = nil }()
	_, err = run(d)
	return at, err
}

// A run that is interrupted before or after any call into the engine and any
// part of an exchange, by a kill or by an error, is made good by the next one:
// the same state, and one certificate issued (DESIGN.md §7 rules 2 and 6).
func TestInterrupted(t *testing.T) {
	for _, s := range stories {
		for _, h := range harms {
			t.Run(s.name+" "+h.name, func(t *testing.T) {
				site := newSite(t, s.server)
				points := s.points(t, site)
				if len(points) < 20 {
					t.Fatalf("%d points: %q", len(points), points)
				}
				for n, point := range points {
					if n%s.every != 0 || testing.Short() && n%7 != 0 {
						continue
					}
					t.Run(fmt.Sprintf("%d %s", n, point), func(t *testing.T) {
						d := s.prepare(t, site, fmt.Sprintf("%s-%d", h.name, n))
						at, err := d.interrupt(n, h, s.run)
						if at != point {
							t.Fatalf("at %q instead of %q: error %v", at, point, err)
						}
						// A device that was lost after it has generated the key comes back in the run.
						recovers := h.name == "failed" && (point == "after GenerateKey" || point == "after ImportKey")
						if (err == nil) != recovers {
							t.Fatalf("error %v", err)
						}
						want := s.issued
						switch {
						case recovers && s.before != nil:
							want++ // it is complete, and followed by another one
						case point == "before ImportKey":
							want++ // the key was nowhere but in the run's memory
						}
						// Once there is a Security object it points at a whole pair.
						if status := d.status(); d.read("security.json") != "" && (status.Current == nil || status.Current.Problem != "") {
							t.Errorf("after the harm the status is %+v, %+v", status, status.Current)
						}
						must(t, func() (*estenroll.Result, error) { return s.run(d) })
						d.tidy(s.credentials)
						if d.issued() != want {
							t.Errorf("%d certificates issued, want %d", d.issued(), want)
						}
					})
					site.clear(t)
				}
			})
		}
	}
}

// A run that is interrupted again and again still gets there.
func TestInterruptedAgainAndAgain(t *testing.T) {
	const seed = 20261124
	random := rand.New(rand.NewPCG(seed, seed))
	site := newSite(t, testserver.Config{ServerKeyGen: true, PSKs: preShared})
	for _, s := range stories {
		for round := range 6 {
			d := s.prepare(t, site, fmt.Sprintf("again-%d", round))
			var log []string
			want := s.issued
			for range 8 {
				h := harms[random.IntN(len(harms))]
				at, err := d.interrupt(random.IntN(16), h, s.run)
				if err == nil {
					break
				}
				if log = append(log, h.name+" "+at); at == "before ImportKey" {
					want++
				}
			}
			must(t, d.enroll)
			if journal := d.journal(); len(journal.Pairs) < s.credentials {
				must(t, d.renew)
			}
			d.tidy(s.credentials)
			if d.issued() != want {
				t.Errorf("%s, seed %d, %q: %d certificates issued, want %d", s.name, seed, log, d.issued(), want)
			}
			site.clear(t)
		}
	}
}

// Recover finishes what is left, and does nothing where nothing is.
func TestRecover(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "recovered")
	recoverIt := func() (result *estenroll.Result) {
		t.Helper()
		if err := d.run(func(c *estenroll.Credential) (err error) { result, err = c.Recover(t.Context()); return err }); err != nil {
			t.Fatal(err)
		}
		return result
	}
	if result := recoverIt(); result != nil || d.read("security.json") != "" {
		t.Errorf("before the first boot: %+v", result)
	}
	if _, err := d.interrupt(20, harms[0], (*device).enroll); err == nil {
		t.Fatal("not killed")
	}
	if result := recoverIt(); result == nil || !result.Recovered || !result.Changed {
		t.Errorf("result %+v", result)
	}
	d.tidy(1)
	if result := recoverIt(); result != nil {
		t.Errorf("a second time: %+v", result)
	}
	// What is not a pair, or not there, is no IDevID.
	d.cfg.IDevID.Certificate = d.site.address(t, "pkcs11:object=nothing;type=cert")
	d.site.clear(t)
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrIDevID)
	wantError(t, err, engine.ErrNotFound)
}

// The same where the server refuses the new pair: the removal of the new one,
// and the fall back to the IDevID, are interrupted. When the server is itself
// again the device gets there, and nothing is left of before.
func TestInterruptedRefusal(t *testing.T) {
	for _, s := range []struct {
		name  string
		begin []func(*device) (*estenroll.Result, error)
		run   func(*device) (*estenroll.Result, error)
		when  string // the server begins to refuse what it issued
		every int    // of the points
	}{
		{"first boot", nil, (*device).enroll, "after simpleenroll", 2},
		{"renewal", []func(*device) (*estenroll.Result, error){(*device).enroll, (*device).renew}, (*device).renew, "after simplereenroll", 3},
		{"rekey", []func(*device) (*estenroll.Result, error){(*device).enroll, (*device).rekey}, (*device).rekey, "after simplereenroll", 3},
	} {
		for _, h := range harms {
			t.Run(s.name+" "+h.name, func(t *testing.T) {
				site := newSite(t, testserver.Config{})
				attempt := func(n int) (d *device, points []string) {
					site.faults(t, testserver.Faults{})
					d = story{name: s.name, before: s.begin}.prepare(t, site, fmt.Sprintf("refused-%s-%d", h.name, n))
					d.hook = func(when, call string) error {
						at := when + " " + call
						if at == s.when {
							site.faults(t, testserver.Faults{RefuseIssued: true})
						}
						points = append(points, at)
						if len(points) == n+1 {
							return h.do(at, call)
						}
						return nil
					}
					if _, err := s.run(d); err == nil {
						t.Errorf("point %d: no error", n)
					}
					return d, points
				}
				_, points := attempt(-1)
				site.clear(t)
				first := slices.Index(points, s.when)
				for n := first; n < len(points); n += s.every {
					if testing.Short() && n%5 != 0 {
						continue
					}
					t.Run(fmt.Sprintf("%d %s", n, points[n]), func(t *testing.T) {
						d, _ := attempt(n)
						d.hook = nil
						// Once more while the server refuses, then when it is itself again.
						if _, err := s.run(d); err == nil {
							t.Error("the server refuses and there is no error")
						}
						if status := d.status(); status.Current == nil || status.Current.Problem != "" {
							t.Errorf("status %+v", status)
						}
						site.faults(t, testserver.Faults{})
						must(t, d.enroll)
						must(t, d.renew)
						must(t, d.renew)
						d.tidy(2)
					})
					site.clear(t)
				}
			})
		}
	}
}
