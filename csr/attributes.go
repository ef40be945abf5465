package csr

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
)

// Limits of what a server may want.
const (
	maxAttributes = 16 << 10 // bytes
	maxElements   = 256      // of one SEQUENCE or SET
)

// Attributes are what a server wants to find in a CSR, in its order (RFC 7030
// §4.5.2, RFC 9908 §3). What they mean is told by Wanted.
//
//	CsrAttrs  ::= SEQUENCE SIZE (0..MAX) OF AttrOrOID
//	AttrOrOID ::= CHOICE { oid OBJECT IDENTIFIER, attribute Attribute }
//	Attribute ::= SEQUENCE { type OBJECT IDENTIFIER, values SET OF ANY }
type Attributes []Attribute

// Attribute is an OID on its own, or an attribute with its values. Its arcs are of
// any size: what is unknown is ignored, not refused (RFC 7030 §4.5.2).
type Attribute struct {
	Type x509.OID
	// Values in DER; nil for an OID on its own.
	Values [][]byte
}

// ParseAttributes parses DER of at most 16 KiB with at most 256 elements, and
// nothing after the end.
func ParseAttributes(der []byte) (Attributes, error) {
	attributes, err := parseAttributes(der)
	if err != nil {
		return nil, fmt.Errorf("CSR attributes: %w", err)
	}
	return attributes, nil
}

func parseAttributes(der []byte) (Attributes, error) {
	if len(der) > maxAttributes {
		return nil, fmt.Errorf("%d bytes, more than %d", len(der), maxAttributes)
	}
	content, err := readOne(der, asn1.TagSequence)
	if err != nil {
		return nil, err
	}
	return readAttributes(content)
}

// Marshal is the reverse of ParseAttributes.
func (a Attributes) Marshal() ([]byte, error) {
	content, err := a.content()
	if err != nil {
		return nil, fmt.Errorf("CSR attributes: %w", err)
	}
	return wrap(asn1.TagSequence, content), nil
}

func (a Attributes) content() ([]byte, error) {
	var content []byte
	for _, attribute := range a {
		der, err := attribute.marshal()
		if err != nil {
			return nil, err
		}
		content = append(content, der...)
	}
	return content, nil
}

func (a Attribute) marshal() ([]byte, error) {
	oid, err := a.Type.MarshalBinary()
	if err != nil || len(oid) == 0 {
		return nil, errors.New("an attribute without a type")
	}
	der := wrap(asn1.TagOID, oid)
	if a.Values == nil {
		return der, nil
	}
	var values []byte
	for _, value := range a.Values {
		values = append(values, value...)
	}
	return wrap(asn1.TagSequence, append(der, wrap(asn1.TagSet, values)...)), nil
}

// is reports whether the attribute is of a type.
func (a Attribute) is(oid asn1.ObjectIdentifier) bool { return a.Type.EqualASN1OID(oid) }

// The attributes that this package knows.
var (
	oidChallengePassword = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}         // RFC 2985 §5.4.1
	oidExtensionRequest  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}        // RFC 2985 §5.4.2
	oidRequestTemplate   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 61} // RFC 9908 §3.4
	oidExtensionTemplate = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 62} // RFC 9908 §3.4
	oidECPublicKey       = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}             // RFC 5480 §2.1.1
	oidRSAEncryption     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}         // RFC 3279 §2.3.1
	oidSecp256r1         = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}          // RFC 5480 §2.1.1.1
	oidSecp384r1         = asn1.ObjectIdentifier{1, 3, 132, 0, 34}
	oidSecp521r1         = asn1.ObjectIdentifier{1, 3, 132, 0, 35}
)

// WantChallengePassword is the attribute that asks for a proof of possession that is
// linked to the session (RFC 7030 §3.5).
func WantChallengePassword() Attribute { return Attribute{Type: mustOID(oidChallengePassword)} }

// WantExtensions is the attribute that asks for extensions with their values
// (RFC 9908 §3.2).
func WantExtensions(extensions []pkix.Extension) (Attribute, error) {
	value, err := asn1.Marshal(extensions)
	return Attribute{Type: mustOID(oidExtensionRequest), Values: [][]byte{value}}, err
}

// WantKey is the attribute that asks for a kind of key (RFC 9908 §3.2).
func WantKey(key WantedKey) (Attribute, error) {
	oid, parameter, err := key.encode()
	if err != nil {
		return Attribute{}, err
	}
	attribute := Attribute{Type: mustOID(oid)}
	if parameter != nil {
		attribute.Values = [][]byte{parameter}
	}
	return attribute, nil
}

// WantRequest is the attribute that gives a template of the whole request
// (RFC 9908 §3.4).
func WantRequest(template RequestTemplate) (Attribute, error) {
	value, err := template.marshal()
	return Attribute{Type: mustOID(oidRequestTemplate), Values: [][]byte{value}}, err
}

// mustOID converts an OID of a table.
func mustOID(oid asn1.ObjectIdentifier) x509.OID {
	converted, err := x509.OIDFromASN1OID(oid)
	if err != nil {
		panic(err)
	}
	return converted
}

// readAttributes reads the elements of a CsrAttrs.
func readAttributes(content []byte) (Attributes, error) {
	elements, err := readAll(content)
	if err != nil {
		return nil, err
	}
	attributes := make(Attributes, len(elements))
	for i, element := range elements {
		if attributes[i], err = readAttribute(element); err != nil {
			return nil, fmt.Errorf("element %d: %w", i+1, err)
		}
	}
	return attributes, nil
}

func readAttribute(element asn1.RawValue) (attribute Attribute, err error) {
	if isUniversal(element, asn1.TagOID) {
		return attribute, attribute.Type.UnmarshalBinary(element.Bytes)
	}
	if !isUniversal(element, asn1.TagSequence) {
		return attribute, errors.New("neither an OID nor an attribute")
	}
	parts, err := readAll(element.Bytes)
	if err != nil {
		return attribute, err
	}
	if len(parts) != 2 || !isUniversal(parts[0], asn1.TagOID) || !isUniversal(parts[1], asn1.TagSet) {
		return attribute, errors.New("an attribute is not a type and its values")
	}
	if err := attribute.Type.UnmarshalBinary(parts[0].Bytes); err != nil {
		return attribute, err
	}
	values, err := readAll(parts[1].Bytes)
	if err != nil {
		return attribute, err
	}
	attribute.Values = make([][]byte, len(values))
	for i, value := range values {
		attribute.Values[i] = value.FullBytes
	}
	return attribute, nil
}

// readOne reads a value of a universal type that is all of der, and returns its content.
func readOne(der []byte, tag int) ([]byte, error) {
	var value asn1.RawValue
	rest, err := asn1.Unmarshal(der, &value)
	switch {
	case err != nil:
		return nil, err
	case len(rest) > 0:
		return nil, fmt.Errorf("%d bytes after the end", len(rest))
	case !isUniversal(value, tag):
		return nil, fmt.Errorf("tag %d, want %d", value.Tag, tag)
	}
	return value.Bytes, nil
}

// readAll reads the values that a constructed one is made of.
func readAll(content []byte) (values []asn1.RawValue, err error) {
	for len(content) > 0 {
		if len(values) == maxElements {
			return nil, fmt.Errorf("more than %d elements", maxElements)
		}
		var value asn1.RawValue
		if content, err = asn1.Unmarshal(content, &value); err != nil {
			return nil, err
		}
		values = append(values, value)
	}
	return values, nil
}

// isUniversal reports a value of a universal type in the form that DER gives it.
func isUniversal(value asn1.RawValue, tag int) bool {
	return value.Class == asn1.ClassUniversal && value.Tag == tag && value.IsCompound == (tag == asn1.TagSequence || tag == asn1.TagSet)
}

// wrap puts content into a universal type.
func wrap(tag int, content []byte) []byte {
	return wrapAs(asn1.ClassUniversal, tag, tag == asn1.TagSequence || tag == asn1.TagSet, content)
}

func wrapAs(class, tag int, compound bool, content []byte) []byte {
	der, err := asn1.Marshal(asn1.RawValue{Class: class, Tag: tag, IsCompound: compound, Bytes: content})
	if err != nil {
		panic(err) // a RawValue with a class and a tag of ours
	}
	return der
}
