package main

import (
	"testing"
	"time"

	"github.com/spf13/pflag"

	"estenroll"
)

// What the settings show as the default of the policy is what is done without them.
func TestPolicyDefaults(t *testing.T) {
	t.Parallel()
	s, flags := new(settings), pflag.NewFlagSet("", pflag.ContinueOnError)
	s.register(flags)
	begin := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, lifetime := range []time.Duration{time.Hour, 90 * 24 * time.Hour, 3652 * 24 * time.Hour} {
		want := (estenroll.Policy{}).Schedule(begin, begin.Add(lifetime), nil)
		if got := s.policy().Schedule(begin, begin.Add(lifetime), nil); got != want {
			t.Errorf("unset: %+v, want %+v", got, want)
		}
		for _, name := range []string{"nominal-usage", "max-margin", "attempts", "no-jitter"} {
			if err := flags.Set(name, flags.Lookup(name).DefValue); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.policy().Schedule(begin, begin.Add(lifetime), nil); got != want {
			t.Errorf("set to what is shown: %+v, want %+v", got, want)
		}
	}
}
