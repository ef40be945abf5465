// Package durable owns files that survive a crash and locks that do not: a file
// is replaced whole or not at all and is on the disk when the call returns, and
// a lock ends with the process that holds it. It knows nothing of what the files
// mean. The replacement is github.com/google/renameio/v2's, the lock
// github.com/gofrs/flock's; what they leave open is closed here and said where it is.
//
// It is for local file systems: over NFS the kernel emulates flock(2), and
// neither the lock nor the order of writes is promised.
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/renameio/v2"
)

// Errors of files, to be tested with errors.Is. A missing file is fs.ErrNotExist.
var (
	ErrNotRegular = errors.New("not a regular file")
	ErrNotLink    = errors.New("not a symbolic link")
	ErrTooLarge   = errors.New("file is too large")
)

// WriteFile replaces the file at path, or creates it, atomically: a reader, and
// the next run after a crash, sees the old content or the new one. When it
// returns nil the content and its name are on the disk. The mode is exactly
// perm, whatever the umask and whatever an earlier file had.
//
// Something at path that is not a regular file is refused with ErrNotRegular: a
// symbolic link is neither followed nor replaced. When only the last step, the
// fsync of the directory, fails, the new content is in place but may not outlive
// a power cut. What a killed WriteFile leaves is for RemoveTemporary.
func WriteFile(path string, data []byte, perm os.FileMode) (err error) {
	defer wrap(&err, "write file", path)
	switch existing, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case !existing.Mode().IsRegular():
		return ErrNotRegular
	}
	dir := filepath.Dir(path)
	// The directory is given, because renameio otherwise tries $TMPDIR first; the
	// file is created 0600 and has its mode before it has its content.
	pending, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(perm))
	if err != nil {
		return err
	}
	_, err = pending.Write(data)
	if err == nil {
		err = pending.CloseAtomicallyReplace() // fsync, close, rename
	}
	if err != nil {
		if failed := pending.Cleanup(); failed != nil {
			return errors.Join(err, failed)
		}
		return err
	}
	return syncDirectory(dir)
}

// Symlink makes path a symbolic link to target, or turns the link that is there,
// atomically: whoever opens path sees the old target or the new one. When it
// returns nil the link is on the disk. Anything else at path is refused with
// ErrNotLink. Two calls for one path MUST NOT run at once.
func Symlink(target, path string) (err error) {
	defer wrap(&err, "write link", path)
	switch existing, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case existing.Mode().Type() != fs.ModeSymlink:
		return ErrNotLink
	}
	// Not renameio.Symlink: a killed one leaves a directory with a random name. What
	// a killed call of this leaves, the next one takes away.
	dir := filepath.Dir(path)
	temporary := filepath.Join(dir, "."+filepath.Base(path)+".link")
	if err := syscall.Unlink(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "unlink", Path: temporary, Err: err}
	}
	if err := os.Symlink(target, temporary); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return errors.Join(err, syscall.Unlink(temporary))
	}
	return syncDirectory(dir)
}

// MkdirAll makes a directory and those above it that are missing, as os.MkdirAll
// does. When it returns nil, those that it made are on the disk: a file in one that
// is not would be lost with it.
func MkdirAll(path string, perm os.FileMode) error {
	var made []string
	for dir := filepath.Clean(path); ; dir = filepath.Dir(dir) {
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		made = append(made, dir)
	}
	if err := os.MkdirAll(path, perm); err != nil {
		return err
	}
	for _, dir := range made {
		if err := syncDirectory(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	return nil
}

// Remove removes the file at path; one that is missing already is no error. When
// it returns nil the removal is on the disk. It removes no directory, and a
// symbolic link itself rather than what it points to.
func Remove(path string) (err error) {
	defer wrap(&err, "remove file", path)
	// Not os.Remove, which also removes an empty directory. A missing file's
	// directory is synced too: a killed Remove may have left that undone.
	if err := syscall.Unlink(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "unlink", Path: path, Err: err}
	}
	if err := syncDirectory(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// RemoveTemporary removes what killed calls of WriteFile for these names in the
// directory left behind, and nothing else. The caller MUST hold the lock under
// which the files are written, or it removes the file of a WriteFile at work. A
// directory that is missing is no error.
func RemoveTemporary(dir string, names ...string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove temporary files: %w", err)
	}
	var failed []error
	for _, entry := range entries {
		if !entry.Type().IsRegular() {
			continue
		}
		for _, name := range names {
			if isTemporaryOf(entry.Name(), name) {
				failed = append(failed, Remove(filepath.Join(dir, entry.Name())))
				break
			}
		}
	}
	return errors.Join(failed...)
}

// isTemporaryOf reports whether renameio may have made the entry for the name:
// v2.0.2 puts a dot before it and a random non-negative int64 after it.
func isTemporaryOf(entry, name string) bool {
	suffix, found := strings.CutPrefix(entry, "."+name)
	number, err := strconv.ParseInt(suffix, 10, 64)
	return found && err == nil && number >= 0 && strconv.FormatInt(number, 10) == suffix
}

// ReadFile reads a regular file of at most limit bytes. A larger one is
// ErrTooLarge, and anything else at path, a pipe or a device, ErrNotRegular
// without waiting for it. A symbolic link to a regular file is followed.
func ReadFile(path string, limit int64) (data []byte, err error) {
	defer wrap(&err, "read file", path)
	// O_NONBLOCK: the open of a pipe without a writer must not wait.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close() // nothing was written
	status, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !status.Mode().IsRegular() {
		return nil, ErrNotRegular
	}
	data, err = io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%w: the limit is %d bytes", ErrTooLarge, limit)
	}
	return data, nil
}

// syncDirectory puts the names in a directory on the disk.
func syncDirectory(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := dir.Sync(); err != nil {
		return errors.Join(err, dir.Close())
	}
	return dir.Close()
}

// wrap says what was done to which path; a cause that names the path itself, or
// WriteFile's temporary one, gives up its own mention.
func wrap(err *error, doing, path string) {
	if *err == nil {
		return
	}
	cause := *err
	var pathErr *fs.PathError
	if errors.As(cause, &pathErr) && pathErr == cause && (pathErr.Path == path || isTemporaryOf(filepath.Base(pathErr.Path), filepath.Base(path))) {
		cause = pathErr.Err
	}
	*err = fmt.Errorf("%s: %s: %w", doing, path, cause)
}
