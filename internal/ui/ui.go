// Package ui shows people and programs what the work reports: events, results and errors, as text
// or as JSON lines. The work itself knows nothing of it; it emits progress.Event values.
//
// Results go to the standard output. In text mode all else goes to the standard error, so that a
// list can be piped; in JSON mode events go to the standard output too, one object a line.
package ui

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Options say how to show things. The zero value discards everything in text mode.
type Options struct {
	Out io.Writer // results
	Err io.Writer // progress, warnings, errors
	// JSON writes one object a line.
	JSON bool
	// Quiet drops progress, remarks and summaries, never warnings, errors, or a list asked for.
	Quiet bool
	// Verbose adds the events of kind progress.Verbose.
	Verbose bool
	// Width gives the columns of the terminal that Err is; nil or 0 means that Err is none:
	// then no line is ever redrawn.
	Width func() int
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Pace of the displays. A terminal is redrawn often enough to look alive; a log gets a line so
// seldom that a backup of a day stays readable; a program gets events often enough for a bar.
const (
	redrawEvery = 100 * time.Millisecond
	lineEvery   = 10 * time.Second
	jsonEvery   = time.Second
)

// Printer shows things. Its methods may be called concurrently. Close it in the end.
type Printer struct {
	opt  Options
	mu   sync.Mutex
	live []*phase // phases begun and not finished, in order
	// drawn tells that a live line stands on the terminal and must be wiped before other text.
	drawn bool
	stop  chan struct{}
	done  chan struct{}
}

// New returns a Printer and starts its redrawing.
func New(o Options) *Printer {
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Err == nil {
		o.Err = io.Discard
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	p := &Printer{opt: o, stop: make(chan struct{}), done: make(chan struct{})}
	if o.JSON || o.Quiet {
		close(p.done)
		return p
	}
	every := lineEvery
	if p.width() > 0 {
		every = redrawEvery
	}
	go p.run(every)
	return p
}

// Close wipes what is drawn and stops. The Printer can still print afterwards.
func (p *Printer) Close() {
	p.mu.Lock()
	select {
	case <-p.stop:
		p.mu.Unlock()
		return
	default:
	}
	close(p.stop)
	p.mu.Unlock()
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
	p.live = nil
}

// JSON reports whether results are wanted as JSON lines.
func (p *Printer) JSON() bool { return p.opt.JSON }

// Quiet reports whether summaries are unwanted.
func (p *Printer) Quiet() bool { return p.opt.Quiet }

// Verbose reports whether details are wanted.
func (p *Printer) Verbose() bool { return p.opt.Verbose }

func (p *Printer) width() int {
	if p.opt.Width == nil {
		return 0
	}
	return p.opt.Width()
}

func (p *Printer) run(every time.Duration) {
	defer close(p.done)
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-t.C:
			p.mu.Lock()
			p.tick()
			p.mu.Unlock()
		}
	}
}

// tick redraws the live line, or writes a plain line for each phase that moved since the last.
func (p *Printer) tick() {
	now := p.opt.Now()
	if w := p.width(); w > 0 {
		if len(p.live) == 0 {
			p.wipe()
			return
		}
		ph := p.live[len(p.live)-1]
		fmt.Fprintf(p.opt.Err, "\r\x1b[K%s", cut(ph.bar(now, w-1), w-1))
		p.drawn = true
		return
	}
	for _, ph := range p.live {
		if ph.moved {
			ph.moved = false
			fmt.Fprintln(p.opt.Err, ph.line(now))
		}
	}
}

// wipe removes the live line from the terminal; the caller holds mu.
func (p *Printer) wipe() {
	if p.drawn {
		fmt.Fprint(p.opt.Err, "\r\x1b[K")
		p.drawn = false
	}
}

// Sink returns where the work sends its events.
func (p *Printer) Sink() progress.Sink { return p.event }

func (p *Printer) event(e progress.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ph := p.phase(e)
	if p.opt.JSON {
		p.jsonEvent(e, ph)
		return
	}
	switch e.Kind {
	case progress.Warning:
		p.say("warning: " + p.sentence(e))
	case progress.Info:
		if !p.opt.Quiet {
			p.say(p.sentence(e))
		}
	case progress.Verbose:
		if p.opt.Verbose && !p.opt.Quiet {
			p.say(p.sentence(e))
		}
	case progress.Start:
		if !p.opt.Quiet && p.width() == 0 && e.Message != "" {
			p.say(p.sentence(e))
		}
	case progress.Finish:
		// What took no time, and has nothing to say, needs no line.
		if long := p.opt.Now().Sub(ph.begun) >= time.Second; !p.opt.Quiet && (long || e.Message != "" || p.opt.Verbose) {
			p.say(ph.finished(p.opt.Now(), e.Message))
		}
	}
}

// say writes one line of text; the caller holds mu.
func (p *Printer) say(line string) {
	p.wipe()
	fmt.Fprintln(p.opt.Err, line)
}

func (p *Printer) sentence(e progress.Event) string {
	s := Clean(e.Message)
	if e.Item != "" && !strings.Contains(s, Quote(e.Item)) {
		if s != "" {
			s += ": "
		}
		s += Quote(e.Item)
	}
	return s
}

// phase finds or makes the state of the phase e speaks of, and takes over its counters. It returns
// nil for events without a phase of their own.
func (p *Printer) phase(e progress.Event) *phase {
	switch e.Kind {
	case progress.Start, progress.Update, progress.Finish:
	default:
		return nil
	}
	var ph *phase
	for i, l := range p.live {
		if l.name == e.Phase {
			ph = l
			if e.Kind == progress.Finish {
				p.live = append(p.live[:i:i], p.live[i+1:]...)
			}
			break
		}
	}
	now := p.opt.Now()
	if ph == nil {
		ph = &phase{name: e.Phase, begun: now}
		if e.Kind != progress.Finish {
			p.live = append(p.live, ph)
		}
	}
	ph.take(e, now)
	return ph
}

// jsonEvent writes e, unless it is one of many progress events within a second.
func (p *Printer) jsonEvent(e progress.Event, ph *phase) {
	now := p.opt.Now()
	switch e.Kind {
	case progress.Update:
		if p.opt.Quiet || now.Sub(ph.shown) < jsonEvery {
			return
		}
		ph.shown = now
	case progress.Verbose:
		if p.opt.Quiet || !p.opt.Verbose {
			return
		}
	case progress.Warning:
	default:
		if p.opt.Quiet {
			return
		}
	}
	if e.Time.IsZero() {
		e.Time = now
	}
	e.Time = e.Time.UTC()
	writeJSON(p.opt.Out, e)
}

// Warn shows a warning.
func (p *Printer) Warn(format string, args ...any) {
	p.event(progress.Event{Kind: progress.Warning, Message: fmt.Sprintf(format, args...), Time: p.opt.Now()})
}

// Info shows a remark, unless quiet.
func (p *Printer) Info(format string, args ...any) {
	p.event(progress.Event{Kind: progress.Info, Message: fmt.Sprintf(format, args...), Time: p.opt.Now()})
}

// Object writes v as one line of JSON to the results.
func (p *Printer) Object(v any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	writeJSON(p.opt.Out, v)
}

// Text writes lines to the results. What is not our own text must have gone through Quote.
func (p *Printer) Text(lines ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
	for _, l := range lines {
		fmt.Fprintln(p.opt.Out, l)
	}
}

// Writer returns where results go, for long lists; nothing may be drawn meanwhile.
func (p *Printer) Writer() io.Writer { return p.opt.Out }

// Error shows why the command failed, and what to do about it. Nil is not shown.
func (p *Printer) Error(err error, exitCode int) {
	if err == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	hints := Hints(err)
	if p.opt.JSON {
		if hints == nil {
			hints = []string{}
		}
		writeJSON(p.opt.Err, struct {
			Event    string   `json:"event"`
			Message  string   `json:"message"`
			Hints    []string `json:"hints"`
			ExitCode int      `json:"exit_code"`
		}{"error", err.Error(), hints, exitCode})
		return
	}
	p.wipe()
	fmt.Fprintln(p.opt.Err, "error: "+indent(Clean(err.Error()), "       "))
	for _, h := range hints {
		fmt.Fprintln(p.opt.Err, "hint:  "+indent(Clean(h), "       "))
	}
}

func indent(s, by string) string { return strings.ReplaceAll(s, "\n", "\n"+by) }

func writeJSON(w io.Writer, v any) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		// Only a value of ours that cannot be marshalled comes here, which tests would show.
		fmt.Fprintf(&b, "{\"event\":\"error\",\"message\":%q}\n", err.Error())
	}
	// A reader that went away must not stop a backup.
	_, _ = w.Write(b.Bytes())
}
