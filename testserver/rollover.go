package testserver

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
)

// RolloverPhase is how far the change of the EST CA's root has come.
type RolloverPhase string

// The phases of a rollover, in their order.
const (
	// RolloverAnnounced publishes a new root in crts. The old one goes on issuing.
	RolloverAnnounced RolloverPhase = "announced"
	// RolloverSwitched issues under the new root, and shows a certificate of the
	// server under it. Both roots are published, and clients of either accepted.
	RolloverSwitched RolloverPhase = "switched"
	// RolloverFinished forgets the old root: it is not published, and a client
	// with a certificate under it is refused.
	RolloverFinished RolloverPhase = "finished"
)

var rolloverPhases = []RolloverPhase{RolloverAnnounced, RolloverSwitched, RolloverFinished}

// Rollover is a change of the EST CA's root: another key of the same name
// (RFC 4210 §4.4), with an issuing CA and a certificate of the server below it.
type Rollover struct {
	Phase RolloverPhase `json:"phase"`
	// NoLinks publishes no OldWithNew and no NewWithOld: nobody vouches for the new
	// root. When it is finished without, those of earlier rollovers go as well.
	NoLinks bool `json:"no_links,omitempty"`
}

// RolloverCertificates are those of RFC 4210 §4.4: the certificate of the old root,
// that root signed by the new one, the new root signed by the old one, and its own.
type RolloverCertificates struct {
	OldWithOld, OldWithNew, NewWithOld, NewWithNew *x509.Certificate
}

// rollover is one under way.
type rollover struct {
	Rollover
	other        *generation // that does not issue, or not any more
	certificates RolloverCertificates
}

// Rollover brings the change of the root to a phase, from the next handshake and
// request on: a new change, or the one that was begun. A phase that is left out is
// passed over. What crts answers (RFC 7030 §4.1.3) in the end is the new root, the CA
// below it, and each NewWithOld so far, by which a client of an old root finds the way.
func (s *Server) Rollover(to Rollover) (RolloverCertificates, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next, made, err := s.rollOver(to)
	if err != nil {
		return RolloverCertificates{}, fmt.Errorf("rollover: %w", err)
	}
	s.ca.Store(next)
	return made, nil
}

func (s *Server) rollOver(to Rollover) (*authorities, RolloverCertificates, error) {
	next := *s.ca.Load()
	phase := slices.Index(rolloverPhases, to.Phase)
	if phase < 0 {
		return nil, RolloverCertificates{}, fmt.Errorf("%q is none of %q", to.Phase, rolloverPhases)
	}
	now := rollover{Rollover: to}
	switch begun := next.rollover; {
	case begun == nil:
		made, err := s.newGeneration(next.root.cert.NotBefore)
		if err != nil {
			return nil, RolloverCertificates{}, err
		}
		now.other = made
		if now.certificates, err = linked(next.root, made.root); err != nil {
			return nil, RolloverCertificates{}, err
		}
	case phase < slices.Index(rolloverPhases, begun.Phase):
		return nil, RolloverCertificates{}, fmt.Errorf("it is %s already", begun.Phase)
	default:
		now.other, now.certificates = begun.other, begun.certificates
	}
	if phase > 0 && (next.rollover == nil || next.rollover.Phase == RolloverAnnounced) {
		next.generation, now.other = now.other, next.generation
	}
	next.rollover = &now
	if to.Phase == RolloverFinished {
		next.rollover = nil
		next.links = append(slices.Clone(next.links), now.certificates.NewWithOld)
		if to.NoLinks {
			next.links = nil
		}
	}
	return &next, now.certificates, next.setClients()
}

// linked has an old and a new root vouch for each other (RFC 4210 §4.4.1).
func linked(old, made *authority) (RolloverCertificates, error) {
	oldWithNew, err := made.vouch(old)
	if err != nil {
		return RolloverCertificates{}, err
	}
	newWithOld, err := old.vouch(made)
	return RolloverCertificates{OldWithOld: old.cert, OldWithNew: oldWithNew, NewWithOld: newWithOld, NewWithNew: made.cert}, err
}

// vouch signs what another root is.
func (a *authority) vouch(other *authority) (*x509.Certificate, error) {
	template := *other.cert
	template.SerialNumber, template.ExtraExtensions, template.Raw = nil, nil, nil
	// By which OpenSSL tells the keys of one name apart (RFC 5280 §4.2.1.1);
	// crypto/x509 leaves it out where subject and issuer are the same.
	template.AuthorityKeyId = a.cert.SubjectKeyId
	return a.sign(&template, other.key.Public())
}

// known are the CAs whose certificates are accepted, and published, root first.
func (a *authorities) known() []*x509.Certificate {
	known := a.own()
	if a.rollover != nil {
		known = append(known, a.rollover.other.own()...)
	}
	return known
}

// published are the links between roots that crts has.
func (a *authorities) published() []*x509.Certificate {
	if r := a.rollover; r != nil && !r.NoLinks {
		return append(slices.Clone(a.links), r.certificates.OldWithNew, r.certificates.NewWithOld)
	}
	return a.links
}

// issued reports whether a certificate is of a CA that issues, or has issued until
// the rollover is finished.
func (a *authorities) issued(cert *x509.Certificate) bool {
	return a.issuing.issued(cert) || a.rollover != nil && a.rollover.other.issuing.issued(cert)
}

// raw returns the DER of the four; nil for none.
func (c RolloverCertificates) raw() (ders [][]byte) {
	for _, cert := range []*x509.Certificate{c.OldWithOld, c.OldWithNew, c.NewWithOld, c.NewWithNew} {
		if cert != nil {
			ders = append(ders, cert.Raw)
		}
	}
	return ders
}

func parseRollover(ders [][]byte) (c RolloverCertificates, err error) {
	fields := []**x509.Certificate{&c.OldWithOld, &c.OldWithNew, &c.NewWithOld, &c.NewWithNew}
	if len(ders) != len(fields) {
		return c, errors.New("rollover: the answer has not four certificates")
	}
	for i, field := range fields {
		if *field, err = x509.ParseCertificate(ders[i]); err != nil {
			return c, fmt.Errorf("rollover: %w", err)
		}
	}
	return c, nil
}
