package replica

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Loader gives what a repository holds. *repo.Repository is one, its index loaded.
type Loader interface {
	snapshot.BlobLoader
	snapshot.BlobsLoader
	Size(t repo.BlobType, d id.ID) (int64, bool)
}

// Needed is what snapshots need of buckets. Keys are kept as 8 bytes each, hashed: two that look alike make an
// object stay that could go, never the other way round. All keys are in one set, whatever bucket a snapshot
// names, because one bucket can be known by two addresses.
type Needed struct {
	// Replicas are the buckets that snapshots name as theirs, the newest description of each; Sources those in which
	// instances had their blobs.
	Replicas, Sources []snapshot.BucketPlace

	seed   maphash.Seed
	keys   []uint64 // sorted and distinct after finish
	next   int      // length at which keys are made distinct
	spaces map[string]bool
	done   map[[16]byte]bool // chunks that were read, or are to do, each with what stands before it
	todo   []piece
}

func newNeeded() *Needed {
	return &Needed{seed: maphash.MakeSeed(), next: keysAtFirst, spaces: map[string]bool{}, done: map[[16]byte]bool{}}
}

// keysAtFirst is how many keys are collected until they are made distinct for the first time.
const keysAtFirst = 1 << 16

func (n *Needed) add(key []byte) {
	n.keys = append(n.keys, maphash.Bytes(n.seed, key))
	if len(n.keys) >= n.next {
		n.finish()
		n.next = max(keysAtFirst, 2*len(n.keys))
	}
}

func (n *Needed) finish() {
	slices.Sort(n.keys)
	n.keys = slices.Compact(n.keys)
}

// find returns the place of a key in the set.
func (n *Needed) find(key string) (int, bool) {
	return slices.BinarySearch(n.keys, maphash.String(n.seed, key))
}

// Has reports whether a snapshot may need the object.
func (n *Needed) Has(key string) bool {
	_, ok := n.find(key)
	return ok
}

// Len is how many objects are needed.
func (n *Needed) Len() int { return len(n.keys) }

// SamePlace reports whether two descriptions mean one bucket.
func SamePlace(a, b snapshot.BucketPlace) bool {
	return a.Bucket == b.Bucket && strings.TrimRight(a.Endpoint, "/") == strings.TrimRight(b.Endpoint, "/")
}

func notePlace(list *[]snapshot.BucketPlace, p snapshot.BucketPlace) {
	for i, old := range *list {
		if SamePlace(old, p) {
			(*list)[i] = p
			return
		}
	}
	*list = append(*list, p)
}

// Collect finds out what the snapshots in list, oldest first, need. Of what they share, each part is read once. With an
// error, something is left out, and nothing must be removed. Memory: 8 to 16 bytes for each object, and some for each MiB of metadata.
func Collect(ctx context.Context, l Loader, list []*snapshot.Snapshot, sink progress.Sink) (*Needed, error) {
	n := newNeeded()
	ev := progress.Event{Kind: progress.Start, Phase: "objects", Unit: "snapshots", Total: int64(len(list))}
	sink.Emit(ev)
	trees := map[id.ID]bool{} // folders with tars that were read
	var failed error          // the others may still tell which replicas there are
	for i, s := range list {
		err := n.snapshot(ctx, l, s, trees)
		if err == nil {
			err = n.read(ctx, l)
		}
		if err != nil {
			n.todo = nil
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			failed = fmt.Errorf("it cannot be told which objects snapshot %s needs: %w", s.ID().Short(), err)
		}
		ev.Kind, ev.Done = progress.Update, int64(i+1)
		sink.Emit(ev)
	}
	n.finish()
	n.done = nil
	ev.Kind = progress.Finish
	sink.Emit(ev)
	return n, failed
}

func (n *Needed) snapshot(ctx context.Context, l Loader, s *snapshot.Snapshot, trees map[id.ID]bool) error {
	if s.Tree == nil {
		return errors.New("it has no tree")
	}
	m, err := snapshot.LoadManifest(ctx, l, *s.Tree)
	if errors.Is(err, snapshot.ErrNoSuchPath) && !s.HasTag(snapshot.Tag) {
		return nil // another program's
	}
	if err != nil {
		return err
	}
	for i := range m.Stores {
		st := &m.Stores[i]
		if st.Bucket == nil {
			continue
		}
		notePlace(&n.Sources, st.Bucket.BucketPlace)
		if st.Bucket.Way != snapshot.WayReplica || st.Bucket.Replica == nil {
			continue
		}
		notePlace(&n.Replicas, *st.Bucket.Replica)
		for k := range st.Spaces {
			n.spaces[st.Spaces[k].ID] = true
		}
		if err := n.store(ctx, l, *s.Tree, st.Name, trees); err != nil {
			return err
		}
	}
	return nil
}

// store reads the tars of a store.
func (n *Needed) store(ctx context.Context, l Loader, root id.ID, name string, trees map[id.ID]bool) error {
	base := "/storage/" + name
	folder, err := snapshot.Lookup(ctx, l, root, base+"/metadata")
	if err != nil {
		return err
	}
	node, err := snapshot.Lookup(ctx, l, root, base+"/store.tar")
	if err != nil {
		return err
	}
	if folder.Type != snapshot.Dir || node.Type != snapshot.File {
		return fmt.Errorf("%s/metadata is a %s and %s/store.tar a %s", base, folder.Type, base, node.Type)
	}
	if err := n.file(ctx, l, node); err != nil {
		return err
	}
	if trees[folder.Subtree] {
		return nil
	}
	t, err := snapshot.LoadTree(ctx, l, folder.Subtree)
	if err != nil {
		return err
	}
	for _, node := range t.Nodes {
		if node.Type != snapshot.File {
			return fmt.Errorf("%s/metadata/%s is a %s", base, node.Name, node.Type)
		}
		if err := n.file(ctx, l, node); err != nil {
			return err
		}
	}
	trees[folder.Subtree] = true
	return nil
}

// recordLimit is more than the longest record of an object takes, in bytes: keys have up to 1024.
const recordLimit = 2048

// batch is how many chunks are asked for at a time, so that neighbours are read in one piece and others at once: 16 MiB
// at most, and twice that with what stands before them.
const batch = 32

// piece is a chunk that was not read yet, the last one of ids, and those before it in which a record can begin.
type piece []id.ID

// file looks for the chunks of a tar that were not read before, in this or another tar, behind the same ones. The tars of
// successive snapshots share all but a few.
func (n *Needed) file(ctx context.Context, l Loader, node *snapshot.Node) error {
	ids := node.Content
	for i := range ids {
		from, before := i, int64(0)
		for from > 0 && before < recordLimit {
			from--
			size, _ := l.Size(repo.DataBlob, ids[from])
			before += size
		}
		h := sha256.New()
		for _, d := range ids[from : i+1] {
			h.Write(d[:])
		}
		mark := [16]byte(h.Sum(nil)[:16])
		if n.done[mark] {
			continue
		}
		n.done[mark] = true
		n.todo = append(n.todo, piece(ids[from:i+1]))
		if len(n.todo) >= batch {
			if err := n.read(ctx, l); err != nil {
				return err
			}
		}
	}
	return nil
}

// read reads what is to do.
func (n *Needed) read(ctx context.Context, l Loader) error {
	if len(n.todo) == 0 {
		return nil
	}
	have := map[id.ID][]byte{}
	var want []id.ID
	for _, p := range n.todo {
		for _, d := range p {
			if _, ok := have[d]; !ok {
				have[d] = nil
				want = append(want, d)
			}
		}
	}
	var mu sync.Mutex
	err := l.LoadBlobs(ctx, repo.DataBlob, want, func(d id.ID, data []byte) error {
		data = bytes.Clone(data)
		mu.Lock()
		have[d] = data
		mu.Unlock()
		return nil
	})
	if err != nil {
		return fmt.Errorf("read the archives of spaces: %w", err)
	}
	var buf []byte
	for _, p := range n.todo {
		buf = buf[:0]
		for _, d := range p[:len(p)-1] {
			buf = append(buf, have[d]...)
		}
		buf = append(buf[:0], buf[max(0, len(buf)-recordLimit):]...)
		n.scan(append(buf, have[p[len(p)-1]]...))
	}
	n.todo = n.todo[:0]
	return nil
}

var objectRecord = []byte(" " + pax.Object + "=")

// scan adds the keys of all records in p that name an object. It does not look for entries: what looks like such
// a record within a file that stands in the tar can only make an object stay.
func (n *Needed) scan(p []byte) {
	for at := 0; ; {
		i := bytes.Index(p[at:], objectRecord)
		if i < 0 {
			return
		}
		i += at
		at = i + len(objectRecord)
		// "<length> HOLDFAST.object=<key>\n"; the length counts all of it.
		first := i
		for first > 0 && i-first < 5 && p[first-1] >= '0' && p[first-1] <= '9' {
			first--
		}
		size, err := strconv.Atoi(string(p[first:i]))
		if end := first + size; err == nil && end > at && end <= len(p) && p[end-1] == '\n' {
			n.add(p[at : end-1])
		} else if end := bytes.IndexByte(p[at:], '\n'); end >= 0 {
			n.add(p[at : at+end])
		}
	}
}
