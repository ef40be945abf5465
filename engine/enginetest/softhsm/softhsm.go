// Package softhsm makes SoftHSM2 tokens for tests, as a factory would: with
// Debian's module and OpenSC's pkcs11-tool, and with nothing of ours. A PIN never
// stands in an argument list.
package softhsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// The factory's key pair and certificate, as StoreIDevID makes them.
const (
	IDevIDLabel = "idevid"
	IDevIDID    = "01" // hexadecimal
)

// confVariable is where SoftHSM looks for its configuration at C_Initialize.
const confVariable = "SOFTHSM2_CONF"

// Token is an initialised token. Its fields are facts: changing them changes
// nothing in the token.
type Token struct {
	ModulePath string // of libsofthsm2.so
	Label      string // unique in the test binary
	PIN, SOPIN string
	PINFile    string // holds the PIN and a newline, mode 0600
	Dir        string // of the store that the token is in
	Conf       string // SoftHSM's configuration, which names Dir

	files string // of this token alone
}

// Option is an option of New.
type Option func(*options)

type options struct {
	pin string
	own bool
}

// WithPIN sets the user's PIN. Default: a random one.
func WithPIN(pin string) Option { return func(o *options) { o.pin = pin } }

// OwnStore puts the token into a store of its own, under t.TempDir, which can be
// copied as a whole. Only child processes that have Env can see it.
func OwnStore() Option { return func(o *options) { o.own = true } }

// New makes a token, which is removed with the test. Without OwnStore it is in
// the one store of the test binary, which SOFTHSM2_CONF of this process names, so
// that the process itself and all its children see it. SoftHSM reads the list
// of tokens at C_Initialize only: a process that has the module open does not see
// the new token, so tests that open tokens in their own process are not parallel.
func New(t testing.TB, opts ...Option) *Token {
	t.Helper()
	o := options{pin: "PIN-" + random(t)}
	for _, set := range opts {
		set(&o)
	}
	token := &Token{
		ModulePath: module(t),
		Label:      "test-" + random(t),
		PIN:        o.pin,
		SOPIN:      "SO-" + random(t),
		files:      t.TempDir(),
	}
	token.PINFile = filepath.Join(token.files, "pin")
	if err := os.WriteFile(token.PINFile, []byte(token.PIN+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if o.own {
		token.Dir, token.Conf = newStore(t, token.files)
	} else {
		token.Dir, token.Conf = shared.join(t)
	}
	if err := token.initialise(t.Context()); err != nil {
		t.Fatalf("softhsm: %v", err)
	}
	if !o.own {
		t.Cleanup(func() {
			if _, err := token.Tool(context.WithoutCancel(t.Context()), "softhsm2-util", "--delete-token", "--token", token.Label); err != nil {
				t.Errorf("softhsm: %v", err)
			}
			shared.leave(t)
		})
	}
	return token
}

// URI is the token's address with its PIN file (RFC 7512).
func (token *Token) URI() string {
	return "pkcs11:token=" + token.Label + "?module-path=" + token.ModulePath + "&pin-source=file:" + token.PINFile
}

// Env is what a child process needs in its environment to see the token.
func (token *Token) Env() []string { return []string{confVariable + "=" + token.Conf} }

// StoreIDevID does what a factory does: it generates an EC P-256 pair in the
// token, has its public key (a DER SubjectPublicKeyInfo) certified by sign, and
// stores the DER certificate, with label IDevIDLabel and id IDevIDID.
func (token *Token) StoreIDevID(sign func(publicKeyDER []byte) (certDER []byte, err error)) error {
	ctx := context.Background()
	object := []string{"--label", IDevIDLabel, "--id", IDevIDID}
	if _, err := token.PKCS11Tool(ctx, append(object, "--keypairgen", "--key-type", "EC:prime256v1", "--usage-sign")...); err != nil {
		return err
	}
	public, err := token.temporary("public.der", nil)
	if err != nil {
		return err
	}
	if _, err := token.PKCS11Tool(ctx, append(object, "--read-object", "--type", "pubkey", "--output-file", public)...); err != nil {
		return err
	}
	der, err := os.ReadFile(public)
	if err != nil {
		return fmt.Errorf("read public key: %w", err)
	}
	cert, err := sign(der)
	if err != nil {
		return fmt.Errorf("sign IDevID: %w", err)
	}
	return token.StoreCertificate(ctx, IDevIDLabel, IDevIDID, cert)
}

// StoreCertificate writes a DER certificate with pkcs11-tool; id is hexadecimal.
func (token *Token) StoreCertificate(ctx context.Context, label, id string, der []byte) error {
	file, err := token.temporary("certificate.der", der)
	if err != nil {
		return err
	}
	_, err = token.PKCS11Tool(ctx, "--write-object", file, "--type", "cert", "--label", label, "--id", id)
	return err
}

// PKCS11Tool runs pkcs11-tool on the token, logged in, and returns its standard
// output.
func (token *Token) PKCS11Tool(ctx context.Context, args ...string) (string, error) {
	login := []string{"--module", token.ModulePath, "--token-label", token.Label, "--login", "--pin", "env:USER_PIN"}
	return token.Tool(ctx, "pkcs11-tool", append(login, args...)...)
}

// Tool runs a program with the token's environment and USER_PIN and SO_PIN in it,
// and returns its standard output.
func (token *Token) Tool(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(append(os.Environ(), token.Env()...), "USER_PIN="+token.PIN, "SO_PIN="+token.SOPIN)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s (make deps installs it): %w: %s", name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// initialising: two at once would take the same free slot.
var initialising sync.Mutex

func (token *Token) initialise(ctx context.Context) error {
	initialising.Lock()
	defer initialising.Unlock()
	slots, err := token.Tool(ctx, "pkcs11-tool", "--module", token.ModulePath, "--list-slots")
	if err != nil {
		return err
	}
	// "Slot 3 (0x3): SoftHSM slot ID 0x3\n  token state:   uninitialized"
	before, _, found := strings.Cut(slots, "uninitialized")
	if !found {
		return fmt.Errorf("no free slot: %s", slots)
	}
	index, _, _ := strings.Cut(before[strings.LastIndex(before, "Slot ")+len("Slot "):], " ")
	if _, err := token.Tool(ctx, "pkcs11-tool", "--module", token.ModulePath, "--init-token", "--slot-index", index,
		"--label", token.Label, "--so-pin", "env:SO_PIN"); err != nil {
		return err
	}
	_, err = token.Tool(ctx, "pkcs11-tool", "--module", token.ModulePath, "--token-label", token.Label,
		"--init-pin", "--so-pin", "env:SO_PIN", "--pin", "env:USER_PIN")
	return err
}

func (token *Token) temporary(name string, content []byte) (string, error) {
	path := filepath.Join(token.files, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return "", fmt.Errorf("write %s: %w", name, err)
	}
	return path, nil
}

// store is the store that all tokens of a test binary share: SOFTHSM2_CONF
// belongs to the process, so there cannot be two for the process itself.
type store struct {
	mu        sync.Mutex
	users     int
	dir, conf string
	previous  string
	hadOne    bool
}

var shared store

func (s *store) join(t testing.TB) (dir, conf string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users == 0 {
		root, err := os.MkdirTemp("", "softhsm-*") // not t.TempDir: other tests may join
		if err != nil {
			t.Fatal(err)
		}
		s.dir, s.conf = newStore(t, root)
		s.previous, s.hadOne = os.LookupEnv(confVariable)
		if err := os.Setenv(confVariable, s.conf); err != nil {
			t.Fatal(err)
		}
	}
	s.users++
	return s.dir, s.conf
}

func (s *store) leave(t testing.TB) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users--; s.users > 0 {
		return
	}
	if s.hadOne {
		_ = os.Setenv(confVariable, s.previous)
	} else {
		_ = os.Unsetenv(confVariable)
	}
	if err := os.RemoveAll(filepath.Dir(s.dir)); err != nil {
		t.Errorf("softhsm: remove the store: %v", err)
	}
}

func newStore(t testing.TB, root string) (dir, conf string) {
	t.Helper()
	dir, conf = filepath.Join(root, "tokens"), filepath.Join(root, "softhsm2.conf")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+dir+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, conf
}

// module finds libsofthsm2.so.
func module(t testing.TB) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/*/softhsm/libsofthsm2.so") // the pattern is well-formed
	for _, path := range append([]string{"/usr/lib/softhsm/libsofthsm2.so"}, found...) {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Fatal("softhsm: libsofthsm2.so is missing: make deps")
	return ""
}

func random(t testing.TB) string {
	t.Helper()
	b := make([]byte, 6)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}
