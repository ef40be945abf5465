package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
)

// requirement is one thing that a document asks of a client.
type requirement struct {
	id   string // such as RFC 9148 §4.6 (1)
	text string
	no   string   // why no test shows it, and what is so instead
	but  string   // where a test shows it: when it is not so
	by   []string // the tests that show it, PACKAGE TEST
}

// chapter is the requirements of one document.
type chapter struct {
	title        string
	introduction []string
	requirements []*requirement
}

// list is the requirements of all documents.
type list struct {
	introduction []string
	chapters     []*chapter
}

// parseList reads the list. Its lines are a chapter's "# TITLE", a requirement's "ID: TEXT",
// the indented "no: REASON" or "but: EXCEPTION" of the one above, or a line of the
// introduction, which begins with "> "; other lines are empty.
func parseList(text string) (*list, error) {
	l := &list{}
	known := map[string]bool{}
	lines := bufio.NewScanner(strings.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		fail := func(reason string) error { return fmt.Errorf("line %d: %s: %q", n, reason, line) }
		var current *chapter
		if len(l.chapters) > 0 {
			current = l.chapters[len(l.chapters)-1]
		}
		switch {
		case line == "":
		case strings.HasPrefix(line, ">"):
			sentence := strings.TrimPrefix(strings.TrimPrefix(line, ">"), " ")
			if current == nil {
				l.introduction = append(l.introduction, sentence)
			} else {
				current.introduction = append(current.introduction, sentence)
			}
		case strings.HasPrefix(line, "# "):
			l.chapters = append(l.chapters, &chapter{title: line[len("# "):]})
		case strings.HasPrefix(line, "\t"):
			if current == nil || len(current.requirements) == 0 {
				return nil, fail("a reason without its requirement")
			}
			above := current.requirements[len(current.requirements)-1]
			kind, reason, _ := strings.Cut(line[1:], ": ")
			switch {
			case reason == "" || kind != "no" && kind != "but" || above.no+above.but != "":
				return nil, fail("want one reason, no: or but:")
			case kind == "no":
				above.no = reason
			default:
				above.but = reason
			}
		default:
			id, text, found := strings.Cut(line, ": ")
			switch {
			case !found || current == nil || strings.TrimSpace(line) != line:
				return nil, fail("want a chapter and then ID: TEXT")
			case known[id]:
				return nil, fail("this id is there twice")
			}
			known[id] = true
			current.requirements = append(current.requirements, &requirement{id: id, text: text})
		}
	}
	return l, lines.Err()
}

func (l *list) all() []*requirement {
	var all []*requirement
	for _, c := range l.chapters {
		all = append(all, c.requirements...)
	}
	return all
}

// marker is a place in a test that says what the test shows.
type marker struct{ place, pkg, id string }

var (
	goMarker     = regexp.MustCompile(`\.Attr\("shows", (?:"([^"]*)"\))?`)
	scriptMarker = regexp.MustCompile(`^shows (?:'([^']*)'$)?`)
)

// findMarkers finds the markers in the tests and scripts of a tree, and refuses those
// that are not literals.
func findMarkers(tree fs.FS) ([]marker, error) {
	var markers []marker
	err := fs.WalkDir(tree, ".", func(name string, entry fs.DirEntry, err error) error {
		pattern := goMarker
		switch {
		case err != nil:
			return err
		case entry.IsDir() && strings.HasPrefix(entry.Name(), ".") && name != ".":
			return fs.SkipDir
		case strings.HasSuffix(name, "_test.go"):
		case strings.HasSuffix(name, ".txt") && strings.Contains(name, "/testdata/"):
			pattern = scriptMarker
		default:
			return nil
		}
		text, err := fs.ReadFile(tree, name)
		if err != nil {
			return err
		}
		pkg, _, _ := strings.Cut(path.Dir(name), "/testdata")
		n := 0
		for line := range strings.Lines(string(text)) {
			n++
			for _, found := range pattern.FindAllStringSubmatch(strings.TrimRight(line, "\n"), -1) {
				place := fmt.Sprintf("%s:%d", name, n)
				if found[1] == "" {
					return fmt.Errorf("%s: the marker is not a literal", place)
				}
				markers = append(markers, marker{place: place, pkg: pkg, id: found[1]})
			}
		}
		return nil
	})
	return markers, err
}

// judge gives each requirement the tests that show it, and reports every marker that no
// passed test reached, every one of an unknown requirement, and every requirement that
// has neither a test nor a reason, or both.
func (l *list) judge(written []marker, tests *results) error {
	var wrong []error
	report := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	known := map[string]*requirement{}
	for _, r := range l.all() {
		known[r.id] = r
	}
	reached := map[marker]bool{}
	for _, m := range tests.markers {
		pkg, _, _ := strings.Cut(m.test, " ")
		reached[marker{pkg: pkg, id: m.id}] = true
		switch r := known[m.id]; {
		case r == nil:
			report("%s shows %s, which is not in %s", m.test, m.id, listName)
		case tests.outcome[m.test] != "pass":
			report("%s shows %s, and its outcome is %q", m.test, m.id, tests.outcome[m.test])
		case tests.skippedIn(m.test) != "":
			report("%s shows %s, and %s in it was skipped", m.test, m.id, tests.skippedIn(m.test))
		case !slices.Contains(r.by, m.test):
			r.by = append(r.by, m.test)
		}
	}
	for _, m := range written {
		if !reached[marker{pkg: m.pkg, id: m.id}] {
			report("%s: no test that ran reached the marker of %s", m.place, m.id)
		}
	}
	for _, r := range l.all() {
		slices.Sort(r.by)
		switch {
		case r.no == "" && len(r.by) == 0:
			report("%s is shown by no test, and %s gives no reason", r.id, listName)
		case r.no != "" && len(r.by) > 0:
			report("%s is shown by %s, and %s says no", r.id, r.by[0], listName)
		}
	}
	return errors.Join(wrong...)
}

// page is CONFORMANCE.md.
func (l *list) page() []byte {
	var out strings.Builder
	out.WriteString("<!-- Made by make conformance of " + listName + " and of the tests that passed. -->\n\n# Conformance\n\n")
	paragraph := func(lines []string) {
		for _, line := range lines {
			out.WriteString(line + "\n")
		}
		if len(lines) > 0 {
			out.WriteString("\n")
		}
	}
	paragraph(l.introduction)
	out.WriteString("In all: " + l.summary() + ".\n")
	for _, c := range l.chapters {
		fmt.Fprintf(&out, "\n## %s\n\n", c.title)
		paragraph(c.introduction)
		out.WriteString("| | requirement | shown by |\n|---|---|---|\n")
		for _, r := range c.requirements {
			by := byPackage(r.by)
			switch {
			case r.no != "":
				by = "no: " + r.no
			case r.but != "":
				by += "; but " + r.but
			}
			fmt.Fprintf(&out, "| %s | %s | %s |\n", strings.TrimPrefix(r.id, c.title+" "), cell(r.text), cell(by))
		}
	}
	return []byte(out.String())
}

// byPackage is PACKAGE: TEST, TEST; PACKAGE: …, without a name for the root package.
func byPackage(tests []string) string {
	names := map[string][]string{}
	for _, test := range tests {
		pkg, name, _ := strings.Cut(test, " ")
		names[pkg] = append(names[pkg], "`"+name+"`")
	}
	var packages []string
	for _, pkg := range slices.Sorted(maps.Keys(names)) {
		tests := strings.Join(names[pkg], ", ")
		if pkg != "." {
			tests = pkg + ": " + tests
		}
		packages = append(packages, tests)
	}
	return strings.Join(packages, "; ")
}

func cell(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

func (l *list) summary() string {
	shown, not := 0, 0
	tests := map[string]bool{}
	for _, r := range l.all() {
		if r.no != "" {
			not++
			continue
		}
		shown++
		for _, test := range r.by {
			tests[test] = true
		}
	}
	return fmt.Sprintf("%d requirements are shown by %d tests, %d are not, each with its reason", shown, len(tests), not)
}

// difference is the lines that only one of two texts has.
func difference(old, page string) string {
	before, after := strings.Split(old, "\n"), strings.Split(page, "\n")
	var out []string
	for _, line := range before {
		if !slices.Contains(after, line) {
			out = append(out, "-"+line)
		}
	}
	for _, line := range after {
		if !slices.Contains(before, line) {
			out = append(out, "+"+line)
		}
	}
	return strings.Join(out, "\n")
}
