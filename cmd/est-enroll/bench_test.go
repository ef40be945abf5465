package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
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
	"estenroll/est/https"
	"estenroll/internal/coap/coaptest"
	"estenroll/testserver/globalsigntest"
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
	b.countHTTPS(t, f)
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
	matrix       *matrix
	coaps, https string // the server's doors
	copies       int
	factory      string // file of the CA that is sent after the IDevID
	idevid       string // file of the IDevID and that CA
	estclient    string // the program of globalsign/est
}

func newBench(t *testing.T) *bench {
	m := newMatrix(t, "--listen-https", "127.0.0.1:0")
	b := &bench{matrix: m, coaps: m.server.coaps, https: m.server.uri, factory: filepath.Join(m.server.work, "ca", "factory-ca.pem")}
	b.prepareEstclient(t)
	return b
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
	proxy := coaptest.NewProxy(t, strings.TrimPrefix(b.coaps, "coaps://"), coaptest.Faults{Hook: trafficHook(traffic, closed)})
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
		b.program(t, d, io.Discard, nil, append([]string{"time", "-f", "%M", "-o", out, b.binary()}, b.arguments(d, b.matrix.token.ModulePath, b.coaps)...)...)
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
// in this process, and in one of their own that is as cold as the program; and the
// program over HTTPS beside estclient. They go in turns: a machine that changes its
// pace meanwhile changes it for all.
func (b *bench) time(t *testing.T, f *figures) {
	t.Helper()
	kinds := []struct {
		timing *timing
		run    func(*testing.T) []lap
		all    [][]lap
	}{
		{timing: &f.Parts, run: b.timeParts}, {timing: &f.InProcess, run: b.timeInProcess},
		{timing: &f.ColdParts, run: b.timeColdParts}, {timing: &f.Program, run: func(t *testing.T) []lap { return b.timeProgram(t, b.coaps) }},
		{timing: &f.HTTPS, run: func(t *testing.T) []lap { return b.timeProgram(t, b.https) }}, {timing: &f.Estclient, run: b.timeEstclient},
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
		Module: token.ModulePath, Label: token.Label, PINFile: token.PINFile, Server: b.coaps,
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
	cmd.Env = []string{softHSMConf(d), "GORACE=" + withoutSleep}
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
	if code := run(t.Context(), b.arguments(d, b.matrix.token.ModulePath, b.coaps), io.Discard, w); code != exitDone {
		t.Fatalf("exit code %d", code)
	}
	w.lap("end")
	return w.laps
}

func (b *bench) timeProgram(t *testing.T, server string) []lap {
	t.Helper()
	d := b.device(t)
	command := append([]string{b.binary()}, b.arguments(d, b.matrix.token.ModulePath, server)...)
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

// serve measures the test server, and estserver of globalsign/est under the same
// load: whole sessions with fresh handshakes, of clients with keys in memory that
// run on the same machine. Neither puts a record on the disk.
func (b *bench) serve(t *testing.T, f *figures) {
	t.Helper()
	ours := &session{token: b.matrix.server.token, bin: b.matrix.bin, work: t.TempDir()}
	ours.config = filepath.Join(ours.work, "unused.yaml")
	if err := ours.startServer([]string{"--listen-https", "127.0.0.1:0", "--record", ""}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := ours.stopServer(); err != nil {
			t.Error(err)
		}
	}()
	anchors, factory := filepath.Join(ours.work, "ca", "ca.pem"), filepath.Join(ours.work, "ca", "factory-ca.pem")
	program, err := estserver()
	if err != nil {
		t.Fatal(err)
	}
	other, err := globalsigntest.Start(program, t.TempDir(), factory)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := other.Close(); err != nil {
			t.Error(err)
		}
	}()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	idevid, err := ours.signIDevID(public)
	if err != nil {
		t.Fatal(err)
	}
	chain := [][]byte{idevid, b.certificates(t, factory)[0].Raw}
	doors := []struct {
		perSecond *float64
		dial      func(context.Context) (est.Session, error)
		rates     []float64
	}{
		{perSecond: &f.ServerPerSecond, dial: b.dialer(t, ours.coaps, anchors, key, chain)},
		{perSecond: &f.HTTPSServerPerSecond, dial: b.dialer(t, ours.uri, anchors, key, chain)},
		{perSecond: &f.EstserverPerSecond, dial: b.dialer(t, other.URI, other.RootFile, key, chain)},
	}
	for range min(*benchCount, 5) {
		for _, i := range mathrand.Perm(len(doors)) {
			doors[i].rates = append(doors[i].rates, load(t, doors[i].dial))
		}
	}
	for _, door := range doors {
		*door.perSecond = median(door.rates)
	}
}

// dialer opens sessions with a server, over what its URI says.
func (b *bench) dialer(t *testing.T, uri, anchors string, key crypto.Signer, chain [][]byte) func(context.Context) (est.Session, error) {
	t.Helper()
	server, err := est.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := est.NewTrustAnchors(b.certificates(t, anchors))
	if err != nil {
		t.Fatal(err)
	}
	if server.Scheme == est.SchemeHTTPS {
		return func(ctx context.Context) (est.Session, error) {
			return https.Dial(ctx, https.Config{URI: server, Key: key, Certificate: chain, Trust: trust})
		}
	}
	return func(ctx context.Context) (est.Session, error) {
		return coaps.Dial(ctx, coaps.Config{URI: server, Key: key, Certificate: chain, Trust: trust})
	}
}

// load has a few clients enrol as fast as they can, and returns how many are done in
// a second.
func load(t *testing.T, dial func(context.Context) (est.Session, error)) float64 {
	t.Helper()
	const workers = 8
	enrolments := make(chan int)
	var clients sync.WaitGroup
	began := time.Now()
	for range workers {
		clients.Go(func() {
			for range enrolments {
				if err := enrolInMemory(t.Context(), dial); err != nil {
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
	return float64(total) / time.Since(began).Seconds()
}

func enrolInMemory(ctx context.Context, dial func(context.Context) (est.Session, error)) error {
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
	session, err := dial(ctx)
	if err != nil {
		return err
	}
	client := est.Client{Session: session}
	if _, err := client.CACerts(ctx); err != nil {
		return errors.Join(err, session.Close())
	}
	_, err = client.SimpleEnroll(ctx, request)
	return errors.Join(err, session.Close())
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
