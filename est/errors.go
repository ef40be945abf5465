package est

import (
	"crypto/x509"
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
	// ErrNoAnchor says, beside one of the other two, that a chain would need another
	// trust anchor: it leads to none of those that are held, or only by way of a CA
	// certificate that has expired. A server whose CA has changed since looks like that.
	ErrNoAnchor = errors.New("no valid trust anchor leads to it")
	// ErrNotVouched says that a server publishes no root that a held anchor or the
	// operator vouches for.
	ErrNotVouched = errors.New("nobody vouches for the published roots")
	// ErrNotValidNow says that a certificate is expired or not yet valid at the
	// verification time; *ValidityError says which and when.
	ErrNotValidNow = errors.New("not valid at the verification time")
	// ErrNoCertificate says that the answer to a CSR holds CA certificates only.
	ErrNoCertificate = errors.New("no certificate but those of CAs")
	// ErrSeveralCertificates says that the answer to a CSR holds more than one
	// certificate that is not of a CA: which one to take would be a guess.
	ErrSeveralCertificates = errors.New("more than one certificate that is not of a CA")
	// ErrServerCertificate says that it is the server's certificate that was not
	// accepted, beside the reason why: nothing was asked of that server.
	ErrServerCertificate = errors.New("server certificate")
	// ErrHandshake says that server and client came to no secure session: one of
	// them ended the handshake for a reason that is no certificate's.
	ErrHandshake = errors.New("no secure session")
	// ErrUnreachable says that the server gave no answer.
	ErrUnreachable = errors.New("no answer from the server")
	// ErrFellSilent says, beside ErrUnreachable, that the server answered at first: its
	// address is right.
	ErrFellSilent = errors.New("the server answers and then falls silent")
	// ErrUnlinked says, beside ErrUnreachable, that the connection a CSR was linked to is
	// gone and the CSR was not sent on another: it must be made again, for the channel
	// binding that the session has by now.
	ErrUnlinked = errors.New("the connection that the request is linked to is gone")
	// ErrCredentialRefused says that the server refused our certificate.
	ErrCredentialRefused = errors.New("the server refuses our certificate")
	// ErrCertificateWanted says that the server asks for a certificate, and there is none
	// to show.
	ErrCertificateWanted = errors.New("the server wants a certificate, and there is none")
	// ErrPasswordWanted says that the server asks for a user and a password
	// (RFC 7030 §3.2.3), and there is none to give.
	ErrPasswordWanted = errors.New("the server asks for a user and a password")
	// ErrPasswordRefused says that the server does not accept the user and the
	// password that it was given.
	ErrPasswordRefused = errors.New("the server refuses the user and the password")
	// ErrPSKRefused says that the server does not accept the pre-shared key or its identity.
	ErrPSKRefused = errors.New("the server refuses the pre-shared key or its identity")
	// ErrPSKUnanswered says, beside ErrUnreachable, that the server fell silent when it was
	// shown the pre-shared key, as one does that has another.
	ErrPSKUnanswered = errors.New("a server that has another pre-shared key falls silent")
	// ErrKeyUnsuitable says that the server takes no certificate, or no signature,
	// of the kind of our key.
	ErrKeyUnsuitable = errors.New("the server does not accept this kind of key")
	// ErrCredentialNotYetValid says that our certificate is not valid by the
	// server's clock.
	ErrCredentialNotYetValid = errors.New("our certificate is not valid by the server's clock")
)

// Unreachable makes an ErrUnreachable, and whatever else it is, of a cause that says
// enough by itself.
func Unreachable(cause error, also ...error) error {
	return &unreachableError{cause, append([]error{cause, ErrUnreachable}, also...)}
}

type unreachableError struct {
	cause error
	is    []error
}

func (e *unreachableError) Error() string   { return e.cause.Error() }
func (e *unreachableError) Unwrap() []error { return e.is }

// A StatusError is an answer that is not a success.
type StatusError struct {
	Operation Operation
	Server    string // URI of the resource
	// Code as the transport prints it: "4.03 Forbidden", "403 Forbidden".
	Code string
	// Class of the code, 4 or 5 (RFC 7252 §5.9, RFC 9110 §15); over HTTPS 3 as well,
	// for a redirection that is none of the request.
	Class int
	// Unauthorized says that the code is 4.01 or 401.
	Unauthorized bool
	// NotFound says that the code is 4.04 or 404.
	NotFound bool
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

// A ValidityError is a certificate that is not valid at a time: errors.Is finds
// ErrNotValidNow in it.
type ValidityError struct {
	Certificate *x509.Certificate
	Time        time.Time
}

// Expired tells an expired certificate from one that is not yet valid.
func (e *ValidityError) Expired() bool { return e.Time.After(e.Certificate.NotAfter) }

// Error says which certificate it is, which of the two, and the times.
func (e *ValidityError) Error() string {
	stamp := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	if e.Expired() {
		return fmt.Sprintf("%q is expired since %s and it is %s", e.Certificate.Subject, stamp(e.Certificate.NotAfter), stamp(e.Time))
	}
	return fmt.Sprintf("%q is not yet valid, it begins at %s and it is %s", e.Certificate.Subject, stamp(e.Certificate.NotBefore), stamp(e.Time))
}

// Unwrap returns ErrNotValidNow.
func (e *ValidityError) Unwrap() error { return ErrNotValidNow }

// MaxRetryAfter is the longest wait that a server is believed.
const MaxRetryAfter = 30 * 24 * time.Hour

// A PendingError is the answer of a server that has not decided: 5.03 with
// Max-Age, 202 with Retry-After (RFC 9148 §4.7, RFC 7030 §4.2.3).
type PendingError struct {
	Operation Operation
	Server    string
	// RetryAfter is how long to wait, at least, before the same CSR is sent again.
	RetryAfter time.Duration
	// Asked is what the server asked for when that is longer than MaxRetryAfter,
	// and else zero.
	Asked time.Duration
	// Detail is the server's own text: capped and printable, see NewDetail.
	Detail string
}

// NewPendingError makes the error of a server that asks to wait.
//
// Deviation: the client is to wait at least as long (RFC 9148 §4.7), but no
// longer than MaxRetryAfter: a Max-Age reaches 136 years, and one wrong answer
// would silence a device for good.
func NewPendingError(operation Operation, server string, asked time.Duration) *PendingError {
	if asked > MaxRetryAfter {
		return &PendingError{Operation: operation, Server: server, RetryAfter: MaxRetryAfter, Asked: asked}
	}
	return &PendingError{Operation: operation, Server: server, RetryAfter: max(asked, 0)}
}

// Error says how long to wait.
func (e *PendingError) Error() string {
	text := fmt.Sprintf("%s at %s: not decided yet, come back in %s", e.Operation, e.Server, e.RetryAfter)
	if e.Asked != 0 {
		text += fmt.Sprintf(" (the server asks for %s)", e.Asked)
	}
	if e.Detail != "" {
		text += fmt.Sprintf(": %q", e.Detail)
	}
	return text
}

// A ResponseError is a success whose body is not what EST says.
type ResponseError struct {
	// Operation is empty where the answer is judged apart from its request.
	Operation Operation
	Err       error
}

// Error returns "operation: answer: cause".
func (e *ResponseError) Error() string {
	if e.Operation == "" {
		return fmt.Sprintf("answer: %s", e.Err)
	}
	return fmt.Sprintf("%s: answer: %s", e.Operation, e.Err)
}

// Unwrap returns the cause.
func (e *ResponseError) Unwrap() error { return e.Err }
