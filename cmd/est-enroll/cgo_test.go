package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Without cgo the program builds, and says what it is missing.
func TestWithoutCgo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	program := filepath.Join(dir, "est-enroll")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	run := exec.CommandContext(t.Context(), program, "enroll", "--state-dir", dir, "--server", "coaps://127.0.0.1",
		"--engine", "pkcs11:token=device?module-path=/usr/lib/softhsm/libsofthsm2.so", "--trust-anchors", "../../testdata/rfc9148/root.pem")
	out, err := run.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitToken || !strings.Contains(string(out), "built without cgo") {
		t.Errorf("got %v, want exit code %d and the reason:\n%s", err, exitToken, out)
	}
}
