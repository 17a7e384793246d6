package testfixture

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Expected is what the real server answered just before it was stopped: expected.json.
type Expected struct {
	Users map[string]ExpectedUser // key: user name
}

// ExpectedUser is what one user saw.
type ExpectedUser struct {
	Spaces       map[string]ExpectedSpace // key: drive id, <mount id>$<space id>
	SharedWithMe []string                 // names
	SharesByMe   []ExpectedShare
}

// ExpectedShare is a share that a user gave.
type ExpectedShare struct {
	Type        int    // 0 user, 3 public link
	With        string // user name; a public link's token is made unreadable
	Path        string // with leading slash
	Permissions int
}

// ExpectedSpace is one space.
type ExpectedSpace struct {
	ID          string                  `json:"id"`
	Name        string                  `json:"name"`
	DriveType   string                  `json:"driveType"` // personal, project, mountpoint
	DriveAlias  string                  `json:"driveAlias"`
	Description string                  `json:"description"`
	Disabled    bool                    `json:"disabled"`
	QuotaUsed   int64                   `json:"quota_used"` // bytes; 0 where the server gave none
	Items       map[string]ExpectedItem `json:"items"`      // key: path, "" is the root, else with leading slash
	Trash       []ExpectedTrash         `json:"trash"`
}

// ExpectedItem is a file or folder.
type ExpectedItem struct {
	FileID       string `json:"fileid"`
	Type         string `json:"resourcetype"` // "collection" or ""
	Size         string `json:"size"`
	Checksums    string `json:"checksums"` // "SHA1:... MD5:... ADLER32:..."; "" for empty files
	LastModified string `json:"getlastmodified"`
	Content      string `json:"content"` // SHA-256, hex; "" for folders
	Tags         string `json:"tags"`
	Versions     []ExpectedVersion
	// Error is the HTTP status of what the server could not answer, as for disabled spaces.
	Error int `json:"error"`
}

// ExpectedVersion is an older content of a file.
type ExpectedVersion struct {
	Key    string // <node id>.REV.<time>
	Size   int64  // bytes
	SHA256 string // hex
}

// ExpectedTrash is an item in the trash of a space.
type ExpectedTrash struct {
	Key  string // "" where the server gave none, as for folders
	Path string // original path without leading slash
	Size int64  // bytes; -1 where the server gave none
}

// IsFolder tells folders from files.
func (i ExpectedItem) IsFolder() bool { return i.Type == "collection" }

// Bytes is Size as a number; 0 if there is none.
func (i ExpectedItem) Bytes() int64 {
	n, _ := strconv.ParseInt(i.Size, 10, 64)
	return n
}

// SHA1 is the recorded checksum in hex, or "".
func (i ExpectedItem) SHA1() string {
	for _, f := range strings.Fields(i.Checksums) {
		if hex, ok := strings.CutPrefix(f, "SHA1:"); ok {
			return hex
		}
	}
	return ""
}

// NodeID is the last part of FileID.
func (i ExpectedItem) NodeID() string {
	_, id, _ := strings.Cut(i.FileID, "!")
	return id
}

// SpaceID is ID without the mount id.
func (s ExpectedSpace) SpaceID() string {
	_, id, _ := strings.Cut(s.ID, "$")
	return id
}

// LoadExpected reads expected.json of the unpacked instance dir.
func LoadExpected(t testing.TB, dir string) *Expected {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "expected.json"))
	if err != nil {
		t.Fatal(err)
	}
	e := new(Expected)
	if err := json.Unmarshal(data, e); err != nil {
		t.Fatalf("%s/expected.json: %v", dir, err)
	}
	return e
}

// Spaces returns every space that any user sees, once, by drive id, without the mount points of
// shares, which are views of another space. Where the users' answers differ
// the one with the most items counts: a user who may not look into a space gets less.
func (e *Expected) Spaces() map[string]ExpectedSpace {
	all := map[string]ExpectedSpace{}
	for _, u := range e.Users {
		for id, s := range u.Spaces {
			if s.DriveType == "mountpoint" {
				continue
			}
			if have, ok := all[id]; !ok || len(s.Items) > len(have.Items) {
				all[id] = s
			}
		}
	}
	return all
}

// UnmarshalJSON takes the two lists of shares apart from the spaces beside which they stand.
func (u *ExpectedUser) UnmarshalJSON(data []byte) error {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(data, &fields); err != nil {
		return err
	}
	u.Spaces = map[string]ExpectedSpace{}
	for k, v := range fields {
		var err error
		switch k {
		case "shared_with_me":
			err = json.Unmarshal(v, &u.SharedWithMe)
		case "shares_by_me":
			err = json.Unmarshal(v, &u.SharesByMe)
		default:
			var s ExpectedSpace
			err = json.Unmarshal(v, &s)
			u.Spaces[k] = s
		}
		if err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
	}
	return nil
}

// UnmarshalJSON reads [type, with, path, permissions].
func (s *ExpectedShare) UnmarshalJSON(data []byte) error {
	return row(data, &s.Type, &s.With, &s.Path, &s.Permissions)
}

// UnmarshalJSON reads [key, size, sha256].
func (v *ExpectedVersion) UnmarshalJSON(data []byte) error {
	var size string
	if err := row(data, &v.Key, &size, &v.SHA256); err != nil {
		return err
	}
	var err error
	v.Size, err = strconv.ParseInt(size, 10, 64)
	return err
}

// UnmarshalJSON reads [key, path, size].
func (x *ExpectedTrash) UnmarshalJSON(data []byte) error {
	var size *string
	if err := row(data, &x.Key, &x.Path, &size); err != nil {
		return err
	}
	if size == nil {
		x.Size = -1
		return nil
	}
	var err error
	x.Size, err = strconv.ParseInt(*size, 10, 64)
	return err
}

func row(data []byte, into ...any) error {
	var cells []json.RawMessage
	if err := json.Unmarshal(data, &cells); err != nil {
		return err
	}
	if len(cells) != len(into) {
		return fmt.Errorf("%d values where %d are expected: %s", len(cells), len(into), data)
	}
	for i, c := range cells {
		if err := json.Unmarshal(c, into[i]); err != nil {
			return err
		}
	}
	return nil
}
