package pkcs11

import (
	"path/filepath"
	"strings"

	"estenroll/engine"
)

// ForPrograms returns the address of an object as other programs of the device
// take it: with the file that the token's PIN is in, where they need one, and
// never with the PIN itself.
//
// Measured: libp11 0.4.12 (OpenSSL's engine) refuses an address with a
// module-path; p11-kit 0.24 (GnuTLS) takes one only for a module it is configured
// for, and a pin-source only as a bare path. So the module is left to the
// programs' own configuration, and "file:" out.
func (u URI) ForPrograms(token URI) string {
	text := u.object().String()
	switch u.Type {
	case engine.ClassCertificate, engine.ClassPublicKey: // not private objects: no login
		return text
	}
	if !filepath.IsAbs(token.PINSource) {
		return text
	}
	source := URI{PINSource: token.PINSource}.String()
	return text + strings.Replace(strings.TrimPrefix(source, scheme+":"), "=file:", "=", 1)
}
