package coap_test

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/udp/coder"

	"estenroll/internal/coap"
)

// wire is one end of a connection without DTLS. What it reads comes from in;
// what is written goes to out. Its tests run in synctest bubbles, so their
// clock is exact and nothing waits in vain.
type wire struct {
	in     chan []byte
	out    func([]byte)
	closed chan struct{}
	once   sync.Once
	ends   bool // when in is empty

	mu       sync.Mutex
	deadline time.Time
}

func newWire(out func([]byte)) *wire {
	return &wire{in: make(chan []byte, 1024), out: out, closed: make(chan struct{})}
}

func (w *wire) Read(buf []byte) (int, error) {
	w.mu.Lock()
	deadline := w.deadline
	w.mu.Unlock()
	var timeout <-chan time.Time
	if !deadline.IsZero() {
		timer := time.NewTimer(time.Until(deadline))
		defer timer.Stop()
		timeout = timer.C
	}
	if w.ends && len(w.in) == 0 {
		return 0, io.EOF
	}
	select {
	case datagram := <-w.in:
		return copy(buf, datagram), nil
	case <-w.closed:
		return 0, io.EOF
	case <-timeout:
		return 0, os.ErrDeadlineExceeded
	}
}

func (w *wire) Write(datagram []byte) (int, error) {
	select {
	case <-w.closed:
		return 0, net.ErrClosed
	default:
		w.out(slices.Clone(datagram))
		return len(datagram), nil
	}
}

func (w *wire) Close() error {
	w.once.Do(func() { close(w.closed) })
	return nil
}

func (w *wire) SetReadDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deadline = t
	return nil
}

func (w *wire) RemoteAddr() net.Addr { return &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 5684} }

func accept([]*x509.Certificate) error { return nil }

// plain is a configuration for a wire: no certificates, RFC 7252's own times.
func plain() coap.Config { return coap.Config{Verify: accept} }

func encodeMessage(t testing.TB, m *message.Message) []byte {
	t.Helper()
	size, err := coder.DefaultCoder.Size(*m)
	if err != nil {
		t.Fatal(err)
	}
	datagram := make([]byte, size)
	if _, err := coder.DefaultCoder.Encode(*m, datagram); err != nil {
		t.Fatal(err)
	}
	return datagram
}

func decodeMessage(t testing.TB, datagram []byte) *message.Message {
	t.Helper()
	m := &message.Message{Options: make(message.Options, 0, 64)}
	if _, err := coder.DefaultCoder.Decode(datagram, m); err != nil {
		t.Fatalf("%x: %v", datagram, err)
	}
	return m
}

// peer is the test at the other end of a wire: it sends and reads messages one
// by one.
type peer struct {
	t    testing.TB
	wire *wire
	sent chan *message.Message // by the connection under test
	mid  int32
}

func newPeer(t testing.TB) *peer {
	p := &peer{t: t, sent: make(chan *message.Message, 1024)}
	p.wire = newWire(func(datagram []byte) { p.sent <- decodeMessage(t, datagram) })
	return p
}

// next is the next message of the connection under test, however long it takes.
func (p *peer) next() *message.Message {
	p.t.Helper()
	select {
	case m := <-p.sent:
		return m
	case <-time.After(time.Hour):
		p.t.Fatal("no message in an hour")
		return nil
	}
}

// nothing fails if the connection under test sends within d.
func (p *peer) nothing(d time.Duration) {
	p.t.Helper()
	select {
	case m := <-p.sent:
		p.t.Fatalf("unexpected message: %v", m)
	case <-time.After(d):
	}
}

func (p *peer) send(m *message.Message) {
	p.t.Helper()
	p.raw(encodeMessage(p.t, m))
}

func (p *peer) raw(datagram []byte) { p.wire.in <- datagram }

// client is a connection under test with the peer as its server.
func (p *peer) client(cfg coap.Config) *coap.Conn {
	p.t.Helper()
	conn, err := coap.NewClient(p.wire, cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			p.t.Error(err)
		}
	})
	return conn
}

// server puts a server under test at the other end.
func (p *peer) server(cfg coap.Config, handler coap.Handler) {
	p.t.Helper()
	served := make(chan error, 1)
	go func() { served <- coap.ServeLink(p.wire, cfg, handler) }()
	p.t.Cleanup(func() {
		_ = p.wire.Close()
		if err := <-served; err != nil {
			p.t.Error(err)
		}
	})
}

// ask sends a confirmable request with a message ID and a token of its own.
func (p *peer) ask(code codes.Code, payload []byte, opts ...message.Option) *message.Message {
	p.t.Helper()
	p.mid++
	m := &message.Message{
		Type: message.Confirmable, Code: code, MessageID: p.mid, Token: []byte{byte(p.mid >> 8), byte(p.mid)},
		Options: opts, Payload: payload,
	}
	slices.SortStableFunc(m.Options, func(a, b message.Option) int { return int(a.ID) - int(b.ID) })
	p.send(m)
	return m
}

// answer is the piggybacked response to a request of ask.
func (p *peer) answer(to *message.Message) *message.Message {
	p.t.Helper()
	m := p.next()
	if m.Type != message.Acknowledgement || m.MessageID != to.MessageID || string(m.Token) != string(to.Token) {
		p.t.Fatalf("not the answer to %v: %v", to, m)
	}
	return m
}

// respond answers the next request of the connection under test in its ACK.
func (p *peer) respond(code codes.Code, payload []byte, opts ...message.Option) *message.Message {
	p.t.Helper()
	m := p.next()
	p.send(&message.Message{
		Type: message.Acknowledgement, Code: code, MessageID: m.MessageID, Token: m.Token, Options: opts, Payload: payload,
	})
	return m
}

func option(id message.OptionID, value ...byte) message.Option {
	return message.Option{ID: id, Value: value}
}

func path(segment string) message.Option { return option(message.URIPath, []byte(segment)...) }

func block1(num int, more bool, size int) message.Option {
	return option(message.Block1, coap.EncodeBlock(num, more, size)...)
}

func block2(num int, more bool, size int) message.Option {
	return option(message.Block2, coap.EncodeBlock(num, more, size)...)
}

// value is the value of an option, nil if it is absent.
func value(m *message.Message, id message.OptionID) []byte {
	for _, o := range m.Options {
		if o.ID == id {
			if o.Value == nil {
				return []byte{}
			}
			return o.Value
		}
	}
	return nil
}

// numbers counts up, so that a block out of place shows.
func numbers(length int) []byte {
	body := make([]byte, length)
	for i := range body {
		body[i] = byte(i>>4 + i)
	}
	return body
}

// outcome is what Do returned.
type outcome struct {
	resp *coap.Response
	err  error
}

func do(ctx context.Context, conn *coap.Conn, req *coap.Request) <-chan outcome {
	done := make(chan outcome, 1)
	go func() {
		resp, err := conn.Do(ctx, req)
		done <- outcome{resp, err}
	}()
	return done
}

func isTimeout(err error) bool {
	return errors.Is(err, coap.ErrTimeout) && errors.Is(err, context.DeadlineExceeded)
}
