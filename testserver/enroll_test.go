package testserver_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/internal/coap"
	"estenroll/testserver"
)

func TestIssuedCertificateIsWhatWasAskedFor(t *testing.T) {
	t.Parallel()
	now := time.Date(2031, 5, 4, 3, 2, 1, 500_000_000, time.UTC)
	server := start(t, testserver.Config{
		Now:      func() time.Time { return now },
		Lifetime: 7 * time.Second,
		Backdate: 3 * time.Second,
	})
	san := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true}
	// A SAN that Go would not write itself: registeredID before dNSName.
	san.Value = []byte{0x30, 0x0b, 0x88, 0x02, 0x2a, 0x03, 0x82, 0x05, 'd', '.', 't', 's', 't'}
	rawSubject := []byte{0x30, 0x0c, 0x31, 0x0a, 0x30, 0x08, 0x06, 0x03, 0x55, 0x04, 0x03, 0x14, 0x01, 'x'} // TeletexString
	key := newKey(t)
	csr := newCSR(t, key, &x509.CertificateRequest{RawSubject: rawSubject, ExtraExtensions: []pkix.Extension{san}})

	cert := enroll(t, server, "sen", idevid(t, server, "dev"), csr)

	if !bytes.Equal(cert.RawSubject, rawSubject) {
		t.Errorf("subject: got %x, want %x", cert.RawSubject, rawSubject)
	}
	var got []pkix.Extension
	for _, extension := range cert.Extensions {
		if extension.Id.Equal(san.Id) {
			got = append(got, extension)
		}
	}
	if diff := cmp.Diff([]pkix.Extension{san}, got); diff != "" {
		t.Errorf("subjectAltName (-want +got):\n%s", diff)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		t.Error("the public key is not the CSR's")
	}
	if cert.KeyUsage != x509.KeyUsageDigitalSignature || cert.IsCA {
		t.Errorf("key usage %v, CA %v", cert.KeyUsage, cert.IsCA)
	}
	if diff := cmp.Diff([]x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, cert.ExtKeyUsage); diff != "" {
		t.Errorf("extended key usage (-want +got):\n%s", diff)
	}
	second := now.Truncate(time.Second)
	if want := second.Add(-3 * time.Second); !cert.NotBefore.Equal(want) {
		t.Errorf("notBefore: got %v, want %v", cert.NotBefore, want)
	}
	if want := second.Add(7 * time.Second); !cert.NotAfter.Equal(want) {
		t.Errorf("notAfter: got %v, want %v", cert.NotAfter, want)
	}
	if err := cert.CheckSignatureFrom(server.Issuing()); err != nil {
		t.Error(err)
	}
	if err := server.Issuing().CheckSignatureFrom(server.Root()); err != nil {
		t.Error(err)
	}
	if !server.Issuing().MaxPathLenZero {
		t.Error("the issuing CA may issue to CAs")
	}
	for _, ca := range []*x509.Certificate{server.Root(), server.Issuing(), server.FactoryRoot()} {
		if !bytes.HasPrefix([]byte(ca.Subject.CommonName), []byte("TEST ONLY")) {
			t.Errorf("CA subject %q does not say TEST ONLY", ca.Subject)
		}
	}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	plain := start(t, testserver.Config{})
	single := start(t, testserver.Config{SingleCA: true})
	chained := start(t, testserver.Config{AnswerChain: true})
	rooted := start(t, testserver.Config{AnswerChain: true, AnswerRoot: true, OtherCAs: 2})
	const none = 0xffff
	tests := []struct {
		name   string
		server *testserver.Server
		path   string
		accept est.ContentFormat
		code   codes.Code
		format est.ContentFormat
		count  int // certificates in the answer
	}{
		{"crts", plain, "crts", none, codes.Content, 281, 2},
		{"crts 281", plain, "crts", 281, codes.Content, 281, 2},
		{"crts 287 of two", plain, "crts", 287, codes.NotAcceptable, 0, 0},
		{"crts 287 of one", single, "crts", 287, codes.Content, 287, 1},
		{"crts of one", single, "crts", none, codes.Content, 281, 1},
		{"crts unknown format", plain, "crts", 50, codes.NotAcceptable, 0, 0},
		{"sen", plain, "sen", none, codes.Changed, 281, 1},
		{"sen 281", plain, "sen", 281, codes.Changed, 281, 1},
		{"sen 287", plain, "sen", 287, codes.Changed, 287, 1},
		{"sen unknown format", plain, "sen", 280, codes.NotAcceptable, 0, 0},
		{"sen with chain", chained, "sen", none, codes.Changed, 281, 2},
		{"sen with chain and root", rooted, "sen", none, codes.Changed, 281, 3},
		{"crts among others", rooted, "crts", none, codes.Content, 281, 6},
		{"sen with chain 287", chained, "sen", 287, codes.NotAcceptable, 0, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			device := idevid(t, test.server, test.name)
			req := post(test.path, device, newCSR(t, device.key, named(test.name)))
			if test.path == "crts" {
				req = &coap.Request{Method: codes.GET, Path: req.Path, Peer: req.Peer}
			}
			if test.accept != none {
				accepting(req, test.accept)
			}
			issuances := len(test.server.Issuances())
			resp := ask(t, test.server, req)
			if resp.Code != test.code {
				t.Fatalf("got %v %q, want %v", resp.Code, resp.Body, test.code)
			}
			if test.count == 0 {
				if resp.ContentFormat != nil {
					t.Errorf("a diagnostic has content-format %d", *resp.ContentFormat)
				}
				if got := len(test.server.Issuances()); got != issuances {
					t.Error("an answer that was not acceptable cost a certificate")
				}
				return
			}
			if resp.ContentFormat == nil || *resp.ContentFormat != uint16(test.format) {
				t.Errorf("content-format: got %v, want %d", resp.ContentFormat, test.format)
			}
			certs, err := certificates(resp)
			if err != nil {
				t.Fatal(err)
			}
			if len(certs) != test.count {
				t.Errorf("got %d certificates, want %d", len(certs), test.count)
			}
		})
	}
}

// Every kind of key that an HSM signs with gets a certificate, also as an IDevID,
// and the fault wrong-key makes one of the same kind.
func TestKeys(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	wrong := start(t, testserver.Config{Faults: testserver.Faults{WrongKey: true}})
	keys := map[string]crypto.Signer{}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[curve.Params().Name] = key
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keys["RSA"] = key
	pss := named("RSA-PSS")
	pss.SignatureAlgorithm = x509.SHA256WithRSAPSS
	for name, key := range keys {
		t.Run(name, func(t *testing.T) {
			requests := []*x509.CertificateRequest{named(name)}
			if name == "RSA" {
				requests = append(requests, pss)
			}
			for _, request := range requests {
				der := newCSR(t, key, request)
				factory, err := server.IssueIDevID(testserver.IDevIDRequest{CSR: der})
				if err != nil {
					t.Fatal(err)
				}
				cert := enroll(t, server, "sen", credential{cert: factory}, der)
				for _, got := range []*x509.Certificate{factory, cert} {
					if public, ok := got.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(key.Public()) {
						t.Errorf("a certificate for another key: %v", got.Subject)
					}
				}
				other, err := wrong.IssueIDevID(testserver.IDevIDRequest{CSR: der})
				if err != nil {
					t.Fatal(err)
				}
				forged := enroll(t, wrong, "sen", credential{cert: other}, der)
				if forged.PublicKeyAlgorithm != cert.PublicKeyAlgorithm || bytes.Equal(forged.RawSubjectPublicKeyInfo, cert.RawSubjectPublicKeyInfo) ||
					len(forged.RawSubjectPublicKeyInfo) != len(cert.RawSubjectPublicKeyInfo) {
					t.Error("the wrong key is not another of the same kind")
				}
			}
		})
	}
}

// Keys that are too weak, too large or of a kind that no HSM here has.
func TestRefusedKeys(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	modulus := func(bits uint) *big.Int { n := new(big.Int).Lsh(big.NewInt(1), bits-1); return n.SetBit(n, 0, 1) }
	for name, key := range map[string]crypto.PublicKey{
		"RSA 2047":         &rsa.PublicKey{N: modulus(2047), E: 65537},
		"RSA 4097":         &rsa.PublicKey{N: modulus(4097), E: 65537},
		"exponent 1":       &rsa.PublicKey{N: modulus(2048), E: 1},
		"an even exponent": &rsa.PublicKey{N: modulus(2048), E: 65536},
		"an even modulus":  &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 65537},
		"Ed25519":          ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)),
	} {
		_, err := server.IssueIDevID(testserver.IDevIDRequest{PublicKey: key, RawSubject: []byte{0x30, 0}})
		if err == nil || !strings.Contains(err.Error(), "the public key is neither") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestRefusedRequests(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	device := idevid(t, server, "dev")
	good := newCSR(t, device.key, named("dev"))
	broken := bytes.Clone(good)
	broken[len(broken)-1] ^= 1
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*coap.Request)) *coap.Request {
		req := post("sen", device, good)
		change(req)
		return req
	}
	tests := []struct {
		name string
		req  *coap.Request
		want codes.Code
	}{
		{"unknown path", post("att", device, good), codes.NotFound},
		{"label", post("label/sen", device, good), codes.NotFound},
		{"outside the root", with(func(r *coap.Request) { r.Path = "/sen" }), codes.NotFound},
		{"sen by GET", with(func(r *coap.Request) { r.Method = codes.GET }), codes.MethodNotAllowed},
		{"crts by POST", post("crts", device, nil), codes.MethodNotAllowed},
		{"no content-format", with(func(r *coap.Request) { r.ContentFormat = nil }), codes.UnsupportedMediaType},
		{"wrong content-format", with(func(r *coap.Request) { *r.ContentFormat = 281 }), codes.UnsupportedMediaType},
		{"no client certificate", with(func(r *coap.Request) { r.Peer = nil }), codes.Unauthorized},
		{"empty body", post("sen", device, nil), codes.BadRequest},
		{"trailing byte", post("sen", device, append(bytes.Clone(good), 0)), codes.BadRequest},
		{"broken signature", post("sen", device, broken), codes.BadRequest},
		{"P-224", post("sen", device, newCSR(t, p224, named("dev"))), codes.BadRequest},
		{"no name at all", post("sen", device, newCSR(t, device.key, &x509.CertificateRequest{})), codes.BadRequest},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			resp := ask(t, server, test.req)
			if resp.Code != test.want {
				t.Errorf("got %v %q, want %v", resp.Code, resp.Body, test.want)
			}
			if len(resp.Body) == 0 {
				t.Error("no diagnostic")
			}
		})
	}
	if got := server.Issuances(); len(got) != 0 {
		t.Errorf("issued: %v", got)
	}
}

func TestReenrollmentIdentity(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	factory := idevid(t, server, "dev")
	device := ldevid(t, server, factory, "dev")
	other := ldevid(t, start(t, testserver.Config{}), factory, "dev") // another CA of the same names
	printable := named("dev")
	printable.RawSubject = bytes.Replace(device.cert.RawSubject, []byte{0x13, 3, 'd'}, []byte{0x0c, 3, 'd'}, 1) // UTF8String
	tests := []struct {
		name   string
		client credential
		csr    *x509.CertificateRequest
		want   codes.Code
	}{
		{"same subject and SAN", device, named("dev"), codes.Changed},
		{"IDevID", factory, named("dev"), codes.Forbidden},
		{"other CA", other, named("dev"), codes.Forbidden},
		{"other subject", device, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "other"}, DNSNames: []string{"dev.example"}}, codes.Forbidden},
		{"same subject, other bytes", device, printable, codes.Forbidden},
		{"no SAN", device, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "dev"}}, codes.Forbidden},
		{"more SAN", device, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "dev"}, DNSNames: []string{"dev.example"}, IPAddresses: []net.IP{{127, 0, 0, 1}}}, codes.Forbidden},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			resp := ask(t, server, post("sren", test.client, newCSR(t, newKey(t), test.csr)))
			if resp.Code != test.want {
				t.Errorf("got %v %q, want %v", resp.Code, resp.Body, test.want)
			}
		})
	}
}

func TestReplay(t *testing.T) {
	t.Parallel()
	// again asks once more, after the first answer to sen by device with csr.
	type again = func(t *testing.T, s *testserver.Server, c *clock, device credential, csr []byte) *x509.Certificate
	for _, test := range []struct {
		name  string
		cfg   testserver.Config
		again again // default: the same request
		same  bool
	}{
		{name: "same request", same: true},
		{name: "just within the window", same: true, again: func(t *testing.T, s *testserver.Server, c *clock, device credential, csr []byte) *x509.Certificate {
			c.advance(24*time.Hour - time.Second)
			return enroll(t, s, "sen", device, csr)
		}},
		{name: "after the window", again: func(t *testing.T, s *testserver.Server, c *clock, device credential, csr []byte) *x509.Certificate {
			c.advance(24 * time.Hour)
			return enroll(t, s, "sen", device, csr)
		}},
		{name: "after its certificate's end", cfg: testserver.Config{Lifetime: time.Second}, again: func(t *testing.T, s *testserver.Server, c *clock, device credential, csr []byte) *x509.Certificate {
			c.advance(2 * time.Second)
			return enroll(t, s, "sen", device, csr)
		}},
		{name: "switched off", cfg: testserver.Config{NoReplay: true}},
		{name: "other CSR for the same key", again: func(t *testing.T, s *testserver.Server, _ *clock, device credential, _ []byte) *x509.Certificate {
			return enroll(t, s, "sen", device, newCSR(t, device.key, named("dev")))
		}},
		{name: "other client", again: func(t *testing.T, s *testserver.Server, _ *clock, _ credential, csr []byte) *x509.Certificate {
			return enroll(t, s, "sen", idevid(t, s, "other"), csr)
		}},
		{name: "after a fault that shaped it", cfg: testserver.Config{Faults: testserver.Faults{WrongKey: true}}, again: func(t *testing.T, s *testserver.Server, _ *clock, device credential, csr []byte) *x509.Certificate {
			if err := s.SetFaults(testserver.Faults{}); err != nil {
				t.Fatal(err)
			}
			return enroll(t, s, "sen", device, csr)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			turned := &clock{now: time.Now()}
			test.cfg.Now = turned.Now
			server := start(t, test.cfg)
			device := idevid(t, server, "dev")
			csr := newCSR(t, device.key, named("dev"))
			first := enroll(t, server, "sen", device, csr)
			if test.again == nil {
				test.again = func(t *testing.T, s *testserver.Server, _ *clock, device credential, csr []byte) *x509.Certificate {
					return enroll(t, s, "sen", device, csr)
				}
			}
			second := test.again(t, server, turned, device, csr)
			want := []testserver.EventKind{testserver.EventIssuance, testserver.EventIssuance}
			if test.same {
				want[1] = testserver.EventReplay
			}
			if got := kinds(server); !cmp.Equal(got, want) {
				t.Errorf("events: got %v, want %v", got, want)
			}
			if same := first.Equal(second); same != test.same {
				t.Errorf("same certificate: got %v, want %v", same, test.same)
			}
		})
	}
}

func TestReplayIsPerOperation(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	device := ldevid(t, server, idevid(t, server, "dev"), "dev")
	csr := newCSR(t, device.key, named("dev"))
	if enroll(t, server, "sen", device, csr).Equal(enroll(t, server, "sren", device, csr)) {
		t.Error("sren was answered with sen's certificate")
	}
}

func TestEqualRequestsAtOnceIssueOnce(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	device := idevid(t, server, "dev")
	csr := newCSR(t, device.key, named("dev"))
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			if resp := ask(t, server, post("sen", device, csr)); resp.Code != codes.Changed {
				t.Errorf("got %v", resp.Code)
			}
		})
	}
	group.Wait()
	if got := len(server.Issuances()); got != 1 {
		t.Errorf("issued %d certificates, want 1", got)
	}
	if got := len(server.Events()); got != 17 { // the IDevID too
		t.Errorf("recorded %d events, want 17", got)
	}
}

func TestIDevID(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	key := newKey(t)
	request := newCSR(t, key, named("dev"))
	broken := bytes.Clone(request)
	broken[len(broken)-1] ^= 1
	subject := []byte{0x30, 0x0c, 0x31, 0x0a, 0x30, 0x08, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x01, 'x'}
	san := &pkix.Extension{Critical: true, Value: []byte{0x30, 0x03, 0x82, 0x01, 'y'}}
	for _, test := range []struct {
		name    string
		req     testserver.IDevIDRequest
		subject string // empty: an error is wanted
		dns     string
	}{
		{"request", testserver.IDevIDRequest{CSR: request}, "CN=dev", "dev.example"},
		{"request, other names", testserver.IDevIDRequest{CSR: request, RawSubject: subject, SAN: san}, "CN=x", "y"},
		{"public key", testserver.IDevIDRequest{PublicKey: key.Public(), RawSubject: subject, SAN: san}, "CN=x", "y"},
		{"nothing", testserver.IDevIDRequest{}, "", ""},
		{"both", testserver.IDevIDRequest{CSR: request, PublicKey: key.Public()}, "", ""},
		{"public key without subject", testserver.IDevIDRequest{PublicKey: key.Public()}, "", ""},
		{"broken signature", testserver.IDevIDRequest{CSR: broken}, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			cert, err := server.IssueIDevID(test.req)
			if test.subject == "" {
				if err == nil {
					t.Errorf("signed %v, want an error", cert.Subject)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if cert.Subject.String() != test.subject || len(cert.DNSNames) != 1 || cert.DNSNames[0] != test.dns {
				t.Errorf("got %v %v, want %s %s", cert.Subject, cert.DNSNames, test.subject, test.dns)
			}
			if !key.PublicKey.Equal(cert.PublicKey) {
				t.Error("the public key is not the one given")
			}
			// IEEE 802.1AR-2018 §8.7: 99991231235959Z.
			if want := time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC); !cert.NotAfter.Equal(want) {
				t.Errorf("notAfter: got %v", cert.NotAfter)
			}
			if err := cert.CheckSignatureFrom(server.FactoryRoot()); err != nil {
				t.Error(err)
			}
		})
	}
}

// certificates parses an answer without this project's parser for 281.
func certificates(resp *coap.Response) ([]*x509.Certificate, error) {
	if resp.ContentFormat == nil {
		return nil, errors.New("no content-format")
	}
	if *resp.ContentFormat == 287 {
		return x509.ParseCertificates(resp.Body)
	}
	var outer struct {
		Type    asn1.ObjectIdentifier
		Content struct {
			Version      int
			Digests      asn1.RawValue
			Data         asn1.RawValue
			Certificates asn1.RawValue `asn1:"tag:0"`
			Signers      asn1.RawValue
		} `asn1:"explicit,tag:0"`
	}
	if _, err := asn1.Unmarshal(resp.Body, &outer); err != nil {
		return nil, err
	}
	return x509.ParseCertificates(outer.Content.Certificates.Bytes)
}

func kinds(server *testserver.Server) []testserver.EventKind {
	var kinds []testserver.EventKind
	for _, event := range server.Events() {
		if event.Kind != testserver.EventIDevID {
			kinds = append(kinds, event.Kind)
		}
	}
	return kinds
}
