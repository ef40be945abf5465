package testserver_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"estenroll/csr"
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/testserver"
)

// dial opens a session as a device would, with a clock of its own.
func dial(t *testing.T, server *testserver.Server, client credential, now func() time.Time) (*coaps.Session, error) {
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
		URI: uri, Certificate: [][]byte{client.cert.Raw}, Key: client.key, Trust: trust, Now: now,
		AckTimeout: 100 * time.Millisecond,
	})
	if err == nil {
		t.Cleanup(func() { _ = session.Close() })
	}
	return session, err
}

func mustDial(t *testing.T, server *testserver.Server, client credential) *est.Client {
	t.Helper()
	session, err := dial(t, server, client, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return &est.Client{Session: session}
}

// A device's life over a socket, its IDevID's only name a critical hwModuleName
// (RFC 4108 §5), which crypto/x509 cannot judge by itself.
func TestEnrollAndReenroll(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{})
	hardware, err := csr.ParseSAN("hwModuleName:1.3.6.1.4.1.99999;0102")
	if err != nil {
		t.Fatal(err)
	}
	san, err := csr.Template{SANs: []csr.SAN{hardware}}.SANExtension()
	if err != nil {
		t.Fatal(err)
	}
	factoryKey := newKey(t)
	cert, err := server.IssueIDevID(testserver.IDevIDRequest{
		PublicKey: factoryKey.Public(), RawSubject: []byte{0x30, 0}, SAN: &pkix.Extension{Critical: true, Value: san.Value},
	})
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	client := mustDial(t, server, credential{cert, factoryKey})
	caCerts, err := client.CACerts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	explicit, err := est.NewTrustAnchors(caCerts)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := client.SimpleEnroll(t.Context(), newCSR(t, key, named("dev")))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := explicit.VerifyIssued(answer, key.Public(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if len(answer) != 1 || len(chain) != 2 {
		t.Errorf("answered %d certificates for a chain of %d, want 1 and 2", len(answer), len(chain))
	}
	// The client sends its leaf alone: the server knows its own intermediate CA.
	renewed, err := mustDial(t, server, credential{chain[0], key}).SimpleReenroll(t.Context(), newCSR(t, key, named("dev")))
	if err != nil {
		t.Fatal(err)
	}
	if renewed[0].Equal(chain[0]) || len(server.Issuances()) != 2 {
		t.Errorf("renewed: %v, issued %d", renewed[0].SerialNumber, len(server.Issuances()))
	}
}

// An enrolment that takes far longer than the client's first retransmission is
// answered by a separate response, and issues once.
func TestDelayedEnrollment(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{Faults: testserver.Faults{Delay: 500 * time.Millisecond}, ProcessingDelay: 20 * time.Millisecond})
	device := idevid(t, server, "dev")
	client := mustDial(t, server, device)
	if _, err := client.SimpleEnroll(t.Context(), newCSR(t, device.key, named("dev"))); err != nil {
		t.Fatal(err)
	}
	if got := len(server.Events()); got != 2 { // the IDevID, the issuance, no replay
		t.Errorf("%d events, want 2: %v", got, server.Events())
	}
}

func TestDeferredEnrollment(t *testing.T) {
	t.Parallel()
	server := start(t, testserver.Config{Faults: testserver.Faults{Defer: 1, DeferMaxAge: new(time.Duration(0))}})
	device := idevid(t, server, "dev")
	client := mustDial(t, server, device)
	request := newCSR(t, device.key, named("dev"))
	var pending *est.PendingError
	if _, err := client.SimpleEnroll(t.Context(), request); !errors.As(err, &pending) || pending.RetryAfter != 0 {
		t.Errorf("got %v, want a pending answer to repeat at once", err)
	}
	if _, err := client.SimpleEnroll(t.Context(), request); err != nil {
		t.Error(err)
	}
}

func TestHandshakeRefusals(t *testing.T) {
	t.Parallel()
	var offset atomic.Int64 // of the server's clock
	server := start(t, testserver.Config{
		Lifetime: time.Minute,
		Now:      func() time.Time { return time.Now().Add(time.Duration(offset.Load())) },
	})
	stranger := start(t, testserver.Config{})
	factory := idevid(t, server, "dev")
	device := ldevid(t, server, factory, "dev")
	for _, test := range []struct {
		name    string
		faults  testserver.Faults
		offset  time.Duration
		client  credential
		refused bool
	}{
		{"IDevID", testserver.Faults{}, 0, factory, false},
		{"LDevID", testserver.Faults{}, 0, device, false},
		{"IDevID of another factory", testserver.Faults{}, 0, idevid(t, stranger, "dev"), true},
		{"LDevID that expired by the server's clock", testserver.Faults{}, 2 * time.Minute, device, true},
		{"LDevID not yet valid by the server's clock", testserver.Faults{}, -time.Hour, device, true},
		{"IDevID, server's clock behind", testserver.Faults{}, -time.Hour, factory, false},
		{"refuse-all", testserver.Faults{RefuseAll: true}, 0, factory, true},
		{"refuse-client=issued, LDevID", testserver.Faults{RefuseIssued: true}, 0, device, true},
		{"refuse-client=issued, IDevID", testserver.Faults{RefuseIssued: true}, 0, factory, false},
		{"refuse-client=issued with a code", testserver.Faults{RefuseIssued: true, RefuseCode: "4.03"}, 0, device, false},
		{"refuse-client=serial", testserver.Faults{RefuseClients: []string{device.cert.SerialNumber.Text(16)}}, 0, device, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := server.SetFaults(test.faults); err != nil {
				t.Fatal(err)
			}
			offset.Store(int64(test.offset))
			session, err := dial(t, server, test.client, time.Now)
			if test.refused {
				if !errors.Is(err, est.ErrCredentialRefused) {
					t.Errorf("got %v, want a refusal of the certificate", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_, err = (&est.Client{Session: session}).CACerts(t.Context())
			var status *est.StatusError
			switch code := test.faults.RefuseCode; {
			case code == "" && err != nil:
				t.Error(err)
			case code != "" && !(errors.As(err, &status) && strings.HasPrefix(status.Code, code)):
				t.Errorf("got %v, want code %s", err, code)
			}
		})
	}
}
