package agent

import (
	"bytes"
	"encoding/json"
	"testing"
)

// FuzzLines holds what a hook prints to its bounds, whatever it is and however it comes.
func FuzzLines(f *testing.F) {
	f.Add([]byte("one\ntwo"), 1)
	f.Add(bytes.Repeat([]byte("x"), 3000), 1000)
	f.Add(bytes.Repeat([]byte("\n"), 300), 7)
	f.Fuzz(func(t *testing.T, data []byte, size int) {
		told := 0
		l := &lines{tell: func(line string) {
			if told++; len(line) > maxHookLine+len("…") || told > maxHookLines+1 {
				t.Errorf("line %d of %d bytes", told, len(line))
			}
		}}
		for rest := data; len(rest) > 0; {
			chunk := rest[:min(max(size, 1), len(rest))]
			if n, err := l.Write(chunk); n != len(chunk) || err != nil {
				t.Fatalf("%d of %d, %v", n, len(chunk), err)
			}
			if rest = rest[len(chunk):]; len(l.line) > maxHookLine+1 {
				t.Fatalf("%d bytes are kept", len(l.line))
			}
		}
		l.flush()
		if want := min(bytes.Count(data, []byte("\n"))+1, maxHookLines+1); told != want && !(told == want-1 && (len(data) == 0 || data[len(data)-1] == '\n')) {
			t.Errorf("%d lines, want %d", told, want)
		}
	})
}

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
