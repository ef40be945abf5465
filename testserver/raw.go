package testserver

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/udp/coder"

	"estenroll/est"
	"estenroll/internal/coap"
)

// rawDoor is the CoAPs front door of Config.Raw: a few lines of CoAP on pion's
// DTLS that can be told to get a message or a block wrong. internal/coap, whose server has no such switches, is what it
// helps to judge. It answers a request in the ACK, however long that takes, one
// at a time on each connection; clients of NSTART 1 do not notice.
type rawDoor struct {
	server   *Server
	key      crypto.Signer
	listener net.Listener
	ctx      context.Context
	cancel   context.CancelFunc
	serving  sync.WaitGroup

	mu    sync.Mutex
	conns map[*dtls.Conn]struct{} // nil: closed
}

const (
	rawHandshakeTimeout = 30 * time.Second
	rawDatagram         = 8192
)

func (s *Server) listenRaw(key crypto.Signer) (door, error) {
	address, err := net.ResolveUDPAddr("udp", s.cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	d := &rawDoor{server: s, key: key, conns: map[*dtls.Conn]struct{}{}}
	options := []dtls.ServerOption{
		dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8), // RFC 9148 §3
		dtls.WithExtendedMasterSecret(dtls.RequireExtendedMasterSecret),
		dtls.WithClientAuth(dtls.RequireAnyClientCert),
		dtls.WithInsecureSkipVerify(true), // all of it is verifyClient's
		dtls.WithVerifyConnection(func(state *dtls.State) error {
			chain, err := parseChain(state.PeerCertificates)
			if err != nil {
				return err
			}
			return s.verifyClient(chain)
		}),
		dtls.WithGetCertificate(func(*dtls.ClientHelloInfo) (*tls.Certificate, error) {
			chain, err := s.presentedChain(key.Public())
			return &tls.Certificate{Certificate: chain, PrivateKey: key}, err
		}),
	}
	if s.cfg.FlightInterval > 0 {
		options = append(options, dtls.WithFlightInterval(s.cfg.FlightInterval))
	}
	if d.listener, err = dtls.ListenWithOptions("udp", address, options...); err != nil {
		return nil, fmt.Errorf("listen: %s: %w", s.cfg.Listen, err)
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d, nil
}

func parseChain(ders [][]byte) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	for _, der := range ders {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, cert)
	}
	return chain, nil
}

func (d *rawDoor) Addr() net.Addr { return d.listener.Addr() }

// Serve answers until Close, which makes it return nil.
func (d *rawDoor) Serve(handler coap.Handler) error {
	for {
		accepted, err := d.listener.Accept()
		d.mu.Lock()
		closed := d.conns == nil
		if err == nil && !closed {
			conn := accepted.(*dtls.Conn)
			d.conns[conn] = struct{}{}
			d.serving.Go(func() { d.serve(conn, handler) })
		}
		d.mu.Unlock()
		switch {
		case closed && err == nil:
			return accepted.Close()
		case closed:
			return nil
		case err != nil:
			return fmt.Errorf("accept: %w", err)
		}
	}
}

// Close ends every connection and waits for the handlers.
func (d *rawDoor) Close() error {
	d.mu.Lock()
	conns := d.conns
	d.conns = nil
	d.mu.Unlock()
	d.cancel()
	err := d.listener.Close()
	for conn := range conns {
		_ = conn.Close() // the peer may have been faster
	}
	d.serving.Wait()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close: %w", err)
	}
	return nil
}

func (d *rawDoor) serve(conn *dtls.Conn, handler coap.Handler) {
	defer func() {
		_ = conn.Close()
		d.mu.Lock()
		delete(d.conns, conn)
		d.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeout(d.ctx, rawHandshakeTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return // the client says more about it
	}
	state, ok := conn.ConnectionState()
	if !ok {
		return
	}
	peer, err := parseChain(state.PeerCertificates)
	if err != nil {
		return
	}
	c := &rawConn{door: d, conn: conn, peer: peer, handler: handler, replies: map[int32][]byte{}}
	for buf := make([]byte, rawDatagram); ; {
		n, err := conn.Read(buf)
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || d.ctx.Err() != nil {
			return
		}
		if err == nil {
			c.receive(slices.Clone(buf[:n]))
		}
	}
}

// rawConn is one connection, served by one goroutine.
type rawConn struct {
	door    *rawDoor
	conn    *dtls.Conn
	peer    []*x509.Certificate
	handler coap.Handler

	replies map[int32][]byte // by message ID, for duplicates
	upload  []byte           // the request's body so far
	answer  *coap.Response   // of which blocks are being sent
	wrong   string           // how: Faults.Message when the answer began
}

// receive answers a request; a repeated message gets the reply it has got.
func (c *rawConn) receive(datagram []byte) {
	m := &message.Message{Options: make(message.Options, 0, 64)}
	if _, err := coder.DefaultCoder.Decode(datagram, m); err != nil || m.Type != message.Confirmable || m.Code>>5 != 0 || m.Code == codes.Empty {
		return
	}
	reply, known := c.replies[m.MessageID]
	if !known {
		reply = c.reply(m)
		c.replies[m.MessageID] = reply
	}
	if reply != nil {
		_, _ = c.conn.Write(reply) // the client asks again for what is lost
	}
}

func (c *rawConn) reply(m *message.Message) []byte {
	if block, err := m.Options.GetUint32(message.Block1); err == nil {
		if offset := int(block>>4) * (16 << (block & 7)); offset == 0 {
			c.upload = nil
		} else if offset != len(c.upload) {
			return c.encode(m, &rawAnswer{code: codes.RequestEntityIncomplete})
		}
		c.upload = append(c.upload, m.Payload...)
		if block&8 != 0 {
			return c.encode(m, &rawAnswer{code: codes.Continue, block1: &block})
		}
		return c.handle(m, c.upload, &block)
	}
	if block, err := m.Options.GetUint32(message.Block2); err == nil && block>>4 > 0 {
		if c.answer == nil {
			return c.encode(m, &rawAnswer{code: codes.RequestEntityIncomplete})
		}
		if c.wrong == "block-slow" {
			select {
			case <-time.After(rawPause):
			case <-c.door.ctx.Done():
			}
		}
		return c.encode(m, c.block(int(block>>4), block&7))
	}
	return c.handle(m, m.Payload, nil)
}

// handle has a whole request answered, and begins the answer.
func (c *rawConn) handle(m *message.Message, body []byte, block1 *uint32) []byte {
	path, err := m.Options.Path()
	if err != nil {
		path = "/"
	}
	queries, err := m.Options.Queries()
	if err != nil {
		queries = nil
	}
	req := &coap.Request{Method: m.Code, Path: "/" + strings.TrimPrefix(path, "/"), Query: queries, Body: body, Peer: c.peer}
	if format, err := m.Options.GetUint32(message.ContentFormat); err == nil {
		req.ContentFormat = new(uint16(format))
	}
	if accept, err := m.Options.GetUint32(message.Accept); err == nil {
		req.Accept = new(uint16(accept))
	}
	c.answer, c.wrong = c.handler(c.door.ctx, req), ""
	faults := c.door.server.Faults()
	if operation, found := c.door.server.operationAt(req.Path, false); found && faults.garbles(operation) && c.answer.Code>>5 == 2 {
		c.wrong = faults.Message
	}
	szx := uint32(6)
	if block, err := m.Options.GetUint32(message.Block2); err == nil {
		szx = min(szx, block&7)
	}
	if block1 != nil {
		szx = min(szx, *block1&7)
	}
	if strings.HasPrefix(c.wrong, "block-") {
		szx = min(szx, 2) // of 64 bytes: there are several of any answer
	}
	begun := c.block(0, szx)
	begun.block1 = block1
	return c.encode(m, begun)
}

// rawAnswer is one message of an answer.
type rawAnswer struct {
	code          codes.Code
	etag          []byte
	contentFormat *uint16
	maxAge        *uint32
	block1        *uint32
	block2        *uint32
	size2         *uint32
	critical      bool // an option that nobody knows
	payload       []byte
}

// The faults of messages and blocks, and what they are for the help text.
var messageFaults = map[string]string{
	"truncated":         "end in the middle of an option",
	"trailing":          "have a payload marker and no payload",
	"wrong-token":       "have a token that was not asked with",
	"critical-option":   "have a critical option that nobody knows",
	"reset":             "are a Reset",
	"silent":            "do not come",
	"acknowledged-only": "are an empty ACK, and nothing follows",
	"block-1-gib":       "announce 1 GiB",
	"block-endless":     "have always one more block",
	"block-etag":        "change their ETag after the first block",
	"block-order":       "leave a block out",
	"block-format":      "change their content-format after the first block",
	"block-missing":     "have no Block2 after the first block",
	"block-short":       "have fewer bytes than their block says",
	"block-slow":        "come half a second after their request, from the second block on",
}

const (
	rawGiB   = 1 << 30
	rawPause = 500 * time.Millisecond
)

// block is the block of the answer with this number, or what the fault makes of it.
func (c *rawConn) block(num int, szx uint32) *rawAnswer {
	size := 16 << szx
	body := c.answer.Body
	switch c.wrong {
	case "block-endless":
		body = make([]byte, (num+2)*size)
	case "block-order":
		if num > 0 {
			num++
		}
	}
	begin, end := min(num*size, len(body)), min((num+1)*size, len(body))
	answer := &rawAnswer{
		code: c.answer.Code, etag: c.answer.ETag, contentFormat: c.answer.ContentFormat, maxAge: c.answer.MaxAge,
		payload: body[begin:end], critical: c.wrong == "critical-option",
	}
	if len(body) <= size {
		return answer
	}
	value := uint32(num)<<4 | szx
	if end < len(body) {
		value |= 8
	}
	answer.block2 = &value
	switch {
	case c.wrong == "block-1-gib":
		answer.size2 = new(uint32(rawGiB))
	case c.wrong == "block-etag":
		answer.etag = []byte{byte(min(num, 1))}
	case c.wrong == "block-format" && num > 0:
		answer.contentFormat = new(uint16(est.ContentFormatPKIXCert))
	case c.wrong == "block-missing" && num > 0:
		answer.block2 = nil
	case c.wrong == "block-short" && num > 0 && len(answer.payload) > 0:
		answer.payload = answer.payload[:len(answer.payload)-1]
		*answer.block2 |= 8 // a last block may be short
	}
	return answer
}

// encode puts an answer into the ACK of its request; nil sends nothing.
func (c *rawConn) encode(m *message.Message, answer *rawAnswer) []byte {
	reply := message.Message{Type: message.Acknowledgement, MessageID: m.MessageID, Code: answer.code, Token: m.Token, Payload: answer.payload}
	number := func(id message.OptionID, value uint32) {
		encoded := make([]byte, 4)
		n, err := message.EncodeUint32(encoded, value)
		if err == nil {
			reply.Options = reply.Options.Add(message.Option{ID: id, Value: encoded[:n]})
		}
	}
	if answer.etag != nil {
		reply.Options = reply.Options.Add(message.Option{ID: message.ETag, Value: answer.etag})
	}
	if answer.contentFormat != nil {
		number(message.ContentFormat, uint32(*answer.contentFormat))
	}
	for id, value := range map[message.OptionID]*uint32{
		message.MaxAge: answer.maxAge, message.Block1: answer.block1, message.Block2: answer.block2, message.Size2: answer.size2,
	} {
		if value != nil {
			number(id, *value)
		}
	}
	if answer.critical {
		number(2049, 1) // unassigned (RFC 7252 §12.2), and odd, so critical
	}
	switch wrong := c.wrong; {
	case answer.code == codes.Continue:
	case wrong == "silent":
		return nil
	case wrong == "wrong-token":
		reply.Token = slices.Clone(m.Token)
		reply.Token[0] ^= 0xff
	case wrong == "reset", wrong == "acknowledged-only":
		kind := message.Acknowledgement
		if wrong == "reset" {
			kind = message.Reset
		}
		reply = message.Message{Type: kind, MessageID: m.MessageID}
	}
	size, err := coder.DefaultCoder.Size(reply)
	if err != nil {
		return nil
	}
	datagram := make([]byte, size)
	if _, err := coder.DefaultCoder.Encode(reply, datagram); err != nil {
		return nil
	}
	if c.wrong == "truncated" && answer.code != codes.Continue {
		// The Content-Format option claims two bytes, of which one is there.
		datagram = append(datagram[:4+len(reply.Token)], 0xc2, 0x01)
	}
	if c.wrong == "trailing" && answer.code != codes.Continue {
		datagram = datagram[:len(datagram)-len(reply.Payload)] // the marker is the last byte
	}
	return datagram
}
