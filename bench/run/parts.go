package main

import (
	"cmp"
	"context"
	"crypto/sha1" //nolint:gosec // what the server records
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/bench/internal/measure"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// part is a space of the store, a file in it, and a folder, in the terms of users and in those of the
// storage.
type part struct {
	space string // its id
	dir   string // the directory of the space
	blob  string // the file with the content
	file  string // its path in the space; "" if Holdfast is not measured
}

// parts measures what is less than everything: a space, a file, a folder, and the check of all. Each
// program gives the same file; of a space Holdfast gives what users see, the others its directory.
func (b *bench) parts() error {
	if !b.wanted[stepSpace] && !b.wanted[stepFile] && !b.wanted[stepList] && !b.wanted[stepCheck] {
		return nil
	}
	p, err := b.choose()
	if err != nil {
		return err
	}
	for i := range b.o.runs {
		for _, t := range b.inTurn(i) {
			if b.due(stepSpace, t) {
				if err := b.afresh(t); err != nil {
					return err
				}
				if err := b.timed(stepSpace, t, func() (measure.Cost, error) { return t.restoreSpace(p) }); err != nil {
					return err
				}
				if err := b.discard(t); err != nil {
					return err
				}
			}
			if b.due(stepFile, t) {
				var out string
				err := b.timed(stepFile, t, func() (c measure.Cost, err error) {
					c, out, err = t.show(p)
					return c, err
				})
				if err != nil {
					return err
				}
				if want, err := os.ReadFile(p.blob); err != nil || !strings.Contains(out, string(want)) {
					return errors.Join(err, fmt.Errorf("%s shows something else than %s", t.name, p.blob))
				}
			}
			if b.due(stepList, t) {
				if err := b.timed(stepList, t, func() (measure.Cost, error) { return t.list(p) }); err != nil {
					return err
				}
			}
			if b.due(stepCheck, t) {
				if err := b.timed(stepCheck, t, t.checkStructure); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// afresh makes an empty directory for what is restored.
func (b *bench) afresh(t *tool) error {
	if _, err := os.Stat(b.discarded()); err == nil && measure.NeedSpace(b.scratch, b.oneStore()) != nil {
		if err := os.RemoveAll(b.discarded()); err != nil {
			return err
		}
		if err := b.settle(); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(t.restored()); err != nil {
		return err
	}
	return os.MkdirAll(t.restored(), 0o755)
}

// reuse is how long ext4 without a journal passes over inodes that were freed.
const reuse = 6 * time.Minute

// settle waits, after many files were removed, until making files is no slower for it. With each file it makes,
// ext4 without a journal goes through all inodes of a group that were freed in the last minutes (Linux
// fs/ext4/ialloc.c, recently_deleted), which made restores take up to ten times as long.
func (b *bench) settle() error {
	if filesystem(b.scratch) != withoutJournal {
		return nil
	}
	fmt.Fprintf(b.log, "waiting %v, because ext4 without a journal is slow to make files after many were removed\n", reuse)
	select {
	case <-time.After(reuse):
		return nil
	case <-b.ctx.Done():
		return context.Cause(b.ctx)
	}
}

// discard puts what was restored out of the way, to be removed at the end or when room is short: see settle.
func (b *bench) discard(t *tool) error {
	if err := os.MkdirAll(b.discarded(), 0o700); err != nil {
		return err
	}
	b.restores++
	return os.Rename(t.restored(), filepath.Join(b.discarded(), strconv.Itoa(b.restores)))
}

func (b *bench) discarded() string { return filepath.Join(b.scratch, "discarded") }

func (b *bench) oneStore() measure.Space { return measure.StoreNeeds(b.o.files, int64(b.o.bytes)) }

// cold drops the kernel's caches and those of the program.
func (b *bench) cold(t *tool) error {
	dropped := b.o.cold && os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0) == nil
	if !dropped && !b.warm {
		b.warm = true
		b.notes = append(b.notes, "The page cache was not dropped before the steps that are called cold: only root can, and only if it may (-cold).")
	}
	return t.forget()
}

// choose takes the largest space, and in it a file that users see, larger than nine of ten.
func (b *bench) choose() (*part, error) {
	p := &part{}
	most := -1
	for space, n := range b.record.Summary.FilesPerSpace {
		if n > most || n == most && space < p.space {
			p.space, most = space, n
		}
	}
	p.dir = filepath.Join(b.store, "data/storage/users", ocis.SpacePath(p.space))
	type blob struct {
		path string
		size int64
	}
	var blobs []blob
	err := filepath.WalkDir(filepath.Join(p.dir, "blobs"), func(f string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			st, err := e.Info()
			if err != nil {
				return err
			}
			blobs = append(blobs, blob{f, st.Size()})
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(blobs) == 0 {
		return nil, fmt.Errorf("space %s has no blobs", p.space)
	}
	slices.SortFunc(blobs, func(x, y blob) int { return cmp.Compare(y.size, x.size) })
	blobs = blobs[len(blobs)/10:]
	i := slices.IndexFunc(b.tools, func(t *tool) bool { return t.name == "holdfast" })
	if i < 0 {
		p.blob = blobs[0].path
		return p, nil
	}
	// By what name users know it.
	t := b.tools[i]
	_, out, err := measure.Command(t.dir, t.env, t.path, "ls", "--repo", t.repo(), "--password-file", t.pass(), "--recursive", "--json", "latest:id:"+p.space)
	if err != nil {
		return nil, err
	}
	names := map[string]string{}
	for line := range strings.Lines(out) {
		var e struct{ Path, SHA1, Type string }
		if json.Unmarshal([]byte(line), &e) == nil && e.Type == "file" {
			names[e.SHA1] = e.Path
		}
	}
	for _, bl := range blobs {
		data, err := os.ReadFile(bl.path)
		if err != nil {
			return nil, err
		}
		sum := sha1.Sum(data) //nolint:gosec // as above
		if name, ok := names[hex.EncodeToString(sum[:])]; ok {
			p.blob, p.file = bl.path, name
			return p, nil
		}
	}
	return nil, fmt.Errorf("no file of space %s is among its blobs", p.space)
}

// restoreSpace puts a space into a folder.
func (t *tool) restoreSpace(p *part) (measure.Cost, error) {
	switch t.name {
	case "holdfast":
		return t.run("restore", "latest:id:"+p.space, "--to", filepath.Join(t.restored(), "space"), "--repo", t.repo(), "--password-file", t.pass())
	case "restic":
		return t.run("-r", t.repo(), "restore", "latest", "--target", t.restored(), "--include", p.dir)
	default:
		c, _, err := measure.Command(t.restored(), t.env, t.path, "extract", fmt.Sprintf("%s::%d", t.repo(), t.archive), strings.TrimPrefix(p.dir, "/"))
		return c, err
	}
}

// show returns the content of a file.
func (t *tool) show(p *part) (measure.Cost, string, error) {
	switch t.name {
	case "holdfast":
		return measure.Command(t.dir, t.env, t.path, "cat", "latest:id:"+path.Join(p.space, p.file), "--repo", t.repo(), "--password-file", t.pass())
	case "restic":
		return measure.Command(t.dir, t.env, t.path, "-r", t.repo(), "--quiet", "dump", "latest", p.blob)
	default:
		return measure.Command(t.dir, t.env, t.path, "extract", "--stdout", fmt.Sprintf("%s::%d", t.repo(), t.archive), strings.TrimPrefix(p.blob, "/"))
	}
}

// list lists a folder: for Holdfast the one that users see, for the others the directory of the blobs.
func (t *tool) list(p *part) (measure.Cost, error) {
	switch t.name {
	case "holdfast":
		return t.run("ls", "--long", "latest:id:"+path.Join(p.space, path.Dir(p.file)), "--repo", t.repo(), "--password-file", t.pass())
	case "restic":
		return t.run("-r", t.repo(), "ls", "--long", "latest", filepath.Join(p.dir, "blobs"))
	default:
		return t.run("list", fmt.Sprintf("%s::%d", t.repo(), t.archive), strings.TrimPrefix(filepath.Join(p.dir, "blobs"), "/"))
	}
}

// checkStructure checks without reading all data.
func (t *tool) checkStructure() (measure.Cost, error) {
	switch t.name {
	case "holdfast":
		return t.run("check", "--repo", t.repo(), "--password-file", t.pass())
	case "restic":
		return t.run("-r", t.repo(), "check")
	default:
		return t.run("check", t.repo())
	}
}
