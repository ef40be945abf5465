// Package softhsm makes fresh SoftHSM2 tokens for tests, each in a directory of
// its own: SoftHSM loses writes now and then when processes share a directory,
// and a test must not see another's objects. It needs the Debian packages
// softhsm2 and opensc, and no line of the product.
//
// SoftHSM finds its tokens by the environment variable SOFTHSM2_CONF. A child
// process is given [opensc.Token.Env]. A test that loads the module itself calls
// [opensc.Token.Use], and closes all its engines before it ends. Such tests cannot
// be parallel.
package softhsm

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"estenroll/engine/enginetest/opensc"
)

// Token is a token in a directory that goes with its test.
type Token struct {
	opensc.Token
	Dir string // holds all of the token's files
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
	conf := filepath.Join(dir, "softhsm2.conf")
	token := &Token{Dir: filepath.Join(dir, "tokens"), Token: opensc.Token{
		ModulePath: ModulePath(t), Label: "device", PIN: "4711-user", PINFile: filepath.Join(dir, "pin"), SOPIN: "4711-officer",
		Environment: []string{"SOFTHSM2_CONF=" + conf},
	}}
	for _, option := range options {
		option(token)
	}
	configuration := "directories.tokendir = " + token.Dir + "\nobjectstore.backend = file\nlog.level = ERROR\n"
	err := errors.Join(
		os.Mkdir(token.Dir, 0o700),
		os.WriteFile(conf, []byte(configuration), 0o600),
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
	_, err := t.Run("softhsm2-util", "--init-token", "--free", "--label", label, "--pin", t.PIN, "--so-pin", t.SOPIN)
	return err
}
