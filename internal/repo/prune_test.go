package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/repo/index"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
)

// pruneRepo opens a repository with small packs and index files.
func pruneRepo(t testing.TB, be backend.Backend) *Repository {
	t.Helper()
	r, err := Open(context.Background(), be, password, Options{})
	if err != nil {
		t.Fatal(err)
	}
	r.opts.PackSize, r.indexBlobs = 12_000, 12
	r.unlockTime = time.Second
	r.clock.sleep = func(ctx context.Context, d time.Duration) error {
		if d == lockSettle {
			return ctx.Err()
		}
		return realSleep(ctx, d)
	}
	return r
}

// model is what a repository should hold.
type model struct {
	be    *mem.Backend
	blobs map[BlobRef][]byte
	refs  []BlobRef // in the order in which they were stored
}

// newModel stores blobs in several sessions, some of them twice in different packs, as two backups at one time do.
func newModel(t testing.TB, seed uint64, sessions int) *model {
	t.Helper()
	ctx := context.Background()
	rnd := rand.New(rand.NewPCG(seed, 9))
	m := &model{be: mem.New(), blobs: map[BlobRef][]byte{}}
	initRepo(t, m.be, InitOptions{})
	for range sessions {
		// Both load the index before either writes.
		a, b := pruneRepo(t, m.be), pruneRepo(t, m.be)
		for _, r := range []*Repository{a, b} {
			if err := r.LoadIndex(ctx); err != nil {
				t.Fatal(err)
			}
		}
		wa, wb := a.NewWriter(ctx), b.NewWriter(ctx)
		for range 4 + rnd.IntN(12) {
			bt := BlobType(rnd.IntN(2))
			p := noise(byte(rnd.IntN(256)), 100+rnd.IntN(2700))
			p = append(p, fmt.Sprint(rnd.Uint64())...)
			ref := BlobRef{bt, ID{}}
			ref.ID, _ = save(t, wa, bt, p)
			if rnd.IntN(4) == 0 {
				save(t, wb, bt, p)
			}
			m.blobs[ref] = p
			m.refs = append(m.refs, ref)
		}
		for _, w := range []*Writer{wa, wb} {
			if err := w.Flush(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	return m
}

func (m *model) clone() *model { return &model{m.be.Clone(), m.blobs, m.refs} }

// some picks a part of the blobs; neighbours tend to share their fate.
func (m *model) some(rnd *rand.Rand) map[BlobRef]bool {
	used := map[BlobRef]bool{}
	on := rnd.IntN(2) == 0
	for _, ref := range m.refs {
		if rnd.IntN(6) == 0 {
			on = !on
		}
		if on {
			used[ref] = true
		}
	}
	return used
}

func marks(used map[BlobRef]bool) func(context.Context, func(BlobType, ID) bool) error {
	return func(_ context.Context, mark func(BlobType, ID) bool) error {
		for ref := range used {
			mark(ref.Type, ref.ID)
			if mark(ref.Type, ref.ID) {
				return errors.New("marked twice")
			}
		}
		return nil
	}
}

// prune locks, plans and executes as a program does.
func prune(ctx context.Context, r *Repository, used map[BlobRef]bool, o PruneOptions) (*PrunePlan, error) {
	l, lctx, err := r.Lock(ctx, LockOptions{Exclusive: true})
	if err != nil {
		return nil, err
	}
	p, err := r.PlanPrune(lctx, o, marks(used))
	if err == nil {
		err = p.Execute(lctx)
	}
	return p, errors.Join(err, l.Unlock())
}

// holds checks that the repository is sound and has every used blob.
func (m *model) holds(t *testing.T, what string, used map[BlobRef]bool) {
	t.Helper()
	ctx := context.Background()
	r := pruneRepo(t, m.be)
	err := r.Check(ctx, CheckOptions{ReadData: true}, func(err error) {
		if !IsHint(err) {
			t.Errorf("%s: check: %v", what, err)
		}
	})
	if err != nil {
		t.Fatalf("%s: check: %v", what, err)
	}
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	for ref := range used {
		got, err := r.LoadBlob(ctx, ref.Type, ref.ID, nil)
		if err != nil || !bytes.Equal(got, m.blobs[ref]) {
			t.Fatalf("%s: %v blob %s: %v", what, ref.Type, ref.ID.Short(), err)
		}
	}
}

// tidy checks that a finished prune left nothing behind: no unlisted pack, no second copy, no second name,
// and with the option not to leave anything, nothing unused.
func (m *model) tidy(t *testing.T, what string, used map[BlobRef]bool, all bool) {
	t.Helper()
	ctx := context.Background()
	r := pruneRepo(t, m.be)
	if err := r.Check(ctx, CheckOptions{}, func(err error) { t.Errorf("%s: %v", what, err) }); err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	seen := map[BlobRef]bool{}
	r.EachBlob(func(bt BlobType, d, _ ID, _, _ int64) {
		ref := BlobRef{bt, d}
		if all && (seen[ref] || !used[ref]) {
			t.Errorf("%s: %v blob %s: seen %v, used %v", what, bt, d.Short(), seen[ref], used[ref])
		}
		seen[ref] = true
	})
	m.locks(t, what)
}

// locks checks that no lock was left behind.
func (m *model) locks(t *testing.T, what string) {
	t.Helper()
	n := 0
	if err := m.be.List(context.Background(), backend.LockFile, func(backend.FileInfo) error { n++; return nil }); err != nil || n > 0 {
		t.Errorf("%s: %d locks, %v", what, n, err)
	}
}

func (m *model) packBytes(t *testing.T) (n, bytes int64) {
	t.Helper()
	err := m.be.List(context.Background(), backend.PackFile, func(fi backend.FileInfo) error { n++; bytes += fi.Size; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return n, bytes
}

func TestPruneRandom(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for seed := range uint64(12) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		m := newModel(t, seed, 1+rnd.IntN(6))
		used := m.some(rnd)
		o := PruneOptions{}
		switch rnd.IntN(4) {
		case 0:
			o.MaxUnused = UnusedPercent(0)
		case 1:
			o.LimitRepack, o.MaxRepack = true, int64(rnd.IntN(40_000))
		case 2:
			o.MaxUnused = func(int64) int64 { return 1 << 40 }
		}
		if rnd.IntN(2) == 0 {
			m.be.Put(backend.Handle{Type: backend.PackFile, Name: ID{1, byte(seed)}.String()}, []byte("left by a crash"))
		}
		what := fmt.Sprintf("seed %d", seed)
		_, before := m.packBytes(t)
		p, err := prune(ctx, pruneRepo(t, m.be), used, o)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		_, after := m.packBytes(t)
		s := p.Stats
		// New packs have headers and ends of their own: 36 bytes a pack. Blobs that were stored without gain may differ.
		if got := before - after; got < s.Freed-1000 || got > s.Freed+1000 {
			t.Errorf("%s: freed %d, the plan said %d", what, got, s.Freed)
		}
		if s.Used.Count != int64(len(used)) || s.Used.Count+s.Unused.Count+s.Duplicate.Count < int64(len(m.refs)) {
			t.Errorf("%s: stats %+v for %d used of %d", what, s, len(used), len(m.refs))
		}
		if allowed := UnusedPercent(5)(s.Used.Bytes); o.MaxUnused == nil && !o.LimitRepack && s.UnusedAfter > allowed {
			t.Errorf("%s: %d bytes stay unused, %d are allowed", what, s.UnusedAfter, allowed)
		}
		if o.LimitRepack && s.Repack.Bytes > o.MaxRepack {
			t.Errorf("%s: repacks %d of %d", what, s.Repack.Bytes, o.MaxRepack)
		}
		m.holds(t, what, used)
		m.tidy(t, what, used, o.MaxUnused != nil && o.MaxUnused(1) == 0)
		if o.LimitRepack {
			continue
		}
		again, err := prune(ctx, pruneRepo(t, m.be), used, o)
		if err != nil || again.Stats.Repack.Count+again.Stats.Remove.Count+again.Stats.Unlisted.Count > 0 {
			t.Errorf("%s: a second prune finds %+v, %v", what, again.Stats, err)
		}
	}
}

// The program dies before or after each write. What is left is sound, and the next prune does the rest.
func TestPruneKilled(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for seed := range uint64(2) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		base := newModel(t, seed, 3)
		used := base.some(rnd)
		base.be.Put(backend.Handle{Type: backend.PackFile, Name: ID{1}.String()}, []byte("left by a crash"))
		o := PruneOptions{MaxUnused: UnusedPercent(0)}
		count := fault.New(base.clone().be)
		p, err := prune(ctx, pruneRepo(t, count), used, o)
		if err != nil {
			t.Fatal(err)
		}
		if s := p.Stats; s.Repack.Count < 3 || s.Remove.Count+s.Repack.Count < 4 || s.Unlisted.Count != 1 || s.IndexFiles < 3 {
			t.Fatalf("seed %d: too little happens: %+v", seed, s)
		}
		for n := 1; n <= count.Writes(); n++ {
			for _, after := range []bool{false, true} {
				what := fmt.Sprintf("seed %d, write %d, after it: %v", seed, n, after)
				m := base.clone()
				f := fault.New(m.be)
				if after {
					f.KillAfter(n)
				} else {
					f.KillBefore(n)
				}
				if _, err := prune(ctx, pruneRepo(t, f), used, o); !errors.Is(err, fault.ErrKilled) && !(after && n == count.Writes()) {
					// The order of the last packs differs from run to run; one fewer may be needed.
					if f.Writes() >= n {
						t.Fatalf("%s: %v", what, err)
					}
				}
				m.holds(t, what, used)
				r := pruneRepo(t, m.be)
				if _, err := r.Unlock(ctx, true); err != nil {
					t.Fatal(err)
				}
				if _, err := prune(ctx, r, used, o); err != nil {
					t.Fatalf("%s: next prune: %v", what, err)
				}
				m.holds(t, what+", next prune", used)
				m.tidy(t, what+", next prune", used, true)
			}
		}
	}
}

// Everything that a prune asks of the backend goes wrong in every way. Nothing that is needed gets lost, and
// success is claimed only where there is one.
func TestPruneFaults(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	base := newModel(t, 1, 3)
	used := base.some(rand.New(rand.NewPCG(1, 4)))
	o := PruneOptions{MaxUnused: UnusedPercent(0)}
	clean := fault.New(base.clone().be)
	if _, err := prune(ctx, pruneRepo(t, clean), used, o); err != nil {
		t.Fatal(err)
	}
	type kind struct {
		op fault.Op
		ft backend.FileType
	}
	counts := map[kind]int{}
	for _, c := range clean.Calls() {
		counts[kind{c.Op, c.Handle.Type}]++
	}
	if len(counts) < 9 {
		t.Fatalf("a prune makes only %v", counts)
	}
	for k, n := range counts {
		for _, effect := range []fault.Effect{fault.Fail, fault.FailAfter, fault.Short, fault.Corrupt} {
			if effect == fault.Corrupt && k.op == fault.Save || effect == fault.Short && k.op == fault.Save && k.ft == backend.LockFile {
				continue // a medium that lies is what check --read-data is for; half a lock is another test's
			}
			for _, i := range []int{1, n} {
				f := fault.Fault{Op: k.op, Type: k.ft, N: i, Effect: effect, Times: 1 + i%2*1000}
				m := base.clone()
				fb := fault.New(m.be)
				r := pruneRepo(t, fb)
				fb.Add(f)
				_, err := prune(ctx, r, used, o)
				what := f.String()
				if effect == fault.Short && k.op == fault.Save {
					// Half a file under its final name is the one thing a backend promises never to leave. Take it away.
					dropHalves(t, m.be)
				}
				m.holds(t, what, used)
				if _, uerr := pruneRepo(t, m.be).Unlock(ctx, true); uerr != nil {
					t.Fatal(uerr)
				}
				if err == nil && len(fb.Unfired()) == 0 && effect == fault.Fail && (k.op == fault.Save || k.op == fault.Remove) {
					t.Errorf("%s: success", what)
				}
				if _, err := prune(ctx, pruneRepo(t, m.be), used, o); err != nil {
					t.Fatalf("%s: next prune: %v", what, err)
				}
				m.holds(t, what, used)
				m.tidy(t, what, used, true)
			}
		}
	}
}

// dropHalves removes files whose content is not what their name says.
func dropHalves(t *testing.T, be *mem.Backend) {
	t.Helper()
	ctx := context.Background()
	r := pruneRepo(t, be)
	for _, ft := range []backend.FileType{backend.PackFile, backend.IndexFile} {
		var bad []backend.Handle
		err := r.ListFiles(ctx, ft, func(d ID, _ int64) error {
			h := backend.Handle{Type: ft, Name: d.String()}
			if _, err := r.readFile(ctx, h); err != nil {
				bad = append(bad, h)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range bad {
			if err := be.Remove(ctx, h); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A full disk while packs are stored anew: what was written in vain goes away, everything else stays.
func TestPruneDiskFull(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	m := newModel(t, 2, 12)
	used := m.some(rand.New(rand.NewPCG(2, 4)))
	full := &backend.PermanentError{Err: syscall.ENOSPC}
	before, _ := m.packBytes(t)
	fb := fault.New(m.be, fault.Fault{Op: fault.Save, Type: backend.PackFile, N: 2, Times: -1, Err: full})
	r := pruneRepo(t, fb)
	r.indexBlobs = 1000 // so that no index names the first new pack
	_, err := prune(ctx, r, used, PruneOptions{MaxUnused: UnusedPercent(0)})
	if !errors.Is(err, syscall.ENOSPC) || len(fb.Unfired()) > 0 {
		t.Fatalf("got %v", err)
	}
	if after, _ := m.packBytes(t); after != before {
		t.Errorf("%d packs before, %d after", before, after)
	}
	m.holds(t, "full", used)
	// Removing what is wholly unused needs no new pack.
	p, err := prune(ctx, pruneRepo(t, fb), used, PruneOptions{LimitRepack: true})
	if err != nil || p.Stats.Repack.Count > 0 {
		t.Fatalf("%+v, %v", p.Stats, err)
	}
	m.holds(t, "without repacking", used)
}

// appendOnly refuses to remove anything but locks.
type appendOnly struct{ backend.Backend }

func (b appendOnly) Remove(ctx context.Context, h backend.Handle) error {
	if h.Type != backend.LockFile {
		return &backend.PermanentError{Err: errors.New("403 Forbidden")}
	}
	return b.Backend.Remove(ctx, h)
}

func TestPruneAppendOnly(t *testing.T) {
	t.Parallel()
	m := newModel(t, 3, 2)
	used := m.some(rand.New(rand.NewPCG(3, 4)))
	fb := fault.New(appendOnly{m.be})
	_, err := prune(context.Background(), pruneRepo(t, fb), used, PruneOptions{})
	if !errors.Is(err, ErrNoRemoval) || !strings.Contains(err.Error(), "403") {
		t.Fatalf("got %v", err)
	}
	if n := fb.Count(fault.Save, backend.PackFile) + fb.Count(fault.Save, backend.IndexFile); n > 0 {
		t.Errorf("%d files were stored before", n)
	}
}

func TestPruneNeedsTheLock(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	m := newModel(t, 4, 2)
	used := m.some(rand.New(rand.NewPCG(4, 4)))
	files, _ := m.packBytes(t)
	r := pruneRepo(t, m.be)
	try := func(what string, want error, lock *LockOptions, meanwhile func()) {
		t.Helper()
		lctx := ctx
		if lock != nil {
			l, c, err := r.Lock(ctx, *lock)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Unlock()
			lctx = c
		}
		p, err := r.PlanPrune(lctx, PruneOptions{}, marks(used))
		if err != nil || p.Nothing() {
			t.Fatalf("%s: %+v, %v", what, p, err)
		}
		meanwhile()
		err = p.Execute(lctx)
		var locked *LockedError
		if !errors.Is(err, ErrNotExclusive) && !errors.As(err, &locked) || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
		if n, _ := m.packBytes(t); n != files {
			t.Errorf("%s: %d packs instead of %d", what, n, files)
		}
	}
	other := pruneRepo(t, m.be)
	unlock := func() {
		if _, err := other.Unlock(ctx, true); err != nil {
			t.Fatal(err)
		}
	}
	try("no lock", ErrNotExclusive, nil, func() {})
	try("shared lock", ErrNotExclusive, &LockOptions{}, func() {})
	try("lock removed by others", ErrNotExclusive, &LockOptions{Exclusive: true}, unlock)
	try("lock removed, and a backup began", nil, &LockOptions{Exclusive: true}, func() {
		unlock()
		if _, _, err := other.Lock(ctx, LockOptions{}); err != nil {
			t.Fatal(err)
		}
	})
	unlock()
	// Beside a backup there is no exclusive lock, and beside a prune no backup.
	l, _, err := other.Lock(ctx, LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var locked *LockedError
	if _, err := prune(ctx, r, used, PruneOptions{}); !errors.As(err, &locked) {
		t.Errorf("beside a backup: %v", err)
	}
	if err := l.Unlock(); err != nil {
		t.Fatal(err)
	}
	if _, err := prune(ctx, r, used, PruneOptions{}); err != nil {
		t.Error(err)
	}
}

// Refreshing the lock in the middle of a prune does not look like somebody else.
func TestConfirmBesideRefresh(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	r := pruneRepo(t, be)
	r.clock.sleep = func(ctx context.Context, d time.Duration) error {
		if d == lockRefresh {
			d = time.Millisecond
		}
		return realSleep(ctx, d)
	}
	l, lctx, err := r.Lock(ctx, LockOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	for range 300 {
		if err := r.confirmExclusive(lctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := r.confirmExclusive(ctx); !errors.Is(err, ErrNotExclusive) {
		t.Errorf("after the end: %v", err)
	}
}

// Index files as other programs and accidents leave them.
func TestPruneOddIndexes(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	m := newModel(t, 6, 3)
	r := pruneRepo(t, m.be)
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	packs := map[ID][]pack.Entry{}
	for no, e := range r.idx.All() {
		packs[r.idx.PackID(no)] = append(packs[r.idx.PackID(no)], e)
	}
	text := func(add func(add func(ID, []pack.Entry))) {
		t.Helper()
		var b []byte
		add(func(d ID, e []pack.Entry) {
			if b != nil {
				b = append(b, ',')
			}
			b = index.AppendPack(b, d, e)
		})
		if _, err := r.SaveUnpacked(ctx, backend.IndexFile, []byte(index.Header+string(b)+index.Footer)); err != nil {
			t.Fatal(err)
		}
	}
	removeIndexes := func() {
		var all []ID
		if err := r.ListFiles(ctx, backend.IndexFile, func(d ID, _ int64) error { all = append(all, d); return nil }); err != nil {
			t.Fatal(err)
		}
		for _, d := range all {
			if err := r.RemoveUnpacked(ctx, backend.IndexFile, d); err != nil {
				t.Fatal(err)
			}
		}
	}
	all := map[BlobRef]bool{}
	for _, ref := range m.refs {
		all[ref] = true
	}
	for _, used := range []map[BlobRef]bool{all, m.some(rand.New(rand.NewPCG(6, 4)))} {
		for _, c := range []struct {
			name  string
			index func()
		}{
			{"each pack in two files", func() {
				for range 2 {
					text(func(add func(ID, []pack.Entry)) {
						for d, e := range packs {
							add(d, e)
						}
					})
				}
			}},
			{"packs split over two files", func() {
				for half := range 2 {
					text(func(add func(ID, []pack.Entry)) {
						for d, e := range packs {
							if n := len(e) / 2; half == 0 {
								add(d, e[:n])
							} else {
								add(d, e[n:])
							}
						}
					})
				}
			}},
			{"split and full files", func() {
				r.indexBlobs = 3
				for d, e := range packs {
					n := len(e) / 2
					text(func(add func(ID, []pack.Entry)) { add(d, e[:n]) })
					text(func(add func(ID, []pack.Entry)) { add(d, e[n:]) })
				}
			}},
			{"packs that do not exist, and empty files", func() {
				text(func(add func(ID, []pack.Entry)) {
					for d, e := range packs {
						add(d, e)
					}
					add(ID{7}, []pack.Entry{{ID: ID{9}, Type: DataBlob, Length: 99}})
					// One more place of a needed blob, in a pack that is gone.
					ref := m.refs[0]
					add(ID{8}, []pack.Entry{{ID: ref.ID, Type: ref.Type, Length: 99, Plain: 0}})
				})
				text(func(func(ID, []pack.Entry)) {})
			}},
		} {
			keep := m
			m := m.clone()
			r.be = m.be
			removeIndexes()
			c.index()
			p, err := prune(ctx, pruneRepo(t, m.be), used, PruneOptions{MaxUnused: UnusedPercent(0)})
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			if strings.Contains(c.name, "do not exist") && p.Stats.Missing < 2 {
				t.Errorf("%s: %+v", c.name, p.Stats)
			}
			m.holds(t, c.name, used)
			m.tidy(t, c.name, used, true)
			m = keep
			r.be = m.be
		}
	}
}

// What is needed and not there stops everything.
func TestPruneRefusesDamage(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	base := newModel(t, 7, 2)
	all := map[BlobRef]bool{}
	for _, ref := range base.refs {
		all[ref] = true
	}
	var packs, indexes []backend.Handle
	for _, ft := range []backend.FileType{backend.PackFile, backend.IndexFile} {
		err := base.be.List(ctx, ft, func(fi backend.FileInfo) error {
			h := backend.Handle{Type: ft, Name: fi.Name}
			if ft == backend.PackFile {
				packs = append(packs, h)
			} else {
				indexes = append(indexes, h)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, damage := range map[string]func(be *mem.Backend){
		"no packs": func(be *mem.Backend) {
			for _, h := range packs {
				be.Remove(ctx, h)
			}
		},
		"short packs": func(be *mem.Backend) {
			for _, h := range packs {
				be.Put(h, []byte("short"))
			}
		},
		"the index files are gone": func(be *mem.Backend) {
			for _, h := range indexes {
				be.Remove(ctx, h)
			}
		},
		"an index file is unreadable": func(be *mem.Backend) { be.Put(indexes[0], []byte("damaged")) },
	} {
		m := base.clone()
		damage(m.be)
		fb := fault.New(m.be)
		_, err := prune(ctx, pruneRepo(t, fb), all, PruneOptions{})
		if err == nil {
			t.Errorf("%s: success", name)
		}
		var missing *MissingBlobsError
		if !errors.As(err, &missing) && !strings.Contains(name, "unreadable") {
			t.Errorf("%s: %v", name, err)
		}
		for _, c := range fb.Calls() {
			if (c.Op == fault.Save || c.Op == fault.Remove) && c.Handle.Type != backend.LockFile {
				t.Errorf("%s: %v %v", name, c.Op, c.Handle)
			}
		}
	}
	// A damaged copy of something whole does no harm, and goes.
	m := newModel(t, 8, 1)
	r := pruneRepo(t, m.be)
	w := r.NewWriter(ctx) // it does not know what is there
	for _, ref := range m.refs {
		save(t, w, ref.Type, m.blobs[ref])
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	for _, d := range []int{0, 1} {
		m.be.Remove(ctx, packHandle(r.idx.PackID(uint32(d))))
	}
	all = map[BlobRef]bool{}
	for _, ref := range m.refs {
		all[ref] = true
	}
	if _, err := prune(ctx, pruneRepo(t, m.be), all, PruneOptions{MaxUnused: UnusedPercent(0)}); err != nil {
		t.Fatal(err)
	}
	m.holds(t, "damaged copies", all)
	m.tidy(t, "damaged copies", all, true)
}

// Many backups leave many small packs and index files; prune joins them.
func TestPruneJoinsSmallFiles(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	m := &model{be: mem.New(), blobs: map[BlobRef][]byte{}}
	initRepo(t, m.be, InitOptions{})
	used := map[BlobRef]bool{}
	for i := range 30 {
		r := pruneRepo(t, m.be)
		if err := r.LoadIndex(ctx); err != nil {
			t.Fatal(err)
		}
		w := r.NewWriter(ctx)
		for bt := range BlobType(2) {
			p := fmt.Appendf(nil, "content %d of day %d", bt, i)
			d, _ := save(t, w, bt, p)
			m.blobs[BlobRef{bt, d}] = p
			used[BlobRef{bt, d}] = true
		}
		if err := w.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	r := pruneRepo(t, m.be)
	r.indexBlobs = 1000
	if _, err := prune(ctx, r, used, PruneOptions{}); err != nil {
		t.Fatal(err)
	}
	n, _ := m.packBytes(t)
	files := 0
	if err := r.ListFiles(ctx, backend.IndexFile, func(ID, int64) error { files++; return nil }); err != nil {
		t.Fatal(err)
	}
	if n != 2 || files > 2 {
		t.Errorf("%d packs, %d index files", n, files)
	}
	m.holds(t, "joined", used)
	again := pruneRepo(t, m.be)
	again.indexBlobs = 1000
	if p, err := prune(ctx, again, used, PruneOptions{}); err != nil || !p.Nothing() {
		t.Errorf("a second prune: %+v, %v", p.Stats, err)
	}
}

func TestPruneInterrupted(t *testing.T) {
	t.Parallel()
	m := newModel(t, 9, 4)
	used := m.some(rand.New(rand.NewPCG(9, 4)))
	o := PruneOptions{MaxUnused: UnusedPercent(0)}
	count := fault.New(m.clone().be)
	if _, err := prune(context.Background(), pruneRepo(t, count), used, o); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	for n := 2; n < count.Writes(); n += 3 { // the first write is the lock
		ctx, cancel := context.WithCancelCause(context.Background())
		c := m.clone()
		var seen atomic.Int64
		_, err := prune(ctx, pruneRepo(t, &onWrite{c.be, func() {
			if seen.Add(1) == int64(n) {
				cancel(stop)
			}
		}}), used, o)
		cancel(nil)
		if err == nil && seen.Load() < int64(count.Writes()) {
			t.Errorf("interrupted at write %d, it stopped after %d of %d with success", n, seen.Load(), count.Writes())
		}
		c.holds(t, fmt.Sprintf("interrupted at %d", n), used)
		c.locks(t, fmt.Sprintf("interrupted at %d", n))
	}
}

// onWrite calls a function before each write.
type onWrite struct {
	backend.Backend
	fn func()
}

func (b *onWrite) Save(ctx context.Context, h backend.Handle, data []byte) error {
	b.fn()
	return b.Backend.Save(ctx, h, data)
}

func (b *onWrite) Remove(ctx context.Context, h backend.Handle) error {
	b.fn()
	return b.Backend.Remove(ctx, h)
}
