package testserver_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log"
	"time"

	"estenroll/csr"
	"estenroll/testserver"
)

// A test starts a CA, makes a device with a factory credential, lets it enrol
// at server.URI(), and asks the record what was issued.
func Example() {
	server, err := testserver.New(testserver.Config{Lifetime: 10 * time.Second})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	subject, err := csr.ParseSubject("serialNumber=4711,O=Example")
	if err != nil {
		log.Fatal(err)
	}
	idevid, err := server.IssueIDevID(testserver.IDevIDRequest{PublicKey: key.Public(), RawSubject: subject})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(idevid.Subject, "issued by", idevid.Issuer)
	fmt.Println("trust", server.Root().Subject)
	fmt.Println("issuances:", len(server.Issuances()))
	// Output:
	// SERIALNUMBER=4711,O=Example issued by CN=TEST ONLY factory CA
	// trust CN=TEST ONLY EST root CA
	// issuances: 0
}
