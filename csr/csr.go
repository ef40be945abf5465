// Package csr builds certification requests (PKCS#10, RFC 2986) that are signed
// by a crypto.Signer, the key of an HSM as a rule, and verified before they
// leave, and reads what a server wants to find in them (CSR attributes, RFC 7030
// §4.5 and RFC 9908). It never sees a private key, and it copies the names of a certificate
// as DER where they must be the same (RFC 7030 §4.2.2).
package csr

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"slices"
)

// OIDSubjectAltName is the extension of the SANs (RFC 5280 §4.2.1.6).
var OIDSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// Template is what a CSR asks for. The public key is the signer's.
type Template struct {
	// RawSubject is the DER of the Subject, from ParseSubject or a certificate.
	// Default: the empty name.
	RawSubject []byte
	// SANs to ask for. Default: none.
	SANs []SAN
	// RawSAN is a whole extension, copied from a certificate; not beside SANs.
	RawSAN *pkix.Extension
	// KeyUsage and ExtKeyUsage to ask for, from ParseKeyUsage and
	// ParseExtKeyUsage. Default: none, the CA decides.
	KeyUsage    x509.KeyUsage
	ExtKeyUsage []asn1.ObjectIdentifier
	// PSS has an RSA key sign with RSASSA-PSS (RFC 4055 §3) instead of PKCS #1
	// v1.5. The key in the request is an RSA key all the same (rsaEncryption), whose
	// certificate may be used with either.
	PSS bool
	// Hash of the signature, SHA-256, SHA-384 or SHA-512. Default: as strong as the
	// key's curve, SHA-256 for an RSA key.
	Hash crypto.Hash
	// Others are extensions to ask for as they are, none of those above. Default: none.
	Others []pkix.Extension
	// Attributes of the request beside extensionRequest and challengePassword, with
	// their values. Default: none.
	Attributes Attributes
	// ChallengePassword links the request to the session that it is sent in (RFC 7030
	// §3.5). Default: none.
	ChallengePassword string
	// Protection has a server encrypt the key that it makes for this request (§4.4.1).
	// Default: it is sent in the clear.
	Protection *KeyProtection
}

// ForReenrollment returns the template with the Subject and SAN of a
// certificate as DER: "The request Subject field and SubjectAltName extension
// MUST be identical to the corresponding fields in the certificate being
// renewed/rekeyed" (RFC 7030 §4.2.2), and servers compare bytes.
func ForReenrollment(cert *x509.Certificate) Template {
	return Template{RawSubject: cert.RawSubject, RawSAN: extension(cert.Extensions, OIDSubjectAltName)}
}

// SANExtension returns the extension that the CSR will carry, the zero one if none.
func (t Template) SANExtension() (pkix.Extension, error) {
	switch {
	case t.RawSAN != nil && len(t.SANs) > 0:
		return pkix.Extension{}, errors.New("csr: SANs and a copied SAN: want one of them")
	case t.RawSAN != nil:
		return *t.RawSAN, nil
	case len(t.SANs) == 0:
		return pkix.Extension{}, nil
	}
	value, err := marshalSANs(t.SANs)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("csr: %w", err)
	}
	// With an empty subject the SAN MUST be critical (RFC 5280 §4.2.1.6).
	return pkix.Extension{Id: OIDSubjectAltName, Critical: bytes.Equal(t.subject(), emptyName), Value: value}, nil
}

// Extensions returns what the CSR will ask for beside the Subject
// (extensionRequest, RFC 2985 §5.4.2): SAN, key usage, extended key usage and others.
func (t Template) Extensions() ([]pkix.Extension, error) {
	var extensions []pkix.Extension
	san, err := t.SANExtension()
	if err != nil {
		return nil, err
	}
	if san.Id != nil {
		extensions = append(extensions, san)
	}
	if t.KeyUsage != 0 {
		usage, err := keyUsageExtension(t.KeyUsage)
		if err != nil {
			return nil, fmt.Errorf("csr: %w", err)
		}
		extensions = append(extensions, usage)
	}
	if len(t.ExtKeyUsage) > 0 {
		purposes, err := extKeyUsageExtension(t.ExtKeyUsage)
		if err != nil {
			return nil, fmt.Errorf("csr: %w", err)
		}
		extensions = append(extensions, purposes)
	}
	return append(extensions, t.Others...), nil
}

var emptyName = []byte{0x30, 0x00}

func (t Template) subject() []byte {
	if len(t.RawSubject) == 0 {
		return emptyName
	}
	return t.RawSubject
}

// signatureAlgorithm is how a request is signed.
type signatureAlgorithm struct {
	name       x509.SignatureAlgorithm
	oid        asn1.ObjectIdentifier
	parameters asn1.RawValue
	family     string
	hash       crypto.Hash
}

// signatureAlgorithms are those of RFC 5758 §3.2 and RFC 4055 §5.
var signatureAlgorithms = []signatureAlgorithm{
	{x509.ECDSAWithSHA256, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}, asn1.RawValue{}, familyEC, crypto.SHA256},
	{x509.ECDSAWithSHA384, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}, asn1.RawValue{}, familyEC, crypto.SHA384},
	{x509.ECDSAWithSHA512, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 4}, asn1.RawValue{}, familyEC, crypto.SHA512},
	{x509.SHA256WithRSA, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, asn1.NullRawValue, familyRSA, crypto.SHA256},
	{x509.SHA384WithRSA, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 12}, asn1.NullRawValue, familyRSA, crypto.SHA384},
	{x509.SHA512WithRSA, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 13}, asn1.NullRawValue, familyRSA, crypto.SHA512},
}

// pssAlgorithms are RSASSA-PSS with a hash, MGF1 of it and a salt of its length
// (RFC 4055 §3.1).
var pssAlgorithms = []signatureAlgorithm{
	{x509.SHA256WithRSAPSS, oidRSASSAPSS, pssParametersOf(crypto.SHA256), familyRSA, crypto.SHA256},
	{x509.SHA384WithRSAPSS, oidRSASSAPSS, pssParametersOf(crypto.SHA384), familyRSA, crypto.SHA384},
	{x509.SHA512WithRSAPSS, oidRSASSAPSS, pssParametersOf(crypto.SHA512), familyRSA, crypto.SHA512},
}

var (
	oidRSASSAPSS = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 10} // RFC 4055 §3.1
	oidMGF1      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 8}  // RFC 4055 §2.2
)

// hashOIDs are those of RFC 4055 §2.1.
var hashOIDs = map[crypto.Hash]asn1.ObjectIdentifier{
	crypto.SHA256: {2, 16, 840, 1, 101, 3, 4, 2, 1},
	crypto.SHA384: {2, 16, 840, 1, 101, 3, 4, 2, 2},
	crypto.SHA512: {2, 16, 840, 1, 101, 3, 4, 2, 3},
}

// pssParameters is RSASSA-PSS-params without its trailer field, whose default is all
// that there is (RFC 4055 §3.1).
type pssParameters struct {
	Hash pkix.AlgorithmIdentifier `asn1:"optional,explicit,tag:0"`
	MGF  pkix.AlgorithmIdentifier `asn1:"optional,explicit,tag:1"`
	Salt int                      `asn1:"optional,explicit,tag:2"`
}

func pssParametersOf(hash crypto.Hash) asn1.RawValue {
	of := pkix.AlgorithmIdentifier{Algorithm: hashOIDs[hash], Parameters: asn1.NullRawValue}
	der, err := asn1.Marshal(of)
	if err == nil {
		der, err = asn1.Marshal(pssParameters{of, pkix.AlgorithmIdentifier{Algorithm: oidMGF1, Parameters: asn1.RawValue{FullBytes: der}}, hash.Size()})
	}
	if err != nil {
		panic(err) // OIDs of a table
	}
	return asn1.RawValue{FullBytes: der}
}

// signature is how a key signs the request: with the hash that is wanted, else the
// one that is as strong as its curve, else SHA-256.
func (t Template) signature(public crypto.PublicKey) (signatureAlgorithm, error) {
	family, hash, algorithms := "", crypto.SHA256, signatureAlgorithms
	switch key := public.(type) {
	case *rsa.PublicKey:
		if family = familyRSA; t.PSS {
			algorithms = pssAlgorithms
		}
	case *ecdsa.PublicKey:
		switch family = familyEC; key.Curve.Params().BitSize {
		case 384:
			hash = crypto.SHA384
		case 521:
			hash = crypto.SHA512
		}
	}
	if t.Hash != 0 {
		hash = t.Hash
	}
	for _, algorithm := range algorithms {
		if algorithm.family == family && algorithm.hash == hash {
			return algorithm, nil
		}
	}
	return signatureAlgorithm{}, fmt.Errorf("a %T with %s: %w", public, hash, ErrSignature)
}

// Build returns the DER of a CSR that asks for what the template says, signed by
// the signer: with the hash of the template, or the one that is as strong as its
// curve (SHA-256, SHA-384 or SHA-512), or SHA-256 for an RSA key. The signature is
// verified before it leaves, since a token can fail. A nil random source is
// crypto/rand.
func Build(random io.Reader, template Template, signer crypto.Signer) ([]byte, error) {
	if random == nil {
		random = rand.Reader
	}
	algorithm, err := template.signature(signer.Public())
	if err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	info, err := template.requestInfo(signer.Public())
	if err != nil {
		return nil, err
	}
	var opts crypto.SignerOpts = algorithm.hash
	if algorithm.oid.Equal(oidRSASSAPSS) {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: algorithm.hash}
	}
	signature, err := crypto.SignMessage(signer, random, info, opts)
	if err != nil {
		return nil, fmt.Errorf("csr: sign: %w", err)
	}
	der, err := asn1.Marshal(struct {
		Info      asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{
		asn1.RawValue{FullBytes: info}, pkix.AlgorithmIdentifier{Algorithm: algorithm.oid, Parameters: algorithm.parameters},
		asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)},
	})
	if err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	parsed, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("csr: read back: %w", err)
	}
	if err := parsed.CheckSignature(); err != nil {
		return nil, fmt.Errorf("csr: the signature that the key made does not verify: %w", err)
	}
	return der, nil
}

// requestInfo is the CertificationRequestInfo (RFC 2986 §4.1).
//
// crypto/x509 of Go 1.26 makes no request with a challengePassword: the type of its
// attributes is a SEQUENCE.
func (t Template) requestInfo(public crypto.PublicKey) ([]byte, error) {
	key, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	extensions, err := t.Extensions()
	if err != nil {
		return nil, err
	}
	var attributes [][]byte
	if len(extensions) > 0 {
		request, err := WantExtensions(extensions)
		if err == nil {
			attributes, err = appendAttribute(attributes, request)
		}
		if err != nil {
			return nil, fmt.Errorf("csr: %w", err)
		}
	}
	own, err := t.ownAttributes()
	if err != nil {
		return nil, err
	}
	for _, attribute := range own {
		if attribute.is(oidExtensionRequest) || attribute.is(oidChallengePassword) || len(attribute.Values) == 0 {
			return nil, fmt.Errorf("csr: attribute %s: without a value, or one that has a place of its own", attribute.Type)
		}
		if attributes, err = appendAttribute(attributes, attribute); err != nil {
			return nil, fmt.Errorf("csr: %w", err)
		}
	}
	if t.ChallengePassword != "" {
		password, err := asn1.MarshalWithParams(t.ChallengePassword, "printable")
		challenge := WantChallengePassword()
		challenge.Values = [][]byte{password}
		if err == nil {
			attributes, err = appendAttribute(attributes, challenge)
		}
		if err != nil {
			return nil, fmt.Errorf("csr: challengePassword: %w", err)
		}
	}
	slices.SortFunc(attributes, bytes.Compare) // X.690 §11.6: a SET OF is in the order of its encodings
	version := []byte{asn1.TagInteger, 1, 0}
	set := wrapAs(asn1.ClassContextSpecific, 0, true, slices.Concat(attributes...))
	return wrap(asn1.TagSequence, slices.Concat(version, t.subject(), key, set)), nil
}

// ownAttributes are those beside extensionRequest and challengePassword.
func (t Template) ownAttributes() (Attributes, error) {
	if t.Protection == nil {
		return t.Attributes, nil
	}
	protection, err := t.Protection.attributes()
	if err != nil {
		return nil, fmt.Errorf("csr: protection of the key: %w", err)
	}
	return slices.Concat(t.Attributes, protection), nil
}

func appendAttribute(attributes [][]byte, attribute Attribute) ([][]byte, error) {
	der, err := attribute.marshal()
	return append(attributes, der), err
}

// ChallengePassword returns the challengePassword of a request (RFC 2985 §5.4.1),
// "" if it has none or one that is no text.
func ChallengePassword(request *x509.CertificateRequest) string {
	for _, attribute := range RequestAttributes(request) {
		if attribute.is(oidChallengePassword) && len(attribute.Values) == 1 {
			var password string
			if _, err := asn1.Unmarshal(attribute.Values[0], &password); err == nil {
				return password
			}
		}
	}
	return ""
}

// RequestAttributes returns the attributes of a request, extensionRequest too; nil
// where they do not parse.
func RequestAttributes(request *x509.CertificateRequest) Attributes {
	var info struct {
		Version            int
		Subject, PublicKey asn1.RawValue
		Attributes         asn1.RawValue `asn1:"tag:0"`
	}
	if _, err := asn1.Unmarshal(request.RawTBSCertificateRequest, &info); err != nil {
		return nil
	}
	attributes, err := readAttributes(info.Attributes.Bytes)
	if err != nil {
		return nil
	}
	return attributes
}
