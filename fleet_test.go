package estenroll_test

import (
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll"
)

var (
	fleetCount = flag.Int("fleet.n", 100000, "devices of the fleet")
	fleetSeed  = flag.Uint64("fleet.seed", 1, "seed of the times at which they are enrolled and run")
	fleetPlot  = flag.String("fleet.plot", "", "`file` for a plot of the attempts (SVG)")
)

const (
	fleetLifetime = 90 * day
	fleetRuns     = 5 * time.Minute // between two runs of a device's job
	fleetYear     = 365 * day
)

// fleet is what a server sees of devices, by the hour since the first was enrolled.
type fleet struct {
	attempts []int
	fellDue  int // in the outage
	expired  int
	longest  time.Duration // between the end of the outage and a device's renewal
}

// run lives the lives of devices that are enrolled in the course of a year, the
// policy's own code on a clock of its own; in an outage no attempt succeeds.
func (f *fleet) run(devices int, seed uint64, begin, outage, end time.Duration) {
	origin := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	f.attempts = make([]int, end/time.Hour+1)
	random := rand.New(rand.NewPCG(seed, seed))
	var policy estenroll.Policy
	for n := range devices {
		identity := binary.BigEndian.AppendUint64(nil, uint64(n))
		issued := origin.Add(time.Duration(random.Int64N(int64(fleetYear))))
		phase := time.Duration(random.Int64N(int64(fleetRuns)))
		last := issued
		for {
			s := policy.Schedule(issued, issued.Add(fleetLifetime), identity)
			if due := s.Due.Sub(origin); last.Equal(issued) && begin <= due && due < begin+outage {
				f.fellDue++
			}
			// The first run of the job at which the next attempt is due.
			next := s.Next(last).Sub(origin) - phase
			at := (next+fleetRuns-1)/fleetRuns*fleetRuns + phase
			if at > end {
				break
			}
			f.attempts[at/time.Hour]++
			last = origin.Add(at)
			if last.After(s.NotAfter) {
				f.expired++
				break
			}
			if at < begin || at >= begin+outage {
				if s.Due.Sub(origin) < begin+outage && at >= begin {
					f.longest = max(f.longest, at-begin-outage)
				}
				issued = last
			}
		}
	}
}

// peak is the busiest hour from an hour on.
func (f *fleet) peak(from time.Duration) int { return slices.Max(f.attempts[from/time.Hour:]) }

// A fleet of devices with certificates of 90 days and a server that is down for a
// day, and for a week: nobody expires, and those that fell due meanwhile do not
// come together when it is back.
func TestFleet(t *testing.T) {
	interval := (fleetLifetime / 10 / 10).Hours()
	var plots []*fleet
	for _, outage := range []time.Duration{day, 7 * day} {
		f := new(fleet)
		begin := fleetYear + 90*day
		f.run(*fleetCount, *fleetSeed, begin, outage, begin+outage+30*day)
		peak, bound := f.peak(begin+outage), 3*float64(f.fellDue)/interval
		t.Logf("seed %d: %d devices, an outage of %s: %d fell due, %d expired, peak hour after it %d attempts (bound %.0f), the last renewed %s after it",
			*fleetSeed, *fleetCount, outage, f.fellDue, f.expired, peak, bound, f.longest.Round(time.Minute))
		if f.fellDue < *fleetCount/200 {
			t.Errorf("%d devices fell due in %s", f.fellDue, outage)
		}
		if f.expired > 0 || float64(peak) > bound {
			t.Errorf("%d expired, %d attempts in the peak hour after an outage of %s; want none, and at most %.0f", f.expired, peak, outage, bound)
		}
		plots = append(plots, &fleet{attempts: f.attempts[(begin-2*day)/time.Hour:][:14*24]})
	}
	if *fleetPlot != "" {
		if err := os.WriteFile(*fleetPlot, []byte(plotFleets(plots)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// plotFleets draws attempts an hour, the outages beginning at the second day.
func plotFleets(fleets []*fleet) string {
	const width, height, hour = 720, 200, 2
	most := 1
	for _, f := range fleets {
		most = max(most, f.peak(0))
	}
	var svg strings.Builder
	fmt.Fprintf(&svg, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"12\">\n", width, height+40)
	fmt.Fprintf(&svg, "<text x=\"40\" y=\"14\">attempts an hour, most %d; outages of a day (blue) and of a week (orange) begin on day 2</text>\n", most)
	for i, f := range fleets {
		var points []string
		for h, n := range f.attempts {
			points = append(points, fmt.Sprintf("%d,%d", 40+h*hour, 20+height-n*height/most))
		}
		fmt.Fprintf(&svg, "<polyline fill=\"none\" stroke=\"%s\" points=\"%s\"/>\n", []string{"steelblue", "darkorange"}[i], strings.Join(points, " "))
	}
	for d := range 15 {
		fmt.Fprintf(&svg, "<text x=\"%d\" y=\"%d\">%d</text>\n", 36+d*24*hour, height+36, d)
	}
	svg.WriteString("</svg>\n")
	return svg.String()
}
