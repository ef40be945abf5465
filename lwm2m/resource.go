package lwm2m

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"estenroll/engine"
)

// SecurityObjectID is the LwM2M Security object's (urn:oma:lwm2m:oma:0:1.2).
const SecurityObjectID = 0

// ResourceID is the number of a resource in its object.
type ResourceID uint16

// The resources of Security 1.2.
const (
	ResourceServerURI                ResourceID = 0
	ResourceBootstrapServer          ResourceID = 1
	ResourceSecurityMode             ResourceID = 2
	ResourcePublicKeyOrIdentity      ResourceID = 3
	ResourceServerPublicKey          ResourceID = 4
	ResourceSecretKey                ResourceID = 5
	ResourceSMSSecurityMode          ResourceID = 6
	ResourceSMSBindingKeyParameters  ResourceID = 7
	ResourceSMSBindingSecretKeys     ResourceID = 8
	ResourceServerSMSNumber          ResourceID = 9
	ResourceShortServerID            ResourceID = 10
	ResourceClientHoldOffTime        ResourceID = 11
	ResourceBootstrapAccountTimeout  ResourceID = 12
	ResourceMatchingType             ResourceID = 13
	ResourceSNI                      ResourceID = 14
	ResourceCertificateUsage         ResourceID = 15
	ResourceCiphersuites             ResourceID = 16
	ResourceOSCORESecurityMode       ResourceID = 17
	ResourceGroups                   ResourceID = 18
	ResourceServerSignatureAlgs      ResourceID = 19
	ResourceSignatureAlgs            ResourceID = 20
	ResourceServerSignatureAlgsCerts ResourceID = 21
	ResourceTLS13Features            ResourceID = 22
	ResourceServerTLSExtensions      ResourceID = 23
	ResourceTLSExtensions            ResourceID = 24
	ResourceSecondaryServerURIs      ResourceID = 25
	ResourceMQTTServer               ResourceID = 26
	ResourceCOSESecurity             ResourceID = 27
	ResourceRDSDestinationPort       ResourceID = 28
	ResourceRDSSourcePort            ResourceID = 29
	ResourceRDSApplicationID         ResourceID = 30
)

// Type is a resource's data type (LwM2M Core 1.2 §C).
type Type string

// The types that Security 1.2 uses, and how a value of each is held in Go. A
// resource with multiple instances is a slice of these.
const (
	TypeString          Type = "String"           // string
	TypeBoolean         Type = "Boolean"          // bool
	TypeInteger         Type = "Integer"          // int64
	TypeUnsignedInteger Type = "Unsigned Integer" // uint64
	TypeOpaque          Type = "Opaque"           // []byte
	TypeObjectLink      Type = "Objlnk"           // ObjectLink
)

// ObjectLink names an instance of an object.
type ObjectLink struct {
	Object   uint16 `json:"object"`
	Instance uint16 `json:"instance"`
}

// Definition is a resource as the LwM2M registry defines it.
type Definition struct {
	ID        ResourceID
	Name      string
	Type      Type
	Multiple  bool
	Mandatory bool
	Range     string // of a number's value, of a string's or an opaque's length
	Units     string
}

// Definitions returns the resources of Security 1.2 in their order.
func Definitions() []Definition {
	list := make([]Definition, len(resources))
	for i, r := range resources {
		list[i] = r.Definition
	}
	return list
}

// resources is the registry's table, held to it by a test, with the way to each value.
var resources = []resource{
	{Definition{ID: ResourceServerURI, Name: "LWM2M  Server URI", Type: TypeString, Mandatory: true, Range: "0..255"},
		access{
			get: func(s *Security) (any, bool) { return s.ServerURI, true },
			set: func(s *Security, v any) error { return assign(&s.ServerURI, v) },
		}},
	{Definition{ID: ResourceBootstrapServer, Name: "Bootstrap-Server", Type: TypeBoolean, Mandatory: true},
		access{
			get: func(s *Security) (any, bool) { return s.BootstrapServer, true },
			set: func(s *Security, v any) error { return assign(&s.BootstrapServer, v) },
		}},
	{Definition{ID: ResourceSecurityMode, Name: "Security Mode", Type: TypeInteger, Mandatory: true, Range: "0..4"},
		access{
			get: func(s *Security) (any, bool) { return int64(s.Mode), true },
			set: func(s *Security, v any) error { return assignNumber[int64](&s.Mode, v) },
		}},
	{Definition{ID: ResourcePublicKeyOrIdentity, Name: "Public Key or Identity", Type: TypeOpaque, Mandatory: true},
		access{
			get: func(s *Security) (any, bool) { return s.publicKeyOrIdentity(), true },
			set: (*Security).setPublicKeyOrIdentity,
		}},
	{Definition{ID: ResourceServerPublicKey, Name: "Server Public Key", Type: TypeOpaque, Mandatory: true},
		access{
			get: func(s *Security) (any, bool) { return append([]byte{}, s.ServerPublicKey...), true },
			set: func(s *Security, v any) error { return assign(&s.ServerPublicKey, v) },
		}},
	{Definition{ID: ResourceSecretKey, Name: "Secret Key", Type: TypeOpaque, Mandatory: true},
		access{
			get: func(s *Security) (any, bool) { return s.secretKey(), true },
			set: (*Security).setSecretKey,
		}},
	{Definition{ID: ResourceSMSSecurityMode, Name: "SMS Security Mode", Type: TypeInteger, Range: "0..255"},
		optionalNumber[int64](func(s *Security) **uint8 { return &s.SMSSecurityMode })},
	{Definition{ID: ResourceSMSBindingKeyParameters, Name: "SMS Binding Key Parameters", Type: TypeOpaque, Range: "6"},
		access{
			get: func(s *Security) (any, bool) {
				return bytes.Clone(s.SMSBindingKeyParameters), len(s.SMSBindingKeyParameters) > 0
			},
			set: func(s *Security, v any) error { return assign(&s.SMSBindingKeyParameters, v) },
		}},
	{Definition{ID: ResourceSMSBindingSecretKeys, Name: "SMS Binding Secret Key(s)", Type: TypeOpaque, Range: "16,32,48"},
		access{
			get: func(s *Security) (any, bool) { return s.SMSBindingSecretKeys.Buffer() },
			set: func(s *Security, v any) error {
				var key []byte
				err := assign(&key, v)
				if err == nil {
					s.SMSBindingSecretKeys = engine.PSKKeyFromBuffer(key)
				}
				return err
			},
		}},
	{Definition{ID: ResourceServerSMSNumber, Name: "LwM2M Server SMS Number", Type: TypeString},
		optionalText(func(s *Security) *string { return &s.ServerSMSNumber })},
	{Definition{ID: ResourceShortServerID, Name: "Short Server ID", Type: TypeInteger, Range: "1..65534"},
		access{
			get: func(s *Security) (any, bool) { return int64(s.ShortServerID), s.ShortServerID != 0 },
			set: func(s *Security, v any) error { return assignNumber[int64](&s.ShortServerID, v) },
		}},
	{Definition{ID: ResourceClientHoldOffTime, Name: "Client Hold Off Time", Type: TypeInteger, Units: "s"},
		access{
			get: func(s *Security) (any, bool) {
				if s.ClientHoldOffTime == nil {
					return nil, false
				}
				return int64(*s.ClientHoldOffTime / time.Second), true
			},
			set: func(s *Security, v any) error {
				var seconds uint32
				err := assignNumber[int64](&seconds, v)
				if err == nil {
					s.ClientHoldOffTime = new(time.Duration(seconds) * time.Second)
				}
				return err
			},
		}},
	{Definition{ID: ResourceBootstrapAccountTimeout, Name: "Bootstrap-Server Account Timeout", Type: TypeInteger, Units: "s"},
		access{
			get: func(s *Security) (any, bool) {
				return int64(s.BootstrapAccountTimeout / time.Second), s.BootstrapAccountTimeout != 0
			},
			set: func(s *Security, v any) error {
				var seconds uint32
				err := assignNumber[int64](&seconds, v)
				if err == nil {
					s.BootstrapAccountTimeout = time.Duration(seconds) * time.Second
				}
				return err
			},
		}},
	{Definition{ID: ResourceMatchingType, Name: "Matching Type", Type: TypeUnsignedInteger, Range: "0..3"},
		access{
			get: func(s *Security) (any, bool) { return uint64(s.MatchingType), s.MatchingType != MatchExact },
			set: func(s *Security, v any) error { return assignNumber[uint64](&s.MatchingType, v) },
		}},
	{Definition{ID: ResourceSNI, Name: "SNI", Type: TypeString},
		optionalText(func(s *Security) *string { return &s.SNI })},
	{Definition{ID: ResourceCertificateUsage, Name: "Certificate Usage", Type: TypeUnsignedInteger, Range: "0..3"},
		optionalNumber[uint64](func(s *Security) **CertificateUsage { return &s.CertificateUsage })},
	{Definition{ID: ResourceCiphersuites, Name: "DTLS/TLS Ciphersuite", Type: TypeUnsignedInteger, Multiple: true},
		numbers(func(s *Security) *[]uint32 { return &s.Ciphersuites })},
	{Definition{ID: ResourceOSCORESecurityMode, Name: "OSCORE Security Mode", Type: TypeObjectLink},
		optionalLink(func(s *Security) **ObjectLink { return &s.OSCORE })},
	{Definition{ID: ResourceGroups, Name: "Groups To Use by Client", Type: TypeUnsignedInteger, Multiple: true, Range: "0..65535"},
		numbers(func(s *Security) *[]uint16 { return &s.Groups })},
	{Definition{ID: ResourceServerSignatureAlgs, Name: "Signature Algorithms Supported by Server", Type: TypeUnsignedInteger, Multiple: true, Range: "0..65535"},
		numbers(func(s *Security) *[]uint16 { return &s.ServerSignatureAlgorithms })},
	{Definition{ID: ResourceSignatureAlgs, Name: "Signature Algorithms To Use by Client", Type: TypeUnsignedInteger, Multiple: true, Range: "0..65535"},
		numbers(func(s *Security) *[]uint16 { return &s.SignatureAlgorithms })},
	{Definition{ID: ResourceServerSignatureAlgsCerts, Name: "Signature Algorithm Certs Supported by Server", Type: TypeUnsignedInteger, Multiple: true, Range: "0..65535"},
		numbers(func(s *Security) *[]uint16 { return &s.ServerSignatureAlgorithmsCerts })},
	{Definition{ID: ResourceTLS13Features, Name: "TLS 1.3 Features To Use by Client", Type: TypeUnsignedInteger, Range: "0..65535"},
		optionalNumber[uint64](func(s *Security) **uint16 { return &s.TLS13Features })},
	{Definition{ID: ResourceServerTLSExtensions, Name: "TLS Extensions Supported by Server", Type: TypeUnsignedInteger, Range: "0..65535"},
		optionalNumber[uint64](func(s *Security) **uint16 { return &s.ServerTLSExtensions })},
	{Definition{ID: ResourceTLSExtensions, Name: "TLS Extensions To Use by Client", Type: TypeUnsignedInteger, Range: "0..65535"},
		optionalNumber[uint64](func(s *Security) **uint16 { return &s.TLSExtensions })},
	{Definition{ID: ResourceSecondaryServerURIs, Name: "Secondary LwM2M Server URI", Type: TypeString, Multiple: true, Range: "0..255"},
		list(func(s *Security) *[]string { return &s.SecondaryServerURIs })},
	{Definition{ID: ResourceMQTTServer, Name: "MQTT Server", Type: TypeObjectLink},
		optionalLink(func(s *Security) **ObjectLink { return &s.MQTTServer })},
	{Definition{ID: ResourceCOSESecurity, Name: "LwM2M COSE Security", Type: TypeObjectLink, Multiple: true},
		list(func(s *Security) *[]ObjectLink { return &s.COSESecurity })},
	{Definition{ID: ResourceRDSDestinationPort, Name: "RDS Destination Port", Type: TypeInteger, Range: "0..15"},
		optionalNumber[int64](func(s *Security) **uint8 { return &s.RDSDestinationPort })},
	{Definition{ID: ResourceRDSSourcePort, Name: "RDS Source Port", Type: TypeInteger, Range: "0..15"},
		optionalNumber[int64](func(s *Security) **uint8 { return &s.RDSSourcePort })},
	{Definition{ID: ResourceRDSApplicationID, Name: "RDS Application ID", Type: TypeString},
		optionalText(func(s *Security) *string { return &s.RDSApplicationID })},
}

type resource struct {
	Definition
	access
}

// access is the way between a resource's wire value and its field. What get
// returns is the caller's; set copies what it is given.
type access struct {
	get func(*Security) (value any, present bool)
	set func(*Security, any) error
}

var (
	errType       = errors.New("the value has another type")
	errPrivateKey = errors.New("a private key is kept in an engine or in a file, never in the object")
)

// assign sets a string, a boolean, an opaque or a slice.
func assign[T any](field *T, value any) error {
	v, ok := value.(T)
	if !ok {
		return errType
	}
	if b, ok := any(v).([]byte); ok {
		v = any(bytes.Clone(b)).(T)
	}
	*field = v
	return nil
}

type number interface {
	~int | ~uint8 | ~uint16 | ~uint32
}

// assignNumber sets a field from an int64 or uint64 (W) that must fit it; the
// registered range is Validate's.
func assignNumber[W int64 | uint64, T number](field *T, value any) error {
	v, ok := value.(W)
	if !ok {
		return errType
	}
	if W(T(v)) != v || v < 0 {
		return fmt.Errorf("%d does not fit", v)
	}
	*field = T(v)
	return nil
}

func optionalText(field func(*Security) *string) access {
	return access{
		get: func(s *Security) (any, bool) { return *field(s), *field(s) != "" },
		set: func(s *Security, v any) error { return assign(field(s), v) },
	}
}

func optionalNumber[W int64 | uint64, T number](field func(*Security) **T) access {
	return access{
		get: func(s *Security) (any, bool) {
			if p := *field(s); p != nil {
				return W(*p), true
			}
			return nil, false
		},
		set: func(s *Security, v any) error {
			var n T
			if err := assignNumber[W](&n, v); err != nil {
				return err
			}
			*field(s) = &n
			return nil
		},
	}
}

func optionalLink(field func(*Security) **ObjectLink) access {
	return access{
		get: func(s *Security) (any, bool) {
			if p := *field(s); p != nil {
				return *p, true
			}
			return nil, false
		},
		set: func(s *Security, v any) error {
			var link ObjectLink
			if err := assign(&link, v); err != nil {
				return err
			}
			*field(s) = &link
			return nil
		},
	}
}

func list[T any](field func(*Security) *[]T) access {
	return access{
		get: func(s *Security) (any, bool) { return slices.Clone(*field(s)), len(*field(s)) > 0 },
		set: func(s *Security, v any) error {
			values, ok := v.([]T)
			if !ok {
				return errType
			}
			*field(s) = slices.Clone(values)
			return nil
		},
	}
}

func numbers[T number](field func(*Security) *[]T) access {
	return access{
		get: func(s *Security) (any, bool) {
			values := make([]uint64, len(*field(s)))
			for i, n := range *field(s) {
				values[i] = uint64(n)
			}
			return values, len(values) > 0
		},
		set: func(s *Security, v any) error {
			values, ok := v.([]uint64)
			if !ok {
				return errType
			}
			fitting := make([]T, len(values))
			for i, n := range values {
				if err := assignNumber[uint64](&fitting[i], n); err != nil {
					return err
				}
			}
			*field(s) = fitting
			return nil
		},
	}
}

// publicKeyOrIdentity is the wire view of resource 3: what stands beside it, in
// an engine or in a file, is not in it.
func (s *Security) publicKeyOrIdentity() []byte {
	var value []byte
	switch s.Mode {
	case ModePSK:
		value, _ = s.PSKIdentity.Buffer()
	case ModeRawPublicKey:
		value = s.ClientPublicKey
	case ModeCertificate:
		value, _ = s.ClientCertificate.Buffer()
	}
	return append([]byte{}, value...)
}

func (s *Security) setPublicKeyOrIdentity(value any) error {
	var b []byte
	if err := assign(&b, value); err != nil || len(b) == 0 {
		return err // an empty value says nothing: the infos stay
	}
	switch s.Mode {
	case ModePSK:
		s.PSKIdentity = engine.PSKIdentityFromBuffer(b)
	case ModeRawPublicKey:
		s.ClientPublicKey = b
	case ModeCertificate:
		s.ClientCertificate = engine.CertificateChainFromBuffer(b)
	default:
		return fmt.Errorf("not used in %s", s.Mode)
	}
	return nil
}

// secretKey is the wire view of resource 5.
func (s *Security) secretKey() []byte {
	var value []byte
	if s.Mode == ModePSK {
		value, _ = s.PSKKey.Buffer()
	}
	return append([]byte{}, value...)
}

func (s *Security) setSecretKey(value any) error {
	var b []byte
	if err := assign(&b, value); err != nil || len(b) == 0 {
		return err
	}
	switch s.Mode {
	case ModePSK:
		s.PSKKey = engine.PSKKeyFromBuffer(b)
	case ModeRawPublicKey, ModeCertificate:
		return errPrivateKey
	default:
		return fmt.Errorf("not used in %s", s.Mode)
	}
	return nil
}

// checkRange holds a value to its registered range.
func (d Definition) checkRange(value any) error {
	switch v := value.(type) {
	case int64:
		return d.checkNumber("", v)
	case uint64:
		return d.checkNumber("", int64(min(v, math.MaxInt64)))
	case string:
		return d.checkNumber("a length of ", int64(len(v)))
	case []byte:
		return d.checkNumber("a length of ", int64(len(v)))
	case []uint64:
		for _, n := range v {
			if err := d.checkRange(n); err != nil {
				return err
			}
		}
	case []string:
		for _, s := range v {
			if err := d.checkRange(s); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkNumber understands "", "lowest..highest" and "one,of,these".
func (d Definition) checkNumber(of string, n int64) error {
	if d.Range == "" {
		return nil
	}
	text := strconv.FormatInt(n, 10)
	inside := slices.Contains(strings.Split(d.Range, ","), text)
	if lowest, highest, ok := strings.Cut(d.Range, ".."); ok {
		low, errLow := strconv.ParseInt(lowest, 10, 64)
		high, errHigh := strconv.ParseInt(highest, 10, 64)
		inside = errLow == nil && errHigh == nil && low <= n && n <= high
	}
	if !inside {
		return fmt.Errorf("%s%d is not in %s", of, n, d.Range)
	}
	return nil
}
