package testserver_test

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

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
		{"drop=1", testserver.Faults{}, "no such fault"},
		{"wrong-key=1", testserver.Faults{}, "takes no value"},
		{"delay", testserver.Faults{}, "invalid duration"},
		{"delay=-1s", testserver.Faults{}, "negative"},
		{"defer=0", testserver.Faults{}, "less than 1"},
		{"defer", testserver.Faults{}, "invalid syntax"},
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
		return err
	}
	for _, test := range []struct {
		fault string
		want  string // part of judge's error
	}{
		{"", ""},
		{"wrong-key", "foreign key"},
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
