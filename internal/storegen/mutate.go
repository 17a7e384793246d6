package storegen

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// Changes counts what Mutate did.
type Changes struct {
	New         int   `json:"new"`
	Overwritten int   `json:"overwritten"`
	Renamed     int   `json:"renamed"`
	Deleted     int   `json:"deleted"`
	Shared      int   `json:"shared"`
	Bytes       int64 `json:"bytes"` // of new blobs
}

// Total is the number of changes.
func (c *Changes) Total() int { return c.New + c.Overwritten + c.Renamed + c.Deleted + c.Shared }

// Mutate changes a fraction of the files of a generated instance the way a server does: new files,
// files overwritten with a revision, renamed, deleted to the trash and shared, each with the sizes
// and times propagated to the space's root. Metadata is replaced by renaming, so the folders' times
// are those of now. Ids and contents follow from seed and from what is there.
func Mutate(ctx context.Context, dir string, seed uint64, fraction float64) (*Changes, error) {
	return MutateNoting(ctx, dir, seed, fraction, func(string) {})
}

// MutateNoting is Mutate that calls note with each path that it is about to make, replace or remove,
// relative to the root of the users' storage; folders that it makes on the way are not named.
func MutateNoting(ctx context.Context, dir string, seed uint64, fraction float64, note func(path string)) (*Changes, error) {
	rec, err := ReadRecord(dir)
	if err != nil {
		return nil, fmt.Errorf("change an instance that was not generated: %w", err)
	}
	if fraction < 0 || fraction > 0.5 {
		return nil, fmt.Errorf("cannot change the fraction %v of a store: it must lie between 0 and 0.5", fraction)
	}
	o := rec.Options
	o.Dir = dir
	if err := o.fill(); err != nil {
		return nil, err
	}
	st, err := openStore(filepath.Join(dir, "data", "storage", "users"), o.Prefix)
	if err != nil {
		return nil, err
	}
	defer st.close()
	m := &mutator{
		ctx: ctx, st: st, note: note, fill: newFiller(), r: stream(seed, forMutation, rec.Mutations, 0),
		seed: stream(seed, forMutation, rec.Mutations, 1).seed(),
		// The logical clock goes on from the end of the generated time, a day for each run.
		now: lastDay + int64(rec.Mutations+1)*day, mean: rec.Options.Bytes / int64(max(1, rec.Options.Files)),
	}
	if m.mean == 0 {
		m.mean = 64 << 10
	}
	for _, id := range slices.Sorted(maps.Keys(rec.Summary.FilesPerSpace)) {
		if n := rec.Summary.FilesPerSpace[id]; n > 0 {
			m.total += n
			m.spaces = append(m.spaces, id)
			m.upTo = append(m.upTo, m.total)
		}
	}
	want := max(1, int(float64(m.total)*fraction))
	if fraction == 0 {
		want = 0
	}
	rec.Mutations++
	// A draw can fall on what cannot be changed, such as an upload in flight; that is drawn again.
	for tries := 0; m.done.Total() < want; tries++ {
		if tries > 20*want+1000 {
			return nil, fmt.Errorf("found only %d of %d files to change in %s: too much of it was changed or deleted before", m.done.Total(), want, dir)
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := m.change(); err != nil {
			return nil, fmt.Errorf("change the instance in %s: %w", dir, err)
		}
	}
	return &m.done, writeRecord(dir, rec)
}

type mutator struct {
	ctx    context.Context
	st     *store
	note   func(path string)
	fill   *filler
	r      rng
	seed   uint64
	made   int // ids drawn
	now    int64
	mean   int64 // bytes of a new file on average
	spaces []string
	upTo   []int // sums of the files of the spaces
	total  int
	done   Changes
}

// seed is the state as a seed of other streams.
func (r rng) seed() uint64 { return uint64(r) }

func (m *mutator) uuid() string {
	m.made++
	return uuid(m.seed, forNodeID, m.made, 0)
}

func (m *mutator) tick() int64 {
	m.now += int64(time.Second) + int64(m.r.below(1e9))
	return m.now
}

// target is a file or folder that was drawn.
type target struct {
	base  string // of the space, relative to the root
	space string
	id    string
	path  string // of the node, relative to the root
	attrs ocis.Attributes
}

func (m *mutator) change() error {
	n := m.r.below(m.total)
	space := m.spaces[sort.SearchInts(m.upTo, n+1)]
	t, err := m.draw(space)
	if err != nil || t == nil {
		return err
	}
	parent, err := m.load(t.base, space, t.attrs.Text("parentid"))
	if err != nil || parent == nil { // a child of a trashed folder
		return err
	}
	switch x := m.r.below(100); {
	case x < 30:
		return m.create(parent)
	case x < 65:
		return m.overwrite(t, parent)
	case x < 80:
		return m.rename(t, parent)
	case x < 90:
		return m.remove(t, parent)
	default:
		return m.share(t)
	}
}

// draw picks a file by going down the shard folders at random. nil: nothing usable there.
func (m *mutator) draw(space string) (*target, error) {
	base := ocis.SpacePath(space)
	dir := filepath.Join(m.st.root, base, "nodes")
	id := ""
	for range ocis.NodeDepth {
		list, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		if len(list) == 0 {
			return nil, nil
		}
		e := list[m.r.below(len(list))]
		id += e.Name()
		dir = filepath.Join(dir, e.Name())
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range list {
		if kind, rest, _ := ocis.ClassifyNodeName(e.Name()); kind == ocis.NameNode && e.Type().IsRegular() {
			files = append(files, rest)
		}
	}
	if len(files) == 0 {
		return nil, nil
	}
	t, err := m.load(base, space, id+files[m.r.below(len(files))])
	if err != nil || t == nil {
		return nil, err
	}
	if _, busy := t.attrs.Get("nodestatus"); busy {
		return nil, nil
	}
	return t, nil
}

// load reads the metadata of a node; nil if it is not there.
func (m *mutator) load(base, space, id string) (*target, error) {
	t := &target{base: base, space: space, id: id, path: base + "/nodes/" + ocis.NodePath(id)}
	data, err := os.ReadFile(filepath.Join(m.st.root, t.path+".mpk"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	t.attrs, err = ocis.ParseMPK(data)
	if err != nil {
		return nil, fmt.Errorf("%s.mpk: %w", t.path, err)
	}
	return t, nil
}

func (m *mutator) set(t *target, name string, value []byte) { t.attrs.Set(m.st.prefix, name, value) }

// save replaces the metadata of a node by renaming, under its lock file.
func (m *mutator) save(t *target, path string) error {
	if err := m.lock(t.base, t.id); err != nil {
		return err
	}
	dir, name := filepath.Split(path)
	m.made++
	temp := dir + "." + name + ".mpk" + strconv.FormatUint(m.r.next()>>32, 10)
	if err := m.write(temp, 0o600, ocis.EncodeMPK(t.attrs)); err != nil {
		return err
	}
	return m.rename2(temp, path+".mpk")
}

// lock makes the lock file of a node's metadata where it is missing.
func (m *mutator) lock(base, id string) error {
	return m.touchNew(base + "/nodes/" + ocis.NodePath(id) + ".mlock")
}

func (m *mutator) touchNew(path string) error {
	m.note(path)
	fd, err := unix.Openat(m.st.fd, path, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: path, Err: err}
	}
	return unix.Close(fd)
}

func (m *mutator) write(path string, mode uint32, data []byte) error {
	m.note(path)
	return m.st.writeNew(path, mode, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

func (m *mutator) rename2(from, to string) error {
	m.note(from)
	m.note(to)
	if err := unix.Renameat(m.st.fd, from, m.st.fd, to); err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

func (m *mutator) symlink(target, path string) error {
	m.note(path)
	if err := unix.Symlinkat(target, m.st.fd, path); err != nil {
		return &os.PathError{Op: "symlink", Path: path, Err: err}
	}
	return nil
}

// content draws a new content and makes its blob.
func (m *mutator) content() (string, item, checksums, error) {
	it := item{size: 1 + int64(float64(m.mean)*(0.2+1.6*m.r.float())), key: m.r.next(), kind: contentKind(m.r.below(3) / 2)}
	id := m.uuid()
	m.done.Bytes += it.size
	// An upload is received first and then renamed into its place, which notes it.
	var c checksums
	err := m.st.writeNew("uploads/"+id, 0o644, func(f *os.File) error {
		var err error
		c, err = m.fill.write(f, it)
		return err
	})
	return id, it, c, err
}

func (m *mutator) finish(base, blob string) error {
	path, err := m.st.shards(base+"/blobs", blob, 0o700)
	if err != nil {
		return err
	}
	return m.rename2("uploads/"+blob, path)
}

func (m *mutator) create(parent *target) error {
	blob, it, sums, err := m.content()
	if err != nil {
		return err
	}
	id, at := m.uuid(), m.tick()
	path, err := m.st.shards(parent.base+"/nodes", id, 0o700)
	if err != nil {
		return err
	}
	if err := m.write(path, 0o600, nil); err != nil {
		return err
	}
	name := "new " + drawName(&m.r, it.kind, int(m.r.below(1e9)))
	if err := m.symlink("../../../../../"+ocis.NodePath(id), parent.path+"/"+name); err != nil {
		return err
	}
	a := attributes{prefix: m.st.prefix}
	a.text("id", id)
	a.text("parentid", parent.id)
	a.text("name", name)
	a.text("type", "1")
	a.text("mtime", stamp(at))
	a.content(blob, it.size, &sums)
	t := &target{base: parent.base, space: parent.space, id: id, path: path, attrs: a.list}
	if err := m.save(t, path); err != nil {
		return err
	}
	if err := m.finish(parent.base, blob); err != nil {
		return err
	}
	m.done.New++
	return m.propagate(parent, it.size, at)
}

func (m *mutator) overwrite(t, parent *target) error {
	old := t.attrs.Text("mtime")
	changed, err := time.Parse(time.RFC3339Nano, old)
	if err != nil {
		return fmt.Errorf("%s: %w", t.path, err)
	}
	rev := t.path + ".REV." + old
	if _, err := os.Lstat(filepath.Join(m.st.root, rev)); err == nil {
		return nil // a server refuses this upload; another file is drawn
	}
	blob, it, sums, err := m.content()
	if err != nil {
		return err
	}
	if err := m.write(rev, 0o644, nil); err != nil {
		return err
	}
	if err := m.touchNew(rev + ".mlock"); err != nil {
		return err
	}
	a := attributes{prefix: m.st.prefix}
	for _, name := range []string{"type", "blobid", "blobsize", "cs.sha1", "cs.md5", "cs.adler32", "mtime"} {
		if v, ok := t.attrs.Get(name); ok {
			a.add(name, v)
		}
	}
	if err := m.save(&target{base: t.base, id: t.id, attrs: a.list}, rev); err != nil {
		return err
	}
	if err := m.st.touch(rev, changed.UnixNano()); err != nil {
		return err
	}
	before := size(t.attrs, "blobsize")
	at := m.tick()
	m.set(t, "blobid", []byte(blob))
	m.set(t, "blobsize", number(it.size))
	m.set(t, "cs.sha1", sums.sha1[:])
	m.set(t, "cs.md5", sums.md5[:])
	m.set(t, "cs.adler32", sums.adler[:])
	m.set(t, "mtime", []byte(stamp(at)))
	if err := m.save(t, t.path); err != nil {
		return err
	}
	if err := m.finish(t.base, blob); err != nil {
		return err
	}
	m.done.Overwritten++
	return m.propagate(parent, it.size-before, at)
}

func (m *mutator) rename(t, parent *target) error {
	old := t.attrs.Text("name")
	name := fmt.Sprintf("renamed %d %s", m.r.below(1e6), strings.TrimPrefix(old, "renamed "))
	if len(name) > 200 {
		return nil
	}
	if err := m.rename2(parent.path+"/"+old, parent.path+"/"+name); err != nil {
		return err
	}
	m.set(t, "name", []byte(name))
	if err := m.save(t, t.path); err != nil {
		return err
	}
	m.done.Renamed++
	return m.propagate(parent, 0, m.tick())
}

func (m *mutator) remove(t, parent *target) error {
	name := t.attrs.Text("name")
	origin := "/" + name
	for up := parent; up.id != up.space; {
		origin = "/" + up.attrs.Text("name") + origin
		next, err := m.load(up.base, up.space, up.attrs.Text("parentid"))
		if err != nil {
			return err
		}
		if next == nil { // below a trashed folder
			return nil
		}
		up = next
	}
	at := m.tick()
	m.set(t, "trash.origin", []byte(origin))
	if err := m.save(t, t.path); err != nil {
		return err
	}
	link, err := m.st.shards(t.base+"/trash", t.id, 0o700)
	if err != nil {
		return err
	}
	if err := m.symlink("../../../../../nodes/"+ocis.NodePath(t.id)+trashMark(at), link); err != nil {
		return err
	}
	for _, suffix := range []string{"", ".mpk"} {
		if err := m.rename2(t.path+suffix, t.path+trashMark(at)+suffix); err != nil {
			return err
		}
	}
	m.note(parent.path + "/" + name)
	if err := unix.Unlinkat(m.st.fd, parent.path+"/"+name, 0); err != nil {
		return &os.PathError{Op: "remove", Path: parent.path + "/" + name, Err: err}
	}
	m.done.Deleted++
	return m.propagate(parent, -size(t.attrs, "blobsize"), at)
}

func (m *mutator) share(t *target) error {
	g := ocis.Grant{Principal: m.uuid(), Permissions: viewerRights, Creator: t.space}
	name, value := g.Attribute()
	m.set(t, name, value)
	if err := m.save(t, t.path); err != nil {
		return err
	}
	m.done.Shared++
	return nil
}

// propagate adds to the sizes and sets the times from a folder up to the root.
func (m *mutator) propagate(t *target, diff, at int64) error {
	for {
		m.set(t, "treesize", number(size(t.attrs, "treesize")+diff))
		if t.attrs.Text("tmtime") < stamp(at) {
			m.set(t, "tmtime", []byte(stamp(at)))
		}
		m.set(t, "tmp.etag", nil)
		if err := m.save(t, t.path); err != nil {
			return err
		}
		if t.id == t.space {
			return nil
		}
		up, err := m.load(t.base, t.space, t.attrs.Text("parentid"))
		if err != nil || up == nil {
			return err
		}
		t = up
	}
}

func size(a ocis.Attributes, name string) int64 {
	n, _ := strconv.ParseInt(a.Text(name), 10, 64)
	return n
}
