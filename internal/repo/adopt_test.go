package repo

import (
	"context"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// smallPacks opens a repository that makes small packs.
func smallPacks(t *testing.T, be backend.Backend) *Repository {
	t.Helper()
	r := openRepo(t, be)
	r.opts.PackSize = minPackSize
	return r
}

// orphans stores n packs of noise and dies before the index file.
func orphans(t *testing.T, be *mem.Backend, n int, seed byte) []ID {
	t.Helper()
	ctx := context.Background()
	f := fault.New(be, fault.Fault{Op: fault.Save, Type: backend.IndexFile, Times: -1})
	w := smallPacks(t, f).NewWriter(ctx)
	var ids []ID
	for i := range n {
		d, _ := save(t, w, DataBlob, noise(seed+byte(i), minPackSize))
		ids = append(ids, d)
	}
	if err := w.Flush(ctx); err == nil {
		t.Fatal("the index file was written")
	}
	return ids
}

func TestAdopt(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	ids := orphans(t, be, 5, 10)
	// What cannot be used: a pack that is cut off, one that is no pack, and one with nothing new.
	_, data := oneOf(t, be, backend.PackFile)
	cut := data[:len(data)-100]
	be.Put(backend.Handle{Type: backend.PackFile, Name: id.Hash(cut).String()}, cut)
	be.Put(backend.Handle{Type: backend.PackFile, Name: id.Hash(nil).String()}, nil)

	r := smallPacks(t, be)
	if got, err := r.AdoptPacks(ctx); err != nil || got.Packs != 0 {
		t.Errorf("without a lock: %+v, %v", got, err)
	}
	lock, lctx, err := r.Lock(ctx, LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.AdoptPacks(lctx)
	if err != nil || got.Packs != 5 || got.Blobs != 5 {
		t.Fatalf("%+v, %v", got, err)
	}
	w := r.NewWriter(lctx)
	for i := range 5 {
		if d, isNew := save(t, w, DataBlob, noise(10+byte(i), minPackSize)); isNew || d != ids[i] {
			t.Errorf("blob %d was stored again", i)
		}
	}
	if err := w.Flush(lctx); err != nil {
		t.Fatal(err)
	}
	if err := lock.Unlock(); err != nil {
		t.Error(err)
	}
	r = smallPacks(t, be)
	for i, d := range ids {
		if _, err := r.LoadBlob(ctx, DataBlob, d, nil); err != nil {
			t.Errorf("blob %d: %v", i, err)
		}
	}
	// All is in the index now, so there is nothing more to adopt, whatever duplicates there are.
	lock, lctx, err = r.Lock(ctx, LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	if got, err := r.AdoptPacks(lctx); err != nil || got.Packs != 0 {
		t.Errorf("again: %+v, %v", got, err)
	}
}

// Packs of a program that runs are its own; those of one that is dead are not.
func TestAdoptBesideOthers(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	other := smallPacks(t, be)
	lock, _, err := other.Lock(ctx, LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	orphans(t, be, 2, 30)
	r := smallPacks(t, be)
	mine, lctx, err := r.Lock(ctx, LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.AdoptPacks(lctx); err != nil || got.Packs != 0 {
		t.Errorf("beside a living lock: %+v, %v", got, err)
	}
	// The other one has not been heard of for long. Our own lock looks as old, but is ours.
	r.clock.now = func() time.Time { return time.Now().Add(lockStale + time.Minute) }
	if got, err := r.AdoptPacks(lctx); err != nil || got.Packs != 2 {
		t.Errorf("beside a dead lock: %+v, %v", got, err)
	}
	for _, l := range []*Lock{mine, lock} {
		if err := l.Unlock(); err != nil {
			t.Error(err)
		}
	}
}

// Blobs that are stored twice, in an orphan and in the index, are no reason to adopt.
func TestAdoptNothingNew(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	orphans(t, be, 2, 50)
	r := smallPacks(t, be)
	w := r.NewWriter(ctx)
	for i := range 2 {
		save(t, w, DataBlob, noise(50+byte(i), minPackSize))
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	lock, lctx, err := r.Lock(ctx, LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	if got, err := r.AdoptPacks(lctx); err != nil || got.Packs != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}
