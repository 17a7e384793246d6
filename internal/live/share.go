package live

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/cloud"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// extras sets tags and grants of an item that the server has. id is its id there, "" if it must be
// asked for.
func (r *run) extras(ctx context.Context, it Item, at, id string, members bool) error {
	if !r.o.Tags && !r.o.Shares || r.o.DryRun {
		return nil
	}
	d, err := r.o.Source.Details(ctx, it)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		r.problem(at, "tags", err) // what could be read counts
	}
	// What the root of a space grants is membership, and only to the whole of a project space there can
	// be links.
	grants, links := d.Grants, d.Links
	if !r.o.Shares || at == "" && !members {
		grants, links = nil, nil
	}
	if !r.o.Tags {
		d.Tags = nil
	}
	if len(d.Tags)+len(grants)+len(links) == 0 {
		return nil
	}
	item := ""
	if at != "" || !members {
		e, err := r.c.Stat(ctx, r.o.Drive, at) // for the tags that are there, and the id
		if err != nil {
			if fatal(ctx, err) {
				return err
			}
			r.problem(at, "tags", err)
			return nil
		}
		item = e.ID
		if err := r.tag(ctx, at, e, d.Tags); err != nil {
			return err
		}
	}
	if len(grants)+len(links) == 0 {
		return nil
	}
	kind := "share"
	if members {
		kind = "member"
	}
	have, err := r.c.Permissions(ctx, r.o.Drive, item)
	if err != nil {
		if fatal(ctx, err) {
			return err
		}
		r.problem(at, kind, err)
		return nil
	}
	if err := r.grant(ctx, at, item, kind, it.Folder, members, grants, have); err != nil {
		return err
	}
	return r.link(ctx, at, item, links, have)
}

// link makes the public links that the snapshot knows and the instance does not.
func (r *run) link(ctx context.Context, at, item string, links []Link, have []cloud.Permission) error {
	for _, l := range links {
		if !l.Expires.IsZero() && l.Expires.Before(time.Now()) {
			continue
		}
		if slices.ContainsFunc(have, func(p cloud.Permission) bool { return p.Link != nil && p.Link.Type == l.Type && p.Link.Name == l.Name }) {
			continue
		}
		says := func(err error) error {
			if l.Name == "" {
				return fmt.Errorf("one without a name (%s): %w", l.Type, err)
			}
			return fmt.Errorf("%q (%s): %w", l.Name, l.Type, err)
		}
		if l.Type == "" {
			r.problem(at, "link", says(errors.New("it allows what no link of the API does")))
			continue
		}
		out := cloud.Link{Type: l.Type, Name: l.Name, Quick: l.Quick, Expires: l.Expires}
		if l.Password && l.Type != "internal" {
			// Never open to everybody what was not.
			var err error
			if out.Password, err = unknownPassword(); err != nil {
				return err
			}
		}
		_, err := r.c.CreateLink(ctx, r.o.Drive, item, out)
		switch {
		case err == nil:
			r.count(func(x *Result) { x.Links++ })
			if out.Password != "" {
				r.problem(at, "link", says(errLinkPassword))
			}
		case fatal(ctx, err):
			return err
		default:
			r.problem(at, "link", says(err))
		}
	}
	return nil
}

// errLinkPassword is reported of a link that was made with a password that nobody knows.
var errLinkPassword = errors.New("it had a password, of which the snapshot holds only a hash: the new link has one that nobody knows, so set another one there")

// unknownPassword makes a password that the rules of servers allow.
func unknownPassword() (string, error) {
	p := make([]byte, 18)
	if _, err := rand.Read(p); err != nil {
		return "", err
	}
	return base64.RawURLEncoding.EncodeToString(p) + "-aA1!", nil
}

func (r *run) tag(ctx context.Context, at string, e cloud.Entry, tags []string) error {
	var missing []string
	for _, t := range tags {
		if err := cloud.CheckTag(t); err != nil {
			r.problem(at, "tags", err)
			continue
		}
		// The server writes tags in lower case.
		if !slices.ContainsFunc(e.Tags, func(have string) bool { return strings.EqualFold(have, t) }) {
			missing = append(missing, t)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if err := r.c.AddTags(ctx, e.ID, missing); err != nil {
		if fatal(ctx, err) {
			return err
		}
		r.problem(at, "tags", err)
		return nil
	}
	r.count(func(x *Result) { x.Tagged++ })
	return nil
}

// grant gives the rights that the snapshot knows and the instance does not.
func (r *run) grant(ctx context.Context, at, item, kind string, folder, members bool, grants []ocis.Grant, have []cloud.Permission) error {
	for _, g := range grants {
		if !g.Expires.IsZero() && g.Expires.Before(time.Now()) {
			continue
		}
		to, err := r.people.find(ctx, g.Principal, g.Group)
		if err == nil {
			if slices.ContainsFunc(have, func(p cloud.Permission) bool {
				return !to.Group && p.GrantedToV2.User != nil && p.GrantedToV2.User.ID == to.ID ||
					to.Group && p.GrantedToV2.Group != nil && p.GrantedToV2.Group.ID == to.ID
			}) {
				continue // has rights there already, which are not ours to change
			}
			role, actions := "", actionsOf(g)
			if role, err = r.people.role(ctx, actions, members, folder, g.Deny); err == nil {
				err = r.c.Invite(ctx, r.o.Drive, item, to, role, actions, g.Expires)
			}
		}
		switch {
		case err == nil:
			r.count(func(x *Result) { x.Shared++ })
		case fatal(ctx, err) && !errors.Is(err, errNobody):
			return err
		default:
			r.problem(at, kind, fmt.Errorf("%s: %w", r.people.describe(g), err))
		}
	}
	return nil
}

// actions are the server's words for the letters of a grant.
var actions = []struct{ letters, action string }{
	{"t", "basic/read"},
	{"t", "path/read"},
	{"x", "children/read"},
	{"r", "content/read"},
	{"w", "upload/create"},
	{"wr", "path/update"}, // whoever may write and read may rename
	{"a", "children/create"},
	{"d", "standard/delete"},
	{"C", "permissions/create"},
	{"c", "permissions/read"},
	{"o", "permissions/update"},
	{"o", "permissions/delete"},
	{"O", "permissions/deny"},
	{"u", "deleted/read"},
	{"U", "deleted/update"},
	{"P", "deleted/delete"},
	{"v", "versions/read"},
	{"V", "versions/update"},
	{"q", "quota/read"},
}

func actionsOf(g ocis.Grant) []string {
	var out []string
	for _, a := range actions {
		if !strings.ContainsFunc(a.letters, func(c rune) bool { return !strings.ContainsRune(g.Permissions, c) }) {
			out = append(out, "libre.graph/driveItem/"+a.action)
		}
	}
	return out
}

// inOrder are rights in order, without the one to rename: the letters of a grant do not tell whether
// whoever may read and write may also rename.
func inOrder(actions []string) []string {
	out := slices.DeleteFunc(slices.Clone(actions), func(a string) bool { return a == "libre.graph/driveItem/path/update" })
	slices.Sort(out)
	return out
}

// roleDenied takes all rights away; the server lists it only where it is switched on.
const roleDenied = "63e64e19-8d43-42ec-a738-2b6af2610efa"

// errNobody is returned for somebody whom the instance does not have.
var errNobody = errors.New("is not in the instance")

// people finds the users, groups and roles of the instance.
type people struct {
	c      *cloud.Client
	src    Source
	byName map[string]string

	mu     sync.Mutex
	found  map[string]foundPrincipal
	groups []cloud.Group
	roles  []cloud.Role
	asked  bool
}

type foundPrincipal struct {
	to  cloud.Grantee
	err error
}

func newPeople(c *cloud.Client, src Source, m map[string]string) *people {
	return &people{c: c, src: src, byName: m, found: map[string]foundPrincipal{}}
}

func (p *people) describe(g ocis.Grant) string {
	what := "user"
	if g.Group {
		what = "group"
	}
	if name := p.src.Principal(g.Principal, g.Group); name != "" && name != g.Principal {
		return fmt.Sprintf("%s %q (%s)", what, name, g.Principal)
	}
	return fmt.Sprintf("%s %q", what, g.Principal)
}

// find tells who somebody of the snapshot is in the instance: by the map, by id, or by name.
//
// Errors: errNobody.
func (p *people) find(ctx context.Context, id string, group bool) (cloud.Grantee, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := fmt.Sprint(group, " ", id)
	if f, ok := p.found[key]; ok {
		return f.to, f.err
	}
	name := p.src.Principal(id, group)
	try := []string{id, name}
	if to, ok := p.byName[id]; ok {
		try = []string{to}
	} else if to, ok := p.byName[name]; ok && name != "" {
		try = []string{to}
	}
	for _, x := range try {
		if x == "" || cloud.CheckName(x) != nil {
			continue
		}
		got, err := p.ask(ctx, x, group)
		if err == nil {
			p.found[key] = foundPrincipal{cloud.Grantee{ID: got, Group: group}, nil}
			return p.found[key].to, nil
		}
		if !errors.Is(err, cloud.ErrNotFound) {
			return cloud.Grantee{}, err
		}
	}
	p.found[key] = foundPrincipal{err: errNobody}
	return cloud.Grantee{}, errNobody
}

func (p *people) ask(ctx context.Context, idOrName string, group bool) (string, error) {
	if !group {
		u, err := p.c.User(ctx, idOrName)
		if err == nil && u.ID == "" {
			err = cloud.ErrNotFound
		}
		return u.ID, err
	}
	if p.groups == nil {
		list, err := p.c.Groups(ctx)
		if err != nil {
			return "", err
		}
		p.groups = append([]cloud.Group{}, list...)
	}
	for _, g := range p.groups {
		if g.ID == idOrName || g.Name == idOrName {
			return g.ID, nil
		}
	}
	return "", cloud.ErrNotFound
}

// role finds the role that has just these rights; "" if there is none.
func (p *people) role(ctx context.Context, actions []string, root, folder, deny bool) (string, error) {
	if deny || len(actions) == 0 {
		return roleDenied, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.asked {
		roles, err := p.c.Roles(ctx)
		if err != nil {
			return "", err
		}
		p.roles, p.asked = roles, true
	}
	condition := "exists @Resource.File"
	switch {
	case root:
		condition = "exists @Resource.Root"
	case folder:
		condition = "exists @Resource.Folder"
	}
	want := inOrder(actions)
	for _, r := range p.roles {
		for _, x := range r.Permissions {
			if x.Condition == condition && slices.Equal(inOrder(x.Actions), want) {
				return r.ID, nil
			}
		}
	}
	return "", nil
}
