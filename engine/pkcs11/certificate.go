//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// caLabel begins the label of a chain certificate that we stored: only such a
// one do we remove.
const caLabel = "est-enroll-ca-"

// fingerprint tells certificates of one label apart.
func fingerprint(cert *x509.Certificate) []byte {
	digest := sha256.Sum256(cert.Raw)
	return digest[:8]
}

// stored is a certificate object that could be read.
type stored struct {
	handle pkcs11.ObjectHandle
	cert   *x509.Certificate
}

// certificates reads the certificates that match a template; what cannot be
// read is returned apart.
func (e *Engine) certificates(u URI) (readable []stored, unreadable []pkcs11.ObjectHandle, err error) {
	handles, err := e.search(template(u))
	if err != nil {
		return nil, nil, err
	}
	for _, handle := range handles {
		value, err := e.value(handle, pkcs11.CKA_VALUE)
		if err != nil && !isUnreadable(err) {
			return nil, nil, err
		}
		cert, parseErr := x509.ParseCertificate(value)
		if err != nil || parseErr != nil {
			unreadable = append(unreadable, handle)
			continue
		}
		readable = append(readable, stored{handle, cert})
	}
	return readable, unreadable, nil
}

// certificate returns the one certificate that an address names.
func (e *Engine) certificate(u URI) (stored, error) {
	readable, unreadable, err := e.certificates(u)
	switch {
	case err != nil:
		return stored{}, err
	case len(readable) == 0 && len(unreadable) > 0:
		return stored{}, fmt.Errorf("%d objects that cannot be read: %w", len(unreadable), engine.ErrNotFound)
	case len(readable) == 0:
		return stored{}, engine.ErrNotFound
	case len(readable) > 1:
		ambiguous := &engine.AmbiguousError{Address: u}
		for _, match := range readable {
			ambiguous.Matches = append(ambiguous.Matches, e.describe(match.handle))
		}
		return stored{}, ambiguous
	}
	return readable[0], nil
}

// Certificate implements engine.CertificateStore.
func (e *Engine) Certificate(ctx context.Context, at engine.Address) (*x509.Certificate, error) {
	u, err := e.objectAddress(at, engine.ClassCertificate)
	if err != nil {
		return nil, fail("read certificate", at, e.moduleName(), err)
	}
	var found stored
	err = e.read(ctx, "read certificate", u, func() (err error) {
		found, err = e.certificate(u)
		return err
	})
	return found.cert, err
}

// CertificateAddresses implements engine.CertificateStore.
func (e *Engine) CertificateAddresses(ctx context.Context, key engine.Address, chain []*x509.Certificate) (out []engine.Address, err error) {
	u, err := e.objectAddress(key, engine.ClassPrivateKey)
	if err == nil && len(chain) == 0 {
		err = errors.New("an empty chain")
	}
	if err != nil {
		return nil, fail("plan certificates", key, e.moduleName(), err)
	}
	err = e.read(ctx, "plan certificates", u, func() error {
		handle, err := e.findOne(u)
		if err != nil {
			return err
		}
		object := e.describe(handle)
		if object.Err != nil {
			return object.Err
		}
		if len(object.ID) == 0 {
			return errors.New("the key has no CKA_ID")
		}
		leaf := URI{Token: e.label, Object: fmt.Sprintf("%s-%x", object.Label, fingerprint(chain[0])), ID: string(object.ID), Type: engine.ClassCertificate}
		out = []engine.Address{leaf}
		for _, cert := range chain[1:] {
			at, err := e.chainAddress(cert, object.ID)
			if err != nil {
				return err
			}
			out = append(out, at)
		}
		return nil
	})
	return out, err
}

// chainAddress is where a chain certificate is, or will be.
func (e *Engine) chainAddress(cert *x509.Certificate, keyID []byte) (URI, error) {
	ours := URI{Token: e.label, Object: fmt.Sprintf("%s%x", caLabel, fingerprint(cert)), ID: string(fingerprint(cert)), Type: engine.ClassCertificate}
	all, _, err := e.certificates(URI{Type: engine.ClassCertificate})
	if err != nil {
		return URI{}, err
	}
	shared := ours
	for _, other := range all {
		if !other.cert.Equal(cert) {
			continue
		}
		object := e.describe(other.handle)
		at, ok := object.Address.(URI)
		if at == ours {
			return ours, nil
		}
		// A reference carries both id and label, and never the key's id.
		if ok && object.Err == nil && at.Object != "" && at.ID != "" && !bytes.Equal(object.ID, keyID) {
			if _, err := e.certificate(at); err == nil {
				shared = at
			}
		}
	}
	return shared, nil
}

// StoreCertificates implements engine.CertificateStore.
func (e *Engine) StoreCertificates(ctx context.Context, at []engine.Address, chain []*x509.Certificate) error {
	places, err := e.certificatePlaces(at)
	if err == nil && len(places) != len(chain) {
		err = fmt.Errorf("%d addresses for %d certificates", len(at), len(chain))
	}
	if err != nil {
		return fail("store certificates", nil, e.moduleName(), err)
	}
	// The chain first: a leaf that is there has its chain.
	for i := len(chain) - 1; i >= 0; i-- {
		err := e.write(ctx, "store certificate", places[i], func() error { return e.storeCertificate(places[i], chain[i]) })
		if err != nil {
			return err
		}
	}
	return nil
}

// certificatePlaces checks that addresses carry both id and label: two
// certificates may exist for one key.
func (e *Engine) certificatePlaces(at []engine.Address) ([]URI, error) {
	places := make([]URI, len(at))
	for i, address := range at {
		u, err := e.objectAddress(address, engine.ClassCertificate)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", address, err)
		}
		if u.Object == "" || u.ID == "" {
			return nil, fmt.Errorf("%s: want both object and id", u)
		}
		places[i] = u
	}
	return places, nil
}

// storeCertificate creates the object, reads it back and then destroys what was
// in its place: values are never written in place.
func (e *Engine) storeCertificate(u URI, cert *x509.Certificate) error {
	readable, broken, err := e.certificates(u)
	if err != nil {
		return err
	}
	kept := false
	for _, other := range readable {
		if !kept && other.cert.Equal(cert) {
			kept = true
			continue
		}
		broken = append(broken, other.handle)
	}
	if !kept {
		if err := e.createCertificate(u, cert); err != nil {
			return err
		}
	}
	for _, handle := range broken {
		if err := e.destroy(handle); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) createCertificate(u URI, cert *x509.Certificate) error {
	serial, err := asn1.Marshal(cert.SerialNumber)
	if err != nil {
		return err
	}
	handle, err := e.module.ctx.CreateObject(e.session, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE),
		pkcs11.NewAttribute(pkcs11.CKA_CERTIFICATE_TYPE, pkcs11.CKC_X_509),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object),
		pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)),
		pkcs11.NewAttribute(pkcs11.CKA_SUBJECT, cert.RawSubject),
		pkcs11.NewAttribute(pkcs11.CKA_ISSUER, cert.RawIssuer),
		pkcs11.NewAttribute(pkcs11.CKA_SERIAL_NUMBER, serial),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, cert.Raw),
	})
	if err != nil {
		return fmt.Errorf("create object: %w", err)
	}
	value, err := e.value(handle, pkcs11.CKA_VALUE)
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	if !bytes.Equal(value, cert.Raw) {
		return errors.Join(errors.New("the token gives back another certificate than it was given: it is destroyed"), e.destroy(handle))
	}
	return nil
}

// RemoveCertificates implements engine.CertificateStore.
func (e *Engine) RemoveCertificates(ctx context.Context, at []engine.Address) error {
	places, err := e.certificatePlaces(at)
	if err != nil {
		return fail("remove certificates", nil, e.moduleName(), err)
	}
	for i, place := range places {
		err := e.write(ctx, "remove certificate", place, func() error {
			if i > 0 {
				if needed, err := e.needed(place); err != nil || needed {
					return err
				}
			}
			handles, err := e.search(template(place))
			if err != nil {
				return err
			}
			for _, handle := range handles {
				if err := e.destroy(handle); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// needed reports whether a chain certificate is not ours to remove, or one that
// another certificate in the token was issued under: chain certificates are
// shared, and counted by what refers to them.
func (e *Engine) needed(place URI) (bool, error) {
	if !strings.HasPrefix(place.Object, caLabel) {
		return true, nil
	}
	ca, err := e.certificate(place)
	if errors.Is(err, engine.ErrNotFound) {
		return false, nil // half-written, or gone
	}
	if err != nil {
		return false, err
	}
	all, _, err := e.certificates(URI{Type: engine.ClassCertificate})
	if err != nil {
		return false, err
	}
	for _, other := range all {
		if other.handle != ca.handle && !other.cert.Equal(ca.cert) && bytes.Equal(other.cert.RawIssuer, ca.cert.RawSubject) && other.cert.CheckSignatureFrom(ca.cert) == nil {
			return true, nil
		}
	}
	return false, nil
}
