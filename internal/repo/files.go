package repo

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// hashError says that a file's content is not what its name promises.
type hashError struct {
	h   backend.Handle
	got ID
}

func (e *hashError) Error() string {
	return fmt.Sprintf("%v is damaged: its content has the hash %s", e.h, e.got.Short())
}

// readFile reads a whole file and checks that its hash is its name (the config has none). A mismatch
// is read once more, as it may come from the way and not from the place.
func (r *Repository) readFile(ctx context.Context, h backend.Handle) ([]byte, error) {
	for try := 0; ; try++ {
		var data []byte
		if try > 0 {
			ctx = backend.WithHint(ctx, backend.Fresh) // nor from a cache
		}
		err := r.be.Load(ctx, h, 0, 0, func(rd io.Reader) (err error) {
			data, err = io.ReadAll(rd)
			return err
		})
		if err != nil {
			return nil, err
		}
		if h.Type == backend.ConfigFile {
			return data, nil
		}
		sum := id.Hash(data)
		if sum.String() == h.Name {
			return data, nil
		}
		if try > 0 {
			return nil, &damageError{&hashError{h, sum}}
		}
	}
}

func unpacked(t backend.FileType) error {
	switch t {
	case backend.LockFile, backend.SnapshotFile, backend.IndexFile:
		return nil
	}
	return fmt.Errorf("%v is no type of small encrypted file", t)
}

// SaveUnpacked encrypts plain, which is JSON, and stores it as a file of type t: lock, snapshot or
// index. In version 2 it is compressed.
func (r *Repository) SaveUnpacked(ctx context.Context, t backend.FileType, plain []byte) (ID, error) {
	if err := unpacked(t); err != nil {
		return ID{}, err
	}
	if len(plain) == 0 || (plain[0] != '{' && plain[0] != '[') {
		return ID{}, fmt.Errorf("save to %v: the content is no JSON object", t)
	}
	if t != backend.LockFile {
		if err := r.Settled(ctx); err != nil {
			return ID{}, err
		}
	}
	if r.conf.Version >= 2 {
		c := r.compressors.take()
		defer r.compressors.release(c)
		plain = c.file(plain)
	}
	sealed := r.key.Seal(nil, plain)
	name := id.Hash(sealed)
	if err := r.be.Save(ctx, backend.Handle{Type: t, Name: name.String()}, sealed); err != nil {
		return ID{}, fmt.Errorf("store the new file in %v: %w", t, err)
	}
	return name, nil
}

// LoadUnpacked is the reverse of SaveUnpacked. Errors: backend.ErrNotExist.
func (r *Repository) LoadUnpacked(ctx context.Context, t backend.FileType, name ID) ([]byte, error) {
	if err := unpacked(t); err != nil {
		return nil, err
	}
	h := backend.Handle{Type: t, Name: name.String()}
	data, err := r.readFile(ctx, h)
	if err != nil {
		return nil, err
	}
	plain, err := r.key.Open(data)
	if err == nil {
		plain, err = decompressFile(plain)
	}
	if err != nil {
		return nil, &damageError{fmt.Errorf("%v: %w", h, err)}
	}
	return plain, nil
}

// RemoveUnpacked deletes a file of type lock, snapshot or index. Errors: backend.ErrNotExist.
func (r *Repository) RemoveUnpacked(ctx context.Context, t backend.FileType, name ID) error {
	if err := unpacked(t); err != nil {
		return err
	}
	if t != backend.LockFile {
		if err := r.Settled(ctx); err != nil {
			return err
		}
	}
	return r.be.Remove(ctx, backend.Handle{Type: t, Name: name.String()})
}

// ListFiles calls fn for the files of type t with their sizes in bytes, in no particular order.
func (r *Repository) ListFiles(ctx context.Context, t backend.FileType, fn func(name ID, size int64) error) error {
	var own error
	err := r.be.List(ctx, t, func(fi backend.FileInfo) error {
		name, err := id.Parse(fi.Name)
		if err != nil {
			return nil // backends list proper names only
		}
		own = fn(name, fi.Size)
		return own
	})
	if own != nil {
		return own
	}
	if err != nil {
		return fmt.Errorf("list %v of the repository at %s: %w", t, r.be.Location(), err)
	}
	return nil
}

// AmbiguousError is returned by FindFile when several files begin with the prefix.
type AmbiguousError struct {
	Type   backend.FileType
	Prefix string
	IDs    []ID
}

func (e *AmbiguousError) Error() string {
	var s []string
	for _, d := range e.IDs[:min(len(e.IDs), 5)] {
		s = append(s, d.String()[:min(2*id.Size, max(len(e.Prefix)+4, 8))])
	}
	return fmt.Sprintf("%q fits %d files in %v (%s, ...); give more digits", e.Prefix, len(e.IDs), e.Type, strings.Join(s, ", "))
}

// FindFile returns the file of type t whose name begins with prefix, hexadecimal digits of either case.
// Errors: *AmbiguousError if there are several, backend.ErrNotExist (wrapped) if there is none.
func (r *Repository) FindFile(ctx context.Context, t backend.FileType, prefix string) (ID, error) {
	p := strings.ToLower(prefix)
	if p == "" || len(p) > 2*id.Size || strings.Trim(p, "0123456789abcdef") != "" {
		return ID{}, fmt.Errorf("%q is no id: an id, or its beginning, is made of up to %d hexadecimal digits", prefix, 2*id.Size)
	}
	var found []ID
	err := r.ListFiles(ctx, t, func(d ID, _ int64) error {
		if strings.HasPrefix(d.String(), p) {
			found = append(found, d)
		}
		return nil
	})
	switch {
	case err != nil:
		return ID{}, err
	case len(found) == 0:
		return ID{}, fmt.Errorf("no file in %v of the repository begins with %q: %w", t, prefix, backend.ErrNotExist)
	case len(found) > 1:
		return ID{}, &AmbiguousError{t, prefix, found}
	}
	return found[0], nil
}

// ErrNoRemoval is returned when the place of the repository lets nothing be removed, as an append-only
// server does.
var ErrNoRemoval = errors.New("nothing can be removed there")

// CanRemove finds out whether files of type t can be removed, by asking for one that does not exist: whoever
// replaces files learns before the first write that the old ones could not go. Errors: ErrNoRemoval.
func (r *Repository) CanRemove(ctx context.Context, t backend.FileType) error {
	var none ID
	rand.Read(none[:])
	err := r.be.Remove(ctx, backend.Handle{Type: t, Name: none.String()})
	if err == nil || errors.Is(err, backend.ErrNotExist) {
		return nil
	}
	var pe *backend.PermanentError
	if errors.As(err, &pe) && ctx.Err() == nil {
		return fmt.Errorf("%w: the repository at %s: %w", ErrNoRemoval, r.be.Location(), err)
	}
	return fmt.Errorf("try to remove something from the repository at %s: %w", r.be.Location(), err)
}
