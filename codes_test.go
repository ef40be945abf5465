package estenroll_test

import (
	"errors"
	"testing"

	"estenroll"
	"estenroll/est"
	"estenroll/testserver"
)

// What a run makes of each code that a server answers to a CSR (RFC 9148 §4.5): the request
// is given up, with all that it has made, where the server refuses it, and kept for the
// next run, which sends the same CSR, where the server has a problem of its own or asks for
// patience.
func TestAnswerCodes(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "codes")
	d.mustEnroll()
	const (
		givenUp = iota
		kept
		pending
	)
	for code, want := range map[string]int{
		"4.00": givenUp, "4.01": givenUp, "4.03": givenUp, "4.04": givenUp, "4.05": givenUp, "4.06": givenUp, "4.08": givenUp,
		"4.12": givenUp, "4.13": givenUp, "4.15": givenUp,
		"5.00": kept, "5.01": kept, "5.02": kept, "5.04": kept, "5.05": kept,
		"4.29": pending, "5.03": pending,
	} {
		t.Run(code, func(t *testing.T) {
			d.t = t
			site.faults(t, testserver.Faults{Answer: code})
			before := d.snapshot()
			_, err := d.renew()
			var patience *estenroll.PendingError
			var status *est.StatusError
			if errors.As(err, &patience) != (want == pending) || errors.As(err, &status) == (want == pending) {
				t.Errorf("got %v", err)
			}
			if left := d.journal().Operation != nil; left != (want != givenUp) {
				t.Errorf("an operation is left: %t", left)
			}
			if want == givenUp {
				d.unchangedSince(before)
				return
			}
			csr := d.csrs()
			if want == pending {
				if _, err := d.cancel(); err != nil { // it is not asked again so soon
					t.Fatal(err)
				}
				return
			}
			site.faults(t, testserver.Faults{})
			d.mustRenew()
			if again := d.csrs(); len(csr) != 1 || len(again) != 1 || csr[0] != again[0] {
				t.Errorf("the CSR is another one")
			}
		})
	}
}
