package est

import (
	"encoding/base64"
	"errors"
	"fmt"
	"mime"
	"strings"
)

// mediaTypes are the media types of EST over HTTPS and the content-formats that are
// the same over CoAP (RFC 9148 §8.1), the one to write before what is read too. The
// value of smime-type decides where there is one.
var mediaTypes = []struct {
	mediaType, smimeType string
	format               ContentFormat
}{
	{"application/pkcs8", "", ContentFormatPKCS8},
	{"application/pkcs7-mime", "server-generated-key", ContentFormatPKCS7ServerKey},
	{"application/pkcs7-mime", "certs-only", ContentFormatPKCS7CertsOnly},
	{"application/pkcs7-mime", "", ContentFormatPKCS7CertsOnly},
	{"application/x-pkcs7-mime", "server-generated-key", ContentFormatPKCS7ServerKey},
	{"application/x-pkcs7-mime", "", ContentFormatPKCS7CertsOnly},
	{"application/pkix-cert", "", ContentFormatPKIXCert},
	{"application/csrattrs", "", ContentFormatCSRAttrs},
}

// MediaType returns the Content-Type of a format over HTTPS; empty if it has none.
func (f ContentFormat) MediaType() string {
	for _, m := range mediaTypes {
		if m.format == f && m.smimeType != "" {
			return m.mediaType + "; smime-type=" + m.smimeType
		}
		if m.format == f {
			return m.mediaType
		}
	}
	return ""
}

// ParseBody parses what came over HTTPS with its Content-Type: base64, whatever its
// Content-Transfer-Encoding says and however its lines are broken (RFC 8951 §3), or
// several parts of that (multipart/mixed, RFC 7030 §4.4.2).
func ParseBody(contentType string, body []byte) (*Response, error) {
	mediaType, parameters, err := parseMediaType(contentType)
	if err != nil {
		return nil, fmt.Errorf("content type %q", NewDetail([]byte(contentType)))
	}
	if mediaType == "multipart/mixed" {
		parts, err := ParseMultipartMixed(body, parameters["boundary"])
		if err != nil {
			return nil, err
		}
		return &Response{Parts: parts}, nil
	}
	format, known := formatOf(contentType)
	if !known {
		return nil, fmt.Errorf("content type %q, which is not one of EST", NewDetail([]byte(mediaType)))
	}
	der, err := DecodeBase64(body)
	if err != nil {
		return nil, fmt.Errorf("the body is %w", err)
	}
	return &Response{ContentFormat: format, Body: der}, nil
}

// formatOf maps the value of a Content-Type.
func formatOf(contentType string) (format ContentFormat, known bool) {
	mediaType, parameters, err := parseMediaType(contentType)
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

// parseMediaType lets a parameter be malformed.
func parseMediaType(contentType string) (mediaType string, parameters map[string]string, err error) {
	mediaType, parameters, err = mime.ParseMediaType(contentType)
	if errors.Is(err, mime.ErrInvalidMediaParameter) {
		err = nil
	}
	return mediaType, parameters, err
}

// DecodeBase64 decodes base64 with white space anywhere, with its padding or without.
func DecodeBase64(text []byte) ([]byte, error) {
	dense := make([]byte, 0, len(text))
	for _, c := range text {
		if c != ' ' && c != '\t' && c != '\r' && c != '\n' {
			dense = append(dense, c)
		}
	}
	defer clear(dense) // it may be a key
	for len(dense) > 0 && dense[len(dense)-1] == '=' {
		dense = dense[:len(dense)-1]
	}
	der := make([]byte, base64.RawStdEncoding.DecodedLen(len(dense)))
	n, err := base64.RawStdEncoding.Decode(der, dense)
	if err != nil {
		clear(der)
		return nil, errors.New("not base64")
	}
	return der[:n], nil
}
