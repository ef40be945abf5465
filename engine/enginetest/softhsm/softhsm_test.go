package softhsm_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"strings"
	"testing"
	"time"

	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/softhsm"
)

func TestToken(t *testing.T) {
	t.Parallel()
	token := softhsm.New(t, softhsm.WithLabel("a token"), softhsm.WithPIN("marker"))
	if strings.Contains(token.URI(), "marker") || !strings.HasPrefix(token.URI(), "pkcs11:token=a%20token?module-path=/") {
		t.Errorf("URI: %s", token.URI())
	}
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	err = token.StoreIDevID(func(public []byte) ([]byte, error) {
		key, err := x509.ParsePKIXPublicKey(public)
		if err != nil {
			return nil, err
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "IDevID, TEST ONLY"},
			NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		}
		return x509.CreateCertificate(rand.Reader, template, template, key, ca)
	})
	if err != nil {
		t.Fatal(err)
	}
	objects, err := token.Tool("--list-objects")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Private Key Object; EC", "Public Key Object; EC", "Certificate Object", opensc.IDevIDLabel} {
		if !strings.Contains(objects, want) {
			t.Errorf("no %q among\n%s", want, objects)
		}
	}
	if err := token.Add("another"); err != nil {
		t.Fatal(err)
	}
	token.Label = "another"
	if objects, err := token.Tool("--list-objects"); err != nil || strings.Contains(objects, "Private") {
		t.Errorf("%v\n%s", err, objects)
	}
}
