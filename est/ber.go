package est

import (
	"encoding/asn1"
	"errors"
	"fmt"
)

// toDER returns a value in BER (X.690 §8) as DER as far as CMS needs it: with definite
// lengths that are as short as can be, and each OCTET STRING in one piece. Servers write
// messages so (RFC 5652 §1); the certificates in them are DER, and stay what they are.
// It is one value and nothing after it, nested no deeper than depth; where nothing is to
// be changed it is the data itself.
func toDER(data []byte, depth int) ([]byte, error) {
	if checkDepth(data, depth) == nil && !inPieces(data) {
		return data, nil
	}
	value, rest, err := readBER(data, depth)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes after the end", len(rest))
	}
	if err != nil {
		return nil, err
	}
	return value.append(make([]byte, 0, len(data))), nil // which is no shorter
}

// inPieces reports whether there is an OCTET STRING in pieces among values in DER.
func inPieces(der []byte) bool {
	for len(der) > 0 {
		var value asn1.RawValue
		rest, err := asn1.Unmarshal(der, &value)
		if err != nil {
			return false // which checkDepth has excluded
		}
		if value.IsCompound && (isPieces(value.FullBytes[:1]) || inPieces(value.Bytes)) {
			return true
		}
		der = rest
	}
	return false
}

const constructed = 0x20 // bit of an identifier octet (X.690 §8.1.2.5)

// isPieces reports the identifier of an OCTET STRING that is made of others.
func isPieces(identifier []byte) bool {
	return len(identifier) == 1 && identifier[0] == asn1.TagOctetString|constructed
}

// berValue is a value whose parts point into the data that it was read from.
type berValue struct {
	identifier []byte
	content    []byte     // of a primitive one
	parts      []berValue // of a constructed one
}

var errBER = errors.New("not BER")

func readBER(data []byte, depth int) (value berValue, rest []byte, err error) {
	if depth == 0 {
		return value, nil, fmt.Errorf("nested deeper than %d", maxDepth)
	}
	n := 1
	if len(data) > 0 && data[0]&0x1f == 0x1f { // a tag of several octets
		for n < len(data) && data[n]&0x80 != 0 {
			n++
		}
		n++
	}
	if n >= len(data) {
		return value, nil, errBER
	}
	value.identifier = data[:n]
	length, rest, indefinite, err := readLength(data[n:])
	compound := data[0]&constructed != 0
	if err != nil || indefinite && !compound {
		return value, nil, errBER
	}
	if !indefinite {
		value.content, rest = rest[:length], rest[length:]
	}
	if !compound {
		return value, rest, nil
	}
	inner := value.content
	if value.content = nil; indefinite {
		inner = rest
	}
	for {
		switch {
		case indefinite && len(inner) >= 2 && inner[0] == 0 && inner[1] == 0: // X.690 §8.1.5
			return value, inner[2:], nil
		case len(inner) == 0 && indefinite:
			return value, nil, errBER
		case len(inner) == 0:
			return value, rest, nil
		}
		var part berValue
		if part, inner, err = readBER(inner, depth-1); err != nil {
			return value, nil, err
		}
		if isPieces(value.identifier) && part.identifier[0]&^constructed != asn1.TagOctetString {
			return value, nil, errBER
		}
		value.parts = append(value.parts, part)
	}
}

// readLength reads a length, and sees that so much is there.
func readLength(data []byte) (length int, rest []byte, indefinite bool, err error) {
	first, rest := data[0], data[1:]
	switch {
	case first == 0x80:
		return 0, rest, true, nil
	case first < 0x80:
		length = int(first)
	default:
		count := int(first & 0x7f)
		if count > len(rest) {
			return 0, nil, false, errBER
		}
		for _, octet := range rest[:count] {
			if length = length<<8 | int(octet); length > maxAnswer {
				return 0, nil, false, errBER
			}
		}
		rest = rest[count:]
	}
	if length > len(rest) {
		return 0, nil, false, errBER
	}
	return length, rest, false, nil
}

func (v berValue) append(der []byte) []byte {
	if isPieces(v.identifier) {
		der = append(der, asn1.TagOctetString)
	} else {
		der = append(der, v.identifier...)
	}
	return v.appendContent(appendLength(der, v.length()), isPieces(v.identifier))
}

func appendLength(der []byte, length int) []byte {
	switch { // of what is no longer than maxAnswer
	case length < 1<<7:
		return append(der, byte(length))
	case length < 1<<8:
		return append(der, 0x81, byte(length))
	case length < 1<<16:
		return append(der, 0x82, byte(length>>8), byte(length))
	}
	return append(der, 0x83, byte(length>>16), byte(length>>8), byte(length))
}

// length of the content in DER.
func (v berValue) length() int {
	length := len(v.content)
	for _, part := range v.parts {
		inner := part.length()
		if !isPieces(v.identifier) {
			inner += len(part.identifier) + len(appendLength(nil, inner))
		}
		length += inner
	}
	return length
}

// appendContent appends the content, of pieces what is in them.
func (v berValue) appendContent(der []byte, joined bool) []byte {
	der = append(der, v.content...)
	for _, part := range v.parts {
		if joined {
			der = part.appendContent(der, true)
		} else {
			der = part.append(der)
		}
	}
	return der
}
