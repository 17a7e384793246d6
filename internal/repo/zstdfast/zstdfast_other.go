//go:build !amd64

package zstdfast

import "unsafe"

func (f *finder) candidates64(base unsafe.Pointer, p uint) uint64 { return f.candidates(base, p, look) }

func (w *bitWriter) write(seqs []sequence, lt, ot, mt *table) { w.writeGo(seqs, lt, ot, mt) }

func encode(seqs []sequence, matches []match, counts *[3][maxSymbols]uint32) {
	encodeGo(seqs, matches, counts)
}

func (w *walk) choose(src []byte) { w.chooseGo(src) }

func (t *codes) stream(to unsafe.Pointer, p []byte) unsafe.Pointer { return t.streamGo(to, p) }
