package main

import (
	"context"
	"strconv"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// history REPO N: as if the latest snapshot had been made on each of the N days before it, too.
func cmdHistory(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: history REPO N")
	}
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	ctx := context.Background()
	r, err := repo.Open(ctx, local.New(ts.MkAbs(args[0])), "a good password", repo.Options{})
	ts.Check(err)
	list, err := snapshot.List(ctx, r)
	ts.Check(err)
	for i := range n {
		s := *list[len(list)-1]
		s.Time = s.Time.Add(-time.Duration(i+1) * 24 * time.Hour)
		ts.Check(snapshot.Save(ctx, r, &s))
	}
}
