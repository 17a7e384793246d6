// Package ocis holds the nouns of an instance of Infinite Scale or OpenCloud, and reads the formats
// in which it keeps them: ids and their paths, message pack metadata, attributes. It imports
// nothing of ours. Facts: "decomposedfs on disk" of the product reference.
package ocis

// Product tells the two members of the family apart.
type Product string

// The products.
const (
	OCIS      Product = "ocis"
	OpenCloud Product = "opencloud"
)

// Layout is how a storage root is laid out on disk.
type Layout string

// The layouts.
const (
	Decomposed Layout = "decomposed" // spaces/, nodes/, blobs/ and .mpk files
	Posix      Layout = "posix"      // user-visible files with xattrs
)

// Kind is one of the vendor's four kinds of data that must be saved together.
type Kind string

// The kinds of data.
const (
	Config   Kind = "config"
	System   Kind = "system"
	Metadata Kind = "metadata"
	Blobs    Kind = "blobs"
)

// Class says how much a data set matters, in the vendor's words.
type Class string

// The classes.
const (
	Required    Class = "required"
	Recommended Class = "recommended"
	Optional    Class = "optional"
)

// Instance is one server installation: what discover found. All paths are absolute paths on this
// host, after --map; ServerPath fields hold the path as the server sees it.
type Instance struct {
	Product  Product `json:"product"`
	Version  string  `json:"product_version,omitempty"` // "" if it could not be told
	Setup    string  `json:"setup"`                     // "posix" or "s3"
	BasePath string  `json:"base_data_path"`
	// ConfigDir may lie inside BasePath.
	ConfigDir string `json:"config_dir"`
	// ServerBasePath and ServerConfigDir are set only where they differ.
	ServerBasePath  string    `json:"server_base_data_path,omitempty"`
	ServerConfigDir string    `json:"server_config_dir,omitempty"`
	DataSets        []DataSet `json:"data_sets"`
	Stores          []Store   `json:"stores"`
	// Environment is what configures the instance from outside its config directory.
	Environment []EnvironmentFile `json:"environment,omitempty"`
	Software    Software          `json:"software"`
	// URL is where clients reach the instance (OCIS_URL, OC_URL).
	URL      string   `json:"url,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

// DataSet is one place of data. Kinds config and system are captured as plain files; metadata and
// blobs belong to the Store of the same Store name.
type DataSet struct {
	// Name is unique: config, idm, idp, nats, proxy, search, thumbnails, web, ocm, ..., base (all
	// that lies below the base data path and in no other data set), storage-users,
	// storage-users-blobs, storage-system, storage-system-blobs.
	Name string `json:"name"`
	Kind Kind   `json:"kind"`
	// Path is a directory or a single file.
	Path       string `json:"path"`
	ServerPath string `json:"server_path,omitempty"` // only where it differs from Path
	Store      string `json:"store,omitempty"`
	Class      Class  `json:"class"`
	Found      bool   `json:"found"`
	Filesystem string `json:"filesystem,omitempty"` // btrfs, ext4, ...
	Mount      string `json:"mount,omitempty"`
	Entries    int64  `json:"entries"`
	Bytes      int64  `json:"bytes"`
	// Setting names the variable or the file and key that put it there; "" is the default.
	Setting string `json:"setting,omitempty"`
	// IfMissing says in a sentence what happens when it is left out.
	IfMissing string `json:"if_left_out,omitempty"`
}

// Store is one storage root of decomposedfs or the posix driver.
type Store struct {
	// Name is the folder below /storage in the snapshot: users, system, users-vault, ...
	Name   string `json:"name"`
	Root   string `json:"root"`
	Driver string `json:"driver"` // as configured: ocis, decomposed, posix, s3ng, ...
	Layout Layout `json:"layout"`
	// Prefix of attribute names as found on disk, with the final dot: "user.ocis." or "user.oc.".
	Prefix string `json:"attribute_prefix"`
	S3     *S3    `json:"s3,omitempty"`
}

// S3 holds the bucket settings of a store whose blobs lie there. Secrets are never marshalled.
type S3 struct {
	Endpoint  string `json:"endpoint"`
	Region    string `json:"region"`
	Bucket    string `json:"bucket"`
	AccessKey string `json:"-"`
	SecretKey string `json:"-"`
	PartSize  int64  `json:"part_size,omitempty"`
	PathStyle bool   `json:"path_style,omitempty"`
	// How the server uploads: threads per object, and switches of its client.
	Threads              int64 `json:"threads,omitempty"`
	DisableMultipart     bool  `json:"disable_multipart,omitempty"`
	DisableContentSHA256 bool  `json:"disable_content_sha256,omitempty"`
	SendContentMD5       bool  `json:"send_content_md5,omitempty"`
	ConcurrentParts      bool  `json:"concurrent_parts,omitempty"`
}

// EnvironmentFile is configuration from outside: a real file, or text made by inspection.
type EnvironmentFile struct {
	// Name is its path below /config/environment in the snapshot, e.g. "ocis.env",
	// "compose/docker-compose.yml", "systemd/ocis.service.d/override.conf", "container.json".
	Name string `json:"name"`
	// Path is the file on this host; "" if Content was made by inspection.
	Path    string `json:"path,omitempty"`
	Content []byte `json:"-"`
}

// Software is what runs the instance.
type Software struct {
	Binary      string `json:"binary,omitempty"` // path of the server binary on this host
	Container   string `json:"container,omitempty"`
	Image       string `json:"image,omitempty"`        // name:tag
	ImageDigest string `json:"image_digest,omitempty"` // sha256:...
}

// Store returns the store called name, or nil.
func (i *Instance) Store(name string) *Store {
	for k := range i.Stores {
		if i.Stores[k].Name == name {
			return &i.Stores[k]
		}
	}
	return nil
}
