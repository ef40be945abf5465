package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"estenroll"
	"estenroll/engine"
	"estenroll/internal/agent"
	"estenroll/internal/durable"
)

const (
	defaultConfig = "/etc/est-enroll/config.yaml"
	configLimit   = 1 << 20 // bytes
	envPrefix     = "EST_ENROLL_"
)

// settings are what a person can set. The flags are the one list of them: the
// keys of the file and the variables of the environment are their names.
type settings struct {
	config string

	stateDir, lockDir     string
	engine                string
	credential            string
	server, trustAnchors  string
	anchorFingerprints    []string
	anchorAddress         string
	crtsInterval          parsed[time.Duration]
	discovery             oneOf
	label                 string
	httpUser              string
	httpPasswordFile      string
	pskIdentity           string
	pskKeyFile            string
	subject               string
	san                   []string
	keyUsage, extKeyUsage []string
	subjectMismatch       oneOf
	keyType, rsaPadding   oneOf
	csrAttributes, pop    oneOf
	serverKeygen          bool
	decryptKey            string
	key                   string
	allowExtractable      bool
	idevidKey, idevidCert string
	idevidChain           string
	noIDevID              bool
	securityInstance      uint16
	securityServer        string
	securityServerCert    string
	shortServerID         uint16
	noFallback            bool
	nominalUsage          parsed[estenroll.Fraction]
	maxMargin             parsed[time.Duration]
	attempts              uint
	noJitter              bool
	rekeyEvery            uint
	wait                  time.Duration // of the commands that ask a server
	pendingLimit          time.Duration
	lockTimeout           time.Duration
	tries                 uint
	retryInterval         time.Duration
	blockSize             int
	ackTimeout            time.Duration
	maxRetransmit         int
	exchangeTimeout       time.Duration
	handshakeTimeout      time.Duration
	requireClock          bool
	exportDir             string
	hookBefore, hookAfter string
	hookFailure           string
	hookTimeout           time.Duration
	retryPIN              bool
	quiet, verbose        bool
	engineSource          engine.PINSource // where the engine's address was read
	engineFromArgs        bool
	command               string // the program and its verb
	// credentials are the settings of each credential of the file, nil where
	// there is the one that these settings name.
	credentials []*settings
	// chosen says that --credential, or its variable, names the one to treat.
	chosen bool
}

// deviceWide are the settings that all credentials of a device share: no entry of
// "credentials" has them.
var deviceWide = map[string]bool{
	"credential": true, "engine": true, "state-dir": true, "lock-dir": true, "lock-timeout": true, "require-clock": true,
}

// keyTypeNames are the words of key-type, in the order of engine.Algorithms.
var keyTypeNames = []string{"ec-p256", "ec-p384", "ec-p521", "rsa-2048", "rsa-3072", "rsa-4096"}

// algorithm is what key-type asks for.
func (s *settings) algorithm() engine.Algorithm {
	return engine.Algorithms()[slices.Index(keyTypeNames, s.keyType.word)]
}

// The words of rsa-padding.
const (
	paddingPKCS1 = "pkcs1"
	paddingPSS   = "pss"
)

// onlyFlags are no settings of a file or an environment.
var onlyFlags = map[string]bool{"config": true, "help": true, "version": true, "quiet": true, "verbose": true, "retry-pin": true, "force": true, "yes": true, "json": true, "detailed-exit-code": true, "dry-run": true, "wait": true, "uri": true, "example": true}

func (s *settings) register(flags *pflag.FlagSet) {
	flags.SortFlags = false
	flags.StringVarP(&s.config, "config", "c", "", "configuration `file` (default "+defaultConfig+" where it exists)")
	flags.StringVar(&s.stateDir, "state-dir", "/var/lib/est-enroll", "`directory` of the journal, the Security object and the trust anchors")
	flags.StringVar(&s.engine, "engine", "", "engine `address` of the token: pkcs11:token=…?module-path=…&pin-source=file:…; for development, file:/directory")
	flags.StringVar(&s.credential, "credential", "device", "`name` of the credential, the label of its key in the token; of several, the one to treat")
	flags.StringVar(&s.server, "server", "", "EST server: coaps:// or https://host[:port][/path], the path is /.well-known/est unless given")
	s.discovery = oneOf{word: "off", allowed: []string{"off", "on"}}
	flags.Var(&s.discovery, "discovery", "on asks the server for the paths of its resources, one round trip a session (RFC 9148 §4.1)")
	flags.StringVar(&s.label, "label", "", "EST label, the `name` of one of the server's CAs (RFC 7030 §3.2.2)")
	flags.StringVar(&s.httpUser, "http-user", "", "`name` to give to an https:// server that asks for it, with a password, by HTTP Basic (RFC 7030 §3.2.3)")
	flags.StringVar(&s.httpPasswordFile, "http-password-file", "", "`file` with that password, in one line (default: systemd's credential "+passwordCredential+")")
	flags.StringVar(&s.pskIdentity, "psk-identity", "", "`name` by which a coaps:// bootstrap server knows this device, with a pre-shared key, in the place of the factory certificate, until it is enrolled (RFC 7030 §3.3.3)")
	flags.StringVar(&s.pskKeyFile, "psk-key-file", "", "`file` with that key, in hexadecimal in one line (default: systemd's credential "+pskCredential+")")
	flags.StringVar(&s.trustAnchors, "trust-anchors", "", "`file` with the CA certificates that judge the server at first (Implicit TA), PEM or DER")
	flags.StringArrayVar(&s.anchorFingerprints, "anchor-fingerprint", nil, "`SHA-256` of a root that is trusted when the server publishes it, repeatable, though no trust anchor of the device vouches for it; it can take the place of --trust-anchors")
	flags.StringVar(&s.anchorAddress, "anchor-address", "", "engine `address` where the HSM keeps each trust anchor of the Explicit TA: pkcs11:object=est-ta-{fingerprint}, with 16 digits of its SHA-256 for {fingerprint} (default: none is stored)")
	s.crtsInterval = parsed[time.Duration]{text: "0", parse: parseInterval, kind: "duration", wanted: "a duration, such as 30d or 720h, or 0"}
	flags.Var(&s.crtsInterval, "crts-interval", "the `time` after the server was asked for its CA certificates in which a renewal does not ask again: 30d or 720h, 0 asks each time")
	s.keyType = oneOf{keyTypeNames[0], keyTypeNames}
	flags.Var(&s.keyType, "key-type", "`type` of the key to generate, for the first certificate and at a rekey: ec-p256, ec-p384, ec-p521, rsa-2048, rsa-3072 or rsa-4096")
	flags.BoolVar(&s.serverKeygen, "server-keygen", false, "have the server make each new key, of the same type, and import it into the HSM (RFC 7030 §4.4, RFC 9148 §4.8): it has been outside of it then")
	flags.StringVar(&s.decryptKey, "decrypt-key", "", "engine `address` of a key in the HSM that the server encrypts such a key for, an RSA key for decryption or, with type=secret-key, an AES key that unwraps; the server knows it by its id (RFC 7030 §4.4.1)")
	flags.StringVar(&s.key, "key", "", "engine `address` of a key in the HSM to use as it is instead, the IDevID's perhaps; it is never destroyed")
	flags.BoolVar(&s.allowExtractable, "allow-extractable", false, "accept a --key that the HSM can give out")
	s.csrAttributes = oneOf{word: "auto", allowed: []string{"auto", "off"}}
	flags.Var(&s.csrAttributes, "csr-attributes", "auto asks the server, once for a certificate, what it wants of the key and the CSR, which stands before what is set here (RFC 7030 §4.5)")
	s.pop = oneOf{word: "auto", allowed: []string{"auto", "require", "off"}}
	flags.Var(&s.pop, "pop", "link the CSR to the session that it is sent in (RFC 7030 §3.5): auto when the server wants it, require always, off never")
	s.rsaPadding = oneOf{paddingPKCS1, []string{paddingPKCS1, paddingPSS}}
	flags.Var(&s.rsaPadding, "rsa-padding", "how an RSA key signs a CSR; a DTLS 1.2 handshake it always signs with pkcs1")
	flags.StringVar(&s.idevidKey, "idevid-key", "pkcs11:object=idevid;type=private", "engine `address` of the factory key (IDevID)")
	flags.StringVar(&s.idevidCert, "idevid-certificate", "pkcs11:object=idevid;type=cert", "engine `address` of the factory certificate")
	flags.StringVar(&s.idevidChain, "idevid-chain", "", "`file` with the certificates to send after the factory certificate")
	flags.BoolVar(&s.noIDevID, "no-idevid", false, "the device has no factory credential: to an https:// server http-user and its password, to a coaps:// server psk-identity and its key, alone authenticate the first boot, and the way back from an expired certificate; it wants a subject")
	flags.StringVar(&s.subject, "subject", "", "Subject to ask for, RFC 4514: CN=dev-17,O=Example (default: the IDevID's)")
	flags.StringArrayVar(&s.san, "san", nil, "SAN to ask for, repeatable: DNS:…, IP:…, URI:…, hwModuleName:<oid>;<hex serial>")
	flags.StringArrayVar(&s.keyUsage, "key-usage", nil, "key usage to ask for, `names` with commas, repeatable: digitalSignature, contentCommitment, keyEncipherment, dataEncipherment, keyAgreement, encipherOnly, decipherOnly")
	flags.StringArrayVar(&s.extKeyUsage, "ext-key-usage", nil, "extended key usage to ask for, `names` with commas, repeatable: clientAuth, serverAuth, codeSigning, emailProtection, timeStamping, OCSPSigning or OIDs")
	s.subjectMismatch = oneOf{word: "warn", allowed: []string{"warn", "refuse"}}
	flags.Var(&s.subjectMismatch, "subject-mismatch", "what to do with a certificate whose Subject or SAN, or with a key of the server whose type, is not what was asked for: warn and take it, or refuse it")
	flags.Uint16Var(&s.securityInstance, "security-instance", 0, "instance of the LwM2M Security object to keep")
	flags.StringVar(&s.securityServer, "security-server", "", "server `URI` of that instance (default: the EST server)")
	flags.StringVar(&s.securityServerCert, "security-server-certificate", "", "`file` with that server's certificate (default: the one the EST server shows)")
	flags.Uint16Var(&s.shortServerID, "short-server-id", 0, "short server id of that instance (default: its number and 1)")
	flags.BoolVar(&s.noFallback, "no-fallback", false, "never return to the IDevID when the server refuses both enrolled certificates")
	s.nominalUsage = parsed[estenroll.Fraction]{text: "0.9", parse: estenroll.ParseFraction, kind: "fraction", wanted: "a part of the lifetime, such as 0.9, 90% or 2/3"}
	flags.Var(&s.nominalUsage, "nominal-usage", "the `part` of its lifetime that a certificate is used for before it is renewed: 0.9, 90% or 2/3")
	s.maxMargin = parsed[time.Duration]{text: "30d", parse: estenroll.ParseMargin, kind: "duration", wanted: "a duration, such as 30d or 720h"}
	flags.Var(&s.maxMargin, "max-margin", "the longest `time` before its end that a certificate is renewed: 30d or 720h")
	flags.UintVar(&s.attempts, "attempts", 10, "how many attempts to renew it are spread over what is left then, no two within 30s")
	flags.BoolVar(&s.noJitter, "no-jitter", false, "make the first of them when it is due, not at the device's own place before the second")
	flags.UintVar(&s.rekeyEvery, "rekey-every", 0, "make every `n`-th renewal of a key one with a new key: 1 each of them, 0 none")
	flags.DurationVar(&s.pendingLimit, "pending-limit", 7*24*time.Hour, "give up a request that the server keeps pending for so long")
	flags.UintVar(&s.tries, "tries", 4, "how often an exchange without an answer is tried in one run, with the same CSR")
	flags.DurationVar(&s.retryInterval, "retry-interval", time.Second, "first pause between those tries; it doubles")
	flags.IntVar(&s.blockSize, "block-size", 512, "block size in bytes: 16, 32, 64, 128, 256, 512 or 1024 (RFC 7959)")
	flags.DurationVar(&s.ackTimeout, "ack-timeout", 2*time.Second, "ACK_TIMEOUT (RFC 7252 §4.8)")
	flags.IntVar(&s.maxRetransmit, "max-retransmit", 4, "MAX_RETRANSMIT (RFC 7252 §4.8), 0 for none")
	flags.DurationVar(&s.exchangeTimeout, "exchange-timeout", 0, "bound on one request and all of its answer (default: by RFC 7252 over CoAPs, 2m over HTTPS)")
	flags.DurationVar(&s.handshakeTimeout, "handshake-timeout", 30*time.Second, "bound on one handshake, with the connection over HTTPS")
	flags.StringVar(&s.exportDir, "export-dir", "", "`directory` for other programs: certificate, chain and the key's address, as files below NAME/")
	flags.StringVar(&s.hookBefore, "hook-before", "", "`file` to execute before a run acts: without a shell or arguments, with EST_ENROLL_HOOK and others in its environment")
	flags.StringVar(&s.hookAfter, "hook-after", "", "`file` to execute when there is a new certificate, by each run until it has succeeded")
	flags.StringVar(&s.hookFailure, "hook-failure", "", "`file` to execute when an attempt has failed")
	flags.DurationVar(&s.hookTimeout, "hook-timeout", time.Minute, "bound on one of these, which is then ended with all that it has started")
	flags.BoolVar(&s.requireClock, "require-clock", false, "refuse to work while the system clock is behind what the device has verified")
	flags.StringVar(&s.lockDir, "lock-dir", "/run/lock/est-enroll", "`directory` of the writer locks that all users of a token share")
	flags.DurationVar(&s.lockTimeout, "lock-timeout", 30*time.Second, "how long to wait for another run that has the state directory or the token")
	flags.BoolVar(&s.retryPIN, "retry-pin", false, "try a PIN again that the token refused, though its source has not changed")
	flags.BoolVarP(&s.quiet, "quiet", "q", false, "print errors only")
	flags.BoolVarP(&s.verbose, "verbose", "v", false, "print each step with its time, on a terminal or not")
}

// registerWait adds the flag of the commands that ask a server.
func (s *settings) registerWait(flags *pflag.FlagSet) {
	flags.DurationVar(&s.wait, "wait", 0, "wait so long in this run for the time at which a server that has not decided may be asked again")
}

// complete fills what no flag has set: from the environment, then from the file.
func (s *settings) complete(flags *pflag.FlagSet, lookupEnv func(string) (string, bool)) error {
	s.engineFromArgs = flags.Changed("engine")
	given := map[string]bool{}
	flags.Visit(func(f *pflag.Flag) { given[f.Name] = true })
	if path, _ := lookupEnv(envPrefix + "CONFIG"); path != "" && !given["config"] {
		s.config = path
	}
	if err := s.fromEnvironment(flags, given, lookupEnv); err != nil {
		return err
	}
	s.chosen = given["credential"]
	return s.fromFile(flags, given)
}

func (s *settings) fromEnvironment(flags *pflag.FlagSet, given map[string]bool, lookupEnv func(string) (string, bool)) error {
	var failure error
	flags.VisitAll(func(f *pflag.Flag) {
		if onlyFlags[f.Name] || given[f.Name] || failure != nil {
			return
		}
		name := variable(f.Name)
		value, _ := lookupEnv(name)
		if value == "" {
			return // set to nothing is not set
		}
		given[f.Name] = true
		if f.Name == "engine" {
			s.engineSource = engine.PINSource{Path: "environment " + name}
		}
		if err := f.Value.Set(value); err != nil {
			failure = &usageError{fmt.Errorf("environment %s: want %s", name, wanted(f))}
		}
	})
	return failure
}

// unknownVariables are the names of an environment that look like settings and are
// none: misspelt ones, or flags that are no settings.
func unknownVariables(flags *pflag.FlagSet, environ []string) (unknown []string) {
	known := map[string]bool{envPrefix + "CONFIG": true}
	flags.VisitAll(func(f *pflag.Flag) {
		if !onlyFlags[f.Name] {
			known[variable(f.Name)] = true
		}
	})
	for _, name := range agent.HookVariables() {
		known[name] = true // a hook has called this program
	}
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		if strings.HasPrefix(name, envPrefix) && value != "" && !known[name] {
			unknown = append(unknown, name)
		}
	}
	return unknown
}

// variable is the name of a setting in the environment.
func variable(setting string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(setting, "-", "_"))
}

func (s *settings) fromFile(flags *pflag.FlagSet, given map[string]bool) error {
	path, named := s.config, s.config != ""
	if !named {
		path = defaultConfig
	}
	data, err := durable.ReadFile(path, configLimit)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return nil
	}
	if err != nil {
		return &usageError{fmt.Errorf("read configuration: %w", err)}
	}
	file, err := parseConfig(data)
	if err == nil {
		err = apply(file.entries, flags, given)
	}
	if err == nil {
		err = s.eachCredential(file, given)
	}
	if err != nil {
		return &usageError{fmt.Errorf("configuration %s: %w", path, err)}
	}
	if !given["engine"] && s.engine != "" {
		s.engineSource, err = sourceOf(path)
	}
	return err
}

// apply sets what nobody has set before with more right.
func apply(entries []configEntry, flags *pflag.FlagSet, given map[string]bool) error {
	for _, entry := range entries {
		flag := flags.Lookup(entry.key)
		if flag == nil || onlyFlags[entry.key] {
			return fmt.Errorf("line %d: unknown key %q", entry.line, entry.key)
		}
		if given[entry.key] {
			continue
		}
		if len(entry.values) != 1 && flag.Value.Type() != "stringArray" {
			return fmt.Errorf("line %d: %s: want one value, not a list", entry.line, entry.key)
		}
		for _, value := range entry.values {
			// The value is not repeated: it may be an address with a PIN.
			if err := flag.Value.Set(value); err != nil {
				return fmt.Errorf("line %d: %s: want %s", entry.line, entry.key, wanted(flag))
			}
		}
	}
	return nil
}

// eachCredential makes the settings of each credential of the file: its own over
// those of the file's top.
func (s *settings) eachCredential(file configFile, given map[string]bool) error {
	if len(file.credentials) == 0 {
		return nil
	}
	for _, entry := range file.entries {
		if entry.key == "credential" {
			return fmt.Errorf("line %d: credential: the names are those below credentials; --credential chooses one", entry.line)
		}
	}
	for _, entry := range file.credentials {
		for _, own := range entry.entries {
			if deviceWide[own.key] {
				return fmt.Errorf("line %d: %s is the same for all credentials: want it at the top", own.line, own.key)
			}
		}
		one, flags := new(settings), pflag.NewFlagSet("", pflag.ContinueOnError)
		one.register(flags)
		*one = *s // the flags set the fields of one, whatever their values
		one.credential, one.credentials = entry.name, nil
		if err := apply(entry.entries, flags, given); err != nil {
			return err
		}
		s.credentials = append(s.credentials, one)
	}
	return nil
}

var (
	yamlLine    = regexp.MustCompile(`line \d+`)
	settingName = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,39}$`)
)

// wanted says what kind of value a setting takes.
func wanted(f *pflag.Flag) string {
	if known, ok := f.Value.(interface{ wants() string }); ok {
		return known.wants()
	}
	switch f.Value.Type() {
	case "duration":
		return "a duration, such as 30s or 1h"
	case "bool":
		return "true or false"
	case "uint16":
		return "a whole number up to 65535"
	case "uint", "int":
		return "a whole number"
	}
	return "a text"
}

type configEntry struct {
	key    string
	line   int
	values []string
}

// credentialEntry is one of the mapping below "credentials".
type credentialEntry struct {
	name    string
	entries []configEntry
}

type configFile struct {
	entries     []configEntry
	credentials []credentialEntry
}

// parseConfig reads a YAML mapping of scalars and lists of scalars, and below
// "credentials" one of such mappings. Its errors name lines and keys, never values.
func parseConfig(data []byte) (file configFile, err error) {
	mapping, err := parseYAML(data)
	if err != nil || mapping == nil {
		return file, err
	}
	pairs, err := keysOf(mapping)
	if err != nil {
		return file, err
	}
	for _, pair := range pairs {
		if pair.key.Value == "credentials" {
			file.credentials, err = credentialEntries(pair)
		} else {
			var entry configEntry
			entry, err = pair.entry()
			file.entries = append(file.entries, entry)
		}
		if err != nil {
			return file, err
		}
	}
	return file, nil
}

// parseYAML returns the mapping of a file; nil if there is nothing in it.
func parseYAML(data []byte) (*yaml.Node, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var document, second yaml.Node
	if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		// The library's text quotes what it read.
		if line := yamlLine.FindString(err.Error()); line != "" {
			return nil, fmt.Errorf("%s: not YAML", line)
		}
		return nil, errors.New("not YAML")
	}
	if err := decoder.Decode(&second); !errors.Is(err, io.EOF) {
		return nil, errors.New("a second document: want one")
	}
	mapping := document.Content[0]
	if mapping.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("line %d: want keys and values", mapping.Line)
	}
	return mapping, nil
}

// keyAndValue is an entry of a YAML mapping.
type keyAndValue struct{ key, value *yaml.Node }

// keysOf returns the entries of a mapping whose keys are names of settings, each once.
func keysOf(mapping *yaml.Node) (pairs []keyAndValue, err error) {
	seen := map[string]int{}
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		key, value := mapping.Content[i], mapping.Content[i+1]
		if !settingName.MatchString(key.Value) {
			return nil, fmt.Errorf("line %d: a key that is no setting's name", key.Line)
		}
		if before, twice := seen[key.Value]; twice {
			return nil, fmt.Errorf("line %d: key %q is set on line %d already", key.Line, key.Value, before)
		}
		seen[key.Value] = key.Line
		pairs = append(pairs, keyAndValue{key, value})
	}
	return pairs, nil
}

// entry reads a setting: a scalar or a list of them.
func (p keyAndValue) entry() (configEntry, error) {
	entry := configEntry{key: p.key.Value, line: p.key.Line}
	nodes := []*yaml.Node{p.value}
	if p.value.Kind == yaml.SequenceNode {
		nodes = p.value.Content
	}
	for _, node := range nodes {
		if node.Kind != yaml.ScalarNode || node.Tag == "!!null" {
			return entry, fmt.Errorf("line %d: key %q: want a value or a list of values", node.Line, p.key.Value)
		}
		entry.values = append(entry.values, node.Value)
	}
	return entry, nil
}

// credentialEntries reads the mapping below "credentials": from names to settings.
func credentialEntries(p keyAndValue) (all []credentialEntry, err error) {
	if p.value.Kind != yaml.MappingNode || len(p.value.Content) == 0 {
		return nil, fmt.Errorf("line %d: credentials: want names, each with its settings or {}", p.key.Line)
	}
	for i := 0; i+1 < len(p.value.Content); i += 2 {
		name, value := p.value.Content[i], p.value.Content[i+1]
		if err := estenroll.CheckName(name.Value); err != nil {
			return nil, fmt.Errorf("line %d: credentials: %w", name.Line, err)
		}
		for _, other := range all {
			if strings.EqualFold(other.name, name.Value) {
				return nil, fmt.Errorf("line %d: credential %q is there already, as %q", name.Line, name.Value, other.name)
			}
		}
		if value.Kind != yaml.MappingNode {
			return nil, fmt.Errorf("line %d: credential %q: want settings, or {} for none of its own", name.Line, name.Value)
		}
		one := credentialEntry{name: name.Value}
		pairs, err := keysOf(value)
		if err != nil {
			return nil, err
		}
		for _, pair := range pairs {
			entry, err := pair.entry()
			if err != nil {
				return nil, err
			}
			one.entries = append(one.entries, entry)
		}
		all = append(all, one)
	}
	return all, nil
}

// sourceOf identifies a file that holds a PIN.
func sourceOf(path string) (engine.PINSource, error) {
	absolute, err := filepath.Abs(path)
	if err != nil {
		return engine.PINSource{}, err
	}
	info, err := os.Stat(absolute)
	if err != nil {
		return engine.PINSource{}, fmt.Errorf("read configuration: %w", err)
	}
	source := engine.PINSource{Path: absolute, Size: info.Size()}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		source.Inode, source.ChangedAt = stat.Ino, time.Unix(stat.Ctim.Unix()).UTC()
	}
	return source, nil
}
