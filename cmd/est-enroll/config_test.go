package main

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"estenroll/internal/agent"
)

// commented is a setting that is a comment.
var commented = regexp.MustCompile(`(?m)^#(\S|    )`)

// example is what "config --example" prints, as it is and with every setting set
// but those of several credentials.
func example(t *testing.T) (printed, complete string) {
	t.Helper()
	var out, failure bytes.Buffer
	if code := run(t.Context(), []string{"config", "--example", "--config", "missing.yaml"}, &out, &failure); code != exitDone || failure.Len() > 0 {
		t.Fatalf("exit code %d: %s", code, &failure)
	}
	settings, several := strings.CutSuffix(out.String(), exampleCredentials)
	if !several {
		t.Error("nothing on several credentials")
	}
	return out.String(), commented.ReplaceAllString(settings, "$1")
}

// parse returns the settings of a configuration file, by name.
func parse(t *testing.T, text string) map[string]string {
	t.Helper()
	_, values := parseSettings(t, text)
	return values
}

func parseSettings(t *testing.T, text string) (*settings, map[string]string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s, flags := new(settings), pflag.NewFlagSet("", pflag.ContinueOnError)
	s.register(flags)
	s.config = path
	if err := s.fromFile(flags, map[string]bool{}); err != nil {
		t.Fatal(err)
	}
	values := map[string]string{}
	flags.VisitAll(func(f *pflag.Flag) {
		if !onlyFlags[f.Name] {
			values[f.Name] = f.Value.String()
		}
	})
	return s, values
}

// What a hook finds in its environment is no setting, should it call est-enroll.
func TestHookVariablesAreNoSettings(t *testing.T) {
	t.Parallel()
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	new(settings).register(flags)
	flags.VisitAll(func(f *pflag.Flag) {
		if slices.Contains(agent.HookVariables(), variable(f.Name)) {
			t.Errorf("%s is %s", variable(f.Name), f.Name)
		}
	})
}

// The example is a configuration: as it is, of the defaults and the settings that
// are required; with every comment taken away, of every setting there is.
func TestConfigExample(t *testing.T) {
	t.Parallel()
	printed, complete := example(t)
	defaults := map[string]string{}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	new(settings).register(flags)
	flags.VisitAll(func(f *pflag.Flag) {
		if !onlyFlags[f.Name] {
			defaults[f.Name] = f.DefValue
		}
	})
	if got, want := slices.Sorted(maps.Keys(parse(t, complete))), slices.Sorted(maps.Keys(defaults)); !cmp.Equal(got, want) {
		t.Errorf("settings: %s", cmp.Diff(want, got))
	}
	for name := range defaults {
		if strings.Count("\n"+complete, "\n"+name+":") != 1 {
			t.Errorf("%s is not there once", name)
		}
	}
	withExamples := func(which func(name string) bool) map[string]string {
		want := maps.Clone(defaults)
		for name, values := range examples {
			if _, known := defaults[name]; !known {
				t.Errorf("there is no setting %s", name)
			}
			if which(name) {
				want[name] = strings.Join(values, ",")
				if flags.Lookup(name).Value.Type() == "stringArray" {
					want[name] = "[" + want[name] + "]"
				}
			}
		}
		return want
	}
	if diff := cmp.Diff(withExamples(func(name string) bool { return slices.Contains(requiredSettings, name) }), parse(t, printed)); diff != "" {
		t.Errorf("as printed (-want +got)\n%s", diff)
	}
	if diff := cmp.Diff(withExamples(func(string) bool { return true }), parse(t, complete)); diff != "" {
		t.Errorf("complete (-want +got)\n%s", diff)
	}
}

func TestConfigExampleCredentials(t *testing.T) {
	t.Parallel()
	printed, _ := example(t)
	s, _ := parseSettings(t, printed+commented.ReplaceAllString(exampleCredentials, "$1"))
	var names []string
	for _, one := range s.credentials {
		names = append(names, one.credential+" "+one.subject)
	}
	if diff := cmp.Diff([]string{"device ", "mqtt CN=mqtt-17"}, names); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// Everything in the example is understood, up to the files it names: what is
// missing is the token. So is every value that a shell offers, and no other.
func TestConfigExampleValues(t *testing.T) {
	t.Parallel()
	printed, complete := example(t)
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, []byte(read(t, "../../testdata/rfc9148/root.pem")), 0o600); err != nil {
		t.Fatal(err)
	}
	status := func(text string, more ...string) (int, string) {
		config := filepath.Join(dir, "config.yaml")
		text = regexp.MustCompile(`/etc/est-enroll/[a-z0-9-]+\.pem`).ReplaceAllString(text, ca)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		code := run(t.Context(), append([]string{"status", "--config", config, "--state-dir", dir, "--lock-dir", filepath.Join(dir, "locks")}, more...), &out, &out)
		return code, out.String()
	}
	for name, text := range map[string]string{"as printed": printed, "complete": complete} {
		if code, out := status(text); code != exitToken {
			t.Errorf("%s: exit code %d, want %d:\n%s", name, code, exitToken, out)
		}
	}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	new(settings).register(flags)
	tried := 0
	flags.VisitAll(func(f *pflag.Flag) {
		words := offered(f)
		if words == nil {
			return
		}
		for _, word := range append([]string{"other"}, words...) {
			want := exitToken
			if word == "other" {
				want = exitUsage
			}
			if code, out := status(printed, "--"+f.Name, word); code != want {
				t.Errorf("--%s %s: exit code %d, want %d:\n%s", f.Name, word, code, want, out)
			}
			tried++
		}
	})
	if tried < 10 {
		t.Errorf("%d words tried", tried)
	}
}

// FuzzConfig: whatever a configuration file holds, its settings are those of the list, each
// once, and what is wrong is said on one line, by line and key and without the value.
func FuzzConfig(f *testing.F) {
	const value = "MARKER-4F1D9C" // a key has no capital letters
	var printed bytes.Buffer
	if code := run(f.Context(), []string{"config", "--example", "--config", "missing.yaml"}, &printed, &printed); code != exitDone {
		f.Fatalf("exit code %d: %s", code, &printed)
	}
	f.Add(printed.String())
	f.Add(commented.ReplaceAllString(printed.String(), "$1"))
	for _, seed := range []string{
		"engine: pkcs11:token=t?pin-value=" + value + "\n", "attempts: " + value + "\n", "san: [" + value + ", &a b, *a]\n", "wait: !!binary " + value + "\n",
		"retry-pin: {" + value + ": 1}\n", "? [" + value + "]\n: 1\n", "---\n", "- " + value, "a: 1\n---\nb: 2\n", "%YAML 9\n", "a: \"" + value, "credentials:\n  a: {}\n  A: {}\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > configLimit {
			return
		}
		s, flags := new(settings), pflag.NewFlagSet("", pflag.ContinueOnError)
		s.register(flags)
		file, err := parseConfig([]byte(text))
		seen := map[string]bool{}
		for _, entry := range file.entries {
			if seen[entry.key] || entry.line < 1 {
				t.Errorf("%s on line %d, twice %t", entry.key, entry.line, seen[entry.key])
			}
			seen[entry.key] = true
		}
		if err == nil {
			err = apply(file.entries, flags, map[string]bool{})
		}
		if err == nil {
			err = s.eachCredential(file, map[string]bool{})
		}
		if err == nil {
			return
		}
		if printable(err.Error()) != err.Error() || len(err.Error()) > 512 {
			t.Errorf("%q", err)
		}
		// The name of a credential is none of a setting.
		if !strings.Contains(text, "credentials") && strings.Contains(err.Error(), value) {
			t.Errorf("the value is in %q", err)
		}
	})
}
