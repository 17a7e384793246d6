// Package fswatch tells what was changed below a directory since a moment, as the kernel saw it, so that
// what was not changed need not be looked at again while a service stands still.
//
// It uses fanotify on the whole file system, which needs root and a local file system; see fanotify(7).
// It does not see writes through memory maps: use it for directories whose files are replaced, not
// written in place.
package fswatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrLost is returned by Take when the kernel dropped events: everything may have changed.
var ErrLost = errors.New("the kernel dropped events of the file system: too much changed at once")

// Watch collects the changes below one directory.
type Watch struct {
	root string // without symbolic links
	unit func(rel string) string

	events *os.File // fanotify
	dir    *os.File // the root: handles are opened relative to its mount
	done   chan struct{}

	mu      sync.Mutex
	buf     []byte
	changed map[string]bool
	seen    map[string]bool // handles of directories that were resolved since the last Take, with the name
	err     error
}

// seenMost bounds the memory of handles: about 100 bytes each.
const seenMost = 64 << 10

// mask are the events that a change of names, contents or attributes causes.
const mask = unix.FAN_CREATE | unix.FAN_DELETE | unix.FAN_MOVED_FROM | unix.FAN_MOVED_TO | unix.FAN_MODIFY |
	unix.FAN_ATTRIB | unix.FAN_CLOSE_WRITE | unix.FAN_ONDIR

// Start watches everything below root. unit names the part of it that a changed path, relative to root,
// belongs to; the number of different names bounds the memory. Errors: where the kernel, the rights or
// the file system do not allow it.
func Start(root string, unit func(rel string) string) (*Watch, error) {
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", root, err)
	}
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_REPORT_DIR_FID|unix.FAN_REPORT_NAME, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("watch %s: fanotify_init: %w", root, err)
	}
	// Non-blocking, so the runtime waits for it, and Close ends a read.
	events := os.NewFile(uintptr(fd), "fanotify")
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, mask, unix.AT_FDCWD, real); err != nil {
		_ = events.Close()
		return nil, fmt.Errorf("watch %s: fanotify_mark: %w", root, err)
	}
	dir, err := os.Open(real)
	if err != nil {
		_ = events.Close()
		return nil, fmt.Errorf("watch %s: %w", root, err)
	}
	w := &Watch{
		root: real, unit: unit, events: events, dir: dir, done: make(chan struct{}),
		buf: make([]byte, 256<<10), changed: map[string]bool{}, seen: map[string]bool{},
	}
	// A file handle must be good for opening, or no event can be told apart.
	if err := w.probe(); err != nil {
		_ = events.Close()
		_ = dir.Close()
		return nil, fmt.Errorf("watch %s: %w", root, err)
	}
	go w.run()
	return w, nil
}

// probe opens the root by its handle.
func (w *Watch) probe() error {
	h, _, err := unix.NameToHandleAt(int(w.dir.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("name_to_handle_at: %w", err)
	}
	fd, err := unix.OpenByHandleAt(int(w.dir.Fd()), h, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_by_handle_at: %w", err)
	}
	return unix.Close(fd)
}

// Close ends the watch.
func (w *Watch) Close() error {
	err := w.events.Close()
	<-w.done
	return errors.Join(err, w.dir.Close())
}

// run takes events as they come: the kernel's queue is bounded.
func (w *Watch) run() {
	defer close(w.done)
	raw, err := w.events.SyscallConn()
	if err != nil {
		w.fail(err)
		return
	}
	for {
		err := raw.Read(func(fd uintptr) bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.drain(int(fd)) > 0 || w.err != nil
		})
		if err != nil { // closed
			return
		}
		w.mu.Lock()
		failed := w.err != nil
		w.mu.Unlock()
		if failed {
			return
		}
	}
}

func (w *Watch) fail(err error) {
	w.mu.Lock()
	if w.err == nil {
		w.err = err
	}
	w.mu.Unlock()
}

// Take returns the units that were changed since the last call, or since Start, and forgets them.
// What a system call changed that has returned before the call is in it. After an error, ErrLost for
// instance, nothing is known, and the watch stays useless.
func (w *Watch) Take() (map[string]bool, error) {
	raw, err := w.events.SyscallConn()
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	err = raw.Control(func(fd uintptr) {
		for w.err == nil && w.drain(int(fd)) > 0 {
		}
	})
	if err != nil {
		return nil, err
	}
	if w.err != nil {
		return nil, w.err
	}
	out := w.changed
	w.changed, w.seen = map[string]bool{}, map[string]bool{}
	return out, nil
}

// drain reads what the kernel has at the moment and returns how many bytes that were.
func (w *Watch) drain(fd int) int {
	n, err := unix.Read(fd, w.buf)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return 0
	case err != nil:
		w.err = fmt.Errorf("watch %s: read events: %w", w.root, err)
		return 0
	}
	for b := w.buf[:n]; len(b) >= unix.FAN_EVENT_METADATA_LEN; {
		m := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&b[0]))
		if m.Event_len < unix.FAN_EVENT_METADATA_LEN || int(m.Event_len) > len(b) || m.Vers != unix.FANOTIFY_METADATA_VERSION {
			w.err = fmt.Errorf("watch %s: an event cannot be understood (version %d)", w.root, m.Vers)
			return n
		}
		if m.Mask&unix.FAN_Q_OVERFLOW != 0 {
			w.err = fmt.Errorf("watch %s: %w", w.root, ErrLost)
			return n
		}
		w.event(b[m.Metadata_len:m.Event_len])
		b = b[m.Event_len:]
	}
	return n
}

// event takes in the records of one event. Source: fanotify(7), struct fanotify_event_info_fid: type 1,
// pad 1, len 2, fsid 8, then a struct file_handle: handle_bytes 4, handle_type 4, the handle, and a name
// that ends with NUL.
func (w *Watch) event(info []byte) {
	for len(info) >= 20 {
		kind, size := info[0], int(binary.NativeEndian.Uint16(info[2:]))
		if size < 20 || size > len(info) {
			w.err = fmt.Errorf("watch %s: a record of an event cannot be understood", w.root)
			return
		}
		rec := info[12:size]
		info = info[size:]
		if kind != unix.FAN_EVENT_INFO_TYPE_DFID_NAME && kind != unix.FAN_EVENT_INFO_TYPE_DFID {
			continue
		}
		bytes, typ := int(binary.NativeEndian.Uint32(rec)), int32(binary.NativeEndian.Uint32(rec[4:]))
		if bytes > len(rec)-8 {
			w.err = fmt.Errorf("watch %s: a record of an event cannot be understood", w.root)
			return
		}
		key := string(rec) // handle and name
		if w.seen[key] {
			continue
		}
		if len(w.seen) >= seenMost {
			clear(w.seen)
		}
		w.seen[key] = true
		name := ""
		if kind == unix.FAN_EVENT_INFO_TYPE_DFID_NAME {
			name, _, _ = strings.Cut(string(rec[8+bytes:]), "\x00")
		}
		w.resolve(unix.NewFileHandle(typ, rec[8:8+bytes]), name)
	}
}

// resolve finds the directory of an event. One that is gone tells nothing: its removal was an event of the
// directory above.
func (w *Watch) resolve(h unix.FileHandle, name string) {
	fd, err := unix.OpenByHandleAt(int(w.dir.Fd()), h, unix.O_PATH|unix.O_CLOEXEC)
	if errors.Is(err, unix.ESTALE) || errors.Is(err, unix.ENOENT) {
		return
	}
	if err != nil {
		w.err = fmt.Errorf("watch %s: open_by_handle_at: %w", w.root, err)
		return
	}
	defer unix.Close(fd)
	dir, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		w.err = fmt.Errorf("watch %s: %w", w.root, err)
		return
	}
	rel, ok := strings.CutPrefix(dir+"/", strings.TrimSuffix(w.root, "/")+"/")
	if !ok {
		return // elsewhere on the file system
	}
	if name != "." {
		rel += name
	}
	w.changed[w.unit(strings.TrimSuffix(rel, "/"))] = true
}
