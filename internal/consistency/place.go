package consistency

import (
	"context"
	"io"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// Place is where a store lies: a directory, or the archives of a snapshot.
type Place interface {
	// Spaces lists the spaces in the order of their ids.
	Spaces(ctx context.Context) ([]Space, error)
	// Walk calls fn for each entry of the folder sub of a space ("" is all of it), a folder before what is
	// in it. The entry is valid until fn returns. What cannot be read is told to unreadable with its path
	// below the store's root, and the walk goes on. A folder that is not there has no entries.
	Walk(ctx context.Context, s Space, sub string, fn func(*Entry) error, unreadable func(path string, err error)) error
	// Rest does the same for what belongs to no space.
	Rest(ctx context.Context, fn func(*Entry) error, unreadable func(path string, err error)) error
}

// Space is one space of a place.
type Space struct {
	ID string
	// Root is the space's folder below the store's root.
	Root string
	tar  string // its archive, in a snapshot
}

// Entry is one entry of a store.
type Entry struct {
	Path string // below the store's root
	// Type is 'f', 'd', 'l', or '?' for all else.
	Type byte
	Link string // target of a link
	// Hard is the path of the first name of the same file, if this is a further one and the place tells.
	Hard string
	// stat gives size and mtime (seconds, nanoseconds); data the content of a small file; attrs the
	// product's attributes; open the content of a file.
	stat  func() (size, sec, nsec int64, err error)
	data  func() ([]byte, error)
	attrs func() ([]ocis.Attribute, error)
	open  func() (io.ReadCloser, error)
}

// metaLimit bounds a file that is read as a whole, in bytes; capture and verify read as much of metadata.
const metaLimit = 16 << 20
