package est_test

//lint:file-ignore SA1019 PKCS #1 v1.5 is how servers transport keys (RFC 3370 §4.2.1)

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll/est"
)

// softKEK is a KEK in memory.
type softKEK []byte

// DecryptContent is RFC 3394 §2.2.2, then CBC.
func (k softKEK) DecryptContent(wrapped, iv, ciphertext []byte) ([]byte, error) {
	outer, err := aes.NewCipher(k)
	if err != nil {
		return nil, err
	}
	n := len(wrapped)/8 - 1
	if n < 2 || len(wrapped)%8 != 0 {
		return nil, rsa.ErrDecryption
	}
	out, buffer := bytes.Clone(wrapped), make([]byte, aes.BlockSize)
	for j := 5; j >= 0; j-- {
		for i := n; i >= 1; i-- {
			binary.BigEndian.PutUint64(buffer, binary.BigEndian.Uint64(out)^uint64(n*j+i))
			copy(buffer[8:], out[8*i:8*i+8])
			outer.Decrypt(buffer, buffer)
			copy(out, buffer[:8])
			copy(out[8*i:], buffer[8:])
		}
	}
	if !bytes.Equal(out[:8], bytes.Repeat([]byte{0xa6}, 8)) {
		return nil, rsa.ErrDecryption
	}
	inner, err := aes.NewCipher(out[8:])
	if err != nil {
		return nil, err
	}
	padded := make([]byte, len(ciphertext))
	cipher.NewCBCDecrypter(inner, iv).CryptBlocks(padded, ciphertext)
	return padded, nil
}

// envelopes are what OpenSSL makes of a key, for a key that opens it.
type envelopes struct {
	t     *testing.T
	dir   string
	pkcs8 []byte // the key that is sent
	rsa   *rsa.PrivateKey
	kek   []byte
	ca    *x509.Certificate
}

func newEnvelopes(t *testing.T) *envelopes {
	t.Helper()
	e := &envelopes{t: t, dir: t.TempDir(), kek: bytes.Repeat([]byte{7}, 32)}
	sent, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err == nil {
		e.pkcs8, err = x509.MarshalPKCS8PrivateKey(sent)
	}
	if err == nil {
		e.rsa, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(4), Subject: pkix.Name{CommonName: "decryption"}, SubjectKeyId: []byte{1, 2},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	e.certificate("recipient.pem", template, template, &e.rsa.PublicKey, e.rsa)
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, BasicConstraintsValid: true, IsCA: true,
		NotBefore: template.NotBefore, NotAfter: template.NotAfter,
	}
	e.ca = e.certificate("ca.pem", ca, ca, &caKey.PublicKey, caKey)
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "key generator"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter}
	e.certificate("signer.pem", leaf, e.ca, &signer.PublicKey, caKey)
	signerDER, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		t.Fatal(err)
	}
	e.write("signer.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: signerDER}))
	e.write("key.der", e.pkcs8)
	keyPackage, err := asn1.Marshal([]asn1.RawValue{{FullBytes: e.pkcs8}})
	if err != nil {
		t.Fatal(err)
	}
	e.write("package.der", keyPackage)
	return e
}

func (e *envelopes) certificate(name string, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	e.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		e.t.Fatal(err)
	}
	e.write(name, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		e.t.Fatal(err)
	}
	return cert
}

func (e *envelopes) write(name string, data []byte) {
	e.t.Helper()
	if err := os.WriteFile(filepath.Join(e.dir, name), data, 0o600); err != nil {
		e.t.Fatal(err)
	}
}

// cms runs "openssl cms" in the directory; what it writes is its last argument's.
func (e *envelopes) cms(out string, args ...string) []byte {
	e.t.Helper()
	command := exec.CommandContext(e.t.Context(), "openssl", append(append([]string{"cms", "-binary", "-outform", "DER"}, args...), "-out", out)...)
	command.Dir = e.dir
	if output, err := command.CombinedOutput(); err != nil {
		e.t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, output)
	}
	der, err := os.ReadFile(filepath.Join(e.dir, out))
	if err != nil {
		e.t.Fatal(err)
	}
	return der
}

const keyPackageOID = "2.16.840.1.101.2.1.2.78.5"

// signed is the SignedData of the key package, without its ContentInfo.
func (e *envelopes) signed() string {
	e.t.Helper()
	message := e.cms("signed.der", "-sign", "-nodetach", "-in", "package.der", "-signer", "signer.pem", "-inkey", "signer.key", "-econtent_type", keyPackageOID)
	var info struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"explicit,tag:0"`
	}
	if _, err := asn1.Unmarshal(message, &info); err != nil {
		e.t.Fatal(err)
	}
	e.write("signeddata.der", info.Content.Bytes)
	return "signeddata.der"
}

var kekID = []byte{0xca, 0xfe}

func (e *envelopes) withKEK() est.DecryptionKey {
	return est.DecryptionKey{ID: kekID, KEK: softKEK(e.kek)}
}
func (e *envelopes) withRSA() est.DecryptionKey {
	return est.DecryptionKey{ID: []byte{1, 2}, RSA: e.rsa}
}

// toKEK and toRSA encrypt a file for the two kinds of key.
func (e *envelopes) toKEK(file string, more ...string) []byte {
	return e.cms("enveloped.der", append([]string{"-encrypt", "-in", file, "-secretkey", hex.EncodeToString(e.kek), "-secretkeyid", hex.EncodeToString(kekID)}, more...)...)
}

func (e *envelopes) toRSA(file string, more ...string) []byte {
	return e.cms("enveloped.der", append([]string{"-encrypt", "-in", file, "-recip", "recipient.pem"}, more...)...)
}

// What OpenSSL encrypts is opened, with both kinds of key, whatever the cipher and the
// encoding are, and whatever of RFC 7030 §4.4.2 a server leaves out.
func TestOpenKeyOfOpenSSL(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 9148 §4.8 (2)")
	e := newEnvelopes(t)
	signed := e.signed()
	anchors, err := est.NewTrustAnchors([]*x509.Certificate{e.ca})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		message  []byte
		with     est.DecryptionKey
		unsigned bool
	}{
		"a secret key":                   {e.toKEK(signed, "-aes256"), e.withKEK(), false},
		"a secret key, AES-128":          {e.toKEK(signed, "-aes128"), e.withKEK(), false},
		"a secret key, AES-192":          {e.toKEK(signed, "-aes192"), e.withKEK(), false},
		"a secret key, BER":              {e.toKEK(signed, "-aes256", "-stream"), e.withKEK(), false},
		"a secret key, of another name":  {e.toKEK(signed, "-aes256"), est.DecryptionKey{ID: []byte{9}, KEK: softKEK(e.kek)}, false},
		"RSA":                            {e.toRSA(signed, "-aes256"), e.withRSA(), false},
		"RSA, AES-128, by its key id":    {e.toRSA(signed, "-aes128", "-keyid"), e.withRSA(), false},
		"RSA, AES-192":                   {e.toRSA(signed, "-aes192"), e.withRSA(), false},
		"RSA, BER":                       {e.toRSA(signed, "-aes256", "-stream"), e.withRSA(), false},
		"OAEP":                           {e.toRSA(signed, "-aes256", "-keyopt", "rsa_padding_mode:oaep"), e.withRSA(), false},
		"OAEP, SHA-256":                  {e.toRSA(signed, "-aes256", "-keyopt", "rsa_padding_mode:oaep", "-keyopt", "rsa_oaep_md:sha256"), e.withRSA(), false},
		"OAEP, SHA-256, MGF1 with SHA-1": {e.toRSA(signed, "-aes256", "-keyopt", "rsa_padding_mode:oaep", "-keyopt", "rsa_oaep_md:sha256", "-keyopt", "rsa_mgf1_md:sha1"), e.withRSA(), false},
		"a whole message inside":         {e.toRSA("signed.der", "-aes256"), e.withRSA(), false},
		"a package that is not signed":   {e.toRSA("package.der", "-aes256"), e.withRSA(), true},
		"PKCS#8 as data":                 {e.toKEK("key.der", "-aes256"), e.withKEK(), true},
	} {
		got, err := est.OpenKey(c.message, c.with)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !bytes.Equal(got.PKCS8, e.pkcs8) || !got.Enveloped || (got.Signer == nil) != c.unsigned {
			t.Errorf("%s: got %+v", name, got)
		}
		if err := anchors.VerifySigner(got.Signer, time.Now()); (err != nil) != c.unsigned || c.unsigned && !errors.Is(err, est.ErrNotTrusted) {
			t.Errorf("%s: the signer: %v", name, err)
		}
	}

	// Signed on the outside, as RFC 9148 §4.8 has it.
	e.toKEK("package.der", "-aes256")
	outside := e.cms("outside.der", "-sign", "-nodetach", "-in", "enveloped.der", "-signer", "signer.pem", "-inkey", "signer.key", "-econtent_type", "pkcs7-envelopedData")
	if got, err := est.OpenKey(outside, e.withKEK()); err != nil || !bytes.Equal(got.PKCS8, e.pkcs8) || got.Signer == nil {
		t.Errorf("signed on the outside: got %v, %v", got, err)
	}
	// In it a signature in BER, whose content is in pieces.
	inPieces := e.cms("signed.der", "-sign", "-nodetach", "-stream", "-in", "package.der", "-signer", "signer.pem", "-inkey", "signer.key", "-econtent_type", keyPackageOID)
	if inPieces[1] != 0x80 {
		t.Fatal("OpenSSL does not write BER")
	}
	if got, err := est.OpenKey(e.toRSA("signed.der", "-aes256"), e.withRSA()); err != nil || !bytes.Equal(got.PKCS8, e.pkcs8) || got.Signer == nil {
		t.Errorf("a signature in BER: got %v, %v", got, err)
	}
}

// There is one answer to all that is wrong inside, whatever it is: RFC 3218 §2.3 for
// what a wrong padding must not tell.
func TestOpenKeyTellsNothing(t *testing.T) {
	t.Parallel()
	e := newEnvelopes(t)
	signed := e.signed()
	otherRSA, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	byRSA := e.toRSA(signed, "-aes256")
	byOAEP := e.toRSA(signed, "-aes256", "-keyopt", "rsa_padding_mode:oaep")
	byKEK := e.toKEK(signed, "-aes256")
	e.write("garbage.der", []byte("no key at all, but long enough to be one"))
	data, err := os.ReadFile(filepath.Join(e.dir, signed))
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.ReadFile(filepath.Join(enveloped, "pkcs8.der"))
	if err != nil || len(other) != len(e.pkcs8) {
		t.Fatalf("%d bytes, %v", len(other), err)
	}
	forged := bytes.Replace(data, e.pkcs8, other, 1)
	if bytes.Equal(forged, data) {
		t.Fatal("the key is not where it was")
	}
	retyped := bytes.Replace(data, []byte{0x30, 0x81, 0x9f, 0x06, 0x0a, 0x60, 0x86, 0x48, 0x01, 0x65, 0x02}, []byte{0x30, 0x81, 0x9f, 0x06, 0x0a, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03}, 1)
	if bytes.Equal(retyped, data) {
		t.Fatal("the type is not where it was")
	}
	e.write("retyped.der", retyped)
	e.write("nokey.der", []byte{0x30, 5, 2, 1, 0, 0x30, 0})
	e.write("forged.der", forged)
	e.write("two.der", append([]byte{0x30, 0x82, byte(2 * len(e.pkcs8) >> 8), byte(2 * len(e.pkcs8))}, append(slices.Clone(e.pkcs8), e.pkcs8...)...))
	flipped := func(message []byte, back int) []byte {
		message = bytes.Clone(message)
		message[len(message)-back] ^= 1
		return message
	}
	const want = "enveloped key: the enveloped key cannot be opened: it is for another decryption key, or damaged"
	for name, c := range map[string]struct {
		message []byte
		with    est.DecryptionKey
	}{
		"another RSA key":       {byRSA, est.DecryptionKey{ID: []byte{1, 2}, RSA: otherRSA}},
		"another RSA key, OAEP": {byOAEP, est.DecryptionKey{ID: []byte{1, 2}, RSA: otherRSA}},
		"another secret key":    {byKEK, est.DecryptionKey{ID: kekID, KEK: softKEK(make([]byte, 32))}},
		"a wrong padding":       {flipped(byRSA, 17), e.withRSA()},
		"a wrong padding, KEK":  {flipped(byKEK, 17), e.withKEK()},
		// The ciphertext stands at the end, the key at the beginning of what is in it.
		"a wrong content":           {flipped(byRSA, len(data)-100), e.withRSA()},
		"a wrong encrypted key":     {flipped(byRSA, len(byRSA)-250), e.withRSA()},
		"a wrong signature":         {e.toRSA("forged.der", "-aes256"), e.withRSA()},
		"garbage":                   {e.toRSA("garbage.der", "-aes256"), e.withRSA()},
		"what looks like a key":     {e.toRSA("nokey.der", "-aes256"), e.withRSA()},
		"a type that is not signed": {e.toRSA("retyped.der", "-aes256"), e.withRSA()},
		"garbage, a secret key":     {e.toKEK("garbage.der", "-aes256"), e.withKEK()},
		"two keys":                  {e.toKEK("two.der", "-aes256"), e.withKEK()},
		"an envelope in an envelope": {func() []byte {
			e.toKEK("package.der", "-aes256")
			if err := os.Rename(filepath.Join(e.dir, "enveloped.der"), filepath.Join(e.dir, "inner.der")); err != nil {
				t.Fatal(err)
			}
			return e.toKEK("inner.der", "-aes256")
		}(), e.withKEK()},
	} {
		got, err := est.OpenKey(c.message, c.with)
		if !errors.Is(err, est.ErrKeyNotOpened) || err.Error() != want || got != nil {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
}

// Each byte of the padding counts (RFC 5652 §6.3), whatever stands before it.
func TestOpenKeyPadding(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile(filepath.Join(enveloped, "pkcs8.der"))
	if err != nil || len(content)%aes.BlockSize != 10 {
		t.Fatalf("%d bytes, %v", len(content), err)
	}
	for _, c := range []struct {
		padding string
		good    bool
	}{
		{"\x06\x06\x06\x06\x06\x06", true}, {"\x05\x06\x06\x06\x06\x06", false}, {"\x06\x06\x06\x05\x06\x06", false}, {"\x06\x06\x06\x06\x06\x00", false},
		{strings.Repeat("\x16", 22), false}, {strings.Repeat("\x11", 22), false}, {strings.Repeat("\xff", 6), false},
	} {
		padded := append(bytes.Clone(content), c.padding...)
		got, err := est.OpenKey(envelopeOf(t, padded), est.DecryptionKey{ID: kekID, KEK: paddedKEK(padded)})
		if (err == nil) != c.good || !c.good && !errors.Is(err, est.ErrKeyNotOpened) {
			t.Errorf("%x: got %v, %v", c.padding, got, err)
		}
	}
}

// paddedKEK is a secret key whose content is what it is told, with its padding.
type paddedKEK []byte

func (k paddedKEK) DecryptContent(_, _, _ []byte) ([]byte, error) { return bytes.Clone(k), nil }

// An RSA key is asked for a key of the cipher's length, which it gives whatever the
// padding of PKCS #1 v1.5 is (RFC 3218 §2.3.2).
func TestOpenKeyAsksForASessionKey(t *testing.T) {
	t.Parallel()
	message, err := os.ReadFile(filepath.Join(enveloped, "rsa.der"))
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	key := recordingDecrypter{&rsa.PublicKey{N: big.NewInt(15), E: 3}, &asked}
	if _, err := est.OpenKey(message, est.DecryptionKey{ID: kekID, RSA: key}); !errors.Is(err, est.ErrKeyNotOpened) || asked != 32 {
		t.Errorf("got %v, asked for %d bytes", err, asked)
	}
}

type recordingDecrypter struct {
	public *rsa.PublicKey
	size   *int
}

func (d recordingDecrypter) Public() crypto.PublicKey { return d.public }
func (d recordingDecrypter) Decrypt(_ io.Reader, _ []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	*d.size = opts.(*rsa.PKCS1v15DecryptOptions).SessionKeyLen
	return make([]byte, *d.size), nil
}

// A signer is a trust anchor or leads to one, now.
func TestVerifySigner(t *testing.T) {
	t.Parallel()
	ca, other := newCA(t, nil, "CA"), newCA(t, nil, "CA")
	signer := []*x509.Certificate{issue(t, ca, "key generator", newKey(t), nil)}
	for name, c := range map[string]struct {
		anchor *authority
		chain  []*x509.Certificate
		now    time.Time
		want   error
	}{
		"under an anchor":   {ca, signer, epoch, nil},
		"the anchor itself": {ca, []*x509.Certificate{ca.cert}, epoch, nil},
		"nobody":            {ca, nil, epoch, est.ErrNotTrusted},
		"under another":     {other, signer, epoch, est.ErrNotTrusted},
		"expired":           {ca, signer, epoch.Add(2 * time.Hour), est.ErrNotValidNow},
		"an expired anchor": {ca, []*x509.Certificate{ca.cert}, epoch.Add(2 * time.Hour), est.ErrNotValidNow},
		"one not yet begun": {ca, []*x509.Certificate{ca.cert}, epoch.Add(-2 * time.Hour), est.ErrNotValidNow},
	} {
		if err := anchors(t, c.anchor.cert).VerifySigner(c.chain, c.now); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

// What is wrong outside is said: nothing of it depends on a secret.
func TestOpenKeyRefused(t *testing.T) {
	t.Parallel()
	e := newEnvelopes(t)
	signed := e.signed()
	broken := est.DecryptionKey{ID: []byte{1, 2}, RSA: brokenDecrypter{e.rsa}}
	for name, c := range map[string]struct {
		message []byte
		with    est.DecryptionKey
		text    string
	}{
		"nothing":                 {nil, e.withKEK(), "not BER"},
		"too long":                {make([]byte, 64<<10+1), e.withKEK(), "65537 bytes, more than 65536"},
		"too deep":                {bytes.Repeat([]byte{0x30, 0x80}, 40), e.withKEK(), "nested deeper than 32"},
		"without an end":          {bytes.Repeat([]byte{0x30, 0x80}, 4), e.withKEK(), "not BER"},
		"no message":              {[]byte{0x30, 0}, e.withKEK(), "not a CMS message"},
		"only signed":             {e.cms("plain.der", "-sign", "-nodetach", "-in", "package.der", "-signer", "signer.pem", "-inkey", "signer.key", "-econtent_type", keyPackageOID), e.withKEK(), "nothing in it is encrypted"},
		"for a secret key":        {e.toKEK(signed, "-aes256"), e.withRSA(), "it is not encrypted for an RSA key"},
		"for an RSA key":          {e.toRSA(signed, "-aes256"), e.withKEK(), "it is not encrypted for a secret key"},
		"for two RSA keys":        {e.toRSA(signed, "-aes256", "-recip", "recipient.pem"), e.withRSA(), "of its 2 recipients 0 are named"},
		"for 17 RSA keys":         {e.toRSA(signed, append([]string{"-aes256"}, slices.Repeat([]string{"-recip", "recipient.pem"}, 16)...)...), e.withRSA(), "17 recipients, more than 16"},
		"another cipher":          {e.toRSA(signed, "-des3"), e.withRSA(), "content encryption 1.2.840.113549.3.7 is not supported"},
		"a token that is gone":    {e.toRSA(signed, "-aes256"), broken, "the device is gone"},
		"something after its end": {append(e.toKEK(signed, "-aes256"), 0), e.withKEK(), "1 bytes after the end"},
	} {
		got, err := est.OpenKey(c.message, c.with)
		if err == nil || errors.Is(err, est.ErrKeyNotOpened) || !strings.Contains(err.Error(), c.text) || got != nil {
			t.Errorf("%s: got %v, %v, want %q", name, got, err, c.text)
		}
	}
}

// brokenDecrypter is a token that fails.
type brokenDecrypter struct{ crypto.Decrypter }

func (brokenDecrypter) Decrypt(_ io.Reader, message []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	return nil, errors.New("the device is gone")
}

// enveloped are messages of OpenSSL's, which testdata/enveloped/README.md makes again.
const enveloped = "../testdata/enveloped"

func envelopedSeeds(f *testing.F) {
	f.Helper()
	seeds, err := filepath.Glob(filepath.Join(enveloped, "*.der"))
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, seed := range seeds {
		data, err := os.ReadFile(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		f.Add(indefinite(data))
	}
}

// fixedDecrypter is an RSA key that gives one key whatever it is given.
type fixedDecrypter struct{ public *rsa.PublicKey }

func (d fixedDecrypter) Public() crypto.PublicKey { return d.public }
func (d fixedDecrypter) Decrypt(_ io.Reader, _ []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	if pkcs1, ok := opts.(*rsa.PKCS1v15DecryptOptions); ok {
		return make([]byte, pkcs1.SessionKeyLen), nil
	}
	return make([]byte, 32), nil
}

// FuzzOpenKey: whatever comes, with either kind of key, is an error or a key.
func FuzzOpenKey(f *testing.F) {
	envelopedSeeds(f)
	keys := []est.DecryptionKey{
		{ID: kekID, KEK: softKEK(bytes.Repeat([]byte{7}, 32))},
		{ID: kekID, RSA: fixedDecrypter{&rsa.PublicKey{N: big.NewInt(15), E: 3}}},
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		for _, with := range keys {
			isKey(t, message, with)
		}
	})
}

// plainKEK is a secret key whose content is what it is told.
type plainKEK []byte

func (k plainKEK) DecryptContent(_, _, _ []byte) ([]byte, error) {
	n := aes.BlockSize - len(k)%aes.BlockSize
	return append(bytes.Clone(k), bytes.Repeat([]byte{byte(n)}, n)...), nil
}

// FuzzOpenKeyContent: whatever is in an envelope is an error or a key.
func FuzzOpenKeyContent(f *testing.F) {
	envelopedSeeds(f)
	f.Fuzz(func(t *testing.T, content []byte) {
		padded, _ := plainKEK(content).DecryptContent(nil, nil, nil)
		isKey(t, envelopeOf(t, padded), est.DecryptionKey{ID: kekID, KEK: plainKEK(content)})
	})
}

// envelopeOf is an EnvelopedData for a secret key (RFC 5652 §6).
func envelopeOf(t testing.TB, ciphertext []byte) []byte {
	t.Helper()
	wrap := pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 45}}
	type kekID struct{ ID []byte }
	type recipient struct {
		Version   int
		KEK       kekID
		Algorithm pkix.AlgorithmIdentifier
		Key       []byte
	}
	r, err := asn1.MarshalWithParams(recipient{4, kekID{[]byte{0xca, 0xfe}}, wrap, make([]byte, 40)}, "tag:2")
	if err != nil {
		t.Fatal(err)
	}
	type encrypted struct {
		Type   asn1.ObjectIdentifier
		Cipher struct {
			Algorithm asn1.ObjectIdentifier
			IV        []byte
		}
		Content []byte `asn1:"tag:0"`
	}
	data := struct {
		Version    int
		Recipients []asn1.RawValue `asn1:"set"`
		Content    encrypted
	}{2, []asn1.RawValue{{FullBytes: r}}, encrypted{Type: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}, Content: ciphertext}}
	data.Content.Cipher.Algorithm, data.Content.Cipher.IV = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}, make([]byte, aes.BlockSize)
	inner, err := asn1.Marshal(data)
	if err != nil {
		t.Fatal(err)
	}
	message, err := asn1.Marshal(struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue
	}{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 3}, asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: inner}})
	if err != nil {
		t.Fatal(err)
	}
	return message
}

func isKey(t *testing.T, message []byte, with est.DecryptionKey) {
	t.Helper()
	key, err := est.OpenKey(message, with)
	if err != nil {
		return
	}
	if _, err := x509.ParsePKCS8PrivateKey(key.PKCS8); err != nil || len(key.PKCS8) > len(message) {
		t.Errorf("%d bytes of %d: %v", len(key.PKCS8), len(message), err)
	}
}

// The fuzz target's envelope is one: its seeds open.
func TestEnvelopeOf(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"signed.der", "package.der", "pkcs8.der"} {
		content, err := os.ReadFile(filepath.Join(enveloped, name))
		if err != nil {
			t.Fatal(err)
		}
		padded, _ := plainKEK(content).DecryptContent(nil, nil, nil)
		if _, err := est.OpenKey(envelopeOf(t, padded), est.DecryptionKey{ID: kekID, KEK: plainKEK(content)}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
