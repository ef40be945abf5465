package testserver_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll/csr"
	"estenroll/est"
	"estenroll/est/https"
	"estenroll/testserver"
	"estenroll/testserver/globalsigntest"
)

// startHTTPS starts a server with an HTTPS door.
func startHTTPS(t *testing.T, cfg testserver.Config) *testserver.Server {
	t.Helper()
	cfg.ListenHTTPS = "127.0.0.1:0"
	return start(t, cfg)
}

// overHTTPS opens a session as a device would.
func overHTTPS(t *testing.T, server *testserver.Server, client credential, change func(*https.Config)) (*https.Session, error) {
	t.Helper()
	uri, err := est.ParseURI(server.HTTPSURI())
	if err != nil {
		t.Fatal(err)
	}
	trust, err := est.NewTrustAnchors([]*x509.Certificate{server.Root()})
	if err != nil {
		t.Fatal(err)
	}
	cfg := https.Config{URI: uri, Certificate: [][]byte{client.cert.Raw}, Key: client.key, Trust: trust, ExchangeTimeout: 20 * time.Second}
	if change != nil {
		change(&cfg)
	}
	session, err := https.Dial(t.Context(), cfg)
	if err == nil {
		t.Cleanup(func() { _ = session.Close() })
	}
	return session, err
}

// One CA has two doors: what one issues renews at the other, and the record is one.
func TestTwoDoors(t *testing.T) {
	t.Parallel()
	server := startHTTPS(t, testserver.Config{Labels: []string{"factory-2"}})
	device := idevid(t, server, "dev")
	session, err := overHTTPS(t, server, device, func(c *https.Config) { c.Label = "factory-2" })
	if err != nil {
		t.Fatal(err)
	}
	client := est.Client{Session: session}
	caCerts, err := client.CACerts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(caCerts) != 2 || !caCerts[0].Equal(server.Root()) {
		t.Errorf("cacerts: got %d certificates", len(caCerts))
	}
	key := newKey(t)
	csr := newCSR(t, key, named("dev"))
	issued, err := client.SimpleEnroll(t.Context(), csr)
	if err != nil {
		t.Fatal(err)
	}
	again, err := client.SimpleEnroll(t.Context(), csr)
	if err != nil || !again[0].Equal(issued[0]) {
		t.Errorf("the same CSR again: %v", err)
	}
	enrolled := credential{issued[0], key}
	if _, err := mustDial(t, server, enrolled).SimpleReenroll(t.Context(), newCSR(t, key, named("dev"))); err != nil {
		t.Errorf("renewal over CoAPs: %v", err)
	}
	if session, err = overHTTPS(t, server, enrolled, nil); err != nil {
		t.Fatal(err)
	}
	client = est.Client{Session: session}
	if _, err := client.SimpleReenroll(t.Context(), newCSR(t, newKey(t), named("dev"))); err != nil {
		t.Errorf("rekey over HTTPS: %v", err)
	}
	var status *est.StatusError
	if _, err := client.SimpleReenroll(t.Context(), newCSR(t, key, named("another"))); !errors.As(err, &status) || status.Code != "403 Forbidden" {
		t.Errorf("renewal for another name: got %v", err)
	}
	events := server.Events()
	var paths []string
	for _, event := range events[1:] {
		paths = append(paths, string(event.Kind)+" "+event.Path)
	}
	want := []string{
		"issuance /.well-known/est/factory-2/simpleenroll", "replay /.well-known/est/factory-2/simpleenroll",
		"issuance /.well-known/est/sren", "issuance /.well-known/est/simplereenroll",
	}
	if !slices.Equal(paths, want) {
		t.Errorf("record: got %q, want %q", paths, want)
	}
	if digest := sha256.Sum256(device.cert.Raw); events[1].Client != hex.EncodeToString(digest[:]) {
		t.Errorf("record: client %s", events[1].Client)
	}
	session, err = overHTTPS(t, server, device, func(c *https.Config) { c.Label = "another" })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (&est.Client{Session: session}).CACerts(t.Context()); !errors.As(err, &status) || !status.NotFound {
		t.Errorf("an unknown label: got %v", err)
	}
}

// The faults of the CA are the same at this door, in the words of HTTP.
func TestFaultsOverHTTPS(t *testing.T) {
	t.Parallel()
	server := startHTTPS(t, testserver.Config{})
	device := idevid(t, server, "dev")
	enrol := func(t *testing.T) ([]*x509.Certificate, error) {
		session, err := overHTTPS(t, server, device, nil)
		if err != nil {
			return nil, err
		}
		return (&est.Client{Session: session}).SimpleEnroll(t.Context(), newCSR(t, newKey(t), named("dev")))
	}
	isStatus := func(code string) func(error) bool {
		return func(err error) bool {
			var status *est.StatusError
			return errors.As(err, &status) && status.Code == code
		}
	}
	isPending := func(after time.Duration) func(error) bool {
		return func(err error) bool {
			var pending *est.PendingError
			return errors.As(err, &pending) && pending.RetryAfter == after
		}
	}
	is := func(want error) func(error) bool { return func(err error) bool { return errors.Is(err, want) } }
	isAnswer := func(err error) bool { var answer *est.ResponseError; return errors.As(err, &answer) }
	none := func(err error) bool { return err == nil }
	for fault, check := range map[string]func(error) bool{
		"answer=4.12": isStatus("412 Precondition Failed"), "answer=5.04": isStatus("504 Gateway Timeout"),
		"defer=1": isPending(time.Minute), "defer=1,max-age=0s": isPending(0), "defer=1,max-age=90s": isPending(90 * time.Second),
		"defer=1 retry-after=Fri, 31 Dec 9999 23:59:59 GMT": isPending(est.MaxRetryAfter),
		"refuse-all": is(est.ErrCredentialRefused), "refuse-all refuse-code=4.01": isStatus("401 Unauthorized"), "refuse-all refuse-code=4.03": isStatus("403 Forbidden"),
		"body=pkcs7-truncated": isAnswer, "body=wrong-format": isAnswer, "body=empty": isAnswer, "body=swapped-format": isAnswer, "body=pkix-trailing": isAnswer,
		"body=no-format": none, "body=two-leaves": none, // which a client judges
		"http=bare": none, "http=created": none, "http=close": none,
		"http=cut": is(est.ErrUnreachable), "http=wrong-type": isAnswer, "http=not-base64": isAnswer, "http=endless-body": isAnswer, "http=1-gib": isAnswer, "http=long-header": isAnswer,
		"http=not-http": isAnswer, "http=redirect-loop": isAnswer, "http=redirect-elsewhere": isAnswer, "http=redirect-http": isAnswer,
		"server-certificate=expired": is(est.ErrNotValidNow), "server-certificate=not-yet-valid": is(est.ErrNotValidNow), "server-certificate=other-name": is(est.ErrNotTrusted),
		"server-certificate=foreign": is(est.ErrNotTrusted), "server-certificate=client": is(est.ErrNotTrusted), "server-certificate=truncated": is(est.ErrHandshake), "server-certificate=trailing": is(est.ErrNotTrusted),
	} {
		t.Run(fault, func(t *testing.T) {
			faults := []string{fault}
			if first, second, two := strings.Cut(fault, " "); two {
				faults = []string{first, second}
			}
			setFaults(t, server, faults...)
			if _, err := enrol(t); !check(err) {
				t.Errorf("got %v", err)
			}
		})
	}
	setFaults(t, server, "refuse-all", "refuse-code=4.03", "long-detail")
	var status *est.StatusError
	if _, err := enrol(t); !errors.As(err, &status) || len(status.Detail) < 400 || strings.ContainsRune(status.Detail, 0x1b) {
		t.Errorf("long-detail: got %v", err)
	}
	setFaults(t, server, "http=slow-body")
	session, err := overHTTPS(t, server, device, func(c *https.Config) { c.ExchangeTimeout = 300 * time.Millisecond })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (&est.Client{Session: session}).SimpleEnroll(t.Context(), newCSR(t, newKey(t), named("dev"))); !errors.Is(err, est.ErrUnreachable) {
		t.Errorf("slow-body: got %v", err)
	}
	setFaults(t, server, "crts=foreign")
	if certs, err := clientOver(t, server, device).CACerts(t.Context()); err != nil || certs[0].Equal(server.Root()) {
		t.Errorf("crts=foreign: got %v", err)
	}
	// What globalsign/est remembers of cacerts is not in the way of a renewal.
	setFaults(t, server)
	key := newKey(t)
	issued, err := clientOver(t, server, device).SimpleEnroll(t.Context(), newCSR(t, key, named("dev")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := clientOver(t, server, credential{issued[0], key}).SimpleReenroll(t.Context(), newCSR(t, key, named("dev"))); err != nil {
		t.Errorf("after crts=foreign: %v", err)
	}
}

func clientOver(t *testing.T, server *testserver.Server, device credential) *est.Client {
	t.Helper()
	session, err := overHTTPS(t, server, device, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &est.Client{Session: session}
}

// After a rollover of the CA the door renews what the new one has issued.
func TestRolloverOverHTTPS(t *testing.T) {
	t.Parallel()
	server := startHTTPS(t, testserver.Config{})
	device := idevid(t, server, "dev")
	if _, err := clientOver(t, server, device).CACerts(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Rollover(testserver.Rollover{Phase: testserver.RolloverFinished}); err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	issued, err := clientOver(t, server, device).SimpleEnroll(t.Context(), newCSR(t, key, named("dev")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := clientOver(t, server, credential{issued[0], key}).SimpleReenroll(t.Context(), newCSR(t, key, named("dev"))); err != nil {
		t.Error(err)
	}
}

// files writes what a foreign client needs of a server and a device.
func files(t *testing.T, server *testserver.Server) (dir string) {
	t.Helper()
	dir = t.TempDir()
	run(t, dir, "openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem")
	run(t, dir, "openssl", "req", "-new", "-key", "key.pem", "-subj", "/O=Example/CN=device-1", "-addext", "subjectAltName=DNS:device-1.example", "-outform", "DER", "-out", "csr.der")
	run(t, dir, "openssl", "req", "-in", "csr.der", "-inform", "DER", "-out", "csr.pem")
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
	run(t, dir, "openssl", "base64", "-in", "csr.der", "-out", "csr.b64")
	return dir
}

// Who shows neither certificate nor password gets the CA certificates, and is asked
// for a password.
func TestAnonymous(t *testing.T) {
	t.Parallel()
	server := startHTTPS(t, testserver.Config{})
	dir, root := files(t, server), server.HTTPSURI()+"/.well-known/est/"
	common := []string{"--silent", "--show-error", "--cacert", "ca.pem", "-D", "-"}
	if out := run(t, dir, "curl", append(common, root+"cacerts")...); !bytes.Contains(out, []byte(" 200 OK")) {
		t.Errorf("cacerts: got\n%s", out)
	}
	out := run(t, dir, "curl", append(common, "-H", "Content-Type: application/pkcs10", "-H", "Content-Transfer-Encoding: base64", "--data-binary", "@csr.b64", root+"simpleenroll")...)
	if !bytes.Contains(out, []byte(" 401 Unauthorized")) || !bytes.Contains(out, []byte("Www-Authenticate: Basic")) {
		t.Errorf("simpleenroll: got\n%s", out)
	}
}

// A password takes the place of a certificate for curl, which openssl s_client sees
// the door ask for.
func TestBasicWithoutCertificate(t *testing.T) {
	t.Parallel()
	server := startHTTPS(t, testserver.Config{HTTPUser: "dev-17", HTTPPassword: "open sesame", TLS12: true})
	dir := files(t, server)
	run(t, dir, "curl", "--silent", "--show-error", "--fail", "--cacert", "ca.pem", "--user", "dev-17:open sesame", "-H", "Content-Type: application/pkcs10",
		"-H", "Content-Transfer-Encoding: base64", "--data-binary", "@csr.b64", server.HTTPSURI()+"/.well-known/est/simpleenroll")
	issued := server.Issuances()
	if len(issued) != 1 || issued[0].Client != "" || issued[0].Subject != "CN=device-1,O=Example" {
		t.Errorf("got %+v", issued)
	}
	address := strings.TrimPrefix(server.HTTPSURI(), "https://")
	s := exec.CommandContext(t.Context(), "openssl", "s_client", "-connect", address, "-CAfile", "ca.pem", "-verify_return_error", "-verify_ip", "127.0.0.1")
	s.Dir = dir
	out, err := s.CombinedOutput() // its input is empty
	if err != nil || !bytes.Contains(out, []byte("Verify return code: 0 (ok)")) || !bytes.Contains(out, []byte("Requested Signature Algorithms: ")) {
		t.Errorf("openssl s_client: %v\n%s", err, out)
	}
}

// Each verb of the client of globalsign/est, with a certificate or with a password.
func TestEstclient(t *testing.T) {
	t.Parallel()
	client, err := globalsigntest.Build(t.TempDir(), globalsigntest.Client)
	if err != nil {
		t.Fatal(err)
	}
	attributes, err := csr.Attributes{csr.WantChallengePassword()}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	server := startHTTPS(t, testserver.Config{Labels: []string{"factory-2"}, CSRAttributes: attributes, ServerKeyGen: true})
	dir := files(t, server)
	at := func(verb string, args ...string) []byte {
		return run(t, dir, client, append([]string{verb, "-server", strings.TrimPrefix(server.HTTPSURI(), "https://"), "-explicit", "ca.pem"}, args...)...)
	}
	as := func(certificate string) []string { return []string{"-certs", certificate, "-key", "key.pem"} }
	if got := bytes.Count(at("cacerts"), []byte("BEGIN CERTIFICATE")); got != 2 {
		t.Errorf("cacerts: %d certificates, want 2", got)
	}
	writeFile(t, filepath.Join(dir, "chain.pem"), at("cacerts", "-aps", "factory-2"))
	if got := string(at("csrattrs")); !strings.Contains(got, "1.2.840.113549.1.9.7") {
		t.Errorf("csrattrs: got %s", got)
	}
	at("enroll", append(as("idevid.pem"), "-csr", "csr.pem", "-out", "issued.pem")...)
	at("enroll", append(as("idevid.pem"), "-csr", "csr.pem", "-aps", "factory-2", "-out", "labelled.pem")...)
	at("reenroll", append(as("issued.pem"), "-out", "renewed.pem")...)
	at("serverkeygen", append(as("idevid.pem"), "-cn", "device-2", "-keyout", "generated.key", "-out", "generated.pem")...)
	for _, name := range []string{"issued.pem", "labelled.pem", "renewed.pem", "generated.pem"} {
		run(t, dir, "openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", "ca.pem", "-untrusted", "chain.pem", name)
	}
	// The key that came is that of the certificate that came with it.
	if got, want := run(t, dir, "openssl", "pkey", "-in", "generated.key", "-pubout"), run(t, dir, "openssl", "x509", "-in", "generated.pem", "-noout", "-pubkey"); !bytes.Equal(got, want) {
		t.Errorf("serverkeygen: the key is another's:\n%s%s", got, want)
	}
	var operations []est.Operation
	for _, event := range server.Issuances() {
		operations = append(operations, event.Operation)
	}
	if want := []est.Operation{est.SimpleEnroll, est.SimpleReenroll, est.ServerKeyGen}; !slices.Equal(operations, want) {
		t.Errorf("issued for %q, want %q", operations, want) // the CSR with a label was the same one
	}
	withPassword := startHTTPS(t, testserver.Config{HTTPUser: "dev-17", HTTPPassword: "open sesame"})
	dir = files(t, withPassword)
	server = withPassword
	at("enroll", "-csr", "csr.pem", "-user", "dev-17", "-pass", "open sesame", "-out", "issued.pem")
	run(t, dir, "openssl", "x509", "-in", "issued.pem", "-noout", "-checkend", "60")
	if got := len(withPassword.Issuances()); got != 1 {
		t.Errorf("with a password: issued %d, want 1", got)
	}
}

// The door has the value of a connection that OpenSSL, its other end, has: a CSR that
// is linked by it is good there, and nowhere else.
func TestProofOfPossessionOpenSSL(t *testing.T) {
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
			server := startHTTPS(t, testserver.Config{RequirePoP: true})
			dir, device := t.TempDir(), idevid(t, server, "dev")
			key, err := x509.MarshalPKCS8PrivateKey(device.key)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
			writeFile(t, filepath.Join(dir, "idevid.pem"), pemOf(device.cert))
			writeFile(t, filepath.Join(dir, "ca.pem"), pemOf(server.Root()))
			const patience = 30 * time.Second // with an openssl that does not say what is waited for
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			cmd := exec.CommandContext(ctx, "openssl", append([]string{"s_client", "-connect", strings.TrimPrefix(server.HTTPSURI(), "https://"),
				"-CAfile", "ca.pem", "-verify_return_error", "-cert", "idevid.pem", "-key", "key.pem", "-nocommands"}, c.flags...)...)
			cmd.Dir = dir
			input, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait() // it was killed
			}()
			output, text := bufio.NewReader(stdout), ""
			until := func(shown *regexp.Regexp) string {
				t.Helper()
				for {
					if found := shown.FindStringSubmatch(text); found != nil {
						return found[1]
					}
					line, err := output.ReadString('\n')
					if err != nil {
						t.Fatalf("openssl s_client, within %s: %v\n%s", patience, err, text)
					}
					text += line
				}
			}
			binding, err := hex.DecodeString(strings.ReplaceAll(until(c.shown), " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			der, err := csr.Build(nil, csr.Template{RawSubject: device.cert.RawSubject, ChallengePassword: base64.StdEncoding.EncodeToString(binding)}, device.key)
			if err != nil {
				t.Fatal(err)
			}
			body := base64.StdEncoding.EncodeToString(der)
			if _, err := fmt.Fprintf(input, "POST /.well-known/est/simpleenroll HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/pkcs10\r\n"+
				"Content-Transfer-Encoding: base64\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
				t.Fatal(err)
			}
			if status := until(regexp.MustCompile(`HTTP/1.1 ([^\r\n]*)\r\n`)); status != "200 OK" || len(server.Issuances()) != 1 {
				t.Errorf("got %s, %d issued", status, len(server.Issuances()))
			}
			var refused *est.StatusError
			if _, err := clientOver(t, server, device).SimpleEnroll(t.Context(), der); !errors.As(err, &refused) || refused.Code != "400 Bad Request" || !strings.Contains(refused.Detail, "not that of this session") {
				t.Errorf("in another session: got %v", err)
			}
		})
	}
}

func TestNoHTTPSDoor(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	if uri := server.HTTPSURI(); uri != "" {
		t.Errorf("got %s", uri)
	}
	for _, faults := range []testserver.Faults{{HTTP: "cut"}, {RetryAfter: "soon"}} {
		if err := server.SetFaults(faults); err == nil || !strings.Contains(err.Error(), "no HTTPS door") {
			t.Errorf("got %v", err)
		}
	}
	if other, err := testserver.New(testserver.Config{ListenHTTPS: "0.0.0.0:0"}); err == nil || !strings.Contains(err.Error(), "not a loopback address") {
		t.Errorf("got %v, %v", other, err)
	}
}
