// Package https carries EST over HTTPS (RFC 7030, RFC 8951): it opens a session,
// which is one TLS connection for all its requests, and maps HTTP's answers to the
// errors of package est. It sends each request once, but for the two repetitions
// that RFC 7030 has: with a password after a 401, and where a redirection of the
// same server points. Whether to ask again is for its caller.
//
// Measured: net/http of Go 1.26 writes what a server sends beyond its Content-Length to
// the standard logger, be it of a key: a program that asks for keys discards that.
package https

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"

	"estenroll/est"
)

// Config is what a session needs. URI and Trust are required.
type Config struct {
	URI est.URI
	// Label is appended to URI's path. Default: none.
	Label est.Label

	// Certificate (DER, leaf first) and Key authenticate us in the handshake, if the
	// server asks for a certificate (RFC 7030 §3.3.2). Default: with a Password none, which
	// is then all that authenticates us (RFC 7030 §3.2.3); without one they are required.
	Certificate [][]byte
	Key         crypto.Signer
	// Trust judges the server, at the time of Now. Default of Now: time.Now.
	Trust *est.TrustAnchors
	Now   func() time.Time
	// Provisional takes whatever certificate the server shows. Then nothing but
	// cacerts is sent to it, which its caller judges by what it holds: a CSR, a
	// password and a redirection are for a session that was judged (RFC 7030 §4.1.1).
	Provisional bool

	// User and Password authenticate us by HTTP Basic too, to a server that asks for
	// it with a 401 (RFC 7030 §3.2.3); Password is called then, once a session, and
	// what it returns is cleared. Default: none.
	User     string
	Password func() ([]byte, error)

	// Proxy returns the proxy for a request, nil for none: http://, with a user
	// perhaps, or socks5://. Default: http.ProxyFromEnvironment.
	Proxy func(*http.Request) (*url.URL, error)

	// HandshakeTimeout bounds the way to a secure session: the connection, to a proxy
	// or through it, and the handshake. Default: 30s.
	HandshakeTimeout time.Duration
	// ExchangeTimeout bounds a request with all that it leads to, from its first byte
	// to the last of the answer, so the wait for the answer's header too. Default: 2m.
	ExchangeTimeout time.Duration
}

// Session is an open connection to an EST server. It is safe for concurrent use;
// exchanges go one after the other. A server that closes the connection after an
// answer gets another one, on which it must show the same certificate.
type Session struct {
	cfg  Config
	own  *x509.Certificate // our leaf, nil for none
	root est.URI           // with the label

	mu            sync.Mutex // over an exchange as a whole, and what follows
	authorization string     // of HTTP Basic, once it was asked for
	bound         *link      // what a CSR is bound to, nil where none is: on no other is one sent

	linkMu sync.Mutex
	link   *link
	closed bool
}

var (
	_ est.Session             = (*Session)(nil)
	_ est.ClientAuthenticator = (*Session)(nil)
	_ est.KeyAccepter         = (*Session)(nil)
)

// errClosed is a session that was closed.
var errClosed = errors.New("the session is closed")

// Dial opens a session: the server's chain, name and time are judged before
// anything is sent to it. A server that speaks TLS 1.3 says only with its first
// answer whether it accepts our certificate: RoundTrip reports that then.
// est.ErrUnreachable; est.ErrServerCertificate beside est.ErrNotTrusted or
// est.ErrNotValidNow; est.ErrHandshake; est.ErrCredentialRefused,
// est.ErrCredentialNotYetValid, est.ErrKeyUnsuitable, est.ErrCertificateWanted;
// est.ErrKeyMismatch for a Key that is not the Certificate's; and what the Key says when
// it cannot sign.
func Dial(ctx context.Context, cfg Config) (*Session, error) {
	s := &Session{cfg: cfg, root: cfg.URI.WithLabel(cfg.Label)}
	err := s.complete()
	if err == nil {
		s.link, err = s.connect(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("open session with %s: %w", cfg.URI, err)
	}
	return s, nil
}

// complete fills in the defaults and refuses what no session can be made of.
func (s *Session) complete() (err error) {
	if s.cfg.Trust == nil && !s.cfg.Provisional {
		return fmt.Errorf("no trust anchors: %w", est.ErrNotTrusted)
	}
	if len(s.cfg.Certificate) > 0 || s.cfg.Key != nil || s.cfg.Password == nil {
		if s.own, err = est.OwnCertificate(s.cfg.Certificate, s.cfg.Key); err != nil {
			return err
		}
	}
	if s.cfg.Now == nil {
		s.cfg.Now = time.Now
	}
	if s.cfg.Proxy == nil {
		s.cfg.Proxy = http.ProxyFromEnvironment
	}
	if s.cfg.HandshakeTimeout == 0 {
		s.cfg.HandshakeTimeout = 30 * time.Second
	}
	if s.cfg.ExchangeTimeout == 0 {
		s.cfg.ExchangeTimeout = 2 * time.Minute
	}
	return nil
}

// RoundTrip implements est.Session. A request without a body is a GET.
func (s *Session) RoundTrip(ctx context.Context, req *est.Request) (*est.Response, error) {
	if s.cfg.Provisional && req.Operation != est.CACerts {
		return nil, fmt.Errorf("%s over HTTPS: the server has not been judged: %w", req.Operation, est.ErrNotTrusted)
	}
	if req.Operation == est.ServerKeyGenCert {
		return nil, fmt.Errorf("%s over HTTPS: %w", req.Operation, errors.ErrUnsupported)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, s.cfg.ExchangeTimeout)
	defer cancel()
	at := s.root
	at.Root += "/" + string(req.Operation)
	answer, err := s.exchange(ctx, req, at)
	var wrong *answerError
	var status *est.StatusError
	switch {
	case errors.As(err, &wrong):
		return nil, &est.ResponseError{Operation: req.Operation, Err: wrong.cause}
	case errors.As(err, &status):
		return nil, err // which says of what and where
	case err != nil:
		return nil, fmt.Errorf("%s at %s: %w", req.Operation, at, err)
	}
	return s.interpret(req.Operation, answer)
}

// PeerChain implements est.Session.
func (s *Session) PeerChain() []*x509.Certificate { return s.current().peer }

// ChannelBinding implements est.Session by est.TLSBinding, on another connection where
// the server has closed the last one.
func (s *Session) ChannelBinding() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, err := s.usable(context.Background()) // which HandshakeTimeout bounds
	if err != nil {
		return nil, err
	}
	binding, err := est.TLSBinding(l.state)
	if err != nil {
		return nil, err
	}
	s.bound = l
	return binding, nil
}

// ClientAuthenticated implements est.ClientAuthenticator. A server that nobody has
// judged authenticates nobody.
func (s *Session) ClientAuthenticated() bool {
	return !s.cfg.Provisional && s.current().signed.Load()
}

// AcceptsKey implements est.KeyAccepter.
func (s *Session) AcceptsKey(public crypto.PublicKey) bool { return s.current().acceptsKey(public) }

// Close implements est.Session.
func (s *Session) Close() error {
	s.linkMu.Lock()
	defer s.linkMu.Unlock()
	s.closed = true
	return s.link.conn.Close()
}

func (s *Session) current() *link {
	s.linkMu.Lock()
	defer s.linkMu.Unlock()
	return s.link
}

// usable returns the connection, or another one where the server has closed it.
func (s *Session) usable(ctx context.Context) (*link, error) {
	s.linkMu.Lock()
	before, closed := s.link, s.closed
	s.linkMu.Unlock()
	if closed {
		return nil, errClosed
	}
	ended := before.conn.Err()
	if ended == nil {
		return before, nil
	}
	if _, alerted := remoteAlert(ended); alerted {
		return nil, s.classify(ctx, before, ended)
	}
	next, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	// What has been judged is that chain: whoever asked for it may act on it still.
	if !next.peer[0].Equal(before.peer[0]) {
		return nil, errors.Join(est.Unreachable(errors.New("the server has closed the connection and shows another certificate on the next")), next.conn.Close())
	}
	s.linkMu.Lock()
	defer s.linkMu.Unlock()
	if s.closed {
		return nil, errors.Join(errClosed, next.conn.Close())
	}
	s.link = next
	return next, nil
}
