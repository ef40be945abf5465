package lwm2m

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"estenroll/engine"
	"estenroll/internal/durable"
)

// persistedVersion is the version of the persisted form. A change that an older
// program would misread gets a new one.
const persistedVersion = 1

// maxPersisted is the most bytes of a persisted object that are read.
const maxPersisted = 4 << 20

// ErrSecretBuffer says that a private or pre-shared key lies in a buffer, which is never persisted.
var ErrSecretBuffer = errors.New("a secret key in a buffer is not persisted: put it into an engine or a file")

// ErrVersion says that a persisted object is of a version this program does not know.
var ErrVersion = errors.New("not a version of the Security object that is known here")

type persistedObject struct {
	Version   int                 `json:"version"`
	Instances []persistedInstance `json:"instances"`
}

// persistedInstance is a Security with what its own tags leave out: credentials
// as references, times in seconds.
type persistedInstance struct {
	ID uint16 `json:"id"`
	Security
	ClientCertificate       *persistedInfo `json:"client_certificate,omitempty"`
	PSKIdentity             *persistedInfo `json:"psk_identity,omitempty"`
	PrivateKey              *persistedInfo `json:"private_key,omitempty"`
	PSKKey                  *persistedInfo `json:"psk_key,omitempty"`
	SMSBindingSecretKeys    *persistedInfo `json:"sms_binding_secret_keys,omitempty"`
	ClientHoldOffTime       *uint32        `json:"client_hold_off_seconds,omitempty"`
	BootstrapAccountTimeout uint32         `json:"bootstrap_account_timeout_seconds,omitempty"`
}

// persistedInfo has exactly one source.
type persistedInfo struct {
	Engine string `json:"engine,omitempty"`
	File   string `json:"file,omitempty"`
	Buffer []byte `json:"buffer,omitempty"` // public values only
}

// Save writes the object to a file with mode 0600, atomically and durably. See Encode.
func (o *SecurityObject) Save(path string) error {
	data, err := o.Encode()
	if err != nil {
		return fmt.Errorf("save %s: %w", path, err)
	}
	return durable.WriteFile(path, data, 0o600)
}

// Encode returns the persisted form: versioned JSON with references only. Public
// values (certificates, public keys, a PSK identity) may stand in it as base64; a
// secret key in a buffer is refused with ErrSecretBuffer, and an object that
// Validate refuses is not encoded.
func (o *SecurityObject) Encode() ([]byte, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	object := persistedObject{Version: persistedVersion, Instances: []persistedInstance{}}
	for id, s := range o.All() {
		for _, i := range s.infos() {
			if _, buffered := i.info.Buffer(); buffered && i.secret {
				return nil, ValidationError{{Instance: id, Resource: i.resource, Err: ErrSecretBuffer}}
			}
		}
		p := persistedInstance{
			ID:                      id,
			Security:                s,
			ClientCertificate:       persistInfo(s.ClientCertificate),
			PSKIdentity:             persistInfo(s.PSKIdentity),
			PrivateKey:              persistInfo(s.PrivateKey),
			PSKKey:                  persistInfo(s.PSKKey),
			SMSBindingSecretKeys:    persistInfo(s.SMSBindingSecretKeys),
			BootstrapAccountTimeout: uint32(s.BootstrapAccountTimeout / time.Second),
		}
		if s.ClientHoldOffTime != nil {
			p.ClientHoldOffTime = new(uint32(*s.ClientHoldOffTime / time.Second))
		}
		object.Instances = append(object.Instances, p)
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(object); err != nil {
		return nil, fmt.Errorf("security object: %w", err)
	}
	return b.Bytes(), nil
}

func persistInfo(i info) *persistedInfo {
	if at, ok := i.Engine(); ok {
		return &persistedInfo{Engine: at.String()}
	}
	if path, ok := i.File(); ok {
		return &persistedInfo{File: path}
	}
	if b, ok := i.Buffer(); ok {
		return &persistedInfo{Buffer: b}
	}
	return nil
}

// LoadSecurity reads what Save wrote. A missing file is fs.ErrNotExist. See ParseSecurity.
//
// The file's mode is not judged: it holds no secret, and who may replace it is
// decided by its directory's. The next Save makes it 0600.
func LoadSecurity(path string, parseAddress func(string) (engine.Address, error)) (*SecurityObject, error) {
	data, err := durable.ReadFile(path, maxPersisted)
	if err != nil {
		return nil, err
	}
	o, err := ParseSecurity(data, parseAddress)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", path, err)
	}
	return o, nil
}

// ParseSecurity reads the persisted form strictly: an unknown version (ErrVersion) or
// field, a field given twice, null, trailing data, and an object that Validate
// refuses are errors. No error repeats a value; an engine address is named by
// its field, and the error of parseAddress, which MUST NOT show a PIN, follows.
func ParseSecurity(data []byte, parseAddress func(string) (engine.Address, error)) (*SecurityObject, error) {
	if len(data) > maxPersisted {
		return nil, fmt.Errorf("security object: %d bytes are more than %d", len(data), maxPersisted)
	}
	if err := checkJSON(data); err != nil {
		return nil, fmt.Errorf("security object: %w", err)
	}
	// The version first: of another version nothing else can be judged.
	var version struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &version); err != nil {
		return nil, fmt.Errorf("security object: %w", describe(err))
	}
	if version.Version != persistedVersion {
		return nil, fmt.Errorf("security object: version %d: %w", version.Version, ErrVersion)
	}
	var object persistedObject
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&object); err != nil {
		return nil, fmt.Errorf("security object: %w", describe(err))
	}
	var o SecurityObject
	for _, p := range object.Instances {
		s, err := p.restore(parseAddress)
		if err != nil {
			return nil, fmt.Errorf("security object: %w", err)
		}
		if _, twice := o.instances[p.ID]; twice {
			return nil, fmt.Errorf("security object: instance /0/%d is there twice", p.ID)
		}
		o.Set(p.ID, s)
	}
	if err := o.Validate(); err != nil {
		return nil, err
	}
	return &o, nil
}

func (p *persistedInstance) restore(parseAddress func(string) (engine.Address, error)) (Security, error) {
	s := p.Security
	s.BootstrapAccountTimeout = time.Duration(p.BootstrapAccountTimeout) * time.Second
	if p.ClientHoldOffTime != nil {
		s.ClientHoldOffTime = new(time.Duration(*p.ClientHoldOffTime) * time.Second)
	}
	for _, c := range []struct {
		name     string
		resource ResourceID
		from     *persistedInfo
		engine   func(engine.Address)
		file     func(string)
		buffer   func([]byte) // nil where a buffer would be a secret
	}{
		{
			"client_certificate", ResourcePublicKeyOrIdentity, p.ClientCertificate,
			func(at engine.Address) { s.ClientCertificate = engine.CertificateChainFromEngine(at) },
			func(path string) { s.ClientCertificate = engine.CertificateChainFromFile(path) },
			func(der []byte) { s.ClientCertificate = engine.CertificateChainFromBuffer(der) },
		},
		{
			"psk_identity", ResourcePublicKeyOrIdentity, p.PSKIdentity,
			func(at engine.Address) { s.PSKIdentity = engine.PSKIdentityFromEngine(at) },
			func(path string) { s.PSKIdentity = engine.PSKIdentityFromFile(path) },
			func(identity []byte) { s.PSKIdentity = engine.PSKIdentityFromBuffer(identity) },
		},
		{
			"private_key", ResourceSecretKey, p.PrivateKey,
			func(at engine.Address) { s.PrivateKey = engine.PrivateKeyFromEngine(at) },
			func(path string) { s.PrivateKey = engine.PrivateKeyFromFile(path) }, nil,
		},
		{
			"psk_key", ResourceSecretKey, p.PSKKey,
			func(at engine.Address) { s.PSKKey = engine.PSKKeyFromEngine(at) },
			func(path string) { s.PSKKey = engine.PSKKeyFromFile(path) }, nil,
		},
		{
			"sms_binding_secret_keys", ResourceSMSBindingSecretKeys, p.SMSBindingSecretKeys,
			func(at engine.Address) { s.SMSBindingSecretKeys = engine.PSKKeyFromEngine(at) },
			func(path string) { s.SMSBindingSecretKeys = engine.PSKKeyFromFile(path) }, nil,
		},
	} {
		if c.from == nil {
			continue
		}
		var err error
		switch from := *c.from; {
		case from.Engine != "" && from.File == "" && from.Buffer == nil:
			if err = checkSize(from.Engine); err == nil {
				var at engine.Address
				if at, err = parseAddress(from.Engine); err == nil {
					c.engine(at)
				}
			}
		case from.Engine == "" && from.File != "" && from.Buffer == nil:
			c.file(from.File)
		case from.Engine == "" && from.File == "" && from.Buffer != nil && c.buffer == nil:
			err = ErrSecretBuffer
		case from.Engine == "" && from.File == "" && from.Buffer != nil:
			c.buffer(from.Buffer)
		default:
			err = errors.New("not exactly one of engine, file and buffer")
		}
		if err != nil {
			return Security{}, &ResourceError{Instance: p.ID, Resource: c.resource, Err: fmt.Errorf("%s: %w", c.name, err)}
		}
	}
	return s, nil
}

// describe keeps what the decoder says of places and names, not of values.
func describe(err error) error {
	var wrongType *json.UnmarshalTypeError
	if errors.As(err, &wrongType) {
		kind, _, _ := strings.Cut(wrongType.Value, " ") // "number 70000"
		if wrongType.Field == "" {
			return fmt.Errorf("a value of type %s, not an object", kind)
		}
		return fmt.Errorf("%s: a value of type %s does not fit", wrongType.Field, kind)
	}
	return err
}

// checkJSON refuses what encoding/json would let pass: keys that occur twice or
// in another case, null, data after the value, bytes that are not UTF-8.
func checkJSON(data []byte) error {
	if !utf8.Valid(data) {
		return errors.New("not UTF-8")
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	if err := checkValue(decoder, 0); errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	} else if err != nil {
		return err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the object")
	}
	return nil
}

func checkValue(decoder *json.Decoder, depth int) error {
	const deepest = 8 // object, instances, instance, list, link
	token, err := decoder.Token()
	if err != nil {
		return err
	}
	switch token {
	case nil:
		return errors.New("null is not a value here")
	case json.Delim('{'), json.Delim('['):
	default:
		return nil
	}
	if depth == deepest {
		return errors.New("nested too deeply")
	}
	seen := map[string]bool{}
	for decoder.More() {
		if token == json.Delim('{') {
			key, err := decoder.Token()
			if err != nil {
				return err
			}
			name, _ := key.(string)
			if len(name) > 64 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
				return errors.New("a field with a name that no field has")
			}
			if seen[name] {
				return fmt.Errorf("field %q is there twice", name)
			}
			seen[name] = true
		}
		if err := checkValue(decoder, depth+1); err != nil {
			return err
		}
	}
	_, err = decoder.Token()
	return err
}
