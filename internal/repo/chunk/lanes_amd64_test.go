package chunk

import (
	"math/rand/v2"
	"testing"
)

// The lanes find what one chain finds, in whichever lane it is, and go on with the same state.
func TestLanes(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	c := New([32]byte{7}, small)
	data := random(9, 40*lane)
	var hits [4]int
	for range 3000 {
		p := data[r.IntN(len(data)/2):]
		p = p[:r.IntN(len(p))]
		h, limit := r.Uint64(), ^uint64(0)>>(8+r.IntN(10))
		n, state := c.scan(p, h, limit)
		wantN, wantState := c.scanOne(p, h, limit)
		if n != wantN || state != wantState {
			t.Fatalf("%d bytes, state %x, limit %x: %d and %x, not %d and %x", len(p), h, limit, n, state, wantN, wantState)
		}
		if n > 0 {
			hits[(n-1)/lane%4]++
		}
	}
	for i, n := range hits {
		if n < 50 {
			t.Errorf("only %d cuts fell into lane %d", n, i)
		}
	}
}
