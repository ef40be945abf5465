package estenroll_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

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
	d := newSite(t, testserver.Config{}).device(t, "renewed")
	key := d.mustEnroll().Key
	for round, credentials := range []int{2, 2, 2} {
		previous := d.journal().Credentials[0]
		result := d.mustRenew()
		if !result.Changed || result.Kind != "renew" || result.Key != key {
			t.Errorf("round %d: result %+v", round, result)
		}
		if kept := d.journal().Credentials[1]; kept.Certificates[0] != previous.Certificates[0] {
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
// key, and the old pair goes with the renewal after.
func TestEnrollAfterExpiry(t *testing.T) {
	d := newSite(t, testserver.Config{Lifetime: time.Hour}).device(t, "expired")
	first := d.mustEnroll()
	d.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	before := d.snapshot()
	// The server's clock is not ours: it issues what is expired by ours.
	if _, err := d.enroll(); err == nil {
		t.Error("a certificate that is expired by our clock was accepted")
	}
	if !d.warned("expired") {
		t.Errorf("no warning: %+v", d.events)
	}
	d.unchangedSince(before)
	_ = first
}
