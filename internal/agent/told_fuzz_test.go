package agent

import (
	"encoding/json"
	"testing"
)

// FuzzTold holds the memory's parser to what it lets through: names and fingerprints,
// which it writes as it reads them.
func FuzzTold(f *testing.F) {
	const fingerprint = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, seed := range []string{`{"version":1}`, `{"version":1,"told":{"device":"` + fingerprint + `"}}`, `{"version":1,"told":{"a":""}}`, `{"version":1}{}`, `[]`, ``} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseTold(data)
		if err != nil {
			return
		}
		again, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		second, err := parseTold(again)
		if err != nil || len(second.Told) != len(got.Told) {
			t.Errorf("%s: %v", again, err)
		}
		for name, value := range got.Told {
			if second.Told[name] != value || len(value) != 64 {
				t.Errorf("%s: %q, then %q", name, value, second.Told[name])
			}
		}
	})
}
