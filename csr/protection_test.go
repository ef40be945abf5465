package csr_test

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"estenroll/csr"
)

// protections as they are written for an encoder that is not ours: "openssl asn1parse
// -genconf" (RFC 7030 §4.4.1.1, §4.4.1.2; RFC 4108 §2.2.5; RFC 8551 §2.5.2).
const (
	protectionHead = `
asn1 = IMPLICIT:0,SET:attributes
[attributes]
key = SEQUENCE:key
capabilities = SEQUENCE:capabilities
[capabilities]
oid = OID:1.2.840.113549.1.9.15
values = SET:values
[values]
value = SEQUENCE:list
[list]
aes256 = SEQUENCE:aes256
aes192 = SEQUENCE:aes192
aes128 = SEQUENCE:aes128
`
	protectionCiphers = `
[ids]
id = FORMAT:HEX,OCTETSTRING:CAFE01
[aes256]
oid = OID:2.16.840.1.101.3.4.1.42
[aes192]
oid = OID:2.16.840.1.101.3.4.1.22
[aes128]
oid = OID:2.16.840.1.101.3.4.1.2
[key]
oid = OID:1.2.840.113549.1.9.16.2.`
	asymmetricKey = protectionCiphers + "54\nvalues = SET:ids\n"
	symmetricKey  = protectionCiphers + "37\nvalues = SET:ids\n"
	oaepListed    = "oaep = SEQUENCE:oaep\n"
	oaep          = "[oaep]\noid = OID:1.2.840.113549.1.1.7\nparameters = SEQUENCE:none\n[none]\n"
	pkcs1Listed   = "rsa = SEQUENCE:rsa\n"
	pkcs1         = "[rsa]\noid = OID:1.2.840.113549.1.1.1\n"
)

func wrapOf(oid string) (listed, section string) {
	return "wrap = SEQUENCE:wrap\n", "[wrap]\noid = OID:2.16.840.1.101.3.4.1." + oid + "\n"
}

// The attributes are byte for byte what OpenSSL encodes, OpenSSL verifies the request,
// and what is read of it is what was asked for.
func TestProtection(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 7030 §4.4.1 (1)")
	t.Attr("shows", "RFC 7030 §4.4.1 (2)")
	t.Attr("shows", "RFC 7030 §4.4.1.1 (1)")
	t.Attr("shows", "RFC 7030 §4.4.1.2 (1)")
	id := []byte{0xca, 0xfe, 1}
	listed128, wrap128 := wrapOf("5")
	listed192, wrap192 := wrapOf("25")
	listed256, wrap256 := wrapOf("45")
	for name, c := range map[string]struct {
		protection csr.KeyProtection
		config     string
	}{
		"an RSA key":         {csr.KeyProtection{ID: id, OAEP: true, PKCS1v15: true}, protectionHead + oaepListed + pkcs1Listed + asymmetricKey + oaep + pkcs1},
		"RSA, PKCS #1 alone": {csr.KeyProtection{ID: id, PKCS1v15: true}, protectionHead + pkcs1Listed + asymmetricKey + pkcs1},
		"RSA, OAEP alone":    {csr.KeyProtection{ID: id, OAEP: true}, protectionHead + oaepListed + asymmetricKey + oaep},
		"an AES-128 key":     {csr.KeyProtection{ID: id, KEK: 16}, protectionHead + listed128 + symmetricKey + wrap128},
		"an AES-192 key":     {csr.KeyProtection{ID: id, KEK: 24}, protectionHead + listed192 + symmetricKey + wrap192},
		"an AES-256 key":     {csr.KeyProtection{ID: id, KEK: 32}, protectionHead + listed256 + symmetricKey + wrap256},
	} {
		der := build(t, csr.Template{Protection: &c.protection}, newKey(t))
		judge(t, der, "req", "-inform", "DER", "-verify", "-noout")
		dir := t.TempDir()
		config := filepath.Join(dir, "config")
		if err := os.WriteFile(config, []byte(c.config), 0o600); err != nil {
			t.Fatal(err)
		}
		judge(t, nil, "asn1parse", "-genconf", config, "-noout", "-out", filepath.Join(dir, "want.der"))
		want, err := os.ReadFile(filepath.Join(dir, "want.der"))
		if err != nil {
			t.Fatal(err)
		}
		request, err := x509.ParseCertificateRequest(der)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasSuffix(request.RawTBSCertificateRequest, want) {
			t.Errorf("%s: got %x\nwant %x at the end", name, request.RawTBSCertificateRequest, want)
		}
		got, err := csr.RequestedProtection(request)
		if err != nil || got == nil || !reflect.DeepEqual(*got, c.protection) {
			t.Errorf("%s: read as %+v, %v", name, got, err)
		}
	}
}

// A request for one decryption key is not one for another: it is made anew.
func TestDescribesProtection(t *testing.T) {
	t.Parallel()
	asked := csr.KeyProtection{ID: []byte{1}, OAEP: true}
	other, both := asked, asked
	other.ID, both.PKCS1v15 = []byte{2}, true
	request, err := x509.ParseCertificateRequest(build(t, csr.Template{Protection: &asked}, newKey(t)))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		protection *csr.KeyProtection
		want       bool
	}{
		"the same": {&asked, true}, "none": {nil, false}, "another key": {&other, false}, "another padding too": {&both, false}, "an AES key": {&csr.KeyProtection{ID: []byte{1}, KEK: 16}, false},
	} {
		if got, err := (csr.Template{Protection: c.protection}).Describes(request); err != nil || got != c.want {
			t.Errorf("%s: got %t, %v", name, got, err)
		}
	}
}

// A request without the attributes asks for nothing, one with half of them is wrong: the
// client "MUST also include an SMIMECapabilities attribute" (RFC 7030 §4.4.1).
func TestRequestedProtection(t *testing.T) {
	t.Parallel()
	oid := func(last ...int) asn1.ObjectIdentifier {
		return append(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9}, last...)
	}
	attribute := func(oid asn1.ObjectIdentifier, values ...any) []byte {
		t.Helper()
		var set []asn1.RawValue
		for _, value := range values {
			der, err := asn1.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			set = append(set, asn1.RawValue{FullBytes: der})
		}
		der, err := asn1.Marshal(struct {
			Type   asn1.ObjectIdentifier
			Values []asn1.RawValue `asn1:"set"`
		}{oid, set})
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	type capability struct{ ID asn1.ObjectIdentifier }
	rsa := attribute(oid(15), []capability{{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}}})
	symmetric, asymmetric := attribute(oid(16, 2, 37), []byte{1}), attribute(oid(16, 2, 54), []byte{1})
	for name, c := range map[string]struct {
		attributes [][]byte
		text       string
	}{
		"nothing":                       {nil, ""},
		"capabilities alone":            {[][]byte{rsa}, ""},
		"no capabilities":               {[][]byte{asymmetric}, "no capability"},
		"capabilities of another kind":  {[][]byte{symmetric, rsa}, "no capability"},
		"two keys":                      {[][]byte{symmetric, asymmetric, rsa}, "two decryption keys"},
		"two identifiers":               {[][]byte{attribute(oid(16, 2, 54), []byte{1}, []byte{2}), rsa}, "without one value"},
		"an identifier that is no text": {[][]byte{attribute(oid(16, 2, 54), 1), rsa}, "structure error"},
	} {
		info, err := asn1.Marshal(struct {
			Version      int
			Subject, Key struct{}
			Attributes   asn1.RawValue
		}{Attributes: asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: bytes.Join(c.attributes, nil)}})
		if err != nil {
			t.Fatal(err)
		}
		got, err := csr.RequestedProtection(&x509.CertificateRequest{RawTBSCertificateRequest: info})
		if got != nil || (err == nil) != (c.text == "") || err != nil && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: got %+v, %v, want %q", name, got, err, c.text)
		}
	}
	for name, protection := range map[string]csr.KeyProtection{
		"no identifier": {KEK: 32}, "an AES key of 17 bytes": {ID: []byte{1}, KEK: 17}, "an RSA key that decrypts nothing": {ID: []byte{1}},
	} {
		if _, err := csr.Build(nil, csr.Template{Protection: &protection}, newKey(t)); err == nil || !strings.Contains(err.Error(), "protection of the key") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
