package estenroll

import (
	"errors"
	"fmt"
	"time"
)

// Errors of the lifecycle, to be tested with errors.Is.
var (
	// ErrNotEnrolled says that there is no enrolled credential (LDevID) to renew.
	ErrNotEnrolled = errors.New("the device is not enrolled")
	// ErrExpired says that the certificate to renew has expired: only a new
	// enrolment helps.
	ErrExpired = errors.New("the current certificate has expired")
	// ErrBusy says that another run holds the state directory.
	ErrBusy = errors.New("another run is at work")
	// ErrRefused says that the new pair was refused by the server it is for.
	ErrRefused = errors.New("the server refuses the new certificate")
	// ErrUnproven says that the new pair is stored and could not be proven yet:
	// the next run proves it again, without a new request.
	ErrUnproven = errors.New("the new certificate is stored but not proven yet")
	// ErrOtherNames says that the certificate was issued for another Subject or
	// SAN than the one asked for, and RefuseOtherNames is set.
	ErrOtherNames = errors.New("the certificate is not for the names that were asked for")
	// ErrClock says that the system clock cannot be right and RequireClock is set.
	ErrClock = errors.New("the system clock is behind what this device has verified")
	// ErrConfig says that the credentials of the configuration contradict each other.
	ErrConfig = errors.New("the configuration contradicts itself")
	// ErrNotConfigured says that the configuration has a credential no more that the
	// journal has.
	ErrNotConfigured = errors.New("not in the configuration")
	// ErrState says that the state directory holds something this program did not write.
	ErrState = errors.New("the state is not usable")
	// ErrOwner says that the state directory belongs to another user: files of
	// this run would lock that user's runs out.
	ErrOwner = errors.New("the state directory is another user's")
	// ErrGivenUp says that a pending request passed its deadline and was dropped.
	ErrGivenUp = errors.New("the request was pending for too long and is given up")
	// ErrReset says that a reset was begun: what it has destroyed does not come back.
	ErrReset = errors.New("a reset was begun and cannot be cancelled")
	// ErrWrongToken says that the token holds nothing of what the journal names.
	ErrWrongToken = errors.New("the token holds nothing of this credential")
	// ErrKey says that the existing key that was named is missing, not one key, or
	// cannot sign.
	ErrKey = errors.New("the key that was named is not usable")
	// ErrKeyPolicy says that the existing key that was named is not as protected
	// as a generated one.
	ErrKeyPolicy = errors.New("the key that was named does not satisfy the policy")
	// ErrKeyWanted says that the server wants a kind of key (CSR attributes) that no
	// engine generates, or that the key which was named is not.
	ErrKeyWanted = errors.New("the server wants another kind of key")
	// ErrNoPoP says that the CSR cannot be linked to the session.
	ErrNoPoP = errors.New("no proof of possession is possible")
	// ErrNoImport says that the token takes in no private key that a server has made.
	ErrNoImport = errors.New("the token takes in no key of a server")
	// ErrDecryptKey says that the key which is to open what a server encrypts cannot.
	ErrDecryptKey = errors.New("the key to decrypt with is of no use")
	// ErrOtherKey says that the server has made another kind of key than was asked for,
	// and RefuseOtherNames is set or nothing can be done with it.
	ErrOtherKey = errors.New("the server has made another kind of key")
	// ErrKeyOrigin says, beside ErrConfig, that what the configuration has of keys that
	// the server makes is at odds with the other keys in it.
	ErrKeyOrigin = errors.New("it is not clear where the key comes from")
	// ErrKeyNamed says that there is no new key to generate for a rekey: the
	// configuration names an existing one.
	ErrKeyNamed = errors.New("the configuration says which key it is")
	// ErrRekeyGivenUp says that a rekey was under way for too long and was dropped,
	// key and all: the current key can be renewed again.
	ErrRekeyGivenUp = errors.New("the rekey has taken too long and is given up")
	// ErrIDevID says that the factory credential is missing or not a pair.
	ErrIDevID = errors.New("the factory credential (IDevID) is not usable")
)

// StepError says in which step of the lifecycle something failed.
type StepError struct {
	Step Step
	Err  error
}

// Error returns "step: cause".
func (e *StepError) Error() string { return fmt.Sprintf("%s: %s", e.Step, e.Err) }

// Unwrap returns the cause.
func (e *StepError) Unwrap() error { return e.Err }

// inStep says in which step something failed, unless that is said already.
func inStep(step Step, err error) error {
	var already *StepError
	if errors.As(err, &already) {
		return err
	}
	return &StepError{Step: step, Err: err}
}

// PendingError says that the server has not decided: the key, the CSR and the
// journal are kept, and a run at or after NotBefore sends the same CSR again
// (RFC 9148 §4.7, RFC 7030 §4.2.3).
type PendingError struct {
	NotBefore time.Time
	// Deadline is when the request is given up: by a pending answer after it.
	Deadline time.Time
	// Detail is the server's own text: capped and printable, see est.NewDetail.
	Detail string
}

// Error says when to come back.
func (e *PendingError) Error() string {
	text := fmt.Sprintf("the server has not decided yet: come back at %s", e.NotBefore.UTC().Format(time.RFC3339))
	if e.Detail != "" {
		text += fmt.Sprintf(": %q", e.Detail)
	}
	return text
}
