package testserver_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/csr"
	"estenroll/est"
	"estenroll/internal/coap"
	"estenroll/testserver"
)

// aFault is a fault, what is on beside it, and the doors at which it is seen.
type aFault struct {
	text, beside string
	coaps, https bool
}

// choicesAt says of each fault with a table of values at which doors it is seen.
var choicesAt = map[string]aFault{
	"body": {coaps: true, https: true}, "crts": {coaps: true, https: true}, "csrattrs": {coaps: true, https: true}, "server-key": {coaps: true, https: true},
	"envelope":           {coaps: true, https: true},
	"server-certificate": {coaps: true, https: true}, "message": {coaps: true}, "http": {https: true},
	"at": {beside: "http=bare", https: true}, // and below for messages
}

// plainFaults are all others; HEX is the serial number of a certificate issued here.
var plainFaults = []aFault{
	{"delay=1h", "", true, true}, {"defer=1", "", true, true}, {"defer=1,max-age=9s", "", true, true}, {"retry-after=soon", "defer=1", false, true},
	{"wrong-key", "", true, true}, {"not-yet-valid", "", true, true}, {"expired", "", true, true}, {"foreign-chain", "", true, true}, {"ca-flag", "", true, true},
	{"subject=CN=other", "", true, true}, {"drop-san", "", true, true}, {"ignore-usage", "", true, true},
	{"answer=4.12", "", true, true}, {"long-detail", "answer=4.12", true, true},
	{"no-discovery", "", true, false}, {"links=</x>;rt=\"ace.est.crts\"", "", true, false},
	{"at=crts", "message=critical-option", true, false}, {"at=att", "message=critical-option", true, false},
	{"refuse-all", "", true, true}, {"refuse-client=issued", "", true, true}, {"refuse-client=HEX", "", true, true}, {"refuse-code=4.03", "refuse-all", true, true},
}

// impatient are the faults that a client sees by the time that it takes.
var impatient = regexp.MustCompile(`^(delay|message=(block-slow|silent|acknowledged-only|wrong-token|truncated|trailing)|http=slow-body)`)

// boundary is another each time.
var boundary = regexp.MustCompile(`; boundary=\w+$`)

// helpLine is a fault of the help, or a value of the one above it.
var helpLine = regexp.MustCompile(`(?m)^ {2,4}([a-z][^ ]*)  +\S`)

// everyFault is each that the help names.
func everyFault(t *testing.T) (all []aFault) {
	t.Helper()
	all = slices.Clone(plainFaults)
	var choice string
	for _, line := range helpLine.FindAllStringSubmatch(testserver.FaultsHelp, -1) {
		name, value, _ := strings.Cut(line[1], "=")
		at, known := choicesAt[name]
		switch {
		case strings.HasPrefix(line[0], "    "):
			at = choicesAt[choice]
			at.text = choice + "=" + name
			all = append(all, at)
		case value == "VALUE" && !known:
			t.Errorf("no test says at which doors %s is seen", name)
		case value == "VALUE":
			choice = name
		case !slices.ContainsFunc(all, func(f aFault) bool { return strings.HasPrefix(f.text+"=", name+"=") }):
			t.Errorf("no test has the fault %s", name)
		}
	}
	// And each field has a text in the help.
	union := reflect.ValueOf(testserver.Faults{})
	missing := map[string]bool{}
	for i := range union.NumField() {
		missing[union.Type().Field(i).Name] = true
	}
	for _, fault := range all {
		for name := range missing {
			if !reflect.ValueOf(parse(t, fault.beside, fault.text)).FieldByName(name).IsZero() {
				delete(missing, name)
			}
		}
	}
	if len(missing) > 0 {
		t.Errorf("no test has the faults %v", slices.Collect(maps.Keys(missing)))
	}
	return all
}

func parse(t *testing.T, texts ...string) testserver.Faults {
	t.Helper()
	texts = slices.DeleteFunc(texts, func(text string) bool { return text == "" })
	for i := range texts {
		texts[i] = strings.ReplaceAll(texts[i], "HEX", "0abc")
	}
	faults, err := testserver.ParseFaults(texts)
	if err != nil {
		t.Fatal(err)
	}
	return faults
}

// Each fault that there is changes what a client sees, at each door that it is for
// and at no other.
func TestEveryFault(t *testing.T) {
	t.Parallel()
	all := everyFault(t)
	for name, door := range map[string]struct {
		raw  bool
		seen func(*visit) (map[string]string, error)
		at   func(aFault) bool
	}{
		"CoAPs": {false, (*visit).coaps, func(f aFault) bool { return f.coaps }},
		"raw":   {true, (*visit).coaps, func(f aFault) bool { return f.coaps }},
		"HTTPS": {false, (*visit).https, func(f aFault) bool { return f.https }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			decryption, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				t.Fatal(err)
			}
			server := startHTTPS(t, testserver.Config{
				Raw: door.raw, ServerKeyGen: true, CSRAttributes: []byte{0x30, 0}, EnvelopeKeys: []testserver.EnvelopeKey{{ID: []byte{1}, Public: &decryption.PublicKey}},
			})
			v := &visit{t: t, server: server, factory: idevid(t, server, "dev"), decryption: &est.DecryptionKey{ID: []byte{1}, RSA: decryption}}
			v.issued = ldevid(t, server, v.factory, "dev")
			see := func(patience time.Duration, texts ...string) map[string]string {
				faults := parse(t, texts...)
				if len(faults.RefuseClients) > 0 {
					faults.RefuseClients[0] = v.issued.cert.SerialNumber.Text(16)
				}
				if err := server.SetFaults(faults); err != nil {
					t.Fatal(err)
				}
				v.patience = patience
				v.another.Store(false)
				seen, err := door.seen(v)
				if err != nil {
					return map[string]string{"handshake": err.Error()}
				}
				if v.another.Load() {
					seen["handshake"] = "another certificate of the server's"
				}
				return seen
			}
			honest := map[string]map[string]string{}
			for _, fault := range all {
				message := strings.HasPrefix(fault.text, "message=") || strings.HasPrefix(fault.beside, "message=")
				if message != door.raw {
					continue // the raw door has the CA of the other, and the faults that the other has not
				}
				if honest[fault.beside] == nil {
					honest[fault.beside] = see(20*time.Second, fault.beside)
				}
				patience := 20 * time.Second
				if impatient.MatchString(fault.text) && door.at(fault) { // elsewhere it is not to be seen
					patience = 150 * time.Millisecond
				}
				got := see(patience, fault.beside, fault.text)
				if diff := cmp.Diff(honest[fault.beside], got); (diff != "") != door.at(fault) {
					t.Errorf("%s: is seen: %t, (-without +with):\n%s", fault.text, diff != "", diff)
				}
			}
			if got := honest[""]; !strings.Contains(got["sen"], "for the key that was asked, under the issuing CA") || !strings.Contains(got["skg"], "the key is the certificate's") {
				t.Errorf("without a fault: %v", got)
			}
		})
	}
}

// A server refuses a fault that it cannot have as it was started, by its name.
func TestFaultsRefused(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	for _, fault := range everyFault(t) {
		name, _, _ := strings.Cut(fault.text, "=")
		err := server.SetFaults(parse(t, fault.beside, fault.text))
		if beside, _, _ := strings.Cut(fault.beside, "="); name == "at" {
			name = beside
		}
		if refused := slices.Contains([]string{"message", "http", "retry-after", "csrattrs", "server-key", "envelope"}, name); refused != (err != nil) || refused && !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", fault.text, err)
		}
	}
	if server, err := testserver.New(testserver.Config{Faults: testserver.Faults{ServerKey: "no-key"}}); err == nil {
		t.Errorf("started with a fault that it cannot have: %v", server.Close())
	}
}

// visit asks a server for everything, as a device that has no opinion.
type visit struct {
	t               *testing.T
	server          *testserver.Server
	factory, issued credential
	decryption      *est.DecryptionKey
	patience        time.Duration
	another         atomic.Bool // certificate was shown by the server
}

// sealedRequest is a CSR that names the decryption key.
func (v *visit) sealedRequest() []byte {
	v.t.Helper()
	return protected(v.t, csr.KeyProtection{ID: v.decryption.ID, OAEP: true})
}

// request is a CSR that asks for names and usages.
func (v *visit) request(key crypto.Signer) []byte {
	template := named("dev")
	template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 3, 0x88}}}
	return newCSR(v.t, key, template)
}

// shows notes that the server shows another certificate than its own. A handshake may
// go on while nobody waits for it any more.
func (v *visit) shows(leaf *x509.Certificate) {
	if !leaf.Equal(v.server.ServerChain()[0]) {
		v.another.Store(true)
	}
}

func (v *visit) coaps() (map[string]string, error) {
	seen := map[string]string{}
	open := func(as credential) (*coap.Conn, error) {
		ctx, cancel := context.WithTimeout(v.t.Context(), 20*time.Second)
		defer cancel()
		return coap.Dial(ctx, v.server.Addr().String(), coap.Config{
			Certificate: [][]byte{as.cert.Raw}, Key: as.key, AckTimeout: v.patience, MaxRetransmit: -1, ExchangeTimeout: v.patience,
			Verify: func(peer []*x509.Certificate) error { v.shows(peer[0]); return nil },
		})
	}
	conn, err := open(v.factory)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ask := func(conn *coap.Conn, method coap.Code, path string, body []byte, describe func(*coap.Response) string) string {
		req := &coap.Request{Method: method, Path: path, Body: body}
		if method == codes.POST {
			req.ContentFormat = new(uint16(est.ContentFormatPKCS10))
		}
		resp, err := conn.Do(v.t.Context(), req)
		if err != nil {
			return err.Error()
		}
		text := fmt.Sprintf("%v format %v max-age %v: ", resp.Code, value(resp.ContentFormat), value(resp.MaxAge))
		if resp.Code>>5 != 2 {
			return text + string(resp.Body)
		}
		return text + describe(resp)
	}
	const root = "/.well-known/est/"
	key := newKey(v.t)
	certificates := func(resp *coap.Response) string { return v.certificates(resp.ContentFormat, resp.Body, key.Public()) }
	seen["core"] = ask(conn, codes.GET, "/.well-known/core", nil, func(resp *coap.Response) string { return string(resp.Body) })
	seen["crts"] = ask(conn, codes.GET, root+"crts", nil, certificates)
	seen["att"] = ask(conn, codes.GET, root+"att", nil, func(resp *coap.Response) string { return fmt.Sprintf("%x", resp.Body) })
	seen["sen"] = ask(conn, codes.POST, root+"sen", v.request(key), certificates)
	keyed := func(with *est.DecryptionKey) func(*coap.Response) string {
		return func(resp *coap.Response) string {
			parts, err := est.ParseMultipartCore(resp.Body)
			return v.parts(parts, err, with)
		}
	}
	seen["skg"] = ask(conn, codes.POST, root+"skg", v.request(newKey(v.t)), keyed(nil))
	seen["skg, sealed"] = ask(conn, codes.POST, root+"skg", v.sealedRequest(), keyed(v.decryption))
	again, err := open(v.issued)
	if err != nil {
		seen["issued"] = err.Error()
		return seen, nil
	}
	defer again.Close()
	seen["issued"] = ask(again, codes.GET, root+"crts", nil, certificates)
	return seen, nil
}

func (v *visit) https() (map[string]string, error) {
	seen := map[string]string{}
	open := func(as credential) (*http.Client, func()) {
		transport := &http.Transport{TLSClientConfig: &tls.Config{
			InsecureSkipVerify: true, Certificates: []tls.Certificate{{Certificate: [][]byte{as.cert.Raw}, PrivateKey: as.key}},
			VerifyConnection: func(state tls.ConnectionState) error {
				v.shows(state.PeerCertificates[0])
				return nil
			},
		}}
		client := &http.Client{Transport: transport, Timeout: v.patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		return client, transport.CloseIdleConnections
	}
	client, end := open(v.factory)
	defer end()
	ask := func(client *http.Client, method, operation string, der []byte, describe func(contentType string, body []byte) string) string {
		req, err := http.NewRequestWithContext(v.t.Context(), method, v.server.HTTPSURI()+"/.well-known/est/"+operation, strings.NewReader(base64.StdEncoding.EncodeToString(der)))
		if err != nil {
			v.t.Fatal(err)
		}
		if method == http.MethodPost {
			req.Header.Set("Content-Type", "application/pkcs10")
			req.Header.Set("Content-Transfer-Encoding", "base64")
		}
		resp, err := client.Do(req)
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		const limit = 1 << 20
		body, err := io.ReadAll(io.LimitReader(resp.Body, limit))
		header := resp.Header
		text := fmt.Sprintf("%s, %q, Retry-After %q, Location %q, X-Long %d, close %t, %v: ", resp.Status, boundary.ReplaceAllString(header.Get("Content-Type"), ""), header.Get("Retry-After"),
			header.Get("Location"), len(header.Get("X-Long")), resp.Close, err)
		switch {
		case len(body) == limit:
			return text + "endless"
		case resp.StatusCode >= 300:
			return text + string(body)
		}
		return text + describe(header.Get("Content-Type"), body)
	}
	key := newKey(v.t)
	certificates := func(contentType string, body []byte) string {
		answer, err := est.ParseBody(contentType, body)
		if err != nil {
			return err.Error()
		}
		return v.certificates(new(uint16(answer.ContentFormat)), answer.Body, key.Public())
	}
	seen["cacerts"] = ask(client, http.MethodGet, "cacerts", nil, certificates)
	seen["csrattrs"] = ask(client, http.MethodGet, "csrattrs", nil, func(_ string, body []byte) string { return string(body) })
	seen["sen"] = ask(client, http.MethodPost, "simpleenroll", v.request(key), certificates)
	keyed := func(with *est.DecryptionKey) func(string, []byte) string {
		return func(contentType string, body []byte) string {
			answer, err := est.ParseBody(contentType, body)
			if err != nil {
				return err.Error()
			}
			return v.parts(answer.Parts, nil, with)
		}
	}
	seen["skg"] = ask(client, http.MethodPost, "serverkeygen", v.request(newKey(v.t)), keyed(nil))
	seen["skg, sealed"] = ask(client, http.MethodPost, "serverkeygen", v.sealedRequest(), keyed(v.decryption))
	again, end := open(v.issued)
	defer end()
	seen["issued"] = ask(again, http.MethodGet, "cacerts", nil, certificates)
	return seen, nil
}

func value[N any](n *N) any {
	if n == nil {
		return "none"
	}
	return *n
}

// certificates describes an answer by what does not change from one to the next.
func (v *visit) certificates(format *uint16, body []byte, asked crypto.PublicKey) string {
	if format == nil {
		return "no format"
	}
	certs, err := est.ParseCertificates(&est.Response{ContentFormat: est.ContentFormat(*format), Body: body})
	if err != nil {
		return err.Error()
	}
	own := map[string]string{
		string(v.server.Root().Raw): "the root", string(v.server.Issuing().Raw): "the issuing CA", string(v.server.ServerChain()[0].Raw): "the server's",
	}
	var texts []string
	for _, cert := range certs {
		text, known := own[string(cert.Raw)]
		if !known {
			text = fmt.Sprintf("%s, %q, CA %t, usage %v, valid %t", cert.Subject, cert.DNSNames, cert.IsCA, cert.KeyUsage, time.Now().After(cert.NotBefore) && time.Now().Before(cert.NotAfter))
			if key, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); ok && key.Equal(asked) {
				text += ", for the key that was asked"
			}
			if cert.CheckSignatureFrom(v.server.Issuing()) == nil {
				text += ", under the issuing CA"
			}
		}
		texts = append(texts, text)
	}
	return strings.Join(texts, "; ")
}

// parts describes an answer with a key.
func (v *visit) parts(parts []est.Part, err error, with *est.DecryptionKey) string {
	if err != nil {
		return err.Error()
	}
	var text string
	for _, part := range parts {
		var der asn1.RawValue
		rest, _ := asn1.Unmarshal(part.Body, &der) // what is no DER is shown below
		text += fmt.Sprintf("[%d, with %d bytes after its end] ", part.ContentFormat, len(rest))
	}
	made, err := est.ParseServerKey(parts, with)
	if err != nil {
		return text + err.Error()
	}
	public, err := made.Public()
	if err != nil {
		return text + err.Error()
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		v.t.Fatal(err)
	}
	if made.Enveloped {
		anchors, err := est.NewTrustAnchors([]*x509.Certificate{v.server.Root()})
		if err != nil {
			v.t.Fatal(err)
		}
		text += fmt.Sprintf("signed by its server: %t, ", anchors.VerifySigner(made.Signer, time.Now()) == nil)
	}
	text += fmt.Sprintf("a key of %d bytes, ", len(der)) // by its type
	if bytes.Equal(der, made.Certificates[0].RawSubjectPublicKeyInfo) {
		text += "the key is the certificate's: "
	}
	return text + v.certificates(new(uint16(est.ContentFormatPKIXCert)), made.Certificates[0].Raw, nil)
}
