package save

import (
	"archive/tar"
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Format is a kind of archive.
type Format string

// The formats.
const (
	Tar Format = "tar"
	Zip Format = "zip"
)

// FormatOf tells by its ending what kind of archive a file is to be; "" is none.
func FormatOf(name string) Format {
	switch strings.ToLower(filepath.Ext(name)) {
	case ".tar":
		return Tar
	case ".zip":
		return Zip
	}
	return ""
}

// sink takes the entries of an archive.
type sink interface {
	// add begins an entry. name has slashes between its parts, and one at the end for a folder.
	add(it *browse.Item, name string) (io.Writer, error)
	// safe makes one part of a name fit for the format.
	safe(name string) string
	Close() error
}

// ToArchive writes a file, or what is in a folder, as an archive to w. An error in the middle leaves half an
// archive: nothing can be taken back.
//
// Errors: *MismatchError when it came to the end; the Result is valid with every error.
func ToArchive(ctx context.Context, v *browse.View, it *browse.Item, f Format, w io.Writer, o Options) (*Result, error) {
	a := &archiver{v: v, o: o, res: newResult()}
	switch f {
	case Tar:
		a.sink = &tarSink{tar.NewWriter(w)}
	case Zip:
		a.sink = &zipSink{zip.NewWriter(w)}
	default:
		return a.res, fmt.Errorf("%q is no kind of archive: tar and zip are", f)
	}
	var err error
	if it.IsDir() {
		err = a.folder(ctx, it, "", 0)
	} else {
		err = a.items(ctx, []*browse.Item{it}, "", 0)
	}
	if err == nil {
		err = a.sink.Close()
	}
	if err != nil {
		return a.res, err
	}
	return a.res, a.res.err()
}

// ToArchiveFile writes an archive to a file, for its owner alone. It gets its name when it is whole.
func ToArchiveFile(ctx context.Context, v *browse.View, it *browse.Item, f Format, file string, o Options) (*Result, error) {
	if o.DryRun {
		return ToArchive(ctx, v, it, f, io.Discard, o)
	}
	if st, err := os.Lstat(file); err == nil {
		if st.IsDir() {
			return newResult(), fmt.Errorf("%q is a folder", file)
		}
		if o.Keep {
			return newResult(), fmt.Errorf("%q exists", file)
		}
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".holdfast-*.part") // mode 0600
	if err != nil {
		return newResult(), err
	}
	res, err := ToArchive(ctx, v, it, f, tmp, o)
	var mismatch *MismatchError
	if err == nil || errors.As(err, &mismatch) {
		if serr := tmp.Sync(); serr != nil {
			err = serr
		}
	}
	if cerr := tmp.Close(); cerr != nil && err == nil {
		err = cerr
	}
	if err != nil && !errors.As(err, &mismatch) {
		_ = os.Remove(tmp.Name())
		return res, err
	}
	if _, serr := os.Lstat(file); serr == nil {
		old := file + ".before-" + o.Now.UTC().Format("20060102T150405Z")
		for n := 1; ; n++ {
			if _, serr := os.Lstat(old); errors.Is(serr, fs.ErrNotExist) {
				break
			}
			old = fmt.Sprintf("%s.before-%s-%d", file, o.Now.UTC().Format("20060102T150405Z"), n)
		}
		if rerr := os.Rename(file, old); rerr != nil {
			_ = os.Remove(tmp.Name())
			return res, rerr
		}
		note(&res.MovedAside, &res.Moved, old)
	}
	if rerr := os.Rename(tmp.Name(), file); rerr != nil {
		_ = os.Remove(tmp.Name())
		return res, rerr
	}
	return res, err
}

type archiver struct {
	v    *browse.View
	o    Options
	res  *Result
	sink sink
}

func (a *archiver) folder(ctx context.Context, dir *browse.Item, at string, depth int) error {
	items, err := a.v.List(ctx, dir)
	if err != nil {
		return err
	}
	return a.items(ctx, items, at, depth)
}

func (a *archiver) items(ctx context.Context, items []*browse.Item, at string, depth int) error {
	if depth > maxDepth {
		return errTooDeep
	}
	picked, _, _ := pickNames(items, a.sink.safe)
	for i, it := range items {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if it.Node.Type != snapshot.File && !it.IsDir() {
			note(&a.res.Skipped, &a.res.Skips, it.Path)
			continue
		}
		name := picked[i]
		if name != it.Name() {
			note(&a.res.Renamed, &a.res.Renames, Renaming{it.Path, name})
		}
		if it.IsDir() {
			a.res.Folders++
			if !a.o.DryRun {
				if _, err := a.sink.add(it, at+name+"/"); err != nil {
					return fmt.Errorf("%q: %w", it.Path, err)
				}
			}
			if err := a.folder(ctx, it, at+name+"/", depth+1); err != nil {
				return err
			}
			continue
		}
		if err := a.file(ctx, it, at+name); err != nil {
			return err
		}
	}
	return nil
}

func (a *archiver) file(ctx context.Context, it *browse.Item, name string) error {
	content, err := a.v.Content(it)
	if err != nil {
		return err
	}
	a.res.Files++
	a.res.Bytes += content.Size()
	if a.o.DryRun {
		return nil
	}
	w, err := a.sink.add(it, name)
	if err != nil {
		return fmt.Errorf("%q: %w", it.Path, err)
	}
	sum := newChecksum(it)
	if sum != nil {
		w = io.MultiWriter(w, sum)
	}
	if err := content.WriteTo(ctx, w); err != nil {
		return err
	}
	if !sum.ok() {
		note(&a.res.Mismatched, &a.res.Mismatches, it.Path)
	}
	if a.o.Progress != nil {
		a.o.Progress(it.Path, content.Size())
	}
	return nil
}

type tarSink struct{ *tar.Writer }

func (t *tarSink) safe(name string) string { return safeName(name) }

func (t *tarSink) add(it *browse.Item, name string) (io.Writer, error) {
	h := &tar.Header{
		Name: name, Typeflag: tar.TypeReg, Size: int64(it.Node.Size), Mode: int64(it.Node.Mode.Perm()&0o755 | 0o600),
		ModTime: it.Node.ModTime, Format: tar.FormatPAX,
	}
	if it.IsDir() {
		h.Typeflag, h.Size, h.Mode = tar.TypeDir, 0, h.Mode|0o700
	}
	if !utf8.ValidString(name) {
		h.PAXRecords = map[string]string{"hdrcharset": "BINARY"}
	}
	return t.Writer, t.WriteHeader(h)
}

type zipSink struct{ *zip.Writer }

// safe escapes what programs for Windows take for the parts of a path.
func (z *zipSink) safe(name string) string {
	if s := safeName(name); s == name && utf8.ValidString(name) && !strings.ContainsAny(name, `\:`) {
		return name
	}
	return portableName(name)
}

func (z *zipSink) add(it *browse.Item, name string) (io.Writer, error) {
	h := &zip.FileHeader{Name: name, Method: zip.Deflate, Modified: it.Node.ModTime}
	h.SetMode(it.Node.Mode.Perm()&0o755 | 0o600)
	if it.IsDir() {
		h.Method = zip.Store
		h.SetMode(fs.ModeDir | it.Node.Mode.Perm()&0o755 | 0o700)
	}
	return z.CreateHeader(h)
}
