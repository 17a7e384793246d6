package sums

import (
	"crypto/sha256"
	"sync"
	"time"
)

const (
	// worthWaiting is how many blocks a piece must have to wait for another: fewer are done while one waits.
	worthWaiting = 512
	// worthJoining is how many a piece must have to join one that waits: that would otherwise be woken for nothing.
	worthJoining = 64
	// patience bounds how long a piece waits for others. They may be waiting for a disk, and a processor be idle meanwhile.
	patience = 3 * time.Millisecond
	// mostVain bounds for how many pieces nobody waits after one has waited in vain: fewer than 1<<mostVain.
	mostVain = 6
)

// Multi lets files that are read at the same time share a processor while they are hashed (multi-buffer hashing): the four checksums of
// two pieces take three quarters of the time that they take one piece after the other. For concurrent use.
type Multi struct {
	spare    func(parked int) bool
	patience time.Duration

	mu      sync.Mutex
	parked  int  // goroutines that wait, or of which another one does the work
	waiting *job // for another one to join
	vain    int  // how many met nobody since some met, at most mostVain
	skip    int  // how many shall not wait

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

// Sum256 returns the SHA-256 of p, which is hashed beside a file where there is one. The SHA-1 that goes along is of no use.
func (m *Multi) Sum256(p []byte) [sha256.Size]byte {
	if !hardware {
		return sha256.Sum256(p)
	}
	return m.New().Sum256(p)
}

// job is what is left to do of a piece: blocks at p of which the SHA-256 is h, and as many at q that go into the SHA-1 g.
type job struct {
	h      *[8]uint32
	g      *[5]uint32
	p, q   []byte
	blocks int
	back   chan struct{} // receives when another one has done a part of it
	met    bool          // a part of it was done together with another
}

// advance says that n blocks are done.
func (j *job) advance(n int) {
	j.p, j.q, j.blocks = j.p[n*block:], j.q[n*block:], j.blocks-n
}

// run does j, together with others where it meets them.
func (m *Multi) run(j *job) {
	j.back = make(chan struct{}, 1)
	var timer *time.Timer // one for all that j waits
	defer func() {
		if timer != nil {
			timer.Stop()
		}
	}()
	alone := false
	for j.blocks > 0 {
		m.mu.Lock()
		other := m.waiting
		switch {
		case other != nil && j.blocks >= worthJoining:
			m.waiting = nil
			n := min(j.blocks, other.blocks)
			m.shared += n
			m.vain = 0
			m.mu.Unlock()
			together(j, other, n)
			j.met, other.met = true, true
			m.mu.Lock()
			m.parked--
			m.mu.Unlock()
			other.back <- struct{}{}
		case !alone && other == nil && j.blocks >= worthWaiting && m.mayWait():
			m.waiting = j
			m.parked++
			m.mu.Unlock()
			if timer == nil {
				timer = time.NewTimer(m.patience)
			}
			alone = !m.wait(j, timer)
		default:
			m.mu.Unlock()
			j.alone(min(step, j.blocks))
		}
	}
}

// mayWait tells whether one more may wait. The lock is held.
func (m *Multi) mayWait() bool {
	if m.skip > 0 {
		m.skip--
		return false
	}
	return m.spare(m.parked + 1)
}

// wait returns when another one has done a part of j, or when the time is over, and reports false then.
func (m *Multi) wait(j *job, t *time.Timer) bool {
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
		if !j.met {
			m.vain = min(m.vain+1, mostVain)
			m.skip = 1<<m.vain - 1
		}
	}
	m.mu.Unlock()
	if !waits { // it is being done
		<-j.back
	}
	return false
}
