package estenroll

import (
	"testing"

	"estenroll/engine"
	"estenroll/engine/pkcs11"
	"estenroll/lwm2m"
)

// A key is destroyed only when nothing else uses it: not one that the configuration
// names, that was there before, or that another credential's pair or Security
// instance refers to. What the credential's own pairs made goes with them.
func TestKeyUsedElsewhere(t *testing.T) {
	t.Parallel()
	address := func(name string) engine.Address {
		u, err := pkcs11.ParseURI("pkcs11:token=t;object=" + name + ";type=private")
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	own := reference{Address: address("own-leaf")}
	d := &shared{security: new(lwm2m.SecurityObject), journal: &journal{Credentials: map[string]*record{
		"first": {Pairs: []credential{
			{Key: reference{Address: address("own")}, Certificates: []reference{own}},
			{Key: reference{Address: address("given")}, ExistingKey: true},
		}},
		"second": {
			Pairs:     []credential{{Key: reference{Address: address("anothers")}}},
			Operation: &operation{Key: reference{Address: address("given-to-another")}, ExistingKey: true},
		},
	}}}
	for _, name := range []string{"first", "second"} {
		c := &Credential{shared: d, journal: d.journal.Credentials[name]}
		c.cfg.IDevID.Key, c.cfg.Key = address(name+"-idevid"), address(name+"-named")
		d.credentials = append(d.credentials, c)
	}
	d.security.Set(6, lwm2m.Security{PrivateKey: engine.PrivateKeyFromEngine(address("own")), ClientCertificate: engine.CertificateChainFromEngine(own.Address)})
	d.security.Set(7, lwm2m.Security{PrivateKey: engine.PrivateKeyFromEngine(address("referred-to"))})
	for name, want := range map[string]bool{
		"first-idevid": true, "second-idevid": true, "first-named": true, "second-named": true, "given": true,
		"anothers": true, "given-to-another": true, "referred-to": true, "own": false, "retired": false,
	} {
		if got, err := d.credentials[0].usedElsewhere(t.Context(), address(name)); got != want || err != nil {
			t.Errorf("%s: got %t, %v, want %t", name, got, err, want)
		}
	}
}
