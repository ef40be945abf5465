package coap_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
)

// tool finds a program that the tests need.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v: run \"make deps\"", err)
	}
	return path
}

// process is a foreign server.
type process struct {
	cmd    *exec.Cmd
	output *lines
	ended  chan struct{}
}

// lines is a program's output, and whoever waits for a line of it.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// start runs a foreign server until the test ends.
func start(t *testing.T, name string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(tool(t, name), args...), output: new(lines), ended: make(chan struct{})}
	p.cmd.Dir = t.TempDir()
	p.cmd.Stdout, p.cmd.Stderr = p.output, p.output
	// An open input: a server that reads it must not see its end.
	if _, err := p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // killed, so never a success
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("%s %q:\n%s", name, args, p.output)
		}
	})
	return p
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // may have ended by itself
	<-p.ended
}

// poll repeats ready until it succeeds, while the process runs.
func poll[T any](t *testing.T, p *process, ready func() (T, error)) T {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for {
		result, err := ready()
		if err == nil {
			return result
		}
		select {
		case <-tick.C:
		case <-p.ended:
			t.Fatalf("the server ended: %v\n%s", err, p.output)
		case <-deadline:
			t.Fatalf("the server is not ready: %v\n%s", err, p.output)
		}
	}
}

// portPair is a port that is free, and so is the one after it.
func portPair(t *testing.T) int {
	t.Helper()
	for range 100 {
		first, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := first.LocalAddr().(*net.UDPAddr).Port
		second, err := net.ListenPacket("udp", fmt.Sprintf("127.0.0.1:%d", port+1))
		if err == nil {
			err = second.Close()
		}
		if err := errors.Join(err, first.Close()); err == nil {
			return port
		}
	}
	t.Fatal("no two free ports in a row")
	return 0
}

// Our client moves 2 KB both ways with libcoap's server, in blocks of each size.
func TestForeignServer(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	f := p.files(t)
	for _, name := range []string{"coap-server-openssl", "coap-server-gnutls"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			port := portPair(t)
			server := start(t, name, "-A", "127.0.0.1", "-p", strconv.Itoa(port), "-d", "100",
				"-c", f.serverCert, "-j", f.serverKey, "-C", f.ca)
			for _, size := range blockSizes {
				cfg := p.clientConfig()
				cfg.AckTimeout = 2 * time.Second // libcoap answers late, and we do not want to ask twice
				cfg.BlockSize, cfg.HandshakeTimeout = size, 2*time.Second
				conn := poll(t, server, func() (*coap.Conn, error) {
					return coap.Dial(t.Context(), fmt.Sprintf("127.0.0.1:%d", port+1), cfg)
				})
				if !conn.ClientAuthenticated() {
					t.Error("the client's certificate was not asked for")
				}
				path, body := fmt.Sprintf("/size-%d", size), numbers(2048)
				resp, err := conn.Do(t.Context(), &coap.Request{Method: codes.PUT, Path: path, ContentFormat: new(uint16(42)), Body: body})
				if err != nil || resp.Code != codes.Created {
					t.Fatalf("PUT in %d: %v, %v", size, resp, err)
				}
				resp, err = conn.Do(t.Context(), &coap.Request{Method: codes.GET, Path: path})
				if err != nil {
					t.Fatalf("GET in %d: %v", size, err)
				}
				if resp.Code != codes.Content || !bytes.Equal(resp.Body, body) {
					t.Errorf("GET in %d: %v with %d bytes", size, resp.Code, len(resp.Body))
				}
				if err := conn.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// libcoap's clients fetch and send 2 KB in blocks of each size, and both in one
// exchange.
func TestForeignClient(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	f := p.files(t)
	body := numbers(2048)
	for _, name := range []string{"coap-client-openssl", "coap-client-gnutls"} {
		for _, size := range blockSizes {
			for _, method := range []string{"get", "put", "post"} {
				t.Run(fmt.Sprintf("%s/%s/%d", name, method, size), func(t *testing.T) {
					t.Parallel()
					handled := make(chan bool, 100)
					addr := serve(t, p.serverConfig(), func(_ context.Context, req *coap.Request) *coap.Response {
						handled <- true
						resp := &coap.Response{Code: codes.Changed}
						if method == "get" {
							resp.Code = codes.Content
						} else if !bytes.Equal(req.Body, body) || req.ContentFormat == nil || *req.ContentFormat != 42 {
							resp.Code = codes.BadRequest
						}
						if method != "put" {
							resp.Body = body
						}
						return resp
					})
					dir := t.TempDir()
					sent, received := filepath.Join(dir, "sent"), filepath.Join(dir, "received")
					if err := os.WriteFile(sent, body, 0o600); err != nil {
						t.Fatal(err)
					}
					args := []string{"-v", "7", "-B", "20", "-b", strconv.Itoa(size), "-m", method, "-o", received,
						"-c", f.clientCert, "-j", f.clientKey, "-C", f.ca}
					if method != "get" {
						args = append(args, "-f", sent, "-t", "42")
					}
					output, err := exec.CommandContext(t.Context(), tool(t, name), append(args, "coaps://"+addr+"/x")...).CombinedOutput()
					if err != nil {
						t.Fatalf("%v\n%s", err, output)
					}
					if len(handled) != 1 {
						t.Errorf("the handler ran %d times\n%s", len(handled), output)
					}
					if method != "put" {
						got, err := os.ReadFile(received)
						if err != nil || !bytes.Equal(got, body) {
							t.Errorf("received %d bytes, %v\n%s", len(got), err, output)
						}
					}
					for option, used := range map[string]bool{"Block1": method != "get", "Block2": method != "put"} {
						if used && !regexp.MustCompile(fmt.Sprintf("%s:1/[_M]/%d", option, size)).Match(output) {
							t.Errorf("no %s of %d bytes\n%s", option, size, output)
						}
					}
					if regexp.MustCompile(`c:[45]\.\d\d`).Match(output) {
						t.Errorf("an error\n%s", output)
					}
				})
			}
		}
	}
}

// sServer is "openssl s_server" for DTLS 1.2 on a port of its choice.
func sServer(t *testing.T, f files, args ...string) (*process, string) {
	t.Helper()
	server := start(t, "openssl", append([]string{"s_server", "-dtls1_2", "-accept", "127.0.0.1:0",
		"-cert", f.serverCert, "-key", f.serverKey, "-CAfile", f.ca, "-Verify", "1", "-verify_return_error"}, args...)...)
	return server, poll(t, server, func() (string, error) {
		for scanner := bufio.NewScanner(strings.NewReader(server.output.String())); scanner.Scan(); {
			if addr, found := strings.CutPrefix(scanner.Text(), "ACCEPT "); found {
				return addr, nil
			}
		}
		return "", errors.New("no ACCEPT line")
	})
}

// OpenSSL accepts our handshake with each of our suites, the mandatory one
// among them (RFC 9148 §3), and our certificate with it.
func TestOpenSSLServer(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	f := p.files(t)
	for _, suite := range []string{"ECDHE-ECDSA-AES128-CCM8", "ECDHE-ECDSA-AES128-CCM", "ECDHE-ECDSA-AES128-GCM-SHA256"} {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			server, addr := sServer(t, f, "-cipher", suite)
			conn := dial(t, addr, p.clientConfig())
			if !conn.ClientAuthenticated() {
				t.Error("the client's certificate was not asked for")
			}
			poll(t, server, func() (bool, error) {
				if !strings.Contains(server.output.String(), "CIPHER is "+suite) {
					return false, errors.New("the suite is not in its output")
				}
				return true, nil
			})
			if !strings.Contains(server.output.String(), "subject=CN = device") {
				t.Error("our certificate is not in its output")
			}
			// It dies without a word: the port is known to be closed, so nobody waits.
			server.kill()
			start := time.Now()
			_, err := conn.Do(t.Context(), &coap.Request{Method: codes.GET, Path: "/x"})
			if !errors.Is(err, coap.ErrClosed) || !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("after its death: %v", err)
			}
			if waited := time.Since(start); waited > 5*time.Second {
				t.Errorf("after its death: %v", waited)
			}
		})
	}
}

// clientKeys are the kinds of keys beside P-256 that an IDevID may have.
func clientKeys(t *testing.T) map[string]crypto.Signer {
	t.Helper()
	keys := map[string]crypto.Signer{}
	for _, curve := range []elliptic.Curve{elliptic.P384(), elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[curve.Params().Name] = key
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keys["RSA"] = key
	return keys
}

// Each kind of client key authenticates itself over the ECDSA suites, to our
// server and to foreign ones, and foreign clients do so to our server. Measured:
// OpenSSL 3.0 answers illegal_parameter to a certificate on a curve that the
// client's hello does not name.
func TestClientKeys(t *testing.T) {
	t.Parallel()
	for name, key := range clientKeys(t) {
		p := newPKI(t)
		p.client = p.issueFor(t, key, "device", x509.ExtKeyUsageClientAuth, time.Now().Add(time.Hour))
		f := p.files(t)
		authenticates := func(t *testing.T, conn *coap.Conn) {
			t.Helper()
			if !conn.ClientAuthenticated() || !conn.AcceptsKey(key.Public()) {
				t.Errorf("authenticated: %t, asked for this kind of key: %t", conn.ClientAuthenticated(), conn.AcceptsKey(key.Public()))
			}
		}
		t.Run(name+"/our server", func(t *testing.T) {
			t.Parallel()
			conn := dial(t, serve(t, p.serverConfig(), echo), p.clientConfig())
			authenticates(t, conn)
			if _, err := conn.Do(t.Context(), get); err != nil {
				t.Error(err)
			}
		})
		t.Run(name+"/openssl s_server", func(t *testing.T) {
			t.Parallel()
			server, addr := sServer(t, f)
			authenticates(t, dial(t, addr, p.clientConfig()))
			poll(t, server, func() (bool, error) {
				if !strings.Contains(server.output.String(), "subject=CN = device") {
					return false, errors.New("our certificate is not in its output")
				}
				return true, nil
			})
		})
		for _, libcoap := range []string{"coap-server-openssl", "coap-server-gnutls"} {
			t.Run(name+"/"+libcoap, func(t *testing.T) {
				t.Parallel()
				port := portPair(t)
				server := start(t, libcoap, "-A", "127.0.0.1", "-p", strconv.Itoa(port), "-c", f.serverCert, "-j", f.serverKey, "-C", f.ca)
				cfg := p.clientConfig()
				cfg.AckTimeout, cfg.HandshakeTimeout = 2*time.Second, 2*time.Second
				conn := poll(t, server, func() (*coap.Conn, error) {
					return coap.Dial(t.Context(), fmt.Sprintf("127.0.0.1:%d", port+1), cfg)
				})
				authenticates(t, conn)
				if _, err := conn.Do(t.Context(), get); err != nil {
					t.Error(err)
				}
				if err := conn.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		for _, libcoap := range []string{"coap-client-openssl", "coap-client-gnutls"} {
			t.Run(name+"/"+libcoap, func(t *testing.T) {
				t.Parallel()
				handled := make(chan string, 1)
				addr := serve(t, p.serverConfig(), func(_ context.Context, req *coap.Request) *coap.Response {
					handled <- req.Peer[0].Subject.CommonName
					return &coap.Response{Code: codes.Content}
				})
				output, err := exec.CommandContext(t.Context(), tool(t, libcoap), "-v", "7", "-B", "20", "-m", "get",
					"-c", f.clientCert, "-j", f.clientKey, "-C", f.ca, "coaps://"+addr+"/x").CombinedOutput()
				if err != nil || len(handled) != 1 || <-handled != "device" {
					t.Errorf("%v\n%s", err, output)
				}
			})
		}
	}
}

// A server that takes nothing of the kind of our key is said to be one: before
// our certificate goes out, at once, and, for a key that is not the session's,
// before anything is asked for it.
func TestUnsuitableKey(t *testing.T) {
	t.Parallel()
	keys := clientKeys(t)
	for name, test := range map[string]struct {
		key  string
		args []string
	}{
		"ECDSA only": {"RSA", []string{"-client_sigalgs", "ECDSA+SHA256"}},
		// pion has no PSS in DTLS 1.2.
		"PSS only": {"RSA", []string{"-client_sigalgs", "rsa_pss_rsae_sha256"}},
		"RSA only": {"P-384", []string{"-client_sigalgs", "RSA+SHA256"}},
		// Nor has it P-521 for the key exchange, which this server prefers.
		"P-521 first": {"P-521", []string{"-groups", "P-521:P-256", "-serverpref"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPKI(t)
			p.client = p.issueFor(t, keys[test.key], "device", x509.ExtKeyUsageClientAuth, time.Now().Add(time.Hour))
			_, addr := sServer(t, p.files(t), test.args...)
			begun := time.Now()
			conn, err := coap.Dial(t.Context(), addr, p.clientConfig())
			if err == nil {
				_ = conn.Close()
				t.Fatal("connected")
			}
			var handshake *coap.HandshakeError
			if !errors.Is(err, coap.ErrKeyUnsuitable) || !errors.As(err, &handshake) || handshake.CertificateSent {
				t.Errorf("got %v", err)
			}
			if waited := time.Since(begun); waited > 5*time.Second {
				t.Errorf("it took %v", waited)
			}
		})
	}
	t.Run("another key", func(t *testing.T) {
		t.Parallel()
		p := newPKI(t)
		_, addr := sServer(t, p.files(t), "-client_sigalgs", "ECDSA+SHA256")
		conn := dial(t, addr, p.clientConfig())
		if conn.AcceptsKey(keys["RSA"].Public()) || !conn.AcceptsKey(keys["P-384"].Public()) {
			t.Errorf("RSA: %t, EC: %t", conn.AcceptsKey(keys["RSA"].Public()), conn.AcceptsKey(keys["P-384"].Public()))
		}
	})
}

// OpenSSL's alert says why it refuses our certificate.
func TestOpenSSLRefusal(t *testing.T) {
	t.Parallel()
	p, other := newPKI(t), newPKI(t)
	for name, test := range map[string]struct {
		client identity
		want   coap.Alert
	}{
		"expired":    {p.issue(t, "device", x509.ExtKeyUsageClientAuth, time.Now().Add(-time.Minute)), coap.AlertCertificateExpired},
		"another CA": {other.client, coap.AlertUnknownCA},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, addr := sServer(t, p.files(t))
			cfg := p.clientConfig()
			cfg.Certificate, cfg.Key = test.client.chain, opaqueKey{test.client.key}
			conn, err := coap.Dial(t.Context(), addr, cfg)
			if err == nil {
				_ = conn.Close()
				t.Fatal("accepted")
			}
			var refused *coap.HandshakeError
			if !errors.As(err, &refused) || refused.Alert == nil || *refused.Alert != test.want || !refused.CertificateSent {
				t.Errorf("got %v: %+v", err, refused)
			}
		})
	}
}
