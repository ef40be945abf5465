// Package coap is one CoAP connection over DTLS 1.2: the handshake with a key
// that may be in an HSM, confirmable exchanges (RFC 7252), and block-wise
// transfer of a request and its response (RFC 7959, RFC 9175), for a client and
// for a server. It knows nothing of EST. It refuses plain CoAP, observation and
// proxies.
//
// Of go-coap it uses the message codec and not the connection. Measured with
// go-coap v3.8.0: a request that is given up after its last retransmission, and
// one that is answered with a Reset, both return only when the context's
// deadline comes (15 s instead of 4.5 s, 8 s instead of at once).
package coap

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Config describes this end of a connection. The zero value of every field but
// Verify works.
type Config struct {
	// Certificate is our chain in DER, leaf first, and Key the leaf's key. A
	// server needs both; a client without them answers a certificate request
	// with an empty list.
	Certificate [][]byte
	Key         crypto.Signer
	// Chain is a server's Certificate of each handshake, for the same key.
	// Default: always Certificate.
	Chain func() [][]byte

	// ServerName is sent as SNI by a client. Empty sends none, which is right
	// for an IP literal (RFC 6066 §3).
	ServerName string

	// PSK is a pre-shared key by which a client and its server know each other, in the
	// place of certificates (RFC 4279): Verify is not asked then. It is called in the
	// handshake, and what it returns is cleared. Default: certificates.
	PSK         func() ([]byte, error)
	PSKIdentity string // which key it is, for the server: at most 128 bytes of UTF-8
	// PSKs has a server accept pre-shared keys too: it returns a copy of the key with an
	// identity, which is cleared. Default: certificates alone.
	PSKs func(identity string) (key []byte, known bool)

	// Verify judges the peer's chain, leaf first: trust, name, key usage and
	// time are all the caller's, because pion/dtls knows only the wall clock.
	// A nil Verify is refused, and a chain that Verify refuses ends the
	// handshake with its error.
	Verify func(peer []*x509.Certificate) error

	// AckTimeout is the first retransmission timeout; it grows by a random
	// factor between 1 and 1.5 and doubles each time. Zero means the default:
	// 2s (RFC 7252 §4.8).
	AckTimeout time.Duration
	// MaxRetransmit bounds the retransmissions of one message. Zero means the
	// default: 4 (RFC 7252 §4.8), which gives a message up after 62s to 93s.
	// A negative value means none: each message is sent once.
	MaxRetransmit int
	// ExchangeTimeout bounds a whole request with all its blocks and any
	// separate response. Default: 247s (EXCHANGE_LIFETIME, RFC 7252 §4.8.2).
	ExchangeTimeout time.Duration
	// BlockSize is the largest payload of one message: 16, 32, 64, 128, 256,
	// 512 or 1024 bytes. Default: 1024 (RFC 9148 §4.6).
	BlockSize int
	// MaxBody bounds an assembled body, sent or received. Default: 64 KiB.
	MaxBody int

	// HandshakeTimeout bounds the handshake. Default: 60s.
	HandshakeTimeout time.Duration
	// FlightInterval is the handshake's retransmission timeout. Default: 1s.
	FlightInterval time.Duration

	// ProcessingDelay is how long a server waits for its handler before an
	// empty ACK announces a separate response (RFC 7252 §5.2.2). Default: half
	// of AckTimeout, so that the client does not retransmit.
	ProcessingDelay time.Duration
	// IdleTimeout closes a server's connection on which nothing arrives and
	// nothing is being handled. Default: 5m.
	IdleTimeout time.Duration
	// MaxConnections bounds the connections of a server, unfinished handshakes
	// included: one that was abandoned counts until HandshakeTimeout. Default: 128.
	MaxConnections int

	// Logger receives what has no caller to go to. Default: none.
	Logger *slog.Logger
}

// maxPSKIdentity is what each implementation must support (RFC 4279 §5.3).
const maxPSKIdentity = 128

// maxConfigBody keeps a body's last block number within the 20 bits that an
// option has at the smallest block size (RFC 7959 §2.2).
const maxConfigBody = 16 << 20

func (cfg Config) withDefaults() (Config, error) {
	if cfg.Verify == nil {
		return cfg, errors.New("configuration: Verify: missing")
	}
	if cfg.PSK != nil && (cfg.Key != nil || cfg.PSKIdentity == "" || len(cfg.PSKIdentity) > maxPSKIdentity || !utf8.ValidString(cfg.PSKIdentity)) {
		return cfg, fmt.Errorf("configuration: PSK: want an identity of 1 to %d bytes of UTF-8, and no certificate", maxPSKIdentity)
	}
	if (len(cfg.Certificate) == 0) != (cfg.Key == nil) {
		return cfg, errors.New("configuration: Certificate and Key: one without the other")
	}
	for name, field := range map[string]time.Duration{
		"AckTimeout": cfg.AckTimeout, "ExchangeTimeout": cfg.ExchangeTimeout, "HandshakeTimeout": cfg.HandshakeTimeout,
		"FlightInterval": cfg.FlightInterval, "ProcessingDelay": cfg.ProcessingDelay, "IdleTimeout": cfg.IdleTimeout,
	} {
		if field < 0 {
			return cfg, fmt.Errorf("configuration: %s %v: negative", name, field)
		}
	}
	if cfg.MaxConnections < 0 {
		return cfg, fmt.Errorf("configuration: MaxConnections %d: negative", cfg.MaxConnections)
	}
	setDefault(&cfg.AckTimeout, 2*time.Second)
	setDefault(&cfg.MaxRetransmit, 4)
	setDefault(&cfg.ExchangeTimeout, exchangeLifetime)
	setDefault(&cfg.BlockSize, maxBlockSize)
	setDefault(&cfg.MaxBody, 64<<10)
	setDefault(&cfg.HandshakeTimeout, time.Minute)
	setDefault(&cfg.FlightInterval, time.Second)
	setDefault(&cfg.ProcessingDelay, cfg.AckTimeout/2)
	setDefault(&cfg.IdleTimeout, 5*time.Minute)
	setDefault(&cfg.MaxConnections, 128)
	setDefault(&cfg.Logger, slog.New(slog.DiscardHandler))
	if !validBlockSize(cfg.BlockSize) {
		return cfg, fmt.Errorf("configuration: BlockSize %d: not a power of two from %d to %d", cfg.BlockSize, minBlockSize, maxBlockSize)
	}
	if cfg.MaxBody < 0 || cfg.MaxBody > maxConfigBody {
		return cfg, fmt.Errorf("configuration: MaxBody %d: not from 1 to %d", cfg.MaxBody, maxConfigBody)
	}
	return cfg, nil
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Code is a method or a response code (RFC 7252 §12.1).
type Code = codes.Code

// Request is one whole request, whatever the number of its blocks.
type Request struct {
	Method Code
	// Host and Port are sent as Uri-Host and Uri-Port when they are set. They
	// are needed only if the server is not the one the connection leads to
	// (RFC 7252 §5.10.1).
	Host string
	Port uint16
	// Path begins with a slash; its segments must not hold one.
	Path  string
	Query []string
	// ContentFormat and Accept are numbers of the CoAP Content-Formats
	// registry; nil means absent.
	ContentFormat *uint16
	Accept        *uint16
	Body          []byte

	// Peer is the client's verified chain, leaf first. A server sets it, or else
	// PSKIdentity where the client has shown a pre-shared key.
	Peer        []*x509.Certificate
	PSKIdentity string
	// ChannelBinding is the connection's tls-unique. A server sets it.
	ChannelBinding []byte
}

// Response is one whole response. Any code that the peer sent is a response,
// not an error.
type Response struct {
	Code          Code
	ContentFormat *uint16
	// MaxAge is in seconds; nil means absent, which RFC 7252 §5.10.5 reads as 60.
	MaxAge *uint32
	ETag   []byte
	Body   []byte
}

const (
	minBlockSize = 16
	maxBlockSize = 1024
	// maxBlockNumber is the largest number of 20 bits (RFC 7959 §2.2).
	maxBlockNumber = 1<<20 - 1
)

func validBlockSize(size int) bool {
	return size >= minBlockSize && size <= maxBlockSize && bits.OnesCount(uint(size)) == 1
}

// block is the value of a Block1 or Block2 option (RFC 7959 §2.2):
//
//	 0 1 2 3 4 5 6 7
//	+-+-+-+-+-+-+-+-+
//	|  NUM  |M| SZX |   or 16 or 24 bits, NUM taking the rest
//	+-+-+-+-+-+-+-+-+
type block struct {
	num  int
	more bool
	size int
}

func (b block) String() string {
	more := 0
	if b.more {
		more = 1
	}
	return fmt.Sprintf("%d/%d/%d", b.num, more, b.size)
}

func (b block) offset() int { return b.num * b.size }

// encode gives the shortest form, as RFC 7252 §3.2 wants of an integer.
func (b block) encode() []byte {
	value := uint32(b.num)<<4 | uint32(bits.TrailingZeros(uint(b.size))-4)
	if b.more {
		value |= 1 << 3
	}
	return encodeUint(value)
}

// decodeBlock takes an option of 0 to 3 bytes. It fails for the size exponent
// that is reserved.
func decodeBlock(value []byte) (b block, ok bool) {
	v := decodeUint(value)
	if v&7 == 7 {
		return block{}, false
	}
	return block{num: int(v >> 4), more: v&(1<<3) != 0, size: minBlockSize << (v & 7)}, true
}

func encodeUint(v uint32) []byte {
	var value []byte
	for ; v > 0; v >>= 8 {
		value = append(value, byte(v))
	}
	slices.Reverse(value)
	return value
}

func decodeUint(value []byte) uint32 {
	var v uint32
	for _, b := range value {
		v = v<<8 | uint32(b)
	}
	return v
}

// options are the options of a message that this package understands.
type options struct {
	host          string
	port          uint16
	path          []string
	query         []string
	contentFormat *uint16
	accept        *uint16
	maxAge        *uint32
	etag          []byte
	block1        *block
	block2        *block
	size1         *uint32
	size2         *uint32
	requestTags   []string
}

// OptionError is a critical option that this end does not understand, or one
// that is malformed (RFC 7252 §5.4).
type OptionError struct {
	Number uint16
	Reason string

	code Code // what a server answers
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("option %d (%v): %s", e.Number, message.OptionID(e.Number), e.Reason)
}

// decodeOptions fails with an OptionError. Elective options that are unknown,
// malformed or supernumerary are ignored (RFC 7252 §5.4.1, §5.4.3, §5.4.5).
func decodeOptions(encoded message.Options) (*options, error) {
	var o options
	seen := map[message.OptionID]bool{}
	for _, option := range encoded {
		id, value := option.ID, option.Value
		critical := id&1 == 1
		refuse := func(reason string) error {
			if !critical {
				return nil
			}
			// RFC 7252 §5.4.1: "MUST cause the return of a 4.02 (Bad Option) response".
			return &OptionError{Number: uint16(id), Reason: reason, code: codes.BadOption}
		}
		def, known := message.CoapOptionDefs[id]
		if known && (len(value) < int(def.MinLen) || len(value) > int(def.MaxLen)) {
			if err := refuse(fmt.Sprintf("length %d", len(value))); err != nil {
				return nil, err
			}
			continue
		}
		repeatable := id == message.URIPath || id == message.URIQuery || id == message.RequestTag
		if seen[id] && !repeatable {
			if err := refuse("repeated"); err != nil {
				return nil, err
			}
			continue
		}
		seen[id] = true
		switch id {
		case message.URIHost:
			o.host = string(value)
		case message.URIPort:
			o.port = uint16(decodeUint(value))
		case message.URIPath:
			o.path = append(o.path, string(value))
		case message.URIQuery:
			o.query = append(o.query, string(value))
		case message.ContentFormat:
			o.contentFormat = pointer(uint16(decodeUint(value)))
		case message.Accept:
			o.accept = pointer(uint16(decodeUint(value)))
		case message.MaxAge:
			o.maxAge = pointer(decodeUint(value))
		case message.ETag:
			o.etag = slices.Clone(value)
		case message.Block1, message.Block2:
			b, ok := decodeBlock(value)
			if !ok {
				// RFC 7959 §2.2: it "MUST lead to a 4.00 Bad Request response code
				// upon reception in a request".
				return nil, &OptionError{Number: uint16(id), Reason: "the reserved size exponent 7", code: codes.BadRequest}
			}
			if id == message.Block1 {
				o.block1 = &b
			} else {
				o.block2 = &b
			}
		case message.Size1:
			o.size1 = pointer(decodeUint(value))
		case message.Size2:
			o.size2 = pointer(decodeUint(value))
		case message.RequestTag:
			o.requestTags = append(o.requestTags, string(value))
		case message.ProxyURI, message.ProxyScheme:
			// RFC 7252 §5.10.2: 5.05 of "an endpoint ... that is unable or
			// unwilling to act as a forward-proxy".
			return nil, &OptionError{Number: uint16(id), Reason: "no proxy", code: codes.ProxyingNotSupported}
		default:
			if err := refuse("critical and unknown"); err != nil {
				return nil, err
			}
		}
	}
	return &o, nil
}

// encode writes the options in the order of their numbers, which is the order on the wire.
func (o *options) encode() message.Options {
	var encoded message.Options
	add := func(id message.OptionID, value []byte) {
		encoded = append(encoded, message.Option{ID: id, Value: value})
	}
	if o.host != "" {
		add(message.URIHost, []byte(o.host))
	}
	if o.etag != nil {
		add(message.ETag, o.etag)
	}
	if o.port != 0 {
		add(message.URIPort, encodeUint(uint32(o.port)))
	}
	for _, segment := range o.path {
		add(message.URIPath, []byte(segment))
	}
	if o.contentFormat != nil {
		add(message.ContentFormat, encodeUint(uint32(*o.contentFormat)))
	}
	if o.maxAge != nil {
		add(message.MaxAge, encodeUint(*o.maxAge))
	}
	for _, query := range o.query {
		add(message.URIQuery, []byte(query))
	}
	if o.accept != nil {
		add(message.Accept, encodeUint(uint32(*o.accept)))
	}
	if o.block2 != nil {
		add(message.Block2, o.block2.encode())
	}
	if o.block1 != nil {
		add(message.Block1, o.block1.encode())
	}
	if o.size2 != nil {
		add(message.Size2, encodeUint(*o.size2))
	}
	if o.size1 != nil {
		add(message.Size1, encodeUint(*o.size1))
	}
	for _, tag := range o.requestTags {
		add(message.RequestTag, []byte(tag))
	}
	return encoded
}

func pointer[T any](v T) *T { return &v }

// requestOptions are the options that every message of a request carries.
func requestOptions(req *Request) (options, error) {
	o := options{host: req.Host, port: req.Port, query: req.Query, accept: req.Accept}
	path, found := strings.CutPrefix(req.Path, "/")
	if !found {
		return o, fmt.Errorf("path %q: no leading slash", req.Path)
	}
	if path != "" {
		o.path = strings.Split(path, "/")
	}
	if len(o.host) > 255 || slices.ContainsFunc(slices.Concat(o.path, o.query), func(s string) bool { return len(s) > 255 }) {
		return o, errors.New("an option of more than 255 bytes")
	}
	return o, nil
}
