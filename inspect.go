package estenroll

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"estenroll/engine"
	"estenroll/est"
	"estenroll/internal/durable"
)

// Inspection is a device that is looked at: what a run would find and work with, for
// whoever wants to know beforehand what it would come to. It changes nothing in the
// state directory and in the token, but for one thing: see OpenToken. It is not safe
// for concurrent use.
type Inspection struct {
	device   *Device
	busy     error
	restored map[string]bool // credentials by name, of the Security object
}

// Inspect reads the state directory, and creates no file. Where there is none yet, it
// is that of a device as the factory made it. It does not wait for its turn: where
// another run is at work, Busy says so, and what is read may change meanwhile.
// ErrConfig, ErrOwner, ErrState, and why a run could not write to the directory.
func Inspect(cfg Config) (*Inspection, error) {
	cfg.setDefaults()
	if err := cfg.checkCredentials(); err != nil {
		return nil, err
	}
	// What the clock is like, Clock says.
	i := &Inspection{device: &Device{&shared{cfg: cfg, signers: map[engine.Address]crypto.Signer{}, clockWarned: true}}}
	if err := i.device.checkStateDir(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := checkWritable(cfg.StateDir); err != nil {
		return nil, fmt.Errorf("check state directory: %w", err)
	}
	lock, err := durable.Share(filepath.Join(cfg.StateDir, lockName))
	var held *durable.LockedError
	switch {
	case errors.As(err, &held):
		i.busy = fmt.Errorf("%w: %w", ErrBusy, err)
	case errors.Is(err, fs.ErrNotExist): // nobody ever was
	case err != nil:
		return nil, fmt.Errorf("look at the lock of the state directory: %w", err)
	default:
		defer func() { _ = lock.Release() }() // it was for reading alone
	}
	if err := i.device.load(); err != nil {
		return nil, err
	}
	return i, nil
}

// checkWritable says why a run of this user could not write to the state directory,
// or could not make it.
func checkWritable(dir string) error {
	const writeAndEnter = 2 | 1 // W_OK and X_OK, access(2)
	status, err := os.Stat(dir)
	for errors.Is(err, fs.ErrNotExist) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		status, err = os.Stat(dir)
	}
	if err == nil && !status.IsDir() {
		err = syscall.ENOTDIR
	}
	if err == nil {
		err = syscall.Access(dir, writeAndEnter)
	}
	var system syscall.Statfs_t
	if err == nil {
		err = syscall.Statfs(dir, &system)
	}
	// The largest file that is written, but for a journal of several long answers.
	if err == nil && uint64(system.Bavail)*uint64(system.Bsize) < taFileLimit {
		err = syscall.ENOSPC
	}
	var path *fs.PathError
	if err == nil || errors.As(err, &path) {
		return err
	}
	return &fs.PathError{Op: "write to", Path: dir, Err: err}
}

// Busy says who else is at work; nil where nobody is. ErrBusy.
func (i *Inspection) Busy() error { return i.busy }

// OpenToken opens the token as a run does. A PIN that the token refuses is remembered
// as by a run, for the next would spend another try on it. So it is refused while
// another run is at work, during which nothing can be remembered: ErrBusy.
// *engine.PINError.
func (i *Inspection) OpenToken(ctx context.Context) error {
	if i.busy != nil {
		return i.busy
	}
	d := i.device
	opened, err := d.cfg.OpenEngine(ctx, d.journal.RefusedPIN)
	if refusal := new(journal); refusal.rememberPIN(err) {
		return errors.Join(err, i.remember(ctx, refusal.RefusedPIN))
	}
	if err != nil {
		return err
	}
	if err := d.use(opened); err != nil {
		return err
	}
	i.restored = map[string]bool{}
	for _, c := range d.credentials {
		if err := c.recognizeIDevID(ctx); err != nil {
			return err
		}
		if c.checkUse() != nil {
			continue // which Check says
		}
		restored, err := c.restored(ctx)
		if err == nil && restored != nil { // as a run would write it
			d.security, i.restored[c.Name()] = restored, true
		} else if err != nil && !errors.Is(err, ErrIDevID) { // which IDevID says
			return err
		}
	}
	return nil
}

// remember writes down the source of a PIN that was refused, in what the state
// directory holds by then.
func (i *Inspection) remember(ctx context.Context, source engine.PINSource) (err error) {
	run := &Device{&shared{cfg: i.device.cfg}}
	defer func() { err = errors.Join(err, run.Close()) }()
	if err := os.MkdirAll(run.cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("create state directory: %w", err)
	}
	if err := run.acquire(ctx); err != nil {
		return err
	}
	if err := run.load(); err != nil {
		return err
	}
	run.journal.RefusedPIN = source
	return run.save()
}

// Token is what was opened; not ok where nothing was, or the engine does not say.
func (i *Inspection) Token() (status engine.TokenStatus, ok bool) {
	inspector, ok := i.device.engine.(engine.TokenInspector)
	if !ok {
		return engine.TokenStatus{}, false
	}
	return inspector.TokenStatus(), true
}

// Close closes the token.
func (i *Inspection) Close() error { return i.device.Close() }

// Clock is what a device knows of the time.
type Clock struct {
	System time.Time
	// Floor is the earliest that it can be, and Source how that is known.
	Floor  time.Time
	Source string
	// Verification is the time that certificates are judged at.
	Verification time.Time
}

// Clock compares the system clock with what the device has verified. ErrClock, where
// RequireClock is set.
func (i *Inspection) Clock() (Clock, error) {
	d := i.device
	clock := Clock{System: d.cfg.Now().UTC()}
	clock.Floor, clock.Source = d.clockFloor()
	var err error
	clock.Verification, err = d.verificationTime()
	return clock, err
}

// Credentials returns those of the configuration, in its order, then those that it has
// no more.
func (i *Inspection) Credentials() []*CredentialInspection {
	var list []*CredentialInspection
	for _, c := range i.device.credentials {
		list = append(list, &CredentialInspection{c, i})
	}
	return list
}

// CredentialInspection is one credential of an Inspection. What asks the token wants
// an open one.
type CredentialInspection struct {
	c  *Credential
	of *Inspection
}

// Name returns the credential's name.
func (ci *CredentialInspection) Name() string { return ci.c.Name() }

// Check judges what the configuration makes of the credential, beside what the state
// directory holds. ErrConfig, ErrNotConfigured, lwm2m.ValidationError.
func (ci *CredentialInspection) Check() error {
	if err := ci.c.checkUse(); err != nil {
		return err
	}
	return ci.c.checkSecurity()
}

// Status is that of Credential.
func (ci *CredentialInspection) Status(ctx context.Context) (*Status, error) { return ci.c.Status(ctx) }

// History is what earlier runs have left: an operation to be gone on with, and the
// last attempt; either may be nil. It asks no token.
func (ci *CredentialInspection) History() (*OperationStatus, *Attempt) {
	return ci.c.journal.Operation.status(), ci.c.journal.LastAttempt
}

// Pending is the answer that a run gives without asking the server again; nil where it
// asks.
func (ci *CredentialInspection) Pending() *PendingError {
	if op := ci.c.journal.Operation; op != nil && op.Step == StepRequest {
		return ci.c.pending(op)
	}
	return nil
}

// IDevID opens the factory credential and returns its certificate, nil for a device
// without one. ErrIDevID.
func (ci *CredentialInspection) IDevID(ctx context.Context) (*x509.Certificate, error) {
	idevid, err := ci.c.openIDevID(ctx)
	if err == nil && !ci.c.withoutIDevID() {
		err = signs(idevid)
	}
	if err != nil {
		return nil, err
	}
	return idevid.leaf(), nil
}

// Bootstrap names what authenticates an enrolment: the first one, and that which takes the
// place of a certificate that has expired or is lost.
func (ci *CredentialInspection) Bootstrap() string { return ci.c.bootstrap() }

// signs has the key of a pair make a signature.
func signs(p *pair) error {
	if err := signsHandshakes(p.signer); err != nil {
		return fmt.Errorf("sign with %s: %w", p.key, err)
	}
	return nil
}

// Enrolled is the enrolled pair as it was found.
type Enrolled struct {
	Chain []*x509.Certificate // leaf first
	// Attributes are what the token reports of the key, nil where it reports nothing.
	Attributes *engine.KeyAttributes
	// Existing says that the key was not made by this program.
	Existing bool
	// ServerMade says that the server made it, outside of the HSM.
	ServerMade bool
	// Chained says why the chain does not lead to the trust anchors of the credential,
	// whatever the age of its leaf.
	Chained error
	// Pointed says what of the Security object is not that of the pair: a run makes it
	// so when it begins, or when it ends.
	Pointed error
}

// Enrolled opens the enrolled pair, makes a signature with its key and verifies its
// chain. ErrNotEnrolled, and engine.ErrNotFound beside it where the token has lost a
// part of it; ErrState where the parts are not of one pair.
func (ci *CredentialInspection) Enrolled(ctx context.Context) (*Enrolled, error) {
	c := ci.c
	kept, enrolled := c.current()
	if !enrolled {
		return nil, ErrNotEnrolled
	}
	p, err := c.openCredential(ctx, kept)
	if errors.Is(err, engine.ErrNotFound) {
		return nil, fmt.Errorf("%w: %w", ErrNotEnrolled, err)
	}
	if err == nil {
		err = signs(p)
	}
	if err != nil {
		return nil, err
	}
	e := &Enrolled{Chain: p.chain, Existing: kept.ExistingKey, ServerMade: kept.ServerMade}
	if inspector, ok := c.engine.(engine.KeyInspector); ok {
		attributes, err := inspector.KeyAttributes(ctx, p.key)
		if err != nil && !errors.Is(err, engine.ErrUnsupported) {
			return nil, err
		}
		e.Attributes = &attributes
	}
	now, err := c.verificationTime()
	if err != nil {
		return nil, err
	}
	trust, err := c.judges(p)
	if err != nil {
		return nil, err
	}
	_, e.Chained = trust.VerifyClient(p.chain, earlier(later(now, p.chain[0].NotBefore), p.chain[0].NotAfter))
	instance, _ := c.instance()
	if ci.of.restored[c.Name()] {
		e.Pointed = fmt.Errorf("the Security object has no instance /0/%d: %w", c.cfg.Security.Instance, ErrState)
	} else if key, ok := instance.PrivateKey.Engine(); !ok || key != kept.Key.Address {
		e.Pointed = fmt.Errorf("security instance /0/%d names another key than that of its certificate, %s: %w", c.cfg.Security.Instance, kept.Key, ErrState)
	}
	return e, nil
}

// Contact is how far an inspection came with the EST server.
type Contact struct {
	// As is what it showed: "the current certificate", or the IDevID's, or none.
	As string
	// Connected says that the handshake was completed, and Server is what the server
	// showed in it, nil where both ends have shown a pre-shared key.
	Connected bool
	Server    *x509.Certificate
}

// Contact opens a session with the EST server as the run does that comes next, asks for
// its CA certificates, whenever they were asked for last, and judges it by them. It asks
// once, and for nothing else. The errors are those of a run.
func (ci *CredentialInspection) Contact(ctx context.Context) (*Contact, error) {
	auth, err := ci.authenticator(ctx)
	if err != nil {
		return new(Contact), err
	}
	contact := &Contact{As: ci.c.showing(auth)}
	defer ci.c.asksAnew()()
	session, err := ci.c.dial(ctx, auth)
	if err != nil {
		return contact, err
	}
	defer ci.c.closeSession(session)
	contact.Connected = true
	if chain := session.PeerChain(); len(chain) > 0 {
		contact.Server = chain[0]
	}
	if asked, ok := session.(est.ClientAuthenticator); auth.leaf() != nil && (!ok || !asked.ClientAuthenticated()) {
		return contact, errors.New("the server did not ask for our certificate")
	}
	_, _, err = ci.c.meet(ctx, session, auth, auth.public())
	return contact, err
}

// authenticator is the pair for the next request: the enrolled one while it is good.
func (ci *CredentialInspection) authenticator(ctx context.Context) (*pair, error) {
	if kept, enrolled := ci.c.current(); enrolled {
		now, err := ci.c.verificationTime()
		if err != nil {
			return nil, err
		}
		current, err := ci.c.openCredential(ctx, kept)
		if err == nil && !now.After(current.chain[0].NotAfter) {
			return current, nil
		}
		if err != nil && !errors.Is(err, engine.ErrNotFound) && !errors.Is(err, ErrState) {
			return nil, err
		}
	}
	return ci.c.openIDevID(ctx)
}
