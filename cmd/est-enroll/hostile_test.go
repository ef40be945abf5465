package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	gocmp "github.com/google/go-cmp/cmp"

	"estenroll/csr"
	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/internal/coap"
	"estenroll/internal/coap/coaptest"
	"estenroll/testserver"
)

var hostileAll = flag.Bool("hostile.all", false, "run each hostile case in each situation that it makes a difference to")

// situation is where a device stands when it meets a hostile server. The first
// two are of a first boot: one begins anew, the other has a request under way,
// whose key and CSR it keeps.
type situation string

const (
	firstBoot situation = "first boot"
	underWay  situation = "under way"
	renewal   situation = "renewal"
)

// hostileCase is one thing that a server, or somebody before it, gets wrong.
type hostileCase struct {
	name   string
	https  bool     // it is met at the HTTPS door
	faults []string // of the server
	link   tamper   // of the network, over CoAPs
	hello  []byte   // what the network answers in the server's place, over HTTPS
	effect effect
	only   situation // the one to meet it in. Default: those of the effect
	code   int
	says   string // a regular expression for the line with the error
	// issued is what the server issues for it; the honest run after it gets one
	// more certificate, or, where again is set, the same one.
	issued int
	again  bool
	// traffic is how many KiB the server may send at most. Default: 16.
	traffic int
	waits   time.Duration // what the journal has the device wait then, at most maxWait
}

// maxWait is the longest that a device waits, whatever a server asks for.
const maxWait = 30 * 24 * time.Hour

// effect is what a case does to the request.
type effect string

const (
	// final is an answer of the server: what was begun for it is undone.
	final effect = "final"
	// open is none: the request is kept for the next run.
	open effect = "open"
	// forged may be anybody's on the network: it ends what has asked nothing yet,
	// and not what may be under decision.
	forged effect = "forged"
)

// situations are those to meet a case in, after which the token is as before.
func (e effect) situations() []situation {
	return map[effect][]situation{final: {firstBoot, renewal}, open: {underWay, renewal}, forged: {firstBoot, underWay, renewal}}[e]
}

func (c hostileCase) situations() []situation {
	if c.only != "" {
		return []situation{c.only}
	}
	return c.effect.situations()
}

// keeps reports whether the journal has the request afterwards.
func (e effect) keeps(in situation) bool { return e == open || in == underWay }

var hostileCases = []hostileCase{
	// The certificate.
	{name: "wrong key", faults: []string{"wrong-key"}, effect: final, code: exitRefused,
		says: `issued certificate: "SERIALNUMBER=4711,O=Test": the certificate is for another key$`, issued: 1},
	{name: "expired", faults: []string{"expired"}, effect: final, code: exitRefused,
		says: `issued certificate .* is expired since`, issued: 1},
	{name: "not yet valid", faults: []string{"not-yet-valid"}, effect: final, code: exitRefused,
		says: `issued certificate .* is not yet valid`, issued: 1},
	{name: "foreign chain", faults: []string{"foreign-chain"}, effect: final, code: exitRefused,
		says: `issued certificate .* signed by unknown authority .*: not trusted$`, issued: 1},
	{name: "CA flag", faults: []string{"ca-flag"}, effect: final, code: exitRefused,
		says: `issued certificate: .* is a CA certificate for the key of this device: not trusted$`, issued: 1},
	// The body of the answer.
	{name: "two leaf certificates", faults: []string{"body=two-leaves"}, effect: final, code: exitRefused,
		says: `answer: more than one certificate that is not of a CA: "SERIALNUMBER=4711,O=Test" and "CN=TEST ONLY EST server"$`, issued: 1},
	{name: "CA certificates alone", faults: []string{"body=none"}, effect: final, code: exitRefused,
		says: `answer: no certificate but those of CAs$`, issued: 1},
	{name: "PKCS#7 without certificates", faults: []string{"body=empty"}, effect: final, code: exitRefused,
		says: `answer: certs-only PKCS#7: no certificate$`, issued: 1},
	{name: "no body", faults: []string{"body=nothing"}, effect: final, code: exitRefused,
		says: `answer: certs-only PKCS#7: empty$`, issued: 1},
	{name: "PKCS#7 truncated", faults: []string{"body=pkcs7-truncated"}, effect: final, code: exitRefused,
		says: `answer: certs-only PKCS#7: asn1: syntax error: data truncated$`, issued: 1},
	{name: "PKCS#7 with trailing bytes", faults: []string{"body=pkcs7-trailing"}, effect: final, code: exitRefused,
		says: `answer: certs-only PKCS#7: 2 bytes after the end$`, issued: 1},
	{name: "certificate truncated", faults: []string{"body=certificate-truncated"}, effect: final, code: exitRefused,
		says: `answer: certs-only PKCS#7: x509: malformed signature$`, issued: 1},
	{name: "certificate with trailing bytes", faults: []string{"body=certificate-trailing"}, effect: final, code: exitRefused,
		says: `answer: certificate "SERIALNUMBER=4711,O=Test": it goes on after its signature$`, issued: 1},
	{name: "287 truncated", faults: []string{"body=pkix-truncated"}, effect: final, code: exitRefused,
		says: `answer: certificate: x509: malformed certificate$`, issued: 1},
	{name: "287 with trailing bytes", faults: []string{"body=pkix-trailing"}, effect: final, code: exitRefused,
		says: `answer: certificate: x509: trailing data$`, issued: 1},
	{name: "wrong content-format", faults: []string{"body=wrong-format"}, effect: final, code: exitRefused,
		says: `answer: content-format 50, want 281 or 287$`, issued: 1},
	{name: "no content-format", faults: []string{"body=no-format"}, effect: final, code: exitRefused,
		says: `answer: no content-format$`, issued: 1},
	{name: "PKCS#7 as 287", faults: []string{"body=swapped-format"}, effect: final, code: exitRefused,
		says: `answer: certificate: x509: malformed tbs certificate$`, issued: 1},
	{name: "an error with a hostile text", faults: []string{"answer=4.00", "long-detail"}, effect: final, code: exitRefused,
		says: `sr?en: 4\.00 BadRequest: "\.\[2J\.\.est-enroll: enrolled\.\.\. `},
	{name: "Max-Age of 136 years", faults: []string{"defer=1,max-age=1193046h28m15s"}, effect: open, code: exitPending,
		says: `asks for 1193046h28m15s of patience: after 720h0m0s the device asks again$`, waits: maxWait},
	{name: "Max-Age of nothing", faults: []string{"defer=1,max-age=0s"}, effect: open, code: exitPending,
		says: `^the server has not decided yet: come back at [0-9TZ:-]+: "not decided yet, come again"$`},
	{name: "crts of a foreign CA", faults: []string{"crts=foreign"}, effect: open, only: underWay, code: exitRefused,
		says: `judge the server by its own cacerts: server certificate .* signed by unknown authority: not trusted$`},
	{name: "crts of a foreign CA, later", faults: []string{"crts=foreign"}, effect: final, only: renewal, code: exitRefused,
		says: `the server publishes the root .*, for which neither an anchor of this device nor the operator vouches: it is not trusted$`, issued: 1},
	{name: "crts without a CA", faults: []string{"crts=leaf"}, effect: final, code: exitRefused,
		says: `trust anchors: "CN=TEST ONLY EST server" is not a CA certificate: not trusted$`},
	// The messages and the blocks.
	{name: "1 GiB", faults: []string{"message=block-1-gib"}, effect: final, code: exitRefused,
		says: `answer: .*: response of 1073741824 bytes: body too large: the limit is 65536$`, issued: 1},
	{name: "endless blocks", faults: []string{"message=block-endless"}, effect: final, code: exitRefused,
		says: `answer: .*: response: body too large: the limit is 65536$`, issued: 1, traffic: 256},
	{name: "slow blocks", faults: []string{"message=block-slow"}, effect: open, code: exitTryLater,
		says: `sr?en: the block at offset \d+: no answer$`, issued: 1, again: true},
	{name: "ETag change", faults: []string{"message=block-etag"}, effect: final, code: exitRefused,
		says: `answer: .*: Block2: ETag 01 after 00$`, issued: 1},
	{name: "block out of order", faults: []string{"message=block-order"}, effect: final, code: exitRefused,
		says: `answer: .*: Block2: got 2/1/64 at offset 64$`, issued: 1},
	{name: "content-format change", faults: []string{"message=block-format"}, effect: final, code: exitRefused,
		says: `answer: .*: Block2: another content-format at offset 64$`, issued: 1},
	{name: "block option missing", faults: []string{"message=block-missing"}, effect: final, code: exitRefused,
		says: `answer: .*: Block2: missing at offset 64$`, issued: 1},
	{name: "block too short", faults: []string{"message=block-short"}, effect: final, code: exitRefused,
		says: `answer: .*: Block2: 63 bytes in 1/1/64$`, issued: 1},
	{name: "unknown critical option", faults: []string{"message=critical-option"}, effect: final, code: exitRefused,
		says: `answer: .*: option 2049 .*: critical and unknown$`, issued: 1},
	{name: "message truncated", faults: []string{"message=truncated"}, effect: open, code: exitTryLater,
		says: `no answer, but \d malformed messages$`, issued: 1, again: true},
	{name: "message with a marker of no payload", faults: []string{"message=trailing"}, effect: open, code: exitTryLater,
		says: `no answer, but \d malformed messages$`, issued: 1, again: true},
	{name: "wrong token", faults: []string{"message=wrong-token"}, effect: open, code: exitTryLater,
		says: `no answer, but \d with another token$`, issued: 1, again: true},
	{name: "Reset", faults: []string{"message=reset"}, effect: open, code: exitTryLater,
		says: `reset by the peer$`, issued: 1, again: true},
	{name: "silence after an ACK", faults: []string{"message=acknowledged-only"}, effect: open, code: exitTryLater,
		says: `sr?en: acknowledged: no answer$`, issued: 1, again: true},
	{name: "silence after the request", faults: []string{"message=silent"}, effect: open, code: exitTryLater,
		says: `sr?en: no answer$`, issued: 1, again: true},
	// The certificate of the server.
	{name: "server of another name", faults: []string{"server-certificate=other-name"}, effect: open, code: exitRefused,
		says: `server certificate .*: it is not for "127\.0\.0\.1": .*: not trusted$`},
	{name: "server expired", faults: []string{"server-certificate=expired"}, effect: open, code: exitRefused,
		says: `server certificate .* is expired since`},
	{name: "server not yet valid", faults: []string{"server-certificate=not-yet-valid"}, effect: open, code: exitRefused,
		says: `server certificate .* is not yet valid`},
	{name: "server of a foreign CA", faults: []string{"server-certificate=foreign"}, effect: open, code: exitRefused,
		says: `handshake: .*: server certificate .* signed by unknown authority .*: not trusted$`},
	{name: "server with a client's certificate", faults: []string{"server-certificate=client"}, effect: open, code: exitRefused,
		says: `server certificate .*: its extended key usage is not for servers: not trusted$`},
	{name: "server's certificate truncated", faults: []string{"server-certificate=truncated"}, effect: forged, code: exitRefused,
		says: `the peer's certificate or signature: x509: malformed signature: no secure session$`},
	{name: "server's certificate with trailing bytes", faults: []string{"server-certificate=trailing"}, effect: open, code: exitRefused,
		says: `server certificate .*: it goes on after its signature: not trusted$`},
	{name: "refused in the handshake", faults: []string{"refuse-all"}, effect: forged, code: exitRefused,
		says: `alert 42 \(BadCertificate\): the server refuses our certificate$`},
	// The handshake.
	{name: "alert instead of HelloVerifyRequest", link: alerted(2, coap.AlertHandshakeFailure), effect: forged, code: exitRefused,
		says: `alert 40 \(HandshakeFailure\): no secure session$`},
	{name: "alert instead of ServerHello", link: alerted(4, coap.AlertInsufficientSecurity), effect: forged, code: exitRefused,
		says: `alert 71 \(InsufficientSecurity\): no secure session$`},
	{name: "alert instead of Finished", link: alerted(6, coap.AlertBadCertificate), effect: forged, code: exitRefused,
		says: `alert 42 \(BadCertificate\): the server refuses our certificate$`},
	{name: "close_notify instead of Finished", link: alerted(6, coap.AlertCloseNotify), effect: open, code: exitTryLater,
		says: `alert 0 \(CloseNotify\): no answer from the server$`},
	{name: "certificate_expired instead of Finished", link: alerted(6, coap.AlertCertificateExpired), effect: open, code: exitTryLater,
		says: `alert 45 \(CertificateExpired\): our certificate is not valid by the server's clock$`},
	{name: "silence instead of HelloVerifyRequest", link: silence(ofFlight(2)), effect: open, code: exitTryLater,
		says: `handshake: [^ ]*: no answer$`},
	{name: "silence instead of ServerHello", link: silence(ofFlight(4)), effect: open, code: exitTryLater,
		says: `handshake: .*: no answer, after \d+ datagrams$`},
	{name: "silence instead of Finished", link: silence(ofFlight(6)), effect: open, code: exitTryLater,
		says: `handshake: .*: no answer, after our certificate$`},
	{name: "silence after the handshake", link: silence(isApplicationData), effect: open, code: exitTryLater,
		says: `crts: no answer$`},
	{name: "record of the handshake truncated", link: cut(ofFlight(4)), effect: open, code: exitTryLater,
		says: `handshake: .*: no answer, after \d+ datagrams$`},
	{name: "record of the handshake with trailing bytes", link: extended(ofFlight(4)), effect: open, code: exitTryLater,
		says: `handshake: .*: no answer, after \d+ datagrams$`},
	{name: "record of the exchange truncated", link: cut(isApplicationData), effect: open, code: exitTryLater,
		says: `crts: no answer$`},
	{name: "record of the exchange with trailing bytes", link: extended(isApplicationData), effect: open, code: exitTryLater,
		says: `crts: no answer$`},
	{name: "suite that was not offered", link: withSuite(0xc02c), effect: forged, code: exitRefused,
		says: `invalid or unknown cipher suite: no secure session$`},
	{name: "suite of a pre-shared key", link: withSuite(0xc0a8), effect: forged, code: exitRefused,
		says: `invalid or unknown cipher suite: no secure session$`},
	{name: "suite without encryption", link: withSuite(0xc006), effect: forged, code: exitRefused,
		says: `do not support any shared cipher suites: no secure session$`},
	{name: "another suite that was offered", link: withSuite(0xc0ac), effect: forged, code: exitRefused,
		says: `alert 42 \(BadCertificate\): the server refuses our certificate$`},
	{name: "no extended master secret", link: withoutExtendedMasterSecret(), effect: forged, code: exitRefused,
		says: `Extended Master Secret extension, but server does not support it: no secure session$`},
	{name: "DTLS 1.0", link: withVersion(0xfeff), effect: forged, code: exitRefused,
		says: `unsupported protocol version: no secure session$`},
	// HTTPS.
	{name: "HTTPS: a slow body", https: true, faults: []string{"http=slow-body"}, effect: open, code: exitTryLater,
		says: `enroll: no answer in time: context deadline exceeded$`, issued: 1, again: true},
	{name: "HTTPS: half a body", https: true, faults: []string{"http=cut"}, effect: open, code: exitTryLater,
		says: `enroll: unexpected EOF$`, issued: 1, again: true},
	{name: "HTTPS: a body without an end", https: true, faults: []string{"http=endless-body"}, effect: final, code: exitRefused,
		says: `enroll: answer: a body of more than 262144 bytes$`, issued: 1, traffic: 16 << 10},
	{name: "HTTPS: a body of 1 GiB", https: true, faults: []string{"http=1-gib"}, effect: final, code: exitRefused,
		says: `enroll: answer: a body of more than 262144 bytes$`, issued: 1, traffic: 16 << 10},
	{name: "HTTPS: a header of 1 MiB", https: true, faults: []string{"http=long-header"}, effect: final, code: exitRefused,
		says: `enroll: answer: .*headers exceeded 32768 bytes`, issued: 1, traffic: 16 << 10},
	{name: "HTTPS: not HTTP", https: true, faults: []string{"http=not-http"}, effect: final, code: exitRefused,
		says: `enroll: answer: .*malformed HTTP`, issued: 1},
	{name: "HTTPS: HTML", https: true, faults: []string{"http=wrong-type"}, effect: final, code: exitRefused,
		says: `enroll: answer: content type "text/html", which is not one of EST$`, issued: 1},
	{name: "HTTPS: not base64", https: true, faults: []string{"http=not-base64"}, effect: final, code: exitRefused,
		says: `enroll: answer: the body is not base64$`, issued: 1},
	{name: "HTTPS: redirections in a circle", https: true, faults: []string{"http=redirect-loop"}, effect: final, code: exitRefused,
		says: `enroll: answer: more than 5 redirections$`, issued: 1},
	{name: "HTTPS: a redirection to another server", https: true, faults: []string{"http=redirect-elsewhere"}, effect: final, code: exitRefused,
		says: `enroll: answer: a redirection to another server, "https://elsewhere\.example/`, issued: 1},
	{name: "HTTPS: a redirection to HTTP", https: true, faults: []string{"http=redirect-http"}, effect: final, code: exitRefused,
		says: `enroll: answer: a redirection to another protocol, "http://127\.0\.0\.1:\d+/.*": it is not followed$`, issued: 1},
	{name: "HTTPS: Retry-After in the past", https: true, faults: []string{"defer=1", "retry-after=Thu, 01 Jan 1970 00:00:00 GMT"}, effect: open, code: exitPending,
		says: `^the server has not decided yet: come back at [0-9TZ:-]+: "not decided yet, come again"$`},
	{name: "HTTPS: Retry-After in the year 9999", https: true, faults: []string{"defer=1", "retry-after=Fri, 31 Dec 9999 23:59:59 GMT"}, effect: open, code: exitPending,
		says: `asks for 2562047h47m16\.[0-9]+s of patience: after 720h0m0s the device asks again$`, waits: maxWait},
	{name: "HTTPS: TLS 1.0", https: true, hello: chosen(tls.VersionTLS10, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, [32]byte{}), effect: forged, code: exitRefused,
		says: `unsupported protocol version 301: no secure session$`},
	{name: "HTTPS: TLS 1.1", https: true, hello: chosen(tls.VersionTLS11, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, [32]byte{}), effect: forged, code: exitRefused,
		says: `unsupported protocol version 302: no secure session$`},
	{name: "HTTPS: TLS 1.2 in the place of 1.3", https: true, hello: chosen(tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, downgraded()), effect: forged, code: exitRefused,
		says: `downgrade attempt detected, .*: no secure session$`},
	{name: "HTTPS: RC4", https: true, hello: chosen(tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_RC4_128_SHA, [32]byte{}), effect: forged, code: exitRefused,
		says: `unconfigured cipher suite: no secure session$`},
	{name: "HTTPS: no encryption", https: true, hello: chosen(tls.VersionTLS12, 0xc006, [32]byte{}), effect: forged, code: exitRefused,
		says: `unconfigured cipher suite: no secure session$`},
	{name: "HTTPS: refused in the place of the first answer", https: true, faults: []string{"refuse-all"}, effect: forged, code: exitRefused,
		says: `cacerts: the server's alert 42: the server refuses our certificate$`},
}

// TestHostile has the program meet each of the hostile cases, as a process, and
// looks afterwards at what there is: the objects of the token with every readable
// attribute and the Security object are as before, and of the state directory
// only the record of the attempt differs. Then the program meets the honest
// server, and the server's record says what was issued for both.
func TestHostile(t *testing.T) {
	var report hostileReport
	jobs := make(chan hostileJob)
	var sites sync.WaitGroup
	for i := range hostileSites {
		sites.Go(func() {
			// Not parallel tests, of which there are no more at once than processors.
			t.Run(fmt.Sprintf("site %d", i+1), func(t *testing.T) {
				var site *hostileSite
				for job := range jobs {
					if site == nil {
						site = newHostileSite(t)
					}
					t.Run(job.name+", "+string(job.situation), func(t *testing.T) { site.meet(t, job, &report) })
				}
			})
			for range jobs { // the site could not be made
			}
		})
	}
	for i, c := range hostileCases {
		for j, in := range c.situations() {
			if *hostileAll || j == i%len(c.situations()) { // the others are with make hostile
				jobs <- hostileJob{c, in}
			}
		}
	}
	close(jobs)
	sites.Wait()
	report.end(t)
}

// hostileSites is how many servers, each with devices of its own, work at once:
// most of the time of most cases goes in waiting.
const hostileSites = 4

// hostileJob is a case to meet in a situation.
type hostileJob struct {
	hostileCase
	situation situation
}

// hostileSite is a server, a network before it, and the devices to copy.
type hostileSite struct {
	bin       string
	token     *softhsm.Token
	server    *testserver.Server
	proxy     *coaptest.Proxy
	link      atomic.Pointer[tamper]
	relay     *relay
	uri       string // through the proxy
	anchors   string
	templates map[situation]*snapshot
	factory   string // directory of a device that has its IDevID
	devices   string // directory of the copies
	count     int
}

func newHostileSite(t *testing.T) *hostileSite {
	t.Helper()
	s := &hostileSite{bin: builtPrograms(t), token: softhsm.New(t, softhsm.WithPIN(markerPIN)), templates: map[situation]*snapshot{}, factory: filepath.Join(t.TempDir(), "factory"), devices: t.TempDir()}
	server, err := testserver.New(testserver.Config{Raw: true, ListenHTTPS: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	s.server, s.relay = server, newRelay(t, server.HTTPSURI())
	t.Cleanup(func() { s.relay.close(t) })
	s.proxy = coaptest.NewProxy(t, server.Addr().String(), coaptest.Faults{Tamper: onServer(func() tamper {
		if change := s.link.Load(); change != nil {
			return *change
		}
		return nil
	})})
	s.uri = "coaps://" + s.proxy.Addr()
	s.anchors = filepath.Join(t.TempDir(), "ca.der")
	if err := os.WriteFile(s.anchors, server.Root().Raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.token.StoreIDevID(s.signIDevID); err != nil {
		t.Fatal(err)
	}
	s.prepare(t)
	return s
}

func (s *hostileSite) signIDevID(public []byte) ([]byte, error) {
	key, err := x509.ParsePKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	subject, err := csr.ParseSubject("serialNumber=4711,O=Test")
	if err != nil {
		return nil, err
	}
	cert, err := s.server.IssueIDevID(testserver.IDevIDRequest{PublicKey: key, RawSubject: subject})
	if err != nil {
		return nil, err
	}
	return cert.Raw, nil
}

// prepare makes the devices to copy. That of a first boot has been refused once,
// so that there is a Security object to compare with. A request under way is made
// anew for each case: the server answers one that it knows with the certificate
// that it has.
func (s *hostileSite) prepare(t *testing.T) {
	t.Helper()
	if err := os.CopyFS(filepath.Join(s.factory, "tokens"), os.DirFS(s.token.Dir)); err != nil {
		t.Fatal(err)
	}
	s.templates[firstBoot] = s.began(t, s.uri, []string{"answer=4.03"}, nil, exitRefused)
	s.templates[renewal] = s.began(t, s.uri, nil, nil, exitDone)
}

// began enrols a factory device, which ends with an exit code.
func (s *hostileSite) began(t *testing.T, uri string, faults []string, link tamper, code int) *snapshot {
	t.Helper()
	d := s.copyOf(t, s.factory)
	d.uri = uri
	s.turn(t, faults, link)
	defer s.turn(t, nil, nil)
	settings := honest
	if link != nil {
		settings = impatient
	}
	if run := d.run(t, settings, "enroll"); run.code != code {
		t.Fatalf("prepare a device: %s", run)
	}
	return d.look(t)
}

// before is a device's state before it meets a case.
func (s *hostileSite) before(t *testing.T, c hostileJob) *snapshot {
	switch {
	case c.situation == underWay && c.https:
		return s.began(t, s.relay.uri(), []string{"answer=5.00"}, nil, exitTryLater)
	case c.situation == underWay:
		return s.began(t, s.uri, []string{"answer=5.00"}, nil, exitTryLater)
	}
	return s.templates[c.situation]
}

// turn makes server and network hostile, or honest again.
func (s *hostileSite) turn(t *testing.T, texts []string, link tamper) {
	t.Helper()
	faults, err := testserver.ParseFaults(texts)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.server.SetFaults(faults); err != nil {
		t.Fatal(err)
	}
	s.link.Store(&link)
}

// sent is how many bytes the server has sent at both doors.
func (s *hostileSite) sent() int {
	return s.proxy.Counters().ToClient.Bytes + int(s.relay.toClient.Load())
}

// hostileDevice is a copy of a device.
type hostileDevice struct {
	site *hostileSite
	uri  string // of the server
	dir  string
}

func (s *hostileSite) copyOf(t *testing.T, template string) *hostileDevice {
	t.Helper()
	s.count++
	d := &hostileDevice{site: s, uri: s.uri, dir: filepath.Join(s.devices, fmt.Sprint(s.count))}
	if err := os.CopyFS(d.dir, os.DirFS(template)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(d.dir, "state"), 0o700); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	configuration := "directories.tokendir = " + filepath.Join(d.dir, "tokens") + "\nobjectstore.backend = file\nlog.level = ERROR\n"
	if err := os.WriteFile(filepath.Join(d.dir, "softhsm2.conf"), []byte(configuration), 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

// hostileRun is what a run of the program left.
type hostileRun struct {
	code   int
	output string
	memory int64 // at its peak, in KiB
}

func (r hostileRun) String() string { return fmt.Sprintf("exit code %d:\n%s", r.code, r.output) }

// said is the line with the error, or with what a pending server has said.
func (r hostileRun) said() string {
	for line := range strings.Lines(r.output) {
		for _, kind := range []string{"est-enroll: error: ", "est-enroll: warning: ", "est-enroll: "} {
			if text, found := strings.CutPrefix(strings.TrimSpace(line), kind); found {
				return text
			}
		}
	}
	return ""
}

const (
	hostileTime   = 60 * time.Second // far more than the timeouts below add up to
	hostileMemory = 32 << 10         // KiB; measured: 17 MiB, and 22 MiB for endless blocks
)

// How the program is run: at a hostile server once, by its own timeouts or, where
// it is shown that it ends by them, by short ones. An honest server is tried again:
// pion's does not answer (v3.1.15) when the port is that of a client which it has not
// seen close, as those of the hostile runs (RFC 6347 §4.2.8 wants an answer).
var (
	once      = []string{"EST_ENROLL_TRIES=1"}
	impatient = append(once, "EST_ENROLL_ACK_TIMEOUT=500ms", "EST_ENROLL_MAX_RETRANSMIT=1",
		"EST_ENROLL_EXCHANGE_TIMEOUT=3s", "EST_ENROLL_HANDSHAKE_TIMEOUT=3s")
	honest = []string{"EST_ENROLL_HANDSHAKE_TIMEOUT=5s"}
)

// run runs the program as it ships.
func (d *hostileDevice) run(t *testing.T, settings []string, args ...string) hostileRun {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), hostileTime)
	defer cancel()
	token := d.site.token
	cmd := exec.CommandContext(ctx, filepath.Join(d.site.bin, "est-enroll"), args...)
	cmd.Env = append([]string{
		"SOFTHSM2_CONF=" + filepath.Join(d.dir, "softhsm2.conf"),
		"EST_ENROLL_STATE_DIR=" + filepath.Join(d.dir, "state"),
		"EST_ENROLL_LOCK_DIR=" + filepath.Join(d.dir, "locks"),
		"EST_ENROLL_ENGINE=" + token.URI(),
		"EST_ENROLL_SERVER=" + d.uri,
		"EST_ENROLL_TRUST_ANCHORS=" + d.site.anchors,
	}, settings...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	err := cmd.Start()
	peak := peakMemory(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("est-enroll %s: %v, %v\n%s", args, err, ctx.Err(), &output)
	}
	if strings.Contains(output.String(), markerPIN) {
		t.Errorf("the PIN is in the output: %s", &output)
	}
	return hostileRun{code: cmd.ProcessState.ExitCode(), output: output.String(), memory: peak()}
}

var highWater = regexp.MustCompile(`(?m)^VmHWM:\s+(\d+) kB$`)

// peakMemory watches a process until it ends and tells its high-water mark in
// KiB, as near to the end as it was seen. (The rusage of a child begins with the
// parent's own mark, since it was the parent before exec.)
func peakMemory(cmd *exec.Cmd) func() int64 {
	result := make(chan int64)
	go func() {
		var peak int64
		for cmd.Process != nil {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
			if err != nil {
				break
			}
			match := highWater.FindSubmatch(status)
			if match == nil {
				break // it has ended
			}
			if kib, err := strconv.ParseInt(string(match[1]), 10, 64); err == nil {
				peak = max(peak, kib)
			}
			<-time.After(5 * time.Millisecond)
		}
		result <- peak
	}()
	return func() int64 { return <-result }
}

// snapshot is what there is: the token in the eyes of others, and the state.
type snapshot struct {
	dir                string
	objects            string // as pkcs11-tool lists them
	dump               string // every readable attribute
	files              map[string]string
	journal            map[string]any // but the record of the attempt, which is:
	attempt, operation map[string]any
}

func (d *hostileDevice) look(t *testing.T) *snapshot {
	t.Helper()
	token := d.site.token
	judge := func(name string, args ...string) string {
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(d.dir, "softhsm2.conf"), "PIN="+token.PIN)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s (make deps installs pkcs11-tool): %v", name, err)
		}
		return string(out)
	}
	s := &snapshot{dir: d.dir, files: map[string]string{}}
	s.objects = judge("pkcs11-tool", "--module", token.ModulePath, "--token-label", token.Label, "--login", "--pin", "env:PIN", "-O")
	s.dump = judge("token-dump", token.ModulePath, token.Label)
	if !strings.Contains(s.objects, opensc.IDevIDLabel) || strings.Count(s.dump, "\n") < 3 {
		t.Fatalf("the judges see no IDevID:\n%s%s", s.objects, s.dump)
	}
	state := os.DirFS(filepath.Join(d.dir, "state"))
	names, err := fs.Glob(state, "*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		data, err := fs.ReadFile(state, name)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(data, []byte(markerPIN)) {
			t.Errorf("the PIN is in %s", name)
		}
		s.files[name] = string(data)
	}
	if err := json.Unmarshal([]byte(s.files["journal.json"]), &s.journal); err != nil {
		t.Fatal(err)
	}
	delete(s.files, "journal.json")
	credentials, _ := s.journal["credentials"].(map[string]any)
	device, _ := credentials["device"].(map[string]any)
	s.attempt, _ = device["last_attempt"].(map[string]any)
	s.operation, _ = device["operation"].(map[string]any)
	delete(device, "last_attempt")
	delete(device, "operation")
	return s
}

// changes are what differs after a hostile run, but the record of the attempt.
func (s *snapshot) changes(after *snapshot) (changes []string) {
	compare := func(what string, before, after any) {
		if diff := gocmp.Diff(before, after); diff != "" {
			changes = append(changes, fmt.Sprintf("%s (-before +after):\n%s", what, diff))
		}
	}
	// The order of pkcs11-tool's list is the module's.
	sorted := func(text string) []string { return slices.Sorted(strings.Lines(text)) }
	compare("objects of the token", sorted(s.objects), sorted(after.objects))
	compare("attributes of the token's objects", s.dump, after.dump)
	compare("files of the state", s.files, after.files)
	compare("journal", s.journal, after.journal)
	return changes
}

// meet is one case in one situation.
func (s *hostileSite) meet(t *testing.T, c hostileJob, report *hostileReport) {
	before := s.before(t, c)
	d := s.copyOf(t, before.dir)
	if c.https {
		d.uri = s.relay.uri()
	}
	command := []string{"enroll"}
	if c.situation == renewal {
		command = []string{"renew", "--force"}
	}
	issued, sent := len(s.server.Issuances()), s.sent()
	s.turn(t, c.faults, c.link)
	if c.hello != nil {
		s.relay.instead.Store(&c.hello)
	}
	settings := once
	if c.code == exitTryLater {
		settings = impatient
	}
	run := d.run(t, settings, command...)
	s.turn(t, nil, nil)
	s.relay.instead.Store(nil)
	sent = s.sent() - sent

	var wrong []string
	complain := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if run.code != c.code {
		complain("exit code %d, want %d", run.code, c.code)
	}
	if run.memory > hostileMemory {
		complain("%d KiB of memory", run.memory)
	}
	if sent > cmp.Or(c.traffic, 16)<<10 {
		complain("the server sent %d bytes", sent)
	}
	if strings.ContainsFunc(run.output, func(r rune) bool { return !unicode.IsPrint(r) && r != '\n' }) {
		complain("the output is not all printable: %q", run.output)
	}
	if got := len(s.server.Issuances()) - issued; got != c.issued {
		complain("the server issued %d, want %d", got, c.issued)
	}
	after := d.look(t)
	changes := before.changes(after)
	wrong = append(wrong, changes...)
	if after.attempt["result"] == "done" || after.attempt["time"] == before.attempt["time"] {
		complain("the record of the attempt is %v", after.attempt)
	}
	if kept := after.operation != nil; kept != c.effect.keeps(c.situation) {
		complain("the request is kept: %t, want %t", kept, !kept)
	}
	if c.situation == underWay && (after.operation["key"] != before.operation["key"] || after.operation["csr"] != before.operation["csr"]) {
		complain("the request that was under way is another")
	}
	report.add(c, run, before, after, len(changes) > 0)

	if c.code == exitPending {
		d.wait(t, c.waits)
	}
	if again := d.run(t, honest, command...); again.code != exitDone {
		complain("then, at the honest server: %s", again)
	}
	total := c.issued + 1
	if c.again {
		total = c.issued
	}
	if got := len(s.server.Issuances()) - issued; got != total {
		complain("with the honest run the server issued %d, want %d", got, total)
	}
	if len(wrong) > 0 {
		t.Errorf("%s\nthe hostile run: %s", strings.Join(wrong, "\n"), run)
	}
	if err := os.RemoveAll(d.dir); err != nil {
		t.Error(err)
	}
}

// wait makes the journal's wait, which is so long, one that is over.
func (d *hostileDevice) wait(t *testing.T, want time.Duration) {
	t.Helper()
	path := filepath.Join(d.dir, "state", "journal.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var journal struct {
		Version           int                       `json:"version"`
		VerifiedNotBefore string                    `json:"verified_not_before,omitempty"`
		Credentials       map[string]map[string]any `json:"credentials"`
	}
	if err := json.Unmarshal(data, &journal); err != nil {
		t.Fatal(err)
	}
	operation := journal.Credentials["device"]["operation"].(map[string]any)
	if got, _ := operation["retry_after"].(float64); got != float64(want) {
		t.Errorf("the journal waits for %v, want %s", operation["retry_after"], want)
	}
	delete(operation, "retry_after")
	if data, err = json.Marshal(journal); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// hostileReport is what make hostile prints.
type hostileReport struct {
	mu                      sync.Mutex
	cases, refused, changed int
	said                    []hostileSaid
}

type hostileSaid struct {
	hostileJob
	text string
}

// judged is the token as the judges saw it: how many objects pkcs11-tool lists,
// and a digest of all their attributes.
func (s *snapshot) judged() string {
	digest := sha256.Sum256([]byte(s.dump))
	return fmt.Sprintf("%d objects %x", strings.Count(s.objects, " Object;"), digest[:4])
}

func (r *hostileReport) add(c hostileJob, run hostileRun, before, after *snapshot, changed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cases++
	verdict := "accepted"
	if run.code != exitDone {
		r.refused++
		verdict = "refused"
	}
	if changed {
		r.changed++
		verdict = "CHANGED"
	}
	text := run.said()
	r.said = append(r.said, hostileSaid{c, text})
	fmt.Printf("%-43s %-10s  exit %d  %2d MiB  token %s -> %s  %s: %s\n", c.name, c.situation, run.code, run.memory>>10,
		before.judged(), after.judged(), verdict, text)
}

// end compares what was said: each case has an error of its own, unless it has
// the same text in the table because it is the same to a client.
func (r *hostileReport) end(t *testing.T) {
	for _, c := range hostileCases {
		says, err := regexp.Compile(c.says)
		if err != nil || c.says == "" {
			t.Errorf("%s: %q, %v", c.name, c.says, err)
			continue
		}
		for _, said := range r.said {
			if own := said.says == c.says; says.MatchString(said.text) != own {
				t.Errorf("%s says %q; that it matches %q, of %s, is %t", said.name, said.text, c.says, c.name, !own)
			}
		}
	}
	fmt.Printf("cases %d, refused %d, changed %d\n", r.cases, r.refused, r.changed)
	if r.cases == 0 || r.refused != r.cases || r.changed > 0 {
		t.Error("each is to be refused, and to change nothing")
	}
}

// TestForgedRecords puts records of somebody without the keys between those of
// the server: they do no harm at all.
func TestForgedRecords(t *testing.T) {
	site := newHostileSite(t)
	for name, forge := range map[string]func(record) []byte{
		"an alert in the clear":  func(r record) []byte { return r.forged(alertRecord, 0, 2, byte(coap.AlertAccessDenied)) },
		"a message in the clear": func(r record) []byte { return r.forged(applicationData, 0, 0x60, 0, 0, 0) },
		"an alert that does not decrypt": func(r record) []byte {
			return r.forged(alertRecord, 1, bytes.Repeat([]byte{1}, 18)...)
		},
		"a message that does not decrypt": func(r record) []byte {
			return r.forged(applicationData, 1, bytes.Repeat([]byte{2}, 40)...)
		},
		"no record":    func(record) []byte { return []byte("no record") },
		"a record cut": func(r record) []byte { return r[:len(r)/2] },
		"a repetition": func(r record) []byte { return r },
	} {
		t.Run(name, func(t *testing.T) {
			d := site.copyOf(t, site.factory)
			issued := len(site.server.Issuances())
			site.turn(t, nil, func(records []record) ([][]byte, bool) {
				if !slices.ContainsFunc(records, isApplicationData) {
					return nil, false
				}
				return [][]byte{forge(records[0]), joined(records)}, true
			})
			run := d.run(t, once, "enroll")
			site.turn(t, nil, nil)
			if got := len(site.server.Issuances()) - issued; run.code != exitDone || got != 1 {
				t.Errorf("issued %d, %s", got, run)
			}
		})
	}
}
