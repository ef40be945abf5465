//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// token is a token that this process uses: one session and one login, shared by
// all engines that are open on it. The module's gate guards it.
type token struct {
	module *module
	id     tokenID
	uri    URI // all that an address can say of it
	users  int

	session    pkcs11.SessionHandle
	generation int // of the module, when the session was opened
	connection int // counts sessions: the handles of an earlier one are void
	readOnly   bool
	private    bool // a login is required

	// pin is one that the token has accepted in this process, and source where it came
	// from. It is used once more after each loss of the device, on this same token.
	pin    []byte
	source engine.PINSource
}

// connected reports whether the session can be used.
func (t *token) connected() bool {
	return t.session != 0 && t.module.initialized && t.generation == t.module.generation
}

// leaveIfLoggedOut closes a session whose login another part of this process has
// ended: there is one login for all of them (PKCS #11 v2.40 §5.6). The token would
// hide private keys as if they were gone, and what is left of a pair be destroyed.
func (t *token) leaveIfLoggedOut() {
	if !t.connected() || !t.private {
		return
	}
	info, err := t.module.ctx.GetSessionInfo(t.session)
	if err != nil || info.State != pkcs11.CKS_RO_PUBLIC_SESSION && info.State != pkcs11.CKS_RW_PUBLIC_SESSION {
		return // an error shows again at the call that is wanted
	}
	_ = t.module.ctx.CloseSession(t.session) // it is not used again
	t.session = 0
}

// connect finds the token again, by its serial number, opens the session and logs
// in, once. The writer lock is held, for a login writes: SoftHSM rewrites the
// token's file at each. asked is the PIN that a person gave, if one did.
func (t *token) connect(at URI, opts engine.Options, asked []byte) error {
	if err := t.module.start(); err != nil {
		return err
	}
	s, _, err := t.module.slot(at, t.id)
	if err != nil {
		return err
	}
	flags := uint(pkcs11.CKF_SERIAL_SESSION)
	if t.readOnly = s.flags&pkcs11.CKF_WRITE_PROTECTED != 0; !t.readOnly {
		flags |= pkcs11.CKF_RW_SESSION
	}
	session, err := t.module.ctx.OpenSession(s.number, flags)
	if err != nil {
		return fmt.Errorf("open session: %w", explain(err))
	}
	if err := t.login(session, s.flags, at, opts, asked); err != nil {
		_ = t.module.ctx.CloseSession(session) // what went wrong is known
		return err
	}
	t.session, t.generation = session, t.module.generation
	t.connection++
	t.uri = s.uri
	t.private = s.flags&pkcs11.CKF_LOGIN_REQUIRED != 0
	return nil
}

func (t *token) login(session pkcs11.SessionHandle, flags uint, at URI, opts engine.Options, asked []byte) error {
	if flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return nil
	}
	info, err := t.module.ctx.GetSessionInfo(session)
	if err != nil {
		return fmt.Errorf("look at session: %w", explain(err))
	}
	if info.State == pkcs11.CKS_RW_USER_FUNCTIONS || info.State == pkcs11.CKS_RO_USER_FUNCTIONS {
		return nil // another library of this process has logged it in
	}
	pin, source, err := t.choosePIN(flags, at, opts, asked)
	if err != nil {
		return err
	}
	// The string borrows the bytes, so that clearing them leaves no copy of ours;
	// what miekg/pkcs11 hands to C is freed, not cleared.
	err = t.module.ctx.Login(session, pkcs11.CKU_USER, unsafe.String(unsafe.SliceData(pin), len(pin)))
	switch {
	case err == nil:
		t.pin, t.source = pin, source
		return nil
	case errors.Is(explain(err), engine.ErrPINIncorrect), errors.Is(explain(err), engine.ErrPINLocked):
		t.module.refused[t.id] = append(t.module.refused[t.id], engine.NewSecret(string(pin)))
		err = &engine.PINError{Source: source, Err: explain(err)}
	case isCode(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN):
		err = nil // meanwhile: the token has not looked at this PIN
	default:
		err = fmt.Errorf("log in: %w", explain(err))
	}
	clear(pin)
	t.pin = nil
	return err
}

// choosePIN returns the PIN to try, or the reason why none is tried.
func (t *token) choosePIN(flags uint, at URI, opts engine.Options, asked []byte) (pin []byte, source engine.PINSource, err error) {
	reason := triable(flags)
	switch {
	case t.pin != nil:
		pin, source = t.pin, t.source
	case asked != nil:
		pin = bytes.Clone(asked)
	default:
		if pin, source, err = readPIN(at, opts); err != nil && reason == nil {
			return nil, source, err
		}
	}
	if reason == nil && !source.IsZero() && opts.RefusedPIN.Same(source) {
		reason = engine.ErrPINNotRetried
	}
	for _, refused := range t.module.refused[t.id] {
		if bytes.Equal([]byte(refused.Reveal()), pin) {
			reason = engine.ErrPINNotRetried
		}
	}
	if reason == nil {
		return pin, source, nil
	}
	clear(pin)
	t.pin = nil
	return nil, source, &engine.PINError{Source: source, Err: reason}
}

// close ends the session after the token's last user. The login ends with the
// last session of the process; a C_Logout would end that of other libraries too.
func (t *token) close() error {
	if t.users--; t.users > 0 {
		return nil
	}
	delete(t.module.tokens, t.id)
	clear(t.pin)
	t.pin = nil
	if !t.connected() {
		return nil
	}
	err := t.module.ctx.CloseSession(t.session)
	if err != nil && !t.module.lost(t.session, err) {
		return fmt.Errorf("close session: %w", explain(err))
	}
	return nil
}

// idle reports whether no token of the module can be used without starting it anew.
func (m *module) idle() bool {
	for _, t := range m.tokens {
		if t.connected() {
			return false
		}
	}
	return true
}

// lost reports whether an error means that the device, or our place in it, is
// gone. A general error means it only if the session does not answer either. An
// operation that was left open, which a module should not do, ends with its session.
func (m *module) lost(session pkcs11.SessionHandle, err error) bool {
	switch {
	case errors.Is(explain(err), engine.ErrDeviceLost), isCode(err, pkcs11.CKR_OPERATION_ACTIVE):
		return true
	case isCode(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_HOST_MEMORY):
		_, probe := m.ctx.GetSessionInfo(session)
		return probe != nil
	}
	return false
}

const (
	// scanPause and scans bound how often a token that is not there is looked for
	// again: a module that starts while another process logs in may read the
	// token's file half-written, and shows the token only when it starts anew.
	// Measured with SoftHSM 2.6.1: one in 600 openings beside two busy processes.
	scanPause = 50 * time.Millisecond
	scans     = 4
)

// findToken finds the token that an address names.
func (m *module) findToken(ctx context.Context, at URI) (slot, tokenID, error) {
	for scan := 1; ; scan++ {
		s, id, again, err := m.scan(ctx, at)
		if err == nil || !again || scan == scans {
			return s, id, err
		}
		select {
		case <-time.After(scanPause):
		case <-ctx.Done():
			return s, id, ctx.Err()
		}
	}
}

// scan looks for a token once. It may be looked for again if the module can be
// started anew, which nobody else must be using.
func (m *module) scan(ctx context.Context, at URI) (s slot, id tokenID, again bool, err error) {
	if err := m.enter(ctx); err != nil {
		return s, id, false, err
	}
	defer m.leave()
	if err := m.start(); err != nil {
		return s, id, false, fmt.Errorf("%w: %w", engine.ErrModule, err)
	}
	s, id, err = m.slot(at, tokenID{})
	switch {
	case err == nil:
		return s, id, false, nil
	case m.lost(0, err): // the device of another engine; this one's may be there
		return s, id, true, errors.Join(err, m.stop())
	case errors.Is(err, engine.ErrTokenNotFound) && m.users == 1 && m.owned:
		return s, id, true, errors.Join(err, m.stop())
	}
	return s, id, false, err
}
