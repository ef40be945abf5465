//go:build cgo

package pkcs11

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"estenroll/engine"
)

// objectAddress completes the address of an object of this token, of the class
// that an operation is for.
func (e *Engine) objectAddress(at engine.Address, class engine.Class) (URI, error) {
	u, ok := at.(URI)
	if !ok {
		return URI{}, errNotURI
	}
	u, err := e.resolve(u)
	switch {
	case err != nil:
		return URI{}, err
	case !u.hasLabel() && !u.hasID():
		return URI{}, errors.New("it names no object: object or id is missing")
	case u.Type != "" && u.Type != class:
		return URI{}, fmt.Errorf("its type is %s, not %s", u.Type, class)
	}
	u.Type = class
	return u, nil
}

// resolve completes an object's address with all that is known of the token, of
// which the engine's address may leave most out.
func (e *Engine) resolve(u URI) (URI, error) {
	token := e.about
	token.ModuleName, token.ModulePath, token.PINSource, token.pin = e.uri.ModuleName, e.uri.ModulePath, e.uri.PINSource, e.uri.pin
	return u.Resolve(token)
}

// TokenStatus implements engine.TokenInspector.
func (e *Engine) TokenStatus() engine.TokenStatus {
	_ = e.module.enter(context.Background()) // ends only with the gate
	defer e.module.leave()
	return engine.TokenStatus{
		Address: URI{Token: e.about.Token, Manufacturer: e.about.Manufacturer, Model: e.about.Model, Serial: e.about.Serial},
		Module:  e.uri.ModulePath, ReadOnly: e.token.readOnly, LoginRequired: e.token.private, PINSource: e.token.source,
	}
}

// List implements engine.Lister.
func (e *Engine) List(ctx context.Context, filter engine.Address) ([]engine.Object, error) {
	const op = "list objects"
	var u URI
	if filter != nil {
		var ok bool
		err := errNotURI
		if u, ok = filter.(URI); ok {
			u, err = e.resolve(u)
		}
		if err != nil {
			return nil, fail(op, filter, e.uri.ModulePath, err)
		}
	}
	var objects []engine.Object
	err := e.read(ctx, op, filter, func(s *session) error {
		objects = nil
		whole, broken, err := s.matches(u)
		for _, m := range append(whole, broken...) {
			objects = append(objects, m.Object)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(objects, func(a, b engine.Object) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.Label, b.Label), bytes.Compare(a.ID, b.ID))
	})
	return objects, nil
}
