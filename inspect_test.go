package estenroll_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll"
	"estenroll/engine"
	"estenroll/testserver"
)

// An inspection finds what a run would work with and leaves all of it as it is, an
// operation that waits too.
func TestInspect(t *testing.T) {
	s := newSite(t, testserver.Config{})
	d := s.device(t, "inspected")
	inspect := func() (*estenroll.Inspection, *estenroll.CredentialInspection) {
		t.Helper()
		i, err := estenroll.Inspect(d.cfg.config())
		if err == nil {
			err = i.OpenToken(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		return i, i.Credentials()[0]
	}

	// Before the first boot.
	i, c := inspect()
	if _, err := c.Enrolled(t.Context()); !errors.Is(err, estenroll.ErrNotEnrolled) {
		t.Errorf("before the first boot: %v", err)
	}
	if contact, err := c.Contact(t.Context()); err != nil || contact.As != "the IDevID certificate" || !contact.Connected {
		t.Errorf("before the first boot: %+v, %v", contact, err)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it made the state directory: %v", err)
	}

	d.mustEnroll()
	s.faults(t, testserver.Faults{Defer: 1, DeferMaxAge: new(time.Hour)})
	var pending *estenroll.PendingError
	if _, err := d.renew(); !errors.As(err, &pending) {
		t.Fatalf("got %v, want a PendingError", err)
	}
	s.faults(t, testserver.Faults{})
	before, journal := d.snapshot(), d.read("journal.json")
	i, c = inspect()
	if e, err := c.Enrolled(t.Context()); err != nil || e.Chained != nil || e.Pointed != nil || e.Existing {
		t.Errorf("enrolled: %+v, %v", e, err)
	}
	if contact, err := c.Contact(t.Context()); err != nil || contact.As != "the current certificate" {
		t.Errorf("enrolled: %+v, %v", contact, err)
	}
	if waits := c.Pending(); waits == nil || !waits.NotBefore.Equal(pending.NotBefore) {
		t.Errorf("got %v, want %v", waits, pending)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	d.unchangedSince(before)
	if after := d.read("journal.json"); after != journal {
		t.Errorf("the journal is another:\n%s", cmp.Diff(journal, after))
	}
}

// A PIN that the token refuses in an inspection is remembered beside all that the
// journal has, and not where that is impossible: then none is tried.
func TestInspectRefusedPIN(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "inspected")
	d.mustEnroll()
	pairs := len(d.journal().Pairs)
	source := engine.PINSource{Path: "/etc/pin", Inode: 4711, Size: 5, ChangedAt: time.Unix(1_700_000_000, 5).UTC()}
	cfg, tried := d.cfg.config(), 0
	cfg.OpenEngine = func(context.Context, engine.PINSource) (engine.Engine, error) {
		tried++
		return nil, &engine.Error{Op: "open token", Err: &engine.PINError{Source: source, Err: engine.ErrPINIncorrect}}
	}
	open := func() error {
		t.Helper()
		i, err := estenroll.Inspect(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return errors.Join(i.OpenToken(t.Context()), i.Close())
	}
	run, err := estenroll.Open(t.Context(), d.cfg.config())
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, open(), estenroll.ErrBusy)
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
	if kept := d.journal().RefusedPIN; tried != 0 || kept != nil {
		t.Errorf("%d tries, kept %+v", tried, kept)
	}
	wantError(t, open(), engine.ErrPINIncorrect)
	after := d.journal()
	if tried != 1 || after.RefusedPIN == nil || !after.RefusedPIN.Same(source) || len(after.Pairs) != pairs {
		t.Errorf("%d tries, kept %+v", tried, after)
	}
}
