//go:build cgo

package pkcs11

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"estenroll/engine"
	"estenroll/internal/durable"
)

const (
	defaultLockDir     = "/run/lock/est-enroll"
	defaultLockTimeout = 30 * time.Second
)

// Engine is one user of an open token.
type Engine struct {
	uri    URI // as it was opened, with the path of its module
	opts   engine.Options
	module *module
	token  *token
	about  URI    // all that an address can say of the token
	label  string // of the token
	lock   string // path of the writer lock

	closed bool // guarded by the module's gate
}

var (
	_ engine.Engine           = (*Engine)(nil)
	_ engine.KeyRecoverer     = (*Engine)(nil)
	_ engine.KeyInspector     = (*Engine)(nil)
	_ engine.CertificateStore = (*Engine)(nil)
	_ engine.Lister           = (*Engine)(nil)
	_ engine.TokenInspector   = (*Engine)(nil)
)

func open(ctx context.Context, at engine.Address, opts engine.Options) (engine.Engine, error) {
	uri, ok := at.(URI)
	var e *Engine
	err := ctx.Err()
	switch {
	case err != nil:
	case !ok:
		err = errNotURI
	case uri.namesObject():
		err = errors.New("it names an object, not a token")
	default:
		uri.ModulePath, err = systemPlaces().findModule(uri)
		if err == nil {
			e, err = openToken(ctx, uri, opts)
		}
	}
	if err != nil {
		return nil, fail("open token", at, uri.ModulePath, err)
	}
	return e, nil
}

var errNotURI = errors.New("not a PKCS #11 URI")

func openToken(ctx context.Context, uri URI, opts engine.Options) (*Engine, error) {
	if opts.LockDir == "" {
		opts.LockDir = defaultLockDir
	}
	if opts.LockTimeout == 0 {
		opts.LockTimeout = defaultLockTimeout
	}
	m, err := loadModule(uri.ModulePath)
	if err != nil {
		return nil, err
	}
	e := &Engine{uri: uri, opts: opts, module: m}
	if err := m.enter(ctx); err != nil {
		return nil, err
	}
	m.users++
	m.leave()
	if err := e.start(ctx); err != nil {
		_ = m.enter(context.WithoutCancel(ctx)) // ends only with the gate
		defer m.leave()
		return nil, errors.Join(err, m.release())
	}
	return e, nil
}

// start finds the token, which is free, and logs in under its writer lock. A person
// is asked for the PIN before: a lock must not wait for one.
func (e *Engine) start(ctx context.Context) (err error) {
	slot, id, err := e.module.findToken(ctx, e.uri)
	if err != nil {
		return err
	}
	asked, err := pinAsked(ctx, e.uri, slot, e.opts)
	if err != nil {
		return err
	}
	defer clear(asked)
	e.label = id.label
	e.lock = lockPath(e.opts.LockDir, e.module.path, id)
	lock, err := e.acquireLock(ctx)
	if err != nil {
		return err
	}
	defer release(lock, &err)
	if err := e.module.enter(ctx); err != nil {
		return err
	}
	defer e.module.leave()
	t := e.module.tokens[id]
	if t == nil {
		t = &token{module: e.module, id: id}
	}
	if !t.connected() {
		if err := t.connect(e.uri, e.opts, asked); err != nil {
			return err
		}
	}
	t.users++
	e.about = t.uri
	e.module.tokens[id] = t
	e.token = t
	return nil
}

// lockPath names the lock that all users of a token share.
func lockPath(dir, module string, id tokenID) string {
	name := sha256.Sum256([]byte(strings.Join([]string{module, id.label, id.serial}, "\x00")))
	return filepath.Join(dir, fmt.Sprintf("token-%x.lock", name[:16]))
}

// acquireLock waits for the token's writer lock.
func (e *Engine) acquireLock(ctx context.Context) (*durable.Lock, error) {
	if err := makeLockDir(e.opts.LockDir); err != nil {
		return nil, fmt.Errorf("lock token: %w", err)
	}
	waiting, cancel := context.WithTimeout(ctx, e.opts.LockTimeout)
	defer cancel()
	lock, err := durable.Acquire(waiting, e.lock, 0o666, e.opts.Command)
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

func release(lock *durable.Lock, err *error) {
	if released := lock.Release(); released != nil {
		*err = errors.Join(*err, released)
	}
}

// makeLockDir creates the directory as /tmp is: whoever uses a token may lock it,
// and nobody removes another's lock.
func makeLockDir(dir string) error {
	err := os.Mkdir(dir, 0o777)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o777)
	}
	switch {
	case errors.Is(err, fs.ErrExist):
		return nil
	case err != nil:
		return err
	}
	return os.Chmod(dir, 0o777|os.ModeSticky) // whatever the umask
}

// Close implements engine.Engine.
func (e *Engine) Close() error {
	_ = e.module.enter(context.Background()) // ends only with the gate
	defer e.module.leave()
	if e.closed {
		return nil
	}
	e.closed = true
	return fail("close token", e.uri, e.uri.ModulePath, errors.Join(e.token.close(), e.module.release()))
}

// errReopen asks for the writer lock, which a login needs.
var errReopen = errors.New("the session is to be opened again")

// lostError is the loss of the device in the middle of an operation.
type lostError struct {
	err     error
	unknown bool // something had been asked of the token that must not be asked twice
}

func (l *lostError) Error() string {
	if l.unknown {
		return fmt.Sprintf("%s; what it did before is unknown", l.err)
	}
	return l.err.Error()
}

func (l *lostError) Unwrap() []error { return []error{l.err, engine.ErrDeviceLost} }

// read does something in the session that changes nothing.
func (e *Engine) read(ctx context.Context, op string, at engine.Address, do func(*session) error) error {
	err := e.call(ctx, false, do)
	if err == nil {
		err = ctx.Err()
	}
	return fail(op, at, e.uri.ModulePath, err)
}

// write does something in the session under the token's writer lock. What is
// done is done: a context that ends meanwhile is no error.
func (e *Engine) write(ctx context.Context, op string, at engine.Address, do func(*session) error) error {
	return fail(op, at, e.uri.ModulePath, e.call(ctx, true, do))
}

// call does something in the session. After the loss of the device the token is
// opened again and it is done once more, unless it had begun to change the token:
// the outcome of that is unknown, and the caller looks it up by CKA_ID.
func (e *Engine) call(ctx context.Context, write bool, do func(*session) error) error {
	locked, repeated := write, false
	for {
		err := e.once(ctx, locked, write, do)
		var lost *lostError
		switch {
		case errors.Is(err, errReopen):
		case errors.As(err, &lost) && !lost.unknown && !repeated:
			repeated = true
		default:
			return err
		}
		locked = true
	}
}

func (e *Engine) once(ctx context.Context, locked, write bool, do func(*session) error) (err error) {
	// The file lock before the gate, always: the other way round two goroutines
	// could wait for each other.
	if locked {
		lock, err := e.acquireLock(ctx)
		if err != nil {
			return err
		}
		defer release(lock, &err)
	}
	if err := e.module.enter(ctx); err != nil {
		return err
	}
	defer e.module.leave()
	if e.closed {
		return engine.ErrClosed
	}
	e.token.leaveIfLoggedOut()
	if !e.token.connected() {
		if !locked {
			return errReopen
		}
		if err := e.token.connect(e.uri, e.opts, nil); err != nil {
			if e.module.idle() { // a device that comes back shows when the module starts anew
				_ = e.module.stop()
			}
			return fmt.Errorf("%w: open it again: %w", engine.ErrDeviceLost, err)
		}
	}
	if write && e.token.readOnly {
		return engine.ErrTokenReadOnly
	}
	s := &session{module: e.module, handle: e.token.session, token: e.label, connection: e.token.connection}
	err = do(s)
	switch {
	case (err == nil || !s.lost(err)) && s.held:
		return errors.Join(err, e.module.stop())
	case err == nil || !s.lost(err):
		return err
	}
	// Finalised whatever the count: a module may serve a dead device until then,
	// and every other token of it opens again when it is used next.
	return &lostError{err: errors.Join(explain(err), e.module.stop()), unknown: s.changed}
}
