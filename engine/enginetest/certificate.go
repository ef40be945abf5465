package enginetest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"estenroll/engine"
)

// ca is a certification authority of the suite.
type ca struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func (s *suite) newCA(name string, parent *ca) *ca {
	s.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.Fatal(err)
	}
	made := &ca{key: key}
	if parent == nil {
		parent = made
	}
	made.cert = parent.issue(s, name, key.Public(), true)
	return made
}

func (c *ca) issue(s *suite, name string, public crypto.PublicKey, isCA bool) *x509.Certificate {
	s.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		s.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name + ", TEST ONLY"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: isCA, BasicConstraintsValid: isCA,
	}
	parent := c.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, c.key)
	if err != nil {
		s.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		s.Fatal(err)
	}
	return cert
}

func (s *suite) leaf(c *ca, public crypto.PublicKey) *x509.Certificate {
	s.Helper()
	return c.issue(s, "device", public, false)
}

// objectAt returns what the listing says of the object at an address.
func (s *suite) objectAt(e opened, at engine.Address) engine.Object {
	s.Helper()
	found, err := e.List(s.Context(), at)
	if err != nil || len(found) != 1 {
		s.Fatalf("%s: %v, %v, want one object", at, found, err)
	}
	return found[0]
}

// octets is an identifier as an address has it.
func octets(id []byte) string {
	var text strings.Builder
	for _, b := range id {
		fmt.Fprintf(&text, "%%%02X", b)
	}
	return text.String()
}

var certificateRules = []rule{
	{"two certificates may exist for one key, each with its own label and the key's id", func(s *suite) {
		e := s.open()
		key, public := s.generate(e, "name")
		c := s.newCA("root", nil)
		old, renewed := s.leaf(c, public), s.leaf(c, public)
		first, second := s.store(e, key, old)[0], s.store(e, key, renewed)[0]
		s.finds(e, first, old)
		s.finds(e, second, renewed)
		keyID := s.objectAt(e, key).ID
		a, b := s.objectAt(e, first), s.objectAt(e, second)
		if a.Label == b.Label || !strings.HasPrefix(a.Label, "name-") || !strings.HasPrefix(b.Label, "name-") {
			s.Errorf("labels %q and %q", a.Label, b.Label)
		}
		if !slices.Equal(a.ID, keyID) || !slices.Equal(b.ID, keyID) {
			s.Errorf("ids %x and %x, the key's is %x", a.ID, b.ID, keyID)
		}
		s.remove(e, []engine.Address{first})
		s.finds(e, second, renewed)
		_, err := e.Certificate(s.Context(), first)
		s.wants(err, engine.ErrNotFound)
		s.remove(e, []engine.Address{first}) // what is gone already is no error
	}},
	{"a reference to a certificate always carries both id and label", func(s *suite) {
		e := s.open()
		key, public := s.generate(e, "name")
		root := s.newCA("root", nil)
		issuing := s.newCA("issuing", root)
		leaf := s.leaf(issuing, public)
		for _, at := range s.store(e, key, leaf, issuing.cert, root.cert) {
			if text := at.String(); !strings.Contains(text, "object=") || !strings.Contains(text, "id=") || strings.Contains(text, "pin") {
				s.Errorf("%s", text)
			}
			again, err := s.Driver.Parse(at.String())
			if err != nil || again != at {
				s.Errorf("%s parses to %v, %v", at, again, err)
			}
		}
		// with one of them only, nothing is stored or removed
		label := s.objectAt(e, key).Label
		half := s.parse("pkcs11:object=" + label + ";type=cert")
		s.wants(e.StoreCertificates(s.Context(), []engine.Address{half}, []*x509.Certificate{leaf}), nil)
		s.wants(e.RemoveCertificates(s.Context(), []engine.Address{half}), nil)
		s.holds(e, 1, 1, 3)
	}},
	{"CA and chain certificates never carry the key's id", func(s *suite) {
		e := s.open()
		key, public := s.generate(e, "name")
		c := s.newCA("root", nil)
		keyID := s.objectAt(e, key).ID
		// not even where a factory gave it to one
		e = s.elsewhere(e, func() error { return s.WriteCertificate(c.cert.Raw, "factory", hex.EncodeToString(keyID)) })
		leaf := s.leaf(c, public)
		if s.Unique { // the factory's is not taken for it all the same
			chain := []*x509.Certificate{leaf, c.cert}
			s.wants(e.StoreCertificates(s.Context(), s.place(e, key, chain...), chain), nil)
			s.holds(e, 1, 1, 1)
			return
		}
		at := s.store(e, key, leaf, c.cert)
		if slices.Equal(s.objectAt(e, at[1]).ID, keyID) {
			s.Errorf("%s has the key's id", at[1])
		}
	}},
	{"chain certificates are shared and counted, not stored twice", func(s *suite) {
		e := s.open()
		root := s.newCA("root", nil)
		issuing := s.newCA("issuing", root)
		key1, public1 := s.generate(e, "one")
		key2, public2 := s.generate(e, "two")
		first := s.store(e, key1, s.leaf(issuing, public1), issuing.cert, root.cert)
		second := s.store(e, key2, s.leaf(issuing, public2), issuing.cert, root.cert)
		if first[1] != second[1] || first[2] != second[2] {
			s.Errorf("%s and %s are not shared", first[1], second[1])
		}
		s.holds(e, 2, 2, 4)
		s.remove(e, first)
		s.holds(e, 2, 2, 3)
		s.remove(e, second)
		s.holds(e, 2, 2, 0)
		s.remove(e, second)
	}},
	{"a chain certificate of another program is shared by value and left alone", func(s *suite) {
		e := s.open()
		key, public := s.generate(e, "name")
		c := s.newCA("root", nil)
		e = s.elsewhere(e, func() error { return s.WriteCertificate(c.cert.Raw, "of the factory", "c0ffee") })
		at := s.store(e, key, s.leaf(c, public), c.cert)
		if got := s.objectAt(e, at[1]).Label; got != "of the factory" {
			s.Errorf("at %s, want the factory's", at[1])
		}
		s.holds(e, 1, 1, 2)
		s.remove(e, at)
		s.holds(e, 1, 1, 1)
		if s.Unique {
			if err := s.WriteCertificate(c.cert.Raw, "of the factory", "c0ffee"); err == nil {
				s.Error("the token holds twins")
			}
			return
		}
		// twins, which no reference tells apart, are not shared
		e = s.elsewhere(e, func() error { return s.WriteCertificate(c.cert.Raw, "of the factory", "c0ffee") })
		at = s.store(e, key, s.leaf(c, public), c.cert)
		s.holds(e, 1, 1, 4)
		s.remove(e, at)
		s.holds(e, 1, 1, 2)
	}},
	{"the removal of a leaf is no guess among different ones", func(s *suite) {
		e := s.open()
		c := s.newCA("root", nil)
		for _, name := range []string{"one", "two"} {
			_, public := s.generate(e, name)
			e = s.elsewhere(e, func() error { return s.WriteCertificate(s.leaf(c, public).Raw, "factory", "c0ffee") })
		}
		at := []engine.Address{s.parse("pkcs11:object=factory;id=%C0%FF%EE;type=cert")}
		var ambiguous *engine.AmbiguousError
		if err := e.RemoveCertificates(s.Context(), at); !errors.As(err, &ambiguous) {
			s.Errorf("got %v, want an *engine.AmbiguousError", err)
		}
		s.holds(e, 2, 2, 2)
	}},
	{"a trust anchor is where somebody chose, without a key's id", func(s *suite) {
		e := s.open()
		anchors, ok := e.Engine.(engine.AnchorStore)
		if !ok {
			return // this driver never can
		}
		key, public := s.generate(e, "name")
		keyID := s.objectAt(e, key).ID
		root, other := s.newCA("root", nil), s.newCA("root", nil)
		chosen := s.parse("pkcs11:object=anchor-0123456789abcdef")
		at, there, err := anchors.AnchorAddress(s.Context(), chosen, root.cert)
		if err != nil || there {
			s.Fatalf("%v, %t, %v", at, there, err)
		}
		s.holds(e, 1, 1, 0)
		for range 2 {
			if err := e.StoreCertificates(s.Context(), []engine.Address{at}, []*x509.Certificate{root.cert}); err != nil {
				s.Fatal(err)
			}
		}
		s.finds(e, at, root.cert)
		if again, there, err := anchors.AnchorAddress(s.Context(), chosen, root.cert); err != nil || !there || again != at {
			s.Errorf("got %v, %t, %v, want %v once more", again, there, err, at)
		}
		if stored := s.objectAt(e, at); slices.Equal(stored.ID, keyID) || len(stored.ID) == 0 || stored.Label != "anchor-0123456789abcdef" {
			s.Errorf("stored as %+v", stored)
		}
		// The same root above a chain, and nothing of it goes with the leaf.
		leaf := s.store(e, key, s.leaf(root, public))
		s.remove(e, leaf)
		s.holds(e, 1, 1, 1)
		for name, wrong := range map[string]string{
			"the id of a key":       "pkcs11:object=other;id=" + octets(keyID),
			"no label":              "pkcs11:id=%01",
			"a key's":               "pkcs11:object=other;type=private",
			"a chain certificate's": "pkcs11:object=est-enroll-ca-0123456789abcdef",
		} {
			if at, _, err := anchors.AnchorAddress(s.Context(), s.parse(wrong), root.cert); err == nil {
				s.Errorf("%s: placed at %s", name, at)
			}
		}
		_, _, err = anchors.AnchorAddress(s.Context(), at, other.cert)
		s.wants(err, engine.ErrExists)
		s.remove(e, []engine.Address{at})
		s.holds(e, 1, 1, 0)
	}},
	{"CA certificates that issued each other go together", func(s *suite) {
		e := s.open()
		key, public := s.generate(e, "name")
		oldCA, newCA := s.newCA("CA", nil), s.newCA("CA", nil)
		oldWithNew := newCA.issue(s, "CA", oldCA.key.Public(), true)
		newWithOld := oldCA.issue(s, "CA", newCA.key.Public(), true)
		at := s.store(e, key, s.leaf(newCA, public), oldWithNew, newWithOld, newCA.cert)
		s.remove(e, at)
		s.holds(e, 1, 1, 0)
	}},
	{"storing is repeated, and addresses are the same, after a crash", func(s *suite) {
		e := s.open()
		root := s.newCA("root", nil)
		issuing := s.newCA("issuing", root)
		key, public := s.generate(e, "name")
		chain := []*x509.Certificate{s.leaf(issuing, public), issuing.cert, root.cert}
		planned := s.place(e, key, chain...)
		s.holds(e, 1, 1, 0)
		// a crash between two creates leaves some of them
		if err := e.StoreCertificates(s.Context(), planned[1:2], chain[1:2]); err != nil {
			s.Fatal(err)
		}
		if again := s.place(e, key, chain...); !slices.Equal(again, planned) {
			s.Errorf("got %v, want %v", again, planned)
		}
		s.store(e, key, chain...)
		s.store(e, key, chain...)
		s.holds(e, 1, 1, 3)
		if len(s.Calls(s.T)) > 0 {
			s.counts("C_CreateObject", 3)
		}
	}},
	{"a half-written object is replaced, created before it is destroyed, never rewritten", func(s *suite) {
		e := s.open()
		key, public := s.generate(e, "name")
		leaf := s.leaf(s.newCA("root", nil), public)
		at := s.store(e, key, leaf)
		label := s.objectAt(e, at[0]).Label
		s.close(e)
		s.Damage(s.T, label)
		e = s.open()
		_, err := e.Certificate(s.Context(), at[0])
		s.wants(err, engine.ErrNotFound)
		start := len(s.Calls(s.T))
		s.store(e, key, leaf)
		s.holds(e, 1, 1, 1)
		calls := s.Calls(s.T)[start:]
		if create, destroy := slices.Index(calls, "C_CreateObject"), slices.Index(calls, "C_DestroyObject"); create < 0 || destroy < create {
			s.Errorf("created at %d, destroyed at %d", create, destroy)
		}
		s.counts("C_SetAttributeValue", 0)
	}},
}
