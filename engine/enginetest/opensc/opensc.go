// Package opensc is a token in the hands of OpenSC's pkcs11-tool: the factory that
// makes objects in it, and the judge of what is there, of which no line is ours.
// How a token itself is made is its package's: softhsm, tpm.
package opensc

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What StoreIDevID names the factory credential.
const (
	IDevIDLabel = "idevid"
	IDevIDID    = "01" // CKA_ID, hexadecimal
)

// Token is a token that a module shows.
type Token struct {
	ModulePath string // of its PKCS #11 module
	Label      string
	PIN        string
	PINFile    string // holds the PIN and a newline; its directory is the token's
	SOPIN      string // of the security officer
	// Environment is what the module needs to find the token.
	Environment []string
}

// URI names the token for an engine.
func (t *Token) URI() string {
	return fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", escape(t.Label), escape(t.ModulePath), escape(t.PINFile))
}

// escape encodes what RFC 7512 does not allow in a query attribute, and more.
func escape(text string) string {
	var b strings.Builder
	for _, c := range []byte(text) {
		if strings.IndexByte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// Env is what a child process needs in its environment to find the token.
func (t *Token) Env() []string { return t.Environment }

// Use lets this process find the token until the test ends: a module reads its
// variables whenever it is initialised.
func (t *Token) Use(tb testing.TB) {
	tb.Helper()
	for _, pair := range t.Environment {
		name, value, _ := strings.Cut(pair, "=")
		tb.Setenv(name, value)
	}
}

// Tool runs OpenSC's pkcs11-tool on the token, logged in as its user: the judge
// that is not ours. It returns what the tool writes to standard output.
func (t *Token) Tool(args ...string) (string, error) {
	return t.Run("pkcs11-tool", append([]string{"--module", t.ModulePath, "--token-label", t.Label, "--login", "--pin", "env:PIN"}, args...)...)
}

// GenerateEC has the token generate an EC P-256 pair, as a factory would, and
// returns the public key (DER, SubjectPublicKeyInfo). The id is hexadecimal.
func (t *Token) GenerateEC(label, id string) ([]byte, error) {
	return t.Generate("EC:prime256v1", label, id)
}

// Generate is GenerateEC for a kind of key that pkcs11-tool knows: "EC:secp384r1",
// "rsa:2048". Further arguments are pkcs11-tool's: "--extractable".
func (t *Token) Generate(kind, label, id string, args ...string) ([]byte, error) {
	args = append([]string{"--keypairgen", "--key-type", kind, "--usage-sign", "--label", label, "--id", id}, args...)
	if _, err := t.Tool(args...); err != nil {
		return nil, err
	}
	return t.publicKey(label, id)
}

// GenerateDecryption has the token generate an RSA pair for decryption, which may sign
// too, with GnuTLS's p11tool. Measured: pkcs11-tool of OpenSC 0.23 says nothing of
// CKA_SIGN, whose default is true in SoftHSM.
func (t *Token) GenerateDecryption(label, id string, signs bool) error {
	args := []string{"--provider", t.ModulePath, "--batch", "--login", "--generate-privkey=rsa", "--bits", "2048", "--label", label, "--id", id, "--mark-decrypt"}
	if signs {
		args = append(args, "--mark-sign")
	}
	_, err := t.Run("p11tool", append(args, "pkcs11:token="+escape(t.Label))...)
	return err
}

// WriteSecret stores an AES key that wraps and unwraps, and is not shown again.
func (t *Token) WriteSecret(secret []byte, label, id string) error {
	file, err := t.temporary(secret)
	if err != nil {
		return err
	}
	_, err = t.Tool("--write-object", file, "--type", "secrkey", "--key-type", fmt.Sprintf("AES:%d", len(secret)), "--usage-wrap", "--sensitive", "--label", label, "--id", id)
	return errors.Join(err, os.Remove(file))
}

// WriteCertificate stores a certificate (DER).
func (t *Token) WriteCertificate(der []byte, label, id string) error {
	file, err := t.temporary(der)
	if err != nil {
		return err
	}
	args := []string{"--write-object", file, "--type", "cert", "--label", label}
	if id != "" {
		args = append(args, "--id", id)
	}
	_, err = t.Tool(args...)
	return errors.Join(err, os.Remove(file))
}

// StoreIDevID makes the factory credential: an EC P-256 pair in the token, labelled
// IDevIDLabel, and the certificate that sign returns for its public key, both DER.
func (t *Token) StoreIDevID(sign func(publicKey []byte) (certificate []byte, err error)) error {
	return t.StoreIDevIDOf("EC:prime256v1", sign)
}

// StoreIDevIDOf is StoreIDevID with a pair of another kind: see Generate.
func (t *Token) StoreIDevIDOf(kind string, sign func(publicKey []byte) (certificate []byte, err error)) error {
	public, err := t.Generate(kind, IDevIDLabel, IDevIDID)
	if err != nil {
		return err
	}
	certificate, err := sign(public)
	if err != nil {
		return err
	}
	return t.WriteCertificate(certificate, IDevIDLabel, IDevIDID)
}

// publicKey reads a public key with GnuTLS's p11tool. Measured: pkcs11-tool of
// OpenSC 0.23 fails for one on P-384.
func (t *Token) publicKey(label, id string) ([]byte, error) {
	number, err := hex.DecodeString(id)
	if err != nil {
		return nil, err
	}
	file, err := t.temporary(nil)
	if err != nil {
		return nil, err
	}
	uri := fmt.Sprintf("pkcs11:token=%s;object=%s;id=%s;type=public", escape(t.Label), escape(label), escape(string(number)))
	_, err = t.Run("p11tool", "--provider", t.ModulePath, "--batch", "--outder", "--export", uri, "--outfile", file)
	if err != nil {
		return nil, errors.Join(err, os.Remove(file))
	}
	der, err := os.ReadFile(file)
	return der, errors.Join(err, os.Remove(file))
}

func (t *Token) temporary(content []byte) (string, error) {
	file, err := os.CreateTemp(filepath.Dir(t.PINFile), "object-")
	if err != nil {
		return "", err
	}
	_, err = file.Write(content)
	return file.Name(), errors.Join(err, file.Close())
}

// Run runs a program that is to find the token, with the PIN in the variables PIN and
// GNUTLS_PIN and the officer's in SO_PIN, and returns what it writes to standard output.
func (t *Token) Run(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), t.Env()...)
	cmd.Env = append(cmd.Env, "PIN="+t.PIN, "GNUTLS_PIN="+t.PIN, "SO_PIN="+t.SOPIN)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return "", fmt.Errorf("%w: make deps", err)
		}
		return "", fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}
