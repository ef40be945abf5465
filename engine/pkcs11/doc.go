// Package pkcs11 is the engine driver for tokens behind a PKCS#11 module: one
// module handle per path in a process, one session and one login per token, one
// mutex around every call. It keeps the rules of DESIGN.md §5, which
// engine/enginetest holds it to. Its addresses are RFC 7512 URIs.
//
// It never lets a private key leave the token, never tries a PIN twice, and
// never guesses between two objects.
package pkcs11

import "estenroll/engine"

// Driver opens tokens by PKCS#11 URI:
//
//	pkcs11:token=device?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/est-enroll/pin
var Driver = engine.Driver{Parse: parseAddress, Open: open}
