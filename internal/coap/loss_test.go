package coap_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
	"estenroll/internal/coap/coaptest"
)

// soon is when a lost datagram is sent again: it should not cost a test much.
const soon = 50 * time.Millisecond

// patient does not give up, and asks again after a time.
func patient(cfg coap.Config, after time.Duration) coap.Config {
	cfg.AckTimeout, cfg.FlightInterval = after, after
	cfg.MaxRetransmit = 9
	cfg.ExchangeTimeout = time.Minute
	cfg.HandshakeTimeout = time.Minute
	return cfg
}

// enrol is the traffic of an enrolment, handshake included: GET crts and POST
// sen of RFC 9148, through a proxy with these faults, whose counts before the
// close it returns. The handler must have run once for each.
func enrol(t *testing.T, p *pki, separate bool, after time.Duration, faults coaptest.Faults) coaptest.Counters {
	t.Helper()
	bodies := map[string][]byte{"/crts": vector(t, "crts-response-281.der"), "/sen": vector(t, "sen-response-281.der")}
	csr := vector(t, "sen-request-286.der")
	handled := make(chan string, 100)
	serverConfig, clientConfig := patient(p.serverConfig(), after), patient(p.clientConfig(), after)
	serverConfig.BlockSize, clientConfig.BlockSize = 256, 256
	if separate {
		serverConfig.ProcessingDelay = time.Millisecond
	}
	addr := serve(t, serverConfig, func(_ context.Context, req *coap.Request) *coap.Response {
		handled <- fmt.Sprintf("%v %s %t", req.Method, req.Path, req.Method == codes.GET || bytes.Equal(req.Body, csr))
		if separate {
			<-time.After(20 * time.Millisecond)
		}
		return &coap.Response{Code: codes.Content, ContentFormat: new(uint16(281)), Body: bodies[req.Path]}
	})
	proxy := coaptest.NewProxy(t, addr, faults)
	conn, err := coap.Dial(t.Context(), proxy.Addr(), clientConfig)
	if err != nil {
		t.Error(err)
		return proxy.Counters()
	}
	for _, req := range []*coap.Request{{Method: codes.GET, Path: "/crts"}, {Method: codes.POST, Path: "/sen", Body: csr}} {
		resp, err := conn.Do(t.Context(), req)
		if err != nil {
			t.Errorf("%s: %v", req.Path, err)
		} else if !bytes.Equal(resp.Body, bodies[req.Path]) {
			t.Errorf("%s: %v with %d bytes", req.Path, resp.Code, len(resp.Body))
		}
	}
	counters := proxy.Counters()
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	var got []string
	for range len(handled) {
		got = append(got, <-handled)
	}
	if fmt.Sprint(got) != "[GET /crts true POST /sen true]" {
		t.Errorf("the handler ran for %v", got)
	}
	return counters
}

// Each single datagram, of the handshake too, is lost, doubled or late once.
func TestEachDatagram(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	for kind, separate := range map[string]bool{"piggybacked": false, "separate": true} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			// Unhurried, so that nothing is sent twice: a point too many would never be hit.
			counters := enrol(t, p, separate, 10*time.Second, coaptest.Faults{})
			total := counters.ToServer.Datagrams + counters.ToClient.Datagrams
			if total < 16 {
				t.Fatalf("only %d datagrams", total)
			}
			for name, action := range map[string]coaptest.Action{"lost": coaptest.Drop, "doubled": coaptest.Twice, "late": coaptest.Late} {
				t.Run(name, func(t *testing.T) {
					for n := 1; n <= total; n++ {
						t.Run(fmt.Sprint(n), func(t *testing.T) {
							t.Parallel()
							// On a busy machine a separate response may come in the ACK for
							// once, and be two datagrams less. The last ACK may be under way
							// still when the datagrams are counted.
							for range 3 {
								c := enrol(t, p, separate, soon, coaptest.Faults{Hook: func(d coaptest.Datagram) coaptest.Action {
									if d.Number == n {
										return action
									}
									return coaptest.Pass
								}})
								if c.Lost+c.Duplicated+c.Delayed == 1 || n == total {
									return
								}
							}
							t.Errorf("there was no datagram %d", n)
						})
					}
				})
			}
		})
	}
}

// A network that loses 10 %, doubles 10 % and reorders 10 %, by a seed.
func TestLossyNetwork(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	for seed := uint64(1); seed <= 12; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			t.Logf("%+v", enrol(t, p, seed%2 == 0, soon, coaptest.Faults{Seed: seed, Loss: 0.1, Duplicate: 0.1, Reorder: 0.1}))
		})
	}
}

// Small blocks through the same network: hundreds of exchanges on one
// connection, the handler once for each request.
func TestLossySmallBlocks(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	serverConfig, clientConfig := patient(p.serverConfig(), soon), patient(p.clientConfig(), soon)
	serverConfig.BlockSize, clientConfig.BlockSize = 16, 16
	handled := make(chan bool, 100)
	addr := serve(t, serverConfig, func(ctx context.Context, req *coap.Request) *coap.Response {
		handled <- true
		return echo(ctx, req)
	})
	proxy := coaptest.NewProxy(t, addr, coaptest.Faults{Seed: 7, Loss: 0.1, Duplicate: 0.1, Reorder: 0.1})
	conn := dial(t, proxy.Addr(), clientConfig)
	for i := range 5 {
		body := numbers(300 + i)
		resp, err := conn.Do(t.Context(), &coap.Request{Method: codes.POST, Path: "/x", Body: body})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(resp.Body, body) {
			t.Errorf("request %d: %v with %d bytes", i, resp.Code, len(resp.Body))
		}
	}
	if len(handled) != 5 {
		t.Errorf("the handler ran %d times for 5 requests", len(handled))
	}
	if c := proxy.Counters(); c.Lost == 0 || c.Duplicated == 0 || c.Delayed == 0 {
		t.Errorf("the network was kind: %+v", c)
	}
}

// A peer that vanishes is given up after the last retransmission, not later.
func TestVanishedPeer(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	cut := make(chan struct{})
	proxy := coaptest.NewProxy(t, serve(t, p.serverConfig(), echo), coaptest.Faults{Hook: func(coaptest.Datagram) coaptest.Action {
		select {
		case <-cut:
			return coaptest.Drop
		default:
			return coaptest.Pass
		}
	}})
	cfg := p.clientConfig()
	cfg.AckTimeout, cfg.MaxRetransmit = 20*time.Millisecond, 2
	conn := dial(t, proxy.Addr(), cfg)
	if _, err := conn.Do(t.Context(), get); err != nil {
		t.Fatal(err)
	}
	close(cut)
	start := time.Now()
	if _, err := conn.Do(t.Context(), get); !isTimeout(err) {
		t.Errorf("got %v", err)
	}
	if waited := time.Since(start); waited > 10*time.Second {
		t.Errorf("given up after %v", waited)
	}
}
