package pkcs11_test

import (
	"fmt"

	"estenroll/engine/pkcs11"
)

// An address prints in its canonical form, and without its PIN.
func ExampleParseURI() {
	token, err := pkcs11.ParseURI("pkcs11:token=my%20device?pin-value=1234&module-path=/usr/lib/softhsm/libsofthsm2.so")
	if err != nil {
		panic(err)
	}
	fmt.Println(token, token.HasPINValue())
	_, err = pkcs11.ParseURI("pkcs11:token=my device?pin-value=1234")
	fmt.Println(err)
	// Output:
	// pkcs11:token=my%20device?module-path=/usr/lib/softhsm/libsofthsm2.so true
	// pkcs11 URI: token: a character that must be percent-encoded
}
