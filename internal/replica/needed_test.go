package replica

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// blobs is a Loader that counts what it is asked for.
type blobs struct {
	m     map[id.ID][]byte
	loads int
}

func (b *blobs) LoadBlob(_ context.Context, _ repo.BlobType, d id.ID, _ []byte) ([]byte, error) {
	b.loads++
	p, ok := b.m[d]
	if !ok {
		return nil, repo.ErrUnknownBlob
	}
	return p, nil
}

func (b *blobs) LoadBlobs(ctx context.Context, t repo.BlobType, ids []id.ID, fn func(id.ID, []byte) error) error {
	for _, d := range ids {
		p, err := b.LoadBlob(ctx, t, d, nil)
		if err == nil {
			err = fn(d, p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// tar reads a whole tar.
func (n *Needed) tar(ctx context.Context, l Loader, node *snapshot.Node) error {
	if err := n.file(ctx, l, node); err != nil {
		return err
	}
	return n.read(ctx, l)
}

func (b *blobs) Size(_ repo.BlobType, d id.ID) (int64, bool) {
	p, ok := b.m[d]
	return int64(len(p)), ok
}

// file cuts p where cuts say so.
func (b *blobs) file(p []byte, cuts ...int) *snapshot.Node {
	n := &snapshot.Node{Name: "x.tar", Type: snapshot.File}
	last := 0
	for _, c := range append(cuts, len(p)) {
		d := id.Hash(p[last:c])
		b.m[d] = p[last:c]
		n.Content = append(n.Content, d)
		last = c
	}
	return n
}

func record(key string) []byte {
	for n := 0; ; n++ {
		if s := fmt.Sprintf("%d HOLDFAST.object=%s\n", n, key); len(s) == n {
			return []byte(s)
		}
	}
}

// TestKeysAreFoundWhereverTheTarIsCut, also within a record and its length.
func TestKeysAreFoundWhereverTheTarIsCut(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 5))
	var tar []byte
	var keys []string
	for i := range 40 {
		key := fmt.Sprintf("space/%d/%x", i, rnd.Uint64())
		if i%7 == 0 {
			key += "\nwith a line\n" // the length tells where it ends
		}
		if i == 20 {
			key += string(bytes.Repeat([]byte("k"), 1000))
		}
		keys = append(keys, key)
		tar = append(tar, bytes.Repeat([]byte{0}, rnd.IntN(200))...)
		tar = append(tar, record(key)...)
		tar = append(tar, record("mtime"[rnd.IntN(3):])[:12]...)
		tar = append(tar, '\n')
	}
	for round := range 60 {
		b := &blobs{m: map[id.ID][]byte{}}
		var cuts []int
		for at := 0; ; {
			if at += 1 + rnd.IntN(40+round*30); at >= len(tar) {
				break
			}
			cuts = append(cuts, at)
		}
		n := newNeeded()
		if err := n.tar(t.Context(), b, b.file(tar, cuts...)); err != nil {
			t.Fatal(err)
		}
		n.finish()
		for _, k := range keys {
			if !n.Has(k) {
				t.Fatalf("cut at %v: %q is not found", cuts, k)
			}
		}
		if n.Has("space/41") || n.Has("") {
			t.Fatal("what is in no record is found")
		}
	}
}

// TestWhatTarsShareIsReadOnce, and what stands behind something else is read again.
func TestWhatTarsShareIsReadOnce(t *testing.T) {
	b := &blobs{m: map[id.ID][]byte{}}
	chunk := func(i int) []byte {
		return append(bytes.Repeat([]byte{byte(i)}, 3000), record(fmt.Sprint("key-", i))...)
	}
	var tar []byte
	var cuts []int
	for i := range 50 {
		tar = append(tar, chunk(i)...)
		cuts = append(cuts, len(tar))
	}
	n := newNeeded()
	first := b.file(tar, cuts[:49]...)
	if err := n.tar(t.Context(), b, first); err != nil || b.loads != 51 { // one is before the first of the second batch
		t.Fatalf("%d loads: %v", b.loads, err)
	}
	b.loads = 0
	if err := n.tar(t.Context(), b, first); err != nil || b.loads != 0 {
		t.Errorf("the same tar again: %d loads, %v", b.loads, err)
	}
	// One chunk in the middle is another one: it is read, and its neighbours for what runs across the borders.
	second := b.file(tar, cuts[:49]...)
	p := chunk(99)
	b.m[id.Hash(p)] = p
	second.Content[20] = id.Hash(p)
	if err := n.tar(t.Context(), b, second); err != nil || b.loads != 3 {
		t.Errorf("a tar with one new chunk: %d loads, %v", b.loads, err)
	}
	n.finish()
	if n.Len() != 51 || !n.Has("key-99") || !n.Has("key-20") {
		t.Errorf("%d keys", n.Len())
	}
	// What cannot be read must not count as needing nothing.
	delete(b.m, first.Content[7])
	if err := newNeeded().tar(t.Context(), b, first); err == nil {
		t.Error("a chunk that is missing is no error")
	}
}

func TestManyKeysStayCompact(t *testing.T) {
	n := newNeeded()
	for i := range 300_000 {
		n.add(fmt.Appendf(nil, "%d", i%100_000))
	}
	if c := cap(n.keys); c > 4*100_000 {
		t.Errorf("room for %d keys", c)
	}
	n.finish()
	if n.Len() != 100_000 {
		t.Errorf("%d keys", n.Len())
	}
}

func TestNamesOfTheProduct(t *testing.T) {
	n := newNeeded()
	n.spaces["einstein"] = true
	for key, want := range map[string]bool{
		"83992cae-4f5a-460b-84c1-1888892f955a/6f/e9/00/16/-ff61-402c-9158-fd30bcf251f5": true,
		"83992cae-4f5a-460b-84c1-1888892f955a/odd":                                      true,
		"6fe90016-ff61-402c-9158-fd30bcf251f5":                                          true, // before May 2022
		"einstein/odd":                                                                  true,
		"curie/6f/e9/00/16/-ff61-402c-9158-fd30bcf2":                                    true,
		"curie/odd":                         false,
		"holdfast-aside-2026/a":             false,
		"6fe90016-ff61-402c-9158-fd30bcf2z": false,
		"notes.txt":                         false,
		"a/b/c/d/e/f":                       false,
	} {
		if n.product(key) != want {
			t.Errorf("%q: %v", key, !want)
		}
	}
}
