// Package layers holds the fences between the packages: it has nothing but a test that reads the
// imports of all the others.
package layers

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/holdfast-backup/holdfast/"

// steps are the parts of the flow. They do not import one another; backup and cmd know them all.
var steps = []string{
	"internal/discover", "internal/freeze", "internal/fssnap", "internal/source", "internal/capture",
	"internal/restore", "internal/browse", "internal/verify", "internal/compare", "internal/retention", "internal/consistency", "internal/live",
}

// nouns import nothing of ours.
var nouns = []string{"internal/ocis", "internal/progress", "internal/repo/id", "internal/transport", "internal/cloud", "internal/userenv"}

// testHelpers may be imported by tests, and by these.
var testHelpers, testHelperUsers = []string{"internal/testfixture"}, []string{"internal/demo", "bench", "internal/testfixture"}

// outer are the outermost parts: only cmd imports them.
var outer = []string{"internal/ui", "internal/settings", "internal/backup", "internal/maintain", "internal/drill", "internal/daemon"}

// within reports whether pkg is one of the list or below one of it.
func within(pkg string, list ...string) bool {
	for _, l := range list {
		if pkg == l || strings.HasPrefix(pkg, l+"/") {
			return true
		}
	}
	return false
}

// objection says why pkg must not import dep, or "". Both are relative to the module, except
// packages of others.
func objection(pkg, dep string, isTest bool) string {
	ours := within(dep, "internal", "cmd")
	step := ""
	for _, s := range steps {
		if within(pkg, s) {
			step = s
		}
	}
	switch {
	case within(pkg, nouns...) && ours && !isTest && !within(dep, pkg):
		return "it is a noun that imports nothing of ours"
	case step != "" && within(dep, steps...) && !within(dep, step) && !isTest:
		return "steps do not import one another; what they share belongs below both"
	case within(pkg, "internal/repo") && within(dep, append(steps, "internal/snapshot", "internal/ocis")...) && !isTest:
		return "the engine knows nothing of snapshots and instances"
	case within(pkg, "internal/backend") && ours && !within(dep, "internal/backend", "internal/s3", "internal/transport", "internal/progress", "internal/repo/id", "internal/userenv") && !isTest:
		return "a backend stores files and knows nothing else"
	case within(pkg, "internal/snapshot") && within(dep, append(steps, "internal/ocis")...) && !isTest:
		return "records know nothing of the work"
	case within(dep, outer...) && !within(pkg, "cmd", "bench") && !within(pkg, dep) && !isTest:
		return "only the command may import it"
	case within(dep, testHelpers...) && !isTest && !within(pkg, testHelperUsers...):
		return "it is for tests"
	case strings.HasPrefix(dep, "github.com/spf13/cobra") && !within(pkg, "cmd"):
		return "only the command knows its command line"
	}
	return ""
}

func TestImports(t *testing.T) {
	root := filepath.Join("..", "..")
	files := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && d.Name() != ".." || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		files++
		pkg := filepath.ToSlash(filepath.Dir(rel))
		// Helper packages for tests are named ...test, as in the standard library, or lie below one.
		isTest := strings.HasSuffix(path, "_test.go") || strings.HasSuffix(pkg, "test") || strings.Contains(pkg, "test/")
		for _, i := range f.Imports {
			dep, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			dep = strings.TrimPrefix(dep, module)
			if why := objection(pkg, dep, isTest); why != "" {
				t.Errorf("%s imports %s: %s", rel, dep, why)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 10 {
		t.Errorf("only %d files were read", files)
	}
}

// TestFences shows that each fence stands.
func TestFences(t *testing.T) {
	for _, c := range []struct {
		pkg, dep string
		test, ok bool
	}{
		{"internal/ocis", "internal/progress", false, false},
		{"internal/restore", "internal/freeze", false, false},
		{"internal/restore", "internal/restore/inner", false, true},
		{"internal/restore", "internal/freeze", true, true},
		{"internal/restore", "internal/snapshot", false, true},
		{"internal/repo", "internal/snapshot", false, false},
		{"internal/repo", "internal/backend", false, true},
		{"internal/backend/local", "internal/repo", false, false},
		{"internal/backend/local", "internal/backend", false, true},
		{"internal/backend/s3", "internal/s3", false, true},
		{"internal/s3", "internal/transport", false, true},
		{"internal/transport", "internal/s3", false, false},
		{"internal/snapshot", "internal/capture", false, false},
		{"internal/capture", "internal/ui", false, false},
		{"cmd/holdfast", "internal/ui", false, true},
		{"internal/backup", "internal/capture", false, true},
		{"internal/capture", "internal/testfixture", false, false},
		{"internal/capture", "internal/testfixture", true, true},
		{"internal/settings", "github.com/spf13/cobra", false, false},
		{"internal/capture", "internal/backup", false, false},
	} {
		if why := objection(c.pkg, c.dep, c.test); (why == "") != c.ok {
			t.Errorf("%s importing %s (test: %v): %q", c.pkg, c.dep, c.test, why)
		}
	}
}
