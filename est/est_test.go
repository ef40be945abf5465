package est_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"estenroll/est"
)

const vectors = "../testdata/rfc9148"

func vector(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(vectors, name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// The payloads of RFC 9148 appendix A parse, and their certificates come out
// whole: frozen from "openssl pkcs7 -inform DER -print_certs".
func TestRFC9148Vectors(t *testing.T) {
	for _, c := range []struct {
		file, subject, serial, fingerprint string
	}{
		{"crts-response-281.der", "CN=Root CA,OU=certification,O=Example Inc,L=LA,ST=CA,C=US", "b8bb0fe604f6a1e",
			"65ce66fb2410fa735a1037f5133b4b209507d29993406d4b18cff3cef6b27e98"},
		{"sen-response-281.der", "SERIALNUMBER=Wt1234,OU=IoT,O=example Inc,L=LA,ST=CA,C=US", "7e7661d7b54e4632",
			"3b61462c285f5036246cac57a49598e959560c6490324a003a1cbd45df7a88a9"},
		{"skg-cert-281.der", "O=skg example", "b3313e8f3fc9538e",
			"22389b017d0c2769bb919eac14e5d27db888a6ef95e04a1ecc59a6ff96c223c6"},
	} {
		t.Run(c.file, func(t *testing.T) {
			der := vector(t, c.file)
			certs, err := est.ParseCertsOnly(der)
			if err != nil {
				t.Fatal(err)
			}
			if len(certs) != 1 {
				t.Fatalf("got %d certificates, want 1", len(certs))
			}
			if got := certs[0].Subject.String(); got != c.subject {
				t.Errorf("subject: got %s, want %s", got, c.subject)
			}
			if got := certs[0].SerialNumber.Text(16); got != c.serial {
				t.Errorf("serial: got %s, want %s", got, c.serial)
			}
			if got := fmt.Sprintf("%x", sha256.Sum256(certs[0].Raw)); got != c.fingerprint {
				t.Errorf("fingerprint: got %s, want %s", got, c.fingerprint)
			}
			again, err := est.MarshalCertsOnly(certs)
			if err != nil {
				t.Fatal(err)
			}
			back, err := est.ParseCertsOnly(again)
			if err != nil || len(back) != 1 || !back[0].Equal(certs[0]) {
				t.Errorf("marshalled and parsed again: got %v, %v", back, err)
			}
		})
	}
	for _, file := range []string{"sen-request-286.der", "skg-request-286.der"} {
		t.Run(file, func(t *testing.T) {
			request, err := x509.ParseCertificateRequest(vector(t, file))
			if err != nil {
				t.Fatal(err)
			}
			if err := request.CheckSignature(); err != nil {
				t.Error(err)
			}
		})
	}
}

// authority is a CA of a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

var epoch = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue makes a certificate; a nil issuer is the subject itself.
func issue(t testing.TB, issuer *authority, name string, key *ecdsa.PrivateKey, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		NotBefore: epoch.Add(-time.Hour), NotAfter: epoch.Add(time.Hour),
	}
	if change != nil {
		change(template)
	}
	parent, signer := template, key
	if issuer != nil {
		parent, signer = issuer.cert, issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func asCA(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign }

func newCA(t testing.TB, issuer *authority, name string) *authority {
	t.Helper()
	key := newKey(t)
	return &authority{cert: issue(t, issuer, name, key, asCA), key: key}
}

func anchors(t testing.TB, certs ...*x509.Certificate) *est.TrustAnchors {
	t.Helper()
	trust, err := est.NewTrustAnchors(certs)
	if err != nil {
		t.Fatal(err)
	}
	return trust
}

func TestVerifyIssued(t *testing.T) {
	root := newCA(t, nil, "root")
	issuing := newCA(t, root, "issuing")
	foreign := newCA(t, nil, "issuing")
	key, other := newKey(t), newKey(t)
	leaf := issue(t, issuing, "device", key, nil)
	trust := anchors(t, root.cert, issuing.cert)
	for _, c := range []struct {
		name   string
		answer []*x509.Certificate
		trust  *est.TrustAnchors
		want   error
		text   string
	}{
		{name: "leaf alone", answer: []*x509.Certificate{leaf}},
		{name: "leaf and its chain", answer: []*x509.Certificate{leaf, issuing.cert}, trust: anchors(t, root.cert)},
		{name: "in another order, with the root", answer: []*x509.Certificate{root.cert, issuing.cert, leaf}, trust: anchors(t, root.cert)},
		{name: "the leaf twice", answer: []*x509.Certificate{leaf, leaf}},
		{name: "another key", answer: []*x509.Certificate{issue(t, issuing, "device", other, nil)}, want: est.ErrKeyMismatch},
		{name: "no leaf", answer: []*x509.Certificate{issuing.cert}, want: est.ErrKeyMismatch},
		{name: "two leaves", answer: []*x509.Certificate{leaf, issue(t, issuing, "second", key, nil)}, want: est.ErrNotTrusted},
		{name: "a CA certificate", answer: []*x509.Certificate{issue(t, issuing, "device", key, asCA)}, want: est.ErrNotTrusted},
		{name: "a foreign chain", answer: []*x509.Certificate{issue(t, foreign, "device", key, nil)}, want: est.ErrNotTrusted},
		{name: "an unknown issuer", answer: []*x509.Certificate{leaf}, trust: anchors(t, root.cert), want: est.ErrNotTrusted},
		{name: "itself an anchor", answer: []*x509.Certificate{issue(t, nil, "device", key, nil)}, want: est.ErrNotTrusted},
		{name: "expired", answer: []*x509.Certificate{issue(t, issuing, "device", key, func(c *x509.Certificate) { c.NotAfter = epoch.Add(-time.Second) })},
			want: est.ErrNotValidNow, text: "is expired since 2026-11-24T11:59:59Z"},
		{name: "not yet valid", answer: []*x509.Certificate{issue(t, issuing, "device", key, func(c *x509.Certificate) { c.NotBefore = epoch.Add(time.Second) })},
			want: est.ErrNotValidNow, text: "is not yet valid"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.trust == nil {
				c.trust = trust
			}
			chain, err := c.trust.VerifyIssued(c.answer, key.Public(), epoch)
			if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %v, want %v %q", err, c.want, c.text)
			}
			if err == nil && (len(chain) != 2 || !chain[0].Equal(leaf) || !chain[1].Equal(issuing.cert)) {
				t.Errorf("got a chain of %d, want the leaf and the issuing CA", len(chain))
			}
		})
	}
}

func TestVerifyServer(t *testing.T) {
	root := newCA(t, nil, "root")
	key := newKey(t)
	serve := func(c *x509.Certificate) {
		c.DNSNames, c.IPAddresses = []string{"est.example"}, []net.IP{net.IPv4(127, 0, 0, 1)}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	with := func(change func(*x509.Certificate)) []*x509.Certificate {
		return []*x509.Certificate{issue(t, root, "server", key, func(c *x509.Certificate) { serve(c); change(c) })}
	}
	plain := with(func(*x509.Certificate) {})
	for _, c := range []struct {
		name   string
		chain  []*x509.Certificate
		server string
		want   error
	}{
		{"DNS name", plain, "est.example", nil},
		{"IP literal", plain, "127.0.0.1", nil},
		{"any use", with(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), "est.example", nil},
		{"a registration authority", with(func(c *x509.Certificate) {
			c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 28}}
		}), "est.example", nil},
		{"another name", plain, "other.example", est.ErrNotTrusted},
		{"another address", plain, "127.0.0.2", est.ErrNotTrusted},
		{"no name", plain, "", est.ErrNotTrusted},
		{"no certificate", nil, "est.example", est.ErrNotTrusted},
		{"the common name is not a name", []*x509.Certificate{issue(t, root, "est.example", key, nil)}, "est.example", est.ErrNotTrusted},
		{"for clients only", with(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), "est.example", est.ErrNotTrusted},
		{"expired", with(func(c *x509.Certificate) { c.NotAfter = epoch.Add(-time.Second) }), "est.example", est.ErrNotValidNow},
		{"not yet valid", with(func(c *x509.Certificate) { c.NotBefore = epoch.Add(time.Second) }), "est.example", est.ErrNotValidNow},
		{"another CA", []*x509.Certificate{issue(t, newCA(t, nil, "root"), "server", key, serve)}, "est.example", est.ErrNotTrusted},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := anchors(t, root.cert).VerifyServer(c.chain, c.server, epoch); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestVerifyClient(t *testing.T) {
	root := newCA(t, nil, "root")
	key := newKey(t)
	// The SAN of an IDevID: critical, and a hwModuleName alone (RFC 4108 §5).
	san, err := hex.DecodeString("3020a01e06082b06010505070804a01230100608" + "2b06010401868d1f" + "0404deadbeef")
	if err != nil {
		t.Fatal(err)
	}
	idevid := issue(t, root, "", key, func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}}
	})
	if len(idevid.UnhandledCriticalExtensions) != 1 {
		t.Fatal("x509 handles a SAN of otherNames now: withoutOtherNames can go")
	}
	for _, c := range []struct {
		name string
		cert *x509.Certificate
		want error
	}{
		{"IDevID with a critical hwModuleName", idevid, nil},
		{"another critical extension", issue(t, root, "x", key, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}), est.ErrNotTrusted},
		{"for servers only", issue(t, root, "x", key, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), est.ErrNotTrusted},
		{"expired", issue(t, root, "x", key, func(c *x509.Certificate) { c.NotAfter = epoch.Add(-1) }), est.ErrNotValidNow},
	} {
		t.Run(c.name, func(t *testing.T) {
			chain, err := anchors(t, root.cert).VerifyClient([]*x509.Certificate{c.cert}, epoch)
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if err == nil && (len(chain) != 2 || chain[0] != c.cert) {
				t.Errorf("got a chain of %d", len(chain))
			}
		})
	}
	if _, err := anchors(t, root.cert).VerifyClient(nil, epoch); !errors.Is(err, est.ErrNotTrusted) {
		t.Errorf("no certificate: got %v", err)
	}
}

func TestNewTrustAnchors(t *testing.T) {
	root := newCA(t, nil, "root")
	issuing := newCA(t, root, "issuing")
	key := newKey(t)
	leaf := issue(t, issuing, "device", key, nil)
	if _, err := est.NewTrustAnchors(nil); err == nil {
		t.Error("none: got no error")
	}
	if _, err := est.NewTrustAnchors([]*x509.Certificate{leaf}); !errors.Is(err, est.ErrNotTrusted) {
		t.Errorf("a leaf: got %v", err)
	}
	// Without a self-signed one, what the server gave is what is trusted.
	if _, err := anchors(t, issuing.cert).VerifyIssued([]*x509.Certificate{leaf}, key.Public(), epoch); err != nil {
		t.Error(err)
	}
}

// fake is a session that answers from memory.
type fake struct {
	est.Session
	response est.Response
	err      error
	got      *est.Request
}

func (f *fake) RoundTrip(_ context.Context, req *est.Request) (*est.Response, error) {
	f.got = req
	return &f.response, f.err
}

// Both formats are understood, whichever was asked for; what is neither is a
// ResponseError of the operation.
func TestClientFormats(t *testing.T) {
	root := newCA(t, nil, "root")
	p7, err := est.MarshalCertsOnly([]*x509.Certificate{root.cert})
	if err != nil {
		t.Fatal(err)
	}
	empty, err := est.MarshalCertsOnly(nil)
	if err != nil {
		t.Fatal(err)
	}
	many, err := est.MarshalCertsOnly(make17(root.cert))
	if err != nil {
		t.Fatal(err)
	}
	signedData := vector(t, "crts-response-281.der")
	for _, c := range []struct {
		name   string
		format est.ContentFormat
		body   []byte
		text   string
	}{
		{"281", est.ContentFormatPKCS7CertsOnly, p7, ""},
		{"287", est.ContentFormatPKIXCert, root.cert.Raw, ""},
		{"another format", est.ContentFormatPKCS8, p7, "content-format 284, want 281 or 287"},
		{"281 that is 287", est.ContentFormatPKCS7CertsOnly, root.cert.Raw, "certs-only"},
		{"287 that is 281", est.ContentFormatPKIXCert, p7, "certificate:"},
		{"281 empty", est.ContentFormatPKCS7CertsOnly, nil, "certs-only"},
		{"287 empty", est.ContentFormatPKIXCert, nil, "empty"},
		{"no certificates", est.ContentFormatPKCS7CertsOnly, empty, "no certificate"},
		{"too many certificates", est.ContentFormatPKCS7CertsOnly, many, "17 certificates"},
		{"trailing byte", est.ContentFormatPKCS7CertsOnly, append(bytes.Clone(p7), 0), "after the end"},
		{"truncated", est.ContentFormatPKCS7CertsOnly, p7[:len(p7)-1], "certs-only"},
		{"287 with a trailing byte", est.ContentFormatPKIXCert, append(bytes.Clone(root.cert.Raw), 0), "certificate:"},
		{"281 too large", est.ContentFormatPKCS7CertsOnly, make([]byte, 64<<10+1), "more than"},
		{"287 too large", est.ContentFormatPKIXCert, make([]byte, 64<<10+1), "more than"},
		{"indefinite length", est.ContentFormatPKCS7CertsOnly, indefinite(signedData), "certs-only"},
		{"nested too deep", est.ContentFormatPKCS7CertsOnly, nested(40), "nested deeper"},
		{"data, not signedData", est.ContentFormatPKCS7CertsOnly, bytes.Replace(signedData, []byte{0x01, 0x07, 0x02}, []byte{0x01, 0x07, 0x01}, 1), "certs-only"},
	} {
		t.Run(c.name, func(t *testing.T) {
			session := &fake{response: est.Response{ContentFormat: c.format, Body: c.body}}
			certs, err := (&est.Client{Session: session}).SimpleReenroll(t.Context(), []byte("csr"))
			if session.got.Operation != est.SimpleReenroll || string(session.got.Body) != "csr" {
				t.Errorf("sent %+v", session.got)
			}
			if c.text == "" {
				if err != nil || len(certs) != 1 || !certs[0].Equal(root.cert) {
					t.Errorf("got %v, %v", certs, err)
				}
				return
			}
			var response *est.ResponseError
			if !errors.As(err, &response) || response.Operation != est.SimpleReenroll || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want a ResponseError with %q", err, c.text)
			}
		})
	}
}

func make17(cert *x509.Certificate) []*x509.Certificate {
	certs := make([]*x509.Certificate, 17)
	for i := range certs {
		certs[i] = cert
	}
	return certs
}

// indefinite gives the outermost value an indefinite length (BER, not DER).
func indefinite(der []byte) []byte {
	return append(append([]byte{0x30, 0x80}, der[4:]...), 0, 0)
}

// nested is a value in n others.
func nested(n int) []byte {
	der := []byte{0x05, 0x00}
	for range n {
		der = append([]byte{0x30, byte(len(der))}, der...)
	}
	return der
}

func TestErrors(t *testing.T) {
	detail := est.NewDetail([]byte("a\x1b[31mb\xff" + strings.Repeat("x", 1000)))
	if len(detail) > 600 || strings.ContainsRune(detail, 0x1b) || strings.Contains(detail, "\xff") {
		t.Errorf("got %q", detail)
	}
	refused := fmt.Errorf("proof: %w", &est.StatusError{Operation: est.CACerts, Server: "coaps://est.example/crts", Code: "4.01 Unauthorized", Class: 4, Unauthorized: true, Detail: "who?"})
	if !errors.Is(refused, est.ErrCredentialRefused) {
		t.Error("4.01 is not ErrCredentialRefused")
	}
	if got, want := refused.Error(), `proof: cacerts at coaps://est.example/crts: 4.01 Unauthorized: "who?"`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	busy := &est.StatusError{Class: 5}
	if !busy.Temporary() || errors.Is(busy, est.ErrCredentialRefused) {
		t.Error("class 5 is temporary, and not a refusal")
	}
}

// What is parsed is marshalled and parsed to the same; nothing else is, and no
// input makes it panic.
func FuzzParseCertsOnly(f *testing.F) {
	seeds, err := filepath.Glob(filepath.Join(vectors, "*.der"))
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, seed := range seeds {
		data, err := os.ReadFile(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		f.Add(data[:len(data)/2])
		f.Add(indefinite(data))
	}
	f.Add(nested(31))
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, err := est.ParseCertsOnly(data)
		if err != nil {
			return
		}
		again, err := est.MarshalCertsOnly(certs)
		if err != nil {
			t.Fatal(err)
		}
		back, err := est.ParseCertsOnly(again)
		if err != nil || len(back) != len(certs) {
			t.Fatalf("got %d certificates, %v, want %d", len(back), err, len(certs))
		}
		for i := range certs {
			if !back[i].Equal(certs[i]) {
				t.Errorf("certificate %d changed", i)
			}
		}
	})
}
