//go:build cgo

package pkcs11

import (
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// sentinels maps return values to the engine's errors (PKCS #11 v2.40 §5.1).
var sentinels = map[pkcs11.Error]error{
	pkcs11.CKR_PIN_INCORRECT:              engine.ErrPINIncorrect,
	pkcs11.CKR_PIN_INVALID:                engine.ErrPINIncorrect,
	pkcs11.CKR_PIN_LEN_RANGE:              engine.ErrPINIncorrect,
	pkcs11.CKR_PIN_LOCKED:                 engine.ErrPINLocked,
	pkcs11.CKR_TOKEN_WRITE_PROTECTED:      engine.ErrTokenReadOnly,
	pkcs11.CKR_SESSION_READ_ONLY:          engine.ErrTokenReadOnly,
	pkcs11.CKR_DEVICE_MEMORY:              engine.ErrTokenFull,
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED:       engine.ErrTokenNotFound,
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED:     engine.ErrUnsupported,
	pkcs11.CKR_MECHANISM_INVALID:          engine.ErrUnsupported,
	pkcs11.CKR_MECHANISM_PARAM_INVALID:    engine.ErrUnsupported,
	pkcs11.CKR_CURVE_NOT_SUPPORTED:        engine.ErrUnsupported,
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: engine.ErrUnsupported,
	pkcs11.CKR_ATTRIBUTE_TYPE_INVALID:     engine.ErrUnsupported,
	pkcs11.CKR_DEVICE_REMOVED:             engine.ErrDeviceLost,
	pkcs11.CKR_DEVICE_ERROR:               engine.ErrDeviceLost,
	pkcs11.CKR_TOKEN_NOT_PRESENT:          engine.ErrDeviceLost,
	pkcs11.CKR_SESSION_HANDLE_INVALID:     engine.ErrDeviceLost,
	pkcs11.CKR_SESSION_CLOSED:             engine.ErrDeviceLost,
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:   engine.ErrDeviceLost,
	pkcs11.CKR_USER_NOT_LOGGED_IN:         engine.ErrDeviceLost,
}

// explain adds the engine's sentinel to an error of the module.
func explain(err error) error {
	var code pkcs11.Error
	if !errors.As(err, &code) {
		return err
	}
	if sentinel, known := sentinels[code]; known && !errors.Is(err, sentinel) {
		return fmt.Errorf("%w: %w", err, sentinel)
	}
	return err
}

// isLost reports an error after which the session is not to be used again.
func isLost(err error) bool { return errors.Is(explain(err), engine.ErrDeviceLost) }

// isUnreadable reports the error of an attribute that an object does not have,
// does not show, or was killed before it got.
func isUnreadable(err error) bool {
	var code pkcs11.Error
	return errors.As(err, &code) && slices.Contains([]pkcs11.Error{
		pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_SENSITIVE, pkcs11.CKR_OBJECT_HANDLE_INVALID,
		// Measured: SoftHSM 2.6.1 answers a half-written object so.
		pkcs11.CKR_GENERAL_ERROR,
	}, code)
}
