//go:build cgo

package pkcs11_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"estenroll/engine"
	"estenroll/engine/enginetest"
	"estenroll/engine/enginetest/tpm"
	"estenroll/engine/pkcs11"
)

// TestTPM holds the driver to the rules, on tpm2-pkcs11 and a software TPM.
func TestTPM(t *testing.T) {
	chip := tpm.Start(t)
	enginetest.Run(t, enginetest.Harness{New: func(t *testing.T) enginetest.Token {
		t.Helper()
		made := chip.New(t, tpm.WithPIN("marker-7d20"))
		f := makeFaulty(t, made.Token)
		f.add = made.Add
		f.damage = func(t *testing.T, label string) { t.Helper(); damageRow(t, made.Store, label) }
		token := f.token()
		token.NoImport = true
		token.Algorithms = []engine.Algorithm{engine.ECP256, engine.ECP384}
		// Measured: tpm2-pkcs11 1.9.0 writes a point of P-521 that it cannot read, and
		// signs with RSA by decrypting, which a key for signing only may not; swtpm 0.7
		// has no RSA key of more than 3072 bits.
		token.Unsupported = []engine.Algorithm{engine.ECP521, engine.RSA2048, engine.RSA3072, engine.RSA4096}
		// Measured: of an RSA key that decrypts it says that it signs too, or, where it is
		// told not to (p11tool), it makes none.
		token.NoDecryption = true
		token.GenerateDecryption = func(label, id string, signs bool) error {
			if signs {
				return made.GenerateDecryption(label, id, true)
			}
			_, err := f.Tool("--keypairgen", "--key-type", "rsa:2048", "--usage-decrypt", "--label", label, "--id", id)
			return err
		}
		// Measured: it takes in no secret key (CKR_ATTRIBUTE_VALUE_INVALID).
		token.WriteSecret = nil
		// tpm2-pkcs11 reads its store in C_Initialize.
		token.Stale = true
		token.GenerateForeign = func(label, id string) error {
			_, err := f.Generate("rsa:1024", label, id)
			return err
		}
		return token
	}})
}

// damageRow takes the value out of the row of a certificate. No crash does that:
// tpm2-pkcs11 writes an object in one transaction of SQLite.
func damageRow(t *testing.T, store, label string) {
	t.Helper()
	const statement = `
		UPDATE tobjects SET attrs = substr(attrs, 1, instr(attrs, :value) - 1) ||
			substr(attrs, instr(attrs, :value) - 1 + instr(substr(attrs, instr(attrs, :value) + 1), :next) + 1)
		WHERE instr(attrs, :value) AND instr(attrs, :label);
		SELECT changes();`
	database := exec.CommandContext(t.Context(), "sqlite3", filepath.Join(store, "tpm2_pkcs11.sqlite3"),
		`.parameter set :value "'? !!int \"17\"'"`, // CKA_VALUE
		`.parameter set :next "'? !!int'"`,
		fmt.Sprintf(`.parameter set :label "'\"%x\"'"`, label),
		statement)
	out, err := database.CombinedOutput()
	if err != nil || string(out) != "1\n" {
		t.Fatalf("damage %s: %v: %s", label, err, out)
	}
}

// All tokens of a TPM have one serial number: their labels tell them apart, and
// each has its own writer lock.
func TestTPMTokensOfOneSerial(t *testing.T) {
	token := tpm.Start(t).New(t)
	if err := token.Add("another"); err != nil {
		t.Fatal(err)
	}
	token.Use(t)
	query := "?module-path=" + token.ModulePath + "&pin-source=" + token.PINFile
	opts := options(t)
	first := open(t, "pkcs11:token=device"+query, opts)
	second := open(t, "pkcs11:token=another"+query, opts)
	at, _ := generate(t, first, "name")
	if _, err := second.Signer(t.Context(), at); err == nil {
		t.Error("the one's key is in the other")
	}
	if _, err := second.Signer(t.Context(), parse(t, "pkcs11:object=name")); !errors.Is(err, engine.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	if locks, err := os.ReadDir(opts.LockDir); err != nil || len(locks) != 2 {
		t.Errorf("%v, %v, want two locks", locks, err)
	}
	_, err := pkcs11.Driver.Open(t.Context(), parse(t, "pkcs11:serial=0000000000000000"+query), opts)
	if !errors.Is(err, engine.ErrTokenAmbiguous) {
		t.Errorf("got %v, want ErrTokenAmbiguous", err)
	}
}

// An RSA key of a factory, which the TPM may use to decrypt too, signs with
// PKCS #1 v1.5.
func TestTPMFactoryRSA(t *testing.T) {
	token := tpm.Start(t).New(t)
	if _, err := token.Generate("rsa:2048", "factory", "0102"); err != nil {
		t.Fatal(err)
	}
	token.Use(t)
	signer, err := open(t, token.URI(), options(t)).Signer(t.Context(), parse(t, "pkcs11:object=factory"))
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("to be signed"))
	signature, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if err := rsa.VerifyPKCS1v15(signer.Public().(*rsa.PublicKey), crypto.SHA256, digest[:], signature); err != nil {
		t.Error(err)
	}
	// Measured: tpm2-pkcs11 1.9.0 has no PSS over swtpm 0.7.
	_, err = signer.Sign(rand.Reader, digest[:], &rsa.PSSOptions{Hash: crypto.SHA256})
	if !errors.Is(err, engine.ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
}
