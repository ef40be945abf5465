package estenroll_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll"
	"estenroll/est"
	"estenroll/internal/coap"
	"estenroll/testserver"
)

// rollOver brings the server's CA to a phase.
func (s *site) rollOver(t *testing.T, to testserver.Rollover) testserver.RolloverCertificates {
	t.Helper()
	made, err := s.server.Rollover(to)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// explicitTA returns the anchors of the newest pair's file.
func (d *device) explicitTA() []*x509.Certificate {
	d.t.Helper()
	certs, err := estenroll.ParseTrustAnchors([]byte(d.read(d.journal().Pairs[0].ExplicitTA)))
	if err != nil {
		d.t.Fatal(err)
	}
	anchors, err := est.NewTrustAnchors(certs)
	if err != nil {
		d.t.Fatal(err)
	}
	return anchors.Anchors()
}

func (d *device) trusts(when string, roots ...*x509.Certificate) {
	d.t.Helper()
	got := d.explicitTA()
	for _, root := range roots {
		if !slices.ContainsFunc(got, root.Equal) {
			d.t.Errorf("%s: %x is no anchor", when, root.SubjectKeyId)
		}
	}
	if len(got) != len(roots) {
		d.t.Errorf("%s: %d anchors, want %d", when, len(got), len(roots))
	}
}

// said reports whether an event that is no warning has a text.
func (d *device) said(text string) bool {
	return slices.ContainsFunc(d.events, func(e estenroll.Event) bool { return !e.Warning && strings.Contains(e.Message, text) })
}

// followsServer holds resource 4 of the Security object (usage 3, the default) to what
// the server shows.
func (d *device) followsServer() {
	d.t.Helper()
	if shown := base64.StdEncoding.EncodeToString(d.site.server.ServerChain()[0].Raw); !strings.Contains(d.read("security.json"), shown) {
		d.t.Error("the Security object has another certificate than the server")
	}
}

// A device that renews in each phase of a rollover trusts the new root as soon as
// the old one vouches for it, and the old one until nothing needs it.
func TestRollover(t *testing.T) {
	t.Attr("shows", "RFC 7030 §4.1.3 (2)")
	t.Attr("shows", "RFC 7030 §3.1 (3)")
	t.Attr("shows", "RFC 7030 §4.1.3 (4)")
	t.Attr("shows", "RFC 9148 §9.1 (1)")
	site := newSite(t, testserver.Config{})
	d := site.device(t, "rolled")
	d.mustEnroll()
	made := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverAnnounced})
	d.trusts("enrolled", made.OldWithOld)
	d.mustRenew()
	d.trusts("announced", made.OldWithOld, made.NewWithNew)
	if !d.said("is vouched for") {
		t.Errorf("events %+v", d.events)
	}
	site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched})
	result := d.mustRenew()
	d.trusts("switched", made.OldWithOld, made.NewWithNew)
	if result.Certificate.CheckSignatureFrom(site.server.Issuing()) != nil {
		t.Error("switched: renewed under the old root")
	}
	d.followsServer()
	site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverFinished})
	d.mustRenew()
	d.trusts("finished", made.NewWithNew)
	if !d.said("is needed no more") {
		t.Errorf("events %+v", d.events)
	}
	if slices.ContainsFunc(d.events, func(e estenroll.Event) bool { return e.Warning }) {
		t.Errorf("warnings in %+v", d.events)
	}
	d.tidy(2)
}

// An old anchor that the server does not publish any more stays while the current
// certificate is under it.
func TestOldAnchorKept(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "kept")
	d.mustEnroll()
	made := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched})
	d.answer = func(operation est.Operation) []*x509.Certificate {
		if operation != est.CACerts {
			return nil
		}
		return []*x509.Certificate{made.NewWithNew, site.server.Issuing(), made.NewWithOld}
	}
	d.mustRenew()
	d.trusts("the current one is under the old root", made.OldWithOld, made.NewWithNew)
	d.mustRenew()
	d.trusts("nothing is", made.NewWithNew)
	d.tidy(2)
}

// A root that nobody vouches for is left out, with a warning, as long as the server
// is judged without it; the operator's fingerprint makes it an anchor.
func TestRootNobodyVouchesFor(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "unvouched")
	d.mustEnroll()
	made := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverAnnounced, NoLinks: true})
	d.mustRenew()
	d.trusts("left out", made.OldWithOld)
	if print := est.FingerprintOf(made.NewWithNew).String(); !d.warned(print) || !d.warned("nor the operator vouches") {
		t.Errorf("events %+v", d.events)
	}
	d.cfg.AnchorFingerprints = []est.Fingerprint{est.FingerprintOf(made.NewWithNew)}
	d.mustRenew()
	d.trusts("with its fingerprint", made.OldWithOld, made.NewWithNew)
	d.tidy(2)
}

// A device that slept through a rollover is brought back: what it asks before it can
// judge the server is cacerts alone.
func TestSleptThroughRollover(t *testing.T) {
	// asked are the operations of a run, in their order, but for att.
	asked := func(d *device) (operations []est.Operation) {
		for _, r := range d.requests {
			if r.operation != est.CSRAttrs {
				operations = append(operations, r.operation)
			}
		}
		return operations
	}
	renewal := []est.Operation{est.CACerts, est.CACerts, est.SimpleReenroll, est.CACerts} // provisional, session, proof

	t.Run("renewal", func(t *testing.T) {
		site := newSite(t, testserver.Config{})
		d := site.device(t, "slept")
		d.mustEnroll()
		made := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched})
		if _, err := d.dryRun((*estenroll.Credential).PlanRenew); err != nil {
			t.Errorf("a dry run: %v", err)
		}
		d.mustRenew()
		if got := asked(d); !slices.Equal(got, renewal) {
			t.Errorf("asked %q", got)
		}
		d.trusts("brought back", made.OldWithOld, made.NewWithNew)
		d.followsServer()
		d.tidy(2)
		d.mustRenew()
		if got := asked(d); !slices.Equal(got, renewal[1:]) {
			t.Errorf("the renewal after it asked %q", got)
		}
	})

	t.Run("two rollovers and the certificate", func(t *testing.T) {
		c := new(clock)
		site := newSite(t, testserver.Config{Lifetime: time.Hour, Now: c.now})
		d := site.device(t, "overslept")
		d.now = c.now
		d.mustEnroll()
		site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverFinished})
		last := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverFinished})
		c.advance(2 * time.Hour)
		must(t, d.renewDue)
		if got := asked(d); !slices.Equal(got, []est.Operation{est.CACerts, est.CACerts, est.SimpleEnroll, est.CACerts}) {
			t.Errorf("asked %q", got)
		}
		d.trusts("enrolled again", last.NewWithNew)
		d.tidy(2)
		c.advance(time.Minute)
		d.mustRenew()
		d.tidy(2)
	})

	t.Run("in the box", func(t *testing.T) {
		site := newSite(t, testserver.Config{})
		d := site.device(t, "boxed")
		made := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverFinished})
		d.mustEnroll()
		d.trusts("first boot after the rollover", made.NewWithNew)
		d.tidy(1)
	})

	t.Run("with a request that is pending", func(t *testing.T) {
		site := newSite(t, testserver.Config{})
		d := site.device(t, "patient")
		d.mustEnroll()
		site.deferring(t, 1, 0)
		_, err := d.renew()
		d.wantPending(err)
		csr := d.csrs()
		site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched})
		site.deferring(t, 1, 0)
		_, err = d.renew()
		d.wantPending(err)
		if got := asked(d); !slices.Equal(got, renewal[:3]) {
			t.Errorf("asked %q", got)
		}
		// What it has learned is kept for the next run, and for other programs.
		if err := d.run(func(c *estenroll.Credential) error {
			public, err := c.Public(d.ctx)
			if err == nil && !slices.ContainsFunc(public.TrustAnchors, site.server.Root().Equal) {
				t.Error("the new root is not among the trust anchors that are shown")
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		d.mustRenew()
		if got := asked(d); !slices.Equal(got, renewal[1:]) {
			t.Errorf("the next run asked %q", got)
		}
		if got := d.csrs(); len(csr) != 1 || !slices.Equal(got, csr) {
			t.Error("another CSR was sent")
		}
		d.tidy(2)
	})

	t.Run("only the certificate", func(t *testing.T) {
		t.Attr("shows", "RFC 7030 §3.3.1 (3)")
		c := new(clock)
		site := newSite(t, testserver.Config{Lifetime: time.Hour, Now: c.now})
		d := site.device(t, "lapsed")
		d.now = c.now
		d.mustEnroll()
		site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched})
		d.mustRenew()
		site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverFinished, NoLinks: true})
		c.advance(2 * time.Hour)
		// The Implicit TA is the old root: as the IDevID too, the Explicit TA judges.
		must(t, d.renewDue)
		if got := asked(d); !slices.Equal(got, []est.Operation{est.CACerts, est.SimpleEnroll, est.CACerts}) {
			t.Errorf("asked %q", got)
		}
		// And where the operator names another root, that one does.
		site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverFinished, NoLinks: true})
		c.advance(2 * time.Hour)
		_, err := d.renewDue()
		wantError(t, err, est.ErrNotVouched)
		if d.cfg.ImplicitTA, err = est.NewTrustAnchors([]*x509.Certificate{site.server.Root()}); err != nil {
			t.Fatal(err)
		}
		c.advance(time.Hour)
		must(t, d.renewDue)
		d.trusts("led elsewhere", site.server.Root())
		d.tidy(2)
	})

	t.Run("before the proof", func(t *testing.T) {
		site := newSite(t, testserver.Config{})
		d := site.device(t, "unproven")
		d.mustEnroll()
		d.hook = func(when, call string) error {
			if call == "Dial" && strings.Contains(d.read("journal.json"), `"step": "prove"`) {
				return est.ErrUnreachable
			}
			return nil
		}
		_, err := d.renew()
		wantError(t, err, estenroll.ErrUnproven)
		d.hook = nil
		site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched})
		d.mustRenew()
		if got := asked(d); !slices.Equal(got, []est.Operation{est.CACerts, est.CACerts}) || d.issued() != 2 {
			t.Errorf("asked %q, issued %d", got, d.issued())
		}
		d.followsServer()
		d.tidy(2)
	})

	t.Run("nobody vouches", func(t *testing.T) {
		site := newSite(t, testserver.Config{})
		d := site.device(t, "abandoned")
		d.mustEnroll()
		made := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched, NoLinks: true})
		before := d.snapshot()
		_, err := d.renew()
		wantError(t, err, est.ErrServerCertificate)
		wantError(t, err, est.ErrNotVouched)
		if got := asked(d); !slices.Equal(got, []est.Operation{est.CACerts}) {
			t.Errorf("asked %q", got)
		}
		d.unchangedSince(before)
		if !strings.Contains(err.Error(), est.FingerprintOf(made.NewWithNew).String()) {
			t.Errorf("%v does not name the root", err)
		}
		d.cfg.AnchorFingerprints = []est.Fingerprint{est.FingerprintOf(made.NewWithNew)}
		d.mustRenew()
		d.trusts("with its fingerprint", made.OldWithOld, made.NewWithNew)
		d.tidy(2)
	})
}

// A device without a trust anchor meets nobody whom it could judge: it asks for the
// roots at once, and only on a new session for more (RFC 7030 §4.1.1).
func TestFirstContact(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "first")
	d.cfg.ImplicitTA, d.cfg.AnchorFingerprints = est.NoTrustAnchors(), []est.Fingerprint{est.FingerprintOf(site.server.Root())}
	dialled := 0
	d.hook = func(when, call string) error {
		if when+" "+call == "before Dial" {
			dialled++
		}
		return nil
	}
	d.mustEnroll()
	if dialled != 3 || d.opened != 3 {
		t.Errorf("%d connections, %d of them to the end of the handshake, want 3: for the roots, for the request and for the proof", dialled, d.opened)
	}
	d.tidy(1)
}

// Who stands in the server's place gets the client's certificate and a question
// for cacerts. Whatever it answers, it gets no CSR, nothing of it is taken for an
// answer to the request that is pending with the server, and nothing that is kept
// changes.
func TestProvisionalSession(t *testing.T) {
	t.Attr("shows", "RFC 7030 §4.1.1 (3)")
	site := newSite(t, testserver.Config{})
	d := site.device(t, "beset")
	d.mustEnroll()
	site.deferring(t, 1, 0)
	_, err := d.renew()
	d.wantPending(err)
	csr, before := d.csrs(), d.snapshot()
	made := site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched})
	genuine := []*x509.Certificate{made.OldWithOld, made.OldWithNew, made.NewWithOld, made.NewWithNew, site.server.Issuing()}

	i := newImpostor(t)
	forged := *i.template // NewWithOld, but for who has signed it
	forged.Subject, forged.IsCA = made.NewWithOld.Subject, true
	link := i.sign(t, &forged)
	for _, c := range []struct {
		name   string
		answer func() *coap.Response
		want   error
	}{
		{"the roots of the server", func() *coap.Response { return certsOnly(t, genuine...) }, est.ErrServerCertificate},
		{"the roots of the server and its own", func() *coap.Response { return certsOnly(t, append(genuine, i.cert)...) }, est.ErrNotVouched},
		{"its own root", func() *coap.Response { return certsOnly(t, i.cert) }, est.ErrNotVouched},
		{"its own root of the server's name", func() *coap.Response { return certsOnly(t, i.cert, link) }, est.ErrNotVouched},
		{"come back tomorrow", func() *coap.Response {
			return &coap.Response{Code: codes.ServiceUnavailable, MaxAge: new(uint32(86400))}
		}, est.ErrServerCertificate},
		{"a refusal", func() *coap.Response { return &coap.Response{Code: codes.Unauthorized} }, est.ErrServerCertificate},
		{"nonsense", func() *coap.Response {
			return &coap.Response{Code: codes.Content, ContentFormat: new(uint16(281)), Body: []byte("nonsense")}
		}, est.ErrServerCertificate},
	} {
		t.Run(c.name, func(t *testing.T) {
			i.answerWith(c.answer)
			d.elsewhere = i.server.Addr().String()
			_, err := d.renew()
			wantError(t, err, c.want)
			var pending *estenroll.PendingError
			if errors.As(err, &pending) || errors.Is(err, est.ErrCredentialRefused) {
				t.Errorf("a stranger's word is taken for the server's: %v", err)
			}
			wantError(t, err, est.ErrServerCertificate)
			if got := i.answerWith(nil); len(got) != 1 || got[0].Path != "/.well-known/est/crts" || len(got[0].Body) > 0 || len(got[0].Query) > 0 {
				t.Errorf("asked %+v", got)
			}
			d.unchangedSince(before)
			if op := d.journal().Operation; op == nil || string(op.CSR) != csr[0] {
				t.Errorf("the operation is %+v", op)
			}
		})
	}
	d.elsewhere = ""
	d.mustRenew()
	if got := d.csrs(); !slices.Equal(got, csr) {
		t.Error("another CSR was sent")
	}
	d.tidy(2)
}

// impostor is a server of nobody's that takes every client.
type impostor struct {
	template *x509.Certificate
	cert     *x509.Certificate
	key      *ecdsa.PrivateKey
	server   *coap.Server
	mu       sync.Mutex // over what follows
	answer   func() *coap.Response
	requests []*coap.Request
}

func newImpostor(t *testing.T) *impostor {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i := &impostor{key: key, template: &x509.Certificate{
		Subject: pkix.Name{CommonName: "TEST ONLY impostor"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}}
	i.cert = i.sign(t, i.template)
	i.server, err = coap.Listen("127.0.0.1:0", coap.Config{
		Certificate: [][]byte{i.cert.Raw}, Key: key, Verify: func([]*x509.Certificate) error { return nil }, AckTimeout: 500 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := i.server.Serve(func(_ context.Context, req *coap.Request) *coap.Response {
			i.mu.Lock()
			defer i.mu.Unlock()
			i.requests = append(i.requests, req)
			return i.answer()
		}); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		if err := i.server.Close(); err != nil {
			t.Error(err)
		}
		serving.Wait()
	})
	return i
}

// answerWith changes the answer, and returns what was asked since the last change.
func (i *impostor) answerWith(answer func() *coap.Response) (asked []*coap.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	asked, i.requests, i.answer = i.requests, nil, answer
	return asked
}

// sign makes a certificate of the impostor's key.
func (i *impostor) sign(t *testing.T, template *x509.Certificate) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, template, i.key.Public(), i.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func certsOnly(t *testing.T, certs ...*x509.Certificate) *coap.Response {
	t.Helper()
	body, err := est.MarshalCertsOnly(certs)
	if err != nil {
		t.Fatal(err)
	}
	return &coap.Response{Code: codes.Content, ContentFormat: new(uint16(281)), Body: body}
}

// While the answer of cacerts is young, a renewal does without it; when the CA has
// changed all the same, it is asked for in the same session.
func TestCACertsInterval(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now})
	d := site.device(t, "sparing")
	d.cfg.CACertsInterval = time.Hour
	count := func() (n int) {
		for _, r := range d.requests {
			if r.operation == est.CACerts {
				n++
			}
		}
		return n - 1 // that of the proof
	}
	d.now = c.now
	d.mustEnroll()
	for _, step := range []struct {
		name    string
		advance time.Duration
		do      func()
		want    int
	}{
		{"young", time.Minute, func() {}, 0},
		{"the CA changes in the middle of it", time.Minute, func() {
			d.hook = func(when, call string) error {
				if when+" "+call == "before simplereenroll" {
					site.rollOver(t, testserver.Rollover{Phase: testserver.RolloverSwitched})
				}
				return nil
			}
		}, 1},
		{"the clock is set back", -30 * time.Second, func() { d.hook = nil }, 1},
		{"young again", time.Minute, func() {}, 0},
		{"old", 3 * time.Hour, func() {}, 1},
	} {
		c.advance(step.advance)
		step.do()
		d.mustRenew()
		if got := count(); got != step.want {
			t.Errorf("%s: asked %d times, want %d", step.name, got, step.want)
		}
	}
	// An inspection is of the server as it is now, however young the answer is.
	inspection, err := estenroll.Inspect(d.cfg.config())
	if err == nil {
		err = inspection.OpenToken(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	d.requests = nil
	if _, err := inspection.Credentials()[0].Contact(t.Context()); err != nil || count() != 0 { // it has no proof
		t.Errorf("inspected: asked %d times, %v", count()+1, err)
	}
	if err := inspection.Close(); err != nil {
		t.Fatal(err)
	}
	d.tidy(2)
}
