package fssnap

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/internal/statedir"
)

// recordVersion is the version of the record on disk. A record of another version is left alone.
const recordVersion = 1

// record says which views a set has or is about to make. It is on disk before the first view is.
type record struct {
	Version int       `json:"version"`
	Name    string    `json:"name"`
	Label   string    `json:"label,omitempty"`
	MadeAt  time.Time `json:"made_at"`
	PID     int       `json:"pid"` // for people; the lock tells whether the owner lives
	Kept    bool      `json:"kept,omitempty"`
	// Note is for whoever keeps the views.
	Note    json.RawMessage `json:"note,omitempty"`
	Parts   []part          `json:"parts"`
	Sources []Source        `json:"sources"`
	Views   []View          `json:"views"` // empty until all are made; in the order of Sources
}

// recordFiles names the files of one set.
type recordFiles struct{ dir, name string }

func (f recordFiles) record() string { return filepath.Join(f.dir, f.name+".json") }
func (f recordFiles) lock() string   { return filepath.Join(f.dir, f.name+".lock") }

// openRecords makes the directory.
func openRecords(stateDir, name string) (recordFiles, error) {
	dir, err := statedir.Make(stateDir, viewsSub)
	if err != nil {
		return recordFiles{}, fmt.Errorf("no views are made: %w", err)
	}
	return recordFiles{dir, name}, nil
}

// acquire takes the lock that tells others that the owner of the set lives.
//
// Errors: statedir.ErrLocked.
func (f recordFiles) acquire() (*os.File, error) { return statedir.Lock(f.lock()) }

// live tells whether the owner of the set lives.
func (f recordFiles) live() bool {
	if _, err := os.Lstat(f.lock()); err != nil {
		return false
	}
	l, err := f.acquire()
	if err != nil {
		return errors.Is(err, statedir.ErrLocked)
	}
	l.Close()
	return false
}

// write puts the record on disk for good, or leaves what was there.
func (f recordFiles) write(r record) error { return statedir.Write(f.record(), r) }

func (f recordFiles) read() (record, error) {
	data, err := os.ReadFile(f.record())
	if err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, fmt.Errorf("the record %s cannot be read: %w; if no backup is running, remove the views by hand and then this file", f.record(), err)
	}
	if r.Version != recordVersion || r.Name != f.name {
		return record{}, fmt.Errorf("the record %s is of version %d, which this holdfast does not know; use the version that made it", f.record(), r.Version)
	}
	return r, nil
}

// remove takes the record away, and the lock file last.
func (f recordFiles) remove() error { return statedir.Remove(f.record(), f.lock()) }

// listRecords returns the files of all sets on record, the oldest first. A lock without a record is of
// a run that was killed before it made any view.
func listRecords(stateDir string) ([]recordFiles, error) {
	dir, names, err := statedir.Names(stateDir, viewsSub, ".json", ".lock")
	if err != nil {
		return nil, fmt.Errorf("look for views on record: %w", err)
	}
	var list []recordFiles
	for _, name := range names {
		if _, valid := ParseName(name); valid {
			list = append(list, recordFiles{dir, name})
		}
	}
	return list, nil
}
