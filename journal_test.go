package estenroll

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"estenroll/engine"
	"estenroll/engine/pkcs11"
)

var parseAddress = engine.Drivers{"pkcs11": pkcs11.Driver}.Parse

// journals are the journals of a version that runs of this package's tests left
// at each step: what a version of this program has written, later ones read.
func journals(t testing.TB, version int) map[string]string {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("testdata/journal/version%d/*.json", version))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no journals in testdata: %v", err)
	}
	all := map[string]string{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(path)] = string(data)
	}
	return all
}

// saved returns the bytes that a journal is saved as.
func saved(t testing.TB, j *journal) string {
	t.Helper()
	data, err := j.encode()
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestJournalOfEachStep(t *testing.T) {
	steps, kinds := map[Step]bool{}, map[Kind]bool{}
	for name, text := range journals(t, 2) {
		j, err := parseJournal([]byte(text), parseAddress)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(text, saved(t, j)); diff != "" {
			t.Errorf("%s is saved otherwise (-read +saved):\n%s", name, diff)
		}
		for _, r := range j.Credentials {
			if r.Operation != nil {
				steps[r.Operation.Step], kinds[r.Operation.Kind] = true, true
			}
		}
	}
	for _, step := range []Step{StepGenerate, StepRequest, StepImport, StepStore, StepProve, StepCommit, StepRetire, StepDiscard, StepReset} {
		if !steps[step] {
			t.Errorf("no journal of step %s", step)
		}
	}
	for _, kind := range []Kind{KindEnroll, KindRenew, KindRekey, KindReset} {
		if !kinds[kind] {
			t.Errorf("no journal of kind %s", kind)
		}
	}
}

// A journal of version 1 has one credential without a name. It is saved as
// version 2 says the same.
func TestJournalOfVersion1(t *testing.T) {
	today := journals(t, 2)
	for name, text := range journals(t, 1) {
		j, err := parseJournal([]byte(text), parseAddress)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		j.rename(unnamed, "device")
		if diff := cmp.Diff(today[name], saved(t, j)); diff != "" {
			t.Errorf("%s is saved otherwise (-version 2 +saved):\n%s", name, diff)
		}
	}
}

// What this program can write it can read: all credentials that a device may have,
// each with as many pairs and with a chain as long as two answers of 64 KiB can give.
func TestJournalLargest(t *testing.T) {
	at, err := parseAddress("pkcs11:token=" + strings.Repeat("t", 32) + ";object=" + strings.Repeat("o", 64) + ";id=" + strings.Repeat("%00", 32) + ";type=cert")
	if err != nil {
		t.Fatal(err)
	}
	j := &journal{Version: journalVersion, Credentials: map[string]*record{}}
	places := slices.Repeat([]reference{{Address: at}}, maxChain)
	pair := credential{Key: places[0], Certificates: places, ExplicitTA: "explicit-ta-0123456789abcdef.pem"}
	pair.Anchors = slices.Repeat([]anchorReference{{SHA256: strings.Repeat("0", 64), Address: places[0]}}, maxAnchors)
	for i := range maxCredentials {
		j.Credentials[fmt.Sprint("device", i)] = &record{
			Pairs: slices.Repeat([]credential{pair}, maxPairs),
			Operation: &operation{
				Kind: KindEnroll, Step: StepStore, Key: places[0], CSR: make([]byte, 8<<10), Certificates: places,
				Chain: slices.Repeat([][]byte{make([]byte, 2*64<<10/maxChain)}, maxChain), ServerCertificate: make([]byte, 64<<10), Anchors: pair.Anchors,
			},
			LastAttempt: &Attempt{Error: strings.Repeat("\x00", maxRecorded)},
			FailedRekey: &Attempt{Error: strings.Repeat("\x00", maxRecorded)},
		}
	}
	if _, err := parseJournal([]byte(saved(t, j)), parseAddress); err != nil {
		t.Error(err)
	}
}

// What this program never writes is refused, and not touched.
func TestJournalRefused(t *testing.T) {
	proving := journals(t, 2)["prove.json"]
	replace := func(old, replacement string) string {
		if !strings.Contains(proving, old) {
			t.Fatalf("prove.json does not contain %s", old)
		}
		return strings.Replace(proving, old, replacement, 1)
	}
	for name, c := range map[string]struct{ text, why string }{
		"empty":               {"", "not JSON"},
		"null":                {"null", "version 0"},
		"version":             {replace(`"version": 2`, `"version": 3`), "this program reads versions 1 to 2"},
		"unknown field":       {replace(`"version": 2`, `"version": 2, "more": 1`), "unknown field"},
		"field of version 1":  {replace(`"version": 2`, `"version": 2, "operation": {}`), "unknown field"},
		"field of version 2":  {`{"version": 1, "credentials": {}}`, "cannot unmarshal"},
		"no record":           {`{"version": 2, "credentials": {"device": null}}`, "no record"},
		"no name":             {`{"version": 2, "credentials": {"": {}}}`, "want a name"},
		"a path for a name":   {`{"version": 2, "credentials": {"../device": {}}}`, "want a name"},
		"too many names":      {`{"version": 2, "credentials": {` + manyRecords() + `}}`, "17 credentials"},
		"more data":           {proving + "{}", "after top-level value"},
		"more than allowed":   {proving + strings.Repeat(" ", journalLimit), "too large"},
		"unknown step":        {replace(`"step": "prove"`, `"step": "guess"`), "unknown step"},
		"unknown kind":        {replace(`"kind": "enroll"`, `"kind": "reissue"`), "unknown kind"},
		"unknown key type":    {replace(`"new_key": true`, `"new_key": true, "key_type": "RSA 1024"`), "unknown key_type"},
		"a rekey, no new key": {strings.Replace(replace(`"kind": "enroll"`, `"kind": "rekey"`), `"new_key": true`, `"new_key": false`, 1), "without a new key"},
		"a key of two kinds":  {replace(`"new_key": true`, `"new_key": true, "existing_key": true`), "both new and an existing one"},
		"an import of ours":   {replace(`"step": "prove"`, `"step": "import"`), "a key that no server made"},
		"a path":              {replace(`"explicit_ta": "explicit-ta-`, `"explicit_ta": "../explicit-ta-`), "not the name"},
		"negative wait":       {replace(`"step": "prove"`, `"step": "prove", "retry_after": -1`), "negative"},
		"fewer renewals":      {replace(`"new_key": true`, `"new_key": true, "renewals": -1`), "negative"},
		"a pair with fewer":   {`{"version": 2, "credentials": {"device": {"pairs": [{"key": "pkcs11:id=%01", "certificates": ["pkcs11:id=%01"], "renewals": -1}]}}}`, "negative"},
		"an anchor of a path": {replace(`"server_certificate"`, `"anchors": [{"sha256": "../x", "address": "pkcs11:id=%01"}], "server_certificate"`), "the sha256 of a trust anchor"},
		"an anchor nowhere":   {replace(`"server_certificate"`, `"anchors": [{"sha256": "`+strings.Repeat("0", 64)+`", "address": ""}], "server_certificate"`), "no driver"},
		"too many anchors":    {`{"version": 2, "credentials": {"device": {"pairs": [{"key": "pkcs11:id=%01", "certificates": ["pkcs11:id=%01"], "anchors": [` + strings.Repeat(`{},`, maxAnchors) + `{}]}]}}}`, "9 trust anchors"},
		"another scheme":      {replace(`"key": "pkcs11:`, `"key": "http:`), "no driver"},
		"no address":          {replace(`"key": "pkcs11:`, `"key": "`), "no driver"},
		"an empty chain":      {`{"version": 2, "credentials": {"device": {"operation": {"kind": "enroll", "step": "store", "key": "pkcs11:id=%01"}}}}`, "no certificate at step"},
		"too many":            {`{"version": 2, "credentials": {"device": {"pairs": [` + strings.Repeat(`{},`, maxPairs) + `{}]}}}`, "17 pairs"},
		"a bare pair":         {`{"version": 2, "credentials": {"device": {"pairs": [{"key": "pkcs11:id=%01"}]}}}`, "0 certificates"},
		"a reset that renews": {replace(`"kind": "enroll"`, `"kind": "reset"`), "reset at step"},
		"no key":              {`{"version": 2, "credentials": {"device": {"operation": {"kind": "enroll", "step": "request"}}}}`, "no driver"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, journalName)
			if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := loadJournal(dir, parseAddress)
			if err == nil || !strings.Contains(err.Error(), c.why) {
				t.Errorf("error %v, want %q", err, c.why)
			}
			if !errors.Is(err, ErrState) {
				t.Errorf("error %v, want ErrState", err)
			}
		})
	}
}

func manyRecords() string {
	var names []string
	for i := range maxCredentials + 1 {
		names = append(names, fmt.Sprintf(`"device-%d": {}`, i))
	}
	return strings.Join(names, ", ")
}

// A journal is refused or, saved and read again, the same.
func FuzzJournal(f *testing.F) {
	for version := 1; version <= journalVersion; version++ {
		for _, text := range journals(f, version) {
			f.Add([]byte(text))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 64<<10 {
			t.Skip("the escapes of JSON can make what is saved larger than what may be read")
		}
		j, err := parseJournal(data, parseAddress)
		if err != nil {
			return
		}
		if j.Credentials[unnamed] != nil {
			j.rename(unnamed, "device")
		}
		first := saved(t, j)
		again, err := parseJournal([]byte(first), parseAddress)
		if err != nil {
			t.Fatalf("what was saved is refused: %v\n%s", err, first)
		}
		if diff := cmp.Diff(first, saved(t, again)); diff != "" {
			t.Errorf("saved twice (-first +second):\n%s", diff)
		}
	})
}
