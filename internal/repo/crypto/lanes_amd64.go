package crypto

import "github.com/klauspost/cpuid/v2"

var (
	hasLanes  = cpuid.CPU.Supports(cpuid.AVX)
	hasRotate = cpuid.CPU.Supports(cpuid.AVX512F, cpuid.AVX512VL)
)

// mixAVX and mixAVX512 make the next state of two lanes, which are pairs times 128 bytes long. The words of each block are in the
// order that permuted tells.
//
//go:noescape
func mixAVX(a, b *mixing, pairs int)

//go:noescape
func mixAVX512(a, b *mixing, pairs int)

func mix(a, b *mixing, pairs int) {
	if hasRotate {
		mixAVX512(a, b, pairs)
	} else {
		mixAVX(a, b, pairs)
	}
}
