package est_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"estenroll/est"
)

// The answer of RFC 9148, appendix A.3, is its key and its certificate, in this
// order, and comes out byte for byte of them; the certificate is for the key.
func TestServerKeyVector(t *testing.T) {
	t.Attr("shows", "RFC 9148 §4.8 (1)")
	data, key, cert := vector(t, "skg-response-62.cbor"), vector(t, "skg-key-284.der"), vector(t, "skg-cert-281.der")
	parts, err := est.ParseMultipartCore(data)
	if err != nil {
		t.Fatal(err)
	}
	want := []est.Part{{ContentFormat: est.ContentFormatPKCS8, Body: key}, {ContentFormat: est.ContentFormatPKCS7CertsOnly, Body: cert}}
	if diff := cmp.Diff(want, parts); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if again, err := est.MarshalMultipartCore(parts); err != nil || !bytes.Equal(again, data) {
		t.Errorf("got %x, %v", again, err)
	}
	for _, order := range [][]est.Part{parts, {parts[1], parts[0]}, {{ContentFormat: 0}, parts[0], parts[1]}} {
		got, err := est.ParseServerKey(clone(order), nil)
		if err != nil {
			t.Fatal(err)
		}
		public, err := got.Public()
		if err != nil {
			t.Fatal(err)
		}
		if len(got.Certificates) != 1 || !public.(*ecdsa.PublicKey).Equal(got.Certificates[0].PublicKey) || !bytes.Equal(got.PKCS8, key) {
			t.Errorf("got %+v", got)
		}
		got.Clear()
		if !bytes.Equal(got.PKCS8, make([]byte, len(key))) {
			t.Error("the key is still there")
		}
	}
}

func clone(parts []est.Part) []est.Part {
	cloned := slices.Clone(parts)
	for i := range cloned {
		cloned[i].Body = bytes.Clone(cloned[i].Body)
	}
	return cloned
}

func TestParseServerKeyRefused(t *testing.T) {
	key := est.Part{ContentFormat: est.ContentFormatPKCS8, Body: vector(t, "skg-key-284.der")}
	cert := est.Part{ContentFormat: est.ContentFormatPKCS7CertsOnly, Body: vector(t, "skg-cert-281.der")}
	enveloped := est.Part{ContentFormat: est.ContentFormatPKCS7ServerKey, Body: []byte{0x30, 0}}
	for name, c := range map[string]struct {
		parts []est.Part
		is    error
		text  string
	}{
		"nothing":              {nil, nil, "no key"},
		"no key":               {[]est.Part{cert}, nil, "no key"},
		"no certificate":       {[]est.Part{key}, est.ErrNoCertificate, ""},
		"two keys":             {[]est.Part{key, cert, key}, nil, "two keys"},
		"two certificates":     {[]est.Part{cert, cert, key}, nil, "two answers"},
		"an encrypted key":     {[]est.Part{enveloped, cert}, est.ErrKeyEnveloped, ""},
		"garbage certificates": {[]est.Part{key, {ContentFormat: est.ContentFormatPKIXCert, Body: []byte{1}}}, nil, "certificate:"},
	} {
		parts := clone(c.parts)
		_, err := est.ParseServerKey(parts, nil)
		if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: got %v", name, err)
		}
		for _, part := range parts {
			if !bytes.Equal(part.Body, make([]byte, len(part.Body))) {
				t.Errorf("%s: a body of content-format %d is still there", name, part.ContentFormat)
			}
		}
	}
}

// With a decryption key one in the clear is none.
func TestParseServerKeyInTheClear(t *testing.T) {
	parts := clone([]est.Part{{ContentFormat: est.ContentFormatPKCS8, Body: vector(t, "skg-key-284.der")}, {ContentFormat: est.ContentFormatPKCS7CertsOnly, Body: vector(t, "skg-cert-281.der")}})
	if got, err := est.ParseServerKey(parts, new(est.DecryptionKey)); !errors.Is(err, est.ErrKeyNotEnveloped) || got != nil {
		t.Errorf("got %v, %v", got, err)
	}
	if !bytes.Equal(parts[0].Body, make([]byte, len(parts[0].Body))) {
		t.Error("the key is still there")
	}
}

// Keys that can be certified have a public key; of others nothing is shown.
func TestServerKeyPublic(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ key, public any }{{rsaKey, &rsaKey.PublicKey}, {ecKey, &ecKey.PublicKey}, {edKey, nil}} {
		der, err := x509.MarshalPKCS8PrivateKey(c.key)
		if err != nil {
			t.Fatal(err)
		}
		got, err := (&est.ServerKey{PKCS8: der}).Public()
		if c.public == nil {
			if err == nil {
				t.Errorf("%T: got %v", c.key, got)
			}
			continue
		}
		if err != nil || !c.public.(interface{ Equal(crypto.PublicKey) bool }).Equal(got) {
			t.Errorf("%T: got %v, %v", c.key, got, err)
		}
		again, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil || !again.(interface{ Equal(crypto.PrivateKey) bool }).Equal(c.key) {
			t.Errorf("%T: the DER has changed: %v", c.key, err)
		}
	}
	whole := vector(t, "skg-key-284.der")
	if _, err := (&est.ServerKey{PKCS8: append(whole, 0)}).Public(); err == nil || err.Error() != "PKCS#8: bytes after its end" {
		t.Errorf("got %v", err)
	}
	secret := []byte("not a key but a secret")
	if _, err := (&est.ServerKey{PKCS8: secret}).Public(); err == nil || err.Error() != "PKCS#8: not a private key" {
		t.Errorf("got %v", err)
	}
}

func TestParseMultipartCore(t *testing.T) {
	for name, c := range map[string]struct {
		data string // hexadecimal
		want []est.Part
		text string // of the error
	}{
		"empty":                 {"80", nil, ""},
		"no representation":     {"8219011cf6", nil, ""},
		"an indefinite array":   {"9f190119412aff", []est.Part{{ContentFormat: 281, Body: []byte{0x2a}}}, ""},
		"a long type":           {"821b0000000000000119412a", []est.Part{{ContentFormat: 281, Body: []byte{0x2a}}}, ""},
		"nothing":               {"", nil, "EOF"},
		"a map":                 {"a119011c40", nil, "cannot unmarshal map"},
		"odd":                   {"8119011c", nil, "1 elements"},
		"a type of text":        {"82613140", nil, "no content-format"},
		"a type of -1":          {"822040", nil, "no content-format"},
		"a type of 1.0":         {"82f93c0040", nil, "no content-format"},
		"a type too large":      {"821a0001000040", nil, "no content-format"},
		"a body of text":        {"8219011c6161", nil, "no byte string"},
		"a body of numbers":     {"8219011c820102", nil, "no byte string"},
		"a body that is tagged": {"8219011cc24101", nil, "tag"},
		"trailing":              {"8000", nil, "extraneous"},
		"cut":                   {"8219011c42ff", nil, "EOF"},
		"a long array":          {"9822" + strings.Repeat("0040", 17), nil, "exceeded max number of elements"},
		"too large":             {strings.Repeat("00", 64<<10+1), nil, "65537 bytes"},
	} {
		data, err := hex.DecodeString(c.data)
		if err != nil {
			t.Fatal(err)
		}
		got, err := est.ParseMultipartCore(data)
		if c.text == "" && err != nil || c.text != "" && (err == nil || !strings.HasPrefix(err.Error(), "multipart-core: ") || !strings.Contains(err.Error(), c.text)) {
			t.Errorf("%s: got %v, want %q", name, err, c.text)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
	}
}

// mixed is an answer of serverkeygen over HTTPS.
func mixed(boundary string, parts ...string) []byte {
	var body strings.Builder
	body.WriteString("a preamble\r\n")
	for _, part := range parts {
		fmt.Fprintf(&body, "--%s\r\n%s\r\n", boundary, part)
	}
	fmt.Fprintf(&body, "--%s--\r\nan epilogue\r\n", boundary)
	return []byte(body.String())
}

// Any boundary, any order, any line breaks, with and without headers that say what
// is known (RFC 7030 §4.4.2, RFC 8951 §3.1).
func TestParseMultipartMixed(t *testing.T) {
	t.Attr("shows", "RFC 8951 §3 (2)")
	key, cert := vector(t, "skg-key-284.der"), vector(t, "skg-cert-281.der")
	text := base64.StdEncoding.EncodeToString
	lines := func(der []byte) string {
		var out strings.Builder
		for i, c := range text(der) {
			if i > 0 && i%64 == 0 {
				out.WriteString("\r\n")
			}
			out.WriteRune(c)
		}
		return out.String() + "\r\n"
	}
	keyPart := "Content-Type: application/pkcs8\r\nContent-Transfer-Encoding: base64\r\n\r\n" + lines(key)
	certPart := "Content-Type: application/pkcs7-mime; smime-type=certs-only\r\nContent-Transfer-Encoding: base64\r\n\r\n" + lines(cert)
	want := []est.Part{{ContentFormat: est.ContentFormatPKCS8, Body: key}, {ContentFormat: est.ContentFormatPKCS7CertsOnly, Body: cert}}
	for name, c := range map[string]struct {
		boundary string
		parts    []string
		want     []est.Part
	}{
		"usual":             {"estServerKeyBoundary", []string{keyPart, certPart}, want},
		"the other order":   {"b", []string{certPart, keyPart}, []est.Part{want[1], want[0]}},
		"an odd boundary":   {"=_'()+,-./:=? 7", []string{keyPart, certPart}, want},
		"one line, no more": {"b", []string{"Content-Type: application/pkcs8\r\n\r\n" + text(key), "Content-Type: application/pkcs7-mime\r\n\r\n" + text(cert)}, want},
		"others beside":     {"b", []string{keyPart, "Content-Type: text/plain\r\n\r\nhello!", "\r\nno type", certPart}, want},
		"an encrypted key":  {"b", []string{"Content-Type: application/pkcs7-mime; smime-type=server-generated-key\r\n\r\nMAA="}, []est.Part{{ContentFormat: est.ContentFormatPKCS7ServerKey, Body: []byte{0x30, 0}}}},
		"a lying encoding":  {"b", []string{"Content-Type: application/pkcs8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + text(key)}, want[:1]},
	} {
		got, err := est.ParseMultipartMixed(mixed(c.boundary, c.parts...), c.boundary)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
	}
	for name, c := range map[string]struct {
		body     []byte
		boundary string
	}{
		"no boundary":         {mixed("b", keyPart), ""},
		"another boundary":    {mixed("b", keyPart), "c"},
		"none of EST":         {mixed("b", "Content-Type: text/plain\r\n\r\nhello!"), "b"},
		"a long boundary":     {mixed("b", keyPart), strings.Repeat("b", 71)},
		"no end":              {[]byte("--b\r\nContent-Type: application/pkcs8\r\n\r\nMAA="), "b"},
		"no base64":           {mixed("b", "Content-Type: application/pkcs8\r\n\r\nM*A="), "b"},
		"too many parts":      {mixed("b", slices.Repeat([]string{"\r\n"}, 17)...), "b"},
		"too large":           {make([]byte, 128<<10+1), "b"},
		"a key as a header":   {mixed("b", "Content-Type: application/pkcs8\r\n"+text(key)), "b"},
		"a key as a boundary": {[]byte("--b\r\n\r\n\r\n--b " + text(key) + "\r\n--b--"), "b"},
		"headers without end": {[]byte("--b\r\n" + strings.Repeat("A: b\r\n", 20000)), "b"},
	} {
		if got, err := est.ParseMultipartMixed(c.body, c.boundary); err == nil {
			t.Errorf("%s: got %v", name, got)
		} else if !strings.HasPrefix(err.Error(), "multipart/mixed: ") || strings.Contains(err.Error(), text(key)[:8]) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func FuzzParseMultipartCore(f *testing.F) {
	f.Add(vector(f, "skg-response-62.cbor"))
	for _, seed := range []string{"80", "8219011cf6", "9f190119412aff", "8219011c820102"} {
		data, err := hex.DecodeString(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		parts, err := est.ParseMultipartCore(data)
		if err != nil {
			return
		}
		encoded, err := est.MarshalMultipartCore(parts)
		if err != nil {
			t.Fatal(err)
		}
		again, err := est.ParseMultipartCore(encoded)
		if err != nil || !cmp.Equal(again, parts) {
			t.Errorf("%x: %v, then %v (%v)", data, parts, again, err)
		}
		readKey(parts)
	})
}

func FuzzParseMultipartMixed(f *testing.F) {
	key := base64.StdEncoding.EncodeToString(vector(f, "skg-key-284.der"))
	cert := base64.StdEncoding.EncodeToString(vector(f, "skg-cert-281.der"))
	f.Add(mixed("b", "Content-Type: application/pkcs8\r\n\r\n"+key, "Content-Type: application/pkcs7-mime; smime-type=certs-only\r\n\r\n"+cert), "b")
	f.Add(mixed("=_?", "Content-Type: application/pkcs7-mime; smime-type=server-generated-key\r\n\r\nMAA="), "=_?")
	f.Fuzz(func(t *testing.T, body []byte, boundary string) {
		parts, err := est.ParseMultipartMixed(body, boundary)
		if err == nil {
			readKey(parts)
		}
	})
}

// FuzzParseBody: what is taken of a body is what would be encoded, and no larger.
func FuzzParseBody(f *testing.F) {
	for _, contentType := range []string{"application/pkcs8", "application/pkcs7-mime; smime-type=certs-only", "multipart/mixed; boundary=b", "text/html", "!/"} {
		for _, seed := range []string{"", "QUJD", "QU JD\r\nRA==", "QUJDRA", "not base64", "=", "\x00", "--b\r\nContent-Type: application/pkcs8\r\n\r\nMAA=\r\n--b--"} {
			f.Add(contentType, []byte(seed))
		}
	}
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		got, err := est.ParseBody(contentType, body)
		if err != nil {
			return
		}
		for _, part := range append(got.Parts, est.Part{ContentFormat: got.ContentFormat, Body: got.Body}) {
			if len(part.Body) > len(body) {
				t.Errorf("%d bytes of %d", len(part.Body), len(body))
			}
			again, err := est.DecodeBase64([]byte(base64.StdEncoding.EncodeToString(part.Body)))
			if err != nil || !bytes.Equal(again, part.Body) {
				t.Errorf("%x comes back as %x, %v", part.Body, again, err)
			}
		}
	})
}

// readKey does all that is done with the parts of an answer.
func readKey(parts []est.Part) {
	if key, err := est.ParseServerKey(parts, nil); err == nil {
		_, _ = key.Public()
		key.Clear()
	}
}

// What a session gives is a key and its certificates, taken apart by it or not; what
// is refused, and what is done with, is not left in memory.
func TestClientServerKeyGen(t *testing.T) {
	whole := vector(t, "skg-response-62.cbor")
	parts, err := est.ParseMultipartCore(whole)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		response est.Response
		text     string
	}{
		"multipart-core":   {est.Response{ContentFormat: est.ContentFormatMultipartCore, Body: bytes.Clone(whole)}, ""},
		"multipart/mixed":  {est.Response{Parts: clone(parts)}, ""},
		"another format":   {est.Response{ContentFormat: est.ContentFormatPKCS8, Body: bytes.Clone(parts[0].Body)}, "content-format 284, want 62"},
		"no certificate":   {est.Response{Parts: clone(parts[:1])}, "no certificate"},
		"garbage":          {est.Response{ContentFormat: est.ContentFormatMultipartCore, Body: []byte{0xff}}, "multipart-core"},
		"an encrypted key": {est.Response{Parts: []est.Part{{ContentFormat: est.ContentFormatPKCS7ServerKey, Body: []byte{1}}}}, "encrypted"},
	} {
		session := &fake{response: c.response}
		key, err := (&est.Client{Session: session}).ServerKeyGen(t.Context(), []byte("csr"))
		if session.got.Operation != est.ServerKeyGen || string(session.got.Body) != "csr" {
			t.Errorf("%s: sent %+v", name, session.got)
		}
		var response *est.ResponseError
		switch {
		case c.text == "" && (err != nil || !bytes.Equal(key.PKCS8, parts[0].Body) || len(key.Certificates) != 1):
			t.Errorf("%s: got %+v, %v", name, key, err)
		case c.text != "" && (!errors.As(err, &response) || !strings.Contains(err.Error(), c.text)):
			t.Errorf("%s: got %v, want %q", name, err, c.text)
		}
		if !bytes.Equal(c.response.Body, make([]byte, len(c.response.Body))) {
			t.Errorf("%s: the body is still there", name)
		}
		if c.text == "" {
			key.Clear()
		}
		for _, part := range c.response.Parts {
			if part.ContentFormat == est.ContentFormatPKCS8 && !bytes.Equal(part.Body, make([]byte, len(part.Body))) {
				t.Errorf("%s: the key is still there", name)
			}
		}
	}
	(*est.ServerKey)(nil).Clear() // of an answer without one
}

// byOperation is a session whose server has some operations only.
type byOperation struct {
	est.Session
	answers map[est.Operation]error // nil for success
	asked   []est.Operation
}

func (s *byOperation) RoundTrip(_ context.Context, req *est.Request) (*est.Response, error) {
	s.asked = append(s.asked, req.Operation)
	err, has := s.answers[req.Operation]
	switch {
	case !has:
		return nil, &est.StatusError{Operation: req.Operation, Class: 4, NotFound: true}
	case err != nil:
		return nil, err
	}
	return &est.Response{}, nil
}

// Only a server that has no skg is asked for skc, and only where the transport has that.
func TestClientServerKeyGenOrCert(t *testing.T) {
	for name, c := range map[string]struct {
		answers map[est.Operation]error
		asked   int
		from    est.Operation // of what is returned
	}{
		"skg":            {map[est.Operation]error{est.ServerKeyGen: nil, est.ServerKeyGenCert: nil}, 1, est.ServerKeyGen},
		"skc alone":      {map[est.Operation]error{est.ServerKeyGenCert: nil}, 2, est.ServerKeyGenCert},
		"neither":        {nil, 2, est.ServerKeyGen},
		"no skg, no skc": {map[est.Operation]error{est.ServerKeyGenCert: errors.ErrUnsupported}, 2, est.ServerKeyGen},
		"skg says no":    {map[est.Operation]error{est.ServerKeyGen: &est.StatusError{Operation: est.ServerKeyGen, Class: 4}, est.ServerKeyGenCert: nil}, 1, est.ServerKeyGen},
		"skc says no":    {map[est.Operation]error{est.ServerKeyGenCert: &est.StatusError{Operation: est.ServerKeyGenCert, Class: 4}}, 2, est.ServerKeyGenCert},
		"skg comes not":  {map[est.Operation]error{est.ServerKeyGen: &est.StatusError{Operation: est.ServerKeyGen, Class: 5}}, 1, est.ServerKeyGen},
	} {
		session := &byOperation{answers: c.answers}
		_, err := (&est.Client{Session: session}).ServerKeyGen(t.Context(), []byte("csr"))
		var status *est.StatusError
		var response *est.ResponseError
		from := est.Operation("")
		if errors.As(err, &status) {
			from = status.Operation
		} else if errors.As(err, &response) {
			from = response.Operation // the content-format of a success is none
		}
		if from != c.from || len(session.asked) != c.asked {
			t.Errorf("%s: asked %q, got %v, want that of %s", name, session.asked, err, c.from)
		}
	}
}
