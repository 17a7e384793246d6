// Command gen makes an instance of any size to try backups on:
//
//	go run ./bench/gen -files 20000 -bytes 4GB -dir /var/tmp/instance
//	go run ./bench/gen -dir /var/tmp/instance -mutate 0.01
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/holdfast-backup/holdfast/bench/internal/measure"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/storegen"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func run() error {
	var o storegen.Options
	size := measure.Bytes(4e9)
	flag.StringVar(&o.Dir, "dir", "", "directory to make; data/ and config/ are put into it")
	flag.Uint64Var(&o.Seed, "seed", 1, "number that everything follows from")
	flag.IntVar(&o.Files, "files", 20000, "users' files")
	flag.Var(&size, "bytes", "size of all blobs together, such as 4GB or 512MiB")
	flag.IntVar(&o.Spaces, "spaces", 0, "users' spaces; 0: one for 500 files, at least 4")
	product := flag.String("product", "opencloud", "ocis or opencloud")
	mutate := flag.Float64("mutate", 0, "instead of making an instance, change this fraction of the one in -dir")
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if o.Dir == "" {
		return errors.New("-dir is missing: name the directory to make")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	if *mutate != 0 {
		c, err := storegen.Mutate(ctx, o.Dir, o.Seed, *mutate)
		if err != nil {
			return err
		}
		return out.Encode(c)
	}
	switch *product {
	case "ocis":
		o.Prefix = ocis.PrefixOCIS
	case "opencloud":
		o.Prefix = ocis.PrefixOpenCloud
	default:
		return fmt.Errorf("-product %q is neither ocis nor opencloud", *product)
	}
	o.Bytes = int64(size)
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return err
	}
	if err := measure.NeedSpace(o.Dir, measure.StoreNeeds(o.Files, o.Bytes)); err != nil {
		return err
	}
	o.Progress = func(done, total int) { fmt.Fprintf(os.Stderr, "\r%d of %d files", done, total) }
	s, err := storegen.Generate(ctx, o)
	fmt.Fprintln(os.Stderr)
	if err != nil {
		return err
	}
	s.FilesPerSpace = nil
	return out.Encode(s)
}
