//go:build cgo

package pkcs11

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

// probe loads a module and asks for its functions, as miekg/pkcs11 does without
// looking at the answer. It returns why that cannot work, or NULL. The library
// stays loaded.
static const char *probe(const char *path)
{
	void *library = dlopen(path, RTLD_LAZY);
	if (!library)
		return dlerror();
	unsigned long (*get)(void **) = (unsigned long (*)(void **))dlsym(library, "C_GetFunctionList");
	if (!get)
		return "it is no PKCS #11 module: it has no C_GetFunctionList";
	void *list = NULL;
	if (get(&list) != 0 || !list)
		return "its C_GetFunctionList gives no functions";
	return NULL;
}
*/
import "C"

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// modules are the modules that this process has loaded, by path: PKCS #11 is
// initialised once a process, so all engines of a module share one handle. They
// stay loaded: miekg/pkcs11 crashes the process when a handle is used after its
// Destroy, and a library that has threads may when it is unloaded.
var modules = struct {
	sync.Mutex
	byPath map[string]*module
}{byPath: map[string]*module{}}

// module is a loaded PKCS #11 module.
type module struct {
	path string // without symbolic links: one module has one path

	// gate is held around every call into the module and guards what follows:
	// engines take turns, and none calls while another finalises. A channel, for a
	// wait on it ends with its context.
	gate chan struct{}

	ctx *pkcs11.Ctx
	// users are the engines that are open or being opened.
	users int
	// initialized says that calls are allowed, owned that we did it and may undo it.
	initialized, owned bool
	// generation counts initialisations: what an earlier one opened is gone.
	generation int
	tokens     map[tokenID]*token
	// refused are the PINs that a token refused in this process.
	refused map[tokenID][]engine.Secret
}

// tokenID is what identifies a token within a module.
type tokenID struct {
	label, serial string
	// twin is the slot of a token that shares label and serial with another: what
	// else tells them apart may change when a device is connected again.
	twin string
}

// loadModule loads the module at a path, or returns the one that is loaded.
func loadModule(path string) (*module, error) {
	resolved, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", engine.ErrModuleNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", engine.ErrModule, err)
	}
	modules.Lock()
	defer modules.Unlock()
	if m := modules.byPath[resolved]; m != nil {
		return m, nil
	}
	if err := checkModule(resolved); err != nil {
		return nil, fmt.Errorf("%w: %w", engine.ErrModule, err)
	}
	if err := probe(resolved); err != nil {
		return nil, fmt.Errorf("%w: %w", engine.ErrModule, err)
	}
	ctx := pkcs11.New(resolved)
	if ctx == nil {
		return nil, fmt.Errorf("%w: it was loaded once and not again", engine.ErrModule)
	}
	m := &module{path: resolved, gate: make(chan struct{}, 1), ctx: ctx, tokens: map[tokenID]*token{}, refused: map[tokenID][]engine.Secret{}}
	modules.byPath[resolved] = m
	return m, nil
}

// checkModule refuses what dlopen would refuse without a reason, and a library
// that was cut short, whose missing pages would end the process with a signal: the
// table of sections that debug/elf reads is at its end.
func checkModule(path string) error {
	status, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !status.Mode().IsRegular() {
		return errors.New("it is not a regular file")
	}
	if runtime.GOOS != "linux" {
		return nil
	}
	library, err := elf.Open(path)
	var format *elf.FormatError
	switch {
	case errors.As(err, &format), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("it is not a library, or is cut short") // debug/elf quotes its bytes
	case err != nil:
		return err
	}
	return library.Close()
}

// probe refuses a library from which miekg/pkcs11 would take a null pointer for
// the list of functions, and crash: a module that lacks its configuration may
// give one.
func probe(path string) error {
	runtime.LockOSThread() // what dlerror returns is the thread's
	defer runtime.UnlockOSThread()
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	if reason := C.probe(name); reason != nil {
		return errors.New(C.GoString(reason))
	}
	return nil
}

// enter waits for the module. The caller leaves it.
func (m *module) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case m.gate <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *module) leave() { <-m.gate }

// start initialises the module if it is not.
func (m *module) start() error {
	if m.initialized {
		return nil
	}
	err := m.ctx.Initialize()
	m.owned = err == nil
	// Another library of this process did: its sessions live on, so it is not
	// ours to finalise.
	if err != nil && !isCode(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return fmt.Errorf("initialize: %w", explain(err))
	}
	m.initialized = true
	m.generation++
	return nil
}

// stop finalises the module, whatever the count of its users: every session is
// gone with it. Nothing is called before the next start.
func (m *module) stop() error {
	if !m.initialized {
		return nil
	}
	m.initialized = false
	m.generation++
	if !m.owned {
		return nil
	}
	return explain(m.ctx.Finalize())
}

// release stops the module after its last user.
func (m *module) release() error {
	if m.users--; m.users > 0 {
		return nil
	}
	return m.stop()
}

// slot is a slot that holds an initialised token.
type slot struct {
	number uint
	uri    URI // all that an address can say of the token
	flags  uint
}

func (s slot) String() string { return fmt.Sprintf("token %q serial %q", s.uri.Token, s.uri.Serial) }

// id identifies the token among all that the module shows.
func (s slot) id(all []slot) tokenID {
	id := tokenID{label: s.uri.Token, serial: s.uri.Serial}
	for _, other := range all {
		if other.number != s.number && other.is(id) {
			id.twin = s.uri.SlotID
		}
	}
	return id
}

// is reports whether the slot holds the token with an id.
func (s slot) is(id tokenID) bool {
	return s.uri.Token == id.label && s.uri.Serial == id.serial && (id.twin == "" || s.uri.SlotID == id.twin)
}

// slots lists the slots with their tokens, and with what is known of the slots and
// the module if it is asked for.
func (m *module) slots(places bool) ([]slot, error) {
	numbers, err := m.ctx.GetSlotList(true)
	if err != nil {
		return nil, fmt.Errorf("list tokens: %w", explain(err))
	}
	var library pkcs11.Info
	if places {
		if library, err = m.ctx.GetInfo(); err != nil {
			return nil, fmt.Errorf("look at module: %w", explain(err))
		}
	}
	var found []slot
	for _, number := range numbers {
		info, err := m.ctx.GetTokenInfo(number)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue // a slot that lost its token meanwhile, or has a blank one
		}
		s := slot{number: number, flags: info.Flags, uri: URI{
			Token: trim(info.Label), Manufacturer: trim(info.ManufacturerID), Model: trim(info.Model), Serial: trim(info.SerialNumber),
			SlotID: strconv.FormatUint(uint64(number), 10),
		}.known(ownAttributes)}
		if places {
			place, err := m.ctx.GetSlotInfo(number)
			if err != nil {
				continue
			}
			s.uri.SlotManufacturer, s.uri.SlotDescription = trim(place.ManufacturerID), trim(place.SlotDescription)
			s.uri.LibraryManufacturer, s.uri.LibraryDescription = trim(library.ManufacturerID), trim(library.LibraryDescription)
			s.uri.LibraryVersion = fmt.Sprintf("%d.%d", library.LibraryVersion.Major, library.LibraryVersion.Minor)
			s.uri = s.uri.known(tokenAttributes)
		}
		found = append(found, s)
	}
	return found, nil
}

func trim(padded string) string { return strings.TrimRight(padded, " \x00") }

// slot finds the one token that an address names: with an id, if it is known, and
// returns what identifies it.
func (m *module) slot(at URI, known tokenID) (slot, tokenID, error) {
	if err := at.foreign(); err != nil {
		return slot{}, tokenID{}, fmt.Errorf("%w: %w", engine.ErrTokenNotFound, err)
	}
	// The token that is opened is asked for all, which objects' addresses may say.
	all, err := m.slots(known != tokenID{} || at.namesPlace())
	if err != nil {
		return slot{}, tokenID{}, err
	}
	var found []slot
	var others []string
	for _, s := range all {
		if at.differs(s.uri) == "" && (known == (tokenID{}) || s.is(known)) {
			found = append(found, s)
		} else {
			others = append(others, s.String())
		}
	}
	switch {
	case len(found) > 1:
		return slot{}, tokenID{}, ambiguousToken(at, found)
	case len(found) == 1:
		return found[0], found[0].id(all), nil
	case len(others) > 0:
		return slot{}, tokenID{}, fmt.Errorf("%w: there are %s", engine.ErrTokenNotFound, strings.Join(others, "; "))
	}
	return slot{}, tokenID{}, fmt.Errorf("%w: the module shows none", engine.ErrTokenNotFound)
}

// ambiguousToken lists the tokens that match, each with the shortest address that
// tells it from the others and can stand in the place of the one that was given.
func ambiguousToken(at URI, found []slot) error {
	err := &engine.AmbiguousError{Address: at}
	for _, s := range found {
		address := URI{
			Token: s.uri.Token, Serial: s.uri.Serial,
			ModulePath: at.ModulePath, ModuleName: at.ModuleName, PINSource: at.PINSource,
		}
		for _, other := range found {
			if other.number != s.number && address.differs(other.uri) == "" {
				address.SlotID = s.uri.SlotID
			}
		}
		err.Matches = append(err.Matches, engine.Object{Class: engine.ClassToken, Label: s.uri.Token, ID: []byte(s.uri.Serial), Address: address})
	}
	return err
}
