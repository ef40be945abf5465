package estenroll_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"estenroll"
	"estenroll/testserver"
)

var (
	yearsCount = flag.Int("years.n", 1, "years that the device lives")
	yearsSeed  = flag.Uint64("years.seed", 1, "seed of the outages, the power cuts and the time of the job; 0 takes another one each time")
)

const (
	year       = 365 * day
	yearsLived = 90 * day // of a certificate
	yearsJob   = 8 * time.Hour
	outageOf   = 7 * day
)

// span is a time from the birth of the device on.
type span struct{ begin, end time.Duration }

func (s span) has(at time.Duration) bool { return s.begin <= at && at < s.end }

// life is what happens to a device, whose job runs by its own clock.
type life struct {
	*renewing
	random  *rand.Rand
	born    time.Time
	outages []span
	cuts    []span          // in which the power is cut once
	phases  []time.Duration // of the one rollover of the CA

	runs, attempts int
	done           map[estenroll.Kind]int
	cut            map[string]int // power cuts, by the point that they came at
	inWork         int            // those of them in runs that did something
	due, end       time.Time      // of the certificate
	least          time.Duration  // that was left of it
	// stranded is how often a run found no valid certificate although the server could
	// have been reached in the margin of the one that ended.
	stranded int
}

func newLife(t *testing.T, seed uint64, configure func(*device)) *life {
	t.Helper()
	l := &life{random: rand.New(rand.NewPCG(seed, seed)), done: map[estenroll.Kind]int{}, cut: map[string]int{}, least: yearsLived}
	l.renewing = newRenewing(t, "lived", yearsLived, func(d *device) {
		// The jitter is of the factory certificate, which is another one each time: without
		// it a seed gives the same years. It is the fleet that has it.
		d.cfg.Policy = estenroll.Policy{NoJitter: true, RekeyEvery: 4} // four of 81 days are a year
		if configure != nil {
			configure(d)
		}
	})
	l.born = l.clock.now()
	l.look()
	return l
}

// within is a random time of a span.
func (l *life) within(s span) time.Duration {
	return s.begin + time.Duration(l.random.Int64N(int64(s.end-s.begin)))
}

// plan has a week each quarter without a server, a power cut each month and one change
// of the CA's root, whose phases are longer than a certificate lives.
func (l *life) plan(end time.Duration) {
	for quarter := time.Duration(0); quarter < end; quarter += year / 4 {
		begin := l.within(span{quarter, quarter + year/4 - outageOf})
		l.outages = append(l.outages, span{begin, begin + outageOf})
	}
	for month := time.Duration(0); month < end; month += year / 12 {
		l.cuts = append(l.cuts, span{month, month + year/12})
	}
	announced := l.within(span{end / 2, end/2 + 60*day}) - min(end/2, 180*day)
	l.phases = []time.Duration{announced, announced + 100*day, announced + 200*day}
}

// live runs the job until an end.
func (l *life) live(end time.Duration) {
	l.t.Helper()
	rollover := []testserver.RolloverPhase{testserver.RolloverAnnounced, testserver.RolloverSwitched, testserver.RolloverFinished}
	for now := l.within(span{0, yearsJob}); now < end; now += yearsJob {
		l.clock.set(l.born.Add(now))
		for len(l.phases) > 0 && now >= l.phases[0] {
			if _, err := l.site.server.Rollover(testserver.Rollover{Phase: rollover[len(rollover)-len(l.phases)]}); err != nil {
				l.t.Fatal(err)
			}
			l.phases = l.phases[1:]
		}
		l.down = l.isOut(now)
		l.check(now)
		l.job(now)
	}
	if len(l.phases) > 0 {
		l.t.Errorf("%d phases of the rollover have not come", len(l.phases))
	}
}

// job is a run of the job. A power cut waits until the end of its month for one that
// does something, and kills it somewhere.
func (l *life) job(now time.Duration) {
	l.t.Helper()
	odds, cut := 0, ""
	if len(l.cuts) > 0 && now >= l.cuts[0].begin {
		switch idle := l.waitsNow(); {
		case !idle:
			odds = 40 // of 100 points and more
		case now >= l.cuts[0].end:
			odds = 3 // of a few
		}
	}
	point := func(at string) {
		if odds > 0 && cut == "" && l.random.IntN(odds) == 0 {
			cut = at
			panic(killed{at})
		}
	}
	reach, clock, dials := l.hook, l.device.now, l.dials
	l.hook = func(when, call string) error {
		point(when + " " + call)
		return reach(when, call)
	}
	// What is between two of these is done with files.
	l.device.now = func() time.Time { point("at the clock"); return clock() }
	l.onProgress = func(e estenroll.Event) { point("after " + string(e.Step)) }
	result, err := l.renewDue()
	l.hook, l.device.now, l.onProgress = reach, clock, nil
	l.runs++
	if l.dials > dials {
		l.attempts++
	}
	switch {
	case cut != "":
		l.cut[cut]++
		l.cuts = l.cuts[1:]
		if odds == 40 {
			l.inWork++
		}
	case err == nil && result.Changed:
		l.done[result.Kind]++
	case err != nil && !l.down:
		l.t.Errorf("after %s the server can be reached: %v", now, err)
	}
	if err != nil || result.Kind != "" {
		l.look()
	}
}

func (l *life) waitsNow() bool {
	l.t.Helper()
	state := l.renewal().State
	return state == estenroll.RenewalNotDue || state == estenroll.RenewalWaits
}

// look sees what the device has, in the eyes of status.
func (l *life) look() {
	l.t.Helper()
	status := l.device.status()
	l.due, l.end = l.clock.now(), l.clock.now()
	if status.Enrolled && status.Current.Problem == "" {
		l.due, l.end = status.Renewal.Due, status.Current.NotAfter
	}
}

// check holds the device to a valid certificate.
func (l *life) check(now time.Duration) {
	left := l.end.Sub(l.clock.now())
	if l.least = min(l.least, left); left > 0 {
		return
	}
	for at := l.due.Sub(l.born); at < now; at += yearsJob {
		if !l.isOut(at) {
			l.stranded++
			return
		}
	}
}

func (l *life) isOut(at time.Duration) bool {
	return slices.ContainsFunc(l.outages, func(s span) bool { return s.has(at) })
}

func (l *life) powerCuts() (n int) {
	for _, times := range l.cut {
		n += times
	}
	return n
}

func (l *life) figures() string {
	var outage time.Duration
	for _, s := range l.outages {
		outage += s.end - s.begin
	}
	return fmt.Sprintf("%d runs, %d renewals, %d rekeys, %d enrolments after the first, %d attempts, %d certificates issued, %d power cuts at %d kinds of points, %d of them in a renewal, %.0f days of outage, least remaining lifetime %.1f days, stranded %d",
		l.runs, l.done[estenroll.KindRenew], l.done[estenroll.KindRekey], l.done[estenroll.KindEnroll], l.attempts, l.issued(), l.powerCuts(), len(l.cut), l.inWork, outage.Hours()/24, l.least.Hours()/24, l.stranded)
}

// Years with certificates of 90 days: the server is away for a week each quarter, the CA
// changes its root once, each year has a rekey, and each month the power is cut in the
// middle of what is done. The device always has a valid certificate, and in the end
// nothing that it does not need.
func TestYears(t *testing.T) {
	seed := *yearsSeed
	if seed == 0 {
		seed = rand.Uint64N(1e6) + 1
	}
	l := newLife(t, seed, nil)
	end := time.Duration(*yearsCount) * year
	l.plan(end)
	l.live(end)
	t.Logf("seed %d, years %d: %s", seed, *yearsCount, l.figures())
	if l.stranded > 0 || l.least <= 0 {
		t.Errorf("seed %d: without a valid certificate", seed)
	}
	renewals := int(end/(yearsLived)) - 1
	if l.done[estenroll.KindRekey] < *yearsCount || l.done[estenroll.KindRenew]+l.done[estenroll.KindRekey] < renewals || l.powerCuts() < 11**yearsCount || l.inWork < 2**yearsCount || l.done[estenroll.KindEnroll] > 0 {
		t.Errorf("seed %d: want a rekey a year, %d renewals, power cuts, and no enrolment", seed, renewals)
	}
	if l.journal().Operation != nil {
		l.clock.advance(day)
		must(t, l.renewDue)
	}
	l.tidy(2)
}

// What the years would find: a device that tries once in its margin, and not when the
// server is back, is stranded by a week without it; by the policy's own attempts not.
func TestYearsFind(t *testing.T) {
	for attempts, want := range map[int]bool{10: false, 1: true} {
		t.Run(fmt.Sprintf("%d attempts", attempts), func(t *testing.T) {
			l := newLife(t, 1, func(d *device) { d.cfg.Policy.Attempts = attempts })
			due := l.renewal().Due.Sub(l.born)
			l.outages = []span{{due - time.Hour, due - time.Hour + outageOf}}
			l.live(due + 10*day)
			if t.Log(l.figures()); l.stranded > 0 != want {
				t.Errorf("stranded %d times", l.stranded)
			}
		})
	}
}
