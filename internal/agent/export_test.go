package agent_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll/internal/agent"
	"estenroll/internal/durable"
)

// credential makes an export of a chain of two under a root.
func credential(t *testing.T, dir, name, key string) agent.Export {
	t.Helper()
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	certificate := func(name string) *x509.Certificate {
		template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	return agent.Export{
		Dir: dir, Name: name, Key: key + ";type=private", Certificate: key + ";type=cert",
		Chain:        []*x509.Certificate{certificate("leaf"), certificate("issuing")},
		TrustAnchors: []*x509.Certificate{certificate("root")},
	}
}

func write(t *testing.T, e agent.Export, want bool) {
	t.Helper()
	changed, err := e.Write()
	if err != nil {
		t.Fatal(err)
	}
	if changed != want {
		t.Errorf("changed: got %t, want %t", changed, want)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func readLink(t *testing.T, path string) string {
	t.Helper()
	target, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return target
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range list {
		names = append(names, entry.Name())
	}
	return names
}

// The files say what the credential is, everybody can read them, and a second
// write changes nothing.
func TestExport(t *testing.T) {
	old := syscall.Umask(0o077) // not parallel: the umask is the process's
	defer syscall.Umask(old)
	dir := filepath.Join(t.TempDir(), "public", "here")
	e := credential(t, dir, "device", "pkcs11:id=%01")
	write(t, e, true)
	link := filepath.Join(dir, "device")
	generation := filepath.Join(dir, readLink(t, link))
	leaf, chain := readFile(t, filepath.Join(link, "cert.pem")), readFile(t, filepath.Join(link, "chain.pem"))
	for name, want := range map[string]string{
		"fullchain.pem":             leaf + chain,
		"key.uri":                   e.Key + "\n",
		"certificate.uri":           e.Certificate + "\n",
		"nginx/credential.conf":     "ssl_certificate \"" + generation + "/fullchain.pem\";\nssl_certificate_key \"engine:pkcs11:" + e.Key + "\";\n",
		"mosquitto/credential.conf": "certfile " + generation + "/fullchain.pem\nkeyfile " + e.Key + "\n",
		"stunnel/credential.conf":   "cert = " + generation + "/fullchain.pem\nkey = " + e.Key + "\n",
	} {
		if diff := cmp.Diff(want, readFile(t, filepath.Join(link, name))); diff != "" {
			t.Errorf("%s (-want +got)\n%s", name, diff)
		}
	}
	if strings.Count(leaf, "BEGIN") != 1 || strings.Count(chain, "BEGIN") != 1 || leaf == chain || strings.Count(readFile(t, filepath.Join(link, "ca.pem")), "BEGIN CERTIFICATE") != 1 {
		t.Errorf("cert.pem %s\nchain.pem %s", leaf, chain)
	}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		status, err := entry.Info()
		if err != nil {
			return err
		}
		if perm, want := status.Mode().Perm(), map[fs.FileMode]fs.FileMode{0: 0o644, fs.ModeDir: 0o755, fs.ModeSymlink: 0o777}[status.Mode().Type()]; perm != want {
			t.Errorf("%s: mode %v, want %v", path, perm, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	write(t, e, false)
}

// A new credential is a new directory behind the same link: a program that has
// followed the old one finds it whole until the change after.
func TestExportChange(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	link := filepath.Join(dir, "device")
	other := credential(t, dir, "device.1", "pkcs11:id=%09")
	write(t, other, true)
	var generations []string
	for _, key := range []string{"pkcs11:id=%01", "pkcs11:id=%02", "pkcs11:id=%03"} {
		write(t, credential(t, dir, "device", key), true)
		generations = append(generations, readLink(t, link))
		if got := readFile(t, filepath.Join(link, "key.uri")); got != key+";type=private\n" {
			t.Errorf("key.uri: %q", got)
		}
	}
	if got := readFile(t, filepath.Join(dir, generations[1], "key.uri")); got != "pkcs11:id=%02;type=private\n" {
		t.Errorf("the directory before holds %q", got)
	}
	// Two of ours, and the other credential's, whose name begins like ours.
	want := map[string]bool{"device": true, "device.1": true, generations[1]: true, generations[2]: true, readLink(t, filepath.Join(dir, "device.1")): true}
	got := map[string]bool{}
	for _, name := range entries(t, dir) {
		got[name] = true
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if err := agent.Remove(dir, "device"); err != nil {
		t.Fatal(err)
	}
	if names := entries(t, dir); len(names) != 2 {
		t.Errorf("after the removal: %q", names)
	}
	write(t, other, false)
	if err := errors.Join(agent.Remove(dir, "device"), agent.Remove(filepath.Join(dir, "missing"), "device")); err != nil {
		t.Errorf("removed twice: %v", err)
	}
}

// What is not as it was written is made again, whoever changed it.
func TestExportRepair(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(link, generation string) error{
		"nothing refers to it":   func(link, _ string) error { return os.Remove(link) },
		"link to elsewhere":      func(link, _ string) error { return durable.Symlink("/etc", link) },
		"link to nothing":        func(link, _ string) error { return durable.Symlink(".device.1", link) },
		"a file is missing":      func(link, _ string) error { return os.Remove(filepath.Join(link, "key.uri")) },
		"a file has changed":     func(link, _ string) error { return os.WriteFile(filepath.Join(link, "ca.pem"), nil, 0o600) },
		"a file is closed":       func(link, _ string) error { return os.Chmod(filepath.Join(link, "cert.pem"), 0o600) },
		"a folder is closed":     func(link, _ string) error { return os.Chmod(filepath.Join(link, "nginx"), 0o700) },
		"the directory is gone":  func(_, generation string) error { return os.RemoveAll(generation) },
		"killed before the link": func(link, generation string) error { return os.Rename(generation, link+".x") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			link := filepath.Join(dir, "device")
			e := credential(t, dir, "device", "pkcs11:id=%01")
			write(t, e, true)
			if err := damage(link, filepath.Join(dir, readLink(t, link))); err != nil {
				t.Fatal(err)
			}
			write(t, e, true)
			if got := readFile(t, filepath.Join(link, "key.uri")); got != e.Key+"\n" {
				t.Errorf("key.uri: %q", got)
			}
			write(t, e, false)
		})
	}
}

// A write that fails says so and leaves what was there as it was.
func TestExportRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		dir, name string
		cause     error
	}{
		{dir, "folder", durable.ErrNotLink},
		{dir, "file", durable.ErrNotLink},
		{filepath.Join(dir, "file"), "device", syscall.ENOTDIR},
		{dir, "../device", nil}, {dir, ".hidden", nil}, {dir, "", nil}, {dir, "a b", nil}, {dir, strings.Repeat("a", 65), nil},
	} {
		_, err := credential(t, tc.dir, tc.name, "pkcs11:id=%01").Write()
		if !errors.Is(err, agent.ErrExport) || tc.cause != nil && !errors.Is(err, tc.cause) {
			t.Errorf("%s in %s: %v", tc.name, tc.dir, err)
		}
		if err := agent.Remove(tc.dir, tc.name); !errors.Is(err, agent.ErrExport) {
			t.Errorf("remove %s in %s: %v", tc.name, tc.dir, err)
		}
	}
	if diff := cmp.Diff([]string{"file", "folder"}, entries(t, dir)); diff != "" {
		t.Errorf("in the directory (-want +got)\n%s", diff)
	}
}
