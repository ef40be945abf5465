package csr_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log"

	"estenroll/csr"
)

// How do I write a Subject? As RFC 4514 does, the last RDN of the DER first: here
// the O is encoded before the CN.
func ExampleParseSubject() {
	raw, err := csr.ParseSubject(`CN=pump 7\, hall 2,O=Example`)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%x\n", raw)
	fmt.Println(csr.FormatSubject(raw))
	// Output:
	// 302b3110300e060355040a0c074578616d706c653117301506035504030c0e70756d7020372c2068616c6c2032
	// CN=pump 7\, hall 2,O=Example
}

// How do I build a CSR? With any crypto.Signer: the key of an HSM stays there.
func ExampleBuild() {
	subject, err := csr.ParseSubject("CN=dev-17,O=Example")
	if err != nil {
		log.Fatal(err)
	}
	dns, err := csr.ParseSAN("DNS:dev-17.example")
	if err != nil {
		log.Fatal(err)
	}
	serial, err := csr.ParseSAN("hwModuleName:1.3.6.1.4.1.32473.1;4711ab")
	if err != nil {
		log.Fatal(err)
	}
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader) // stands for the HSM's
	if err != nil {
		log.Fatal(err)
	}
	der, err := csr.Build(nil, csr.Template{RawSubject: subject, SANs: []csr.SAN{dns, serial}}, signer)
	if err != nil {
		log.Fatal(err)
	}
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(request.Subject, request.DNSNames, request.CheckSignature() == nil)
	// Output: CN=dev-17,O=Example [dev-17.example] true
}
