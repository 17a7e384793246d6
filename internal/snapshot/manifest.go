package snapshot

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// ManifestPath is where the manifest lies in a snapshot.
const ManifestPath = "/manifest.json"

// manifestLimit bounds what is read as a manifest, in bytes: a list of a million missing blobs fits.
const manifestLimit = 512 << 20

// Manifest tells what a snapshot holds and how it was made. Field names are fixed by docs/FORMAT.md.
type Manifest struct {
	Holdfast       string `json:"holdfast"`
	Product        string `json:"product"`
	ProductVersion string `json:"product_version"`
	Setup          string `json:"setup"`
	BasePath       string `json:"base_data_path"`
	ConfigDir      string `json:"config_dir"`
	URL            string `json:"url,omitempty"`
	// DataSets lists all that belong to the instance, captured or not.
	DataSets []DataSet `json:"data_sets"`
	Stores   []Store   `json:"stores"`
	Software *Software `json:"software,omitempty"`
	Freeze   Freeze    `json:"freeze"`
	Views    []View    `json:"views"`
	Proof    Proof     `json:"proof"`
}

// DataSet is one place of data as it was at the source.
type DataSet struct {
	Name       string `json:"name"`
	Kind       string `json:"kind"`
	Path       string `json:"path"`
	ServerPath string `json:"server_path,omitempty"`
	Class      string `json:"class,omitempty"`
	Filesystem string `json:"filesystem,omitempty"`
	Entries    int64  `json:"entries"`
	Bytes      int64  `json:"bytes"`
	Captured   bool   `json:"captured"`
	// Excluded is true for what was left out on request.
	Excluded bool `json:"excluded,omitempty"`
	// Tree is the place in the snapshot, e.g. /system/idm or /storage/users.
	Tree string `json:"tree,omitempty"`
	// Store names the store for the kinds metadata and blobs.
	Store string `json:"store,omitempty"`
}

// Store is one storage root.
type Store struct {
	Name   string  `json:"name"`
	Root   string  `json:"root"`
	Driver string  `json:"driver"`
	Layout string  `json:"layout"`
	Prefix string  `json:"attribute_prefix"`
	Spaces []Space `json:"spaces"`
	// Bucket is set if the blobs lay in one.
	Bucket *Bucket `json:"bucket,omitempty"`
}

// Ways to secure a bucket.
const (
	WayCopy     = "copy"     // contents are in the repository
	WayReplica  = "replica"  // contents are in a second bucket
	WayVersions = "versions" // contents are in the bucket itself, by their version ids
)

// Bucket tells where the blobs of a store lay, and where they are to be found now.
type Bucket struct {
	BucketPlace
	Way string `json:"way"`
	// Replica is the bucket that holds the contents for the way replica.
	Replica *BucketPlace `json:"replica,omitempty"`
	// LockedUntil is until when the versions are locked at least; nil: they are not.
	LockedUntil *time.Time `json:"locked_until,omitempty"`
	// Unreferenced counts what nothing refers to below the spaces' prefixes, as of when each of them was
	// listed last; nil: not all of them were.
	Unreferenced *Unreferenced `json:"unreferenced,omitempty"`
}

// BucketPlace names a bucket.
type BucketPlace struct {
	Endpoint  string `json:"endpoint"`
	Region    string `json:"region,omitempty"`
	Bucket    string `json:"bucket"`
	PathStyle bool   `json:"path_style,omitempty"`
}

// Unreferenced counts objects that nothing refers to. Captured are those that the snapshot holds.
type Unreferenced struct {
	Objects  int64 `json:"objects"`
	Bytes    int64 `json:"bytes"`
	Captured int64 `json:"captured"`
}

// Space is one space of a store. Bytes count the current contents, without versions and trash.
type Space struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	Type  string `json:"type"`
	Alias string `json:"alias"`
	Owner string `json:"owner,omitempty"` // user id
	// Folder is the space's folder below spaces/, versions/, trash/ of its store.
	Folder   string `json:"folder"`
	Disabled string `json:"disabled,omitempty"` // time of disabling
	Files    int64  `json:"files"`
	Bytes    int64  `json:"bytes"`
}

// Software names what ran the instance.
type Software struct {
	Binary      string `json:"binary,omitempty"` // path in the snapshot
	BinaryPath  string `json:"binary_path,omitempty"`
	Image       string `json:"image,omitempty"`
	ImageDigest string `json:"image_digest,omitempty"`
	ImageFile   string `json:"image_file,omitempty"` // path in the snapshot
}

// Freeze tells how the instance was held still. Times are left out where nothing was stopped.
type Freeze struct {
	Method    string     `json:"method"`
	StoppedAt *time.Time `json:"stopped_at,omitempty"`
	StartedAt *time.Time `json:"started_at,omitempty"`
	ReadyAt   *time.Time `json:"ready_at,omitempty"`
	// SecondsStopped count from StoppingAt to ReadyAt, or to StartedAt if it did not get ready.
	SecondsStopped float64    `json:"seconds_stopped"`
	StoppingAt     *time.Time `json:"stopping_at,omitempty"` // when it was told to stop
	// The parts of SecondsStopped: to the proof that nothing runs, to the beginning of the start, and to
	// its end.
	SecondsStopping float64 `json:"seconds_stopping"`
	SecondsHeld     float64 `json:"seconds_held"`
	SecondsStarting float64 `json:"seconds_starting"`
	// CrashConsistent tells that nothing was stopped although the instance may have been running, and
	// Warning what that means, for people.
	CrashConsistent bool   `json:"crash_consistent,omitempty"`
	Warning         string `json:"warning,omitempty"`
}

// CrashWarning is Freeze.Warning where CrashConsistent is true.
const CrashWarning = "the instance was not stopped: what it had not written yet is missing, as after a power cut; " +
	"the vendor does not support backups of a running instance"

// View tells which still picture was read.
type View struct {
	Kind   string     `json:"kind"`
	Source string     `json:"source"`
	MadeAt *time.Time `json:"made_at,omitempty"`
}

// Proof is the result of comparing metadata and blobs.
type Proof struct {
	Complete   bool  `json:"complete"`
	Nodes      int64 `json:"nodes"`       // files and folders, trashed ones as well
	Revisions  int64 `json:"revisions"`   // old versions
	TrashItems int64 `json:"trash_items"` // items in the trash bins
	Blobs      int64 `json:"blobs"`       // distinct blobs that metadata refers to
	Bytes      int64 `json:"bytes"`       // their size
	// Verified counts the blobs whose bytes matched the checksum that the server recorded.
	Verified int64 `json:"verified"`
	// InFlight counts uploads that the server had not finished: their bytes are in uploads/.
	InFlight int64 `json:"in_flight"`
	// Missing lists blobs that metadata refers to and that are not there or not what they should be.
	Missing []Missing `json:"missing"`
	// Unreadable lists what could not be read at the source.
	Unreadable []Unreadable `json:"unreadable,omitempty"`
	// NotCaptured names required data sets that are not in the snapshot.
	NotCaptured []string `json:"not_captured,omitempty"`
}

// Missing is one blob that is not there, or damaged.
type Missing struct {
	Space  string `json:"space"`
	Path   string `json:"path"`
	BlobID string `json:"blob_id"`
	// Problem is "missing", "size" or "checksum".
	Problem string `json:"problem"`
	Detail  string `json:"detail,omitempty"`
}

// Unreadable is one place that could not be read.
type Unreadable struct {
	Path  string `json:"path"`
	Error string `json:"error"`
}

// LoadManifest reads the manifest of a snapshot.
//
// Errors: ErrNoSuchPath for a snapshot of another program.
func LoadManifest(ctx context.Context, l BlobLoader, root id.ID) (*Manifest, error) {
	n, err := Lookup(ctx, l, root, ManifestPath)
	if err != nil {
		return nil, err
	}
	p, err := LoadContent(repo.Near(ctx), l, n, manifestLimit)
	if err != nil {
		return nil, err
	}
	m := new(Manifest)
	if err := json.Unmarshal(p, m); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return m, nil
}

// safeLength leaves room for an ending: file systems take names of 255 bytes.
const safeLength = 240

// SafeName makes any string the name of one file: what would mean something else is escaped, and
// different strings stay different. A name that is too long ends in a hash.
func SafeName(s string) string {
	switch s {
	case "":
		return "%00"
	case ".", "..":
		return strings.ReplaceAll(s, ".", "%2E")
	}
	if strings.ContainsAny(s, "/\x00%") {
		s = strings.NewReplacer("%", "%25", "/", "%2F", "\x00", "%00").Replace(s)
	}
	if len(s) > safeLength {
		sum := id.Hash([]byte(s))
		s = s[:safeLength-20] + "%" + sum.String()[:19]
	}
	return s
}
