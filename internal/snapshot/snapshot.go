package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"sort"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// Tag marks the snapshots that Holdfast made.
const Tag = "holdfast"

// Snapshot is one snapshot record, in restic's JSON.
type Snapshot struct {
	Time           time.Time `json:"time"`
	Parent         *id.ID    `json:"parent,omitempty"`
	Tree           *id.ID    `json:"tree"`
	Paths          []string  `json:"paths"`
	Hostname       string    `json:"hostname,omitempty"`
	Username       string    `json:"username,omitempty"`
	UID            uint32    `json:"uid,omitempty"`
	GID            uint32    `json:"gid,omitempty"`
	Excludes       []string  `json:"excludes,omitempty"`
	Tags           []string  `json:"tags,omitempty"`
	Original       *id.ID    `json:"original,omitempty"`
	ProgramVersion string    `json:"program_version,omitempty"`
	Summary        *Summary  `json:"summary,omitempty"`

	id id.ID
}

// Summary is restic's record of a backup's figures. Sizes are bytes.
type Summary struct {
	BackupStart         time.Time `json:"backup_start"`
	BackupEnd           time.Time `json:"backup_end"`
	FilesNew            uint      `json:"files_new"`
	FilesChanged        uint      `json:"files_changed"`
	FilesUnmodified     uint      `json:"files_unmodified"`
	DirsNew             uint      `json:"dirs_new"`
	DirsChanged         uint      `json:"dirs_changed"`
	DirsUnmodified      uint      `json:"dirs_unmodified"`
	DataBlobs           int       `json:"data_blobs"`
	TreeBlobs           int       `json:"tree_blobs"`
	DataAdded           uint64    `json:"data_added"`
	DataAddedPacked     uint64    `json:"data_added_packed"`
	TotalFilesProcessed uint      `json:"total_files_processed"`
	TotalBytesProcessed uint64    `json:"total_bytes_processed"`
}

// ID is the name of the record in the repository; null before it was saved.
func (s *Snapshot) ID() id.ID { return s.id }

// HasTag reports whether s bears tag.
func (s *Snapshot) HasTag(tag string) bool {
	for _, t := range s.Tags {
		if t == tag {
			return true
		}
	}
	return false
}

// Files is what this package needs of a repository.
type Files interface {
	ListFiles(ctx context.Context, t backend.FileType, fn func(id id.ID, size int64) error) error
	LoadUnpacked(ctx context.Context, t backend.FileType, d id.ID) ([]byte, error)
	SaveUnpacked(ctx context.Context, t backend.FileType, plain []byte) (id.ID, error)
}

// Save writes s, the last step of a backup: from then on it is visible.
func Save(ctx context.Context, st Files, s *Snapshot) error {
	if s.Tree == nil || s.Tree.IsNull() {
		return errors.New("save snapshot: it has no tree") // such a record makes other programs crash
	}
	p, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	d, err := st.SaveUnpacked(ctx, backend.SnapshotFile, p)
	if err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	s.id = d
	return nil
}

// Load reads the snapshot called d.
func Load(ctx context.Context, st Files, d id.ID) (*Snapshot, error) {
	p, err := st.LoadUnpacked(ctx, backend.SnapshotFile, d)
	if err != nil {
		return nil, fmt.Errorf("load snapshot %s: %w", d.Short(), err)
	}
	s := &Snapshot{id: d}
	if err := json.Unmarshal(p, s); err != nil {
		return nil, fmt.Errorf("load snapshot %s: %w", d.Short(), err)
	}
	return s, nil
}

// List returns all snapshots, oldest first. Records that cannot be read are returned joined in err
// beside those that can, because one damaged record must not hide the others.
func List(ctx context.Context, st Files) (list []*Snapshot, err error) {
	var ids []id.ID
	if err := st.ListFiles(ctx, backend.SnapshotFile, func(d id.ID, _ int64) error {
		ids = append(ids, d)
		return nil
	}); err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var errs []error
	for _, d := range ids {
		s, err := Load(ctx, st, d)
		if err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			errs = append(errs, err)
			continue
		}
		list = append(list, s)
	}
	sort.Slice(list, func(i, j int) bool {
		if !list[i].Time.Equal(list[j].Time) {
			return list[i].Time.Before(list[j].Time)
		}
		return list[i].id.String() < list[j].id.String()
	})
	return list, errors.Join(errs...)
}

// NotFoundError is returned by Find.
type NotFoundError struct {
	What  string // what was asked for
	Count int    // how many match; 0 is none
}

func (e *NotFoundError) Error() string {
	if e.Count > 1 {
		return fmt.Sprintf("snapshot %q is ambiguous: %d snapshots match", e.What, e.Count)
	}
	return fmt.Sprintf("snapshot %q not found", e.What)
}

// Hints says what to do next.
func (e *NotFoundError) Hints() []string {
	return []string{"`holdfast snapshots` lists what the repository holds."}
}

// Find picks the snapshot that what names: "latest" (the newest of Holdfast's own; of any program
// if it made none), "latest~N" (the Nth before it), a time (the last one that was there then; see ParseTime),
// or an id or its unique beginning.
//
// Errors: *NotFoundError.
func Find(list []*Snapshot, what string) (*Snapshot, error) {
	if rest, ok := strings.CutPrefix(what, "latest"); ok {
		n := 0
		if rest != "" {
			if _, err := fmt.Sscanf(rest, "~%d", &n); err != nil || n < 0 {
				return nil, &NotFoundError{What: what}
			}
		}
		own := Own(list)
		if len(own) == 0 {
			own = list
		}
		if n >= len(own) {
			return nil, &NotFoundError{What: what}
		}
		return own[len(own)-1-n], nil
	}
	if t, ok := ParseTime(what, time.Local); ok {
		own := Own(list)
		if len(own) == 0 {
			own = list
		}
		for i := len(own) - 1; i >= 0; i-- {
			if !own[i].Time.After(t) {
				return own[i], nil
			}
		}
		return nil, &NotFoundError{What: what}
	}
	var found *Snapshot
	count := 0
	for _, s := range list {
		if what != "" && strings.HasPrefix(s.id.String(), strings.ToLower(what)) {
			found = s
			count++
		}
	}
	if count != 1 {
		return nil, &NotFoundError{What: what, Count: count}
	}
	return found, nil
}

// Own returns the snapshots that Holdfast made, in the order of list.
func Own(list []*Snapshot) []*Snapshot {
	var own []*Snapshot
	for _, s := range list {
		if s.HasTag(Tag) {
			own = append(own, s)
		}
	}
	return own
}

// timeForm matches what ParseTime reads, at the beginning of a text. Its colons separate nothing else.
var timeForm = regexp.MustCompile(`^[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[ T_][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,9})?)?(?:Z|[+-][0-9]{2}:[0-9]{2})?)?`)

// ParseTime reads a time as people write it: "2026-11-20 14:00", with seconds and a zone if wanted, with T in
// the place of the blank. Without a zone it is in loc. A day alone means its end,
// and a second its end too, because lists show whole seconds.
func ParseTime(s string, loc *time.Location) (time.Time, bool) {
	if len(timeForm.FindString(s)) != len(s) || s == "" {
		return time.Time{}, false
	}
	s = strings.NewReplacer(" ", "T", "_", "T").Replace(s)
	for _, layout := range []string{"2006-01-02T15:04:05Z07:00", "2006-01-02T15:04:05", "2006-01-02T15:04Z07:00", "2006-01-02T15:04"} {
		t, err := time.ParseInLocation(layout, s, loc) // takes a fraction of seconds with any layout that has them
		if err != nil {
			continue
		}
		if strings.Contains(layout, ":05") && !strings.Contains(s, ".") {
			t = t.Add(time.Second - 1)
		}
		return t, true
	}
	if t, err := time.ParseInLocation(time.DateOnly, s, loc); err == nil {
		return t.AddDate(0, 0, 1).Add(-1), true
	}
	return time.Time{}, false
}

// SplitAddress cuts "SNAPSHOT:REST" at the colon that ends the snapshot, which may be a time.
func SplitAddress(arg string) (what, rest string, found bool) {
	n := len(timeForm.FindString(arg))
	if n < len(arg) && n > 0 && arg[n] != ':' {
		n = 0
	}
	what, rest, found = strings.Cut(arg[n:], ":")
	return arg[:n] + what, rest, found
}

// Split is SplitAddress with a path of the snapshot as the rest; it is "/" if there is none.
func Split(arg string) (what, p string) {
	what, p, _ = SplitAddress(arg)
	return what, path.Clean("/" + p)
}
