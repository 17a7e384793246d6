package userenv

import (
	"slices"
	"testing"
)

func TestSecretsAreWithheld(t *testing.T) {
	env := []string{
		"PATH=/bin", "HOLDFAST_PASSWORD=a", "HOLDFAST_REPOSITORY=b", "RESTIC_PASSWORD=c", "RESTIC_REST_PASSWORD=d", "AWS_ACCESS_KEY_ID=e",
		"AWS_SECRET_ACCESS_KEY=f", "AWS_SESSION_TOKEN=g", "AWS_CA_BUNDLE=h", "RCLONE_CONFIG_PASS=i", "HOLDFAST_REPLICA_SECRET_KEY=j",
		"HOLDFAST_BUCKET_ACCESS_KEY=k", "HOLDFAST_FROM_PASSWORD_FILE=l", "STORAGE_USERS_S3NG_SECRET_KEY=m", "OCIS_X=HOLDFAST_", "EMPTY=",
	}
	if got := Filter(env); !slices.Equal(got, []string{"PATH=/bin", "STORAGE_USERS_S3NG_SECRET_KEY=m", "OCIS_X=HOLDFAST_", "EMPTY="}) {
		t.Errorf("%q", got)
	}
	// What the user names is passed on.
	Pass([]string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"})
	defer Pass(nil)
	if got := Filter(env); !slices.Equal(got, []string{"PATH=/bin", "AWS_ACCESS_KEY_ID=e", "AWS_SECRET_ACCESS_KEY=f", "STORAGE_USERS_S3NG_SECRET_KEY=m", "OCIS_X=HOLDFAST_", "EMPTY="}) {
		t.Errorf("%q", got)
	}
	t.Setenv("AWS_PROFILE", "x")
	t.Setenv("RESTIC_PASSWORD", "x")
	if slices.Contains(Environ(), "AWS_PROFILE=x") {
		t.Error("of our own environment AWS_PROFILE is passed on")
	}
	if r := ForRemotes(); !slices.Contains(r, "AWS_PROFILE=x") || slices.Contains(r, "RESTIC_PASSWORD=x") {
		t.Errorf("for rclone: %q", r)
	}
}
