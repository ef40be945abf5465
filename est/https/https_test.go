package https_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"estenroll/est"
	"estenroll/est/https"
)

const certsOnlyType = "application/pkcs7-mime; smime-type=certs-only"

// One connection and one signature of the key are enough for all that an enrolment
// asks of a server.
func TestOneConnection(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*tls.Config){"TLS 1.2": tls12, "TLS 1.3": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w *world
			w = newWorld(t, change, func(rw http.ResponseWriter, r *http.Request) {
				body, err := est.MarshalCertsOnly([]*x509.Certificate{w.ca.cert})
				if err != nil {
					t.Error(err)
				}
				answering(certsOnlyType, body)(rw, r)
			})
			session := w.dial(t, nil)
			for _, req := range []est.Request{{Operation: est.CACerts}, {Operation: est.CSRAttrs}, {Operation: est.SimpleEnroll, Body: []byte("csr")}, {Operation: est.SimpleReenroll, Body: []byte("csr")}} {
				if _, err := session.RoundTrip(t.Context(), &req); err != nil {
					t.Fatal(err)
				}
			}
			if connections, signatures := w.listener.connections.Load(), w.key.signatures.Load(); connections != 1 || signatures != 1 {
				t.Errorf("got %d connections and %d signatures, want one of each", connections, signatures)
			}
			if !session.ClientAuthenticated() || !session.PeerChain()[0].Equal(w.server.cert) {
				t.Errorf("got authenticated %t, peer %q", session.ClientAuthenticated(), session.PeerChain()[0].Subject)
			}
		})
	}
}

// A request is strict: the server may be of any make.
func TestRequest(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 8951 §3 (1)")
	t.Attr("shows", "RFC 7030 §4.2.1 (1)")
	csr := bytes.Repeat([]byte{0x30, 0x82, 0xff}, 60)
	got := make(chan *http.Request, 1)
	body := make(chan []byte, 1)
	w := newWorld(t, nil, func(rw http.ResponseWriter, r *http.Request) {
		data, _ := io.ReadAll(r.Body)
		got <- r
		body <- data
		rw.WriteHeader(http.StatusNoContent)
	})
	session := w.dial(t, func(c *https.Config) { c.Label = "factory-2" })
	if _, err := ask(t, session, est.SimpleEnroll, csr); err != nil {
		t.Fatal(err)
	}
	r, sent := <-got, <-body
	if r.Method != http.MethodPost || r.URL.Path != "/.well-known/est/factory-2/simpleenroll" || r.ProtoMajor != 1 {
		t.Errorf("got %s %s %s", r.Method, r.URL, r.Proto)
	}
	if r.ContentLength != int64(len(sent)) || len(r.TransferEncoding) > 0 {
		t.Errorf("got Content-Length %d for %d bytes, Transfer-Encoding %q", r.ContentLength, len(sent), r.TransferEncoding)
	}
	for name, want := range map[string]string{"Content-Type": "application/pkcs10", "Content-Transfer-Encoding": "base64", "Authorization": "", "Accept-Encoding": ""} {
		if r.Header.Get(name) != want {
			t.Errorf("%s: got %q, want %q", name, r.Header.Get(name), want)
		}
	}
	for line := range bytes.SplitSeq(bytes.TrimSuffix(sent, []byte("\r\n")), []byte("\r\n")) {
		if len(line) == 0 || len(line) > 76 {
			t.Errorf("a line of %d characters", len(line))
		}
	}
	if decoded, err := est.DecodeBase64(sent); err != nil || !bytes.Equal(decoded, csr) {
		t.Errorf("got %x, %v", decoded, err)
	}
	if _, err := ask(t, session, est.CACerts, nil); err != nil {
		t.Fatal(err)
	}
	if r, sent := <-got, <-body; r.Method != http.MethodGet || len(sent) > 0 || r.Header.Get("Content-Type") != "" {
		t.Errorf("got %s with %d bytes, Content-Type %q", r.Method, len(sent), r.Header.Get("Content-Type"))
	}
}

// Nothing is asked of a server whose certificate is not accepted; that is judged by
// the session's trust anchors and clock alone.
func TestServerRefused(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 7030 §3.3 (1)")
	t.Attr("shows", "RFC 7030 §3.3.1 (1)")
	t.Attr("shows", "RFC 7030 §3.6 (1)")
	t.Attr("shows", "RFC 7030 §4.1.2 (2)")
	t.Attr("shows", "RFC 7030 §4.2 (1)")
	t.Attr("shows", "RFC 7030 §4.2 (2)")
	t.Attr("shows", "RFC 7030 §4.4 (1)")
	t.Attr("shows", "RFC 7030 §3.1 (4)")
	other := newParty(t, nil, "ca", func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })
	for name, c := range map[string]struct {
		shown func(t *testing.T, w *world) *party
		now   time.Time
		want  error
	}{
		"another name":          {func(t *testing.T, w *world) *party { return newParty(t, w.ca, "s", dnsName("other.example")) }, epoch, est.ErrNotTrusted},
		"no name":               {func(t *testing.T, w *world) *party { return newParty(t, w.ca, "127.0.0.1", nil) }, epoch, est.ErrNotTrusted},
		"another CA":            {func(t *testing.T, w *world) *party { return newParty(t, other, "s", loopback) }, epoch, est.ErrNotTrusted},
		"self-signed":           {func(t *testing.T, w *world) *party { return newParty(t, nil, "s", loopback) }, epoch, est.ErrNotTrusted},
		"for clients":           {func(t *testing.T, w *world) *party { return newParty(t, w.ca, "s", clientsOnly) }, epoch, est.ErrNotTrusted},
		"expired":               {func(t *testing.T, w *world) *party { return nil }, epoch.Add(2 * time.Hour), est.ErrNotValidNow},
		"not yet valid":         {func(t *testing.T, w *world) *party { return nil }, epoch.Add(-2 * time.Hour), est.ErrNotValidNow},
		"expired by the system": {func(t *testing.T, w *world) *party { return nil }, epoch, nil},
	} {
		for version, change := range map[string]func(*tls.Config){"TLS 1.2": tls12, "TLS 1.3": nil} {
			t.Run(name+"/"+version, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, change, func(http.ResponseWriter, *http.Request) {})
				w.shown = c.shown(t, w)
				cfg := w.config()
				cfg.Now = func() time.Time { return c.now }
				session, err := https.Dial(t.Context(), cfg)
				if c.want == nil {
					if err != nil {
						t.Fatal(err)
					}
					_ = session.Close()
					return
				}
				if !errors.Is(err, c.want) || !errors.Is(err, est.ErrServerCertificate) {
					t.Errorf("got %v, want %v", err, c.want)
				}
				if w.requests.Load() != 0 || w.key.signatures.Load() != 0 {
					t.Errorf("%d requests, %d signatures", w.requests.Load(), w.key.signatures.Load())
				}
			})
		}
	}
}

func dnsName(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.DNSNames = []string{name} }
}

func clientsOnly(c *x509.Certificate) {
	loopback(c)
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
}

// A server refuses our certificate in the handshake, or, with TLS 1.3, where its
// first answer would be: both say so.
func TestClientRefused(t *testing.T) {
	t.Parallel()
	refusing := func(c *tls.Config) {
		c.VerifyConnection = func(tls.ConnectionState) error { return errors.New("refused") }
	}
	t.Run("TLS 1.2", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, func(c *tls.Config) { tls12(c); refusing(c) }, func(http.ResponseWriter, *http.Request) {})
		if _, err := https.Dial(t.Context(), w.config()); !errors.Is(err, est.ErrCredentialRefused) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("TLS 1.3", func(t *testing.T) {
		t.Parallel()
		for range 20 { // the alert comes before the request, or after it
			w := newWorld(t, refusing, func(http.ResponseWriter, *http.Request) {})
			session := w.dial(t, nil)
			if _, err := ask(t, session, est.CACerts, nil); !errors.Is(err, est.ErrCredentialRefused) || errors.Is(err, est.ErrUnreachable) {
				t.Fatalf("got %v", err)
			}
			if n := w.listener.connections.Load(); n != 1 {
				t.Fatalf("got %d connections", n)
			}
		}
	})
}

// A server that asks for no certificate gets none: what it answers proves nothing.
func TestNotAsked(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *tls.Config) { c.ClientAuth = tls.NoClientCert }, func(http.ResponseWriter, *http.Request) {})
	session := w.dial(t, nil)
	if session.ClientAuthenticated() || w.key.signatures.Load() != 0 {
		t.Errorf("authenticated %t, %d signatures", session.ClientAuthenticated(), w.key.signatures.Load())
	}
	if !session.AcceptsKey(w.client.key.Public()) {
		t.Error("a server that asks for no certificate refuses a key")
	}
}

// A client without a certificate has a password, which is for a server that lets it
// speak; one that wants a certificate says so in the handshake, or after it.
func TestWithoutCertificate(t *testing.T) {
	t.Parallel()
	bare := func(c *https.Config) {
		c.Certificate, c.Key = nil, nil
		c.User, c.Password = "dev-17", func() ([]byte, error) { return []byte("open sesame"), nil }
	}
	for name, change := range map[string]func(*tls.Config){"TLS 1.2": tls12, "TLS 1.3": func(*tls.Config) {}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, mode := range []tls.ClientAuthType{tls.NoClientCert, tls.RequestClientCert} {
				w := newWorld(t, func(c *tls.Config) { change(c); c.ClientAuth = mode }, func(rw http.ResponseWriter, r *http.Request) {
					if user, password, _ := r.BasicAuth(); user != "dev-17" || password != "open sesame" || len(r.TLS.PeerCertificates) > 0 {
						rw.WriteHeader(http.StatusUnauthorized)
					}
				})
				session := w.dial(t, bare)
				if _, err := ask(t, session, est.SimpleEnroll, []byte("csr")); err != nil || session.ClientAuthenticated() || w.requests.Load() != 2 {
					t.Errorf("%s: %v after %d requests, authenticated %t", mode, err, w.requests.Load(), session.ClientAuthenticated())
				}
			}
			w := newWorld(t, change, func(http.ResponseWriter, *http.Request) {})
			cfg := w.config()
			bare(&cfg)
			session, err := https.Dial(t.Context(), cfg)
			if err == nil {
				defer session.Close()
				_, err = ask(t, session, est.SimpleEnroll, []byte("csr"))
			}
			if !errors.Is(err, est.ErrCertificateWanted) || w.requests.Load() != 0 {
				t.Errorf("a server that wants a certificate: %v after %d requests", err, w.requests.Load())
			}
		})
	}
}

// brokenSigner is a key that the HSM cannot use.
type brokenSigner struct{ crypto.Signer }

var errToken = errors.New("token removed")

func (brokenSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errToken }

// What the key says when it cannot sign is what comes out.
func TestBrokenKey(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*tls.Config){"TLS 1.2": tls12, "TLS 1.3": nil} {
		w := newWorld(t, change, func(http.ResponseWriter, *http.Request) {})
		cfg := w.config()
		cfg.Key = brokenSigner{w.client.key}
		if _, err := https.Dial(t.Context(), cfg); !errors.Is(err, errToken) || errors.Is(err, est.ErrHandshake) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestDialRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil, func(http.ResponseWriter, *http.Request) {})
	for name, c := range map[string]struct {
		change func(*https.Config)
		want   error
	}{
		"no trust anchors": {func(c *https.Config) { c.Trust = nil }, est.ErrNotTrusted},
		"another key":      {func(c *https.Config) { c.Key = newParty(t, nil, "x", nil).key }, est.ErrKeyMismatch},
		"a closed port":    {func(c *https.Config) { c.URI.Port = closedPort(t) }, est.ErrUnreachable},
		"no such host":     {func(c *https.Config) { c.URI.Host = "est.invalid" }, est.ErrUnreachable},
	} {
		cfg := w.config()
		c.change(&cfg)
		if _, err := https.Dial(t.Context(), cfg); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	cfg := w.config()
	cfg.Certificate = nil
	if _, err := https.Dial(t.Context(), cfg); err == nil {
		t.Error("without a certificate: no error")
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := https.Dial(cancelled, w.config()); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
	if w.requests.Load() != 0 {
		t.Errorf("%d requests", w.requests.Load())
	}
}

func closedPort(t *testing.T) uint16 {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	return uint16(port)
}

// What is no TLS server: one that says nothing, hangs up, or speaks another protocol.
func TestNotTLS(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 7030 §3.3 (3)")
	t.Attr("shows", "RFC 7030 §3.2.3 (1)")
	for name, c := range map[string]struct {
		speak func(net.Conn)
		want  error
	}{
		"silent":   {func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }, est.ErrUnreachable},
		"hangs up": {func(net.Conn) {}, est.ErrUnreachable},
		"HTTP":     {func(conn net.Conn) { _, _ = io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n") }, est.ErrHandshake},
		"an alert": {func(conn net.Conn) { _, _ = conn.Write([]byte{21, 3, 3, 0, 2, 2, 40}) }, est.ErrHandshake},
		"TLS 1.0": {func(conn net.Conn) {
			_ = tls.Server(conn, &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}).Handshake()
		}, est.ErrHandshake},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			go func() {
				if conn, err := listener.Accept(); err == nil {
					c.speak(conn)
					_ = conn.Close()
				}
			}()
			w := newWorld(t, nil, func(http.ResponseWriter, *http.Request) {})
			cfg := w.config()
			cfg.URI.Port = uint16(listener.Addr().(*net.TCPAddr).Port)
			if name == "silent" {
				cfg.HandshakeTimeout = 200 * time.Millisecond
			}
			if _, err := https.Dial(t.Context(), cfg); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

// Each session is a full handshake, which the key signs, and has a value of its own,
// though the server would let it resume the one before.
func TestNoResumption(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, func(c *tls.Config) { c.MaxVersion = version }, func(_ http.ResponseWriter, r *http.Request) {
				if r.TLS.Version != version || r.TLS.DidResume {
					t.Errorf("version %x, resumed %t", r.TLS.Version, r.TLS.DidResume)
				}
			})
			values := map[string]bool{}
			for range 3 {
				session := w.dial(t, nil)
				if _, err := ask(t, session, est.CSRAttrs, nil); err != nil {
					t.Fatal(err)
				}
				value, err := session.ChannelBinding()
				if err != nil {
					t.Fatal(err)
				}
				values[string(value)] = true
			}
			if n := w.key.signatures.Load(); n != 3 || len(values) != 3 {
				t.Errorf("%d signatures, %d values", n, len(values))
			}
		})
	}
}

// No cipher suite is offered that does without secrecy or authentication, or with DES or
// what was for export.
func TestCipherSuites(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 7030 §3.2.3 (2)")
	t.Attr("shows", "RFC 7030 §4.4 (2)")
	t.Attr("shows", "RFC 7030 §6 (1)")
	offered := make(chan []uint16, 1)
	w := newWorld(t, func(c *tls.Config) {
		c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			offered <- hello.CipherSuites
			return nil, nil
		}
	}, func(http.ResponseWriter, *http.Request) {})
	w.dial(t, nil)
	suites := <-offered
	if len(suites) == 0 {
		t.Error("none is offered")
	}
	for _, suite := range suites {
		name := tls.CipherSuiteName(suite)
		if !strings.Contains(name, "_AES_") && !strings.Contains(name, "_CHACHA20_") || strings.Contains(name, "_anon_") {
			t.Errorf("%s is offered", name)
		}
	}
}

// A server that closes the connection after each answer is asked on the next one,
// if it is the same server, and nothing is bound to the connection.
func TestClosedConnection(t *testing.T) {
	t.Parallel()
	closing := func(rw http.ResponseWriter, _ *http.Request) { rw.Header().Set("Connection", "close") }
	t.Run("the same server", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, nil, closing)
		session := w.dial(t, nil)
		const rounds = 20 // the next request may meet the end of the connection, or not
		for range rounds {
			if _, err := ask(t, session, est.CSRAttrs, nil); err != nil {
				t.Fatal(err)
			}
		}
		if connections, signatures := w.listener.connections.Load(), w.key.signatures.Load(); connections != rounds || signatures != rounds {
			t.Errorf("got %d connections and %d signatures", connections, signatures)
		}
	})
	t.Run("another certificate", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, nil, closing)
		session := w.dial(t, nil)
		if _, err := ask(t, session, est.CSRAttrs, nil); err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		w.shown = newParty(t, w.ca, "another server", loopback)
		w.mu.Unlock()
		if _, err := ask(t, session, est.CSRAttrs, nil); !errors.Is(err, est.ErrUnreachable) || w.requests.Load() != 1 {
			t.Errorf("got %v after %d requests", err, w.requests.Load())
		}
	})
	t.Run("bound", func(t *testing.T) {
		t.Parallel()
		theirs := make(chan []byte, 2)
		w := newWorld(t, nil, func(rw http.ResponseWriter, r *http.Request) {
			value, _ := est.TLSBinding(*r.TLS)
			theirs <- value
			closing(rw, r)
		})
		session := w.dial(t, nil)
		if _, err := ask(t, session, est.CSRAttrs, nil); err != nil {
			t.Fatal(err)
		}
		<-theirs
		for requests := range int32(2) {
			ours, err := session.ChannelBinding()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ask(t, session, est.SimpleEnroll, []byte("csr")); err != nil {
				t.Fatal(err)
			}
			if got := <-theirs; !bytes.Equal(got, ours) {
				t.Errorf("we have %x, the server had %x", ours, got)
			}
			// What was made for that connection is sent on no other, the next one is.
			if _, err := ask(t, session, est.SimpleEnroll, []byte("csr")); !errors.Is(err, est.ErrUnlinked) || !errors.Is(err, est.ErrUnreachable) || w.requests.Load() != requests+2 {
				t.Errorf("got %v after %d requests", err, w.requests.Load())
			}
		}
		if n := w.listener.connections.Load(); n != 4 {
			t.Errorf("%d connections", n)
		}
	})
	t.Run("bound, and asked for a password", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, nil, func(rw http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			if _, _, given := r.BasicAuth(); !given {
				rw.Header().Set("WWW-Authenticate", `Basic realm="est"`)
				closing(rw, r)
				rw.WriteHeader(http.StatusUnauthorized)
				return
			}
			linked, err := est.DecodeBase64(body)
			if value, _ := est.TLSBinding(*r.TLS); err != nil || !bytes.Equal(linked, value) {
				t.Errorf("a request that is linked to %x on a connection with %x, %v", linked, value, err)
			}
		})
		asked := 0
		session := w.dial(t, func(c *https.Config) {
			c.User, c.Password = "dev-17", func() ([]byte, error) { asked++; return []byte("open sesame"), nil }
		})
		var err error
		for _, want := range []error{est.ErrUnlinked, nil} {
			value, bindErr := session.ChannelBinding()
			if bindErr != nil {
				t.Fatal(bindErr)
			}
			if _, err = ask(t, session, est.SimpleEnroll, value); !errors.Is(err, want) {
				t.Errorf("got %v, want %v", err, want)
			}
		}
		if w.requests.Load() != 2 || asked != 1 || w.listener.connections.Load() != 2 || w.key.signatures.Load() != 2 {
			t.Errorf("%d requests on %d connections, %d signatures, the password read %d times", w.requests.Load(), w.listener.connections.Load(), w.key.signatures.Load(), asked)
		}
	})
}

// Both ends of a connection have the same channel binding, and no two connections.
func TestChannelBinding(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*tls.Config){"TLS 1.2": tls12, "TLS 1.3": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			theirs := make(chan []byte, 1)
			w := newWorld(t, change, func(_ http.ResponseWriter, r *http.Request) {
				value, _ := est.TLSBinding(*r.TLS)
				theirs <- value
			})
			seen := map[string]bool{}
			for range 2 {
				session := w.dial(t, nil)
				ours, err := session.ChannelBinding()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := ask(t, session, est.CSRAttrs, nil); err != nil {
					t.Fatal(err)
				}
				if got := <-theirs; len(got) == 0 || !bytes.Equal(got, ours) {
					t.Errorf("the server has %x, we have %x", got, ours)
				}
				seen[string(ours)] = true
			}
			if len(seen) != 2 {
				t.Error("two connections have one value")
			}
		})
	}
}

// TLS takes the keys that an HSM has; which of them a server takes is known before
// a certificate is asked for.
func TestAcceptsKey(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil, func(http.ResponseWriter, *http.Request) {})
	session := w.dial(t, nil)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, public := range []crypto.PublicKey{w.client.key.Public(), rsaKey.Public()} {
		if !session.AcceptsKey(public) {
			t.Errorf("%T: not accepted", public)
		}
	}
	p224 := w.client.key.PublicKey
	p224.Curve = elliptic.P224()
	if session.AcceptsKey(&p224) {
		t.Error("P-224 is accepted, which TLS 1.3 has no signature of")
	}
}

// A provisional session is with anybody, and for cacerts alone: no password and no
// request leaves on it, and it proves nothing.
func TestProvisional(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 7030 §3.2.3 (4)")
	t.Attr("shows", "RFC 7030 §4.1.1 (2)")
	t.Attr("shows", "RFC 7030 §4.1.1 (3)")
	answer := http.StatusOK
	w := newWorld(t, nil, func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("a password was sent")
		}
		rw.Header().Set("WWW-Authenticate", "Basic")
		rw.Header().Set("Location", "/elsewhere")
		rw.WriteHeader(answer)
	})
	w.shown = newParty(t, nil, "anybody", dnsName("other.example"))
	session := w.dial(t, func(c *https.Config) {
		c.Provisional, c.Trust = true, nil
		c.User, c.Password = "dev-17", func() ([]byte, error) { t.Error("the password is read"); return nil, nil }
	})
	for _, answer = range []int{http.StatusOK, http.StatusUnauthorized, http.StatusTemporaryRedirect} {
		_, err := ask(t, session, est.CACerts, nil)
		var status *est.StatusError
		if (answer == http.StatusOK) != (err == nil) || err != nil && !errors.As(err, &status) {
			t.Errorf("%d: got %v", answer, err)
		}
	}
	for _, operation := range []est.Operation{est.SimpleEnroll, est.SimpleReenroll, est.CSRAttrs, est.ServerKeyGen} {
		if _, err := ask(t, session, operation, []byte("csr")); !errors.Is(err, est.ErrNotTrusted) {
			t.Errorf("%s: got %v", operation, err)
		}
	}
	if w.requests.Load() != 3 || session.ClientAuthenticated() || !session.PeerChain()[0].Equal(w.shown.cert) {
		t.Errorf("%d requests, authenticated %t", w.requests.Load(), session.ClientAuthenticated())
	}
}

// A closed session is no more asked.
func TestClose(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil, func(http.ResponseWriter, *http.Request) {})
	session := w.dial(t, nil)
	if err := session.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(t, session, est.CACerts, nil); err == nil || w.listener.connections.Load() != 1 {
		t.Errorf("got %v after %d connections", err, w.listener.connections.Load())
	}
}

func ExampleDial() {
	uri, err := est.ParseURI("https://est.example/.well-known/est")
	if err != nil {
		fmt.Println(err)
	}
	_, err = https.Dial(context.Background(), https.Config{URI: uri}) // and Certificate, Key and Trust
	fmt.Println(err)
	// Output: open session with https://est.example:443/.well-known/est: no trust anchors: not trusted
}
