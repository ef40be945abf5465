package estenroll_test

import (
	"context"
	"crypto/x509"
	"flag"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/engine/pkcs11"
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/internal/coap/coaptest"
	"estenroll/testserver"
)

var (
	lossCount = flag.Int("loss.n", 12, "enrolments through the lossy link")
	lossSeed  = flag.Uint64("loss.seed", 1, "seed of the lossy link's faults")
	lossBlock = flag.Int("loss.block", 512, "block size in bytes")
)

// TestLoss enrols devices through a link with 10 % loss, 10 % duplication and
// reordering in each direction. Each ends with its certificate, and the server,
// by its own record, has issued exactly one for each.
func TestLoss(t *testing.T) {
	token := softhsm.New(t)
	token.Use(t)
	// The timeouts are short because the link is a loopback: what is shown is
	// the number of certificates, not the time.
	server, err := testserver.New(testserver.Config{AckTimeout: 200 * time.Millisecond, FlightInterval: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	subject, err := csr.ParseSubject("serialNumber=4711,O=Loss")
	if err != nil {
		t.Fatal(err)
	}
	err = token.StoreIDevID(func(publicKey []byte) ([]byte, error) {
		key, err := x509.ParsePKIXPublicKey(publicKey)
		if err != nil {
			return nil, err
		}
		cert, err := server.IssueIDevID(testserver.IDevIDRequest{PublicKey: key, RawSubject: subject})
		if err != nil {
			return nil, err
		}
		return cert.Raw, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	proxy := coaptest.NewProxy(t, server.Addr().String(), coaptest.Faults{Seed: *lossSeed, Loss: 0.1, Duplicate: 0.1, Reorder: 0.1})
	farm := newLossFarm(t, token, server, proxy)

	var (
		mu       sync.Mutex
		enrolled int
		workers  sync.WaitGroup
	)
	devices := make(chan int)
	for range 8 {
		workers.Go(func() {
			for i := range devices {
				err := farm.enroll(t.Context(), i)
				mu.Lock()
				if err == nil {
					enrolled++
				} else {
					t.Errorf("device %d: %v", i, err)
				}
				mu.Unlock()
			}
		})
	}
	for i := range *lossCount {
		devices <- i
	}
	close(devices)
	workers.Wait()

	issued := map[string]int{}
	for _, event := range server.Issuances() {
		issued[event.Subject]++
	}
	double := 0
	for _, n := range issued {
		double += n - 1
	}
	fmt.Printf("enrolled %d/%d, issued %d, double %d (seed %d, %d-byte blocks, %+v)\n",
		enrolled, *lossCount, len(server.Issuances()), double, *lossSeed, *lossBlock, proxy.Counters())
	if enrolled != *lossCount || len(server.Issuances()) != *lossCount || double != 0 {
		t.Errorf("want %d enrolled and issued, none twice: seed %d", *lossCount, *lossSeed)
	}
	if counters := proxy.Counters(); counters.Lost == 0 || counters.Duplicated == 0 || counters.Delayed == 0 {
		t.Errorf("the link did no harm: %+v", counters)
	}
}

// lossFarm is many devices that share a token, to spare the making of many.
type lossFarm struct {
	engine engine.Engine
	dir    string
	trust  *est.TrustAnchors
	uri    coaps.URI
	parse  func(string) (engine.Address, error)
	idevid estenroll.IDevID
}

func newLossFarm(t *testing.T, token *softhsm.Token, server *testserver.Server, proxy *coaptest.Proxy) *lossFarm {
	t.Helper()
	f := &lossFarm{dir: t.TempDir(), parse: engine.Drivers{"pkcs11": pkcs11.Driver}.Parse}
	address := func(s string) engine.Address {
		at, err := f.parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	f.idevid = estenroll.IDevID{Key: address("pkcs11:object=idevid;type=private"), Certificate: address("pkcs11:object=idevid;type=cert")}
	var err error
	if f.engine, err = pkcs11.Driver.Open(t.Context(), address(token.URI()), engine.Options{LockDir: filepath.Join(f.dir, "locks")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.engine.Close(); err != nil {
			t.Error(err)
		}
	})
	if f.trust, err = est.NewTrustAnchors([]*x509.Certificate{server.Root()}); err != nil {
		t.Fatal(err)
	}
	if f.uri, err = coaps.ParseURI("coaps://" + proxy.Addr()); err != nil {
		t.Fatal(err)
	}
	return f
}

// shared is an engine that outlives the devices that use it.
type shared struct {
	engine.Engine
	engine.CertificateStore
	engine.KeyRecoverer
}

func (shared) Close() error { return nil }

func (f *lossFarm) enroll(ctx context.Context, i int) error {
	name := fmt.Sprintf("device-%d", i)
	subject, err := csr.ParseSubject("CN=" + name)
	if err != nil {
		return err
	}
	device, err := estenroll.Open(ctx, estenroll.Config{
		StateDir: filepath.Join(f.dir, name),
		OpenEngine: func(context.Context, engine.PINSource) (engine.Engine, error) {
			return shared{f.engine, f.engine.(engine.CertificateStore), f.engine.(engine.KeyRecoverer)}, nil
		},
		ParseAddress: f.parse,
		Credentials: []estenroll.CredentialConfig{{
			Name: name, IDevID: f.idevid, ServerURI: f.uri.String(), ServerName: f.uri.Host, ImplicitTA: f.trust,
			Dial: func(ctx context.Context, with estenroll.Connection) (est.Session, error) {
				return coaps.Dial(ctx, coaps.Config{
					URI: f.uri, Certificate: with.Certificate, Key: with.Key, Trust: with.Trust, Now: with.Now, BlockSize: *lossBlock,
					AckTimeout: 200 * time.Millisecond, FlightInterval: 200 * time.Millisecond, HandshakeTimeout: 20 * time.Second,
				})
			},
			Request: csr.Template{RawSubject: subject}, Tries: 6, RetryInterval: 10 * time.Millisecond,
		}},
	})
	if err != nil {
		return err
	}
	defer device.Close() // the engine is not its own
	result, err := device.Credential(name).Enroll(ctx)
	if err == nil && !strings.Contains(result.Certificate.Subject.String(), name) {
		err = fmt.Errorf("got the certificate of %s", result.Certificate.Subject)
	}
	return err
}
