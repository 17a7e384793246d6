// Package testfixture unpacks the sample instances below testdata/fixtures and compares trees of
// files exactly. It is for tests and benchmarks only: nothing that ends in the program imports it.
package testfixture

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// Names of the sample instances.
const (
	OCIS            = "ocis-posix"        // driver ocis, prefix user.ocis.
	OpenCloud       = "opencloud-posix"   // driver decomposed, prefix user.oc.
	OpenCloudPosix  = "opencloud-posixfs" // driver posix, metadata in xattrs
	OCISWithS3Blobs = "ocis-s3"           // driver s3ng, objects in bucket/
)

// Names lists all sample instances.
func Names() []string { return []string{OCIS, OpenCloud, OpenCloudPosix, OCISWithS3Blobs} }

// Unpack unpacks testdata/fixtures/<name>.tar.zst with owners, modes, times and extended attributes
// into a temporary directory of the test, and returns the directory that holds data/, config/,
// driver and expected.json. It ends the test if that is not possible, as without root.
func Unpack(t testing.TB, name string) string {
	t.Helper()
	return UnpackInto(t, name, t.TempDir())
}

// UnpackInto is Unpack to a place below dir.
func UnpackInto(t testing.TB, name, dir string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatalf("unpack sample instance %s: owners and extended attributes can be set by root only: run the tests as root", name)
	}
	archive, err := Archive(name)
	if err == nil {
		err = Extract(archive, dir)
	}
	if err != nil {
		t.Fatalf("unpack sample instance %s: %v", name, err)
	}
	return filepath.Join(dir, name)
}

// Archive is the path of the packed sample instance.
func Archive(name string) (string, error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, "testdata", "fixtures", name+".tar.zst"), nil
}

// moduleRoot looks upwards from the working directory, which go test sets to the package's, and then
// from where this file was compiled.
func moduleRoot() (string, error) {
	var starts []string
	if wd, err := os.Getwd(); err == nil {
		starts = append(starts, wd)
	}
	if _, file, _, ok := runtime.Caller(0); ok && filepath.IsAbs(file) {
		starts = append(starts, filepath.Dir(file))
	}
	for _, dir := range starts {
		for {
			if _, err := os.Stat(filepath.Join(dir, "testdata", "fixtures")); err == nil {
				if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
					return dir, nil
				}
			}
			up := filepath.Dir(dir)
			if up == dir {
				break
			}
			dir = up
		}
	}
	return "", errors.New("no directory with go.mod and testdata/fixtures above the working directory: run inside the project")
}

const xattrRecord = "SCHILY.xattr."

// Extract unpacks a zstd-compressed tar archive into dir, which exists, with everything it records.
func Extract(archive, dir string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer z.Close()

	type dirTime struct {
		path string
		time time.Time
		mode int64
	}
	var dirs []dirTime
	r := tar.NewReader(z)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("%s: %w", archive, err)
		}
		if !filepath.IsLocal(h.Name) {
			return fmt.Errorf("%s: entry %q would leave the destination", archive, h.Name)
		}
		path := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
			dirs = append(dirs, dirTime{path, h.ModTime, h.Mode})
		case tar.TypeReg:
			if err := writeFile(path, r); err != nil {
				return err
			}
		case tar.TypeSymlink:
			if err := os.Symlink(h.Linkname, path); err != nil {
				return err
			}
		case tar.TypeLink:
			if !filepath.IsLocal(h.Linkname) {
				return fmt.Errorf("%s: link %q would leave the destination", archive, h.Linkname)
			}
			if err := os.Link(filepath.Join(dir, h.Linkname), path); err != nil {
				return err
			}
			continue
		default:
			return fmt.Errorf("%s: entry %q is of the unexpected type %q", archive, h.Name, h.Typeflag)
		}
		if err := os.Lchown(path, h.Uid, h.Gid); err != nil {
			return err
		}
		for k, v := range h.PAXRecords {
			if name, ok := strings.CutPrefix(k, xattrRecord); ok {
				if err := unix.Lsetxattr(path, name, []byte(v), 0); err != nil {
					return fmt.Errorf("set attribute %s of %s: %w (the temporary directory must be on a filesystem with extended attributes: set TMPDIR)", name, path, err)
				}
			}
		}
		if h.Typeflag == tar.TypeReg {
			if err := chmod(path, h.Mode); err != nil {
				return err
			}
		}
		if err := setTime(path, h.ModTime); err != nil {
			return err
		}
	}
	// A directory's time changes with every entry made in it, so it comes last, children first.
	sort.Slice(dirs, func(i, j int) bool { return dirs[i].path > dirs[j].path })
	for _, d := range dirs {
		if err := chmod(d.path, d.mode); err != nil {
			return err
		}
		if err := setTime(d.path, d.time); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, r); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// chmod takes the bits of a tar header as they are, set-uid, set-gid and sticky included.
func chmod(path string, mode int64) error {
	if err := unix.Chmod(path, uint32(mode&0o7777)); err != nil {
		return &os.PathError{Op: "chmod", Path: path, Err: err}
	}
	return nil
}

func setTime(path string, t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "set time of", Path: path, Err: err}
	}
	return nil
}
