//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
	"estenroll/internal/durable"
)

const maxPINFile = 1024 // bytes

// readPIN returns the PIN of a token's URI and where it came from. An absent
// PIN is ErrPINMissing: an empty one never reaches the module. Its errors are
// *engine.PINErrors.
func readPIN(u URI, opts engine.Options) ([]byte, engine.PINSource, error) {
	switch {
	case u.HasPINValue():
		source := opts.AddressSource
		if source.IsZero() {
			source.Path = "the engine's address"
		}
		return []byte(u.pinValue()), source, nil
	case u.PINSource != "":
		pin, source, err := readPINFile(u.PINSource)
		if err != nil {
			return nil, engine.PINSource{}, &engine.PINError{Err: fmt.Errorf("pin-source: %w", err)}
		}
		return pin, source, nil
	case opts.PINCopy != "":
		pin, source, err := readPINFile(opts.PINCopy)
		switch {
		case err == nil:
			return pin, engine.PINSource{Path: opts.PINCopyName, Size: source.Size}, nil
		case !errors.Is(err, fs.ErrNotExist):
			return nil, engine.PINSource{}, &engine.PINError{Err: fmt.Errorf("%s: %w", opts.PINCopyName, err)}
		}
	}
	return nil, engine.PINSource{}, &engine.PINError{Err: engine.ErrPINMissing}
}

// pinAsked returns the PIN that a person gives for a token, nil where another source
// has it or none is to be tried.
func pinAsked(ctx context.Context, u URI, s slot, opts engine.Options) ([]byte, error) {
	if opts.AskPIN == nil || u.HasPINValue() || u.PINSource != "" || opts.PINCopy != "" && exists(opts.PINCopy) {
		return nil, nil
	}
	if s.flags&pkcs11.CKF_LOGIN_REQUIRED == 0 || triable(s.flags) != nil {
		return nil, nil // which the login says
	}
	pin, err := opts.AskPIN(ctx, URI{Token: s.uri.Token, Serial: s.uri.Serial})
	switch {
	case err != nil:
		return nil, fmt.Errorf("ask for the PIN: %w", err)
	case pin.Reveal() == "":
		return nil, &engine.PINError{Err: engine.ErrPINMissing}
	}
	return []byte(pin.Reveal()), nil
}

// triable says why a token's PIN must not be tried.
func triable(flags uint) error {
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return engine.ErrPINLocked
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return engine.ErrPINFinalTry
	}
	return nil
}

// readPINFile reads a PIN and identifies the very file it was read from.
func readPINFile(path string) (pin []byte, source engine.PINSource, err error) {
	// O_NONBLOCK: the open of a pipe without a writer must not wait.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, source, err
	}
	defer file.Close() // nothing was written
	info, err := file.Stat()
	if err != nil {
		return nil, source, err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.Mode().IsRegular() {
		return nil, source, fmt.Errorf("%s: %w", path, durable.ErrNotRegular)
	}
	source = engine.PINSource{Path: path, Inode: stat.Ino, Size: info.Size(), ChangedAt: time.Unix(stat.Ctim.Unix()).UTC()}
	buffer := make([]byte, maxPINFile+1)
	defer func() {
		if err != nil {
			clear(buffer)
		}
	}()
	// All of it: half a PIN is a wrong one.
	n, err := io.ReadFull(file, buffer)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, source, err
	}
	pin = bytes.TrimRight(buffer[:n], "\r\n") // what an editor ends a line with is not the PIN
	switch {
	case n > maxPINFile:
		return nil, source, fmt.Errorf("%s: more than %d bytes", path, maxPINFile)
	case len(pin) == 0:
		return nil, source, fmt.Errorf("%s is empty: %w", path, engine.ErrPINMissing)
	case bytes.ContainsAny(pin, "\r\n\x00"):
		return nil, source, errors.New(path + ": more than one line")
	}
	return pin, source, nil
}
