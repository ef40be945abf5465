package testserver

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"estenroll/csr"
	"estenroll/est"
)

// noExpiry is the date of a certificate without a well-defined end
// (RFC 5280 §4.1.2.5): what IEEE 802.1AR gives an IDevID. The CAs and the
// server's own certificate have it too, so that a test may turn its clock far.
var noExpiry = time.Date(9999, time.December, 31, 23, 59, 59, 0, time.UTC)

// caAge is how old the CAs, the server's certificate and the IDevIDs look: a
// device whose clock is behind must still be able to judge them.
const caAge = 365 * 24 * time.Hour

// authority is a CA: its certificate and its key, which lives in memory only.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newAuthority makes a CA under parent, or a self-signed one if parent is nil.
func newAuthority(name string, parent *authority, notBefore time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key: %s: %w", name, err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             notBefore,
		NotAfter:              noExpiry,
		BasicConstraintsValid: true,
		IsCA:                  true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	self := &authority{cert: template, key: key}
	if parent == nil {
		parent = self
	} else {
		template.MaxPathLenZero = true
	}
	if self.cert, err = parent.sign(template, key.Public()); err != nil {
		return nil, err
	}
	return self, nil
}

// sign makes a certificate. The serial number is random (RFC 5280 §4.1.2.2).
func (a *authority) sign(template *x509.Certificate, pub crypto.PublicKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, pub, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back certificate: %w", err)
	}
	return cert, nil
}

// issued reports whether the CA's key signed the certificate.
func (a *authority) issued(cert *x509.Certificate) bool {
	return cert.CheckSignatureFrom(a.cert) == nil
}

// generation is what a rollover replaces: a root, the CA below it that issues, and
// the server's certificate.
type generation struct {
	root, issuing *authority
	leaf          *x509.Certificate
}

// authorities are all keys of one test server.
type authorities struct {
	*generation // that issues
	factory     *authority
	// foreign carries the issuing CA's name and another key: the fault foreign-chain.
	foreign *authority
	// rollover is the one that was begun and not finished, nil if there is none, and
	// links are the NewWithOld of those before that are still published.
	rollover *rollover
	links    []*x509.Certificate
	clients  *est.TrustAnchors // judge the certificates of clients
	// others have nothing to do with this server: intermediates, then their roots.
	others []*x509.Certificate
}

// maxOtherCAs is far more than a client needs to take.
const maxOtherCAs = 32

func (s *Server) newAuthorities() (*authorities, error) {
	notBefore := s.now().Add(-caAge)
	own, err := s.newGeneration(notBefore)
	if err != nil {
		return nil, err
	}
	factory, err := newAuthority("TEST ONLY factory CA", nil, notBefore)
	if err != nil {
		return nil, err
	}
	foreign, err := newAuthority(own.issuing.cert.Subject.CommonName, nil, notBefore)
	if err != nil {
		return nil, err
	}
	all := &authorities{generation: own, factory: factory, foreign: foreign}
	if err := all.addOthers(s.cfg.OtherCAs, notBefore); err != nil {
		return nil, err
	}
	return all, all.setClients()
}

// newGeneration makes a root and what is below it. All generations have the same
// names: a CA that changes its key keeps its own (RFC 4210 §4.4).
func (s *Server) newGeneration(notBefore time.Time) (*generation, error) {
	root, err := newAuthority("TEST ONLY EST root CA", nil, notBefore)
	if err != nil {
		return nil, err
	}
	made := &generation{root: root, issuing: root}
	if !s.cfg.SingleCA {
		if made.issuing, err = newAuthority("TEST ONLY EST issuing CA", root, notBefore); err != nil {
			return nil, err
		}
	}
	made.leaf, err = made.serverCertificate(s.names, s.key.Public(), notBefore)
	return made, err
}

// setClients makes the trust anchors for the certificates of clients.
func (a *authorities) setClients() (err error) {
	a.clients, err = est.NewTrustAnchors(append(a.known(), a.factory.cert))
	return err
}

func (a *authorities) addOthers(n int, notBefore time.Time) error {
	var roots []*x509.Certificate
	for i := range n {
		root, err := newAuthority(fmt.Sprintf("TEST ONLY other root CA %d", i+1), nil, notBefore)
		if err != nil {
			return err
		}
		intermediate, err := newAuthority(fmt.Sprintf("TEST ONLY other issuing CA %d", i+1), root, notBefore)
		if err != nil {
			return err
		}
		roots, a.others = append(roots, root.cert), append(a.others, intermediate.cert)
	}
	a.others = append(a.others, roots...)
	return nil
}

// caCerts is what /crts answers: a client that got its leaf alone
// (RFC 7030 §4.2.3) builds the chain from here. With others among them the order
// is one that no client may count on.
func (a *authorities) caCerts() []*x509.Certificate {
	own := append(a.known(), a.published()...)
	if len(a.others) > 0 {
		slices.Reverse(own)
	}
	return append(slices.Clone(a.others), own...)
}

// own are the CAs that a certificate of this generation leads to, root first.
func (g *generation) own() []*x509.Certificate {
	if g.issuing == g.root {
		return []*x509.Certificate{g.root.cert}
	}
	return []*x509.Certificate{g.root.cert, g.issuing.cert}
}

// chain returns what is sent beside a leaf: the intermediate, never the root.
func (g *generation) chain() []*x509.Certificate { return g.own()[1:] }

// serverCertificate makes the server's own leaf.
func (g *generation) serverCertificate(names []string, pub crypto.PublicKey, notBefore time.Time) (*x509.Certificate, error) {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "TEST ONLY EST server"},
		NotBefore:   notBefore,
		NotAfter:    noExpiry,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	cert, err := g.issuing.sign(template, pub)
	if err != nil {
		return nil, fmt.Errorf("server certificate: %w", err)
	}
	return cert, nil
}

// parseCSR accepts what this CA signs: PKCS#10 whose signature proves
// possession of a key that checkKey takes (RFC 2986 §4.2).
func parseCSR(der []byte) (*x509.CertificateRequest, error) {
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("not a PKCS#10 request: %w", err)
	}
	if err := checkKey(request.PublicKey); err != nil {
		return nil, err // before the signature, whose cost the key decides
	}
	if err := request.CheckSignature(); err != nil {
		return nil, errors.New("the request's signature does not verify")
	}
	return request, nil
}

// maxRSABits keeps a request from costing more than a certificate is worth.
const maxRSABits = 4096

// checkKey takes the keys that an HSM signs with: P-256, which RFC 9148 §3 makes
// mandatory, and what the field has beside it.
func checkKey(pub crypto.PublicKey) error {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
			return nil
		}
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits >= 2048 && bits <= maxRSABits && key.N.Bit(0) == 1 && key.E >= 3 && key.E%2 == 1 {
			return nil
		}
	}
	return fmt.Errorf("the public key is neither EC on P-256, P-384 or P-521 nor RSA of 2048 to %d bits", maxRSABits)
}

// keyLike makes another key of the same kind.
func keyLike(pub crypto.PublicKey) (crypto.Signer, error) {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.GenerateKey(key.Curve, rand.Reader)
	case *rsa.PublicKey:
		return rsa.GenerateKey(rand.Reader, key.N.BitLen())
	}
	return nil, fmt.Errorf("a key of type %T", pub)
}

// keyUnlike makes a key of another kind.
func keyUnlike(pub crypto.PublicKey) (crypto.Signer, error) {
	if key, ok := pub.(*ecdsa.PublicKey); ok && key.Curve == elliptic.P521() {
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	return ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
}

// subjectAltName returns the extension as it stands, nil if there is none.
func subjectAltName(extensions []pkix.Extension) *pkix.Extension {
	for i := range extensions {
		if extensions[i].Id.Equal(csr.OIDSubjectAltName) {
			return &extensions[i]
		}
	}
	return nil
}

// Extensions that a request may ask for (RFC 5280 §4.2.1.3, §4.2.1.12).
var (
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidExtendedKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 37}
)

// usages returns the usages that a request asks for, as they stand.
func usages(request *x509.CertificateRequest) []pkix.Extension {
	return slices.DeleteFunc(slices.Clone(request.Extensions), func(e pkix.Extension) bool {
		return !e.Id.Equal(oidKeyUsage) && !e.Id.Equal(oidExtendedKeyUsage)
	})
}

// checkUsage refuses what is no key usage, and what is for CAs only: a
// certificate of a device signs no others (RFC 5280 §4.2.1.3).
func checkUsage(request *x509.CertificateRequest) error {
	for _, extension := range usages(request) {
		if extension.Id.Equal(oidExtendedKeyUsage) {
			var purposes []asn1.ObjectIdentifier
			if rest, err := asn1.Unmarshal(extension.Value, &purposes); err != nil || len(rest) > 0 || len(purposes) == 0 {
				return errors.New("the requested extended key usage is malformed")
			}
			continue
		}
		var bits asn1.BitString
		if rest, err := asn1.Unmarshal(extension.Value, &bits); err != nil || len(rest) > 0 {
			return errors.New("the requested key usage is malformed")
		}
		const keyCertSign, crlSign = 5, 6
		if bits.At(keyCertSign) == 1 || bits.At(crlSign) == 1 {
			return errors.New("the requested key usage is a CA's")
		}
	}
	return nil
}

// checkNames obeys RFC 5280 §4.1.2.6: a certificate names its subject in one
// place or the other.
func checkNames(rawSubject []byte, san *pkix.Extension) error {
	if emptySequence := []byte{0x30, 0}; bytes.Equal(rawSubject, emptySequence) && san == nil {
		return errors.New("neither subject nor subjectAltName: the request names nobody")
	}
	return nil
}

// leafTemplate is a client certificate with this subject and SAN, as raw DER.
func leafTemplate(rawSubject []byte, san *pkix.Extension, notBefore, notAfter time.Time) *x509.Certificate {
	template := &x509.Certificate{
		RawSubject: rawSubject,
		NotBefore:  notBefore,
		NotAfter:   notAfter,
		KeyUsage:   x509.KeyUsageDigitalSignature,
	}
	if san != nil {
		template.ExtraExtensions = []pkix.Extension{{Id: csr.OIDSubjectAltName, Critical: san.Critical, Value: san.Value}}
	}
	return template
}
