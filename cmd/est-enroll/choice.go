package main

import (
	"errors"
	"slices"
	"strings"
)

// choice is the value of a flag that is one of a few words.
type choice struct {
	word    string
	allowed []string
}

func (c *choice) String() string { return c.word }
func (c *choice) Type() string   { return strings.Join(c.allowed, "|") }

func (c *choice) Set(word string) error {
	if !slices.Contains(c.allowed, word) {
		return errors.New("want " + c.wanted())
	}
	c.word = word
	return nil
}

func (c *choice) wanted() string { return "one of " + strings.Join(c.allowed, ", ") }
