// Package link simulates a slow network within one machine: a proxy on loopback whose connections share
// a bandwidth in each direction, and through which all bytes come late.
//
// It knows nothing of lost packets and of TCP's slow start. A new connection costs what a handshake would.
package link

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Options of Start.
type Options struct {
	// Rate is in bytes a second, for each direction.
	Rate int64
	// Latency is how long a byte is under way in each direction; a round trip takes two of them.
	Latency time.Duration
}

const (
	// step is the most that is sent as one piece, in bytes: at 100 Mbit/s about a millisecond's worth.
	step = 16 << 10
	// window is how much of a connection can be under way in one direction, in bytes: as the buffers of a
	// system allow, and several times what fits into the link.
	window = 4 << 20
	// burst is how far a sender may be ahead of the link, so that late timers cost no bandwidth.
	burst = 5 * time.Millisecond
)

// Link is a link that works.
type Link struct {
	o        Options
	target   string
	l        net.Listener
	up, down direction
	conns    atomic.Int64
	wg       sync.WaitGroup

	mu     sync.Mutex
	open   map[net.Conn]bool // guarded by mu
	closed bool              // guarded by mu
}

// direction is one of the two.
type direction struct {
	bytes atomic.Int64

	mu   sync.Mutex
	free time.Time // guarded by mu: when the link has sent all that was given to it
}

// Start makes a link to a TCP address. Close ends it.
func Start(target string, o Options) (*Link, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	k := &Link{o: o, target: target, l: l, open: map[net.Conn]bool{}}
	k.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			k.wg.Go(func() { k.serve(c) })
		}
	})
	return k, nil
}

// Addr is the near end.
func (k *Link) Addr() string { return k.l.Addr().String() }

// Counts are the bytes that went up, from the client, and down, and the connections.
func (k *Link) Counts() (up, down, conns int64) {
	return k.up.bytes.Load(), k.down.bytes.Load(), k.conns.Load()
}

// Close ends the link and all connections.
func (k *Link) Close() {
	k.l.Close()
	k.mu.Lock()
	k.closed = true
	for c := range k.open {
		c.Close()
	}
	k.mu.Unlock()
	k.wg.Wait()
}

// keep notes an open connection; it reports false if the link is closed.
func (k *Link) keep(c net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.open[c] = true
	return !k.closed
}

func (k *Link) drop(c net.Conn) {
	c.Close()
	k.mu.Lock()
	delete(k.open, c)
	k.mu.Unlock()
}

func (k *Link) serve(near net.Conn) {
	defer k.drop(near)
	began := time.Now()
	k.conns.Add(1)
	if !k.keep(near) {
		return
	}
	far, err := net.Dial("tcp", k.target)
	if err != nil {
		return
	}
	defer k.drop(far)
	if !k.keep(far) {
		return
	}
	var wg sync.WaitGroup
	// The client could send nothing before the handshake was over.
	wg.Go(func() { k.carry(far, near, &k.up, began.Add(2*k.o.Latency)) })
	wg.Go(func() { k.carry(near, far, &k.down, time.Time{}) })
	wg.Wait()
}

type piece struct {
	data []byte
	at   time.Time
}

// carry brings what src sends to dst.
func (k *Link) carry(dst, src net.Conn, d *direction, from time.Time) {
	queue := make(chan piece, window/step)
	var wg sync.WaitGroup
	wg.Go(func() {
		for p := range queue {
			time.Sleep(time.Until(p.at))
			if _, err := dst.Write(p.data); err != nil {
				src.Close() // nobody wants the rest
				for range queue {
				}
				return
			}
		}
		if t, ok := dst.(*net.TCPConn); ok {
			_ = t.CloseWrite()
		}
	})
	time.Sleep(time.Until(from))
	for {
		buf := make([]byte, step)
		n, err := src.Read(buf)
		if n > 0 {
			sent := d.send(n, k.o.Rate)
			queue <- piece{buf[:n], sent.Add(k.o.Latency)}
			time.Sleep(time.Until(sent) - burst)
		}
		if err != nil {
			break
		}
	}
	close(queue)
	wg.Wait()
}

// send takes its turn on the link for n bytes and tells when they will all be on it.
func (d *direction) send(n int, rate int64) time.Time {
	d.bytes.Add(int64(n))
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); d.free.Before(now) {
		d.free = now
	}
	d.free = d.free.Add(time.Duration(int64(n) * int64(time.Second) / rate))
	return d.free
}
