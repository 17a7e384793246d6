package consistency

import (
	"context"
	"crypto/sha1" //nolint:gosec // the server's checksum
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// spaceCheck is one look at one space.
type spaceCheck struct {
	c        *checker
	st       *storeCheck
	sp       Space
	t        table
	res      *spaceResult
	info     *spaceInfo
	rootNode int32
	// lost counts, by place in the findings, nodes whose content nothing names any more.
	lost []int
	// restoring are the nodes that an interrupted restore in place was writing; nil if there is none.
	restoring map[string]bool
	// nameless tells that something here has lost its id.
	nameless bool
	// dups are links beyond the first to the same node; odd are links that lead to no place of a node.
	dups []dupLink
	odd  []oddLink
	// about is the node of each finding whose path is known only when all links are.
	about []int32
	// trashed finds the trashed node of an id; there are few.
	trashed map[key]int32
}

type dupLink struct {
	folder, node int32
	name         string
}

type oddLink struct {
	folder int32 // -1 is the trash
	name   string
	target string
}

func hashName(s string) uint32 {
	h := fnv.New32a()
	_, _ = io.WriteString(h, s)
	return h.Sum32()
}

// add reports a finding about node i.
func (s *spaceCheck) add(class Class, i int32, format string, args ...any) *Finding {
	f := Finding{
		Class: class, Severity: severity(class), Store: s.st.Name, Space: s.sp.ID, Detail: fmt.Sprintf(format, args...),
	}
	if i >= 0 {
		f.Node = s.t.id(i)
	}
	s.res.findings = append(s.res.findings, f)
	s.about = append(s.about, i)
	return &s.res.findings[len(s.res.findings)-1]
}

// at reports a finding about the entry at path.
func (s *spaceCheck) at(class Class, path, format string, args ...any) *Finding {
	f := s.add(class, -1, format, args...)
	f.Path = path
	return f
}

// name fills in what is known in the end.
func (s *spaceCheck) name() {
	for k := range s.res.findings {
		f := &s.res.findings[k]
		f.Name = s.info.alias
		if i := s.about[k]; i >= 0 && f.Path == "" {
			f.Path = s.path(i)
		}
	}
}

// path is where users see node i.
func (s *spaceCheck) path(i int32) string {
	n := s.t.nodes.at(i)
	if n.flags&fRevision != 0 {
		_, stamp, _ := cutID(s.t.id(i))
		if n.link < 0 {
			return "(version " + stamp + ")"
		}
		return s.path(n.link) + " (version " + stamp + ")"
	}
	var parts []string
	suffix := ""
	for steps := int32(0); ; steps++ {
		switch {
		case i == s.rootNode:
			return s.join("", parts, suffix)
		case n.flags&fTrashed != 0:
			return s.join(strings.TrimSuffix(s.t.names.get(n.name), "/"), parts, suffix+" (trashed)")
		case n.link < 0 || steps > s.t.nodes.n || len(parts) > 1000: // a circle, or nothing leads here
			name := s.t.names.get(n.name)
			if name == "" {
				name = "(node " + s.t.id(i) + ")"
			}
			parts = append(parts, name)
			return s.join("...", parts, suffix)
		}
		parts = append(parts, s.t.names.get(n.name))
		i = n.link
		n = s.t.nodes.at(i)
	}
}

func (s *spaceCheck) join(top string, parts []string, suffix string) string {
	var b strings.Builder
	b.WriteString(top)
	for k := len(parts) - 1; k >= 0; k-- {
		b.WriteString("/" + parts[k])
	}
	if b.Len() == 0 {
		b.WriteString("/")
	}
	return b.String() + suffix
}

// takeRoot notes what the root node says about the space.
func (s *spaceCheck) takeRoot(m *ocis.NodeMeta) {
	s.info.known = true
	if m.Space != nil {
		s.info.kind, s.info.owner, s.info.alias = m.Space.Type, m.Space.OwnerID, m.Space.Alias
	}
	for _, g := range m.Grants {
		s.info.members = append(s.info.members, principal(g))
	}
}

func principal(g ocis.Grant) string {
	if g.Group {
		return "g:" + g.Principal
	}
	return "u:" + g.Principal
}

// setMeta notes what the metadata of node i says.
func (s *spaceCheck) setMeta(i int32, m *ocis.NodeMeta) {
	n := s.t.nodes.at(i)
	n.flags = n.flags&^(fBad|fFile|fFolder|fHasSize|fOrigin|fBusy) | fMeta
	n.blob = -1
	n.parent = key{}
	if m.ParentID != "" {
		n.parent = s.t.ids.key(m.ParentID)
	}
	n.nameHash = hashName(m.Name)
	switch m.Type {
	case ocis.TypeFile:
		n.flags |= fFile
	case ocis.TypeFolder:
		n.flags |= fFolder
	}
	if m.HasTreeSize {
		n.flags |= fHasSize
		n.treeSize = m.TreeSize
	}
	if m.TrashOrigin != "" {
		n.flags |= fOrigin
		if n.flags&fTrashed != 0 {
			n.name = s.t.names.add(m.TrashOrigin)
		}
	}
	if n.name == 0 && n.flags&fRevision == 0 && m.Name != "" && i != s.rootNode {
		n.name = s.t.names.add(m.Name) // until a link comes, or if none does
	}
	if strings.HasPrefix(m.NodeStatus, "processing:") {
		n.flags |= fBusy
	}
	if len(m.Grants) > 0 && i != s.rootNode {
		if s.t.grants == nil {
			s.t.grants = map[int32][]string{}
		}
		var list []string
		for _, g := range m.Grants {
			list = append(list, principal(g))
		}
		s.t.grants[i] = list
	}
	if m.Type == ocis.TypeReference {
		return
	}
	if m.BlobID == "" {
		if m.Type == ocis.TypeFile && m.BlobSize > 0 {
			n.treeSize = m.BlobSize
			s.add(BlobMissing, i, "metadata says %d bytes, and names no blob", m.BlobSize)
		}
		return
	}
	n.blob = s.t.blobAt(m.BlobID)
	b := s.t.blobs.at(n.blob)
	if b.has || b.want != 0 {
		b.sizes = b.sizes || b.want != m.BlobSize
	}
	b.want = m.BlobSize
	if m.HasSHA1 {
		b.sha1, b.has = m.SHA1, true
	}
	if m.HasMD5 {
		b.md5, b.sum = m.MD5, true
	}
}

// link notes that folder has a link called name to the node called id.
func (s *spaceCheck) link(folder int32, name, id string) {
	i := s.t.node(id)
	n := s.t.nodes.at(i)
	if n.flags&fLinked != 0 {
		s.dups = append(s.dups, dupLink{folder, i, name})
		return
	}
	n.flags |= fLinked
	n.link = folder
	if n.name == 0 || hashName(name) != n.nameHash {
		n.name = s.t.names.add(name)
	}
	p := s.t.nodes.at(folder)
	n.next, p.kid = p.kid, i
}

// doubt says that the sizes of folder and of all that it is in are not known.
func (s *spaceCheck) doubt(folder int32) {
	for steps := int32(0); folder >= 0 && steps <= s.t.nodes.n; steps++ {
		n := s.t.nodes.at(folder)
		if n.flags&fUnknown != 0 {
			return
		}
		n.flags |= fUnknown
		folder = n.link
	}
}

// doubtParent doubts the folder that the metadata of n names.
func (s *spaceCheck) doubtParent(n *node) {
	if n.parent != (key{}) {
		if p := s.t.find(n.parent); p >= 0 {
			s.doubt(p)
		}
	}
}

// walk visits the nodes below the unvisited node top, each folder after what is in it.
func (s *spaceCheck) walk(top int32, leave func(i int32)) {
	type step struct {
		i    int32
		next int32 // child to visit
	}
	n := s.t.nodes.at(top)
	n.flags |= fSeen
	stack := []step{{top, n.kid}}
	for len(stack) > 0 {
		st := &stack[len(stack)-1]
		if st.next >= 0 {
			k := st.next
			c := s.t.nodes.at(k)
			st.next = c.next
			if c.flags&fSeen == 0 {
				c.flags |= fSeen
				stack = append(stack, step{k, c.kid})
			}
			continue
		}
		leave(st.i)
		stack = stack[:len(stack)-1]
	}
}

// systemSpace is the type of the spaces of the system storage. They do not account for sizes: all are 0.
const systemSpace = "metadata"

// sizeUp adds the size of i to its folder, and compares the size of a folder with the sum.
func (s *spaceCheck) sizeUp(i int32) {
	n := s.t.nodes.at(i)
	if n.flags&fPresent != 0 && n.flags&fMeta == 0 || n.flags&fPresent == 0 {
		s.doubt(n.link)
	}
	size := n.sum
	if n.flags&fDir == 0 {
		size = 0
		if n.flags&fFile != 0 {
			size = n.treeSize
		}
		if n.blob >= 0 {
			b := s.t.blobs.at(n.blob)
			size = b.want
			if b.sizes {
				s.doubt(n.link)
			}
		}
	} else if n.flags&(fHasSize|fMeta) == fHasSize|fMeta && n.flags&fUnknown == 0 && n.treeSize != n.sum && s.info.kind != systemSpace {
		f := s.add(TreeSize, i, "metadata says %d bytes, and the files below have %d", n.treeSize, n.sum)
		f.Bytes = n.sum
		f.same = fmt.Sprint(n.treeSize - n.sum) // both move while somebody uploads
		if s.st.Layout == string(ocis.Posix) {  // restoring from the trash does not add the size again
			f.Severity = Note
		}
		if s.st.pending[s.sp.ID] {
			f.Severity = Note
			f.Detail += "; changes that the server has not applied yet are waiting"
		}
	}
	if n.link >= 0 {
		s.t.nodes.at(n.link).sum += size
	}
}

// blobsCheck compares blobs with what refers to them.
func (s *spaceCheck) blobsCheck(ctx context.Context) error {
	t := &s.t
	soft := make([]bool, t.blobs.n) // named by metadata that counts only half
	for i := range t.nodes.n {
		n := t.nodes.at(i)
		if n.blob < 0 {
			continue
		}
		if n.flags&fPresent == 0 {
			soft[n.blob] = soft[n.blob] || n.flags&(fLinked|fTrashLink) != 0
			continue
		}
		b := t.blobs.at(n.blob)
		if b.node < 0 {
			b.node = i
		} else if first := t.nodes.at(b.node); first.base != n.base {
			f := s.add(BlobShared, i, "node %s (%s) has the same blob: a purge of one takes the content of the other", t.id(b.node), s.path(b.node))
			f.Blob, f.Bytes = t.ids.text(b.id), b.want
		}
	}
	remote := s.st.Remote && s.st.Blobs == nil
	var orphans []int32
	for k := range t.blobs.n {
		b := t.blobs.at(k)
		if b.node < 0 {
			if b.size >= 0 && !soft[k] {
				orphans = append(orphans, k)
			}
			continue
		}
		s.res.blobs++
		s.res.bytes += b.want
		id := t.ids.text(b.id)
		up := s.st.uploads[id]
		if up != nil {
			up.used, up.stored = true, up.stored || b.size >= 0
		}
		report := func(class Class, format string, args ...any) {
			f := s.add(class, b.node, format, args...)
			f.Blob, f.Bytes = id, b.want
			if b.size >= 0 && b.mtime != 0 {
				f.Time = unixTime(b.mtime)
			}
		}
		switch {
		case b.sizes:
			report(BlobSize, "metadata says different sizes in different places, one of them %d bytes", b.want)
		case remote:
		case b.size < 0 && up != nil && up.size == b.want:
			report(UploadInFlight, "its content of %d bytes is in uploads/: the server has not finished with it", b.want)
		case b.size < 0 && up != nil && up.size >= 0:
			report(BlobMissing, "there is no such blob, and uploads/ has %d of its %d bytes", up.size, b.want)
		case b.size < 0:
			detail := ""
			if t.nodes.at(b.node).flags&fBusy != 0 {
				detail = ", although the server was still processing the upload"
			}
			report(BlobMissing, "there is no such blob of %d bytes, and nothing in uploads/%s", b.want, detail)
		case b.size != b.want:
			report(BlobSize, "the blob has %d bytes, metadata says %d", b.size, b.want)
		}
	}
	s.orphans(orphans)
	return s.checksums(ctx)
}

func unixTime(ns int64) *time.Time {
	t := time.Unix(0, ns).UTC()
	return &t
}

// orphans reports blobs that nothing refers to. If metadata is lost, they are told along with it: they
// are its content.
func (s *spaceCheck) orphans(list []int32) {
	if len(list) > 0 && len(list) <= len(s.lost) {
		f := &s.res.findings[s.lost[0]]
		var names []string
		for _, k := range list {
			b := s.t.blobs.at(k)
			names = append(names, fmt.Sprintf("%s (%d bytes)", s.t.ids.text(b.id), b.size))
		}
		f.Detail += "; nothing refers to blob " + strings.Join(names, ", ") + " any more, which may be its content"
		return
	}
	for _, k := range list {
		b := s.t.blobs.at(k)
		f := s.add(BlobOrphaned, -1, "nothing refers to it")
		f.Blob, f.Bytes = s.t.ids.text(b.id), b.size
		if b.mtime != 0 {
			f.Time = unixTime(b.mtime)
			f.Detail += "; written " + age(s.c.o.Now.Sub(*f.Time)) + " ago"
		}
		f.same = "orphan" // its age moves on
		f.Path = s.blobPath(f.Blob)
	}
}

func age(d time.Duration) string {
	switch {
	case d < 0:
		return "in the future, not"
	case d < time.Minute:
		return "less than a minute"
	case d < 2*time.Hour:
		return fmt.Sprintf("%d minutes", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d hours", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

func (s *spaceCheck) blobPath(id string) string { return s.sp.Root + "/blobs/" + ocis.NodePath(id) }

// checksums reads blobs and compares their checksums: all, or a sample.
func (s *spaceCheck) checksums(ctx context.Context) error {
	every := uint64(1)
	if n := uint64(s.t.blobs.n); !s.c.o.ReadData && n > 20 {
		every = min(n/20, 50)
	}
	wanted := func(b *blob) bool {
		if b.node < 0 || !b.has || b.size < 0 || b.size != b.want || b.sizes {
			return false
		}
		if b.odd && s.c.oddMD5s < maxOdd {
			return true
		}
		return s.c.o.ReadData || b.size <= maxSample && (hash64(b.id)^s.c.o.Seed)%every == 0
	}
	if s.st.Remote {
		if s.st.Blobs == nil {
			return nil
		}
		for k := range s.t.blobs.n {
			if b := s.t.blobs.at(k); wanted(b) {
				id := s.t.ids.text(b.id)
				if err := s.checksum(ctx, b, func() (io.ReadCloser, error) { return s.st.Blobs.Open(ctx, s.sp.ID, id) }); err != nil {
					return err
				}
			}
		}
		return nil
	}
	// Archives are read from front to back.
	return s.eachBlob(ctx, func(b *blob, e *Entry) error {
		if !wanted(b) {
			return nil
		}
		return s.checksum(ctx, b, e.open)
	})
}

// eachBlob calls fn for each blob in blobs/ that the table knows.
func (s *spaceCheck) eachBlob(ctx context.Context, fn func(b *blob, e *Entry) error) error {
	return s.st.Place.Walk(ctx, s.sp, "blobs", func(e *Entry) error {
		id := strings.ReplaceAll(strings.TrimPrefix(e.Path, s.sp.Root+"/blobs/"), "/", "")
		if e.Type != 'f' || s.blobPath(id) != e.Path {
			return nil
		}
		k, _ := keyOf(id)
		if i := s.t.byBlb.find(k, s.t.blobKey); i >= 0 {
			return fn(s.t.blobs.at(i), e)
		}
		return nil
	}, func(string, error) {}) // told by the first walk
}

// checksum reads one blob. Its error ends the check.
func (s *spaceCheck) checksum(ctx context.Context, b *blob, open func() (io.ReadCloser, error)) error {
	sum, n, err := s.sha1(ctx, open)
	s.res.readBytes += n
	report := func(class Class, format string, args ...any) {
		f := s.add(class, b.node, format, args...)
		f.Blob, f.Bytes = s.t.ids.text(b.id), b.want
		if b.mtime != 0 {
			f.Time = unixTime(b.mtime)
		}
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, errNoContent):
	case errors.As(err, new(*objectGone)):
		report(BlobMissing, "the snapshot names an object of %d bytes, which is not in the bucket any more", b.want)
	case errors.Is(err, fs.ErrNotExist):
		report(BlobMissing, "the blob of %d bytes vanished while it was looked at", b.want)
	case err != nil:
		report(Unreadable, "the blob cannot be read: %v", err)
	case sum != b.sha1:
		report(BlobChecksum, "the SHA-1 of the blob is %x, metadata says %x", sum, b.sha1)
		s.res.checksums++
	default:
		s.res.checksums++
		if b.odd {
			s.c.oddMD5s++
		}
	}
	return nil
}

// maxOdd is how many blobs must be right though the bucket has another MD5 of them until that is not asked any
// more: then it encrypts contents with keys of its own.
const maxOdd = 3

func hash64(k key) uint64 {
	h := fnv.New64a()
	_, _ = h.Write(k[:])
	return h.Sum64()
}

// sha1 reads what open opens to its end.
func (s *spaceCheck) sha1(ctx context.Context, open func() (io.ReadCloser, error)) (sum [20]byte, n int64, err error) {
	r, err := open()
	if err != nil {
		return sum, 0, err
	}
	defer r.Close()
	h := sha1.New() //nolint:gosec // see above
	buf := make([]byte, 256<<10)
	for {
		if ctx.Err() != nil {
			return sum, n, context.Cause(ctx)
		}
		k, err := r.Read(buf)
		h.Write(buf[:k])
		n += int64(k)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return sum, n, err
		}
	}
	h.Sum(sum[:0])
	return sum, n, nil
}

// sortedKeys are the keys of m in order, so that two looks give the same report.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
