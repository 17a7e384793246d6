package cloud

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Entry is a file or folder as the server lists it.
type Entry struct {
	Name   string // last element of its address; "" for the root of a space
	Folder bool
	ID     string // <mount>$<space>!<node>
	Size   int64  // bytes; of a folder the sum below
	// ModTime has whole seconds; the server gives no more.
	ModTime time.Time
	ETag    string
	SHA1    string // hex, "" for folders and empty files
	Tags    []string
	// Processing is true while the server works on an upload of the file.
	Processing bool
}

// NodeID is the last part of ID.
func (e Entry) NodeID() string {
	_, node, _ := strings.Cut(e.ID, "!")
	return node
}

// Version is an older content of a file.
type Version struct {
	Key     string // <node id>.REV.<time>
	Size    int64
	ModTime time.Time // whole seconds
}

// TrashItem is what was deleted from a space.
type TrashItem struct {
	Key     string
	Path    string // where it was, without leading slash
	Folder  bool
	Size    int64     // bytes; -1 if the server does not say
	Deleted time.Time // whole seconds
}

const (
	nsDAV = "DAV:"
	nsOC  = "http://owncloud.org/ns"
)

// statusMulti is the answer of PROPFIND.
const statusMulti = http.StatusMultiStatus

// listProps asks for what Entry holds. Checksums, sizes and tags come only on request.
const listProps = `<?xml version="1.0"?><d:propfind xmlns:d="DAV:" xmlns:oc="http://owncloud.org/ns"><d:prop>` +
	`<d:resourcetype/><d:getlastmodified/><d:getcontentlength/><d:getetag/><oc:id/><oc:size/><oc:checksums/><oc:tags/></d:prop></d:propfind>`

const trashProps = `<?xml version="1.0"?><d:propfind xmlns:d="DAV:" xmlns:oc="http://owncloud.org/ns"><d:prop>` +
	`<d:resourcetype/><d:getcontentlength/><oc:size/><oc:trashbin-original-location/><oc:trashbin-delete-timestamp/></d:prop></d:propfind>`

// CheckName tells whether the API can address a file of that name. The server may have rules
// of its own beyond that.
//
// Errors: ErrName.
func CheckName(name string) error {
	switch {
	case strings.TrimSpace(name) == "", name == ".", name == "..":
		return fmt.Errorf("%w: %q", ErrName, name)
	case strings.ContainsAny(name, "/\x00"), !utf8.ValidString(name):
		return fmt.Errorf("%w: %q", ErrName, name)
	}
	return nil
}

// davPath makes the elements of an address in a space. p has slashes between names; "" and "/" are
// the root.
func davPath(drive, p string) ([]string, error) {
	if err := CheckName(drive); err != nil {
		return nil, err
	}
	path := []string{"dav", "spaces", drive}
	p = strings.Trim(p, "/")
	if p == "" {
		return path, nil
	}
	for _, name := range strings.Split(p, "/") {
		if err := CheckName(name); err != nil {
			return nil, err
		}
		path = append(path, name)
	}
	return path, nil
}

// Stat returns one file or folder. drive is <mount>$<space>, or with !<node> a place in it.
//
// Errors: ErrNotFound.
func (c *Client) Stat(ctx context.Context, drive, p string) (Entry, error) {
	path, err := davPath(drive, p)
	if err != nil {
		return Entry{}, err
	}
	var e Entry
	found := false
	err = c.propfind(ctx, path, "0", listProps, func(r *response) error {
		if !found {
			e, found = r.entry(), true
			if strings.Trim(p, "/") == "" {
				e.Name = ""
			}
		}
		return nil
	})
	if err == nil && !found {
		err = fmt.Errorf("PROPFIND %s: the answer is empty", p)
	}
	return e, err
}

// List calls fn for each entry of a folder, in the server's order.
//
// Errors: ErrNotFound; what fn returns.
func (c *Client) List(ctx context.Context, drive, p string, fn func(Entry) error) error {
	path, err := davPath(drive, p)
	if err != nil {
		return err
	}
	return c.children(ctx, path, path[2:], listProps, func(r *response) error { return fn(r.entry()) })
}

// Versions lists the older contents of a file, named by its full id. Needs more rights than reading.
func (c *Client) Versions(ctx context.Context, id string) ([]Version, error) {
	if err := CheckName(id); err != nil {
		return nil, err
	}
	var out []Version
	err := c.propfind(ctx, []string{"dav", "meta", id, "v"}, "1", listProps, func(r *response) error {
		// The list itself stands under an address that some servers cut short.
		if n := len(r.at); n > 1 && r.at[n-2] == "v" {
			e := r.entry()
			out = append(out, Version{Key: e.Name, Size: e.Size, ModTime: e.ModTime})
		}
		return nil
	})
	return out, err
}

// OpenVersion reads an older content of a file.
func (c *Client) OpenVersion(ctx context.Context, id, key string) (io.ReadCloser, error) {
	if err := CheckName(key); err != nil {
		return nil, err
	}
	return c.get(ctx, []string{"dav", "meta", id, "v", key})
}

// Trash lists the top items in the trash of a space.
func (c *Client) Trash(ctx context.Context, drive string) ([]TrashItem, error) {
	if err := CheckName(drive); err != nil {
		return nil, err
	}
	var out []TrashItem
	err := c.children(ctx, []string{"dav", "spaces", "trash-bin", drive}, []string{drive}, trashProps, func(r *response) error {
		t := TrashItem{Key: r.name, Size: -1}
		for _, p := range r.props() {
			switch p.XMLName {
			case xml.Name{Space: nsDAV, Local: "resourcetype"}:
				t.Folder = p.Collection != nil
			case xml.Name{Space: nsDAV, Local: "getcontentlength"}, xml.Name{Space: nsOC, Local: "size"}:
				if n, err := strconv.ParseInt(p.Text, 10, 64); err == nil {
					t.Size = n
				}
			case xml.Name{Space: nsOC, Local: "trashbin-original-location"}:
				t.Path = p.Text
			case xml.Name{Space: nsOC, Local: "trashbin-delete-timestamp"}:
				if n, err := strconv.ParseInt(p.Text, 10, 64); err == nil {
					t.Deleted = time.Unix(n, 0).UTC()
				}
			}
		}
		out = append(out, t)
		return nil
	})
	return out, err
}

// Open reads a file.
//
// Errors: ErrNotFound, ErrProcessing.
func (c *Client) Open(ctx context.Context, drive, p string) (io.ReadCloser, error) {
	path, err := davPath(drive, p)
	if err != nil {
		return nil, err
	}
	return c.get(ctx, path)
}

func (c *Client) get(ctx context.Context, path []string) (io.ReadCloser, error) {
	r, err := c.do(ctx, request{method: "GET", path: path, want: []int{200}})
	if err != nil {
		return nil, err
	}
	return r.Body, nil
}

// Mkcol makes a folder; the one above must be there.
//
// Errors: ErrExists, ErrNoParent, ErrForbidden, ErrRejected.
func (c *Client) Mkcol(ctx context.Context, drive, p string) error {
	path, err := davPath(drive, p)
	if err != nil {
		return err
	}
	r, err := c.do(ctx, request{method: "MKCOL", path: path, want: []int{201}})
	if err != nil {
		return err
	}
	return r.Body.Close()
}

// File is a content to upload.
type File struct {
	Size    int64
	ModTime time.Time // kept to the nanosecond
	SHA1    string    // hex; "" leaves the check to the caller
	// Open gives the content from an offset on; it is called again for each try.
	Open func(ctx context.Context, offset int64) (io.ReadCloser, error)
	// OnlyNew refuses to replace a file that is there. Put heeds it, PutResumable cannot.
	OnlyNew bool
}

// mtime is the time as the server takes it: seconds and nanoseconds.
func (f *File) mtime() string {
	return fmt.Sprintf("%d.%09d", f.ModTime.Unix(), f.ModTime.Nanosecond())
}

// Put uploads a file in one request. What is there becomes a version.
//
// Errors: ErrChecksum, ErrLocked, ErrQuota, ErrNoParent, ErrForbidden, ErrRejected, ErrPrecondition.
func (c *Client) Put(ctx context.Context, drive, p string, f *File) error {
	path, err := davPath(drive, p)
	if err != nil {
		return err
	}
	h := http.Header{}
	h["X-OC-Mtime"] = []string{f.mtime()} // spelled as the product does
	if f.SHA1 != "" && f.Size > 0 {
		h["OC-Checksum"] = []string{"SHA1:" + f.SHA1}
	}
	if f.OnlyNew {
		h.Set("If-None-Match", "*")
	}
	r, err := c.do(ctx, request{
		method: "PUT", path: path, header: h, size: f.Size, want: []int{200, 201, 204},
		body: func() (io.ReadCloser, error) { return f.Open(ctx, 0) },
	})
	if err != nil {
		return err
	}
	return r.Body.Close()
}

// Settled waits until the server has finished its work on a file, at most for limit.
//
// Errors: ErrProcessing if it has not.
func (c *Client) Settled(ctx context.Context, drive, p string, limit time.Duration) (Entry, error) {
	until := time.Now().Add(limit)
	for try := 1; ; try++ {
		e, err := c.Stat(ctx, drive, p)
		if err != nil || !e.Processing {
			return e, err
		}
		if !time.Now().Before(until) {
			return e, fmt.Errorf("%s: %w after %v", p, ErrProcessing, limit)
		}
		if err := sleep(ctx, min(c.backoff(try), 5*time.Second)); err != nil {
			return e, err
		}
	}
}

// children asks for a folder and passes on what is in it. Its address ends in tail.
func (c *Client) children(ctx context.Context, path, tail []string, props string, fn func(*response) error) error {
	return c.propfind(ctx, path, "1", props, func(r *response) error {
		switch {
		case hasTail(r.at, tail):
			return nil // the folder itself
		case len(r.at) == 0 || !hasTail(r.at[:len(r.at)-1], tail):
			return fmt.Errorf("PROPFIND /%s: the server answers with %q, which is not in it", strings.Join(path, "/"), r.Href)
		}
		return fn(r)
	})
}

// response is one entry of a multistatus answer.
type response struct {
	Href     string `xml:"DAV: href"`
	Propstat []struct {
		Status string `xml:"DAV: status"`
		Prop   struct {
			Any []property `xml:",any"`
		} `xml:"DAV: prop"`
	} `xml:"DAV: propstat"`

	at   []string // elements of Href
	name string   // the last of them
}

type property struct {
	XMLName    xml.Name
	Text       string    `xml:",chardata"`
	Checksum   []string  `xml:"http://owncloud.org/ns checksum"`
	Collection *struct{} `xml:"DAV: collection"`
}

// props are the properties that the server has: with status 200, or 425 while it works on the file.
func (r *response) props() []property {
	var out []property
	for _, ps := range r.Propstat {
		if strings.Contains(ps.Status, " 200 ") || strings.Contains(ps.Status, " 425 ") {
			out = append(out, ps.Prop.Any...)
		}
	}
	return out
}

func (r *response) entry() Entry {
	e := Entry{Name: r.name}
	for _, ps := range r.Propstat {
		if strings.Contains(ps.Status, " 425 ") {
			e.Processing = true
		}
	}
	for _, p := range r.props() {
		switch p.XMLName {
		case xml.Name{Space: nsDAV, Local: "resourcetype"}:
			e.Folder = p.Collection != nil
		case xml.Name{Space: nsDAV, Local: "getcontentlength"}, xml.Name{Space: nsOC, Local: "size"}:
			if n, err := strconv.ParseInt(p.Text, 10, 64); err == nil {
				e.Size = n
			}
		case xml.Name{Space: nsDAV, Local: "getlastmodified"}:
			if t, err := http.ParseTime(p.Text); err == nil {
				e.ModTime = t.UTC()
			}
		case xml.Name{Space: nsDAV, Local: "getetag"}:
			e.ETag = p.Text
		case xml.Name{Space: nsOC, Local: "id"}:
			e.ID = p.Text
		case xml.Name{Space: nsOC, Local: "checksums"}:
			for _, sum := range strings.Fields(strings.Join(p.Checksum, " ")) {
				if hex, ok := strings.CutPrefix(sum, "SHA1:"); ok {
					e.SHA1 = strings.ToLower(hex)
				}
			}
		case xml.Name{Space: nsOC, Local: "tags"}:
			for _, t := range strings.Split(p.Text, ",") {
				if t = strings.TrimSpace(t); t != "" {
					e.Tags = append(e.Tags, t)
				}
			}
		}
	}
	return e
}

// responseLimit bounds one entry of an answer, in bytes: a name has 255 at most, a tag list some
// thousands.
const responseLimit = 4 << 20

// propfind asks for properties and passes on each entry as it comes.
func (c *Client) propfind(ctx context.Context, path []string, depth, props string, fn func(*response) error) error {
	h := http.Header{}
	h.Set("Depth", depth)
	h.Set("Content-Type", "application/xml")
	r, err := c.do(ctx, request{
		method: "PROPFIND", path: path, header: h, want: []int{statusMulti}, size: int64(len(props)),
		body: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(props)), nil },
	})
	if err != nil {
		return err
	}
	defer r.Body.Close()
	what := "/" + strings.Join(path, "/")
	lr := &allowance{r: r.Body, left: responseLimit}
	dec := xml.NewDecoder(lr)
	// The end of the answer must be seen: half a list must not pass for a whole one.
	ended := false
	for {
		t, err := dec.Token()
		if err == io.EOF && ended {
			return nil
		}
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("PROPFIND %s: reading the answer: %w", what, err)
		}
		switch t := t.(type) {
		case xml.EndElement:
			ended = ended || t.Name.Local == "multistatus"
		case xml.StartElement:
			if t.Name != (xml.Name{Space: nsDAV, Local: "response"}) {
				continue
			}
			var e response
			if err := dec.DecodeElement(&e, &t); err != nil {
				return fmt.Errorf("PROPFIND %s: reading the answer: %w", what, err)
			}
			lr.left = responseLimit
			if e.at = elements(e.Href); len(e.at) > 0 {
				e.name = e.at[len(e.at)-1]
			}
			if err := fn(&e); err != nil {
				return err
			}
		}
	}
}

// elements takes an address apart. Elements are cut before they are decoded: an encoded slash is
// part of a name.
func elements(href string) []string {
	u, err := url.Parse(strings.TrimSpace(href))
	if err != nil {
		return nil
	}
	var out []string
	for _, p := range strings.Split(strings.Trim(u.EscapedPath(), "/"), "/") {
		s, err := url.PathUnescape(p)
		if err != nil {
			return nil
		}
		out = append(out, s)
	}
	return out
}

// hasTail tells whether the address got ends in tail. What stands before is the server's affair:
// it may answer with /remote.php/dav to /dav.
func hasTail(got, tail []string) bool {
	return len(got) >= len(tail) && slices.Equal(got[len(got)-len(tail):], tail)
}

// allowance fails where io.LimitReader would quietly end.
type allowance struct {
	r    io.Reader
	left int64
}

var errTooLong = errors.New("one entry of the answer is too long")

func (a *allowance) Read(p []byte) (int, error) {
	if a.left <= 0 {
		return 0, errTooLong
	}
	n, err := a.r.Read(p)
	a.left -= int64(n)
	return n, err
}
