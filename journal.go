package estenroll

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"time"

	"estenroll/engine"
	"estenroll/internal/durable"
)

const (
	journalName    = "journal.json"
	journalVersion = 1
	journalLimit   = 1 << 20 // bytes
	maxCredentials = 16      // kept ones are two or three; more is not ours
	maxChain       = 8       // certificates of one credential
)

// Step is where an operation stands. The journal names it before it is done.
type Step string

// The steps, in their order: store → prove → commit → retire (DESIGN.md §7).
const (
	StepPrepare  Step = "prepare"  // IDevID, Security object, address of the key
	StepGenerate Step = "generate" // the key, in the HSM
	StepRequest  Step = "request"  // CSR, crts, sen or sren
	StepStore    Step = "store"    // the certificates, in the HSM
	StepProve    Step = "prove"    // a connection with the new pair is accepted
	StepCommit   Step = "commit"   // the Security object points at the new pair
	StepRetire   Step = "retire"   // what is older than the previous pair goes
	StepDiscard  Step = "discard"  // what a refused or failed operation created goes
)

// Kind is the kind of an operation.
type Kind string

// The kinds of operation.
const (
	KindEnroll Kind = "enroll" // first certificate, authenticated by the IDevID
	KindRenew  Kind = "renew"  // new certificate for the same key
)

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
}

func (c credential) sameLeaf(at engine.Address) bool {
	return len(c.Certificates) > 0 && c.Certificates[0].Address == at
}

// operation is what is being done: enough to go on after a kill at any point.
type operation struct {
	Kind      Kind      `json:"kind"`
	Step      Step      `json:"step"`
	StartedAt time.Time `json:"started_at"`
	// Deadline ends the polling of a pending request.
	Deadline time.Time `json:"deadline"`
	// NewKey says that the key was made for this operation and goes with it.
	NewKey bool      `json:"new_key"`
	Key    reference `json:"key"`
	// Wanted is the digest of what the CSR asks for; another one in the
	// configuration means another CSR.
	Wanted []byte `json:"wanted,omitempty"`
	CSR    []byte `json:"csr,omitempty"`
	// AskedAt and RetryAfter: the pending answer (RFC 9148 §4.7).
	AskedAt    time.Time     `json:"asked_at,omitzero"`
	RetryAfter time.Duration `json:"retry_after,omitempty"`
	Force      bool          `json:"force,omitempty"`
	// Chain and the rest are the accepted answer: what is stored where.
	Chain             [][]byte    `json:"chain,omitempty"`
	Certificates      []reference `json:"certificates,omitempty"`
	ExplicitTA        string      `json:"explicit_ta,omitempty"`
	ServerCertificate []byte      `json:"server_certificate,omitempty"`
	// Reason is why the operation is discarded.
	Reason string `json:"reason,omitempty"`
}

// Attempt is the record of the last run that tried something.
type Attempt struct {
	Kind   Kind      `json:"kind"`
	Time   time.Time `json:"time"`
	Result string    `json:"result"` // "done", "pending", "unchanged" or "failed"
	Error  string    `json:"error,omitempty"`
}

// journal is everything the lifecycle remembers beside the Security object.
type journal struct {
	Version           int       `json:"version"`
	VerifiedNotBefore time.Time `json:"verified_not_before,omitzero"`
	// RefusedPIN is where the PIN came from that the token refused: neither the
	// PIN nor a digest of it.
	RefusedPIN engine.PINSource `json:"refused_pin,omitzero"`
	// Credentials of ours in the token, newest first. Which one is current, the
	// Security object says.
	Credentials []credential `json:"credentials,omitempty"`
	Operation   *operation   `json:"operation,omitempty"`
	LastAttempt *Attempt     `json:"last_attempt,omitempty"`
}

type addressParser func(string) (engine.Address, error)

// loadJournal reads the journal of a state directory; none is an empty one.
func loadJournal(dir string, parse addressParser) (*journal, error) {
	path := filepath.Join(dir, journalName)
	data, err := durable.ReadFile(path, journalLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return &journal{Version: journalVersion}, nil
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
	if version.Version != journalVersion {
		return nil, fmt.Errorf("version %d, this program reads version %d", version.Version, journalVersion)
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	j := new(journal)
	if err := decoder.Decode(j); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("data after the end")
	}
	return j, j.resolve(parse)
}

// resolve types the addresses and refuses what this program never writes.
func (j *journal) resolve(parse addressParser) error {
	typed := func(field string, refs ...*reference) error {
		for _, r := range refs {
			at, err := parse(r.text)
			if err != nil {
				return fmt.Errorf("%s: %w", field, err)
			}
			r.Address, r.text = at, ""
		}
		return nil
	}
	if len(j.Credentials) > maxCredentials {
		return fmt.Errorf("%d credentials, more than %d", len(j.Credentials), maxCredentials)
	}
	for i := range j.Credentials {
		c := &j.Credentials[i]
		field := fmt.Sprintf("credentials[%d]", i)
		if len(c.Certificates) == 0 || len(c.Certificates) > maxChain {
			return fmt.Errorf("%s: %d certificates, want 1 to %d", field, len(c.Certificates), maxChain)
		}
		if err := typed(field, append(pointers(c.Certificates), &c.Key)...); err != nil {
			return err
		}
		if err := checkFileName(c.ExplicitTA); err != nil {
			return fmt.Errorf("%s: %w", field, err)
		}
	}
	op := j.Operation
	if op == nil {
		return nil
	}
	switch op.Kind {
	case KindEnroll, KindRenew:
	default:
		return fmt.Errorf("operation: unknown kind %q", op.Kind)
	}
	switch op.Step {
	case StepGenerate, StepRequest, StepStore, StepProve, StepCommit, StepRetire, StepDiscard:
	default:
		return fmt.Errorf("operation: unknown step %q", op.Step)
	}
	if op.RetryAfter < 0 {
		return errors.New("operation: retry_after is negative")
	}
	if len(op.Chain) > maxChain || len(op.Chain) != len(op.Certificates) {
		return fmt.Errorf("operation: %d certificates at %d addresses, want the same number up to %d", len(op.Chain), len(op.Certificates), maxChain)
	}
	switch op.Step {
	case StepStore, StepProve, StepCommit, StepRetire:
		if len(op.Chain) == 0 {
			return fmt.Errorf("operation: no certificate at step %q", op.Step)
		}
	}
	if err := checkFileName(op.ExplicitTA); err != nil {
		return fmt.Errorf("operation: %w", err)
	}
	return typed("operation", append(pointers(op.Certificates), &op.Key)...)
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

// save writes the journal and returns when it is on the disk.
func (j *journal) save(dir string) error {
	data, err := j.encode()
	if err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	if err := durable.WriteFile(filepath.Join(dir, journalName), data, 0o600); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	return nil
}

func (j *journal) encode() ([]byte, error) {
	data, err := json.MarshalIndent(j, "", "  ")
	return append(data, '\n'), err
}
