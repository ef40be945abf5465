package lwm2m_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/xml"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll/engine"
	"estenroll/lwm2m"
)

// address is an engine address of a test; like a driver's it is comparable.
type address string

func (a address) String() string { return string(a) }
func (address) Scheme() string   { return "pkcs11" }

// parseAddress is a driver's parser in small: it refuses a PIN without showing it.
func parseAddress(s string) (engine.Address, error) {
	if !strings.HasPrefix(s, "pkcs11:") {
		return nil, errors.New("engine address: no driver for its scheme")
	}
	if strings.Contains(s, "pin-value") {
		return nil, errors.New("parse engine address: pin-value: not in an object's address")
	}
	return address(s), nil
}

// keyAndCertificate makes a P-256 key's SubjectPublicKeyInfo and a certificate, in DER.
func keyAndCertificate(t testing.TB) (spki, certificate []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err = x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test only"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0),
	}
	certificate, err = x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return spki, certificate
}

// enrolled is the instance that an enrolment ends with.
func enrolled(certificate []byte) lwm2m.Security {
	return lwm2m.Security{
		ServerURI:         "coaps://server.example:5684",
		Mode:              lwm2m.ModeEST,
		ClientCertificate: engine.CertificateChainFromEngine(address("pkcs11:object=dev-1a2b;id=%01;type=cert")),
		PrivateKey:        engine.PrivateKeyFromEngine(address("pkcs11:object=dev;id=%01;type=private")),
		ServerPublicKey:   certificate,
		ShortServerID:     1,
	}
}

// everything has each optional resource.
func everything(certificate []byte) lwm2m.Security {
	s := enrolled(certificate)
	s.SMSSecurityMode = new(uint8(0))
	s.SMSBindingKeyParameters = []byte("6bytes")
	s.SMSBindingSecretKeys = engine.PSKKeyFromEngine(address("pkcs11:object=sms;type=secret-key"))
	s.ServerSMSNumber = "+4930123456"
	s.ShortServerID = 65534
	s.ClientHoldOffTime = new(time.Duration(0))
	s.BootstrapAccountTimeout = time.Hour
	s.MatchingType = lwm2m.MatchSHA256
	hash := sha256.Sum256(certificate)
	s.ServerPublicKey = hash[:]
	s.SNI = "server.example"
	s.CertificateUsage = new(lwm2m.CAConstraint)
	s.Ciphersuites = []uint32{0xc0ae}
	s.OSCORE = &lwm2m.ObjectLink{Object: 21, Instance: 0}
	s.Groups = []uint16{0x0017}
	s.ServerSignatureAlgorithms = []uint16{0x0403}
	s.SignatureAlgorithms = []uint16{0x0403, 0x0503}
	s.ServerSignatureAlgorithmsCerts = []uint16{0x0403}
	s.TLS13Features = new(uint16(0))
	s.ServerTLSExtensions = new(uint16(1))
	s.TLSExtensions = new(uint16(1<<12 | 1))
	s.SecondaryServerURIs = []string{"coaps+tcp://server.example", "coaps://[2001:db8::1]"}
	s.MQTTServer = &lwm2m.ObjectLink{Object: 24, Instance: 1}
	s.COSESecurity = []lwm2m.ObjectLink{{Object: 23, Instance: 0}, {Object: 23, Instance: 1}}
	s.RDSDestinationPort = new(uint8(0))
	s.RDSSourcePort = new(uint8(15))
	s.RDSApplicationID = "app"
	return s
}

// TestDefinitions holds the table to the registered definition.
func TestDefinitions(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("../testdata/registry/lwm2m-object-0.xml")
	if err != nil {
		t.Fatal(err)
	}
	var registry struct {
		Object struct {
			ObjectID      int
			ObjectURN     string
			ObjectVersion string
			Resources     struct {
				Item []struct {
					ID                uint16 `xml:"ID,attr"`
					Name              string
					MultipleInstances string
					Mandatory         string
					Type              string
					RangeEnumeration  string
					Units             string
				}
			}
		}
	}
	if err := xml.Unmarshal(data, &registry); err != nil {
		t.Fatal(err)
	}
	object := registry.Object
	if object.ObjectID != lwm2m.SecurityObjectID || object.ObjectVersion != "1.2" {
		t.Errorf("object %d version %s", object.ObjectID, object.ObjectVersion)
	}
	var want []lwm2m.Definition
	for _, item := range object.Resources.Item {
		want = append(want, lwm2m.Definition{
			ID: lwm2m.ResourceID(item.ID), Name: item.Name, Type: lwm2m.Type(item.Type),
			Multiple: item.MultipleInstances == "Multiple", Mandatory: item.Mandatory == "Mandatory",
			Range: item.RangeEnumeration, Units: item.Units,
		})
	}
	if len(want) == 0 {
		t.Fatal("no resource in the registry's file")
	}
	if diff := cmp.Diff(lwm2m.Definitions(), want); diff != "" {
		t.Errorf("-ours +registered:\n%s", diff)
	}
}

// TestResourceTypes holds each field to the type that its resource has.
func TestResourceTypes(t *testing.T) {
	t.Parallel()
	_, certificate := keyAndCertificate(t)
	s := everything(certificate)
	s.SMSBindingSecretKeys = engine.PSKKeyFromBuffer(make([]byte, 16))
	single := map[lwm2m.Type]any{
		lwm2m.TypeString: "", lwm2m.TypeBoolean: false, lwm2m.TypeInteger: int64(0), lwm2m.TypeUnsignedInteger: uint64(0),
		lwm2m.TypeOpaque: []byte{}, lwm2m.TypeObjectLink: lwm2m.ObjectLink{},
	}
	multiple := map[lwm2m.Type]any{
		lwm2m.TypeString: []string{}, lwm2m.TypeUnsignedInteger: []uint64{}, lwm2m.TypeObjectLink: []lwm2m.ObjectLink{},
	}
	minimal := lwm2m.Security{}
	var o lwm2m.SecurityObject
	for _, d := range lwm2m.Definitions() {
		value, present := s.Resource(d.ID)
		if !present {
			t.Errorf("%d %s: absent", d.ID, d.Name)
			continue
		}
		want := single[d.Type]
		if d.Multiple {
			want = multiple[d.Type]
		}
		if got, want := fmt.Sprintf("%T", value), fmt.Sprintf("%T", want); got != want {
			t.Errorf("%d %s: got a %s, want a %s", d.ID, d.Name, got, want)
		}
		if _, present := minimal.Resource(d.ID); present != d.Mandatory {
			t.Errorf("%d %s: present in an empty instance: %v, mandatory: %v", d.ID, d.Name, present, d.Mandatory)
		}
		// What is read can be written, and a value of another type cannot.
		if _, err := o.Write(7, map[lwm2m.ResourceID]any{d.ID: value}); err != nil {
			t.Error(err)
		}
		var wrong *lwm2m.ResourceError
		if _, err := o.Write(7, map[lwm2m.ResourceID]any{d.ID: struct{}{}}); !errors.As(err, &wrong) || wrong.Resource != d.ID {
			t.Errorf("%d %s: another type: got %v", d.ID, d.Name, err)
		}
		written, _ := o.Instance(7)
		again, _ := written.Resource(d.ID)
		if diff := cmp.Diff(again, value); diff != "" {
			t.Errorf("%d %s: -written +read:\n%s", d.ID, d.Name, diff)
		}
	}
	if _, present := s.Resource(31); present {
		t.Error("a resource that Security 1.2 does not have")
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	spki, certificate := keyAndCertificate(t)
	at := address("pkcs11:object=x")
	psk := lwm2m.Security{
		ServerURI: "coaps://a.example", Mode: lwm2m.ModePSK, ShortServerID: 1,
		PSKIdentity: engine.PSKIdentityFromBuffer([]byte("device")), PSKKey: engine.PSKKeyFromEngine(at),
	}
	rpk := lwm2m.Security{
		ServerURI: "coaps+tcp://192.0.2.1:5684/path?query", Mode: lwm2m.ModeRawPublicKey, ShortServerID: 1,
		ClientPublicKey: spki, PrivateKey: engine.PrivateKeyFromEngine(at), ServerPublicKey: spki,
	}
	est := enrolled(certificate)
	for _, tc := range []struct {
		name string
		base lwm2m.Security
		edit func(*lwm2m.Security)
		want string // "" is valid
	}{
		{"EST", est, nil, ""},
		{"EST before any credential", est, func(s *lwm2m.Security) {
			s.ClientCertificate, s.PrivateKey = engine.CertificateChainInfo{}, engine.PrivateKeyInfo{}
		}, ""},
		{"everything", everything(certificate), nil, ""},
		{"PSK", psk, nil, ""},
		{"raw public key", rpk, nil, ""},
		{"EST server over HTTPS", est, func(s *lwm2m.Security) { s.ServerURI = "https://a.example:443/.well-known/est" }, ""},
		{"certificate", est, func(s *lwm2m.Security) { s.Mode = lwm2m.ModeCertificate }, ""},
		{"certificate in a buffer", est, func(s *lwm2m.Security) {
			s.Mode, s.ClientCertificate = lwm2m.ModeCertificate, engine.CertificateChainFromBuffer(certificate)
		}, ""},
		{"NoSec", lwm2m.Security{ServerURI: "coap://a.example", Mode: lwm2m.ModeNoSec, ShortServerID: 1}, nil, ""},
		{"bootstrap server without a short id", est, func(s *lwm2m.Security) { s.BootstrapServer, s.ShortServerID = true, 0 }, ""},

		{"scheme", est, func(s *lwm2m.Security) { s.ServerURI = "http://a.example" }, "/0/0/0: not a coap:, coaps:, coap+tcp:, coaps+tcp: or https: URI"},
		{"no URI", est, func(s *lwm2m.Security) { s.ServerURI = "" }, "/0/0/0: not a coap:, coaps:, coap+tcp:, coaps+tcp: or https: URI"},
		{"not a URI", est, func(s *lwm2m.Security) { s.ServerURI = "coaps://a.example:SECRET" }, "/0/0/0: not a URI"},
		{"no host", est, func(s *lwm2m.Security) { s.ServerURI = "coaps://:5684" }, "/0/0/0: a URI without a host"},
		{"user", est, func(s *lwm2m.Security) { s.ServerURI = "coaps://u:SECRET@a.example" }, "/0/0/0: a server's URI has neither user nor fragment"},
		{"fragment", est, func(s *lwm2m.Security) { s.ServerURI = "coaps://a.example/#" }, "/0/0/0: a server's URI has neither user nor fragment"},
		{"long URI", est, func(s *lwm2m.Security) { s.ServerURI = "coaps://a.example/" + strings.Repeat("x", 238) }, "/0/0/0: a length of 256 is not in 0..255"},
		{"unprotected scheme", est, func(s *lwm2m.Security) { s.ServerURI = "coap://a.example" }, "/0/0/0: coap: is not protected, against mode 4 (certificate with EST)"},
		{"protected scheme", est, func(s *lwm2m.Security) {
			*s = lwm2m.Security{ServerURI: "coaps://a.example", Mode: lwm2m.ModeNoSec, ShortServerID: 1}
		}, "/0/0/0: coaps: needs a security mode, not mode 3 (NoSec)"},
		{"control character", est, func(s *lwm2m.Security) { s.SNI = "a\nb" }, "/0/0/14: control characters or text that is not UTF-8"},

		{"mode", lwm2m.Security{ServerURI: "coaps://a.example", Mode: 5, ShortServerID: 1}, nil, "/0/0/2: 5 is not in 0..4"},
		{"PSK without identity", psk, func(s *lwm2m.Security) { s.PSKIdentity = engine.PSKIdentityInfo{} }, "/0/0/3: mode 0 (pre-shared key) needs a PSK identity"},
		{"PSK without key", psk, func(s *lwm2m.Security) { s.PSKKey = engine.PSKKeyInfo{} }, "/0/0/5: mode 0 (pre-shared key) needs a pre-shared key"},
		{"empty identity", psk, func(s *lwm2m.Security) { s.PSKIdentity = engine.PSKIdentityFromBuffer(nil) }, "/0/0/3: an empty buffer"},
		{"two sources of 3", est, func(s *lwm2m.Security) { s.PSKIdentity = psk.PSKIdentity }, "/0/0/3: a PSK identity has no place in mode 4 (certificate with EST)"},
		{"two sources of 5", est, func(s *lwm2m.Security) { s.PSKKey = psk.PSKKey }, "/0/0/5: a pre-shared key has no place in mode 4 (certificate with EST)"},
		{"public key in mode 4", est, func(s *lwm2m.Security) { s.ClientPublicKey = spki }, "/0/0/3: a client public key has no place in mode 4 (certificate with EST)"},
		{"certificate without key", est, func(s *lwm2m.Security) { s.PrivateKey = engine.PrivateKeyInfo{} }, "/0/0/5: a certificate and its private key go together"},
		{"credential in NoSec", est, func(s *lwm2m.Security) {
			s.ServerURI, s.Mode, s.PrivateKey = "coap://a.example", lwm2m.ModeNoSec, engine.PrivateKeyInfo{}
		}, "/0/0/3: a client certificate has no place in mode 3 (NoSec)"},
		{"not a public key", rpk, func(s *lwm2m.Security) { s.ClientPublicKey = []byte{1} }, "/0/0/3: client public key: "},
		{"not a certificate", est, func(s *lwm2m.Security) { s.ClientCertificate = engine.CertificateChainFromBuffer([]byte{1}) }, "/0/0/3: certificate chain info: "},

		{"no server certificate", est, func(s *lwm2m.Security) { s.ServerPublicKey = nil }, "/0/0/4: mode 4 (certificate with EST) needs the server's public key, certificate or trust anchor"},
		{"not a server certificate", est, func(s *lwm2m.Security) { s.ServerPublicKey = append(certificate, 0) }, "/0/0/4: x509: "},
		{"not a server key", rpk, func(s *lwm2m.Security) { s.ServerPublicKey = certificate }, "/0/0/4: "},
		{"hash", est, func(s *lwm2m.Security) { s.MatchingType, s.ServerPublicKey = lwm2m.MatchSHA384, make([]byte, 32) }, "/0/0/4: matching type 2 is a hash of 48 bytes, this is 32"},
		{"matching type", est, func(s *lwm2m.Security) { s.MatchingType = 4 }, "/0/0/13: 4 is not in 0..3"},
		{"certificate usage", est, func(s *lwm2m.Security) { s.CertificateUsage = new(lwm2m.CertificateUsage(4)) }, "/0/0/15: 4 is not in 0..3"},

		{"SMS key parameters", est, func(s *lwm2m.Security) { s.SMSBindingKeyParameters = []byte("7 bytes") }, "/0/0/7: a length of 7 is not in 6"},
		{"SMS keys", est, func(s *lwm2m.Security) { s.SMSBindingSecretKeys = engine.PSKKeyFromBuffer(make([]byte, 17)) }, "/0/0/8: a length of 17 is not in 16,32,48"},
		{"no short id", est, func(s *lwm2m.Security) { s.ShortServerID = 0 }, "/0/0/10: a server that is not the Bootstrap-Server has a short server id"},
		{"short id", est, func(s *lwm2m.Security) { s.ShortServerID = 65535 }, "/0/0/10: 65535 is not in 1..65534"},
		{"hold off", est, func(s *lwm2m.Security) { s.ClientHoldOffTime = new(-time.Second) }, "/0/0/11: -1s is not a whole number of seconds below 2^32"},
		{"timeout", est, func(s *lwm2m.Security) { s.BootstrapAccountTimeout = time.Millisecond }, "/0/0/12: 1ms is not a whole number of seconds below 2^32"},
		{"long timeout", est, func(s *lwm2m.Security) { s.BootstrapAccountTimeout = time.Second << 32 }, "/0/0/12: 1193046h28m16s is not a whole number of seconds below 2^32"},
		{"literal as server name", est, func(s *lwm2m.Security) { s.SNI = "2001:db8::1" }, "/0/0/14: an IP address is not a server name"},
		{"secondary URI", est, func(s *lwm2m.Security) { s.SecondaryServerURIs = []string{"coaps://a", "coap://a"} }, "/0/0/25: coap: is not protected"},
		{"many ciphersuites", est, func(s *lwm2m.Security) { s.Ciphersuites = make([]uint32, 65) }, "/0/0/16: 65 values are more than 64"},
		{"port", est, func(s *lwm2m.Security) { s.RDSSourcePort = new(uint8(16)) }, "/0/0/29: 16 is not in 0..15"},
		{"long path", est, func(s *lwm2m.Security) { s.PrivateKey = engine.PrivateKeyFromFile(strings.Repeat("x", 4097)) }, "/0/0/5: 4097 bytes are more than 4096"},
		{"long certificate", est, func(s *lwm2m.Security) { s.ServerPublicKey = make([]byte, 16385) }, "/0/0/4: 16385 bytes are more than 16384"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := tc.base
			if tc.edit != nil {
				tc.edit(&s)
			}
			var o lwm2m.SecurityObject
			o.Set(0, s)
			err := o.Validate()
			if tc.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil {
				t.Fatalf("accepted; want %s", tc.want)
			}
			if got := err.Error(); !strings.HasPrefix(got, "security object: "+tc.want) {
				t.Errorf("got %s\nwant %s", got, tc.want)
			}
			if strings.Contains(err.Error(), "SECRET") {
				t.Errorf("a value is shown: %v", err)
			}
			var list lwm2m.ValidationError
			var one *lwm2m.ResourceError
			if !errors.As(err, &list) || !errors.As(err, &one) {
				t.Errorf("got a %T", err)
			}
		})
	}
}

func TestValidateInstances(t *testing.T) {
	t.Parallel()
	_, certificate := keyAndCertificate(t)
	var o lwm2m.SecurityObject
	if err := o.Validate(); err != nil {
		t.Errorf("an empty object: %v", err)
	}
	server, bootstrap := enrolled(certificate), enrolled(certificate)
	bootstrap.BootstrapServer, bootstrap.ShortServerID = true, 0
	o.Set(0, bootstrap)
	o.Set(3, server)
	if err := o.Validate(); err != nil {
		t.Error(err)
	}
	o.Set(4, server)
	o.Set(1, bootstrap)
	want := "security object: /0/1/1: a second Bootstrap-Server: /0/0 is one; /0/4/10: short server id 1 is that of /0/3"
	if err := o.Validate(); err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	o.Delete(1)
	o.Delete(4)
	o.Set(65535, bootstrap)
	if err := o.Validate(); err == nil || !strings.Contains(err.Error(), "/0/65535/0: 65535 is not the number of an instance") {
		t.Errorf("got %v", err)
	}
	for id := range uint16(17) {
		server.ShortServerID = id + 1
		o.Set(id, server)
	}
	o.Delete(65535)
	if err := o.Validate(); err == nil || !strings.Contains(err.Error(), "17 instances are more than 16") {
		t.Errorf("got %v", err)
	}
}

func TestInstances(t *testing.T) {
	t.Parallel()
	_, certificate := keyAndCertificate(t)
	var o lwm2m.SecurityObject
	if _, ok := o.Instance(0); ok || o.Delete(0) {
		t.Error("an instance in the zero object")
	}
	s := everything(certificate)
	for _, id := range []uint16{300, 2, 10} {
		o.Set(id, s)
	}
	// Neither what was set nor what is got reaches into the object.
	s.Groups[0], *s.TLS13Features, s.OSCORE.Instance = 99, 99, 99
	got, _ := o.Instance(2)
	got.Groups[0], *got.TLS13Features, got.OSCORE.Instance = 99, 99, 99
	var ids []uint16
	for id, s := range o.All() {
		ids = append(ids, id)
		if s.Groups[0] != 0x17 || *s.TLS13Features != 0 || s.OSCORE.Instance != 0 {
			t.Errorf("/0/%d was changed from outside", id)
		}
	}
	if want := []uint16{2, 10, 300}; !cmp.Equal(ids, want) {
		t.Errorf("got %v, want %v", ids, want)
	}
	if !o.Delete(10) || o.Delete(10) {
		t.Error("an instance is deleted once")
	}
	if got.Usage() != lwm2m.CAConstraint || (lwm2m.Security{}).Usage() != lwm2m.DomainIssuedCertificate {
		t.Error("usage")
	}
}

// TestWriteInModeEST: a non-empty 3 or 5 written with mode 4 is ignored with a
// warning, and what stands beside it stays.
func TestWriteInModeEST(t *testing.T) {
	t.Parallel()
	_, certificate := keyAndCertificate(t)
	var o lwm2m.SecurityObject
	s := enrolled(certificate)
	s.Mode = lwm2m.ModeCertificate
	o.Set(0, s)
	warnings, err := o.Write(0, map[lwm2m.ResourceID]any{
		lwm2m.ResourceSecretKey:           []byte("a key that is not for us"),
		lwm2m.ResourcePublicKeyOrIdentity: certificate,
		lwm2m.ResourceSecurityMode:        int64(4),
		lwm2m.ResourceShortServerID:       int64(7),
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, w := range warnings {
		got = append(got, w.Error())
	}
	want := []string{
		"/0/0/3: ignored: not used in mode 4 (certificate with EST)",
		"/0/0/5: ignored: not used in mode 4 (certificate with EST)",
	}
	if diff := cmp.Diff(got, want); diff != "" {
		t.Error(diff)
	}
	after, _ := o.Instance(0)
	if after.Mode != lwm2m.ModeEST || after.ShortServerID != 7 ||
		after.ClientCertificate.String() != s.ClientCertificate.String() || after.PrivateKey.String() != s.PrivateKey.String() {
		t.Errorf("got %+v", after)
	}
	for _, r := range []lwm2m.ResourceID{3, 5} {
		if value, present := after.Resource(r); !present || len(value.([]byte)) != 0 {
			t.Errorf("the wire view of %d is %v, %v", r, value, present)
		}
	}
	warnings, err = o.Write(0, map[lwm2m.ResourceID]any{3: []byte{}, 5: []byte{}})
	if len(warnings) != 0 || err != nil {
		t.Errorf("empty values: %v, %v", warnings, err)
	}
}

func TestWrite(t *testing.T) {
	t.Parallel()
	_, certificate := keyAndCertificate(t)
	var o lwm2m.SecurityObject
	if _, err := o.Write(0, map[lwm2m.ResourceID]any{
		lwm2m.ResourceServerURI: "coaps://a.example", lwm2m.ResourceSecurityMode: int64(0), lwm2m.ResourceShortServerID: int64(1),
		lwm2m.ResourcePublicKeyOrIdentity: []byte("device"), lwm2m.ResourceSecretKey: []byte("SECRET"),
	}); err != nil {
		t.Fatal(err)
	}
	s, _ := o.Instance(0)
	if err := o.Validate(); err != nil {
		t.Error(err)
	}
	if text := fmt.Sprintf("%v %+v %#v", s, s, s.PSKKey); strings.Contains(text, "SECRET") || strings.Contains(text, "83 69 67") {
		t.Errorf("the key is printed: %s", text)
	}
	for name, tc := range map[string]struct {
		values map[lwm2m.ResourceID]any
		want   string
	}{
		"private key": {map[lwm2m.ResourceID]any{2: int64(2), 3: certificate, 5: []byte("SECRET")},
			"/0/0/5: a private key is kept in an engine or in a file, never in the object"},
		"NoSec":     {map[lwm2m.ResourceID]any{2: int64(3), 3: []byte("x")}, "/0/0/3: not used in mode 3 (NoSec)"},
		"overflow":  {map[lwm2m.ResourceID]any{10: int64(65537)}, "/0/0/10: 65537 does not fit"},
		"negative":  {map[lwm2m.ResourceID]any{11: int64(-1)}, "/0/0/11: -1 does not fit"},
		"list":      {map[lwm2m.ResourceID]any{18: []uint64{1, 65536}}, "/0/0/18: 65536 does not fit"},
		"unknown":   {map[lwm2m.ResourceID]any{31: "x"}, "/0/0/31: no such resource in Security 1.2"},
		"type in 4": {map[lwm2m.ResourceID]any{2: int64(4), 3: "x"}, "/0/0/3: the value has another type"},
	} {
		if _, err := o.Write(0, tc.values); err == nil || err.Error() != tc.want {
			t.Errorf("%s: got %v, want %s", name, err, tc.want)
		}
		if after, _ := o.Instance(0); after.Mode != lwm2m.ModePSK {
			t.Errorf("%s: a refused write changed the instance", name)
		}
	}
}
