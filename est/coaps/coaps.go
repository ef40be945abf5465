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
	"slices"
	"strings"
	"sync"
	"time"

	"estenroll/est"
	"estenroll/internal/coap"
)

// The codes that EST gives a meaning of their own (RFC 7252 §12.1, RFC 9148 §4.5).
const (
	codeGET                coap.Code = 0x01
	codePOST               coap.Code = 0x02
	codeUnauthorized       coap.Code = 4<<5 | 1
	codeBadOption          coap.Code = 4<<5 | 2
	codeNotFound           coap.Code = 4<<5 | 4
	codeNotAcceptable      coap.Code = 4<<5 | 6
	codeTooManyRequests    coap.Code = 4<<5 | 29 // RFC 8516 §3
	codeServiceUnavailable coap.Code = 5<<5 | 3
)

// Config is what a session needs. URI, Trust, Certificate and Key are required.
type Config struct {
	URI est.URI
	// Label is appended to URI's path, and chooses among what is discovered.
	// Default: none.
	Label est.Label
	// Discovery asks the server for its resources when the session is opened (RFC 9148
	// §4.1), which costs a round trip; what it does not say is below URI's path. What is
	// at another host or port costs a session there, see Session.For. Default: all is
	// below URI's path.
	Discovery bool
	// Warn is told what discovery did not find or did not follow. Default: nobody.
	Warn func(format string, args ...any)

	// Certificate (DER, leaf first) and Key authenticate us: the client
	// presents a certificate for every function, crts too (RFC 9148 §3).
	Certificate [][]byte
	Key         crypto.Signer
	// PSK authenticates both ends by a key that they share, which it returns when it is
	// needed and which is cleared: in the place of Certificate and Key, and of the
	// judgement of the server's certificate, for there is none (RFC 7030 §3.3.3).
	// Discovery leads to no other server then. Default: certificates.
	//
	// Deviation: RFC 9148 §3 has both ends show certificates. It is for bootstrap servers
	// that know a device by such a key, and for no session after that.
	PSK func() ([]byte, error)
	// PSKIdentity names that key to the server.
	PSKIdentity string
	// Trust judges the server, at the time of Now. Default of Now: time.Now.
	Trust *est.TrustAnchors
	Now   func() time.Time
	// Provisional takes whatever certificate the server shows. Then nothing but
	// cacerts is sent to it, which its caller judges by what it holds: a CSR is for a
	// session that was judged (RFC 7030 §4.1.1). With Discovery it is asked where cacerts
	// is if that is not below URI's path, and can name no other server.
	Provisional bool

	// BlockSize in bytes, a power of two from 16 to 1024. Default: 512, half of
	// what RFC 9148 §4.6 allows: also with DTLS and IPv6 around it a message
	// fits most paths.
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
	uri  est.URI // with the label
	cfg  Config  // for sessions with other servers; the zero value of NewSession

	mu sync.Mutex
	// resources are what discovery found; others are below the URI's path, but for
	// absent, which a server that supports discovery would have listed.
	resources map[est.Operation]resource
	absent    []est.Operation
	// others are the sessions with other servers, by their authority.
	others map[string]*Session
}

var (
	_ est.Session             = (*Session)(nil)
	_ est.Distributor         = (*Session)(nil)
	_ est.ClientAuthenticator = (*Session)(nil)
	_ est.KeyAccepter         = (*Session)(nil)
)

// Dial opens a session: the server's chain, name and time are judged before
// anything is sent to it, the question for its resources included.
// est.ErrUnreachable; est.ErrServerCertificate beside est.ErrNotTrusted or
// est.ErrNotValidNow; est.ErrHandshake; est.ErrCredentialRefused,
// est.ErrCredentialNotYetValid, est.ErrKeyUnsuitable; est.ErrPSKRefused,
// est.ErrPSKUnanswered; est.ErrKeyMismatch for a Key that is not the Certificate's; and
// what the Key says when it cannot sign.
func Dial(ctx context.Context, cfg Config) (*Session, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Warn == nil {
		cfg.Warn = func(string, ...any) {}
	}
	session, err := open(ctx, cfg)
	if err == nil && cfg.Discovery && !cfg.Provisional {
		if err := session.discover(ctx); err != nil {
			return nil, errors.Join(err, session.Close())
		}
	}
	return session, err
}

func open(ctx context.Context, cfg Config) (*Session, error) {
	conn, err := dial(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open session with %s: %w", cfg.URI, err)
	}
	session := NewSession(conn, cfg.URI.WithLabel(cfg.Label))
	session.cfg = cfg
	return session, nil
}

func dial(ctx context.Context, cfg Config) (*coap.Conn, error) {
	if cfg.Trust == nil {
		return nil, fmt.Errorf("no trust anchors: %w", est.ErrNotTrusted)
	}
	var own *x509.Certificate
	if cfg.PSK == nil {
		var err error
		if own, err = est.OwnCertificate(cfg.Certificate, cfg.Key); err != nil {
			return nil, err
		}
	}
	if cfg.BlockSize == 0 {
		cfg.BlockSize = 512
	}
	conn, err := coap.Dial(ctx, cfg.URI.Address(), coap.Config{
		Certificate: cfg.Certificate, Key: cfg.Key, PSK: cfg.PSK, PSKIdentity: cfg.PSKIdentity, ServerName: cfg.URI.ServerName(),
		Verify: func(peer []*x509.Certificate) error {
			if cfg.Provisional {
				return nil
			}
			return cfg.Trust.VerifyServer(peer, cfg.URI.Host, cfg.Now())
		},
		AckTimeout: cfg.AckTimeout, MaxRetransmit: cfg.MaxRetransmit, ExchangeTimeout: cfg.ExchangeTimeout,
		BlockSize: cfg.BlockSize, HandshakeTimeout: cfg.HandshakeTimeout, FlightInterval: cfg.FlightInterval,
	})
	var handshake *coap.HandshakeError
	if errors.As(err, &handshake) && cfg.PSK != nil && handshake.Alert != nil {
		return nil, fmt.Errorf("%w: %w", err, est.ErrPSKRefused)
	}
	if errors.As(err, &handshake) && cfg.PSK != nil && handshake.Answered && errors.Is(err, coap.ErrTimeout) && ctx.Err() == nil {
		// A server with another key cannot read ours, and DTLS loses what it cannot read.
		return nil, est.Unreachable(fmt.Errorf("%w: %w", err, est.ErrPSKUnanswered))
	}
	if errors.As(err, &handshake) && handshake.Alert != nil {
		return nil, fmt.Errorf("%w: %w", err, est.AlertMeaning(uint8(*handshake.Alert), handshake.CertificateSent, own, cfg.Now()))
	}
	if errors.As(err, &handshake) && handshake.Refused {
		return nil, fmt.Errorf("%w: %w", err, est.ErrHandshake)
	}
	if err != nil {
		return nil, classify(ctx, err)
	}
	return conn, nil
}

// NewSession makes a session of a connection that is already open, such as an
// LwM2M Bootstrap-Server's; it belongs to the session then.
func NewSession(conn *coap.Conn, uri est.URI) *Session { return &Session{conn: conn, uri: uri} }

// classify names what a failed handshake or exchange means for EST.
func classify(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return fmt.Errorf("%w: %w", context.Canceled, err)
	case errors.Is(err, est.ErrServerCertificate):
		return err
	case errors.Is(err, coap.ErrKeyUnsuitable):
		return fmt.Errorf("%w: %w", est.ErrKeyUnsuitable, err)
	case errors.Is(err, coap.ErrTimeout), errors.Is(err, coap.ErrClosed), errors.Is(err, coap.ErrReset), isNetwork(err):
		var handshake *coap.HandshakeError
		if errors.As(err, &handshake) && handshake.Answered {
			return est.Unreachable(err, est.ErrFellSilent)
		}
		return est.Unreachable(err)
	}
	return err
}

// For implements est.Distributor. A link of discovery may name another host and port
// (RFC 9148 §4.1): that server is held to the host of its link, by the same rules as this
// one, and there is one session with it.
func (s *Session) For(ctx context.Context, operation est.Operation, trust *est.TrustAnchors) (est.Session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, found := s.resources[operation]
	if !found || authority(at.uri) == authority(s.uri) {
		return nil, nil
	}
	other := s.others[authority(at.uri)]
	if other != nil {
		return other, trust.VerifyServer(other.PeerChain(), at.uri.Host, s.cfg.Now())
	}
	cfg := s.cfg
	cfg.URI, cfg.Trust, cfg.Label = at.uri, trust, ""
	other, err := open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	other.resources = s.resources // which does not change any more
	if s.others == nil {
		s.others = map[string]*Session{}
	}
	s.others[authority(at.uri)] = other
	return other, nil
}

// RoundTrip implements est.Session. The server of another session that it needs is
// judged by the anchors of this one.
func (s *Session) RoundTrip(ctx context.Context, req *est.Request) (*est.Response, error) {
	if req.Operation.ShortPath() == "" {
		return nil, fmt.Errorf("%s over CoAPs: %w", req.Operation, errors.ErrUnsupported)
	}
	if s.cfg.Provisional {
		return s.provisional(ctx, req)
	}
	if other, err := s.For(ctx, req.Operation, s.cfg.Trust); err != nil {
		return nil, err
	} else if other != nil {
		return other.RoundTrip(ctx, req)
	}
	return s.exchange(ctx, req)
}

// provisional asks for cacerts. A server that does not have it where every server must
// is asked where else: what a stranger says to that is a path of its own.
func (s *Session) provisional(ctx context.Context, req *est.Request) (*est.Response, error) {
	if req.Operation != est.CACerts {
		return nil, fmt.Errorf("%s over CoAPs: the server has not been judged: %w", req.Operation, est.ErrNotTrusted)
	}
	response, err := s.exchange(ctx, req)
	var status *est.StatusError
	if !s.cfg.Discovery || !errors.As(err, &status) || !status.NotFound {
		return response, err
	}
	if err := s.discover(ctx); err != nil {
		return nil, err
	}
	return s.exchange(ctx, req)
}

// exchange sends a request to the server of this session.
func (s *Session) exchange(ctx context.Context, req *est.Request) (*est.Response, error) {
	s.mu.Lock()
	at, discovered := s.resources[req.Operation]
	absent := slices.Contains(s.absent, req.Operation)
	s.mu.Unlock()
	if !discovered {
		at = resource{uri: s.uri, accept: formats(req.Operation)[0]}
		at.uri.Root += "/" + req.Operation.ShortPath()
	}
	server := at.uri.String()
	if absent {
		return nil, &est.StatusError{Operation: req.Operation, Server: server, Code: "not among the resources discovered", Class: 4, NotFound: true}
	}
	accept := uint16(at.accept)
	request := &coap.Request{Method: codeGET, Path: at.uri.Root, Accept: &accept}
	if !req.Operation.Asks() {
		format := uint16(est.ContentFormatPKCS10)
		request.Method, request.ContentFormat, request.Body = codePOST, &format, req.Body
	}
	response, err := s.conn.Do(ctx, request)
	if err == nil && otherwise(request, formats(req.Operation), response.Code) {
		response, err = s.conn.Do(ctx, request)
	}
	if isWrongAnswer(err) {
		return nil, &est.ResponseError{Operation: req.Operation, Err: err}
	}
	if err != nil {
		return nil, fmt.Errorf("%s at %s: %w", req.Operation, server, classify(ctx, err))
	}
	return interpret(req.Operation, server, response)
}

// otherwise has a request ask for the answer in another way, once, after a server has
// said that it has none in this one, so that it has done nothing: 4.06 in the other
// format, and without Accept, which then is left to it, if that is an option that it does
// not know (4.02; RFC 7252 §5.4.1, §5.10.4). RFC 9148 §4.3 wants 281 of each server; older
// ones have 287 alone.
func otherwise(request *coap.Request, formats []est.ContentFormat, code coap.Code) bool {
	switch {
	case code == codeBadOption:
		request.Accept = nil
		return true
	case code == codeNotAcceptable && len(formats) > 1:
		other := uint16(formats[1])
		if *request.Accept == other {
			other = uint16(formats[0])
		}
		request.Accept = &other
		return true
	}
	return false
}

// formats are those that an answer may have, the one to ask for without a choice
// first (RFC 9148 §4.3).
func formats(operation est.Operation) []est.ContentFormat {
	switch operation {
	case est.CSRAttrs:
		return []est.ContentFormat{est.ContentFormatCSRAttrs}
	case est.ServerKeyGen, est.ServerKeyGenCert: // the parts are by the name of the resource
		return []est.ContentFormat{est.ContentFormatMultipartCore}
	}
	return []est.ContentFormat{est.ContentFormatPKCS7CertsOnly, est.ContentFormatPKIXCert}
}

// isWrongAnswer reports an answer that came, and whose blocks, options or size
// are not what they must be: what arrives over DTLS is the server's.
func isWrongAnswer(err error) bool {
	var block *coap.BlockError
	var option *coap.OptionError
	return errors.As(err, &block) || errors.As(err, &option) || errors.Is(err, coap.ErrBodyTooLarge)
}

// interpret maps a CoAP response to EST (RFC 9148 §4.5, §4.7).
func interpret(operation est.Operation, server string, response *coap.Response) (*est.Response, error) {
	switch class := int(response.Code) >> 5; {
	case response.Code == codeServiceUnavailable, response.Code == codeTooManyRequests:
		pending := est.NewPendingError(operation, server, retryAfter(response.MaxAge))
		pending.Detail = est.NewDetail(response.Body)
		return nil, pending
	case class != 2:
		return nil, &est.StatusError{
			Operation: operation, Server: server, Code: codeText(response.Code), Class: class,
			Unauthorized: response.Code == codeUnauthorized, NotFound: response.Code == codeNotFound, Detail: est.NewDetail(response.Body),
		}
	case response.ContentFormat == nil:
		return nil, &est.ResponseError{Operation: operation, Err: errors.New("no content-format")}
	}
	return &est.Response{ContentFormat: est.ContentFormat(*response.ContentFormat), Body: response.Body}, nil
}

// retryAfter: without a Max-Age the default is 60 seconds (RFC 7252 §5.10.5).
func retryAfter(maxAge *uint32) time.Duration {
	if maxAge == nil {
		return time.Minute
	}
	return time.Duration(*maxAge) * time.Second
}

// codeText prints a code as the RFC does: "4.03 Forbidden". go-coap v3.8.0 has no name for
// those of later RFCs, such as 4.08.
func codeText(code coap.Code) string {
	number, name := fmt.Sprintf("%d.%02d", code>>5, code&0x1f), code.String()
	if strings.HasPrefix(name, "Code(") {
		return number
	}
	return number + " " + name
}

// PeerChain implements est.Session: none where a pre-shared key stands for both ends.
func (s *Session) PeerChain() []*x509.Certificate { return s.conn.PeerCertificates() }

// ChannelBinding implements est.Session: tls-unique (RFC 9148 §3).
func (s *Session) ChannelBinding() ([]byte, error) { return s.conn.ChannelBinding() }

// ClientAuthenticated implements est.ClientAuthenticator. A pre-shared key authenticates
// too. A server that nobody has judged authenticates nobody.
func (s *Session) ClientAuthenticated() bool {
	return !s.cfg.Provisional && s.conn.ClientAuthenticated()
}

// AcceptsKey implements est.KeyAccepter.
func (s *Session) AcceptsKey(public crypto.PublicKey) bool { return s.conn.AcceptsKey(public) }

// Close implements est.Session, for those with other servers too.
func (s *Session) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, other := range s.others {
		errs = append(errs, other.Close())
	}
	return errors.Join(append(errs, s.conn.Close())...)
}

// isNetwork reports an error of the socket: a refused port, no route.
func isNetwork(err error) bool {
	var network net.Error
	var syscall *os.SyscallError
	return errors.As(err, &network) || errors.As(err, &syscall)
}
