package enginetest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"slices"

	"estenroll/engine"
)

// made is a key that a server has made, in PKCS#8.
func (s *suite) made(algorithm engine.Algorithm) (pkcs8 []byte, public crypto.PublicKey) {
	s.Helper()
	var key crypto.Signer
	var err error
	switch algorithm {
	case engine.ECP256:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case engine.ECP521:
		key, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case engine.RSA2048:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	default:
		_, key, err = ed25519.GenerateKey(rand.Reader)
	}
	if err == nil {
		pkcs8, err = x509.MarshalPKCS8PrivateKey(key)
	}
	if err != nil {
		s.Fatal(err)
	}
	return pkcs8, key.Public()
}

// imports wants a key to be taken in, and each of the checks of it to hold.
func (s *suite) imports(e opened, importer engine.KeyImporter, algorithm engine.Algorithm, checks ...func(opened, engine.Address)) {
	s.Helper()
	pkcs8, public := s.made(algorithm)
	before := bytes.Clone(pkcs8)
	at, err := e.NewKeyAddress("name")
	if err != nil {
		s.Fatal(err)
	}
	got, err := importer.ImportKey(s.Context(), at, pkcs8)
	if err != nil {
		s.Fatalf("%s: %v", algorithm, err)
	}
	if !bytes.Equal(pkcs8, before) {
		s.Error("the DER has changed")
	}
	if equal, ok := got.(interface{ Equal(crypto.PublicKey) bool }); !ok || !equal.Equal(public) {
		s.Errorf("%s: another key: %v", algorithm, got)
	}
	s.signs(e, at, public)
	for _, check := range checks {
		check(e, at)
	}
	_, err = importer.ImportKey(s.Context(), at, pkcs8)
	s.wants(err, engine.ErrExists)
	if err := e.RemoveKey(s.Context(), at); err != nil {
		s.Error(err)
	}
	s.holds(e, 0, 0, 0)
}

// importsEach imports keys of each family, where the token takes in any.
func (s *suite) importsEach(checks ...func(opened, engine.Address)) {
	e := s.open()
	importer, ok := e.Engine.(engine.KeyImporter)
	if !ok {
		return // this driver never can
	}
	for _, algorithm := range []engine.Algorithm{engine.ECP256, engine.ECP521, engine.RSA2048} {
		err := importer.CanImportKey(s.Context(), engine.KeySpec{Algorithm: algorithm})
		s.holds(e, 0, 0, 0)
		if s.NoImport {
			s.wants(err, engine.ErrUnsupported)
			continue
		}
		if err != nil {
			s.Fatal(err)
		}
		s.imports(e, importer, algorithm, checks...)
	}
}

var importRules = []rule{
	{"an imported key signs, and is no other's, or the token says that it takes none", func(s *suite) { s.importsEach() }},
	{"an imported key is private, sensitive, not extractable and for signing only", func(s *suite) { s.importsEach(s.forSigningOnly) }},
	{"a key of a kind that the driver does not have is not taken in, and nothing of it shown", func(s *suite) {
		e := s.open()
		importer, ok := e.Engine.(engine.KeyImporter)
		if !ok {
			return
		}
		for _, algorithm := range []engine.Algorithm{"Ed25519", ""} {
			pkcs8, _ := s.made(algorithm)
			if algorithm == "" {
				pkcs8 = []byte("no key but a secret")
			}
			at, err := e.NewKeyAddress("name")
			if err != nil {
				s.Fatal(err)
			}
			_, err = importer.ImportKey(s.Context(), at, pkcs8)
			s.wants(err, nil)
			if bytes.Contains([]byte(err.Error()), []byte("secret")) {
				s.Errorf("it shows what it read: %v", err)
			}
			s.holds(e, 0, 0, 0)
		}
	}},
	{"the place of a certificate is known before its key is there", func(s *suite) {
		e := s.open()
		root := s.newCA("root", nil)
		key, err := e.NewKeyAddress("name")
		if err != nil {
			s.Fatal(err)
		}
		chain := []*x509.Certificate{s.leaf(root, root.key.Public()), root.cert}
		before := s.place(e, key, chain...)
		if _, err := e.GenerateKey(s.Context(), key, engine.KeySpec{}); err != nil {
			s.Fatal(err)
		}
		if after := s.place(e, key, chain...); !slices.Equal(before, after) {
			s.Errorf("%s, and %s when it is there", before, after)
		}
	}},
	{"a key that is refused as it is comes in wrapped", func(s *suite) {
		e := s.open()
		importer, ok := e.Engine.(engine.KeyImporter)
		if !ok || s.NoImport {
			return
		}
		for _, algorithm := range []engine.Algorithm{engine.ECP256, engine.RSA2048} {
			s.Inject(s.T, FaultRefuseKey)
			if s.NoUnwrap {
				s.wants(importer.CanImportKey(s.Context(), engine.KeySpec{Algorithm: algorithm}), engine.ErrUnsupported)
				s.holds(e, 0, 0, 0)
				continue
			}
			if err := importer.CanImportKey(s.Context(), engine.KeySpec{Algorithm: algorithm}); err != nil {
				s.Error(err)
			}
			s.Inject(s.T, FaultRefuseKey)
			s.imports(e, importer, algorithm, s.forSigningOnly)
		}
	}},
	{"what a failed import leaves is removed", func(s *suite) {
		e := s.open()
		importer, ok := e.Engine.(engine.KeyImporter)
		if !ok || s.NoImport {
			return
		}
		s.Inject(s.T, FaultFailKey) // made, and said not to be
		if s.NoUnwrap {
			pkcs8, _ := s.made(engine.ECP256)
			at, err := e.NewKeyAddress("name")
			if err != nil {
				s.Fatal(err)
			}
			_, err = importer.ImportKey(s.Context(), at, pkcs8)
			s.wants(err, engine.ErrUnsupported)
			s.holds(e, 0, 0, 0)
		} else {
			s.imports(e, importer, engine.ECP256, s.forSigningOnly)
		}
	}},
}
