package capture

import (
	"context"
	"fmt"
	"sort"
	"strings"
)

// AfterLook has fn called between each short look and what is done by it.
func AfterLook(fn func()) (restore func()) {
	afterLook = fn
	return func() { afterLook = nil }
}

// HoldReading takes all places of spaces that are read, until release is called.
func HoldReading(c *Capture) (release func()) {
	n := int64(c.c.opts.Limits.Spaces)
	_ = c.c.reading.Acquire(context.Background(), n)
	return func() { c.c.reading.Release(n) }
}

// Remembered tells line by line what the cache says of each space of decomposedfs: listings, groups and counts. Whether an entry was found to have no
// attributes depends on what was asked, and is left out.
func Remembered(c *Cache) map[string][]string {
	out := map[string][]string{}
	for key := range c.spaces {
		s := c.space(key)
		if s == nil {
			continue
		}
		lines := []string{fmt.Sprint("counts ", s.counts)}
		for which, p := range map[string][]byte{"nodes": s.nodesSeen, "blobs": s.blobsSeen} {
			l := readListing(p, s.rules)
			if l == nil {
				lines = append(lines, which+" none")
				continue
			}
			t := l.top
			lines = append(lines, fmt.Sprint(which, t.sure, t.mode, t.uid, t.gid, t.mtime, t.ctime))
			var below func(dir string, kids []byte)
			below = func(dir string, kids []byte) {
				if !l.each(kids, func(o *oldEntry) bool {
					path := dir + "/" + strings.Clone(o.entry.path)
					e := o.entry
					lines = append(lines, fmt.Sprint(path, o.flags&(listedKind|listedUnsure), e.mode, e.uid, e.gid, e.size, e.mtime, e.ctime))
					below(path, o.kids)
					return true
				}) {
					lines = append(lines, "damaged: "+dir)
				}
			}
			below(which, t.kids)
		}
		for _, g := range s.groups {
			lines = append(lines, fmt.Sprintf("group %s %x %v %d %x %v", g.first, g.print, g.ids, g.size, g.recs, g.needs))
		}
		sort.Strings(lines)
		out[key] = lines
	}
	return out
}

// Firsts returns the paths with which groups begin.
func Firsts(c *Cache) (out []string) {
	for key := range c.spaces {
		if s := c.space(key); s != nil {
			for first := range s.groups {
				out = append(out, first)
			}
		}
	}
	sort.Strings(out)
	return out
}
