package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/p11crash"
	"estenroll/engine/enginetest/p11fault"
)

// failureStories are the runs that fail here, and are well again in the next one.
func failureStories() []crashStory {
	rekey := []string{"renew", "--force", "--rekey"}
	return []crashStory{
		{name: "enroll", args: []string{"enroll"}, leaves: 1, keys: 1},
		{name: "renew", args: []string{"renew", "--force"}, leaves: 2, keys: 1, before: [][]string{{"enroll"}}},
		{name: "rekey", args: rekey, leaves: 2, keys: 2, before: [][]string{{"enroll"}, rekey}},
	}
}

var failedStep = regexp.MustCompile(`(?m)^est-enroll: error: (\w+)`)

// TestFullDisk fills the file system of the state directory after each call that does
// something in the token. The run ends with an error that says so, and the next one,
// which has room again, goes on: nothing is lost, asked for twice or left behind.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	m := newMatrix(t)
	for _, story := range failureStories() {
		m.fromFactory(t)
		m.prepare(t, story)
		steps := map[string]bool{}
		effects := []string{"C_OpenSession", "C_Login", "C_GenerateKeyPair", "C_Sign", "C_CreateObject", "C_DestroyObject"}
		log := filepath.Join(t.TempDir(), "calls")
		recording := m.device(t, story.name+"-record").command(t, m.module.Path, m.module.Env(m.token.ModulePath, log, p11crash.Point{}), story.args...)
		if out, err := combined(recording); err != nil {
			t.Fatalf("%s: %v\n%s", story.name, err, out)
		}
		for _, at := range p11crash.ReadLog(t, log) {
			if at.When != p11crash.After || !slices.Contains(effects, at.Function) {
				continue
			}
			name := fmt.Sprintf("%s-full-%d", story.name, at.Number)
			d := m.device(t, name)
			log := filepath.Join(d.dir, "calls")
			env := append(m.module.Env(m.token.ModulePath, log, at), m.module.Fills(filepath.Join(d.dir, "disk", "filler")))
			failed := m.failure(t, story, d, false, func() (string, int) {
				return inNamespace(t, fullDisk, d.command(t, m.module.Path, env, story.args...), d.dir)
			})
			if !slices.Contains(p11crash.ReadLog(t, log), at) {
				t.Errorf("%s: the point %s was not passed", name, at)
			}
			switch {
			case failed.code == exitDone && !failed.complete, failed.code != exitDone && failed.code != exitTryLater:
				t.Errorf("%s at %s: exit code %d:\n%s", name, at, failed.code, failed.out)
			case failed.code == exitTryLater && (!strings.Contains(failed.out, "no space left on device\n") || !strings.Contains(failed.out, "hint: make room on the disk")):
				t.Errorf("%s at %s: what to do is not said:\n%s", name, at, failed.out)
			case failed.code == exitTryLater:
				steps[failedStep.FindStringSubmatch(failed.out)[1]] = true
			}
		}
		// Between the proof and the commit the program asks nothing of the token.
		want := []string{"prepare", "prove", "request", "store"}
		switch story.name {
		case "enroll":
			want = []string{"generate", "prepare", "prove", "request", "store"}
		case "rekey":
			want = []string{"generate", "prepare", "prove", "request", "store", "write"} // the journal, after a destruction
		}
		if got := slices.Sorted(maps.Keys(steps)); !slices.Equal(got, want) {
			t.Errorf("%s: the disk was full in the steps %v, want %v", story.name, got, want)
		}
	}
}

// TestReadOnlyDisk has the state directory on a file system that nobody writes to.
func TestReadOnlyDisk(t *testing.T) {
	t.Parallel()
	m := newMatrix(t)
	for _, story := range failureStories() {
		m.fromFactory(t)
		m.prepare(t, story)
		d := m.device(t, story.name+"-read-only")
		if err := os.MkdirAll(filepath.Join(d.dir, "state"), 0o700); err != nil {
			t.Fatal(err)
		}
		failed := m.failure(t, story, d, false, func() (string, int) {
			return inNamespace(t, readOnlyDisk, d.command(t, m.token.ModulePath, nil, story.args...), d.dir)
		})
		if failed.code != exitUsage || !strings.Contains(failed.out, "read-only file system\n") || !strings.Contains(failed.out, "hint: the file system is mounted read-only: state-dir must be writable") {
			t.Errorf("%s: exit code %d:\n%s", story.name, failed.code, failed.out)
		}
	}
}

// TestTokenRefuses has the token refuse an object or lose its session, at each call that
// does something in it, with what a token says then.
func TestTokenRefuses(t *testing.T) {
	t.Parallel()
	m := newMatrix(t)
	module, err := p11fault.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	const refuses, lost = "before", "after"
	faults := []struct {
		value, when, hint string
		code              int
	}{
		{"0x31", refuses, "make room in the token", exitToken},        // CKR_DEVICE_MEMORY
		{"0xe2", refuses, "take off the write protection", exitToken}, // CKR_TOKEN_WRITE_PROTECTED
		{"0xb3", lost, "connect the device again", exitTryLater},      // CKR_SESSION_HANDLE_INVALID
		{"0x32", lost, "connect the device again", exitTryLater},      // CKR_DEVICE_REMOVED
	}
	for _, story := range failureStories() {
		m.fromFactory(t)
		m.prepare(t, story)
		for _, function := range []string{"C_GenerateKeyPair", "C_CreateObject"} {
			if function == "C_GenerateKeyPair" && story.name == "renew" {
				continue
			}
			for _, fault := range faults {
				name := fmt.Sprintf("%s-%s-%s", story.name, function, fault.value)
				d := m.device(t, name)
				dir := filepath.Join(d.dir, "faults")
				if err := errors.Join(os.Mkdir(dir, 0o700), p11fault.Set(dir, "return", function+" "+fault.when+" "+fault.value)); err != nil {
					t.Fatal(err)
				}
				// A rekey that the token does not do its part of is given up, its certificate with it.
				anew := story.name == "rekey" && function == "C_CreateObject" && fault.when == refuses
				failed := m.failure(t, story, d, anew, func() (string, int) {
					return outcome(t, d.command(t, module, p11fault.Env(m.token.ModulePath, dir), story.args...))
				})
				if _, err := os.Stat(filepath.Join(dir, "return")); err == nil {
					t.Errorf("%s: the fault was not reached", name)
				}
				if failed.code == exitDone && failed.complete && fault.when == lost { // found by its id
					continue
				}
				if failed.code != fault.code || !strings.Contains(failed.out, "hint: "+fault.hint) {
					t.Errorf("%s: exit code %d, want %d:\n%s", name, failed.code, fault.code, failed.out)
				}
			}
		}
	}
}

// failed is what a run came to that something was in the way of.
type failed struct {
	out      string
	code     int
	complete bool // it had recorded its success
}

// failure has a run fail, then runs the story once more where all is well, and judges.
// A run that is begun anew asks for another certificate.
func (m *matrix) failure(t *testing.T, story crashStory, d *crashDevice, anew bool, fails func() (string, int)) failed {
	t.Helper()
	issuedBefore := len(m.issuances(t))
	f := failed{}
	f.out, f.code = fails()
	f.complete = f.code == exitDone
	if story.before != nil {
		f.complete = d.complete(t)
	}
	want := 1
	if anew || f.complete && story.before != nil {
		want = 2
	}
	d.hasItsPair(t, f)
	out, err := d.run(t, story.args...)
	if err != nil {
		t.Errorf("%s: the next run: %v\n%safter\n%s", d.subject, err, out, f.out)
		return f
	}
	issued := m.issuances(t)[issuedBefore:]
	wrong := new(findings)
	d.judge(t, story, issued, wrong)
	if len(issued) != want {
		wrong.add("the server issued %d certificates, want %d", len(issued), want)
	}
	if len(wrong.text) > 0 {
		t.Errorf("%s:\n%s\nthe run that failed:\n%sthe next run:\n%s", d.subject, strings.Join(wrong.text, "\n"), f.out, out)
	}
	return f
}

var addresses = regexp.MustCompile(`"(pkcs11:[^"]+)"`)

// hasItsPair wants what the Security object points at in the token.
func (d *crashDevice) hasItsPair(t *testing.T, f failed) {
	t.Helper()
	security, err := os.ReadFile(filepath.Join(d.dir, "state", "security.json"))
	if errors.Is(err, fs.ErrNotExist) { // before the first boot did anything
		return
	}
	found := addresses.FindAllSubmatch(security, -1)
	if err != nil || len(found) < 2 {
		t.Fatalf("%s: the Security object: %v: %s\n%s", d.subject, err, security, f.out)
	}
	objects, err := d.list(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, match := range found {
		address := string(match[1])
		if strings.Contains(address, "object="+opensc.IDevIDLabel+";") { // the factory's, which every judge looks for
			continue
		}
		label, id := attributes(t, address)
		if !slices.ContainsFunc(objects, func(o tokenObject) bool { return o.label == label && o.id == id }) {
			t.Errorf("%s: %s is not in the token\n%s", d.subject, address, f.out)
		}
	}
}

// The shell scripts that make the file system of a device's directory, DEVICE, in a
// namespace of mounts, and run a command on it.
const (
	// What is on the disk in the end stays: its directory "disk/state" is "state" then.
	fullDisk = `
export EST_ENROLL_STATE_DIR="$DEVICE/disk/state"
mkdir "$DEVICE/disk"
mount -t tmpfs -o size=64k,mode=0700 est-enroll "$DEVICE/disk" || exit 99
if test -e "$DEVICE/state"; then cp -a "$DEVICE/state" "$DEVICE/disk/" || exit 99; fi
"$@"
code=$?
rm -rf "$DEVICE/state"
if test -e "$DEVICE/disk/state"; then cp -a "$DEVICE/disk/state" "$DEVICE/" || exit 99; fi
umount "$DEVICE/disk"
exit $code`
	readOnlyDisk = `
mount --bind "$DEVICE/state" "$DEVICE/state" && mount -o remount,bind,ro "$DEVICE/state" || exit 99
"$@"
code=$?
umount "$DEVICE/state"
exit $code`
)

// namespace is how this user gets a namespace of mounts: root has one, any other user
// one in a namespace of users, and where the root directory is no mount, as in a chroot,
// it is left as it is.
var namespace = sync.OnceValues(func() ([]string, error) {
	var failures []error
	for _, flags := range [][]string{{"-m"}, {"-r", "-m"}, {"-m", "--propagation", "unchanged"}} {
		out, err := exec.Command("unshare", append(slices.Clone(flags), "true")...).CombinedOutput()
		if err == nil {
			return flags, nil
		}
		failures = append(failures, fmt.Errorf("unshare %s: %w: %s", strings.Join(flags, " "), err, out))
	}
	return nil, errors.Join(failures...)
})

// inNamespace runs a command with file systems of its own.
func inNamespace(t *testing.T, script string, cmd *exec.Cmd, dir string) (string, int) {
	t.Helper()
	flags, err := namespace()
	if err != nil {
		t.Fatalf("no mounts can be made here, which this test needs (in a container: as root with --cap-add SYS_ADMIN, or with user namespaces): %v", err)
	}
	unshare := exec.CommandContext(t.Context(), "unshare", append(append(slices.Clone(flags), "sh", "-c", script, "sh"), cmd.Args...)...)
	unshare.Env = append(cmd.Env, "DEVICE="+dir, "PATH="+os.Getenv("PATH"))
	out, code := outcome(t, unshare)
	if code == 99 {
		t.Fatalf("no mounts can be made here, which this test needs (in a container: as root with --cap-add SYS_ADMIN):\n%s", out)
	}
	return out, code
}

// outcome runs a command and returns what it says and its exit code.
func outcome(t *testing.T, cmd *exec.Cmd) (string, int) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}
