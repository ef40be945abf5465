// Package man makes the manual pages of a command line from its commands, in the
// form that every man program reads (man(7)). It is a tool of the build: no
// shipped program contains it.
//
// Measured: cobra's own generator (cobra/doc v1.10.2 with go-md2man v2.0.6) loses
// text in angle brackets, runs lists of exit codes together and gives one warning
// of mandoc for each flag.
package man

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Generate writes a page of section 1 for a command and each of its subcommands,
// named for the words of the command line. The date is that of the sources,
// 2006-01-02.
func Generate(dir string, root *cobra.Command, date string) error {
	root.InitDefaultVersionFlag()
	for _, command := range append([]*cobra.Command{root}, described(root)...) {
		command.InitDefaultHelpFlag()
		page := Page{Name: pageName(command), Section: "1", Date: date, Text: text(command)}
		if err := page.Write(dir); err != nil {
			return err
		}
	}
	return nil
}

// Page is one manual page.
type Page struct {
	Name, Section, Date string
	Text                string // in man(7), from the NAME on
}

// Write writes the page as Name.Section.
func (p Page) Write(dir string) error {
	head := fmt.Sprintf(".TH %s %s %s\n", strings.ToUpper(p.Name), p.Section, p.Date)
	if err := os.WriteFile(filepath.Join(dir, p.Name+"."+p.Section), []byte(head+p.Text), 0o644); err != nil {
		return fmt.Errorf("write manual page: %w", err)
	}
	return nil
}

// Lint has both of Debian's formatters read a page: each of their warnings is an error.
func Lint(page string) error {
	var failed []error
	for _, tool := range [][]string{{"mandoc", "-T", "lint", "-W", "warning"}, {"groff", "-ww", "-z", "-man", "-T", "utf8"}} {
		if out, err := exec.Command(tool[0], append(tool[1:], page)...).CombinedOutput(); err != nil || len(out) > 0 {
			failed = append(failed, fmt.Errorf("%s %s: %w: %s", tool[0], page, err, out))
		}
	}
	return errors.Join(failed...)
}

// described are the subcommands that have pages: those that are not about the
// command line itself.
func described(root *cobra.Command) (commands []*cobra.Command) {
	for _, c := range root.Commands() {
		if c.IsAvailableCommand() && c.Name() != "help" && c.Name() != "completion" {
			commands = append(commands, c)
		}
	}
	return commands
}

func pageName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

func text(c *cobra.Command) string {
	var b strings.Builder
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", Escape(pageName(c)), Escape(c.Short))
	b.WriteString(".SH SYNOPSIS\n")
	for i, form := range append([]*cobra.Command{c}, described(c)...) {
		if i > 0 {
			b.WriteString(".br\n")
		}
		b.WriteString(".B " + Escape(form.CommandPath()) + "\n" + Escape(strings.TrimPrefix(form.UseLine(), form.CommandPath()+" ")) + "\n")
	}
	b.WriteString(".SH DESCRIPTION\n" + Paragraphs(c.Long))
	if c.Example != "" {
		b.WriteString(".SH EXAMPLES\n" + verbatim(strings.Split(c.Example, "\n")))
	}
	if flags := c.NonInheritedFlags(); flags.HasAvailableFlags() {
		b.WriteString(".SH OPTIONS\n" + options(flags))
	}
	if c.HasParent() {
		fmt.Fprintf(&b, ".PP\nThe flags of\n.BR %s (1)\nare understood here too.\n", Escape(pageName(c.Root())))
		fmt.Fprintf(&b, ".SH EXIT STATUS\nThat of\n.BR %s (1).\n", Escape(pageName(c.Root())))
	}
	b.WriteString(".SH SEE ALSO\n" + seeAlso(c))
	return b.String()
}

func seeAlso(c *cobra.Command) string {
	var pages []string
	for _, other := range append([]*cobra.Command{c.Root()}, described(c.Root())...) {
		if other != c {
			pages = append(pages, ".BR "+Escape(pageName(other))+" (1)")
		}
	}
	return strings.Join(pages, ",\n") + "\n"
}

func options(flags *pflag.FlagSet) string {
	var b strings.Builder
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		kind, usage := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		b.WriteString(".TP\n\\fB" + Escape(name) + "\\fR")
		switch {
		case f.NoOptDefVal != "" && kind != "":
			b.WriteString("[=\\fI" + Escape(kind) + "\\fR]")
		case kind != "":
			b.WriteString(" \\fI" + Escape(kind) + "\\fR")
		}
		b.WriteString("\n" + Escape(usage))
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "[]" && f.DefValue != "0s" && !strings.Contains(usage, "default") {
			b.WriteString(" (default: " + Escape(f.DefValue) + ")")
		}
		b.WriteString("\n")
	})
	return b.String()
}

var exitStatus = regexp.MustCompile(`(?s)^Exit (?:codes|status):[ \n]?(.*)$`)

// Paragraphs are the paragraphs of a help text: indented lines stay as they are,
// and the paragraph of the exit codes gets a heading of its own.
func Paragraphs(help string) string {
	var b strings.Builder
	for paragraph := range strings.SplitSeq(help, "\n\n") {
		paragraph = strings.Trim(paragraph, "\n")
		if match := exitStatus.FindStringSubmatch(paragraph); match != nil {
			b.WriteString(".SH EXIT STATUS\n")
			paragraph = match[1]
		} else {
			b.WriteString(".PP\n")
		}
		var filled, indented []string
		flush := func() {
			for _, line := range filled {
				b.WriteString(Escape(line) + "\n")
			}
			if len(indented) > 0 {
				b.WriteString(verbatim(indented))
			}
			filled, indented = nil, nil
		}
		for line := range strings.SplitSeq(paragraph, "\n") {
			if strings.HasPrefix(line, "  ") {
				indented = append(indented, line)
				continue
			}
			if len(indented) > 0 {
				flush()
			}
			filled = append(filled, line)
		}
		flush()
	}
	return strings.TrimPrefix(b.String(), ".PP\n")
}

// verbatim keeps lines as they are.
func verbatim(lines []string) string {
	var b strings.Builder
	b.WriteString(".EX\n")
	for _, line := range lines {
		b.WriteString(Escape(line) + "\n")
	}
	b.WriteString(".EE\n")
	return b.String()
}

// Verbatim keeps a text as it is.
func Verbatim(text string) string {
	return verbatim(strings.Split(strings.TrimSuffix(text, "\n"), "\n"))
}

// Escape is text that means itself in a page: ASCII, no request, no escape, and
// hyphens that can be copied to a command line.
func Escape(text string) string {
	var b strings.Builder
	for i, r := range text {
		switch {
		case r == '\\':
			b.WriteString(`\e`)
		case r == '-':
			b.WriteString(`\-`)
		case (r == '.' || r == '\'') && i == 0:
			b.WriteString(`\&` + string(r))
		case r > '~':
			fmt.Fprintf(&b, `\[u%04X]`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
