package ui

import "errors"

// Hinter is an error that knows what to do next. Hints are sentences.
type Hinter interface{ Hints() []string }

type hinted struct {
	err   error
	hints []string
}

func (h *hinted) Error() string   { return h.err.Error() }
func (h *hinted) Unwrap() error   { return h.err }
func (h *hinted) Hints() []string { return h.hints }

// WithHints adds sentences that tell what to do about err. It returns nil for nil.
func WithHints(err error, hints ...string) error {
	if err == nil || len(hints) == 0 {
		return err
	}
	return &hinted{err, hints}
}

// Hints collects the hints of err and of all it wraps, outermost first, each once.
func Hints(err error) []string {
	var out []string
	seen := map[string]bool{}
	var walk func(error)
	walk = func(err error) {
		for err != nil {
			if h, ok := err.(Hinter); ok {
				for _, s := range h.Hints() {
					if !seen[s] {
						seen[s] = true
						out = append(out, s)
					}
				}
			}
			if m, ok := err.(interface{ Unwrap() []error }); ok {
				for _, e := range m.Unwrap() {
					walk(e)
				}
				return
			}
			err = errors.Unwrap(err)
		}
	}
	walk(err)
	return out
}
