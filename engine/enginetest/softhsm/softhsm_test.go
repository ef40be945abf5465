package softhsm_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"estenroll/engine/enginetest/softhsm"
)

func TestTokens(t *testing.T) {
	var tokens []*softhsm.Token
	t.Run("made", func(t *testing.T) {
		tokens = append(tokens, softhsm.New(t), softhsm.New(t, softhsm.WithPIN("marker")), softhsm.New(t, softhsm.OwnStore()))
		shared, _, own := tokens[0], tokens[1], tokens[2]
		if os.Getenv("SOFTHSM2_CONF") != shared.Conf {
			t.Error("this process does not see the shared store")
		}
		if shared.Dir == own.Dir {
			t.Error("the own store is the shared one")
		}
		for i, token := range tokens {
			slots, err := token.Tool(t.Context(), "pkcs11-tool", "--module", token.ModulePath, "--list-slots")
			if err != nil {
				t.Fatal(err)
			}
			for j, other := range tokens {
				if got, want := strings.Contains(slots, other.Label), i == j || i < 2 && j < 2; got != want {
					t.Errorf("token %d is seen beside token %d: %t, want %t", j, i, got, want)
				}
			}
		}
		if tokens[1].PIN != "marker" {
			t.Errorf("PIN is %q", tokens[1].PIN)
		}
	})
	for i, token := range tokens {
		if _, err := os.Stat(token.Dir); err == nil {
			t.Errorf("token %d: its store is still there", i)
		}
	}
}

func TestStoreIDevID(t *testing.T) {
	t.Parallel()
	token := softhsm.New(t, softhsm.OwnStore())
	err := token.StoreIDevID(func(publicKeyDER []byte) ([]byte, error) {
		public, err := x509.ParsePKIXPublicKey(publicKeyDER)
		if err != nil {
			return nil, err
		}
		ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "device"}, NotAfter: time.Now().Add(time.Hour)}
		return x509.CreateCertificate(rand.Reader, template, template, public, ca)
	})
	if err != nil {
		t.Fatal(err)
	}
	objects, err := token.PKCS11Tool(t.Context(), "--list-objects")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Private Key Object", "Public Key Object", "Certificate Object"} {
		if !strings.Contains(objects, want) {
			t.Errorf("no %s in\n%s", want, objects)
		}
	}
	if got := strings.Count(objects, "ID:         01"); got != 3 {
		t.Errorf("%d objects have id 01, want 3:\n%s", got, objects)
	}
}
