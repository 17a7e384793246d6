// Package local keeps a repository in a directory, in restic's layout.
package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"github.com/holdfast-backup/holdfast/internal/backend"
)

// writeStep is how much is written between two looks at the context, in bytes.
const writeStep = 4 << 20

// Backend is a directory. Its methods are safe for concurrent use, also by several processes.
type Backend struct {
	dir string
	// Modes of new directories, of files while they are written, and of finished files.
	dirMode, newMode, doneMode fs.FileMode
	noDirect                   atomic.Bool // the file system takes no direct writes
}

var _ backend.Backend = (*Backend)(nil)

// New returns the backend for the repository directory dir, which need not exist yet.
// As restic does, a config that the group may read makes all new files readable for the group.
func New(dir string) *Backend {
	b := &Backend{dir: dir, dirMode: 0o700, newMode: 0o600, doneMode: 0o400}
	if fi, err := os.Stat(filepath.Join(dir, "config")); err == nil && fi.Mode()&0o040 != 0 {
		b.dirMode, b.newMode, b.doneMode = 0o770, 0o660, 0o440
	}
	return b
}

// Location returns the directory.
func (b *Backend) Location() string { return b.dir }

// Close does nothing: no file stays open between calls.
func (b *Backend) Close() error { return nil }

func (b *Backend) path(h backend.Handle) string {
	switch h.Type {
	case backend.ConfigFile:
		return filepath.Join(b.dir, "config")
	case backend.PackFile:
		return filepath.Join(b.dir, "data", h.Name[:2], h.Name)
	}
	return filepath.Join(b.dir, h.Type.Dir(), h.Name)
}

// wrap adds what was done to which file, and the backend's own error classes.
func wrap(what string, h backend.Handle, err error) error {
	// The path would tell twice what h tells; the location is known to the caller.
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	var le *os.LinkError
	if errors.As(err, &le) {
		err = le.Err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s %v: %w", what, h, backend.ErrNotExist)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%s %v: %w", what, h, backend.ErrExist)
	}
	err = fmt.Errorf("%s %v: %w", what, h, err)
	for _, e := range []error{
		syscall.ENOSPC, syscall.EDQUOT, syscall.EACCES, syscall.EPERM, syscall.EROFS,
		syscall.EFBIG, syscall.ENOTDIR, syscall.EISDIR, syscall.ENAMETOOLONG, syscall.ELOOP,
	} {
		if errors.Is(err, e) {
			return &backend.PermanentError{Err: err}
		}
	}
	return err
}

// Create makes the directories of the layout and leaves existing ones alone.
func (b *Backend) Create(ctx context.Context) error {
	if err := os.MkdirAll(b.dir, b.dirMode); err != nil {
		return &backend.PermanentError{Err: fmt.Errorf("create the repository's directory: %w", err)}
	}
	dirs := []string{"index", "keys", "locks", "snapshots", "data"}
	for i := range 256 {
		dirs = append(dirs, fmt.Sprintf("data/%02x", i))
	}
	for _, d := range dirs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := os.Mkdir(filepath.Join(b.dir, d), b.dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
			return &backend.PermanentError{Err: fmt.Errorf("create a directory of the repository: %w", err)}
		}
	}
	for _, d := range []string{b.dir, filepath.Join(b.dir, "data"), filepath.Dir(filepath.Clean(b.dir))} {
		if err := syncDir(d); err != nil {
			return fmt.Errorf("sync the new directories: %w", err)
		}
	}
	return nil
}

// Save writes a temporary file beside the final place, syncs it, renames it and syncs the
// directory, so that the name appears with the whole content or not at all.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) (err error) {
	if err := h.Check(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("save %v: %w", h, err)
	}
	final := b.path(h)
	if _, err := os.Lstat(final); err == nil {
		return fmt.Errorf("save %v: %w", h, backend.ErrExist)
	}
	f, err := b.create(final)
	if err != nil {
		return wrap("save", h, err)
	}
	tmp := f.Name()
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(tmp)
		}
	}()
	direct, err := b.writeDirect(ctx, f, data)
	if err != nil {
		return wrap("save", h, err)
	}
	for rest := data[direct:]; len(rest) > 0; {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("save %v: %w", h, err)
		}
		n := min(len(rest), writeStep)
		if _, err := f.Write(rest[:n]); err != nil {
			return wrap("save", h, err)
		}
		rest = rest[n:]
	}
	// Read-only guards against accidents; some file systems know no modes, and then it is no loss.
	if err := f.Chmod(b.doneMode); err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, errors.ErrUnsupported) {
		return wrap("save", h, err)
	}
	if err := f.Sync(); err != nil {
		return wrap("sync", h, err)
	}
	if err := f.Close(); err != nil {
		return wrap("save", h, err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("save %v: %w", h, err)
	}
	if err := renameNew(tmp, final); err != nil {
		return wrap("save", h, err)
	}
	if err := syncDir(filepath.Dir(final)); err != nil {
		// Not known to be durable, so it must not stay: a retry would take it for a success.
		os.Remove(final)
		return wrap("sync the directory of", h, err)
	}
	return nil
}

// create opens a new temporary file beside final, and makes the last directory if it is missing.
// Parents are never made: where the root is gone (not mounted), nothing may be written elsewhere.
func (b *Backend) create(final string) (*os.File, error) {
	for try := 0; ; try++ {
		name := fmt.Sprintf("%s-tmp-%016x", final, rand.Uint64())
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, b.newMode)
		dir := filepath.Dir(final)
		if try > 0 || !errors.Is(err, fs.ErrNotExist) || dir == filepath.Clean(b.dir) {
			return f, err
		}
		if merr := os.Mkdir(dir, b.dirMode); merr != nil && !errors.Is(merr, fs.ErrExist) {
			return nil, err
		}
		if err := syncDir(filepath.Dir(dir)); err != nil {
			return nil, err
		}
	}
}

// Load reads from an open file. A length beyond the end is an error before fn is called.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	if err := h.Check(); err != nil {
		return err
	}
	if length < 0 || offset < 0 {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: bad range %d+%d", h, offset, length)}
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("load %v: %w", h, err)
	}
	f, err := os.Open(b.path(h))
	if err != nil {
		return wrap("load", h, err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return wrap("load", h, err)
	}
	if !fi.Mode().IsRegular() {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: not a regular file", h)}
	}
	n := int64(length)
	if n == 0 {
		n = max(fi.Size()-offset, 0)
	}
	if offset+n > fi.Size() {
		// Files here appear whole, so this is damage, and trying again would only cost time.
		return &backend.PermanentError{Err: fmt.Errorf("load %v: %d bytes from %d wanted, the file has %d: %w", h, n, offset, fi.Size(), io.ErrUnexpectedEOF)}
	}
	return fn(&reader{ctx: ctx, r: io.NewSectionReader(f, offset, n), left: n})
}

// reader reports the end of the context, and a file that shrank while it was read.
type reader struct {
	ctx  context.Context
	r    io.Reader
	left int64
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	if len(p) > writeStep {
		p = p[:writeStep]
	}
	n, err := r.r.Read(p)
	r.left -= int64(n)
	if err == io.EOF && r.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Stat tells the size of a regular file.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (backend.FileInfo, error) {
	if err := h.Check(); err != nil {
		return backend.FileInfo{}, err
	}
	if err := ctx.Err(); err != nil {
		return backend.FileInfo{}, fmt.Errorf("stat %v: %w", h, err)
	}
	fi, err := os.Stat(b.path(h))
	if err != nil {
		return backend.FileInfo{}, wrap("stat", h, err)
	}
	if !fi.Mode().IsRegular() {
		return backend.FileInfo{}, &backend.PermanentError{Err: fmt.Errorf("stat %v: not a regular file", h)}
	}
	return backend.FileInfo{Name: h.Name, Size: fi.Size()}, nil
}

// List passes over everything that is not a regular file with a proper name, and packs that lie
// in a directory where Load would not look.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	if t == backend.ConfigFile {
		fi, err := b.Stat(ctx, backend.Handle{Type: t})
		if errors.Is(err, backend.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return fn(fi)
	}
	if t.Dir() == "" {
		return &backend.PermanentError{Err: fmt.Errorf("list: unknown file type %d", t)}
	}
	if t != backend.PackFile {
		return b.listDir(ctx, t, t.Dir(), "", fn)
	}
	for i := range 256 {
		prefix := fmt.Sprintf("%02x", i)
		if err := b.listDir(ctx, t, "data/"+prefix, prefix, fn); err != nil {
			return err
		}
	}
	return nil
}

func (b *Backend) listDir(ctx context.Context, t backend.FileType, dir, prefix string, fn func(backend.FileInfo) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("list %v: %w", t, err)
	}
	d, err := os.Open(filepath.Join(b.dir, dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return wrap("list", backend.Handle{Type: t, Name: prefix}, err)
	}
	defer d.Close()
	for {
		// In batches, as a directory can hold millions of files.
		entries, err := d.ReadDir(4096)
		if err != nil && err != io.EOF {
			return wrap("list", backend.Handle{Type: t, Name: prefix}, err)
		}
		for _, e := range entries {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("list %v: %w", t, err)
			}
			if !backend.IsName(e.Name()) || e.Name()[:len(prefix)] != prefix {
				continue
			}
			fi, err := os.Stat(filepath.Join(b.dir, dir, e.Name()))
			if errors.Is(err, fs.ErrNotExist) {
				continue // removed meanwhile
			}
			if err != nil {
				return wrap("list", backend.Handle{Type: t, Name: e.Name()}, err)
			}
			if !fi.Mode().IsRegular() {
				continue
			}
			if err := fn(backend.FileInfo{Name: e.Name(), Size: fi.Size()}); err != nil {
				return err
			}
		}
		if len(entries) == 0 {
			return nil
		}
	}
}

// Remove deletes a file. For index files and snapshots the directory is synced as well: packs
// are deleted after the index that names them, and a power cut must not turn that round.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	if err := h.Check(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("remove %v: %w", h, err)
	}
	p := b.path(h)
	if err := os.Remove(p); err != nil {
		return wrap("remove", h, err)
	}
	if h.Type == backend.IndexFile || h.Type == backend.SnapshotFile {
		if err := syncDir(filepath.Dir(p)); err != nil {
			return wrap("sync the directory of", h, err)
		}
	}
	return nil
}

// syncDir makes the names in dir durable. File systems that cannot sync a directory say EINVAL
// or ENOTSUP; there is nothing more to be done on them.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}
