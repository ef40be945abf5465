// Package estenroll is the life of a device's credential: it gets, keeps and
// renews a certificate whose private key never leaves the hardware security
// module (HSM), over EST (RFC 7030, RFC 9148), and is never stranded by a power
// cut. It owns the order of the steps and the journal that makes each of them
// repeatable; the engine, the CSR, the protocol and the LwM2M Security object are
// the rooms below it.
//
// [Open] locks a state directory and opens the token, once for all credentials
// of the device. [Credential.Enroll] is the first boot of one, [Credential.RenewDue]
// its renewal when the [Policy] says so, [Credential.Renew] one at once and
// [Credential.Rekey] one with a new key, [Credential.Recover] finishes what a killed
// run left, and each of the others begins with it. [Credential.Cancel] ends what is
// not committed instead, and [Credential.Status] changes nothing.
//
// What holds at every moment, whatever is killed (DESIGN.md §7): the Security
// object points at a usable credential, and the next run reaches the state that
// an uninterrupted one would have reached.
package estenroll

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/internal/durable"
	"estenroll/lwm2m"
)

const (
	securityName = "security.json"
	lockName     = "lock"
)

// IDevID is the factory credential (IEEE 802.1AR), by its engine addresses. The zero
// value is none: what Dial brings with it, a password or a pre-shared key, is the
// device's first credential then, and its last resort. It authenticates an enrolment and
// is nothing that the Security object could point at: before the first boot has ended
// that has no instance.
type IDevID struct {
	Key         engine.Address
	Certificate engine.Address
	// Chain is sent after the certificate. Default: none.
	Chain []*x509.Certificate
}

// Security says which instance of the LwM2M Security object an enrolment ends in.
type Security struct {
	// Instance of object /0. Default: 0.
	Instance uint16
	// ServerURI is resource 0. Default: the EST server's URI.
	ServerURI string
	// ServerCertificate is resource 4, DER. Default: the certificate that the EST
	// server showed when it issued ours (Certificate Usage 3, domain-issued), and
	// before that the first Implicit TA (usage 2, trust anchor assertion).
	ServerCertificate []byte
	// ShortServerID is resource 10, 1 to 65534, and no two instances have one.
	// Default: the number of the instance and 1.
	ShortServerID uint16
}

// Connection is what a session with the EST server needs of us.
type Connection struct {
	Certificate [][]byte // DER, leaf first; none, and no Key, of a device without an IDevID
	Key         crypto.Signer
	// Trust judges the server: the Implicit TA at first, the Explicit TA after.
	Trust *est.TrustAnchors
	// PSK asks for a session by the pre-shared key that Dial has, in the place of all of
	// these: see coaps.Config.
	PSK bool
	// Provisional asks for a session whatever certificate the server shows, on which
	// nothing but cacerts is sent: see coaps.Config. Trust is nobody's business then.
	Provisional bool
	// Now is the verification time.
	Now func() time.Time
	// Warn is told what a person should know of the session.
	Warn func(format string, args ...any)
}

// Config is what the lifecycle works with: what all credentials of a device
// share, and the credentials. Fields without a default are required.
type Config struct {
	// StateDir holds the journal, the Security object and the trust anchors; it
	// is created with mode 0700.
	StateDir string
	// LockTimeout bounds the wait for another run. Default: 30s.
	LockTimeout time.Duration
	// Command names this run to those who wait for it: "est-enroll renew". Whoever
	// may read the state directory reads it: no arguments. Default: the program's name.
	Command string
	// OpenEngine opens the token. refused is the source of the PIN that the
	// token refused in an earlier run, to be passed on in engine.Options.
	OpenEngine func(ctx context.Context, refused engine.PINSource) (engine.Engine, error)
	// ParseAddress parses the addresses of stored state: Drivers.Parse.
	ParseAddress func(string) (engine.Address, error)
	// RequireClock refuses to work while the system clock is behind what the
	// device has verified, instead of verifying with the later time.
	RequireClock bool
	// Now is the system clock. Default: time.Now.
	Now func() time.Time
	// Sleep waits for that clock, or returns the error of the context. Default: by a timer.
	Sleep func(context.Context, time.Duration) error
	// BuildTime is the earliest time the clock can show. Default: BuildTime().
	BuildTime time.Time
	// Rand is the source for CSR signatures that take one. Default: crypto/rand.
	Rand io.Reader
	// Progress is told of each step, in the caller's goroutine. Default: nobody.
	Progress func(Event)
	// Credentials that the device has, at least one, each with a name and a
	// Security instance of its own. A state directory of the time when there was
	// one credential without a name is that of the credential whose Security
	// instance it keeps, else of the first.
	Credentials []CredentialConfig
}

// CredentialConfig is what one credential is and where it comes from. Fields
// without a default are required.
type CredentialConfig struct {
	// Name of the credential, the label of its key in the token. See CheckName.
	Name   string
	IDevID IDevID
	// ServerURI of the EST server, and ServerName, its host: a DNS name or an IP
	// literal that its certificate must carry.
	ServerURI  string
	ServerName string
	// ImplicitTA judges the EST server until there is an Explicit TA. A device that
	// has est.NoTrustAnchors meets a server whose root AnchorFingerprints vouch for.
	ImplicitTA *est.TrustAnchors
	// AnchorFingerprints are roots that the operator vouches for: they become part of
	// the Explicit TA when the server publishes them. Default: those alone that an
	// anchor of the device vouches for.
	AnchorFingerprints []est.Fingerprint
	// CACertsInterval is how long after an answer of cacerts a renewal does without
	// asking for it again. Default: each renewal asks.
	CACertsInterval time.Duration
	// AnchorAddress says where in the HSM a trust anchor of the Explicit TA is stored
	// beside the state directory, as a certificate for other programs; nil for nowhere.
	// An address needs a label, and gets the certificate's fingerprint as its identifier
	// where it has none. What the token cannot store is a warning. Default: none is stored.
	AnchorAddress func(anchor *x509.Certificate) engine.Address
	// PSK has the sessions in which the IDevID would authenticate the device, those of its
	// enrolment, be by a pre-shared key that Dial has, for a bootstrap server that knows it
	// by that (RFC 7030 §3.3.3). The whole answer of cacerts is the Explicit TA then, by
	// which the new certificate and, where it is proven, the server's are judged.
	PSK bool
	// Dial opens a session with the EST server.
	Dial func(ctx context.Context, with Connection) (est.Session, error)
	// KeySpec is what key to generate, for the first certificate and at a rekey.
	// Default: EC P-256.
	KeySpec engine.KeySpec
	// ServerKeyGen has the EST server make each new key (RFC 7030 §4.4), and imports
	// it into the HSM, with a warning: for an HSM that makes poor ones, or a CA that
	// keeps a copy. Default: the HSM makes it, and nobody ever has it elsewhere.
	ServerKeyGen bool
	// DecryptKey is a key in the HSM that the server encrypts such a key for (RFC 7030
	// §4.4.1), an RSA key for decryption or an AES key that unwraps: its identifier is in
	// the CSR, and a key that is not encrypted for it is refused. With ServerKeyGen
	// only. Default: the key comes in the clear, by the protected session alone.
	DecryptKey engine.Address
	// Key is one that the HSM holds, the IDevID's perhaps: it is used as it is
	// instead of a generated one, and never destroyed. Default: none.
	Key engine.Address
	// AllowExtractable accepts a Key, with a warning, that is extractable or not
	// sensitive, or of which the token does not say so.
	AllowExtractable bool
	// Request is the Subject and the SANs of the first CSR, and the usages and the PSS
	// of each. An empty Subject means the IDevID's, if there is one.
	Request csr.Template
	// IgnoreAttributes asks no server what it wants of a CSR (CSR attributes). Default:
	// it is asked once for each operation, and what it says stands before KeySpec and
	// Request.
	IgnoreAttributes bool
	// PoP says when CSRs are linked to their session. Default: PoPAuto.
	PoP PoP
	// RefuseOtherNames refuses a certificate whose Subject or SAN is not what was
	// asked for. Default: it is taken, with a warning.
	RefuseOtherNames bool
	Security         Security
	// NoFallback forbids the return to the IDevID when the server refuses both
	// the new and the previous pair.
	NoFallback bool
	// Policy says when the certificate is renewed by RenewDue.
	Policy Policy
	// PendingLimit ends the polling of a request that the server keeps pending. That of
	// a rekey ends when half of what is left of the certificate has gone, if that is
	// sooner. Default: 7 days.
	PendingLimit time.Duration
	// Wait is how long a run itself waits, holding the lock of the state directory, until
	// a pending request may be repeated, in place of leaving that to the next run.
	// Default: 0.
	Wait time.Duration
	// Tries bounds how often an exchange without an answer is begun again, with
	// the same CSR, in one run. Default: 4.
	Tries uint
	// RetryInterval is the first pause between tries; it doubles. Default: 1s.
	RetryInterval time.Duration
}

// Event is a step that ended, or something a person should know.
type Event struct {
	// Credential is the name of the one that it is about; "" for the device.
	Credential string
	Step       Step
	Message    string
	Elapsed    time.Duration // zero for a message on its own
	Warning    bool
}

// Device is a state directory that is locked and a token that is open: one lock,
// one login, for all of its credentials. Neither it nor its credentials are safe
// for concurrent use.
type Device struct{ *shared }

// shared is what the credentials of a device have in common.
type shared struct {
	cfg         Config
	lock        *durable.Lock
	engine      engine.Engine
	store       engine.CertificateStore
	recoverer   engine.KeyRecoverer
	journal     *journal
	security    *lwm2m.SecurityObject
	clockWarned bool
	credentials []*Credential
	signers     map[engine.Address]crypto.Signer // that this run has opened
}

// Credential is one credential of an open device.
type Credential struct {
	*shared
	cfg struct {
		Config
		CredentialConfig
	}
	journal *record // its part of the device's journal
	// forgotten says that the journal has it and the configuration does not.
	forgotten  bool
	sent       bool                  // the CSR of the operation may have reached a server
	idevid     *pair                 // once it is opened
	decryption *engine.DecryptionKey // once it is opened
	opened     *pair                 // the enrolled one that was opened last
	told       map[string]bool       // what was said of sessions
	// explicitTA is the Explicit TA, explicitName the file that it is in.
	explicitTA   *est.TrustAnchors
	explicitName string
	caughtUp     bool // it is newer than the file
	// formerIDevID is an address of the factory certificate that the configuration
	// had before: the Security object has it.
	formerIDevID engine.Address
}

// Name returns the credential's name.
func (c *Credential) Name() string { return c.cfg.Name }

// ServerURI returns the EST server's.
func (c *Credential) ServerURI() string { return c.cfg.ServerURI }

// Configured reports whether the configuration has the credential. One that it
// has no more keeps what it has in the token: it can be looked at and reset.
func (c *Credential) Configured() bool { return !c.forgotten }

// credentialName, up to maxName, holds for a label in a token and for a file's name.
var credentialName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

const maxName = 64

// CheckName says what is wrong with the name of a credential: it labels objects
// in tokens and names files. The name is not repeated.
func CheckName(name string) error {
	if len(name) > maxName || !credentialName.MatchString(name) {
		return errors.New("want a name of 1 to 64 letters, digits, dots, dashes and underscores that begins with a letter or a digit")
	}
	return nil
}

func (c *Config) setDefaults() {
	if c.LockTimeout == 0 {
		c.LockTimeout = 30 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Sleep == nil {
		c.Sleep = sleep
	}
	if c.BuildTime.IsZero() {
		c.BuildTime = BuildTime()
	}
	if c.Progress == nil {
		c.Progress = func(Event) {}
	}
}

// checkCredentials refuses credentials that would take each other's place: names
// that differ only in case would, where they name files.
func (c *Config) checkCredentials() error {
	if len(c.Credentials) == 0 || len(c.Credentials) > maxCredentials {
		return fmt.Errorf("%d credentials, want 1 to %d: %w", len(c.Credentials), maxCredentials, ErrConfig)
	}
	for i, one := range c.Credentials {
		if err := CheckName(one.Name); err != nil {
			return fmt.Errorf("credential %d: %w: %w", i+1, err, ErrConfig)
		}
		if err := one.Policy.check(); err != nil {
			return fmt.Errorf("credential %q: %w: %w", one.Name, err, ErrConfig)
		}
		if one.Policy.RekeyEvery > 0 && one.Key != nil {
			return fmt.Errorf("credential %q: a rekey every %d renewals of %s: %w: %w", one.Name, one.Policy.RekeyEvery, one.Key, ErrKeyNamed, ErrConfig)
		}
		if one.DecryptKey != nil && !one.ServerKeyGen {
			return fmt.Errorf("credential %q: a key to decrypt with, %s, and none that the server makes: %w: %w", one.Name, one.DecryptKey, ErrKeyOrigin, ErrConfig)
		}
		if one.ServerKeyGen && one.Key != nil {
			return fmt.Errorf("credential %q: a key that the server makes, in place of %s: %w: %w", one.Name, one.Key, ErrKeyOrigin, ErrConfig)
		}
		for _, other := range c.Credentials[:i] {
			switch {
			case strings.EqualFold(one.Name, other.Name):
				return fmt.Errorf("credentials %q and %q: one name, but for the case: %w", other.Name, one.Name, ErrConfig)
			case one.Security.Instance == other.Security.Instance:
				return fmt.Errorf("credentials %q and %q: both have security instance %d: %w", other.Name, one.Name, one.Security.Instance, ErrConfig)
			}
		}
	}
	return nil
}

func (c *CredentialConfig) setDefaults() {
	if c.PendingLimit == 0 {
		c.PendingLimit = 7 * 24 * time.Hour
	}
	if c.Tries == 0 {
		c.Tries = 4
	}
	if c.RetryInterval == 0 {
		c.RetryInterval = time.Second
	}
	if c.Security.ServerURI == "" {
		c.Security.ServerURI = c.ServerURI
	}
	if c.Security.ShortServerID == 0 {
		c.Security.ShortServerID = c.Security.Instance + 1
	}
}

// Open locks the state directory, reads what it holds and opens the token. A
// PIN that the token refuses is remembered by its source, so that the next run
// does not spend another try on it. ErrConfig, ErrOwner, ErrBusy, ErrState,
// *engine.PINError.
func Open(ctx context.Context, cfg Config) (*Device, error) {
	cfg.setDefaults()
	if err := cfg.checkCredentials(); err != nil {
		return nil, err
	}
	d := &Device{&shared{cfg: cfg, signers: map[engine.Address]crypto.Signer{}}}
	if err := d.open(ctx); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Device) open(ctx context.Context) error {
	if err := durable.MkdirAll(d.cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("create state directory: %w", err)
	}
	if err := d.checkStateDir(); err != nil {
		return err
	}
	if err := d.acquire(ctx); err != nil {
		return err
	}
	if err := d.removeTemporaries(); err != nil {
		return err
	}
	if err := d.load(); err != nil {
		return err
	}
	if err := d.openEngine(ctx); err != nil {
		return err
	}
	for _, c := range d.credentials {
		if err := c.recognizeIDevID(ctx); err != nil {
			return err
		}
	}
	return nil
}

// checkStateDir refuses a directory of another user and warns of one that others can enter.
func (d *Device) checkStateDir() error {
	status, err := os.Stat(d.cfg.StateDir)
	if err != nil {
		return fmt.Errorf("check state directory: %w", err)
	}
	if stat, ok := status.Sys().(*syscall.Stat_t); ok && int(stat.Uid) != os.Geteuid() {
		owner := strconv.Itoa(int(stat.Uid))
		if known, err := user.LookupId(owner); err == nil {
			owner = known.Username
		}
		return fmt.Errorf("open %s: %w: it belongs to user %s: run as that user", d.cfg.StateDir, ErrOwner, owner)
	}
	if perm := status.Mode().Perm(); perm&0o077 != 0 {
		d.warn("the state directory %s has mode %04o: it is open to others, 0700 is enough", d.cfg.StateDir, perm)
	}
	return nil
}

func (d *Device) acquire(ctx context.Context) error {
	waiting, cancel := context.WithTimeout(ctx, d.cfg.LockTimeout)
	defer cancel()
	lock, err := durable.Acquire(waiting, filepath.Join(d.cfg.StateDir, lockName), 0o600, d.cfg.Command)
	var held *durable.LockedError
	switch {
	case errors.As(err, &held):
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("lock state directory: %w: %w", ErrBusy, err)
	case err != nil:
		return fmt.Errorf("lock state directory: %w", err)
	}
	d.lock = lock
	return nil
}

// load reads the journal and the Security object.
func (d *Device) load() (err error) {
	if d.journal, err = loadJournal(d.cfg.StateDir, d.cfg.ParseAddress); err != nil {
		return err
	}
	path := filepath.Join(d.cfg.StateDir, securityName)
	d.security, err = lwm2m.LoadSecurity(path, d.cfg.ParseAddress)
	if errors.Is(err, fs.ErrNotExist) {
		d.security, err = new(lwm2m.SecurityObject), nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrState)
	}
	return d.openCredentials()
}

// openCredentials gives each credential of the configuration its part of the journal.
func (d *Device) openCredentials() error {
	for _, cfg := range d.cfg.Credentials {
		cfg.setDefaults()
		c := &Credential{shared: d.shared}
		c.cfg.Config, c.cfg.CredentialConfig = d.cfg, cfg
		d.credentials = append(d.credentials, c)
	}
	d.nameRecord()
	for _, c := range d.credentials {
		if d.journal.Credentials[c.Name()] == nil {
			d.journal.Credentials[c.Name()] = new(record)
		}
		c.journal = d.journal.Credentials[c.Name()]
	}
	if n := len(d.journal.Credentials); n > maxCredentials {
		return fmt.Errorf("%d credentials, with those that the journal has of earlier: more than %d: %w", n, maxCredentials, ErrConfig)
	}
	for _, name := range slices.Sorted(maps.Keys(d.journal.Credentials)) {
		if d.Credential(name) == nil {
			c := &Credential{shared: d.shared, journal: d.journal.Credentials[name], forgotten: true}
			c.cfg.Config, c.cfg.Name = d.cfg, name
			d.credentials = append(d.credentials, c)
		}
	}
	return nil
}

// nameRecord gives the record of a journal of version 1 to the credential whose
// Security instance points at what it names, else to the first that has one, for
// there was one only, else to the first.
func (d *Device) nameRecord() {
	old, ok := d.journal.Credentials[unnamed]
	if !ok {
		return
	}
	var owner *Credential
	for _, c := range d.credentials {
		instance, exists := d.security.Instance(c.cfg.Security.Instance)
		at, ok := instance.ClientCertificate.Engine()
		if ok && old.names(at) || exists && owner == nil {
			owner = c
		}
	}
	d.journal.rename(unnamed, cmp.Or(owner, d.credentials[0]).Name())
}

// Credential returns the credential with a name; nil if there is none.
func (d *Device) Credential(name string) *Credential {
	for _, c := range d.credentials {
		if c.Name() == name {
			return c
		}
	}
	return nil
}

// Credentials returns the credentials in the order of the configuration, then
// those that it has no more, by name.
func (d *Device) Credentials() []*Credential { return slices.Clone(d.credentials) }

func (d *Device) openEngine(ctx context.Context) error {
	opened, err := d.cfg.OpenEngine(ctx, d.journal.RefusedPIN)
	if d.journal.rememberPIN(err) {
		return errors.Join(err, d.save())
	}
	if err != nil {
		return err
	}
	if err := d.use(opened); err != nil {
		return err
	}
	if !d.journal.RefusedPIN.IsZero() {
		d.journal.RefusedPIN = engine.PINSource{}
		return d.save()
	}
	return nil
}

// use takes an engine that can do what the lifecycle needs. It is the device's then.
func (d *Device) use(opened engine.Engine) error {
	d.engine = opened
	var ok bool
	if d.store, ok = opened.(engine.CertificateStore); !ok {
		return fmt.Errorf("open engine: it cannot store certificates: %w", engine.ErrUnsupported)
	}
	if d.recoverer, ok = opened.(engine.KeyRecoverer); !ok {
		return fmt.Errorf("open engine: it cannot judge what a crash left: %w", engine.ErrUnsupported)
	}
	return nil
}

// removeTemporaries removes what a kill in the middle of a write left behind.
func (d *Device) removeTemporaries() error {
	names := []string{journalName, securityName}
	entries, err := os.ReadDir(d.cfg.StateDir)
	if err != nil {
		return fmt.Errorf("clean state directory: %w", err)
	}
	for _, entry := range entries {
		if match := taTemporary.FindStringSubmatch(entry.Name()); match != nil {
			names = append(names, match[1])
		}
	}
	if err := durable.RemoveTemporary(d.cfg.StateDir, names...); err != nil {
		return fmt.Errorf("clean state directory: %w", err)
	}
	return nil
}

// Close closes the token and unlocks the state directory. It is idempotent.
func (d *Device) Close() error {
	var errs []error
	if d.engine != nil {
		errs = append(errs, d.engine.Close())
		d.engine = nil
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Release())
		d.lock = nil
	}
	return errors.Join(errs...)
}

func (d *shared) save() error { return d.journal.save(d.cfg.StateDir) }

// advance names the next step of the operation on the disk before it is done.
func (c *Credential) advance(step Step) error {
	c.journal.Operation.Step = step
	return c.save()
}

func (d *shared) warn(format string, args ...any) {
	d.cfg.Progress(Event{Message: fmt.Sprintf(format, args...), Warning: true})
}

func (c *Credential) warn(format string, args ...any) {
	c.cfg.Progress(Event{Credential: c.Name(), Message: fmt.Sprintf(format, args...), Warning: true})
}

// warnOnce says what each session would say again.
func (c *Credential) warnOnce(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); c.isNew(text) {
		c.warn("%s", text)
	}
}

// isNew reports a text that was not said yet.
func (c *Credential) isNew(text string) bool {
	if c.told[text] {
		return false
	}
	if c.told == nil {
		c.told = map[string]bool{}
	}
	c.told[text] = true
	return true
}

func (c *Credential) say(step Step, format string, args ...any) {
	c.cfg.Progress(Event{Credential: c.Name(), Step: step, Message: fmt.Sprintf(format, args...)})
}

// sayOnce is warnOnce of what is no warning.
func (c *Credential) sayOnce(step Step, format string, args ...any) {
	if text := fmt.Sprintf(format, args...); c.isNew(text) {
		c.say(step, "%s", text)
	}
}

// timed does one step and tells of it when it is done.
func (c *Credential) timed(step Step, do func() (string, error)) error {
	start := c.cfg.Now()
	message, err := do()
	if err != nil {
		return inStep(step, err)
	}
	c.cfg.Progress(Event{Credential: c.Name(), Step: step, Message: message, Elapsed: max(c.cfg.Now().Sub(start), 1)})
	return nil
}
