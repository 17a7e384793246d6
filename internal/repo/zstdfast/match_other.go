//go:build !amd64

package zstdfast

import "unsafe"

func (f *finder) candidates64(base unsafe.Pointer, p uint) uint64 { return f.candidates(base, p, look) }
