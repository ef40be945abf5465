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
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

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
	old := &authority{key: newKey(t)}
	old.cert = issue(t, nil, "old", old.key, func(c *x509.Certificate) { asCA(c); c.NotAfter = epoch.Add(-time.Second) })
	// An end-entity certificate that has signed another.
	leafCA := &authority{key: newKey(t)}
	leafCA.cert = issue(t, root, "server", leafCA.key, nil)
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
		{name: "no certificate", want: est.ErrNoCertificate},
		{name: "no leaf", answer: []*x509.Certificate{issuing.cert}, want: est.ErrNoCertificate},
		{name: "two leaves", answer: []*x509.Certificate{leaf, issue(t, issuing, "second", key, nil)}, want: est.ErrSeveralCertificates},
		{name: "a CA certificate", answer: []*x509.Certificate{issue(t, issuing, "device", key, asCA)}, want: est.ErrNotTrusted},
		{name: "a foreign chain", answer: []*x509.Certificate{issue(t, foreign, "device", key, nil)}, want: est.ErrNotTrusted},
		{name: "an unknown issuer", answer: []*x509.Certificate{leaf}, trust: anchors(t, root.cert), want: est.ErrNotTrusted},
		{name: "itself an anchor", answer: []*x509.Certificate{issue(t, nil, "device", key, nil)}, want: est.ErrNotTrusted},
		{name: "expired", answer: []*x509.Certificate{issue(t, issuing, "device", key, func(c *x509.Certificate) { c.NotAfter = epoch.Add(-time.Second) })},
			want: est.ErrNotValidNow, text: "is expired since 2026-11-24T11:59:59Z"},
		{name: "not yet valid", answer: []*x509.Certificate{issue(t, issuing, "device", key, func(c *x509.Certificate) { c.NotBefore = epoch.Add(time.Second) })},
			want: est.ErrNotValidNow, text: "is not yet valid"},
		{name: "under an expired CA", answer: []*x509.Certificate{issue(t, old, "device", key, nil)}, trust: anchors(t, old.cert),
			want: est.ErrNotValidNow, text: `"CN=old" is expired since`},
		{name: "signed by an end-entity certificate", answer: []*x509.Certificate{issue(t, leafCA, "device", key, nil), leafCA.cert},
			want: est.ErrSeveralCertificates},
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

// Whatever cacerts holds, in whatever order: the chain is that of the certificate,
// up to what is trusted and without it.
func TestChain(t *testing.T) {
	t.Attr("shows", "RFC 7030 §4.1.3 (3)")
	root, second, abroad := newCA(t, nil, "root"), newCA(t, nil, "second root"), newCA(t, nil, "root elsewhere")
	unused, subordinate := newCA(t, second, "unused"), newCA(t, abroad, "subordinate")
	issuing := newCA(t, root, "issuing")
	under := newCA(t, subordinate, "under the subordinate")
	deep := newCA(t, under, "deep")
	renamed := issue(t, abroad, "another name", subordinate.key, asCA)
	// Two that have signed each other: neither is above the other.
	left, right := newCA(t, nil, "left"), newCA(t, nil, "right")
	leftByRight, rightByLeft := issue(t, right, "left", left.key, asCA), issue(t, left, "right", right.key, asCA)
	key := newKey(t)
	for _, c := range []struct {
		name    string
		caCerts []*x509.Certificate
		issuer  *authority
		beside  []*x509.Certificate // in the answer
		want    []*x509.Certificate // after the leaf
	}{
		{"a root that issues", []*x509.Certificate{root.cert}, root, nil, nil},
		{"with its chain", []*x509.Certificate{root.cert, issuing.cert}, issuing, []*x509.Certificate{issuing.cert}, []*x509.Certificate{issuing.cert}},
		{"with its chain and root", []*x509.Certificate{root.cert, issuing.cert}, issuing, []*x509.Certificate{root.cert, issuing.cert}, []*x509.Certificate{issuing.cert}},
		{"several roots and intermediates", []*x509.Certificate{unused.cert, issuing.cert, second.cert, root.cert, abroad.cert}, issuing, nil, []*x509.Certificate{issuing.cert}},
		{"of the other root", []*x509.Certificate{unused.cert, issuing.cert, second.cert, root.cert, abroad.cert}, unused, []*x509.Certificate{issuing.cert}, []*x509.Certificate{unused.cert}},
		{"each twice", []*x509.Certificate{issuing.cert, root.cert, issuing.cert, root.cert}, issuing, []*x509.Certificate{issuing.cert, issuing.cert}, []*x509.Certificate{issuing.cert}},
		{"a root that is not self-signed", []*x509.Certificate{subordinate.cert, under.cert}, under, nil, []*x509.Certificate{under.cert}},
		{"and two below it, upside down", []*x509.Certificate{deep.cert, under.cert, subordinate.cert}, deep, nil, []*x509.Certificate{deep.cert, under.cert}},
		{"a key under another name is no issuer", []*x509.Certificate{under.cert, renamed}, under, nil, nil},
		{"that root alone", []*x509.Certificate{subordinate.cert}, under, []*x509.Certificate{under.cert}, []*x509.Certificate{under.cert}},
		{"cross-signed, and none above", []*x509.Certificate{leftByRight, rightByLeft}, left, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			leaf := issue(t, c.issuer, "device", key, nil)
			for range 2 {
				chain, err := anchors(t, c.caCerts...).VerifyIssued(append(c.beside, leaf), key.Public(), epoch)
				if diff := cmp.Diff(append([]*x509.Certificate{leaf}, c.want...), chain, cmp.Comparer((*x509.Certificate).Equal)); err != nil || diff != "" {
					t.Errorf("%v (-want +got)\n%s", err, diff)
				}
				slices.Reverse(c.caCerts)
			}
		})
	}
	// What nothing above vouches for is no anchor when something is.
	if _, err := anchors(t, subordinate.cert, under.cert, root.cert).VerifyIssued([]*x509.Certificate{issue(t, under, "device", key, nil)}, key.Public(), epoch); !errors.Is(err, est.ErrNotTrusted) {
		t.Errorf("under a subordinate beside a root: got %v", err)
	}
}

func TestVerifyServer(t *testing.T) {
	t.Attr("shows", "RFC 7030 §3.3.1 (2)")
	t.Attr("shows", "RFC 7030 §3.3.1 (4)")
	t.Attr("shows", "RFC 7030 §3.6.1 (1)")
	t.Attr("shows", "RFC 7030 §3.6.2 (1)")
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
		{"it goes on after its signature", []*x509.Certificate{trailed(t, plain[0])}, "est.example", est.ErrNotTrusted},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := anchors(t, root.cert).VerifyServer(c.chain, c.server, epoch)
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if err != nil && !errors.Is(err, est.ErrServerCertificate) {
				t.Errorf("got %v: it does not say that it is about the server", err)
			}
		})
	}
}

// A device with a clock of 1970 must be told apart from a server that let its
// certificate expire.
func TestValidityError(t *testing.T) {
	root := newCA(t, nil, "root")
	chain := []*x509.Certificate{issue(t, root, "est.example", newKey(t), func(c *x509.Certificate) { c.DNSNames = []string{"est.example"} })}
	for _, c := range []struct {
		name    string
		now     time.Time
		valid   bool
		expired bool
	}{
		{"first second", chain[0].NotBefore, true, false},
		{"last second", chain[0].NotAfter, true, false},
		{"before", chain[0].NotBefore.Add(-time.Second), false, false},
		{"after", chain[0].NotAfter.Add(time.Second), false, true},
		{"1970", time.Unix(0, 0), false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := anchors(t, root.cert).VerifyServer(chain, "est.example", c.now)
			if c.valid {
				if err != nil {
					t.Error(err)
				}
				return
			}
			var validity *est.ValidityError
			if !errors.As(err, &validity) || !errors.Is(err, est.ErrNotValidNow) || errors.Is(err, est.ErrNotTrusted) {
				t.Fatalf("got %v, want a ValidityError", err)
			}
			if validity.Expired() != c.expired || !validity.Certificate.Equal(chain[0]) || !validity.Time.Equal(c.now) {
				t.Errorf("got %+v, expired %t", validity, validity.Expired())
			}
		})
	}
}

// After a CA rollover cacerts may hold OldWithOld, OldWithNew, NewWithOld and
// NewWithNew (RFC 7030 §4.1.3): certificates of both CAs verify, and so they do
// for who trusts only the old one and is given the others.
func TestRollover(t *testing.T) {
	t.Attr("shows", "RFC 7030 §4.1.3 (2)")
	old, renewed := newCA(t, nil, "root old"), newCA(t, nil, "root new")
	oldWithNew := issue(t, renewed, "root old", old.key, asCA)
	newWithOld := issue(t, old, "root new", renewed.key, asCA)
	key := newKey(t)
	before, after := issue(t, old, "device", key, nil), issue(t, renewed, "device", key, nil)
	all := anchors(t, oldWithNew, newWithOld, old.cert, renewed.cert)
	for _, leaf := range []*x509.Certificate{before, after} {
		chain, err := all.VerifyIssued([]*x509.Certificate{leaf}, key.Public(), epoch)
		if err != nil || len(chain) != 1 {
			t.Errorf("%s: got a chain of %d, %v, want the leaf alone", leaf.Issuer, len(chain), err)
		}
	}
	chain, err := anchors(t, old.cert).VerifyIssued([]*x509.Certificate{after, newWithOld}, key.Public(), epoch)
	if err != nil || len(chain) != 2 || !chain[1].Equal(newWithOld) {
		t.Errorf("old alone: got a chain of %d, %v, want NewWithOld in it", len(chain), err)
	}
	if _, err := anchors(t, renewed.cert).VerifyIssued([]*x509.Certificate{before}, key.Public(), epoch); !errors.Is(err, est.ErrNotTrusted) {
		t.Errorf("new alone: got %v", err)
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
	t.Attr("shows", "RFC 7030 §3.1 (2)")
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
	longer := trailed(t, root.cert)
	longer7, err := est.MarshalCertsOnly([]*x509.Certificate{longer})
	if err != nil {
		t.Fatal(err)
	}
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
		{"281 with a certificate that goes on", est.ContentFormatPKCS7CertsOnly, longer7, "goes on after its signature"},
		{"287 with a certificate that goes on", est.ContentFormatPKIXCert, longer.Raw, "goes on after its signature"},
		{"281 too large", est.ContentFormatPKCS7CertsOnly, make([]byte, 64<<10+1), "more than"},
		{"287 too large", est.ContentFormatPKIXCert, make([]byte, 64<<10+1), "more than"},
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

// trailed puts a value after the signature of a certificate, which crypto/x509
// takes as it is: if it does not any more, our own check can go.
func trailed(t *testing.T, cert *x509.Certificate) *x509.Certificate {
	t.Helper()
	var content asn1.RawValue
	if _, err := asn1.Unmarshal(cert.Raw, &content); err != nil {
		t.Fatal(err)
	}
	longer, err := x509.ParseCertificate(tlv(0x30, content.Bytes, []byte{0x05, 0x00}))
	if err != nil {
		t.Fatalf("crypto/x509 refuses it: %v", err)
	}
	return longer
}

// Each defect is one edit of the vector of RFC 9148 §A.1, whose parts are laid
// open here; the library alone takes those marked so.
func TestParseCertsOnlyRefused(t *testing.T) {
	good := vector(t, "crts-response-281.der")
	var message struct {
		Type       asn1.RawValue
		SignedData struct{ Version, Digests, Content, Certificates, CRLs, Signers asn1.RawValue } `asn1:"explicit,tag:0"`
	}
	if rest, err := asn1.Unmarshal(good, &message); err != nil || len(rest) > 0 {
		t.Fatal(err)
	}
	oid, sd := message.Type.FullBytes, message.SignedData
	version, digests, content, certs, crls, signers := sd.Version.FullBytes, sd.Digests.FullBytes, sd.Content.FullBytes, sd.Certificates.FullBytes, sd.CRLs.FullBytes, sd.Signers.FullBytes
	null := []byte{0x05, 0x00}
	data := []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x01}
	whole := func(parts ...[]byte) []byte { return tlv(0x30, oid, tlv(0xa0, tlv(0x30, parts...))) }
	if !bytes.Equal(whole(version, digests, content, certs, crls, signers), good) {
		t.Fatal("the parts do not make the whole")
	}
	if _, err := est.ParseCertsOnly(whole(version, digests, content, certs, signers)); err != nil {
		t.Errorf("without the optional CRLs: %v", err)
	}
	for name, der := range map[string][]byte{
		"empty":                            nil,
		"a tag alone":                      {0x30},
		"a length beyond the end":          {0x30, 0x84, 0x7f, 0xff, 0xff, 0xff},
		"a tag of many bytes":              {0x1f, 0xff, 0xff, 0xff, 0xff, 0x7f, 0x00},
		"indefinite length":                indefinite(good), // library: taken
		"length in more bytes than needed": append([]byte{0x30, 0x83, 0x00}, good[2:]...),
		"cut in the middle":                good[:len(good)/2],
		"cut by a byte":                    good[:len(good)-1],
		"a byte after the end":             append(bytes.Clone(good), 0),                                                                      // library: taken
		"an element after the content":     tlv(0x30, oid, tlv(0xa0, tlv(0x30, version, digests, content, certs, crls, signers)), null),       // library: taken
		"an element after the SignedData":  tlv(0x30, oid, tlv(0xa0, tlv(0x30, version, digests, content, certs, crls, signers), null)),       // library: taken
		"an element after the signers":     whole(version, digests, content, certs, crls, signers, null),                                      // library: taken
		"no signers field":                 whole(version, digests, content, certs, crls),                                                     // library: taken
		"a signer that cannot be read":     whole(version, digests, content, certs, crls, tlv(0x31, tlv(0x30, null))),                         // library: taken, as none
		"a content":                        whole(version, digests, tlv(0x30, data, tlv(0xa0, tlv(0x04, []byte("x")))), certs, crls, signers), // library: taken
		"an empty content":                 whole(version, digests, tlv(0x30, data, tlv(0xa0)), certs, crls, signers),
		"the certificates left out":        whole(version, digests, content, crls, signers),
		"no certificates":                  whole(version, digests, content, tlv(0xa0), crls, signers),
		"a certificate cut short":          whole(version, digests, content, tlv(0xa0, tlv(0x30, null)), crls, signers),
		"something beside a certificate":   whole(version, digests, content, tlv(0xa0, sd.Certificates.Bytes, tlv(0xa2, null)), crls, signers),
		"a version that is text":           whole([]byte{0x0c, 1, 'x'}, digests, content, certs, crls, signers),
		"data, not signedData":             tlv(0x30, data, tlv(0xa0, tlv(0x04, good))),
		"nested too deep":                  nested(40),
	} {
		t.Run(name, func(t *testing.T) {
			if certs, err := est.ParseCertsOnly(der); err == nil || !strings.HasPrefix(err.Error(), "certs-only PKCS#7: ") {
				t.Errorf("got %d certificates, %v, want an error", len(certs), err)
			}
		})
	}
}

// What we marshal is read by a foreign judge.
func TestMarshalCertsOnlyJudged(t *testing.T) {
	root := newCA(t, nil, "root")
	leaf := issue(t, root, "device", newKey(t), nil)
	der, err := est.MarshalCertsOnly([]*x509.Certificate{leaf, root.cert})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "openssl", "pkcs7", "-inform", "DER", "-print_certs")
	cmd.Stdin = bytes.NewReader(der)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("openssl pkcs7 (make deps installs it): %v\n%s", err, out)
	}
	var got [][]byte
	for block, rest := pem.Decode(out); block != nil; block, rest = pem.Decode(rest) {
		got = append(got, block.Bytes)
	}
	if diff := cmp.Diff([][]byte{leaf.Raw, root.cert.Raw}, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// tlv is one value in DER.
func tlv(tag byte, contents ...[]byte) []byte {
	content := bytes.Join(contents, nil)
	length := []byte{byte(len(content))}
	if len(content) > 127 {
		length = []byte{0x82, byte(len(content) >> 8), byte(len(content))}
	}
	return slices.Concat([]byte{tag}, length, content)
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
	for _, c := range []struct{ asked, wait, kept time.Duration }{
		{0, 0, 0}, {-1, 0, 0}, {time.Minute, time.Minute, 0}, {est.MaxRetryAfter, est.MaxRetryAfter, 0},
		{est.MaxRetryAfter + 1, est.MaxRetryAfter, est.MaxRetryAfter + 1},
	} {
		pending := est.NewPendingError(est.SimpleEnroll, "coaps://est.example/sen", c.asked)
		if pending.RetryAfter != c.wait || pending.Asked != c.kept || strings.Contains(pending.Error(), "asks for") != (c.kept != 0) {
			t.Errorf("asked for %s: got %v", c.asked, pending)
		}
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
	f.Add(issue(f, nil, "seed", newKey(f), nil).Raw)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, format := range []est.ContentFormat{est.ContentFormatPKCS7CertsOnly, est.ContentFormatPKIXCert} {
			answer, err := est.ParseCertificates(&est.Response{ContentFormat: format, Body: data})
			for _, cert := range answer {
				var fields []asn1.RawValue
				if rest, err := asn1.Unmarshal(cert.Raw, &fields); err != nil || len(rest) > 0 || len(fields) != 3 {
					t.Errorf("%d: a certificate of %d fields, %v", format, len(fields), err)
				}
			}
			if (err == nil) != (len(answer) > 0) {
				t.Errorf("%d: %d certificates, %v", format, len(answer), err)
			}
		}
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

// No attributes have several forms; an answer that is not what it must be is a
// ResponseError.
func TestCSRAttrs(t *testing.T) {
	body := vector(t, "att-response-285.der")
	refused := &est.StatusError{Operation: est.CSRAttrs, Code: "4.03 Forbidden", Class: 4}
	for _, c := range []struct {
		name   string
		format est.ContentFormat
		body   []byte
		err    error
		want   []byte
		text   string // of the error
	}{
		{name: "285", format: est.ContentFormatCSRAttrs, body: body, want: body},
		{name: "4.04", err: &est.StatusError{Operation: est.CSRAttrs, NotFound: true}},
		{name: "204"},
		{name: "4.03", err: refused, text: "csrattrs at : 4.03 Forbidden"},
		{name: "another format", format: est.ContentFormatPKCS10, body: body, text: "csrattrs: answer: content-format 286, want 285"},
		{name: "too large", format: est.ContentFormatCSRAttrs, body: make([]byte, 64<<10+1), text: "csrattrs: answer: 65537 bytes, more than 65536"},
	} {
		t.Run(c.name, func(t *testing.T) {
			session := &fake{response: est.Response{ContentFormat: c.format, Body: c.body}, err: c.err}
			got, err := (&est.Client{Session: session}).CSRAttrs(t.Context())
			if session.got.Operation != est.CSRAttrs || session.got.Body != nil {
				t.Errorf("sent %+v", session.got)
			}
			if !bytes.Equal(got, c.want) || (got == nil) != (c.want == nil) {
				t.Errorf("got %x, want %x", got, c.want)
			}
			var response *est.ResponseError
			switch {
			case c.text == "" && err != nil, c.text != "" && (err == nil || err.Error() != c.text):
				t.Errorf("got %v, want %q", err, c.text)
			case c.text != "" && c.err == nil && !errors.As(err, &response):
				t.Errorf("got %T, want a ResponseError", err)
			}
		})
	}
}
