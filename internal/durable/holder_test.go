package durable

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// FuzzHolder holds the parser of lock files, which all users of a token write to,
// to what writeHolder writes: what it takes is that, to the byte, and printable.
func FuzzHolder(f *testing.F) {
	for _, seed := range []string{
		"4711 123456 2026-11-24T23:30:00Z est-enroll renew\n", "4711 0 1970-01-01T00:00:07Z x\n", "", "\n", "4711 0 est-enroll\n",
		"4711  2026-11-24T23:30:00Z est-enroll\n", "-1 0 2026-11-24T23:30:00Z \x1b[31m\n", "1 0 2026-11-24T23:30:00Z " + strings.Repeat("x", 200),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, content string) {
		holder, start, ok := parseHolder(content)
		if !ok {
			if holder != (Holder{}) {
				t.Errorf("%+v of what is refused", holder)
			}
			return
		}
		if again := fmt.Sprintf("%d %s %s %s\n", holder.PID, start, holder.Since.Format(time.RFC3339), holder.Command); again != content || len(content) > holderLimit {
			t.Errorf("%q is taken, and is not %q", content, again)
		}
		if said := holder.String(); holder.PID <= 0 || len(said) > 2*holderLimit || strings.ContainsFunc(said, func(c rune) bool { return c < ' ' || c > '~' }) {
			t.Errorf("%q is said", said)
		}
	})
}
