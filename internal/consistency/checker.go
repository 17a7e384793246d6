package consistency

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// checker is one run over all stores.
type checker struct {
	o      Options
	sum    *Summary
	stores []*storeCheck
	shares shares
	// spaces are all spaces of stores that hold users' files, by id.
	spaces map[string]*spaceInfo
	limits map[string]bool
	// oddMD5s counts blobs that are right though the bucket has another MD5 of them.
	oddMD5s int
	// nameless tells that a space has lost its id, which indexes and shares may speak of.
	nameless bool
}

// storeCheck is one store of the run.
type storeCheck struct {
	Store
	spaces  []Space
	infos   map[string]*spaceInfo
	uploads map[string]*upload
	pending map[string]bool // spaces with changes of sizes that are not applied yet
	indexes []indexFile
	rest    []Finding
}

// spaceInfo is what the root of a space says, as the indexes need it.
type spaceInfo struct {
	root    string // below the store's root
	id      string
	kind    string
	owner   string
	alias   string
	members []string // "u:<id>" or "g:<id>", grants of the root
	known   bool     // its metadata was read
}

// unit is a part of the check that is looked at as a whole, and a second time if the instance runs.
type unit struct {
	st    *storeCheck
	space *Space // nil is what belongs to no space
	found []Finding
}

func (c *checker) limit(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	if c.limits == nil {
		c.limits = map[string]bool{}
	}
	if !c.limits[s] {
		c.limits[s] = true
		c.sum.Limits = append(c.sum.Limits, s)
	}
}

func (c *checker) run(ctx context.Context, stores []Store) error {
	var again []unit
	c.o.Progress.Emit(progress.Event{Kind: progress.Start, Phase: "check", Unit: "spaces"})
	total := int64(0)
	for _, s := range stores {
		st := &storeCheck{Store: s}
		c.stores = append(c.stores, st)
		var err error
		if st.spaces, err = s.Place.Spaces(ctx); err != nil {
			return fmt.Errorf("store %s: %w", s.Name, err)
		}
		total += int64(len(st.spaces))
		if s.Remote && s.Blobs == nil {
			c.limit("the blobs of store %s lie in a bucket and were not looked at", s.Name)
		}
	}
	emit := func(u unit) error {
		if c.o.Live && worthASecondLook(u.found, c.o.Now) {
			again = append(again, u)
			return nil
		}
		return c.emit(u.found)
	}
	for _, st := range c.stores {
		if err := c.readRest(ctx, st); err != nil {
			return err
		}
		st.infos = map[string]*spaceInfo{}
		for i := range st.spaces {
			sp := &st.spaces[i]
			c.o.Progress.Emit(progress.Event{Kind: progress.Update, Phase: "check", Item: sp.ID, Done: c.sum.Spaces, Total: total, Unit: "spaces", Bytes: c.sum.ReadBytes})
			res, err := c.space(ctx, st, *sp)
			if err != nil {
				return err
			}
			c.count(res)
			if err := emit(unit{st: st, space: sp, found: res.findings}); err != nil {
				return err
			}
		}
		others, err := c.others(ctx, st)
		if err != nil {
			return err
		}
		if err := emit(unit{st: st, found: append(c.restOf(st), others...)}); err != nil {
			return err
		}
	}
	if f := c.shares.rest(c); len(f) > 0 {
		if err := emit(unit{st: c.shares.st, found: f}); err != nil {
			return err
		}
	}
	c.o.Progress.Emit(progress.Event{Kind: progress.Finish, Phase: "check", Done: c.sum.Spaces, Total: total, Unit: "spaces", Bytes: c.sum.ReadBytes})
	if len(again) == 0 {
		return nil
	}
	return c.lookAgain(ctx, again)
}

// worthASecondLook tells whether some of the findings may come from changes that were being made.
func worthASecondLook(found []Finding, now time.Time) bool {
	for i := range found {
		f := &found[i]
		// What was written long ago is in no change of this moment.
		if f.Severity == Damage || f.Class == ShareStale || f.Time == nil || f.Time.After(now.Add(-24*time.Hour)) {
			return true
		}
	}
	return false
}

// lookAgain keeps of each unit what a second look finds as well.
func (c *checker) lookAgain(ctx context.Context, again []unit) error {
	c.o.Progress.Emit(progress.Event{Kind: progress.Info, Phase: "check", Message: "the instance may be running: what was found is looked at a second time"})
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(c.o.Settle):
	}
	second := &checker{o: c.o, sum: &Summary{Classes: map[Class]int64{}}, spaces: map[string]*spaceInfo{}}
	second.o.Live, second.o.Progress = false, nil
	states := map[*storeCheck]*storeCheck{}
	for _, st := range c.stores {
		n := &storeCheck{Store: st.Store, infos: map[string]*spaceInfo{}}
		states[st] = n
		second.stores = append(second.stores, n)
		var err error
		if n.spaces, err = st.Place.Spaces(ctx); err != nil {
			return fmt.Errorf("store %s: %w", st.Name, err)
		}
		if err := second.readRest(ctx, n); err != nil {
			return err
		}
	}
	want := map[*storeCheck]map[string]bool{}
	restToo := false
	for _, u := range again {
		if want[u.st] == nil {
			want[u.st] = map[string]bool{}
		}
		if u.space != nil {
			want[u.st][u.space.ID] = true
		} else {
			restToo = true
		}
	}
	got := map[*storeCheck]map[string][]Finding{}
	for _, st := range c.stores {
		n := states[st]
		got[st] = map[string][]Finding{}
		for _, sp := range n.spaces {
			// Shares and indexes are compared with all spaces.
			if !want[st][sp.ID] && !restToo && !isShareSpace(sp.ID) {
				continue
			}
			res, err := second.space(ctx, n, sp)
			if err != nil {
				return err
			}
			got[st][sp.ID] = res.findings
		}
		others, err := second.others(ctx, n)
		if err != nil {
			return err
		}
		got[st][""] = append(second.restOf(n), others...)
	}
	if c.shares.st != nil {
		got[c.shares.st][""] = append(got[c.shares.st][""], second.shares.rest(second)...)
	}
	for _, u := range again {
		name := ""
		if u.space != nil {
			name = u.space.ID
		}
		if err := c.emit(inBoth(u.found, got[u.st][name])); err != nil {
			return err
		}
	}
	return nil
}

// inBoth returns those of second that first has as well.
func inBoth(first, second []Finding) []Finding {
	type mark struct {
		class                  Class
		node, path, blob, same string
	}
	of := func(f *Finding) mark {
		m := mark{f.Class, f.Node, f.Path, f.Blob, f.same}
		if m.same == "" {
			m.same = f.Detail
		}
		return m
	}
	seen := map[mark]bool{}
	for i := range first {
		seen[of(&first[i])] = true
	}
	var out []Finding
	for i := range second {
		if seen[of(&second[i])] {
			out = append(out, second[i])
		}
	}
	return out
}

func (c *checker) emit(found []Finding) error {
	for _, f := range found {
		c.sum.Classes[f.Class]++
		if f.Severity == Damage {
			c.sum.Damage++
		} else {
			c.sum.Notes++
		}
		switch f.Class {
		case BlobOrphaned:
			c.sum.Orphans += max(f.count, 1)
			c.sum.OrphanBytes += f.Bytes
		case UploadInFlight:
			c.sum.InFlight++
		}
		if c.o.Found == nil {
			continue
		}
		if err := c.o.Found(f); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) count(r *spaceResult) {
	c.sum.Spaces++
	c.sum.Nodes += r.nodes
	c.sum.Revisions += r.revisions
	c.sum.TrashItems += r.trash
	c.sum.Blobs += r.blobs
	c.sum.Bytes += r.bytes
	c.sum.Checksums += r.checksums
	c.sum.ReadBytes += r.readBytes
}

// spaceResult is what one look at one space gives.
type spaceResult struct {
	findings                                                    []Finding
	nodes, revisions, trash, blobs, bytes, checksums, readBytes int64
}

// space looks at one space.
func (c *checker) space(ctx context.Context, st *storeCheck, sp Space) (*spaceResult, error) {
	s := &spaceCheck{c: c, st: st, sp: sp, res: &spaceResult{}, info: &spaceInfo{id: sp.ID, root: sp.Root}}
	s.rootNode = -1
	var err error
	if st.Layout == string(ocis.Posix) {
		err = s.posix(ctx)
	} else {
		err = s.decomposed(ctx)
	}
	if err != nil {
		return nil, err
	}
	s.forgive()
	s.name()
	if _, twice := st.infos[sp.ID]; !twice {
		st.infos[sp.ID] = s.info
	}
	if st.Name != systemStore {
		c.spaces[sp.ID] = s.info
	}
	return s.res, nil
}

// upload is what uploads/ holds for one id.
type upload struct {
	size   int64 // of the bytes; -1 if there are none
	want   int64 // by the record; -1 if there is none
	space  string
	name   string
	time   time.Time
	used   bool // metadata refers to it
	stored bool // and the blob is in its place
}

// readRest reads what belongs to no space.
func (c *checker) readRest(ctx context.Context, st *storeCheck) error {
	st.uploads, st.pending, st.indexes, st.rest = map[string]*upload{}, map[string]bool{}, nil, nil
	at := func(id string) *upload {
		u := st.uploads[id]
		if u == nil {
			u = &upload{size: -1, want: -1}
			st.uploads[id] = u
		}
		return u
	}
	return st.Place.Rest(ctx, func(e *Entry) error {
		top, rest, _ := strings.Cut(e.Path, "/")
		switch {
		case top == "indexes" && e.Type == 'f':
			c.readIndex(st, e, rest)
		case top == "changes":
			// changes/<2>/<space id>:<node id>[.processing]
			if parts := strings.Split(rest, "/"); len(parts) == 2 {
				if space, _, ok := strings.Cut(parts[1], ":"); ok {
					st.pending[space] = true
				}
			}
		case top == "uploads" && e.Type == 'f' && rest != "" && !strings.Contains(rest, "/"):
			size, sec, nsec, err := e.stat()
			if err != nil {
				return nil //nolint:nilerr // gone in between
			}
			t := time.Unix(sec, nsec).UTC()
			id, info := strings.CutSuffix(rest, ".info")
			if !info {
				u := at(id)
				u.size, u.time = size, t
				return nil
			}
			p, err := e.data()
			if err != nil {
				return nil //nolint:nilerr // gone in between
			}
			rec, err := ocis.ParseUpload(p)
			if err != nil {
				st.rest = append(st.rest, c.finding(st, UploadLeftover, e.Path, fmt.Sprintf("the record of an upload cannot be read: %v", err)))
				at(id).want = 0
				return nil
			}
			u := at(id)
			u.want, u.space, u.name = rec.Size, rec.SpaceID(), rec.Name()
			u.time = t
		}
		return nil
	}, func(p string, err error) {
		if !isGone(err) {
			st.rest = append(st.rest, c.finding(st, Unreadable, p, err.Error()))
		}
	})
}

// restOf is what was found in what belongs to no space, once all spaces were looked at.
func (c *checker) restOf(st *storeCheck) []Finding {
	out := append(st.rest, c.checkIndexes(st)...)
	for _, id := range sortedKeys(st.uploads) {
		u := st.uploads[id]
		class, detail := UploadUnfinished, ""
		switch {
		case u.used && !u.stored:
			continue // told with its node
		case u.used:
			class, detail = UploadLeftover, "the upload is finished, and its parts were not removed"
		case u.size < 0:
			class, detail = UploadLeftover, "the record of an upload without its bytes"
		case u.want < 0:
			class, detail = UploadLeftover, "the bytes of an upload without its record"
		default:
			detail = fmt.Sprintf("an upload of %d bytes to space %s that did not go on", u.want, u.space)
		}
		f := c.finding(st, class, "uploads/"+id, detail)
		f.Space, f.Blob, f.Bytes = u.space, id, max(u.size, 0)
		if class == UploadUnfinished {
			f.Detail += ": " + strconv.Quote(u.name)
		}
		t := u.time
		f.Time = &t
		out = append(out, f)
	}
	return out
}

// others reports what the bucket of a store holds that belongs to no space.
func (c *checker) others(ctx context.Context, st *storeCheck) ([]Finding, error) {
	if !st.Remote || st.Blobs == nil {
		return nil, nil
	}
	known := map[string]bool{}
	for _, sp := range st.spaces {
		known[sp.ID] = true
	}
	var out []Finding
	err := st.Blobs.Others(ctx, func(space string) bool { return known[space] }, func(o OtherObjects) error {
		n := fmt.Sprintf("%d objects", o.Objects)
		if o.Objects == 1 {
			n = "1 object"
		}
		what := "there is no such space: " + n + " that a purge left, or of another instance with the same bucket"
		switch {
		case strings.HasPrefix(o.Folder, asideKey):
			what = n + " that a restore has put aside"
		case o.Folder == "":
			what = n + " in no folder, as instances from before May 2022 called them"
		}
		f := c.finding(st, BlobOrphaned, "(bucket)/"+o.Folder, what)
		f.Bytes, f.count, f.same = o.Bytes, o.Objects, "folder"
		if !o.Newest.IsZero() {
			t := o.Newest.UTC()
			f.Time = &t
			f.Detail += "; the newest written " + age(c.o.Now.Sub(t)) + " ago"
		}
		out = append(out, f)
		return nil
	})
	slices.SortFunc(out, func(a, b Finding) int { return strings.Compare(a.Path, b.Path) })
	return out, err
}

// asideKey begins the keys of objects that a restore has put aside.
const asideKey = "holdfast-aside-"

func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// finding makes one of something that belongs to no space.
func (c *checker) finding(st *storeCheck, class Class, path, detail string) Finding {
	return Finding{Class: class, Severity: severity(class), Store: st.Name, Path: path, Detail: detail}
}

var noteClasses = map[Class]bool{
	BlobOrphaned: true, BlobShared: true, UploadInFlight: true, UploadUnfinished: true, UploadLeftover: true, MetadataLeftover: true,
	TrashLeftover: true, RevisionLeftover: true, IndexStale: true, ShareStale: true, ChangedOutside: true, TemporaryFile: true, RestoreUnfinished: true,
	UnknownEntry: true,
}

func severity(c Class) Severity {
	if noteClasses[c] {
		return Note
	}
	return Damage
}
