package lwm2m_test

import (
	"encoding/base64"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"estenroll/engine"
	"estenroll/internal/durable"
	"estenroll/lwm2m"
)

var update = flag.Bool("update", false, "write the golden files again")

// golden is an object that stays the same: its certificate is RFC 9148's, of
// the crts response of appendix A.1 (testdata/golden_certificate.der).
func golden(t testing.TB) *lwm2m.SecurityObject {
	t.Helper()
	certificate, err := os.ReadFile("testdata/golden_certificate.der")
	if err != nil {
		t.Fatal(err)
	}
	var o lwm2m.SecurityObject
	o.Set(0, enrolled(certificate))
	o.Set(2, everything(certificate))
	psk := lwm2m.Security{
		ServerURI: "coaps+tcp://bootstrap.example", BootstrapServer: true, Mode: lwm2m.ModePSK,
		PSKIdentity: engine.PSKIdentityFromBuffer([]byte("device <1>")), PSKKey: engine.PSKKeyFromFile("/etc/device/psk"),
	}
	o.Set(7, psk)
	return &o
}

func TestSaveAndLoad(t *testing.T) {
	t.Parallel()
	o := golden(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "security.json")
	if err := os.WriteFile(path, nil, 0o666); err != nil { // an earlier one, open to all
		t.Fatal(err)
	}
	if err := o.Save(path); err != nil {
		t.Fatal(err)
	}
	status, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if status.Mode() != 0o600 {
		t.Errorf("mode %v", status.Mode())
	}
	saved, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("testdata/security.json", saved, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/security.json")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(saved), string(want)); diff != "" {
		t.Errorf("-saved +golden:\n%s", diff)
	}
	loaded, err := lwm2m.LoadSecurity(path, parseAddress)
	if err != nil {
		t.Fatal(err)
	}
	for id, s := range o.All() {
		got, _ := loaded.Instance(id)
		for _, d := range lwm2m.Definitions() {
			gotValue, gotPresent := got.Resource(d.ID)
			value, present := s.Resource(d.ID)
			if gotPresent != present || !cmp.Equal(gotValue, value) {
				t.Errorf("/0/%d/%d: got %v, want %v", id, d.ID, gotValue, value)
			}
		}
		infos := func(s lwm2m.Security) []string {
			return []string{
				s.ClientCertificate.String(), s.PSKIdentity.String(), s.PrivateKey.String(), s.PSKKey.String(), s.SMSBindingSecretKeys.String(),
			}
		}
		if diff := cmp.Diff(infos(got), infos(s)); diff != "" {
			t.Errorf("/0/%d: -got +want:\n%s", id, diff)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	_, err = lwm2m.LoadSecurity(filepath.Join(dir, "absent"), parseAddress)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want fs.ErrNotExist", err)
	}
	if err := os.Truncate(path, 4<<20+1); err != nil {
		t.Fatal(err)
	}
	if _, err := lwm2m.LoadSecurity(path, parseAddress); !errors.Is(err, durable.ErrTooLarge) {
		t.Errorf("got %v, want durable.ErrTooLarge", err)
	}
}

func TestSaveRefused(t *testing.T) {
	t.Parallel()
	_, certificate := keyAndCertificate(t)
	psk := lwm2m.Security{
		ServerURI: "coaps://a.example", Mode: lwm2m.ModePSK, ShortServerID: 1,
		PSKIdentity: engine.PSKIdentityFromBuffer([]byte("device")), PSKKey: engine.PSKKeyFromBuffer([]byte("SECRET")),
	}
	sms := enrolled(certificate)
	sms.SMSBindingSecretKeys = engine.PSKKeyFromBuffer([]byte("SECRETSECRETSECR"))
	for name, tc := range map[string]struct {
		s        lwm2m.Security
		want     error
		resource lwm2m.ResourceID
	}{
		"pre-shared key in a buffer": {psk, lwm2m.ErrSecretBuffer, 5},
		"SMS key in a buffer":        {sms, lwm2m.ErrSecretBuffer, 8},
		"invalid":                    {lwm2m.Security{Mode: lwm2m.ModeNoSec, ShortServerID: 1}, nil, 0},
	} {
		var o lwm2m.SecurityObject
		o.Set(3, tc.s)
		path := filepath.Join(t.TempDir(), "security.json")
		if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := o.Save(path)
		var wrong *lwm2m.ResourceError
		if !errors.As(err, &wrong) || wrong.Instance != 3 || wrong.Resource != tc.resource || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v", name, err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != "old" {
			t.Errorf("%s: the file holds %q, %v", name, got, err)
		}
	}
}

// TestParseRefused: an error names the field and shows no value.
func TestParseRefused(t *testing.T) {
	t.Parallel()
	_, certificate := keyAndCertificate(t)
	server := base64.StdEncoding.EncodeToString(certificate)
	instance := func(fields string) string {
		return `{"version": 1, "instances": [{"id": 5, "server_uri": "coaps://a.example", "bootstrap_server": true, "security_mode": 4, "server_public_key": "` + server + `"` + fields + `}]}`
	}
	if _, err := lwm2m.ParseSecurity([]byte(instance("")), parseAddress); err != nil {
		t.Fatal(err)
	}
	deep := strings.Repeat(`[`, 100) + strings.Repeat(`]`, 100)
	for _, tc := range []struct{ name, text, want string }{
		{"empty", "", "unexpected EOF"},
		{"cut", instance("")[:100], "unexpected EOF"},
		{"not JSON", "SECRET", "invalid character"},
		{"array", "[]", "a value of type array, not an object"},
		{"trailing data", instance("") + "{}", "data after the object"},
		{"trailing garbage", instance("") + "SECRET", "data after the object"},
		{"not UTF-8", instance(`, "sni": "` + "\xff" + `"`), "not UTF-8"},
		{"no version", `{"instances": []}`, "version 0: not a version of the Security object that is known here"},
		{"later version with later fields", `{"version": 2, "objects": []}`, "version 2: not a version"},
		{"version as text", `{"version": "SECRET"}`, "version: a value of type string does not fit"},
		{"unknown field", `{"version": 1, "objects": []}`, `unknown field "objects"`},
		{"unknown field of an instance", instance(`, "pin": "SECRET"`), `unknown field "pin"`},
		{"unknown field of an info", instance(`, "private_key": {"pin": "SECRET"}`), `unknown field "pin"`},
		{"field in another case", instance(`, "SNI": "a"`), "a field with a name that no field has"},
		{"field in a script that folds", instance(`, "ſni": "a"`), "a field with a name that no field has"},
		{"address as a field", instance(`, "pkcs11:object=x?pin-value=SECRET": ""`), "a field with a name that no field has"},
		{"field twice", instance(`, "id": 5`), `field "id" is there twice`},
		{"null", instance(`, "private_key": null`), "null is not a value here"},
		{"nested", `{"version": 1, "instances": ` + deep + `}`, "nested too deeply"},
		{"instance twice", `{"version": 1, "instances": [{"id": 1}, {"id": 1}]}`, "instance /0/1 is there twice"},
		{"number too large", instance(`, "short_server_id": 70000`), "short_server_id: a value of type number does not fit"},
		{"not base64", instance(`, "client_public_key": "SECRET!"`), "illegal base64"},
		{"invalid object", instance(`, "rds_source_port": 16`), "/0/5/29: 16 is not in 0..15"},

		{"no source", instance(`, "private_key": {}`), "/0/5/5: private_key: not exactly one of engine, file and buffer"},
		{"two sources", instance(`, "private_key": {"engine": "pkcs11:object=SECRET", "file": "SECRET"}`), "/0/5/5: private_key: not exactly one of engine, file and buffer"},
		{"private key in a buffer", instance(`, "private_key": {"buffer": "U0VDUkVU"}`), "/0/5/5: private_key: a secret key in a buffer is not persisted"},
		{"pre-shared key in a buffer", instance(`, "psk_key": {"buffer": "U0VDUkVU"}`), "/0/5/5: psk_key: a secret key in a buffer is not persisted"},
		{"SMS key in a buffer", instance(`, "sms_binding_secret_keys": {"buffer": "U0VDUkVU"}`), "/0/5/8: sms_binding_secret_keys: a secret key in a buffer is not persisted"},
		{"empty buffer", instance(`, "client_certificate": {"buffer": ""}`), "/0/5/3: an empty client certificate"},
		{"address with a PIN", instance(`, "private_key": {"engine": "pkcs11:object=x?pin-value=SECRET"}`), "/0/5/5: private_key: parse engine address: pin-value"},
		{"address of no driver", instance(`, "client_certificate": {"engine": "SECRET"}`), "/0/5/3: client_certificate: engine address: no driver"},
		{"long address", instance(`, "private_key": {"engine": "pkcs11:` + strings.Repeat("SECRET", 1000) + `"}`), "/0/5/5: private_key: 6007 bytes are more than 4096"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			_, err := lwm2m.ParseSecurity([]byte(tc.text), parseAddress)
			if err == nil {
				t.Fatal("accepted")
			}
			if !strings.HasPrefix(err.Error(), "security object: ") || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v\nwant %s", err, tc.want)
			}
			if strings.Contains(err.Error(), "SECRET") || strings.Contains(err.Error(), "\n") {
				t.Errorf("a value is shown: %v", err)
			}
			if want := strings.Contains(tc.name, "version") && !strings.Contains(tc.name, "text"); errors.Is(err, lwm2m.ErrVersion) != want {
				t.Errorf("errors.Is ErrVersion: %v", !want)
			}
		})
	}
}

// FuzzLoad: what loads saves, and loads to the same; an error has no value in it.
func FuzzLoad(f *testing.F) {
	seed, err := os.ReadFile("testdata/security.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	certificate, err := os.ReadFile("testdata/golden_certificate.der")
	if err != nil {
		f.Fatal(err)
	}
	server := base64.StdEncoding.EncodeToString(certificate)
	for _, text := range []string{
		`{"version": 1, "instances": []}`,
		`{"version":1,"instances":[{"id":1,"server_uri":"coap://a","security_mode":3,"short_server_id":1,"sni":"\u2028\"\\ \ud800","groups":[]}]}`,
		`{"version":1,"instances":[{"id":65534,"server_uri":"coaps://a","bootstrap_server":true,"security_mode":4,"server_public_key":"` + server +
			`","client_certificate":{"buffer":"` + server + `"},"private_key":{"file":"pkcs11:"},"client_hold_off_seconds":4294967295}]}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		o, err := lwm2m.ParseSecurity(data, parseAddress)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "security object: ") {
				t.Errorf("not our error: %v", err)
			}
			return
		}
		first, err := o.Encode()
		if err != nil {
			t.Fatalf("loads but does not save: %v", err)
		}
		again, err := lwm2m.ParseSecurity(first, parseAddress)
		if err != nil {
			t.Fatalf("saves but does not load: %v\n%s", err, first)
		}
		second, err := again.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(second), string(first)); diff != "" {
			t.Errorf("-second +first:\n%s", diff)
		}
	})
}
