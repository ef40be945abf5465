// Package p11fault makes a token misbehave on request (DESIGN.md §8). It builds a
// PKCS #11 module that stands between an unmodified program and the real module;
// the program is told to use it by its ordinary configuration. It is for tests, and
// needs gcc and the go command. The faults are those that testdata/p11fault.c lists:
// files in a directory, which may come and go while the program runs.
package p11fault

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

//go:embed testdata/p11fault.c
var source string

// Build compiles the module into a directory and returns its path. It takes about
// 0.1 s, and is called in a package of this module, whose headers it needs.
func Build(directory string) (string, error) {
	// The headers are those that the driver itself is built with.
	headers, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		return "", fmt.Errorf("p11fault: find the headers: %w", err)
	}
	path := filepath.Join(directory, "p11fault.so")
	compile := exec.Command("gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra",
		"-I", strings.TrimSpace(string(headers)), "-o", path, "-x", "c", "-", "-ldl")
	compile.Stdin = strings.NewReader(source)
	if out, err := compile.CombinedOutput(); err != nil || len(out) > 0 {
		return "", fmt.Errorf("p11fault: compile (make deps installs gcc): %w\n%s", err, out)
	}
	return path, nil
}

// Env is the environment of a program whose calls go through the module to the real
// one, with the faults of a directory.
func Env(realModule, directory string) []string {
	return []string{"P11FAULT_MODULE=" + realModule, "P11FAULT_DIR=" + directory}
}

// KillsChildrenOf is the environment that makes the fault "lose" real: the children
// of a process are killed, such as those of a "p11-kit server".
func KillsChildrenOf(pid int) string { return "P11FAULT_SERVER=" + strconv.Itoa(pid) }

// Set makes a fault, and with the content what it needs.
func Set(directory, fault, content string) error {
	return os.WriteFile(filepath.Join(directory, fault), []byte(content), 0o600)
}

// Clear ends a fault, which may have ended by itself.
func Clear(directory, fault string) error {
	err := os.Remove(filepath.Join(directory, fault))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
