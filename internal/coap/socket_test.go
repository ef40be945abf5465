package coap_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/pion/dtls/v3"

	"estenroll/internal/coap"
)

// clientAt is a client of a socket that the test can take away from it.
func (p *pki) clientAt(t *testing.T, socket net.PacketConn, server net.Addr) (*coap.Conn, error) {
	t.Helper()
	conn, err := dtls.ClientWithOptions(socket, server,
		dtls.WithCertificates(tls.Certificate{Certificate: p.client.chain, PrivateKey: p.client.key}),
		dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8),
		dtls.WithExtendedMasterSecret(dtls.RequireExtendedMasterSecret),
		dtls.WithInsecureSkipVerify(true),
	)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	cfg := p.clientConfig()
	cfg.ExchangeTimeout = 5 * time.Second
	client, err := coap.NewClient(conn, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() }) // its socket may be closed
	return client, nil
}

func bind(t *testing.T, addr *net.UDPAddr) *net.UDPConn {
	t.Helper()
	socket, err := net.ListenUDP("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := socket.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	return socket
}

// RFC 6347 §4.2.8: a client that was killed has not closed its association. The
// next client on its address gets one, and then the old one is over.
func TestClientAfterAKilledOne(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	waiting, ended := make(chan struct{}, 1), make(chan struct{}, 1)
	addr := serve(t, p.serverConfig(), func(ctx context.Context, req *coap.Request) *coap.Response {
		if req.Path == "/wait" {
			waiting <- struct{}{}
			<-ctx.Done()
			ended <- struct{}{}
		}
		return echo(ctx, req)
	})
	server, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, killed := range []string{"in the handshake", "after the hello", "after an exchange"} {
		socket := bind(t, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		switch killed {
		case "in the handshake":
			silent := &hellosOnly{UDPConn: socket}
			conn, err := dtls.ClientWithOptions(silent, server, dtls.WithInsecureSkipVerify(true),
				dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			if err := conn.HandshakeContext(ctx); err == nil {
				t.Error("a handshake of two hellos")
			}
			cancel()
		case "after the hello":
			_, err := socket.WriteTo(firstDatagram(t, "localhost", nil), server)
			if err == nil {
				// The HelloVerifyRequest would be the next client's, and its cookie wrong there.
				_, _, err = socket.ReadFrom(make([]byte, 100))
			}
			if err != nil {
				t.Fatal(err)
			}
		case "after an exchange":
			client, err := p.clientAt(t, socket, server)
			if err != nil {
				t.Fatalf("after the hello: %v", err)
			}
			if _, err := client.Do(t.Context(), get); err != nil {
				t.Error(err)
			}
			do(t.Context(), client, &coap.Request{Method: get.Method, Path: "/wait"})
			<-waiting
		}
		_ = socket.Close()
		socket = bind(t, socket.LocalAddr().(*net.UDPAddr))
		client, err := p.clientAt(t, socket, server)
		if err != nil {
			t.Fatalf("killed %s: %v", killed, err)
		}
		if _, err := client.Do(t.Context(), get); err != nil {
			t.Errorf("killed %s: %v", killed, err)
		}
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the old association goes on")
	}
}

// hellosOnly is the socket of a client that is killed in its handshake.
type hellosOnly struct{ *net.UDPConn }

func (h *hellosOnly) WriteTo(p []byte, addr net.Addr) (int, error) {
	if _, isHello := coap.HelloRandom(p); !isHello {
		return len(p), nil
	}
	return h.UDPConn.WriteTo(p, addr)
}

// A hello with a forged sender does not return the cookie, and changes nothing.
func TestForgedHello(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	addr := serve(t, p.serverConfig(), echo)
	server, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	socket := bind(t, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	client, err := p.clientAt(t, socket, server)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := socket.WriteTo(firstDatagram(t, "localhost", nil), server); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Do(t.Context(), get); err != nil {
			t.Error(err)
		}
	}
}
