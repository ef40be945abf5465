package estenroll_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// wanting is what a server answers that wants something of a CSR.
func wanting(attributes ...csr.Attribute) []byte {
	der, err := csr.Attributes(attributes).Marshal()
	if err != nil {
		panic(err)
	}
	return der
}

func wantedKey(family, size string) csr.Attribute {
	attribute, err := csr.WantKey(csr.WantedKey{Family: family, Size: size})
	if err != nil {
		panic(err)
	}
	return attribute
}

func wantedExtensions(extensions ...pkix.Extension) csr.Attribute {
	attribute, err := csr.WantExtensions(extensions)
	if err != nil {
		panic(err)
	}
	return attribute
}

// operations are those of the last run, in order.
func (d *device) operations() (names []string) {
	for _, r := range d.requests {
		names = append(names, r.operation.ShortPath())
	}
	return names
}

// challenges are the challengePasswords of the CSRs of the last run.
func (d *device) challenges() (passwords []string) {
	d.t.Helper()
	for _, der := range d.csrs() {
		request, err := x509.ParseCertificateRequest([]byte(der))
		if err != nil {
			d.t.Fatal(err)
		}
		passwords = append(passwords, csr.ChallengePassword(request))
	}
	return passwords
}

// The HSM generates the key that the server asks for, whatever was configured, and
// nothing is left of the one before it. It is asked once for an enrolment.
func TestWantedKey(t *testing.T) {
	d := newSite(t, testserver.Config{CSRAttributes: wanting(wantedKey("EC", "P-384"))}).device(t, "wanted")
	first := d.mustEnroll()
	if got := engine.AlgorithmOf(first.Certificate.PublicKey); got != engine.ECP384 {
		t.Errorf("a key of type %s", got)
	}
	if got, want := d.operations(), []string{"crts", "att", "crts", "sen", "crts"}; !slices.Equal(got, want) || d.signatures != 4 {
		t.Errorf("asked %q, want %q; %d signatures: of three handshakes and one CSR", got, want, d.signatures)
	}
	d.tidy(1)
	renewed := d.mustRenew()
	if renewed.Key != first.Key {
		t.Errorf("renewed with %s", renewed.Key)
	}
	d.cfg.KeySpec.Algorithm = engine.ECP384
	rekeyed := d.mustRekey()
	if got := engine.AlgorithmOf(rekeyed.Certificate.PublicKey); got != engine.ECP384 || rekeyed.Key == first.Key {
		t.Errorf("rekeyed with %s, a key of type %s", rekeyed.Key, got)
	}
	if got, want := d.operations(), []string{"crts", "att", "sren", "crts"}; !slices.Equal(got, want) {
		t.Errorf("asked %q, want %q", got, want)
	}
}

// What leaves the size open is what is configured, or the first that there is; a
// renewal keeps its key, with a word about it.
func TestWantedFamily(t *testing.T) {
	site := newSite(t, testserver.Config{CSRAttributes: wanting(wantedKey("RSA", ""))})
	d := site.device(t, "family")
	d.cfg.IgnoreAttributes = true
	d.mustEnroll()
	if got, want := d.operations(), []string{"crts", "sen", "crts"}; !slices.Equal(got, want) {
		t.Errorf("asked %q, want %q", got, want)
	}
	d.cfg.IgnoreAttributes = false
	if got := engine.AlgorithmOf(d.mustRenew().Certificate.PublicKey); got != engine.ECP256 || !d.warned("a rekey gets it") {
		t.Errorf("renewed for a key of type %s, events %v", got, d.events)
	}
	if got := engine.AlgorithmOf(d.mustRekey().Certificate.PublicKey); got != engine.RSA2048 {
		t.Errorf("rekeyed for a key of type %s", got)
	}
}

// What nobody can generate, or this key is not, or contradicts itself, is refused
// before a certificate is asked for, with the reason; nothing is left.
func TestWantedImpossible(t *testing.T) {
	junk := csr.Attribute{Type: wantedKey("EC", "").Type, Values: [][]byte{{2, 1, 1}}}
	for name, c := range map[string]struct {
		attributes []byte
		is         error
		text       string
	}{
		"a curve that no engine has": {wanting(wantedKey("EC", "1.3.36.3.3.2.8.1.1.11")), estenroll.ErrKeyWanted, "EC 1.3.36.3.3.2.8.1.1.11, which no engine generates"},
		"a size that no engine has":  {wanting(wantedKey("RSA", "8192")), estenroll.ErrKeyWanted, "RSA 8192"},
		"two kinds of key":           {wanting(wantedKey("EC", "P-384"), wantedKey("RSA", "2048")), csr.ErrContradictory, "of type EC P-384 and of type RSA 2048"},
		"a curve that is none":       {wanting(junk), nil, "csrattrs: answer: "},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{CSRAttributes: c.attributes}).device(t, "impossible")
			_, err := d.enroll()
			var response *est.ResponseError
			if !errors.As(err, &response) || response.Operation != est.CSRAttrs || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v", err)
			}
			if d.issued() != 0 || len(d.objects()) != 0 || d.journal().Operation != nil {
				t.Errorf("issued %d, left %q and %+v", d.issued(), d.objects(), d.journal().Operation)
			}
			d.cfg.IgnoreAttributes = true
			d.mustEnroll()
			d.tidy(1)
		})
	}
}

// A token that cannot do what the server wants says so; the next run asks anew.
func TestWantedUnsupported(t *testing.T) {
	d := newSite(t, testserver.Config{CSRAttributes: wanting(wantedKey("EC", "P-521"))}).device(t, "unsupported")
	d.hook = after(2, "before GenerateKey", func() error { return &engine.Error{Op: "generate key", Err: engine.ErrUnsupported} })
	_, err := d.enroll()
	wantError(t, err, engine.ErrUnsupported)
	if !strings.Contains(err.Error(), "the server wants a key of type EC P-521") {
		t.Errorf("got %v", err)
	}
	if len(d.objects()) != 0 || d.journal().Operation != nil {
		t.Errorf("left %q and %+v", d.objects(), d.journal().Operation)
	}
	d.hook = nil
	d.mustEnroll()
	d.tidy(1)
}

// A key that the configuration names is used or not, and never replaced.
func TestWantedExistingKey(t *testing.T) {
	site := newSite(t, testserver.Config{CSRAttributes: wanting(wantedKey("EC", "P-384"))})
	d := site.device(t, "existing")
	d.cfg.Key, d.cfg.AllowExtractable = site.owned(t, "EC:prime256v1", "owned", "77"), true
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrKeyWanted)
	if d.issued() != 0 || d.journal().Operation != nil {
		t.Errorf("issued %d, left %+v", d.issued(), d.journal().Operation)
	}
	d.cfg.IgnoreAttributes = true
	d.mustEnroll()
}

// The CSR is signed as the server wants, by a key of each kind, whatever is configured.
func TestWantedSignature(t *testing.T) {
	const ecdsaWithSHA512, sha384WithRSA, rsassaPSS, sha384 = "1.2.840.10045.4.3.4", "1.2.840.113549.1.1.12", "1.2.840.113549.1.1.10", "2.16.840.1.101.3.4.2.2"
	for name, c := range map[string]struct {
		wants []csr.Attribute
		key   engine.Algorithm
		pss   bool
		want  x509.SignatureAlgorithm
	}{
		"SHA-512 by P-256":    {[]csr.Attribute{wantedOID(ecdsaWithSHA512)}, "", false, x509.ECDSAWithSHA512},
		"PKCS1, not PSS":      {[]csr.Attribute{wantedOID(sha384WithRSA)}, engine.RSA2048, true, x509.SHA384WithRSA},
		"PSS, not PKCS1":      {[]csr.Attribute{wantedOID(rsassaPSS), wantedOID(sha384)}, engine.RSA2048, false, x509.SHA384WithRSAPSS},
		"SHA-384 for PSS":     {[]csr.Attribute{wantedOID(sha384)}, engine.RSA2048, true, x509.SHA384WithRSAPSS},
		"a key that signs so": {[]csr.Attribute{wantedOID(sha384WithRSA)}, "", false, x509.SHA384WithRSA},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{CSRAttributes: wanting(c.wants...)}).device(t, "signed")
			d.cfg.KeySpec.Algorithm, d.cfg.Request.PSS = c.key, c.pss
			d.mustEnroll()
			request, err := x509.ParseCertificateRequest([]byte(d.csrs()[0]))
			if err != nil || request.SignatureAlgorithm != c.want {
				t.Errorf("signed with %v, %v", request.SignatureAlgorithm, err)
			}
			d.tidy(1)
		})
	}
}

// A signature that the server wants and the token does not make is said to be that;
// the next run asks anew.
func TestWantedSignatureUnsupported(t *testing.T) {
	d := newSite(t, testserver.Config{CSRAttributes: wanting(wantedOID("1.2.840.10045.4.3.4"))}).device(t, "unsigned")
	d.lacks = crypto.SHA512
	for range 2 {
		_, err := d.enroll()
		wantError(t, err, csr.ErrSignature)
		wantError(t, err, engine.ErrUnsupported)
		if !strings.Contains(err.Error(), "the server wants a signature with SHA-512 by a key of type EC P-256") {
			t.Errorf("got %v", err)
		}
		if got, want := d.operations(), []string{"crts", "att"}; !slices.Equal(got, want) || len(d.objects()) != 0 || d.journal().Operation != nil {
			t.Errorf("asked %q, want %q; left %q and %+v", got, want, d.objects(), d.journal().Operation)
		}
	}
	d.cfg.IgnoreAttributes = true
	d.mustEnroll()
	d.tidy(1)
}

// What the server leaves to the device is said to be missing where a setting has it,
// at the request that could have had it, and else told to whom wants to know.
func TestWantedMissing(t *testing.T) {
	const serialNumber, macAddress, subjectAltName = "2.5.4.5", "1.3.6.1.1.1.1.22", "2.5.29.17"
	const missing, ignored = "what the configuration does not have, and the CSR is without: ", "what this device does not have or know, and the CSR is without: "
	d := newSite(t, testserver.Config{CSRAttributes: wanting(wantedOID(serialNumber), wantedOID(macAddress), wantedOID(subjectAltName))}).device(t, "missing")
	d.mustEnroll()
	for _, what := range []string{"serialNumber in the Subject", "SAN"} {
		if !d.warned(missing + what) {
			t.Errorf("no warning of %s: %v", what, d.events)
		}
	}
	told := func(e estenroll.Event) bool { return !e.Warning && strings.HasSuffix(e.Message, ignored+macAddress) }
	if n := len(slices.DeleteFunc(slices.Clone(d.events), func(e estenroll.Event) bool { return !told(e) })); n != 1 {
		t.Errorf("told %d times of %s: %v", n, macAddress, d.events)
	}
	if d.mustRenew(); d.warned(missing) || !slices.ContainsFunc(d.events, told) {
		t.Errorf("at a renewal, whose names are the certificate's: %v", d.events)
	}
}

// An attribute that the server wants with its value is in the CSR as it is, at a
// renewal too.
func TestWantedAttribute(t *testing.T) {
	unstructuredName := wantedOID("1.2.840.113549.1.9.2")
	unstructuredName.Values = [][]byte{append([]byte{asn1.TagPrintableString, 7}, "pump 17"...)}
	d := newSite(t, testserver.Config{CSRAttributes: wanting(unstructuredName)}).device(t, "attribute")
	for _, run := range []func() *estenroll.Result{d.mustEnroll, d.mustRenew} {
		run()
		request, err := x509.ParseCertificateRequest([]byte(d.csrs()[0]))
		if err != nil {
			t.Fatal(err)
		}
		if got := csr.RequestAttributes(request); len(got) != 1 || !got[0].Type.Equal(unstructuredName.Type) || string(got[0].Values[0]) != string(unstructuredName.Values[0]) {
			t.Errorf("got %v", got)
		}
	}
}

func wantedOID(text string) csr.Attribute {
	oid, err := x509.ParseOID(text)
	if err != nil {
		panic(err)
	}
	return csr.Attribute{Type: oid}
}

// The certificate is for what the server wants instead of the configuration; at a
// renewal not the names, which stay.
func TestWantedTemplate(t *testing.T) {
	der, err := os.ReadFile("testdata/rfc9908/template.der")
	if err != nil {
		t.Fatal(err)
	}
	san := pkix.Extension{Id: csr.OIDSubjectAltName, Value: []byte{0x30, 7, 0x82, 5, 'o', 't', 'h', 'e', 'r'}}
	usage := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 5, 0xa0}}
	for name, c := range map[string]struct {
		attributes []byte
		subject    string
		usage      x509.KeyUsage
		names      []string
	}{
		"a template":                   {der, "CN=names+serialNumber=4711,O=Example", x509.KeyUsageDigitalSignature, nil},
		"extensions with their values": {wanting(wantedExtensions(san, usage)), "CN=names", x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, []string{"other"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{CSRAttributes: c.attributes}).device(t, "names")
			check := func(cert *x509.Certificate, subject string, names []string) {
				t.Helper()
				if got := csr.FormatSubject(cert.RawSubject); got != subject || cert.KeyUsage != c.usage || !slices.Equal(cert.DNSNames, names) {
					t.Errorf("issued for %s, usage %b, names %q", got, cert.KeyUsage, cert.DNSNames)
				}
			}
			d.cfg.KeySpec.Algorithm = engine.RSA3072 // which the template wants
			if name != "a template" {
				d.cfg.KeySpec.Algorithm = ""
			}
			check(d.mustEnroll().Certificate, c.subject, c.names)
			if subject := c.subject != "CN=names"; subject != d.warned("something else than the configuration: Subject") {
				t.Errorf("events %v", d.events)
			}
			check(d.mustRenew().Certificate, c.subject, c.names)
		})
	}
	t.Run("a renewal", func(t *testing.T) {
		d := newSite(t, testserver.Config{CSRAttributes: wanting(wantedExtensions(san))}).device(t, "names")
		d.cfg.IgnoreAttributes = true
		d.mustEnroll()
		d.cfg.IgnoreAttributes = false
		if cert := d.mustRenew().Certificate; len(cert.DNSNames) != 0 {
			t.Errorf("renewed for %q", cert.DNSNames)
		}
	})
}

// Whatever a server answers that has no attributes to give does not end an enrolment,
// and is said unless it is a plain no.
func TestNoAttributes(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		warn bool
	}{
		"4.04": {&est.StatusError{Operation: est.CSRAttrs, Code: "4.04 Not Found", Class: 4, NotFound: true}, false},
		"4.05": {&est.StatusError{Operation: est.CSRAttrs, Code: "4.05 Method Not Allowed", Class: 4}, true},
		"5.01": {&est.StatusError{Operation: est.CSRAttrs, Code: "5.01 Not Implemented", Class: 5}, true},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{CSRAttributes: wanting(wantedKey("EC", "P-521"))}).device(t, "none")
			d.hook = after(1, "after csrattrs", func() error { return c.err })
			d.mustEnroll()
			if got := d.warned("the CSR is what the configuration says"); got != c.warn {
				t.Errorf("warned %t, events %v", got, d.events)
			}
			d.tidy(1)
		})
	}
}

// While a request is pending the server is not asked again what it wants: the bytes
// stay, whatever it would say by now.
func TestAttributesKept(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now, CSRAttributes: wanting(wantedKey("EC", "P-256"))})
	d := site.device(t, "kept")
	d.now = c.now
	site.deferring(t, 1, time.Minute)
	_, err := d.enroll()
	d.wantPending(err)
	first := d.csrs()
	c.advance(2 * time.Minute)
	d.mustEnroll()
	if got, want := d.operations(), []string{"crts", "sen", "crts"}; !slices.Equal(got, want) || d.csrs()[0] != first[0] {
		t.Errorf("asked %q, want %q, or other bytes", got, want)
	}
}

// A server that wants CSRs that are linked to their session gets them, at each kind of
// operation; one that does not gets them where that is configured.
func TestProofOfPossession(t *testing.T) {
	t.Run("auto", func(t *testing.T) {
		d := newSite(t, testserver.Config{CSRAttributes: wanting(csr.WantChallengePassword()), RequirePoP: true}).device(t, "pop")
		seen := map[string]bool{"": true}
		for _, run := range []func() *estenroll.Result{d.mustEnroll, d.mustRenew, d.mustRekey} {
			run()
			challenges := d.challenges()
			if len(challenges) != 1 || seen[challenges[0]] || d.signatures != 3 {
				t.Errorf("challengePasswords %q after %v; %d signatures: of two handshakes and one CSR", challenges, seen, d.signatures)
			}
			seen[challenges[0]] = true
		}

		d.cfg.PoP = estenroll.PoPOff
		_, err := d.renew()
		var status *est.StatusError
		if !errors.As(err, &status) || !strings.Contains(err.Error(), "no challengePassword") || !d.warned("linked to their session") {
			t.Errorf("without: %v, events %v", err, d.events)
		}
	})
	t.Run("require", func(t *testing.T) {
		d := newSite(t, testserver.Config{RequirePoP: true}).device(t, "pop")
		var status *est.StatusError
		if _, err := d.enroll(); !errors.As(err, &status) {
			t.Errorf("a server that does not say what it wants: %v", err)
		}
		d.cfg.PoP, d.cfg.IgnoreAttributes = estenroll.PoPRequire, true
		d.mustEnroll()
		d.tidy(1)
	})
}

// A CSR that is linked to its session is made again for another one, in the same run
// and in the next, and is the same request to a server: it issues once.
func TestProofOfPossessionAgain(t *testing.T) {
	c := new(clock)
	site := newSite(t, testserver.Config{Now: c.now, CSRAttributes: wanting(csr.WantChallengePassword()), RequirePoP: true})
	d := site.device(t, "again")
	d.now, d.cfg.Tries = c.now, 2
	site.deferring(t, 1, time.Minute)
	_, err := d.enroll()
	pending := d.wantPending(err)
	first := d.challenges()
	sessions := d.opened
	if _, err := d.enroll(); !d.wantPending(err).NotBefore.Equal(pending.NotBefore) || d.opened != sessions {
		t.Errorf("before its time: %d sessions", d.opened-sessions)
	}
	c.advance(2 * time.Minute)
	d.hook = after(1, "after simpleenroll", func() error { return est.ErrUnreachable }) // the answer is lost
	d.mustEnroll()
	challenges := append(first, d.challenges()...)
	if len(challenges) != 3 || len(slices.Compact(slices.Sorted(slices.Values(challenges)))) != 3 {
		t.Errorf("challengePasswords %q", challenges)
	}
	if d.issued() != 1 {
		t.Errorf("issued %d", d.issued())
	}
	d.tidy(1)
}

// A session that has got another connection is asked for what is bound to that, and the
// CSR is made again, once: then another session has its turn.
func TestProofOfPossessionUnlinked(t *testing.T) {
	unlinked := func() error { return est.Unreachable(est.ErrUnlinked) }
	built := func(d *device) (n int) {
		for _, event := range d.events {
			if strings.Contains(event.Message, "built the CSR") {
				n++
			}
		}
		return n
	}
	site := newSite(t, testserver.Config{RequirePoP: true})
	d := site.device(t, "unlinked")
	d.cfg.PoP, d.cfg.Tries = estenroll.PoPRequire, 1
	d.hook = after(1, "before simpleenroll", unlinked)
	d.mustEnroll()
	if got := built(d); got != 2 || d.opened != 2 { // the second session is the proof's
		t.Errorf("built %d CSRs in %d sessions", got, d.opened)
	}
	d.tidy(1)
	d = site.device(t, "always")
	d.cfg.PoP, d.cfg.Tries, d.cfg.RetryInterval = estenroll.PoPRequire, 2, time.Millisecond
	d.hook = func(when, call string) error {
		if when+" "+call == "before simpleenroll" {
			return unlinked()
		}
		return nil
	}
	_, err := d.enroll()
	wantError(t, err, est.ErrUnlinked)
	if got := built(d); got != 4 || d.opened != 2 || d.issued() != 0 {
		t.Errorf("built %d CSRs in %d sessions, issued %d", got, d.opened, d.issued())
	}
}

// unbound is a session that has nothing to bind to.
type unbound struct {
	watched
	err error
}

func (s unbound) ChannelBinding() ([]byte, error) { return nil, s.err }

// A session whose connection has gone before the CSR was linked is one that the server
// was not reached in; one of a transport that links nothing is not tried again.
func TestUnbound(t *testing.T) {
	for name, c := range map[string]struct {
		err, want, not error
		sessions       int
	}{
		"gone":  {est.Unreachable(errors.New("closed")), est.ErrUnreachable, estenroll.ErrNoPoP, 2},
		"never": {errors.ErrUnsupported, estenroll.ErrNoPoP, est.ErrUnreachable, 1},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSite(t, testserver.Config{RequirePoP: true}).device(t, "unbound")
			d.cfg.PoP, d.cfg.Tries = estenroll.PoPRequire, 2
			d.cfg.Dial = func(ctx context.Context, with estenroll.Connection) (est.Session, error) {
				session, err := d.dial(ctx, with)
				if err != nil {
					return nil, err
				}
				return unbound{session.(watched), c.err}, nil
			}
			_, err := d.enroll()
			wantError(t, err, c.want)
			if errors.Is(err, c.not) || d.opened != c.sessions {
				t.Errorf("got %v after %d sessions, want %d", err, d.opened, c.sessions)
			}
		})
	}
}
