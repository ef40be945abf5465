package file

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	"estenroll/engine"
	"estenroll/internal/durable"
)

// caLabel begins the label of a chain certificate that we stored: only such a one do
// we remove.
const caLabel = "est-enroll-ca-"

func fingerprint(cert *x509.Certificate) string {
	digest := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(digest[:8])
}

// CertificateAddresses implements engine.CertificateStore.
func (e *Engine) CertificateAddresses(ctx context.Context, key engine.Address, chain []*x509.Certificate) ([]engine.Address, error) {
	var places []engine.Address
	err := e.read(ctx, "place certificates", key, func() error {
		a, err := objectOf(key, engine.ClassPrivateKey)
		if err != nil {
			return err
		}
		o := object{label: a.Label, id: a.ID}
		if a.Label == "" || a.ID == "" { // the directory knows
			if o, err = e.one(a, true); err != nil {
				return err
			}
		}
		all, err := e.objects()
		if err != nil {
			return err
		}
		for i, cert := range chain {
			place := Address{Label: o.label + "-" + fingerprint(cert), ID: o.id, Type: engine.ClassCertificate}
			if i > 0 {
				place = placeOfCA(all, cert, o.id)
			}
			places = append(places, place)
		}
		return nil
	})
	return places, err
}

// placeOfCA is where a chain certificate is already, but as one of the key's, or
// where it will be.
func placeOfCA(all []object, cert *x509.Certificate, keyID string) Address {
	for _, o := range all {
		if o.cert != nil && o.id != keyID && o.cert.Equal(cert) {
			return o.address(engine.ClassCertificate)
		}
	}
	return Address{Label: caLabel + fingerprint(cert), ID: fingerprint(cert), Type: engine.ClassCertificate}
}

// wholeCertificate takes an address that names one file.
func wholeCertificate(at engine.Address) (Address, error) {
	a, err := objectOf(at, engine.ClassCertificate)
	if err == nil && (a.Label == "" || a.ID == "") {
		err = errors.New("a reference to a certificate has a label and an id")
	}
	return a, err
}

// StoreCertificates implements engine.CertificateStore: the chain first, so that a
// leaf that is there has its chain.
func (e *Engine) StoreCertificates(ctx context.Context, at []engine.Address, chain []*x509.Certificate) error {
	if len(at) != len(chain) || len(at) == 0 {
		return fail("store certificates", nil, fmt.Errorf("%d addresses for %d certificates", len(at), len(chain)))
	}
	return e.write(ctx, "store certificates", at[0], func() error {
		for i, cert := range slices.Backward(chain) {
			a, err := wholeCertificate(at[i])
			if err != nil {
				return err
			}
			o, err := e.one(a, false)
			switch {
			case err == nil && o.cert != nil && o.cert.Equal(cert):
				continue
			case err == nil && o.cert != nil:
				return engine.ErrExists
			case err != nil && !errors.Is(err, engine.ErrNotFound):
				return err
			}
			text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
			if err := durable.WriteFile(e.path(a.fileName()), text, 0o644); err != nil {
				return err
			}
		}
		return nil
	})
}

// Certificate implements engine.CertificateStore. A half-written one is none.
func (e *Engine) Certificate(ctx context.Context, at engine.Address) (*x509.Certificate, error) {
	var cert *x509.Certificate
	err := e.read(ctx, "read certificate", at, func() error {
		a, err := objectOf(at, engine.ClassCertificate)
		if err != nil {
			return err
		}
		o, err := e.one(a, false)
		if err == nil && o.err != nil {
			err = fmt.Errorf("%w: %w", engine.ErrNotFound, o.err)
		}
		cert = o.cert
		return err
	})
	return cert, err
}

// RemoveCertificates implements engine.CertificateStore.
func (e *Engine) RemoveCertificates(ctx context.Context, at []engine.Address) error {
	if len(at) == 0 {
		return nil
	}
	return e.write(ctx, "remove certificates", at[0], func() error {
		var places []Address
		for _, one := range at {
			a, err := wholeCertificate(one)
			if err != nil {
				return err
			}
			places = append(places, a)
		}
		all, err := e.objects()
		if err != nil {
			return err
		}
		var ours, rest []object // chain certificates that may go, and what may need them
		for _, o := range all {
			switch {
			case o.isKey:
			case places[0].matches(o):
				if err := durable.Remove(e.path(o.name)); err != nil {
					return err
				}
			case strings.HasPrefix(o.label, caLabel) && slices.ContainsFunc(places[1:], func(a Address) bool { return a.matches(o) }):
				ours = append(ours, o)
			case o.cert != nil:
				rest = append(rest, o)
			}
		}
		for i := 0; i < len(rest); i++ { // it grows by what is needed
			ours = slices.DeleteFunc(ours, func(ca object) bool {
				needed := ca.cert != nil && bytes.Equal(rest[i].cert.RawIssuer, ca.cert.RawSubject) && rest[i].cert.CheckSignatureFrom(ca.cert) == nil
				if needed {
					rest = append(rest, ca)
				}
				return needed
			})
		}
		for _, o := range ours {
			if err := durable.Remove(e.path(o.name)); err != nil {
				return err
			}
		}
		return nil
	})
}
