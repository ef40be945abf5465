package csr_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"estenroll/csr"
)

func TestEqualSubject(t *testing.T) {
	for _, c := range []struct {
		name, a, b string
		equal      bool
	}{
		{"the same", "CN=dev-17,O=Example", "CN=dev-17,O=Example", true},
		{"case", "CN=Dev-17,O=EXAMPLE", "CN=dev-17,O=Example", true},
		{"spaces", `CN=dev  17,O=\ Example\ `, "CN=dev 17,O=Example", true},
		{"another string type", "CN=#1306646576203137", "CN=DEV 17", true}, // PrintableString, UTF8String
		{"case of a domain component", "DC=Example,DC=COM", "DC=example,DC=com", true},
		{"case of an address", "emailAddress=A@example.com", "emailAddress=a@example.com", false},
		{"order within an RDN", "CN=a+serialNumber=1,O=x", "serialNumber=1+CN=a,O=x", true},
		{"order of RDNs", "CN=a,O=x", "O=x,CN=a", false},
		{"an RDN more", "CN=a", "CN=a,O=x", false},
		{"an attribute more", "CN=a", "CN=a+serialNumber=1", false},
		{"one value twice", "OU=a+OU=b", "OU=a+OU=a", false},
		{"another type", "CN=a", "O=a", false},
		{"another value", "CN=a", "CN=b", false},
		{"a space less", "CN=dev 17", "CN=dev17", false},
		{"a string type that is not folded", "CN=#1e020041", "CN=#1e020061", false}, // BMPString A, a
		{"two spellings", "CN=e\u0301", "CN=\u00e9", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := mustSubject(t, c.a), mustSubject(t, c.b)
			if got, back := csr.EqualSubject(a, b), csr.EqualSubject(b, a); got != c.equal || back != c.equal {
				t.Errorf("got %t, and %t the other way", got, back)
			}
		})
	}
	if csr.EqualSubject([]byte{0x30, 0}, []byte{0x30, 0, 0}) || csr.EqualSubject(nil, []byte{0x30, 0}) {
		t.Error("garbage equals the empty name")
	}
}

func TestCompareNames(t *testing.T) {
	sans := func(texts ...string) (list []csr.SAN) {
		for _, text := range texts {
			san, err := csr.ParseSAN(text)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, san)
		}
		return list
	}
	raw := func(value string) *pkix.Extension {
		der, err := hex.DecodeString(value)
		if err != nil {
			t.Fatal(err)
		}
		return &pkix.Extension{Id: csr.OIDSubjectAltName, Value: der}
	}
	subject := mustSubject(t, "CN=dev,O=Example")
	for _, c := range []struct {
		name       string
		asked, got csr.Template
		want       []csr.Difference
	}{
		{name: "as asked for", asked: csr.Template{SANs: sans("DNS:dev.example", "IP:192.0.2.1")}, got: csr.Template{SANs: sans("IP:192.0.2.1", "DNS:DEV.example")}},
		{name: "another subject", got: csr.Template{RawSubject: mustSubject(t, `CN=dev\1b[31m,OU=added,O=Example`)},
			want: []csr.Difference{{"Subject", "CN=dev,O=Example", `CN=dev\1b[31m,OU=added,O=Example`}}},
		{name: "the SAN dropped", asked: csr.Template{SANs: sans("DNS:dev.example", "IP:2001:db8::1")},
			want: []csr.Difference{{"SAN", "DNS:dev.example,IP:2001:db8::1", ""}}},
		{name: "a SAN added", got: csr.Template{SANs: sans("URI:urn:dev:ops:1")}, want: []csr.Difference{{"SAN", "", "URI:urn:dev:ops:1"}}},
		{name: "case where it counts", asked: csr.Template{SANs: sans("URI:urn:dev:a")}, got: csr.Template{SANs: sans("URI:urn:dev:A")},
			want: []csr.Difference{{"SAN", "URI:urn:dev:a", "URI:urn:dev:A"}}},
		{name: "one of two, twice", asked: csr.Template{SANs: sans("DNS:a", "DNS:b")}, got: csr.Template{SANs: sans("DNS:a", "DNS:A")},
			want: []csr.Difference{{"SAN", "DNS:a,DNS:b", "DNS:a,DNS:A"}}},
		{name: "names of other kinds", asked: csr.Template{SANs: sans("hwModuleName:1.2.3;4711")}, got: csr.Template{RawSAN: raw("3005810361406b")}, // an rfc822Name
			want: []csr.Difference{{"SAN", "#a01606082b06010505070804a00a300806022a0304024711", "#810361406b"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.asked.RawSubject = subject
			if c.got.RawSubject == nil {
				c.got.RawSubject = subject
			}
			extensions, err := c.got.Extensions()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, csr.CompareNames(requested(t, c.asked), issued(t, c.got.RawSubject, extensions...))); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// Names of a server's certificate, whatever they are, compare by an equivalence,
// and what is shown of them cannot steer a terminal.
func FuzzCompareNames(f *testing.F) {
	for _, text := range []string{"CN=dev-17,O=Example", "CN=a+serialNumber=1,DC=x", `CN=\1b[31m`} {
		f.Add(mustSubject(f, text), []byte{0x30, 5, 0x82, 3, 'd', 'e', 'v'}, mustSubject(f, strings.ToUpper(text)), []byte{0x30, 6, 0x87, 4, 192, 0, 2, 1})
	}
	f.Fuzz(func(t *testing.T, subjectA, sanA, subjectB, sanB []byte) {
		san := func(value []byte) []pkix.Extension {
			return []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: value}}
		}
		compare := func(subjectA, sanA, subjectB, sanB []byte) []csr.Difference {
			return csr.CompareNames(&x509.CertificateRequest{RawSubject: subjectA, Extensions: san(sanA)}, &x509.Certificate{RawSubject: subjectB, Extensions: san(sanB)})
		}
		if same := compare(subjectA, sanA, subjectA, sanA); len(same) != 0 {
			t.Errorf("a name differs from itself: %q", same)
		}
		differences := compare(subjectA, sanA, subjectB, sanB)
		if back := compare(subjectB, sanB, subjectA, sanA); len(back) != len(differences) {
			t.Errorf("%q, and the other way %q", differences, back)
		}
		for _, d := range differences {
			if strings.ContainsFunc(d.Asked+d.Issued, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("not printable: %q", d)
			}
		}
	})
}

// What Build makes of a template is what the template describes, and of another it
// is not.
func TestDescribes(t *testing.T) {
	sans, err := csr.ParseSAN("DNS:device.example")
	if err != nil {
		t.Fatal(err)
	}
	clientAuth, err := csr.ParseExtKeyUsage([]string{"clientAuth"})
	if err != nil {
		t.Fatal(err)
	}
	templates := map[string]csr.Template{
		"nothing":   {},
		"a subject": {RawSubject: mustSubject(t, "CN=a")},
		"case":      {RawSubject: mustSubject(t, "CN=A")},
		"a SAN":     {SANs: []csr.SAN{sans}},
		"both":      {RawSubject: mustSubject(t, "CN=a"), SANs: []csr.SAN{sans}},
		"a usage":   {KeyUsage: x509.KeyUsageDigitalSignature},
		"a purpose": {ExtKeyUsage: clientAuth},
		"PSS":       {PSS: true},
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for kind, signer := range map[string]crypto.Signer{"EC": newKey(t), "RSA": rsaKey} {
		for name, template := range templates {
			request, err := x509.ParseCertificateRequest(build(t, template, signer))
			if err != nil {
				t.Fatal(err)
			}
			for other, described := range templates {
				want := other == name || kind == "EC" && (name+other == "PSSnothing" || name+other == "nothingPSS") // which only RSA has
				if got, err := described.Describes(request); got != want || err != nil {
					t.Errorf("%s: %s describes a request for %s: %t, %v", kind, other, name, got, err)
				}
			}
		}
	}
}
