package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"estenroll"
	"estenroll/engine"
	"estenroll/est"
)

// CheckName is what a Check is of.
type CheckName string

// The checks, in their order.
const (
	CheckConfiguration CheckName = "configuration" // the settings, and the state directory that they name
	CheckToken         CheckName = "token"         // the module and the token
	CheckPIN           CheckName = "PIN"
	CheckPair          CheckName = "pair" // of each credential, its attributes and its chain
	CheckClock         CheckName = "clock"
	CheckServer        CheckName = "server" // of each credential: path, handshake, EST root
)

// Result is what a check has come to.
type Result string

// The results, from the best to the worst.
const (
	OK      Result = "ok"
	Skipped Result = "skipped" // since another one has failed
	Warning Result = "warning"
	Failed  Result = "failed"
)

var results = []Result{OK, Skipped, Warning, Failed}

// Finding is what a person should know, with what to do about it.
type Finding struct {
	Result Result `json:"result"`
	Text   string `json:"text"`
	// Advice is a thing to do. Where it is empty, Err says enough to give one.
	Advice string `json:"advice,omitempty"`
	// Err is what a renewal ends with for this; nil where it does not end for it.
	Err error `json:"-"`
}

// Check is one check of a device, or of one of its credentials.
type Check struct {
	Name       CheckName `json:"check"`
	Credential string    `json:"credential,omitempty"`
	Result     Result    `json:"result"`
	// Text is what was found, or why nothing was looked for.
	Text     string     `json:"text"`
	Findings []*Finding `json:"findings,omitempty"`
}

func (c *Check) add(f Finding) {
	c.Findings = append(c.Findings, &f)
	if slices.Index(results, f.Result) > slices.Index(results, c.Result) {
		c.Result = f.Result
	}
}

// fail is a finding for which a renewal ends with an error.
func (c *Check) fail(advice string, err error) {
	c.add(Finding{Result: Failed, Text: oneLine(err), Advice: advice, Err: err})
}

// warn is a finding for which it does not end.
func (c *Check) warn(advice, format string, args ...any) {
	c.add(Finding{Result: Warning, Text: fmt.Sprintf(format, args...), Advice: advice})
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// Diagnosis is all checks of a device.
type Diagnosis struct {
	Checks []*Check
}

// Causes are what a renewal of each credential ends with, as far as can be known: for
// each the first that is in its way, none for one that will be renewed.
func (d *Diagnosis) Causes() []error {
	first := map[string]*Finding{} // by credential, "" for what is in the way of all
	for _, check := range d.Checks {
		for _, f := range check.Findings {
			known := first[check.Credential]
			// What passes, such as another run, hides nothing that does not.
			if f.Err != nil && (known == nil || known.Result != Failed && f.Result == Failed) {
				first[check.Credential] = f
			}
		}
	}
	if all := first[""]; all != nil && all.Result == Failed {
		return []error{all.Err}
	}
	var causes []error
	for _, f := range first {
		causes = append(causes, f.Err)
	}
	return causes
}

// doctor is one examination.
type doctor struct {
	*Diagnosis
	device      *estenroll.Inspection
	cfg         estenroll.Config
	credentials []*estenroll.CredentialInspection
	at          *Check // the check at work, whose findings the lifecycle's warnings are
	clock       estenroll.Clock
	clockErr    error
	ends        map[string]time.Time // of certificates, by credential
	never       map[string]bool      // credentials that were not enrolled yet
}

// Configure makes a configuration of the settings of a program, and tells of what is
// odd in them.
type Configure func(tell func(estenroll.Event)) (estenroll.Config, error)

// Examine looks at a device, and says for each finding what to do about it, or with
// which error a run ends for it. only chooses its credentials. It changes nothing but
// as estenroll.Inspection does.
func Examine(ctx context.Context, configure Configure, only func(credential string) bool) *Diagnosis {
	d := &doctor{Diagnosis: new(Diagnosis), ends: map[string]time.Time{}, never: map[string]bool{}}
	if !d.configuration(configure, only) {
		for _, name := range []CheckName{CheckToken, CheckPIN, CheckPair, CheckClock, CheckServer} {
			d.skip(name, "", CheckConfiguration)
		}
		return d.Diagnosis
	}
	d.clock, d.clockErr = d.device.Clock()
	blocked := d.token(ctx)
	defer func() { _ = d.device.Close() }() // nothing was changed
	if blocked == "" && d.clockErr != nil {
		blocked = CheckClock
	}
	for _, c := range d.credentials {
		if blocked == "" {
			d.pair(ctx, d.begin(CheckPair, c.Name()), c)
		} else {
			d.skip(CheckPair, c.Name(), blocked)
		}
		d.history(c)
	}
	d.checkClock()
	for _, c := range d.credentials {
		if blocked == "" {
			d.server(ctx, d.begin(CheckServer, c.Name()), c)
		} else {
			d.skip(CheckServer, c.Name(), blocked)
		}
	}
	return d.Diagnosis
}

// begin makes a check the one at work.
func (d *doctor) begin(name CheckName, credential string) *Check {
	d.at = &Check{Name: name, Credential: credential, Result: OK}
	d.Checks = append(d.Checks, d.at)
	return d.at
}

func (d *doctor) skip(name CheckName, credential string, since CheckName) {
	check := d.begin(name, credential)
	check.Result, check.Text = Skipped, fmt.Sprintf("for the %s, which comes first", since)
}

// tell makes a warning of the lifecycle a finding of the check at work.
func (d *doctor) tell(event estenroll.Event) {
	if event.Warning {
		d.at.warn("", "%s", event.Message)
	}
}

func (d *doctor) configuration(configure Configure, only func(string) bool) bool {
	check := d.begin(CheckConfiguration, "")
	cfg, err := configure(d.tell)
	if err == nil {
		cfg.Progress = d.tell
		d.cfg, check.Text = cfg, "the state directory is "+cfg.StateDir
		d.device, err = estenroll.Inspect(cfg)
	}
	if err != nil {
		check.fail("", err)
		return false
	}
	if busy := d.device.Busy(); busy != nil {
		check.add(Finding{Result: Warning, Text: oneLine(busy), Err: busy})
	}
	for _, c := range d.device.Credentials() {
		if !only(c.Name()) {
			continue
		}
		switch err := c.Check(); {
		case errors.Is(err, estenroll.ErrNotConfigured):
			check.warn("name it below credentials again, or destroy what is left of it: est-enroll reset --credential "+c.Name(), "%v", err)
			continue
		case err != nil:
			check.fail("", fmt.Errorf("credential %q: %w", c.Name(), err))
		}
		d.credentials = append(d.credentials, c)
	}
	return check.Result != Failed
}

// token opens it: one check of what is there, and one of whether it lets us in. It
// returns the one that the others wait for.
func (d *doctor) token(ctx context.Context) (blocked CheckName) {
	check := d.begin(CheckToken, "")
	err := d.device.OpenToken(ctx)
	if errors.Is(err, estenroll.ErrBusy) {
		check.Result, check.Text = Skipped, fmt.Sprintf("for the %s, which another run has", CheckConfiguration)
		d.skip(CheckPIN, "", CheckConfiguration)
		return CheckConfiguration
	}
	var refused *engine.PINError
	if err != nil && !errors.As(err, &refused) {
		check.fail("", err)
		d.skip(CheckPIN, "", CheckToken)
		return CheckToken
	}
	check.Text = "it is there"
	status, known := d.device.Token()
	if known {
		check.Text = status.Address.String()
		if status.Module != "" { // keys in files have none
			check.Text += ", of " + status.Module
		}
	}
	if status.ReadOnly {
		check.fail("", fmt.Errorf("%s: %w", status.Address, engine.ErrTokenReadOnly))
	}
	check = d.begin(CheckPIN, "")
	if err != nil {
		check.fail("", err)
		return CheckPIN
	}
	switch {
	case !known:
		check.Text = "the token is open"
	case !status.LoginRequired:
		check.Text = "the token wants none"
	case status.PINSource.IsZero():
		check.add(Finding{
			Result: Failed, Text: "a person has typed it: a run of a timer or of cron has nobody to ask",
			Advice: "name its file with pin-source in the engine's address; if the service has it as systemd's credential, have systemd run the doctor: " +
				"systemd-run --pipe -p User=est-enroll -p LoadCredentialEncrypted=est-enroll-pin:FILE est-enroll doctor",
			Err: engine.ErrPINMissing,
		})
	default:
		check.Text = "the token takes that of " + status.PINSource.Path
	}
	return ""
}

// fallback reports whether an expired or lost certificate may be replaced by an
// enrolment with the IDevID.
func (d *doctor) fallback(credential string) bool {
	return !slices.ContainsFunc(d.cfg.Credentials, func(c estenroll.CredentialConfig) bool { return c.Name == credential && c.NoFallback })
}

// pair looks at the enrolled pair, and at the IDevID, which is the way back from it.
func (d *doctor) pair(ctx context.Context, check *Check, c *estenroll.CredentialInspection) {
	status, err := c.Status(ctx)
	if err != nil {
		check.fail("", err)
		return
	}
	idevid, noWayBack := c.IDevID(ctx)
	if noWayBack == nil && idevid != nil {
		noWayBack = d.valid(idevid, estenroll.ErrIDevID)
	}
	fallback, bootstrap := d.fallback(c.Name()), c.Bootstrap()
	enrolled, err := c.Enrolled(ctx)
	never := !status.Enrolled && len(status.Previous) == 0
	d.never[c.Name()] = never
	switch missing := errors.Is(err, estenroll.ErrNotEnrolled); {
	case never && noWayBack != nil:
		check.fail("", noWayBack)
	case never && status.Pending != nil:
		check.Text = "the first boot has begun"
	case never:
		check.Text = bootstrap + " is for the first boot, there is no IDevID"
		if idevid != nil {
			check.Text = fmt.Sprintf("the IDevID, valid until %s, is there for the first boot", stamp(idevid.NotAfter))
		}
		check.add(Finding{Result: Warning, Text: "no certificate was enrolled yet", Advice: "est-enroll enroll", Err: err})
	case missing && fallback && noWayBack == nil:
		check.warn("est-enroll enroll does it now", "%s: a renewal that is due enrols again with %s", oneLine(err), bootstrap)
	case err != nil:
		check.fail("", err)
	default:
		d.ends[c.Name()] = enrolled.Chain[0].NotAfter
		d.enrolled(check, status, enrolled, bootstrap, fallback, noWayBack)
	}
}

// enrolled is what there is to say of a pair that is whole.
func (d *doctor) enrolled(check *Check, status *estenroll.Status, e *estenroll.Enrolled, bootstrap string, fallback bool, noWayBack error) {
	leaf := e.Chain[0]
	check.Text = fmt.Sprintf("%s, valid until %s", engine.AlgorithmOf(leaf.PublicKey), stamp(leaf.NotAfter))
	if r := status.Renewal; r != nil {
		check.Text += ", to be renewed from " + stamp(r.Due)
	}
	const generates = "est-enroll renew --force --rekey has the token generate another key"
	advice := generates
	if e.Existing {
		advice = "without key the device generates its own: leave it out, then est-enroll reset and enroll"
	}
	if loose := looseness(e.Attributes); loose != "" {
		check.warn(advice, "the key is less protected than a generated one: %s", loose)
	} else {
		check.Text += ", its key private, sensitive and not extractable"
	}
	if e.ServerMade {
		check.warn("leave server-keygen out, then "+generates, "the server has made the key, outside of the HSM: whoever had it there can use it")
	}
	if e.Chained != nil {
		check.warn("the next renewal stores what the server gives then; if that is not enough, ask the people of the CA for the whole chain", "the chain leads to no trust anchor: %s", oneLine(e.Chained))
	}
	if e.Pointed != nil {
		check.warn("the next run that renews writes it anew", "%s", oneLine(e.Pointed))
	}
	expired := d.clock.Verification.After(leaf.NotAfter)
	switch {
	case expired && !fallback:
		check.fail("", fmt.Errorf("valid until %s, and no-fallback is set: %w", stamp(leaf.NotAfter), estenroll.ErrExpired))
	case expired && noWayBack != nil:
		check.fail("", fmt.Errorf("valid until %s, and the way back is closed: %w", stamp(leaf.NotAfter), noWayBack))
	case expired:
		next := "the next run"
		if r := status.Renewal; r != nil && r.State == estenroll.RenewalWaits {
			next = fmt.Sprintf("a run from %s on", stamp(r.NextAttempt))
		}
		check.warn("est-enroll enroll does it now", "it has expired: %s enrols again with %s", next, bootstrap)
	case fallback && noWayBack != nil:
		check.warn("check idevid-key and idevid-certificate: with them a certificate that has expired is replaced", "there is no way back: %s", oneLine(noWayBack))
	case d.clock.Verification.Before(leaf.NotBefore):
		check.warn("see the clock", "it is not valid before %s", stamp(leaf.NotBefore))
	}
}

// looseness says what a token does not promise of a key that was generated.
func looseness(attributes *engine.KeyAttributes) string {
	if attributes == nil {
		attributes = new(engine.KeyAttributes)
	}
	var loose []string
	for _, rule := range []struct {
		name string
		got  *bool
		want bool
	}{{"private", attributes.Private, true}, {"sensitive", attributes.Sensitive, true}, {"extractable", attributes.Extractable, false}} {
		switch {
		case rule.got == nil:
			loose = append(loose, "the token does not say whether it is "+rule.name)
		case *rule.got != rule.want && rule.want:
			loose = append(loose, "it is not "+rule.name)
		case *rule.got != rule.want:
			loose = append(loose, "it is "+rule.name)
		}
	}
	return strings.Join(loose, ", ")
}

// history adds what earlier runs have left to the check at work.
func (d *doctor) history(c *estenroll.CredentialInspection) {
	op, last := c.History()
	if pending := c.Pending(); pending != nil {
		d.at.add(Finding{Result: Warning, Text: oneLine(pending), Err: pending,
			Advice: "est-enroll renew asks again then, with the same key and request; est-enroll cancel ends it"})
	} else if op != nil {
		d.at.warn("the next run goes on with it: est-enroll renew", "unfinished: %s at step %s, begun %s", op.Kind, op.Step, stamp(op.StartedAt))
	}
	if last != nil && last.Error != "" {
		command := "renew --force"
		if d.never[c.Name()] {
			command = "enroll"
		}
		d.at.warn("if no other check says why, est-enroll -v "+command+" tries it now", "the last attempt (%s) failed at %s: %s", last.Kind, stamp(last.Time), strings.ReplaceAll(last.Error, "\n", "; "))
	}
}

// valid says when a certificate is valid, if it is not now.
func (d *doctor) valid(cert *x509.Certificate, is error) error {
	switch now := d.clock.Verification; {
	case now.After(cert.NotAfter):
		return fmt.Errorf("it has expired at %s: %w", stamp(cert.NotAfter), is)
	case now.Before(cert.NotBefore):
		return fmt.Errorf("it is not valid before %s: %w", stamp(cert.NotBefore), is)
	}
	return nil
}

// checkClock compares the clock with all that is known of the time without asking
// anybody: EST over CoAPs has no date in its answers.
func (d *doctor) checkClock() {
	check := d.begin(CheckClock, "")
	check.Text = fmt.Sprintf("the system clock says %s, after %s, which is %s", stamp(d.clock.System), stamp(d.clock.Floor), d.clock.Source)
	const advice = "compare the clock with another one and set it"
	switch {
	case d.clockErr != nil:
		check.Text = ""
		check.fail("", d.clockErr)
	case d.clock.System.Before(d.clock.Floor):
		check.Text = ""
		check.warn(advice, "the system clock says %s: runs verify with %s, %s, at which the age of a certificate stands still", stamp(d.clock.System), d.clock.Source, stamp(d.clock.Floor))
	}
	for _, c := range d.credentials {
		if end := d.ends[c.Name()]; !end.IsZero() && d.clock.System.After(end) {
			check.warn(advice, "it is after %s, the end of the certificate of %s: unless the device was away for so long, the clock is ahead", stamp(end), c.Name())
		}
		if _, last := c.History(); last != nil && last.Time.After(d.clock.System) {
			check.warn(advice, "the last attempt of %s was at %s: the clock was ahead then, or is behind now", c.Name(), stamp(last.Time))
		}
	}
}

// server finds out how far the way to the EST server is open: datagrams or a
// connection, the handshake with the pair that the next run shows, and the EST root.
func (d *doctor) server(ctx context.Context, check *Check, c *estenroll.CredentialInspection) {
	at := slices.IndexFunc(d.cfg.Credentials, func(cfg estenroll.CredentialConfig) bool { return cfg.Name == c.Name() })
	cfg := d.cfg.Credentials[at]
	overHTTPS := strings.HasPrefix(cfg.ServerURI, est.SchemeHTTPS+":")
	if net.ParseIP(cfg.ServerName) == nil && !overHTTPS { // whose proxy may know more names
		if _, err := net.DefaultResolver.LookupHost(ctx, cfg.ServerName); err != nil {
			check.fail("check the name in server, and that this device has a name server that knows it", fmt.Errorf("path: %w: %w", err, est.ErrUnreachable))
			return
		}
	}
	contact, err := c.Contact(ctx)
	switch {
	case err == nil && contact.Server == nil:
		check.Text = fmt.Sprintf("path, handshake and EST root: %s answers %s", cfg.ServerURI, contact.As)
	case err == nil:
		check.Text = fmt.Sprintf("path, handshake and EST root: %s answers %s, and its CA certificates vouch for it", cfg.ServerURI, contact.As)
	case errors.Is(err, estenroll.ErrIDevID):
		check.Result, check.Text = Skipped, fmt.Sprintf("for the %s, which comes first", CheckPair)
	case overHTTPS && contact.Connected && errors.Is(err, est.ErrUnreachable):
		check.fail("the handshake passes, and the answer does not come: the server's log knows, or what lies between", fmt.Errorf("EST root: %w", err))
	case overHTTPS && errors.Is(err, est.ErrUnreachable):
		check.fail("let TCP pass to the host and port in server, or name the proxy in HTTPS_PROXY: a firewall, another address, or a server that does not run", fmt.Errorf("path: %w", err))
	case contact.Connected && errors.Is(err, est.ErrUnreachable):
		check.fail("the handshake passes, and a larger answer does not: try a smaller block-size, and look at what lies between", fmt.Errorf("EST root: %w", err))
	case contact.Connected:
		check.fail("", fmt.Errorf("EST root: %w", err))
	case errors.Is(err, est.ErrPSKUnanswered):
		check.fail("", fmt.Errorf("handshake: %w", err))
	case errors.Is(err, est.ErrFellSilent):
		check.fail("small datagrams pass, so large ones do not (a firewall that loses fragments, an MTU), or the server does not like the certificate and says nothing: its log knows", fmt.Errorf("handshake: %w", err))
	case errors.Is(err, est.ErrUnreachable):
		check.fail("let UDP pass to the host and port in server, and back: a firewall, another address, or a server that does not run", fmt.Errorf("path: %w", err))
	default:
		check.fail("", fmt.Errorf("handshake: %w", err))
	}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
