//go:build !cgo

package pkcs11_test

import (
	"errors"
	"strings"
	"testing"

	"estenroll/engine"
	"estenroll/engine/pkcs11"
)

func TestWithoutCgo(t *testing.T) {
	at, err := pkcs11.Driver.Parse("pkcs11:token=a?module-path=/m.so")
	if err != nil {
		t.Fatal(err)
	}
	_, err = pkcs11.Driver.Open(t.Context(), at, engine.Options{})
	if !errors.Is(err, engine.ErrBuild) || !strings.Contains(err.Error(), "cgo") {
		t.Errorf("got %v, want what is missing", err)
	}
}
