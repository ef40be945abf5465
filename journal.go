package estenroll

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"estenroll/csr"
	"estenroll/engine"
	"estenroll/internal/durable"
)

const (
	journalName    = "journal.json"
	journalVersion = 2
	journalLimit   = 8 << 20 // bytes: of all credentials, each with the longest answers
	maxCredentials = 16      // names on one device
	maxPairs       = 16      // kept ones are two or three; more is not ours
	maxChain       = 8       // certificates of one pair
)

// Step is where an operation stands. The journal names it before it is done.
type Step string

// The steps, in their order: store → prove → commit → retire (DESIGN.md §7).
const (
	StepPrepare  Step = "prepare"  // IDevID, Security object, address of the key
	StepGenerate Step = "generate" // the key, in the HSM
	StepRequest  Step = "request"  // CSR, crts, sen or sren, or skg
	StepImport   Step = "import"   // the key that the server has made, into the HSM
	StepStore    Step = "store"    // the certificates, in the HSM
	StepProve    Step = "prove"    // a connection with the new pair is accepted
	StepCommit   Step = "commit"   // the Security object points at the new pair
	StepRetire   Step = "retire"   // what is older than the previous pair goes
	StepDiscard  Step = "discard"  // what a refused or failed operation created goes
	StepReset    Step = "reset"    // all that is ours goes
)

// Kind is the kind of an operation.
type Kind string

// The kinds of operation.
const (
	KindEnroll Kind = "enroll" // first certificate, authenticated by the IDevID
	KindRenew  Kind = "renew"  // new certificate for the same key
	KindRekey  Kind = "rekey"  // new certificate for a new key
	KindReset  Kind = "reset"  // back to the factory state
)

// reenrolls reports the kinds that the current pair authenticates.
func (k Kind) reenrolls() bool { return k == KindRenew || k == KindRekey }

// reference is an engine address in the journal: text on disk, typed in memory.
type reference struct {
	engine.Address
	text string
}

func (r reference) MarshalJSON() ([]byte, error) { return json.Marshal(r.Address.String()) }

func (r *reference) UnmarshalJSON(data []byte) error { return json.Unmarshal(data, &r.text) }

// credential is one pair of ours in the token.
type credential struct {
	Key reference `json:"key"`
	// Certificates in the token: the leaf, then its chain.
	Certificates []reference `json:"certificates"`
	// ExplicitTA is the file of the state directory with the trust anchors that
	// came with the certificate.
	ExplicitTA string `json:"explicit_ta,omitempty"`
	// Anchors of it that are in the token.
	Anchors []anchorReference `json:"anchors,omitempty"`
	// ExistingKey says that the key was there before, and outlives the pair.
	ExistingKey bool `json:"existing_key,omitempty"`
	// ServerMade says that a server made the key, outside of the HSM.
	ServerMade bool `json:"server_made,omitempty"`
	// Renewals is how often the key had been renewed when the pair was made.
	Renewals int `json:"renewals,omitempty"`
}

func (c credential) sameLeaf(at engine.Address) bool {
	return len(c.Certificates) > 0 && c.Certificates[0].Address == at
}

// operation is what is being done: enough to go on after a kill at any point.
type operation struct {
	Kind      Kind      `json:"kind"`
	Step      Step      `json:"step"`
	StartedAt time.Time `json:"started_at"`
	// Deadline ends the polling of a pending request, and a rekey.
	Deadline time.Time `json:"deadline"`
	// Server is whom the CSR is for; not said by operations of earlier programs.
	Server string `json:"server,omitempty"`
	// NewKey says that the key was made for this operation and goes with it, and
	// ExistingKey that it was in the token before and is never destroyed. A
	// renewal's is that of the pair.
	NewKey      bool `json:"new_key"`
	ExistingKey bool `json:"existing_key,omitempty"`
	// ServerMade says that a server makes the new key, or that it made that of the pair.
	ServerMade bool      `json:"server_made,omitempty"`
	Key        reference `json:"key,omitzero"` // none where a reset began on its own
	// KeyType of a new key. Default: EC P-256, the only one there was once.
	KeyType engine.Algorithm `json:"key_type,omitempty"`
	// Renewals of the key, this one included.
	Renewals int `json:"renewals,omitempty"`
	// Attributes are what the server wants of the CSR, in DER; none where it was not
	// asked yet.
	Attributes []byte `json:"csr_attributes,omitempty"`
	CSR        []byte `json:"csr,omitempty"`
	// AskedAt, RetryAfter and Detail: the pending answer (RFC 9148 §4.7).
	AskedAt    time.Time     `json:"asked_at,omitzero"`
	RetryAfter time.Duration `json:"retry_after,omitempty"`
	Detail     string        `json:"detail,omitempty"`
	Force      bool          `json:"force,omitempty"`
	// Tried says that a run has ended without completing it; one that was killed
	// does not say so.
	Tried bool `json:"tried,omitempty"`
	// Chain and the rest are the accepted answer: what is stored where.
	Chain             [][]byte          `json:"chain,omitempty"`
	Certificates      []reference       `json:"certificates,omitempty"`
	ExplicitTA        string            `json:"explicit_ta,omitempty"`
	Anchors           []anchorReference `json:"anchors,omitempty"`
	ServerCertificate []byte            `json:"server_certificate,omitempty"`
	// Reason is why the operation is discarded.
	Reason string `json:"reason,omitempty"`
}

// Attempt is the record of the last run that tried something.
type Attempt struct {
	Kind   Kind      `json:"kind"`
	Time   time.Time `json:"time"`
	Result string    `json:"result"` // "done", "pending", "unchanged", "failed" or "cancelled"
	Error  string    `json:"error,omitempty"`
}

// The Result of an Attempt that reached what it was for, of one that did not, and of
// what a person has ended.
const (
	attemptDone      = "done"
	attemptFailed    = "failed"
	attemptCancelled = "cancelled"
)

// journal is everything the lifecycle remembers beside the Security object.
type journal struct {
	Version           int       `json:"version"`
	VerifiedNotBefore time.Time `json:"verified_not_before,omitzero"`
	// RefusedPIN is where the PIN came from that the token refused: neither the
	// PIN nor a digest of it.
	RefusedPIN engine.PINSource `json:"refused_pin,omitzero"`
	// Credentials by name; also those that the configuration names no more.
	Credentials map[string]*record `json:"credentials,omitempty"`
}

// record is what the journal says of one credential.
type record struct {
	// Pairs of ours in the token, newest first. Which one is current, the
	// Security object says.
	Pairs       []credential `json:"pairs,omitempty"`
	Operation   *operation   `json:"operation,omitempty"`
	LastAttempt *Attempt     `json:"last_attempt,omitempty"`
	// CACertsAt is when cacerts was answered last, in a session that gave a certificate.
	CACertsAt time.Time `json:"cacerts_at,omitzero"`
	// FailedRekey is the last that came to nothing while the policy asks for one.
	FailedRekey *Attempt `json:"failed_rekey,omitempty"`
}

func (r *record) isEmpty() bool {
	return len(r.Pairs) == 0 && r.Operation == nil && r.LastAttempt == nil
}

// has reports whether the leaf at an address is that of one of the pairs.
func (r *record) has(leaf engine.Address) bool {
	return slices.ContainsFunc(r.Pairs, func(c credential) bool { return c.sameLeaf(leaf) })
}

// names reports whether the leaf at an address is that of one of the pairs, or of
// the operation.
func (r *record) names(leaf engine.Address) bool {
	return r.has(leaf) || r.Operation != nil && r.Operation.credential().sameLeaf(leaf)
}

// journalV1 is version 1 of the journal: one credential, whose name it does not
// say. It is saved as the version of today.
type journalV1 struct {
	Version           int              `json:"version"`
	VerifiedNotBefore time.Time        `json:"verified_not_before"`
	RefusedPIN        engine.PINSource `json:"refused_pin"`
	Credentials       []credential     `json:"credentials"`
	Operation         *operationV1     `json:"operation"`
	LastAttempt       *Attempt         `json:"last_attempt"`
}

// operationV1 has a digest of what the CSR asks for, which the CSR says itself.
type operationV1 struct {
	operation
	Wanted []byte `json:"wanted"`
}

// unnamed is where the record of a journal of version 1 waits for its name.
const unnamed = ""

func (old *journalV1) upgrade() *journal {
	only := &record{Pairs: old.Credentials, LastAttempt: old.LastAttempt}
	if old.Operation != nil {
		only.Operation = &old.Operation.operation
	}
	return &journal{
		Version: journalVersion, VerifiedNotBefore: old.VerifiedNotBefore, RefusedPIN: old.RefusedPIN,
		Credentials: map[string]*record{unnamed: only},
	}
}

func (j *journal) rename(from, to string) {
	j.Credentials[to] = j.Credentials[from]
	delete(j.Credentials, from)
}

// rememberPIN notes the source of a PIN that the token refused, if it has one: what
// a person typed is another one each time, and says nothing of the other sources.
func (j *journal) rememberPIN(err error) bool {
	var pin *engine.PINError
	if !errors.As(err, &pin) || !errors.Is(err, engine.ErrPINIncorrect) || pin.Source.IsZero() {
		return false
	}
	j.RefusedPIN = pin.Source
	return true
}

type addressParser func(string) (engine.Address, error)

// loadJournal reads the journal of a state directory; none is an empty one.
func loadJournal(dir string, parse addressParser) (*journal, error) {
	path := filepath.Join(dir, journalName)
	data, err := durable.ReadFile(path, journalLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return &journal{Version: journalVersion, Credentials: map[string]*record{}}, nil
	}
	if errors.Is(err, durable.ErrTooLarge) || errors.Is(err, durable.ErrNotRegular) {
		return nil, fmt.Errorf("read journal: %w: %w", err, ErrState)
	}
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	j, err := parseJournal(data, parse)
	if err != nil {
		return nil, fmt.Errorf("read journal %s: %w: %w", path, err, ErrState)
	}
	return j, nil
}

func parseJournal(data []byte, parse addressParser) (*journal, error) {
	if len(data) > journalLimit {
		return nil, fmt.Errorf("more than %d bytes", journalLimit)
	}
	var version struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &version); err != nil {
		return nil, fmt.Errorf("not JSON: %w", err)
	}
	j := new(journal)
	switch version.Version {
	case 1:
		old := new(journalV1)
		if err := decodeStrictly(data, old); err != nil {
			return nil, err
		}
		j = old.upgrade()
	case journalVersion:
		if err := decodeStrictly(data, j); err != nil {
			return nil, err
		}
		if err := j.checkNames(); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("version %d, this program reads versions 1 to %d", version.Version, journalVersion)
	}
	for name, r := range j.Credentials {
		if err := r.resolve(parse); err != nil {
			return nil, fmt.Errorf("credential %q: %w", name, err)
		}
	}
	return j, nil
}

func decodeStrictly(data []byte, into any) error {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the end")
	}
	return nil
}

func (j *journal) checkNames() error {
	if j.Credentials == nil {
		j.Credentials = map[string]*record{}
	}
	if len(j.Credentials) > maxCredentials {
		return fmt.Errorf("%d credentials, more than %d", len(j.Credentials), maxCredentials)
	}
	for name, r := range j.Credentials {
		if err := CheckName(name); err != nil {
			return err
		}
		if r == nil {
			return fmt.Errorf("credential %q: no record", name)
		}
	}
	return nil
}

// resolve types the addresses and refuses what this program never writes.
func (r *record) resolve(parse addressParser) error {
	typed := func(field string, refs ...*reference) error {
		for _, ref := range refs {
			at, err := parse(ref.text)
			if err != nil {
				return fmt.Errorf("%s: %w", field, err)
			}
			ref.Address, ref.text = at, ""
		}
		return nil
	}
	anchorsOf := func(field string, anchors []anchorReference) error {
		if len(anchors) > maxAnchors {
			return fmt.Errorf("%s: %d trust anchors, more than %d", field, len(anchors), maxAnchors)
		}
		for i := range anchors {
			if err := anchors[i].check(); err != nil {
				return fmt.Errorf("%s: %w", field, err)
			}
			if err := typed(field, &anchors[i].Address); err != nil {
				return err
			}
		}
		return nil
	}
	if len(r.Pairs) > maxPairs {
		return fmt.Errorf("%d pairs, more than %d", len(r.Pairs), maxPairs)
	}
	for i := range r.Pairs {
		c := &r.Pairs[i]
		field := fmt.Sprintf("pairs[%d]", i)
		if len(c.Certificates) == 0 || len(c.Certificates) > maxChain {
			return fmt.Errorf("%s: %d certificates, want 1 to %d", field, len(c.Certificates), maxChain)
		}
		if err := typed(field, append(pointers(c.Certificates), &c.Key)...); err != nil {
			return err
		}
		if err := checkFileName(c.ExplicitTA); err != nil {
			return fmt.Errorf("%s: %w", field, err)
		}
		if err := anchorsOf(field, c.Anchors); err != nil {
			return err
		}
		if c.Renewals < 0 {
			return fmt.Errorf("%s: renewals is negative", field)
		}
	}
	op := r.Operation
	if op == nil {
		return nil
	}
	switch op.Kind {
	case KindEnroll, KindRenew, KindRekey, KindReset:
	default:
		return fmt.Errorf("operation: unknown kind %q", op.Kind)
	}
	switch op.Step {
	case StepGenerate, StepRequest, StepImport, StepStore, StepProve, StepCommit, StepRetire, StepDiscard, StepReset:
	default:
		return fmt.Errorf("operation: unknown step %q", op.Step)
	}
	if (op.Kind == KindReset) != (op.Step == StepReset) {
		return fmt.Errorf("operation: %s at step %q", op.Kind, op.Step)
	}
	if op.Kind == KindRekey && !op.NewKey {
		return errors.New("operation: a rekey without a new key")
	}
	if op.NewKey && op.ExistingKey {
		return errors.New("operation: its key is both new and an existing one")
	}
	if op.Step == StepImport && !op.asksForKey() {
		return errors.New("operation: an import of a key that no server made")
	}
	if op.KeyType != "" && !slices.Contains(engine.Algorithms(), op.KeyType) {
		return fmt.Errorf("operation: unknown key_type %q", op.KeyType)
	}
	if len(op.Attributes) > 0 {
		if _, err := csr.ParseAttributes(op.Attributes); err != nil {
			return fmt.Errorf("operation: %w", err)
		}
	}
	if op.RetryAfter < 0 || op.Renewals < 0 {
		return errors.New("operation: retry_after or renewals is negative")
	}
	if len(op.Chain) > maxChain || len(op.Chain) != len(op.Certificates) {
		return fmt.Errorf("operation: %d certificates at %d addresses, want the same number up to %d", len(op.Chain), len(op.Certificates), maxChain)
	}
	switch op.Step {
	case StepImport, StepStore, StepProve, StepCommit, StepRetire:
		if len(op.Chain) == 0 {
			return fmt.Errorf("operation: no certificate at step %q", op.Step)
		}
	}
	if err := checkFileName(op.ExplicitTA); err != nil {
		return fmt.Errorf("operation: %w", err)
	}
	if err := anchorsOf("operation", op.Anchors); err != nil {
		return err
	}
	refs := pointers(op.Certificates)
	if op.Kind != KindReset || op.Key.text != "" {
		refs = append(refs, &op.Key)
	}
	return typed("operation", refs...)
}

func pointers(refs []reference) []*reference {
	out := make([]*reference, len(refs))
	for i := range refs {
		out[i] = &refs[i]
	}
	return out
}

// checkFileName keeps a name from the journal inside the state directory.
func checkFileName(name string) error {
	if name == "" || taFileName.MatchString(name) {
		return nil
	}
	return fmt.Errorf("%q is not the name of a trust anchor file", name)
}

// errJournal says that the journal was not written, or not to the disk.
var errJournal = errors.New("write journal")

// save writes the journal and returns when it is on the disk.
func (j *journal) save(dir string) error {
	data, err := j.encode()
	if err != nil {
		return fmt.Errorf("%w: %w", errJournal, err)
	}
	if err := durable.WriteFile(filepath.Join(dir, journalName), data, 0o600); err != nil {
		return fmt.Errorf("%w: %w", errJournal, err)
	}
	return nil
}

func (j *journal) encode() ([]byte, error) {
	whole := *j
	whole.Credentials = map[string]*record{}
	for name, r := range j.Credentials {
		if !r.isEmpty() {
			whole.Credentials[name] = r
		}
	}
	data, err := json.MarshalIndent(whole, "", "  ")
	return append(data, '\n'), err
}
