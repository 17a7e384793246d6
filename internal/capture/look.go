package capture

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// looker finds the directories of a tree that differ from what a listing says of them. It looks at directories,
// and at files only where the server changes them in place: each other change of a file is one of its directory.
//
// It makes nothing of what is unchanged, so that this costs one stat for each directory.
type looker struct {
	l    *listing
	fd   int    // the top of the tree
	rel  string // its path
	path []byte // of what is being looked at; begins with rel
	// atomic vouches for files that the server puts into their directory as a whole, and never changes there. depth
	// counts the directories between the file and the top; first is the topmost of them.
	atomic func(e *entry, depth int, first string) bool
	// old is the moment before which a directory must have changed for the last time so that its files
	// were complete when they were seen: a revision gets its time after its name.
	old     timespec
	cursors []*cursor
	differ  differing
	young   bool // a directory was changed after old
}

// differing are the directories that must be read (true), and all above them (false).
type differing map[string]bool

// settleTime is how long after the last change of a directory the server may still be busy with the files
// in it.
const settleTime = time.Minute

// look compares the directory rel with the listing l, which was made at the time seen.
func (s *store) look(ctx context.Context, rel string, l *listing, seen timespec, atomic func(e *entry, depth int, first string) bool) (*looker, error) {
	fd, err := s.root.open(rel, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	k := &looker{
		l: l, fd: fd, rel: rel, path: []byte(rel), atomic: atomic,
		old: timespec{seen.sec - int64(settleTime/time.Second), seen.nsec}, differ: differing{},
	}
	var st unix.Stat_t
	var e entry
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if e.fill(&st); !l.top.same(&e) {
		k.mark(len(k.path))
	}
	young := !l.top.ctime.before(k.old)
	k.young = young
	if len(l.top.kids) < lookAlone {
		k.dir(ctx, 0, "", l.top.kids, young)
		return k, context.Cause(ctx)
	}
	// A large space is shared out by what lies in the directories of its top.
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(looks)
	parts := k.split(gctx, g, young)
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, p := range parts {
		k.young = k.young || p.young
		for dir, itself := range p.differ {
			k.differ[dir] = k.differ[dir] || itself
		}
	}
	return k, context.Cause(ctx)
}

// lookAlone is the size of a listing in bytes below which one goroutine does it: 10,000 entries.
const lookAlone = 256 << 10

// split looks at the two upper levels of directories, and has others look at what is below them.
func (k *looker) split(ctx context.Context, g *errgroup.Group, young bool) (parts []*looker) {
	k.each(0, "", k.l.top.kids, young, func(o *oldEntry, young bool) {
		first := strings.Clone(o.entry.path)
		k.each(1, first, o.kids, young, func(o *oldEntry, young bool) {
			kids := o.kids
			p := &looker{l: k.l, fd: k.fd, rel: k.rel, path: bytes.Clone(k.path), atomic: k.atomic, old: k.old, differ: differing{}}
			parts = append(parts, p)
			g.Go(func() error {
				p.dir(ctx, 2, first, kids, young)
				return context.Cause(ctx)
			})
		})
	})
	return parts
}

// mark notes that the directory k.path[:n] must be read.
func (k *looker) mark(n int) {
	_, known := k.differ[string(k.path[:n])]
	k.differ[string(k.path[:n])] = true
	for !known {
		if n = strings.LastIndexByte(unsafe.String(&k.path[0], n), '/'); n < len(k.rel) {
			return
		}
		if _, known = k.differ[string(k.path[:n])]; !known {
			k.differ[string(k.path[:n])] = false
		}
	}
}

// dir compares all that is below the directory k.path.
func (k *looker) dir(ctx context.Context, depth int, first string, kids []byte, young bool) {
	if depth < 4 && ctx.Err() != nil {
		return
	}
	k.each(depth, first, kids, young, func(o *oldEntry, young bool) {
		first := first
		if depth == 0 {
			first = strings.Clone(o.entry.path)
		}
		k.dir(ctx, depth+1, first, o.kids, young)
	})
}

// each compares the entries of the directory k.path with kids, and calls fn for each directory among them,
// with k.path set to it.
func (k *looker) each(depth int, first string, kids []byte, young bool, fn func(o *oldEntry, young bool)) {
	for len(k.cursors) <= depth {
		k.cursors = append(k.cursors, &cursor{l: k.l})
	}
	c := k.cursors[depth]
	c.reset(kids)
	base := len(k.path)
	var st unix.Stat_t
	var e entry
	for c.next() {
		o := &c.o
		dir := o.isDir()
		switch {
		case o.flags&listedKind == listedOther, !dir && o.flags&listedUnsure != 0:
			k.mark(base)
			continue
		case !dir && (nothingInPlace(&o.entry) || !young && k.atomic(&o.entry, depth, first)):
			continue
		}
		k.path = append(append(k.path[:base], '/'), o.entry.path...)
		name := k.path[len(k.rel)+1:]
		if err := unix.Fstatat(k.fd, unsafe.String(&name[0], len(name)), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			k.mark(base)
			continue
		}
		e.fill(&st)
		switch {
		case !dir && !o.same(&e), dir && !e.isDir():
			k.mark(base)
		case dir:
			old := o.dir()
			if !old.same(&e) {
				k.mark(len(k.path))
			}
			young := !o.entry.ctime.before(k.old)
			k.young = k.young || young
			fn(o, young)
		}
	}
	k.path = k.path[:base]
	if c.d.bad { // cannot be: the cache has a checksum
		k.mark(base)
	}
}

// nothingInPlace vouches for what has nothing that could be changed in place: links, and the server's lock
// files.
func nothingInPlace(e *entry) bool {
	return e.isSymlink() || e.size == 0 && strings.HasSuffix(e.path, ".mlock")
}

// atomicNode vouches for metadata, which is replaced by a rename, and for the files of nodes, which are empty and
// never written. Lock files are written in place.
func atomicNode(e *entry, depth int, first string) bool {
	if first != "nodes" || depth != ocis.NodeDepth+1 || !e.isRegular() {
		return false
	}
	kind, _, _ := ocis.ClassifyNodeName(e.path)
	return kind.IsMeta() || e.size == 0 && kind == kind.Base() && kind < ocis.NameTemp
}

// atomicBlob vouches for blobs that came by a rename. Where that cannot be done they are copied, which makes
// them executable; and a copy that was interrupted is completed in place.
func atomicBlob(e *entry, depth int, _ string) bool {
	return depth == ocis.NodeDepth && e.isRegular() && e.mode&0o111 == 0
}

// lookEvery is how often at least each space is looked at in full, because somebody else than the server
// may have changed a file in place, or taken away or added a blob.
const lookEvery = 7 * 24 * time.Hour

// lookDue reports whether the space must be looked at in full. The intervals of spaces differ by up to three
// days, so that not all fall on the same run.
func lookDue(spaceID string, looked, now timespec) bool {
	every := int64(lookEvery/time.Second) - int64(nameHash(spaceID)%(3*24*3600))
	return looked.sec == 0 || now.before(looked) || now.sec-looked.sec >= every
}

// lookShort compares the space with what was seen of it, and returns the directories of the metadata and those of
// the blobs that must be read. They are nil if all must be looked at in full.
func (d *decomposed) lookShort(ctx context.Context) (nodes, blobs differing, young bool, err error) {
	l := readListing(d.old.nodesSeen, d.rules)
	// Where the file system lists changes, the scan looks at those and at nothing else. What the first of these
	// lists begins at must be seen in full: nothing that is missed before it would be listed later.
	if l == nil || d.changed != nil || d.marked || !d.sp.packed || lookDue(d.sp.id, d.old.looked, d.c.now()) {
		return nil, nil, false, nil
	}
	k, err := d.look(ctx, d.sp.rel, l, d.old.seen, atomicNode)
	if err != nil {
		return nil, nil, false, err
	}
	nodes, young = k.differ, k.young
	if l = readListing(d.old.blobsSeen, d.rules); l == nil || d.obj != nil {
		return nodes, nil, young, nil
	}
	k, err = d.look(ctx, d.sp.rel+"/blobs", l, d.old.seen, atomicBlob)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return nodes, nil, young, nil // the scan tells
	}
	if err != nil {
		return nil, nil, false, err
	}
	return nodes, k.differ, young || k.young, nil
}

// asBefore returns the result of the last backup for a space in which nothing differs, and nil if it must be
// made anew.
func (d *decomposed) asBefore(young bool) *snapshotPart {
	old := d.old
	if d.obj != nil || old.folder != d.sp.folder || len(old.result) == 0 || old.print == [32]byte{} {
		return nil
	}
	part, err := decodePart(old.result)
	if err != nil || !d.c.hasTrees(part.trees) || !d.stillGood(old, part) {
		return nil
	}
	if young { // by now they have settled, or are looked at once more
		c := *old
		c.seen, c.at = d.c.now(), nil
		old = &c
	}
	d.reuse(d.sp, old, part)
	return part
}
