package index

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An arena holds the entries' blocks outside of Go's heap: the collector would let garbage of 40 % of their size pile up.
// What is beyond most goes into a file without a name, which is mapped in its place, so that the kernel can take the memory
// back. That file is written by write(2), because a full disk would otherwise be a signal and not an error; if it cannot be
// written, the memory is kept.
type arena struct {
	dir     string
	most    int64 // bytes that stay in memory
	regions []region
	used    int // blocks of the last region
	file    *os.File
	spilled int64 // bytes in file
	failed  bool  // the file is of no use
}

type region struct {
	mem  []byte
	heap bool // of Go's heap, not mapped
}

const (
	blockBytes = blockSize * int(unsafe.Sizeof(entry{}))
	// regionBlocks of 192 KiB each are mapped at once: 3 MiB.
	regionBlocks = 16
)

// block returns an empty block.
func (a *arena) block() *[blockSize]entry {
	if len(a.regions) == 0 || a.used == regionBlocks {
		a.spill()
		mem, err := unix.Mmap(-1, 0, regionBlocks*blockBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		r := region{mem: mem}
		if err != nil { // a limit on maps, or on memory as a whole
			r = region{make([]byte, regionBlocks*blockBytes), true}
		}
		a.regions, a.used = append(a.regions, r), 0
	}
	mem := a.regions[len(a.regions)-1].mem[a.used*blockBytes:]
	a.used++
	return (*[blockSize]entry)(unsafe.Pointer(unsafe.SliceData(mem)))
}

// spill moves the last region, which is full and will not change any more, into the file if more than most is in memory.
func (a *arena) spill() {
	n := len(a.regions)
	if a.most <= 0 || a.failed || n == 0 || a.regions[n-1].heap || int64(n)*regionBlocks*int64(blockBytes)-a.spilled <= a.most {
		return
	}
	if a.file == nil {
		if a.dir != "" {
			_ = os.MkdirAll(a.dir, 0o700)
		}
		f, err := os.CreateTemp(a.dir, "holdfast-index-*")
		if err != nil {
			a.failed = true
			return
		}
		os.Remove(f.Name())
		a.file = f
	}
	mem := a.regions[n-1].mem
	if _, err := a.file.WriteAt(mem, a.spilled); err != nil {
		a.failed = true
		return
	}
	// In its place, since entries are found by their addresses. If the kernel refuses, the memory is as it was.
	_, err := unix.MmapPtr(int(a.file.Fd()), a.spilled, unsafe.Pointer(unsafe.SliceData(mem)), uintptr(len(mem)), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_FIXED)
	if err != nil {
		a.failed = true
		return
	}
	a.spilled += int64(len(mem))
}

// free gives everything back.
func (a *arena) free() {
	for _, r := range a.regions {
		if !r.heap {
			_ = unix.Munmap(r.mem)
		}
	}
	if a.file != nil {
		a.file.Close()
	}
	a.regions = nil
}

// release frees the arena when nobody has x any more.
func release(x *Index) { runtime.AddCleanup(x, (*arena).free, x.arena) }
