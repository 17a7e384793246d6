package membudget

import (
	"bufio"
	"bytes"
	"math"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// available is how much memory there is for this process, in bytes: that of the machine, or less where a control group has
// less. root is "/", or what a test puts in its place. 0: it cannot be told.
func available(root string) int64 {
	have := total(root)
	if n := groupLimit(root); n > 0 && (have == 0 || n < have) {
		have = n
	}
	return have
}

// total is the machine's memory.
func total(root string) int64 {
	p, err := os.ReadFile(filepath.Join(root, "proc/meminfo"))
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(p) {
		if f := strings.Fields(string(line)); len(f) >= 2 && f[0] == "MemTotal:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil || kib > math.MaxInt64>>10 {
				return 0
			}
			return kib << 10
		}
	}
	return 0
}

// groupLimit is the least limit of the control groups that this process is in, of either version. Groups are nested, and each limit
// holds for all below it. 0: there is none.
func groupLimit(root string) int64 {
	mounts, err := mountinfo.Load(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return 0
	}
	p, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return 0
	}
	least := int64(0)
	for s := bufio.NewScanner(bytes.NewReader(p)); s.Scan(); {
		// hierarchy:controllers:path; version 2 has the hierarchy 0 and names no controllers
		f := strings.SplitN(s.Text(), ":", 3)
		if len(f) != 3 {
			continue
		}
		var files []string
		var is func(m *mountinfo.Mount) bool
		switch {
		case f[0] == "0" && f[1] == "":
			// What is above high is slowed down until it is no more, so it is a limit as well.
			files = []string{"memory.max", "memory.high"}
			is = func(m *mountinfo.Mount) bool { return m.Type == "cgroup2" }
		case hasWord(f[1], "memory"):
			files = []string{"memory.limit_in_bytes"}
			is = func(m *mountinfo.Mount) bool { return m.Type == "cgroup" && hasWord(m.Super, "memory") }
		default:
			continue
		}
		for i := range mounts {
			m := &mounts[i]
			if !is(m) {
				continue
			}
			// In a container the mount may show a part of the tree only, or the path may be one of the host.
			rel, ok := cutDir(f[2], m.Root)
			if !ok {
				rel = "/"
			}
			for dir := path.Clean("/" + rel); ; dir = path.Dir(dir) {
				for _, name := range files {
					if n := limit(filepath.Join(root, m.Point, dir, name)); n > 0 && (least == 0 || n < least) {
						least = n
					}
				}
				if dir == "/" {
					break
				}
			}
		}
	}
	return least
}

// cutDir returns the part of p that is below dir.
func cutDir(p, dir string) (string, bool) {
	if dir = strings.TrimSuffix(dir, "/"); p == dir || strings.HasPrefix(p, dir+"/") {
		return p[len(dir):], true
	}
	return "", false
}

func hasWord(list, word string) bool {
	for w := range strings.SplitSeq(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}

// limit reads one limit in bytes. "max", and the huge number that version 1 has for it, are none.
func limit(file string) int64 {
	p, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(p)), 10, 64)
	if err != nil || n >= 1<<62 {
		return 0
	}
	return n
}
