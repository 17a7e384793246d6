package backup_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// TestRecipeOfTheSnapshotWorks follows the README that lies in every snapshot: the stores of an instance
// come back with nothing but restic, tar and the lines of Python that stand there.
func TestRecipeOfTheSnapshotWorks(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"opencloud-posix", "opencloud-posixfs"} {
		t.Run(name, func(t *testing.T) {
			source := testfixture.Unpack(t, name)
			tmp := t.TempDir()
			dir, out, root := filepath.Join(tmp, "repo"), filepath.Join(tmp, "out"), filepath.Join(tmp, "root")
			be := local.New(dir)
			newRepo(t, be)
			mustBackUp(t, open(t, be), source)
			command(t, "restic", "-r", dir, "--no-cache", "restore", "latest", "--target", out)
			script := filepath.Join(tmp, "fill.py")
			if err := os.WriteFile(script, []byte(recipe(t, filepath.Join(out, "README.md"))), 0o600); err != nil {
				t.Fatal(err)
			}
			tars, err := filepath.Glob(filepath.Join(out, "storage/users/metadata/*.tar"))
			if err != nil || len(tars) == 0 {
				t.Fatalf("%d tars, %v", len(tars), err)
			}
			if err := os.Mkdir(root, 0o700); err != nil {
				t.Fatal(err)
			}
			for _, tar := range append(tars, filepath.Join(out, "storage/users/store.tar")) {
				command(t, "tar", "--warning=no-unknown-keyword", "--xattrs", "--xattrs-include=*", "-xpf", tar, "-C", root)
				command(t, "python3", script, out, tar, root)
			}
			diff, err := testfixture.Diff(filepath.Join(source, "data/storage/users"), root)
			if err != nil {
				t.Fatal(err)
			}
			for _, line := range diff {
				t.Error(line)
			}
		})
	}
}

// recipe takes the Python lines out of the README.
func recipe(t *testing.T, readme string) string {
	t.Helper()
	p, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(p), "        import os")
	if !ok {
		t.Fatal("the README has no script")
	}
	var b strings.Builder
	for line := range strings.Lines("        import os" + rest) {
		code, ok := strings.CutPrefix(line, "        ")
		if !ok && strings.TrimSpace(line) != "" {
			break
		}
		b.WriteString(code)
	}
	return b.String()
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD=pw")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}
