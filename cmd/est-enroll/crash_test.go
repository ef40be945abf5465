package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/p11crash"
	"estenroll/engine/enginetest/softhsm"
	"estenroll/internal/coap/coaptest"
	"estenroll/internal/durable/filecrash"
)

// A prime, so that the sample of "make test" is spread over both sides of all calls.
var (
	crashEvery = flag.Int("crash.every", 23, "test each n-th point of the crash matrix; 1 tests all")
	crashOnly  = flag.String("crash.story", "", "test only the story of this name: enroll, renew, rekey, rollover, server-key or reset")
	crashLimit = flag.Int("crash.module", 2, "test so many points inside the module's own writes, of each story")
	crashWrite = flag.Bool("crash.write", false, "write the figures of the stories to testdata/crash.json and to README.md")
)

var crashRekey = []string{"renew", "--force", "--rekey"}

// crashStories are what is killed. The rekey destroys the key before the previous one.
var crashStories = []crashStory{
	{name: "enroll", flow: "first boot", args: []string{"enroll"}, leaves: 1, keys: 1},
	{name: "renew", flow: "renewal", args: []string{"renew", "--force"}, leaves: 2, keys: 1, before: [][]string{{"enroll"}}},
	{name: "rekey", flow: "rekey", args: crashRekey, leaves: 2, keys: 2, before: [][]string{{"enroll"}, crashRekey}},
	{name: "rollover", flow: "renewal at a CA with a new root", args: []string{"renew", "--force"}, leaves: 2, keys: 1, before: [][]string{{"enroll"}}, rollover: true, anchors: 2},
	{name: "server-key", flow: "first boot with a key of the server", args: []string{"enroll", "--server-keygen"}, leaves: 1, keys: 1},
	// Once it is begun, the next run goes on with it, and an enrolment is a first
	// boot then; before that nothing is changed.
	{name: "reset", flow: "reset", args: []string{"reset", "--yes"}, before: [][]string{{"enroll"}, {"renew", "--force"}}, leaves: 1, keys: 1, offline: true, judged: (*crashDevice).resetAgain, covers: coversResets},
}

// TestCrash kills the program before and after each PKCS#11 call, each datagram and
// each operation on a file of the state directory, of each story, then runs it once
// more as a device would, and looks at what there is, with the eyes of
// others: pkcs11-tool and the server's record (DESIGN.md §8). The program is the one
// that ships.
func TestCrash(t *testing.T) {
	if *crashOnly != "" && !slices.ContainsFunc(crashStories, func(s crashStory) bool { return s.name == *crashOnly }) {
		t.Fatalf("there is no story %q", *crashOnly)
	}
	var total crashResult
	written := readCrashFigures(t)
	for _, story := range crashStories {
		if *crashOnly != "" && *crashOnly != story.name {
			continue
		}
		t.Run(story.name, func(t *testing.T) {
			flow := killStory(t, story)
			for i, result := range flow.Kinds {
				fmt.Printf("%s, %s: %s\n", flow.Name, promised[i].name, result)
				total.add(result)
			}
			fmt.Printf("%s, %s, not promised: %s, of %d\n", flow.Name, crashModule.name, flow.Module, flow.Module.Recorded)
			written.put(flow)
		})
	}
	fmt.Println(total)
	if *crashWrite && !t.Failed() {
		written.write(t)
	}
}

// killStory records a story and runs all its points, or those of the sample, on as
// many devices with servers of their own as tests may run at once.
func killStory(t *testing.T, story crashStory) crashFlow {
	workers, supervisor := runtime.GOMAXPROCS(0), filecrash.Build(t)
	devices := make([]*matrix, max(workers, 2))
	for i := range devices {
		devices[i] = newMatrix(t, "--server-keygen")
		devices[i].supervisor = supervisor
		devices[i].prepare(t, story)
	}
	var points []crashPoint
	flow := crashFlow{Name: story.flow, Kinds: make([]crashResult, len(promised))}
	for i, kind := range slices.Concat(promised, []crashKind{crashModule}) {
		recorded := recordPoints(t, story, kind, devices)
		every, result := *crashEvery, &flow.Module
		if i < len(promised) {
			result = &flow.Kinds[i]
		} else {
			every = max(1, len(recorded) / *crashLimit) | 1
		}
		result.Recorded = len(recorded)
		t.Logf("%s, %s: %d recorded", flow.Name, kind.name, len(recorded))
		for n := 0; n < len(recorded); n += every {
			points = append(points, crashPoint{kind, recorded[n], result})
		}
	}
	queue := make(chan crashPoint, len(points))
	for _, point := range points {
		queue <- point
	}
	close(queue)
	var mu sync.Mutex
	t.Run("killed", func(t *testing.T) {
		for i, m := range devices[:workers] {
			t.Run(strconv.Itoa(i), func(t *testing.T) {
				t.Parallel()
				for point := range queue {
					found := m.crash(t, story, point)
					mu.Lock()
					point.result.count(found)
					mu.Unlock()
				}
			})
		}
	})
	if story.covers != nil {
		story.covers(t, devices)
	}
	return flow
}

// crashPoint is a point of a kind, and where what becomes of it is counted.
type crashPoint struct {
	kind   crashKind
	at     p11crash.Point
	result *crashResult
}

// recordPoints runs the story uninterrupted, on two devices, and returns its points: the same
// on both, or a point could be recorded and not hit.
func recordPoints(t *testing.T, story crashStory, kind crashKind, devices []*matrix) []p11crash.Point {
	t.Helper()
	var recorded [2][]p11crash.Point
	for i := range recorded {
		d := devices[i].device(t, story.name+"-record")
		log := filepath.Join(d.dir, "points")
		if out, err := kind.run(t, d, log, p11crash.Point{}, append([]string{"-v"}, story.args...)...); err != nil {
			t.Fatalf("%s: %v\n%s", story.args, err, out)
		}
		if status, err := os.Stat(log); story.offline && err == nil && status.Size() == 0 {
			continue
		}
		recorded[i] = p11crash.ReadLog(t, log)
	}
	if diff := cmp.Diff(recorded[0], recorded[1]); diff != "" {
		t.Fatalf("%s: two runs passed other points: %s: %d and %d:\n%s", story.name, kind.name, len(recorded[0]), len(recorded[1]), diff)
	}
	return recorded[0]
}

// crash kills the story at a point, runs it once more and judges the end.
func (m *matrix) crash(t *testing.T, story crashStory, point crashPoint) *findings {
	wrong := new(findings)
	m.count++
	d := m.device(t, fmt.Sprintf("%s-%d", story.name, m.count))
	defer d.remove(t)
	d.issuedBefore = len(m.issuances(t))
	log := filepath.Join(d.dir, "points")
	killed, err := point.kind.run(t, d, log, point.at, append([]string{"-v"}, story.args...)...)
	if err := point.at.Hit(err, log); err != nil {
		t.Errorf("%s: %s: %v\n%s", story.name, point.kind.name, err, killed)
		wrong.add("not hit")
		return wrong
	}
	judged := story.judged
	if judged == nil {
		judged = (*crashDevice).again
	}
	out := judged(d, t, story, wrong)
	if strings.Contains(killed+out, markerPIN) || len(findMarker(filepath.Join(d.dir, "state"))) > 0 {
		t.Errorf("%s killed at %s: the PIN is in the output or in the state directory", story.name, point.at)
	}
	if len(wrong.text) == 0 {
		return wrong
	}
	if point.kind.name == crashModule.name && !strings.Contains(out, "goroutine ") { // a panic's
		t.Logf("%s killed at %s (%s): %s", story.name, point.at, point.kind.name, strings.Join(wrong.text, "; "))
		return wrong
	}
	t.Errorf("%s killed at %s (%s):\n%s\nthe killed run:\n%sthe next run:\n%s", story.name, point.at, point.kind.name, strings.Join(wrong.text, "\n"), killed, out)
	return wrong
}

// again runs the story once more, and judges a device that has a new certificate.
func (d *crashDevice) again(t *testing.T, story crashStory, wrong *findings) string {
	// A renewal that was complete when it was killed is followed by another one.
	want := 1
	if story.before != nil && d.complete(t) || d.lostKey(t) {
		want = 2
	}
	out, err := d.run(t, story.args...)
	if err != nil {
		wrong.fail("%s: %v", story.args, err)
		return out
	}
	issued := d.matrix.issuances(t)[d.issuedBefore:]
	d.judge(t, story, issued, wrong)
	if len(issued) != want {
		wrong.add("the server issued %d certificates, want %d", len(issued), want)
	}
	return out
}

// lostKey reports whether a key that the server had made was lost with the killed run,
// in part or as a whole.
func (d *crashDevice) lostKey(t *testing.T) bool {
	t.Helper()
	var op struct{ Step, Key string }
	journal, err := d.journal()
	if errors.Is(err, fs.ErrNotExist) || err == nil && journal.Operation == nil {
		return false
	}
	if err == nil {
		err = json.Unmarshal(journal.Operation, &op)
	}
	if err != nil {
		t.Fatal(err)
	}
	if op.Step != "import" {
		return false
	}
	objects, err := d.list(t)
	if err != nil {
		t.Fatal(err)
	}
	_, id := attributes(t, op.Key)
	halves := 0
	for _, object := range objects {
		if object.id == id {
			halves++
		}
	}
	return halves < 2
}

// resetAgain runs a reset once more, or a first boot after each second one that was begun.
func (d *crashDevice) resetAgain(t *testing.T, story crashStory, wrong *findings) string {
	args := story.args
	switch journal, err := d.journal(); {
	case errors.Is(err, fs.ErrNotExist):
		d.matrix.resets.finished++
	case err != nil:
		wrong.add("%v", err)
	case strings.Contains(string(journal.Operation), `"reset"`):
		if d.matrix.resets.begun++; d.matrix.resets.begun%2 == 0 {
			args = []string{"enroll"}
		}
	default:
		d.matrix.resets.untouched++
		if len(journal.Pairs) != len(readJournal(t, d.matrix.template).Pairs) {
			wrong.add("the journal names %d pairs and no reset", len(journal.Pairs))
		}
	}
	out, err := d.run(t, args...)
	switch {
	case err != nil:
		wrong.fail("%s: %v", args, err)
	case args[0] == "enroll":
		d.judge(t, story, d.matrix.issuances(t)[d.issuedBefore:], wrong)
	default:
		d.judgeFactory(t, wrong)
	}
	return out
}

// coversResets wants kills before a reset was begun and in it, each way on from there.
func coversResets(t *testing.T, devices []*matrix) {
	untouched, begun, on := 0, 0, 0
	for _, m := range devices {
		untouched, begun, on = untouched+m.resets.untouched, begun+m.resets.begun, on+m.resets.begun/2
	}
	if untouched == 0 || on == 0 || on == begun {
		t.Errorf("of the kills %d are before a reset was begun, %d in it, %d of which an enrolment followed", untouched, begun, on)
	}
}

// judgeFactory wants of the token and the state directory what the factory left.
func (d *crashDevice) judgeFactory(t *testing.T, wrong *findings) {
	t.Helper()
	objects, err := d.list(t)
	if err != nil {
		wrong.add("%v", err)
	}
	for _, object := range objects {
		if object.label != opensc.IDevIDLabel {
			wrong.orphan("in the token: %v", object)
		}
	}
	entries, err := os.ReadDir(filepath.Join(d.dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if name := entry.Name(); name != "lock" && name != "security.json" {
			wrong.orphan("in the state directory: %s", name)
		}
	}
	security, err := os.ReadFile(filepath.Join(d.dir, "state", "security.json"))
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(security, []byte("object="+opensc.IDevIDLabel)); n != 2 || bytes.Count(security, []byte("object=")) != 2 {
		wrong.add("the Security object is %s", security)
	}
}

// crashStory is a command that is killed, and what came before it.
type crashStory struct {
	name   string
	flow   string // its name for people
	args   []string
	before [][]string
	// rollover changes the root of the server's CA afterwards, and the HSM holds so
	// many trust anchors in the end.
	rollover bool
	anchors  int
	leaves   int // certificates of the device's keys, in the end
	keys     int // of the device, then
	// offline tells that no server is asked.
	offline bool
	// judged is the run after the kill, and the judgement. Default: again.
	judged func(*crashDevice, *testing.T, crashStory, *findings) string
	// covers holds what all points together met; nil for nothing.
	covers func(*testing.T, []*matrix)
}

// matrix is what one point after another needs: the programs, the interposing module
// and the supervisor, a server, and the directory that each device is copied from: with
// a token from the factory at first.
type matrix struct {
	bin        string
	module     p11crash.Module
	supervisor filecrash.Supervisor
	token      *softhsm.Token
	server     *session
	env        []string // of the devices, as a part of their configuration
	template   string
	dir        string
	count      int
	resets     struct{ untouched, begun, finished int } // where the kills of a reset fell
}

// newMatrix starts the server with further arguments.
func newMatrix(t *testing.T, args ...string) *matrix {
	t.Helper()
	m := &matrix{bin: builtPrograms(t), module: p11crash.Build(t), token: softhsm.New(t, softhsm.WithPIN(markerPIN))}
	m.server = &session{token: &m.token.Token, bin: m.bin, work: t.TempDir(), factory: true}
	m.server.config = filepath.Join(m.server.work, "unused.yaml")
	// Separate responses, and repetitions of what was lost, would be other datagrams.
	if err := m.server.startServer(append(args, "--ack-timeout", "60s")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.server.stopServer(); err != nil {
			t.Error(err)
		}
	})
	m.fromFactory(t)
	return m
}

// fromFactory makes a device with the token, as it is, the template.
func (m *matrix) fromFactory(t *testing.T) {
	t.Helper()
	m.dir = t.TempDir()
	m.template = filepath.Join(m.dir, "factory")
	if err := os.CopyFS(filepath.Join(m.template, "tokens"), os.DirFS(m.token.Dir)); err != nil {
		t.Fatal(err)
	}
}

// prepare makes the story's device of what comes before it the template.
func (m *matrix) prepare(t *testing.T, story crashStory) {
	t.Helper()
	if story.rollover {
		// Measured: crts is 2555 to 2562 bytes then, by the signatures' lengths, and would
		// take five blocks of 512 or six.
		m.env = []string{"EST_ENROLL_ANCHOR_ADDRESS=pkcs11:object=est-ta-{fingerprint}", "EST_ENROLL_BLOCK_SIZE=1024"}
	}
	d := m.device(t, story.name+"-template")
	for _, args := range story.before {
		if out, err := d.run(t, args...); err != nil {
			t.Fatalf("%s: %v\n%s", args, err, out)
		}
	}
	m.template = d.dir
	if story.rollover {
		change := exec.CommandContext(t.Context(), filepath.Join(m.bin, "est-testserver"), "rollover", "--control", filepath.Join(m.server.work, "ca", "control"), "switched")
		if out, err := combined(change); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
}

// crashDevice is one copy of the token with a state directory of its own.
type crashDevice struct {
	matrix       *matrix
	dir          string
	subject      string
	issuedBefore int             // by the server, to whomever
	proxy        *coaptest.Proxy // to the server; nil for none
}

// device makes a copy of the template.
func (m *matrix) device(t *testing.T, name string) *crashDevice {
	t.Helper()
	d := &crashDevice{matrix: m, dir: filepath.Join(m.dir, name), subject: "CN=" + name}
	d.remove(t)
	if err := os.CopyFS(d.dir, os.DirFS(m.template)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(d.dir, "state"), 0o700); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	conf := "directories.tokendir = " + d.dir + "/tokens\nobjectstore.backend = file\nlog.level = ERROR\n"
	if err := os.WriteFile(filepath.Join(d.dir, "softhsm2.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *crashDevice) remove(t *testing.T) {
	t.Helper()
	if d.proxy != nil {
		d.proxy.Close()
	}
	if err := os.RemoveAll(d.dir); err != nil {
		t.Error(err)
	}
}

// command is the program with the module that its configuration names; what is in
// env goes before the configuration.
func (d *crashDevice) command(t *testing.T, module string, env []string, args ...string) *exec.Cmd {
	t.Helper()
	token := d.matrix.token
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // of the 0.2 s that it takes
	t.Cleanup(cancel)
	server := d.matrix.server.uri
	if d.proxy != nil {
		server = "coaps://" + d.proxy.Addr()
	}
	cmd := exec.CommandContext(ctx, filepath.Join(d.matrix.bin, "est-enroll"), args...)
	cmd.Env = slices.Concat([]string{
		"SOFTHSM2_CONF=" + filepath.Join(d.dir, "softhsm2.conf"),
		"EST_ENROLL_STATE_DIR=" + filepath.Join(d.dir, "state"),
		"EST_ENROLL_LOCK_DIR=" + filepath.Join(d.dir, "locks"),
		"EST_ENROLL_ENGINE=pkcs11:token=" + token.Label + "?module-path=" + module + "&pin-source=file:" + token.PINFile,
		"EST_ENROLL_SERVER=" + server,
		"EST_ENROLL_TRUST_ANCHORS=" + filepath.Join(d.matrix.server.work, "ca", "ca.pem"),
		"EST_ENROLL_SUBJECT=" + d.subject,
	}, d.matrix.env, env)
	return cmd
}

// run runs the program as a device would.
func (d *crashDevice) run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return combined(d.command(t, d.matrix.token.ModulePath, nil, append([]string{"-v"}, args...)...))
}

// crashRecord is what the judge reads of a journal: of its one credential.
type crashRecord struct {
	Pairs []struct {
		Key          string
		Certificates []string
		ExplicitTA   string `json:"explicit_ta"`
		Anchors      []struct{ Address string }
	}
	Operation   json.RawMessage
	LastAttempt struct{ Time string } `json:"last_attempt"`
}

func readJournal(t *testing.T, dir string) crashRecord {
	t.Helper()
	journal, err := (&crashDevice{dir: dir}).journal()
	if err != nil {
		t.Fatal(err)
	}
	return journal
}

func (d *crashDevice) journal() (crashRecord, error) {
	data, err := os.ReadFile(filepath.Join(d.dir, "state", "journal.json"))
	if err != nil {
		return crashRecord{}, err
	}
	var journal struct{ Credentials map[string]crashRecord }
	err = json.Unmarshal(data, &journal)
	return journal.Credentials["device"], err
}

// complete reports whether the killed run had recorded its success.
func (d *crashDevice) complete(t *testing.T) bool {
	t.Helper()
	now := readJournal(t, d.dir)
	return now.Operation == nil && now.Pairs[0].Certificates[0] != readJournal(t, d.matrix.template).Pairs[0].Certificates[0]
}

// issuance is a line of the server's record.
type issuance struct {
	Kind        string
	Subject     string
	Certificate string `json:"certificate_sha256"`
}

func (m *matrix) issuances(t *testing.T) []issuance {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(m.server.work, "ca", "record.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	var issued []issuance
	for line := range bytes.Lines(data) {
		var event issuance
		if err := json.Unmarshal(line, &event); err != nil {
			t.Fatal(err)
		}
		if event.Kind == "issuance" {
			issued = append(issued, event)
		}
	}
	return issued
}

// findings are what the judge holds against a state.
type findings struct {
	text    []string
	orphans int
	failed  bool // the run after the kill
}

func (f *findings) add(format string, args ...any) {
	f.text = append(f.text, fmt.Sprintf(format, args...))
}

// fail adds that the run after the kill did not succeed.
func (f *findings) fail(format string, args ...any) {
	f.failed = true
	f.add(format, args...)
}

// orphan adds what nothing refers to.
func (f *findings) orphan(format string, args ...any) {
	f.orphans++
	f.add(format, args...)
}

// tokenObject is an object as pkcs11-tool lists it.
type tokenObject struct{ class, label, id string }

// judge compares the token, the state directory and the record.
func (d *crashDevice) judge(t *testing.T, story crashStory, issued []issuance, wrong *findings) {
	t.Helper()
	journal := readJournal(t, d.dir)
	if journal.Operation != nil {
		wrong.add("an operation is unfinished: %s", journal.Operation)
	}
	if len(journal.Pairs) != story.leaves {
		wrong.add("%d pairs in the journal, want %d", len(journal.Pairs), story.leaves)
		return
	}
	// What may be there: the IDevID pair, and what the journal refers to.
	want := map[tokenObject]bool{
		{"Private Key Object", opensc.IDevIDLabel, opensc.IDevIDID}: true,
		{"Public Key Object", opensc.IDevIDLabel, opensc.IDevIDID}:  true,
		{"Certificate Object", opensc.IDevIDLabel, opensc.IDevIDID}: true,
	}
	anchors := map[tokenObject]bool{}
	files := map[string]bool{"journal.json": true, "security.json": true, "lock": true}
	for _, c := range journal.Pairs {
		label, id := attributes(t, c.Key)
		want[tokenObject{"Private Key Object", label, id}] = true
		want[tokenObject{"Public Key Object", label, id}] = true
		for _, certificate := range c.Certificates {
			label, id := attributes(t, certificate)
			want[tokenObject{"Certificate Object", label, id}] = true
		}
		files[c.ExplicitTA] = true
		for _, anchor := range c.Anchors {
			// An anchor is of no key: its id is of its own fingerprint.
			label, _ := attributes(t, anchor.Address)
			anchors[tokenObject{"Certificate Object", label, strings.TrimPrefix(label, "est-ta-")}] = true
		}
	}
	if len(anchors) != story.anchors {
		wrong.add("%d trust anchors in the journal, want %d", len(anchors), story.anchors)
	}
	maps.Copy(want, anchors)
	keys := 0
	objects, err := d.list(t)
	if err != nil {
		wrong.add("%v", err)
	}
	for _, object := range objects {
		if !want[object] {
			wrong.orphan("in the token: %v, which nothing refers to", object)
		}
		if object.class == "Private Key Object" {
			keys++
		}
		delete(want, object)
	}
	for object := range want {
		wrong.add("not in the token: %v", object)
	}
	if keys != 1+story.keys {
		wrong.add("%d private keys, want the IDevID's and %d", keys, story.keys)
	}
	entries, err := os.ReadDir(filepath.Join(d.dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if !files[entry.Name()] {
			wrong.orphan("in the state directory: %s", entry.Name())
		}
	}
	// The newest certificate is the server's last one, and the Security object's.
	current := journal.Pairs[0].Certificates[0]
	label, _ := attributes(t, current)
	if n := len(issued); n == 0 || !strings.HasSuffix(label, "-"+issued[n-1].Certificate[:16]) {
		wrong.add("the current certificate %s is not the last issued", label)
	}
	security, err := os.ReadFile(filepath.Join(d.dir, "state", "security.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(security, []byte(`"`+current+`"`)) {
		wrong.add("the Security object does not point at %s", current)
	}
}

// attributes reads label and id, "" for none, of an address as pkcs11-tool prints them.
func attributes(t *testing.T, address string) (label, id string) {
	t.Helper()
	for attribute := range strings.SplitSeq(strings.TrimPrefix(address, "pkcs11:"), ";") {
		name, value, _ := strings.Cut(attribute, "=")
		switch name {
		case "object":
			label = value
		case "id":
			id = strings.ToLower(strings.ReplaceAll(value, "%", ""))
		}
	}
	if label == "" {
		t.Fatalf("address %s has no label", address)
	}
	return label, id
}

// list has pkcs11-tool list the token.
func (d *crashDevice) list(t *testing.T) ([]tokenObject, error) {
	t.Helper()
	token := d.matrix.token
	cmd := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", token.ModulePath, "--token-label", token.Label, "--login", "--pin", "env:PIN", "-O")
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(d.dir, "softhsm2.conf"), "PIN="+token.PIN)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("pkcs11-tool (make deps installs it): %w", err)
	}
	var objects []tokenObject
	for line := range strings.Lines(string(out)) {
		name, value, found := strings.Cut(strings.TrimSpace(line), ":")
		switch {
		case strings.Contains(line, " Object"):
			class, _, _ := strings.Cut(strings.TrimSpace(line), ";")
			objects = append(objects, tokenObject{class: class})
		case found && name == "label" && len(objects) > 0:
			objects[len(objects)-1].label = strings.TrimSpace(value)
		case found && name == "ID" && len(objects) > 0:
			objects[len(objects)-1].id = strings.TrimSpace(value)
		}
	}
	if len(objects) == 0 {
		return nil, fmt.Errorf("pkcs11-tool lists nothing:\n%s", out)
	}
	return objects, nil
}
