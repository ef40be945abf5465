package estenroll

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
)

// keepPrevious is how many pairs older than the current one stay until the
// next completed renewal.
const keepPrevious = 1

// Result is what a run reached.
type Result struct {
	// Kind of the operation that was completed; empty if there was none.
	Kind Kind
	// Changed says that the Security object points at another certificate now.
	Changed bool
	// Recovered says that the operation was begun by an earlier run.
	Recovered bool
	// Certificate that is current, where it is and where its key is.
	Certificate        *x509.Certificate
	CertificateAddress engine.Address
	Key                engine.Address
}

// Enroll gets the first certificate: it generates a key in the HSM, asks the EST
// server for a certificate with the IDevID and ends with the Security object
// pointing at the new pair. A device that is enrolled already is left alone; one
// whose certificate has expired, or is gone from the token, is enrolled again.
//
// *PendingError, ErrRefused, ErrUnproven, and what est and engine report.
func (d *Device) Enroll(ctx context.Context) (*Result, error) {
	return d.attempt(KindEnroll, func() (*Result, error) {
		recovered, err := d.recover(ctx)
		if err != nil || recovered != nil && recovered.Changed {
			return recovered, err
		}
		if usable, err := d.usable(ctx); err != nil || usable != nil {
			return usable, err
		}
		if err := d.startEnroll(ctx); err != nil {
			return nil, &StepError{Step: StepPrepare, Err: err}
		}
		return d.proceed(ctx, false)
	})
}

// Renew gets a new certificate for the same key, authenticated by the current
// one (simplereenroll). It does so whether the current certificate is near its
// end or not. ErrNotEnrolled, and as Enroll.
func (d *Device) Renew(ctx context.Context) (*Result, error) {
	return d.attempt(KindRenew, func() (*Result, error) {
		recovered, err := d.recover(ctx)
		if err != nil || recovered != nil && recovered.Kind == KindRenew {
			return recovered, err
		}
		if err := d.startRenew(ctx); err != nil {
			return nil, &StepError{Step: StepPrepare, Err: err}
		}
		return d.proceed(ctx, false)
	})
}

// Recover finishes, or undoes, the operation that a killed run left, and
// removes what nothing refers to. The result is nil if there was none.
func (d *Device) Recover(ctx context.Context) (*Result, error) {
	if d.journal.Operation == nil {
		return d.recover(ctx)
	}
	return d.attempt(d.journal.Operation.Kind, func() (*Result, error) { return d.recover(ctx) })
}

func (d *Device) recover(ctx context.Context) (*Result, error) {
	if err := d.restoreSecurity(ctx); err != nil {
		return nil, err
	}
	op := d.journal.Operation
	if op == nil {
		return nil, d.removeUnreferencedFiles()
	}
	d.sent = true // as far as this run knows
	d.say(op.Step, "going on with the %s of %s, interrupted at step %q", op.Kind, op.StartedAt.UTC().Format(time.RFC3339), op.Step)
	result, err := d.proceed(ctx, true)
	if result != nil {
		result.Recovered = true
	}
	return result, err
}

// attempt records what a run tried and how it ended: the one thing that a
// failure changes.
func (d *Device) attempt(kind Kind, do func() (*Result, error)) (*Result, error) {
	began := d.cfg.Now()
	result, err := do()
	record := &Attempt{Kind: kind, Time: began, Result: "done"}
	var pending *PendingError
	switch {
	case errors.As(err, &pending):
		record.Result = "pending"
	case err != nil:
		record.Result, record.Error = "failed", truncate(err.Error(), 512)
	case result == nil || result.Kind == "":
		return result, nil // nothing was tried
	case !result.Changed:
		record.Result = "unchanged"
	}
	d.journal.LastAttempt = record
	return result, errors.Join(err, d.save())
}

func truncate(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return text[:limit] + "…"
}

// usable returns the current certificate if there is no reason to enrol.
func (d *Device) usable(ctx context.Context) (*Result, error) {
	c, enrolled := d.current()
	if !enrolled {
		return nil, nil
	}
	p, err := d.openCredential(ctx, c)
	if errors.Is(err, engine.ErrNotFound) {
		d.warn("the enrolled credential is not in the token any more (%v): enrolling again with the IDevID", err)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	now, err := d.verificationTime()
	if err != nil {
		return nil, err
	}
	if leaf := p.chain[0]; now.After(leaf.NotAfter) {
		d.warn("the enrolled certificate expired at %s: enrolling again with the IDevID", leaf.NotAfter.UTC().Format(time.RFC3339))
		return nil, nil
	}
	return &Result{Certificate: p.chain[0], CertificateAddress: c.Certificates[0].Address, Key: c.Key.Address}, nil
}

func (d *Device) startEnroll(ctx context.Context) error {
	if _, err := d.prepare(ctx); err != nil {
		return err
	}
	key, err := d.engine.NewKeyAddress(d.cfg.Name)
	if err != nil {
		return err
	}
	d.begin(&operation{Kind: KindEnroll, Step: StepGenerate, NewKey: true, Key: reference{Address: key}})
	return d.save()
}

func (d *Device) startRenew(ctx context.Context) error {
	c, enrolled := d.current()
	if !enrolled {
		return ErrNotEnrolled
	}
	if _, err := d.openCredential(ctx, c); err != nil {
		return err
	}
	d.adopt(c) // the journal may have been lost
	d.begin(&operation{Kind: KindRenew, Step: StepRequest, Key: c.Key, Force: true})
	return d.save()
}

func (d *Device) begin(op *operation) {
	op.StartedAt = d.cfg.Now()
	op.Deadline = op.StartedAt.Add(d.cfg.PendingLimit)
	d.sent = false
	d.journal.Operation = op
}

// proceed does the steps of the operation in the journal, from the one that is
// named there. Each may have been done in part by a run that was killed.
func (d *Device) proceed(ctx context.Context, resumed bool) (*Result, error) {
	op := d.journal.Operation
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var result *Result
		var err error
		if resumed {
			if why, err := d.hopeless(ctx, op); err != nil {
				return nil, &StepError{Step: op.Step, Err: err}
			} else if why != "" {
				d.warn("the interrupted %s is given up, what it created is removed: %s", op.Kind, why)
				return nil, d.discard(ctx, nil)
			}
		}
		switch op.Step {
		case StepGenerate:
			err = d.generate(ctx, resumed)
		case StepRequest:
			result, err = d.request(ctx)
		case StepStore:
			err = d.storeCertificates(ctx)
		case StepProve:
			err = d.prove(ctx)
		case StepCommit:
			err = d.commit()
		case StepRetire:
			return d.retire(ctx)
		case StepDiscard:
			d.say(StepDiscard, "removing what the failed %s created: %s", op.Kind, op.Reason)
			return nil, d.discard(ctx, nil)
		}
		if err != nil || result != nil {
			return result, err
		}
		resumed = false
	}
}

// hopeless says why an interrupted operation cannot be gone on with, "" if it
// can: time has passed since, and a token can have been cleared. Without it the
// device would try in vain for ever instead of beginning anew.
func (d *Device) hopeless(ctx context.Context, op *operation) (why string, err error) {
	switch op.Step {
	case StepRequest, StepStore, StepProve:
	default:
		return "", nil
	}
	if _, err := d.engine.Signer(ctx, op.Key.Address); errors.Is(err, engine.ErrNotFound) {
		return "its key is not in the token any more", nil
	} else if err != nil {
		return "", err
	}
	var needed *x509.Certificate
	switch {
	case op.Step != StepRequest:
		chain, err := op.chain()
		if err != nil {
			return "", err
		}
		needed, why = chain[0], "its certificate has expired before it was proven"
	case op.Kind == KindRenew:
		old, err := d.authenticator(ctx)
		if errors.Is(err, ErrNotEnrolled) || errors.Is(err, engine.ErrNotFound) {
			return "the certificate to renew is gone", nil
		}
		if err != nil {
			return "", err
		}
		needed, why = old.chain[0], "the certificate to renew has expired"
	default:
		return "", nil
	}
	if now, err := d.verificationTime(); err != nil || !now.After(needed.NotAfter) {
		return "", err
	}
	return why, nil
}

func (d *Device) generate(ctx context.Context, resumed bool) error {
	op := d.journal.Operation
	return d.timed(StepGenerate, func() (string, error) {
		if resumed {
			_, err := d.recoverer.RecoverKey(ctx, op.Key.Address)
			if err == nil {
				return fmt.Sprintf("the key of the interrupted run is whole: %s", op.Key), d.advance(StepRequest)
			}
			if !errors.Is(err, engine.ErrNotFound) {
				return "", err
			}
		}
		_, err := d.engine.GenerateKey(ctx, op.Key.Address, engine.KeySpec{})
		if errors.Is(err, engine.ErrDeviceLost) {
			// The outcome is unknown, and generating again could leave two.
			if _, recoverErr := d.recoverer.RecoverKey(ctx, op.Key.Address); recoverErr != nil {
				return "", fmt.Errorf("%w; then %w", err, recoverErr)
			}
			err = nil
		}
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("generated %s in the token: %s", engine.ECP256, op.Key), d.advance(StepRequest)
	})
}

// authenticator is the pair that authenticates the request.
func (d *Device) authenticator(ctx context.Context) (*pair, error) {
	if d.journal.Operation.Kind == KindEnroll {
		return d.openIDevID(ctx)
	}
	c, enrolled := d.current()
	if !enrolled {
		return nil, ErrNotEnrolled
	}
	return d.openCredential(ctx, c)
}

// request exchanges the CSR for certificates. A result ends the operation.
func (d *Device) request(ctx context.Context) (*Result, error) {
	op := d.journal.Operation
	auth, err := d.authenticator(ctx)
	if err != nil {
		return nil, &StepError{Step: StepRequest, Err: err}
	}
	if err := d.buildCSR(ctx, auth); err != nil {
		return nil, &StepError{Step: StepRequest, Err: err}
	}
	if err := d.stillPending(ctx); err != nil {
		return nil, err
	}
	var got *answer
	err = d.timed(StepRequest, func() (string, error) {
		if got, err = retry(ctx, d, func() (*answer, error) { return d.exchange(ctx, auth) }); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s at %s: a certificate valid until %s", operationOf(op.Kind), d.cfg.ServerURI,
			got.chain[0].NotAfter.UTC().Format(time.RFC3339)), nil
	})
	if err != nil {
		return nil, d.requestFailed(ctx, err)
	}
	if op.Kind == KindRenew {
		if unchanged := d.notRenewed(auth.chain[0], got.chain[0]); unchanged {
			return d.unchanged(auth)
		}
	}
	return d.accept(ctx, auth, got)
}

// stillPending returns the pending answer again until its time has come:
// "the client MUST wait at least as long as" the server said (RFC 9148 §4.7).
func (d *Device) stillPending(ctx context.Context) error {
	op := d.journal.Operation
	if op.AskedAt.IsZero() {
		return nil
	}
	now := d.cfg.Now()
	if floor, _ := d.clockFloor(); op.StartedAt.Before(floor) && !now.Before(floor) {
		// The clock was known to be behind then and was set since: between the two
		// lie decades that nobody waited.
		op.StartedAt, op.Deadline = now, now.Add(d.cfg.PendingLimit)
	}
	if now.After(op.Deadline) {
		return d.discard(ctx, &StepError{Step: StepRequest, Err: fmt.Errorf("asked first at %s: %w", op.StartedAt.UTC().Format(time.RFC3339), ErrGivenUp)})
	}
	// A clock that was set back would keep the device waiting: ask then.
	if notBefore := op.AskedAt.Add(op.RetryAfter); now.Before(notBefore) && !now.Before(op.AskedAt) {
		return &PendingError{NotBefore: notBefore, Deadline: op.Deadline}
	}
	return nil
}

// buildCSR makes the CSR once and keeps it in the journal: every repetition, in
// this run or the next, sends the same bytes.
func (d *Device) buildCSR(ctx context.Context, auth *pair) error {
	op := d.journal.Operation
	template := d.cfg.Request
	switch {
	case op.Kind == KindRenew:
		// RFC 7030 §4.2.2: Subject and SAN "identical to" the old certificate's.
		template = csr.ForReenrollment(auth.chain[0])
	case len(template.RawSubject) == 0:
		template.RawSubject = auth.chain[0].RawSubject
	}
	wanted, err := digestOf(template)
	if err != nil {
		return err
	}
	if len(op.CSR) > 0 && bytes.Equal(wanted, op.Wanted) {
		return nil
	}
	return d.timed(StepRequest, func() (string, error) {
		signer, err := d.engine.Signer(ctx, op.Key.Address)
		if err != nil {
			return "", err
		}
		if op.CSR, err = csr.Build(d.cfg.Rand, template, signer); err != nil {
			return "", err
		}
		// Another question: what the server said of the old one does not hold for it.
		op.Wanted, op.AskedAt, op.RetryAfter = wanted, time.Time{}, 0
		op.Deadline = d.cfg.Now().Add(d.cfg.PendingLimit)
		return "built the CSR, signed in the token", d.save()
	})
}

func digestOf(template csr.Template) ([]byte, error) {
	san, err := template.SANExtension()
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	h.Write(template.RawSubject)
	fmt.Fprintf(h, "%t", san.Critical)
	h.Write(san.Value)
	return h.Sum(nil), nil
}

// answer is what the server gave and we judged.
type answer struct {
	chain   []*x509.Certificate // leaf first
	anchors *est.TrustAnchors
	server  *x509.Certificate
}

func operationOf(kind Kind) est.Operation {
	if kind == KindRenew {
		return est.SimpleReenroll
	}
	return est.SimpleEnroll
}

// exchange is one session: crts, the live session judged by the Explicit TA,
// then sen or sren (RFC 9148 §3).
func (d *Device) exchange(ctx context.Context, auth *pair) (*answer, error) {
	op := d.journal.Operation
	session, err := d.dial(ctx, auth)
	if err != nil {
		return nil, err
	}
	defer d.closeSession(session)
	client := est.Client{Session: session}
	caCerts, err := client.CACerts(ctx)
	if err != nil {
		return nil, err
	}
	anchors, err := est.NewTrustAnchors(caCerts)
	if err != nil {
		return nil, err
	}
	now, err := d.verificationTime()
	if err != nil {
		return nil, err
	}
	if err := anchors.VerifyServer(session.PeerChain(), d.cfg.ServerName, now); err != nil {
		return nil, fmt.Errorf("judge the server by its own cacerts: %w", err)
	}
	request, err := x509.ParseCertificateRequest(op.CSR)
	if err != nil {
		return nil, fmt.Errorf("read the CSR of the journal: %w: %w", err, ErrState)
	}
	enroll := client.SimpleEnroll
	if op.Kind == KindRenew {
		enroll = client.SimpleReenroll
	}
	d.sent = true
	issued, err := enroll(ctx, op.CSR)
	if err != nil {
		return nil, err
	}
	chain, err := anchors.VerifyIssued(issued, request.PublicKey, now)
	if err != nil {
		return nil, err
	}
	return &answer{chain: chain, anchors: anchors, server: session.PeerChain()[0]}, nil
}

func (d *Device) dial(ctx context.Context, as *pair) (est.Session, error) {
	now, err := d.verificationTime()
	if err != nil {
		return nil, err
	}
	connection := as.connection()
	connection.Now = func() time.Time { return now }
	return d.cfg.Dial(ctx, connection)
}

// closeSession ends a session. A failure does not undo what was received: an
// answer must not be taken for a failed request because of it.
func (d *Device) closeSession(session est.Session) {
	if err := session.Close(); err != nil {
		d.warn("close session with %s: %v", d.cfg.ServerURI, err)
	}
}

// retry repeats an exchange that got no answer, and nothing else, a bounded
// number of times; the CSR in the journal makes the repetition safe.
func retry[T any](ctx context.Context, d *Device, try func() (T, error)) (T, error) {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = d.cfg.RetryInterval
	pause.Multiplier = 2
	attempt := func() (T, error) {
		got, err := try()
		if err != nil && !errors.Is(err, est.ErrUnreachable) {
			err = backoff.Permanent(err)
		}
		return got, err
	}
	got, err := backoff.Retry(ctx, attempt, backoff.WithBackOff(pause), backoff.WithMaxTries(d.cfg.Tries), backoff.WithMaxElapsedTime(0),
		backoff.WithNotify(func(err error, wait time.Duration) {
			d.say(StepRequest, "no answer (%v): again in %s", err, wait.Round(time.Millisecond))
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
func (d *Device) requestFailed(ctx context.Context, err error) error {
	op := d.journal.Operation
	var pending *est.PendingError
	var status *est.StatusError
	switch {
	case errors.As(err, &pending):
		op.AskedAt, op.RetryAfter = d.cfg.Now(), pending.RetryAfter
		return errors.Join(&PendingError{NotBefore: op.AskedAt.Add(op.RetryAfter), Deadline: op.Deadline}, d.save())
	case ctx.Err() != nil, errors.Is(err, est.ErrUnreachable), isEngineError(err), errors.Is(err, ErrClock), errors.Is(err, ErrState):
		return err
	case errors.Is(err, est.ErrServerCertificate), errors.Is(err, est.ErrCredentialNotYetValid):
		// Not an answer to the CSR: whoever stands in the server's place must not
		// end a request that is pending with the server.
		return err
	case errors.As(err, &status) && status.Temporary():
		return err
	case d.sent && !isAnswer(err):
		// Whoever sits on the network can present a wrong certificate or forge an
		// alert of the handshake: that must not cost a request under decision.
		return err
	}
	return d.discard(ctx, err)
}

// isAnswer reports an error that only the authenticated server can have caused.
func isAnswer(err error) bool {
	var status *est.StatusError
	var response *est.ResponseError
	return errors.As(err, &status) || errors.As(err, &response) || errors.Is(err, est.ErrKeyMismatch) ||
		(errors.Is(err, est.ErrNotTrusted) || errors.Is(err, est.ErrNotValidNow)) && !errors.Is(err, est.ErrServerCertificate)
}

func isEngineError(err error) bool {
	var engineErr *engine.Error
	return errors.As(err, &engineErr)
}

// notRenewed reports whether the answer is the certificate we have, or, unless
// forced, one that does not last longer (DESIGN.md §7 rule 5).
func (d *Device) notRenewed(old, issued *x509.Certificate) bool {
	return old.Equal(issued) || !d.journal.Operation.Force && !issued.NotAfter.After(old.NotAfter)
}

func (d *Device) unchanged(current *pair) (*Result, error) {
	c, _ := d.current()
	d.warn("the server answered with a certificate that is no renewal of the current one (until %s): nothing is changed",
		current.chain[0].NotAfter.UTC().Format(time.RFC3339))
	d.journal.Operation = nil
	return &Result{Kind: KindRenew, Certificate: current.chain[0], CertificateAddress: c.Certificates[0].Address, Key: c.Key.Address}, d.save()
}

// accept writes down the answer and where it will be stored.
func (d *Device) accept(ctx context.Context, auth *pair, got *answer) (*Result, error) {
	op := d.journal.Operation
	addresses, err := d.store.CertificateAddresses(ctx, op.Key.Address, got.chain)
	if err != nil {
		return nil, &StepError{Step: StepStore, Err: err}
	}
	for _, known := range d.journal.Credentials {
		if known.sameLeaf(addresses[0]) {
			return d.unchanged(auth) // the previous one, once more
		}
	}
	op.Chain, op.Certificates = nil, nil
	for i, cert := range got.chain {
		op.Chain = append(op.Chain, cert.Raw)
		op.Certificates = append(op.Certificates, reference{Address: addresses[i]})
	}
	if op.ExplicitTA, err = d.saveExplicitTA(got.anchors); err != nil {
		return nil, &StepError{Step: StepStore, Err: err}
	}
	op.ServerCertificate = got.server.Raw
	d.sawVerified(got.server.NotBefore)
	d.sawVerified(got.chain[0].NotBefore)
	return nil, d.advance(StepStore)
}

func (op *operation) chain() ([]*x509.Certificate, error) {
	chain := make([]*x509.Certificate, len(op.Chain))
	for i, der := range op.Chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read the certificate of the journal: %w: %w", err, ErrState)
		}
		chain[i] = cert
	}
	return chain, nil
}

func (op *operation) credential() credential {
	return credential{Key: op.Key, Certificates: op.Certificates, ExplicitTA: op.ExplicitTA}
}

func addresses(refs []reference) []engine.Address {
	out := make([]engine.Address, len(refs))
	for i, r := range refs {
		out[i] = r.Address
	}
	return out
}

func (d *Device) storeCertificates(ctx context.Context) error {
	op := d.journal.Operation
	return d.timed(StepStore, func() (string, error) {
		chain, err := op.chain()
		if err != nil {
			return "", err
		}
		if err := d.store.StoreCertificates(ctx, addresses(op.Certificates), chain); err != nil {
			return "", err
		}
		return fmt.Sprintf("stored the certificate and its chain (%d) in the token: %s", len(chain)-1, op.Certificates[0]), d.advance(StepProve)
	})
}

// commit makes the Security object point at the new pair.
func (d *Device) commit() error {
	op := d.journal.Operation
	return d.timed(StepCommit, func() (string, error) {
		if err := d.pointSecurityAt(op.Key.Address, op.Certificates[0].Address, op.ServerCertificate); err != nil {
			return "", err
		}
		d.adopt(op.credential())
		return fmt.Sprintf("security instance /0/%d points at the new pair", d.cfg.Security.Instance), d.advance(StepRetire)
	})
}

// adopt puts a credential at the head of the list, once.
func (d *Device) adopt(c credential) {
	for _, known := range d.journal.Credentials {
		if known.sameLeaf(c.Certificates[0].Address) {
			return
		}
	}
	d.journal.Credentials = append([]credential{c}, d.journal.Credentials...)
}

// retire removes what is older than the previous pair and ends the operation.
func (d *Device) retire(ctx context.Context) (*Result, error) {
	op := d.journal.Operation
	err := d.timed(StepRetire, func() (string, error) {
		retired := 0
		for len(d.journal.Credentials) > 1+keepPrevious {
			last := len(d.journal.Credentials) - 1
			old := d.journal.Credentials[last]
			d.journal.Credentials = d.journal.Credentials[:last]
			if err := d.removeCredential(ctx, old.Certificates, old.Key.Address); err != nil {
				// The record of the attempt is saved next: it must not forget this one.
				d.journal.Credentials = append(d.journal.Credentials, old)
				return "", err
			}
			retired++
		}
		d.journal.Operation = nil
		if err := d.save(); err != nil {
			return "", err
		}
		message := "nothing is old enough to go"
		if retired > 0 {
			message = fmt.Sprintf("removed %d certificates older than the previous one", retired)
		}
		return message, d.removeUnreferencedFiles()
	})
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(op.Chain[0])
	if err != nil {
		return nil, fmt.Errorf("read the certificate of the journal: %w: %w", err, ErrState)
	}
	return &Result{Kind: op.Kind, Changed: true, Certificate: leaf, CertificateAddress: op.Certificates[0].Address, Key: op.Key.Address}, nil
}

// removeCredential destroys certificates and, when no kept certificate and no
// Security instance uses it, their key.
func (d *Device) removeCredential(ctx context.Context, certs []reference, key engine.Address) error {
	if len(certs) > 0 {
		if err := d.store.RemoveCertificates(ctx, addresses(certs)); err != nil {
			return err
		}
	}
	if d.keyInUse(key) {
		return nil
	}
	if err := d.engine.RemoveKey(ctx, key); err != nil && !errors.Is(err, engine.ErrNotFound) {
		return err
	}
	return nil
}

func (d *Device) keyInUse(key engine.Address) bool {
	if key == d.cfg.IDevID.Key {
		return true
	}
	for _, c := range d.journal.Credentials {
		if c.Key.Address == key {
			return true
		}
	}
	for _, instance := range d.security.All() {
		if at, ok := instance.PrivateKey.Engine(); ok && at == key {
			return true
		}
	}
	return false
}

// discard removes what the operation created, ends it and returns the cause.
func (d *Device) discard(ctx context.Context, cause error) error {
	op := d.journal.Operation
	if cause != nil {
		op.Reason = truncate(cause.Error(), 512)
	}
	if err := d.advance(StepDiscard); err != nil {
		return errors.Join(cause, err)
	}
	// Ctrl-C does not stop the cleaning up: it is short, and asked for.
	ctx = context.WithoutCancel(ctx)
	key := engine.Address(nil)
	if op.NewKey {
		key = op.Key.Address
	}
	if err := d.removeOperation(ctx, op, key); err != nil {
		return errors.Join(cause, &StepError{Step: StepDiscard, Err: err})
	}
	d.journal.Operation = nil
	return errors.Join(cause, d.save(), d.removeUnreferencedFiles())
}

func (d *Device) removeOperation(ctx context.Context, op *operation, key engine.Address) error {
	if key != nil {
		return d.removeCredential(ctx, op.Certificates, key)
	}
	if len(op.Certificates) == 0 {
		return nil
	}
	return d.store.RemoveCertificates(ctx, addresses(op.Certificates))
}
