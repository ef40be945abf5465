package file

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	"estenroll/engine"
)

// Scheme is the driver's key in an engine.Drivers table.
const Scheme = "file"

// Address names a directory, file:/var/lib/keys, or an object in it,
// file:object=device;id=0a0b;type=private, of which object (its label) or id may be
// left out. There is no PIN.
type Address struct {
	Dir   string // absolute; empty in the address of an object
	Label string
	ID    string // lower-case hexadecimal
	Type  engine.Class
}

// The length of a label is no part of its pattern: a bounded repetition of a hundred
// takes a quarter of a millisecond to compile, at each start of the program.
var (
	labelPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._ -]*$`)
	classes      = map[engine.Class]bool{engine.ClassPrivateKey: true, engine.ClassPublicKey: true, engine.ClassCertificate: true}
)

const (
	maxLabel = 100
	maxID    = 32 // bytes
)

func isLabel(text string) bool { return len(text) <= maxLabel && labelPattern.MatchString(text) }

// ParseAddress parses an address strictly: each attribute once, and in a path no
// element that would change.
func ParseAddress(text string) (Address, error) {
	wrong := func(reason string) (Address, error) { return Address{}, fmt.Errorf("file address: %s", reason) }
	scheme, rest, found := strings.Cut(text, ":")
	if !found || !strings.EqualFold(scheme, Scheme) {
		return wrong("want file:/directory, or file:object=…;id=…;type=…")
	}
	if strings.HasPrefix(rest, "/") {
		if filepath.Clean(rest) != rest || strings.ContainsAny(rest, "\x00\n") || len(rest) > 1024 {
			return wrong("not a directory's path as it is written shortest")
		}
		return Address{Dir: rest}, nil
	}
	var a Address
	for attribute := range strings.SplitSeq(rest, ";") {
		name, value, _ := strings.Cut(attribute, "=")
		var field *string
		switch name {
		case "object":
			field = &a.Label
		case "id":
			field = &a.ID
		case "type":
			field = (*string)(&a.Type)
		default:
			return wrong("want file:/directory, or file:object=…;id=…;type=…")
		}
		if *field != "" || value == "" {
			return wrong(name + " is empty or there twice")
		}
		*field = value
	}
	if a.Label != "" && !isLabel(a.Label) {
		return wrong("object: want up to 100 letters, digits, dots, dashes, underscores and spaces")
	}
	if a.ID != "" {
		if decoded, err := hex.DecodeString(a.ID); err != nil || len(decoded) > maxID || strings.ToLower(a.ID) != a.ID {
			return wrong("id: want lower-case hexadecimal digits")
		}
	}
	if a.Type != "" && !classes[a.Type] {
		return wrong("type: want private, public or cert")
	}
	return a, nil
}

// Scheme implements engine.Address.
func (Address) Scheme() string { return Scheme }

// String implements engine.Address.
func (a Address) String() string {
	if a.Dir != "" {
		return Scheme + ":" + a.Dir
	}
	var parts []string
	for _, part := range [][2]string{{"object", a.Label}, {"id", a.ID}, {"type", string(a.Type)}} {
		if part[1] != "" {
			parts = append(parts, part[0]+"="+part[1])
		}
	}
	return Scheme + ":" + strings.Join(parts, ";")
}

// objectOf takes an address as that of an object of a class.
func objectOf(at engine.Address, class engine.Class) (Address, error) {
	a, ok := at.(Address)
	switch {
	case !ok || a.Label == "" && a.ID == "":
		return Address{}, errors.New("not the address of an object of this engine")
	case a.Type == "":
		a.Type = class
	case a.Type != class && class != "":
		return Address{}, fmt.Errorf("the address of a %s, want that of a %s", a.Type, class)
	}
	return a, nil
}

// matches reports whether an object is one that an address names.
func (a Address) matches(o object) bool {
	return (a.Label == "" || a.Label == o.label) && (a.ID == "" || a.ID == o.id)
}
