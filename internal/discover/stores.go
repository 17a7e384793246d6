package discover

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// driver is a storage driver of the product.
type driver struct {
	name   string // as configured
	kind   string // the spelling that stands for all: ocis, decomposed, posix, s3ng, decomposeds3
	layout ocis.Layout
	s3     bool
	prefix string // of attributes; "" for posix, where it is the product's
	// part is the driver's name inside variables, yaml its names in YAML, later wins.
	part string
	yaml []string
}

// driverOf knows a driver by its configured name.
func driverOf(product ocis.Product, name string) (driver, bool) {
	kind := name
	if name == "decomposed_s3" || name == "decomposed-s3" {
		kind = "decomposeds3"
	}
	d := driver{name: name, kind: kind, layout: ocis.Decomposed}
	local := func() { d.part, d.yaml = "DECOMPOSED", []string{"decomposed"} }
	remote := func() { d.part, d.yaml = "DECOMPOSEDS3", []string{"decomposed_s3", "decomposed-s3", "decomposeds3"} }
	switch kind {
	case "ocis":
		d.prefix = "user.ocis."
		// OpenCloud's legacy drivers take the settings of its new ones.
		if local(); product == ocis.OCIS {
			d.part, d.yaml = "OCIS", []string{"ocis"}
		}
	case "s3ng":
		d.prefix, d.s3 = "user.ocis.", true
		if remote(); product == ocis.OCIS {
			d.part, d.yaml = "S3NG", []string{"s3ng"}
		}
	case "decomposed":
		d.prefix = "user.oc."
		local()
	case "decomposeds3":
		d.prefix, d.s3 = "user.oc.", true
		remote()
	case "posix":
		d.layout, d.part, d.yaml = ocis.Posix, "POSIX", []string{"posix"}
	default:
		return d, false
	}
	return d, true
}

// field is a setting of the driver.
func (d driver) field(suffix, key string) field {
	f := field{service: "storage-users", env: []string{"STORAGE_USERS_" + d.part + "_" + suffix}}
	for _, y := range d.yaml {
		f.keys = append(f.keys, "drivers."+y+"."+key)
	}
	return f
}

var (
	userDriver   = field{service: "storage-users", keys: []string{"driver"}, env: []string{"STORAGE_USERS_DRIVER"}}
	systemDriver = field{service: "storage-system", keys: []string{"driver"}, env: []string{"STORAGE_SYSTEM_DRIVER"}}
)

func systemRoot(p ocis.Product) field {
	if p == ocis.OpenCloud {
		return field{service: "storage-system", keys: []string{"drivers.decomposed.root"}, env: []string{"STORAGE_SYSTEM_OC_ROOT"}}
	}
	return field{service: "storage-system", keys: []string{"drivers.ocis.root"}, env: []string{"STORAGE_SYSTEM_OCIS_ROOT"}}
}

// store is a storage root with what was found of it.
type store struct {
	ocis.Store
	place   place
	driver  driver
	probe   *probe
	setting string
}

// storesOf finds all storage roots.
func (b *builder) storesOf() error {
	cfg := b.cfg
	extra := b.s.extra
	if isVault(cfg.env) {
		// The environment at hand is that of the vault's process, so its root is the vault's.
		extra = append([]environment{cfg.env}, extra...)
		main := *cfg
		main.env = maps.Clone(cfg.env)
		for k := range main.env {
			if strings.HasPrefix(k, "STORAGE_USERS_") && strings.HasSuffix(k, "_ROOT") {
				delete(main.env, k)
			}
		}
		cfg = &main
		b.cfg = cfg
	}
	users, err := b.userStore(cfg, "users", "storage/users")
	if err != nil {
		return err
	}
	b.stores = append(b.stores, users)
	system, err := b.systemStore()
	if err != nil {
		return err
	}
	b.stores = append(b.stores, system)
	for _, e := range extra {
		vault := &config{product: b.cfg.product, dir: b.cfg.dir, docs: b.cfg.docs, env: e}
		st, err := b.userStore(vault, "users-vault", "storage/users-vault")
		if err != nil {
			return err
		}
		if rel, err := filepath.Rel(filepath.Join(b.inst.BasePath, "storage"), st.Root); err == nil && !strings.Contains(rel, "/") && rel != ".." && rel != "." {
			st.Name = rel
		}
		if b.knownRoot(st.Root) {
			continue
		}
		b.stores = append(b.stores, st)
	}
	if err := b.furtherStores(users.driver); err != nil {
		return err
	}
	return b.checkOverlap()
}

func (b *builder) knownRoot(root string) bool {
	return slices.ContainsFunc(b.stores, func(s *store) bool { return s.Root == root })
}

// furtherStores finds roots beside the configured ones, such as the vault of another process.
func (b *builder) furtherStores(like driver) error {
	dir := filepath.Join(b.loc.base.server, "storage")
	entries, err := os.ReadDir(b.s.serverPlace(dir, "").host)
	if err != nil {
		return nil // a storage directory is not needed if all roots lie elsewhere
	}
	for _, e := range entries {
		switch e.Name() {
		case "users", "metadata", "ocm", "owncloud", "uploadinfo":
			continue
		}
		pl := b.s.serverPlace(filepath.Join(dir, e.Name()), "")
		if b.knownRoot(pl.host) || !isDir(pl.host) {
			continue
		}
		p, err := probeRoot(pl.host)
		if err != nil {
			return readError("storage root", pl.host, err)
		}
		if !p.looksLikeRoot() {
			continue
		}
		d := b.driverByDisk(p, like)
		st := &store{place: pl, driver: d, probe: p}
		st.Store = ocis.Store{Name: e.Name(), Root: pl.host, Driver: d.name, Layout: d.layout, Prefix: b.prefix(d, p)}
		if d.s3 {
			if st.S3, err = b.s3Settings(b.cfg, d, value{}, pl.host); err != nil {
				return err
			}
		}
		b.warn("%s looks like a storage root that the configuration given does not name; it is taken as store %s with driver %s", pl.host, e.Name(), d.name)
		b.stores = append(b.stores, st)
	}
	return nil
}

// driverByDisk tells the driver that could have written a root. like decides where more than one can.
func (b *builder) driverByDisk(p *probe, like driver) driver {
	short := strings.TrimPrefix(p.prefix, "user.")
	name := map[bool]map[bool]string{
		false: {true: "ocis", false: "decomposed"}, // local blobs
		true:  {true: "s3ng", false: "decomposeds3"},
	}
	legacy := short == "ocis." || short == "" && b.cfg.product == ocis.OCIS
	var n string
	switch p.blobs() {
	case asFiles:
		n = "posix"
	case localBlob:
		n = name[false][legacy]
	case bucket:
		n = name[true][legacy]
	default:
		if n = like.name; n == "" || like.layout == ocis.Posix && p.decomposed {
			n = name[false][legacy]
		}
	}
	d, _ := driverOf(b.cfg.product, n)
	return d
}

// userStore resolves the driver and root of a storage-users process.
func (b *builder) userStore(cfg *config, name, rel string) (*store, error) {
	dv, err := cfg.get(userDriver)
	if err != nil {
		return nil, err
	}
	if dv.set && dv.text == "" {
		b.warn("%s is empty, with which the server does not start; the data on disk decides about the driver", dv.where())
		dv = value{}
	}
	if !dv.set {
		return b.userStoreByDisk(cfg, name, rel)
	}
	d, ok := driverOf(cfg.product, dv.text)
	if !ok {
		switch dv.text {
		case "owncloudsql", "kiteworks":
			return nil, dv.fail("holdfast does not know how to back up this driver: its data lies in a database or in another product", "")
		}
		return nil, dv.fail("there is no such driver", "The drivers are ocis, s3ng, posix, and of OpenCloud decomposed, decomposeds3, posix.")
	}
	rv, err := cfg.get(d.field("ROOT", "root"))
	if err != nil {
		return nil, err
	}
	st, err := b.openStore(name, rel, d, rv)
	if err != nil {
		return nil, err
	}
	if err := b.contradictions(st, dv); err != nil {
		return nil, err
	}
	if d.s3 {
		if st.S3, err = b.s3Settings(cfg, d, dv, st.Root); err != nil {
			return nil, err
		}
	}
	return st, nil
}

// userStoreByDisk finds out what wrote the data, because the default driver changed between versions.
func (b *builder) userStoreByDisk(cfg *config, name, rel string) (*store, error) {
	names := []string{"ocis", "s3ng", "posix"}
	if cfg.product == ocis.OpenCloud {
		// Last the default of the current version; it counts if there is no data at all.
		names = []string{"decomposed", "decomposeds3", "ocis", "s3ng", "posix"}
	}
	var fallback *store
	var foreign *SettingError
	for _, n := range names {
		d, _ := driverOf(cfg.product, n)
		rv, err := cfg.get(d.field("ROOT", "root"))
		if err != nil {
			return nil, err
		}
		st, err := b.openStore(name, rel, d, rv)
		if err != nil {
			return nil, err
		}
		if st.probe.posix && st.probe.decomposed && st.probe.attributes {
			return nil, &SettingError{Setting: "STORAGE_USERS_DRIVER", Problem: "is not set, and " + st.Root + " holds data of the posix driver and of a decomposed one",
				Hint: "Give the server's environment by --env-file, --unit, --container or --pid, or set the driver there."}
		}
		is := b.driverByDisk(st.probe, driver{})
		if st.probe.looksLikeRoot() || st.probe.posix {
			if is.kind != d.kind {
				foreign = &SettingError{Setting: "STORAGE_USERS_DRIVER",
					Problem: fmt.Sprintf("is not set, and %s holds data of the driver %s, which %s does not have", st.Root, is.name, cfg.product),
					Hint:    "Is the data that of this server? Name the right container, unit or configuration, or set the driver there."}
				continue
			}
			if d.s3 {
				if st.S3, err = b.s3Settings(cfg, d, value{}, st.Root); err != nil {
					return nil, err
				}
			}
			return st, nil
		}
		if fallback == nil || st.probe.exists && !fallback.probe.exists || n == b.defaultDriver() && st.probe.exists == fallback.probe.exists {
			fallback = st
		}
	}
	if fallback == nil {
		return nil, foreign
	}
	return fallback, nil
}

func (b *builder) defaultDriver() string {
	if b.cfg.product == ocis.OCIS {
		return "ocis"
	}
	if strings.HasPrefix(b.inst.Version, "1.") {
		return "decomposed"
	}
	return "posix"
}

// openStore looks at the root of a store.
func (b *builder) openStore(name, rel string, d driver, rv value) (*store, error) {
	def := b.s.serverPlace(filepath.Join(b.loc.base.server, rel), "")
	pl := def
	if rv.set {
		if rv.text == "" {
			return nil, rv.fail("is set but empty, so the server has no storage root", "Remove it, or name a directory.")
		}
		var err error
		if pl, err = b.s.valuePlace(rv); err != nil {
			return nil, err
		}
		if ok, err := exists(pl.host); err != nil || !ok && pl.host != def.host {
			if err != nil {
				return nil, pl.err("cannot be read: "+withoutPath(err).Error(), "Run holdfast as root, or as the user who owns the instance.")
			}
			return nil, pl.err("does not exist", b.mapHint(pl))
		}
		if !isDir(pl.host) && pl.host != def.host {
			return nil, pl.err("is no directory", "")
		}
	}
	p, err := b.probeOf(pl.host)
	if err != nil {
		return nil, readError("storage root", pl.host, err)
	}
	st := &store{place: pl, driver: d, probe: p, setting: rv.where()}
	st.Store = ocis.Store{Name: name, Root: pl.host, Driver: d.name, Layout: d.layout, Prefix: b.prefix(d, p)}
	return st, b.checkOld(st)
}

// probeOf remembers probes, because several drivers share one default root.
func (b *builder) probeOf(root string) (*probe, error) {
	if p, ok := b.probes[root]; ok {
		return p, nil
	}
	p, err := probeRoot(root)
	if err == nil {
		b.probes[root] = p
	}
	return p, err
}

// checkOld refuses the layout from before 2022.
func (b *builder) checkOld(st *store) error {
	if len(st.probe.old) == 0 {
		return nil
	}
	return &SettingError{Setting: "store " + st.Name, Value: st.Root,
		Problem: fmt.Sprintf("has the layout of servers before 2022 (%s), which holdfast does not read", strings.Join(st.probe.old, ", ")),
		Hint:    "Start the instance once with a version that migrates it (oCIS 2 or later), look that " + strings.Join(st.probe.old, " and ") + " are gone or empty, then back it up."}
}

// prefix of attributes: what is on disk, else what the driver writes.
func (b *builder) prefix(d driver, p *probe) string {
	switch {
	case p.prefix != "":
		return p.prefix
	case d.prefix != "":
		return d.prefix
	case b.cfg.product == ocis.OpenCloud:
		return "user.oc."
	}
	return "user.ocis."
}

// contradictions compares the configured driver with what is on disk.
func (b *builder) contradictions(st *store, dv value) error {
	p, d := st.probe, st.driver
	hint := "Correct the setting, or look whether this is the configuration that the server really has; if the storage root was meant to be another one, correct that."
	wrong := func(format string, args ...any) error {
		return dv.fail(fmt.Sprintf(format, args...), hint)
	}
	if d.layout == ocis.Posix {
		if p.decomposed && !p.posix {
			return wrong("the data in %s has the decomposed layout (spaces/ with nodes/), which this driver does not read", st.Root)
		}
		if p.posix && !p.attributes {
			b.warn("no folder in %s has the extended attributes of the posix driver; without them the server recognises no space (was it copied without attributes?)", st.Root)
		}
		return nil
	}
	switch {
	case p.posix && !p.decomposed:
		return wrong("the data in %s has the layout of the posix driver", st.Root)
	case p.prefix != "" && strings.TrimPrefix(d.prefix, "user.") != strings.TrimPrefix(p.prefix, "user."):
		return wrong("the attributes in %s begin with %s, but this driver writes %s", st.Root, p.prefix, d.prefix)
	case !d.s3 && p.present == 0 && p.absent >= minEvidence:
		return wrong("the blobs are not in %s (of %d files looked at, none has its content there), as if they lay in a bucket", st.Root, p.absent)
	case d.s3 && p.present >= minEvidence && p.absent == 0:
		return wrong("the blobs lie on disk in %s (all %d files looked at have their content there)", st.Root, p.present)
	case d.s3 && p.present > 0:
		b.warn("some blobs lie on disk in %s although the driver is %s: are they left from before a move to the bucket?", st.Root, d.name)
	}
	return nil
}

// minEvidence is how many nodes must agree before a configured driver is called wrong: one missing
// blob is damage, not another driver.
const minEvidence = 2

func (b *builder) systemStore() (*store, error) {
	dv, err := b.cfg.get(systemDriver)
	if err != nil {
		return nil, err
	}
	name := "ocis"
	if b.cfg.product == ocis.OpenCloud {
		name = "decomposed"
	}
	if dv.text != "" {
		name = dv.text
	}
	d, ok := driverOf(b.cfg.product, name)
	if !ok || d.s3 || d.layout != ocis.Decomposed {
		return nil, dv.fail("the system storage cannot have this driver", "It is ocis, or of OpenCloud decomposed.")
	}
	rv, err := b.cfg.get(systemRoot(b.cfg.product))
	if err != nil {
		return nil, err
	}
	st, err := b.openStore("system", "storage/metadata", d, rv)
	if err != nil {
		return nil, err
	}
	if dv.set && dv.text != "" {
		return st, b.contradictions(st, dv)
	}
	if st.probe.prefix != "" && strings.TrimPrefix(st.probe.prefix, "user.") == "ocis." {
		st.driver, _ = driverOf(b.cfg.product, "ocis")
		st.Driver = "ocis"
	}
	return st, nil
}

// s3Settings reads how to reach the bucket. dv is the driver's setting, unset if the disk decided.
func (b *builder) s3Settings(cfg *config, d driver, dv value, root string) (*ocis.S3, error) {
	if s3, ok := b.buckets[d.kind]; ok && cfg == b.cfg {
		return s3, nil
	}
	s := &ocis.S3{}
	var missing []string
	var first error
	text := func(suffix, key, def string) string {
		v, err := cfg.get(d.field(suffix, key))
		if err != nil && first == nil {
			first = err
		}
		if !v.set {
			return def
		}
		return v.text
	}
	number := func(suffix, key string, def int64) int64 {
		v, err := cfg.get(d.field(suffix, key))
		if err != nil && first == nil {
			first = err
		}
		if !v.set || v.text == "" {
			return def
		}
		n, err := strconv.ParseInt(v.text, 10, 64)
		if err != nil && first == nil {
			first = v.fail("is no whole number", "")
		}
		return n
	}
	flag := func(suffix, key string, def bool) bool {
		v, err := cfg.get(d.field(suffix, key))
		if err != nil && first == nil {
			first = err
		}
		if !v.set || v.text == "" {
			return def
		}
		on, err := strconv.ParseBool(v.text)
		if err != nil && first == nil {
			first = v.fail("is neither true nor false", "")
		}
		return on
	}
	needed := func(suffix, key string) string {
		v := text(suffix, key, "")
		if v == "" {
			missing = append(missing, "STORAGE_USERS_"+d.part+"_"+suffix)
		}
		return v
	}
	s.Endpoint = needed("ENDPOINT", "endpoint")
	s.Bucket = needed("BUCKET", "bucket")
	s.AccessKey = needed("ACCESS_KEY", "access_key")
	s.SecretKey = needed("SECRET_KEY", "secret_key")
	s.Region = text("REGION", "region", "default")
	s.PartSize = number("PUT_OBJECT_PART_SIZE", "put_object_part_size", 0)
	s.Threads = number("PUT_OBJECT_NUM_THREADS", "put_object_num_threads", 4)
	s.DisableMultipart = flag("PUT_OBJECT_DISABLE_MULTIPART", "put_object_disable_multipart", false)
	s.DisableContentSHA256 = flag("PUT_OBJECT_DISABLE_CONTENT_SHA256", "put_object_disable_content_sha256", false)
	s.SendContentMD5 = flag("PUT_OBJECT_SEND_CONTENT_MD5", "put_object_send_content_md5", true)
	s.ConcurrentParts = flag("PUT_OBJECT_CONCURRENT_STREAM_PARTS", "put_object_concurrent_stream_parts", true)
	if first != nil {
		return nil, first
	}
	if len(missing) > 0 {
		return nil, b.missingS3(cfg, d, dv, root, missing)
	}
	if cfg == b.cfg {
		b.buckets[d.kind] = s
	}
	return s, nil
}

func (b *builder) missingS3(cfg *config, d driver, dv value, root string, missing []string) error {
	hint := "Give the server's environment, where the bucket's settings usually stand: --env-file, --unit, --container, --compose or --pid."
	for k := range cfg.env {
		for _, other := range []string{"S3NG", "DECOMPOSEDS3"} {
			if other != d.part && strings.HasPrefix(k, "STORAGE_USERS_"+other+"_") {
				hint = fmt.Sprintf("%s is set, but the driver %s of %s reads the variables STORAGE_USERS_%s_*.", k, d.name, cfg.product, d.part)
			}
		}
	}
	problem := "the settings of the bucket are missing: " + strings.Join(missing, ", ")
	if dv.set {
		return dv.fail("the driver keeps blobs in a bucket, but "+problem, hint)
	}
	return &SettingError{Setting: "STORAGE_USERS_DRIVER", Hint: hint,
		Problem: fmt.Sprintf("is not set, the contents named in %s are not there and seem to lie in a bucket, but %s", root, problem)}
}

// checkOverlap refuses roots that cannot be told apart: every entry belongs to exactly one store.
func (b *builder) checkOverlap() error {
	for _, s := range b.stores {
		for _, inner := range []struct{ what, path string }{{"the base data path", b.inst.BasePath}, {"the configuration directory", b.inst.ConfigDir}} {
			if inner.path != "" && mountinfo.Below(inner.path, s.Root) {
				return s.place.err(fmt.Sprintf("the storage root contains %s %s", inner.what, inner.path), "Move one of them.")
			}
		}
		for _, t := range b.stores {
			if s != t && mountinfo.Below(t.Root, s.Root) {
				return s.place.err(fmt.Sprintf("the storage root of store %s contains that of store %s, %s", s.Name, t.Name, t.Root), "Each store needs a directory of its own.")
			}
		}
	}
	return nil
}
