package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The README's table of exit codes is that of --help, and each code is reached
// by a script.
func TestExitCodes(t *testing.T) {
	t.Parallel()
	readme := read(t, "../../README.md")
	var fromReadme, fromHelp []string
	for _, row := range regexp.MustCompile(`(?m)^\| (\d+) \| (.+) \|$`).FindAllStringSubmatch(readme, -1) {
		fromReadme = append(fromReadme, row[1]+" "+row[2])
	}
	for _, row := range regexp.MustCompile(`(?m)^  (\d+) +(.+)$`).FindAllStringSubmatch(exitCodeHelp, -1) {
		fromHelp = append(fromHelp, row[1]+" "+row[2])
	}
	if diff := cmp.Diff(fromHelp, fromReadme); len(fromHelp) == 0 || diff != "" {
		t.Errorf("(-help +README)\n%s", diff)
	}
	scripts, err := filepath.Glob("testdata/script/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, script := range scripts {
		all.WriteString(read(t, script))
	}
	for _, row := range fromHelp {
		code, _, _ := strings.Cut(row, " ")
		reached := "exitcode " + code + " est-enroll"
		switch code {
		case "0":
			reached = "exec est-enroll"
		case "130":
			reached = "interrupt " // which wants this code
		}
		if !strings.Contains(all.String(), reached) {
			t.Errorf("no script has %q", reached)
		}
	}
}

// The README's example of a configuration is one, up to the files it names.
func TestREADMEConfiguration(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{"README.md": read(t, "../../README.md"), "--help": rootHelp} {
		example := regexp.MustCompile("(?s)(?:```yaml\n|\n\n)( *engine: .*?)(?:```|\n\n)").FindStringSubmatch(text)
		if example == nil {
			t.Fatalf("%s has no example", name)
		}
		dir := t.TempDir()
		config := filepath.Join(dir, "config.yaml")
		lines := strings.ReplaceAll(example[1], "/etc/est-enroll/ca.pem", filepath.Join(dir, "ca.pem"))
		if err := os.WriteFile(config, []byte(regexp.MustCompile(`(?m)^  `).ReplaceAllString(lines, "")), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "ca.pem"), []byte(read(t, "../../testdata/rfc9148/root.pem")), 0o600); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		// Everything in it is understood: what is missing is the token.
		code := run(t.Context(), []string{"status", "--config", config, "--state-dir", dir, "--lock-dir", filepath.Join(dir, "locks")}, &out, &out)
		if code != exitToken {
			t.Errorf("%s: exit code %d, want %d:\n%s", name, code, exitToken, &out)
		}
	}
}

// The demo runs, as it ships.
func TestDemo(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if err := os.Symlink(builtPrograms(t), filepath.Join(root, "bin")); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(root, "examples"), os.DirFS("../../examples")); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "sh", filepath.Join(root, "examples", "demo")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"\nenrolled: ", "\nnothing to do: ", "\nrenewed: ", "\ndevice.pem: OK\n", "\nPrivate Key Object"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
