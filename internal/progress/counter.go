package progress

import "sync/atomic"

// Counter counts what one phase has done and reports it. It may be used by several goroutines at once.
type Counter struct {
	sink        Sink
	phase, unit string
	done, bytes atomic.Int64
}

// NewCounter begins a phase.
func NewCounter(s Sink, phase, unit string) *Counter {
	s.Emit(Event{Kind: Start, Phase: phase, Unit: unit})
	return &Counter{sink: s, phase: phase, unit: unit}
}

// Add counts one item of so many bytes.
func (c *Counter) Add(item string, bytes int64) {
	c.sink.Emit(Event{Kind: Update, Phase: c.phase, Item: item, Done: c.done.Add(1), Unit: c.unit, Bytes: c.bytes.Add(bytes)})
}

// Done ends the phase.
func (c *Counter) Done() {
	c.sink.Emit(Event{Kind: Finish, Phase: c.phase, Done: c.done.Load(), Unit: c.unit, Bytes: c.bytes.Load()})
}
