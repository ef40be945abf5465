package coap_test

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
)

// Of a host's addresses the first that answers counts: one whose port is closed costs no
// time, a silent one its share. One that answers, and refuses, ends it.
func TestAddresses(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	answer := func(context.Context, *coap.Request) *coap.Response { return &coap.Response{Code: codes.Content} }
	addr := serve(t, p.serverConfig(), answer)
	refusing := p.serverConfig()
	refusing.Verify = func([]*x509.Certificate) error { return errors.New("revoked") }
	refuses := serve(t, refusing, answer)
	silent, err := net.ListenPacket("udp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	closed := net.JoinHostPort("::1", port) // the server has the port at 127.0.0.1 alone
	for name, c := range map[string]struct {
		addresses []string
		connects  bool
	}{
		"a closed port":      {[]string{closed, addr}, true},
		"a silent one":       {[]string{silent.LocalAddr().String(), addr}, true},
		"the last is closed": {[]string{closed, closed}, false},
		"one that refuses":   {[]string{refuses, addr}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := p.clientConfig()
			cfg.HandshakeTimeout = 4 * time.Second
			conn, err := coap.DialEach(t.Context(), "localhost:5684", c.addresses, cfg)
			if conn != nil {
				defer conn.Close()
			}
			var handshake *coap.HandshakeError
			if (err == nil) != c.connects || err != nil && (!errors.As(err, &handshake) || handshake.Addr != "localhost:5684") {
				t.Errorf("got %v", err)
			}
		})
	}
}
