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
	for _, in := range []string{"", "local:", "s3:", "s3:host", "s3:https://host", "s3:https:///bucket", "s3:https://user:secret@host/bucket", "foo:bar", "b2:bucket:path", "S3:host/bucket"} {
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
