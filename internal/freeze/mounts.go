package freeze

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// mountTable is the mount table of one process.
type mountTable struct {
	list mountinfo.Table
	byID map[int]int
}

// place is a name for a file that is the same in all mount namespaces: the filesystem and the path
// within it.
type place struct {
	dev  string
	path string
}

// newMountTable takes the table of a process. prefix is put before the mount points; it is the root
// directory of a process in a chroot.
func newMountTable(list mountinfo.Table, prefix string) *mountTable {
	t := &mountTable{list: list, byID: map[int]int{}}
	for i := range list {
		t.byID[list[i].ID] = i
		if prefix != "" && prefix != "/" {
			list[i].Point = filepath.Join(prefix, list[i].Point)
		}
	}
	return t
}

// below reports whether path is dir or lies in it; rest is what follows dir, without a slash.
func below(path, dir string) (rest string, ok bool) {
	if !mountinfo.Below(path, dir) {
		return "", false
	}
	return strings.TrimPrefix(strings.TrimPrefix(path, dir), "/"), true
}

// locate translates path, which is reached through mount id. An id of -1 is unknown: then the
// mount with the longest mount point wins, the latest one where several lie upon each other.
func (t *mountTable) locate(path string, id int) (place, bool) {
	if i, ok := t.byID[id]; ok {
		if rest, ok := below(path, t.list[i].Point); ok {
			return place{t.list[i].Device, filepath.Join(t.list[i].Root, rest)}, true
		}
	}
	best := -1
	for i := range t.list {
		if _, ok := below(path, t.list[i].Point); ok && (best < 0 || len(t.list[i].Point) >= len(t.list[best].Point)) {
			best = i
		}
	}
	if best < 0 {
		return place{}, false
	}
	rest, _ := below(path, t.list[best].Point)
	return place{t.list[best].Device, filepath.Join(t.list[best].Root, rest)}, true
}

// area is a part of a filesystem that belongs to the instance, and its name on this host.
type area struct {
	place
	host string
}

// areas lists what lies below root on this host: its own place, and all that is mounted below it.
func (t *mountTable) areas(root string) []area {
	var list []area
	p, ok := t.locate(root, mountIDOf(root))
	if ok {
		list = append(list, area{p, root})
	}
	for _, m := range t.list {
		if rest, ok := below(m.Point, root); ok && rest != "" {
			list = append(list, area{place{m.Device, m.Root}, m.Point})
		}
	}
	return list
}

// mountIDOf returns the mount by which this process reaches path, -1 if it cannot be told.
func mountIDOf(path string) int {
	f, err := openPath(path)
	if err != nil {
		return -1
	}
	defer f.Close()
	data, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(int(f.Fd())))
	if err != nil {
		return -1
	}
	id, _ := parseFdinfo(data)
	return id
}

// parseFdinfo returns the mount id (-1 if there is none) and the open flags.
func parseFdinfo(data []byte) (mountID int, flags int64) {
	mountID = -1
	for line := range bytes.Lines(data) {
		key, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			continue
		}
		v := string(bytes.TrimSpace(value))
		switch string(key) {
		case "mnt_id":
			if n, err := strconv.Atoi(v); err == nil {
				mountID = n
			}
		case "flags":
			if n, err := strconv.ParseInt(v, 8, 64); err == nil {
				flags = n
			}
		}
	}
	return mountID, flags
}

// isNetwork tells filesystems that other hosts can write to as well.
func isNetwork(fsType string) bool {
	switch fsType {
	case "nfs", "nfs4", "cifs", "smb3", "ceph", "fuse.ceph", "glusterfs", "fuse.glusterfs", "lustre",
		"gpfs", "ocfs2", "gfs2", "9p", "virtiofs", "afs", "beegfs", "fuse.sshfs":
		return true
	}
	return false
}
