// Package progress carries what long work reports. The work emits events as values; package ui
// renders them as text or JSON lines. A nil Sink is allowed everywhere: see Emit.
package progress

import "time"

// Event is one report. Which fields are set depends on Kind.
type Event struct {
	Kind Kind `json:"event"`
	// Phase is a step of the flow: discover, freeze, capture, prove, commit, thaw, restore, check.
	Phase string    `json:"phase,omitempty"`
	Time  time.Time `json:"time"`
	// Item is the data set, space or file at hand.
	Item string `json:"item,omitempty"`
	// Message is a sentence for people; warnings and hints have nothing else.
	Message string `json:"message,omitempty"`
	// Done and Total count what Unit says ("files", "entries", "bytes"); Total 0 is unknown.
	Done  int64  `json:"done,omitempty"`
	Total int64  `json:"total,omitempty"`
	Unit  string `json:"unit,omitempty"`
	// Bytes done and total.
	Bytes      int64 `json:"bytes,omitempty"`
	TotalBytes int64 `json:"total_bytes,omitempty"`
}

// Kind says what an Event is.
type Kind string

// The kinds of event.
const (
	Start   Kind = "start"    // a phase begins
	Update  Kind = "progress" // counters of the running phase
	Finish  Kind = "finish"   // a phase is over
	Info    Kind = "info"     // worth a line
	Verbose Kind = "verbose"  // worth a line with --verbose
	Warning Kind = "warning"  // something the user should act on; the work goes on
)

// Sink takes events. It is called from many goroutines and must not block for long.
type Sink func(Event)

// Emit sends e, stamped with the time if it has none. A nil sink swallows it.
func (s Sink) Emit(e Event) {
	if s == nil {
		return
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	s(e)
}
