// Package location turns the address of a repository, as restic's users write it, into a backend.
// Start at [Parse], then [Location.Open].
package location

import (
	"context"
	"fmt"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/limit"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	bs3 "github.com/holdfast-backup/holdfast/internal/backend/s3"
	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/transport"
)

// Location is a parsed address. It holds no secret except in User.
type Location struct {
	Scheme string // local, s3

	Path string // local: the directory as it was given

	Endpoint, Bucket, Prefix string // s3
}

// Options of Open. The zero value works.
type Options struct {
	// Transport says how servers are reached; its Wrap and Connections are set here.
	Transport transport.Options
	// UploadLimit and DownloadLimit are in KiB a second. Zero: none.
	UploadLimit, DownloadLimit int
	// Connections is how many operations run at a time. Zero: 8 with servers, which hides the time
	// that each answer takes, and any number in a directory.
	Connections int
	S3          S3Options
	// Env looks up environment variables. Nil: os.LookupEnv.
	Env func(string) (string, bool)
	// Version of this program, told to servers.
	Version string
}

// S3Options are for repositories on S3.
type S3Options struct {
	Region         string
	Style          s3.Style
	Profile        string
	InstanceRole   bool
	LockDays       int
	LockCompliance bool
	StorageClass   string
}

// Error says that an address cannot be understood.
type Error struct {
	Address string // without secrets
	Why     string
}

func (e *Error) Error() string { return fmt.Sprintf("repository %q: %s", e.Address, e.Why) }

// Hints shows addresses.
func (e *Error) Hints() []string {
	return []string{"Addresses look like this: /srv/backup, s3:https://s3.example.com/bucket/prefix."}
}

// scheme matches what begins an address that is no plain path. A path with a colon can be written
// with "./" or "local:" before it.
var scheme = regexp.MustCompile(`^([A-Za-z0-9+]+):`)

// Parse understands an address. Errors: *Error.
func Parse(addr string) (Location, error) {
	fail := func(format string, args ...any) (Location, error) {
		return Location{}, &Error{Redact(addr), fmt.Sprintf(format, args...)}
	}
	m := scheme.FindStringSubmatch(addr)
	if m == nil {
		if addr == "" {
			return fail("an empty address")
		}
		return Location{Scheme: "local", Path: addr}, nil
	}
	rest := addr[len(m[0]):]
	if rest == "" {
		return fail("nothing follows %q", m[0])
	}
	switch m[1] {
	case "local":
		return Location{Scheme: "local", Path: rest}, nil
	case "s3":
		return parseS3(rest, fail)
	case "b2", "azure", "gs", "swift":
		return fail("restic's %s driver is not built in; most such providers speak the S3 protocol as well", m[1])
	}
	return fail("addresses that begin with %q are not known", m[0])
}

// parseS3 understands https://host/bucket/prefix, //host/bucket/prefix and host/bucket/prefix.
func parseS3(rest string, fail func(string, ...any) (Location, error)) (Location, error) {
	proto := "https://"
	for _, p := range []string{"https://", "http://", "//"} {
		if r, ok := strings.CutPrefix(rest, p); ok {
			rest = r
			if p != "//" {
				proto = p
			}
			break
		}
	}
	host, path, _ := strings.Cut(rest, "/")
	bucket, prefix, _ := strings.Cut(path, "/")
	if host == "" || bucket == "" {
		return fail("a host and a bucket are needed: s3:https://host/bucket/prefix")
	}
	if _, err := s3.ParseEndpoint(proto + host); err != nil {
		return fail("%v", err)
	}
	return Location{Scheme: "s3", Endpoint: proto + host, Bucket: bucket, Prefix: prefix}, nil
}

// Redact takes what could be a password out of an address, be it well-formed or not.
func Redact(addr string) string {
	m := scheme.FindString(addr)
	if m == "" || m == "local:" {
		return addr
	}
	rest := addr[len(m):]
	i := strings.Index(rest, "//")
	if i < 0 {
		i = 0
	} else {
		i += 2
	}
	// User information ends at the last @ before the path; a password with a slash in it hides the
	// end, so that everything up to the last @ goes.
	at := strings.LastIndexByte(rest, '@')
	if at < i {
		return addr
	}
	user, _, found := strings.Cut(rest[i:at], ":")
	if !found {
		return addr // a user without a password
	}
	if u, err := url.PathUnescape(user); err != nil || strings.ContainsAny(u, "/") {
		user = "***"
	}
	return m + rest[:i] + user + ":***" + rest[at:]
}

// String is the address without secrets.
func (l Location) String() string {
	switch l.Scheme {
	case "s3":
		return strings.TrimSuffix("s3:"+l.Endpoint+"/"+l.Bucket+"/"+strings.Trim(l.Prefix, "/"), "/")
	}
	return l.Path
}

// Open makes the backend, without retries. What is on a server is not looked at yet.
func (l Location) Open(ctx context.Context, o Options) (backend.Backend, error) {
	rates := limit.NewRates(o.UploadLimit, o.DownloadLimit)
	conns := o.Connections
	if l.Scheme == "local" {
		dir, err := filepath.Abs(l.Path)
		if err != nil {
			return nil, fmt.Errorf("repository %q: %w", l.Path, err)
		}
		if conns == 0 && rates == nil {
			return local.New(dir), nil
		}
		return limit.New(local.New(dir), conns, rates), nil
	}
	if conns <= 0 {
		conns = 8
	}
	o.Transport.Connections = conns + 1 // and one for a lock
	if rates != nil {
		o.Transport.Wrap = rates.Conn
	}
	var be backend.Backend
	var err error
	switch l.Scheme {
	case "s3":
		be, err = l.openS3(ctx, o)
	default:
		err = &Error{l.String(), "unknown kind of repository"}
	}
	if err != nil {
		return nil, fmt.Errorf("cannot use the repository at %s: %w", l, err)
	}
	return limit.New(be, conns, nil), nil
}

func (l Location) openS3(ctx context.Context, o Options) (backend.Backend, error) {
	c, err := s3.New(ctx, s3.Options{
		Endpoint: l.Endpoint, Region: o.S3.Region, Style: o.S3.Style, Profile: o.S3.Profile, InstanceRole: o.S3.InstanceRole,
		Env: o.Env, Tries: 1, Transport: o.Transport, Version: o.Version,
	})
	if err != nil {
		return nil, err
	}
	return bs3.New(bs3.Options{
		Client: c, Bucket: l.Bucket, Prefix: l.Prefix,
		LockDays: o.S3.LockDays, LockCompliance: o.S3.LockCompliance, StorageClass: o.S3.StorageClass,
	}), nil
}
