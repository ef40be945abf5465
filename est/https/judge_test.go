package https_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/engine/pkcs11"
	"estenroll/est"
	"estenroll/est/https"
	"estenroll/testserver/globalsigntest"
)

// All operations of the server of globalsign/est with keys of an HSM, labels, and the
// errors that it makes on request. (What the lifecycle makes of it, a script of
// cmd/est-enroll shows.)
func TestEstserver(t *testing.T) {
	t.Attr("shows", "RFC 7030 §3.1 (1)")
	t.Attr("shows", "RFC 7030 §3.1 (2)")
	t.Attr("shows", "RFC 7030 §4.1.2 (1)")
	t.Attr("shows", "RFC 7030 §4.1.3 (1)")
	t.Attr("shows", "RFC 7030 §4.2.2 (1)")
	dir := t.TempDir()
	now := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	factory := newParty(t, nil, "factory", func(c *x509.Certificate) { now(c); c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })
	writePEM(t, filepath.Join(dir, "factory.pem"), "CERTIFICATE", factory.cert.Raw)
	program, err := globalsigntest.Build(dir, globalsigntest.Server)
	if err != nil {
		t.Fatal(err)
	}
	server, err := globalsigntest.Start(program, dir, filepath.Join(dir, "factory.pem"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	root, err := os.ReadFile(server.RootFile)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(root)
	anchor, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := est.NewTrustAnchors([]*x509.Certificate{anchor})
	if err != nil {
		t.Fatal(err)
	}
	uri, err := est.ParseURI(server.URI)
	if err != nil {
		t.Fatal(err)
	}
	generate := hsm(t)
	// holder is a certificate with its key in the HSM.
	type holder struct {
		cert *x509.Certificate
		key  crypto.Signer
	}
	dial := func(as holder, label est.Label) (*https.Session, *est.Client) {
		session, err := https.Dial(t.Context(), https.Config{URI: uri, Label: label, Certificate: [][]byte{as.cert.Raw}, Key: as.key, Trust: trust})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = session.Close() })
		return session, &est.Client{Session: session}
	}
	device := holder{key: generate(engine.ECP384)}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "device"}}
	now(template)
	der, err := x509.CreateCertificate(rand.Reader, template, factory.cert, device.key.Public(), factory.key)
	if err != nil {
		t.Fatal(err)
	}
	if device.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	request := func(name string, key crypto.Signer) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}, DNSNames: []string{"device.example"}}, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}

	session, client := dial(device, "")
	caCerts, err := client.CACerts(t.Context())
	if err != nil || !caCerts[0].Equal(anchor) {
		t.Fatalf("cacerts: %v", err)
	}
	enrolled := holder{key: generate(engine.ECP256)}
	issued, err := client.SimpleEnroll(t.Context(), request("device", enrolled.key))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := trust.VerifyIssued(issued, enrolled.key.Public(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	enrolled.cert = chain[0]
	if !session.ClientAuthenticated() {
		t.Error("our certificate was not asked for")
	}

	_, client = dial(enrolled, "factory-2")
	for name, key := range map[string]crypto.Signer{"renew": enrolled.key, "rekey": generate(engine.ECP256), "rekey, RSA": generate(engine.RSA2048)} {
		renewed, err := client.SimpleReenroll(t.Context(), request("device", key))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if _, err := trust.VerifyIssued(renewed, key.Public(), time.Now()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	var status *est.StatusError
	if _, err := client.SimpleReenroll(t.Context(), request("another", enrolled.key)); !errors.As(err, &status) || status.Code != "403 Forbidden" {
		t.Errorf("renewal for another name: got %v", err)
	}

	_, client = dial(device, "csrattrs")
	attributes, err := client.CSRAttrs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := csr.ParseAttributes(attributes)
	if err != nil || len(parsed) != 4 || len(attributes) != 67 {
		t.Errorf("csrattrs: got %x, %v", attributes, err) // the 67 bytes of RFC 8951 §4, in another order
	}
	made, err := client.ServerKeyGen(t.Context(), request("device", enrolled.key))
	if err != nil {
		t.Fatal(err)
	}
	defer made.Clear()
	public, err := made.Public()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := trust.VerifyIssued(made.Certificates, public, time.Now()); err != nil {
		t.Errorf("serverkeygen: %v", err)
	}

	// It encrypts what it makes with a password that it tells nobody.
	_, client = dial(device, "pkcs7")
	if _, err := client.ServerKeyGen(t.Context(), request("device", enrolled.key)); !errors.Is(err, est.ErrKeyEnveloped) {
		t.Errorf("serverkeygen, enveloped: got %v", err)
	}

	_, client = dial(device, "triggererrors")
	if _, err := client.CACerts(t.Context()); !errors.As(err, &status) || status.Code != "500 Internal Server Error" || !status.Temporary() {
		t.Errorf("cacerts: got %v", err)
	}
	var pending *est.PendingError
	if _, err := client.SimpleEnroll(t.Context(), request("Trigger Error Deferred", enrolled.key)); !errors.As(err, &pending) || pending.RetryAfter != 10*time.Minute {
		t.Errorf("deferred: got %v", err)
	}
	if _, err := client.SimpleEnroll(t.Context(), request("Trigger Error Forbidden", enrolled.key)); !errors.As(err, &status) || status.Code != "403 Forbidden" || !strings.Contains(status.Detail, "triggered forbidden response") {
		t.Errorf("forbidden: got %v", err)
	}
	if _, err := client.SimpleEnroll(t.Context(), request("Trigger Error Unknown", enrolled.key)); !errors.As(err, &status) || status.Code != "500 Internal Server Error" {
		t.Errorf("unknown: got %v", err)
	}
	if subject := csr.FormatSubject(enrolled.cert.RawSubject); subject != "CN=device" {
		t.Errorf("the certificate is for %s", subject)
	}
}

// hsm makes a token and returns what generates keys in it.
func hsm(t *testing.T) func(engine.Algorithm) crypto.Signer {
	t.Helper()
	token := softhsm.New(t)
	token.Use(t)
	address, err := pkcs11.Driver.Parse(token.URI())
	if err != nil {
		t.Fatal(err)
	}
	opened, err := pkcs11.Driver.Open(t.Context(), address, engine.Options{LockDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := opened.Close(); err != nil {
			t.Error(err)
		}
	})
	return func(kind engine.Algorithm) crypto.Signer {
		t.Helper()
		at, err := opened.NewKeyAddress("key")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := opened.GenerateKey(t.Context(), at, engine.KeySpec{Algorithm: kind}); err != nil {
			t.Fatal(err)
		}
		signer, err := opened.Signer(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		return signer
	}
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// OpenSSL judges our certificate, in the handshake or, with TLS 1.3, after it; and
// what it says is understood as what it is.
func TestOpenSSLAlerts(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		flags []string
		clock time.Duration // of the server, beside ours
		want  error         // nil for an answer
	}{
		"accepted":            {nil, 0, nil},
		"another CA":          {[]string{"-CAfile", "other.pem"}, 0, est.ErrCredentialRefused},
		"expired there":       {nil, 2 * time.Hour, est.ErrCredentialNotYetValid},
		"not yet valid there": {nil, -2 * time.Hour, est.ErrCredentialRefused}, // alert 42, which says no more
		"only RSA":            {[]string{"-client_sigalgs", "RSA-PSS+SHA256:RSA+SHA256"}, 0, est.ErrKeyUnsuitable},
		"no common suite":     {[]string{"-cipher", "ECDHE-RSA-AES128-SHA", "-ciphersuites", "TLS_AES_128_CCM_8_SHA256"}, 0, est.ErrHandshake},
	} {
		for _, version := range []string{"-tls1_2", "-tls1_3"} {
			t.Run(name+"/"+version, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, nil, nil)
				cfg := w.config()
				cfg.URI = openSSLServer(t, w, epoch.Add(c.clock), append([]string{version}, c.flags...)...)
				session, err := https.Dial(t.Context(), cfg)
				if err == nil {
					defer session.Close()
					_, err = ask(t, session, est.CACerts, nil)
				}
				var answer *est.ResponseError
				if c.want == nil {
					if !errors.As(err, &answer) || !strings.Contains(err.Error(), "text/html") || !session.ClientAuthenticated() {
						t.Errorf("got %v", err)
					}
					return
				}
				for _, sentinel := range []error{est.ErrCredentialNotYetValid, est.ErrCredentialRefused, est.ErrUnreachable, est.ErrServerCertificate, est.ErrHandshake, est.ErrKeyUnsuitable} {
					if errors.Is(err, sentinel) != (sentinel == c.want) {
						t.Errorf("got %v, want %v", err, c.want)
					}
				}
			})
		}
	}
}

// What we have of a connection is what OpenSSL, its other end, has: the first Finished
// (RFC 5929 §3.1), or the exporter (RFC 9266 §2).
func TestChannelBindingOpenSSL(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		flags []string
		shown *regexp.Regexp
	}{
		"TLS 1.2": {[]string{"-tls1_2", "-msg"}, regexp.MustCompile(`Finished\n\s+14 00 00 0c((?: [0-9a-f]{2}){12})`)},
		"TLS 1.3": {[]string{"-tls1_3", "-keymatexport", "EXPORTER-Channel-Binding", "-keymatexportlen", "32"}, regexp.MustCompile(`Keying material: ([0-9A-F]{64})\n`)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, nil, nil)
			cfg := w.config()
			uri, output := startOpenSSL(t, w, epoch, c.flags...)
			cfg.URI = uri
			session, err := https.Dial(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer session.Close()
			got, err := session.ChannelBinding()
			if err != nil {
				t.Fatal(err)
			}
			for text := ""; ; {
				line, err := output.ReadString('\n')
				if err != nil {
					t.Fatalf("openssl s_server shows no value, within %s: %v\n%s", patience, err, text)
				}
				text += line
				if found := c.shown.FindStringSubmatch(text); found != nil {
					if want := strings.ToLower(strings.ReplaceAll(found[1], " ", "")); hex.EncodeToString(got) != want {
						t.Errorf("got %x, want %s", got, want)
					}
					return
				}
			}
		})
	}
}

// A connection that resumes a session is one of its own where the two ends say so
// (extended master secret, RFC 7627), and has else no value: it is then that of whom a
// man in the middle chooses. We never resume one ourselves.
func TestChannelBindingResumed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		options string
		bound   bool
	}{"extended master secret": {"ExtendedMasterSecret", true}, "without": {"-ExtendedMasterSecret", false}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, nil, nil)
			config := filepath.Join(t.TempDir(), "openssl.cnf")
			text := "openssl_conf = top\n[top]\nssl_conf = ssl\n[ssl]\nsystem_default = default\n[default]\nOptions = " + c.options + "\n"
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			uri, _ := startOpenSSLWith(t, w, epoch, []string{"OPENSSL_CONF=" + config}, "-www", "-tls1_2")
			client := &tls.Config{
				MaxVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(1), InsecureSkipVerify: true, Time: func() time.Time { return epoch },
				Certificates: []tls.Certificate{{Certificate: [][]byte{w.client.cert.Raw}, PrivateKey: w.client.key}},
			}
			var values [][]byte
			for _, resumed := range []bool{false, true} {
				conn, err := tls.Dial("tcp", fmt.Sprintf("%s:%d", uri.Host, uri.Port), client)
				if err != nil {
					t.Fatal(err)
				}
				state := conn.ConnectionState()
				value, err := est.TLSBinding(state)
				if state.DidResume != resumed || (err == nil) != (c.bound || !resumed) || err != nil && !errors.Is(err, errors.ErrUnsupported) {
					t.Errorf("resumed %t: %x, %v", state.DidResume, value, err)
				}
				values = append(values, value)
				if err := conn.Close(); err != nil {
					t.Error(err)
				}
			}
			if bytes.Equal(values[0], values[1]) {
				t.Errorf("two connections with %x", values[0])
			}
		})
	}
}

// patience ends an openssl that does not say what is waited for.
const patience = 30 * time.Second

var accepts = regexp.MustCompile(`^ACCEPT .*:(\d+)$`)

// openSSLServer starts openssl s_server, which answers each GET with a page.
func openSSLServer(t *testing.T, w *world, clock time.Time, flags ...string) est.URI {
	t.Helper()
	uri, _ := startOpenSSL(t, w, clock, append([]string{"-www"}, flags...)...)
	return uri
}

// startOpenSSL starts openssl s_server on a port of its choice, and returns what it
// prints after that.
func startOpenSSL(t *testing.T, w *world, clock time.Time, flags ...string) (est.URI, *bufio.Reader) {
	t.Helper()
	return startOpenSSLWith(t, w, clock, nil, flags...)
}

// startOpenSSLWith is startOpenSSL with more in its environment.
func startOpenSSLWith(t *testing.T, w *world, clock time.Time, env []string, flags ...string) (est.URI, *bufio.Reader) {
	t.Helper()
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(w.server.key)
	if err != nil {
		t.Fatal(err)
	}
	other := newParty(t, nil, "other", func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })
	writePEM(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", w.ca.cert.Raw)
	writePEM(t, filepath.Join(dir, "other.pem"), "CERTIFICATE", other.cert.Raw)
	writePEM(t, filepath.Join(dir, "cert.pem"), "CERTIFICATE", w.server.cert.Raw)
	writePEM(t, filepath.Join(dir, "key.pem"), "PRIVATE KEY", key)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	cmd := exec.CommandContext(ctx, "openssl", append([]string{"s_server", "-accept", "127.0.0.1:0", "-cert", "cert.pem", "-key", "key.pem", "-CAfile", "ca.pem",
		"-Verify", "3", "-verify_return_error", "-attime", strconv.FormatInt(clock.Unix(), 10)}, flags...)...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cmd.StdinPipe(); err != nil { // at whose end it would end
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("openssl s_server (make deps installs it): %v", err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
	})
	output := bufio.NewReader(stdout)
	for {
		line, err := output.ReadString('\n')
		if err != nil {
			t.Fatalf("openssl s_server does not say where it listens: %v: %s", err, &stderr)
		}
		if found := accepts.FindStringSubmatch(strings.TrimSpace(line)); found != nil {
			uri, err := est.ParseURI("https://127.0.0.1:" + found[1])
			if err != nil {
				t.Fatal(err)
			}
			return uri, output
		}
	}
}
