package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// placeFlags are the flags that say where an instance lies; backup and discover share them all.
type placeFlags struct {
	baseDataPath, configDir string
	maps                    []string
	envFiles                []string
	pid                     int
	unit                    string
	compose                 []string
	composeService          string
	container               string
	serverBinary            string
}

func (p *placeFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&p.baseDataPath, "base-data-path", "", "base data `directory` of the instance on this machine")
	f.StringVar(&p.configDir, "config-dir", "", "configuration `directory` of the instance on this machine")
	f.StringArrayVar(&p.maps, "map", nil, "what the server calls SERVER is HOST on this machine: `SERVER=HOST`; may be repeated")
	f.StringArrayVar(&p.envFiles, "env-file", nil, "environment `file` of the server, in Docker's or systemd's syntax; may be repeated")
	f.IntVar(&p.pid, "pid", 0, "process `id` of the running server, whose environment is read")
	f.StringVar(&p.unit, "unit", "", "systemd `unit` of the server")
	f.StringArrayVar(&p.compose, "compose", nil, "compose `file` of the server, or its directory; may be repeated")
	f.StringVar(&p.composeService, "compose-service", "", "the compose `service` that runs the server")
	f.StringVar(&p.container, "container", "", "Docker `container` of the server, by name or id")
	f.StringVar(&p.serverBinary, "server-binary", "", "the server's program `file`")
}

func (p *placeFlags) options(a *app) (discover.Options, error) {
	o := discover.Options{
		EnvFiles: p.envFiles, PID: p.pid, BaseDataPath: p.baseDataPath, ConfigDir: p.configDir, Unit: p.unit,
		Compose: p.compose, ComposeService: p.composeService, Container: p.container, ServerBinary: p.serverBinary,
		Environ: a.environ, Progress: a.ui.Sink(),
	}
	if p.pid < 0 {
		return o, usageError("--pid %d is no process id", p.pid)
	}
	for _, dir := range []*string{&o.BaseDataPath, &o.ConfigDir} {
		if *dir != "" {
			abs, err := filepath.Abs(*dir)
			if err != nil {
				return o, err
			}
			*dir = abs
		}
	}
	var err error
	o.Map, err = parseMaps(p.maps)
	return o, err
}

func parseMaps(list []string) ([]discover.PathMap, error) {
	var out []discover.PathMap
	for _, s := range list {
		m, err := discover.ParseMap(s)
		if err != nil {
			return nil, withCode(exitUsage, fmt.Errorf("--map: %w", err))
		}
		out = append(out, m)
	}
	return out, nil
}

func (a *app) discoverCommand() *cobra.Command {
	var p placeFlags
	var noSizes, noBucket bool
	c := &cobra.Command{
		Use:   "discover",
		Short: "Show what belongs to an instance, and where it lies",
		Long: `Show what belongs to an instance: each data set with its location, filesystem, size,
and what happens if it is left out. The configuration is read as the server reads it.
Nothing is changed.

If the blobs lie in a bucket, it is asked whether its keys have the rights of the vendor's
bucket policy, without leaving anything in it: to list, get, put and delete objects. A
backup needs the first two.

Without flags the default places of Infinite Scale and OpenCloud are tried.

` + exitHelp(exitDone, exitError, exitUsage, exitInterrupted),
		Example: `  holdfast discover --base-data-path /srv/ocis/data --config-dir /srv/ocis/config
  holdfast discover --unit opencloud.service
  holdfast discover --compose /srv/ocis/docker-compose.yml --json`,
		Args: args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			o, err := p.options(a)
			if err != nil {
				return err
			}
			o.NoSizes = noSizes
			inst, err := discover.Discover(ctx, o)
			if err != nil {
				return explain(ctx, fmt.Errorf("cannot find the instance: %w", err))
			}
			a.showInstance(inst, !noSizes)
			if noBucket {
				return nil
			}
			return a.showAccess(ctx, inst)
		}),
	}
	p.add(c)
	c.Flags().BoolVar(&noBucket, "no-bucket", false, "do not ask the bucket what its keys may do")
	c.Flags().BoolVar(&noSizes, "no-sizes", false, "do not count entries and bytes, which takes a while on large instances")
	return c
}

func (a *app) showInstance(inst *ocis.Instance, sizes bool) {
	if a.ui.JSON() {
		a.ui.Object(struct {
			Event string `json:"event"`
			*ocis.Instance
		}{"instance", inst})
		return
	}
	for _, w := range inst.Warnings {
		a.ui.Warn("%s", w)
	}
	setup := map[string]string{"posix": "everything on filesystems", "s3": "blobs in an S3 bucket, the rest on filesystems"}[inst.Setup]
	var lines []string
	field := func(name, value string) {
		if value != "" {
			lines = append(lines, fmt.Sprintf("%-15s %s", name+":", value))
		}
	}
	field("product", strings.TrimSpace(string(inst.Product)+" "+inst.Version))
	field("setup", setup)
	field("base data path", ui.Quote(inst.BasePath))
	field("config dir", ui.Quote(inst.ConfigDir))
	field("url", quoteOrBlank(inst.URL))
	sw := inst.Software
	field("binary", quoteOrBlank(sw.Binary))
	field("container", quoteOrBlank(sw.Container))
	field("image", strings.TrimSpace(quoteOrBlank(sw.Image)+" "+sw.ImageDigest))
	for _, s := range inst.Stores {
		field("store "+ui.Quote(s.Name), fmt.Sprintf("%s, driver %s, layout %s", ui.Quote(s.Root), ui.Quote(s.Driver), s.Layout))
	}
	for _, e := range inst.Environment {
		from := "from inspection"
		if e.Path != "" {
			from = ui.Quote(e.Path)
		}
		field("environment", ui.Quote(e.Name)+", "+from)
	}
	lines = append(lines, "")

	head := []string{"Data set", "Kind", "Class", "Found"}
	if sizes {
		head = append(head, ">Entries", ">Size")
	}
	head = append(head, "Filesystem", "Mount", "Location")
	var rows [][]string
	var left []string
	for _, d := range inst.DataSets {
		found := "yes"
		if !d.Found {
			found = "MISSING"
			if d.Class != ocis.Required {
				found = "no"
			}
		}
		row := []string{ui.Quote(d.Name), string(d.Kind), string(d.Class), found}
		if sizes {
			row = append(row, fmt.Sprint(d.Entries), ui.Bytes(d.Bytes))
		}
		rows = append(rows, append(row, quoteOrBlank(d.Filesystem), quoteOrBlank(d.Mount), ui.Quote(d.Path)))
		if d.IfMissing != "" {
			left = append(left, fmt.Sprintf("  %s: %s", ui.Quote(d.Name), ui.Clean(d.IfMissing)))
		}
		if a.ui.Verbose() && d.Setting != "" {
			left = append(left, fmt.Sprintf("  %s: its place is set by %s", ui.Quote(d.Name), ui.Clean(d.Setting)))
		}
	}
	lines = append(lines, ui.Table(head, rows)...)
	if len(left) > 0 {
		lines = append(append(lines, "", "What happens if a data set is left out:"), left...)
	}
	a.ui.Text(lines...)
}
