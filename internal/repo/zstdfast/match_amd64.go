package zstdfast

import "unsafe"

// candidates64 is candidates of 64 positions.
func (f *finder) candidates64(base unsafe.Pointer, p uint) uint64 {
	return candidates64(base, p, &f.table, &f.at, 64-f.log)
}

//go:noescape
func candidates64(base unsafe.Pointer, p uint, table *[1 << maxTable]uint32, at *[look]uint32, shift uint) uint64
