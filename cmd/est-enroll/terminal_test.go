package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/rogpeppe/go-internal/testscript"
)

// pty is a terminal of a person who does not exist: what is written to the master
// is typed, and what is read from it is shown.
type pty struct{ master, terminal *os.File }

func newPTY() (p pty, err error) {
	if p.master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0); err != nil {
		return p, err
	}
	var unlocked, number int32
	err = errors.Join(p.ioctl(syscall.TIOCSPTLCK, unsafe.Pointer(&unlocked)), p.ioctl(syscall.TIOCGPTN, unsafe.Pointer(&number)))
	if err == nil {
		p.terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	}
	if err != nil {
		return p, errors.Join(err, p.master.Close())
	}
	return p, nil
}

func (p pty) ioctl(request uintptr, argument unsafe.Pointer) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, p.master.Fd(), request, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

// echoes reports whether the terminal shows what is typed.
func (p pty) echoes() (bool, error) {
	var state syscall.Termios
	err := p.ioctl(syscall.TCGETS, unsafe.Pointer(&state))
	return state.Lflag&syscall.ECHO != 0, err
}

// typeAt EXIT TEXT command… runs a command at a terminal, types a text at each prompt
// for a PIN, with a newline unless it ends with "^C", and wants its exit code. What the
// terminal showed is in the file "shown".
func (s *session) typeAt(ts *testscript.TestScript, args []string) (err error) {
	if len(args) < 3 {
		return errors.New("usage: type EXIT TEXT command [args...]")
	}
	text, interrupt := strings.CutSuffix(args[1], "^C")
	if text += "\n"; interrupt {
		text = text[:len(text)-1] + "\x03"
	}
	p, err := newPTY()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.master.Close()) }()
	cmd := s.command(ts, args[2], args[3:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.terminal, p.terminal, p.terminal
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	before, err := p.echoes()
	if err == nil && !before {
		err = errors.New("the terminal has no echo")
	}
	if err == nil {
		err = cmd.Start()
	}
	if err := errors.Join(err, p.terminal.Close()); err != nil {
		return err
	}
	var shown strings.Builder
	prompts := 0
	for {
		buffer := make([]byte, 4096)
		n, err := p.master.Read(buffer)
		shown.Write(buffer[:n])
		if strings.Count(shown.String(), "PIN of pkcs11:") > prompts && strings.HasSuffix(shown.String(), ": ") {
			prompts++
			if err := s.typePIN(p, text); err != nil {
				return err
			}
		}
		if err != nil {
			break // EIO: nobody has the terminal open any more
		}
	}
	_ = cmd.Wait() // the exit code says it
	after, err := p.echoes()
	if err == nil && !after {
		err = errors.New("the terminal is left without its echo")
	}
	if got := fmt.Sprint(cmd.ProcessState.ExitCode()); got != args[0] {
		err = errors.Join(err, fmt.Errorf("exit code %s, want %s: %s", got, args[0], shown.String()))
	}
	return errors.Join(err, os.WriteFile(filepath.Join(s.work, "shown"), []byte(shown.String()), 0o600))
}

// typePIN types when the terminal shows no more what is typed, as a person would
// who reads the prompt: the program turns the echo off right after it.
func (s *session) typePIN(p pty, text string) error {
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		on, err := p.echoes()
		if err != nil {
			return err
		}
		if !on {
			_, err := p.master.WriteString(text)
			return err
		}
	}
	return errors.New("the terminal goes on to show what is typed")
}
