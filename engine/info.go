package engine

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
)

// An info is a credential by reference: it says where a credential is, in an
// engine, in a file or in a buffer of ours, with at most one source.
// Infos are values; the zero info has no source.
type info struct {
	address Address
	file    string
	// A pointer to a string, which fmt never follows inside a value that it prints
	// (one to a slice it does, for a wrong verb): even as an unexported field of
	// somebody's struct a pre-shared key is not shown.
	buffer *string
}

// IsZero reports whether the info has no source.
func (i info) IsZero() bool { return i.address == nil && i.file == "" && i.buffer == nil }

// Engine returns the engine address, if that is the source.
func (i info) Engine() (Address, bool) { return i.address, i.address != nil }

// File returns the path, if that is the source.
func (i info) File() (string, bool) { return i.file, i.file != "" }

// Buffer returns a copy of the bytes, if they are the source.
func (i info) Buffer() ([]byte, bool) {
	if i.buffer == nil {
		return nil, false
	}
	return []byte(*i.buffer), true
}

// String names the source and never shows a buffer.
func (i info) String() string {
	switch {
	case i.address != nil:
		return i.address.String()
	case i.file != "":
		return "file " + i.file
	case i.buffer != nil:
		return fmt.Sprintf("buffer of %d bytes", len(*i.buffer))
	}
	return "none"
}

// Format writes String for every verb: %d would show the buffer.
func (i info) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, i.String()) }

// Infos of each kind (LwM2M Core 1.2 §E.1, resources 3, 4 and 5). They differ in
// type so that one cannot stand where another is meant.
type (
	// CertificateChainInfo says where a certificate chain is: leaf first, DER in
	// a buffer, PEM or DER in a file, one certificate and its stored chain in an engine.
	CertificateChainInfo struct{ info }
	// PrivateKeyInfo says where a private key is. There is no buffer for it here:
	// a key exists in an engine or, for development, in a file.
	PrivateKeyInfo struct{ info }
	// PSKKeyInfo says where a pre-shared key is.
	PSKKeyInfo struct{ info }
	// PSKIdentityInfo says where a pre-shared key's identity is.
	PSKIdentityInfo struct{ info }
)

// CertificateChainFromEngine refers to a certificate in an engine.
func CertificateChainFromEngine(at Address) CertificateChainInfo {
	return CertificateChainInfo{info{address: at}}
}

// CertificateChainFromFile refers to a file.
func CertificateChainFromFile(path string) CertificateChainInfo {
	return CertificateChainInfo{info{file: path}}
}

// CertificateChainFromBuffer holds a copy of DER certificates, leaf first.
func CertificateChainFromBuffer(der []byte) CertificateChainInfo {
	return CertificateChainInfo{info{buffer: clone(der)}}
}

// Certificates parses the buffer.
func (i CertificateChainInfo) Certificates() ([]*x509.Certificate, error) {
	if i.buffer == nil {
		return nil, errors.New("certificate chain info: not a buffer")
	}
	certs, err := x509.ParseCertificates([]byte(*i.buffer))
	if err != nil {
		return nil, fmt.Errorf("certificate chain info: %w", err)
	}
	return certs, nil
}

// PrivateKeyFromEngine refers to a private key in an engine.
func PrivateKeyFromEngine(at Address) PrivateKeyInfo { return PrivateKeyInfo{info{address: at}} }

// PrivateKeyFromFile refers to a file.
func PrivateKeyFromFile(path string) PrivateKeyInfo { return PrivateKeyInfo{info{file: path}} }

// PSKKeyFromEngine refers to a pre-shared key in an engine.
func PSKKeyFromEngine(at Address) PSKKeyInfo { return PSKKeyInfo{info{address: at}} }

// PSKKeyFromFile refers to a file.
func PSKKeyFromFile(path string) PSKKeyInfo { return PSKKeyInfo{info{file: path}} }

// PSKKeyFromBuffer holds a copy of a pre-shared key.
func PSKKeyFromBuffer(key []byte) PSKKeyInfo { return PSKKeyInfo{info{buffer: clone(key)}} }

// PSKIdentityFromEngine refers to an identity in an engine.
func PSKIdentityFromEngine(at Address) PSKIdentityInfo { return PSKIdentityInfo{info{address: at}} }

// PSKIdentityFromFile refers to a file.
func PSKIdentityFromFile(path string) PSKIdentityInfo { return PSKIdentityInfo{info{file: path}} }

// PSKIdentityFromBuffer holds a copy of an identity.
func PSKIdentityFromBuffer(identity []byte) PSKIdentityInfo {
	return PSKIdentityInfo{info{buffer: clone(identity)}}
}

func clone(b []byte) *string {
	s := string(b)
	return &s
}
