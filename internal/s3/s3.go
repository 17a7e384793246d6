// Package s3 makes clients of object stores that speak Amazon's S3 protocol, finds their
// credentials where the AWS tools find them, and puts their errors into words. Start at [New].
//
// Nothing here logs, and no error holds a secret: requests are signed in their headers, so that
// an address in an error gives nothing away.
package s3

import (
	"cmp"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/transport"
)

// Style is how the name of a bucket gets into an address.
type Style uint8

// The styles.
const (
	// StyleAuto is virtual hosts for the large public providers that want them, else paths.
	StyleAuto Style = iota
	// StylePath is https://endpoint/bucket/key.
	StylePath
	// StyleVirtualHost is https://bucket.endpoint/key.
	StyleVirtualHost
)

// Options of New. Only Endpoint must be set.
type Options struct {
	// Endpoint is an URL without a path ("https://s3.example.com:9000") or a host, which then means https.
	Endpoint string
	// Region of the bucket. Empty: AWS_REGION or AWS_DEFAULT_REGION, the profile's, or what the server says.
	Region string
	Style  Style
	// AccessKey and SecretKey, with or without SessionToken, go before all other credentials.
	AccessKey, SecretKey, SessionToken string
	// Profile of the AWS tools' files; if it is given, it goes before the environment.
	Profile string
	// InstanceRole allows to ask the machine's or container's provider for credentials. Without it
	// no such request is made, since it hangs where there is no such service.
	InstanceRole bool
	// Env looks up environment variables. Nil: os.LookupEnv.
	Env func(string) (string, bool)
	// Tries is how often the library sends a request that fails for a passing reason, with at most
	// a second between two. Zero: 10. One is for callers that try again themselves.
	Tries     int
	Transport transport.Options
	// Version of this program, told to servers.
	Version string
}

// Client is a connection to one endpoint. It is safe for concurrent use.
type Client struct {
	*minio.Client
	// Credentials says in words where the credentials come from, e.g. "the environment".
	Credentials string

	endpoint string
	tr       *http.Transport
}

// Core gives the calls that are one request each.
func (c *Client) Core() minio.Core { return minio.Core{Client: c.Client} }

// Endpoint is the address for messages: "https://host:port".
func (c *Client) Endpoint() string { return c.endpoint }

// Close closes the idle connections.
func (c *Client) Close() { c.tr.CloseIdleConnections() }

// New makes a client. It sends nothing to the endpoint yet; but finding credentials may run the
// program that a profile names, or ask the services for a web identity or an instance role.
//
// Errors: *EndpointError, *CredentialsError, and those of files with certificates.
func New(ctx context.Context, o Options) (*Client, error) {
	if o.Env == nil {
		o.Env = os.LookupEnv
	}
	u, err := ParseEndpoint(o.Endpoint)
	if err != nil {
		return nil, err
	}
	if o.Transport.CACert == "" {
		o.Transport.CACert = env(o, "AWS_CA_BUNDLE")
	}
	tr, err := transport.New(o.Transport)
	if err != nil {
		return nil, err
	}
	o.Region = cmp.Or(o.Region, env(o, "AWS_REGION"), env(o, "AWS_DEFAULT_REGION"), profileRegion(o))
	creds, from, err := findCredentials(ctx, o, &http.Client{Transport: tr})
	if err != nil {
		return nil, err
	}
	lookup := map[Style]minio.BucketLookupType{
		StyleAuto: minio.BucketLookupAuto, StylePath: minio.BucketLookupPath, StyleVirtualHost: minio.BucketLookupDNS,
	}[o.Style]
	mc, err := minio.New(u.Host, &minio.Options{
		Creds: creds, Secure: u.Scheme == "https", Transport: tr, Region: o.Region, BucketLookup: lookup, MaxRetries: o.Tries,
	})
	if err != nil {
		return nil, &EndpointError{Endpoint: o.Endpoint, Why: err.Error()}
	}
	mc.SetAppInfo("holdfast", cmp.Or(o.Version, "dev"))
	return &Client{Client: mc, Credentials: from, endpoint: u.Scheme + "://" + u.Host, tr: tr}, nil
}

// Retention tells until when an object that was looked up is locked, zero if it is not, or if the credentials may not
// know. The headers say the same as a request for the retention, whose answer servers write in different ways.
func Retention(i *minio.ObjectInfo) (mode minio.RetentionMode, until time.Time) {
	until, err := time.Parse(time.RFC3339, i.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date"))
	if err != nil {
		return "", time.Time{}
	}
	return minio.RetentionMode(i.Metadata.Get("X-Amz-Object-Lock-Mode")), until
}

// AskRetention asks until when a version is locked, of servers that do not tell it in the headers of old versions. They
// call the answer differently, so only what is in it counts.
func (c *Client) AskRetention(ctx context.Context, bucket, key, version string) (until time.Time, err error) {
	fail := func(why any) (time.Time, error) { // without the address, which is signed
		return time.Time{}, fmt.Errorf("ask for the retention of an object of bucket %q: %v", bucket, why)
	}
	q := url.Values{"retention": {""}}
	if version != "" {
		q.Set("versionId", version)
	}
	u, err := c.Presign(ctx, http.MethodGet, bucket, key, 15*time.Minute, q)
	if err != nil {
		return fail(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return fail("the address is none")
	}
	resp, err := c.tr.RoundTrip(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	var lock struct{ RetainUntilDate time.Time }
	if resp.StatusCode != http.StatusOK {
		return fail(resp.Status)
	}
	if err := xml.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&lock); err != nil {
		return fail(err)
	}
	return lock.RetainUntilDate, nil
}

// EndpointError says that an endpoint is no usable address.
type EndpointError struct {
	Endpoint string // without user information
	Why      string
}

func (e *EndpointError) Error() string {
	return fmt.Sprintf("the S3 endpoint %q cannot be used: %s", e.Endpoint, e.Why)
}

// Hints says what an endpoint looks like.
func (e *EndpointError) Hints() []string {
	return []string{"An endpoint is a host name with or without a port, e.g. https://s3.example.com or http://10.0.0.5:9000. Keys do not belong into it."}
}

// ParseEndpoint checks an endpoint, and adds https:// to a host. Errors: *EndpointError.
func ParseEndpoint(s string) (*url.URL, error) {
	full := s
	if !strings.Contains(full, "://") {
		full = "https://" + full
	}
	u, err := url.Parse(full)
	switch {
	case err != nil:
		// The library's words may repeat the address with all that is in it.
		return nil, &EndpointError{redact(s), "it is not a valid address"}
	case u.User != nil:
		return nil, &EndpointError{redact(s), "it holds a user name or a password"}
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, &EndpointError{s, "it must begin with https:// or http://"}
	case u.Host == "" || u.Hostname() == "":
		return nil, &EndpointError{s, "it has no host name"}
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return nil, &EndpointError{s, "it has a path, and the S3 protocol leaves no room for one"}
	}
	u.Path = ""
	return u, nil
}

// redact cuts what could be user information out of a broken address.
func redact(s string) string {
	start := 0
	if i := strings.Index(s, "://"); i >= 0 {
		start = i + 3
	}
	if at := strings.LastIndexByte(s, '@'); at >= start {
		return s[:start] + "***" + s[at:]
	}
	return s
}

func env(o Options, name string) string {
	v, _ := o.Env(name)
	return v
}
