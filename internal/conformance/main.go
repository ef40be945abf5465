// Command conformance runs go test and holds what the tests show of the RFCs to the
// list of what they ask of a client, testdata/conformance.txt: CONFORMANCE.md is made of
// the two.
//
// A test says what it shows with t.Attr("shows", "RFC 9148 §4.6 (1)"), a script with
// shows 'RFC 9148 §4.6 (1)', always as a literal. It counts when that line was reached in
// a test that then passed: one that was skipped, was not run or is no more shows nothing,
// and a page that says otherwise is an error. Attributes are of package testing; they are
// seen with -json alone, so plain go test prints and runs what it always did.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

const (
	listName = "testdata/conformance.txt"
	pageName = "CONFORMANCE.md"
)

func main() {
	if err := conform(os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

// conform [-write] ARGS… runs go test ARGS in the working directory, which is that of the
// module, and checks the page, or writes it.
func conform(out io.Writer, args []string) error {
	write := len(args) > 0 && args[0] == "-write"
	if write {
		args = args[1:]
	}
	text, err := os.ReadFile(listName)
	if err != nil {
		return fmt.Errorf("read the requirements: %w", err)
	}
	list, err := parseList(string(text))
	if err != nil {
		return fmt.Errorf("%s: %w", listName, err)
	}
	written, err := findMarkers(os.DirFS("."))
	if err != nil {
		return fmt.Errorf("find the markers: %w", err)
	}
	tests, err := goTest(out, args)
	if err != nil {
		return err
	}
	if err := list.judge(written, tests); err != nil {
		return err
	}
	page := list.page()
	if write {
		return os.WriteFile(pageName, page, 0o644)
	}
	if old, err := os.ReadFile(pageName); err != nil || !bytes.Equal(old, page) {
		return errors.Join(fmt.Errorf("%s is not what the tests show (make conformance writes it):\n%s", pageName, difference(string(old), string(page))), err)
	}
	_, err = fmt.Fprintln(out, "conformance:", list.summary())
	return err
}
