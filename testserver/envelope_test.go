package testserver_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"estenroll/csr"
	"estenroll/est"
	"estenroll/testserver"
)

// protected is a CSR that names a decryption key.
func protected(t *testing.T, protection csr.KeyProtection) []byte {
	t.Helper()
	subject, err := csr.ParseSubject("CN=dev")
	if err != nil {
		t.Fatal(err)
	}
	der, err := csr.Build(nil, csr.Template{RawSubject: subject, Protection: &protection}, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// A key is encrypted for the one that the CSR names, of either kind, at each door, and
// OpenSSL opens it and verifies who signed it (RFC 7030 §4.4.2).
func TestEnvelopedKey(t *testing.T) {
	t.Parallel()
	decryption, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(decryption)
	if err != nil {
		t.Fatal(err)
	}
	secret := func(size int) []byte { return bytes.Repeat([]byte{byte(size)}, size) }
	id := []byte{0xd1}
	for name, door := range doors {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startHTTPS(t, testserver.Config{TLS12: door.tls12, ServerKeyGen: true, EnvelopeKeys: []testserver.EnvelopeKey{
				{ID: id, Public: &decryption.PublicKey}, {ID: id, Secret: secret(16)}, {ID: []byte{0xca}, Secret: secret(24)}, {ID: []byte{0xfe}, Secret: secret(32)},
			}})
			client := door.dial(t, server, idevid(t, server, "dev"))
			dir := t.TempDir()
			writeFile(t, filepath.Join(dir, "rsa.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
			writeFile(t, filepath.Join(dir, "ca.pem"), pemOf(server.Root()))
			for name, c := range map[string]struct {
				protection csr.KeyProtection
				open       []string
			}{
				"OAEP":        {csr.KeyProtection{ID: id, OAEP: true, PKCS1v15: true}, []string{"-inkey", "rsa.pem"}},
				"PKCS #1":     {csr.KeyProtection{ID: id, PKCS1v15: true}, []string{"-inkey", "rsa.pem"}},
				"an AES-128":  {csr.KeyProtection{ID: id, KEK: 16}, []string{"-secretkey", hex.EncodeToString(secret(16)), "-secretkeyid", "d1"}},
				"an AES-192":  {csr.KeyProtection{ID: []byte{0xca}, KEK: 24}, []string{"-secretkey", hex.EncodeToString(secret(24)), "-secretkeyid", "ca"}},
				"an AES-256 ": {csr.KeyProtection{ID: []byte{0xfe}, KEK: 32}, []string{"-secretkey", hex.EncodeToString(secret(32)), "-secretkeyid", "fe"}},
			} {
				asked := protected(t, c.protection)
				answer, err := client.Session.RoundTrip(t.Context(), &est.Request{Operation: est.ServerKeyGen, Body: asked})
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				parts := answer.Parts
				if parts == nil {
					if parts, err = est.ParseMultipartCore(answer.Body); err != nil {
						t.Fatal(err)
					}
				}
				if len(parts) != 2 || parts[0].ContentFormat != est.ContentFormatPKCS7ServerKey {
					t.Fatalf("%s: got %v", name, parts)
				}
				certs, err := est.ParseCertificates(&est.Response{ContentFormat: parts[1].ContentFormat, Body: parts[1].Body})
				if err != nil {
					t.Fatal(err)
				}
				writeFile(t, filepath.Join(dir, "enveloped.der"), parts[0].Body)
				run(t, dir, "openssl", append([]string{"cms", "-decrypt", "-binary", "-inform", "DER", "-in", "enveloped.der", "-out", "signeddata.der"}, c.open...)...)
				content, err := os.ReadFile(filepath.Join(dir, "signeddata.der"))
				if err != nil {
					t.Fatal(err)
				}
				message, err := asn1.Marshal(struct {
					Type    asn1.ObjectIdentifier
					Content asn1.RawValue
				}{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}, asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: content}})
				if err != nil {
					t.Fatal(err)
				}
				writeFile(t, filepath.Join(dir, "signed.der"), message)
				run(t, dir, "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "signed.der", "-CAfile", "ca.pem", "-purpose", "any", "-out", "package.der")
				if kind := run(t, dir, "openssl", "cms", "-cmsout", "-print", "-inform", "DER", "-in", "signed.der"); !bytes.Contains(kind, []byte("2.16.840.1.101.2.1.2.78.5")) {
					t.Errorf("%s: not a key package: %s", name, kind)
				}
				run(t, dir, "sh", "-c", "openssl asn1parse -inform DER -in package.der -strparse 3 -noout -out key.der")
				public := run(t, dir, "openssl", "pkey", "-inform", "DER", "-in", "key.der", "-pubout", "-outform", "DER")
				if !bytes.Equal(public, certs[0].RawSubjectPublicKeyInfo) {
					t.Errorf("%s: the key is not that of the certificate", name)
				}
			}
		})
	}
}

// Our client opens it, tells who signed it, and refuses a key in the clear and one that
// it has no key for.
func TestEnvelopedKeyOfClient(t *testing.T) {
	t.Parallel()
	decryption, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	id := []byte{0xd1}
	for name, door := range doors {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startHTTPS(t, testserver.Config{TLS12: door.tls12, ServerKeyGen: true, EnvelopeKeys: []testserver.EnvelopeKey{{ID: id, Public: &decryption.PublicKey}}})
			client := door.dial(t, server, idevid(t, server, "dev"))
			anchors, err := est.NewTrustAnchors([]*x509.Certificate{server.Root()})
			if err != nil {
				t.Fatal(err)
			}
			asked := protected(t, csr.KeyProtection{ID: id, OAEP: true})
			for fault, want := range map[string]error{
				"": nil, "envelope=unsigned": nil, "envelope=foreign-signer": est.ErrNotTrusted,
				"envelope=clear": est.ErrKeyNotEnveloped, "envelope=other-key": est.ErrKeyNotOpened, "envelope=damaged": est.ErrKeyNotOpened,
			} {
				if err := server.SetFaults(parse(t, fault)); err != nil {
					t.Fatal(err)
				}
				client.DecryptionKey = &est.DecryptionKey{ID: id, RSA: decryption}
				made, err := client.ServerKeyGen(t.Context(), asked)
				if err == nil && fault != "envelope=unsigned" {
					err = anchors.VerifySigner(made.Signer, time.Now())
				}
				if !errors.Is(err, want) {
					t.Errorf("%s: got %v, want %v", fault, err, want)
				}
				if want != nil {
					continue
				}
				if public, err := made.Public(); err != nil || !made.Enveloped {
					t.Errorf("%s: got %+v, %v", fault, public, err)
				}
			}
			if err := server.SetFaults(testserver.Faults{}); err != nil {
				t.Fatal(err)
			}
			client.DecryptionKey = nil
			if _, err := client.ServerKeyGen(t.Context(), asked); !errors.Is(err, est.ErrKeyEnveloped) {
				t.Errorf("without a key: got %v", err)
			}
		})
	}
}

// "If the server does not have a … key matching the identifier specified by the client,
// the request MUST be terminated and an error returned" (RFC 7030 §4.4.1.1, §4.4.1.2).
func TestEnvelopedKeyRefused(t *testing.T) {
	t.Parallel()
	for name, door := range doors {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startHTTPS(t, testserver.Config{TLS12: door.tls12, ServerKeyGen: true, EnvelopeKeys: []testserver.EnvelopeKey{{ID: []byte{1}, Secret: make([]byte, 16)}}})
			client := door.dial(t, server, idevid(t, server, "dev"))
			for detail, protection := range map[string]csr.KeyProtection{
				"there is no decryption key 02 here":            {ID: []byte{2}, KEK: 16},
				"there is no decryption key 01 here":            {ID: []byte{1}, OAEP: true},
				"the decryption key 01 is of another size here": {ID: []byte{1}, KEK: 32},
			} {
				_, err := client.ServerKeyGen(t.Context(), protected(t, protection))
				var status *est.StatusError
				if !errors.As(err, &status) || status.Code != door.refused || !strings.HasPrefix(status.Detail, detail) {
					t.Errorf("got %v, want %s with %q", err, door.refused, detail)
				}
			}
			if n := len(server.Issuances()); n != 0 {
				t.Errorf("issued %d", n)
			}
		})
	}
	for name, key := range map[string]testserver.EnvelopeKey{
		"no identifier": {Secret: make([]byte, 16)}, "no key": {ID: []byte{1}}, "17 bytes": {ID: []byte{1}, Secret: make([]byte, 17)},
		"both kinds": {ID: []byte{1}, Secret: make([]byte, 16), Public: new(rsa.PublicKey)},
	} {
		if server, err := testserver.New(testserver.Config{EnvelopeKeys: []testserver.EnvelopeKey{key}}); err == nil {
			t.Errorf("%s: started (%v)", name, server.Close())
		}
	}
}
