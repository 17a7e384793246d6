package location_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend/location"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		in   string
		want location.Location
		text string // String, if it is not the input
	}{
		{"/srv/backup", location.Location{Scheme: "local", Path: "/srv/backup"}, ""},
		{"./a:b", location.Location{Scheme: "local", Path: "./a:b"}, ""},
		{"local:a:b", location.Location{Scheme: "local", Path: "a:b"}, "a:b"},
		{"s3:https://s3.example.com/bucket", location.Location{Scheme: "s3", Endpoint: "https://s3.example.com", Bucket: "bucket"}, ""},
		{"s3:http://10.0.0.5:9000/bucket/a/b/", location.Location{Scheme: "s3", Endpoint: "http://10.0.0.5:9000", Bucket: "bucket", Prefix: "a/b/"}, "s3:http://10.0.0.5:9000/bucket/a/b"},
		{"s3:s3.amazonaws.com/bucket/p", location.Location{Scheme: "s3", Endpoint: "https://s3.amazonaws.com", Bucket: "bucket", Prefix: "p"}, "s3:https://s3.amazonaws.com/bucket/p"},
		{"s3://s3.amazonaws.com/bucket", location.Location{Scheme: "s3", Endpoint: "https://s3.amazonaws.com", Bucket: "bucket"}, "s3:https://s3.amazonaws.com/bucket"},
		{"rest:https://host:8000/a/b", location.Location{Scheme: "rest", Endpoint: "https://host:8000/a/b/"}, "rest:https://host:8000/a/b/"},
		{"rest:http://me:se%3Acret@host", location.Location{Scheme: "rest", Endpoint: "http://host/", User: "me", Password: "se:cret"}, "rest:http://host/"},
		{"sftp:me@host:/srv/a", location.Location{Scheme: "sftp", User: "me", Host: "host", Path: "/srv/a"}, ""},
		{"sftp:host:a/b", location.Location{Scheme: "sftp", Host: "host", Path: "a/b"}, ""},
		{"sftp:me@[::1]:/srv", location.Location{Scheme: "sftp", User: "me", Host: "::1", Path: "/srv"}, ""},
		{"sftp:me@corp@host:/srv", location.Location{Scheme: "sftp", User: "me@corp", Host: "host", Path: "/srv"}, ""},
		{"sftp://me@host:2222//srv/a", location.Location{Scheme: "sftp", User: "me", Host: "host", Port: "2222", Path: "/srv/a"}, ""},
		{"sftp://me@host/srv/a", location.Location{Scheme: "sftp", User: "me", Host: "host", Path: "srv/a"}, "sftp:me@host:srv/a"},
		{"rclone:b2:bucket/a:b", location.Location{Scheme: "rclone", Remote: "b2:bucket/a:b"}, ""},
		{"rclone::local:/srv", location.Location{Scheme: "rclone", Remote: ":local:/srv"}, ""},
	} {
		got, err := location.Parse(c.in)
		if err != nil || got != c.want {
			t.Errorf("%q: %+v, %v", c.in, got, err)
		}
		if c.text == "" {
			c.text = c.in
		}
		if s := got.String(); s != c.text {
			t.Errorf("%q is written %q", c.in, s)
		}
	}
	for _, in := range []string{"", "local:", "s3:", "s3:host", "s3:https://host", "s3:https:///bucket", "s3:https://user:secret@host/bucket", "foo:bar", "b2:bucket:path", "S3:host/bucket",
		"rest:host/path", "rest:ftp://host/", "rest:http://me:secret@", "rest:http://me:secret@ho st/", "rest:http://h/?a", "sftp:host", "sftp:host:", "sftp::path", "sftp://host", "sftp://host/",
		"sftp:-oProxyCommand=x:/path", "sftp://-x/path", "sftp:host:~/path", "sftp://me:secret@host/path", "rclone:remote", "rclone:-x:y", "rclone::"} {
		_, err := location.Parse(in)
		var e *location.Error
		if !errors.As(err, &e) || strings.Contains(err.Error(), "secret") || len(e.Hints()) == 0 {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestRedact(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"/srv/a:b@c", "/srv/a:b@c"},
		{"local:a:b@c", "local:a:b@c"},
		{"rest:https://user:secret@host/", "rest:https://user:***@host/"},
		{"rest:https://user:sec/ret@host/", "rest:https://user:***@host/"},
		{"rest:https://user:sec@ret@host/", "rest:https://user:***@host/"},
		{"rest:https://us/er:secret@host/", "rest:https://***:***@host/"},
		{"s3:key:secret@host/bucket", "s3:key:***@host/bucket"},
		{"sftp:user@host:/path", "sftp:user@host:/path"},
		{"rest:https://:secret@host/", "rest:https://:***@host/"},
	} {
		if got := location.Redact(c.in); got != c.want {
			t.Errorf("%q: %q, not %q", c.in, got, c.want)
		}
	}
}
