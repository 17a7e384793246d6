// Package cache keeps copies of what is read again and again from a repository on a server: index files,
// snapshots, packs of trees, and parts of packs: single trees, and the metadata of instances that lies among
// the contents. The copies are encrypted as the originals are.
//
// The directory can be deleted at any time, is kept below a size, and can be shared by any number of
// processes. A copy is compared with the hash that is its name before it is used; one of a part with the hash
// at its end.
package cache

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
)

// Options of New. Dir must be set.
type Options struct {
	// Dir is for all repositories; each gets a directory of its own in it.
	Dir string
	// MaxBytes is the most that Dir may hold. Zero: 2 GiB, the trees and the index of some million files.
	MaxBytes int64
	// Warn is told once if nothing can be written any more. May be nil.
	Warn func(error)
}

// Backend is a backend with a cache before it.
type Backend struct {
	backend.Backend
	o   Options
	dir string // of this repository

	mu       sync.Mutex
	verified map[string]bool  // guarded by mu: packs whose copy had the right hash in this process
	asked    map[string]int64 // guarded by mu: bytes that were wanted of packs without a copy
	fetching map[string]bool  // guarded by mu
	size     int64            // guarded by mu: of Dir as far as is known; negative: not looked yet
	broken   bool             // guarded by mu: writing has failed
}

var _ backend.Backend = (*Backend)(nil)

// Unwrap returns the backend that is wrapped.
func (b *Backend) Unwrap() backend.Backend { return b.Backend }

const (
	// maxPack is the largest pack that is copied, in bytes; restic's largest are twice that.
	maxPack = 64 << 20
	// maxPiece is the longest part of a pack that is copied, in bytes: the largest chunk, with what encryption adds.
	maxPiece = 9 << 20
	// A pack is copied as a whole once this part of it was asked for: single trees of a pack are
	// cheaper to get alone.
	worth = 8
	// touchAfter is how old the time of a copy may be that tells its last use.
	touchAfter = time.Hour
)

// New wraps be. Nothing is written yet.
func New(be backend.Backend, o Options) *Backend {
	if o.MaxBytes <= 0 {
		o.MaxBytes = 2 << 30
	}
	// The place names the repository. Contents are named by their hashes, so that another
	// repository that takes the place later finds nothing wrong.
	sum := sha256.Sum256([]byte(be.Location()))
	return &Backend{
		Backend: be, o: o, dir: filepath.Join(o.Dir, hex.EncodeToString(sum[:8])),
		verified: map[string]bool{}, asked: map[string]int64{}, fetching: map[string]bool{}, size: -1,
	}
}

func (b *Backend) path(h backend.Handle) string {
	return filepath.Join(b.dir, h.Type.Dir(), h.Name[:2], h.Name)
}

// kept reports whether files of type t are copied as a whole on their first use.
func kept(t backend.FileType) bool { return t == backend.IndexFile || t == backend.SnapshotFile }

// Save stores the file, and keeps a copy of what will be read again.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if err := b.Backend.Save(ctx, h, data); err != nil {
		return err
	}
	if kept(h.Type) || (h.Type == backend.PackFile && backend.Hints(ctx)&backend.Metadata != 0 && len(data) <= maxPack) {
		b.store(h, data)
	}
	return nil
}

// Load takes the copy if there is a good one.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	hints := backend.Hints(ctx)
	isPack := h.Type == backend.PackFile && hints&backend.Metadata != 0
	isPart := h.Type == backend.PackFile && hints&backend.Near != 0
	if h.Check() != nil || length < 0 || offset < 0 || !(kept(h.Type) || isPack || isPart && length > 0) {
		return b.Backend.Load(ctx, h, length, offset, fn)
	}
	if hints&backend.Fresh != 0 {
		b.drop(h)
		return b.Backend.Load(ctx, h, length, offset, fn)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("load %v: %w", h, err)
	}
	if part, ok := b.part(h, length, offset); ok {
		return fn(bytes.NewReader(part))
	}
	if isPack || isPart {
		if part, ok := b.piece(h, length, offset); ok {
			return fn(bytes.NewReader(part))
		}
		if isPack {
			if err := b.maybeFetch(ctx, h, length); err != nil {
				return err
			}
			if part, ok := b.part(h, length, offset); ok {
				return fn(bytes.NewReader(part))
			}
		}
		if length == 0 || length > maxPiece {
			return b.Backend.Load(ctx, h, length, offset, fn)
		}
		return b.Backend.Load(ctx, h, length, offset, func(r io.Reader) error {
			data := make([]byte, length)
			n, err := io.ReadFull(r, data)
			if err != nil {
				return fn(io.MultiReader(bytes.NewReader(data[:n]), failing{err}))
			}
			if err := fn(bytes.NewReader(data)); err != nil {
				return err
			}
			b.storePiece(h, offset, data)
			return nil
		})
	}
	data, err := b.fetch(ctx, h)
	if err != nil {
		return err
	}
	if offset+int64(length) > int64(len(data)) {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: %d bytes from %d wanted, the file has %d: %w", h, length, offset, len(data), io.ErrUnexpectedEOF)}
	}
	data = data[offset:]
	if length > 0 {
		data = data[:length]
	}
	return fn(bytes.NewReader(data))
}

// fetch loads a whole file, and keeps a copy if it is what its name says.
func (b *Backend) fetch(ctx context.Context, h backend.Handle) (data []byte, err error) {
	err = b.Backend.Load(ctx, h, 0, 0, func(r io.Reader) (err error) {
		data, err = io.ReadAll(r)
		return err
	})
	if err == nil && hasName(data, h) {
		b.store(h, data)
	}
	return data, err
}

// maybeFetch copies a pack once enough of it was asked for. Another goroutine that copies the same pack
// is not waited for.
func (b *Backend) maybeFetch(ctx context.Context, h backend.Handle, length int) error {
	b.mu.Lock()
	b.asked[h.Name] += int64(length)
	asked, busy := b.asked[h.Name], b.fetching[h.Name] || b.broken
	b.mu.Unlock()
	if busy || asked < 64<<10 { // not even worth the question how large it is
		return nil
	}
	fi, err := b.Backend.Stat(ctx, h)
	if err != nil {
		return err
	}
	if fi.Size > maxPack || asked < fi.Size/worth {
		return nil
	}
	b.mu.Lock()
	busy = b.fetching[h.Name]
	b.fetching[h.Name] = true
	b.mu.Unlock()
	if busy {
		return nil
	}
	defer func() {
		b.mu.Lock()
		delete(b.fetching, h.Name)
		delete(b.asked, h.Name)
		b.mu.Unlock()
	}()
	if _, err = b.fetch(ctx, h); err == nil {
		b.dropPieces(h)
	}
	return err
}

func hasName(data []byte, h backend.Handle) bool {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]) == h.Name
}

// part returns a part of the copy, if there is a good copy that has it.
func (b *Backend) part(h backend.Handle, length int, offset int64) ([]byte, bool) {
	f, err := os.Open(b.path(h))
	if err != nil {
		return nil, false
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return nil, false
	}
	b.mu.Lock()
	good := b.verified[h.Name]
	b.mu.Unlock()
	if !good {
		sum := sha256.New()
		if _, err := io.Copy(sum, f); err != nil || hex.EncodeToString(sum.Sum(nil)) != h.Name {
			b.drop(h)
			return nil, false
		}
		b.mu.Lock()
		b.verified[h.Name] = true
		b.mu.Unlock()
	}
	n := int64(length)
	if n == 0 {
		n = fi.Size() - offset
	}
	if n < 0 || offset+n > fi.Size() {
		return nil, false // the original says what is wrong
	}
	p := make([]byte, n)
	if _, err := f.ReadAt(p, offset); err != nil && !(err == io.EOF && n == 0) {
		b.drop(h)
		return nil, false
	}
	touch(b.path(h), fi)
	return p, true
}

// failing is the end of what could not be read to its end.
type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// pieces is the directory of the parts of packs.
const pieces = "pieces"

func (b *Backend) piecePath(h backend.Handle, length int, offset int64) string {
	return filepath.Join(b.dir, pieces, h.Name[:2], fmt.Sprintf("%s-%d-%d", h.Name, offset, length))
}

// isPiece tells the names of parts.
func isPiece(name string) bool {
	n, _, ok := strings.Cut(name, "-")
	return ok && backend.IsName(n)
}

// storePiece keeps a part of a pack, with its hash behind it.
func (b *Backend) storePiece(h backend.Handle, offset int64, data []byte) {
	sum := sha256.Sum256(data)
	b.storeAt(b.piecePath(h, len(data), offset), append(data[:len(data):len(data)], sum[:]...))
}

// piece returns the copy of just this part, if there is a good one.
func (b *Backend) piece(h backend.Handle, length int, offset int64) ([]byte, bool) {
	if length == 0 {
		return nil, false
	}
	path := b.piecePath(h, length, offset)
	fi, err := os.Lstat(path)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() != int64(length)+sha256.Size {
		return nil, false
	}
	p, err := os.ReadFile(path)
	if err != nil || len(p) != length+sha256.Size {
		return nil, false
	}
	if sum := sha256.Sum256(p[:length]); !bytes.Equal(sum[:], p[length:]) {
		_ = os.Remove(path)
		return nil, false
	}
	touch(path, fi)
	return p[:length], true
}

// dropPieces removes the parts of a pack.
func (b *Backend) dropPieces(h backend.Handle) {
	list, _ := filepath.Glob(filepath.Join(b.dir, pieces, h.Name[:2], h.Name+"-*"))
	for _, path := range list {
		_ = os.Remove(path)
	}
}

// touch notes that a copy was used: what was used lately stays.
func touch(path string, fi fs.FileInfo) {
	if now := time.Now(); now.Sub(fi.ModTime()) > touchAfter || fi.ModTime().After(now) {
		_ = os.Chtimes(path, now, now)
	}
}

func (b *Backend) drop(h backend.Handle) {
	if h.Type == backend.PackFile {
		b.dropPieces(h)
	}
	_ = os.Remove(b.path(h))
	b.mu.Lock()
	delete(b.verified, h.Name)
	b.mu.Unlock()
}

// store keeps a copy of a file.
func (b *Backend) store(h backend.Handle, data []byte) {
	b.storeAt(b.path(h), data)
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.verified, h.Name)
}

// storeAt writes a copy under another name and renames it. Failure is no error: the original is there.
func (b *Backend) storeAt(path string, data []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.broken || int64(len(data)) > b.o.MaxBytes/4 {
		return
	}
	err := b.write(path, data)
	if err != nil {
		b.broken = true
		if b.o.Warn != nil {
			b.o.Warn(fmt.Errorf("nothing more is kept in the cache: %w", err))
		}
		return
	}
	if b.size < 0 {
		b.size = b.shrink(b.o.MaxBytes)
		return
	}
	if b.size += onDisk(int64(len(data))); b.size > b.o.MaxBytes {
		// Some more than needed, so that it is not done for each file. Others may write as well.
		b.size = b.shrink(b.o.MaxBytes / 10 * 9)
	}
}

// onDisk is about what a file of n bytes takes: file systems give whole blocks, and parts of packs are small.
func onDisk(n int64) int64 {
	const block = 4 << 10
	return (n + block - 1) / block * block
}

// tmpPrefix begins the names of files that are being written.
const tmpPrefix = "tmp-"

func (b *Backend) write(path string, data []byte) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), tmpPrefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path) // not synced: a copy that a power cut has damaged is found by its hash
}

// shrink deletes the copies that were not used for the longest time, of all repositories, until at most
// limit bytes are left, and returns how many are.
func (b *Backend) shrink(limit int64) (left int64) {
	type copied struct {
		path string
		size int64
		used time.Time
	}
	var all []copied
	_ = filepath.WalkDir(b.o.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // what cannot be looked at is left alone
		}
		fi, err := d.Info()
		if err != nil {
			return nil
		}
		switch {
		case strings.HasPrefix(d.Name(), tmpPrefix) && time.Since(fi.ModTime()) > time.Hour: // of a killed process
			_ = os.Remove(path)
		case backend.IsName(d.Name()) || isPiece(d.Name()):
			all = append(all, copied{path, onDisk(fi.Size()), fi.ModTime()})
			left += onDisk(fi.Size())
		}
		return nil
	})
	slices.SortFunc(all, func(a, b copied) int { return cmp.Or(a.used.Compare(b.used), strings.Compare(a.path, b.path)) })
	for _, c := range all {
		if left <= limit {
			break
		}
		if err := os.Remove(c.path); err == nil || errors.Is(err, fs.ErrNotExist) {
			left -= c.size
		}
	}
	return left
}

// List also deletes the copies of index files and snapshots that are not there any more.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	if !kept(t) {
		return b.Backend.List(ctx, t, fn)
	}
	before := b.copies(t)
	err := b.Backend.List(ctx, t, func(fi backend.FileInfo) error {
		delete(before, fi.Name)
		return fn(fi)
	})
	if err == nil {
		for name := range before {
			b.drop(backend.Handle{Type: t, Name: name})
		}
	}
	return err
}

func (b *Backend) copies(t backend.FileType) map[string]bool {
	out := map[string]bool{}
	_ = filepath.WalkDir(filepath.Join(b.dir, t.Dir()), func(_ string, d fs.DirEntry, err error) error {
		if err == nil && backend.IsName(d.Name()) {
			out[d.Name()] = true
		}
		return nil
	})
	return out
}

// Remove deletes the copy, too.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	if h.Check() == nil && (kept(h.Type) || h.Type == backend.PackFile) {
		b.drop(h)
	}
	return b.Backend.Remove(ctx, h)
}
