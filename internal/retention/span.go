package retention

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Span is a length of time by the calendar, as restic writes it: 2y5m7d3h.
type Span struct{ Years, Months, Days, Hours int }

// maxSpan bounds each part of a Span: what is longer overflows the calendar and means nothing.
const maxSpan = 1_000_000

var errSpan = errors.New("write it like 2y5m7d3h: years, months, days, hours, in this order")

// ParseSpan reads 2y5m7d3h; parts may be left out.
func ParseSpan(s string) (Span, error) {
	var out Span
	parts := []struct {
		unit byte
		to   *int
	}{{'y', &out.Years}, {'m', &out.Months}, {'d', &out.Days}, {'h', &out.Hours}}
	rest := s
	for rest != "" {
		n := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
		if n <= 0 {
			return Span{}, fmt.Errorf("%q is no length of time: %w", s, errSpan)
		}
		for len(parts) > 0 && parts[0].unit != rest[n] {
			parts = parts[1:]
		}
		v, err := strconv.Atoi(rest[:n])
		if len(parts) == 0 || err != nil || v > maxSpan {
			return Span{}, fmt.Errorf("%q is no length of time: %w", s, errSpan)
		}
		*parts[0].to = v
		parts, rest = parts[1:], rest[n+1:]
	}
	return out, nil
}

func (s Span) String() string {
	var b strings.Builder
	for _, p := range []struct {
		n    int
		unit string
	}{{s.Years, "y"}, {s.Months, "m"}, {s.Days, "d"}, {s.Hours, "h"}} {
		if p.n != 0 {
			fmt.Fprintf(&b, "%d%s", p.n, p.unit)
		}
	}
	return b.String()
}

// Before returns the moment s before t.
func (s Span) Before(t time.Time) time.Time {
	return t.AddDate(-s.Years, -s.Months, -s.Days).Add(time.Hour * time.Duration(-s.Hours))
}

// ParseCount reads a number, or "unlimited", which is also -1.
func ParseCount(s string) (Count, error) {
	if s == "unlimited" || s == "-1" {
		return Unlimited, nil
	}
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("%q is no number of snapshots: write 0, 1, 2, ... or unlimited", s)
	}
	return Count(n), nil
}

func (c Count) String() string {
	if c == Unlimited {
		return "unlimited"
	}
	return strconv.Itoa(int(c))
}
