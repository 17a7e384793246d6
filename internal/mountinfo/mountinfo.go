// Package mountinfo says on which filesystem a path lies, where that is mounted, and how much space
// is left there. It reads the kernel's mount table and changes nothing.
package mountinfo

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount is one line of a mount table.
type Mount struct {
	ID, Parent int
	// Device is "major:minor". Two mounts of one filesystem have the same.
	Device string
	// Root is the directory of the filesystem that is mounted; "/" unless it is a bind mount or a
	// subvolume.
	Root string
	// Point is where it is mounted.
	Point string
	// Type is the filesystem: ext4, btrfs, zfs, nfs4, ...
	Type string
	// Source is the device, the dataset or the export.
	Source string
	// Options are those of the mount, Super those of the filesystem, both comma separated.
	Options, Super string
}

// Table is a mount table in the order of mounting: a later mount hides an earlier one.
type Table []Mount

// Parse reads a table in the format of /proc/PID/mountinfo. Lines that are not of that form are an
// error, because a table with holes would name wrong filesystems.
func Parse(r io.Reader) (Table, error) {
	var t Table
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 0, 64<<10), 1<<20) // overlay mounts list all their layers in one line
	for n := 1; sc.Scan(); n++ {
		line := sc.Text()
		if line == "" {
			continue
		}
		m, err := parseLine(line)
		if err != nil {
			return nil, fmt.Errorf("mount table line %d: %w", n, err)
		}
		t = append(t, m)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	return t, nil
}

func parseLine(line string) (Mount, error) {
	// id parent major:minor root point options [optional...] - type source super
	f := strings.Split(line, " ")
	sep := -1
	for i := 6; i < len(f); i++ {
		if f[i] == "-" {
			sep = i
			break
		}
	}
	if sep < 0 || len(f) < sep+3 {
		return Mount{}, errors.New("too few fields")
	}
	id, err := strconv.Atoi(f[0])
	if err != nil {
		return Mount{}, fmt.Errorf("mount id %q is no number", f[0])
	}
	parent, err := strconv.Atoi(f[1])
	if err != nil {
		return Mount{}, fmt.Errorf("parent id %q is no number", f[1])
	}
	m := Mount{
		ID: id, Parent: parent, Device: f[2],
		Root: unescape(f[3]), Point: unescape(f[4]), Options: f[5],
		Type: f[sep+1], Source: unescape(f[sep+2]),
	}
	if len(f) > sep+3 {
		m.Super = f[sep+3]
	}
	return m, nil
}

// unescape resolves the octal escapes of blanks and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Load reads a mount table from a file, such as /proc/1234/mountinfo.
func Load(name string) (Table, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return Parse(f)
}

// Self reads the mount table of this process.
func Self() (Table, error) { return Load("/proc/self/mountinfo") }

// Find returns the mount that an absolute path lies on. Symbolic links in it are not followed.
func (t Table) Find(path string) (Mount, bool) {
	path = filepath.Clean(path)
	best := -1
	for i, m := range t {
		if Below(path, m.Point) && (best < 0 || len(m.Point) >= len(t[best].Point)) {
			best = i
		}
	}
	if best < 0 {
		return Mount{}, false
	}
	return t[best], true
}

// Below reports whether path is dir or lies in it. Both must be clean.
func Below(path, dir string) bool {
	if dir == "/" {
		return strings.HasPrefix(path, "/")
	}
	return path == dir || strings.HasPrefix(path, dir) && path[len(dir)] == '/'
}

// Info is what is known of the place of a path.
type Info struct {
	// Filesystem is its type, Mount where it is mounted, Source the device or export.
	Filesystem string
	Mount      string
	Source     string
	// Free is what the caller may still write there, Total the size of the filesystem, in bytes.
	Free, Total int64
	// FreeFiles is the number of files that can still be made; -1 if the filesystem has no limit.
	FreeFiles int64
}

// Of tells where path lies. Symbolic links are followed. Of a path that does not exist, the nearest
// parent that does counts, so that space can be checked before a directory is made.
func Of(path string) (Info, error) {
	t, err := Self()
	if err != nil {
		return Info{}, err
	}
	return t.Of(path)
}

// Of is like the function Of, with a table that was read before.
func (t Table) Of(path string) (Info, error) {
	path, err := existing(path)
	if err != nil {
		return Info{}, err
	}
	m, ok := t.Find(path)
	if !ok {
		return Info{}, fmt.Errorf("no mount found for %s", path)
	}
	in := Info{Filesystem: m.Type, Mount: m.Point, Source: m.Source}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return Info{}, fmt.Errorf("statfs %s: %w", path, err)
	}
	unit := int64(st.Frsize)
	if unit == 0 {
		unit = int64(st.Bsize)
	}
	in.Free, in.Total, in.FreeFiles = int64(st.Bavail)*unit, int64(st.Blocks)*unit, int64(st.Ffree)
	if st.Files == 0 {
		in.FreeFiles = -1
	}
	return in, nil
}

// existing returns the nearest existing parent of path, or path itself, without symbolic links.
func existing(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	for {
		p, err := filepath.EvalSymlinks(path)
		if err == nil {
			return p, nil
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) || path == "/" {
			return "", err
		}
		path = filepath.Dir(path)
	}
}
