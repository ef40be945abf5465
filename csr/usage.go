package csr

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The extensions of usages (RFC 5280 §4.2.1.3, §4.2.1.9, §4.2.1.12).
var (
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
)

const maxExtKeyUsage = 16 // purposes

type keyUsage struct {
	name string
	bit  x509.KeyUsage
}

// keyUsages are the bits of KeyUsage in their order (RFC 5280 §4.2.1.3).
var keyUsages = []keyUsage{
	{"digitalSignature", x509.KeyUsageDigitalSignature},
	{"contentCommitment", x509.KeyUsageContentCommitment},
	{"keyEncipherment", x509.KeyUsageKeyEncipherment},
	{"dataEncipherment", x509.KeyUsageDataEncipherment},
	{"keyAgreement", x509.KeyUsageKeyAgreement},
	{"keyCertSign", x509.KeyUsageCertSign},
	{"cRLSign", x509.KeyUsageCRLSign},
	{"encipherOnly", x509.KeyUsageEncipherOnly},
	{"decipherOnly", x509.KeyUsageDecipherOnly},
}

// extKeyUsages are the purposes of RFC 5280 §4.2.1.12.
var extKeyUsages = []struct {
	name string
	oid  asn1.ObjectIdentifier
}{
	{"serverAuth", asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}},
	{"clientAuth", oidClientAuth},
	{"codeSigning", asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3}},
	{"emailProtection", asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 4}},
	{"timeStamping", asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}},
	{"OCSPSigning", asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 9}},
	{"anyExtendedKeyUsage", oidAnyExtKeyUsage},
}

var (
	oidClientAuth     = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
	oidAnyExtKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 37, 0}
)

// ParseKeyUsage parses the names of RFC 5280 §4.2.1.3, in any case, each text one
// of them or several with commas between; nonRepudiation is the older name of
// contentCommitment. What only a CA does is refused.
func ParseKeyUsage(texts []string) (x509.KeyUsage, error) {
	var usage x509.KeyUsage
	for _, name := range splitList(texts) {
		if strings.EqualFold(name, "nonRepudiation") {
			name = "contentCommitment"
		}
		i := slices.IndexFunc(keyUsages, func(known keyUsage) bool { return strings.EqualFold(known.name, name) })
		if i < 0 {
			return 0, fmt.Errorf("key usage: unknown name %.40q", name)
		}
		switch known := keyUsages[i]; {
		case known.bit == x509.KeyUsageCertSign || known.bit == x509.KeyUsageCRLSign:
			return 0, fmt.Errorf("key usage: %s is a CA's", known.name)
		case usage&known.bit != 0:
			return 0, fmt.Errorf("key usage: %s twice", known.name)
		default:
			usage |= known.bit
		}
	}
	if only := x509.KeyUsageEncipherOnly | x509.KeyUsageDecipherOnly; usage&only != 0 && usage&x509.KeyUsageKeyAgreement == 0 {
		// RFC 5280 §4.2.1.3: their meaning "is undefined in the absence of the
		// keyAgreement bit".
		return 0, errors.New("key usage: encipherOnly and decipherOnly mean nothing without keyAgreement")
	}
	return usage, nil
}

// ParseExtKeyUsage parses the names of RFC 5280 §4.2.1.12, in any case, and OIDs,
// at most 16, each text one of them or several with commas between.
func ParseExtKeyUsage(texts []string) ([]asn1.ObjectIdentifier, error) {
	var purposes []asn1.ObjectIdentifier
	for _, name := range splitList(texts) {
		oid, err := parseExtKeyUsage(name)
		if err != nil {
			return nil, fmt.Errorf("extended key usage: %w", err)
		}
		if slices.ContainsFunc(purposes, oid.Equal) {
			return nil, fmt.Errorf("extended key usage: %s twice", formatExtKeyUsage(oid))
		}
		if purposes = append(purposes, oid); len(purposes) > maxExtKeyUsage {
			return nil, fmt.Errorf("extended key usage: more than %d", maxExtKeyUsage)
		}
	}
	return purposes, nil
}

func parseExtKeyUsage(name string) (asn1.ObjectIdentifier, error) {
	for _, known := range extKeyUsages {
		if strings.EqualFold(known.name, name) {
			return known.oid, nil
		}
	}
	oid, err := parseOID(name)
	if err != nil {
		return nil, fmt.Errorf("%.40q is neither a known name nor an OID", name)
	}
	return oid, nil
}

func splitList(texts []string) (items []string) {
	for _, text := range texts {
		for item := range strings.SplitSeq(text, ",") {
			items = append(items, strings.TrimSpace(item))
		}
	}
	return items
}

// keyUsageExtension is critical: "Conforming CAs ... SHOULD mark this extension as
// critical" (RFC 5280 §4.2.1.3).
func keyUsageExtension(usage x509.KeyUsage) (pkix.Extension, error) {
	var bits asn1.BitString
	for i, known := range keyUsages {
		if usage&known.bit == 0 {
			continue
		}
		for len(bits.Bytes) <= i/8 {
			bits.Bytes = append(bits.Bytes, 0)
		}
		bits.Bytes[i/8] |= 0x80 >> (i % 8)
		bits.BitLength = i + 1 // no trailing zeros: X.690 §11.2.2
	}
	value, err := asn1.Marshal(bits)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("key usage: %w", err)
	}
	return pkix.Extension{Id: oidKeyUsage, Critical: true, Value: value}, nil
}

func extKeyUsageExtension(purposes []asn1.ObjectIdentifier) (pkix.Extension, error) {
	value, err := asn1.Marshal(purposes)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("extended key usage: %w", err)
	}
	return pkix.Extension{Id: oidExtKeyUsage, Value: value}, nil
}

// MissingUsages names the usages that a CSR asks for and the issued certificate
// does not have. A certificate without the extension is for every usage.
func MissingUsages(request *x509.CertificateRequest, issued *x509.Certificate) []string {
	var missing []string
	asked, got := bitsOf(request.Extensions), bitsOf(issued.Extensions)
	for i, known := range keyUsages {
		if asked.At(i) == 1 && got.BitLength > 0 && got.At(i) == 0 {
			missing = append(missing, known.name)
		}
	}
	purposes := purposesOf(issued.Extensions)
	if len(purposes) == 0 || slices.ContainsFunc(purposes, oidAnyExtKeyUsage.Equal) {
		return missing
	}
	for _, purpose := range purposesOf(request.Extensions) {
		if !slices.ContainsFunc(purposes, purpose.Equal) {
			missing = append(missing, formatExtKeyUsage(purpose))
		}
	}
	return missing
}

func formatExtKeyUsage(oid asn1.ObjectIdentifier) string {
	for _, known := range extKeyUsages {
		if known.oid.Equal(oid) {
			return known.name
		}
	}
	return oid.String()
}

// bitsOf returns the key usage among extensions, none if there is none or it
// cannot be read: crypto/x509 has refused a certificate with such a one.
func bitsOf(extensions []pkix.Extension) (bits asn1.BitString) {
	if e := extension(extensions, oidKeyUsage); e != nil {
		if _, err := asn1.Unmarshal(e.Value, &bits); err != nil {
			return asn1.BitString{}
		}
	}
	return bits
}

func purposesOf(extensions []pkix.Extension) (purposes []asn1.ObjectIdentifier) {
	if e := extension(extensions, oidExtKeyUsage); e != nil {
		if _, err := asn1.Unmarshal(e.Value, &purposes); err != nil {
			return nil
		}
	}
	return purposes
}

func extension(extensions []pkix.Extension, id asn1.ObjectIdentifier) *pkix.Extension {
	for i := range extensions {
		if extensions[i].Id.Equal(id) {
			return &extensions[i]
		}
	}
	return nil
}
