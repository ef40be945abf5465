package coaps_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log"
	"time"

	"estenroll/csr"
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/testserver"
)

// How do I enrol over CoAPs? One session: crts, the live session judged by what
// it brought, then sen. The keys here are in memory; a device's are in its HSM,
// which offers a crypto.Signer too.
func Example() {
	server, idevid, idevidKey := factory()
	defer server.Close()
	ctx, now := context.Background(), time.Now()

	implicitTA, err := est.NewTrustAnchors([]*x509.Certificate{server.Root()})
	if err != nil {
		log.Fatal(err)
	}
	uri, err := est.ParseURI(server.URI())
	if err != nil {
		log.Fatal(err)
	}
	session, err := coaps.Dial(ctx, coaps.Config{URI: uri, Certificate: [][]byte{idevid.Raw}, Key: idevidKey, Trust: implicitTA})
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()

	client := est.Client{Session: session}
	caCerts, err := client.CACerts(ctx)
	if err != nil {
		log.Fatal(err)
	}
	explicitTA, err := est.NewTrustAnchors(caCerts)
	if err != nil {
		log.Fatal(err)
	}
	if err := explicitTA.VerifyServer(session.PeerChain(), uri.Host, now); err != nil {
		log.Fatal(err)
	}

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	request, err := csr.Build(nil, csr.Template{RawSubject: idevid.RawSubject}, key)
	if err != nil {
		log.Fatal(err)
	}
	answer, err := client.SimpleEnroll(ctx, request)
	if err != nil {
		log.Fatal(err)
	}
	chain, err := explicitTA.VerifyIssued(answer, key.Public(), now)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("enrolled", csr.FormatSubject(chain[0].RawSubject))
	// Output: enrolled serialNumber=4711,O=Example
}

// factory is a test server and a device as it leaves the factory.
func factory() (*testserver.Server, *x509.Certificate, *ecdsa.PrivateKey) {
	server, err := testserver.New(testserver.Config{})
	if err != nil {
		log.Fatal(err)
	}
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
	return server, idevid, key
}
