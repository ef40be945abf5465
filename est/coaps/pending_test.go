package coaps_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/csr"
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/internal/coap"
	"estenroll/internal/coap/coaptest"
	"estenroll/testserver"
)

// emptyACK is the size of a datagram with an empty ACK: four bytes (RFC 7252 §4.1)
// in a DTLS record of CCM_8, whose header, nonce and tag take 13, 8 and 8. No other
// message to the client is as small.
const emptyACK = 13 + 8 + 4 + 8

// A server that has not decided is asked again with the same bytes, whatever the
// blocks of the request and of both answers, and whether those come in the ACK
// or apart from it (RFC 9148 §4.6, §4.7).
func TestPendingInBlocks(t *testing.T) {
	t.Attr("shows", "RFC 9148 §4.7 (2)")
	body, text := make([]byte, 900), strings.Repeat("an operator must approve this device. ", 20)
	rand.Read(body)
	for _, size := range []int{16, 64} {
		for _, separate := range []bool{false, true} {
			for name, c := range map[string]struct {
				maxAge *uint32
				want   time.Duration
			}{
				"Max-Age 7": {seconds(7), 7 * time.Second},
				"Max-Age 0": {seconds(0), 0},
				"none":      {nil, time.Minute}, // RFC 7252 §5.10.5
			} {
				t.Run(fmt.Sprintf("%d bytes, separate %t, %s", size, separate, name), func(t *testing.T) {
					t.Parallel()
					acked := make(chan struct{}, 100)
					var mu sync.Mutex
					var asked [][]byte
					w := newWorld(t, nil, func(ctx context.Context, req *coap.Request) *coap.Response {
						if separate {
							// Until the client was told that the answer comes later.
							select {
							case <-acked:
							case <-ctx.Done():
							}
						}
						mu.Lock()
						defer mu.Unlock()
						if asked = append(asked, req.Body); len(asked) == 1 {
							return &coap.Response{Code: codes.ServiceUnavailable, MaxAge: c.maxAge, Body: []byte(text)}
						}
						return &coap.Response{Code: codes.Changed, ContentFormat: number(281), Body: body}
					})
					proxy := coaptest.NewProxy(t, w.uri.Address(), coaptest.Faults{Hook: func(d coaptest.Datagram) coaptest.Action {
						if d.Direction == coaptest.ToClient && len(d.Payload) == emptyACK {
							acked <- struct{}{}
						}
						return coaptest.Pass
					}})
					cfg := w.config()
					cfg.BlockSize = size
					uri, err := est.ParseURI("coaps://" + proxy.Addr() + "/est")
					if err != nil {
						t.Fatal(err)
					}
					cfg.URI = uri
					session, err := coaps.Dial(t.Context(), cfg)
					if err != nil {
						t.Fatal(err)
					}
					defer session.Close()
					request := make([]byte, 400)
					rand.Read(request)
					var pending *est.PendingError
					_, err = session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll, Body: request})
					if !errors.As(err, &pending) || pending.RetryAfter != c.want {
						t.Fatalf("got %v, want to wait %s", err, c.want)
					}
					if want := text[:512]; pending.Detail != strings.TrimSpace(want) {
						t.Errorf("detail %q, want %q", pending.Detail, want)
					}
					response, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll, Body: request})
					if err != nil || !bytes.Equal(response.Body, body) {
						t.Fatalf("got %v, %v", response, err)
					}
					mu.Lock()
					defer mu.Unlock()
					if len(asked) != 2 || !bytes.Equal(asked[0], request) || !bytes.Equal(asked[1], request) {
						t.Errorf("the server was asked %d times, or with other bytes", len(asked))
					}
				})
			}
		}
	}
}

// So it is with the bundled server, which issues once, in an answer of its own.
func TestPendingAtBundledServer(t *testing.T) {
	week := 7 * 24 * time.Hour
	for _, size := range []int{16, 64} {
		for name, maxAge := range map[string]*time.Duration{"none": nil, "a week": &week} {
			t.Run(fmt.Sprintf("%d bytes, Max-Age %s", size, name), func(t *testing.T) {
				t.Parallel()
				// While it is armed the clock of the server, which an issuance asks, stands
				// until the client was told that the answer comes later.
				var armed atomic.Bool
				acked, told := make(chan struct{}), sync.Once{}
				server, err := testserver.New(testserver.Config{
					BlockSize: size, AnswerChain: true, ProcessingDelay: time.Millisecond,
					Faults: testserver.Faults{Defer: 1, DeferMaxAge: maxAge, LongDetail: true},
					Now: func() time.Time {
						if armed.Load() {
							<-acked
						}
						return time.Now()
					},
				})
				if err != nil {
					t.Fatal(err)
				}
				defer server.Close()
				proxy := coaptest.NewProxy(t, server.Addr().String(), coaptest.Faults{Hook: func(d coaptest.Datagram) coaptest.Action {
					if armed.Load() && d.Direction == coaptest.ToClient && len(d.Payload) == emptyACK {
						told.Do(func() { close(acked) })
					}
					return coaptest.Pass
				}})
				key := newParty(t, nil, "key", nil).key
				subject, err := csr.ParseSubject("serialNumber=4711")
				if err != nil {
					t.Fatal(err)
				}
				idevid, err := server.IssueIDevID(testserver.IDevIDRequest{PublicKey: key.Public(), RawSubject: subject})
				if err != nil {
					t.Fatal(err)
				}
				trust, err := est.NewTrustAnchors([]*x509.Certificate{server.Root()})
				if err != nil {
					t.Fatal(err)
				}
				uri, err := est.ParseURI("coaps://" + proxy.Addr())
				if err != nil {
					t.Fatal(err)
				}
				session, err := coaps.Dial(t.Context(), coaps.Config{URI: uri, Certificate: [][]byte{idevid.Raw}, Key: opaque{key}, Trust: trust, BlockSize: size})
				if err != nil {
					t.Fatal(err)
				}
				defer session.Close()
				request, err := csr.Build(nil, csr.Template{RawSubject: subject}, key)
				if err != nil {
					t.Fatal(err)
				}
				client := est.Client{Session: session}
				want := time.Minute
				if maxAge != nil {
					want = *maxAge
				}
				var pending *est.PendingError
				if _, err := client.SimpleEnroll(t.Context(), request); !errors.As(err, &pending) || pending.RetryAfter != want || !strings.Contains(pending.Detail, "the server has much to say") {
					t.Fatalf("got %v, want to wait %s", err, want)
				}
				if len(server.Issuances()) != 0 {
					t.Error("issued before it was decided")
				}
				armed.Store(true)
				answer, err := client.SimpleEnroll(t.Context(), request)
				if err != nil {
					t.Fatal(err)
				}
				if chain, err := trust.VerifyIssued(answer, key.Public(), time.Now()); err != nil || len(chain) != 2 || len(server.Issuances()) != 1 {
					t.Errorf("got a chain of %d, %v, %d issued", len(chain), err, len(server.Issuances()))
				}
			})
		}
	}
}

// The diagnostic of a refusal comes whole, is capped and printable.
func TestDiagnosticInBlocks(t *testing.T) {
	text := "\x1b[2J\x1b[31mrevoked\r\n\x00\u202e\xff " + strings.Repeat("äß", 300)
	w := newWorld(t, nil, func(context.Context, *coap.Request) *coap.Response {
		return &coap.Response{Code: codes.Forbidden, Body: []byte(text)}
	})
	cfg := w.config()
	cfg.BlockSize = 16
	session, err := coaps.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	var status *est.StatusError
	_, err = session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll, Body: []byte("csr")})
	if !errors.As(err, &status) || len(status.Detail) > 512 || len(status.Detail) < 500 || !strings.HasPrefix(status.Detail, ".[2J.[31mrevoked..... äß") {
		t.Errorf("got %v", err)
	}
}
