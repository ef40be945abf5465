//go:build !cgo

package pkcs11

import (
	"context"
	"fmt"

	"estenroll/engine"
)

// open says what is missing: a PKCS#11 module is a C library.
func open(_ context.Context, token engine.Address, _ engine.Options) (engine.Engine, error) {
	return nil, &engine.Error{Op: "open token", Address: token, Err: fmt.Errorf(
		"built without cgo, which calls PKCS#11 modules: %w", engine.ErrBuild)}
}
