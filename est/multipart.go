package est

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
)

// ParseMultipartMixed parses the multipart/mixed answer of serverkeygen (RFC 7030
// §4.4.2) with the boundary of its Content-Type, of at most 128 KiB and 16 parts: each
// is base64, whatever its Content-Transfer-Encoding says and however its lines are
// broken (RFC 8951 §3.1). Parts of another media type are left out, and so is what
// stands before the first and after the last. The order is the server's.
func ParseMultipartMixed(body []byte, boundary string) ([]Part, error) {
	parts, err := parseMultipartMixed(body, boundary)
	if err != nil {
		return nil, fmt.Errorf("multipart/mixed: %w", err)
	}
	return parts, nil
}

// errPart takes the place of the library's errors, which show the line that they are
// about: without the empty line before it, that is one of a key.
var errPart = errors.New("a part's boundary or header is malformed")

func parseMultipartMixed(body []byte, boundary string) (parts []Part, err error) {
	const maxMixed = 2 * maxAnswer // base64 and headers
	defer func() {
		if err != nil {
			clearParts(parts)
			parts = nil
		}
	}()
	switch {
	case len(body) > maxMixed:
		return parts, fmt.Errorf("%d bytes, more than %d", len(body), maxMixed)
	case boundary == "" || len(boundary) > 70: // RFC 2046 §5.1.1
		return parts, errors.New("its boundary is not of 1 to 70 characters")
	}
	reader := multipart.NewReader(bytes.NewReader(body), boundary)
	for count := 0; ; count++ {
		part, err := reader.NextRawPart()
		switch {
		case errors.Is(err, io.EOF) && len(parts) == 0:
			return parts, errors.New("no part of EST with its boundary")
		case errors.Is(err, io.EOF):
			return parts, nil
		case err != nil:
			return parts, errPart
		}
		if count == maxParts {
			return parts, fmt.Errorf("more than %d parts", maxParts)
		}
		format, known := formatOf(part.Header.Get("Content-Type"))
		text := bytes.NewBuffer(make([]byte, 0, len(body)+bytes.MinRead)) // any part fits: it leaves no copy of itself behind
		_, err = text.ReadFrom(part)
		defer func() { clear(text.Bytes()) }()
		if err != nil {
			return parts, err
		}
		if known {
			der, err := DecodeBase64(text.Bytes())
			if err != nil {
				return parts, fmt.Errorf("part of content-format %d: %w", format, err)
			}
			parts = append(parts, Part{format, der})
		}
	}
}
