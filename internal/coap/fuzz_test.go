package coap_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
)

// A block option of 0 to 3 bytes that decodes is encoded as it was, but for
// leading zeros (RFC 7252 §3.2).
func FuzzBlockOption(f *testing.F) {
	for _, seed := range [][]byte{{}, {0}, {0x0a}, {0x1a}, {0x92}, {0x07}, {0x0f}, {0x06}, {1, 0x0e}, {0xff, 0xfe}, {0xff, 0xff, 0xfe}, {0, 0, 8}} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		if len(value) > 3 {
			return // no block option is longer
		}
		num, more, size, ok := coap.DecodeBlock(value)
		reserved := len(value) > 0 && value[len(value)-1]&7 == 7
		if ok == reserved {
			t.Fatalf("%x: decoded %t", value, ok)
		}
		if !ok {
			return
		}
		if num < 0 || num >= 1<<20 || size < 16 || size > 1024 || size&(size-1) != 0 {
			t.Errorf("%x: %d/%t/%d", value, num, more, size)
		}
		if got, want := coap.EncodeBlock(num, more, size), bytes.TrimLeft(value, "\x00"); !bytes.Equal(got, want) {
			t.Errorf("%x: %d/%t/%d is encoded as %x", value, num, more, size, got)
		}
	})
}

// Records of a later epoch hide none in the clear that follows them, and are
// none themselves; whatever else comes is walked through to its end.
func FuzzClearRecord(f *testing.F) {
	record := func(epoch byte, content []byte) []byte {
		return append([]byte{23, 0xfe, 0xfd, 0, epoch, 0, 0, 0, 0, 0, 1, byte(len(content) >> 8), byte(len(content))}, content...)
	}
	f.Add([]byte{}, []byte{})
	f.Add([]byte("content"), []byte{22, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff})
	f.Add(bytes.Repeat([]byte{0}, 300), bytes.Repeat([]byte{0}, 12))
	f.Fuzz(func(t *testing.T, content, rest []byte) {
		coap.HasClearRecord(rest)
		content = content[:min(len(content), 1<<16-1)]
		encrypted := record(1, content)
		if coap.HasClearRecord(encrypted) {
			t.Errorf("%x is in the clear", encrypted)
		}
		if hidden := append(bytes.Clone(encrypted), record(0, content)...); !coap.HasClearRecord(hidden) {
			t.Errorf("%x hides a record in the clear", hidden)
		}
		if got, want := coap.HasClearRecord(append(encrypted, rest...)), coap.HasClearRecord(rest); got != want {
			t.Errorf("%x after a record: got %t, want %t", rest, got, want)
		}
	})
}

// A choice of P-521 is seen behind any whole record, and none in what is too
// short for one; whatever else comes is walked through to its end.
func FuzzServerCurve(f *testing.F) {
	choice := []byte{22, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 4, 0, 15, 12, 0, 0, 3, 0, 2, 0, 0, 0, 0, 0, 3, 3, 0, 25}
	f.Add([]byte{}, []byte{})
	f.Add([]byte("content"), choice)
	f.Add(bytes.Repeat([]byte{0}, 300), choice[:27])
	f.Fuzz(func(t *testing.T, content, rest []byte) {
		found := coap.ChoosesP521(rest)
		if found && len(rest) < len(choice) {
			t.Errorf("found in %x", rest)
		}
		content = content[:min(len(content), 1<<16-1)]
		record := append([]byte{23, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 1, byte(len(content) >> 8), byte(len(content))}, content...)
		if got := coap.ChoosesP521(append(bytes.Clone(record), rest...)); got != found {
			t.Errorf("%x behind a record: got %t, want %t", rest, got, found)
		}
		if !coap.ChoosesP521(append(record, choice...)) {
			t.Error("not found behind a record")
		}
	})
}

// A socket finds a hello's random whatever follows it, and no hello in another epoch.
func FuzzClientHello(f *testing.F) {
	hello := append([]byte{22, 0xfe, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 46, 1, 0, 0, 34, 0, 0, 0, 0, 0, 0, 0, 34, 0xfe, 0xfd}, numbers(32)...)
	f.Add([]byte(nil))
	f.Add(hello)
	f.Fuzz(func(t *testing.T, rest []byte) {
		coap.HelloRandom(rest)
		datagram := append(bytes.Clone(hello), rest...)
		if random, found := coap.HelloRandom(datagram); !found || !bytes.Equal(random[:], numbers(32)) {
			t.Errorf("%x: found %v, %x", datagram, found, random)
		}
		if datagram[4] = 1; func() bool { _, found := coap.HelloRandom(datagram); return found }() {
			t.Error("a hello in epoch 1")
		}
	})
}

// split cuts fuzzed input into datagrams, each after a byte with its length
// (0xff: the rest). It returns at most 64.
func split(input []byte) [][]byte {
	var datagrams [][]byte
	for len(input) > 0 && len(datagrams) < 64 {
		length := min(int(input[0]), len(input)-1)
		if input[0] == 0xff {
			length = len(input) - 1
		}
		datagrams = append(datagrams, input[1:1+length])
		input = input[1+length:]
	}
	return datagrams
}

func join(datagrams ...[]byte) []byte {
	var input []byte
	for _, d := range datagrams {
		input = append(append(input, byte(len(d))), d...)
	}
	return input
}

// Whatever datagrams a server gets, it answers each at most once, with a
// message that is well-formed and no larger than its blocks, runs its handler
// at most once for each, and hands it no body beyond its limit.
func FuzzServerDatagrams(f *testing.F) {
	request := func(mid int32, code codes.Code, payload []byte, opts ...message.Option) []byte {
		return encodeMessage(f, &message.Message{Type: message.Confirmable, Code: code, MessageID: mid, Token: []byte{1}, Options: opts, Payload: payload})
	}
	tag := option(message.RequestTag, 1)
	get := request(1, codes.GET, nil, path("est"), path("crts"), option(message.Accept, 1, 0x19))
	f.Add(join(get, get))
	f.Add(join(
		request(1, codes.POST, numbers(32), path("x"), block1(0, true, 32), option(message.Size1, 70), tag),
		request(2, codes.POST, numbers(32), path("x"), block1(1, true, 32), tag),
		request(3, codes.POST, numbers(6), path("x"), block2(0, false, 16), block1(2, false, 32), tag),
		request(4, codes.POST, nil, path("x"), block2(1, false, 16), tag),
		request(5, codes.POST, nil, path("x"), block2(9, false, 16), tag),
	))
	f.Add(join(request(1, codes.POST, numbers(64), path("x"), block1(0, true, 64)), request(2, codes.POST, numbers(64), path("x"), block1(2, true, 64))))
	f.Add(join(request(1, codes.POST, numbers(100)), request(2, codes.GET, nil, option(9999)), request(3, codes.GET, nil, option(message.Block2, 7))))
	f.Add(join([]byte{0x40, 0, 0, 1}, []byte{0x70, 0, 0, 1}, []byte{0x60, 0, 0, 1}, []byte{0x50, 1, 0, 2}, []byte{0x41, 0x45, 0, 3, 9}, []byte{0x40, 1, 0, 4, 0xff}))
	f.Add(append([]byte{0xff}, request(1, codes.POST, vector(f, "sen-request-286.der"), path("est"), path("sen"), option(message.ContentFormat, 1, 0x1e))...))
	f.Fuzz(func(t *testing.T, input []byte) {
		const limit = 256
		cfg := plain()
		cfg.BlockSize, cfg.MaxBody = 64, limit
		var handled, sent = make(chan bool, 100), make(chan []byte, 100)
		w := newWire(func(datagram []byte) { sent <- datagram })
		datagrams := split(input)
		for _, d := range datagrams {
			w.in <- d
		}
		w.ends = true
		if err := coap.ServeLink(w, cfg, func(_ context.Context, req *coap.Request) *coap.Response {
			handled <- true
			if len(req.Body) > limit {
				t.Errorf("a body of %d bytes", len(req.Body))
			}
			return &coap.Response{Code: codes.Changed, Body: numbers(limit)}
		}); err != nil {
			t.Fatal(err)
		}
		if len(handled) > len(datagrams) || len(sent) > len(datagrams) {
			t.Errorf("%d datagrams, %d answers, %d runs of the handler", len(datagrams), len(sent), len(handled))
		}
		for range len(sent) {
			if m := decodeMessage(t, <-sent); len(m.Payload) > 64 {
				t.Errorf("an answer of %d bytes", len(m.Payload))
			}
		}
	})
}

// Whatever a server answers, a client ends with a response within its limit or
// an error of its kind, and asks only once more than it was answered.
func FuzzClientResponses(f *testing.F) {
	// A response without the header and token: code, options, payload.
	response := func(code codes.Code, payload []byte, opts ...message.Option) []byte {
		encoded := encodeMessage(f, &message.Message{Code: code, Options: opts, Payload: payload})
		return append([]byte{byte(code)}, encoded[4:]...)
	}
	f.Add(false, join(response(codes.Content, numbers(64), option(message.ETag, 1), block2(0, true, 64)), response(codes.Content, numbers(9), option(message.ETag, 1), block2(1, false, 64))))
	f.Add(true, join(response(codes.Continue, nil, block1(0, true, 32)), response(codes.Continue, nil, block1(2, true, 32)), response(codes.Changed, numbers(16), block1(3, false, 32), block2(0, true, 16)), response(codes.Changed, nil, block2(1, false, 16))))
	f.Add(true, join(response(codes.RequestEntityTooLarge, nil, block1(0, true, 16)), response(codes.RequestEntityIncomplete, nil)))
	f.Add(false, join(response(codes.Content, numbers(64), block2(0, true, 64), option(message.Size2, 1, 0, 0))))
	f.Add(false, append([]byte{0xff}, response(codes.Content, vector(f, "crts-response-281.der"), option(message.ContentFormat, 1, 0x19))...))
	f.Fuzz(func(t *testing.T, post bool, input []byte) {
		const limit = 256
		script := split(input)
		var w *wire
		asked, last := 0, int32(-1)
		w = newWire(func(datagram []byte) {
			m := decodeMessage(t, datagram)
			if m.Type != message.Confirmable {
				return
			}
			if m.MessageID == last || asked == len(script) {
				_ = w.Close() // no answer, or one that was not understood
				return
			}
			last = m.MessageID
			if s := script[asked]; len(s) > 0 {
				answer := []byte{0x60 | byte(len(m.Token)), s[0], byte(m.MessageID >> 8), byte(m.MessageID)}
				w.in <- append(append(answer, m.Token...), s[1:]...)
			}
			asked++
		})
		cfg := plain()
		cfg.BlockSize, cfg.MaxBody, cfg.AckTimeout = 64, limit, time.Millisecond
		conn, err := coap.NewClient(w, cfg)
		if err != nil {
			t.Fatal(err)
		}
		req := &coap.Request{Method: codes.GET, Path: "/x"}
		if post {
			req = &coap.Request{Method: codes.POST, Path: "/x", Body: numbers(150)}
		}
		resp, err := conn.Do(t.Context(), req)
		var blockError *coap.BlockError
		var optionError *coap.OptionError
		switch {
		case err == nil && (len(resp.Body) > limit || resp.Code>>5 < 2):
			t.Errorf("got %v with %d bytes", resp.Code, len(resp.Body))
		case err == nil, errors.As(err, &blockError), errors.As(err, &optionError), errors.Is(err, coap.ErrBodyTooLarge),
			errors.Is(err, coap.ErrClosed), errors.Is(err, coap.ErrTimeout):
		default:
			t.Errorf("got %v", err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
}
