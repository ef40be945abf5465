package est

// The one file that knows the CBOR library, so that another can take its place.

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/fxamacker/cbor/v2"
)

const maxParts = 16

// A Part is one representation of an answer that has several.
type Part struct {
	ContentFormat ContentFormat
	Body          []byte
}

// multipartCore are the limits of an answer: a flat array.
var multipartCore = func() cbor.DecMode {
	mode, err := cbor.DecOptions{MaxArrayElements: 2 * maxParts, MaxNestedLevels: 4, TagsMd: cbor.TagsForbidden}.DecMode()
	if err != nil {
		panic(err) // options of ours
	}
	return mode
}()

// ParseMultipartCore parses application/multipart-core (RFC 8710 §2), of at most
// 64 KiB and 16 parts. A part without a representation is left out. The bodies are
// copies.
//
//	multipart-core = [* multipart-part]
//	multipart-part = (type: uint .size 2, part: bytes / null)
func ParseMultipartCore(data []byte) ([]Part, error) {
	parts, err := parseMultipartCore(data)
	if err != nil {
		return nil, fmt.Errorf("multipart-core: %w", err)
	}
	return parts, nil
}

func parseMultipartCore(data []byte) (parts []Part, err error) {
	if len(data) > maxAnswer {
		return nil, fmt.Errorf("%d bytes, more than %d", len(data), maxAnswer)
	}
	var elements []cbor.RawMessage
	defer func() { // one of them may be a key
		for _, element := range elements {
			clear(element)
		}
		if err != nil {
			clearParts(parts)
			parts = nil
		}
	}()
	if err := multipartCore.Unmarshal(data, &elements); err != nil {
		return nil, err
	}
	if len(elements)%2 != 0 || len(elements) > 2*maxParts {
		return nil, fmt.Errorf("%d elements, want up to %d pairs", len(elements), maxParts)
	}
	for pair := range slices.Chunk(elements, 2) {
		var format uint64
		if err := multipartCore.Unmarshal(pair[0], &format); err != nil || majorType(pair[0]) != unsigned || format > math.MaxUint16 {
			return parts, errors.New("a part whose type is no content-format")
		}
		if pair[1][0] == null {
			continue
		}
		var body []byte
		if err := multipartCore.Unmarshal(pair[1], &body); err != nil || majorType(pair[1]) != byteString {
			return parts, fmt.Errorf("part of content-format %d is no byte string", format)
		}
		parts = append(parts, Part{ContentFormat(format), body})
	}
	return parts, nil
}

// Initial bytes (RFC 8949 §3): the library would take other types for these.
const (
	unsigned   = 0
	byteString = 2
	null       = 0xf6
)

func majorType(value cbor.RawMessage) byte { return value[0] >> 5 }

// MarshalMultipartCore is the reverse of ParseMultipartCore.
func MarshalMultipartCore(parts []Part) ([]byte, error) {
	elements := make([]any, 0, 2*len(parts))
	for _, part := range parts {
		elements = append(elements, uint16(part.ContentFormat), part.Body)
	}
	data, err := cbor.Marshal(elements)
	if err != nil {
		return nil, fmt.Errorf("multipart-core: %w", err)
	}
	return data, nil
}
