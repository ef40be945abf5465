package coap

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/pion/dtls/v3/pkg/crypto/clientcertificate"
	"github.com/pion/dtls/v3/pkg/crypto/elliptic"
	"github.com/pion/dtls/v3/pkg/crypto/signaturehash"
	dtlsnet "github.com/pion/dtls/v3/pkg/net"
	"github.com/pion/dtls/v3/pkg/protocol/alert"
)

// Alert is the description of a TLS alert (RFC 5246 §7.2).
type Alert uint8

// The alerts that a caller may tell apart.
const (
	AlertCloseNotify          Alert = 0
	AlertHandshakeFailure     Alert = 40
	AlertNoCertificate        Alert = 41
	AlertBadCertificate       Alert = 42
	AlertCertificateRevoked   Alert = 44
	AlertCertificateExpired   Alert = 45
	AlertCertificateUnknown   Alert = 46
	AlertUnknownCA            Alert = 48
	AlertAccessDenied         Alert = 49
	AlertInsufficientSecurity Alert = 71
)

// Suites with certificates and with pre-shared keys. RFC 9148 §3 makes
// TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8 mandatory, RFC 7925 §4.2 its sister; the others are
// for peers of another mind. All hash with SHA-256.
var (
	certificateSuites = []dtls.CipherSuiteID{
		dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8,
		dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM,
		dtls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	}
	pskSuites = []dtls.CipherSuiteID{
		dtls.TLS_PSK_WITH_AES_128_CCM_8,
		dtls.TLS_PSK_WITH_AES_128_CCM,
		dtls.TLS_PSK_WITH_AES_128_GCM_SHA256,
	}
)

// suites are those that an end offers or accepts.
func suites(cfg *Config) []dtls.CipherSuiteID {
	switch {
	case cfg.PSK != nil:
		return pskSuites
	case cfg.PSKs != nil:
		return slices.Concat(certificateSuites, pskSuites)
	}
	return certificateSuites
}

// ErrKeyUnsuitable is a server that does not work with the kind of our key. It
// accepts no signature that the key makes: measured, in DTLS 1.2 pion v3.1.15 has
// an RSA key sign with PKCS #1 v1.5 only, never with PSS. Or it chose P-521 for the
// key exchange, which our hello names for such a key's sake and pion does not have.
var ErrKeyUnsuitable = errors.New("our kind of key does not work with this server in DTLS 1.2")

// HandshakeError is a handshake that did not succeed. Err is ErrTimeout when it
// took too long, Verify's own error when it refused the peer, ErrKeyUnsuitable
// when it has no use for the kind of our key, what the key said
// when it could not sign, and the system's error (ECONNREFUSED) when the peer's
// port is known to be closed.
type HandshakeError struct {
	Addr string
	// Alert is the alert that the peer sent, nil if it sent none.
	Alert *Alert
	// CertificateSent tells that our certificate and the proof of its key went
	// out, so that an alert may well be about them.
	CertificateSent bool
	// Answered tells that something of the peer's came.
	Answered bool
	// Refused tells that we ended it because of what the peer sent: it does not
	// parse, is not signed by the key of its certificate, or is not what we
	// offered and require. It is not set for what Verify refused.
	Refused bool
	Err     error
}

func (e *HandshakeError) Error() string { return fmt.Sprintf("DTLS handshake: %s: %v", e.Addr, e.Err) }

// Unwrap gives the cause.
func (e *HandshakeError) Unwrap() error { return e.Err }

// handshake is what a handshake leaves behind.
type handshake struct {
	peer   []*x509.Certificate
	signed atomic.Bool
	// types of client certificates that the server asked for.
	types []clientcertificate.Type
	psk   []byte      // pion's callback gave it that
	ours  atomic.Bool // Verify or our key ended it
	// received counts the peer's datagrams.
	received atomic.Int64
	done     atomic.Bool
	recorder *recorder
	// p521 tells that our hello names P-521, and chosen that the server chose it.
	p521   bool
	chosen atomic.Bool
}

// watchedConn is a client's socket. It counts what arrives, and loses what is in
// the clear after the handshake. Measured: pion v3.1.15 answers a record of
// application data in the clear with a fatal alert, on which the server ends the
// session: one forged datagram would do. And it
// ends a handshake in which the server chose P-521, a message that pion drops to
// wait for another one.
type watchedConn struct {
	net.PacketConn
	shake *handshake
}

func (c watchedConn) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		n, from, err := c.PacketConn.ReadFrom(p)
		if err == nil && c.shake.done.Load() && hasClearRecord(p[:n]) {
			// "invalid records SHOULD be silently discarded" (RFC 6347 §4.1.2.7).
			continue
		}
		if err == nil {
			c.shake.received.Add(1)
			c.shake.recorder.received(p[:n])
		}
		if err == nil && c.shake.p521 && !c.shake.done.Load() && choosesP521(p[:n]) {
			c.shake.chosen.Store(true)
			return 0, from, net.ErrClosed
		}
		return n, from, err
	}
}

func (c watchedConn) WriteTo(p []byte, to net.Addr) (int, error) {
	c.shake.recorder.sent(p)
	return c.PacketConn.WriteTo(p, to)
}

// hasClearRecord reports a record of epoch 0 among those of a datagram
// (RFC 6347 §4.1): type, version, epoch, sequence_number, length, fragment.
func hasClearRecord(datagram []byte) bool {
	const header = 13
	for len(datagram) >= header {
		if datagram[3] == 0 && datagram[4] == 0 {
			return true
		}
		datagram = datagram[min(header+int(datagram[11])<<8+int(datagram[12]), len(datagram)):]
	}
	return false
}

// choosesP521 reports a ServerKeyExchange with that curve in the clear:
//
//	record:    type(1) version(2) epoch(2) sequence_number(6) length(2), RFC 6347 §4.1
//	handshake: msg_type(1) length(3) message_seq(2) fragment_offset(3) fragment_length(3), RFC 6347 §4.2.2
//	body:      curve_type(1) namedcurve(2), RFC 8422 §5.4
func choosesP521(datagram []byte) bool {
	const (
		recordHeader, header = 13, 12
		handshakeRecord      = 22
		serverKeyExchange    = 12
		namedCurve           = 3
	)
	for len(datagram) >= recordHeader {
		record := datagram[:min(recordHeader+int(datagram[11])<<8+int(datagram[12]), len(datagram))]
		datagram = datagram[len(record):]
		if record[0] != handshakeRecord || record[3] != 0 || record[4] != 0 || len(record) < recordHeader+header+3 {
			continue
		}
		message, body := record[recordHeader:], record[recordHeader+header:]
		first := message[6] == 0 && message[7] == 0 && message[8] == 0
		if message[0] == serverKeyExchange && first && body[0] == namedCurve && int(body[1])<<8+int(body[2]) == int(groupP521) {
			return true
		}
	}
	return false
}

// proofSigner notes that the key has signed. A client's key signs only its
// CertificateVerify: after the server asked for a certificate, after we
// accepted the server's, and right before the flight leaves.
type proofSigner struct {
	crypto.Signer
	shake *handshake
}

func (s proofSigner) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := s.Signer.Sign(rand, digest, opts)
	if err == nil {
		s.shake.signed.Store(true)
	} else {
		s.shake.ours.Store(true)
	}
	return signature, err
}

func (h *handshake) certificate(cfg *Config) *tls.Certificate {
	if cfg.Key == nil {
		return new(tls.Certificate)
	}
	chain := cfg.Certificate
	if cfg.Chain != nil {
		chain = cfg.Chain()
	}
	return &tls.Certificate{Certificate: chain, PrivateKey: proofSigner{cfg.Key, h}}
}

// dtlsOptions are common to both ends.
func dtlsOptions(cfg *Config, verify func(*dtls.State) error) []dtls.Option {
	return []dtls.Option{
		dtls.WithCipherSuites(suites(cfg)...),
		dtls.WithEllipticCurves(groups(cfg)...),
		// RFC 9148 §3, RFC 7925 §16: extended master secret.
		dtls.WithExtendedMasterSecret(dtls.RequireExtendedMasterSecret),
		dtls.WithFlightInterval(cfg.FlightInterval),
		// pion verifies with the wall clock only; all of it is Verify's.
		dtls.WithInsecureSkipVerify(true),
		dtls.WithVerifyConnection(verify),
	}
}

// groupP521 is secp521r1, which pion has no name for (RFC 8422 §5.1.1).
const groupP521 elliptic.Curve = 25

// groups are the curves for the key exchange: P-256 alone, of which RFC 9148 §3
// makes the support mandatory. A client's hello also names the curve of its own
// certificate: it says which curves its end supports (RFC 8422 §5.1), and
// OpenSSL 3.0 answers illegal_parameter to a certificate on another.
func groups(cfg *Config) []elliptic.Curve {
	curves := []elliptic.Curve{elliptic.P256}
	if cfg.Key == nil {
		return curves
	}
	if key, ok := cfg.Key.Public().(*ecdsa.PublicKey); ok {
		switch key.Curve.Params().BitSize {
		case 384:
			curves = append(curves, elliptic.P384)
		case 521:
			curves = append(curves, groupP521)
		}
	}
	return curves
}

// errNoScheme is pion's error for a server that takes no signature of our key.
var _, errNoScheme = signaturehash.SelectSignatureScheme(nil, proofSigner{})

// parsePeer parses the chain of a handshake.
func parsePeer(state *dtls.State) ([]*x509.Certificate, error) {
	var peer []*x509.Certificate
	for _, der := range state.PeerCertificates {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("peer's certificate: %w", err)
		}
		peer = append(peer, cert)
	}
	if len(peer) == 0 {
		return nil, errors.New("peer's certificate: none")
	}
	return peer, nil
}

// Dial connects to addr, "host:port", and completes the handshake. A failure of
// it is a *HandshakeError. Of a host with several addresses, such as one of each version
// of IP, the next is tried where one answers nothing: datagrams do not show it sooner.
func Dial(ctx context.Context, addr string, cfg Config) (*Conn, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("connect: %s: %w", addr, err)
	}
	ctx, cancel := context.WithTimeout(ctx, cfg.HandshakeTimeout)
	defer cancel()
	addresses, err := resolve(ctx, addr)
	if err != nil {
		return nil, &HandshakeError{Addr: addr, Err: timedOut(err)}
	}
	return dialEach(ctx, addr, addresses, cfg)
}

// dialEach tries the addresses of a host, each for its share of the time that is left.
func dialEach(ctx context.Context, addr string, addresses []string, cfg Config) (*Conn, error) {
	deadline, _ := ctx.Deadline()
	for i := 0; ; i++ {
		share := time.Until(deadline) / time.Duration(len(addresses)-i)
		conn, err := dial(ctx, addr, addresses[i], share, cfg)
		var handshake *HandshakeError
		if err == nil || i == len(addresses)-1 || ctx.Err() != nil || !errors.As(err, &handshake) || handshake.Answered {
			return conn, err
		}
	}
}

// maxAddresses bounds those of a host that are tried.
const maxAddresses = 4

// resolve returns the addresses of a "host:port", at least one, in the order in which the
// system prefers them (RFC 6724).
func resolve(ctx context.Context, addr string) ([]string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return []string{addr}, nil
	}
	hosts, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		return nil, err
	}
	addresses := make([]string, min(len(hosts), maxAddresses))
	for i := range addresses {
		addresses[i] = net.JoinHostPort(hosts[i], port)
	}
	return addresses, nil
}

// dial connects to one address of a host.
func dial(ctx context.Context, addr, at string, timeout time.Duration, cfg Config) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var dialer net.Dialer
	udp, err := dialer.DialContext(ctx, "udp", at)
	if err != nil {
		return nil, &HandshakeError{Addr: addr, Err: timedOut(err)}
	}
	shake := &handshake{recorder: newRecorder(), p521: slices.Contains(groups(&cfg), groupP521)}
	options := dtlsOptions(&cfg, func(state *dtls.State) (err error) {
		if cfg.PSK != nil {
			return nil // the server has the key: its Finished says so
		}
		if shake.peer, err = parsePeer(state); err == nil {
			err = cfg.Verify(shake.peer)
			shake.ours.Store(err != nil)
		}
		return err
	})
	// Not WithCertificates: pion silently drops a certificate that the server's
	// list of CAs does not name.
	if cfg.PSK == nil {
		options = append(options, dtls.WithGetClientCertificate(func(asked *dtls.CertificateRequestInfo) (*tls.Certificate, error) {
			shake.types = asked.CertificateTypes
			return shake.certificate(&cfg), nil
		}))
	} else {
		options = append(options, dtls.WithPSKIdentityHint([]byte(cfg.PSKIdentity)), dtls.WithPSK(func([]byte) ([]byte, error) {
			key, err := cfg.PSK()
			shake.psk = key
			shake.ours.Store(err != nil)
			return key, err
		}))
		defer func() { clear(shake.psk) }() // of what pion copies, its garbage is the rest
	}
	options = append(options, dtls.WithKeyLogWriter(shake.recorder))
	if cfg.ServerName != "" {
		options = append(options, dtls.WithServerName(cfg.ServerName))
	}
	clientOptions := make([]dtls.ClientOption, len(options))
	for i, option := range options {
		clientOptions[i] = option
	}
	conn, err := dtls.ClientWithOptions(watchedConn{dtlsnet.PacketConnFromConn(udp), shake}, udp.RemoteAddr(), clientOptions...)
	if err != nil {
		return nil, errors.Join(&HandshakeError{Addr: addr, Err: err}, udp.Close())
	}
	if err := conn.HandshakeContext(ctx); err != nil {
		// The close error of a connection that never was says nothing.
		_ = conn.Close()
		_ = udp.Close()
		return nil, handshakeError(addr, shake, err)
	}
	shake.done.Store(true)
	c := newConn(conn, cfg, nil)
	c.peer, c.authenticated, c.keyTypes = shake.peer, shake.signed.Load() || cfg.PSK != nil, shake.types
	c.binding, c.unbound = shake.recorder.tlsUnique()
	c.start()
	return c, nil
}

func handshakeError(addr string, shake *handshake, err error) *HandshakeError {
	result := &HandshakeError{Addr: addr, CertificateSent: shake.signed.Load(), Answered: shake.received.Load() > 0, Err: err}
	var pionError *dtls.HandshakeError
	if errors.As(err, &pionError) {
		result.Err = pionError.Err
	}
	var temporary *dtls.TemporaryError
	if errors.As(result.Err, &temporary) {
		result.Err = temporary.Err // the socket's, without "dtls temporary"
	}
	result.Err = timedOut(result.Err)
	// pion's error of a received alert is unexported, but encodes itself like
	// the alert it embeds: level, description.
	var received interface {
		error
		Marshal() ([]byte, error)
	}
	if errors.As(err, &received) {
		if encoded, err := received.Marshal(); err == nil && len(encoded) == 2 {
			result.Alert = pointer(Alert(encoded[1]))
			result.Err = fmt.Errorf("the peer's alert %d (%v)", encoded[1], alert.Description(encoded[1]))
		}
	}
	if errors.Is(result.Err, ErrTimeout) {
		// Where a peer falls silent tells an address that is wrong from a
		// certificate that is not liked.
		if n := shake.received.Load(); result.CertificateSent {
			result.Err = fmt.Errorf("%w, after our certificate", result.Err)
		} else if n > 0 {
			result.Err = fmt.Errorf("%w, after %d datagrams", result.Err, n)
		}
	}
	switch {
	case shake.chosen.Load():
		result.Err = fmt.Errorf("%w: it chose secp521r1 for the key exchange, which is not there", ErrKeyUnsuitable)
	case result.Alert != nil, shake.ours.Load(), isOutside(result.Err):
	case errors.Is(err, errNoScheme):
		result.Err = fmt.Errorf("%w: it takes no signature that this key makes", ErrKeyUnsuitable)
	default:
		result.Refused, result.Err = true, ofPeer(result.Err)
	}
	return result
}

// isOutside reports the end of a handshake that nothing in it has caused.
// (pion's own errors are net.Errors too.)
func isOutside(err error) bool {
	var socket *net.OpError
	return errors.Is(err, ErrTimeout) || errors.Is(err, context.Canceled) || errors.As(err, &socket) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, dtls.ErrConnClosed)
}

// ofPeer says what is wrong with what the peer sent.
func ofPeer(err error) error {
	var fatal *dtls.FatalError
	if errors.As(err, &fatal) {
		return fatal.Err // without "dtls fatal"
	}
	var other net.Error
	if errors.As(err, &other) {
		return err // another of pion's
	}
	// What pion passes on from crypto/x509 and encoding/asn1, of whatever it parses.
	return fmt.Errorf("the peer's certificate or signature: %w", err)
}

// timedOut turns the errors of a deadline into ErrTimeout.
func timedOut(err error) error {
	var timeout net.Error
	if errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout() {
		return ErrTimeout
	}
	return err
}

// PeerCertificates is the chain that the peer presented and Verify accepted, leaf first;
// none where a pre-shared key stands for both ends.
func (c *Conn) PeerCertificates() []*x509.Certificate { return c.peer }

// ClientAuthenticated reports whether the server of a dialled connection asked
// for a certificate and ours was sent and proven in a full handshake, or Config.PSK
// was. There is no other kind of handshake here: sessions are not resumed.
func (c *Conn) ClientAuthenticated() bool { return c.authenticated }

// AcceptsKey reports whether the server of a dialled connection would take a
// certificate for the key: it asked for ones of its type (RFC 5246 §7.4.4,
// RFC 8422 §5.5), or for none at all.
func (c *Conn) AcceptsKey(public crypto.PublicKey) bool {
	wanted := clientcertificate.ECDSASign
	if _, isRSA := public.(*rsa.PublicKey); isRSA {
		wanted = clientcertificate.RSASign
	}
	return len(c.keyTypes) == 0 || slices.Contains(c.keyTypes, wanted)
}

// ChannelBinding is tls-unique (RFC 5929 §3), 12 bytes that only the two ends of
// this connection know.
func (c *Conn) ChannelBinding() ([]byte, error) { return c.binding, c.unbound }

// serverOptions are those of each connection of a server.
func serverOptions(cfg *Config) []dtls.ServerOption {
	shake := new(handshake)
	options := []dtls.ServerOption{
		// RFC 9148 §3: the client presents a certificate for every function.
		dtls.WithClientAuth(dtls.RequireAnyClientCert),
		dtls.WithGetCertificate(func(*dtls.ClientHelloInfo) (*tls.Certificate, error) {
			return shake.certificate(cfg), nil
		}),
	}
	if cfg.PSKs != nil {
		options = append(options, dtls.WithPSK(func(identity []byte) ([]byte, error) {
			if key, known := cfg.PSKs(string(identity)); known {
				return key, nil
			}
			return nil, errUnknownPSK
		}))
	}
	for _, option := range dtlsOptions(cfg, func(state *dtls.State) error {
		if slices.Contains(pskSuites, state.CipherSuiteID) {
			return nil
		}
		peer, err := parsePeer(state)
		if err != nil {
			return err
		}
		return cfg.Verify(peer)
	}) {
		options = append(options, option)
	}
	return options
}

// accepted is a server's end of a connection, with the recorder of its handshake.
type accepted struct {
	*dtls.Conn
	recorder *recorder
}

// accept waits for the next connection, whose handshake is not done yet.
func accept(s *socket, options []dtls.ServerOption) (*accepted, error) {
	association, from, err := s.Accept()
	if err != nil {
		return nil, err
	}
	recorder := newRecorder()
	conn, err := dtls.ServerWithOptions(recordedConn{association, recorder}, from, append(slices.Clone(options), dtls.WithKeyLogWriter(recorder))...)
	if err != nil {
		return nil, errors.Join(err, association.Close())
	}
	return &accepted{conn, recorder}, nil
}

// errUnknownPSK is an identity that a server has no key for.
var errUnknownPSK = errors.New("unknown PSK identity")

// client is who is at the other end of a server's connection: a certificate's owner, or
// that of a pre-shared key.
type client struct {
	chain    []*x509.Certificate
	identity string
	binding  []byte // nil where it is not known
}

// shake completes a server's handshake.
func (a *accepted) shake(ctx context.Context, cfg *Config) (c client, err error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.HandshakeTimeout)
	defer cancel()
	if err := a.HandshakeContext(ctx); err != nil {
		return c, handshakeError(a.RemoteAddr().String(), new(handshake), err)
	}
	state, ok := a.ConnectionState()
	if !ok {
		return c, errors.New("DTLS handshake: no state")
	}
	if slices.Contains(pskSuites, state.CipherSuiteID) {
		c.identity = string(state.IdentityHint)
	} else if c.chain, err = parsePeer(&state); err != nil {
		return c, err
	}
	if c.binding, err = a.recorder.tlsUnique(); err != nil {
		cfg.Logger.Info("coap: handshake", "peer", a.RemoteAddr(), "error", err)
	}
	return c, nil
}
