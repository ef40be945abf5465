package csr

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
)

// KeyProtection has a server encrypt the private key that it makes (RFC 7030 §4.4.1)
// for a key that the device holds, and that the server knows by an identifier.
type KeyProtection struct {
	// ID identifies the decryption key.
	ID []byte
	// KEK is the size in bytes of the AES key that it is; 0 for an RSA key.
	KEK int
	// OAEP and PKCS1v15 are what an RSA key decrypts.
	OAEP, PKCS1v15 bool
}

// The attributes that name a decryption key, and what it can.
var (
	oidDecryptKeyID           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 37} // RFC 4108 §2.2.5
	oidAsymmetricDecryptKeyID = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 54} // RFC 7030 §4.4.1.2
	oidSMIMECapabilities      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 15}        // RFC 8551 §2.5.2
)

// The capabilities, in the order in which they are written (RFC 3565, RFC 3560, RFC 3370).
var (
	oidOAEP         = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}
	contentCiphers  = []asn1.ObjectIdentifier{{2, 16, 840, 1, 101, 3, 4, 1, 42}, {2, 16, 840, 1, 101, 3, 4, 1, 22}, {2, 16, 840, 1, 101, 3, 4, 1, 2}} // AES-256, -192, -128 in CBC mode
	keyWrapsBySize  = map[int]asn1.ObjectIdentifier{16: {2, 16, 840, 1, 101, 3, 4, 1, 5}, 24: {2, 16, 840, 1, 101, 3, 4, 1, 25}, 32: {2, 16, 840, 1, 101, 3, 4, 1, 45}}
	emptyParameters = asn1.RawValue{FullBytes: []byte{0x30, 0x00}} // OAEP with SHA-1, RFC 3560 §3
)

// smimeCapability of RFC 8551 §2.5.2.
type smimeCapability struct {
	ID         asn1.ObjectIdentifier
	Parameters asn1.RawValue `asn1:"optional"`
}

// attributes are the identifier of the key and, as the client "MUST also include an
// SMIMECapabilities attribute", its algorithms.
func (p *KeyProtection) attributes() ([]Attribute, error) {
	if len(p.ID) == 0 {
		return nil, errors.New("the decryption key has no identifier")
	}
	named := oidAsymmetricDecryptKeyID
	var capabilities []smimeCapability
	for _, oid := range contentCiphers {
		capabilities = append(capabilities, smimeCapability{ID: oid})
	}
	switch wrap, known := keyWrapsBySize[p.KEK]; {
	case known:
		named = oidDecryptKeyID
		capabilities = append(capabilities, smimeCapability{ID: wrap})
	case p.KEK != 0 || !p.OAEP && !p.PKCS1v15:
		return nil, errors.New("the decryption key is neither an AES key nor an RSA key that decrypts")
	}
	if p.OAEP && p.KEK == 0 {
		capabilities = append(capabilities, smimeCapability{oidOAEP, emptyParameters})
	}
	if p.PKCS1v15 && p.KEK == 0 {
		capabilities = append(capabilities, smimeCapability{ID: oidRSAEncryption})
	}
	id, err := asn1.Marshal(p.ID)
	if err != nil {
		return nil, err
	}
	can, err := asn1.Marshal(capabilities)
	return []Attribute{{Type: mustOID(named), Values: [][]byte{id}}, {Type: mustOID(oidSMIMECapabilities), Values: [][]byte{can}}}, err
}

// RequestedProtection returns what a request says of the encryption of the key that a
// server makes for it, nil if nothing.
func RequestedProtection(request *x509.CertificateRequest) (*KeyProtection, error) {
	p, err := requestedProtection(RequestAttributes(request))
	if err != nil {
		return nil, fmt.Errorf("protection of the key: %w", err)
	}
	return p, nil
}

func requestedProtection(attributes Attributes) (*KeyProtection, error) {
	var p KeyProtection
	var named asn1.ObjectIdentifier
	var capabilities []smimeCapability
	for _, attribute := range attributes {
		switch {
		case attribute.is(oidDecryptKeyID), attribute.is(oidAsymmetricDecryptKeyID):
			if named != nil {
				return nil, errors.New("two decryption keys")
			}
			if named = oidDecryptKeyID; !attribute.is(named) {
				named = oidAsymmetricDecryptKeyID
			}
			if err := attribute.single(&p.ID); err != nil {
				return nil, err
			}
		case attribute.is(oidSMIMECapabilities):
			if err := attribute.single(&capabilities); err != nil {
				return nil, err
			}
		}
	}
	if named == nil {
		return nil, nil
	}
	for _, capability := range capabilities {
		p.OAEP = p.OAEP || capability.ID.Equal(oidOAEP)
		p.PKCS1v15 = p.PKCS1v15 || capability.ID.Equal(oidRSAEncryption)
		for size, wrap := range keyWrapsBySize {
			if capability.ID.Equal(wrap) {
				p.KEK = max(p.KEK, size)
			}
		}
	}
	if named.Equal(oidDecryptKeyID) {
		p.OAEP, p.PKCS1v15 = false, false
	} else {
		p.KEK = 0
	}
	if p.KEK == 0 && !p.OAEP && !p.PKCS1v15 {
		return nil, errors.New("no capability (SMIMECapabilities) that goes with the decryption key")
	}
	return &p, nil
}

// single reads the one value of an attribute.
func (a Attribute) single(into any) error {
	if len(a.Values) != 1 {
		return errors.New("an attribute without one value")
	}
	_, err := asn1.Unmarshal(a.Values[0], into)
	return err
}
