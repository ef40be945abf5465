package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/engine/file"
	"estenroll/engine/pkcs11"
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/est/https"
	"estenroll/internal/durable"
)

// drivers are the engines that this program knows.
var drivers = engine.Drivers{"pkcs11": pkcs11.Driver, file.Scheme: file.Driver}

// openDevice turns the settings into typed values, once, and opens the device.
func (s *settings) openDevice(ctx context.Context, out *output) (*estenroll.Device, error) {
	cfg, err := s.lifecycle(out, out.progress)
	if err != nil {
		return nil, &usageError{err}
	}
	return estenroll.Open(ctx, cfg)
}

// lifecycle makes the configuration, whose questions are out's and whose events,
// with those of the settings themselves, are tell's.
func (s *settings) lifecycle(out *output, tell func(estenroll.Event)) (cfg estenroll.Config, err error) {
	for _, one := range s.all() {
		if err := cmp.Or(one.required(), one.inRange()); err != nil {
			return cfg, s.of(one, err)
		}
	}
	token, err := s.tokenAddress(tell)
	if err != nil {
		return cfg, err
	}
	cfg = estenroll.Config{
		StateDir: s.stateDir, LockTimeout: s.lockTimeout, Command: s.command,
		OpenEngine: func(ctx context.Context, refused engine.PINSource) (engine.Engine, error) {
			if s.retryPIN {
				refused = engine.PINSource{}
			}
			return drivers.Open(ctx, token, engine.Options{LockDir: s.lockDir, LockTimeout: s.lockTimeout, Command: s.command, AddressSource: s.engineSource,
				RefusedPIN: refused, PINCopy: credentialFile(os.LookupEnv, pinCredential), PINCopyName: credentialSource, AskPIN: out.askPIN(os.Stdin)})
		},
		ParseAddress: drivers.Parse, RequireClock: s.requireClock, Progress: tell,
	}
	for _, one := range s.all() {
		credential, err := one.credentialConfig()
		if err != nil {
			return cfg, s.of(one, err)
		}
		cfg.Credentials = append(cfg.Credentials, credential)
	}
	return cfg, nil
}

// all returns the settings of each credential.
func (s *settings) all() []*settings {
	if len(s.credentials) > 0 {
		return s.credentials
	}
	return []*settings{s}
}

// of names the credential whose settings an error is about, where there are several.
func (s *settings) of(one *settings, err error) error {
	if one == s {
		return err
	}
	return fmt.Errorf("credential %q: %w", one.credential, err)
}

func (s *settings) credentialConfig() (cfg estenroll.CredentialConfig, err error) {
	cfg = estenroll.CredentialConfig{
		Name: s.credential, NoFallback: s.noFallback, PendingLimit: s.pendingLimit, Wait: s.wait, Tries: s.tries, RetryInterval: s.retryInterval, Policy: s.policy(),
		KeySpec: engine.KeySpec{Algorithm: s.algorithm()}, AllowExtractable: s.allowExtractable, ServerKeyGen: s.serverKeygen,
		Security: estenroll.Security{Instance: s.securityInstance, ServerURI: s.securityServer, ShortServerID: s.shortServerID},
	}
	if s.key != "" {
		if cfg.Key, err = objectAddress("key", s.key); err != nil {
			return cfg, err
		}
	}
	if s.decryptKey != "" {
		if cfg.DecryptKey, err = objectAddress("decrypt-key", s.decryptKey); err != nil {
			return cfg, err
		}
	}
	if cfg.IDevID, err = s.idevid(); err != nil {
		return cfg, err
	}
	anchors, err := readCertificates("trust-anchors", s.trustAnchors)
	if err != nil {
		return cfg, err
	}
	cfg.ImplicitTA = est.NoTrustAnchors()
	if s.trustAnchors != "" {
		if cfg.ImplicitTA, err = est.NewTrustAnchors(anchors); err != nil {
			return cfg, fmt.Errorf("trust-anchors: %s: %v", s.trustAnchors, err) // not %w: no server's answer is refused, a setting is wrong
		}
	}
	if cfg.AnchorAddress, err = anchorAddresses(s.anchorAddress); err != nil {
		return cfg, err
	}
	cfg.CACertsInterval = s.crtsInterval.value
	for _, text := range s.anchorFingerprints {
		fingerprint, err := est.ParseFingerprint(text)
		if err != nil {
			return cfg, fmt.Errorf("anchor-fingerprint: %w", err)
		}
		cfg.AnchorFingerprints = append(cfg.AnchorFingerprints, fingerprint)
	}
	server, err := readCertificates("security-server-certificate", s.securityServerCert)
	if err != nil {
		return cfg, err
	}
	if len(server) > 0 {
		cfg.Security.ServerCertificate = server[0].Raw
	}
	cfg.IgnoreAttributes = s.csrAttributes.word == "off"
	cfg.PoP = pops[s.pop.word]
	cfg.Request.PSS = s.rsaPadding.word == paddingPSS
	if err := s.request(&cfg.Request); err != nil {
		return cfg, err
	}
	cfg.RefuseOtherNames = s.subjectMismatch.word == "refuse"
	return cfg, s.transport(&cfg)
}

// idevid is the factory credential, or none: then there must be what takes its place.
func (s *settings) idevid() (at estenroll.IDevID, err error) {
	if s.noIDevID {
		byPassword := strings.HasPrefix(s.server, est.SchemeHTTPS+":") && s.httpUser != ""
		var wants []string
		if s.subject == "" {
			wants = append(wants, "subject")
		}
		if !byPassword && !s.bootstraps() {
			wants = append(wants, "a server of https:// with http-user or of coaps:// with psk-identity")
		}
		if len(wants) > 0 {
			return at, errors.New("no-idevid: it wants " + strings.Join(wants, ", and "))
		}
		return at, nil
	}
	if at.Key, err = objectAddress("idevid-key", s.idevidKey); err != nil {
		return at, err
	}
	if at.Certificate, err = objectAddress("idevid-certificate", s.idevidCert); err != nil {
		return at, err
	}
	at.Chain, err = readCertificates("idevid-chain", s.idevidChain)
	return at, err
}

// pops are the words of pop.
var pops = map[string]estenroll.PoP{"auto": estenroll.PoPAuto, "require": estenroll.PoPRequire, "off": estenroll.PoPOff}

// requiredSettings have no default.
var requiredSettings = []string{"engine", "server", "trust-anchors"}

func (s *settings) required() error {
	var missing []string
	for name, value := range map[string]string{"engine": s.engine, "server": s.server, "trust-anchors": s.trustAnchors} {
		if name == "trust-anchors" && s.noIDevID && s.bootstraps() {
			continue // the server that knows the key says whom to trust, and nothing refers to an anchor before
		}
		switch {
		case value != "":
		case name != "trust-anchors":
			missing = append(missing, name)
		case len(s.anchorFingerprints) == 0: // which vouch for a root too
			missing = append(missing, name+" (or anchor-fingerprint)")
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing settings: %s", strings.Join(slices.Sorted(slices.Values(missing)), ", "))
	}
	return nil
}

// bootstraps reports whether a pre-shared key authenticates the first boot.
func (s *settings) bootstraps() bool {
	return strings.HasPrefix(s.server, est.SchemeCoAPs+":") && s.pskIdentity != ""
}

// inRange refuses numbers that would only fail later, or that mean nothing.
func (s *settings) inRange() error {
	if s.blockSize < 16 || s.blockSize > 1024 || s.blockSize&(s.blockSize-1) != 0 {
		return fmt.Errorf("block-size: %d is none of 16, 32, 64, 128, 256, 512 and 1024", s.blockSize)
	}
	if s.maxRetransmit < 0 {
		return fmt.Errorf("max-retransmit: %d is negative", s.maxRetransmit)
	}
	if s.tries == 0 {
		return errors.New("tries: want at least 1")
	}
	if s.attempts == 0 || s.attempts > 1000 {
		return fmt.Errorf("attempts: %d is not from 1 to 1000", s.attempts)
	}
	if s.rekeyEvery > 1000 {
		return fmt.Errorf("rekey-every: %d is not from 0 to 1000", s.rekeyEvery)
	}
	switch {
	case s.stateDir == "":
		return errors.New("state-dir: empty")
	case !filepath.IsAbs(s.lockDir):
		return errors.New("lock-dir: want an absolute path, the same for all users of the token")
	}
	if err := estenroll.CheckName(s.credential); err != nil {
		return fmt.Errorf("credential: %w", err)
	}
	if s.shortServerID == 65535 {
		return fmt.Errorf("short-server-id: %d is not from 1 to 65534", s.shortServerID) // LwM2M Core 1.2 §E.1
	}
	for name, d := range map[string]time.Duration{
		"pending-limit": s.pendingLimit, "retry-interval": s.retryInterval, "ack-timeout": s.ackTimeout,
		"handshake-timeout": s.handshakeTimeout, "lock-timeout": s.lockTimeout, "hook-timeout": s.hookTimeout,
	} {
		if d <= 0 {
			return fmt.Errorf("%s: %s is not longer than nothing", name, d)
		}
	}
	for name, d := range map[string]time.Duration{"exchange-timeout": s.exchangeTimeout, "wait": s.wait} {
		if d < 0 {
			return fmt.Errorf("%s: %s is negative", name, d)
		}
	}
	return nil
}

// tokenAddress parses the engine's address. Every user of the machine can read
// an argument list, so a PIN in one is refused.
func (s *settings) tokenAddress(tell func(estenroll.Event)) (engine.Address, error) {
	token, err := drivers.Parse(s.engine)
	if err != nil {
		return nil, fmt.Errorf("engine: %w", err)
	}
	if token.Scheme() == file.Scheme {
		tell(estenroll.Event{Warning: true, Message: "the keys are in files, which is for development: whoever can read " + token.String() + " has them"})
	}
	if uri, ok := token.(pkcs11.URI); ok && uri.HasPINValue() {
		if s.engineFromArgs {
			return nil, errors.New("engine: a PIN in an argument list is readable by every user: change it, and name its file with pin-source=file:… instead")
		}
		tell(estenroll.Event{Warning: true, Message: "the PIN stands in the clear in " + s.engineSource.Path + ": pin-source=file:… keeps it in a file of its own"})
	} else if ok {
		if info, err := os.Stat(uri.PINSource); err == nil && info.Mode().Perm()&0o077 != 0 {
			tell(estenroll.Event{Warning: true, Message: "the PIN file " + uri.PINSource + " is open to other users: chmod 600"})
		}
	}
	return token, nil
}

// objectAddress parses the address of an object: how to reach and open the token
// is said in one place, the engine's address.
func objectAddress(setting, text string) (engine.Address, error) {
	at, err := drivers.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	if uri, ok := at.(pkcs11.URI); ok && (uri.ModuleName != "" || uri.ModulePath != "" || uri.PINSource != "" || uri.HasPINValue()) {
		return nil, fmt.Errorf("%s: module-name, module-path, pin-source and pin-value belong in engine", setting)
	}
	return at, nil
}

func (s *settings) request(template *csr.Template) (err error) {
	if s.subject != "" {
		if template.RawSubject, err = csr.ParseSubject(s.subject); err != nil {
			return err
		}
	}
	for _, text := range s.san {
		san, err := csr.ParseSAN(text)
		if err != nil {
			return err
		}
		template.SANs = append(template.SANs, san)
	}
	if template.KeyUsage, err = csr.ParseKeyUsage(s.keyUsage); err != nil {
		return err
	}
	template.ExtKeyUsage, err = csr.ParseExtKeyUsage(s.extKeyUsage)
	return err
}

// transport chooses how EST is carried: by the scheme of the server's URI.
func (s *settings) transport(cfg *estenroll.CredentialConfig) error {
	server, err := est.ParseURI(s.server)
	if err != nil {
		return fmt.Errorf("server: %w", err)
	}
	label, err := s.resources(server)
	if err != nil {
		return err
	}
	cfg.ServerURI, cfg.ServerName = server.WithLabel(label).String(), server.Host
	if server.Scheme == est.SchemeHTTPS && (s.pskIdentity != "" || s.pskKeyFile != "") {
		return errors.New("psk-identity, psk-key-file: there are no pre-shared keys over HTTPS")
	}
	if server.Scheme == est.SchemeHTTPS {
		return s.overHTTPS(cfg, https.Config{URI: server, Label: label, ExchangeTimeout: s.exchangeTimeout, HandshakeTimeout: s.handshakeTimeout})
	}
	key, err := s.psk(os.LookupEnv)
	if err != nil {
		return err
	}
	cfg.PSK = key != nil
	options := coaps.Config{
		URI: server, Label: label, Discovery: s.discovery.word == "on",
		BlockSize: s.blockSize, AckTimeout: s.ackTimeout, MaxRetransmit: s.maxRetransmit,
		ExchangeTimeout: s.exchangeTimeout, HandshakeTimeout: s.handshakeTimeout,
	}
	if s.maxRetransmit == 0 {
		options.MaxRetransmit = -1 // there, zero means the default
	}
	cfg.Dial = func(ctx context.Context, with estenroll.Connection) (est.Session, error) {
		dial := options
		dial.Certificate, dial.Key, dial.Trust, dial.Now, dial.Warn = with.Certificate, with.Key, with.Trust, with.Now, with.Warn
		dial.Provisional = with.Provisional
		if with.PSK {
			key, err := s.readPSK(key, with.Warn)
			if err != nil {
				return nil, err
			}
			defer clear(key)
			dial.Certificate, dial.Key = nil, nil
			dial.PSKIdentity, dial.PSK = s.pskIdentity, func() ([]byte, error) { return slices.Clone(key), nil }
		}
		return coaps.Dial(ctx, dial)
	}
	return nil
}

// readPSK reads the pre-shared key for a session by it, which is said each time.
func (s *settings) readPSK(read func() ([]byte, error), warn func(string, ...any)) ([]byte, error) {
	if info, err := os.Stat(s.pskKeyFile); err == nil && info.Mode().Perm()&0o077 != 0 {
		warn("the file of the pre-shared key %s is open to other users: chmod 600", s.pskKeyFile)
	}
	warn("a pre-shared key stands for the certificates of both ends until the device is enrolled: whoever else has it can pass for the device, and for %s", s.server)
	return read()
}

// overHTTPS has EST carried by HTTPS.
func (s *settings) overHTTPS(cfg *estenroll.CredentialConfig, options https.Config) (err error) {
	if options.User, options.Password, err = s.httpPassword(os.LookupEnv); err != nil {
		return err
	}
	cfg.Dial = func(ctx context.Context, with estenroll.Connection) (est.Session, error) {
		if info, err := os.Stat(s.httpPasswordFile); err == nil && info.Mode().Perm()&0o077 != 0 {
			with.Warn("the password file %s is open to other users: chmod 600", s.httpPasswordFile)
		}
		dial := options
		dial.Certificate, dial.Key, dial.Trust, dial.Now = with.Certificate, with.Key, with.Trust, with.Now
		dial.Provisional = with.Provisional
		return https.Dial(ctx, dial)
	}
	return nil
}

// resources says where on the server EST is. A path in the server's URI is used as
// it is, so it is not to be looked for, nor to be made longer; and only over CoAPs
// there is a way to look for it.
func (s *settings) resources(server est.URI) (label est.Label, err error) {
	discovery := s.discovery.word == "on"
	if s.label != "" {
		if label, err = est.ParseLabel(s.label); err != nil {
			return "", err
		}
	}
	switch {
	case server.Root != est.DefaultRoot && (discovery || label != ""):
		return "", errors.New("server: it has a path: want it without, or neither discovery nor label")
	case discovery && server.Scheme != est.SchemeCoAPs:
		return "", errors.New("discovery: there is none over HTTPS: want a path in server, or none for " + est.DefaultRoot)
	}
	return label, nil
}

const certificatesLimit = 1 << 20 // bytes

func readCertificates(setting, path string) ([]*x509.Certificate, error) {
	if path == "" {
		return nil, nil
	}
	data, err := durable.ReadFile(path, certificatesLimit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	certs, err := estenroll.ParseTrustAnchors(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", setting, path, err)
	}
	return certs, nil
}
