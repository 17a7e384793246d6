package discover

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Discover finds the instance that o leads to. Paths of services' log files are left alone: logs are
// no data of an instance.
//
// Errors: *SettingError for a setting that cannot be right or a file that cannot be read;
// *NoInstanceError if nothing was found; *AmbiguousError if more than one instance was found; the
// cancellation of ctx.
func Discover(ctx context.Context, o Options) (*ocis.Instance, error) {
	o.Progress.Emit(progress.Event{Kind: progress.Start, Phase: "discover"})
	s, err := gather(ctx, &o)
	if err != nil {
		return nil, err
	}
	loc, err := s.locate(&o)
	if err != nil {
		return nil, err
	}
	b := &builder{o: &o, s: s, loc: loc, probes: map[string]*probe{}, buckets: map[string]*ocis.S3{}}
	b.cfg = &config{product: loc.product, env: s.env, dir: loc.config.host}
	b.inst = &ocis.Instance{Product: loc.product, BasePath: loc.base.host, ConfigDir: loc.config.host, Setup: "posix", Software: s.soft}
	if loc.base.server != loc.base.host {
		b.inst.ServerBasePath = loc.base.server
	}
	if loc.config.server != loc.config.host {
		b.inst.ServerConfigDir = loc.config.server
	}
	b.version(ctx)
	if err := b.build(ctx); err != nil {
		return nil, err
	}
	o.Progress.Emit(progress.Event{Kind: progress.Finish, Phase: "discover"})
	return b.inst, context.Cause(ctx)
}

func (b *builder) build(ctx context.Context) error {
	if err := b.checkConfig(); err != nil {
		return err
	}
	if err := b.storesOf(); err != nil {
		return err
	}
	if err := b.checkInstance(); err != nil {
		return err
	}
	if err := b.dataSets(); err != nil {
		return err
	}
	url, err := b.cfg.get(field{global: []string{string(b.cfg.product) + "_url"}, env: []string{"{P}_URL"}})
	if err != nil {
		return err
	}
	if b.inst.URL = url.text; url.text == "" {
		b.inst.URL = "https://localhost:9200" // the product's default
	}
	for _, st := range b.stores {
		if st.S3 != nil {
			b.inst.Setup = "s3"
		}
	}
	if err := b.places(); err != nil {
		return err
	}
	if !b.o.NoSizes {
		if err := b.measure(ctx); err != nil {
			return err
		}
	}
	b.inst.DataSets = b.sets
	b.inst.Environment = b.s.files
	b.inst.Warnings = append(b.s.warnings, b.cfg.warnings...)
	for _, w := range b.inst.Warnings {
		b.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "discover", Message: w})
	}
	return nil
}

// checkConfig looks at the configuration directory as a whole.
func (b *builder) checkConfig() error {
	if _, err := b.cfg.document(mainName(b.cfg.product)); err != nil {
		return err
	}
	if b.loc.config.host != "" && !hasMainYAML(b.loc.config.host, b.cfg.product) {
		b.warn("there is no %s.yaml in %s; its secrets and ids must stand in the server's environment, which holdfast saves if it is given", mainName(b.cfg.product), b.loc.config.host)
	}
	return nil
}

// checkInstance refuses a base data path that holds nothing of an instance.
func (b *builder) checkInstance() error {
	if marked(b.inst.BasePath) {
		return nil
	}
	for _, s := range b.stores {
		if s.probe.looksLikeRoot() {
			return nil
		}
	}
	e := &NoInstanceError{Problem: fmt.Sprintf("%s holds no instance of Infinite Scale or OpenCloud", b.inst.BasePath)}
	for _, m := range markers {
		e.Looked = append(e.Looked, filepath.Join(b.inst.BasePath, m))
	}
	e.Hint = fmt.Sprintf("Is it the directory that holds storage/ and idm/? If the server runs in a container, give --container or --compose, or name the place on this host: --map %s=/path/on/this/host.", b.loc.base.server)
	return e
}

// version asks what runs the instance for its version.
func (b *builder) version(ctx context.Context) {
	run := b.o.RunVersion
	if run == nil {
		run = runVersion
	}
	if bin := b.s.soft.Binary; bin != "" && (b.o.ServerBinary != "" || binaryProduct(bin) != "") {
		v, err := run(ctx, bin)
		if err == nil {
			b.inst.Version = v
			return
		}
		var u *untrustedError
		if errors.As(err, &u) {
			b.warn("the version of the server could not be asked for: %v", err)
		} else if ctx.Err() == nil {
			b.warn("the version of the server could not be told: %v", err)
		}
	}
	b.inst.Version = b.s.imageVersion
}

// places finds the filesystem of each data set.
func (b *builder) places() error {
	t, err := mountinfo.Self()
	if err != nil {
		return fmt.Errorf("read the mount table: %w", err)
	}
	for i := range b.sets {
		d := &b.sets[i]
		if m, ok := t.Find(d.Path); ok {
			d.Filesystem, d.Mount = m.Type, m.Point
		}
	}
	return nil
}
