package main

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"estenroll/packaging/man"
)

var (
	manDir  = flag.String("man.dir", "", "write the manual pages to this directory")
	manDate = flag.String("man.date", "1970-01-01", "date of the manual pages")
)

// manualPages writes the pages that ship: of each command, and of the
// configuration file.
func manualPages(t *testing.T, dir string) *cobra.Command {
	t.Helper()
	root := command(new(settings), newOutput(os.Stdout, os.Stderr), func() {})
	if err := man.Generate(dir, root, *manDate); err != nil {
		t.Fatal(err)
	}
	var example strings.Builder
	if err := writeExample(&example, root.PersistentFlags()); err != nil {
		t.Fatal(err)
	}
	page := man.Page{Name: "est-enroll.yaml", Section: "5", Date: *manDate, Text: `.SH NAME
est\-enroll.yaml \- configuration of est\-enroll
.SH DESCRIPTION
The file is ` + man.Escape(defaultConfig) + `, or what \-\-config or EST_ENROLL_CONFIG names. It is YAML: one mapping
from the names of settings, which are those of the flags of
.BR est\-enroll (1),
to values or lists of values. An unknown name, or one that is there twice, is an error. A flag goes before a
variable of the environment, which goes before the file.
.PP
This is what
.B est\-enroll config \-\-example
prints: every setting with its default, or an example where it has none.
.SH EXAMPLE
` + man.Verbatim(example.String()) + `.SH SEE ALSO
.BR est\-enroll (1)
`}
	if err := page.Write(dir); err != nil {
		t.Fatal(err)
	}
	return root
}

// Each command has a page that groff and mandoc read without a warning; "make
// install" has this test write them.
func TestManPages(t *testing.T) {
	dir := *manDir
	if dir == "" {
		dir = t.TempDir()
	}
	root := manualPages(t, dir)
	pages, err := filepath.Glob(filepath.Join(dir, "est-enroll*"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, page := range pages {
		if err := man.Lint(page); err != nil {
			t.Error(err)
		}
		// What a reader sees, on lines that are not broken.
		shown, err := exec.Command("mandoc", "-T", "ascii", "-O", "width=1000", page).Output()
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(page)] = overstruck.ReplaceAllString(string(shown), "")
	}
	for _, c := range root.Commands() {
		if c.Name() == "completion" || c.Name() == "help" {
			continue
		}
		page, found := all["est-enroll-"+c.Name()+".1"]
		if !found || !strings.Contains(page, c.Short) {
			t.Errorf("no page of %s among %d: %q", c.Name(), len(all), page)
		}
	}
	for _, line := range strings.Split(exitCodeHelp, "\n")[1:] {
		if !strings.Contains(all["est-enroll.1"], line) {
			t.Errorf("est-enroll(1) has no line %q", line)
		}
	}
}

// overstruck is how a terminal of paper made bold letters.
var overstruck = regexp.MustCompile(`.\x08`)
