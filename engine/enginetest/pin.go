package enginetest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"estenroll/engine"
)

const wrongPIN = "not-the-right-one"

// refused wants that opening fails for a PIN, without leaving a session.
func (s *suite) refused(address string, opts engine.Options, want error) *engine.PINError {
	s.Helper()
	e, err := s.try(address, opts)
	if err == nil {
		s.Fatal(errors.Join(errors.New("the token opened"), e.Close()))
	}
	s.wants(err, want)
	if strings.Contains(err.Error(), wrongPIN) {
		s.Errorf("the PIN is in %v", err)
	}
	if opens, closes := s.count("C_OpenSession"), s.count("C_CloseSession"); opens != closes {
		s.Errorf("%d sessions opened, %d closed", opens, closes)
	}
	var pin *engine.PINError
	errors.As(err, &pin)
	return pin
}

func (s *suite) opens(address string, opts engine.Options) {
	s.Helper()
	e, err := s.try(address, opts)
	if err != nil {
		s.Fatal(err)
	}
	if err := e.Close(); err != nil {
		s.Fatal(err)
	}
}

var pinRules = []rule{
	{"a PIN that failed is never tried again", func(s *suite) {
		s.writePIN(wrongPIN)
		if s.refused(s.Address, s.Options, engine.ErrPINIncorrect) == nil {
			s.Fatal("not a *engine.PINError")
		}
		s.counts("C_Login", 1)
		s.refused(s.Address, s.Options, engine.ErrPINNotRetried)
		s.writePIN(wrongPIN + "\n") // another source, the same PIN
		s.refused(s.Address, s.Options, engine.ErrPINNotRetried)
		s.counts("C_Login", 1)
		s.writePIN(s.PIN)
		s.opens(s.Address, s.Options)
		s.counts("C_Login", 2)
	}},
	{"a PIN refused in an earlier run is not tried until its source changes", func(s *suite) {
		source := sourceOf(s)
		opts := s.Options
		opts.RefusedPIN = source
		pin := s.refused(s.Address, opts, engine.ErrPINNotRetried)
		if pin == nil || !pin.Source.Same(source) {
			s.Errorf("got %+v, want the source %+v", pin, source)
		}
		s.counts("C_Login", 0)
		s.writePIN(s.PIN + "\n") // at least its ctime changes
		s.opens(s.Address, opts)
	}},
	{"a refused PIN is remembered by its source, not by itself", func(s *suite) {
		s.writePIN(wrongPIN)
		pin := s.refused(s.Address, s.Options, engine.ErrPINIncorrect)
		if want := sourceOf(s); pin == nil || !pin.Source.Same(want) {
			s.Errorf("got %+v, want the source %+v", pin, want)
		}
		// a PIN in the address itself comes from where the address does
		address := strings.Replace(s.WithPIN, s.PIN, wrongPIN+"-2", 1)
		opts := s.Options
		opts.AddressSource = engine.PINSource{Path: "environment ENGINE"}
		pin = s.refused(address, opts, engine.ErrPINIncorrect)
		if pin == nil || pin.Source != opts.AddressSource {
			s.Errorf("got %+v, want the source %+v", pin, opts.AddressSource)
		}
		opts.RefusedPIN = opts.AddressSource
		s.refused(strings.Replace(s.WithPIN, s.PIN, wrongPIN+"-3", 1), opts, engine.ErrPINNotRetried)
		s.counts("C_Login", 2)
		opts.RefusedPIN = engine.PINSource{}
		s.opens(s.WithPIN, opts)
	}},
	{"never when the token says it is the final try", func(s *suite) {
		s.Inject(s.T, FaultFinalTry)
		s.refused(s.Address, s.Options, engine.ErrPINFinalTry)
		s.counts("C_Login", 0)
	}},
	{"never when the token says that the PIN is locked", func(s *suite) {
		s.Inject(s.T, FaultLocked)
		s.refused(s.Address, s.Options, engine.ErrPINLocked)
		s.counts("C_Login", 0)
	}},
	{"a PIN file's trailing newline is not the PIN", func(s *suite) {
		for _, end := range []string{"", "\n", "\r\n", "\n\n"} {
			s.writePIN(s.PIN + end)
			s.opens(s.Address, s.Options)
		}
	}},
	{"an empty PIN never reaches the module", func(s *suite) {
		for _, content := range []string{"", "\n", "\r\n\n"} {
			s.writePIN(content)
			s.refused(s.Address, s.Options, engine.ErrPINMissing)
		}
		s.refused(s.WithoutPIN, s.Options, engine.ErrPINMissing)
		if err := os.Remove(s.PINFile); err != nil {
			s.Fatal(err)
		}
		s.refused(s.Address, s.Options, os.ErrNotExist)
		s.counts("C_Login", 0)
	}},
	{"a PIN file is small, regular and one line", func(s *suite) {
		for _, content := range []string{strings.Repeat("1", 1<<20), "1234\n5678\n", "1234\x005678"} {
			s.writePIN(content)
			s.refused(s.Address, s.Options, nil)
		}
		if err := errors.Join(os.Remove(s.PINFile), syscall.Mkfifo(s.PINFile, 0o600)); err != nil {
			s.Fatal(err)
		}
		s.refused(s.Address, s.Options, nil)
		s.counts("C_Login", 0)
	}},
	{"an open token tells what it is and where its PIN came from", func(s *suite) {
		e, err := s.try(s.Address, s.Options)
		if err != nil {
			s.Fatal(err)
		}
		defer s.close(opened{Engine: e})
		inspector, ok := e.(engine.TokenInspector)
		if !ok {
			s.Fatal("the engine does not say")
		}
		status := inspector.TokenStatus()
		if !status.LoginRequired || !status.PINSource.Same(sourceOf(s)) || status.ReadOnly || status.Address == nil || status.Module == "" {
			s.Errorf("got %+v", status)
		}
	}},
	{"a PIN cannot be printed", func(s *suite) {
		at := s.parse(s.WithPIN)
		for _, verb := range "vsdqxX" {
			for _, value := range []any{at, struct{ inner engine.Address }{at}} {
				for _, flag := range []string{"", "+", "#"} {
					if text := fmt.Sprintf("%"+flag+string(verb), value); strings.Contains(text, s.PIN) {
						s.Errorf("%%%s%c shows it: %s", flag, verb, text)
					}
				}
			}
		}
		if again, err := s.Driver.Parse(at.String()); err != nil || again == at {
			s.Errorf("String keeps the PIN, or does not parse: %v, %v", again, err)
		}
	}},
}

// sourceOf is what identifies the PIN file as it is now.
func sourceOf(s *suite) engine.PINSource {
	s.Helper()
	status, err := os.Stat(s.PINFile)
	if err != nil {
		s.Fatal(err)
	}
	stat := status.Sys().(*syscall.Stat_t)
	return engine.PINSource{Path: s.PINFile, Inode: stat.Ino, Size: stat.Size, ChangedAt: time.Unix(stat.Ctim.Unix())}
}
