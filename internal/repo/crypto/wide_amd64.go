package crypto

import "github.com/klauspost/cpuid/v2"

var hasWide = cpuid.CPU.Supports(cpuid.AESNI, cpuid.VAES, cpuid.AVX512F, cpuid.AVX512DQ, cpuid.AVX512BW, cpuid.AVX512VL, cpuid.AVX512IFMA)

// subWord is SubWord of FIPS 197, 5.2.
//
//go:noescape
func subWord(x uint32) uint32

// ctrVAES encrypts n times 256 bytes of src to dst, and counts on. There must be one at least.
//
//go:noescape
func ctrVAES(rounds *[240]byte, counter *[2]uint64, dst, src *byte, n int)

// polyIFMA adds n times eight blocks at p to the lanes, each of which it multiplies before. by are the limbs of the factor, and the
// second and third times 20. There must be eight blocks at least.
//
//go:noescape
func polyIFMA(lanes *[3][8]uint64, by *[5]uint64, p *byte, n int)
