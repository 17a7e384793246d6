package consistency_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/consistency"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// snapshotOf captures the instance and returns the stores in the snapshot.
func snapshotOf(t *testing.T, name, dir string) []consistency.Store {
	t.Helper()
	ctx := t.Context()
	r, err := repo.Init(ctx, mem.New(), "pw", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 1, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	inst := &ocis.Instance{Product: ocis.OpenCloud, Setup: "posix", BasePath: data, ConfigDir: filepath.Join(dir, "config")}
	for _, s := range []struct{ name, root string }{{"users", "users"}, {"system", "metadata"}} {
		st := ocis.Store{Name: s.name, Root: filepath.Join(data, "storage", s.root), Driver: "decomposed", Layout: ocis.Decomposed, Prefix: ocis.PrefixOpenCloud}
		if s.name == "users" && name == testfixture.OCIS {
			st.Driver, st.Prefix = "ocis", ocis.PrefixOCIS
		}
		if s.name == "users" && name == testfixture.OpenCloudPosix {
			st.Driver, st.Layout = "posix", ocis.Posix
		}
		inst.Stores = append(inst.Stores, st)
		for _, kind := range []ocis.Kind{ocis.Metadata, ocis.Blobs} {
			inst.DataSets = append(inst.DataSets, ocis.DataSet{Name: "storage-" + s.name + "-" + string(kind), Kind: kind, Path: st.Root, Store: s.name, Found: true})
		}
	}
	w := r.NewWriter(ctx)
	res, err := capture.Run(ctx, r, w, capture.Options{Instance: inst})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := res.Finish(ctx, []byte("readme\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	var out []consistency.Store
	for i := range res.Manifest.Stores {
		st := &res.Manifest.Stores[i]
		out = append(out, consistency.Store{Name: st.Name, Place: consistency.NewTars(r, tree, st), Layout: st.Layout, Prefix: st.Prefix})
	}
	return out
}

// TestSnapshot: a snapshot gives the same findings as the directories that it was made of, whole and
// broken in many ways at once.
func TestSnapshot(t *testing.T) {
	for _, name := range []string{testfixture.OCIS, testfixture.OpenCloudPosix} {
		t.Run(name, func(t *testing.T) {
			dir := testfixture.Unpack(t, name)
			b := &breaker{t: t, prefix: ocis.PrefixOpenCloud, users: filepath.Join(dir, "data/storage/users"), system: filepath.Join(dir, "data/storage/metadata")}
			breaks := map[string]bool{
				"a bit of a blob flipped": true, "an orphaned blob": true, "a wrong tree size": true,
				"a share without its grant": true, "not in the index of its owner": true, "bytes of an upload without a record": true,
				"the blob of a version is gone": true, "an entry of the trash is gone": true, "a link leads nowhere": true,
			}
			n := 0
			if name == testfixture.OCIS {
				b.prefix = ocis.PrefixOCIS
				for _, c := range decomposedCases {
					if breaks[c.name] {
						c.damage(b)
						n++
					}
				}
			} else {
				for _, name := range []string{"Round 0/dup1.bin", "Round 1/a"} {
					b.dropAttrs(b.file(name))
					n++
				}
				b.must(os.WriteFile(b.file("Round 1/dup1.bin"), []byte("changed"), 0o600))
				n++
			}
			o := consistency.Options{ReadData: true, Now: time.Now()}
			want, wantSum := check(t, stores(t, name, dir), o)
			got, gotSum := check(t, snapshotOf(t, name, dir), o)
			order := func(list []consistency.Finding) []string {
				var out []string
				for _, f := range list {
					out = append(out, show(f))
				}
				slices.Sort(out)
				return out
			}
			w, g := order(want), order(got)
			if !slices.Equal(w, g) {
				for _, s := range w {
					if !slices.Contains(g, s) {
						t.Error("only in the directory: ", s)
					}
				}
				for _, s := range g {
					if !slices.Contains(w, s) {
						t.Error("only in the snapshot: ", s)
					}
				}
			}
			if wantSum.Nodes != gotSum.Nodes || wantSum.Blobs != gotSum.Blobs || wantSum.Checksums != gotSum.Checksums || wantSum.Damage < int64(n)/2 {
				t.Errorf("directory %+v\nsnapshot %+v", *wantSum, *gotSum)
			}
		})
	}
}

// mending is a place that is mended between two looks.
type mending struct {
	consistency.Place
	looks int
	mend  func()
}

func (m *mending) Spaces(ctx context.Context) ([]consistency.Space, error) {
	if m.looks++; m.looks == 2 {
		m.mend()
	}
	return m.Place.Spaces(ctx)
}

// TestLive: what only one of two looks at a running instance finds is not reported.
func TestLive(t *testing.T) {
	dir := testfixture.Unpack(t, testfixture.OCIS)
	st := stores(t, testfixture.OCIS, dir)
	b := &breaker{t: t, prefix: ocis.PrefixOCIS, users: filepath.Join(dir, "data/storage/users"), system: filepath.Join(dir, "data/storage/metadata")}
	o := consistency.Options{Now: time.Now()}
	before := map[string]int{}
	clean, _ := check(t, st, o)
	for _, f := range clean {
		before[mark(f)]++
	}
	p := b.at(alan, "Round 0/dup1.bin")
	b.remove(p.blob(p.attrs().Text("blobid")))
	b.remove(b.at(alan, "Round 1/dup1.bin").link)
	b.at(alan, "Round 1/a").set("treesize", "7")
	b.index("by-type/personal", without(mary))
	lost := b.at(mary, "Round 0/dup1.bin")
	mended := b.undo
	b.undo = nil
	b.remove(lost.link) // stays
	b.index("by-type/project", without("3208f5da-1bae-4ea0-b952-2f161eaf2480"))
	o.Live, o.Settle = true, time.Millisecond
	st[0].Place = &mending{Place: st[0].Place, mend: func() {
		keep := b.undo
		b.undo = mended
		b.back()
		b.undo = keep
	}}
	found, _ := check(t, st, o)
	compare(t, []want{{consistency.LinkMissing, "dup1.bin"}, {consistency.IndexMissing, "by-type/project"}}, fresh(before, found))
	b.back()
	st[0].Place.(*mending).looks = 2
	if found, _ := check(t, st, o); len(fresh(before, found)) > 0 {
		t.Errorf("found %v", fresh(before, found))
	}
}
