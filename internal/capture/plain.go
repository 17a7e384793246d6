package capture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// plainData captures the data sets of this part that are plain files: config and system data.
func (c *capturer) plainData(ctx context.Context) error {
	for i := range c.opts.Instance.DataSets {
		d := &c.opts.Instance.DataSets[i]
		if _, read := c.sets[i]; d.Store != "" || !c.wanted(d.Path, read) {
			continue
		}
		md := manifestDataSet(d)
		switch {
		case c.opts.Exclude[d.Name]:
			md.Excluded = true
		case d.Found:
			parent, name := c.root.sub("system"), d.Name
			if d.Kind == ocis.Config && d.Name == "config" {
				parent, name = c.root.sub("config"), "files"
			}
			n, entries, bytes, err := c.plainSet(ctx, i, name)
			if err != nil {
				return fmt.Errorf("capture %s (%s): %w", d.Name, d.Path, err)
			}
			if n.Type != snapshot.Dir { // a single file stands in a folder of the data set's name
				parent, md.Tree = parent.sub(name), inSnapshot("system", name, n.Name)
			} else {
				md.Tree = inSnapshot("system", name)
				if parent == c.root.folders["config"] {
					md.Tree = "/config/files"
				}
			}
			parent.kids[n.Name] = n
			md.Captured, md.Entries, md.Bytes = true, entries, bytes
		}
		c.sets[i] = md
	}
	return nil
}

// environment captures what configures the instance from outside.
func (c *capturer) environment(ctx context.Context) error {
	env := c.root.sub("config").sub("environment")
	for _, f := range c.opts.Instance.Environment {
		dir, name := path.Split(path.Clean("/" + f.Name)) // cleaned: a name never leaves the folder
		var n *snapshot.Node
		var err error
		if f.Path != "" {
			n, err = c.singleFile(ctx, c.part.View(f.Path), name)
		} else {
			n, err = c.dataNode(ctx, name, f.Content)
		}
		if err != nil {
			return fmt.Errorf("capture %s: %w", f.Name, err)
		}
		env.sub(dir).put(n, "")
	}
	return nil
}

// plainDir is a directory on the way from the root of a data set to the entry at hand.
type plainDir struct {
	rel  string
	node *snapshot.Node
	kids []*snapshot.Node
}

// plainSet captures the data set i and returns its node, named name if it is a directory.
func (c *capturer) plainSet(ctx context.Context, i int, name string) (top *snapshot.Node, entries, bytes int64, err error) {
	d := &c.opts.Instance.DataSets[i]
	src := c.part.View(d.Path)
	r, err := openRoot(src)
	if errors.Is(err, unix.ENOTDIR) {
		n, err := c.singleFile(ctx, src, filepath.Base(src))
		if err != nil {
			return nil, 0, 0, err
		}
		return n, 1, int64(n.Size), nil
	}
	if err != nil {
		return nil, 0, 0, err
	}
	defer r.close()
	old := c.opts.Cache.plain[d.Name]
	next := &cachedPlain{files: map[string]*cachedFile{}}
	c.next.plain[d.Name] = next
	det := newDetails(r)
	defer det.close()
	g, gctx := c.errgroup(ctx, cap(c.slots))
	var links hardlinks
	// Readers link whatever shares a pair of numbers, so that must be unique in the snapshot.
	device, linkGroups := uint64(i+1), uint64(0)
	groups := map[string]*snapshot.Node{} // first names of hard-link groups
	var stack []*plainDir
	var all []*plainDir
	lost := map[*snapshot.Node]bool{}
	skip, _ := c.nested(d.Path)
	sc := &scanner{
		r: r, workers: 2, ahead: c.opts.Limits.Ahead, skip: skip,
		unreadable: func(rel string, err error) { c.unreadable(r.abs(rel), err) },
	}
	err = sc.walk(gctx, "", func(e *entry) error {
		entries++
		c.entries.Add(1)
		n, err := plainNode(det, e, e.base())
		if err != nil {
			c.unreadable(r.abs(e.path), err)
			if !e.isDir() {
				return nil
			}
			n = &snapshot.Node{Name: e.base(), Type: snapshot.Dir}
			setStat(n, e)
		}
		for len(stack) > 0 && !within(e.path, stack[len(stack)-1].rel) {
			stack = stack[:len(stack)-1]
		}
		if len(stack) > 0 {
			p := stack[len(stack)-1]
			p.kids = append(p.kids, n)
		} else {
			n.Name, top = name, n
		}
		switch {
		case e.isDir():
			c.dirs.Add(1)
			pd := &plainDir{rel: e.path, node: n}
			stack, all = append(stack, pd), append(all, pd)
			return nil
		case !e.isRegular():
			return nil
		}
		bytes += e.size
		c.files.Add(1)
		c.bytes.Add(e.size)
		if first := links.see(e); first != "" {
			f := groups[first]
			if f.Inode == 0 {
				linkGroups++
				f.Inode, f.DeviceID = linkGroups, device
			}
			n.Inode, n.DeviceID = f.Inode, device
			groups[e.path] = n
		} else if e.nlink > 1 {
			groups[e.path] = n
		}
		if old != nil && !c.opts.FullScan {
			if f := old.files[e.path]; f != nil && f.size == e.size && f.mtime == e.mtime && f.ctime == e.ctime && c.hasAll(f.ids) {
				setContent(n, content{ids: f.ids, size: f.size, holes: f.holes})
				c.mu.Lock() // others are being read meanwhile
				next.files[e.path] = f
				c.mu.Unlock()
				return nil
			}
		}
		g.Go(func() error {
			got, err := c.saver.path(gctx, r, e, false)
			var re *readError
			if errors.As(err, &re) {
				c.unreadable(r.abs(e.path), re.err)
				c.mu.Lock()
				lost[n] = true
				c.mu.Unlock()
				return nil
			}
			if err != nil {
				return err
			}
			setContent(n, got)
			if !c.racyTime(e.ctime) && got.size == e.size {
				c.mu.Lock()
				next.files[e.path] = &cachedFile{size: e.size, mtime: e.mtime, ctime: e.ctime, holes: got.holes, ids: got.ids}
				c.mu.Unlock()
			}
			return nil
		})
		return nil
	})
	if werr := g.Wait(); werr != nil {
		err = werr
	}
	if err != nil {
		return nil, 0, 0, err
	}
	if top == nil {
		return nil, 0, 0, errors.New("the data set is gone")
	}
	finishLinks(groups)
	for i := len(all) - 1; i >= 0; i-- { // children come after their directory
		kids := all[i].kids[:0]
		for _, k := range all[i].kids {
			if !lost[k] {
				kids = append(kids, k)
			}
		}
		if all[i].node.Subtree, err = saveTree(ctx, c.target, kids); err != nil {
			return nil, 0, 0, err
		}
	}
	return top, entries, bytes, nil
}

// finishLinks gives all members of a hard-link group the count of the group.
func finishLinks(groups map[string]*snapshot.Node) {
	count := map[uint64]uint64{}
	for _, n := range groups {
		count[n.Inode]++
	}
	for _, n := range groups {
		if n.Inode != 0 { // 0: the other names are outside of the data set
			n.Links = count[n.Inode]
		}
	}
}

// within reports whether p lies below dir.
func within(p, dir string) bool {
	return dir == "" && p != "" || strings.HasPrefix(p, dir+"/")
}

// plainNode makes the node of e without its content.
func plainNode(d *details, e *entry, name string) (*snapshot.Node, error) {
	n := &snapshot.Node{Name: name}
	setStat(n, e)
	x, err := d.xattrs(e.path)
	if err != nil {
		return nil, err
	}
	for _, a := range x {
		n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: a.name, Value: a.value})
	}
	if e.isSymlink() {
		if n.LinkTarget, err = d.readlink(e.path); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// setStat copies what stat tells into n.
func setStat(n *snapshot.Node, e *entry) {
	n.Mode = fs.FileMode(e.mode & 0o777)
	if e.mode&unix.S_ISUID != 0 {
		n.Mode |= fs.ModeSetuid
	}
	if e.mode&unix.S_ISGID != 0 {
		n.Mode |= fs.ModeSetgid
	}
	if e.mode&unix.S_ISVTX != 0 {
		n.Mode |= fs.ModeSticky
	}
	switch e.mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.Type = snapshot.File
	case unix.S_IFDIR:
		n.Type, n.Mode = snapshot.Dir, n.Mode|fs.ModeDir
	case unix.S_IFLNK:
		n.Type, n.Mode = snapshot.Symlink, n.Mode|fs.ModeSymlink
	case unix.S_IFIFO:
		n.Type, n.Mode = snapshot.FIFO, n.Mode|fs.ModeNamedPipe
	case unix.S_IFSOCK:
		n.Type, n.Mode = snapshot.Socket, n.Mode|fs.ModeSocket
	case unix.S_IFCHR:
		n.Type, n.Mode, n.Device = snapshot.CharDev, n.Mode|fs.ModeDevice|fs.ModeCharDevice, e.rdev
	case unix.S_IFBLK:
		n.Type, n.Mode, n.Device = snapshot.Dev, n.Mode|fs.ModeDevice, e.rdev
	}
	n.UID, n.GID = e.uid, e.gid
	n.ModTime = time.Unix(e.mtime.sec, e.mtime.nsec).UTC()
}

// setContent puts what was saved into n.
func setContent(n *snapshot.Node, got content) {
	n.Content, n.Size = got.ids, uint64(got.size)
	if len(got.holes) > 0 {
		n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: snapshot.AttrHoles, Value: []byte(pax.FormatHoles(got.holes))})
	}
}
