package snapshot

import (
	"encoding/base64"
	"encoding/hex"
	"strconv"
	"time"
	"unicode/utf8"
)

// A TreeWriter builds the canonical bytes of one tree. The zero value is ready.
type TreeWriter struct {
	buf   []byte
	count int
	last  string
	quote []byte
}

const treeHead, treeTail = `{"nodes":[`, "]}\n"

// Reset makes w ready for another tree and keeps its memory.
func (w *TreeWriter) Reset() { w.buf, w.count, w.last = w.buf[:0], 0, "" }

// Len returns the number of nodes added since the last Reset.
func (w *TreeWriter) Len() int { return w.count }

// Add appends n. Nodes must come in strictly ascending order of their raw names; it panics if they
// do not, because such a tree would be refused by others for ever.
func (w *TreeWriter) Add(n *Node) {
	if w.count > 0 && n.Name <= w.last {
		panic("snapshot: tree nodes out of order: " + strconv.Quote(w.last) + " before " + strconv.Quote(n.Name))
	}
	if w.count == 0 {
		w.buf = append(w.buf[:0], treeHead...)
	} else {
		w.buf = append(w.buf, ',')
	}
	w.last = n.Name
	w.count++
	w.buf = w.appendNode(w.buf, n)
}

// Bytes returns the finished tree. It is valid until the next Reset or Add.
func (w *TreeWriter) Bytes() []byte {
	if w.count == 0 {
		w.buf = append(w.buf[:0], treeHead...)
	}
	return append(w.buf, treeTail...)
}

// EncodeTree returns the canonical bytes of a tree whose nodes are sorted.
func EncodeTree(nodes []*Node) []byte {
	var w TreeWriter
	for _, n := range nodes {
		w.Add(n)
	}
	return w.Bytes()
}

func (w *TreeWriter) appendNode(b []byte, n *Node) []byte {
	b = append(b, `{"name":`...)
	w.quote = strconv.AppendQuote(w.quote[:0], n.Name)
	b = appendJSONString(b, w.quote[1:len(w.quote)-1])
	b = append(b, `,"type":"`...)
	b = append(b, n.Type...)
	b = append(b, '"')
	b = appendUint(b, `,"mode":`, uint64(n.Mode))
	t := appendTime(w.quote[:0], n.ModTime)
	w.quote = t
	b = append(append(b, `,"mtime":`...), t...)
	b = append(append(b, `,"atime":`...), t...)
	b = append(append(b, `,"ctime":`...), t...)
	b = append(b, `,"uid":`...)
	b = strconv.AppendUint(b, uint64(n.UID), 10)
	b = append(b, `,"gid":`...)
	b = strconv.AppendUint(b, uint64(n.GID), 10)
	b = appendUint(b, `,"inode":`, n.Inode)
	b = appendUint(b, `,"device_id":`, n.DeviceID)
	b = appendUint(b, `,"size":`, n.Size)
	b = appendUint(b, `,"links":`, n.Links)
	if n.LinkTarget != "" {
		b = append(b, `,"linktarget":`...)
		b = appendJSONString(b, []byte(n.LinkTarget))
		if !utf8.ValidString(n.LinkTarget) {
			b = append(b, `,"linktarget_raw":"`...)
			b = base64.StdEncoding.AppendEncode(b, []byte(n.LinkTarget))
			b = append(b, '"')
		}
	}
	if len(n.Xattrs) > 0 {
		b = append(b, `,"extended_attributes":[`...)
		for i := range n.Xattrs {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, `{"name":`...)
			b = appendJSONString(b, []byte(n.Xattrs[i].Name))
			b = append(b, `,"value":"`...)
			b = base64.StdEncoding.AppendEncode(b, n.Xattrs[i].Value)
			b = append(b, `"}`...)
		}
		b = append(b, ']')
	}
	b = appendUint(b, `,"device":`, n.Device)
	if n.Type != File {
		b = append(b, `,"content":null`...)
	} else {
		b = append(b, `,"content":[`...)
		for i := range n.Content {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, '"')
			b = hex.AppendEncode(b, n.Content[i][:])
			b = append(b, '"')
		}
		b = append(b, ']')
	}
	if n.Type == Dir {
		b = append(b, `,"subtree":"`...)
		b = hex.AppendEncode(b, n.Subtree[:])
		b = append(b, '"')
	}
	return append(b, '}')
}

// appendUint appends key and v, or nothing if v is zero, as Go's omitempty does.
func appendUint(b []byte, key string, v uint64) []byte {
	if v == 0 {
		return b
	}
	return strconv.AppendUint(append(b, key...), v, 10)
}

// appendTime appends t as RFC 3339 in UTC with quotes. Years that the format cannot hold are moved
// to its limits, as restic does.
func appendTime(b []byte, t time.Time) []byte {
	t = t.UTC()
	if y := t.Year(); y < 0 {
		t = time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC)
	} else if y > 9999 {
		t = time.Date(9999, 12, 31, 23, 59, 59, 999999999, time.UTC)
	}
	b = append(b, '"')
	b = t.AppendFormat(b, time.RFC3339Nano)
	return append(b, '"')
}

const hexDigits = "0123456789abcdef"

// appendJSONString appends s as encoding/json writes a string: restic re-encodes with that package,
// and only the same bytes are a fixed point.
func appendJSONString(b []byte, s []byte) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= 0x20 && c != '"' && c != '\\' && c != '<' && c != '>' && c != '&' {
				i++
				continue
			}
			b = append(b, s[start:i]...)
			switch c {
			case '"', '\\':
				b = append(b, '\\', c)
			case '\n':
				b = append(b, '\\', 'n')
			case '\r':
				b = append(b, '\\', 'r')
			case '\t':
				b = append(b, '\\', 't')
			case '\b':
				b = append(b, '\\', 'b')
			case '\f':
				b = append(b, '\\', 'f')
			default:
				b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&0xf])
			}
			i++
			start = i
			continue
		}
		r, n := utf8.DecodeRune(s[i:])
		if r == utf8.RuneError && n == 1 {
			b = append(append(b, s[start:i]...), `\ufffd`...)
			i++
			start = i
			continue
		}
		if r == '\u2028' || r == '\u2029' {
			b = append(append(b, s[start:i]...), '\\', 'u', '2', '0', '2', hexDigits[r&0xf])
			i += n
			start = i
			continue
		}
		i += n
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}
