package transport

import (
	"bytes"
	"errors"
	"sync"
)

// Body is the body of a request whose bytes the caller uses again when the request is over. The
// library may go on reading after it has returned an error; after Finish it reads no more.
type Body struct {
	mu     sync.Mutex
	r      *bytes.Reader
	closed bool
}

// NewBody returns a body that reads data.
func NewBody(data []byte) *Body { return &Body{r: bytes.NewReader(data)} }

var errClosed = errors.New("the request is over")

func (b *Body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, errClosed
	}
	return b.r.Read(p)
}

// Seek moves the position, for a request that is sent again.
func (b *Body) Seek(offset int64, whence int) (int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, errClosed
	}
	return b.r.Seek(offset, whence)
}

// Finish ends all reading. It is not named Close, since the library would call that too early.
func (b *Body) Finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
}
