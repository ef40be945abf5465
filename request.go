package estenroll

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
)

// authenticator is the pair that authenticates the request.
func (c *Credential) authenticator(ctx context.Context) (*pair, error) {
	if c.journal.Operation.Kind == KindEnroll {
		return c.openIDevID(ctx)
	}
	kept, enrolled := c.current()
	if !enrolled {
		return nil, ErrNotEnrolled
	}
	return c.openCredential(ctx, kept)
}

// request asks for certificates until the server has decided, or this run does not wait
// so long. A result ends the operation.
func (c *Credential) request(ctx context.Context) (*Result, error) {
	until := c.cfg.Now().Add(c.cfg.Wait)
	for {
		result, err := c.ask(ctx)
		pending, ok := err.(*PendingError) // alone: no failure beside it is waited away
		if !ok {
			return result, err
		}
		// A server that says to come back at once is not asked without a pause.
		pause := max(pending.NotBefore.Sub(c.cfg.Now()), c.cfg.RetryInterval)
		again := c.cfg.Now().Add(pause)
		if again.After(until) {
			return nil, err
		}
		c.say(StepRequest, "the server has not decided yet: asking again at %s", stamp(again))
		if err := c.cfg.Sleep(ctx, pause); err != nil {
			return nil, err
		}
	}
}

// ask exchanges the CSR for certificates, once.
func (c *Credential) ask(ctx context.Context) (*Result, error) {
	op := c.journal.Operation
	if err := c.checkSecurity(); err != nil {
		return nil, &StepError{Step: StepRequest, Err: err}
	}
	auth, err := c.authenticator(ctx)
	if err != nil {
		return nil, &StepError{Step: StepRequest, Err: err}
	}
	if err := c.askAnew(auth); err != nil {
		return nil, &StepError{Step: StepRequest, Err: err}
	}
	if len(op.CSR) == 0 && c.asksAttributes(op) && !op.asksForKey() {
		// It is made when the server has said what it wants of it: once.
		err = c.checkPadding(ctx, op.Key.Address, c.cfg.Request.PSS)
	} else {
		err = c.buildCSR(ctx, auth, nil)
	}
	switch {
	case err != nil && isAnswer(err): // of an earlier run's server
		return nil, c.discard(ctx, inStep(StepRequest, err))
	case err != nil:
		return nil, c.giveUpRekey(ctx, inStep(StepRequest, err))
	}
	if err := c.stillPending(ctx, auth); err != nil {
		return nil, err
	}
	var got *answer
	defer func() { got.clear() }()
	err = c.timed(StepRequest, func() (string, error) {
		if got, err = retry(ctx, c, func() (*answer, error) { return c.exchange(ctx, auth) }); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s at %s: a certificate valid until %s", op.asks(), c.cfg.ServerURI,
			got.chain[0].NotAfter.UTC().Format(time.RFC3339)), nil
	})
	if errors.Is(err, errAnotherKey) {
		if err = c.replaceKey(ctx); err != nil {
			err = c.giveUpRekey(ctx, inStep(StepRequest, err))
		}
		return nil, err // the next step generates it
	}
	if err != nil {
		return nil, c.requestFailed(ctx, err)
	}
	if op.Kind.reenrolls() {
		if unchanged := c.notRenewed(auth.chain[0], got.chain[0]); unchanged {
			return c.unchanged(ctx, auth)
		}
	}
	return c.accept(ctx, auth, got)
}

// askAnew forgets what a server has said that is not the configured one any more.
func (c *Credential) askAnew(auth *pair) (err error) {
	op := c.journal.Operation
	if !c.anotherServer(op) {
		return nil
	}
	c.warn("the %s was begun with %s: %s is asked now", op.Kind, op.Server, c.cfg.ServerURI)
	op.Server = c.cfg.ServerURI
	op.forgetAnswer()
	op.Deadline, err = c.deadline(op.Kind, auth.leaf())
	return err
}

// anotherServer reports whether the configuration names another server by now.
func (c *Credential) anotherServer(op *operation) bool {
	return op.Server != "" && op.Server != c.cfg.ServerURI
}

// stillPending returns the pending answer again until its time has come:
// the client waits at least as long as the server said (RFC 9148 §4.7).
func (c *Credential) stillPending(ctx context.Context, auth *pair) (err error) {
	op := c.journal.Operation
	if op.AskedAt.IsZero() {
		return nil
	}
	now := c.cfg.Now()
	if floor, _ := c.clockFloor(); op.StartedAt.Before(floor) && !now.Before(floor) {
		// The clock was known to be behind then and was set since: between the two
		// lie decades that nobody waited.
		op.StartedAt = now
		if op.Deadline, err = c.deadline(op.Kind, auth.leaf()); err != nil {
			return err
		}
	}
	pending := c.pending(op)
	switch {
	case pending == nil:
		return nil
	case op.Kind == KindRekey && now.After(op.Deadline):
		// The server's patience is not that of the certificate. Nor is that what it
		// comes to: it is not wrapped.
		return c.discard(ctx, &StepError{Step: StepRequest, Err: fmt.Errorf("%w: %s", ErrRekeyGivenUp, pending)})
	}
	return pending
}

// pending is the answer of an operation whose time to ask again has not come, else nil.
func (c *Credential) pending(op *operation) *PendingError {
	pending, now := op.pending(), c.cfg.Now()
	// A clock that was set back would keep the device waiting: it asks then.
	if op.AskedAt.IsZero() || c.anotherServer(op) || !now.Before(pending.NotBefore) || now.Before(op.AskedAt) {
		return nil
	}
	return pending
}

// pending is what the server has said, and the device makes of it.
func (op *operation) pending() *PendingError {
	return &PendingError{NotBefore: op.AskedAt.Add(op.RetryAfter), Deadline: op.Deadline, Detail: op.Detail}
}

// buildCSR makes the CSR once and keeps it in the journal: every repetition, in
// this run or the next, sends the same bytes. It is made again in a session where the
// server wants another one; one that is linked to its session is made in each.
func (c *Credential) buildCSR(ctx context.Context, auth *pair, session est.Session) error {
	op := c.journal.Operation
	wanted, err := c.wanted(op)
	if err != nil {
		return err
	}
	template, err := c.template(op.Kind, auth, wanted)
	if err != nil {
		return &est.ResponseError{Operation: est.CSRAttrs, Err: err}
	}
	if op.asksForKey() {
		if template.Protection, err = c.protection(ctx); err != nil {
			return err
		}
	}
	links := c.links(wanted)
	asked := false // of the server already, linked to this session or to another
	if len(op.CSR) > 0 {
		built, err := op.request()
		if err != nil {
			return err
		}
		before := template
		if links {
			before.ChallengePassword = csr.ChallengePassword(built)
		}
		if asked, err = before.Describes(built); err != nil || asked && !links {
			return err
		}
	}
	if !asked {
		// Another question: what the server said of the old one does not hold for it.
		op.forgetAnswer()
		if op.Deadline, err = c.deadline(op.Kind, auth.leaf()); err != nil {
			return err
		}
	}
	if links {
		if session == nil {
			return nil
		}
		if template.ChallengePassword, err = c.link(session); err != nil {
			return err
		}
	}
	return c.timed(StepRequest, func() (_ string, err error) {
		message, der := "built the CSR, signed in the token", []byte(nil)
		if op.asksForKey() {
			message = "built the CSR, signed with a key that is made for it and forgotten"
			der, err = c.signForServerKey(op.keyType(), template)
		} else {
			der, err = c.signCSR(ctx, op.Key.Address, template, wanted)
		}
		if err != nil {
			return "", err
		}
		op.CSR = der
		return message, c.save()
	})
}

func (op *operation) forgetAnswer() { op.AskedAt, op.RetryAfter, op.Detail = time.Time{}, 0, "" }

// template is what an operation asks for: what is configured, and what the server
// wants instead.
func (c *Credential) template(kind Kind, auth *pair, wanted csr.Wanted) (csr.Template, error) {
	template := c.cfg.Request
	if kind.reenrolls() {
		// RFC 7030 §4.2.2: Subject and SAN "identical to" the old certificate's.
		// All else is asked for as it is configured.
		old := csr.ForReenrollment(auth.chain[0])
		template.RawSubject, template.SANs, template.RawSAN = old.RawSubject, nil, old.RawSAN
		wanted = wanted.WithoutNames()
	}
	var own []byte
	if leaf := auth.leaf(); leaf != nil {
		own = leaf.RawSubject
	}
	template, outcome, err := wanted.Apply(template, own)
	if err != nil {
		return template, err
	}
	for _, what := range outcome.Replaced {
		c.warnOnce("the server wants something else than the configuration: %s", shown(what))
	}
	for _, what := range outcome.Missing {
		c.warnOnce("the server wants what the configuration does not have, and the CSR is without: %s", shown(what))
	}
	for _, what := range outcome.Ignored {
		c.sayOnce(StepRequest, "the server wants what this device does not have or know, and the CSR is without: %s", shown(what))
	}
	if len(template.RawSubject) == 0 {
		template.RawSubject = own
	}
	return template, nil
}

// checkPadding has an RSA key that shall sign CSRs with PSS sign as a handshake does,
// which the CSR alone does not show.
func (c *Credential) checkPadding(ctx context.Context, key engine.Address, pss bool) error {
	if !pss {
		return nil
	}
	signer, err := c.signer(ctx, key)
	if err != nil {
		return err
	}
	if _, isRSA := signer.Public().(*rsa.PublicKey); !isRSA {
		return nil
	}
	return signsHandshakes(signer)
}

// signCSR has the token sign a CSR. A signature that the server wants and the token
// does not make is one that no repetition makes.
func (c *Credential) signCSR(ctx context.Context, key engine.Address, template csr.Template, wanted csr.Wanted) ([]byte, error) {
	signer, err := c.signer(ctx, key)
	if err != nil {
		return nil, err
	}
	der, err := csr.Build(c.cfg.Rand, template, signer)
	if what := wanted.Signature(); what != "" && errors.Is(err, engine.ErrUnsupported) {
		return nil, fmt.Errorf("the server wants a %s by a key of type %s: %w: %w", what, engine.AlgorithmOf(signer.Public()), csr.ErrSignature, err)
	}
	return der, err
}

func (op *operation) request() (*x509.CertificateRequest, error) {
	request, err := x509.ParseCertificateRequest(op.CSR)
	if err != nil {
		return nil, fmt.Errorf("read the CSR of the journal: %w: %w", err, ErrState)
	}
	return request, nil
}

// answer is what the server gave and we judged.
type answer struct {
	chain   []*x509.Certificate // leaf first
	anchors *est.TrustAnchors
	asked   bool              // for the anchors, in the same session
	server  *x509.Certificate // nil where a pre-shared key stood for it
	made    *est.ServerKey    // nil where the key is in the token
}

// clear overwrites the key that came with the certificate, wherever that ended.
func (a *answer) clear() {
	if a != nil {
		a.made.Clear()
	}
}

// asks is what an operation asks the server for.
func (op *operation) asks() est.Operation {
	switch {
	case op.asksForKey():
		return est.ServerKeyGen
	case op.Kind.reenrolls():
		return est.SimpleReenroll
	}
	return est.SimpleEnroll
}

// exchange is one session: crts, the live session judged by the Explicit TA, att where
// it is not known what the server wants, then sen, sren or skg (RFC 9148 §3).
func (c *Credential) exchange(ctx context.Context, auth *pair) (got *answer, err error) {
	op := c.journal.Operation
	var decryption *est.DecryptionKey
	if op.asksForKey() {
		if decryption, err = c.opener(ctx); err != nil {
			return nil, err
		}
	}
	session, err := c.open(ctx, auth)
	if err != nil {
		return nil, err
	}
	defer c.closeSession(session)
	key, err := c.requestKey(ctx)
	if err != nil {
		return nil, err
	}
	anchors, _, err := c.meet(ctx, session, auth, key)
	if err != nil {
		return nil, err
	}
	if err := c.askAttributes(ctx, session, anchors, key); err != nil {
		return nil, err
	}
	carrier, err := carrying(ctx, session, op.asks(), anchors)
	if err != nil {
		return nil, err
	}
	client := est.Client{Session: carrier, DecryptionKey: decryption}
	issued, made, err := c.submit(ctx, &client, auth)
	if errors.Is(err, est.ErrUnlinked) {
		// Once, as after a 401 whose server closes the connection (RFC 7030 §3.2.3).
		issued, made, err = c.submit(ctx, &client, auth)
	}
	defer func() {
		if err != nil {
			made.Clear()
		}
	}()
	if err != nil {
		return nil, err
	}
	request, err := op.request()
	if err != nil {
		return nil, err
	}
	// The server may have taken its time, and a certificate can begin when it is issued.
	now, err := c.verificationTime()
	if err != nil {
		return nil, err
	}
	public, err := c.keyOfAnswer(session, request, auth.public(), made)
	if err != nil {
		return nil, err
	}
	chain, err := anchors.VerifyIssued(issued, public, now)
	if errors.Is(err, est.ErrNoAnchor) && anchors == c.explicitTA { // it was not asked for crts
		if anchors, err = c.publishedAnchors(ctx, session, auth, now); err == nil {
			chain, err = anchors.VerifyIssued(issued, public, now)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := c.judgeSigner(anchors, made, now); err != nil {
		return nil, err
	}
	if err := c.compare(request, chain[0]); err != nil {
		return nil, err
	}
	got = &answer{chain: chain, anchors: anchors, asked: anchors != c.explicitTA, made: made}
	if peer := session.PeerChain(); len(peer) > 0 {
		got.server = peer[0]
	}
	return got, nil
}

// carrying is the session that carries an operation: where the server has that at
// another one, one with that, which the anchors judge.
func carrying(ctx context.Context, session est.Session, operation est.Operation, anchors *est.TrustAnchors) (est.Session, error) {
	if distributor, ok := session.(est.Distributor); ok {
		if other, err := distributor.For(ctx, operation, anchors); err != nil || other != nil {
			return other, err
		}
	}
	return session, nil
}

// submit sends the CSR, made for the session where it is linked to that. The answer has
// a key that the server has made where it was asked for one.
func (c *Credential) submit(ctx context.Context, client *est.Client, auth *pair) (issued []*x509.Certificate, made *est.ServerKey, err error) {
	op := c.journal.Operation
	if err := c.buildCSR(ctx, auth, client.Session); err != nil {
		return nil, nil, err
	}
	c.sent = true
	switch op.asks() {
	case est.ServerKeyGen:
		if made, err = client.ServerKeyGen(ctx, op.CSR); err == nil {
			issued = made.Certificates
		}
	case est.SimpleReenroll:
		issued, err = client.SimpleReenroll(ctx, op.CSR)
	default:
		issued, err = client.SimpleEnroll(ctx, op.CSR)
	}
	return issued, made, err
}

// meet asks for crts on a new session, unless the answer that is held is young, and
// judges its server by them, at the time that it returns. The key is one that a
// certificate shall be asked for, nil where there is none yet.
func (c *Credential) meet(ctx context.Context, session est.Session, auth *pair, key crypto.PublicKey) (*est.TrustAnchors, time.Time, error) {
	var none time.Time
	if known, ok := session.(est.KeyAccepter); ok && key != nil && !known.AcceptsKey(key) {
		// The certificate could never be proven: it is not asked for.
		return nil, none, fmt.Errorf("%s: %w with %s: %w", c.cfg.ServerURI, errNoUse, engine.AlgorithmOf(key), est.ErrKeyUnsuitable)
	}
	now, err := c.verificationTime()
	if err != nil {
		return nil, none, err
	}
	explicit, err := c.held()
	if err != nil {
		return nil, none, err
	}
	age := c.cfg.Now().Sub(c.journal.CACertsAt) // negative: the clock was set back
	if explicit != nil && !c.isIDevID(auth.certificate) && age >= 0 && age < c.cfg.CACertsInterval {
		return explicit, now, nil // by which the session was opened
	}
	anchors, err := c.publishedAnchors(ctx, session, auth, now)
	return anchors, now, err
}

// compare holds an issued certificate to what the CSR asked for, which for a
// renewal is what the current certificate has.
func (c *Credential) compare(request *x509.CertificateRequest, issued *x509.Certificate) error {
	for _, name := range csr.CompareNames(request, issued) {
		text := fmt.Sprintf("its %s is %s, asked for was %s", name.Field, shown(name.Issued), shown(name.Asked))
		if c.cfg.RefuseOtherNames {
			return fmt.Errorf("issued certificate: %s: %w", text, ErrOtherNames)
		}
		c.warn("the issued certificate is for other names: %s", text)
	}
	if missing := csr.MissingUsages(request, issued); len(missing) > 0 {
		c.warn("the issued certificate is not for all that was asked for: without %s", strings.Join(missing, ", "))
	}
	return nil
}

// shown is a name in a message, which is printable already.
func shown(name string) string { return cmp.Or(truncate(name, maxShown), "none") }

// connect opens a session whose server the anchors judge, or a provisional one.
func (c *Credential) connect(ctx context.Context, as *pair, trust *est.TrustAnchors, provisional bool) (est.Session, error) {
	now, err := c.verificationTime()
	if err != nil {
		return nil, err
	}
	connection := as.connection()
	connection.Trust, connection.Provisional, connection.PSK = trust, provisional, c.byPSK(as)
	connection.Now = func() time.Time { return now }
	connection.Warn = c.warnOnce
	return c.cfg.Dial(ctx, connection)
}

// byPSK reports whether the sessions as a pair are by the pre-shared key instead: those
// of the IDevID, for which it stands. What was enrolled shows itself.
func (c *Credential) byPSK(as *pair) bool { return c.cfg.PSK && c.isIDevID(as.certificate) }

// showing is what a session as a pair shows to the server.
func (c *Credential) showing(as *pair) string {
	if c.byPSK(as) {
		return "the pre-shared key"
	}
	return as.String()
}

// closeSession ends a session. A failure does not undo what was received: an
// answer must not be taken for a failed request because of it.
func (c *Credential) closeSession(session est.Session) {
	if err := session.Close(); err != nil {
		c.warn("close session with %s: %v", c.cfg.ServerURI, err)
	}
}

// retry repeats an exchange that got no answer, and nothing else, a bounded
// number of times; the CSR in the journal makes the repetition safe.
func retry[T any](ctx context.Context, c *Credential, try func() (T, error)) (T, error) {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = c.cfg.RetryInterval
	pause.Multiplier = 2
	attempt := func() (T, error) {
		got, err := try()
		if err != nil && !errors.Is(err, est.ErrUnreachable) {
			err = backoff.Permanent(err)
		}
		return got, err
	}
	got, err := backoff.Retry(ctx, attempt, backoff.WithBackOff(pause), backoff.WithMaxTries(c.cfg.Tries), backoff.WithMaxElapsedTime(0),
		backoff.WithNotify(func(err error, wait time.Duration) {
			c.say(StepRequest, "no answer (%v): again in %s", err, wait.Round(time.Millisecond))
		}))
	// Measured: backoff v5.0.3 leaves its wrapper around the last try's error.
	var permanent *backoff.PermanentError
	if errors.As(err, &permanent) {
		err = permanent.Unwrap()
	}
	return got, err
}

// requestFailed decides what a failed request leaves: all of it where the next
// run goes on with the same CSR, nothing where the answer was final.
func (c *Credential) requestFailed(ctx context.Context, err error) error {
	op := c.journal.Operation
	var pending *est.PendingError
	var status *est.StatusError
	switch {
	case errors.As(err, &pending):
		asked, now := !op.AskedAt.IsZero(), c.cfg.Now()
		if asked && now.After(op.Deadline) {
			// Only now: the server may have said to come back after the deadline.
			return c.discard(ctx, &StepError{Step: StepRequest, Err: fmt.Errorf("asked first at %s: %w", op.StartedAt.UTC().Format(time.RFC3339), ErrGivenUp)})
		}
		if pending.Asked > 0 {
			c.warn("the server asks for %s of patience: after %s the device asks again", pending.Asked, pending.RetryAfter)
		}
		op.AskedAt, op.RetryAfter, op.Detail = now, pending.RetryAfter, pending.Detail
		if err := c.save(); err != nil {
			return errors.Join(op.pending(), err)
		}
		return op.pending()
	case ctx.Err() != nil, errors.Is(err, ErrClock), errors.Is(err, ErrState):
		return err
	case errors.Is(err, csr.ErrSignature):
		return c.discard(ctx, err) // it was the server's wish, of which the next run asks anew
	case isEngineError(err):
		return c.giveUpRekey(ctx, err)
	case op.Kind == KindRekey && c.cfg.Now().After(op.Deadline):
		// A renewal has nothing better to do than to go on; this one stands in the way
		// of the renewal of the current key.
		return c.discard(ctx, &StepError{Step: StepRequest, Err: fmt.Errorf("%w: %w", ErrRekeyGivenUp, err)})
	case errors.Is(err, est.ErrUnreachable):
		return err
	case errors.Is(err, est.ErrServerCertificate), errors.Is(err, est.ErrCredentialNotYetValid):
		// Not an answer to the CSR: whoever stands in the server's place must not
		// end a request that is pending with the server.
		return err
	case errors.As(err, &status) && status.Temporary():
		return err
	case c.sent && !isAnswer(err):
		// Whoever sits on the network can present a wrong certificate or forge an
		// alert of the handshake: that must not cost a request under decision.
		return err
	}
	return c.discard(ctx, err)
}

// errNoUse is what the server of a session says of the kind of our key; what a
// handshake that failed seems to say can be anybody's.
var errNoUse = errors.New("no use for a certificate")

// isAnswer reports an error that only the authenticated server can have caused.
// That the server's own certificate was not accepted has been set apart before.
func isAnswer(err error) bool {
	var status *est.StatusError
	var response *est.ResponseError
	return errors.As(err, &status) || errors.As(err, &response) || errors.Is(err, est.ErrKeyMismatch) ||
		errors.Is(err, est.ErrNotTrusted) || errors.Is(err, est.ErrNotValidNow) || errors.Is(err, ErrOtherNames) || errors.Is(err, errNoUse) ||
		errors.Is(err, csr.ErrSignature)
}

func isEngineError(err error) bool {
	var engineErr *engine.Error
	return errors.As(err, &engineErr)
}

// notRenewed reports whether the answer is the certificate we have, or, unless
// forced, one that does not last longer (DESIGN.md §7 rule 5).
func (c *Credential) notRenewed(old, issued *x509.Certificate) bool {
	return old.Equal(issued) || !c.journal.Operation.Force && !issued.NotAfter.After(old.NotAfter)
}

func (c *Credential) unchanged(ctx context.Context, current *pair) (*Result, error) {
	op := c.journal.Operation
	kept, _ := c.current()
	c.warn("the server answered with a certificate that is no renewal of the current one (until %s): nothing is changed",
		current.chain[0].NotAfter.UTC().Format(time.RFC3339))
	result := &Result{Kind: op.Kind, Certificate: current.chain[0], CertificateAddress: kept.Certificates[0].Address, Key: kept.Key.Address}
	if op.NewKey {
		op.Reason = "its certificate is no renewal"
		return result, c.discard(ctx, nil)
	}
	c.journal.Operation = nil
	return result, c.save()
}

// accept writes down the answer and where it will be stored.
func (c *Credential) accept(ctx context.Context, auth *pair, got *answer) (*Result, error) {
	op := c.journal.Operation
	addresses, err := c.store.CertificateAddresses(ctx, op.Key.Address, got.chain)
	if err != nil {
		return nil, &StepError{Step: StepStore, Err: err}
	}
	if op.Kind == KindRenew && c.journal.has(addresses[0]) {
		return c.unchanged(ctx, auth) // the previous one, once more
	}
	for name, r := range c.shared.journal.Credentials {
		if r != c.journal && r.names(addresses[0]) {
			// Of one object in the token, the reset of either would be both's.
			return nil, c.discard(ctx, &StepError{Step: StepStore, Err: fmt.Errorf("the server answered with the certificate of credential %q: %w", name, ErrConfig)})
		}
	}
	op.Chain, op.Certificates = nil, nil
	for i, cert := range got.chain {
		op.Chain = append(op.Chain, cert.Raw)
		op.Certificates = append(op.Certificates, reference{Address: addresses[i]})
	}
	if op.ExplicitTA, err = c.saveExplicitTA(got.anchors); err != nil {
		return nil, &StepError{Step: StepStore, Err: err}
	}
	c.explicitTA, c.explicitName = got.anchors, op.ExplicitTA
	if got.asked {
		c.journal.CACertsAt = c.cfg.Now()
	}
	if op.Anchors, err = c.placeAnchors(ctx, got.anchors); err != nil {
		return nil, &StepError{Step: StepStore, Err: err}
	}
	if op.ServerCertificate = nil; got.server != nil {
		op.ServerCertificate = got.server.Raw
		c.sawVerified(got.server.NotBefore)
	}
	c.sawVerified(got.chain[0].NotBefore)
	if got.made == nil {
		return nil, c.advance(StepStore)
	}
	if err := c.advance(StepImport); err != nil {
		return nil, err
	}
	return nil, c.importKey(ctx, got.made)
}
