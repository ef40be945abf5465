//go:build cgo

package pkcs11

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"estenroll/engine"
)

var classes = map[engine.Class]uint{
	engine.ClassPrivateKey:  pkcs11.CKO_PRIVATE_KEY,
	engine.ClassPublicKey:   pkcs11.CKO_PUBLIC_KEY,
	engine.ClassCertificate: pkcs11.CKO_CERTIFICATE,
	engine.ClassSecretKey:   pkcs11.CKO_SECRET_KEY,
	engine.ClassData:        pkcs11.CKO_DATA,
}

// objectAddress checks that an address names an object of this token.
func (e *Engine) objectAddress(at engine.Address, class engine.Class) (URI, error) {
	u, ok := at.(URI)
	switch {
	case !ok:
		return URI{}, errors.New("not a PKCS#11 URI")
	case u.Token != "" && u.Token != e.label:
		return URI{}, fmt.Errorf("it names another token than %q", e.label)
	case u.Object == "" && u.ID == "":
		return URI{}, errors.New("it names no object: object or id is missing")
	case u.Type != "" && u.Type != class:
		return URI{}, fmt.Errorf("its type is %q, want %q", u.Type, class)
	}
	u = u.object()
	u.Token, u.Type = e.label, class
	return u, nil
}

// search returns the handles of the objects that match a template.
func (e *Engine) search(template []*pkcs11.Attribute) (handles []pkcs11.ObjectHandle, err error) {
	ctx := e.module.ctx
	if err := ctx.FindObjectsInit(e.session, template); err != nil {
		return nil, fmt.Errorf("search: %w", err)
	}
	// A search that is left open blocks the next one.
	defer func() {
		if final := ctx.FindObjectsFinal(e.session); err == nil && final != nil {
			handles, err = nil, fmt.Errorf("search: %w", final)
		}
	}()
	for {
		some, _, err := ctx.FindObjects(e.session, 64)
		if err != nil {
			return nil, fmt.Errorf("search: %w", err)
		}
		if len(some) == 0 {
			return handles, nil
		}
		handles = append(handles, some...)
	}
}

func template(u URI) []*pkcs11.Attribute {
	var out []*pkcs11.Attribute
	if u.Type != "" {
		out = append(out, pkcs11.NewAttribute(pkcs11.CKA_CLASS, classes[u.Type]))
	}
	if u.Object != "" {
		out = append(out, pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object))
	}
	if u.ID != "" {
		out = append(out, pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)))
	}
	return out
}

// findOne returns the one object that an address names.
func (e *Engine) findOne(u URI) (pkcs11.ObjectHandle, error) {
	handles, err := e.search(template(u))
	switch {
	case err != nil:
		return 0, err
	case len(handles) == 0:
		return 0, engine.ErrNotFound
	case len(handles) > 1:
		ambiguous := &engine.AmbiguousError{Address: u}
		for _, handle := range handles {
			ambiguous.Matches = append(ambiguous.Matches, e.describe(handle))
		}
		return 0, ambiguous
	}
	return handles[0], nil
}

// value reads one attribute.
func (e *Engine) value(handle pkcs11.ObjectHandle, kind uint) ([]byte, error) {
	attributes, err := e.module.ctx.GetAttributeValue(e.session, handle, []*pkcs11.Attribute{{Type: kind}})
	if err != nil {
		return nil, err
	}
	return attributes[0].Value, nil
}

// flag reads a boolean attribute; nil is one that the token does not report.
func (e *Engine) flag(handle pkcs11.ObjectHandle, kind uint) (*bool, error) {
	value, err := e.value(handle, kind)
	if err != nil && !isUnreadable(err) {
		return nil, err
	}
	if err != nil || len(value) != 1 {
		return nil, nil
	}
	set := value[0] != 0
	return &set, nil
}

// describe reads what can be read of an object.
func (e *Engine) describe(handle pkcs11.ObjectHandle) engine.Object {
	var object engine.Object
	read := func(kind uint) []byte {
		value, err := e.value(handle, kind)
		if err != nil {
			object.Err = errors.Join(object.Err, explain(err))
		}
		return value
	}
	class := read(pkcs11.CKA_CLASS)
	for name, number := range classes {
		if bytes.Equal(class, pkcs11.NewAttribute(pkcs11.CKA_CLASS, number).Value) {
			object.Class = name
		}
	}
	object.Label, object.ID = string(read(pkcs11.CKA_LABEL)), nil
	if object.Class != engine.ClassData { // which have no CKA_ID
		object.ID = read(pkcs11.CKA_ID)
	}
	object.Address = URI{Token: e.label, Object: object.Label, ID: string(object.ID), Type: object.Class}
	return object
}

// List implements engine.Lister.
func (e *Engine) List(ctx context.Context, filter engine.Address) (objects []engine.Object, err error) {
	var u URI
	if filter != nil {
		var ok bool
		if u, ok = filter.(URI); !ok {
			return nil, fail("list objects", filter, e.moduleName(), errors.New("not a PKCS#11 URI"))
		}
		if u.Token != "" && u.Token != e.label {
			return nil, fail("list objects", filter, e.moduleName(), fmt.Errorf("it names another token than %q", e.label))
		}
	}
	err = e.read(ctx, "list objects", filter, func() error {
		objects = nil
		handles, err := e.search(template(u))
		if err != nil {
			return err
		}
		for _, handle := range handles {
			object := e.describe(handle)
			if isLost(object.Err) {
				return object.Err
			}
			objects = append(objects, object)
		}
		return nil
	})
	slices.SortStableFunc(objects, func(a, b engine.Object) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.Label, b.Label), bytes.Compare(a.ID, b.ID))
	})
	return objects, err
}
