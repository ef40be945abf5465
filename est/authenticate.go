package est

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// OwnCertificate returns the leaf of the chain (DER, leaf first) that
// authenticates us in a handshake. A key that is another's would look to the
// server like a forgery, and its refusal to us like a verdict on the certificate:
// ErrKeyMismatch.
func OwnCertificate(chain [][]byte, key crypto.Signer) (*x509.Certificate, error) {
	if len(chain) == 0 || key == nil {
		return nil, errors.New("no certificate and key to authenticate with")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("our certificate: %w", err)
	}
	if public, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(key.Public()) {
		return nil, fmt.Errorf("our certificate %q and our key: %w", leaf.Subject, ErrKeyMismatch)
	}
	return leaf, nil
}

// Alerts that are no verdict on a certificate, or on its time only (RFC 8446 §6).
const (
	alertCloseNotify        = 0
	alertCertificateExpired = 45
	alertInternalError      = 80
	alertUserCanceled       = 90
)

// AlertMeaning is what a fatal alert of the server (RFC 5246 §7.2, RFC 8446 §6)
// means for EST, where it came in the handshake or, as TLS 1.3 has it, instead of
// the first answer. certificateSent tells that ours was, and own is its leaf.
func AlertMeaning(alert uint8, certificateSent bool, own *x509.Certificate, now time.Time) error {
	switch {
	case alert == alertCloseNotify, alert == alertInternalError, alert == alertUserCanceled:
		return ErrUnreachable
	case !certificateSent:
		return ErrHandshake
	case alert == alertCertificateExpired && !now.Before(own.NotBefore) && !now.After(own.NotAfter):
		return ErrCredentialNotYetValid
	}
	return ErrCredentialRefused
}
