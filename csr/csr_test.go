package csr_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"io"
	"math/big"
	"os/exec"
	"strings"
	"testing"
	"time"

	"estenroll/csr"
)

// judge runs openssl, the foreign judge, with input on its standard input.
func judge(t *testing.T, input []byte, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "openssl", args...)
	cmd.Stdin = bytes.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s (make deps installs it): %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func build(t *testing.T, template csr.Template, signer crypto.Signer) []byte {
	t.Helper()
	der, err := csr.Build(nil, template, signer)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// What we parse is what OpenSSL prints, in the form of RFC 2253.
func TestParseSubject(t *testing.T) {
	for _, c := range []struct{ in, openssl, formatted string }{
		{"CN=dev-17,O=Example", "CN=dev-17,O=Example", ""},
		{"cn=dev, o=Example, c=DE", "CN=dev,O=Example,C=DE", "CN=dev,O=Example,C=DE"},
		{"CN=a+serialNumber=47,O=b", "serialNumber=47+CN=a,O=b", ""},
		{`CN=Lu\C4\8Di\C4\87`, `CN=Lu\C4\8Di\C4\87`, "CN=Lučić"},
		{"CN=Lučić", `CN=Lu\C4\8Di\C4\87`, ""},
		{`CN=a\,b\+c\"d\\e\<f\>g\;h`, `CN=a\,b\+c\"d\\e\<f\>g\;h`, ""},
		{`CN=\ a b\ `, `CN=\ a b\ `, ""},
		{`CN=\#1`, `CN=\#1`, ""},
		{"CN=a=b", "CN=a=b", ""},
		{"DC=device,DC=example,DC=com", "DC=device,DC=example,DC=com", ""},
		{"2.5.4.3=x", "CN=x", "CN=x"},
		{"1.2.3.4=#0c0178", "1.2.3.4=#0C0178", ""},
		{"CN=#0c0178", "CN=x", "CN=x"},
		{"emailAddress=a@b.example,ST=s,L=l,OU=u,UID=i", "emailAddress=a@b.example,ST=s,L=l,OU=u,UID=i", ""},
	} {
		t.Run(c.in, func(t *testing.T) {
			raw, err := csr.ParseSubject(c.in)
			if err != nil {
				t.Fatal(err)
			}
			der := build(t, csr.Template{RawSubject: raw}, newKey(t))
			got := judge(t, der, "req", "-inform", "DER", "-noout", "-subject", "-nameopt", "RFC2253")
			if want := "subject=" + c.openssl + "\n"; got != want {
				t.Errorf("openssl: got %q, want %q", got, want)
			}
			if c.formatted == "" {
				c.formatted = c.in
			}
			if got := csr.FormatSubject(raw); got != c.formatted {
				t.Errorf("FormatSubject: got %s, want %s", got, c.formatted)
			}
		})
	}
}

// The types of the strings are RFC 5280's.
func TestSubjectEncoding(t *testing.T) {
	raw, err := csr.ParseSubject("serialNumber=4711,DC=a,CN=b,C=DE")
	if err != nil {
		t.Fatal(err)
	}
	want := "303b" + "310b3009060355040613024445" + "310a300806035504030c0162" +
		"3111300f" + "060a0992268993f22c640119" + "160161" + "310d300b060355040513043437" + "3131"
	if got := hex.EncodeToString(raw); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestParseSubjectRefused(t *testing.T) {
	for _, in := range []string{
		"", "CN", "CN=", "=x", "nonsense=x", "CN=a,", "CN=a,,O=b", "CN=a+", ",CN=a", "CN= a", "CN=a ", "CN=a;O=b", `CN="a"`, "CN=a<b",
		`CN=\`, `CN=\g`, `CN=\f`, `CN=\FF`, "CN=\xff", "CN=a\x00b", "CN=#", "CN=#0", "CN=#zz", "CN=#0c0178ff", "CN=#0c02",
		"C=DEU", "C=d*", "serialNumber=a_b", "DC=ü", "1.2.=x", "01.2=x", "3.4=x", "1=x", "1.2.99999999999=x",
		"CN=" + strings.Repeat("x", 2048), strings.Repeat("CN=a,", 64) + "CN=a",
	} {
		if raw, err := csr.ParseSubject(in); err == nil {
			t.Errorf("%q: got %x, want an error", in, raw)
		} else if !strings.HasPrefix(err.Error(), "subject: ") {
			t.Errorf("%q: got %v", in, err)
		}
	}
}

func TestParseSAN(t *testing.T) {
	for _, c := range []struct{ in, openssl string }{
		{"DNS:dev-17.example", "DNS:dev-17.example"},
		{"dns:*.example", "DNS:*.example"},
		{"IP:192.0.2.1", "IP Address:192.0.2.1"},
		{"IP:::ffff:192.0.2.1", "IP Address:192.0.2.1"},
		{"IP:2001:db8::1", "IP Address:2001:DB8:0:0:0:0:0:1"},
		{"URI:urn:dev:ops:32473-4711", "URI:urn:dev:ops:32473-4711"},
		{"URI:https://example/a%20b", "URI:https://example/a%20b"},
		{"hwModuleName:1.3.6.1.4.1.32473.1;4711ab", "othername: 1.3.6.1.5.5.7.8.4::<unsupported>"},
	} {
		t.Run(c.in, func(t *testing.T) {
			san, err := csr.ParseSAN(c.in)
			if err != nil {
				t.Fatal(err)
			}
			der := build(t, csr.Template{SANs: []csr.SAN{san}}, newKey(t))
			got := judge(t, der, "req", "-inform", "DER", "-noout", "-text", "-verify")
			if !strings.Contains(got, c.openssl) || !strings.Contains(got, "Subject Alternative Name: critical") {
				t.Errorf("openssl: got %s, want %s, critical", got, c.openssl)
			}
		})
	}
	for _, in := range []string{
		"", "DNS", "DNS:", "MAIL:a@b", "DNS:a..b", "DNS:-a", "DNS:a-", "DNS:a b", "DNS:ü", "DNS:" + strings.Repeat("a", 64), "DNS:" + strings.Repeat("a.", 127),
		"IP:", "IP:1.2.3", "IP:fe80::1%eth0", "URI:", "URI:/relative", "URI:x", "URI:https:", "URI:https://ü", "URI:https://a b",
		"hwModuleName:", "hwModuleName:1.2.3", "hwModuleName:1.2.3;", "hwModuleName:1.2.3;g", "hwModuleName:x;00", "hwModuleName:9.9;00",
		"URI:urn:" + strings.Repeat("a", 1024),
	} {
		if _, err := csr.ParseSAN(in); err == nil || !strings.HasPrefix(err.Error(), "SAN: ") {
			t.Errorf("%q: got %v, want an error", in, err)
		}
	}
}

// The bytes of a hwModuleName, by the ASN.1 of RFC 4108 §5.
func TestHardwareModuleName(t *testing.T) {
	san, err := csr.HardwareModuleName(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473, 1}, []byte{0x47, 0x11})
	if err != nil {
		t.Fatal(err)
	}
	extension, err := csr.Template{SANs: []csr.SAN{san}}.SANExtension()
	if err != nil {
		t.Fatal(err)
	}
	want := "301f" + "a01d" + "06082b06010505070804" + "a011" + "300f" + "06092b0601040181fd5901" + "0402" + "4711"
	if got := hex.EncodeToString(extension.Value); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// opaque is a signer that is nothing else, as an HSM's is.
type opaque struct{ crypto.Signer }

func TestBuild(t *testing.T) {
	t.Attr("shows", "RFC 7030 §3.1 (1)")
	raw, err := csr.ParseSubject("CN=dev")
	if err != nil {
		t.Fatal(err)
	}
	dns, err := csr.DNSName("dev.example")
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	der := build(t, csr.Template{RawSubject: raw, SANs: []csr.SAN{dns}}, opaque{key})
	if got := judge(t, der, "req", "-inform", "DER", "-noout", "-verify", "-text"); !strings.Contains(got, "verify OK") || strings.Contains(got, "critical") {
		t.Errorf("openssl: %s", got)
	}
	request, err := x509.ParseCertificateRequest(der)
	if err != nil || !key.PublicKey.Equal(request.PublicKey) {
		t.Errorf("got %v, want the signer's key", err)
	}
}

// Each kind of key signs with the hash that is as strong, and RSA with the
// padding that is asked for; OpenSSL verifies all of them.
func TestBuildSignature(t *testing.T) {
	t.Attr("shows", "RFC 7030 §4.2.1 (2)")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	onCurve := func(curve elliptic.Curve) crypto.Signer {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	for name, c := range map[string]struct {
		key  crypto.Signer
		pss  bool
		want []string // of openssl
	}{
		"P-256":         {onCurve(elliptic.P256()), false, []string{"ecdsa-with-SHA256"}},
		"P-384":         {onCurve(elliptic.P384()), false, []string{"ecdsa-with-SHA384"}},
		"P-521":         {onCurve(elliptic.P521()), false, []string{"ecdsa-with-SHA512"}},
		"RSA":           {rsaKey, false, []string{"sha256WithRSAEncryption"}},
		"RSA with PSS":  {rsaKey, true, []string{"rsassaPss", "Hash Algorithm: sha256", "Mask Algorithm: mgf1 with sha256", "Salt Length: 0x20", "Public Key Algorithm: rsaEncryption"}},
		"PSS is of RSA": {onCurve(elliptic.P256()), true, []string{"ecdsa-with-SHA256"}},
	} {
		t.Run(name, func(t *testing.T) {
			der := build(t, csr.Template{PSS: c.pss}, opaque{c.key})
			got := judge(t, der, "req", "-inform", "DER", "-noout", "-verify", "-text")
			for _, want := range append(c.want, "verify OK") {
				if !strings.Contains(got, want) {
					t.Errorf("openssl: no %q in %s", want, got)
				}
			}
		})
	}
}

// liar signs something else: a token can fail.
type liar struct{ crypto.Signer }

func (l liar) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	wrong := bytes.Clone(digest)
	wrong[0] ^= 1
	return l.Signer.Sign(random, wrong, opts)
}

var errToken = errors.New("token is on fire")

type broken struct{ crypto.Signer }

func (broken) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errToken }

func TestBuildRefused(t *testing.T) {
	if _, err := csr.Build(nil, csr.Template{}, liar{newKey(t)}); err == nil {
		t.Error("a wrong signature left")
	}
	if _, err := csr.Build(nil, csr.Template{}, broken{newKey(t)}); !errors.Is(err, errToken) {
		t.Errorf("got %v, want the token's error", err)
	}
	if _, err := csr.Build(nil, csr.Template{SANs: []csr.SAN{{}}}, newKey(t)); err == nil {
		t.Error("a zero SAN was taken")
	}
	both := csr.Template{SANs: []csr.SAN{{}}, RawSAN: &pkix.Extension{}}
	if _, err := csr.Build(nil, both, newKey(t)); err == nil {
		t.Error("two SANs were taken")
	}
}

// Re-enrolment copies the bytes, odd as they are: another string type, a
// critical SAN.
func TestForReenrollment(t *testing.T) {
	t.Attr("shows", "RFC 7030 §4.2.2 (1)")
	key := newKey(t)
	rawSubject, err := hex.DecodeString("300e310c300a06035504031303646576")
	if err != nil {
		t.Fatal(err)
	}
	san := pkix.Extension{Id: csr.OIDSubjectAltName, Critical: true, Value: []byte{0x30, 0x05, 0x82, 0x03, 'd', 'e', 'v'}}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), RawSubject: rawSubject, ExtraExtensions: []pkix.Extension{san},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	request, err := x509.ParseCertificateRequest(build(t, csr.ForReenrollment(cert), key))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(request.RawSubject, rawSubject) {
		t.Errorf("Subject: got %x, want %x", request.RawSubject, rawSubject)
	}
	if len(request.Extensions) != 1 || !request.Extensions[0].Critical || !bytes.Equal(request.Extensions[0].Value, san.Value) {
		t.Errorf("SAN: got %+v, want %+v", request.Extensions, san)
	}
}

// A name from the network does not steer the terminal that shows it.
func TestFormatSubjectEscapes(t *testing.T) {
	raw, err := csr.ParseSubject(`CN=a\1b[31m\c2\9b\e2\80\ae\00b`)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := csr.FormatSubject(raw), `CN=a\1b[31m\c2\9b\e2\80\ae\00b`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestFormatSubjectOfGarbage(t *testing.T) {
	for _, der := range []string{"", "00", "3000ff", "3003020101", "30053103300100"} {
		raw, err := hex.DecodeString(der)
		if err != nil {
			t.Fatal(err)
		}
		if got := csr.FormatSubject(raw); got != "#"+der {
			t.Errorf("%s: got %q", der, got)
		}
	}
	if got := csr.FormatSubject([]byte{0x30, 0}); got != "" {
		t.Errorf("the empty name: got %q", got)
	}
}

// What is parsed is formatted and parsed to the same.
func FuzzParseSubject(f *testing.F) {
	for _, seed := range []string{"CN=dev-17,O=Example", `CN=a\,b+C=DE, DC=x`, "1.2.3=#0c0178", `CN=\C4\8D\ `, "serialNumber=1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		raw, err := csr.ParseSubject(s)
		if err != nil {
			return
		}
		formatted := csr.FormatSubject(raw)
		again, err := csr.ParseSubject(formatted)
		if err != nil && len(formatted) > 2048 {
			return // escapes are longer
		}
		if err != nil {
			t.Fatalf("%q formats to %q: %v", s, formatted, err)
		}
		if got := csr.FormatSubject(again); got != formatted {
			t.Errorf("got %q, want %q", got, formatted)
		}
		// A value in hexadecimal chooses its string type, which the form does not keep.
		if !strings.Contains(s, "=#") && !bytes.Equal(again, raw) {
			t.Errorf("%q: got %x, want %x", s, again, raw)
		}
	})
}
