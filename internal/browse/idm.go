package browse

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"path"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// User is somebody of the built-in directory.
type User struct {
	ID    string
	Login string // alan; "" if it is not known
	Name  string // Alan Turing; the id if it is not known
	Mail  string
}

// Identities are the users and groups of the built-in directory as the snapshot has it. With a directory
// elsewhere there are none, and names are ids.
type Identities struct {
	// Known tells whether the snapshot holds a directory that could be read.
	Known  bool
	users  map[string]User
	groups map[string]string
}

// User finds a user by id. One that is not known has the id as its name.
func (p *Identities) User(id string) User {
	if u, ok := p.users[id]; ok {
		return u
	}
	return User{ID: id, Name: id}
}

// Group is the name of a group; the id if it is not known.
func (p *Identities) Group(id string) string {
	if n, ok := p.groups[id]; ok {
		return n
	}
	return id
}

// identityFiles are the names of the database in the two products.
var identityFiles = []string{"ocis.boltdb", "idm.boltdb"}

// maxIdentities bounds the directory, which is kept in memory: about 500 bytes each.
const maxIdentities = 1 << 20

// Identities reads the directory of the snapshot. A damaged one gives what could be read of it, with an
// error the first time.
func (v *View) Identities(ctx context.Context) (*Identities, error) {
	v.mu.Lock()
	p := v.people
	v.mu.Unlock()
	if p != nil {
		return p, nil
	}
	p, err := v.readIdentities(ctx)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	v.mu.Lock()
	v.people = p
	v.mu.Unlock()
	if err != nil {
		return p, fmt.Errorf("names of users: %w", err)
	}
	return p, nil
}

func (v *View) readIdentities(ctx context.Context) (*Identities, error) {
	p := &Identities{users: map[string]User{}, groups: map[string]string{}}
	n, err := v.identityFile(ctx)
	if err != nil || n == nil {
		return p, err
	}
	c, err := v.openMeta(n)
	if err != nil {
		return p, err
	}
	b, err := openBolt(c.Size(), readerAt(func(buf []byte, off int64) (int, error) { return c.ReadAt(ctx, buf, off) }))
	if err != nil {
		return p, err
	}
	err = b.bucket("id2entry", func(_, val []byte) error {
		if len(p.users)+len(p.groups) >= maxIdentities {
			return errors.New("there are more users and groups than are looked at")
		}
		if e, err := decodeEntry(val); err == nil {
			p.add(e)
		}
		return nil
	})
	p.Known = len(p.users) > 0
	return p, err
}

// identityFile finds the database: a data set of its own, a file or a folder.
func (v *View) identityFile(ctx context.Context) (*snapshot.Node, error) {
	for _, d := range v.m.DataSets {
		if d.Name != "idm" || !d.Captured || d.Tree == "" {
			continue
		}
		n, err := v.lookup(ctx, path.Clean("/"+d.Tree))
		if errors.Is(err, snapshot.ErrNoSuchPath) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n.Type == snapshot.File {
			return n, nil
		}
		if n.Type != snapshot.Dir {
			continue
		}
		t, err := v.tree(ctx, n.Subtree)
		if err != nil {
			return nil, err
		}
		for _, name := range identityFiles {
			if f := t.Find(name); f != nil && f.Type == snapshot.File {
				return f, nil
			}
		}
		for _, f := range t.Nodes {
			if f.Type == snapshot.File && strings.HasSuffix(f.Name, ".boltdb") {
				return f, nil
			}
		}
	}
	return nil, nil
}

// ldapEntry is an entry as the directory stores it, in gob. Fields that are not needed are left out.
type ldapEntry struct {
	DN         string
	Attributes []*ldapAttribute
}

type ldapAttribute struct {
	Name   string
	Values []string
}

// maxEntry bounds an entry, in bytes: a group of 20,000 members.
const maxEntry = 4 << 20

// decodeEntry decodes one entry. The decoder is not made for hostile data, so it gets little of it and
// may fail as it likes.
func decodeEntry(p []byte) (e ldapEntry, err error) {
	defer func() {
		if x := recover(); x != nil {
			err = boltErr("an entry cannot be decoded: %v", x)
		}
	}()
	if len(p) > maxEntry {
		return e, boltErr("an entry of %d bytes", len(p))
	}
	err = gob.NewDecoder(bytes.NewReader(p)).Decode(&e)
	return e, err
}

func (e *ldapEntry) get(name string) string {
	for _, a := range e.Attributes {
		if a != nil && strings.EqualFold(a.Name, name) && len(a.Values) > 0 {
			return a.Values[0]
		}
	}
	return ""
}

func (e *ldapEntry) is(class string) bool {
	for _, a := range e.Attributes {
		if a == nil || !strings.EqualFold(a.Name, "objectClass") {
			continue
		}
		for _, v := range a.Values {
			if strings.EqualFold(v, class) {
				return true
			}
		}
	}
	return false
}

func (p *Identities) add(e ldapEntry) {
	uuid := e.get("ownCloudUUID")
	if uuid == "" {
		uuid = e.get("openCloudUUID")
	}
	if uuid == "" {
		return
	}
	if e.is("groupOfNames") {
		p.groups[uuid] = first(e.get("cn"), uuid)
		return
	}
	login := first(e.get("uid"), e.get("cn"))
	p.users[uuid] = User{ID: uuid, Login: login, Name: first(e.get("displayName"), login, uuid), Mail: e.get("mail")}
}

func first(list ...string) string {
	for _, s := range list {
		if s != "" {
			return s
		}
	}
	return ""
}

// configLimit bounds a configuration file, in bytes.
const configLimit = 4 << 20

// MountID is what the ids of items begin with in users' tools; "" if the snapshot does not tell it. It
// comes from the configuration of the instance, else from the records of shares.
func (v *View) MountID(ctx context.Context, store string) string {
	v.mu.Lock()
	m := v.mount
	v.mu.Unlock()
	if m == nil {
		s := v.readMountID(ctx)
		if ctx.Err() != nil {
			return ""
		}
		m = &s
		v.mu.Lock()
		v.mount = m
		v.mu.Unlock()
	}
	switch store {
	case "users":
		return *m
	case "users-vault":
		return "1a01c2c4-4309-4483-a845-842fd56d8622" // fixed by the product
	}
	return ""
}

func (v *View) readMountID(ctx context.Context) string {
	type config struct {
		StorageUsers struct {
			MountID string `yaml:"mount_id"`
		} `yaml:"storage_users"`
		Gateway struct {
			Registry struct {
				MountID string `yaml:"storage_users_mount_id"`
			} `yaml:"storage_registry"`
		} `yaml:"gateway"`
		MountID string `yaml:"mount_id"` // in storage-users.yaml
	}
	found := ""
	for _, name := range []string{"ocis.yaml", "opencloud.yaml", "storage-users.yaml"} {
		n, err := v.lookup(ctx, "/config/files/"+name)
		if err != nil {
			continue
		}
		p, err := v.loadMeta(ctx, n, configLimit)
		if err != nil {
			continue
		}
		var c config
		if yaml.Unmarshal(p, &c) != nil {
			continue
		}
		found = first(c.MountID, c.StorageUsers.MountID, c.Gateway.Registry.MountID, found)
	}
	if found != "" && !strings.ContainsAny(found, "${}") {
		return found
	}
	return v.mountOfShares(ctx)
}

// shareManager is the space with the records of all shares: storages/<mount id>/<space id>.json.
const shareManager = "jsoncs3-share-manager-metadata"

func (v *View) mountOfShares(ctx context.Context) string {
	s := v.SpaceByID(shareManager)
	if s == nil {
		return ""
	}
	it, err := v.Item(ctx, s, "storages")
	if err != nil || !it.IsDir() {
		return ""
	}
	list, err := v.List(ctx, it)
	if err != nil {
		return ""
	}
	for _, d := range list {
		t, err := v.List(ctx, d)
		if err != nil {
			continue
		}
		for _, f := range t {
			id, _ := strings.CutSuffix(f.Name(), ".json")
			if sp := v.SpaceByID(id); sp != nil && sp.Store == "users" {
				return d.Name()
			}
		}
	}
	return ""
}
