// Package paxtest writes pax archives for tests, bad ones as well.
package paxtest

import (
	"bytes"
	"fmt"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/pax"
)

// Writer gathers an archive. The zero value is ready.
type Writer struct{ bytes.Buffer }

// Item is one entry.
type Item struct {
	Type       byte
	Name, Link string
	Mode       uint32
	UID, GID   uint32
	Sec, Nsec  int64
	Rdev       uint64
	Data       []byte
	Rec        map[string]string // more records; they go before those that the other fields make
}

// Record returns one record of an extended header.
func Record(k, v string) string {
	n := len(k) + len(v) + 3
	for total := n; ; total++ {
		if s := fmt.Sprint(total); len(s)+n == total {
			return s + " " + k + "=" + v + "\n"
		}
	}
}

// Block writes a header block whose fields say what the arguments say, whether it makes sense or not.
func (w *Writer) Block(typ byte, name, link string, it *Item, size int) {
	var b [pax.BlockSize]byte
	copy(b[0:100], name)
	put := func(at, n int, v uint64) { copy(b[at:at+n], fmt.Sprintf("%0*o\x00", n-1, v)) }
	put(100, 8, uint64(it.Mode))
	put(108, 8, uint64(it.UID))
	put(116, 8, uint64(it.GID))
	put(124, 12, uint64(size))
	put(136, 12, uint64(max(it.Sec, 0)))
	b[156] = typ
	copy(b[157:257], link)
	copy(b[257:265], "ustar\x0000")
	put(329, 8, uint64(unix.Major(it.Rdev)))
	put(337, 8, uint64(unix.Minor(it.Rdev)))
	sum := int(8 * ' ')
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	w.Write(b[:])
}

// Padded writes p and the zeros that fill its last block.
func (w *Writer) Padded(p []byte) {
	w.Write(p)
	w.Write(make([]byte, -len(p)&(pax.BlockSize-1)))
}

// Add writes an entry with an extended header.
func (w *Writer) Add(it Item) {
	rec := map[string]string{"mtime": fmt.Sprintf("%d.%09d", it.Sec, it.Nsec), "path": it.Name}
	if it.Link != "" {
		rec["linkpath"] = it.Link
	}
	for k, v := range it.Rec {
		rec[k] = v
	}
	keys := []string{}
	for k := range rec {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	var head string
	for _, k := range keys {
		head += Record(k, rec[k])
	}
	w.Block('x', "pax", "", &it, len(head))
	w.Padded([]byte(head))
	w.Block(it.Type, it.Name[:min(len(it.Name), 100)], it.Link[:min(len(it.Link), 100)], &it, len(it.Data))
	w.Padded(it.Data)
}

// End writes the two blocks that end an archive, and returns all of it.
func (w *Writer) End() []byte {
	w.Write(make([]byte, 2*pax.BlockSize))
	return w.Bytes()
}
