// Package sftp keeps a repository on a server that is reached by SSH, in restic's layout.
//
// A file is written under another name, synced and renamed, so that it appears whole. The protocol
// has no way to sync a directory: after a power cut at the server a file that was just stored may be
// missing, which `check` finds.
package sftp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path"
	"sync"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/backend"
)

// Options of New.
type Options struct {
	// User is empty for the one that ssh would take. Port is empty for 22 or what ssh would take.
	User, Host, Port string
	// Path on the server; a relative one is below the user's home.
	Path string
	// Command is a shell command whose input and output are an SFTP session. Empty: the built-in client,
	// or ssh where the user has settings for it or no key that the built-in client can use.
	Command string
	// Connect and Idle are timeouts. Zero: 30 s and 3 minutes.
	Connect, Idle time.Duration
	// Wrap is put around the connection, for limits. May be nil.
	Wrap func(net.Conn) net.Conn
	// Location for messages.
	Location string
	// Env looks up environment variables. Nil: os.LookupEnv.
	Env func(string) (string, bool)
}

// Backend is a directory on a server. Its methods are safe for concurrent use, also by several processes.
type Backend struct {
	o Options

	mu sync.Mutex
	s  *session // guarded by mu; nil: not connected
}

var _ backend.Backend = (*Backend)(nil)

// New returns the backend. The first operation connects.
func New(o Options) *Backend {
	if o.Connect <= 0 {
		o.Connect = 30 * time.Second
	}
	if o.Idle <= 0 {
		o.Idle = 3 * time.Minute
	}
	if o.Env == nil {
		o.Env = os.LookupEnv
	}
	return &Backend{o: o}
}

// Location returns the address.
func (b *Backend) Location() string { return b.o.Location }

// Close ends the connection.
func (b *Backend) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.s != nil {
		b.s.close()
		b.s = nil
	}
	return nil
}

// patience is how long an operation may go on after its context has ended. Then its connection is cut.
const patience = 3 * time.Second

// do runs fn with a session, connecting if need be.
func (b *Backend) do(ctx context.Context, op string, h backend.Handle, fn func(c *sftp.Client) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s %v: %w", op, h, err)
	}
	s, err := b.session(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%s %v: %w", op, h, ctx.Err())
		}
		return err
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(patience):
			s.kill()
		case <-done:
		}
	})
	err = fn(s.client)
	close(done)
	stop()
	return b.explain(ctx, s, op, h, err)
}

// explain adds the backend's own error classes.
func (b *Backend) explain(ctx context.Context, s *session, op string, h backend.Handle, err error) error {
	var pe *backend.PermanentError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &pe), errors.Is(err, backend.ErrExist), errors.Is(err, backend.ErrNotExist):
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("%s %v: %w", op, h, ctx.Err())
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s %v: %w", op, h, backend.ErrNotExist)
	case errors.Is(err, fs.ErrPermission):
		return &backend.PermanentError{Err: fmt.Errorf("%s %v at %s: %w", op, h, b.o.Location, err)}
	}
	if errors.Is(err, sftp.ErrSSHFxConnectionLost) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, net.ErrClosed) {
		s.lost.Store(true)
	}
	if s.dead() {
		err = s.explain(err)
	}
	return fmt.Errorf("%s %v at %s: %w", op, h, b.o.Location, err)
}

// session returns the present connection, or a new one.
func (b *Backend) session(ctx context.Context) (*session, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.s != nil && !b.s.dead() {
		return b.s, nil
	}
	if b.s != nil {
		b.s.close()
		b.s = nil
	}
	s, err := connect(ctx, b.o)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", b.o.Location, err)
	}
	b.s = s
	return s, nil
}

func (b *Backend) path(h backend.Handle) string {
	switch h.Type {
	case backend.ConfigFile:
		return path.Join(b.o.Path, "config")
	case backend.PackFile:
		return path.Join(b.o.Path, "data", h.Name[:2], h.Name)
	}
	return path.Join(b.o.Path, h.Type.Dir(), h.Name)
}

// mkdir makes a directory unless it is there.
func mkdir(c *sftp.Client, dir string) error {
	err := c.Mkdir(dir)
	if err != nil {
		if fi, serr := c.Stat(dir); serr == nil && fi.IsDir() {
			return nil
		}
		return err
	}
	return c.Chmod(dir, 0o700)
}

// Create makes the directories of the layout, and what is missing above them.
func (b *Backend) Create(ctx context.Context) error {
	return b.do(ctx, "create", backend.Handle{}, func(c *sftp.Client) error {
		fail := func(dir string, err error) error { return fmt.Errorf("make the directory %q: %w", dir, err) }
		if err := c.MkdirAll(b.o.Path); err != nil {
			return fail(b.o.Path, err)
		}
		for _, d := range []string{"index", "keys", "locks", "snapshots", "data"} {
			if err := mkdir(c, path.Join(b.o.Path, d)); err != nil {
				return fail(d, err)
			}
		}
		// Several at a time, as each takes the time of the way to the server and back.
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(16)
		for i := range 256 {
			g.Go(func() error {
				if gctx.Err() != nil {
					return gctx.Err()
				}
				d := fmt.Sprintf("data/%02x", i)
				if err := mkdir(c, path.Join(b.o.Path, d)); err != nil {
					return fail(d, err)
				}
				return nil
			})
		}
		return g.Wait()
	})
}

// writeStep is how much is written between two looks at the context, in bytes. It is sent in packets
// of 32 KiB, all of which may be on their way at once.
const writeStep = 1 << 20

// Save writes a temporary file beside the final place, syncs it and renames it. The rename of the
// protocol, unlike POSIX's, fails where the name exists.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if err := h.Check(); err != nil {
		return err
	}
	return b.do(ctx, "save", h, func(c *sftp.Client) (err error) {
		final := b.path(h)
		exists := fmt.Errorf("save %v: %w", h, backend.ErrExist)
		if _, err := c.Lstat(final); err == nil {
			return exists
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		tmp := fmt.Sprintf("%s-restic-temp-%016x", final, rand.Uint64())
		flags := os.O_WRONLY | os.O_CREATE | os.O_EXCL
		f, err := c.OpenFile(tmp, flags)
		if dir := path.Dir(final); errors.Is(err, fs.ErrNotExist) && dir != path.Clean(b.o.Path) {
			// Parents are never made: where the root is gone (not mounted), nothing may be written elsewhere.
			if err := mkdir(c, dir); err != nil {
				return err
			}
			f, err = c.OpenFile(tmp, flags)
		}
		if err != nil {
			return err
		}
		defer func() {
			if err != nil {
				f.Close()
				_ = c.Remove(tmp)
				err = noSpace(c, b.o.Path, int64(len(data)), err)
			}
		}()
		for rest := data; len(rest) > 0; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(len(rest), writeStep)
			if _, err := f.Write(rest[:n]); err != nil {
				return err
			}
			rest = rest[n:]
		}
		if _, ok := c.HasExtension("fsync@openssh.com"); ok {
			if err := f.Sync(); err != nil {
				return err
			}
		}
		_ = f.Chmod(0o400) // guards against accidents only
		if err := f.Close(); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.Rename(tmp, final); err != nil {
			if _, serr := c.Lstat(final); serr == nil {
				return exists
			}
			return err
		}
		return nil
	})
}

// noSpace tells a full disk, for which the protocol has no error of its own.
func noSpace(c *sftp.Client, dir string, need int64, err error) error {
	var se *sftp.StatusError
	if !errors.As(err, &se) || se.FxCode() != sftp.ErrSSHFxFailure {
		return err
	}
	if v, verr := c.StatVFS(dir); verr == nil && int64(v.Frsize*v.Bavail) < need {
		return &backend.PermanentError{Err: fmt.Errorf("no space left on the server: %d bytes are needed, %d are free", need, v.Frsize*v.Bavail)}
	}
	return err
}

// Load reads from an open file. A length beyond the end is an error before fn is called.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	if err := h.Check(); err != nil {
		return err
	}
	if length < 0 || offset < 0 {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: bad range %d+%d", h, offset, length)}
	}
	return b.do(ctx, "load", h, func(c *sftp.Client) error {
		f, err := c.Open(b.path(h))
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		n := int64(length)
		if n == 0 {
			n = max(fi.Size()-offset, 0)
		}
		if offset+n > fi.Size() {
			return &backend.PermanentError{Err: fmt.Errorf("load %v: %d bytes from %d wanted, the file has %d: %w", h, n, offset, fi.Size(), io.ErrUnexpectedEOF)}
		}
		// A large read is sent as many requests at once.
		r := io.Reader(&reader{ctx, io.NewSectionReader(f, offset, n), n})
		return fn(bufio.NewReaderSize(r, int(min(max(n, 16), 2<<20))))
	})
}

// reader reports the end of the context, and a file that shrank while it was read.
type reader struct {
	ctx  context.Context
	r    io.Reader
	left int64
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(p)
	r.left -= int64(n)
	if err == io.EOF && r.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Stat tells the size of a regular file.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (out backend.FileInfo, err error) {
	if err := h.Check(); err != nil {
		return out, err
	}
	err = b.do(ctx, "stat", h, func(c *sftp.Client) error {
		fi, err := c.Stat(b.path(h))
		if err != nil {
			return err
		}
		if !fi.Mode().IsRegular() {
			return &backend.PermanentError{Err: fmt.Errorf("stat %v: not a regular file", h)}
		}
		out = backend.FileInfo{Name: h.Name, Size: fi.Size()}
		return nil
	})
	return out, err
}

// List passes over everything that is not a regular file with a proper name, and packs that lie in
// a directory where Load would not look.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	h := backend.Handle{Type: t}
	if t == backend.ConfigFile {
		fi, err := b.Stat(ctx, h)
		if errors.Is(err, backend.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return fn(fi)
	}
	if t.Dir() == "" {
		return &backend.PermanentError{Err: fmt.Errorf("list: unknown file type %d", t)}
	}
	var mu sync.Mutex
	var own error // of fn
	err := b.do(ctx, "list", h, func(c *sftp.Client) error {
		one := func(dir, prefix string) error {
			entries, err := c.ReadDirContext(ctx, path.Join(b.o.Path, dir))
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			for _, fi := range entries {
				if own != nil {
					return own
				}
				if !backend.IsName(fi.Name()) || fi.Name()[:len(prefix)] != prefix || !fi.Mode().IsRegular() {
					continue
				}
				if own = fn(backend.FileInfo{Name: fi.Name(), Size: fi.Size()}); own != nil {
					return own
				}
			}
			return nil
		}
		if t != backend.PackFile {
			return one(t.Dir(), "")
		}
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(8)
		for i := range 256 {
			g.Go(func() error {
				if gctx.Err() != nil {
					return gctx.Err()
				}
				p := fmt.Sprintf("%02x", i)
				return one("data/"+p, p)
			})
		}
		return g.Wait()
	})
	if own != nil {
		return own
	}
	return err
}

// Remove deletes a file.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	if err := h.Check(); err != nil {
		return err
	}
	return b.do(ctx, "remove", h, func(c *sftp.Client) error { return c.Remove(b.path(h)) })
}
