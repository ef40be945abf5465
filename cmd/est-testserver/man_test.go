package main

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"estenroll/packaging/man"
)

var (
	manDir  = flag.String("man.dir", "", "write the manual pages to this directory")
	manDate = flag.String("man.date", "1970-01-01", "date of the manual pages")
)

// Each command has a page that groff and mandoc read without a warning; "make
// install" has this test write them.
func TestManPages(t *testing.T) {
	dir := *manDir
	if dir == "" {
		dir = t.TempDir()
	}
	if err := man.Generate(dir, command(), *manDate); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"est-testserver", "est-testserver-serve", "est-testserver-idevid", "est-testserver-fault", "est-testserver-rollover"} {
		page := filepath.Join(dir, name+".1")
		if err := man.Lint(page); err != nil {
			t.Error(err)
		}
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), ".SH DESCRIPTION\n") {
			t.Errorf("%s:\n%s", name, text)
		}
	}
}
