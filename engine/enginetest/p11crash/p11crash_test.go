package p11crash_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"estenroll/engine/enginetest/p11crash"
)

const pin, label = "4711", "p11crash"

// softHSM makes a token in a directory of the test and returns the module and
// the environment that finds the token.
func softHSM(t *testing.T) (module string, env []string) {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/softhsm/libsofthsm2.so")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append([]string{"/usr/lib/softhsm/libsofthsm2.so"}, found...) {
		if _, err := os.Stat(path); err == nil {
			module = path
		}
	}
	if module == "" {
		t.Fatal("libsofthsm2.so is missing: make deps")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+dir+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env = append(os.Environ(), "SOFTHSM2_CONF="+conf)
	run(t, env, "softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", pin)
	return module, env
}

func run(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	output, err := try(t, env, name, args...)
	if err != nil {
		t.Fatalf("%s (make deps installs it): %v\n%s", name, err, output)
	}
	return output
}

func try(t *testing.T, env []string, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = env
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	err := cmd.Run()
	return output.String(), err
}

func TestKillAtEveryPoint(t *testing.T) {
	t.Parallel()
	crash := p11crash.Build(t)
	softhsm, env := softHSM(t)
	run(t, env, "pkcs11-tool", "--module", softhsm, "--token-label", label, "--login", "--pin", pin,
		"--keypairgen", "--key-type", "EC:prime256v1", "--label", "key", "--id", "01")
	list := func(module string) []string {
		return []string{"--module", module, "--token-label", label, "--login", "--pin", pin, "--list-objects"}
	}
	dir := t.TempDir()

	log := filepath.Join(dir, "record.log")
	through := run(t, append(env, crash.Env(softhsm, log, p11crash.Point{})...), "pkcs11-tool", list(crash.Path)...)
	direct := run(t, env, "pkcs11-tool", list(softhsm)...)
	if diff := cmp.Diff(through, direct); diff != "" {
		t.Errorf("the module in between changes the answer: -through +direct:\n%s", diff)
	}
	if !strings.Contains(through, "Private Key Object") {
		t.Fatalf("no private key: %s", through)
	}

	points := p11crash.ReadLog(t, log)
	if first := points[0]; first != (p11crash.Point{Number: 1, Function: "C_GetFunctionList", When: p11crash.Before}) {
		t.Errorf("the first point is %s", first)
	}
	seen := map[string]int{}
	for i, point := range points {
		seen[point.Function]++
		if point.Number != i/2+1 { // pkcs11-tool has one thread
			t.Errorf("line %d is %s", i+1, point)
		}
	}
	for _, function := range []string{"C_Initialize", "C_Login", "C_FindObjects", "C_GetAttributeValue"} {
		if seen[function] == 0 {
			t.Errorf("%s is not in the log", function)
		}
	}
	for i, point := range points {
		log := filepath.Join(dir, fmt.Sprintf("kill-%d.log", i))
		_, err := try(t, append(env, crash.Env(softhsm, log, point)...), "pkcs11-tool", list(crash.Path)...)
		if err := point.Hit(err, log); err != nil {
			t.Error(err)
			continue
		}
		if diff := cmp.Diff(p11crash.ReadLog(t, log), points[:i+1]); diff != "" {
			t.Errorf("killed at %s: -got +want:\n%s", point, diff)
		}
	}
	t.Logf("points %d", len(points))
}

// TestWriteIsDone: after a call its effect is there, before it is not.
func TestWriteIsDone(t *testing.T) {
	t.Parallel()
	crash := p11crash.Build(t)
	for _, when := range []p11crash.When{p11crash.Before, p11crash.After} {
		softhsm, env := softHSM(t)
		generate := func(id string) []string {
			return []string{"--module", crash.Path, "--token-label", label, "--login", "--pin", pin,
				"--keypairgen", "--key-type", "EC:prime256v1", "--label", "key", "--id", id}
		}
		log := filepath.Join(t.TempDir(), "record.log")
		run(t, append(env, crash.Env(softhsm, log, p11crash.Point{})...), "pkcs11-tool", generate("01")...)
		var point p11crash.Point
		for _, p := range p11crash.ReadLog(t, log) {
			if p.Function == "C_GenerateKeyPair" && p.When == when { // the function with most arguments
				point = p
			}
		}
		log = filepath.Join(t.TempDir(), "kill.log")
		_, err := try(t, append(env, crash.Env(softhsm, log, point)...), "pkcs11-tool", generate("02")...)
		if err := point.Hit(err, log); err != nil {
			t.Fatal(err)
		}
		objects := run(t, env, "pkcs11-tool", "--module", softhsm, "--token-label", label, "--login", "--pin", pin, "--list-objects")
		want := map[p11crash.When]int{p11crash.Before: 0, p11crash.After: 2}[when] // both halves
		if got := strings.Count(objects, "ID:         02"); got != want {
			t.Errorf("killed %s: %d objects, want %d:\n%s", point, got, want, objects)
		}
	}
}

func TestHitReportsAMiss(t *testing.T) {
	t.Parallel()
	crash := p11crash.Build(t)
	softhsm, env := softHSM(t)
	log := filepath.Join(t.TempDir(), "miss.log")
	point := p11crash.Point{Number: 1000, Function: "C_Sign", When: p11crash.Before}
	_, err := try(t, append(env, crash.Env(softhsm, log, point)...), "pkcs11-tool", "--module", crash.Path, "--list-slots")
	if err != nil {
		t.Fatal(err)
	}
	if err := point.Hit(err, log); err == nil || !strings.HasPrefix(err.Error(), "point 1000 C_Sign before: not hit: ") {
		t.Errorf("got %v", err)
	}
	points := p11crash.ReadLog(t, log)
	if err := points[len(points)-1].Hit(nil, log); err == nil || !strings.Contains(err.Error(), "not killed") {
		t.Errorf("got %v", err)
	}
}

// TestMisconfigured: what cannot be recorded does not run.
func TestMisconfigured(t *testing.T) {
	t.Parallel()
	crash := p11crash.Build(t)
	softhsm, env := softHSM(t)
	log := filepath.Join(t.TempDir(), "log")
	for name, tc := range map[string]struct {
		env  []string
		want string
	}{
		"no module":  {nil, "P11CRASH_MODULE and P11CRASH_LOG are needed"},
		"not one":    {crash.Env("/dev/null", log, p11crash.Point{}), "/dev/null is not a PKCS #11 module"},
		"no log":     {crash.Env(softhsm, filepath.Join(log, "absent"), p11crash.Point{}), "P11CRASH_LOG"},
		"no when":    {crash.Env(softhsm, log, p11crash.Point{Number: 1}), "neither before nor after"},
		"other when": {crash.Env(softhsm, log, p11crash.Point{Number: 1, When: "during"}), "neither before nor after"},
	} {
		output, err := try(t, append(env, tc.env...), "pkcs11-tool", "--module", crash.Path, "--list-slots")
		if err == nil || !strings.Contains(output, tc.want) {
			t.Errorf("%s: got %v, %s", name, err, output)
		}
	}
}
