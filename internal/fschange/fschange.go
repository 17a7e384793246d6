// Package fschange tells what was changed below a directory since an earlier moment, from the lists that
// the file system itself keeps, so that what was not changed need not be looked at again.
//
// Start at [Since]. It is exact or it refuses: whatever is not in a list is what it was at the moment of
// the mark, in content, attributes, name and place.
package fschange

import (
	"errors"
	"strings"
)

// A Mark is a moment in the life of a directory, in words that only this package understands; "" is none.
// It can be kept on disk.
type Mark string

// ErrNoMark is returned where there is no mark to begin at.
var ErrNoMark = errors.New("no earlier state is known")

// ErrNoList is returned for a file system that keeps no list of changes.
var ErrNoList = errors.New("its file system keeps no list of changes that holdfast knows")

// listMost bounds the memory of a list: some 250 bytes for each. So many changes are found as well by looking.
const listMost = 200_000

// A List has the paths below a directory that were changed since a mark. It is safe for concurrent use.
type List struct {
	changed map[string]bool     // true: a directory that came to its place, with all that is in it
	above   map[string]struct{} // the directories above those
}

func newList() *List {
	return &List{changed: map[string]bool{}, above: map[string]struct{}{}}
}

// add takes in a path. Its bytes are kept.
func (l *List) add(rel string, arrived bool) {
	l.changed[rel] = l.changed[rel] || arrived
	for dir := rel; ; {
		i := strings.LastIndexByte(dir, '/')
		if i < 0 {
			return
		}
		dir = dir[:i]
		if _, ok := l.above[dir]; ok {
			return
		}
		l.above[dir] = struct{}{}
	}
}

// Len returns the number of paths.
func (l *List) Len() int { return len(l.changed) }

// Changed reports whether the entry at rel, a path below the directory, was changed, made or renamed. An
// entry was added to or taken from no directory that was not changed. It tells nothing of what is below
// a directory that has arrived.
func (l *List) Changed(rel string) bool {
	_, ok := l.changed[rel]
	return ok
}

// Arrived reports whether rel is a directory that was made or renamed. What is below it may be unchanged
// as such, but was not there.
func (l *List) Arrived(rel string) bool { return l.changed[rel] }

// Moved reports whether rel, or a directory above it, has arrived.
func (l *List) Moved(rel string) bool {
	for {
		if l.changed[rel] {
			return true
		}
		i := strings.LastIndexByte(rel, '/')
		if i < 0 {
			return false
		}
		rel = rel[:i]
	}
}

// Touched reports whether anything at rel or below it may have been changed.
func (l *List) Touched(rel string) bool {
	_, above := l.above[rel]
	return above || l.Changed(rel) || l.Moved(rel)
}
