// Package replica looks after second buckets: those into which `backup --blobs replica` copies objects. It
// knows who uses one (join.go), which objects snapshots need (needed.go), and removes the others
// (remove.go). How objects get there is the business of package capture.
//
// What any repository needs must stay, and only that repository can tell what it needs. So each one that uses
// a bucket leaves a marker in it, and objects are removed only by the one whose marker is the only one.
package replica

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/bucket"
)

// Prefix is what the keys of markers begin with: Prefix + repository id. It is no key of the product.
const Prefix = "holdfast-replica/"

// removing is appended to the key of the marker of a repository that is about to remove objects.
const removing = ".removing"

// Marker says that a repository uses the bucket. Field names are fixed by docs/FORMAT.md.
type Marker struct {
	Repository string `json:"repository"` // id
	Hostname   string `json:"hostname"`   // of the machine that made the first backup
	// Empty is true if the bucket had no objects when the marker was made, so that what is in it came by Holdfast.
	Empty bool `json:"empty"`
}

// seen is a marker as a listing shows it.
type seen struct {
	repository string
	removing   bool
	written    time.Time // by the server's clock
}

func markers(ctx context.Context, b *bucket.Bucket) ([]seen, error) {
	var out []seen
	err := b.List(ctx, Prefix, func(o bucket.Object) error { // one page: fn is not called concurrently
		name, flag := strings.CutSuffix(o.Key[len(Prefix):], removing)
		out = append(out, seen{name, flag, o.Modified})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for the markers of repositories: %w", err)
	}
	return out, nil
}

// Users lists the ids of the repositories that use the bucket as a replica, sorted.
func Users(ctx context.Context, b *bucket.Bucket) ([]string, error) {
	list, err := markers(ctx, b)
	return others(list, ""), err
}

// others lists the repositories but own that have a marker, sorted.
func others(list []seen, own string) (out []string) {
	for _, s := range list {
		if !s.removing && s.repository != own {
			out = append(out, s.repository)
		}
	}
	slices.Sort(out)
	return out
}

func markerOf(list []seen, repository string) *seen {
	for i := range list {
		if !list[i].removing && list[i].repository == repository {
			return &list[i]
		}
	}
	return nil
}

// BusyError says that another repository is removing objects from the bucket.
type BusyError struct {
	Bucket, Repository string
	Since              time.Time
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("repository %s is removing objects from %s, since %s", e.Repository, e.Bucket, e.Since.Local().Format(time.DateTime))
}

// Hints says what to do next.
func (e *BusyError) Hints() []string {
	return []string{
		"Wait until `holdfast prune` of that repository has ended. If it was killed, run it again: it ends what it began.",
		"If that repository is no more, delete the object " + Prefix + e.Repository + removing + " and the one without the ending.",
	}
}

// Member is a repository's use of a bucket.
type Member struct {
	b *bucket.Bucket
	m Marker
}

// Join makes sure that the repository has a marker in the bucket, before anything in it is counted on.
//
// Errors: *BusyError.
func Join(ctx context.Context, b *bucket.Bucket, repository, hostname string) (*Member, error) {
	list, err := markers(ctx, b)
	if err != nil {
		return nil, err
	}
	m := &Member{b: b}
	if markerOf(list, repository) != nil {
		var bad *MarkerError
		if m.m, err = load(ctx, b, repository); errors.As(err, &bad) {
			m.m = Marker{Repository: repository, Hostname: hostname} // what was there is not known any more
		} else if err != nil {
			return nil, err
		}
		return m, busy(list, b, repository)
	}
	m.m = Marker{Repository: repository, Hostname: hostname}
	if m.m.Empty, err = empty(ctx, b); err != nil {
		return nil, err
	}
	if err := m.Renew(ctx); err != nil {
		return nil, err
	}
	// Who removes says so before it looks for markers, and we look after we left ours: so at least one of
	// us sees the other.
	if list, err = markers(ctx, b); err != nil {
		return nil, err
	}
	return m, busy(list, b, repository)
}

// busy returns a *BusyError if another repository is removing objects.
func busy(list []seen, b *bucket.Bucket, own string) error {
	for _, s := range list {
		if s.removing && s.repository != own {
			return &BusyError{Bucket: b.String(), Repository: s.repository, Since: s.written}
		}
	}
	return nil
}

// Renew writes the marker again. Its time, by the server's clock, is when the last backup that used the bucket
// ended: what is newer may be somebody's who is still at work.
func (m *Member) Renew(ctx context.Context) error {
	text, err := json.Marshal(m.m)
	if err != nil {
		return err
	}
	if err := put(ctx, m.b, Prefix+m.m.Repository, text); err != nil {
		return fmt.Errorf("write the marker of the repository: %w", err)
	}
	return nil
}

func put(ctx context.Context, b *bucket.Bucket, key string, text []byte) error {
	_, err := b.Put(ctx, key, int64(len(text)), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil })
	return err
}

// markerLimit bounds what is read as a marker, in bytes.
const markerLimit = 64 << 10

func load(ctx context.Context, b *bucket.Bucket, repository string) (m Marker, err error) {
	r, err := b.Get(ctx, Prefix+repository, "")
	if err != nil {
		return m, fmt.Errorf("read the marker of the repository: %w", err)
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, markerLimit))
	if err != nil {
		return m, fmt.Errorf("read the marker of the repository: %w", err)
	}
	if err := json.Unmarshal(text, &m); err != nil || m.Repository != repository {
		return m, &MarkerError{Bucket: b.String(), Key: Prefix + repository}
	}
	return m, nil
}

// MarkerError says that a marker is none.
type MarkerError struct{ Bucket, Key string }

func (e *MarkerError) Error() string {
	return fmt.Sprintf("the object %q of %s is no marker of this repository", e.Key, e.Bucket)
}

// Hints says what to do next.
func (e *MarkerError) Hints() []string {
	return []string{"Delete the object; the next backup writes it again."}
}

// empty reports whether the bucket has no objects but markers.
func empty(ctx context.Context, b *bucket.Bucket) (bool, error) {
	found := errors.New("found")
	err := b.List(ctx, "", func(o bucket.Object) error {
		if strings.HasPrefix(o.Key, Prefix) {
			return nil
		}
		return found
	})
	if errors.Is(err, found) {
		return false, nil
	}
	return err == nil, err
}
