//go:build cgo

package pkcs11

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// sentinels maps return values to the engine's errors (PKCS #11 v2.40 §5.1).
var sentinels = map[pkcs11.Error]error{
	pkcs11.CKR_PIN_INCORRECT:           engine.ErrPINIncorrect,
	pkcs11.CKR_PIN_INVALID:             engine.ErrPINIncorrect,
	pkcs11.CKR_PIN_LEN_RANGE:           engine.ErrPINIncorrect,
	pkcs11.CKR_PIN_LOCKED:              engine.ErrPINLocked,
	pkcs11.CKR_TOKEN_WRITE_PROTECTED:   engine.ErrTokenReadOnly,
	pkcs11.CKR_SESSION_READ_ONLY:       engine.ErrTokenReadOnly,
	pkcs11.CKR_DEVICE_MEMORY:           engine.ErrTokenFull,
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED:    engine.ErrTokenNotFound,
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED:  engine.ErrUnsupported,
	pkcs11.CKR_MECHANISM_INVALID:       engine.ErrUnsupported,
	pkcs11.CKR_MECHANISM_PARAM_INVALID: engine.ErrUnsupported,
	pkcs11.CKR_CURVE_NOT_SUPPORTED:     engine.ErrUnsupported,
	pkcs11.CKR_DOMAIN_PARAMS_INVALID:   engine.ErrUnsupported,
	pkcs11.CKR_ATTRIBUTE_TYPE_INVALID:  engine.ErrUnsupported,
	// what modules that are older than CKR_CURVE_NOT_SUPPORTED say of a curve or a policy
	pkcs11.CKR_ATTRIBUTE_VALUE_INVALID:    engine.ErrUnsupported,
	pkcs11.CKR_TEMPLATE_INCONSISTENT:      engine.ErrUnsupported,
	pkcs11.CKR_KEY_SIZE_RANGE:             engine.ErrUnsupported,
	pkcs11.CKR_KEY_TYPE_INCONSISTENT:      engine.ErrUnsupported, // a key that is not for the mechanism
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: engine.ErrUnsupported, // one that must not sign
	pkcs11.CKR_ACTION_PROHIBITED:          engine.ErrUnsupported, // an object that must not be destroyed
	pkcs11.CKR_OBJECT_HANDLE_INVALID:      engine.ErrNotFound,    // another process destroyed it
	pkcs11.CKR_KEY_HANDLE_INVALID:         engine.ErrNotFound,
	pkcs11.CKR_DEVICE_REMOVED:             engine.ErrDeviceLost,
	pkcs11.CKR_DEVICE_ERROR:               engine.ErrDeviceLost,
	pkcs11.CKR_TOKEN_NOT_PRESENT:          engine.ErrDeviceLost,
	pkcs11.CKR_SLOT_ID_INVALID:            engine.ErrDeviceLost,
	pkcs11.CKR_SESSION_HANDLE_INVALID:     engine.ErrDeviceLost,
	pkcs11.CKR_SESSION_CLOSED:             engine.ErrDeviceLost,
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:   engine.ErrDeviceLost,
	pkcs11.CKR_USER_NOT_LOGGED_IN:         engine.ErrDeviceLost,
}

// returned is an error of the module in the engine's words.
type returned struct {
	code     pkcs11.Error
	sentinel error // nil where the engine has no word for it
}

func (r *returned) Error() string {
	name := fmt.Sprintf("0x%X", uint(r.code))
	if text := r.code.Error(); strings.Contains(text, "CKR_") {
		name = text[strings.Index(text, "CKR_"):]
	}
	if r.sentinel == nil {
		return "the module answers " + name
	}
	return fmt.Sprintf("%s (%s)", r.sentinel, name)
}

func (r *returned) Unwrap() []error {
	if r.sentinel == nil {
		return []error{r.code}
	}
	return []error{r.code, r.sentinel}
}

// explain puts an error that comes straight from the module into the engine's words.
func explain(err error) error {
	if code, ok := err.(pkcs11.Error); ok { // the bare value: a wrapped one is explained already
		return &returned{code, sentinels[code]}
	}
	return err
}

func isCode(err error, codes ...pkcs11.Error) bool {
	var code pkcs11.Error
	return errors.As(err, &code) && slices.Contains(codes, code)
}

// fail gives an error the form that every error of an engine has.
func fail(op string, at engine.Address, module string, err error) error {
	if err == nil {
		return nil
	}
	return &engine.Error{Op: op, Address: at, Module: module, Err: explain(err)}
}
