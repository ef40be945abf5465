package main

import (
	"errors"
	"slices"
	"strings"
)

// oneOf is the value of a flag that is one of a few words.
type oneOf struct {
	word    string
	allowed []string
}

func (c *oneOf) String() string { return c.word }
func (c *oneOf) Type() string   { return strings.Join(c.allowed, "|") }

func (c *oneOf) Set(word string) error {
	if !slices.Contains(c.allowed, word) {
		return errors.New("want " + c.wants())
	}
	c.word = word
	return nil
}

func (c *oneOf) wants() string { return "one of " + strings.Join(c.allowed, ", ") }
