package main

import (
	"bytes"
	"errors"
	"io"
	"log"
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

// What libraries log goes nowhere: it may be of a key.
func TestNoStandardLog(t *testing.T) {
	var logged bytes.Buffer
	defer log.SetOutput(log.Writer())
	log.SetOutput(&logged)
	if code := run(t.Context(), []string{"--version"}, io.Discard, io.Discard); code != 0 {
		t.Errorf("exit code %d", code)
	}
	log.Print("a key")
	if logged.Len() > 0 {
		t.Errorf("logged %q", &logged)
	}
}
