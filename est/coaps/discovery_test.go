package coaps_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/internal/coap"
)

// host answers discovery with a document and everything else with its path. It
// notes each request as "METHOD path?query accept".
type host struct {
	discovery coap.Response
	mu        sync.Mutex
	asked     []string
}

func (h *host) handle(_ context.Context, req *coap.Request) *coap.Response {
	note := fmt.Sprintf("%v %s", req.Method, req.Path)
	if len(req.Query) > 0 {
		note += "?" + strings.Join(req.Query, "&")
	}
	if req.Accept != nil {
		note += fmt.Sprintf(" %d", *req.Accept)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked = append(h.asked, note)
	if req.Path == "/.well-known/core" {
		answer := h.discovery
		return &answer
	}
	return &coap.Response{Code: codes.Content, ContentFormat: number(281), Body: []byte(req.Path)}
}

// requests returns what was asked since the last time.
func (h *host) requests() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	asked := h.asked
	h.asked = nil
	return asked
}

func links(text string) coap.Response {
	return coap.Response{Code: codes.Content, ContentFormat: number(40), Body: []byte(text)}
}

// A provisional session asks for cacerts, below the path that every server supports,
// and for nothing else: not for its resources either. It authenticates nobody.
func TestProvisional(t *testing.T) {
	t.Attr("shows", "RFC 7030 §4.1.1 (3)")
	h := &host{discovery: links(`</elsewhere/crts>;rt="ace.est.crts"`)}
	w := newWorld(t, nil, h.handle)
	w.uri.Root = est.DefaultRoot
	cfg := w.config()
	cfg.Trust = newWorld(t, nil, h.handle).trust // of another CA
	if _, err := coaps.Dial(t.Context(), cfg); !errors.Is(err, est.ErrNoAnchor) || !errors.Is(err, est.ErrServerCertificate) {
		t.Fatalf("judged: %v", err)
	}
	cfg.Provisional, cfg.Discovery = true, true
	session, err := coaps.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	for _, operation := range []est.Operation{est.SimpleEnroll, est.SimpleReenroll} {
		if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: operation, Body: []byte("csr")}); !errors.Is(err, est.ErrNotTrusted) {
			t.Errorf("%s: %v", operation, err)
		}
	}
	if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.CACerts}); err != nil {
		t.Error(err)
	}
	if got := h.requests(); !slices.Equal(got, []string{"GET /.well-known/est/crts 281"}) {
		t.Errorf("asked %q", got)
	}
	if session.ClientAuthenticated() || len(session.PeerChain()) == 0 {
		t.Errorf("authenticated %t, chain of %d", session.ClientAuthenticated(), len(session.PeerChain()))
	}
}

// Discovery finds the paths, whatever they are, on this server and no other; what
// it does not find is below /.well-known/est, with a warning (RFC 9148 §4.1).
func TestDiscovery(t *testing.T) {
	t.Attr("shows", "RFC 9148 §4.1 (2)")
	h := new(host)
	w := newWorld(t, nil, h.handle)
	const wellKnown = "/.well-known/est/"
	for _, c := range []struct {
		name     string
		answer   coap.Response
		label    est.Label
		want     []string // the requests for crts, sen and sren: path and Accept
		warnings []string // a part of each
	}{
		{name: "one root", answer: links(`</est/crts>;rt="ace.est.crts";ct="281 287",</est/sen>;rt="ace.est.sen";ct="281 287",</est/sren>;rt="ace.est.sren";ct="281 287"`),
			want: []string{"/est/crts 281", "/est/sen 281", "/est/sren 281"}},
		{name: "paths of their own, without quotes, in any order",
			answer: links("</renew>;ct=287;rt=ace.est.sren,\n</e/plz/sen>;rt=ace.est.sen;ct=281,\n</certs>;rt=ace.est.crts"),
			want:   []string{"/certs 281", "/e/plz/sen 281", "/renew 287"}},
		{name: "one resource of several types, and others beside",
			answer: links(`</>;ct=0,</sensors>;ct=40;rt="sen",</x>;rt="core.x ace.est.sen ace.est.sren";ct="287 0",</y>;rt="ace.est.crts ace.est.att";ct="287 281"`),
			want:   []string{"/y 281", "/x 287", "/x 287"}},
		{name: "absolute and relative references",
			answer: links(fmt.Sprintf(`<coaps://%s/a/crts>;rt=ace.est.crts,<//%s/b/../c/sen>;rt=ace.est.sen,<d/sren>;rt=ace.est.sren`, w.uri.Address(), w.uri.Address())),
			want:   []string{"/a/crts 281", "/c/sen 281", "/d/sren 281"}},
		{name: "without a content-format", answer: coap.Response{Code: codes.Content, Body: []byte(`</a>;rt="ace.est.crts ace.est.sen ace.est.sren"`)},
			want: []string{"/a 281", "/a 281", "/a 281"}},
		{name: "with labels, none asked for",
			answer: links(`</est/a/crts>;rt=ace.est.crts,</est/crts>;rt=ace.est.crts,</est/sen>;rt=ace.est.sen,</est/a/sen>;rt=ace.est.sen,</est/sren>;rt=ace.est.sren`),
			want:   []string{"/est/crts 281", "/est/sen 281", "/est/sren 281"}},
		{name: "with labels, one asked for", label: "a",
			answer: links(`</est/a/crts>;rt=ace.est.crts,</est/crts>;rt=ace.est.crts,</est/sen>;rt=ace.est.sen,</a/est/sen>;rt=ace.est.sen,</est/a>;rt=ace.est.sren,</est/b/sren>;rt=ace.est.sren`),
			want:   []string{"/est/a/crts 281", "/a/est/sen 281", wellKnown + "a/sren 281"}, warnings: []string{`simplereenroll: no link with the label "a": /.well-known/est/a is used`}},
		{name: "two that could be meant",
			answer: links(`</x/crts>;rt=ace.est.crts,</y/crts>;rt=ace.est.crts,</x/sen>;rt=ace.est.sen,</x/sen2>;rt=ace.est.sen,</x/sren>;rt=ace.est.sren`),
			want:   []string{wellKnown + "crts 281", wellKnown + "sen 281", "/x/sren 281"}, warnings: []string{"cacerts: 2 links, and which is meant only a label can tell; simpleenroll: 2 links"}},
		{name: "by less than coaps",
			answer: links(`<coap://127.0.0.1/x>;rt=ace.est.crts,<coap://[::1]:5683/x>;rt=ace.est.sen,<coaps+tcp://127.0.0.1/x>;rt=ace.est.sren,<https://127.0.0.1/x>;rt=ace.est.sren`),
			want:   []string{wellKnown + "crts 281", wellKnown + "sen 281", wellKnown + "sren 281"},
			warnings: []string{`not followed: "coap://127.0.0.1/x" (another scheme than coaps), "coap://[::1]:5683/x" (another scheme than coaps), "coaps+tcp://127.0.0.1/x" (another scheme than coaps), 1 more`,
				"cacerts: no link; simpleenroll: no link; simplereenroll: no link: /.well-known/est is used"}},
		{name: "elsewhere, and here as well",
			answer: links(`<coaps://127.0.0.2:1/crts>;rt=ace.est.crts,</crts>;rt=ace.est.crts,</sen>;rt=ace.est.sen,<coaps://127.0.0.2:1/sen>;rt=ace.est.sen,</sren>;rt=ace.est.sren`),
			want:   []string{"/crts 281", "/sen 281", "/sren 281"}},
		{name: "at two other servers",
			answer: links(`<coaps://127.0.0.2:1/crts>;rt=ace.est.crts,<coaps://127.0.0.3:1/crts>;rt=ace.est.crts,</sen>;rt=ace.est.sen,</sren>;rt=ace.est.sren`),
			want:   []string{wellKnown + "crts 281", "/sen 281", "/sren 281"}, warnings: []string{"cacerts: 2 links, and which is meant only a label can tell"}},
		{name: "at more servers than any has",
			answer:   links(`</crts>;rt=ace.est.crts,</sen>;rt=ace.est.sen,</sren>;rt=ace.est.sren,<coaps://a/x>;rt=ace.est.att,<coaps://b/x>;rt=ace.est.att,<coaps://c/x>;rt=ace.est.att,<coaps://d/x>;rt=ace.est.att,<coaps://e/x>;rt=ace.est.att`),
			want:     []string{"/crts 281", "/sen 281", "/sren 281"},
			warnings: []string{`not followed: "coaps://e/x" (more than 4 other servers)`, "csrattrs: 4 links"}},
		{name: "paths that are none of ours",
			answer:   links(`</est/crts?x>;rt=ace.est.crts,</a%2fb>;rt=ace.est.crts,</a//b>;rt=ace.est.crts,</a>;rt=ace.est.sen,</b>;rt=ace.est.sren`),
			want:     []string{wellKnown + "crts 281", "/a 281", "/b 281"},
			warnings: []string{`"/est/crts?x" (it has a query or a fragment), "/a%2fb" (its path is not one of ours), "/a//b" (its path is not one of ours)`, "cacerts: no link:"}},
		{name: "with a user, a fragment, and no reference at all",
			answer:   links(fmt.Sprintf(`<coaps://u@%s/x>;rt=ace.est.crts,</a#b>;rt=ace.est.crts,<%%zz>;rt=ace.est.crts,</a>;rt=ace.est.sen,</b>;rt=ace.est.sren`, w.uri.Address())),
			want:     []string{wellKnown + "crts 281", "/a 281", "/b 281"},
			warnings: []string{`(it names a user), "/a#b" (it has a query or a fragment), "%zz" (not a URI reference)`, "cacerts: no link:"}},
		{name: "about another resource",
			answer: links(`</a>;rt=ace.est.crts;anchor="coaps://other.example/",</b>;rt="ace.est.crts ace.est.sen ace.est.sren"`),
			want:   []string{"/b 281", "/b 281", "/b 281"}, warnings: []string{"not followed"}},
		{name: "a target without an end", answer: links("</a"), warnings: []string{"link format: link 1: no '>': /.well-known/est is used"}},
		{name: "nothing", answer: links(""), warnings: []string{"no link"}},
		{name: "4.04", answer: coap.Response{Code: codes.NotFound, Body: []byte("no \x1b[31msuch")}, warnings: []string{`4.04 NotFound: "no .[31msuch": /.well-known/est is used`}},
		{name: "5.03", answer: coap.Response{Code: codes.ServiceUnavailable}, warnings: []string{"5.03 ServiceUnavailable"}},
		{name: "another format", answer: coap.Response{Code: codes.Content, ContentFormat: number(0), Body: []byte("</a>")}, warnings: []string{"content-format 0, want 40"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h.mu.Lock()
			h.discovery = c.answer
			h.mu.Unlock()
			var warnings []string
			cfg := w.config()
			cfg.URI.Root, cfg.Discovery, cfg.Label = est.DefaultRoot, true, c.label
			cfg.Warn = func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) }
			session, err := coaps.Dial(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer session.Close()
			if c.want == nil {
				c.want = []string{wellKnown + "crts 281", wellKnown + "sen 281", wellKnown + "sren 281"}
			}
			want := []string{"GET /.well-known/core?rt=ace.est*", "GET " + c.want[0], "POST " + c.want[1], "POST " + c.want[2]}
			for _, operation := range []est.Operation{est.CACerts, est.SimpleEnroll, est.SimpleReenroll} {
				if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: operation}); err != nil {
					t.Error(err)
				}
			}
			if diff := cmp.Diff(want, h.requests()); diff != "" {
				t.Errorf("requests (-want +got)\n%s", diff)
			}
			if !slices.EqualFunc(c.warnings, warnings, func(part, whole string) bool {
				return strings.HasPrefix(whole, "discovery at "+w.uri.String()[:len(w.uri.String())-len("/est")]+"/.well-known/core: ") && strings.Contains(whole, part)
			}) {
				t.Errorf("warnings: got %q, want %q", warnings, c.warnings)
			}
		})
	}
}

// Where a link leads: to this server, whose name may be in any case, its address
// written in any way, the default port said or not; to another one; or nowhere.
func TestDiscoveryOrigin(t *testing.T) {
	for _, c := range []struct{ server, target, want string }{
		{"coaps://est.example", "coaps://est.example/x", "coaps://est.example:5684/x"},
		{"coaps://est.example", "coaps://EST.example:5684/x", "coaps://est.example:5684/x"},
		{"coaps://est.example", "COAPS://est.example/x", "coaps://est.example:5684/x"},
		{"coaps://est.example", "coaps://est.example:5685/x", "coaps://est.example:5685/x"},
		{"coaps://est.example:5685", "coaps://est.example/x", "coaps://est.example:5684/x"},
		{"coaps://est.example:5685", "//est.example:5685/x", "coaps://est.example:5685/x"},
		{"coaps://est.example", "//other.example/x", "coaps://other.example:5684/x"},
		{"coaps://est.example", "coaps://est.example./x", ""},
		{"coaps://[2001:db8::1]", "coaps://[2001:db8:0:0::1]/x", "coaps://[2001:db8::1]:5684/x"},
		{"coaps://[2001:db8::1]", "x", "coaps://[2001:db8::1]:5684/x"},
		{"coaps://[2001:db8::1]", "coaps://[2001:db8::2]/x", "coaps://[2001:db8::2]:5684/x"},
		{"coaps://[2001:db8::1]", "coaps://[2001:db8:3::123]:61617/est/crts", "coaps://[2001:db8:3::123]:61617/est/crts"},
		{"coaps://[2001:db8::1]", "coaps://[fe80::1%25eth0]/x", ""},
		{"coaps://[2001:db8::1]", "coaps://2001:db8::2/x", ""},
		{"coaps://est.example", "coaps://other.example:0/x", ""},
		{"coaps://est.example", "coaps:///x", ""},
		{"coaps://est.example", "coap://est.example/x", ""},
		{"coaps://est.example", "x", "coaps://est.example:5684/x"},
		{"coaps://est.example", "coaps:x", ""},
		{"coaps://est.example", "", ""},
		{"coaps://est.example", "/" + strings.Repeat("x/", 600) + "x", ""},
	} {
		uri, err := est.ParseURI(c.server)
		if err != nil {
			t.Fatal(err)
		}
		found, ignored := coaps.Candidates(uri, []est.Link{{Target: c.target, Parameters: []est.LinkParameter{{Name: "rt", Value: "ace.est.crts"}}}})
		var got string
		if len(found) > 0 {
			got = found[0].String()
		}
		if got != c.want || (got == "") != (len(ignored) == 1) {
			t.Errorf("%.60s at %s: got %q, want %q, ignored %q", c.target, c.server, got, c.want, ignored)
		}
	}
}

// A link to another port (RFC 9148 §4.1) is followed to a server that the same anchors
// judge, by the host of the link: one session with it, whatever is there, which
// authenticates us and ends with the one that led to it.
func TestDiscoveryElsewhere(t *testing.T) {
	t.Attr("shows", "RFC 9148 §4.1 (2)")
	here, there := new(host), new(host)
	w := newWorld(t, nil, here.handle)
	var handshakes atomic.Int32
	other, _ := w.serve(t, coap.Config{Verify: func([]*x509.Certificate) error { handshakes.Add(1); return nil }}, there.handle, net.IPv4(127, 0, 0, 1))
	here.discovery = links(fmt.Sprintf(`</c>;rt=ace.est.crts,<coaps://%s/s>;rt="ace.est.sen ace.est.sren";ct=287,<//%[1]s/a>;rt=ace.est.att`, other.Address()))
	cfg := w.config()
	cfg.URI.Root, cfg.Discovery = est.DefaultRoot, true
	cfg.Warn = func(format string, args ...any) { t.Errorf("warning: "+format, args...) }
	session, err := coaps.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, operation := range []est.Operation{est.CACerts, est.SimpleEnroll, est.SimpleReenroll, est.SimpleEnroll} {
		if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: operation}); err != nil {
			t.Errorf("%s: %v", operation, err)
		}
	}
	if diff := cmp.Diff([]string{"GET /.well-known/core?rt=ace.est*", "GET /c 281"}, here.requests()); diff != "" {
		t.Errorf("here (-want +got)\n%s", diff)
	}
	if diff := cmp.Diff([]string{"POST /s 287", "POST /s 287", "POST /s 287"}, there.requests()); diff != "" {
		t.Errorf("there (-want +got)\n%s", diff)
	}
	if other, err := session.For(t.Context(), est.CACerts, w.trust); err != nil || other != nil {
		t.Errorf("cacerts: %v, %v", other, err)
	}
	carrier, err := session.For(t.Context(), est.SimpleEnroll, w.trust)
	if err != nil || carrier == nil || !carrier.(est.ClientAuthenticator).ClientAuthenticated() || carrier.PeerChain()[0].Equal(session.PeerChain()[0]) {
		t.Errorf("simpleenroll: %v, %v", carrier, err)
	}
	if one, _ := session.ChannelBinding(); carrier != nil {
		if two, err := carrier.ChannelBinding(); err != nil || len(two) != 12 || string(one) == string(two) {
			t.Errorf("bindings %x and %x, %v", one, two, err)
		}
	}
	// The anchors have changed since, as with cacerts: they judge it again.
	stranger := newWorld(t, nil, here.handle).trust
	if _, err := session.For(t.Context(), est.SimpleEnroll, stranger); !errors.Is(err, est.ErrServerCertificate) || !errors.Is(err, est.ErrNotTrusted) {
		t.Errorf("judged by other anchors: %v", err)
	}
	if got := handshakes.Load(); got != 1 {
		t.Errorf("%d handshakes there, want 1", got)
	}
	if err := session.Close(); err != nil {
		t.Error(err)
	}
	if _, err := carrier.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll}); !errors.Is(err, est.ErrUnreachable) {
		t.Errorf("closed: %v", err)
	}
}

// The server of a link is held to what the one that named it is held to: its
// certificate is for the host of the link, and the anchors lead to it. Else nothing is
// sent there, and nothing in its place to the first one.
func TestDiscoveryElsewhereRefused(t *testing.T) {
	here, there := new(host), new(host)
	w, stranger := newWorld(t, nil, here.handle), newWorld(t, nil, there.handle)
	misnamed, _ := w.serve(t, coap.Config{}, there.handle, net.IPv4(127, 0, 0, 1))
	misnamed.Host = "127.0.0.2" // another loopback address, where it does not listen
	unnamed, _ := w.serve(t, coap.Config{}, there.handle, net.IPv6loopback, net.IPv4(127, 0, 0, 1))
	for _, c := range []struct {
		name string
		at   string
		want []error
	}{
		{"under another CA", stranger.uri.Address(), []error{est.ErrServerCertificate, est.ErrNoAnchor}},
		{"for another host", fmt.Sprintf("localhost:%d", w.uri.Port), []error{est.ErrServerCertificate, est.ErrNotTrusted}},
		{"not there", misnamed.Address(), []error{est.ErrUnreachable}},
		{"at its IPv6 address", unnamed.Address(), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			here.mu.Lock()
			here.discovery = links(fmt.Sprintf(`</c>;rt=ace.est.crts,<coaps://%s/s>;rt="ace.est.sen ace.est.sren"`, c.at))
			here.mu.Unlock()
			cfg := w.config()
			cfg.URI.Root, cfg.Discovery = est.DefaultRoot, true
			session, err := coaps.Dial(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer session.Close()
			here.requests()
			_, err = session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll, Body: []byte("csr")})
			for _, want := range c.want {
				if !errors.Is(err, want) {
					t.Errorf("got %v, want %v", err, want)
				}
			}
			if (err == nil) != (c.want == nil) || len(there.requests()) != 1-min(len(c.want), 1) || len(here.requests()) > 0 {
				t.Errorf("got %v, and a request", err)
			}
		})
	}
}

// A provisional session is told where cacerts is by the stranger itself, and is led to
// nobody else: a device that slept while the CA changed has no other way to a server
// whose only root is a discovered one.
func TestDiscoveryProvisional(t *testing.T) {
	asked := make(chan string, 8)
	handler := func(_ context.Context, req *coap.Request) *coap.Response {
		asked <- req.Path
		switch req.Path {
		case "/.well-known/core":
			answer := links(`<coaps://127.0.0.1:1/crts>;rt=ace.est.crts,</odd/crts>;rt=ace.est.crts,</odd/sen>;rt=ace.est.sen,</odd/sren>;rt=ace.est.sren`)
			return &answer
		case "/odd/crts":
			return &coap.Response{Code: codes.Content, ContentFormat: number(281), Body: []byte("roots")}
		}
		return &coap.Response{Code: codes.NotFound}
	}
	w := newWorld(t, nil, handler)
	var warnings []string
	cfg := w.config()
	cfg.URI.Root, cfg.Discovery, cfg.Provisional = est.DefaultRoot, true, true
	cfg.Warn = func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) }
	session, err := coaps.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	response, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.CACerts})
	if err != nil || string(response.Body) != "roots" {
		t.Errorf("got %v, %v", response, err)
	}
	if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.SimpleEnroll}); !errors.Is(err, est.ErrNotTrusted) {
		t.Errorf("simpleenroll: %v", err)
	}
	for _, want := range []string{"/.well-known/est/crts", "/.well-known/core", "/odd/crts"} {
		if got := <-asked; got != want {
			t.Errorf("asked %s, want %s", got, want)
		}
	}
	if len(asked) > 0 {
		t.Errorf("asked %s too", <-asked)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], `"coaps://127.0.0.1:1/crts" (another host or port)`) {
		t.Errorf("warnings: %q", warnings)
	}
}

// Without discovery nothing is asked that was not asked for; a label is a segment
// after the root, and the error names the resource.
func TestLabel(t *testing.T) {
	h := new(host)
	w := newWorld(t, nil, h.handle)
	cfg := w.config()
	cfg.URI.Root, cfg.Label = est.DefaultRoot, "tls-ca"
	session, err := coaps.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	if _, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.CACerts}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"GET /.well-known/est/tls-ca/crts 281"}, h.requests()); diff != "" {
		t.Errorf("requests (-want +got)\n%s", diff)
	}
	if got, want := w.uri.WithLabel("x").Root, "/est/x"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := w.uri.WithLabel(""); got != w.uri {
		t.Errorf("no label: got %s", got)
	}
}

// A document of many blocks is one answer.
func TestDiscoveryInBlocks(t *testing.T) {
	h := &host{discovery: links(strings.Repeat("</filler/0123456789>;rt=other,\n", 40) + `</late>;rt="ace.est.crts ace.est.sen ace.est.sren"`)}
	w := newWorld(t, nil, h.handle)
	cfg := w.config()
	cfg.Discovery, cfg.BlockSize = true, 16
	cfg.Warn = func(format string, args ...any) { t.Errorf("warning: "+format, args...) }
	session, err := coaps.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	response, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.CACerts})
	if err != nil || string(response.Body) != "/late" {
		t.Errorf("got %v, %v", response, err)
	}
}

// A server that is silent about its resources is asked at the default root; one
// that ends, or a caller that gives up, is no session.
func TestDiscoveryUnanswered(t *testing.T) {
	asked, closed, ended := make(chan struct{}, 1), make(chan struct{}, 3), make(chan struct{})
	w := newWorld(t, nil, func(ctx context.Context, req *coap.Request) *coap.Response {
		if req.Path != "/.well-known/core" {
			return &coap.Response{Code: codes.Content, ContentFormat: number(281), Body: []byte(req.Path)}
		}
		asked <- struct{}{}
		select {
		case <-ctx.Done(): // with the connection
			closed <- struct{}{}
		case <-ended:
		}
		return &coap.Response{Code: codes.NotFound}
	})
	t.Cleanup(func() { close(ended) })
	cfg := w.config()
	cfg.URI.Root, cfg.Discovery = est.DefaultRoot, true
	t.Run("silence", func(t *testing.T) {
		var warnings []string
		cfg := cfg
		cfg.ExchangeTimeout = 300 * time.Millisecond
		cfg.Warn = func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) }
		session, err := coaps.Dial(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		<-asked
		response, err := session.RoundTrip(t.Context(), &est.Request{Operation: est.CACerts})
		if err != nil || string(response.Body) != "/.well-known/est/crts" {
			t.Errorf("got %v, %v", response, err)
		}
		if len(warnings) != 1 || !strings.Contains(warnings[0], "no answer") {
			t.Errorf("warnings %q", warnings)
		}
		if err := session.Close(); err != nil {
			t.Error(err)
		}
		<-closed
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-asked; cancel() }()
		if _, err := coaps.Dial(ctx, cfg); !errors.Is(err, context.Canceled) || errors.Is(err, est.ErrUnreachable) {
			t.Errorf("got %v, want context.Canceled", err)
		}
		<-closed // what is no session does not stay open
	})
	t.Run("the server ends", func(t *testing.T) {
		go func() { <-asked; w.stop() }()
		if _, err := coaps.Dial(t.Context(), cfg); !errors.Is(err, est.ErrUnreachable) {
			t.Errorf("got %v, want ErrUnreachable", err)
		}
	})
}

// Whatever a server lists: what is taken of it is a URI as an operator could give it, and what is said of it cannot steer a terminal.
func FuzzDiscovery(f *testing.F) {
	for _, seed := range []string{
		`</est/crts>;rt="ace.est.crts",<coaps://est.example:5684/a>;rt="ace.est.sen",<a/../b>;rt=ace.est.sren`, `<//est.example/x>;rt=ace.est.crts`,
		`<coaps://[2001:db8::2]:61617/est/crts>;rt=ace.est.crts,<//other.example/x>;rt=ace.est.sen,<coaps://[fe80::1%25eth0]/x>;rt=ace.est.att`,
		`</a%2fb>;rt=ace.est.crts`, `<coap://[::1]/x>;rt=ace.est.crts;ct=287`, `<?x>;rt=ace.est.crts`,
	} {
		f.Add([]byte(seed))
	}
	uri, err := est.ParseURI("coaps://est.example")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, document []byte) {
		links, err := est.ParseLinks(document)
		if err != nil {
			return
		}
		found, ignored := coaps.Candidates(uri, links)
		for _, whole := range found {
			if again, err := est.ParseURI(whole.String()); err != nil || again != whole || whole.Scheme != est.SchemeCoAPs {
				t.Errorf("%q: %s parses to %v, %v", document, whole, again, err)
			}
		}
		for _, text := range ignored {
			if len(text) > 512 || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("ignored: %q", text)
			}
		}
	})
}

// CSR attributes are asked for at their link, and below the URI's path without
// discovery; where discovery lists none the server is not asked.
func TestDiscoveryOfAttributes(t *testing.T) {
	const usual = `</c>;rt=ace.est.crts,</s>;rt=ace.est.sen,</r>;rt=ace.est.sren`
	for _, c := range []struct {
		name   string
		answer string // "" is no discovery
		want   []string
	}{
		{"without discovery", "", []string{"GET /.well-known/est/att 285"}},
		{"listed", usual + `,</elsewhere/att>;rt=ace.est.att;ct=285`, []string{"GET /elsewhere/att 285"}},
		{"not listed", usual, nil},
		{"listed twice", usual + `,</x/att>;rt=ace.est.att,</y/att>;rt=ace.est.att`, []string{"GET /.well-known/est/att 285"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := &host{discovery: links(c.answer)}
			w := newWorld(t, nil, h.handle)
			cfg := w.config()
			cfg.URI.Root, cfg.Discovery = est.DefaultRoot, c.answer != ""
			session, err := coaps.Dial(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer session.Close()
			h.requests()
			_, err = session.RoundTrip(t.Context(), &est.Request{Operation: est.CSRAttrs})
			var status *est.StatusError
			if absent := errors.As(err, &status) && status.NotFound; absent != (c.want == nil) {
				t.Errorf("got %v", err)
			}
			if diff := cmp.Diff(c.want, h.requests()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// A key is asked for with the certificate in a PKCS#7 (skg), or where there is that
// alone with the certificate as it is (skc), for the multipart of either (RFC 9148 §4.8).
func TestDiscoveryOfServerKeyGen(t *testing.T) {
	t.Attr("shows", "RFC 9148 §4.1 (1)")
	const usual = `</c>;rt=ace.est.crts,</s>;rt=ace.est.sen,</r>;rt=ace.est.sren`
	for _, c := range []struct {
		name   string
		answer string // "" is no discovery
		want   []string
	}{
		{"without discovery", "", []string{"POST /.well-known/est/skg 62"}},
		{"both are listed", usual + `,</x/skc>;rt=ace.est.skc;ct=62,</x/skg>;rt=ace.est.skg;ct=62`, []string{"POST /x/skg 62"}},
		{"skc alone is listed", usual + `,</x/skc>;rt=ace.est.skc;ct=62`, []string{"POST /x/skc 62"}},
		{"neither is", usual, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := &host{discovery: links(c.answer)}
			w := newWorld(t, nil, h.handle)
			cfg := w.config()
			cfg.URI.Root, cfg.Discovery = est.DefaultRoot, c.answer != ""
			session, err := coaps.Dial(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer session.Close()
			h.requests()
			_, err = (&est.Client{Session: session}).ServerKeyGen(t.Context(), []byte("csr"))
			var status *est.StatusError
			if absent := errors.As(err, &status) && status.NotFound; absent != (c.want == nil) {
				t.Errorf("got %v", err)
			}
			if diff := cmp.Diff(c.want, h.requests()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}
