package main

// The rules of output: results go to stdout and nothing else does; everything
// for a person goes to stderr, as "est-enroll: …", "est-enroll: warning: …",
// "est-enroll: error: …" and "est-enroll: hint: …", a thing to do. A run that
// succeeds is silent on stderr unless that is a terminal, or with -v. Nothing
// but this file writes to either.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"

	"golang.org/x/term"

	"estenroll"
)

type output struct {
	stdout, stderr io.Writer
	// about is the credential that each line is about, "" where there is one.
	about string
	// lost is the first error of writing a result.
	lost           error
	terminal       bool
	quiet, verbose bool
}

func newOutput(stdout, stderr io.Writer) *output {
	o := &output{stdout: stdout, stderr: stderr}
	if file, ok := stderr.(*os.File); ok {
		o.terminal = term.IsTerminal(int(file.Fd()))
	}
	return o
}

// progress shows a step of the lifecycle with its time.
func (o *output) progress(event estenroll.Event) {
	switch {
	case o.quiet:
	case event.Warning:
		o.line("warning: ", event.Message)
	case !o.terminal && !o.verbose:
	case event.Elapsed > 0:
		o.line("", fmt.Sprintf("%-8s %6.2fs  %s", event.Step, event.Elapsed.Seconds(), event.Message))
	default:
		o.line("", fmt.Sprintf("%-8s          %s", event.Step, event.Message))
	}
}

// line prints a line of a kind: "", "warning: ", "error: " or "hint: ".
func (o *output) line(kind, text string) {
	_, _ = fmt.Fprintf(o.stderr, "est-enroll: %s%s\n", kind, printable(strings.ReplaceAll(o.named(text), "\n", ": ")))
}

// printable keeps what came from a network, a token or a file from steering the
// terminal: no control characters, none that turn the direction of writing.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r != unicode.ReplacementChar && unicode.IsPrint(r) {
			return r
		}
		return '.'
	}, text)
}

// hook prints a line of a hook's output.
func (o *output) hook(name, text string) {
	if !o.quiet {
		o.line("hook-"+name+": ", text)
	}
}

// prompt prints a part of a question to a person, whatever else is said.
func (o *output) prompt(text string) { _, _ = io.WriteString(o.stderr, text) }

// named puts the name of the credential before what is said of it.
func (o *output) named(text string) string {
	if o.about == "" {
		return text
	}
	return o.about + ": " + text
}

func (o *output) warning(text string) { o.progress(estenroll.Event{Warning: true, Message: text}) }

// result prints a line of the outcome.
func (o *output) result(format string, args ...any) {
	if o.quiet {
		return
	}
	if _, err := fmt.Fprintln(o.stdout, printable(o.named(fmt.Sprintf(format, args...)))); err != nil && o.lost == nil {
		o.lost = fmt.Errorf("write the result: %w", err)
	}
}

// fail prints an error with what to do about it and returns the exit code.
func (o *output) fail(err error, interrupted bool) int {
	if told, ok := err.(*toldError); ok {
		return told.code
	}
	judged := judge(err, interrupted)
	if judged.code == exitInterrupted && errors.Is(err, context.Canceled) {
		err = errors.New("interrupted") // where, is in the journal
	}
	if judged.code == exitPending {
		// Not an error: the one thing that is said even so, unless quiet.
		if !o.quiet {
			o.line("", oneLine(err))
		}
	} else {
		o.line("error: ", oneLine(err))
	}
	if judged.hint != "" && !o.quiet {
		o.line("hint: ", judged.hint)
	}
	return judged.code
}

// oneLine joins errors that happened together.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// outcome prints what enroll or renew reached.
func (o *output) outcome(r *estenroll.Result) {
	if r == nil {
		o.result("nothing to do")
		return
	}
	until := stamp(r.Certificate.NotAfter)
	switch {
	case r.Kind == "":
		o.result("nothing to do: enrolled, the certificate is valid until %s", until)
	case !r.Changed:
		o.result("unchanged: the certificate is valid until %s", until)
	case r.Kind == estenroll.KindEnroll:
		o.result("enrolled: the certificate is valid until %s", until)
	case r.Kind == estenroll.KindRekey:
		o.result("rekeyed: the certificate is valid until %s", until)
	default:
		o.result("renewed: the certificate is valid until %s", until)
	}
	o.result("key:         %s", r.Key)
	o.result("certificate: %s", r.CertificateAddress)
}

// json prints a value for a program.
func (o *output) json(value any) error {
	encoder := json.NewEncoder(o.stdout)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	return encoder.Encode(value)
}

func (o *output) status(s *estenroll.Status) {
	switch {
	case s.Current == nil:
		o.result("state:        factory, first boot has not begun")
	case s.Enrolled:
		o.result("state:        enrolled")
	default:
		o.result("state:        not enrolled, the Security object points at the IDevID")
	}
	if s.Problem != "" {
		o.result("problem:      %s", s.Problem)
	}
	if s.Server != "" {
		o.result("EST server:   %s", s.Server)
	}
	if s.Clock != "" {
		o.result("clock:        %s", s.Clock)
	}
	if s.Current != nil {
		o.credential("", *s.Current)
	}
	for _, previous := range s.Previous {
		o.result("previous:")
		o.credential("  ", previous)
	}
	if r := s.Renewal; r != nil {
		if !r.Due.IsZero() {
			o.result("renewal due:  %s", stamp(r.Due))
		}
		next := stamp(r.NextAttempt)
		if r.State != estenroll.RenewalNotDue && r.State != estenroll.RenewalWaits {
			next = "at the next run"
		}
		o.result("next attempt: %s (%s)", next, r.State)
	}
	if a := s.FailedRekey; a != nil {
		o.result("rekey failed: at %s, the key is renewed instead: %s", stamp(a.Time), strings.ReplaceAll(a.Error, "\n", "; "))
	}
	if op := s.Pending; op != nil {
		o.result("unfinished:   %s at step %s, begun %s", op.Kind, op.Step, stamp(op.StartedAt))
		if !op.NotBefore.IsZero() {
			o.result("  pending:    the server has not decided, ask again at %s", stamp(op.NotBefore))
			if op.Detail != "" {
				o.result("  its text:   %q", op.Detail)
			}
		}
	}
	if a := s.LastAttempt; a != nil {
		o.result("last attempt: %s %s at %s", a.Kind, a.Result, stamp(a.Time))
		if a.Error != "" {
			o.result("  error:      %s", strings.ReplaceAll(a.Error, "\n", "; "))
		}
	}
}

func (o *output) credential(indent string, c estenroll.CredentialStatus) {
	line := func(name, value string) {
		if value != "" {
			o.result("%s%-13s %s", indent, name+":", value)
		}
	}
	line("subject", c.Subject)
	line("issuer", c.Issuer)
	line("serial", c.Serial)
	if !c.NotAfter.IsZero() {
		line("valid", stamp(c.NotBefore)+" to "+stamp(c.NotAfter))
	}
	line("key type", string(c.KeyType))
	line("problem", c.Problem)
	line("key", c.Key)
	if c.ServerMade {
		line("key made", "by the server, outside of the HSM")
	}
	if a := c.KeyAttributes; a != nil {
		var words []string
		for _, attribute := range []struct {
			name  string
			value *bool
		}{{"private", a.Private}, {"sensitive", a.Sensitive}, {"extractable", a.Extractable}, {"always-sensitive", a.AlwaysSensitive},
			{"never-extractable", a.NeverExtractable}, {"local", a.Local}, {"sign", a.Sign}, {"decrypt", a.Decrypt}, {"unwrap", a.Unwrap}, {"derive", a.Derive}} {
			switch {
			case attribute.value == nil:
				words = append(words, attribute.name+"=?")
			default:
				words = append(words, fmt.Sprintf("%s=%t", attribute.name, *attribute.value))
			}
		}
		line("attributes", strings.Join(words, " "))
	}
	line("certificate", c.Certificate)
	for _, at := range c.Chain {
		line("chain", at)
	}
	for _, at := range c.Anchors {
		line("trust anchor", at)
	}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// usageError is a mistake in the command line, the environment or the file.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func isUsage(err error) bool {
	var usage *usageError
	return errors.As(err, &usage)
}
