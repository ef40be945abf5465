// Package file keeps private keys in files, for development and for machines that
// have no HSM: it is no HSM. Whoever can read the directory has the keys. The
// program that uses it says so.
//
// A key is a PEM file LABEL~ID.key with the mode 0600, PKCS#8 as OpenSSL has it, and a
// certificate LABEL~ID.crt; what a person puts there may do without the ~ID. Each file
// is written whole or not at all, under the directory's lock.
package file

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"estenroll/engine"
	"estenroll/internal/durable"
)

// Driver is the driver for an engine.Drivers table.
var Driver = engine.Driver{
	Parse: func(text string) (engine.Address, error) { return ParseAddress(text) },
	Open:  open,
}

const (
	keySuffix         = ".key"
	certificateSuffix = ".crt"
	lockName          = "lock"
	maxFile           = 64 << 10 // bytes
)

// Engine is an open directory of keys.
type Engine struct {
	dir     Address
	command string
	timeout time.Duration

	mu     sync.RWMutex // over closed, and over each change as a whole
	closed bool
}

var (
	_ engine.Engine           = (*Engine)(nil)
	_ engine.KeyRecoverer     = (*Engine)(nil)
	_ engine.KeyInspector     = (*Engine)(nil)
	_ engine.KeyImporter      = (*Engine)(nil)
	_ engine.Decrypter        = (*Engine)(nil)
	_ engine.CertificateStore = (*Engine)(nil)
	_ engine.Lister           = (*Engine)(nil)
	_ engine.TokenInspector   = (*Engine)(nil)
)

func open(ctx context.Context, token engine.Address, opts engine.Options) (engine.Engine, error) {
	dir, ok := token.(Address)
	err := ctx.Err()
	if err == nil && (!ok || dir.Dir == "") {
		err = errors.New("want file:/directory")
	}
	if err == nil {
		var status fs.FileInfo
		status, err = os.Stat(dir.Dir)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !status.IsDir() {
			err = engine.ErrTokenNotFound
		}
	}
	if err != nil {
		return nil, &engine.Error{Op: "open token", Address: token, Err: err}
	}
	e := &Engine{dir: dir, command: opts.Command, timeout: opts.LockTimeout}
	if e.timeout == 0 {
		e.timeout = 30 * time.Second
	}
	return e, nil
}

// TokenStatus implements engine.TokenInspector.
func (e *Engine) TokenStatus() engine.TokenStatus { return engine.TokenStatus{Address: e.dir} }

// Close implements engine.Engine.
func (e *Engine) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	return nil
}

// usable reports why nothing can be done.
func (e *Engine) usable(ctx context.Context) error {
	if e.closed {
		return engine.ErrClosed
	}
	return ctx.Err()
}

// read does what changes nothing.
func (e *Engine) read(ctx context.Context, op string, at engine.Address, do func() error) error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	err := e.usable(ctx)
	if err == nil {
		err = do()
	}
	return fail(op, at, err)
}

// write does what changes something, under the lock of the directory.
func (e *Engine) write(ctx context.Context, op string, at engine.Address, do func() error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.usable(ctx); err != nil {
		return fail(op, at, err)
	}
	waiting, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	lock, err := durable.Acquire(waiting, filepath.Join(e.dir.Dir, lockName), 0o600, e.command)
	var held *durable.LockedError
	switch {
	case errors.As(err, &held) && errors.Is(ctx.Err(), context.Canceled):
		return fail(op, at, ctx.Err())
	case errors.As(err, &held):
		return fail(op, at, fmt.Errorf("%w: %w", engine.ErrLocked, err))
	case errors.Is(err, fs.ErrPermission):
		return fail(op, at, fmt.Errorf("%w: %w", engine.ErrTokenReadOnly, err))
	case err != nil:
		return fail(op, at, err)
	}
	return fail(op, at, errors.Join(do(), lock.Release()))
}

func fail(op string, at engine.Address, err error) error {
	if err == nil {
		return nil
	}
	return &engine.Error{Op: op, Address: at, Err: err}
}

// object is a file of the directory.
type object struct {
	name, label, id string
	isKey           bool
	key             crypto.Signer
	cert            *x509.Certificate
	err             error // why it cannot be read
}

func (o object) address(class engine.Class) Address {
	return Address{Label: o.label, ID: o.id, Type: class}
}

func (o object) class() engine.Class {
	if o.isKey {
		return engine.ClassPrivateKey
	}
	return engine.ClassCertificate
}

func (o object) listed(class engine.Class) engine.Object {
	id, _ := hex.DecodeString(o.id) // it was found to be one
	return engine.Object{Class: class, Label: o.label, ID: id, Address: o.address(class), Err: o.err}
}

// objects returns the files that are ours to know, with their content, by name.
func (e *Engine) objects() ([]object, error) {
	entries, err := os.ReadDir(e.dir.Dir)
	if err != nil {
		return nil, err
	}
	var all []object
	for _, entry := range entries {
		o, ok := named(entry.Name())
		if !ok {
			continue
		}
		data, err := durable.ReadFile(filepath.Join(e.dir.Dir, o.name), maxFile)
		if err == nil && o.isKey {
			o.key, err = parseKey(data)
		} else if err == nil {
			o.cert, err = parseCertificate(data)
		}
		clear(data)
		o.err = err
		all = append(all, o)
	}
	return all, nil
}

// named tells an object by its file's name. One without an id has one of its label.
func named(name string) (o object, ok bool) {
	stem, isKey := strings.CutSuffix(name, keySuffix)
	if !isKey {
		if stem, ok = strings.CutSuffix(name, certificateSuffix); !ok {
			return o, false
		}
	}
	label, id, has := strings.Cut(stem, "~")
	if !has {
		digest := sha256.Sum256([]byte(label))
		id = hex.EncodeToString(digest[:8])
	}
	a, err := ParseAddress("file:object=" + label + ";id=" + id)
	return object{name: name, label: a.Label, id: a.ID, isKey: isKey}, err == nil
}

// fileName is the reverse of named, for what this driver makes.
func (a Address) fileName() string {
	if a.Type == engine.ClassCertificate {
		return a.Label + "~" + a.ID + certificateSuffix
	}
	return a.Label + "~" + a.ID + keySuffix
}

func (e *Engine) path(name string) string { return filepath.Join(e.dir.Dir, name) }

// one returns the object of a class that an address names, whether it can be read or
// not.
func (e *Engine) one(at Address, isKey bool) (object, error) {
	all, err := e.objects()
	if err != nil {
		return object{}, err
	}
	matches := slices.DeleteFunc(all, func(o object) bool { return o.isKey != isKey || !at.matches(o) })
	switch len(matches) {
	case 0:
		return object{}, engine.ErrNotFound
	case 1:
		return matches[0], nil
	}
	ambiguous := &engine.AmbiguousError{Address: at}
	for _, o := range matches {
		ambiguous.Matches = append(ambiguous.Matches, o.listed(o.class()))
	}
	return object{}, ambiguous
}

// List implements engine.Lister. A key is a private and a public one.
func (e *Engine) List(ctx context.Context, filter engine.Address) ([]engine.Object, error) {
	var listed []engine.Object
	err := e.read(ctx, "list objects", filter, func() error {
		var wanted Address
		if filter != nil {
			a, ok := filter.(Address)
			if !ok || a.Dir != "" {
				return errors.New("not the address of an object of this engine")
			}
			wanted = a
		}
		all, err := e.objects()
		if err != nil {
			return err
		}
		for _, o := range all {
			classes := []engine.Class{engine.ClassCertificate}
			if o.isKey {
				classes = []engine.Class{engine.ClassPrivateKey, engine.ClassPublicKey}
			}
			for _, class := range classes {
				if wanted.matches(o) && (wanted.Type == "" || wanted.Type == class) {
					listed = append(listed, o.listed(class))
				}
			}
		}
		slices.SortStableFunc(listed, func(a, b engine.Object) int {
			return strings.Compare(string(a.Class)+"\x00"+a.Label, string(b.Class)+"\x00"+b.Label)
		})
		return nil
	})
	return listed, err
}

func parseCertificate(data []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, errors.New("not one certificate in PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}
