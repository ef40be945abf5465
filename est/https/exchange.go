package https

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"estenroll/est"
)

// Limits of what a server's answer may be.
const (
	maxBody      = 256 << 10 // bytes: more than package est parses, in base64
	maxRedirects = 5
)

// answer is a final one.
type answer struct {
	status int
	header http.Header
	body   []byte
	server string // URI that gave it
}

// answerError is an answer that came from the authenticated server and is none.
type answerError struct{ cause error }

func (e *answerError) Error() string { return e.cause.Error() }
func (e *answerError) Unwrap() error { return e.cause }

// exchange sends a request and follows what the server itself points to.
func (s *Session) exchange(ctx context.Context, req *est.Request, at est.URI) (*answer, error) {
	for range maxRedirects + 1 {
		got, err := s.send(ctx, req, at)
		if err != nil {
			return nil, err
		}
		if s.cfg.Provisional {
			return got, nil
		}
		if got.status == http.StatusUnauthorized && s.authorization == "" {
			if got, err = s.sendWithPassword(ctx, req, at, got); err != nil {
				return nil, err
			}
		}
		if got.status == http.StatusUnauthorized && s.authorization != "" {
			return nil, fmt.Errorf("%w: %w", est.ErrPasswordRefused, s.statusError(req.Operation, got))
		}
		next, redirected, err := s.redirection(req, at, got)
		if err != nil || !redirected {
			return got, err
		}
		at = next
	}
	return nil, &answerError{fmt.Errorf("more than %d redirections", maxRedirects)}
}

// redirection returns where an answer points. Of a POST only 307 and 308 say that
// it is the same request there (RFC 9110 §15.4). Without a person to ask, no other
// origin is followed (RFC 7030 §3.2.1): not with our certificate, nor without.
func (s *Session) redirection(req *est.Request, from est.URI, got *answer) (to est.URI, redirected bool, err error) {
	switch got.status {
	case http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	case http.StatusMovedPermanently, http.StatusFound:
		if len(req.Body) > 0 {
			return to, false, nil
		}
	default:
		return to, false, nil
	}
	location := got.header.Get("Location")
	reference, err := url.Parse(location)
	if err != nil || location == "" {
		return to, false, &answerError{errors.New("a redirection to nowhere")}
	}
	target := (&url.URL{Scheme: from.Scheme, Host: from.Address(), Path: from.Root}).ResolveReference(reference)
	if target.Scheme != from.Scheme {
		return to, false, &answerError{fmt.Errorf("a redirection to another protocol, %q: it is not followed", est.NewDetail([]byte(location)))}
	}
	if to, err = est.ParseURI(target.String()); err != nil {
		return to, false, &answerError{fmt.Errorf("a redirection to %q: %w", est.NewDetail([]byte(location)), err)}
	}
	if !strings.EqualFold(to.Host, from.Host) || to.Port != from.Port {
		return to, false, &answerError{fmt.Errorf("a redirection to another server, %q: it is not followed", est.NewDetail([]byte(location)))}
	}
	return to, true, nil
}

var basicChallenge = regexp.MustCompile(`(?i)(^|,)\s*basic(\s|,|$)`)

// sendWithPassword answers a 401 with the user and the password, once in a session
// (RFC 7030 §3.2.3): the server is the one whose certificate was accepted.
func (s *Session) sendWithPassword(ctx context.Context, req *est.Request, at est.URI, refused *answer) (*answer, error) {
	// Without a header it is not said what is asked for (which RFC 9110 §11.6.1 wants).
	challenges := strings.Join(refused.header.Values("WWW-Authenticate"), ",")
	if challenges != "" && !basicChallenge.MatchString(challenges) {
		return refused, nil
	}
	if s.cfg.Password == nil {
		if challenges == "" {
			return refused, nil
		}
		return nil, fmt.Errorf("%w: %w", est.ErrPasswordWanted, s.statusError(req.Operation, refused))
	}
	password, err := s.cfg.Password()
	if err != nil {
		return nil, fmt.Errorf("password of HTTP Basic: %w", err)
	}
	pair := append([]byte(s.cfg.User+":"), password...)
	clear(password)
	s.authorization = "Basic " + base64.StdEncoding.EncodeToString(pair) // RFC 7617 §2
	clear(pair)
	return s.send(ctx, req, at)
}

// send is one request and its answer on the connection.
func (s *Session) send(ctx context.Context, req *est.Request, at est.URI) (*answer, error) {
	l, err := s.usable(ctx)
	if err != nil {
		return nil, err
	}
	if len(req.Body) > 0 && s.bound != nil && s.bound != l {
		// What was made of its channel binding is worth nothing here.
		s.bound = nil
		return nil, est.Unreachable(est.ErrUnlinked)
	}
	request, err := s.request(ctx, req, at)
	if err != nil {
		return nil, err
	}
	var began atomic.Bool
	response, err := l.conn.RoundTrip(request.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotFirstResponseByte: func() { began.Store(true) },
	})))
	if err != nil {
		// What the connection ended for tells an alert from what came of it.
		if classified := s.classify(ctx, l, errors.Join(l.conn.Err(), err)); classified != nil {
			return nil, classified
		}
		if began.Load() {
			return nil, malformed(req.Operation, err)
		}
		return nil, est.Unreachable(err)
	}
	body, err := readBody(response.Body)
	_ = response.Body.Close() // what is left of it is of no use, nor is the connection then
	if response.Close {
		_ = l.conn.Close() // at once, so that the next request does not meet its end
	}
	if err == nil {
		// Measured: when the time is up, a server may end a body early and in due form,
		// because our end of the connection is closing.
		err = ctx.Err()
	}
	switch {
	case err != nil:
		clear(body) // half of a key, perhaps
		if classified := s.classify(ctx, l, err); classified != nil {
			return nil, classified
		}
		return nil, malformed(req.Operation, err)
	case len(body) > maxBody && response.StatusCode/100 == 2:
		return nil, &answerError{fmt.Errorf("a body of more than %d bytes", maxBody)}
	}
	return &answer{status: response.StatusCode, header: response.Header, body: body, server: at.String()}, nil
}

// malformed is an answer that net/http cannot read. Its error shows the line where it
// gave up, which may be one of a key.
func malformed(operation est.Operation, err error) error {
	if operation == est.ServerKeyGen {
		err = errors.New("malformed HTTP")
	}
	return &answerError{err}
}

// readBody reads a body, or one byte more than the largest. It may be a key: none of
// the buffers that it outgrows keeps a part of it.
func readBody(from io.Reader) ([]byte, error) {
	body := make([]byte, 0, 4<<10)
	for {
		n, err := from.Read(body[len(body):min(cap(body), maxBody+1)])
		body = body[:len(body)+n]
		switch {
		case errors.Is(err, io.EOF):
			return body, nil
		case err != nil || len(body) > maxBody:
			return body, err
		case len(body) == cap(body):
			larger := append(make([]byte, 0, 4*cap(body)), body...)
			clear(body)
			body = larger
		}
	}
}

// request makes the HTTP request: strict, since the server may be of any make.
func (s *Session) request(ctx context.Context, req *est.Request, at est.URI) (*http.Request, error) {
	method, body := http.MethodGet, io.Reader(nil)
	if len(req.Body) > 0 {
		method, body = http.MethodPost, bytes.NewReader(encodeBody(req.Body))
	}
	request, err := http.NewRequestWithContext(ctx, method, at.String(), body)
	if err != nil {
		return nil, err
	}
	request.Host = strings.TrimSuffix(request.Host, ":443") // which some servers know no host by
	request.Header.Set("User-Agent", "est-enroll")
	if len(req.Body) > 0 {
		request.Header.Set("Content-Type", "application/pkcs10") // RFC 7030 §4.2.1
		// RFC 8951 §3.2 has servers ignore it. Measured: globalsign/est v1.0.6
		// answers 415 without it.
		request.Header.Set("Content-Transfer-Encoding", "base64")
	}
	if s.authorization != "" {
		request.Header.Set("Authorization", s.authorization)
	}
	return request, nil
}

// interpret maps an answer to EST (RFC 7030 §4.1.3, §4.2.3, §4.5.2).
func (s *Session) interpret(operation est.Operation, got *answer) (*est.Response, error) {
	defer clear(got.body) // it may be a key
	response, err := parse(operation, got)
	_, says := got.header["Retry-After"]
	switch status := got.status; {
	case status == http.StatusAccepted && err == nil && (len(response.Body) > 0 || len(response.Parts) > 0):
		return response, nil // it has decided, whatever it calls that
	case status == http.StatusAccepted, status == http.StatusTooManyRequests, status == http.StatusServiceUnavailable && says:
		pending := est.NewPendingError(operation, got.server, retryAfter(got.header, s.cfg.Now()))
		if operation != est.ServerKeyGen || status/100 != 2 { // a key that was not understood is no detail
			pending.Detail = est.NewDetail(got.body)
		}
		return nil, pending
	case status/100 != 2:
		return nil, s.statusError(operation, got)
	case err != nil:
		return nil, &est.ResponseError{Operation: operation, Err: err}
	}
	return response, nil
}

func (s *Session) statusError(operation est.Operation, got *answer) *est.StatusError {
	return &est.StatusError{
		Operation: operation, Server: got.server, Code: statusText(got.status), Class: got.status / 100,
		Unauthorized: got.status == http.StatusUnauthorized, NotFound: got.status == http.StatusNotFound, Detail: est.NewDetail(got.body),
	}
}

// statusText prints a status without the server's own words for it.
func statusText(status int) string {
	return strings.TrimSpace(strconv.Itoa(status) + " " + http.StatusText(status))
}

// parse reads the body of a success in whatever form it came. Where there is no
// Content-Type, the operation says what it must be.
func parse(operation est.Operation, got *answer) (*est.Response, error) {
	contentType := got.header.Get("Content-Type")
	if strings.TrimSpace(contentType) == "" {
		expected := est.ContentFormatPKCS7CertsOnly
		if operation == est.CSRAttrs {
			expected = est.ContentFormatCSRAttrs
		}
		contentType = expected.MediaType()
	}
	return est.ParseBody(contentType, got.body)
}

const lineLength = 76 // RFC 2045 §6.8, "no more than 76 characters each"

// encodeBody is base64 in lines (RFC 4648 §4, RFC 8951 §3.1).
func encodeBody(der []byte) []byte {
	text := base64.StdEncoding.AppendEncode(nil, der)
	var lines []byte
	for len(text) > 0 {
		n := min(lineLength, len(text))
		lines, text = append(append(lines, text[:n]...), "\r\n"...), text[n:]
	}
	return lines
}

// defaultRetryAfter is for an answer that does not say when, or not so that it is
// understood: what a Max-Age that is absent means (RFC 7252 §5.10.5).
const defaultRetryAfter = time.Minute

// retryAfter reads a Retry-After (RFC 9110 §10.2.3): a number of seconds, or a
// date, which is by the server's clock as its Date shows it, else by ours.
func retryAfter(header http.Header, now time.Time) time.Duration {
	text := strings.TrimSpace(header.Get("Retry-After"))
	if text != "" && strings.Trim(text, "0123456789") == "" {
		seconds, err := strconv.ParseInt(text, 10, 64)
		if err != nil || seconds > math.MaxInt64/int64(time.Second) {
			return math.MaxInt64 // which est.NewPendingError makes a bearable wait of
		}
		return time.Duration(seconds) * time.Second
	}
	date, err := http.ParseTime(text)
	if err != nil {
		return defaultRetryAfter
	}
	if sent, err := http.ParseTime(header.Get("Date")); err == nil {
		now = sent
	}
	return date.Sub(now)
}
