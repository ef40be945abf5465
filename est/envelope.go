package est

//lint:file-ignore SA1019 PKCS #1 v1.5 is how servers transport keys (RFC 3370 §4.2.1)

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/subtle"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
)

// ErrKeyNotOpened says that an enveloped key cannot be opened. It is the one answer to
// a wrong key, a wrong padding, a wrong content and a wrong signature: whoever sends
// such things learns nothing from it.
var ErrKeyNotOpened = errors.New("the enveloped key cannot be opened: it is for another decryption key, or damaged")

// DecryptionKey opens keys that a server has encrypted for this device (RFC 7030
// §4.4.1): it is the one or the other of its two kinds.
type DecryptionKey struct {
	// ID is the identifier that the CSR gives the server.
	ID []byte
	// RSA is a key for decryption (§4.4.1.2). It takes *rsa.PKCS1v15DecryptOptions, of
	// whose SessionKeyLen it makes use, and *rsa.OAEPOptions. An error of it that is not
	// rsa.ErrDecryption is a failure of its own, and is reported.
	RSA crypto.Decrypter
	// KEK is a secret key (§4.4.1.1).
	KEK KEK
}

// KEK is an AES key that wraps others, and that nobody gets to see.
type KEK interface {
	// DecryptContent unwraps an AES key (RFC 3394) and decrypts whole blocks with it in
	// CBC mode, whose padding it leaves. rsa.ErrDecryption, as of a crypto.Decrypter, if
	// the wrapped key is not of this KEK.
	DecryptContent(wrappedKey, iv, ciphertext []byte) ([]byte, error)
}

// Object identifiers of what is enveloped, and how.
var (
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}     // RFC 5652 §5.1
	oidEnvelopedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 3}     // RFC 5652 §6.1
	oidRSA           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}     // RFC 3370 §4.2.1
	oidOAEP          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}     // RFC 3560 §3
	oidMGF1          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 8}     // RFC 8017 §B.2.1
	oidEmptyLabel    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 9}     // RFC 8017 §A.2.1
	oidAES128Wrap    = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 5} // RFC 3565 §2.3.2
	oidAES192Wrap    = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 25}
	oidAES256Wrap    = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 45}
)

// contentCiphers are those of RFC 3565 §2.1, with the bytes of their keys.
var contentCiphers = []struct {
	oid  asn1.ObjectIdentifier
	size int
}{
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 2}, 16},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 22}, 24},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}, 32},
}

// maxRecipients of one EnvelopedData: it is for one device.
const maxRecipients = 16

// OpenKey opens a key that a server has encrypted: a ContentInfo of at most 64 KiB with
// an EnvelopedData, in it a SignedData, and in that an asymmetric key package of one key
// (RFC 7030 §4.4.2, RFC 5958 §4). It takes BER, and what servers leave out or turn
// around: no SignedData, or one around the envelope; a key without a package. The
// signature is verified, its signer not yet judged: that is for TrustAnchors. The
// ServerKey has no certificates. ErrKeyNotOpened.
func OpenKey(message []byte, with DecryptionKey) (*ServerKey, error) {
	o := opening{with: with}
	defer o.clear()
	err := o.message(message)
	if err == nil && !o.decrypted {
		err = errors.New("nothing in it is encrypted")
	}
	if err != nil {
		return nil, fmt.Errorf("enveloped key: %w", err)
	}
	key := &ServerKey{PKCS8: bytes.Clone(o.key), Enveloped: true, Signer: o.signer}
	if _, err := key.Public(); errors.Is(err, errNoKey) {
		key.Clear()
		return nil, fmt.Errorf("enveloped key: %w", ErrKeyNotOpened)
	}
	return key, nil
}

// opening is an enveloped key while it is opened.
type opening struct {
	with      DecryptionKey
	decrypted bool
	signer    []*x509.Certificate
	key       []byte   // a part of one of the secrets
	secrets   [][]byte // to be cleared, some of them parts of others
}

func (o *opening) clear() {
	for _, secret := range o.secrets {
		clear(secret)
	}
}

func (o *opening) message(message []byte) error {
	if len(message) > maxAnswer {
		return fmt.Errorf("%d bytes, more than %d", len(message), maxAnswer)
	}
	der, err := toDER(message, maxDepth)
	if err != nil {
		return err
	}
	info, ok := readContentInfo(der)
	if !ok || !info.Type.Equal(oidEnvelopedData) && !info.Type.Equal(oidSignedData) {
		return errors.New("not a CMS message that is enveloped or signed")
	}
	return o.content(info.Type, info.Content.Bytes)
}

type cmsContentInfo struct {
	Type    asn1.ObjectIdentifier
	Content asn1.RawValue `asn1:"explicit,tag:0"`
}

// readContentInfo tells a whole message from a content without its type.
func readContentInfo(der []byte) (info cmsContentInfo, ok bool) {
	rest, err := asn1.Unmarshal(der, &info)
	return info, err == nil && len(rest) == 0
}

// content opens a content of a type. After the decryption its errors are all one.
func (o *opening) content(kind asn1.ObjectIdentifier, der []byte) error {
	switch {
	case kind.Equal(oidSignedData) && o.signer == nil:
		content, signer, err := verifySignedData(der)
		if err != nil {
			return err
		}
		o.signer = signer
		if o.decrypted {
			o.secrets = append(o.secrets, content)
		}
		return o.plain(content)
	case kind.Equal(oidEnvelopedData) && !o.decrypted:
		plain, err := o.decrypt(der)
		if err != nil {
			return err
		}
		o.decrypted = true
		o.secrets = append(o.secrets, plain)
		if o.plain(plain) != nil {
			return ErrKeyNotOpened
		}
		return nil
	}
	return o.plain(der)
}

var errContent = errors.New("neither a signed content nor an enveloped one nor a key")

// plain opens what is in a content, by what it is: the type that goes with it is left
// to data by OpenSSL's "cms -encrypt", whatever it is.
//
//	ContentInfo      ::= SEQUENCE { contentType OBJECT IDENTIFIER, … }
//	SignedData       ::= SEQUENCE { version INTEGER, digestAlgorithms SET, … }
//	EnvelopedData    ::= SEQUENCE { version INTEGER, recipientInfos SET, … }
//	OneAsymmetricKey ::= SEQUENCE { version INTEGER, privateKeyAlgorithm SEQUENCE, … }
//	AsymmetricKeyPackage ::= SEQUENCE SIZE (1..MAX) OF OneAsymmetricKey
func (o *opening) plain(message []byte) error {
	der, err := toDER(message, maxDepth)
	if err != nil {
		return err
	}
	if o.decrypted && &der[0] != &message[0] {
		o.secrets = append(o.secrets, der)
	}
	if info, ok := readContentInfo(der); ok {
		return o.content(info.Type, info.Content.Bytes)
	}
	var outer, first, second asn1.RawValue
	if _, err := asn1.Unmarshal(der, &outer); err != nil || outer.Tag != asn1.TagSequence {
		return errContent
	}
	rest, err := asn1.Unmarshal(outer.Bytes, &first)
	if err != nil {
		return errContent
	}
	if first.Tag == asn1.TagSequence && len(rest) == 0 {
		o.key = first.FullBytes
		return nil
	}
	_, err = asn1.Unmarshal(rest, &second)
	switch {
	case err != nil || first.Tag != asn1.TagInteger:
		return errContent
	case second.Tag == asn1.TagSequence:
		o.key = der
		return nil
	case second.Tag == asn1.TagSet && o.decrypted && o.signer == nil:
		return o.content(oidSignedData, der)
	case second.Tag == asn1.TagSet && !o.decrypted:
		return o.content(oidEnvelopedData, der)
	}
	return errContent
}

// envelopedData is the EnvelopedData of RFC 5652 §6.1.
type envelopedData struct {
	Version    int
	Originator asn1.RawValue   `asn1:"optional,tag:0"`
	Recipients []asn1.RawValue `asn1:"set"`
	Content    struct {
		Type    asn1.ObjectIdentifier
		Cipher  pkix.AlgorithmIdentifier
		Content asn1.RawValue `asn1:"tag:0"`
	}
	Attributes asn1.RawValue `asn1:"optional,tag:1"`
}

// Recipients of RFC 5652 §6.2.1 and §6.2.3.
type (
	keyTransport struct {
		Version      int
		ID           asn1.RawValue // IssuerAndSerialNumber, or [0] SubjectKeyIdentifier
		Algorithm    pkix.AlgorithmIdentifier
		EncryptedKey []byte
	}
	keyEncryption struct {
		Version int
		KEK     struct {
			ID    []byte
			Date  asn1.RawValue `asn1:"optional,generalized"`
			Other asn1.RawValue `asn1:"optional"`
		}
		Algorithm    pkix.AlgorithmIdentifier
		EncryptedKey []byte
	}
)

// decrypt returns the content of an EnvelopedData.
func (o *opening) decrypt(der []byte) (plain []byte, err error) {
	var data envelopedData
	if rest, err := asn1.Unmarshal(der, &data); err != nil || len(rest) > 0 {
		return nil, errors.New("not an EnvelopedData with a content")
	}
	size := 0
	for _, known := range contentCiphers {
		if known.oid.Equal(data.Content.Cipher.Algorithm) {
			size = known.size
		}
	}
	iv, ciphertext := data.Content.Cipher.Parameters, data.Content.Content.Bytes
	if data.Content.Content.IsCompound {
		if ciphertext, err = joined(ciphertext); err != nil {
			return nil, err
		}
	}
	switch {
	case size == 0:
		return nil, fmt.Errorf("content encryption %s is not supported, but AES in CBC mode is", data.Content.Cipher.Algorithm)
	case iv.Tag != asn1.TagOctetString || len(iv.Bytes) != aes.BlockSize:
		return nil, errors.New("its initialization vector is not one of AES")
	case len(ciphertext) == 0 || len(ciphertext)%aes.BlockSize != 0:
		return nil, errors.New("its content is not of whole blocks")
	case len(data.Recipients) > maxRecipients:
		return nil, fmt.Errorf("%d recipients, more than %d", len(data.Recipients), maxRecipients)
	}
	var padded []byte
	if o.with.KEK != nil {
		padded, err = o.decryptWithKEK(data.Recipients, iv.Bytes, ciphertext)
	} else {
		padded, err = o.decryptWithRSA(data.Recipients, size, iv.Bytes, ciphertext)
	}
	if err != nil {
		return nil, err
	}
	plain, ok := unpad(padded)
	if !ok {
		clear(padded)
		return nil, ErrKeyNotOpened
	}
	return plain, nil
}

func (o *opening) decryptWithKEK(recipients []asn1.RawValue, iv, ciphertext []byte) ([]byte, error) {
	var all, ours []keyEncryption
	for _, recipient := range recipients {
		if recipient.Class != asn1.ClassContextSpecific || recipient.Tag != 2 {
			continue
		}
		var r keyEncryption
		if rest, err := asn1.UnmarshalWithParams(recipient.FullBytes, &r, "tag:2"); err != nil || len(rest) > 0 {
			return nil, errors.New("a malformed recipient")
		}
		all = append(all, r)
		if bytes.Equal(r.KEK.ID, o.with.ID) {
			ours = append(ours, r)
		}
	}
	r, err := theOne(all, ours, "a secret key")
	if err != nil {
		return nil, err
	}
	if oid := r.Algorithm.Algorithm; !oid.Equal(oidAES128Wrap) && !oid.Equal(oidAES192Wrap) && !oid.Equal(oidAES256Wrap) {
		return nil, fmt.Errorf("key encryption %s is not supported, but AES key wrap is", oid)
	}
	padded, err := o.with.KEK.DecryptContent(r.EncryptedKey, iv, ciphertext)
	if errors.Is(err, rsa.ErrDecryption) || err == nil && len(padded) != len(ciphertext) {
		return nil, ErrKeyNotOpened
	}
	return padded, err
}

func (o *opening) decryptWithRSA(recipients []asn1.RawValue, size int, iv, ciphertext []byte) ([]byte, error) {
	public, _ := o.with.RSA.Public().(*rsa.PublicKey)
	if public == nil {
		return nil, errors.New("the decryption key is not an RSA key")
	}
	// The usual subject key identifier (RFC 5280 §4.2.1.2, method 1).
	usual := sha1.Sum(x509.MarshalPKCS1PublicKey(public))
	var all, ours []keyTransport
	for _, recipient := range recipients {
		if recipient.Class != asn1.ClassUniversal {
			continue
		}
		var r keyTransport
		if rest, err := asn1.Unmarshal(recipient.FullBytes, &r); err != nil || len(rest) > 0 {
			return nil, errors.New("a malformed recipient")
		}
		all = append(all, r)
		if r.ID.Class == asn1.ClassContextSpecific && (bytes.Equal(r.ID.Bytes, o.with.ID) || bytes.Equal(r.ID.Bytes, usual[:])) {
			ours = append(ours, r)
		}
	}
	r, err := theOne(all, ours, "an RSA key")
	if err != nil {
		return nil, err
	}
	opts, err := decrypterOpts(r.Algorithm, size)
	if err != nil {
		return nil, err
	}
	key, err := o.with.RSA.Decrypt(rand.Reader, r.EncryptedKey, opts)
	defer clear(key)
	switch {
	case errors.Is(err, rsa.ErrDecryption), err == nil && len(key) != size:
		return nil, ErrKeyNotOpened
	case err != nil:
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	padded := make([]byte, len(ciphertext))
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(padded, ciphertext)
	return padded, nil
}

// theOne is the recipient that names the decryption key; or, as servers and keys have
// several names, the only one that is of its kind.
func theOne[R any](all, ours []R, kind string) (R, error) {
	var none R
	switch {
	case len(ours) == 1:
		return ours[0], nil
	case len(ours) == 0 && len(all) == 1:
		return all[0], nil
	case len(all) == 0:
		return none, fmt.Errorf("it is not encrypted for %s, as the decryption key is", kind)
	}
	return none, fmt.Errorf("of its %d recipients %d are named like the decryption key", len(all), len(ours))
}

// oaepHashes of RFC 8017 §A.2.1.
var oaepHashes = []struct {
	oid  asn1.ObjectIdentifier
	hash crypto.Hash
}{
	{asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}, crypto.SHA1},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}, crypto.SHA256},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}, crypto.SHA384},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 3}, crypto.SHA512},
}

// decrypterOpts is how a key of so many bytes is encrypted.
func decrypterOpts(algorithm pkix.AlgorithmIdentifier, size int) (crypto.DecrypterOpts, error) {
	switch {
	case algorithm.Algorithm.Equal(oidRSA):
		// A key of this length comes out whatever the padding is: what a wrong one is
		// worth shows at the content (RFC 3218 §2.3.2).
		return &rsa.PKCS1v15DecryptOptions{SessionKeyLen: size}, nil
	case !algorithm.Algorithm.Equal(oidOAEP):
		return nil, fmt.Errorf("key encryption %s is not supported, but RSA is", algorithm.Algorithm)
	}
	var parameters struct {
		Hash  pkix.AlgorithmIdentifier `asn1:"optional,explicit,tag:0"`
		MGF   pkix.AlgorithmIdentifier `asn1:"optional,explicit,tag:1"`
		Label pkix.AlgorithmIdentifier `asn1:"optional,explicit,tag:2"`
	}
	if rest, err := asn1.Unmarshal(algorithm.Parameters.FullBytes, &parameters); err != nil || len(rest) > 0 {
		return nil, errors.New("malformed parameters of RSAES-OAEP")
	}
	opts := &rsa.OAEPOptions{Hash: oaepHash(parameters.Hash), MGFHash: crypto.SHA1}
	if parameters.MGF.Algorithm != nil {
		var of pkix.AlgorithmIdentifier
		if _, err := asn1.Unmarshal(parameters.MGF.Parameters.FullBytes, &of); err != nil || !parameters.MGF.Algorithm.Equal(oidMGF1) {
			return nil, errors.New("a mask generation of RSAES-OAEP that is not MGF1")
		}
		opts.MGFHash = oaepHash(of)
	}
	label := parameters.Label
	if label.Algorithm != nil && (!label.Algorithm.Equal(oidEmptyLabel) || len(label.Parameters.Bytes) > 0) || opts.Hash == 0 || opts.MGFHash == 0 {
		return nil, errors.New("parameters of RSAES-OAEP that are not supported: a label, or another hash than SHA-1 and SHA-2")
	}
	return opts, nil
}

// oaepHash is SHA-1 where none is named, 0 for an unknown one.
func oaepHash(named pkix.AlgorithmIdentifier) crypto.Hash {
	if named.Algorithm == nil {
		return crypto.SHA1
	}
	for _, known := range oaepHashes {
		if known.oid.Equal(named.Algorithm) {
			return known.hash
		}
	}
	return 0
}

// unpad takes the padding of RFC 5652 §6.3 off, in a time that does not depend on it.
func unpad(padded []byte) ([]byte, bool) {
	if len(padded) == 0 || len(padded)%aes.BlockSize != 0 {
		return nil, false
	}
	n := int(padded[len(padded)-1])
	good := subtle.ConstantTimeLessOrEq(1, n) & subtle.ConstantTimeLessOrEq(n, aes.BlockSize)
	for i := 1; i <= aes.BlockSize; i++ {
		inside := subtle.ConstantTimeLessOrEq(i, n)
		same := subtle.ConstantTimeByteEq(padded[len(padded)-i], byte(n))
		good &= same | (1 - inside)
	}
	if good != 1 {
		return nil, false
	}
	return padded[:len(padded)-n], true
}
