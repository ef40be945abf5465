// Package p11crash kills an unmodified program before or after each of its
// PKCS #11 calls (DESIGN.md §8). It builds a PKCS #11 module that stands between
// the program and the real module; the program is told to use it by its ordinary
// configuration. It is for tests, and needs gcc and the go command.
//
// Record a run, then run again from the same state once for each point:
//
//	module := p11crash.Build(t)
//	cmd.Env = append(cmd.Env, module.Env(softhsm, log, p11crash.Point{})...) // records
//	…
//	for _, point := range p11crash.ReadLog(t, log) {
//		cmd.Env = append(cmd.Env, module.Env(softhsm, newLog, point)...) // kills
//		err := cmd.Run()
//		if err := point.Hit(err, newLog); err != nil { … }
//	}
package p11crash

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

//go:embed testdata/p11crash.c
var source string

// When is a side of a call.
type When string

// The sides of a call.
const (
	Before When = "before" // the module has not been called
	After  When = "after"  // the module has returned, the program does not know yet
)

// Point is a place in a program's sequence of PKCS #11 calls. C_GetFunctionList is
// the first of them.
type Point struct {
	Number   int // of the call, from 1, over all threads of the process; 0 is no point
	Function string
	When     When
}

// String returns "12 C_Sign before".
func (p Point) String() string { return fmt.Sprintf("%d %s %s", p.Number, p.Function, p.When) }

// Module is the built module.
type Module struct {
	Path string
}

// Build compiles the module into a directory of the test. It takes about 0.1 s.
func Build(t testing.TB) Module {
	t.Helper()
	// The headers are those that the driver itself is built with. A test runs in
	// its package's directory, so the go command finds the module.
	headers, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		t.Fatalf("p11crash: find the headers: %v", describe(err))
	}
	module := Module{Path: filepath.Join(t.TempDir(), "p11crash.so")}
	compile := exec.CommandContext(t.Context(), "gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-pthread",
		"-I", strings.TrimSpace(string(headers)), "-o", module.Path, "-x", "c", "-", "-ldl")
	compile.Stdin = strings.NewReader(source)
	if output, err := compile.CombinedOutput(); err != nil || len(output) > 0 {
		t.Fatalf("p11crash: compile (make deps installs gcc): %v\n%s", err, output)
	}
	return module
}

// Env is what a program needs in its environment to have its calls into the real
// module recorded in the log, a file that is created or appended to, and to be
// killed at the point. The zero Point only records. A program that it starts
// inherits this, counts for itself and writes into the same log.
func (Module) Env(realModule, log string, at Point) []string {
	return []string{
		"P11CRASH_MODULE=" + realModule,
		"P11CRASH_LOG=" + log,
		"P11CRASH_AT=" + strconv.Itoa(at.Number),
		"P11CRASH_WHEN=" + string(at.When),
	}
}

// Fills is the environment that makes the module fill a file system at the point,
// with a file of this path, where it would kill.
func (Module) Fills(path string) string { return "P11CRASH_FILL=" + path }

// ReadLog reads the points that a run passed, in their order. A log that is
// missing, empty or malformed fails the test.
func ReadLog(t testing.TB, log string) []Point {
	t.Helper()
	points, err := readLog(log)
	if err != nil {
		t.Fatalf("p11crash: %v", err)
	}
	return points
}

func readLog(log string) ([]Point, error) {
	data, err := os.ReadFile(log)
	if err != nil {
		return nil, err
	}
	text, whole := strings.CutSuffix(string(data), "\n")
	if !whole {
		return nil, fmt.Errorf("%s: empty, or its last line is cut", log)
	}
	var points []Point
	for line := range strings.SplitSeq(text, "\n") {
		var p Point
		if _, err := fmt.Sscanf(line, "%d %s %s", &p.Number, &p.Function, &p.When); err != nil || p.String() != line {
			return nil, fmt.Errorf("%s: malformed line %q", log, line)
		}
		points = append(points, p)
	}
	return points, nil
}

// Hit says why a run was not killed at the point: runErr, what exec.Cmd's Run
// or Wait returned, must say that the process was killed, and the log, which was
// this run's alone, must end exactly at the point.
func (p Point) Hit(runErr error, log string) error {
	points, err := readLog(log)
	if err != nil {
		return fmt.Errorf("point %s: not hit: %w", p, err)
	}
	if last := points[len(points)-1]; last != p {
		return fmt.Errorf("point %s: not hit: the log ends at %s", p, last)
	}
	var exit *exec.ExitError
	if !errors.As(runErr, &exit) {
		return fmt.Errorf("point %s: not killed: %v", p, runErr)
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		return fmt.Errorf("point %s: not killed: %w", p, describe(runErr))
	}
	return nil
}

// describe adds what a command said to its error.
func describe(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return err
}
