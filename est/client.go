package est

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
)

// Client speaks EST over an open session. What it returns is parsed and not yet
// judged: that is for TrustAnchors.
type Client struct {
	Session Session
	// DecryptionKey is what ServerKeyGen wants its keys to be encrypted for, which the
	// CSR says too (RFC 7030 §4.4.1). Default: they are not encrypted.
	DecryptionKey *DecryptionKey
}

// CACerts returns the CA certificates of the server (RFC 7030 §4.1): the
// Explicit TA and what leads to it. *ResponseError, and what the Session reports.
func (c *Client) CACerts(ctx context.Context) ([]*x509.Certificate, error) {
	return c.exchange(ctx, &Request{Operation: CACerts})
}

// SimpleEnroll sends a CSR (DER) and returns the certificates of the answer
// (RFC 7030 §4.2.1).
func (c *Client) SimpleEnroll(ctx context.Context, csr []byte) ([]*x509.Certificate, error) {
	return c.exchange(ctx, &Request{Operation: SimpleEnroll, Body: csr})
}

// SimpleReenroll sends a CSR (DER) with the Subject and SAN of the certificate
// that authenticates the session, and returns the certificates of the answer
// (RFC 7030 §4.2.2).
func (c *Client) SimpleReenroll(ctx context.Context, csr []byte) ([]*x509.Certificate, error) {
	return c.exchange(ctx, &Request{Operation: SimpleReenroll, Body: csr})
}

// CSRAttrs returns what the server wants to find in a CSR (RFC 7030 §4.5), as DER of
// at most 64 KiB that is for package csr to parse; nil if it has nothing to say.
func (c *Client) CSRAttrs(ctx context.Context) ([]byte, error) {
	resp, err := c.Session.RoundTrip(ctx, &Request{Operation: CSRAttrs})
	switch {
	case isNotFound(err): // RFC 9148 §4.5, RFC 7030 §4.5.2
		return nil, nil
	case err != nil:
		return nil, err
	case len(resp.Body) == 0:
		return nil, nil
	case len(resp.Body) > maxAnswer:
		err = fmt.Errorf("%d bytes, more than %d", len(resp.Body), maxAnswer)
	case resp.ContentFormat != ContentFormatCSRAttrs:
		err = fmt.Errorf("content-format %d, want %d", resp.ContentFormat, ContentFormatCSRAttrs)
	}
	if err != nil {
		return nil, &ResponseError{Operation: CSRAttrs, Err: err}
	}
	return resp.Body, nil
}

// ServerKeyGen sends a CSR (DER) whose key is of the kind that is wanted, and returns
// the key that the server has made and the certificates for it (RFC 7030 §4.4, RFC
// 9148 §4.8): the caller clears it. A server that has skc and no skg is asked by that.
// ErrKeyEnveloped, ErrKeyNotEnveloped, ErrKeyNotOpened.
func (c *Client) ServerKeyGen(ctx context.Context, csr []byte) (*ServerKey, error) {
	operation := ServerKeyGen
	resp, err := c.Session.RoundTrip(ctx, &Request{Operation: operation, Body: csr})
	if isNotFound(err) {
		only, onlyErr := c.Session.RoundTrip(ctx, &Request{Operation: ServerKeyGenCert, Body: csr})
		// Where there is neither, the usual one is what a person should read of.
		if !isNotFound(onlyErr) && !errors.Is(onlyErr, errors.ErrUnsupported) {
			operation, resp, err = ServerKeyGenCert, only, onlyErr
		}
	}
	if err != nil {
		return nil, err
	}
	key, err := c.serverKeyOf(resp)
	if err != nil {
		return nil, &ResponseError{Operation: operation, Err: err}
	}
	return key, nil
}

func isNotFound(err error) bool {
	var status *StatusError
	return errors.As(err, &status) && status.NotFound
}

func (c *Client) exchange(ctx context.Context, req *Request) ([]*x509.Certificate, error) {
	resp, err := c.Session.RoundTrip(ctx, req)
	if err != nil {
		return nil, err
	}
	certs, err := ParseCertificates(resp)
	if err != nil {
		return nil, &ResponseError{Operation: req.Operation, Err: err}
	}
	return certs, nil
}

// ParseCertificates parses an answer in whichever of the two formats it came:
// a client should take both, whatever it asked for (RFC 9148 §4.3).
func ParseCertificates(resp *Response) ([]*x509.Certificate, error) {
	certs, err := parseFormat(resp)
	if err != nil {
		return nil, err
	}
	for _, cert := range certs {
		if err := checkWhole(cert); err != nil {
			return nil, err
		}
	}
	return certs, nil
}

func parseFormat(resp *Response) ([]*x509.Certificate, error) {
	switch resp.ContentFormat {
	case ContentFormatPKCS7CertsOnly:
		return ParseCertsOnly(resp.Body)
	case ContentFormatPKIXCert:
		if len(resp.Body) > maxAnswer {
			return nil, fmt.Errorf("certificate: %d bytes, more than %d", len(resp.Body), maxAnswer)
		}
		if len(resp.Body) == 0 {
			return nil, errors.New("certificate: empty")
		}
		cert, err := x509.ParseCertificate(resp.Body)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
		return []*x509.Certificate{cert}, nil
	}
	return nil, fmt.Errorf("content-format %d, want %d or %d", resp.ContentFormat, ContentFormatPKCS7CertsOnly, ContentFormatPKIXCert)
}
