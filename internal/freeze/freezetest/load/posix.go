package load

import (
	"bytes"
	"crypto/md5"  //nolint:gosec // checksums of the product
	"crypto/sha1" //nolint:gosec // as above
	"encoding/binary"
	"errors"
	"fmt"
	"hash/adler32"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// isPosix tells whether the users' storage below the base data path is one of the posix driver.
func isPosix(base string) bool {
	_, err := os.Stat(filepath.Join(base, store, "users"))
	return err == nil
}

// posixStore makes changes as the posix driver of the 1.x releases does, which fills files in place.
type posixStore struct {
	base string // base data path
	note func(rel string)
}

// changePosix makes one change. note is called with each path that it touches, relative to the users'
// storage, but for the folders above it.
func changePosix(base string, note func(rel string)) error {
	p := &posixStore{base: base, note: note}
	spaces, err := p.spaces()
	if err != nil {
		return err
	}
	space := spaces[rand.N(len(spaces))]
	var files, dirs []string
	root := filepath.Join(base, store, space)
	err = filepath.WalkDir(root, func(f string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := path.Join(space, strings.TrimPrefix(f, root))
		switch name := e.Name(); {
		case e.IsDir() && (name == ".oc-nodes" || name == ".Trash" || name == ".oc-tmp"):
			return fs.SkipDir
		case e.IsDir():
			dirs = append(dirs, rel)
		case p.get(rel, "id") != "" && p.get(rel, "nodestatus") == "":
			files = append(files, rel)
		}
		return nil
	})
	if err != nil {
		return err
	}
	dir := dirs[rand.N(len(dirs))]
	kind := rand.N(10)
	if len(files) == 0 {
		kind = 0
	}
	switch {
	case kind == 0:
		return p.mkdir(space, dir)
	case kind <= 2:
		return p.add(space, dir)
	case kind == 3:
		return p.rename(files[rand.N(len(files))])
	case kind == 4:
		return p.remove(space, files[rand.N(len(files))])
	default:
		return p.overwrite(space, files[rand.N(len(files))])
	}
}

func (p *posixStore) spaces() ([]string, error) {
	var list []string
	for _, kind := range []string{"users", "projects"} {
		entries, err := os.ReadDir(filepath.Join(p.base, store, kind))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if rel := path.Join(kind, e.Name()); e.IsDir() && p.get(rel, "space.id") != "" {
				list = append(list, rel)
			}
		}
	}
	if len(list) == 0 {
		return nil, errors.New("there is no space")
	}
	return list, nil
}

func (p *posixStore) abs(rel string) string { return filepath.Join(p.base, store, rel) }

func (p *posixStore) get(rel, key string) string {
	buf := make([]byte, 4096)
	n, err := unix.Getxattr(p.abs(rel), ocis.PrefixOpenCloud+key, buf)
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

// set sets attributes, in pairs of key and value.
func (p *posixStore) set(rel string, pairs ...string) error {
	for i := 0; i < len(pairs); i += 2 {
		if err := unix.Setxattr(p.abs(rel), ocis.PrefixOpenCloud+pairs[i], []byte(pairs[i+1]), 0); err != nil {
			return fmt.Errorf("%s: %s: %w", rel, pairs[i], err)
		}
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func uuid() string {
	b := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, rand.Uint64()), rand.Uint64())
	return fmt.Sprintf("%x-%x-4%03x-8%03x-%x", b[:4], b[4:6], b[6:8][:1], b[8:10][:1], b[10:])
}

// content is something new. Some of it has the size that was there before.
func content(size int64) []byte {
	if size == 0 || rand.N(2) == 0 {
		size = 1 + rand.N(int64(4000))
	}
	text := strconv.FormatUint(rand.Uint64(), 16) + " "
	return bytes.Repeat([]byte(text), int(size)/len(text)+1)[:size]
}

// fill writes content into a file in place, with all attributes that go with it.
func (p *posixStore) fill(rel string, data []byte, mtime time.Time) error {
	f, err := os.OpenFile(p.abs(rel), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	half := len(data) / 2
	for _, part := range [][]byte{data[:half], data[half:]} {
		if _, err := f.Write(part); err != nil {
			return err
		}
	}
	s1, m5 := sha1.Sum(data), md5.Sum(data) //nolint:gosec // as above
	err = p.set(rel, "blobid", uuid(), "blobsize", strconv.Itoa(len(data)), "mtime", stamp(mtime), "type", "1",
		"cs.sha1", string(s1[:]), "cs.md5", string(m5[:]),
		"cs.adler32", string(binary.BigEndian.AppendUint32(nil, adler32.Checksum(data))))
	if err != nil {
		return err
	}
	return os.Chtimes(p.abs(rel), time.Time{}, mtime)
}

// propagate changes the sizes and times of the folders above rel, up to the space.
func (p *posixStore) propagate(space, rel string, more int64) error {
	for dir := rel; dir != space; {
		dir = path.Dir(dir)
		size, _ := strconv.ParseInt(p.get(dir, "treesize"), 10, 64)
		if err := p.set(dir, "treesize", strconv.FormatInt(size+more, 10), "tmtime", stamp(time.Now())); err != nil {
			return err
		}
	}
	return nil
}

// size is that of the content of a file.
func (p *posixStore) size(rel string) int64 {
	n, _ := strconv.ParseInt(p.get(rel, "blobsize"), 10, 64)
	return n
}

func (p *posixStore) mkdir(space, dir string) error {
	rel := path.Join(dir, "folder "+uuid()[:8])
	p.note(rel)
	if err := os.Mkdir(p.abs(rel), 0o700); err != nil {
		return err
	}
	if err := p.set(rel, "id", uuid(), "parentid", p.get(dir, "id"), "name", path.Base(rel), "type", "2", "propagation", "1", "treesize", "0"); err != nil {
		return err
	}
	return p.propagate(space, rel, 0)
}

func (p *posixStore) add(space, dir string) error {
	rel := path.Join(dir, "file "+uuid()[:8])
	p.note(rel)
	data := content(0)
	if err := p.fill(rel, data, time.Now()); err != nil {
		return err
	}
	if err := p.set(rel, "id", uuid(), "parentid", p.get(dir, "id"), "name", path.Base(rel)); err != nil {
		return err
	}
	return p.propagate(space, rel, int64(len(data)))
}

// overwrite keeps the old content as a version. The client may have chosen the time that was there.
func (p *posixStore) overwrite(space, rel string) error {
	old, err := os.ReadFile(p.abs(rel))
	if err != nil {
		return err
	}
	st, err := os.Stat(p.abs(rel))
	if err != nil {
		return err
	}
	mtime := st.ModTime()
	rev := path.Join(space, ".oc-nodes", ocis.NodePath(p.get(rel, "id"))+".REV."+stamp(mtime))
	p.note(rev)
	p.note(rel)
	if err := os.MkdirAll(filepath.Dir(p.abs(rev)), 0o700); err != nil {
		return err
	}
	if err := p.fill(rev, old, mtime); err != nil {
		return err
	}
	if rand.N(2) == 0 {
		mtime = time.Now()
	}
	data := content(int64(len(old)))
	if err := p.fill(rel, data, mtime); err != nil {
		return err
	}
	return p.propagate(space, rel, int64(len(data)-len(old)))
}

func (p *posixStore) rename(rel string) error {
	to := path.Join(path.Dir(rel), "renamed "+uuid()[:8])
	p.note(rel)
	p.note(to)
	if err := os.Rename(p.abs(rel), p.abs(to)); err != nil {
		return err
	}
	return p.set(to, "name", path.Base(to))
}

func (p *posixStore) remove(space, rel string) error {
	key := uuid()
	item := path.Join(space, ".Trash/files", key+".trashitem")
	info := path.Join(space, ".Trash/info", key+".trashinfo")
	for _, f := range []string{rel, item, info} {
		p.note(f)
	}
	size := p.size(rel)
	err := errors.Join(os.MkdirAll(filepath.Dir(p.abs(item)), 0o700), os.MkdirAll(filepath.Dir(p.abs(info)), 0o700))
	if err != nil {
		return err
	}
	text := fmt.Sprintf("[Trash Info]\nPath=%s\nDeletionDate=%s", strings.TrimPrefix(rel, space+"/"), time.Now().Format("2006-01-02T15:04:05"))
	if err := os.WriteFile(p.abs(info), []byte(text), 0o600); err != nil {
		return err
	}
	if err := os.Rename(p.abs(rel), p.abs(item)); err != nil {
		return err
	}
	return p.propagate(space, rel, -size)
}
