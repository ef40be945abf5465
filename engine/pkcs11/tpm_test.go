//go:build cgo

package pkcs11_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

	"estenroll/engine"
	"estenroll/engine/enginetest"
	"estenroll/engine/enginetest/tpm"
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
		token.Algorithms = []engine.Algorithm{engine.ECP256, engine.ECP384}
		// Measured: tpm2-pkcs11 1.9.0 writes a point of P-521 that it cannot read, and
		// signs with RSA by decrypting, which a key for signing only may not; swtpm 0.7
		// has no RSA key of more than 3072 bits.
		token.Unsupported = []engine.Algorithm{engine.ECP521, engine.RSA2048, engine.RSA3072, engine.RSA4096}
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
