package index

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
)

func num(n int) id.ID {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(n))
	return id.Hash(b[:])
}

func blob(n int) pack.Entry {
	e := pack.Entry{ID: num(n), Type: pack.BlobType(n % 2), Offset: uint32(n), Length: uint32(40 + n)}
	if n%3 == 0 {
		e.Plain = uint32(100 + n)
	}
	return e
}

func TestIndexIsLikeAMap(t *testing.T) {
	x := New(Options{})
	type key struct {
		t pack.BlobType
		d id.ID
	}
	want := map[key][]Location{}
	add := func(p int, e pack.Entry) {
		no, _ := x.Pack(num(-p))
		loc := Location{no, e.Offset, e.Length, e.Plain}
		k := key{e.Type, e.ID}
		isNew := !slices.Contains(want[k], loc)
		if got := x.Add(no, e); got != isNew {
			t.Fatalf("Add = %v, not %v", got, isNew)
		}
		if isNew {
			want[k] = append(want[k], loc)
		}
	}
	for n := range 20000 {
		add(1+n/100, blob(n))
		if n%7 == 0 {
			add(1+n/100, blob(n)) // the same again
			add(5000, blob(n))    // a copy elsewhere
			e := blob(n)
			e.Type = 1 - e.Type // another blob under the same ID
			add(5001, e)
		}
	}
	for k, locs := range want {
		if got := slices.Collect(x.Lookup(k.t, k.d)); !slices.Equal(got, locs) {
			t.Fatalf("%v: %v, not %v", k, got, locs)
		}
		if first, ok := x.First(k.t, k.d); !ok || first != locs[0] {
			t.Fatalf("First = %v", first)
		}
	}
	n := 0
	for no, e := range x.All() {
		n++
		if !slices.Contains(want[key{e.Type, e.ID}], Location{no, e.Offset, e.Length, e.Plain}) {
			t.Fatalf("All yields %v", e)
		}
	}
	if n != x.Len(0)+x.Len(1) {
		t.Errorf("All yields %d entries", n)
	}
	if _, ok := x.First(0, num(1<<30)); ok {
		t.Error("an unknown blob is found")
	}
	if _, ok := New(Options{}).First(0, num(1)); ok {
		t.Error("a blob is found in nothing")
	}
	if x.PackID(0) != num(-1) {
		t.Error("wrong pack ID")
	}
}

func TestMemoryPerBlob(t *testing.T) {
	const n = 300_000
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	x := New(Options{})
	for i := range n {
		no, _ := x.Pack(num(-1 - i/20))
		e := blob(i)
		e.Type = 0
		x.Add(no, e)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	per := (float64(after.HeapAlloc-before.HeapAlloc) + float64(len(x.arena.regions)*regionBlocks*blockBytes)) / n
	t.Logf("%.1f bytes a blob", per)
	if per > 66 {
		t.Errorf("%.1f bytes a blob", per)
	}
	runtime.KeepAlive(x)
}

type fileJSON struct {
	Packs []struct {
		ID    *id.ID `json:"id"`
		Blobs []struct {
			ID     *id.ID  `json:"id"`
			Type   *string `json:"type"`
			Offset *uint32 `json:"offset"`
			Length *uint32 `json:"length"`
			Plain  uint32  `json:"uncompressed_length"`
		} `json:"blobs"`
	} `json:"packs"`
}

type packed struct {
	p     id.ID
	blobs []pack.Entry
}

func decode(text []byte) (list []packed, err error) {
	err = Decode(text, func(p id.ID, blobs []pack.Entry) error {
		list = append(list, packed{p, slices.Clone(blobs)})
		return nil
	})
	return list, err
}

// slowDecode is the same by encoding/json.
func slowDecode(text []byte) (list []packed, err error) {
	var f fileJSON
	if err := json.Unmarshal(text, &f); err != nil {
		return nil, err
	}
	for _, p := range f.Packs {
		if p.ID == nil {
			return nil, fmt.Errorf("no id")
		}
		var blobs []pack.Entry
		for _, b := range p.Blobs {
			if b.ID == nil || b.Type == nil || b.Offset == nil || b.Length == nil {
				return nil, fmt.Errorf("field missing")
			}
			e := pack.Entry{ID: *b.ID, Offset: *b.Offset, Length: *b.Length, Plain: b.Plain}
			if *b.Type == "tree" {
				e.Type = pack.TreeBlob
			}
			blobs = append(blobs, e)
		}
		list = append(list, packed{*p.ID, blobs})
	}
	return list, nil
}

func same(a, b []packed) bool {
	return slices.EqualFunc(a, b, func(a, b packed) bool { return a.p == b.p && slices.Equal(a.blobs, b.blobs) })
}

func text(packs, per int) []byte {
	out := []byte(Header)
	for p := range packs {
		if p > 0 {
			out = append(out, ',')
		}
		var blobs []pack.Entry
		for i := range per {
			blobs = append(blobs, blob(p*per+i))
		}
		out = AppendPack(out, num(-p-1), blobs)
	}
	return append(out, Footer...)
}

func TestDecode(t *testing.T) {
	a, b := strings.Repeat("a", 64), strings.Repeat("B", 64)
	blobs := `[{"id":"` + b + `","type":"tree","offset":0,"length":53,"uncompressed_length":12}]`
	for _, c := range []struct {
		name, text string
		packs      int // -1: an error
	}{
		{"ours", string(text(3, 5)), 3},
		{"empty", `{}`, 0},
		{"no packs", `{"packs":[]}`, 0},
		{"null", `{"packs":null}`, 0},
		{"blanks", " {\n\"packs\" : [ { \"id\" : \"" + a + "\" , \"blobs\" : " + blobs + " } ] } \n", 1},
		{"other fields", `{"supersedes":["` + a + `"],"x":{"y":[1,2.5e3,true,null,"\"]}"]},"packs":[{"blobs":` + blobs + `,"id":"` + a + `","z":{}}]}`, 1},
		{"other case", `{"PACKS":[{"Id":"` + a + `","bloBs":` + blobs + `}]}`, 1},
		{"escaped", `{"packs":[{"\u0069d":"\u0061` + a[1:] + `","blobs":` + blobs + `}]}`, 1},
		{"old list", `[{"id":"` + a + `","blobs":` + blobs + `}]`, 1},
		{"nothing", ``, -1},
		{"cut off", `{"packs":[{"id":"` + a + `"`, -1},
		{"rest", `{"packs":[]}x`, -1},
		{"twice", `{"packs":[],"packs":[]}`, -1},
		{"no id", `{"packs":[{"blobs":` + blobs + `}]}`, -1},
		{"short id", `{"packs":[{"id":"aa","blobs":` + blobs + `}]}`, -1},
		{"no type", strings.Replace(`{"packs":[{"id":"`+a+`","blobs":`+blobs+`}]}`, `"type":"tree",`, ``, 1), -1},
		{"bad type", strings.Replace(`{"packs":[{"id":"`+a+`","blobs":`+blobs+`}]}`, `tree`, `twig`, 1), -1},
		{"too short", strings.Replace(`{"packs":[{"id":"`+a+`","blobs":`+blobs+`}]}`, `53`, `31`, 1), -1},
		{"too large", strings.Replace(`{"packs":[{"id":"`+a+`","blobs":`+blobs+`}]}`, `53`, `4294967296`, 1), -1},
		{"beyond 4 GiB", strings.Replace(`{"packs":[{"id":"`+a+`","blobs":`+blobs+`}]}`, `"offset":0`, `"offset":4294967290`, 1), -1},
		{"fraction", strings.Replace(`{"packs":[{"id":"`+a+`","blobs":`+blobs+`}]}`, `53`, `53.5`, 1), -1},
		{"negative", strings.Replace(`{"packs":[{"id":"`+a+`","blobs":`+blobs+`}]}`, `53`, `-53`, 1), -1},
		{"deep", `{"x":` + strings.Repeat("[", 100000), -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := decode([]byte(c.text))
			if c.packs < 0 {
				if err == nil {
					t.Errorf("no error, but %v", got)
				}
				return
			}
			if err != nil || len(got) != c.packs {
				t.Fatalf("%d packs, %v", len(got), err)
			}
			if want, err := slowDecode([]byte(c.text)); c.text[0] != '[' && (err != nil || !same(got, want)) {
				t.Errorf("%v, not %v (%v)", got, want, err)
			}
		})
	}
}

// What Decode accepts, encoding/json accepts, with the same outcome.
func FuzzDecode(f *testing.F) {
	f.Add(text(2, 3))
	f.Add([]byte(`{"packs":null,"x":[1,{"y":"\u00e9"}]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, p []byte) {
		got, err := decode(p)
		if err != nil {
			return
		}
		if !json.Valid(p) {
			t.Fatalf("%q is no JSON", p)
		}
		if strings.HasPrefix(strings.TrimLeft(string(p), " \t\r\n"), "[") {
			return
		}
		want, err := slowDecode(p)
		if err != nil || !same(got, want) {
			t.Errorf("%q: %v, not %v (%v)", p, got, want, err)
		}
	})
}

func TestSeedsExist(t *testing.T) {
	list, err := os.ReadDir("testdata/fuzz/FuzzDecode")
	if err != nil || len(list) == 0 {
		t.Fatalf("no seeds for the fuzz target: %v", err)
	}
}

// What is beyond the limit is in a file, and is found as before; also while more is added, and when there is no file.
func TestSpill(t *testing.T) {
	const n = 400_000 // 18 MiB
	for _, c := range []struct {
		name    string
		o       Options
		spilled bool
	}{
		{"all in memory", Options{}, false},
		{"a file", Options{Memory: 1, Dir: filepath.Join(t.TempDir(), "new")}, true},
		{"a part", Options{Memory: 9 << 20, Dir: t.TempDir()}, true},
		{"no file", Options{Memory: 1, Dir: "/dev/null/nowhere"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := New(c.o)
			defer func() { x = nil; runtime.GC() }() // what frees it must not hurt
			for i := range n {
				no, _ := x.Pack(num(-1 - i/20))
				if !x.Add(no, blob(i)) {
					t.Fatal("a new blob is known")
				}
				if i%1000 == 0 && x.Add(no, blob(i)) {
					t.Fatal("a known blob is new")
				}
				if k := i / 3; i%7 == 0 {
					e := blob(k)
					if l, ok := x.First(e.Type, e.ID); !ok || l.Entry(e.Type, e.ID) != e {
						t.Fatalf("blob %d of %d: %v %v", k, i, l, ok)
					}
				}
			}
			if mem := int64(len(x.arena.regions)*regionBlocks*blockBytes) - x.arena.spilled; (x.arena.spilled > 0) != c.spilled || c.spilled && mem > c.o.Memory+2*regionBlocks*int64(blockBytes) {
				t.Errorf("%d bytes are in the file and %d in memory", x.arena.spilled, mem)
			}
			left, err := filepath.Glob(filepath.Join(c.o.Dir, "holdfast-index-*"))
			if err != nil || len(left) > 0 && c.o.Dir != "" {
				t.Errorf("left behind: %v %v", left, err)
			}
			for i := range n {
				e := blob(i)
				if l, ok := x.First(e.Type, e.ID); !ok || l.Entry(e.Type, e.ID) != e {
					t.Fatalf("blob %d: %v %v", i, l, ok)
				}
			}
			if _, ok := x.First(0, num(1<<30)); ok {
				t.Error("an unknown blob is found")
			}
		})
	}
}

// Memory outside of the heap is given back with the index.
func TestFree(t *testing.T) {
	mapped := func() int {
		p, err := os.ReadFile("/proc/self/statm")
		if err != nil {
			t.Fatal(err)
		}
		pages, err := strconv.Atoi(strings.Fields(string(p))[0])
		if err != nil {
			t.Fatal(err)
		}
		return pages * os.Getpagesize()
	}
	before := mapped()
	for range 40 { // 720 MiB if nothing were given back
		x := New(Options{})
		for i := range 100_000 {
			e := blob(i)
			e.Type = 0
			x.Add(0, e)
		}
		for range 4 {
			for i := range 100_000 / blockSize {
				x.arena.block()[0].id[0] = byte(i)
			}
		}
		x = nil
		runtime.GC()
	}
	for try := 0; ; try++ {
		runtime.GC()
		if now := mapped(); now < before+200<<20 {
			return
		} else if try == 100 {
			t.Fatalf("%d MiB more are mapped than before", (now-before)>>20)
		}
		time.Sleep(10 * time.Millisecond) // cleanups run beside
	}
}
