package csr_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"estenroll/csr"
)

// attributeVectors are the files with CSR attributes that others have made.
func attributeVectors(t testing.TB) map[string][]byte {
	t.Helper()
	vectors := map[string][]byte{}
	for _, pattern := range []string{"rfc9148/att-response-285.der", "rfc8951/csrattrs.der", "rfc9908/*.der"} {
		paths, err := filepath.Glob(filepath.Join("../testdata", pattern))
		if err != nil || len(paths) == 0 {
			t.Fatalf("testdata/%s: no vectors (%v)", pattern, err)
		}
		for _, path := range paths {
			der, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			vectors[filepath.Base(path)] = der
		}
	}
	return vectors
}

func parseAttributes(t *testing.T, der []byte) csr.Attributes {
	t.Helper()
	attributes, err := csr.ParseAttributes(der)
	if err != nil {
		t.Fatal(err)
	}
	return attributes
}

func subject(t testing.TB, text string) []byte {
	t.Helper()
	der, err := csr.ParseSubject(text)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// What others have encoded parses, and is encoded from the parsed fields as it was.
func TestAttributeVectors(t *testing.T) {
	for name, der := range attributeVectors(t) {
		t.Run(name, func(t *testing.T) {
			again, err := parseAttributes(t, der).Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(again, der) {
				t.Errorf("got %x, want %x", again, der)
			}
		})
	}
}

// The template of a request that OpenSSL encodes is what we encode of the same fields.
func TestRequestTemplateJudged(t *testing.T) {
	want := attributeVectors(t)["template.der"]
	source, err := os.ReadFile("../testdata/rfc9908/template.cnf")
	if err != nil {
		t.Fatal(err)
	}
	config, made := filepath.Join(t.TempDir(), "template.cnf"), filepath.Join(t.TempDir(), "template.der")
	if err := os.WriteFile(config, source, 0o600); err != nil {
		t.Fatal(err)
	}
	judge(t, nil, "asn1parse", "-genconf", config, "-noout", "-out", made)
	if openssl, err := os.ReadFile(made); err != nil || !bytes.Equal(openssl, want) {
		t.Fatalf("template.der is not what OpenSSL makes of template.cnf (%v)", err)
	}

	extensions, err := csr.WantExtensionTemplate([]csr.ExtensionTemplate{
		{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 7, 0x80}},
		{Id: asn1.ObjectIdentifier{2, 5, 29, 37}},
		{Id: csr.OIDSubjectAltName},
	})
	if err != nil {
		t.Fatal(err)
	}
	template, err := csr.WantRequest(csr.RequestTemplate{
		Subject: &csr.NameTemplate{
			{{Type: asn1.ObjectIdentifier{2, 5, 4, 10}, Value: append([]byte{asn1.TagUTF8String, 7}, "Example"...)}},
			{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}}, {Type: asn1.ObjectIdentifier{2, 5, 4, 5}}},
		},
		Key:        csr.WantedKey{Family: "RSA", Size: "3072"},
		Attributes: csr.Attributes{extensions},
	})
	if err != nil {
		t.Fatal(err)
	}
	macAddress, err := x509.ParseOID("1.3.6.1.1.1.1.22")
	if err != nil {
		t.Fatal(err)
	}
	got, err := csr.Attributes{{Type: macAddress}, template}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
}

func TestWanted(t *testing.T) {
	vectors := attributeVectors(t)
	san := csr.ExtensionTemplate{Id: csr.OIDSubjectAltName, Critical: true, Value: vectors["5.1_acp-node-name.der"][31:]}
	for _, c := range []struct {
		vector string
		want   csr.Wanted
	}{
		{"att-response-285.der", csr.Wanted{ChallengePassword: true}},
		{"csrattrs.der", csr.Wanted{
			ChallengePassword: true, Key: csr.WantedKey{Family: "EC", Size: "P-384"}, Hash: crypto.SHA384,
			Extensions: []csr.ExtensionTemplate{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 1, 1, 1, 22}}},
		}},
		{"5.1_acp-node-name.der", csr.Wanted{Extensions: []csr.ExtensionTemplate{san}}},
		{"5.2_ec.der", csr.Wanted{ChallengePassword: true, Key: csr.WantedKey{Family: "EC", Size: "P-384"}, Hash: crypto.SHA384}},
		{"5.3_friendly-name.der", csr.Wanted{ChallengePassword: true, Key: csr.WantedKey{Family: "EC", Size: "P-521"}, Hash: crypto.SHA512}},
		{"5.4_rsa-4096.der", csr.Wanted{ChallengePassword: true, Key: csr.WantedKey{Family: "RSA", Size: "4096"}, Hash: crypto.SHA256}},
		{"5.5_serial-number.der", csr.Wanted{ChallengePassword: true, Key: csr.WantedKey{Family: "EC", Size: "P-384"}, Hash: crypto.SHA384}},
		{"template.der", csr.Wanted{
			Key: csr.WantedKey{Family: "RSA", Size: "3072"},
			Subject: &csr.NameTemplate{
				{{Type: asn1.ObjectIdentifier{2, 5, 4, 10}, Value: append([]byte{asn1.TagUTF8String, 7}, "Example"...)}},
				{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}}, {Type: asn1.ObjectIdentifier{2, 5, 4, 5}}},
			},
			Extensions: []csr.ExtensionTemplate{
				{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 7, 0x80}},
				{Id: asn1.ObjectIdentifier{2, 5, 29, 37}},
				{Id: csr.OIDSubjectAltName},
			},
		}},
	} {
		t.Run(c.vector, func(t *testing.T) {
			got, err := parseAttributes(t, vectors[c.vector]).Wanted()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got, cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".family" }, cmp.Ignore())); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func want(t *testing.T, attributes ...any) csr.Wanted {
	t.Helper()
	wanted, err := list(t, attributes...).Wanted()
	if err != nil {
		t.Fatal(err)
	}
	return wanted
}

// list makes attributes of OIDs, kinds of keys, extensions and attributes.
func list(t *testing.T, attributes ...any) (all csr.Attributes) {
	t.Helper()
	for _, one := range attributes {
		var attribute csr.Attribute
		var err error
		switch one := one.(type) {
		case string:
			attribute.Type, err = x509.ParseOID(one)
		case csr.WantedKey:
			attribute, err = csr.WantKey(one)
		case pkix.Extension:
			attribute, err = csr.WantExtensions([]pkix.Extension{one})
		case csr.RequestTemplate:
			attribute, err = csr.WantRequest(one)
		case csr.Attribute:
			attribute = one
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, attribute)
	}
	return all
}

func TestWantedContradictory(t *testing.T) {
	p384, rsa3072 := csr.WantedKey{Family: "EC", Size: "P-384"}, csr.WantedKey{Family: "RSA", Size: "3072"}
	const ecdsaWithSHA384, sha256WithRSA = "1.2.840.10045.4.3.3", "1.2.840.113549.1.1.11"
	san := func(last byte) pkix.Extension {
		return pkix.Extension{Id: csr.OIDSubjectAltName, Value: []byte{0x30, 3, 0x82, 1, last}}
	}
	for name, attributes := range map[string]csr.Attributes{
		"two kinds of key":     list(t, p384, rsa3072),
		"two sizes of key":     list(t, rsa3072, csr.WantedKey{Family: "RSA", Size: "4096"}),
		"two signatures":       list(t, ecdsaWithSHA384, sha256WithRSA),
		"key and signature":    list(t, rsa3072, ecdsaWithSHA384),
		"one extension, twice": list(t, san('a'), san('b')),
		"two templates":        list(t, csr.RequestTemplate{}, csr.RequestTemplate{}),
		"two keys in one":      list(t, csr.RequestTemplate{Key: p384, Attributes: list(t, rsa3072)}),
	} {
		if got, err := attributes.Wanted(); !errors.Is(err, csr.ErrContradictory) {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
	// What says the same twice is no contradiction.
	want(t, p384, p384, ecdsaWithSHA384, ecdsaWithSHA384, san('a'), san('a'))
}

// Where there is a template of the request, the attributes beside it are for other
// clients (RFC 9908 §4).
func TestTemplateCountsAlone(t *testing.T) {
	t.Attr("shows", "RFC 9908 §4 (1)")
	got := want(t, csr.WantedKey{Family: "RSA", Size: "4096"}, csr.WantChallengePassword(), csr.RequestTemplate{Key: csr.WantedKey{Family: "EC", Size: "P-384"}})
	if got.Key.String() != "EC P-384" || got.ChallengePassword {
		t.Errorf("got %+v", got)
	}
}

// What is unknown is ignored, whatever it looks like.
func TestUnknownIgnored(t *testing.T) {
	t.Attr("shows", "RFC 7030 §4.5.2 (1)")
	got := want(t, "2.25.340282366920938463463374607431768211455", "1.3.6.1.1.1.1.22", csr.Attribute{Type: list(t, "2.999.1")[0].Type, Values: [][]byte{{4, 1, 0}}},
		csr.Attribute{Type: list(t, "2.999.2")[0].Type, Values: [][]byte{}})
	if diff := cmp.Diff(csr.Wanted{}, got, cmp.AllowUnexported(csr.Wanted{})); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestParseAttributesRefused(t *testing.T) {
	for name, der := range map[string][]byte{
		"empty":             {},
		"a set":             {0x31, 0},
		"a number":          {0x30, 3, 2, 1, 0},
		"trailing":          {0x30, 0, 5, 0},
		"cut":               {0x30, 4, 6, 2, 0x55},
		"indefinite":        {0x30, 0x80, 0, 0},
		"one part":          {0x30, 5, 0x30, 3, 6, 1, 0x55},
		"three parts":       {0x30, 9, 0x30, 7, 6, 1, 0x55, 0x31, 0, 5, 0},
		"values no set":     {0x30, 7, 0x30, 5, 6, 1, 0x55, 0x30, 0},
		"no OID":            {0x30, 2, 6, 0},
		"17 KiB":            append([]byte{0x30, 0x82, 0x44, 0}, make([]byte, 17<<10)...),
		"too many elements": append([]byte{0x30, 0x82, 3, 3}, bytes.Repeat([]byte{6, 1, 0x55}, 257)...),
	} {
		if got, err := csr.ParseAttributes(der); err == nil {
			t.Errorf("%s: got %v", name, got)
		} else if !strings.HasPrefix(err.Error(), "CSR attributes: ") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// What is known and does not parse is refused: to ignore it would be a guess.
func TestWantedRefused(t *testing.T) {
	attribute := func(oid string, values ...[]byte) csr.Attribute {
		return csr.Attribute{Type: list(t, oid)[0].Type, Values: values}
	}
	const extensionRequest, template = "1.2.840.113549.1.9.14", "1.2.840.113549.1.9.16.2.61"
	for name, one := range map[string]csr.Attribute{
		"curve no OID":        attribute("1.2.840.10045.2.1", []byte{2, 1, 1}),
		"RSA of text":         attribute("1.2.840.113549.1.1.1", []byte{0x0c, 1, 'x'}),
		"RSA of -1":           attribute("1.2.840.113549.1.1.1", []byte{2, 1, 0xff}),
		"RSA of 65536":        attribute("1.2.840.113549.1.1.1", []byte{2, 3, 1, 0, 0}),
		"extensions a number": attribute(extensionRequest, []byte{2, 1, 1}),
		"extension a number":  attribute(extensionRequest, []byte{0x30, 3, 2, 1, 1}),
		"extension's value":   attribute(extensionRequest, []byte{0x30, 9, 0x30, 7, 6, 3, 0x55, 0x1d, 0x11, 5, 0}),
		"template a number":   attribute(template, []byte{2, 1, 1}),
		"template version 2":  attribute(template, []byte{0x30, 5, 2, 1, 1, 0xa1, 0}),
		"template, no more":   attribute(template, []byte{0x30, 7, 2, 1, 0, 0xa1, 0, 0xa2, 0}),
		"empty RDN":           attribute(template, []byte{0x30, 9, 2, 1, 0, 0x30, 2, 0x31, 0, 0xa1, 0}),
		"template's key":      attribute(template, []byte{0x30, 7, 2, 1, 0, 0xa0, 0, 0xa1, 0}),
	} {
		if got, err := (csr.Attributes{one}).Wanted(); err == nil {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

func TestWantedKey(t *testing.T) {
	for _, c := range []struct {
		key  csr.WantedKey
		name string
		want bool
	}{
		{csr.WantedKey{}, "EC P-256", true},
		{csr.WantedKey{Family: "EC"}, "EC P-384", true},
		{csr.WantedKey{Family: "EC"}, "RSA 2048", false},
		{csr.WantedKey{Family: "EC", Size: "P-384"}, "EC P-384", true},
		{csr.WantedKey{Family: "EC", Size: "P-384"}, "EC P-256", false},
		{csr.WantedKey{Family: "RSA", Size: "2048"}, "RSA 20480", false},
		{csr.WantedKey{Family: "1.3.101.112"}, "EC P-256", false},
	} {
		if got := c.key.Allows(c.name); got != c.want {
			t.Errorf("%q allows %q: got %t", c.key, c.name, got)
		}
	}
}

// What the server wants is what the request asks for, in OpenSSL's eyes too.
func TestApply(t *testing.T) {
	factory := subject(t, "serialNumber=4711,CN=factory,O=Maker")
	usage := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 5, 0xa0}}
	other := pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, Value: []byte{4, 1, 7}}
	own := csr.Template{RawSubject: subject(t, "CN=dev-17,O=Example"), KeyUsage: x509.KeyUsageDigitalSignature}
	t.Run("extensions", func(t *testing.T) {
		applied, replaced, err := want(t, usage, other, "2.5.29.37", "2.5.29.17").Apply(own, factory)
		if err != nil {
			t.Fatal(err)
		}
		if want := []string{"extension 2.5.29.15"}; !slices.Equal(replaced, want) {
			t.Errorf("replaced: got %q, want %q", replaced, want)
		}
		text := judge(t, build(t, applied, newKey(t)), "req", "-inform", "DER", "-noout", "-text", "-verify")
		for _, line := range []string{"Digital Signature, Key Encipherment", "TLS Web Client Authentication", "1.3.6.1.4.1.99999.1", "CN = dev-17"} {
			if !strings.Contains(text, line) {
				t.Errorf("no %q in\n%s", line, text)
			}
		}
		if strings.Contains(text, "Alternative") {
			t.Errorf("a SAN out of nothing\n%s", text)
		}
	})
	t.Run("hash", func(t *testing.T) {
		applied, _, err := want(t, "1.2.840.10045.4.3.4").Apply(own, nil)
		if err != nil {
			t.Fatal(err)
		}
		if text := judge(t, build(t, applied, newKey(t)), "req", "-inform", "DER", "-noout", "-text", "-verify"); !strings.Contains(text, "ecdsa-with-SHA512") {
			t.Errorf("got\n%s", text)
		}
	})
	t.Run("template", func(t *testing.T) {
		applied, replaced, err := want(t, parseAttributes(t, attributeVectors(t)["template.der"])[1]).Apply(own, factory)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := csr.FormatSubject(applied.RawSubject), "CN=dev-17+serialNumber=4711,O=Example"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if len(replaced) != 1 || !strings.Contains(replaced[0], "serialNumber=4711") {
			t.Errorf("replaced: %q", replaced)
		}
	})
	t.Run("no value", func(t *testing.T) {
		_, _, err := want(t, parseAttributes(t, attributeVectors(t)["template.der"])[1]).Apply(own, subject(t, "CN=factory"))
		if !errors.Is(err, csr.ErrNoValue) || !strings.Contains(err.Error(), "serialNumber") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("nothing", func(t *testing.T) {
		applied, replaced, err := csr.Wanted{}.Apply(own, factory)
		if err != nil || len(replaced) > 0 {
			t.Fatalf("got %q, %v", replaced, err)
		}
		key := newKey(t)
		if diff := cmp.Diff(own, applied); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		request, err := x509.ParseCertificateRequest(build(t, applied, key))
		if err != nil {
			t.Fatal(err)
		}
		if same, err := own.Describes(request); err != nil || !same {
			t.Errorf("got %t, %v", same, err)
		}
	})
}

// A challengePassword is where OpenSSL finds it, and another one is another request.
func TestChallengePassword(t *testing.T) {
	const binding = "Iq9v+/Zq0WkZ7rJt2Q=="
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	san, err := csr.ParseSAN("DNS:dev.example")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		key      crypto.Signer
		template csr.Template
	}{
		"EC":              {newKey(t), csr.Template{}},
		"RSA":             {rsaKey, csr.Template{}},
		"PSS":             {rsaKey, csr.Template{PSS: true}},
		"with extensions": {newKey(t), csr.Template{SANs: []csr.SAN{san}}},
	} {
		t.Run(name, func(t *testing.T) {
			plain := c.template
			c.template.ChallengePassword = binding
			der := build(t, c.template, c.key)
			text := judge(t, der, "req", "-inform", "DER", "-noout", "-text", "-verify")
			if !strings.Contains(text, "challengePassword        :"+binding) {
				t.Errorf("got\n%s", text)
			}
			request, err := x509.ParseCertificateRequest(der)
			if err != nil {
				t.Fatal(err)
			}
			if got := csr.ChallengePassword(request); got != binding {
				t.Errorf("got %q, want %q", got, binding)
			}
			for _, other := range []struct {
				template csr.Template
				want     bool
			}{{c.template, true}, {plain, false}} {
				if same, err := other.template.Describes(request); err != nil || same != other.want {
					t.Errorf("Describes: got %t, %v, want %t", same, err, other.want)
				}
			}
		})
	}
}

func FuzzParseAttributes(f *testing.F) {
	for _, der := range attributeVectors(f) {
		f.Add(der)
	}
	known, err := csr.ParseSubject("CN=dev,serialNumber=1")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		attributes, err := csr.ParseAttributes(der)
		if err != nil {
			return
		}
		again, err := attributes.Marshal()
		if err != nil || !bytes.Equal(again, der) {
			t.Fatalf("%x is encoded as %x (%v)", der, again, err)
		}
		wanted, err := attributes.Wanted()
		if err != nil {
			return
		}
		applied, _, err := wanted.Apply(csr.Template{}, known)
		if err != nil {
			return
		}
		if _, err := applied.Extensions(); err != nil {
			t.Errorf("%x: %v", der, err)
		}
	})
}
