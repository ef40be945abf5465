package durable_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/renameio/v2"

	"estenroll/internal/durable"
)

// names lists a directory, hidden files included.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, entry := range entries {
		list = append(list, entry.Name())
	}
	return list
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	old := syscall.Umask(0o077) // not parallel: the umask is the process's
	defer syscall.Umask(old)
	for _, tc := range []struct {
		content string
		perm    os.FileMode
	}{{"first", 0o644}, {"the second one", 0o600}, {"", 0o666}, {"third", 0o400}} {
		if err := durable.WriteFile(path, []byte(tc.content), tc.perm); err != nil {
			t.Fatal(err)
		}
		status, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := status.Mode(); got != tc.perm {
			t.Errorf("mode after %q: got %v, want %v", tc.content, got, tc.perm)
		}
		got, err := durable.ReadFile(path, 100)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != tc.content {
			t.Errorf("content: got %q, want %q", got, tc.content)
		}
	}
	if got, want := names(t, dir), []string{"state.json"}; !cmp.Equal(got, want) {
		t.Errorf("left behind: got %q, want %q", got, want)
	}
}

func TestWriteFileIgnoresTMPDIR(t *testing.T) {
	elsewhere := t.TempDir()
	t.Setenv("TMPDIR", elsewhere)
	path := filepath.Join(t.TempDir(), "state.json")
	before, err := os.Stat(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	if !before.ModTime().Equal(after.ModTime()) {
		t.Errorf("a temporary file was made in $TMPDIR")
	}
}

func TestWriteFileRefused(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(victim, link); err != nil {
		t.Fatal(err)
	}
	dangling := filepath.Join(dir, "dangling")
	if err := os.Symlink(filepath.Join(dir, "absent"), dangling); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, path string
		want       error
	}{
		{"symbolic link", link, durable.ErrNotRegular},
		{"dangling symbolic link", dangling, durable.ErrNotRegular},
		{"directory", dir, durable.ErrNotRegular},
		{"missing directory", filepath.Join(dir, "absent", "state.json"), fs.ErrNotExist},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := names(t, dir)
			err := durable.WriteFile(tc.path, []byte("x"), 0o600)
			if !errors.Is(err, tc.want) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
			if !strings.HasPrefix(err.Error(), "write file: "+tc.path+": ") {
				t.Errorf("not doing, object, cause: %v", err)
			}
			if got := names(t, dir); !cmp.Equal(got, before) {
				t.Errorf("left behind: %q, before %q", got, before)
			}
		})
	}
	if got, err := os.ReadFile(victim); err != nil || string(got) != "precious" {
		t.Errorf("the victim holds %q, %v", got, err)
	}
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, path string
		limit      int64
		want       error
	}{
		{"as large as the limit", file, 5, nil},
		{"larger", file, 4, durable.ErrTooLarge},
		{"through a link", link, 5, nil},
		{"pipe without a writer", pipe, 5, durable.ErrNotRegular},
		{"device", "/dev/zero", 5, durable.ErrNotRegular},
		{"directory", dir, 5, durable.ErrNotRegular},
		{"missing", filepath.Join(dir, "absent"), 5, fs.ErrNotExist},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := durable.ReadFile(tc.path, tc.limit)
			if !errors.Is(err, tc.want) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
			if err == nil && string(got) != "12345" {
				t.Errorf("got %q", got)
			}
			if err != nil && (len(got) != 0 || strings.Count(err.Error(), tc.path) != 1) {
				t.Errorf("got %q with %v", got, err)
			}
		})
	}
}

func TestSymlink(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "current")
	// What a killed call leaves.
	if err := os.Symlink("killed", filepath.Join(dir, ".current.link")); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"first", "second", "second"} {
		if err := durable.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(path); err != nil || got != target {
			t.Errorf("got %q, %v, want %q", got, err, target)
		}
		if got, want := names(t, dir), []string{"current"}; !cmp.Equal(got, want) {
			t.Errorf("left behind: got %q, want %q", got, want)
		}
	}
}

// What is no link is neither replaced nor removed.
func TestSymlinkRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, folder := filepath.Join(dir, "file"), filepath.Join(dir, "folder")
	if err := errors.Join(os.WriteFile(file, []byte("mine"), 0o600), os.Mkdir(folder, 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, folder} {
		if err := durable.Symlink("target", path); !errors.Is(err, durable.ErrNotLink) || !strings.Contains(err.Error(), "write link: "+path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := durable.Symlink("target", filepath.Join(dir, "missing", "link")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	if got, want := names(t, dir), []string{"file", "folder"}; !cmp.Equal(got, want) {
		t.Errorf("in the directory: got %q, want %q", got, want)
	}
}

// That what it makes is on the disk, the system calls of a first boot show
// (cmd/est-enroll, TestTrace).
func TestMkdirAll(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b")
	for range 2 {
		if err := durable.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if status, err := os.Stat(path); err != nil || status.Mode() != 0o700|fs.ModeDir {
			t.Errorf("%v, %v", status, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := durable.MkdirAll(filepath.Join(dir, "file", "below"), 0o700); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("got %v, want ENOTDIR", err)
	}
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, file, filepath.Join(dir, "absent", "file")} {
		if err := durable.Remove(path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	empty := filepath.Join(dir, "empty")
	if err := os.Mkdir(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := durable.Remove(empty); err == nil {
		t.Errorf("a directory was removed")
	}
	if got, want := names(t, dir), []string{"empty"}; !cmp.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestRemoveTemporaryOfRenameio holds the pattern to what the library really does.
func TestRemoveTemporaryOfRenameio(t *testing.T) {
	dir := t.TempDir()
	for range 20 {
		pending, err := renameio.NewPendingFile(filepath.Join(dir, "state.json"), renameio.WithTempDir(dir))
		if err != nil {
			t.Fatal(err)
		}
		if err := pending.File.Close(); err != nil { // as a kill does: neither replaced nor cleaned up
			t.Fatal(err)
		}
	}
	if got := len(names(t, dir)); got != 20 {
		t.Fatalf("%d temporary files, want 20", got)
	}
	if err := durable.RemoveTemporary(dir, "state.json"); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); len(got) != 0 {
		t.Errorf("left behind: %q", got)
	}
}

func TestRemoveTemporary(t *testing.T) {
	dir := t.TempDir()
	stay := []string{
		".state.json", ".state.json.swp", ".state.json-1", ".state.json007", ".state.json99999999999999999999",
		".state.json+1", ".other42", "state.json", "state.json12",
	}
	for _, name := range append([]string{".state.json123", ".state.json0", ".journal.json9223372036854775807"}, stay...) {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, ".state.json5"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := durable.RemoveTemporary(dir, "state.json", "journal.json"); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{".state.json5": true}
	for _, name := range stay {
		want[name] = true
	}
	got := map[string]bool{}
	for _, name := range names(t, dir) {
		got[name] = true
	}
	if diff := cmp.Diff(got, want); diff != "" {
		t.Error(diff)
	}
	if err := durable.RemoveTemporary(filepath.Join(dir, "absent"), "state.json"); err != nil {
		t.Error(err)
	}
}
