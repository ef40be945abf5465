// Package testserver is an EST CA for tests, and an adversary for the device
// under test: RFC 9148 (EST over CoAPs) and RFC 7030 (EST over HTTPS), two doors of
// one CA, with faults that can be switched on while it runs.
//
// It is NOT a CA to trust: its keys are made when it starts, live in memory,
// are protected by nothing, and end with the process; every CA's subject says
// TEST ONLY. It binds loopback unless told otherwise.
//
// [New] returns a server that answers already:
//
//	server, err := testserver.New(testserver.Config{Lifetime: time.Minute})
//	…
//	defer server.Close()
//	cert, err := server.IssueIDevID(testserver.IDevIDRequest{PublicKey: key, RawSubject: subject})
//	// enrol at server.URI(), trusting server.Root()
//	issued := server.Issuances()
//
// The program est-testserver is this package with flags. README.md in its directory is
// the guide to both, for those who test their own client.
package testserver

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"estenroll/csr"
	"estenroll/internal/coap"
)

// Config says how a test server is. The zero value works.
type Config struct {
	// Listen is the UDP address, host:port; port 0 takes a free one.
	// Default: 127.0.0.1:0.
	Listen string
	// ListenLinked is the UDP address of a second CoAPs door, host:port, which alone has
	// the resources that a client has to discover: the links at the first lead to it, as
	// absolute URIs (RFC 9148 §4.1). Default: there is no such door.
	ListenLinked string
	// ListenHTTPS is the TCP address of the HTTPS door, host:port (RFC 7030).
	// Default: there is no such door.
	ListenHTTPS string
	// AllowNonLoopback permits addresses to listen on that others can reach.
	AllowNonLoopback bool
	// Names are DNS names or IP addresses of the server's certificate, beside
	// localhost, 127.0.0.1, ::1 and the addresses that are listened on.
	Names []string
	// Now is the clock of the CA, of the judgement of client certificates and of
	// the record. Default: time.Now.
	Now func() time.Time

	// Lifetime of an issued certificate from now on, in whole seconds, at least
	// one. Default: 90 days.
	Lifetime time.Duration
	// Backdate is how far in the past an issued certificate begins, in whole
	// seconds, for devices whose clock is a little behind. Default: 1 minute.
	Backdate time.Duration
	// SingleCA leaves the intermediate CA out: the root issues.
	SingleCA bool
	// AnswerChain adds the intermediate CA to the answer of sen, sren and skg.
	// RFC 7030 §4.2.3 wants the issued certificate alone, and that is the default.
	AnswerChain bool
	// AnswerRoot adds the root to the answer of sen, sren and skg.
	AnswerRoot bool
	// OtherCAs adds so many CAs that have nothing to do with this server to crts,
	// a root and an intermediate of each; this server's own come last.
	OtherCAs int
	// Labels are EST labels (RFC 9148 §4.1): the resources are also below
	// /.well-known/est/LABEL and /e/plz/LABEL.
	Labels []string

	// CSRAttributes is what att and csrattrs answer (RFC 7030 §4.5), in DER;
	// csr.Attributes makes it. Default: none, and neither of the two.
	CSRAttributes []byte

	// ServerKeyGen answers skg, skc and serverkeygen with a key of the kind of the
	// CSR's and a certificate for it (RFC 9148 §4.8, RFC 7030 §4.4). Default: there
	// are none.
	ServerKeyGen bool
	// EnvelopeKeys are those that a CSR may name for the encryption of such a key
	// (RFC 7030 §4.4.1). Default: none, and one that names any is refused.
	EnvelopeKeys []EnvelopeKey
	// RequirePoP refuses a CSR that is not linked to its session by a challengePassword
	// (RFC 7030 §3.5). One that has a challengePassword is held to it anyway.
	RequirePoP bool

	// ReplayWindow is how long the same CSR for the same operation from the same
	// client certificate gets the same certificate, as long as that has not
	// expired. Default: 24 h.
	ReplayWindow time.Duration
	// NoReplay issues anew for every request.
	NoReplay bool

	// PSKs are pre-shared keys by the identities of devices, which a CoAPs door takes in the
	// place of a client certificate, for all but sren (RFC 7030 §3.3.3). Default: none.
	PSKs map[string][]byte

	// TLS12 has the HTTPS door speak TLS 1.2 only. Default: TLS 1.3 too.
	TLS12 bool
	// HTTPUser and HTTPPassword are what a CSR needs over HTTPS by HTTP Basic, with a
	// client certificate or without one. Default: a client certificate alone.
	HTTPUser, HTTPPassword string

	// Record is the path of a file that every [Event] is appended to as a line of
	// JSON, on disk before the certificate leaves. Default: memory only.
	Record string
	// Control is the path of a Unix socket for [Control]; whoever can open it
	// rules the server. Default: none.
	Control string
	// Faults to begin with.
	Faults Faults

	// Raw answers CoAP by a few lines of its own instead of by the CoAP server of
	// this module, so that the faults of messages and of blocks can be. BlockSize, ProcessingDelay,
	// AckTimeout and Logger are not for it, nor is RequirePoP: over CoAP it refuses
	// every CSR with a challengePassword, for it does not know its sessions' binding.
	Raw bool

	// BlockSize is the largest block of an answer, 16 to 1024 bytes. Default: 1024.
	BlockSize int
	// ProcessingDelay is how long a request waits for its piggybacked answer
	// before an empty ACK announces a separate one. Default: half of AckTimeout.
	ProcessingDelay time.Duration
	// AckTimeout is the first retransmission timeout (RFC 7252 §4.8). Default: 2 s.
	AckTimeout time.Duration
	// FlightInterval is the handshake's retransmission timeout. Default: 1 s.
	FlightInterval time.Duration
	// Logger of the transport. Default: none.
	Logger *slog.Logger
}

// Server is a running test server. It is safe for concurrent use.
type Server struct {
	cfg     Config
	ca      atomic.Pointer[authorities] // what it points at is never changed
	key     crypto.Signer               // of the server's certificates
	names   []string                    // in them
	record  *record
	coap    door
	linked  door       // nil for none
	https   *httpsDoor // nil for none
	control net.Listener

	mu       sync.Mutex // over what follows, and over each issuance and each rollover as a whole
	faults   Faults
	deferred map[replayKey]int
	issued   map[shapedKey]issued

	stopping context.Context // ends when Close begins
	cancel   context.CancelFunc
	serving  sync.WaitGroup
	done     chan struct{} // closed when the CoAPs door has ended
	serveErr error         // set before done is closed
	httpsErr error         // why the HTTPS door has ended, if not by Close
	// linkedErr is the same of the second CoAPs door.
	linkedErr error
	close     func() error
}

// door is a front door: a socket, and whoever answers at it.
type door interface {
	Addr() net.Addr
	Serve(coap.Handler) error
	Close() error
}

// New makes the keys of a test server and starts it. Close it.
func New(cfg Config) (*Server, error) {
	s, err := start(cfg)
	if err != nil {
		return nil, fmt.Errorf("test server: %w", err)
	}
	return s, nil
}

func start(cfg Config) (_ *Server, err error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	var hosts []string
	for _, address := range []string{cfg.Listen, cfg.ListenLinked, cfg.ListenHTTPS} {
		if address == "" {
			continue
		}
		host, err := checkListen(address, cfg.AllowNonLoopback)
		if err != nil {
			return nil, err
		}
		hosts = append(hosts, host)
	}
	s := &Server{
		cfg:      cfg,
		deferred: make(map[replayKey]int),
		issued:   make(map[shapedKey]issued),
		done:     make(chan struct{}),
	}
	s.stopping, s.cancel = context.WithCancel(context.Background())
	s.close = sync.OnceValue(s.stop)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if err := s.SetFaults(cfg.Faults); err != nil {
		return nil, err
	}
	s.names = append([]string{"localhost", "127.0.0.1", "::1"}, cfg.Names...)
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil && !ip.IsUnspecified() && !slices.Contains(s.names, host) {
			s.names = append(s.names, host)
		}
	}
	if s.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, fmt.Errorf("generate server key: %w", err)
	}
	ca, err := s.newAuthorities()
	if err != nil {
		return nil, err
	}
	s.ca.Store(ca)
	if s.record, err = openRecord(cfg.Record); err != nil {
		return nil, err
	}
	if s.control, err = listenControl(cfg.Control); err != nil {
		return nil, err
	}
	if s.coap, err = s.listen(cfg.Listen, s.key); err != nil {
		return nil, err
	}
	if cfg.ListenLinked != "" {
		if s.linked, err = s.listen(cfg.ListenLinked, s.key); err != nil {
			return nil, err
		}
		s.serving.Go(func() { s.linkedErr = s.linked.Serve(s.serveCoAP(true)) })
	}
	if s.https, err = s.listenHTTPS(); err != nil {
		return nil, err
	}
	if s.https != nil {
		s.serving.Go(func() { s.httpsErr = s.https.serve() })
	}
	s.serving.Go(func() {
		if err := s.coap.Serve(s.serveCoAP(false)); err != nil {
			s.serveErr = fmt.Errorf("test server: serve CoAPs: %w", err)
		}
		close(s.done)
	})
	if s.control != nil {
		s.serving.Go(s.serveControl)
	}
	return s, nil
}

// complete fills in the defaults and refuses what cannot be done as asked.
func (c *Config) complete() error {
	if c.Listen == "" {
		c.Listen = "127.0.0.1:0"
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	for _, d := range []struct {
		name      string
		value     *time.Duration
		byDefault time.Duration
	}{
		{"lifetime", &c.Lifetime, 90 * 24 * time.Hour},
		{"backdate", &c.Backdate, time.Minute},
		{"replay window", &c.ReplayWindow, 24 * time.Hour},
	} {
		if *d.value == 0 {
			*d.value = d.byDefault
		}
		// A certificate's times are in seconds (RFC 5280 §4.1.2.5).
		if *d.value < time.Second || *d.value%time.Second != 0 {
			return fmt.Errorf("%s %s: not a positive number of whole seconds", d.name, *d.value)
		}
	}
	if c.OtherCAs < 0 || c.OtherCAs > maxOtherCAs {
		return fmt.Errorf("other CAs: %d is not from 0 to %d", c.OtherCAs, maxOtherCAs)
	}
	for _, label := range c.Labels {
		if err := checkLabel(label); err != nil {
			return err
		}
	}
	if c.Raw && c.ListenLinked != "" {
		return errors.New("raw and a second CoAPs door: a raw server has one")
	}
	if c.Raw && len(c.PSKs) > 0 {
		return errors.New("raw and pre-shared keys: a raw server wants certificates")
	}
	if c.ListenHTTPS == "" && (c.TLS12 || c.HTTPUser != "") {
		return errors.New("TLS 1.2 alone and HTTP Basic: the server has no HTTPS door")
	}
	if c.Raw && c.RequirePoP {
		return errors.New("raw and required proof of possession: a raw server does not know what links a CSR to its session")
	}
	if len(c.EnvelopeKeys) > 0 && !c.ServerKeyGen {
		return errors.New("keys to encrypt for: the server makes no keys")
	}
	for _, key := range c.EnvelopeKeys {
		if err := key.check(); err != nil {
			return err
		}
	}
	if c.CSRAttributes != nil {
		if _, err := csr.ParseAttributes(c.CSRAttributes); err != nil {
			return err
		}
	}
	return nil
}

// checkListen returns the host of an address that may be listened on.
func checkListen(address string, allowNonLoopback bool) (string, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return "", fmt.Errorf("listen: %w", err)
	}
	ip := net.ParseIP(host)
	if loopback := host == "localhost" || ip != nil && ip.IsLoopback(); !loopback && !allowNonLoopback {
		return "", fmt.Errorf("listen: %s is not a loopback address: a test CA that others can reach must be allowed explicitly", address)
	}
	return host, nil
}

// now is the configured clock.
func (s *Server) now() time.Time { return s.cfg.Now() }

// URI returns the server's EST root without its path: coaps://host:port.
func (s *Server) URI() string { return "coaps://" + s.coap.Addr().String() }

// LinkedURI is URI of the second CoAPs door, "" for none.
func (s *Server) LinkedURI() string {
	if s.linked == nil {
		return ""
	}
	return "coaps://" + s.linked.Addr().String()
}

// Addr returns the UDP address.
func (s *Server) Addr() net.Addr { return s.coap.Addr() }

// Root returns the root of the EST CA that issues: the Implicit TA of a client.
func (s *Server) Root() *x509.Certificate { return s.ca.Load().root.cert }

// Issuing returns the CA that signs what is enrolled: the root with SingleCA.
func (s *Server) Issuing() *x509.Certificate { return s.ca.Load().issuing.cert }

// FactoryRoot returns the CA of the IDevIDs.
func (s *Server) FactoryRoot() *x509.Certificate { return s.ca.Load().factory.cert }

// ServerChain returns what the server sends of itself: its leaf, then the
// intermediate CA.
func (s *Server) ServerChain() []*x509.Certificate {
	ca := s.ca.Load()
	return append([]*x509.Certificate{ca.leaf}, ca.chain()...)
}

// Events returns the whole record.
func (s *Server) Events() []Event { return s.record.all() }

// Issuances returns the events of kind EventIssuance: what the EST CA has
// signed, and nothing twice.
func (s *Server) Issuances() []Event {
	return slices.DeleteFunc(s.record.all(), func(e Event) bool { return e.Kind != EventIssuance })
}

// Faults returns the faults that are on.
func (s *Server) Faults() Faults {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.faults
}

// SetFaults replaces all faults, from the next request on, and begins to count
// deferrals anew.
func (s *Server) SetFaults(f Faults) error {
	if err := f.validate(); err != nil {
		return err
	}
	switch {
	case f.Message != "" && !s.cfg.Raw:
		return errors.New("fault message: the server is not a raw one")
	case (f.HTTP != "" || f.RetryAfter != "") && s.cfg.ListenHTTPS == "":
		return errors.New("faults http and retry-after: the server has no HTTPS door")
	case f.CSRAttrs != "" && s.cfg.CSRAttributes == nil:
		return errors.New("fault csrattrs: the server has no CSR attributes")
	case f.Envelope != "" && !s.cfg.ServerKeyGen:
		return errors.New("fault envelope: the server makes no keys")
	case f.ServerKey != "" && !s.cfg.ServerKeyGen:
		return errors.New("fault server-key: the server makes no keys")
	}
	f.RefuseClients = slices.Clone(f.RefuseClients)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = f
	clear(s.deferred)
	return nil
}

// Done is closed when the server has ended; if that was not through Close,
// Close returns why.
func (s *Server) Done() <-chan struct{} { return s.done }

// Close ends every connection, waits for the requests under way and closes the
// record. It is idempotent.
func (s *Server) Close() error { return s.close() }

func (s *Server) stop() error {
	s.cancel()
	var errs []error
	if s.coap != nil {
		errs = append(errs, s.coap.Close())
	}
	if s.linked != nil {
		errs = append(errs, s.linked.Close())
	}
	if s.https != nil {
		errs = append(errs, s.https.close())
	}
	if s.control != nil {
		errs = append(errs, s.control.Close())
	}
	s.serving.Wait()
	if s.record != nil {
		errs = append(errs, s.record.close())
	}
	return errors.Join(append(errs, s.serveErr, s.linkedErr, s.httpsErr)...)
}
