package capture

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestShelfIsTidied: what is waste does not grow without bound, and what is in use survives.
func TestShelfIsTidied(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	for i := range 40 {
		c, err := LoadCache(path)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			if s := c.space("stays"); s == nil || string(s.result) != "here" {
				t.Fatalf("round %d: the space that stays is %v", i, s)
			}
		}
		c.putSpace("changes", &cachedSpace{result: bytes.Repeat([]byte{byte(i)}, 1<<20)})
		if i == 0 {
			c.putSpace("stays", &cachedSpace{result: []byte("here")})
		}
		if err := c.Save(path); err != nil {
			t.Fatal(err)
		}
		if s := c.space("changes"); s == nil || s.result[5] != byte(i) {
			t.Fatalf("round %d: the space that changes is damaged", i)
		}
		c.Close()
	}
	all, err := filepath.Glob(path + shelfSuffix + "*")
	if err != nil || len(all) != 1 {
		t.Fatalf("%q, %v", all, err)
	}
	if st, err := os.Stat(all[0]); err != nil || st.Size() > 8<<20 {
		t.Errorf("it has %d bytes, %v", st.Size(), err)
	}
}

// TestCacheWithoutRoom: a cache that cannot be written is kept in memory for as long as the run lasts.
func TestCacheWithoutRoom(t *testing.T) {
	c := newCache()
	c.out = &shelf{base: filepath.Join(t.TempDir(), "file", "x")}
	if err := os.WriteFile(filepath.Dir(c.out.base), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.putSpace("a", &cachedSpace{result: []byte("here")})
	if s := c.space("a"); s == nil || string(s.result) != "here" {
		t.Errorf("it is %v", s)
	}
}

// TestFullLooksAreSpread: each space is looked at in full after a week at the latest, and not all on one day.
func TestFullLooksAreSpread(t *testing.T) {
	const day = 24 * 3600
	at := func(sec int64) timespec { return timespec{sec: 1e9 + sec} }
	days := map[int64]int{}
	for i := range 700 {
		id := fmt.Sprintf("space-%d", i)
		d := int64(0)
		for ; !lookDue(id, at(0), at(d*day)); d++ {
		}
		days[d]++
	}
	if len(days) < 3 || days[8] > 0 || days[0] > 0 || days[3] > 0 {
		t.Errorf("spaces by the day on which they are due: %v", days)
	}
	for d, n := range days {
		if n > 350 {
			t.Errorf("%d of 700 spaces are due on day %d", n, d)
		}
	}
	if !lookDue("a", at(100), at(0)) || !lookDue("a", timespec{}, at(0)) {
		t.Error("a clock that went back, or a space that was never looked at, is not due")
	}
}
