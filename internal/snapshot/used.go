package snapshot

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// BlobsLoader loads many blobs, several at once. *repo.Repository is one.
type BlobsLoader interface {
	LoadBlobs(ctx context.Context, t repo.BlobType, ids []id.ID, fn func(d id.ID, data []byte) error) error
}

// usedBatch is how many trees are asked for at a time: enough to read neighbours in one piece.
const usedBatch = 2048

// usedNode is the part of a node that names blobs.
type usedNode struct {
	Type    NodeType `json:"type"`
	Content []id.ID  `json:"content"`
	Subtree *id.ID   `json:"subtree"`
}

// Used calls mark for every blob that the trees in roots need. mark reports whether a blob is there and was not
// marked before: a tree is read only then, so each is read once, however many snapshots share it. mark is
// called concurrently. Memory: 32 bytes for each tree that is known and not yet read, and some trees.
func Used(ctx context.Context, l BlobsLoader, roots []id.ID, mark func(repo.BlobType, id.ID) bool, sink progress.Sink) error {
	ev := progress.Event{Kind: progress.Start, Phase: "scan", Unit: "folders"}
	sink.Emit(ev)
	var mu sync.Mutex
	var todo []id.ID // guarded by mu
	for _, d := range roots {
		if mark(repo.TreeBlob, d) {
			todo = append(todo, d)
		}
	}
	for len(todo) > 0 {
		// From the end, so that what waits stays short.
		n := min(len(todo), usedBatch)
		batch := append([]id.ID(nil), todo[len(todo)-n:]...)
		todo = todo[:len(todo)-n]
		err := l.LoadBlobs(ctx, repo.TreeBlob, batch, func(d id.ID, data []byte) error {
			var t struct {
				Nodes []usedNode `json:"nodes"`
			}
			err := json.Unmarshal(data, &t)
			if err == nil && t.Nodes == nil {
				err = errNoNodes
			}
			if err != nil {
				return fmt.Errorf("tree %s: %w", d.Short(), err)
			}
			var below []id.ID
			for i := range t.Nodes {
				switch x := &t.Nodes[i]; x.Type {
				case File:
					for _, b := range x.Content {
						mark(repo.DataBlob, b)
					}
				case Dir:
					if x.Subtree == nil {
						return fmt.Errorf("tree %s: a folder without a tree", d.Short())
					}
					if mark(repo.TreeBlob, *x.Subtree) {
						below = append(below, *x.Subtree)
					}
				}
			}
			mu.Lock()
			todo = append(todo, below...)
			ev.Kind, ev.Done = progress.Update, ev.Done+1
			e := ev
			mu.Unlock()
			sink.Emit(e)
			return nil
		})
		if err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	ev.Kind, ev.Total = progress.Finish, ev.Done
	sink.Emit(ev)
	return nil
}
