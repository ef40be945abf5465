package est_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"testing"
	"time"

	"estenroll/est"
)

func TestAlertMeaning(t *testing.T) {
	own := &x509.Certificate{NotBefore: epoch.Add(-time.Hour), NotAfter: epoch.Add(time.Hour)}
	for _, c := range []struct {
		alert  uint8
		sent   bool
		offset time.Duration
		want   error
	}{
		{0, true, 0, est.ErrUnreachable},  // close_notify
		{80, true, 0, est.ErrUnreachable}, // internal_error
		{90, true, 0, est.ErrUnreachable}, // user_canceled
		{80, false, 0, est.ErrUnreachable},
		{40, false, 0, est.ErrHandshake},                     // handshake_failure
		{40, true, 0, est.ErrCredentialRefused},              // handshake_failure
		{41, true, 0, est.ErrCredentialRefused},              // no_certificate
		{42, true, 0, est.ErrCredentialRefused},              // bad_certificate
		{43, true, 0, est.ErrCredentialRefused},              // unsupported_certificate
		{44, true, 0, est.ErrCredentialRefused},              // certificate_revoked
		{46, true, 0, est.ErrCredentialRefused},              // certificate_unknown
		{48, true, 0, est.ErrCredentialRefused},              // unknown_ca
		{49, true, 0, est.ErrCredentialRefused},              // access_denied
		{51, true, 0, est.ErrCredentialRefused},              // decrypt_error
		{45, true, 0, est.ErrCredentialNotYetValid},          // certificate_expired
		{45, true, time.Hour, est.ErrCredentialNotYetValid},  // certificate_expired
		{45, true, time.Hour + 1, est.ErrCredentialRefused},  // certificate_expired
		{45, true, -time.Hour - 1, est.ErrCredentialRefused}, // certificate_expired
		{45, false, 0, est.ErrHandshake},                     // certificate_expired
	} {
		t.Run(fmt.Sprintf("%d, sent %t, %s", c.alert, c.sent, c.offset), func(t *testing.T) {
			if got := est.AlertMeaning(c.alert, c.sent, own, epoch.Add(c.offset)); !errors.Is(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}
