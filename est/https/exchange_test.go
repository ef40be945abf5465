package https_test

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll/est"
	"estenroll/est/https"
)

// A password is given once, to a server that asks for it, and with every request of
// the session after that.
func TestPassword(t *testing.T) {
	t.Parallel()
	const challenge = `Basic realm="est"`
	for name, c := range map[string]struct {
		challenge   string
		right       string
		withoutUser bool
		want        error
		requests    int32 // of two exchanges
		asked       int   // times that the password was read
	}{
		"right":             {challenge, "open sesame", false, nil, 3, 1},
		"among others":      {`Digest realm="a", nonce="b", BASIC realm="c"`, "open sesame", false, nil, 3, 1},
		"without a header":  {"", "open sesame", false, nil, 3, 1},
		"wrong":             {challenge, "another", false, est.ErrPasswordRefused, 3, 1},
		"none to give":      {challenge, "open sesame", true, est.ErrPasswordWanted, 1, 0},
		"another scheme":    {`Digest realm="basic"`, "open sesame", false, est.ErrCredentialRefused, 1, 0},
		"a certificate's":   {"", "open sesame", true, est.ErrCredentialRefused, 1, 0},
		"not asked for one": {"none", "", false, nil, 2, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, nil, func(rw http.ResponseWriter, r *http.Request) {
				user, password, given := r.BasicAuth()
				if c.challenge == "none" {
					if given {
						t.Error("a password for a server that has not asked")
					}
					return
				}
				if user != "dev-17" || password != c.right {
					if c.challenge != "" {
						rw.Header().Set("WWW-Authenticate", c.challenge)
					}
					rw.WriteHeader(http.StatusUnauthorized)
				}
			})
			asked, given := 0, []byte("open sesame")
			session := w.dial(t, func(cfg *https.Config) {
				if !c.withoutUser {
					cfg.User, cfg.Password = "dev-17", func() ([]byte, error) { asked++; return given, nil }
				}
			})
			_, err := ask(t, session, est.CSRAttrs, nil)
			if c.want == nil && err == nil {
				_, err = ask(t, session, est.CSRAttrs, nil)
			}
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if err != nil && (strings.Contains(err.Error(), "open sesame") || strings.Contains(err.Error(), base64.StdEncoding.EncodeToString([]byte("dev-17:open sesame")))) {
				t.Errorf("the password is in %q", err)
			}
			if asked > 0 && !bytes.Equal(given, make([]byte, len(given))) {
				t.Errorf("what the password was read into is %q", given)
			}
			if errors.Is(err, est.ErrPasswordRefused) {
				_, err = ask(t, session, est.CSRAttrs, nil)
				if !errors.Is(err, est.ErrPasswordRefused) {
					t.Errorf("again: got %v", err)
				}
			}
			if w.requests.Load() != c.requests || asked != c.asked || w.listener.connections.Load() != 1 {
				t.Errorf("%d requests on %d connections, the password read %d times", w.requests.Load(), w.listener.connections.Load(), asked)
			}
		})
	}
}

// A server may close the connection with its 401: the password is given on the next one,
// and with each request after that.
func TestPasswordOnAnotherConnection(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil, func(rw http.ResponseWriter, r *http.Request) {
		if _, password, _ := r.BasicAuth(); password != "open sesame" {
			rw.Header().Set("WWW-Authenticate", "Basic")
			rw.Header().Set("Connection", "close")
			rw.WriteHeader(http.StatusUnauthorized)
		}
	})
	session := w.dial(t, func(c *https.Config) {
		c.User, c.Password = "dev-17", func() ([]byte, error) { return []byte("open sesame"), nil }
	})
	for range 2 {
		if _, err := ask(t, session, est.SimpleEnroll, []byte("csr")); err != nil {
			t.Fatal(err)
		}
	}
	if w.requests.Load() != 3 || w.listener.connections.Load() != 2 {
		t.Errorf("%d requests on %d connections", w.requests.Load(), w.listener.connections.Load())
	}
}

// A redirection is followed where it leads to the same server and to the same
// request; another server gets no connection, so neither certificate nor password.
func TestRedirection(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 7030 §3.2.1 (1)")
	t.Attr("shows", "RFC 7030 §3.6.2 (1)")
	t.Attr("shows", "RFC 7030 §3.3 (2)")
	elsewhere := newWorld(t, nil, func(http.ResponseWriter, *http.Request) {})
	for name, c := range map[string]struct {
		status   int
		location string // HERE is the server
		post     bool
		followed bool
		want     string // in the error
	}{
		"GET, moved":                {301, "/other/place", false, true, ""},
		"GET, found":                {302, "https://HERE/other/place", false, true, ""},
		"GET, temporary":            {307, "place", false, true, ""},
		"POST, temporary":           {307, "/other/place", true, true, ""},
		"POST, permanent":           {308, "/other/place", true, true, ""},
		"POST, found":               {302, "/other/place", true, false, "302 Found"},
		"POST, see other":           {303, "/other/place", true, false, "303 See Other"},
		"GET, see other":            {303, "/other/place", false, false, "303 See Other"},
		"another port":              {307, elsewhere.uri.String(), true, false, "a redirection to another server"},
		"another host":              {307, "https://localhost:PORT/x", true, false, "a redirection to another server"},
		"another host, GET":         {302, "https://est.example/x", false, false, "a redirection to another server"},
		"another scheme":            {307, "http://HERE/x", true, false, "a redirection to another protocol"},
		"a scheme of EST":           {307, "coaps://HERE/x", true, false, "a redirection to another protocol"},
		"without a scheme":          {307, "//est.example/x", true, false, "a redirection to another server"},
		"with a user":               {307, "https://a:b@HERE/x", true, false, "a redirection to"},
		"to nowhere":                {307, "", true, false, "a redirection to nowhere"},
		"to what is no URI":         {307, "https://%zz", true, false, "a redirection to nowhere"},
		"in a circle":               {307, "/.well-known/est/simpleenroll", true, false, "more than 5 redirections"},
		"with control characters":   {307, "/a\tb", true, false, "a redirection to"},
		"not modified":              {304, "/other/place", false, false, "304 Not Modified"},
		"which has no such meaning": {399, "/other/place", false, false, "399"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w *world
			w = newWorld(t, nil, func(rw http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				if strings.HasSuffix(r.URL.Path, "/place") {
					if (r.Method == http.MethodPost) != c.post || c.post && len(body) == 0 {
						t.Errorf("%s with %d bytes", r.Method, len(body))
					}
					return
				}
				rw.Header()["Location"] = []string{strings.NewReplacer("HERE", w.uri.Address(), "PORT", strconv.Itoa(int(w.uri.Port))).Replace(c.location)}
				rw.WriteHeader(c.status)
			})
			session := w.dial(t, nil)
			operation, body := est.CSRAttrs, []byte(nil)
			if c.post {
				operation, body = est.SimpleEnroll, []byte("csr")
			}
			_, err := ask(t, session, operation, body)
			if (err == nil) != c.followed || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if n := w.listener.connections.Load(); n != 1 {
				t.Errorf("%d connections", n)
			}
		})
	}
	t.Cleanup(func() {
		if n := elsewhere.listener.connections.Load(); n != 0 {
			t.Errorf("%d connections to the other server", n)
		}
	})
}

// What a server may leave out or have its own way with.
func TestTolerance(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 8951 §3 (2)")
	t.Attr("shows", "RFC 8951 §3.1 (1)")
	der := bytes.Repeat([]byte{0x30, 0x03, 1, 2, 3}, 40)
	text := base64.StdEncoding.EncodeToString(der)
	for name, c := range map[string]struct {
		contentType string
		body        string
		status      int
		want        est.ContentFormat
	}{
		"all that there is":      {certsOnlyType, text, 200, est.ContentFormatPKCS7CertsOnly},
		"no parameter":           {"application/pkcs7-mime", text, 200, est.ContentFormatPKCS7CertsOnly},
		"an old name":            {"Application/X-PKCS7-MIME", text, 200, est.ContentFormatPKCS7CertsOnly},
		"a malformed parameter":  {"application/pkcs7-mime; smime-type", text, 200, est.ContentFormatPKCS7CertsOnly},
		"no content type":        {"", text, 200, est.ContentFormatPKCS7CertsOnly},
		"a certificate":          {"application/pkix-cert", text, 200, est.ContentFormatPKIXCert},
		"short lines":            {certsOnlyType, strings.Join(strings.SplitAfter(text, "A"), "\n"), 200, est.ContentFormatPKCS7CertsOnly},
		"CRLF and an empty line": {certsOnlyType, text[:64] + "\r\n" + text[64:] + "\r\n\r\n", 200, est.ContentFormatPKCS7CertsOnly},
		"spaces":                 {certsOnlyType, " " + text[:10] + "\t " + text[10:], 200, est.ContentFormatPKCS7CertsOnly},
		"no padding":             {certsOnlyType, strings.TrimRight(text, "="), 200, est.ContentFormatPKCS7CertsOnly},
		"created":                {certsOnlyType, text, 201, est.ContentFormatPKCS7CertsOnly},
		"by way of a proxy":      {certsOnlyType, text, 203, est.ContentFormatPKCS7CertsOnly},
		"any other success":      {certsOnlyType, text, 299, est.ContentFormatPKCS7CertsOnly},
		"accepted, and decided":  {certsOnlyType, text, 202, est.ContentFormatPKCS7CertsOnly},
		"attributes":             {"application/csrattrs", text, 200, est.ContentFormatCSRAttrs},
		"a generated key":        {"application/pkcs7-mime; smime-type=server-generated-key", text, 200, est.ContentFormatPKCS7ServerKey},
		"a key":                  {"application/pkcs8", text, 200, est.ContentFormatPKCS8},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, nil, func(rw http.ResponseWriter, _ *http.Request) {
				rw.Header().Set("Content-Transfer-Encoding", "quoted-printable") // which it is not
				rw.Header()["Content-Type"] = nil
				if c.contentType != "" {
					rw.Header().Set("Content-Type", c.contentType)
				}
				rw.WriteHeader(c.status)
				_, _ = io.WriteString(rw, c.body)
			})
			got, err := ask(t, w.dial(t, nil), est.SimpleEnroll, []byte("csr"))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&est.Response{ContentFormat: c.want, Body: der}, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// An answer of several parts is a key and its certificate, or says what it lacks; a
// server that says "accepted" and gives them has decided.
func TestMultipart(t *testing.T) {
	t.Parallel()
	key, cert := newParty(t, nil, "device", nil), newParty(t, nil, "device", nil).cert
	der, err := x509.MarshalPKCS8PrivateKey(key.key)
	if err != nil {
		t.Fatal(err)
	}
	part := func(contentType string, der []byte) string {
		return "--x y\r\nContent-Type: " + contentType + "\r\n\r\n" + base64.StdEncoding.EncodeToString(der) + "\r\n"
	}
	certPart, end := part("application/pkix-cert", cert.Raw), "--x y--\r\n"
	for name, c := range map[string]struct {
		status int
		body   string
		want   string // in the error, "" for none
	}{
		"both":                  {200, certPart + part("application/pkcs8", der) + end, ""},
		"accepted, and decided": {202, certPart + part("application/pkcs8", der) + end, ""},
		"no key":                {200, certPart + end, "no key"},
		"none of EST":           {200, part("text/plain", der) + end, "multipart/mixed: no part of EST"},
		"its beginning":         {200, "--x y\r\n", "multipart/mixed: "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, nil, func(rw http.ResponseWriter, _ *http.Request) {
				rw.Header().Set("Content-Type", `multipart/mixed; boundary="x y"`)
				rw.WriteHeader(c.status)
				_, _ = io.WriteString(rw, c.body)
			})
			got, err := (&est.Client{Session: w.dial(t, nil)}).ServerKeyGen(t.Context(), []byte("csr"))
			var answer *est.ResponseError
			switch {
			case c.want == "" && (err != nil || !bytes.Equal(got.PKCS8, der) || !got.Certificates[0].Equal(cert)):
				t.Errorf("got %+v, %v", got, err)
			case c.want != "" && (!errors.As(err, &answer) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// Answers that are no success, and what they mean.
func TestStatus(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		status     int
		retryAfter string
		check      func(error) bool
	}{
		"pending":                 {202, "10", isPending(10 * time.Second)},
		"pending, without a time": {202, "", isPending(time.Minute)},
		"too many requests":       {429, "7", isPending(7 * time.Second)},
		"unavailable for a time":  {503, "5", isPending(5 * time.Second)},
		"unavailable":             {503, "", isStatus(5)},
		"broken":                  {500, "", isStatus(5)},
		"refused":                 {403, "", isStatus(4)},
		"not there":               {404, "", func(err error) bool { var s *est.StatusError; return errors.As(err, &s) && s.NotFound }},
		"not with this one":       {401, "", func(err error) bool { return errors.Is(err, est.ErrCredentialRefused) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, nil, func(rw http.ResponseWriter, _ *http.Request) {
				if c.retryAfter != "" {
					rw.Header().Set("Retry-After", c.retryAfter)
				}
				rw.WriteHeader(c.status)
				_, _ = io.WriteString(rw, "why\x1b[2J")
			})
			_, err := ask(t, w.dial(t, nil), est.SimpleEnroll, []byte("csr"))
			if !c.check(err) {
				t.Errorf("got %v", err)
			}
			if !strings.Contains(err.Error(), "simpleenroll at "+w.uri.String()+"/simpleenroll: ") || !strings.Contains(err.Error(), `"why.[2J"`) {
				t.Errorf("got %q", err)
			}
			if w.requests.Load() != 1 {
				t.Errorf("%d requests", w.requests.Load())
			}
		})
	}
}

func isPending(want time.Duration) func(error) bool {
	return func(err error) bool {
		var pending *est.PendingError
		return errors.As(err, &pending) && pending.RetryAfter == want
	}
}

func isStatus(class int) func(error) bool {
	return func(err error) bool {
		var status *est.StatusError
		return errors.As(err, &status) && status.Class == class && status.Temporary() == (class == 5)
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	t.Attr("shows", "RFC 7030 §4.2.3 (1)")
	const sent = "Tue, 24 Nov 2026 12:00:00 GMT"
	for _, c := range []struct {
		text, date string
		want       time.Duration // as it is believed
	}{
		{"0", "", 0},
		{"120", "", 2 * time.Minute},
		{" 120 ", "", 2 * time.Minute},
		{"31536000", "", est.MaxRetryAfter},
		{"9223372036854775807", "", est.MaxRetryAfter},
		{"99999999999999999999999999", "", est.MaxRetryAfter},
		{"-1", "", time.Minute},
		{"+1", "", time.Minute},
		{"1.5", "", time.Minute},
		{"", "", time.Minute},
		{"soon", "", time.Minute},
		{"Tue, 24 Nov 2026 12:05:00 GMT", "", 5 * time.Minute},
		{"Tuesday, 24-Nov-26 12:05:00 GMT", "", 5 * time.Minute},
		{"Tue Nov 24 12:05:00 2026", "", 5 * time.Minute},
		{"Sun, 06 Nov 1994 08:49:37 GMT", "", 0},
		{"Fri, 31 Dec 9999 23:59:59 GMT", "", est.MaxRetryAfter},
		// By the server's clock, which is not the device's.
		{"Tue, 24 Nov 2026 12:05:00 GMT", sent, 5 * time.Minute},
		{"Mon, 01 Jan 2035 00:01:00 GMT", "Mon, 01 Jan 2035 00:00:00 GMT", time.Minute},
	} {
		header := http.Header{"Retry-After": {c.text}}
		if c.date != "" {
			header.Set("Date", c.date)
		}
		got := est.NewPendingError(est.SimpleEnroll, "", https.RetryAfter(header, epoch)).RetryAfter
		if got != c.want {
			t.Errorf("%q, sent %q: got %s, want %s", c.text, c.date, got, c.want)
		}
	}
}

// FuzzRetryAfter: whatever a server writes, the wait is bounded.
func FuzzRetryAfter(f *testing.F) {
	for _, seed := range []string{"0", "120", "99999999999999999999", "Sun, 06 Nov 1994 08:49:37 GMT", "soon"} {
		f.Add(seed, "")
		f.Add(seed, "Tue, 24 Nov 2026 12:00:00 GMT")
	}
	f.Fuzz(func(t *testing.T, text, date string) {
		got := est.NewPendingError("", "", https.RetryAfter(http.Header{"Retry-After": {text}, "Date": {date}}, epoch)).RetryAfter
		if got < 0 || got > est.MaxRetryAfter {
			t.Errorf("%q, %q: got %s", text, date, got)
		}
	})
}

// A server that is authenticated and hostile: bounded time and memory, an error
// that says what it was, and whether it is worth another try.
func TestHostileServer(t *testing.T) {
	t.Parallel()
	hijack := func(text string) http.HandlerFunc {
		return func(rw http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(rw).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_, _ = io.WriteString(conn, text)
		}
	}
	endless := func(head string) http.HandlerFunc {
		return func(rw http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(rw).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_, err = io.WriteString(conn, head)
			for block := strings.Repeat("QUJD", 16<<10); err == nil; {
				_, err = io.WriteString(conn, block)
			}
		}
	}
	for name, c := range map[string]struct {
		handler     http.HandlerFunc
		timeout     time.Duration
		want        string
		unreachable bool
	}{
		"1 GiB":                {endless("HTTP/1.1 200 OK\r\nContent-Type: application/pkcs7-mime\r\nContent-Length: 1073741824\r\n\r\n"), 0, "a body of more than 262144 bytes", false},
		"no end":               {endless("HTTP/1.1 200 OK\r\nContent-Type: application/pkcs7-mime\r\n\r\n"), 0, "a body of more than 262144 bytes", false},
		"no end of an error":   {endless("HTTP/1.1 403 Forbidden\r\n\r\n"), 0, "403 Forbidden", false},
		"a header without end": {endless("HTTP/1.1 200 OK\r\nX-Long: "), 0, "headers exceeded", false},
		"interim without end":  {hijack(strings.Repeat("HTTP/1.1 103 Early Hints\r\nX-Long: "+strings.Repeat("x", 1000)+"\r\n\r\n", 100)), 0, "exceeded", false},
		"nothing":              {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 200 * time.Millisecond, "no answer in time", true},
		"a slow header":        {slowHeader, 300 * time.Millisecond, "no answer in time", true},
		"a slow body":          {slowly, 300 * time.Millisecond, "no answer in time", true},
		"half a body":          {hijack("HTTP/1.1 200 OK\r\nContent-Type: application/pkcs7-mime\r\nContent-Length: 100\r\n\r\nQUJD"), 0, "unexpected EOF", true},
		"no answer":            {hijack(""), 0, "EOF", true},
		"not HTTP":             {hijack("EST/1.0 enrolled\r\n\r\n"), 0, "malformed HTTP", false},
		"a malformed header":   {hijack("HTTP/1.1 200 OK\r\nnothing\r\n\r\n"), 0, "malformed", false},
		"HTML":                 {answering("text/html; charset=utf-8", []byte("x")), 0, `content type "text/html", which is not one of EST`, false},
		"a type that is none":  {answering("!/", []byte("x")), 0, "content type", false},
		"not base64": {func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Type", certsOnlyType)
			_, _ = io.WriteString(rw, "<html>")
		}, 0, "the body is not base64", false},
		"a compression":       {hijack("HTTP/1.1 200 OK\r\nContent-Type: application/pkcs7-mime\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"), 0, "the body is not base64", false},
		"another protocol":    {hijack("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"), 0, "101", false},
		"a status beyond all": {hijack("HTTP/1.1 999 \r\nContent-Length: 0\r\n\r\n"), 0, "999", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, nil, c.handler)
			session := w.dial(t, func(cfg *https.Config) {
				if c.timeout > 0 {
					cfg.ExchangeTimeout = c.timeout
				}
			})
			_, err := ask(t, session, est.SimpleEnroll, []byte("csr"))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if strings.ContainsRune(err.Error(), 0x1b) {
				t.Errorf("a control character in %q", err)
			}
			if errors.Is(err, est.ErrUnreachable) != c.unreachable {
				t.Errorf("unreachable %t: %v", !c.unreachable, err)
			}
			var answer *est.ResponseError
			var status *est.StatusError
			if !c.unreachable && !errors.As(err, &answer) && !errors.As(err, &status) {
				t.Errorf("not an answer: %T %v", err, err)
			}
		})
	}
}

// What cannot be read of an answer with a key is not shown, whatever its status.
func TestMalformedKey(t *testing.T) {
	t.Parallel()
	const key = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg"
	for name, text := range map[string]string{
		"in the header":   "200 OK\r\nContent-Type: application/pkcs8\r\n" + key + "\r\n\r\n",
		"after its chunk": "200 OK\r\nContent-Type: application/pkcs8\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + key + "\r\n\r\n",
		"accepted":        "202 Accepted\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--c\r\nContent-Type: application/pkcs8\r\n\r\n" + key + "\r\n--c--\r\n",
	} {
		w := newWorld(t, nil, func(rw http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(rw).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_, _ = io.WriteString(conn, "HTTP/1.1 "+text)
		})
		_, err := w.dial(t, nil).RoundTrip(t.Context(), &est.Request{Operation: est.ServerKeyGen, Body: []byte("a CSR")})
		if err == nil || errors.Is(err, est.ErrUnreachable) || strings.Contains(err.Error(), key[:8]) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// slowHeader writes a header without an end, line by line.
func slowHeader(rw http.ResponseWriter, _ *http.Request) {
	conn, _, err := http.NewResponseController(rw).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, err = io.WriteString(conn, "HTTP/1.1 200 OK\r\n"); err == nil; <-tick.C {
		_, err = io.WriteString(conn, "X: y\r\n")
	}
}

func slowly(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Content-Type", certsOnlyType)
	for r.Context().Err() == nil {
		if _, err := io.WriteString(rw, "A"); err != nil || http.NewResponseController(rw).Flush() != nil {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-r.Context().Done():
		}
	}
}

// A body without an end costs no more memory than the limit allows.
func TestBoundedMemory(t *testing.T) {
	w := newWorld(t, nil, func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", certsOnlyType)
		block := bytes.Repeat([]byte("QUJD"), 4<<10)
		for range 64 << 10 { // 1 GiB
			if _, err := rw.Write(block); err != nil {
				return
			}
		}
	})
	session := w.dial(t, nil)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := ask(t, session, est.SimpleEnroll, []byte("csr")); err == nil {
		t.Fatal("no error")
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 16<<20 {
		t.Errorf("%d bytes were allocated", got)
	}
}

// The way leads through a proxy: the handshake is with the server behind it, and the
// proxy learns neither a request nor a password.
func TestProxy(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil, func(_ http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Proxy-Authorization") != "" {
			t.Error("the proxy's password at the server")
		}
	})
	for name, c := range map[string]struct {
		setting string // PROXY is its address
		answer  string
		want    string // in the error, "" for none
	}{
		"http":              {"http://PROXY", "HTTP/1.1 200 Connection established\r\n\r\n", ""},
		"with a user":       {"http://u:secret@PROXY", "HTTP/1.1 200 OK\r\n\r\n", ""},
		"that refuses":      {"http://u:secret@PROXY", "HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", "answers 407 Proxy Authentication Required"},
		"that is no proxy":  {"http://PROXY", "SSH-2.0\r\n", "malformed"},
		"over TLS":          {"https://u:secret@PROXY", "", "want http:// or socks5://"},
		"that is no URL":    {"http://u:secret@[", "", "the proxy's setting is not a URL"},
		"that is not there": {"http://u:secret@127.0.0.1:1", "", "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			asked := make(chan *http.Request, 1)
			go func() {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				request, err := http.ReadRequest(bufio.NewReader(conn))
				if err != nil {
					return
				}
				asked <- request
				_, _ = io.WriteString(conn, c.answer)
				if !strings.Contains(c.answer, " 200 ") {
					return
				}
				behind, err := net.Dial("tcp", request.Host)
				if err != nil {
					return
				}
				go func() { _, _ = io.Copy(behind, conn); _ = behind.Close() }()
				_, _ = io.Copy(conn, behind)
			}()
			cfg := w.config()
			cfg.Proxy = func(*http.Request) (*url.URL, error) {
				return url.Parse(strings.ReplaceAll(c.setting, "PROXY", listener.Addr().String()))
			}
			session, err := https.Dial(t.Context(), cfg)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret") {
					t.Fatalf("got %v, want %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer session.Close()
			if _, err := ask(t, session, est.CSRAttrs, nil); err != nil {
				t.Fatal(err)
			}
			if r := <-asked; r.Method != http.MethodConnect || r.Host != w.uri.Address() || r.Header.Get("Authorization") != "" {
				t.Errorf("the proxy was asked %s %s", r.Method, r.Host)
			}
		})
	}
}

// kept is a body that notes the buffers that it is read into.
type kept struct {
	io.Reader
	buffers [][]byte
}

func (k *kept) Read(to []byte) (int, error) {
	n, err := k.Reader.Read(to[:min(len(to), 1000)])
	k.buffers = append(k.buffers, to[:n])
	return n, err
}

// A body is read whole, up to one byte more than the largest, and is in one place alone:
// it may be a key.
func TestReadBody(t *testing.T) {
	t.Parallel()
	const most = 256<<10 + 1
	for _, size := range []int{0, 1, 4096, 5000, 70000, most - 1, most, most + 1, 3 * most} {
		from := &kept{Reader: bytes.NewReader(bytes.Repeat([]byte{7}, size))}
		body, err := https.ReadBody(from)
		if err != nil || !bytes.Equal(body, bytes.Repeat([]byte{7}, min(size, most))) {
			t.Errorf("%d bytes: got %d, %v", size, len(body), err)
		}
		clear(body)
		for _, buffer := range from.buffers {
			if !bytes.Equal(buffer, make([]byte, len(buffer))) {
				t.Fatalf("%d bytes: some are still in a buffer that was outgrown", size)
			}
		}
	}
}

// The certificate as it is, beside a key, is CoAP's: no such thing is asked for here.
func TestServerKeyGenCert(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil, func(http.ResponseWriter, *http.Request) { t.Error("something was asked for") })
	if _, err := w.dial(t, nil).RoundTrip(t.Context(), &est.Request{Operation: est.ServerKeyGenCert, Body: []byte("csr")}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
}
