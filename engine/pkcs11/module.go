//go:build cgo

package pkcs11

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// modules is the table of loaded modules by path: PKCS#11 is initialised once a
// process, so there is one handle for all engines of a module.
var modules = struct {
	sync.Mutex
	byPath map[string]*module
}{byPath: map[string]*module{}}

// module is a loaded PKCS#11 module. Its mutex is held around every call into
// it: the engines of one module take turns, and none can call while another
// finalises it, which would crash the process.
type module struct {
	path  string
	users int // guarded by modules

	mu sync.Mutex
	// ctx is nil when the module could not be loaded again after a device loss.
	ctx *pkcs11.Ctx
	// owns says that we initialised it and may finalise it.
	owns bool
	// generation counts the initialisations: a session of another is dead.
	generation int
	// failed are the PINs that a token refused in this process.
	failed map[string][]engine.Secret
}

// acquireModule loads a module, or shares it.
func acquireModule(path string) (*module, error) {
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", engine.ErrModule, err)
	}
	info, err := os.Stat(resolved)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", engine.ErrModule, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: not a regular file", engine.ErrModule)
	}
	modules.Lock()
	defer modules.Unlock()
	m := modules.byPath[resolved]
	if m == nil {
		m = &module{path: path, failed: map[string][]engine.Secret{}}
		if err := m.load(); err != nil {
			return nil, err
		}
		modules.byPath[resolved] = m
	}
	m.users++
	return m, nil
}

// release finalises the module after its last user.
func (m *module) release() error {
	modules.Lock()
	defer modules.Unlock()
	if m.users--; m.users > 0 {
		return nil
	}
	for path, known := range modules.byPath {
		if known == m {
			delete(modules.byPath, path)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unload()
}

// load initialises the module. The mutex is held, or nobody knows m yet.
func (m *module) load() error {
	ctx := pkcs11.New(m.path)
	if ctx == nil {
		// miekg/pkcs11 has no reason to give: dlopen refused it, or it has no
		// C_GetFunctionList.
		return fmt.Errorf("%w: it is not a PKCS#11 module for this machine", engine.ErrModule)
	}
	err := ctx.Initialize()
	m.owns = err == nil
	if err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		ctx.Destroy()
		return fmt.Errorf("%w: initialize: %w", engine.ErrModule, err)
	}
	m.ctx = ctx
	m.generation++
	return nil
}

// unload finalises the module, whatever the count. The mutex is held. Nothing is
// called after it: that would crash the process.
func (m *module) unload() error {
	if m.ctx == nil {
		return nil
	}
	var err error
	if m.owns {
		err = m.ctx.Finalize()
	}
	m.ctx.Destroy()
	m.ctx = nil
	m.generation++
	return err
}

// reload is what is left to do when a device is gone: every session of the
// module is dead, and a module may serve dead ones until it is finalised.
func (m *module) reload() error {
	_ = m.unload() // the finalising of a module whose device is gone may fail
	return m.load()
}
