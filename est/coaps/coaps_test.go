package coaps_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math"
	"math/big"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/internal/coap"
	"estenroll/internal/coap/coaptest"
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

// opaque is a signer that is nothing else, as an HSM's is.
type opaque struct{ crypto.Signer }

// world is a CA, a client and a server that answers with a handler.
type world struct {
	ca     *party
	trust  *est.TrustAnchors
	client *party
	uri    est.URI
	stop   func() // ends the server
}

func newWorld(t *testing.T, verifyClient func([]*x509.Certificate) error, handler coap.Handler) *world {
	t.Helper()
	ca := newParty(t, nil, "ca", func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })
	trust, err := est.NewTrustAnchors([]*x509.Certificate{ca.cert})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{ca: ca, trust: trust, client: newParty(t, ca, "client", nil)}
	w.uri, w.stop = w.serve(t, coap.Config{Verify: verifyClient}, handler, net.IPv4(127, 0, 0, 1))
	return w
}

// serve starts a server under the world's CA at the first of the addresses that its
// certificate is for, and returns its URI and what ends it.
func (w *world) serve(t *testing.T, cfg coap.Config, handler coap.Handler, addresses ...net.IP) (est.URI, func()) {
	t.Helper()
	return w.serveAt(t, net.JoinHostPort(addresses[0].String(), "0"), cfg, handler, addresses...)
}

// serveAt is serve at another address.
func (w *world) serveAt(t *testing.T, at string, cfg coap.Config, handler coap.Handler, addresses ...net.IP) (est.URI, func()) {
	t.Helper()
	server := newParty(t, w.ca, "server", func(c *x509.Certificate) { c.IPAddresses = addresses })
	if cfg.Verify == nil {
		cfg.Verify = func([]*x509.Certificate) error { return nil }
	}
	cfg.Certificate, cfg.Key, cfg.AckTimeout = [][]byte{server.cert.Raw}, server.key, 100*time.Millisecond
	listening, err := coap.Listen(at, cfg)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- listening.Serve(handler) }()
	stop := sync.OnceFunc(func() {
		if err := listening.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
	t.Cleanup(stop)
	uri, err := est.ParseURI("coaps://" + listening.Addr().String() + "/est")
	if err != nil {
		t.Fatal(err)
	}
	return uri, stop
}

func (w *world) config() coaps.Config {
	return coaps.Config{
		URI: w.uri, Certificate: [][]byte{w.client.cert.Raw}, Key: opaque{w.client.key}, Trust: w.trust, Now: func() time.Time { return epoch },
		AckTimeout: 100 * time.Millisecond, FlightInterval: 100 * time.Millisecond, HandshakeTimeout: 10 * time.Second,
	}
}

func (w *world) dial(t *testing.T) *coaps.Session {
	t.Helper()
	session, err := coaps.Dial(t.Context(), w.config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := session.Close(); err != nil {
			t.Error(err)
		}
	})
	return session
}

func number(n uint16) *uint16  { return &n }
func seconds(n uint32) *uint32 { return &n }

func TestRoundTrip(t *testing.T) {
	t.Attr("shows", "RFC 9148 §4.1 (1)")
	t.Attr("shows", "RFC 9148 §4.3 (1)")
	requests := make(chan *coap.Request, 1)
	body := bytes.Repeat([]byte("x"), 3000)
	w := newWorld(t, nil, func(_ context.Context, req *coap.Request) *coap.Response {
		requests <- req
		return &coap.Response{Code: codes.Changed, ContentFormat: number(281), Body: body}
	})
	session := w.dial(t)
	if !session.ClientAuthenticated() {
		t.Error("the server asked for a certificate and ours was sent")
	}
	if chain := session.PeerChain(); len(chain) != 1 || chain[0].Subject.CommonName != "server" {
		t.Errorf("PeerChain: got %v", chain)
	}
	binding, err := session.ChannelBinding()
	if err != nil || len(binding) != 12 {
		t.Errorf("ChannelBinding: got %x, %v", binding, err)
	}
	csr := bytes.Repeat([]byte("y"), 2000)
	for _, c := range []struct {
		operation est.Operation
		path      string
		method    codes.Code
		format    *uint16
		body      []byte
	}{
		{est.CACerts, "/est/crts", codes.GET, nil, nil},
		{est.SimpleEnroll, "/est/sen", codes.POST, number(286), csr},
		{est.SimpleReenroll, "/est/sren", codes.POST, number(286), csr},
	} {
		response, err := session.RoundTrip(t.Context(), &est.Request{Operation: c.operation, Body: c.body})
		if err != nil {
			t.Fatal(err)
		}
		if response.ContentFormat != est.ContentFormatPKCS7CertsOnly || !bytes.Equal(response.Body, body) {
			t.Errorf("%s: got %d bytes of %d", c.operation, len(response.Body), response.ContentFormat)
		}
		if got := <-requests; got.Path != c.path || got.Method != c.method || !cmp.Equal(got.ContentFormat, c.format) || !cmp.Equal(got.Accept, number(281)) || !bytes.Equal(got.Body, c.body) {
			t.Errorf("%s: the server got %v %s, format %v, accept %v, %d bytes", c.operation, got.Method, got.Path, got.ContentFormat, got.Accept, len(got.Body))
		}
	}
	if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: "nonsense"}); err == nil {
		t.Error("an unknown operation was sent")
	}
}

func TestAnswers(t *testing.T) {
	var answer atomic.Pointer[coap.Response]
	w := newWorld(t, nil, func(context.Context, *coap.Request) *coap.Response { return answer.Load() })
	session := w.dial(t)
	for _, c := range []struct {
		name   string
		answer coap.Response
		want   error
	}{
		{"5.03 with Max-Age", coap.Response{Code: codes.ServiceUnavailable, MaxAge: seconds(7)},
			&est.PendingError{Operation: est.SimpleEnroll, Server: w.uri.String() + "/sen", RetryAfter: 7 * time.Second}},
		{"5.03 without", coap.Response{Code: codes.ServiceUnavailable},
			&est.PendingError{Operation: est.SimpleEnroll, Server: w.uri.String() + "/sen", RetryAfter: time.Minute}},
		{"4.03", coap.Response{Code: codes.Forbidden, Body: []byte("revoked\x07")},
			&est.StatusError{Operation: est.SimpleEnroll, Server: w.uri.String() + "/sen", Code: "4.03 Forbidden", Class: 4, Detail: "revoked."}},
		{"4.01", coap.Response{Code: codes.Unauthorized},
			&est.StatusError{Operation: est.SimpleEnroll, Server: w.uri.String() + "/sen", Code: "4.01 Unauthorized", Class: 4, Unauthorized: true}},
		{"5.00", coap.Response{Code: codes.InternalServerError},
			&est.StatusError{Operation: est.SimpleEnroll, Server: w.uri.String() + "/sen", Code: "5.00 InternalServerError", Class: 5}},
	} {
		t.Run(c.name, func(t *testing.T) {
			answer.Store(&c.answer)
			_, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll})
			if diff := cmp.Diff(c.want, err); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
	t.Run("5.03 for 136 years", func(t *testing.T) {
		answer.Store(&coap.Response{Code: codes.ServiceUnavailable, MaxAge: seconds(math.MaxUint32)})
		var pending *est.PendingError
		_, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll})
		if !errors.As(err, &pending) || pending.RetryAfter != est.MaxRetryAfter || pending.Asked != math.MaxUint32*time.Second {
			t.Errorf("got %v", err)
		}
	})
	t.Run("4.01 is a refusal of the credential", func(t *testing.T) {
		answer.Store(&coap.Response{Code: codes.Unauthorized})
		if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.CACerts}); !errors.Is(err, est.ErrCredentialRefused) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("any success with a format", func(t *testing.T) {
		for _, code := range []codes.Code{codes.Created, codes.Changed, codes.Content} {
			answer.Store(&coap.Response{Code: code, ContentFormat: number(287), Body: []byte("x")})
			got, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll})
			if diff := cmp.Diff(&est.Response{ContentFormat: est.ContentFormatPKIXCert, Body: []byte("x")}, got); err != nil || diff != "" {
				t.Errorf("%s: %v (-want +got)\n%s", code, err, diff)
			}
		}
	})
	t.Run("a format that is not asked for", func(t *testing.T) {
		answer.Store(&coap.Response{Code: codes.Content, ContentFormat: number(0), Body: []byte("hello")})
		var response *est.ResponseError
		if _, err := (&est.Client{Session: session}).CACerts(t.Context()); !errors.As(err, &response) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no content-format", func(t *testing.T) {
		answer.Store(&coap.Response{Code: codes.Content, Body: []byte("x")})
		var response *est.ResponseError
		if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.CACerts}); !errors.As(err, &response) {
			t.Errorf("got %v", err)
		}
	})
}

// The server that is not the right one is refused with its own error, and what
// the server thinks of our certificate is told apart from silence.
func TestDialRefused(t *testing.T) {
	t.Attr("shows", "RFC 9148 §3 (3)")
	answer := func(context.Context, *coap.Request) *coap.Response { return &coap.Response{Code: codes.Content} }
	open := newWorld(t, nil, answer)
	closed := newWorld(t, func([]*x509.Certificate) error { return errors.New("revoked") }, answer)
	other := newWorld(t, nil, answer)
	for _, c := range []struct {
		name   string
		world  *world
		change func(*coaps.Config)
		want   error
	}{
		{"our certificate is refused", closed, func(*coaps.Config) {}, est.ErrCredentialRefused},
		{"another CA", open, func(c *coaps.Config) { c.Trust = other.trust }, est.ErrNotTrusted},
		{"another name", open, func(c *coaps.Config) { c.URI.Host = "localhost" }, est.ErrNotTrusted},
		{"no trust anchors", open, func(c *coaps.Config) { c.Trust = nil }, est.ErrNotTrusted},
		{"the key of another", open, func(c *coaps.Config) { c.Key = other.client.key }, est.ErrKeyMismatch},
		{"a key that cannot sign", open, func(c *coaps.Config) { c.Key = broken{c.Key} }, errToken},
		{"expired", open, func(c *coaps.Config) { c.Now = func() time.Time { return epoch.Add(2 * time.Hour) } }, est.ErrNotValidNow},
		{"not yet valid", open, func(c *coaps.Config) { c.Now = func() time.Time { return time.Unix(0, 0) } }, est.ErrNotValidNow},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := c.world.config()
			c.change(&cfg)
			session, err := coaps.Dial(t.Context(), cfg)
			if err == nil {
				_ = session.Close()
			}
			if !errors.Is(err, c.want) || errors.Is(err, est.ErrUnreachable) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestDialWithoutCredential(t *testing.T) {
	t.Attr("shows", "RFC 9148 §4 (1)")
	w := newWorld(t, nil, func(context.Context, *coap.Request) *coap.Response { return &coap.Response{Code: codes.Content} })
	for name, change := range map[string]func(*coaps.Config){
		"no key":         func(c *coaps.Config) { c.Key = nil },
		"no certificate": func(c *coaps.Config) { c.Certificate = nil },
		"not one":        func(c *coaps.Config) { c.Certificate = [][]byte{{0x30, 0x00}} },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := w.config()
			change(&cfg)
			if session, err := coaps.Dial(t.Context(), cfg); err == nil {
				_ = session.Close()
				t.Error("a session without a credential")
			}
		})
	}
}

var errToken = errors.New("token is on fire")

type broken struct{ crypto.Signer }

func (broken) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errToken }

// An open session that loses its server, or its caller.
func TestRoundTripUnanswered(t *testing.T) {
	open := func(t *testing.T) (session *coaps.Session, asked chan struct{}, stop func()) {
		t.Helper()
		asked = make(chan struct{}, 1)
		ended := make(chan struct{})
		w := newWorld(t, nil, func(context.Context, *coap.Request) *coap.Response {
			asked <- struct{}{}
			<-ended
			return nil
		})
		t.Cleanup(func() { close(ended) })
		return w.dial(t), asked, w.stop
	}
	request := &est.Request{Operation: est.CACerts}
	t.Run("a deadline", func(t *testing.T) {
		session, _, _ := open(t)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_, err := session.RoundTrip(ctx, request)
		if !errors.Is(err, est.ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want ErrUnreachable and the deadline", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		session, asked, _ := open(t)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-asked; cancel() }()
		_, err := session.RoundTrip(ctx, request)
		if !errors.Is(err, context.Canceled) || errors.Is(err, est.ErrUnreachable) {
			t.Errorf("got %v, want context.Canceled", err)
		}
	})
	t.Run("the server ends", func(t *testing.T) {
		session, asked, stop := open(t)
		go func() { <-asked; stop() }()
		if _, err := session.RoundTrip(t.Context(), request); !errors.Is(err, est.ErrUnreachable) {
			t.Errorf("got %v, want ErrUnreachable", err)
		}
	})
}

func TestDialUnreachable(t *testing.T) {
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	gone, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, nil, func(context.Context, *coap.Request) *coap.Response { return &coap.Response{Code: codes.Content} })
	// It passes the server's first flight, a HelloVerifyRequest.
	cut := coaptest.NewProxy(t, w.config().URI.Address(), coaptest.Faults{Hook: func(d coaptest.Datagram) coaptest.Action {
		if d.Direction == coaptest.ToClient && d.Number > 2 {
			return coaptest.Drop
		}
		return coaptest.Pass
	}})
	const fallsSilent = "a server that falls silent"
	for name, address := range map[string]string{"silence": silent.LocalAddr().String(), "a refused port": gone.LocalAddr().String(), fallsSilent: cut.Addr()} {
		t.Run(name, func(t *testing.T) {
			cfg := w.config()
			cfg.URI.Port = port(t, address)
			cfg.HandshakeTimeout = 300 * time.Millisecond
			_, err := coaps.Dial(t.Context(), cfg)
			if !errors.Is(err, est.ErrUnreachable) {
				t.Errorf("got %v, want ErrUnreachable", err)
			}
			if errors.Is(err, est.ErrFellSilent) != (name == fallsSilent) {
				t.Errorf("it answered at first: %v", err)
			}
		})
	}
	t.Run("a name that nobody has", func(t *testing.T) {
		cfg := w.config()
		cfg.URI.Host = "nobody.invalid"
		if _, err := coaps.Dial(t.Context(), cfg); !errors.Is(err, est.ErrUnreachable) {
			t.Errorf("got %v, want ErrUnreachable", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := coaps.Dial(ctx, w.config()); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want context.Canceled", err)
		}
	})
}

func port(t *testing.T, address string) uint16 {
	t.Helper()
	n, err := strconv.ParseUint(address[strings.LastIndex(address, ":")+1:], 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(n)
}
