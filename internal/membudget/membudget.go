// Package membudget turns the memory that the program may use into what runs at once: the one place where sizes and counts
// of buffers follow from --memory. [New] makes a [Budget]; [Budget.Apply] gives Go's runtime its limit, and the command
// hands the rest to the packages that do the work.
package membudget

import (
	"fmt"
	"os"
	"runtime/debug"
)

const (
	mib = 1 << 20
	// Least is the smallest size that works, in bytes. Measured with 20,000 and with 200,000 files: see the tests of cmd/holdfast.
	Least = 96 * mib
	// base is what is there whatever runs: the program's own pages, the runtime, the key derivation (32 MiB for a
	// moment), trees and lists that are being built.
	base = 40 * mib
	// outside is what Go's runtime does not count: the pages of the program that are in use.
	outside = 24 * mib
	// most is what a default never exceeds: more memory makes nothing faster.
	most = 1 << 30
	// One part in defaultShare of the machine's memory is the default: the server needs the rest.
	defaultShare = 4
)

// Budget says what may run at once. Sizes are in bytes.
type Budget struct {
	Size int64 // of the whole program's memory
	// GCPercent and GoLimit are for Go's runtime. Buffers are pooled and bounded, so little is garbage: collecting earlier than
	// Go's default of 100 keeps memory low at no measurable cost of time.
	GCPercent int
	GoLimit   int64

	// PackSize is at which size packs are closed, and PackBuffers how many of them are filled, hashed or under way.
	PackSize    int64
	PackBuffers int
	// Compressors is how many chunks are compressed and encrypted at once.
	Compressors int
	// Workers is how many groups of entries and files are read at once, Spaces how many spaces.
	Workers, Spaces int
	// Ahead is how many entries of one directory tree are listed before they are wanted.
	Ahead int
	// Look is how much of what the last backup remembered may be compared with the spaces at once.
	Look int64
	// Readers is how many pieces of packs are read at once, and Windows how many lists of contents a restore works on.
	Readers, Windows int
	// Batch is for the files of a restore whose contents are looked up together; two are under way. A check may remember as much
	// of archives.
	Batch int
	// Objects is for contents on their way into a bucket.
	Objects int64
	// Index is how much of the repository's index is kept in the program's own memory; the rest is in a file that is mapped.
	Index int64
}

// TooSmallError is returned by New for a size with which the work cannot be done.
type TooSmallError struct {
	Size, Least int64 // bytes
	// PackSize is that of --pack-size if it is what needs the memory; else 0.
	PackSize int64
}

func (e *TooSmallError) Error() string {
	why := ""
	if e.PackSize != 0 {
		why = fmt.Sprintf(" with files of %d MiB in the repository", e.PackSize/mib)
	}
	return fmt.Sprintf("%s is too little memory%s: %s is the least that works", Size(e.Size), why, Size(e.Least))
}

// Size shows n bytes as one would write it for --memory.
func Size(n int64) string {
	if n%mib == 0 {
		return fmt.Sprintf("%dM", n/mib)
	}
	if n < mib {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%.1fM", float64(n)/mib)
}

// New divides size bytes for a machine of that many processors. packSize is what the user wants; 0: as large as fits, up to
// the repository format's usual 16 MiB.
//
// Errors: *TooSmallError.
func New(size int64, procs int, packSize int64) (Budget, error) {
	if size < Least {
		return Budget{}, &TooSmallError{Size: size, Least: Least}
	}
	share := size - base // what buffers may take
	part := func(percent, each int64, lowest, highest int) int {
		return min(max(int(share*percent/100/each), lowest), max(highest, lowest))
	}
	b := Budget{Size: size, GCPercent: 40, GoLimit: size - outside, PackSize: packSize}
	if packSize == 0 {
		// Three at least, so that one can be filled while another is stored.
		for b.PackSize = 16 * mib; b.PackSize > 4*mib && 3*b.PackSize > share*30/100; b.PackSize /= 2 {
		}
	} else if 2*packSize > share/2 {
		return Budget{}, &TooSmallError{Size: size, Least: base + 4*packSize, PackSize: packSize}
	}
	// One is being filled for each type of blob, and one waits to be hashed with the next; three more keep a disk busy during its syncs, and
	// many processors fill more than that.
	b.PackBuffers = part(30, b.PackSize, 2, max(6, 3+procs/2))
	b.Compressors = part(20, 10*mib, 1, procs)
	// Twice the processors keep the disk busy. Each holds a buffer of 8 MiB for a large file, and one for headers.
	b.Workers = part(30, 9*mib, 1, min(2*procs, 16))
	// Three, because each has moments in which it waits for its last file. Each has tables that grow with the space.
	b.Spaces = part(30, 50*mib, 1, 3)
	// An entry takes about 300 bytes.
	b.Ahead = part(10, 300*int64(b.Spaces), 1024, 64<<10)
	b.Look = int64(part(5, 1, mib, 32*mib))
	b.Windows = part(100, 150*mib, 1, 2)
	// Enough to hide the latency of a server. Each holds 4 MiB of a pack, and a blob of up to 4 MiB.
	b.Readers = part(40, 8*mib*int64(b.Windows), 1, min(max(procs, 4), 16))
	b.Batch = part(10, 1, 4*mib, 64*mib)
	b.Objects = int64(part(30, 1, 32*mib, 64*mib))
	b.Index = share * 25 / 100
	return b, nil
}

// Default is the size for this machine, in bytes: a quarter of what it, or the control group of this process, has; at least Least
// and at most 1 GiB.
func Default() int64 { return byDefault(available("/")) }

func byDefault(have int64) int64 {
	if have <= 0 {
		return most // unknown: as on most machines
	}
	return min(max(have/defaultShare, Least), most)
}

// Apply sets the limits of Go's runtime. Those that the environment sets by Go's own variables stay.
func (b Budget) Apply() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(b.GCPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(b.GoLimit)
	}
}
