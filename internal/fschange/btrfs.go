package fschange

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/btrfsctl"
	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// Since returns what was changed below dir since the mark old, and the mark of dir as it is now.
//
// With view, dir lies in a still view, and the marks are of its source. Else dir is the living directory:
// all that was written before the call is in the list, and all that is written after it will be in the
// next one.
//
// Where no exact list can be had, list is nil and why says it: ErrNoList if the file system keeps none,
// ErrNoMark if it is for the lack of a mark.
// The new mark is "" if nothing exact can begin at it either.
//
// It knows btrfs, and needs root. There each inode bears the number of the transaction that changed it last,
// and so does each entry of a directory, and each block of the tree that holds them: what is older than
// the mark is not even read. An entry that is gone shows in its directory.
func Since(ctx context.Context, dir string, old Mark, view bool) (list *List, now Mark, why error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, "", err
	}
	f, err := os.Open(real)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	t := &tree{fd: int(f.Fd()), items: btrfsctl.Searcher{FD: int(f.Fd())}, ctx: ctx, paths: map[uint64]string{btrfsctl.FirstInode: ""}}
	m, err := t.identify(real, view)
	if err != nil {
		return nil, "", fmt.Errorf("no list of the changes below %s: %w", dir, err)
	}
	list, why = t.since(&m, old)
	if why != nil {
		why = fmt.Errorf("no list of the changes below %s: %w", dir, why)
	}
	if now, err = t.mark(&m); err != nil && why == nil {
		// The list is good; only the next one cannot begin here.
		return list, "", nil
	}
	return list, now, why
}

// Prepare writes out what is in memory of the file system of dir, if it is one that keeps lists: a call of
// Since that comes soon is shorter then. Nothing depends on it.
func Prepare(dir string) {
	f, err := os.Open(dir)
	if err != nil {
		return
	}
	defer f.Close()
	var fs unix.Statfs_t
	if unix.Fstatfs(int(f.Fd()), &fs) == nil && fs.Type == unix.BTRFS_SUPER_MAGIC {
		_ = unix.Syncfs(int(f.Fd()))
	}
}

// btrfsMark is what a Mark holds.
type btrfsMark struct {
	Filesystem btrfsctl.UUID `json:"filesystem"`
	Subvolume  btrfsctl.UUID `json:"subvolume"`
	Received   btrfsctl.UUID `json:"received"`
	Root       uint64        `json:"root"` // the inode of the directory, which is used once in the life of a subvolume
	RootMade   uint64        `json:"root_made"`
	// Generation is the last transaction that is in the picture as a whole. What comes later has a greater one.
	Generation uint64 `json:"generation"`
	// Witnesses are the inodes that were changed last, all of those after From if From is less than
	// Generation. A subvolume that went back in time, with the device below it, does not have them.
	From      uint64    `json:"from"`
	Witnesses []witness `json:"witnesses"`
}

type witness struct {
	Inode   uint64 `json:"i"`
	Changed uint64 `json:"t"`
	Sec     uint64 `json:"s"` // ctime
	Nsec    uint32 `json:"n"`
}

// tree is the tree of one subvolume.
type tree struct {
	ctx    context.Context
	fd     int
	items  btrfsctl.Searcher
	id     uint64 // of the subvolume
	prefix string // of the directory, from the top of the subvolume: "" or with a slash at its end
	paths  map[uint64]string
}

// identify finds out what dir is, and that the list will cover all that is below it.
func (t *tree) identify(dir string, view bool) (m btrfsMark, err error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(t.fd, &fs); err != nil {
		return m, fmt.Errorf("statfs: %w", err)
	}
	if fs.Type != unix.BTRFS_SUPER_MAGIC {
		return m, ErrNoList
	}
	table, err := mountinfo.Self()
	if err != nil {
		return m, err
	}
	for _, x := range table {
		if x.Point != dir && mountinfo.Below(x.Point, dir) {
			return m, fmt.Errorf("something else is mounted at %s", x.Point)
		}
	}
	if !view {
		// What is in memory only is in no tree.
		if err := unix.Syncfs(t.fd); err != nil {
			return m, fmt.Errorf("syncfs: %w", err)
		}
	}
	var fsInfo [1024]byte
	if err := btrfsctl.Call(t.fd, iocFSInfo, unsafe.Pointer(&fsInfo)); err != nil {
		return m, fmt.Errorf("ask for the file system: %w", err)
	}
	copy(m.Filesystem[:], fsInfo[16:])
	var s subvolumeInfo
	if err := btrfsctl.Call(t.fd, iocSubvolumeInfo, unsafe.Pointer(&s)); err != nil {
		return m, fmt.Errorf("ask for the subvolume: %w", err)
	}
	t.id, m.Subvolume, m.Received, m.Generation = s.id, s.own, s.received, s.generation
	if view {
		if s.flags&rootReadOnly == 0 || s.from == (btrfsctl.UUID{}) || s.otransid == 0 {
			return m, errors.New("the view is no read-only snapshot of btrfs")
		}
		m.Subvolume, m.Generation = s.from, s.otransid
	}
	var st unix.Stat_t
	if err := unix.Fstat(t.fd, &st); err != nil {
		return m, fmt.Errorf("stat: %w", err)
	}
	m.Root = st.Ino
	if t.prefix, err = t.dirPath(st.Ino); err != nil {
		return m, err
	}
	err = t.items.Search(t.ctx, btrfsctl.Key{Tree: t.id, MinObject: st.Ino, MaxObject: st.Ino, MaxType: typeInode}, func(it *btrfsctl.Item) error {
		if it.Type == typeInode && len(it.Data) >= inodeSize {
			m.RootMade = le.Uint64(it.Data)
		}
		return nil
	})
	if err != nil {
		return m, err
	}
	if err := t.checkNested(); err != nil {
		return m, err
	}
	if view && s.generation != s.otransid {
		// The driver takes its own directory out of the very top, if that is the data. More must not have
		// happened: the next view does not show it.
		l, err := t.collect(searchBounds{after: m.Generation}, nil)
		if err != nil {
			return m, err
		}
		if l.Len() > 0 {
			return m, errors.New("the view was written to")
		}
	}
	return m, nil
}

// checkNested refuses subvolumes below the directory: they have trees of their own.
func (t *tree) checkNested() error {
	return t.items.Search(t.ctx, btrfsctl.Key{Tree: btrfsctl.RootTree, MinObject: t.id, MaxObject: t.id, MinType: typeRootRef, MaxType: typeRootRef},
		func(it *btrfsctl.Item) error {
			if it.Type != typeRootRef || len(it.Data) < 18 {
				return nil
			}
			dir, err := t.dirPath(le.Uint64(it.Data))
			if errors.Is(err, unix.ENOENT) {
				return nil // just removed
			}
			if err != nil {
				return err
			}
			if strings.HasPrefix(dir, t.prefix) {
				return fmt.Errorf("the subvolume %s lies below it", filepath.Join("/", dir, string(it.Data[18:])))
			}
			return nil
		})
}

// since makes the list, if old is a moment in the life of what m is of.
func (t *tree) since(m *btrfsMark, old Mark) (*List, error) {
	if old == "" {
		return nil, ErrNoMark
	}
	var o btrfsMark
	if err := json.Unmarshal([]byte(old), &o); err != nil {
		return nil, fmt.Errorf("the earlier state cannot be read: %w", err)
	}
	switch {
	case o.Filesystem != m.Filesystem:
		return nil, errors.New("it lies on another file system than before")
	case o.Subvolume != m.Subvolume || o.Received != m.Received:
		return nil, errors.New("it lies in another subvolume than before")
	case o.Root != m.Root || o.RootMade != m.RootMade:
		return nil, errors.New("it is another directory than before")
	case o.Generation > m.Generation || o.From > o.Generation || len(o.Witnesses) == 0:
		return nil, errors.New("the subvolume is older than it was")
	}
	return t.collect(searchBounds{after: o.Generation, from: o.From}, o.Witnesses)
}

var errWentBack = errors.New("the subvolume went back to an earlier state")

// searchBounds: changes are those after a transaction; from is where comparing with witnesses begins.
type searchBounds struct{ after, from uint64 }

// link is a name of an inode.
type link struct {
	parent uint64
	name   string
}

type changedInode struct {
	number, links uint64
	names         []link
}

// collect lists what was changed after a transaction, and compares what was changed before it with the
// witnesses, if there are any.
func (t *tree) collect(b searchBounds, witnesses []witness) (*List, error) {
	known := make(map[uint64]*witness, len(witnesses))
	for i := range witnesses {
		known[witnesses[i].Inode] = &witnesses[i]
	}
	same := 0
	var changed []changedInode
	arrived := map[uint64]bool{}
	low := b.after
	if len(known) > 0 {
		low = min(low, b.from)
	}
	err := t.items.Search(t.ctx, btrfsctl.Key{Tree: t.id, MinObject: btrfsctl.FirstInode, MaxObject: btrfsctl.LastObject, MaxType: 255, MinTransid: low + 1},
		func(it *btrfsctl.Item) error {
			switch {
			case it.Type == typeInode && it.Offset == 0 && len(it.Data) >= inodeSize:
				n, w := readInode(it.Object, it.Data)
				if w.Changed > b.after {
					if len(changed) >= listMost {
						return fmt.Errorf("more than %d entries were changed", listMost)
					}
					changed = append(changed, n)
				} else if k := known[it.Object]; k != nil {
					if *k != w {
						return errWentBack
					}
					same++
				} else if len(known) > 0 && w.Changed > b.from {
					return errWentBack
				}
			case (it.Type == typeInodeRef || it.Type == typeInodeExtref) && len(changed) > 0 && changed[len(changed)-1].number == it.Object:
				c := &changed[len(changed)-1]
				return readRefs(it, &c.names)
			case it.Type == typeDirIndex && len(it.Data) >= 30:
				// struct btrfs_dir_item: location 17 (its type at 8), transid 8, lengths 2 and 2, type 1
				if le.Uint64(it.Data[17:]) > b.after && it.Data[8] == typeInode && it.Data[29] == dirEntryIsDir {
					arrived[le.Uint64(it.Data)] = true
				}
			}
			return nil
		})
	if err != nil {
		return nil, err
	}
	if len(known) > 0 && b.from == b.after {
		if same, err = t.ask(witnesses, b.after); err != nil {
			return nil, err
		}
	}
	if len(known) > 0 && same == 0 {
		return nil, errors.New("nothing in the subvolume proves that it is the one of before")
	}
	return t.resolve(changed, arrived)
}

// ask compares inodes one by one and returns how many are as they were.
func (t *tree) ask(witnesses []witness, after uint64) (same int, err error) {
	for i := range witnesses {
		w := &witnesses[i]
		err := t.items.Search(t.ctx, btrfsctl.Key{Tree: t.id, MinObject: w.Inode, MaxObject: w.Inode, MaxType: typeInode}, func(it *btrfsctl.Item) error {
			if it.Type != typeInode || len(it.Data) < inodeSize {
				return nil
			}
			if _, now := readInode(it.Object, it.Data); now == *w {
				same++
			} else if now.Changed <= after {
				return errWentBack
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	return same, nil
}

// resolve finds the paths of inodes.
func (t *tree) resolve(changed []changedInode, arrived map[uint64]bool) (*List, error) {
	l := newList()
	for i := range changed {
		c := &changed[i]
		if c.number == btrfsctl.FirstInode || c.links == 0 { // the very top; what has no name any more
			continue
		}
		// The names follow the inode, but can lie in a block that has not changed.
		if uint64(len(c.names)) != c.links {
			c.names = nil
			err := t.items.Search(t.ctx, btrfsctl.Key{Tree: t.id, MinObject: c.number, MaxObject: c.number, MinType: typeInodeRef, MaxType: typeInodeExtref},
				func(it *btrfsctl.Item) error {
					if it.Type != typeInodeRef && it.Type != typeInodeExtref {
						return nil
					}
					return readRefs(it, &c.names)
				})
			if err != nil {
				return nil, err
			}
			if len(c.names) == 0 {
				return nil, fmt.Errorf("inode %d has no name", c.number)
			}
		}
		for _, n := range c.names {
			dir, err := t.dirPath(n.parent)
			if err != nil {
				return nil, err
			}
			if !strings.HasPrefix(dir, t.prefix) {
				continue
			}
			if len(l.changed) >= listMost {
				return nil, fmt.Errorf("more than %d entries were changed", listMost)
			}
			l.add(dir[len(t.prefix):]+n.name, arrived[c.number])
		}
	}
	return l, nil
}

// dirPath returns the path of a directory from the top of the subvolume, "" or with a slash at the end.
func (t *tree) dirPath(inode uint64) (string, error) {
	if p, ok := t.paths[inode]; ok {
		return p, nil
	}
	name, _, err := btrfsctl.Lookup(t.fd, t.id, inode)
	if err != nil {
		return "", fmt.Errorf("find the path of inode %d: %w", inode, err)
	}
	t.paths[inode] = name
	return name, nil
}

// Witnesses: at least so many if there are, and never more than so many.
const (
	witnessesWanted = 64
	witnessesMost   = 1024
)

// mark completes m by witnesses.
func (t *tree) mark(m *btrfsMark) (Mark, error) {
	m.From = m.Generation
	for back := uint64(1); ; back *= 8 {
		from := m.Generation - min(back, m.Generation)
		var list []witness
		most := witnessesMost
		if m.From == m.Generation {
			most = witnessesWanted // the very last transaction may have changed millions: a few of them do
		}
		full := false
		err := t.items.Search(t.ctx, btrfsctl.Key{Tree: t.id, MinObject: btrfsctl.FirstInode, MaxObject: btrfsctl.LastObject, MaxType: 255, MinTransid: from + 1},
			func(it *btrfsctl.Item) error {
				if it.Type != typeInode || len(it.Data) < inodeSize {
					return nil
				}
				if _, w := readInode(it.Object, it.Data); w.Changed > from && w.Changed <= m.Generation {
					if len(list) >= most {
						full = true
						return btrfsctl.ErrStop
					}
					list = append(list, w)
				}
				return nil
			})
		if err != nil {
			return "", err
		}
		if full && len(m.Witnesses) > 0 {
			break
		}
		m.Witnesses = list
		if full {
			break
		}
		if len(list) > 0 {
			m.From = from
		}
		if len(list) >= witnessesWanted || from == 0 {
			break
		}
	}
	if len(m.Witnesses) == 0 {
		return "", errors.New("the subvolume has no inodes")
	}
	p, err := json.Marshal(m)
	return Mark(p), err
}

func readInode(number uint64, item []byte) (changedInode, witness) {
	return changedInode{number: number, links: uint64(le.Uint32(item[40:]))},
		witness{Inode: number, Changed: le.Uint64(item[8:]), Sec: le.Uint64(item[124:]), Nsec: le.Uint32(item[132:])}
}

// readRefs reads the names of an inode. struct btrfs_inode_ref: index 8, length 2, the name; the parent is
// the offset. struct btrfs_inode_extref: parent 8, index 8, length 2, the name.
func readRefs(it *btrfsctl.Item, out *[]link) error {
	item := it.Data
	for len(item) > 0 {
		parent, head := it.Offset, 10
		if it.Type == typeInodeExtref {
			head = 18
		}
		if len(item) < head {
			return fmt.Errorf("a name of inode %d is cut off", it.Object)
		}
		if it.Type == typeInodeExtref {
			parent = le.Uint64(item)
		}
		n := int(le.Uint16(item[head-2:]))
		if len(item) < head+n {
			return fmt.Errorf("a name of inode %d is cut off", it.Object)
		}
		*out = append(*out, link{parent, string(item[head : head+n])})
		item = item[head+n:]
	}
	return nil
}
