package browse

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// readUsers reads a database as Identities does.
func readUsers(p []byte) (*Identities, error) {
	r := bytes.NewReader(p)
	out := &Identities{users: map[string]User{}, groups: map[string]string{}}
	b, err := openBolt(int64(len(p)), readerAt(func(buf []byte, off int64) (int, error) {
		if off >= int64(len(p)) {
			return 0, io.EOF
		}
		return r.ReadAt(buf, off)
	}))
	if err != nil {
		return out, err
	}
	return out, b.bucket("id2entry", func(_, val []byte) error {
		if e, err := decodeEntry(val); err == nil {
			out.add(e)
		}
		return nil
	})
}

// TestHostileIdentities: whatever the database holds, reading it ends, and with an error at the worst.
func TestHostileIdentities(t *testing.T) {
	dir := testfixture.Unpack(t, testfixture.OpenCloudPosix)
	good, err := os.ReadFile(filepath.Join(dir, "data", "idm", "idm.boltdb"))
	if err != nil {
		t.Fatal(err)
	}
	who, err := readUsers(good)
	if err != nil || len(who.users) != 6 || who.users["b1f74ec4-dd7e-11ef-a543-03775734d0f7"].Login != "alan" {
		t.Fatalf("%+v, %v", who, err)
	}
	// One torn header is what a crash leaves.
	for _, page := range []int{0, 4096} {
		p := bytes.Clone(good)
		clear(p[page : page+80])
		if who, err := readUsers(p); err != nil || len(who.users) < 5 {
			t.Errorf("without the header at %d: %d users, %v", page, len(who.users), err)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	failed := 0
	for range 500 {
		p := bytes.Clone(good)
		for range 1 + r.IntN(8) {
			// In the headers of pages and of entries most often: there the damage leads elsewhere.
			at := r.IntN(len(p)/4096)*4096 + r.IntN(64)
			if r.IntN(3) == 0 {
				at = r.IntN(len(p))
			}
			p[at] = byte(r.IntN(256))
		}
		if r.IntN(10) == 0 {
			p = p[:r.IntN(len(p))]
		}
		if _, err := readUsers(p); err != nil {
			failed++
			if !errors.Is(err, errBolt) {
				t.Fatalf("unexpected error %v", err)
			}
		}
	}
	if failed < 25 {
		t.Errorf("only %d damaged databases were refused", failed)
	}
	// Branches that lead to themselves and to each other.
	loop := make([]byte, 4096*4)
	for no := uint64(2); no < 4; no++ {
		page := loop[no*4096:]
		binary.LittleEndian.PutUint64(page, no)
		binary.LittleEndian.PutUint16(page[8:], pageBranch)
		binary.LittleEndian.PutUint16(page[10:], 2)
		binary.LittleEndian.PutUint64(page[16+8:], no)
		binary.LittleEndian.PutUint64(page[32+8:], 5-no)
	}
	b := &bolt{size: int64(len(loop)), pageSize: 4096, root: 2, seen: map[uint64]bool{}, readAt: func(p []byte, off int64) error {
		copy(p, loop[off:])
		return nil
	}}
	if err := b.bucket("id2entry", nil); !errors.Is(err, errBolt) {
		t.Errorf("a circle: %v", err)
	}
}

func FuzzIdentities(f *testing.F) {
	f.Add([]byte{}, uint16(0))
	page := make([]byte, 4096)
	binary.LittleEndian.PutUint16(page[8:], pageLeaf)
	binary.LittleEndian.PutUint16(page[10:], 3)
	f.Add(page, uint16(1))
	f.Fuzz(func(_ *testing.T, p []byte, no uint16) {
		b := &bolt{size: int64(len(p)), pageSize: 4096, seen: map[uint64]bool{}, root: uint64(no), readAt: readerAt(func(buf []byte, off int64) (int, error) {
			if off >= int64(len(p)) {
				return 0, io.EOF
			}
			return copy(buf, p[off:]), nil
		})}
		_ = b.bucket("id2entry", func(_, val []byte) error { _, _ = decodeEntry(val); return nil })
		_, _ = readUsers(p)
	})
}
