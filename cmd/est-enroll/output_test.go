package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"unicode"

	"estenroll"
)

// Whatever is printed, no text of another's steers the terminal.
func TestOutputIsPrintable(t *testing.T) {
	const text = "a\x1b[2J\u202e\x9bb\xff"
	var stdout, stderr bytes.Buffer
	out := newOutput(&stdout, &stderr)
	out.progress(estenroll.Event{Message: text, Warning: true})
	out.fail(errors.New(text), false)
	out.status(&estenroll.Status{LastAttempt: &estenroll.Attempt{Error: text}})
	for name, got := range map[string]string{"stdout": stdout.String(), "stderr": stderr.String()} {
		if strings.ContainsFunc(got, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) || r == unicode.ReplacementChar }) || !strings.Contains(got, "a.[2J..b.") {
			t.Errorf("%s: %q", name, got)
		}
	}
}
