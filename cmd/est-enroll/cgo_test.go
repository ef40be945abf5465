package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"estenroll/csr"
	"estenroll/testserver"
)

// Without cgo the program builds, says what it is missing, and sees a device whose
// keys are in files through its life, with a warning each time.
func TestWithoutCgo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	program := filepath.Join(dir, "est-enroll")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	run := exec.CommandContext(t.Context(), program, "enroll", "--state-dir", dir, "--server", "coaps://127.0.0.1",
		"--engine", "pkcs11:token=device?module-path=/usr/lib/softhsm/libsofthsm2.so", "--trust-anchors", "../../testdata/rfc9148/root.pem")
	out, err := run.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitToken || !strings.Contains(string(out), "built without cgo") {
		t.Errorf("got %v, want exit code %d and the reason:\n%s", err, exitToken, out)
	}

	keys := filepath.Join(dir, "keys")
	server := fileIDevID(t, keys)
	anchors := filepath.Join(dir, "ca.der")
	if err := os.WriteFile(anchors, server.Root().Raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		says string
		args []string
	}{
		{"enrolled: ", []string{"enroll"}}, {"nothing to do: ", []string{"enroll"}}, {"renewed: ", []string{"renew", "--force"}},
		{"rekeyed: ", []string{"renew", "--force", "--rekey", "--key-type", "ec-p384"}}, {"rekeyed: ", []string{"renew", "--force", "--rekey", "--server-keygen"}}, {"renewed: ", []string{"renew", "--force"}}, {"state: +enrolled", []string{"status"}}, {"ok +token +file:[^,]*$", []string{"doctor"}},
	} {
		cmd := exec.CommandContext(t.Context(), program, append(step.args, "--state-dir", filepath.Join(dir, "state"), "--server", server.HTTPSURI(), "--trust-anchors", anchors,
			"--engine", "file:"+keys, "--idevid-key", "file:object=idevid;type=private", "--idevid-certificate", "file:object=idevid;type=cert")...)
		out, err := cmd.CombinedOutput()
		if err != nil || !regexp.MustCompile("(?m)^"+step.says).Match(out) {
			t.Errorf("%q: %v\n%s", step.args, err, out)
		}
		if warned := strings.Contains(string(out), "warning: the keys are in files, which is for development: whoever can read file:"+keys+" has them"); !warned {
			t.Errorf("%q: no warning:\n%s", step.args, out)
		}
	}
	if got := len(server.Issuances()); got != 5 {
		t.Errorf("issued %d, want 5", got)
	}
	// The key before the last is retired, and the IDevID's stays.
	left, err := filepath.Glob(filepath.Join(keys, "*.key"))
	if err != nil || len(left) != 2 {
		t.Errorf("keys: %v, %v", left, err)
	}
}

// fileIDevID starts a test server and makes an IDevID in a directory.
func fileIDevID(t *testing.T, dir string) *testserver.Server {
	t.Helper()
	server, err := testserver.New(testserver.Config{ListenHTTPS: "127.0.0.1:0", ServerKeyGen: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	subject, err := csr.ParseSubject("serialNumber=4711,O=Test")
	if err != nil {
		t.Fatal(err)
	}
	cert, err := server.IssueIDevID(testserver.IDevIDRequest{PublicKey: key.Public(), RawSubject: subject})
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"idevid.key": {Type: "EC PRIVATE KEY", Bytes: der}, "idevid.crt": {Type: "CERTIFICATE", Bytes: cert.Raw}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return server
}
