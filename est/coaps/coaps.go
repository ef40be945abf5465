// Package coaps carries EST over CoAP over DTLS (RFC 9148): it opens a session,
// maps operations to resources and codes to the errors of package est. It sends
// each request once; whether to send it again is for its caller.
package coaps

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/internal/coap"
)

// Config is what a session needs. URI, Trust, Certificate and Key are required.
type Config struct {
	URI URI
	// Certificate (DER, leaf first) and Key authenticate us: "the client
	// presents a certificate" for every function, crts too (RFC 9148 §3).
	Certificate [][]byte
	Key         crypto.Signer
	// Trust judges the server, at the time of Now. Default of Now: time.Now.
	Trust *est.TrustAnchors
	Now   func() time.Time

	// BlockSize in bytes, 16 to 1024. Default: 512, which leaves room for DTLS
	// in the smallest MTU of IPv6 (RFC 9148 §4.6).
	BlockSize int
	// AckTimeout is ACK_TIMEOUT. Default: 2s (RFC 7252 §4.8).
	AckTimeout time.Duration
	// MaxRetransmit is MAX_RETRANSMIT; a negative number means none.
	// Default: 4 (RFC 7252 §4.8).
	MaxRetransmit int
	// ExchangeTimeout bounds a request with all its blocks. Default: 247s.
	ExchangeTimeout time.Duration
	// HandshakeTimeout bounds the handshake. Default: 60s.
	HandshakeTimeout time.Duration
	// FlightInterval is the handshake's first retransmission timeout. Default: 1s.
	FlightInterval time.Duration
}

// Session is an open connection to an EST server. It is safe for concurrent
// use; exchanges go one after the other (NSTART 1, RFC 9148 §6).
type Session struct {
	conn *coap.Conn
	uri  URI
}

var (
	_ est.Session             = (*Session)(nil)
	_ est.ClientAuthenticator = (*Session)(nil)
)

// Dial opens a session: the server's chain, name and time are judged before
// anything is sent to it. est.ErrUnreachable, est.ErrCredentialRefused,
// est.ErrCredentialNotYetValid, est.ErrNotTrusted, est.ErrNotValidNow.
func Dial(ctx context.Context, cfg Config) (*Session, error) {
	if cfg.Trust == nil {
		return nil, fmt.Errorf("open session with %s: no trust anchors: %w", cfg.URI, est.ErrNotTrusted)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.BlockSize == 0 {
		cfg.BlockSize = 512
	}
	conn, err := coap.Dial(ctx, cfg.URI.Address(), coap.Config{
		Certificate: cfg.Certificate, Key: cfg.Key, ServerName: cfg.URI.serverName(),
		Verify: func(peer []*x509.Certificate) error {
			return cfg.Trust.VerifyServer(peer, cfg.URI.Host, cfg.Now())
		},
		AckTimeout: cfg.AckTimeout, MaxRetransmit: cfg.MaxRetransmit, ExchangeTimeout: cfg.ExchangeTimeout,
		BlockSize: cfg.BlockSize, HandshakeTimeout: cfg.HandshakeTimeout, FlightInterval: cfg.FlightInterval,
	})
	if err != nil {
		return nil, fmt.Errorf("open session with %s: %w", cfg.URI, classify(ctx, err))
	}
	return NewSession(conn, cfg.URI), nil
}

// NewSession makes a session of a connection that is already open, such as an
// LwM2M Bootstrap-Server's; it belongs to the session then.
func NewSession(conn *coap.Conn, uri URI) *Session { return &Session{conn: conn, uri: uri} }

// classify names what a failed handshake or exchange means for EST.
func classify(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	var handshake *coap.HandshakeError
	if errors.As(err, &handshake) && handshake.Alert != nil {
		switch *handshake.Alert {
		case coap.AlertCertificateExpired:
			// Our chain was judged by our own clock before: theirs is another.
			return fmt.Errorf("%w: %w", err, est.ErrCredentialNotYetValid)
		case coap.AlertCloseNotify:
			return fmt.Errorf("%w: %w", err, est.ErrUnreachable)
		}
		if handshake.CertificateSent {
			return fmt.Errorf("%w: %w", err, est.ErrCredentialRefused)
		}
		return err
	}
	for _, judged := range []error{est.ErrNotTrusted, est.ErrNotValidNow} {
		if errors.Is(err, judged) {
			return err
		}
	}
	if errors.Is(err, coap.ErrTimeout) || errors.Is(err, coap.ErrClosed) || isNetwork(err) {
		return fmt.Errorf("%w: %w", err, est.ErrUnreachable)
	}
	return err
}

// RoundTrip implements est.Session.
func (s *Session) RoundTrip(ctx context.Context, req *est.Request) (*est.Response, error) {
	name := req.Operation.ShortPath()
	if name == "" {
		return nil, fmt.Errorf("%s over CoAPs: unknown operation", req.Operation)
	}
	resource := s.uri.String() + "/" + name
	accept := uint16(est.ContentFormatPKCS7CertsOnly) // RFC 9148 §4.3
	request := &coap.Request{Method: codes.GET, Path: s.uri.Root + "/" + name, Accept: &accept}
	if req.Operation != est.CACerts {
		format := uint16(est.ContentFormatPKCS10)
		request.Method, request.ContentFormat, request.Body = codes.POST, &format, req.Body
	}
	response, err := s.conn.Do(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("%s at %s: %w", req.Operation, resource, classify(ctx, err))
	}
	return interpret(req.Operation, resource, response)
}

// interpret maps a CoAP response to EST (RFC 9148 §4.5, §4.7).
func interpret(operation est.Operation, resource string, response *coap.Response) (*est.Response, error) {
	switch class := int(response.Code) >> 5; {
	case response.Code == codes.ServiceUnavailable:
		return nil, &est.PendingError{Operation: operation, Server: resource, RetryAfter: retryAfter(response.MaxAge)}
	case class != 2:
		return nil, &est.StatusError{
			Operation: operation, Server: resource, Code: codeText(response.Code), Class: class,
			Unauthorized: response.Code == codes.Unauthorized, Detail: est.NewDetail(response.Body),
		}
	case response.ContentFormat == nil:
		return nil, &est.ResponseError{Operation: operation, Err: errors.New("no content-format")}
	}
	return &est.Response{ContentFormat: est.ContentFormat(*response.ContentFormat), Body: response.Body}, nil
}

// retryAfter: without a Max-Age "a default value of 60 is assumed" (RFC 7252 §5.10.5).
func retryAfter(maxAge *uint32) time.Duration {
	if maxAge == nil {
		return time.Minute
	}
	return time.Duration(*maxAge) * time.Second
}

// codeText prints a code as the RFC does: "4.03 Forbidden".
func codeText(code codes.Code) string {
	return fmt.Sprintf("%d.%02d %s", code>>5, code&0x1f, code)
}

// PeerChain implements est.Session.
func (s *Session) PeerChain() []*x509.Certificate { return s.conn.PeerCertificates() }

// ChannelBinding implements est.Session: proof of possession bound to the
// session is not there yet.
func (s *Session) ChannelBinding() ([]byte, error) {
	return nil, fmt.Errorf("channel binding of DTLS: %w", errors.ErrUnsupported)
}

// ClientAuthenticated implements est.ClientAuthenticator.
func (s *Session) ClientAuthenticated() bool { return s.conn.ClientAuthenticated() }

// Close implements est.Session.
func (s *Session) Close() error { return s.conn.Close() }

// isNetwork reports an error of the socket: a refused port, no route.
func isNetwork(err error) bool {
	var network net.Error
	var syscall *os.SyscallError
	return errors.As(err, &network) || errors.As(err, &syscall)
}
