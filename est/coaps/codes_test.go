package coaps_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/internal/coap"
)

// What each code of an answer means to EST (RFC 9148 §4.5, RFC 7252 §5.9, RFC 7959 §2.9,
// RFC 8516 §3), with a text for a person or without: whether it is the request that is
// refused, the certificate, or the moment.
func TestResponseCodes(t *testing.T) {
	answers := make(chan coap.Response, 1)
	w := newWorld(t, nil, func(context.Context, *coap.Request) *coap.Response { answer := <-answers; return &answer })
	session := w.dial(t)
	type meaning struct{ temporary, refused, notFound bool }
	for code, want := range map[codes.Code]struct {
		text string
		meaning
	}{
		codes.BadRequest:              {"4.00 BadRequest", meaning{}},
		codes.Unauthorized:            {"4.01 Unauthorized", meaning{refused: true}},
		codes.Forbidden:               {"4.03 Forbidden", meaning{}},
		codes.NotFound:                {"4.04 NotFound", meaning{notFound: true}},
		codes.MethodNotAllowed:        {"4.05 MethodNotAllowed", meaning{}},
		codes.RequestEntityIncomplete: {"4.08", meaning{}},
		codes.PreconditionFailed:      {"4.12 PreconditionFailed", meaning{}},
		codes.RequestEntityTooLarge:   {"4.13 RequestEntityTooLarge", meaning{}},
		codes.UnsupportedMediaType:    {"4.15 UnsupportedMediaType", meaning{}},
		codes.InternalServerError:     {"5.00 InternalServerError", meaning{temporary: true}},
		codes.NotImplemented:          {"5.01 NotImplemented", meaning{temporary: true}},
		codes.BadGateway:              {"5.02 BadGateway", meaning{temporary: true}},
		codes.GatewayTimeout:          {"5.04 GatewayTimeout", meaning{temporary: true}},
		codes.ProxyingNotSupported:    {"5.05 ProxyingNotSupported", meaning{temporary: true}},
	} {
		for _, detail := range []string{"", "ask \x1bthe CA"} {
			answers <- coap.Response{Code: code, Body: []byte(detail)}
			_, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll, Body: []byte("csr")})
			var status *est.StatusError
			if !errors.As(err, &status) {
				t.Errorf("%s: got %v", want.text, err)
				continue
			}
			got := meaning{temporary: status.Temporary(), refused: errors.Is(err, est.ErrCredentialRefused), notFound: status.NotFound}
			text := fmt.Sprintf("simpleenroll at %s/sen: %s", w.uri, want.text)
			if detail != "" {
				text += `: "ask .the CA"`
			}
			if got != want.meaning || err.Error() != text || errors.Is(err, est.ErrUnreachable) {
				t.Errorf("got %+v of %q, want %+v of %q", got, err, want.meaning, text)
			}
		}
	}
	for _, code := range []codes.Code{codes.ServiceUnavailable, codes.TooManyRequests} {
		answers <- coap.Response{Code: code, MaxAge: seconds(7), Body: []byte("come again")}
		_, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll, Body: []byte("csr")})
		want := &est.PendingError{Operation: est.SimpleEnroll, Server: w.uri.String() + "/sen", RetryAfter: 7 * time.Second, Detail: "come again"}
		if diff := cmp.Diff(error(want), err); diff != "" {
			t.Errorf("%s (-want +got)\n%s", code, diff)
		}
	}
}

// A client asks for 281 and takes 287 as well (RFC 9148 §4.3): whichever of the two the
// server has, in whichever it answers, and of a server that does not know Accept. What is
// asked otherwise was answered by nothing before; a server with neither is asked no more.
func TestContentFormats(t *testing.T) {
	certificate := newParty(t, nil, "issued", nil).cert
	certsOnly, err := est.MarshalCertsOnly([]*x509.Certificate{certificate})
	if err != nil {
		t.Fatal(err)
	}
	bodies := map[uint16][]byte{281: certsOnly, 287: certificate.Raw}
	for _, c := range []struct {
		name   string
		offers func(accept *uint16) (format uint16, code codes.Code) // code 0 is an answer
		want   []string                                              // the Accept of each request
		fails  string
	}{
		{"both", func(accept *uint16) (uint16, codes.Code) { return *accept, 0 }, []string{"281"}, ""},
		{"281 alone", only(281), []string{"281"}, ""},
		{"287 alone", only(287), []string{"281", "287"}, ""},
		{"287, whatever is asked for", func(*uint16) (uint16, codes.Code) { return 287, 0 }, []string{"281"}, ""},
		{"no Accept, and 281", ignorant(281), []string{"281", "none"}, ""},
		{"no Accept, and 287", ignorant(287), []string{"281", "none"}, ""},
		{"neither", func(*uint16) (uint16, codes.Code) { return 0, codes.NotAcceptable }, []string{"281", "287"}, "4.06 NotAcceptable"},
		{"bad options", func(*uint16) (uint16, codes.Code) { return 0, codes.BadOption }, []string{"281", "none"}, "4.02 BadOption"},
	} {
		t.Run(c.name, func(t *testing.T) {
			asked := make(chan string, 10)
			w := newWorld(t, nil, func(_ context.Context, req *coap.Request) *coap.Response {
				if req.Accept == nil {
					asked <- "none"
				} else {
					asked <- fmt.Sprint(*req.Accept)
				}
				format, code := c.offers(req.Accept)
				if code != 0 {
					return &coap.Response{Code: code}
				}
				return &coap.Response{Code: codes.Content, ContentFormat: &format, Body: bodies[format]}
			})
			client := est.Client{Session: w.dial(t)}
			for name, ask := range map[string]func() ([]*x509.Certificate, error){
				"crts": func() ([]*x509.Certificate, error) { return client.CACerts(t.Context()) },
				"sen":  func() ([]*x509.Certificate, error) { return client.SimpleEnroll(t.Context(), []byte("csr")) },
			} {
				certs, err := ask()
				if c.fails == "" && (err != nil || len(certs) != 1 || !certs[0].Equal(certificate)) {
					t.Errorf("%s: got %d certificates, %v", name, len(certs), err)
				}
				if c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
					t.Errorf("%s: got %v, want %s", name, err, c.fails)
				}
				var accepts []string
				for len(asked) > 0 {
					accepts = append(accepts, <-asked)
				}
				if diff := cmp.Diff(c.want, accepts); diff != "" {
					t.Errorf("%s (-want +got)\n%s", name, diff)
				}
			}
		})
	}
}

func only(format uint16) func(*uint16) (uint16, codes.Code) {
	return func(accept *uint16) (uint16, codes.Code) {
		if *accept != format {
			return 0, codes.NotAcceptable
		}
		return format, 0
	}
}

// ignorant servers refuse Accept, which is a critical option (RFC 7252 §5.4.1).
func ignorant(format uint16) func(*uint16) (uint16, codes.Code) {
	return func(accept *uint16) (uint16, codes.Code) {
		if accept != nil {
			return 0, codes.BadOption
		}
		return format, 0
	}
}

// Crts, att, sen, sren and skg together cost one handshake, of one signature of the
// client's key (RFC 9148 §3).
func TestOneSession(t *testing.T) {
	var handshakes atomic.Int32
	w := newWorld(t, func([]*x509.Certificate) error { handshakes.Add(1); return nil },
		func(context.Context, *coap.Request) *coap.Response {
			return &coap.Response{Code: codes.Content, ContentFormat: number(281), Body: []byte("x")}
		})
	key := &counting{Signer: w.client.key}
	cfg := w.config()
	cfg.Key = key
	session, err := coaps.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	for _, operation := range []est.Operation{est.CACerts, est.CSRAttrs, est.SimpleEnroll, est.SimpleReenroll, est.ServerKeyGen} {
		if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: operation}); err != nil {
			t.Fatal(err)
		}
	}
	if handshakes, signatures := handshakes.Load(), key.signatures.Load(); handshakes != 1 || signatures != 1 {
		t.Errorf("got %d handshakes and %d signatures, want one of each", handshakes, signatures)
	}
}

// counting is a signer that knows how often it has signed.
type counting struct {
	crypto.Signer
	signatures atomic.Int32
}

func (c *counting) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	c.signatures.Add(1)
	return c.Signer.Sign(rand, digest, opts)
}

// A server at an IPv6 address is held to it by its IP SAN, without SNI (RFC 6066 §3).
func TestIPv6(t *testing.T) {
	handler := func(context.Context, *coap.Request) *coap.Response {
		return &coap.Response{Code: codes.Content, ContentFormat: number(281)}
	}
	w := newWorld(t, nil, handler)
	for _, c := range []struct {
		name     string
		presents []net.IP
		want     error
	}{
		{"its address", []net.IP{net.IPv6loopback}, nil},
		{"another address", []net.IP{net.ParseIP("2001:db8::1")}, est.ErrServerCertificate},
		{"an IPv4 address", []net.IP{net.IPv4(127, 0, 0, 1)}, est.ErrServerCertificate},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := w.config()
			cfg.URI, _ = w.serveAt(t, "[::1]:0", coap.Config{}, handler, c.presents...)
			if name := cfg.URI.ServerName(); name != "" {
				t.Errorf("SNI %q", name)
			}
			session, err := coaps.Dial(t.Context(), cfg)
			if err == nil {
				defer session.Close()
				_, err = session.RoundTrip(t.Context(), &est.Request{Operation: est.CACerts})
			}
			if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

// A session by a pre-shared key asks for all but what certificates are for, has no
// certificate of the server's, and is led to no other server. What is wrong with the key
// shows as silence or as an alert.
func TestPSK(t *testing.T) {
	h := &host{discovery: links(`<coaps://127.0.0.1:1/crts>;rt=ace.est.crts,</s>;rt=ace.est.sen,</r>;rt=ace.est.sren`)}
	w := newWorld(t, nil, h.handle)
	const key = "0123456789abcdef"
	uri, _ := w.serve(t, coap.Config{PSKs: func(identity string) ([]byte, bool) { return []byte(key), identity == "dev-17" }}, h.handle, net.IPv4(127, 0, 0, 1))
	uri.Root = est.DefaultRoot
	config := func(identity, key string) coaps.Config {
		cfg := w.config()
		cfg.URI, cfg.Certificate, cfg.Key, cfg.Trust = uri, nil, nil, est.NoTrustAnchors()
		cfg.PSKIdentity, cfg.PSK = identity, func() ([]byte, error) { return []byte(key), nil }
		cfg.HandshakeTimeout = time.Second
		return cfg
	}
	var warnings []string
	cfg := config("dev-17", key)
	cfg.Discovery, cfg.Warn = true, func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) }
	session, err := coaps.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	h.requests()
	for _, operation := range []est.Operation{est.CACerts, est.SimpleEnroll} {
		if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: operation}); err != nil {
			t.Errorf("%s: %v", operation, err)
		}
	}
	if diff := cmp.Diff([]string{"GET /.well-known/est/crts 281", "POST /s 281"}, h.requests()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if len(warnings) != 2 || !strings.Contains(warnings[0], `"coaps://127.0.0.1:1/crts" (another host or port)`) {
		t.Errorf("warnings %q", warnings)
	}
	if len(session.PeerChain()) != 0 || !session.ClientAuthenticated() {
		t.Errorf("peer %v, authenticated %t", session.PeerChain(), session.ClientAuthenticated())
	}
	if _, err := coaps.Dial(t.Context(), config("dev-17", key+"x")); !errors.Is(err, est.ErrPSKUnanswered) || !errors.Is(err, est.ErrUnreachable) {
		t.Errorf("another key: %v", err)
	}
	if _, err := coaps.Dial(t.Context(), config("dev-18", key)); !errors.Is(err, est.ErrPSKRefused) || errors.Is(err, est.ErrUnreachable) || errors.Is(err, est.ErrCredentialRefused) {
		t.Errorf("another identity: %v", err)
	}
}
