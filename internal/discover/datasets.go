package discover

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// builder puts an instance together.
type builder struct {
	o       *Options
	s       *sources
	loc     *location
	cfg     *config
	inst    *ocis.Instance
	stores  []*store
	probes  map[string]*probe
	buckets map[string]*ocis.S3
	sets    []ocis.DataSet
}

func (b *builder) warn(format string, args ...any) { b.s.warn(format, args...) }

// mapHint says what to do about a path that is not there.
func (b *builder) mapHint(p place) string {
	if p.host != p.server {
		return fmt.Sprintf("It was looked for as %s. If it has another place on this host, give --map %s=/path/on/this/host.", p.host, p.server)
	}
	return fmt.Sprintf("If that is the path inside a container, name its place on this host: --map %s=/path/on/this/host.", p.server)
}

// dirSet is a data set that is a whole directory below the base data path, or elsewhere if a setting
// says so.
type dirSet struct {
	name      string
	rel       string
	field     field // without variables: it cannot be moved
	class     ocis.Class
	ifMissing string
}

var dirSets = []dirSet{
	{"idm", "idm", field{}, ocis.Required,
		"the server makes a new user directory: all users but the admin are gone, and with them the owners of all spaces"},
	{"idp", "idp", field{}, ocis.Recommended,
		"the server makes new signing and encryption keys: all sessions end and users log in again"},
	{"nats", "nats", field{service: "nats", keys: []string{"nats.store_dir"}, env: []string{"NATS_NATS_STORE_DIR"}}, ocis.Recommended,
		"events that were not handled yet are lost: unfinished uploads, pending notifications, activity history"},
	{"proxy", "proxy", field{}, ocis.Optional,
		"the server makes a new self-signed certificate; clients that trust the old one complain"},
	{"search", "search", field{service: "search", keys: []string{"engine.bleve.data_path"}, env: []string{"SEARCH_ENGINE_BLEVE_DATA_PATH"}}, ocis.Recommended,
		"search finds nothing until all spaces are indexed again"},
	{"thumbnails", "thumbnails", field{service: "thumbnails", keys: []string{"thumbnail.filesystem_storage.root_directory"}, env: []string{"THUMBNAILS_FILESYSTEMSTORAGE_ROOT"}}, ocis.Optional,
		"previews are made again when they are asked for"},
	{"web", "web", field{}, ocis.Recommended,
		"an adapted web client, its extensions and themes are lost; the built-in ones are used"},
	{"ocm", "storage/ocm", field{service: "ocm", keys: []string{"ocm_storage_provider.storage_root"}, env: []string{"OCM_OCM_STORAGE_PROVIDER_STORAGE_ROOT"}}, ocis.Required,
		"shares with and invitations of other servers are lost"},
}

// fileSet is a setting that may point at a file or directory outside of all others.
type fileSet struct {
	name  string
	field field
	// def is the default place below the base data path; with "C:" before it, the configuration
	// directory. Relative values with C: begin there as well.
	def   string
	class ocis.Class
	// made: the server makes it when it is missing, so a missing one is no error.
	made      bool
	ifMissing string
	// when must hold, if it is not nil.
	when func(*config) bool
}

const (
	newCertificate = "the server makes a new self-signed certificate; clients that trust the old one complain"
	noTLS          = "services cannot talk to one another until the certificates are there again"
	defaultsUsed   = "the adaptation is lost and the built-in one is used"
)

func one(service, key string, env ...string) field {
	f := field{service: service, env: env}
	if key != "" {
		f.keys = []string{key}
	}
	return f
}

var fileSets = []fileSet{
	{name: "idm-database", field: one("idm", "idm.database", "IDM_DATABASE_PATH"), def: "idm/", class: ocis.Required,
		ifMissing: dirSets[0].ifMissing},
	{name: "idm-certificate", field: one("idm", "idm.cert", "IDM_LDAPS_CERT"), def: "idm/ldap.crt", class: ocis.Optional, made: true, ifMissing: newCertificate},
	{name: "idm-key", field: one("idm", "idm.key", "IDM_LDAPS_KEY"), def: "idm/ldap.key", class: ocis.Optional, made: true, ifMissing: newCertificate},
	{name: "ldap-certificate", field: one("users", "drivers.ldap.ca_cert", "{P}_LDAP_CACERT", "USERS_LDAP_CACERT"), def: "idm/ldap.crt", class: ocis.Recommended, made: true, ifMissing: noTLS},
	{name: "ldap-certificate-groups", field: one("groups", "drivers.ldap.ca_cert", "{P}_LDAP_CACERT", "GROUPS_LDAP_CACERT"), def: "idm/ldap.crt", class: ocis.Recommended, made: true, ifMissing: noTLS},
	{name: "ldap-certificate-graph", field: one("graph", "identity.ldap.cacert", "{P}_LDAP_CACERT", "GRAPH_LDAP_CACERT"), def: "idm/ldap.crt", class: ocis.Recommended, made: true, ifMissing: noTLS},
	{name: "ldap-certificate-auth-basic", field: one("auth-basic", "auth_providers.ldap.ca_cert", "{P}_LDAP_CACERT", "AUTH_BASIC_LDAP_CACERT"), def: "idm/ldap.crt", class: ocis.Recommended, made: true, ifMissing: noTLS},
	{name: "ldap-certificate-idp", field: one("idp", "ldap.cacert", "{P}_LDAP_CACERT", "IDP_LDAP_TLS_CACERT"), def: "idm/ldap.crt", class: ocis.Recommended, made: true, ifMissing: noTLS},

	{name: "idp-encryption-key", field: one("idp", "idp.encrypt_secret_file", "IDP_ENCRYPTION_SECRET_FILE"), def: "idp/encryption.key", class: ocis.Recommended, made: true, ifMissing: dirSets[1].ifMissing},
	{name: "idp-signing-key", field: field{service: "idp", keys: []string{"idp.signing_private_key_files"}, env: []string{"IDP_SIGNING_PRIVATE_KEY_FILES"}, list: true}, def: "idp/private-key.pem", class: ocis.Recommended, made: true, ifMissing: dirSets[1].ifMissing},
	{name: "idp-validation-keys", field: one("idp", "idp.validation_keys_path", "IDP_VALIDATION_KEYS_PATH"), class: ocis.Recommended, ifMissing: dirSets[1].ifMissing},
	{name: "idp-tls-certificate", field: one("idp", "http.tls_cert", "IDP_TRANSPORT_TLS_CERT"), def: "idp/server.crt", class: ocis.Recommended, made: true, ifMissing: newCertificate},
	{name: "idp-tls-key", field: one("idp", "http.tls_key", "IDP_TRANSPORT_TLS_KEY"), def: "idp/server.key", class: ocis.Recommended, made: true, ifMissing: newCertificate},
	{name: "idp-assets", field: one("idp", "asset.asset", "IDP_ASSET_PATH"), class: ocis.Recommended, ifMissing: defaultsUsed},

	{name: "nats-certificate", field: one("nats", "nats.tls_cert", "NATS_TLS_CERT"), def: "nats/tls.crt", class: ocis.Recommended, made: true, ifMissing: noTLS},
	{name: "nats-key", field: one("nats", "nats.tls_key", "NATS_TLS_KEY"), def: "nats/tls.key", class: ocis.Recommended, made: true, ifMissing: noTLS},

	{name: "proxy-certificate", field: one("proxy", "http.tls_cert", "PROXY_TRANSPORT_TLS_CERT"), def: "proxy/server.crt", class: ocis.Recommended, made: true, ifMissing: newCertificate},
	{name: "proxy-key", field: one("proxy", "http.tls_key", "PROXY_TRANSPORT_TLS_KEY"), def: "proxy/server.key", class: ocis.Recommended, made: true, ifMissing: newCertificate},
	{name: "proxy-ca-certificate", field: one("proxy", "", "PROXY_HTTPS_CACERT"), class: ocis.Recommended, ifMissing: noTLS},
	{name: "proxy-csp", field: one("proxy", "csp_config_file_location", "PROXY_CSP_CONFIG_FILE_LOCATION"), def: "proxy/csp.yaml", class: ocis.Recommended, ifMissing: defaultsUsed},

	{name: "web-core", field: one("web", "asset.core_path", "WEB_ASSET_CORE_PATH"), def: "web/assets/core", class: ocis.Recommended, ifMissing: defaultsUsed},
	{name: "web-apps", field: one("web", "asset.apps_path", "WEB_ASSET_APPS_PATH"), def: "web/assets/apps", class: ocis.Recommended, ifMissing: "web extensions are lost"},
	{name: "web-themes", field: one("web", "asset.themes_path", "{P}_ASSET_THEMES_PATH", "WEB_ASSET_THEMES_PATH"), def: "web/assets/themes", class: ocis.Recommended, ifMissing: "themes are lost and the built-in one is used"},
	{name: "web-config", field: one("web", "", "WEB_UI_CONFIG_FILE"), class: ocis.Recommended, ifMissing: defaultsUsed},

	{name: "ocm-invitations", field: one("ocm", "ocm_invite_manager.drivers.json.file", "OCM_OCM_INVITE_MANAGER_JSON_FILE"), def: "storage/ocm/ocminvites.json", class: ocis.Required, made: true, ifMissing: "invitations of other servers are lost"},
	{name: "ocm-shares", field: one("ocm", "ocm_core.drivers.json.file", "OCM_OCM_CORE_JSON_FILE"), def: "storage/ocm/ocmshares.json", class: ocis.Required, made: true, ifMissing: "shares with other servers are lost"},
	{name: "ocm-provider-shares", field: one("ocm", "ocm_share_provider.drivers.json.file", "OCM_OCM_SHAREPROVIDER_JSON_FILE"), def: "storage/ocm/ocmshares.json", class: ocis.Required, made: true, ifMissing: "shares with other servers are lost"},
	{name: "ocm-providers", field: one("ocm", "ocm_provider_authorizer_drivers.json.providers", "OCM_OCM_PROVIDER_AUTHORIZER_PROVIDERS_FILE"), def: "C:ocmproviders.json", class: ocis.Recommended, ifMissing: "the list of trusted servers is lost, and sharing with them fails"},

	{name: "sharing-user-shares", field: one("sharing", "user_sharing_drivers.json.file", "SHARING_USER_JSON_FILE"), def: "storage/shares.json", class: ocis.Required, made: true, ifMissing: "shares are lost",
		when: jsonDriver("user_sharing_driver", "SHARING_USER_DRIVER")},
	{name: "sharing-public-shares", field: one("sharing", "public_sharing_drivers.json.file", "SHARING_PUBLIC_JSON_FILE"), def: "storage/publicshares.json", class: ocis.Required, made: true, ifMissing: "public links are lost",
		when: jsonDriver("public_sharing_driver", "SHARING_PUBLIC_DRIVER")},

	{name: "settings-bundles", field: one("settings", "bundles_path", "SETTINGS_BUNDLES_PATH"), class: ocis.Recommended, ifMissing: "adapted roles are lost and the built-in ones are used"},
	{name: "settings-data", field: one("settings", "data_path", "SETTINGS_DATA_PATH"), def: "settings", class: ocis.Required, made: true, ifMissing: "settings and role assignments of the old store are lost"},
	{name: "audit-log", field: one("audit", "auditlog.filepath", "AUDIT_FILEPATH"), class: ocis.Recommended, made: true, ifMissing: "the audit log before the backup is lost",
		when: func(c *config) bool {
			v, err := c.get(one("audit", "auditlog.log_to_file", "AUDIT_LOG_TO_FILE"))
			return err == nil && isTrue(v.text)
		}},

	{name: "notifications-templates", field: one("notifications", "email_template_path", "{P}_EMAIL_TEMPLATE_PATH", "NOTIFICATIONS_EMAIL_TEMPLATE_PATH"), class: ocis.Recommended, ifMissing: defaultsUsed},
	{name: "translations", field: one("userlog", "translation_path", "{P}_TRANSLATION_PATH", "USERLOG_TRANSLATION_PATH"), class: ocis.Recommended, ifMissing: defaultsUsed},
	{name: "translations-notifications", field: one("notifications", "translation_path", "{P}_TRANSLATION_PATH", "NOTIFICATIONS_TRANSLATION_PATH"), class: ocis.Recommended, ifMissing: defaultsUsed},
	{name: "translations-graph", field: one("graph", "translation_path", "{P}_TRANSLATION_PATH", "GRAPH_TRANSLATION_PATH"), class: ocis.Recommended, ifMissing: defaultsUsed},
	{name: "translations-settings", field: one("settings", "translation_path", "{P}_TRANSLATION_PATH", "SETTINGS_TRANSLATION_PATH"), class: ocis.Recommended, ifMissing: defaultsUsed},
	{name: "translations-activitylog", field: one("activitylog", "translation_path", "{P}_TRANSLATION_PATH", "ACTIVITYLOG_TRANSLATION_PATH"), class: ocis.Recommended, ifMissing: defaultsUsed},

	{name: "http-tls-certificate", field: one("", "", "{P}_HTTP_TLS_CERTIFICATE"), class: ocis.Recommended, ifMissing: noTLS},
	{name: "http-tls-key", field: one("", "", "{P}_HTTP_TLS_KEY"), class: ocis.Recommended, ifMissing: noTLS},
	{name: "grpc-tls-certificate", field: one("", "", "{P}_GRPC_TLS_CERTIFICATE"), class: ocis.Recommended, ifMissing: noTLS},
	{name: "grpc-tls-key", field: one("", "", "{P}_GRPC_TLS_KEY"), class: ocis.Recommended, ifMissing: noTLS},
	{name: "grpc-ca-certificate", field: one("", "", "{P}_GRPC_CLIENT_TLS_CACERT"), class: ocis.Recommended, ifMissing: noTLS},
	{name: "gateway-ca-certificate", field: one("", "", "{P}_REVA_GATEWAY_TLS_CACERT"), class: ocis.Recommended, ifMissing: noTLS},
	{name: "events-ca-certificate", field: one("", "", "{P}_EVENTS_TLS_ROOT_CA_CERTIFICATE"), class: ocis.Recommended, ifMissing: noTLS},

	{name: "thumbnails-fonts", field: one("thumbnails", "thumbnail.font_map_file", "THUMBNAILS_TXT_FONTMAP_FILE"), class: ocis.Optional, ifMissing: defaultsUsed},
	{name: "banned-passwords", field: one("frontend", "password_policy.banned_passwords_list", "{P}_PASSWORD_POLICY_BANNED_PASSWORDS_LIST", "FRONTEND_PASSWORD_POLICY_BANNED_PASSWORDS_LIST"), def: "C:", class: ocis.Recommended, ifMissing: "the list of passwords that may not be used is lost"},
	{name: "collaboration-fonts", field: one("collaboration", "", "COLLABORATION_FONT_ASSET_PATH"), def: "collaboration/fonts", class: ocis.Recommended, ifMissing: "fonts for the office integration are lost"},
}

func jsonDriver(key, env string) func(*config) bool {
	return func(c *config) bool {
		v, err := c.get(one("sharing", key, env))
		return err == nil && v.text == "json"
	}
}

// within reports whether path lies in one of the data sets so far, or in a store.
func (b *builder) within(path string) bool {
	return slices.ContainsFunc(b.sets, func(d ocis.DataSet) bool { return mountinfo.Below(path, d.Path) }) || b.inStore(path)
}

func (b *builder) inStore(path string) bool {
	return slices.ContainsFunc(b.stores, func(s *store) bool { return mountinfo.Below(path, s.Root) })
}

// add appends a data set at a place.
func (b *builder) add(name string, kind ocis.Kind, class ocis.Class, p place, ifMissing string) *ocis.DataSet {
	d := ocis.DataSet{Name: name, Kind: kind, Class: class, Path: p.host, Setting: p.setting, IfMissing: ifMissing}
	if p.server != p.host {
		d.ServerPath = p.server
	}
	d.Found, _ = exists(p.host)
	for n := 2; slices.ContainsFunc(b.sets, func(o ocis.DataSet) bool { return o.Name == d.Name }); n++ {
		d.Name = fmt.Sprintf("%s-%d", name, n)
	}
	b.sets = append(b.sets, d)
	return &b.sets[len(b.sets)-1]
}

// dataSets lists all of the instance, stores last.
//
// Errors: *SettingError.
func (b *builder) dataSets() error {
	b.add("config", ocis.Config, ocis.Recommended, b.loc.config,
		"secrets and ids are made anew: nobody can log in to the old user directory, and all shares are lost, unless they stand in the environment")
	if b.inst.BasePath != b.inst.ConfigDir {
		b.add("base", ocis.System, ocis.Required, b.loc.base,
			"whatever the server keeps below the base data path outside of the other data sets is lost, such as app tokens")
	}
	for _, d := range dirSets {
		if err := b.addDir(d); err != nil {
			return err
		}
	}
	for _, f := range fileSets {
		if err := b.addFiles(f); err != nil {
			return err
		}
	}
	b.addMounts()
	b.addLinks()
	for _, s := range b.stores {
		b.addStore(s)
	}
	return nil
}

func (b *builder) addDir(d dirSet) error {
	def := b.s.serverPlace(filepath.Join(b.loc.base.server, d.rel), "")
	p := def
	if len(d.field.env) > 0 {
		v, err := b.cfg.get(d.field)
		if err != nil {
			return err
		}
		if v.set && v.text != "" {
			if p, err = b.s.valuePlace(v); err != nil {
				return err
			}
		}
	}
	class, used := b.classOf(d)
	found, err := exists(p.host)
	if err != nil {
		return p.err("cannot be read: "+withoutPath(err).Error(), "Run holdfast as root, or as the user who owns the instance.")
	}
	if !found && p.host != def.host && used {
		if class != ocis.Optional {
			return p.err("does not exist", b.mapHint(p))
		}
		b.warn("%s does not exist (%s)", p.host, p.setting)
	}
	switch {
	case p.host == b.inst.BasePath || p.host == b.inst.ConfigDir || b.inStore(p.host):
		return nil // it is captured with that
	case mountinfo.Below(b.inst.BasePath, p.host), b.inst.ConfigDir != "" && mountinfo.Below(b.inst.ConfigDir, p.host):
		return p.err("contains the base data path or the configuration directory", "Move it into a directory of its own.")
	case slices.ContainsFunc(b.sets, func(o ocis.DataSet) bool { return o.Path == p.host }):
		return nil
	}
	ifMissing := d.ifMissing
	if !used {
		ifMissing = "nothing: it is not in use"
	}
	b.add(d.name, ocis.System, class, p, ifMissing)
	if !found && class == ocis.Required {
		b.warn("data set %s is required, but %s does not exist", d.name, p.host)
	}
	return nil
}

// classOf tells how much a directory matters for this instance, and whether it is in use at all.
func (b *builder) classOf(d dirSet) (ocis.Class, bool) {
	here := b.s.serverPlace(filepath.Join(b.loc.base.server, d.rel), "").host
	switch d.name {
	case "idm":
		if !b.runs("idm") || b.externalLDAP() {
			return ocis.Optional, isDir(here)
		}
		if v, err := b.cfg.get(fileSets[0].field); err == nil && v.set && v.text != "" {
			if p, err := b.s.valuePlace(v); err == nil && !mountinfo.Below(p.host, here) {
				return ocis.Optional, true // only certificates are left in it
			}
		}
	case "idp", "nats":
		if !b.runs(d.name) {
			return ocis.Optional, isDir(here)
		}
	case "search":
		v, err := b.cfg.get(one("search", "engine.type", "SEARCH_ENGINE_TYPE"))
		if err == nil && v.set && v.text != "" && v.text != "bleve" {
			return ocis.Optional, false
		}
	case "ocm":
		if !isDir(here) {
			return ocis.Optional, true // the server makes it when it is used first
		}
	}
	return d.class, true
}

// runs tells whether a service is part of this server.
func (b *builder) runs(service string) bool {
	list := func(env, key string) []string {
		v, err := b.cfg.get(field{service: "runtime", keys: []string{key}, env: []string{env}, list: true})
		if err != nil {
			return nil
		}
		return v.list
	}
	if only := list("{P}_RUN_SERVICES", "services"); len(only) > 0 {
		return slices.Contains(only, service)
	}
	return !slices.Contains(list("{P}_EXCLUDE_RUN_SERVICES", "disabled_services"), service)
}

// externalLDAP tells whether the users come from another directory server.
func (b *builder) externalLDAP() bool {
	v, err := b.cfg.get(one("users", "drivers.ldap.uri", "{P}_LDAP_URI", "USERS_LDAP_URI"))
	if err != nil || v.text == "" {
		return false
	}
	_, host, _ := strings.Cut(v.text, "://")
	host, _, _ = strings.Cut(host, "/")
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		host = host[:i]
	}
	switch host {
	case "", "localhost", "127.0.0.1", "[::1]", "0.0.0.0", "idm":
		return false
	}
	return true
}

func (b *builder) addFiles(f fileSet) error {
	if f.when != nil && !f.when(b.cfg) {
		return nil
	}
	v, err := b.cfg.get(f.field)
	if err != nil {
		return err
	}
	texts := v.list
	if !f.field.list {
		texts = []string{v.text}
	}
	for _, t := range texts {
		if t == "" {
			continue
		}
		each := v
		each.text = t
		if err := b.addFile(f, each); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) addFile(f fileSet, v value) error {
	rel, inConfig := strings.CutPrefix(f.def, "C:")
	dir := b.loc.base
	if inConfig {
		dir = b.loc.config
		if !filepath.IsAbs(v.text) {
			v.text = filepath.Join(dir.server, v.text)
		}
	}
	p, err := b.s.valuePlace(v)
	if err != nil {
		return err
	}
	if rel != "" && p.server == filepath.Join(dir.server, rel) && b.within(p.host) {
		return nil
	}
	found, err := exists(p.host)
	if err != nil {
		return p.err("cannot be read: "+withoutPath(err).Error(), "Run holdfast as root, or as the user who owns the instance.")
	}
	if strings.HasPrefix(f.name, "idm-") && !found {
		if _, used := b.classOf(dirSets[0]); !used {
			return nil
		}
	}
	if !found {
		if !f.made && f.class != ocis.Optional {
			return p.err("does not exist", b.mapHint(p))
		}
		if f.class == ocis.Required && !b.within(p.host) && f.name != "ocm-provider-shares" {
			b.warn("%s does not exist (%s)", p.host, p.setting)
		}
	}
	switch {
	case b.within(p.host):
		return nil
	case mountinfo.Below(b.inst.BasePath, p.host), b.inst.ConfigDir != "" && mountinfo.Below(b.inst.ConfigDir, p.host):
		return p.err("contains the base data path or the configuration directory", "Move it into a directory of its own.")
	}
	if !found && f.class == ocis.Optional {
		b.warn("%s does not exist (%s)", p.host, p.setting)
	}
	b.add(f.name, ocis.System, f.class, p, f.ifMissing)
	return nil
}

// addMounts finds what is mounted below the instance's directories from elsewhere, such as single
// files of a compose project in the configuration directory.
func (b *builder) addMounts() {
	for _, e := range b.s.maps.entries {
		if best := b.s.maps.find(e.Server); best == nil || best.PathMap != e.PathMap {
			continue // another map wins
		}
		name := ""
		switch {
		case e.Server != b.loc.config.server && mountinfo.Below(e.Server, b.loc.config.server):
			rel, _ := filepath.Rel(b.loc.config.server, e.Server)
			name = "mount-config-" + rel
		case e.Server != b.loc.base.server && mountinfo.Below(e.Server, b.loc.base.server):
			rel, _ := filepath.Rel(b.loc.base.server, e.Server)
			name = "mount-" + rel
		default:
			continue
		}
		p := b.s.serverPlace(e.Server, e.origin)
		if b.within(p.host) || mountinfo.Below(b.inst.BasePath, p.host) || slices.ContainsFunc(b.stores, func(s *store) bool { return mountinfo.Below(s.Root, p.host) }) {
			continue
		}
		b.add(strings.ReplaceAll(name, "/", "-"), ocis.System, ocis.Recommended, p, "what is mounted there is lost")
	}
}

// addLinks finds what the instance's own directories reach by symbolic links that lead out of them.
func (b *builder) addLinks() {
	for _, dir := range []string{b.inst.BasePath, filepath.Join(b.inst.BasePath, "storage"), b.inst.ConfigDir} {
		if dir == "" || resolve(dir) != dir {
			continue
		}
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.Type()&os.ModeSymlink == 0 {
				continue
			}
			link := filepath.Join(dir, e.Name())
			target, err := filepath.EvalSymlinks(link)
			if err != nil || b.within(target) || mountinfo.Below(b.inst.BasePath, target) ||
				b.inst.ConfigDir != "" && mountinfo.Below(b.inst.ConfigDir, target) {
				continue
			}
			if slices.ContainsFunc(b.stores, func(s *store) bool { return mountinfo.Below(s.Root, target) }) && filepath.Base(link) != "storage" {
				continue
			}
			b.add("link-"+e.Name(), ocis.System, ocis.Required, place{server: link, host: target, setting: "symbolic link " + link},
				"what the link leads to is lost")
		}
	}
}

// addStore adds the data sets of a storage root.
func (b *builder) addStore(s *store) {
	lost := map[string]string{
		"users":  "all files, versions and trash of all users are lost",
		"system": "shares, links, settings, role assignments and app tokens are lost",
	}[s.Name]
	if lost == "" {
		lost = "all files in this storage are lost"
	}
	p := s.place
	p.setting = s.setting
	d := b.add("storage-"+s.Name, ocis.Metadata, ocis.Required, p, lost)
	d.Store = s.Name
	if !d.Found {
		b.warn("data set %s is required, but %s does not exist", d.Name, d.Path)
	}
	if s.S3 == nil {
		d = b.add("storage-"+s.Name+"-blobs", ocis.Blobs, ocis.Required, p, "names and folders stay, but the contents of the files are lost")
		d.Store = s.Name
	}
	b.inst.Stores = append(b.inst.Stores, s.Store)
}
