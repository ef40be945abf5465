package lwm2m

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"estenroll/engine"
)

// Limits of an object. An instance at all of them is encoded in less than
// 200 KiB, so that what Validate accepts is below maxPersisted.
const (
	maxInstances  = 16
	maxText       = 4096     // bytes of a string, an address or a path
	maxOpaque     = 16 << 10 // bytes of an opaque value or a buffer
	maxList       = 64       // values of a resource with multiple instances
	maxInstanceID = 65534    // 65535 is MAX_ID, no instance (LwM2M Core 1.2 §7.2)
)

// Validate judges the object as a whole. Its error is a ValidationError that
// names each resource that is wrong. No message repeats an address, which
// might hold a PIN, nor a URI, which might hold a password.
func (o *SecurityObject) Validate() error {
	var wrong ValidationError
	bootstrap, hasBootstrap := uint16(0), false
	servers := map[uint16]uint16{}
	for id, s := range o.All() {
		at := func(r ResourceID, format string, args ...any) {
			wrong = append(wrong, &ResourceError{Instance: id, Resource: r, Err: fmt.Errorf(format, args...)})
		}
		s.validate(at)
		switch {
		case s.BootstrapServer && hasBootstrap:
			at(ResourceBootstrapServer, "a second Bootstrap-Server: /0/%d is one", bootstrap)
		case s.BootstrapServer:
			bootstrap, hasBootstrap = id, true
		case s.ShortServerID == 0:
			at(ResourceShortServerID, "a server that is not the Bootstrap-Server has a short server id")
		}
		if first, taken := servers[s.ShortServerID]; taken {
			at(ResourceShortServerID, "short server id %d is that of /0/%d", s.ShortServerID, first)
		} else if s.ShortServerID != 0 {
			servers[s.ShortServerID] = id
		}
		if id > maxInstanceID {
			at(ResourceServerURI, "%d is not the number of an instance", id)
		}
	}
	if n := len(o.instances); n > maxInstances {
		wrong = append(wrong, &ResourceError{Err: fmt.Errorf("%d instances are more than %d", n, maxInstances)})
	}
	return wrong.sorted()
}

type complain func(r ResourceID, format string, args ...any)

func (s *Security) validate(at complain) {
	for _, r := range resources {
		value, present := r.get(s)
		if !present {
			continue
		}
		if err := r.checkRange(value); err != nil {
			at(r.ID, "%w", err)
		}
		if err := checkSize(value); err != nil {
			at(r.ID, "%w", err)
		}
	}
	if err := checkURI(s.ServerURI, s.Mode); err != nil {
		at(ResourceServerURI, "%w", err)
	}
	for _, uri := range s.SecondaryServerURIs {
		if err := checkURI(uri, s.Mode); err != nil {
			at(ResourceSecondaryServerURIs, "%w", err)
		}
	}
	if _, err := netip.ParseAddr(s.SNI); err == nil {
		at(ResourceSNI, "an IP address is not a server name") // RFC 6066 §3
	}
	for r, d := range map[ResourceID]time.Duration{
		ResourceClientHoldOffTime:       pointed(s.ClientHoldOffTime),
		ResourceBootstrapAccountTimeout: s.BootstrapAccountTimeout,
	} {
		if seconds := d / time.Second; d < 0 || d%time.Second != 0 || seconds != time.Duration(uint32(seconds)) {
			at(r, "%s is not a whole number of seconds below 2^32", d)
		}
	}
	s.validateCredentials(at)
	s.validateServerKey(at)
}

func pointed[T any](p *T) (zero T) {
	if p == nil {
		return zero
	}
	return *p
}

// info is what the four kinds of infos share.
type info interface {
	IsZero() bool
	Engine() (engine.Address, bool)
	File() (string, bool)
	Buffer() ([]byte, bool)
}

func (s *Security) validateCredentials(at complain) {
	credentials := []struct {
		resource ResourceID
		name     string
		present  bool
		used     []SecurityMode
	}{
		{ResourcePublicKeyOrIdentity, "a client certificate", !s.ClientCertificate.IsZero(), []SecurityMode{ModeCertificate, ModeEST}},
		{ResourcePublicKeyOrIdentity, "a client public key", len(s.ClientPublicKey) > 0, []SecurityMode{ModeRawPublicKey}},
		{ResourcePublicKeyOrIdentity, "a PSK identity", !s.PSKIdentity.IsZero(), []SecurityMode{ModePSK}},
		{ResourceSecretKey, "a private key", !s.PrivateKey.IsZero(), []SecurityMode{ModeRawPublicKey, ModeCertificate, ModeEST}},
		{ResourceSecretKey, "a pre-shared key", !s.PSKKey.IsZero(), []SecurityMode{ModePSK}},
	}
	for _, c := range credentials {
		used := false
		for _, mode := range c.used {
			used = used || mode == s.Mode
		}
		switch {
		case c.present && !used:
			at(c.resource, "%s has no place in %s", c.name, s.Mode)
		case !c.present && used && s.Mode != ModeEST: // ModeEST may still be without
			at(c.resource, "%s needs %s", s.Mode, c.name)
		}
	}
	if s.Mode == ModeEST && s.ClientCertificate.IsZero() != s.PrivateKey.IsZero() {
		at(ResourceSecretKey, "a certificate and its private key go together")
	}
	if s.Mode == ModeRawPublicKey && len(s.ClientPublicKey) > 0 {
		if _, err := x509.ParsePKIXPublicKey(s.ClientPublicKey); err != nil {
			at(ResourcePublicKeyOrIdentity, "client public key: %w", err)
		}
	}
	if _, ok := s.ClientCertificate.Buffer(); ok {
		if certs, err := s.ClientCertificate.Certificates(); err != nil {
			at(ResourcePublicKeyOrIdentity, "%w", err)
		} else if len(certs) == 0 {
			at(ResourcePublicKeyOrIdentity, "an empty client certificate")
		}
	}
	for _, c := range s.infos() {
		if err := checkInfo(c.info); err != nil {
			at(c.resource, "%w", err)
		}
	}
}

type namedInfo struct {
	resource ResourceID
	name     string // in the persisted form
	info     info
	secret   bool // its buffer is never persisted
}

func (s *Security) infos() []namedInfo {
	return []namedInfo{
		{ResourcePublicKeyOrIdentity, "client_certificate", s.ClientCertificate, false},
		{ResourcePublicKeyOrIdentity, "psk_identity", s.PSKIdentity, false},
		{ResourceSecretKey, "private_key", s.PrivateKey, true},
		{ResourceSecretKey, "psk_key", s.PSKKey, true},
		{ResourceSMSBindingSecretKeys, "sms_binding_secret_keys", s.SMSBindingSecretKeys, true},
	}
}

func checkInfo(i info) error {
	if at, ok := i.Engine(); ok {
		return checkSize(at.String())
	}
	if path, ok := i.File(); ok {
		return checkSize(path)
	}
	if b, ok := i.Buffer(); ok {
		if len(b) == 0 {
			return errors.New("an empty buffer")
		}
		return checkSize(b)
	}
	return nil
}

func (s *Security) validateServerKey(at complain) {
	if s.Mode != ModeRawPublicKey && s.Mode != ModeCertificate && s.Mode != ModeEST {
		return // not used
	}
	if len(s.ServerPublicKey) == 0 {
		at(ResourceServerPublicKey, "%s needs the server's public key, certificate or trust anchor", s.Mode)
		return
	}
	if length, hashed := map[MatchingType]int{MatchSHA256: 32, MatchSHA384: 48, MatchSHA512: 64}[s.MatchingType]; hashed {
		if len(s.ServerPublicKey) != length {
			at(ResourceServerPublicKey, "matching type %d is a hash of %d bytes, this is %d", s.MatchingType, length, len(s.ServerPublicKey))
		}
		return
	}
	var err error
	if s.Mode == ModeRawPublicKey {
		_, err = x509.ParsePKIXPublicKey(s.ServerPublicKey)
	} else {
		_, err = x509.ParseCertificate(s.ServerPublicKey)
	}
	if err != nil {
		at(ResourceServerPublicKey, "%w", err)
	}
}

// schemes of server URIs and whether each is protected (RFC 7252 §6, RFC 8323 §8).
//
// Deviation: https too, for an entry whose server is an EST server over HTTPS and
// no LwM2M server; the registered definition has CoAP URIs alone.
var schemes = map[string]bool{"coap": false, "coap+tcp": false, "coaps": true, "coaps+tcp": true, "https": true}

func checkURI(text string, mode SecurityMode) error {
	u, err := url.Parse(text)
	if err != nil {
		return errors.New("not a URI") // the cause would repeat it
	}
	protected, known := schemes[u.Scheme]
	switch {
	case !known:
		return errors.New("not a coap:, coaps:, coap+tcp:, coaps+tcp: or https: URI")
	case u.Hostname() == "":
		return errors.New("a URI without a host") // RFC 7252 §6.1: "the URI is considered invalid"
	case u.User != nil, u.Fragment != "" || strings.Contains(text, "#"):
		return errors.New("a server's URI has neither user nor fragment") // RFC 7252 §6.1
	case protected && mode == ModeNoSec:
		return fmt.Errorf("%s: needs a security mode, not %s", u.Scheme, mode)
	case !protected && mode != ModeNoSec:
		return fmt.Errorf("%s: is not protected, against %s", u.Scheme, mode)
	}
	return nil
}

// checkSize holds a value to the limits above and a text to what JSON keeps.
func checkSize(value any) error {
	switch v := value.(type) {
	case string:
		if len(v) > maxText {
			return fmt.Errorf("%d bytes are more than %d", len(v), maxText)
		}
		if !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) {
			return errors.New("control characters or text that is not UTF-8")
		}
	case []byte:
		if len(v) > maxOpaque {
			return fmt.Errorf("%d bytes are more than %d", len(v), maxOpaque)
		}
	case []uint64:
		return checkCount(len(v))
	case []ObjectLink:
		return checkCount(len(v))
	case []string:
		for _, text := range v {
			if err := checkSize(text); err != nil {
				return err
			}
		}
		return checkCount(len(v))
	}
	return nil
}

func checkCount(n int) error {
	if n > maxList {
		return fmt.Errorf("%d values are more than %d", n, maxList)
	}
	return nil
}
