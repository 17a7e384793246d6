package main

import (
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/spf13/pflag"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/replica"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// replicaFlags are the flags of prune about replicas (backup --blobs replica).
type replicaFlags struct {
	place bucketFlags
	claim bool
	// gone are the replicas of snapshots that were removed just now.
	gone []snapshot.BucketPlace
}

func (f *replicaFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&f.place.bucket, "replica-bucket", "", "`name` of a replica to clean up as well, if no snapshot names it any more")
	fs.StringVar(&f.place.endpoint, "replica-endpoint", "", "`URL` of its server")
	fs.StringVar(&f.place.region, "replica-region", "", "its `region`")
	fs.BoolVar(&f.place.pathStyle, "replica-path-style", false, "address it by a path, not by a host name")
	fs.BoolVar(&f.claim, "replica-claim", false, "a replica that was not empty at first holds nothing of anybody else's")
}

// replicaKeysHint says where the keys of a replica come from.
const replicaKeysHint = "Set " + replicaAccessKey + " and " + replicaSecretKey + "."

// replicaKeys are the keys of a replica, "" if there are none.
func (a *app) replicaKeys() (id, key string, err error) {
	if id, key, err = a.keys(replicaAccessKey, replicaSecretKey); err != nil || id != "" {
		return id, key, err
	}
	return a.bucketKeys()
}

// pruneReplicas removes from the replicas that snapshots name what the remaining ones do not need.
func (a *app) pruneReplicas(ctx context.Context, r *repo.Repository, list []*snapshot.Snapshot, f *replicaFlags, dryRun bool) error {
	needed, err := replica.Collect(ctx, r, list, a.ui.Sink())
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case len(needed.Replicas)+len(f.gone) == 0 && f.place.bucket == "":
		return nil // as far as can be seen there is no replica
	default:
		return fmt.Errorf("no object of a replica was removed: %w", err)
	}
	places := needed.Replicas
	for _, p := range f.gone {
		if !slices.ContainsFunc(places, func(known snapshot.BucketPlace) bool { return replica.SamePlace(known, p) }) {
			places = append(places, p)
		}
	}
	if p := f.place; p.bucket != "" {
		named := snapshot.BucketPlace{Endpoint: p.endpoint, Region: p.region, Bucket: p.bucket, PathStyle: p.pathStyle}
		// As for backup, the server is that of the instance's bucket if no other one is named.
		if named.Endpoint == "" && len(needed.Sources) == 1 {
			named.Endpoint, named.Region = needed.Sources[0].Endpoint, needed.Sources[0].Region
		}
		known := slices.ContainsFunc(places, func(p snapshot.BucketPlace) bool {
			return replica.SamePlace(p, named) || named.Endpoint == "" && p.Bucket == named.Bucket
		})
		switch {
		case known:
		case named.Endpoint == "":
			a.ui.Info("replica bucket %s was not looked at: no snapshot names it, and --replica-endpoint does not say where it is", ui.Quote(p.bucket))
		default:
			places = append(places, named)
		}
	}
	var failed error
	for _, p := range places {
		if err := a.pruneReplica(ctx, r, needed, p, f.claim, dryRun); err != nil {
			if ctx.Err() != nil {
				return err
			}
			if failed != nil {
				a.ui.Warn("%v", failed)
			}
			failed = err
		}
	}
	return failed
}

// replicaObject is what became of one replica, in JSON.
type replicaObject struct {
	Event  string `json:"event"`
	DryRun bool   `json:"dry_run"`
	*replica.Result
}

func (a *app) pruneReplica(ctx context.Context, r *repo.Repository, needed *replica.Needed, p snapshot.BucketPlace, claim, dryRun bool) error {
	id, key, err := a.replicaKeys()
	if err != nil {
		return err
	}
	var res *replica.Result
	if id == "" {
		res = &replica.Result{Bucket: p.Bucket, Endpoint: p.Endpoint, Refused: "its keys are not known (" + replicaAccessKey + " and " + replicaSecretKey + ")"}
	} else {
		b, oerr := a.openPlace(ctx, p, id, key)
		if oerr != nil {
			return fmt.Errorf("replica %s: %w", ui.Quote(p.Bucket), oerr)
		}
		defer b.Close()
		res, err = replica.Remove(ctx, b, needed, replica.Options{
			Repository: r.ID(), Claim: claim, DryRun: dryRun, Confirm: r.ConfirmExclusive, Progress: a.ui.Sink(),
		})
		if res == nil {
			return fmt.Errorf("replica %s: %w", ui.Quote(p.Bucket), err)
		}
	}
	switch {
	case a.ui.JSON():
		a.ui.Object(replicaObject{"replica", dryRun, res})
	case !a.ui.Quiet():
		a.ui.Text(replicaLines(res, dryRun)...)
	}
	if res.Missing > 0 {
		a.ui.Warn("%s that snapshots need are not in replica %s; `holdfast check` tells which", ui.Count(res.Missing, "object"), ui.Quote(p.Bucket))
	}
	if err != nil {
		return fmt.Errorf("replica %s: %w", ui.Quote(p.Bucket), err)
	}
	return nil
}

func replicaLines(s *replica.Result, dryRun bool) []string {
	amount := func(x repo.Amount) string {
		return fmt.Sprintf("%s, %s", ui.Count(x.Count, "object"), ui.Bytes(x.Bytes))
	}
	lines := []string{"replica " + ui.Quote(s.Bucket) + " at " + ui.Clean(s.Endpoint) + ":"}
	if s.Refused != "" {
		return append(lines, "  nothing removed: "+ui.Clean(s.Refused))
	}
	removed := "  removed:    "
	if dryRun {
		removed = "  to remove:  "
	}
	lines = append(lines, "  needed:     "+amount(s.Needed), removed+amount(s.Removed))
	if s.Newer.Count > 0 {
		lines = append(lines, "  left alone: "+amount(s.Newer)+", newer than the last backup: the next one tells whether they are needed")
	}
	if s.Foreign.Count > 0 {
		lines = append(lines, "  left alone: "+amount(s.Foreign)+", whose names are not the product's")
	}
	if s.Versions && s.Removed.Count > 0 {
		lines = append(lines, "  The bucket keeps what is removed as old versions, until a rule of its life cycle ends them.")
	}
	return lines
}

// joinReplicas leaves the marker of the repository that takes copies of snapshots in each replica that they need, so
// that their objects stay.
func (a *app) joinReplicas(ctx context.Context, from, to *repo.Repository, list []*snapshot.Snapshot) error {
	places, err := replicaPlaces(ctx, from, list)
	if err != nil {
		return err
	}
	for _, p := range places {
		id, key, err := a.replicaKeys()
		if err != nil {
			return err
		}
		fail := func(err error) error {
			return fmt.Errorf("nothing was copied: snapshots need objects in replica %s, and the other repository cannot be noted there: %w", ui.Quote(p.Bucket), err)
		}
		var b *bucket.Bucket
		if b, err = a.openPlace(ctx, p, id, key); err != nil {
			return ui.WithHints(fail(err), replicaKeysHint, "Without its marker there, a prune of this repository could remove what the copies need.")
		}
		host, _ := os.Hostname()
		_, err = replica.Join(ctx, b, to.ID(), host)
		b.Close()
		if err != nil {
			return fail(err)
		}
	}
	return nil
}

// replicaPlaces lists the replicas that snapshots name. What cannot be read is passed over.
func replicaPlaces(ctx context.Context, r *repo.Repository, list []*snapshot.Snapshot) (places []snapshot.BucketPlace, err error) {
	for _, s := range list {
		if s.Tree == nil || !s.HasTag(snapshot.Tag) {
			continue
		}
		m, err := snapshot.LoadManifest(ctx, r, *s.Tree)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			continue
		}
		for i := range m.Stores {
			b := m.Stores[i].Bucket
			if b != nil && b.Way == snapshot.WayReplica && b.Replica != nil &&
				!slices.ContainsFunc(places, func(p snapshot.BucketPlace) bool { return replica.SamePlace(p, *b.Replica) }) {
				places = append(places, *b.Replica)
			}
		}
	}
	return places, nil
}
