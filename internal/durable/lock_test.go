package durable_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll/internal/durable"
)

// The test binary plays the other process: TestMain turns it into one.
const roleVariable, pathVariable = "DURABLE_TEST_ROLE", "DURABLE_TEST_PATH"

func TestMain(m *testing.M) {
	roles := map[string]func(string) error{"hold": hold, "count": count, "full": full}
	if role := os.Getenv(roleVariable); role != "" {
		if err := roles[role](os.Getenv(pathVariable)); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const holdCommand = "durable hold"

// hold holds the lock until its standard input ends.
func hold(path string) error {
	lock, err := durable.Acquire(context.Background(), path, 0o666, holdCommand)
	if err != nil {
		return err
	}
	fmt.Println("held")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	return lock.Release()
}

const increments = 10

// count adds to the number in a file, each time under the lock.
func count(path string) error {
	for range increments {
		lock, err := durable.Acquire(context.Background(), path+".lock", 0o600, "")
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(string(text))
		if err != nil {
			return err
		}
		// Not atomic on purpose: another process inside would see it empty.
		if err := os.WriteFile(path, []byte(strconv.Itoa(n+1)), 0o600); err != nil {
			return err
		}
		if err := lock.Release(); err != nil {
			return err
		}
	}
	return nil
}

// full writes a file that is larger than the process may write.
func full(path string) error {
	limit := syscall.Rlimit{Cur: 10, Max: 10}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	return durable.WriteFile(path, []byte("more than ten bytes"), 0o600)
}

type process struct {
	*exec.Cmd
	stdin io.Closer
}

// start starts the test binary in a role and, for a holder, waits until it holds.
func start(t *testing.T, role, path string, attr *syscall.SysProcAttr, binary string) *process {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary)
	cmd.Env = append(os.Environ(), roleVariable+"="+role, pathVariable+"="+path)
	cmd.SysProcAttr = attr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "held\n" {
		t.Fatalf("the holder says %q, %v", line, err)
	}
	return &process{cmd, stdin}
}

func startHolder(t *testing.T, path string) *process {
	return start(t, "hold", path, nil, os.Args[0])
}

// ended is a context that asks without waiting.
func ended(t *testing.T) context.Context {
	ctx, cancel := context.WithDeadline(t.Context(), time.Now())
	t.Cleanup(cancel)
	return ctx
}

func release(t *testing.T, lock *durable.Lock) {
	t.Helper()
	if err := lock.Release(); err != nil {
		t.Error(err)
	}
}

// holderOf asks for a lock that is held.
func holderOf(t *testing.T, path string) durable.Holder {
	t.Helper()
	_, err := durable.Acquire(ended(t), path, 0o666, "")
	var locked *durable.LockedError
	if !errors.As(err, &locked) || !errors.Is(err, context.DeadlineExceeded) || locked.Path != path {
		t.Fatalf("got %v, want a LockedError", err)
	}
	if want := fmt.Sprintf("lock: %s: held by %s", path, locked.Holder); err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	return locked.Holder
}

func TestLockHeldByAnotherProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	before := time.Now().Truncate(time.Second)
	holder := startHolder(t, path)
	got := holderOf(t, path)
	if got.PID != holder.Process.Pid || got.Command != holdCommand || got.Since.Before(before) || got.Since.After(time.Now()) {
		t.Errorf("got %+v, want pid %d, %q, since %s or later", got, holder.Process.Pid, holdCommand, before)
	}
	said := fmt.Sprintf("durable hold (pid %d, since %s)", got.PID, got.Since.UTC().Format("2006-01-02T15:04:05Z"))
	if got.String() != said {
		t.Errorf("got %q, want %q", got, said)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := durable.Acquire(ctx, path, 0o666, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}

	acquired := make(chan error)
	go func() {
		lock, err := durable.Acquire(t.Context(), path, 0o666, "")
		if err == nil {
			err = lock.Release()
		}
		acquired <- err
	}()
	if err := holder.stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-acquired; err != nil {
		t.Error(err)
	}
	if err := holder.Wait(); err != nil {
		t.Error(err)
	}
	if content, err := os.ReadFile(path); err != nil || len(content) != 0 {
		t.Errorf("a released lock's file holds %q, %v", content, err)
	}
}

func TestLockOfAKilledProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	holder := startHolder(t, path)
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = holder.Wait()                 // killed
	content, err := os.ReadFile(path) // it had no time to erase itself
	if err != nil || len(content) == 0 || !strings.HasPrefix(string(content), strconv.Itoa(holder.Process.Pid)+" ") {
		t.Fatalf("the file holds %q, %v", content, err)
	}

	// Someone holds the lock who does not write into the file.
	foreign, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	if err := syscall.Flock(int(foreign.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if got := holderOf(t, path); got != (durable.Holder{}) || got.String() != "another process" {
		t.Errorf("a dead process is shown: %v", got)
	}
	if err := syscall.Flock(int(foreign.Fd()), syscall.LOCK_UN); err != nil {
		t.Fatal(err)
	}

	lock, err := durable.Acquire(ended(t), path, 0o666, "")
	if err != nil {
		t.Fatal(err)
	}
	release(t, lock)
	release(t, lock) // does nothing
}

func TestLockWithinOneProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	lock, err := durable.Acquire(t.Context(), path, 0o600, "")
	if err != nil {
		t.Fatal(err)
	}
	if got := holderOf(t, path); got.PID != os.Getpid() || got.Command != filepath.Base(os.Args[0]) {
		t.Errorf("got %v, want this process by its program", got)
	}
	release(t, lock)
	lock, err = durable.Acquire(ended(t), path, 0o600, "")
	if err != nil {
		t.Fatal(err)
	}
	release(t, lock)
}

// ownStart returns what a lock of this process says of its start, between spaces.
func ownStart(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "lock")
	lock, err := durable.Acquire(t.Context(), path, 0o600, "")
	if err != nil {
		t.Fatal(err)
	}
	defer release(t, lock)
	content, err := os.ReadFile(path)
	fields := strings.Fields(string(content))
	if err != nil || len(fields) != 4 {
		t.Fatalf("%q, %v", content, err)
	}
	return " " + fields[1] + " "
}

// What a caller calls itself is one line of a bounded length, whatever it is.
func TestLockCommand(t *testing.T) {
	t.Parallel()
	for command, want := range map[string]string{
		"est-enroll renew":          "est-enroll renew",
		"two\nlines\x1b[31m":        "two_lines_[31m",
		strings.Repeat("long ", 30): strings.Repeat("long ", 30)[:64],
		"\u00e9t\u00e9":             "__t__",
	} {
		path := filepath.Join(t.TempDir(), "lock")
		lock, err := durable.Acquire(t.Context(), path, 0o600, command)
		if err != nil {
			t.Fatal(err)
		}
		if got := holderOf(t, path); got.Command != want {
			t.Errorf("got %q, want %q", got.Command, want)
		}
		release(t, lock)
	}
}

func TestLockHolderNotBelieved(t *testing.T) {
	t.Parallel()
	me := strconv.Itoa(os.Getpid())
	start, since := ownStart(t), "2026-11-24T23:30:00Z"
	for name, content := range map[string]string{
		"empty":                 "",
		"garbage":               "\x1b[31mhacked\n",
		"half a line":           me + start + since + " dura",
		"number used again":     me + " 1 " + since + " est-enroll\n",
		"control characters":    me + start + since + " \x1b[31m\n",
		"two lines":             me + start + since + " est-enroll\nest-enroll\n",
		"a group of processes":  "-1" + start + since + " est-enroll\n",
		"no process":            "0" + start + since + " est-enroll\n",
		"no command":            me + start + since + " \n",
		"number beyond an int":  "99999999999999999999" + start + since + " est-enroll\n",
		"number of another way": "+" + me + start + since + " est-enroll\n",
		"not a time":            me + start + "yesterday est-enroll\n",
		"a time to a fraction":  me + start + "2026-11-24T23:30:00.1Z est-enroll\n",
		"time of another zone":  me + start + "2026-11-24T23:30:00+01:00 est-enroll\n",
		"a novel":               me + start + since + " " + strings.Repeat("x", 65) + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "lock")
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			foreign, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer foreign.Close()
			if err := syscall.Flock(int(foreign.Fd()), syscall.LOCK_EX); err != nil {
				t.Fatal(err)
			}
			if got := holderOf(t, path); got != (durable.Holder{}) {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestLockRefusesWhatIsNoLockFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.Symlink(victim, at("symbolic link")),
		os.Symlink(at("absent"), at("dangling link")),
		os.Link(victim, at("hard link")),
		os.Mkdir(at("directory"), 0o700),
		syscall.Mkfifo(at("pipe"), 0o600),
		os.WriteFile(at("data"), make([]byte, 129), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before := names(t, dir)
	for _, name := range []string{"symbolic link", "dangling link", "hard link", "directory", "pipe", "data"} {
		if _, err := durable.Acquire(t.Context(), at(name), 0o666, ""); !errors.Is(err, durable.ErrNotLockFile) {
			t.Errorf("%s: got %v, want ErrNotLockFile", name, err)
		}
	}
	if _, err := durable.Acquire(t.Context(), at("absent/lock"), 0o666, ""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing directory: got %v, want fs.ErrNotExist", err)
	}
	if got := names(t, dir); !cmp.Equal(got, before) {
		t.Errorf("got %q, before %q", got, before)
	}
	status, err := os.Stat(victim)
	if err != nil || status.Mode() != 0o600 || status.Size() != 8 {
		t.Errorf("the victim: %v, %v", status, err)
	}
}

func TestLockMode(t *testing.T) { // not parallel: the umask is the process's
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	for _, mode := range []os.FileMode{0o666, 0o600} {
		path := filepath.Join(t.TempDir(), "lock")
		for range 2 { // as created, and as repaired
			lock, err := durable.Acquire(t.Context(), path, mode, "")
			if err != nil {
				t.Fatal(err)
			}
			status, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if status.Mode() != mode {
				t.Errorf("got %v, want %v", status.Mode(), mode)
			}
			release(t, lock)
			if err := os.Chmod(path, 0o640); err != nil { // as a creator killed before its Chmod leaves it
				t.Fatal(err)
			}
		}
	}
}

func TestLockBetweenUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be two users")
	}
	// t.TempDir is closed to other users, and so is the directory of the test binary.
	dir, err := os.MkdirTemp("", "durable-lock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "other")
	if err := os.WriteFile(binary, program, 0o755); err != nil {
		t.Fatal(err)
	}
	const daemon, nobody = 1, 65534
	as := func(id uint32) *syscall.SysProcAttr {
		return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
	}
	path := filepath.Join(dir, "token.lock")
	for _, user := range []uint32{nobody, daemon} { // the first creates the file, the second finds it
		holder := start(t, "hold", path, as(user), binary)
		if got := holderOf(t, path); got.PID != holder.Process.Pid || got.Command != holdCommand {
			t.Errorf("user %d: got %v, want pid %d", user, got, holder.Process.Pid)
		}
		if err := holder.stdin.Close(); err != nil {
			t.Fatal(err)
		}
		if err := holder.Wait(); err != nil {
			t.Error(err)
		}
	}
}

func TestLockExcludes(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "number")
	if err := os.WriteFile(path, []byte("0"), 0o600); err != nil {
		t.Fatal(err)
	}
	const processes = 4
	done := make(chan error)
	for range processes {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), roleVariable+"=count", pathVariable+"="+path)
		go func() {
			if output, err := cmd.CombinedOutput(); err != nil {
				done <- fmt.Errorf("%s: %w", output, err)
				return
			}
			done <- nil
		}()
	}
	for range processes {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != strconv.Itoa(processes*increments) {
		t.Errorf("got %s, %v, want %d", got, err, processes*increments)
	}
}

// TestWriteFileOnAFullDisk makes the write fail, not the disk full.
func TestWriteFileOnAFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"=full", pathVariable+"="+path)
	output, err := cmd.Output()
	if want := "write file: " + path + ": file too large\n"; err == nil || string(output) != want {
		t.Errorf("got %v, %q, want %q", err, output, want)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "old" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, want := names(t, dir), []string{"state.json"}; !cmp.Equal(got, want) {
		t.Errorf("left behind: got %q, want %q", got, want)
	}
}
