package csr

import (
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strings"
)

// SAN is one subjectAltName, a GeneralName of RFC 5280 §4.2.1.6. It is made by
// one of the functions below; the zero SAN is none.
type SAN struct{ der []byte }

// Tags of GeneralName (RFC 5280 §4.2.1.6).
const (
	tagRFC822Name    = 1
	tagDNSName       = 2
	tagDirectoryName = 4
	tagURI           = 6
	tagIPAddress     = 7
)

// generalNames are the names of those whose content can be left out of a template.
var generalNames = map[int]string{
	tagRFC822Name: "rfc822Name", tagDNSName: "dNSName", tagDirectoryName: "directoryName", tagURI: "uniformResourceIdentifier", tagIPAddress: "iPAddress",
}

// id-on-hardwareModuleName (RFC 4108 §5).
var oidHardwareModuleName = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 8, 4}

const maxName = 1024 // bytes of one SAN

// ParseSAN parses "DNS:name", "IP:address", "URI:uri" or
// "hwModuleName:<hwType as OID>;<hwSerialNum in hexadecimal>".
func ParseSAN(s string) (SAN, error) {
	kind, value, found := strings.Cut(s, ":")
	if !found || len(s) > maxName {
		return SAN{}, fmt.Errorf("SAN: want DNS:…, IP:…, URI:… or hwModuleName:OID;HEX of at most %d bytes", maxName)
	}
	switch strings.ToLower(kind) {
	case "dns":
		return DNSName(value)
	case "ip":
		address, err := netip.ParseAddr(value)
		if err != nil {
			return SAN{}, fmt.Errorf("SAN: %q is not an IP address", value)
		}
		return IPAddress(address)
	case "uri":
		return URI(value)
	case "hwmodulename":
		return parseHardwareModuleName(value)
	}
	return SAN{}, fmt.Errorf("SAN: unknown kind %.40q: want DNS, IP, URI or hwModuleName", kind)
}

// DNSName is a dNSName in the "preferred name syntax" (RFC 5280 §4.2.1.6),
// underscores allowed; the leftmost label may be a wildcard.
func DNSName(name string) (SAN, error) {
	wrong := func(reason string) (SAN, error) { return SAN{}, fmt.Errorf("SAN: DNS name %q: %s", name, reason) }
	if name == "" || len(name) > 253 {
		return wrong("want 1 to 253 characters")
	}
	for label := range strings.SplitSeq(strings.TrimPrefix(name, "*."), ".") {
		switch {
		case label == "" || len(label) > 63:
			return wrong("want labels of 1 to 63 characters")
		case label[0] == '-' || label[len(label)-1] == '-':
			return wrong("a label neither begins nor ends with a hyphen")
		}
		for _, r := range label {
			if !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-' || r == '_') {
				return wrong(fmt.Sprintf("%q has no place in it", r))
			}
		}
	}
	return implicit(tagDNSName, []byte(name))
}

// IPAddress is an iPAddress of 4 or 16 bytes.
func IPAddress(address netip.Addr) (SAN, error) {
	if !address.IsValid() || address.Zone() != "" {
		return SAN{}, errors.New("SAN: want an IP address without a zone")
	}
	return implicit(tagIPAddress, address.Unmap().AsSlice())
}

// URI is a uniformResourceIdentifier: absolute, in ASCII.
func URI(uri string) (SAN, error) {
	parsed, err := url.Parse(uri)
	if err != nil || !parsed.IsAbs() || parsed.Host == "" && parsed.Opaque == "" {
		// "The name MUST NOT be a relative URI": RFC 5280 §4.2.1.6.
		return SAN{}, fmt.Errorf("SAN: URI %q: want a scheme and what follows it", uri)
	}
	for _, r := range uri {
		if r <= ' ' || r >= 0x7f {
			return SAN{}, fmt.Errorf("SAN: URI %q: %q must be percent-encoded", uri, r)
		}
	}
	return implicit(tagURI, []byte(uri))
}

// HardwareModuleName is an otherName with the type and the serial number of a
// hardware module (RFC 4108 §5), the name of an IDevID.
func HardwareModuleName(hwType asn1.ObjectIdentifier, hwSerialNum []byte) (SAN, error) {
	if len(hwSerialNum) == 0 {
		return SAN{}, errors.New("SAN: hwModuleName: empty serial number")
	}
	type hardwareModuleName struct {
		HWType      asn1.ObjectIdentifier
		HWSerialNum []byte
	}
	// OtherName ::= SEQUENCE { type-id OBJECT IDENTIFIER, value [0] EXPLICIT ANY }
	type otherName struct {
		TypeID asn1.ObjectIdentifier
		Value  hardwareModuleName `asn1:"tag:0,explicit"`
	}
	der, err := asn1.MarshalWithParams(otherName{oidHardwareModuleName, hardwareModuleName{hwType, hwSerialNum}}, "tag:0")
	if err != nil {
		return SAN{}, fmt.Errorf("SAN: hwModuleName: %w", err)
	}
	return SAN{der: der}, nil
}

func parseHardwareModuleName(s string) (SAN, error) {
	typeText, serialText, found := strings.Cut(s, ";")
	serial, err := hex.DecodeString(serialText)
	if !found || err != nil {
		return SAN{}, errors.New("SAN: hwModuleName: want OID;HEX")
	}
	hwType, err := parseOID(typeText)
	if err != nil {
		return SAN{}, fmt.Errorf("SAN: hwModuleName: type %.40q: %w", typeText, err)
	}
	return HardwareModuleName(hwType, serial)
}

func implicit(tag int, content []byte) (SAN, error) {
	der, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: content})
	if err != nil {
		return SAN{}, fmt.Errorf("SAN: %w", err)
	}
	return SAN{der: der}, nil
}

// marshalSANs makes the extension's value: GeneralNames ::= SEQUENCE OF GeneralName.
func marshalSANs(sans []SAN) ([]byte, error) {
	var content []byte
	for _, san := range sans {
		if len(san.der) == 0 {
			return nil, errors.New("SAN: the zero SAN is none")
		}
		content = append(content, san.der...)
	}
	return sequence(content)
}
