package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const crashFile = "../../testdata/crash.json"

// crashResult is what became of the points of a kind.
type crashResult struct {
	Recorded  int `json:"recorded"`
	Points    int `json:"points"` // at which it was killed
	Recovered int `json:"recovered"`
	Orphans   int `json:"orphans"`
	Failed    int `json:"failed,omitempty"` // the run after the kill
}

func (r *crashResult) count(f *findings) {
	r.Points++
	r.Orphans += f.orphans
	if len(f.text) == 0 {
		r.Recovered++
	}
	if f.failed {
		r.Failed++
	}
}

func (r *crashResult) add(other crashResult) {
	r.Recorded += other.Recorded
	r.Points += other.Points
	r.Recovered += other.Recovered
	r.Orphans += other.Orphans
	r.Failed += other.Failed
}

func (r crashResult) String() string {
	text := fmt.Sprintf("points %d, recovered %d, orphans %d", r.Points, r.Recovered, r.Orphans)
	if r.Failed > 0 {
		text += fmt.Sprintf(", failed %d", r.Failed)
	}
	return text
}

// crashFlow is what became of a story.
type crashFlow struct {
	Name   string        `json:"flow"`
	Kinds  []crashResult `json:"kinds"` // as in promised
	Module crashResult   `json:"module"`
}

// crashFigures are the last figures of the whole, of all stories in their order.
type crashFigures []crashFlow

func readCrashFigures(t *testing.T) crashFigures {
	t.Helper()
	data, err := os.ReadFile(crashFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	decoder := json.NewDecoder(strings.NewReader(string(data)))
	decoder.DisallowUnknownFields()
	var figures crashFigures
	if err := decoder.Decode(&figures); err != nil {
		t.Fatal(err)
	}
	return figures
}

// put replaces the figures of a story.
func (f *crashFigures) put(flow crashFlow) {
	var all crashFigures
	for _, story := range crashStories {
		at := slices.IndexFunc(*f, func(known crashFlow) bool { return known.Name == story.flow })
		switch {
		case story.flow == flow.Name:
			all = append(all, flow)
		case at >= 0:
			all = append(all, (*f)[at])
		}
	}
	*f = all
}

// table renders the figures for the README.
func (f crashFigures) table() string {
	var b strings.Builder
	fmt.Fprint(&b, "| killed before and after each of | PKCS#11 calls | datagrams | file operations | recovered | orphans |\n|---|---|---|---|---|---|\n")
	var all, module crashResult
	sums := make([]crashResult, len(promised))
	row := func(name string, kinds []crashResult) {
		var total crashResult
		fmt.Fprintf(&b, "| %s |", name)
		for _, kind := range kinds {
			fmt.Fprintf(&b, " %d |", kind.Points)
			total.add(kind)
		}
		fmt.Fprintf(&b, " %d of %d | %d |\n", total.Recovered, total.Points, total.Orphans)
	}
	for _, flow := range f {
		row(flow.Name, flow.Kinds)
		for i, kind := range flow.Kinds {
			sums[i].add(kind)
			all.add(kind)
		}
		module.add(flow.Module)
	}
	row("in all", sums)
	fmt.Fprintf(&b, `
In all: %s. Apart, because nothing is promised there: a sample of %d points inside the writes of the module itself (of %d).
After %d of them the next run recovered; after %d more it did its work and left half-written objects in the token; after %d it failed.
`, all, module.Points, module.Recorded, module.Recovered, module.Points-module.Recovered-module.Failed, module.Failed)
	return b.String()
}

const (
	crashBegin = "<!-- crash: make crash CRASH=-crash.write writes this table -->\n"
	crashEnd   = "<!-- end of crash -->\n"
)

func (f crashFigures) write(t *testing.T) {
	t.Helper()
	if *crashEvery != 1 {
		t.Fatal("-crash.write is for the whole: -crash.every 1")
	}
	raw, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	before, _, after := splitREADME(t, crashBegin, crashEnd)
	for path, content := range map[string]string{crashFile: string(raw) + "\n", readmeFile: before + f.table() + after} {
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// The README's table is what the committed result of the crash matrix renders to, and
// that result is whole: every story, every kind, every point, and each recovered.
func TestREADMECrash(t *testing.T) {
	t.Parallel()
	f := readCrashFigures(t)
	_, table, _ := splitREADME(t, crashBegin, crashEnd)
	if diff := cmp.Diff(f.table(), table); diff != "" {
		t.Errorf("README.md is not what testdata/crash.json says, make crash CRASH=-crash.write writes both (-json +README):\n%s", diff)
	}
	if len(f) != len(crashStories) {
		t.Fatalf("the committed figures are of %d stories, there are %d", len(f), len(crashStories))
	}
	for i, flow := range f {
		if flow.Name != crashStories[i].flow || len(flow.Kinds) != len(promised) {
			t.Fatalf("figures of %q, %d kinds, where %q with %d is wanted", flow.Name, len(flow.Kinds), crashStories[i].flow, len(promised))
		}
		for n, kind := range flow.Kinds {
			if kind.Points != kind.Recorded || kind.Recovered != kind.Points || kind.Orphans != 0 {
				t.Errorf("%s, %s: %d recorded, %s", flow.Name, promised[n].name, kind.Recorded, kind)
			}
		}
	}
}
