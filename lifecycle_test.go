package estenroll_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// The Security object points at the IDevID before a key is generated, and at the
// new pair in the end (DESIGN.md §7 rule 1).
func TestFirstBoot(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "first-boot")
	looked := false
	d.hook = func(when, call string) error {
		if when == "before" && call == "GenerateKey" {
			looked = true
			if security := d.read("security.json"); !strings.Contains(security, "object=idevid;type=private") || !strings.Contains(security, "object=idevid;type=cert") {
				t.Errorf("before the key is generated the Security object is %q", security)
			}
			// What a kill in here needs to be cleaned up after.
			if op := d.journal().Operation; op == nil || op.Step != "generate" || op.Key == "" {
				t.Errorf("before the key is generated the journal says %+v", op)
			}
		}
		return nil
	}
	result := d.mustEnroll()
	if !looked {
		t.Fatal("no key was generated")
	}
	if !result.Changed || result.Recovered || result.Kind != "enroll" || result.Certificate.Subject.CommonName != "first-boot" {
		t.Errorf("result %+v", result)
	}
	d.tidy(1)
	if d.issued() != 1 {
		t.Errorf("%d certificates issued", d.issued())
	}
	if d.opened != 2 {
		t.Errorf("%d sessions, want one for the request and one for the proof", d.opened)
	}
	status := d.status()
	if !status.Enrolled || status.Current == nil || status.Current.Certificate != result.CertificateAddress.String() || status.Current.Problem != "" {
		t.Errorf("status %+v", status)
	}
}

// A second enrolment is nothing to do: no request, no file changed.
func TestEnrolledAlready(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "again")
	first := d.mustEnroll()
	before, journal, sessions := d.snapshot(), d.read("journal.json"), d.opened
	again := d.mustEnroll()
	if again.Changed || again.Kind != "" || !again.Certificate.Equal(first.Certificate) || again.Key != first.Key {
		t.Errorf("result %+v", again)
	}
	if d.opened != sessions {
		t.Error("the server was asked")
	}
	d.unchangedSince(before)
	if diff := cmp.Diff(journal, d.read("journal.json")); diff != "" {
		t.Errorf("the journal changed:\n%s", diff)
	}
}

// A renewal keeps the key and exactly the previous pair; the next one retires it.
func TestRenew(t *testing.T) {
	t.Attr("shows", "RFC 7030 §3.3.2 (1)")
	d := newSite(t, testserver.Config{}).device(t, "renewed")
	enrolled := d.mustEnroll()
	key, certificate := enrolled.Key, enrolled.Certificate
	for round, credentials := range []int{2, 2, 2} {
		previous := d.journal().Pairs[0]
		result := d.mustRenew()
		if issued := d.site.server.Issuances(); issued[len(issued)-1].Client != est.FingerprintOf(certificate).String() {
			t.Errorf("round %d: asked as %s, not with the certificate that is renewed", round, issued[len(issued)-1].ClientSubject)
		}
		certificate = result.Certificate
		if !result.Changed || result.Kind != "renew" || result.Key != key {
			t.Errorf("round %d: result %+v", round, result)
		}
		if kept := d.journal().Pairs[1]; kept.Certificates[0] != previous.Certificates[0] {
			t.Errorf("round %d: kept %s, want %s", round, kept.Certificates[0], previous.Certificates[0])
		}
		d.tidy(credentials)
		if d.issued() != 2+round {
			t.Errorf("round %d: %d certificates issued", round, d.issued())
		}
	}
	if status := d.status(); len(status.Previous) != 1 || status.Previous[0].Problem != "" {
		t.Errorf("status %+v", status)
	}
}

// An enrolled device whose certificate has expired is enrolled again, with a new
// key; the old pair and its key go with the renewal after that.
func TestEnrollAfterExpiry(t *testing.T) {
	c := new(clock)
	d := newSite(t, testserver.Config{Lifetime: time.Hour, Now: c.now}).device(t, "expired")
	d.now = c.now
	first := d.mustEnroll()
	c.advance(2 * time.Hour)
	before, sessions := d.snapshot(), d.opened
	_, err := d.renew()
	wantError(t, err, estenroll.ErrExpired)
	if d.opened != sessions || d.journal().Operation != nil {
		t.Errorf("the renewal was begun: %d sessions", d.opened-sessions)
	}
	d.unchangedSince(before)
	result := d.mustEnroll()
	if !d.warned("expired") {
		t.Errorf("no warning: %+v", d.events)
	}
	if !result.Changed || result.Key == first.Key {
		t.Errorf("result %+v", result)
	}
	d.tidy(2)
	d.mustRenew()
	d.tidy(2)
	if objects := strings.Join(d.objects(), "\n"); strings.Count(objects, "private ") != 1 {
		t.Errorf("objects:\n%s", objects)
	}
}

// What the token has lost is enrolled again.
func TestEnrollAfterLoss(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "lost")
	first := d.mustEnroll()
	site.clear(t)
	if _, err := d.renew(); !errors.Is(err, engine.ErrNotFound) || !errors.Is(err, estenroll.ErrNotEnrolled) {
		t.Errorf("renew without a pair: %v", err)
	}
	result := d.mustEnroll()
	if !d.warned("not in the token any more") || result.Key == first.Key {
		t.Errorf("result %+v, events %+v", result, d.events)
	}
	d.mustRenew()
	d.tidy(2)
}

// The answer to a renewal is the certificate that the device has, or the one
// before: nothing is changed, a warning, and no loop.
func TestNotARenewal(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "identical")
	previous := d.mustEnroll().Certificate
	current := d.mustRenew().Certificate
	for name, cert := range map[string]*x509.Certificate{"current": current, "previous": previous} {
		t.Run(name, func(t *testing.T) {
			d.answer = func(operation est.Operation) []*x509.Certificate {
				if operation == est.CACerts {
					return nil
				}
				return []*x509.Certificate{cert}
			}
			before := d.snapshot()
			result := d.mustRenew()
			if result.Changed || result.Kind != "renew" || !result.Certificate.Equal(current) {
				t.Errorf("result %+v", result)
			}
			if !d.warned("no renewal") || len(d.csrs()) != 1 {
				t.Errorf("%d requests, events %+v", len(d.csrs()), d.events)
			}
			if last := d.journal().LastAttempt; last.Result != "unchanged" {
				t.Errorf("last attempt %+v", last)
			}
			d.unchangedSince(before)
			d.tidy(2)
		})
	}
	d.answer = nil
	d.mustRenew()
	d.tidy(2)
}

// A refused answer leaves the token and the Security object as they were, and
// says what is wrong.
func TestRefusedAnswer(t *testing.T) {
	for name, c := range map[string]struct {
		faults testserver.Faults
		want   error
	}{
		"another key":   {testserver.Faults{WrongKey: true}, est.ErrKeyMismatch},
		"expired":       {testserver.Faults{Expired: true}, est.ErrNotValidNow},
		"not yet valid": {testserver.Faults{NotYetValid: true}, est.ErrNotValidNow},
		"foreign chain": {testserver.Faults{ForeignChain: true}, est.ErrNotTrusted},
		"refused here":  {testserver.Faults{RefuseAll: true}, est.ErrCredentialRefused},
		"refused 4.01":  {testserver.Faults{RefuseAll: true, RefuseCode: "4.01"}, est.ErrCredentialRefused},
		"refused 4.03":  {testserver.Faults{RefuseAll: true, RefuseCode: "4.03"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "answer")
			site.faults(t, c.faults)
			check := func(err error, before snapshot, verified time.Time) {
				t.Helper()
				var status *est.StatusError
				if c.want == nil && (!errors.As(err, &status) || status.Code != "4.03 Forbidden") || c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("error %v, want %v", err, c.want)
				}
				var step *estenroll.StepError
				if !errors.As(err, &step) || step.Step != estenroll.StepRequest {
					t.Errorf("error %v, want one of step request", err)
				}
				d.unchangedSince(before)
				journal := d.journal()
				if journal.Operation != nil || journal.LastAttempt == nil || journal.LastAttempt.Result != "failed" {
					t.Errorf("journal %+v", journal)
				}
				if !journal.VerifiedNotBefore.Equal(verified) {
					t.Errorf("the verification time moved from %s to %s", verified, journal.VerifiedNotBefore)
				}
			}
			_, err := d.enroll()
			// The Security object and the lock are what a first boot begins with.
			first := d.snapshot()
			if len(first.Objects) != 0 || !strings.Contains(first.Security, "object=idevid") || len(first.Files) != 2 {
				t.Errorf("left behind: %+v", first)
			}
			check(err, first, time.Time{})

			site.faults(t, testserver.Faults{})
			d.mustEnroll()
			site.faults(t, c.faults)
			before, verified := d.snapshot(), d.journal().VerifiedNotBefore
			_, err = d.renew()
			check(err, before, verified)
			d.tidy(1)
		})
	}
}

// What is no answer to the CSR does not end it: the key and the CSR, which is made in
// the session, stay, and the next run sends the same bytes.
func TestRequestKept(t *testing.T) {
	status := &est.StatusError{Operation: est.SimpleEnroll, Code: "5.00 Internal Server Error", Class: 5}
	for name, c := range map[string]struct {
		at    string
		cause error
	}{
		"server error":        {"after simpleenroll", status},
		"no answer":           {"after simpleenroll", est.ErrUnreachable},
		"not sent":            {"before simpleenroll", est.ErrUnreachable},
		"an impostor":         {"before Dial", fmt.Errorf("%w: %w", est.ErrServerCertificate, est.ErrNotTrusted)},
		"an old certificate":  {"before Dial", fmt.Errorf("%w: %w", est.ErrServerCertificate, est.ErrNotValidNow)},
		"the server's clock":  {"before Dial", est.ErrCredentialNotYetValid},
		"the token went away": {"before CertificateAddresses", &engine.Error{Op: "plan certificates", Err: engine.ErrDeviceLost}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{}).device(t, "kept")
			d.hook = after(1, c.at, func() error { return c.cause })
			_, err := d.enroll()
			wantError(t, err, c.cause)
			op := d.journal().Operation
			if op == nil || op.Step != "request" || (len(op.CSR) > 0) == strings.HasSuffix(c.at, "Dial") {
				t.Fatalf("operation %+v", op)
			}
			d.hook = nil
			if result := d.mustEnroll(); !result.Recovered || result.Key.String() != op.Key {
				t.Errorf("result %+v", result)
			}
			if csrs := d.csrs(); len(csrs) != 1 || len(op.CSR) > 0 && csrs[0] != string(op.CSR) {
				t.Errorf("%d requests, or other bytes", len(csrs))
			}
			d.tidy(1)
			if d.issued() != 1 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
	}
}

// The CA certificates of a server judge the session that they came through: if
// they do not vouch for the server, it gets no CSR (RFC 9148 §3).
func TestCACertsDoNotVouch(t *testing.T) {
	t.Attr("shows", "RFC 9148 §9.1 (2)")
	t.Attr("shows", "RFC 9148 §9.1 (3)")
	site := newSite(t, testserver.Config{})
	d := site.device(t, "voucher")
	d.answer = func(operation est.Operation) []*x509.Certificate {
		if operation == est.CACerts {
			return []*x509.Certificate{site.server.FactoryRoot()}
		}
		return nil
	}
	_, err := d.enroll()
	wantError(t, err, est.ErrServerCertificate)
	wantError(t, err, est.ErrNotTrusted)
	if csrs := d.csrs(); len(csrs) != 0 {
		t.Errorf("%d CSRs were sent", len(csrs))
	}
	d.answer = nil
	d.mustEnroll()
	d.tidy(1)
}

// Status says what is wrong with a credential, and changes nothing.
func TestStatusProblem(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now, Lifetime: time.Hour})
	d := site.device(t, "problem")
	d.now = c.now
	if status := d.status(); status.Enrolled || status.Current != nil {
		t.Errorf("before the first boot: %+v", status)
	}
	d.mustEnroll()
	before := d.snapshot()
	problem := func() string {
		t.Helper()
		status := d.status()
		if !status.Enrolled || status.Current == nil {
			t.Fatalf("status %+v", status)
		}
		return status.Current.Problem
	}
	d.cfg.BuildTime = time.Unix(0, 0)
	d.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	if got := problem(); got != "expired" {
		t.Errorf("problem %q", got)
	}
	d.unchangedSince(before)
	site.clear(t)
	if got := problem(); !strings.HasPrefix(got, "not in the token") {
		t.Errorf("problem %q", got)
	}
}

// Ctrl-C is the context's error, and loses nothing.
func TestCancelled(t *testing.T) {
	for _, at := range []string{
		"before GenerateKey", "after GenerateKey", "before Dial", "before simpleenroll", "after simpleenroll", "after CertificateAddresses",
		"before StoreCertificates", "after StoreCertificates", "proof: before Dial", "proof: after Dial", "proof: before cacerts",
	} {
		t.Run(at, func(t *testing.T) {
			at, n := at, 1
			if call, ok := strings.CutPrefix(at, "proof: "); ok {
				at, n = call, 2
			}
			d := newSite(t, testserver.Config{}).device(t, "cancelled")
			d.cfg.Tries = 3
			ctx, cancel := context.WithCancel(t.Context())
			d.ctx, d.hook = ctx, after(n, at, func() error { cancel(); return nil })
			_, err := d.enroll()
			wantError(t, err, context.Canceled)
			if d.journal().Operation == nil {
				t.Error("the operation is lost")
			}
			d.ctx, d.hook = t.Context(), nil
			d.mustEnroll()
			d.tidy(1)
			if d.issued() != 1 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
	}
}
