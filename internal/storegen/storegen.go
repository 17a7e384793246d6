// Package storegen makes instances of any size for tests and benchmarks: a base data path with every
// data set and a configuration directory, laid out as a server would have. Everything follows from
// the seed: two runs with the same options give equal trees. Start with Generate, then Mutate.
package storegen

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// Options say what to make. Zero values take the defaults named.
type Options struct {
	Dir  string // becomes the parent of data/ and config/; must be missing or empty
	Seed uint64
	// Files is the number of users' files, those in the trash included.
	Files int
	// Bytes is the size of all users' blobs together: files, revisions and trash. 0: 64 KiB a file.
	Bytes int64
	// Spaces is the number of users' spaces; about two of three are personal. 0: one for 500 files,
	// at least 4.
	Spaces int
	// Prefix of attribute names: ocis.PrefixOCIS or ocis.PrefixOpenCloud, which is the default. It
	// decides about the product's names too: ocis.yaml and idm/ocis.boltdb, or opencloud.yaml and
	// idm/idm.boltdb.
	Prefix string
	// Fractions of the files. 0 takes the default, a negative number is none.
	Revisions float64 // that were overwritten at least once; 0.12
	Trash     float64 // that are in the trash; 0.04
	Empty     float64 // that have no content; 0.02
	// Even gives all contents one size, and none can be compressed, is a copy of another or still in uploads/.
	Even    bool
	Workers int // 0: two for each processor
	// Progress is called now and then from one goroutine, with the files done.
	Progress func(done, total int) `json:"-"`
}

// Summary counts what was made.
type Summary struct {
	Files       int   `json:"files"`
	Folders     int   `json:"folders"` // without the spaces' roots
	Spaces      int   `json:"spaces"`
	Revisions   int   `json:"revisions"`
	Trashed     int   `json:"trashed"` // files that are in the trash, alone or below a folder
	Blobs       int   `json:"blobs"`   // of users' spaces
	BlobBytes   int64 `json:"blob_bytes"`
	Orphans     int   `json:"orphans"` // blobs of the system storage that nothing names
	InFlight    int   `json:"in_flight"`
	Entries     int64 `json:"entries"`      // filesystem entries below data/ and config/, both included
	UserEntries int64 `json:"user_entries"` // of these, below storage/users/spaces
	// FilesPerSpace is by space id: Mutate draws by it.
	FilesPerSpace map[string]int `json:"files_per_space"`
	Seconds       float64        `json:"seconds"`
}

// RecordName is the file beside data/ and config/ that says what was made.
const RecordName = "storegen.json"

// Record is the content of the record file.
type Record struct {
	Options Options `json:"options"`
	Summary Summary `json:"summary"`
	// Mutations is how often Mutate ran.
	Mutations int `json:"mutations"`
}

// ReadRecord reads the record of a generated instance.
func ReadRecord(dir string) (*Record, error) {
	data, err := os.ReadFile(filepath.Join(dir, RecordName))
	if err != nil {
		return nil, err
	}
	r := new(Record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("%s in %s is damaged: %w", RecordName, dir, err)
	}
	return r, nil
}

func writeRecord(dir string, r *Record) error {
	data, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, RecordName), append(data, '\n'), 0o644)
}

func (o *Options) fill() error {
	switch {
	case o.Dir == "":
		return errors.New("no directory to generate into")
	case o.Files < 1:
		return fmt.Errorf("cannot generate %d files: at least one is needed", o.Files)
	case o.Bytes < 0 || o.Spaces < 0:
		return errors.New("sizes and numbers cannot be negative")
	}
	if o.Bytes == 0 {
		o.Bytes = int64(o.Files) * 64 << 10
	}
	if o.Spaces == 0 {
		o.Spaces = max(4, o.Files/500)
	}
	switch o.Prefix {
	case "":
		o.Prefix = ocis.PrefixOpenCloud
	case ocis.PrefixOCIS, ocis.PrefixOpenCloud:
	default:
		return fmt.Errorf("attribute prefix %q is neither %q nor %q", o.Prefix, ocis.PrefixOCIS, ocis.PrefixOpenCloud)
	}
	for _, f := range []struct {
		value *float64
		def   float64
	}{{&o.Revisions, 0.12}, {&o.Trash, 0.04}, {&o.Empty, 0.02}} {
		switch {
		case *f.value == 0:
			*f.value = f.def
		case *f.value < 0:
			*f.value = 0
		case *f.value > 1:
			return fmt.Errorf("fraction %v is above 1", *f.value)
		}
	}
	if o.Workers <= 0 {
		o.Workers = 2 * cpus.Count()
	}
	return nil
}

// Generate makes an instance.
func Generate(ctx context.Context, o Options) (*Summary, error) {
	start := time.Now()
	asked := o
	if err := o.fill(); err != nil {
		return nil, err
	}
	if list, err := os.ReadDir(o.Dir); err == nil && len(list) > 0 {
		return nil, fmt.Errorf("%s is not empty: generate into an empty directory", o.Dir)
	}
	p := newPlan(o)
	w := &writer{plan: p, data: filepath.Join(o.Dir, "data"), config: filepath.Join(o.Dir, "config")}
	if err := w.run(ctx); err != nil {
		return nil, fmt.Errorf("generate an instance in %s: %w", o.Dir, err)
	}
	s := p.summary()
	s.Orphans, s.Entries, s.UserEntries = w.orphans, w.entries, w.userEntries
	s.Seconds = time.Since(start).Seconds()
	asked.Dir = ""
	if err := writeRecord(o.Dir, &Record{Options: asked, Summary: *s}); err != nil {
		return nil, err
	}
	return s, nil
}
