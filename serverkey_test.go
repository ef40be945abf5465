package estenroll_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll"
	"estenroll/engine"
	"estenroll/engine/pkcs11"
	"estenroll/est"
	"estenroll/testserver"
)

func (s *site) serverKeyDevice(t *testing.T, name string) *device {
	d := s.device(t, name)
	d.cfg.ServerKeyGen = true
	return d
}

// forgotten wants all buffers of the keys that a server has made to be empty.
func (d *device) forgotten(least int) {
	d.t.Helper()
	if len(d.secrets) < least {
		d.t.Errorf("%d buffers of keys, want %d", len(d.secrets), least)
	}
	for _, secret := range d.secrets {
		if len(secret) == 0 || !bytes.Equal(secret, make([]byte, len(secret))) {
			d.t.Errorf("a key is still there: %d bytes", len(secret))
		}
	}
	d.secrets = nil
}

// The whole life with keys of the server: the first one, a renewal of it, a rekey, which
// are imported, with a warning each time, as what a token generates is.
func TestServerKey(t *testing.T) {
	t.Attr("shows", "RFC 9148 §4.8 (1)")
	d := newSite(t, testserver.Config{ServerKeyGen: true}).serverKeyDevice(t, "made")
	outside := "the private key was made by " + d.site.uri.String() + ", outside of the HSM"
	first := d.mustEnroll()
	d.forgotten(2)
	if got, want := d.operations(), []string{"crts", "att", "skg", "crts"}; !slices.Equal(got, want) || !d.warned(outside) {
		t.Errorf("asked %q, want %q; events %v", got, want, d.events)
	}
	d.tidy(1)
	attributes, err := d.site.engine.(engine.KeyInspector).KeyAttributes(t.Context(), first.Key)
	if err != nil {
		t.Fatal(err)
	}
	if !*attributes.Private || !*attributes.Sensitive || *attributes.Extractable || *attributes.Local || !*attributes.Sign {
		t.Errorf("the key is %+v", attributes)
	}
	asked, err := x509.ParseCertificateRequest([]byte(d.csrs()[0]))
	if err != nil || asked.CheckSignature() != nil {
		t.Fatal(err, asked.CheckSignature())
	}
	for _, at := range []engine.Address{first.Key, d.cfg.IDevID.Key} {
		signer, err := d.site.engine.Signer(t.Context(), at)
		if err != nil || asked.PublicKey.(*ecdsa.PublicKey).Equal(signer.Public()) {
			t.Errorf("the CSR is for %s: %v", at, err)
		}
	}

	renewed := d.mustRenew()
	if got, want := d.operations(), []string{"crts", "att", "sren", "crts"}; !slices.Equal(got, want) || renewed.Key != first.Key || d.warned(outside) {
		t.Errorf("renewed with %q, want %q, for %s; events %v", got, want, renewed.Key, d.events)
	}
	rekeyed := d.mustRekey()
	d.forgotten(2)
	if got, want := d.operations(), []string{"crts", "att", "skg", "crts"}; !slices.Equal(got, want) || rekeyed.Key == first.Key || !d.warned(outside) {
		t.Errorf("rekeyed with %q, want %q, for %s", got, want, rekeyed.Key)
	}
	if !bytes.Equal(rekeyed.Certificate.RawSubject, first.Certificate.RawSubject) {
		t.Errorf("rekeyed for %s", rekeyed.Certificate.Subject)
	}
	d.tidy(2)
	if status := d.status(); !status.Current.ServerMade || len(status.Previous) != 1 || !status.Previous[0].ServerMade {
		t.Errorf("status %+v", status)
	}
	d.cfg.ServerKeyGen = false
	d.mustRekey()
	if status := d.status(); status.Current.ServerMade || !status.Previous[0].ServerMade {
		t.Errorf("status %+v", status)
	}
}

// A rekey that the policy chooses, and an enrolment after the end of the certificate,
// are with a key of the server too; where the token takes none any more, the current key
// is renewed.
func TestServerKeyByPolicy(t *testing.T) {
	r := newRenewing(t, "policy", 90*day, func(d *device) { d.cfg.ServerKeyGen, d.cfg.Policy.RekeyEvery = true, 1 })
	made := func(kind estenroll.Kind, operation string) {
		t.Helper()
		if result := must(t, r.renewDue); result.Kind != kind || !slices.Contains(r.operations(), operation) {
			t.Errorf("%s, asked %q, want %s with %s", result.Kind, r.operations(), kind, operation)
		}
		r.tidy(2)
	}
	r.dueNow()
	made(estenroll.KindRekey, "skg")
	r.clock.advance(100 * day)
	made(estenroll.KindEnroll, "skg")
	r.dueNow()
	r.hook = after(1, "before CanImportKey", func() error { return &engine.Error{Op: "import key", Err: engine.ErrUnsupported} })
	made(estenroll.KindRenew, "sren")
	if status := r.status(); !status.Current.ServerMade || status.FailedRekey == nil {
		t.Errorf("status %+v", status)
	}
}

// Whatever was configured, the type of key in the CSR is what the server makes, and
// what it wants itself stands before it. It is linked to the session like any other.
func TestServerKeyType(t *testing.T) {
	for name, c := range map[string]struct {
		configured, want engine.Algorithm
		server           testserver.Config
	}{
		"a configured curve":          {engine.ECP384, engine.ECP384, testserver.Config{}},
		"a configured modulus":        {engine.RSA2048, engine.RSA2048, testserver.Config{}},
		"what the server wants":       {engine.ECP256, engine.ECP521, testserver.Config{CSRAttributes: wanting(wantedKey("EC", "P-521"))}},
		"linked to the first session": {engine.ECP384, engine.ECP384, testserver.Config{RequirePoP: true}},
	} {
		t.Run(name, func(t *testing.T) {
			c.server.ServerKeyGen = true
			d := newSite(t, c.server).serverKeyDevice(t, "typed")
			d.cfg.KeySpec.Algorithm = c.configured
			if c.server.RequirePoP {
				d.cfg.PoP = estenroll.PoPRequire
			}
			if got := engine.AlgorithmOf(d.mustEnroll().Certificate.PublicKey); got != c.want {
				t.Errorf("a key of type %s, want %s", got, c.want)
			}
			d.tidy(1)
			d.forgotten(2)
		})
	}
}

// withoutImport is an engine that never can.
type withoutImport struct {
	engine.Engine
	engine.CertificateStore
	engine.KeyRecoverer
}

// A token that takes in no key is found out before the server hears of the device.
func TestServerKeyUnsupported(t *testing.T) {
	site := newSite(t, testserver.Config{ServerKeyGen: true})
	for name, prepare := range map[string]func(*device){
		"the token does not": func(d *device) {
			d.hook = after(1, "before CanImportKey", func() error { return &engine.Error{Op: "import key", Err: engine.ErrUnsupported} })
		},
		"the driver never can": func(d *device) {
			d.cfg.OpenEngine = func(context.Context, engine.PINSource) (engine.Engine, error) {
				all := site.engine.(*pkcs11.Engine)
				return struct{ withoutImport }{withoutImport{struct{ engine.Engine }{spied{d, all}}, all, all}}, nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := site.serverKeyDevice(t, "unsupported")
			prepare(d)
			connected, issued := d.opened, d.issued()
			_, err := d.enroll()
			wantError(t, err, estenroll.ErrNoImport)
			wantError(t, err, engine.ErrUnsupported)
			if d.opened != connected || len(d.requests) != 0 || d.issued() != issued || len(d.objects()) != 0 {
				t.Errorf("%d sessions, asked %q, issued %d, left %q", d.opened-connected, d.operations(), d.issued()-issued, d.objects())
			}
			// Without the setting it is an enrolment like any other.
			d.hook, d.cfg.ServerKeyGen = nil, false
			d.mustEnroll()
			d.tidy(1)
			site.clear(t)
		})
	}
	d := site.serverKeyDevice(t, "rekeyed")
	d.cfg.ServerKeyGen = false
	d.mustEnroll()
	d.cfg.ServerKeyGen = true
	d.hook = after(1, "before CanImportKey", func() error { return &engine.Error{Op: "import key", Err: engine.ErrUnsupported} })
	_, err := d.rekey()
	wantError(t, err, estenroll.ErrNoImport)
	if len(d.requests) != 0 || d.journal().Operation != nil {
		t.Errorf("asked %q, left %+v", d.operations(), d.journal().Operation)
	}
	d.tidy(1)
}

// What comes with a certificate and is not its key, or cannot be used, is refused before
// anything of it is in the token.
func TestServerKeyRefused(t *testing.T) {
	site := newSite(t, testserver.Config{ServerKeyGen: true})
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak, err := x509.MarshalPKCS8PrivateKey(p224)
	if err != nil {
		t.Fatal(err)
	}
	otherType := testserver.Faults{ServerKey: "other-type"}
	for name, c := range map[string]struct {
		faults  testserver.Faults
		prepare func(*device)
		is      error
		text    string
	}{
		"the certificate of another key": {testserver.Faults{WrongKey: true}, nil, est.ErrKeyMismatch, ""},
		"a curve that no engine has": {testserver.Faults{}, func(d *device) {
			d.serverKey = func() []est.Part {
				return []est.Part{{ContentFormat: est.ContentFormatPKCS8, Body: bytes.Clone(weak)}, {ContentFormat: est.ContentFormatPKIXCert, Body: site.server.Root().Raw}}
			}
		}, estenroll.ErrOtherKey, "EC P-224, which no engine has"},
		"no key":                  {testserver.Faults{ServerKey: "key-truncated"}, nil, nil, "PKCS#8: not a private key"},
		"a key and more":          {testserver.Faults{ServerKey: "key-trailing"}, nil, nil, "PKCS#8: bytes after its end"},
		"another type, by policy": {otherType, func(d *device) { d.cfg.RefuseOtherNames = true }, estenroll.ErrOtherKey, "a key of type EC P-521, asked for was EC P-256"},
		"a type that the server does not take": {otherType, func(d *device) {
			d.accepts = func(key crypto.PublicKey) bool { return engine.AlgorithmOf(key) == engine.ECP256 }
		}, estenroll.ErrOtherKey, "accepts no certificate"},
		"a type that the token does not take": {testserver.Faults{}, func(d *device) {
			d.hook = after(1, "before ImportKey", func() error { return &engine.Error{Op: "import key", Err: engine.ErrUnsupported} })
		}, engine.ErrUnsupported, ""},
		"one that the server has encrypted": {testserver.Faults{}, func(d *device) {
			d.serverKey = func() []est.Part {
				return []est.Part{{ContentFormat: est.ContentFormatPKCS7ServerKey, Body: []byte{0x30, 0}}}
			}
		}, est.ErrKeyEnveloped, ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := site.serverKeyDevice(t, "refused")
			site.faults(t, c.faults)
			if c.prepare != nil {
				c.prepare(d)
			}
			_, err := d.enroll()
			if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v", err)
			}
			d.forgotten(1)
			if len(d.objects()) != 0 || d.journal().Operation != nil {
				t.Errorf("left %q and %+v", d.objects(), d.journal().Operation)
			}
		})
	}
}

// Another type of key than was asked for is taken with a warning, as other names are.
func TestServerKeyOtherType(t *testing.T) {
	d := newSite(t, testserver.Config{ServerKeyGen: true, Faults: testserver.Faults{ServerKey: "other-type"}}).serverKeyDevice(t, "other")
	if got := engine.AlgorithmOf(d.mustEnroll().Certificate.PublicKey); got != engine.ECP521 || !d.warned("it is of type EC P-521, asked for was EC P-256") {
		t.Errorf("a key of type %s, events %v", got, d.events)
	}
	d.tidy(1)
}

// A rekey for which the server gives the current key again is none.
func TestServerKeyNotNew(t *testing.T) {
	d := newSite(t, testserver.Config{ServerKeyGen: true}).serverKeyDevice(t, "same")
	var once []byte // the key of the first answer
	d.hook = func(when, call string) error {
		if when+call == "beforeImportKey" {
			once = bytes.Clone(d.secrets[len(d.secrets)-1])
		}
		return nil
	}
	first := d.mustEnroll()
	d.forgotten(2)
	before := d.snapshot()
	d.serverKey = func() []est.Part {
		return []est.Part{{ContentFormat: est.ContentFormatPKCS8, Body: once}, {ContentFormat: est.ContentFormatPKIXCert, Body: first.Certificate.Raw}}
	}
	_, err := d.rekey()
	var response *est.ResponseError
	if !errors.As(err, &response) || !strings.Contains(err.Error(), "it is that of the current certificate") {
		t.Errorf("got %v", err)
	}
	d.forgotten(2)
	d.unchangedSince(before)
}

// A server that has not decided is asked the same again by later runs, with the same
// bytes; the key is made when it decides.
func TestServerKeyPending(t *testing.T) {
	d := newSite(t, testserver.Config{ServerKeyGen: true}).serverKeyDevice(t, "pending")
	start := time.Now()
	d.now = func() time.Time { return start }
	d.site.faults(t, testserver.Faults{Defer: 2, DeferMaxAge: new(time.Minute)})
	var csrs []string
	for range 3 {
		result, err := d.enroll()
		csrs = append(csrs, d.csrs()...)
		start = start.Add(2 * time.Minute)
		var pending *estenroll.PendingError
		if len(csrs) == 3 {
			if err != nil || !result.Recovered {
				t.Errorf("got %+v, %v", result, err)
			}
		} else if !errors.As(err, &pending) {
			t.Errorf("got %v", err)
		}
	}
	if len(csrs) != 3 || csrs[0] != csrs[1] || csrs[1] != csrs[2] || d.issued() != 1 {
		t.Errorf("%d CSRs, issued %d", len(csrs), d.issued())
	}
	d.tidy(1)
}

// An answer that did not arrive is asked for with the same bytes, whatever the server
// makes of a repetition: the same key and certificate, or others. One that arrived and
// was lost with the run is not asked for again: the device wants a key that no process
// has died with.
func TestServerKeyRepeated(t *testing.T) {
	for name, c := range map[string]struct {
		noReplay bool
		point    string
		issued   int
		same     bool // CSR
	}{
		"a server that repeats its answer":       {false, "after serverkeygen", 1, true},
		"a server that makes a key each time":    {true, "after serverkeygen", 2, true},
		"lost before the import":                 {false, "before ImportKey", 2, false},
		"imported, which the journal has not":    {false, "after ImportKey", 1, false},
		"imported, by a server that makes a key": {true, "after ImportKey", 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{ServerKeyGen: true, NoReplay: c.noReplay}).serverKeyDevice(t, "repeated")
			d.hook = func(when, call string) error {
				if at := when + " " + call; at == c.point {
					panic(killed{at})
				}
				return nil
			}
			if _, err := d.enroll(); err == nil {
				t.Fatal("not killed")
			}
			first := d.csrs()
			d.hook = nil
			d.mustEnroll()
			again := d.csrs()
			if d.issued() != c.issued || c.same != slices.Equal(first, again) {
				t.Errorf("issued %d, want %d; the same CSR: %t, want %t", d.issued(), c.issued, slices.Equal(first, again), c.same)
			}
			d.tidy(1)
		})
	}
}

// What a kill in the middle of an import has left, one half of the pair, is destroyed,
// and another key asked for.
func TestServerKeyHalfImported(t *testing.T) {
	d := newSite(t, testserver.Config{ServerKeyGen: true}).serverKeyDevice(t, "half")
	d.hook = func(when, call string) error {
		if when+call == "afterImportKey" {
			if _, err := d.site.token.Tool("--login", "--pin", d.site.token.PIN, "--delete-object", "--type", "pubkey", "--label", "half"); err != nil {
				t.Fatal(err)
			}
			panic(killed{call})
		}
		return nil
	}
	if _, err := d.enroll(); err == nil {
		t.Fatal("not killed")
	}
	d.hook = nil
	d.mustEnroll()
	if !d.warned("was lost on its way into the token") || d.issued() != 2 {
		t.Errorf("issued %d, events %v", d.issued(), d.events)
	}
	d.tidy(1)
}

// What a person ends between the answer and the certificate's place in the token leaves
// nothing, whether the key was there already or not.
func TestServerKeyCancelled(t *testing.T) {
	site := newSite(t, testserver.Config{ServerKeyGen: true})
	for _, point := range []string{"before ImportKey", "after ImportKey"} {
		d := site.serverKeyDevice(t, "cancelled")
		d.hook = func(when, call string) error {
			if when+" "+call == point {
				panic(killed{point})
			}
			return nil
		}
		if _, err := d.enroll(); err == nil {
			t.Fatal("not killed")
		}
		d.hook = nil
		var ended *estenroll.Cancellation
		if err := d.run(func(c *estenroll.Credential) (err error) { ended, err = c.Cancel(d.ctx); return err }); err != nil || ended.Step != estenroll.StepImport {
			t.Errorf("%s: %+v, %v", point, ended, err)
		}
		if len(d.objects()) != 0 || d.journal().Operation != nil {
			t.Errorf("%s: left %q and %+v", point, d.objects(), d.journal().Operation)
		}
	}
}

// The setting is changed while a request is pending: it is begun anew as it is set.
func TestServerKeyChanged(t *testing.T) {
	site := newSite(t, testserver.Config{ServerKeyGen: true})
	for _, now := range []bool{true, false} {
		d := site.device(t, fmt.Sprintf("changed-%t", now))
		d.cfg.ServerKeyGen = !now
		site.faults(t, testserver.Faults{Defer: 1})
		if _, err := d.enroll(); err == nil {
			t.Fatal("not pending")
		}
		site.faults(t, testserver.Faults{})
		d.cfg.ServerKeyGen = now
		d.mustEnroll()
		if status := d.status(); status.Current.ServerMade != now {
			t.Errorf("made by the server: %t, want %t", status.Current.ServerMade, now)
		}
		d.tidy(1)
		site.clear(t)
	}
	d := site.serverKeyDevice(t, "named")
	d.cfg.Key = d.cfg.IDevID.Key
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrKeyOrigin)
	wantError(t, err, estenroll.ErrConfig)
}

// containsSecret looks for a secret as it is, and in base64 at any place of a text.
func containsSecret(data, secret []byte) bool {
	if bytes.Contains(data, secret) {
		return true
	}
	for shift := range 3 {
		part := secret[shift:]
		if bytes.Contains(data, base64.StdEncoding.AppendEncode(nil, part[:len(part)/3*3])) {
			return true
		}
	}
	return false
}

// No file of the state directory ever has the private key, at whichever step a run ends.
func TestServerKeyNotWritten(t *testing.T) {
	d := newSite(t, testserver.Config{ServerKeyGen: true}).serverKeyDevice(t, "unwritten")
	var secret []byte
	look := func() {
		if secret == nil && len(d.secrets) > 1 {
			made := &est.ServerKey{PKCS8: bytes.Clone(d.secrets[1])}
			parsed, err := x509.ParsePKCS8PrivateKey(made.PKCS8)
			if err != nil {
				t.Fatal(err)
			}
			if secret, err = parsed.(*ecdsa.PrivateKey).Bytes(); err != nil {
				t.Fatal(err)
			}
		}
		entries, err := os.ReadDir(d.dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			data, err := os.ReadFile(filepath.Join(d.dir, entry.Name()))
			if err != nil {
				t.Fatal(err)
			}
			if secret != nil && containsSecret(data, secret) {
				t.Errorf("%s has the private key", entry.Name())
			}
		}
	}
	d.hook = func(when, call string) error { look(); return nil }
	d.mustEnroll()
	look()
	if secret == nil {
		t.Fatal("no key was seen")
	}
}
