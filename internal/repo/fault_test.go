package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/backend/retry"
)

var faultData = func() [][]byte {
	var all [][]byte
	for i := range 12 {
		all = append(all, text(100+i, 3000+i), noise(byte(100+i), 20_000))
	}
	return all
}()

// session opens the repository, stores some blobs and a snapshot, and reads old and new ones back.
func session(ctx context.Context, be backend.Backend, old []ID) error {
	r, err := Open(ctx, be, password, Options{})
	if err != nil {
		return err
	}
	r.opts.PackSize, r.indexBlobs = 100_000, 8 // small, so that there are several of each
	r.unlockTime = 200 * time.Millisecond
	r.clock.sleep = func(ctx context.Context, d time.Duration) error {
		if d == lockSettle {
			return ctx.Err()
		}
		return realSleep(ctx, d)
	}
	l, lctx, err := r.Lock(ctx, LockOptions{})
	if err != nil {
		return err
	}
	err = func() error {
		if err := r.LoadIndex(lctx); err != nil {
			return err
		}
		w := r.NewWriter(lctx)
		var ids []ID
		for _, data := range faultData {
			d, _, err := w.Save(lctx, DataBlob, data)
			if err != nil {
				return err
			}
			ids = append(ids, d)
		}
		if _, _, err := w.Save(lctx, TreeBlob, []byte("{\"nodes\":[]}\n")); err != nil {
			return err
		}
		if err := w.Flush(lctx); err != nil {
			return err
		}
		if _, err := r.SaveUnpacked(lctx, backend.SnapshotFile, []byte(`{}`)); err != nil {
			return err
		}
		for _, d := range append(ids, old...) {
			if _, err := r.LoadBlob(lctx, DataBlob, d, nil); err != nil {
				return err
			}
		}
		return r.LoadBlobs(lctx, DataBlob, append(ids, old...), func(ID, []byte) error { return nil })
	}()
	return errors.Join(err, l.Unlock())
}

// baseRepo holds one snapshot's worth of blobs.
func baseRepo(t *testing.T) (*mem.Backend, []ID) {
	t.Helper()
	ctx := context.Background()
	be := mem.New()
	r := initRepo(t, be, InitOptions{})
	w := r.NewWriter(ctx)
	var ids []ID
	for i := range 5 {
		d, _ := save(t, w, DataBlob, text(i, 5_000))
		ids = append(ids, d)
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	return be, ids
}

func quick(be backend.Backend) backend.Backend {
	return retry.New(be, retry.Options{Sleep: func(ctx context.Context, _ time.Duration) error { return ctx.Err() }})
}

// Every operation of a session is broken in every way, once for good and once in passing.
//
// Without a retry wrapper, an error comes out or the session did not need what was broken; then all that it
// claims to have stored is there. Never may it succeed and leave a repository that check calls damaged.
// With the wrapper, passing troubles are cured.
func TestEveryFault(t *testing.T) {
	t.Parallel()
	base, old := baseRepo(t)
	clean := fault.New(base.Clone())
	if err := session(context.Background(), clean, old); err != nil {
		t.Fatal(err)
	}
	calls := clean.Calls()
	type kind struct {
		op fault.Op
		ft backend.FileType
	}
	counts := map[kind]int{}
	for _, c := range calls {
		counts[kind{c.Op, c.Handle.Type}]++
	}
	if len(counts) < 8 {
		t.Fatalf("the session makes only %v", counts)
	}
	for k, n := range counts {
		for _, effect := range []fault.Effect{fault.Fail, fault.FailAfter, fault.Short, fault.Corrupt, fault.Hang} {
			t.Run(fmt.Sprintf("%v/%v/%v", k.op, k.ft, effect), func(t *testing.T) {
				t.Parallel()
				// First, second and last call of the kind, and all of them.
				nth := []int{1, 2, n, -1}
				if effect == fault.Hang {
					nth = []int{1, n} // these take their time
				}
				for _, i := range slices.Compact(nth) {
					if i > n {
						continue
					}
					f := fault.Fault{Op: k.op, Type: k.ft, N: i, Effect: effect}
					if i < 0 {
						f.N, f.Times = 1, -1
					}
					tryFault(t, base, old, f)
				}
			})
		}
	}
}

func tryFault(t *testing.T, base *mem.Backend, old []ID, f fault.Fault) {
	ctx := context.Background()
	if f.Effect == fault.Hang {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
	}
	m := base.Clone()
	fb := fault.New(m, f)
	start := time.Now()
	err := session(ctx, fb, old)
	if f.Effect == fault.Hang {
		// The number of index files depends on how the uploads meet: the last may not come.
		missed := f.N > 1 && len(fb.Unfired()) > 0
		if err == nil && !missed || time.Since(start) > 20*time.Second {
			t.Errorf("%v: %v after %v", f, err, time.Since(start))
		}
		return
	}
	if len(fb.Unfired()) > 0 && f.Times == 0 {
		// Only the first of a kind comes for certain: how many index files there are depends on how the
		// uploads meet. What did not strike must have done no harm.
		if f.N == 1 {
			t.Errorf("%v did not strike", f)
		}
		if err != nil {
			t.Errorf("%v did not strike, and yet: %v", f, err)
		}
		checkClean(t, m)
		return
	}
	if err == nil {
		// A flipped bit in what was saved shows only to check; one that was read is cured by reading again.
		switch {
		case f.Op == fault.Save && f.Effect == fault.Corrupt, f.Op == fault.Load && f.Times == 0, f.Op == fault.Stat && f.Effect != fault.Fail, len(fb.Unfired()) > 0:
		case f.Op == fault.Load && f.Type == backend.LockFile: // the only lock there is our own
		default:
			t.Errorf("%v: no error", f)
		}
	}
	damaged := 0
	r, oerr := Open(context.Background(), m, password, Options{})
	if oerr != nil {
		t.Fatalf("%v: the repository does not open any more: %v", f, oerr)
	}
	cerr := r.Check(context.Background(), CheckOptions{ReadData: true}, func(e error) {
		if !IsHint(e) {
			damaged++
		}
	})
	wrote := f.Op == fault.Save && (f.Effect == fault.Corrupt || f.Effect == fault.Short) && (f.Type == backend.PackFile || f.Type == backend.IndexFile)
	if cerr != nil || (damaged > 0 && !wrote) {
		t.Errorf("%v: %d findings, %v", f, damaged, cerr)
	}
	if f.Op == fault.Save && f.Effect == fault.Corrupt && wrote && damaged == 0 {
		t.Errorf("%v: check does not find it", f)
	}

	// The same in passing, with the wrapper.
	if f.Times != 0 || (f.Op == fault.Save && f.Effect == fault.Short) {
		return // half a file under its final name cannot be cured without deleting
	}
	m = base.Clone()
	if err := session(context.Background(), quick(fault.New(m, f)), old); err != nil && (f.Op != fault.Save || f.Effect != fault.Corrupt) {
		t.Errorf("%v with retries: %v", f, err)
	}
}

// Init fails cleanly at each step, and can be repeated unless a key was stored.
func TestInitFaults(t *testing.T) {
	for _, op := range []fault.Op{fault.Stat, fault.List, fault.Create, fault.Save} {
		for n := 1; n <= 2; n++ {
			for _, effect := range []fault.Effect{fault.Fail, fault.Hang} {
				f := fault.Fault{Op: op, N: n, Effect: effect}
				ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
				fb := fault.New(mem.New(), f)
				_, err := Init(ctx, fb, password, InitOptions{KDF: cheapKDF})
				cancel()
				if fired := len(fb.Unfired()) == 0; fired != (err != nil) {
					t.Errorf("%v: fired %v, %v", f, fired, err)
				}
				if err == nil {
					continue
				}
				if _, err := Open(context.Background(), fb, password, Options{}); !errors.Is(err, ErrNoRepository) {
					t.Errorf("%v: Open: %v", f, err)
				}
			}
		}
	}
}

// The process dies at each write of a small backup. What is left is whole, and the next run uses it.
func TestCrash(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	base, old := baseRepo(t)
	probe := fault.New(base.Clone())
	if err := session(ctx, probe, old); err != nil {
		t.Fatal(err)
	}
	writes := probe.Writes()
	if writes < 8 {
		t.Fatalf("only %d writes", writes)
	}
	reused := false
	for n := 1; n <= writes; n++ {
		for _, after := range []bool{false, true} {
			m := base.Clone()
			fb := fault.New(m)
			if after {
				fb.KillAfter(n)
			} else {
				fb.KillBefore(n)
			}
			err := session(ctx, fb, old)
			if err == nil && fb.Writes() < n && n > 8 {
				continue // this run needed fewer index files
			}
			if !errors.Is(err, fault.ErrKilled) {
				t.Fatalf("write %d, after %v: %v", n, after, err)
			}
			checkClean(t, m)
			r := openRepo(t, m)
			known := 0
			for _, data := range faultData {
				if r.Has(DataBlob, idOf(data)) {
					known++
				}
			}
			w := r.NewWriter(ctx)
			fresh := 0
			for _, data := range faultData {
				if _, isNew := save(t, w, DataBlob, data); isNew {
					fresh++
				}
			}
			if fresh+known != len(faultData) {
				t.Errorf("write %d: %d known, %d new", n, known, fresh)
			}
			reused = reused || (known > 0 && fresh > 0)
			if err := w.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			checkClean(t, m)
			r = openRepo(t, m)
			for _, data := range faultData {
				if got, err := r.LoadBlob(ctx, DataBlob, idOf(data), nil); err != nil || !bytes.Equal(got, data) {
					t.Errorf("write %d: %v", n, err)
				}
			}
			for _, d := range old {
				if _, err := r.LoadBlob(ctx, DataBlob, d, nil); err != nil {
					t.Errorf("write %d: %v", n, err)
				}
			}
		}
	}
	if !reused {
		t.Error("no run found finished packs of the one that died")
	}
}

// After a failure the Writer must not let anybody believe that blobs are stored, not even the
// next Writer of the same Repository.
func TestFailedIndexFile(t *testing.T) {
	ctx := context.Background()
	m := mem.New()
	initRepo(t, m, InitOptions{})
	fb := fault.New(m, fault.Fault{Op: fault.Save, Type: backend.IndexFile})
	r := openRepo(t, fb)
	w := r.NewWriter(ctx)
	data := noise(1, 1000)
	save(t, w, DataBlob, data)
	if err := w.Flush(ctx); !errors.Is(err, fault.ErrFault) {
		t.Fatalf("Flush: %v", err)
	}
	w2 := r.NewWriter(ctx)
	if _, isNew := save(t, w2, DataBlob, data); isNew {
		t.Error("the blob of a durable pack is stored again")
	}
	if err := w2.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if !openRepo(t, m).Has(DataBlob, idOf(data)) {
		t.Error("the blob counts as stored and is in no index file")
	}
	// A failed pack spoils its Writer, and the next stores the blob anew.
	fb.Add(fault.Fault{Op: fault.Save, Type: backend.PackFile})
	data = noise(2, 1000)
	save(t, w2, DataBlob, data)
	if err := w2.Flush(ctx); !errors.Is(err, fault.ErrFault) {
		t.Fatalf("Flush: %v", err)
	}
	if _, _, err := w2.Save(ctx, DataBlob, noise(3, 10)); !errors.Is(err, fault.ErrFault) {
		t.Errorf("Save after a failure: %v", err)
	}
	if err := w2.Flush(ctx); !errors.Is(err, fault.ErrFault) {
		t.Errorf("second Flush: %v", err)
	}
	w3 := r.NewWriter(ctx)
	if _, isNew := save(t, w3, DataBlob, data); !isNew {
		t.Error("a lost blob counts as stored")
	}
	if err := w3.Flush(ctx); err != nil {
		t.Error(err)
	}
}

// A full pipeline to a backend that hangs ends with the context.
func TestHangingUploads(t *testing.T) {
	m := mem.New()
	initRepo(t, m, InitOptions{})
	fb := fault.New(m, fault.Fault{Op: fault.Save, Type: backend.PackFile, Times: -1, Effect: fault.Hang})
	r, err := Open(context.Background(), fb, password, Options{PackSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	wctx, stop := context.WithCancel(context.Background())
	w := r.NewWriter(wctx)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	for i := 0; ; i++ {
		if _, _, err := w.Save(ctx, DataBlob, noise(byte(i), 600_000)); err != nil {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Save: %v", err)
			}
			break
		}
		if i > 100 {
			t.Fatal("packs pile up without bound")
		}
	}
	if err := w.Flush(ctx); err == nil {
		t.Error("Flush: no error")
	}
	stop()
	if err := w.Flush(context.Background()); err == nil {
		t.Error("Flush: no error")
	}
}
