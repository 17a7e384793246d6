package membudget

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

const gib = 1 << 30

// machine makes what the kernel tells below a directory; files by path, "" stands for none.
func machine(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestAvailable(t *testing.T) {
	const (
		mem = "MemFree:  17 kB\nMemTotal:       16777216 kB\n"
		v2  = "30 20 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
		v1  = "31 20 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n32 20 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
	)
	for _, c := range []struct {
		name  string
		files map[string]string
		want  int64
	}{
		{"no group", map[string]string{"proc/meminfo": mem}, 16 * gib},
		{"nothing is told", nil, 0},
		{"version 2, no limit", map[string]string{
			"proc/meminfo": mem, "proc/self/mountinfo": v2, "proc/self/cgroup": "0::/system.slice/holdfast.service\n",
			"sys/fs/cgroup/system.slice/holdfast.service/memory.max": "max\n",
		}, 16 * gib},
		{"version 2, own limit", map[string]string{
			"proc/meminfo": mem, "proc/self/mountinfo": v2, "proc/self/cgroup": "0::/system.slice/holdfast.service\n",
			"sys/fs/cgroup/system.slice/memory.max":                  "4294967296\n",
			"sys/fs/cgroup/system.slice/holdfast.service/memory.max": "1073741824\n",
		}, gib},
		{"version 2, limit of an outer group", map[string]string{
			"proc/meminfo": mem, "proc/self/mountinfo": v2, "proc/self/cgroup": "0::/system.slice/holdfast.service\n",
			"sys/fs/cgroup/system.slice/memory.max":                  "2147483648\n",
			"sys/fs/cgroup/system.slice/holdfast.service/memory.max": "8589934592\n",
		}, 2 * gib},
		{"version 2, slowed down above", map[string]string{
			"proc/meminfo": mem, "proc/self/mountinfo": v2, "proc/self/cgroup": "0::/a\n",
			"sys/fs/cgroup/a/memory.max": "2147483648\n", "sys/fs/cgroup/a/memory.high": "1610612736\n",
		}, 3 * gib / 2},
		{"version 2 in a container: the mount is the group", map[string]string{
			"proc/meminfo": mem, "proc/self/cgroup": "0::/\n", "proc/self/mountinfo": v2, "sys/fs/cgroup/memory.max": "536870912\n",
		}, gib / 2},
		{"version 2, the path is one of the host", map[string]string{
			"proc/meminfo": mem, "proc/self/cgroup": "0::/docker/abc\n",
			"proc/self/mountinfo":      "30 20 0:27 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n",
			"sys/fs/cgroup/memory.max": "536870912\n",
		}, gib / 2},
		{"version 2, the path cannot be seen", map[string]string{
			"proc/meminfo": mem, "proc/self/cgroup": "0::/../../other\n",
			"proc/self/mountinfo":      "30 20 0:27 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n",
			"sys/fs/cgroup/memory.max": "536870912\n",
		}, gib / 2},
		{"version 1, own limit", map[string]string{
			"proc/meminfo": mem, "proc/self/mountinfo": v1, "proc/self/cgroup": "9:cpu:/x\n4:memory:/jobs/one\n0::/\n",
			"sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes": "1073741824\n",
			"sys/fs/cgroup/memory/jobs/memory.limit_in_bytes":     "9223372036854771712\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":          "9223372036854771712\n",
			"sys/fs/cgroup/cpu/x/memory.limit_in_bytes":           "1\n",
		}, gib},
		{"version 1, limit of an outer group", map[string]string{
			"proc/meminfo": mem, "proc/self/mountinfo": v1, "proc/self/cgroup": "4:hugetlb,memory:/jobs/one\n",
			"sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes": "9223372036854771712\n",
			"sys/fs/cgroup/memory/jobs/memory.limit_in_bytes":     "2147483648\n",
		}, 2 * gib},
		{"version 1 in a container", map[string]string{
			"proc/meminfo": mem, "proc/self/cgroup": "4:memory:/docker/abc/in\n",
			"proc/self/mountinfo":                           "32 20 0:29 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":    "536870912\n",
			"sys/fs/cgroup/memory/in/memory.limit_in_bytes": "268435456\n",
		}, gib / 4},
		{"a limit above the machine", map[string]string{
			"proc/meminfo": mem, "proc/self/mountinfo": v2, "proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "68719476736\n",
		}, 16 * gib},
		{"nonsense", map[string]string{
			"proc/meminfo": "MemTotal: much\n", "proc/self/mountinfo": v2, "proc/self/cgroup": "0::/a\nfoo\n", "sys/fs/cgroup/a/memory.max": "-1\n",
		}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := available(machine(t, c.files)); got != c.want {
				t.Errorf("%d bytes, not %d", got, c.want)
			}
		})
	}
	if total("/") < 64*mib {
		t.Errorf("this machine has %d bytes of memory", total("/"))
	}
}

func TestByDefault(t *testing.T) {
	for have, want := range map[int64]int64{
		0: most, 256 * mib: Least, 512 * mib: 128 * mib, gib: 256 * mib, 4 * gib: gib, 64 * gib: gib,
	} {
		if got := byDefault(have); got != want {
			t.Errorf("of %d bytes %d, not %d", have, got, want)
		}
	}
}

// What runs at once fits into the size, on any number of processors.
func TestBudgetFits(t *testing.T) {
	for _, procs := range []int{1, 2, 4, 16, 128} {
		var last Budget
		for _, size := range []int64{Least, 128 * mib, 200 * mib, 256 * mib, 512 * mib, gib, 8 * gib} {
			b, err := New(size, procs, 0)
			if err != nil {
				t.Fatal(err)
			}
			capture := int64(b.PackBuffers)*b.PackSize + int64(b.Compressors)*10*mib + int64(b.Workers)*9*mib + int64(b.Ahead*b.Spaces)*300 + b.Look
			restore := int64(b.Windows*b.Readers)*8*mib + 2*int64(b.Batch) + int64(b.Workers)*mib
			if size > Least && max(capture, restore) > size-base {
				t.Errorf("%d MiB, %d processors: a capture takes %d MiB and a restore %d of %d: %+v", size/mib, procs, capture/mib, restore/mib, (size-base)/mib, b)
			}
			if b.PackBuffers < 2 || b.Compressors < 1 || b.Workers < 1 || b.Spaces < 1 || b.Readers < 1 || b.Windows < 1 || b.Batch < 1 {
				t.Errorf("%d MiB, %d processors: %+v", size/mib, procs, b)
			}
			if b.PackSize < last.PackSize || b.Compressors < last.Compressors || b.Workers < last.Workers || b.Readers < last.Readers && b.Windows == last.Windows {
				t.Errorf("%d MiB, %d processors: less with more memory: %+v after %+v", size/mib, procs, b, last)
			}
			if b.GoLimit >= size {
				t.Errorf("Go may take %d of %d bytes", b.GoLimit, size)
			}
			last = b
		}
	}
}

func TestTooSmall(t *testing.T) {
	for _, c := range []struct {
		size, pack int64
		least      int64
		text       string
	}{
		{Least - 1, 0, Least, "96.0M is too little memory: 96M is the least that works"},
		{17, 0, Least, "17 bytes is too little memory: 96M is the least that works"},
		{Least, 128 * mib, base + 512*mib, "96M is too little memory with files of 128 MiB in the repository: 552M is the least that works"},
	} {
		_, err := New(c.size, 2, c.pack)
		var small *TooSmallError
		if !errors.As(err, &small) || small.Least != c.least || err.Error() != c.text {
			t.Fatalf("New(%d, 2, %d): %v", c.size, c.pack, err)
		}
		if b, err := New(c.least, 2, c.pack); err != nil || b.PackBuffers < 2 {
			t.Errorf("what is told to work does not: %+v, %v", b, err)
		}
	}
}
