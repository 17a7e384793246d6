package s3

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/minio/minio-go/v7/pkg/credentials"
	"gopkg.in/ini.v1"
)

// CredentialsError says that there are no credentials, or that those which were named cannot be
// used. Looked lists where they were looked for, if anywhere.
type CredentialsError struct {
	Why    string
	Looked []string
	Err    error // may be nil; holds no secret
}

func (e *CredentialsError) Error() string {
	s := "no credentials for the S3 endpoint: " + e.Why
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *CredentialsError) Unwrap() error { return e.Err }

// Hints says where credentials can be put.
func (e *CredentialsError) Hints() []string {
	h := []string{"Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or AWS_PROFILE to a profile of ~/.aws/credentials (or of AWS_SHARED_CREDENTIALS_FILE)."}
	if len(e.Looked) > 0 {
		h = append(h, "Looked for in: "+strings.Join(e.Looked, "; ")+".")
	}
	return h
}

// findCredentials follows the order of the AWS tools: what the caller gives, the environment, a web
// identity, the profile files, and the provider of the machine if that is allowed.
func findCredentials(ctx context.Context, o Options, client *http.Client) (creds *credentials.Credentials, from string, err error) {
	static := func(id, secret, token, from string) (*credentials.Credentials, string, error) {
		if id == "" || secret == "" {
			return nil, "", &CredentialsError{Why: from + " holds only one of the access key and the secret key"}
		}
		return credentials.NewStaticV4(id, secret, token), from, nil
	}
	if o.AccessKey != "" || o.SecretKey != "" {
		return static(o.AccessKey, o.SecretKey, o.SessionToken, "the configuration")
	}
	var looked []string
	if o.Profile == "" {
		id := cmp.Or(env(o, "AWS_ACCESS_KEY_ID"), env(o, "AWS_ACCESS_KEY"))
		secret := cmp.Or(env(o, "AWS_SECRET_ACCESS_KEY"), env(o, "AWS_SECRET_KEY"))
		if id != "" || secret != "" {
			return static(id, secret, env(o, "AWS_SESSION_TOKEN"), "the environment (AWS_ACCESS_KEY_ID)")
		}
		looked = append(looked, "the variable AWS_ACCESS_KEY_ID")
		if file, role := env(o, "AWS_WEB_IDENTITY_TOKEN_FILE"), env(o, "AWS_ROLE_ARN"); file != "" && role != "" {
			c, err := webIdentity(o, file, role)
			if err == nil {
				_, err = c.GetWithContext(&credentials.CredContext{Client: client, Context: ctx})
			}
			if err != nil {
				return nil, "", &CredentialsError{Why: "the web identity of AWS_WEB_IDENTITY_TOKEN_FILE was not accepted", Err: err}
			}
			return c, "a web identity (AWS_WEB_IDENTITY_TOKEN_FILE)", nil
		}
		looked = append(looked, "AWS_WEB_IDENTITY_TOKEN_FILE")
	}

	profile := profileName(o)
	wanted := o.Profile != "" || env(o, "AWS_PROFILE") != ""
	found := false
	for _, f := range profileFiles(o) {
		if _, err := os.Stat(f); err == nil {
			found = true
		}
		looked = append(looked, f)
	}
	if found {
		c := credentials.NewFileAWSCredentials("", profile)
		v, err := c.GetWithContext(&credentials.CredContext{Client: client, Context: ctx})
		switch {
		case err == nil && v.AccessKeyID != "" && v.SecretAccessKey != "":
			return c, fmt.Sprintf("the profile %q", profile), nil
		case wanted && err != nil:
			return nil, "", &CredentialsError{Why: fmt.Sprintf("the profile %q cannot be used", profile), Looked: looked, Err: err}
		case wanted:
			return nil, "", &CredentialsError{Why: fmt.Sprintf("the profile %q has no keys", profile), Looked: looked}
		}
	} else if wanted {
		return nil, "", &CredentialsError{Why: fmt.Sprintf("the profile %q is named, but no file with profiles exists", profile), Looked: looked}
	}

	if o.InstanceRole {
		c := credentials.New(&credentials.IAM{Region: o.Region})
		if _, err := c.GetWithContext(&credentials.CredContext{Client: client, Context: ctx}); err != nil {
			return nil, "", &CredentialsError{Why: "the machine's provider gives no role", Looked: looked, Err: err}
		}
		return c, "the instance's role", nil
	}
	return nil, "", &CredentialsError{Why: "none were found", Looked: looked}
}

// webIdentity exchanges the token in a file, which its issuer renews, for short-lived keys.
func webIdentity(o Options, file, role string) (*credentials.Credentials, error) {
	endpoint := env(o, "AWS_ENDPOINT_URL_STS")
	if endpoint == "" {
		endpoint = "https://sts.amazonaws.com"
		if o.Region != "" {
			endpoint = "https://sts." + url.PathEscape(o.Region) + ".amazonaws.com"
		}
	}
	return credentials.NewSTSWebIdentity(endpoint, func() (*credentials.WebIdentityToken, error) {
		token, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		return &credentials.WebIdentityToken{Token: strings.TrimSpace(string(token)), Expiry: int(time.Hour.Seconds())}, nil
	}, func(i *credentials.STSWebIdentity) { i.RoleARN = role })
}

func profileName(o Options) string {
	return cmp.Or(o.Profile, env(o, "AWS_PROFILE"), env(o, "AWS_DEFAULT_PROFILE"), "default")
}

// profileFiles are the AWS tools' two files.
func profileFiles(o Options) []string {
	home := env(o, "HOME")
	if home == "" {
		home, _ = os.UserHomeDir()
	}
	return []string{
		cmp.Or(env(o, "AWS_SHARED_CREDENTIALS_FILE"), filepath.Join(home, ".aws", "credentials")),
		cmp.Or(env(o, "AWS_CONFIG_FILE"), filepath.Join(home, ".aws", "config")),
	}
}

// profileRegion is the region that the profile in use names, or "".
func profileRegion(o Options) string {
	profile := profileName(o)
	for _, f := range profileFiles(o) {
		conf, err := ini.Load(f)
		if err != nil {
			continue // a file that is not needed for the keys need not be readable
		}
		for _, name := range []string{profile, "profile " + profile} {
			if s, err := conf.GetSection(name); err == nil && s.HasKey("region") {
				return s.Key("region").String()
			}
		}
	}
	return ""
}
