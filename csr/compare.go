package csr

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"
)

// A Difference is a name that a certificate was issued with beside the one that
// its CSR asked for, both printable.
type Difference struct {
	Field         string // "Subject" or "SAN"
	Asked, Issued string
}

// CompareNames returns in which names an issued certificate is not what its CSR
// asked for. Names that differ only in what RFC 5280 §7 lets differ are the same.
func CompareNames(request *x509.CertificateRequest, issued *x509.Certificate) []Difference {
	var differences []Difference
	if !EqualSubject(request.RawSubject, issued.RawSubject) {
		differences = append(differences, Difference{"Subject", FormatSubject(request.RawSubject), FormatSubject(issued.RawSubject)})
	}
	asked, got := extension(request.Extensions, OIDSubjectAltName), extension(issued.Extensions, OIDSubjectAltName)
	if !equalSAN(asked, got) {
		differences = append(differences, Difference{"SAN", formatSAN(asked), formatSAN(got)})
	}
	return differences
}

// Describes reports whether a request is one that Build makes of the template with
// the request's key: it asks for the same bytes and is signed in the same way.
func (t Template) Describes(request *x509.CertificateRequest) (bool, error) {
	extensions, err := t.Extensions()
	if err != nil {
		return false, err
	}
	own, err := t.ownAttributes()
	if err != nil {
		return false, err
	}
	algorithm, err := t.signature(request.PublicKey)
	if err != nil {
		return false, nil // it was made by another template
	}
	return bytes.Equal(t.subject(), request.RawSubject) && request.SignatureAlgorithm == algorithm.name && ChallengePassword(request) == t.ChallengePassword &&
		own.describe(request) &&
		slices.EqualFunc(extensions, request.Extensions, func(a, b pkix.Extension) bool {
			return a.Id.Equal(b.Id) && a.Critical == b.Critical && bytes.Equal(a.Value, b.Value)
		}), nil
}

// describe reports whether a request has these attributes and no others, but for those
// that have a place of their own in a template; their order means nothing.
func (a Attributes) describe(request *x509.CertificateRequest) bool {
	others := slices.DeleteFunc(RequestAttributes(request), func(one Attribute) bool { return one.is(oidExtensionRequest) || one.is(oidChallengePassword) })
	return equalSets(a, others, func(x, y Attribute) bool {
		return x.Type.Equal(y.Type) && slices.EqualFunc(x.Values, y.Values, bytes.Equal)
	})
}

// EqualSubject compares two names in DER: their bytes, or else RDN by RDN in
// their order, where an attribute's text may differ in its string type, in case
// and in the number of spaces (RFC 5280 §7.1). Deviation: without the Unicode
// normalization of RFC 4518 §2.3, so two such spellings are different names.
func EqualSubject(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	x, readX := parseName(a)
	y, readY := parseName(b)
	return readX && readY && slices.EqualFunc(x, y, func(x, y relativeDistinguishedNameSET) bool {
		return equalSets(x, y, equalAttribute)
	})
}

func parseName(der []byte) (name []relativeDistinguishedNameSET, read bool) {
	rest, err := asn1.Unmarshal(der, &name)
	return name, err == nil && len(rest) == 0
}

func equalAttribute(a, b attributeTypeAndValue) bool {
	if !a.Type.Equal(b.Type) {
		return false
	}
	if bytes.Equal(a.Value.FullBytes, b.Value.FullBytes) {
		return true
	}
	x, foldsX := foldedText(a)
	y, foldsY := foldedText(b)
	return foldsX && foldsY && strings.EqualFold(x, y)
}

// foldedText is a value that is compared without case: PrintableString and
// UTF8String (RFC 5280 §7.1), and the IA5String of a domainComponent (§7.3).
func foldedText(atv attributeTypeAndValue) (text string, folds bool) {
	value := atv.Value
	switch {
	case value.Class != asn1.ClassUniversal || !utf8.Valid(value.Bytes):
		return "", false
	case value.Tag == asn1.TagPrintableString, value.Tag == asn1.TagUTF8String:
		return strings.Join(strings.Fields(string(value.Bytes)), " "), true
	case value.Tag == asn1.TagIA5String && atv.Type.Equal(oidDomainComponent):
		return string(value.Bytes), true
	}
	return "", false
}

// equalSAN compares as sets: the order of GeneralNames means nothing.
func equalSAN(a, b *pkix.Extension) bool {
	if a == nil || b == nil {
		return a == b
	}
	if bytes.Equal(a.Value, b.Value) {
		return true
	}
	x, readX := parseGeneralNames(a.Value)
	y, readY := parseGeneralNames(b.Value)
	return readX && readY && equalSets(x, y, func(x, y asn1.RawValue) bool {
		// RFC 5280 §7.2: DNS names are compared without case.
		return bytes.Equal(x.FullBytes, y.FullBytes) || x.Class == y.Class && x.Tag == y.Tag && x.Tag == tagDNSName && strings.EqualFold(string(x.Bytes), string(y.Bytes))
	})
}

func parseGeneralNames(der []byte) (names []asn1.RawValue, read bool) {
	rest, err := asn1.Unmarshal(der, &names)
	return names, err == nil && len(rest) == 0
}

// equalSets compares by an equivalence, so the first partner is as good as any.
func equalSets[T any](a, b []T, equal func(a, b T) bool) bool {
	if len(a) != len(b) {
		return false
	}
	left := slices.Clone(b)
	for _, x := range a {
		i := slices.IndexFunc(left, func(y T) bool { return equal(x, y) })
		if i < 0 {
			return false
		}
		left = slices.Delete(left, i, i+1)
	}
	return true
}

// formatSAN returns the SANs as ParseSAN takes them; what it does not take is
// shown in hexadecimal.
func formatSAN(extension *pkix.Extension) string {
	if extension == nil {
		return ""
	}
	names, read := parseGeneralNames(extension.Value)
	if !read {
		return "#" + hex.EncodeToString(extension.Value)
	}
	texts := make([]string, len(names))
	for i, name := range names {
		texts[i] = formatGeneralName(name)
	}
	return strings.Join(texts, ",")
}

func formatGeneralName(name asn1.RawValue) string {
	switch {
	case name.Class != asn1.ClassContextSpecific || !utf8.Valid(name.Bytes) && name.Tag != tagIPAddress:
	case name.Tag == tagDNSName:
		return "DNS:" + escapeValue(string(name.Bytes))
	case name.Tag == tagURI:
		return "URI:" + escapeValue(string(name.Bytes))
	case name.Tag == tagIPAddress:
		if address, ok := netip.AddrFromSlice(name.Bytes); ok {
			return "IP:" + address.String()
		}
	}
	return "#" + hex.EncodeToString(name.FullBytes)
}
