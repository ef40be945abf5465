// Package nss makes tokens of NSS's softokn for tests: the software token of
// Firefox and Chromium. It needs the Debian packages libnss3, libnss3-tools, gcc
// and opensc, and no line of the product.
//
// softokn is told in C_Initialize where its databases are, which no PKCS #11
// program does: a module that is built here stands before it and does.
package nss

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"estenroll/engine/enginetest/opensc"
)

//go:embed testdata/p11nss.c
var source string

// Module is the built module.
type Module struct{ path, softokn string }

// Token is a token with a database of its own, in a directory that goes with its test.
type Token struct {
	opensc.Token
	Database string // of its public objects, SQLite

	dir    string
	tokens []string // as softokn is told of them
}

// Build compiles the module into a directory of the test.
func Build(t testing.TB) Module {
	t.Helper()
	softokn, err := filepath.Glob("/usr/lib/*/libsoftokn3.so")
	if err != nil || len(softokn) == 0 {
		t.Fatalf("nss: libsoftokn3.so is missing: make deps: %v", err)
	}
	// The headers are those that the driver itself is built with.
	headers, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		t.Fatalf("nss: find the headers: %v", err)
	}
	module := Module{path: filepath.Join(t.TempDir(), "p11nss.so"), softokn: softokn[0]}
	compile := exec.CommandContext(t.Context(), "gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra",
		"-I", strings.TrimSpace(string(headers)), "-o", module.path, "-x", "c", "-", "-ldl")
	compile.Stdin = strings.NewReader(source)
	if output, err := compile.CombinedOutput(); err != nil || len(output) > 0 {
		t.Fatalf("nss: compile (make deps installs gcc): %v\n%s", err, output)
	}
	return module
}

// New makes a token, labelled "device".
func (m Module) New(t testing.TB, pin string) *Token {
	t.Helper()
	dir := t.TempDir()
	token := &Token{dir: dir, Token: opensc.Token{
		ModulePath: m.path, Label: "device", PIN: pin, PINFile: filepath.Join(dir, "pin"),
		Environment: []string{"P11NSS_MODULE=" + m.softokn},
	}}
	if err := os.WriteFile(token.PINFile, []byte(pin+"\n"), 0o600); err != nil {
		t.Fatalf("nss: %v", err)
	}
	if err := token.Add(token.Label); err != nil {
		t.Fatalf("nss: %v", err)
	}
	token.Database = filepath.Join(dir, token.Label, "cert9.db")
	return token
}

// Add makes one more token, with the same PIN. Its serial number is that of every
// other. A program sees it that has [opensc.Token.Env] as it is then.
func (t *Token) Add(label string) error {
	dir := filepath.Join(t.dir, label)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if _, err := t.Run("certutil", "-N", "-d", "sql:"+dir, "-f", t.PINFile); err != nil {
		return err
	}
	t.tokens = append(t.tokens, fmt.Sprintf("%#x=[configDir='sql:%s' tokenDescription='%s']", 4+len(t.tokens), dir, label))
	t.Environment = []string{t.Environment[0], "P11NSS_PARAMETERS=tokens=<" + strings.Join(t.tokens, " ") + ">"}
	return nil
}
