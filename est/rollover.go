package est

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Fingerprint is the SHA-256 digest of a certificate's DER, by which an operator
// vouches for it (RFC 7030 §4.1.1).
type Fingerprint [sha256.Size]byte

// FingerprintOf returns a certificate's fingerprint.
func FingerprintOf(cert *x509.Certificate) Fingerprint { return sha256.Sum256(cert.Raw) }

// ParseFingerprint reads 64 hexadecimal digits, with a colon after every second or
// without any, as OpenSSL and sha256sum print them.
func ParseFingerprint(text string) (f Fingerprint, err error) {
	digits := text
	if strings.Contains(text, ":") {
		pairs := strings.Split(text, ":")
		if slices.ContainsFunc(pairs, func(pair string) bool { return len(pair) != 2 }) {
			return f, errors.New("fingerprint: a colon out of its place")
		}
		digits = strings.Join(pairs, "")
	}
	decoded, err := hex.DecodeString(digits)
	if err != nil || len(decoded) != len(f) {
		return f, errors.New("fingerprint: want the 64 hexadecimal digits of a SHA-256")
	}
	return Fingerprint(decoded), nil
}

// String returns 64 hexadecimal digits.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// Succession is what becomes of trust anchors when their server publishes others.
type Succession struct {
	// Anchors judge from now on.
	Anchors *TrustAnchors
	// Accepted are roots that are anchors from now on, and were not.
	Accepted []*x509.Certificate
	// Kept are anchors that the server does not publish any more and that are
	// needed, and Dropped those that are not needed.
	Kept, Dropped []*x509.Certificate
	// Refused are published roots that nobody vouches for, or that are not valid.
	Refused []*x509.Certificate
}

// Succeed judges the CA certificates of a server (cacerts) by the anchors that are
// held. RFC 7030 §4.1.3 has four kinds of them after the CA has changed its root:
// OldWithOld and NewWithNew, which sign themselves, and the links between the two,
// OldWithNew and NewWithOld (RFC 4210 §4.4).
//
// A published root becomes an anchor if it is one that is held, by its name and its
// key; if its fingerprint is among those given; or if a NewWithOld leads to it, by
// its name and its key, that was signed by one of these, or by way of further
// NewWithOld: a device may have slept through several changes. The new root must be
// valid now, and the link must have begun.
//
// That a held root or a link has expired is not held against them. RFC 4210
// §4.4.1 ends a NewWithOld with the old root at the latest, so that a device which
// slept for longer would never be brought back; a trust anchor is a name and a key,
// without an end (RFC 5280 §6.1.1); and whoever has an old root's key can date a
// link as it suits. What the key signed while it was held stays signed.
//
// An anchor that the server does not publish any more is kept while one of the
// chains that are needed leads to it and to no other. ErrNotVouched if nothing is
// left, ErrNotTrusted if something else than CA certificates is published.
func (t *TrustAnchors) Succeed(published []*x509.Certificate, vouched []Fingerprint, now time.Time, needed ...[]*x509.Certificate) (*Succession, error) {
	offered, err := NewTrustAnchors(published)
	if err != nil {
		return nil, err
	}
	vouchers := t.vouchers(offered, vouched, now)
	s := new(Succession)
	var next []*x509.Certificate
	for _, root := range offered.anchors {
		held := slices.IndexFunc(t.anchors, func(h *x509.Certificate) bool { return sameAuthority(h, root) })
		// What does not sign itself says of itself what it likes, but for what somebody knows whole.
		proven := signedBy(root, root) || slices.Contains(vouched, FingerprintOf(root))
		switch {
		case held >= 0 && (!proven || root.NotAfter.Before(t.anchors[held].NotAfter)):
			// A likeness of it, or one that ends sooner.
			next = append(next, t.anchors[held])
		case held >= 0:
			next = append(next, root)
		case !contains(vouchers, root) || now.Before(root.NotBefore) || now.After(root.NotAfter):
			s.Refused = append(s.Refused, root)
		case proven:
			s.Accepted, next = append(s.Accepted, root), append(next, root)
		} // else a link without its root: it leads to the one that has signed it
	}
	for _, anchor := range t.anchors {
		if contains(next, anchor) {
			continue
		}
		between := slices.Concat(t.intermediates, offered.intermediates)
		if slices.ContainsFunc(needed, func(chain []*x509.Certificate) bool {
			return leads(chain, between, anchor) && !leads(chain, between, next...)
		}) {
			s.Kept = append(s.Kept, anchor)
		} else {
			s.Dropped = append(s.Dropped, anchor)
		}
	}
	if next = append(next, s.Kept...); len(next) == 0 {
		return nil, s.NotVouched()
	}
	s.Anchors, err = NewTrustAnchors(append(next, below(next, offered.intermediates)...))
	return s, err
}

// NotVouched is an ErrNotVouched that names the refused roots; nil if there are none.
func (s *Succession) NotVouched() error {
	if len(s.Refused) == 0 {
		return nil
	}
	return fmt.Errorf("cacerts has %s: %w", subjects(s.Refused), ErrNotVouched)
}

// vouchers are those who can vouch: the held anchors, the roots whose fingerprints
// are given, and the links to a root that these have signed, one after the other.
func (t *TrustAnchors) vouchers(offered *TrustAnchors, vouched []Fingerprint, now time.Time) []*x509.Certificate {
	vouchers := slices.Clone(t.anchors)
	for _, root := range offered.anchors {
		if slices.Contains(vouched, FingerprintOf(root)) {
			vouchers = append(vouchers, root)
		}
	}
	links := slices.DeleteFunc(slices.Clone(offered.intermediates), func(cert *x509.Certificate) bool { return !isLink(cert, offered.anchors) || now.Before(cert.NotBefore) })
	for i := 0; i < len(vouchers); i++ { // it grows by what it vouches for
		links = slices.DeleteFunc(links, func(link *x509.Certificate) bool {
			signed := signedBy(link, vouchers[i])
			if signed {
				vouchers = append(vouchers, link)
			}
			return signed
		})
	}
	return vouchers
}

var oidNameConstraints = asn1.ObjectIdentifier{2, 5, 29, 30}

// isLink tells a NewWithOld from a CA certificate of another kind, whose subject
// must not vouch for roots: it carries the name and the key of a published root, or
// bears the name of its issuer, which only a CA's other key does (RFC 5280 §3.2),
// that of a root which is not published any more. One that vouches for less than a
// root is, makes nothing a root.
func isLink(cert *x509.Certificate, roots []*x509.Certificate) bool {
	if !allows(cert, x509.ExtKeyUsageServerAuth) || !allows(cert, x509.ExtKeyUsageClientAuth) {
		return false
	}
	if len(cert.UnhandledCriticalExtensions) > 0 || slices.ContainsFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidNameConstraints) }) {
		return false
	}
	limit := pathLength(cert)
	for _, root := range roots {
		if sameAuthority(cert, root) {
			return limit < 0 || pathLength(root) >= 0 && pathLength(root) <= limit
		}
	}
	return bytes.Equal(cert.RawSubject, cert.RawIssuer) && limit < 0
}

// pathLength returns the certificate's path length constraint, -1 for none.
func pathLength(cert *x509.Certificate) int {
	if cert.MaxPathLen == 0 && !cert.MaxPathLenZero {
		return -1
	}
	return cert.MaxPathLen
}

// sameAuthority reports whether two certificates are of one CA: of its name and of
// its key.
func sameAuthority(a, b *x509.Certificate) bool {
	return bytes.Equal(a.RawSubject, b.RawSubject) && bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo)
}

func contains(certs []*x509.Certificate, ca *x509.Certificate) bool {
	return slices.ContainsFunc(certs, func(other *x509.Certificate) bool { return sameAuthority(ca, other) })
}

// leads reports whether signatures lead from the leaf of a chain to an anchor, at
// whatever time.
func leads(chain, between []*x509.Certificate, anchors ...*x509.Certificate) bool {
	if len(chain) == 0 {
		return false
	}
	reached, rest := chain[:1:1], slices.Concat(chain[1:], between)
	for i := 0; i < len(reached); i++ {
		if slices.ContainsFunc(anchors, func(anchor *x509.Certificate) bool { return signedBy(reached[i], anchor) }) {
			return true
		}
		rest = slices.DeleteFunc(rest, func(ca *x509.Certificate) bool {
			signed := signedBy(reached[i], ca)
			if signed {
				reached = append(reached, ca)
			}
			return signed
		})
	}
	return false
}

// below returns those of the certificates that lead to one of the anchors: others
// would be taken for anchors where none of these signs itself.
func below(anchors, certs []*x509.Certificate) []*x509.Certificate {
	return slices.DeleteFunc(slices.Clone(certs), func(cert *x509.Certificate) bool {
		return !leads([]*x509.Certificate{cert}, certs, anchors...)
	})
}

// subjects names certificates, with their fingerprints.
func subjects(certs []*x509.Certificate) string {
	var texts []string
	for _, cert := range certs {
		texts = append(texts, fmt.Sprintf("%q (SHA-256 %s)", cert.Subject, FingerprintOf(cert)))
	}
	return strings.Join(texts, ", ")
}
