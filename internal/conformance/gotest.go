package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// event is one line of go test -json (go doc test2json).
type event struct {
	Action, Package, Test, Output, Key, Value string
}

// shown is a marker that a test reached.
type shown struct{ test, id string }

// results is what became of the tests. A test is PACKAGE TEST, with the package's
// directory below the module's.
type results struct {
	outcome map[string]string // pass, fail or skip
	markers []shown
	failed  []string // tests without parts that failed, and packages without any
}

// skippedIn is a part of a test that was skipped.
func (r *results) skippedIn(test string) string {
	for name, outcome := range r.outcome {
		if outcome == "skip" && strings.HasPrefix(name, test+"/") {
			return name
		}
	}
	return ""
}

// fail notes a test that failed, or a package, whose name ends with the space: what failed
// because of a part of it is known by that.
func (r *results) fail(name string) {
	within := name
	if !strings.HasSuffix(name, " ") {
		within += "/"
	}
	if !slices.ContainsFunc(r.failed, func(part string) bool { return strings.HasPrefix(part, within) }) {
		r.failed = append(r.failed, name)
	}
}

// goTest runs go test with the arguments, and writes what a person wants to read of it,
// as soon as a package is done. It fails where go test does.
func goTest(out io.Writer, args []string) (*results, error) {
	cmd := exec.Command("go", slices.Concat([]string{"test", "-json"}, args)...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	tests, readErr := readEvents(stdout, out)
	if err := errors.Join(readErr, cmd.Wait()); err != nil {
		return nil, fmt.Errorf("go test: %w; failed: %s", err, strings.TrimSpace(strings.ReplaceAll(strings.Join(tests.failed, ", "), " , ", ", ")))
	}
	return tests, nil
}

// readEvents reads go test's events to their end.
func readEvents(in io.Reader, out io.Writer) (*results, error) {
	tests := &results{outcome: map[string]string{}}
	logs := map[string]*packageLog{}
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		if line == "" || err != nil && err != io.EOF {
			return tests, ignoreEOF(err)
		}
		var e event
		if json.Unmarshal([]byte(line), &e) != nil || e.Package == "" {
			if e.Output != "" {
				line = e.Output // of a compiler
			}
			if e.Action == "" || e.Output != "" {
				fmt.Fprint(out, line)
			}
			continue
		}
		name := directory(e.Package) + " " + e.Test
		log := logs[e.Package]
		if log == nil {
			log = &packageLog{lines: map[string][]string{}}
			logs[e.Package] = log
		}
		switch e.Action {
		case "output":
			log.add(e.Test, e.Output)
		case "attr":
			if e.Key == "shows" {
				tests.markers = append(tests.markers, shown{test: name, id: e.Value})
			}
		case "pass", "fail", "skip":
			tests.outcome[name] = e.Action
			if e.Action == "fail" {
				tests.fail(name)
			}
			if e.Test == "" {
				log.print(out, e.Action == "fail", func(test string) bool { return tests.outcome[directory(e.Package)+" "+test] == "pass" })
				delete(logs, e.Package)
			}
		}
	}
}

func ignoreEOF(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// directory is a package's directory below the module's: . is the module's.
func directory(pkg string) string {
	_, dir, found := strings.Cut(pkg, "/")
	if !found {
		return "."
	}
	return dir
}

// packageLog is what the tests of a package have written, in the order in which they began.
type packageLog struct {
	tests []string
	lines map[string][]string
}

func (l *packageLog) add(test, output string) {
	if l.lines[test] == nil {
		l.tests = append(l.tests, test)
	}
	l.lines[test] = append(l.lines[test], output)
}

var (
	// What -json has package testing say of each test, and go test without it does not.
	chatter = regexp.MustCompile(`^=== (RUN|PAUSE|CONT|NAME|ATTR) `)
	// The results and logs of tests. What else a test writes may not be its own: a
	// report of a data race stands under the name of the test that wrote last.
	ofTest = regexp.MustCompile(`^( *--- | {4}\S| {8})`)
	result = regexp.MustCompile(`^(ok|\?) `)
)

// print writes what go test would: the result, or of a package that failed all but the
// logs of tests that passed.
func (l *packageLog) print(out io.Writer, failed bool, passed func(test string) bool) {
	for _, test := range l.tests {
		for _, line := range l.lines[test] {
			switch {
			case chatter.MatchString(line):
			case test == "" && (failed || result.MatchString(line)),
				test != "" && failed && (!passed(test) || !ofTest.MatchString(line)):
				fmt.Fprint(out, line)
			}
		}
	}
}
