package agent_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll/internal/agent"
)

// script makes a hook of a shell script, whose lines it collects.
func script(t *testing.T, text string) (agent.Hook, *[]string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "hook")
	// Written by another process: a child that a parallel test forks meanwhile would have
	// the file open for writing, and what is so is not executed (ETXTBSY).
	write := exec.Command("/bin/sh", "-c", `cat >"$0" && chmod 700 "$0"`, path)
	write.Stdin = strings.NewReader("#!/bin/sh\n" + text)
	if out, err := write.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var lines []string
	return agent.Hook{
		Name: agent.HookAfter, Path: path, Timeout: time.Minute, Grace: 5 * time.Second,
		Line: func(line string) { lines = append(lines, line) },
	}, &lines
}

func TestHook(t *testing.T) {
	for name, c := range map[string]struct {
		script string
		lines  []string
		err    string // its end
	}{
		"silent":         {"exit 0", nil, ""},
		"both outputs":   {"echo one; echo two >&2; printf three", []string{"one", "two", "three"}, ""},
		"no input":       {"cat; echo end", []string{"end"}, ""},
		"no arguments":   {`echo "$# in $(pwd)"`, []string{"0 in /"}, ""},
		"fails":          {"echo why; exit 3", []string{"why"}, "/hook: exit status 3: the hook failed"},
		"killed":         {"kill -9 $$", nil, "/hook: signal: killed: the hook failed"},
		"long line":      {"printf '%600s\\n' x; echo end", []string{strings.Repeat(" ", 512) + "…", "end"}, ""},
		"no line at all": {"head -c 3000000 /dev/zero | tr '\\0' x", []string{strings.Repeat("x", 512) + "…"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hook, lines := script(t, c.script)
			err := hook.Run(t.Context())
			if c.err == "" && err != nil || c.err != "" && (!errors.Is(err, agent.ErrHook) || !strings.HasSuffix(err.Error(), c.err)) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			if diff := cmp.Diff(c.lines, *lines); diff != "" {
				t.Errorf("lines (-want +got)\n%s", diff)
			}
		})
	}
}

// A hook that prints for ever is listened to, and not shown for ever.
func TestHookOutputBounded(t *testing.T) {
	t.Parallel()
	hook, lines := script(t, "seq 1 100000; echo end >&2")
	if err := hook.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := *lines; len(got) != 101 || got[99] != "100" || got[100] != "more than 100 lines: the rest is not shown" {
		t.Errorf("%d lines, the last %q", len(got), got[len(got)-1])
	}
}

// The environment is what says where things are, and what the run has to say: all of
// it, though it be empty, and nothing that a secret or a setting could stand in.
func TestHookEnvironment(t *testing.T) {
	for name, value := range map[string]string{
		"EST_ENROLL_ENGINE": "pkcs11:?pin-value=4711", "CREDENTIALS_DIRECTORY": "/run/credentials", "SECRET": "4711",
		"EST_ENROLL_ERROR": "of another run", "PATH": os.Getenv("PATH"), "HOME": "/home", "LC_ALL": "C.UTF-8", "TZ": "UTC",
		"SOFTHSM2_CONF": "/etc/softhsm", "TPM2_PKCS11_STORE": "/var/lib/tpm", "TPM2_PKCS11_TCTI": "device", "TPM2_PKCS11_OWNER_AUTH": "4711",
	} {
		t.Setenv(name, value)
	}
	hook, lines := script(t, "exec env")
	hook.Variables = map[string]string{agent.NameVariable: "mqtt", agent.ActionVariable: "rene\x00wed", agent.ReasonVariable: strings.Repeat("x", 1<<20)}
	if err := hook.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, line := range *lines {
		name, value, _ := strings.Cut(line, "=")
		got[name] = value
	}
	want := map[string]string{"PATH": os.Getenv("PATH"), "HOME": "/home", "LC_ALL": "C.UTF-8", "TZ": "UTC", "PWD": "/", // the shell's
		"SOFTHSM2_CONF": "/etc/softhsm", "TPM2_PKCS11_STORE": "/var/lib/tpm", "TPM2_PKCS11_TCTI": "device"}
	for _, name := range agent.HookVariables() {
		want[name] = ""
	}
	want[agent.HookVariable], want[agent.NameVariable], want[agent.ActionVariable] = "after", "mqtt", "renewed"
	for _, inherited := range []string{"USER", "LOGNAME", "SHELL", "TMPDIR", "LANG", "LANGUAGE", "LC_CTYPE", "_", "SHLVL", "OLDPWD"} {
		delete(got, inherited)
	}
	if reason := got[agent.ReasonVariable]; len(reason) < 400 || len(reason) > 4096 {
		t.Errorf("a reason of %d bytes", len(reason))
	}
	delete(got, agent.ReasonVariable)
	delete(want, agent.ReasonVariable)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	t.Setenv("PATH", "")
	os.Unsetenv("PATH")
	if err := hook.Run(t.Context()); err != nil || !slices.ContainsFunc(*lines, func(l string) bool { return strings.HasPrefix(l, "PATH=/usr/local/sbin:") }) {
		t.Errorf("without a PATH: %v", err)
	}
}

// gone waits for the end of a process, which an orphan of a container is a zombie after.
func gone(t *testing.T, pid string) {
	t.Helper()
	if _, err := strconv.Atoi(pid); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	t.Errorf("process %s runs on", pid)
}

// A hook whose time is over ends with all that it has started, though that would not
// hear of it; so does one whose run is interrupted.
func TestHookEnded(t *testing.T) {
	for name, c := range map[string]struct {
		script  string
		grace   time.Duration
		timeout bool
		want    error
	}{
		"timeout":      {"sleep 1000 & echo $!; wait", 5 * time.Second, true, agent.ErrHook},
		"deaf":         {"trap '' TERM; (trap '' TERM; sleep 1000) & echo $!; wait; sleep 1000", 100 * time.Millisecond, true, agent.ErrHook},
		"deaf child":   {"(trap '' TERM; sleep 1000) >/dev/null 2>&1 & echo $!; wait", 5 * time.Second, true, agent.ErrHook},
		"interrupted":  {"sleep 1000 & echo $!; wait", 5 * time.Second, false, context.Canceled},
		"says goodbye": {"trap 'echo bye; exit 0' TERM; sleep 1000 & echo $!; wait", 5 * time.Second, false, context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hook, lines := script(t, c.script)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			collect := hook.Line
			hook.Line = func(line string) {
				if collect(line); len(*lines) == 1 && !c.timeout { // what it starts has started
					cancel()
				}
			}
			hook.Grace = c.grace
			if c.timeout {
				hook.Timeout = 500 * time.Millisecond
			}
			err := hook.Run(ctx)
			if !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if len(*lines) == 0 {
				t.Fatal("it did not come so far")
			}
			gone(t, (*lines)[0])
			if name == "says goodbye" && (*lines)[len(*lines)-1] != "bye" {
				t.Errorf("lines %q", *lines)
			}
		})
	}
}

// What a hook leaves in the background is neither waited for nor ended.
func TestHookBackground(t *testing.T) {
	t.Parallel()
	hook, lines := script(t, "sleep 1000 & echo $!")
	hook.Grace = 100 * time.Millisecond
	if err := hook.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi((*lines)[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Errorf("it was ended: %v", err)
	}
}

func TestCheckHook(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	foreign := file("foreign", 0o755)
	wantForeign := ""
	if os.Geteuid() == 0 {
		if err := os.Chown(foreign, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		wantForeign = "foreign belongs to user 65534, who decides what is run"
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file("target", 0o755), link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]struct{ warning, err string }{
		"relative":                    {"", "want an absolute path"},
		filepath.Join(dir, "missing"): {"", "no such file or directory"},
		dir:                           {"", "is not a file"},
		file("plain", 0o644):          {"", "cannot be executed by this user: permission denied"},
		file("good", 0o755):           {"", ""},
		link:                          {"", ""},
		file("group", 0o775):          {"group can be written to by others, who decide what is run: chmod go-w", ""},
		file("all", 0o757):            {"all can be written to by others, who decide what is run: chmod go-w", ""},
		foreign:                       {wantForeign, ""},
		"/usr/bin/env":                {"", ""},
	} {
		warning, err := agent.CheckHook(path)
		if (err == nil) != (want.err == "") || err != nil && !strings.HasSuffix(err.Error(), want.err) || !strings.HasSuffix(warning, want.warning) || (warning == "") != (want.warning == "") {
			t.Errorf("%s: got %q, %v; want %+v", path, warning, err, want)
		}
	}
}

// No variable of a hook is taken for a setting of the run that it may begin: the
// command's test holds their names against those.
func TestHookVariables(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, name := range agent.HookVariables() {
		if seen[name] || !strings.HasPrefix(name, "EST_ENROLL_") {
			t.Errorf("%s", name)
		}
		seen[name] = true
	}
	if want := 13; len(seen) != want {
		t.Errorf("%d variables, want %d", len(seen), want)
	}
}
