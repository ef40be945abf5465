package estenroll_test

import (
	"crypto"
	"crypto/x509"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/lwm2m"
	"estenroll/testserver"
)

// privateKeys counts the private keys in the token, but for the factory's.
func (d *device) privateKeys() int {
	d.t.Helper()
	return strings.Count("\n"+strings.Join(d.objects(), "\n"), "\nprivate ")
}

// A rekey makes a key beside the old one, and asks with the current pair for a
// certificate for the same names. The old pair stays until the next completed
// renewal, which destroys its key.
func TestRekey(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "rekeyed")
	san, err := csr.ParseSAN("dns:device.example")
	if err != nil {
		t.Fatal(err)
	}
	d.cfg.Request.SANs = []csr.SAN{san}
	current := d.mustEnroll()
	// What is configured by now is for a first certificate: a rekey keeps the names.
	d.cfg.Request = csr.Template{RawSubject: subject(t, "CN=another")}
	for round, algorithm := range []engine.Algorithm{engine.ECP256, engine.ECP384, engine.RSA2048, engine.ECP256} {
		d.cfg.KeySpec.Algorithm = algorithm
		result := d.mustRekey()
		if !result.Changed || result.Recovered || result.Kind != estenroll.KindRekey || result.Key == current.Key {
			t.Errorf("round %d: result %+v", round, result)
		}
		if got := engine.AlgorithmOf(result.Certificate.PublicKey); got != algorithm {
			t.Errorf("round %d: the key is of type %s, want %s", round, got, algorithm)
		}
		issued := site.server.Issuances()
		last := issued[len(issued)-1]
		if last.Operation != est.SimpleReenroll || last.Client != issued[len(issued)-2].Certificate {
			t.Errorf("round %d: %s with %s, not with the current pair", round, last.Operation, last.Client)
		}
		if diff := cmp.Diff(current.Certificate.RawSubject, result.Certificate.RawSubject); diff != "" || len(result.Certificate.DNSNames) != 1 {
			t.Errorf("round %d: subject %s, names %q", round, result.Certificate.Subject, result.Certificate.DNSNames)
		}
		if previous := d.journal().Pairs[1]; previous.Key != current.Key.String() || previous.Certificates[0] != current.CertificateAddress.String() {
			t.Errorf("round %d: kept is %+v", round, previous)
		}
		d.tidy(2)
		if d.privateKeys() != 2 {
			t.Errorf("round %d: %d keys", round, d.privateKeys())
		}
		if status := d.status(); status.Current.Problem != "" || status.Previous[0].Problem != "" || status.LastAttempt.Kind != estenroll.KindRekey {
			t.Errorf("round %d: status %+v", round, status)
		}
		current = result
	}
	if renewed := d.mustRenew(); renewed.Key != current.Key || renewed.Kind != estenroll.KindRenew {
		t.Errorf("renewed: %+v", renewed)
	}
	d.tidy(2)
	if d.privateKeys() != 1 {
		t.Errorf("%d keys after the next renewal", d.privateKeys())
	}
}

// The journal names what a step will create before the step is done.
func TestRekeyJournal(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "named")
	enrolled := d.mustEnroll()
	looked := map[string]bool{}
	d.hook = func(when, call string) error {
		at := when + " " + call
		steps := map[string]string{
			"before GenerateKey": "generate", "before simplereenroll": "request", "before StoreCertificates": "store",
			"after StoreCertificates": "store", "before Dial": "request",
		}
		want, known := steps[at]
		if !known || looked[at] {
			return nil
		}
		looked[at] = true
		op := d.journal().Operation
		if op == nil || op.Kind != "rekey" || op.Step != want || op.Key == "" || op.Key == enrolled.Key.String() {
			t.Errorf("%s the journal says %+v", at, op)
			return nil
		}
		if id := d.uri(op.Key).ID; len(id) == 0 {
			t.Errorf("%s the new key has no CKA_ID: %s", at, op.Key)
		}
		if at == "before simplereenroll" && (len(op.CSR) == 0 || !strings.Contains(d.read("security.json"), enrolled.CertificateAddress.String())) {
			t.Errorf("%s there is no CSR, or the Security object does not point at the current pair", at)
		}
		if at == "before StoreCertificates" && len(op.Certificates) == 0 {
			t.Errorf("%s the journal does not say where", at)
		}
		return nil
	}
	d.mustRekey()
	if len(looked) != 5 {
		t.Errorf("looked at %v", looked)
	}
}

// Accepted is TestRekey. Undecided: the new pair and the old one stay, and the next
// run proves the new one without a new request.
func TestRekeyUndecided(t *testing.T) {
	for name, again := range map[string]func(*device) (*estenroll.Result, error){"by a rekey": (*device).rekey, "by a renewal": (*device).renew, "by an enrolment": (*device).enroll} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{}).device(t, "undecided")
			enrolled := d.mustEnroll()
			d.hook = after(2, "before Dial", func() error { return est.ErrUnreachable })
			_, err := d.rekey()
			wantError(t, err, estenroll.ErrUnproven)
			if op := d.journal().Operation; op == nil || op.Step != "prove" || d.privateKeys() != 2 {
				t.Fatalf("operation %+v, %d keys", op, d.privateKeys())
			}
			if status := d.status(); status.Current.Key != enrolled.Key.String() || status.Current.Problem != "" {
				t.Errorf("status %+v", status.Current)
			}
			d.hook = nil
			result := must(t, func() (*estenroll.Result, error) { return again(d) })
			if !result.Recovered || !result.Changed || result.Kind != estenroll.KindRekey || len(d.csrs()) != 0 {
				t.Errorf("result %+v, %d requests", result, len(d.csrs()))
			}
			d.tidy(2)
			if d.issued() != 2 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
	}
}

// Refused: the new pair goes with its key if the old one is accepted; if neither is
// both are kept, and the device falls back to the IDevID as configured.
func TestRekeyRefused(t *testing.T) {
	for name, code := range refusals {
		t.Run("the new one, "+name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "refused")
			d.mustEnroll()
			d.mustRekey()
			before := d.snapshot()
			d.hook = after(1, "after simplereenroll", func() error {
				issued := site.server.Issuances()
				return site.server.SetFaults(testserver.Faults{RefuseClients: []string{issued[len(issued)-1].Certificate}, RefuseCode: code})
			})
			_, err := d.rekey()
			wantError(t, err, estenroll.ErrRefused)
			d.unchangedSince(before)
			d.hook = nil
			site.faults(t, testserver.Faults{})
			d.mustRenew()
			d.tidy(2)
		})
		t.Run("both, "+name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "both-refused")
			old := d.mustEnroll()
			d.refuseAfter(testserver.Faults{RefuseIssued: true, RefuseCode: code})
			d.cfg.NoFallback = true
			_, err := d.rekey()
			wantError(t, err, estenroll.ErrUnproven)
			if d.privateKeys() != 2 || d.status().Current.Key != old.Key.String() {
				t.Errorf("%d keys, status %+v", d.privateKeys(), d.status().Current)
			}
			d.hook, d.cfg.NoFallback = nil, false
			_, err = d.rekey()
			wantError(t, err, estenroll.ErrRefused)
			d.fallenBack(old)
			if d.privateKeys() != 2 {
				t.Errorf("%d keys", d.privateKeys())
			}
			site.faults(t, testserver.Faults{})
			d.mustEnroll()
			d.tidy(2)
			d.mustRekey()
			d.tidy(2)
			if d.privateKeys() != 2 {
				t.Errorf("%d keys", d.privateKeys())
			}
		})
	}
}

// Without an IDevID there is nothing to fall back to, though the server accepts the
// pre-shared key: the Security object stays at the current pair, and the key is the way
// back when that has expired.
func TestRefusedWithoutIDevID(t *testing.T) {
	clock := new(clock)
	site := newSite(t, testserver.Config{Now: clock.now, PSKs: preShared})
	d := site.device(t, "pre-shared").withPSK()
	d.now, d.cfg.ImplicitTA = clock.now, est.NoTrustAnchors()
	old := d.mustEnroll()
	d.refuseAfter(testserver.Faults{RefuseIssued: true})
	_, err := d.rekey()
	wantError(t, err, estenroll.ErrUnproven)
	if status := d.status(); status.Current == nil || status.Current.Certificate != old.CertificateAddress.String() {
		t.Errorf("status %+v", status)
	}
	d.hook = nil
	site.faults(t, testserver.Faults{})
	d.mustRekey()
	d.tidy(2)
	clock.advance(100 * day)
	if _, err := d.dryRun((*estenroll.Credential).PlanRenewDue); err != nil || !d.said("answers the pre-shared key") {
		t.Errorf("%v; events %v", err, d.events)
	}
	if d.mustEnroll(); !d.warned("enrolling again with the pre-shared key") {
		t.Errorf("events %v", d.events)
	}
}

// A CA that revokes the old certificate when it issues the new one, for the same key
// or another.
func TestRevokesTheOld(t *testing.T) {
	for kind, run := range map[estenroll.Kind]func(*device) (*estenroll.Result, error){estenroll.KindRenew: (*device).renew, estenroll.KindRekey: (*device).rekey} {
		t.Run(string(kind), func(t *testing.T) { revokesTheOld(t, kind, run) })
	}
}

func revokesTheOld(t *testing.T, kind estenroll.Kind, run func(*device) (*estenroll.Result, error)) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "revoked")
	d.mustEnroll()
	revoke := func() error {
		issued := site.server.Issuances()
		return site.server.SetFaults(testserver.Faults{RefuseClients: []string{issued[len(issued)-2].Certificate}})
	}
	d.hook = after(1, "after simplereenroll", revoke)
	must(t, func() (*estenroll.Result, error) { return run(d) })
	d.tidy(2)
	// And the proof is cut off: what is pending is proven, the old pair is not asked.
	dials := 0
	d.hook = func(when, call string) error {
		switch when + " " + call {
		case "after simplereenroll":
			return revoke()
		case "before Dial":
			if dials++; dials == 2 {
				return est.ErrUnreachable
			}
		}
		return nil
	}
	_, err := run(d)
	wantError(t, err, estenroll.ErrUnproven)
	d.hook = nil
	if result := d.mustRenew(); result.Kind != kind || !result.Recovered {
		t.Errorf("result %+v", result)
	}
	d.tidy(2)
	// And the new pair is refused too: that of a CA that takes both back. Both stay, and
	// the IDevID is accepted.
	old := d.status().Current
	d.hook = after(1, "after simplereenroll", func() error { return site.server.SetFaults(testserver.Faults{RefuseIssued: true}) })
	_, err = run(d)
	wantError(t, err, estenroll.ErrRefused)
	if journal := d.journal(); len(journal.Pairs) != 3 || journal.Pairs[1].Certificates[0] != old.Certificate || d.status().Enrolled {
		t.Errorf("journal %+v", journal)
	}
}

// A server that refuses the request, or answers it wrongly, and a token that does
// not do its part: the new key goes, all else is as before, and the current key can
// be renewed at once.
func TestRekeyFails(t *testing.T) {
	engineError := func(cause error) func() error {
		return func() error { return &engine.Error{Op: "injected", Err: cause} }
	}
	for name, c := range map[string]struct {
		faults  testserver.Faults
		prepare func(*device)
		want    error
	}{
		"the request is refused": {testserver.Faults{Answer: "4.03"}, nil, nil},
		"another key":            {testserver.Faults{WrongKey: true}, nil, est.ErrKeyMismatch},
		"an expired certificate": {testserver.Faults{Expired: true}, nil, est.ErrNotValidNow},
		"a foreign chain":        {testserver.Faults{ForeignChain: true}, nil, est.ErrNotTrusted},
		"other names": {testserver.Faults{Subject: "CN=other"}, func(d *device) { d.cfg.RefuseOtherNames = true },
			estenroll.ErrOtherNames},
		"a kind of key that the token has not": {prepare: func(d *device) {
			d.hook = after(1, "before GenerateKey", engineError(engine.ErrUnsupported))
		}, want: engine.ErrUnsupported},
		"a token that is full": {prepare: func(d *device) {
			d.hook = after(1, "before GenerateKey", engineError(engine.ErrTokenFull))
		}, want: engine.ErrTokenFull},
		"a key that is not what was asked for": {prepare: func(d *device) {
			d.hook = after(1, "after GenerateKey", engineError(engine.ErrUnsupported))
		}, want: engine.ErrUnsupported},
		"a key that signs no handshake": {prepare: func(d *device) {
			d.cfg.KeySpec.Algorithm, d.cfg.Request.PSS, d.pssOnly = engine.RSA2048, true, true
		}, want: engine.ErrUnsupported},
		"no room for the certificate": {prepare: func(d *device) {
			d.hook = after(1, "before StoreCertificates", engineError(engine.ErrTokenFull))
		}, want: engine.ErrTokenFull},
		"a server that takes no such key": {prepare: func(d *device) {
			d.cfg.KeySpec.Algorithm = engine.ECP521
			d.accepts = func(public crypto.PublicKey) bool { return engine.AlgorithmOf(public) == engine.ECP256 }
		}, want: est.ErrKeyUnsuitable},
	} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "fails")
			d.mustEnroll()
			d.mustRekey()
			before := d.snapshot()
			site.faults(t, c.faults)
			if c.prepare != nil {
				c.prepare(d)
			}
			_, err := d.rekey()
			var status *est.StatusError
			if c.want == nil && !errors.As(err, &status) || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			d.unchangedSince(before)
			if journal := d.journal(); journal.Operation != nil || journal.LastAttempt.Kind != estenroll.KindRekey || journal.LastAttempt.Result != "failed" {
				t.Errorf("journal %+v", journal)
			}
			site.faults(t, testserver.Faults{})
			if result := d.mustRenew(); result.Kind != estenroll.KindRenew || result.Recovered {
				t.Errorf("result %+v", result)
			}
			d.tidy(2)
		})
	}
}

// What may pass by itself ends nothing: the key stays, and the next run goes on.
func TestRekeyKept(t *testing.T) {
	for at, cause := range map[string]error{
		"after GenerateKey":        nil, // it is looked for again in the same run
		"before Dial":              est.ErrUnreachable,
		"after simplereenroll":     est.ErrUnreachable,
		"before StoreCertificates": &engine.Error{Op: "injected", Err: engine.ErrLocked},
		"after StoreCertificates":  &engine.Error{Op: "injected", Err: engine.ErrDeviceLost},
	} {
		t.Run(at, func(t *testing.T) {
			d := newSite(t, testserver.Config{}).device(t, "kept")
			d.mustEnroll()
			if cause == nil {
				d.hook = after(1, at, func() error { return &engine.Error{Op: "injected", Err: engine.ErrDeviceLost} })
				d.mustRekey()
				d.tidy(2)
				return
			}
			d.hook = after(1, at, func() error { return cause })
			_, err := d.rekey()
			wantError(t, err, cause)
			op := d.journal().Operation
			if op == nil {
				t.Fatal("the operation is lost")
			}
			d.hook = nil
			if result := d.mustRekey(); !result.Recovered || result.Key.String() != op.Key {
				t.Errorf("result %+v", result)
			}
			d.tidy(2)
			if d.issued() != 2 {
				t.Errorf("%d certificates issued", d.issued())
			}
		})
	}
}

// A server that has said, in a session, that it takes no such key does not keep the
// device from renewing, whatever was sent before.
func TestRekeyUnsuitableLater(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "unsuitable")
	d.mustEnroll()
	before := d.snapshot()
	d.cfg.KeySpec.Algorithm = engine.ECP521
	d.hook = after(1, "after GenerateKey", func() error { panic(killed{"after GenerateKey"}) })
	if _, err := d.rekey(); err == nil {
		t.Fatal("not killed")
	}
	d.hook = nil
	d.accepts = func(public crypto.PublicKey) bool { return engine.AlgorithmOf(public) == engine.ECP256 }
	_, err := d.rekey()
	wantError(t, err, est.ErrKeyUnsuitable)
	d.unchangedSince(before)
	d.mustRenew()
	d.tidy(2)
}

// A rekey that gets no answer, or takes the device away each time, is given up after
// its deadline, by the run that notices, and the current key can be renewed. Until
// then the same bytes are sent.
func TestRekeyTakesTooLong(t *testing.T) {
	lost := &engine.Error{Op: "injected", Err: engine.ErrDeviceLost}
	for name, c := range map[string]struct {
		at    string
		cause error
		csrs  int
	}{
		"unreachable":      {"before Dial", est.ErrUnreachable, 0},
		"server error":     {"after simplereenroll", &est.StatusError{Operation: est.SimpleReenroll, Code: "5.00", Class: 5}, 1},
		"the device goes":  {"before GenerateKey", lost, 0},
		"and when storing": {"before StoreCertificates", lost, 0}, // when it has the certificate
	} {
		t.Run(name, func(t *testing.T) {
			now := new(clock)
			d := newSite(t, testserver.Config{Now: now.now}).device(t, "unanswered")
			d.now = now.now
			d.mustEnroll()
			before := d.snapshot()
			d.hook = func(when, call string) error {
				if when+" "+call == c.at {
					return c.cause
				}
				return nil
			}
			var key string
			for range 3 {
				_, err := d.rekey()
				wantError(t, err, c.cause)
				op := d.journal().Operation
				if op == nil || key != "" && op.Key != key {
					t.Fatalf("operation %+v, want one with key %s", op, key)
				}
				key = op.Key
			}
			if csrs := d.csrs(); len(csrs) != c.csrs || c.csrs > 0 && csrs[0] != string(d.journal().Operation.CSR) {
				t.Errorf("%d requests, or other bytes", len(csrs))
			}
			now.advance(8 * 24 * time.Hour)
			_, err := d.rekey()
			wantError(t, err, estenroll.ErrRekeyGivenUp)
			wantError(t, err, c.cause)
			d.unchangedSince(before)
			_, _ = d.rekey() // it is asked for again
			if op := d.journal().Operation; op == nil || op.Key == key {
				t.Errorf("operation %+v", op)
			}
			now.advance(8 * 24 * time.Hour)
			d.hook = after(1, c.at, func() error { return c.cause })
			if result := d.mustRenew(); result.Kind != estenroll.KindRenew || !d.warned("came to nothing") {
				t.Errorf("result %+v, events %+v", result, d.events)
			}
			d.tidy(2)
		})
	}
}

// A pending answer is kept with the new key and its CSR across runs; the device is
// enrolled meanwhile.
func TestRekeyPending(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now})
	d := site.device(t, "pending")
	d.now = c.now
	enrolled := d.mustEnroll()
	site.faults(t, testserver.Faults{Defer: 1, DeferMaxAge: new(time.Hour)})
	_, err := d.rekey()
	var pending *estenroll.PendingError
	if !errors.As(err, &pending) {
		t.Fatalf("got %v", err)
	}
	asked, key := d.csrs(), d.journal().Operation.Key
	if result := d.mustEnroll(); result.Changed || result.Key != enrolled.Key || !d.warned("is not done") || len(d.requests) != 0 {
		t.Errorf("result %+v, events %+v", result, d.events)
	}
	c.advance(time.Hour + time.Minute)
	result := d.mustRekey()
	if result.Key.String() != key || !result.Recovered {
		t.Errorf("result %+v", result)
	}
	if diff := cmp.Diff(asked, d.csrs()); diff != "" {
		t.Errorf("another CSR:\n%s", diff)
	}
	d.tidy(2)
}

// A certificate that does not last longer is no renewal, unless it is forced: the
// new key goes.
func TestRekeyDoesNotLastLonger(t *testing.T) {
	for name, forced := range map[string]bool{"forced": true, "not forced": false} {
		t.Run(name, func(t *testing.T) {
			behind := new(clock)
			d := newSite(t, testserver.Config{Now: behind.now}).device(t, "shorter")
			d.mustEnroll()
			before := d.snapshot()
			d.hook = after(1, "before simplereenroll", func() error { panic(killed{"before simplereenroll"}) })
			if _, err := d.rekey(); err == nil {
				t.Fatal("not killed")
			}
			d.hook = nil
			if !forced {
				journal := d.read("journal.json")
				if !strings.Contains(journal, `"force": true`) {
					t.Fatalf("journal %s", journal)
				}
				d.write("journal.json", strings.Replace(journal, `"force": true`, `"force": false`, 1))
			}
			behind.advance(-30 * time.Second) // to it the current certificate is valid
			result := d.mustRekey()
			if result.Changed != forced || result.Kind != estenroll.KindRekey || d.warned("no renewal") == forced {
				t.Errorf("result %+v, events %+v", result, d.events)
			}
			if !forced {
				d.unchangedSince(before)
				d.tidy(1)
				return
			}
			d.tidy(2)
		})
	}
}

// A configuration that names its key says which one it is: nothing is generated
// beside it, and nothing is asked. Without it the rekey leaves that key alone, for
// good.
func TestRekeyOfExistingKey(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "existing")
	d.cfg.Key = site.owned(t, "EC:secp384r1", "owned", "77")
	existing := d.mustEnroll().Key
	before, journal, sessions := d.snapshot(), d.read("journal.json"), d.opened
	_, err := d.rekey()
	wantError(t, err, estenroll.ErrKeyNamed)
	d.unchangedSince(before)
	if d.read("journal.json") != journal || d.opened != sessions {
		t.Errorf("the rekey was begun: %d sessions", d.opened-sessions)
	}
	d.mustRenew()

	d.cfg.Key = nil
	if result := d.mustRekey(); result.Key == existing || d.uri(result.Key.String()).Object != "existing" {
		t.Errorf("result %+v", result)
	}
	d.mustRenew()
	for _, pair := range d.journal().Pairs {
		if pair.Key == existing.String() {
			t.Errorf("a certificate of %s is kept", existing)
		}
	}
	site.signs(t, existing)

	// Named in the middle of a rekey: until there is a certificate, that is given up.
	d.hook = after(1, "before simplereenroll", func() error { return est.ErrUnreachable })
	_, err = d.rekey()
	wantError(t, err, est.ErrUnreachable)
	d.hook, d.cfg.Key = nil, site.address(t, "pkcs11:object=owned")
	if result := d.mustRenew(); result.Kind != estenroll.KindRenew || !d.warned("names another key now") {
		t.Errorf("result %+v, events %+v", result, d.events)
	}
	if n := d.privateKeys(); n != 2 {
		t.Errorf("%d keys, want the owned one and ours", n)
	}
}

// Another key type in the configuration gives a rekey up that has no certificate
// yet; one that has is finished.
func TestRekeyChangedUnderWay(t *testing.T) {
	for at, givenUp := range map[string]bool{"before GenerateKey": true, "after GenerateKey": true, "after simplereenroll": true, "after StoreCertificates": false} {
		t.Run(at, func(t *testing.T) {
			d := newSite(t, testserver.Config{}).device(t, "changed")
			d.mustEnroll()
			d.hook = after(1, at, func() error { panic(killed{at}) })
			if _, err := d.rekey(); err == nil {
				t.Fatal("not killed")
			}
			d.hook, d.cfg.KeySpec.Algorithm = nil, engine.ECP384
			result := d.mustRekey()
			want := map[bool]engine.Algorithm{true: engine.ECP384, false: engine.ECP256}[givenUp]
			if got := engine.AlgorithmOf(result.Certificate.PublicKey); got != want || d.warned("is given up") != givenUp {
				t.Errorf("the certificate is for %s, want %s; events %+v", got, want, d.events)
			}
			d.tidy(2)
			if d.privateKeys() != 2 {
				t.Errorf("%d keys", d.privateKeys())
			}
		})
	}
}

// A renewal that was begun is finished, and does not stand for the rekey that is
// asked for.
func TestRekeyAfterInterruptedRenewal(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "both")
	old := d.mustEnroll().Key
	d.hook = after(1, "after StoreCertificates", func() error { panic(killed{"after StoreCertificates"}) })
	if _, err := d.renew(); err == nil {
		t.Fatal("not killed")
	}
	d.hook = nil
	if result := d.mustRekey(); result.Kind != estenroll.KindRekey || result.Key == old || result.Recovered {
		t.Errorf("result %+v", result)
	}
	d.tidy(2)
	if d.issued() != 3 {
		t.Errorf("%d certificates issued", d.issued())
	}
}

// The certificate that a killed rekey would have authenticated with has expired, or
// is gone: the rekey is given up with its key, wherever it stood.
func TestRekeyOutlived(t *testing.T) {
	for _, at := range []string{"before GenerateKey", "after GenerateKey", "after simplereenroll", "after StoreCertificates"} {
		t.Run(at, func(t *testing.T) {
			c := new(clock)
			d := newSite(t, testserver.Config{Lifetime: time.Hour, Now: c.now}).device(t, "outlived")
			d.now = c.now
			d.mustEnroll()
			d.hook = after(1, at, func() error { panic(killed{at}) })
			if _, err := d.rekey(); err == nil {
				t.Fatal("not killed")
			}
			d.hook = nil
			c.advance(2 * time.Hour)
			_, err := d.rekey()
			wantError(t, err, estenroll.ErrExpired)
			d.tidy(1)
			if result := d.mustEnroll(); !result.Changed {
				t.Errorf("result %+v", result)
			}
			d.tidy(2)
		})
	}
}

// The key of the retired pair stays while another name of the device uses it, in a
// pair or in its Security instance alone.
func TestRekeySharedKey(t *testing.T) {
	t.Run("another pair", func(t *testing.T) {
		site := newSite(t, testserver.Config{})
		maker := site.device(t, "maker")
		made := maker.mustEnroll().Key
		user := site.device(t, "user")
		user.dir, user.cfg.StateDir, user.cfg.Security.Instance = maker.dir, maker.dir, 1
		user.cfg.Key = site.address(t, "pkcs11:object=maker;type=private")
		user.others = []estenroll.CredentialConfig{maker.cfg.CredentialConfig}
		maker.others = []estenroll.CredentialConfig{user.cfg.CredentialConfig}
		user.mustEnroll()
		maker.retiresItsKey(made)
		site.signs(t, made)
		if status := user.status(); status.Current.Key != made.String() || status.Current.Problem != "" {
			t.Errorf("status %+v", status.Current)
		}
	})
	t.Run("a Security instance", func(t *testing.T) {
		site := newSite(t, testserver.Config{})
		d := site.device(t, "maker")
		made := d.mustEnroll().Key
		path := filepath.Join(d.dir, "security.json")
		object, err := lwm2m.LoadSecurity(path, site.parse)
		if err != nil {
			t.Fatal(err)
		}
		instance, _ := object.Instance(0)
		instance.ShortServerID = 8
		// Of another program, perhaps: one with our certificate would be ours, left behind.
		instance.ClientCertificate = engine.CertificateChainFromEngine(site.address(t, "pkcs11:object=another;type=cert"))
		object.Set(7, instance)
		if err := object.Save(path); err != nil {
			t.Fatal(err)
		}
		d.retiresItsKey(made)
		site.signs(t, made)
	})
	t.Run("nobody", func(t *testing.T) {
		d := newSite(t, testserver.Config{}).device(t, "maker")
		made := d.mustEnroll().Key
		d.retiresItsKey(made)
		if _, err := d.site.engine.Signer(t.Context(), made); !errors.Is(err, engine.ErrNotFound) {
			t.Errorf("the key: %v", err)
		}
	})
}

// retiresItsKey rekeys until no pair of the credential has the key.
func (d *device) retiresItsKey(key engine.Address) {
	d.t.Helper()
	d.mustRekey()
	d.mustRekey()
	for _, pair := range d.journal().Pairs {
		if pair.Key == key.String() {
			d.t.Errorf("a certificate of %s is kept", key)
		}
	}
}

// Each name of a device has keys of its own, and a rekey of one leaves the others.
func TestRekeySeveral(t *testing.T) {
	site := newSite(t, testserver.Config{})
	first := site.device(t, "lwm2m")
	mqtt := site.device(t, "mqtt")
	mqtt.dir, mqtt.cfg.StateDir, mqtt.cfg.Security.Instance = first.dir, first.dir, 1
	first.others = []estenroll.CredentialConfig{mqtt.cfg.CredentialConfig}
	mqtt.others = []estenroll.CredentialConfig{first.cfg.CredentialConfig}
	first.mustEnroll()
	other := mqtt.mustEnroll()
	for range 3 {
		first.mustRekey()
	}
	if status := mqtt.status(); status.Current.Key != other.Key.String() || status.Current.Problem != "" || len(status.Previous) != 0 {
		t.Errorf("status %+v", status)
	}
	// Three keys, each with one certificate, and one chain certificate for all.
	if objects := first.objects(); first.privateKeys() != 3 || len(objects) != 3*(2+1)+1 {
		t.Errorf("objects:\n%s", strings.Join(objects, "\n"))
	}
}

// A reset in the middle of a rekey destroys both keys.
func TestRekeyReset(t *testing.T) {
	for _, at := range []string{"before GenerateKey", "after GenerateKey", "after StoreCertificates"} {
		t.Run(at, func(t *testing.T) {
			d := newSite(t, testserver.Config{}).device(t, "reset")
			d.mustEnroll()
			d.hook = after(1, at, func() error { panic(killed{at}) })
			if _, err := d.rekey(); err == nil {
				t.Fatal("not killed")
			}
			d.hook = nil
			if err := d.run(func(c *estenroll.Credential) error { return c.Reset(t.Context()) }); err != nil {
				t.Fatal(err)
			}
			if objects := d.objects(); len(objects) != 0 {
				t.Errorf("left in the token: %q", objects)
			}
		})
	}
}

// The answer is a certificate that the device has: it is for another key.
func TestRekeyGetsTheOldCertificate(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "identical")
	old := d.mustEnroll().Certificate
	before := d.snapshot()
	d.answer = func(operation est.Operation) []*x509.Certificate {
		if operation == est.CACerts {
			return nil
		}
		return []*x509.Certificate{old}
	}
	_, err := d.rekey()
	wantError(t, err, est.ErrKeyMismatch)
	d.unchangedSince(before)
	d.answer = nil
	d.mustRekey()
	d.tidy(2)
}

// There is nothing to rekey before the first boot, and after the end.
func TestRekeyNotEnrolled(t *testing.T) {
	c := new(clock)
	d := newSite(t, testserver.Config{Lifetime: time.Hour, Now: c.now}).device(t, "nothing")
	d.now = c.now
	_, err := d.rekey()
	wantError(t, err, estenroll.ErrNotEnrolled)
	d.mustEnroll()
	c.advance(2 * time.Hour)
	before := d.snapshot()
	_, err = d.rekey()
	wantError(t, err, estenroll.ErrExpired)
	d.unchangedSince(before)
	if op := d.journal().Operation; op != nil {
		t.Errorf("operation %+v", op)
	}
}
