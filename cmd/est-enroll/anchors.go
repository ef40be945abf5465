package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"estenroll"
	"estenroll/engine"
	"estenroll/engine/pkcs11"
	"estenroll/est"
)

// fingerprintMark stands in an address for the first digits of a fingerprint, as many
// as the labels of certificates have: with them some tokens' 32 bytes are enough.
const (
	fingerprintMark   = "{fingerprint}"
	fingerprintDigits = 16
)

// anchorAddresses makes the addresses of trust anchors from a template, nil of none.
// No two of them may be alike, which is for their labels to tell: an identifier is
// completed by the engine.
func anchorAddresses(template string) (func(*x509.Certificate) engine.Address, error) {
	if template == "" {
		return nil, nil
	}
	address := func(fingerprint est.Fingerprint) (engine.Address, error) {
		return objectAddress("anchor-address", strings.ReplaceAll(template, fingerprintMark, fingerprint.String()[:fingerprintDigits]))
	}
	first, err := address(est.Fingerprint{0})
	if err != nil {
		return nil, err
	}
	second, err := address(est.Fingerprint{1})
	if err != nil {
		return nil, err
	}
	one, ok := first.(pkcs11.URI)
	if other, _ := second.(pkcs11.URI); ok && one.Object == other.Object {
		return nil, fmt.Errorf("anchor-address: it names all trust anchors alike: want %s in object", fingerprintMark)
	}
	if ok && (one.ID != "" || one.Type != "" && one.Type != engine.ClassCertificate) {
		return nil, errors.New("anchor-address: want an object, and neither an id nor another type than cert")
	}
	return func(anchor *x509.Certificate) engine.Address {
		at, err := address(est.FingerprintOf(anchor))
		if err != nil {
			return nil // two of the same form have been parsed
		}
		return at
	}, nil
}

// parseInterval reads a duration, or 0 for none.
func parseInterval(text string) (time.Duration, error) {
	if text == "0" {
		return 0, nil
	}
	return estenroll.ParseMargin(text)
}
