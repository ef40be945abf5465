package coap

import (
	"context"
	crand "crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/pion/dtls/v3/pkg/crypto/clientcertificate"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/udp/coder"
)

var (
	// ErrTimeout is an exchange or a handshake that was given up. It wraps
	// context.DeadlineExceeded.
	ErrTimeout error = timeoutError{}
	// ErrReset is a request that the peer rejected with a Reset (RFC 7252 §4.2).
	ErrReset = errors.New("reset by the peer")
	// ErrClosed is a connection that was closed, by either end.
	ErrClosed = errors.New("connection closed")
)

// timeoutError says what a person understands of context.DeadlineExceeded.
type timeoutError struct{}

func (timeoutError) Error() string { return "no answer" }
func (timeoutError) Unwrap() error { return context.DeadlineExceeded }

const (
	// exchangeLifetime is EXCHANGE_LIFETIME (RFC 7252 §4.8.2): how long a
	// message ID must not be reused, so how long a duplicate may arrive.
	exchangeLifetime = 247 * time.Second
	// maxRemembered bounds the messages whose replies are kept for duplicates.
	// It is enough: DTLS drops a record that is 64 or more behind the newest
	// (pion's window, RFC 6347 §4.1.2.6), however long the network held it.
	maxRemembered = 128
	// maxDatagram is more than any message of 1024 bytes of payload takes.
	maxDatagram = 8192
	// maxOptions is more than any request of ours, or of EST, has.
	maxOptions = 64
	tokenSize  = 8
)

// link is what a Conn needs of a *dtls.Conn.
type link interface {
	io.ReadWriteCloser
	SetReadDeadline(time.Time) error
	RemoteAddr() net.Addr
}

// Conn is one end of a connection. It is safe for concurrent use; requests take
// turns, since NSTART is 1 (RFC 9148 §6).
type Conn struct {
	link          link
	cfg           Config
	peer          []*x509.Certificate
	authenticated bool
	keyTypes      []clientcertificate.Type // that the server asked for
	binding       []byte                   // tls-unique
	unbound       error                    // why there is no binding
	responder     *responder               // nil: requests of the peer are rejected

	turn    chan struct{}
	done    chan struct{} // closed after the last datagram was read
	reading sync.WaitGroup

	mu          sync.Mutex
	err         error // why done is closed
	nextMID     uint16
	nextTag     uint32
	outstanding map[uint16]*outgoing
	calls       map[string]chan *message.Message
	ignored     ignored
	remembered  memory
}

// ignored counts what came and was no answer: somebody there answers wrongly,
// which silence would hide.
type ignored struct {
	malformed int
	foreign   int // with a token that was not asked with
}

// outgoing is a confirmable message that waits for its ACK.
type outgoing struct {
	token string
	acked chan struct{}
	reset chan struct{}
}

func newConn(link link, cfg Config, responder *responder) *Conn {
	return &Conn{
		link: link, cfg: cfg, responder: responder,
		turn:        make(chan struct{}, 1),
		done:        make(chan struct{}),
		nextMID:     uint16(rand.Uint32()),
		outstanding: map[uint16]*outgoing{},
		calls:       map[string]chan *message.Message{},
		remembered:  memory{replies: map[uint16]*remembered{}},
	}
}

func (c *Conn) start() { c.reading.Go(c.read) }

// Close ends the connection and every exchange on it.
func (c *Conn) Close() error {
	err := c.link.Close()
	c.reading.Wait()
	return err
}

// read receives until the connection ends.
func (c *Conn) read() {
	buf := make([]byte, maxDatagram)
	defer clear(buf) // what came last may be of a key
	for {
		if c.responder != nil {
			// Fails only for a closed connection, which Read reports.
			_ = c.link.SetReadDeadline(time.Now().Add(c.cfg.IdleTimeout))
		}
		n, err := c.link.Read(buf)
		var timeout net.Error
		switch {
		case err == nil:
			c.receive(slices.Clone(buf[:n]))
			continue
		case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
			err = ErrClosed
		case errors.As(err, &timeout) && timeout.Timeout():
			if c.responder != nil && c.responder.busy() {
				continue
			}
			err = fmt.Errorf("%w: idle", ErrClosed)
			// The peer is not waiting for what the close says.
			_ = c.link.Close()
		case errors.Is(err, syscall.ECONNREFUSED):
			// The peer's socket is gone, and the session with it: waiting for
			// the last retransmission would change nothing.
			err = errors.Join(ErrClosed, err)
			_ = c.link.Close()
		default:
			// A record that is no record, or a warning: DTLS ignores both.
			c.cfg.Logger.Debug("coap: read", "peer", c.link.RemoteAddr(), "error", err)
			continue
		}
		c.mu.Lock()
		c.err = err
		c.mu.Unlock()
		close(c.done)
		return
	}
}

// receive handles one datagram (RFC 7252 §4.2, §4.3).
func (c *Conn) receive(datagram []byte) {
	// "Messages with unknown version numbers MUST be silently ignored"
	// (RFC 7252 §3); what is shorter than a header has no ID to reject.
	if len(datagram) < 4 || datagram[0]>>6 != 1 {
		return
	}
	m := &message.Message{Options: make(message.Options, 0, maxOptions)}
	_, err := coder.DefaultCoder.Decode(datagram, m)
	kind, mid := message.Type(datagram[0]>>4&3), uint16(datagram[2])<<8|uint16(datagram[3])
	class := datagram[1] >> 5
	empty := datagram[1] == byte(codes.Empty)
	malformed := err != nil ||
		class == 1 || class == 6 || class == 7 || // reserved (RFC 7252 §3, §4.2)
		empty && len(datagram) > 4 // RFC 7252 §4.1

	switch kind {
	case message.Acknowledgement, message.Reset:
		if malformed || kind == message.Acknowledgement && class == 0 && !empty {
			c.count(func(i *ignored) { i.malformed++ })
			return
		}
		c.acknowledged(kind, mid, m)
		return
	}
	confirmable := kind == message.Confirmable
	if malformed || empty {
		if malformed {
			c.count(func(i *ignored) { i.malformed++ })
		}
		if confirmable {
			// A format error, or a ping (RFC 7252 §4.3).
			c.sendEmpty(message.Reset, mid)
		}
		return
	}
	reply, duplicate := c.remember(mid)
	if duplicate {
		if reply != nil {
			c.write(reply)
		}
		return
	}
	switch {
	case class >= 2 && c.deliver(m):
		if confirmable {
			c.reply(mid, emptyMessage(message.Acknowledgement, mid))
		}
	case class == 0 && c.responder != nil:
		c.responder.request(m)
	case confirmable:
		c.reply(mid, emptyMessage(message.Reset, mid))
	}
}

func (c *Conn) count(one func(*ignored)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	one(&c.ignored)
}

// acknowledged matches an ACK or a Reset with the message it is for.
func (c *Conn) acknowledged(kind message.Type, mid uint16, m *message.Message) {
	c.mu.Lock()
	out, found := c.outstanding[mid]
	// A piggybacked response carries its request's token (RFC 7252 §5.3.2).
	if !found || m.Code != codes.Empty && out.token != string(m.Token) {
		if found {
			c.ignored.foreign++
		}
		c.mu.Unlock()
		return
	}
	delete(c.outstanding, mid)
	c.mu.Unlock()
	if kind == message.Reset {
		close(out.reset)
		return
	}
	if m.Code != codes.Empty {
		c.deliver(m)
	}
	close(out.acked)
}

// deliver hands a response to the exchange that waits for its token, once.
func (c *Conn) deliver(m *message.Message) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	response, found := c.calls[string(m.Token)]
	if !found {
		return false
	}
	delete(c.calls, string(m.Token))
	response <- m
	// RFC 7252 §5.2.2: a separate response may overtake the ACK, and stands for it.
	for mid, out := range c.outstanding {
		if out.token == string(m.Token) {
			delete(c.outstanding, mid)
			close(out.acked)
		}
	}
	return true
}

// exchange sends one request in one confirmable message and waits for its
// response, piggybacked or separate.
func (c *Conn) exchange(ctx context.Context, code Code, opts message.Options, payload []byte) (*message.Message, error) {
	// A fresh token for every message: a late duplicate must not match.
	token := make([]byte, tokenSize)
	crand.Read(token)
	response := make(chan *message.Message, 1)
	c.mu.Lock()
	c.calls[string(token)] = response
	c.ignored = ignored{}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.calls, string(token))
		c.mu.Unlock()
	}()
	err := c.transmit(ctx, &message.Message{Code: code, Token: token, Options: opts, Payload: payload})
	if err == nil {
		select {
		case m := <-response:
			return m, nil
		case <-ctx.Done():
			err = fmt.Errorf("acknowledged: %w", contextError(ctx))
		case <-c.done:
			err = c.closedError()
		}
	}
	// A server may close right after it has answered: what came counts.
	select {
	case m := <-response:
		return m, nil
	default:
		return nil, c.withIgnored(err)
	}
}

// withIgnored adds to an ErrTimeout what came in the answer's place.
func (c *Conn) withIgnored(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !errors.Is(err, ErrTimeout):
		return err
	case c.ignored.malformed > 0:
		return fmt.Errorf("%w, but %d malformed messages", err, c.ignored.malformed)
	case c.ignored.foreign > 0:
		return fmt.Errorf("%w, but %d with another token", err, c.ignored.foreign)
	}
	return err
}

// transmit sends a confirmable message until it is acknowledged (RFC 7252 §4.2).
func (c *Conn) transmit(ctx context.Context, m *message.Message) error {
	out := &outgoing{token: string(m.Token), acked: make(chan struct{}), reset: make(chan struct{})}
	m.Type = message.Confirmable
	c.mu.Lock()
	mid := c.takeMID()
	c.outstanding[mid] = out
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.outstanding, mid)
		c.mu.Unlock()
	}()
	m.MessageID = int32(mid)
	datagram, err := encode(m)
	if err != nil {
		return err
	}
	// RFC 7252 §4.8: ACK_RANDOM_FACTOR is 1.5.
	timeout := c.cfg.AckTimeout + rand.N(c.cfg.AckTimeout/2+1)
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	var unsent error
	for transmission := 0; transmission <= max(c.cfg.MaxRetransmit, 0); transmission++ {
		if ctx.Err() != nil {
			return contextError(ctx)
		}
		// A network that is down for a moment is a lost datagram. A closed
		// connection closes done.
		if _, err := c.link.Write(datagram); errors.Is(err, syscall.ECONNREFUSED) {
			return errors.Join(ErrClosed, err, c.link.Close())
		} else if err != nil {
			unsent = err
		}
		timer.Reset(timeout)
		select {
		case <-out.acked:
			return nil
		case <-out.reset:
			return ErrReset
		case <-ctx.Done():
			return contextError(ctx)
		case <-c.done:
			return c.closedError()
		case <-timer.C:
			timeout *= 2
		}
	}
	if unsent != nil {
		return fmt.Errorf("%w: %w", ErrTimeout, unsent)
	}
	return ErrTimeout
}

// takeMID is called with the lock held.
func (c *Conn) takeMID() uint16 {
	for {
		mid := c.nextMID
		c.nextMID++
		if _, taken := c.outstanding[mid]; !taken {
			return mid
		}
	}
}

func (c *Conn) closedError() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func contextError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return ErrTimeout
	}
	return ctx.Err()
}

// remembered is what is kept of a received message, and the reply that a
// duplicate of it gets: nil until there is one.
type remembered struct {
	at    time.Time
	reply []byte
}

type memory struct {
	replies map[uint16]*remembered
	order   []uint16
}

// remember notes a message ID, and tells whether it had been noted before.
func (c *Conn) remember(mid uint16) (reply []byte, duplicate bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if r, found := c.remembered.replies[mid]; found && now.Sub(r.at) < exchangeLifetime {
		return r.reply, true
	}
	c.remembered.order = slices.DeleteFunc(c.remembered.order, func(m uint16) bool { return m == mid })
	if len(c.remembered.order) >= maxRemembered {
		delete(c.remembered.replies, c.remembered.order[0])
		c.remembered.order = c.remembered.order[1:]
	}
	c.remembered.order = append(c.remembered.order, mid)
	c.remembered.replies[mid] = &remembered{at: now}
	return nil, false
}

// reply answers a received message, and its duplicates from now on.
func (c *Conn) reply(mid uint16, m *message.Message) {
	datagram, err := encode(m)
	if err != nil {
		c.cfg.Logger.Error("coap: reply", "peer", c.link.RemoteAddr(), "error", err)
		return
	}
	c.mu.Lock()
	if r, found := c.remembered.replies[mid]; found {
		r.reply = datagram
	}
	c.mu.Unlock()
	c.write(datagram)
}

func (c *Conn) sendEmpty(kind message.Type, mid uint16) {
	datagram, err := encode(emptyMessage(kind, mid))
	if err == nil {
		c.write(datagram)
	}
}

func emptyMessage(kind message.Type, mid uint16) *message.Message {
	return &message.Message{Type: kind, Code: codes.Empty, MessageID: int32(mid)}
}

// write sends what nobody waits for: the peer asks again for what is lost.
func (c *Conn) write(datagram []byte) {
	if _, err := c.link.Write(datagram); err != nil {
		c.cfg.Logger.Debug("coap: write", "peer", c.link.RemoteAddr(), "error", err)
	}
}

func encode(m *message.Message) ([]byte, error) {
	size, err := coder.DefaultCoder.Size(*m)
	if err != nil {
		return nil, fmt.Errorf("encode message: %w", err)
	}
	datagram := make([]byte, size)
	if _, err := coder.DefaultCoder.Encode(*m, datagram); err != nil {
		return nil, fmt.Errorf("encode message: %w", err)
	}
	return datagram, nil
}
