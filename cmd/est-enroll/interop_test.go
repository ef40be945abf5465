package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"estenroll/packaging/guide"
)

const interopDocument = "../../INTEROP.md"

// writeBlock NAME FILE OLD=NEW… writes a block of INTEROP.md or README.md, with names of
// the document replaced by those of the script. Each of them must be there.
func writeBlock(ts *testscript.TestScript, args []string) error {
	if len(args) < 2 {
		return errors.New("usage: block NAME FILE [OLD=NEW...]")
	}
	var text string
	for _, document := range []string{interopDocument, "../../README.md"} {
		blocks, err := guide.Blocks(filepath.Join(sourceDir, document))
		if err != nil {
			return err
		}
		text += blocks[args[0]].Text
	}
	if text == "" {
		return fmt.Errorf("no block %s", args[0])
	}
	for _, pair := range args[2:] {
		before, after, _ := strings.Cut(pair, "=")
		if !strings.Contains(text, before) {
			return fmt.Errorf("no %q in block %s", before, args[0])
		}
		text = strings.ReplaceAll(text, before, after)
	}
	return os.WriteFile(ts.MkAbs(args[1]), []byte(text), 0o600)
}

// sourceDir is the directory of the tests: a script has another one.
var sourceDir = func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return dir
}()

// freePorts NAME… sets each variable to a TCP port of the loopback that is free now.
func freePorts(ts *testscript.TestScript, names []string) error {
	for _, name := range names {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer listener.Close() // when all are chosen
		_, port, err := net.SplitHostPort(listener.Addr().String())
		if err != nil {
			return err
		}
		ts.Setenv(name, port)
	}
	return nil
}

// startProgram NAME PORT command… starts a server and waits until it listens.
func (s *session) startProgram(ts *testscript.TestScript, args []string) error {
	if len(args) < 3 {
		return errors.New("usage: start NAME PORT command [args...]")
	}
	name, port := args[0], args[1]
	log, err := os.OpenFile(ts.MkAbs(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the child has its own
	cmd := exec.Command(args[2], args[3:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = ts.MkAbs("."), log, log
	for _, variable := range []string{"PATH", "HOME", "TMPDIR", "SOFTHSM2_CONF", "OPENSSL_CONF"} {
		cmd.Env = append(cmd.Env, variable+"="+ts.Getenv(variable))
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	program := &program{cmd: cmd, ended: make(chan struct{})}
	go func() {
		defer close(program.ended)
		_ = cmd.Wait() // how it ends is no matter: what it did is
	}()
	s.programs[name] = program
	s.env.Defer(program.stop)
	return eventually(func() error {
		select {
		case <-program.ended:
			return fmt.Errorf("%s ended:\n%s", name, ts.ReadFile(name+".log"))
		default:
		}
		conn, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// program is a server that a script has started.
type program struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

func (p *program) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.ended:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

// program NAME is one of startProgram's.
func (s *session) program(args []string) (*program, error) {
	if len(args) != 1 || s.programs[args[0]] == nil {
		return nil, fmt.Errorf("want the name of a program that was started, not %q", args)
	}
	return s.programs[args[0]], nil
}

// stopProgram NAME ends a program and waits for its end.
func (s *session) stopProgram(_ *testscript.TestScript, args []string) error {
	program, err := s.program(args)
	if err != nil {
		return err
	}
	program.stop()
	return nil
}

// reloadProgram NAME sends it SIGHUP.
func (s *session) reloadProgram(_ *testscript.TestScript, args []string) error {
	program, err := s.program(args)
	if err != nil {
		return err
	}
	return program.cmd.Process.Signal(syscall.SIGHUP)
}

// eventuallyExec command… repeats a command until it succeeds.
func eventuallyExec(ts *testscript.TestScript, args []string) error {
	return eventually(func() error { return ts.Exec(args[0], args[1:]...) })
}

// eventually waits for what is so in the end: at most twenty seconds.
func eventually(do func() error) (err error) {
	for range 200 {
		if err = do(); err == nil {
			return nil
		}
		<-time.After(100 * time.Millisecond)
	}
	return err
}

// The story of INTEROP.md runs each of its blocks.
func TestInteropBlocks(t *testing.T) {
	t.Parallel()
	blocks, err := guide.Blocks(interopDocument)
	if err != nil {
		t.Fatal(err)
	}
	script := read(t, "testdata/script/interop.txt")
	for name := range blocks {
		if !strings.Contains(script, "\nblock "+name+" ") {
			t.Errorf("interop.txt does not run block %s", name)
		}
	}
}
