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

// What the server gets wrong changes while it runs, in the words of the command.
func ExampleServer_SetFaults() {
	server, err := testserver.New(testserver.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()

	faults, err := testserver.ParseFaults([]string{"defer=2,max-age=5s", "wrong-key"})
	if err != nil {
		log.Fatal(err)
	}
	if err := server.SetFaults(faults); err != nil {
		log.Fatal(err)
	}
	fmt.Println(server.Faults().Strings())
	// Some need a server that was started for them.
	fmt.Println(server.SetFaults(testserver.Faults{HTTP: "slow-body"}))
	// Output:
	// [defer=2,max-age=5s wrong-key]
	// faults http and retry-after: the server has no HTTPS door
}

// A CA changes its root while clients live: announced, switched, finished.
func ExampleServer_Rollover() {
	server, err := testserver.New(testserver.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()

	old := server.Root()
	for _, phase := range []testserver.RolloverPhase{testserver.RolloverAnnounced, testserver.RolloverSwitched, testserver.RolloverFinished} {
		certificates, err := server.Rollover(testserver.Rollover{Phase: phase})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(phase, server.Root().Equal(old), server.Root().Equal(certificates.NewWithNew))
	}
	// Output:
	// announced true false
	// switched false true
	// finished false true
}
