package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/membudget"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// What --pack-size may be, in MiB.
const minPackSize, maxPackSize = 4, 128

// repoOptions are the flags of verbs that write into the repository.
type repoOptions struct {
	compression string
	packSize    int // MiB
}

func (o repoOptions) options(mem membudget.Budget, tmp string) (repo.Options, error) {
	out := repo.Options{PackSize: mem.PackSize, PackBuffers: mem.PackBuffers, Readers: mem.Readers, IndexMemory: mem.Index, TempDir: tmp}
	switch o.compression {
	case "", "auto":
		out.Compression = repo.CompressionAuto
	case "off":
		out.Compression = repo.CompressionOff
	case "max":
		out.Compression = repo.CompressionMax
	default:
		return out, usageError("--compression is auto, off or max, not %q", o.compression)
	}
	if o.packSize != 0 && (o.packSize < minPackSize || o.packSize > maxPackSize) {
		return out, usageError("--pack-size is %d to %d (MiB), not %d", minPackSize, maxPackSize, o.packSize)
	}
	return out, nil
}

// lockMode says what others may do with the repository meanwhile.
type lockMode int

const (
	lockNone      lockMode = iota // anything
	lockShared                    // read and add
	lockExclusive                 // nothing
)

// withRepository opens the repository, locks it, and runs fn. The context that fn gets ends when
// the lock is lost.
func (a *app) withRepository(ctx context.Context, ro repoOptions, mode lockMode, fn func(context.Context, *repo.Repository) error) error {
	return a.withRepositoryAt(ctx, a.opt.repo, a.password, ro, mode, fn)
}

// withRepositoryAt does the same with any repository.
func (a *app) withRepositoryAt(ctx context.Context, addr string, password func(context.Context, bool) (string, error),
	ro repoOptions, mode lockMode, fn func(context.Context, *repo.Repository) error,
) error {
	o, err := ro.options(a.mem, a.cacheDir())
	if err != nil {
		return err
	}
	be, err := a.backendAt(ctx, addr)
	if err != nil {
		return err
	}
	defer be.Close()
	// Nobody should have to type a password to learn that the path is wrong.
	if _, err := be.Stat(ctx, backend.Handle{Type: backend.ConfigFile}); errors.Is(err, backend.ErrNotExist) {
		return fmt.Errorf("%w at %s", repo.ErrNoRepository, ui.Quote(be.Location()))
	} else if err != nil {
		return openError(addr, be.Location(), err)
	}
	pw, err := password(ctx, false)
	if err != nil {
		return err
	}
	r, err := repo.Open(ctx, be, pw, o)
	if err != nil {
		return err // says where
	}
	if mode != lockNone {
		lock, lctx, err := r.Lock(ctx, repo.LockOptions{Exclusive: mode == lockExclusive, RetryFor: a.opt.retryLock})
		if err != nil {
			return err // says where and by whom
		}
		defer lock.Unlock()
		ctx = lctx
	}
	return explain(ctx, fn(ctx, r))
}

// loadIndex reads the index, which may take a while.
func (a *app) loadIndex(ctx context.Context, r *repo.Repository) error {
	sink := a.ui.Sink()
	sink.Emit(progress.Event{Kind: progress.Verbose, Message: "reading the index"})
	if err := r.LoadIndex(ctx); err != nil {
		return ui.WithHints(fmt.Errorf("cannot read the index of the repository: %w", err),
			"`holdfast check` tells what is damaged.")
	}
	return nil
}

// loadIndexOnce reads the index unless it was read already.
func (a *app) loadIndexOnce(ctx context.Context, r *repo.Repository) error {
	if a.indexed == r {
		return nil
	}
	if err := a.loadIndex(ctx, r); err != nil {
		return err
	}
	a.indexed = r
	return nil
}

// cacheDir is where the cache lies: as set, the service's own, or the usual place of the user.
// It is "" if there is none; then a backup works without.
func (a *app) cacheDir() string {
	if a.opt.cacheDir != "" {
		return a.opt.cacheDir
	}
	if d, ok := a.getenv("CACHE_DIRECTORY"); ok && filepath.IsAbs(d) { // systemd, CacheDirectory=
		return d
	}
	if d, ok := a.getenv("XDG_CACHE_HOME"); ok && filepath.IsAbs(d) {
		return filepath.Join(d, "holdfast")
	}
	if os.Geteuid() == 0 {
		return "/var/cache/holdfast"
	}
	if d, ok := a.getenv("HOME"); ok && filepath.IsAbs(d) {
		return filepath.Join(d, ".cache", "holdfast")
	}
	return ""
}
