package ocis

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Upload is the record of an upload session: uploads/<id>.info beside the bytes in uploads/<id>. The
// session's id becomes the blob id.
type Upload struct {
	ID             string
	Size           int64 // bytes announced
	Offset         int64 // bytes received, as recorded
	SizeIsDeferred bool
	MetaData       map[string]string
	Storage        map[string]string
}

// ParseUpload reads a .info file.
func ParseUpload(data []byte) (Upload, error) {
	var u Upload
	if len(bytes.TrimSpace(data)) == 0 {
		return u, errors.New("record of an upload session is empty")
	}
	if err := json.Unmarshal(data, &u); err != nil {
		return u, fmt.Errorf("record of an upload session is no JSON of the known form: %w", err)
	}
	if u.ID == "" {
		return u, errors.New("record of an upload session has no ID")
	}
	return u, nil
}

// SpaceID is the space that the upload goes to.
func (u Upload) SpaceID() string { return u.Storage["SpaceRoot"] }

// NodeID is the node that the upload becomes the content of.
func (u Upload) NodeID() string { return u.Storage["NodeId"] }

// Name is the file's name.
func (u Upload) Name() string {
	if n := u.MetaData["filename"]; n != "" {
		return n
	}
	return u.Storage["NodeName"]
}

// VersionsPath is the absolute path of the revision that the upload made, or "".
func (u Upload) VersionsPath() string { return u.MetaData["versionsPath"] }

// TrashInfo is the record of a trashed item of the posix driver.
type TrashInfo struct {
	Path string // relative to the space's root; raw, not percent-encoded
	// DeletionDate is local time of the server without a zone: 2006-01-02T15:04:05.
	DeletionDate string
}

// Time reads DeletionDate as a time in loc.
func (t TrashInfo) Time(loc *time.Location) (time.Time, error) {
	return time.ParseInLocation("2006-01-02T15:04:05", t.DeletionDate, loc)
}

// ParseTrashInfo reads a .trashinfo file. Names may hold line feeds, which the format does not
// escape, so the path ends where the last DeletionDate line begins.
func ParseTrashInfo(data []byte) (TrashInfo, error) {
	var t TrashInfo
	const head, pathKey, dateKey = "[Trash Info]", "\nPath=", "\nDeletionDate="
	s := string(data)
	i := strings.Index(s, head)
	if i < 0 || strings.TrimSpace(s[:i]) != "" {
		return t, errors.New("record of a trashed item does not begin with [Trash Info]")
	}
	s = s[i+len(head):]
	p, d := strings.Index(s, pathKey), strings.LastIndex(s, dateKey)
	if p < 0 {
		return t, errors.New("record of a trashed item has no Path")
	}
	if d >= 0 {
		date, _, _ := strings.Cut(s[d+len(dateKey):], "\n")
		t.DeletionDate = strings.TrimSpace(date)
	}
	if d < p { // the date comes first, or there is none
		d = len(strings.TrimRight(s, "\n"))
	}
	if d < p+len(pathKey) {
		return t, errors.New("record of a trashed item has an empty Path")
	}
	t.Path = strings.TrimSuffix(s[p+len(pathKey):d], "\r")
	if t.Path == "" {
		return t, errors.New("record of a trashed item has an empty Path")
	}
	return t, nil
}
