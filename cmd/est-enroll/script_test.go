package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/engine/enginetest/tpm"
	"estenroll/testserver/globalsigntest"
)

// markerPIN is the PIN of every token in the scripts: it must never be seen.
const markerPIN = "marker-4f1d9c"

// transcriptVar names the file that the scripts' est-enroll copies its argument
// list and its output to, for the search for the marker. It is read by the test
// binary alone: the program does not know it.
const transcriptVar = "TRANSCRIPT"

// withoutSleep is for programs that are this test binary: the race detector has each
// sleep for a second before it exits, which was most of the time of the scripts.
const withoutSleep = "atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	if err := os.Setenv("GORACE", withoutSleep); err != nil {
		panic(err)
	}
	testscript.Main(cleaning{m}, map[string]func(){"est-enroll": recordedMain, "bare-enrolment": bareEnrolmentMain, "token-dump": dumpToken})
}

// cleaning removes the built programs after the tests.
type cleaning struct{ *testing.M }

func (c cleaning) Run() int {
	code := c.M.Run()
	if dir, err := programs(); err == nil {
		_ = os.RemoveAll(dir) // a directory of ours in the temporary one
	}
	return code
}

// recordedMain is main with a transcript.
func recordedMain() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	transcript, err := os.OpenFile(os.Getenv(transcriptVar), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	cmdline, err := os.ReadFile("/proc/self/cmdline")
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(transcript, "$ %q\n", cmdline)
	os.Exit(run(ctx, os.Args[1:], io.MultiWriter(os.Stdout, transcript), io.MultiWriter(os.Stderr, transcript)))
}

// programs builds the programs under test once, as they ship.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "est-enroll-test-")
	if err != nil {
		return "", err
	}
	build := exec.Command("go", "build", "-trimpath", "-o", dir+"/", "estenroll/cmd/...")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", build, err, out)
	}
	return dir, nil
})

// estserver builds that of globalsign/est once.
var estserver = sync.OnceValues(func() (string, error) { return globalsignProgram(globalsigntest.Server) })

func globalsignProgram(name string) (string, error) {
	dir, err := programs()
	if err != nil {
		return "", err
	}
	return globalsigntest.Build(dir, name)
}

func builtPrograms(t *testing.T) string {
	t.Helper()
	dir, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestScripts runs each story of testdata/script with a token of its own, and
// then looks for the PIN in everything that it left.
func TestScripts(t *testing.T) { runScripts(t, storyFiles(t), false) }

var everyStory = flag.Bool("https.all", false, "live every story over HTTPS, not a sample")

// TestScriptsOverHTTPS runs the stories that were written over CoAPs at a server's HTTPS
// door: to the lifecycle and its commands it is all one. "make https" runs all of them.
func TestScriptsOverHTTPS(t *testing.T) {
	sample := []string{"refused", "rollover", "two_runs"}
	alone := []string{"discovery", "discovery_elsewhere", "psk"} // of CoAPs: HTTPS has neither
	files := slices.DeleteFunc(storyFiles(t), func(file string) bool {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := storyName(file)
		return bytes.Contains(text, []byte("--listen-https")) || slices.Contains(alone, name) || !*everyStory && !slices.Contains(sample, name)
	})
	if len(files) < len(sample) {
		t.Fatalf("%d stories: %q", len(files), files)
	}
	runScripts(t, files, true)
}

func storyFiles(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/script/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	return files
}

func storyName(file string) string { return strings.TrimSuffix(filepath.Base(file), ".txt") }

func runScripts(t *testing.T, files []string, overHTTPS bool) {
	for _, file := range files {
		name := storyName(file)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSession(t, name)
			s.overHTTPS = overHTTPS
			testscript.Run(t, testscript.Params{
				Files: []string{file}, RequireExplicitExec: true, RequireUniqueNames: true,
				Setup: s.setup, Cmds: s.commands(),
			})
		})
	}
}

// newSession makes a token for a script: of SoftHSM, or in a TPM where the script's
// name begins with that.
func newSession(t *testing.T, script string) *session {
	t.Helper()
	s := &session{bin: builtPrograms(t), programs: map[string]*program{}}
	if strings.HasPrefix(script, "tpm") {
		token := tpm.Start(t).New(t, tpm.WithPIN(markerPIN))
		s.token, s.addToken = &token.Token, token.Add
	} else {
		token := softhsm.New(t, softhsm.WithPIN(markerPIN))
		s.token, s.addToken = &token.Token, token.Add
	}
	return s
}

// session is one script's device and server.
type session struct {
	overHTTPS bool      // the server has an HTTPS door, whatever the script says
	remote    *exec.Cmd // p11-kit's server
	socket    string    // of it
	token     *opensc.Token
	addToken  func(label string) error // beside it
	bin       string
	work      string
	config    string
	env       *testscript.Env
	server    *exec.Cmd
	uri       string // of the server
	coaps     string // its CoAPs door
	factory   bool
	programs  map[string]*program
}

func (s *session) setup(env *testscript.Env) error {
	s.env, s.work, s.config = env, env.WorkDir, filepath.Join(env.WorkDir, "est-enroll.yaml")
	for _, pair := range s.token.Env() {
		name, value, _ := strings.Cut(pair, "=")
		env.Setenv(name, value)
	}
	env.Setenv("GORACE", withoutSleep)
	env.Setenv("BIN", s.bin) // the programs as they ship
	env.Setenv("MODULE", s.token.ModulePath)
	env.Setenv("TOKEN", s.token.Label)
	env.Setenv("PIN", s.token.PIN)
	env.Setenv("PINFILE", s.token.PINFile)
	env.Setenv("CA", filepath.Join(s.work, "ca", "ca.pem"))
	env.Setenv("EST_ENROLL_CONFIG", s.config)
	env.Setenv("EST_ENROLL_STATE_DIR", filepath.Join(s.work, "state"))
	env.Setenv("EST_ENROLL_LOCK_DIR", filepath.Join(s.work, "locks"))
	env.Setenv(transcriptVar, filepath.Join(s.work, "transcript"))
	env.Defer(func() { s.stopServer() })
	env.Defer(func() {
		if found := findMarker(s.work); len(found) > 0 {
			env.T().Fatal("the PIN is in ", strings.Join(found, ", "))
		}
	})
	return s.writeConfig("coaps://127.0.0.1:1")
}

func (s *session) writeConfig(server string) error {
	return os.WriteFile(s.config, fmt.Appendf(nil, "engine: %s\nserver: %s\ntrust-anchors: %s\n",
		s.token.URI(), server, filepath.Join(s.work, "ca", "ca.pem")), 0o600)
}

// findMarker returns the files below a directory that hold the marker PIN, or it in
// hexadecimal, as pre-shared keys are written.
// Named for it, the PIN file and the spy's own log may.
func findMarker(dir string) []string {
	var found []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		switch entry.Name() {
		case "right", "spy.log", "pin.yaml", "psk", "psk.other", "psk.keys", pinCredential, passwordCredential, pskCredential:
			return nil
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(markerPIN)) || bytes.Contains(data, []byte(hex.EncodeToString([]byte(markerPIN)))) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		found = append(found, err.Error())
	}
	return found
}

func (s *session) commands() map[string]func(ts *testscript.TestScript, neg bool, args []string) {
	plain := func(do func(ts *testscript.TestScript, args []string) error) func(*testscript.TestScript, bool, []string) {
		return func(ts *testscript.TestScript, neg bool, args []string) {
			if neg {
				ts.Fatalf("unsupported: ! before this command")
			}
			ts.Check(do(ts, args))
		}
	}
	return map[string]func(*testscript.TestScript, bool, []string){
		"exitcode": plain(exitcode),
		"factory":  plain(s.makeIDevID),
		"idevid":   plain(s.addIDevID),
		"testserver": plain(func(ts *testscript.TestScript, args []string) error {
			err := s.startServer(args)
			ts.Setenv("SERVER", s.uri)
			ts.Setenv("COAPS", s.coaps)
			return err
		}),
		"estserver":     plain(s.startEstserver),
		"stopserver":    plain(func(*testscript.TestScript, []string) error { return s.stopServer() }),
		"fault":         plain(s.setFaults),
		"issued":        plain(s.checkIssued),
		"imported":      plain(s.checkImported),
		"same-csr":      plain(sameCSR),
		"spy":           plain(func(ts *testscript.TestScript, _ []string) error { return s.through(ts, []string{"spy"}) }),
		"through":       plain(s.through),
		"token-fault":   plain(s.tokenFault),
		"remote-again":  plain(s.startRemote),
		"type":          plain(s.typeAt),
		"without-pin":   plain(withoutPIN),
		"token-serial":  plain(s.tokenSerial),
		"second-token":  plain(func(*testscript.TestScript, []string) error { return s.addToken(s.token.Label) }),
		"logins":        plain(s.checkLogins),
		"pin-in-config": plain(s.pinInConfig),
		"credentials":   plain(s.withCredentials),
		"interrupt":     plain(s.interrupt),
		"other-ca":      plain(otherCA),
		"status-uris":   plain(statusURIs),
		"until-expired": plain(untilStatus("next attempt: at the next run (expired)")),
		"until-due":     plain(untilStatus("next attempt: at the next run (due)")),
		"block":         plain(writeBlock),
		"ports":         plain(freePorts),
		"start":         plain(s.startProgram),
		"stop":          plain(s.stopProgram),
		"reload":        plain(s.reloadProgram),
		"eventually":    plain(eventuallyExec),
		"shows":         plain(s.shows),
	}
}

// shows ID says that the script shows a requirement of testdata/conformance.txt.
func (s *session) shows(_ *testscript.TestScript, args []string) error {
	if len(args) != 1 {
		return errors.New("usage: shows ID")
	}
	attribute := s.env.T().(interface{ Attr(key, value string) }).Attr
	attribute("shows", args[0]) // a literal in the script
	return nil
}

// exitcode N command… runs a command that must end with exit code N.
func exitcode(ts *testscript.TestScript, args []string) error {
	if len(args) < 2 {
		return errors.New("usage: exitcode N command [args...]")
	}
	want, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	got := 0
	err = ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("exit code %d, want %d", got, want)
	}
	return nil
}

// factory remembers that the next server shall make the IDevID: its CA is the
// factory's.
func (s *session) makeIDevID(*testscript.TestScript, []string) error {
	s.factory = true
	return nil
}

// addIDevID KIND LABEL ID makes another factory credential in the token, with the
// running server's factory CA.
func (s *session) addIDevID(_ *testscript.TestScript, args []string) error {
	if len(args) != 3 {
		return errors.New("usage: idevid KIND LABEL ID")
	}
	public, err := s.token.Generate(args[0], args[1], args[2])
	if err != nil {
		return err
	}
	cert, err := s.signIDevID(public)
	if err != nil {
		return err
	}
	return s.token.WriteCertificate(cert, args[1], args[2])
}

// startServer starts the test CA and points the configuration at it: at its HTTPS
// door where it has one.
func (s *session) startServer(args []string) error {
	dir := filepath.Join(s.work, "ca")
	args = append([]string{"serve", "--listen", "127.0.0.1:0", "--write-dir", dir, "--control", filepath.Join(dir, "control"),
		"--record", filepath.Join(dir, "record.jsonl"), "--ack-timeout", "200ms"}, args...)
	if s.overHTTPS && !slices.Contains(args, "--listen-https") {
		args = append(args, "--listen-https", "127.0.0.1:0")
	}
	s.server = exec.Command(filepath.Join(s.bin, "est-testserver"), args...)
	s.server.Stderr = io.Discard
	stdout, err := s.server.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.server.Start(); err != nil {
		return err
	}
	lines := bufio.NewReader(stdout)
	line, err := lines.ReadString('\n')
	s.coaps = strings.TrimPrefix(strings.TrimSpace(line), "listening ")
	if err == nil && slices.Contains(args, "--listen-https") {
		line, err = lines.ReadString('\n')
	}
	if err != nil {
		return fmt.Errorf("est-testserver: %w", err)
	}
	uri, found := strings.CutPrefix(strings.TrimSpace(line), "listening ")
	if !found {
		return fmt.Errorf("est-testserver says %q", line)
	}
	s.uri = uri
	if err := s.writeConfig(uri); err != nil {
		return err
	}
	if s.factory {
		return s.token.StoreIDevID(func(publicKey []byte) ([]byte, error) { return s.signIDevID(publicKey) })
	}
	return nil
}

// startEstserver starts that of globalsign/est, which accepts the IDevIDs of the test
// CA's factory, and points the configuration at it.
func (s *session) startEstserver(ts *testscript.TestScript, _ []string) error {
	program, err := estserver()
	if err != nil {
		return err
	}
	ca, err := globalsigntest.Start(program, ts.MkAbs("."), filepath.Join(s.work, "ca", "factory-ca.pem"))
	if err != nil {
		return err
	}
	s.env.Defer(func() {
		if err := ca.Close(); err != nil {
			s.env.T().Fatal(err)
		}
	})
	ts.Setenv("EST_ENROLL_TRUST_ANCHORS", ca.RootFile)
	ts.Setenv("SERVER", ca.URI)
	return s.writeConfig(ca.URI)
}

// signIDevID has the factory CA certify a public key (DER).
func (s *session) signIDevID(publicKey []byte) ([]byte, error) {
	in, out := filepath.Join(s.work, "idevid.pub"), filepath.Join(s.work, "idevid.der")
	if err := os.WriteFile(in, publicKey, 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(filepath.Join(s.bin, "est-testserver"), "idevid", "--control", filepath.Join(s.work, "ca", "control"),
		"--public-key", in, "--subject", "serialNumber=4711,O=Test", "--out", out)
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, text)
	}
	return os.ReadFile(out)
}

func (s *session) stopServer() error {
	if s.server == nil {
		return nil
	}
	if err := s.server.Process.Signal(os.Interrupt); err != nil {
		return err
	}
	_ = s.server.Wait() // its exit code is its own tests' matter
	s.server = nil
	return nil
}

// setFaults replaces the faults of the running server, by none if none is given.
func (s *session) setFaults(ts *testscript.TestScript, faults []string) error {
	if len(faults) == 0 {
		faults = []string{"none"}
	}
	args := append([]string{"fault", "--control", filepath.Join(s.work, "ca", "control")}, faults...)
	return ts.Exec(filepath.Join(s.bin, "est-testserver"), args...)
}

// checkIssued N compares with the server's record of issuances.
func (s *session) checkIssued(_ *testscript.TestScript, args []string) error {
	got, err := countIssuances(filepath.Join(s.work, "ca", "record.jsonl"))
	if err != nil {
		return err
	}
	if len(args) != 1 || args[0] != strconv.Itoa(got) {
		return fmt.Errorf("the server issued %d, want %s", got, args)
	}
	return nil
}

func countIssuances(record string) (int, error) {
	data, err := os.ReadFile(record)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return bytes.Count(data, []byte(`"kind":"issuance"`)), err
}

func sameCSR(ts *testscript.TestScript, args []string) error {
	var csrs [2]string
	for i := range csrs {
		var journal struct {
			Credentials map[string]struct{ Operation struct{ CSR string } }
		}
		if err := json.Unmarshal([]byte(ts.ReadFile(args[i])), &journal); err != nil {
			return err
		}
		csrs[i] = journal.Credentials["device"].Operation.CSR
	}
	if csrs[0] == "" || csrs[0] != csrs[1] {
		return errors.New("the CSRs differ or are missing")
	}
	return nil
}

// withoutPIN takes the PIN's source from the engine's address.
func withoutPIN(ts *testscript.TestScript, _ []string) error {
	address, _, found := strings.Cut(ts.Getenv("EST_ENROLL_ENGINE"), "&pin-source=")
	if !found {
		return errors.New("EST_ENROLL_ENGINE has no pin-source")
	}
	ts.Setenv("EST_ENROLL_ENGINE", address)
	return nil
}

// tokenSerial sets SERIAL to what pkcs11-tool says is the token's serial number.
func (s *session) tokenSerial(ts *testscript.TestScript, _ []string) error {
	if err := ts.Exec("pkcs11-tool", "--module", s.token.ModulePath, "--list-token-slots"); err != nil {
		return err
	}
	serial := regexp.MustCompile(`serial num +: +(\S+)`).FindStringSubmatch(ts.ReadFile("stdout"))
	if serial == nil {
		return errors.New("pkcs11-tool names no serial number")
	}
	ts.Setenv("SERIAL", serial[1])
	return nil
}

// checkLogins N compares with the C_Login calls that the spy saw.
func (s *session) checkLogins(_ *testscript.TestScript, args []string) error {
	data, err := os.ReadFile(filepath.Join(s.work, "spy.log"))
	if err != nil {
		return err
	}
	if got := bytes.Count(data, []byte(": C_Login\n")); len(args) != 1 || args[0] != strconv.Itoa(got) {
		return fmt.Errorf("%d C_Login calls, want %s", got, args)
	}
	return nil
}

// pinInConfig writes a configuration with the PIN in the engine's address.
func (s *session) pinInConfig(ts *testscript.TestScript, _ []string) error {
	config, err := os.ReadFile(s.config)
	if err != nil {
		return err
	}
	path := filepath.Join(s.work, "pin.yaml")
	text := strings.Replace(string(config), "pin-source=file:"+s.token.PINFile, "pin-value="+markerPIN, 1)
	ts.Setenv("EST_ENROLL_CONFIG", path)
	ts.Setenv("EST_ENROLL_ENGINE", "") // the spy's
	return os.WriteFile(path, []byte(text), 0o600)
}

// withCredentials FILE puts the settings of the script's configuration before
// those of a file that lists credentials.
func (s *session) withCredentials(ts *testscript.TestScript, args []string) error {
	config, err := os.ReadFile(s.config)
	if err != nil {
		return err
	}
	return os.WriteFile(ts.MkAbs(args[0]), append(config, ts.ReadFile(args[0])...), 0o600)
}

// interrupt starts est-enroll, sends it SIGINT when the server has its CSR (the
// journal names step "request" and the server is thinking), and wants exit 130.
func (s *session) interrupt(ts *testscript.TestScript, args []string) error {
	cmd := s.command(ts, "est-enroll", append(args, "-v")...)
	var output bytes.Buffer
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(io.TeeReader(stderr, &output))
	for lines.Scan() {
		if text := lines.Text(); strings.Contains(text, "built the CSR") || strings.Contains(text, "asking again at") {
			break
		}
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		return err
	}
	for lines.Scan() { // to the end
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted {
		return fmt.Errorf("%v, want exit code %d: %s", err, exitInterrupted, &output)
	}
	path := filepath.Join(s.work, "interrupt.stderr")
	if err := os.WriteFile(path, output.Bytes(), 0o600); err != nil {
		return err
	}
	return ts.Exec("sh", "-c", "cat "+path+" >&2")
}

// command is one of the programs as it ships, with the script's environment.
func (s *session) command(ts *testscript.TestScript, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir = s.work
	for _, variable := range []string{
		"PATH", "PKCS11SPY", "PKCS11SPY_OUTPUT", "P11FAULT_MODULE", "P11FAULT_DIR", "P11FAULT_SERVER", "P11_KIT_SERVER_ADDRESS",
		"CREDENTIALS_DIRECTORY", "EST_ENROLL_CONFIG", "EST_ENROLL_STATE_DIR", "EST_ENROLL_LOCK_DIR", "EST_ENROLL_ENGINE",
	} {
		cmd.Env = append(cmd.Env, variable+"="+ts.Getenv(variable))
	}
	cmd.Env = append(cmd.Env, s.token.Env()...)
	return cmd
}

// otherCA FILE writes the certificate of a CA that nobody uses.
func otherCA(ts *testscript.TestScript, args []string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "other"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	return os.WriteFile(ts.MkAbs(args[0]), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
}

// statusURIs sets KEY, CERTIFICATE and CHAIN, which has one certificate, to what
// "status --json" prints.
func statusURIs(ts *testscript.TestScript, _ []string) error {
	if err := ts.Exec("est-enroll", "status", "--json"); err != nil {
		return err
	}
	var status struct {
		Current struct {
			Key, Certificate string
			Chain            []string
		}
	}
	if err := json.Unmarshal([]byte(ts.ReadFile("stdout")), &status); err != nil {
		return err
	}
	ts.Setenv("KEY", status.Current.Key)
	ts.Setenv("CERTIFICATE", status.Current.Certificate)
	ts.Setenv("CHAIN", strings.Join(status.Current.Chain, " "))
	return nil
}

// untilStatus waits for what status says, not for a time: at most twenty seconds.
func untilStatus(says string) func(*testscript.TestScript, []string) error {
	return func(ts *testscript.TestScript, args []string) error {
		for range 200 {
			if err := ts.Exec("est-enroll", append([]string{"status"}, args...)...); err != nil {
				return err
			}
			if strings.Contains(ts.ReadFile("stdout"), says) {
				return nil
			}
			<-time.After(100 * time.Millisecond)
		}
		return fmt.Errorf("status does not say %q", says)
	}
}
