// Package tpm makes tokens in a TPM 2.0 for tests: tpm2-pkcs11 over the software
// TPM swtpm. It needs the Debian packages libtpm2-pkcs11-1, libtss2-tcti-tabrmd0,
// swtpm, tpm2-abrmd, tpm2-tools, dbus-daemon and opensc, neither a privilege nor the
// system's D-Bus, and no line of the product.
//
// A TPM has room for three loaded objects. Measured: directly on swtpm a token is
// not made ("out of memory for object contexts"), so that the resource manager
// tpm2-abrmd stands between, on a D-Bus of its own.
//
// The TPM holds one key; all else of a token is in its store, a directory.
package tpm

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"estenroll/engine/enginetest/opensc"
)

// TPM is a software TPM and what leads to it. It ends with its test.
type TPM struct {
	environment []string
}

// Token is a token with a store of its own, in a directory that goes with its test.
type Token struct {
	opensc.Token
	Store string // holds all of the token's files

	tokens int // in the store
}

// Option changes a token before it is made.
type Option func(*Token)

// WithLabel names the token. Default: "device".
func WithLabel(label string) Option { return func(t *Token) { t.Label = label } }

// WithPIN sets the user PIN. Default: "4711-user".
func WithPIN(pin string) Option { return func(t *Token) { t.PIN = pin } }

// starting bounds the start of each program.
const starting = 30 * time.Second

// Start starts a TPM that is new.
func Start(t testing.TB) *TPM {
	t.Helper()
	dir := t.TempDir()
	port, err := startTPM(t, dir)
	if err != nil {
		t.Fatalf("tpm: %v", err)
	}
	bus, err := startBus(t, dir)
	if err != nil {
		t.Fatalf("tpm: %v", err)
	}
	tpm := &TPM{environment: []string{
		"DBUS_SESSION_BUS_ADDRESS=" + bus,
		"TPM2_PKCS11_TCTI=tabrmd:bus_type=session", "TPM2TOOLS_TCTI=tabrmd:bus_type=session",
		// Nothing of what the libraries say of every refusal, on standard error.
		"TPM2_PKCS11_LOG_LEVEL=0", "TSS2_LOG=all+none",
	}}
	if err := tpm.startBroker(t, port); err != nil {
		t.Fatalf("tpm: %v", err)
	}
	return tpm
}

// process is a program that was started, and ends with its test.
type process struct {
	name   string
	output bytes.Buffer // to be read when it has ended
	ended  chan struct{}
}

func start(t testing.TB, cmd *exec.Cmd) (*process, error) {
	p := &process{name: filepath.Base(cmd.Path), ended: make(chan struct{})}
	cmd.Stderr = &p.output
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: make deps", err)
	}
	go func() {
		_ = cmd.Wait() // it is killed
		close(p.ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // unless it has ended
		<-p.ended
	})
	return p, nil
}

// await waits until a program is ready.
func (p *process) await(ready func() bool) error {
	pause := time.NewTicker(5 * time.Millisecond)
	defer pause.Stop()
	for end := time.After(starting); ; {
		if ready() {
			return nil
		}
		select {
		case <-p.ended:
			return fmt.Errorf("%s has ended: %s", p.name, &p.output)
		case <-end:
			return fmt.Errorf("%s is not ready after %s", p.name, starting)
		case <-pause.C:
		}
	}
}

// startTPM starts swtpm on a port of 127.0.0.1 and the next one, which are the
// ones that its clients ask for.
func startTPM(t testing.TB, dir string) (port int, err error) {
	for range 10 { // it opens them itself, and another program may be faster
		if port, err = twoPorts(); err != nil {
			return 0, err
		}
		var swtpm *process
		swtpm, err = start(t, exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--flags", "not-need-init,startup-clear",
			"--server", fmt.Sprintf("type=tcp,bindaddr=127.0.0.1,port=%d", port),
			"--ctrl", fmt.Sprintf("type=tcp,bindaddr=127.0.0.1,port=%d", port+1)))
		if err != nil {
			return 0, err
		}
		err = swtpm.await(func() bool {
			conn, err := net.Dial("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
			return err == nil && conn.Close() == nil
		})
		if err == nil {
			return port, nil
		}
	}
	return 0, err
}

// twoPorts finds a port of which the next one is free too.
func twoPorts() (int, error) {
	var first net.Listener
	var err error
	for range 100 {
		if first, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
			return 0, err
		}
		port := first.Addr().(*net.TCPAddr).Port
		second, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port+1)))
		if err := first.Close(); err != nil {
			return 0, err
		}
		if err == nil {
			return port, second.Close()
		}
	}
	return 0, errors.New("no two ports in a row are free")
}

const busConfiguration = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:dir=%s</listen>
  <policy context="default">
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
  </policy>
</busconfig>
`

// startBus starts a D-Bus and returns its address.
func startBus(t testing.TB, dir string) (address string, err error) {
	sockets, err := os.MkdirTemp("", "tpm-") // the path of a socket is short
	if err != nil {
		return "", err
	}
	t.Cleanup(func() { _ = os.RemoveAll(sockets) })
	configuration := filepath.Join(dir, "bus.conf")
	if err := os.WriteFile(configuration, fmt.Appendf(nil, busConfiguration, sockets), 0o600); err != nil {
		return "", err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer read.Close() // nothing more is written
	daemon := exec.Command("dbus-daemon", "--config-file="+configuration, "--nofork", "--nopidfile", "--print-address=1")
	daemon.Stdout = write
	bus, err := start(t, daemon)
	if err := errors.Join(err, write.Close()); err != nil {
		return "", err
	}
	address, err = bufio.NewReader(read).ReadString('\n')
	if err != nil {
		<-bus.ended
		return "", fmt.Errorf("dbus-daemon gives no address: %w: %s", err, &bus.output)
	}
	return strings.TrimSpace(address), nil
}

// startBroker starts tpm2-abrmd and waits until the TPM answers behind it.
func (tpm *TPM) startBroker(t testing.TB, port int) error {
	path, err := exec.LookPath("tpm2-abrmd")
	if err != nil {
		path = "/usr/sbin/tpm2-abrmd" // which is in few people's PATH
	}
	daemon := exec.Command(path, "--session", "--allow-root", fmt.Sprintf("--tcti=swtpm:host=127.0.0.1,port=%d", port))
	daemon.Env = append(os.Environ(), tpm.environment...)
	broker, err := start(t, daemon)
	if err != nil {
		return err
	}
	return broker.await(func() bool {
		ask := exec.Command("tpm2_getrandom", "1")
		ask.Env = daemon.Env
		return ask.Run() == nil
	})
}

// New makes a token. The TPM forgets the wrong PINs of earlier ones.
func (tpm *TPM) New(t testing.TB, options ...Option) *Token {
	t.Helper()
	dir := t.TempDir()
	store := filepath.Join(dir, "store")
	token := &Token{Store: store, Token: opensc.Token{
		ModulePath: ModulePath(t), Label: "device", PIN: "4711-user", PINFile: filepath.Join(dir, "pin"), SOPIN: "4711-officer",
		Environment: append(tpm.environment[:len(tpm.environment):len(tpm.environment)], "TPM2_PKCS11_STORE="+store),
	}}
	for _, option := range options {
		option(token)
	}
	err := errors.Join(
		os.Mkdir(token.Store, 0o700),
		os.WriteFile(token.PINFile, []byte(token.PIN+"\n"), 0o600),
	)
	if err == nil {
		err = errors.Join(token.Unlock(), token.Add(token.Label))
	}
	if err != nil {
		t.Fatalf("tpm: %v", err)
	}
	return token
}

// ModulePath finds tpm2-pkcs11's module.
func ModulePath(t testing.TB) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/pkcs11/libtpm2_pkcs11.so")
	if err != nil || len(found) == 0 {
		t.Fatalf("tpm: libtpm2_pkcs11.so is missing: make deps: %v", err)
	}
	return found[0]
}

// Add makes one more token in the same store, with the same PINs, and perhaps
// with the same label. Its serial number is that of every other.
func (t *Token) Add(label string) error {
	officer := []string{"--module", t.ModulePath, "--slot-index", strconv.Itoa(t.tokens), "--so-pin", "env:SO_PIN"}
	// The last slot is always blank.
	if _, err := t.Run("pkcs11-tool", append(officer, "--init-token", "--label", label)...); err != nil {
		return err
	}
	_, err := t.Run("pkcs11-tool", append(officer, "--login", "--login-type", "so", "--init-pin", "--new-pin", "env:PIN")...)
	t.tokens++
	return err
}

// Unlock makes the TPM forget wrong PINs: it refuses every one after three.
func (t *Token) Unlock() error {
	_, err := t.Run("tpm2_dictionarylockout", "--clear-lockout")
	return err
}
