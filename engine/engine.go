// Package engine is the contract between est-enroll and the hardware security
// module (HSM) that holds its keys: addresses, infos, secrets, errors and the
// interfaces a driver offers. It never sees a private key, and it refuses to
// guess: an address that matches two objects is an error.
//
// Drivers live in engine/<name> and are handed over explicitly in a [Drivers]
// table; each of them passes the suite in engine/enginetest.
package engine

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"sort"
	"strings"
	"time"
)

// An Address names a token, or one object in it, by the driver's own query
// string ("pkcs11:token=dev;object=key;type=private", RFC 7512). It is a
// comparable value, made by a driver's parser, once, at the edge.
//
// String MUST return the canonical form that parses back to the same address,
// and MUST NOT contain a PIN.
type Address interface {
	fmt.Stringer
	// Scheme is the key of the driver in the Drivers table.
	Scheme() string
}

// Algorithm is a kind of key pair: its family and the name of its curve or the
// bits of its modulus.
type Algorithm string

// The algorithms that an engine may be asked to generate.
const (
	ECP256  Algorithm = "EC P-256" // secp256r1, mandatory in RFC 9148 §3
	ECP384  Algorithm = "EC P-384" // secp384r1
	ECP521  Algorithm = "EC P-521" // secp521r1
	RSA2048 Algorithm = "RSA 2048"
	RSA3072 Algorithm = "RSA 3072"
	RSA4096 Algorithm = "RSA 4096"
)

// Algorithms returns them, the default first.
func Algorithms() []Algorithm {
	return []Algorithm{ECP256, ECP384, ECP521, RSA2048, RSA3072, RSA4096}
}

// AlgorithmOf names the algorithm of a public key, which may be one that no
// engine generates; it is empty for a key that is neither EC nor RSA.
func AlgorithmOf(public crypto.PublicKey) Algorithm {
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		return Algorithm("EC " + key.Curve.Params().Name)
	case *rsa.PublicKey:
		return Algorithm(fmt.Sprintf("RSA %d", key.N.BitLen()))
	}
	return ""
}

// NewSoftwareKey makes a key in memory: for a driver whose keys are in files, and where
// the key guards nothing. An empty algorithm is ECP256. ErrUnsupported.
func NewSoftwareKey(algorithm Algorithm) (crypto.Signer, error) {
	switch algorithm {
	case "", ECP256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ECP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case ECP521:
		return ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case RSA3072:
		return rsa.GenerateKey(rand.Reader, 3072)
	case RSA4096:
		return rsa.GenerateKey(rand.Reader, 4096)
	}
	return nil, fmt.Errorf("%s: %w", algorithm, ErrUnsupported)
}

// KeySpec says what key pair to generate.
type KeySpec struct {
	// Algorithm of the pair. Default: ECP256.
	Algorithm Algorithm
}

// Engine is what every driver offers for one open token. Its methods are safe
// for concurrent use. A call into an HSM cannot be interrupted: the context is
// checked before and after each one, and while a lock is waited for.
//
// Every error is, or wraps, an *Error. After Close all methods return ErrClosed.
type Engine interface {
	// NewKeyAddress returns the address for a key pair that does not exist yet,
	// with the label given and a fresh random identifier (CKA_ID). It writes
	// nothing: the caller records the address before it generates the key.
	NewKeyAddress(label string) (Address, error)

	// GenerateKey generates a pair at the address, which MUST come from
	// NewKeyAddress. The private key is private, sensitive, not extractable and
	// for signing only; this is read back, and a pair that is not what was asked
	// for is destroyed and reported. ErrExists if the identifier is taken,
	// ErrUnsupported for an algorithm that the token does not have.
	// It is never repeated by the driver after a device error.
	GenerateKey(ctx context.Context, at Address, spec KeySpec) (crypto.PublicKey, error)

	// Signer opens the private key at the address, whoever made it. It stays valid
	// until Close, and its Sign is safe for concurrent use: ECDSA for an EC key, and
	// for an RSA key PKCS #1 v1.5, or PSS where the options are *rsa.PSSOptions.
	// Each signature is verified before it leaves. ErrNotFound, *AmbiguousError,
	// and ErrUnsupported for a key or a kind of signature that the token or the
	// driver does not have.
	Signer(ctx context.Context, at Address) (crypto.Signer, error)

	// RemoveKey destroys both halves of the pair at the address, and nothing
	// else. ErrNotFound if neither half exists.
	RemoveKey(ctx context.Context, at Address) error

	// Close ends the session with the token. It is idempotent.
	Close() error
}

// KeyRecoverer is implemented by engines that can judge what a crash left.
type KeyRecoverer interface {
	// RecoverKey keeps the pair at the address only if both halves are there and
	// a test signature verifies, and returns its public key; otherwise
	// everything with its identifier is destroyed and the error is ErrNotFound.
	RecoverKey(ctx context.Context, at Address) (crypto.PublicKey, error)
}

// KeyImporter is implemented by engines that can take in a private key which a
// server has made (RFC 7030 §4.4).
type KeyImporter interface {
	// CanImportKey finds out whether the token takes in a key of a kind, and leaves
	// nothing in it: a key that was asked for in vain is one more that is somewhere.
	// ErrUnsupported if it does not.
	CanImportKey(ctx context.Context, spec KeySpec) error

	// ImportKey stores the pair of a private key (PKCS#8, DER) at an address, which MUST
	// come from NewKeyAddress. The private key is then what a generated one is, which is
	// read back and a test signature shows; one that is not is destroyed and reported. The
	// DER stays the caller's, to be cleared; nothing of it is kept. ErrExists if the
	// identifier is taken, ErrUnsupported.
	ImportKey(ctx context.Context, at Address, pkcs8 []byte) (crypto.PublicKey, error)
}

// Decrypter is implemented by engines that hold keys for decryption, which open what a
// server has encrypted for this device (RFC 7030 §4.4.1).
type Decrypter interface {
	// DecryptionKey opens the key at an address, whoever made it: an RSA key that is for
	// decryption and does not sign, for what decrypts a message of anybody's must not
	// make a signature of the device's too; or an AES key that unwraps. That it can is
	// found out by a test. ErrNotFound, *AmbiguousError, and ErrUnsupported for any other
	// key, or where the token cannot.
	DecryptionKey(ctx context.Context, at Address) (*DecryptionKey, error)
}

// DecryptionKey is of one of two kinds: RSA or KEK. It stays valid until Close and is
// safe for concurrent use.
type DecryptionKey struct {
	// ID identifies the key in its token: the name that a server knows it by.
	ID []byte
	// RSA decrypts PKCS #1 v1.5 or OAEP, or both, as crypto/rsa does with
	// *rsa.PKCS1v15DecryptOptions and *rsa.OAEPOptions: with a SessionKeyLen a wrong
	// padding is no error, else rsa.ErrDecryption.
	RSA            crypto.Decrypter
	PKCS1v15, OAEP bool
	// KEK is an AES key.
	KEK KEK
}

// KEK is an AES key that wraps others, and never leaves its token.
type KEK interface {
	// Size of the key in bytes.
	Size() int
	// DecryptContent unwraps an AES key (RFC 3394) into the token, for this alone, and
	// decrypts whole blocks with it there, in CBC mode, whose padding it leaves.
	// rsa.ErrDecryption, as of a crypto.Decrypter, if the wrapped key is not of this KEK.
	DecryptContent(wrappedKey, iv, ciphertext []byte) ([]byte, error)
}

// KeyInspector is implemented by engines that can report what the token says
// of a private key.
type KeyInspector interface {
	KeyAttributes(ctx context.Context, at Address) (KeyAttributes, error)
}

// KeyAttributes is a private key's policy as the token reports it
// (PKCS #11 v2.40 §4.9). An attribute that the token does not report is nil.
type KeyAttributes struct {
	Private          *bool `json:"private,omitempty"`
	Sensitive        *bool `json:"sensitive,omitempty"`
	Extractable      *bool `json:"extractable,omitempty"`
	AlwaysSensitive  *bool `json:"always_sensitive,omitempty"`
	NeverExtractable *bool `json:"never_extractable,omitempty"`
	Local            *bool `json:"local,omitempty"` // generated on the token
	Sign             *bool `json:"sign,omitempty"`
	Decrypt          *bool `json:"decrypt,omitempty"`
	Unwrap           *bool `json:"unwrap,omitempty"`
	Derive           *bool `json:"derive,omitempty"`
}

// CertificateStore is implemented by engines that hold certificates.
type CertificateStore interface {
	// CertificateAddresses returns where StoreCertificates will put the chain
	// (leaf first) of the key at the address. The leaf's address carries the
	// key's identifier and the key's label plus a short fingerprint; a chain
	// certificate's never carries the key's identifier, and is that of the same
	// certificate where the token holds it already. It writes nothing, and the
	// same input gives the same answer after a crash. A key of NewKeyAddress need not
	// be there yet.
	CertificateAddresses(ctx context.Context, key Address, chain []*x509.Certificate) ([]Address, error)

	// StoreCertificates creates the certificates that the token does not hold
	// yet at these addresses (of CertificateAddresses) and reads each back. It
	// may be repeated; a half-written object at an address is replaced.
	StoreCertificates(ctx context.Context, at []Address, chain []*x509.Certificate) error

	// Certificate finds one certificate. ErrNotFound, *AmbiguousError.
	Certificate(ctx context.Context, at Address) (*x509.Certificate, error)

	// RemoveCertificates destroys the leaf at[0], then each chain certificate
	// of at[1:] that this program stored and that no certificate left in the
	// token was issued under. What is gone already is not an error.
	RemoveCertificates(ctx context.Context, at []Address) error
}

// AnchorStore is implemented by engines that hold trust anchors: CA certificates of
// no key in the token, at addresses that somebody has chosen.
type AnchorStore interface {
	CertificateStore

	// AnchorAddress makes a chosen address whole, as StoreCertificates and
	// RemoveCertificates take it: it has a label, and where it has no identifier the
	// certificate's fingerprint is it. It says whether the certificate is there
	// already, and writes nothing. ErrExists if another certificate is, or if the
	// identifier is that of a key, which a CA's certificate never carries.
	AnchorAddress(ctx context.Context, at Address, anchor *x509.Certificate) (whole Address, there bool, err error)
}

// TokenInspector is implemented by engines that can tell what they have opened.
type TokenInspector interface {
	TokenStatus() TokenStatus
}

// TokenStatus is what an open token is, and how it was opened.
type TokenStatus struct {
	// Address tells the token from others, by more than it was opened by.
	Address Address
	Module  string // the driver's library, where it has one
	// ReadOnly says that nothing can be written to it.
	ReadOnly bool
	// LoginRequired says that it wants a PIN, and PINSource where that came from:
	// zero for one that a person typed.
	LoginRequired bool
	PINSource     PINSource
}

// Class is the class of an object in a token (PKCS #11 v2.40 §2.3).
type Class string

// The classes a Lister reports.
const (
	ClassPrivateKey  Class = "private"
	ClassPublicKey   Class = "public"
	ClassCertificate Class = "cert"
	ClassSecretKey   Class = "secret-key"
	ClassData        Class = "data"
)

// ClassToken stands for a whole token among the matches of an AmbiguousError,
// whose ID is the token's serial number. No object has it.
const ClassToken Class = "token"

// Object is one object of a token's listing.
type Object struct {
	Class Class
	Label string
	ID    []byte
	// Address is nil where there is neither label nor id, or one that no address
	// can hold.
	Address Address
	// Err says why the object's attributes could not be read: half-written
	// objects exist after a crash. Class, Label and ID are then what was readable.
	Err error
}

// Lister is implemented by engines that can list their objects.
type Lister interface {
	// List returns the objects that match the address, all for the zero filter
	// nil, in a stable order.
	List(ctx context.Context, filter Address) ([]Object, error)
}

// Options is what an engine needs beside its address.
type Options struct {
	// LockDir holds the writer locks of tokens, shared by all users of a token.
	// Default: /run/lock/est-enroll, created with mode 1777.
	LockDir string
	// LockTimeout bounds the wait for a writer lock that another process holds, in
	// Open and in every writing operation; their contexts may end it earlier.
	// Default: 30s.
	LockTimeout time.Duration
	// Command names this program to others that wait for the lock: "est-enroll renew".
	// All users of the machine may read it: no arguments. Default: the program's name.
	Command string
	// PINCopy is the path of a file that holds the PIN where the address names none,
	// if it exists: one that is written anew for each run, so that neither inode nor
	// ctime tell whether the PIN has changed. Its source is PINCopyName and the size.
	// Default: none.
	PINCopy     string
	PINCopyName string
	// AskPIN asks a person for the PIN where the address names none and there is no
	// PINCopy: at most once, before any lock is taken, and only where a login needs
	// one that the token lets be tried. Its source has no name: what is typed is no
	// more there in the next run. Default: nobody is asked.
	AskPIN func(ctx context.Context, token Address) (Secret, error)
	// AddressSource says where the engine's address was read: the source of a
	// PIN that stands in the address itself.
	AddressSource PINSource
	// RefusedPIN is the source of the PIN that the token refused in an earlier
	// run: while the source has not changed, the PIN is not tried again and
	// Open fails with a *PINError. The zero value refuses nothing.
	RefusedPIN PINSource
}

// Driver makes engines of one kind.
type Driver struct {
	// Parse parses an address strictly. Its errors never contain a PIN.
	Parse func(address string) (Address, error)
	// Open opens the token the address names and logs in to it, once. A PIN
	// that the token refuses is a *PINError.
	Open func(ctx context.Context, token Address, opts Options) (Engine, error)
}

// Drivers is the table of drivers that a program hands over, by scheme.
type Drivers map[string]Driver

// Parse parses an address with the driver of its scheme, which is matched
// without regard to case (RFC 3986 §3.1). The address is not repeated in an
// error, for it may hold a PIN.
func (d Drivers) Parse(address string) (Address, error) {
	scheme, _, found := strings.Cut(address, ":")
	driver, known := d[strings.ToLower(scheme)]
	if !found || !known {
		return nil, fmt.Errorf("engine address: no driver for its scheme: known are %s", strings.Join(d.schemes(), ", "))
	}
	return driver.Parse(address)
}

// Open opens the token that an address of Parse names.
func (d Drivers) Open(ctx context.Context, token Address, opts Options) (Engine, error) {
	driver, known := d[token.Scheme()]
	if !known {
		return nil, fmt.Errorf("open engine: no driver for scheme %q: known are %s", token.Scheme(), strings.Join(d.schemes(), ", "))
	}
	return driver.Open(ctx, token, opts)
}

func (d Drivers) schemes() []string {
	names := make([]string, 0, len(d))
	for name := range d {
		names = append(names, name+":")
	}
	sort.Strings(names)
	return names
}
