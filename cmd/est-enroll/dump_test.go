package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"
)

// dumpToken is the command "token-dump MODULE LABEL": it prints each object of a
// token with every attribute that can be read of it, the PIN being in the
// environment. It has no line of the driver, and a process of its own for each
// token, since SoftHSM finds its tokens by the environment.
func dumpToken() {
	if err := dump(os.Args[1], os.Args[2], os.Getenv("PIN")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// lastAttribute is behind all numbers of PKCS #11 v3.0 but those of vendors and
// of arrays.
const lastAttribute = 0x700

func dump(module, label, pin string) (err error) {
	p := pkcs11.New(module)
	if p == nil {
		return errors.New("no module")
	}
	if err := p.Initialize(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Finalize()); p.Destroy() }()
	slots, err := p.GetSlotList(true)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(slots, func(slot uint) bool {
		info, err := p.GetTokenInfo(slot)
		return err == nil && strings.TrimRight(info.Label, " ") == label
	})
	if at < 0 {
		return errors.New("no token")
	}
	session, err := p.OpenSession(slots[at], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return err
	}
	if err := p.Login(session, pkcs11.CKU_USER, pin); err != nil {
		return err
	}
	if err := p.FindObjectsInit(session, nil); err != nil {
		return err
	}
	handles, _, err := p.FindObjects(session, 1000)
	if err = errors.Join(err, p.FindObjectsFinal(session)); err != nil {
		return err
	}
	var objects []string
	for _, handle := range handles {
		var object strings.Builder
		for number := range uint(lastAttribute) {
			got, err := p.GetAttributeValue(session, handle, []*pkcs11.Attribute{pkcs11.NewAttribute(number, nil)})
			switch {
			case err == nil && len(got[0].Value) > 32:
				fmt.Fprintf(&object, " %04x=%d:%x", number, len(got[0].Value), sha256.Sum256(got[0].Value))
			case err == nil:
				fmt.Fprintf(&object, " %04x=%x", number, got[0].Value)
			case errors.Is(err, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_SENSITIVE)):
				fmt.Fprintf(&object, " %04x=sensitive", number)
			}
		}
		objects = append(objects, object.String())
	}
	slices.Sort(objects) // handles have no order
	for _, object := range objects {
		fmt.Println(object)
	}
	return nil
}
