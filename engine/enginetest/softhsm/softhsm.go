// Package softhsm makes fresh SoftHSM2 tokens for tests, each in a directory of
// its own: SoftHSM loses writes now and then when processes share a directory,
// and a test must not see another's objects. It needs the Debian packages
// softhsm2, opensc and gnutls-bin, and no line of the product.
//
// SoftHSM finds its tokens by the environment variable SOFTHSM2_CONF. A child
// process is given [Token.Env]. A test that loads the module itself calls
// [Token.Use], and closes all its engines before it ends: the module reads the
// variable whenever it is initialised. Such tests cannot be parallel.
package softhsm

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

// Token is a token in a directory that goes with its test.
type Token struct {
	ModulePath string // of SoftHSM's module
	Dir        string // holds all of the token's files
	Label      string
	PIN        string
	PINFile    string // holds the PIN and a newline
	SOPIN      string // of the security officer
}

// Option changes a token before it is made.
type Option func(*Token)

// WithLabel names the token. Default: "device".
func WithLabel(label string) Option { return func(t *Token) { t.Label = label } }

// WithPIN sets the user PIN. Default: "4711-user".
func WithPIN(pin string) Option { return func(t *Token) { t.PIN = pin } }

// WithModule puts another module between the tools and SoftHSM.
func WithModule(path string) Option { return func(t *Token) { t.ModulePath = path } }

// New makes a token.
func New(t testing.TB, options ...Option) *Token {
	t.Helper()
	dir := t.TempDir()
	token := &Token{
		ModulePath: ModulePath(t), Dir: filepath.Join(dir, "tokens"), Label: "device",
		PIN: "4711-user", PINFile: filepath.Join(dir, "pin"), SOPIN: "4711-officer",
	}
	for _, option := range options {
		option(token)
	}
	configuration := "directories.tokendir = " + token.Dir + "\nobjectstore.backend = file\nlog.level = ERROR\n"
	err := errors.Join(
		os.Mkdir(token.Dir, 0o700),
		os.WriteFile(token.conf(), []byte(configuration), 0o600),
		os.WriteFile(token.PINFile, []byte(token.PIN+"\n"), 0o600),
	)
	if err != nil {
		t.Fatalf("softhsm: %v", err)
	}
	if err := token.Add(token.Label); err != nil {
		t.Fatalf("softhsm: %v", err)
	}
	return token
}

// ModulePath finds SoftHSM's module.
func ModulePath(t testing.TB) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/softhsm/libsofthsm2.so")
	if err != nil {
		t.Fatalf("softhsm: %v", err)
	}
	for _, path := range append([]string{"/usr/lib/softhsm/libsofthsm2.so"}, found...) {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Fatal("softhsm: libsofthsm2.so is missing: make deps")
	return ""
}

// Add makes one more token in the same directory, with the same PINs, and
// perhaps with the same label.
func (t *Token) Add(label string) error {
	// The PINs are arguments, which every user can read: softhsm2-util has no other way.
	_, err := t.run("softhsm2-util", "--init-token", "--free", "--label", label, "--pin", t.PIN, "--so-pin", t.SOPIN)
	return err
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
func (t *Token) Env() []string { return []string{"SOFTHSM2_CONF=" + t.conf()} }

// Use lets this process find the token until the test ends.
func (t *Token) Use(tb testing.TB) {
	tb.Helper()
	tb.Setenv("SOFTHSM2_CONF", t.conf())
}

func (t *Token) conf() string { return filepath.Join(filepath.Dir(t.Dir), "softhsm2.conf") }

// Tool runs OpenSC's pkcs11-tool on the token, logged in as its user: the judge
// that is not ours. It returns what the tool writes to standard output.
func (t *Token) Tool(args ...string) (string, error) {
	return t.run("pkcs11-tool", append([]string{"--module", t.ModulePath, "--token-label", t.Label, "--login", "--pin", "env:PIN"}, args...)...)
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
// OpenSC 0.23 fails for a key on P-384.
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
	_, err = t.run("p11tool", "--provider", t.ModulePath, "--batch", "--outder", "--export", uri, "--outfile", file)
	if err != nil {
		return nil, errors.Join(err, os.Remove(file))
	}
	der, err := os.ReadFile(file)
	return der, errors.Join(err, os.Remove(file))
}

func (t *Token) temporary(content []byte) (string, error) {
	file, err := os.CreateTemp(filepath.Dir(t.Dir), "object-")
	if err != nil {
		return "", err
	}
	_, err = file.Write(content)
	return file.Name(), errors.Join(err, file.Close())
}

func (t *Token) run(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), t.Env()...)
	cmd.Env = append(cmd.Env, "PIN="+t.PIN)
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
