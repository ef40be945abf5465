package pkcs11

// An internal test: the form with the PIN, which the round trip needs, is not exported.

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"estenroll/engine"
)

func mustParse(t *testing.T, s string) URI {
	t.Helper()
	u, err := ParseURI(s)
	if err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	return u
}

func TestParseURI(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, in, canonical, withPIN string }{
		{"nothing", "pkcs11:", "pkcs11:", ""},
		{"empty query", "pkcs11:token=a?", "pkcs11:token=a", ""},
		{"scheme in any case", "PKCS11:token=a", "pkcs11:token=a", ""},
		{"all", "pkcs11:type=private;id=%01%ab%AB-a;object=the%20key;token=dev?pin-source=file:/etc/pin&module-path=/usr/lib/m.so",
			"pkcs11:token=dev;object=the%20key;id=%01%AB%AB%2D%61;type=private?module-path=/usr/lib/m.so&pin-source=file:/etc/pin", ""},
		{"bare path of a PIN", "pkcs11:?pin-source=/etc/pin", "pkcs11:?pin-source=file:/etc/pin", ""},
		{"file URI of a PIN", "pkcs11:?pin-source=file:///etc/pin", "pkcs11:?pin-source=file:/etc/pin", ""},
		{"PIN", "pkcs11:token=a?pin-value=12%2034+%26", "pkcs11:token=a", "pkcs11:token=a?pin-value=12%2034%2B%26"},
		{"plus is plus", "pkcs11:object=a+b", "pkcs11:object=a%2Bb", ""},
		{"available characters of a path", "pkcs11:object=:[]@!$'()*+,=&", "pkcs11:object=%3A%5B%5D%40%21%24%27%28%29%2A%2B%2C%3D%26", ""},
		{"available characters of a query", "pkcs11:?module-path=/:[]@!$'()*+,=/?|", "pkcs11:?module-path=/%3A%5B%5D%40%21%24%27%28%29%2A%2B%2C%3D/%3F%7C", ""},
		{"id of any octets", "pkcs11:id=%00%ff%3b", "pkcs11:id=%00%FF%3B", ""},
		{"any case", "pkcs11:Token=a;TYPE=Private?Module-Name=SoftHSM2", "pkcs11:token=a;type=private?module-name=softhsm2", ""},
		{"token, slot and module", "pkcs11:library-version=3;library-description=d;library-manufacturer=l;slot-id=007;slot-description=s;slot-manufacturer=t;serial=1;model=m;manufacturer=n",
			"pkcs11:manufacturer=n;model=m;serial=1;slot-id=7;slot-manufacturer=t;slot-description=s;library-manufacturer=l;library-description=d;library-version=3.0", ""},
		{"empty values", "pkcs11:object=;token=;id=", "pkcs11:token=;object=;id=", ""},
		{"vendor attributes", "pkcs11:x-b=%31;object=a;x-a=?b=2/&a=3&pin-value=1&module-path=/m.so", "pkcs11:object=a?module-path=/m.so",
			"pkcs11:object=a;x-a=;x-b=1?module-path=/m.so&a=3&b=2%2F&pin-value=1"},
		{"vendor attributes again and again", "pkcs11:?b=2&a=1&b=1", "pkcs11:", "pkcs11:?a=1&b=2&b=1"},
		{"other scripts", "pkcs11:token=%c3%bc", "pkcs11:token=%C3%BC", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u := mustParse(t, tc.in)
			if got := u.String(); got != tc.canonical {
				t.Errorf("got %s, want %s", got, tc.canonical)
			}
			if tc.withPIN == "" {
				tc.withPIN = tc.canonical
			}
			if got := u.format(true); got != tc.withPIN {
				t.Errorf("with PIN: got %s, want %s", got, tc.withPIN)
			}
			if again := mustParse(t, tc.withPIN); again != u {
				t.Errorf("parsed again: got %s, want %s", again.format(true), u.format(true))
			}
		})
	}
}

func TestParseURIRefused(t *testing.T) {
	t.Parallel()
	const pin = "marker"
	for name, in := range map[string]string{
		"no scheme":                    "token=a",
		"other scheme":                 "file:/" + pin,
		"PIN in the path":              "pkcs11:token=a;pin-value=" + pin,
		"label in the query":           "pkcs11:?token=a&pin-value=" + pin,
		"attribute without a value":    "pkcs11:token",
		"rest of a PIN":                "pkcs11:?pin-value=12&" + pin,
		"rest of a PIN with a value":   "pkcs11:?pin-value=12&" + pin + "=a",
		"PIN twice":                    "pkcs11:?pin-value=" + pin + "&pin-value=" + pin,
		"token twice":                  "pkcs11:token=a;token=a",
		"id twice":                     "pkcs11:id=%01;id=%01",
		"PIN and its source":           "pkcs11:?pin-value=" + pin + "&pin-source=/a",
		"empty PIN":                    "pkcs11:?pin-value=",
		"empty attribute":              "pkcs11:token=a;",
		"empty attribute in the query": "pkcs11:?pin-value=" + pin + "&",
		"one digit":                    "pkcs11:?pin-value=" + pin + "%2",
		"no digits":                    "pkcs11:?pin-value=" + pin + "%",
		"not digits":                   "pkcs11:?pin-value=%zz" + pin,
		"signed digits":                "pkcs11:?pin-value=%+2" + pin,
		"space":                        "pkcs11:?pin-value=" + pin + " ",
		"newline":                      "pkcs11:?pin-value=" + pin + "\n",
		"quote":                        "pkcs11:?pin-value=\"" + pin + "\"",
		"fragment":                     "pkcs11:token=a#" + pin,
		"not ASCII":                    "pkcs11:token=ü",
		"slash in the path":            "pkcs11:object=a/" + pin,
		"second question mark":         "pkcs11:token=a?pin-value=" + pin + "#",
		"label that is not UTF-8":      "pkcs11:token=%ff",
		"NUL":                          "pkcs11:?module-path=/a%00" + pin,
		"long token":                   "pkcs11:token=" + strings.Repeat("a", maxText+1),
		"unknown attribute of a PIN":   "pkcs11:token=a?pin-valeu=" + pin,
		"the same in the path":         "pkcs11:token=a;Pin=" + pin,
		"vendor's attribute after PIN": "pkcs11:token=a?pin-value=12&x-" + pin + "=" + pin,
		"vendor's attribute twice":     "pkcs11:x-" + pin + "=1;a=2;x-" + pin + "=1",
		"name that is none":            "pkcs11:x." + pin + "=" + pin,
		"type percent-encoded":         "pkcs11:type=%70rivate",
		"module by two names":          "pkcs11:?module-name=a&module-name=" + pin,
		"module by a path as a name":   "pkcs11:?module-name=/" + pin,
		"module by a parent as a name": "pkcs11:?module-name=..",
		"slot that is no number":       "pkcs11:slot-id=" + pin,
		"version that is none":         "pkcs11:library-version=1." + pin,
		"long id":                      "pkcs11:id=" + strings.Repeat("%01", 257),
		"long PIN":                     "pkcs11:?pin-value=" + strings.Repeat(pin, 100),
		"long":                         "pkcs11:?module-path=/" + strings.Repeat(pin, 2000),
		"unknown type":                 "pkcs11:type=" + pin,
		"relative module":              "pkcs11:?module-path=" + pin + ".so",
		"relative source":              "pkcs11:?pin-source=" + pin,
		"command as source":            "pkcs11:?pin-source=|" + pin,
		"web as source":                "pkcs11:?pin-source=https://" + pin,
		"host in a file URI":           "pkcs11:?pin-source=file://" + pin + "/a",
	} {
		t.Run(name, func(t *testing.T) {
			u, err := ParseURI(in)
			var parse *ParseError
			if !errors.As(err, &parse) {
				t.Fatalf("got %v, %v, want a *ParseError", u, err)
			}
			if u != (URI{}) {
				t.Errorf("an address beside the error: %v", u)
			}
			if strings.Contains(err.Error(), pin) {
				t.Errorf("the error repeats what may be a PIN: %v", err)
			}
		})
	}
}

// No way of printing shows a PIN, not even from inside an unexported field.
func TestURIHidesPIN(t *testing.T) {
	t.Parallel()
	u := mustParse(t, "pkcs11:token=a;x-vendor=marker?x-vendor=marker&pin-value=marker")
	var logged strings.Builder
	logger := slog.New(slog.NewTextHandler(&logged, nil))
	logger.Info("open", "address", u, "in", struct{ inner URI }{u})
	slog.New(slog.NewJSONHandler(&logged, nil)).Info("open", "address", u, "in", struct{ Inner URI }{u})
	inJSON, err := json.Marshal(struct{ Address engine.Address }{u})
	if err != nil {
		t.Fatal(err)
	}
	shown := []string{logged.String(), string(inJSON), u.String(), fmt.Sprint(u)}
	for _, verb := range "vsdqxXobtcUeEfFgGpT" {
		for _, flag := range []string{"", "+", "#"} {
			format := "%" + flag + string(verb)
			shown = append(shown, fmt.Sprintf(format, u), fmt.Sprintf(format, &u), fmt.Sprintf(format, struct{ inner URI }{u}),
				fmt.Sprintf(format, []any{u}), fmt.Sprintf(format, map[URI]*URI{u: &u}))
		}
	}
	for _, text := range shown {
		for _, marker := range []string{"marker", fmt.Sprintf("%x", "marker"), fmt.Sprintf("%X", "marker"), "109 97"} {
			if strings.Contains(text, marker) {
				t.Errorf("the PIN is in %s", text)
			}
		}
	}
}

func TestResolve(t *testing.T) {
	t.Parallel()
	token := "pkcs11:token=dev?module-path=/m.so&pin-value=1234"
	for _, tc := range []struct{ name, object, token, want string }{
		{"bare", "pkcs11:object=a;type=cert", token, "pkcs11:token=dev;object=a;type=cert"},
		{"whole", "pkcs11:token=dev;id=%01?module-path=/m.so&pin-value=1234", token, "pkcs11:token=dev;id=%01"},
		{"token without a label", "pkcs11:token=other;id=%01", "pkcs11:?module-path=/m.so", "pkcs11:token=other;id=%01"},
		{"what the token's address says too", "pkcs11:serial=1;slot-id=0;library-version=2.6;id=%01", "pkcs11:serial=1;slot-id=0;library-version=2.6;token=dev?module-path=/m.so", "pkcs11:token=dev;id=%01"},
		{"what it does not say", "pkcs11:serial=1;model=;id=%01", token, "pkcs11:token=dev;model=;serial=1;id=%01"},
		{"blanks at the end", "pkcs11:model=m%20;id=%01", "pkcs11:model=m", "pkcs11:id=%01"},
		{"empty values", "pkcs11:token=;object=", "pkcs11:token=;model=", "pkcs11:object="},
		{"module by its name", "pkcs11:id=%01?module-name=m", token, "pkcs11:token=dev;id=%01"},
		{"module by its directory and name", "pkcs11:id=%01?module-name=m&module-path=/", token, "pkcs11:token=dev;id=%01"},
		{"vendor's attribute of the query", "pkcs11:id=%01?x-vendor=1", token, "pkcs11:token=dev;id=%01"},
		{"vendor's attribute of the path", "pkcs11:id=%01;x-vendor=1", token, ""},
		{"another serial", "pkcs11:serial=2;id=%01", "pkcs11:serial=1", ""},
		{"an empty serial", "pkcs11:serial=;id=%01", "pkcs11:serial=1", ""},
		{"another slot", "pkcs11:slot-id=1;id=%01", "pkcs11:slot-id=0", ""},
		{"another module by its name", "pkcs11:id=%01?module-name=n", token, ""},
		{"another token", "pkcs11:token=other;id=%01", token, ""},
		{"another module", "pkcs11:id=%01?module-path=/n.so", token, ""},
		{"another PIN", "pkcs11:id=%01?pin-value=12345", token, ""},
		{"another source", "pkcs11:id=%01?pin-source=/pin", token, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := mustParse(t, tc.object).Resolve(mustParse(t, tc.token))
			if tc.want == "" {
				if err == nil || strings.Contains(err.Error(), "1234") {
					t.Errorf("got %v, %v, want an error without the PIN", got, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(got.format(true), tc.want); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// FuzzParseURI: what is accepted survives formatting, and what is refused is
// refused with this package's error.
func FuzzParseURI(f *testing.F) {
	seeds, err := filepath.Glob("testdata/uri/*")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, path := range seeds {
		seed, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(strings.TrimSuffix(string(seed), "\n"))
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			var parse *ParseError
			if !errors.As(err, &parse) || len(err.Error()) > 200 {
				t.Fatalf("%v is not a short *ParseError", err)
			}
			return
		}
		formatted := u.format(true)
		again, err := ParseURI(formatted)
		if err != nil || again != u {
			t.Fatalf("%q became %q, %v", formatted, again.format(true), err)
		}
		if again.format(true) != formatted {
			t.Fatalf("%q is not canonical", formatted)
		}
		without, err := ParseURI(u.String())
		if err != nil || without.HasPINValue() {
			t.Fatalf("String returns %q, %v", u.String(), err)
		}
	})
}
