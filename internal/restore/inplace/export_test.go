package inplace

// SetStep calls fn before each change on disk.
func SetStep(fn func()) { step = fn }
