// Package save writes files and folders of a snapshot to where people want them: into a folder, a tar or a
// zip. Contents are compared with the checksums that the server recorded.
//
// Names in a snapshot are data. Nothing is ever written outside of the destination, whatever the names are and
// whatever lies there: a folder is entered by way of os.Root, links in it are not followed, and names that
// cannot be names are written down otherwise.
package save

import (
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Options say how to write.
type Options struct {
	// DryRun writes nothing and tells what would be done.
	DryRun bool
	// Keep leaves alone what exists and differs. Without it that is moved aside: renamed.
	Keep bool
	// Progress is told of each finished file; nil is nobody. It may be called by several goroutines.
	Progress func(path string, bytes int64)
	// Now names what is moved aside.
	Now time.Time
}

// Result is what was done. The lists hold at most listLimit entries; the numbers count all.
type Result struct {
	Files     int64 `json:"files"` // written
	Folders   int64 `json:"folders"`
	Unchanged int64 `json:"unchanged"` // files that were right already
	Bytes     int64 `json:"bytes"`     // written
	Kept      int64 `json:"kept"`      // files that exist, differ and were left alone
	// MovedAside are new names of what was in the way.
	MovedAside []string `json:"moved_aside"`
	// Renamed are items that could not have their own names here.
	Renamed []Renaming `json:"renamed"`
	// Mismatched are files whose content is not what the server recorded. They were written as they are.
	Mismatched []string `json:"mismatched"`
	// Skipped are items that are neither files nor folders.
	Skipped []string `json:"skipped"`
	// Failed are items that were not written.
	Failed []Failure `json:"failed"`

	// Counts of the lists.
	Moved, Renames, Mismatches, Skips, Failures int64 `json:"-"`
}

// Renaming is an item with another name than its own. Path is that in the snapshot.
type Renaming struct {
	Path string `json:"path"`
	Name string `json:"name"`
}

// Failure is an item that was not written.
type Failure struct {
	Path  string `json:"path"`
	Error string `json:"error"`
}

const listLimit = 1000

func newResult() *Result {
	return &Result{MovedAside: []string{}, Renamed: []Renaming{}, Mismatched: []string{}, Skipped: []string{}, Failed: []Failure{}}
}

func note[T any](list *[]T, n *int64, x T) {
	*n++
	if len(*list) < listLimit {
		*list = append(*list, x)
	}
}

// FailedError says that some items were not written. The Result lists them.
type FailedError struct {
	Count int64
	First Failure
}

func (e *FailedError) Error() string {
	if e.Count == 1 {
		return fmt.Sprintf("one item was not written: %q: %s", e.First.Path, e.First.Error)
	}
	return fmt.Sprintf("%d items were not written, the first is %q: %s", e.Count, e.First.Path, e.First.Error)
}

// MismatchError says that some files are not what the server recorded. They were written as the
// snapshot has them. The Result lists them.
type MismatchError struct {
	Count int64
	First string
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("%d written files do not have the checksum that the server recorded, the first is %q: they were damaged before the backup, or changed behind the server's back", e.Count, e.First)
}

// err is what a finished run ends with.
func (r *Result) err() error {
	var errs []error
	if r.Failures > 0 {
		errs = append(errs, &FailedError{r.Failures, r.Failed[0]})
	}
	if r.Mismatches > 0 {
		errs = append(errs, &MismatchError{r.Mismatches, r.Mismatched[0]})
	}
	return errors.Join(errs...)
}

// checksum compares a content with what the server recorded.
type checksum struct {
	hash.Hash
	want string
}

// newChecksum returns nil for a file without a checksum, and for one of the posix driver that was changed behind
// the server's back: its old checksum proves nothing, and its time shows it.
func newChecksum(it *browse.Item) *checksum {
	want := it.SHA1()
	if want == "" {
		return nil
	}
	if it.Space.Posix() {
		if s, ok := it.Node.Attr(it.Space.Prefix() + "mtime"); ok {
			m, err := ocis.NodeFromAttributes(it.Space.Prefix(), []ocis.Attribute{{Key: it.Space.Prefix() + "mtime", Value: []byte(s)}})
			if err == nil && !m.MTime.Equal(it.Node.ModTime) {
				return nil
			}
		}
	}
	return &checksum{sha1.New(), want}
}

func (c *checksum) ok() bool { return c == nil || hex.EncodeToString(c.Sum(nil)) == c.want }

// nameLimit is what file systems take, in bytes.
const nameLimit = 255

// safeName makes a name one that can be a file's on this machine. Most are returned as they are.
func safeName(name string) string {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > nameLimit {
		return snapshot.SafeName(name)
	}
	return name
}

// portableName makes a name one that every file system takes, Windows' included.
func portableName(name string) string {
	var b strings.Builder
	for i := 0; i < len(name); {
		r, n := utf8.DecodeRuneInString(name[i:])
		switch {
		case r == utf8.RuneError && n == 1, r < 0x20, r == 0x7f, strings.ContainsRune(`<>:"/\|?*%`, r),
			i+n == len(name) && (r == '.' || r == ' '): // Windows drops them at the end
			for _, c := range []byte(name[i : i+n]) {
				fmt.Fprintf(&b, "%%%02X", c)
			}
		default:
			b.WriteString(name[i : i+n])
		}
		i += n
	}
	out := b.String()
	if base, _, _ := strings.Cut(strings.ToUpper(out), "."); reserved[base] {
		out = "%" + fmt.Sprintf("%02X", out[0]) + out[1:]
	}
	if len(out) > nameLimit/2 {
		if short := snapshot.SafeName(strings.Repeat("x", nameLimit) + name); len(short) > 20 {
			cut := out[:nameLimit/2-20]
			for !utf8.ValidString(cut) {
				cut = cut[:len(cut)-1]
			}
			out = cut + short[len(short)-20:]
		}
	}
	if out == "" {
		return "%00"
	}
	return out
}

// reserved are names of devices on Windows.
var reserved = map[string]bool{
	"CON": true, "PRN": true, "AUX": true, "NUL": true, "COM1": true, "COM2": true, "COM3": true, "COM4": true, "COM5": true,
	"COM6": true, "COM7": true, "COM8": true, "COM9": true, "LPT1": true, "LPT2": true, "LPT3": true, "LPT4": true, "LPT5": true,
	"LPT6": true, "LPT7": true, "LPT8": true, "LPT9": true,
}

// numbered puts a number before the ending: "a (2).txt".
func numbered(name string, n int) string {
	add := fmt.Sprintf(" (%d)", n)
	base, ext := name, ""
	if i := strings.LastIndexByte(name, '.'); i > 0 && len(name)-i < 20 {
		base, ext = name[:i], name[i:]
	}
	return base[:min(len(base), nameLimit-len(add)-len(ext))] + add + ext
}

// pickNames gives each item of one folder a name of its own: its own where it can have it, and else one that no other
// has. taken are all these names; folded counts those that differ in case only.
func pickNames(items []*browse.Item, safe func(string) string) (picked []string, taken map[string]bool, folded map[string]int) {
	picked, taken, folded = make([]string, len(items)), map[string]bool{}, map[string]int{}
	give := func(i int, name string) {
		picked[i], taken[name] = name, true
		folded[strings.ToLower(name)]++
	}
	for i, it := range items {
		if own := it.Name(); safe(own) == own && !taken[own] {
			give(i, own)
		}
	}
	for i, it := range items {
		if picked[i] != "" {
			continue
		}
		want := safe(it.Name())
		name := want
		for n := 2; taken[name]; n++ {
			name = numbered(want, n)
		}
		give(i, name)
	}
	return picked, taken, folded
}

// errTooDeep: a chain of folders that was made to do harm.
var errTooDeep = errors.New("more folders lie in each other than can be written")

// maxDepth bounds how deep folders may lie in each other, far beyond what paths on disk can be.
var maxDepth = 2000 // a variable for tests
