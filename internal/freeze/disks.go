package freeze

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// disk is where a path of the instance was mounted when it was stopped. After a restart of the machine
// a disk may not be there yet: its instance must neither be given up nor be started on an empty folder.
type disk struct {
	Path   Text   `json:"path"` // the first one that lies there
	Point  Text   `json:"mount_point"`
	Type   string `json:"filesystem"`
	Source Text   `json:"source"` // device, dataset or export
}

// disksOf notes the mounts on which paths lie. The root filesystem is left out: who reads the record
// runs on it.
func disksOf(paths []string) []disk {
	table, err := mountinfo.Self()
	if err != nil {
		return nil // then it is as if there were no record of them
	}
	var out []disk
	for _, p := range paths {
		if real, err := filepath.EvalSymlinks(p); err == nil {
			p = real
		}
		m, ok := table.Find(p)
		if !ok || m.Point == "/" || slices.ContainsFunc(out, func(d disk) bool { return string(d.Point) == m.Point }) {
			continue
		}
		out = append(out, disk{Path: Text(p), Point: Text(m.Point), Type: m.Type, Source: Text(m.Source)})
	}
	return out
}

// unmountedError says that a disk of the instance is not mounted.
type unmountedError struct {
	base Text
	disk
	record string
}

func (e *unmountedError) Error() string {
	return fmt.Sprintf("the instance at %s is stopped, by an earlier backup, and is not started, because %s is missing or empty and its disk is not mounted: %s (%s) at %s; it is on record in %s",
		e.base, e.Path, e.Source, e.Type, e.Point, e.record)
}

// Is makes it an ErrNotStarted.
func (e *unmountedError) Is(target error) bool { return target == ErrNotStarted }

// Hints says what to do next.
func (e *unmountedError) Hints() []string {
	return []string{
		fmt.Sprintf("Mount %s, then run `holdfast thaw`.", e.Point),
		"`holdfast thaw --forget` removes the record if there is no such instance any more.",
	}
}

// disksMounted makes sure that what was mounted when the instance was stopped is mounted now. A path
// that has something in it is believed whatever it lies on: it may have moved.
//
// Errors: *unmountedError.
func (s state) disksMounted(record string) error {
	var table mountinfo.Table
	for _, d := range s.Disks {
		if !missingOrEmpty(string(d.Path)) {
			continue
		}
		if table == nil {
			var err error
			if table, err = mountinfo.Self(); err != nil {
				return fmt.Errorf("read the mount table: %w", err)
			}
		}
		if !slices.ContainsFunc(table, func(m mountinfo.Mount) bool {
			return m.Point == string(d.Point) && m.Type == d.Type && m.Source == string(d.Source)
		}) {
			return &unmountedError{base: s.BasePath, disk: d, record: record}
		}
	}
	return nil
}

func missingOrEmpty(path string) bool {
	list, err := os.ReadDir(path)
	return errors.Is(err, fs.ErrNotExist) || err == nil && len(list) == 0
}
