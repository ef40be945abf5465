package estenroll_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/engine/pkcs11"
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/testserver"
)

// clock is one that the device and the server share, and that a test sets.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time           { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(by time.Duration) { c.offset.Add(int64(by)) }

// site is a token with a factory credential and a server that issued it.
type site struct {
	token  *softhsm.Token
	server *testserver.Server
	engine engine.Engine
	parse  func(string) (engine.Address, error)
	uri    est.URI
	trust  *est.TrustAnchors
	idevid estenroll.IDevID
	born   time.Time
}

func newSite(t *testing.T, cfg testserver.Config) *site {
	t.Helper()
	s := &site{token: softhsm.New(t), parse: engine.Drivers{"pkcs11": pkcs11.Driver}.Parse, born: time.Now()}
	s.token.Use(t)
	if cfg.AckTimeout == 0 {
		cfg.AckTimeout, cfg.FlightInterval = 500*time.Millisecond, 500*time.Millisecond
	}
	var err error
	if s.server, err = testserver.New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.server.Close(); err != nil {
			t.Error(err)
		}
	})
	subject, err := csr.ParseSubject("serialNumber=4711,O=Factory")
	if err != nil {
		t.Fatal(err)
	}
	err = s.token.StoreIDevID(func(publicKey []byte) ([]byte, error) {
		key, err := x509.ParsePKIXPublicKey(publicKey)
		if err != nil {
			return nil, err
		}
		cert, err := s.server.IssueIDevID(testserver.IDevIDRequest{PublicKey: key, RawSubject: subject})
		if err != nil {
			return nil, err
		}
		return cert.Raw, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s.idevid = estenroll.IDevID{Key: s.address(t, "pkcs11:object=idevid;type=private"), Certificate: s.address(t, "pkcs11:object=idevid;type=cert")}
	if s.trust, err = est.NewTrustAnchors([]*x509.Certificate{s.server.Root()}); err != nil {
		t.Fatal(err)
	}
	if s.uri, err = est.ParseURI(s.server.URI()); err != nil {
		t.Fatal(err)
	}
	if s.engine, err = pkcs11.Driver.Open(t.Context(), s.address(t, s.token.URI()), engine.Options{LockDir: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.engine.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *site) address(t *testing.T, text string) engine.Address {
	t.Helper()
	at, err := s.parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func (s *site) faults(t *testing.T, f testserver.Faults) {
	t.Helper()
	if err := s.server.SetFaults(f); err != nil {
		t.Fatal(err)
	}
}

// preShared is the key of the devices without an IDevID, where the server has it.
var preShared = map[string][]byte{"pre-shared": bytes.Repeat([]byte{0x17}, 16)}

// withPSK has a pre-shared key be the device's first credential.
func (d *device) withPSK() *device {
	d.cfg.IDevID, d.cfg.PSK = estenroll.IDevID{}, true
	return d
}

// device is a state directory, and everything between the lifecycle and its
// engine and its server that a test wants to look at or to break.
type device struct {
	t    *testing.T
	site *site
	name string
	dir  string
	cfg  settings
	// others are credentials beside the one that runs are for.
	others []estenroll.CredentialConfig
	now    func() time.Time

	// hook is asked before and after each call into the engine and each part of a
	// session: its error takes the place of the call's.
	hook func(when, call string) error
	// onProgress is called with each event: its panic is a kill after what was done.
	onProgress func(estenroll.Event)
	// authenticated is what a session says of itself, if it is set.
	authenticated *bool
	// accepts is what a session says of a key, if it is set.
	accepts func(crypto.PublicKey) bool
	// attributes are what the token reports of a key, if they are set.
	attributes *engine.KeyAttributes
	// pssOnly is a token that signs with an RSA key in no other way.
	pssOnly  bool
	closeErr error // of a session
	// elsewhere is connected to in place of the server.
	elsewhere string
	// serverKey takes the place of the server's key and certificate; nil leaves them.
	serverKey func() []est.Part
	// secrets are the buffers of keys that a server has made.
	secrets [][]byte
	// answer takes the place of the server's answer; nil leaves it.
	answer func(est.Operation) []*x509.Certificate
	ctx    context.Context // of runs
	// initial is a Security object that a test took down.
	initial string

	opened, closed int           // sessions
	open           []est.Session // what the process would lose in a kill
	requests       []sent
	signatures     int
	lacks          crypto.Hash // that the token does not sign
	events         []estenroll.Event
}

// settings are a device's and those of its one credential.
type settings struct {
	estenroll.Config
	estenroll.CredentialConfig
}

func (s settings) config(others ...estenroll.CredentialConfig) estenroll.Config {
	cfg := s.Config
	cfg.Credentials = append(slices.Clone(others), s.CredentialConfig)
	return cfg
}

// sent is a request that went out.
type sent struct {
	operation est.Operation
	body      string
}

// killed is a panic that stands for the end of the process.
type killed struct{ at string }

func (s *site) device(t *testing.T, name string) *device {
	d := &device{t: t, site: s, name: name, dir: filepath.Join(t.TempDir(), "state"), now: time.Now, ctx: t.Context()}
	d.cfg.Config = estenroll.Config{
		StateDir: d.dir, OpenEngine: d.openEngine, ParseAddress: s.parse,
		BuildTime: s.born.Add(-time.Hour), LockTimeout: 5 * time.Second,
		Now: func() time.Time { return d.now() },
		Progress: func(e estenroll.Event) {
			if d.events = append(d.events, e); d.onProgress != nil {
				d.onProgress(e)
			}
		},
	}
	d.cfg.CredentialConfig = estenroll.CredentialConfig{
		Name: name, IDevID: s.idevid,
		ServerURI: s.uri.String(), ServerName: s.uri.Host, ImplicitTA: s.trust, Dial: d.dial,
		Request: csr.Template{RawSubject: subject(t, "CN="+name)}, Tries: 1, RetryInterval: time.Millisecond,
	}
	return d
}

func subject(t *testing.T, text string) []byte {
	t.Helper()
	der, err := csr.ParseSubject(text)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (d *device) at(when, call string) error {
	if d.hook == nil {
		return nil
	}
	return d.hook(when, call)
}

func (d *device) openEngine(context.Context, engine.PINSource) (engine.Engine, error) {
	return spied{d, d.site.engine.(*pkcs11.Engine)}, nil
}

// around calls the hook before and after a call.
func around[T any](d *device, call string, do func() (T, error)) (got T, err error) {
	if err := d.at("before", call); err != nil {
		return got, err
	}
	if got, err = do(); err != nil {
		return got, err
	}
	if err := d.at("after", call); err != nil {
		var none T
		return none, err
	}
	return got, nil
}

func (d *device) around(call string, do func() error) error {
	_, err := around(d, call, func() (struct{}, error) { return struct{}{}, do() })
	return err
}

// spied is the site's engine, which outlives the devices.
type spied struct {
	d *device
	*pkcs11.Engine
}

func (spied) Close() error { return nil }

func (e spied) GenerateKey(ctx context.Context, at engine.Address, spec engine.KeySpec) (crypto.PublicKey, error) {
	return around(e.d, "GenerateKey", func() (crypto.PublicKey, error) { return e.Engine.GenerateKey(ctx, at, spec) })
}

func (e spied) Signer(ctx context.Context, at engine.Address) (crypto.Signer, error) {
	return around(e.d, "Signer", func() (crypto.Signer, error) {
		signer, err := e.Engine.Signer(ctx, at)
		if err == nil && e.d.pssOnly {
			signer = pssSigner{signer}
		}
		return counted{signer, e.d}, err
	})
}

// counted counts the signatures that the token makes, which may lack one of a hash.
type counted struct {
	crypto.Signer
	d *device
}

func (s counted) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if s.d.lacks != 0 && opts.HashFunc() == s.d.lacks {
		return nil, &engine.Error{Op: "sign with", Err: engine.ErrUnsupported}
	}
	s.d.signatures++
	return s.Signer.Sign(random, digest, opts)
}

type pssSigner struct{ crypto.Signer }

func (s pssSigner) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	_, isRSA := s.Public().(*rsa.PublicKey)
	if _, isPSS := opts.(*rsa.PSSOptions); isRSA && !isPSS {
		return nil, &engine.Error{Op: "sign with", Err: engine.ErrUnsupported}
	}
	return s.Signer.Sign(random, digest, opts)
}

func (e spied) CanImportKey(ctx context.Context, spec engine.KeySpec) error {
	return e.d.around("CanImportKey", func() error { return e.Engine.CanImportKey(ctx, spec) })
}

func (e spied) ImportKey(ctx context.Context, at engine.Address, pkcs8 []byte) (crypto.PublicKey, error) {
	e.d.secrets = append(e.d.secrets, pkcs8)
	return around(e.d, "ImportKey", func() (crypto.PublicKey, error) { return e.Engine.ImportKey(ctx, at, pkcs8) })
}

func (e spied) RemoveKey(ctx context.Context, at engine.Address) error {
	return e.d.around("RemoveKey", func() error { return e.Engine.RemoveKey(ctx, at) })
}

func (e spied) RecoverKey(ctx context.Context, at engine.Address) (crypto.PublicKey, error) {
	return around(e.d, "RecoverKey", func() (crypto.PublicKey, error) { return e.Engine.RecoverKey(ctx, at) })
}

func (e spied) KeyAttributes(ctx context.Context, at engine.Address) (engine.KeyAttributes, error) {
	if e.d.attributes != nil {
		return *e.d.attributes, nil
	}
	return e.Engine.KeyAttributes(ctx, at)
}

func (e spied) CertificateAddresses(ctx context.Context, key engine.Address, chain []*x509.Certificate) ([]engine.Address, error) {
	return around(e.d, "CertificateAddresses", func() ([]engine.Address, error) { return e.Engine.CertificateAddresses(ctx, key, chain) })
}

func (e spied) AnchorAddress(ctx context.Context, at engine.Address, anchor *x509.Certificate) (whole engine.Address, there bool, err error) {
	err = e.d.around("AnchorAddress", func() error { whole, there, err = e.Engine.AnchorAddress(ctx, at, anchor); return err })
	return whole, there, err
}

func (e spied) StoreCertificates(ctx context.Context, at []engine.Address, chain []*x509.Certificate) error {
	return e.d.around("StoreCertificates", func() error { return e.Engine.StoreCertificates(ctx, at, chain) })
}

func (e spied) Certificate(ctx context.Context, at engine.Address) (*x509.Certificate, error) {
	return around(e.d, "Certificate", func() (*x509.Certificate, error) { return e.Engine.Certificate(ctx, at) })
}

func (e spied) RemoveCertificates(ctx context.Context, at []engine.Address) error {
	return e.d.around("RemoveCertificates", func() error { return e.Engine.RemoveCertificates(ctx, at) })
}

func (d *device) dial(ctx context.Context, with estenroll.Connection) (est.Session, error) {
	return around(d, "Dial", func() (est.Session, error) {
		uri, timeout := d.site.uri, 20*time.Second
		if d.elsewhere != "" {
			timeout = time.Second
			var err error
			if uri, err = est.ParseURI("coaps://" + d.elsewhere); err != nil {
				return nil, err
			}
		}
		cfg := coaps.Config{
			URI: uri, Certificate: with.Certificate, Key: with.Key, Trust: with.Trust, Now: with.Now, Provisional: with.Provisional,
			AckTimeout: 500 * time.Millisecond, FlightInterval: 500 * time.Millisecond, HandshakeTimeout: timeout,
		}
		if with.PSK {
			cfg.Certificate, cfg.Key, cfg.PSKIdentity = nil, nil, "pre-shared"
			cfg.PSK = func() ([]byte, error) { return bytes.Clone(preShared["pre-shared"]), nil }
		}
		session, err := coaps.Dial(ctx, cfg)
		if err != nil {
			return nil, err
		}
		d.opened++
		d.open = append(d.open, session)
		return watched{session, d}, nil
	})
}

// watched is a session that is looked at.
type watched struct {
	*coaps.Session
	d *device
}

func (s watched) RoundTrip(ctx context.Context, req *est.Request) (*est.Response, error) {
	return around(s.d, string(req.Operation), func() (*est.Response, error) {
		s.d.requests = append(s.d.requests, sent{req.Operation, string(req.Body)})
		response, err := s.Session.RoundTrip(ctx, req)
		if err == nil && req.Operation == est.ServerKeyGen {
			s.d.secrets = append(s.d.secrets, response.Body)
			if s.d.serverKey != nil {
				clear(response.Body)
				response = &est.Response{Parts: s.d.serverKey()}
				s.d.secrets = append(s.d.secrets, response.Parts[0].Body)
			}
		}
		if err != nil || s.d.answer == nil {
			return response, err
		}
		certs := s.d.answer(req.Operation)
		if certs == nil {
			return response, nil
		}
		body, err := est.MarshalCertsOnly(certs)
		return &est.Response{ContentFormat: est.ContentFormatPKCS7CertsOnly, Body: body}, err
	})
}

func (s watched) ClientAuthenticated() bool {
	if s.d.authenticated != nil {
		return *s.d.authenticated
	}
	return s.Session.ClientAuthenticated()
}

func (s watched) AcceptsKey(public crypto.PublicKey) bool {
	if s.d.accepts != nil {
		return s.d.accepts(public)
	}
	return s.Session.AcceptsKey(public)
}

func (s watched) Close() error {
	s.d.closed++
	return errors.Join(s.Session.Close(), s.d.closeErr)
}

// run is one run of the program; a panic of the hook is a kill.
func (d *device) run(do func(*estenroll.Credential) error) (err error) {
	d.t.Helper()
	d.events, d.requests, d.signatures = nil, nil, 0
	before := d.opened - d.closed
	var dev *estenroll.Device
	defer func() {
		cause := recover()
		kill, isKill := cause.(killed)
		if isKill {
			err = fmt.Errorf("killed %s", kill.at)
		} else if cause != nil {
			panic(cause)
		}
		// What the end of a process does: locks and sockets go.
		if dev != nil {
			if err := dev.Close(); err != nil {
				d.t.Error(err)
			}
		}
		for _, session := range d.open {
			_ = session.Close() // most are closed already
		}
		d.open = nil
		if left := d.opened - d.closed - before; left != 0 && !isKill && err == nil {
			d.t.Errorf("%d sessions were left open", left)
		}
	}()
	if dev, err = estenroll.Open(d.ctx, d.cfg.config(d.others...)); err != nil {
		return err
	}
	return do(dev.Credential(d.name))
}

func (d *device) enroll() (result *estenroll.Result, err error) {
	d.t.Helper()
	err = d.run(func(c *estenroll.Credential) (err error) { result, err = c.Enroll(d.ctx); return err })
	return result, err
}

func (d *device) renew() (result *estenroll.Result, err error) {
	d.t.Helper()
	err = d.run(func(c *estenroll.Credential) (err error) { result, err = c.Renew(d.ctx); return err })
	return result, err
}

func (d *device) renewDue() (result *estenroll.Result, err error) {
	d.t.Helper()
	err = d.run(func(c *estenroll.Credential) (err error) { result, err = c.RenewDue(d.ctx); return err })
	return result, err
}

func (d *device) rekey() (result *estenroll.Result, err error) {
	d.t.Helper()
	err = d.run(func(c *estenroll.Credential) (err error) { result, err = c.Rekey(d.ctx); return err })
	return result, err
}

func (d *device) status() (status *estenroll.Status) {
	d.t.Helper()
	err := d.run(func(c *estenroll.Credential) (err error) { status, err = c.Status(d.ctx); return err })
	if err != nil {
		d.t.Fatal(err)
	}
	return status
}

func (d *device) mustEnroll() *estenroll.Result {
	d.t.Helper()
	return must(d.t, d.enroll)
}

func (d *device) mustRenew() *estenroll.Result {
	d.t.Helper()
	return must(d.t, d.renew)
}

func (d *device) mustRekey() *estenroll.Result {
	d.t.Helper()
	return must(d.t, d.rekey)
}

func must(t *testing.T, do func() (*estenroll.Result, error)) *estenroll.Result {
	t.Helper()
	result, err := do()
	if err != nil {
		t.Fatal(err)
	}
	if result == nil {
		t.Fatal("no result and no error")
	}
	return result
}

// issued counts the certificates that the server made for the device.
func (d *device) issued() int {
	n := 0
	for _, event := range d.site.server.Issuances() {
		if event.Subject == "CN="+d.name {
			n++
		}
	}
	return n
}

func (d *device) warned(text string) bool {
	return slices.ContainsFunc(d.events, func(e estenroll.Event) bool { return e.Warning && strings.Contains(e.Message, text) })
}

// csrs are the requests of the last run that carried a CSR.
func (d *device) csrs() (bodies []string) {
	for _, r := range d.requests {
		if !r.operation.Asks() {
			bodies = append(bodies, r.body)
		}
	}
	return bodies
}

// read returns a file of the state directory; "" if there is none.
func (d *device) read(name string) string {
	d.t.Helper()
	data, err := os.ReadFile(filepath.Join(d.dir, name))
	if err != nil && !os.IsNotExist(err) {
		d.t.Fatal(err)
	}
	return string(data)
}

func (d *device) write(name, content string) {
	d.t.Helper()
	if err := os.WriteFile(filepath.Join(d.dir, name), []byte(content), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

func (d *device) remove(name string) {
	d.t.Helper()
	if err := os.Remove(filepath.Join(d.dir, name)); err != nil {
		d.t.Fatal(err)
	}
}

// view is the journal as a reader of the file sees it.
type view struct {
	VerifiedNotBefore time.Time         `json:"verified_not_before"`
	RefusedPIN        *engine.PINSource `json:"refused_pin"`
	credentialView
}

// credentialView is the part of the device's credential.
type credentialView struct {
	Pairs []struct {
		Key          string   `json:"key"`
		Certificates []string `json:"certificates"`
		ExplicitTA   string   `json:"explicit_ta"`
		Anchors      []struct {
			SHA256  string `json:"sha256"`
			Address string `json:"address"`
		} `json:"anchors"`
	} `json:"pairs"`
	Operation *struct {
		Kind string `json:"kind"`
		Step string `json:"step"`
		Key  string `json:"key"`
		CSR  []byte `json:"csr"`
		// Certificates in the token, or about to be.
		Certificates []string `json:"certificates"`
	} `json:"operation"`
	LastAttempt *estenroll.Attempt `json:"last_attempt"`
}

func (d *device) journal() (v view) {
	d.t.Helper()
	var file struct {
		view
		Credentials map[string]credentialView `json:"credentials"`
	}
	if err := json.Unmarshal([]byte(d.read("journal.json")), &file); err != nil {
		d.t.Fatal(err)
	}
	file.credentialView = file.Credentials[d.name]
	return file.view
}

// objects lists the token, but for the factory credential.
func (d *device) objects() []string {
	d.t.Helper()
	return d.site.objects(d.t)
}

func (s *site) objects(t *testing.T) (list []string) {
	t.Helper()
	objects, err := s.engine.(engine.Lister).List(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		if o.Label != opensc.IDevIDLabel {
			list = append(list, fmt.Sprintf("%s %s %x", o.Class, o.Label, o.ID))
		}
		if o.Err != nil {
			t.Errorf("%s %s: %v", o.Class, o.Label, o.Err)
		}
	}
	slices.Sort(list)
	return list
}

// clear empties the token, but for the factory credential.
func (s *site) clear(t *testing.T) {
	t.Helper()
	objects, err := s.engine.(engine.Lister).List(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		switch {
		case o.Label == opensc.IDevIDLabel:
		case o.Class == engine.ClassPrivateKey:
			err = s.engine.RemoveKey(t.Context(), o.Address)
		case o.Class == engine.ClassCertificate:
			err = s.engine.(engine.CertificateStore).RemoveCertificates(t.Context(), []engine.Address{o.Address})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

var stateFile = regexp.MustCompile(`^(journal\.json|security\.json|lock|explicit-ta-[0-9a-f]{16}\.pem)$`)

// tidy holds the state of a device to what must be true when nothing is under
// way: the Security object points at the newest credential, every object in the
// token and every file is referred to, and nothing that is referred to is missing.
func (d *device) tidy(credentials int) {
	d.t.Helper()
	journal := d.journal()
	if journal.Operation != nil {
		d.t.Errorf("an operation is left at step %s", journal.Operation.Step)
	}
	if len(journal.Pairs) != credentials {
		d.t.Errorf("%d credentials in the journal, want %d", len(journal.Pairs), credentials)
	}
	var objects, files []string
	add := func(list *[]string, text string) {
		if text != "" && !slices.Contains(*list, text) {
			*list = append(*list, text)
		}
	}
	for i, c := range journal.Pairs {
		key := d.uri(c.Key)
		add(&objects, fmt.Sprintf("private %s %x", key.Object, key.ID))
		add(&objects, fmt.Sprintf("public %s %x", key.Object, key.ID))
		for _, at := range c.Certificates {
			cert := d.uri(at)
			add(&objects, fmt.Sprintf("cert %s %x", cert.Object, cert.ID))
		}
		for _, anchor := range c.Anchors {
			at := d.uri(anchor.Address)
			add(&objects, fmt.Sprintf("cert %s %x", at.Object, at.ID))
		}
		add(&files, c.ExplicitTA)
		if security := d.read("security.json"); i == 0 && !(strings.Contains(security, c.Key) && strings.Contains(security, c.Certificates[0])) {
			d.t.Errorf("the Security object does not point at %s", c.Certificates[0])
		}
	}
	slices.Sort(objects)
	if diff := cmp.Diff(d.objects(), objects); diff != "" {
		d.t.Errorf("objects in the token (-) and in the journal (+):\n%s", diff)
	}
	add(&files, "journal.json")
	add(&files, "lock")
	add(&files, "security.json")
	slices.Sort(files)
	if diff := cmp.Diff(d.files(), files); diff != "" {
		d.t.Errorf("files in the state directory (-) and those referred to (+):\n%s", diff)
	}
}

func (d *device) uri(text string) pkcs11.URI {
	d.t.Helper()
	uri, err := pkcs11.ParseURI(text)
	if err != nil {
		d.t.Fatal(err)
	}
	return uri
}

// files lists the state directory, and holds it to names and modes.
func (d *device) files() (names []string) {
	d.t.Helper()
	directory, err := os.Stat(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	if directory.Mode().Perm() != 0o700 {
		d.t.Errorf("the state directory has mode %v", directory.Mode())
	}
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
		info, err := entry.Info()
		if err != nil {
			d.t.Fatal(err)
		}
		if !stateFile.MatchString(entry.Name()) || info.Mode() != 0o600 {
			d.t.Errorf("%s in the state directory, mode %v", entry.Name(), info.Mode())
		}
		if strings.Contains(d.read(entry.Name()), d.site.token.PIN) {
			d.t.Errorf("%s holds the PIN", entry.Name())
		}
	}
	return names
}

// snapshot is all that a run that changes nothing leaves alone.
type snapshot struct {
	Objects  []string
	Security string
	Files    map[string]string
}

func (d *device) snapshot() snapshot {
	d.t.Helper()
	s := snapshot{Objects: d.objects(), Security: d.read("security.json"), Files: map[string]string{}}
	for _, name := range d.files() {
		if name != "journal.json" {
			s.Files[name] = d.read(name)
		}
	}
	return s
}

func (d *device) unchangedSince(before snapshot) {
	d.t.Helper()
	if diff := cmp.Diff(before, d.snapshot()); diff != "" {
		d.t.Errorf("a run that should change nothing did (-before +after):\n%s", diff)
	}
}

// wantError holds an error to a kind.
func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}
