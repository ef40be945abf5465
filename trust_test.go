package estenroll_test

import (
	"bytes"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"estenroll"
)

// FuzzParseTrustAnchors: certificates of a file, in PEM or DER, are as many and the
// same when they are written as PEM again.
func FuzzParseTrustAnchors(f *testing.F) {
	text, err := os.ReadFile(filepath.Join("testdata", "rfc9148", "root.pem"))
	if err != nil {
		f.Fatal(err)
	}
	block, _ := pem.Decode(text)
	for _, seed := range [][]byte{text, block.Bytes, bytes.Repeat(block.Bytes, 2), append([]byte("Root CA\n"), bytes.Repeat(text, 2)...), append(text, "-----BEGIN EC PRIVATE KEY-----\n-----END EC PRIVATE KEY-----\n"...)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, err := estenroll.ParseTrustAnchors(data)
		if err != nil {
			return
		}
		var again []byte
		for _, cert := range certs {
			again = append(again, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
		}
		reread, err := estenroll.ParseTrustAnchors(again)
		if len(certs) == 0 || err != nil || len(reread) != len(certs) {
			t.Fatalf("%d certificates, then %d, %v", len(certs), len(reread), err)
		}
		for i := range certs {
			if !reread[i].Equal(certs[i]) {
				t.Errorf("certificate %d is another", i)
			}
		}
	})
}
