package testserver

import (
	"bytes"
	"cmp"
	"context"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/textproto"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	globalsign "github.com/globalsign/est"

	"estenroll/est"
	"estenroll/internal/coap"
)

// httpsDoor is the HTTPS front door (RFC 7030): the handler of globalsign/est over
// the same CA as the CoAPs door.
type httpsDoor struct {
	server   *http.Server
	listener net.Listener
	requests sync.WaitGroup

	mu     sync.Mutex // over what follows
	routed routing
}

// routing is a handler and what it was made for. Measured: globalsign/est v1.0.6
// keeps the CA certificates for five minutes to judge a renewal by, whatever cacerts
// answers since; so another state of the CA gets another handler.
type routing struct {
	handler http.Handler
	ca      *authorities
	crts    string // fault
}

// listenHTTPS opens the HTTPS front door, if there is to be one.
func (s *Server) listenHTTPS() (*httpsDoor, error) {
	if s.cfg.ListenHTTPS == "" {
		return nil, nil
	}
	listener, err := net.Listen("tcp", s.cfg.ListenHTTPS)
	if err != nil {
		return nil, err // which says where
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// cacerts is for clients that have no certificate yet too (RFC 7030 §4.1.2).
		ClientAuth: tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			chain, err := s.presentedChain(s.key.Public())
			return &tls.Certificate{Certificate: chain, PrivateKey: s.key}, err
		},
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return nil
			}
			return s.verifyClient(state.PeerCertificates)
		},
	}
	if s.cfg.TLS12 {
		config.MaxVersion = tls.VersionTLS12
	}
	logger := log.New(io.Discard, "", 0)
	if s.cfg.Logger != nil {
		logger = slog.NewLogLogger(s.cfg.Logger.Handler(), slog.LevelDebug)
	}
	return &httpsDoor{
		listener: tls.NewListener(listener, config),
		server: &http.Server{
			Handler: http.HandlerFunc(s.serveHTTPS), ReadHeaderTimeout: 30 * time.Second, ErrorLog: logger,
			BaseContext: func(net.Listener) context.Context { return s.stopping },
		},
	}, nil
}

func (d *httpsDoor) serve() error {
	if err := d.server.Serve(d.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("test server: serve HTTPS: %w", err)
	}
	return nil
}

// close ends every connection and waits for the requests under way.
func (d *httpsDoor) close() error {
	err := d.server.Close()
	if closed := d.listener.Close(); !errors.Is(closed, net.ErrClosed) { // it may not have been served yet
		err = errors.Join(err, closed)
	}
	d.requests.Wait()
	return err
}

// HTTPSURI returns the EST root of the HTTPS door without its path,
// https://host:port; empty if there is no such door.
func (s *Server) HTTPSURI() string {
	if s.https == nil {
		return ""
	}
	return "https://" + s.https.listener.Addr().String()
}

func (s *Server) serveHTTPS(w http.ResponseWriter, r *http.Request) {
	s.https.requests.Add(1)
	defer s.https.requests.Done()
	faults := s.Faults()
	answer := &httpsAnswer{header: http.Header{}, faults: faults}
	if status := s.refusedHTTPS(r, faults); status != 0 {
		http.Error(answer, "the client certificate is refused", status)
	} else if router, err := s.router(faults); err != nil {
		http.Error(answer, err.Error(), http.StatusInternalServerError)
	} else {
		router.ServeHTTP(answer, r.WithContext(context.WithValue(r.Context(), answerKey{}, answer)))
	}
	answer.send(w, r)
}

// refusedHTTPS returns the status for a client whose certificate is refused by an
// answer; 0 for others.
func (s *Server) refusedHTTPS(r *http.Request, faults Faults) int {
	client := peerOf(r)
	if client == nil || faults.RefuseCode == "" || !faults.refuses(client, s.ca.Load()) {
		return 0
	}
	if faults.RefuseCode == "4.03" {
		return http.StatusForbidden
	}
	return http.StatusUnauthorized
}

// peerOf returns the certificate that authenticated the client, nil if none did.
func peerOf(r *http.Request) *x509.Certificate {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil
	}
	return r.TLS.PeerCertificates[0]
}

func (s *Server) router(faults Faults) (http.Handler, error) {
	d, ca := s.https, s.ca.Load()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.routed.handler != nil && d.routed.ca == ca && d.routed.crts == faults.CRTS {
		return d.routed.handler, nil
	}
	handler, err := globalsign.NewRouter(&globalsign.ServerConfig{CA: httpsCA{s}, CheckBasicAuth: s.checkBasicAuth})
	d.routed = routing{handler: handler, ca: ca, crts: faults.CRTS}
	return handler, err
}

// checkBasicAuth decides who may send a CSR: where there is a user, who knows the
// password; else who has a certificate.
func (s *Server) checkBasicAuth(_ context.Context, r *http.Request, _, user, password string) error {
	switch {
	case s.cfg.HTTPUser == "" && peerOf(r) == nil:
		return errors.New("a client certificate is needed")
	case s.cfg.HTTPUser == "":
		return nil
	case user != s.cfg.HTTPUser || subtle.ConstantTimeCompare([]byte(password), []byte(s.cfg.HTTPPassword)) != 1:
		return errors.New("wrong user or password")
	}
	return nil
}

// httpsCA is the CA as the handler of globalsign/est sees it.
type httpsCA struct{ server *Server }

var _ globalsign.CA = httpsCA{}

// httpError is a refusal with the status of RFC 7030.
type httpError struct {
	status int
	detail string
}

func (e *httpError) StatusCode() int { return e.status }
func (e *httpError) Error() string   { return e.detail }

// RetryAfter leaves the header out: the door writes it, for the handler has no zero.
func (e *httpError) RetryAfter() int { return 0 }

func (ca httpsCA) checkLabel(label string) error {
	if label != "" && !slices.Contains(ca.server.cfg.Labels, label) {
		return &httpError{http.StatusNotFound, "no such label"}
	}
	return nil
}

func (ca httpsCA) CACerts(_ context.Context, label string, _ *http.Request) ([]*x509.Certificate, error) {
	return ca.server.crts(), ca.checkLabel(label)
}

// CSRAttrs has the door answer what is configured, byte for byte: the handler's own
// encoding puts the OIDs before the attributes.
func (ca httpsCA) CSRAttrs(_ context.Context, label string, r *http.Request) (globalsign.CSRAttrs, error) {
	if err := ca.checkLabel(label); err != nil {
		return globalsign.CSRAttrs{}, err
	}
	if ca.server.cfg.CSRAttributes == nil {
		return globalsign.CSRAttrs{}, &httpError{http.StatusNotFound, "there is no csrattrs"} // RFC 7030 §4.5.2
	}
	answerOf(r).shaped = ca.server.attributes()
	return globalsign.CSRAttrs{}, nil
}

func (ca httpsCA) Enroll(ctx context.Context, request *x509.CertificateRequest, label string, r *http.Request) (*x509.Certificate, error) {
	return ca.enroll(ctx, est.SimpleEnroll, peerOf(r), request, label, r)
}

func (ca httpsCA) Reenroll(ctx context.Context, client *x509.Certificate, request *x509.CertificateRequest, label string, r *http.Request) (*x509.Certificate, error) {
	return ca.enroll(ctx, est.SimpleReenroll, client, request, label, r)
}

// ServerKeyGen gives the key that was made too (RFC 7030 §4.4).
func (ca httpsCA) ServerKeyGen(ctx context.Context, request *x509.CertificateRequest, label string, r *http.Request) (*x509.Certificate, []byte, error) {
	if !ca.server.cfg.ServerKeyGen {
		return nil, nil, &httpError{http.StatusNotFound, "there is no serverkeygen"}
	}
	made, err := ca.issueOnce(ctx, est.ServerKeyGen, peerOf(r), request, label, r)
	// The handler has one certificate only, and passes (globalsign/est v1.0.6) an
	// EnvelopedData on for an RSA key only.
	if err == nil && (made.sealing != nil || ca.server.Faults().ServerKey != "" || len(ca.server.answered(nil)) > 1) {
		err = answerOf(r).keyed(ca.server.serverKey(est.ServerKeyGen, made))
	}
	return made.cert, made.pkcs8, err
}

func (ca httpsCA) TPMEnroll(context.Context, *x509.CertificateRequest, []*x509.Certificate, []byte, []byte, string, *http.Request) ([]byte, []byte, []byte, error) {
	return nil, nil, nil, &httpError{http.StatusNotImplemented, "tpmenroll is not EST"}
}

func (ca httpsCA) enroll(ctx context.Context, operation est.Operation, client *x509.Certificate, request *x509.CertificateRequest, label string, r *http.Request) (*x509.Certificate, error) {
	made, err := ca.issueOnce(ctx, operation, client, request, label, r)
	if err != nil {
		return nil, err
	}
	answerOf(r).shaped, err = ca.server.shapedAnswer(made.cert)
	return made.cert, err
}

func (ca httpsCA) issueOnce(ctx context.Context, operation est.Operation, client *x509.Certificate, request *x509.CertificateRequest, label string, r *http.Request) (issued, error) {
	if err := ca.checkLabel(label); err != nil {
		return issued{}, err
	}
	binding, err := est.TLSBinding(*r.TLS)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return issued{}, err
	}
	made, err := ca.server.issueOnce(ctx, enrollment{operation, r.URL.Path, client, request.Raw, binding, ""})
	var refused *refusal
	if errors.As(err, &refused) {
		err = answerOf(r).refused(refused)
	}
	return made, err
}

// shapedAnswer is the answer to a CSR where it is not the certificate alone; nil if
// it is.
func (s *Server) shapedAnswer(cert *x509.Certificate) (*coap.Response, error) {
	certs, kind := s.answered(cert), s.Faults().Body
	if len(certs) == 1 && kind == "" {
		return nil, nil
	}
	body, err := est.MarshalCertsOnly(certs)
	if err != nil {
		return nil, err
	}
	shaped := &coap.Response{ContentFormat: new(uint16(est.ContentFormatPKCS7CertsOnly)), Body: body}
	if kind != "" {
		err = s.shape(kind, shaped, certs)
	}
	return shaped, err
}

type answerKey struct{}

// answerOf is the answer to a request that the handler has.
func answerOf(r *http.Request) *httpsAnswer { return r.Context().Value(answerKey{}).(*httpsAnswer) }

// httpsAnswer holds the handler's answer back, to be changed.
type httpsAnswer struct {
	header     http.Header
	status     int
	body       bytes.Buffer
	faults     Faults
	shaped     *coap.Response // what to answer instead; nil for nothing else
	parts      []est.Part     // what to answer instead, as multipart/mixed
	retryAfter string
}

func (a *httpsAnswer) Header() http.Header { return a.header }
func (a *httpsAnswer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}
func (a *httpsAnswer) Write(p []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	return a.body.Write(p)
}

// refused maps a refusal to RFC 7030 §4.2.3.
func (a *httpsAnswer) refused(r *refusal) *httpError {
	status := http.StatusBadRequest
	switch r.kind {
	case refusedAs:
		status = int(r.code>>5)*100 + int(r.code&0x1f) // the codes of CoAP are those of HTTP
	case refusedClient:
		status = http.StatusForbidden
	case refusedForNow:
		status = http.StatusAccepted
		if r.retryAfter != nil {
			a.retryAfter = strconv.FormatInt(int64(*r.retryAfter/time.Second), 10)
		}
		if a.faults.RetryAfter != "" {
			a.retryAfter = a.faults.RetryAfter
		}
	}
	return &httpError{status, r.detail}
}

// keyed has the answer with a key be this one.
func (a *httpsAnswer) keyed(parts []est.Part, err error) error {
	if a.faults.ServerKey == noMultipart && err == nil {
		a.shaped = &coap.Response{ContentFormat: new(uint16(parts[0].ContentFormat)), Body: parts[0].Body}
		return nil
	}
	a.parts = parts
	return err
}

// send writes the answer, or what the faults make of it.
func (a *httpsAnswer) send(w http.ResponseWriter, r *http.Request) {
	if a.shaped != nil {
		a.header.Del("Content-Type")
		if format := a.shaped.ContentFormat; format != nil {
			a.header.Set("Content-Type", mediaType(est.ContentFormat(*format)))
		}
		a.body.Reset()
		a.body.WriteString(base64.StdEncoding.EncodeToString(a.shaped.Body))
	}
	if a.parts != nil {
		a.body.Reset()
		a.header.Set("Content-Type", writeMixed(&a.body, a.parts))
	}
	if a.retryAfter != "" {
		a.header.Set("Retry-After", a.retryAfter)
	}
	// globalsign/est v1.0.6 begins the text of an error with the status, which is said already.
	if text, found := bytes.CutPrefix(a.body.Bytes(), fmt.Appendf(nil, "%d ", a.status)); found {
		a.body = *bytes.NewBuffer(text)
	}
	if (a.status/100 > 3 || a.status == http.StatusAccepted) && a.faults.LongDetail {
		a.body.Reset()
		a.body.Write(longDetail)
	}
	for name, values := range a.header {
		w.Header()[name] = values
	}
	if _, typed := a.header["Content-Type"]; !typed {
		w.Header()["Content-Type"] = nil // or net/http would guess
	}
	if a.faults.HTTP != "" && a.faults.garbles(est.Operation(path.Base(r.URL.Path))) {
		a.sendWrong(a.faults.HTTP, w, r)
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(a.body.Len()))
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body.Bytes()) // a client that is gone needs none
}

func mediaType(format est.ContentFormat) string {
	return cmp.Or(format.MediaType(), "application/json") // formatJSON
}

// writeMixed writes multipart/mixed (RFC 7030 §4.4.2), and returns its Content-Type.
func writeMixed(to *bytes.Buffer, parts []est.Part) string {
	mixed := multipart.NewWriter(to)
	for _, part := range parts {
		// Neither fails: the buffer takes everything.
		body, _ := mixed.CreatePart(textproto.MIMEHeader{"Content-Type": {mediaType(part.ContentFormat)}, "Content-Transfer-Encoding": {"base64"}})
		_, _ = io.WriteString(body, base64.StdEncoding.EncodeToString(part.Body))
	}
	_ = mixed.Close()
	return "multipart/mixed; boundary=" + mixed.Boundary()
}

// The faults of HTTP itself, of the answer to a CSR.
var httpFaults = map[string]string{
	"bare":               "without a Content-Type and a Content-Transfer-Encoding, in one line",
	"created":            "status 201",
	"close":              "the end of the connection, after it",
	"cut":                "its first half, then the end of the connection",
	"wrong-type":         "a Content-Type of text/html",
	"wrong-boundary":     "a Content-Type with a boundary that a multipart does not have",
	"odd-boundary":       "a multipart with a boundary as odd as may be, between a preamble and an epilogue (RFC 2046 §5.1.1)",
	"not-base64":         "a body that is not base64",
	"slow-body":          "a byte of its body each second",
	"endless-body":       "a body without an end",
	"1-gib":              "a body of 1 GiB, as it says before",
	"long-header":        "a header of 1 MiB",
	"not-http":           "bytes that are not HTTP",
	"redirect-loop":      "a redirection to itself",
	"redirect-elsewhere": "a redirection to another server",
	"redirect-http":      "a redirection to itself without TLS",
}

// oddBoundary has each kind of character that a boundary may have.
const oddBoundary = "=_Bound'ary (1)+,-./:=?"

func (a *httpsAnswer) sendWrong(kind string, w http.ResponseWriter, r *http.Request) {
	header, status, body := w.Header(), a.status, a.body.Bytes()
	switch kind {
	case "bare":
		header["Content-Type"] = nil
		header.Del("Content-Transfer-Encoding")
		body = bytes.ReplaceAll(body, []byte("\r\n"), nil)
	case "created":
		status = http.StatusCreated
	case "close":
		header.Set("Connection", "close")
	case "cut", "not-http":
		a.breakOff(kind, w)
		return
	case "wrong-type":
		header.Set("Content-Type", "text/html")
	case "wrong-boundary":
		header.Set("Content-Type", "multipart/mixed; boundary=elsewhere")
	case "odd-boundary":
		if _, parameters, err := mime.ParseMediaType(header.Get("Content-Type")); err == nil && parameters["boundary"] != "" {
			header.Set("Content-Type", `multipart/mixed; boundary="`+oddBoundary+`"`)
			body = bytes.ReplaceAll(body, []byte("--"+parameters["boundary"]), []byte("--"+oddBoundary))
			body = slices.Concat([]byte("A preamble.\r\n"), body, []byte("\r\nAn epilogue."))
		}
	case "not-base64":
		body = []byte("<html>Enrolled.</html>")
	case "slow-body", "endless-body", "1-gib":
		if kind == "1-gib" {
			header.Set("Content-Length", strconv.Itoa(1<<30))
		}
		w.WriteHeader(status)
		trickle(kind == "slow-body", body, w, r)
		return
	case "long-header":
		header.Set("X-Long", strings.Repeat("x", 1<<20))
	case "redirect-loop":
		header.Set("Location", r.URL.Path)
		status = http.StatusTemporaryRedirect
	case "redirect-elsewhere":
		header.Set("Location", "https://elsewhere.example"+r.URL.Path)
		status = http.StatusTemporaryRedirect
	case "redirect-http":
		header.Set("Location", "http://"+r.Host+r.URL.Path)
		status = http.StatusTemporaryRedirect
	}
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

// breakOff ends the connection in the midst of the answer.
func (a *httpsAnswer) breakOff(kind string, w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	if kind == "not-http" {
		_, _ = io.WriteString(conn, "EST/1.0 enrolled\r\n\r\n")
		return
	}
	body := a.body.Bytes()
	_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", a.header.Get("Content-Type"), len(body), body[:len(body)/2])
}

// trickle writes a body slowly, or a base64 one without an end, until the client or
// the server has enough.
func trickle(slowly bool, body []byte, w http.ResponseWriter, r *http.Request) {
	flush := http.NewResponseController(w)
	if !slowly {
		block := bytes.Repeat([]byte("QUJD"), 16<<10)
		for r.Context().Err() == nil {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
		return
	}
	for i := range body {
		if _, err := w.Write(body[i : i+1]); err != nil || flush.Flush() != nil {
			return
		}
		select {
		case <-time.After(time.Second):
		case <-r.Context().Done():
			return
		}
	}
}
