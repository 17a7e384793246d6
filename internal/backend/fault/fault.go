// Package fault wraps a backend to break it on purpose: "the third save of a pack fails",
// "every load returns half", "stop the world before the fifth write". For tests.
package fault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/backend"
)

// Op is an operation of a backend.
type Op uint8

// The operations. Any matches each of them.
const (
	Any Op = iota
	Save
	Load
	Stat
	List
	Remove
	Create
)

func (o Op) String() string {
	return [...]string{"any", "save", "load", "stat", "list", "remove", "create"}[o]
}

// Effect is what goes wrong.
type Effect uint8

// The effects.
const (
	// Fail does nothing and returns the error.
	Fail Effect = iota
	// FailAfter does the work and returns the error: a lost answer. For Load: after fn has run.
	FailAfter
	// Short: Save stores the first half and returns the error; Load delivers the first half and
	// ends as if that were all; Stat tells half the size; List gives half the names and the error.
	// Others fail.
	Short
	// Corrupt: Save stores, and Load delivers, one flipped bit, and no error is returned. Stat tells
	// a size that is one too large. Others fail.
	Corrupt
	// Hang waits until the context is done and returns its error.
	Hang
)

func (e Effect) String() string {
	return [...]string{"fail", "fail-after", "short", "corrupt", "hang"}[e]
}

// ErrFault is what broken operations return unless Fault.Err is set.
var ErrFault = errors.New("injected fault")

// ErrKilled is what every operation returns after KillBefore or KillAfter has struck.
var ErrKilled = errors.New("injected crash")

// Fault breaks the Nth operation (from 1; zero is 1) that matches Op and Type.
type Fault struct {
	Op   Op
	Type backend.FileType // zero matches all
	N    int
	// Times is how many matching operations in a row break: zero is one, negative is all.
	Times  int
	Effect Effect
	Err    error
}

func (f Fault) String() string {
	return fmt.Sprintf("%v %v %v #%d", f.Effect, f.Op, f.Type, max(f.N, 1))
}

type armed struct {
	Fault
	seen, fired int
}

// Call is an operation as it came in.
type Call struct {
	Op     Op
	Handle backend.Handle
}

// Backend breaks what it is told to break.
type Backend struct {
	be backend.Backend

	mu     sync.Mutex
	faults []*armed
	calls  []Call
	writes int
	before int // kill before this write; 0: never
	after  int
	killed bool
}

var _ backend.Backend = (*Backend)(nil)

// New wraps be.
func New(be backend.Backend, faults ...Fault) *Backend {
	b := &Backend{be: be}
	b.Add(faults...)
	return b
}

// Add arms more faults; their count starts now.
func (b *Backend) Add(faults ...Fault) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range faults {
		if f.N == 0 {
			f.N = 1
		}
		if f.Times == 0 {
			f.Times = 1
		}
		if f.Err == nil {
			f.Err = ErrFault
		}
		b.faults = append(b.faults, &armed{Fault: f})
	}
}

// KillBefore makes the nth write (Save or Remove, from 1, counted from New) and everything after
// it fail with ErrKilled, as if the process had died just before it.
func (b *Backend) KillBefore(n int) { b.mu.Lock(); b.before = n; b.mu.Unlock() }

// KillAfter lets the nth write reach the backend, but its answer and all that follows is lost.
func (b *Backend) KillAfter(n int) { b.mu.Lock(); b.after = n; b.mu.Unlock() }

// Writes tells how many writes came in.
func (b *Backend) Writes() int { b.mu.Lock(); defer b.mu.Unlock(); return b.writes }

// Calls lists all operations in order.
func (b *Backend) Calls() []Call {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]Call(nil), b.calls...)
}

// Count tells how many operations op on files of type t came in (zero: all types).
func (b *Backend) Count(op Op, t backend.FileType) int {
	n := 0
	for _, c := range b.Calls() {
		if (op == Any || op == c.Op) && (t == 0 || t == c.Handle.Type) {
			n++
		}
	}
	return n
}

// Unfired lists the faults that never struck: a test that leaves some tested nothing.
func (b *Backend) Unfired() []Fault {
	b.mu.Lock()
	defer b.mu.Unlock()
	var list []Fault
	for _, a := range b.faults {
		if a.fired == 0 {
			list = append(list, a.Fault)
		}
	}
	return list
}

// enter counts the call and returns what is to go wrong with it.
func (b *Backend) enter(op Op, h backend.Handle) (f *Fault, killAfter bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, Call{op, h})
	if b.killed {
		return nil, false, ErrKilled
	}
	if op == Save || op == Remove {
		b.writes++
		if b.writes == b.before {
			b.killed = true
			return nil, false, ErrKilled
		}
		if b.writes == b.after {
			b.killed, killAfter = true, true
		}
	}
	for _, a := range b.faults {
		if (a.Op != Any && a.Op != op) || (a.Type != 0 && a.Type != h.Type) {
			continue
		}
		a.seen++ // also where another fault strikes, so that N counts calls
		if f == nil && a.seen >= a.N && (a.Times < 0 || a.seen < a.N+a.Times) {
			a.fired++
			c := a.Fault
			f = &c
		}
	}
	return f, killAfter, nil
}

// run does op, unless its fault forbids it.
func (b *Backend) run(ctx context.Context, op Op, h backend.Handle, work func(f *Fault) error) error {
	f, killAfter, err := b.enter(op, h)
	if err != nil {
		return fmt.Errorf("%v %v: %w", op, h, err)
	}
	if f != nil {
		switch f.Effect {
		case Hang:
			<-ctx.Done()
			return fmt.Errorf("%v %v: %w", op, h, ctx.Err())
		case Fail:
			return fmt.Errorf("%v %v: %w", op, h, f.Err)
		}
	}
	err = work(f)
	if killAfter {
		err = ErrKilled
	}
	if err == nil && f != nil && f.Effect == FailAfter {
		err = fmt.Errorf("%v %v: %w", op, h, f.Err)
	}
	return err
}

func flip(p []byte) []byte {
	p = bytes.Clone(p)
	if len(p) > 0 {
		p[len(p)/2] ^= 0x10
	}
	return p
}

// Location is the wrapped backend's.
func (b *Backend) Location() string { return b.be.Location() }

// Close closes the wrapped backend.
func (b *Backend) Close() error { return b.be.Close() }

// Save saves, perhaps.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	return b.run(ctx, Save, h, func(f *Fault) error {
		switch {
		case f != nil && f.Effect == Short:
			if err := b.be.Save(ctx, h, data[:len(data)/2]); err != nil {
				return err
			}
			return fmt.Errorf("save %v: %w", h, f.Err)
		case f != nil && f.Effect == Corrupt:
			return b.be.Save(ctx, h, flip(data))
		}
		return b.be.Save(ctx, h, data)
	})
}

// Load loads, perhaps.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	return b.run(ctx, Load, h, func(f *Fault) error {
		if f == nil || (f.Effect != Short && f.Effect != Corrupt) {
			return b.be.Load(ctx, h, length, offset, fn)
		}
		return b.be.Load(ctx, h, length, offset, func(r io.Reader) error {
			data, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			if f.Effect == Short {
				return fn(bytes.NewReader(data[:len(data)/2]))
			}
			return fn(bytes.NewReader(flip(data)))
		})
	})
}

// Stat stats, perhaps.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (fi backend.FileInfo, err error) {
	err = b.run(ctx, Stat, h, func(f *Fault) error {
		fi, err = b.be.Stat(ctx, h)
		if err == nil && f != nil {
			switch f.Effect {
			case Short:
				fi.Size /= 2
			case Corrupt:
				fi.Size++
			}
		}
		return err
	})
	return fi, err
}

// List lists, perhaps.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	return b.run(ctx, List, backend.Handle{Type: t}, func(f *Fault) error {
		if f == nil || f.Effect == FailAfter {
			return b.be.List(ctx, t, fn)
		}
		var list []backend.FileInfo
		if err := b.be.List(ctx, t, func(fi backend.FileInfo) error { list = append(list, fi); return nil }); err != nil {
			return err
		}
		if f.Effect == Short {
			for _, fi := range list[:len(list)/2] {
				if err := fn(fi); err != nil {
					return err
				}
			}
		}
		return fmt.Errorf("list %v: %w", t, f.Err)
	})
}

// Remove removes, perhaps.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	return b.run(ctx, Remove, h, func(f *Fault) error {
		if f != nil && f.Effect != FailAfter {
			return fmt.Errorf("remove %v: %w", h, f.Err)
		}
		return b.be.Remove(ctx, h)
	})
}

// Create creates, perhaps.
func (b *Backend) Create(ctx context.Context) error {
	return b.run(ctx, Create, backend.Handle{}, func(f *Fault) error {
		if f != nil && f.Effect != FailAfter {
			return fmt.Errorf("create: %w", f.Err)
		}
		return b.be.Create(ctx)
	})
}
