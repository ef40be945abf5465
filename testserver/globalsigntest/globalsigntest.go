// Package globalsigntest builds and starts the programs of globalsign/est v1.0.6 as
// their makers wrote them: an EST server and an EST client that share no code with
// this module's own. For tests only.
package globalsigntest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// The programs.
const (
	Client = "estclient"
	Server = "estserver"
)

// Build builds a program into a directory and returns its path.
func Build(dir, program string) (string, error) {
	module, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	path := filepath.Join(dir, program)
	build := exec.Command("go", "build", "-o", path, "github.com/globalsign/est/cmd/"+program)
	build.Dir = filepath.Join(filepath.Dir(strings.TrimSpace(string(module))), "testserver", "globalsigntest", "module")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", build, err, out)
	}
	return path, nil
}

// CA is a running estserver. It issues from a root of its own.
type CA struct {
	// URI is the server's, https://127.0.0.1:port.
	URI string
	// RootFile is the PEM file with its root.
	RootFile string
	process  *exec.Cmd
}

// Start starts an estserver that was built with its files in a directory; it accepts
// clients with certificates of its own CA and of another, PEM.
func Start(program, dir, otherCA string) (*CA, error) {
	root, err := issue("globalsign root", nil, func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign
	})
	if err != nil {
		return nil, err
	}
	server, err := issue("globalsign server", root, func(c *x509.Certificate) {
		c.IPAddresses, c.ExtKeyUsage = []net.IP{net.IPv4(127, 0, 0, 1)}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})
	if err != nil {
		return nil, err
	}
	for name, p := range map[string]*pair{"root": root, "server": server} {
		if err := p.write(filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	// Its own listener fails silently where the port is taken since.
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := free.Addr().String()
	if err := free.Close(); err != nil {
		return nil, err
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	config, err := json.Marshal(map[string]any{
		"mock_ca":  map[string]any{"certificates": at("root.pem"), "private_key": at("root.key")},
		"tls":      map[string]any{"listen_address": address, "certificates": at("server.pem"), "private_key": at("server.key"), "client_cas": []string{at("root.pem"), otherCA}},
		"log_file": at("estserver.log"), "timeout": 30,
	})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(at("estserver.json"), config, 0o600); err != nil {
		return nil, err
	}
	ca := &CA{URI: "https://" + address, RootFile: at("root.pem"), process: exec.Command(program, "-config", at("estserver.json"))}
	if err := ca.process.Start(); err != nil {
		return nil, err
	}
	if err := answers(address); err != nil {
		return nil, errors.Join(err, ca.Close())
	}
	return ca, nil
}

// answers waits until somebody listens at an address.
func answers(address string) error {
	for deadline := time.Now().Add(20 * time.Second); ; {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			return conn.Close()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("estserver: %w", err)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// Close ends the server.
func (ca *CA) Close() error {
	if err := ca.process.Process.Kill(); err != nil {
		return err
	}
	_ = ca.process.Wait() // killed
	return nil
}

// pair is a certificate and its key.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func issue(name string, issuer *pair, change func(*x509.Certificate)) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0), BasicConstraintsValid: true,
	}
	change(template)
	parent, signer := template, crypto.Signer(key)
	if issuer != nil {
		parent, signer = issuer.cert, issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &pair{cert, key}, err
}

// write writes NAME.pem and NAME.key.
func (p *pair) write(name string) error {
	key, err := x509.MarshalECPrivateKey(p.key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(name+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw}), 0o600),
		os.WriteFile(name+".key", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: key}), 0o600))
}
