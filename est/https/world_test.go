package https_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"estenroll/est"
	"estenroll/est/https"
)

var epoch = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

// party is one end's credential.
type party struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newParty(t *testing.T, issuer *party, name string, change func(*x509.Certificate)) *party {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		NotBefore: epoch.Add(-time.Hour), NotAfter: epoch.Add(time.Hour),
	}
	if change != nil {
		change(template)
	}
	p := &party{key: key}
	parent, signer := template, key
	if issuer != nil {
		parent, signer = issuer.cert, issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	if p.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return p
}

// countingSigner is a signer that is nothing else, as an HSM's is.
type countingSigner struct {
	crypto.Signer
	signatures atomic.Int32
}

func (s *countingSigner) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	s.signatures.Add(1)
	return s.Signer.Sign(rand, digest, opts)
}

// countingListener counts the connections that it has accepted.
type countingListener struct {
	net.Listener
	connections atomic.Int32
}

func (l *countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.connections.Add(1)
	}
	return conn, err
}

// world is a CA, a client and a server that answers with a handler.
type world struct {
	ca, client, server *party
	trust              *est.TrustAnchors
	key                *countingSigner
	uri                est.URI
	listener           *countingListener
	requests           atomic.Int32
	mu                 sync.Mutex
	shown              *party // by the server, in place of its own
}

// newWorld starts a server; change changes its TLS.
func newWorld(t *testing.T, change func(*tls.Config), handler http.HandlerFunc) *world {
	t.Helper()
	ca := newParty(t, nil, "ca", func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })
	w := &world{ca: ca, client: newParty(t, ca, "client", nil)}
	w.server = newParty(t, ca, "server", loopback)
	w.key = &countingSigner{Signer: w.client.key}
	var err error
	if w.trust, err = est.NewTrustAnchors([]*x509.Certificate{ca.cert}); err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{ClientAuth: tls.RequireAnyClientCert, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		shown := w.server
		if w.shown != nil {
			shown = w.shown
		}
		return &tls.Certificate{Certificate: [][]byte{shown.cert.Raw}, PrivateKey: shown.key}, nil
	}}
	if change != nil {
		change(config)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.listener = &countingListener{Listener: tcp}
	server := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.requests.Add(1)
		handler(rw, r)
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(tls.NewListener(w.listener, config)) })
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		serving.Wait()
	})
	if w.uri, err = est.ParseURI("https://" + tcp.Addr().String()); err != nil {
		t.Fatal(err)
	}
	return w
}

func loopback(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} }

func tls12(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }

func (w *world) config() https.Config {
	return https.Config{
		URI: w.uri, Certificate: [][]byte{w.client.cert.Raw}, Key: w.key, Trust: w.trust, Now: func() time.Time { return epoch },
		Proxy: func(*http.Request) (*url.URL, error) { return nil, nil }, HandshakeTimeout: 20 * time.Second, ExchangeTimeout: 20 * time.Second,
	}
}

func (w *world) dial(t *testing.T, change func(*https.Config)) *https.Session {
	t.Helper()
	cfg := w.config()
	if change != nil {
		change(&cfg)
	}
	session, err := https.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = session.Close() }) // its server may have been faster
	return session
}

// answering answers with a Content-Type and base64.
func answering(contentType string, der []byte) http.HandlerFunc {
	return func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", contentType)
		_, _ = io.WriteString(rw, base64.StdEncoding.EncodeToString(der))
	}
}

func ask(t *testing.T, session est.Session, operation est.Operation, body []byte) (*est.Response, error) {
	t.Helper()
	return session.RoundTrip(t.Context(), &est.Request{Operation: operation, Body: body})
}
