package testserver_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"estenroll/testserver"
)

// run runs a foreign tool in a directory and returns its output.
func run(t *testing.T, dir, name string, args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v: run \"make deps\"", err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Dir = dir
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, output)
	}
	return output
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
				// Names enough for two blocks of every size, both ways.
				names := "subjectAltName=IP:192.0.2.1"
				for i := range 50 {
					names += fmt.Sprintf(",DNS:interface-%d.device-1.example", i)
				}
				run(t, dir, "openssl", "req", "-new", "-key", "key.pem", "-subj", "/O=Example/CN=device-1",
					"-addext", names, "-outform", "DER", "-out", "csr.der")
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
				common := []string{"-v", "7", "-B", "20", "-b", strconv.Itoa(size), "-c", "idevid.pem", "-j", "key.pem", "-C", "ca.pem"}

				run(t, dir, client, append(common, "-A", "281", "-o", "crts.p7", server.URI()+"/.well-known/est/crts")...)
				crts := run(t, dir, "openssl", "pkcs7", "-inform", "DER", "-in", "crts.p7", "-print_certs")
				writeFile(t, filepath.Join(dir, "crts.pem"), crts)
				if got := bytes.Count(crts, []byte("BEGIN CERTIFICATE")); got != 2 {
					t.Errorf("crts: %d certificates, want 2:\n%s", got, crts)
				}

				log := run(t, dir, client, append(common, "-m", "post", "-t", "286", "-A", "281", "-f", "csr.der", "-o", "sen.p7",
					server.URI()+"/.well-known/est/sen")...)
				for _, block := range []string{fmt.Sprintf("Block1:1/_?M?/?%d", size), fmt.Sprintf("Block2:1/_?M?/?%d", size)} {
					if !regexp.MustCompile(block).Match(log) {
						t.Errorf("no %s in the client's log:\n%s", block, log)
					}
				}
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
