package est_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"os"
	"slices"
	"time"

	"estenroll/est"
)

// canned is a session that answers with the payloads of RFC 9148 appendix A; a
// real one comes from est/coaps.
type canned struct{ est.Session }

func (canned) RoundTrip(_ context.Context, req *est.Request) (*est.Response, error) {
	body, err := os.ReadFile("../testdata/rfc9148/" + req.Operation.ShortPath() + "-response-281.der")
	return &est.Response{ContentFormat: est.ContentFormatPKCS7CertsOnly, Body: body}, err
}

// How do I enrol, and what must I check? The CA certificates of the server become
// the Explicit TA, and only what it, the key and the time agree with is taken.
func Example() {
	client := est.Client{Session: canned{}}
	ctx := context.Background()
	caCerts, err := client.CACerts(ctx)
	if err != nil {
		log.Fatal(err)
	}
	explicitTA, err := est.NewTrustAnchors(caCerts)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("Explicit TA:", caCerts[0].Subject.CommonName)

	csr, err := os.ReadFile("../testdata/rfc9148/sen-request-286.der")
	if err != nil {
		log.Fatal(err)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		log.Fatal(err)
	}
	answer, err := client.SimpleEnroll(ctx, csr)
	if err != nil {
		log.Fatal(err)
	}
	_, err = explicitTA.VerifyIssued(answer, request.PublicKey, time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC))
	// The RFC's example certificate is of another CA than its example of crts.
	fmt.Println("refused:", errors.Is(err, est.ErrNotTrusted))
	// Output:
	// Explicit TA: Root CA
	// refused: true
}

// What does an error of a session mean? The types carry the facts.
func ExamplePendingError() {
	var err error = est.NewPendingError(est.SimpleEnroll, "coaps://est.example:5684/est/sen", 90*time.Second)
	var pending *est.PendingError
	switch {
	case errors.As(err, &pending):
		fmt.Println("send the same CSR again, not before", pending.RetryAfter)
	case errors.Is(err, est.ErrUnreachable):
		fmt.Println("try again")
	}
	// Output: send the same CSR again, not before 1m30s
}

// Where is sen? The links of GET /.well-known/core?rt=ace.est* say so.
func ExampleParseLinks() {
	links, err := est.ParseLinks([]byte(`</est/crts>;rt="ace.est.crts";ct="281 287",</est/sen>;rt=ace.est.sen;ct=281`))
	if err != nil {
		log.Fatal(err)
	}
	for _, link := range links {
		if slices.Contains(link.Words("rt"), est.SimpleEnroll.ResourceType()) {
			fmt.Println(link.Target, link.Words("ct"))
		}
	}
	// Output: /est/sen [281]
}

func ExampleParseURI() {
	uri, err := est.ParseURI("coaps://est.example")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(uri)
	_, err = est.ParseURI("coaps://est.example/est?label=a")
	fmt.Println(err)
	// Output:
	// coaps://est.example:5684/.well-known/est
	// EST server URI: it has a query or a fragment
}
