package testserver

//lint:file-ignore SA1019 PKCS #1 v1.5 is how keys are transported (RFC 3370 §4.2.1)

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"estenroll/csr"
)

// EnvelopeKey is a key that this server encrypts the keys for that it makes, where a CSR
// names it (RFC 7030 §4.4.1): a secret key or an RSA key.
type EnvelopeKey struct {
	// ID is how a CSR names it.
	ID []byte
	// Secret is an AES key of 16, 24 or 32 bytes; nil for an RSA key.
	Secret []byte
	// Public is an RSA key; nil for a secret key.
	Public *rsa.PublicKey
}

func (k EnvelopeKey) check() error {
	switch {
	case len(k.ID) == 0:
		return errors.New("envelope key: it has no identifier")
	case (k.Secret == nil) == (k.Public == nil):
		return fmt.Errorf("envelope key %x: want a secret key or an RSA key", k.ID)
	case k.Secret != nil && len(k.Secret) != 16 && len(k.Secret) != 24 && len(k.Secret) != 32:
		return fmt.Errorf("envelope key %x: %d bytes, want the 16, 24 or 32 of AES", k.ID, len(k.Secret))
	}
	return nil
}

// sealing is how a request wants its key to be encrypted.
type sealing struct {
	EnvelopeKey
	oaep bool
}

// sealingOf finds the key that a request names; nil if it names none. "If the server
// does not have a secret key matching the identifier specified by the client, the
// request MUST be terminated and an error returned" (RFC 7030 §4.4.1.1, and §4.4.1.2 of
// a public one).
func (s *Server) sealingOf(request *x509.CertificateRequest) (*sealing, error) {
	protection, err := csr.RequestedProtection(request)
	if err != nil {
		return nil, err
	}
	if protection == nil {
		if s.Faults().Envelope == "unasked" && len(s.cfg.EnvelopeKeys) > 0 {
			return &sealing{EnvelopeKey: s.cfg.EnvelopeKeys[0]}, nil
		}
		return nil, nil
	}
	for _, key := range s.cfg.EnvelopeKeys {
		if bytes.Equal(key.ID, protection.ID) && (key.Secret != nil) == (protection.KEK != 0) {
			if key.Secret != nil && len(key.Secret) != protection.KEK {
				return nil, fmt.Errorf("the decryption key %x is of another size here", protection.ID)
			}
			return &sealing{key, protection.OAEP}, nil
		}
	}
	return nil, fmt.Errorf("there is no decryption key %x here", protection.ID)
}

// The faults of an encrypted key.
var envelopeFaults = map[string]string{
	"clear":          "in the clear, whatever the CSR says",
	"unsigned":       "signed by nobody",
	"foreign-signer": "signed under another CA",
	"other-key":      "encrypted for another key than the CSR names",
	"damaged":        "changed after it was encrypted",
	"unasked":        "encrypted for the first key of the server's though the CSR names none",
}

// Object identifiers of an enveloped key.
var (
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidEnvelopedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 3}
	oidKeyPackage    = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 2, 1, 2, 78, 5} // RFC 5958 §2
	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSHA256        = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidECDSASHA256   = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	oidRSAEncryption = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidRSAOAEP       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}
	oidAES256CBC     = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
	oidAESWraps      = map[int]asn1.ObjectIdentifier{16: {2, 16, 840, 1, 101, 3, 4, 1, 5}, 24: {2, 16, 840, 1, 101, 3, 4, 1, 25}, 32: {2, 16, 840, 1, 101, 3, 4, 1, 45}}
)

// envelop packs, signs and encrypts a key (RFC 7030 §4.4.2, RFC 5958 §4).
func (s *Server) envelop(pkcs8 []byte, sealing *sealing, fault string) ([]byte, error) {
	content, err := asn1.Marshal([]asn1.RawValue{{FullBytes: pkcs8}})
	if err != nil {
		return nil, err
	}
	kind := oidKeyPackage
	if fault != "unsigned" {
		if content, err = s.signKey(content, fault); err != nil {
			return nil, err
		}
		kind = oidSignedData
	}
	key := sealing.EnvelopeKey
	if fault == "other-key" {
		if key, err = otherKey(key); err != nil {
			return nil, err
		}
	}
	data, err := encryptKey(kind, content, key, sealing.oaep)
	if err != nil {
		return nil, err
	}
	if fault == "damaged" {
		data[len(data)-40] ^= 1 // in the last blocks
	}
	return asn1.Marshal(contentInfo{oidEnvelopedData, explicitly(0, data)})
}

// contentInfo is RFC 5652 §3, and an EncapsulatedContentInfo.
type contentInfo struct {
	Type    asn1.ObjectIdentifier
	Content asn1.RawValue
}

func explicitly(tag int, content []byte) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: true, Bytes: content}
}

type issuerAndSerial struct {
	Issuer asn1.RawValue
	Serial *big.Int
}

type cmsAttribute struct {
	Type   asn1.ObjectIdentifier
	Values []any `asn1:"set"`
}

// signKey is a SignedData (RFC 5652 §5.1) by the server's own key and certificate.
func (s *Server) signKey(content []byte, fault string) ([]byte, error) {
	ca := s.ca.Load()
	leaf := ca.leaf
	chain := append([]*x509.Certificate{leaf}, ca.chain()...)
	if fault == "foreign-signer" {
		var err error
		if leaf, err = ca.foreign.sign(leafTemplate(leaf.RawSubject, nil, leaf.NotBefore, leaf.NotAfter), s.key.Public()); err != nil {
			return nil, err
		}
		chain = []*x509.Certificate{leaf}
	}
	var certificates []byte
	for _, cert := range chain {
		certificates = append(certificates, cert.Raw...)
	}
	digest := sha256.Sum256(content)
	signed, err := asn1.MarshalWithParams([]cmsAttribute{{oidContentType, []any{oidKeyPackage}}, {oidMessageDigest, []any{digest[:]}}}, "set")
	if err != nil {
		return nil, err
	}
	signature, err := crypto.SignMessage(s.key, rand.Reader, signed, crypto.SHA256)
	if err != nil {
		return nil, err
	}
	var attributes asn1.RawValue
	if _, err := asn1.Unmarshal(signed, &attributes); err != nil {
		return nil, err
	}
	octets, err := asn1.Marshal(content)
	if err != nil {
		return nil, err
	}
	type signerInfo struct {
		Version    int
		Signer     issuerAndSerial
		Digest     pkix.AlgorithmIdentifier
		Attributes asn1.RawValue
		Algorithm  pkix.AlgorithmIdentifier
		Signature  []byte
	}
	return asn1.Marshal(struct {
		Version      int
		Digests      []pkix.AlgorithmIdentifier `asn1:"set"`
		Content      contentInfo
		Certificates asn1.RawValue
		Signers      []signerInfo `asn1:"set"`
	}{
		3, []pkix.AlgorithmIdentifier{{Algorithm: oidSHA256}}, contentInfo{oidKeyPackage, explicitly(0, octets)}, explicitly(0, certificates),
		[]signerInfo{{
			1, issuerAndSerial{asn1.RawValue{FullBytes: leaf.RawIssuer}, leaf.SerialNumber}, pkix.AlgorithmIdentifier{Algorithm: oidSHA256},
			explicitly(0, attributes.Bytes), pkix.AlgorithmIdentifier{Algorithm: oidECDSASHA256}, signature,
		}},
	})
}

// encryptKey is an EnvelopedData (RFC 5652 §6.1) for one recipient, whose name is the
// identifier of the CSR.
func encryptKey(kind asn1.ObjectIdentifier, content []byte, key EnvelopeKey, oaep bool) ([]byte, error) {
	random := make([]byte, 32+aes.BlockSize)
	if _, err := rand.Read(random); err != nil {
		return nil, err
	}
	contentKey, iv := random[:32], random[32:]
	block, err := aes.NewCipher(contentKey)
	if err != nil {
		return nil, err
	}
	n := aes.BlockSize - len(content)%aes.BlockSize
	padded := append(bytes.Clone(content), bytes.Repeat([]byte{byte(n)}, n)...)
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(padded, padded)

	var recipient []byte
	if key.Secret != nil {
		recipient, err = wrapForSecret(contentKey, key)
	} else {
		recipient, err = encryptForRSA(contentKey, key, oaep)
	}
	if err != nil {
		return nil, err
	}
	vector, err := asn1.Marshal(iv)
	if err != nil {
		return nil, err
	}
	type encrypted struct {
		Type    asn1.ObjectIdentifier
		Cipher  pkix.AlgorithmIdentifier
		Content []byte `asn1:"tag:0"`
	}
	return asn1.Marshal(struct {
		Version    int
		Recipients []asn1.RawValue `asn1:"set"`
		Content    encrypted
	}{2, []asn1.RawValue{{FullBytes: recipient}}, encrypted{kind, pkix.AlgorithmIdentifier{Algorithm: oidAES256CBC, Parameters: asn1.RawValue{FullBytes: vector}}, padded}})
}

// wrapForSecret is a KEKRecipientInfo (RFC 5652 §6.2.3).
func wrapForSecret(contentKey []byte, key EnvelopeKey) ([]byte, error) {
	wrapped, err := wrapKey(key.Secret, contentKey)
	if err != nil {
		return nil, err
	}
	type kekIdentifier struct{ ID []byte }
	return asn1.MarshalWithParams(struct {
		Version   int
		KEK       kekIdentifier
		Algorithm pkix.AlgorithmIdentifier
		Key       []byte
	}{4, kekIdentifier{key.ID}, pkix.AlgorithmIdentifier{Algorithm: oidAESWraps[len(key.Secret)]}, wrapped}, "tag:2")
}

// wrapKey wraps a key of whole blocks (RFC 3394 §2.2.1).
func wrapKey(secret, key []byte) ([]byte, error) {
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, err
	}
	out, buffer := append(bytes.Repeat([]byte{0xa6}, 8), key...), make([]byte, aes.BlockSize)
	for j, n := 0, len(key)/8; j < 6; j++ {
		for i := 1; i <= n; i++ {
			copy(buffer, out[:8])
			copy(buffer[8:], out[8*i:8*i+8])
			block.Encrypt(buffer, buffer)
			binary.BigEndian.PutUint64(out, binary.BigEndian.Uint64(buffer)^uint64(n*j+i))
			copy(out[8*i:], buffer[8:])
		}
	}
	return out, nil
}

// encryptForRSA is a KeyTransRecipientInfo (RFC 5652 §6.2.1).
func encryptForRSA(contentKey []byte, key EnvelopeKey, oaep bool) ([]byte, error) {
	algorithm := pkix.AlgorithmIdentifier{Algorithm: oidRSAEncryption, Parameters: asn1.NullRawValue}
	var encrypted []byte
	var err error
	if oaep {
		algorithm = pkix.AlgorithmIdentifier{Algorithm: oidRSAOAEP, Parameters: asn1.RawValue{FullBytes: []byte{0x30, 0}}} // SHA-1
		encrypted, err = rsa.EncryptOAEP(sha1.New(), rand.Reader, key.Public, contentKey, nil)
	} else {
		encrypted, err = rsa.EncryptPKCS1v15(rand.Reader, key.Public, contentKey)
	}
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct {
		Version   int
		ID        []byte `asn1:"tag:0"` // SubjectKeyIdentifier
		Algorithm pkix.AlgorithmIdentifier
		Key       []byte
	}{2, key.ID, algorithm, encrypted})
}

// otherKey is one of the same kind and name.
func otherKey(key EnvelopeKey) (EnvelopeKey, error) {
	if key.Secret != nil {
		key.Secret = bytes.Repeat([]byte{1}, len(key.Secret))
		return key, nil
	}
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err == nil {
		key.Public = &other.PublicKey
	}
	return key, err
}
