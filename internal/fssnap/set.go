package fssnap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/statedir"
)

// Options are those of a Set. The zero value works.
type Options struct {
	// StateDir is where the record is kept, in views/ below it; "" is statedir.Default.
	StateDir string
	// Label tells the sets of one instance from those of others; KeepLast counts per label.
	Label string
	// KeepLast is how many sets of this label Close leaves on the filesystems, this one included.
	KeepLast int
	// Except are places that the set has nothing to do with: what is mounted there, or below, is not held
	// still, and does not keep a path around it from being held still. Paths below them are none the less.
	Except []string
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// part is a path and the piece of a filesystem it lies on.
type part struct {
	// Path as it was given, clean and absolute; Real is the same without symbolic links.
	Path string `json:"path"`
	Real string `json:"real"`
	// Rel is its place below the top of the source, which is Source in the set's list, -1 if the path
	// is not covered.
	Rel    string `json:"rel,omitempty"`
	Source int    `json:"source"`
	// Nested: it was not asked for, but is mounted below a path that was.
	Nested bool   `json:"nested,omitempty"`
	Why    string `json:"why,omitempty"`
	err    error
	mount  int // its number, 0 if unknown
}

func (p part) covered() bool { return p.Source >= 0 }

// Uncovered is a path that no driver can hold still.
type Uncovered struct {
	Path   string
	Reason error
}

func (u Uncovered) String() string { return u.Path + ": " + u.Reason.Error() }

// A Set is the still views of all paths of an instance, made together. It is for one goroutine.
type Set struct {
	name    string
	drivers []Driver
	o       Options
	parts   []part
	sources []Source
	views   []View // as sources, once made

	started time.Time // just before the first view was made
	except  []string  // without symbolic links
	note    json.RawMessage
	files   recordFiles
	lock    *os.File
	opened  bool // by OpenKept
	mounts  []string
	closed  bool
}

// NewSet finds out which drivers can hold the paths still, and makes nothing. What is mounted below a
// path counts as a path of its own. Paths that do not exist, or lie on filesystems that no driver
// knows, are in Uncovered. The first driver that supports a path takes it.
//
// Errors: ctx; a mount table that cannot be read.
func NewSet(ctx context.Context, drivers []Driver, paths []string, o Options) (*Set, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &Set{drivers: drivers, o: o}
	for _, p := range o.Except {
		if real, err := filepath.EvalSymlinks(p); err == nil {
			p = real
		}
		s.except = append(s.except, p)
	}
	// Outer ones first: what lies below one of them, on the same mount, is in its picture.
	paths = slices.Clone(paths)
	slices.SortStableFunc(paths, func(a, b string) int { return len(a) - len(b) })
	for _, p := range paths {
		if err := s.add(ctx, p); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *Set) add(ctx context.Context, path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(s.parts, func(p part) bool { return p.Path == path }) {
		return nil
	}
	table, err := mountinfo.Self()
	if err != nil {
		return fmt.Errorf("read the mount table: %w", err)
	}
	at, err := locate(table, path)
	if err != nil {
		s.parts = append(s.parts, part{Path: path, Real: path, Source: -1, err: err})
		return nil
	}
	if err := s.probe(ctx, path, at.Path, at.Mount.ID, false); err != nil {
		return err
	}
	for _, m := range MountsBelow(table, at.Path) {
		// It may have been added below another path, or be a path itself.
		if slices.ContainsFunc(s.parts, func(p part) bool { return p.Real == m.Point }) || s.excepted(m.Point, at.Path) {
			continue
		}
		if err := s.probe(ctx, m.Point, m.Point, m.ID, true); err != nil {
			return err
		}
	}
	return nil
}

// excepted tells whether what is mounted at point, below path, lies in an exception further in.
func (s *Set) excepted(point, path string) bool {
	return slices.ContainsFunc(s.except, func(e string) bool { return e != path && mountinfo.Below(e, path) && mountinfo.Below(point, e) })
}

func (s *Set) probe(ctx context.Context, path, real string, mount int, nested bool) error {
	p := part{Path: path, Real: real, Source: -1, Nested: nested, mount: mount}
	for _, o := range s.parts {
		if o.covered() && o.mount == mount && mountinfo.Below(real, o.Real) {
			p.Source, p.Rel = o.Source, filepath.Join(o.Rel, rel(real, o.Real))
			s.parts = append(s.parts, p)
			return nil
		}
	}
	var reasons []error
	for _, d := range s.drivers {
		src, err := d.Probe(ctx, real)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			reasons = append(reasons, fmt.Errorf("%s: %w", d.Kind(), err))
			continue
		}
		p.Rel = src.Rel
		p.Source = slices.IndexFunc(s.sources, func(o Source) bool { return o.Kind == src.Kind && o.Name == src.Name })
		if p.Source < 0 {
			p.Source = len(s.sources)
			s.sources = append(s.sources, src)
		}
		have := &s.sources[p.Source]
		if !slices.Contains(have.Paths, real) {
			have.Paths = append(have.Paths, real)
		}
		break
	}
	if !p.covered() {
		p.err = Unsupported("no driver is given")
		if len(reasons) > 0 {
			p.err = oneOf(reasons)
		}
	}
	s.parts = append(s.parts, p)
	return nil
}

// oneOf picks what is worth reading: a driver that objects to more than the kind of filesystem.
func oneOf(reasons []error) error {
	var real []error
	for _, err := range reasons {
		var other *OtherFilesystem
		if !errors.As(err, &other) {
			real = append(real, err)
		}
	}
	if len(real) == 0 {
		return errors.Unwrap(reasons[0])
	}
	return errors.Join(real...)
}

// OtherFilesystem is the ErrNotSupported of a driver that is for another kind of filesystem.
type OtherFilesystem struct {
	Path, Filesystem string
}

func (e *OtherFilesystem) Error() string {
	return fmt.Sprintf("%s lies on %s, which has no snapshots that holdfast knows", e.Path, e.Filesystem)
}

// Is makes it an ErrNotSupported.
func (e *OtherFilesystem) Is(target error) bool { return target == ErrNotSupported }

// Name returns the name of the set, "" before Create.
func (s *Set) Name() string { return s.name }

// Empty tells whether there is nothing that could be held still.
func (s *Set) Empty() bool { return len(s.sources) == 0 }

// Sources returns what the set holds still.
func (s *Set) Sources() []Source { return slices.Clone(s.sources) }

// Uncovered returns the paths that have no view, among them what is mounted below a path.
func (s *Set) Uncovered() []Uncovered {
	var list []Uncovered
	for _, p := range s.parts {
		if !p.covered() {
			list = append(list, Uncovered{p.Path, p.reason()})
		}
	}
	return list
}

func (p part) reason() error {
	if p.err == nil {
		return errors.New(p.Why)
	}
	return p.err
}

// Views returns the views that were made, one for each source.
func (s *Set) Views() []View { return slices.Clone(s.views) }

// OneInstant tells whether the views are of the very same instant, but for those of the paths in except
// and of what lies below them. If not, they are a picture of one instant only if nothing was written
// while they were made.
func (s *Set) OneInstant(except ...string) bool {
	var first *View
	for _, p := range s.parts {
		if !p.covered() || p.Source >= len(s.views) {
			continue
		}
		if slices.ContainsFunc(except, func(e string) bool { return mountinfo.Below(p.Path, e) || mountinfo.Below(p.Real, e) }) {
			continue
		}
		v := &s.views[p.Source]
		switch {
		case first == nil:
			first = v
		case v == first:
		case v.Transaction == "" || v.Transaction != first.Transaction || v.Kind != first.Kind:
			return false
		}
	}
	return first != nil && first.Transaction != ""
}

func (s *Set) driver(kind string) (Driver, error) {
	for _, d := range s.drivers {
		if d.Kind() == kind {
			return d, nil
		}
	}
	return nil, fmt.Errorf("no driver for views of kind %s is configured", kind)
}

// Create makes all the views. A record is on disk before the first of them is made. When it fails, no
// view is left, or the error says which.
func (s *Set) Create(ctx context.Context) (err error) {
	switch {
	case s.closed || s.name != "":
		return errors.New("a set of views is made once")
	case s.Empty():
		return Unsupported("none of the paths lies on a filesystem with snapshots")
	}
	s.name = NewName(s.o.Now())
	if s.files, err = openRecords(s.o.StateDir, s.name); err != nil {
		return err
	}
	if s.lock, err = s.files.acquire(); err != nil {
		return fmt.Errorf("no views are made: %w", err)
	}
	defer func() {
		if err != nil {
			s.o.KeepLast = 0
			err = errors.Join(err, s.Close(ctx))
		}
	}()
	s.started = time.Now()
	if err = s.files.write(s.record()); err != nil {
		return fmt.Errorf("no views are made, because they cannot be recorded: %w", err)
	}
	views := make([]View, len(s.sources))
	s.started = time.Now()
	for _, d := range s.drivers {
		var mine []Source
		var index []int
		for i, src := range s.sources {
			if src.Kind == d.Kind() {
				mine, index = append(mine, src), append(index, i)
			}
		}
		if len(mine) == 0 {
			continue
		}
		made, err := d.Create(ctx, s.name, mine)
		if err != nil {
			s.views = slices.DeleteFunc(views, func(v View) bool { return v.Kind == "" })
			return fmt.Errorf("make views: %w", err)
		}
		for i, v := range made {
			views[index[i]] = v
		}
	}
	s.views = views
	if err := s.files.write(s.record()); err != nil {
		return fmt.Errorf("the views are given up, because they cannot be recorded: %w", err)
	}
	return s.assemble()
}

func (s *Set) record() record {
	r := record{
		Version: recordVersion, Name: s.name, Label: s.o.Label, MadeAt: s.started.UTC(), PID: os.Getpid(),
		Parts: slices.Clone(s.parts), Sources: s.sources, Views: s.views, Note: s.note,
	}
	for i := range r.Parts {
		if p := &r.Parts[i]; p.err != nil {
			p.Why = p.err.Error()
		}
	}
	return r
}

// assemble puts the views of what is mounted below another path where a walk expects them.
func (s *Set) assemble() error {
	for i, p := range s.parts {
		if !p.covered() {
			continue
		}
		picture, err := s.picture(p)
		if err != nil {
			return err
		}
		if _, err := os.Lstat(picture); err != nil {
			return &LossyViewError{View: s.views[p.Source].Name, Path: p.Path, What: "name", Want: "present", Got: "missing"}
		}
		outer := s.outer(i)
		if outer < 0 || s.excepted(p.Real, s.parts[outer].Real) { // nobody comes by that way
			continue
		}
		onto, err := s.picture(s.parts[outer])
		if err != nil {
			return err
		}
		below, err := Rel(p.Real, s.parts[outer].Real)
		if err != nil {
			return err
		}
		onto = filepath.Join(onto, below)
		if same(onto, picture) {
			continue // a driver that takes along what is mounted below
		}
		if err := bind(picture, onto); err != nil {
			return fmt.Errorf("put the view of %s into that of %s: %w", p.Path, s.parts[outer].Path, err)
		}
		s.mounts = append(s.mounts, onto)
	}
	return nil
}

// bind mounts what from is at onto, for reading alone. Neither may be reached by a symbolic link: a
// picture is the work of others.
func bind(from, onto string) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("open %s: %w", from, err)
	}
	defer unix.Close(fd)
	to, err := unix.Openat2(unix.AT_FDCWD, onto, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC})
	if err != nil {
		return fmt.Errorf("open %s: %w", onto, err)
	}
	defer unix.Close(to)
	if err := unix.MoveMount(fd, "", to, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount at %s: %w", onto, err)
	}
	return nil
}

func same(a, b string) bool {
	sa, erra := os.Lstat(a)
	sb, errb := os.Lstat(b)
	return erra == nil && errb == nil && os.SameFile(sa, sb)
}

// outer returns the innermost covered part, on another source or place, that contains part i; -1 if
// there is none, or if the two lie side by side in one picture anyway.
func (s *Set) outer(i int) int {
	best := -1
	for j, o := range s.parts {
		if j == i || !o.covered() || o.Real == s.parts[i].Real || !mountinfo.Below(s.parts[i].Real, o.Real) {
			continue
		}
		if best < 0 || len(o.Real) > len(s.parts[best].Real) {
			best = j
		}
	}
	if best < 0 || !s.parts[i].Nested && s.sameMount(s.parts[i], s.parts[best]) {
		return -1
	}
	return best
}

// sameMount tells whether the inner path is reached from the outer one without crossing a mount.
func (s *Set) sameMount(inner, outer part) bool {
	return inner.Source == outer.Source && filepath.Join(outer.Rel, rel(inner.Real, outer.Real)) == filepath.Clean(inner.Rel)
}

// picture returns where the picture of a covered part is.
func (s *Set) picture(p part) (string, error) {
	if !p.covered() || p.Source >= len(s.views) {
		return "", fmt.Errorf("there is no view of %s", p.Path)
	}
	v := s.views[p.Source]
	if v.Path == "" {
		return "", fmt.Errorf("the view %s of %s is mounted nowhere", v.Name, p.Path)
	}
	return filepath.Join(v.Path, p.Rel), nil
}

// Translate returns where the still picture of path can be read. It returns false for a path without
// view, and for one below which something without view is mounted, because a walk would miss that
// without a word: see Reason.
func (s *Set) Translate(path string) (string, bool) {
	p, err := s.translate(path)
	return p, err == nil
}

// Reason tells why Translate returns false; nil if it does not.
func (s *Set) Reason(path string) error {
	_, err := s.translate(path)
	return err
}

func (s *Set) translate(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	path = s.resolve(path)
	best := -1
	for i, p := range s.parts {
		if !p.covered() && path != p.Real && mountinfo.Below(p.Real, path) {
			return "", fmt.Errorf("below it, %s has no view: %w", p.Path, p.reason())
		}
		if mountinfo.Below(path, p.Real) && (best < 0 || len(p.Real) > len(s.parts[best].Real)) {
			best = i
		}
	}
	if best < 0 {
		return "", fmt.Errorf("%s is not among the paths that views were asked for", path)
	}
	p := s.parts[best]
	if !p.covered() {
		return "", p.reason()
	}
	picture, err := s.picture(p)
	if err != nil {
		return "", err
	}
	return filepath.Join(picture, rel(path, p.Real)), nil
}

// resolve replaces what of a path was given by what that is without symbolic links.
func (s *Set) resolve(path string) string {
	best := -1
	for i, p := range s.parts {
		if mountinfo.Below(path, p.Path) && (best < 0 || len(p.Path) > len(s.parts[best].Path)) {
			best = i
		}
	}
	if best < 0 {
		return path
	}
	return filepath.Join(s.parts[best].Real, rel(path, s.parts[best].Path))
}

// Check asks the drivers whether the views are still whole. Call it when the last byte has been read:
// some snapshots overflow, and what was read from them meanwhile is worth nothing.
//
// Errors: *BrokenError, ErrGone, joined.
func (s *Set) Check(ctx context.Context) error {
	if len(s.views) == 0 {
		return errors.New("there are no views")
	}
	var errs []error
	for _, v := range s.views {
		d, err := s.driver(v.Kind)
		if err == nil {
			err = d.Check(ctx, v)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// SetNote leaves a note with the views, if they are kept, for whoever opens them.
func (s *Set) SetNote(v any) error {
	note, err := json.Marshal(v)
	if err == nil {
		s.note = note
	}
	return err
}

// Note is what SetNote left, nil if there was none.
func (s *Set) Note() json.RawMessage { return s.note }

// MadeAt is no later than the instant of the first view.
func (s *Set) MadeAt() time.Time { return s.started }

// Discard makes Close remove the views, whatever Options.KeepLast says: they are not worth keeping.
func (s *Set) Discard() { s.o.KeepLast = 0 }

// Close removes the views and their record, or keeps them and removes the oldest of those that are
// kept for the same label: Options.KeepLast. What cannot be removed stays on record for the next run.
// It works also if ctx has ended. Calling it again, or before Create, does nothing.
func (s *Set) Close(ctx context.Context) error {
	if s.closed || s.name == "" {
		s.closed = true
		return nil
	}
	s.closed = true
	if s.lock == nil {
		return nil // it came to nothing
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), runTimeout)
	defer cancel()
	defer s.lock.Close()
	errs := []error{s.disassemble()}
	switch {
	case s.opened:
	case s.o.KeepLast > 0:
		r := s.record()
		r.Kept = true
		if err := s.files.write(r); err != nil {
			errs = append(errs, fmt.Errorf("keep the views %s: %w", s.name, err))
			break
		}
		errs = append(errs, removeOldKept(ctx, s.drivers, s.o))
	case s.views == nil && !exists(s.files.record()):
		errs = append(errs, s.files.remove()) // nothing can have been made
	default:
		// Drivers that failed have cleaned up after themselves; what they could not is found again.
		errs = append(errs, removeSet(ctx, s.drivers, s.files, s.record(), nil))
	}
	return errors.Join(errs...)
}

func (s *Set) disassemble() error {
	var errs []error
	for _, m := range slices.Backward(s.mounts) {
		errs = append(errs, Unmount(m))
	}
	s.mounts = nil
	return errors.Join(errs...)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// OpenKept makes a set of views readable that Close had kept, by its name. Close of the returned set
// removes nothing.
//
// Errors: fs.ErrNotExist if there is none of that name on record; ErrGone.
func OpenKept(ctx context.Context, drivers []Driver, name string, o Options) (*Set, error) {
	dir, err := statedir.Path(o.StateDir, viewsSub)
	if err != nil {
		return nil, err
	}
	if _, ok := ParseName(name); !ok || strings.Contains(name, ".") {
		return nil, fmt.Errorf("%q is not the name of a set of views; holdfast views lists them", name)
	}
	files := recordFiles{dir, name}
	r, err := files.read()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no views named %s are on record: %w; holdfast views lists them", name, err)
	}
	if err != nil {
		return nil, err
	}
	if !r.Kept {
		return nil, fmt.Errorf("the views %s are not kept; a run uses them, or was killed", name)
	}
	lock, err := files.acquire() // so that nobody removes them meanwhile
	if err != nil {
		return nil, fmt.Errorf("open the views %s: %w", name, err)
	}
	s := &Set{name: name, drivers: drivers, o: o, parts: r.Parts, sources: r.Sources, started: r.MadeAt, note: r.Note, files: files, lock: lock, opened: true}
	for _, v := range r.Views {
		d, err := s.driver(v.Kind)
		if err == nil {
			v, err = d.Open(ctx, v)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open the view %s of %s: %w", v.Name, v.Source, err), s.Close(ctx))
		}
		s.views = append(s.views, v)
	}
	if err := s.assemble(); err != nil {
		return nil, errors.Join(err, s.Close(ctx))
	}
	return s, nil
}
