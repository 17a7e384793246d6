// Package mount shows snapshots as a read-only file system (FUSE):
//
//	snapshots/2026-11-20T14-00-00Z/personal/alan/...        the space as its users see it
//	snapshots/2026-11-20T14-00-00Z/personal/alan/.versions/<path>/<time>
//	snapshots/2026-11-20T14-00-00Z/personal/alan/.trash/<time deleted>/<name>
//	snapshots/latest                                         a link to the newest
//
// What is needed is read when it is asked for. Memory is bounded: what was listed last is kept, up to a
// number of entries, a few contents, and as many entries as the kernel knows of; it is told to forget the oldest.
package mount

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Options say what to show and to whom.
type Options struct {
	// AllowOther lets every user of the machine read everything.
	AllowOther bool
	// Warn is told of what could not be read; the reader of the file system sees only an I/O error.
	Warn func(err error)
}

// Bounds of memory. An entry in a list takes about 700 bytes, one that the kernel knows about 600.
const (
	openViews  = 4
	chunkBytes = 64 << 20
)

var ( // variables for tests
	listedEntries = 250_000
	knownEntries  = 200_000
)

// timeout is how long the kernel may believe what it was told: snapshots never change.
const timeout = time.Hour

// Server is a mounted file system.
type Server struct {
	repo   browse.Repo
	o      Options
	dir    string
	fuse   *fuse.Server
	chunks *browse.ChunkCache
	root   *dir
	began  time.Time
	uid    uint32
	gid    uint32

	mu     sync.Mutex
	views  []*snap // those that are open, newest first
	lists  map[string]*listing
	order  []string // keys of lists, oldest first
	listed int
	known  []knownEntry // a ring, oldest at next
	next   int
	forget chan knownEntry
	done   chan struct{}
}

type knownEntry struct {
	parent *fs.Inode
	name   string
}

// snap is one snapshot; its View is opened when it is needed.
type snap struct {
	sn   *snapshot.Snapshot
	name string
	view *browse.View // guarded by Server.mu
}

// Mount shows the snapshots in the folder dir, which must exist. The index of the repository must be loaded.
func Mount(r browse.Repo, list []*snapshot.Snapshot, dir string, o Options) (*Server, error) {
	if o.Warn == nil {
		o.Warn = func(error) {}
	}
	s := &Server{
		repo: r, o: o, dir: dir, chunks: browse.NewChunkCache(chunkBytes), began: time.Now(), uid: uint32(os.Geteuid()), gid: uint32(os.Getegid()),
		lists: map[string]*listing{}, forget: make(chan knownEntry, 1024), done: make(chan struct{}),
	}
	if _, err := os.Stat(dir); errors.Is(err, unix.ENOTCONN) { // one of ours was killed there
		if err := detach(dir); err != nil {
			return nil, fmt.Errorf("a dead mount is at %q: %w", dir, err)
		}
	}
	var snaps []*snap
	taken := map[string]bool{}
	for _, sn := range list {
		name := sn.Time.UTC().Format("2006-01-02T15-04-05Z")
		if taken[name] {
			name += "-" + sn.ID().Short()
		}
		taken[name] = true
		snaps = append(snaps, &snap{sn: sn, name: name})
	}
	root := s.newDir("", s.began, func(context.Context) ([]child, error) {
		return []child{{name: "snapshots", mtime: s.began, list: func(context.Context) ([]child, error) { return s.snapshots(snaps), nil }, key: "/"}}, nil
	})
	s.root = root
	long := timeout
	server, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{
			FsName: "holdfast", Name: "holdfast", AllowOther: o.AllowOther, DisableXAttrs: true, DirectMount: os.Geteuid() == 0,
			Options: []string{"ro", "nodev", "nosuid", "noexec", "default_permissions"}, Logger: log.New(discard{}, "", 0),
			DirectMountFlags: syscall.MS_RDONLY | syscall.MS_NODEV | syscall.MS_NOSUID | syscall.MS_NOEXEC,
		},
		EntryTimeout: &long, AttrTimeout: &long, NegativeTimeout: &long, Logger: log.New(discard{}, "", 0),
	})
	if err != nil {
		return nil, err
	}
	s.fuse = server
	go s.forgetting()
	return s, nil
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// Wait returns when the file system was unmounted.
func (s *Server) Wait() {
	s.fuse.Wait()
	close(s.done)
}

// Unmount ends it. Where somebody still uses it, it vanishes for all others at once, and for them when they
// are through.
func (s *Server) Unmount() error {
	err := s.fuse.Unmount()
	for range 10 {
		if err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
		err = s.fuse.Unmount()
	}
	if derr := detach(s.dir); derr != nil {
		return errors.Join(err, derr)
	}
	return nil
}

// detach takes a mount out of the tree of files, whoever uses it.
func detach(dir string) error {
	if os.Geteuid() == 0 {
		return unix.Unmount(dir, unix.MNT_DETACH)
	}
	var errs []error
	for _, program := range []string{"fusermount3", "fusermount"} {
		out, err := exec.Command(program, "-u", "-z", "--", dir).CombinedOutput()
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w: %s", program, err, strings.TrimSpace(string(out))))
	}
	return errors.Join(errs...)
}

// forgetting asks the kernel to forget entries. It may not be done within a request, which the kernel waits for.
func (s *Server) forgetting() {
	for {
		select {
		case k := <-s.forget:
			k.parent.NotifyEntry(k.name)
		case <-s.done:
			return
		}
	}
}

// know remembers that the kernel knows of an entry, and lets it forget the oldest.
func (s *Server) know(parent *fs.Inode, name string) {
	s.mu.Lock()
	k := knownEntry{parent, name}
	var old knownEntry
	if len(s.known) < knownEntries {
		s.known = append(s.known, k)
	} else {
		old, s.known[s.next] = s.known[s.next], k
		s.next = (s.next + 1) % knownEntries
	}
	s.mu.Unlock()
	if old.parent != nil {
		select {
		case s.forget <- old:
		case <-s.done:
		}
	}
}

// view opens a snapshot, or returns it if it is one of those that are open.
func (s *Server) view(ctx context.Context, sn *snap) (*browse.View, error) {
	s.mu.Lock()
	v := sn.view
	s.mu.Unlock()
	if v == nil {
		var err error
		if v, err = browse.Open(ctx, s.repo, sn.sn); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sn.view = v
	for i, x := range s.views {
		if x == sn {
			s.views = append(s.views[:i], s.views[i+1:]...)
			break
		}
	}
	s.views = append([]*snap{sn}, s.views...)
	if len(s.views) > openViews {
		s.views[openViews].view = nil
		s.views = s.views[:openViews]
	}
	return v, nil
}

// child is an entry of a folder.
type child struct {
	name  string
	mtime time.Time
	// A folder: list gives what is in it; key names the list in the cache.
	list func(ctx context.Context) ([]child, error)
	key  string
	node *snapshot.Node // a file
	link string         // a symbolic link
}

func (c *child) mode() uint32 {
	switch {
	case c.list != nil:
		return syscall.S_IFDIR
	case c.link != "":
		return syscall.S_IFLNK
	}
	return syscall.S_IFREG
}

// listing is what is in one folder.
type listing struct {
	list   []child
	byName map[string]int
}

// children returns what is in a folder, from the cache if it is there.
func (s *Server) children(ctx context.Context, d *dir) (*listing, error) {
	s.mu.Lock()
	l := s.lists[d.key]
	s.mu.Unlock()
	if l != nil {
		return l, nil
	}
	list, err := d.list(ctx)
	if err != nil {
		return nil, err
	}
	l = &listing{list: list, byName: make(map[string]int, len(list))}
	for i := range list {
		// Names that are no names, and names that are there twice, get others.
		name := safeName(list[i].name)
		for n := 2; ; n++ {
			if _, ok := l.byName[name]; !ok {
				break
			}
			name = fmt.Sprintf("%.240s (%d)", safeName(list[i].name), n)
		}
		list[i].name = name
		l.byName[name] = i
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lists[d.key] == nil {
		s.lists[d.key] = l
		s.order = append(s.order, d.key)
		s.listed += len(list) + 1
		for s.listed > listedEntries && len(s.order) > 1 {
			old := s.order[0]
			s.order = s.order[1:]
			s.listed -= len(s.lists[old].list) + 1
			delete(s.lists, old)
		}
	}
	return l, nil
}

// safeName makes any string the name of a file.
func safeName(name string) string {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > 255 {
		return snapshot.SafeName(name)
	}
	return name
}

func (s *Server) snapshots(snaps []*snap) []child {
	var out []child
	for _, sn := range snaps {
		out = append(out, child{name: sn.name, mtime: sn.sn.Time, key: sn.name, list: func(ctx context.Context) ([]child, error) {
			v, err := s.view(ctx, sn)
			if err != nil {
				return nil, err
			}
			return s.folders(sn, v, ""), nil
		}})
	}
	if len(snaps) > 0 {
		last := snaps[len(snaps)-1]
		out = append(out, child{name: "latest", mtime: last.sn.Time, link: last.name})
	}
	return out
}

// folders lists the part of the spaces' folders that lies below prefix: personal, project, and then the spaces.
func (s *Server) folders(sn *snap, v *browse.View, prefix string) []child {
	var out []child
	seen := map[string]bool{}
	for _, sp := range v.Spaces() {
		rest, ok := strings.CutPrefix(sp.Folder, prefix)
		if !ok {
			continue
		}
		head, _, more := strings.Cut(rest, "/")
		if seen[head] {
			continue
		}
		seen[head] = true
		key := sn.name + "/" + prefix + head
		if more {
			out = append(out, child{name: head, mtime: sn.sn.Time, key: key, list: func(ctx context.Context) ([]child, error) {
				v, err := s.view(ctx, sn)
				if err != nil {
					return nil, err
				}
				return s.folders(sn, v, prefix+head+"/"), nil
			}})
			continue
		}
		mtime := sn.sn.Time
		out = append(out, child{name: head, mtime: mtime, key: key, list: s.space(sn, sp.Store, sp.ID)})
	}
	return out
}

// space lists the root of a space with its versions and trash.
func (s *Server) space(sn *snap, store, spaceID string) func(ctx context.Context) ([]child, error) {
	return func(ctx context.Context) ([]child, error) {
		v, err := s.view(ctx, sn)
		if err != nil {
			return nil, err
		}
		sp := v.SpaceByID(spaceID)
		if sp == nil || sp.Store != store {
			return nil, snapshot.ErrNoSuchPath
		}
		var out []child
		for _, part := range []struct{ name, top string }{{".versions", "versions"}, {".trash", "trash"}} {
			n, err := v.Part(ctx, sp, part.top)
			if err != nil {
				return nil, err
			}
			if n != nil {
				out = append(out, s.child(sn, store, spaceID, part.name, n))
			}
		}
		root, err := v.Part(ctx, sp, "spaces")
		if err != nil || root == nil {
			return out, err
		}
		list, err := s.nodes(sn, store, spaceID, root)(ctx)
		return append(out, list...), err
	}
}

func (s *Server) child(sn *snap, store, spaceID, name string, n *snapshot.Node) child {
	c := child{name: name, mtime: n.ModTime}
	if n.Type == snapshot.Dir {
		c.list = s.nodes(sn, store, spaceID, n)
		// One folder of one space looks the same in every snapshot that has it.
		c.key = store + "\x00" + spaceID + "\x00" + n.Subtree.String()
		return c
	}
	c.node = n
	return c
}

// nodes lists a folder of a space. What is neither file nor folder is left out: a link could lead anywhere.
func (s *Server) nodes(sn *snap, store, spaceID string, n *snapshot.Node) func(ctx context.Context) ([]child, error) {
	return func(ctx context.Context) ([]child, error) {
		v, err := s.view(ctx, sn)
		if err != nil {
			return nil, err
		}
		sp := v.SpaceByID(spaceID)
		if sp == nil || sp.Store != store {
			return nil, snapshot.ErrNoSuchPath
		}
		list, err := v.Nodes(ctx, sp, n)
		if err != nil {
			return nil, err
		}
		out := make([]child, 0, len(list))
		for _, x := range list {
			if x.Node.Type == snapshot.Dir || x.Node.Type == snapshot.File {
				out = append(out, s.child(sn, store, spaceID, x.Name, x.Node))
			}
		}
		return out, nil
	}
}
