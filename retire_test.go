package estenroll

import (
	"testing"

	"estenroll/engine"
	"estenroll/engine/pkcs11"
	"estenroll/lwm2m"
)

// A key is destroyed only when nothing uses it: not the factory's, not one that
// a kept credential or any Security instance refers to.
func TestKeyInUse(t *testing.T) {
	t.Parallel()
	address := func(name string) engine.Address {
		u, err := pkcs11.ParseURI("pkcs11:token=t;object=" + name + ";type=private")
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	d := &shared{security: new(lwm2m.SecurityObject), journal: &journal{Credentials: map[string]*record{
		"first":  {Pairs: []credential{{Key: reference{Address: address("kept")}}}},
		"second": {Pairs: []credential{{Key: reference{Address: address("anothers")}}}},
	}}}
	for _, idevid := range []string{"idevid", "another-idevid"} {
		c := new(Credential)
		c.cfg.IDevID.Key = address(idevid)
		d.credentials = append(d.credentials, c)
	}
	d.security.Set(7, lwm2m.Security{PrivateKey: engine.PrivateKeyFromEngine(address("referred-to"))})
	for name, want := range map[string]bool{"idevid": true, "another-idevid": true, "kept": true, "anothers": true, "referred-to": true, "retired": false} {
		if got := d.keyInUse(address(name)); got != want {
			t.Errorf("%s: got %t, want %t", name, got, want)
		}
	}
}
