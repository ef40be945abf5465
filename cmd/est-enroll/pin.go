package main

// Where a PIN comes from that no address names: systemd's credential, or a person.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/term"

	"estenroll/engine"
)

// pinCredential is the name of systemd's credential with the PIN (LoadCredential=,
// SetCredentialEncrypted=): a file of this name in $CREDENTIALS_DIRECTORY.
const pinCredential = "est-enroll-pin"

// credentialSource identifies the credential, beside its size: systemd makes another
// copy at each start of a unit, in a directory of that unit, so its path, inode and
// ctime say nothing of the PIN.
const credentialSource = "the credential " + pinCredential

// askPIN asks the person at the terminal, without an echo. It is nil where standard
// input is none.
func (o *output) askPIN(stdin *os.File) func(context.Context, engine.Address) (engine.Secret, error) {
	fd := int(stdin.Fd())
	if !term.IsTerminal(fd) {
		return nil
	}
	return func(ctx context.Context, token engine.Address) (engine.Secret, error) {
		before, err := term.GetState(fd)
		if err != nil {
			return engine.Secret{}, fmt.Errorf("look at the terminal: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return engine.Secret{}, err
		}
		o.prompt(fmt.Sprintf("PIN of %s: ", token))
		type answer struct {
			pin []byte
			err error
		}
		answers := make(chan answer, 1)
		// It ends with an answer or with the process: a read of a terminal cannot be
		// interrupted.
		go func() {
			pin, err := term.ReadPassword(fd)
			answers <- answer{pin, err}
		}()
		select {
		case <-ctx.Done():
			err = errors.Join(ctx.Err(), term.Restore(fd, before))
			o.prompt("\n")
			return engine.Secret{}, err
		case got := <-answers:
			o.prompt("\n") // that of the answer is not echoed
			defer clear(got.pin)
			if got.err != nil && !errors.Is(got.err, io.EOF) { // nothing is an empty answer
				return engine.Secret{}, fmt.Errorf("read from the terminal: %w", got.err)
			}
			return engine.NewSecret(string(got.pin)), nil
		}
	}
}
