package durable_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"estenroll/internal/durable"
)

// Those who read share the lock, exclude who takes it, and write nothing.
func TestShare(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "lock")
	if _, err := durable.Share(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no file: got %v, want %v", err, fs.ErrNotExist)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("it made %v, %v", entries, err)
	}

	owner := startHolder(t, path)
	_, err := durable.Share(path)
	var held *durable.LockedError
	if !errors.As(err, &held) || held.Holder.PID != owner.Process.Pid {
		t.Errorf("of a held lock: got %v", err)
	}
	if err := errors.Join(owner.stdin.Close(), owner.Wait()); err != nil {
		t.Fatal(err)
	}

	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	var readers []*durable.Lock
	for range 2 {
		reader, err := durable.Share(path)
		if err != nil {
			t.Fatal(err)
		}
		readers = append(readers, reader)
	}
	if holder := holderOf(t, path); holder.PID != 0 { // they do not say who they are
		t.Errorf("beside readers: got %v", holder)
	}
	for _, reader := range readers {
		release(t, reader)
	}
	after, err := os.Stat(path)
	if err != nil || after.Size() != 0 || after.ModTime() != before.ModTime() {
		t.Errorf("the file is another: %v, %v", after, err)
	}
	owner = startHolder(t, path) // it is free
	if err := errors.Join(owner.stdin.Close(), owner.Wait()); err != nil {
		t.Fatal(err)
	}

	link := filepath.Join(dir, "link")
	if err := errors.Join(os.Symlink(path, link), os.WriteFile(path, make([]byte, 4096), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{link, path} {
		if _, err := durable.Share(wrong); !errors.Is(err, durable.ErrNotLockFile) {
			t.Errorf("%s: got %v, want %v", wrong, err, durable.ErrNotLockFile)
		}
	}
}
