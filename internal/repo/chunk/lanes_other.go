//go:build !amd64

package chunk

const haveLanes = false

func scanLanes(*byte, *[256]uint64, *[4]uint64, uint64) bool { panic("chunk: no assembler") }
