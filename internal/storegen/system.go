package storegen

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

const migrations = `{"0001":{"State":"succeeded","Message":""},"0002":{"State":"succeeded","Message":""},"0003":{"State":"succeeded","Message":""},"0004":{"State":"succeeded","Message":""},"0005":{"State":"succeeded","Message":""}}`

// storeFiles makes what belongs to the users' store and to no space.
func (w *writer) storeFiles(st *store) error {
	p := w.plan
	kinds := map[string][]ocis.IndexEntry{}
	byUser := map[string][]ocis.IndexEntry{}
	for _, s := range p.spaces {
		e := ocis.IndexEntry{SpaceID: s.id, Target: rootTarget(s.id)}
		kinds[s.kind] = append(kinds[s.kind], e)
		if s.kind == "personal" {
			byUser[s.owner] = append(byUser[s.owner], e)
		} else {
			byUser[""] = append(byUser[""], e) // projects have no user as owner
		}
		for _, m := range s.members {
			id := p.users[m].id
			byUser[id] = append(byUser[id], e)
		}
		for i := range s.folders {
			if s.folders[i].shared {
				kinds["share"] = append(kinds["share"], e)
				break
			}
		}
	}
	if err := st.common(); err != nil {
		return err
	}
	if err := st.mkdir("uploads", 0o700); err != nil {
		return err
	}
	for dir, index := range map[string]map[string][]ocis.IndexEntry{"by-type": kinds, "by-user-id": byUser} {
		for name, list := range index {
			if err := st.put("indexes/"+dir+"/"+name+".mpk", 0o600, lastDay, ocis.EncodeIndex(list)); err != nil {
				return err
			}
		}
	}
	// An upload that a client broke off half way.
	s := p.spaces[0]
	id := uuid(p.o.Seed, forSystem, 3, 0)
	it := item{size: 80000, key: p.o.Seed ^ 3, kind: dense}
	err := st.create("uploads/"+id, 0o644, lastDay, func(f *os.File) error {
		_, err := newFiller().write(f, it)
		return err
	})
	if err != nil {
		return err
	}
	info, err := w.uploadInfo(s, -1, id, 500000, it.size, lastDay)
	if err != nil {
		return err
	}
	return st.put("uploads/"+id+".info", 0o600, lastDay, info)
}

// common makes what each storage root has.
func (st *store) common() error {
	for _, dir := range []string{"indexes", "indexes/by-type", "indexes/by-user-id", "indexes/by-group-id"} {
		if err := st.mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	if err := st.put(".migrations", 0o600, firstDay, []byte(migrations)); err != nil {
		return err
	}
	return st.create(".migrations.lock", 0o600, firstDay, nil)
}

// uploadInfo is the record of an upload session for file i of s; -1 is a file that is not there yet.
func (w *writer) uploadInfo(s *space, i int, id string, size, offset, at int64) ([]byte, error) {
	p := w.plan
	nodeID, name, parent, exists := uuid(p.o.Seed, forSystem, 4, 0), "unfinished film.mp4", s.id, ""
	if i >= 0 {
		nodeID, name, parent, exists = p.fileID(s, i), p.fileName(s, i), p.folderID(s, int(s.files[i].folder)), "true"
	}
	kind := "DecomposedFsStore"
	if p.o.Prefix == ocis.PrefixOCIS {
		kind = "OCISStore"
	}
	return json.Marshal(map[string]any{
		"ID": id, "Size": size, "SizeIsDeferred": false, "Offset": offset, "IsPartial": false, "IsFinal": false, "PartialUploads": nil,
		"MetaData": map[string]string{
			"dir": "/", "expires": fmt.Sprint(at/1e9 + 86400), "filename": name, "initiatorid": "", "lockid": "",
			"mtime": fmt.Sprintf("%d.%09d", at/1e9, at%1e9), "providerID": p.mount,
		},
		"Storage": map[string]string{
			"Type": kind, "NodeId": nodeID, "NodeName": name, "NodeParentId": parent, "NodeExists": exists, "SpaceRoot": s.id,
			"SpaceOwnerOrManager": s.owner, "Dir": "/", "UserId": p.users[0].id, "UserType": "primary", "UserName": p.users[0].login,
			"UserDisplayName": p.users[0].name, "Idp": "https://localhost:9200", "LogLevel": "error", "UserOpaque": "null",
		},
	})
}

// The ids of the system spaces are fixed.
const (
	settingsSpace = "f1bdd61a-da7c-49fc-8203-0558109d1b4f"
	sharesSpace   = "jsoncs3-share-manager-metadata"
	linksSpace    = "jsoncs3-public-share-manager-metadata"
)

// systemStorage makes storage/metadata: settings, shares and links, as JSON in spaces of their own.
func (w *writer) systemStorage() error {
	p := w.plan
	root := filepath.Join(w.data, "storage", "metadata")
	if err := os.MkdirAll(root+"/spaces", 0o700); err != nil {
		return err
	}
	st, err := openStore(root, p.o.Prefix)
	if err != nil {
		return err
	}
	defer st.close()
	if err := st.common(); err != nil {
		return err
	}
	if err := st.mkdir("uploads", 0o700); err != nil {
		return err
	}
	admin, user := uuid(p.o.Seed, forSystem, 5, 0), uuid(p.o.Seed, forSystem, 6, 0)
	settings := map[string]string{
		"settings/bundles/" + admin: fmt.Sprintf(`{"id":%q,"name":"admin","type":"TYPE_ROLE","displayName":"Admin","settings":[]}`, admin),
		"settings/bundles/" + user:  fmt.Sprintf(`{"id":%q,"name":"user","type":"TYPE_ROLE","displayName":"User","settings":[]}`, user),
		"settings/values/.keep":     "",
	}
	shares := map[string]string{"groups/.keep": ""}
	for i, u := range p.users {
		assignment := uuid(p.o.Seed, forSystem, 7, i)
		role := user
		if i == 0 {
			role = admin
		}
		settings["settings/accounts/"+u.id+"/"+assignment] = fmt.Sprintf(`{"id":%q,"accountUuid":%q,"roleId":%q}`, assignment, u.id, role)
	}
	received := map[string]map[string]any{} // by user: space -> states
	for _, s := range p.spaces {
		list := map[string]any{}
		for i := range s.folders {
			if !s.folders[i].shared {
				continue
			}
			who := p.users[i%len(p.users)].id
			id := p.mount + ":" + s.id + ":" + uuid(p.o.Seed, forSystem, 100+s.index, i)
			list[id] = map[string]any{
				"id": map[string]string{"opaque_id": id}, "resource_id": map[string]string{"storage_id": p.mount, "space_id": s.id, "opaque_id": p.folderID(s, i)},
				"grantee": map[string]any{"type": 1, "opaque_id": who}, "creator": s.owner, "ctime": s.folders[i].made / 1e9,
			}
			if received[who] == nil {
				received[who] = map[string]any{}
			}
			received[who][p.mount+":"+s.id] = map[string]any{"States": map[string]any{id: map[string]any{"State": 2, "MountPoint": map[string]string{"path": p.folderName(s, i)}, "Hidden": false}}}
		}
		if len(list) > 0 {
			if err := addJSON(shares, "storages/"+p.mount+"/"+s.id+".json", map[string]any{"Shares": list}); err != nil {
				return err
			}
			if err := addJSON(shares, "users/"+s.owner+"/created.json", map[string]any{"UserShares": map[string]any{p.mount + ":" + s.id: slices.Sorted(maps.Keys(list))}}); err != nil {
				return err
			}
		}
	}
	for who, spaces := range received {
		if err := addJSON(shares, "users/"+who+"/received.json", map[string]any{"Spaces": spaces}); err != nil {
			return err
		}
	}
	links := map[string]string{}
	token := p.secret(20, 15)
	if err := addJSON(links, "publicshares.json", map[string]any{token: map[string]string{"password": "$2a$11$" + p.secret(21, 53), "share": fmt.Sprintf(`{"token":%q}`, token)}}); err != nil {
		return err
	}
	var index []ocis.IndexEntry
	for i, s := range []struct {
		id    string
		files map[string]string
	}{{settingsSpace, settings}, {sharesSpace, shares}, {linksSpace, links}} {
		if err := w.systemSpace(st, i, s.id, s.files); err != nil {
			return err
		}
		index = append(index, ocis.IndexEntry{SpaceID: s.id, Target: rootTarget(s.id)})
	}
	if err := st.put("indexes/by-type/metadata.mpk", 0o600, lastDay, ocis.EncodeIndex(index)); err != nil {
		return err
	}
	return st.put("indexes/by-user-id/"+p.system+".mpk", 0o600, lastDay, ocis.EncodeIndex(index))
}

func addJSON(files map[string]string, name string, value any) error {
	data, err := json.Marshal(value)
	files[name] = string(data)
	return err
}

// systemSpace makes one space of the system storage. Each rewriting of a file there leaves the old
// blob behind, so there are orphans.
func (w *writer) systemSpace(st *store, n int, id string, files map[string]string) error {
	p := w.plan
	a := attributes{prefix: st.prefix}
	a.text("id", id)
	a.text("name", "Metadata")
	a.text("owner.id", p.system)
	a.text("owner.idp", "internal")
	a.text("owner.type", "")
	a.text("propagation", "1")
	a.text("space.alias", "metadata/metadata")
	a.text("space.id", id)
	a.text("space.name", "Metadata")
	a.text("space.type", "metadata")
	a.text("treesize", "0")
	a.grant(ocis.Grant{Principal: p.system, Permissions: managerRights})
	if err := st.addRoot(id, a.list, firstDay, true); err != nil {
		return err
	}
	base := ocis.SpacePath(id)
	ids := map[string]string{".": id} // of folders, by path
	made := 0
	next := func() (string, int64) {
		made++
		return uuid(p.o.Seed, forSystem, 1000+n, made), firstDay + int64(made)*1234567891
	}
	add := func(parent, name string, dir bool) (string, int64, attributes, error) {
		nodeID, at := next()
		a := attributes{prefix: st.prefix}
		a.text("name", name)
		a.text("parentid", parent)
		link := base + "/nodes/" + ocis.NodePath(parent) + "/" + name
		if dir {
			a.text("type", "2")
			a.text("treesize", "0")
			err := st.addNode(base, &node{id: nodeID, dir: true, mode: 0o700, at: at, attrs: a.list})
			if err != nil {
				return "", 0, a, err
			}
		} else {
			a.text("id", nodeID)
			a.text("type", "1")
			a.text("mtime", stamp(at))
		}
		return nodeID, at, a, st.symlink("../../../../../"+ocis.NodePath(nodeID), link, at)
	}
	var folder func(dir string) (string, error)
	folder = func(dir string) (string, error) {
		if have, ok := ids[dir]; ok {
			return have, nil
		}
		parent, err := folder(path.Dir(dir))
		if err != nil {
			return "", err
		}
		made, _, _, err := add(parent, path.Base(dir), true)
		ids[dir] = made
		return made, err
	}
	fill := newFiller()
	for _, name := range slices.Sorted(maps.Keys(files)) {
		parent, err := folder(path.Dir(name))
		if err != nil {
			return err
		}
		if strings.HasSuffix(name, "/.keep") { // a folder without files
			continue
		}
		nodeID, at, a, err := add(parent, path.Base(name), false)
		if err != nil {
			return err
		}
		blob := uuid(p.o.Seed, forBlobID, -1-n, made)
		sums := fill.sums([]byte(files[name]))
		if err := st.putBlob(base, blob, at, []byte(files[name])); err != nil {
			return err
		}
		a.content(blob, int64(len(files[name])), &sums)
		if err := st.addNode(base, &node{id: nodeID, mode: 0o600, at: at, attrs: a.list}); err != nil {
			return err
		}
		if made%3 == 0 || n == 2 {
			w.orphans++
			old := []byte(files[name])
			if err := st.putBlob(base, uuid(p.o.Seed, forBlobID, -100-n, made), at-1e9, old[:len(old)/2]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (st *store) putBlob(base, id string, at int64, data []byte) error {
	file, err := st.shards(base+"/blobs", id, 0o700)
	if err != nil {
		return err
	}
	return st.put(file, 0o644, at, data)
}

func (f *filler) sums(data []byte) checksums {
	f.sha1.Reset()
	f.md5.Reset()
	f.adler.Reset()
	f.sha1.Write(data)
	f.md5.Write(data)
	f.adler.Write(data)
	var c checksums
	f.sha1.Sum(c.sha1[:0])
	f.md5.Sum(c.md5[:0])
	f.adler.Sum(c.adler[:0])
	return c
}

// secret is text of n characters that looks like one.
func (p *plan) secret(which, n int) string {
	const alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
	r := stream(p.o.Seed, forSystem, 50, which)
	b := make([]byte, n)
	for i := range b {
		b[i] = alphabet[r.below(len(alphabet))]
	}
	return string(b)
}

// systemData makes the data sets of kind system and the configuration.
func (w *writer) systemData() error {
	p := w.plan
	ocisNames := p.o.Prefix == ocis.PrefixOCIS
	if err := os.MkdirAll(w.data, 0o700); err != nil {
		return err
	}
	st, err := openStore(w.data, p.o.Prefix)
	if err != nil {
		return err
	}
	defer st.close()
	boltdb := "idm/idm.boltdb"
	if ocisNames {
		boltdb = "idm/ocis.boltdb"
	}
	// Queues and index grow with the store, up to some MiB.
	some := min(16<<20, max(64<<10, int64(p.o.Files)*300))
	type entry struct {
		path string
		mode uint32
		data []byte
	}
	list := []entry{
		{boltdb, 0o600, p.database(1, 128<<10)},
		{"idm/ldap.crt", 0o644, p.pem(2, "CERTIFICATE")},
		{"idm/ldap.key", 0o600, p.pem(3, "RSA PRIVATE KEY")},
		{"idp/encryption.key", 0o600, []byte(p.secret(4, 32))},
		{"idp/private-key.pem", 0o600, p.pem(5, "PRIVATE KEY")},
		{"idp/tmp/identifier-registration.yaml", 0o644, []byte("clients:\n- id: web\n  name: Web\n  trusted: true\n")},
		{"proxy/server.crt", 0o644, p.pem(6, "CERTIFICATE")},
		{"proxy/server.key", 0o600, p.pem(7, "EC PRIVATE KEY")},
		{"search/bleve/index_meta.json", 0o644, []byte(`{"storage":"boltdb","index_type":"scorch"}`)},
		{"search/bleve/store/root.bolt", 0o600, p.database(8, 64<<10)},
		{"storage/ocm/ocminvites.json", 0o600, []byte("{}")},
		{"storage/ocm/ocmshares.json", 0o600, []byte("{}")},
	}
	for i := range 4 {
		list = append(list, entry{fmt.Sprintf("search/bleve/store/%012d.zap", 215+i), 0o600, p.bytes(10+i, some/4, dense)})
	}
	for i, stream := range []string{"main-queue", "KV_postprocessing", "KV_eventhistory", "KV_activitylog"} {
		dir := "nats/jetstream/$G/streams/" + stream
		list = append(list,
			entry{dir + "/meta.inf", 0o600, fmt.Appendf(nil, `{"Created":%q,"name":%q,"retention":"limits","storage":"file"}`, stamp(firstDay), stream)},
			entry{dir + "/meta.sum", 0o600, []byte(p.secret(20+i, 16))},
			entry{dir + "/msgs/1.blk", 0o600, p.bytes(30+i, some/2, prose)},
			entry{dir + "/msgs/index.db", 0o600, p.bytes(40+i, 77, dense)})
		if i > 0 {
			continue
		}
		for k, consumer := range []string{"dcfs", "postprocessing", "search", "storage-users", "userlog", "activitylog"} {
			obs := dir + "/obs/" + consumer
			list = append(list,
				entry{obs + "/meta.inf", 0o600, fmt.Appendf(nil, `{"Created":%q,"durable_name":%q,"ack_policy":"explicit"}`, stamp(firstDay), consumer)},
				entry{obs + "/meta.sum", 0o600, []byte(p.secret(60+k, 16))},
				entry{obs + "/o.dat", 0o600, p.bytes(70+k, 12, dense)})
		}
	}
	for i, e := range list {
		if err := os.MkdirAll(filepath.Join(w.data, filepath.Dir(e.path)), 0o700); err != nil {
			return err
		}
		if err := st.put(e.path, e.mode, lastDay+int64(i), e.data); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(w.config, 0o700); err != nil {
		return err
	}
	conf, err := openStore(w.config, p.o.Prefix)
	if err != nil {
		return err
	}
	defer conf.close()
	name := "opencloud.yaml"
	if ocisNames {
		name = "ocis.yaml"
	}
	if err := conf.put(name, 0o600, firstDay, p.yaml()); err != nil {
		return err
	}
	return conf.put("banned-password-list.txt", 0o644, firstDay, []byte("password\n12345678\n"))
}

// bytes makes n bytes of a kind of content.
func (p *plan) bytes(which int, n int64, kind contentKind) []byte {
	b := make([]byte, n)
	source(item{size: n, key: p.o.Seed*31 + uint64(which), kind: kind})(b)
	return b
}

// database looks like a bolt database: pages of 4 KiB, two of them meta pages, many half empty.
func (p *plan) database(which int, n int64) []byte {
	b := p.bytes(which, n, prose)
	for page := int64(0); page < n/4096; page++ {
		at := b[page*4096 : (page+1)*4096]
		clear(at[2048:])
		clear(at[:16])
		binary.LittleEndian.PutUint64(at, uint64(page))
		at[8] = 2
		if page < 2 {
			clear(at[16:])
			at[8] = 4
			binary.LittleEndian.PutUint32(at[16:], 0xed0cdaed)
			binary.LittleEndian.PutUint32(at[20:], 2)
			binary.LittleEndian.PutUint32(at[24:], 4096)
		}
	}
	return b
}

func (p *plan) pem(which int, kind string) []byte {
	text := base64.StdEncoding.EncodeToString(p.bytes(which, 900, dense))
	var b strings.Builder
	fmt.Fprintf(&b, "-----BEGIN %s-----\n", kind)
	for ; len(text) > 64; text = text[64:] {
		fmt.Fprintln(&b, text[:64])
	}
	fmt.Fprintf(&b, "%s\n-----END %s-----\n", text, kind)
	return []byte(b.String())
}

// yaml is the main configuration with made-up secrets.
func (p *plan) yaml() []byte {
	driver := "decomposed"
	if p.o.Prefix == ocis.PrefixOCIS {
		driver = "ocis"
	}
	account, secret := uuid(p.o.Seed, forSystem, 8, 0), p.secret(80, 32)
	idm, reva, idp := p.secret(81, 32), p.secret(82, 32), p.secret(83, 32)
	var b strings.Builder
	fmt.Fprintf(&b, "token_manager:\n  jwt_secret: %s\nmachine_auth_api_key: %s\nsystem_user_api_key: %s\ntransfer_secret: %s\n",
		p.secret(84, 32), p.secret(85, 32), p.secret(86, 32), p.secret(87, 32))
	fmt.Fprintf(&b, "system_user_id: %s\nadmin_user_id: %s\n", p.system, p.admin)
	fmt.Fprintf(&b, "idm:\n  service_user_passwords:\n    admin_password: %s\n    idm_password: %s\n    reva_password: %s\n    idp_password: %s\n",
		p.secret(88, 12), idm, reva, idp)
	fmt.Fprintf(&b, "idp:\n  ldap:\n    bind_password: %s\n", idp)
	for _, service := range []string{"users", "groups"} {
		fmt.Fprintf(&b, "%s:\n  drivers:\n    ldap:\n      bind_password: %s\n", service, reva)
	}
	fmt.Fprintf(&b, "auth_basic:\n  auth_providers:\n    ldap:\n      bind_password: %s\n", reva)
	fmt.Fprintf(&b, "graph:\n  application:\n    id: %s\n  identity:\n    ldap:\n      bind_password: %s\n  service_account:\n    service_account_id: %s\n    service_account_secret: %s\n",
		uuid(p.o.Seed, forSystem, 9, 0), idm, account, secret)
	fmt.Fprintf(&b, "collaboration:\n  wopi:\n    secret: %s\nthumbnails:\n  thumbnail:\n    transfer_secret: %s\n", p.secret(89, 32), p.secret(90, 32))
	fmt.Fprintf(&b, "storage_users:\n  driver: %s\n  mount_id: %s\n  service_account:\n    service_account_id: %s\n    service_account_secret: %s\n",
		driver, p.mount, account, secret)
	fmt.Fprintf(&b, "gateway:\n  storage_registry:\n    storage_users_mount_id: %s\n", p.mount)
	for _, service := range []string{"proxy", "frontend", "ocm", "search", "notifications", "userlog", "auth_service", "clientlog", "activitylog"} {
		fmt.Fprintf(&b, "%s:\n  service_account:\n    service_account_id: %s\n    service_account_secret: %s\n", service, account, secret)
	}
	fmt.Fprintf(&b, "settings:\n  service_account_ids:\n  - %s\n", account)
	return []byte(b.String())
}
