package testserver_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/testserver"
)

// rawDial opens a session with small blocks, both ways, and little patience.
func rawDial(t *testing.T, server *testserver.Server, client credential) (*est.Client, error) {
	t.Helper()
	uri, err := est.ParseURI(server.URI())
	if err != nil {
		t.Fatal(err)
	}
	trust, err := est.NewTrustAnchors([]*x509.Certificate{server.Root()})
	if err != nil {
		t.Fatal(err)
	}
	session, err := coaps.Dial(t.Context(), coaps.Config{
		URI: uri, Certificate: [][]byte{client.cert.Raw}, Key: client.key, Trust: trust,
		BlockSize: 64, AckTimeout: 500 * time.Millisecond, MaxRetransmit: -1, ExchangeTimeout: 5 * time.Second,
	})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = session.Close() })
	return &est.Client{Session: session}, nil
}

// Without a fault the raw door answers as the other one does.
func TestRaw(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{Raw: true})
	device := idevid(t, server, "dev")
	client, err := rawDial(t, server, device)
	if err != nil {
		t.Fatal(err)
	}
	caCerts, err := client.CACerts(t.Context())
	if err != nil || len(caCerts) != 2 {
		t.Fatalf("got %d, %v", len(caCerts), err)
	}
	explicit, err := est.NewTrustAnchors(caCerts)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	answer, err := client.SimpleEnroll(t.Context(), newCSR(t, key, named("dev")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := explicit.VerifyIssued(answer, key.Public(), time.Now()); err != nil {
		t.Error(err)
	}
	setFaults(t, server, "defer=1,max-age=7s")
	var pending *est.PendingError
	if _, err := client.SimpleEnroll(t.Context(), newCSR(t, key, named("dev"))); !errors.As(err, &pending) || pending.RetryAfter != 7*time.Second {
		t.Errorf("got %v, want a deferral of 7 s", err)
	}
	if _, err := rawDial(t, server, idevid(t, start(t, testserver.Config{}), "dev")); !errors.Is(err, est.ErrCredentialRefused) {
		t.Errorf("an IDevID of another factory: got %v", err)
	}
}

// Each wrong message is an error to a client, and of sen and sren alone.
func TestWrongMessages(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{Raw: true})
	device := idevid(t, server, "dev")
	for kind, want := range map[string]string{
		"truncated": "malformed messages", "trailing": "malformed messages", "wrong-token": "another token", "critical-option": "critical and unknown",
		"reset": "reset by the peer", "silent": "no answer", "acknowledged-only": "acknowledged: no answer",
		"block-1-gib": "response of 1073741824 bytes", "block-endless": "body too large", "block-etag": "ETag 01 after 00", "block-order": "got 2/1/64 at offset 64",
		"block-format": "another content-format", "block-missing": "missing at offset 64", "block-short": "63 bytes",
	} {
		t.Run(kind, func(t *testing.T) {
			setFaults(t, server, "message="+kind)
			client, err := rawDial(t, server, device)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := client.CACerts(t.Context()); err != nil {
				t.Errorf("crts: %v", err)
			}
			if _, err := client.SimpleEnroll(t.Context(), newCSR(t, device.key, named("dev"))); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
		})
	}
}

func TestWrongServerCertificates(t *testing.T) {
	t.Parallel()
	for _, raw := range []bool{false, true} {
		server := start(t, testserver.Config{Raw: raw})
		device := idevid(t, server, "dev")
		for kind, want := range map[string]error{
			"other-name": est.ErrNotTrusted, "expired": est.ErrNotValidNow, "not-yet-valid": est.ErrNotValidNow, "foreign": est.ErrNotTrusted,
			"client": est.ErrNotTrusted, "truncated": est.ErrHandshake, "trailing": est.ErrNotTrusted,
		} {
			setFaults(t, server, "server-certificate="+kind)
			if _, err := rawDial(t, server, device); !errors.Is(err, want) {
				t.Errorf("raw %t, %s: got %v, want %v", raw, kind, err, want)
			}
		}
		setFaults(t, server)
		if _, err := rawDial(t, server, device); err != nil {
			t.Errorf("raw %t, without the fault: %v", raw, err)
		}
	}
}

// Each wrong body is refused by a client, after a certificate was issued for it.
func TestWrongBodies(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	device := idevid(t, server, "dev")
	anchors, err := est.NewTrustAnchors([]*x509.Certificate{server.Root(), server.Issuing()})
	if err != nil {
		t.Fatal(err)
	}
	for kind, want := range map[string]string{
		"none": "no certificate but those of CAs", "empty": "no certificate", "nothing": "empty", "two-leaves": "more than one certificate",
		"pkcs7-truncated": "truncated", "pkcs7-trailing": "after the end", "certificate-truncated": "malformed signature",
		"certificate-trailing": "goes on after its signature", "pkix-truncated": "malformed certificate", "pkix-trailing": "trailing data",
		"wrong-format": "content-format 50", "no-format": "no content-format", "swapped-format": "malformed tbs certificate",
	} {
		t.Run(kind, func(t *testing.T) {
			setFaults(t, server, "body="+kind)
			key, issued := newKey(t), len(server.Issuances())
			answer, err := mustDial(t, server, device).SimpleEnroll(t.Context(), newCSR(t, key, named("dev")))
			if err == nil {
				_, err = anchors.VerifyIssued(answer, key.Public(), time.Now())
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
			if got := len(server.Issuances()) - issued; got != 1 {
				t.Errorf("issued %d", got)
			}
		})
	}
	for kind, want := range map[string]*x509.Certificate{"foreign": nil, "leaf": server.ServerChain()[0]} {
		setFaults(t, server, "crts="+kind)
		answer, err := mustDial(t, server, device).CACerts(t.Context())
		switch {
		case err != nil || len(answer) != 1:
			t.Errorf("crts=%s: got %d, %v", kind, len(answer), err)
		case want != nil && !answer[0].Equal(want):
			t.Errorf("crts=%s: got %v", kind, answer[0].Subject)
		case want == nil && (!bytes.Equal(answer[0].RawSubject, server.Issuing().RawSubject) || server.Issuing().CheckSignatureFrom(answer[0]) == nil):
			t.Errorf("crts=%s: got %v, which is no stranger of the same name", kind, answer[0].Subject)
		}
	}
}
