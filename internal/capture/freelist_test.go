package capture

import "testing"

// TestFreeListIsBounded: it keeps as many buffers as it should, and none that has outgrown its size.
func TestFreeListIsBounded(t *testing.T) {
	l := newFreeList(100, 2)
	l.put(make([]byte, 10, 1000))
	if b := l.get(); cap(b) != 100 || len(b) != 100 {
		t.Errorf("a buffer of %d bytes was kept", cap(b))
	}
	for range 3 {
		l.put(make([]byte, 150))
	}
	for i, want := range []int{150, 150, 100} {
		if b := l.get(); cap(b) != want {
			t.Errorf("buffer %d has %d bytes, want %d", i, cap(b), want)
		}
	}
}
