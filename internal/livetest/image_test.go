package livetest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// TestSaveImage: the image that a backup saves is one that the engine takes in again, as it was.
func TestSaveImage(t *testing.T) {
	t.Parallel()
	e := freezetest.TheEngine(t)
	const name = "owncloud/ocis:saved"
	id := e.Import(t, name)
	k := newCloudOf(t, "", ocis.PrefixOCIS) // as the image says
	k.container(t, freezetest.Spec{Name: "saved", Image: name, Command: []string{"ocis", "server"}})
	r := k.must(k.backup("--freeze docker:saved --container saved --save-image"))
	r.wantComplete("docker", "none")

	e.Remove("saved")
	e.RemoveImage(t, name)
	if id == "" || e.ImageID(name) != "" {
		t.Fatalf("the image %q was not there, or still is", id)
	}
	dump := exec.Command("restic", "-r", filepath.Join(k.tmp, "repo"), "--no-cache", "dump", "latest", "/software/image.tar")
	dump.Env = append(os.Environ(), "RESTIC_PASSWORD="+password)
	var saved, said bytes.Buffer
	dump.Stdout, dump.Stderr = &saved, &said
	if err := dump.Run(); err != nil {
		t.Fatalf("%v: %s", err, &said)
	}
	e.Load(t, &saved)
	if got := e.ImageID(name); got != id {
		t.Errorf("image %s came back as %q", id, got)
	}
}
