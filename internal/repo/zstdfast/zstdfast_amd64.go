package zstdfast

import (
	"unsafe"

	"github.com/klauspost/cpuid/v2"
)

var bmi2 = cpuid.CPU.Supports(cpuid.BMI1, cpuid.BMI2, cpuid.LZCNT)

// candidates64 is candidates of 64 positions.
func (f *finder) candidates64(base unsafe.Pointer, p uint) uint64 {
	return candidates64(base, p, &f.table, &f.at, 64-f.log)
}

// choose is chooseGo where all positions are at least margin from the end.
func (w *walk) choose(src []byte) {
	if !bmi2 {
		w.chooseGo(src)
		return
	}
	chooseBMI2(w)
}

func encode(seqs []sequence, matches []match, counts *[3][maxSymbols]uint32) {
	if !bmi2 {
		encodeGo(seqs, matches, counts)
		return
	}
	encodeBMI2(&seqs[0], &matches[0], len(matches), counts)
}

func (w *bitWriter) write(seqs []sequence, lt, ot, mt *table) {
	if !bmi2 || len(seqs) == 0 {
		w.writeGo(seqs, lt, ot, mt)
		return
	}
	writeBMI2(w, &seqs[0], len(seqs), lt, ot, mt)
}

func (t *codes) stream(to unsafe.Pointer, p []byte) unsafe.Pointer {
	if !bmi2 {
		return t.streamGo(to, p)
	}
	return streamBMI2(to, unsafe.SliceData(p), len(p)%5, len(p)/5, t)
}

//go:noescape
func candidates64(base unsafe.Pointer, p uint, table *[1 << maxTable]uint32, at *[look]uint32, shift uint) uint64

//go:noescape
func writeBMI2(w *bitWriter, seqs *sequence, n int, lt, ot, mt *table)

//go:noescape
func encodeBMI2(seqs *sequence, matches *match, n int, counts *[3][maxSymbols]uint32)

//go:noescape
func chooseBMI2(w *walk)

//go:noescape
func streamBMI2(to unsafe.Pointer, p *byte, odd, fives int, t *codes) unsafe.Pointer
