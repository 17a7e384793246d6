package ui

import (
	"fmt"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/progress"
)

// rateOver is how far back the rate looks: long enough to smooth over one large file, short enough
// that an estimate follows when large files give way to small ones.
const rateOver = 15 * time.Second

// phase is the state of one running step.
type phase struct {
	name  string
	begun time.Time
	last  progress.Event
	// samples of the counters within rateOver, oldest first, at most one each half second.
	samples []sample
	moved   bool      // something came since the last plain line
	shown   time.Time // when the last JSON event went out
}

type sample struct {
	at          time.Time
	done, bytes int64
}

func (ph *phase) take(e progress.Event, now time.Time) {
	// A report may name a part of the counters only; what it leaves out stays.
	if e.Done == 0 {
		e.Done = ph.last.Done
	}
	if e.Total == 0 {
		e.Total = ph.last.Total
	}
	if e.Bytes == 0 {
		e.Bytes = ph.last.Bytes
	}
	if e.TotalBytes == 0 {
		e.TotalBytes = ph.last.TotalBytes
	}
	if e.Unit == "" {
		e.Unit = ph.last.Unit
	}
	if e.Item == "" {
		e.Item = ph.last.Item
	}
	ph.last, ph.moved = e, true
	if n := len(ph.samples); n == 0 || now.Sub(ph.samples[n-1].at) >= 500*time.Millisecond {
		ph.samples = append(ph.samples, sample{now, e.Done, e.Bytes})
	}
	for len(ph.samples) > 2 && now.Sub(ph.samples[1].at) > rateOver {
		ph.samples = ph.samples[1:]
	}
}

// rates are per second, of the counter and of bytes; 0 if not yet known.
func (ph *phase) rates(now time.Time) (done, bytes float64) {
	if len(ph.samples) == 0 {
		return 0, 0
	}
	s := ph.samples[0]
	t := now.Sub(s.at).Seconds()
	if t < 0.5 {
		return 0, 0
	}
	return float64(ph.last.Done-s.done) / t, float64(ph.last.Bytes-s.bytes) / t
}

// fraction tells how much of the work is done, by bytes if their total is known; -1 if unknown.
func (ph *phase) fraction() float64 {
	f := -1.0
	switch l := ph.last; {
	case l.TotalBytes > 0:
		f = float64(l.Bytes) / float64(l.TotalBytes)
	case l.Total > 0:
		f = float64(l.Done) / float64(l.Total)
	}
	return min(f, 1)
}

func (ph *phase) eta(now time.Time) (time.Duration, bool) {
	done, bytes := ph.rates(now)
	left := -1.0
	switch l := ph.last; {
	case l.TotalBytes > 0 && bytes > 0:
		left = float64(l.TotalBytes-l.Bytes) / bytes
	case l.TotalBytes == 0 && l.Total > 0 && done > 0:
		left = float64(l.Total-l.Done) / done
	}
	// Beyond four days an estimate says nothing.
	if left < 0 || left > 4*24*3600 {
		return 0, false
	}
	return time.Duration(left * float64(time.Second)), true
}

// counters says how far the phase is, in words.
func (ph *phase) counters() string {
	l := ph.last
	var parts []string
	byBytes := l.Unit == "bytes"
	if l.Done > 0 || l.Total > 0 {
		switch {
		case byBytes && l.Total > 0:
			parts = append(parts, Bytes(l.Done)+" of "+Bytes(l.Total))
		case byBytes:
			parts = append(parts, Bytes(l.Done))
		case l.Total > 0:
			parts = append(parts, fmt.Sprintf("%d of %d %s", l.Done, l.Total, l.Unit))
		default:
			parts = append(parts, fmt.Sprintf("%d %s", l.Done, l.Unit))
		}
	}
	if l.Bytes > 0 || l.TotalBytes > 0 {
		if l.TotalBytes > 0 {
			parts = append(parts, Bytes(l.Bytes)+" of "+Bytes(l.TotalBytes))
		} else {
			parts = append(parts, Bytes(l.Bytes))
		}
	}
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	return strings.Join(parts, ", ")
}

func (ph *phase) speed(now time.Time) string {
	done, bytes := ph.rates(now)
	if ph.last.Unit == "bytes" {
		bytes = done
	}
	if bytes > 0 {
		return Bytes(int64(bytes)) + "/s"
	}
	return ""
}

// bar is the live line of a terminal w columns wide.
func (ph *phase) bar(now time.Time, w int) string {
	const barWidth = 24
	parts := []string{fmt.Sprintf("%-8s", ph.name)}
	f := ph.fraction()
	if f >= 0 && w >= 60 {
		n := int(f * barWidth)
		parts = append(parts, "["+strings.Repeat("#", n)+strings.Repeat(".", barWidth-n)+"]")
	}
	if f >= 0 {
		parts = append(parts, fmt.Sprintf("%3.0f%%", f*100))
	} else {
		parts = append(parts, clock(now.Sub(ph.begun)))
	}
	if c := ph.counters(); c != "" {
		parts = append(parts, c)
	}
	if s := ph.speed(now); s != "" {
		parts = append(parts, s)
	}
	if d, ok := ph.eta(now); ok {
		parts = append(parts, "ETA "+clock(d))
	}
	line := strings.Join(parts, "  ")
	if item := Quote(ph.last.Item); ph.last.Item != "" && columns(line)+columns(item)+2 <= w {
		line += "  " + item
	}
	return line
}

// line is the plain line of a log.
func (ph *phase) line(now time.Time) string {
	s := ph.name + ":"
	if f := ph.fraction(); f >= 0 {
		s += fmt.Sprintf(" %.0f%%,", f*100)
	}
	if c := ph.counters(); c != "" {
		s += " " + c + ","
	}
	if v := ph.speed(now); v != "" {
		s += " " + v + ","
	}
	if d, ok := ph.eta(now); ok {
		return s + " about " + clock(d) + " left"
	}
	return s + " running for " + clock(now.Sub(ph.begun))
}

// finished is the line that stays when the phase is over.
func (ph *phase) finished(now time.Time, message string) string {
	s := ph.name + ": done in " + Duration(now.Sub(ph.begun))
	if message != "" {
		return s + ": " + Clean(message)
	}
	if c := ph.counters(); c != "" {
		s += ": " + c
	}
	return s
}
