package freeze

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// procStat is what we need of /proc/PID/stat.
type procStat struct {
	state byte
	flags uint64
	start uint64 // clock ticks after boot
}

func readStat(path string) (procStat, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return procStat{}, err
	}
	// The name of the command is in parentheses and may hold any character: cut after the last one.
	i := bytes.LastIndexByte(data, ')')
	if i < 0 {
		return procStat{}, fmt.Errorf("%s: not understood", path)
	}
	f := strings.Fields(string(data[i+1:]))
	if len(f) < 20 {
		return procStat{}, fmt.Errorf("%s: not understood", path)
	}
	flags, err1 := strconv.ParseUint(f[6], 10, 64)
	start, err2 := strconv.ParseUint(f[19], 10, 64)
	if err1 != nil || err2 != nil {
		return procStat{}, fmt.Errorf("%s: not understood", path)
	}
	return procStat{state: f[0][0], flags: flags, start: start}, nil
}

// commandOf returns the program of a process for messages, with the word server if that is what it
// was told to be, "" if it is gone or unknown. The rest of the command line may hold secrets.
func commandOf(pid int) string {
	if pid <= 0 {
		return ""
	}
	dir := "/proc/" + strconv.Itoa(pid)
	data, err := os.ReadFile(dir + "/cmdline")
	if err == nil && len(data) > 0 {
		args := strings.Split(strings.TrimRight(string(data), "\x00"), "\x00")
		name := filepath.Base(args[0])
		if slices.Contains(args[1:], "server") {
			name += " server"
		}
		return name
	}
	data, err = os.ReadFile(dir + "/comm")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}
