package browse

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// A history is what changed from one snapshot to the next, for a whole row of them: a list of what came and
// went, in the order of the snapshots. What one snapshot changed is a block of its own and is kept in a file,
// since it never changes: to look through a thousand snapshots is then to read one list of what there was once,
// and a thousand short ones. A block is read as a stream, so that memory does not follow the size of a store.

// History looks through snapshots.
type History struct {
	// Repo gives the repository with its index loaded. It is called when a block has to be made.
	Repo func(ctx context.Context) (Repo, error)
	// Dir keeps the blocks; "" is nowhere. They hold names, so it is for the owner alone.
	Dir string
	// Warn is told of what does not stop the work.
	Warn func(err error)
	// Progress is told how many snapshots have been looked through.
	Progress func(done, total int)
}

// SpaceInfo is what a history tells of a space.
type SpaceInfo struct {
	ID, Store, Folder, Name, Kind string
	MountID                       string
}

// FileID is the id of an item as users' tools know it; see View.FileID.
func (s *SpaceInfo) FileID(nodeID string) string {
	if nodeID == "" {
		return ""
	}
	if s.MountID != "" {
		return s.MountID + "$" + s.ID + "!" + nodeID
	}
	return s.ID + "!" + nodeID
}

// visitor is told what came and went, from one snapshot to the next.
type visitor interface {
	// space tells that what follows is about the space s. gone: it is not there any more.
	space(s *SpaceInfo, gone bool)
	came(e *rawEntry)
	went(e *rawEntry)
}

// rawEntry is an Entry whose texts are valid during the call only.
type rawEntry struct {
	kind                      Kind
	path, stamp, nodeID, sha1 []byte
	dir                       bool
	size                      uint64
	sec, nsec                 int64
}

func (e *rawEntry) entry() *Entry {
	return &Entry{
		Kind: e.kind, Path: string(e.path), Stamp: string(e.stamp), Dir: e.dir, NodeID: string(e.nodeID), SHA1: string(e.sha1),
		Size: e.size, MTime: time.Unix(e.sec, e.nsec).UTC(),
	}
}

func rawOf(e *Entry) *rawEntry {
	return &rawEntry{
		kind: e.Kind, path: []byte(e.Path), stamp: []byte(e.Stamp), nodeID: []byte(e.NodeID), sha1: []byte(e.SHA1), dir: e.Dir,
		size: e.Size, sec: e.MTime.Unix(), nsec: int64(e.MTime.Nanosecond()),
	}
}

// walk visits the changes of a row of snapshots, oldest first; after is called when all of one are through.
func (h *History) walk(ctx context.Context, row []*snapshot.Snapshot, v visitor, after func(*snapshot.Snapshot) error) error {
	var last *View // of the snapshot before, if it was opened
	for i, sn := range row {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var before *snapshot.Snapshot
		if i > 0 {
			before = row[i-1]
		}
		name := blockName(before, sn)
		path := ""
		if h.Dir != "" {
			path = filepath.Join(h.Dir, name)
		}
		if path == "" || readBlock(path, v) != nil {
			view, err := h.make(ctx, before, last, sn, path, v)
			if err != nil {
				return fmt.Errorf("snapshot %s: %w", sn.ID().Short(), err)
			}
			last = view
		} else {
			last = nil
		}
		if err := after(sn); err != nil {
			return err
		}
		if h.Progress != nil {
			h.Progress(i+1, len(row))
		}
	}
	return nil
}

// prune removes the blocks that none of the rows needs.
func (h *History) prune(rows [][]*snapshot.Snapshot) {
	if h.Dir == "" {
		return
	}
	used := map[string]bool{}
	for _, row := range rows {
		var before *snapshot.Snapshot
		for _, sn := range row {
			used[blockName(before, sn)] = true
			before = sn
		}
	}
	list, err := os.ReadDir(h.Dir)
	if err != nil {
		return
	}
	for _, f := range list {
		if strings.HasSuffix(f.Name(), blockSuffix) && !used[f.Name()] {
			_ = os.Remove(filepath.Join(h.Dir, f.Name()))
		}
	}
}

const blockSuffix = ".changes"

// blockName names what changed between two snapshots by their trees: which snapshots they are does not matter.
func blockName(before, sn *snapshot.Snapshot) string {
	h := sha256.New()
	if before != nil {
		h.Write(before.Tree[:])
	}
	h.Write(sn.Tree[:])
	return hex.EncodeToString(h.Sum(nil)[:16]) + blockSuffix
}

// make compares two snapshots, tells v, and keeps the block at path unless that is "".
func (h *History) make(ctx context.Context, before *snapshot.Snapshot, was *View, sn *snapshot.Snapshot, path string, v visitor) (*View, error) {
	r, err := h.Repo(ctx)
	if err != nil {
		return nil, err
	}
	is, err := Open(ctx, r, sn)
	if err != nil {
		return nil, err
	}
	if before != nil && was == nil {
		if was, err = Open(ctx, r, before); err != nil {
			return nil, err
		}
	}
	if path != "" {
		w, err := newBlockWriter(path)
		if err == nil {
			err = changes(ctx, r, was, is, w)
			if err == nil {
				err = w.finish()
			} else {
				w.drop()
				return nil, err
			}
		}
		if err == nil {
			if err = readBlock(path, v); err == nil {
				return is, nil
			}
		}
		h.Dir = "" // a full disk, or one that cannot be written to
		h.Warn(fmt.Errorf("what was found out cannot be kept for the next time: %w", err))
	}
	return is, changes(ctx, r, was, is, v)
}

// changes tells v what changed between two views; was may be nil.
func changes(ctx context.Context, r Repo, was, is *View, v visitor) error {
	type both struct{ a, b *Space }
	list := map[string]*both{}
	var keys []string
	at := func(s *Space) *both {
		k := s.Store + "/" + s.ID
		if list[k] == nil {
			list[k] = &both{}
			keys = append(keys, k)
		}
		return list[k]
	}
	if was != nil {
		for _, s := range was.Spaces() {
			at(s).a = s
		}
	}
	for _, s := range is.Spaces() {
		at(s).b = s
	}
	slices.Sort(keys)
	for _, k := range keys {
		x := list[k]
		told := false
		tell := func(gone bool) {
			if told {
				return
			}
			told = true
			s, view := x.b, is
			if s == nil {
				s, view = x.a, was
			}
			v.space(&SpaceInfo{ID: s.ID, Store: s.Store, Folder: s.Folder, Name: s.Name, Kind: s.Kind, MountID: view.MountID(ctx, s.Store)}, gone)
		}
		if x.a == nil || x.b != nil && (x.a.Folder != x.b.Folder || x.a.Name != x.b.Name) {
			tell(false)
		}
		err := compareSpace(ctx, r, was, x.a, is, x.b, allTops, func(old, now *Entry) error {
			tell(false)
			if old != nil {
				v.went(rawOf(old))
			}
			if now != nil {
				v.came(rawOf(now))
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("space %s: %w", k, err)
		}
		if x.b == nil {
			told = false
			tell(true)
		}
	}
	return ctx.Err()
}

// The format of a block: magic, SHA-256 of the rest, and a zstd stream of records.
const blockMagic = "holdfast changes 1\n"

const (
	tagSpace byte = iota + 1
	tagSpaceGone
	tagCame
	tagWent
)

var kindCodes = []Kind{Current, Version, Trashed}

// blockWriter is the visitor that writes a block.
type blockWriter struct {
	path string
	f    *os.File
	hash interface {
		io.Writer
		Sum([]byte) []byte
	}
	z    *zstd.Encoder
	w    *bufio.Writer
	last []byte
	buf  []byte
}

func newBlockWriter(path string) (*blockWriter, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return nil, err
	}
	w := &blockWriter{path: path, f: f, hash: sha256.New()}
	if _, err = f.Write(append([]byte(blockMagic), make([]byte, sha256.Size)...)); err == nil {
		w.z, err = zstd.NewWriter(io.MultiWriter(f, w.hash), zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	}
	if err != nil {
		w.drop()
		return nil, err
	}
	w.w = bufio.NewWriterSize(w.z, 64<<10)
	return w, nil
}

func (w *blockWriter) drop() {
	if w.z != nil {
		_ = w.z.Close()
	}
	w.f.Close()
	_ = os.Remove(w.f.Name())
}

func (w *blockWriter) finish() error {
	err := errors.Join(w.w.Flush(), w.z.Close())
	w.z = nil
	if err == nil {
		_, err = w.f.WriteAt(w.hash.Sum(nil), int64(len(blockMagic)))
	}
	if err = errors.Join(err, w.f.Close()); err == nil {
		err = os.Rename(w.f.Name(), w.path)
	}
	if err != nil {
		_ = os.Remove(w.f.Name())
	}
	return err
}

func (w *blockWriter) text(p []byte) {
	w.buf = binary.AppendUvarint(w.buf, uint64(len(p)))
	w.buf = append(w.buf, p...)
}

// flush writes what was gathered. Errors stay in the buffered writer and come out of finish.
func (w *blockWriter) flush() { _, _ = w.w.Write(w.buf) }

func (w *blockWriter) space(s *SpaceInfo, gone bool) {
	w.last = w.last[:0]
	w.buf = append(w.buf[:0], tagSpace)
	if gone {
		w.buf[0] = tagSpaceGone
	}
	for _, t := range []string{s.ID, s.Store, s.Folder, s.Name, s.Kind, s.MountID} {
		w.text([]byte(t))
	}
	w.flush()
}

func (w *blockWriter) key(tag byte, e *rawEntry) {
	n := 0
	for n < len(w.last) && n < len(e.path) && w.last[n] == e.path[n] {
		n++
	}
	kind := byte(slices.Index(kindCodes, e.kind)) << 1
	if e.dir {
		kind |= 1
	}
	w.buf = append(w.buf[:0], tag, kind)
	w.buf = binary.AppendUvarint(w.buf, uint64(n))
	w.text(e.path[n:])
	w.text(e.stamp)
	w.last = append(w.last[:0], e.path...)
}

func (w *blockWriter) went(e *rawEntry) {
	w.key(tagWent, e)
	w.flush()
}

func (w *blockWriter) came(e *rawEntry) {
	w.key(tagCame, e)
	w.text(e.nodeID)
	w.text(e.sha1)
	w.buf = binary.AppendUvarint(w.buf, e.size)
	w.buf = binary.AppendVarint(w.buf, e.sec)
	w.buf = binary.AppendUvarint(w.buf, uint64(e.nsec))
	w.flush()
}

// readBlock visits the block at path. An error comes before anything was visited, or not at all: a block that
// bears its own checksum is what was written.
func readBlock(path string, v visitor) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, len(blockMagic)+sha256.Size)
	if _, err := io.ReadFull(f, head); err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if !bytes.HasPrefix(head, []byte(blockMagic)) || !bytes.Equal(head[len(blockMagic):], h.Sum(nil)) {
		return errors.New("the file is damaged, or of another version")
	}
	if _, err := f.Seek(int64(len(head)), io.SeekStart); err != nil {
		return err
	}
	z, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
	if err != nil {
		return err
	}
	defer z.Close()
	d := &blockReader{r: bufio.NewReaderSize(z, 256<<10)}
	d.visit(v)
	if d.err != io.EOF {
		return d.err
	}
	return nil
}

// blockReader decodes records. Texts are read into buffers that are used again.
type blockReader struct {
	r   *bufio.Reader
	err error
	e   rawEntry
}

func (d *blockReader) num() uint64 {
	if d.err != nil {
		return 0
	}
	n, err := binary.ReadUvarint(d.r)
	d.err = err
	return n
}

// maxText bounds one text, in bytes.
const maxText = 1 << 20

func (d *blockReader) text(into []byte) []byte {
	n := d.num()
	if d.err != nil || n > maxText {
		d.err = errors.Join(d.err, errors.New("a text is too long"))
		return into[:0]
	}
	at := len(into)
	into = slices.Grow(into, int(n))[:at+int(n)]
	_, d.err = io.ReadFull(d.r, into[at:])
	return into
}

func (d *blockReader) visit(v visitor) {
	e := &d.e
	for d.err == nil {
		tag, err := d.r.ReadByte()
		if err != nil {
			d.err = err
			return
		}
		switch tag {
		case tagSpace, tagSpaceGone:
			var s SpaceInfo
			for _, t := range []*string{&s.ID, &s.Store, &s.Folder, &s.Name, &s.Kind, &s.MountID} {
				*t = string(d.text(nil))
			}
			e.path = e.path[:0]
			if d.err == nil {
				v.space(&s, tag == tagSpaceGone)
			}
		case tagCame, tagWent:
			k, err := d.r.ReadByte()
			if err != nil || int(k>>1) >= len(kindCodes) {
				d.err = errors.Join(err, errors.New("a record is of an unknown kind"))
				return
			}
			e.kind, e.dir = kindCodes[k>>1], k&1 != 0
			n := d.num()
			if n > uint64(len(e.path)) {
				d.err = errors.New("a path is damaged")
				return
			}
			e.path = d.text(e.path[:n])
			e.stamp = d.text(e.stamp[:0])
			if tag == tagWent {
				if d.err == nil {
					v.went(e)
				}
				continue
			}
			e.nodeID = d.text(e.nodeID[:0])
			e.sha1 = d.text(e.sha1[:0])
			e.size = d.num()
			if d.err == nil {
				e.sec, d.err = binary.ReadVarint(d.r)
			}
			e.nsec = int64(d.num())
			if d.err == nil {
				v.came(e)
			}
		default:
			d.err = errors.New("a record is of an unknown kind")
		}
	}
}

// rows sorts snapshots by the instance that they are of, because only those of one instance follow each other.
func rows(list []*snapshot.Snapshot) [][]*snapshot.Snapshot {
	by := map[string]int{}
	var out [][]*snapshot.Snapshot
	for _, sn := range list {
		if sn.Tree == nil {
			continue
		}
		k := sn.Hostname + "\x00" + strings.Join(sn.Paths, "\x00")
		i, ok := by[k]
		if !ok {
			i = len(out)
			by[k] = i
			out = append(out, nil)
		}
		out[i] = append(out[i], sn)
	}
	return out
}
