package pkcs11

import (
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
	"unique"

	"estenroll/engine"
)

const scheme = "pkcs11" // RFC 7512 §2.1

// Limits of an address, in bytes. RFC 7512 has none; no member of a Cryptoki
// structure that an attribute is compared with is longer than 64 bytes.
const (
	maxURI  = 8192
	maxText = 256
	maxID   = 256
	maxPath = 4096 // PATH_MAX
	maxPIN  = 256
)

// URI is an engine address: a token, or one object in it, by the attributes of
// RFC 7512. It is a comparable value, and no way of printing it shows its PIN.
//
// An empty field is an absent attribute, unless the address has the attribute
// with an empty value. An address is a filter that what it names must match in
// full: "An attribute not present in the URI path that is known to the consumer
// matches everything" (RFC 7512 §2.5).
type URI struct {
	// Of the token, from CK_TOKEN_INFO.
	Token        string // label
	Manufacturer string
	Model        string
	Serial       string
	// Of its slot, from CK_SLOT_INFO.
	SlotID           string // CK_SLOT_ID, decimal
	SlotManufacturer string
	SlotDescription  string
	// Of the module, from CK_INFO.
	LibraryManufacturer string
	LibraryDescription  string
	LibraryVersion      string // "major.minor"
	// Of an object.
	Object string       // CKA_LABEL
	ID     string       // CKA_ID, raw bytes
	Type   engine.Class // CKA_CLASS

	ModuleName string // lower case, without "lib" and ".so"
	ModulePath string // absolute: the module or, with ModuleName, its directory
	PINSource  string // absolute path of the file that holds the PIN

	// empty has a bit for each of pathAttributes that is there with an empty value.
	empty uint16

	// Handles, which are pointers to strings inside: fmt never follows one inside a
	// value that it prints, so that the PIN is not shown even as an unexported field of
	// somebody's struct, nor is what a vendor may mean as one. The vendors' attributes
	// are those that RFC 7512 does not define, percent-encoded, in canonical order.
	pin, vendorPath, vendorQuery unique.Handle[string]
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

// The attributes of RFC 7512 §2.3, in canonical order. The first tokenAttributes of
// the path select a token, the others an object in it; of those the first
// ownAttributes are the token's own, and the others its slot's and the module's.
var (
	pathAttributes = []attribute{
		{"token", kindText, func(u *URI) *string { return &u.Token }},
		{"manufacturer", kindText, func(u *URI) *string { return &u.Manufacturer }},
		{"model", kindText, func(u *URI) *string { return &u.Model }},
		{"serial", kindText, func(u *URI) *string { return &u.Serial }},
		{"slot-id", kindSlotID, func(u *URI) *string { return &u.SlotID }},
		{"slot-manufacturer", kindText, func(u *URI) *string { return &u.SlotManufacturer }},
		{"slot-description", kindText, func(u *URI) *string { return &u.SlotDescription }},
		{"library-manufacturer", kindText, func(u *URI) *string { return &u.LibraryManufacturer }},
		{"library-description", kindText, func(u *URI) *string { return &u.LibraryDescription }},
		{"library-version", kindLibraryVersion, func(u *URI) *string { return &u.LibraryVersion }},
		{"object", kindText, func(u *URI) *string { return &u.Object }},
		{"id", kindOctets, func(u *URI) *string { return &u.ID }},
		{"type", kindClass, func(u *URI) *string { return (*string)(&u.Type) }},
	}
	queryAttributes = []attribute{
		{"module-name", kindModuleName, func(u *URI) *string { return &u.ModuleName }},
		{"module-path", kindModulePath, func(u *URI) *string { return &u.ModulePath }},
		{"pin-source", kindPINSource, func(u *URI) *string { return &u.PINSource }},
		{pinValue, kindPIN, nil},
	}
)

const (
	ownAttributes   = 5
	tokenAttributes = 10
	pinValue        = "pin-value"
)

type attribute struct {
	name string
	kind
	field func(*URI) *string // nil for the PIN
}

// kind is what values of an attribute look like.
type kind struct {
	limit   int  // of the decoded value
	literal bool // digits or words, never percent-encoded
	empty   bool // an empty value is one (RFC 7512 §2.3, §2.5)
	read    func(value string) (read, reason string)
}

var (
	kindText           = kind{maxText, false, true, readText}
	kindOctets         = kind{maxID, false, true, func(value string) (string, string) { return value, "" }}
	kindClass          = kind{maxText, true, false, readClass}
	kindSlotID         = kind{maxText, true, false, readSlotID}
	kindLibraryVersion = kind{maxText, true, false, readLibraryVersion}
	kindModuleName     = kind{maxText, false, false, readModuleName}
	kindModulePath     = kind{maxPath, false, false, readPath}
	kindPINSource      = kind{maxPath, false, false, readPINSource}
	kindPIN            = kind{maxPIN, false, false, readText}
)

// Characters beside the unreserved ones that need no percent-encoding:
// pk11-path-res-avail and pk11-query-res-avail of RFC 7512 §2.3.
const (
	digits      = "0123456789"
	letters     = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	unreserved  = letters + digits + "-._~"
	resAvail    = ":[]@!$'()*+,="
	pathAvail   = unreserved + resAvail + "&"
	queryAvail  = unreserved + resAvail + "/?|"
	vendorAvail = letters + digits + "-_" // pk11-v-attr-nm-char
)

// ParseURI parses an address strictly, by the grammar of RFC 7512 §2.3. Names of
// attributes and classes are taken in any case, as those of its grammar are
// (RFC 5234 §2.3). An attribute that stands in it twice is refused, except
// vendors' in the query, and so are both PIN attributes at once (§2.4). A "+" is a
// plus sign. What is refused is a *ParseError.
//
// Vendors' attributes are kept. In the query they are ignored; one in the path
// matches nothing (§2.5).
//
// Deviation: an empty value in the query is refused: it names no module and no
// file, and an empty PIN is never tried.
// Deviation: commands ("|…") and schemes other than "file:" as sources of a PIN are
// refused, and so are relative paths, which §2.4 asks for in module-path: where the
// PIN goes must not depend on the current directory, nor on a shell.
// Deviation: a vendor's attribute whose name begins with "pin" is refused, for it
// may be a misspelt PIN, which would be printed or left in an argument list; and so
// is one after pin-value, for it may be the rest of a PIN whose "&" is not encoded,
// and its first half would cost a try.
func ParseURI(s string) (URI, error) {
	var u URI
	if len(s) > maxURI {
		return URI{}, &ParseError{Reason: "too long"}
	}
	prefix, rest, found := strings.Cut(s, ":")
	if !found || !strings.EqualFold(prefix, scheme) { // RFC 3986 §3.1
		return URI{}, &ParseError{Reason: "it does not begin with \"pkcs11:\""}
	}
	inPath, inQuery, _ := strings.Cut(rest, "?")
	path, err := u.parse(inPath, ";", pathAttributes, queryAttributes, pathAvail)
	if err != nil {
		return URI{}, err
	}
	// RFC 7512 §2.3: no attribute stands in the path twice, whoever defines it.
	for i := 1; i < len(path); i++ {
		if path[i].name == path[i-1].name {
			return URI{}, &ParseError{Reason: "a vendor's attribute stands in the path twice"}
		}
	}
	query, err := u.parse(inQuery, "&", queryAttributes, pathAttributes, queryAvail)
	if err != nil {
		return URI{}, err
	}
	// RFC 7512 §2.4: an address with both is invalid.
	if u.PINSource != "" && u.HasPINValue() {
		return URI{}, &ParseError{Attribute: pinValue, Reason: "pin-source is there too"}
	}
	if len(path) > 0 {
		u.vendorPath = unique.Make(join(path, ";"))
	}
	if len(query) > 0 {
		u.vendorQuery = unique.Make(join(query, "&"))
	}
	return u, nil
}

// vendorAttribute is one attribute that RFC 7512 does not define.
type vendorAttribute struct{ name, value string }

func join(attributes []vendorAttribute, separator string) string {
	parts := make([]string, len(attributes))
	for i, a := range attributes {
		parts[i] = a.name + "=" + encode(a.value, unreserved)
	}
	return strings.Join(parts, separator)
}

// parse reads the attributes of one component into the fields and returns the
// vendors' ones, sorted by name.
func (u *URI) parse(component, separator string, known, others []attribute, avail string) ([]vendorAttribute, error) {
	if component == "" {
		return nil, nil
	}
	var vendors []vendorAttribute
	for part := range strings.SplitSeq(component, separator) {
		name, encoded, found := strings.Cut(part, "=")
		if !found {
			return nil, &ParseError{Reason: "an attribute without a value"}
		}
		i := index(known, name)
		if i < 0 {
			value, err := u.vendorValue(name, encoded, others, avail)
			if err != nil {
				return nil, err
			}
			vendors = append(vendors, vendorAttribute{name, value})
			continue
		}
		if reason := u.set(known[i], i, encoded, avail); reason != "" {
			return nil, &ParseError{Attribute: known[i].name, Reason: reason}
		}
	}
	slices.SortStableFunc(vendors, func(a, b vendorAttribute) int { return strings.Compare(a.name, b.name) })
	return vendors, nil
}

func (u *URI) set(a attribute, i int, encoded, avail string) (reason string) {
	value, reason := decode(encoded, avail)
	switch {
	case reason != "":
		return reason
	case a.literal && strings.Contains(encoded, "%"):
		return "percent-encoded"
	case len(value) > a.limit:
		return "too long"
	case a.field == nil && u.HasPINValue(), a.field != nil && (*a.field(u) != "" || u.empty&(1<<i) != 0):
		return "twice"
	case value == "" && !a.empty:
		return "empty"
	case value == "":
		u.empty |= 1 << i
		return ""
	}
	if value, reason = a.read(value); reason != "" {
		return reason
	}
	if a.field != nil {
		*a.field(u) = value
	} else {
		u.pin = unique.Make(value)
	}
	return ""
}

// vendorValue decodes an attribute that is not in a table. Its name is not
// repeated in an error: "pin-value=12&34=56" has one that is part of a PIN.
func (u *URI) vendorValue(name, encoded string, others []attribute, avail string) (string, error) {
	value, reason := decode(encoded, avail)
	i := index(others, name)
	switch {
	case i >= 0: // RFC 7512 §2.3: a vendor's name "MUST NOT clash with existing attribute names"
		return "", &ParseError{Attribute: others[i].name, Reason: "on the wrong side of the \"?\""}
	case name == "" || strings.Trim(name, vendorAvail) != "":
		reason = "an attribute whose name is none"
	case strings.HasPrefix(strings.ToLower(name), "pin"):
		reason = "an unknown attribute of a PIN: known are pin-source and pin-value, after the \"?\""
	case u.HasPINValue():
		reason = "an unknown attribute after pin-value: an \"&\" in a PIN is written %26"
	case reason != "":
		reason = "a vendor's attribute: " + reason
	}
	if reason != "" {
		return "", &ParseError{Reason: reason}
	}
	return value, nil
}

func index(known []attribute, name string) int {
	return slices.IndexFunc(known, func(a attribute) bool { return strings.EqualFold(a.name, name) })
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

func encode(value, plain string) string {
	var b strings.Builder
	for _, c := range []byte(value) {
		if strings.IndexByte(plain, c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// readText wants UTF-8 below its percent-encoding (RFC 7512 §2.3), without the NUL
// that text has no use for (RFC 3986 §7.3).
func readText(value string) (string, string) {
	switch {
	case !utf8.ValidString(value):
		return "", "not UTF-8"
	case strings.IndexByte(value, 0) >= 0:
		return "", "a NUL in it"
	}
	return value, ""
}

func readClass(value string) (string, string) {
	value = strings.ToLower(value) // RFC 5234 §2.3
	switch engine.Class(value) {
	case engine.ClassPrivateKey, engine.ClassPublicKey, engine.ClassCertificate, engine.ClassSecretKey, engine.ClassData:
		return value, ""
	}
	return "", "not one of private, public, cert, secret-key and data"
}

func readSlotID(value string) (string, string) {
	id, err := strconv.ParseUint(value, 10, 64) // CK_ULONG, at its widest
	if err != nil || strings.Trim(value, digits) != "" {
		return "", "not a decimal number of 64 bits"
	}
	return strconv.FormatUint(id, 10), ""
}

// readLibraryVersion reads "major.minor" of one byte each. "The minor version is
// optional", and is 0 then.
func readLibraryVersion(value string) (string, string) {
	major, minor, found := strings.Cut(value, ".")
	if !found {
		minor = "0"
	}
	var numbers [2]uint64
	for i, number := range []string{major, minor} {
		var err error
		if numbers[i], err = strconv.ParseUint(number, 10, 8); err != nil || strings.Trim(number, digits) != "" {
			return "", "not a number from 0 to 255, or two with a dot between"
		}
	}
	return fmt.Sprintf("%d.%d", numbers[0], numbers[1]), ""
}

// readModuleName: "a case-insensitive PKCS #11 module name (not path nor filename)"
// (RFC 7512 §2.4).
func readModuleName(value string) (string, string) {
	if strings.ContainsAny(value, "/") || strings.HasPrefix(value, ".") {
		return "", "not a name: a path belongs in module-path"
	}
	return readText(strings.ToLower(value))
}

func readPath(value string) (string, string) {
	if !filepath.IsAbs(value) {
		return "", "not an absolute path"
	}
	return readText(value)
}

// readPINSource takes "file:/path" and "file:///path" (RFC 8089) and a bare path,
// all of them decoded once already.
func readPINSource(value string) (string, string) {
	if after, found := strings.CutPrefix(value, "file:"); found {
		value = after
		if after, found := strings.CutPrefix(value, "//"); found {
			value = after
		}
	}
	return readPath(value)
}

// Scheme returns "pkcs11".
func (URI) Scheme() string { return scheme }

// String returns the canonical form: attributes in one order, every octet of an
// id percent-encoded, no PIN, and no vendor's attribute, which only its vendor knows
// to be no PIN.
func (u URI) String() string { return u.format(false) }

// format returns the canonical form, which parses back to the same URI, with or
// without what String leaves out.
func (u URI) format(whole bool) string {
	var path, query []string
	for i, a := range pathAttributes {
		if !u.has(i) {
			continue
		}
		plain := unreserved
		if a.name == "id" {
			plain = "" // the whole of it, RFC 7512 §2.3
		}
		path = append(path, a.name+"="+encode(*a.field(&u), plain))
	}
	for _, a := range queryAttributes {
		if a.field == nil || *a.field(&u) == "" {
			continue
		}
		prefix := ""
		if a.name == "pin-source" {
			prefix = "file:"
		}
		query = append(query, a.name+"="+prefix+encode(*a.field(&u), unreserved+"/"))
	}
	if whole && u.vendorPath != (unique.Handle[string]{}) {
		path = append(path, u.vendorPath.Value())
	}
	if whole && u.vendorQuery != (unique.Handle[string]{}) { // before the PIN: after it none is taken
		query = append(query, u.vendorQuery.Value())
	}
	if whole && u.HasPINValue() {
		query = append(query, pinValue+"="+encode(u.pin.Value(), unreserved))
	}
	s := scheme + ":" + strings.Join(path, ";")
	if len(query) > 0 {
		s += "?" + strings.Join(query, "&")
	}
	return s
}

// has reports whether an attribute of the path is there, empty or not.
func (u *URI) has(i int) bool { return *pathAttributes[i].field(u) != "" || u.empty&(1<<i) != 0 }

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
// the token's says, and may not contradict it. Of what it says of the token only the
// label stays, where the token's address says the rest: what is persisted names an
// object, and the engine's address the token.
func (u URI) Resolve(token URI) (URI, error) {
	if err := u.foreign(); err != nil {
		return URI{}, fmt.Errorf("address %s: %w: %w", u, engine.ErrNotFound, err)
	}
	if name := u.differs(token); name != "" {
		return URI{}, fmt.Errorf("address %s: its %s is not that of %s", u, name, token)
	}
	named := u.ModuleName != "" && isNamed(token.ModulePath, u.ModuleName)
	switch {
	case u.ModulePath != "" && u.ModulePath != token.ModulePath && !(named && u.ModulePath == filepath.Dir(token.ModulePath)),
		u.ModuleName != "" && u.ModuleName != token.ModuleName && !named:
		return URI{}, fmt.Errorf("address %s: it names another module than %s", u, token)
	case u.PINSource != "" && u.PINSource != token.PINSource, u.HasPINValue() && u.pin != token.pin:
		return URI{}, fmt.Errorf("address %s: it has another PIN than %s", u, token)
	}
	object := u.object()
	for i, a := range pathAttributes[:tokenAttributes] {
		if i > 0 && !token.has(i) { // not known of the token yet
			*a.field(&object) = *a.field(&u)
			object.empty |= u.empty & (1 << i)
		}
	}
	if token.Token != "" {
		object.Token = token.Token
	}
	return object, nil
}

// differs returns the first attribute of the token by which a token is not what
// the address asks for. What is not known of the token does not differ. Cryptoki
// pads text with blanks, so those at its end mean nothing.
func (u URI) differs(token URI) string {
	for i, a := range pathAttributes[:tokenAttributes] {
		if u.has(i) && token.has(i) && strings.TrimRight(*a.field(&u), " ") != strings.TrimRight(*a.field(&token), " ") {
			return a.name
		}
	}
	return ""
}

// foreign says that an address has a vendor's attribute in its path: "An
// unrecognized attribute in the URI path component, including a vendor-specific
// attribute, SHOULD result in an empty set of matched resources" (RFC 7512 §2.5).
// It may be a misspelt one, and the PIN would go to another token than was meant.
func (u URI) foreign() error {
	if u.vendorPath == (unique.Handle[string]{}) {
		return nil
	}
	name, _, _ := strings.Cut(u.vendorPath.Value(), "=")
	return fmt.Errorf("attribute %s is unknown, and so matches nothing", name)
}

// known marks the first attributes of a token as known: what is empty is so there.
func (u URI) known(attributes int) URI {
	for i, a := range pathAttributes[:attributes] {
		if *a.field(&u) == "" {
			u.empty |= 1 << i
		}
	}
	return u
}

// namesPlace reports whether the address says anything of the slot or the module,
// which a token is asked for only then.
func (u URI) namesPlace() bool { return u.hasAny(ownAttributes, tokenAttributes) }

// namesObject reports whether the address says anything of an object.
func (u URI) namesObject() bool { return u.hasAny(tokenAttributes, len(pathAttributes)) }

func (u URI) hasAny(from, to int) bool {
	for i := from; i < to; i++ {
		if u.has(i) {
			return true
		}
	}
	return false
}

func (u URI) hasLabel() bool { return u.has(tokenAttributes) }
func (u URI) hasID() bool    { return u.has(tokenAttributes + 1) }

// object returns the attributes that name an object: those that may be kept.
func (u URI) object() URI {
	return URI{Token: u.Token, Object: u.Object, ID: u.ID, Type: u.Type, empty: u.empty >> tokenAttributes << tokenAttributes}
}

// isNamed reports whether a module's file has a name, which is "without
// system-specific affixes" (RFC 7512 §2.4): a "lib" before it and a ".so" after.
func isNamed(path, name string) bool {
	file := strings.ToLower(filepath.Base(path))
	base, isLibrary := strings.CutSuffix(file, ".so")
	return isLibrary && (base == name || base == "lib"+name)
}

// parseAddress is ParseURI as a Driver wants it.
func parseAddress(s string) (engine.Address, error) {
	u, err := ParseURI(s)
	if err != nil {
		return nil, err
	}
	return u, nil
}
