package coaps_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"estenroll/est"
	"estenroll/est/coaps"
)

// What OpenSSL's server says of our certificate, its clock set by -attime.
func TestAlertsOfOpenSSL(t *testing.T) {
	ca := newParty(t, nil, "ca", func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.NotAfter = true, x509.KeyUsageCertSign, epoch.Add(24*time.Hour)
	})
	stranger := newParty(t, nil, "stranger", func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })
	server := newParty(t, ca, "server", func(c *x509.Certificate) {
		c.IPAddresses, c.NotAfter = []net.IP{net.IPv4(127, 0, 0, 1)}, epoch.Add(24*time.Hour)
	})
	trust, err := est.NewTrustAnchors([]*x509.Certificate{ca.cert})
	if err != nil {
		t.Fatal(err)
	}
	const ccm8 = "ECDHE-ECDSA-AES128-CCM8:@SECLEVEL=0"
	for _, c := range []struct {
		name         string
		client       *party
		theirs, ours time.Duration // clocks, after epoch
		cipher       string
		want         error // nil: none of est's
	}{
		{"expired there", newParty(t, ca, "dev", nil), 2 * time.Hour, 0, ccm8, est.ErrCredentialNotYetValid},
		{"expired there and here", newParty(t, ca, "dev", nil), 2 * time.Hour, 2 * time.Hour, ccm8, est.ErrCredentialRefused},
		// Measured: OpenSSL 3.0 says bad_certificate (42) then, as for any other defect.
		{"not yet valid there", newParty(t, ca, "dev", func(c *x509.Certificate) { c.NotBefore = epoch.Add(-time.Second) }), -time.Minute, 0, ccm8, est.ErrCredentialRefused},
		{"of a CA unknown there", newParty(t, stranger, "dev", nil), 0, 0, ccm8, est.ErrCredentialRefused},
		{"no cipher suite in common", newParty(t, ca, "dev", nil), 0, 0, "ECDHE-ECDSA-AES256-SHA", est.ErrHandshake},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cfg := coaps.Config{
				URI: openSSLServer(t, ca, server, c.cipher, epoch.Add(c.theirs)), Trust: trust,
				Certificate: [][]byte{c.client.cert.Raw}, Key: opaque{c.client.key},
				Now: func() time.Time { return epoch.Add(c.ours) }, HandshakeTimeout: 10 * time.Second,
			}
			session, err := coaps.Dial(t.Context(), cfg)
			if err == nil {
				_ = session.Close()
				t.Fatal("the handshake succeeded")
			}
			for _, sentinel := range []error{est.ErrCredentialNotYetValid, est.ErrCredentialRefused, est.ErrUnreachable, est.ErrServerCertificate, est.ErrHandshake} {
				if errors.Is(err, sentinel) != (sentinel == c.want) {
					t.Errorf("got %v, want %v", err, c.want)
				}
			}
		})
	}
}

var accepts = regexp.MustCompile(`^ACCEPT .*:(\d+)$`)

// openSSLServer starts openssl s_server on a port of its choice.
func openSSLServer(t *testing.T, ca, server *party, cipher string, clock time.Time) est.URI {
	t.Helper()
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(server.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"ca.pem":   {Type: "CERTIFICATE", Bytes: ca.cert.Raw},
		"cert.pem": {Type: "CERTIFICATE", Bytes: server.cert.Raw},
		"key.pem":  {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, "openssl", "s_server", "-dtls1_2", "-accept", "127.0.0.1:0", "-cert", "cert.pem", "-key", "key.pem", "-CAfile", "ca.pem",
		"-Verify", "3", "-verify_return_error", "-cipher", cipher, "-attime", strconv.FormatInt(clock.Unix(), 10))
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe() // its end would end the server
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("openssl s_server (make deps installs it): %v", err)
	}
	t.Cleanup(func() {
		cancel()
		_ = stdin.Close()
		_ = cmd.Wait() // it was killed
	})
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if found := accepts.FindStringSubmatch(lines.Text()); found != nil {
			uri, err := est.ParseURI("coaps://127.0.0.1:" + found[1])
			if err != nil {
				t.Fatal(err)
			}
			return uri
		}
	}
	t.Fatalf("openssl s_server does not say where it listens: %s", &stderr)
	return est.URI{}
}
