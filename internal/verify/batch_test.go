package verify_test

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/pax/paxtest"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

// groups cuts an archive into blobs as capture does that of a large space: between entries, at names alone, and some of what lies
// between again. An archive that was altered keeps the blobs of the rest. With apart, each blob has a pack of its own.
func (e *edit) groups(place string, apart bool) {
	data := e.read(place)
	var blobs []id.ID
	from := 0
	cut := func(to int) {
		if to > from {
			blobs = append(blobs, e.blob(string(data[from:to])))
			if from = to; apart {
				ok(e.w.Flush(e.t.Context()))
			}
		}
	}
	src := strings.NewReader(string(data))
	for r := pax.NewReader(src); ; {
		at := len(data) - src.Len()
		h, err := r.Next()
		if err != nil {
			break
		}
		f := fnv.New32()
		f.Write([]byte(h.Name))
		if f.Sum32()%3 > 0 {
			cut(at)
		}
		if f.Sum32()%4 == 0 {
			cut(at + pax.BlockSize + 100) // within a header or what follows
		}
		if r.Skip() != nil {
			break
		}
	}
	cut(len(data))
	e.node(place, func(n *snapshot.Node) *snapshot.Node {
		n.Content = blobs
		return n
	})
}

// has tells whether the snapshot has a whole file there.
func (e *edit) has(place string) bool {
	n, err := snapshot.Lookup(e.t.Context(), e.r, *e.sn.Tree, place)
	if err != nil {
		return false
	}
	_, err = snapshot.LoadContent(e.t.Context(), e.r, n, 1<<30)
	return err == nil
}

// save adds the snapshot as it is now.
func (e *edit) save(day int) {
	ok(e.w.Flush(e.t.Context()))
	e.sn.Time = time.Unix(1_500_000_000+int64(day)*86400, 0)
	ok(snapshot.Save(e.t.Context(), e.r, e.sn))
}

// proofs runs a check and returns what it says of each snapshot's proof, and of how many others.
func proofs(t *testing.T, r *repo.Repository, remember int64) map[string][]string {
	t.Helper()
	rep, err := verify.Run(t.Context(), r, verify.Options{Remember: remember})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	for _, s := range rep.Snapshots {
		p := s.Proof
		out[s.ID.Short()] = []string{fmt.Sprint(s.Complete, p.Nodes, p.Revisions, p.Blobs, p.Bytes, p.InFlight, len(p.Missing))}
	}
	for _, e := range rep.Errors {
		if rest, isProof := strings.CutPrefix(e, "snapshot "); isProof {
			short, what, _ := strings.Cut(rest, ": ")
			out[short] = append(out[short], what)
		}
	}
	return out
}

// TestTogetherAsAlone: of many snapshots a check says what it says of each alone, whatever they have in common.
func TestTogetherAsAlone(t *testing.T) {
	cases := slices.DeleteFunc(slices.Clone(alterations), func(c alteration) bool {
		return strings.HasSuffix(c.name, "deep") // thousands of folders, which are for the walk over the trees
	})
	for i := range cases {
		cases[i].name = "decomposed, " + cases[i].name
	}
	n := len(cases)
	for _, c := range posixAlterations {
		c.name = "posix, " + c.name
		cases = append(cases, c)
	}
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b := decomposedBase()
			if i >= n {
				b = posixBase()
			}
			e := open(t, b)
			ok(e.be.Remove(t.Context(), backend.Handle{Type: backend.SnapshotFile, Name: b.sn.String()}))
			day := 0
			add := func() {
				for _, place := range []string{spaceTar, storeTar} {
					if e.has(place) {
						e.groups(place, false)
					}
				}
				e.save(day)
				day++
			}
			elsewhere := func() {
				e.folder("/config/files", func(n []*snapshot.Node) []*snapshot.Node {
					return append(n, e.newFile(fmt.Sprintf("z%d", day), "z"))
				})
			}
			add()
			elsewhere()
			add()
			good := *e.sn.Tree
			c.alter(e)
			if _, err := snapshot.Lookup(t.Context(), e.r, *e.sn.Tree, "/config/files/z1"); err == nil {
				add()
				elsewhere()
				add()
				elsewhere()
				e.entry2()
				add()
			} else {
				e.save(day)
				day++
			}
			e.sn.Tree = &good
			add()
			together := proofs(t, e.r, 0)
			if len(together) != day {
				t.Fatalf("%d verdicts of %d snapshots", len(together), day)
			}
			if little := proofs(t, e.r, 1500); !reflect.DeepEqual(little, together) {
				t.Errorf("with little memory:\n%q\nnot\n%q", little, together)
			}
			for short, want := range together {
				one := e.be.Clone()
				ok(e.be.List(t.Context(), backend.SnapshotFile, func(f backend.FileInfo) error {
					if !strings.HasPrefix(f.Name, short) {
						ok(one.Remove(t.Context(), backend.Handle{Type: backend.SnapshotFile, Name: f.Name}))
					}
					return nil
				}))
				r := must(repo.Open(t.Context(), one, password, repo.Options{}))
				ok(r.LoadIndex(t.Context()))
				alone := proofs(t, r, 0)
				if !reflect.DeepEqual(alone[short], want) {
					t.Errorf("snapshot %s: together\n%q\nalone\n%q", short, want, alone[short])
				}
			}
		})
	}
}

// entry2 changes an entry in the archive of the space that means nothing, if it can be read.
func (e *edit) entry2() {
	if !e.has(spaceTar) {
		return
	}
	for r := pax.NewReader(strings.NewReader(string(e.read(spaceTar)))); ; {
		if _, err := r.Next(); err == io.EOF {
			break
		} else if err != nil {
			return
		}
	}
	e.tar(spaceTar, func(items []paxtest.Item) []paxtest.Item {
		for i := range items {
			if strings.Contains(items[i].Name, ocis.NodePath(folderID)) || strings.HasSuffix(items[i].Name, "/folder") {
				items[i].UID++
			}
		}
		return items
	})
}

// counting counts how often something of each file is read.
type counting struct {
	backend.Backend
	mu    sync.Mutex
	loads map[string]int
}

func (c *counting) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	c.mu.Lock()
	c.loads[h.Name]++
	c.mu.Unlock()
	return c.Backend.Load(ctx, h, length, offset, fn)
}

// TestEqualPartsAreReadOnce: of an archive that changes in one place the rest is read for the first snapshot alone.
func TestEqualPartsAreReadOnce(t *testing.T) {
	for name, b := range map[string]base{"decomposed": decomposedBase(), "posix": posixBase()} {
		t.Run(name, func(t *testing.T) {
			e := open(t, b)
			blobs := map[id.ID]int{} // in how many archives
			for day := range 10 {
				if day%3 == 1 {
					e.entry2()
				}
				if day%3 == 2 {
					e.folder(folder, func(n []*snapshot.Node) []*snapshot.Node {
						return append(n, e.newFile(fmt.Sprintf("zz%d", day), "z"))
					})
				}
				e.groups(spaceTar, true)
				e.save(day)
				for _, d := range must(snapshot.Lookup(t.Context(), e.r, *e.sn.Tree, spaceTar)).Content {
					blobs[d]++
				}
			}
			ok(e.be.Remove(t.Context(), backend.Handle{Type: backend.SnapshotFile, Name: b.sn.String()}))
			for _, remember := range []int64{0, 1} {
				c := &counting{Backend: e.be, loads: map[string]int{}}
				r := must(repo.Open(t.Context(), c, password, repo.Options{}))
				ok(r.LoadIndex(t.Context()))
				rep := must(verify.Run(t.Context(), r, verify.Options{Remember: remember}))
				expect(t, rep)
				if len(rep.Snapshots) != 10 {
					t.Fatalf("%d verdicts", len(rep.Snapshots))
				}
				for i := range rep.Snapshots {
					if !rep.Snapshots[i].Complete {
						t.Errorf("snapshot %d is incomplete", i)
					}
				}
				shared, again, most := 0, 0, 0
				r.EachBlob(func(_ repo.BlobType, blob, pack id.ID, _, _ int64) {
					if blobs[blob] > 1 {
						shared++
						if c.loads[pack.String()] > 1 {
							again++
						}
						most = max(most, c.loads[pack.String()])
					}
				})
				if remember == 0 && (shared < 5 || again > shared/10) { // not of an entry that was changed, which has several
					t.Errorf("of %d blobs that archives share %d were read again", shared, again)
				}
				if most > 7 { // days 3, 6 and 9 are as those before
					t.Errorf("of a space that is as it was some was read again: %d times in all", most)
				}
				if remember == 1 && again < shared {
					t.Errorf("of %d blobs that archives share only %d were read again without memory for them", shared, again)
				}
			}
		})
	}
}

// TestContentElsewhere: a content that lies outside of the space's own folders may be another one in each snapshot.
func TestContentElsewhere(t *testing.T) {
	const place = "/config/files/opencloud.yaml"
	e := open(t, decomposedBase())
	ok(e.be.Remove(t.Context(), backend.Handle{Type: backend.SnapshotFile, Name: e.sn.ID().String()}))
	e.tar(spaceTar, func(items []paxtest.Item) []paxtest.Item {
		return append(items, paxtest.Item{Type: '0', Name: "zz", Rec: map[string]string{pax.Content: place, pax.Size: "5"}})
	})
	e.save(0)
	e.save(1)
	e.content(place, []byte("another"))
	e.save(2)
	bad := e.sn.ID().Short()
	expect(t, run(t, e, false), "snapshot "+bad+`: "zz" has "5" bytes, but`)
}

// TestGlobalRecords: global records change what all that follows means, however equal it is.
func TestGlobalRecords(t *testing.T) {
	e := open(t, decomposedBase())
	ok(e.be.Remove(t.Context(), backend.Handle{Type: backend.SnapshotFile, Name: e.sn.ID().String()}))
	e.groups(spaceTar, false)
	e.save(0)
	good := *e.sn.Tree
	plain := must(snapshot.Lookup(t.Context(), e.r, good, spaceTar))
	var w paxtest.Writer
	rec := paxtest.Record(pax.Holes, "99999999:1")
	w.Block('g', "pax", "", &paxtest.Item{}, len(rec))
	w.Padded([]byte(rec))
	e.node(spaceTar, func(n *snapshot.Node) *snapshot.Node {
		n.Size += uint64(w.Len())
		n.Content = append([]id.ID{e.blob(w.String())}, plain.Content...)
		return n
	})
	e.save(1)
	bad := "snapshot " + e.sn.ID().Short()
	e.sn.Tree = &good
	e.save(2)
	rep := run(t, e, false)
	files := 0
	for r := pax.NewReader(strings.NewReader(string(e.read(spaceTar)))); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		if h.Type == '0' {
			files++
		}
	}
	for _, s := range rep.Errors {
		if !strings.HasPrefix(s, bad) || !strings.Contains(s, "list of holes") {
			t.Errorf("found too much: %s", s)
		}
	}
	if len(rep.Errors) != files || files < 5 {
		t.Errorf("%d errors about %d files", len(rep.Errors), files)
	}
}
