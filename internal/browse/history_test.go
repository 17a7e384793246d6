package browse_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/browse/browsetest"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

type node = browsetest.Node

// world is a space that changes at random: folders and files, by id.
type world struct {
	r     *rand.Rand
	items map[string]*thing
	n     int
	trash []node
	vers  map[string][]node // by path
}

type thing struct {
	id, parent, name, content string
	dir                       bool
}

func (w *world) folders() []string {
	out := []string{""}
	for id, x := range w.items {
		if x.dir {
			out = append(out, id)
		}
	}
	sort.Strings(out)
	return out
}

func (w *world) any() *thing {
	ids := make([]string, 0, len(w.items))
	for id := range w.items {
		ids = append(ids, id)
	}
	sort.Strings(ids)
	if len(ids) == 0 {
		return nil
	}
	return w.items[ids[w.r.IntN(len(ids))]]
}

func (w *world) free(parent, name string) bool {
	for _, x := range w.items {
		if x.parent == parent && x.name == name {
			return false
		}
	}
	return true
}

func (w *world) inside(id, dir string) bool {
	for ; id != ""; id = w.items[id].parent {
		if id == dir {
			return true
		}
	}
	return dir == ""
}

func (w *world) path(x *thing) string {
	if x.parent == "" {
		return x.name
	}
	return w.path(w.items[x.parent]) + "/" + x.name
}

func (w *world) step() {
	f := w.folders()
	parent, name := f[w.r.IntN(len(f))], fmt.Sprintf("n%d", w.r.IntN(6))
	x := w.any()
	switch k := w.r.IntN(10); {
	case k < 4 || x == nil:
		if w.free(parent, name) {
			w.n++
			id := fmt.Sprintf("id-%d", w.n)
			w.items[id] = &thing{id: id, parent: parent, name: name, dir: k == 0, content: fmt.Sprint("content ", w.n)}
		}
	case k < 6: // move or rename
		if w.free(parent, name) && !w.inside(parent, x.id) {
			x.parent, x.name = parent, name
		}
	case k < 8:
		if !x.dir {
			p := w.path(x)
			w.vers[p] = append(w.vers[p], node{Name: fmt.Sprintf("2026-11-20T12:%02d:%02dZ", len(w.vers[p])/60, len(w.vers[p])%60), Content: x.content, ID: x.id})
			w.n++
			x.content = fmt.Sprint("content ", w.n)
		}
	default:
		if !x.dir {
			w.n++
			w.trash = append(w.trash, node{Name: fmt.Sprintf("2026-11-21T12:00:%02dZ", w.n%60), Dir: true,
				Nodes: []node{{Name: x.name + fmt.Sprint(w.n), ID: x.id, Content: x.content}}})
			delete(w.items, x.id)
		}
	}
}

func (w *world) tree(parent string) []node {
	out := []node{}
	for _, x := range w.items {
		if x.parent != parent {
			continue
		}
		n := node{Name: x.name, ID: x.id, Content: x.content}
		if x.dir {
			n.Content, n.Dir, n.Nodes = "", true, w.tree(x.id)
		}
		out = append(out, n)
	}
	return out
}

func (w *world) space(id, alias string) browsetest.Space {
	s := browsetest.Space{ID: id, Name: alias, Alias: alias, Files: w.tree("")}
	var versions func(prefix string, list []string) []node
	versions = func(prefix string, list []string) []node {
		groups := map[string][]string{}
		var out []node
		for _, p := range list {
			head, rest, more := strings.Cut(p, "/")
			if !more {
				out = append(out, node{Name: head, Dir: true, Nodes: w.vers[prefix+head]})
				continue
			}
			groups[head] = append(groups[head], rest)
		}
		for head, rest := range groups {
			out = append(out, node{Name: head, Dir: true, Nodes: versions(prefix+head+"/", rest)})
		}
		return out
	}
	var paths []string
	for p := range w.vers {
		for _, x := range w.items { // only files that are there have versions
			if !x.dir && w.path(x) == p {
				paths = append(paths, p)
			}
		}
	}
	s.Versions = versions("", paths)
	s.Trashed = w.trash
	return s
}

// everything lists a snapshot by looking at it.
func everything(t testing.TB, r *repo.Repository, sn *snapshot.Snapshot) []string {
	t.Helper()
	v, err := browse.Open(t.Context(), r, sn)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	add := func(it *browse.Item) {
		if it.Path != "" {
			out = append(out, fmt.Sprintf("%s %s/%s %s %s %s %d", it.Kind, it.Space.Folder, it.Path, it.Stamp, it.NodeID(), it.SHA1(), it.Node.Size))
		}
	}
	for _, s := range v.Spaces() {
		walk(t, v, s, "", func(it *browse.Item) {
			add(it)
			list, err := v.Versions(t.Context(), it)
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range list {
				add(x)
			}
		})
		items, err := v.Trash(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		for _, it := range items {
			add(it)
		}
	}
	sort.Strings(out)
	return out
}

func matchText(m *browse.Match) string {
	e := m.Entry
	return fmt.Sprintf("%s %s/%s %s %s %s %d", e.Kind, m.Space.Folder, e.Path, e.Stamp, e.NodeID, e.SHA1, e.Size)
}

func TestHistory(t *testing.T) {
	for seed := range uint64(2) {
		w := &world{r: rand.New(rand.NewPCG(seed, 1)), items: map[string]*thing{}, vers: map[string][]node{}}
		r := browsetest.NewRepo(t)
		var list []*snapshot.Snapshot
		want := map[string][]string{} // by snapshot
		for i := range 12 {
			for range 15 {
				w.step()
			}
			spaces := []browsetest.Space{w.space("s1", "personal/alan")}
			if i > 3 && i < 9 { // a space that comes, is renamed, and goes
				alias := "project/one"
				if i > 6 {
					alias = "project/two"
				}
				spaces = append(spaces, browsetest.Space{ID: "s2", Name: alias, Alias: alias, Files: []node{{Name: "n1", Content: "same", ID: "p1"}}})
			}
			sn := browsetest.Snapshot(t, r, browsetest.Epoch.AddDate(0, 0, i), spaces...)
			list = append(list, sn)
			want[sn.ID().String()] = everything(t, r, sn)
		}
		dir := filepath.Join(t.TempDir(), "cache")
		made := 0
		h := &browse.History{Repo: func(context.Context) (browse.Repo, error) { made++; return r, nil }, Warn: func(err error) { t.Error(err) }}
		run := func(what string, list []*snapshot.Snapshot, wantMade int) {
			t.Helper()
			made = 0
			got := map[string][]string{}
			snapshots := 0
			err := h.Find(t.Context(), list, &browse.Query{Glob: "*"}, func(sn *snapshot.Snapshot, ms []*browse.Match) error {
				for _, m := range ms {
					got[sn.ID().String()] = append(got[sn.ID().String()], matchText(m))
				}
				return nil
			}, func(m *browse.Match) error {
				snapshots += m.Snapshots
				if m.Gone == nil && m.Last != list[len(list)-1] {
					t.Errorf("%s: %s has vanished and does not say when", what, matchText(m))
				}
				return nil
			})
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			all := 0
			for _, sn := range list {
				k := sn.ID().String()
				sort.Strings(got[k])
				all += len(got[k])
				if !slices.Equal(got[k], want[k]) {
					for _, x := range got[k] {
						if !slices.Contains(want[k], x) {
							t.Errorf("seed %d, %s: snapshot %s has no %s", seed, what, k[:8], x)
						}
					}
					for _, x := range want[k] {
						if !slices.Contains(got[k], x) {
							t.Errorf("seed %d, %s: snapshot %s has %s as well", seed, what, k[:8], x)
						}
					}
				}
			}
			if snapshots != all || all < 100 {
				t.Errorf("%s: matches speak of %d places, there are %d", what, snapshots, all)
			}
			if made != wantMade {
				t.Errorf("%s: %d blocks were made, want %d", what, made, wantMade)
			}
		}
		run("without a cache", list, 12)
		h.Dir = dir
		run("with an empty cache", list, 12)
		run("with a full cache", list, 0)
		run("one more was forgotten", slices.Concat(list[:5], list[6:]), 1)
		run("the oldest were forgotten", list[2:], 3) // the new first one, and what was pruned around the sixth
		blocks, err := filepath.Glob(filepath.Join(dir, "*.changes"))
		if err != nil || len(blocks) != 10 {
			t.Fatalf("%d blocks are kept, %v", len(blocks), err)
		}
		for i, b := range blocks[:3] {
			p, _ := os.ReadFile(b)
			switch i {
			case 0:
				p = p[:len(p)/2]
			case 1:
				p[len(p)-1] ^= 1
			case 2:
				p = nil
			}
			if err := os.WriteFile(b, p, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		run("three blocks are damaged", list[2:], 3)
		if st, _ := os.Stat(blocks[0]); st.Mode().Perm() != 0o600 {
			t.Errorf("a block has the mode %v", st.Mode())
		}
	}
}

func TestFindQueries(t *testing.T) {
	r := browsetest.NewRepo(t)
	one := browsetest.Space{ID: "s1", Name: "Alan", Alias: "personal/alan", Files: []node{
		{Name: "Notes.txt", ID: "i1", Content: "one"}, {Name: "dir", ID: "i2", Dir: true, Nodes: []node{{Name: "b.ods", ID: "i3", Content: "two"}}}}}
	two := browsetest.Space{ID: "s2", Name: "Mary", Alias: "personal/mary", Files: []node{{Name: "Notes.txt", ID: "i1", Content: "one"}}}
	changed := one
	changed.Files = []node{{Name: "moved.txt", ID: "i1", Content: "one"}}
	at := browsetest.Epoch
	list := []*snapshot.Snapshot{
		browsetest.Snapshot(t, r, at, one, two), browsetest.Snapshot(t, r, at.AddDate(0, 0, 1), one), browsetest.Snapshot(t, r, at.AddDate(0, 0, 2), changed),
	}
	h := &browse.History{Repo: func(context.Context) (browse.Repo, error) { return r, nil }}
	for _, c := range []struct {
		q    browse.Query
		want string
	}{
		{browse.Query{Name: "Notes.txt"}, "personal/alan/Notes.txt 1-2 gone 3; personal/mary/Notes.txt 1-1 gone 2"},
		{browse.Query{Name: "notes.txt"}, ""},
		{browse.Query{Name: "notes.txt", IgnoreCase: true, In: func(s *browse.SpaceInfo) bool { return s.ID == "s2" }}, "personal/mary/Notes.txt 1-1 gone 2"},
		{browse.Query{Glob: "*.ods"}, "personal/alan/dir/b.ods 1-2 gone 3"},
		{browse.Query{Glob: "dir/*"}, "personal/alan/dir/b.ods 1-2 gone 3"},
		{browse.Query{FileID: "m$s1!i1"}, "personal/alan/Notes.txt 1-2 gone 3; personal/alan/moved.txt 3-3"},
		{browse.Query{FileID: "i1", Since: at.AddDate(0, 0, 1)}, "personal/alan/Notes.txt 2-2 gone 3; personal/alan/moved.txt 3-3"},
		{browse.Query{FileID: "i1", Until: at.AddDate(0, 0, 1)}, "personal/alan/Notes.txt 1-2; personal/mary/Notes.txt 1-1 gone 2"},
		{browse.Query{SHA1: "AD782ECDAC770FC6EB9A62E44F90873FB97FB26B"}, "personal/alan/dir/b.ods 1-2 gone 3"},
	} {
		var got []string
		no := func(sn *snapshot.Snapshot) int { return slices.Index(list, sn) + 1 }
		err := h.Find(t.Context(), list, &c.q, nil, func(m *browse.Match) error {
			s := fmt.Sprintf("%s/%s %d-%d", m.Space.Folder, m.Entry.Path, no(m.First), no(m.Last))
			if m.Gone != nil {
				s += fmt.Sprintf(" gone %d", no(m.Gone))
			}
			got = append(got, s)
			return nil
		})
		sort.Strings(got)
		if err != nil || strings.Join(got, "; ") != c.want {
			t.Errorf("%+v gives %q, %v; want %q", c.q, strings.Join(got, "; "), err, c.want)
		}
	}
	for _, bad := range []browse.Query{{}, {Glob: "["}, {SHA1: "12"}, {SHA1: strings.Repeat("x", 40)}} {
		if err := h.Find(t.Context(), list, &bad, nil, nil); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}

func TestDiff(t *testing.T) {
	r := browsetest.NewRepo(t)
	at := browsetest.Epoch
	a := browsetest.Space{ID: "s1", Name: "Alan", Alias: "personal/alan", Files: []node{
		{Name: "same", ID: "1", Content: "x"}, {Name: "edit", ID: "2", Content: "old"}, {Name: "gone", ID: "3", Content: "x"}, {Name: "lost", ID: "4", Content: "x"},
		{Name: "old name", ID: "5", Content: "x"}, {Name: "to move", ID: "6", Content: "x"},
		{Name: "folder", ID: "7", Dir: true, Nodes: []node{{Name: "in", ID: "8", Content: "x"}, {Name: "sub", ID: "9", Dir: true, Nodes: []node{{Name: "deep", ID: "10", Content: "x"}}}, {Name: "stays", ID: "11", Content: "x"}}},
	}}
	b := browsetest.Space{ID: "s1", Name: "Alan Turing", Alias: "personal/alan", Files: []node{
		{Name: "same", ID: "1", Content: "x"}, {Name: "edit", ID: "2", Content: "newer"}, {Name: "new name", ID: "5", Content: "x"}, {Name: "added", ID: "12", Content: "xy"},
		{Name: "stays", ID: "11", Content: "x"}, {Name: "lost", ID: "13", Content: "another of this name"},
		{Name: "top", ID: "14", Dir: true, Nodes: []node{{Name: "to move", ID: "6", Content: "changed too"},
			{Name: "folder", ID: "7", Dir: true, Nodes: []node{{Name: "in", ID: "8", Content: "x"}, {Name: "sub", ID: "9", Dir: true, Nodes: []node{{Name: "deep", ID: "10", Content: "x"}}}}}}},
	}, Trashed: []node{{Name: "2026-11-21T12:00:00Z", Dir: true, Nodes: []node{{Name: "gone", ID: "3", Content: "x"}}}}}
	va, err := browse.Open(t.Context(), r, browsetest.Snapshot(t, r, at, a, browsetest.Space{ID: "s3", Name: "Old", Alias: "project/old", Files: []node{}}))
	if err != nil {
		t.Fatal(err)
	}
	vb, err := browse.Open(t.Context(), r, browsetest.Snapshot(t, r, at.Add(time.Hour), b, browsetest.Space{ID: "s2", Name: "New", Alias: "project/new", Files: []node{{Name: "f", ID: "20", Content: "x"}}}))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	err = browse.Diff(t.Context(), va, vb, nil, func(c *browse.Change) error {
		s := c.What + " " + c.Space.Folder + ":"
		if c.From != "" {
			s += " " + c.From
		}
		if c.To != "" {
			s += " -> " + c.To
		}
		if c.Below > 0 {
			s += fmt.Sprint(" +", c.Below)
		}
		if c.InTrash {
			s += " trash"
		}
		got = append(got, s)
		return nil
	})
	want := []string{
		"space renamed personal/alan: Alan -> Alan Turing",
		"added personal/alan: -> added", "changed personal/alan: -> edit", "deleted personal/alan: gone trash", "added personal/alan: -> lost",
		"deleted personal/alan: lost", "renamed personal/alan: old name -> new name", "moved personal/alan: folder/stays -> stays",
		"added personal/alan: -> top", "moved personal/alan: folder -> top/folder +3",
		"changed personal/alan: -> top/to move", "moved personal/alan: to move -> top/to move",
		"space added project/new: -> New", "added project/new: -> f", "space deleted project/old:",
	}
	sort.Strings(got)
	sort.Strings(want)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v\n got %s\nwant %s", err, strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
}

// TestDiffShares: who gained and who lost access.
func TestDiffShares(t *testing.T) {
	inst := browsetest.Unpack(t, testfixture.OCIS)
	inst.Trim(t, "idm")
	r := browsetest.NewRepo(t)
	full := browsetest.Backup(t, r, inst, browsetest.Epoch)
	storages, err := filepath.Glob(filepath.Join(inst.ShareNode("storages"), "*"))
	if err != nil || len(storages) != 1 {
		t.Fatal(storages, err)
	}
	list := "storages/" + filepath.Base(storages[0]) + "/b1f74ec4-dd7e-11ef-a543-03775734d0f7.json"
	var shares struct {
		Shares map[string]json.RawMessage
	}
	if err := json.Unmarshal(inst.ShareList(t, list), &shares); err != nil || len(shares.Shares) != 2 {
		t.Fatal(shares, err)
	}
	for id := range shares.Shares {
		delete(shares.Shares, id)
		break
	}
	p, err := json.Marshal(shares)
	if err != nil {
		t.Fatal(err)
	}
	inst.SetShareList(t, list, string(p))
	less := browsetest.Backup(t, r, inst, browsetest.Epoch.Add(time.Hour))
	for what, pair := range map[string][2]*snapshot.Snapshot{browse.Unshared: {full, less}, browse.Shared: {less, full}} {
		a, err := browse.Open(t.Context(), r, pair[0])
		if err != nil {
			t.Fatal(err)
		}
		b, err := browse.Open(t.Context(), r, pair[1])
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		err = browse.Diff(t.Context(), a, b, func(s *browse.Space) bool { return s.Store == "users" }, func(c *browse.Change) error {
			got = append(got, fmt.Sprintf("%s %s/%s with %s", c.What, c.Space.Folder, c.To, c.With))
			return nil
		})
		if err != nil || len(got) != 1 || !slices.Contains([]string{
			what + " personal/alan/Round 0/a with Mary Kenneth Keller", what + " personal/alan/Round 1/a with Mary Kenneth Keller",
		}, got[0]) {
			t.Errorf("%s: %q, %v", what, got, err)
		}
	}
}

// TestFindFixtures: find shows of real instances what looking at them shows.
func TestFindFixtures(t *testing.T) {
	for _, name := range browsetest.Fixtures {
		c := browsetest.Fixture(t, name)
		want := everything(t, c.Repo, c.Snapshot)
		var got []string
		h := &browse.History{Repo: func(context.Context) (browse.Repo, error) { return c.Repo, nil }}
		err := h.Find(t.Context(), []*snapshot.Snapshot{c.Snapshot}, &browse.Query{Glob: "*"}, nil, func(m *browse.Match) error {
			if below := strings.Count(m.Entry.Path, "/"); m.Entry.Kind != browse.Trashed || below == 1 {
				got = append(got, matchText(m))
			}
			return nil
		})
		sort.Strings(got)
		if err != nil || !slices.Equal(got, want) || len(got) < 200 {
			for i := range min(len(got), len(want)) {
				if got[i] != want[i] {
					t.Errorf("%s: find shows %q, want %q", name, got[i], want[i])
					break
				}
			}
			t.Errorf("%s: %d found, want %d: %v", name, len(got), len(want), err)
		}
	}
}
