package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"github.com/gofrs/flock"
)

// Share is for those who only read what a lock is for: while they hold it no Acquire
// succeeds, and they do not exclude each other. It does not wait: where the lock is
// held the error is a *LockedError. It creates and writes nothing: where nobody has
// ever locked, it is fs.ErrNotExist.
func Share(path string) (*Lock, error) {
	lock := flock.New(path, flock.SetFlag(os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK))
	locked, err := lock.TryRLock()
	switch {
	case errors.Is(err, syscall.ELOOP):
		err = fmt.Errorf("%w: a symbolic link", ErrNotLockFile)
	case err == nil && !locked:
		return nil, &LockedError{Path: path, Holder: readHolder(path)}
	case err == nil:
		err = checkShared(lock)
	}
	if err != nil {
		wrap(&err, "lock", path)
		return nil, err
	}
	return &Lock{lock: lock}, nil
}

// checkShared gives a lock up that is not one.
func checkShared(lock *flock.Flock) error {
	held, err := lock.Stat()
	if err == nil {
		err = checkLockFile(held)
	}
	if err == nil {
		if named, lost := os.Lstat(lock.Path()); lost != nil || !os.SameFile(named, held) {
			err = fs.ErrNotExist // removed by a stranger: it stands for nothing any more
		}
	}
	if err != nil {
		return errors.Join(err, lock.Unlock())
	}
	return nil
}
