package backend

import (
	"context"
	"time"
)

// Retention says until when a file can be neither deleted nor changed.
type Retention struct {
	Until time.Time // zero: it can
	Mode  string    // of the server, e.g. GOVERNANCE
}

// Retainer is what drivers are that can protect files for a time. Wrappers do not have these methods: see
// RetainerOf.
type Retainer interface {
	// CanRetain reports whether this very place can.
	CanRetain(ctx context.Context) (bool, error)
	// Retention tells until when a file is protected. Errors: ErrNotExist.
	Retention(ctx context.Context, h Handle) (Retention, error)
	// Retain protects a file until then at least. It never shortens or weakens what is there. Errors: ErrNotExist.
	Retain(ctx context.Context, h Handle, until time.Time) error
}

// RetainerOf finds the driver below wrappers; nil if it is no Retainer.
func RetainerOf(be Backend) Retainer {
	for {
		if r, ok := be.(Retainer); ok {
			return r
		}
		w, ok := be.(interface{ Unwrap() Backend })
		if !ok {
			return nil
		}
		be = w.Unwrap()
	}
}
