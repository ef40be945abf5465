package estenroll_test

import (
	"context"
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
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/internal/coap/coaptest"
	"estenroll/testserver"
)

var (
	lossCount = flag.Int("loss.n", 12, "enrolments with 512-byte blocks through the lossy link")
	lossSmall = flag.Int("loss.small", 2, "enrolments with 16- and with 64-byte blocks")
	lossSeed  = flag.Uint64("loss.seed", 1, "seed of the lossy link's faults")
)

// TestLoss enrols devices through a link with 10 % loss, 10 % duplication and
// reordering in each direction. Each ends with its certificate, and the server,
// by its own record, has issued exactly one for each. With small blocks an
// enrolment is a hundred exchanges and more: now and then one of them is given up,
// and the run begins it again with the same CSR.
func TestLoss(t *testing.T) {
	for _, link := range []struct{ block, devices int }{{512, *lossCount}, {64, *lossSmall}, {16, *lossSmall}} {
		t.Run(fmt.Sprintf("%d-byte blocks", link.block), func(t *testing.T) { testLoss(t, link.block, link.devices) })
	}
}

// The timeouts are short because the link is a loopback: what is shown is the
// number of certificates, not the time.
const (
	lossAckTimeout     = 100 * time.Millisecond
	lossFlightInterval = 200 * time.Millisecond
)

func testLoss(t *testing.T, block, devices int) {
	s := newSite(t, testserver.Config{AckTimeout: lossAckTimeout, FlightInterval: lossFlightInterval})
	proxy := coaptest.NewProxy(t, s.server.Addr().String(), coaptest.Faults{Seed: *lossSeed, Loss: 0.1, Duplicate: 0.1, Reorder: 0.1})
	uri, err := coaps.ParseURI("coaps://" + proxy.Addr())
	if err != nil {
		t.Fatal(err)
	}
	farm := &lossFarm{site: s, uri: uri, block: block, dir: t.TempDir()}

	var (
		mu              sync.Mutex
		enrolled, again int
		workers         sync.WaitGroup
	)
	numbers := make(chan int)
	for range 8 {
		workers.Go(func() {
			for i := range numbers {
				givenUp, err := farm.enroll(t.Context(), i)
				mu.Lock()
				again += givenUp
				if err == nil {
					enrolled++
				} else {
					t.Errorf("device %d: %v", i, err)
				}
				mu.Unlock()
			}
		})
	}
	for i := range devices {
		numbers <- i
	}
	close(numbers)
	workers.Wait()

	double, issued := 0, map[string]int{}
	csrs := map[string]string{}
	for _, event := range s.server.Events() {
		if event.Kind == testserver.EventIDevID {
			continue
		}
		if event.Kind == testserver.EventIssuance {
			if issued[event.Subject]++; issued[event.Subject] > 1 {
				double++
			}
		}
		if first, asked := csrs[event.Subject]; asked && first != event.CSR {
			t.Errorf("%s was repeated with another CSR", event.Subject)
		}
		csrs[event.Subject] = event.CSR
	}
	fmt.Printf("%3d-byte blocks: enrolled %d/%d, issued %d, double %d, exchanges begun again %d (seed %d, %+v)\n",
		block, enrolled, devices, len(s.server.Issuances()), double, again, *lossSeed, proxy.Counters())
	if enrolled != devices || len(s.server.Issuances()) != devices || double != 0 {
		t.Errorf("want %d enrolled and issued, none twice: seed %d", devices, *lossSeed)
	}
	if counters := proxy.Counters(); counters.Lost == 0 || counters.Duplicated == 0 || counters.Delayed == 0 {
		t.Errorf("the link did no harm: %+v", counters)
	}
}

// lossFarm is many devices that share a token, to spare the making of many.
type lossFarm struct {
	site  *site
	uri   coaps.URI // of the link
	block int       // size in bytes
	dir   string
}

// shared is an engine that outlives the devices that use it.
type shared struct {
	engine.Engine
	engine.CertificateStore
	engine.KeyRecoverer
}

func (shared) Close() error { return nil }

// enroll is a first boot, and tells how often an exchange of it had no answer and
// was begun again.
func (f *lossFarm) enroll(ctx context.Context, i int) (again int, err error) {
	name := fmt.Sprintf("device-%d", i)
	subject, err := csr.ParseSubject("CN=" + name)
	if err != nil {
		return 0, err
	}
	s := f.site
	device, err := estenroll.Open(ctx, estenroll.Config{
		StateDir: filepath.Join(f.dir, name),
		OpenEngine: func(context.Context, engine.PINSource) (engine.Engine, error) {
			return shared{s.engine, s.engine.(engine.CertificateStore), s.engine.(engine.KeyRecoverer)}, nil
		},
		ParseAddress: s.parse,
		Progress: func(e estenroll.Event) {
			if strings.HasPrefix(e.Message, "no answer") {
				again++
			}
		},
		Credentials: []estenroll.CredentialConfig{{
			Name: name, IDevID: s.idevid, ServerURI: f.uri.String(), ServerName: f.uri.Host, ImplicitTA: s.trust,
			Dial: func(ctx context.Context, with estenroll.Connection) (est.Session, error) {
				return coaps.Dial(ctx, coaps.Config{
					URI: f.uri, Certificate: with.Certificate, Key: with.Key, Trust: with.Trust, Provisional: with.Provisional, Now: with.Now, BlockSize: f.block,
					AckTimeout: lossAckTimeout, FlightInterval: lossFlightInterval, HandshakeTimeout: 20 * time.Second,
				})
			},
			Request: csr.Template{RawSubject: subject}, Tries: 6, RetryInterval: 10 * time.Millisecond,
		}},
	})
	if err != nil {
		return 0, err
	}
	defer device.Close() // the engine is not its own
	result, err := device.Credential(name).Enroll(ctx)
	if err == nil && !strings.Contains(result.Certificate.Subject.String(), name) {
		err = fmt.Errorf("got the certificate of %s", result.Certificate.Subject)
	}
	return again, err
}
