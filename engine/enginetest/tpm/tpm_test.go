package tpm_test

import (
	"strings"
	"testing"

	"estenroll/engine/enginetest/tpm"
)

func TestToken(t *testing.T) {
	t.Parallel()
	chip := tpm.Start(t)
	token := chip.New(t, tpm.WithLabel("a token"), tpm.WithPIN("marker"))
	if strings.Contains(token.URI(), "marker") || !strings.HasPrefix(token.URI(), "pkcs11:token=a%20token?module-path=/") {
		t.Errorf("URI: %s", token.URI())
	}
	if _, err := token.GenerateEC("name", "01"); err != nil {
		t.Fatal(err)
	}
	objects, err := token.Tool("--list-objects")
	if err != nil || !strings.Contains(objects, "Private Key Object; EC") {
		t.Errorf("%v\n%s", err, objects)
	}
	other := chip.New(t)
	if err := other.Add("another"); err != nil {
		t.Fatal(err)
	}
	for _, label := range []string{"device", "another"} {
		other.Label = label
		if objects, err := other.Tool("--list-objects"); err != nil || strings.Contains(objects, "Private") {
			t.Errorf("%s: %v\n%s", label, err, objects)
		}
	}
}

// The TPM counts wrong PINs, whatever token they are for, until it is told to forget them.
func TestUnlock(t *testing.T) {
	t.Parallel()
	token := tpm.Start(t).New(t)
	wrong := *token
	wrong.PIN = "not-the-right-one"
	for range 3 {
		if _, err := wrong.Tool("--list-objects"); err == nil {
			t.Fatal("a wrong PIN is taken")
		}
	}
	if _, err := token.Tool("--list-objects"); err == nil {
		t.Error("it is not locked")
	}
	if err := token.Unlock(); err != nil {
		t.Fatal(err)
	}
	if _, err := token.Tool("--list-objects"); err != nil {
		t.Error(err)
	}
}
