package save

// SetMaxDepth changes a bound for a test, and returns what sets it back.
func SetMaxDepth(n int) func() {
	old := maxDepth
	maxDepth = n
	return func() { maxDepth = old }
}
