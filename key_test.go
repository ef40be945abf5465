package estenroll_test

import (
	"crypto"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// owned has another program make a key in the token.
func (s *site) owned(t *testing.T, kind, label, id string) engine.Address {
	t.Helper()
	if _, err := s.token.Generate(kind, label, id); err != nil {
		t.Fatal(err)
	}
	return s.address(t, "pkcs11:object="+label)
}

func (s *site) signs(t *testing.T, at engine.Address) {
	t.Helper()
	signer, err := s.engine.Signer(t.Context(), at)
	if err == nil {
		_, err = signer.Sign(nil, make([]byte, 32), crypto.SHA256)
	}
	if err != nil {
		t.Errorf("%s: %v", at, err)
	}
}

// Each kind of key enrols and renews; what the configuration asks for is what is
// generated.
func TestKeyTypes(t *testing.T) {
	site := newSite(t, testserver.Config{})
	for _, algorithm := range []engine.Algorithm{engine.ECP384, engine.ECP521, engine.RSA2048} {
		for _, pss := range []bool{false, algorithm == engine.RSA2048} {
			t.Run(string(algorithm), func(t *testing.T) {
				d := site.device(t, strings.ReplaceAll(string(algorithm), " ", "-"))
				d.cfg.KeySpec.Algorithm, d.cfg.Request.PSS = algorithm, pss
				d.mustEnroll()
				first := d.requests
				renewed := d.mustRenew()
				if got := engine.AlgorithmOf(renewed.Certificate.PublicKey); got != algorithm {
					t.Errorf("the certificate is for %s", got)
				}
				for _, request := range append(first, d.requests...) {
					// id-RSASSA-PSS, 1.2.840.113549.1.1.10
					if !request.operation.Asks() && strings.Contains(request.body, "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0a") != pss {
						t.Errorf("%s is signed with PSS: %t", request.operation, !pss)
					}
				}
				if status := d.status(); status.Current.KeyType != algorithm || status.Current.Problem != "" {
					t.Errorf("status %+v", status.Current)
				}
				d.tidy(2)
				site.clear(t)
			})
		}
	}
}

// An existing key, the IDevID's too, is used as it is: nothing generates one, and
// it outlives a refused answer, renewals, its certificates and another key.
func TestExistingKey(t *testing.T) {
	for name, key := range map[string]func(*testing.T, *site) engine.Address{
		"EC P-384":   func(t *testing.T, s *site) engine.Address { return s.owned(t, "EC:secp384r1", "owned", "77") },
		"RSA 2048":   func(t *testing.T, s *site) engine.Address { return s.owned(t, "rsa:2048", "owned", "77") },
		"the IDevID": func(t *testing.T, s *site) engine.Address { return s.address(t, "pkcs11:id=%01") },
	} {
		t.Run(name, func(t *testing.T) {
			c := new(clock)
			site := newSite(t, testserver.Config{Lifetime: time.Hour, Now: c.now})
			d := site.device(t, "existing")
			d.now = c.now
			d.cfg.Key = key(t, site)
			// By its id alone it is that of the key's other certificates, too.
			d.cfg.IDevID.Certificate = site.address(t, "pkcs11:id=%01;type=cert")
			d.hook = func(_, call string) error {
				if call == "GenerateKey" || call == "RemoveKey" {
					t.Errorf("%s", call)
				}
				return nil
			}
			site.faults(t, testserver.Faults{WrongKey: true})
			_, err := d.enroll()
			wantError(t, err, est.ErrKeyMismatch)
			site.signs(t, d.cfg.Key)
			site.faults(t, testserver.Faults{})
			enrolled := d.mustEnroll()
			if at := d.uri(enrolled.Key.String()); at.Object == "" || at.ID == "" || at.Token == "" {
				t.Errorf("the key's address is not whole: %s", at)
			}
			d.mustRenew()
			d.mustRenew()
			if pairs := len(d.journal().Pairs); pairs != 2 {
				t.Errorf("%d pairs", pairs)
			}
			site.signs(t, d.cfg.Key)
			if status := d.status(); !status.Enrolled || status.Current.Problem != "" {
				t.Errorf("status %+v", status.Current)
			}

			// Whose key it is, a lost journal does not know, nor which certificates of
			// the IDevID's key are not the factory's.
			d.remove("journal.json")
			d.cfg.IDevID = site.idevid
			d.mustRenew()

			// A new key takes its place, and its certificates go.
			d.hook = nil
			existing := d.cfg.Key
			d.cfg.Key = nil
			c.advance(2 * time.Hour)
			if again := d.mustEnroll(); again.Key == enrolled.Key {
				t.Errorf("the key is %s again", again.Key)
			}
			d.mustRenew()
			for _, pair := range d.journal().Pairs {
				if pair.Key == enrolled.Key.String() {
					t.Errorf("a certificate of %s is kept", pair.Key)
				}
			}
			site.signs(t, existing)
			if _, err := site.engine.(engine.CertificateStore).Certificate(t.Context(), site.address(t, "pkcs11:object=idevid;type=cert")); err != nil {
				t.Errorf("the IDevID's certificate: %v", err)
			}
		})
	}
}

// The IDevID named by the id that its new certificate has too is found while that
// one is stored and not committed yet.
func TestIDevIDKeyInterrupted(t *testing.T) {
	for _, at := range []string{"after StoreCertificates", "proof: before cacerts"} {
		t.Run(at, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "interrupted")
			d.cfg.Key = site.idevid.Key
			d.cfg.IDevID.Certificate = site.address(t, "pkcs11:id=%01;type=cert")
			n := 1
			call, proof := strings.CutPrefix(at, "proof: ")
			if proof {
				n = 2
			}
			d.hook = after(n, call, func() error { panic(killed{at}) })
			if _, err := d.enroll(); err == nil {
				t.Fatal("not killed")
			}
			d.hook = nil
			if status := d.status(); status.Enrolled || status.Current.Problem != "" {
				t.Errorf("status %+v", status.Current)
			}
			d.mustEnroll()
			if d.issued() != 1 {
				t.Errorf("%d certificates issued", d.issued())
			}
			site.signs(t, site.idevid.Key)
		})
	}
}

// What an existing key must be: before the server is asked anything.
func TestKeyPolicy(t *testing.T) {
	site := newSite(t, testserver.Config{})
	key := site.owned(t, "EC:prime256v1", "owned", "77")
	yes, no := new(true), new(false)
	good := engine.KeyAttributes{Sensitive: yes, Extractable: no, Sign: yes}
	for name, c := range map[string]struct {
		change        func(*engine.KeyAttributes)
		says          string // "" where it may be used
		evenIfAllowed bool
	}{
		"good":                   {func(*engine.KeyAttributes) {}, "", false},
		"extractable":            {func(a *engine.KeyAttributes) { a.Extractable = yes }, "it is extractable", false},
		"perhaps extractable":    {func(a *engine.KeyAttributes) { a.Extractable = nil }, "does not say whether it is extractable", false},
		"not sensitive":          {func(a *engine.KeyAttributes) { a.Sensitive = no }, "it is not sensitive", false},
		"perhaps sensitive":      {func(a *engine.KeyAttributes) { a.Sensitive = nil }, "does not say whether it is sensitive", false},
		"not for signing":        {func(a *engine.KeyAttributes) { a.Sign = no }, "it is not for signing", true},
		"perhaps for signing":    {func(a *engine.KeyAttributes) { a.Sign = nil }, "", false}, // it signs
		"neither of them is set": {func(a *engine.KeyAttributes) { *a = engine.KeyAttributes{Sign: yes} }, "extractable, the token does not say", false},
	} {
		t.Run(name, func(t *testing.T) {
			d := site.device(t, "policy")
			d.cfg.Key = key
			attributes := good
			c.change(&attributes)
			d.attributes = &attributes
			_, err := d.enroll()
			if c.says == "" {
				if err != nil || d.warned("used although") {
					t.Errorf("got %v, events %+v", err, d.events)
				}
				return
			}
			var step *estenroll.StepError
			if !errors.Is(err, estenroll.ErrKeyPolicy) || !strings.Contains(err.Error(), c.says) || !errors.As(err, &step) || step.Step != estenroll.StepPrepare {
				t.Errorf("got %v", err)
			}
			if d.opened != 0 || d.journal().Operation != nil {
				t.Errorf("%d sessions, operation %+v", d.opened, d.journal().Operation)
			}
			d.cfg.AllowExtractable = true
			if _, err = d.enroll(); c.evenIfAllowed {
				wantError(t, err, estenroll.ErrKeyPolicy)
			} else if err != nil || !d.warned("used although") || !d.warned(c.says) {
				t.Errorf("got %v, events %+v", err, d.events)
			}
		})
	}
}

// A key that is not there, of which there are two, or that cannot sign.
func TestKeyRefused(t *testing.T) {
	site := newSite(t, testserver.Config{})
	site.owned(t, "EC:prime256v1", "twin", "77")
	site.owned(t, "EC:prime256v1", "twin", "78")
	if _, err := site.token.Tool("--keypairgen", "--key-type", "EC:edwards25519", "--usage-sign", "--label", "edwards", "--id", "79"); err != nil {
		t.Fatal(err)
	}
	for address, want := range map[string]error{"pkcs11:object=nobody": engine.ErrNotFound, "pkcs11:object=twin": nil, "pkcs11:object=edwards": engine.ErrUnsupported} {
		d := site.device(t, "refused")
		d.cfg.Key = site.address(t, address)
		_, err := d.enroll()
		var ambiguous *engine.AmbiguousError
		if !errors.Is(err, estenroll.ErrKey) || want != nil && !errors.Is(err, want) || want == nil && !errors.As(err, &ambiguous) {
			t.Errorf("%s: got %v", address, err)
		}
		if d.opened != 0 || d.journal().Operation != nil {
			t.Errorf("%s: %d sessions, operation %+v", address, d.opened, d.journal().Operation)
		}
	}
}

// A configuration that names another key while an enrolment is under way: until
// there is a certificate, the device begins anew with that one; after, it
// finishes what it has.
func TestKeyChangedUnderWay(t *testing.T) {
	p384 := func(_ *testing.T, _ *site, d *device) { d.cfg.KeySpec.Algorithm = engine.ECP384 }
	existing := func(t *testing.T, s *site, d *device) { d.cfg.Key = s.address(t, "pkcs11:object=owned") }
	byID := func(t *testing.T, s *site, d *device) { d.cfg.Key = s.address(t, "pkcs11:id=%77;type=private") }
	other := func(t *testing.T, s *site, d *device) { d.cfg.Key = s.address(t, "pkcs11:object=other") }
	same := func(*testing.T, *site, *device) {}
	generated := func(_ *testing.T, _ *site, d *device) { d.cfg.Key = nil }
	loose := func(t *testing.T, s *site, d *device) {
		byID(t, s, d)
		d.attributes = &engine.KeyAttributes{Extractable: new(true), Sensitive: new(true)}
	}
	for name, c := range map[string]struct {
		first  func(*testing.T, *site, *device)
		at     string
		then   func(*testing.T, *site, *device)
		why    string // of giving up; "" where it is gone on with
		key    string // the label of the key in the end
		refuse error
	}{
		"not generated yet":             {same, "before GenerateKey", p384, "type EC P-384 now, not EC P-256", "changed", nil},
		"generated":                     {same, "after GenerateKey", p384, "type EC P-384 now, not EC P-256", "changed", nil},
		"asked":                         {same, "after simpleenroll", p384, "type EC P-384 now, not EC P-256", "changed", nil},
		"stored":                        {same, "after StoreCertificates", p384, "", "changed", nil},
		"asked, an existing one now":    {same, "after simpleenroll", existing, "names another key", "owned", nil},
		"asked, a generated one now":    {existing, "after simpleenroll", generated, "names another key", "changed", nil},
		"asked, another existing one":   {existing, "after simpleenroll", other, "names another key", "other", nil},
		"asked, the same by its id":     {existing, "after simpleenroll", byID, "", "owned", nil},
		"asked, the same, now too open": {existing, "after simpleenroll", loose, "it is extractable", "", estenroll.ErrKeyPolicy},
		"asked, nothing is changed":     {same, "after simpleenroll", same, "", "changed", nil},
	} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			site.owned(t, "EC:prime256v1", "owned", "77")
			site.owned(t, "EC:prime256v1", "other", "78")
			d := site.device(t, "changed")
			c.first(t, site, d)
			d.hook = after(1, c.at, func() error { panic(killed{c.at}) })
			if _, err := d.enroll(); err == nil {
				t.Fatal("not killed")
			}
			d.hook = nil
			c.then(t, site, d)
			result, err := d.enroll()
			if c.why != "" != d.warned("is given up") || !d.warned(c.why) && c.why != "" {
				t.Errorf("want %q, events %+v", c.why, d.events)
			}
			if !errors.Is(err, c.refuse) {
				t.Fatalf("got %v, want %v", err, c.refuse)
			}
			if c.refuse == nil {
				if at := d.uri(result.Key.String()); at.Object != c.key {
					t.Errorf("the key is %s", at)
				}
				want := engine.ECP256
				if strings.Contains(c.why, "P-384") {
					want = engine.ECP384
				}
				if got := engine.AlgorithmOf(result.Certificate.PublicKey); got != want {
					t.Errorf("the certificate is for %s, want %s", got, want)
				}
			}
			// One key of ours at most, and both of the others.
			keys := strings.Count(strings.Join(d.objects(), "\n"), "private changed")
			if want := map[bool]int{true: 1}[c.key == "changed"]; keys != want {
				t.Errorf("%d keys of ours, want %d:\n%s", keys, want, strings.Join(d.objects(), "\n"))
			}
			site.signs(t, site.address(t, "pkcs11:object=owned"))
			site.signs(t, site.address(t, "pkcs11:object=other"))
		})
	}
}

// A server that takes no certificate with our kind of key is asked for none.
func TestKeyUnsuitable(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "unsuitable")
	d.cfg.KeySpec.Algorithm = engine.ECP521
	d.accepts = func(public crypto.PublicKey) bool { return engine.AlgorithmOf(public) == engine.ECP256 }
	_, err := d.enroll()
	wantError(t, err, est.ErrKeyUnsuitable)
	if len(d.requests) != 0 || len(d.objects()) != 0 || d.journal().Operation != nil {
		t.Errorf("%d requests, left %v", len(d.requests), d.objects())
	}
	d.cfg.KeySpec.Algorithm = ""
	d.mustEnroll()
	d.tidy(1)
}

// An RSA key that a token lets sign with PSS alone could never authenticate a
// handshake: that is found out before the server is asked.
func TestKeySignsNoHandshake(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "pss")
	d.cfg.KeySpec.Algorithm, d.cfg.Request.PSS = engine.RSA2048, true
	d.pssOnly = true
	_, err := d.enroll()
	wantError(t, err, engine.ErrUnsupported)
	if d.opened != 0 {
		t.Errorf("%d sessions", d.opened)
	}
	d.pssOnly = false
	d.mustEnroll()
	d.tidy(1)
}

// A key that another name of the device made and this one was given stays while
// this one only asks for its certificate.
func TestKeyOfAnotherName(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Lifetime: time.Hour, Now: c.now})
	maker := site.device(t, "maker")
	maker.now = c.now
	made := maker.mustEnroll().Key

	user := site.device(t, "user")
	user.dir, user.now = maker.dir, c.now
	user.cfg.StateDir = maker.dir
	user.cfg.Security.Instance, user.cfg.Security.ShortServerID = 1, 2
	user.cfg.Key = site.address(t, "pkcs11:object=maker;type=private")
	user.others = []estenroll.CredentialConfig{maker.cfg.CredentialConfig}
	maker.others = []estenroll.CredentialConfig{user.cfg.CredentialConfig}
	site.faults(t, testserver.Faults{Defer: 1, DeferMaxAge: new(time.Duration)})
	var pending *estenroll.PendingError
	if _, err := user.enroll(); !errors.As(err, &pending) {
		t.Fatalf("got %v", err)
	}
	site.faults(t, testserver.Faults{})
	c.advance(2 * time.Hour)
	maker.mustEnroll()
	maker.mustRenew()
	for _, pair := range maker.journal().Pairs {
		if pair.Key == made.String() {
			t.Error("a certificate of the first key is kept")
		}
	}
	site.signs(t, made)
	if got := user.mustEnroll().Key; got != made {
		t.Errorf("got %s", got)
	}
}

// A key that the configuration names is never destroyed, though an operation or a
// pair of this device has made it: neither when the enrolment that made it is given
// up for it, nor by a reset, whose plan does not say so either.
func TestKeyNamed(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "named")
	site.deferring(t, 1, time.Hour)
	_, err := d.enroll()
	d.wantPending(err)
	site.faults(t, testserver.Faults{})
	made := d.journal().Operation.Key
	d.cfg.Key = site.address(t, "pkcs11:object=named;type=private")
	if result := d.mustEnroll(); result.Key.String() != made || !d.warned("names another key now") {
		t.Errorf("the key is %s, events %+v", result.Key, d.events)
	}
	if _, err := d.reset(); err != nil {
		t.Error(err)
	}
	site.signs(t, d.cfg.Key)

	// The key of one credential, named by another, before and after that one uses it.
	maker := site.device(t, "maker")
	user := maker.cfg.CredentialConfig
	user.Name, user.Security.Instance, user.Key = "user", 1, site.address(t, "pkcs11:object=maker;type=private")
	maker.others = []estenroll.CredentialConfig{user}
	for _, enrolled := range []bool{false, true} {
		maker.name = "maker"
		made := maker.mustEnroll().Key
		if enrolled {
			user.Key = made
			maker.others = []estenroll.CredentialConfig{user}
			maker.name = "user"
			maker.mustEnroll()
			maker.others = nil // nor where it is forgotten
		}
		maker.name = "maker"
		plan, err := maker.reset()
		if err != nil || len(plan.Keys) != 0 || len(plan.Certificates) != 1 {
			t.Errorf("plan %+v, %v", plan, err)
		}
		site.signs(t, made)
	}
}

// A server may give the certificate once more that it gave for an existing key. One
// that is lost, or that the Security object points at no more, is taken again; one
// that is refused then goes on being kept.
func TestSameCertificate(t *testing.T) {
	for name, refused := range map[string]bool{"lost": false, "not current": false, "refused": true} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "same")
			d.cfg.Key = site.owned(t, "EC:prime256v1", "owned", "77")
			given := d.mustEnroll()
			if name == "lost" {
				if _, err := site.token.Tool("--delete-object", "--type", "cert", "--id", "77"); err != nil {
					t.Fatal(err)
				}
			} else {
				security := strings.ReplaceAll(d.read("security.json"), given.CertificateAddress.String(), site.idevid.Certificate.String())
				d.write("security.json", strings.ReplaceAll(security, given.Key.String(), site.idevid.Key.String()))
			}
			d.answer = func(operation est.Operation) []*x509.Certificate {
				if operation == est.SimpleEnroll {
					return []*x509.Certificate{given.Certificate}
				}
				return nil
			}
			before := d.objects()
			if refused {
				site.faults(t, testserver.Faults{RefuseIssued: true})
				_, err := d.enroll()
				wantError(t, err, estenroll.ErrRefused)
				if diff := cmp.Diff(before, d.objects()); diff != "" {
					t.Errorf("objects (-before +after):\n%s", diff)
				}
				site.faults(t, testserver.Faults{})
			}
			if result := d.mustEnroll(); !result.Changed || result.CertificateAddress != given.CertificateAddress {
				t.Errorf("result %+v", result)
			}
			d.tidy(1)
		})
	}
}

// Nor is one certificate that of two credentials: the first one's stays alone.
func TestSameCertificateOfAnother(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "first")
	d.cfg.Key = site.owned(t, "EC:prime256v1", "owned", "77")
	given := d.mustEnroll()
	second := d.cfg.CredentialConfig
	second.Name, second.Security.Instance = "second", 1
	d.others, d.name = []estenroll.CredentialConfig{second}, "second"
	d.answer = func(operation est.Operation) []*x509.Certificate {
		if operation == est.SimpleEnroll {
			return []*x509.Certificate{given.Certificate}
		}
		return nil
	}
	before := d.objects()
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrConfig)
	if op := d.journal().Operation; op != nil {
		t.Errorf("operation %+v", op)
	}
	if diff := cmp.Diff(before, d.objects()); diff != "" {
		t.Errorf("objects (-before +after):\n%s", diff)
	}
	d.name = "first"
	d.mustRenew()
}
