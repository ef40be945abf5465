package csr_test

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll/csr"
)

// What is asked for is what OpenSSL reads in the request.
func TestUsages(t *testing.T) {
	for _, c := range []struct {
		keyUsage, extKeyUsage []string
		openssl               []string
		bits                  string // DER of the BIT STRING
	}{
		{[]string{"digitalSignature"}, nil, []string{"X509v3 Key Usage: critical\n                    Digital Signature\n"}, "03020780"},
		{[]string{"nonRepudiation", "keyencipherment, dataEncipherment"}, nil,
			[]string{"X509v3 Key Usage: critical\n                    Non Repudiation, Key Encipherment, Data Encipherment\n"}, "03020470"},
		{[]string{"contentCommitment,keyAgreement,encipherOnly"}, nil, []string{"Non Repudiation, Key Agreement, Encipher Only\n"}, "03020049"},
		{[]string{"keyAgreement", "decipherOnly"}, nil, []string{"Key Agreement, Decipher Only\n"}, "0303070880"},
		{nil, []string{"clientAuth"}, []string{"X509v3 Extended Key Usage: \n                    TLS Web Client Authentication\n"}, ""},
		{[]string{"digitalSignature,keyAgreement"}, []string{"serverAuth,CLIENTAUTH", "codeSigning,emailProtection,timeStamping,OCSPSigning", "1.3.6.1.4.1.32473.1", "anyExtendedKeyUsage"},
			[]string{"Digital Signature, Key Agreement\n", "TLS Web Server Authentication, TLS Web Client Authentication, Code Signing, E-mail Protection, Time Stamping, OCSP Signing, 1.3.6.1.4.1.32473.1, Any Extended Key Usage\n"}, "03020388"},
	} {
		t.Run(fmt.Sprint(c.keyUsage, c.extKeyUsage), func(t *testing.T) {
			template := csr.Template{RawSubject: mustSubject(t, "CN=dev")}
			var err error
			if template.KeyUsage, err = csr.ParseKeyUsage(c.keyUsage); err != nil {
				t.Fatal(err)
			}
			if template.ExtKeyUsage, err = csr.ParseExtKeyUsage(c.extKeyUsage); err != nil {
				t.Fatal(err)
			}
			got := judge(t, build(t, template, newKey(t)), "req", "-inform", "DER", "-noout", "-text", "-verify")
			for _, want := range append(c.openssl, "verify OK") {
				if !strings.Contains(got, want) {
					t.Errorf("openssl: no %q in %s", want, got)
				}
			}
			for header, asked := range map[string]bool{"X509v3 Key Usage": c.keyUsage != nil, "X509v3 Extended Key Usage": c.extKeyUsage != nil} {
				if strings.Contains(got, header) != asked {
					t.Errorf("openssl: %s in it: %t", header, !asked)
				}
			}
			extensions, err := template.Extensions()
			if err != nil || c.bits != "" && hex.EncodeToString(extensions[0].Value) != c.bits {
				t.Errorf("key usage: got %x, %v, want %s", extensions[0].Value, err, c.bits)
			}
		})
	}
	for _, in := range []string{"", "nonsense", "digitalSignature,", "digitalSignature,digitalSignature", "nonRepudiation,contentCommitment", "keyCertSign", "crlsign", "encipherOnly", "decipherOnly,digitalSignature"} {
		if usage, err := csr.ParseKeyUsage([]string{in}); err == nil || !strings.HasPrefix(err.Error(), "key usage: ") {
			t.Errorf("%q: got %b, %v, want an error", in, usage, err)
		}
	}
	for _, in := range []string{"", "nonsense", "clientAuth,", "clientAuth,1.3.6.1.5.5.7.3.2", "1", "1.2.x", "9.9.9", strings.Repeat("1.2.3,", 16) + "1.2.4", oids(17)} {
		if purposes, err := csr.ParseExtKeyUsage([]string{in}); err == nil || !strings.HasPrefix(err.Error(), "extended key usage: ") {
			t.Errorf("%q: got %v, %v, want an error", in, purposes, err)
		}
	}
	if purposes, err := csr.ParseExtKeyUsage([]string{oids(16)}); err != nil || len(purposes) != 16 {
		t.Errorf("16 purposes: got %d, %v", len(purposes), err)
	}
}

func oids(n int) string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("1.2.%d", i)
	}
	return strings.Join(list, ",")
}

func mustSubject(t testing.TB, text string) []byte {
	t.Helper()
	raw, err := csr.ParseSubject(text)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// requested is a CSR of a template, parsed.
func requested(t *testing.T, template csr.Template) *x509.CertificateRequest {
	t.Helper()
	request, err := x509.ParseCertificateRequest(build(t, template, newKey(t)))
	if err != nil {
		t.Fatal(err)
	}
	return request
}

// issued is a certificate with a subject and extensions.
func issued(t *testing.T, rawSubject []byte, extensions ...pkix.Extension) *x509.Certificate {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), RawSubject: rawSubject, ExtraExtensions: extensions, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestMissingUsages(t *testing.T) {
	digitalSignature := x509.KeyUsageDigitalSignature
	clientAuth, serverAuth, own := asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}, asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473, 1}
	everything := asn1.ObjectIdentifier{2, 5, 29, 37, 0}
	for _, c := range []struct {
		name       string
		asked, got csr.Template
		want       []string
	}{
		{name: "nothing asked for", got: csr.Template{KeyUsage: digitalSignature, ExtKeyUsage: []asn1.ObjectIdentifier{clientAuth}}},
		{name: "no extension is every usage", asked: csr.Template{KeyUsage: digitalSignature, ExtKeyUsage: []asn1.ObjectIdentifier{clientAuth}}},
		{name: "as asked for, and more", asked: csr.Template{KeyUsage: digitalSignature, ExtKeyUsage: []asn1.ObjectIdentifier{clientAuth}},
			got: csr.Template{KeyUsage: digitalSignature | x509.KeyUsageKeyAgreement, ExtKeyUsage: []asn1.ObjectIdentifier{serverAuth, clientAuth}}},
		{name: "any purpose", asked: csr.Template{ExtKeyUsage: []asn1.ObjectIdentifier{clientAuth, own}}, got: csr.Template{ExtKeyUsage: []asn1.ObjectIdentifier{everything}}},
		{name: "some are missing", asked: csr.Template{KeyUsage: digitalSignature | x509.KeyUsageKeyAgreement | x509.KeyUsageDecipherOnly, ExtKeyUsage: []asn1.ObjectIdentifier{clientAuth, own, serverAuth}},
			got: csr.Template{KeyUsage: digitalSignature, ExtKeyUsage: []asn1.ObjectIdentifier{clientAuth}}, want: []string{"keyAgreement", "decipherOnly", "1.3.6.1.4.1.32473.1", "serverAuth"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.asked.RawSubject = mustSubject(t, "CN=dev")
			extensions, err := c.got.Extensions()
			if err != nil {
				t.Fatal(err)
			}
			if got := csr.MissingUsages(requested(t, c.asked), issued(t, c.asked.RawSubject, extensions...)); !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
