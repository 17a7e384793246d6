package capture

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReadingLeavesNoTrace: times of access stay, because a file system lists them as changes; where the kernel
// refuses that, files are read none the less.
func TestReadingLeavesNoTrace(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "dir/file")
	now, long := time.Now(), time.Now().Add(-48*time.Hour)
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, []byte("x"), 0o644), os.Chmod(dir, 0o755),
		os.Chtimes(file, long, now), os.Chtimes(filepath.Dir(file), long, now)); err != nil {
		t.Fatal(err)
	}
	r, err := openRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	read := func() {
		t.Helper()
		sc := &scanner{r: r, workers: 1, unreadable: func(rel string, err error) { t.Error(rel, err) }}
		seen := 0
		if err := sc.walk(t.Context(), "", func(*entry) error { seen++; return nil }); err != nil || seen != 3 {
			t.Error(seen, err)
		}
		d := newDetails(r)
		defer d.close()
		if p, err := d.readFile("dir/file", 10); err != nil || string(p) != "x" {
			t.Errorf("%q %v", p, err)
		}
		f, err := r.openFile("dir/file")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if n, err := f.Read(make([]byte, 5)); n != 1 || err != nil {
			t.Error(n, err)
		}
	}
	accessed := func(path string) bool {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Atim.Sec != long.Unix()
	}
	read()
	if accessed(file) || accessed(filepath.Dir(file)) {
		t.Error("the backup changed times of access")
	}
	// Another user may read, but not without a trace.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, err := unix.SetfsuidRetUid(65534); err != nil {
		t.Fatal(err)
	}
	f, err := r.openFile("dir/file")
	if err == nil {
		_, err = f.Read(make([]byte, 5))
		f.Close()
	}
	d := newDetails(r)
	p, derr := d.readFile("dir/file", 10)
	d.close()
	if _, err := unix.SetfsuidRetUid(0); err != nil {
		t.Fatal(err)
	}
	if err != nil || derr != nil || string(p) != "x" || noOpenat2.Load() {
		t.Errorf("another user: %v; %q %v; without openat2: %v", err, p, derr, noOpenat2.Load())
	}
	if !accessed(file) {
		t.Error("the test tests nothing")
	}
}
