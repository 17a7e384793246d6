package backend

import "context"

type hintKey struct{}

// Hint says something about an operation that its handle does not tell.
type Hint uint8

// The hints.
const (
	// Metadata marks packs of trees, which are worth keeping near.
	Metadata Hint = 1 << iota
	// Near marks a part of a pack of contents that is worth keeping near, without the rest of the pack.
	Near
	// Fresh asks for the stored bytes themselves, after a copy of them has proved to be damaged.
	Fresh
)

// WithHint adds a hint to a context.
func WithHint(ctx context.Context, h Hint) context.Context {
	return context.WithValue(ctx, hintKey{}, Hints(ctx)|h)
}

// Hints returns the hints of a context.
func Hints(ctx context.Context) Hint {
	h, _ := ctx.Value(hintKey{}).(Hint)
	return h
}
