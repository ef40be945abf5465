// Package enginetest is the suite that every engine driver passes: each rule of
// DESIGN.md §5 that is a driver's is a sub-test named like the rule. A driver's
// own tests hand it a [Harness], which makes tokens and misfortunes.
package enginetest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll/engine"
)

// Fault is a way in which a token misbehaves.
type Fault string

// The faults that a Token may be able to inject.
const (
	// FaultExtractable: every key that is generated is extractable, whatever was asked for.
	FaultExtractable Fault = "extractable"
	// FaultWeaker: every key that is generated is on P-256 or has 2048 bits.
	FaultWeaker Fault = "weaker"
	// FaultUnsupported: the token cannot generate keys.
	FaultUnsupported Fault = "unsupported"
	// FaultFailGenerate: the token makes a pair and reports a general error.
	FaultFailGenerate Fault = "fail-generate"
	// FaultRefuseKey: the token refuses to create an object, once.
	FaultRefuseKey Fault = "refuse-key"
	// FaultFailKey: the token creates an object and reports a general error, once.
	FaultFailKey Fault = "fail-key"
	// FaultFinalTry, FaultLocked and FaultReadOnly are flags that the token shows.
	FaultFinalTry Fault = "final-try"
	FaultLocked   Fault = "locked"
	FaultReadOnly Fault = "read-only"
)

// Token is a fresh token, without objects, and what can be done to it from
// outside. Each call of Harness.New makes another one.
type Token struct {
	Driver  engine.Driver
	Address string // with the PIN file as the source of its PIN
	Options engine.Options
	Module  string // the name that errors carry

	// PIN is the right one, PINFile the file that holds it; the suite writes others.
	PIN, PINFile string
	// WithoutPIN is the address without any PIN, WithPIN the one that holds it itself.
	WithoutPIN, WithPIN string

	// Calls returns the names of the calls into the module so far, in their order.
	Calls func(t *testing.T) []string
	// Inject makes the token misbehave until the test ends.
	Inject func(t *testing.T, fault Fault)
	// LoseAfter makes the device vanish once, after the next call of a function has
	// done its work. It is back when the module has been finalised.
	LoseAfter func(t *testing.T, function string)
	// Damage leaves of the certificate with a label what a crash in the middle of
	// its writing would have left. No engine is open on the token.
	Damage func(t *testing.T, label string)
	// Another makes one more token of the same module.
	Another func(t *testing.T) Token
	// Algorithms are those that the token can generate: what is true of a key is
	// tested for each of them. Unsupported are all others, of which it says so: a
	// token that suddenly can, or fails otherwise, fails the suite.
	Algorithms, Unsupported []engine.Algorithm
	// Stale says that the module shows what another program has done to the token
	// only when it starts anew. One that suddenly does at once fails the suite.
	Stale bool
	// NoImport says that the token takes in no private key, as it is or wrapped: one
	// that suddenly does fails the suite.
	NoImport bool
	// NoUnwrap says that it takes in none that is wrapped.
	NoUnwrap bool
	// NoDecryption says that an RSA key for decryption is of no use in the token, NoKEK
	// that a secret key is not: one that suddenly is fails the suite.
	NoDecryption, NoKEK bool
	// ImplicitRejection says that the token makes something up of a wrong padding
	// instead of reporting it. One that suddenly reports it fails the suite.
	ImplicitRejection bool
	// Unique says that the token refuses a certificate that it holds already: one
	// that suddenly takes it fails the suite.
	Unique bool
	// The foreign tool: another program that uses the token. Identifiers are hexadecimal.
	GenerateEC func(label, id string) (publicKeyDER []byte, err error)
	// GenerateForeign makes a pair of a kind that no engine has: Ed25519, RSA 1024.
	GenerateForeign  func(label, id string) error
	WriteCertificate func(der []byte, label, id string) error
	// GenerateDecryption makes an RSA pair for decryption, which may sign too.
	GenerateDecryption func(label, id string, signs bool) error
	// WriteSecret stores an AES key that unwraps; nil where the tool has no way.
	WriteSecret func(secret []byte, label, id string) error
	Delete      func(class engine.Class, id string) error
}

// Harness is what the suite needs of a driver.
type Harness struct {
	New func(t *testing.T) Token
	// Without are the rules that say nothing of this driver, each with the reason: it
	// has no PIN, say. A name that is no rule's fails the suite.
	Without map[string]string
}

// Run runs the suite. The tests are not parallel: a module is one for a process.
func Run(t *testing.T, h Harness) {
	before := runtime.NumGoroutine()
	rules := slices.Concat(keyRules, importRules, decryptRules, certificateRules, pinRules, deviceRules)
	for name := range h.Without {
		if !slices.ContainsFunc(rules, func(r rule) bool { return r.name == name }) && !slices.ContainsFunc(algorithmRules, func(r algorithmRule) bool { return r.name == name }) {
			t.Errorf("no rule is named %q", name)
		}
	}
	for _, rule := range rules {
		if h.Without[rule.name] != "" {
			continue
		}
		t.Run(rule.name, func(t *testing.T) { rule.test(&suite{T: t, Token: h.New(t)}) })
	}
	t.Run("algorithm", func(t *testing.T) { runAlgorithms(t, h) })
	t.Run("no goroutine is left behind", func(t *testing.T) {
		// One more runs this function; one that has done its work may not be gone yet.
		for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before+1 && time.Now().Before(end); {
			runtime.Gosched()
		}
		if runtime.NumGoroutine() <= before+1 {
			return
		}
		stacks := make([]byte, 1<<20)
		t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
	})
}

type rule struct {
	name string
	test func(*suite)
}

// suite is one rule's test with its token.
type suite struct {
	*testing.T
	Token
}

// opened is an engine with all its abilities.
type opened struct {
	engine.Engine
	engine.KeyRecoverer
	engine.KeyInspector
	engine.CertificateStore
	engine.Lister
}

func (s *suite) parse(address string) engine.Address {
	s.Helper()
	at, err := s.Driver.Parse(address)
	if err != nil {
		s.Fatal(err)
	}
	return at
}

// try opens the token at an address; the caller closes it.
func (s *suite) try(address string, opts engine.Options) (engine.Engine, error) {
	s.Helper()
	return s.Driver.Open(s.Context(), s.parse(address), opts)
}

// open opens the token and closes it when the test ends.
func (s *suite) open() opened {
	s.Helper()
	e, err := s.try(s.Address, s.Options)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		if err := e.Close(); err != nil {
			s.Errorf("close: %v", err)
		}
	})
	o := opened{Engine: e}
	var ok [4]bool
	o.KeyRecoverer, ok[0] = e.(engine.KeyRecoverer)
	o.KeyInspector, ok[1] = e.(engine.KeyInspector)
	o.CertificateStore, ok[2] = e.(engine.CertificateStore)
	o.Lister, ok[3] = e.(engine.Lister)
	if ok != [4]bool{true, true, true, true} {
		s.Fatalf("the engine lacks an ability: recover, inspect, certificates, list: %v", ok)
	}
	return o
}

func (s *suite) close(e opened) {
	s.Helper()
	if err := e.Close(); err != nil {
		s.Fatalf("close: %v", err)
	}
}

// elsewhere has another program do something to the token, and returns an engine
// that sees it.
func (s *suite) elsewhere(e opened, do func() error) opened {
	s.Helper()
	if err := do(); err != nil {
		s.Fatal(err)
	}
	if !s.Stale {
		return e
	}
	s.close(e)
	return s.open()
}

func (s *suite) generate(e opened, label string) (engine.Address, crypto.PublicKey) {
	s.Helper()
	at, err := e.NewKeyAddress(label)
	if err != nil {
		s.Fatal(err)
	}
	public, err := e.GenerateKey(s.Context(), at, engine.KeySpec{})
	if err != nil {
		s.Fatal(err)
	}
	if algorithm := engine.AlgorithmOf(public); algorithm != engine.ECP256 {
		s.Errorf("the default is %s, want %s", algorithm, engine.ECP256)
	}
	return at, public
}

// signs wants a working signer for a public key at an address.
func (s *suite) signs(e opened, at engine.Address, public crypto.PublicKey) crypto.Signer {
	s.Helper()
	signer, err := e.Signer(s.Context(), at)
	if err != nil {
		s.Fatal(err)
	}
	s.signsWith(signer, public)
	return signer
}

func (s *suite) signsWith(signer crypto.Signer, public crypto.PublicKey) {
	s.Helper()
	s.signsAs(signer, public, crypto.SHA256)
}

// signsAs wants a signature over a digest of the options' hash, which the
// standard library verifies.
func (s *suite) signsAs(signer crypto.Signer, public crypto.PublicKey, opts crypto.SignerOpts) {
	s.Helper()
	h := opts.HashFunc().New()
	h.Write([]byte("to be signed"))
	digest := h.Sum(nil)
	signature, err := signer.Sign(rand.Reader, digest, opts)
	if err != nil {
		s.Fatal(err)
	}
	verified := false
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		verified = ecdsa.VerifyASN1(key, digest, signature) && key.Equal(signer.Public())
	case *rsa.PublicKey:
		if pss, ok := opts.(*rsa.PSSOptions); ok {
			err = rsa.VerifyPSS(key, opts.HashFunc(), digest, signature, pss)
		} else {
			err = rsa.VerifyPKCS1v15(key, opts.HashFunc(), digest, signature)
		}
		verified = err == nil && key.Equal(signer.Public())
	}
	if !verified {
		s.Errorf("the signature is not that of the key: %v", err)
	}
}

// wants wants an error that is the sentinel, has an engine's form, and does not
// hold the PIN.
func (s *suite) wants(err, sentinel error) {
	s.Helper()
	var form *engine.Error
	switch {
	case err == nil:
		s.Errorf("no error, want %v", sentinel)
	case sentinel != nil && !errors.Is(err, sentinel):
		s.Errorf("got %v, want %v", err, sentinel)
	case !errors.As(err, &form):
		s.Errorf("%v is not an *engine.Error", err)
	case s.PIN != "" && strings.Contains(err.Error(), s.PIN):
		s.Errorf("the PIN is in %v", err)
	}
}

func (s *suite) list(e opened) []engine.Object {
	s.Helper()
	objects, err := e.List(s.Context(), nil)
	if err != nil {
		s.Fatal(err)
	}
	return objects
}

// holds wants a number of objects of each class in the token.
func (s *suite) holds(e opened, private, public, certs int) {
	s.Helper()
	count := map[engine.Class]int{}
	objects := s.list(e)
	for _, object := range objects {
		count[object.Class]++
	}
	if count[engine.ClassPrivateKey] != private || count[engine.ClassPublicKey] != public || count[engine.ClassCertificate] != certs {
		s.Errorf("got %v, want %d private, %d public, %d certificates", objects, private, public, certs)
	}
}

func (s *suite) count(function string) int {
	s.Helper()
	n := 0
	for _, name := range s.Calls(s.T) {
		if name == function {
			n++
		}
	}
	return n
}

func (s *suite) counts(function string, want int) {
	s.Helper()
	if got := s.count(function); got != want {
		s.Errorf("%d calls of %s, want %d", got, function, want)
	}
}

func (s *suite) writePIN(content string) {
	s.Helper()
	if err := os.WriteFile(s.PINFile, []byte(content), 0o600); err != nil {
		s.Fatal(err)
	}
}

func (s *suite) place(e opened, key engine.Address, chain ...*x509.Certificate) []engine.Address {
	s.Helper()
	at, err := e.CertificateAddresses(s.Context(), key, chain)
	if err != nil {
		s.Fatal(err)
	}
	if len(at) != len(chain) {
		s.Fatalf("%d addresses for %d certificates", len(at), len(chain))
	}
	return at
}

func (s *suite) store(e opened, key engine.Address, chain ...*x509.Certificate) []engine.Address {
	s.Helper()
	at := s.place(e, key, chain...)
	if err := e.StoreCertificates(s.Context(), at, chain); err != nil {
		s.Fatal(err)
	}
	for i, cert := range chain {
		s.finds(e, at[i], cert)
	}
	return at
}

func (s *suite) finds(e opened, at engine.Address, want *x509.Certificate) {
	s.Helper()
	got, err := e.Certificate(s.Context(), at)
	if err != nil {
		s.Error(err)
	} else if !got.Equal(want) {
		s.Errorf("%s: another certificate", at)
	}
}

func (s *suite) remove(e opened, at []engine.Address) {
	s.Helper()
	if err := e.RemoveCertificates(s.Context(), at); err != nil {
		s.Fatal(err)
	}
}

func cancelled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}
