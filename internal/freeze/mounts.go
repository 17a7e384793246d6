package freeze

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// mount is one line of a mountinfo file.
type mount struct {
	id     int
	dev    string // "major:minor" of the filesystem, decimal
	root   string // which part of the filesystem is mounted
	point  string // where, as the owner of the table sees it
	fsType string
}

// mountTable is the mountinfo of one mount namespace, in the order of the kernel.
type mountTable struct {
	list []mount
	byID map[int]int
}

// place is a name for a file that is the same in all mount namespaces: the filesystem and the path
// within it.
type place struct {
	dev  string
	path string
}

// parseMountinfo reads a mountinfo file. prefix is put before the mount points; it is the root
// directory of a process in a chroot. Lines that make no sense are left out.
func parseMountinfo(data []byte, prefix string) *mountTable {
	t := &mountTable{byID: map[int]int{}}
	sc := bufio.NewScanner(bytes.NewReader(data))
	sc.Buffer(nil, 1<<20) // overlay mounts have option strings of many kilobytes
	for sc.Scan() {
		// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
		f := strings.Fields(sc.Text())
		if len(f) < 7 {
			continue
		}
		id, err := strconv.Atoi(f[0])
		if err != nil {
			continue
		}
		m := mount{id: id, dev: f[2], root: unescapeOctal(f[3]), point: unescapeOctal(f[4])}
		for i := 6; i+1 < len(f); i++ {
			if f[i] == "-" {
				m.fsType = f[i+1]
				break
			}
		}
		if prefix != "" && prefix != "/" {
			m.point = filepath.Join(prefix, m.point)
		}
		t.byID[id] = len(t.list)
		t.list = append(t.list, m)
	}
	return t
}

// unescapeOctal undoes the \040 notation of /proc.
func unescapeOctal(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// below reports whether path is dir or lies in it; rest is what follows dir, without a slash.
func below(path, dir string) (rest string, ok bool) {
	if dir == "/" {
		return strings.TrimPrefix(path, "/"), strings.HasPrefix(path, "/")
	}
	if !strings.HasPrefix(path, dir) {
		return "", false
	}
	rest = path[len(dir):]
	if rest == "" {
		return "", true
	}
	if rest[0] != '/' {
		return "", false
	}
	return rest[1:], true
}

// locate translates path, which is reached through mount id. An id of -1 is unknown: then the
// mount with the longest mount point wins, the latest one where several lie upon each other.
func (t *mountTable) locate(path string, id int) (place, bool) {
	if i, ok := t.byID[id]; ok {
		if rest, ok := below(path, t.list[i].point); ok {
			return place{t.list[i].dev, filepath.Join(t.list[i].root, rest)}, true
		}
	}
	best := -1
	for i := range t.list {
		if _, ok := below(path, t.list[i].point); ok && (best < 0 || len(t.list[i].point) >= len(t.list[best].point)) {
			best = i
		}
	}
	if best < 0 {
		return place{}, false
	}
	rest, _ := below(path, t.list[best].point)
	return place{t.list[best].dev, filepath.Join(t.list[best].root, rest)}, true
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
		if rest, ok := below(m.point, root); ok && rest != "" {
			list = append(list, area{place{m.dev, m.root}, m.point})
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
