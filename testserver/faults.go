package testserver

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/csr"
	"estenroll/est"
)

// Faults are the ways in which the server misbehaves on purpose. The zero
// value is an honest server. Each has a textual form, given in its comment, for
// [ParseFaults].
type Faults struct {
	// Delay is how long an enrolment (sen, sren) takes. The answer is then a
	// separate response (RFC 9148 §4.7). "delay=2s"
	Delay time.Duration

	// Defer answers the first so many times that a CSR is sent with 5.03 and
	// DeferMaxAge (RFC 9148 §4.7). "defer=2" or "defer=2,max-age=5s"
	Defer int
	// DeferMaxAge is the Max-Age of a deferral, in whole seconds, 0 included; nil
	// leaves the option out, which means 60 s (RFC 7252 §5.10.5).
	DeferMaxAge *time.Duration

	// WrongKey issues for a key that nobody asked for, of the kind that was; with skg,
	// for another than the one that is sent. "wrong-key"
	WrongKey bool
	// NotYetValid issues certificates that begin an hour from now. "not-yet-valid"
	NotYetValid bool
	// Expired issues certificates that ended an hour ago. "expired"
	Expired bool
	// ForeignChain issues under a CA that bears the issuing CA's name and has
	// another key. "foreign-chain"
	ForeignChain bool
	// CAFlag issues certificates of a CA. "ca-flag"
	CAFlag bool
	// Subject (RFC 4514) is what certificates are issued for, whatever was asked.
	// "subject=CN=other,O=Example"
	Subject string
	// DropSAN leaves the subjectAltName out. "drop-san"
	DropSAN bool
	// IgnoreUsage issues for digitalSignature and clientAuth, whatever was asked.
	// "ignore-usage"
	IgnoreUsage bool

	// Answer is the code of every answer to a CSR, 4.00 to 5.31. "answer=4.00"
	Answer string
	// Body is a wrong body of the answer of sen and sren. "body=two-leaves"
	Body string
	// CRTS is a wrong answer of crts. "crts=foreign"
	CRTS string
	// CSRAttrs is a wrong answer of att and csrattrs, with Config.CSRAttributes.
	// "csrattrs=truncated"
	CSRAttrs string
	// ServerKey is a wrong answer of skg, skc and serverkeygen, with
	// Config.ServerKeyGen. "server-key=two-keys"
	ServerKey string
	// Envelope is a wrong encryption of the key in such an answer, where a CSR names the
	// key to do it with, or where none does. "envelope=unsigned"
	Envelope string
	// Message makes the messages that answer a CSR wrong, with Config.Raw.
	// "message=block-endless"
	Message string
	// HTTP makes the answer to a CSR over HTTPS wrong. "http=slow-body"
	HTTP string
	// At has Message and HTTP be of the answers of this operation instead. "at=crts"
	At string
	// RetryAfter is the Retry-After of HTTPS's deferrals, as it stands.
	// "retry-after=Fri, 31 Dec 9999 23:59:59 GMT"
	RetryAfter string
	// ServerCertificate is a wrong certificate of the server's.
	// "server-certificate=expired"
	ServerCertificate string
	// LongDetail makes the text of every error answer long, with control
	// characters and bytes that are no text. "long-detail"
	LongDetail bool

	// NoDiscovery has no /.well-known/core. "no-discovery"
	NoDiscovery bool
	// Links is what /.well-known/core answers, to every filter.
	// "links=</elsewhere/crts>;rt=\"ace.est.crts\""
	Links string

	// RefuseAll refuses every client certificate. "refuse-all"
	RefuseAll bool
	// RefuseIssued refuses the client certificates that this server's EST CA
	// issued, and not the IDevIDs. "refuse-client=issued"
	RefuseIssued bool
	// RefuseClients refuses client certificates by serial number or by SHA-256
	// fingerprint, both in hexadecimal, as a revocation would.
	// "refuse-client=HEX", repeated for more than one
	RefuseClients []string
	// RefuseCode is the CoAP code of a refusal, "4.01" or "4.03". Without it the
	// handshake is refused, with a fatal alert. "refuse-code=4.03"
	RefuseCode string
}

// choice is a fault whose value is one of a table.
type choice struct {
	name, does string
	values     map[string]string
	field      func(*Faults) *string
}

// choices are the faults with a table of their values.
var choices = []choice{
	{"body", "the answer of sen and sren is", bodyFaults, func(f *Faults) *string { return &f.Body }},
	{"crts", "the answer of crts is", crtsFaults, func(f *Faults) *string { return &f.CRTS }},
	{"csrattrs", "the answer of att and csrattrs is (--csr-attributes)", attributesFaults, func(f *Faults) *string { return &f.CSRAttrs }},
	{"server-key", "the answer of skg, skc and serverkeygen is (--server-keygen)", serverKeyFaults, func(f *Faults) *string { return &f.ServerKey }},
	{"envelope", "a key that is to be encrypted (--server-keygen) is", envelopeFaults, func(f *Faults) *string { return &f.Envelope }},
	{"message", "over CoAP the messages that answer a CSR (--raw)", messageFaults, func(f *Faults) *string { return &f.Message }},
	{"http", "the answer to a CSR over HTTPS is", httpFaults, func(f *Faults) *string { return &f.HTTP }},
	{"at", "http and message are not of the answer to a CSR but", atFaults, func(f *Faults) *string { return &f.At }},
	{"server-certificate", "the server's certificate is", serverCertificateFaults, func(f *Faults) *string { return &f.ServerCertificate }},
}

// atFaults are the operations beside those with a CSR whose answers can be wrong in
// their transport.
var atFaults = map[string]string{
	"crts": "of that of crts and cacerts",
	"att":  "of that of att and csrattrs",
}

// garbles reports whether Message and HTTP are for the answers of an operation.
func (f Faults) garbles(operation est.Operation) bool {
	switch f.At {
	case "crts":
		return operation == est.CACerts
	case "att":
		return operation == est.CSRAttrs
	}
	return !operation.Asks()
}

// FaultsHelp is a line for each fault, for a program's help text.
var FaultsHelp = plainFaultsHelp + choicesHelp()

func choicesHelp() string {
	var text strings.Builder
	for _, c := range choices {
		fmt.Fprintf(&text, "\n  %-30s %s", c.name+"=VALUE", c.does)
		for _, value := range slices.Sorted(maps.Keys(c.values)) {
			fmt.Fprintf(&text, "\n    %-28s %s", value, c.values[value])
		}
	}
	return text.String()
}

const plainFaultsHelp = `  delay=DURATION                 an enrolment takes this long: over CoAP a separate response
  defer=N[,max-age=DURATION]     the first N answers to a CSR are 5.03 (come back later) with
                                 this Max-Age, over HTTPS 202 with this Retry-After; without
                                 max-age there is neither, which over CoAP means 60 s
  retry-after=TEXT               the Retry-After over HTTPS is this, a date or what is neither
  wrong-key                      issue for a key that nobody asked for, of the same kind: the
                                 key of skg is then not that of its certificate
  not-yet-valid                  issue certificates that begin an hour from now
  expired                        issue certificates that ended an hour ago
  foreign-chain                  issue under a CA of the same name and another key
  ca-flag                        issue certificates of a CA
  subject=DN                     issue for this subject (RFC 4514), whatever was asked
  drop-san                       issue without the subjectAltName that was asked for
  ignore-usage                   issue for digitalSignature and clientAuth, whatever was asked
  answer=CODE                    answer every CSR with this error, 4.00 to 5.31
  long-detail                    error answers have 3,000 bytes of text, not all of it printable
  no-discovery                   over CoAP /.well-known/core is not found
  links=TEXT                     /.well-known/core answers this, whatever the filter
  refuse-all                     refuse every client certificate
  refuse-client=issued           refuse client certificates issued here (not the IDevIDs)
  refuse-client=HEX              refuse the client certificate with this serial number or
                                 SHA-256 fingerprint; may be repeated
  refuse-code=4.01|4.03          refuse with this answer; otherwise in the handshake`

// ParseFaults reads faults in their textual form, one per element. An unknown
// fault, a malformed value or one fault given twice is an error.
func ParseFaults(texts []string) (Faults, error) {
	var f Faults
	seen := make(map[string]bool)
	for _, text := range texts {
		name, value, hasValue := strings.Cut(text, "=")
		if seen[name] && name != "refuse-client" {
			return Faults{}, fmt.Errorf("fault %q: given twice", name)
		}
		seen[name] = true
		if err := f.set(name, value, hasValue); err != nil {
			return Faults{}, fmt.Errorf("fault %q: %w", text, err)
		}
	}
	return f, f.validate()
}

func (f *Faults) set(name, value string, hasValue bool) error {
	if flag, ok := f.flags()[name]; ok {
		if hasValue {
			return errors.New("takes no value")
		}
		*flag = true
		return nil
	}
	for _, c := range choices {
		if c.name == name {
			*c.field(f) = value
			return c.check(value)
		}
	}
	var err error
	switch name {
	case "delay":
		f.Delay, err = time.ParseDuration(value)
	case "defer":
		count, option, hasOption := strings.Cut(value, ",")
		if f.Defer, err = strconv.Atoi(count); err != nil || f.Defer < 1 {
			err = errors.New("want a number from 1 on")
		}
		if err != nil || !hasOption {
			return err
		}
		maxAge, ok := strings.CutPrefix(option, "max-age=")
		if !ok {
			return errors.New("the only option is max-age=DURATION")
		}
		f.DeferMaxAge = new(time.Duration)
		*f.DeferMaxAge, err = time.ParseDuration(maxAge)
	case "subject":
		f.Subject = value
		_, err = csr.ParseSubject(value)
	case "answer":
		f.Answer = value
		_, err = parseCode(value)
	case "links":
		if f.Links = value; value == "" {
			err = errors.New("want links")
		}
	case "retry-after":
		if f.RetryAfter = value; value == "" {
			err = errors.New("want a text")
		}
	case "refuse-client":
		if value == "issued" {
			f.RefuseIssued = true
			return nil
		}
		f.RefuseClients = append(f.RefuseClients, strings.ToLower(value))
	case "refuse-code":
		f.RefuseCode = value
	default:
		return errors.New("no such fault")
	}
	return err
}

func (c choice) check(value string) error {
	if _, known := c.values[value]; !known {
		return fmt.Errorf("%q is none of %s", value, strings.Join(slices.Sorted(maps.Keys(c.values)), ", "))
	}
	return nil
}

// flags are the faults without a value, by name.
func (f *Faults) flags() map[string]*bool {
	return map[string]*bool{
		"wrong-key":     &f.WrongKey,
		"not-yet-valid": &f.NotYetValid,
		"expired":       &f.Expired,
		"foreign-chain": &f.ForeignChain,
		"ca-flag":       &f.CAFlag,
		"drop-san":      &f.DropSAN,
		"ignore-usage":  &f.IgnoreUsage,
		"long-detail":   &f.LongDetail,
		"no-discovery":  &f.NoDiscovery,
		"refuse-all":    &f.RefuseAll,
	}
}

func (f Faults) validate() error {
	switch {
	case f.Delay < 0:
		return errors.New("fault delay: negative")
	case f.Defer < 0:
		return errors.New("fault defer: negative")
	case f.DeferMaxAge != nil && (*f.DeferMaxAge < 0 || *f.DeferMaxAge%time.Second != 0):
		return errors.New("fault defer: max-age is not a number of whole seconds")
	case f.DeferMaxAge != nil && *f.DeferMaxAge/time.Second > math.MaxUint32:
		return errors.New("fault defer: max-age is more than a Max-Age option holds") // RFC 7252 §5.10.5
	case f.NoDiscovery && f.Links != "":
		return errors.New("faults no-discovery and links: there is an answer or there is none")
	case f.At != "" && f.HTTP == "" && f.Message == "":
		return errors.New("fault at: there is neither http nor message")
	case f.NotYetValid && f.Expired:
		return errors.New("faults not-yet-valid and expired: a certificate cannot be both")
	case f.RefuseCode != "" && f.RefuseCode != "4.01" && f.RefuseCode != "4.03":
		return fmt.Errorf("fault refuse-code: %q is neither 4.01 nor 4.03", f.RefuseCode)
	}
	if f.Subject != "" {
		if _, err := csr.ParseSubject(f.Subject); err != nil {
			return fmt.Errorf("fault subject: %w", err)
		}
	}
	for _, c := range choices {
		if value := *c.field(&f); value != "" {
			if err := c.check(value); err != nil {
				return fmt.Errorf("fault %s: %w", c.name, err)
			}
		}
	}
	if f.Answer != "" {
		if _, err := parseCode(f.Answer); err != nil {
			return fmt.Errorf("fault answer: %w", err)
		}
	}
	for _, id := range f.RefuseClients {
		if !isHex(id) {
			return fmt.Errorf("fault refuse-client: %q is neither \"issued\" nor a hexadecimal serial number or fingerprint", id)
		}
	}
	return nil
}

func isHex(s string) bool {
	_, err := hex.DecodeString(strings.Repeat("0", len(s)%2) + s)
	return s != "" && err == nil
}

// Strings returns the textual form, in a stable order; none for the zero value.
func (f Faults) Strings() []string {
	var texts []string
	for name, flag := range f.flags() {
		if *flag {
			texts = append(texts, name)
		}
	}
	if f.Delay != 0 {
		texts = append(texts, "delay="+f.Delay.String())
	}
	if f.Defer != 0 {
		text := "defer=" + strconv.Itoa(f.Defer)
		if f.DeferMaxAge != nil {
			text += ",max-age=" + f.DeferMaxAge.String()
		}
		texts = append(texts, text)
	}
	for name, value := range map[string]string{"subject": f.Subject, "answer": f.Answer, "links": f.Links, "retry-after": f.RetryAfter} {
		if value != "" {
			texts = append(texts, name+"="+value)
		}
	}
	for _, c := range choices {
		if value := *c.field(&f); value != "" {
			texts = append(texts, c.name+"="+value)
		}
	}
	if f.RefuseIssued {
		texts = append(texts, "refuse-client=issued")
	}
	for _, id := range f.RefuseClients {
		texts = append(texts, "refuse-client="+id)
	}
	if f.RefuseCode != "" {
		texts = append(texts, "refuse-code="+f.RefuseCode)
	}
	slices.Sort(texts)
	return texts
}

// parseCode reads the code of an error as RFC 7252 §12.1.2 writes it: "4.03".
func parseCode(text string) (codes.Code, error) {
	var class, detail uint8
	if n, err := fmt.Sscanf(text, "%1d.%02d", &class, &detail); n != 2 || err != nil || text != fmt.Sprintf("%d.%02d", class, detail) ||
		class != 4 && class != 5 || detail > 31 {
		return 0, fmt.Errorf("%q is not a code from 4.00 to 4.31 or from 5.00 to 5.31", text)
	}
	return codes.Code(class<<5 | detail), nil
}

// issuing returns the names of the faults that shape a certificate: one made
// under them is not given to the same CSR once they are gone.
func (f Faults) issuing() []string {
	shaping := Faults{
		WrongKey: f.WrongKey, NotYetValid: f.NotYetValid, Expired: f.Expired, ForeignChain: f.ForeignChain, CAFlag: f.CAFlag,
		Subject: f.Subject, DropSAN: f.DropSAN, IgnoreUsage: f.IgnoreUsage,
	}
	if f.ServerKey == otherType {
		shaping.ServerKey = otherType
	}
	return shaping.Strings()
}

// refuses reports whether the client's certificate is to be refused.
func (f Faults) refuses(client *x509.Certificate, ca *authorities) bool {
	if f.RefuseAll || f.RefuseIssued && ca.issued(client) {
		return true
	}
	serial, digest := client.SerialNumber.Text(16), fingerprint(client.Raw)
	for _, id := range f.RefuseClients {
		if id = strings.ToLower(id); id == digest || strings.TrimLeft(id, "0") == serial {
			return true
		}
	}
	return false
}
