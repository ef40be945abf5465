package durable

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/gofrs/flock"
)

// PollInterval is how often Acquire looks whether a lock that another holds has
// become free. It bounds how long a lock is idle between two owners, and costs
// three system calls each time.
const PollInterval = 50 * time.Millisecond

// holderLimit is the most that a lock file holds: "pid start since command\n". A
// larger file is not a lock file, and is refused before it is written to.
const (
	holderLimit  = 128
	commandLimit = 64

	creationAttempts = 4 // how often, a PollInterval apart, a new file may still lack its mode
)

// ErrNotLockFile says that something else is where a lock file should be.
var ErrNotLockFile = errors.New("not a lock file")

// LockedError says that a lock stayed held by another until the context ended.
type LockedError struct {
	Path   string
	Holder Holder
	// Err is the context's error: context.DeadlineExceeded or context.Canceled.
	Err error
}

// Error names the holder where it is known.
func (e *LockedError) Error() string {
	return fmt.Sprintf("lock: %s: held by %s", e.Path, e.Holder)
}

// Unwrap returns the context's error.
func (e *LockedError) Unwrap() error { return e.Err }

// Holder is who holds a lock, as it wrote itself into the lock file: a hint for
// a person, since all who share the file can write to it. The zero Holder is
// one that is not known: it has not written yet, or could not, or what stands
// there is of a process that is gone.
type Holder struct {
	PID     int
	Command string    // printable ASCII: the program and what it does, without arguments
	Since   time.Time // by the holder's clock, in seconds
}

// String returns "est-enroll renew (pid 4711, since 2026-11-24T23:30:00Z)".
func (h Holder) String() string {
	if h.PID == 0 {
		return "another process"
	}
	return fmt.Sprintf("%s (pid %d, since %s)", h.Command, h.PID, h.Since.Format(time.RFC3339))
}

// Lock is a lock that is held. It ends with Release or with the process, however
// that ends.
type Lock struct {
	lock *flock.Flock
	file *os.File // written to; nil when only reading was allowed
}

// Acquire takes the exclusive lock that the file at path stands for, and waits
// for it until the context ends; then the error is a *LockedError. At least one
// attempt is made: a context that has ended already asks without waiting.
// Locks of one process exclude each other too. Those who wait are told the command,
// by default the program's name; whoever may read the file reads it.
//
// The file is created with exactly the mode given and is never removed, by
// anyone: two processes would then hold locks on two files of one name. It may
// stand in a directory that all users write to (1777, with mode 0666): a
// symbolic link, a second hard link, or anything that is not a small regular file
// is refused with ErrNotLockFile.
func Acquire(ctx context.Context, path string, mode os.FileMode, command string) (*Lock, error) {
	// Not flock's TryLockContext: each attempt must find the file anew. flock's own
	// flags would follow a symbolic link, and its O_CREATE fails on another
	// user's file in a sticky directory (sysctl fs.protected_regular).
	for attempt := 0; ; attempt++ {
		lock, err := tryAcquire(path, mode, command)
		// Between another user's creation of the file and its Chmod it may be closed to us.
		if err != nil && (attempt >= creationAttempts || !errors.Is(err, fs.ErrPermission)) {
			wrap(&err, "lock", path)
			return nil, err
		}
		if lock != nil {
			return lock, nil
		}
		timer := time.NewTimer(PollInterval)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, &LockedError{Path: path, Holder: readHolder(path), Err: ctx.Err()}
		case <-timer.C:
		}
	}
}

// tryAcquire returns nil without an error while another holds the lock.
func tryAcquire(path string, mode os.FileMode, command string) (*Lock, error) {
	if err := create(path, mode); err != nil {
		return nil, err
	}
	// Reading is enough for flock(2); writing the holder is a courtesy that a
	// file's mode may forbid.
	lock := flock.New(path, flock.SetFlag(os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK))
	locked, err := lock.TryLock()
	switch {
	case errors.Is(err, syscall.ELOOP):
		return nil, fmt.Errorf("%w: a symbolic link", ErrNotLockFile)
	case errors.Is(err, fs.ErrNotExist): // removed by a stranger since create
		return nil, nil
	case err != nil:
		return nil, err
	case !locked:
		return nil, nil
	}
	held, err := lock.Stat()
	if err == nil {
		err = checkLockFile(held)
	}
	if err != nil {
		return nil, errors.Join(err, lock.Unlock())
	}
	// Nobody should remove the file. If someone did, this lock excludes no one:
	// give it up and look again.
	if named, err := os.Lstat(path); err != nil || !os.SameFile(named, held) {
		return nil, lock.Unlock()
	}
	owned := &Lock{lock: lock}
	owned.writeHolder(held, mode.Perm(), command)
	return owned, nil
}

// create makes the lock file if it is missing. Its mode is set afterwards, since
// the umask has a say in the first one; where a creator was killed in between,
// its next lock sets it.
func create(path string, mode os.FileMode) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	file, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, mode.Perm())
	if errors.Is(err, fs.ErrExist) {
		return nil // another process was quicker
	}
	if err != nil {
		return err
	}
	return errors.Join(file.Chmod(mode.Perm()), file.Close())
}

func checkLockFile(status fs.FileInfo) error {
	switch {
	case !status.Mode().IsRegular():
		return fmt.Errorf("%w: not a regular file", ErrNotLockFile)
	case status.Size() > holderLimit:
		return fmt.Errorf("%w: %d bytes long", ErrNotLockFile, status.Size())
	}
	// A link to a file of ours that a stranger put here: it would be written to.
	if stat, ok := status.Sys().(*syscall.Stat_t); ok && stat.Nlink > 1 {
		return fmt.Errorf("%w: it has %d names", ErrNotLockFile, stat.Nlink)
	}
	return nil
}

// Release gives the lock up. The file stays, empty. A second Release does nothing.
// A Lock is for one goroutine at a time.
func (l *Lock) Release() error {
	if l.file != nil {
		// While the lock is still held: afterwards the file speaks of the next
		// holder. What cannot be erased is stale and will not be believed.
		_ = l.file.Truncate(0)
		_ = l.file.Close()
		l.file = nil
	}
	if err := l.lock.Unlock(); err != nil {
		return fmt.Errorf("unlock: %s: %w", l.lock.Path(), err)
	}
	return nil
}

// writeHolder writes "pid start since command\n" for those who wait. It may fail, on a
// full disk or in another user's read-only file: the lock is held all the same.
func (l *Lock) writeHolder(held fs.FileInfo, mode os.FileMode, command string) {
	file, err := os.OpenFile(l.lock.Path(), os.O_RDWR|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return
	}
	if opened, err := file.Stat(); err != nil || !os.SameFile(opened, held) {
		_ = file.Close()
		return
	}
	if held.Mode().Perm() != mode {
		_ = file.Chmod(mode) // only its owner can
	}
	since := time.Now().UTC().Format(time.RFC3339)
	_ = file.Truncate(0)
	_, _ = fmt.Fprintf(file, "%d %s %s %s\n", os.Getpid(), ownStartTime(), since, printable(command))
	l.file = file // kept open: where flock is emulated, closing it would unlock
}

// printable makes a command fit for a lock file.
func printable(command string) string {
	text := []byte(cmp.Or(command, filepath.Base(os.Args[0])))
	for i, c := range text {
		if c < ' ' || c > '~' {
			text[i] = '_'
		}
	}
	return string(text[:min(len(text), commandLimit)])
}

// readHolder returns the zero Holder unless the file names a process that lives.
func readHolder(path string) Holder {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Holder{}
	}
	defer file.Close() // nothing was written
	content := make([]byte, holderLimit)
	n, err := file.ReadAt(content, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Holder{}
	}
	holder, start, ok := parseHolder(string(content[:n]))
	if !ok || syscall.Kill(holder.PID, 0) == syscall.ESRCH {
		return Holder{}
	}
	// A process of the same number that started at another time is not the holder.
	if now := startTime(holder.PID); now != "0" && now != start {
		return Holder{}
	}
	return holder
}

// parseHolder reads "pid start since command\n", which anybody may have written,
// and takes only what writeHolder writes.
func parseHolder(content string) (holder Holder, start string, ok bool) {
	line, whole := strings.CutSuffix(content, "\n")
	fields := strings.SplitN(line, " ", 4)
	if !whole || len(content) > holderLimit || len(fields) != 4 {
		return Holder{}, "", false
	}
	pid, err := strconv.ParseInt(fields[0], 10, 32)
	if err != nil || pid <= 0 || strconv.FormatInt(pid, 10) != fields[0] {
		return Holder{}, "", false
	}
	since, err := time.Parse(time.RFC3339, fields[2])
	if err != nil || since.UTC().Format(time.RFC3339) != fields[2] {
		return Holder{}, "", false
	}
	if fields[3] == "" || fields[3] != printable(fields[3]) {
		return Holder{}, "", false
	}
	return Holder{PID: int(pid), Command: fields[3], Since: since.UTC()}, fields[1], true
}

// ownStartTime is startTime of this process, which takes locks more than once.
var ownStartTime = sync.OnceValue(func() string { return startTime(os.Getpid()) })

// startTime returns when a process started, in clock ticks since the boot
// (proc_pid_stat(5), field 22), or "0" where it cannot be known.
func startTime(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "0"
	}
	// The second field, the name in parentheses, may hold anything.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return "0"
	}
	return fields[19]
}
