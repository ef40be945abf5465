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

// The templates of a request are what OpenSSL makes of their sources.
func TestTemplateVectors(t *testing.T) {
	for _, name := range []string{"template", "3.4_example"} {
		source, err := os.ReadFile("../testdata/rfc9908/" + name + ".cnf")
		if err != nil {
			t.Fatal(err)
		}
		config, made := filepath.Join(t.TempDir(), "source.cnf"), filepath.Join(t.TempDir(), "made.der")
		if err := os.WriteFile(config, source, 0o600); err != nil {
			t.Fatal(err)
		}
		judge(t, nil, "asn1parse", "-genconf", config, "-noout", "-out", made)
		if openssl, err := os.ReadFile(made); err != nil || !bytes.Equal(openssl, attributeVectors(t)[name+".der"]) {
			t.Errorf("%s.der is not what OpenSSL makes of %s.cnf (%v)", name, name, err)
		}
	}
}

// The template of a request that OpenSSL encodes is what we encode of the same fields.
func TestRequestTemplateJudged(t *testing.T) {
	want := attributeVectors(t)["template.der"]
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
	macAddress, drink := oid(t, "1.3.6.1.1.1.1.22"), oid(t, "0.9.2342.19200300.100.1.5")
	for _, c := range []struct {
		vector string
		want   csr.Wanted
	}{
		{"att-response-285.der", csr.Wanted{
			ChallengePassword: true, Hash: crypto.SHA384, // the hash alone
			Ignored: []x509.OID{macAddress, oid(t, "2.999.1"), oid(t, "2.999.2"), oid(t, "1.3.36.3.3.2.8.1.1.11")},
		}},
		{"csrattrs.der", csr.Wanted{
			ChallengePassword: true, Key: csr.WantedKey{Family: "EC", Size: "P-384"}, Hash: crypto.SHA384,
			Extensions: []csr.ExtensionTemplate{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 1, 1, 1, 22}}},
		}},
		{"5.1_acp-node-name.der", csr.Wanted{Extensions: []csr.ExtensionTemplate{san}}},
		{"5.2_ec.der", csr.Wanted{
			ChallengePassword: true, Key: csr.WantedKey{Family: "EC", Size: "P-384"}, Hash: crypto.SHA384, Ignored: []x509.OID{macAddress},
		}},
		{"5.3_friendly-name.der", csr.Wanted{
			ChallengePassword: true, Key: csr.WantedKey{Family: "EC", Size: "P-521"}, Hash: crypto.SHA512,
			SubjectTypes: []asn1.ObjectIdentifier{{2, 5, 4, 5}}, Ignored: []x509.OID{oid(t, "1.2.840.113549.1.9.20"), drink},
		}},
		{"5.4_rsa-4096.der", csr.Wanted{
			ChallengePassword: true, Key: csr.WantedKey{Family: "RSA", Size: "4096"}, Hash: crypto.SHA256, PSS: new(false),
		}},
		{"5.5_serial-number.der", csr.Wanted{
			ChallengePassword: true, Key: csr.WantedKey{Family: "EC", Size: "P-384"}, Hash: crypto.SHA384, SubjectTypes: []asn1.ObjectIdentifier{{2, 5, 4, 5}},
		}},
		{"3.4_example.der", csr.Wanted{
			Key: csr.WantedKey{Family: "EC", Size: "P-256"},
			Subject: &csr.NameTemplate{
				{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}}},
				{{Type: asn1.ObjectIdentifier{2, 5, 4, 11}, Value: append([]byte{asn1.TagUTF8String, 6}, "myDept"...)}},
				{{Type: asn1.ObjectIdentifier{2, 5, 4, 11}, Value: append([]byte{asn1.TagUTF8String, 7}, "myGroup"...)}},
			},
			Extensions: []csr.ExtensionTemplate{
				{Id: csr.OIDSubjectAltName, Value: slices.Concat([]byte{0x30, 20, 0x82, 16}, []byte("www.myServer.com"), []byte{0x87, 0})},
				{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 3, 0x88}},
				{Id: asn1.ObjectIdentifier{2, 5, 29, 37}},
			},
		}},
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

func oid(t *testing.T, text string) x509.OID {
	t.Helper()
	parsed, err := x509.ParseOID(text)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
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
	const sha384WithRSA, sha512, unstructuredName = "1.2.840.113549.1.1.12", "2.16.840.1.101.3.4.2.3", "1.2.840.113549.1.9.2"
	for name, attributes := range map[string]csr.Attributes{
		"two kinds of key":        list(t, p384, rsa3072),
		"two sizes of key":        list(t, rsa3072, csr.WantedKey{Family: "RSA", Size: "4096"}),
		"two signatures":          list(t, ecdsaWithSHA384, sha256WithRSA),
		"two hashes":              list(t, sha384WithRSA, sha256WithRSA),
		"two hashes, one alone":   list(t, ecdsaWithSHA384, sha512),
		"two paddings":            list(t, sha384WithRSA, rsassaPSS),
		"key and signature":       list(t, rsa3072, ecdsaWithSHA384),
		"key and PSS":             list(t, p384, rsassaPSS),
		"key that is a signature": list(t, p384, ed25519),
		"one extension, twice":    list(t, san('a'), san('b')),
		"one attribute, twice":    list(t, valued(t, unstructuredName, []byte{0x13, 1, 'a'}), valued(t, unstructuredName, []byte{0x13, 1, 'b'})),
		"two templates":           list(t, csr.RequestTemplate{}, csr.RequestTemplate{}),
		"two keys in one":         list(t, csr.RequestTemplate{Key: p384, Attributes: list(t, rsa3072)}),
	} {
		if got, err := attributes.Wanted(); !errors.Is(err, csr.ErrContradictory) {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
	// What says the same twice is no contradiction, nor what says more.
	same := valued(t, unstructuredName, []byte{0x13, 1, 'a'})
	got := want(t, csr.WantedKey{Family: "EC"}, p384, p384, csr.WantedKey{Family: "EC"}, ecdsaWithSHA384, ecdsaWithSHA384, "2.16.840.1.101.3.4.2.2", san('a'), san('a'), same, same)
	if got.Key != p384 || len(got.Extensions) != 1 || len(got.Attributes) != 1 {
		t.Errorf("got %+v", got)
	}
}

const rsassaPSS, ed25519 = "1.2.840.113549.1.1.10", "1.3.101.112"

// valued is an attribute with values.
func valued(t *testing.T, kind string, values ...[]byte) csr.Attribute {
	t.Helper()
	return csr.Attribute{Type: oid(t, kind), Values: values}
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

// What is unknown is ignored, whatever it looks like, and what is known and left to us
// without our having it; in a template of a request too.
func TestUnknownIgnored(t *testing.T) {
	t.Attr("shows", "RFC 7030 §4.5.2 (1)")
	unknown := list(t, "2.25.340282366920938463463374607431768211455", "1.3.6.1.1.1.1.22", valued(t, "2.999.1", []byte{4, 1, 0}),
		csr.Attribute{Type: oid(t, "2.999.2"), Values: [][]byte{}}, "1.2.840.113549.1.9.20", csr.Attribute{Type: oid(t, "2.5.4.3"), Values: [][]byte{}})
	for name, attributes := range map[string]csr.Attributes{"attributes": unknown, "template": list(t, csr.RequestTemplate{Attributes: unknown})} {
		got, err := attributes.Wanted()
		if err != nil {
			t.Fatal(err)
		}
		ignored := got.Ignored
		got.Ignored = nil
		if diff := cmp.Diff(csr.Wanted{}, got, cmp.AllowUnexported(csr.Wanted{})); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
		if !slices.EqualFunc(ignored, unknown, func(o x509.OID, a csr.Attribute) bool { return o.Equal(a.Type) }) {
			t.Errorf("%s: ignored %v", name, ignored)
		}
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
		"PSS of text":         attribute(rsassaPSS, []byte{0x0c, 1, 'x'}),
		"PSS with SHA-1":      attribute(rsassaPSS, []byte{0x30, 0}),
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
		{want(t, ed25519).Key, "EC P-256", false},
		{want(t, csr.Attribute{Type: oid(t, ed25519), Values: [][]byte{}}).Key, "Ed25519", true},
		{want(t, csr.RequestTemplate{Key: csr.WantedKey{Family: "ML-DSA-44"}}).Key, "ML-DSA-44", true},
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
		applied, outcome, err := want(t, usage, other, "2.5.29.37", "2.5.29.17").Apply(own, factory)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(csr.Outcome{Replaced: []string{"extension 2.5.29.15"}, Missing: []string{"SAN"}}, outcome); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
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
	t.Run("template", func(t *testing.T) {
		applied, outcome, err := want(t, parseAttributes(t, attributeVectors(t)["template.der"])[1]).Apply(own, factory)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := csr.FormatSubject(applied.RawSubject), "CN=dev-17+serialNumber=4711,O=Example"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if len(outcome.Replaced) != 1 || !strings.Contains(outcome.Replaced[0], "serialNumber=4711") {
			t.Errorf("replaced: %q", outcome.Replaced)
		}
	})
	t.Run("no value", func(t *testing.T) {
		_, _, err := want(t, parseAttributes(t, attributeVectors(t)["template.der"])[1]).Apply(own, subject(t, "CN=factory"))
		if !errors.Is(err, csr.ErrNoValue) || !strings.Contains(err.Error(), "serialNumber") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("nothing", func(t *testing.T) {
		applied, outcome, err := csr.Wanted{}.Apply(own, factory)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(csr.Outcome{}, outcome); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
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

// Each part of a template of a request comes to what RFC 9908 §3.4 says.
func TestTemplateClauses(t *testing.T) {
	cn, ou, serial := asn1.ObjectIdentifier{2, 5, 4, 3}, asn1.ObjectIdentifier{2, 5, 4, 11}, asn1.ObjectIdentifier{2, 5, 4, 5}
	usageOID, purposes, constraints := asn1.ObjectIdentifier{2, 5, 29, 15}, asn1.ObjectIdentifier{2, 5, 29, 37}, asn1.ObjectIdentifier{2, 5, 29, 19}
	text := func(value string) []byte { return append([]byte{asn1.TagUTF8String, byte(len(value))}, value...) }
	name := func(rdns ...[]csr.NamePart) csr.RequestTemplate {
		return csr.RequestTemplate{Subject: (*csr.NameTemplate)(&rdns)}
	}
	extensions := func(extensions ...csr.ExtensionTemplate) csr.RequestTemplate {
		template, err := csr.WantExtensionTemplate(extensions)
		if err != nil {
			t.Fatal(err)
		}
		return csr.RequestTemplate{Attributes: csr.Attributes{template}}
	}
	san := func(names ...byte) csr.RequestTemplate {
		return extensions(csr.ExtensionTemplate{Id: csr.OIDSubjectAltName, Value: append([]byte{0x30, byte(len(names))}, names...)})
	}
	sans := func(texts ...string) (all []csr.SAN) {
		for _, text := range texts {
			san, err := csr.ParseSAN(text)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, san)
		}
		return all
	}
	factory := subject(t, "serialNumber=4711,CN=factory,O=Maker")
	dev := subject(t, "CN=dev,OU=b,OU=a")
	rsa3072 := csr.WantedKey{Family: "RSA", Size: "3072"}
	own := sans("DNS:dev.example", "IP:192.0.2.1", "IP:192.0.2.2")
	for what, c := range map[string]struct {
		template csr.RequestTemplate
		own      csr.Template
		want     func(*x509.CertificateRequest) bool
		outcome  csr.Outcome
		none     string // that there is no value of
	}{
		"no subject: the client's own": {
			own: csr.Template{RawSubject: dev}, want: func(r *x509.CertificateRequest) bool { return bytes.Equal(r.RawSubject, dev) },
		},
		"an RDN with its value": {
			template: name([]csr.NamePart{{Type: cn, Value: text("given")}}), own: csr.Template{RawSubject: dev},
			want:    func(r *x509.CertificateRequest) bool { return csr.FormatSubject(r.RawSubject) == "CN=given" },
			outcome: csr.Outcome{Replaced: []string{"Subject CN=dev,OU=b,OU=a, now CN=given"}},
		},
		"RDNs without a value": {
			template: name([]csr.NamePart{{Type: ou}}, []csr.NamePart{{Type: ou}}, []csr.NamePart{{Type: cn}}), own: csr.Template{RawSubject: dev},
			want: func(r *x509.CertificateRequest) bool { return bytes.Equal(r.RawSubject, dev) },
		},
		"an RDN without a value, of the factory's": {
			template: name([]csr.NamePart{{Type: cn}, {Type: serial}}), own: csr.Template{RawSubject: dev},
			want: func(r *x509.CertificateRequest) bool {
				return csr.FormatSubject(r.RawSubject) == "CN=dev+serialNumber=4711"
			},
			outcome: csr.Outcome{Replaced: []string{"Subject CN=dev,OU=b,OU=a, now CN=dev+serialNumber=4711"}},
		},
		"one RDN more than there is": {
			template: name([]csr.NamePart{{Type: ou}}, []csr.NamePart{{Type: ou}}, []csr.NamePart{{Type: ou}}), own: csr.Template{RawSubject: dev}, none: "subject: a value of OU",
		},
		"an RDN of an unknown type": {
			template: name([]csr.NamePart{{Type: asn1.ObjectIdentifier{2, 999, 1}}}), own: csr.Template{RawSubject: dev}, none: "a value of 2.999.1",
		},
		"an extension with its value": {
			template: extensions(csr.ExtensionTemplate{Id: usageOID, Critical: true, Value: []byte{3, 2, 3, 0x88}}), own: csr.Template{KeyUsage: x509.KeyUsageKeyEncipherment},
			want: func(r *x509.CertificateRequest) bool {
				return has(r, usageOID, true, 3, 2, 3, 0x88) && len(r.Extensions) == 1
			}, outcome: csr.Outcome{Replaced: []string{"extension 2.5.29.15"}},
		},
		"an extension that is not critical": {
			template: extensions(csr.ExtensionTemplate{Id: usageOID, Value: []byte{3, 2, 7, 0x80}}), own: csr.Template{},
			want: func(r *x509.CertificateRequest) bool { return has(r, usageOID, false, 3, 2, 7, 0x80) },
		},
		"an extension without a value": {
			template: extensions(csr.ExtensionTemplate{Id: purposes}),
			want: func(r *x509.CertificateRequest) bool {
				return has(r, purposes, false, 0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2) // clientAuth
			},
		},
		"an extension without a value that is configured": {
			template: extensions(csr.ExtensionTemplate{Id: usageOID}), own: csr.Template{KeyUsage: x509.KeyUsageKeyAgreement},
			want: func(r *x509.CertificateRequest) bool { return has(r, usageOID, true, 3, 2, 3, 0x08) },
		},
		"no CA": {
			template: extensions(csr.ExtensionTemplate{Id: constraints, Critical: true}),
			want:     func(r *x509.CertificateRequest) bool { return has(r, constraints, true, 0x30, 0) },
		},
		"critical without a value": {
			template: extensions(csr.ExtensionTemplate{Id: purposes, Critical: true}, csr.ExtensionTemplate{Id: csr.OIDSubjectAltName, Critical: true}), own: csr.Template{SANs: sans("DNS:a"), RawSubject: dev},
			want: func(r *x509.CertificateRequest) bool {
				return has(r, purposes, true, 0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2) && has(r, csr.OIDSubjectAltName, true, 0x30, 3, 0x82, 1, 'a')
			},
		},
		"an extension that nobody knows": {
			template: extensions(csr.ExtensionTemplate{Id: asn1.ObjectIdentifier{2, 999, 1}}, csr.ExtensionTemplate{Id: asn1.ObjectIdentifier{2, 999, 2}, Value: []byte{5, 0}}),
			want: func(r *x509.CertificateRequest) bool {
				return has(r, asn1.ObjectIdentifier{2, 999, 2}, false, 5, 0) && len(r.Extensions) == 1
			},
			outcome: csr.Outcome{Ignored: []string{"extension 2.999.1"}},
		},
		"a SAN without a value": {
			template: extensions(csr.ExtensionTemplate{Id: csr.OIDSubjectAltName}), outcome: csr.Outcome{Missing: []string{"SAN"}},
			want: func(r *x509.CertificateRequest) bool { return len(r.Extensions) == 0 },
		},
		"a SAN with its value": {
			template: san(0x82, 1, 'x'), own: csr.Template{SANs: own}, outcome: csr.Outcome{Replaced: []string{"extension 2.5.29.17"}},
			want: func(r *x509.CertificateRequest) bool {
				return slices.Equal(r.DNSNames, []string{"x"}) && len(r.IPAddresses) == 0
			},
		},
		"names of a SAN without a value": {
			template: san(0x82, 1, 'x', 0x87, 0, 0x82, 0, 0x87, 0), own: csr.Template{SANs: own}, outcome: csr.Outcome{Replaced: []string{"extension 2.5.29.17"}},
			want: func(r *x509.CertificateRequest) bool {
				return slices.Equal(r.DNSNames, []string{"x", "dev.example"}) && len(r.IPAddresses) == 2 && r.IPAddresses[0].String() == "192.0.2.1" && r.IPAddresses[1].String() == "192.0.2.2"
			},
		},
		"an address of a SAN that is not configured":      {template: san(0x87, 0), own: csr.Template{SANs: sans("DNS:a")}, none: "SAN: iPAddress"},
		"a directoryName of a SAN that is not configured": {template: san(0xa4, 2, 0x30, 0), none: "SAN: directoryName"},
		"an attribute with its value": {
			template: csr.RequestTemplate{Attributes: list(t, valued(t, "1.2.840.113549.1.9.2", []byte{0x13, 1, 'x'}))},
			want: func(r *x509.CertificateRequest) bool {
				got := csr.RequestAttributes(r)
				return len(got) == 1 && got[0].Type.String() == "1.2.840.113549.1.9.2" && bytes.Equal(got[0].Values[0], []byte{0x13, 1, 'x'})
			},
		},
		"a signature": {
			template: csr.RequestTemplate{Attributes: list(t, "1.2.840.10045.4.3.3")},
			want:     func(r *x509.CertificateRequest) bool { return r.SignatureAlgorithm == x509.ECDSAWithSHA384 },
		},
	} {
		t.Run(what, func(t *testing.T) {
			applied, outcome, err := want(t, c.template).Apply(c.own, factory)
			if c.none != "" {
				if !errors.Is(err, csr.ErrNoValue) || !strings.Contains(err.Error(), c.none) {
					t.Errorf("got %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.outcome, outcome); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			request, err := x509.ParseCertificateRequest(build(t, applied, newKey(t)))
			if err != nil {
				t.Fatal(err)
			}
			if !c.want(request) {
				t.Errorf("got Subject %s, extensions %v, attributes %v", csr.FormatSubject(request.RawSubject), request.Extensions, csr.RequestAttributes(request))
			}
			if same, err := applied.Describes(request); err != nil || !same {
				t.Errorf("Describes: %t, %v", same, err)
			}
		})
	}
	for key, name := range map[csr.WantedKey]string{{}: "", rsa3072: "RSA 3072", {Family: "RSA"}: "RSA", {Family: "EC"}: "EC", {Family: "EC", Size: "P-521"}: "EC P-521"} {
		if got := want(t, csr.RequestTemplate{Key: key}).Key.String(); got != name {
			t.Errorf("key of a template: got %q, want %q", got, name)
		}
	}
}

func has(r *x509.CertificateRequest, id asn1.ObjectIdentifier, critical bool, value ...byte) bool {
	return slices.ContainsFunc(r.Extensions, func(e pkix.Extension) bool {
		return e.Id.Equal(id) && e.Critical == critical && bytes.Equal(e.Value, value)
	})
}

// The example of RFC 9908 §3.4, in OpenSSL's eyes.
func TestTemplateExample(t *testing.T) {
	address, err := csr.ParseSAN("IP:192.0.2.7")
	if err != nil {
		t.Fatal(err)
	}
	wanted := want(t, parseAttributes(t, attributeVectors(t)["3.4_example.der"])[0])
	if got, want := wanted.Describe(), []string{"key of type EC P-256", "Subject OU=myGroup,OU=myDept,CN=", "extension 2.5.29.17", "extension 2.5.29.15", "extension 2.5.29.37"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	applied, outcome, err := wanted.Apply(csr.Template{RawSubject: subject(t, "CN=dev-17"), SANs: []csr.SAN{address}}, nil)
	if err != nil || len(outcome.Missing)+len(outcome.Ignored) > 0 {
		t.Fatalf("%+v, %v", outcome, err)
	}
	text := judge(t, build(t, applied, newKey(t)), "req", "-inform", "DER", "-noout", "-text", "-verify")
	for _, line := range []string{"CN = dev-17, OU = myDept, OU = myGroup", "DNS:www.myServer.com, IP Address:192.0.2.7", "X509v3 Key Usage: critical", "Digital Signature, Key Agreement", "TLS Web Client Authentication"} {
		if !strings.Contains(text, line) {
			t.Errorf("no %q in\n%s", line, text)
		}
	}
}

// A Subject that lacks what the server names is said to, and the device's own counts
// where none is configured; nothing is put into it.
func TestSubjectTypes(t *testing.T) {
	wanted := want(t, parseAttributes(t, attributeVectors(t)["5.5_serial-number.der"])[2])
	factory := subject(t, "serialNumber=4711,CN=factory")
	for name, c := range map[string]struct {
		own, known []byte
		want       []string
	}{
		"it has one":         {factory, nil, nil},
		"the factory's":      {nil, factory, nil},
		"it has none":        {subject(t, "CN=dev"), factory, []string{"serialNumber in the Subject"}},
		"the factory's none": {nil, subject(t, "CN=factory"), []string{"serialNumber in the Subject"}},
	} {
		applied, outcome, err := wanted.Apply(csr.Template{RawSubject: c.own}, c.known)
		if err != nil || !slices.Equal(outcome.Missing, c.want) || !bytes.Equal(applied.RawSubject, c.own) {
			t.Errorf("%s: %+v, %v", name, outcome, err)
		}
	}
	if outcome := wanted.WithoutNames().SubjectTypes; outcome != nil {
		t.Errorf("at a renewal: %v", outcome)
	}
}

// The signature that is wanted is what OpenSSL verifies, by each kind of key.
func TestWantedSignature(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	const ecdsaWith, rsaWith, sha = "1.2.840.10045.4.3.", "1.2.840.113549.1.1.", "2.16.840.1.101.3.4.2."
	pssWithSHA512 := csr.Attribute{Type: oid(t, rsassaPSS), Values: [][]byte{bytes.Join([][]byte{
		{0x30, 0x34, 0xa0, 0x0f, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 3, 5, 0},
		{0xa1, 0x1c, 0x30, 0x1a, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 8, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 3, 5, 0},
		{0xa2, 3, 2, 1, 0x40},
	}, nil)}}
	for name, c := range map[string]struct {
		wants    []any
		key      crypto.Signer
		pss      bool // is configured
		want     x509.SignatureAlgorithm
		openssl  []string
		replaced bool
	}{
		"EC":                       {nil, newKey(t), false, x509.ECDSAWithSHA256, []string{"ecdsa-with-SHA256"}, false},
		"ecdsa-with-SHA256":        {[]any{ecdsaWith + "2"}, newKey(t), false, x509.ECDSAWithSHA256, []string{"ecdsa-with-SHA256"}, false},
		"ecdsa-with-SHA384":        {[]any{ecdsaWith + "3"}, newKey(t), false, x509.ECDSAWithSHA384, []string{"ecdsa-with-SHA384"}, false},
		"ecdsa-with-SHA512":        {[]any{ecdsaWith + "4"}, newKey(t), true, x509.ECDSAWithSHA512, []string{"ecdsa-with-SHA512"}, false},
		"SHA-384 alone, EC":        {[]any{sha + "2"}, newKey(t), false, x509.ECDSAWithSHA384, []string{"ecdsa-with-SHA384"}, false},
		"sha256WithRSA":            {[]any{rsaWith + "11"}, rsaKey, false, x509.SHA256WithRSA, []string{"sha256WithRSAEncryption"}, false},
		"sha384WithRSA":            {[]any{rsaWith + "12"}, rsaKey, false, x509.SHA384WithRSA, []string{"sha384WithRSAEncryption"}, false},
		"sha512WithRSA":            {[]any{rsaWith + "13"}, rsaKey, false, x509.SHA512WithRSA, []string{"sha512WithRSAEncryption"}, false},
		"sha384WithRSA for PSS":    {[]any{rsaWith + "12"}, rsaKey, true, x509.SHA384WithRSA, []string{"sha384WithRSAEncryption"}, true},
		"PSS":                      {[]any{rsassaPSS}, rsaKey, false, x509.SHA256WithRSAPSS, []string{"rsassaPss", "Hash Algorithm: sha256", "mgf1 with sha256", "Salt Length: 0x20"}, false},
		"PSS and SHA-384":          {[]any{rsassaPSS, sha + "2"}, rsaKey, false, x509.SHA384WithRSAPSS, []string{"rsassaPss", "Hash Algorithm: sha384", "mgf1 with sha384", "Salt Length: 0x30"}, false},
		"SHA-384 alone, PSS":       {[]any{sha + "2"}, rsaKey, true, x509.SHA384WithRSAPSS, []string{"rsassaPss", "Hash Algorithm: sha384", "mgf1 with sha384", "Salt Length: 0x30"}, false},
		"PSS with its parameters":  {[]any{pssWithSHA512}, rsaKey, true, x509.SHA512WithRSAPSS, []string{"rsassaPss", "Hash Algorithm: sha512", "mgf1 with sha512", "Salt Length: 0x40"}, false},
		"SHA-512 alone, PKCS #1":   {[]any{sha + "3"}, rsaKey, false, x509.SHA512WithRSA, []string{"sha512WithRSAEncryption"}, false},
		"in a template of request": {[]any{csr.RequestTemplate{Attributes: list(t, rsaWith+"13")}}, rsaKey, false, x509.SHA512WithRSA, []string{"sha512WithRSAEncryption"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			applied, outcome, err := want(t, c.wants...).Apply(csr.Template{PSS: c.pss}, nil)
			if err != nil || (len(outcome.Replaced) > 0) != c.replaced {
				t.Fatalf("%+v, %v", outcome, err)
			}
			der := build(t, applied, c.key)
			request, err := x509.ParseCertificateRequest(der)
			if err != nil || request.SignatureAlgorithm != c.want {
				t.Errorf("got %v, %v", request.SignatureAlgorithm, err)
			}
			text := judge(t, der, "req", "-inform", "DER", "-noout", "-text", "-verify")
			for _, line := range c.openssl {
				if !strings.Contains(text, line) {
					t.Errorf("no %q in\n%s", line, text)
				}
			}
		})
	}
	if _, err := csr.Build(nil, csr.Template{Hash: crypto.SHA1}, newKey(t)); !errors.Is(err, csr.ErrSignature) {
		t.Errorf("SHA-1: got %v", err)
	}
}

// What an attribute says is what OpenSSL finds in the request, and nothing is said twice.
func TestRequestAttributes(t *testing.T) {
	unstructured := valued(t, "1.2.840.113549.1.9.2", append([]byte{0x13, 7}, "pump 17"...))
	applied, outcome, err := want(t, csr.WantChallengePassword(), unstructured, valued(t, "2.5.4.5", []byte{0x13, 2, '4', '2'}), valued(t, "2.999.1", []byte{5, 0})).
		Apply(csr.Template{RawSubject: subject(t, "CN=dev"), ChallengePassword: "linked"}, nil)
	if err != nil || !slices.Equal(outcome.Ignored, []string{"2.999.1"}) {
		t.Fatalf("%+v, %v", outcome, err)
	}
	der := build(t, applied, newKey(t))
	text := judge(t, der, "req", "-inform", "DER", "-noout", "-text", "-verify")
	for _, line := range []string{"unstructuredName         :pump 17", "serialNumber             :42", "challengePassword        :linked"} {
		if !strings.Contains(text, line) {
			t.Errorf("no %q in\n%s", line, text)
		}
	}
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		attributes csr.Attributes
		want       bool
	}{
		"these": {applied.Attributes, true}, "in another order": {csr.Attributes{applied.Attributes[1], applied.Attributes[0]}, true},
		"one": {csr.Attributes{unstructured}, false}, "none": {nil, false},
		"another value": {csr.Attributes{valued(t, "1.2.840.113549.1.9.2", []byte{0x13, 1, 'x'}), applied.Attributes[1]}, false},
	} {
		other := applied
		other.Attributes = c.attributes
		if same, err := other.Describes(request); err != nil || same != c.want {
			t.Errorf("%s: Describes: %t, %v", name, same, err)
		}
	}
	for _, wrong := range []csr.Attribute{csr.WantChallengePassword(), {Type: unstructured.Type}, valued(t, "1.2.840.113549.1.9.14", []byte{0x30, 0})} {
		if _, err := csr.Build(nil, csr.Template{Attributes: csr.Attributes{wrong}}, newKey(t)); err == nil {
			t.Errorf("%s was built", wrong.Type)
		}
	}
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
	address, err := csr.ParseSAN("IP:192.0.2.1")
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
		wanted.Describe()
		applied, _, err := wanted.Apply(csr.Template{SANs: []csr.SAN{address}}, known)
		if err != nil {
			return
		}
		if _, err := applied.Extensions(); err != nil {
			t.Errorf("%x: %v", der, err)
		}
	})
}
