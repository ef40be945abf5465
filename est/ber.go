package est

import (
	"encoding/asn1"
	"errors"
	"fmt"
)

// toDER returns a value in BER (X.690 §8) as DER as far as CMS needs it: with definite
// lengths that are as short as can be. Servers write messages so (RFC 5652 §1); the
// certificates in them are DER, and stay what they are. It is one value and nothing after
// it, nested no deeper than depth; where nothing is to be changed it is the data itself.
func toDER(data []byte, depth int) ([]byte, error) {
	if checkDepth(data, depth) == nil {
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

// joined puts the pieces of an OCTET STRING together, which BER may have it in.
func joined(pieces []byte) (whole []byte, err error) {
	for len(pieces) > 0 {
		var piece asn1.RawValue
		if pieces, err = asn1.Unmarshal(pieces, &piece); err != nil || piece.Tag != asn1.TagOctetString || piece.IsCompound {
			clear(whole)
			return nil, errBER
		}
		whole = append(whole, piece.Bytes...)
	}
	return whole, nil
}

const constructed = 0x20 // bit of an identifier octet (X.690 §8.1.2.5)

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
	der = appendLength(append(der, v.identifier...), v.length())
	der = append(der, v.content...)
	for _, part := range v.parts {
		der = part.append(der)
	}
	return der
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
		length += len(part.identifier) + len(appendLength(nil, inner)) + inner
	}
	return length
}
