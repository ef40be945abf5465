package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"estenroll/internal/agent"
)

// The README's table of exit codes is that of --help and of exit.go, and each code has
// its part in exit_codes.txt, where est-enroll comes to it.
func TestExitCodes(t *testing.T) {
	t.Parallel()
	var fromReadme, fromHelp, codes []string
	for _, row := range regexp.MustCompile(`(?m)^\| (\d+) \| (.+) \|$`).FindAllStringSubmatch(read(t, "../../README.md"), -1) {
		fromReadme = append(fromReadme, row[1]+" "+row[2])
		codes = append(codes, row[1])
	}
	for _, row := range regexp.MustCompile(`(?m)^  (\d+) +(.+)$`).FindAllStringSubmatch(exitCodeHelp, -1) {
		fromHelp = append(fromHelp, row[1]+" "+row[2])
	}
	if diff := cmp.Diff(fromHelp, fromReadme); len(fromHelp) == 0 || diff != "" {
		t.Errorf("(-help +README)\n%s", diff)
	}
	var constants []string
	for _, row := range regexp.MustCompile(`(?m)^\texit[A-Z]\w+ += (\d+)`).FindAllStringSubmatch(read(t, "exit.go"), -1) {
		constants = append(constants, row[1])
	}
	if diff := cmp.Diff(codes, constants); diff != "" {
		t.Errorf("(-README +exit.go)\n%s", diff)
	}
	reached := map[string]bool{}
	code := ""
	for line := range strings.Lines(read(t, "testdata/script/exit_codes.txt")) {
		if part := regexp.MustCompile(`^# (\d+): `).FindStringSubmatch(line); part != nil {
			code = part[1]
			if !slices.Contains(codes, code) {
				t.Errorf("exit_codes.txt has a part on %s, the README has none", code)
			}
		}
		if strings.HasPrefix(line, "exitcode "+code+" est-enroll ") || code == "130" && strings.HasPrefix(line, "interrupt ") { // which wants this code
			reached[code] = true
		}
	}
	for _, code := range codes {
		if !reached[code] {
			t.Errorf("exit_codes.txt comes to no %s in its part on it", code)
		}
	}
}

// The order of the exit codes of several credentials is said as it is.
func TestWorstExitCode(t *testing.T) {
	t.Parallel()
	order := strings.Trim(strings.ReplaceAll(fmt.Sprint(worstFirst), " ", ", "), "[]") + "."
	for name, text := range map[string]string{"README.md": read(t, "../../README.md"), "--help": exitCodeHelp} {
		if !strings.Contains(text, order) {
			t.Errorf("%s does not say %q", name, order)
		}
	}
	for i, bad := range worstFirst {
		for _, better := range worstFirst[i:] {
			if worse(bad, better) != bad || worse(better, bad) != bad {
				t.Errorf("of %d and %d the worse is %d, %d", bad, better, worse(bad, better), worse(better, bad))
			}
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

// The README's example of a hook does what it says, and fails where nginx does.
func TestREADMEHook(t *testing.T) {
	t.Parallel()
	example := regexp.MustCompile("(?s)```sh\n(#!/bin/sh -e\n# /etc/est-enroll/after.*?)```").FindStringSubmatch(read(t, "../../README.md"))
	if example == nil {
		t.Fatal("there is none")
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"after": example[1], "nginx": "#!/bin/sh\necho nginx \"$@\" >>\"${0%/*}/log\"\ntest ! -e \"${0%/*}/broken\"\n", "logger": "#!/bin/sh\necho logger \"$@\" >>\"${0%/*}/log\"\n",
	} {
		// By another process: while a child that a parallel test forks has it open for
		// writing, it would not be executed (ETXTBSY).
		write := exec.CommandContext(t.Context(), "install", "-m", "700", "/dev/stdin", filepath.Join(dir, name))
		write.Stdin = strings.NewReader(text)
		if out, err := write.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	call := func() error {
		cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "after"))
		cmd.Env = []string{"PATH=" + dir + ":" + os.Getenv("PATH"), agent.NewSerialVariable + "=4711", agent.NewNotAfterVariable + "=2027-02-22T23:50:51Z"}
		return cmd.Run()
	}
	if err := call(); err != nil {
		t.Error(err)
	}
	const want = "nginx -t -q\nnginx -s reload\nlogger certificate 4711 until 2027-02-22T23:50:51Z\n"
	if log := read(t, filepath.Join(dir, "log")); log != want {
		t.Errorf("%q, want %q", log, want)
	}
	if err := os.WriteFile(filepath.Join(dir, "broken"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := call(); err == nil {
		t.Error("it succeeds where nginx does not")
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

// What "make docs" makes, "make install" installs into a root, with a
// configuration that it never overwrites; "make uninstall" leaves that alone.
func TestInstall(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	dest := filepath.Join(root, "dest")
	try := func(goal string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "make", "-C", "../..", goal, "BIN="+filepath.Join(root, "bin"), "DESTDIR="+dest, "PREFIX=/usr")
		cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=") // not those of the make that runs the tests
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	mk := func(goal string) {
		t.Helper()
		if out, err := try(goal); err != nil {
			t.Fatalf("make %s: %v\n%s", goal, err, out)
		}
	}
	if out, err := try("install"); err == nil || !strings.Contains(out, "\n  make build docs\n") {
		t.Errorf("nothing is built: %v\n%s", err, out)
	}
	mk("docs")
	mk("install")
	installed := func() map[string]string {
		files := map[string]string{}
		err := filepath.WalkDir(dest, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			status, err := entry.Info()
			if err == nil {
				files[strings.TrimPrefix(path, dest)] = status.Mode().String()
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	want := map[string]string{
		"/etc/est-enroll/config.yaml": "-rw-------", "/usr/bin/est-enroll": "-rwxr-xr-x", "/usr/bin/est-testserver": "-rwxr-xr-x",
		"/usr/share/bash-completion/completions/est-enroll":    "-rw-r--r--",
		"/usr/share/fish/vendor_completions.d/est-enroll.fish": "-rw-r--r--",
		"/usr/share/zsh/site-functions/_est-enroll":            "-rw-r--r--",
		"/usr/share/man/man5/est-enroll.yaml.5":                "-rw-r--r--",
		"/usr/share/man/man1/est-enroll.1":                     "-rw-r--r--",
		"/usr/share/man/man1/est-enroll-cancel.1":              "-rw-r--r--",
		"/usr/share/man/man1/est-enroll-config.1":              "-rw-r--r--",
		"/usr/share/man/man1/est-enroll-doctor.1":              "-rw-r--r--",
		"/usr/share/man/man1/est-enroll-enroll.1":              "-rw-r--r--",
		"/usr/share/man/man1/est-enroll-renew.1":               "-rw-r--r--",
		"/usr/share/man/man1/est-enroll-reset.1":               "-rw-r--r--",
		"/usr/share/man/man1/est-enroll-status.1":              "-rw-r--r--",
		"/usr/share/est-enroll/cron.d/est-enroll":              "-rw-r--r--",
		"/usr/lib/sysusers.d/est-enroll.conf":                  "-rw-r--r--",
		"/usr/lib/tmpfiles.d/est-enroll.conf":                  "-rw-r--r--",
		"/usr/lib/systemd/system/est-enroll-enroll.service":    "-rw-r--r--",
		"/usr/lib/systemd/system/est-enroll-renew.service":     "-rw-r--r--",
		"/usr/lib/systemd/system/est-enroll-renew.timer":       "-rw-r--r--",
		"/usr/share/man/man1/est-testserver.1":                 "-rw-r--r--",
		"/usr/share/man/man1/est-testserver-serve.1":           "-rw-r--r--",
		"/usr/share/man/man1/est-testserver-idevid.1":          "-rw-r--r--",
		"/usr/share/man/man1/est-testserver-fault.1":           "-rw-r--r--",
		"/usr/share/man/man1/est-testserver-rollover.1":        "-rw-r--r--",
	}
	for _, example := range dropIns {
		want["/usr/share/est-enroll/systemd/"+example] = "-rw-r--r--"
	}
	if diff := cmp.Diff(want, installed()); diff != "" {
		t.Errorf("installed (-want +got)\n%s", diff)
	}
	t.Run("units", func(t *testing.T) { judgeUnits(t, dest) })
	if out, err := exec.CommandContext(t.Context(), filepath.Join(dest, "usr/bin/est-enroll"), "--version").Output(); err != nil || !bytes.HasPrefix(out, []byte("est-enroll version ")) {
		t.Errorf("the installed program says %q, %v", out, err)
	}
	if page := read(t, filepath.Join(dest, "usr/share/man/man1/est-enroll.1")); strings.Contains(page, "1970") {
		t.Errorf("the date of the page: %s", page[:80])
	}
	// A second installation is an upgrade.
	config := filepath.Join(dest, "etc/est-enroll/config.yaml")
	if err := os.WriteFile(config, []byte("# mine\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mk("install")
	mk("uninstall")
	if diff := cmp.Diff(map[string]string{"/etc/est-enroll/config.yaml": "-rw-------"}, installed()); diff != "" || read(t, config) != "# mine\n" {
		t.Errorf("uninstalled (-want +got)\n%s", diff)
	}
}

// dropIns are the examples of what a service needs for its HSM.
var dropIns = []string{"export-dir.conf", "pin.conf", "smart-card.conf", "softhsm.conf", "tpm.conf"}

// judgeUnits has systemd look at the units in a root, as they are and with each
// drop-in; make boot runs them.
func judgeUnits(t *testing.T, dest string) {
	services := []string{"est-enroll-renew.service", "est-enroll-enroll.service"}
	root := "--root=" + dest
	judge := func(name string, args ...string) error {
		out, err := exec.CommandContext(t.Context(), name, append([]string{root}, args...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
		}
		return nil
	}
	verify := func() error {
		// The manual pages are in the root too, where man does not look for them.
		return judge("systemd-analyze", append([]string{"verify", "--recursive-errors=no", "--man=no", "est-enroll-renew.timer"}, services...)...)
	}
	// Out of 100: 2.0 of systemd's 10. PrivateDevices= would take the HSM away.
	exposure := func(service string) error {
		return judge("systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", service)
	}
	check := func() {
		t.Helper()
		if err := verify(); err != nil {
			t.Error(err)
		}
		for _, service := range services {
			if err := exposure(service); err != nil {
				t.Error(err)
			}
		}
	}
	check()
	for _, service := range services {
		unit := read(t, filepath.Join(dest, "usr/lib/systemd/system", service))
		for _, want := range []string{"\nExecStart=/usr/bin/est-enroll ", "\nUser=est-enroll\n", "\nStateDirectory=est-enroll\n", "\nSuccessExitStatus=3\n"} {
			if !strings.Contains(unit, want) {
				t.Errorf("%s has no line %q", service, want)
			}
		}
		if strings.Contains(unit, "\nPrivateDevices=") {
			t.Errorf("%s has PrivateDevices", service)
		}
	}
	timer := read(t, filepath.Join(dest, "usr/lib/systemd/system/est-enroll-renew.timer"))
	for _, want := range []string{"\nRandomizedDelaySec=", "\nPersistent=true\n"} {
		if !strings.Contains(timer, want) {
			t.Errorf("the timer has no %q", want)
		}
	}
	// Of all units that begin so.
	dir := filepath.Join(dest, "etc/systemd/system/est-enroll-.service.d")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	with := func(content string, do func()) {
		t.Helper()
		path := filepath.Join(dir, "it.conf")
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		do()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, example := range dropIns {
		with(read(t, filepath.Join(dest, "usr/share/est-enroll/systemd", example)), check)
	}
	// The judges would see it.
	with("[Service]\nSupplementaryGroup=tss\n", func() {
		if verify() == nil {
			t.Error("a misspelt key passes")
		}
	})
	with("[Service]\nCapabilityBoundingSet=CAP_SYS_ADMIN\nProtectSystem=no\nRestrictNamespaces=no\n", func() {
		if exposure(services[0]) == nil {
			t.Error("less protection passes")
		}
	})
	if err := os.RemoveAll(filepath.Join(dest, "etc/systemd")); err != nil {
		t.Fatal(err)
	}

	// The user, and the directory of the locks, which only root can make another's.
	if err := judge("systemd-sysusers"); err != nil {
		t.Error(err)
	}
	if users := read(t, filepath.Join(dest, "etc/passwd")); !strings.Contains(users, "\nest-enroll:") && !strings.HasPrefix(users, "est-enroll:") {
		t.Errorf("no user in %s", users)
	}
	if os.Geteuid() == 0 {
		if err := judge("systemd-tmpfiles", "--create"); err != nil {
			t.Error(err)
		}
		status, err := os.Stat(filepath.Join(dest, "run/lock/est-enroll"))
		if err != nil || status.Mode() != fs.ModeDir|fs.ModeSticky|0o777 {
			t.Errorf("the directory of the locks: %v, %v", status, err)
		}
	}
	for _, made := range []string{"etc/passwd", "etc/group", "etc/shadow", "etc/gshadow", "etc/.pwd.lock", "run"} {
		if err := os.RemoveAll(filepath.Join(dest, made)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(dest, "etc/est-enroll/config.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The cron line is one that cron takes: five fields, a user, the installed program.
func TestCronLine(t *testing.T) {
	t.Parallel()
	line := regexp.MustCompile(`(?m)^\*/5( \*){4}  est-enroll  @bindir@/est-enroll renew$`)
	if text := read(t, "../../packaging/cron/est-enroll"); !line.MatchString(text) {
		t.Errorf("no line of cron's in\n%s", text)
	}
}

// Who is not root is told the command that installs what is missing, and no more.
func TestDeps(t *testing.T) {
	t.Parallel()
	const nobody = 65534
	script := strings.NewReader(read(t, "../../packaging/deps"))
	cmd := exec.CommandContext(t.Context(), "sh", "-s", "--", "libc6", "no-such-package")
	cmd.Dir, cmd.Stdin = "/", script
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	out, err := cmd.CombinedOutput()
	want := "packages are missing. Run this, then try again:\n  sudo apt-get update && sudo apt-get install -y --no-install-recommends no-such-package\n"
	if err == nil || string(out) != want {
		t.Errorf("%v\n%s", err, out)
	}
}
