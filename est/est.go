// Package est is Enrolment over Secure Transport without the transport: the
// operations, the wire constants, the payloads, the trust anchors and the
// judgement of an answer (RFC 7030, RFC 9148). It opens no socket: a transport
// in est/coaps or est/https offers a [Session].
package est

import (
	"context"
	"crypto"
	"crypto/x509"
)

// Operation is an EST function by its RFC 7030 §3.2.2 name.
type Operation string

// The operations of this release.
const (
	CACerts        Operation = "cacerts"        // RFC 7030 §4.1
	SimpleEnroll   Operation = "simpleenroll"   // RFC 7030 §4.2.1
	SimpleReenroll Operation = "simplereenroll" // RFC 7030 §4.2.2
	CSRAttrs       Operation = "csrattrs"       // RFC 7030 §4.5
	ServerKeyGen   Operation = "serverkeygen"   // RFC 7030 §4.4
	// ServerKeyGenCert is ServerKeyGen with the certificate as it is, in no PKCS#7:
	// over CoAP alone (RFC 9148 §4.8).
	ServerKeyGenCert Operation = "serverkeygen-cert"
)

// DefaultRoot is the path every server supports (RFC 9148 §4.1).
const DefaultRoot = "/.well-known/est"

// ShortPath returns the operation's resource name over CoAP (RFC 9148 §4.1).
func (o Operation) ShortPath() string {
	switch o {
	case CACerts:
		return "crts"
	case SimpleEnroll:
		return "sen"
	case SimpleReenroll:
		return "sren"
	case CSRAttrs:
		return "att"
	case ServerKeyGen:
		return "skg"
	case ServerKeyGenCert:
		return "skc"
	}
	return ""
}

// Asks reports the operations that ask for something and have no body: GET.
func (o Operation) Asks() bool { return o == CACerts || o == CSRAttrs }

// ResourceType returns the operation's resource type, by which it is discovered
// (RFC 9148 §4.1, §8.2).
func (o Operation) ResourceType() string { return "ace.est." + o.ShortPath() }

// ContentFormat is a CoAP Content-Format number; HTTPS media types are mapped to it.
type ContentFormat uint16

// Content-Formats of EST and of its discovery (RFC 9148 §8.1, RFC 8710, RFC 7252 §12.3).
const (
	ContentFormatLinkFormat     ContentFormat = 40
	ContentFormatMultipartCore  ContentFormat = 62
	ContentFormatPKCS7ServerKey ContentFormat = 280
	ContentFormatPKCS7CertsOnly ContentFormat = 281
	ContentFormatPKCS8          ContentFormat = 284
	ContentFormatCSRAttrs       ContentFormat = 285
	ContentFormatPKCS10         ContentFormat = 286
	ContentFormatPKIXCert       ContentFormat = 287
)

// Request is one EST request. Body is DER, empty for an operation that asks.
type Request struct {
	Operation Operation
	Body      []byte
}

// Response is a successful answer. Body is DER in the format that arrived; none at
// all means "no attributes" in an answer of csrattrs (RFC 7030 §4.5.2).
type Response struct {
	ContentFormat ContentFormat
	Body          []byte
	// Parts of an answer that a transport has taken apart itself (multipart/mixed);
	// those of multipart-core are in Body.
	Parts []Part
}

// Session is one open, authenticated connection to an EST server.
type Session interface {
	// RoundTrip exchanges a request for a successful response. An answer that is
	// not a success MUST be a *StatusError, "come back later" a *PendingError, no
	// answer an error for which errors.Is(err, ErrUnreachable) holds, an operation that
	// the transport does not have one that wraps errors.ErrUnsupported. It MUST NOT
	// send the request again on its own, other than as the transport's own
	// retransmission of one message, or when the answer says that nothing was done with it.
	RoundTrip(ctx context.Context, req *Request) (*Response, error)
	// PeerChain returns the chain the server sent in this session, leaf first; none where
	// it has shown a pre-shared key in its place.
	PeerChain() []*x509.Certificate
	// ChannelBinding returns what proof of possession binds a CSR to: tls-unique
	// (RFC 7030 §3.5), or the exporter of RFC 9266 under TLS 1.3. An error wraps
	// errors.ErrUnsupported where the transport has none. A session that can outlive a
	// connection sends no body on another one after that, but says ErrUnlinked.
	ChannelBinding() ([]byte, error)
	// Close ends the session.
	Close() error
}

// ClientAuthenticator is implemented by sessions that know whether the server
// asked for a certificate and ours was sent in a full handshake: without it, an
// answer proves nothing about our certificate.
type ClientAuthenticator interface {
	ClientAuthenticated() bool
}

// KeyAccepter is implemented by sessions that know which kinds of client
// certificates the server takes: one for a key that it does not take would be
// issued in vain.
type KeyAccepter interface {
	AcceptsKey(public crypto.PublicKey) bool
}

// Distributor is implemented by sessions that may have operations at servers of
// another host or port, which the one that was asked has named (RFC 9148 §4.1).
type Distributor interface {
	// For returns the session that carries an operation: nil for this one, or one with
	// another server, opened now if it was not and closed with this one. That server MUST be
	// held to the host that it was named with and to the anchors, each time: those of a
	// session change with cacerts. Errors as of opening a session.
	For(ctx context.Context, operation Operation, trust *TrustAnchors) (Session, error)
}
