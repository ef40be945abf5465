package est

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Errors of EST, to be tested with errors.Is.
var (
	// ErrKeyMismatch says that the issued certificate is for another key than
	// the one asked for.
	ErrKeyMismatch = errors.New("the certificate is for another key")
	// ErrNotTrusted says that a chain does not end in a trust anchor, or that a
	// certificate is not for what it is used for.
	ErrNotTrusted = errors.New("not trusted")
	// ErrNotValidNow says that a certificate is expired or not yet valid at the
	// verification time.
	ErrNotValidNow = errors.New("not valid at the verification time")
	// ErrUnreachable says that the server gave no answer.
	ErrUnreachable = errors.New("no answer from the server")
	// ErrCredentialRefused says that the server refused our certificate.
	ErrCredentialRefused = errors.New("the server refuses our certificate")
	// ErrCredentialNotYetValid says that our certificate is not valid by the
	// server's clock.
	ErrCredentialNotYetValid = errors.New("our certificate is not valid by the server's clock")
)

// A StatusError is an answer that is not a success.
type StatusError struct {
	Operation Operation
	Server    string // URI of the resource
	// Code as the transport prints it: "4.03 Forbidden", "403 Forbidden".
	Code string
	// Class of the code, 4 or 5 (RFC 7252 §5.9, RFC 9110 §15).
	Class int
	// Unauthorized says that the code is 4.01 or 401.
	Unauthorized bool
	// Detail is the server's own text: capped and printable, see NewDetail.
	Detail string
}

// Error returns "simplereenroll at coaps://…: 4.03 Forbidden: "detail"".
func (e *StatusError) Error() string {
	text := fmt.Sprintf("%s at %s: %s", e.Operation, e.Server, e.Code)
	if e.Detail != "" {
		text += fmt.Sprintf(": %q", e.Detail)
	}
	return text
}

// Is makes an unauthorized answer an ErrCredentialRefused.
func (e *StatusError) Is(target error) bool {
	return target == ErrCredentialRefused && e.Unauthorized
}

// Temporary says that the server had a problem of its own (a code of class 5).
func (e *StatusError) Temporary() bool { return e.Class == 5 }

const maxDetail = 512 // bytes

// NewDetail makes a server's text fit for an error: at most 512 bytes, printable.
func NewDetail(body []byte) string {
	if len(body) > maxDetail {
		body = body[:maxDetail]
	}
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '.'
		}
		return r
	}, strings.TrimSpace(string(body)))
}

// A PendingError is the answer of a server that has not decided: 5.03 with
// Max-Age, 202 with Retry-After (RFC 9148 §4.7, RFC 7030 §4.2.3).
type PendingError struct {
	Operation Operation
	Server    string
	// RetryAfter is how long to wait, at least, before the same CSR is sent again.
	RetryAfter time.Duration
}

// Error says how long to wait.
func (e *PendingError) Error() string {
	return fmt.Sprintf("%s at %s: not decided yet, come back in %s", e.Operation, e.Server, e.RetryAfter)
}

// A ResponseError is a success whose body is not what EST says.
type ResponseError struct {
	Operation Operation
	Err       error
}

// Error returns "operation: answer: cause".
func (e *ResponseError) Error() string { return fmt.Sprintf("%s: answer: %s", e.Operation, e.Err) }

// Unwrap returns the cause.
func (e *ResponseError) Unwrap() error { return e.Err }
