package coap

import "context"

// Link is what a connection needs of DTLS, so that tests can read its messages.
type Link = link

// NewClient is the client's end of a link.
func NewClient(l Link, cfg Config) (*Conn, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	c := newConn(l, cfg, nil)
	c.start()
	return c, nil
}

// ServeLink is the server's end of a link. It returns when the link is closed
// and every handler has ended.
func ServeLink(l Link, cfg Config, handler Handler) error {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return err
	}
	serveLink(context.Background(), l, cfg, handler, client{})
	return nil
}

// Ended is closed when a connection has ended.
func (c *Conn) Ended() <-chan struct{} { return c.done }

// EncodeBlock and DecodeBlock are the value of a block option.
func EncodeBlock(num int, more bool, size int) []byte { return block{num, more, size}.encode() }

func DecodeBlock(value []byte) (num int, more bool, size int, ok bool) {
	b, ok := decodeBlock(value)
	return b.num, b.more, b.size, ok
}

// AppendSecret puts a block after others.
var AppendSecret = appendSecret

// HasClearRecord looks for a record of epoch 0.
var HasClearRecord = hasClearRecord

// ChoosesP521 looks for a ServerKeyExchange with that curve.
var ChoosesP521 = choosesP521

// HelloRandom looks for a ClientHello's random.
var HelloRandom = helloRandom

// Remembered is the number of messages whose replies are kept.
func (c *Conn) Remembered() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(len(c.remembered.replies), len(c.remembered.order))
}

// Recorded takes a datagram down, from either end, computes what comes of it, and
// returns how much was kept.
func Recorded(datagram []byte, client bool) int {
	r := newRecorder()
	if _, err := r.Write([]byte("CLIENT_RANDOM 00 01\n")); err != nil {
		return -1
	}
	note := r.received
	if client {
		note = r.sent
	}
	note(datagram)
	kept := r.bytes
	_, _ = r.tlsUnique() // of one datagram: never whole
	return kept
}

// DialEach connects to a host that has these addresses.
func DialEach(ctx context.Context, addr string, addresses []string, cfg Config) (*Conn, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, cfg.HandshakeTimeout)
	defer cancel()
	return dialEach(ctx, addr, addresses, cfg)
}
