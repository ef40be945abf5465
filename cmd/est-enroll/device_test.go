package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"estenroll/engine/enginetest/p11fault"
)

// through LAYER… puts other modules between the program and the token's, from the
// program on: "spy" counts calls, "fault" makes the token misbehave, and "remote" is
// p11-kit's remoting, the last one.
func (s *session) through(ts *testscript.TestScript, layers []string) error {
	module := s.token.ModulePath
	for i := len(layers) - 1; i >= 0; i-- {
		switch layers[i] {
		case "spy":
			ts.Setenv("PKCS11SPY", module)
			ts.Setenv("PKCS11SPY_OUTPUT", filepath.Join(s.work, "spy.log"))
			found, err := packaged("pkcs11-spy.so")
			if err != nil {
				return err
			}
			module = found
		case "fault":
			faults := filepath.Join(s.work, "faults")
			if err := os.Mkdir(faults, 0o700); err != nil {
				return err
			}
			setenv(ts, p11fault.Env(module, faults)...)
			var err error
			if module, err = p11fault.Build(s.work); err != nil {
				return err
			}
		case "remote":
			found, err := packaged("pkcs11/p11-kit-client.so")
			if err != nil {
				return err
			}
			module = found
			dir, err := os.MkdirTemp("", "p11-") // a socket's path is short
			if err != nil {
				return err
			}
			s.env.Defer(func() { _ = os.RemoveAll(dir) })
			s.socket = filepath.Join(dir, "socket")
			ts.Setenv("P11_KIT_SERVER_ADDRESS", "unix:path="+s.socket)
			if err := s.startRemote(ts, nil); err != nil {
				return err
			}
			s.env.Defer(func() { _ = s.stopRemote() })
		default:
			return fmt.Errorf("no such layer: %s", layers[i])
		}
	}
	ts.Setenv("EST_ENROLL_ENGINE", strings.Replace(s.token.URI(), s.token.ModulePath, module, 1))
	return nil
}

// packaged finds a library of a package, wherever the machine's architecture has it.
func packaged(name string) (string, error) {
	found, err := filepath.Glob("/usr/lib/*/" + name)
	if err != nil || len(found) == 0 {
		return "", fmt.Errorf("%s is missing: make deps", name)
	}
	return found[0], nil
}

// tokenFault NAME [CONTENT] makes a fault of p11fault, or ends it.
func (s *session) tokenFault(_ *testscript.TestScript, args []string) error {
	faults := filepath.Join(s.work, "faults")
	switch len(args) {
	case 1:
		return p11fault.Clear(faults, args[0])
	case 2:
		return p11fault.Set(faults, args[0], args[1])
	}
	return errors.New("usage: token-fault NAME [CONTENT]")
}

func setenv(ts *testscript.TestScript, pairs ...string) {
	for _, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		ts.Setenv(name, value)
	}
}

// startRemote starts p11-kit's server of the token, again if there was one.
func (s *session) startRemote(ts *testscript.TestScript, _ []string) error {
	if err := s.stopRemote(); err != nil {
		return err
	}
	s.remote = exec.Command("p11-kit", "server", "--foreground", "--name", s.socket, "--provider", s.token.ModulePath, "pkcs11:")
	s.remote.Env = append(os.Environ(), append(s.token.Env(), "XDG_RUNTIME_DIR="+filepath.Dir(s.socket))...)
	stdout, err := s.remote.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.remote.Start(); err != nil {
		return fmt.Errorf("%w: make deps", err)
	}
	setenv(ts, p11fault.KillsChildrenOf(s.remote.Process.Pid))
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if strings.Contains(lines.Text(), "P11_KIT_SERVER_PID") { // the last thing it says before it accepts
			return nil
		}
	}
	return errors.New("p11-kit server says nothing")
}

// stopRemote ends the server; its children end with the programs they serve.
func (s *session) stopRemote() error {
	if s.remote == nil {
		return nil
	}
	err := s.remote.Process.Kill()
	_ = s.remote.Wait() // killed
	s.remote = nil
	if removed := os.Remove(s.socket); !errors.Is(removed, fs.ErrNotExist) {
		err = errors.Join(err, removed)
	}
	return err
}
