package inplace

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
)

// space puts back a whole space: it is built beside the others and then takes its place at once.
func (r *run) space() error {
	isPosix := r.t.Store.Layout == string(ocis.Posix)
	if isPosix {
		if err := r.posixPlaceForSpace(); err != nil {
			return err
		}
	}
	if err := r.storeFolders(); err != nil {
		return err
	}
	staging := r.work + "/" + r.t.Space.ID
	if !r.o.DryRun {
		// Half of a space that a killed run left is nothing that anybody could miss.
		if err := r.clear(staging); err != nil {
			return err
		}
	}
	var top *pax.Header
	links := []*pax.Header{}
	err := r.each(r.spaceTar(), func(h *pax.Header, rel string, data io.Reader) error {
		in, ok := strings.CutPrefix(rel+"/", r.src+"/")
		if !ok {
			return fmt.Errorf("%q does not lie in the space", h.Name)
		}
		in = strings.TrimSuffix(in, "/")
		if in == "" {
			top = h
		}
		if r.objects.on() && (in == "blobs" || strings.HasPrefix(in, "blobs/")) {
			return r.objects.ofSpace(h, r.pre+rel)
		}
		if isPosix {
			r.countPosix(h, in)
		} else {
			r.countEntry(h, in)
		}
		if r.o.DryRun {
			return nil
		}
		if h.Type == '1' {
			links = append(links, h)
			return nil
		}
		return r.put(h, path.Join(staging, in), data)
	})
	if err != nil {
		return err
	}
	if top == nil {
		return fmt.Errorf("space %s: %w", r.t.Space.ID, ErrNotInSnapshot)
	}
	if !r.o.DryRun {
		for _, h := range links {
			from := strings.TrimPrefix(strings.TrimPrefix(h.Link, "./"), r.src+"/")
			to := strings.TrimPrefix(strings.TrimPrefix(h.Name, "./"), r.src+"/")
			if !safePath(from) {
				return fmt.Errorf("%q is a further name of %q, which lies elsewhere", h.Name, h.Link)
			}
			if err := r.root.Link(path.Join(staging, from), path.Join(staging, to)); err != nil {
				return err
			}
		}
		if err := r.settle(); err != nil {
			return err
		}
	}
	if err := r.moveAside(r.sp); err != nil {
		return err
	}
	if !r.o.DryRun {
		if err := r.shards(r.sp); err != nil {
			return err
		}
		step()
		if err := r.root.Rename(staging, r.sp); err != nil {
			return err
		}
		if err := r.syncDir(path.Dir(r.sp)); err != nil {
			return err
		}
	}
	if err := r.objects.rest(); err != nil {
		return err
	}
	if err := r.indexes(); err != nil {
		return err
	}
	if err := r.shareLists(); err != nil {
		return err
	}
	return r.done()
}

// done removes the folder of the journal if nothing is left in it.
func (r *run) done() error {
	if r.o.DryRun {
		return nil
	}
	if err := r.root.Remove(r.work); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.warn("%s holds more that was begun and not finished: run that restore again", r.abs(r.work))
	}
	return nil
}

// countEntry counts one entry of a whole space.
func (r *run) countEntry(h *pax.Header, in string) {
	parts := strings.Split(in, "/")
	if len(parts) != 6 {
		return
	}
	switch parts[0] {
	case "blobs":
		if h.Type == '0' {
			r.res.Blobs++
			r.res.Bytes += sizeOf(h)
		}
	case "nodes":
		switch kind, _, _ := ocis.ClassifyNodeName(parts[5]); kind {
		case ocis.NameNode, ocis.NameTrashed:
			r.res.Nodes++
		case ocis.NameRevision:
			r.res.Revisions++
		}
	}
}

func sizeOf(h *pax.Header) int64 {
	var n int64
	if s, ok := h.Records[pax.Size]; ok {
		_, _ = fmt.Sscan(s, &n)
		return n
	}
	return h.Size
}

// storeFolders reads how the folders of the store look that belong to no space.
func (r *run) storeFolders() error {
	return r.each(r.base()+"/store.tar", func(h *pax.Header, rel string, _ io.Reader) error {
		if h.Type == '5' {
			r.dirs[rel] = h
		}
		return nil
	})
}

// indexes adds the entries of the space, as they were.
func (r *run) indexes() error {
	return r.each(r.base()+"/store.tar", func(h *pax.Header, rel string, data io.Reader) error {
		if h.Type != '0' || !strings.HasPrefix(rel, "indexes/") || !strings.HasSuffix(rel, ".mpk") {
			return nil
		}
		src, _, err := r.content(h, data)
		if err != nil {
			return err
		}
		p, err := io.ReadAll(io.LimitReader(src, metaLimit))
		if err != nil {
			return err
		}
		list, err := ocis.ParseIndex(p)
		if err != nil {
			r.warn("the index %s of the snapshot cannot be read: %v", rel, err)
			return nil
		}
		i := slices.IndexFunc(list, func(e ocis.IndexEntry) bool { return e.SpaceID == r.t.Space.ID })
		if i < 0 {
			return nil
		}
		return r.addToIndex(h, rel, list[i])
	})
}

// metaLimit bounds a file that is read as a whole, in bytes; capture reads as much of metadata.
const metaLimit = 16 << 20

func (r *run) addToIndex(h *pax.Header, rel string, e ocis.IndexEntry) error {
	var have []ocis.IndexEntry
	name := rel
	rel = r.pre + rel
	if err := r.plain(rel); err != nil {
		return err
	}
	old, err := r.root.ReadFile(rel)
	if err == nil {
		have, err = ocis.ParseIndex(old)
		if err != nil {
			return fmt.Errorf("the index %s cannot be read, so that the space is not added to it: %w", name, err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	i := slices.IndexFunc(have, func(x ocis.IndexEntry) bool { return x.SpaceID == e.SpaceID })
	switch {
	case i >= 0 && have[i] == e:
		return nil
	case i >= 0:
		have[i] = e
	default:
		have = append(have, e)
	}
	r.res.Indexes = append(r.res.Indexes, name)
	if r.o.DryRun {
		return nil
	}
	if err := r.shards(rel); err != nil {
		return err
	}
	hdr := *h
	if fi, err := r.root.Lstat(rel); err == nil {
		if hdr.UID, hdr.GID, hdr.Mode, err = ownerOf(fi); err != nil {
			return err
		}
	}
	now := r.o.Now
	hdr.Sec, hdr.Nsec = now.Unix(), int64(now.Nanosecond())
	return r.writeBytes(&hdr, rel, ocis.EncodeIndex(have))
}
