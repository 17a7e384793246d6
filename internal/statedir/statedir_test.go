package statedir_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/statedir"
)

func TestDefault(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", "/x/state")
	if dir, err := statedir.Default(); err != nil || dir != "/x/state/holdfast" {
		t.Errorf("%q, %v", dir, err)
	}
	t.Setenv("XDG_STATE_HOME", "not/absolute")
	t.Setenv("HOME", "/home/x")
	want := "/home/x/.local/state/holdfast"
	if os.Geteuid() == 0 {
		want = "/var/lib/holdfast"
	}
	if dir, err := statedir.Default(); err != nil || dir != want {
		t.Errorf("%q, %v, want %q", dir, err, want)
	}
}

// TestRecords: what was written comes back, for its owner alone; temporary files are never taken for
// records, and go with the record.
func TestRecords(t *testing.T) {
	top := t.TempDir()
	if _, names, err := statedir.Names(top, "sub", ".json"); err != nil || len(names) > 0 {
		t.Fatalf("before there is anything: %q, %v", names, err)
	}
	dir, err := statedir.Make(top, "sub")
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Fatalf("%v, %v", st.Mode(), err)
	}
	path := filepath.Join(dir, "one.json")
	for _, v := range []string{"first", "second"} {
		if err := statedir.Write(path, v); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		var got string
		if err != nil || json.Unmarshal(data, &got) != nil || got != v {
			t.Fatalf("%q, %v", data, err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	left := filepath.Join(dir, "one.123.tmp") // of a writer that was killed
	for _, p := range []string{left, filepath.Join(dir, "two.lock")} {
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, names, err := statedir.Names(top, "sub", ".json", ".lock"); err != nil || !slices.Equal(names, []string{"one", "two"}) {
		t.Errorf("%q, %v", names, err)
	}
	if err := statedir.Write(path, func() {}); err == nil {
		t.Error("what is no JSON was written")
	}
	for range 2 { // that it is gone is no error
		if err := statedir.Remove(path); err != nil {
			t.Error(err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v are left", entries, err)
	}
}

func TestMakeSaysWhatToDo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := statedir.Make(file, "sub")
	if err == nil {
		t.Fatal("a directory below a file")
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l, err := statedir.Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := statedir.Lock(path); !errors.Is(err, statedir.ErrLocked) {
		t.Errorf("a second lock: %v", err)
	}
	l.Close()
	again, err := statedir.Lock(path)
	if err != nil {
		t.Fatalf("after it was given back: %v", err)
	}
	again.Close()
	link := path + "-link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := statedir.Lock(link); err == nil {
		t.Error("a symbolic link was followed")
	}
}
