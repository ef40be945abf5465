package coap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Handler answers one whole request. It runs in a goroutine of its own, once
// per request, whatever is lost, repeated or asked for again. Its context ends
// with the connection; a handler that outlives it holds up Close. A nil
// response, or a panic, is answered 5.00.
type Handler func(ctx context.Context, req *Request) *Response

// Server answers requests over DTLS.
type Server struct {
	cfg     Config
	options []dtls.ServerOption
	socket  *socket
	ctx     context.Context
	cancel  context.CancelFunc
	serving sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[*accepted]struct{}
}

// Listen opens a server's socket at addr, "host:port". Nothing is answered
// before Serve.
func Listen(addr string, cfg Config) (*Server, error) {
	cfg, err := cfg.withDefaults()
	if err == nil && cfg.Key == nil {
		err = errors.New("configuration: a server needs a certificate")
	}
	if err != nil {
		return nil, fmt.Errorf("listen: %s: %w", addr, err)
	}
	udpAddr, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen: %s: %w", addr, err)
	}
	socket, err := listenUDP(udpAddr)
	if err != nil {
		return nil, fmt.Errorf("listen: %s: %w", addr, err)
	}
	s := &Server{cfg: cfg, options: serverOptions(&cfg), socket: socket, conns: map[*accepted]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Addr is the socket's address.
func (s *Server) Addr() net.Addr { return s.socket.Addr() }

// Serve answers requests until Close, which makes it return nil.
func (s *Server) Serve(handler Handler) error {
	for {
		conn, err := accept(s.socket, s.options)
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			if err == nil {
				_ = conn.Close()
			}
			return nil
		}
		if err != nil {
			s.mu.Unlock()
			return fmt.Errorf("accept: %s: %w", s.Addr(), err)
		}
		if len(s.conns) >= s.cfg.MaxConnections {
			s.mu.Unlock()
			s.cfg.Logger.Warn("coap: too many connections", "peer", conn.RemoteAddr(), "limit", s.cfg.MaxConnections)
			_ = conn.Close()
			continue
		}
		s.conns[conn] = struct{}{}
		s.serving.Go(func() { s.serve(conn, handler) })
		s.mu.Unlock()
	}
}

// Close ends every connection and waits for the handlers, whose contexts end.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	conns := s.conns
	s.conns = map[*accepted]struct{}{}
	s.mu.Unlock()
	err := s.socket.Close()
	for conn := range conns {
		// Closing twice is no error, and the peer may have closed before us.
		_ = conn.Close()
	}
	// After the connections: a handler that gives up must not become a 5.00.
	s.cancel()
	s.serving.Wait()
	err = errors.Join(err, s.socket.shut())
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close: %s: %w", s.Addr(), err)
	}
	return nil
}

func (s *Server) serve(conn *accepted, handler Handler) {
	defer func() {
		_ = conn.Close()
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
	}()
	client, err := conn.shake(s.ctx, &s.cfg)
	if err != nil {
		s.cfg.Logger.Info("coap: handshake", "peer", conn.RemoteAddr(), "error", err)
		return
	}
	serveLink(s.ctx, conn, s.cfg, handler, client)
}

// serveLink answers requests until the link ends.
func serveLink(ctx context.Context, link link, cfg Config, handler Handler, client client) {
	ctx, cancel := context.WithCancel(ctx)
	r := &responder{handler: handler, ctx: ctx, client: client}
	r.conn = newConn(link, cfg, r)
	r.conn.read()
	cancel()
	r.handling.Wait()
}

const (
	// maxTransfers bounds, for each connection, the request bodies being
	// assembled, and the response bodies being kept; each has at most MaxBody
	// bytes. The oldest makes room.
	maxTransfers = 4
	// maxHandlers bounds the handlers that run for one connection. A client that
	// keeps to NSTART (RFC 7252 §4.7) has one.
	maxHandlers = 4
)

// responder is the server's side of a connection.
type responder struct {
	conn     *Conn
	handler  Handler
	ctx      context.Context
	client   client
	handling sync.WaitGroup

	mu         sync.Mutex
	active     int
	assemblies transfers[*assembly]
	kept       transfers[*kept]
}

// assembly is a request body of which some blocks have arrived.
type assembly struct {
	contentFormat *uint16
	body          []byte
}

// kept is a response of which some blocks have been sent. The handler is done
// with it: what follows is served from here.
type kept struct {
	code Code
	opts options
	body []byte
}

// transferKey tells the transfers of one connection apart (RFC 9175 §3.3). Its
// parts are quoted, so that no two sets of options share one.
type transferKey string

func keyOf(method Code, o *options) transferKey {
	return transferKey(fmt.Sprintf("%d %q %q %q", method, o.path, o.query, o.requestTags))
}

// transfers holds at most maxTransfers of one kind, each for EXCHANGE_LIFETIME
// after it was last used (RFC 7959 §2.4, §2.5).
type transfers[T any] struct {
	entries []transferEntry[T]
}

type transferEntry[T any] struct {
	key     transferKey
	value   T
	touched time.Time
}

func (t *transfers[T]) put(key transferKey, value T, now time.Time) {
	t.drop(key)
	t.expire(now)
	if len(t.entries) == maxTransfers {
		t.entries = slices.Delete(t.entries, 0, 1)
	}
	t.entries = append(t.entries, transferEntry[T]{key, value, now})
}

func (t *transfers[T]) get(key transferKey, now time.Time) (value T, found bool) {
	t.expire(now)
	for i := range t.entries {
		if t.entries[i].key == key {
			t.entries[i].touched = now
			return t.entries[i].value, true
		}
	}
	return value, false
}

func (t *transfers[T]) expire(now time.Time) {
	t.entries = slices.DeleteFunc(t.entries, func(e transferEntry[T]) bool { return now.Sub(e.touched) > exchangeLifetime })
}

func (t *transfers[T]) drop(key transferKey) {
	t.entries = slices.DeleteFunc(t.entries, func(e transferEntry[T]) bool { return e.key == key })
}

// busy reports whether a handler is running.
func (r *responder) busy() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.active > 0
}

// request handles one message, called by the reader for each once.
func (r *responder) request(m *message.Message) {
	o, err := decodeOptions(m.Options)
	if err != nil {
		// RFC 7252 §5.4.1: in a non-confirmable request, such an option "MUST
		// cause the message to be rejected".
		var optionError *OptionError
		if m.Type == message.Confirmable && errors.As(err, &optionError) {
			r.respond(m, optionError.code, options{}, []byte(err.Error()))
		}
		return
	}
	if slices.ContainsFunc(o.path, func(segment string) bool { return strings.Contains(segment, "/") }) {
		// Request.Path could not tell it from two segments.
		r.respond(m, codes.NotFound, options{}, nil)
		return
	}
	key := keyOf(m.Code, o)
	if o.block2 != nil && o.block2.num > 0 && o.block1 == nil {
		r.continueResponse(m, key, *o.block2)
		return
	}
	body, refusal := r.body(key, o, m.Payload)
	if refusal != nil {
		r.respond(m, refusal.code, refusal.opts, []byte(refusal.diagnostic))
		return
	}
	// The client's blocks tell the size of its liking, and an explicit Block2
	// tells it better.
	wanted := wanted{size: r.conn.cfg.BlockSize, total: o.size2 != nil}
	switch {
	case o.block2 != nil:
		wanted.size = min(wanted.size, o.block2.size)
	case o.block1 != nil:
		wanted.size = min(wanted.size, o.block1.size)
	}
	r.handle(m, key, &Request{
		Method: m.Code, Host: o.host, Port: o.port,
		Path: "/" + strings.Join(o.path, "/"), Query: o.query,
		ContentFormat: o.contentFormat, Accept: o.accept, Body: body, Peer: r.client.chain, PSKIdentity: r.client.identity, ChannelBinding: r.client.binding,
	}, wanted, o.block1)
}

// wanted is how a client wants its response.
type wanted struct {
	size  int  // of a block, at most
	total bool // RFC 7959 §4: a Size2 in the request asks for one in the response
}

// body is the whole body of a request, or a refusal of what came.
func (r *responder) body(key transferKey, o *options, payload []byte) ([]byte, *refusal) {
	cfg := &r.conn.cfg
	if o.size1 != nil && uint64(*o.size1) > uint64(cfg.MaxBody) || len(payload) > cfg.MaxBody {
		return nil, tooLarge(cfg)
	}
	if o.block1 != nil {
		return r.assemble(key, o, payload)
	}
	if len(payload) > cfg.BlockSize {
		// RFC 7959 §2.9.3: the hint says which size would do.
		return nil, &refusal{code: codes.RequestEntityTooLarge, opts: options{block1: &block{more: true, size: cfg.BlockSize}}}
	}
	return payload, nil
}

// tooLarge is a 4.13 whose Size1 is "the maximum size of the representation
// that the server is able and willing to handle" (RFC 7252 §5.9.2.9).
func tooLarge(cfg *Config) *refusal {
	return &refusal{code: codes.RequestEntityTooLarge, opts: options{size1: pointer(uint32(cfg.MaxBody))}}
}

// refusal is an answer to a block that needs no handler.
type refusal struct {
	code       Code
	opts       options
	diagnostic string
}

// assemble adds a block to its body (RFC 7959 §2.5). It returns the whole body
// with the last block, and otherwise a refusal or a 2.31.
func (r *responder) assemble(key transferKey, o *options, payload []byte) ([]byte, *refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b, now := *o.block1, time.Now()
	a, found := r.assemblies.get(key, now)
	switch {
	case b.num == 0:
		a = &assembly{contentFormat: o.contentFormat}
		r.assemblies.put(key, a, now)
	case !found:
		return nil, &refusal{code: codes.RequestEntityIncomplete, diagnostic: "no earlier block"}
	}
	switch {
	case b.offset() != len(a.body):
		// The body stays: a late copy of an earlier block must not undo it.
		return nil, &refusal{code: codes.RequestEntityIncomplete, diagnostic: fmt.Sprintf("the next block begins at %d", len(a.body))}
	case !equal(a.contentFormat, o.contentFormat):
		// RFC 7959 §2.9.2: "a mismatch in the Content-Format".
		r.assemblies.drop(key)
		return nil, &refusal{code: codes.RequestEntityIncomplete, diagnostic: "another content-format"}
	case b.more && len(payload) != b.size || len(payload) > b.size:
		r.assemblies.drop(key)
		return nil, &refusal{code: codes.BadRequest, diagnostic: "payload and block size differ"}
	case len(a.body)+len(payload) > r.conn.cfg.MaxBody:
		r.assemblies.drop(key)
		return nil, tooLarge(&r.conn.cfg)
	}
	a.body = append(a.body, payload...)
	if !b.more {
		r.assemblies.drop(key)
		return a.body, nil
	}
	// RFC 7959 §2.3: a smaller size asks for the blocks to come.
	b.size = min(b.size, r.conn.cfg.BlockSize)
	return nil, &refusal{code: codes.Continue, opts: options{block1: &b}}
}

// handle runs the handler, and sends its response in the ACK or, if it takes
// longer than the processing delay, in a message of its own.
func (r *responder) handle(m *message.Message, key transferKey, req *Request, wanted wanted, block1 *block) {
	r.mu.Lock()
	admitted := r.active < maxHandlers
	if admitted {
		r.active++
	}
	r.mu.Unlock()
	if !admitted {
		r.respond(m, codes.TooManyRequests, options{maxAge: pointer(uint32(1))}, nil) // RFC 8516 §3
		return
	}
	answered := make(chan *Response, 1)
	r.handling.Go(func() { answered <- r.call(req) })
	r.handling.Go(func() {
		defer func() {
			r.mu.Lock()
			r.active--
			r.mu.Unlock()
		}()
		delay := time.NewTimer(r.conn.cfg.ProcessingDelay)
		defer delay.Stop()
		select {
		case resp := <-answered:
			code, opts, payload := r.begin(key, resp, wanted)
			opts.block1 = block1
			r.respond(m, code, opts, payload)
			return
		case <-delay.C:
		}
		mid := uint16(m.MessageID)
		if m.Type == message.Confirmable {
			r.conn.reply(mid, emptyMessage(message.Acknowledgement, mid))
		}
		code, opts, payload := r.begin(key, <-answered, wanted)
		opts.block1 = block1
		// RFC 7252 §5.2.2: "the server sends back the response in a Confirmable
		// message with the same token".
		err := r.conn.transmit(r.ctx, &message.Message{Code: code, Token: m.Token, Options: opts.encode(), Payload: payload})
		if err != nil {
			r.conn.cfg.Logger.Warn("coap: separate response", "peer", r.conn.link.RemoteAddr(), "error", err)
		}
	})
}

// call is the handler, guarded.
func (r *responder) call(req *Request) (resp *Response) {
	logger, failed := r.conn.cfg.Logger, &Response{Code: codes.InternalServerError}
	defer func() {
		if cause := recover(); cause != nil {
			logger.Error("coap: handler", "path", req.Path, "panic", cause)
			resp = failed
		}
	}()
	resp = r.handler(r.ctx, req)
	switch {
	case resp == nil:
		logger.Error("coap: handler", "path", req.Path, "error", "no response")
	case resp.Code>>5 != 2 && resp.Code>>5 != 4 && resp.Code>>5 != 5:
		logger.Error("coap: handler", "path", req.Path, "error", "no response code", "code", resp.Code)
	case len(resp.Body) > r.conn.cfg.MaxBody:
		logger.Error("coap: handler", "path", req.Path, "error", ErrBodyTooLarge, "bytes", len(resp.Body))
	case len(resp.ETag) > 8:
		logger.Error("coap: handler", "path", req.Path, "error", "an ETag of more than 8 bytes")
	default:
		return resp
	}
	return failed
}

// begin is the first message of a response, of which the rest is kept.
func (r *responder) begin(key transferKey, resp *Response, wanted wanted) (Code, options, []byte) {
	k := &kept{
		code: resp.Code, body: resp.Body,
		opts: options{contentFormat: resp.ContentFormat, maxAge: resp.MaxAge, etag: resp.ETag},
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kept.drop(key)
	opts, payload := k.opts, k.body
	if len(k.body) > wanted.size {
		r.kept.put(key, k, time.Now())
		opts, payload = k.block(0, wanted.size)
	}
	if wanted.total {
		opts.size2 = pointer(uint32(len(k.body)))
	}
	return k.code, opts, payload
}

// block is the block that begins at offset.
func (k *kept) block(offset, size int) (options, []byte) {
	opts, end := k.opts, min(offset+size, len(k.body))
	opts.block2 = &block{num: offset / size, more: end < len(k.body), size: size}
	return opts, k.body[offset:end]
}

// continueResponse serves a further block of a response. It never runs the
// handler: whoever asks for what is not kept has to begin again.
func (r *responder) continueResponse(m *message.Message, key transferKey, b block) {
	r.mu.Lock()
	k, found := r.kept.get(key, time.Now())
	r.mu.Unlock()
	switch {
	case !found:
		r.respond(m, codes.RequestEntityIncomplete, options{}, []byte("the response is not kept any more"))
	case b.offset() >= len(k.body):
		r.respond(m, codes.BadRequest, options{}, []byte("block out of range"))
	default:
		// The number counts in the size that was asked for; a smaller one of ours
		// keeps the offset (RFC 7959 §2.4).
		opts, payload := k.block(b.offset(), min(b.size, r.conn.cfg.BlockSize))
		r.respond(m, k.code, opts, payload)
	}
}

// respond answers a message at once: in the ACK of a confirmable one.
func (r *responder) respond(m *message.Message, code Code, opts options, payload []byte) {
	answer := &message.Message{
		Type: message.Acknowledgement, MessageID: m.MessageID,
		Code: code, Token: m.Token, Options: opts.encode(), Payload: payload,
	}
	if m.Type != message.Confirmable {
		answer.Type = message.NonConfirmable
		r.conn.mu.Lock()
		answer.MessageID = int32(r.conn.takeMID())
		r.conn.mu.Unlock()
	}
	r.conn.reply(uint16(m.MessageID), answer)
}
