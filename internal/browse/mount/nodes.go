package mount

import (
	"context"
	"errors"
	"io"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// dir is a folder.
type dir struct {
	fs.Inode
	s     *Server
	key   string
	mtime time.Time
	list  func(ctx context.Context) ([]child, error)
}

var (
	_ fs.NodeLookuper  = (*dir)(nil)
	_ fs.NodeReaddirer = (*dir)(nil)
	_ fs.NodeGetattrer = (*dir)(nil)
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeGetattrer = (*file)(nil)
)

func (s *Server) newDir(key string, mtime time.Time, list func(ctx context.Context) ([]child, error)) *dir {
	return &dir{s: s, key: key, mtime: mtime, list: list}
}

// attr fills in what all entries share.
func (s *Server) attr(out *fuse.Attr, perm uint32, mtime time.Time, size uint64) {
	if !s.o.AllowOther {
		perm &= 0o700
	}
	out.Mode = perm
	out.Owner = fuse.Owner{Uid: s.uid, Gid: s.gid}
	if mtime.Unix() < 0 { // before the epoch: the protocol has unsigned seconds
		mtime = time.Unix(0, 0)
	}
	out.SetTimes(&mtime, &mtime, &mtime)
	out.Size, out.Blocks = size, (size+511)/512
	out.Nlink = 1
}

// errno tells the kernel of an error, and people by way of Warn.
func (s *Server) errno(ctx context.Context, err error) syscall.Errno {
	switch {
	case errors.Is(err, snapshot.ErrNoSuchPath):
		return syscall.ENOENT
	case ctx.Err() != nil || errors.Is(err, context.Canceled):
		return syscall.EINTR
	}
	s.o.Warn(err)
	return syscall.EIO
}

func (d *dir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.s.attr(&out.Attr, syscall.S_IFDIR|0o555, d.mtime, 0)
	return 0
}

func (d *dir) Readdir(ctx context.Context) (fs.DirStream, syscall.Errno) {
	l, err := d.s.children(ctx, d)
	if err != nil {
		return nil, d.s.errno(ctx, err)
	}
	out := make([]fuse.DirEntry, len(l.list))
	for i := range l.list {
		out[i] = fuse.DirEntry{Name: l.list[i].name, Mode: l.list[i].mode()}
	}
	return fs.NewListDirStream(out), 0
}

func (d *dir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	l, err := d.s.children(ctx, d)
	if err != nil {
		return nil, d.s.errno(ctx, err)
	}
	i, ok := l.byName[name]
	if !ok {
		return nil, syscall.ENOENT
	}
	c := &l.list[i]
	d.s.know(d.EmbeddedInode(), name)
	id := fs.StableAttr{Mode: c.mode()}
	switch {
	case c.list != nil:
		d.s.attr(&out.Attr, syscall.S_IFDIR|0o555, c.mtime, 0)
		return d.NewInode(ctx, d.s.newDir(c.key, c.mtime, c.list), id), 0
	case c.link != "":
		d.s.attr(&out.Attr, syscall.S_IFLNK|0o777, c.mtime, uint64(len(c.link)))
		return d.NewInode(ctx, &fs.MemSymlink{Data: []byte(c.link)}, id), 0
	}
	d.s.attr(&out.Attr, syscall.S_IFREG|0o444, c.mtime, c.node.Size)
	return d.NewInode(ctx, &file{s: d.s, node: c.node}, id), 0
}

// file is a file.
type file struct {
	fs.Inode
	s    *Server
	node *snapshot.Node
}

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.s.attr(&out.Attr, syscall.S_IFREG|0o444, f.node.ModTime, f.node.Size)
	return 0
}

func (f *file) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EROFS
	}
	c, err := browse.OpenContent(f.s.repo, f.node)
	if err != nil {
		return nil, 0, f.s.errno(ctx, err)
	}
	c.Share(f.s.chunks)
	return &handle{f.s, c}, fuse.FOPEN_KEEP_CACHE, 0
}

// handle is a file that is open.
type handle struct {
	s *Server
	c *browse.Content
}

var _ fs.FileReader = (*handle)(nil)

func (h *handle) Read(ctx context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := h.c.ReadAt(ctx, p, off)
	if err != nil && err != io.EOF {
		return nil, h.s.errno(ctx, err)
	}
	return fuse.ReadResultData(p[:n]), 0
}
