package coap_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"
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

func number(n uint16) *uint16 { return &n }

func TestExchange(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	handled := make(chan *coap.Request, 1)
	maxAge := uint32(90)
	addr := serve(t, p.serverConfig(), func(_ context.Context, req *coap.Request) *coap.Response {
		handled <- req
		return &coap.Response{Code: codes.Changed, ContentFormat: number(281), MaxAge: &maxAge, ETag: []byte{1}, Body: bytes.ToUpper(req.Body)}
	})
	conn := dial(t, addr, p.clientConfig())
	req := &coap.Request{
		Method: codes.POST, Host: "ca.example", Port: 61616, Path: "/.well-known/est/sen", Query: []string{"a=b", "c"},
		ContentFormat: number(286), Accept: number(287), Body: []byte("hello"),
	}
	resp, err := conn.Do(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	want := &coap.Response{Code: codes.Changed, ContentFormat: number(281), MaxAge: &maxAge, ETag: []byte{1}, Body: []byte("HELLO")}
	if diff := cmp.Diff(want, resp); diff != "" {
		t.Errorf("response (-want +got):\n%s", diff)
	}
	got := <-handled
	if len(got.Peer) != 1 || !bytes.Equal(got.Peer[0].Raw, p.client.chain[0]) {
		t.Errorf("the handler's peer is %v", got.Peer)
	}
	got.Peer = nil
	if diff := cmp.Diff(req, got); diff != "" {
		t.Errorf("request (-sent +handled):\n%s", diff)
	}
	if !conn.ClientAuthenticated() {
		t.Error("the client's certificate was not asked for")
	}
	if peer := conn.PeerCertificates(); len(peer) != 1 || !bytes.Equal(peer[0].Raw, p.server.chain[0]) {
		t.Errorf("the server's chain is %v", peer)
	}
}

// Both bodies of one exchange, in every pair of block sizes.
func TestBlockSizes(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	sizes := []int{16, 32, 64, 128, 256, 512, 1024}
	for _, serverSize := range sizes {
		cfg := p.serverConfig()
		cfg.BlockSize = serverSize
		addr := serve(t, cfg, echo)
		for _, clientSize := range sizes {
			cfg := p.clientConfig()
			cfg.BlockSize = clientSize
			conn := dial(t, addr, cfg)
			for _, length := range []int{0, 1, 15, 16, 17, clientSize - 1, clientSize, clientSize + 1, serverSize - 1, serverSize, serverSize + 1, 2048, 2085} {
				body := bytes.Repeat([]byte("0123456789abcdefg"), length/17+1)[:length]
				resp, err := conn.Do(t.Context(), &coap.Request{Method: codes.POST, Path: "/echo", ContentFormat: number(286), Body: body})
				if err != nil {
					t.Fatalf("client %d, server %d, %d bytes: %v", clientSize, serverSize, length, err)
				}
				if resp.Code != codes.Changed || !bytes.Equal(resp.Body, body) {
					t.Errorf("client %d, server %d, %d bytes: got %v and %d bytes", clientSize, serverSize, length, resp.Code, len(resp.Body))
				}
			}
		}
	}
}
