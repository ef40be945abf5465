package estenroll

import (
	"crypto/x509"
	"math/big"
	"testing"
)

// A serial number is shown in whole bytes, as other programs show it.
func TestStatusSerial(t *testing.T) {
	t.Parallel()
	for number, want := range map[int64]string{0xa: "0a", 0x10: "10", 0xabc: "0abc"} {
		var status CredentialStatus
		status.describe(&x509.Certificate{SerialNumber: big.NewInt(number)})
		if status.Serial != want {
			t.Errorf("%x: got %q, want %q", number, status.Serial, want)
		}
	}
}
