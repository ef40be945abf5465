package lwm2m_test

import (
	"fmt"
	"log"

	"estenroll/engine"
	"estenroll/lwm2m"
)

// A program has its drivers' parser: engine.Drivers.Parse.
func ExampleSecurityObject() {
	certificate, err := parseAddress("pkcs11:object=device-1a2b;id=%01;type=cert")
	if err != nil {
		log.Fatal(err)
	}
	key, err := parseAddress("pkcs11:object=device;id=%01;type=private")
	if err != nil {
		log.Fatal(err)
	}
	var o lwm2m.SecurityObject
	o.Set(0, lwm2m.Security{
		ServerURI:         "coaps://server.example",
		Mode:              lwm2m.ModeEST,
		ClientCertificate: engine.CertificateChainFromEngine(certificate),
		PrivateKey:        engine.PrivateKeyFromEngine(key),
	})
	fmt.Println(o.Validate())

	s, _ := o.Instance(0)
	wire, _ := s.Resource(lwm2m.ResourcePublicKeyOrIdentity)
	fmt.Printf("beside resource 3: %s; in it: %q\n", s.ClientCertificate, wire)
	// Output:
	// security object: /0/0/4: mode 4 (certificate with EST) needs the server's public key, certificate or trust anchor; /0/0/10: a server that is not the Bootstrap-Server has a short server id
	// beside resource 3: pkcs11:object=device-1a2b;id=%01;type=cert; in it: ""
}
