//go:build cgo

package pkcs11_test

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"estenroll/engine"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/engine/pkcs11"
)

func open(t *testing.T, address string, opts engine.Options) *pkcs11.Engine {
	t.Helper()
	at, err := pkcs11.Driver.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	e, err := pkcs11.Driver.Open(t.Context(), at, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return e.(*pkcs11.Engine)
}

func options(t *testing.T) engine.Options {
	t.Helper()
	return engine.Options{LockDir: filepath.Join(t.TempDir(), "locks")}
}

func generate(t *testing.T, e engine.Engine, label string) (engine.Address, crypto.PublicKey) {
	t.Helper()
	at, err := e.NewKeyAddress(label)
	if err != nil {
		t.Fatal(err)
	}
	public, err := e.GenerateKey(t.Context(), at, engine.KeySpec{})
	if err != nil {
		t.Fatal(err)
	}
	return at, public
}

func sign(signer crypto.Signer) error {
	digest := sha256.Sum256([]byte("to be signed"))
	signature, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], signature) {
		return errors.New("the signature does not verify")
	}
	return nil
}

// remoteModule is p11-kit's client, wherever the machine's architecture has it.
func remoteModule(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/pkcs11/p11-kit-client.so")
	if err != nil || len(found) == 0 {
		t.Fatalf("p11-kit-client.so is missing: make deps: %v", err)
	}
	return found[0]
}

// remote is a token behind "p11-kit server": each client has a child of the
// server, and when it is killed the device has vanished.
type remote struct {
	token  *softhsm.Token
	socket string
	server *exec.Cmd
}

func newRemote(t *testing.T, token *softhsm.Token) *remote {
	t.Helper()
	// Measured: p11-kit-client.so 0.24 reads its server's address once in a
	// process, so that is the same for every run of a test. A socket's path is short.
	dir := filepath.Join(os.TempDir(), "p11-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r := &remote{token: token, socket: filepath.Join(dir, "socket")}
	t.Setenv("P11_KIT_SERVER_ADDRESS", "unix:path="+r.socket)
	r.start(t)
	t.Cleanup(func() { r.stop(t) })
	return r
}

func (r *remote) start(t *testing.T) {
	t.Helper()
	r.server = exec.Command("p11-kit", "server", "--foreground", "--name", r.socket, "--provider", r.token.ModulePath, "pkcs11:")
	r.server.Env = append(os.Environ(), r.token.Env()...)
	r.server.Env = append(r.server.Env, "XDG_RUNTIME_DIR="+filepath.Dir(r.socket))
	stdout, err := r.server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.server.Start(); err != nil {
		t.Fatalf("%v: make deps", err)
	}
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "P11_KIT_SERVER_PID") { // the last thing it says before it accepts
			return
		}
	}
	t.Fatal("p11-kit server says nothing")
}

func (r *remote) stop(t *testing.T) {
	t.Helper()
	r.vanish(t)
	_ = r.server.Process.Kill()
	_ = r.server.Wait()
	if err := os.Remove(r.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// vanish kills the children of the server and returns how many there were.
func (r *remote) vanish(t *testing.T) int {
	t.Helper()
	pid := r.server.Process.Pid
	list, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	for _, child := range strings.Fields(string(list)) {
		number, err := strconv.Atoi(child)
		if err != nil {
			t.Fatal(err)
		}
		switch err := syscall.Kill(number, syscall.SIGKILL); {
		case err == nil:
			killed++
		case !errors.Is(err, syscall.ESRCH): // one whose client has closed ends by itself
			t.Fatal(err)
		}
	}
	return killed
}

func TestDeviceVanishes(t *testing.T) {
	r := newRemote(t, softhsm.New(t))
	e := open(t, fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=%s", r.token.Label, remoteModule(t), r.token.PINFile), options(t))
	at, public := generate(t, e, "name")
	signer, err := e.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		if err := sign(signer); err != nil {
			t.Fatal(err)
		}
		if n := r.vanish(t); n != 1 {
			t.Fatalf("round %d: %d children, want one connection", round, n)
		}
	}
	// by each way back
	if _, err := e.Signer(t.Context(), at); err != nil {
		t.Error(err)
	}
	r.vanish(t)
	if objects, err := e.List(t.Context(), nil); err != nil || len(objects) != 2 {
		t.Errorf("%v, %v", objects, err)
	}
	r.vanish(t)
	if got, err := e.RecoverKey(t.Context(), at); err != nil || !public.(*ecdsa.PublicKey).Equal(got) {
		t.Errorf("%v, %v", got, err)
	}
	r.vanish(t)
	generate(t, e, "other") // its first call only reads

	// gone altogether, and back
	r.stop(t)
	for range 2 {
		if err := sign(signer); !errors.Is(err, engine.ErrDeviceLost) {
			t.Errorf("got %v, want ErrDeviceLost", err)
		}
	}
	r.start(t)
	if err := sign(signer); err != nil {
		t.Error(err)
	}
	r.vanish(t)
	if err := e.Close(); err != nil {
		t.Errorf("close without a device: %v", err)
	}
}

// helperVar names what a copy of this test binary shall do instead of testing.
const helperVar = "PKCS11_TEST_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperVar) != "" {
		if err := helper(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// helper opens the token of its arguments again and again and writes to it.
func helper() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	at, err := pkcs11.ParseURI(os.Args[1])
	if err != nil {
		return err
	}
	for round := range 5 {
		e, err := pkcs11.Driver.Open(ctx, at, engine.Options{LockDir: os.Args[2]})
		if err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		for range 3 {
			key, err := e.NewKeyAddress("name")
			if err != nil {
				return err
			}
			if _, err := e.GenerateKey(ctx, key, engine.KeySpec{}); err != nil {
				return err
			}
			signer, err := e.Signer(ctx, key)
			if err != nil {
				return err
			}
			if err := sign(signer); err != nil {
				return err
			}
			if err := e.RemoveKey(ctx, key); err != nil {
				return err
			}
		}
		if _, err := e.(engine.Lister).List(ctx, nil); err != nil {
			return err
		}
		if err := e.Close(); err != nil {
			return err
		}
	}
	return nil
}

// Two programs that open a token, log in and write at once do not fail:
// without the lock SoftHSM answers CKR_GENERAL_ERROR now and then.
func TestTwoProcesses(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	opts := options(t)
	var processes []*exec.Cmd
	var outputs []*strings.Builder
	for range 3 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], token.URI(), opts.LockDir)
		cmd.Env = append(os.Environ(), helperVar+"=1")
		output := new(strings.Builder)
		cmd.Stderr = output
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		processes, outputs = append(processes, cmd), append(outputs, output)
	}
	for i, cmd := range processes {
		if err := cmd.Wait(); err != nil {
			t.Errorf("process %d: %v\n%s", i, err, outputs[i])
		}
	}
	e := open(t, token.URI(), opts)
	if objects, err := e.List(t.Context(), nil); err != nil || len(objects) != 0 {
		t.Errorf("left behind: %v, %v", objects, err)
	}
}
