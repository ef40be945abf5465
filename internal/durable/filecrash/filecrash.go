// Package filecrash kills an unmodified program before or after each of its
// operations on the files of a directory (DESIGN.md §8). It builds a supervisor that
// runs the program and counts over all its threads with ptrace(2): per-thread counters,
// such as strace's, are not deterministic for a Go program. It is for tests, and
// needs gcc and the permission to trace an own child.
//
// Points, logs and the check that one was hit are those of p11crash.
package filecrash

import (
	"context"
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"estenroll/engine/enginetest/p11crash"
)

//go:embed testdata/filecrash.c
var source string

// Supervisor is the built supervisor.
type Supervisor struct {
	Path string
}

// Build compiles the supervisor into a directory of the test and tries it once: a
// machine that forbids ptrace, as some containers do, fails the test with those words.
func Build(t testing.TB) Supervisor {
	t.Helper()
	s := Supervisor{Path: filepath.Join(t.TempDir(), "filecrash")}
	compile := exec.CommandContext(t.Context(), "gcc", "-O1", "-Wall", "-Wextra", "-o", s.Path, "-x", "c", "-")
	compile.Stdin = strings.NewReader(source)
	if output, err := compile.CombinedOutput(); err != nil || len(output) > 0 {
		t.Fatalf("filecrash: compile (make deps installs gcc): %v\n%s", err, output)
	}
	if output, err := s.Command(t.Context(), os.DevNull, p11crash.Point{}, t.TempDir(), "true").CombinedOutput(); err != nil {
		t.Fatalf("filecrash: %v\n%s", err, output)
	}
	return s
}

// Command is the program with its operations on the files below the directory, an
// absolute path that need not exist yet, recorded in the log, and killed at the
// point. The zero Point only records. The command's own end is the program's.
func (s Supervisor) Command(ctx context.Context, log string, at p11crash.Point, directory, program string, args ...string) *exec.Cmd {
	side := string(at.When)
	if at == (p11crash.Point{}) {
		side = "none"
	}
	return exec.CommandContext(ctx, s.Path, append([]string{log, strconv.Itoa(at.Number), side, directory, program}, args...)...)
}
