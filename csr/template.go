package csr

import (
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
)

// RequestTemplate is what a server has written of a request already (RFC 9908 §3.4).
//
//	CertificationRequestInfoTemplate ::= SEQUENCE {
//	  version INTEGER { v1(0) }, subject NameTemplate OPTIONAL,
//	  subjectPKInfo [0] SubjectPublicKeyInfoTemplate OPTIONAL, attributes [1] Attributes }
//	SubjectPublicKeyInfoTemplate ::= SEQUENCE { algorithm AlgorithmIdentifier, subjectPublicKey BIT STRING OPTIONAL }
type RequestTemplate struct {
	// Subject; nil leaves it to the client.
	Subject *NameTemplate
	// Key; the zero one leaves it to the client.
	Key WantedKey
	// Attributes of the request, extensionRequest and the like.
	Attributes Attributes
}

// NameTemplate is a name some of whose values are left to the client, in the order
// of its DER.
//
//	NameTemplate ::= SEQUENCE OF SET SIZE (1..MAX) OF SEQUENCE { type OBJECT IDENTIFIER, value ANY OPTIONAL }
type NameTemplate [][]NamePart

// NamePart is an attribute of a name. Value is DER; nil leaves it to the client.
type NamePart struct {
	Type  asn1.ObjectIdentifier
	Value []byte
}

// ExtensionTemplate is an extension; a nil Value leaves it to the client.
//
//	ExtensionReqTemplate ::= SEQUENCE SIZE (1..MAX) OF SEQUENCE {
//	  extnID OBJECT IDENTIFIER, critical BOOLEAN DEFAULT FALSE, extnValue OCTET STRING OPTIONAL }
type ExtensionTemplate pkix.Extension

// WantExtensionTemplate is the attribute of a RequestTemplate that asks for extensions
// some of whose values are left to the client (RFC 9908 §3.4).
func WantExtensionTemplate(extensions []ExtensionTemplate) (Attribute, error) {
	var content []byte
	for _, extension := range extensions {
		var err error
		var der []byte
		if extension.Value != nil {
			der, err = asn1.Marshal(pkix.Extension(extension))
		} else {
			der, err = asn1.Marshal(struct {
				ID       asn1.ObjectIdentifier
				Critical bool `asn1:"optional"`
			}{extension.Id, extension.Critical})
		}
		if err != nil {
			return Attribute{}, err
		}
		content = append(content, der...)
	}
	return Attribute{Type: mustOID(oidExtensionTemplate), Values: [][]byte{wrap(asn1.TagSequence, content)}}, nil
}

func (t RequestTemplate) marshal() ([]byte, error) {
	content, err := asn1.Marshal(0)
	if err != nil {
		return nil, err
	}
	if t.Subject != nil {
		subject, err := t.Subject.marshal()
		if err != nil {
			return nil, err
		}
		content = append(content, subject...)
	}
	if !t.Key.IsZero() {
		key, err := t.Key.subjectPublicKeyInfo()
		if err != nil {
			return nil, err
		}
		content = append(content, wrapAs(asn1.ClassContextSpecific, 0, true, key)...)
	}
	attributes, err := t.Attributes.content()
	if err != nil {
		return nil, err
	}
	return wrap(asn1.TagSequence, append(content, wrapAs(asn1.ClassContextSpecific, 1, true, attributes)...)), nil
}

func (n NameTemplate) marshal() ([]byte, error) {
	var name []byte
	for _, rdn := range n {
		var set []byte
		for _, part := range rdn {
			oid, err := asn1.Marshal(part.Type)
			if err != nil {
				return nil, err
			}
			set = append(set, wrap(asn1.TagSequence, append(oid, part.Value...))...)
		}
		name = append(name, wrap(asn1.TagSet, set)...)
	}
	return wrap(asn1.TagSequence, name), nil
}

func parseRequestTemplate(der []byte) (t RequestTemplate, err error) {
	content, err := readOne(der, asn1.TagSequence)
	if err != nil {
		return t, err
	}
	parts, err := readAll(content)
	if err != nil {
		return t, err
	}
	if len(parts) == 0 || !isUniversal(parts[0], asn1.TagInteger) || len(parts[0].Bytes) != 1 || parts[0].Bytes[0] != 0 {
		return t, errors.New("not version 1")
	}
	parts = parts[1:]
	if len(parts) > 0 && isUniversal(parts[0], asn1.TagSequence) {
		name, err := parseNameTemplate(parts[0].Bytes)
		if err != nil {
			return t, fmt.Errorf("subject: %w", err)
		}
		t.Subject, parts = &name, parts[1:]
	}
	if len(parts) > 0 && isContext(parts[0], 0) {
		if t.Key, err = parseKeyTemplate(parts[0].Bytes); err != nil {
			return t, fmt.Errorf("subjectPKInfo: %w", err)
		}
		parts = parts[1:]
	}
	if len(parts) > 0 && isContext(parts[0], 1) {
		if t.Attributes, err = readAttributes(parts[0].Bytes); err != nil {
			return t, fmt.Errorf("attributes: %w", err)
		}
		parts = parts[1:]
	}
	if len(parts) > 0 {
		return t, errors.New("more in it than there is in a template")
	}
	return t, nil
}

// isContext reports a constructed value with a context-specific tag.
func isContext(value asn1.RawValue, tag int) bool {
	return value.Class == asn1.ClassContextSpecific && value.Tag == tag && value.IsCompound
}

func parseNameTemplate(content []byte) (NameTemplate, error) {
	rdns, err := readAll(content)
	if err != nil {
		return nil, err
	}
	name := make(NameTemplate, len(rdns))
	for i, rdn := range rdns {
		if !isUniversal(rdn, asn1.TagSet) {
			return nil, errors.New("not a list of sets")
		}
		parts, err := readAll(rdn.Bytes)
		if err != nil {
			return nil, err
		}
		for _, element := range parts {
			part, err := parseNamePart(element)
			if err != nil {
				return nil, err
			}
			name[i] = append(name[i], part)
		}
		if len(name[i]) == 0 {
			return nil, errors.New("an empty set")
		}
	}
	return name, nil
}

func parseNamePart(element asn1.RawValue) (part NamePart, err error) {
	fields, err := readAll(element.Bytes)
	if err != nil {
		return part, err
	}
	if !isUniversal(element, asn1.TagSequence) || len(fields) < 1 || len(fields) > 2 {
		return part, errors.New("not a type and a value")
	}
	if _, err := asn1.Unmarshal(fields[0].FullBytes, &part.Type); err != nil {
		return part, err
	}
	if len(fields) == 2 {
		part.Value = fields[1].FullBytes
	}
	return part, nil
}

// parseKeyTemplate reads a SubjectPublicKeyInfoTemplate. The size of an RSA key is
// that of the placeholder in it, which is not a key to use (RFC 9908 §3.4).
func parseKeyTemplate(content []byte) (key WantedKey, err error) {
	parts, err := readAll(content)
	if err != nil {
		return key, err
	}
	if len(parts) < 1 || len(parts) > 2 {
		return key, errors.New("not an algorithm and a key")
	}
	var algorithm pkix.AlgorithmIdentifier
	if _, err := asn1.Unmarshal(parts[0].FullBytes, &algorithm); err != nil {
		return key, err
	}
	switch {
	case algorithm.Algorithm.Equal(oidECPublicKey) && isUniversal(algorithm.Parameters, asn1.TagOID):
		return curveKey(algorithm.Parameters.FullBytes)
	case algorithm.Algorithm.Equal(oidECPublicKey):
		return WantedKey{Family: familyEC}, nil
	case !algorithm.Algorithm.Equal(oidRSAEncryption):
		return WantedKey{Family: familyOf(algorithm.Algorithm)}, nil
	}
	if len(parts) == 1 {
		return WantedKey{Family: familyRSA}, nil
	}
	var placeholder asn1.BitString
	if _, err := asn1.Unmarshal(parts[1].FullBytes, &placeholder); err != nil {
		return key, err
	}
	var public struct{ N, E *big.Int }
	if _, err := asn1.Unmarshal(placeholder.RightAlign(), &public); err != nil {
		return key, err
	}
	return rsaKey(public.N.BitLen())
}

// subjectPublicKeyInfo is the content of a SubjectPublicKeyInfoTemplate.
func (k WantedKey) subjectPublicKeyInfo() ([]byte, error) {
	oid, parameter, err := k.encode()
	if err != nil {
		return nil, err
	}
	algorithm := pkix.AlgorithmIdentifier{Algorithm: oid, Parameters: asn1.RawValue{FullBytes: parameter}}
	if k.Family != familyRSA {
		return asn1.Marshal(algorithm)
	}
	algorithm.Parameters = asn1.NullRawValue
	der, err := asn1.Marshal(algorithm)
	if err != nil || parameter == nil {
		return der, err
	}
	var bits int
	if _, err := asn1.Unmarshal(parameter, &bits); err != nil {
		return nil, err
	}
	// Odd and of the size, and nobody's key: 2^(bits-1) + 1.
	modulus := new(big.Int).SetBit(big.NewInt(1), bits-1, 1)
	placeholder := x509.MarshalPKCS1PublicKey(&rsa.PublicKey{N: modulus, E: 65537})
	key, err := asn1.Marshal(asn1.BitString{Bytes: placeholder, BitLength: 8 * len(placeholder)})
	return append(der, key...), err
}
