//go:build cgo

package pkcs11_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	p11 "github.com/miekg/pkcs11"

	"estenroll/engine"
	"estenroll/engine/enginetest"
	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/p11crash"
	"estenroll/engine/enginetest/p11fault"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/engine/pkcs11"
)

// faulty is a fresh token behind two modules: p11crash, which records the calls,
// and p11fault, which misbehaves on request. Each test has files of its own of
// them, for a module is loaded once a process and keeps its environment.
type faulty struct {
	opensc.Token
	module string // path of p11crash
	log    string
	faults string // directory
	locks  string

	dir    string                   // of the token's files
	add    func(label string) error // makes one more token
	damage func(t *testing.T, label string)
}

// newFaulty is one of SoftHSM.
func newFaulty(t *testing.T) *faulty {
	t.Helper()
	token := softhsm.New(t, softhsm.WithPIN("marker-7d20"))
	return faultySoftHSM(t, token, token.ModulePath)
}

// newRemoteFaulty is a faulty token whose real module is p11-kit's client: when its
// device is lost, the server's child has been killed.
func newRemoteFaulty(t *testing.T) *faulty {
	t.Helper()
	r := newRemote(t, softhsm.New(t, softhsm.WithPIN("marker-7d20")))
	f := faultySoftHSM(t, r.token, remoteModule(t))
	name, value, _ := strings.Cut(p11fault.KillsChildrenOf(r.server.Process.Pid), "=")
	t.Setenv(name, value)
	return f
}

func faultySoftHSM(t *testing.T, token *softhsm.Token, realModule string) *faulty {
	t.Helper()
	f := makeFaultyBefore(t, token.Token, realModule)
	f.dir, f.add = token.Dir, token.Add
	f.damage = func(t *testing.T, label string) { t.Helper(); damage(t, token.Dir, label) }
	return f
}

func makeFaulty(t *testing.T, token opensc.Token) *faulty {
	t.Helper()
	return makeFaultyBefore(t, token, token.ModulePath)
}

// makeFaultyBefore puts the two modules before another than the token's own.
func makeFaultyBefore(t *testing.T, token opensc.Token, realModule string) *faulty {
	t.Helper()
	f := &faulty{Token: token}
	f.Use(t)
	dir := t.TempDir()
	f.faults, f.log, f.locks = filepath.Join(dir, "faults"), filepath.Join(dir, "calls"), filepath.Join(dir, "run", "locks")
	if err := os.Mkdir(f.faults, 0o700); err != nil {
		t.Fatal(err)
	}
	modules := builtModules(t)
	fault := filepath.Join(dir, "p11fault.so")
	f.module = filepath.Join(dir, "p11crash.so")
	if err := errors.Join(os.WriteFile(fault, modules.fault, 0o700), os.WriteFile(f.module, modules.crash, 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, pair := range append(p11fault.Env(realModule, f.faults), (p11crash.Module{}).Env(fault, f.log, p11crash.Point{})...) {
		name, value, _ := strings.Cut(pair, "=")
		t.Setenv(name, value)
	}
	return f
}

type binaries struct{ crash, fault []byte }

var built binaries

// builtModules builds the two modules once. The tests that use them are not
// parallel.
func builtModules(t *testing.T) binaries {
	t.Helper()
	if built.fault != nil {
		return built
	}
	fault, err := p11fault.Build(t.TempDir())
	if err == nil {
		built.fault, err = os.ReadFile(fault)
	}
	if err == nil {
		built.crash, err = os.ReadFile(p11crash.Build(t).Path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return built
}

func (f *faulty) uri(label, query string) string {
	return fmt.Sprintf("pkcs11:token=%s?module-path=%s%s", label, f.module, query)
}

func (f *faulty) options() engine.Options { return engine.Options{LockDir: f.locks} }

// calls returns the functions that were called, in their order.
func (f *faulty) calls(t *testing.T) []string {
	t.Helper()
	if _, err := os.Stat(f.log); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var names []string
	for _, point := range p11crash.ReadLog(t, f.log) {
		if point.When == p11crash.Before {
			names = append(names, point.Function)
		}
	}
	return names
}

func (f *faulty) set(t *testing.T, name, content string) {
	t.Helper()
	path := filepath.Join(f.faults, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(path) }) // the module removes most of them itself
}

func (f *faulty) inject(t *testing.T, fault enginetest.Fault) {
	t.Helper()
	switch fault {
	case enginetest.FaultExtractable:
		f.set(t, "extractable", "")
	case enginetest.FaultWeaker:
		f.set(t, "weaker", "")
	case enginetest.FaultUnsupported:
		f.set(t, "return", fmt.Sprintf("C_GenerateKeyPair before %d", p11.CKR_MECHANISM_INVALID))
	case enginetest.FaultFailGenerate:
		f.set(t, "return", fmt.Sprintf("C_GenerateKeyPair after %d", p11.CKR_GENERAL_ERROR))
	case enginetest.FaultRefuseKey:
		f.set(t, "return", fmt.Sprintf("C_CreateObject before %d", p11.CKR_TEMPLATE_INCONSISTENT))
	case enginetest.FaultFailKey:
		f.set(t, "return", fmt.Sprintf("C_CreateObject after %d", p11.CKR_GENERAL_ERROR))
	case enginetest.FaultFinalTry:
		f.set(t, "flags", fmt.Sprint(p11.CKF_USER_PIN_FINAL_TRY))
	case enginetest.FaultLocked:
		f.set(t, "flags", fmt.Sprint(p11.CKF_USER_PIN_LOCKED))
	case enginetest.FaultReadOnly:
		f.set(t, "flags", fmt.Sprint(p11.CKF_WRITE_PROTECTED))
	default:
		t.Fatalf("no such fault: %s", fault)
	}
}

// damage cuts the file of a certificate off before its value, as a SIGKILL
// inside SoftHSM's writing of it does: the attributes stand there in order.
func damage(t *testing.T, dir, label string) {
	t.Helper()
	path, content := objectFile(t, dir, label)
	value := bytes.Index(content, []byte{0x30, 0x82}) // the certificate's SEQUENCE
	if value < 0 {
		t.Fatalf("%s: no certificate", path)
	}
	const head = 3 * 8 // type, kind and size of the attribute
	if err := os.Truncate(path, int64(value-head)); err != nil {
		t.Fatal(err)
	}
}

// objectFile finds the file of a public object by its label.
func objectFile(t *testing.T, dir, label string) (path string, content []byte) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*", "*.object"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Base(file) != "token.object" && bytes.Contains(content, []byte(label)) {
			return file, content
		}
	}
	t.Fatalf("no object %q in %s", label, dir)
	return "", nil
}

func (f *faulty) token() enginetest.Token {
	token := enginetest.Token{
		Driver: pkcs11.Driver, Options: f.options(), Module: f.module, PIN: f.PIN, PINFile: f.PINFile,
		Address:    f.uri(f.Label, "&pin-source=file:"+f.PINFile),
		WithoutPIN: f.uri(f.Label, ""), WithPIN: f.uri(f.Label, "&pin-value="+f.PIN),
		Calls: f.calls, Inject: f.inject, Damage: f.damage,
		LoseAfter:  func(t *testing.T, function string) { t.Helper(); f.set(t, "lose", function) },
		Algorithms: engine.Algorithms(),
		GenerateEC: f.GenerateEC, WriteCertificate: f.WriteCertificate,
		GenerateDecryption: f.GenerateDecryption, WriteSecret: f.WriteSecret,
		GenerateForeign: func(label, id string) error {
			_, err := f.Tool("--keypairgen", "--key-type", "EC:edwards25519", "--usage-sign", "--label", label, "--id", id)
			return err
		},
		Delete: func(class engine.Class, id string) error {
			name := map[engine.Class]string{engine.ClassPrivateKey: "privkey", engine.ClassPublicKey: "pubkey", engine.ClassCertificate: "cert"}[class]
			_, err := f.Tool("--delete-object", "--type", name, "--id", id)
			return err
		},
	}
	token.Another = func(t *testing.T) enginetest.Token {
		t.Helper()
		if err := f.add("another"); err != nil {
			t.Fatal(err)
		}
		another := *f
		another.Label = "another"
		return another.token()
	}
	return token
}

// TestSoftHSM holds the driver to the rules, on SoftHSM2.
func TestSoftHSM(t *testing.T) {
	enginetest.Run(t, enginetest.Harness{New: func(t *testing.T) enginetest.Token { return newFaulty(t).token() }})
}

// TestRemoteSoftHSM holds the driver to the same rules where the token is behind
// p11-kit's remoting, and what is lost is the server's child, by a signal.
func TestRemoteSoftHSM(t *testing.T) {
	enginetest.Run(t, enginetest.Harness{New: func(t *testing.T) enginetest.Token {
		token := newRemoteFaulty(t).token()
		// Measured: p11-kit 0.24 passes no CKM_AES_KEY_WRAP_PAD on (CKR_MECHANISM_INVALID).
		token.NoUnwrap = true
		// Nor CKM_AES_KEY_WRAP.
		token.NoKEK = true
		return token
	}})
}
