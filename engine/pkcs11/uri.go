package pkcs11

import (
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"unicode/utf8"
	"unique"

	"estenroll/engine"
)

const scheme = "pkcs11" // RFC 7512 §2.1

// Limits of an address, in bytes.
const (
	maxURI   = 8192
	maxToken = 32 // CK_TOKEN_INFO.label, PKCS #11 v2.40 §3.2
	maxText  = 256
	maxID    = 256
	maxPath  = 4096 // PATH_MAX
	maxPIN   = 256
)

// URI is an engine address: a token, or one object in it, by the attributes of
// RFC 7512 that this program uses. It is a comparable value, and no way of
// printing it shows its PIN.
//
// Empty fields are absent attributes; an address is a filter that what it names
// must match in full.
type URI struct {
	Token  string       // label of the token
	Object string       // CKA_LABEL
	ID     string       // CKA_ID, raw bytes
	Type   engine.Class // CKA_CLASS

	ModulePath string // absolute
	PINSource  string // absolute path of the file that holds the PIN

	// A handle, which is a pointer to a string inside: fmt never follows one inside
	// a value that it prints, so that the PIN is not shown even as an unexported
	// field of somebody's struct.
	pin unique.Handle[string]
}

var _ engine.Address = URI{}

// ParseError says why an address was refused. It repeats nothing of the
// address but the name of a known attribute, for the rest may be a PIN.
type ParseError struct {
	Attribute string // name; empty where the address as a whole is meant
	Reason    string
}

// Error returns "pkcs11 URI: attribute: reason".
func (e *ParseError) Error() string {
	if e.Attribute == "" {
		return "pkcs11 URI: " + e.Reason
	}
	return "pkcs11 URI: " + e.Attribute + ": " + e.Reason
}

// The attributes, in canonical order. Those of RFC 7512 §2.3 and §2.4 that are
// not here select by what this program has no use for, and are refused: an
// attribute that is ignored would widen the selection.
var (
	pathAttributes = []attribute{
		{"token", maxToken, checkText, func(u *URI) *string { return &u.Token }},
		{"object", maxText, checkText, func(u *URI) *string { return &u.Object }},
		{"id", maxID, checkRaw, func(u *URI) *string { return &u.ID }},
		{"type", maxText, checkClass, func(u *URI) *string { return (*string)(&u.Type) }},
	}
	queryAttributes = []attribute{
		{"module-path", maxPath, checkPath, func(u *URI) *string { return &u.ModulePath }},
		{"pin-source", maxPath, checkPINSource, func(u *URI) *string { return &u.PINSource }},
		{pinValue, maxPIN, checkText, nil},
	}
)

const pinValue = "pin-value"

type attribute struct {
	name  string
	limit int
	check func(value string) (string, string) // the value to keep, or why not
	field func(*URI) *string                  // nil for the PIN
}

// Characters beside the unreserved ones that need no percent-encoding:
// pk11-path-res-avail and pk11-query-res-avail of RFC 7512 §2.3.
const (
	unreserved = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~"
	resAvail   = ":[]@!$'()*+,="
	pathAvail  = unreserved + resAvail + "&"
	queryAvail = unreserved + resAvail + "/?|"
)

// ParseURI parses an address strictly. Unknown and repeated attributes, empty
// values and both PIN attributes at once (RFC 7512 §2.4) are refused with a
// *ParseError. A "+" is a plus sign.
//
// Deviation: RFC 7512 allows empty values; here they would read like absent ones.
// Deviation: relative paths are refused, and commands ("|…") and schemes other
// than "file:" as sources of a PIN: where the PIN goes must not depend on the
// current directory.
func ParseURI(s string) (URI, error) {
	var u URI
	if len(s) > maxURI {
		return URI{}, &ParseError{Reason: "too long"}
	}
	prefix, rest, found := strings.Cut(s, ":")
	if !found || !strings.EqualFold(prefix, scheme) { // RFC 3986 §3.1
		return URI{}, &ParseError{Reason: "it does not begin with \"pkcs11:\""}
	}
	inPath, inQuery, hasQuery := strings.Cut(rest, "?")
	if err := u.parse(inPath, ";", pathAttributes, pathAvail); err != nil {
		return URI{}, err
	}
	if hasQuery {
		if err := u.parse(inQuery, "&", queryAttributes, queryAvail); err != nil {
			return URI{}, err
		}
	}
	// RFC 7512 §2.4: an address with both is invalid.
	if u.PINSource != "" && u.HasPINValue() {
		return URI{}, &ParseError{Attribute: pinValue, Reason: "pin-source is there too"}
	}
	return u, nil
}

func (u *URI) parse(component, separator string, known []attribute, avail string) error {
	if component == "" {
		return nil
	}
	for part := range strings.SplitSeq(component, separator) {
		name, encoded, found := strings.Cut(part, "=")
		if !found {
			return &ParseError{Reason: "an attribute without a value"}
		}
		a, err := find(name, known)
		if err != nil {
			return err
		}
		value, reason := decode(encoded, avail)
		switch {
		case reason != "":
		case value == "":
			reason = "empty"
		case len(value) > a.limit:
			reason = "too long"
		case a.name == pinValue && u.HasPINValue(), a.field != nil && *a.field(u) != "":
			reason = "twice"
		default:
			value, reason = a.check(value)
		}
		if reason != "" {
			return &ParseError{Attribute: a.name, Reason: reason}
		}
		if a.field != nil {
			*a.field(u) = value
		} else {
			u.pin = unique.Make(value)
		}
	}
	return nil
}

// find does not repeat a name that is not in a table: "pin-value=12&34=56" has
// one that is part of a PIN.
func find(name string, known []attribute) (attribute, error) {
	for _, a := range known {
		if a.name == name {
			return a, nil
		}
	}
	for _, other := range [][]attribute{pathAttributes, queryAttributes} {
		for _, a := range other {
			if a.name == name {
				return attribute{}, &ParseError{Attribute: name, Reason: "on the wrong side of the \"?\""}
			}
		}
	}
	return attribute{}, &ParseError{Reason: "an unknown attribute: known are token, object, id and type, then after \"?\" module-path, pin-source and pin-value"}
}

func decode(encoded, avail string) (value, reason string) {
	var b strings.Builder
	for i := 0; i < len(encoded); i++ {
		c := encoded[i]
		switch {
		case c == '%':
			if i+2 >= len(encoded) {
				return "", "bad percent-encoding"
			}
			octet, err := hex.DecodeString(encoded[i+1 : i+3])
			if err != nil {
				return "", "bad percent-encoding"
			}
			b.Write(octet)
			i += 2
		case strings.IndexByte(avail, c) >= 0:
			b.WriteByte(c)
		default:
			return "", "a character that must be percent-encoded"
		}
	}
	return b.String(), ""
}

func checkRaw(value string) (string, string) { return value, "" }

// checkText wants UTF-8 below its percent-encoding (RFC 7512 §2.3).
func checkText(value string) (string, string) {
	switch {
	case !utf8.ValidString(value):
		return "", "not UTF-8"
	case strings.IndexByte(value, 0) >= 0:
		return "", "a NUL in it"
	}
	return value, ""
}

func checkClass(value string) (string, string) {
	switch engine.Class(value) {
	case engine.ClassPrivateKey, engine.ClassPublicKey, engine.ClassCertificate, engine.ClassSecretKey, engine.ClassData:
		return value, ""
	}
	return "", "not one of private, public, cert, secret-key and data"
}

func checkPath(value string) (string, string) {
	if !filepath.IsAbs(value) {
		return "", "not an absolute path"
	}
	return checkText(value)
}

// checkPINSource takes "file:/path" and "file:///path" (RFC 8089) and a bare path,
// all of them decoded once already.
func checkPINSource(value string) (string, string) {
	if after, found := strings.CutPrefix(value, "file:"); found {
		value = after
		if after, found := strings.CutPrefix(value, "//"); found {
			value = after
		}
	}
	return checkPath(value)
}

// Scheme returns "pkcs11".
func (URI) Scheme() string { return scheme }

// String returns the canonical form: attributes in one order, every octet of an
// id percent-encoded, no PIN.
func (u URI) String() string { return u.format(false) }

func (u URI) format(withPIN bool) string {
	var b strings.Builder
	b.WriteString(scheme)
	separator := ":"
	add := func(next, name, value, plain string) {
		if value == "" {
			return
		}
		b.WriteString(separator + name + "=")
		separator = next
		for _, c := range []byte(value) {
			if strings.IndexByte(plain, c) >= 0 {
				b.WriteByte(c)
			} else {
				fmt.Fprintf(&b, "%%%02X", c)
			}
		}
	}
	add(";", "token", u.Token, unreserved)
	add(";", "object", u.Object, unreserved)
	add(";", "id", u.ID, "") // the whole of it, RFC 7512 §2.3
	add(";", "type", string(u.Type), unreserved)
	if separator == ":" {
		b.WriteString(separator)
	}
	separator = "?"
	add("&", "module-path", u.ModulePath, unreserved+"/")
	if u.PINSource != "" {
		add("&", "pin-source", "file:"+u.PINSource, unreserved+"/:")
	}
	if withPIN {
		add("&", pinValue, u.pinValue(), unreserved)
	}
	return b.String()
}

// GoString is String.
func (u URI) GoString() string { return u.String() }

// Format writes String for every verb: %d would show the fields.
func (u URI) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, u.String()) }

// LogValue returns String.
func (u URI) LogValue() slog.Value { return slog.StringValue(u.String()) }

// MarshalText returns String.
func (u URI) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// HasPINValue reports whether the PIN stands in the address itself, so that a
// command can refuse one in its argument list.
func (u URI) HasPINValue() bool { return u.pin != unique.Handle[string]{} }

func (u URI) pinValue() string {
	if !u.HasPINValue() {
		return ""
	}
	return u.pin.Value()
}

// Resolve completes the address of an object with the token that it is looked
// for in, and leaves the query attributes out. An object address may repeat what
// the token's says, and may not contradict it.
func (u URI) Resolve(token URI) (URI, error) {
	switch {
	case u.Token != "" && token.Token != "" && u.Token != token.Token:
		return URI{}, fmt.Errorf("address %s: it names another token than %s", u, token)
	case u.ModulePath != "" && u.ModulePath != token.ModulePath:
		return URI{}, fmt.Errorf("address %s: it names another module than %s", u, token)
	case u.PINSource != "" && u.PINSource != token.PINSource, u.HasPINValue() && u.pin != token.pin:
		return URI{}, fmt.Errorf("address %s: it has another PIN than %s", u, token)
	}
	if u.Token == "" {
		u.Token = token.Token
	}
	return u.object(), nil
}

// object returns the attributes that name an object: those that may be kept.
func (u URI) object() URI { return URI{Token: u.Token, Object: u.Object, ID: u.ID, Type: u.Type} }

// parseAddress is ParseURI as a Driver wants it.
func parseAddress(s string) (engine.Address, error) {
	u, err := ParseURI(s)
	if err != nil {
		return nil, err
	}
	return u, nil
}
