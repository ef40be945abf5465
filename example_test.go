package estenroll_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	"estenroll"
	"estenroll/engine"
	"estenroll/engine/pkcs11"
	"estenroll/est"
	"estenroll/est/coaps"
)

// An LwM2M client enrols each of its credentials and renews one: the device is
// opened, with one login, for as long as that takes. The Security object that the
// client reads is security.json in the state directory. It needs a token and a
// server, so it is compiled and not run.
func ExampleOpen() {
	ctx := context.Background()
	drivers := engine.Drivers{"pkcs11": pkcs11.Driver}
	address := func(text string) engine.Address {
		at, err := drivers.Parse(text)
		if err != nil {
			panic(err)
		}
		return at
	}
	token := address("pkcs11:token=device?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/pin")
	idevid := estenroll.IDevID{Key: address("pkcs11:object=idevid;type=private"), Certificate: address("pkcs11:object=idevid;type=cert")}
	var factory []*x509.Certificate // what judges the server at first
	anchors, err := est.NewTrustAnchors(factory)
	if err != nil {
		fmt.Println(err)
		return
	}
	server, err := coaps.ParseURI("coaps://est.example.com")
	if err != nil {
		fmt.Println(err)
		return
	}
	credential := func(name string, instance uint16) estenroll.CredentialConfig {
		return estenroll.CredentialConfig{
			Name: name, IDevID: idevid, ServerURI: server.String(), ServerName: server.Host, ImplicitTA: anchors,
			Security: estenroll.Security{Instance: instance},
			Dial: func(ctx context.Context, with estenroll.Connection) (est.Session, error) {
				return coaps.Dial(ctx, coaps.Config{URI: server, Certificate: with.Certificate, Key: with.Key, Trust: with.Trust, Provisional: with.Provisional, Now: with.Now, Warn: with.Warn})
			},
		}
	}
	device, err := estenroll.Open(ctx, estenroll.Config{
		StateDir: "/var/lib/client", ParseAddress: drivers.Parse,
		OpenEngine: func(ctx context.Context, refused engine.PINSource) (engine.Engine, error) {
			return drivers.Open(ctx, token, engine.Options{RefusedPIN: refused})
		},
		Credentials: []estenroll.CredentialConfig{credential("management", 0), credential("telemetry", 1)},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer device.Close()
	for _, c := range device.Credentials() {
		result, err := c.Enroll(ctx)
		var pending *estenroll.PendingError
		switch {
		case errors.As(err, &pending):
			fmt.Println(c.Name(), "again at", pending.NotBefore)
		case err != nil:
			fmt.Println(c.Name(), err)
		default:
			fmt.Println(c.Name(), "until", result.Certificate.NotAfter)
		}
	}
	if _, err := device.Credential("telemetry").Renew(ctx); err != nil {
		fmt.Println(err)
	}
}
