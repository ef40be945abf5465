package coap_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
)

// pskText is a pre-shared key, which libcoap's programs take as it is.
const pskText = "marker-0123456789abcdef"

// pskConfig is a client's with a pre-shared key; each use gets a copy, which the other
// end must clear.
func (p *pki) pskConfig(identity, key string) coap.Config {
	cfg := p.clientConfig()
	cfg.Certificate, cfg.Key = nil, nil
	cfg.PSKIdentity, cfg.PSK = identity, func() ([]byte, error) { return []byte(key), nil }
	return cfg
}

// pskServerConfig knows one identity beside certificates.
func (p *pki) pskServerConfig() coap.Config {
	cfg := p.serverConfig()
	cfg.PSKs = func(identity string) ([]byte, bool) { return []byte(pskText), identity == "dev-17" }
	return cfg
}

// who answers with the identity or the certificate that a client has shown, and notes
// the channel binding.
func who(bindings chan []byte) coap.Handler {
	return func(_ context.Context, req *coap.Request) *coap.Response {
		bindings <- req.ChannelBinding
		body := req.PSKIdentity
		if len(req.Peer) > 0 {
			body += req.Peer[0].Subject.CommonName
		}
		return &coap.Response{Code: codes.Content, Body: []byte(body)}
	}
}

// One door takes a pre-shared key and a certificate. A session by a key has no
// certificate of either end, and the binding of both ends.
func TestPSK(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	bindings := make(chan []byte, 1)
	addr := serve(t, p.pskServerConfig(), who(bindings))
	var given []byte
	byKey := p.pskConfig("dev-17", "")
	byKey.PSK = func() ([]byte, error) { given = []byte(pskText); return given, nil }
	for want, cfg := range map[string]coap.Config{"dev-17": byKey, "device": p.clientConfig()} {
		conn := dial(t, addr, cfg)
		resp, err := conn.Do(t.Context(), &coap.Request{Method: codes.GET, Path: "/x"})
		if err != nil || string(resp.Body) != want {
			t.Errorf("%s: got %v, %v", want, resp, err)
			continue
		}
		binding, err := conn.ChannelBinding()
		if theirs := <-bindings; err != nil || len(binding) != 12 || !bytes.Equal(binding, theirs) {
			t.Errorf("%s: bindings %x and %x, %v", want, binding, theirs, err)
		}
		if certificates := len(conn.PeerCertificates()); !conn.ClientAuthenticated() || (certificates > 0) != (want == "device") {
			t.Errorf("%s: authenticated %t, %d certificates", want, conn.ClientAuthenticated(), certificates)
		}
	}
	if len(given) != len(pskText) || !bytes.Equal(given, make([]byte, len(given))) {
		t.Error("the key was not cleared")
	}
}

// A key or an identity that the server does not have, a server without pre-shared keys,
// and a key that cannot be read: each ends the handshake with its own error, and none has
// the key in it.
func TestPSKRefused(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	errNoKey := errors.New("no such file")
	unreadable := p.pskConfig("dev-17", "")
	unreadable.PSK = func() ([]byte, error) { return nil, errNoKey }
	another := p.pskConfig("dev-17", pskText+"x")
	another.HandshakeTimeout = time.Second
	for name, c := range map[string]struct {
		server, client coap.Config
		alert          bool
		is             error
	}{
		"another key":            {p.pskServerConfig(), another, false, coap.ErrTimeout},
		"another identity":       {p.pskServerConfig(), p.pskConfig("dev-18", pskText), true, nil},
		"no pre-shared keys":     {p.serverConfig(), p.pskConfig("dev-17", pskText), true, nil},
		"a key that is not read": {p.pskServerConfig(), unreadable, false, errNoKey},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := serve(t, c.server, who(make(chan []byte, 1)))
			conn, err := coap.Dial(t.Context(), addr, c.client)
			var handshake *coap.HandshakeError
			if err == nil {
				_ = conn.Close()
			}
			if !errors.As(err, &handshake) || !handshake.Answered || (handshake.Alert != nil) != c.alert || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("got %v", err)
			}
			if err != nil && strings.Contains(fmt.Sprintf("%v %+v %#v", err, err, err), pskText) {
				t.Error("the key is in the error")
			}
		})
	}
	for _, identity := range []string{"", strings.Repeat("x", 129), "\xff"} {
		if _, err := coap.Dial(t.Context(), "127.0.0.1:1", p.pskConfig(identity, pskText)); err == nil || !strings.Contains(err.Error(), "PSK: want an identity") {
			t.Errorf("identity %q: %v", identity, err)
		}
	}
}

// libcoap's servers, of OpenSSL and GnuTLS, take our pre-shared key.
func TestPSKForeignServer(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	for _, name := range []string{"coap-server-openssl", "coap-server-gnutls"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			port := portPair(t)
			server := start(t, name, "-A", "127.0.0.1", "-p", strconv.Itoa(port), "-d", "100", "-k", pskText)
			cfg := p.pskConfig("dev-17", pskText)
			cfg.AckTimeout, cfg.HandshakeTimeout = 2*time.Second, 2*time.Second
			conn := poll(t, server, func() (*coap.Conn, error) {
				return coap.Dial(t.Context(), fmt.Sprintf("127.0.0.1:%d", port+1), cfg)
			})
			resp, err := conn.Do(t.Context(), &coap.Request{Method: codes.GET, Path: "/"})
			if err != nil || resp.Code != codes.Content {
				t.Errorf("got %v, %v", resp, err)
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// OpenSSL's server takes each of our suites and the identity, and its value of the
// channel binding is ours.
func TestPSKOpenSSLServer(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	for _, suite := range []string{"PSK-AES128-CCM8", "PSK-AES128-CCM", "PSK-AES128-GCM-SHA256"} {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			server, addr := sServer(t, p.files(t), "-psk", hex.EncodeToString([]byte(pskText)), "-psk_identity", "dev-17", "-cipher", suite, "-msg")
			conn := dial(t, addr, p.pskConfig("dev-17", pskText))
			got, err := conn.ChannelBinding()
			if err != nil {
				t.Fatal(err)
			}
			want := poll(t, server, func() ([]byte, error) { return firstFinished(server.output.String()) })
			if !bytes.Equal(got, want) {
				t.Errorf("got %x, want %x", got, want)
			}
		})
	}
}

// libcoap's clients are known to our server by their pre-shared keys, and not by another.
func TestPSKForeignClient(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	for _, name := range []string{"coap-client-openssl", "coap-client-gnutls"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := serve(t, p.pskServerConfig(), who(make(chan []byte, 10)))
			received := filepath.Join(t.TempDir(), "received")
			for _, c := range []struct{ identity, key, want string }{{"dev-17", pskText, "dev-17"}, {"dev-18", pskText, ""}} {
				output, err := exec.CommandContext(t.Context(), tool(t, name), "-B", "5", "-m", "get", "-o", received, "-u", c.identity, "-k", c.key, "coaps://"+addr+"/x").CombinedOutput()
				got, readErr := os.ReadFile(received)
				if c.want != "" && (err != nil || readErr != nil) || string(got) != c.want {
					t.Errorf("%s: got %q, %v, %v\n%s", c.identity, got, err, readErr, output)
				}
				_ = os.Remove(received)
			}
		})
	}
}
