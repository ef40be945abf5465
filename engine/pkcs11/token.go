//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
	"estenroll/internal/durable"
)

const defaultLockDir = "/run/lock/est-enroll"

// Engine is one open token. It is safe for concurrent use.
type Engine struct {
	uri          URI // of the token, as it was opened
	opts         engine.Options
	module       *module
	label        string // of the token
	serial       string
	manufacturer string
	lock         string // path of the writer lock
	pin          []byte // accepted by the token; used once more after a device loss

	// Guarded by module.mu.
	session    pkcs11.SessionHandle
	generation int // of the module, when session was opened
	readOnly   bool
	closed     bool
}

var (
	_ engine.Engine           = (*Engine)(nil)
	_ engine.KeyRecoverer     = (*Engine)(nil)
	_ engine.KeyInspector     = (*Engine)(nil)
	_ engine.CertificateStore = (*Engine)(nil)
	_ engine.Lister           = (*Engine)(nil)
)

// open implements Driver.Open.
func open(ctx context.Context, at engine.Address, opts engine.Options) (engine.Engine, error) {
	e, err := openToken(ctx, at, opts)
	if err != nil {
		return nil, fail("open token", at, e.moduleName(), err)
	}
	return e, nil
}

func fail(op string, at engine.Address, module string, err error) error {
	var already *engine.Error
	if errors.As(err, &already) {
		return err
	}
	return &engine.Error{Op: op, Address: at, Module: module, Err: explain(err)}
}

func (e *Engine) moduleName() string {
	if e == nil {
		return ""
	}
	return e.uri.ModulePath
}

func openToken(ctx context.Context, at engine.Address, opts engine.Options) (e *Engine, err error) {
	uri, ok := at.(URI)
	if !ok {
		return nil, errors.New("not a PKCS#11 URI")
	}
	if uri.ModulePath == "" {
		return nil, fmt.Errorf("the address has no module-path: %w", engine.ErrModule)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if opts.LockDir == "" {
		opts.LockDir = defaultLockDir
	}
	e = &Engine{uri: uri, opts: opts}
	if e.module, err = acquireModule(uri.ModulePath); err != nil {
		return e, err
	}
	if err := e.start(ctx); err != nil {
		return e, errors.Join(err, e.module.release())
	}
	return e, nil
}

// start finds the token, takes its lock and logs in.
func (e *Engine) start(ctx context.Context) error {
	m := e.module
	m.mu.Lock()
	if m.ctx == nil {
		if err := m.load(); err != nil {
			m.mu.Unlock()
			return err
		}
	}
	_, info, err := e.findSlot()
	m.mu.Unlock()
	if err != nil {
		return err
	}
	e.label, e.serial, e.manufacturer = trim(info.Label), trim(info.SerialNumber), trim(info.ManufacturerID)
	name := sha256.Sum256([]byte(strings.Join([]string{m.path, e.label, e.serial}, "\x00")))
	e.lock = filepath.Join(e.opts.LockDir, fmt.Sprintf("token-%x.lock", name[:12]))
	// Logging in writes: SoftHSM rewrites the token's file at each.
	lock, err := e.acquireLock(ctx)
	if err != nil {
		return err
	}
	m.mu.Lock()
	err = e.login()
	if err != nil {
		e.closeSession()
	}
	m.mu.Unlock()
	return errors.Join(err, lock.Release())
}

func trim(s string) string { return strings.TrimRight(s, " \x00") }

// acquireLock takes the writer lock that all processes share for this token.
func (e *Engine) acquireLock(ctx context.Context) (*durable.Lock, error) {
	if err := makeLockDir(e.opts.LockDir); err != nil {
		return nil, fmt.Errorf("lock token: %w", err)
	}
	lock, err := durable.Acquire(ctx, e.lock, 0o666)
	var held *durable.LockedError
	switch {
	case errors.As(err, &held) && errors.Is(ctx.Err(), context.Canceled):
		return nil, ctx.Err()
	case errors.As(err, &held):
		return nil, fmt.Errorf("%w: %w", engine.ErrLocked, err)
	case err != nil:
		return nil, fmt.Errorf("lock token: %w", err)
	}
	return lock, nil
}

// makeLockDir creates the directory as /tmp is: everybody who uses a token may
// lock it, nobody may remove another's lock.
func makeLockDir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chmod(dir, 0o777|os.ModeSticky)
}

// findSlot returns the slot of the token: the one with the label, or, without a
// label, the only one; after a loss the one with the same serial number.
func (e *Engine) findSlot() (slot uint, info pkcs11.TokenInfo, err error) {
	slots, err := e.module.ctx.GetSlotList(true)
	if err != nil {
		return 0, info, fmt.Errorf("list tokens: %w", err)
	}
	var found []string
	var others []string
	for _, candidate := range slots {
		token, err := e.module.ctx.GetTokenInfo(candidate)
		if err != nil {
			continue // a slot that lost its token meanwhile, or one that is broken
		}
		if token.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		name := fmt.Sprintf("%q serial %q", trim(token.Label), trim(token.SerialNumber))
		if e.uri.Token != "" && trim(token.Label) != e.uri.Token || e.serial != "" && trim(token.SerialNumber) != e.serial {
			others = append(others, name)
			continue
		}
		found, slot, info = append(found, name), candidate, token
	}
	switch {
	case len(found) == 1:
		return slot, info, nil
	case len(found) > 1:
		return 0, info, fmt.Errorf("%d tokens match, want one: %s", len(found), strings.Join(found, "; "))
	case len(others) > 0:
		return 0, info, fmt.Errorf("%w: there are %s", engine.ErrTokenNotFound, strings.Join(others, "; "))
	}
	return 0, info, fmt.Errorf("%w: the module shows none", engine.ErrTokenNotFound)
}

// login opens the session and logs in, once. module.mu is held.
func (e *Engine) login() error {
	slot, info, err := e.findSlot()
	if err != nil {
		return err
	}
	flags := uint(pkcs11.CKF_SERIAL_SESSION)
	if e.readOnly = info.Flags&pkcs11.CKF_WRITE_PROTECTED != 0; !e.readOnly {
		flags |= pkcs11.CKF_RW_SESSION
	}
	pin, source, err := e.choosePIN(info)
	if err != nil {
		return err
	}
	if e.session, err = e.module.ctx.OpenSession(slot, flags); err != nil {
		return fmt.Errorf("open session: %w", err)
	}
	e.generation = e.module.generation
	if pin == nil {
		return nil
	}
	switch err := e.module.ctx.Login(e.session, pkcs11.CKU_USER, string(pin)); {
	case err == nil, errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)):
		e.pin = pin
		return nil
	default:
		defer clear(pin)
		for _, sentinel := range []error{engine.ErrPINIncorrect, engine.ErrPINLocked} {
			if errors.Is(explain(err), sentinel) {
				key := e.label + "\x00" + e.serial
				e.module.failed[key] = append(e.module.failed[key], engine.NewSecret(string(pin)))
				return &engine.PINError{Source: source, Err: fmt.Errorf("%w: %w", err, sentinel)}
			}
		}
		return fmt.Errorf("log in: %w", err)
	}
}

// choosePIN returns the PIN to try, nil where the token wants none, or the
// reason why none is tried.
func (e *Engine) choosePIN(info pkcs11.TokenInfo) ([]byte, engine.PINSource, error) {
	if info.Flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return nil, engine.PINSource{}, nil
	}
	// After a device loss: a PIN that this process has seen accepted.
	if e.pin != nil {
		return e.pin, engine.PINSource{}, nil
	}
	pin, source, err := readPIN(e.uri, e.opts.AddressSource)
	if err != nil {
		return nil, source, err
	}
	refuse := func(reason error) ([]byte, engine.PINSource, error) {
		clear(pin)
		return nil, source, &engine.PINError{Source: source, Err: reason}
	}
	switch {
	case info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return refuse(engine.ErrPINLocked)
	case info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return refuse(engine.ErrPINFinalTry)
	case !e.opts.RefusedPIN.IsZero() && e.opts.RefusedPIN.Same(source):
		return refuse(engine.ErrPINNotRetried)
	}
	for _, refused := range e.module.failed[e.label+"\x00"+e.serial] {
		if bytes.Equal([]byte(refused.Reveal()), pin) {
			return refuse(engine.ErrPINNotRetried)
		}
	}
	return pin, source, nil
}

func (e *Engine) closeSession() {
	if e.session != 0 && e.generation == e.module.generation && e.module.ctx != nil {
		_ = e.module.ctx.CloseSession(e.session) // a session that is gone is closed
	}
	e.session = 0
}

// Close implements engine.Engine.
func (e *Engine) Close() error {
	e.module.mu.Lock()
	if e.closed {
		e.module.mu.Unlock()
		return nil
	}
	e.closed = true
	e.closeSession()
	clear(e.pin)
	e.module.mu.Unlock()
	if err := e.module.release(); err != nil {
		return fail("close token", e.uri, e.moduleName(), err)
	}
	return nil
}

// read does something with the session that may be done twice: once more after
// a device loss, on the same token.
func (e *Engine) read(ctx context.Context, op string, at engine.Address, do func() error) error {
	return e.call(ctx, op, at, true, do)
}

// write does something with the session under the writer lock. It is not
// repeated after a device loss: its outcome is unknown.
func (e *Engine) write(ctx context.Context, op string, at engine.Address, do func() error) error {
	lock, err := e.acquireLock(ctx)
	if err != nil {
		return fail(op, at, e.moduleName(), err)
	}
	err = e.call(ctx, op, at, false, func() error {
		if e.readOnly {
			return engine.ErrTokenReadOnly
		}
		return do()
	})
	return errors.Join(err, lock.Release())
}

func (e *Engine) call(ctx context.Context, op string, at engine.Address, repeat bool, do func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	e.module.mu.Lock()
	defer e.module.mu.Unlock()
	err := e.attempt(do)
	if err != nil && isLost(err) && !e.closed {
		err = e.reopen(err)
		if err == nil && repeat {
			err = e.attempt(do)
		} else if err == nil {
			err = fmt.Errorf("the outcome is unknown: %w", engine.ErrDeviceLost)
		}
	}
	if err == nil {
		// Asked for before the call, which cannot be interrupted.
		err = ctx.Err()
		if err != nil && !repeat {
			err = nil // done is done
		}
		return err
	}
	return fail(op, at, e.moduleName(), err)
}

// attempt does something with a session of this generation.
func (e *Engine) attempt(do func() error) error {
	if e.closed {
		return engine.ErrClosed
	}
	if e.generation != e.module.generation || e.session == 0 {
		// Another engine of the module lost its device and had it finalised.
		if err := e.reconnect(); err != nil {
			return err
		}
	}
	return do()
}

// reopen finalises the module, whatever the count of its users, and opens the
// same token again with the PIN that it has accepted.
func (e *Engine) reopen(cause error) error {
	if e.generation == e.module.generation {
		if err := e.module.reload(); err != nil {
			return fmt.Errorf("%w: open it again: %w: %w", cause, err, engine.ErrDeviceLost)
		}
	}
	if err := e.reconnect(); err != nil {
		return fmt.Errorf("%w: open it again: %w: %w", cause, err, engine.ErrDeviceLost)
	}
	return nil
}

func (e *Engine) reconnect() error {
	e.session = 0
	if e.module.ctx == nil {
		if err := e.module.load(); err != nil {
			return err
		}
	}
	if err := e.login(); err != nil {
		e.closeSession()
		return err
	}
	return nil
}
