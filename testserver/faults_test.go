package testserver_test

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
	"estenroll/testserver"
)

func TestParseFaults(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		texts string // separated by spaces
		want  testserver.Faults
		err   string // part of the error's text; empty: none
	}{
		{"", testserver.Faults{}, ""},
		{"delay=1.5s", testserver.Faults{Delay: 1500 * time.Millisecond}, ""},
		{"defer=2", testserver.Faults{Defer: 2}, ""},
		{"defer=2,max-age=5s", testserver.Faults{Defer: 2, DeferMaxAge: new(5 * time.Second)}, ""},
		{"defer=2,max-age=0s", testserver.Faults{Defer: 2, DeferMaxAge: new(time.Duration(0))}, ""},
		{"expired foreign-chain wrong-key", testserver.Faults{WrongKey: true, Expired: true, ForeignChain: true}, ""},
		{"not-yet-valid refuse-all refuse-code=4.01", testserver.Faults{NotYetValid: true, RefuseAll: true, RefuseCode: "4.01"}, ""},
		{"refuse-client=0abc refuse-client=def refuse-client=issued", testserver.Faults{RefuseIssued: true, RefuseClients: []string{"0abc", "def"}}, ""},
		{"drop-san ignore-usage subject=CN=x", testserver.Faults{DropSAN: true, IgnoreUsage: true, Subject: "CN=x"}, ""},
		{"answer=4.00 long-detail no-discovery", testserver.Faults{Answer: "4.00", LongDetail: true, NoDiscovery: true}, ""},
		{"links=</x>;rt=\"y\"", testserver.Faults{Links: "</x>;rt=\"y\""}, ""},
		{"subject=x", testserver.Faults{}, "subject"},
		{"subject=", testserver.Faults{}, "subject"},
		{"answer=2.05", testserver.Faults{}, "not a code"},
		{"answer=4.32", testserver.Faults{}, "not a code"},
		{"answer=4.1", testserver.Faults{}, "not a code"},
		{"answer", testserver.Faults{}, "not a code"},
		{"links", testserver.Faults{}, "want links"},
		{"links=</x> no-discovery", testserver.Faults{}, "there is none"},
		{"defer=1,max-age=1193046h28m16s", testserver.Faults{}, "more than a Max-Age"},
		{"body=two-leaves ca-flag crts=leaf", testserver.Faults{Body: "two-leaves", CAFlag: true, CRTS: "leaf"}, ""},
		{"message=block-etag server-certificate=expired", testserver.Faults{Message: "block-etag", ServerCertificate: "expired"}, ""},
		{"at=crts http=bare", testserver.Faults{At: "crts", HTTP: "bare"}, ""},
		{"at=crts", testserver.Faults{}, "neither http nor message"},
		{"body=three-leaves", testserver.Faults{}, "is none of"},
		{"message", testserver.Faults{}, "is none of"},
		{"drop=1", testserver.Faults{}, "no such fault"},
		{"wrong-key=1", testserver.Faults{}, "takes no value"},
		{"delay", testserver.Faults{}, "invalid duration"},
		{"delay=-1s", testserver.Faults{}, "negative"},
		{"defer=0", testserver.Faults{}, "want a number from 1 on"},
		{"defer", testserver.Faults{}, "want a number from 1 on"},
		{"defer=1,max-age=1.5s", testserver.Faults{}, "whole seconds"},
		{"defer=1,age=1s", testserver.Faults{}, "only option"},
		{"delay=1s delay=2s", testserver.Faults{}, "given twice"},
		{"refuse-client=", testserver.Faults{}, "hexadecimal"},
		{"refuse-client=xy", testserver.Faults{}, "hexadecimal"},
		{"refuse-code=5.00", testserver.Faults{}, "neither"},
		{"not-yet-valid expired", testserver.Faults{}, "cannot be both"},
	} {
		t.Run(test.texts, func(t *testing.T) {
			texts := strings.Fields(test.texts)
			got, err := testserver.ParseFaults(texts)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("got error %v, want one with %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.texts, strings.Join(got.Strings(), " ")); diff != "" {
				t.Errorf("text (-want +got):\n%s", diff)
			}
			for _, text := range texts {
				if name, _, _ := strings.Cut(text, "="); !strings.Contains(testserver.FaultsHelp, "  "+name) {
					t.Errorf("the help does not name %s", name)
				}
			}
		})
	}
}

func TestDelay(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{Faults: testserver.Faults{Delay: 50 * time.Millisecond}})
	device := idevid(t, server, "dev")
	began := time.Now()
	enroll(t, server, "sen", device, newCSR(t, device.key, named("dev")))
	if took := time.Since(began); took < 50*time.Millisecond {
		t.Errorf("took %v", took)
	}
	if err := server.SetFaults(testserver.Faults{Delay: time.Hour}); err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	resp := testserver.ServeCoAP(server, gone, post("sen", device, newCSR(t, device.key, named("dev"))))
	if resp.Code != codes.InternalServerError || len(server.Issuances()) != 1 {
		t.Errorf("client gone: got %v, issued %d", resp.Code, len(server.Issuances()))
	}
}

func TestDefer(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{Faults: testserver.Faults{Defer: 2, DeferMaxAge: new(3 * time.Second)}})
	device := idevid(t, server, "dev")
	csr := newCSR(t, device.key, named("dev"))
	for range 2 {
		resp := ask(t, server, post("sen", device, csr))
		if resp.Code != codes.ServiceUnavailable || resp.MaxAge == nil || *resp.MaxAge != 3 {
			t.Errorf("got %v Max-Age %v, want 5.03 and 3", resp.Code, resp.MaxAge)
		}
	}
	enroll(t, server, "sen", device, csr)
	if resp := ask(t, server, post("sen", device, newCSR(t, device.key, named("dev")))); resp.Code != codes.ServiceUnavailable {
		t.Errorf("another CSR: got %v, want 5.03", resp.Code)
	}
	if err := server.SetFaults(testserver.Faults{Defer: 1}); err != nil {
		t.Fatal(err)
	}
	if resp := ask(t, server, post("sen", device, csr)); resp.Code != codes.ServiceUnavailable || resp.MaxAge != nil {
		t.Errorf("got %v Max-Age %v, want 5.03 without", resp.Code, resp.MaxAge)
	}
	if got := len(server.Issuances()); got != 1 {
		t.Errorf("issued %d, want 1", got)
	}
}

func TestShapedCertificates(t *testing.T) {
	t.Parallel()
	now := time.Now()
	lifetime := time.Hour
	// judge is what a client would find; nil is an honest certificate.
	judge := func(server *testserver.Server, device credential, cert *x509.Certificate) error {
		roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
		roots.AddCert(server.Root())
		intermediates.AddCert(server.Issuing())
		_, err := cert.Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: intermediates, CurrentTime: now,
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
		if err == nil && !device.key.PublicKey.Equal(cert.PublicKey) {
			err = errors.New("foreign key")
		}
		if err == nil && cert.IsCA {
			err = errors.New("a CA")
		}
		return err
	}
	for _, test := range []struct {
		fault string
		want  string // part of judge's error
	}{
		{"", ""},
		{"wrong-key", "foreign key"},
		{"ca-flag", "a CA"},
		{"not-yet-valid", "is before"},
		{"expired", "is after"},
		{"foreign-chain", "unknown authority"},
	} {
		t.Run(test.fault, func(t *testing.T) {
			faults, err := testserver.ParseFaults(strings.Fields(test.fault))
			if err != nil {
				t.Fatal(err)
			}
			server := start(t, testserver.Config{Faults: faults, Lifetime: lifetime, Now: func() time.Time { return now }})
			device := idevid(t, server, "dev")
			cert := enroll(t, server, "sen", device, newCSR(t, device.key, named("dev")))
			err = judge(server, device, cert)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if diff := cmp.Diff(strings.Fields(test.fault), append([]string{}, server.Issuances()[0].Faults...)); diff != "" {
				t.Errorf("recorded faults (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRefuseClientByCode(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	factory := idevid(t, server, "dev")
	first, second := ldevid(t, server, factory, "dev"), ldevid(t, server, factory, "dev")
	get := func(client credential) codes.Code {
		return ask(t, server, &coap.Request{
			Method: codes.GET, Path: "/.well-known/est/crts", Peer: []*x509.Certificate{client.cert},
		}).Code
	}
	for _, test := range []struct {
		name                   string
		faults                 testserver.Faults
		factory, first, second codes.Code
	}{
		{"none", testserver.Faults{RefuseCode: "4.03"}, codes.Content, codes.Content, codes.Content},
		{"all", testserver.Faults{RefuseCode: "4.03", RefuseAll: true}, codes.Forbidden, codes.Forbidden, codes.Forbidden},
		{"issued", testserver.Faults{RefuseCode: "4.01", RefuseIssued: true}, codes.Content, codes.Unauthorized, codes.Unauthorized},
		{"serial", testserver.Faults{RefuseCode: "4.03", RefuseClients: []string{"0" + first.cert.SerialNumber.Text(16)}}, codes.Content, codes.Forbidden, codes.Content},
		{"fingerprint", testserver.Faults{RefuseCode: "4.03", RefuseClients: []string{strings.ToUpper(hexDigest(second.cert.Raw))}}, codes.Content, codes.Content, codes.Forbidden},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := server.SetFaults(test.faults); err != nil {
				t.Fatal(err)
			}
			got := []codes.Code{get(factory), get(first), get(second)}
			if diff := cmp.Diff([]codes.Code{test.factory, test.first, test.second}, got); diff != "" {
				t.Errorf("IDevID, first, second (-want +got):\n%s", diff)
			}
		})
	}
}

// An error answer of any code, plain or with a text that no log should have.
func TestAnswerCode(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	device := idevid(t, server, "dev")
	request := post("sen", device, newCSR(t, device.key, named("dev")))
	setFaults(t, server, "answer=4.29")
	if resp := ask(t, server, request); resp.Code != codes.Code(4<<5|29) || string(resp.Body) != "refused by a fault" {
		t.Errorf("got %v %q", resp.Code, resp.Body)
	}
	setFaults(t, server, "answer=5.00", "long-detail")
	resp := ask(t, server, request)
	if text := string(resp.Body); resp.Code != codes.InternalServerError || len(text) < 3000 ||
		!strings.Contains(text, "\x1b[2J") || !strings.Contains(text, "\n") || utf8.ValidString(text) {
		t.Errorf("got %v %q", resp.Code, resp.Body)
	}
	setFaults(t, server, "defer=1,max-age=1193046h28m15s", "long-detail")
	if resp := ask(t, server, request); resp.MaxAge == nil || *resp.MaxAge != math.MaxUint32 || len(resp.Body) < 3000 {
		t.Errorf("got %v Max-Age %v with %d bytes", resp.Code, resp.MaxAge, len(resp.Body))
	}
	if got := len(server.Issuances()); got != 0 {
		t.Errorf("issued %d", got)
	}
}

// Usages are issued as they are asked for, with their bytes and their critical flag.
func TestUsages(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	device := idevid(t, server, "dev")
	keyUsage := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 3, 0x88}} // not critical
	purposes := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true,
		Value: []byte{0x30, 0x0a, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1}} // serverAuth
	asking := func(extensions ...pkix.Extension) []byte {
		template := named("dev")
		template.ExtraExtensions = extensions
		return newCSR(t, device.key, template)
	}
	ofUsage := func(cert *x509.Certificate) []pkix.Extension {
		return slices.DeleteFunc(slices.Clone(cert.Extensions), func(e pkix.Extension) bool {
			return !e.Id.Equal(keyUsage.Id) && !e.Id.Equal(purposes.Id)
		})
	}
	cert := enroll(t, server, "sen", device, asking(keyUsage, purposes))
	if diff := cmp.Diff([]pkix.Extension{keyUsage, purposes}, ofUsage(cert)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// One alone: the other is the CA's own.
	cert = enroll(t, server, "sen", device, asking(keyUsage))
	if cert.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageKeyAgreement || !slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) {
		t.Errorf("got %v and %v", cert.KeyUsage, cert.ExtKeyUsage)
	}
	setFaults(t, server, "ignore-usage", "drop-san", "subject=CN=other")
	cert = enroll(t, server, "sen", device, asking(keyUsage, purposes))
	if cert.KeyUsage != x509.KeyUsageDigitalSignature || !slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) ||
		cert.Subject.String() != "CN=other" || len(cert.DNSNames) > 0 {
		t.Errorf("got %v and %v for %v, %v", cert.KeyUsage, cert.ExtKeyUsage, cert.Subject, cert.DNSNames)
	}
	for name, wrong := range map[string]pkix.Extension{
		"a CA's":                 {Id: keyUsage.Id, Value: []byte{3, 2, 2, 4}},
		"no bit string":          {Id: keyUsage.Id, Value: []byte{4, 1, 0}},
		"no list of purposes":    {Id: purposes.Id, Value: []byte{4, 1, 0}},
		"empty list of purposes": {Id: purposes.Id, Value: []byte{0x30, 0}},
	} {
		if resp := ask(t, server, post("sen", device, asking(wrong))); resp.Code != codes.BadRequest {
			t.Errorf("%s: got %v, want 4.00", name, resp.Code)
		}
	}
}
