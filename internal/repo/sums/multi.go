package sums

import (
	"crypto/sha256"
	"sync"
	"time"
)

const (
	// worthWaiting is how many blocks a piece must have to wait for another: fewer are done while one waits.
	worthWaiting = 512
	// patience bounds how long a piece waits for another. Others may be waiting for a disk, and a processor be idle meanwhile.
	patience = 3 * time.Millisecond
)

// Multi lets files that are read at the same time share a processor while they are hashed (multi-buffer hashing): the four checksums of
// two pieces take three quarters of the time that they take one piece after the other. For concurrent use.
type Multi struct {
	spare    func(parked int) bool
	patience time.Duration

	mu      sync.Mutex
	parked  int  // goroutines that wait, or of which another one does the work
	waiting *job // for another one to join

	shared int // blocks that were hashed with those of another, for tests
}

// NewMulti returns a Multi. A goroutine waits for another one only while spare says that the processors have enough to do without it:
// parked of those that are at work do nothing. It must not use the Multi.
func NewMulti(spare func(parked int) bool) *Multi { return &Multi{spare: spare, patience: patience} }

// New begins a SHA-1.
func (m *Multi) New() *SHA1 {
	s := New()
	if s.std == nil {
		s.multi = m
	}
	return s
}

// Sum256 returns the SHA-256 of p, for which a SHA-1 is nothing to wait for either.
func (m *Multi) Sum256(p []byte) [sha256.Size]byte {
	return m.New().Sum256(p)
}

// job is what is left to do of a piece: blocks at p of which the SHA-256 is h, and as many at q that go into the SHA-1 g.
type job struct {
	h      *[8]uint32
	g      *[5]uint32
	p, q   []byte
	blocks int
	back   chan struct{} // receives when another one has done a part of it
}

// advance says that n blocks are done.
func (j *job) advance(n int) {
	j.p, j.q, j.blocks = j.p[n*block:], j.q[n*block:], j.blocks-n
}

// run does j, together with others where it meets them.
func (m *Multi) run(j *job) {
	alone := j.blocks < worthWaiting
	if !alone {
		j.back = make(chan struct{}, 1)
	}
	for j.blocks > 0 {
		m.mu.Lock()
		other := m.waiting
		switch {
		case other != nil:
			m.waiting = nil
			n := min(j.blocks, other.blocks)
			m.shared += n
			m.mu.Unlock()
			together(j, other, n)
			m.mu.Lock()
			m.parked--
			m.mu.Unlock()
			other.back <- struct{}{}
		case !alone && m.spare(m.parked+1):
			m.waiting = j
			m.parked++
			m.mu.Unlock()
			alone = !m.wait(j)
		default:
			m.mu.Unlock()
			j.alone(min(step, j.blocks))
		}
	}
}

// wait returns when another one has done a part of j, or after a while, and reports false then.
func (m *Multi) wait(j *job) bool {
	t := time.NewTimer(m.patience)
	defer t.Stop()
	select {
	case <-j.back:
		return true
	case <-t.C:
	}
	m.mu.Lock()
	waits := m.waiting == j
	if waits {
		m.waiting = nil
		m.parked--
	}
	m.mu.Unlock()
	if !waits { // it is being done
		<-j.back
	}
	return !waits
}
