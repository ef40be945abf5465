package coap_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"estenroll/internal/coap"
)

// opaqueKey is a crypto.Signer that is no type of the standard library, as a
// key in an HSM is.
type opaqueKey struct{ crypto.Signer }

// identity is a certificate with its key.
type identity struct {
	chain [][]byte
	key   crypto.Signer
}

// pki is a CA with one server and one client.
type pki struct {
	ca             *x509.Certificate
	caKey          *ecdsa.PrivateKey
	server, client identity
}

func newPKI(t testing.TB) *pki {
	t.Helper()
	p := &pki{caKey: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "coap TEST ONLY CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &p.caKey.PublicKey, p.caKey)
	if err != nil {
		t.Fatal(err)
	}
	if p.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	p.server = p.issue(t, "localhost", x509.ExtKeyUsageServerAuth, time.Now().Add(time.Hour))
	p.client = p.issue(t, "device", x509.ExtKeyUsageClientAuth, time.Now().Add(time.Hour))
	return p
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (p *pki) issue(t testing.TB, name string, usage x509.ExtKeyUsage, notAfter time.Time) identity {
	t.Helper()
	return p.issueFor(t, newKey(t), name, usage, notAfter)
}

func (p *pki) issueFor(t testing.TB, key crypto.Signer, name string, usage x509.ExtKeyUsage, notAfter time.Time) identity {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.ca, key.Public(), p.caKey)
	if err != nil {
		t.Fatal(err)
	}
	return identity{[][]byte{der}, key}
}

var errWrongPeer = errors.New("not a certificate of the test CA")

func (p *pki) verify(usage x509.ExtKeyUsage) func([]*x509.Certificate) error {
	return func(peer []*x509.Certificate) error {
		roots := x509.NewCertPool()
		roots.AddCert(p.ca)
		_, err := peer[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}})
		if err != nil {
			return fmt.Errorf("%w: %w", errWrongPeer, err)
		}
		return nil
	}
}

// clientConfig and serverConfig are quick, so that a lost datagram costs little.
func (p *pki) clientConfig() coap.Config {
	return quick(coap.Config{
		Certificate: p.client.chain, Key: opaqueKey{p.client.key},
		ServerName: "localhost", Verify: p.verify(x509.ExtKeyUsageServerAuth),
	})
}

func (p *pki) serverConfig() coap.Config {
	return quick(coap.Config{
		Certificate: p.server.chain, Key: opaqueKey{p.server.key},
		Verify: p.verify(x509.ExtKeyUsageClientAuth),
	})
}

func quick(cfg coap.Config) coap.Config {
	cfg.AckTimeout = 200 * time.Millisecond
	cfg.FlightInterval = 100 * time.Millisecond
	cfg.ExchangeTimeout = 30 * time.Second
	cfg.HandshakeTimeout = 20 * time.Second
	return cfg
}

// files writes the PKI for foreign tools.
type files struct{ ca, serverCert, serverKey, clientCert, clientKey string }

func (p *pki) files(t testing.TB) files {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key := func(name string, key crypto.Signer) string {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return write(name, "PRIVATE KEY", der)
	}
	return files{
		ca:         write("ca.pem", "CERTIFICATE", p.ca.Raw),
		serverCert: write("server.pem", "CERTIFICATE", p.server.chain[0]), serverKey: key("server.key", p.server.key),
		clientCert: write("client.pem", "CERTIFICATE", p.client.chain[0]), clientKey: key("client.key", p.client.key),
	}
}

// serve starts a server that ends with the test.
func serve(t testing.TB, cfg coap.Config, handler coap.Handler) string {
	t.Helper()
	server, err := coap.Listen("127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(handler) }()
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return server.Addr().String()
}

func dial(t testing.TB, addr string, cfg coap.Config) *coap.Conn {
	t.Helper()
	conn, err := coap.Dial(t.Context(), addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	return conn
}
