package estenroll_test

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"estenroll"
)

const day = 24 * time.Hour

func fraction(t testing.TB, text string) estenroll.Fraction {
	t.Helper()
	f, err := estenroll.ParseFraction(text)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// A renewal is due at the later of (notAfter − max margin) and (notBefore +
// nominal usage × lifetime), of ten minutes as of ten years, and attempts are
// spread over what is left.
func TestScheduleDue(t *testing.T) {
	for _, c := range []struct {
		name     string
		lifetime time.Duration
		policy   estenroll.Policy
		margin   time.Duration
		interval time.Duration
	}{
		{"90 days", 90 * day, estenroll.Policy{}, 9 * day, 21*time.Hour + 36*time.Minute},
		{"ten minutes", 10 * time.Minute, estenroll.Policy{}, time.Minute, 30 * time.Second},
		{"ten years", 3652 * day, estenroll.Policy{}, 30 * day, 3 * day},
		{"a second", time.Second, estenroll.Policy{}, 100 * time.Millisecond, 30 * time.Second},
		{"nothing", 0, estenroll.Policy{}, 0, 30 * time.Second},
		{"less than nothing", -time.Hour, estenroll.Policy{}, 0, 30 * time.Second},
		{"two thirds", 90 * day, estenroll.Policy{NominalUsage: fraction(t, "2/3")}, 30 * day, 3 * day},
		{"a third, the margin is later", 90 * day, estenroll.Policy{NominalUsage: fraction(t, "1/3")}, 30 * day, 3 * day},
		{"a longer margin", 90 * day, estenroll.Policy{NominalUsage: fraction(t, "1/3"), MaxMargin: 80 * day}, 60 * day, 6 * day},
		{"one attempt", 90 * day, estenroll.Policy{Attempts: 1}, 9 * day, 9 * day},
		{"many attempts", 90 * day, estenroll.Policy{Attempts: 1000}, 9 * day, 777*time.Second + 600*time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			begin := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
			c.policy.NoJitter = true
			s := c.policy.Schedule(begin, begin.Add(c.lifetime), nil)
			if got := s.NotAfter.Sub(s.Due); got != c.margin || !s.First.Equal(s.Due) || s.Interval != c.interval {
				t.Errorf("due %s before the end, first attempt %s later, then each %s; want %s and %s", got, s.First.Sub(s.Due), s.Interval, c.margin, c.interval)
			}
		})
	}
	// RFC 5280 §4.1.2.5: no well-defined end.
	end := time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
	if s := (estenroll.Policy{}).Schedule(time.Date(1950, 1, 1, 0, 0, 0, 0, time.UTC), end, nil); end.Sub(s.Due) != 30*day {
		t.Errorf("due %s before the year 10000", end.Sub(s.Due))
	}
}

// Of whatever job calls it, every minute or every day, a device that reaches no
// server makes no more attempts than it is allowed, and the job loses none of them
// for a delay; the end of the certificate is one more.
func TestScheduleAttempts(t *testing.T) {
	begin := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name     string
		lifetime time.Duration
		policy   estenroll.Policy
		every    time.Duration
		want     int
	}{
		{"90 days, every minute", 90 * day, estenroll.Policy{}, time.Minute, 10},
		{"90 days, every 5 minutes", 90 * day, estenroll.Policy{}, 5 * time.Minute, 10},
		{"90 days, daily", 90 * day, estenroll.Policy{}, day, 9},
		{"100 days, daily, an attempt a day", 100 * day, estenroll.Policy{}, day, 10},
		{"100 days, daily, no jitter", 100 * day, estenroll.Policy{NoJitter: true}, day, 10},
		{"90 days, weekly", 90 * day, estenroll.Policy{MaxMargin: 30 * day, NominalUsage: fraction(t, "1/2")}, 7 * day, 4},
		{"ten years, hourly", 3652 * day, estenroll.Policy{}, time.Hour, 10},
		{"ten minutes, every 5 seconds", 10 * time.Minute, estenroll.Policy{}, 5 * time.Second, 2},
		{"ten minutes, every minute", 10 * time.Minute, estenroll.Policy{}, time.Minute, 1},
		{"a day, every minute", day, estenroll.Policy{}, time.Minute, 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			end := begin.Add(c.lifetime)
			for device := range 20 {
				s := c.policy.Schedule(begin, end, fmt.Append(nil, device))
				if s.First.Before(s.Due) || !c.policy.NoJitter && s.First.Sub(s.Due) >= s.Interval {
					t.Fatalf("due %s, first attempt %s, then each %s", s.Due, s.First, s.Interval)
				}
				attempts, last := 0, time.Time{}
				late := time.Duration(device) * 37 * time.Millisecond // the job is not on the second
				for now := begin; !now.After(end); now = now.Add(c.every) {
					at := now.Add(late * time.Duration(attempts%2))
					if next := s.Next(last); at.Before(next) {
						continue
					} else if !last.IsZero() && at.Sub(last) < 30*time.Second {
						t.Fatalf("two attempts within %s", at.Sub(last))
					}
					attempts, last = attempts+1, at
				}
				// The phase of a job can lose the one that lies beyond its last run.
				if attempts > c.want || attempts < c.want-1 || attempts == 0 {
					t.Errorf("device %d: %d attempts, want %d", device, attempts, c.want)
				}
				if next := s.Next(last); !next.After(end) && c.every < s.Interval {
					t.Errorf("device %d: after the last attempt another at %s, before the end %s", device, next, end)
				} else if next.After(end.Add(31 * time.Second)) {
					t.Errorf("device %d: the end is at %s, tried next at %s", device, end, next)
				}
			}
		})
	}
}

// After its end a certificate is tried once a day, or as often as before.
func TestScheduleExpired(t *testing.T) {
	begin := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	for lifetime, want := range map[time.Duration]time.Duration{
		10 * time.Minute: 30 * time.Second, 90 * day: 21*time.Hour + 36*time.Minute, 3652 * day: day,
	} {
		end := begin.Add(lifetime)
		s := (estenroll.Policy{}).Schedule(begin, end, nil)
		for _, last := range []time.Time{end.Add(time.Second), end.Add(250 * 365 * day)} {
			if got := s.Next(last).Sub(last); got != want {
				t.Errorf("a lifetime of %s: the next attempt is %s later, want %s", lifetime, got, want)
			}
		}
	}
}

// The jitter is the device's own, and devices are spread evenly.
func TestScheduleJitter(t *testing.T) {
	begin := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	var policy estenroll.Policy
	const devices, parts = 10000, 10
	var in [parts]int
	for n := range devices {
		identity := fmt.Append(nil, n)
		s := policy.Schedule(begin, begin.Add(90*day), identity)
		again := policy.Schedule(begin.Add(81*day), begin.Add(171*day), identity)
		if s.First.Sub(s.Due) != again.First.Sub(again.Due) || s.Second.Sub(s.Due) != again.Second.Sub(again.Due) {
			t.Fatalf("device %d: %+v, then %+v", n, s, again)
		}
		in[int(parts*s.First.Sub(s.Due)/s.Interval)]++
	}
	for part, n := range in {
		if n < devices/parts*8/10 || n > devices/parts*12/10 {
			t.Errorf("part %d of the first interval has %d of %d devices", part, n, devices)
		}
	}
}

func TestParseFraction(t *testing.T) {
	for text, want := range map[string]string{
		"0.9": "9/10", "0.90": "90/100", "0.6667": "6667/10000", "90%": "90/100", "5%": "5/100", "66.67%": "6667/10000", "2/3": "2/3",
		"1/10000": "1/10000", "0.0001": "1/10000",
		"": "", "0": "", "1": "", "0.0": "", "1.0": "", ".9": "", "0.": "", "00.9": "", "0.66667": "", "9": "", "-0.5": "", "+0.5": "", "0,9": "",
		"0%": "", "100%": "", "99.999%": "", "90 %": "", " 0.9": "", "0.9\n": "", "%": "", "0x1%": "",
		"3/2": "", "2/2": "", "0/3": "", "02/3": "", "2/03": "", "2 / 3": "", "2/": "", "/3": "", "1/2/3": "", "1/10001": "", "1/65537": "", "70000/70001": "",
		"0.9e0": "", "NaN": "", "٠.٩": "",
	} {
		got, err := estenroll.ParseFraction(text)
		if (err == nil) != (want != "") || err == nil && got.String() != want {
			t.Errorf("%q: %s, %v; want %q", text, got, err, want)
		}
	}
}

func TestParseMargin(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"30d": 30 * day, "1d": day, "9999d": 9999 * day, "720h": 720 * time.Hour, "1h30m": 90 * time.Minute, "500ms": 500 * time.Millisecond,
		"": 0, "0": 0, "0s": 0, "0d": 0, "-1h": 0, "-1d": 0, "10000d": 0, "1.5d": 0, "01d": 0, "1d12h": 0, "d": 0, "30": 0, "30 d": 0, "30D": 0, "1e3h": 0,
		"00000000000000000000000000000000000000001h": 0, "9999999999h": 0,
	} {
		got, err := estenroll.ParseMargin(text)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %s, %v; want %s", text, got, err, want)
		}
	}
}

// What is read is what is calculated with: between 0 and 1, and read again alike.
func FuzzPolicy(f *testing.F) {
	f.Add("0.9", "30d", int64(0), int64(90*86400), uint64(1))
	f.Add("90%", "720h", int64(0), int64(600), uint64(2))
	f.Add("2/3", "1s", int64(-62135596800), int64(253402300799), uint64(3))
	f.Fuzz(func(t *testing.T, usage, margin string, begin, end int64, seed uint64) {
		var policy estenroll.Policy
		fraction, err := estenroll.ParseFraction(usage)
		if err == nil {
			if again, err := estenroll.ParseFraction(fraction.String()); err != nil || again != fraction {
				t.Errorf("%q is read as %s, which is read as %s, %v", usage, fraction, again, err)
			}
			policy.NominalUsage = fraction
		}
		if got, err := estenroll.ParseMargin(margin); err == nil {
			if got <= 0 {
				t.Errorf("%q is read as %s", margin, got)
			}
			policy.MaxMargin = got
		}
		// The years of a certificate: RFC 5280 §4.1.2.5.
		const first, last = -62135596800, 253402300799
		notBefore := time.Unix(max(min(begin, last), first), 0)
		notAfter := time.Unix(max(min(end, last), first), 0)
		s := policy.Schedule(notBefore, notAfter, binary.BigEndian.AppendUint64(nil, seed))
		switch {
		case s.Due.After(notAfter), s.First.Before(s.Due), s.First.After(notAfter):
			t.Errorf("%s to %s: due %s, first attempt %s", notBefore, notAfter, s.Due, s.First)
		case !notAfter.Before(notBefore) && s.Due.Before(notBefore):
			t.Errorf("due %s, before %s", s.Due, notBefore)
		}
		at := s.First
		for range 20 {
			next := s.Next(at)
			if next.Sub(at) < 30*time.Second {
				t.Fatalf("%s to %s: attempts at %s and %s", notBefore, notAfter, at, next)
			}
			at = next
		}
	})
}
