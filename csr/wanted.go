package csr

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strconv"
)

var (
	// ErrContradictory says that a server wants two things of which a CSR has one.
	ErrContradictory = errors.New("the server wants two things at once")
	// ErrNoValue says that a server leaves a value to the client, which has none.
	ErrNoValue = errors.New("the server leaves to us what we do not have")
)

// Wanted is what Attributes come to.
type Wanted struct {
	// ChallengePassword asks for a proof of possession that is linked to the session
	// (RFC 7030 §3.5).
	ChallengePassword bool
	// Key that is to be certified.
	Key WantedKey
	// Hash of the request's signature, 0 for any.
	Hash crypto.Hash
	// Subject that is to be asked for, nil for any.
	Subject *NameTemplate
	// Extensions that are to be asked for, each once, in the server's order.
	Extensions []ExtensionTemplate

	family string // of keys that make the signature wanted
}

// WantedKey is a kind of key. The zero one is any.
type WantedKey struct {
	// Family is "EC" or "RSA", or the OID of another.
	Family string
	// Size is the name of the curve, such as "P-384", or its OID, or the bits of the
	// modulus; "" is any.
	Size string
}

// The families of keys with a name.
const (
	familyEC  = "EC"
	familyRSA = "RSA"
)

const maxModulus = 16384 // bits that are worth a name

var wantedCurves = []struct {
	name string
	oid  asn1.ObjectIdentifier
}{{"P-256", oidSecp256r1}, {"P-384", oidSecp384r1}, {"P-521", oidSecp521r1}}

// IsZero reports a kind that any key is of.
func (k WantedKey) IsZero() bool { return k == WantedKey{} }

// String returns "EC P-384", "RSA 3072", or the family alone.
func (k WantedKey) String() string {
	if k.Size == "" {
		return k.Family
	}
	return k.Family + " " + k.Size
}

// Allows reports whether a key of this kind would do, by its name such as "EC P-384".
func (k WantedKey) Allows(name string) bool {
	return k.IsZero() || name == k.String() || k.Size == "" && len(name) > len(k.Family) && name[:len(k.Family)+1] == k.Family+" "
}

// encode returns the OID of the family and the DER of the size, nil for any.
func (k WantedKey) encode() (oid asn1.ObjectIdentifier, parameter []byte, err error) {
	switch k.Family {
	case familyRSA:
		if k.Size == "" {
			return oidRSAEncryption, nil, nil
		}
		bits, err := strconv.Atoi(k.Size)
		if err != nil || bits < 1 || bits > maxModulus {
			return nil, nil, fmt.Errorf("RSA key of %q bits", k.Size)
		}
		parameter, err = asn1.Marshal(bits)
		return oidRSAEncryption, parameter, err
	case familyEC:
		if k.Size == "" {
			return oidECPublicKey, nil, nil
		}
		for _, known := range wantedCurves {
			if known.name == k.Size {
				oid = known.oid
			}
		}
		if oid == nil {
			if oid, err = parseOID(k.Size); err != nil {
				return nil, nil, fmt.Errorf("curve %q: %w", k.Size, err)
			}
		}
		parameter, err = asn1.Marshal(oid)
		return oidECPublicKey, parameter, err
	}
	oid, err = parseOID(k.Family)
	return oid, nil, err
}

func curveKey(der []byte) (WantedKey, error) {
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(der, &oid); err != nil || len(rest) > 0 {
		return WantedKey{}, errors.New("the curve is not an OID")
	}
	for _, known := range wantedCurves {
		if known.oid.Equal(oid) {
			return WantedKey{familyEC, known.name}, nil
		}
	}
	return WantedKey{familyEC, oid.String()}, nil
}

func rsaKey(bits int) (WantedKey, error) {
	if bits < 1 || bits > maxModulus {
		return WantedKey{}, fmt.Errorf("an RSA key of %d bits", bits)
	}
	return WantedKey{familyRSA, strconv.Itoa(bits)}, nil
}

// Wanted reads what the attributes mean. An OID or an attribute that is not known is
// ignored (RFC 7030 §4.5.2). Where there is a template of the whole request, it is
// all that counts (RFC 9908 §4). ErrContradictory.
func (a Attributes) Wanted() (Wanted, error) {
	var w Wanted
	err := w.readTemplate(a)
	if err == nil && w.family != "" && !w.Key.IsZero() && w.Key.Family != w.family {
		err = fmt.Errorf("a key of type %s and a signature of one of type %s: %w", w.Key, w.family, ErrContradictory)
	}
	if err != nil {
		return Wanted{}, fmt.Errorf("CSR attributes: %w", err)
	}
	if w.Key.IsZero() {
		w.Key.Family = w.family
	}
	return w, nil
}

func (w *Wanted) readTemplate(a Attributes) error {
	var template *RequestTemplate
	for _, attribute := range a {
		if !attribute.is(oidRequestTemplate) {
			continue
		}
		if template != nil || len(attribute.Values) != 1 {
			return fmt.Errorf("more or less than one template of a request: %w", ErrContradictory)
		}
		parsed, err := parseRequestTemplate(attribute.Values[0])
		if err != nil {
			return fmt.Errorf("template of a request: %w", err)
		}
		template = &parsed
	}
	if template == nil {
		return w.read(a)
	}
	w.Subject, w.Key = template.Subject, template.Key
	return w.read(template.Attributes)
}

// read reads attributes that are no templates of a request.
func (w *Wanted) read(a Attributes) error {
	for _, attribute := range a {
		var err error
		switch {
		case attribute.is(oidChallengePassword):
			w.ChallengePassword = true
		case attribute.is(oidECPublicKey), attribute.is(oidRSAEncryption):
			err = w.readKey(attribute)
		case attribute.is(oidExtensionRequest), attribute.is(oidExtensionTemplate):
			for _, value := range attribute.Values {
				if err := w.readExtensions(value); err != nil {
					return err
				}
			}
		case attribute.Values == nil:
			err = w.readName(attribute.Type)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *Wanted) readKey(attribute Attribute) (err error) {
	key := WantedKey{Family: familyRSA}
	if attribute.is(oidECPublicKey) {
		key.Family = familyEC
	}
	switch {
	case len(attribute.Values) > 1:
		return fmt.Errorf("keys of several sizes: %w", ErrContradictory)
	case len(attribute.Values) == 1 && key.Family == familyEC:
		key, err = curveKey(attribute.Values[0])
	case len(attribute.Values) == 1:
		var bits int
		if _, err := asn1.Unmarshal(attribute.Values[0], &bits); err != nil {
			return fmt.Errorf("size of an RSA key: %w", err)
		}
		key, err = rsaKey(bits)
	}
	if err == nil && !w.Key.IsZero() && w.Key != key {
		err = fmt.Errorf("keys of type %s and of type %s: %w", w.Key, key, ErrContradictory)
	}
	w.Key = key
	return err
}

// readExtensions reads a value of extensionRequest or of its template. The OIDs of
// extensions in the place of extensions are what the example of RFC 7030 §4.5.2, and
// servers that follow it, have there: their values are left to the client.
func (w *Wanted) readExtensions(value []byte) error {
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(value, &oid); err == nil && len(rest) == 0 {
		return w.want(ExtensionTemplate{Id: oid})
	}
	content, err := readOne(value, asn1.TagSequence)
	if err != nil {
		return fmt.Errorf("extensions: %w", err)
	}
	elements, err := readAll(content)
	if err != nil {
		return fmt.Errorf("extensions: %w", err)
	}
	for _, element := range elements {
		var extension struct {
			ID       asn1.ObjectIdentifier
			Critical bool          `asn1:"optional"`
			Value    asn1.RawValue `asn1:"optional"`
		}
		if _, err := asn1.Unmarshal(element.FullBytes, &extension); err != nil {
			return fmt.Errorf("extensions: %w", err)
		}
		wanted := ExtensionTemplate{Id: extension.ID, Critical: extension.Critical}
		if len(extension.Value.FullBytes) > 0 {
			if !isUniversal(extension.Value, asn1.TagOctetString) {
				return fmt.Errorf("extension %s: its value is no OCTET STRING", extension.ID)
			}
			wanted.Value = append([]byte{}, extension.Value.Bytes...)
		}
		if err := w.want(wanted); err != nil {
			return err
		}
	}
	return nil
}

// want adds an extension. One that is wanted twice is wanted once, with the value.
func (w *Wanted) want(extension ExtensionTemplate) error {
	for i := range w.Extensions {
		known := &w.Extensions[i]
		switch {
		case !known.Id.Equal(extension.Id):
			continue
		case known.Value == nil:
			*known = extension
		case extension.Value != nil && !(bytes.Equal(known.Value, extension.Value) && known.Critical == extension.Critical):
			return fmt.Errorf("extension %s with two values: %w", extension.Id, ErrContradictory)
		}
		return nil
	}
	w.Extensions = append(w.Extensions, extension)
	return nil
}

// readName reads an OID on its own: a signature, an extension or a part of the
// Subject that is wanted, with a value of the client's.
func (w *Wanted) readName(oid x509.OID) error {
	for _, known := range signatureAlgorithms {
		if !oid.EqualASN1OID(known.oid) {
			continue
		}
		if w.Hash != 0 && (w.Hash != known.hash || w.family != known.family) {
			return fmt.Errorf("two kinds of signature: %w", ErrContradictory)
		}
		w.Hash, w.family = known.hash, known.family
	}
	for _, known := range []asn1.ObjectIdentifier{OIDSubjectAltName, oidKeyUsage, oidExtKeyUsage} {
		if oid.EqualASN1OID(known) {
			return w.want(ExtensionTemplate{Id: known})
		}
	}
	return nil
}

// Apply returns the template with what the server wants instead of what it would ask
// for otherwise, in its names too: whoever must keep those sets them again. known is
// a Subject in DER, the device's, from which comes what the server leaves to us and
// the template does not have. replaced names what the template asked for otherwise.
// ErrNoValue.
func (w Wanted) Apply(t Template, known []byte) (applied Template, replaced []string, err error) {
	t.Hash = w.Hash
	if w.Subject != nil {
		subject, err := w.Subject.fill(t.RawSubject, known)
		if err != nil {
			return t, nil, fmt.Errorf("CSR attributes: subject: %w", err)
		}
		if len(t.RawSubject) > 0 && !EqualSubject(subject, t.RawSubject) {
			replaced = append(replaced, "Subject "+FormatSubject(t.RawSubject)+", now "+FormatSubject(subject))
		}
		t.RawSubject = subject
	}
	for _, wanted := range w.Extensions {
		own, err := t.Extensions()
		if err != nil {
			return t, nil, err
		}
		has := extension(own, wanted.Id)
		switch {
		case wanted.Value == nil && has == nil:
			t = t.withUsual(wanted.Id)
		case wanted.Value != nil:
			if has != nil && !bytes.Equal(has.Value, wanted.Value) {
				replaced = append(replaced, "extension "+wanted.Id.String())
			}
			t = t.withExtension(pkix.Extension(wanted))
		}
	}
	return t, replaced, nil
}

// WithoutNames returns what is wanted but for the Subject and the SAN, which at a
// renewal are those of the certificate (RFC 7030 §4.2.2).
func (w Wanted) WithoutNames() Wanted {
	w.Subject = nil
	w.Extensions = slices.DeleteFunc(slices.Clone(w.Extensions), func(e ExtensionTemplate) bool { return e.Id.Equal(OIDSubjectAltName) })
	return w
}

// withUsual asks for what a key of a device is for, where the server wants a usage
// to be named. What else there is no value for is left out: it cannot be made up.
func (t Template) withUsual(id asn1.ObjectIdentifier) Template {
	switch {
	case id.Equal(oidKeyUsage):
		t.KeyUsage = x509.KeyUsageDigitalSignature
	case id.Equal(oidExtKeyUsage):
		t.ExtKeyUsage = []asn1.ObjectIdentifier{oidClientAuth}
	}
	return t
}

// withExtension asks for an extension as it is.
func (t Template) withExtension(e pkix.Extension) Template {
	switch {
	case e.Id.Equal(OIDSubjectAltName):
		t.SANs, t.RawSAN = nil, &e
		return t
	case e.Id.Equal(oidKeyUsage):
		t.KeyUsage = 0
	case e.Id.Equal(oidExtKeyUsage):
		t.ExtKeyUsage = nil
	}
	others := make([]pkix.Extension, 0, len(t.Others)+1)
	for _, other := range t.Others {
		if !other.Id.Equal(e.Id) {
			others = append(others, other)
		}
	}
	t.Others = append(others, e)
	return t
}

// fill returns the name with the values that are left to us: of the first of some
// names, in DER, that has one.
func (n NameTemplate) fill(names ...[]byte) ([]byte, error) {
	filled := make(NameTemplate, len(n))
	for i, rdn := range n {
		for _, part := range rdn {
			if part.Value == nil {
				if part.Value = valueIn(part.Type, names); part.Value == nil {
					return nil, fmt.Errorf("a value of %s: %w", formatType(part.Type), ErrNoValue)
				}
			}
			filled[i] = append(filled[i], part)
		}
	}
	return filled.marshal()
}

func valueIn(kind asn1.ObjectIdentifier, names [][]byte) []byte {
	for _, der := range names {
		name, _ := parseName(der)
		for _, rdn := range name {
			for _, atv := range rdn {
				if atv.Type.Equal(kind) {
					return atv.Value.FullBytes
				}
			}
		}
	}
	return nil
}

func formatType(oid asn1.ObjectIdentifier) string {
	for _, known := range attributes {
		if known.oid.Equal(oid) {
			return known.name
		}
	}
	return oid.String()
}
