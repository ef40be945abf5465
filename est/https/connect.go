package https

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"reflect"
	"sync"
	"sync/atomic"
	"syscall"

	"estenroll/est"
)

const maxHeader = 32 << 10 // bytes of an answer's header

// link is a connection and what its handshake has left behind.
type link struct {
	conn  *http.ClientConn
	state tls.ConnectionState
	peer  []*x509.Certificate
	// asked is what kinds of signatures the server takes of a client; nil if it did
	// not ask for a certificate.
	asked  *tls.CertificateRequestInfo
	signed atomic.Bool // our key has signed, so our certificate is out

	mu      sync.Mutex
	keyFail error // what our key said when it could not sign
}

// connect opens a connection and completes its handshake.
func (s *Session) connect(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	l := new(link)
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		TLSHandshakeDone: func(state tls.ConnectionState, _ error) { l.state = state },
	})
	conn, err := s.transport(l).NewClientConn(traced, "https", s.cfg.URI.Address())
	if err != nil {
		return nil, s.handshakeFailed(ctx, l, err)
	}
	l.conn = conn
	return l, nil
}

// transport is for one connection: HTTP/1.1, which is what EST is written for.
func (s *Session) transport(l *link) *http.Transport {
	http1 := new(http.Protocols)
	http1.SetHTTP1(true)
	return &http.Transport{
		Proxy: s.proxy, TLSClientConfig: s.tlsConfig(l), Protocols: http1,
		DisableCompression: true, MaxResponseHeaderBytes: maxHeader,
		OnProxyConnectResponse: func(_ context.Context, proxy *url.URL, _ *http.Request, answer *http.Response) error {
			if answer.StatusCode == http.StatusOK {
				return nil
			}
			return est.Unreachable(fmt.Errorf("the proxy %s answers %s", proxy.Host, statusText(answer.StatusCode)))
		},
	}
}

// proxy is the configured one. What is over TLS would be judged by the trust
// anchors of EST and get our certificate.
func (s *Session) proxy(req *http.Request) (*url.URL, error) {
	proxy, err := s.cfg.Proxy(req)
	if err != nil {
		return nil, errors.New("the proxy's setting is not a URL") // it may have a password in it
	}
	if proxy != nil && proxy.Scheme != "http" && proxy.Scheme != "socks5" && proxy.Scheme != "socks5h" {
		return nil, fmt.Errorf("the proxy %s: want http:// or socks5://", proxy.Host)
	}
	return proxy, nil
}

// tlsConfig has the server's chain, name, use and time judged by Trust at the
// session's time, and by nothing else: crypto/tls would use its own anchors and the
// wall clock. There is no session to resume: each handshake is a full one.
func (s *Session) tlsConfig(l *link) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		InsecureSkipVerify:     true,
		VerifyConnection: func(state tls.ConnectionState) error {
			l.peer = state.PeerCertificates
			if s.cfg.Provisional {
				return nil
			}
			return s.cfg.Trust.VerifyServer(state.PeerCertificates, s.cfg.URI.Host, s.cfg.Now())
		},
		// Not Certificates: a certificate that the server's list of CAs does not name
		// would be left out silently.
		GetClientCertificate: func(asked *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			l.asked = asked
			if s.own == nil {
				return new(tls.Certificate), nil // RFC 8446 §4.4.2: an empty list
			}
			if !l.acceptsKey(s.cfg.Key.Public()) {
				return nil, fmt.Errorf("%w: it takes no signature that this key makes", est.ErrKeyUnsuitable)
			}
			return &tls.Certificate{Certificate: s.cfg.Certificate, PrivateKey: proofSigner{s.cfg.Key, l}}, nil
		},
	}
}

// proofSigner notes that the key has signed: a client's key signs nothing in a
// handshake but its CertificateVerify. Measured: crypto/tls of Go 1.26 keeps only
// the text of a signer's error.
type proofSigner struct {
	crypto.Signer
	link *link
}

func (p proofSigner) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := p.Signer.Sign(rand, digest, opts)
	if err == nil {
		p.link.signed.Store(true)
		return signature, nil
	}
	p.link.mu.Lock()
	defer p.link.mu.Unlock()
	p.link.keyFail = err
	return nil, err
}

// acceptsKey reports whether the server, which has asked for a certificate, takes
// a signature of the key.
func (l *link) acceptsKey(public crypto.PublicKey) bool {
	if l.asked == nil {
		return true
	}
	kinds := tls.CertificateRequestInfo{SignatureSchemes: l.asked.SignatureSchemes, Version: l.asked.Version}
	return kinds.SupportsCertificate(&tls.Certificate{PrivateKey: publicOnly{public}}) == nil
}

// publicOnly is a signer to be asked for its public key.
type publicOnly struct{ public crypto.PublicKey }

func (p publicOnly) Public() crypto.PublicKey { return p.public }
func (publicOnly) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.ErrUnsupported
}

// handshakeFailed names what the end of a handshake means for EST.
func (s *Session) handshakeFailed(ctx context.Context, l *link, err error) error {
	classified := s.classify(ctx, l, err)
	if classified != nil {
		return classified
	}
	// What is left is what crypto/tls says of the other end's messages.
	return fmt.Errorf("TLS handshake: %w: %w", err, est.ErrHandshake)
}

// classify names what a failed handshake or exchange means for EST; nil if that
// depends on which it was.
func (s *Session) classify(ctx context.Context, l *link, err error) error {
	l.mu.Lock()
	keyFail := l.keyFail
	l.mu.Unlock()
	switch alert, alerted := remoteAlert(err); {
	case errors.Is(ctx.Err(), context.Canceled):
		return fmt.Errorf("%w: %w", context.Canceled, err)
	case keyFail != nil:
		return fmt.Errorf("TLS handshake: %w", keyFail)
	case errors.Is(err, est.ErrServerCertificate), errors.Is(err, est.ErrKeyUnsuitable), errors.Is(err, est.ErrUnreachable):
		return err
	case alerted:
		meaning := est.AlertMeaning(alert, l.signed.Load(), s.own, s.cfg.Now())
		if s.own == nil && l.asked != nil && errors.Is(meaning, est.ErrHandshake) {
			meaning = est.ErrCertificateWanted
		}
		return fmt.Errorf("the server's alert %d: %w", alert, meaning)
	case ctx.Err() != nil:
		return est.Unreachable(fmt.Errorf("no answer in time: %w", ctx.Err()))
	case isNetwork(err):
		return est.Unreachable(err)
	}
	return nil
}

// remoteAlert returns the alert that the server sent. crypto/tls has no exported
// type for it: it is a uint8, in an OpError that says whose it is.
func remoteAlert(err error) (uint8, bool) {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" {
		return 0, false
	}
	if value := reflect.ValueOf(op.Err); value.Kind() == reflect.Uint8 {
		return uint8(value.Uint()), true
	}
	return 0, false
}

// isNetwork reports the end of a connection that no message has caused.
func isNetwork(err error) bool {
	var network net.Error
	var errno syscall.Errno
	return errors.As(err, &network) || errors.As(err, &errno) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed)
}
