// Package consistency checks whether what a store holds agrees with itself: nodes and their metadata,
// links and trash, blobs with their sizes and checksums, sizes of folders, indexes, shares, uploads in
// flight. It reads a directory (a live instance, or a view of one) or a snapshot through the same code,
// changes nothing, and tells damage from what a server leaves behind in its ordinary work.
//
// Start with Run. The facts that the checks follow are in the product reference: "decomposedfs on disk",
// "posix driver", "System storage" and "backup consistency".
package consistency

import (
	"context"
	"io"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Class says what is wrong.
type Class string

// The classes. The remark says what a finding of the class is: damage, or a note.
const (
	Unreadable        Class = "unreadable"          // damage: could not be read
	SpaceRootMissing  Class = "space-root-missing"  // damage: the folder of a space has no root node
	MetadataMissing   Class = "metadata-missing"    // damage: a node, revision or file without metadata
	MetadataMalformed Class = "metadata-malformed"  // damage: metadata that cannot be read
	LinkMissing       Class = "link-missing"        // damage: no folder and no trash entry leads to a node
	LinkDuplicate     Class = "link-duplicate"      // damage: two links lead to one node
	NodeMissing       Class = "node-missing"        // damage: a link leads to a node that is not there
	TypeMismatch      Class = "type-mismatch"       // damage: metadata says file, and a folder is there, or the reverse
	ParentMismatch    Class = "parent-mismatch"     // damage: metadata names another parent than the folder with the link
	NameMismatch      Class = "name-mismatch"       // damage; a note in the posix layout, where the file's name counts
	OriginMissing     Class = "origin-missing"      // damage: a trashed item that does not tell where it was
	IDDuplicate       Class = "id-duplicate"        // damage: two files bear one id (posix layout)
	Cycle             Class = "cycle"               // damage: folders that lie in each other in a circle
	BlobMissing       Class = "blob-missing"        // damage: metadata names a blob that is not there
	BlobSize          Class = "blob-size"           // damage: a blob of another size than metadata says
	BlobChecksum      Class = "blob-checksum"       // damage: a blob with other bytes than the server received
	TreeSize          Class = "tree-size"           // damage: the size of a folder is not the sum of what is in it; a note in the posix layout
	IndexMissing      Class = "index-missing"       // damage: a space that an index should list and does not
	IndexWrong        Class = "index-wrong"         // damage: an index entry that leads to another place than the space
	IndexMalformed    Class = "index-malformed"     // damage: an index file that cannot be read
	ShareMalformed    Class = "share-malformed"     // damage: a list of shares that cannot be read
	ShareWithoutGrant Class = "share-without-grant" // damage: a share that gives no access, since its item has no such grant

	BlobOrphaned      Class = "blob-orphaned"      // note: a blob that nothing refers to
	BlobShared        Class = "blob-shared"        // note: two nodes refer to one blob
	UploadInFlight    Class = "upload-in-flight"   // note: content that is in uploads/ still
	UploadUnfinished  Class = "upload-unfinished"  // note: an upload that the client did not complete
	UploadLeftover    Class = "upload-leftover"    // note: a part of an upload without the other
	MetadataLeftover  Class = "metadata-leftover"  // note: metadata whose node is gone, as a purge leaves it
	TrashLeftover     Class = "trash-leftover"     // note: a record of the trash without the item (posix layout)
	RevisionLeftover  Class = "revision-leftover"  // note: a version of a file that is gone
	IndexStale        Class = "index-stale"        // note: an index entry that is not needed any more
	ShareStale        Class = "share-stale"        // note: a share record whose item is gone or in the trash
	ChangedOutside    Class = "changed-outside"    // note: a file that was changed behind the server's back (posix layout)
	RestoreUnfinished Class = "restore-unfinished" // note: a restore in place was interrupted; run again, it finishes
	TemporaryFile     Class = "temporary-file"     // note: left by a crash in the middle of writing
	UnknownEntry      Class = "unknown-entry"      // note: what no rule explains
)

// Severity tells damage from notes.
type Severity string

// The severities. Damage is what users or the server will notice, or what is lost; a note is a leftover
// or something in progress.
const (
	Damage Severity = "damage"
	Note   Severity = "note"
)

// Finding is one thing that was found. Paths and names are raw bytes from the store.
type Finding struct {
	Class    Class    `json:"class"`
	Severity Severity `json:"severity"`
	Store    string   `json:"store"`
	Space    string   `json:"space,omitempty"`      // id
	Name     string   `json:"space_name,omitempty"` // alias, where it is known
	// Node is the id of the node, with .REV.<time> or .T.<time> as on disk.
	Node string `json:"node,omitempty"`
	// Path is where users see it; for what they do not see, the path below the store's root.
	Path string `json:"path,omitempty"`
	Blob string `json:"blob,omitempty"`
	// Bytes and Time are those of the blob or file at hand.
	Bytes  int64      `json:"bytes,omitempty"`
	Time   *time.Time `json:"time,omitempty"`
	Detail string     `json:"detail"`
	// count is how many blobs it speaks of; 0 is one.
	count int64
	// same is what must not differ between two looks at a running instance; "" is Detail.
	same string
}

// Blobs reads the blobs of a store that has none itself, because they lie in a bucket.
type Blobs interface {
	// List calls fn for each blob of the space, one after the other in any order.
	List(ctx context.Context, space string, fn func(BlobInfo) error) error
	// Others calls fn for each folder of the bucket that is none of a known space, one after the other.
	Others(ctx context.Context, known func(space string) bool, fn func(OtherObjects) error) error
	// Open returns the content of a blob, or an error that is fs.ErrNotExist.
	Open(ctx context.Context, space, blob string) (io.ReadCloser, error)
}

// OtherObjects are objects that belong to no space: what a purge left, of another instance that shares the
// bucket, or what a restore put aside.
type OtherObjects struct {
	Folder  string // "" are objects in none
	Objects int64
	Bytes   int64
	Newest  time.Time
}

// BlobInfo is what a bucket says of one blob.
type BlobInfo struct {
	ID       string
	Size     int64
	Modified time.Time // zero if it is not known
	// MD5 is what the bucket takes for the checksum of the content, hexadecimal, or "". It is another one where
	// contents are encrypted, so that a difference makes the check read the blob, and is no finding itself.
	MD5 string
}

// Store is one store to check.
type Store struct {
	Name   string
	Place  Place
	Layout string // ocis.Decomposed or ocis.Posix
	Prefix string // of the attributes, with its dot
	// Remote tells that blobs lie in a bucket; without Blobs they are not looked at then.
	Remote bool
	Blobs  Blobs
}

// Options say how to check. The zero value is a check of something that does not change, with a sample
// of checksums.
type Options struct {
	// ReadData compares the checksum of every blob. Without it a sample of about 2 in 100 blobs of at
	// most 64 MiB is read, and at least 20 of each space.
	ReadData bool
	// Seed chooses the sample; another day should have another one.
	Seed uint64
	// Live: the instance may be running. What is found is looked for a second time after Settle, and
	// only what is found twice counts.
	Live   bool
	Settle time.Duration // 0 is 3 s: longer than the server takes to finish one change
	// Now is the time that ages are counted to; zero is the clock.
	Now      time.Time
	Progress progress.Sink
	// Found gets each finding. An error ends the check.
	Found func(Finding) error
}

// Summary counts what was looked at and found.
type Summary struct {
	Spaces      int64 `json:"spaces"`
	Nodes       int64 `json:"nodes"` // files and folders, trashed ones as well
	Revisions   int64 `json:"revisions"`
	TrashItems  int64 `json:"trash_items"`
	Blobs       int64 `json:"blobs"` // distinct ones that metadata refers to
	Bytes       int64 `json:"bytes"` // their size
	Checksums   int64 `json:"checksums_read"`
	ReadBytes   int64 `json:"bytes_read"`
	Shares      int64 `json:"shares"`
	InFlight    int64 `json:"in_flight"`
	Orphans     int64 `json:"orphaned_blobs"`
	OrphanBytes int64 `json:"orphaned_bytes"`
	Damage      int64 `json:"damage"`
	Notes       int64 `json:"notes"`
	// Classes counts the findings of each class.
	Classes map[Class]int64 `json:"classes"`
	// Limits says what was not looked at, in sentences.
	Limits []string `json:"limits"`
}

// maxSample bounds the blobs that a sample reads, in bytes: the sample is meant to take seconds.
const maxSample = 64 << 20

// Run checks stores together: shares of one are compared with the spaces of another. It takes about 150
// bytes and the name of each node of the largest space, and about 110 for each blob of it.
//
// Errors: those of Found; a store that cannot be opened; the cause of ctx.
func Run(ctx context.Context, stores []Store, o Options) (*Summary, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	if o.Settle == 0 {
		o.Settle = 3 * time.Second
	}
	c := &checker{o: o, sum: &Summary{Classes: map[Class]int64{}, Limits: []string{}}, spaces: map[string]*spaceInfo{}}
	// The system store first: its shares are compared with the spaces of the others.
	stores = slices.Clone(stores)
	slices.SortStableFunc(stores, func(a, b Store) int {
		switch {
		case a.Name == b.Name:
			return 0
		case a.Name == systemStore:
			return -1
		case b.Name == systemStore:
			return 1
		}
		return 0
	})
	if err := c.run(ctx, stores); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, err
	}
	return c.sum, nil
}

const systemStore = "system"
