// Package backend says where the files of a repository lie. Drivers (local, mem) implement
// [Backend]; wrappers (retry, fault) add one thing each. The layout is restic's: one flat name
// space per file type.
package backend

import (
	"context"
	"errors"
	"io"
)

// FileType is one of the six kinds of repository file.
type FileType uint8

// The kinds of repository file. Config has a single file without a name.
const (
	ConfigFile FileType = iota + 1
	KeyFile
	LockFile
	SnapshotFile
	IndexFile
	PackFile
)

// Dir returns the directory of the layout that holds files of type t ("" for the config).
func (t FileType) Dir() string {
	switch t {
	case KeyFile:
		return "keys"
	case LockFile:
		return "locks"
	case SnapshotFile:
		return "snapshots"
	case IndexFile:
		return "index"
	case PackFile:
		return "data"
	}
	return ""
}

func (t FileType) String() string {
	if t == ConfigFile {
		return "config"
	}
	return t.Dir()
}

// Handle names one file. Name is 64 lower-case hexadecimal digits, and empty for the config.
type Handle struct {
	Type FileType
	Name string
}

func (h Handle) String() string {
	if h.Type == ConfigFile {
		return "config"
	}
	return h.Type.String() + "/" + h.Name
}

// FileInfo is what Stat and List tell of a file. Size is in bytes.
type FileInfo struct {
	Name string
	Size int64
}

// ErrNotExist is returned (wrapped) when the named file is not there. ErrExist is returned by Save
// when a file of that name is there already; nothing was written then.
var (
	ErrNotExist = errors.New("file does not exist in the repository")
	ErrExist    = errors.New("file exists in the repository already")
)

// PermanentError marks an error that no retry can cure (no space, no permission, read-only).
type PermanentError struct{ Err error }

func (e *PermanentError) Error() string { return e.Err.Error() }
func (e *PermanentError) Unwrap() error { return e.Err }

// Backend stores whole files under content names. A file is visible either completely or not at
// all, and once Save has returned nil it survives a power cut. All methods may be called
// concurrently, and return soon after ctx is done. A cancelled Save leaves no file of that name.
type Backend interface {
	// Location names the place for messages, without secrets.
	Location() string
	// Save stores data under h. Errors: ErrExist; *PermanentError, e.g. when the disk is full.
	Save(ctx context.Context, h Handle, data []byte) error
	// Load hands fn a reader of length bytes from offset (length 0: to the end of the file).
	// fn may be called again after an error, each time with a fresh reader.
	// Fewer bytes than asked for is an error. Errors: ErrNotExist.
	Load(ctx context.Context, h Handle, length int, offset int64, fn func(io.Reader) error) error
	// Stat tells the size. Errors: ErrNotExist.
	Stat(ctx context.Context, h Handle) (FileInfo, error)
	// List calls fn for each file of type t, in no particular order. Names that are not
	// 64 hexadecimal digits are passed over. An empty or missing directory is no error.
	List(ctx context.Context, t FileType, fn func(FileInfo) error) error
	// Remove deletes h. Errors: ErrNotExist.
	Remove(ctx context.Context, h Handle) error
	// Create prepares an empty place (directories, bucket) for a new repository.
	Create(ctx context.Context) error
	Close() error
}
