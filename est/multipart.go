package est

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"strings"
)

// mediaTypes are the media types of EST over HTTPS and the content-formats that are
// the same over CoAP (RFC 9148 §8.1). The value of smime-type decides where there is
// one.
var mediaTypes = []struct {
	mediaType, smimeType string
	format               ContentFormat
}{
	{"application/pkcs8", "", ContentFormatPKCS8},
	{"application/pkcs7-mime", "server-generated-key", ContentFormatPKCS7ServerKey},
	{"application/pkcs7-mime", "", ContentFormatPKCS7CertsOnly},
	{"application/pkix-cert", "", ContentFormatPKIXCert},
}

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

func parseMultipartMixed(body []byte, boundary string) (parts []Part, err error) {
	const maxMixed = 2 * maxAnswer // base64 and headers
	switch {
	case len(body) > maxMixed:
		return nil, fmt.Errorf("%d bytes, more than %d", len(body), maxMixed)
	case boundary == "" || len(boundary) > 70: // RFC 2046 §5.1.1
		return nil, errors.New("its boundary is not of 1 to 70 characters")
	}
	reader := multipart.NewReader(bytes.NewReader(body), boundary)
	for count := 0; ; count++ {
		part, err := reader.NextRawPart()
		switch {
		case errors.Is(err, io.EOF) && count == 0:
			return nil, errors.New("no part with its boundary")
		case errors.Is(err, io.EOF):
			return parts, nil
		case err != nil:
			return nil, err
		}
		if count == maxParts {
			return nil, fmt.Errorf("more than %d parts", maxParts)
		}
		format, known := formatOf(part.Header.Get("Content-Type"))
		text, err := io.ReadAll(part)
		if err != nil {
			return nil, err
		}
		if known {
			der, err := decodeBase64(text)
			clear(text)
			if err != nil {
				return nil, fmt.Errorf("part of content-format %d: %w", format, err)
			}
			parts = append(parts, Part{format, der})
		}
	}
}

// formatOf maps the value of a Content-Type.
func formatOf(contentType string) (format ContentFormat, known bool) {
	mediaType, parameters, err := mime.ParseMediaType(contentType)
	if err != nil {
		return 0, false
	}
	for _, m := range mediaTypes {
		if mediaType == m.mediaType && (m.smimeType == "" || strings.EqualFold(parameters["smime-type"], m.smimeType)) {
			return m.format, true
		}
	}
	return 0, false
}

// decodeBase64 decodes text with white space anywhere (RFC 8951 §3.1).
func decodeBase64(text []byte) ([]byte, error) {
	dense := make([]byte, 0, len(text))
	for _, c := range text {
		if c != ' ' && c != '\t' && c != '\r' && c != '\n' {
			dense = append(dense, c)
		}
	}
	defer clear(dense)
	der := make([]byte, base64.StdEncoding.DecodedLen(len(dense)))
	n, err := base64.StdEncoding.Decode(der, dense)
	if err != nil {
		clear(der)
		return nil, err
	}
	return der[:n], nil
}
