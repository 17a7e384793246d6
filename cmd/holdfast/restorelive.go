package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/cloud"
	"github.com/holdfast-backup/holdfast/internal/live"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/settings"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/statedir"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// liveFlags are the flags of a restore into the running instance.
type liveFlags struct {
	live                     bool
	url, user, tokenFile, as string
	ca                       string
	insecure, plainHTTP      bool
	into, intoSpace          string
	existing                 string
	shares, noTags           bool
	mapUser                  []string
	rate                     int // KiB/s
}

// liveNames are the flags that mean nothing without --live.
var liveNames = []string{
	"url", "user", "token-file", "as", "server-cacert", "server-insecure", "server-plain-http", "into", "into-space", "existing",
	"shares", "no-tags", "map-user", "rate-limit",
}

func (f *liveFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.BoolVar(&f.live, "live", false, "put SPACE/PATH back into the running instance, through its API")
	fs.StringVar(&f.url, "url", "", "with --live: `address` of the instance (default: the one in the snapshot)")
	fs.StringVar(&f.user, "user", "", "with --live: `name` to log in with; without it the token is a bearer token")
	fs.StringVar(&f.tokenFile, "token-file", "", "with --live: `file` with the app token, the password or the bearer token")
	fs.StringVar(&f.as, "as", "", "with --live: act as this `user`, or as the \"owner\" of the space; needs an administrator and impersonation")
	fs.StringVar(&f.ca, "server-cacert", "", "with --live: `file` with certificates (PEM) that the instance is checked against too")
	fs.BoolVar(&f.insecure, "server-insecure", false, "with --live: accept every certificate of the instance")
	fs.BoolVar(&f.plainHTTP, "server-plain-http", false, "with --live: send the token to another machine without TLS")
	fs.StringVar(&f.into, "into", "", "with --live: put it into this `folder` of the space instead of where it was")
	fs.StringVar(&f.intoSpace, "into-space", "", "with --live: put it into the project space of this `name`, made if need be")
	fs.StringVar(&f.existing, "existing", string(live.Replace), "with --live: a file that is there and differs gets a new `version`; or keep (both stay),\nor skip (left alone)")
	fs.BoolVar(&f.shares, "shares", false, "with --live: set members, shares and public links again where the users and groups still exist")
	fs.BoolVar(&f.noTags, "no-tags", false, "with --live: do not set tags")
	fs.StringArrayVar(&f.mapUser, "map-user", nil, "with --live: the user or group OLD of the snapshot is NEW now, by name or id: `OLD=NEW`; may be repeated")
	fs.IntVar(&f.rate, "rate-limit", 0, "with --live: upper limit of uploads to the instance in `KiB/s`")
}

// onlyLive refuses flags that mean nothing without --live; in the settings file they may stand.
func (a *app) onlyLive() error {
	for _, n := range liveNames {
		if a.set[n].Layer == settings.Flag {
			return usageError("--%s is only for a restore with --live", n)
		}
	}
	return nil
}

// liveHelp is the part of restore's help on it.
const liveHelp = `With --live, SPACE/PATH goes back into the running instance through its API, as --user
with the secret in --token-file. Files keep their times, and the server compares
checksums. What has the same content already is not sent again, so a restore that was
interrupted goes on when it is run again. What cannot be put back is listed at the end.
With --shares members, shares and public links are set again; links get new addresses,
and those that had a password one that nobody knows. Items get new ids; older versions
and the trash are not put back.
`

func (a *app) restoreLive(ctx context.Context, arg string, to toFlags, f *liveFlags, dryRun, noLock bool) error {
	if !isSpaceAddress(arg) {
		return ui.WithHints(usageError("--live puts back spaces, folders and files, and %s names none", ui.Quote(arg)),
			"Such an address is SNAPSHOT:SPACE/PATH, e.g. 'latest:personal/alan/Round 0'.")
	}
	if to.to != "" || to.keep {
		return usageError("--to and --keep-existing are for a restore to this machine, not for one with --live")
	}
	switch live.Existing(f.existing) {
	case live.Replace, live.Keep, live.Skip:
	default:
		return usageError("--existing is version, keep or skip, not %q", f.existing)
	}
	names := map[string]string{}
	for _, m := range f.mapUser {
		from, to, ok := strings.Cut(m, "=")
		if !ok || from == "" || to == "" {
			return usageError("--map-user is OLD=NEW, not %q", m)
		}
		names[from] = to
	}
	if f.rate < 0 {
		return usageError("--rate-limit must not be negative")
	}
	if f.tokenFile == "" {
		return ui.WithHints(usageError("--live needs --token-file"),
			tokenHint)
	}
	return a.withRepository(ctx, repoOptions{}, readLock(noLock), func(ctx context.Context, r *repo.Repository) error {
		p, err := a.pick(ctx, r, arg, to.pick)
		if err != nil {
			return err
		}
		if err := r.Settled(ctx); err != nil {
			return err
		}
		start := time.Now()
		rep, err := a.putBack(ctx, p, f, names, dryRun)
		if rep != nil {
			rep.Seconds = time.Since(start).Seconds()
			a.showLive(rep)
		}
		if err != nil {
			return fmt.Errorf("restore of %s: %w", ui.Quote(arg), explainLive(err))
		}
		if n := rep.ProblemCount; n > 0 {
			return ui.WithHints(fmt.Errorf("%s could not be put back", ui.Count(n, "thing")),
				"The list says why. What is there already is not sent again when you run this once more.")
		}
		return nil
	})
}

// liveReport is the final object of a restore into the running instance.
type liveReport struct {
	Event    string `json:"event"`
	Verb     string `json:"verb"`
	Live     bool   `json:"live"`
	DryRun   bool   `json:"dry_run"`
	Snapshot string `json:"snapshot"`
	Source   string `json:"source"` // SPACE/PATH in the snapshot
	Space    string `json:"space"`  // name in the instance
	Drive    string `json:"drive"`  // id in the instance
	Path     string `json:"path"`   // in that space
	NewSpace bool   `json:"new_space"`
	*live.Result
	Seconds float64 `json:"seconds"`
}

// putBack does the work: log in, find the place, restore.
func (a *app) putBack(ctx context.Context, p *picked, f *liveFlags, names map[string]string, dryRun bool) (*liveReport, error) {
	who, err := p.view.Identities(ctx)
	if err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	sp := p.item.Space
	space := live.Space{ID: sp.ID, Name: sp.Name, Alias: sp.Alias, Kind: sp.Kind, OwnerID: sp.OwnerID, OwnerLogin: who.User(sp.OwnerID).Login}
	c, err := a.cloudClient(p.view.Manifest().URL, f)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if f.as != "" {
		user, done, err := a.impersonate(ctx, c, f.as, space, names)
		if err != nil {
			return nil, err
		}
		defer done()
		c = user
	}
	where := p.item.Path
	if p.item.Kind == browse.Trashed {
		// Back to where it was, without the time of deletion.
		if where, err = p.view.Origin(ctx, p.item); err != nil {
			return nil, err
		}
	}
	if f.into != "" {
		where = strings.Trim(f.into, "/")
		if !p.item.IsDir() {
			where = path.Join(where, p.item.Name())
		}
	}
	rep := &liveReport{
		Event: "summary", Verb: "restore", Live: true, DryRun: dryRun, Snapshot: p.sn.ID().String(),
		Source: strings.TrimSuffix(sp.Alias+"/"+p.item.Path, "/"), Path: where, Result: &live.Result{Problems: []live.Problem{}},
	}
	var d cloud.Drive
	if f.intoSpace == "" {
		d, err = live.FindDrive(ctx, c, space, names)
	} else if d, rep.NewSpace, err = a.newDrive(ctx, c, f.intoSpace, p.sn, dryRun); err == nil && d.ID == "" {
		rep.Space = f.intoSpace
		return rep, nil // a dry run has nothing to compare with
	}
	if err != nil {
		return nil, err
	}
	rep.Space, rep.Drive = d.Name, d.ID
	root := p.item.Path == "" && p.item.Kind == browse.Current
	sessions, err := statedir.Path(a.opt.stateDir, "uploads")
	if err != nil {
		return nil, err
	}
	src := &liveSource{view: p.view, who: who}
	if f.shares {
		if src.links, err = linksOf(ctx, p.view, sp); err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			a.ui.Warn("the public links are not put back: %v", err)
		}
	}
	o := live.Options{
		Client: c, Source: src, Item: liveItem(p.item), Drive: d.ID, Path: where, Existing: live.Existing(f.existing),
		Suffix: p.sn.Time.UTC().Format(" (2006-01-02 1504)"), Tags: !f.noTags, Shares: f.shares,
		// Only of a project space are the grants of the root its members.
		Members: f.shares && root && where == "" && sp.Kind == cloud.Project,
		Map:     names, Sessions: sessions, DryRun: dryRun, Progress: a.ui.Sink(),
	}
	rep.Result, err = live.Run(ctx, o)
	return rep, err
}

// newDrive finds or makes the project space. In a dry run it makes none, and returns the zero Drive.
func (a *app) newDrive(ctx context.Context, c *cloud.Client, name string, sn *snapshot.Snapshot, dryRun bool) (cloud.Drive, bool, error) {
	if dryRun {
		list, err := c.MyDrives(ctx)
		if err != nil {
			return cloud.Drive{}, false, err
		}
		for _, d := range list {
			if d.Type == cloud.Project && d.Name == name {
				return d, false, nil
			}
		}
		return cloud.Drive{}, true, nil
	}
	return live.NewDrive(ctx, c, name, "Restored from the backup of "+sn.Time.UTC().Format(time.DateTime)+" UTC")
}

// cloudClient makes the client that the flags describe. url is used if --url is not set.
func (a *app) cloudClient(url string, f *liveFlags) (*cloud.Client, error) {
	if f.url != "" {
		url = f.url
	}
	if url == "" {
		return nil, ui.WithHints(usageError("the snapshot does not tell where the instance is reached"), "Set --url, e.g. --url https://cloud.example.org.")
	}
	var ca []byte
	if f.ca != "" {
		var err error
		if ca, err = os.ReadFile(f.ca); err != nil {
			return nil, ui.WithHints(fmt.Errorf("cannot read the certificates: %w", err), "--server-cacert names a file with the certificate, in PEM form, of who signed the server's.")
		}
	}
	return cloud.New(cloud.Options{
		URL: url, User: f.user, Secret: func() (string, error) { return a.tokenFrom(f.tokenFile) }, CA: ca, Insecure: f.insecure,
		PlainHTTP: f.plainHTTP, Rate: int64(f.rate) << 10, Agent: "holdfast/" + version,
		Retry: func(err error) { a.ui.Info("trying again: %v", err) },
	})
}

const tokenHint = "It holds an app token of the user (the server's own settings page makes one), or a password, or a bearer token."

// tokenFrom reads a file with a token; the white space around it is not part of it.
func (a *app) tokenFrom(file string) (string, error) {
	fh, err := os.Open(file)
	if err != nil {
		return "", ui.WithHints(fmt.Errorf("cannot read the token file: %w", err), "Is --token-file right? "+tokenHint)
	}
	defer fh.Close()
	if st, err := fh.Stat(); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o004 != 0 {
		a.ui.Warn("every user of this machine can read the token file %s; `chmod 600` it", ui.Quote(file))
	}
	p, err := io.ReadAll(&limited{fh, maxPassword})
	if err != nil {
		return "", ui.WithHints(fmt.Errorf("cannot read the token file: %w", err), "Is --token-file right? "+tokenHint)
	}
	s := strings.TrimSpace(decode(p))
	if s == "" {
		return "", ui.WithHints(fmt.Errorf("the token file %s is empty", ui.Quote(file)), tokenHint)
	}
	return s, nil
}

// tokenLife is how long a token for another user lives, should this program die before it deletes it.
const tokenLife = 24 * time.Hour

// impersonate makes an administrator's client one of another user. done takes the right away again.
func (a *app) impersonate(ctx context.Context, c *cloud.Client, who string, s live.Space, names map[string]string) (user *cloud.Client, done func(), err error) {
	if who == "owner" {
		if s.Kind != cloud.Personal {
			return nil, nil, usageError("--as owner: the space %s has no owner; name a user who manages it", ui.Quote(s.Alias))
		}
		who = s.OwnerID
		for _, key := range []string{s.OwnerLogin, s.OwnerID} {
			if to, ok := names[key]; ok && key != "" {
				who = to
			}
		}
	}
	u, err := c.User(ctx, who)
	if errors.Is(err, cloud.ErrNotFound) && who == s.OwnerID && s.OwnerLogin != "" {
		who = s.OwnerLogin
		u, err = c.User(ctx, who) // the same person can have a new id
	}
	if errors.Is(err, cloud.ErrNotFound) {
		return nil, nil, ui.WithHints(fmt.Errorf("--as %s: %w", ui.Quote(who), err), "--map-user OLD=NEW says by which name or id the instance knows that user now.",
			"For a user who is gone, leave out --as: --into-space NAME makes a project space for the files.")
	}
	if err != nil {
		return nil, nil, fmt.Errorf("--as %s: %w", ui.Quote(who), err)
	}
	token, err := c.CreateToken(ctx, u.ID, tokenLife)
	if err != nil {
		return nil, nil, ui.WithHints(fmt.Errorf("--as %s: %w", ui.Quote(who), err),
			"It needs an administrator, and AUTH_APP_ENABLE_IMPERSONATION=true at the server.")
	}
	user = c.As(u.Name, func() (string, error) { return token, nil })
	return user, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
		defer cancel()
		if err := user.DeleteToken(ctx, token); err != nil {
			a.ui.Warn("the token that was made to act as %s could not be deleted; it ends by itself within %v: %v", ui.Quote(u.Name), tokenLife, err)
		}
	}, nil
}

// explainLive adds the hints that name flags.
func explainLive(err error) error {
	switch {
	case errors.Is(err, cloud.ErrUnauthorized):
		return ui.WithHints(err, "Does --user belong to the token? Without --user the token is sent as a bearer token.",
			"App tokens need PROXY_ENABLE_APP_AUTH=true at the server, passwords PROXY_ENABLE_BASIC_AUTH=true.")
	case errors.Is(err, cloud.ErrPlainHTTP):
		return ui.WithHints(err, "Use https, or --server-plain-http if the network between is your own.")
	case errors.Is(err, cloud.ErrQuota):
		return ui.WithHints(err, "Raise the quota of the space, or make room, and run this again: what is there stays.")
	case strings.Contains(err.Error(), "x509: "):
		return ui.WithHints(err, "--server-cacert names a certificate to trust, such as the server's own proxy/server.crt.")
	}
	return err
}

// showLive prints what became of it.
func (a *app) showLive(rep *liveReport) {
	if a.ui.JSON() {
		a.ui.Object(rep)
		return
	}
	for _, p := range rep.Problems {
		a.ui.Warn("%s %s: %s", p.Kind, ui.Quote(p.Path), p.Reason)
	}
	if n := rep.ProblemCount - int64(len(rep.Problems)); n > 0 {
		a.ui.Warn("and %d more that could not be put back", n)
	}
	if a.ui.Quiet() {
		return
	}
	did := "put back"
	if rep.DryRun {
		did = "dry run, nothing changed; would put back"
	}
	a.ui.Text(fmt.Sprintf("%s %s into the space %s at %s in %s", did, ui.Quote(rep.Source), ui.Quote(rep.Space), ui.Quote("/"+rep.Path),
		ui.Duration(time.Duration(rep.Seconds*float64(time.Second)))))
	if rep.DryRun && rep.Drive == "" {
		a.ui.Text("the space would be new, so that all of it would be sent")
		return
	}
	rows := [][]string{{
		strconv.FormatInt(rep.Files, 10), strconv.FormatInt(rep.Replaced, 10), strconv.FormatInt(rep.Unchanged, 10), strconv.FormatInt(rep.Skipped, 10),
		ui.Bytes(rep.Bytes), strconv.FormatInt(rep.Folders, 10), strconv.FormatInt(rep.Tagged, 10), strconv.FormatInt(rep.Shared, 10), strconv.FormatInt(rep.Links, 10), strconv.FormatInt(rep.ProblemCount, 10),
	}}
	a.ui.Text(ui.Table([]string{">Files", ">New versions", ">Unchanged", ">Skipped", ">Size", ">New folders", ">Tagged", ">Shares", ">Links", ">Problems"}, rows)...)
	if rep.Links > 0 {
		a.ui.Text("the links have new addresses: the old ones lead nowhere, and whoever used them needs the new ones")
	}
}

// liveSource gives the items of a snapshot to package live.
type liveSource struct {
	view  *browse.View
	who   *browse.Identities
	links map[string][]live.Link // by node id
}

// linksOf are the public links of a space.
func linksOf(ctx context.Context, v *browse.View, s *browse.Space) (map[string][]live.Link, error) {
	list, err := v.Shares(ctx, s.ID)
	if err != nil {
		return nil, err
	}
	out := map[string][]live.Link{}
	for _, x := range list {
		if x.Link {
			out[x.NodeID] = append(out[x.NodeID], live.Link{Name: x.With, Type: x.LinkType, Password: x.Password, Quick: x.Quick, Expires: x.Expires})
		}
	}
	return out, nil
}

func liveItem(it *browse.Item) live.Item {
	out := live.Item{Name: it.Name(), Folder: it.IsDir(), Size: int64(it.Node.Size), ModTime: it.Node.ModTime, SHA1: it.SHA1(), Ref: it}
	if !it.IsDir() && it.Node.Type != snapshot.File {
		out.Odd = fmt.Sprintf("it is a %s", it.Node.Type)
	}
	return out
}

func (s *liveSource) List(ctx context.Context, it live.Item) ([]live.Item, error) {
	list, err := s.view.List(ctx, it.Ref.(*browse.Item))
	if err != nil {
		return nil, err
	}
	out := make([]live.Item, 0, len(list))
	for _, c := range list {
		out = append(out, liveItem(c))
	}
	return out, nil
}

func (s *liveSource) Open(ctx context.Context, it live.Item, offset int64) (io.ReadCloser, error) {
	c, err := s.view.Content(it.Ref.(*browse.Item))
	if err != nil {
		return nil, err
	}
	return io.NopCloser(c.Reader(ctx, offset)), nil
}

func (s *liveSource) Details(ctx context.Context, it live.Item) (live.Details, error) {
	b := it.Ref.(*browse.Item)
	m, attrs, err := s.view.Meta(ctx, b)
	var ae *ocis.AttributeError
	if errors.As(err, &ae) {
		err = fmt.Errorf("the server's record of it is damaged in part: %w", err)
	}
	d := live.Details{Grants: m.Grants}
	if b.Kind == browse.Current {
		d.Links = s.links[b.NodeID()]
	}
	for _, x := range attrs {
		if x.Key == b.Space.Prefix()+"md.tags" {
			for _, t := range strings.Split(string(x.Value), ",") {
				if t = strings.TrimSpace(t); t != "" {
					d.Tags = append(d.Tags, t)
				}
			}
		}
	}
	return d, err
}

func (s *liveSource) Principal(id string, group bool) string {
	if group {
		return s.who.Group(id)
	}
	if u := s.who.User(id); u.Login != "" {
		return u.Login
	}
	return id
}
