package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"estenroll"
	"estenroll/internal/agent"
	"estenroll/internal/durable"
)

func newTold(t *testing.T) (agent.Told, *[]string) {
	t.Helper()
	var warnings []string
	return agent.Told{Dir: t.TempDir(), LockTimeout: time.Minute, Command: "test", Warn: func(text string) { warnings = append(warnings, text) }}, &warnings
}

// A hook is told once of each certificate, when it succeeds: not of the same one
// again, but of another, of another credential's, and after it was forgotten.
func TestTold(t *testing.T) {
	t.Parallel()
	told, warnings := newTold(t)
	first, second := credential(t, "", "a", "").Chain[0], credential(t, "", "a", "").Chain[0]
	good, _ := script(t, "exit 0")
	bad, _ := script(t, "exit 1")
	tell := func(name string, hook agent.Hook, which int, want bool) {
		t.Helper()
		cert := first
		if which == 2 {
			cert = second
		}
		ran, err := told.Tell(t.Context(), name, cert, hook)
		if ran != want || (err != nil) != (hook.Path == bad.Path && want) || err != nil && !errors.Is(err, agent.ErrHook) {
			t.Errorf("%s: ran %t, %v, want %t", name, ran, err, want)
		}
	}
	tell("device", bad, 1, true) // it is owed until it succeeds
	tell("device", bad, 1, true)
	tell("device", good, 1, true)
	tell("device", bad, 1, false)
	tell("mqtt", good, 1, true)
	tell("device", bad, 2, true)
	tell("device", good, 2, true)
	tell("device", good, 2, false)
	for _, name := range []string{"device", "device", "never"} {
		if err := told.Forget(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	tell("mqtt", good, 1, false)
	tell("device", good, 2, true)
	for _, name := range []string{"device", "mqtt"} {
		if err := told.Forget(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(told.Dir, "hooks.json")); !errors.Is(err, os.ErrNotExist) || len(*warnings) > 0 {
		t.Errorf("%v, warnings %q", err, *warnings)
	}
}

// Runs that find the same certificate at the same instant tell the hook once.
func TestToldOnce(t *testing.T) {
	t.Parallel()
	told, _ := newTold(t)
	cert := credential(t, "", "a", "").Chain[0]
	hook, _ := script(t, "echo once >>\"${0%/*}/log\"")
	var ran atomic.Int32
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			did, err := told.Tell(t.Context(), "device", cert, agent.Hook{Name: hook.Name, Path: hook.Path, Timeout: hook.Timeout, Grace: hook.Grace})
			if err != nil {
				t.Error(err)
			}
			if did {
				ran.Add(1)
			}
		})
	}
	wait.Wait()
	if log := readFile(t, filepath.Join(filepath.Dir(hook.Path), "log")); ran.Load() != 1 || log != "once\n" {
		t.Errorf("told %d times: %q", ran.Load(), log)
	}
}

// What stands where the lock belongs is no other run, for which one would wait.
func TestToldNoLockFile(t *testing.T) {
	t.Parallel()
	told, _ := newTold(t)
	if err := os.Mkdir(filepath.Join(told.Dir, "hooks.lock"), 0o700); err != nil {
		t.Fatal(err)
	}
	hook, _ := script(t, "exit 0")
	ran, err := told.Tell(t.Context(), "device", credential(t, "", "a", "").Chain[0], hook)
	if ran || !errors.Is(err, durable.ErrNotLockFile) || errors.Is(err, estenroll.ErrBusy) {
		t.Errorf("ran %t, %v", ran, err)
	}
}

// What is no memory of ours is said, and the hook told again: once.
func TestToldUnusable(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"empty": "", "not JSON": "{", "unknown key": `{"version":1,"other":1}`, "version": `{"version":2}`, "name": `{"version":1,"told":{"../a":""}}`,
		"fingerprint": `{"version":1,"told":{"device":"00"}}`, "more": `{"version":1}{}`, "too large": strings.Repeat(" ", 1<<20), "nothing told": `{"version":1}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			told, warnings := newTold(t)
			if err := os.WriteFile(filepath.Join(told.Dir, "hooks.json"), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			cert := credential(t, "", "a", "").Chain[0]
			hook, _ := script(t, "exit 0")
			for _, want := range []bool{true, false} {
				if ran, err := told.Tell(t.Context(), "device", cert, hook); err != nil || ran != want {
					t.Errorf("ran %t, %v, want %t", ran, err, want)
				}
			}
			if (len(*warnings) == 0) != (name == "nothing told") {
				t.Errorf("warnings %q", *warnings)
			}
		})
	}
}
