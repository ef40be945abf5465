//go:build cgo

package pkcs11_test

import (
	"errors"
	"strings"
	"testing"

	"estenroll/engine"
	"estenroll/engine/enginetest/softhsm"
)

// A key that cannot decrypt is said to be one, and why, whoever made it.
func TestDecryptionKeyRefused(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	tool := func(args ...string) {
		t.Helper()
		if _, err := token.Tool(args...); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := token.Run("p11tool", "--provider", token.ModulePath, "--batch", "--login", "--generate-privkey=rsa", "--bits", "2048",
		"--label", "signing", "--id", "01", "--mark-sign", "pkcs11:token="+token.Label); err != nil {
		t.Fatal(err)
	}
	tool("--keygen", "--key-type", "GENERIC:32", "--label", "generic", "--id", "02")
	tool("--keygen", "--key-type", "AES:32", "--label", "nameless")
	e := open(t, token.URI(), options(t))
	for at, want := range map[string]struct {
		is   error
		text string
	}{
		"pkcs11:object=signing":                  {engine.ErrUnsupported, "the key is not for decryption (CKA_DECRYPT)"},
		"pkcs11:object=generic;type=secret-key":  {engine.ErrUnsupported, "a secret key that is not one of AES"},
		"pkcs11:object=nameless;type=secret-key": {nil, "it has no id (CKA_ID)"},
		"pkcs11:object=nameless;type=cert":       {nil, "its type is cert, not private"},
	} {
		_, err := e.DecryptionKey(t.Context(), parse(t, at))
		var form *engine.Error
		if !errors.As(err, &form) || want.is != nil && !errors.Is(err, want.is) || !strings.Contains(err.Error(), want.text) {
			t.Errorf("%s: got %v, want %q", at, err, want.text)
		}
	}
}
