package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/internal/durable"
)

// part is one thing that an enrolment cannot do without, by the fewest calls
// that do it: no search but for what is wanted, nothing read back, nothing judged.
type part struct {
	// Name for a person, and the line of est-enroll -v within which the whole
	// does the same.
	name, step string
	do         func() error
}

// rawToken is a token by PKCS #11 calls alone.
type rawToken struct {
	ctx     *pkcs11.Ctx
	session pkcs11.SessionHandle
}

// loadRaw loads a module, perhaps beside the driver: one of the two initialises it
// at a time.
func loadRaw(path string) (*rawToken, error) {
	ctx := pkcs11.New(path)
	if ctx == nil {
		return nil, fmt.Errorf("load %s", path)
	}
	return &rawToken{ctx: ctx}, nil
}

// open finds the one token and opens a session.
func (r *rawToken) open(label string) error {
	slots, err := r.ctx.GetSlotList(true)
	if err != nil {
		return err
	}
	for _, slot := range slots {
		info, err := r.ctx.GetTokenInfo(slot)
		if err != nil {
			return err
		}
		if info.Label == label {
			r.session, err = r.ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
			return err
		}
	}
	return fmt.Errorf("no token %q", label)
}

// find returns the one object of a template.
func (r *rawToken) find(template ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	if err := r.ctx.FindObjectsInit(r.session, template); err != nil {
		return 0, err
	}
	found, _, err := r.ctx.FindObjects(r.session, 2)
	if err := errors.Join(err, r.ctx.FindObjectsFinal(r.session)); err != nil {
		return 0, err
	}
	if len(found) != 1 {
		return 0, fmt.Errorf("%d objects, want one", len(found))
	}
	return found[0], nil
}

func (r *rawToken) value(object pkcs11.ObjectHandle, kind uint) ([]byte, error) {
	values, err := r.ctx.GetAttributeValue(r.session, object, []*pkcs11.Attribute{{Type: kind}})
	if err != nil {
		return nil, err
	}
	return values[0].Value, nil
}

// generate makes a P-256 pair like those of the driver.
func (r *rawToken) generate(label string, id []byte) (public, private pkcs11.ObjectHandle, err error) {
	named := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}
	return r.ctx.GenerateKeyPair(r.session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		append([]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
			pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}),
		}, named...),
		append([]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true), pkcs11.NewAttribute(pkcs11.CKA_SIGN_RECOVER, false),
			pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, false), pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false), pkcs11.NewAttribute(pkcs11.CKA_DERIVE, false),
		}, named...))
}

func (r *rawToken) store(cert *x509.Certificate, label string, id []byte) error {
	serial, err := asn1.Marshal(cert.SerialNumber)
	if err != nil {
		return err
	}
	_, err = r.ctx.CreateObject(r.session, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), pkcs11.NewAttribute(pkcs11.CKA_CERTIFICATE_TYPE, pkcs11.CKC_X_509),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_ID, id),
		pkcs11.NewAttribute(pkcs11.CKA_SUBJECT, cert.RawSubject), pkcs11.NewAttribute(pkcs11.CKA_ISSUER, cert.RawIssuer),
		pkcs11.NewAttribute(pkcs11.CKA_SERIAL_NUMBER, serial), pkcs11.NewAttribute(pkcs11.CKA_VALUE, cert.Raw),
	})
	return err
}

// rawSigner signs and looks at nothing.
type rawSigner struct {
	token  *rawToken
	handle pkcs11.ObjectHandle
	public crypto.PublicKey
}

func (s rawSigner) Public() crypto.PublicKey { return s.public }

func (s rawSigner) Sign(_ io.Reader, digest []byte, _ crypto.SignerOpts) ([]byte, error) {
	if err := s.token.ctx.SignInit(s.token.session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, s.handle); err != nil {
		return nil, err
	}
	raw, err := s.token.ctx.Sign(s.token.session, digest)
	if err != nil {
		return nil, err
	}
	half := len(raw) / 2
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:half]), new(big.Int).SetBytes(raw[half:])})
}

// bareEnrolment is an enrolment that is nothing but its parts. The first fields
// say what it works with, and go to a process of its own as JSON.
type bareEnrolment struct {
	Module, Label, PINFile string // of the token
	Server                 string // URI
	Anchors, Factory       string // files
	Dir                    string // for its files
	Subject                string // RFC 4514

	token  *rawToken
	server est.URI
	trust  *est.TrustAnchors

	factory     *x509.Certificate
	idevid, key rawSigner
	idevidCert  *x509.Certificate
	subject     []byte
	id          []byte // CKA_ID of the new key
	session     *coaps.Session
	request     []byte
	caCerts     []*x509.Certificate
	leaf        *x509.Certificate
}

// bareEnrolmentMain is the program bare-enrolment: it does the one that it is
// given, and prints its laps.
func bareEnrolmentMain() {
	var b bareEnrolment
	err := json.Unmarshal([]byte(os.Args[1]), &b)
	var laps []lap
	if err == nil {
		laps, err = b.run(context.Background())
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(laps)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run enrols, and times each part.
func (b *bareEnrolment) run(ctx context.Context) ([]lap, error) {
	if err := b.prepare(); err != nil {
		return nil, err
	}
	var laps []lap
	for _, p := range b.parts(ctx) {
		began := time.Now()
		if err := p.do(); err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		laps = append(laps, lap{p.name, p.step, milliseconds(time.Since(began))})
	}
	return laps, nil
}

// prepare reads what is given, which is not timed.
func (b *bareEnrolment) prepare() (err error) {
	if b.server, err = est.ParseURI(b.Server); err != nil {
		return err
	}
	if b.subject, err = csr.ParseSubject(b.Subject); err != nil {
		return err
	}
	var anchors, factory []*x509.Certificate
	for file, certs := range map[string]*[]*x509.Certificate{b.Anchors: &anchors, b.Factory: &factory} {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if *certs, err = estenroll.ParseTrustAnchors(data); err != nil {
			return err
		}
	}
	b.factory, b.id = factory[0], []byte(b.Subject)
	b.trust, err = est.NewTrustAnchors(anchors)
	return err
}

// parts lists what an enrolment consists of, in its order: the lifecycle's
// (DESIGN.md §7), with each file that it promises on the disk.
func (b *bareEnrolment) parts(ctx context.Context) []part {
	return []part{
		{"fsync: state directory", "generate", func() error { return durable.MkdirAll(b.Dir, 0o700) }},
		{"load the module", "generate", func() (err error) {
			b.token, err = loadRaw(b.Module)
			return err
		}},
		{"open and login", "generate", func() error {
			pin, err := os.ReadFile(b.PINFile)
			if err != nil {
				return err
			}
			if err := b.token.ctx.Initialize(); err != nil {
				return err
			}
			if err := b.token.open(b.Label); err != nil {
				return err
			}
			return b.token.ctx.Login(b.token.session, pkcs11.CKU_USER, string(pin[:len(pin)-1]))
		}},
		{"find the factory credential", "generate", b.findIDevID},
		{"fsync: Security object, journal", "generate", b.files("security", "journal")},
		{"generate", "generate", func() (err error) {
			public, private, err := b.token.generate("device", b.id)
			if err != nil {
				return err
			}
			point, err := b.token.value(public, pkcs11.CKA_EC_POINT)
			if err != nil {
				return err
			}
			key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point[2:]) // in an OCTET STRING
			b.key = rawSigner{b.token, private, key}
			return err
		}},
		{"fsync: journal", "generate", b.files("journal")},
		{"sign the CSR", "request", func() (err error) {
			b.request, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{RawSubject: b.subject}, b.key)
			return err
		}},
		{"fsync: journal", "request", b.files("journal")},
		{"handshake", "request", func() error { return b.dial(ctx, b.idevid, b.idevidCert, b.factory) }},
		{"crts", "request", func() (err error) {
			b.caCerts, err = b.client().CACerts(ctx)
			return err
		}},
		{"sen", "request", func() error {
			issued, err := b.client().SimpleEnroll(ctx, b.request)
			if err != nil {
				return err
			}
			b.leaf = issued[0]
			return b.session.Close()
		}},
		{"fsync: trust anchors, journal", "store", b.files("anchors", "journal")},
		{"store", "store", func() error {
			// The issuing CA is the one that is no root.
			return errors.Join(b.token.store(b.caCerts[1], "issuing", []byte("issuing")), b.token.store(b.leaf, "device", b.id))
		}},
		{"fsync: journal", "store", b.files("journal")},
		{"proof: handshake", "prove", func() error { return b.dial(ctx, b.key, b.leaf, b.caCerts[1]) }},
		{"proof: crts", "prove", func() error {
			_, err := b.client().CACerts(ctx)
			return errors.Join(err, b.session.Close())
		}},
		{"fsync: journal", "prove", b.files("journal")},
		{"fsync: Security object, journal", "commit", b.files("security", "journal")},
		{"fsync: journal", "end", b.files("journal")},
		{"close", "end", func() error { return errors.Join(b.token.ctx.CloseSession(b.token.session), b.token.ctx.Finalize()) }},
	}
}

// findIDevID finds the key and reads the certificate, which has its public key.
func (b *bareEnrolment) findIDevID() error {
	label := pkcs11.NewAttribute(pkcs11.CKA_LABEL, opensc.IDevIDLabel)
	private, err := b.token.find(label, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
	if err != nil {
		return err
	}
	object, err := b.token.find(label, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE))
	if err != nil {
		return err
	}
	der, err := b.token.value(object, pkcs11.CKA_VALUE)
	if err != nil {
		return err
	}
	if b.idevidCert, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	b.idevid = rawSigner{b.token, private, b.idevidCert.PublicKey}
	return nil
}

func (b *bareEnrolment) client() *est.Client { return &est.Client{Session: b.session} }

func (b *bareEnrolment) dial(ctx context.Context, key crypto.Signer, chain ...*x509.Certificate) (err error) {
	cfg := coaps.Config{URI: b.server, Key: key, Trust: b.trust}
	for _, cert := range chain {
		cfg.Certificate = append(cfg.Certificate, cert.Raw)
	}
	b.session, err = coaps.Dial(ctx, cfg)
	return err
}

// fileSize is about that of the journal at its longest.
const fileSize = 3 << 10

// files puts as many files on the disk as it is given names, whole or not at all.
func (b *bareEnrolment) files(names ...string) func() error {
	return func() error {
		for _, name := range names {
			if err := durable.WriteFile(filepath.Join(b.Dir, name), make([]byte, fileSize), 0o600); err != nil {
				return err
			}
		}
		return nil
	}
}

// readCertificate finds a certificate by its id and reads it.
func (r *rawToken) readCertificate(id []byte) error {
	object, err := r.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	if err != nil {
		return err
	}
	_, err = r.value(object, pkcs11.CKA_VALUE)
	return err
}

// idSize is that of the ids that the driver makes.
const idSize = 16

// manyObjects makes a SoftHSM token of so many certificates that differ in their
// id, and returns the last id. The files are copies of one: to create them through
// the module takes minutes.
func manyObjects(t *testing.T, cert *x509.Certificate, objects int) (token *softhsm.Token, last []byte) {
	t.Helper()
	id := func(i int) []byte { return fmt.Appendf(nil, "id-%0*d", idSize-3, i) }
	token = softhsm.New(t)
	if err := token.WriteCertificate(cert.Raw, "many", hex.EncodeToString(id(0))); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(token.Dir, "*", "*-*.object"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%d files of one object: %v", len(files), err)
	}
	first := []byte(read(t, files[0]))
	for i := 1; i < objects; i++ {
		copied := bytes.ReplaceAll(first, id(0), id(i))
		path := filepath.Join(filepath.Dir(files[0]), fmt.Sprintf("00000000-0000-0000-0000-%012x.object", i))
		if err := os.WriteFile(path, copied, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return token, id(objects - 1)
}
