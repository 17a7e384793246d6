// Package location turns the address of a repository, as restic's users write it, into a backend.
// Start at [Parse], then [Location.Open].
package location

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/limit"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backend/rclone"
	"github.com/holdfast-backup/holdfast/internal/backend/rest"
	bs3 "github.com/holdfast-backup/holdfast/internal/backend/s3"
	"github.com/holdfast-backup/holdfast/internal/backend/sftp"
	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/transport"
)

// Location is a parsed address. It holds no secret except in Password.
type Location struct {
	Scheme string // local, s3, rest, sftp, rclone

	Path             string // local: the directory as it was given; sftp: on the server
	Endpoint         string // s3, rest: an URL; rest's has a path
	Bucket, Prefix   string // s3
	User, Host, Port string // sftp, rest (the user)
	Password         string // rest; never shown
	Remote           string // rclone
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
	// SFTPCommand is a shell command whose input and output are an SFTP session.
	SFTPCommand string
	// RcloneProgram is the path of rclone.
	RcloneProgram string
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
	return []string{"Addresses look like this: /srv/backup, s3:https://host/bucket/prefix, rest:https://host:8000/path, sftp:user@host:/path, rclone:remote:path."}
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
	case "rest":
		return parseREST(rest, fail)
	case "sftp":
		return parseSFTP(rest, fail)
	case "rclone":
		if remote, _, ok := strings.Cut(rest, ":"); !ok || (remote == "" && len(rest) < 2) || strings.HasPrefix(rest, "-") {
			return fail("rclone's remote and a path are needed: rclone:remote:path")
		}
		return Location{Scheme: "rclone", Remote: rest}, nil
	case "b2", "azure", "gs", "swift":
		return fail("restic's %s driver is not built in; use the S3 protocol if the provider has it, or rclone", m[1])
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

// parseREST understands an URL, with or without user information.
func parseREST(rest string, fail func(string, ...any) (Location, error)) (Location, error) {
	u, err := url.Parse(rest)
	switch {
	case err != nil: // the library's words would repeat the address with all that is in it
		return fail("it is no valid URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return fail("http:// or https:// is needed after rest:")
	case u.Hostname() == "":
		return fail("a host is needed: rest:https://host:8000/path")
	case u.RawQuery != "" || u.Fragment != "":
		return fail("a repository's URL has no ? and no #")
	}
	l := Location{Scheme: "rest"}
	if u.User != nil {
		l.User = u.User.Username()
		l.Password, _ = u.User.Password()
		u.User = nil
	}
	if !strings.HasSuffix(u.Path, "/") {
		u.Path += "/"
	}
	l.Endpoint = u.String()
	return l, nil
}

// parseSFTP understands user@host:path and //user@host:port/path, where a path that is to begin at
// the root has a second slash.
func parseSFTP(rest string, fail func(string, ...any) (Location, error)) (Location, error) {
	l := Location{Scheme: "sftp"}
	if r, ok := strings.CutPrefix(rest, "//"); ok {
		u, err := url.Parse("sftp://" + r)
		if err != nil {
			return fail("it is no valid URL")
		}
		if _, ok := u.User.Password(); ok {
			return fail("passwords are not used with SFTP: use a key")
		}
		l.User, l.Host, l.Port, l.Path = u.User.Username(), u.Hostname(), u.Port(), strings.TrimPrefix(u.Path, "/")
	} else {
		host, path, ok := strings.Cut(rest, ":")
		if strings.HasPrefix(rest, "[") || strings.Contains(rest, "@[") { // an IPv6 address
			var h string
			if h, path, ok = strings.Cut(rest, "]:"); ok {
				host = strings.Replace(h, "[", "", 1)
			}
		}
		if !ok {
			return fail("a host and a path are needed: sftp:user@host:/path")
		}
		if i := strings.LastIndexByte(host, '@'); i >= 0 {
			l.User, host = host[:i], host[i+1:]
		}
		l.Host, l.Path = host, path
	}
	switch {
	case l.Host == "" || l.Path == "":
		return fail("a host and a path are needed: sftp:user@host:/path")
	case strings.HasPrefix(l.Host, "-") || strings.HasPrefix(l.User, "-"):
		return fail("a host or user does not begin with a dash")
	case strings.HasPrefix(l.Path, "~"):
		return fail("a tilde is not understood by SFTP servers; a path without a slash at its beginning is below the user's home")
	}
	return l, nil
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
	case "rest":
		return "rest:" + l.Endpoint
	case "rclone":
		return "rclone:" + l.Remote
	case "sftp":
		host := l.Host
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		if l.User != "" {
			host = l.User + "@" + host
		}
		if l.Port != "" {
			return "sftp://" + host + ":" + l.Port + "/" + l.Path
		}
		return "sftp:" + host + ":" + l.Path
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
	case "rest":
		be, err = l.openREST(o)
	case "sftp":
		be = sftp.New(sftp.Options{
			User: l.User, Host: l.Host, Port: l.Port, Path: l.Path, Command: o.SFTPCommand, Env: o.Env,
			Connect: o.Transport.Connect, Idle: o.Transport.Idle, Wrap: o.Transport.Wrap, Location: l.String(),
		})
	case "rclone":
		be, err = rclone.Open(rclone.Options{
			Remote: l.Remote, Program: o.RcloneProgram, Wrap: o.Transport.Wrap, Headers: o.Transport.Headers, Version: o.Version,
		})
	default:
		err = &Error{l.String(), "unknown kind of repository"}
	}
	if err != nil {
		return nil, fmt.Errorf("cannot use the repository at %s: %w", l, err)
	}
	return limit.New(be, conns, nil), nil
}

func (l Location) openREST(o Options) (backend.Backend, error) {
	u, err := url.Parse(l.Endpoint)
	if err != nil {
		return nil, err
	}
	tr, err := transport.New(o.Transport)
	if err != nil {
		return nil, err
	}
	env := o.Env
	if env == nil {
		env = os.LookupEnv
	}
	// As restic does: what the address says goes first.
	user, password := l.User, l.Password
	if user == "" {
		user, _ = env("RESTIC_REST_USERNAME")
	}
	if password == "" {
		password, _ = env("RESTIC_REST_PASSWORD")
	}
	return rest.New(rest.Options{URL: u, User: user, Password: password, Transport: tr, Version: o.Version}), nil
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
