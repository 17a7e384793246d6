package capture

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/sums"
)

// keeper is a Target that remembers how long each blob is.
type keeper struct {
	mu    sync.Mutex
	sizes map[id.ID]int
}

func (k *keeper) Save(ctx context.Context, t repo.BlobType, data []byte) (id.ID, bool, error) {
	d := id.Hash(data)
	isNew, err := k.SaveAs(ctx, t, d, data)
	return d, isNew, err
}

func (k *keeper) SaveAs(_ context.Context, _ repo.BlobType, d id.ID, data []byte) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sizes[d] = len(data)
	return true, nil
}

// Where content is cut must not depend on how much of it is read at a time.
func TestCutsOfAStream(t *testing.T) {
	ctx := context.Background()
	noise := make([]byte, 21<<20)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	for name, data := range map[string][]byte{
		"noise":          noise,
		"zeros":          make([]byte, 17<<20), // the largest chunks
		"zeros in noise": slices.Concat(noise[:3<<20], make([]byte, 6<<20), noise[:5<<20+1]),
		"one buffer":     noise[:fileBuffer],
		"one byte more":  noise[:fileBuffer+1],
		"one byte":       noise[:1],
		"nothing":        nil,
	} {
		k := &keeper{sizes: map[id.ID]int{}}
		s := newSaver(k, [32]byte{7}, new(atomic.Int64), Limits{Workers: 1, Compressors: 2}, nil)
		var want []id.ID
		for rest := data; len(rest) > 0; {
			n := s.files.Cut(rest)
			want = append(want, id.Hash(rest[:n]))
			rest = rest[n:]
		}
		for way, r := range map[string]io.Reader{"at once": bytes.NewReader(data), "in halves": iotest.HalfReader(bytes.NewReader(data))} {
			for _, h := range []*sums.SHA1{nil, sums.New()} {
				c, err := s.section(ctx, r, h)
				if err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(c.ids, want) || c.size != int64(len(data)) {
					t.Errorf("%s, read %s: %d chunks of %d bytes, want %d of %d", name, way, len(c.ids), c.size, len(want), len(data))
				}
				r = bytes.NewReader(data)
			}
		}

		// As tars are, which grow by small pieces.
		k.sizes = map[id.ID]int{}
		st := stream{s: s}
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 100_001)
			st.buf = append(st.buf, rest[:n]...)
			rest = rest[n:]
			if err := st.drain(ctx, len(rest) == 0); err != nil {
				t.Fatal(err)
			}
		}
		at := 0
		for i, d := range st.ids {
			n := k.sizes[d]
			if s.tars.Cut(data[at:]) != n {
				t.Fatalf("%s: piece %d of a stream has %d bytes, want %d", name, i, n, s.tars.Cut(data[at:]))
			}
			at += n
		}
		if at != len(data) || st.size != int64(len(data)) {
			t.Errorf("%s: a stream gave %d bytes, told of %d, want %d", name, at, st.size, len(data))
		}
	}
}

func TestEnoughAtWork(t *testing.T) {
	slots := make(chan struct{}, 4)
	enough := enoughAtWork(slots, 2)
	for busy := range 5 {
		for parked := range 5 {
			if got, want := enough(parked), busy-parked >= 2; got != want {
				t.Errorf("%d at work, %d of them parked: %v", busy, parked, got)
			}
		}
		if busy < 4 {
			slots <- struct{}{}
		}
	}
	if enoughAtWork(nil, 2)(1) {
		t.Error("nobody is at work")
	}
}
