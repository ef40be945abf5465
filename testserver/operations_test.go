package testserver_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"estenroll/csr"
	"estenroll/est"
	"estenroll/testserver"
)

// linked is a CSR of a device that is linked to a session.
func linked(t *testing.T, client *est.Client, device credential) []byte {
	t.Helper()
	binding, err := client.Session.ChannelBinding()
	if err != nil {
		t.Fatal(err)
	}
	der, err := csr.Build(nil, csr.Template{RawSubject: device.cert.RawSubject, ChallengePassword: base64.StdEncoding.EncodeToString(binding)}, device.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// doors are the ways to a server.
var doors = map[string]struct {
	tls12   bool
	dial    func(*testing.T, *testserver.Server, credential) *est.Client
	refused string // code of a request that is wrong
}{
	"CoAPs":   {false, mustDial, "4.00 BadRequest"},
	"TLS 1.2": {true, clientOver, "400 Bad Request"},
	"TLS 1.3": {false, clientOver, "400 Bad Request"},
}

// A CSR that is linked to its session is good there, and nowhere else: whoever
// replays it gets nothing.
func TestProofOfPossession(t *testing.T) {
	t.Parallel()
	for name, door := range doors {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startHTTPS(t, testserver.Config{TLS12: door.tls12, RequirePoP: true, Faults: testserver.Faults{Defer: 1, DeferMaxAge: new(time.Duration)}})
			device := idevid(t, server, "dev")
			refused := func(client *est.Client, der []byte, detail string) {
				t.Helper()
				_, err := client.SimpleEnroll(t.Context(), der)
				var status *est.StatusError
				if !errors.As(err, &status) || status.Code != door.refused || !strings.HasPrefix(status.Detail, detail) {
					t.Errorf("got %v, want %s with %q", err, door.refused, detail)
				}
			}
			first := door.dial(t, server, device)
			refused(first, newCSR(t, device.key, named("dev")), "the request has no challengePassword that links it to this session")
			der := linked(t, first, device)
			var pending *est.PendingError
			if _, err := first.SimpleEnroll(t.Context(), der); !errors.As(err, &pending) {
				t.Fatalf("got %v, want a PendingError", err)
			}

			// The same is asked for in another session, with another CSR: the wait counts.
			second := door.dial(t, server, device)
			refused(second, der, "the challengePassword is not that of this session")
			again := linked(t, second, device)
			issued, err := second.SimpleEnroll(t.Context(), again)
			if err != nil {
				t.Fatal(err)
			}
			refused(door.dial(t, server, idevid(t, server, "thief")), again, "the challengePassword is not that of this session")
			third := door.dial(t, server, device)
			repeated, err := third.SimpleEnroll(t.Context(), linked(t, third, device))
			if err != nil || !repeated[0].Equal(issued[0]) || len(server.Issuances()) != 1 {
				t.Errorf("asked for once more: %v, %d issued", err, len(server.Issuances()))
			}
		})
	}
}

// The server makes a key of the kind of the CSR's, and a certificate for it: once for
// one request, however often it comes.
func TestServerKeyGen(t *testing.T) {
	t.Parallel()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, door := range doors {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startHTTPS(t, testserver.Config{TLS12: door.tls12, ServerKeyGen: true})
			device := idevid(t, server, "dev")
			explicit, err := est.NewTrustAnchors([]*x509.Certificate{server.Root(), server.Issuing()})
			if err != nil {
				t.Fatal(err)
			}
			for name, key := range map[string]any{"EC": newKey(t), "RSA": rsaKey} {
				client := door.dial(t, server, device)
				asked := newCSR(t, key, named("dev"))
				made, err := client.ServerKeyGen(t.Context(), asked)
				if err != nil {
					t.Fatal(err)
				}
				public, err := made.Public()
				if err != nil {
					t.Fatal(err)
				}
				if got, want := fmt.Sprintf("%T", public), fmt.Sprintf("%T", key.(crypto.Signer).Public()); got != want {
					t.Errorf("%s: made %s, want %s", name, got, want)
				}
				chain, err := explicit.VerifyIssued(made.Certificates, public, time.Now())
				if err != nil || chain[0].Subject.CommonName != "dev" {
					t.Errorf("%s: issued %v, %v", name, chain, err)
				}
				again, err := client.ServerKeyGen(t.Context(), asked)
				if err != nil || !bytes.Equal(again.PKCS8, made.PKCS8) {
					t.Errorf("%s: asked for once more: another key, or %v", name, err)
				}
			}
			if got := len(server.Issuances()); got != 2 {
				t.Errorf("issued %d, want 2", got)
			}
			var status *est.StatusError
			none := startHTTPS(t, testserver.Config{TLS12: door.tls12})
			if _, err := door.dial(t, none, idevid(t, none, "dev")).ServerKeyGen(t.Context(), newCSR(t, newKey(t), named("dev"))); !errors.As(err, &status) || !status.NotFound {
				t.Errorf("a server that makes none: %v", err)
			}
		})
	}
}

// What att and csrattrs answer is what the server is configured with, and there is none without.
func TestCSRAttributes(t *testing.T) {
	t.Parallel()
	key, err := csr.WantKey(csr.WantedKey{Family: "EC", Size: "P-384"})
	if err != nil {
		t.Fatal(err)
	}
	want, err := csr.Attributes{csr.WantChallengePassword(), key}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, configured := range map[string][]byte{"some": want, "none": nil, "an empty list": {0x30, 0}} {
		server := startHTTPS(t, testserver.Config{CSRAttributes: configured})
		device := idevid(t, server, "dev")
		for _, client := range []*est.Client{mustDial(t, server, device), clientOver(t, server, device)} {
			got, err := client.CSRAttrs(t.Context())
			if err != nil || string(got) != string(configured) || (got == nil) != (configured == nil) {
				t.Errorf("%s: got %x, %v", name, got, err)
			}
		}
	}
	if server, err := testserver.New(testserver.Config{CSRAttributes: []byte{5, 0}}); err == nil {
		t.Errorf("started with what is not a list of attributes (%v)", server.Close())
	}
}
