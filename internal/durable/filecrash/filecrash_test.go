package filecrash_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"estenroll/engine/enginetest/p11crash"
	"estenroll/internal/durable"
	"estenroll/internal/durable/filecrash"
)

// The program that is killed is this test binary, told so by its first argument: a Go
// program with several threads that replaces a file, or one that ends as it is told.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "replace" {
		var idle sync.WaitGroup
		for range 8 { // threads that open a file elsewhere
			idle.Go(func() { _, _ = os.ReadFile("/proc/self/stat") })
		}
		err := durable.WriteFile(filepath.Join(os.Args[2], "file"), []byte("new"), 0o600)
		idle.Wait()
		if err != nil {
			panic(err)
		}
		os.Exit(7)
	}
	os.Exit(m.Run())
}

// directory is one with an old file.
func directory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func exitCode(t *testing.T, err error) int {
	t.Helper()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("got %v", err)
	}
	return exit.ExitCode()
}

// Each operation of a replacement is a point, in its order; killed at each, the file
// is the old one before the rename and the new one after it.
func TestKillAtEveryOperation(t *testing.T) {
	t.Parallel()
	supervisor := filecrash.Build(t)
	run := func(dir string, at p11crash.Point) ([]p11crash.Point, error) {
		log := filepath.Join(t.TempDir(), "log")
		err := supervisor.Command(t.Context(), log, at, dir, os.Args[0], "replace", dir).Run()
		if at != (p11crash.Point{}) {
			if err := at.Hit(err, log); err != nil {
				t.Error(err)
			}
		}
		return p11crash.ReadLog(t, log), err
	}
	var points []p11crash.Point
	for i := range 5 {
		dir := directory(t)
		recorded, err := run(dir, p11crash.Point{})
		if code := exitCode(t, err); code != 7 {
			t.Errorf("exit code %d, want the program's", code)
		}
		if i > 0 && !cmp.Equal(points, recorded) {
			t.Fatalf("another sequence: %s", cmp.Diff(points, recorded))
		}
		points = recorded
	}
	var operations []string
	for i, point := range points {
		if point.Number != i/2+1 {
			t.Errorf("line %d is %s", i+1, point)
		}
		if point.When == p11crash.Before {
			operations = append(operations, point.Function)
		}
	}
	// What renameio and WriteFile do: the order of DESIGN.md §7.2.
	want := "open:.file# write:.file# fsync:.file# rename:file open:. fsync:."
	if got := strings.Join(operations, " "); got != want {
		t.Errorf("operations %s, want %s", got, want)
	}
	renamed := false
	for i, point := range points {
		dir := directory(t)
		passed, _ := run(dir, point)
		if diff := cmp.Diff(points[:i+1], passed); diff != "" {
			t.Errorf("killed at %s (-want +got):\n%s", point, diff)
		}
		renamed = renamed || point == (p11crash.Point{Number: point.Number, Function: "rename:file", When: p11crash.After})
		want := map[bool]string{false: "old", true: "new"}[renamed]
		if content, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(content) != want {
			t.Errorf("killed at %s: %q, %v, want %q", point, content, err, want)
		}
	}
}

func TestNotHit(t *testing.T) {
	t.Parallel()
	supervisor := filecrash.Build(t)
	dir, log := directory(t), filepath.Join(t.TempDir(), "log")
	point := p11crash.Point{Number: 100, Function: "fsync:.", When: p11crash.After}
	err := supervisor.Command(t.Context(), log, point, dir, os.Args[0], "replace", dir).Run()
	if code := exitCode(t, err); code != 7 {
		t.Errorf("exit code %d", code)
	}
	if err := point.Hit(err, log); err == nil || !strings.Contains(err.Error(), "not hit") {
		t.Errorf("got %v", err)
	}
}

// What cannot be watched does not run.
func TestMisused(t *testing.T) {
	t.Parallel()
	supervisor := filecrash.Build(t)
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	for want, args := range map[string][]string{
		"usage: ":                  {log, "0", "none", dir},
		"not a side of":            {log, "3", "none", dir, "true"},
		"not an absolute path":     {log, "0", "none", ".", "true"},
		"No such file or dir":      {filepath.Join(dir, "absent", "log"), "0", "none", dir, "true"},
		"no-program: No such file": {log, "0", "none", dir, filepath.Join(dir, "no-program")},
	} {
		out, err := exec.CommandContext(t.Context(), supervisor.Path, args...).CombinedOutput()
		if code := exitCode(t, err); code != 125 || !strings.Contains(string(out), want) {
			t.Errorf("%s: exit code %d, %s", fmt.Sprint(args), code, out)
		}
	}
}
