//go:build !amd64

package crypto

var hasLanes = false

func mix(*mixing, *mixing, int) { panic("no instructions") }
