package main

import (
	"errors"

	"estenroll"
)

// parsed is the value of a flag that a function of a room below reads.
type parsed[T any] struct {
	text   string // as it was written, or the default
	value  T      // of the default: zero, which means the same there
	parse  func(string) (T, error)
	kind   string
	wanted string
}

func (p *parsed[T]) String() string { return p.text }
func (p *parsed[T]) Type() string   { return p.kind }

// Set keeps what was there where a text is not understood, and does not repeat it.
func (p *parsed[T]) Set(text string) error {
	value, err := p.parse(text)
	if err != nil {
		return errors.New("want " + p.wanted)
	}
	p.text, p.value = text, value
	return nil
}

func (p *parsed[T]) wants() string { return p.wanted }

// policy is when to renew.
func (s *settings) policy() estenroll.Policy {
	return estenroll.Policy{
		NominalUsage: s.nominalUsage.value, MaxMargin: s.maxMargin.value, Attempts: int(s.attempts), NoJitter: s.noJitter, RekeyEvery: int(s.rekeyEvery),
	}
}
