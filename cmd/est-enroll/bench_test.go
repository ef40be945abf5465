package main

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/engine/enginetest/p11crash"
	"estenroll/est"
	"estenroll/est/coaps"
	"estenroll/internal/coap/coaptest"
)

var (
	benchCount   = flag.Int("bench.n", 1, "repetitions of what is timed")
	benchObjects = flag.Int("bench.objects", 10, "objects of the largest token that is searched: 10, 1000 or 10000")
	benchWrite   = flag.Bool("bench.write", false, "write the figures to testdata/figures.json and to README.md")
)

// TestBench measures what an enrolment costs beside what it cannot do without,
// and prints it (make bench). What can be counted is held to its target here; what
// is timed is printed and never fails: in "make test" everything runs once.
func TestBench(t *testing.T) {
	b := newBench(t)
	f := &figures{Machine: thisMachine(t, b.matrix.token.ModulePath), Repetitions: *benchCount}
	b.count(t, f)
	b.time(t, f)
	b.find(t, f)
	b.serve(t, f)
	fmt.Print(f.report())
	for _, counted := range f.list() {
		if counted.counted && !counted.met {
			t.Errorf("%s: %s, want %s", counted.name, counted.measured, counted.beside)
		}
	}
	if *benchWrite {
		f.write(t)
	}
}

// bench is the crash matrix's programs, server and token, from a copy of which
// each enrolment begins.
type bench struct {
	matrix  *matrix
	copies  int
	factory string // file of the CA that is sent after the IDevID
}

func newBench(t *testing.T) *bench {
	m := newMatrix(t)
	return &bench{matrix: m, factory: filepath.Join(m.server.work, "ca", "factory-ca.pem")}
}

// device copies the factory's. What it or an earlier run has written is put on the
// disk now: the fsyncs of the next run would wait for it.
func (b *bench) device(t *testing.T) *crashDevice {
	b.copies++
	d := b.matrix.device(t, fmt.Sprintf("bench-%d", b.copies))
	syscall.Sync()
	return d
}

// arguments make est-enroll enrol a device, with chains of two certificates on
// both sides and blocks of 512 bytes.
func (b *bench) arguments(d *crashDevice, module, server string) []string {
	token := b.matrix.token
	return []string{
		"enroll", "-v", "--block-size", "512", "--idevid-chain", b.factory,
		"--state-dir", filepath.Join(d.dir, "state"), "--lock-dir", filepath.Join(d.dir, "locks"),
		"--engine", "pkcs11:token=" + token.Label + "?module-path=" + module + "&pin-source=file:" + token.PINFile,
		"--server", server, "--trust-anchors", b.anchorsFile(), "--subject", d.subject,
	}
}

func softHSMConf(d *crashDevice) string {
	return "SOFTHSM2_CONF=" + filepath.Join(d.dir, "softhsm2.conf")
}

// program runs the shipped program, after another that it is an argument of.
func (b *bench) program(t *testing.T, d *crashDevice, stderr io.Writer, env []string, command ...string) {
	t.Helper()
	var said bytes.Buffer
	cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
	cmd.Env = append(env, softHSMConf(d))
	cmd.Stderr = io.MultiWriter(&said, stderr)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", command[0], err, &said)
	}
}

func (b *bench) binary() string { return filepath.Join(b.matrix.bin, "est-enroll") }

// count counts what the shipped program does, with the eyes of others: calls by
// the module that stands in between, datagrams by a proxy, memory by GNU time.
func (b *bench) count(t *testing.T, f *figures) {
	t.Helper()
	const sessions = 2 // the request's and the proof's
	traffic, closed := map[string]count{}, make(chan struct{}, sessions)
	proxy := coaptest.NewProxy(t, strings.TrimPrefix(b.matrix.server.uri, "coaps://"), coaptest.Faults{Hook: trafficHook(traffic, closed)})
	d := b.device(t)
	log := filepath.Join(d.dir, "calls")
	b.program(t, d, io.Discard, b.matrix.module.Env(b.matrix.token.ModulePath, log, p11crash.Point{}),
		append([]string{b.binary()}, b.arguments(d, b.matrix.module.Path, "coaps://"+proxy.Addr())...)...)
	for range sessions { // whose last datagrams may come after the program's end
		select {
		case <-closed:
		case <-time.After(10 * time.Second):
			t.Fatal("the server does not close a session that the program has closed")
		}
	}
	f.Traffic, f.Calls = traffic, map[string]int{}
	for _, point := range p11crash.ReadLog(t, log) {
		if point.When == p11crash.Before {
			f.Calls[point.Function]++
		}
	}

	var memory []int
	for range *benchCount {
		d := b.device(t)
		out := filepath.Join(d.dir, "memory")
		// Not our own wait for the program: what the kernel says of a child includes
		// what its parent held when it was forked.
		b.program(t, d, io.Discard, nil, append([]string{"time", "-f", "%M", "-o", out, b.binary()}, b.arguments(d, b.matrix.token.ModulePath, b.matrix.server.uri)...)...)
		kib, err := strconv.Atoi(strings.TrimSpace(read(t, out)))
		if err != nil {
			t.Fatal(err)
		}
		memory = append(memory, kib)
	}
	f.PeakMemoryKiB = median(memory)

	stripped := filepath.Join(t.TempDir(), "stripped")
	if out, err := exec.CommandContext(t.Context(), "strip", "-o", stripped, b.binary()).CombinedOutput(); err != nil {
		t.Fatalf("strip: %v\n%s", err, out)
	}
	info, err := os.Stat(stripped)
	if err != nil {
		t.Fatal(err)
	}
	f.StrippedBytes = info.Size()
}

// trafficHook sorts the datagrams of an enrolment. The first client is the
// session of the request, the second the proof; records of DTLS tell the rest (RFC 6347
// §4.1), that a request with a body is long tells sen from crts, and that its name
// is shorter tells att. What the server
// says last in a session, which closes it, is told to closed.
func trafficHook(traffic map[string]count, closed chan<- struct{}) func(coaptest.Datagram) coaptest.Action {
	const (
		alert, applicationData = 21, 23
		longestGET             = 120
	)
	exchange, first := "crts", 0
	return func(d coaptest.Datagram) coaptest.Action {
		phase := "handshake"
		switch d.Payload[0] {
		case alert:
			phase = "close"
		case applicationData:
			if d.Client == 0 && d.Direction == coaptest.ToServer {
				first = cmp.Or(first, len(d.Payload))
				switch {
				case len(d.Payload) > longestGET:
					exchange = "sen"
				case len(d.Payload) < first:
					exchange = "att"
				}
			}
			phase = exchange
		}
		if d.Client > 0 {
			phase = "proof"
		}
		traffic[phase] = traffic[phase].plus(count{1, len(d.Payload)})
		if d.Payload[0] == alert && d.Direction == coaptest.ToClient {
			select {
			case closed <- struct{}{}:
			default: // nobody waits for more
			}
		}
		return coaptest.Pass
	}
}

// time times the whole in this process and as the program, each beside its parts:
// in this process, and in one of their own that is as cold as the program. They go
// in turns: a machine that changes its pace meanwhile changes it for all.
func (b *bench) time(t *testing.T, f *figures) {
	t.Helper()
	kinds := []struct {
		timing *timing
		run    func(*testing.T) []lap
		all    [][]lap
	}{
		{timing: &f.Parts, run: b.timeParts}, {timing: &f.InProcess, run: b.timeInProcess},
		{timing: &f.ColdParts, run: b.timeColdParts}, {timing: &f.Program, run: b.timeProgram},
	}
	for range *benchCount {
		// In an order that changes: each leaves the machine in a state for the next.
		for _, i := range mathrand.Perm(len(kinds)) {
			kinds[i].all = append(kinds[i].all, kinds[i].run(t))
		}
	}
	for _, kind := range kinds {
		*kind.timing = medians(t, kind.all)
	}
}

func (b *bench) bareEnrolment(d *crashDevice) *bareEnrolment {
	token := b.matrix.token
	return &bareEnrolment{
		Module: token.ModulePath, Label: token.Label, PINFile: token.PINFile, Server: b.matrix.server.uri,
		Anchors: b.anchorsFile(), Factory: b.factory, Dir: filepath.Join(d.dir, "state"), Subject: d.subject,
	}
}

func (b *bench) timeParts(t *testing.T) []lap {
	t.Helper()
	d := b.device(t)
	t.Setenv("SOFTHSM2_CONF", filepath.Join(d.dir, "softhsm2.conf"))
	laps, err := b.bareEnrolment(d).run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return laps
}

// timeColdParts times the parts in a process that does nothing else, and, for its
// start and end are those of a test, the start and end of the program.
func (b *bench) timeColdParts(t *testing.T) []lap {
	t.Helper()
	d := b.device(t)
	argument, err := json.Marshal(b.bareEnrolment(d))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bare-enrolment", string(argument))
	cmd.Env = []string{softHSMConf(d)}
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("bare-enrolment: %v\n%s", err, &said)
	}
	var laps []lap
	if err := json.Unmarshal(out, &laps); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := exec.CommandContext(t.Context(), b.binary(), "--version").Run(); err != nil {
		t.Fatal(err)
	}
	return append(laps, lap{"start and end a process", "end", milliseconds(time.Since(began))})
}

func (b *bench) certificates(t *testing.T, file string) []*x509.Certificate {
	t.Helper()
	certs, err := estenroll.ParseTrustAnchors([]byte(read(t, file)))
	if err != nil {
		t.Fatal(err)
	}
	return certs
}

func (b *bench) anchorsFile() string { return filepath.Join(b.matrix.server.work, "ca", "ca.pem") }

// stopwatch takes a lap at each line of est-enroll -v that ends a step.
type stopwatch struct {
	last time.Time
	laps []lap
}

func (w *stopwatch) Write(text []byte) (int, error) {
	for line := range strings.Lines(string(text)) {
		if words := strings.Fields(line); len(words) > 1 && words[1] != "warning:" {
			w.lap(words[1])
		}
	}
	return len(text), nil
}

func (w *stopwatch) lap(step string) {
	now := time.Now()
	w.laps = append(w.laps, lap{step, step, milliseconds(now.Sub(w.last))})
	w.last = now
}

func (b *bench) timeInProcess(t *testing.T) []lap {
	t.Helper()
	d := b.device(t)
	t.Setenv("SOFTHSM2_CONF", filepath.Join(d.dir, "softhsm2.conf"))
	w := &stopwatch{last: time.Now()}
	if code := run(t.Context(), b.arguments(d, b.matrix.token.ModulePath, b.matrix.server.uri), io.Discard, w); code != exitDone {
		t.Fatalf("exit code %d", code)
	}
	w.lap("end")
	return w.laps
}

func (b *bench) timeProgram(t *testing.T) []lap {
	t.Helper()
	d := b.device(t)
	command := append([]string{b.binary()}, b.arguments(d, b.matrix.token.ModulePath, b.matrix.server.uri)...)
	w := &stopwatch{last: time.Now()}
	b.program(t, d, w, nil, command...)
	w.lap("end")
	return w.laps
}

// find times the search for a certificate by its id in tokens of many objects,
// beside the module's own part of it: the same search and the reading of its value.
func (b *bench) find(t *testing.T, f *figures) {
	t.Helper()
	for _, objects := range []int{10, 1000, 10000} {
		if objects <= *benchObjects {
			f.Find = append(f.Find, b.findAmong(t, objects))
		}
	}
}

func (b *bench) findAmong(t *testing.T, objects int) find {
	t.Helper()
	token, last := manyObjects(t, b.certificates(t, b.factory)[0], objects)
	token.Use(t)
	at, err := drivers.Parse(token.URI())
	if err != nil {
		t.Fatal(err)
	}
	opened, err := drivers.Open(t.Context(), at, engine.Options{LockDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := opened.Close(); err != nil {
			t.Error(err)
		}
	}()
	raw, err := loadRaw(token.ModulePath)
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.open(token.Label); err != nil { // the module is initialised and logged in
		t.Fatal(err)
	}
	address, err := drivers.Parse("pkcs11:id=" + string(last) + ";type=cert")
	if err != nil {
		t.Fatal(err)
	}
	var ours, modules []float64
	for range max(*benchCount, 1) {
		began := time.Now()
		if _, err := opened.(engine.CertificateStore).Certificate(t.Context(), address); err != nil {
			t.Fatal(err)
		}
		between := time.Now()
		if err := raw.readCertificate(last); err != nil {
			t.Fatal(err)
		}
		ours, modules = append(ours, milliseconds(between.Sub(began))), append(modules, milliseconds(time.Since(between)))
	}
	return find{Objects: objects, Milliseconds: median(ours), ModuleMilliseconds: median(modules)}
}

// serve measures the test server: whole sessions with fresh handshakes, of
// clients with keys in memory that run on the same machine.
func (b *bench) serve(t *testing.T, f *figures) {
	t.Helper()
	const workers = 8
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	idevid, err := b.matrix.server.signIDevID(public)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := est.ParseURI(b.matrix.server.uri)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := est.NewTrustAnchors(b.certificates(t, b.anchorsFile()))
	if err != nil {
		t.Fatal(err)
	}
	cfg := coaps.Config{URI: uri, Key: key, Certificate: [][]byte{idevid, b.certificates(t, b.factory)[0].Raw}, Trust: trust}
	var rates []float64
	for range min(*benchCount, 5) {
		enrolments := make(chan int)
		var clients sync.WaitGroup
		began := time.Now()
		for range workers {
			clients.Go(func() {
				for range enrolments {
					if err := enrolInMemory(t, cfg); err != nil {
						t.Error(err)
					}
				}
			})
		}
		total := workers * min(*benchCount, 25)
		for i := range total {
			enrolments <- i
		}
		close(enrolments)
		clients.Wait()
		rates = append(rates, float64(total)/time.Since(began).Seconds())
	}
	f.ServerPerSecond = median(rates)
}

func enrolInMemory(t *testing.T, cfg coaps.Config) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	subject, err := csr.ParseSubject("CN=many")
	if err != nil {
		return err
	}
	request, err := csr.Build(nil, csr.Template{RawSubject: subject}, key)
	if err != nil {
		return err
	}
	session, err := coaps.Dial(t.Context(), cfg)
	if err != nil {
		return err
	}
	client := est.Client{Session: session}
	if _, err := client.CACerts(t.Context()); err != nil {
		return err
	}
	if _, err := client.SimpleEnroll(t.Context(), request); err != nil {
		return err
	}
	return session.Close()
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
