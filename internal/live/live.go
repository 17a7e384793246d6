// Package live puts files and folders back into a running instance through its own API.
//
// Run is the whole of it: it walks a Source and makes the server have what the Source has. What is
// there already with the same content is left alone, so a run that was interrupted goes on where it
// was, and a second run changes nothing. What cannot be put back is a Problem of the Result; only
// what makes going on useless is an error.
//
// Through the API, ids, versions, deletion times and the times of folders cannot be put back: items
// get new ids, and what is replaced becomes a version.
package live

import (
	"cmp"
	"context"
	"crypto/sha1" // what the server compares contents by
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/cloud"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Item is one file or folder to put back.
type Item struct {
	Name    string
	Folder  bool
	Size    int64 // bytes
	ModTime time.Time
	SHA1    string // hex, as the server recorded it; "" if it did not
	Ref     any    // the Source's own
	// Odd is why the API can have no such thing, as for a symlink; "" for files and folders.
	Odd string
}

// Details are what an item has beside its content.
type Details struct {
	Tags   []string
	Grants []ocis.Grant
	Links  []Link
}

// Link is a public link. Its address and its password cannot be put back.
type Link struct {
	Name     string
	Type     string // as cloud.Link has it; "" is one that the API does not know
	Password bool   // it had one
	Quick    bool
	Expires  time.Time // zero is never
}

// Source is what is put back. Its methods are called from several goroutines.
type Source interface {
	// List returns what is in a folder.
	List(ctx context.Context, it Item) ([]Item, error)
	// Open reads a file from an offset on.
	Open(ctx context.Context, it Item, offset int64) (io.ReadCloser, error)
	// Details returns tags, grants and links. What it returns with an error counts.
	Details(ctx context.Context, it Item) (Details, error)
	// Principal is the name of the user or group of an id; "" if it is not known.
	Principal(id string, group bool) string
}

// Existing says what is done where a file is already and has another content.
type Existing string

// What can be done with it.
const (
	Replace Existing = "version" // replaced; what was there becomes a version
	Keep    Existing = "keep"    // both stay: the one from the snapshot gets another name
	Skip    Existing = "skip"    // the one from the snapshot is left out
)

// Options say what goes where.
type Options struct {
	Client *cloud.Client
	Source Source
	Item   Item
	// Drive is the id of the space, and Path the place of Item in it: of a folder what its content
	// goes into. Folders above are made.
	Drive    string
	Path     string
	Existing Existing // zero is Replace
	// Suffix is put after the name of a file that Keep writes, before its ending.
	Suffix string
	// Tags has tags set, Shares grants and public links. Members has the grants of Item itself set as
	// members of the space.
	Tags, Shares, Members bool
	// Map gives principals other names or ids in the instance: by id or name in the snapshot.
	Map map[string]string
	// Large is the size in bytes from which uploads can go on after a break; zero is 16 MiB.
	Large int64
	// Chunk is the size of one request of those; zero is 64 MiB or what the server takes.
	Chunk int64
	// Sessions is a directory that remembers unfinished uploads; "" remembers none.
	Sessions string
	// Workers upload at the same time; zero is 4.
	Workers int
	// Patience is how long the server may work on an upload before that is a problem; zero is 5 min.
	Patience time.Duration
	DryRun   bool
	Progress progress.Sink
}

// Result tells what became of it. In a dry run it tells what would.
type Result struct {
	Folders   int64 `json:"folders"`   // made
	Files     int64 `json:"files"`     // uploaded
	Bytes     int64 `json:"bytes"`     // uploaded
	Replaced  int64 `json:"replaced"`  // of the files: had another content before
	Renamed   int64 `json:"renamed"`   // of the files: put beside what was there
	Unchanged int64 `json:"unchanged"` // were there already
	Skipped   int64 `json:"skipped"`   // left out because something else was there
	Tagged    int64 `json:"tagged"`    // items that got tags
	Shared    int64 `json:"shared"`    // grants that were set
	Links     int64 `json:"links"`     // public links that were made
	// Problems lists what could not be put back, the first MaxProblems of ProblemCount.
	Problems     []Problem `json:"problems"`
	ProblemCount int64     `json:"problem_count"`
}

// Problem is one thing that could not be put back.
type Problem struct {
	Path string `json:"path"` // in the space
	// Kind is file, folder, tags, share, member or link.
	Kind   string `json:"kind"`
	Reason string `json:"reason"`
}

// MaxProblems bounds the list of problems.
const MaxProblems = 10000

const (
	defaultLarge    = 16 << 20
	defaultPatience = 5 * time.Minute
	defaultWorkers  = 4
	// maxDepth is more than paths of 4,096 bytes can reach: a longer chain was made to do harm.
	maxDepth = 2048
)

type run struct {
	o      Options
	c      *cloud.Client
	mu     sync.Mutex
	res    Result
	people *people
	last   time.Time // of the last progress
}

// Run puts Item back. The Result counts also with an error.
//
// Errors: of the Source; those of the server after which nothing else can succeed: ErrUnauthorized,
// ErrQuota, no connection.
func Run(ctx context.Context, o Options) (*Result, error) {
	o.Existing = cmp.Or(o.Existing, Replace)
	o.Large = cmp.Or(o.Large, defaultLarge)
	o.Workers = cmp.Or(o.Workers, defaultWorkers)
	o.Patience = cmp.Or(o.Patience, defaultPatience)
	r := &run{o: o, c: o.Client}
	r.res.Problems = []Problem{}
	r.people = newPeople(o.Client, o.Source, o.Map)
	if o.Chunk == 0 {
		// A server that does not tell has no limit that matters.
		if n, err := o.Client.MaxChunk(ctx); err == nil && n > 0 {
			r.o.Chunk = n
		} else if ctx.Err() != nil {
			return &r.res, context.Cause(ctx)
		}
	}
	if o.Sessions != "" && !o.DryRun {
		if err := pruneSessions(o.Sessions); err != nil {
			return &r.res, err
		}
	}
	o.Progress.Emit(progress.Event{Kind: progress.Start, Phase: "restore"})
	err := r.top(ctx)
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	o.Progress.Emit(progress.Event{Kind: progress.Finish, Phase: "restore", Done: r.res.Files + r.res.Unchanged + r.res.Skipped, Unit: "files", Bytes: r.res.Bytes})
	return &r.res, err
}

func (r *run) top(ctx context.Context) error {
	p := strings.Trim(r.o.Path, "/")
	if p == "" && !r.o.Item.Folder {
		return errors.New("a file needs a name at its destination")
	}
	above := p
	if !r.o.Item.Folder {
		above = strings.TrimPrefix(path.Dir("/"+p), "/")
	}
	isNew, err := r.makeAll(ctx, above)
	if err != nil {
		return err
	}
	if r.o.Item.Folder {
		return r.folder(ctx, r.o.Item, p, isNew, 0)
	}
	it := r.o.Item
	it.Name = path.Base(p)
	_, err = r.files(ctx, []Item{it}, nil, above, isNew)
	return err
}

// makeAll makes a folder and those above it. isNew is true if it did not exist.
func (r *run) makeAll(ctx context.Context, p string) (isNew bool, err error) {
	at := ""
	for _, name := range strings.FieldsFunc(p, func(c rune) bool { return c == '/' }) {
		at = join(at, name)
		e, err := r.c.Stat(ctx, r.o.Drive, at)
		switch {
		case err == nil && !e.Folder:
			return false, fmt.Errorf("%q is a file in the instance, and a folder is needed there", at)
		case errors.Is(err, cloud.ErrNotFound):
			isNew = true
			if !r.o.DryRun {
				if err := r.c.Mkcol(ctx, r.o.Drive, at); err != nil && !errors.Is(err, cloud.ErrExists) {
					return false, err
				}
			}
			r.count(func(x *Result) { x.Folders++ })
		case err != nil:
			return false, err
		}
	}
	if p == "" { // the space itself must be there
		_, err = r.c.Stat(ctx, r.o.Drive, "")
	}
	return isNew, err
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

func (r *run) count(f func(*Result)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.res)
}

func (r *run) problem(p, kind string, err error) {
	r.count(func(x *Result) {
		x.ProblemCount++
		if len(x.Problems) < MaxProblems {
			x.Problems = append(x.Problems, Problem{p, kind, reason(err)})
		}
	})
	r.o.Progress.Emit(progress.Event{Kind: progress.Verbose, Phase: "restore", Item: p, Message: kind + " not put back: " + reason(err)})
}

// reason says it in the words of a report.
func reason(err error) string {
	var se *cloud.StatusError
	if !errors.As(err, &se) {
		return err.Error()
	}
	for _, w := range []struct {
		is   error
		says string
	}{
		{cloud.ErrLocked, "somebody has it locked; run this again later"},
		{cloud.ErrForbidden, "the user may not do this there"},
		{cloud.ErrChecksum, "what arrived is not what was sent, or an older version of the same time is in the way"},
		{cloud.ErrNoParent, "a file or folder of another kind is in the way, or the folder above is gone"},
	} {
		if errors.Is(err, w.is) {
			return w.says + " (" + err.Error() + ")"
		}
	}
	return err.Error()
}

// fatal tells errors after which nothing else can succeed.
func fatal(ctx context.Context, err error) bool {
	var se *cloud.StatusError
	switch {
	case ctx.Err() != nil, errors.Is(err, cloud.ErrUnauthorized), errors.Is(err, cloud.ErrQuota), errors.As(err, new(*sourceError)):
		return true
	case errors.Is(err, cloud.ErrName), errors.Is(err, cloud.ErrProcessing), errors.Is(err, errMismatch):
		return false
	}
	// Whatever is no answer of the server is a lost connection, after all retries.
	return !errors.As(err, &se)
}

// sourceError is a failure to read the snapshot.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

// errMismatch is returned when the server has another content than was sent.
var errMismatch = errors.New("the server has another content than was sent")

// folder puts back what is in a folder, which exists.
func (r *run) folder(ctx context.Context, it Item, p string, isNew bool, depth int) error {
	if depth > maxDepth {
		r.problem(p, "folder", errors.New("too many folders in one another"))
		return nil
	}
	list, err := r.o.Source.List(ctx, it)
	if err != nil {
		return err
	}
	var files, dirs []Item
	for _, c := range list {
		if err := cloud.CheckName(c.Name); err != nil {
			r.problem(join(p, c.Name), kindOf(c), err)
			continue
		}
		if c.Odd != "" {
			r.problem(join(p, c.Name), "file", errors.New(c.Odd))
			continue
		}
		if c.Folder {
			dirs = append(dirs, c)
		} else {
			files = append(files, c)
		}
	}
	if depth == 0 {
		if err := r.extras(ctx, it, p, "", r.o.Members); err != nil {
			return err
		}
	}
	have, err := r.files(ctx, files, dirs, p, isNew)
	if err != nil {
		return err
	}
	for _, d := range dirs {
		at := join(p, d.Name)
		e, exists := have[d.Name]
		if exists && !e.Folder {
			r.problem(at, "folder", errors.New("a file of that name is there"))
			continue
		}
		if !exists {
			if !r.o.DryRun {
				if err := r.c.Mkcol(ctx, r.o.Drive, at); err != nil && !errors.Is(err, cloud.ErrExists) {
					if fatal(ctx, err) {
						return err
					}
					r.problem(at, "folder", err)
					continue
				}
			}
			r.count(func(x *Result) { x.Folders++ })
		}
		if err := r.extras(ctx, d, at, e.ID, false); err != nil {
			return err
		}
		if err := r.folder(ctx, d, at, !exists, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func kindOf(it Item) string {
	if it.Folder {
		return "folder"
	}
	return "file"
}

// job is one file to upload.
type job struct {
	it      Item
	to      string // name
	was     *cloud.Entry
	renamed bool
	done    bool
}

// files puts back files of one folder, and returns what was in it of the names of files and dirs.
func (r *run) files(ctx context.Context, files, dirs []Item, p string, isNew bool) (map[string]cloud.Entry, error) {
	have := map[string]cloud.Entry{}
	if !isNew && len(files)+len(dirs) > 0 {
		// Only names that matter are kept: a folder may hold 100,000 others.
		wanted := map[string]bool{}
		for _, it := range append(slices.Clone(files), dirs...) {
			wanted[it.Name] = true
			wanted[r.suffixed(it.Name)] = true
		}
		err := r.c.List(ctx, r.o.Drive, p, func(e cloud.Entry) error {
			if wanted[e.Name] {
				have[e.Name] = e
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	var jobs []*job
	for _, it := range files {
		j, err := r.decide(ctx, it, p, have)
		if err != nil {
			return nil, err
		}
		if j != nil {
			jobs = append(jobs, j)
		}
	}
	if r.o.DryRun {
		for _, j := range jobs {
			r.uploaded(j)
		}
		return have, nil
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(r.o.Workers)
	for _, j := range jobs {
		g.Go(func() error {
			at := join(p, j.to)
			err := r.upload(gctx, j, at)
			switch {
			case err == nil:
				j.done = true
			case fatal(gctx, err):
				return err
			default:
				r.problem(at, "file", err)
			}
			return nil
		})
	}
	if err := cmp.Or(g.Wait(), context.Cause(ctx)); err != nil {
		return nil, err
	}
	return have, r.confirm(ctx, jobs, p)
}

// suffixed is the name that Keep gives to what has the name.
func (r *run) suffixed(name string) string {
	ext := path.Ext(name)
	if ext == name {
		ext = "" // .profile
	}
	return strings.TrimSuffix(name, ext) + r.o.Suffix + ext
}

// decide says what is to be done for a file; nil is nothing.
func (r *run) decide(ctx context.Context, it Item, p string, have map[string]cloud.Entry) (*job, error) {
	e, exists := have[it.Name]
	if !exists {
		return &job{it: it, to: it.Name}, nil
	}
	same, err := r.same(ctx, &it, e)
	if err != nil {
		return nil, err
	}
	if same {
		return nil, r.unchanged(ctx, it, join(p, it.Name), e)
	}
	switch {
	case r.o.Existing == Keep:
		to := r.suffixed(it.Name)
		e2, there := have[to]
		if !there {
			return &job{it: it, to: to, renamed: true}, nil
		}
		if same, err = r.same(ctx, &it, e2); err != nil {
			return nil, err
		}
		if same {
			return nil, r.unchanged(ctx, it, join(p, to), e2)
		}
		r.problem(join(p, it.Name), "file", fmt.Errorf("both this name and %q are taken by other contents", to))
		return nil, nil
	case e.Folder:
		r.problem(join(p, it.Name), "file", errors.New("a folder of that name is there"))
		return nil, nil
	case r.o.Existing == Skip:
		r.count(func(x *Result) { x.Skipped++ })
		return nil, nil
	}
	return &job{it: it, to: it.Name, was: &e}, nil
}

func (r *run) unchanged(ctx context.Context, it Item, at string, e cloud.Entry) error {
	r.count(func(x *Result) { x.Unchanged++ })
	r.tick(at)
	if it.Size >= r.o.Large && !r.o.DryRun {
		// A run may have ended between the last byte and this.
		openSession(r.o.Sessions, r.c.Host(), r.o.Drive, at, &cloud.File{Size: it.Size, ModTime: it.ModTime, SHA1: it.SHA1}).remove()
	}
	return r.extras(ctx, it, at, e.ID, false)
}

// same tells whether the server has the content of it. A file without a recorded checksum is read.
func (r *run) same(ctx context.Context, it *Item, e cloud.Entry) (bool, error) {
	if e.Folder || e.Size != it.Size {
		return false, nil
	}
	if it.Size == 0 {
		return true, nil
	}
	if err := r.sum(ctx, it); err != nil {
		return false, err
	}
	return e.SHA1 == it.SHA1, nil
}

// sum fills in the checksum of a file that the server never computed.
func (r *run) sum(ctx context.Context, it *Item) error {
	if it.SHA1 != "" || it.Size == 0 {
		return nil
	}
	src, err := r.o.Source.Open(ctx, *it, 0)
	if err != nil {
		return &sourceError{err}
	}
	defer src.Close()
	h := sha1.New()
	if _, err := io.Copy(h, src); err != nil {
		return &sourceError{err}
	}
	it.SHA1 = hex.EncodeToString(h.Sum(nil))
	return nil
}

func (r *run) upload(ctx context.Context, j *job, at string) error {
	if err := r.sum(ctx, &j.it); err != nil {
		return err
	}
	f := &cloud.File{
		Size: j.it.Size, ModTime: j.it.ModTime, SHA1: j.it.SHA1, OnlyNew: j.was == nil,
		Open: func(ctx context.Context, offset int64) (io.ReadCloser, error) {
			src, err := r.o.Source.Open(ctx, j.it, offset)
			if err != nil {
				return nil, &sourceError{err}
			}
			return sourceReader{src}, nil
		},
	}
	var err error
	var s session
	if j.it.Size < r.o.Large {
		err = r.c.Put(ctx, r.o.Drive, at, f)
	} else {
		s = openSession(r.o.Sessions, r.c.Host(), r.o.Drive, at, f)
		err = r.c.PutResumable(ctx, r.o.Drive, at, f, cloud.Resumable{Chunk: r.o.Chunk, Session: s.load(), Save: s.save, Moved: func(n int64) {
			r.o.Progress.Emit(progress.Event{Kind: progress.Verbose, Phase: "restore", Item: at, Message: fmt.Sprintf("%d of %d bytes are there", n, f.Size)})
		}})
	}
	if err != nil && ctx.Err() == nil && !errors.As(err, new(*sourceError)) {
		// The server may have taken all of it, and only its answer was lost.
		if e, serr := r.c.Stat(ctx, r.o.Drive, at); serr == nil && !e.Folder && e.Size == f.Size && e.SHA1 == f.SHA1 {
			err = nil
		}
	}
	if err == nil {
		s.remove()
	}
	return err
}

// sourceReader tells failures of the source from those of the network.
type sourceReader struct{ io.ReadCloser }

func (s sourceReader) Read(p []byte) (int, error) {
	n, err := s.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = &sourceError{err}
	}
	return n, err
}

func (r *run) uploaded(j *job) {
	r.count(func(x *Result) {
		x.Files++
		x.Bytes += j.it.Size
		if j.was != nil {
			x.Replaced++
		}
		if j.renamed {
			x.Renamed++
		}
	})
	r.tick(j.to)
}

// tick reports progress, a few times a second at most.
func (r *run) tick(item string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); now.Sub(r.last) > 100*time.Millisecond {
		r.last = now
		r.o.Progress.Emit(progress.Event{
			Kind: progress.Update, Phase: "restore", Item: item, Done: r.res.Files + r.res.Unchanged + r.res.Skipped, Unit: "files", Bytes: r.res.Bytes,
		})
	}
}

// confirm looks at what the server made of the uploads, and waits until it is done with them.
func (r *run) confirm(ctx context.Context, jobs []*job, p string) error {
	open := map[string]*job{}
	for _, j := range jobs {
		if j.done {
			open[j.to] = j
		}
	}
	until := time.Now().Add(r.o.Patience)
	for wait := 50 * time.Millisecond; len(open) > 0; wait = min(2*wait, 5*time.Second) {
		found := map[string]cloud.Entry{}
		err := r.c.List(ctx, r.o.Drive, p, func(e cloud.Entry) error {
			if open[e.Name] != nil && !e.Processing {
				found[e.Name] = e
			} else if open[e.Name] != nil {
				found[e.Name] = cloud.Entry{Processing: true}
			}
			return nil
		})
		if err != nil {
			return err
		}
		late := !time.Now().Before(until)
		for name, j := range open {
			e, there := found[name]
			switch {
			case e.Processing && !late:
				continue
			case e.Processing:
				r.problem(join(p, name), "file", fmt.Errorf("it was sent, and the server still works on it after %v", r.o.Patience))
			case !there:
				r.problem(join(p, name), "file", errors.New("it was sent, and the server does not have it: refused by a virus scanner or a policy, or deleted meanwhile"))
			case e.Size != j.it.Size || j.it.Size > 0 && e.SHA1 != j.it.SHA1:
				r.problem(join(p, name), "file", fmt.Errorf("%w: %d bytes, SHA-1 %s instead of %d bytes, %s", errMismatch, e.Size, e.SHA1, j.it.Size, j.it.SHA1))
			default:
				r.uploaded(j)
				if err := r.extras(ctx, j.it, join(p, name), e.ID, false); err != nil {
					return err
				}
			}
			delete(open, name)
		}
		if len(open) > 0 {
			t := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				t.Stop()
				return context.Cause(ctx)
			case <-t.C:
			}
		}
	}
	return nil
}
