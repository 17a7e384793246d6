package save

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// filesAtOnce is how many files of a folder are written at the same time: with small ones each waits for the
// repository and for the disk.
const filesAtOnce = 4

// ToFolder writes a file into the folder dir, or what is in a folder. dir is made if it is missing, for
// its owner alone. What is right already is not written again, so a run that was interrupted goes on.
//
// Errors: *FailedError and *MismatchError (joined) when it came to the end; the Result is valid with every error.
func ToFolder(ctx context.Context, v *browse.View, it *browse.Item, dir string, o Options) (*Result, error) {
	w := &folderWriter{v: v, o: o, res: newResult(), stamp: o.Now.UTC().Format("20060102T150405Z")}
	var at *place
	if !o.DryRun {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return w.res, err
		}
	}
	root, err := os.OpenRoot(dir)
	switch {
	case err == nil:
		defer root.Close()
		at = &place{root: root}
	case o.DryRun && errors.Is(err, fs.ErrNotExist):
	default:
		return w.res, err
	}
	if it.IsDir() {
		err = w.folder(ctx, it, at, 0)
	} else {
		err = w.items(ctx, []*browse.Item{it}, at, 0)
	}
	if err == nil && at != nil && !o.DryRun {
		err = syncAll(root)
	}
	if err != nil {
		return w.res, err
	}
	return w.res, w.res.err()
}

// syncAll makes what was written durable: once, because a sync for each small file takes a hundred times as long.
func syncAll(root *os.Root) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("write to the disk: %w", err)
	}
	return nil
}

// place is a folder at the destination: a path below a root. nil is one that a dry run would make.
type place struct {
	root *os.Root
	rel  string
}

func (p *place) join(name string) string {
	if p.rel == "" {
		return name
	}
	return p.rel + "/" + name
}

type folderWriter struct {
	v     *browse.View
	o     Options
	stamp string

	mu  sync.Mutex
	res *Result
}

// fatal tells errors that every further file would meet as well.
func fatal(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EIO)
}

// fail notes that an item was not written. It returns an error only if the run cannot go on.
func (w *folderWriter) fail(ctx context.Context, it *browse.Item, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if fatal(err) {
		return fmt.Errorf("%q: %w", it.Path, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	note(&w.res.Failed, &w.res.Failures, Failure{it.Path, err.Error()})
	return nil
}

func (w *folderWriter) folder(ctx context.Context, dir *browse.Item, at *place, depth int) error {
	items, err := w.v.List(ctx, dir)
	if err != nil {
		return w.fail(ctx, dir, err)
	}
	return w.items(ctx, items, at, depth)
}

// items writes what is in one folder: first the files, then the folders.
func (w *folderWriter) items(ctx context.Context, items []*browse.Item, at *place, depth int) error {
	if depth > maxDepth {
		return w.fail(ctx, items[0], errTooDeep)
	}
	if len(items) == 0 {
		return nil
	}
	picked, siblings, folded := pickNames(items, safeName)
	var here inodes
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(filesAtOnce)
	var dirs []*browse.Item
	var dirNames []string
	for i, it := range items {
		if gctx.Err() != nil {
			break
		}
		own, name := it.Name(), picked[i]
		switch it.Node.Type {
		case snapshot.Dir:
			dirs, dirNames = append(dirs, it), append(dirNames, name)
			continue
		case snapshot.File:
		default:
			w.mu.Lock()
			note(&w.res.Skipped, &w.res.Skips, it.Path)
			w.mu.Unlock()
			continue
		}
		if name != own {
			w.renamed(it, name)
		}
		// Where two names differ in case only, the second one may meet the first as its own: one after the other.
		if folded[strings.ToLower(name)] > 1 {
			if err := g.Wait(); err != nil {
				return err
			}
			g, gctx = errgroup.WithContext(ctx)
			g.SetLimit(filesAtOnce)
			if at != nil && here.has(at, name) {
				for n := 2; siblings[strings.ToLower(name)] || siblings[name]; n++ {
					name = numbered(picked[i], n)
				}
				siblings[name], siblings[strings.ToLower(name)] = true, true
				w.renamed(it, name)
			}
			if err := w.file(ctx, it, at, name, siblings); err != nil {
				return err
			}
			here.add(at, name)
			continue
		}
		g.Go(func() error { return w.file(gctx, it, at, name, siblings) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, it := range dirs {
		if err := w.enter(ctx, it, at, dirNames[i], depth); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (w *folderWriter) renamed(it *browse.Item, name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	note(&w.res.Renamed, &w.res.Renames, Renaming{it.Path, name})
}

// inodes are files that this run has written into a folder.
type inodes map[string]bool

// has tells whether the name leads to one of them, which has another name then: the file system takes capital
// and small letters for the same.
func (n inodes) has(at *place, name string) bool {
	st, err := at.root.Lstat(at.join(name))
	return err == nil && n[inode(st)]
}

func (n *inodes) add(at *place, name string) {
	if at == nil {
		return
	}
	if st, err := at.root.Lstat(at.join(name)); err == nil {
		if *n == nil {
			*n = inodes{}
		}
		(*n)[inode(st)] = true
	}
}

// inode tells files of one folder apart.
func inode(st fs.FileInfo) string {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return strconv.FormatUint(s.Ino, 10)
	}
	return st.Name()
}

// enter makes a folder and writes what is in it.
func (w *folderWriter) enter(ctx context.Context, it *browse.Item, at *place, name string, depth int) error {
	own := it.Name()
	if at == nil {
		w.res.Folders++
		return w.folder(ctx, it, nil, depth+1)
	}
	name, made, err := w.mkdir(it, at, name)
	if err != nil {
		return w.fail(ctx, it, err)
	}
	if name != own {
		w.renamed(it, name)
	}
	if made {
		w.res.Folders++
	}
	sub := &place{root: at.root, rel: at.join(name)}
	if made && w.o.DryRun {
		sub = nil
	}
	// Long paths are walked from their beginning each time, unless a root is opened now and then.
	if sub != nil && depth%16 == 15 {
		r, err := at.root.OpenRoot(sub.rel)
		if err != nil {
			return w.fail(ctx, it, err)
		}
		defer r.Close()
		sub = &place{root: r}
	}
	if err := w.folder(ctx, it, sub, depth+1); err != nil {
		return err
	}
	if w.o.DryRun {
		return nil
	}
	if err := at.root.Chtimes(at.join(name), it.Node.ModTime, it.Node.ModTime); err != nil {
		return w.fail(ctx, it, fmt.Errorf("set the time: %w", err))
	}
	return nil
}

// mkdir makes sure that there is a folder. It returns the name that it got.
func (w *folderWriter) mkdir(it *browse.Item, at *place, name string) (string, bool, error) {
	for try := 0; ; try++ {
		st, err := at.root.Lstat(at.join(name))
		if err == nil && st.IsDir() {
			return name, false, nil
		}
		if err == nil {
			if w.o.Keep {
				return name, false, errors.New("something else than a folder is in the way")
			}
			if err := w.aside(at, name); err != nil {
				return name, false, err
			}
		}
		if w.o.DryRun {
			return name, true, nil
		}
		err = at.root.Mkdir(at.join(name), it.Node.Mode.Perm()&0o755|0o700)
		if err == nil {
			return name, true, nil
		}
		if p := portableName(it.Name()); badName(err) && try == 0 && p != name {
			name = p
			continue
		}
		return name, false, err
	}
}

// badName tells that the file system does not take a name.
func badName(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EILSEQ) || errors.Is(err, unix.ENAMETOOLONG)
}

// aside renames what is in the way.
func (w *folderWriter) aside(at *place, name string) error {
	to := ""
	for n := 0; ; n++ {
		add := ".before-" + w.stamp
		if n > 0 {
			add += "-" + strconv.Itoa(n)
		}
		to = name[:min(len(name), nameLimit-len(add))] + add
		if _, err := at.root.Lstat(at.join(to)); errors.Is(err, fs.ErrNotExist) {
			break
		} else if err != nil {
			return err
		}
	}
	if !w.o.DryRun {
		if err := at.root.Rename(at.join(name), at.join(to)); err != nil {
			return fmt.Errorf("move aside what is in the way: %w", err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	note(&w.res.MovedAside, &w.res.Moved, filepath.Join(at.root.Name(), at.join(to)))
	return nil
}

// file writes one file.
func (w *folderWriter) file(ctx context.Context, it *browse.Item, at *place, name string, siblings map[string]bool) error {
	state, n, ok, err := w.write(ctx, it, at, name, siblings)
	if err != nil {
		return w.fail(ctx, it, err)
	}
	w.mu.Lock()
	switch state {
	case written:
		w.res.Files++
		w.res.Bytes += n
	case unchanged:
		w.res.Unchanged++
	case kept:
		w.res.Kept++
	}
	if !ok {
		note(&w.res.Mismatched, &w.res.Mismatches, it.Path)
	}
	w.mu.Unlock()
	if w.o.Progress != nil {
		w.o.Progress(it.Path, int64(it.Node.Size))
	}
	return nil
}

type state int

const (
	written state = iota
	unchanged
	kept
)

// partName is where a file is written before it gets its name: the same for each run, so that an interrupted one
// goes on, and none of the names that the folder will have.
func partName(name string, siblings map[string]bool) string {
	sum := sha256.Sum256([]byte(name))
	base := fmt.Sprintf(".holdfast-%x.part", sum[:8])
	for n := 0; siblings[base]; n++ {
		base = fmt.Sprintf(".holdfast-%x-%d.part", sum[:8], n)
	}
	return base
}

func (w *folderWriter) write(ctx context.Context, it *browse.Item, at *place, name string, siblings map[string]bool) (st state, n int64, ok bool, err error) {
	content, err := w.v.Content(it)
	if err != nil {
		return 0, 0, true, err
	}
	if at == nil { // a dry run, into a folder that is not there
		return written, content.Size(), true, nil
	}
	sum := newChecksum(it)
	full := at.join(name)
	have, err := at.root.Lstat(full)
	inWay := err == nil
	if inWay && have.Mode().IsRegular() && have.Size() == content.Size() {
		same, err := w.compare(ctx, at, full, content, sum)
		if err != nil {
			return 0, 0, true, err
		}
		if same {
			if !w.o.DryRun && !have.ModTime().Equal(it.Node.ModTime) {
				err = at.root.Chtimes(full, it.Node.ModTime, it.Node.ModTime)
			}
			return unchanged, 0, sum.ok(), err
		}
	}
	if inWay && w.o.Keep {
		return kept, 0, true, nil
	}
	if w.o.DryRun {
		if inWay {
			err = w.aside(at, name)
		} else {
			err = nil
		}
		return written, content.Size(), true, err
	}
	if sum != nil {
		sum.Reset()
	}
	part := at.join(partName(name, siblings))
	if err := w.fill(ctx, it, at, part, content, sum); err != nil {
		return 0, 0, true, err
	}
	if inWay {
		if err := w.aside(at, name); err != nil {
			return 0, 0, true, err
		}
	}
	err = at.root.Rename(part, full)
	if p := portableName(it.Name()); badName(err) && p != name {
		w.renamed(it, p)
		if _, serr := at.root.Lstat(at.join(p)); serr == nil {
			err = fmt.Errorf("it cannot have its own name here, and %q exists", p)
		} else {
			err = at.root.Rename(part, at.join(p))
		}
	}
	if err != nil {
		_ = at.root.Remove(part)
	}
	return written, content.Size(), sum.ok(), err
}

// compare tells whether a file has the content already. It reads the file and nothing from the repository: the
// ids of chunks are their hashes.
func (w *folderWriter) compare(ctx context.Context, at *place, full string, content *browse.Content, sum *checksum) (bool, error) {
	f, err := at.root.OpenFile(full, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, nil //nolint:nilerr // what cannot be read is not what is wanted
	}
	defer f.Close()
	n, err := matching(ctx, f, content, sum)
	return n == content.Size(), err
}

// matching returns how many bytes at the beginning of f are whole chunks of the content, and adds them to sum.
func matching(ctx context.Context, f io.Reader, content *browse.Content, sum *checksum) (int64, error) {
	var buf bytes.Buffer
	done := int64(0)
	for d, size := range content.Chunks() {
		if ctx.Err() != nil {
			return done, context.Cause(ctx)
		}
		buf.Reset()
		if n, err := io.CopyN(&buf, f, size); err != nil || n != size {
			return done, nil //nolint:nilerr // shorter
		}
		if sha256.Sum256(buf.Bytes()) != d {
			return done, nil
		}
		if sum != nil {
			sum.Write(buf.Bytes())
		}
		done += size
	}
	return done, nil
}

// fill writes the content to the file part, which an interrupted run may have begun.
func (w *folderWriter) fill(ctx context.Context, it *browse.Item, at *place, part string, content *browse.Content, sum *checksum) (err error) {
	flags := os.O_RDWR | unix.O_NONBLOCK
	was, err := at.root.Lstat(part)
	if err == nil {
		if s, ok := was.Sys().(*syscall.Stat_t); !was.Mode().IsRegular() || ok && s.Nlink > 1 {
			return fmt.Errorf("%s is in the way, and no file of an interrupted run: move it", part)
		}
	} else {
		flags |= os.O_CREATE | os.O_EXCL
	}
	f, err := at.root.OpenFile(part, flags, it.Node.Mode.Perm()&0o755|0o600)
	if err != nil {
		return err
	}
	if now, err := f.Stat(); err != nil || was != nil && !os.SameFile(was, now) {
		f.Close()
		return errors.Join(err, fmt.Errorf("%s was exchanged meanwhile", part))
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err == nil {
			err = at.root.Chtimes(part, it.Node.ModTime, it.Node.ModTime)
		}
		if err != nil && ctx.Err() == nil {
			_ = at.root.Remove(part)
		}
	}()
	begun, err := matching(ctx, f, content, sum)
	if err != nil {
		return err
	}
	if err := f.Truncate(begun); err != nil {
		return err
	}
	if _, err := f.Seek(begun, io.SeekStart); err != nil {
		return err
	}
	var to io.Writer = f
	if sum != nil {
		to = io.MultiWriter(f, sum)
	}
	return content.WriteFrom(ctx, begun, to)
}
