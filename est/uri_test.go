package est_test

import (
	"strings"
	"testing"

	"estenroll/est"
)

func TestParseURI(t *testing.T) {
	t.Attr("shows", "RFC 7030 §3.3 (2)")
	for _, c := range []struct{ in, want, address string }{
		{"coaps://est.example", "coaps://est.example:5684/.well-known/est", "est.example:5684"},
		{"coaps://est.example/", "coaps://est.example:5684/.well-known/est", "est.example:5684"},
		{"COAPS://est.example:61616", "coaps://est.example:61616/.well-known/est", "est.example:61616"},
		{"coaps://192.0.2.1/est", "coaps://192.0.2.1:5684/est", "192.0.2.1:5684"},
		{"https://est.example", "https://est.example:443/.well-known/est", "est.example:443"},
		{"HTTPS://est.example:8443/est/", "https://est.example:8443/est", "est.example:8443"},
		{"coaps://[2001:db8::1]:5685/.well-known/est/label/", "coaps://[2001:db8::1]:5685/.well-known/est/label", "[2001:db8::1]:5685"},
	} {
		u, err := est.ParseURI(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		if got := u.String(); got != c.want {
			t.Errorf("%s: got %s, want %s", c.in, got, c.want)
		}
		if got := u.Address(); got != c.address {
			t.Errorf("%s: got %s, want %s", c.in, got, c.address)
		}
	}
	for _, in := range []string{
		"", "est.example", "http://est.example", "coap://est.example", "https:est.example", "https://user@est.example", "coaps:est.example", "coaps://", "coaps:///est", "coaps://user@est.example",
		"coaps://est.example?x", "coaps://est.example?", "coaps://est.example#x", "coaps://est.example#", "coaps://est.example:0", "coaps://est.example:",
		"coaps://est.example:65536", "coaps://est.example:x", "coaps://est example", "coaps://est..example", "coaps://-est.example", "coaps://[fe80::1%25eth0]",
		"coaps://::1:5684", "coaps://2001:db8::1:5684", "https://2001:db8::1",
		"coaps://est.example/a//b", "coaps://est.example/a/../b", "coaps://est.example/a%2Fb", "coaps://est.example/a%25", "coaps://est.example/ü",
		"coaps://est.example/" + strings.Repeat("a", 256), "coaps://est.example/" + strings.Repeat("a/", 600), "coaps://est.example/%zz", "//", "coaps://est.example//",
	} {
		if u, err := est.ParseURI(in); err == nil || !strings.HasPrefix(err.Error(), "EST server URI: ") {
			t.Errorf("%q: got %v, %v, want an error", in, u, err)
		}
	}
}

// What is parsed prints as a URI that parses to the same.
func FuzzParseURI(f *testing.F) {
	for _, seed := range []string{"coaps://est.example", "https://est.example/a", "coaps://[2001:db8::1]:5685/est", "coaps://192.0.2.1/a/b/", "coaps://a%41/x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := est.ParseURI(s)
		if err != nil {
			return
		}
		if again, err := est.ParseURI(u.String()); err != nil || again != u {
			t.Errorf("%q prints as %q, which parses to %+v, %v, want %+v", s, u, again, err, u)
		}
	})
}
