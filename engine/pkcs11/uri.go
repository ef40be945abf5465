package pkcs11

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"estenroll/engine"
)

const scheme = "pkcs11"

// Limits of a URI.
const (
	maxURI   = 4096 // bytes
	maxToken = 32   // bytes: CK_TOKEN_INFO.label
	maxID    = 255  // bytes
)

// URI is an engine address: the attributes of a PKCS#11 URI (RFC 7512 §2.3) that
// this program uses. An empty field is an absent attribute. URIs are comparable.
//
// No way of printing a URI shows its pin-value.
type URI struct {
	Token  string
	Object string // CKA_LABEL
	ID     string // CKA_ID, as bytes
	Type   engine.Class

	ModulePath string
	PINSource  string // "file:/path" or an absolute path
	pinValue   string
}

var _ engine.Address = URI{}

// attribute is one attribute of a URI: where it stands and how it is kept.
type attribute struct {
	name  string
	query bool
	field func(*URI) *string
	check func(string) error
}

var uriAttributes = []attribute{
	{"token", false, func(u *URI) *string { return &u.Token }, checkToken},
	{"object", false, func(u *URI) *string { return &u.Object }, checkText},
	{"id", false, func(u *URI) *string { return &u.ID }, checkID},
	{"type", false, func(u *URI) *string { return (*string)(&u.Type) }, checkType},
	{"module-path", true, func(u *URI) *string { return &u.ModulePath }, checkPath},
	{"pin-source", true, func(u *URI) *string { return &u.PINSource }, checkPINSource},
	{"pin-value", true, func(u *URI) *string { return &u.pinValue }, checkText},
}

// ParseURI parses a PKCS#11 URI strictly: only the attributes of URI, each at
// most once and not empty, each character as RFC 7512 §2.3 has it; "+" is a
// plus. Its errors name attributes and never repeat a value.
func ParseURI(s string) (URI, error) {
	u, err := parseURI(s)
	if err != nil {
		return URI{}, fmt.Errorf("PKCS#11 URI: %w", err)
	}
	return u, nil
}

func parseURI(s string) (u URI, err error) {
	if len(s) > maxURI {
		return u, fmt.Errorf("%d bytes, more than %d", len(s), maxURI)
	}
	prefix, rest, found := strings.Cut(s, ":")
	if !found || !strings.EqualFold(prefix, scheme) {
		return u, errors.New("it does not begin with pkcs11:")
	}
	path, query, hasQuery := strings.Cut(rest, "?")
	if path == "" && !hasQuery {
		return u, errors.New("no attribute")
	}
	seen := map[string]bool{}
	if path != "" {
		for part := range strings.SplitSeq(path, ";") {
			if err := u.set(part, false, seen); err != nil {
				return u, err
			}
		}
	}
	if hasQuery {
		for part := range strings.SplitSeq(query, "&") {
			if err := u.set(part, true, seen); err != nil {
				return u, err
			}
		}
	}
	if u.PINSource != "" && u.pinValue != "" {
		return u, errors.New("pin-source and pin-value: want one of them") // RFC 7512 §2.4
	}
	return u, nil
}

func (u *URI) set(part string, query bool, seen map[string]bool) error {
	name, encoded, found := strings.Cut(part, "=")
	for _, a := range uriAttributes {
		if a.name != name {
			continue
		}
		switch {
		case a.query != query && query:
			return fmt.Errorf("%s: it belongs before the question mark", name)
		case a.query != query:
			return fmt.Errorf("%s: it belongs after the question mark", name)
		case !found:
			return fmt.Errorf("%s: no value", name)
		case seen[name]:
			return fmt.Errorf("%s: given twice", name)
		}
		seen[name] = true
		value, err := decode(encoded, query)
		if err == nil {
			err = a.check(value)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		*a.field(u) = value
		return nil
	}
	// The name itself may be a PIN that someone forgot to name.
	return errors.New("unknown attribute: known are token, object, id and type, and after the question mark module-path, pin-source and pin-value")
}

const (
	unreserved = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
	// pk11-res-avail of RFC 7512 §2.3, with what each component adds to it.
	pathChars  = unreserved + ":[]@!$'()*+,=" + "&"
	queryChars = unreserved + ":[]@!$'()*+,=" + "/?|"
)

func decode(s string, query bool) (string, error) {
	allowed := pathChars
	if query {
		allowed = queryChars
	}
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '%':
			if i+2 >= len(s) || unhex(s[i+1]) < 0 || unhex(s[i+2]) < 0 {
				return "", errors.New("a percent sign without two hexadecimal digits")
			}
			out.WriteByte(byte(unhex(s[i+1])<<4 | unhex(s[i+2])))
			i += 2
		case strings.IndexByte(allowed, c) >= 0:
			out.WriteByte(c)
		default:
			return "", errors.New("a character that must be percent-encoded")
		}
	}
	return out.String(), nil
}

func unhex(c byte) int { return strings.IndexByte("0123456789abcdef", c|0x20) }

func encode(s, allowed string) string {
	var out strings.Builder
	for i := range len(s) {
		if c := s[i]; strings.IndexByte(allowed, c) >= 0 {
			out.WriteByte(c)
		} else {
			fmt.Fprintf(&out, "%%%02X", c)
		}
	}
	return out.String()
}

func checkText(s string) error {
	switch {
	case s == "":
		return errors.New("empty")
	case !utf8.ValidString(s):
		return errors.New("not UTF-8")
	case strings.ContainsRune(s, 0):
		return errors.New("a zero byte")
	}
	return nil
}

func checkToken(s string) error {
	if len(s) > maxToken {
		return fmt.Errorf("%d bytes, more than %d", len(s), maxToken)
	}
	return checkText(s)
}

func checkID(s string) error {
	if len(s) == 0 || len(s) > maxID {
		return fmt.Errorf("%d bytes, want 1 to %d", len(s), maxID)
	}
	return nil
}

func checkType(s string) error {
	switch engine.Class(s) {
	case engine.ClassPrivateKey, engine.ClassPublicKey, engine.ClassCertificate, engine.ClassSecretKey, engine.ClassData:
		return nil
	}
	return errors.New("want private, public, cert, secret-key or data")
}

func checkPath(s string) error {
	if !filepath.IsAbs(s) {
		return errors.New("want an absolute path")
	}
	return checkText(s)
}

func checkPINSource(s string) error {
	if _, err := pinPath(s); err != nil {
		return err
	}
	return checkText(s)
}

// pinPath returns the path of a pin-source: "file:/path", "file:///path" or "/path".
func pinPath(source string) (string, error) {
	path := strings.TrimPrefix(source, "file:")
	path = strings.TrimPrefix(path, "//")
	if !filepath.IsAbs(path) {
		return "", errors.New("want file:/path")
	}
	return path, nil
}

// Scheme returns "pkcs11".
func (URI) Scheme() string { return scheme }

// String returns the URI in its canonical form, without a pin-value.
func (u URI) String() string {
	u.pinValue = ""
	return u.format()
}

// format returns the whole URI.
func (u URI) format() string {
	out, separator := scheme+":", ""
	query := false
	for _, a := range uriAttributes {
		value := *a.field(&u)
		if value == "" {
			continue
		}
		if a.query && !query {
			query, separator = true, "?"
		}
		switch {
		case a.name == "id": // bytes, not text (RFC 7512 §2.3)
			value = encode(value, "")
		case a.query:
			value = encode(value, queryChars)
		default:
			value = encode(value, unreserved)
		}
		out += separator + a.name + "=" + value
		if separator = ";"; query {
			separator = "&"
		}
	}
	return out
}

// Format writes String for every verb: no verb shows a field.
func (u URI) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, u.String()) }

// GoString is String.
func (u URI) GoString() string { return u.String() }

// MarshalText is String.
func (u URI) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// HasPINValue reports whether the URI holds a PIN.
func (u URI) HasPINValue() bool { return u.pinValue != "" }

// object returns the attributes that name an object: those that may be kept.
func (u URI) object() URI { return URI{Token: u.Token, Object: u.Object, ID: u.ID, Type: u.Type} }

func parseAddress(s string) (engine.Address, error) {
	u, err := ParseURI(s)
	if err != nil {
		return nil, err
	}
	return u, nil
}
