package testserver_test

import (
	"bytes"
	"path/filepath"
	"testing"

	"estenroll/testserver"
)

// A device that is known by a pre-shared key enrols by it, and is asked for a certificate
// to renew; whoever has a certificate needs no key. The clients are libcoap's.
func TestPSK(t *testing.T) {
	t.Parallel()
	const key = "0123456789abcdef"
	for _, client := range []string{"coap-client-openssl", "coap-client-gnutls"} {
		t.Run(client, func(t *testing.T) {
			t.Parallel()
			server := start(t, testserver.Config{PSKs: map[string][]byte{"dev-17": []byte(key)}})
			dir, device := t.TempDir(), newKey(t)
			writeFile(t, filepath.Join(dir, "csr.der"), newCSR(t, device, named("dev-17")))
			common := []string{"-B", "20", "-u", "dev-17", "-k", key}
			post := append(common, "-m", "post", "-t", "286", "-f", "csr.der")

			run(t, dir, client, append(common, "-o", "crts.p7", server.URI()+"/.well-known/est/crts")...)
			run(t, dir, client, append(post, "-o", "sen.p7", server.URI()+"/.well-known/est/sen")...)
			crts := run(t, dir, "openssl", "pkcs7", "-inform", "DER", "-in", "crts.p7", "-print_certs")
			writeFile(t, filepath.Join(dir, "crts.pem"), crts)
			writeFile(t, filepath.Join(dir, "ca.pem"), pemOf(server.Root()))
			writeFile(t, filepath.Join(dir, "issued.pem"), run(t, dir, "openssl", "pkcs7", "-inform", "DER", "-in", "sen.p7", "-print_certs"))
			run(t, dir, "openssl", "verify", "-x509_strict", "-CAfile", "ca.pem", "-untrusted", "crts.pem", "issued.pem")

			output := run(t, dir, client, append(post, server.URI()+"/.well-known/est/sren")...)
			if !bytes.Contains(output, []byte("4.01")) {
				t.Errorf("sren: %s", output)
			}
			events := server.Issuances()
			if len(events) != 1 || events[0].PSKIdentity != "dev-17" || events[0].Client != "" {
				t.Errorf("issued %+v", events)
			}
			mustDial(t, server, idevid(t, server, "other"))
		})
	}
}
