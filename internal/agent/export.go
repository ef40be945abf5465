// Package agent owns what surrounds the lifecycle of a credential: what a run
// does for the other programs of the device, and the doctor, who says what a run would
// come to. It takes no decision about a credential and touches no key.
package agent

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"estenroll"
	"estenroll/internal/durable"
)

// ErrExport says that the export could not be written. The credential itself is
// in place: the next run writes the export again.
var ErrExport = errors.New("the files for other programs are not up to date")

// Export is what other programs get of a credential: everything but the key,
// which they use in the token by its address.
type Export struct {
	// Dir holds the exports of all credentials. It is created with mode 0755: what
	// is in it is public.
	Dir string
	// Name of the credential, and of its link in Dir. See estenroll.CheckName.
	Name string
	// Key and Certificate are the addresses as other programs take them, without a PIN.
	Key, Certificate string
	Chain            []*x509.Certificate // leaf first
	TrustAnchors     []*x509.Certificate
}

const (
	exportDirMode  = 0o755
	exportFileMode = 0o644
	exportLimit    = 1 << 20 // bytes of one exported file
)

// Write makes Dir/Name show the credential, and reports whether it did not
// already. Dir/Name is a symbolic link to a directory that is written once and
// never changed: a program that follows the link finds files that belong
// together, before, during and after. The directory before it is kept until the
// next change, for programs that have just followed the old link. What a killed
// Write or anybody else left there is not believed but compared, and made again;
// directories that nothing refers to go with the next change.
//
// Two calls for one Dir and Name MUST NOT run at once. ErrExport.
func (e Export) Write() (changed bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("export: %w: %w", err, ErrExport)
		}
	}()
	if err := estenroll.CheckName(e.Name); err != nil {
		return false, err
	}
	if e.Dir, err = filepath.Abs(e.Dir); err != nil {
		return false, err
	}
	if err := makeDirectory(e.Dir); err != nil {
		return false, err
	}
	link := filepath.Join(e.Dir, e.Name)
	old, err := os.Readlink(link)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.EINVAL) { // EINVAL: no link, which Symlink refuses
		return false, err
	}
	if e.isGeneration(old) && e.holds(filepath.Join(e.Dir, old)) {
		return false, nil
	}
	generation, err := os.MkdirTemp(e.Dir, "."+e.Name+".")
	if err != nil {
		return false, err
	}
	err = e.fill(generation)
	if err == nil {
		err = durable.Symlink(filepath.Base(generation), link)
	}
	if err != nil {
		return false, errors.Join(err, os.RemoveAll(generation))
	}
	return true, e.removeGenerations(filepath.Base(generation), old)
}

// Remove removes the export of a credential; one that is missing already is no
// error. What is no export of Write's is left alone. ErrExport.
func Remove(dir, name string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("remove export: %w: %w", err, ErrExport)
		}
	}()
	if err := estenroll.CheckName(name); err != nil {
		return err
	}
	path := filepath.Join(dir, name)
	switch existing, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case existing.Mode().Type() != fs.ModeSymlink:
		return fmt.Errorf("%s: %w", path, durable.ErrNotLink)
	default:
		if err := durable.Remove(path); err != nil {
			return err
		}
	}
	if err := (Export{Dir: dir, Name: name}).removeGenerations(); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// makeDirectory is os.MkdirAll, whose modes are the umask's to take from.
func makeDirectory(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(dir, exportDirMode); err != nil {
		return err
	}
	return os.Chmod(dir, exportDirMode)
}

// files are the content of the export in a directory, by name.
func (e Export) files(dir string) map[string][]byte {
	line := func(format string, args ...any) []byte { return fmt.Appendf(nil, format+"\n", args...) }
	// A program that is told of a certificate and a key in one file, by the names
	// of the directory itself, never gets one of the old pair and one of the new.
	fullChain := filepath.Join(dir, "fullchain.pem")
	return map[string][]byte{
		"cert.pem":        encode(e.Chain[:1]),
		"chain.pem":       encode(e.Chain[1:]),
		"fullchain.pem":   encode(e.Chain),
		"ca.pem":          encode(e.TrustAnchors),
		"key.uri":         line("%s", e.Key),
		"certificate.uri": line("%s", e.Certificate),
		// Programs that take the key's address in their configuration alone, in the
		// form that their configuration can include.
		"nginx/credential.conf":     line("ssl_certificate %s;\nssl_certificate_key \"engine:pkcs11:%s\";", quote(fullChain), e.Key),
		"mosquitto/credential.conf": line("certfile %s\nkeyfile %s", fullChain, e.Key),
		"stunnel/credential.conf":   line("cert = %s\nkey = %s", fullChain, e.Key),
	}
}

// quote is a path as a word of nginx's configuration.
func quote(path string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(path) + `"`
}

func encode(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, cert := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}) // a buffer takes everything
	}
	return b.Bytes()
}

// fill writes the files. When it returns nil they are on the disk.
func (e Export) fill(dir string) error {
	if err := os.Chmod(dir, exportDirMode); err != nil {
		return err
	}
	files := e.files(dir)
	for name := range files {
		if folder := filepath.Dir(filepath.Join(dir, name)); folder != dir {
			if err := makeDirectory(folder); err != nil {
				return err
			}
		}
	}
	// Each write syncs its directory: those in dir sync the folders' names too.
	for name, content := range files {
		if err := durable.WriteFile(filepath.Join(dir, name), content, exportFileMode); err != nil {
			return err
		}
	}
	return nil
}

// holds reports whether a directory is what fill would make of it.
func (e Export) holds(dir string) bool {
	readable := func(path string, mode fs.FileMode) bool {
		status, err := os.Lstat(path)
		return err == nil && status.Mode() == mode
	}
	if !readable(dir, fs.ModeDir|exportDirMode) {
		return false
	}
	for name, want := range e.files(dir) {
		path := filepath.Join(dir, name)
		got, err := durable.ReadFile(path, exportLimit)
		if err != nil || !bytes.Equal(got, want) || !readable(path, exportFileMode) || filepath.Dir(path) != dir && !readable(filepath.Dir(path), fs.ModeDir|exportDirMode) {
			return false
		}
	}
	return true
}

// isGeneration reports whether Write may have made a directory of this name:
// os.MkdirTemp puts a random number after the dot.
func (e Export) isGeneration(name string) bool {
	number, found := strings.CutPrefix(name, "."+e.Name+".")
	return found && number != "" && strings.Trim(number, "0123456789") == ""
}

// removeGenerations removes the directories that Write made, but for those to keep.
func (e Export) removeGenerations(keep ...string) error {
	entries, err := os.ReadDir(e.Dir)
	if err != nil {
		return err
	}
	var failed []error
	for _, entry := range entries {
		if entry.IsDir() && e.isGeneration(entry.Name()) && !slices.Contains(keep, entry.Name()) {
			failed = append(failed, os.RemoveAll(filepath.Join(e.Dir, entry.Name())))
		}
	}
	return errors.Join(failed...)
}
