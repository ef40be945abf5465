package coap_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
)

// echo answers with the request's body, as 2.05 to a GET and 2.04 otherwise.
func echo(_ context.Context, req *coap.Request) *coap.Response {
	code := codes.Changed
	if req.Method == codes.GET {
		code = codes.Content
	}
	return &coap.Response{Code: code, ContentFormat: req.ContentFormat, Body: req.Body}
}

var get = &coap.Request{Method: codes.GET, Path: "/x"}

func TestExchange(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	handled := make(chan *coap.Request, 1)
	addr := serve(t, p.serverConfig(), func(_ context.Context, req *coap.Request) *coap.Response {
		handled <- req
		return &coap.Response{
			Code: codes.Changed, ContentFormat: new(uint16(281)), MaxAge: new(uint32(90)), ETag: []byte{1}, Body: bytes.ToUpper(req.Body),
		}
	})
	conn := dial(t, addr, p.clientConfig())
	req := &coap.Request{
		Method: codes.POST, Host: "ca.example", Port: 61616, Path: "/.well-known/est/sen", Query: []string{"a=b", "c"},
		ContentFormat: new(uint16(286)), Accept: new(uint16(287)), Body: []byte("hello"),
	}
	resp, err := conn.Do(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	want := &coap.Response{Code: codes.Changed, ContentFormat: new(uint16(281)), MaxAge: new(uint32(90)), ETag: []byte{1}, Body: []byte("HELLO")}
	if diff := cmp.Diff(want, resp); diff != "" {
		t.Errorf("response (-want +got):\n%s", diff)
	}
	got := <-handled
	if len(got.Peer) != 1 || !bytes.Equal(got.Peer[0].Raw, p.client.chain[0]) {
		t.Errorf("the handler's peer is %v", got.Peer)
	}
	got.Peer, got.ChannelBinding = nil, nil
	if diff := cmp.Diff(req, got); diff != "" {
		t.Errorf("request (-sent +handled):\n%s", diff)
	}
}

// RFC 7252 §4.2, §4.8: the first timeout is 2 to 3 s, each further one twice
// the one before, and after the last the message is given up.
func TestRetransmission(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		maxRetransmit, transmissions int
		latest                       time.Duration
	}{
		"default": {0, 5, 93 * time.Second}, // MAX_TRANSMIT_WAIT
		"two":     {2, 3, 21 * time.Second},
		"none":    {-1, 1, 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t)
				cfg := plain()
				cfg.MaxRetransmit = test.maxRetransmit
				start := time.Now()
				done := do(t.Context(), p.client(cfg), get)
				first := encodeMessage(t, p.next())
				var timeout time.Duration
				for i, last := 1, start; i < test.transmissions; i++ {
					if again := encodeMessage(t, p.next()); !bytes.Equal(first, again) {
						t.Errorf("transmission %d is %x, not %x", i+1, again, first)
					}
					waited := time.Since(last)
					last = time.Now()
					switch {
					case i == 1 && (waited < 2*time.Second || waited > 3*time.Second):
						t.Errorf("the first timeout is %v", waited)
					case i > 1 && waited != 2*timeout:
						t.Errorf("a timeout of %v after one of %v", waited, timeout)
					}
					timeout = waited
				}
				if got := <-done; !isTimeout(got.err) {
					t.Errorf("got %v, %v", got.resp, got.err)
				}
				if waited := time.Since(start); waited > test.latest {
					t.Errorf("given up after %v", waited)
				}
				p.nothing(time.Hour)
			})
		})
	}
}

// One deadline bounds the exchange, however far its messages are.
func TestExchangeTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		cfg := plain()
		cfg.AckTimeout = 10 * time.Second
		conn := p.client(cfg)
		start := time.Now()
		done := do(t.Context(), conn, get)
		// An empty ACK promises a response that never comes.
		p.send(&message.Message{Type: message.Acknowledgement, MessageID: p.next().MessageID})
		if got := <-done; !isTimeout(got.err) || time.Since(start) != 247*time.Second {
			t.Errorf("after %v: %v, %v", time.Since(start), got.resp, got.err)
		}
		// A server that sends block after block, slowly.
		start = time.Now()
		done = do(t.Context(), conn, get)
		for i := range 49 {
			request := p.next()
			p.nothing(5 * time.Second)
			p.send(&message.Message{
				Type: message.Acknowledgement, Code: codes.Content, MessageID: request.MessageID, Token: request.Token,
				Options: message.Options{block2(i, true, 16)}, Payload: numbers(16),
			})
		}
		if got := <-done; !isTimeout(got.err) || time.Since(start) != 247*time.Second {
			t.Errorf("after %v: %v, %v", time.Since(start), got.resp, got.err)
		}
	})
}

// The caller's context ends an exchange, and a next one is not disturbed by
// what comes late.
func TestCancel(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		conn := p.client(plain())
		ctx, cancel := context.WithCancel(t.Context())
		done := do(ctx, conn, get)
		late := p.next()
		cancel()
		if got := <-done; !errors.Is(got.err, context.Canceled) || isTimeout(got.err) {
			t.Errorf("cancelled: %v, %v", got.resp, got.err)
		}
		deadline, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		done = do(deadline, conn, get)
		p.next()
		if got := <-done; !isTimeout(got.err) {
			t.Errorf("the context's deadline: %v, %v", got.resp, got.err)
		}

		done = do(t.Context(), conn, get)
		now := p.next()
		p.send(&message.Message{Type: message.Acknowledgement, Code: codes.Content, MessageID: late.MessageID, Token: late.Token, Payload: []byte("late")})
		// The right message ID with the wrong token is no response either.
		p.send(&message.Message{Type: message.Acknowledgement, Code: codes.Content, MessageID: now.MessageID, Token: late.Token, Payload: []byte("late")})
		p.send(&message.Message{Type: message.Acknowledgement, Code: codes.Content, MessageID: now.MessageID, Token: now.Token, Payload: []byte("now")})
		if got := <-done; got.err != nil || string(got.resp.Body) != "now" {
			t.Errorf("after a late response: %v, %v", got.resp, got.err)
		}
	})
}

func TestReset(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		done := do(t.Context(), p.client(plain()), get)
		p.send(&message.Message{Type: message.Reset, MessageID: p.next().MessageID})
		if got := <-done; !errors.Is(got.err, coap.ErrReset) {
			t.Errorf("got %v, %v", got.resp, got.err)
		}
	})
}

// RFC 7252 §5.2.2: a response of its own is acknowledged, each copy of it, and
// stands for an ACK that was lost.
func TestSeparateResponse(t *testing.T) {
	t.Parallel()
	for name, ack := range map[string]bool{"after the ACK": true, "before the ACK": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t)
				conn := p.client(plain())
				done := do(t.Context(), conn, get)
				req := p.next()
				if ack {
					p.send(&message.Message{Type: message.Acknowledgement, MessageID: req.MessageID})
					p.nothing(time.Minute)
				}
				response := &message.Message{Type: message.Confirmable, Code: codes.Content, MessageID: 7, Token: req.Token, Payload: []byte("separate")}
				for range 2 {
					p.send(response)
					if m := p.next(); m.Type != message.Acknowledgement || m.Code != codes.Empty || m.MessageID != 7 {
						t.Errorf("the response is answered with %v", m)
					}
				}
				if got := <-done; got.err != nil || string(got.resp.Body) != "separate" {
					t.Errorf("got %v, %v", got.resp, got.err)
				}
				p.send(&message.Message{Type: message.Acknowledgement, MessageID: req.MessageID})
				p.nothing(time.Hour)
			})
		})
	}
}

// What a client does not expect is rejected, or ignored, and disturbs nothing.
func TestUnexpected(t *testing.T) {
	t.Parallel()
	reset := func(mid ...byte) []byte { return append([]byte{0x70, 0}, mid...) }
	for name, test := range map[string]struct{ datagram, want []byte }{
		"ping":                               {[]byte{0x40, 0, 1, 1}, reset(1, 1)},
		"a response to nothing":              {[]byte{0x41, 0x45, 1, 2, 9}, reset(1, 2)},
		"a non-confirmable one":              {[]byte{0x51, 0x45, 1, 3, 9}, nil},
		"a request":                          {[]byte{0x41, 0x01, 1, 4, 9}, reset(1, 4)},
		"a non-confirmable request":          {[]byte{0x51, 0x01, 1, 5, 9}, nil},
		"a reserved class":                   {[]byte{0x40, 0x21, 1, 6}, reset(1, 6)},
		"an empty message with a token":      {[]byte{0x41, 0, 1, 7, 9}, reset(1, 7)},
		"a payload marker without a payload": {[]byte{0x40, 0x45, 1, 8, 0xff}, reset(1, 8)},
		"a token of 9 bytes":                 {[]byte{0x49, 0x45, 1, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9}, reset(1, 9)},
		"a truncated option":                 {[]byte{0x40, 0x45, 1, 10, 0xb4, 1}, reset(1, 10)},
		"a malformed non-confirmable one":    {[]byte{0x50, 0x45, 1, 11, 0xff}, nil},
		"another version":                    {[]byte{0x80, 0, 1, 12}, nil},
		"three bytes":                        {[]byte{0x40, 0, 1}, nil},
		"nothing":                            {[]byte{}, nil},
		"an ACK of nothing":                  {[]byte{0x60, 0, 1, 13}, nil},
		"a request in an ACK":                {[]byte{0x60, 1, 1, 14}, nil},
		"a Reset of nothing":                 {[]byte{0x70, 0, 1, 15}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t)
				conn := p.client(plain())
				p.raw(test.datagram)
				if test.want != nil {
					if got := encodeMessage(t, p.next()); !bytes.Equal(got, test.want) {
						t.Errorf("got %x, want %x", got, test.want)
					}
				}
				p.nothing(time.Second)
				done := do(t.Context(), conn, get)
				p.respond(codes.Content, []byte("fine"))
				if got := <-done; got.err != nil || string(got.resp.Body) != "fine" {
					t.Errorf("the next exchange: %v, %v", got.resp, got.err)
				}
			})
		})
	}
}

// A server that answers wrongly is told from one that is silent, and what one
// exchange ignored is not held against the next.
func TestIgnored(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		answer func(*message.Message) []byte
		want   string
	}{
		"silence": {func(*message.Message) []byte { return nil }, "no answer"},
		"an option that is cut": {func(m *message.Message) []byte {
			return []byte{0x60, byte(codes.Content), byte(m.MessageID >> 8), byte(m.MessageID), 0xc2, 1}
		}, "no answer, but 2 malformed messages"},
		"another token": {func(m *message.Message) []byte {
			return []byte{0x61, byte(codes.Content), byte(m.MessageID >> 8), byte(m.MessageID), 1}
		}, "no answer, but 2 with another token"},
		"an empty ACK": {func(m *message.Message) []byte {
			return []byte{0x60, 0, byte(m.MessageID >> 8), byte(m.MessageID)}
		}, "acknowledged: no answer"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t)
				cfg := plain()
				cfg.MaxRetransmit = 1
				conn := p.client(cfg)
				done := do(t.Context(), conn, get)
				transmissions := 2
				if name == "an empty ACK" {
					transmissions = 1
				}
				for range transmissions {
					if answer := test.answer(p.next()); answer != nil {
						p.raw(answer)
					}
				}
				if got := <-done; !isTimeout(got.err) || !strings.HasSuffix(got.err.Error(), ": "+test.want) {
					t.Errorf("got %v, want %s", got.err, test.want)
				}
				done = do(t.Context(), conn, get)
				p.next()
				p.next()
				if got := <-done; !isTimeout(got.err) || !strings.HasSuffix(got.err.Error(), ": no answer") {
					t.Errorf("the next exchange: %v", got.err)
				}
			})
		})
	}
}

// Replies are kept for the last messages only, however many a peer sends.
func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		conn := p.client(plain())
		for mid := range int32(500) {
			p.send(&message.Message{Type: message.Confirmable, Code: codes.Content, MessageID: mid, Token: []byte{1}})
			p.next() // a Reset
		}
		if got := conn.Remembered(); got != 128 {
			t.Errorf("%d messages are remembered, want the last 128", got)
		}
	})
}

// Requests take turns (NSTART 1), and each message has a token of its own.
func TestTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		conn := p.client(plain())
		var requests []<-chan outcome
		for range 5 {
			requests = append(requests, do(t.Context(), conn, get))
		}
		tokens := map[string]bool{}
		for range requests {
			first := p.next()
			p.nothing(time.Second)
			p.send(&message.Message{
				Type: message.Acknowledgement, Code: codes.Content, MessageID: first.MessageID, Token: first.Token,
				Options: message.Options{block2(0, true, 16)}, Payload: numbers(16),
			})
			second := p.respond(codes.Content, numbers(3), block2(1, false, 16))
			for _, token := range []message.Token{first.Token, second.Token} {
				if len(token) != 8 || tokens[string(token)] {
					t.Errorf("token %x", []byte(token))
				}
				tokens[string(token)] = true
			}
		}
		for _, done := range requests {
			if got := <-done; got.err != nil {
				t.Error(got.err)
			}
		}
	})
}

func TestClosed(t *testing.T) {
	t.Parallel()
	for name, closer := range map[string]func(*peer, *coap.Conn) error{
		"by the peer": func(p *peer, _ *coap.Conn) error { return p.wire.Close() },
		"by us":       func(_ *peer, c *coap.Conn) error { return c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t)
				conn := p.client(plain())
				done := do(t.Context(), conn, get)
				p.next()
				if err := closer(p, conn); err != nil {
					t.Error(err)
				}
				if got := <-done; !errors.Is(got.err, coap.ErrClosed) {
					t.Errorf("an exchange under way: %v, %v", got.resp, got.err)
				}
				if _, err := conn.Do(t.Context(), get); !errors.Is(err, coap.ErrClosed) {
					t.Errorf("a later exchange: %v", err)
				}
			})
		})
	}
}

// A response that came counts, whatever ended right after it: a server may close
// once it has answered.
func TestClosedAfterResponse(t *testing.T) {
	t.Parallel()
	for name, separate := range map[string]bool{"piggybacked": false, "separate": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for range 50 { // a select among what is ready is random
				synctest.Test(t, func(t *testing.T) {
					p := newPeer(t)
					done := do(t.Context(), p.client(plain()), get)
					m := p.next()
					answer := &message.Message{Type: message.Acknowledgement, Code: codes.Content, MessageID: m.MessageID, Token: m.Token, Payload: []byte("all")}
					if separate {
						p.send(&message.Message{Type: message.Acknowledgement, MessageID: m.MessageID})
						answer.Type, answer.MessageID = message.Confirmable, 7
					}
					synctest.Wait()
					p.wire.ends = true
					p.send(answer)
					if got := <-done; got.err != nil || string(got.resp.Body) != "all" {
						t.Fatalf("got %v, %v", got.resp, got.err)
					}
				})
			}
		})
	}
}

// unplugged is a link whose network refuses the first datagrams.
type unplugged struct {
	*wire
	refused int
	err     error
}

func (u *unplugged) Write(datagram []byte) (int, error) {
	if u.refused > 0 {
		u.refused--
		return 0, u.err
	}
	return u.wire.Write(datagram)
}

// A network that is down for a moment costs a retransmission; one that stays
// down is named; a port that is closed ends the connection.
func TestNetworkDown(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		refused int
		err     error
		want    []error
	}{
		"for a moment":  {2, syscall.ENETUNREACH, nil},
		"for good":      {5, syscall.ENETUNREACH, []error{coap.ErrTimeout, context.DeadlineExceeded, syscall.ENETUNREACH}},
		"a closed port": {1, syscall.ECONNREFUSED, []error{coap.ErrClosed, syscall.ECONNREFUSED}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t)
				conn, err := coap.NewClient(&unplugged{p.wire, test.refused, test.err}, plain())
				if err != nil {
					t.Fatal(err)
				}
				done := do(t.Context(), conn, get)
				if test.want == nil {
					p.respond(codes.Content, nil)
				}
				got := <-done
				if (got.err == nil) != (test.want == nil) {
					t.Errorf("got %v, %v", got.resp, got.err)
				}
				for _, want := range test.want {
					if !errors.Is(got.err, want) {
						t.Errorf("got %v, want %v", got.err, want)
					}
				}
				if err := conn.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestRequestRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		cfg := plain()
		cfg.MaxBody = 100
		conn := p.client(cfg)
		for name, req := range map[string]*coap.Request{
			"no slash":       {Method: codes.GET, Path: "x"},
			"a long segment": {Method: codes.GET, Path: "/" + strings.Repeat("a", 256)},
			"a long query":   {Method: codes.GET, Path: "/x", Query: []string{strings.Repeat("a", 256)}},
			"a long host":    {Method: codes.GET, Path: "/x", Host: strings.Repeat("a", 256)},
			"a long body":    {Method: codes.POST, Path: "/x", Body: numbers(101)},
		} {
			_, err := conn.Do(t.Context(), req)
			if err == nil {
				t.Errorf("%s: sent", name)
			}
			if name == "a long body" && !errors.Is(err, coap.ErrBodyTooLarge) {
				t.Error(err)
			}
		}
		p.nothing(time.Hour)
	})
}

func TestConfigRefused(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	for name, change := range map[string]func(*coap.Config){
		"no Verify":              func(c *coap.Config) { c.Verify = nil },
		"certificate, no key":    func(c *coap.Config) { c.Key = nil },
		"key, no certificate":    func(c *coap.Config) { c.Certificate = nil },
		"block size 8":           func(c *coap.Config) { c.BlockSize = 8 },
		"block size 100":         func(c *coap.Config) { c.BlockSize = 100 },
		"block size 2048":        func(c *coap.Config) { c.BlockSize = 2048 },
		"body beyond the option": func(c *coap.Config) { c.MaxBody = 16<<20 + 1 },
		"negative body":          func(c *coap.Config) { c.MaxBody = -1 },
		"negative timeout":       func(c *coap.Config) { c.AckTimeout = -1 },
		"negative connections":   func(c *coap.Config) { c.MaxConnections = -1 },
	} {
		cfg := p.clientConfig()
		change(&cfg)
		if conn, err := coap.Dial(t.Context(), "127.0.0.1:9", cfg); err == nil {
			t.Errorf("%s: dialled", name)
			_ = conn.Close()
		}
		if server, err := coap.Listen("127.0.0.1:0", cfg); err == nil {
			t.Errorf("%s: listening", name)
			_ = server.Close()
		}
	}
	cfg := p.serverConfig()
	cfg.Certificate, cfg.Key = nil, nil
	if server, err := coap.Listen("127.0.0.1:0", cfg); err == nil {
		t.Error("a server without a certificate is listening")
		_ = server.Close()
	}
}
