package pax

// ParseTime is parsePaxTime.
var ParseTime = parsePaxTime

// TakeAnySum makes r take headers with a wrong checksum: no fuzzer would ever find a right one.
func (t *Reader) TakeAnySum() { t.anySum = true }
