package estenroll

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"estenroll/est"
	"estenroll/internal/durable"
)

const taFileLimit = 256 << 10 // bytes

// Trust anchor files are named by their content and never change: they are
// written before the commit that refers to them and removed when nothing does.
var (
	taFileName  = regexp.MustCompile(`^explicit-ta-[0-9a-f]{16}\.pem$`)
	taTemporary = regexp.MustCompile(`^\.(explicit-ta-[0-9a-f]{16}\.pem)[0-9]+$`)
)

// saveExplicitTA writes the certificates of a /crts answer and returns the name.
func (d *shared) saveExplicitTA(anchors *est.TrustAnchors) (string, error) {
	var content bytes.Buffer
	for _, cert := range anchors.Certificates() {
		if err := pem.Encode(&content, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}); err != nil {
			return "", fmt.Errorf("write Explicit TA: %w", err)
		}
	}
	digest := sha256.Sum256(content.Bytes())
	name := fmt.Sprintf("explicit-ta-%x.pem", digest[:8])
	if err := durable.WriteFile(filepath.Join(d.cfg.StateDir, name), content.Bytes(), 0o600); err != nil {
		return "", fmt.Errorf("write Explicit TA: %w", err)
	}
	return name, nil
}

// loadExplicitTA reads what saveExplicitTA wrote. ErrState if it is something else.
func (d *shared) loadExplicitTA(name string) (*est.TrustAnchors, error) {
	path := filepath.Join(d.cfg.StateDir, name)
	data, err := durable.ReadFile(path, taFileLimit)
	if errors.Is(err, durable.ErrTooLarge) || errors.Is(err, durable.ErrNotRegular) {
		return nil, fmt.Errorf("read Explicit TA: %w: %w", err, ErrState)
	}
	if err != nil {
		return nil, fmt.Errorf("read Explicit TA: %w", err)
	}
	certs, err := ParseTrustAnchors(data)
	if err != nil {
		return nil, fmt.Errorf("read Explicit TA %s: %w: %w", path, err, ErrState)
	}
	anchors, err := est.NewTrustAnchors(certs)
	if err != nil {
		return nil, fmt.Errorf("read Explicit TA %s: %w: %w", path, err, ErrState)
	}
	return anchors, nil
}

// ParseTrustAnchors parses certificates in PEM, or one or more in DER.
func ParseTrustAnchors(data []byte) ([]*x509.Certificate, error) {
	if !bytes.Contains(data, []byte("-----BEGIN")) {
		certs, err := x509.ParseCertificates(data)
		if err != nil || len(certs) == 0 { // of an empty file
			return nil, errors.New("neither PEM nor DER of a certificate") // what else it is, the parser cannot know
		}
		return certs, nil
	}
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block of type %q among the certificates", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("no certificate")
	}
	return certs, nil
}

// removeUnreferencedFiles removes trust anchor files that nothing refers to.
func (d *shared) removeUnreferencedFiles() error {
	used := map[string]bool{}
	for _, r := range d.journal.Credentials {
		for _, c := range r.Pairs {
			used[c.ExplicitTA] = true
		}
		if r.Operation != nil {
			used[r.Operation.ExplicitTA] = true
		}
	}
	entries, err := os.ReadDir(d.cfg.StateDir)
	if err != nil {
		return fmt.Errorf("clean state directory: %w", err)
	}
	for _, entry := range entries {
		if taFileName.MatchString(entry.Name()) && !used[entry.Name()] {
			if err := durable.Remove(filepath.Join(d.cfg.StateDir, entry.Name())); err != nil {
				return fmt.Errorf("clean state directory: %w", err)
			}
		}
	}
	return nil
}
