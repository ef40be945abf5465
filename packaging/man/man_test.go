package man_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"estenroll/packaging/man"
)

// What a person wrote is what a reader sees, whatever it means to a formatter.
func TestGenerate(t *testing.T) {
	t.Parallel()
	root := &cobra.Command{Use: "tool", Short: "do things", Run: func(*cobra.Command, []string) {}, Long: `Tool does <things> at §4, with a back\slash.
.A line that looks like a request
'and another

Example:

  tool --flag=value \
    .dotted
  'quoted
and on.

Exit codes:
  0  done
  1  failed`}
	root.Flags().StringP("path", "p", "/etc/tool", "`file` of <angles>")
	sub := &cobra.Command{Use: "sub --force", Short: "do less", Long: "Sub does less.", Example: "  tool sub", Run: root.Run}
	sub.Flags().Bool("force", false, "do it")
	root.AddCommand(sub, &cobra.Command{Use: "secret", Hidden: true, Run: root.Run})
	dir := t.TempDir()
	if err := man.Generate(dir, root, "2026-01-02"); err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(pages) != 2 {
		t.Fatalf("%q, %v", pages, err)
	}
	want := map[string][]string{
		"tool.1": {
			"tool - do things\n", "tool [flags]\n", "tool sub --force [flags]\n",
			"Tool does <things> at §4, with a back\\slash.  .A line that looks like a request 'and another\n",
			"  tool --flag=value \\\n", "    .dotted\n", "  'quoted\n", "and on.\n", "EXIT STATUS\n", "  0  done\n", "  1  failed\n",
			"-p, --path file\n", "file of <angles> (default: /etc/tool)\n", "tool-sub(1)\n", "2026-01-02",
		},
		"tool-sub.1": {"tool-sub - do less\n", "tool sub --force [flags]\n", "--force", "  tool sub\n", "tool(1)\n"},
	}
	for _, page := range pages {
		if err := man.Lint(page); err != nil {
			t.Error(err)
		}
		out, err := exec.Command("mandoc", "-T", "utf8", "-O", "width=1000", page).Output()
		if err != nil {
			t.Fatal(err)
		}
		shown := regexp.MustCompile(`.\x08`).ReplaceAllString(string(out), "")
		for _, text := range want[filepath.Base(page)] {
			if !strings.Contains(shown, text) {
				t.Errorf("no %q in\n%s", text, shown)
			}
		}
	}
}

// A page that a formatter complains of is an error.
func TestLint(t *testing.T) {
	t.Parallel()
	for name, page := range map[string]string{"a request": ".TH TOOL 1 2026-01-02\n.SH NAME\ntool \\- x\n.SH DESCRIPTION\n.NOSUCH\n", "no title": "text\n"} {
		path := filepath.Join(t.TempDir(), "tool.1")
		if err := os.WriteFile(path, []byte(page), 0o600); err != nil {
			t.Fatal(err)
		}
		if man.Lint(path) == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
