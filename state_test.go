package estenroll_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"estenroll"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// A device whose clock shows 1970 verifies with the build time and says so; one
// that requires a clock refuses, and loses nothing by it.
func TestClock1970(t *testing.T) {
	// The server's clock stands too: a certificate that begins after the newest
	// one that the device has verified is not yet valid to a device without a clock.
	now := time.Now()
	site := newSite(t, testserver.Config{Now: func() time.Time { return now }})
	d := site.device(t, "battery")
	d.cfg.BuildTime = site.born
	d.now = func() time.Time { return time.Unix(0, 0) }
	d.cfg.RequireClock = true
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrClock)
	if d.opened != 0 {
		t.Error("the server was asked")
	}
	d.cfg.RequireClock = false
	result := d.mustEnroll()
	if !d.warned("the system clock says 1970-01-01T00:00:00Z: verifying with") || !d.warned("the build's time") {
		t.Errorf("events %+v", d.events)
	}
	d.tidy(1)

	// What was verified moves the time forward, and it alone.
	verified := d.journal().VerifiedNotBefore
	if verified.Before(result.Certificate.NotBefore) || verified.After(time.Now()) {
		t.Errorf("verified until %s, the certificate begins at %s", verified, result.Certificate.NotBefore)
	}
	d.cfg.BuildTime = time.Unix(1000, 0)
	d.mustRenew()
	if !d.warned("the newest certificate this device has verified") {
		t.Errorf("events %+v", d.events)
	}
	warnings := 0
	for _, e := range d.events {
		if strings.Contains(e.Message, "the system clock says") {
			warnings++
		}
	}
	if warnings != 1 {
		t.Errorf("%d warnings of one clock", warnings)
	}
	d.tidy(2)
}

// The source of a PIN that the token refused is remembered, given to the next
// run and forgotten after a success.
func TestRefusedPIN(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "pin")
	source := engine.PINSource{Path: "/etc/pin", Inode: 4711, Size: 5, ChangedAt: time.Unix(1_700_000_000, 5).UTC()}
	open := d.cfg.OpenEngine
	var given []engine.PINSource
	answer := &engine.Error{Op: "open token", Err: &engine.PINError{Source: source, Err: engine.ErrPINIncorrect}}
	d.cfg.OpenEngine = func(ctx context.Context, refused engine.PINSource) (engine.Engine, error) {
		given = append(given, refused)
		if answer != nil {
			return nil, answer
		}
		return open(ctx, refused)
	}
	_, err := d.enroll()
	wantError(t, err, engine.ErrPINIncorrect)
	answer.Err = &engine.PINError{Source: source, Err: engine.ErrPINNotRetried}
	_, err = d.enroll()
	wantError(t, err, engine.ErrPINNotRetried)
	if kept := d.journal().RefusedPIN; kept == nil || !kept.Same(source) {
		t.Errorf("kept %+v", kept)
	}
	// what a person typed is not, and does not take the other's place
	answer.Err = &engine.PINError{Err: engine.ErrPINIncorrect}
	_, err = d.enroll()
	wantError(t, err, engine.ErrPINIncorrect)
	answer = nil
	d.mustEnroll()
	d.mustEnroll()
	if len(given) != 5 || !given[0].IsZero() || !given[1].Same(source) || !given[2].Same(source) || !given[3].Same(source) || !given[4].IsZero() {
		t.Errorf("given %+v", given)
	}
	d.tidy(1)
}

// A second run waits, then says who is at work; Ctrl-C is the context's error.
func TestLock(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "locked")
	first, err := estenroll.Open(t.Context(), d.cfg.config())
	if err != nil {
		t.Fatal(err)
	}
	impatient := d.cfg
	impatient.LockTimeout = 100 * time.Millisecond
	began := time.Now()
	_, err = estenroll.Open(t.Context(), impatient.config())
	wantError(t, err, estenroll.ErrBusy)
	if err != nil && !strings.Contains(err.Error(), fmt.Sprintf("(pid %d, since ", os.Getpid())) {
		t.Errorf("the error does not name the holder: %v", err)
	}
	if waited := time.Since(began); waited < impatient.LockTimeout {
		t.Errorf("waited for %s only", waited)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = estenroll.Open(ctx, d.cfg.config())
	if !errors.Is(err, context.Canceled) || errors.Is(err, estenroll.ErrBusy) {
		t.Errorf("cancelled: %v", err)
	}

	opened := make(chan error, 1)
	go func() {
		second, err := estenroll.Open(t.Context(), d.cfg.config())
		if err == nil {
			err = second.Close()
		}
		opened <- err
	}()
	if err := errors.Join(first.Close(), first.Close()); err != nil {
		t.Error(err)
	}
	if err := <-opened; err != nil {
		t.Errorf("after the first run: %v", err)
	}
}

// Without its journal the device still has what the Security object points at.
func TestJournalLost(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "forgetful")
	first := d.mustEnroll()
	d.remove("journal.json")
	if again := d.mustEnroll(); again.Changed || again.CertificateAddress != first.CertificateAddress {
		t.Errorf("result %+v", again)
	}
	d.mustRenew()
	d.tidy(2)
	if d.issued() != 2 {
		t.Errorf("%d certificates issued", d.issued())
	}
}

// Without its Security object the device has what the journal says: the newest
// credential that is whole, and only without one a new enrolment.
func TestSecurityLost(t *testing.T) {
	site := newSite(t, testserver.Config{})
	t.Run("enrolled", func(t *testing.T) {
		d := site.device(t, "amnesia")
		first := d.mustEnroll()
		d.remove("security.json")
		again := d.mustEnroll()
		if again.Changed || again.CertificateAddress != first.CertificateAddress || !d.warned("points at") {
			t.Errorf("result %+v, events %+v", again, d.events)
		}
		d.tidy(1)
		d.mustRenew()
		d.remove("security.json")
		d.mustRenew()
		d.tidy(2)
		if d.issued() != 3 {
			t.Errorf("%d certificates issued", d.issued())
		}
		site.clear(t)
	})
	t.Run("newest not whole", func(t *testing.T) {
		d := site.device(t, "half")
		old := d.mustEnroll()
		current := d.mustRenew()
		if err := site.engine.(engine.CertificateStore).RemoveCertificates(t.Context(), []engine.Address{current.CertificateAddress}); err != nil {
			t.Fatal(err)
		}
		d.remove("security.json")
		if again := d.mustEnroll(); again.Changed || again.CertificateAddress != old.CertificateAddress {
			t.Errorf("result %+v", again)
		}
		site.clear(t)
	})
	t.Run("nothing whole", func(t *testing.T) {
		d := site.device(t, "nothing")
		d.mustEnroll()
		site.clear(t)
		d.remove("security.json")
		if again := d.mustEnroll(); !again.Changed {
			t.Errorf("result %+v", again)
		}
		site.clear(t)
	})
	for _, at := range []string{"before Dial", "after simplereenroll", "before StoreCertificates"} {
		t.Run("renewing, "+at, func(t *testing.T) {
			d := site.device(t, "renewing-"+strings.ReplaceAll(at, " ", "-"))
			d.mustEnroll()
			d.hook = after(1, at, func() error { panic(killed{at}) })
			if _, err := d.renew(); err == nil {
				t.Fatal("not killed")
			}
			d.hook = nil
			d.remove("security.json")
			if result := d.mustRenew(); !result.Recovered {
				t.Errorf("result %+v", result)
			}
			d.tidy(2)
			if d.issued() != 2 {
				t.Errorf("%d certificates issued", d.issued())
			}
			site.clear(t)
		})
	}
	t.Run("first boot", func(t *testing.T) {
		d := site.device(t, "newborn")
		d.hook = after(1, "before GenerateKey", func() error { panic(killed{"GenerateKey"}) })
		if _, err := d.enroll(); err == nil {
			t.Fatal("not killed")
		}
		d.remove("security.json")
		d.hook = after(1, "before GenerateKey", func() error {
			if !strings.Contains(d.read("security.json"), "object=idevid") {
				t.Error("a key is generated and nothing points at the IDevID")
			}
			return nil
		})
		d.mustEnroll()
		d.tidy(1)
		site.clear(t)
	})
}

// Without its Explicit TA, or with one that is garbage, the device judges the
// server by what is configured, says so, and has one again after the next renewal.
func TestExplicitTALost(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "anchorless")
	d.mustEnroll()
	d.remove(d.journal().Pairs[0].ExplicitTA)
	d.mustRenew()
	if !d.warned("judged by the configured trust anchors") {
		t.Errorf("events %+v", d.events)
	}
	d.tidy(2)
	for name, content := range map[string]string{"not a certificate": "garbage", "too large": strings.Repeat("x", 1<<20)} {
		d.write(d.journal().Pairs[0].ExplicitTA, content)
		if result := d.mustEnroll(); result.Changed || !d.warned("judged by the configured trust anchors") {
			t.Errorf("%s: enroll: result %+v, events %+v", name, result, d.events)
		}
		d.mustRenew()
		if !d.warned("judged by the configured trust anchors") {
			t.Errorf("%s: renew: events %+v", name, d.events)
		}
		d.tidy(2)
		if got := d.read(d.journal().Pairs[0].ExplicitTA); !strings.HasPrefix(got, "-----BEGIN CERTIFICATE-----") {
			t.Errorf("%s: the renewal left %.20q", name, got)
		}
	}
}

// A kill between the commit and its record: the Security object points at the
// new pair, the journal does not know it.
func TestKilledInCommit(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "committing")
	d.mustEnroll()
	d.mustRenew()
	// The state of the proof, and the Security object of after the commit.
	var proving string
	d.hook = func(when, call string) error {
		if proving == "" && when+" "+call == "before Dial" && strings.Contains(d.read("journal.json"), `"step": "prove"`) {
			proving = strings.Replace(d.read("journal.json"), `"step": "prove"`, `"step": "commit"`, 1)
		}
		if when+" "+call == "before RemoveCertificates" {
			panic(killed{"retire"})
		}
		return nil
	}
	if _, err := d.renew(); err == nil || proving == "" {
		t.Fatalf("error %v, journal %q", err, proving)
	}
	d.hook = nil
	d.write("journal.json", proving)
	if result := d.mustRenew(); !result.Recovered || !result.Changed {
		t.Errorf("result %+v", result)
	}
	d.tidy(2)
	if d.issued() != 3 {
		t.Errorf("%d certificates issued", d.issued())
	}
}

// What killed writes left behind goes, and nothing else.
func TestTemporaries(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "temporary")
	d.mustEnroll()
	ta := d.journal().Pairs[0].ExplicitTA
	for _, name := range []string{".journal.json123", ".security.json7", "." + ta + "99"} {
		d.write(name, "half")
	}
	// Of an answer that the journal never came to refer to.
	d.write("explicit-ta-0123456789abcdef.pem", d.read(ta))
	d.mustEnroll()
	d.tidy(1)
}

// No run leaves a goroutine behind.
func TestGoroutines(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "goroutines")
	d.mustEnroll()
	before := runtime.NumGoroutine()
	for range 3 {
		d.mustRenew()
	}
	d.hook = after(1, "after simplereenroll", func() error { return errors.New("injected") })
	if _, err := d.renew(); err == nil {
		t.Error("no error")
	}
	// The server ends its side of each session in its own time.
	deadline := time.After(20 * time.Second)
	for runtime.NumGoroutine() > before+2 {
		select {
		case <-deadline:
			buffer := make([]byte, 1<<16)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buffer[:runtime.Stack(buffer, true)])
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// A state directory that cannot be made is an error, not a panic.
func TestStateDirImpossible(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "impossible")
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d.cfg.StateDir = filepath.Join(file, "state")
	if _, err := estenroll.Open(t.Context(), d.cfg.config()); err == nil {
		t.Error("no error")
	}
}

// The state directory of another user is refused before anything is written to
// it: the files of this run would lock that user out.
func TestStateDirOwner(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "stranger")
	owner := "root"
	if os.Geteuid() == 0 {
		if err := os.Mkdir(d.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(d.dir, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		owner = "65534"
		if nobody, err := user.LookupId(owner); err == nil {
			owner = nobody.Username
		}
	} else {
		d.dir = "/"
		d.cfg.StateDir = d.dir
	}
	before, err := os.ReadDir(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.enroll()
	wantError(t, err, estenroll.ErrOwner)
	if err != nil && !strings.Contains(err.Error(), "belongs to user "+owner+": run as that user") {
		t.Errorf("the error does not name the owner: %v", err)
	}
	if left, err := os.ReadDir(d.dir); err != nil || len(left) != len(before) {
		t.Errorf("the directory was changed: %v, %v", left, err)
	}
}

// A state directory that is open to others is a warning, once a run.
func TestStateDirOpen(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "open")
	d.mustEnroll()
	if d.warned("open to others") {
		t.Errorf("events %+v", d.events)
	}
	for _, mode := range []os.FileMode{0o750, 0o705, 0o777} {
		if err := os.Chmod(d.dir, mode); err != nil {
			t.Fatal(err)
		}
		d.mustRenew()
		if !d.warned(fmt.Sprintf("has mode %04o: it is open to others", mode)) {
			t.Errorf("mode %o: events %+v", mode, d.events)
		}
	}
}

// A configuration that names the IDevID in other words than the Security object,
// which has it since the first boot: it is not taken for an enrolled credential.
func TestIDevIDRenamed(t *testing.T) {
	for name, words := range map[string][2]string{
		"by more": {"pkcs11:object=idevid;type=", "pkcs11:object=idevid;id=%01;type="},
		"by less": {"pkcs11:object=idevid;id=%01;type=", "pkcs11:id=%01;type="},
	} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "reworded")
			use := func(words string) {
				d.cfg.IDevID.Key, d.cfg.IDevID.Certificate = site.address(t, words+"private"), site.address(t, words+"cert")
				d.cfg.Key = d.cfg.IDevID.Key
			}
			use(words[0])
			site.faults(t, testserver.Faults{WrongKey: true})
			_, err := d.enroll()
			wantError(t, err, est.ErrKeyMismatch)
			site.faults(t, testserver.Faults{})
			use(words[1])
			if status := d.status(); status.Enrolled || status.Current.Problem != "" {
				t.Errorf("status %+v, %+v", status, status.Current)
			}
			_, err = d.renew()
			wantError(t, err, estenroll.ErrNotEnrolled)
			if _, err := d.reset(); err != nil {
				t.Error(err)
			}
			if result := d.mustEnroll(); !result.Changed {
				t.Errorf("result %+v", result)
			}
			d.mustRenew()
		})
	}
}

// A configuration that has no IDevID any more: what the Security object has is still the
// factory's, and the first boot is by the pre-shared key. Without a journal an enrolled
// pair is told from it by its place.
func TestIDevIDConfiguredNoMore(t *testing.T) {
	site := newSite(t, testserver.Config{PSKs: preShared})
	d := site.device(t, "no-more")
	site.faults(t, testserver.Faults{RefuseAll: true})
	_, err := d.enroll()
	wantError(t, err, est.ErrCredentialRefused)
	site.faults(t, testserver.Faults{})
	d.withPSK().mustEnroll()
	d.tidy(1)
	d.remove("journal.json")
	if again := must(t, d.enroll); again.Changed || d.issued() != 1 {
		t.Errorf("enrolled again: %+v, %d issued", again, d.issued())
	}
	d.mustRenew()
}
