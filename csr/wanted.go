package csr

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

var (
	// ErrContradictory says that a server wants two things of which a CSR has one.
	ErrContradictory = errors.New("the server wants two things at once")
	// ErrNoValue says that a server leaves a value to the client, which has none.
	ErrNoValue = errors.New("the server leaves to us what we do not have")
	// ErrSignature says that no signature of that kind can be made.
	ErrSignature = errors.New("no such signature can be made")
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
	// PSS says whether an RSA key signs the request with RSASSA-PSS, nil for either.
	PSS *bool
	// Subject that is to be asked for, nil for any.
	Subject *NameTemplate
	// SubjectTypes are what a Subject is to have, with values of the client's.
	SubjectTypes []asn1.ObjectIdentifier
	// Extensions that are to be asked for, each once, in the server's order.
	Extensions []ExtensionTemplate
	// Attributes that the request is to have as they are, each once.
	Attributes Attributes
	// Ignored is what is not known, and attributes without a value, which would be ours
	// to give.
	Ignored []x509.OID

	family string // of keys that make the signature wanted
}

// WantedKey is a kind of key. The zero one is any.
type WantedKey struct {
	// Family is "EC" or "RSA", or the name or the OID of another.
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

var wantedFamilies = []struct {
	name string
	oid  asn1.ObjectIdentifier
}{
	{familyEC, oidECPublicKey}, {familyRSA, oidRSAEncryption},
	{"Ed25519", asn1.ObjectIdentifier{1, 3, 101, 112}}, {"Ed448", asn1.ObjectIdentifier{1, 3, 101, 113}}, // RFC 8410 §3
	{"ML-DSA-44", asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 3, 17}}, // RFC 9881 §2
	{"ML-DSA-65", asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 3, 18}},
	{"ML-DSA-87", asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 3, 19}},
}

func familyOf(oid asn1.ObjectIdentifier) string {
	for _, known := range wantedFamilies {
		if known.oid.Equal(oid) {
			return known.name
		}
	}
	return oid.String()
}

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
	for _, known := range wantedFamilies {
		if known.name == k.Family {
			return known.oid, nil, nil
		}
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
		case attribute.is(oidRequestTemplate): // in itself
		case attribute.is(oidChallengePassword):
			w.ChallengePassword = true
		case attribute.is(oidExtensionRequest), attribute.is(oidExtensionTemplate):
			for _, value := range attribute.Values {
				if err := w.readExtensions(value); err != nil {
					return err
				}
			}
		default:
			err = w.readOther(attribute)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readOther reads a kind of key or of signature, an attribute that the request is to
// have, or what an OID on its own names.
func (w *Wanted) readOther(one Attribute) error {
	for _, known := range wantedFamilies {
		if one.is(known.oid) {
			return w.readKey(known.name, one)
		}
	}
	if known, err := w.readSignature(one); known || err != nil {
		return err
	}
	ofSubject := slices.IndexFunc(attributes, func(known attribute) bool { return one.is(known.oid) })
	usual := slices.IndexFunc(usualExtensions, one.is)
	switch {
	case len(one.Values) > 0 && (ofSubject >= 0 || slices.ContainsFunc(knownAttributes, one.is)):
		return w.wantAttribute(one)
	case one.Values == nil && ofSubject >= 0:
		w.SubjectTypes = append(w.SubjectTypes, attributes[ofSubject].oid)
	case one.Values == nil && usual >= 0:
		return w.want(ExtensionTemplate{Id: usualExtensions[usual]})
	default:
		w.Ignored = append(w.Ignored, one.Type)
	}
	return nil
}

// knownAttributes are those that a request can have beside extensionRequest,
// challengePassword and those of a Subject, and that we know: "the client MUST ignore"
// others (RFC 7030 §4.5.2). With its value one is the server's to choose.
var knownAttributes = []asn1.ObjectIdentifier{
	{1, 2, 840, 113549, 1, 9, 2},      // unstructuredName, RFC 2985 §5.2.2
	{1, 2, 840, 113549, 1, 9, 8},      // unstructuredAddress, RFC 2985 §5.2.3
	{1, 2, 840, 113549, 1, 9, 20},     // friendlyName, RFC 2985 §5.5.1
	{1, 3, 6, 1, 1, 1, 1, 22},         // macAddress, RFC 2307 §2.3
	{0, 9, 2342, 19200300, 100, 1, 5}, // drink, RFC 4524 §2.5
	{1, 3, 6, 1, 4, 1, 311, 13, 2, 1}, // enrollmentNameValuePair, MS-WCCE §2.2.2.7.10
}

// usualExtensions are those whose value a client knows, or can have in its settings.
var usualExtensions = []asn1.ObjectIdentifier{OIDSubjectAltName, oidKeyUsage, oidExtKeyUsage, oidBasicConstraints}

// wantAttribute adds an attribute of the request.
func (w *Wanted) wantAttribute(attribute Attribute) error {
	for _, known := range w.Attributes {
		if !known.Type.Equal(attribute.Type) {
			continue
		}
		if !slices.EqualFunc(known.Values, attribute.Values, bytes.Equal) {
			return fmt.Errorf("attribute %s with two values: %w", attribute.Type, ErrContradictory)
		}
		return nil
	}
	w.Attributes = append(w.Attributes, attribute)
	return nil
}

func (w *Wanted) readKey(family string, attribute Attribute) (err error) {
	key := WantedKey{Family: family}
	switch {
	case len(attribute.Values) > 1:
		return fmt.Errorf("keys of several sizes: %w", ErrContradictory)
	case len(attribute.Values) == 1 && family == familyEC:
		key, err = curveKey(attribute.Values[0])
	case len(attribute.Values) == 1 && family == familyRSA:
		var bits int
		if _, err := asn1.Unmarshal(attribute.Values[0], &bits); err != nil {
			return fmt.Errorf("size of an RSA key: %w", err)
		}
		key, err = rsaKey(bits)
	}
	switch {
	case err != nil:
		return err
	case w.Key.IsZero(), key.Family == w.Key.Family && w.Key.Size == "":
		w.Key = key
	case key.Family == w.Key.Family && key.Size == "":
	case w.Key != key:
		return fmt.Errorf("keys of type %s and of type %s: %w", w.Key, key, ErrContradictory)
	}
	return nil
}

// readSignature reads a kind of signature: the OID of one, to be "reflected in the
// SignatureAlgorithm of the CSR" (RFC 7030 §4.5.2), with its parameters where it has
// some, or of a hash alone, as in the example of RFC 9148 §A.4.
func (w *Wanted) readSignature(attribute Attribute) (known bool, err error) {
	for _, algorithm := range signatureAlgorithms {
		if attribute.is(algorithm.oid) {
			var pss *bool
			if algorithm.family == familyRSA {
				pss = new(false)
			}
			return true, w.wantSignature(algorithm.family, algorithm.hash, pss)
		}
	}
	for _, algorithm := range pssAlgorithms {
		if attribute.is(hashOIDs[algorithm.hash]) {
			return true, w.wantSignature("", algorithm.hash, nil)
		}
	}
	if !attribute.is(oidRSASSAPSS) {
		return false, nil
	}
	var hash crypto.Hash
	for _, value := range attribute.Values {
		var parameters pssParameters
		if _, err := asn1.Unmarshal(value, &parameters); err != nil {
			return true, fmt.Errorf("parameters of RSASSA-PSS: %w", err)
		}
		for known, oid := range hashOIDs {
			if parameters.Hash.Algorithm.Equal(oid) {
				hash = known
			}
		}
		if hash == 0 {
			return true, fmt.Errorf("RSASSA-PSS with the hash %s: %w", cmp.Or(parameters.Hash.Algorithm.String(), "SHA-1"), ErrSignature)
		}
	}
	return true, w.wantSignature(familyRSA, hash, new(true))
}

// wantSignature adds to what is wanted of the signature: "", 0 and nil are any.
func (w *Wanted) wantSignature(family string, hash crypto.Hash, pss *bool) error {
	if family != "" && w.family != "" && family != w.family || hash != 0 && w.Hash != 0 && hash != w.Hash || pss != nil && w.PSS != nil && *pss != *w.PSS {
		return fmt.Errorf("two kinds of signature: %w", ErrContradictory)
	}
	w.family, w.Hash = cmp.Or(family, w.family), cmp.Or(hash, w.Hash)
	if pss != nil {
		w.PSS = pss
	}
	return nil
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

// Outcome is what became of what a server wants, each thing in words.
type Outcome struct {
	// Replaced is what the template asked for otherwise.
	Replaced []string
	// Missing is what the server leaves to us, of the names of the device, which do not
	// have it.
	Missing []string
	// Ignored is what else is left out.
	Ignored []string
}

// Apply returns the template with what the server wants instead of what it would ask
// for otherwise, in its names too: whoever must keep those sets them again. known is
// a Subject in DER, the device's, which stands for the template's where that has none,
// and from which comes what the server leaves to us and the template does not have.
// ErrNoValue.
func (w Wanted) Apply(t Template, known []byte) (Template, Outcome, error) {
	var outcome Outcome
	t.Hash = w.Hash
	if w.PSS != nil {
		if t.PSS && !*w.PSS {
			outcome.Replaced = append(outcome.Replaced, "signature with PSS, now with PKCS #1 v1.5")
		}
		t.PSS = *w.PSS
	}
	if w.Subject != nil {
		subject, err := w.Subject.fill(t.RawSubject, known)
		if err != nil {
			return t, outcome, fmt.Errorf("CSR attributes: subject: %w", err)
		}
		if len(t.RawSubject) > 0 && !EqualSubject(subject, t.RawSubject) {
			outcome.Replaced = append(outcome.Replaced, "Subject "+FormatSubject(t.RawSubject)+", now "+FormatSubject(subject))
		}
		t.RawSubject = subject
	}
	for _, kind := range w.SubjectTypes {
		subject := t.RawSubject
		if len(subject) == 0 {
			subject = known
		}
		if len(valuesIn(kind, [][]byte{subject})) == 0 {
			outcome.Missing = append(outcome.Missing, formatType(kind)+" in the Subject")
		}
	}
	for _, wanted := range w.Extensions {
		var err error
		if t, err = t.withWanted(wanted, &outcome); err != nil {
			return t, outcome, fmt.Errorf("CSR attributes: %w", err)
		}
	}
	t.Attributes = slices.Concat(slices.DeleteFunc(slices.Clone(t.Attributes), func(own Attribute) bool {
		return slices.ContainsFunc(w.Attributes, func(a Attribute) bool { return a.Type.Equal(own.Type) })
	}), w.Attributes)
	for _, oid := range w.Ignored {
		outcome.Ignored = append(outcome.Ignored, oid.String())
	}
	return t, outcome, nil
}

// withWanted asks for an extension that is wanted.
func (t Template) withWanted(wanted ExtensionTemplate, outcome *Outcome) (Template, error) {
	own, err := t.Extensions()
	if err != nil {
		return t, err
	}
	has := extension(own, wanted.Id)
	if wanted.Value == nil {
		if has == nil {
			t = t.withUsual(wanted.Id)
			if own, err = t.Extensions(); err != nil {
				return t, err
			}
			has = extension(own, wanted.Id)
		}
		switch {
		case has != nil && wanted.Critical && !has.Critical:
			t = t.withExtension(pkix.Extension{Id: has.Id, Critical: true, Value: has.Value})
		case has != nil:
		case wanted.Id.Equal(OIDSubjectAltName):
			outcome.Missing = append(outcome.Missing, "SAN")
		default:
			outcome.Ignored = append(outcome.Ignored, "extension "+wanted.Id.String())
		}
		return t, nil
	}
	if wanted.Id.Equal(OIDSubjectAltName) {
		if wanted.Value, err = fillSAN(wanted.Value, has); err != nil {
			return t, err
		}
	}
	if has != nil && !bytes.Equal(has.Value, wanted.Value) {
		outcome.Replaced = append(outcome.Replaced, "extension "+wanted.Id.String())
	}
	return t.withExtension(pkix.Extension(wanted)), nil
}

// fillSAN returns the extension with the names that are left to us, which are empty
// (RFC 9908 §3.4): each is the first of its kind in our own that was not taken yet.
func fillSAN(value []byte, own *pkix.Extension) ([]byte, error) {
	names, read := parseGeneralNames(value)
	if !read || !slices.ContainsFunc(names, isLeftToUs) {
		return value, nil
	}
	var left []asn1.RawValue
	if own != nil {
		left, _ = parseGeneralNames(own.Value)
	}
	var filled []byte
	for _, name := range names {
		if isLeftToUs(name) {
			i := slices.IndexFunc(left, func(ours asn1.RawValue) bool { return ours.Class == name.Class && ours.Tag == name.Tag })
			if i < 0 {
				return nil, fmt.Errorf("SAN: %s: %w", generalNames[name.Tag], ErrNoValue)
			}
			name = left[i]
			left = slices.Delete(left, i, i+1)
		}
		filled = append(filled, name.FullBytes...)
	}
	return sequence(filled)
}

// isLeftToUs reports a directoryName without RDNs, or another name without content.
func isLeftToUs(name asn1.RawValue) bool {
	if name.Tag == tagDirectoryName {
		return bytes.Equal(name.Bytes, emptyName)
	}
	return len(name.Bytes) == 0 && generalNames[name.Tag] != ""
}

// Signature says which signature is wanted, "" for any.
func (w Wanted) Signature() string {
	var with []string
	switch {
	case w.PSS != nil && *w.PSS:
		with = append(with, "PSS")
	case w.PSS != nil:
		with = append(with, "PKCS #1 v1.5")
	}
	if w.Hash != 0 {
		with = append(with, w.Hash.String())
	}
	if len(with) == 0 {
		return ""
	}
	return "signature with " + strings.Join(with, " and ")
}

// Describe says what is wanted, a few words each.
func (w Wanted) Describe() (wants []string) {
	if !w.Key.IsZero() {
		wants = append(wants, "key of type "+w.Key.String())
	}
	if signature := w.Signature(); signature != "" {
		wants = append(wants, signature)
	}
	if w.ChallengePassword {
		wants = append(wants, "link to the session")
	}
	if w.Subject != nil {
		wants = append(wants, "Subject "+w.Subject.String())
	}
	for _, kind := range w.SubjectTypes {
		wants = append(wants, formatType(kind)+" in the Subject")
	}
	for _, e := range w.Extensions {
		wants = append(wants, "extension "+e.Id.String())
	}
	for _, a := range w.Attributes {
		wants = append(wants, "attribute "+a.Type.String())
	}
	for _, oid := range w.Ignored {
		wants = append(wants, oid.String()+", which is ignored")
	}
	return wants
}

// WithoutNames returns what is wanted but for the Subject and the SAN, which at a
// renewal are those of the certificate (RFC 7030 §4.2.2).
func (w Wanted) WithoutNames() Wanted {
	w.Subject, w.SubjectTypes = nil, nil
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
	case id.Equal(oidBasicConstraints):
		t = t.withExtension(pkix.Extension{Id: id, Value: []byte{0x30, 0}}) // no CA
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

// String returns the name as FormatSubject does, with nothing after the "=" of what is
// left to the client.
func (n NameTemplate) String() string {
	rdns := make([]string, 0, len(n))
	for _, rdn := range slices.Backward(n) {
		parts := make([]string, len(rdn))
		for i, part := range rdn {
			parts[i] = formatType(part.Type) + "="
			var value asn1.RawValue
			if _, err := asn1.Unmarshal(part.Value, &value); err == nil {
				parts[i] = formatAttribute(attributeTypeAndValue{part.Type, value})
			}
		}
		rdns = append(rdns, strings.Join(parts, "+"))
	}
	return strings.Join(rdns, ",")
}

// fill returns the name with the values that are left to us: those of the first of
// some names, in DER, that has one of the type, in their order.
func (n NameTemplate) fill(names ...[]byte) ([]byte, error) {
	filled := make(NameTemplate, len(n))
	taken := map[string]int{} // values of a type
	for i, rdn := range n {
		for _, part := range rdn {
			if part.Value == nil {
				kind := formatType(part.Type)
				values := valuesIn(part.Type, names)
				if taken[kind] == len(values) {
					return nil, fmt.Errorf("a value of %s: %w", kind, ErrNoValue)
				}
				part.Value = values[taken[kind]]
				taken[kind]++
			}
			filled[i] = append(filled[i], part)
		}
	}
	return filled.marshal()
}

func valuesIn(kind asn1.ObjectIdentifier, names [][]byte) (values [][]byte) {
	for _, der := range names {
		name, _ := parseName(der)
		for _, rdn := range name {
			for _, atv := range rdn {
				if atv.Type.Equal(kind) {
					values = append(values, atv.Value.FullBytes)
				}
			}
		}
		if len(values) > 0 {
			break
		}
	}
	return values
}

func formatType(oid asn1.ObjectIdentifier) string {
	for _, known := range attributes {
		if known.oid.Equal(oid) {
			return known.name
		}
	}
	return oid.String()
}
