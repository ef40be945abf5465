package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

// shows is a marker as a test has it: written out here, it would be one of this test.
func shows(id string) string { return `t.Attr("shows"` + `, "` + id + `")` }

// A module with a list of its own, for the real go test.
func module(t *testing.T, requirements, tests string) {
	t.Helper()
	t.Chdir(t.TempDir())
	t.Setenv("GOFLAGS", "-mod=mod")
	for name, text := range map[string]string{
		"go.mod": "module example\n\ngo 1.25\n", listName: requirements,
		"a/a_test.go": "package a\n\nimport \"testing\"\n\n" + tests,
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestConform(t *testing.T) {
	module(t, "# RFC 1\n\nRFC 1 §1 (1): One.\nRFC 1 §2 (1): Two | three.\n\tno: not needed.\nRFC 1 §2 (2): Four.\n\tbut: not on Sundays.\n",
		"func TestA(t *testing.T) { "+shows("RFC 1 §2 (2)")+"; t.Run(\"b c\", func(t *testing.T) { "+shows("RFC 1 §1 (1)")+" }) }\n")
	if err := conform(t.Output(), []string{"./..."}); err == nil || !strings.Contains(err.Error(), "+| §1 (1) | One. | a: `TestA/b_c` |") {
		t.Errorf("without a page: %v", err)
	}
	if err := conform(t.Output(), []string{"-write", "./..."}); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(pageName)
	if err != nil || !bytes.Contains(page, []byte("\n| §2 (1) | Two \\| three. | no: not needed. |\n| §2 (2) | Four. | a: `TestA`; but not on Sundays. |\n")) {
		t.Errorf("%v: the page is\n%s", err, page)
	}
	if err := conform(t.Output(), []string{"./..."}); err != nil {
		t.Errorf("with the page that was written: %v", err)
	}
	if err := os.WriteFile(pageName, append(page, "| §3 | More. | a: `TestB` |\n"...), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := conform(t.Output(), []string{"./..."}); err == nil || !strings.Contains(err.Error(), "-| §3 | More. | a: `TestB` |") {
		t.Errorf("with a page that says more: %v", err)
	}
}

// What does not show what it says fails, whatever the page says.
func TestConformRefused(t *testing.T) {
	module(t, "# RFC 1\n\n1: Skipped.\n2: Skipped before.\n3: Skipped in part.\n4: Not run.\n5: No marker, no reason.\n6: Both.\n\tno: not needed.\n7: Shown.\n", `
func TestSkipped(t *testing.T) { `+shows("1")+`; t.Skip() }
func TestSkippedBefore(t *testing.T) { t.Skip(); `+shows("2")+` }
func TestSkippedInPart(t *testing.T) { `+shows("3")+`; t.Run("part", func(t *testing.T) { t.Skip() }) }
func testNotRun(t *testing.T) { `+shows("4")+` }
var _ = testNotRun
func TestBoth(t *testing.T) { `+shows("6")+` }
func TestShown(t *testing.T) { `+shows("7")+`; `+shows("8")+` }
`)
	err := conform(t.Output(), []string{"./..."})
	if err == nil {
		t.Fatal("everything is shown")
	}
	want := []string{
		`a TestSkipped shows 1, and its outcome is "skip"`,
		"1 is shown by no test, and testdata/conformance.txt gives no reason",
		"a/a_test.go:7: no test that ran reached the marker of 2",
		"2 is shown by no test, and testdata/conformance.txt gives no reason",
		"a TestSkippedInPart shows 3, and a TestSkippedInPart/part in it was skipped",
		"3 is shown by no test, and testdata/conformance.txt gives no reason",
		"a/a_test.go:9: no test that ran reached the marker of 4",
		"4 is shown by no test, and testdata/conformance.txt gives no reason",
		"5 is shown by no test, and testdata/conformance.txt gives no reason",
		"6 is shown by a TestBoth, and testdata/conformance.txt says no",
		"a TestShown shows 8, which is not in testdata/conformance.txt",
	}
	got := strings.Split(err.Error(), "\n")
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// A failure of go test's is one, and what it did not test is not written of.
func TestConformFailed(t *testing.T) {
	module(t, "# RFC 1\n\n1: One.\n", "func TestA(t *testing.T) { "+shows("1")+"; t.Error(\"wrong\") }\n")
	for args, want := range map[string]string{"./...": "go test: exit status 1; failed: a TestA", "./b": "go test: exit status 1; failed: b"} {
		if err := conform(t.Output(), []string{"-write", args}); err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", args, err, want)
		}
	}
	if _, err := os.Stat(pageName); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the page: %v", err)
	}
}

func TestParseListRefused(t *testing.T) {
	for _, text := range []string{
		"RFC 1 §1 (1): Before a chapter.\n", "# RFC 1\nno id\n", "# RFC 1\n\tno: nothing\n", "# RFC 1\n  a: b\n",
		"# RFC 1\na: b\na: c\n", "# RFC 1\na: b\n\tno: c\n\tno: d\n", "# RFC 1\na: b\n\tno: c\n\tbut: d\n", "# RFC 1\na: b\n\tyes: c\n",
	} {
		if _, err := parseList(text); err == nil {
			t.Errorf("read %q", text)
		}
	}
}

func TestFindMarkers(t *testing.T) {
	found, err := findMarkers(fstest.MapFS{
		"a_test.go":                     {Data: []byte("\t" + shows("1") + "\n\n" + shows("2"))},
		"b/c/testdata/script/story.txt": {Data: []byte("exec x\nshows '3'\n")},
		"b/c.go":                        {Data: []byte(shows("4"))},
		".git/d_test.go":                {Data: []byte(shows("5"))},
	})
	want := []marker{{"a_test.go:1", ".", "1"}, {"a_test.go:3", ".", "2"}, {"b/c/testdata/script/story.txt:2", "b/c", "3"}}
	if err != nil || len(found) != len(want) {
		t.Fatalf("got %v, %v", found, err)
	}
	for i := range want {
		if found[i] != want[i] {
			t.Errorf("got %v, want %v", found[i], want[i])
		}
	}
	for _, text := range []string{`t.Attr("shows"` + `, id)`, `t.Attr("shows"` + `, "1" + x)`} {
		if _, err := findMarkers(fstest.MapFS{"a_test.go": {Data: []byte(text)}}); err == nil {
			t.Errorf("%s is a marker", text)
		}
	}
}

// What a person reads is what go test writes without -json, and of a package that
// failed also what cannot be said to be of a test that passed.
func TestOutput(t *testing.T) {
	const events = `{"Action":"output","Package":"m/ok","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"m/ok","Test":"TestA","Output":"    a_test.go:1: quiet\n"}
{"Action":"pass","Package":"m/ok","Test":"TestA"}
{"Action":"output","Package":"m/ok","Output":"PASS\n"}
{"Action":"output","Package":"m/ok","Output":"ok  \tm/ok\t0.1s\n"}
{"Action":"pass","Package":"m/ok"}
{"ImportPath":"m/x","Action":"build-output","Output":"# m/x\n"}
{"ImportPath":"m/x","Action":"build-fail"}
{"Action":"output","Package":"m/bad","Test":"TestB","Output":"=== RUN   TestB\n"}
{"Action":"output","Package":"m/bad","Test":"TestC","Output":"=== RUN   TestC\n"}
{"Action":"output","Package":"m/bad","Test":"TestC","Output":"    c_test.go:1: quiet\n        and on\n"}
{"Action":"output","Package":"m/bad","Test":"TestC","Output":"WARNING: DATA RACE\n"}
{"Action":"output","Package":"m/bad","Test":"TestC","Output":"      /c.go:7\n"}
{"Action":"output","Package":"m/bad","Test":"TestB","Output":"=== NAME  TestB\n"}
{"Action":"output","Package":"m/bad","Test":"TestB","Output":"    b_test.go:1: loud\n"}
{"Action":"output","Package":"m/bad","Test":"TestC","Output":"--- PASS: TestC (0.00s)\n"}
{"Action":"pass","Package":"m/bad","Test":"TestC"}
{"Action":"output","Package":"m/bad","Test":"TestB","Output":"--- FAIL: TestB (0.00s)\n"}
{"Action":"fail","Package":"m/bad","Test":"TestB/part"}
{"Action":"fail","Package":"m/bad","Test":"TestB"}
{"Action":"output","Package":"m/bad","Test":"TestHung","Output":"panic: test timed out\n"}
{"Action":"output","Package":"m/bad","Output":"FAIL\tm/bad\t0.1s\n"}
{"Action":"fail","Package":"m/bad"}
not of go test
`
	const want = `ok  	m/ok	0.1s
# m/x
    b_test.go:1: loud
--- FAIL: TestB (0.00s)
WARNING: DATA RACE
      /c.go:7
panic: test timed out
FAIL	m/bad	0.1s
not of go test
`
	var out strings.Builder
	tests, err := readEvents(strings.NewReader(events), &out)
	if err != nil || out.String() != want {
		t.Errorf("%v: got\n%s", err, &out)
	}
	if got := strings.Join(tests.failed, ", "); got != "bad TestB/part" {
		t.Errorf("failed: got %s", got)
	}
}
