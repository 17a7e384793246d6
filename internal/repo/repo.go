// Package repo is the repository engine: it stores blobs in packs, finds them by the index, and
// keeps keys, locks and small files, all in restic's repository format (version 2; version 1 is
// read and, without compression, written).
//
// Start at [Open] or [Init], then [Repository.LoadIndex]. A backup takes a [Repository.Lock],
// loads the index, writes through a [Writer], flushes it, and saves its snapshot last. Readers
// list snapshots before they load the index.
package repo

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/repo/crypto"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/index"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
)

// ID names blobs (SHA-256 of the content) and files (SHA-256 of the stored bytes).
type ID = id.ID

// BlobType tells data from trees.
type BlobType = pack.BlobType

// The two types of blob.
const (
	DataBlob = pack.DataBlob
	TreeBlob = pack.TreeBlob
)

var (
	// ErrNoRepository is returned by Open when there is no config at the place.
	ErrNoRepository = errors.New("no repository")
	// ErrWrongPassword is returned by Open when the password fits none of the keys.
	ErrWrongPassword = errors.New("wrong password")
	// ErrExists is returned by Init when there is a repository already, or what is left of one.
	ErrExists = errors.New("a repository exists already")
)

// Options of Open. The zero value works.
type Options struct {
	// Compression of new blobs; version 1 repositories never have any.
	Compression Compression
	// PackSize is the size in bytes at which packs are closed. Zero: 16 MiB, as restic. It is brought
	// into the range of 1 MiB to 1 GiB.
	PackSize int64
	// PackBuffers is how many packs of a Writer are filled, hashed or under way at a time, at least 2; zero: 6.
	// With 6 and more a full pack waits for the next, because two take less time to hash together.
	PackBuffers int
	// Readers is how many pieces of files are read at once, each of up to 4 MiB or one blob, with the blob that becomes
	// of it. Zero: one for each processor, 4 to 16.
	Readers int
	// IndexMemory is how many bytes of the index stay in memory, 48 for each blob; the rest is in a file without a name in
	// TempDir, which is mapped. Zero: all of it.
	IndexMemory int64
	// TempDir is for that file; "": the system's directory for temporary files.
	TempDir string
	// KeyHint is the name of the key file to try first, or its beginning.
	KeyHint string
}

// KDF holds scrypt parameters. The zero value stands for N=32768, r=8, p=2.
type KDF = crypto.KDF

// InitOptions of Init. The zero value works.
type InitOptions struct {
	Options
	// Version of the repository format, 1 or 2. Zero: 2. Version 1 is for tests.
	Version uint
	// KDF of the first key, and of keys added through the same Repository. Tests make it cheap.
	KDF KDF
	// Polynomial decides where files are cut; of another repository, so that what both store is cut alike, and a copy
	// from one to the other finds it there. Empty: a new one.
	Polynomial string
}

const (
	defaultPackSize = 16 << 20
	minPackSize     = 1 << 20
	maxPackSize     = 1 << 30
)

// Repository is an open repository. Its methods are safe for concurrent use.
type Repository struct {
	be    backend.Backend
	opts  Options
	conf  config
	key   *crypto.Key // master key
	keyID ID          // the key file that gave it
	kdf   KDF
	clock clock

	compressors compressors

	mu  sync.RWMutex
	idx *index.Index // guarded by mu

	pending      []pendingPack // guarded by mu: see saveIndex
	pendingBlobs int           // guarded by mu
	indexDoubt   bool          // guarded by mu: storing an index file failed, and it may be there or come yet
	indexSem     chan struct{} // held while index files are written

	exclusive atomic.Pointer[Lock] // ours, while it is held
	held      atomic.Pointer[Lock] // the latest of ours of either kind, while it is held

	earlyMu sync.Mutex
	early   []ID // guarded by earlyMu: index files that were loaded before the lock was settled

	// When to write an index file in the middle of a backup.
	indexBlobs int
	indexAge   time.Duration
	// How long removing our own lock may take when the work's context is done.
	unlockTime time.Duration
}

// clock is the time, which tests replace.
type clock struct {
	now   func() time.Time
	sleep func(ctx context.Context, d time.Duration) error
}

func realSleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// config is the JSON of the config file.
type config struct {
	Version    uint   `json:"version"`
	ID         string `json:"id"`
	Polynomial string `json:"chunker_polynomial"`
}

func newRepository(be backend.Backend, o Options) *Repository {
	if o.PackSize == 0 {
		o.PackSize = defaultPackSize
	}
	o.PackSize = min(max(o.PackSize, minPackSize), maxPackSize)
	if o.PackBuffers == 0 {
		o.PackBuffers = defaultPackBuffers
	}
	o.PackBuffers = max(o.PackBuffers, 2) // both types of blob may have a pack open
	if o.Readers <= 0 {
		// Enough to hide the latency of a server, few enough that what they hold in memory stays small.
		o.Readers = min(max(cpus.Count(), 4), 16)
	}
	return &Repository{
		be: be, opts: o, kdf: crypto.DefaultKDF, idx: index.New(index.Options{}),
		clock:      clock{time.Now, realSleep},
		indexSem:   make(chan struct{}, 1),
		indexBlobs: 50_000, indexAge: 10 * time.Minute, unlockTime: time.Minute,
	}
}

var configHandle = backend.Handle{Type: backend.ConfigFile}

// Init makes a new repository at be and opens it. It refuses a place that holds a config or keys.
// Errors: ErrExists.
func Init(ctx context.Context, be backend.Backend, password string, o InitOptions) (*Repository, error) {
	if o.Version == 0 {
		o.Version = 2
	}
	if o.Version > 2 {
		return nil, fmt.Errorf("repository version %d is unknown; choose 1 or 2", o.Version)
	}
	if password == "" {
		return nil, errors.New("an empty password protects nothing; choose another one")
	}
	if o.Polynomial != "" {
		if p, err := strconv.ParseUint(o.Polynomial, 16, 64); err != nil || !irreducible(p) {
			return nil, fmt.Errorf("%q is no chunker polynomial", o.Polynomial)
		}
	}
	r := newRepository(be, o.Options)
	if o.KDF != (KDF{}) {
		r.kdf = o.KDF
	}
	if _, err := be.Stat(ctx, configHandle); err == nil {
		return nil, fmt.Errorf("%w at %s", ErrExists, be.Location())
	} else if !errors.Is(err, backend.ErrNotExist) {
		return nil, fmt.Errorf("look for a repository at %s: %w", be.Location(), err)
	}
	// Keys without a config: the config was lost, and a new one would make the packs unreadable.
	err := be.List(ctx, backend.KeyFile, func(fi backend.FileInfo) error {
		return fmt.Errorf("%w at %s: it has the key %s but no config; restore the config, or choose an empty place",
			ErrExists, be.Location(), fi.Name[:8])
	})
	if err != nil {
		return nil, err
	}
	if err := be.Create(ctx); err != nil {
		return nil, fmt.Errorf("create a repository at %s: %w", be.Location(), err)
	}
	var raw [32]byte
	rand.Read(raw[:])
	r.conf = config{Version: o.Version, ID: hex.EncodeToString(raw[:]), Polynomial: o.Polynomial}
	if o.Polynomial == "" {
		r.conf.Polynomial = fmt.Sprintf("%x", newPolynomial())
	}
	r.key = crypto.NewKey()
	if r.keyID, err = r.AddKey(ctx, password); err != nil {
		return nil, err
	}
	text, err := json.Marshal(r.conf)
	if err != nil {
		return nil, err
	}
	if err := be.Save(ctx, configHandle, r.key.Seal(nil, text)); err != nil {
		if errors.Is(err, backend.ErrExist) {
			err = fmt.Errorf("%w: another program made one at the same time: %w", ErrExists, err)
		}
		return nil, fmt.Errorf("create a repository at %s: %w", be.Location(), err)
	}
	return r, nil
}

// Open opens the repository at be.
// Errors: ErrNoRepository, ErrWrongPassword.
func Open(ctx context.Context, be backend.Backend, password string, o Options) (*Repository, error) {
	r := newRepository(be, o)
	sealed, err := r.readFile(ctx, configHandle)
	if errors.Is(err, backend.ErrNotExist) {
		return nil, fmt.Errorf("%w at %s: it has no config file", ErrNoRepository, be.Location())
	}
	if err != nil {
		return nil, fmt.Errorf("open the repository at %s: %w", be.Location(), err)
	}
	if r.key, r.keyID, err = r.searchKey(ctx, password); err != nil {
		return nil, fmt.Errorf("open the repository at %s: %w", be.Location(), err)
	}
	text, err := r.key.Open(append([]byte(nil), sealed...))
	if err != nil {
		// The config has no name to compare it with, so a bad read shows only here. Once more.
		if sealed, err = r.readFile(ctx, configHandle); err == nil {
			text, err = r.key.Open(sealed)
		}
	}
	if err == nil {
		err = json.Unmarshal(text, &r.conf)
	}
	if err != nil {
		return nil, fmt.Errorf("open the repository at %s: the password fits, but the config file is damaged: %w", be.Location(), err)
	}
	if r.conf.Version != 1 && r.conf.Version != 2 {
		return nil, fmt.Errorf("the repository at %s has version %d; this program knows versions 1 and 2", be.Location(), r.conf.Version)
	}
	return r, nil
}

// ID returns the repository's own ID, 64 hexadecimal digits.
func (r *Repository) ID() string { return r.conf.ID }

// Location names where the repository is, for people; of a local one it is the directory.
func (r *Repository) Location() string { return r.be.Location() }

// Version returns the version of the format: 1 or 2.
func (r *Repository) Version() uint { return r.conf.Version }

// Backend returns where the repository lies.
func (r *Repository) Backend() backend.Backend { return r.be }

// ChunkerSeed returns the secret that decides where files are cut. It depends on nothing but the
// config's chunker_polynomial, so repositories made to share that one cut alike.
func (r *Repository) ChunkerSeed() [32]byte {
	var p uint64
	// An unreadable polynomial counts as zero: cutting then holds no secret, but works.
	fmt.Sscanf(r.conf.Polynomial, "%x", &p)
	return sha256.Sum256(binary.BigEndian.AppendUint64([]byte("holdfast chunker seed 1\x00"), p))
}

// Polynomial returns the config's chunker_polynomial, hexadecimal.
func (r *Repository) Polynomial() string { return r.conf.Polynomial }

// newPolynomial returns a random irreducible polynomial of degree 53 over GF(2), bit i being the
// coefficient of x^i. Stock restic needs it to cut files.
func newPolynomial() uint64 {
	for {
		var b [8]byte
		rand.Read(b[:])
		if p := binary.LittleEndian.Uint64(b[:])&(1<<53-1) | 1<<53 | 1; irreducible(p) {
			return p
		}
	}
}

// irreducible tests a polynomial of degree 53. As 53 is prime, Rabin's test is short: f is irreducible
// if x^(2^53) = x mod f and f has no root in GF(2).
func irreducible(f uint64) bool {
	const degree = 53
	if f>>degree != 1 {
		return false
	}
	ones := 0
	for b := f; b != 0; b &= b - 1 {
		ones++
	}
	if f&1 == 0 || ones%2 == 0 { // f(0) = 0 or f(1) = 0
		return false
	}
	x := uint64(2)
	for range degree {
		x = mulMod(x, x, f, degree)
	}
	return x == 2
}

// mulMod returns a*b mod f over GF(2), for a and b of lower degree than f.
func mulMod(a, b, f uint64, degree uint) uint64 {
	var p uint64
	for ; b != 0; b >>= 1 {
		if b&1 != 0 {
			p ^= a
		}
		if a <<= 1; a>>degree&1 != 0 {
			a ^= f
		}
	}
	return p
}
