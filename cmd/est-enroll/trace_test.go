package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestTrace asserts the order of system calls of the program as it ships, as strace
// sees it: each file of the state directory is written beside its place, fsynced,
// renamed and its directory fsynced (DESIGN.md §7), and that is done before anything
// that depends on it, in the token's directory and on the network.
func TestTrace(t *testing.T) {
	t.Parallel()
	m := newMatrix(t)
	d := m.device(t, "trace")

	for _, story := range []struct {
		args                       []string
		boots, generates, destroys bool
	}{
		{args: []string{"enroll"}, boots: true, generates: true},
		{args: []string{"renew", "--force"}},
		{args: []string{"renew", "--force", "--rekey"}, generates: true, destroys: true},
	} {
		t.Run(strings.Join(story.args, " "), func(t *testing.T) {
			r := d.trace(t, story.args...)
			files := r.replaced(t)
			journal := func(step string) replacement { return files.find(t, "journal.json", `\"step\": \"`+step+`\"`) }

			// The first object that is new is a key's where one is generated, else a certificate's.
			firstStep := "store"
			if story.generates {
				firstStep = "generate"
			}
			objects := r.newObjects(t)
			r.before(t, "the journal names what will be made", journal(firstStep).onDisk, "the module makes it", objects[0].begin)
			// A session sends nothing as large as a CSR but that: a GET has less than 100 bytes.
			csr := r.find(t, "the CSR", func(c traced) bool { return c.isRecord(recordData) && c.returned() > 200 })
			r.before(t, "the journal holds the CSR", files.find(t, "journal.json", `\"csr\": `).onDisk, "it is sent", csr.begin)
			r.before(t, "the CSR is answered", csr.end, "the journal says so", journal("store").begin)
			r.before(t, "the journal names the certificates", journal("store").onDisk, "the module makes the last", objects[len(objects)-1].begin)
			r.before(t, "the module has the certificates", objects[len(objects)-1].end, "the journal says so", journal("prove").begin)
			proof := r.find(t, "the proof", func(c traced) bool { return c.begin > journal("prove").begin && c.isRecord(recordHandshake) })
			r.before(t, "the journal says what is proven", journal("prove").onDisk, "it is", proof.begin)
			commit := files.last(t, "security.json")
			r.before(t, "the pair is proven", proof.end, "the Security object points at it", commit.begin)
			finished := files.last(t, "journal.json")
			r.before(t, "the Security object is written", commit.onDisk, "the journal forgets the operation", finished.begin)
			if strings.Contains(finished.content, `\"operation\"`) {
				t.Error("the last journal has an operation")
			}
			if story.destroys {
				destroyed := r.find(t, "an object that goes", func(c traced) bool { return c.name == "unlink" && r.inToken(c.path()) && c.isObject() })
				r.before(t, "the Security object is written", commit.onDisk, "the oldest pair goes", destroyed.begin)
				r.before(t, "the oldest pair is gone", destroyed.end, "the journal forgets it", finished.begin)
			}
			if story.boots {
				made := r.find(t, "the state directory", func(c traced) bool { return strings.HasPrefix(c.name, "mkdir") && c.path() == r.state })
				synced := r.find(t, "its name", func(c traced) bool {
					return c.begin > made.end && c.name == "fsync" && c.file() == filepath.Dir(r.state)
				})
				r.before(t, "the state directory is made", synced.end, "something is in it", files[0].begin)
			}
		})
	}
}

// tracing is what strace saw of a run.
type tracing struct {
	calls         []traced
	state, tokens string
	known         map[string]bool // objects of the token and trust anchors that were there before
}

// traced is a system call that did what it was asked for. Begin and end are lines of
// the trace: another thread may have called in between.
type traced struct {
	begin, end int
	name, text string // the text has its arguments and what it returned
}

var (
	traceCall    = regexp.MustCompile(`^(\d+) +(\w+)\((.*)$`)
	traceRest    = regexp.MustCompile(`^(\d+) +<\.\.\. \w+ resumed>(.*)$`)
	traceFailed  = regexp.MustCompile(`\) += (-1 E|\?)`)
	traceFile    = regexp.MustCompile(`^\d+<([^>]*)>`)
	traceString  = regexp.MustCompile(`"((?:[^"\\]|\\.)*)"`)
	traceAnchors = regexp.MustCompile(`explicit-ta-[0-9a-f]+\.pem`)
	traceReturn  = regexp.MustCompile(`\) += (\d+)`)
	tracingCalls = "openat,open,creat,write,writev,pwrite64,ftruncate,truncate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,sendto,sendmsg"
)

// file is that of the descriptor which is the first argument.
func (c traced) file() string {
	if found := traceFile.FindStringSubmatch(c.text); found != nil {
		return found[1]
	}
	return ""
}

// path is the last string: of a renaming, the new name.
func (c traced) path() string {
	found := traceString.FindAllStringSubmatch(c.text, -1)
	if found == nil {
		return ""
	}
	return found[len(found)-1][1]
}

func (c traced) returned() int {
	n, _ := strconv.Atoi(traceReturn.FindStringSubmatch(c.text)[1])
	return n
}

// The content types of RFC 5246 §6.2.1, as strace writes a byte.
const recordHandshake, recordData = `\26`, `\27`

func (c traced) isRecord(contentType string) bool {
	sent := traceString.FindStringSubmatch(c.text)
	return strings.HasPrefix(c.file(), "UDP:") && sent != nil && strings.HasPrefix(sent[1], contentType)
}

func (c traced) isObject() bool {
	return strings.HasSuffix(c.path(), ".object") && filepath.Base(c.path()) != "token.object"
}

// changes reports whether a file is opened to be changed, or is.
func (c traced) changes() (path string, changes bool) {
	switch {
	case strings.HasPrefix(c.name, "open"):
		return c.path(), strings.Contains(c.text, "O_CREAT") || strings.Contains(c.text, "O_TRUNC") || strings.Contains(c.text, "O_WRONLY") || strings.Contains(c.text, "O_RDWR")
	case strings.HasPrefix(c.name, "f"): // of a descriptor
		return c.file(), c.name == "ftruncate"
	case strings.Contains(c.name, "write"):
		return c.file(), true
	case strings.HasPrefix(c.name, "send"):
		return "", false
	}
	return c.path(), true
}

func (r *tracing) inState(path string) bool { return filepath.Dir(path) == r.state }
func (r *tracing) inToken(path string) bool { return strings.HasPrefix(path, r.tokens+"/") }

// trace runs the program under strace.
func (d *crashDevice) trace(t *testing.T, args ...string) *tracing {
	t.Helper()
	dir, err := filepath.EvalSymlinks(d.dir) // as the kernel names it
	if err != nil {
		t.Fatal(err)
	}
	r := &tracing{state: filepath.Join(dir, "state"), tokens: filepath.Join(dir, "tokens"), known: map[string]bool{}}
	objects, err := filepath.Glob(r.tokens + "/*/*.object")
	if err != nil {
		t.Fatal(err)
	}
	anchors, err := filepath.Glob(r.state + "/explicit-ta-*.pem")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range objects {
		r.known[path] = true
	}
	for _, path := range anchors {
		r.known[filepath.Base(path)] = true
	}
	log := filepath.Join(t.TempDir(), "trace")
	cmd := (&crashDevice{matrix: d.matrix, dir: dir, subject: d.subject}).command(t, d.matrix.token.ModulePath, nil, args...)
	strace := exec.CommandContext(t.Context(), "strace", append([]string{"-f", "-yy", "-qq", "-s", "16384", "-e", "signal=none", "-e", "trace=" + tracingCalls, "-o", log, cmd.Path}, args...)...)
	strace.Env = cmd.Env
	out, err := strace.CombinedOutput()
	if strings.Contains(string(out), "strace: ") {
		t.Fatalf("strace cannot trace here, which this test needs (a container must allow ptrace: --cap-add SYS_PTRACE): %v\n%s", err, out)
	}
	if err != nil {
		t.Fatalf("strace (make deps installs it) %s: %v\n%s", args, err, out)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	r.parse(t, string(text))
	return r
}

func (r *tracing) parse(t *testing.T, text string) {
	t.Helper()
	unfinished := map[string]traced{} // by thread
	n := 0
	for line := range strings.Lines(text) {
		n++
		var call traced
		if found := traceCall.FindStringSubmatch(strings.TrimSpace(line)); found != nil {
			call = traced{begin: n, name: found[2], text: found[3]}
			if began, ok := strings.CutSuffix(call.text, " <unfinished ...>"); ok {
				call.text = began
				unfinished[found[1]] = call
				continue
			}
		} else if found := traceRest.FindStringSubmatch(strings.TrimSpace(line)); found != nil {
			call = unfinished[found[1]]
			call.text += found[2]
		} else {
			t.Fatalf("line %d of the trace is not understood: %s", n, line)
		}
		call.end = n
		if !traceFailed.MatchString(call.text) {
			r.calls = append(r.calls, call)
		}
	}
	slices.SortFunc(r.calls, func(a, b traced) int { return a.begin - b.begin })
}

func (r *tracing) find(t *testing.T, what string, is func(traced) bool) traced {
	t.Helper()
	i := slices.IndexFunc(r.calls, is)
	if i < 0 {
		t.Fatalf("%s is not in the trace", what)
	}
	return r.calls[i]
}

func (r *tracing) newObjects(t *testing.T) []traced {
	t.Helper()
	var made []traced
	for _, c := range r.calls {
		if path, changes := c.changes(); changes && strings.HasPrefix(c.name, "open") && r.inToken(path) && c.isObject() && !r.known[path] {
			r.known[path] = true
			made = append(made, c)
		}
	}
	if len(made) == 0 {
		t.Fatal("the module makes no object")
	}
	return made
}

func (r *tracing) before(t *testing.T, first string, end int, second string, begin int) {
	t.Helper()
	if end >= begin {
		t.Errorf("%s (until line %d) before %s (from line %d): it is the other way round", first, end, second, begin)
	}
}

// replacement is a file of the state directory that got its content.
type replacement struct {
	name, content string
	begin, onDisk int // lines of the trace
}

type replacements []replacement

// replaced returns what the run replaced in the state directory, in order. Each has been
// written beside its place, fsynced, renamed and its name fsynced; meanwhile nothing
// was done to the token; and nothing in the directory was changed in another way.
func (r *tracing) replaced(t *testing.T) replacements {
	t.Helper()
	var files replacements
	var current *replacement
	var temporary string
	var done []string
	for _, c := range r.calls {
		path, changes := c.changes()
		step := func(name string) {
			if done = append(done, name); current == nil {
				t.Errorf("line %d: %s of %s, which is not being replaced", c.begin, c.name, path)
			}
		}
		switch {
		case current != nil && changes && r.inToken(path):
			t.Errorf("line %d: the module changes %s while %s is not on the disk", c.begin, path, current.name)
		case c.name == "fsync" && c.file() == r.state && current != nil:
			if want := []string{"open", "write", "fsync", "rename"}; !slices.Equal(slices.Compact(done), want) {
				t.Errorf("%s: %v before the fsync of the directory, want %v", current.name, done, want)
			}
			current.onDisk = c.end
			files = append(files, *current)
			current, temporary, done = nil, "", nil
		case c.name == "fsync" && current != nil && c.file() == temporary:
			step("fsync")
		case !changes || !r.inState(path) || path == filepath.Join(r.state, "lock"):
		case strings.HasPrefix(c.name, "open") && strings.Contains(c.text, "O_EXCL") && current == nil:
			current, temporary = &replacement{begin: c.begin}, path
			step("open")
		case strings.Contains(c.name, "write") && path == temporary:
			current.content += traceString.FindStringSubmatch(c.text)[1]
			step("write")
		case strings.HasPrefix(c.name, "rename") && strings.Contains(c.text, `"`+temporary+`"`):
			current.name = filepath.Base(path)
			step("rename")
		default:
			t.Errorf("line %d: %s changes %s in place", c.begin, c.name, path)
		}
	}
	if current != nil {
		t.Errorf("%s is not on the disk in the end", current.name)
	}
	// The trust anchors that a journal names are on the disk before it.
	for i, file := range files {
		for _, name := range traceAnchors.FindAllString(file.content, -1) {
			if !r.known[name] && !slices.ContainsFunc(files[:i], func(f replacement) bool { return f.name == name }) {
				t.Errorf("line %d: %s names %s, which is not there", file.begin, file.name, name)
			}
		}
	}
	return files
}

func (files replacements) find(t *testing.T, name, content string) replacement {
	t.Helper()
	i := slices.IndexFunc(files, func(f replacement) bool { return f.name == name && strings.Contains(f.content, content) })
	if i < 0 {
		t.Fatalf("no %s with %s was written", name, content)
	}
	return files[i]
}

func (files replacements) last(t *testing.T, name string) replacement {
	t.Helper()
	for _, file := range slices.Backward(files) {
		if file.name == name {
			return file
		}
	}
	t.Fatalf("no %s was written", name)
	return replacement{}
}
