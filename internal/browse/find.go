package browse

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Query says what to look for. What is empty is not looked at; all else must fit.
type Query struct {
	Name string // of the item, not of its folders
	// Glob is a pattern of path.Match: of the name, or of the whole path if it has a slash.
	Glob string
	// FileID is the id of an item in any of its forms: <mount id>$<space id>!<node id>, or its end.
	FileID string
	SHA1   string // hexadecimal
	// In picks spaces; nil is all.
	In func(s *SpaceInfo) bool
	// Since and Until bound the times of the snapshots; the zero time does not.
	Since, Until time.Time
	// IgnoreCase compares names and patterns without regard to case.
	IgnoreCase bool
}

// Check tells whether the query makes sense.
func (q *Query) Check() error {
	if _, err := path.Match(q.Glob, ""); err != nil {
		return errors.New("the pattern is not closed: [ begins a set of letters, \\[ is the letter itself")
	}
	if q.SHA1 != "" {
		if p, err := hex.DecodeString(q.SHA1); err != nil || len(p) != 20 {
			return errors.New("a SHA-1 has 40 hexadecimal digits")
		}
	}
	if q.Name == "" && q.Glob == "" && q.FileID == "" && q.SHA1 == "" {
		return errors.New("nothing is asked for")
	}
	return nil
}

// Match is one state of an item: a name, a content, a version, and the snapshots that have it.
type Match struct {
	Space *SpaceInfo
	Entry *Entry
	// First and Last are the first and the last snapshot in a row that have it, within the bounds of the query.
	First, Last *snapshot.Snapshot
	Snapshots   int
	// Gone is the first snapshot after Last; nil if Last is the newest.
	Gone *snapshot.Snapshot
}

// Find looks through snapshots, oldest first. present is called with each snapshot that has matches, sorted
// by kind, space and path; ended with each match when it has vanished, or in the end. Either may be nil. Memory
// follows the number of matches.
func (h *History) Find(ctx context.Context, list []*snapshot.Snapshot, q *Query, present func(sn *snapshot.Snapshot, m []*Match) error, ended func(m *Match) error) error {
	if err := q.Check(); err != nil {
		return err
	}
	if h.Warn == nil {
		h.Warn = func(error) {}
	}
	all := rows(list)
	for _, row := range all {
		f := newFinder(q)
		err := h.walk(ctx, row, f, func(sn *snapshot.Snapshot) error {
			in := (q.Since.IsZero() || !sn.Time.Before(q.Since)) && (q.Until.IsZero() || !sn.Time.After(q.Until))
			for _, m := range f.closed {
				if m.Snapshots == 0 {
					continue // it was there outside the bounds only
				}
				if in || q.Until.IsZero() {
					m.Gone = sn
				}
				if ended != nil {
					if err := ended(m); err != nil {
						return err
					}
				}
			}
			f.closed = f.closed[:0]
			if !in || len(f.open) == 0 {
				return nil
			}
			sorted := f.sort()
			for _, m := range sorted {
				if m.First == nil {
					m.First = sn
				}
				m.Last = sn
				m.Snapshots++
			}
			if present != nil {
				return present(sn, sorted)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if ended != nil {
			for _, m := range f.sort() {
				if m.Snapshots == 0 {
					continue
				}
				if err := ended(m); err != nil {
					return err
				}
			}
		}
	}
	h.prune(all)
	return nil
}

// place names a state of an item: at most one can be there at a time.
type place struct {
	space       *SpaceInfo
	kind        Kind
	path, stamp string
}

// finder is the visitor that keeps what fits.
type finder struct {
	q      *Query
	name   []byte
	nodeID []byte
	in     []byte // the space of the file id
	sha1   []byte
	spaces map[string]*SpaceInfo // by store and id
	now    *SpaceInfo
	wanted bool // now is a space to look into
	open   map[place]*Match
	order  []*Match // open, sorted; nil: to be sorted again
	closed []*Match
}

func newFinder(q *Query) *finder {
	f := &finder{q: q, spaces: map[string]*SpaceInfo{}, open: map[place]*Match{}, sha1: []byte(strings.ToLower(q.SHA1)), name: []byte(q.Name)}
	id := q.FileID
	if _, rest, ok := strings.Cut(id, "$"); ok {
		id = rest
	}
	if in, node, ok := strings.Cut(id, "!"); ok {
		f.in, id = []byte(in), node
	}
	f.nodeID = []byte(id)
	return f
}

func (f *finder) space(s *SpaceInfo, gone bool) {
	key := s.Store + "/" + s.ID
	have := f.spaces[key]
	switch {
	case have == nil:
		have = s
		f.spaces[key] = have
	case *have != *s: // renamed: what was there is there now under another name
		f.spaces[key] = s
		for p, m := range f.open {
			if p.space != have {
				continue
			}
			delete(f.open, p)
			f.closed = append(f.closed, m)
			p.space = s
			f.open[p] = &Match{Space: s, Entry: m.Entry}
			f.order = nil
		}
		have = s
	}
	f.now = have
	f.wanted = (f.q.In == nil || f.q.In(have)) && (f.in == nil || string(f.in) == have.ID)
	if gone {
		delete(f.spaces, key)
	}
}

func (f *finder) fits(e *rawEntry) bool {
	if !f.wanted || f.now == nil {
		return false
	}
	q := f.q
	if len(f.nodeID) > 0 && string(f.nodeID) != string(e.nodeID) || len(f.sha1) > 0 && string(f.sha1) != string(e.sha1) {
		return false
	}
	if q.Name == "" && q.Glob == "" {
		return true
	}
	name := e.path
	for i := len(name) - 1; i >= 0; i-- {
		if name[i] == '/' {
			name = name[i+1:]
			break
		}
	}
	if q.Name != "" {
		if q.IgnoreCase {
			if !strings.EqualFold(string(name), q.Name) {
				return false
			}
		} else if string(name) != q.Name {
			return false
		}
	}
	if q.Glob != "" {
		pattern, text := q.Glob, string(name)
		if strings.Contains(pattern, "/") {
			text = string(e.path)
		}
		if q.IgnoreCase {
			pattern, text = strings.ToLower(pattern), strings.ToLower(text)
		}
		ok, err := path.Match(pattern, text)
		return ok && err == nil
	}
	return true
}

func (f *finder) came(e *rawEntry) {
	if !f.fits(e) {
		return
	}
	m := &Match{Space: f.now, Entry: e.entry()}
	f.open[place{f.now, m.Entry.Kind, m.Entry.Path, m.Entry.Stamp}] = m
	f.order = nil
}

func (f *finder) went(e *rawEntry) {
	if len(f.open) == 0 || !f.wanted {
		return
	}
	p := place{f.now, e.kind, string(e.path), string(e.stamp)}
	if m := f.open[p]; m != nil {
		f.closed = append(f.closed, m)
		delete(f.open, p)
		f.order = nil
	}
}

// sort returns what is there now.
func (f *finder) sort() []*Match {
	if f.order == nil {
		f.order = make([]*Match, 0, len(f.open))
		for _, m := range f.open {
			f.order = append(f.order, m)
		}
		slices.SortFunc(f.order, func(a, b *Match) int {
			return cmp.Or(strings.Compare(a.Space.Folder, b.Space.Folder), slices.Index(kindCodes, a.Entry.Kind)-slices.Index(kindCodes, b.Entry.Kind),
				strings.Compare(a.Entry.Path, b.Entry.Path), strings.Compare(a.Entry.Stamp, b.Entry.Stamp))
		})
	}
	return f.order
}
