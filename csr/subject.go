package csr

import (
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits of a Subject.
const (
	maxSubject   = 2048 // bytes of text
	maxAttribute = 64   // attributes
)

// attribute is a type of RFC 4514 §3 and what its value is encoded as.
type attribute struct {
	name string
	oid  asn1.ObjectIdentifier
	tag  int
}

// The names are those of RFC 4514 §3, with serialNumber, which IDevIDs carry
// (IEEE 802.1AR §8.6), and what else device subjects hold. The string types are
// RFC 5280's, appendix A.1: PrintableString for countryName, serialNumber and
// dnQualifier, IA5String for domainComponent and emailAddress.
var attributes = []attribute{
	{"CN", asn1.ObjectIdentifier{2, 5, 4, 3}, asn1.TagUTF8String},
	{"L", asn1.ObjectIdentifier{2, 5, 4, 7}, asn1.TagUTF8String},
	{"ST", asn1.ObjectIdentifier{2, 5, 4, 8}, asn1.TagUTF8String},
	{"O", asn1.ObjectIdentifier{2, 5, 4, 10}, asn1.TagUTF8String},
	{"OU", asn1.ObjectIdentifier{2, 5, 4, 11}, asn1.TagUTF8String},
	{"C", asn1.ObjectIdentifier{2, 5, 4, 6}, asn1.TagPrintableString},
	{"STREET", asn1.ObjectIdentifier{2, 5, 4, 9}, asn1.TagUTF8String},
	{"DC", oidDomainComponent, asn1.TagIA5String},
	{"UID", asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 1}, asn1.TagUTF8String},
	{"serialNumber", asn1.ObjectIdentifier{2, 5, 4, 5}, asn1.TagPrintableString},
	{"title", asn1.ObjectIdentifier{2, 5, 4, 12}, asn1.TagUTF8String},
	{"dnQualifier", asn1.ObjectIdentifier{2, 5, 4, 46}, asn1.TagPrintableString},
	{"emailAddress", asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}, asn1.TagIA5String},
}

type attributeTypeAndValue struct {
	Type  asn1.ObjectIdentifier
	Value asn1.RawValue
}

var oidDomainComponent = asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 25}

// encoding/asn1 makes a SET of it for its name.
type relativeDistinguishedNameSET []attributeTypeAndValue

// ParseSubject parses the string form of a name (RFC 4514 §3) to DER. The string
// begins with the last RDN of the DER: "CN=dev,O=Example" encodes O first. A type
// without a short name is written as its OID; "#" begins a value in hexadecimal
// BER; a space after a comma is allowed, as people write it.
func ParseSubject(s string) ([]byte, error) {
	switch {
	case len(s) > maxSubject:
		return nil, fmt.Errorf("subject: %d bytes, more than %d", len(s), maxSubject)
	case s == "":
		return nil, errors.New("subject: empty")
	case !utf8.ValidString(s):
		return nil, errors.New("subject: not UTF-8")
	}
	var name []relativeDistinguishedNameSET
	var rdn relativeDistinguishedNameSET
	for count := 1; ; count++ {
		if count > maxAttribute {
			return nil, fmt.Errorf("subject: more than %d attributes", maxAttribute)
		}
		atv, separator, rest, err := parseAttribute(s)
		if err != nil {
			return nil, fmt.Errorf("subject: attribute %d: %w", count, err)
		}
		rdn, s = append(rdn, atv), rest
		if separator == '+' {
			continue
		}
		name, rdn = append(name, rdn), nil
		if separator == 0 {
			break
		}
	}
	slices.Reverse(name) // RFC 4514 §2.1
	var content []byte
	for _, rdn := range name {
		der, err := asn1.Marshal(rdn)
		if err != nil {
			return nil, fmt.Errorf("subject: %w", err)
		}
		content = append(content, der...)
	}
	return sequence(content)
}

func sequence(content []byte) ([]byte, error) {
	return asn1.Marshal(asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSequence, IsCompound: true, Bytes: content})
}

// parseAttribute parses up to an unescaped ',' or '+', which it returns as the
// separator, or to the end, where that is 0.
func parseAttribute(s string) (atv attributeTypeAndValue, separator byte, rest string, err error) {
	typeText, s, found := strings.Cut(s, "=")
	if !found {
		return atv, 0, "", errors.New("no '='")
	}
	kind, err := parseType(strings.TrimLeft(typeText, " "))
	if err != nil {
		return atv, 0, "", err
	}
	atv.Type = kind.oid
	if strings.HasPrefix(s, "#") {
		atv.Value, separator, rest, err = parseHexValue(s[1:])
	} else {
		var value []byte
		if value, separator, rest, err = parseString(s); err == nil {
			atv.Value, err = encodeValue(kind, value)
		}
	}
	if err != nil {
		return atv, 0, "", fmt.Errorf("%.40s: %w", typeText, err)
	}
	return atv, separator, rest, nil
}

func parseType(text string) (attribute, error) {
	for _, known := range attributes {
		if strings.EqualFold(text, known.name) {
			return known, nil
		}
	}
	oid, err := parseOID(text)
	if err != nil {
		return attribute{}, fmt.Errorf("unknown type %.40q", text)
	}
	for _, known := range attributes {
		if known.oid.Equal(oid) {
			return known, nil
		}
	}
	return attribute{oid: oid, tag: asn1.TagUTF8String}, nil
}

func parseOID(text string) (asn1.ObjectIdentifier, error) {
	var oid asn1.ObjectIdentifier
	for arc := range strings.SplitSeq(text, ".") {
		n, err := strconv.ParseUint(arc, 10, 31)
		if err != nil || arc != strconv.FormatUint(n, 10) {
			return nil, errors.New("not an OID")
		}
		oid = append(oid, int(n))
	}
	if _, err := asn1.Marshal(oid); err != nil {
		return nil, errors.New("not an OID")
	}
	return oid, nil
}

func parseHexValue(s string) (value asn1.RawValue, separator byte, rest string, err error) {
	end := strings.IndexAny(s, ",+")
	if end < 0 {
		end = len(s)
	} else {
		separator, rest = s[end], s[end+1:]
	}
	der, err := hex.DecodeString(s[:end])
	if err != nil {
		return value, 0, "", errors.New("the value after '#' is not hexadecimal")
	}
	if left, err := asn1.Unmarshal(der, &value); err != nil || len(left) > 0 {
		return value, 0, "", errors.New("the value after '#' is not one BER value")
	}
	return value, separator, rest, nil
}

// parseString unescapes a value (RFC 4514 §3).
func parseString(s string) (value []byte, separator byte, rest string, err error) {
	escaped := 0 // up to here a space at the end belongs to the value
scan:
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case ',', '+':
			separator, rest = c, s[i+1:]
			break scan
		case '\\':
			n, unescaped, err := unescape(s[i+1:])
			if err != nil {
				return nil, 0, "", err
			}
			value = append(value, unescaped)
			escaped, i = len(value), i+n
		case '"', ';', '<', '>', 0:
			return nil, 0, "", fmt.Errorf("%q must be escaped", c)
		case ' ':
			if len(value) == 0 {
				return nil, 0, "", errors.New("a space at the start must be escaped")
			}
			value = append(value, c)
		default:
			value = append(value, c)
		}
	}
	switch {
	case len(value) == 0:
		return nil, 0, "", errors.New("empty value")
	case len(value) > escaped && value[len(value)-1] == ' ':
		return nil, 0, "", errors.New("a space at the end must be escaped")
	}
	return value, separator, rest, nil
}

func unescape(s string) (n int, c byte, err error) {
	if s != "" && strings.IndexByte(` "#+,;<=>\`, s[0]) >= 0 {
		return 1, s[0], nil
	}
	if len(s) >= 2 {
		if b, err := hex.DecodeString(s[:2]); err == nil {
			return 2, b[0], nil
		}
	}
	return 0, 0, errors.New(`a "\" must be followed by a special character or two hexadecimal digits`)
}

func encodeValue(kind attribute, value []byte) (asn1.RawValue, error) {
	if !utf8.Valid(value) {
		return asn1.RawValue{}, errors.New("not UTF-8")
	}
	switch kind.tag {
	case asn1.TagPrintableString:
		if i := slices.IndexFunc(value, func(b byte) bool { return !isPrintable(b) }); i >= 0 {
			return asn1.RawValue{}, fmt.Errorf("%q cannot stand in a PrintableString", value[i])
		}
	case asn1.TagIA5String:
		if slices.ContainsFunc(value, func(b byte) bool { return b >= utf8.RuneSelf }) {
			return asn1.RawValue{}, errors.New("not ASCII")
		}
	}
	if kind.name == "C" && len(value) != 2 {
		return asn1.RawValue{}, errors.New("a country is two letters") // RFC 5280 appendix A.1
	}
	return asn1.RawValue{Class: asn1.ClassUniversal, Tag: kind.tag, Bytes: value}, nil
}

// isPrintable holds the alphabet of PrintableString (X.680 §41.4).
func isPrintable(b byte) bool {
	return 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || strings.IndexByte(" '()+,-./:=?", b) >= 0
}

// FormatSubject returns the string form of a DER name (RFC 4514 §2). What has
// none is shown in hexadecimal.
func FormatSubject(der []byte) string {
	var name []asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &name); err != nil || len(rest) > 0 {
		return "#" + hex.EncodeToString(der)
	}
	rdns := make([]string, 0, len(name))
	for _, set := range slices.Backward(name) {
		var rdn relativeDistinguishedNameSET
		if rest, err := asn1.Unmarshal(set.FullBytes, &rdn); err != nil || len(rest) > 0 {
			return "#" + hex.EncodeToString(der)
		}
		parts := make([]string, len(rdn))
		for i, atv := range rdn {
			parts[i] = formatAttribute(atv)
		}
		rdns = append(rdns, strings.Join(parts, "+"))
	}
	return strings.Join(rdns, ",")
}

func formatAttribute(atv attributeTypeAndValue) string {
	isText := atv.Value.Class == asn1.ClassUniversal && len(atv.Value.Bytes) > 0 && utf8.Valid(atv.Value.Bytes) &&
		slices.Contains([]int{asn1.TagUTF8String, asn1.TagPrintableString, asn1.TagIA5String}, atv.Value.Tag)
	for _, known := range attributes {
		if isText && known.oid.Equal(atv.Type) {
			return known.name + "=" + escapeValue(string(atv.Value.Bytes))
		}
	}
	// RFC 4514 §2.4: with an OID as the type goes the BER of the value.
	return atv.Type.String() + "=#" + hex.EncodeToString(atv.Value.FullBytes)
}

func escapeValue(value string) string {
	var out strings.Builder
	for i, r := range value {
		switch {
		case strings.ContainsRune(`"+,;<>\`, r), r == '#' && i == 0, r == ' ' && (i == 0 || i == len(value)-1):
			out.WriteByte('\\')
			out.WriteRune(r)
		case !unicode.IsPrint(r):
			// A name from the network must not steer a terminal: control
			// characters, and those that turn the direction of writing.
			for _, b := range []byte(string(r)) {
				fmt.Fprintf(&out, `\%02x`, b)
			}
		default:
			out.WriteRune(r)
		}
	}
	return out.String()
}
