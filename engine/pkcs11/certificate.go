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
	"regexp"
	"strings"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// caLabel begins the label of a chain certificate that we stored: only such a
// one do we remove. With the fingerprint it fits into 32 bytes, which is all that
// some tokens have for a label.
const caLabel = "est-enroll-ca-"

// fingerprint tells the certificates of one label apart.
func fingerprint(cert *x509.Certificate) []byte {
	digest := sha256.Sum256(cert.Raw)
	return digest[:8]
}

// certificate is a certificate object that can be read.
type certificate struct {
	match
	cert *x509.Certificate
}

// certificates returns the certificates that an address names; those that cannot
// be read or parsed are left out.
func (s *session) certificates(u URI) ([]certificate, error) {
	u.Type = engine.ClassCertificate
	whole, _, err := s.matches(u)
	if err != nil {
		return nil, err
	}
	var certs []certificate
	for _, m := range whole {
		if cert, err := x509.ParseCertificate(m.value); err == nil {
			certs = append(certs, certificate{m, cert})
		}
	}
	return certs, nil
}

func certificateMatches(certs []certificate) []match {
	matches := make([]match, len(certs))
	for i, c := range certs {
		matches[i] = c.match
	}
	return matches
}

// Certificate implements engine.CertificateStore.
func (e *Engine) Certificate(ctx context.Context, at engine.Address) (*x509.Certificate, error) {
	const op = "read certificate"
	u, err := e.objectAddress(at, engine.ClassCertificate)
	if err != nil {
		return nil, fail(op, at, e.uri.ModulePath, err)
	}
	var cert *x509.Certificate
	err = e.read(ctx, op, u, func(s *session) error {
		found, err := s.certificates(u)
		switch {
		case err != nil:
			return err
		case len(found) > 1:
			return ambiguous(u, certificateMatches(found))
		case len(found) == 1:
			cert = found[0].cert
			return nil
		}
		if there, err := s.find(u); err != nil || len(there) == 0 {
			return errors.Join(engine.ErrNotFound, err)
		}
		return fmt.Errorf("%w: what is there cannot be read as a certificate", engine.ErrNotFound)
	})
	return cert, err
}

// CertificateAddresses implements engine.CertificateStore.
func (e *Engine) CertificateAddresses(ctx context.Context, key engine.Address, chain []*x509.Certificate) ([]engine.Address, error) {
	const op = "place certificates of"
	u, err := e.objectAddress(key, engine.ClassPrivateKey)
	if err == nil && len(chain) == 0 {
		err = errors.New("the chain is empty")
	}
	if err != nil {
		return nil, fail(op, key, e.uri.ModulePath, err)
	}
	var at []engine.Address
	err = e.read(ctx, op, u, func(s *session) error {
		label, id := u.Object, u.ID
		if label == "" || id == "" { // the token knows
			private, err := s.one(u)
			if err != nil {
				return err
			}
			label, id = private.Label, string(private.ID)
		}
		if id == "" {
			return errors.New("the key has no CKA_ID, by which its certificate is found")
		}
		leaf := URI{Token: e.label, Object: fmt.Sprintf("%s-%x", label, fingerprint(chain[0])), ID: id, Type: engine.ClassCertificate}
		if len(leaf.Object) > maxText {
			return fmt.Errorf("the key's label is too long for its certificate's: more than %d bytes", maxText)
		}
		at = []engine.Address{leaf}
		all, err := s.certificates(URI{})
		if err != nil {
			return err
		}
		for _, cert := range chain[1:] {
			at = append(at, e.chainAddress(cert, all, []byte(id)))
		}
		return nil
	})
	return at, err
}

// AnchorAddress implements engine.AnchorStore.
func (e *Engine) AnchorAddress(ctx context.Context, at engine.Address, anchor *x509.Certificate) (engine.Address, bool, error) {
	const op = "place trust anchor"
	u, err := e.objectAddress(at, engine.ClassCertificate)
	switch {
	case err != nil:
	case u.Object == "":
		err = errors.New("it has no label: object is missing")
	case strings.HasPrefix(u.Object, caLabel):
		err = fmt.Errorf("labels that begin with %s are those of chain certificates", caLabel)
	}
	if err != nil {
		return nil, false, fail(op, at, e.uri.ModulePath, err)
	}
	whole := URI{Token: e.label, Object: u.Object, ID: u.ID, Type: engine.ClassCertificate}
	if whole.ID == "" {
		whole.ID = string(fingerprint(anchor))
	}
	there := false
	err = e.read(ctx, op, at, func(s *session) error {
		for _, class := range []engine.Class{engine.ClassPrivateKey, engine.ClassPublicKey} {
			if keys, err := s.find(URI{ID: whole.ID, Type: class}); err != nil || len(keys) > 0 {
				return errors.Join(err, fmt.Errorf("%w: its id is that of a key", engine.ErrExists))
			}
		}
		found, err := s.certificates(whole)
		for _, other := range found {
			if !other.cert.Equal(anchor) {
				return engine.ErrExists
			}
		}
		there = len(found) > 0
		return err
	})
	if err != nil {
		return nil, false, err
	}
	return whole, there, nil
}

// chainAddress is where a chain certificate is, or will be: shared by value with
// whatever the token holds, ours before anybody else's.
func (e *Engine) chainAddress(cert *x509.Certificate, all []certificate, keyID []byte) URI {
	ours := URI{Token: e.label, Object: fmt.Sprintf("%s%x", caLabel, fingerprint(cert)), ID: string(fingerprint(cert)), Type: engine.ClassCertificate}
	shared := ours
	for _, other := range all {
		u, ok := other.Address.(URI)
		switch {
		case !ok || !other.cert.Equal(cert):
		case u == ours:
			return ours
		case u.Object == "" || u.ID == "" || bytes.Equal(other.ID, keyID) || shared != ours:
			// A reference carries both label and id, and never the key's id.
		case alone(u, all):
			shared = u
		}
	}
	return shared
}

// alone reports whether an address names one certificate: a reference to a twin
// would be ambiguous.
func alone(u URI, all []certificate) bool {
	n := 0
	for _, other := range all {
		if other.Address == engine.Address(u) {
			n++
		}
	}
	return n == 1
}

// places checks addresses of certificates: two may exist for one key, so a
// reference carries both id and label.
func (e *Engine) places(at []engine.Address) ([]URI, error) {
	if len(at) == 0 {
		return nil, errors.New("no addresses")
	}
	places := make([]URI, len(at))
	for i, address := range at {
		u, err := e.objectAddress(address, engine.ClassCertificate)
		if err == nil && (u.Object == "" || u.ID == "") {
			err = errors.New("both object and id are wanted")
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", address, err)
		}
		places[i] = u
	}
	return places, nil
}

// StoreCertificates implements engine.CertificateStore.
func (e *Engine) StoreCertificates(ctx context.Context, at []engine.Address, chain []*x509.Certificate) error {
	const op = "store certificates"
	places, err := e.places(at)
	if err == nil && len(places) != len(chain) {
		err = fmt.Errorf("%d addresses for %d certificates", len(places), len(chain))
	}
	if err != nil {
		return fail(op, nil, e.uri.ModulePath, err)
	}
	return e.write(ctx, op, places[0], func(s *session) error {
		for i := len(chain) - 1; i >= 0; i-- { // a leaf that is there has its chain
			if err := s.storeCertificate(places[i], chain[i]); err != nil {
				return fmt.Errorf("%s: %w", places[i], err)
			}
		}
		return nil
	})
}

// storeCertificate creates the object, reads it back, and then destroys what was
// half-written in its place. Another certificate there is not ours to destroy.
func (s *session) storeCertificate(u URI, cert *x509.Certificate) error {
	whole, broken, err := s.matches(URI{Object: u.Object, Type: engine.ClassCertificate})
	if err != nil {
		return err
	}
	there := false
	for _, m := range whole {
		other, err := x509.ParseCertificate(m.value)
		switch {
		case string(m.ID) != u.ID || err != nil:
		case !other.Equal(cert):
			return engine.ErrExists
		default:
			there = true
		}
	}
	if !there {
		if err := s.createCertificate(u, cert); err != nil {
			return err
		}
	}
	return s.destroy(leftAt(u, broken)...)
}

// ownLabel is the form of the labels that we give to certificates: no other
// program's object has one by accident.
var ownLabel = regexp.MustCompile(`(^|-)[0-9a-f]{16}$`)

// halfWritten returns what a crash in the middle of the writing of a certificate
// of ours has left: its label, perhaps not yet its id, and no value.
func (s *session) halfWritten(u URI) ([]pkcs11.ObjectHandle, error) {
	if !ownLabel.MatchString(u.Object) {
		return nil, nil
	}
	_, broken, err := s.matches(URI{Object: u.Object, Type: engine.ClassCertificate})
	return leftAt(u, broken), err
}

// leftAt picks from the half-written certificates of a label what may be of the
// writing at a place of ours.
func leftAt(u URI, broken []match) (handles []pkcs11.ObjectHandle) {
	for _, m := range broken {
		if ownLabel.MatchString(u.Object) && (len(m.ID) == 0 || string(m.ID) == u.ID) {
			handles = append(handles, m.handle)
		}
	}
	return handles
}

func (s *session) createCertificate(u URI, cert *x509.Certificate) error {
	serial, err := asn1.Marshal(cert.SerialNumber)
	if err != nil {
		return err
	}
	handle, err := s.create([]*pkcs11.Attribute{
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
		return err
	}
	values, err := s.values(handle, pkcs11.CKA_LABEL, pkcs11.CKA_ID, pkcs11.CKA_VALUE)
	if err == nil && (string(values[0]) != u.Object || string(values[1]) != u.ID || !bytes.Equal(values[2], cert.Raw)) {
		err = errors.New("the token gives back another certificate than it was given: it is destroyed")
	}
	if err == nil || s.lost(err) {
		return err
	}
	return errors.Join(fmt.Errorf("read back: %w", err), s.destroy(handle))
}

// RemoveCertificates implements engine.CertificateStore.
func (e *Engine) RemoveCertificates(ctx context.Context, at []engine.Address) error {
	const op = "remove certificates"
	places, err := e.places(at)
	if err != nil {
		return fail(op, nil, e.uri.ModulePath, err)
	}
	return e.write(ctx, op, places[0], func(s *session) error {
		leaves, err := s.certificates(places[0])
		if err != nil {
			return err
		}
		for _, leaf := range leaves {
			if !leaf.cert.Equal(leaves[0].cert) {
				return ambiguous(places[0], certificateMatches(leaves))
			}
		}
		doomed, err := s.find(places[0])
		if err != nil {
			return err
		}
		for _, place := range places {
			broken, err := s.halfWritten(place)
			if err != nil {
				return err
			}
			doomed = append(doomed, broken...)
		}
		if err := s.destroy(doomed...); err != nil || len(places) == 1 {
			return err
		}
		all, err := s.certificates(URI{})
		if err != nil {
			return err
		}
		return s.destroy(unneeded(all, places[1:])...)
	})
}

// unneeded returns those of our chain certificates under which no certificate
// that stays was issued. They may have issued each other.
func unneeded(all []certificate, places []URI) []pkcs11.ObjectHandle {
	candidates := map[pkcs11.ObjectHandle]*x509.Certificate{}
	var stay []*x509.Certificate
	for _, c := range all {
		if isPlace(c, places) {
			candidates[c.handle] = c.cert
		} else {
			stay = append(stay, c.cert)
		}
	}
	for i := 0; i < len(stay); i++ { // stay grows by the issuers of what stays
		for handle, ca := range candidates {
			if issued(ca, stay[i]) {
				delete(candidates, handle)
				stay = append(stay, ca)
			}
		}
	}
	var doomed []pkcs11.ObjectHandle
	for handle := range candidates {
		doomed = append(doomed, handle)
	}
	return doomed
}

// isPlace reports whether a certificate is at one of the places and was stored
// there by this program: its label says so, with its fingerprint.
func isPlace(c certificate, places []URI) bool {
	if c.Label != fmt.Sprintf("%s%x", caLabel, fingerprint(c.cert)) {
		return false
	}
	for _, place := range places {
		if c.Address == engine.Address(place) {
			return true
		}
	}
	return false
}

func issued(ca, cert *x509.Certificate) bool {
	return bytes.Equal(cert.RawIssuer, ca.RawSubject) && !cert.Equal(ca) &&
		ca.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature) == nil
}
