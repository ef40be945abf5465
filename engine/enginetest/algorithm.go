package enginetest

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"slices"
	"strings"
	"testing"

	"estenroll/engine"
)

// runAlgorithms holds each algorithm of the token to what is true of a key. A
// pair is generated once for all of it: RSA takes seconds.
func runAlgorithms(t *testing.T, h Harness) {
	token := h.New(t)
	named := slices.Sorted(slices.Values(slices.Concat(token.Algorithms, token.Unsupported)))
	if algorithms := slices.Sorted(slices.Values(engine.Algorithms())); !slices.Equal(named, algorithms) {
		t.Fatalf("the harness says of %v whether the token can generate them, want %v", named, algorithms)
	}
	for _, algorithm := range token.Algorithms {
		t.Run(string(algorithm), func(t *testing.T) {
			s := &suite{T: t, Token: token}
			e := s.open()
			at, err := e.NewKeyAddress("name")
			if err != nil {
				s.Fatal(err)
			}
			public, err := e.GenerateKey(s.Context(), at, engine.KeySpec{Algorithm: algorithm})
			if err != nil {
				s.Fatal(err)
			}
			for _, rule := range algorithmRules {
				if h.Without[rule.name] != "" {
					continue
				}
				t.Run(rule.name, func(t *testing.T) {
					rule.test(&suite{T: t, Token: token}, &pair{algorithm: algorithm, engine: e, at: at, public: public})
				})
			}
			if err := e.RemoveKey(s.Context(), at); err != nil {
				s.Error(err)
			}
			s.holds(e, 0, 0, 0)
		})
	}
	for _, algorithm := range token.Unsupported {
		t.Run(string(algorithm)+" is ErrUnsupported, and nothing is left", func(t *testing.T) {
			s := &suite{T: t, Token: token}
			e := s.open()
			at, err := e.NewKeyAddress("name")
			if err != nil {
				s.Fatal(err)
			}
			_, err = e.GenerateKey(s.Context(), at, engine.KeySpec{Algorithm: algorithm})
			s.wants(err, engine.ErrUnsupported)
			s.holds(e, 0, 0, 0)
		})
	}
}

// pair is the key of one algorithm.
type pair struct {
	algorithm engine.Algorithm
	engine    opened
	at        engine.Address
	public    crypto.PublicKey
}

type algorithmRule struct {
	name string
	test func(*suite, *pair)
}

var algorithmRules = []algorithmRule{
	{"it is what was asked for, for signing only", func(s *suite, p *pair) {
		if got := engine.AlgorithmOf(p.public); got != p.algorithm {
			s.Errorf("got %s", got)
		}
		s.forSigningOnly(p.engine, p.at)
	}},
	{"it signs whole digests of any usual hash", func(s *suite, p *pair) {
		signer, err := p.engine.Signer(s.Context(), p.at)
		if err != nil {
			s.Fatal(err)
		}
		for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			s.signsAs(signer, p.public, hash)
		}
		_, err = signer.Sign(rand.Reader, make([]byte, 31), crypto.SHA256)
		s.wants(err, nil)
	}},
	{"an RSA key signs with PSS, with any salt that fits", func(s *suite, p *pair) {
		key, isRSA := p.public.(*rsa.PublicKey)
		if !isRSA {
			return
		}
		signer, err := p.engine.Signer(s.Context(), p.at)
		if err != nil {
			s.Fatal(err)
		}
		for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			for _, salt := range []int{rsa.PSSSaltLengthEqualsHash, rsa.PSSSaltLengthAuto, 20} {
				s.signsAs(signer, p.public, &rsa.PSSOptions{Hash: hash, SaltLength: salt})
			}
		}
		digest := sha256.Sum256(nil)
		for _, salt := range []int{-2, key.Size() - 2 - len(digest) + 1} {
			_, err := signer.Sign(rand.Reader, digest[:], &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: salt})
			s.wants(err, nil)
		}
	}},
	{"an RSA signature names its hash", func(s *suite, p *pair) {
		if _, isRSA := p.public.(*rsa.PublicKey); !isRSA {
			return
		}
		signer, err := p.engine.Signer(s.Context(), p.at)
		if err != nil {
			s.Fatal(err)
		}
		_, err = signer.Sign(rand.Reader, make([]byte, 32), nil)
		s.wants(err, nil)
		for _, hash := range []crypto.SignerOpts{crypto.Hash(0), crypto.SHA1, &rsa.PSSOptions{}} {
			_, err = signer.Sign(rand.Reader, make([]byte, 20), hash)
			s.wants(err, nil)
		}
	}},
	{"its certificate is stored and found", func(s *suite, p *pair) {
		leaf := s.leaf(s.newCA("root", nil), p.public)
		at := s.store(p.engine, p.at, leaf)
		s.remove(p.engine, at)
	}},
	{"after a crash it is recovered whole, and found by its id alone", func(s *suite, p *pair) {
		recovered, err := p.engine.RecoverKey(s.Context(), p.at)
		if err != nil {
			s.Fatal(err)
		}
		if key, ok := recovered.(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(p.public) {
			s.Error("another public key")
		}
		address := p.at.String() // label and id, canonical
		id := address[strings.Index(address, "id="):]
		s.signs(p.engine, s.parse("pkcs11:"+id), p.public)
	}},
	{"another one than was asked for is destroyed", func(s *suite, p *pair) {
		switch p.algorithm {
		case engine.ECP256, engine.RSA2048:
			return // there is none that is weaker
		}
		s.Inject(s.T, FaultWeaker)
		at, err := p.engine.NewKeyAddress("weaker")
		if err != nil {
			s.Fatal(err)
		}
		_, err = p.engine.GenerateKey(s.Context(), at, engine.KeySpec{Algorithm: p.algorithm})
		s.wants(err, nil)
		s.holds(p.engine, 1, 1, 0)
	}},
	{"what the module cannot do is ErrUnsupported", func(s *suite, p *pair) {
		s.Inject(s.T, FaultUnsupported)
		at, err := p.engine.NewKeyAddress("unsupported")
		if err != nil {
			s.Fatal(err)
		}
		_, err = p.engine.GenerateKey(s.Context(), at, engine.KeySpec{Algorithm: p.algorithm})
		s.wants(err, engine.ErrUnsupported)
		if err != nil && !strings.Contains(err.Error(), string(p.algorithm)) {
			s.Errorf("%v does not name %s", err, p.algorithm)
		}
		s.holds(p.engine, 1, 1, 0)
	}},
}

// forSigningOnly wants a private key's attributes to be those of a generated one.
func (s *suite) forSigningOnly(e opened, at engine.Address) {
	s.Helper()
	got, err := e.KeyAttributes(s.Context(), at)
	if err != nil {
		s.Fatal(err)
	}
	for name, flag := range map[string]struct {
		got  *bool
		want bool
	}{
		"private": {got.Private, true}, "sensitive": {got.Sensitive, true}, "extractable": {got.Extractable, false},
		"sign": {got.Sign, true}, "decrypt": {got.Decrypt, false}, "unwrap": {got.Unwrap, false}, "derive": {got.Derive, false},
	} {
		if flag.got == nil || *flag.got != flag.want {
			s.Errorf("%s is not %t", name, flag.want)
		}
	}
}
