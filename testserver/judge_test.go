package testserver_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"estenroll/testserver"
)

// run runs a foreign tool in a directory and returns its standard output.
func run(t *testing.T, dir, name string, args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v: run \"make deps\"", err)
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes()
}

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func pemOf(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

// Both of libcoap's clients fetch the CA certificates and enrol a CSR that
// OpenSSL made, in blocks of every size; OpenSSL verifies what came of it.
func TestForeignClients(t *testing.T) {
	t.Parallel()
	for _, client := range []string{"coap-client-openssl", "coap-client-gnutls"} {
		for _, size := range []int{64, 128, 256, 512, 1024} {
			t.Run(client+"/"+strconv.Itoa(size), func(t *testing.T) {
				t.Parallel()
				server := start(t, testserver.Config{})
				dir := t.TempDir()
				run(t, dir, "openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem")
				run(t, dir, "openssl", "req", "-new", "-key", "key.pem", "-subj", "/O=Example/CN=device-1",
					"-addext", "subjectAltName=DNS:device-1.example,IP:192.0.2.1", "-outform", "DER", "-out", "csr.der")
				csr, err := os.ReadFile(filepath.Join(dir, "csr.der"))
				if err != nil {
					t.Fatal(err)
				}
				factory, err := server.IssueIDevID(testserver.IDevIDRequest{CSR: csr})
				if err != nil {
					t.Fatal(err)
				}
				writeFile(t, filepath.Join(dir, "idevid.pem"), pemOf(factory))
				writeFile(t, filepath.Join(dir, "ca.pem"), pemOf(server.Root()))
				common := []string{"-B", "20", "-b", strconv.Itoa(size), "-c", "idevid.pem", "-j", "key.pem", "-C", "ca.pem"}

				run(t, dir, client, append(common, "-A", "281", "-o", "crts.p7", server.URI()+"/.well-known/est/crts")...)
				crts := run(t, dir, "openssl", "pkcs7", "-inform", "DER", "-in", "crts.p7", "-print_certs")
				writeFile(t, filepath.Join(dir, "crts.pem"), crts)
				if got := bytes.Count(crts, []byte("BEGIN CERTIFICATE")); got != 2 {
					t.Errorf("crts: %d certificates, want 2:\n%s", got, crts)
				}

				run(t, dir, client, append(common, "-m", "post", "-t", "286", "-A", "281", "-f", "csr.der", "-o", "sen.p7",
					server.URI()+"/.well-known/est/sen")...)
				issued := run(t, dir, "openssl", "pkcs7", "-inform", "DER", "-in", "sen.p7", "-print_certs")
				writeFile(t, filepath.Join(dir, "issued.pem"), issued)
				run(t, dir, "openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", "ca.pem", "-untrusted", "crts.pem", "issued.pem")
				asked := run(t, dir, "openssl", "req", "-inform", "DER", "-in", "csr.der", "-noout", "-pubkey")
				got := run(t, dir, "openssl", "x509", "-in", "issued.pem", "-noout", "-pubkey")
				if !bytes.Equal(got, asked) {
					t.Errorf("public key: got %s, want %s", got, asked)
				}
				if got := len(server.Issuances()); got != 1 {
					t.Errorf("issued %d, want 1", got)
				}
			})
		}
	}
}
