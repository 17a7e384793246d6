package chunk

const haveLanes = true

// scanLanes goes on with four states, of which each has its lane from p on, and says whether any falls below limit. If none does, states
// are those at the ends of the lanes.
//
//go:noescape
func scanLanes(p *byte, gear *[256]uint64, states *[4]uint64, limit uint64) bool
