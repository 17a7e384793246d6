//go:build !linux

package local

func renameNew(from, to string) error { return renameCheck(from, to) }
