package pkcs11_test

import (
	"strings"
	"testing"

	"estenroll/engine/pkcs11"
)

func TestForPrograms(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, object, token, want string }{
		{"private key", "pkcs11:token=a;object=k;id=%01;type=private", "pkcs11:token=a?module-path=/m.so&pin-source=file:/etc/the%20pin",
			"pkcs11:token=a;object=k;id=%01;type=private?pin-source=/etc/the%20pin"},
		{"certificate", "pkcs11:token=a;object=c;type=cert", "pkcs11:token=a?module-path=/m.so&pin-source=file:/etc/pin", "pkcs11:token=a;object=c;type=cert"},
		{"no PIN file", "pkcs11:token=a;type=private", "pkcs11:token=a?module-path=/m.so", "pkcs11:token=a;type=private"},
		{"PIN in the clear", "pkcs11:token=a;type=private", "pkcs11:token=a?module-path=/m.so&pin-value=4711-secret", "pkcs11:token=a;type=private"},
		{"the object's own query", "pkcs11:token=a;type=private?pin-value=4711-secret", "pkcs11:token=a?pin-source=/etc/pin", "pkcs11:token=a;type=private?pin-source=/etc/pin"},
	} {
		object, err := pkcs11.ParseURI(tc.object)
		if err != nil {
			t.Fatal(err)
		}
		token, err := pkcs11.ParseURI(tc.token)
		if err != nil {
			t.Fatal(err)
		}
		got := object.ForPrograms(token)
		if got != tc.want || strings.Contains(got, "4711") {
			t.Errorf("%s: got %s, want %s", tc.name, got, tc.want)
		}
		if _, err := pkcs11.ParseURI(got); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}
