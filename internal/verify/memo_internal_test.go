package verify

import (
	"testing"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

func TestFindSegments(t *testing.T) {
	ids := func(s string) (out []id.ID) {
		for _, c := range s {
			out = append(out, id.ID{byte(c)})
		}
		return out
	}
	st := &snapshot.Store{Layout: "posix", Prefix: "user.oc."}
	m := &memo{limit: 1 << 20}
	m.begin(st)
	m.rooted("projects/x")
	m.keep(&segment{first: 0}, ids("ab"), 1024)
	m.keep(&segment{first: 2}, ids("abcde"), 4096)
	m.keep(&segment{first: 5, end: true}, ids("abcdef"), 5120)
	m.begin(st)
	for _, c := range []struct {
		blobs string
		first bool
		want  int // blobs; 0: none
	}{
		{"abcdef", true, 2},
		{"abcdef", false, 0}, // the first one tells the root
		{"axcdef", true, 0},
		{"cdef", false, 3},
		{"cdef", true, 0},
		{"cdxf", false, 0},
		{"cdx", false, 0},
		{"cd", false, 0},
		{"f", false, 1},
		{"x", false, 0},
		{"", false, 0},
	} {
		s := m.find(ids(c.blobs), c.first)
		if (s != nil) != (c.want > 0) || s != nil && len(s.blobs) != c.want {
			t.Errorf("%q, first %v: %+v", c.blobs, c.first, s)
		}
	}
	// What was found is there for the next snapshot, too, and nothing else.
	m.begin(st)
	if m.find(ids("f"), false) == nil {
		t.Error("what was used is forgotten")
	}
	m.begin(st)
	if m.find(ids("cde"), false) != nil {
		t.Error("what was not used is remembered")
	}
	m.begin(st)
	m.keep(&segment{first: 0}, ids("f"), 1)
	m.begin(st)
	if m.rooted("projects/y"); m.find(ids("f"), true) != nil {
		t.Error("a segment of another root was taken")
	}
	m.keep(&segment{first: 0}, ids("f"), 1)
	m.begin(&snapshot.Store{Layout: "posix", Prefix: "user.ocis."})
	if m.find(ids("f"), true) != nil {
		t.Error("a segment was taken although attributes have other names")
	}
}

func TestMemoLimit(t *testing.T) {
	st := &snapshot.Store{}
	m := &memo{limit: 4096}
	for range 3 {
		m.begin(st)
		for k := range 100 {
			s := &segment{}
			if m.add(s, &item{name: "some name", ref: &reference{place: "/a/b/c"}}) {
				m.keep(s, []id.ID{{byte(k)}}, 1024)
			}
		}
		sum := int64(0)
		for _, s := range m.now {
			sum += s.memory
		}
		if m.used > m.limit || sum > m.limit || m.used < m.limit/2 {
			t.Errorf("%d bytes are used, %d of them now, and %d are allowed", m.used, sum, m.limit)
		}
	}
}
