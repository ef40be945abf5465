package coap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
)

var blockSizes = []int{16, 32, 64, 128, 256, 512, 1024}

// Both bodies of one exchange, in every pair of block sizes, around each
// boundary; the response is one byte longer than the request, or as long.
func TestBlockSizes(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	for _, serverSize := range blockSizes {
		t.Run(fmt.Sprintf("server %d", serverSize), func(t *testing.T) {
			t.Parallel()
			cfg := p.serverConfig()
			cfg.BlockSize = serverSize
			addr := serve(t, cfg, func(_ context.Context, req *coap.Request) *coap.Response {
				return &coap.Response{Code: codes.Changed, Body: slices.Concat(req.Body, []byte(req.Query[0]))}
			})
			for _, clientSize := range blockSizes {
				cfg := p.clientConfig()
				cfg.BlockSize = clientSize
				conn := dial(t, addr, cfg)
				lengths := []int{
					0, 1, 2048, clientSize - 1, clientSize, clientSize + 1, 2*clientSize - 1, 2 * clientSize, 2*clientSize + 1,
					serverSize - 1, serverSize, serverSize + 1,
				}
				slices.Sort(lengths)
				for _, length := range slices.Compact(lengths) {
					for _, suffix := range []string{"", "!"} {
						body := numbers(length)
						resp, err := conn.Do(t.Context(), &coap.Request{Method: codes.POST, Path: "/x", Query: []string{suffix}, Body: body})
						if err != nil {
							t.Fatalf("client %d, %d bytes: %v", clientSize, length, err)
						}
						if want := slices.Concat(body, []byte(suffix)); resp.Code != codes.Changed || !bytes.Equal(resp.Body, want) {
							t.Errorf("client %d, %d bytes: got %v and %d bytes", clientSize, length, resp.Code, len(resp.Body))
						}
					}
				}
			}
		})
	}
}

// vector is a payload of RFC 9148 appendix A.
func vector(t testing.TB, name string) []byte {
	t.Helper()
	body, err := os.ReadFile(filepath.Join("..", "..", "testdata", "rfc9148", name))
	if err != nil {
		t.Fatal(err)
	}
	if len(body) == 0 {
		t.Fatalf("%s is empty", name)
	}
	return body
}

// record runs one request between our client and our server and returns every
// datagram of theirs, in order.
func record(t *testing.T, clientSize, serverSize int, req *coap.Request, handler coap.Handler) (*coap.Response, []*message.Message) {
	t.Helper()
	var trace []*message.Message
	var clientWire, serverWire *wire
	pass := func(to **wire) func([]byte) {
		return func(datagram []byte) {
			trace = append(trace, decodeMessage(t, datagram))
			(*to).in <- datagram
		}
	}
	clientWire, serverWire = newWire(pass(&serverWire)), newWire(pass(&clientWire))
	clientConfig, serverConfig := plain(), plain()
	clientConfig.BlockSize, serverConfig.BlockSize = clientSize, serverSize
	served := make(chan error, 1)
	go func() { served <- coap.ServeLink(serverWire, serverConfig, handler) }()
	conn, err := coap.NewClient(clientWire, clientConfig)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := conn.Do(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(conn.Close(), serverWire.Close(), <-served); err != nil {
		t.Error(err)
	}
	return resp, trace
}

// optionBytes are the options of a message as they are on the wire.
func optionBytes(t *testing.T, m *message.Message) string {
	t.Helper()
	datagram := encodeMessage(t, m)
	end := len(datagram)
	if len(m.Payload) > 0 {
		end -= len(m.Payload) + 1
	}
	return fmt.Sprintf("% x", datagram[4+len(m.Token):end])
}

// RFC 9148 appendix B.1: crts in blocks of 64 bytes, byte by byte. The expected
// bytes are those of testdata/rfc9148/README.md.
func TestVectorGet(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 9148 §4.4 (1)")
	t.Attr("shows", "RFC 9148 §4.6 (1)")
	body := vector(t, "crts-response-281.der")
	req := &coap.Request{Method: codes.GET, Host: "example.com", Port: 9085, Path: "/est/crts", Accept: new(uint16(281))}
	const requestOptions = "3b 65 78 61 6d 70 6c 65 2e 63 6f 6d" + // Uri-Host (3) "example.com"
		" 42 23 7d" + // Uri-Port (7) 9085
		" 43 65 73 74" + // Uri-Path (11) "est"
		" 04 63 72 74 73" + // Uri-Path "crts"
		" 62 01 19" // Accept (17) 281
	synctest.Test(t, func(t *testing.T) {
		resp, trace := record(t, 1024, 64, req, func(context.Context, *coap.Request) *coap.Response {
			return &coap.Response{Code: codes.Content, ContentFormat: new(uint16(281)), Body: body}
		})
		if !bytes.Equal(resp.Body, body) {
			t.Errorf("the body has %d bytes, not the %d sent", len(resp.Body), len(body))
		}
		if len(trace) != 20 {
			t.Fatalf("%d datagrams, want 10 requests with their answers", len(trace))
		}
		for i := 0; i < len(trace); i += 2 {
			request, response := trace[i], trace[i+1]
			want := requestOptions
			if i > 0 {
				want += fmt.Sprintf(" 61 %02x", i/2<<4|2) // Block2 (23) i/0/64
			}
			if got := optionBytes(t, request); request.Type != message.Confirmable || request.Code != codes.GET || got != want {
				t.Errorf("request %d: %v %v\n got %s\nwant %s", i/2, request.Type, request.Code, got, want)
			}
			// 0x0A, 0x1A … 0x8A, and 0x92 for the last.
			blockOption := i/2<<4 | 0xa
			if i == 18 {
				blockOption = 0x92
			}
			want = fmt.Sprintf("c2 01 19 b1 %02x", blockOption) // Content-Format (12) 281, Block2 (23)
			if got := optionBytes(t, response); response.Type != message.Acknowledgement || response.Code != codes.Content || got != want {
				t.Errorf("response %d: %v %v\n got %s\nwant %s", i/2, response.Type, response.Code, got, want)
			}
		}
	})
}

// RFC 9148 appendix B.2: sen in blocks of 256 bytes both ways.
func TestVectorPost(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 9148 §4.6 (2)")
	csr, issued := vector(t, "sen-request-286.der"), vector(t, "sen-response-281.der")
	synctest.Test(t, func(t *testing.T) {
		var handled []*coap.Request
		resp, trace := record(t, 256, 256, &coap.Request{
			Method: codes.POST, Path: "/est/sen", ContentFormat: new(uint16(286)), Accept: new(uint16(281)), Body: csr,
		}, func(_ context.Context, req *coap.Request) *coap.Response {
			handled = append(handled, req)
			return &coap.Response{Code: codes.Changed, ContentFormat: new(uint16(281)), Body: issued}
		})
		if len(handled) != 1 || !bytes.Equal(handled[0].Body, csr) {
			t.Errorf("the handler ran %d times", len(handled))
		}
		if !bytes.Equal(resp.Body, issued) {
			t.Errorf("the body has %d bytes, not the %d sent", len(resp.Body), len(issued))
		}
		var got []string
		for _, m := range trace {
			line := codeName(m.Code)
			for _, id := range []message.OptionID{message.ContentFormat, message.Accept, message.Block1, message.Block2, message.Size1, message.RequestTag} {
				v := value(m, id)
				if v == nil {
					continue
				}
				if num, more, size, _ := coap.DecodeBlock(v); id == message.Block1 || id == message.Block2 {
					line += fmt.Sprintf(" %v %d/%t/%d", id, num, more, size)
				} else {
					line += fmt.Sprintf(" %v %x", id, v)
				}
			}
			got = append(got, fmt.Sprintf("%s +%d", line, len(m.Payload)))
		}
		want := []string{
			"POST ContentFormat 011e Accept 0119 Block1 0/true/256 Size1 018f RequestTag 01 +256",
			"Continue Block1 0/true/256 +0",
			"POST ContentFormat 011e Accept 0119 Block1 1/false/256 Block2 0/false/256 RequestTag 01 +143",
			"Changed ContentFormat 0119 Block1 1/false/256 Block2 0/true/256 +256",
			"POST Accept 0119 Block2 1/false/256 RequestTag 01 +0",
			"Changed ContentFormat 0119 Block2 1/true/256 +256",
			"POST Accept 0119 Block2 2/false/256 RequestTag 01 +0",
			"Changed ContentFormat 0119 Block2 2/false/256 +114",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// codeName knows 2.31, which go-coap v3.8.0 has no name for.
func codeName(code codes.Code) string {
	if code == codes.Continue {
		return "Continue"
	}
	return code.String()
}

// RFC 7959 figure 9: a server asks for smaller blocks in its first 2.31, and
// the numbers that follow count in them.
func TestLateNegotiation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, trace := record(t, 128, 32, &coap.Request{Method: codes.PUT, Path: "/x", Body: numbers(200)},
			func(context.Context, *coap.Request) *coap.Response { return &coap.Response{Code: codes.Changed} })
		var got []string
		for _, m := range trace {
			num, more, size, _ := coap.DecodeBlock(value(m, message.Block1))
			got = append(got, fmt.Sprintf("%s %d/%t/%d +%d", codeName(m.Code), num, more, size, len(m.Payload)))
		}
		want := []string{
			"PUT 0/true/128 +128", "Continue 0/true/32 +0",
			"PUT 4/true/32 +32", "Continue 4/true/32 +0",
			"PUT 5/true/32 +32", "Continue 5/true/32 +0",
			"PUT 6/false/32 +8", "Changed 6/false/32 +0",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// step is one response of a server that does as the test says.
type step struct {
	code    codes.Code
	payload []byte
	opts    []message.Option
}

func block2Error(t *testing.T, err error) { blockError(t, "Block2", err) }
func block1Error(t *testing.T, err error) { blockError(t, "Block1", err) }

func blockError(t *testing.T, option string, err error) {
	t.Helper()
	var blockError *coap.BlockError
	if !errors.As(err, &blockError) || blockError.Option != option {
		t.Errorf("got %v, want an error of %s", err, option)
	}
}

func tooLarge(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, coap.ErrBodyTooLarge) {
		t.Errorf("got %v", err)
	}
}

func optionError(t *testing.T, err error) {
	t.Helper()
	var optionError *coap.OptionError
	if !errors.As(err, &optionError) {
		t.Errorf("got %v", err)
	}
}

// Whatever a server answers, the client ends with a whole body or an error of
// its kind. Its blocks are 64 bytes, its limit 256 bytes.
func TestMisbehavingServer(t *testing.T) {
	t.Parallel()
	get := &coap.Request{Method: codes.GET, Path: "/x"}
	post := &coap.Request{Method: codes.POST, Path: "/x", Body: numbers(150)}
	small := &coap.Request{Method: codes.POST, Path: "/x", Body: numbers(50)}
	etag := func(v ...byte) message.Option { return option(message.ETag, v...) }
	format := func(v byte) message.Option { return option(message.ContentFormat, v) }
	content := func(payload []byte, opts ...message.Option) step { return step{codes.Content, payload, opts} }
	next := func(num int) step { return step{codes.Continue, nil, []message.Option{block1(num, true, 64)}} }
	for name, test := range map[string]struct {
		req   *coap.Request
		steps []step
		check func(*testing.T, error)
		want  *coap.Response
	}{
		"whole": {req: get, steps: []step{
			content(numbers(128)[:64], etag(1), block2(0, true, 64)), content(numbers(128)[64:], etag(1), block2(1, false, 64)),
		}, want: &coap.Response{Code: codes.Content, ETag: []byte{1}, Body: numbers(128)}},
		"whole, the last block empty": {req: get, steps: []step{
			content(numbers(64), block2(0, true, 64)), content(nil, block2(1, false, 64)),
		}, want: &coap.Response{Code: codes.Content, Body: numbers(64)}},
		"whole, smaller than asked": {req: get, steps: []step{
			content(numbers(40)[:16], block2(0, true, 16)), content(numbers(40)[16:32], block2(1, true, 16)), content(numbers(40)[32:], block2(2, false, 16)),
		}, want: &coap.Response{Code: codes.Content, Body: numbers(40)}},
		"whole, smaller on the way": {req: get, steps: []step{
			content(numbers(100)[:64], block2(0, true, 64)), content(numbers(100)[64:96], block2(2, true, 32)), content(numbers(100)[96:], block2(3, false, 32)),
		}, want: &coap.Response{Code: codes.Content, Body: numbers(100)}},
		"2.31 with the size of the first block again": {req: post, steps: []step{
			{codes.Continue, nil, []message.Option{block1(0, true, 32)}}, {codes.Continue, nil, []message.Option{block1(2, true, 64)}},
			{codes.Continue, nil, []message.Option{block1(3, true, 32)}}, {codes.Changed, nil, []message.Option{block1(4, false, 32)}},
		}, want: &coap.Response{Code: codes.Changed}},
		"whole, without the option":     {req: get, steps: []step{content(numbers(200))}, want: &coap.Response{Code: codes.Content, Body: numbers(200)}},
		"another ETag":                  {req: get, steps: []step{content(numbers(64), etag(1), block2(0, true, 64)), content(numbers(9), etag(2), block2(1, false, 64))}, check: block2Error},
		"the ETag gone":                 {req: get, steps: []step{content(numbers(64), etag(1), block2(0, true, 64)), content(numbers(9), block2(1, false, 64))}, check: block2Error},
		"another content-format":        {req: get, steps: []step{content(numbers(64), format(1), block2(0, true, 64)), content(numbers(9), format(2), block2(1, false, 64))}, check: block2Error},
		"another code":                  {req: get, steps: []step{content(numbers(64), block2(0, true, 64)), {codes.Changed, numbers(9), []message.Option{block2(1, false, 64)}}}, check: block2Error},
		"the first block missing":       {req: get, steps: []step{content(numbers(64), block2(1, true, 64))}, check: block2Error},
		"a gap":                         {req: get, steps: []step{content(numbers(64), block2(0, true, 64)), content(numbers(64), block2(2, true, 64))}, check: block2Error},
		"a repetition":                  {req: get, steps: []step{content(numbers(64), block2(0, true, 64)), content(numbers(64), block2(0, true, 64))}, check: block2Error},
		"the option gone":               {req: get, steps: []step{content(numbers(64), block2(0, true, 64)), content(numbers(64))}, check: block2Error},
		"a short block":                 {req: get, steps: []step{content(numbers(63), block2(0, true, 64))}, check: block2Error},
		"a long block":                  {req: get, steps: []step{content(numbers(65), block2(0, true, 64))}, check: block2Error},
		"a long last block":             {req: get, steps: []step{content(numbers(65), block2(0, false, 64))}, check: block2Error},
		"larger blocks than asked":      {req: get, steps: []step{content(numbers(128), block2(0, true, 128))}, check: block2Error},
		"larger blocks on the way":      {req: get, steps: []step{content(numbers(64), block2(0, true, 64)), content(numbers(64), block2(1, true, 64)), content(numbers(128), block2(1, false, 128))}, check: block2Error},
		"the reserved size":             {req: get, steps: []step{content(numbers(64), option(message.Block2, 0x0f))}, check: optionError},
		"a block option of four bytes":  {req: get, steps: []step{content(numbers(64), option(message.Block2, 0, 0, 0, 0))}, check: optionError},
		"two block options":             {req: get, steps: []step{content(numbers(64), block2(0, true, 64), block2(0, true, 64))}, check: optionError},
		"an unknown critical option":    {req: get, steps: []step{content(nil, option(9999))}, check: optionError},
		"an unknown elective option":    {req: get, steps: []step{content([]byte("x"), option(9998))}, want: &coap.Response{Code: codes.Content, Body: []byte("x")}},
		"without end":                   {req: get, steps: []step{content(numbers(64), block2(0, true, 64)), content(numbers(64), block2(1, true, 64)), content(numbers(64), block2(2, true, 64)), content(numbers(64), block2(3, true, 64)), content(numbers(64), block2(4, true, 64))}, check: tooLarge},
		"too large, announced":          {req: get, steps: []step{content(numbers(64), block2(0, true, 64), option(message.Size2, 1, 1))}, check: tooLarge},
		"too large at once":             {req: get, steps: []step{content(numbers(257))}, check: tooLarge},
		"an error on the way":           {req: get, steps: []step{content(numbers(64), block2(0, true, 64)), {codes.RequestEntityIncomplete, []byte("gone"), nil}}, want: &coap.Response{Code: codes.RequestEntityIncomplete, Body: []byte("gone")}},
		"an error in blocks":            {req: get, steps: []step{{codes.NotFound, numbers(64), []message.Option{block2(0, true, 64)}}, {codes.NotFound, numbers(9), []message.Option{block2(1, false, 64)}}}, want: &coap.Response{Code: codes.NotFound, Body: slices.Concat(numbers(64), numbers(9))}},
		"2.31 to a small request":       {req: small, steps: []step{{codes.Continue, nil, nil}}, check: block1Error},
		"2.31 to the last block":        {req: post, steps: []step{next(0), next(1), next(2)}, check: block1Error},
		"2.31 without the option":       {req: post, steps: []step{{codes.Continue, nil, nil}}, check: block1Error},
		"2.31 of another block":         {req: post, steps: []step{next(1)}, check: block1Error},
		"2.31 with larger blocks":       {req: post, steps: []step{{codes.Continue, nil, []message.Option{block1(0, true, 128)}}}, check: block1Error},
		"2.04 before the last block":    {req: post, steps: []step{{codes.Changed, nil, []message.Option{block1(0, true, 64)}}}, check: block1Error},
		"an error before the last":      {req: post, steps: []step{next(0), {codes.Forbidden, []byte("no"), nil}}, want: &coap.Response{Code: codes.Forbidden, Body: []byte("no")}},
		"a last answer without Block1":  {req: post, steps: []step{next(0), next(1), {codes.Changed, nil, nil}}, want: &coap.Response{Code: codes.Changed}},
		"4.08, then the whole again":    {req: post, steps: []step{next(0), {codes.RequestEntityIncomplete, nil, nil}, next(0), next(1), {codes.Changed, nil, nil}}, want: &coap.Response{Code: codes.Changed}},
		"4.08 twice":                    {req: post, steps: []step{next(0), {codes.RequestEntityIncomplete, nil, nil}, {codes.RequestEntityIncomplete, nil, nil}}, want: &coap.Response{Code: codes.RequestEntityIncomplete}},
		"4.08 to the last block":        {req: post, steps: []step{next(0), next(1), {codes.RequestEntityIncomplete, nil, nil}}, want: &coap.Response{Code: codes.RequestEntityIncomplete}},
		"4.13 with a smaller size":      {req: small, steps: []step{{codes.RequestEntityTooLarge, nil, []message.Option{block1(0, true, 32)}}, {codes.Continue, nil, []message.Option{block1(0, true, 32)}}, {codes.Changed, nil, nil}}, want: &coap.Response{Code: codes.Changed}},
		"4.13 with a smaller size, big": {req: &coap.Request{Method: codes.POST, Path: "/x", Body: numbers(65)}, steps: []step{{codes.RequestEntityTooLarge, nil, []message.Option{block1(0, true, 32)}}, {codes.Continue, nil, []message.Option{block1(0, true, 32)}}, {codes.Continue, nil, []message.Option{block1(1, true, 32)}}, {codes.Changed, nil, nil}}, want: &coap.Response{Code: codes.Changed}},
		"4.13 with a smaller size twice": {req: small, steps: []step{
			{codes.RequestEntityTooLarge, nil, []message.Option{block1(0, true, 32)}}, {codes.RequestEntityTooLarge, nil, []message.Option{block1(0, true, 16)}},
		}, want: &coap.Response{Code: codes.RequestEntityTooLarge}},
		"4.13 with the same size": {req: post, steps: []step{{codes.RequestEntityTooLarge, nil, []message.Option{block1(0, true, 64)}}}, want: &coap.Response{Code: codes.RequestEntityTooLarge}},
		"4.13 with Size1":         {req: post, steps: []step{{codes.RequestEntityTooLarge, nil, []message.Option{option(message.Size1, 100)}}}, want: &coap.Response{Code: codes.RequestEntityTooLarge}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t)
				cfg := plain()
				cfg.BlockSize, cfg.MaxBody = 64, 256
				done := do(t.Context(), p.client(cfg), test.req)
				tags := map[string][]string{} // of the blocks of each upload
				var uploads []string
				tokens := map[string]bool{}
				for _, s := range test.steps {
					m := p.respond(s.code, s.payload, s.opts...)
					if tokens[string(m.Token)] || len(m.Token) != 8 {
						t.Errorf("the token %x is no fresh one of 8 bytes", m.Token)
					}
					tokens[string(m.Token)] = true
					if b1 := value(m, message.Block1); b1 != nil {
						tag := string(value(m, message.RequestTag))
						if num, _, _, _ := coap.DecodeBlock(b1); num == 0 {
							uploads = append(uploads, tag)
						}
						tags[tag] = append(tags[tag], string(b1))
					}
				}
				got := <-done
				if test.check != nil {
					if got.err == nil {
						t.Fatalf("got %+v", got.resp)
					}
					test.check(t, got.err)
					return
				}
				if got.err != nil {
					t.Fatal(got.err)
				}
				if diff := cmp.Diff(test.want, got.resp); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				// A new upload has a new tag.
				if len(tags) != len(uploads) {
					t.Errorf("%d uploads with the tags %x", len(uploads), uploads)
				}
				p.nothing(1e9)
			})
		})
	}
}

// What is put together of blocks may be a key: it is in one place alone then.
func TestAppendSecret(t *testing.T) {
	first, second, third := bytes.Repeat([]byte{1}, 16), bytes.Repeat([]byte{2}, 16), bytes.Repeat([]byte{3}, 8)
	body := coap.AppendSecret(coap.AppendSecret(first, second), third)
	if want := slices.Concat(bytes.Repeat([]byte{1}, 16), bytes.Repeat([]byte{2}, 16), bytes.Repeat([]byte{3}, 8)); !bytes.Equal(body, want) {
		t.Errorf("got %x", body)
	}
	for _, left := range [][]byte{first, second, third} {
		if !bytes.Equal(left, make([]byte, len(left))) {
			t.Errorf("%x is still there", left)
		}
	}
}
