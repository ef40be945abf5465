package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"estenroll/engine/enginetest/softhsm"
)

// TestFleet starts the program, as it ships, on sixteen devices at once, each with
// a token of its own, against one server: a first boot, then a renewal. Each
// device gets what it asked for, once, by the server's record and in the eyes of
// pkcs11-tool.
func TestFleet(t *testing.T) {
	t.Parallel()
	const size = 16
	m := newMatrix(t)
	devices := make([]*crashDevice, size)
	together := func(do func(i int) error) {
		t.Helper()
		var all sync.WaitGroup
		var failures [size]error
		for i := range devices {
			all.Go(func() { failures[i] = do(i) })
		}
		all.Wait()
		for i, err := range failures {
			if err != nil {
				t.Errorf("device %d: %v", i, err)
			}
		}
	}

	var factory sync.Mutex // makes one IDevID at a time
	for i := range devices {
		token := softhsm.New(t, softhsm.WithPIN(markerPIN))
		devices[i] = &crashDevice{matrix: &matrix{bin: m.bin, token: token, server: m.server}, dir: filepath.Dir(token.Dir), subject: fmt.Sprintf("CN=fleet-%d", i)}
	}
	together(func(i int) error {
		return devices[i].matrix.token.StoreIDevID(func(publicKey []byte) ([]byte, error) {
			factory.Lock()
			defer factory.Unlock()
			return m.server.signIDevID(publicKey)
		})
	})

	for n, args := range [][]string{{"enroll"}, {"renew", "--force"}} {
		together(func(i int) error {
			out, err := devices[i].run(t, args...)
			if strings.Contains(out, markerPIN) {
				t.Errorf("device %d: the PIN is in the output", i)
			}
			if err != nil {
				return fmt.Errorf("%w\n%s", err, out)
			}
			return nil
		})
		issued := map[string][]issuance{}
		for _, one := range m.issuances(t) {
			issued[one.Subject] = append(issued[one.Subject], one)
		}
		if len(issued) != size {
			t.Errorf("%s: the server issued for %d subjects, want %d", args[0], len(issued), size)
		}
		for _, d := range devices {
			own := issued[d.subject]
			if len(own) != n+1 {
				t.Errorf("%s: the server issued %d certificates for %s, want %d", args[0], len(own), d.subject, n+1)
			}
			wrong := new(findings)
			if d.judge(t, crashStory{leaves: n + 1, keys: 1}, own, wrong); len(wrong.text) > 0 {
				t.Errorf("%s: %s:\n%s", args[0], d.subject, strings.Join(wrong.text, "\n"))
			}
		}
	}
}
