//go:build !amd64

package crypto

const hasWide = false

func subWord(uint32) uint32                             { panic("no instructions") }
func ctrVAES(*[240]byte, *[2]uint64, *byte, *byte, int) { panic("no instructions") }
func polyIFMA(*[3][8]uint64, *[5]uint64, *byte, int)    { panic("no instructions") }
