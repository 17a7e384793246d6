package main

import (
	"crypto/md5"
	"crypto/sha1"
	"errors"
	"fmt"
	"hash/adler32"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// A user's file that the demo can overwrite.
type userFile struct {
	name  string
	space string // directory of the space
	node  string // path of the node below nodes/
	attrs ocis.Attributes
}

// findFile returns the first text file with content, by the path of its node.
func findFile(store string) (*userFile, error) {
	links, err := filepath.Glob(filepath.Join(store, "spaces", "*", "*"))
	if err != nil {
		return nil, err
	}
	for _, space := range links {
		nodes := filepath.Join(space, "nodes")
		var found *userFile
		err := filepath.WalkDir(nodes, func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".mpk") {
				return err
			}
			name := strings.TrimSuffix(filepath.Base(path), ".mpk")
			if kind, _, _ := ocis.ClassifyNodeName(name); kind != ocis.NameNode {
				return nil
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			attrs, err := ocis.ParseMPK(data)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			if attrs.Text("type") != "1" || attrs.Text("blobid") == "" || !strings.HasSuffix(attrs.Text("name"), ".txt") {
				return nil
			}
			node, err := filepath.Rel(nodes, strings.TrimSuffix(path, ".mpk"))
			if err != nil {
				return err
			}
			found = &userFile{attrs.Text("name"), space, node, attrs}
			return fs.SkipAll
		})
		if err != nil || found != nil {
			return found, err
		}
	}
	return nil, errors.New("the sample instance holds no text file")
}

// save gives f a new content, as the server does when a user saves it: the old state becomes a
// revision, and the new content gets a blob of its own under a new id.
func (f *userFile) save(content []byte, blobID string, now time.Time) error {
	node := filepath.Join(f.space, "nodes", f.node)
	old, err := os.Stat(node + ".mpk")
	if err != nil {
		return err
	}
	stamp := ".REV." + f.attrs.Text("mtime")
	var revision ocis.Attributes
	for _, name := range []string{"blobid", "blobsize", "cs.sha1", "cs.md5", "cs.adler32", "mtime", "type"} {
		if v, ok := f.attrs.Get(name); ok {
			revision.Set(ocis.PrefixOpenCloud, name, v)
		}
	}
	blob := filepath.Join(f.space, "blobs", ocis.NodePath(blobID))
	if err := os.MkdirAll(filepath.Dir(blob), 0o700); err != nil {
		return err
	}
	sum1, sum5 := sha1.Sum(content), md5.Sum(content)
	sumA := adler32.Checksum(content)
	for name, v := range map[string][]byte{
		"blobid": []byte(blobID), "blobsize": []byte(strconv.Itoa(len(content))), "mtime": []byte(now.UTC().Format(time.RFC3339Nano)),
		"cs.sha1": sum1[:], "cs.md5": sum5[:], "cs.adler32": {byte(sumA >> 24), byte(sumA >> 16), byte(sumA >> 8), byte(sumA)},
	} {
		f.attrs.Set(ocis.PrefixOpenCloud, name, v)
	}
	for path, data := range map[string][]byte{
		blob: content, node + stamp: nil, node + stamp + ".mpk": ocis.EncodeMPK(revision), node + ".mpk": ocis.EncodeMPK(f.attrs),
	} {
		if err := os.WriteFile(path, data, old.Mode().Perm()); err != nil {
			return err
		}
	}
	return nil
}
