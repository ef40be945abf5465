//go:build cgo

package pkcs11

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

// session is the session of a token while its module's gate is held. It is where
// the module is called for objects; its errors are in the engine's words.
type session struct {
	module *module
	handle pkcs11.SessionHandle
	token  string // label
	// connection is the token's when the session was opened.
	connection int
	// changed says that the token was asked to change something: what is not
	// repeated after the loss of the device.
	changed bool
	// held says that the module may hold on to an object until it starts anew.
	held bool
}

func (s *session) lost(err error) bool { return s.module.lost(s.handle, err) }

// search returns the handles of the objects that match a template.
func (s *session) search(template []*pkcs11.Attribute) (handles []pkcs11.ObjectHandle, err error) {
	ctx := s.module.ctx
	if err := ctx.FindObjectsInit(s.handle, template); err != nil {
		return nil, fmt.Errorf("search: %w", explain(err))
	}
	defer func() { // a search that is left open blocks the next one
		if final := ctx.FindObjectsFinal(s.handle); err == nil && final != nil {
			handles, err = nil, fmt.Errorf("end search: %w", explain(final))
		}
	}()
	for {
		some, _, err := ctx.FindObjects(s.handle, 64)
		if err != nil {
			return nil, fmt.Errorf("search: %w", explain(err))
		}
		if len(some) == 0 {
			return handles, nil
		}
		handles = append(handles, some...)
	}
}

var classes = map[engine.Class]uint{
	engine.ClassPrivateKey:  pkcs11.CKO_PRIVATE_KEY,
	engine.ClassPublicKey:   pkcs11.CKO_PUBLIC_KEY,
	engine.ClassCertificate: pkcs11.CKO_CERTIFICATE,
	engine.ClassSecretKey:   pkcs11.CKO_SECRET_KEY,
	engine.ClassData:        pkcs11.CKO_DATA,
}

// find returns the objects that an address names: by class, label and id, as far
// as it has them.
func (s *session) find(u URI) ([]pkcs11.ObjectHandle, error) {
	var template []*pkcs11.Attribute
	if u.Type != "" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_CLASS, classes[u.Type]))
	}
	if u.hasLabel() {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object))
	}
	if u.hasID() {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)))
	}
	return s.search(template)
}

// value reads one attribute. An attribute that the object does not have, does not
// show, or did not get before a crash is errUnreadable.
func (s *session) value(object pkcs11.ObjectHandle, kind uint) ([]byte, error) {
	attributes, err := s.module.ctx.GetAttributeValue(s.handle, object, []*pkcs11.Attribute{{Type: kind}})
	switch {
	case err == nil && attributes[0].Value != nil:
		return attributes[0].Value, nil
	case err == nil:
		return nil, errUnreadable
	case s.lost(err):
		return nil, explain(err)
	}
	return nil, fmt.Errorf("%w: %w", errUnreadable, explain(err))
}

var errUnreadable = errors.New("an attribute cannot be read")

// values reads attributes, in one call where the object has all of them: one that
// is missing fails the whole call, so then they are read one by one. What cannot
// be read is nil, and the error says so.
func (s *session) values(object pkcs11.ObjectHandle, kinds ...uint) ([][]byte, error) {
	template := make([]*pkcs11.Attribute, len(kinds))
	for i, kind := range kinds {
		template[i] = &pkcs11.Attribute{Type: kind}
	}
	out := make([][]byte, len(kinds))
	if attributes, err := s.module.ctx.GetAttributeValue(s.handle, object, template); err == nil {
		for i, attribute := range attributes {
			out[i] = attribute.Value
		}
		return out, nil
	}
	var first error
	for i, kind := range kinds {
		var err error
		if out[i], err = s.value(object, kind); err != nil {
			if !errors.Is(err, errUnreadable) {
				return nil, err
			}
			if first == nil {
				first = err
			}
		}
	}
	return out, first
}

// essential is the attribute without which an object of a class is half-written.
var essential = map[engine.Class]uint{
	engine.ClassPrivateKey:  pkcs11.CKA_KEY_TYPE,
	engine.ClassPublicKey:   pkcs11.CKA_KEY_TYPE,
	engine.ClassSecretKey:   pkcs11.CKA_KEY_TYPE,
	engine.ClassCertificate: pkcs11.CKA_VALUE,
}

// describe reads what can be read of an object: in one call where the search was
// for its class.
func (s *session) describe(handle pkcs11.ObjectHandle, class engine.Class) (match, error) {
	object := match{handle: handle}
	kinds := []uint{pkcs11.CKA_CLASS, pkcs11.CKA_LABEL}
	if kind, known := essential[class]; known { // and has a CKA_ID
		kinds = append(kinds, pkcs11.CKA_ID, kind)
	}
	values, err := s.values(handle, kinds...)
	if values == nil {
		return object, err
	}
	object.Err = err
	object.Class = engine.Class(fmt.Sprintf("0x%x", values[0])) // one that the engine has no word for
	for name, number := range classes {
		if bytes.Equal(values[0], pkcs11.NewAttribute(pkcs11.CKA_CLASS, number).Value) {
			object.Class = name
		}
	}
	object.Label = string(values[1])
	if kind, known := essential[object.Class]; known {
		rest := values[2:]
		if len(rest) == 0 {
			if rest, err = s.values(handle, pkcs11.CKA_ID, kind); rest == nil {
				return object, err
			}
			if object.Err == nil {
				object.Err = err
			}
		}
		object.ID, object.value = rest[0], rest[1]
		if len(object.value) == 0 && object.Err == nil {
			object.Err = errUnreadable
		}
	}
	object.Address = s.address(object.Object)
	return object, nil
}

// address is nil for an object that has neither label nor id, or none that an
// address can hold.
func (s *session) address(object engine.Object) engine.Address {
	u := URI{Token: s.token, Object: object.Label, ID: string(object.ID)}
	if _, known := classes[object.Class]; known {
		u.Type = object.Class
	}
	if u.Object == "" && u.ID == "" {
		return nil
	}
	if again, err := ParseURI(u.String()); err != nil || again != u {
		return nil
	}
	return u
}

// match is an object that an address names.
type match struct {
	handle pkcs11.ObjectHandle
	engine.Object
	value []byte // of the essential attribute of its class, as the module writes it
}

// matches returns the objects that an address names, the half-written ones apart.
func (s *session) matches(u URI) (whole, broken []match, err error) {
	handles, err := s.find(u)
	if err != nil {
		return nil, nil, err
	}
	for _, handle := range handles {
		object, err := s.describe(handle, u.Type)
		switch {
		case err != nil:
			return nil, nil, err
		case object.Err != nil:
			broken = append(broken, object)
		default:
			whole = append(whole, object)
		}
	}
	return whole, broken, nil
}

// one returns the one object that an address names. Half-written ones do not count.
func (s *session) one(u URI) (match, error) {
	whole, broken, err := s.matches(u)
	switch {
	case err != nil:
		return match{}, err
	case len(whole) == 1:
		return whole[0], nil
	case len(whole) > 1:
		return match{}, ambiguous(u, whole)
	case len(broken) > 0:
		return match{}, fmt.Errorf("%w: what is there is half-written (%w)", engine.ErrNotFound, broken[0].Err)
	}
	return match{}, engine.ErrNotFound
}

func ambiguous(u URI, matches []match) error {
	err := &engine.AmbiguousError{Address: u}
	for _, m := range matches {
		err.Matches = append(err.Matches, m.Object)
	}
	return err
}

// create creates an object. It is never repeated.
func (s *session) create(template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	s.changed = true
	handle, err := s.module.ctx.CreateObject(s.handle, template)
	if err != nil {
		return 0, fmt.Errorf("create object: %w", explain(err))
	}
	return handle, nil
}

// destroy destroys objects by handle: never by name, which may be another's.
func (s *session) destroy(handles ...pkcs11.ObjectHandle) error {
	for _, handle := range handles {
		s.changed = true
		err := s.module.ctx.DestroyObject(s.handle, handle)
		if err != nil && !isCode(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) { // gone already
			return fmt.Errorf("destroy object: %w", explain(err))
		}
	}
	return nil
}

// destroyID destroys everything that carries an id.
func (s *session) destroyID(id string) error {
	handles, err := s.find(URI{ID: id})
	if err != nil {
		return err
	}
	return s.destroy(handles...)
}
