package coap_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pion/dtls/v3"
	"github.com/pion/dtls/v3/pkg/protocol/extension"
	"github.com/pion/dtls/v3/pkg/protocol/handshake"
	"github.com/pion/dtls/v3/pkg/protocol/recordlayer"

	"estenroll/internal/coap"
	"estenroll/internal/coap/coaptest"
)

func TestHandshake(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	conn := dial(t, serve(t, p.serverConfig(), echo), p.clientConfig())
	if !conn.ClientAuthenticated() {
		t.Error("the client's certificate was not asked for")
	}
	if peer := conn.PeerCertificates(); len(peer) != 1 || string(peer[0].Raw) != string(p.server.chain[0]) {
		t.Errorf("the server's chain is %v", peer)
	}
}

// firstDatagram is what a client with this server name, and this key or else a
// P-256 one, sends first.
func firstDatagram(t *testing.T, name string, key crypto.Signer) []byte {
	t.Helper()
	p := newPKI(t)
	if key != nil {
		p.client = p.issueFor(t, key, "device", x509.ExtKeyUsageClientAuth, time.Now().Add(time.Hour))
	}
	var once sync.Once
	first := make(chan []byte, 1)
	proxy := coaptest.NewProxy(t, "127.0.0.1:9", coaptest.Faults{Hook: func(d coaptest.Datagram) coaptest.Action {
		once.Do(func() { first <- d.Payload })
		return coaptest.Drop
	}})
	cfg := p.clientConfig()
	cfg.ServerName, cfg.HandshakeTimeout = name, 50*time.Millisecond
	if conn, err := coap.Dial(t.Context(), proxy.Addr(), cfg); err == nil {
		_ = conn.Close()
	}
	return <-first
}

// clientHello is what a client with this server name sends first.
func clientHello(t *testing.T, name string) (*handshake.MessageClientHello, string) {
	t.Helper()
	var record recordlayer.RecordLayer
	if err := record.Unmarshal(firstDatagram(t, name, nil)); err != nil {
		t.Fatal(err)
	}
	hello, ok := record.Content.(*handshake.Handshake).Message.(*handshake.MessageClientHello)
	if !ok {
		t.Fatalf("not a ClientHello: %v", record.Content)
	}
	sent := ""
	for _, e := range hello.Extensions {
		if sni, ok := e.(*extension.ServerName); ok {
			sent = sni.ServerName
		}
	}
	return hello, sent
}

// RFC 9148 §3: the mandatory suite, and first; P-256; extended master secret. A
// name is sent, an empty one (for an IP literal) is not (RFC 6066 §3).
func TestClientHello(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 9148 §3 (1)")
	t.Attr("shows", "RFC 9148 §3 (2)")
	t.Attr("shows", "RFC 9148 §9.1 (4)")
	for _, name := range []string{"ca.example", ""} {
		hello, sent := clientHello(t, name)
		suites := []uint16{
			uint16(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8), uint16(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM),
			uint16(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
		}
		if diff := cmp.Diff(suites, hello.CipherSuiteIDs); diff != "" {
			t.Errorf("suites (-want +got):\n%s", diff)
		}
		if !slices.ContainsFunc(hello.Extensions, func(e extension.Extension) bool {
			ems, ok := e.(*extension.UseExtendedMasterSecret)
			return ok && ems.Supported
		}) {
			t.Error("no extended master secret")
		}
		if !slices.ContainsFunc(hello.Extensions, func(e extension.Extension) bool {
			groups, ok := e.(*extension.SupportedEllipticCurves)
			return ok && len(groups.EllipticCurves) == 1 && groups.EllipticCurves[0] == 23 // secp256r1
		}) {
			t.Error("groups other than P-256")
		}
		if sent != name {
			t.Errorf("server name %q, want %q", sent, name)
		}
	}
}

// The groups are P-256 and the curve of our certificate, if that is another: the
// hello for a P-256 or an RSA key does not grow. pion's parser drops P-521, so
// the extension is looked for as it stands (RFC 8422 §5.1.1).
func TestClientHelloGroups(t *testing.T) {
	t.Parallel()
	keys := clientKeys(t)
	for name, want := range map[string][]byte{
		"P-256": {0, 10, 0, 4, 0, 2, 0, 23}, "RSA": {0, 10, 0, 4, 0, 2, 0, 23},
		"P-384": {0, 10, 0, 6, 0, 4, 0, 23, 0, 24}, "P-521": {0, 10, 0, 6, 0, 4, 0, 23, 0, 25},
	} {
		if hello := firstDatagram(t, "", keys[name]); !bytes.Contains(hello, want) {
			t.Errorf("%s: no extension %v in %v", name, want, hello)
		}
	}
}

// foreignServer is a pion server with options of its own.
func foreignServer(t *testing.T, p *pki, options ...dtls.ServerOption) string {
	t.Helper()
	options = append([]dtls.ServerOption{
		dtls.WithCertificates(tls.Certificate{Certificate: p.server.chain, PrivateKey: p.server.key}),
		dtls.WithInsecureSkipVerify(true),
	}, options...)
	listener, err := dtls.ListenWithOptions("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}, options...)
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				_ = conn.(*dtls.Conn).HandshakeContext(t.Context())
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		conns.Wait()
	})
	return listener.Addr().String()
}

// Whether our certificate was asked for and sent is known, whatever list of
// CAs the server asks with.
func TestClientAuthenticated(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 9148 §3 (4)")
	p, other := newPKI(t), newPKI(t)
	others := x509.NewCertPool()
	others.AddCert(other.ca)
	for name, test := range map[string]struct {
		options []dtls.ServerOption
		want    bool
	}{
		"not asked":            {nil, false},
		"asked":                {[]dtls.ServerOption{dtls.WithClientAuth(dtls.RequireAnyClientCert)}, true},
		"asked for another CA": {[]dtls.ServerOption{dtls.WithClientAuth(dtls.RequireAnyClientCert), dtls.WithClientCAs(others)}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := dial(t, foreignServer(t, p, test.options...), p.clientConfig())
			if got := conn.ClientAuthenticated(); got != test.want {
				t.Errorf("got %t, want %t", got, test.want)
			}
		})
	}
}

// brokenKey is an HSM that fails.
type brokenKey struct{ crypto.Signer }

var errToken = errors.New("the token is gone")

func (brokenKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errToken }

// Each way for a handshake to fail tells itself from the others.
func TestHandshakeError(t *testing.T) {
	t.Parallel()
	p, other := newPKI(t), newPKI(t)
	server := func(change func(*coap.Config)) func(*testing.T) string {
		return func(t *testing.T) string {
			cfg := p.serverConfig()
			if change != nil {
				change(&cfg)
			}
			return serve(t, cfg, echo)
		}
	}
	foreign := func(options ...dtls.ServerOption) func(*testing.T) string {
		return func(t *testing.T) string { return foreignServer(t, p, options...) }
	}
	for name, test := range map[string]struct {
		server func(*testing.T) string
		client func(*coap.Config)
		is     error
		alert  *coap.Alert
		sent   bool
	}{
		"we refuse the server": {server(nil), func(c *coap.Config) { c.Verify = other.verify(x509.ExtKeyUsageServerAuth) }, errWrongPeer, nil, false},
		"the server refuses us": {server(func(c *coap.Config) { c.Verify = other.verify(x509.ExtKeyUsageClientAuth) }), nil, nil,
			new(coap.AlertBadCertificate), true},
		"we have no certificate": {server(nil), func(c *coap.Config) { c.Certificate, c.Key = nil, nil }, nil,
			new(coap.AlertNoCertificate), false},
		"our key cannot sign": {server(nil), func(c *coap.Config) { c.Key = brokenKey{c.Key} }, errToken, nil, false},
		"no suite in common": {foreign(dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA)), nil, nil,
			new(coap.AlertInsufficientSecurity), false},
		"no extended master secret": {foreign(dtls.WithExtendedMasterSecret(dtls.DisableExtendedMasterSecret)), nil, nil, nil, false},
		"a silent peer": {func(t *testing.T) string {
			return coaptest.NewProxy(t, "127.0.0.1:9", coaptest.Faults{Loss: 1}).Addr()
		}, func(c *coap.Config) { c.HandshakeTimeout = 200 * time.Millisecond }, coap.ErrTimeout, nil, false},
		"a peer that falls silent": {func(t *testing.T) string {
			return coaptest.NewProxy(t, server(nil)(t), coaptest.Faults{Hook: func(d coaptest.Datagram) coaptest.Action {
				if d.Direction == coaptest.ToClient && d.Number > 4 {
					return coaptest.Drop
				}
				return coaptest.Pass
			}}).Addr()
		}, func(c *coap.Config) { c.HandshakeTimeout = 500 * time.Millisecond }, coap.ErrTimeout, nil, true},
		"a refused port":    {func(t *testing.T) string { return closedPort(t) }, nil, syscall.ECONNREFUSED, nil, false},
		"no such host name": {func(*testing.T) string { return "host.invalid:5684" }, nil, nil, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := p.clientConfig()
			if test.client != nil {
				test.client(&cfg)
			}
			addr := test.server(t)
			start := time.Now()
			conn, err := coap.Dial(t.Context(), addr, cfg)
			if err == nil {
				_ = conn.Close()
				t.Fatal("connected")
			}
			if waited := time.Since(start); waited > cfg.HandshakeTimeout/2+time.Second {
				t.Errorf("it took %v", waited)
			}
			var handshake *coap.HandshakeError
			if !errors.As(err, &handshake) {
				t.Fatalf("got %v", err)
			}
			if handshake.Addr != addr || test.is != nil && !errors.Is(err, test.is) || handshake.CertificateSent != test.sent {
				t.Errorf("got %+v", handshake)
			}
			if handshake.Refused != (name == "no extended master secret") {
				t.Errorf("refused by us: %t", handshake.Refused)
			}
			if timeout := errors.Is(err, coap.ErrTimeout); timeout != (test.is == coap.ErrTimeout) || timeout != errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a timeout: %t: %v", timeout, err)
			}
			if diff := cmp.Diff(test.alert, handshake.Alert); diff != "" {
				t.Errorf("alert (-want +got):\n%s\n%v", diff, err)
			}
			t.Log(err)
		})
	}
}

func closedPort(t *testing.T) string {
	t.Helper()
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := socket.Close(); err != nil {
		t.Fatal(err)
	}
	return socket.LocalAddr().String()
}

// The caller's context ends a handshake: its deadline is a timeout, its
// cancellation is not.
func TestHandshakeContext(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	ctx, cancel := context.WithCancel(t.Context())
	proxy := coaptest.NewProxy(t, "127.0.0.1:9", coaptest.Faults{Hook: func(d coaptest.Datagram) coaptest.Action {
		if d.Client == 0 && d.Number == 2 {
			cancel()
		}
		return coaptest.Drop
	}})
	if conn, err := coap.Dial(ctx, proxy.Addr(), p.clientConfig()); err == nil {
		_ = conn.Close()
		t.Error("connected")
	} else if !errors.Is(err, context.Canceled) || errors.Is(err, coap.ErrTimeout) {
		t.Error(err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if conn, err := coap.Dial(ctx, proxy.Addr(), p.clientConfig()); err == nil {
		_ = conn.Close()
		t.Error("connected")
	} else if !isTimeout(err) {
		t.Error(err)
	}
}

// Garbage, and a handshake that never goes on, neither stop a server nor stay
// when it closes. Not parallel: it counts goroutines.
func TestServerHandshakes(t *testing.T) {
	p := newPKI(t)
	before := runtime.NumGoroutine()
	server, err := coap.Listen("127.0.0.1:0", p.serverConfig())
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(echo) }()
	garbage, err := net.Dial("udp", server.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, datagram := range [][]byte{
		{0}, []byte("GET / HTTP/1.1\r\n"), numbers(1400), {22, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff},
		append([]byte{22, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 40}, numbers(40)...), {21, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 40},
	} {
		if _, err := garbage.Write(datagram); err != nil {
			t.Fatal(err)
		}
	}
	// A client that gives up while the server waits for its certificate.
	cfg := p.clientConfig()
	cfg.HandshakeTimeout = 100 * time.Millisecond
	cfg.Key = slowKey{cfg.Key, 200 * time.Millisecond}
	if conn, err := coap.Dial(t.Context(), server.Addr().String(), cfg); err == nil {
		_ = conn.Close()
		t.Error("connected in less time than the key takes")
	} else if !isTimeout(err) {
		t.Error(err)
	}
	conn, err := coap.Dial(t.Context(), server.Addr().String(), p.clientConfig())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Do(t.Context(), get); err != nil {
		t.Error(err)
	}
	start := time.Now()
	if err := errors.Join(conn.Close(), server.Close(), <-served, garbage.Close()); err != nil {
		t.Error(err)
	}
	if waited := time.Since(start); waited > 5*time.Second {
		t.Errorf("Close took %v", waited)
	}
	noMoreGoroutines(t, before)
}

// slowKey is an HSM that takes its time.
type slowKey struct {
	crypto.Signer
	takes time.Duration
}

func (k slowKey) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	<-time.After(k.takes)
	return k.Signer.Sign(rand, digest, opts)
}

// A signature that takes longer than a flight's timeout is waited for.
func TestSlowKey(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	serverConfig, cfg := p.serverConfig(), p.clientConfig()
	serverConfig.Key = slowKey{serverConfig.Key, 400 * time.Millisecond}
	cfg.Key = slowKey{cfg.Key, 400 * time.Millisecond}
	conn := dial(t, serve(t, serverConfig, echo), cfg)
	if _, err := conn.Do(t.Context(), get); err != nil {
		t.Error(err)
	}
}
