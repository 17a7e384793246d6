package consistency

import (
	"bytes"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// indexFile is one file below indexes/, with 17 bytes for each entry.
type indexFile struct {
	kind, name string // by-type and personal, for example
	path       string // below the store's root
	entries    []indexEntry
	bad        bool
}

type indexEntry struct {
	space key
	right bool // it leads to the root of the space
}

func (f *indexFile) find(k key) (indexEntry, bool) {
	i, ok := slices.BinarySearchFunc(f.entries, k, func(e indexEntry, k key) int { return bytes.Compare(e.space[:], k[:]) })
	if !ok {
		return indexEntry{}, false
	}
	return f.entries[i], true
}

// readIndex reads a file below indexes/.
func (c *checker) readIndex(st *storeCheck, e *Entry, rest string) {
	kind, file, _ := strings.Cut(rest, "/")
	name, ok := strings.CutSuffix(file, ".mpk")
	if !ok || strings.Contains(file, "/") || kind != "by-type" && kind != "by-user-id" && kind != "by-group-id" {
		return // oCIS 3 and 4 kept links in folders, which nothing reads any more
	}
	x := indexFile{kind: kind, name: name, path: e.Path}
	p, err := e.data()
	if isGone(err) {
		return
	}
	var list []ocis.IndexEntry
	if err == nil {
		list, err = ocis.ParseIndex(p)
	}
	if err != nil {
		x.bad = true
		st.rest = append(st.rest, c.finding(st, IndexMalformed, e.Path, err.Error()))
	}
	for _, ie := range list {
		k, _ := keyOf(ie.SpaceID)
		right := ie.Target == "../../../"+ocis.SpacePath(ie.SpaceID)+"/nodes/"+ocis.NodePath(ie.SpaceID)
		if st.Layout == string(ocis.Posix) {
			right = ie.Target == ie.SpaceID
		}
		x.entries = append(x.entries, indexEntry{k, right})
	}
	slices.SortFunc(x.entries, func(a, b indexEntry) int { return bytes.Compare(a.space[:], b.space[:]) })
	st.indexes = append(st.indexes, x)
}

// checkIndexes compares the indexes with the roots of the spaces. Who is owner or member of a space must
// have it in his index, and the space must be in that of its type; else he does not see it.
func (c *checker) checkIndexes(st *storeCheck) []Finding {
	var out []Finding
	files := map[string]*indexFile{}
	for i := range st.indexes {
		files[st.indexes[i].kind+"/"+st.indexes[i].name] = &st.indexes[i]
	}
	byKey := map[key]*spaceInfo{}
	needed := map[string]map[key]bool{}
	add := func(class Class, sp *spaceInfo, file, format string, args ...any) {
		f := c.finding(st, class, file, fmt.Sprintf(format, args...))
		if sp != nil {
			f.Space, f.Name = sp.id, sp.alias
		}
		out = append(out, f)
	}
	for _, s := range st.spaces {
		sp := st.infos[s.ID]
		if sp == nil || !sp.known {
			continue // that it cannot be read is told
		}
		k, _ := keyOf(sp.id)
		byKey[k] = sp
		need := func(kind, name, who string) {
			at := kind + "/" + name
			if needed[at] == nil {
				needed[at] = map[key]bool{}
			}
			needed[at][k] = true
			x := files[at]
			if x != nil {
				if _, ok := x.find(k); ok || x.bad {
					return
				}
			}
			add(IndexMissing, sp, path.Join("indexes", kind, name+".mpk"), "the space is not in the index, so that %s do not find it", who)
		}
		if sp.kind != "" {
			need("by-type", sp.kind, "lists of spaces of its type")
		}
		// The owner of a project is the project itself.
		if sp.owner != "" && sp.owner != sp.id || sp.kind == "personal" {
			need("by-user-id", sp.owner, "its owner's lists")
		}
		for _, m := range sp.members {
			if id, ok := strings.CutPrefix(m, "u:"); ok {
				need("by-user-id", id, "a member's lists")
			} else {
				need("by-group-id", m[len("g:"):], "a group's lists")
			}
		}
	}
	for _, x := range st.indexes {
		for _, e := range x.entries {
			sp := byKey[e.space]
			switch {
			case sp == nil && c.unknownSpace(st, e.space):
				add(IndexStale, nil, x.path, "the index lists space %s, which is not there", e.space.uuid())
			case sp == nil:
			case x.kind == "by-type" && x.name == "share": // entries are never removed
			case !e.right:
				add(IndexWrong, sp, x.path, "the entry of the space leads to another place than its root")
			case needed[x.kind+"/"+x.name][e.space]:
			case x.kind == "by-type":
				add(IndexWrong, sp, x.path, "the index lists the space, which is of the type %q", sp.kind)
			case x.name != "": // spaces whose owner is no user are there
				add(IndexStale, sp, x.path, "the index lists the space, and its root gives no access to it")
			}
		}
	}
	return out
}

// unknownSpace tells whether the store has no space with this key, readable or not.
func (c *checker) unknownSpace(st *storeCheck, k key) bool {
	return !c.nameless && !slices.ContainsFunc(st.spaces, func(s Space) bool {
		have, _ := keyOf(s.ID)
		return have == k
	})
}
