package testserver_test

import (
	"crypto/x509"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
	"estenroll/testserver"
)

// The links are frozen here: clients of others discover by them too (RFC 9148 §4.1).
func TestDiscovery(t *testing.T) {
	t.Parallel()
	plain := start(t, testserver.Config{})
	labelled := start(t, testserver.Config{Labels: []string{"door"}, SingleCA: true})
	const (
		crts  = `</e/plz/crts>;rt="ace.est.crts";ct=281`
		sen   = `</e/plz/sen>;rt="ace.est.sen";ct="281 287"`
		sren  = `</e/plz/sren>;rt="ace.est.sren";ct="281 287"`
		door  = `</e/plz/door/crts>;rt="ace.est.crts";ct="281 287"`
		links = 40
	)
	for _, test := range []struct {
		name   string
		server *testserver.Server
		query  []string
		want   string
	}{
		{"no filter", plain, nil, crts + "," + sen + "," + sren},
		{"the filter of RFC 9148", plain, []string{"rt=ace.est*"}, crts + "," + sen + "," + sren},
		{"one type", plain, []string{"rt=ace.est.sen"}, sen},
		{"a prefix", plain, []string{"rt=ace.est.s*"}, sen + "," + sren},
		{"a prefix without the star", plain, []string{"rt=ace.est"}, ""},
		{"one of two formats", plain, []string{"ct=287"}, sen + "," + sren},
		{"the target", plain, []string{"href=/e/plz/c*"}, crts},
		{"two filters", plain, []string{"rt=ace.est*", "href=/e/plz/sren"}, sren},
		{"an unknown attribute", plain, []string{"if=*"}, ""},
		{"a single CA and a label", labelled, []string{"rt=ace.est.crts"}, strings.Replace(crts, "281", `"281 287"`, 1) + "," + door},
	} {
		t.Run(test.name, func(t *testing.T) {
			resp := ask(t, test.server, &coap.Request{Method: codes.GET, Path: "/.well-known/core", Query: test.query})
			if resp.Code != codes.Content || resp.ContentFormat == nil || *resp.ContentFormat != links {
				t.Errorf("got %v, format %v", resp.Code, resp.ContentFormat)
			}
			if diff := cmp.Diff(test.want, string(resp.Body)); diff != "" {
				t.Errorf("links (-want +got):\n%s", diff)
			}
		})
	}
	for _, test := range []struct {
		name   string
		fault  string
		method codes.Code
		accept uint16
		want   codes.Code
		body   string
	}{
		{"links accepted", "", codes.GET, links, codes.Content, crts + "," + sen + "," + sren},
		{"another format", "", codes.GET, 50, codes.NotAcceptable, "offered is 40"},
		{"another method", "", codes.POST, links, codes.MethodNotAllowed, "discovery is GET"},
		{"no-discovery", "no-discovery", codes.GET, links, codes.NotFound, "no such resource"},
		{"links=…", "links=</x>", codes.GET, links, codes.Content, "</x>"},
	} {
		t.Run(test.name, func(t *testing.T) {
			setFaults(t, plain, strings.Fields(test.fault)...)
			resp := ask(t, plain, &coap.Request{Method: test.method, Path: "/.well-known/core", Accept: &test.accept})
			if resp.Code != test.want || string(resp.Body) != test.body {
				t.Errorf("got %v %q, want %v %q", resp.Code, resp.Body, test.want, test.body)
			}
		})
	}
}

func setFaults(t *testing.T, server *testserver.Server, texts ...string) {
	t.Helper()
	faults, err := testserver.ParseFaults(texts)
	if err != nil {
		t.Fatal(err)
	}
	if err := server.SetFaults(faults); err != nil {
		t.Fatal(err)
	}
}

// Every root has the same resources; the record says which one was used.
func TestRoots(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{Labels: []string{"door", "roof-2"}})
	device := idevid(t, server, "dev")
	var want []string
	for _, root := range []string{"/.well-known/est", "/.well-known/est/door", "/.well-known/est/roof-2", "/e/plz", "/e/plz/door", "/e/plz/roof-2"} {
		req := post("", device, newCSR(t, device.key, named("dev")))
		req.Path = root + "/sen"
		if resp := ask(t, server, req); resp.Code != codes.Changed {
			t.Errorf("%s: got %v", req.Path, resp.Code)
		}
		want = append(want, req.Path)
	}
	var got []string
	for _, event := range server.Issuances() {
		got = append(got, event.Path)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("paths in the record (-want +got):\n%s", diff)
	}
	for _, path := range []string{"/est/crts", "/.well-known/est", "/.well-known/est/", "/.well-known/est/floor/crts", "/.well-known/est/door/roof-2/crts", "/e/crts", "/.well-known/est/cacerts"} {
		if resp := ask(t, server, &coap.Request{Method: codes.GET, Path: path, Peer: []*x509.Certificate{device.cert}}); resp.Code != codes.NotFound {
			t.Errorf("%s: got %v, want 4.04", path, resp.Code)
		}
	}
}
