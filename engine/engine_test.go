package engine_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll/engine"
)

// No way of printing or encoding shows a secret, wherever it stands.
func TestSecretIsNotShown(t *testing.T) {
	t.Parallel()
	const marker = "marker"
	secret := engine.NewSecret(marker)
	type inside struct {
		Exported   engine.Secret
		unexported engine.Secret
	}
	values := []any{
		secret, &secret, []engine.Secret{secret}, map[string]engine.Secret{"a": secret}, inside{secret, secret}, &inside{secret, secret},
		engine.PSKKeyFromBuffer([]byte(marker)), struct{ inner engine.PSKKeyInfo }{engine.PSKKeyFromBuffer([]byte(marker))},
	}
	var log bytes.Buffer
	text := slog.New(slog.NewTextHandler(&log, nil))
	object := slog.New(slog.NewJSONHandler(&log, nil))
	var shown []string
	for _, value := range values {
		for _, verb := range "vsdqxXobcUeEfFgGt" {
			for _, flag := range []string{"", "+", "#"} {
				shown = append(shown, fmt.Sprintf("%"+flag+string(verb), value))
			}
		}
		shown = append(shown, fmt.Sprint(value))
		text.Info("a", "secret", value)
		object.Info("a", "secret", value)
		encoded, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		shown = append(shown, string(encoded))
	}
	shown = append(shown, log.String())
	// As text, as hexadecimal, as numbers, as base64.
	forms := []string{marker, fmt.Sprintf("%x", marker), fmt.Sprintf("%X", marker), "109 97", "bWFya2Vy", "1101101"}
	for _, s := range shown {
		for _, form := range forms {
			if strings.Contains(s, form) {
				t.Errorf("%q is in %s", form, s)
			}
		}
	}
	if secret.Reveal() != marker || !secret.IsSet() {
		t.Error("Reveal does not")
	}
	if none := (engine.Secret{}); none.IsSet() || none.Reveal() != "" {
		t.Error("the zero value is set")
	}
	if empty := engine.NewSecret(""); !empty.IsSet() {
		t.Error("an empty secret is none")
	}
}

// address is a driver's address in these tests.
type address string

func (a address) String() string { return "fake:" + string(a) }
func (address) Scheme() string   { return "fake" }

func TestDrivers(t *testing.T) {
	t.Parallel()
	opened := errors.New("opened")
	drivers := engine.Drivers{"fake": {
		Parse: func(s string) (engine.Address, error) { return address(s[len("fake:"):]), nil },
		Open: func(context.Context, engine.Address, engine.Options) (engine.Engine, error) {
			return nil, opened
		},
	}}
	for _, s := range []string{"fake:a", "FAKE:a"} {
		got, err := drivers.Parse(s)
		if err != nil || got != engine.Address(address("a")) {
			t.Errorf("%s: got %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "marker", "other:marker", "fake", ":marker", "fake :marker"} {
		got, err := drivers.Parse(s)
		if err == nil || strings.Contains(err.Error(), "marker") || !strings.Contains(err.Error(), "fake:") {
			t.Errorf("%q: got %v, %v, want an error that names the drivers and repeats nothing", s, got, err)
		}
	}
	if _, err := drivers.Open(t.Context(), address("a"), engine.Options{}); !errors.Is(err, opened) {
		t.Errorf("got %v", err)
	}
	if _, err := (engine.Drivers{}).Open(t.Context(), address("a"), engine.Options{}); err == nil {
		t.Error("an unknown driver opens")
	}
}

func TestInfos(t *testing.T) {
	t.Parallel()
	buffer := []byte{1, 2, 3}
	for _, tc := range []struct {
		name string
		info interface {
			IsZero() bool
			Engine() (engine.Address, bool)
			File() (string, bool)
			Buffer() ([]byte, bool)
			String() string
		}
		engine, file, buffer bool
		text                 string
	}{
		{"zero", engine.CertificateChainInfo{}, false, false, false, "none"},
		{"chain in an engine", engine.CertificateChainFromEngine(address("a")), true, false, false, "fake:a"},
		{"chain in a file", engine.CertificateChainFromFile("/a"), false, true, false, "file /a"},
		{"chain in a buffer", engine.CertificateChainFromBuffer(buffer), false, false, true, "buffer of 3 bytes"},
		{"key in an engine", engine.PrivateKeyFromEngine(address("a")), true, false, false, "fake:a"},
		{"key in a file", engine.PrivateKeyFromFile("/a"), false, true, false, "file /a"},
		{"PSK in an engine", engine.PSKKeyFromEngine(address("a")), true, false, false, "fake:a"},
		{"PSK in a file", engine.PSKKeyFromFile("/a"), false, true, false, "file /a"},
		{"PSK in a buffer", engine.PSKKeyFromBuffer(nil), false, false, true, "buffer of 0 bytes"},
		{"identity in an engine", engine.PSKIdentityFromEngine(address("a")), true, false, false, "fake:a"},
		{"identity in a file", engine.PSKIdentityFromFile("/a"), false, true, false, "file /a"},
		{"identity in a buffer", engine.PSKIdentityFromBuffer(buffer), false, false, true, "buffer of 3 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, inEngine := tc.info.Engine()
			_, inFile := tc.info.File()
			_, inBuffer := tc.info.Buffer()
			got := []any{inEngine, inFile, inBuffer, tc.info.IsZero(), tc.info.String()}
			want := []any{tc.engine, tc.file, tc.buffer, !tc.engine && !tc.file && !tc.buffer, tc.text}
			if diff := cmp.Diff(got, want); diff != "" {
				t.Error(diff)
			}
		})
	}
	info := engine.CertificateChainFromBuffer(buffer)
	buffer[0] = 9
	got, _ := info.Buffer()
	got[1] = 9
	if again, _ := info.Buffer(); !bytes.Equal(again, []byte{1, 2, 3}) {
		t.Errorf("the buffer is shared: %v", again)
	}
	if _, err := info.Certificates(); err == nil {
		t.Error("three bytes are certificates")
	}
	if _, err := engine.CertificateChainFromFile("/a").Certificates(); err == nil {
		t.Error("a file is a buffer")
	}
}

func TestPINSource(t *testing.T) {
	t.Parallel()
	source := engine.PINSource{Path: "/pin", Inode: 1, Size: 5, ChangedAt: time.Unix(1, 2)}
	other := map[string]engine.PINSource{
		"path":  {Path: "/nip", Inode: 1, Size: 5, ChangedAt: time.Unix(1, 2)},
		"inode": {Path: "/pin", Inode: 2, Size: 5, ChangedAt: time.Unix(1, 2)},
		"size":  {Path: "/pin", Inode: 1, Size: 6, ChangedAt: time.Unix(1, 2)},
		"ctime": {Path: "/pin", Inode: 1, Size: 5, ChangedAt: time.Unix(1, 3)},
	}
	for name, changed := range other {
		if source.Same(changed) {
			t.Errorf("another %s is the same source", name)
		}
	}
	stored, err := json.Marshal(source)
	if err != nil {
		t.Fatal(err)
	}
	var again engine.PINSource
	if err := json.Unmarshal(stored, &again); err != nil || !again.Same(source) {
		t.Errorf("%s is read as %+v, %v", stored, again, err)
	}
	if source.IsZero() || !(engine.PINSource{}).IsZero() {
		t.Error("IsZero")
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	matches := []engine.Object{
		{Class: engine.ClassPrivateKey, Label: "a", ID: []byte{1}},
		{Class: engine.ClassPrivateKey, Label: "b", ID: []byte{2}},
		{Class: engine.ClassToken, Label: "c", ID: []byte("0123")},
		{Class: engine.ClassToken, Label: "c", ID: []byte("4567")},
	}
	for _, tc := range []struct {
		err  error
		is   error
		want string
	}{
		{&engine.Error{Op: "open key", Address: address("a"), Module: "/m.so", Err: engine.ErrNotFound}, engine.ErrNotFound,
			"open key fake:a: module /m.so: no such object"},
		{&engine.Error{Op: "list objects", Err: engine.ErrClosed}, engine.ErrClosed, "list objects: engine is closed"},
		{&engine.AmbiguousError{Address: address("a"), Matches: matches[:2]}, nil, `2 objects match fake:a: private "a" id 01; private "b" id 02`},
		{&engine.AmbiguousError{Address: address("a"), Matches: matches[2:]}, engine.ErrTokenAmbiguous, `2 tokens match fake:a: token "c" serial "0123"; token "c" serial "4567"`},
		{&engine.PINError{Source: engine.PINSource{Path: "/pin"}, Err: engine.ErrPINIncorrect}, engine.ErrPINIncorrect, "PIN of /pin: the PIN is wrong"},
		{&engine.PINError{Err: engine.ErrPINLocked}, engine.ErrPINLocked, "the PIN is locked"},
	} {
		if got := tc.err.Error(); got != tc.want {
			t.Errorf("got %s, want %s", got, tc.want)
		}
		if tc.is != nil && !errors.Is(tc.err, tc.is) {
			t.Errorf("%v is not %v", tc.err, tc.is)
		}
	}
}

func TestAlgorithmOf(t *testing.T) {
	t.Parallel()
	for want, key := range map[engine.Algorithm]crypto.PublicKey{
		engine.ECP256:  &ecdsa.PublicKey{Curve: elliptic.P256()},
		engine.ECP384:  &ecdsa.PublicKey{Curve: elliptic.P384()},
		engine.ECP521:  &ecdsa.PublicKey{Curve: elliptic.P521()},
		engine.RSA3072: &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 3071)},
		"":             ed25519.PublicKey{},
	} {
		if got := engine.AlgorithmOf(key); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestNewSoftwareKey(t *testing.T) {
	t.Parallel()
	kinds := map[engine.Algorithm]engine.Algorithm{"": engine.ECP256}
	for _, algorithm := range engine.Algorithms() {
		kinds[algorithm] = algorithm
	}
	for algorithm, want := range kinds {
		key, err := engine.NewSoftwareKey(algorithm)
		if err != nil {
			t.Errorf("%q: %v", algorithm, err)
		} else if got := engine.AlgorithmOf(key.Public()); got != want {
			t.Errorf("%q: got %s, want %s", algorithm, got, want)
		}
	}
	if _, err := engine.NewSoftwareKey("Ed25519"); !errors.Is(err, engine.ErrUnsupported) {
		t.Errorf("Ed25519: got %v, want ErrUnsupported", err)
	}
}
