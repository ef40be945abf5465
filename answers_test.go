package estenroll_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/testserver"
)

// openssl is the foreign judge.
func openssl(t *testing.T, input []byte, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "openssl", args...)
	cmd.Stdin = bytes.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("openssl %s (make deps installs it): %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func san(t *testing.T, text string) csr.SAN {
	t.Helper()
	name, err := csr.ParseSAN(text)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// A certificate for other names than those asked for is taken with a warning, or
// refused, and then nothing stays. A renewal asks for what the current one has.
func TestOtherNames(t *testing.T) {
	for name, c := range map[string]struct {
		faults  testserver.Faults
		warning string // of the enrolment
	}{
		"an RDN added":     {testserver.Faults{Subject: "OU=added,CN=names"}, "its Subject is OU=added,CN=names, asked for was CN=names"},
		"the SAN dropped":  {testserver.Faults{DropSAN: true}, "its SAN is none, asked for was DNS:names.example"},
		"the same in case": {testserver.Faults{Subject: "CN=Names"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, testserver.Config{})
			d := site.device(t, "names")
			d.cfg.Request.SANs = []csr.SAN{san(t, "DNS:names.example")}
			site.faults(t, c.faults)

			if c.warning != "" {
				d.cfg.RefuseOtherNames = true
				_, err := d.enroll()
				wantError(t, err, estenroll.ErrOtherNames)
				if !strings.Contains(err.Error(), "issued certificate: "+c.warning) {
					t.Errorf("error %v", err)
				}
				if left := d.snapshot(); len(left.Objects) != 0 || d.journal().Operation != nil {
					t.Errorf("left behind: %+v", left)
				}
				d.cfg.RefuseOtherNames = false
			}
			d.mustEnroll()
			if c.warning != "" != d.warned("the issued certificate is for other names: "+c.warning) || c.warning == "" && d.warned("") {
				t.Errorf("events %+v", d.events)
			}

			// What it was issued with is what a renewal asks for and gets.
			d.cfg.RefuseOtherNames = true
			site.faults(t, testserver.Faults{})
			d.mustRenew()
			if d.warned("") {
				t.Errorf("events %+v", d.events)
			}
			d.tidy(2)
		})
	}
	t.Run("a renewal", func(t *testing.T) {
		site := newSite(t, testserver.Config{})
		d := site.device(t, "names")
		d.mustEnroll()
		d.cfg.RefuseOtherNames = true
		site.faults(t, testserver.Faults{Subject: "O=first,CN=names"})
		before := d.snapshot()
		_, err := d.renew()
		wantError(t, err, estenroll.ErrOtherNames)
		d.unchangedSince(before)
		d.tidy(1)
	})
}

// Usages are asked for in each request, from the configuration, beside the names
// of the current certificate; what is not issued is said.
func TestUsages(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "usages")
	var err error
	if d.cfg.Request.KeyUsage, err = csr.ParseKeyUsage([]string{"digitalSignature,keyAgreement"}); err != nil {
		t.Fatal(err)
	}
	if d.cfg.Request.ExtKeyUsage, err = csr.ParseExtKeyUsage([]string{"clientAuth,serverAuth"}); err != nil {
		t.Fatal(err)
	}
	asked := func(want ...string) {
		t.Helper()
		csrs := d.csrs()
		if len(csrs) != 1 {
			t.Fatalf("%d requests", len(csrs))
		}
		text := openssl(t, []byte(csrs[0]), "req", "-inform", "DER", "-noout", "-text", "-verify")
		for _, part := range append(want, "verify OK", "Subject: CN = usages") {
			if !strings.Contains(text, part) {
				t.Errorf("openssl req: no %q in %s", part, text)
			}
		}
	}
	result := d.mustEnroll()
	asked("Key Usage: critical\n                    Digital Signature, Key Agreement\n", "Extended Key Usage: \n                    TLS Web Client Authentication, TLS Web Server Authentication\n")
	if d.warned("") || result.Certificate.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageKeyAgreement {
		t.Errorf("key usage %b, events %+v", result.Certificate.KeyUsage, d.events)
	}

	site.faults(t, testserver.Faults{IgnoreUsage: true})
	d.mustRenew()
	asked("Digital Signature, Key Agreement\n", "TLS Web Client Authentication, TLS Web Server Authentication\n")
	if !d.warned("the issued certificate is not for all that was asked for: without keyAgreement, serverAuth") {
		t.Errorf("events %+v", d.events)
	}
	d.tidy(2)
}

// Another usage is another question: a request that is pending is made anew.
func TestUsageChanged(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "question")
	site.deferring(t, 1, time.Hour)
	_, err := d.enroll()
	d.wantPending(err)
	first := d.csrs()
	d.cfg.Request.KeyUsage = x509.KeyUsageDigitalSignature
	_, err = d.enroll()
	d.wantPending(err)
	second := d.csrs()
	d.cfg.Request.ExtKeyUsage, err = csr.ParseExtKeyUsage([]string{"clientAuth"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.enroll()
	d.wantPending(err)
	if third := d.csrs(); len(first) != 1 || len(second) != 1 || len(third) != 1 || first[0] == second[0] || second[0] == third[0] {
		t.Errorf("%d, %d and %d requests, or the same bytes", len(first), len(second), len(third))
	}
}

// Whatever the answer and cacerts hold beside it, the chain is stored, once,
// without its root, and OpenSSL follows it.
func TestChainStored(t *testing.T) {
	for name, cfg := range map[string]testserver.Config{
		"the leaf alone":              {},
		"with its chain":              {AnswerChain: true},
		"with its root":               {AnswerRoot: true},
		"with both, among other CAs":  {AnswerChain: true, AnswerRoot: true, OtherCAs: 3},
		"a root that issues":          {SingleCA: true},
		"a root that issues, with it": {SingleCA: true, AnswerRoot: true, OtherCAs: 1},
	} {
		t.Run(name, func(t *testing.T) {
			site := newSite(t, cfg)
			d := site.device(t, "chain")
			chain := 2
			if cfg.SingleCA {
				chain = 1
			}
			for round := 1; round <= 2; round++ {
				if round == 1 {
					d.mustEnroll()
				} else {
					d.mustRenew()
				}
				d.tidy(round)
				pair := d.journal().Pairs[0]
				if len(pair.Certificates) != chain {
					t.Errorf("a chain of %d, want %d", len(pair.Certificates), chain)
				}
				d.verify(pair.Certificates, site.server.Root())
			}
			// The chain certificate of both pairs is one object.
			if objects := strings.Join(d.objects(), "\n"); strings.Count(objects, "cert ") != 2+chain-1 {
				t.Errorf("objects:\n%s", objects)
			}
		})
	}
}

// The root of a server may be none that is self-signed.
func TestChainWithoutRoot(t *testing.T) {
	site := newSite(t, testserver.Config{AnswerChain: true})
	d := site.device(t, "subordinate")
	d.answer = func(operation est.Operation) []*x509.Certificate {
		if operation == est.CACerts {
			return []*x509.Certificate{site.server.Issuing()}
		}
		return nil
	}
	d.mustEnroll()
	d.tidy(1)
	pair := d.journal().Pairs[0]
	if len(pair.Certificates) != 1 {
		t.Errorf("a chain of %d: what is trusted is not sent", len(pair.Certificates))
	}
	d.verify(pair.Certificates, site.server.Issuing())
}

// verify has OpenSSL follow certificates of the token to an anchor.
func (d *device) verify(at []string, anchor *x509.Certificate) {
	d.t.Helper()
	dir := d.t.TempDir()
	write := func(name string, certs ...*x509.Certificate) string {
		var content []byte
		for _, cert := range certs {
			content = append(content, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			d.t.Fatal(err)
		}
		return path
	}
	var chain []*x509.Certificate
	for _, text := range at {
		cert, err := d.site.engine.(engine.CertificateStore).Certificate(d.t.Context(), d.uri(text))
		if err != nil {
			d.t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	// -partial_chain: an anchor need not be self-signed.
	bundle := write("chain.pem", chain...) // of which verify takes the first, the leaf
	openssl(d.t, nil, "verify", "-partial_chain", "-CAfile", write("ca.pem", anchor), "-untrusted", bundle, bundle)
}

// What the server says is in the error, in the status and in the record, capped
// and printable, though it came in many blocks.
func TestServerText(t *testing.T) {
	harmless := func(text string) {
		t.Helper()
		if i := strings.IndexFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\u202e' || r == '\ufffd' }); i >= 0 || len(text) > 1024 {
			t.Errorf("%d bytes, at %d not printable: %q", len(text), i, text)
		}
		if !strings.Contains(text, "est-enroll: enrolled") || !strings.Contains(text, "the server has much to say") {
			t.Errorf("not the server's text: %q", text)
		}
	}
	site := newSite(t, testserver.Config{BlockSize: 64})
	d := site.device(t, "text")
	site.faults(t, testserver.Faults{Answer: "4.00", LongDetail: true})
	_, err := d.enroll()
	var status *est.StatusError
	if !errors.As(err, &status) || status.Code != "4.00 BadRequest" || len(status.Detail) > 512 {
		t.Fatalf("error %v", err)
	}
	harmless(err.Error())
	if last := d.status().LastAttempt; last == nil || last.Error != err.Error() {
		t.Errorf("last attempt %+v, want the error %q", last, err)
	}

	site.faults(t, testserver.Faults{Defer: 1, LongDetail: true})
	_, err = d.enroll()
	pending := d.wantPending(err)
	harmless(pending.Error())
	if in := time.Until(pending.NotBefore); in < 50*time.Second || in > time.Minute {
		t.Errorf("come back in %s, without a Max-Age it is 60 s", in)
	}
	if got := d.status().Pending; got == nil || got.Detail != pending.Detail || len(got.Detail) > 512 {
		t.Errorf("status %+v, want %q", got, pending.Detail)
	}
	_, err = d.enroll()
	if again := d.wantPending(err); fmt.Sprint(again) != fmt.Sprint(pending) {
		t.Errorf("the next run says %v, want %v", again, pending)
	}
}

// A certificate that begins while the server decides is valid by the time that its
// answer is there.
func TestSlowDecision(t *testing.T) {
	c := new(clock)
	d := newSite(t, testserver.Config{Now: c.now}).device(t, "slow")
	d.now = c.now
	d.hook = after(1, "before simpleenroll", func() error { c.advance(10 * time.Minute); return nil })
	d.mustEnroll()
	d.tidy(1)
}
