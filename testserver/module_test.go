package testserver_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"estenroll/packaging/guide"
)

// The test of the guide is one in a module of its own, which has nothing but what this
// one exports.
func TestInAnotherModule(t *testing.T) {
	t.Parallel()
	blocks, err := guide.Blocks("README.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	sources, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"go.mod", "device_test.go"} {
		writeFile(t, filepath.Join(dir, name), []byte(strings.ReplaceAll(blocks[name].Text, "=> ../est-enroll", "=> "+sources)))
	}
	sums, err := os.ReadFile("../go.sum")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "go.sum"), sums)
	// Instead of go mod tidy, which asks for the tests of all modules: what is required
	// is added to go.mod, out of the cache.
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count", "1", "-run", "^TestEnrol$", "-v", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOPROXY=off", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestEnrol") {
		t.Errorf("%v\n%s", err, out)
	}
}

// No exported name needs a type that another module cannot import.
func TestExportedTypes(t *testing.T) {
	t.Parallel()
	doc := run(t, ".", "go", "doc", "-all", ".")
	for line := range strings.Lines(string(doc)) {
		code, _, _ := strings.Cut(line, "//")
		declares := strings.HasPrefix(code, "func ") || strings.HasPrefix(code, "\t")
		if declares && regexp.MustCompile(`\b(coap|durable|dtls|codes|globalsign)\.`).MatchString(code) {
			t.Errorf("exported: %s", line)
		}
	}
}
