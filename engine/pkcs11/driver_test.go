//go:build cgo

package pkcs11_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ThalesGroup/crypto11"
	p11 "github.com/miekg/pkcs11"

	"estenroll/engine"
	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/engine/pkcs11"
)

func parse(t *testing.T, address string) engine.Address {
	t.Helper()
	at, err := pkcs11.Driver.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func selfSigned(t *testing.T, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(4711), Subject: pkix.Name{CommonName: "TEST ONLY"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// crypto11, which is not ours, uses a key that we made, and we use one that it
// made, both in one process. It has initialised the module, so that we do not
// finalise it under its feet.
func TestCrypto11(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	other, err := crypto11.Configure(&crypto11.Config{Path: token.ModulePath, TokenLabel: token.Label, Pin: token.PIN})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	e := open(t, token.URI(), options(t))

	// ours
	at, public := generate(t, e, "ours")
	theirs, err := other.FindKeyPair([]byte(at.(pkcs11.URI).ID), []byte("ours"))
	if err != nil || theirs == nil {
		t.Fatalf("crypto11 does not find our key: %v", err)
	}
	if err := sign(theirs); err != nil {
		t.Error(err)
	}
	if !public.(*ecdsa.PublicKey).Equal(theirs.Public()) {
		t.Error("another public key")
	}
	signer, err := e.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	cert := selfSigned(t, public, signer)
	certs := []*x509.Certificate{cert}
	places, err := e.CertificateAddresses(t.Context(), at, certs)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.StoreCertificates(t.Context(), places, certs); err != nil {
		t.Fatal(err)
	}
	place := places[0].(pkcs11.URI)
	found, err := other.FindCertificate([]byte(place.ID), []byte(place.Object), nil)
	if err != nil || !cert.Equal(found) {
		t.Errorf("crypto11 does not find our certificate: %v", err)
	}

	// theirs
	id := []byte{0xca, 0xfe}
	made, err := other.GenerateECDSAKeyPairWithLabel(id, []byte("theirs"), elliptic.P384())
	if err != nil {
		t.Fatal(err)
	}
	signer, err = e.Signer(t.Context(), parse(t, "pkcs11:object=theirs;id=%CA%FE"))
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(signer); err != nil {
		t.Error(err)
	}
	if !made.Public().(*ecdsa.PublicKey).Equal(signer.Public()) {
		t.Error("another public key")
	}
	if err := other.ImportCertificateWithLabel(id, []byte("imported"), selfSigned(t, made.Public(), made)); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Certificate(t.Context(), parse(t, "pkcs11:object=imported;id=%CA%FE")); err != nil {
		t.Error(err)
	}

	// RSA, both ways and with both paddings
	digest := sha256.Sum256([]byte("to be signed"))
	oursRSA, publicRSA := generateAs(t, e, engine.RSA2048)
	theirs, err = other.FindKeyPair([]byte(oursRSA.(pkcs11.URI).ID), nil)
	if err != nil || theirs == nil || !publicRSA.(*rsa.PublicKey).Equal(theirs.Public()) {
		t.Fatalf("crypto11 does not find our RSA key: %v", err)
	}
	if _, err := other.GenerateRSAKeyPairWithLabel([]byte{0xbe, 0xef}, []byte("RSA"), 2048); err != nil {
		t.Fatal(err)
	}
	signer, err = e.Signer(t.Context(), parse(t, "pkcs11:object=RSA;id=%BE%EF"))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{theirs, signer} {
		signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil || rsa.VerifyPKCS1v15(key.Public().(*rsa.PublicKey), crypto.SHA256, digest[:], signature) != nil {
			t.Errorf("PKCS #1 v1.5: %v", err)
		}
		pss := &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthEqualsHash}
		signature, err = key.Sign(rand.Reader, digest[:], pss)
		if err != nil || rsa.VerifyPSS(key.Public().(*rsa.PublicKey), crypto.SHA256, digest[:], signature, pss) != nil {
			t.Errorf("PSS: %v", err)
		}
	}

	// and after our Close it goes on
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := sign(made); err != nil {
		t.Errorf("after our Close: %v", err)
	}
}

// A PIN that the token has not looked at, since the process is logged in, is not
// taken for an accepted one.
func TestUnverifiedPIN(t *testing.T) {
	f := newFaulty(t)
	first := open(t, f.uri(f.Label, "&pin-source="+f.PINFile), f.options())
	second := open(t, f.uri(f.Label, "&pin-value=wrong"), f.options())
	at, _ := generate(t, second, "name")
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	signer, err := second.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	f.set(t, "lose", "C_Sign")
	if err := sign(signer); err != nil { // with the PIN that was accepted, the first one's
		t.Error(err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = pkcs11.Driver.Open(t.Context(), parse(t, f.uri(f.Label, "&pin-value=wrong")), f.options())
	if !errors.Is(err, engine.ErrPINIncorrect) {
		t.Errorf("got %v, want ErrPINIncorrect", err)
	}
}

// A PIN that was changed by somebody else is tried once after the loss of the
// device, and never again; the new one is read from the source.
func TestPINChangedMeanwhile(t *testing.T) {
	f := newFaulty(t)
	e := open(t, f.uri(f.Label, "&pin-source="+f.PINFile), f.options())
	at, _ := generate(t, e, "name")
	signer, err := e.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("NEW_PIN", "another-pin")
	if _, err := f.Tool("--change-pin", "--new-pin", "env:NEW_PIN"); err != nil {
		t.Fatal(err)
	}
	f.set(t, "lose", "C_Sign")
	for _, want := range []error{engine.ErrPINIncorrect, engine.ErrPINNotRetried, engine.ErrPINNotRetried} {
		err := sign(signer)
		var pin *engine.PINError
		if !errors.Is(err, want) || !errors.Is(err, engine.ErrDeviceLost) || !errors.As(err, &pin) || pin.Source.Path != f.PINFile {
			t.Errorf("got %v, want %v and the source of the PIN", err, want)
		}
	}
	logins := 0
	for _, call := range f.calls(t) {
		if call == "C_Login" {
			logins++
		}
	}
	if logins != 2 {
		t.Errorf("%d logins, want the first and one more", logins)
	}
	if err := os.WriteFile(f.PINFile, []byte("another-pin\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := sign(signer); err != nil {
		t.Error(err)
	}
}

// A person is asked for the PIN that nobody else has: once, before a lock is taken,
// and not for a try that the token does not allow.
func TestAskPIN(t *testing.T) {
	f := newFaulty(t)
	asked := 0
	opts := f.options()
	answer := engine.NewSecret("wrong")
	opts.AskPIN = func(_ context.Context, token engine.Address) (engine.Secret, error) {
		asked++
		if got := token.(pkcs11.URI); got.Token != f.Label || got.Serial == "" {
			t.Errorf("asked for the PIN of %s", got)
		}
		if locks, err := os.ReadDir(f.locks); !errors.Is(err, os.ErrNotExist) && asked == 1 {
			t.Errorf("while a person is asked: %v, %v", locks, err)
		}
		return answer, nil
	}
	without := parse(t, f.uri(f.Label, ""))
	refused := func(at engine.Address, opts engine.Options, want error, questions int) {
		t.Helper()
		_, err := pkcs11.Driver.Open(t.Context(), at, opts)
		if !errors.Is(err, want) || asked != questions {
			t.Errorf("got %v after %d questions, want %v after %d", err, asked, want, questions)
		}
		var pin *engine.PINError
		if errors.As(err, &pin) && !pin.Source.IsZero() {
			t.Errorf("what was typed has the source %+v", pin.Source)
		}
	}
	refused(without, opts, engine.ErrPINIncorrect, 1)
	answer = engine.NewSecret("")
	refused(without, opts, engine.ErrPINMissing, 2)
	answer = engine.NewSecret(f.PIN)
	for flag, want := range map[uint]error{p11.CKF_USER_PIN_LOCKED: engine.ErrPINLocked, p11.CKF_USER_PIN_FINAL_TRY: engine.ErrPINFinalTry} {
		f.set(t, "flags", fmt.Sprint(flag))
		refused(without, opts, want, 2)
	}
	if err := os.Remove(filepath.Join(f.faults, "flags")); err != nil {
		t.Fatal(err)
	}
	// who has another source is not asked
	refused(parse(t, f.uri(f.Label, "&pin-source=/nonexistent")), opts, os.ErrNotExist, 2)
	copied := opts
	copied.PINCopy, copied.PINCopyName = filepath.Join(t.TempDir(), "copy"), "the copy"
	if err := os.WriteFile(copied.PINCopy, []byte(f.PIN), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{f.uri(f.Label, ""), f.uri(f.Label, "&pin-source="+f.PINFile)} {
		if err := open(t, address, copied).Close(); err != nil || asked != 2 {
			t.Fatalf("%v after %d questions", err, asked)
		}
	}
	copied.RefusedPIN = engine.PINSource{Path: "the copy", Size: int64(len(f.PIN))}
	if _, err := pkcs11.Driver.Open(t.Context(), without, copied); !errors.Is(err, engine.ErrPINNotRetried) {
		t.Errorf("got %v, want ErrPINNotRetried", err)
	}
	if err := os.Remove(copied.PINCopy); err != nil {
		t.Fatal(err)
	}
	// and once, whatever becomes of the device
	e := open(t, f.uri(f.Label, ""), copied)
	at, _ := generate(t, e, "name")
	signer, err := e.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	f.set(t, "lose", "C_Sign")
	if err := sign(signer); err != nil || asked != 3 {
		t.Errorf("%v after %d questions, want 3", err, asked)
	}
}

// What a module cannot do is ErrUnsupported, with the module's name and its code.
func TestUnsupported(t *testing.T) {
	f := newFaulty(t)
	e := open(t, f.uri(f.Label, "&pin-source="+f.PINFile), f.options())
	for _, code := range []p11.Error{p11.CKR_MECHANISM_INVALID, p11.CKR_ATTRIBUTE_VALUE_INVALID, p11.CKR_TEMPLATE_INCONSISTENT, p11.CKR_CURVE_NOT_SUPPORTED} {
		at, err := e.NewKeyAddress("name")
		if err != nil {
			t.Fatal(err)
		}
		f.set(t, "return", fmt.Sprintf("C_GenerateKeyPair before %d", uint(code)))
		_, err = e.GenerateKey(t.Context(), at, engine.KeySpec{})
		if !errors.Is(err, engine.ErrUnsupported) || !errors.Is(err, code) || !strings.Contains(err.Error(), f.module) {
			t.Errorf("%v: got %v", code, err)
		}
	}
}

// After the loss of the device the PIN is for the same token only: another with
// its label, which may count its tries, does not see it.
func TestAnotherTokenInItsPlace(t *testing.T) {
	f := newFaulty(t)
	e := open(t, f.uri(f.Label, "&pin-source="+f.PINFile), f.options())
	tokens, err := filepath.Glob(filepath.Join(f.dir, "*"))
	if err != nil || len(tokens) != 1 {
		t.Fatalf("tokens: %v, %v", tokens, err)
	}
	if err := errors.Join(os.RemoveAll(tokens[0]), f.add(f.Label)); err != nil {
		t.Fatal(err)
	}
	f.set(t, "lose", "C_FindObjectsInit")
	if _, err := e.List(t.Context(), nil); !errors.Is(err, engine.ErrDeviceLost) {
		t.Errorf("got %v, want ErrDeviceLost", err)
	}
	logins := 0
	for _, call := range f.calls(t) {
		if call == "C_Login" {
			logins++
		}
	}
	if logins != 1 {
		t.Errorf("%d logins, want 1", logins)
	}
}

// The login is the process's: when another part of it logs out, private keys are
// hidden and not gone. Nothing is destroyed because it cannot be seen.
func TestLoggedOut(t *testing.T) {
	f := newFaulty(t)
	e := open(t, f.uri(f.Label, "&pin-source="+f.PINFile), f.options())
	at, public := generate(t, e, "name")
	signer, err := e.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	other := p11.New(f.module) // the same library
	logout := func() {
		t.Helper()
		slots, err := other.GetSlotList(true)
		if err != nil {
			t.Fatal(err)
		}
		session, err := other.OpenSession(slots[0], p11.CKF_SERIAL_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(other.Logout(session), other.CloseSession(session)); err != nil {
			t.Fatal(err)
		}
	}
	for name, do := range map[string]func() error{
		"sign": func() error { return sign(signer) },
		"open": func() error { _, err := e.Signer(t.Context(), at); return err },
		"recover": func() error {
			got, err := e.RecoverKey(t.Context(), at)
			if err == nil && !public.(*ecdsa.PublicKey).Equal(got) {
				err = errors.New("another key")
			}
			return err
		},
		"list": func() error {
			objects, err := e.List(t.Context(), nil)
			if err == nil && len(objects) != 2 {
				err = fmt.Errorf("%d objects", len(objects))
			}
			return err
		},
	} {
		logout()
		if err := do(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	logout()
	if err := e.RemoveKey(t.Context(), at); err != nil {
		t.Error(err)
	}
	if objects, err := e.List(t.Context(), nil); err != nil || len(objects) != 0 {
		t.Errorf("left: %v, %v", objects, err)
	}
	if slices.Contains(f.calls(t), "C_Finalize") {
		t.Error("the module was finalised under the other part")
	}
}

// A general error of a session that is alive is no loss: the module is not
// finalised, and its name is in the error.
func TestGeneralError(t *testing.T) {
	f := newFaulty(t)
	e := open(t, f.uri(f.Label, "&pin-source="+f.PINFile), f.options())
	at, _ := generate(t, e, "name")
	signer, err := e.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	f.set(t, "return", fmt.Sprintf("C_SignInit before %d", p11.CKR_GENERAL_ERROR))
	err = sign(signer)
	if err == nil || errors.Is(err, engine.ErrDeviceLost) || !strings.Contains(err.Error(), "CKR_GENERAL_ERROR") || !strings.Contains(err.Error(), f.module) {
		t.Errorf("got %v", err)
	}
	if slices.Contains(f.calls(t), "C_Finalize") {
		t.Error("the module was finalised")
	}
	if err := sign(signer); err != nil {
		t.Error(err)
	}
	// a signature that is begun and not ended blocks the session
	f.set(t, "return", fmt.Sprintf("C_Sign before %d", p11.CKR_GENERAL_ERROR))
	if err := sign(signer); err == nil {
		t.Error("no error")
	}
	if err := sign(signer); err != nil {
		t.Errorf("the session stays blocked: %v", err)
	}
}

// Some modules return EC_POINT without the OCTET STRING around it.
func TestRawPoint(t *testing.T) {
	f := newFaulty(t)
	f.set(t, "raw-point", "")
	e := open(t, f.uri(f.Label, "&pin-source="+f.PINFile), f.options())
	for _, algorithm := range []engine.Algorithm{engine.ECP256, engine.ECP384, engine.ECP521} {
		at, public := generateAs(t, e, algorithm)
		signer, err := e.Signer(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		if err := sign(signer); err != nil || !public.(*ecdsa.PublicKey).Equal(signer.Public()) {
			t.Errorf("%s: %v", algorithm, err)
		}
	}
}

// What finding an object by its id takes does not grow with the token: how long the
// module searches is its own affair (make bench).
func TestFindByIDAmongMany(t *testing.T) {
	f := newFaulty(t)
	e := open(t, f.uri(f.Label, "&pin-source="+f.PINFile), f.options())
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, at := selfSigned(t, key.Public(), key), parse(t, "pkcs11:id=%01;type=cert")
	var calls [2][]string
	for i, first := range []int{1, 2} {
		for id := first; id <= 1+20*i; id++ {
			if err := f.WriteCertificate(cert.Raw, "one of many", fmt.Sprintf("%02x", id)); err != nil {
				t.Fatal(err)
			}
		}
		before := len(f.calls(t))
		if found, err := e.Certificate(t.Context(), at); err != nil || !found.Equal(cert) {
			t.Fatal(err)
		}
		calls[i] = f.calls(t)[before:]
	}
	objects, err := e.List(t.Context(), nil)
	if err != nil || len(objects) != 21 {
		t.Fatalf("%d objects: %v", len(objects), err)
	}
	if len(calls[0]) == 0 || !slices.Equal(calls[0], calls[1]) {
		t.Errorf("alone: %v\namong 21: %v", calls[0], calls[1])
	}
}

func generateAs(t *testing.T, e *pkcs11.Engine, algorithm engine.Algorithm) (engine.Address, crypto.PublicKey) {
	t.Helper()
	at, err := e.NewKeyAddress("name")
	if err != nil {
		t.Fatal(err)
	}
	public, err := e.GenerateKey(t.Context(), at, engine.KeySpec{Algorithm: algorithm})
	if err != nil {
		t.Fatal(err)
	}
	return at, public
}

// The public half of an RSA key is read from the private object where there is no
// public one, which every token shows (PKCS #11 v2.40 mechanisms §2.1.3).
func TestRSAPublicKeyFromPrivate(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	der, err := token.Generate("rsa:2048", "factory", "01")
	if err == nil {
		_, err = token.Tool("--delete-object", "--type", "pubkey", "--id", "01")
	}
	if err != nil {
		t.Fatal(err)
	}
	signer, err := open(t, token.URI(), options(t)).Signer(t.Context(), parse(t, "pkcs11:object=factory;type=private"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := x509.MarshalPKIXPublicKey(signer.Public()); err != nil || !bytes.Equal(got, der) {
		t.Errorf("another public key, %v", err)
	}
	digest := sha256.Sum256(nil)
	if _, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
		t.Error(err)
	}
}

// A kind of signature that the module does not make is named, as the module is.
func TestSignatureUnsupported(t *testing.T) {
	f := newFaulty(t)
	e := open(t, f.uri(f.Label, "&pin-source="+f.PINFile), f.options())
	at, _ := generateAs(t, e, engine.RSA2048)
	signer, err := e.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	for name, opts := range map[string]crypto.SignerOpts{
		"CKM_RSA_PKCS": crypto.SHA256, "CKM_RSA_PKCS_PSS": &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthEqualsHash},
	} {
		f.set(t, "return", fmt.Sprintf("C_SignInit before %d", uint(p11.CKR_MECHANISM_INVALID)))
		_, err := signer.Sign(rand.Reader, digest[:], opts)
		if !errors.Is(err, engine.ErrUnsupported) || !strings.Contains(err.Error(), name+":") || !strings.Contains(err.Error(), f.module) {
			t.Errorf("%s: got %v", name, err)
		}
		if _, err := signer.Sign(rand.Reader, digest[:], opts); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A factory may have put the certificate beside the private key, and no public one.
func TestPublicKeyFromCertificate(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	err = token.StoreIDevID(func(der []byte) ([]byte, error) {
		public, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			return nil, err
		}
		return selfSigned(t, public, issuer{ca}).Raw, nil
	})
	if err == nil {
		_, err = token.Tool("--delete-object", "--type", "pubkey", "--id", opensc.IDevIDID)
	}
	if err != nil {
		t.Fatal(err)
	}
	e := open(t, token.URI(), options(t))
	at := parse(t, "pkcs11:object=idevid;type=private")
	signer, err := e.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(signer); err != nil {
		t.Error(err)
	}
}

// A public half that is not the private one's is found out at the first
// signature, not by a server; of two public halves none is guessed.
func TestHalvesOfTwoKeys(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	_, err := token.GenerateEC("first", "01")
	if err == nil {
		_, err = token.Tool("--delete-object", "--type", "privkey", "--id", "01")
	}
	if err == nil {
		_, err = token.GenerateEC("second", "01")
	}
	if err != nil {
		t.Fatal(err)
	}
	e := open(t, token.URI(), options(t))
	var ambiguous *engine.AmbiguousError
	if _, err := e.Signer(t.Context(), parse(t, "pkcs11:id=%01")); !errors.As(err, &ambiguous) {
		t.Errorf("got %v, want an *engine.AmbiguousError", err)
	}
	if _, err := token.Tool("--delete-object", "--type", "pubkey", "--label", "second"); err != nil {
		t.Fatal(err)
	}
	signer, err := e.Signer(t.Context(), parse(t, "pkcs11:id=%01"))
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(signer); err == nil || !strings.Contains(err.Error(), "token's signature does not verify") {
		t.Errorf("got %v, want a signature that does not verify", err)
	}
}

// A pair whose halves do not belong together does not survive recovery.
func TestRecoverHalvesOfTwoKeys(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	e := open(t, token.URI(), options(t))
	at, _ := generate(t, e, "name")
	_, other := generate(t, e, "other")
	if _, err := e.RecoverKey(t.Context(), at); err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(other)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "other.der")
	if err := os.WriteFile(file, der, 0o600); err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("%x", at.(pkcs11.URI).ID)
	for _, args := range [][]string{
		{"--delete-object", "--type", "pubkey", "--id", id},
		{"--write-object", file, "--type", "pubkey", "--id", id, "--label", "name"},
	} {
		if _, err := token.Tool(args...); err != nil {
			t.Fatal(err)
		}
	}
	_, err = e.RecoverKey(t.Context(), at)
	if !errors.Is(err, engine.ErrNotFound) || !strings.Contains(err.Error(), "does not verify") {
		t.Errorf("got %v, want ErrNotFound, since the signature does not verify", err)
	}
	if objects, err := e.List(t.Context(), nil); err != nil || len(objects) != 2 {
		t.Errorf("left: %v, %v, want the other pair", objects, err)
	}
}

// issuer is a CA's key that signs a certificate of another's key as if it were
// its own.
type issuer struct{ crypto.Signer }

// An object of another program may have a label that no address can hold, or none.
func TestStrangeLabels(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := selfSigned(t, key.Public(), key)
	for _, label := range []string{"\xff", ""} {
		if err := token.WriteCertificate(cert.Raw, label, ""); err != nil {
			t.Fatal(err)
		}
	}
	objects, err := open(t, token.URI(), options(t)).List(t.Context(), nil)
	if err != nil || len(objects) != 2 {
		t.Fatalf("%v, %v", objects, err)
	}
	for _, object := range objects {
		if object.Address != nil || object.Err != nil {
			t.Errorf("%q: %v, %v, want no address", object.Label, object.Address, object.Err)
		}
	}
}

// What is wrong with a module or a token is an error of its own, and no crash.
func TestOpenRefused(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	module, err := os.ReadFile(token.ModulePath)
	if err != nil {
		t.Fatal(err)
	}
	libraries, err := filepath.Glob("/lib/x86_64-linux-gnu/libm.so.6")
	if err != nil || len(libraries) == 0 {
		t.Fatalf("no library that is no module: %v", err)
	}
	library := func(name, source string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		compile := exec.CommandContext(t.Context(), "gcc", "-shared", "-fPIC", "-o", path, "-x", "c", "-")
		compile.Stdin = strings.NewReader(source)
		if out, err := compile.CombinedOutput(); err != nil {
			t.Fatalf("compile %s (make deps installs gcc): %v\n%s", name, err, out)
		}
		return path
	}
	for _, tc := range []struct {
		name, path string
		want       error
	}{
		{"missing", filepath.Join(dir, "missing.so"), engine.ErrModuleNotFound},
		{"missing, and the file system says so", filepath.Join(dir, "missing.so"), os.ErrNotExist},
		{"directory", dir, engine.ErrModule},
		{"text", write("text.so", []byte("not a module\n")), engine.ErrModule},
		{"empty", write("empty.so", nil), engine.ErrModule},
		{"cut short", write("short.so", module[:len(module)/2]), engine.ErrModule},
		{"its header alone", write("header.so", module[:64]), engine.ErrModule},
		{"a library that is no module", libraries[0], engine.ErrModule},
		{"a module that refuses its functions", library("fails.so", "unsigned long C_GetFunctionList(void **l) { return 5; }"), engine.ErrModule},
		{"a module without functions", library("null.so", "unsigned long C_GetFunctionList(void **l) { *l = 0; return 0; }"), engine.ErrModule},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := pkcs11.Driver.Open(t.Context(), parse(t, "pkcs11:token=device?module-path="+tc.path), options(t))
			var form *engine.Error
			if !errors.Is(err, tc.want) || !errors.As(err, &form) || !strings.Contains(err.Error(), tc.path) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
	t.Run("no module", func(t *testing.T) {
		if _, err := pkcs11.Driver.Open(t.Context(), parse(t, "pkcs11:token=device"), options(t)); !errors.Is(err, engine.ErrModuleNotFound) {
			t.Errorf("got %v, want ErrModuleNotFound", err)
		}
	})
	t.Run("a vendor's attribute that selects", func(t *testing.T) {
		_, err := pkcs11.Driver.Open(t.Context(), parse(t, "pkcs11:token=device;seriall=1?module-path="+token.ModulePath), options(t))
		if !errors.Is(err, engine.ErrTokenNotFound) || !strings.Contains(err.Error(), "attribute seriall is unknown") {
			t.Errorf("got %v, want ErrTokenNotFound and the attribute", err)
		}
	})
}

// Of two tokens with one label the error has the address of each, by which it
// opens as it is: by the serial number, or by the slot where that is the same too.
func TestTokensOfOneLabel(t *testing.T) {
	for name, serial := range map[string]string{"two serial numbers": "", "one serial number": "0000000000000000"} {
		t.Run(name, func(t *testing.T) {
			f := newFaulty(t)
			if err := f.add(f.Label); err != nil {
				t.Fatal(err)
			}
			if serial != "" {
				f.set(t, "serial", serial)
			}
			_, err := pkcs11.Driver.Open(t.Context(), parse(t, f.uri(f.Label, "&pin-source="+f.PINFile)), f.options())
			var ambiguous *engine.AmbiguousError
			if !errors.As(err, &ambiguous) || !errors.Is(err, engine.ErrTokenAmbiguous) || len(ambiguous.Matches) != 2 || strings.Count(err.Error(), `serial "`) != 2 {
				t.Fatalf("got %v, want an *engine.AmbiguousError with both serial numbers", err)
			}
			var engines []*pkcs11.Engine
			for i, match := range ambiguous.Matches {
				at := match.Address.(pkcs11.URI)
				if at.Serial == "" || (at.SlotID != "") != (serial != "") {
					t.Errorf("%s is not the shortest address", at)
				}
				e := open(t, at.String(), f.options())
				generate(t, e, fmt.Sprintf("key %d", i))
				engines = append(engines, e)
			}
			f.set(t, "lose", "C_FindObjectsInit")
			for i, e := range engines { // each in its own token, also when it is opened again
				objects, err := e.List(t.Context(), nil)
				if err != nil || len(objects) != 2 || objects[0].Label != fmt.Sprintf("key %d", i) {
					t.Errorf("token %d: %v, %v", i, objects, err)
				}
			}
		})
	}
}

// p11-kit's trust module is a token that is write-protected by itself and asks for
// no PIN.
func TestWriteProtectedToken(t *testing.T) {
	e := open(t, "pkcs11:model=p11-kit-trust?module-name=p11-kit-trust", options(t))
	if _, err := e.List(t.Context(), nil); err != nil {
		t.Error(err)
	}
	at, err := e.NewKeyAddress("name")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.GenerateKey(t.Context(), at, engine.KeySpec{}); !errors.Is(err, engine.ErrTokenReadOnly) {
		t.Errorf("got %v, want ErrTokenReadOnly", err)
	}
}

// A SIGKILL inside SoftHSM's own writing leaves a file cut off anywhere: whatever
// is left of one object, the others are found.
func TestObjectCutAnywhere(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	opts := options(t)
	e := open(t, token.URI(), opts)
	at, _ := generate(t, e, "whole")
	signer, err := e.Signer(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	whole := objectFiles(t, token.Dir)
	torn, tornPublic := generate(t, e, "torn")
	certs := []*x509.Certificate{selfSigned(t, tornPublic, issuer{signer})}
	places, err := e.CertificateAddresses(t.Context(), torn, certs)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.StoreCertificates(t.Context(), places, certs); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	for path, content := range objectFiles(t, token.Dir) {
		if _, intact := whole[path]; intact {
			continue
		}
		for size := 0; size < len(content); size += 13 {
			if err := os.WriteFile(path, content[:size], 0o600); err != nil {
				t.Fatal(err)
			}
			e := open(t, token.URI(), opts)
			objects, err := e.List(t.Context(), nil)
			if err != nil {
				t.Errorf("cut at %d of %d: %v", size, len(content), err)
			}
			if len(objects) < 4 {
				t.Errorf("cut at %d of %d: only %v", size, len(content), objects)
			}
			if signer, err := e.Signer(t.Context(), at); err != nil {
				t.Errorf("cut at %d of %d: %v", size, len(content), err)
			} else if err := sign(signer); err != nil {
				t.Errorf("cut at %d of %d: %v", size, len(content), err)
			}
			// the torn ones themselves give an error or work: no crash, no other's
			if signer, err := e.Signer(t.Context(), torn); err == nil {
				_ = sign(signer)
			}
			if cert, err := e.Certificate(t.Context(), places[0]); err == nil && !cert.Equal(certs[0]) {
				t.Errorf("cut at %d of %d: another certificate", size, len(content))
			}
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func objectFiles(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*", "*.object"))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Base(path) != "token.object" {
			files[path] = bytes.Clone(content)
		}
	}
	return files
}
