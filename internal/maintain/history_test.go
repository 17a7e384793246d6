package maintain_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/maintain"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/retention"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

const password = "pw"

// instance is a made-up instance: folders of files that change from backup to backup.
type instance struct {
	rnd   *rand.Rand
	host  string
	files map[string][]byte // path "a/b" to content
}

func (in *instance) change() {
	for range 1 + in.rnd.IntN(6) {
		name := fmt.Sprintf("d%d/f%d", in.rnd.IntN(4), in.rnd.IntN(8))
		switch in.rnd.IntN(5) {
		case 0:
			delete(in.files, name)
		default:
			p := make([]byte, 1+in.rnd.IntN(60_000))
			for i := range p {
				p[i] = byte(in.rnd.Uint32())
			}
			in.files[name] = p
		}
	}
}

// backUp stores the instance as Holdfast lays it out: folders, a manifest, and then the record.
func backUp(ctx context.Context, be backend.Backend, in *instance, at time.Time, complete bool) (*snapshot.Snapshot, error) {
	r, err := open(ctx, be)
	if err != nil {
		return nil, err
	}
	l, ctx, err := r.Lock(ctx, repo.LockOptions{})
	if err != nil {
		return nil, err
	}
	defer l.Unlock()
	if err := r.LoadIndex(ctx); err != nil {
		return nil, err
	}
	w := r.NewWriter(ctx)
	file := func(name string, data []byte) (*snapshot.Node, error) {
		n := &snapshot.Node{Name: name, Type: snapshot.File, Mode: 0o644, Size: uint64(len(data))}
		for len(data) > 0 {
			k := min(len(data), 20_000)
			d, _, err := w.Save(ctx, repo.DataBlob, data[:k])
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, d)
			data = data[k:]
		}
		return n, nil
	}
	folder := func(nodes []*snapshot.Node) (id.ID, error) {
		d, _, err := w.Save(ctx, repo.TreeBlob, snapshot.EncodeTree(nodes))
		return d, err
	}
	var root []*snapshot.Node
	for dir := range 4 {
		var nodes []*snapshot.Node
		for f := range 8 {
			if data, ok := in.files[fmt.Sprintf("d%d/f%d", dir, f)]; ok {
				n, err := file(fmt.Sprintf("f%d", f), data)
				if err != nil {
					return nil, err
				}
				nodes = append(nodes, n)
			}
		}
		d, err := folder(nodes)
		if err != nil {
			return nil, err
		}
		root = append(root, &snapshot.Node{Name: fmt.Sprintf("d%d", dir), Type: snapshot.Dir, Mode: os.ModeDir | 0o755, Subtree: d})
	}
	m, err := json.Marshal(snapshot.Manifest{Holdfast: "test", Proof: snapshot.Proof{Complete: complete}})
	if err != nil {
		return nil, err
	}
	n, err := file("manifest.json", m)
	if err != nil {
		return nil, err
	}
	tree, err := folder(append(root, n))
	if err != nil {
		return nil, err
	}
	if err := w.Flush(ctx); err != nil {
		return nil, err
	}
	s := &snapshot.Snapshot{Time: at, Tree: &tree, Paths: []string{"/data"}, Hostname: in.host, Tags: []string{snapshot.Tag}}
	return s, snapshot.Save(ctx, r, s)
}

func open(ctx context.Context, be backend.Backend) (*repo.Repository, error) {
	return repo.Open(ctx, be, password, repo.Options{PackSize: 1 << 20})
}

func mustOpen(t testing.TB, be backend.Backend) *repo.Repository {
	t.Helper()
	r, err := open(t.Context(), be)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func newRepo(t testing.TB, be backend.Backend) {
	t.Helper()
	if _, err := repo.Init(t.Context(), be, password, repo.InitOptions{KDF: repo.KDF{N: 1024, R: 8, P: 1}}); err != nil {
		t.Fatal(err)
	}
}

// forgetAndPrune does what the command does.
func forgetAndPrune(ctx context.Context, be backend.Backend, fo maintain.ForgetOptions, po maintain.PruneOptions) error {
	r, err := open(ctx, be)
	if err != nil {
		return err
	}
	l, ctx, err := r.Lock(ctx, repo.LockOptions{Exclusive: true})
	if err != nil {
		return err
	}
	err = func() error {
		list, err := snapshot.List(ctx, r)
		if err != nil {
			return err
		}
		if err := r.LoadIndex(ctx); err != nil {
			return err
		}
		if len(fo.Remove) > 0 || !fo.Policy.Empty() {
			plan, err := maintain.PlanForget(ctx, r, list, fo)
			if err != nil {
				return err
			}
			if _, err := maintain.Forget(ctx, r, plan); err != nil {
				return err
			}
		}
		_, err = maintain.Prune(ctx, r, nil, po)
		return err
	}()
	return errors.Join(err, l.Unlock())
}

// state is what a snapshot must give back.
type state map[string][]byte

func (in *instance) state() state {
	s := state{}
	for k, v := range in.files {
		s[k] = v
	}
	return s
}

// holds checks all snapshots of the repository against what they were made of.
func holds(t testing.TB, what string, be backend.Backend, want map[id.ID]state) []*snapshot.Snapshot {
	t.Helper()
	ctx := t.Context()
	r := mustOpen(t, be)
	list, err := snapshot.List(ctx, r)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	for _, s := range list {
		files := want[*s.Tree]
		if files == nil {
			t.Fatalf("%s: snapshot %s is none that was made", what, s.ID().Short())
		}
		n := 0
		for dir := range 4 {
			top, err := snapshot.Lookup(ctx, r, *s.Tree, fmt.Sprintf("d%d", dir))
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			tree, err := snapshot.LoadTree(ctx, r, top.Subtree)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			for _, f := range tree.Nodes {
				n++
				got, err := snapshot.LoadContent(ctx, r, f, 1<<20)
				if err != nil || !bytes.Equal(got, files[top.Name+"/"+f.Name]) {
					t.Fatalf("%s: %s/%s: %v", what, top.Name, f.Name, err)
				}
			}
		}
		if n != len(files) {
			t.Fatalf("%s: %d files instead of %d", what, n, len(files))
		}
	}
	err = r.Check(ctx, repo.CheckOptions{ReadData: true}, func(err error) {
		if !repo.IsHint(err) {
			t.Fatalf("%s: check: %v", what, err)
		}
	})
	if err != nil {
		t.Fatalf("%s: check: %v", what, err)
	}
	return list
}

// resticClean lets stock restic judge.
func resticClean(t testing.TB, what, dir string) {
	t.Helper()
	cmd := exec.Command("restic", "-r", dir, "--no-cache", "--no-lock", "check", "--read-data")
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+password)
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("no errors were found")) {
		t.Fatalf("%s: restic check: %v\n%s", what, err, out)
	}
}

func restic(t testing.TB, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("restic", append([]string{"-r", dir, "--no-cache"}, args...)...)
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+password)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("restic %v: %v\n%s", args, err, out)
	}
}

// Random histories of backups, forgets, prunes and copies, some of them killed at any write, by us and by restic in turn. What
// snapshots remain are those that the policy promised, each gives back what went in, and restic finds
// nothing wrong.
func TestHistories(t *testing.T) {
	t.Parallel()
	for _, seed := range []uint64{1, 2} {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			rnd := rand.New(rand.NewPCG(seed, 11))
			dir := filepath.Join(t.TempDir(), "repo")
			be := local.New(dir)
			newRepo(t, be)
			ins := []*instance{{rnd, "a", map[string][]byte{}}, {rnd, "b", map[string][]byte{}}}
			want := map[id.ID]state{}
			whole := map[id.ID]bool{}
			second := mem.New() // what copies go to
			newRepo(t, second)
			at := time.Now().AddDate(0, -1, 0)
			for step := range 18 {
				what := fmt.Sprintf("seed %d, step %d", seed, step)
				in := ins[rnd.IntN(2)]
				var b backend.Backend = be
				killed := rnd.IntN(3) == 0
				if killed {
					f := fault.New(be)
					f.KillBefore(1 + rnd.IntN(9))
					b = f
				}
				switch rnd.IntN(5) {
				case 0, 1:
					in.change()
					at = at.Add(time.Duration(1+rnd.IntN(30)) * time.Hour)
					complete := rnd.IntN(5) > 0
					s, err := backUp(ctx, b, in, at, complete)
					if err == nil || s != nil && s.Tree != nil {
						want[*s.Tree] = in.state()
						if err == nil {
							whole[s.ID()] = complete
						}
					}
					if err != nil && !(killed && errors.Is(err, fault.ErrKilled)) {
						t.Fatalf("%s: %v", what, err)
					}
				case 2:
					p := retention.Policy{Last: retention.Count(1 + rnd.IntN(3)), Daily: retention.Count(rnd.IntN(4))}
					before := holds(t, what+", before", be, want)
					err := forgetAndPrune(ctx, b, maintain.ForgetOptions{Policy: p, GroupBy: retention.DefaultGroup}, pruneOptions(rnd))
					if err != nil && !(killed && errors.Is(err, fault.ErrKilled)) {
						t.Fatalf("%s: %v", what, err)
					}
					promised(t, what, before, holds(t, what, be, want), whole, p, err == nil)
				case 3:
					if err := forgetAndPrune(ctx, b, maintain.ForgetOptions{}, pruneOptions(rnd)); err != nil && !(killed && errors.Is(err, fault.ErrKilled)) {
						t.Fatalf("%s: %v", what, err)
					}
				case 4:
					var to backend.Backend = second
					if killed {
						f := fault.New(second)
						f.KillAfter(1 + rnd.IntN(9))
						to = f
					}
					if _, err := copyAll(ctx, be, to, maintain.CopyOptions{}); err != nil && !(killed && errors.Is(err, fault.ErrKilled)) {
						t.Fatalf("%s: %v", what, err)
					}
					if _, err := mustOpen(t, second).Unlock(ctx, true); err != nil {
						t.Fatal(err)
					}
					if err := forgetAndPrune(ctx, second, maintain.ForgetOptions{}, pruneOptions(rnd)); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					holds(t, what+", copy", second, want)
				}
				if killed {
					if _, err := mustOpen(t, be).Unlock(ctx, true); err != nil {
						t.Fatal(err)
					}
				}
				holds(t, what, be, want)
				if step%8 == 7 {
					resticClean(t, what, dir)
					if rnd.IntN(2) == 0 {
						restic(t, dir, "prune", "--max-unused", "0")
						holds(t, what+", pruned by restic", be, want)
					}
				}
			}
		})
	}
}

func pruneOptions(rnd *rand.Rand) maintain.PruneOptions {
	var o maintain.PruneOptions
	switch rnd.IntN(3) {
	case 0:
		o.MaxUnused = repo.UnusedPercent(0)
	case 1:
		o.LimitRepack, o.MaxRepack = true, int64(rnd.IntN(3<<20))
	}
	return o
}

// promised checks that what went is what the policy lets go; all of it, if it was finished.
func promised(t *testing.T, what string, before, after []*snapshot.Snapshot, whole map[id.ID]bool, p retention.Policy, finished bool) {
	t.Helper()
	var all []retention.Snapshot
	for _, s := range before {
		all = append(all, retention.Snapshot{ID: s.ID(), Time: s.Time, Host: s.Hostname, Paths: s.Paths, Tags: s.Tags, Own: true})
	}
	left := map[id.ID]bool{}
	for _, s := range after {
		left[s.ID()] = true
	}
	for _, g := range retention.Decide(all, retention.Options{Policy: p, GroupBy: retention.DefaultGroup, Now: time.Now(),
		Complete: func(s *retention.Snapshot) bool { return whole[s.ID] }}) {
		for _, d := range g.Decisions {
			if d.Keep && !left[d.ID] || !d.Keep && left[d.ID] && finished {
				t.Fatalf("%s: snapshot of %v: left %v, %q", what, d.Time, left[d.ID], d.Reasons)
			}
		}
	}
}

// Forget with prune, killed before and after each write.
func TestKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	rnd := rand.New(rand.NewPCG(5, 11))
	base := mem.New()
	newRepo(t, base)
	in := &instance{rnd, "a", map[string][]byte{}}
	want := map[id.ID]state{}
	at := time.Now().AddDate(0, 0, -20)
	for range 7 {
		in.change()
		at = at.AddDate(0, 0, 1)
		s, err := backUp(ctx, base, in, at, true)
		if err != nil {
			t.Fatal(err)
		}
		want[*s.Tree] = in.state()
	}
	fo := maintain.ForgetOptions{Policy: retention.Policy{Last: 2}, GroupBy: retention.DefaultGroup}
	po := maintain.PruneOptions{PruneOptions: repo.PruneOptions{MaxUnused: repo.UnusedPercent(0)}}
	count := fault.New(base.Clone())
	if err := forgetAndPrune(ctx, count, fo, po); err != nil {
		t.Fatal(err)
	}
	if count.Writes() < 15 {
		t.Fatalf("only %d writes", count.Writes())
	}
	for n := 1; n <= count.Writes(); n++ {
		what := fmt.Sprintf("killed at write %d", n)
		m := base.Clone()
		f := fault.New(m)
		if n%2 == 0 {
			f.KillBefore(n)
		} else {
			f.KillAfter(n)
		}
		err := forgetAndPrune(ctx, f, fo, po)
		if err == nil && f.Writes() > n {
			t.Errorf("%s: success", what)
		}
		holds(t, what, m, want)
		if _, err := mustOpen(t, m).Unlock(ctx, true); err != nil {
			t.Fatal(err)
		}
		if err := forgetAndPrune(ctx, m, fo, po); err != nil {
			t.Fatalf("%s, next time: %v", what, err)
		}
		if left := holds(t, what+", next time", m, want); len(left) != 2 {
			t.Errorf("%s, next time: %d snapshots", what, len(left))
		}
		unused(t, what, m)
	}
}

// unused fails if the repository holds anything that no snapshot needs.
func unused(t *testing.T, what string, be backend.Backend) {
	t.Helper()
	r := mustOpen(t, be)
	list, err := snapshot.List(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	var roots []id.ID
	for _, s := range list {
		roots = append(roots, *s.Tree)
	}
	p, err := r.PlanPrune(t.Context(), repo.PruneOptions{MaxUnused: repo.UnusedPercent(0)}, func(ctx context.Context, mark func(repo.BlobType, id.ID) bool) error {
		return snapshot.Used(ctx, r, roots, mark, nil)
	})
	if err != nil || !p.Nothing() || p.Stats.Unused.Count+p.Stats.Duplicate.Count+p.Stats.Unlisted.Count > 0 {
		t.Errorf("%s: a further prune would do %+v, %v", what, p.Stats, err)
	}
}

// The last complete snapshot, an unreadable record, an empty policy.
func TestForgetRefuses(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	be := mem.New()
	newRepo(t, be)
	in := &instance{rand.New(rand.NewPCG(6, 11)), "a", map[string][]byte{}}
	var ids []id.ID
	for i, complete := range []bool{true, true, false} {
		in.change()
		s, err := backUp(ctx, be, in, time.Now().Add(time.Duration(i-9)*time.Hour), complete)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, s.ID())
	}
	if err := forgetAndPrune(ctx, be, maintain.ForgetOptions{Remove: ids[:2]}, maintain.PruneOptions{}); !errors.As(err, new(*maintain.LastCompleteError)) {
		t.Errorf("got %v", err)
	}
	r := mustOpen(t, be)
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	list, err := snapshot.List(ctx, r)
	if err != nil || len(list) != 3 {
		t.Fatal(len(list), err)
	}
	if _, err := maintain.PlanForget(ctx, r, list, maintain.ForgetOptions{}); !errors.Is(err, maintain.ErrNoPolicy) {
		t.Errorf("got %v", err)
	}
	// A manifest that cannot be read does not make its snapshot count as complete.
	bad := *list[1].Tree
	if _, err := snapshot.LoadManifest(ctx, r, bad); err != nil {
		t.Fatal(err)
	}
	if err := forgetAndPrune(ctx, be, maintain.ForgetOptions{Remove: ids[:1]}, maintain.PruneOptions{}); err != nil {
		t.Errorf("an older complete one: %v", err)
	}
	name := backend.Handle{Type: backend.SnapshotFile, Name: id.Hash([]byte("x")).String()}
	be.Put(name, []byte("x"))
	if err := forgetAndPruneUnread(ctx, be); !errors.As(err, new(*maintain.UnreadableError)) {
		t.Errorf("got %v", err)
	}
}

func forgetAndPruneUnread(ctx context.Context, be backend.Backend) error {
	r, err := open(ctx, be)
	if err != nil {
		return err
	}
	_, err = maintain.Prune(ctx, r, nil, maintain.PruneOptions{})
	return err
}
