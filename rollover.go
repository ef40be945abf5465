package estenroll

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"estenroll/est"
)

// newestTA is the file of the credential's Explicit TA, "" if there is none: it is
// the credential's, whichever of its pairs a session is opened with, since it is
// the server that has changed.
func (c *Credential) newestTA() string {
	name := ""
	if op := c.journal.Operation; op != nil {
		name = op.ExplicitTA
	}
	for _, kept := range c.journal.Pairs {
		name = cmp.Or(name, kept.ExplicitTA)
	}
	return name
}

// held returns the Explicit TA; nil where there is none, or none that can be read.
func (c *Credential) held() (*est.TrustAnchors, error) {
	name := c.newestTA()
	if name == c.explicitName || c.caughtUp {
		return c.explicitTA, nil
	}
	var anchors *est.TrustAnchors
	var err error
	if name != "" {
		anchors, err = c.loadExplicitTA(name)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrState) {
		c.warnOnce("%v: the server is judged by the configured trust anchors until the next renewal", err)
	} else if err != nil {
		return nil, err
	}
	c.explicitTA, c.explicitName = anchors, name
	return anchors, nil
}

// judges are the anchors that judge the server of a session as a pair: new
// sessions use the Explicit TA (RFC 9148 §3, RFC 7030 §4.1.3), and one as the IDevID
// the Implicit TA as well, by which the operator may lead the device elsewhere.
func (c *Credential) judges(as *pair) (*est.TrustAnchors, error) {
	explicit, err := c.held()
	switch {
	case err != nil:
		return nil, err
	case explicit == nil:
		return c.cfg.ImplicitTA, nil
	case c.isIDevID(as.certificate):
		return c.cfg.ImplicitTA.Join(explicit), nil
	}
	return explicit, nil
}

// open is dial for an operation, which keeps the trust anchors that were brought up
// to date: the next run begins with them.
func (c *Credential) open(ctx context.Context, as *pair) (est.Session, error) {
	session, err := c.dial(ctx, as)
	if err != nil {
		return nil, err
	}
	op := c.journal.Operation
	if chain := session.PeerChain(); op.Step == StepProve && len(op.ServerCertificate) == 0 && len(chain) > 0 {
		op.ServerCertificate = chain[0].Raw // it has shown none when it issued: a pre-shared key stood for it
	}
	if !c.caughtUp {
		return session, nil
	}
	if op.ExplicitTA, err = c.saveExplicitTA(c.explicitTA); err == nil {
		if len(op.ServerCertificate) > 0 { // of the answer that is being proven
			op.ServerCertificate = session.PeerChain()[0].Raw
		}
		err = c.save()
	}
	if err != nil {
		return nil, errors.Join(err, session.Close())
	}
	c.explicitName, c.caughtUp = op.ExplicitTA, false
	return session, nil
}

// dial opens a session as a pair. Where no anchor leads to the server's certificate,
// the CA may have changed while the device slept: its trust anchors are brought
// up to date first. A device that has none begins with that.
func (c *Credential) dial(ctx context.Context, as *pair) (est.Session, error) {
	trust, err := c.judges(as)
	if err != nil {
		return nil, err
	}
	if c.byPSK(as) {
		return c.connect(ctx, as, trust, false)
	}
	cause := fmt.Errorf("open session with %s: %w: %w: %w", c.cfg.ServerURI, est.ErrServerCertificate, est.ErrNoAnchor, est.ErrNotTrusted)
	if len(trust.Anchors()) > 0 {
		var session est.Session
		session, cause = c.connect(ctx, as, trust, false)
		if !errors.Is(cause, est.ErrServerCertificate) || !errors.Is(cause, est.ErrNoAnchor) {
			return session, cause
		}
	}
	if trust, err = c.catchUp(ctx, as, trust, cause); err != nil {
		return nil, err
	}
	return c.connect(ctx, as, trust, false)
}

// catchUp asks a server that cannot be judged for its CA certificates, and for
// nothing else: the session is provisional (RFC 7030 §4.1.1). What it answers is
// judged by the anchors that are held, and the server by what these vouch for; only
// then are they the Explicit TA, and only on a new session is anything more sent.
// Nothing that the server says before it is judged decides of the request: it could
// be anybody.
func (c *Credential) catchUp(ctx context.Context, as *pair, held *est.TrustAnchors, cause error) (*est.TrustAnchors, error) {
	unjudged := func(err error) error {
		if ctx.Err() != nil || isEngineError(err) || errors.Is(err, est.ErrUnreachable) {
			return err
		}
		return fmt.Errorf("%w; ask it for its roots: %v", cause, err) // not %w: a stranger's refusal is none
	}
	now, err := c.verificationTime()
	if err != nil {
		return nil, err
	}
	session, err := c.connect(ctx, as, held, true)
	if err != nil {
		return nil, unjudged(err)
	}
	defer c.closeSession(session)
	client := est.Client{Session: session}
	published, err := client.CACerts(ctx)
	if err != nil {
		return nil, unjudged(err)
	}
	next, err := held.Succeed(published, c.cfg.AnchorFingerprints, now, session.PeerChain(), as.chain)
	if err == nil {
		if err = next.Anchors.VerifyServer(session.PeerChain(), c.cfg.ServerName, now); err != nil {
			err = cmp.Or(next.NotVouched(), err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w; judge it by its own roots: %w", cause, err)
	}
	c.tell(next, now)
	c.explicitTA, c.caughtUp = next.Anchors, true
	return next.Anchors, nil
}

// publishedAnchors asks for cacerts and judges the answer by the Explicit TA, and the
// live session's server by what comes of it (RFC 9148 §3), as each other server is when
// something is asked of it. At first contact, where the Implicit TA has judged the
// server, the whole answer is the Explicit TA.
func (c *Credential) publishedAnchors(ctx context.Context, session est.Session, auth *pair, now time.Time) (*est.TrustAnchors, error) {
	trust, err := c.judges(auth)
	if err != nil {
		return nil, err
	}
	carrier, err := carrying(ctx, session, est.CACerts, trust)
	if err != nil {
		return nil, err
	}
	client := est.Client{Session: carrier}
	published, err := client.CACerts(ctx)
	if err != nil {
		return nil, err
	}
	anchors, err := c.succession(published, session.PeerChain(), auth, now)
	if err != nil {
		return nil, err
	}
	if c.byPSK(auth) {
		return anchors, nil // it has shown no certificate: the key that it has has judged it
	}
	if err := anchors.VerifyServer(session.PeerChain(), c.cfg.ServerName, now); err != nil {
		return nil, fmt.Errorf("judge the server by its own cacerts: %w", err)
	}
	return anchors, nil
}

func (c *Credential) succession(published, server []*x509.Certificate, auth *pair, now time.Time) (*est.TrustAnchors, error) {
	explicit, err := c.held()
	if err != nil {
		return nil, err
	}
	if explicit == nil || c.byPSK(auth) || c.isIDevID(auth.certificate) && c.cfg.ImplicitTA.VerifyServer(server, c.cfg.ServerName, now) == nil {
		return est.NewTrustAnchors(published)
	}
	next, err := explicit.Succeed(published, c.cfg.AnchorFingerprints, now, server, auth.chain)
	if err != nil {
		return nil, err
	}
	c.tell(next, now)
	return next.Anchors, nil
}

// tell says what becomes of trust anchors.
func (c *Credential) tell(next *est.Succession, now time.Time) {
	name := func(cert *x509.Certificate) string {
		return fmt.Sprintf("%q (SHA-256 %s)", cert.Subject, est.FingerprintOf(cert))
	}
	for _, root := range next.Accepted {
		c.say(StepRequest, "the new root %s is vouched for: it is trusted", name(root))
	}
	for _, root := range next.Dropped {
		c.say(StepRequest, "the old root %s is needed no more: it is not trusted any longer", name(root))
	}
	for _, root := range next.Refused {
		if now.Before(root.NotBefore) || now.After(root.NotAfter) {
			c.warnOnce("the server publishes the root %s, which is not valid now: it is not trusted", name(root))
			continue
		}
		c.warnOnce("the server publishes the root %s, for which neither an anchor of this device nor the operator vouches: it is not trusted", name(root))
	}
}
