package estenroll_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/udp/coder"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/engine/pkcs11"
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/testserver"
)

// The scenarios of the "EST-COAP interoperability Test Description", version
// 20181023-2, of a device whose keys are in a token, by what is on the wire. Where that
// is older than RFC 9148, the codes are RFC 9148's: a CSR is POSTed, its answer is 2.04,
// that of skg is 62 with 284 and 281, no request has a Max-Age, the root is the well-known
// one, and discovery is unicast (RFC 9148 §6).
func TestInterop(t *testing.T) {
	keys := newInteropKeys(t)
	t.Run("dtls", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-dtls_1")
		d := keys.at(t, testserver.Config{}, coaps.Config{Discovery: true})
		if !d.session.ClientAuthenticated() || !d.session.PeerChain()[0].Equal(d.tap.shown) || !d.tap.peer().Equal(d.certificate) {
			t.Error("the two have not authenticated each other with their certificates")
		}
		d.wire("CON GET /.well-known/core?rt=ace.est*", "ACK 2.05 format=40")
	})

	t.Run("crts", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-coaps_01")
		t.Attr("shows", "RFC 9148 §4.2 (1)")
		d := keys.at(t, testserver.Config{SingleCA: true}, coaps.Config{})
		d.caCerts()
		d.wire("CON GET /.well-known/est/crts accept=281", "ACK 2.05 format=281")
	})

	t.Run("crts with Block2", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-coaps_02")
		t.Attr("shows", "RFC 9148 §4.6 (1)")
		d := keys.at(t, testserver.Config{BlockSize: 64}, coaps.Config{})
		d.caCerts()
		d.wire("CON GET /.well-known/est/crts accept=281", "ACK 2.05 format=281 block2=first/64",
			"CON GET /.well-known/est/crts accept=281 block2=n/64", "ACK 2.05 format=281 block2=middle/64",
			"CON GET /.well-known/est/crts accept=281 block2=n/64", "ACK 2.05 format=281 block2=last/64")
	})

	t.Run("sen", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-coaps_03")
		t.Attr("shows", "RFC 9148 §4.2 (2)")
		d := keys.at(t, testserver.Config{}, coaps.Config{})
		d.enroll()
		d.wire("CON POST /.well-known/est/sen format=286 accept=281", "ACK 2.04 format=281")
	})

	t.Run("deferred sen", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-coaps_04")
		t.Attr("shows", "RFC 9148 §4.7 (2)")
		t.Attr("shows", "RFC 9148 §4.6 (2)")
		d := keys.at(t, testserver.Config{}, coaps.Config{BlockSize: 64})
		d.deferred(d.client.SimpleEnroll, d.request(csr.Template{RawSubject: d.certificate.RawSubject}))
		d.wire(inBlocks("sen")...)
	})

	t.Run("sren", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-coaps_05")
		t.Attr("shows", "RFC 9148 §4.2 (3)")
		d := keys.at(t, testserver.Config{}, coaps.Config{})
		d.reconnect(d.enroll())
		request := d.request(csr.ForReenrollment(d.certificate))
		issued, err := d.client.SimpleReenroll(t.Context(), request)
		d.check(issued, err, d.keys.own.Public())
		d.wire("CON POST /.well-known/est/sren format=286 accept=281", "ACK 2.04 format=281")
	})

	t.Run("deferred sren", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-coaps_06")
		d := keys.at(t, testserver.Config{}, coaps.Config{BlockSize: 64})
		d.reconnect(d.enroll())
		d.deferred(d.client.SimpleReenroll, d.request(csr.ForReenrollment(d.certificate)))
		d.wire(inBlocks("sren")...)
	})

	t.Run("skg", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-coaps_07")
		t.Attr("shows", "RFC 9148 §4.1 (1)")
		t.Attr("shows", "RFC 9148 §4.8 (1)")
		d := keys.at(t, testserver.Config{ServerKeyGen: true}, coaps.Config{})
		made, err := d.client.ServerKeyGen(t.Context(), d.request(csr.Template{RawSubject: d.certificate.RawSubject}))
		if err != nil {
			t.Fatal(err)
		}
		defer made.Clear()
		at, err := d.keys.engine.NewKeyAddress("skg")
		if err != nil {
			t.Fatal(err)
		}
		public, err := d.keys.engine.(engine.KeyImporter).ImportKey(t.Context(), at, made.PKCS8)
		if err != nil {
			t.Fatal(err)
		}
		d.check(made.Certificates, nil, public)
		d.wire("CON POST /.well-known/est/skg format=286 accept=62", "ACK 2.04 format=62")
		parts, err := est.ParseMultipartCore(d.tap.last())
		if err != nil || len(parts) != 2 || parts[0].ContentFormat != est.ContentFormatPKCS8 || parts[1].ContentFormat != est.ContentFormatPKCS7CertsOnly {
			t.Errorf("%d parts, %v", len(parts), err)
		}
	})

	t.Run("att", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-coaps_08")
		t.Attr("shows", "RFC 9148 §4.1 (1)")
		want, err := csr.Attributes{csr.WantChallengePassword()}.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		d := keys.at(t, testserver.Config{CSRAttributes: want}, coaps.Config{})
		got, err := d.client.CSRAttrs(t.Context())
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("got %x, %v", got, err)
		}
		d.wire("CON GET /.well-known/est/att accept=285", "ACK 2.05 format=285")
	})

	t.Run("discovery", func(t *testing.T) {
		t.Attr("shows", "TD_ACE_est-coaps_09")
		t.Attr("shows", "RFC 9148 §4.1 (2)")
		d := keys.at(t, testserver.Config{SingleCA: true}, coaps.Config{Discovery: true})
		d.caCerts()
		d.wire("CON GET /.well-known/core?rt=ace.est*", "ACK 2.05 format=40",
			"CON GET /e/plz/crts accept=281", "ACK 2.05 format=281")
	})
}

// inBlocks is a CSR in blocks of 64 bytes that the server takes two minutes for.
func inBlocks(name string) []string {
	post := "CON POST /.well-known/est/" + name
	asked := []string{
		post + " format=286 accept=281 block1=first/64", "ACK 2.31 block1=first/64",
		post + " format=286 accept=281 block1=middle/64", "ACK 2.31 block1=middle/64",
	}
	last := post + " format=286 accept=281 block1=last/64 block2=0/64"
	wire := append(asked, last, "ACK 5.03 max-age=120 block1=last/64")
	wire = append(wire, asked...)
	return append(wire, last, "ACK 2.04 format=281 block1=last/64 block2=first/64",
		post+" accept=281 block2=n/64", "ACK 2.04 format=281 block2=middle/64",
		post+" accept=281 block2=n/64", "ACK 2.04 format=281 block2=last/64")
}

// interop is a device in a scenario. Its session goes through a tap.
type interop struct {
	t           *testing.T
	keys        *interopKeys
	server      *testserver.Server
	trust       *est.TrustAnchors
	cfg         coaps.Config
	certificate *x509.Certificate // and the key that authenticate the device
	signer      crypto.Signer
	tap         *tap
	session     *coaps.Session
	client      *est.Client
}

// interopKeys are those of a device, in its token.
type interopKeys struct {
	engine  engine.Engine
	factory crypto.Signer
	own     crypto.Signer // to be certified
}

func newInteropKeys(t *testing.T) *interopKeys {
	t.Helper()
	token := softhsm.New(t)
	token.Use(t)
	at, err := pkcs11.Driver.Parse(token.URI())
	if err != nil {
		t.Fatal(err)
	}
	opened, err := pkcs11.Driver.Open(t.Context(), at, engine.Options{LockDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := opened.Close(); err != nil {
			t.Error(err)
		}
	})
	generate := func(label string) crypto.Signer {
		at, err := opened.NewKeyAddress(label)
		if err == nil {
			_, err = opened.GenerateKey(t.Context(), at, engine.KeySpec{})
		}
		if err != nil {
			t.Fatal(err)
		}
		signer, err := opened.Signer(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		return signer
	}
	return &interopKeys{engine: opened, factory: generate("idevid"), own: generate("device")}
}

// at is the device at a server, with a session.
func (keys *interopKeys) at(t *testing.T, cfg testserver.Config, session coaps.Config) *interop {
	t.Helper()
	cfg.ProcessingDelay = time.Minute // each answer is in its ACK, however slow this machine is
	if session.BlockSize == 0 {
		session.BlockSize = 1024
	}
	server, err := testserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	d := &interop{t: t, keys: keys, server: server, cfg: session, signer: keys.factory}
	if d.certificate, err = server.IssueIDevID(testserver.IDevIDRequest{PublicKey: keys.factory.Public(), RawSubject: subject(t, "serialNumber=4711")}); err != nil {
		t.Fatal(err)
	}
	if d.trust, err = est.NewTrustAnchors([]*x509.Certificate{server.Root(), server.Issuing()}); err != nil {
		t.Fatal(err)
	}
	d.connect()
	return d
}

func (d *interop) connect() {
	d.t.Helper()
	d.tap = newTap(d.t, d.server, d.trust, tls.Certificate{Certificate: [][]byte{d.certificate.Raw}, PrivateKey: d.signer})
	cfg := d.cfg
	var err error
	if cfg.URI, err = est.ParseURI("coaps://" + d.tap.listener.Addr().String()); err != nil {
		d.t.Fatal(err)
	}
	cfg.Certificate, cfg.Key, cfg.Trust, cfg.AckTimeout = [][]byte{d.certificate.Raw}, d.signer, d.trust, time.Minute
	if d.session, err = coaps.Dial(d.t.Context(), cfg); err != nil {
		d.t.Fatal(err)
	}
	session := d.session
	d.t.Cleanup(func() {
		if err := session.Close(); err != nil {
			d.t.Error(err)
		}
	})
	d.client = &est.Client{Session: session}
}

// reconnect is a session as what was enrolled.
func (d *interop) reconnect(certificate *x509.Certificate) {
	d.t.Helper()
	d.certificate, d.signer = certificate, d.keys.own
	d.connect()
}

func (d *interop) request(template csr.Template) []byte {
	d.t.Helper()
	der, err := csr.Build(nil, template, d.keys.own)
	if err != nil {
		d.t.Fatal(err)
	}
	return der
}

// caCerts asks for what the server's CA publishes.
func (d *interop) caCerts() {
	d.t.Helper()
	published, err := d.client.CACerts(d.t.Context())
	if err != nil || !published[len(published)-1].Equal(d.server.Root()) && !published[0].Equal(d.server.Root()) {
		d.t.Errorf("got %d certificates, %v", len(published), err)
	}
}

// check judges what was issued.
func (d *interop) check(issued []*x509.Certificate, err error, public crypto.PublicKey) *x509.Certificate {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
	chain, err := d.trust.VerifyIssued(issued, public, time.Now())
	if err != nil {
		d.t.Fatal(err)
	}
	return chain[0]
}

func (d *interop) enroll() *x509.Certificate {
	d.t.Helper()
	issued, err := d.client.SimpleEnroll(d.t.Context(), d.request(csr.Template{RawSubject: d.certificate.RawSubject}))
	return d.check(issued, err, d.keys.own.Public())
}

// deferred asks a server that wants two minutes to decide, and asks it again. Nobody
// waits here: that nobody asks before the time is shown by TestPending.
func (d *interop) deferred(ask func(context.Context, []byte) ([]*x509.Certificate, error), request []byte) {
	d.t.Helper()
	maxAge := 2 * time.Minute
	if err := d.server.SetFaults(testserver.Faults{Defer: 1, DeferMaxAge: &maxAge}); err != nil {
		d.t.Fatal(err)
	}
	var pending *est.PendingError
	if _, err := ask(d.t.Context(), request); !errors.As(err, &pending) || pending.RetryAfter != maxAge {
		d.t.Fatalf("got %v", err)
	}
	issued, err := ask(d.t.Context(), request)
	d.check(issued, err, d.keys.own.Public())
	if sent := d.tap.requested(); !bytes.Equal(sent, bytes.Repeat(request, 2)) {
		d.t.Errorf("%d bytes were sent, which are not the CSR of %d bytes twice", len(sent), len(request))
	}
}

// wire compares the messages of the session with what they shall be.
func (d *interop) wire(want ...string) {
	d.t.Helper()
	if diff := cmp.Diff(want, d.tap.lines()); diff != "" {
		d.t.Errorf("(-want +got)\n%s", diff)
	}
}

// tap stands between a device and its server, and takes down the messages of one session.
// It can, for it has a certificate of the server's CA and uses the device's key.
type tap struct {
	t        *testing.T
	shown    *x509.Certificate // to the device
	listener net.Listener
	upstream func() (*dtls.Conn, error) // to the server, as the device

	mu       sync.Mutex
	peers    []*x509.Certificate
	messages []*message.Message
}

func newTap(t *testing.T, server *testserver.Server, trust *est.TrustAnchors, device tls.Certificate) *tap {
	t.Helper()
	tap := &tap{t: t, upstream: func() (*dtls.Conn, error) {
		return dtls.DialWithOptions("udp", server.Addr().(*net.UDPAddr), dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8), dtls.WithInsecureSkipVerify(true),
			dtls.WithGetClientCertificate(func(*dtls.CertificateRequestInfo) (*tls.Certificate, error) { return &device, nil }))
	}}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := tap.certificate(server, trust, device, key)
	if err != nil {
		t.Fatal(err)
	}
	tap.shown = issued
	tap.listener, err = dtls.ListenWithOptions("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)},
		dtls.WithCertificates(tls.Certificate{Certificate: [][]byte{issued.Raw, server.Issuing().Raw}, PrivateKey: key}),
		dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8), dtls.WithClientAuth(dtls.RequireAnyClientCert))
	if err != nil {
		t.Fatal(err)
	}
	var relaying sync.WaitGroup
	relaying.Go(tap.relay)
	t.Cleanup(func() {
		if err := tap.listener.Close(); err != nil {
			t.Error(err)
		}
		relaying.Wait()
	})
	return tap
}

// certificate asks the server's CA for one of a server, as the device.
func (tap *tap) certificate(server *testserver.Server, trust *est.TrustAnchors, device tls.Certificate, key crypto.Signer) (*x509.Certificate, error) {
	uri, err := est.ParseURI(server.URI())
	if err != nil {
		return nil, err
	}
	session, err := coaps.Dial(tap.t.Context(), coaps.Config{URI: uri, Trust: trust, Certificate: device.Certificate, Key: device.PrivateKey.(crypto.Signer)})
	if err != nil {
		return nil, err
	}
	defer session.Close()
	loopback, err := csr.ParseSAN("IP:127.0.0.1")
	if err != nil {
		return nil, err
	}
	serverAuth, err := csr.ParseExtKeyUsage([]string{"serverAuth"})
	if err != nil {
		return nil, err
	}
	request, err := csr.Build(nil, csr.Template{RawSubject: subject(tap.t, "CN=tap"), SANs: []csr.SAN{loopback}, ExtKeyUsage: serverAuth}, key)
	if err != nil {
		return nil, err
	}
	issued, err := (&est.Client{Session: session}).SimpleEnroll(tap.t.Context(), request)
	if err != nil {
		return nil, err
	}
	return issued[0], nil
}

// relay carries the datagrams of one device, both ways, until either end is closed.
func (tap *tap) relay() {
	accepted, err := tap.listener.Accept()
	if err != nil {
		return // closed
	}
	device := accepted.(*dtls.Conn)
	defer device.Close()
	if err := device.HandshakeContext(tap.t.Context()); err != nil {
		tap.t.Errorf("tap: %v", err)
		return
	}
	state, _ := device.ConnectionState()
	server, err := tap.upstream()
	if err != nil {
		tap.t.Errorf("tap: %v", err)
		return
	}
	defer server.Close()
	if err := server.HandshakeContext(tap.t.Context()); err != nil {
		tap.t.Errorf("tap: %v", err)
		return
	}
	peer, err := x509.ParseCertificate(state.PeerCertificates[0])
	if err != nil {
		tap.t.Errorf("tap: %v", err)
		return
	}
	tap.mu.Lock()
	tap.peers = append(tap.peers, peer)
	tap.mu.Unlock()
	var ways sync.WaitGroup
	for from, to := range map[*dtls.Conn]*dtls.Conn{device: server, server: device} {
		ways.Go(func() {
			defer to.Close()
			for datagram := make([]byte, 1<<16); ; {
				n, err := from.Read(datagram)
				if err != nil {
					return
				}
				tap.note(datagram[:n])
				if _, err := to.Write(datagram[:n]); err != nil {
					return
				}
			}
		})
	}
	ways.Wait()
}

func (tap *tap) note(datagram []byte) {
	m := &message.Message{Options: make(message.Options, 0, 64)}
	if _, err := coder.DefaultCoder.Decode(bytes.Clone(datagram), m); err != nil {
		tap.t.Errorf("tap: %x: %v", datagram, err)
		return
	}
	tap.mu.Lock()
	defer tap.mu.Unlock()
	tap.messages = append(tap.messages, m)
}

// last is what the last message carried.
func (tap *tap) last() []byte {
	tap.mu.Lock()
	defer tap.mu.Unlock()
	return tap.messages[len(tap.messages)-1].Payload
}

// requested is what all requests carried.
func (tap *tap) requested() (body []byte) {
	tap.mu.Lock()
	defer tap.mu.Unlock()
	for _, m := range tap.messages {
		if m.Code == codes.POST {
			body = append(body, m.Payload...)
		}
	}
	return body
}

// peer is the certificate that the device has shown.
func (tap *tap) peer() *x509.Certificate {
	tap.mu.Lock()
	defer tap.mu.Unlock()
	return tap.peers[0]
}

// lines are the messages: those of a run of blocks as one.
func (tap *tap) lines() (lines []string) {
	tap.mu.Lock()
	defer tap.mu.Unlock()
	for _, m := range tap.messages {
		lines = append(lines, describe(m))
		if n := len(lines); n >= 4 && lines[n-1] == lines[n-3] && lines[n-2] == lines[n-4] {
			lines = lines[:n-2]
		}
	}
	return lines
}

var typeNames = map[message.Type]string{message.Confirmable: "CON", message.NonConfirmable: "NON", message.Acknowledgement: "ACK", message.Reset: "RST"}

// describe says of a message what the scenarios ask about it.
func describe(m *message.Message) string {
	line := fmt.Sprintf("%s %d.%02d", typeNames[m.Type], m.Code>>5, m.Code&31)
	switch m.Code {
	case codes.GET, codes.POST:
		path, _ := m.Options.Path()
		line = fmt.Sprintf("%s %s %s", typeNames[m.Type], m.Code, path)
		if queries, err := m.Options.Queries(); err == nil {
			line += "?" + strings.Join(queries, "&")
		}
	}
	for _, o := range []struct {
		id   message.OptionID
		name string
	}{{message.ContentFormat, "format"}, {message.Accept, "accept"}, {message.MaxAge, "max-age"}} {
		if n, err := m.Options.GetUint32(o.id); err == nil {
			line += fmt.Sprintf(" %s=%d", o.name, n)
		}
	}
	asks := m.Code == codes.GET || m.Code == codes.POST
	if n, err := m.Options.GetUint32(message.Block1); err == nil {
		line += " block1=" + place(n)
	}
	if n, err := m.Options.GetUint32(message.Block2); err == nil && !asks {
		line += " block2=" + place(n)
	} else if err == nil {
		line += fmt.Sprintf(" block2=%s/%d", map[bool]string{true: "0", false: "n"}[n>>4 == 0], 16<<(n&7))
	}
	return line
}

// place of a block in its body, and its size (RFC 7959 §2.2).
func place(block uint32) string {
	first, more := block>>4 == 0, block&8 != 0
	return fmt.Sprintf("%s/%d", map[[2]bool]string{{true, true}: "first", {false, true}: "middle", {false, false}: "last", {true, false}: "whole"}[[2]bool{first, more}], 16<<(block&7))
}
