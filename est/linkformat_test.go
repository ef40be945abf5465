package est_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"estenroll/est"
)

func TestParseLinks(t *testing.T) {
	for _, c := range []struct {
		name, in string
		want     []est.Link
	}{
		{name: "none"},
		{name: "white space alone", in: " \r\n"},
		{"as RFC 9148 §4.1 has it", "</est/crts>;rt=\"ace.est.crts\";ct=\"281 287\",\n</est/sen>;rt=\"ace.est.sen\";ct=\"281 287\",\r\n\t</est/att>;rt=\"ace.est.att\";ct=285\n", []est.Link{
			{Target: "/est/crts", Parameters: []est.LinkParameter{{Name: "rt", Value: "ace.est.crts"}, {Name: "ct", Value: "281 287"}}},
			{Target: "/est/sen", Parameters: []est.LinkParameter{{Name: "rt", Value: "ace.est.sen"}, {Name: "ct", Value: "281 287"}}},
			{Target: "/est/att", Parameters: []est.LinkParameter{{Name: "rt", Value: "ace.est.att"}, {Name: "ct", Value: "285"}}},
		}},
		// Frozen from coap-server-openssl of libcoap 4.3.1: GET /.well-known/core.
		{"as libcoap has it", `</>;title="General Info";ct=0,</time>;if="clock";rt="ticks";title="Internal Clock";ct=0;obs,</async>;ct=0,</example_data>;title="Example Data";ct=0;obs`, []est.Link{
			{Target: "/", Parameters: []est.LinkParameter{{Name: "title", Value: "General Info"}, {Name: "ct", Value: "0"}}},
			{Target: "/time", Parameters: []est.LinkParameter{{Name: "if", Value: "clock"}, {Name: "rt", Value: "ticks"}, {Name: "title", Value: "Internal Clock"}, {Name: "ct", Value: "0"}, {Name: "obs"}}},
			{Target: "/async", Parameters: []est.LinkParameter{{Name: "ct", Value: "0"}}},
			{Target: "/example_data", Parameters: []est.LinkParameter{{Name: "title", Value: "Example Data"}, {Name: "ct", Value: "0"}, {Name: "obs"}}},
		}},
		{"another host", "<coaps://[2001:db8::3]:61617/est/crts>;rt=ace.est.crts;ct=281", []est.Link{
			{Target: "coaps://[2001:db8::3]:61617/est/crts", Parameters: []est.LinkParameter{{Name: "rt", Value: "ace.est.crts"}, {Name: "ct", Value: "281"}}},
		}},
		{"a parameter without a value, one that is empty", `</a>;obs;x=""`, []est.Link{
			{Target: "/a", Parameters: []est.LinkParameter{{Name: "obs"}, {Name: "x"}}},
		}},
		{"separators and escapes in quotes", `</a>;title="a,b;c=\"d\" <e> \\ ü"`, []est.Link{
			{Target: "/a", Parameters: []est.LinkParameter{{Name: "title", Value: `a,b;c="d" <e> \ ü`}}},
		}},
		{"an extended value", `</a>;title*=UTF-8''%c3%bc`, []est.Link{
			{Target: "/a", Parameters: []est.LinkParameter{{Name: "title*", Value: "UTF-8''%c3%bc"}}},
		}},
		{"spaces around the parts", `</a> ; rt = "x" , </b>`, []est.Link{
			{Target: "/a", Parameters: []est.LinkParameter{{Name: "rt", Value: "x"}}}, {Target: "/b"},
		}},
		{"an empty target", "<>", []est.Link{{}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := est.ParseLinks([]byte(c.in))
			if diff := cmp.Diff(c.want, got); err != nil || diff != "" {
				t.Errorf("%v (-want +got)\n%s", err, diff)
			}
		})
	}
	for name, in := range map[string]string{
		"no link":                     "hello",
		"no end of a target":          "</a",
		"a space in a target":         "</a b>",
		"a control character in one":  "</a\x1b[31m>",
		"a target that is not ASCII":  "</ü>",
		"a link in a link":            "</a</b>>",
		"a comma too many":            "</a>,",
		"a comma too many inside":     "</a>,,</b>",
		"no comma":                    "</a></b>",
		"no parameter":                "</a>;",
		"no name":                     "</a>;=x",
		"no value":                    "</a>;rt=",
		"no value, then another":      "</a>;rt=;ct=1",
		"a list without quotes":       "</a>;ct=281 287",
		"no closing quote":            `</a>;rt="x`,
		"an escape at the end":        `</a>;rt="x\`,
		"a control character":         "</a>;rt=\"x\x1b[31m\"",
		"an escaped one":              "</a>;rt=\"\\\n\"",
		"not UTF-8":                   "</a>;rt=\"\xff\"",
		"a NUL after the end":         "</a>\x00",
		"too many links":              strings.Repeat("</a>,", 512) + "</a>",
		"too many parameters":         "</a>" + strings.Repeat(";x", 33),
		"too many bytes":              "</a>;x=" + strings.Repeat("y", 64<<10),
		"a name that is no parameter": "</a>;a b=c",
	} {
		t.Run(name, func(t *testing.T) {
			if links, err := est.ParseLinks([]byte(in)); err == nil || !strings.HasPrefix(err.Error(), "link format: ") {
				t.Errorf("got %d links, %v, want an error", len(links), err)
			}
		})
	}
	t.Run("as many as there may be", func(t *testing.T) {
		links, err := est.ParseLinks([]byte(strings.Repeat("</a>"+strings.Repeat(";x", 32)+",", 511) + "</a>"))
		if err != nil || len(links) != 512 || len(links[0].Parameters) != 32 {
			t.Errorf("got %d links, %v", len(links), err)
		}
	})
}

func TestLinkWords(t *testing.T) {
	links, err := est.ParseLinks([]byte(`</a>;RT="ace.est.crts  ace.est.sen";rt=other;ct`))
	if err != nil {
		t.Fatal(err)
	}
	if got := links[0].Words("rt"); !slices.Equal(got, []string{"ace.est.crts", "ace.est.sen"}) {
		t.Errorf("rt: got %q", got)
	}
	for name, has := range map[string]bool{"ct": true, "anchor": false} {
		if got := links[0].Words(name); len(got) != 0 || links[0].Has(name) != has {
			t.Errorf("%s: got %q, has %t", name, got, links[0].Has(name))
		}
	}
}

// formatLinks is the reverse of ParseLinks: a value without characters of its
// own is written without quotes.
func formatLinks(links []est.Link) []byte {
	var out strings.Builder
	for i, link := range links {
		if i > 0 {
			out.WriteByte(',')
		}
		fmt.Fprintf(&out, "<%s>", link.Target)
		for _, p := range link.Parameters {
			fmt.Fprintf(&out, `;%s="%s"`, p.Name, strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(p.Value))
		}
	}
	return []byte(out.String())
}

// What is parsed is formatted and parsed to the same, is no larger than what
// came, and cannot steer a terminal.
func FuzzParseLinks(f *testing.F) {
	for _, seed := range []string{
		`</est/crts>;rt="ace.est.crts";ct="281 287",` + "\n" + `</est/sen>;rt=ace.est.sen;ct=281`,
		`<coaps://[2001:db8::3]:61617/est/sren>;rt="ace.est.sren x" ; obs`, `</a>;title="a,b;c=\"d\"\\";x*=UTF-8''%c3`, `<>`, ``,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, document []byte) {
		links, err := est.ParseLinks(document)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "link format: ") || strings.ContainsFunc(err.Error(), unicode.IsControl) {
				t.Errorf("error %q", err)
			}
			return
		}
		size := 0
		for _, link := range links {
			texts := []string{link.Target}
			for _, p := range link.Parameters {
				texts = append(texts, p.Name, p.Value)
			}
			for _, text := range texts {
				if size += len(text); strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) {
					t.Errorf("a control character in %q", text)
				}
			}
		}
		if size > len(document) || len(links) > 512 {
			t.Errorf("%d bytes in %d links of %d bytes", size, len(links), len(document))
		}
		formatted := formatLinks(links)
		if len(formatted) > 64<<10 {
			return // quotes and escapes are longer
		}
		again, err := est.ParseLinks(formatted)
		if diff := cmp.Diff(links, again); err != nil || diff != "" {
			t.Errorf("%q, again %q: %v (-want +got)\n%s", document, formatted, err, diff)
		}
	})
}

func TestParseLabel(t *testing.T) {
	t.Attr("shows", "RFC 7030 §3.2.2 (1)")
	for _, in := range []string{"a", "tls-ca", "v1.2~x", "CRTS", "a:b@c;d=e,f", strings.Repeat("a", 255)} {
		if label, err := est.ParseLabel(in); err != nil || string(label) != in {
			t.Errorf("%q: got %q, %v", in, label, err)
		}
	}
	for _, in := range []string{
		"", ".", "..", "a/b", "/", "a b", "a%20b", "a?b", "a#b", "ü", "a\x1b", "a\x00", "a\"b", "a\\b", "<a>", strings.Repeat("a", 256),
		"cacerts", "simpleenroll", "simplereenroll", "fullcmc", "serverkeygen", "csrattrs", "crts", "sen", "sren", "skg", "skc", "att",
	} {
		if label, err := est.ParseLabel(in); err == nil || !strings.HasPrefix(err.Error(), "label: ") {
			t.Errorf("%q: got %q, %v, want an error", in, label, err)
		}
	}
}
