package engine

import (
	"errors"
	"fmt"
	"strings"
)

// Errors of engines, to be tested with errors.Is.
var (
	ErrNotFound       = errors.New("no such object")
	ErrExists         = errors.New("an object with this identifier exists")
	ErrUnsupported    = errors.New("not supported by this token")
	ErrClosed         = errors.New("engine is closed")
	ErrTokenNotFound  = errors.New("no such token")
	ErrTokenAmbiguous = errors.New("more than one token")
	ErrTokenReadOnly  = errors.New("token is write-protected")
	ErrTokenFull      = errors.New("token is full")
	ErrDeviceLost     = errors.New("the device is gone")
	ErrPINIncorrect   = errors.New("the PIN is wrong")
	ErrPINLocked      = errors.New("the PIN is locked")
	ErrPINFinalTry    = errors.New("the token allows one more try of the PIN, which is left to a person")
	ErrPINNotRetried  = errors.New("the PIN was refused before and its source has not changed since")
	ErrPINMissing     = errors.New("no PIN is given")
	ErrLocked         = errors.New("another process writes to the token")
	ErrBuild          = errors.New("this build of the program cannot open it")
	ErrModule         = errors.New("the module cannot be loaded")
	ErrModuleNotFound = errors.New("there is no such module")
)

// Error is a failure of an engine.
type Error struct {
	Op      string  // what was being done: "generate key"
	Address Address // of what; nil where the engine as a whole failed
	Module  string  // the driver's library, where it matters
	Err     error
}

// Error returns "doing address: module: cause"; an address prints without PIN.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Address != nil {
		b.WriteString(" " + e.Address.String())
	}
	if e.Module != "" {
		b.WriteString(": module " + e.Module)
	}
	b.WriteString(": " + e.Err.Error())
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// AmbiguousError says that an address names more than one object, or more than
// one token, which is ErrTokenAmbiguous too. The Address of each match, where it has
// one, tells it from the others.
type AmbiguousError struct {
	Address Address
	Matches []Object
}

// Error lists the matches.
func (e *AmbiguousError) Error() string {
	kind := "objects"
	names := make([]string, len(e.Matches))
	for i, object := range e.Matches {
		identifier := fmt.Sprintf("id %x", object.ID)
		if object.Class == ClassToken {
			kind, identifier = "tokens", fmt.Sprintf("serial %q", object.ID)
		}
		names[i] = fmt.Sprintf("%s %q %s", object.Class, object.Label, identifier)
	}
	return fmt.Sprintf("%d %s match %s: %s", len(e.Matches), kind, e.Address, strings.Join(names, "; "))
}

// Unwrap returns ErrTokenAmbiguous where the matches are tokens.
func (e *AmbiguousError) Unwrap() error {
	if len(e.Matches) > 0 && e.Matches[0].Class == ClassToken {
		return ErrTokenAmbiguous
	}
	return nil
}

// PINError is a PIN that was not accepted, or not tried. Of one that was refused
// the caller remembers Source and passes it as Options.RefusedPIN in the next run.
type PINError struct {
	Source PINSource // zero for a PIN that a person typed, or that is not there
	// Err is ErrPINIncorrect, ErrPINLocked, ErrPINFinalTry, ErrPINNotRetried or
	// ErrPINMissing, or why the PIN cannot be read.
	Err error
}

// Error names the source, never the PIN.
func (e *PINError) Error() string {
	if e.Source.IsZero() {
		return e.Err.Error()
	}
	return fmt.Sprintf("PIN of %s: %s", e.Source.Path, e.Err)
}

// Unwrap returns the cause.
func (e *PINError) Unwrap() error { return e.Err }
