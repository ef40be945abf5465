package estenroll

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Policy says when a certificate is renewed, and how often that is tried. The
// zero value is the default of each field.
type Policy struct {
	// NominalUsage is the part of its lifetime that a certificate is used for.
	// Default: 9/10.
	NominalUsage Fraction
	// MaxMargin bounds what is left of the lifetime when a renewal is due: a
	// certificate of ten years is not renewed a year early. Default: 30 days.
	MaxMargin time.Duration
	// Attempts are spread evenly over what is left, 1 to 1000. Default: 10.
	Attempts int
	// NoJitter makes the first attempt when the renewal is due. Default: within the
	// first of the spaces between attempts, at a place that is the device's own.
	NoJitter bool
	// RekeyEvery makes every n-th renewal of a key one with a new key, a rekey: 1 each
	// of them, up to 1000. Default: 0, none.
	RekeyEvery int
}

const (
	defaultMaxMargin = 30 * 24 * time.Hour
	defaultAttempts  = 10
	maxAttempts      = 1000
	maxRekeyEvery    = 1000
	// minPause is the least time between two attempts. It is under a minute, so that
	// each run of a cron job that runs every minute may be one, and as long as a
	// server takes to come back from a restart: short-lived certificates are what it
	// is for, and of ten minutes it leaves two attempts.
	minPause = 30 * time.Second
	// maxPause is the most between two attempts where there is nothing to spread them
	// over: the certificate has expired, or what was begun is not due by the policy.
	maxPause = 24 * time.Hour
)

var defaultNominalUsage = Fraction{9, 10}

func (p Policy) check() error {
	switch {
	case p.NominalUsage != Fraction{} && !p.NominalUsage.valid():
		return fmt.Errorf("policy: nominal usage %s is not between 0 and 1", p.NominalUsage)
	case p.MaxMargin < 0:
		return fmt.Errorf("policy: max margin %s is negative", p.MaxMargin)
	case p.Attempts < 0 || p.Attempts > maxAttempts:
		return fmt.Errorf("policy: %d attempts, want 1 to %d", p.Attempts, maxAttempts)
	case p.RekeyEvery < 0 || p.RekeyEvery > maxRekeyEvery:
		return fmt.Errorf("policy: a rekey every %d renewals, want 0 to %d", p.RekeyEvery, maxRekeyEvery)
	}
	return nil
}

// kind is what the next renewal of a key is that has been renewed so often.
func (p Policy) kind(renewals int) Kind {
	if p.RekeyEvery > 0 && renewals+1 >= p.RekeyEvery {
		return KindRekey
	}
	return KindRenew
}

// Schedule is what a policy makes of a certificate on a device.
type Schedule struct {
	// Due is when the certificate is to be renewed: the later of (notAfter − max
	// margin) and (notBefore + nominal usage × lifetime).
	Due time.Time
	// First is the first attempt: Due, and the device's jitter.
	First time.Time
	// Second is the second attempt, which the others follow. It has a jitter of its
	// own: devices that an outage has kept waiting would come together with those
	// that fell due at its end.
	Second time.Time
	// NotAfter is the certificate's.
	NotAfter time.Time
	// Interval is the time between two later attempts.
	Interval time.Duration
}

// Schedule returns when a certificate is due and tried. The identity of the
// device, any bytes that stay the same, chooses its jitter, which is thereby the
// same each time: two devices that fell due together stay apart.
func (p Policy) Schedule(notBefore, notAfter time.Time, identity []byte) Schedule {
	margin := p.margin(notBefore, notAfter)
	s := Schedule{Due: notAfter.Add(-margin), NotAfter: notAfter}
	space := margin / time.Duration(cmp.Or(p.Attempts, defaultAttempts))
	s.Interval = max(space, minPause)
	s.First, s.Second = s.Due, s.Due.Add(s.Interval)
	if !p.NoJitter {
		digest := sha256.Sum256(identity)
		s.First = s.First.Add(within(space, digest[:8]))
		s.Second = s.Second.Add(within(space, digest[8:]))
	}
	return s
}

// within returns a time below a bound, all alike probable.
func within(bound time.Duration, random []byte) time.Duration {
	part, _ := bits.Mul64(binary.BigEndian.Uint64(random), uint64(bound))
	return time.Duration(part)
}

// margin is what is left of the lifetime when the certificate is due.
func (p Policy) margin(notBefore, notAfter time.Time) time.Duration {
	most := cmp.Or(p.MaxMargin, defaultMaxMargin)
	usage := p.NominalUsage
	if usage == (Fraction{}) {
		usage = defaultNominalUsage
	}
	// In milliseconds, which the year 9999 (RFC 5280 §4.1.2.5) does not overflow,
	// though a time.Duration it does.
	lifetime := max(notAfter.UnixMilli()-notBefore.UnixMilli(), 0)
	unused := lifetime * int64(usage.den-usage.num) / int64(usage.den)
	if unused >= most.Milliseconds() {
		return most
	}
	return time.Duration(unused) * time.Millisecond
}

// Next returns when the attempt after the last one is to be made; a zero last
// means that there was none. Attempts are due at fixed points, First, Second and each
// Interval after it, and not a while after the last one: a job that runs daily
// would miss every second of them for a second's delay. A run that comes late makes
// up for the points that it missed with one attempt. The certificate's end is
// another point, since there is something else to be tried then.
func (s Schedule) Next(last time.Time) time.Time {
	expired := s.expired()
	switch {
	case last.Before(s.First):
		return later(s.First, last.Add(minPause))
	case !last.Before(expired):
		return s.again(last)
	}
	next := s.Second
	if !last.Before(next) {
		next = next.Add((last.Sub(next)/s.Interval + 1) * s.Interval)
	}
	next = later(next, last.Add(max(s.Interval/2, minPause)))
	if !next.Before(s.NotAfter) {
		return later(expired, last.Add(minPause))
	}
	return next
}

// expired is when the certificate has: notAfter itself is in the lifetime.
func (s Schedule) expired() time.Time { return s.NotAfter.Add(time.Second) }

// again is the next attempt where the schedule has no point for it.
func (s Schedule) again(last time.Time) time.Time { return last.Add(min(s.Interval, maxPause)) }

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// Fraction is a part of a whole: more than nothing and less than all of it.
type Fraction struct{ num, den uint16 }

// maxDenominator keeps the product with a certificate's lifetime an int64.
const maxDenominator = 10000

func (f Fraction) valid() bool { return 0 < f.num && f.num < f.den && f.den <= maxDenominator }

// String returns the fraction as it is calculated with: 9/10.
func (f Fraction) String() string { return fmt.Sprintf("%d/%d", f.num, f.den) }

var fractionForms = []struct {
	form *regexp.Regexp // numerator or whole part, then denominator or decimals
	per  uint16         // of the whole part
}{
	{regexp.MustCompile(`^(0)\.([0-9]{1,4})$`), 1},
	{regexp.MustCompile(`^([0-9]{1,2})(?:\.([0-9]{1,2}))?%$`), 100},
	{regexp.MustCompile(`^([1-9][0-9]{0,4})/([1-9][0-9]{0,4})$`), 0},
}

// ParseFraction reads 0.9, 90% or 2/3: four decimals at most, two of a percentage.
func ParseFraction(text string) (Fraction, error) {
	for _, known := range fractionForms {
		match := known.form.FindStringSubmatch(text)
		if match == nil {
			continue
		}
		num, den := match[1], match[2]
		if known.per > 0 {
			num, den = match[1]+match[2], strconv.Itoa(int(known.per))+strings.Repeat("0", len(match[2]))
		}
		f := Fraction{atoi(num), atoi(den)}
		if !f.valid() {
			return Fraction{}, fmt.Errorf("fraction: not between 0 and 1, or finer than 1/%d", maxDenominator)
		}
		return f, nil
	}
	return Fraction{}, errors.New("fraction: want one such as 0.9, 90% or 2/3")
}

// atoi reads five digits at most; what does not fit is no fraction.
func atoi(digits string) uint16 {
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil {
		return 0
	}
	return uint16(n)
}

var days = regexp.MustCompile(`^([1-9][0-9]{0,3})d$`) // 27 years at most

// ParseMargin reads a duration longer than nothing: 30d, or as Go has it, 720h.
func ParseMargin(text string) (time.Duration, error) {
	if match := days.FindStringSubmatch(text); match != nil {
		return time.Duration(atoi(match[1])) * 24 * time.Hour, nil
	}
	const limit = 32 // bytes: time.ParseDuration has none
	if d, err := time.ParseDuration(text); err == nil && len(text) <= limit && d > 0 {
		return d, nil
	}
	return 0, errors.New("margin: want a duration, such as 30d or 720h")
}
