// Package lwm2m owns the objects of an LwM2M client that say whom it talks to
// and with what: the Security object (/0, version 1.2). Its instances hold
// credentials by reference, in engines and files, and their persisted form holds
// nothing else: no private key, no pre-shared key, no PIN. It opens no
// engine and no socket. It is OMA LwM2M Core 1.2 §E.1; the definitions are the
// LwM2M registry's, testdata/registry/lwm2m-object-0.xml.
package lwm2m

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"estenroll/engine"
)

// SecurityMode is how a connection is protected (resource 2).
type SecurityMode int

// The security modes.
const (
	ModePSK          SecurityMode = 0
	ModeRawPublicKey SecurityMode = 1
	ModeCertificate  SecurityMode = 2
	ModeNoSec        SecurityMode = 3
	ModeEST          SecurityMode = 4 // certificate mode with EST
)

// String returns "mode 4 (certificate with EST)".
func (m SecurityMode) String() string {
	names := []string{"pre-shared key", "raw public key", "certificate", "NoSec", "certificate with EST"}
	if m < 0 || int(m) >= len(names) {
		return fmt.Sprintf("mode %d", int(m))
	}
	return fmt.Sprintf("mode %d (%s)", int(m), names[m])
}

// CertificateUsage is what the certificate in resource 4 means (resource 15).
type CertificateUsage uint8

// The certificate usages. The first two also need a trust store.
const (
	CAConstraint                 CertificateUsage = 0
	ServiceCertificateConstraint CertificateUsage = 1
	TrustAnchorAssertion         CertificateUsage = 2
	DomainIssuedCertificate      CertificateUsage = 3 // the default
)

// MatchingType is the form of resource 4 (resource 13).
type MatchingType uint8

// The matching types.
const (
	MatchExact  MatchingType = 0 // the default
	MatchSHA256 MatchingType = 1
	MatchSHA384 MatchingType = 2
	MatchSHA512 MatchingType = 3
)

// Security is an instance of the Security object: one server and how to be sure
// of each other. The comment of each field names its resource. An optional
// resource is absent when its field is nil, empty or zero; a pointer tells a
// zero that means something from an absence.
//
// It is a value, but its slices and pointers are shared by copies; a
// [SecurityObject] makes its own.
type Security struct {
	// ServerURI is coap:, coaps:, coap+tcp: or coaps+tcp: (0; RFC 7252 §6, RFC 8323 §8), or
	// https: where it is an EST server and no LwM2M server.
	ServerURI string `json:"server_uri"`
	// BootstrapServer says that this is the LwM2M Bootstrap-Server (1).
	BootstrapServer bool         `json:"bootstrap_server"`
	Mode            SecurityMode `json:"security_mode"` // 2

	// Public Key or Identity (3): exactly one of these, as the mode says. In
	// ModeEST the certificate stands beside the resource, whose wire view is empty.
	ClientCertificate engine.CertificateChainInfo `json:"-"`                           // ModeCertificate, ModeEST
	ClientPublicKey   []byte                      `json:"client_public_key,omitempty"` // ModeRawPublicKey: DER SubjectPublicKeyInfo
	PSKIdentity       engine.PSKIdentityInfo      `json:"-"`                           // ModePSK

	// ServerPublicKey is the server's certificate or trust anchor in DER, its
	// public key (ModeRawPublicKey), or a hash of it where MatchingType says so (4).
	ServerPublicKey []byte `json:"server_public_key,omitempty"`

	// Secret Key (5): as the mode says. In ModeEST the key stands beside the
	// resource, whose wire view is empty.
	PrivateKey engine.PrivateKeyInfo `json:"-"` // ModeRawPublicKey, ModeCertificate, ModeEST
	PSKKey     engine.PSKKeyInfo     `json:"-"` // ModePSK

	SMSSecurityMode         *uint8            `json:"sms_security_mode,omitempty"`          // 6
	SMSBindingKeyParameters []byte            `json:"sms_binding_key_parameters,omitempty"` // 7
	SMSBindingSecretKeys    engine.PSKKeyInfo `json:"-"`                                    // 8
	ServerSMSNumber         string            `json:"server_sms_number,omitempty"`          // 9

	// ShortServerID is 1..65534; a server that is not the Bootstrap-Server has one (10).
	ShortServerID uint16 `json:"short_server_id,omitempty"`
	// ClientHoldOffTime precedes a client-initiated bootstrap; in whole seconds (11).
	ClientHoldOffTime *time.Duration `json:"-"`
	// BootstrapAccountTimeout: the Bootstrap-Server account is purged after it; in
	// whole seconds. Default: 0, never (12).
	BootstrapAccountTimeout time.Duration `json:"-"`

	MatchingType MatchingType `json:"matching_type,omitempty"` // 13
	// SNI is the server name to send and to check instead of the URI's host (14).
	SNI string `json:"sni,omitempty"`
	// CertificateUsage: see Usage for the default (15).
	CertificateUsage *CertificateUsage `json:"certificate_usage,omitempty"`
	Ciphersuites     []uint32          `json:"ciphersuites,omitempty"` // 16
	OSCORE           *ObjectLink       `json:"oscore,omitempty"`       // 17

	// TLS parameters, in order of preference (18, 20) or as sets (19, 21); RFC 8446 §4.2.
	Groups                         []uint16 `json:"groups,omitempty"`                            // 18
	ServerSignatureAlgorithms      []uint16 `json:"server_signature_algorithms,omitempty"`       // 19
	SignatureAlgorithms            []uint16 `json:"signature_algorithms,omitempty"`              // 20
	ServerSignatureAlgorithmsCerts []uint16 `json:"server_signature_algorithms_certs,omitempty"` // 21
	TLS13Features                  *uint16  `json:"tls13_features,omitempty"`                    // 22
	ServerTLSExtensions            *uint16  `json:"server_tls_extensions,omitempty"`             // 23
	TLSExtensions                  *uint16  `json:"tls_extensions,omitempty"`                    // 24

	SecondaryServerURIs []string     `json:"secondary_server_uris,omitempty"` // 25
	MQTTServer          *ObjectLink  `json:"mqtt_server,omitempty"`           // 26
	COSESecurity        []ObjectLink `json:"cose_security,omitempty"`         // 27
	RDSDestinationPort  *uint8       `json:"rds_destination_port,omitempty"`  // 28
	RDSSourcePort       *uint8       `json:"rds_source_port,omitempty"`       // 29
	RDSApplicationID    string       `json:"rds_application_id,omitempty"`    // 30
}

// Usage is the certificate usage that holds: domain-issued if none is set.
func (s Security) Usage() CertificateUsage {
	if s.CertificateUsage == nil {
		return DomainIssuedCertificate
	}
	return *s.CertificateUsage
}

// Resource is the wire view: the value of a resource as its [Type] says, or
// false for one that is absent or unknown. Mandatory resources are always
// present. Resources 3 and 5 are empty where the credential is not a buffer of
// ours, and always in ModeEST; a pre-shared key in a buffer is shown.
func (s Security) Resource(id ResourceID) (any, bool) {
	if int(id) >= len(resources) {
		return nil, false
	}
	return resources[id].get(&s)
}

func (s Security) clone() Security {
	s.ClientPublicKey = slices.Clone(s.ClientPublicKey)
	s.ServerPublicKey = slices.Clone(s.ServerPublicKey)
	s.SMSSecurityMode = clonePointer(s.SMSSecurityMode)
	s.SMSBindingKeyParameters = slices.Clone(s.SMSBindingKeyParameters)
	s.ClientHoldOffTime = clonePointer(s.ClientHoldOffTime)
	s.CertificateUsage = clonePointer(s.CertificateUsage)
	s.Ciphersuites = slices.Clone(s.Ciphersuites)
	s.OSCORE = clonePointer(s.OSCORE)
	s.Groups = slices.Clone(s.Groups)
	s.ServerSignatureAlgorithms = slices.Clone(s.ServerSignatureAlgorithms)
	s.SignatureAlgorithms = slices.Clone(s.SignatureAlgorithms)
	s.ServerSignatureAlgorithmsCerts = slices.Clone(s.ServerSignatureAlgorithmsCerts)
	s.TLS13Features = clonePointer(s.TLS13Features)
	s.ServerTLSExtensions = clonePointer(s.ServerTLSExtensions)
	s.TLSExtensions = clonePointer(s.TLSExtensions)
	s.SecondaryServerURIs = slices.Clone(s.SecondaryServerURIs)
	s.MQTTServer = clonePointer(s.MQTTServer)
	s.COSESecurity = slices.Clone(s.COSESecurity)
	s.RDSDestinationPort = clonePointer(s.RDSDestinationPort)
	s.RDSSourcePort = clonePointer(s.RDSSourcePort)
	return s
}

func clonePointer[T any](p *T) *T {
	if p == nil {
		return nil
	}
	return new(*p)
}

// SecurityObject is the Security object: instances by their number. The zero
// value is an empty object. It is for one goroutine at a time.
type SecurityObject struct {
	instances map[uint16]Security
}

// Set creates or replaces an instance. It is judged by Validate, with the others.
func (o *SecurityObject) Set(id uint16, s Security) {
	if o.instances == nil {
		o.instances = map[uint16]Security{}
	}
	o.instances[id] = s.clone()
}

// Instance returns a copy of an instance.
func (o *SecurityObject) Instance(id uint16) (Security, bool) {
	s, ok := o.instances[id]
	return s.clone(), ok
}

// Delete removes an instance and reports whether it was there.
func (o *SecurityObject) Delete(id uint16) bool {
	_, ok := o.instances[id]
	delete(o.instances, id)
	return ok
}

// All iterates over copies of the instances in the order of their numbers.
func (o *SecurityObject) All() iter.Seq2[uint16, Security] {
	return func(yield func(uint16, Security) bool) {
		for _, id := range slices.Sorted(maps.Keys(o.instances)) {
			if !yield(id, o.instances[id].clone()) {
				return
			}
		}
	}
}

// Write sets resources of an instance, which is created if it is missing; those
// not named stay. Values have the Go type of their [Type]. An error is a
// *ResourceError and nothing is changed by it; the object as a whole is judged by Validate.
//
// In ModeEST resources 3 and 5 are not used on the wire: what is written to
// them is ignored, with a warning if it is not empty, and the infos beside them
// stay. A private key is refused in every mode.
func (o *SecurityObject) Write(id uint16, values map[ResourceID]any) (warnings []*ResourceError, err error) {
	s, _ := o.Instance(id)
	at := func(r ResourceID, err error) *ResourceError {
		return &ResourceError{Instance: id, Resource: r, Err: err}
	}
	// The mode decides what 3 and 5 mean, so it goes first.
	order := slices.SortedFunc(maps.Keys(values), func(a, b ResourceID) int {
		if (a == ResourceSecurityMode) != (b == ResourceSecurityMode) {
			return map[bool]int{true: -1, false: 1}[a == ResourceSecurityMode]
		}
		return cmp.Compare(a, b)
	})
	for _, r := range order {
		if int(r) >= len(resources) {
			return nil, at(r, fmt.Errorf("no such resource in Security 1.2"))
		}
		if s.Mode == ModeEST && (r == ResourcePublicKeyOrIdentity || r == ResourceSecretKey) {
			value, ok := values[r].([]byte)
			if !ok {
				return nil, at(r, errType)
			}
			if len(value) > 0 {
				warnings = append(warnings, at(r, fmt.Errorf("ignored: not used in %s", s.Mode)))
			}
			continue
		}
		if err := resources[r].set(&s, values[r]); err != nil {
			return nil, at(r, err)
		}
	}
	o.Set(id, s)
	return warnings, nil
}

// ResourceError is what is wrong with one resource.
type ResourceError struct {
	Instance uint16
	Resource ResourceID
	Err      error
}

// Error starts with the resource's path: "/0/1/10: ...".
func (e *ResourceError) Error() string {
	return fmt.Sprintf("/%d/%d/%d: %v", SecurityObjectID, e.Instance, e.Resource, e.Err)
}

// Unwrap returns the cause.
func (e *ResourceError) Unwrap() error { return e.Err }

// ValidationError is all that is wrong with an object, in the order of its resources.
type ValidationError []*ResourceError

// Error joins the messages on one line.
func (e ValidationError) Error() string {
	texts := make([]string, len(e))
	for i, err := range e {
		texts[i] = err.Error()
	}
	return "security object: " + strings.Join(texts, "; ")
}

// Unwrap returns the errors.
func (e ValidationError) Unwrap() []error {
	list := make([]error, len(e))
	for i, err := range e {
		list[i] = err
	}
	return list
}

func (e ValidationError) sorted() error {
	if len(e) == 0 {
		return nil
	}
	slices.SortStableFunc(e, func(a, b *ResourceError) int {
		return cmp.Or(cmp.Compare(a.Instance, b.Instance), cmp.Compare(a.Resource, b.Resource))
	})
	return e
}
