package enginetest

import (
	"context"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"estenroll/engine"
)

var deviceRules = []rule{
	{"generation is never repeated after a device error", func(s *suite) {
		e := s.open()
		at, err := e.NewKeyAddress("name")
		if err != nil {
			s.Fatal(err)
		}
		s.LoseAfter(s.T, "C_GenerateKeyPair")
		_, err = e.GenerateKey(s.Context(), at, engine.KeySpec{})
		s.wants(err, engine.ErrDeviceLost)
		s.counts("C_GenerateKeyPair", 1)
		public, err := e.RecoverKey(s.Context(), at)
		if err != nil {
			s.Fatal(err)
		}
		s.signs(e, at, public)
		s.holds(e, 1, 1, 0)
	}},
	{"creation is never repeated after a device error", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		root := s.newCA("root", nil)
		leaf := s.leaf(root, public)
		places := s.place(e, at, leaf, root.cert)
		s.LoseAfter(s.T, "C_CreateObject")
		err := e.StoreCertificates(s.Context(), places, []*x509.Certificate{leaf, root.cert})
		s.wants(err, engine.ErrDeviceLost)
		s.counts("C_CreateObject", 1)
		s.finds(e, places[1], root.cert) // the chain first: a leaf that is there has its chain
		_, err = e.Certificate(s.Context(), places[0])
		s.wants(err, engine.ErrNotFound)
		s.store(e, at, leaf, root.cert) // which finds the one and creates the other
		s.counts("C_CreateObject", 2)
		s.holds(e, 1, 1, 2)
	}},
	{"destruction is never repeated after a device error", func(s *suite) {
		e := s.open()
		at, _ := s.generate(e, "name")
		s.LoseAfter(s.T, "C_DestroyObject")
		s.wants(e.RemoveKey(s.Context(), at), engine.ErrDeviceLost)
		s.counts("C_DestroyObject", 1)
		if err := e.RemoveKey(s.Context(), at); err != nil {
			s.Error(err)
		}
		s.holds(e, 0, 0, 0)
	}},
	{"reading and signing are repeated once after a device error", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		signer := s.signs(e, at, public)
		for _, function := range []string{"C_Sign", "C_SignInit", "C_FindObjects", "C_FindObjectsFinal", "C_GetAttributeValue"} {
			s.LoseAfter(s.T, function)
			s.signsWith(signer, public)
			s.signs(e, at, public)
			s.holds(e, 1, 1, 0)
		}
		// a search before a change is repeated too: nothing has been changed yet
		s.LoseAfter(s.T, "C_FindObjectsInit")
		s.generate(e, "other")
	}},
	{"an accepted PIN opens the same token once more after a device loss", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		signer := s.signs(e, at, public)
		s.writePIN(wrongPIN)
		s.LoseAfter(s.T, "C_Sign")
		s.signsWith(signer, public)
		s.LoseAfter(s.T, "C_Sign")
		s.signsWith(signer, public)
		s.counts("C_Login", 3)
		s.counts("C_Initialize", 3)
	}},
	{"one module handle, one session and one login for all engines of a token", func(s *suite) {
		first, second := s.open(), s.open()
		at, public := s.generate(first, "name")
		signer := s.signs(second, at, public)
		s.close(first)
		s.signsWith(signer, public)
		s.close(second)
		for _, function := range []string{"C_Initialize", "C_OpenSession", "C_Login", "C_CloseSession", "C_Finalize"} {
			s.counts(function, 1)
		}
		if a, b := s.count("C_FindObjectsInit"), s.count("C_FindObjectsFinal"); a != b || a == 0 {
			s.Errorf("%d searches begun, %d ended", a, b)
		}
	}},
	{"on device death the module is finalised whatever the count and every token reopens", func(s *suite) {
		other := &suite{T: s.T, Token: s.Another(s.T)}
		one, two := s.open(), other.open()
		at1, public1 := s.generate(one, "one")
		at2, public2 := other.generate(two, "two")
		signer1, signer2 := s.signs(one, at1, public1), other.signs(two, at2, public2)
		s.LoseAfter(s.T, "C_Sign")
		s.signsWith(signer1, public1)
		other.signsWith(signer2, public2)
		other.signs(two, at2, public2)
		s.holds(one, 1, 1, 0)
		s.counts("C_Finalize", 1)
		s.counts("C_Initialize", 2)
		s.counts("C_Login", 4)
	}},
	{"nothing is called after the module is finalised", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		signer := s.signs(e, at, public)
		s.LoseAfter(s.T, "C_Sign")
		s.signsWith(signer, public)
		s.close(e)
		s.opens(s.Address, s.Options)
		initialized := false
		for i, call := range s.Calls(s.T) {
			switch call {
			case "C_Initialize":
				initialized = true
			case "C_Finalize":
				if !initialized {
					s.Errorf("call %d: a second C_Finalize", i)
				}
				initialized = false
			case "C_GetFunctionList":
			default:
				if !initialized {
					s.Errorf("call %d: %s after C_Finalize", i, call)
				}
			}
		}
		if initialized {
			s.Error("it is not finalised at the end")
		}
	}},
	{"a token is locked for writing between processes", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		entries, err := os.ReadDir(s.Options.LockDir)
		if err != nil || len(entries) != 1 {
			s.Fatalf("%v, %v, want one lock", entries, err)
		}
		status, err := os.Stat(s.Options.LockDir)
		if err != nil || status.Mode()&(os.ModePerm|os.ModeSticky) != 0o777|os.ModeSticky {
			s.Errorf("mode of the directory: %v, %v", status.Mode(), err)
		}
		// Another opening of the file is what another process would have.
		lock, err := os.OpenFile(filepath.Join(s.Options.LockDir, entries[0].Name()), os.O_RDWR, 0)
		if err != nil {
			s.Fatal(err)
		}
		defer lock.Close()
		if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			s.Fatalf("it is held while the engine is idle: %v", err)
		}
		ctx, cancel := context.WithTimeout(s.Context(), 100*time.Millisecond)
		defer cancel()
		made, err := e.NewKeyAddress("other")
		if err != nil {
			s.Fatal(err)
		}
		_, err = e.GenerateKey(ctx, made, engine.KeySpec{})
		s.wants(err, engine.ErrLocked)
		opts := s.Options
		opts.LockTimeout = time.Millisecond
		_, err = s.try(s.Address, opts)
		s.wants(err, engine.ErrLocked)
		s.signs(e, at, public) // reading needs no lock
		if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_UN); err != nil {
			s.Fatal(err)
		}
		s.generate(e, "other")
	}},
	{"a write-protected token is ErrTokenReadOnly", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		s.close(e)
		s.Inject(s.T, FaultReadOnly)
		e = s.open()
		s.signs(e, at, public)
		made, err := e.NewKeyAddress("other")
		if err != nil {
			s.Fatal(err)
		}
		_, err = e.GenerateKey(s.Context(), made, engine.KeySpec{})
		s.wants(err, engine.ErrTokenReadOnly)
		s.wants(e.RemoveKey(s.Context(), at), engine.ErrTokenReadOnly)
		s.holds(e, 1, 1, 0)
	}},
	{"a session is closed and a login made for each that was opened", func(s *suite) {
		for range 3 {
			s.opens(s.Address, s.Options)
		}
		s.counts("C_Login", 3)
		s.counts("C_OpenSession", 3)
		s.counts("C_CloseSession", 3)
	}},
	{"a token that is not there, or twice there, is said so", func(s *suite) {
		address := strings.Replace(s.Address, "token=", "token=no-", 1)
		_, err := s.try(address, s.Options)
		s.wants(err, engine.ErrTokenNotFound)
		s.Another(s.T)
		before, after, _ := strings.Cut(s.Address, "token=")
		_, query, _ := strings.Cut(after, "?")
		_, err = s.try(before+"?"+query, s.Options) // no label: any token
		s.wants(err, nil)
		var ambiguous *engine.AmbiguousError
		if !errors.As(err, &ambiguous) || len(ambiguous.Matches) != 2 {
			s.Errorf("%v is not an *engine.AmbiguousError of two", err)
		}
		_, err = s.try(strings.Replace(s.Address, "?", ";object=name?", 1), s.Options)
		s.wants(err, nil)
	}},
}
