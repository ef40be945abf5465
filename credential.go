package estenroll

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"

	"estenroll/engine"
	"estenroll/lwm2m"
)

// pair is a credential in use: an opened key and its chain. Without an IDevID that of
// a first boot has neither.
type pair struct {
	name        string // for messages: "IDevID", "new", "current", "" without an IDevID
	key         engine.Address
	certificate engine.Address // of the leaf
	signer      crypto.Signer
	chain       []*x509.Certificate // leaf first
}

func (p *pair) connection() Connection {
	raw := make([][]byte, len(p.chain))
	for i, cert := range p.chain {
		raw[i] = cert.Raw
	}
	return Connection{Certificate: raw, Key: p.signer}
}

// leaf is the certificate itself, nil where there is none.
func (p *pair) leaf() *x509.Certificate {
	if len(p.chain) == 0 {
		return nil
	}
	return p.chain[0]
}

// public is the key, nil where there is none.
func (p *pair) public() crypto.PublicKey {
	if p.signer == nil {
		return nil
	}
	return p.signer.Public()
}

// String is what a server answers.
func (p *pair) String() string {
	if len(p.chain) == 0 {
		return "a client without a certificate"
	}
	return "the " + p.name + " certificate"
}

// publicKey is what every public key of the standard library offers.
type publicKey interface{ Equal(crypto.PublicKey) bool }

func samePublicKey(a, b crypto.PublicKey) bool {
	key, ok := a.(publicKey)
	return ok && key.Equal(b)
}

// signer opens a key, once a run: finding one costs more calls than a signature.
// It finds the key itself again when the token was lost and is back.
func (s *shared) signer(ctx context.Context, at engine.Address) (crypto.Signer, error) {
	if opened, known := s.signers[at]; known {
		return opened, nil
	}
	opened, err := s.engine.Signer(ctx, at)
	if err != nil {
		return nil, err
	}
	s.signers[at] = opened
	return opened, nil
}

// openIDevID opens the factory credential and checks that it is a pair, once a run.
func (c *Credential) openIDevID(ctx context.Context) (*pair, error) {
	if c.idevid != nil {
		return c.idevid, nil
	}
	at := c.cfg.IDevID
	if c.withoutIDevID() {
		return new(pair), nil
	}
	signer, err := c.signer(ctx, at.Key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrIDevID)
	}
	cert, err := c.certificate(ctx, at.Certificate)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrIDevID)
	}
	if !samePublicKey(cert.PublicKey, signer.Public()) {
		return nil, fmt.Errorf("the certificate at %s is not that of the key at %s: %w", at.Certificate, at.Key, ErrIDevID)
	}
	c.idevid = &pair{name: "IDevID", key: at.Key, certificate: at.Certificate, signer: signer, chain: append([]*x509.Certificate{cert}, at.Chain...)}
	return c.idevid, nil
}

// withoutIDevID reports a device whose first credential is a password or a pre-shared key.
func (c *Credential) withoutIDevID() bool { return c.cfg.IDevID.Certificate == nil }

// bootstrap names what authenticates an enrolment.
func (c *Credential) bootstrap() string {
	switch {
	case c.cfg.PSK:
		return "the pre-shared key"
	case c.withoutIDevID():
		return "the password"
	}
	return "the IDevID"
}

func (c *Credential) isIDevID(cert engine.Address) bool {
	return cert == c.cfg.IDevID.Certificate || c.formerIDevID != nil && cert == c.formerIDevID
}

// recognizeIDevID finds out whether the Security object has the factory certificate
// by an address that the configuration has changed since, or has no more: it would be
// taken for an enrolled one of a journal that was lost, never replaced, and retired in
// the end.
func (c *Credential) recognizeIDevID(ctx context.Context) error {
	instance, _ := c.instance()
	at, ok := instance.ClientCertificate.Engine()
	if !ok || c.forgotten || c.isIDevID(at) || c.isOurs(at) {
		return nil
	}
	key, _ := instance.PrivateKey.Engine()
	referred, err := c.foreignCertificate(ctx, at)
	if err == nil {
		var factory bool
		if factory, err = c.isFactory(ctx, referred, at, key); factory {
			c.formerIDevID = at
		}
	}
	var ambiguous *engine.AmbiguousError
	if errors.Is(err, engine.ErrNotFound) || errors.As(err, &ambiguous) {
		return nil // which its use says
	}
	return err
}

// isFactory compares a certificate with the factory's. Where the configuration has none,
// it is one that is not where this program would have put it.
func (c *Credential) isFactory(ctx context.Context, cert *x509.Certificate, at, key engine.Address) (bool, error) {
	if !c.withoutIDevID() {
		factory, err := c.foreignCertificate(ctx, c.cfg.IDevID.Certificate)
		return err == nil && factory.Equal(cert), err
	}
	if key == nil { // which is not in the engine
		return false, nil
	}
	places, err := c.store.CertificateAddresses(ctx, key, []*x509.Certificate{cert})
	return err == nil && places[0] != at, err
}

// openCredential opens an enrolled credential, or gives the one again that was
// opened last in this run.
func (c *Credential) openCredential(ctx context.Context, kept credential) (*pair, error) {
	if c.opened != nil && kept.sameLeaf(c.opened.certificate) {
		return c.opened, nil
	}
	signer, err := c.signer(ctx, kept.Key.Address)
	if err != nil {
		return nil, err
	}
	p := &pair{name: "current", key: kept.Key.Address, certificate: kept.Certificates[0].Address, signer: signer}
	for _, at := range kept.Certificates {
		cert, err := c.store.Certificate(ctx, at.Address)
		if err != nil {
			return nil, err
		}
		p.chain = append(p.chain, cert)
	}
	if !samePublicKey(p.chain[0].PublicKey, signer.Public()) {
		return nil, fmt.Errorf("the certificate at %s is not that of the key at %s: %w", kept.Certificates[0], kept.Key, ErrState)
	}
	c.opened = p
	return p, nil
}

// current returns the enrolled credential that the Security object points at,
// or false where it points at the IDevID or at nothing.
func (c *Credential) current() (credential, bool) {
	instance, ok := c.instance()
	if !ok {
		return credential{}, false
	}
	cert, ok := instance.ClientCertificate.Engine()
	if !ok || c.isIDevID(cert) {
		return credential{}, false
	}
	for _, kept := range c.journal.Pairs {
		if kept.sameLeaf(cert) {
			return kept, true
		}
	}
	key, ok := instance.PrivateKey.Engine()
	if !ok {
		return credential{}, false
	}
	// The journal was lost: what the Security object says is enough to go on. Whether
	// the key was generated for it is not known any more, so it stays.
	return credential{Key: reference{Address: key}, Certificates: []reference{{Address: cert}}, ExistingKey: true}, true
}

// instance returns the credential's instance of the Security object: the
// configured one, or, where there is no configuration, one that points at it.
func (c *Credential) instance() (lwm2m.Security, bool) {
	if !c.forgotten {
		return c.security.Instance(c.cfg.Security.Instance)
	}
	for _, instance := range c.security.All() {
		if at, ok := instance.ClientCertificate.Engine(); ok && c.journal.names(at) {
			return instance, true
		}
	}
	return lwm2m.Security{}, false
}

// checkUse refuses the use of a credential that the configuration has no more,
// or whose Security instance points at another one's pair: it would be taken
// from that one.
func (c *Credential) checkUse() error {
	if c.forgotten {
		return fmt.Errorf("credential %q: %w", c.Name(), ErrNotConfigured)
	}
	instance, _ := c.instance()
	at, ok := instance.ClientCertificate.Engine()
	if !ok || c.journal.names(at) {
		return nil
	}
	for name, r := range c.shared.journal.Credentials {
		if r.names(at) {
			return fmt.Errorf("security instance /0/%d is that of credential %q: %w", c.cfg.Security.Instance, name, ErrConfig)
		}
	}
	return nil
}

// pointSecurityAt makes the Security object refer to a pair: the commit point.
func (c *Credential) pointSecurityAt(key, cert engine.Address, serverCertificate []byte) error {
	return c.saveSecurity(c.securityWith(c.security, key, cert, serverCertificate))
}

func (d *shared) saveSecurity(next *lwm2m.SecurityObject) error {
	if err := next.Save(filepath.Join(d.cfg.StateDir, securityName)); err != nil {
		return fmt.Errorf("write Security object: %w", err)
	}
	d.security = next
	return nil
}

// checkSecurity judges the Security object as the commit will make it, before
// anything is created or asked that a wrong setting would waste.
func (c *Credential) checkSecurity() error {
	at := c.cfg.IDevID
	if c.withoutIDevID() {
		at = IDevID{Key: nowhere{}, Certificate: nowhere{}} // a pair that is yet to be made
	}
	if err := c.securityWith(c.security, at.Key, at.Certificate, nil).Validate(); err != nil {
		return fmt.Errorf("check Security object: %w", err)
	}
	return nil
}

// nowhere is the address of what there is not.
type nowhere struct{}

func (nowhere) String() string { return "nowhere" }
func (nowhere) Scheme() string { return "nowhere" }

// securityWith returns a Security object with our instance pointing at a pair. One
// that the configuration had before points at a pair that will be retired: it goes.
func (c *Credential) securityWith(object *lwm2m.SecurityObject, key, cert engine.Address, serverCertificate []byte) *lwm2m.SecurityObject {
	next := new(lwm2m.SecurityObject)
	for id, instance := range object.All() {
		if at, ok := instance.ClientCertificate.Engine(); ok && id != c.cfg.Security.Instance && c.journal.names(at) {
			continue
		}
		next.Set(id, instance)
	}
	instance, _ := object.Instance(c.cfg.Security.Instance)
	instance.ServerURI = c.cfg.Security.ServerURI
	instance.ShortServerID = c.cfg.Security.ShortServerID
	instance.Mode = lwm2m.ModeEST
	instance.ClientCertificate = engine.CertificateChainFromEngine(cert)
	instance.PrivateKey = engine.PrivateKeyFromEngine(key)
	set := func(certificate []byte, matching lwm2m.MatchingType, usage *lwm2m.CertificateUsage) {
		instance.ServerPublicKey, instance.MatchingType, instance.CertificateUsage = certificate, matching, usage
	}
	// A server that has not been met yet: what it is judged by stands for it.
	usage, implicit := lwm2m.TrustAnchorAssertion, c.cfg.ImplicitTA.Certificates()
	switch {
	case len(c.cfg.Security.ServerCertificate) > 0:
		set(c.cfg.Security.ServerCertificate, lwm2m.MatchExact, nil)
	case len(serverCertificate) > 0:
		set(serverCertificate, lwm2m.MatchExact, nil)
	case len(instance.ServerPublicKey) > 0:
	case len(implicit) > 0:
		set(implicit[0].Raw, lwm2m.MatchExact, &usage)
	case len(c.cfg.AnchorFingerprints) > 0:
		set(c.cfg.AnchorFingerprints[0][:], lwm2m.MatchSHA256, &usage)
	case c.cfg.PSK: // the server shows its certificate when the new one is proven: until then nobody's stands for it
		set(make([]byte, sha256.Size), lwm2m.MatchSHA256, &usage)
	}
	next.Set(c.cfg.Security.Instance, instance)
	return next
}

// prepare makes sure that the Security object points at a usable credential
// before anything is created: at first boot the IDevID.
func (c *Credential) prepare(ctx context.Context) (*pair, error) {
	idevid, err := c.openIDevID(ctx)
	if err != nil {
		return nil, err
	}
	if _, exists := c.security.Instance(c.cfg.Security.Instance); exists || c.withoutIDevID() {
		return idevid, nil
	}
	return idevid, c.pointSecurityAt(c.cfg.IDevID.Key, c.cfg.IDevID.Certificate, nil)
}

// restoreSecurity makes up for a Security object that was lost while the journal
// was not: it points at the newest credential that is whole, else at the IDevID.
func (c *Credential) restoreSecurity(ctx context.Context) error {
	restored, err := c.restored(ctx)
	if restored == nil || err != nil {
		return err
	}
	instance, _ := restored.Instance(c.cfg.Security.Instance)
	if at, _ := instance.ClientCertificate.Engine(); !c.isIDevID(at) {
		c.warn("the Security object has no instance /0/%d: it points at %s again", c.cfg.Security.Instance, at)
	}
	return c.saveSecurity(restored)
}

// restored returns what restoreSecurity makes of the Security object, nil where
// nothing is lost.
func (c *Credential) restored(ctx context.Context) (*lwm2m.SecurityObject, error) {
	if _, exists := c.security.Instance(c.cfg.Security.Instance); exists || len(c.journal.Pairs) == 0 && c.journal.Operation == nil {
		return nil, nil
	}
	for _, kept := range c.journal.Pairs {
		_, err := c.openCredential(ctx, kept)
		if errors.Is(err, engine.ErrNotFound) || errors.Is(err, ErrState) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return c.securityWith(c.security, kept.Key.Address, kept.Certificates[0].Address, nil), nil
	}
	if _, err := c.openIDevID(ctx); err != nil || c.withoutIDevID() {
		return nil, err
	}
	return c.securityWith(c.security, c.cfg.IDevID.Key, c.cfg.IDevID.Certificate, nil), nil
}
