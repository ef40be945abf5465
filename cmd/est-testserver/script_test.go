package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// withoutSleep is for programs that are this test binary: the race detector has each
// sleep for a second before it exits.
const withoutSleep = "atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"est-testserver": main})
}

func TestScripts(t *testing.T) {
	for _, tool := range []string{"openssl", "pkcs11-tool", "softhsm2-util", "coap-client-openssl", "coap-client-gnutls", "curl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v: run \"make deps\"", err)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"serve": serve,
			"guide": guideStart,
			"block": guideBlock,
		},
		Setup: func(env *testscript.Env) error {
			env.Setenv("GORACE", withoutSleep)
			env.Setenv("TEMPLATES", filepath.Join(sourceDir, "../../testdata/rfc9908"))
			env.Values[portsOf{}] = map[string]string{}
			return nil
		},
	})
}

var signals = map[string]syscall.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT}

// serve runs "est-testserver serve ARGS" until the script ends, sets URI when
// it listens, and HTTPS_URI where it has that door, and fails the script if it does
// not stop cleanly on the signal.
//
//	serve TERM|INT ARGS
func serve(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("serve cannot be negated: exec est-testserver serve")
	}
	if len(args) == 0 || signals[args[0]] == 0 {
		ts.Fatalf("usage: serve TERM|INT ARGS")
	}
	signal := signals[args[0]]
	cmd := exec.Command("est-testserver", append([]string{"serve", "--listen", "127.0.0.1:0"}, args[1:]...)...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = []string{"PATH=" + ts.Getenv("PATH"), "TMPDIR=" + ts.Getenv("TMPDIR"), "GORACE=" + withoutSleep}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	lines := bufio.NewReader(stdout)
	ts.Defer(func() {
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		_ = cmd.Process.Signal(signal)
		rest, _ := io.ReadAll(lines)
		if err := cmd.Wait(); err != nil || len(rest) > 0 {
			ts.Fatalf("est-testserver serve: %v, more output %q\n%s", err, rest, stderr.String())
		}
		if got := stderr.String(); got != "est-testserver: "+warning+"\n" {
			ts.Fatalf("est-testserver serve: standard error: %s", got)
		}
	})
	line, err := lines.ReadString('\n')
	uri, found := strings.CutPrefix(line, "listening ")
	if err != nil || !found {
		ts.Fatalf("est-testserver serve: %q, %v\n%s", line, err, stderr.String())
	}
	ts.Setenv("URI", strings.TrimSpace(uri))
	if slices.Contains(args, "--listen-https") {
		second, err := lines.ReadString('\n')
		uri, found := strings.CutPrefix(second, "listening ")
		if err != nil || !found {
			ts.Fatalf("est-testserver serve: %q, %v\n%s", second, err, stderr.String())
		}
		ts.Setenv("HTTPS_URI", strings.TrimSpace(uri))
		line += second
	}
	if slices.Contains(args, "--listen-linked") {
		linked, err := lines.ReadString('\n')
		if err != nil {
			ts.Fatalf("est-testserver serve: %q, %v\n%s", linked, err, stderr.String())
		}
		line += linked
	}
	fmt.Fprintf(ts.Stdout(), "%s", line)
}
