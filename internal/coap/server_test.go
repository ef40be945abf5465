package coap_test

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
)

// slow is a handler that waits for the test, and counts its runs.
type slow struct {
	started chan *coap.Request
	answers chan *coap.Response
}

func newSlow() *slow {
	return &slow{started: make(chan *coap.Request, 100), answers: make(chan *coap.Response, 100)}
}

func (s *slow) handle(ctx context.Context, req *coap.Request) *coap.Response {
	s.started <- req
	select {
	case resp := <-s.answers:
		return resp
	case <-ctx.Done():
		return nil
	}
}

// again sends a request once more.
func (p *peer) again(m *message.Message) *message.Message {
	p.t.Helper()
	p.send(m)
	return p.answer(m)
}

// RFC 7252 §4.5: a duplicate gets the reply of the first, and does nothing else.
func TestDuplicates(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, handler := newPeer(t), newSlow()
		cfg := plain()
		cfg.IdleTimeout = time.Hour
		p.server(cfg, handler.handle)
		req := p.ask(codes.POST, []byte("once"), path("x"))
		<-handler.started
		p.send(req) // while it is being handled: no reply yet
		p.nothing(900 * time.Millisecond)
		handler.answers <- &coap.Response{Code: codes.Changed, Body: []byte("done")}
		first := encodeMessage(t, p.answer(req))
		for range 3 {
			if again := encodeMessage(t, p.again(req)); !bytes.Equal(first, again) {
				t.Errorf("a duplicate is answered with %x, not %x", again, first)
			}
		}
		p.nothing(time.Minute)
		if len(handler.started) != 0 {
			t.Error("the handler ran for a duplicate")
		}
		// The same ID after EXCHANGE_LIFETIME is another message.
		p.nothing(247 * time.Second)
		handler.answers <- &coap.Response{Code: codes.Changed, Body: []byte("another")}
		p.send(req)
		if got := p.answer(req); string(got.Payload) != "another" {
			t.Errorf("after EXCHANGE_LIFETIME: %v", got)
		}
	})
}

// RFC 7252 §5.2.2: after the processing delay an empty ACK, later the response
// in a confirmable message, until it is acknowledged.
func TestServerSeparateResponse(t *testing.T) {
	t.Parallel()
	for name, body := range map[string][]byte{"small": []byte("later"), "in blocks": numbers(2000)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p, handler := newPeer(t), newSlow()
				p.server(plain(), handler.handle)
				start := time.Now()
				req := p.ask(codes.POST, []byte("slow"), path("x"))
				ack := p.next()
				if ack.Type != message.Acknowledgement || ack.Code != codes.Empty || ack.MessageID != req.MessageID || len(ack.Token) != 0 {
					t.Errorf("not an empty ACK: %v", ack)
				}
				if waited := time.Since(start); waited != time.Second {
					t.Errorf("the ACK came after %v", waited)
				}
				p.nothing(30 * time.Second)
				p.send(req) // a copy of the request: a copy of the ACK
				if m := p.next(); m.Code != codes.Empty || m.MessageID != req.MessageID {
					t.Errorf("a duplicate is answered with %v", m)
				}
				handler.answers <- &coap.Response{Code: codes.Changed, Body: body}
				response := p.next()
				if response.Type != message.Confirmable || response.Code != codes.Changed || !bytes.Equal(response.Token, req.Token) {
					t.Errorf("not the response: %v", response)
				}
				for range 3 { // ours are lost
					if again := p.next(); !bytes.Equal(encodeMessage(t, response), encodeMessage(t, again)) {
						t.Errorf("then %v", again)
					}
				}
				p.send(&message.Message{Type: message.Acknowledgement, MessageID: response.MessageID})
				p.nothing(time.Minute)
				got := slices.Clone(response.Payload)
				for num := 1; len(got) < len(body); num++ {
					next := p.answer(p.ask(codes.POST, nil, path("x"), block2(num, false, 1024)))
					got = append(got, next.Payload...)
				}
				if !bytes.Equal(got, body) {
					t.Errorf("got %d bytes of %d", len(got), len(body))
				}
				if len(handler.started) != 1 {
					t.Errorf("the handler ran %d times", len(handler.started))
				}
			})
		})
	}
}

// The retransmission of a response that nobody wants ends.
func TestServerSeparateResponseReset(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, handler := newPeer(t), newSlow()
		p.server(plain(), handler.handle)
		p.ask(codes.POST, nil, path("x"))
		p.next()
		handler.answers <- &coap.Response{Code: codes.Changed}
		p.send(&message.Message{Type: message.Reset, MessageID: p.next().MessageID})
		p.nothing(time.Minute)
	})
}

// Each request by itself: what it is answered, and whether the handler runs.
func TestServerAnswers(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		code    codes.Code
		payload []byte
		opts    []message.Option
		want    codes.Code
		size1   []byte
		block1  []byte
		handled int
	}{
		"a body of the limit":                {codes.POST, numbers(64), []message.Option{path("x")}, codes.Changed, nil, nil, 1},
		"a body of more":                     {codes.POST, numbers(65), []message.Option{path("x")}, codes.RequestEntityTooLarge, nil, []byte{0x0a}, 0},
		"a body of far more":                 {codes.POST, numbers(300), []message.Option{path("x")}, codes.RequestEntityTooLarge, []byte{0xc8}, nil, 0},
		"a body announced as far more":       {codes.POST, numbers(64), []message.Option{path("x"), block1(0, true, 64), option(message.Size1, 200)}, codes.Continue, nil, []byte{0x0a}, 0},
		"a body announced as more":           {codes.POST, numbers(64), []message.Option{path("x"), block1(0, true, 64), option(message.Size1, 201)}, codes.RequestEntityTooLarge, []byte{0xc8}, nil, 0},
		"a first block":                      {codes.POST, numbers(64), []message.Option{path("x"), block1(0, true, 64)}, codes.Continue, nil, []byte{0x0a}, 0},
		"a first block of more":              {codes.POST, numbers(128), []message.Option{path("x"), block1(0, true, 128)}, codes.Continue, nil, []byte{0x0a}, 0},
		"a first block that is short":        {codes.POST, numbers(63), []message.Option{path("x"), block1(0, true, 64)}, codes.BadRequest, nil, nil, 0},
		"a first block that is long":         {codes.POST, numbers(65), []message.Option{path("x"), block1(0, true, 64)}, codes.BadRequest, nil, nil, 0},
		"a first block that is empty":        {codes.POST, nil, []message.Option{path("x"), block1(0, true, 64)}, codes.BadRequest, nil, nil, 0},
		"an only block":                      {codes.POST, numbers(10), []message.Option{path("x"), block1(0, false, 64)}, codes.Changed, nil, []byte{0x02}, 1},
		"an only block that is long":         {codes.POST, numbers(65), []message.Option{path("x"), block1(0, false, 64)}, codes.BadRequest, nil, nil, 0},
		"a later block":                      {codes.POST, numbers(64), []message.Option{path("x"), block1(1, true, 64)}, codes.RequestEntityIncomplete, nil, nil, 0},
		"a last block":                       {codes.POST, numbers(10), []message.Option{path("x"), block1(9, false, 64)}, codes.RequestEntityIncomplete, nil, nil, 0},
		"the highest block":                  {codes.POST, numbers(10), []message.Option{path("x"), block1(1<<20-1, false, 1024)}, codes.RequestEntityIncomplete, nil, nil, 0},
		"a block of the reserved size":       {codes.POST, numbers(10), []message.Option{path("x"), option(message.Block1, 0x07)}, codes.BadRequest, nil, nil, 0},
		"a response of the reserved size":    {codes.GET, nil, []message.Option{path("x"), option(message.Block2, 0x07)}, codes.BadRequest, nil, nil, 0},
		"a block option of four bytes":       {codes.POST, numbers(10), []message.Option{path("x"), option(message.Block1, 0, 0, 0, 0)}, codes.BadOption, nil, nil, 0},
		"two block options":                  {codes.POST, numbers(10), []message.Option{path("x"), block1(0, false, 64), block1(0, false, 64)}, codes.BadOption, nil, nil, 0},
		"a block of a response never asked":  {codes.GET, nil, []message.Option{path("x"), block2(1, false, 64)}, codes.RequestEntityIncomplete, nil, nil, 0},
		"an unknown critical option":         {codes.GET, nil, []message.Option{path("x"), option(9999)}, codes.BadOption, nil, nil, 0},
		"If-Match":                           {codes.GET, nil, []message.Option{path("x"), option(message.IfMatch, 1)}, codes.BadOption, nil, nil, 0},
		"Q-Block1":                           {codes.POST, nil, []message.Option{path("x"), option(message.QBlock1, 0)}, codes.BadOption, nil, nil, 0},
		"an unknown elective option":         {codes.GET, nil, []message.Option{path("x"), option(9998)}, codes.Content, nil, nil, 1},
		"Observe":                            {codes.GET, nil, []message.Option{path("x"), option(message.Observe)}, codes.Content, nil, nil, 1},
		"an elective option that is too big": {codes.GET, nil, []message.Option{path("x"), option(message.Size1, 1, 2, 3, 4, 5)}, codes.Content, nil, nil, 1},
		"a proxy":                            {codes.GET, nil, []message.Option{option(message.ProxyURI, []byte("coap://x")...)}, codes.ProxyingNotSupported, nil, nil, 0},
		"a proxy scheme":                     {codes.GET, nil, []message.Option{path("x"), option(message.ProxyScheme, []byte("coap")...)}, codes.ProxyingNotSupported, nil, nil, 0},
		"a slash in a segment":               {codes.GET, nil, []message.Option{path("x/y")}, codes.NotFound, nil, nil, 0},
		"no path":                            {codes.GET, nil, nil, codes.Content, nil, nil, 1},
		"a method of tomorrow":               {codes.Code(31), nil, []message.Option{path("x")}, codes.Changed, nil, nil, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p, handled := newPeer(t), make(chan bool, 10)
				cfg := plain()
				cfg.BlockSize, cfg.MaxBody = 64, 200
				p.server(cfg, func(ctx context.Context, req *coap.Request) *coap.Response {
					handled <- true
					return echo(ctx, req)
				})
				got := p.answer(p.ask(test.code, test.payload, test.opts...))
				if got.Code != test.want || len(handled) != test.handled {
					t.Errorf("got %v %q and %d runs of the handler, want %v and %d", got.Code, got.Payload, len(handled), test.want, test.handled)
				}
				if v := value(got, message.Size1); !bytes.Equal(v, test.size1) {
					t.Errorf("Size1 %x, want %x", v, test.size1)
				}
				if v := value(got, message.Block1); !bytes.Equal(v, test.block1) {
					t.Errorf("Block1 %x, want %x", v, test.block1)
				}
				p.nothing(time.Minute)
			})
		})
	}
}

// What is no request is rejected or ignored.
func TestServerUnexpected(t *testing.T) {
	t.Parallel()
	reset := func(mid ...byte) []byte { return append([]byte{0x70, 0}, mid...) }
	for name, test := range map[string]struct{ datagram, want []byte }{
		"ping":                          {[]byte{0x40, 0, 1, 1}, reset(1, 1)},
		"a response":                    {[]byte{0x41, 0x45, 1, 2, 9}, reset(1, 2)},
		"a reserved class":              {[]byte{0x40, 0xe1, 1, 3}, reset(1, 3)},
		"malformed":                     {[]byte{0x40, 0x01, 1, 4, 0xff}, reset(1, 4)},
		"malformed non-confirmable":     {[]byte{0x50, 0x01, 1, 5, 0xff}, nil},
		"a bad option, non-confirmable": {[]byte{0x50, 0x01, 1, 6, 0x10}, nil},
		"an ACK of nothing":             {[]byte{0x60, 0, 1, 7}, nil},
		"a Reset of nothing":            {[]byte{0x70, 0, 1, 8}, nil},
		"a request in an ACK":           {[]byte{0x60, 1, 1, 9}, nil},
		"another version":               {[]byte{0x00, 1, 1, 10}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t)
				p.server(plain(), func(context.Context, *coap.Request) *coap.Response {
					t.Error("the handler ran")
					return nil
				})
				p.raw(test.datagram)
				if test.want != nil {
					if got := encodeMessage(t, p.next()); !bytes.Equal(got, test.want) {
						t.Errorf("got %x, want %x", got, test.want)
					}
				}
				p.nothing(time.Minute)
			})
		})
	}
}

func TestNonConfirmable(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		p.server(plain(), echo)
		p.send(&message.Message{Type: message.NonConfirmable, Code: codes.POST, MessageID: 1, Token: []byte{9}, Payload: []byte("non")})
		m := p.next()
		if m.Type != message.NonConfirmable || m.Code != codes.Changed || string(m.Token) != "\x09" || string(m.Payload) != "non" {
			t.Errorf("got %v", m)
		}
	})
}

// A handler that cannot answer is an internal error, and the server lives on.
func TestHandlerFailure(t *testing.T) {
	t.Parallel()
	for name, handler := range map[string]coap.Handler{
		"panic":       func(context.Context, *coap.Request) *coap.Response { panic("handler") },
		"no response": func(context.Context, *coap.Request) *coap.Response { return nil },
		"no code":     func(context.Context, *coap.Request) *coap.Response { return &coap.Response{Body: []byte("x")} },
		"a method":    func(context.Context, *coap.Request) *coap.Response { return &coap.Response{Code: codes.POST} },
		"a body too large": func(context.Context, *coap.Request) *coap.Response {
			return &coap.Response{Code: codes.Content, Body: numbers(64<<10 + 1)}
		},
		"a long ETag": func(context.Context, *coap.Request) *coap.Response {
			return &coap.Response{Code: codes.Content, ETag: numbers(9)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t)
				p.server(plain(), handler)
				for range 2 {
					if got := p.answer(p.ask(codes.GET, nil, path("x"))); got.Code != codes.InternalServerError || len(got.Payload) != 0 {
						t.Errorf("got %v", got)
					}
				}
			})
		})
	}
}

// upload sends blocks first to last-1 of numbers(total), and returns the last answer.
func (p *peer) upload(tag byte, segment string, total, size, first, last int) *message.Message {
	p.t.Helper()
	var answer *message.Message
	for num := first; num < last; num++ {
		end := min((num+1)*size, total)
		answer = p.answer(p.ask(codes.POST, numbers(total)[num*size:end], path(segment), block1(num, end < total, size), option(message.RequestTag, tag)))
	}
	return answer
}

// Bodies under way are kept apart by path and Request-Tag (RFC 9175 §3.3).
func TestAssembly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		handled := make(chan string, 10)
		p.server(plain(), func(_ context.Context, req *coap.Request) *coap.Response {
			handled <- fmt.Sprintf("%s %d %t", req.Path, len(req.Body), bytes.Equal(req.Body, numbers(len(req.Body))))
			return &coap.Response{Code: codes.Changed}
		})
		expect := func(m *message.Message, code codes.Code) {
			t.Helper()
			if m.Code != code {
				t.Fatalf("got %v %q, want %v", m.Code, m.Payload, code)
			}
		}
		// Three transfers in turns.
		expect(p.upload(1, "x", 100, 16, 0, 3), codes.Continue)
		expect(p.upload(2, "x", 99, 16, 0, 3), codes.Continue)
		expect(p.upload(1, "y", 98, 16, 0, 3), codes.Continue)
		// A gap, and an earlier block again, are refused and undo nothing.
		expect(p.upload(1, "x", 100, 16, 4, 5), codes.RequestEntityIncomplete)
		expect(p.upload(1, "x", 100, 16, 1, 2), codes.RequestEntityIncomplete)
		expect(p.upload(1, "y", 98, 16, 3, 7), codes.Changed)
		expect(p.upload(1, "x", 100, 16, 3, 7), codes.Changed)
		expect(p.upload(2, "x", 99, 16, 3, 7), codes.Changed)
		// The last block once more is not the request once more.
		expect(p.upload(2, "x", 99, 16, 6, 7), codes.RequestEntityIncomplete)
		// A first block begins anew.
		expect(p.upload(3, "x", 97, 16, 0, 3), codes.Continue)
		expect(p.upload(3, "x", 96, 16, 0, 6), codes.Changed)
		// Another content-format is another body.
		expect(p.upload(4, "x", 100, 16, 0, 3), codes.Continue)
		expect(p.answer(p.ask(codes.POST, numbers(16), path("x"), block1(3, true, 16), option(message.RequestTag, 4), option(message.ContentFormat, 40))), codes.RequestEntityIncomplete)
		expect(p.upload(4, "x", 100, 16, 3, 4), codes.RequestEntityIncomplete)
		// Five at once are too many: the oldest is forgotten.
		for tag := byte(10); tag < 15; tag++ {
			expect(p.upload(tag, "z", 40, 16, 0, 1), codes.Continue)
		}
		expect(p.upload(10, "z", 40, 16, 1, 2), codes.RequestEntityIncomplete)
		expect(p.upload(11, "z", 40, 16, 1, 3), codes.Changed)
		// And so is one that is left alone for EXCHANGE_LIFETIME.
		p.nothing(240 * time.Second)
		expect(p.upload(12, "z", 40, 16, 1, 2), codes.Continue)
		p.nothing(240 * time.Second)
		expect(p.upload(13, "z", 40, 16, 1, 2), codes.RequestEntityIncomplete)
		expect(p.upload(12, "z", 40, 16, 2, 3), codes.Changed)
		close(handled)
		var got []string
		for h := range handled {
			got = append(got, h)
		}
		want := []string{"/y 98 true", "/x 100 true", "/x 99 true", "/x 96 true", "/z 40 true", "/z 40 true"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("the handler (-want +got):\n%s", diff)
		}
	})
}

// No body grows beyond MaxBody, announced or not.
func TestAssemblyLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		p.server(plain(), echo)
		const limit = 64 << 10
		if m := p.upload(1, "x", limit, 1024, 0, 64); m.Code != codes.Changed {
			t.Errorf("64 KiB: %v", m.Code)
		}
		m := p.upload(2, "x", limit+1, 1024, 0, 65)
		if m.Code != codes.RequestEntityTooLarge || !bytes.Equal(value(m, message.Size1), []byte{1, 0, 0}) {
			t.Errorf("64 KiB and a byte: %v, Size1 %x", m.Code, value(m, message.Size1))
		}
		if m := p.upload(2, "x", limit+1, 1024, 64, 65); m.Code != codes.RequestEntityIncomplete {
			t.Errorf("the rest of a refused body: %v", m.Code)
		}
	})
}

// A response's further blocks come from what is kept, in any size and order,
// until it expires; the handler runs once.
func TestContinuation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t)
		handled := 0
		body := numbers(200)
		cfg := plain()
		cfg.BlockSize = 64
		p.server(cfg, func(context.Context, *coap.Request) *coap.Response {
			handled++
			return &coap.Response{Code: codes.Content, ContentFormat: new(uint16(281)), MaxAge: new(uint32(5)), ETag: []byte{7}, Body: body}
		})
		check := func(m *message.Message, num int, more bool, size int) {
			t.Helper()
			want := body[num*size : min((num+1)*size, len(body))]
			if m.Code != codes.Content || !bytes.Equal(m.Payload, want) || !bytes.Equal(value(m, message.Block2), coap.EncodeBlock(num, more, size)) ||
				string(value(m, message.ETag)) != "\x07" || len(value(m, message.ContentFormat)) != 2 || len(value(m, message.MaxAge)) != 1 {
				t.Errorf("block %d of %d: %v", num, size, m)
			}
		}
		first := p.answer(p.ask(codes.GET, nil, path("x"), option(message.Size2)))
		check(first, 0, true, 64)
		if !bytes.Equal(value(first, message.Size2), []byte{200}) {
			t.Errorf("Size2 %x", value(first, message.Size2))
		}
		check(p.answer(p.ask(codes.GET, nil, path("x"), block2(1, false, 64))), 1, true, 64)
		check(p.answer(p.ask(codes.GET, nil, path("x"), block2(8, false, 16))), 8, true, 16)
		check(p.answer(p.ask(codes.GET, nil, path("x"), block2(12, false, 16))), 12, false, 16)
		check(p.answer(p.ask(codes.GET, nil, path("x"), block2(3, false, 64))), 3, false, 64)
		// Larger blocks than ours: the offset holds, the size is ours.
		check(p.answer(p.ask(codes.GET, nil, path("x"), block2(1, false, 128))), 2, true, 64)
		for name, test := range map[string]struct {
			opts []message.Option
			want codes.Code
		}{
			"beyond the end":       {[]message.Option{path("x"), block2(4, false, 64)}, codes.BadRequest},
			"far beyond":           {[]message.Option{path("x"), block2(1<<20-1, false, 1024)}, codes.BadRequest},
			"another path":         {[]message.Option{path("y"), block2(1, false, 64)}, codes.RequestEntityIncomplete},
			"another request tag":  {[]message.Option{path("x"), block2(1, false, 64), option(message.RequestTag, 1)}, codes.RequestEntityIncomplete},
			"another query string": {[]message.Option{path("x"), option(message.URIQuery, 'q'), block2(1, false, 64)}, codes.RequestEntityIncomplete},
		} {
			if m := p.answer(p.ask(codes.GET, nil, test.opts...)); m.Code != test.want {
				t.Errorf("%s: %v", name, m.Code)
			}
		}
		p.nothing(248 * time.Second)
		if m := p.answer(p.ask(codes.GET, nil, path("x"), block2(1, false, 64))); m.Code != codes.RequestEntityIncomplete {
			t.Errorf("after EXCHANGE_LIFETIME: %v", m.Code)
		}
		if handled != 1 {
			t.Errorf("the handler ran %d times", handled)
		}
	})
}

// A client that does not keep to NSTART cannot start any number of handlers.
func TestHandlerLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, handler := newPeer(t), newSlow()
		p.server(plain(), handler.handle)
		var requests []*message.Message
		for range 4 {
			requests = append(requests, p.ask(codes.POST, nil, path("x")))
		}
		if m := p.answer(p.ask(codes.POST, nil, path("x"))); m.Code != codes.TooManyRequests {
			t.Errorf("the fifth: %v", m.Code)
		}
		for range requests {
			<-handler.started
			handler.answers <- &coap.Response{Code: codes.Changed}
			if m := p.next(); m.Code != codes.Changed {
				t.Errorf("got %v", m)
			}
		}
		req := p.ask(codes.POST, nil, path("x"))
		handler.answers <- &coap.Response{Code: codes.Changed}
		if m := p.answer(req); m.Code != codes.Changed {
			t.Errorf("afterwards: %v", m.Code)
		}
	})
}

// A server leaves a client that is silent, but not one that waits for it.
func TestIdle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, handler := newPeer(t), newSlow()
		p.server(plain(), handler.handle)
		p.ask(codes.POST, nil, path("x"))
		p.next()
		time.Sleep(20 * time.Minute) // the bubble's clock
		select {
		case <-p.wire.closed:
			t.Fatal("closed while the handler ran")
		default:
		}
		handler.answers <- &coap.Response{Code: codes.Changed}
		p.send(&message.Message{Type: message.Acknowledgement, MessageID: p.next().MessageID})
		start := time.Now()
		<-p.wire.closed
		if waited := time.Since(start); waited > 5*time.Minute {
			t.Errorf("closed after %v", waited)
		}
	})
}

// Several clients at once, each with its own answer.
func TestClients(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	addr := serve(t, p.serverConfig(), echo)
	cfg := p.clientConfig()
	cfg.BlockSize = 128
	results := make(chan error, 16)
	for i := range cap(results) {
		conn := dial(t, addr, cfg)
		go func() {
			results <- func() error {
				for range 4 {
					body := bytes.Repeat([]byte{byte(i)}, 500+i)
					resp, err := conn.Do(t.Context(), &coap.Request{Method: codes.POST, Path: "/x", Body: body})
					if err != nil || !bytes.Equal(resp.Body, body) {
						return fmt.Errorf("client %d: %v, %w", i, resp, err)
					}
				}
				return nil
			}()
		}()
	}
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// A client beyond the limit has no handshake, until another has left.
func TestMaxConnections(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	cfg := p.serverConfig()
	cfg.MaxConnections, cfg.HandshakeTimeout = 1, 2*time.Second
	addr := serve(t, cfg, echo)
	first := dial(t, addr, p.clientConfig())
	impatient := p.clientConfig()
	impatient.HandshakeTimeout = 300 * time.Millisecond
	if conn, err := coap.Dial(t.Context(), addr, impatient); err == nil {
		t.Error("a second connection")
		_ = conn.Close()
	}
	if _, err := first.Do(t.Context(), get); err != nil {
		t.Errorf("the first connection: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if _, err := dial(t, addr, p.clientConfig()).Do(t.Context(), get); err != nil {
		t.Errorf("after the first has left: %v", err)
	}
}

// Close ends exchanges, handlers and connections, and leaves nothing behind.
// Not parallel: it counts goroutines.
func TestClose(t *testing.T) {
	p := newPKI(t)
	before := runtime.NumGoroutine()
	for range 3 {
		server, err := coap.Listen("127.0.0.1:0", p.serverConfig())
		if err != nil {
			t.Fatal(err)
		}
		handler := newSlow()
		served := make(chan error, 1)
		go func() { served <- server.Serve(handler.handle) }()
		idle := dial(t, server.Addr().String(), p.clientConfig())
		busy := dial(t, server.Addr().String(), p.clientConfig())
		gone := dial(t, server.Addr().String(), p.clientConfig())
		if err := gone.Close(); err != nil {
			t.Error(err)
		}
		done := do(t.Context(), busy, get)
		<-handler.started
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		if got := <-done; got.err == nil {
			t.Errorf("the exchange ended with %v", got.resp)
		}
		<-idle.Ended()
		for _, conn := range []*coap.Conn{idle, busy} {
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := server.Close(); err != nil {
			t.Errorf("closed twice: %v", err)
		}
		if err := server.Serve(echo); err != nil {
			t.Errorf("serve after close: %v", err)
		}
	}
	noMoreGoroutines(t, before)
}

// noMoreGoroutines waits until there are as few as before.
func noMoreGoroutines(t *testing.T, before int) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for runtime.NumGoroutine() > before {
		select {
		case <-tick.C:
		case <-deadline:
			stacks := make([]byte, 1<<20)
			stacks = stacks[:runtime.Stack(stacks, true)]
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, strings.TrimSpace(string(stacks)))
		}
	}
}
