// Package mem keeps a repository in memory, for tests.
package mem

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/backend"
)

// Backend is a set of files in memory.
type Backend struct {
	mu    sync.Mutex
	files map[backend.Handle][]byte // guarded by mu; contents are never changed
}

var _ backend.Backend = (*Backend)(nil)

// New returns an empty backend.
func New() *Backend { return &Backend{files: map[backend.Handle][]byte{}} }

// Clone returns an independent copy of the present state.
func (b *Backend) Clone() *Backend {
	b.mu.Lock()
	defer b.mu.Unlock()
	return &Backend{files: maps.Clone(b.files)}
}

// Location returns "memory".
func (b *Backend) Location() string { return "memory" }

// Create does nothing.
func (b *Backend) Create(ctx context.Context) error { return ctx.Err() }

// Close does nothing.
func (b *Backend) Close() error { return nil }

// Save keeps a copy of data.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if err := h.Check(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("save %v: %w", h, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.files[h]; ok {
		return fmt.Errorf("save %v: %w", h, backend.ErrExist)
	}
	b.files[h] = bytes.Clone(data)
	return nil
}

// Put stores data under h whatever was there before: how tests damage a repository.
func (b *Backend) Put(h backend.Handle, data []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.files[h] = bytes.Clone(data)
}

func (b *Backend) get(ctx context.Context, what string, h backend.Handle) ([]byte, error) {
	if err := h.Check(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%s %v: %w", what, h, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	data, ok := b.files[h]
	if !ok {
		return nil, fmt.Errorf("%s %v: %w", what, h, backend.ErrNotExist)
	}
	return data, nil
}

// Load reads a part of a file.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	data, err := b.get(ctx, "load", h)
	if err != nil {
		return err
	}
	if length < 0 || offset < 0 {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: bad range %d+%d", h, offset, length)}
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

// Stat tells the size.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (backend.FileInfo, error) {
	data, err := b.get(ctx, "stat", h)
	return backend.FileInfo{Name: h.Name, Size: int64(len(data))}, err
}

// List lists the files that were there when it was called.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	b.mu.Lock()
	var list []backend.FileInfo
	for h, data := range b.files {
		if h.Type == t {
			list = append(list, backend.FileInfo{Name: h.Name, Size: int64(len(data))})
		}
	}
	b.mu.Unlock()
	slices.SortFunc(list, func(a, b backend.FileInfo) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) })
	for _, fi := range list {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("list %v: %w", t, err)
		}
		if err := fn(fi); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// Remove deletes a file.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	if _, err := b.get(ctx, "remove", h); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.files, h)
	return nil
}
