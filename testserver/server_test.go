package testserver_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/internal/coap"
	"estenroll/testserver"
)

// credential is a client's certificate and key.
type credential struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func start(t *testing.T, cfg testserver.Config) *testserver.Server {
	t.Helper()
	server, err := testserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return server
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t *testing.T, key any, template *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func named(name string) *x509.CertificateRequest {
	return &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name + ".example"}}
}

// idevid makes a device with a factory credential.
func idevid(t *testing.T, server *testserver.Server, name string) credential {
	t.Helper()
	key := newKey(t)
	cert, err := server.IssueIDevID(testserver.IDevIDRequest{CSR: newCSR(t, key, named(name))})
	if err != nil {
		t.Fatal(err)
	}
	return credential{cert, key}
}

func post(path string, client credential, csr []byte) *coap.Request {
	return &coap.Request{
		Method: codes.POST, Path: "/.well-known/est/" + path,
		ContentFormat: new(uint16(est.ContentFormatPKCS10)), Body: csr, Peer: []*x509.Certificate{client.cert},
	}
}

func accepting(req *coap.Request, format est.ContentFormat) *coap.Request {
	req.Accept = new(uint16(format))
	return req
}

func ask(t *testing.T, server *testserver.Server, req *coap.Request) *coap.Response {
	t.Helper()
	return testserver.ServeCoAP(server, t.Context(), req)
}

// enroll asks for a single certificate as 287, which is the certificate itself.
func enroll(t *testing.T, server *testserver.Server, path string, client credential, csr []byte) *x509.Certificate {
	t.Helper()
	resp := ask(t, server, accepting(post(path, client, csr), est.ContentFormatPKIXCert))
	if resp.Code != codes.Changed {
		t.Fatalf("%s: got %v %q, want 2.04", path, resp.Code, resp.Body)
	}
	cert, err := x509.ParseCertificate(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// ldevid enrols a new key for the device.
func ldevid(t *testing.T, server *testserver.Server, client credential, name string) credential {
	t.Helper()
	key := newKey(t)
	return credential{enroll(t, server, "sen", client, newCSR(t, key, named(name))), key}
}

func hexDigest(data []byte) string {
	digest := sha256.Sum256(data)
	return hex.EncodeToString(digest[:])
}

// clock is a clock that the test turns.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}
