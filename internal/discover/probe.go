package discover

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// probe is what a storage root on disk tells about its driver.
type probe struct {
	exists bool
	// decomposed: there are spaces with nodes. posix: there are folders of users or projects.
	decomposed, posix bool
	// attributes: in the posix layout, at least one space has its attributes.
	attributes bool
	// old names folders of the layout before 2022 that are not empty.
	old []string
	// prefix of attribute names, "" if none was found. xattrs: they are not in .mpk files.
	prefix string
	xattrs bool
	// Of the sampled nodes with content, so many have their blob on disk, and so many have not.
	present, absent int
}

const (
	sampleBlobs   = 64    // nodes with content that are looked at
	sampleEntries = 20000 // directory entries read for that, so that huge stores take milliseconds
	sampleSpaces  = 50    // folders tested for attributes in the posix layout
)

// prefixes of attribute names; the short ones are FreeBSD's.
var prefixes = []string{"user.ocis.", "user.oc.", "ocis.", "oc."}

func prefixOf(key string) string {
	for _, p := range prefixes {
		if strings.HasPrefix(key, p) {
			return p
		}
	}
	return ""
}

// probeRoot looks at a storage root.
//
// Errors: only if the root cannot be read.
func probeRoot(root string) (*probe, error) {
	p := new(probe)
	entries, err := os.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return nil, err
	}
	p.exists = true
	for _, name := range []string{"nodes", "blobs"} {
		if l, err := os.ReadDir(filepath.Join(root, name)); err == nil && len(l) > 0 {
			p.old = append(p.old, filepath.Join(root, name))
		}
	}
	budget := sampleEntries
	for _, space := range spaceDirs(root) {
		nodes := filepath.Join(space, "nodes")
		if !isDir(nodes) {
			continue
		}
		p.decomposed = true
		if p.prefix == "" {
			p.prefix, p.xattrs = spacePrefix(root, space)
		}
		if p.present+p.absent >= sampleBlobs || budget <= 0 {
			if p.prefix != "" {
				break
			}
			continue
		}
		// A few of each space: one that was damaged or moved must not speak for all.
		p.sample(space, nodes, &budget)
	}
	for _, e := range entries {
		if e.IsDir() {
			p.probePosix(filepath.Join(root, e.Name()), e.Name())
		}
	}
	return p, nil
}

// spaceDirs lists spaces/<2>/<rest>.
func spaceDirs(root string) []string {
	var list []string
	top := filepath.Join(root, "spaces")
	first, _ := os.ReadDir(top)
	for _, a := range first {
		second, _ := os.ReadDir(filepath.Join(top, a.Name()))
		for _, b := range second {
			list = append(list, filepath.Join(top, a.Name(), b.Name()))
		}
	}
	return list
}

// spacePrefix reads the attributes of a space's root node.
func spacePrefix(root, space string) (prefix string, xattrs bool) {
	rel, err := filepath.Rel(filepath.Join(root, "spaces"), space)
	if err != nil {
		return "", false
	}
	node := filepath.Join(space, "nodes", ocis.NodePath(strings.ReplaceAll(rel, "/", "")))
	if attrs, err := readMPK(node + ".mpk"); err == nil {
		for _, a := range attrs {
			if p := prefixOf(a.Key); p != "" {
				return p, false
			}
		}
	}
	if p := xattrPrefix(node); p != "" {
		return p, true
	}
	return "", false
}

// mpkLimit bounds a metadata file in bytes; one with thousands of grants has some 100 KiB.
const mpkLimit = 16 << 20

func readMPK(path string) (ocis.Attributes, error) {
	data, err := readLimited(path, mpkLimit)
	if err != nil {
		return nil, err
	}
	return ocis.ParseMPK(data)
}

// xattrPrefix returns the prefix of the product's attributes on path, not following a link.
func xattrPrefix(path string) string {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return ""
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if p := prefixOf(name); p != "" {
			return p
		}
	}
	return ""
}

// errEnough stops a walk.
var errEnough = errors.New("enough")

// samplePerSpace bounds the nodes looked at in one space.
const samplePerSpace = 16

// sample looks for the blobs of some nodes of a space.
func (p *probe) sample(space, nodes string, budget *int) {
	left := min(samplePerSpace, sampleBlobs-p.present-p.absent)
	_ = filepath.WalkDir(nodes, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil // a damaged place is no reason to stop looking
		}
		if *budget--; *budget <= 0 || left <= 0 {
			return errEnough
		}
		if e.IsDir() || !strings.HasSuffix(e.Name(), ".mpk") {
			return nil
		}
		attrs, err := readMPK(path)
		if err != nil {
			return nil
		}
		blob, status := attrs.Text("blobid"), attrs.Text("nodestatus")
		if blob == "" || attrs.Text("blobsize") == "0" || attrs.Text("blobsize") == "" || strings.HasPrefix(status, "processing") ||
			strings.ContainsAny(blob, "/\x00") {
			return nil
		}
		left--
		if _, err := os.Lstat(filepath.Join(space, "blobs", ocis.NodePath(blob))); err == nil {
			p.present++
		} else {
			p.absent++
		}
		return nil
	})
}

// probePosix tests a folder of the root: a space itself, or a folder of spaces.
func (p *probe) probePosix(dir, name string) {
	switch name {
	case "spaces", "indexes", "uploads", "changes", "nodes", "blobs":
		return
	}
	if name == "users" || name == "projects" {
		p.posix = true // as the driver names them; their attributes may be lost
	}
	dirs := []string{dir}
	if list, err := os.ReadDir(dir); err == nil {
		for _, e := range list[:min(len(list), sampleSpaces)] {
			if e.IsDir() {
				dirs = append(dirs, filepath.Join(dir, e.Name()))
			}
		}
	}
	for _, d := range dirs {
		if x := xattrPrefix(d); x != "" {
			p.posix, p.attributes = true, true
			if p.prefix == "" {
				p.prefix = x
			}
			return
		}
		for _, mark := range []string{".oc-nodes", ".Trash", ".oc-tmp"} {
			p.posix = p.posix || isDir(filepath.Join(d, mark))
		}
	}
}

// probePrefix tells the prefix of attributes in a root of the decomposed layout.
func probePrefix(root string) string {
	for _, space := range spaceDirs(root) {
		if p, _ := spacePrefix(root, space); p != "" {
			return p
		}
	}
	return ""
}

// blobs is what the probe says about where the contents are.
type blobPlace int

const (
	nowhere   blobPlace = iota // nothing on disk, or nothing with content
	localBlob                  // in the spaces
	bucket                     // nodes have content, which is not on disk
	asFiles                    // posix
)

func (p *probe) blobs() blobPlace {
	switch {
	case p.posix && !p.decomposed:
		return asFiles
	case p.present > 0:
		return localBlob
	case p.absent > 0:
		return bucket
	}
	return nowhere
}

// looksLikeRoot tells whether a folder is a storage root at all.
func (p *probe) looksLikeRoot() bool { return p.decomposed || p.posix && p.attributes }
