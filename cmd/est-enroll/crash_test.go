package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"estenroll/engine/enginetest/opensc"
	"estenroll/engine/enginetest/p11crash"
	"estenroll/engine/enginetest/softhsm"
)

// A prime, so that the sample of "make test" is spread over both sides of all calls.
var (
	crashEvery = flag.Int("crash.every", 23, "test each n-th point of the crash matrix; 1 tests all")
	crashOnly  = flag.String("crash.story", "", "test only the story of this name: enroll, renew, rekey or reset")
)

// TestCrash kills the program before and after each PKCS#11 call of a first boot,
// of a renewal and of a rekey that destroys the key before the previous one, then runs
// it once more as a device would, and looks at what there is, with the eyes of
// others: pkcs11-tool and the server's record (DESIGN.md §8). The program is the one
// that ships.
func TestCrash(t *testing.T) {
	m := newMatrix(t)
	rekey := []string{"renew", "--force", "--rekey"}
	points, recovered, orphans := 0, 0, 0
	for _, story := range []crashStory{
		{name: "enroll", args: []string{"enroll"}, leaves: 1, keys: 1},
		{name: "renew", args: []string{"renew", "--force"}, leaves: 2, keys: 1, before: [][]string{{"enroll"}}},
		{name: "rekey", args: rekey, leaves: 2, keys: 2, before: [][]string{{"enroll"}, rekey}},
	} {
		if *crashOnly != "" && *crashOnly != story.name {
			continue
		}
		template := m.prepare(t, story)
		recorded := m.record(t, story, template)
		t.Logf("%s: %d points recorded", story.name, len(recorded))
		for i := 0; i < len(recorded); i += *crashEvery {
			points++
			if m.crash(t, story, template, recorded[i], &orphans) {
				recovered++
			}
		}
	}
	if points == 0 && *crashOnly != "reset" {
		t.Fatalf("there is no story %q", *crashOnly)
	}
	fmt.Printf("points %d, recovered %d, orphans %d\n", points, recovered, orphans)
}

// TestCrashReset does the same with a reset. Once it is begun, the next run goes on
// with it, and an enrolment is a first boot then; before that nothing is changed.
func TestCrashReset(t *testing.T) {
	story := crashStory{name: "reset", args: []string{"reset", "--yes"}, before: [][]string{{"enroll"}, {"renew", "--force"}}, leaves: 1, keys: 1}
	if *crashOnly != "" && *crashOnly != story.name {
		return
	}
	m := newMatrix(t)
	template := m.prepare(t, story)
	before := readJournal(t, template)
	points, finished, begun := 0, 0, 0
	recorded := m.record(t, story, template)
	for i := 0; i < len(recorded); i += *crashEvery {
		points++
		d, at := m.copyOf(t, template, fmt.Sprintf("reset-%d", i)), recorded[i]
		log := filepath.Join(d.dir, "calls")
		killed, err := d.run(t, m.module.Path, m.module.Env(m.token.ModulePath, log, at), story.args...)
		if err := at.Hit(err, log); err != nil {
			t.Errorf("reset: %v\n%s", err, killed)
			continue
		}
		args, judge := story.args, d.judgeFactory
		switch journal, err := d.journal(); {
		case errors.Is(err, fs.ErrNotExist):
			finished++
		case err != nil:
			t.Error(err)
		case strings.Contains(string(journal.Operation), `"reset"`):
			begun++
			if begun%2 == 0 {
				issuedBefore := len(m.issuances(t))
				args, judge = []string{"enroll"}, func(t *testing.T) *findings { return d.judge(t, story, m.issuances(t)[issuedBefore:]) }
			}
		case len(journal.Pairs) != len(before.Pairs):
			t.Errorf("reset killed at %s: the journal names %d pairs and no reset", at, len(journal.Pairs))
		}
		out, err := d.run(t, m.token.ModulePath, nil, args...)
		if err != nil {
			t.Errorf("reset killed at %s, then %s: %v\n%s%s", at, args, err, killed, out)
			continue
		}
		if wrong := judge(t); len(wrong.text) > 0 {
			t.Errorf("reset killed at %s, then %s:\n%s\nthe killed run:\n%sthe next run:\n%s", at, args, strings.Join(wrong.text, "\n"), killed, out)
		}
	}
	t.Logf("reset: %d points of %d, %d of them in a reset that was begun, %d after one", points, len(recorded), begun, finished)
	if begun < 2 || points == begun+finished {
		t.Errorf("of %d points %d are in a reset that was begun and %d after one", points, begun, finished)
	}
}

// judgeFactory wants of the token and the state directory what the factory left.
func (d *crashDevice) judgeFactory(t *testing.T) *findings {
	t.Helper()
	wrong := new(findings)
	for _, object := range d.list(t) {
		if object.label != opensc.IDevIDLabel {
			wrong.add("in the token: %v", object)
		}
	}
	entries, err := os.ReadDir(filepath.Join(d.dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if name := entry.Name(); name != "lock" && name != "security.json" {
			wrong.add("in the state directory: %s", name)
		}
	}
	security, err := os.ReadFile(filepath.Join(d.dir, "state", "security.json"))
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(security, []byte("object="+opensc.IDevIDLabel)); n != 2 || bytes.Count(security, []byte("object=")) != 2 {
		wrong.add("the Security object is %s", security)
	}
	return wrong
}

// crashStory is a command that is killed, and what came before it.
type crashStory struct {
	name   string
	args   []string
	before [][]string
	leaves int // certificates of the device's keys, in the end
	keys   int // of the device, then
}

// matrix is what all points share: the programs, the interposing module, a
// server, and the token that is copied for each.
type matrix struct {
	bin    string
	module p11crash.Module
	token  *softhsm.Token
	server *session
	count  int
}

func newMatrix(t *testing.T) *matrix {
	m := &matrix{bin: builtPrograms(t), module: p11crash.Build(t), token: softhsm.New(t, softhsm.WithPIN(markerPIN))}
	m.server = &session{token: &m.token.Token, bin: m.bin, work: t.TempDir(), factory: true}
	m.server.config = filepath.Join(m.server.work, "unused.yaml")
	if err := m.server.startServer(nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.server.stopServer(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// crashDevice is one copy of the token with a state directory of its own.
type crashDevice struct {
	matrix  *matrix
	dir     string
	subject string
}

// copyOf makes a device from a directory with tokens and state.
func (m *matrix) copyOf(t *testing.T, template, name string) *crashDevice {
	t.Helper()
	d := &crashDevice{matrix: m, dir: filepath.Join(t.TempDir(), name), subject: "CN=" + name}
	if err := os.CopyFS(d.dir, os.DirFS(template)); err != nil {
		t.Fatal(err)
	}
	d.write(t, "softhsm2.conf", "directories.tokendir = "+d.dir+"/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
	return d
}

func (d *crashDevice) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(d.dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// run runs the program, with the module that its configuration names.
func (d *crashDevice) run(t *testing.T, module string, env []string, args ...string) (string, error) {
	t.Helper()
	out, err := d.command(t, module, env, append([]string{"-v"}, args...)...).CombinedOutput()
	return string(out), err
}

func (d *crashDevice) command(t *testing.T, module string, env []string, args ...string) *exec.Cmd {
	token := d.matrix.token
	cmd := exec.CommandContext(t.Context(), filepath.Join(d.matrix.bin, "est-enroll"), args...)
	cmd.Env = append(env,
		"SOFTHSM2_CONF="+filepath.Join(d.dir, "softhsm2.conf"),
		"EST_ENROLL_STATE_DIR="+filepath.Join(d.dir, "state"),
		"EST_ENROLL_LOCK_DIR="+filepath.Join(d.dir, "locks"),
		"EST_ENROLL_ENGINE=pkcs11:token="+token.Label+"?module-path="+module+"&pin-source=file:"+token.PINFile,
		"EST_ENROLL_SERVER="+d.matrix.server.uri,
		"EST_ENROLL_TRUST_ANCHORS="+filepath.Join(d.matrix.server.work, "ca", "ca.pem"),
		"EST_ENROLL_SUBJECT="+d.subject,
	)
	return cmd
}

// prepare makes the directory that a story's devices are copied from.
func (m *matrix) prepare(t *testing.T, story crashStory) string {
	t.Helper()
	base := filepath.Join(t.TempDir(), "base")
	if err := os.CopyFS(filepath.Join(base, "tokens"), os.DirFS(m.token.Dir)); err != nil {
		t.Fatal(err)
	}
	if story.before == nil {
		return base
	}
	d := m.copyOf(t, base, story.name+"-template")
	for _, args := range story.before {
		if out, err := d.run(t, m.token.ModulePath, nil, args...); err != nil {
			t.Fatalf("%s: %v\n%s", args, err, out)
		}
	}
	return d.dir
}

// record runs the story uninterrupted and returns its points: twice the same,
// or a point could be recorded and not hit.
func (m *matrix) record(t *testing.T, story crashStory, template string) []p11crash.Point {
	t.Helper()
	var recorded [2][]p11crash.Point
	for i := range recorded {
		d := m.copyOf(t, template, fmt.Sprintf("%s-record-%d", story.name, i))
		log := filepath.Join(d.dir, "calls")
		if out, err := d.run(t, m.module.Path, m.module.Env(m.token.ModulePath, log, p11crash.Point{}), story.args...); err != nil {
			t.Fatalf("%s: %v\n%s", story.args, err, out)
		}
		recorded[i] = p11crash.ReadLog(t, log)
	}
	if !slices.Equal(recorded[0], recorded[1]) {
		t.Fatalf("%s: two runs made different calls: %d and %d points", story.name, len(recorded[0]), len(recorded[1]))
	}
	return recorded[0]
}

// crash kills the story at a point, runs it once more and judges the end.
func (m *matrix) crash(t *testing.T, story crashStory, template string, at p11crash.Point, orphans *int) bool {
	m.count++
	d := m.copyOf(t, template, fmt.Sprintf("%s-%d", story.name, m.count))
	issuedBefore := len(m.issuances(t))
	log := filepath.Join(d.dir, "calls")
	killed, err := d.run(t, m.module.Path, m.module.Env(m.token.ModulePath, log, at), story.args...)
	if err := at.Hit(err, log); err != nil {
		t.Errorf("%s: %v\n%s", story.name, err, killed)
		return false
	}
	// A renewal that was complete when it was killed is followed by another one.
	want := 1
	if story.before != nil && d.complete(t, template) {
		want = 2
	}
	out, err := d.run(t, m.token.ModulePath, nil, story.args...)
	if err != nil {
		t.Errorf("%s killed at %s, then: %v\n%s%s", story.name, at, err, killed, out)
		return false
	}
	issued := m.issuances(t)[issuedBefore:]
	wrong := d.judge(t, story, issued)
	if strings.Contains(killed+out, markerPIN) {
		wrong.add("the PIN is in the output")
	}
	for _, path := range findMarker(filepath.Join(d.dir, "state")) {
		wrong.add("the PIN is in %s", path)
	}
	*orphans += wrong.orphans
	if len(issued) != want {
		wrong.add("the server issued %d certificates, want %d", len(issued), want)
	}
	if len(wrong.text) > 0 {
		t.Errorf("%s killed at %s:\n%s\nthe killed run:\n%sthe next run:\n%s", story.name, at, strings.Join(wrong.text, "\n"), killed, out)
	}
	return len(wrong.text) == 0
}

// crashRecord is what the judge reads of a journal: of its one credential.
type crashRecord struct {
	Pairs []struct {
		Key          string
		Certificates []string
		ExplicitTA   string `json:"explicit_ta"`
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
func (d *crashDevice) complete(t *testing.T, template string) bool {
	t.Helper()
	now := readJournal(t, d.dir)
	return now.Operation == nil && now.Pairs[0].Certificates[0] != readJournal(t, template).Pairs[0].Certificates[0]
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
}

func (f *findings) add(format string, args ...any) {
	f.text = append(f.text, fmt.Sprintf(format, args...))
}

// tokenObject is an object as pkcs11-tool lists it.
type tokenObject struct{ class, label, id string }

// judge compares the token, the state directory and the record.
func (d *crashDevice) judge(t *testing.T, story crashStory, issued []issuance) *findings {
	t.Helper()
	wrong := new(findings)
	journal := readJournal(t, d.dir)
	if journal.Operation != nil {
		wrong.add("an operation is unfinished: %s", journal.Operation)
	}
	if len(journal.Pairs) != story.leaves {
		wrong.add("%d pairs in the journal, want %d", len(journal.Pairs), story.leaves)
		return wrong
	}
	// What may be there: the IDevID pair, and what the journal refers to.
	want := map[tokenObject]bool{
		{"Private Key Object", opensc.IDevIDLabel, opensc.IDevIDID}: true,
		{"Public Key Object", opensc.IDevIDLabel, opensc.IDevIDID}:  true,
		{"Certificate Object", opensc.IDevIDLabel, opensc.IDevIDID}: true,
	}
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
	}
	keys := 0
	for _, object := range d.list(t) {
		if !want[object] {
			wrong.orphans++
			wrong.add("in the token: %v, which nothing refers to", object)
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
			wrong.orphans++
			wrong.add("in the state directory: %s", entry.Name())
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
	return wrong
}

// attributes reads label and id of an address as pkcs11-tool prints them.
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
	if label == "" || id == "" {
		t.Fatalf("address %s has no label or id", address)
	}
	return label, id
}

// list has pkcs11-tool list the token.
func (d *crashDevice) list(t *testing.T) []tokenObject {
	t.Helper()
	token := d.matrix.token
	cmd := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", token.ModulePath, "--token-label", token.Label, "--login", "--pin", "env:PIN", "-O")
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(d.dir, "softhsm2.conf"), "PIN="+token.PIN)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("pkcs11-tool (make deps installs it): %v", err)
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
		t.Fatalf("pkcs11-tool lists nothing:\n%s", out)
	}
	return objects
}
