//go:build cgo

package pkcs11_test

import (
	"fmt"
	"os/exec"
	"testing"

	"estenroll/engine/enginetest"
	"estenroll/engine/enginetest/nss"
)

// TestNSS holds the driver to the rules, on NSS's softokn.
func TestNSS(t *testing.T) {
	module := nss.Build(t)
	enginetest.Run(t, enginetest.Harness{New: func(t *testing.T) enginetest.Token {
		t.Helper()
		made := module.New(t, "marker-7d20")
		f := makeFaulty(t, made.Token)
		f.add = func(label string) error {
			err := made.Add(label)
			f.Environment = made.Environment
			f.Use(t)
			return err
		}
		f.damage = func(t *testing.T, label string) { t.Helper(); damageNSS(t, made.Database, label) }
		token := f.token()
		// Measured: softokn 3.87 refuses a second certificate of one issuer with one
		// serial number (CKR_GENERAL_ERROR).
		token.Unique = true
		// Measured: its CKM_AES_KEY_WRAP_PAD is not RFC 5649's (CKR_WRAPPED_KEY_INVALID).
		token.NoUnwrap = true
		// As the draft of RSA guidance has it (draft-irtf-cfrg-rsa-guidance-05 §7).
		token.ImplicitRejection = true
		token.GenerateForeign = func(label, id string) error {
			_, err := f.Generate("rsa:1024", label, id)
			return err
		}
		return token
	}})
}

// damageNSS takes all that its value says out of the row of a certificate. No crash
// does that: softokn writes an object in one transaction of SQLite.
func damageNSS(t *testing.T, database, label string) {
	t.Helper()
	// CKA_VALUE, CKA_ISSUER, CKA_SERIAL_NUMBER; CKA_LABEL
	statement := fmt.Sprintf("UPDATE nssPublic SET a11 = NULL, a81 = NULL, a82 = NULL WHERE a3 = x'%x'; SELECT changes()", label)
	out, err := exec.CommandContext(t.Context(), "sqlite3", database, statement).CombinedOutput()
	if err != nil || string(out) != "1\n" {
		t.Fatalf("damage %s: %v: %s", label, err, out)
	}
}
