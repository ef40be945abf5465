package enginetest

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"estenroll/engine"
)

var keyRules = []rule{
	{"a generated key is private, sensitive, not extractable and for signing only", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		s.signs(e, at, public)
		s.forSigningOnly(e, at)
	}},
	{"a key that is not what was asked for is destroyed and reported", func(s *suite) {
		e := s.open()
		s.Inject(s.T, FaultExtractable)
		at, err := e.NewKeyAddress("name")
		if err != nil {
			s.Fatal(err)
		}
		_, err = e.GenerateKey(s.Context(), at, engine.KeySpec{})
		s.wants(err, nil)
		s.holds(e, 0, 0, 0)
	}},
	{"what a failed generation leaves is removed", func(s *suite) {
		e := s.open()
		s.Inject(s.T, FaultFailGenerate)
		at, err := e.NewKeyAddress("name")
		if err != nil {
			s.Fatal(err)
		}
		_, err = e.GenerateKey(s.Context(), at, engine.KeySpec{})
		s.wants(err, nil)
		s.holds(e, 0, 0, 0)
	}},
	{"a new key gets a fresh random identifier", func(s *suite) {
		e := s.open()
		seen := map[engine.Address]bool{}
		for range 100 {
			at, err := e.NewKeyAddress("name")
			if err != nil {
				s.Fatal(err)
			}
			if seen[at] {
				s.Fatalf("%s twice", at)
			}
			seen[at] = true
		}
		at, public := s.generate(e, "name")
		_, err := e.GenerateKey(s.Context(), at, engine.KeySpec{})
		s.wants(err, engine.ErrExists)
		s.signs(e, at, public)
		s.holds(e, 1, 1, 0)
		for _, label := range []string{"", "\xff", "\x00", strings.Repeat("a", 1000)} {
			_, err := e.NewKeyAddress(label)
			s.wants(err, nil)
		}
	}},
	{"an object is found by class plus label and id, or either", func(s *suite) {
		var public []byte
		e := s.elsewhere(s.open(), func() (err error) {
			public, err = s.GenerateEC("factory", "0102")
			return err
		})
		key, err := x509.ParsePKIXPublicKey(public)
		if err != nil {
			s.Fatal(err)
		}
		for _, address := range []string{"object=factory;type=private", "object=factory", "id=%01%02;type=private", "object=factory;id=%01%02;type=private"} {
			s.signs(e, s.parse("pkcs11:"+address), key)
		}
		for address, want := range map[string]error{
			"object=other":               engine.ErrNotFound,
			"object=factory;id=%01":      engine.ErrNotFound,
			"id=%01%02;object=other":     engine.ErrNotFound,
			"object=factory;type=cert":   nil,
			"token=other;object=factory": nil,
			"type=private":               nil,
		} {
			_, err := e.Signer(s.Context(), s.parse("pkcs11:"+address))
			s.wants(err, want)
		}
	}},
	{"what another program makes is found, at once or when the module starts anew", func(s *suite) {
		e := s.open()
		if _, err := s.GenerateEC("factory", "0102"); err != nil {
			s.Fatal(err)
		}
		at := s.parse("pkcs11:object=factory")
		_, err := e.Signer(s.Context(), at)
		if !s.Stale {
			if err != nil {
				s.Error(err)
			}
			return
		}
		s.wants(err, engine.ErrNotFound)
		s.close(e)
		if _, err := s.open().Signer(s.Context(), at); err != nil {
			s.Error(err)
		}
	}},
	{"more than one match is an error, never a guess", func(s *suite) {
		e := s.open()
		first, public := s.generate(e, "name")
		second, _ := s.generate(e, "name")
		label := s.parse("pkcs11:object=name;type=private")
		_, err := e.Signer(s.Context(), label)
		s.wants(err, nil)
		var ambiguous *engine.AmbiguousError
		if !errors.As(err, &ambiguous) || len(ambiguous.Matches) != 2 {
			s.Fatalf("%v is not an *engine.AmbiguousError of two", err)
		}
		for _, match := range ambiguous.Matches {
			if match.Address != first && match.Address != second || match.Class != engine.ClassPrivateKey {
				s.Errorf("%v is neither", match)
			}
		}
		_, err = e.KeyAttributes(s.Context(), label)
		if !errors.As(err, &ambiguous) {
			s.Errorf("%v is not an *engine.AmbiguousError", err)
		}
		s.wants(e.RemoveKey(s.Context(), label), nil)
		s.signs(e, first, public)
		s.holds(e, 2, 2, 0)
		c := s.newCA("root", nil)
		for _, cert := range []*x509.Certificate{s.leaf(c, public), s.leaf(c, public)} {
			e = s.elsewhere(e, func() error { return s.WriteCertificate(cert.Raw, "twin", "01") })
		}
		_, err = e.Certificate(s.Context(), s.parse("pkcs11:object=twin;id=%01;type=cert"))
		if !errors.As(err, &ambiguous) {
			s.Errorf("%v is not an *engine.AmbiguousError", err)
		}
	}},
	{"a search survives objects whose attributes cannot be read", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		c := s.newCA("root", nil)
		leaf := s.leaf(c, public)
		certs := s.store(e, at, leaf)
		if err := s.WriteCertificate(c.cert.Raw, "broken", "01"); err != nil {
			s.Fatal(err)
		}
		s.close(e)
		s.Damage(s.T, "broken")
		e = s.open()
		s.signs(e, at, public)
		s.finds(e, certs[0], leaf)
		s.place(e, at, leaf, c.cert)
		s.remove(e, certs)
		if _, err := e.RecoverKey(s.Context(), at); err != nil {
			s.Error(err)
		}
		broken := 0
		for _, object := range s.list(e) {
			if object.Err != nil {
				broken++
			}
		}
		if broken > 1 {
			s.Errorf("%d objects cannot be read, one is damaged", broken)
		}
	}},
	{"RemoveKey destroys both halves and nothing else", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		other, otherPublic := s.generate(e, "name")
		s.store(e, at, s.leaf(s.newCA("root", nil), public))
		if err := e.RemoveKey(s.Context(), at); err != nil {
			s.Fatal(err)
		}
		s.holds(e, 1, 1, 1)
		s.signs(e, other, otherPublic)
		s.wants(e.RemoveKey(s.Context(), at), engine.ErrNotFound)
		_, err := e.Signer(s.Context(), at)
		s.wants(err, engine.ErrNotFound)
		// one half is enough
		id := hex.EncodeToString(s.objectAt(e, other).ID)
		e = s.elsewhere(e, func() error { return s.Delete(engine.ClassPrivateKey, id) })
		if err := e.RemoveKey(s.Context(), other); err != nil {
			s.Error(err)
		}
		s.holds(e, 0, 0, 1)
	}},
	{"a pair found after a crash is kept only whole", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		recovered, err := e.RecoverKey(s.Context(), at)
		if err != nil {
			s.Fatal(err)
		}
		if key, ok := recovered.(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(public) {
			s.Error("another public key")
		}
		for _, half := range []engine.Class{engine.ClassPrivateKey, engine.ClassPublicKey} {
			torn, _ := s.generate(e, "torn")
			id := hex.EncodeToString(s.objectAt(e, torn).ID)
			e = s.elsewhere(e, func() error { return s.Delete(half, id) })
			_, err := e.RecoverKey(s.Context(), torn)
			s.wants(err, engine.ErrNotFound)
			s.holds(e, 1, 1, 0)
		}
		// halves that do not belong together
		torn, _ := s.generate(e, "torn")
		id := hex.EncodeToString(s.objectAt(e, torn).ID)
		e = s.elsewhere(e, func() error {
			if err := s.Delete(engine.ClassPublicKey, id); err != nil {
				return err
			}
			_, err := s.GenerateEC("torn", id)
			return err
		})
		_, err = e.RecoverKey(s.Context(), torn)
		s.wants(err, engine.ErrNotFound)
		s.holds(e, 1, 1, 0)
		never, err := e.NewKeyAddress("never")
		if err != nil {
			s.Fatal(err)
		}
		_, err = e.RecoverKey(s.Context(), never)
		s.wants(err, engine.ErrNotFound)
		s.signs(e, at, public)
	}},
	{"a key recovered after a crash is what was asked for", func(s *suite) {
		e := s.open()
		at, err := e.NewKeyAddress("name")
		if err != nil {
			s.Fatal(err)
		}
		s.Inject(s.T, FaultExtractable)
		s.LoseAfter(s.T, "C_GenerateKeyPair")
		_, err = e.GenerateKey(s.Context(), at, engine.KeySpec{})
		s.wants(err, engine.ErrDeviceLost)
		_, err = e.RecoverKey(s.Context(), at)
		s.wants(err, engine.ErrNotFound)
		s.holds(e, 0, 0, 0)
	}},
	{"List is whole and in a stable order", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "b")
		s.generate(e, "a")
		s.store(e, at, s.leaf(s.newCA("root", nil), public))
		first := s.list(e)
		if len(first) != 5 {
			s.Errorf("%d objects, want 5", len(first))
		}
		if !slices.IsSortedFunc(first, func(a, b engine.Object) int {
			return strings.Compare(string(a.Class)+"\x00"+a.Label, string(b.Class)+"\x00"+b.Label)
		}) {
			s.Errorf("not sorted: %v", first)
		}
		s.close(e)
		e = s.open()
		for i, object := range s.list(e) {
			if object.Address != first[i].Address {
				s.Errorf("%d: %s, before %s", i, object.Address, first[i].Address)
			}
			if text := object.Address.String(); strings.Contains(text, "?") {
				s.Errorf("%s has query attributes", text)
			}
		}
	}},
	{"signatures are made for whole digests of any usual hash", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		signer := s.signs(e, at, public)
		for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			if _, err := signer.Sign(rand.Reader, make([]byte, hash.Size()), hash); err != nil {
				s.Errorf("%s: %v", hash, err)
			}
		}
		_, err := signer.Sign(rand.Reader, make([]byte, 31), crypto.SHA256)
		s.wants(err, nil)
	}},
	{"a key of a kind that the driver does not have disturbs nothing", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		e = s.elsewhere(e, func() error { return s.GenerateForeign("foreign", "0102") })
		s.signs(e, at, public)
		s.store(e, at, s.leaf(s.newCA("root", nil), public))
		if _, err := e.RecoverKey(s.Context(), at); err != nil {
			s.Error(err)
		}
		_, other := s.generate(e, "other")
		if other == nil {
			s.Error("no key beside it")
		}
		for _, object := range s.list(e) {
			if object.Err != nil {
				s.Errorf("%s: %v", object.Label, object.Err)
			}
		}
		foreign := s.parse("pkcs11:object=foreign;type=private")
		_, err := e.Signer(s.Context(), foreign)
		s.wants(err, engine.ErrUnsupported)
		if _, err := e.KeyAttributes(s.Context(), foreign); err != nil {
			s.Error(err)
		}
		s.holds(e, 3, 3, 1)
	}},
	{"what a module cannot do is ErrUnsupported with the module's name", func(s *suite) {
		e := s.open()
		at, err := e.NewKeyAddress("name")
		if err != nil {
			s.Fatal(err)
		}
		_, err = e.GenerateKey(s.Context(), at, engine.KeySpec{Algorithm: "EC P-192"})
		s.wants(err, engine.ErrUnsupported)
		s.Inject(s.T, FaultUnsupported)
		_, err = e.GenerateKey(s.Context(), at, engine.KeySpec{})
		s.wants(err, engine.ErrUnsupported)
		if !strings.Contains(err.Error(), s.Module) || !strings.Contains(err.Error(), engine.ErrUnsupported.Error()) {
			s.Errorf("%v does not name %s", err, s.Module)
		}
	}},
	{"methods are safe for concurrent use", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		signer := s.signs(e, at, public)
		var group sync.WaitGroup
		errs := make(chan error, 100)
		for i := range 8 {
			group.Go(func() {
				digest := sha256.Sum256([]byte{byte(i)})
				for range 25 {
					if _, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
						errs <- fmt.Errorf("sign: %w", err)
						return
					}
				}
				if _, err := e.List(context.Background(), nil); err != nil {
					errs <- err
				}
			})
		}
		group.Go(func() {
			made, err := e.NewKeyAddress("other")
			if err == nil {
				_, err = e.GenerateKey(context.Background(), made, engine.KeySpec{})
			}
			if err == nil {
				err = e.RemoveKey(context.Background(), made)
			}
			if err != nil {
				errs <- err
			}
		})
		group.Wait()
		close(errs)
		for err := range errs {
			s.Error(err)
		}
		s.holds(e, 1, 1, 0)
	}},
	{"after Close all methods return ErrClosed", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		signer := s.signs(e, at, public)
		s.close(e)
		s.close(e)
		calls := len(s.Calls(s.T))
		ctx := s.Context()
		_, errNew := e.NewKeyAddress("name")
		_, errGenerate := e.GenerateKey(ctx, at, engine.KeySpec{})
		_, errSigner := e.Signer(ctx, at)
		_, errSign := signer.Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
		_, errRecover := e.RecoverKey(ctx, at)
		_, errAttributes := e.KeyAttributes(ctx, at)
		_, errCertificate := e.Certificate(ctx, s.parse("pkcs11:object=a;id=%01;type=cert"))
		_, errList := e.List(ctx, nil)
		for _, err := range []error{errNew, errGenerate, errSigner, errSign, errRecover, errAttributes, errCertificate, errList, e.RemoveKey(ctx, at)} {
			s.wants(err, engine.ErrClosed)
		}
		if len(s.Calls(s.T)) != calls {
			s.Error("the module was called")
		}
	}},
	{"a context that has ended stops what has not begun", func(s *suite) {
		e := s.open()
		at, public := s.generate(e, "name")
		calls := len(s.Calls(s.T))
		ctx := cancelled()
		_, errOpen := s.Driver.Open(ctx, s.parse(s.Address), s.Options)
		_, errGenerate := e.GenerateKey(ctx, at, engine.KeySpec{})
		_, errSigner := e.Signer(ctx, at)
		_, errList := e.List(ctx, nil)
		for _, err := range []error{errOpen, errGenerate, errSigner, errList, e.RemoveKey(ctx, at)} {
			s.wants(err, context.Canceled)
		}
		if len(s.Calls(s.T)) != calls {
			s.Error("the module was called")
		}
		s.signs(e, at, public)
	}},
}
