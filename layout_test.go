package estenroll_test

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// rooms is the table of DESIGN.md §2: what each package may import beside the
// standard library. A package that is not in it fails: it has no room yet.
var rooms = map[string][]string{
	"estenroll": {
		"estenroll/csr", "estenroll/engine", "estenroll/est", "estenroll/internal/durable", "estenroll/lwm2m",
		"github.com/cenkalti/backoff/v5",
	},
	"estenroll/cmd/est-enroll": {
		"estenroll", "estenroll/csr", "estenroll/engine", "estenroll/engine/file", "estenroll/engine/pkcs11", "estenroll/est", "estenroll/est/coaps", "estenroll/est/https", "estenroll/internal/agent", "estenroll/internal/durable", "estenroll/lwm2m",
		"github.com/spf13/cobra", "github.com/spf13/pflag", "go.yaml.in/yaml/v3", "golang.org/x/term",
	},
	"estenroll/cmd/est-testserver": {"estenroll/csr", "estenroll/internal/durable", "estenroll/testserver", "github.com/spf13/cobra"},
	"estenroll/csr":                {},
	"estenroll/engine":             {},
	"estenroll/engine/enginetest":  {"estenroll/engine"},
	"estenroll/engine/file":        {"estenroll/engine", "estenroll/internal/durable"},
	"estenroll/engine/pkcs11":      {"estenroll/engine", "estenroll/internal/durable", "github.com/miekg/pkcs11"},
	"estenroll/est":                {"github.com/fxamacker/cbor/v2", "go.mozilla.org/pkcs7"},
	"estenroll/est/coaps":          {"estenroll/est", "estenroll/internal/coap"},
	"estenroll/est/https":          {"estenroll/est"},
	"estenroll/internal/agent":     {"estenroll", "estenroll/engine", "estenroll/est", "estenroll/internal/durable"},
	"estenroll/internal/coap":      {"github.com/pion/dtls/v3", "github.com/plgd-dev/go-coap/v3"},
	"estenroll/internal/durable":   {"github.com/gofrs/flock", "github.com/google/renameio/v2", "golang.org/x/sys"},
	"estenroll/lwm2m":              {"estenroll/engine", "estenroll/internal/durable"},
	"estenroll/testserver":         {"estenroll/csr", "estenroll/est", "estenroll/internal/coap", "github.com/globalsign/est", "github.com/pion/dtls/v3", "github.com/plgd-dev/go-coap/v3"},

	// Test tools: imported by tests only, which the next test holds.
	"estenroll/engine/enginetest/nss":      {"estenroll/engine/enginetest/opensc"},
	"estenroll/engine/enginetest/opensc":   {},
	"estenroll/engine/enginetest/p11crash": {},
	"estenroll/engine/enginetest/p11fault": {},
	"estenroll/engine/enginetest/softhsm":  {"estenroll/engine/enginetest/opensc"},
	"estenroll/engine/enginetest/tpm":      {"estenroll/engine/enginetest/opensc"},
	"estenroll/internal/coap/coaptest":     {},
	"estenroll/internal/conformance":       {},
	"estenroll/internal/durable/filecrash": {"estenroll/engine/enginetest/p11crash"},
	"estenroll/testserver/globalsigntest":  {},
	"estenroll/packaging/guide":            {},
	"estenroll/packaging/man":              {"github.com/spf13/cobra", "github.com/spf13/pflag"},
}

// testTools are the packages that no shipped package may import.
var testTools = []string{"estenroll/engine/enginetest", "estenroll/internal/coap/coaptest", "estenroll/internal/conformance", "estenroll/internal/durable/filecrash", "estenroll/packaging/guide", "estenroll/packaging/man", "estenroll/testserver"}

// The imports hold in every set of build tags, and every set compiles.
func TestLayout(t *testing.T) {
	for _, cgo := range []string{"1", "0"} {
		t.Run("CGO_ENABLED="+cgo, func(t *testing.T) {
			t.Parallel()
			goCommand(t, cgo, "build", "./...")
			list := goCommand(t, cgo, "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...")
			for line := range strings.Lines(list) {
				words := strings.Fields(line)
				room, imports := words[0], words[1:]
				allowed, known := rooms[room]
				if !known {
					t.Errorf("package %s has no room in the table of DESIGN.md §2", room)
				}
				for _, path := range imports {
					if outsideStandardLibrary(path) && !slices.ContainsFunc(allowed, func(a string) bool { return covers(a, path) }) {
						t.Errorf("%s imports %s, which its room does not allow", room, path)
					}
				}
			}
		})
	}
}

// covers reports whether an allowed path covers an import: itself, or, outside
// this module, a package of the module.
func covers(allowed, path string) bool {
	return path == allowed || !strings.HasPrefix(allowed, "estenroll") && strings.HasPrefix(path, allowed+"/")
}

func outsideStandardLibrary(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return path != "C" && (strings.Contains(first, ".") || first == "estenroll")
}

func TestNoTestToolShips(t *testing.T) {
	deps := goCommand(t, "1", "list", "-deps", "./cmd/est-enroll")
	for _, tool := range testTools {
		if strings.Contains(deps, tool) {
			t.Errorf("est-enroll contains the test tool %s", tool)
		}
	}
}

func goCommand(t *testing.T, cgo string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}
