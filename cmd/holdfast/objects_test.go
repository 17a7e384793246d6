package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/minio/minio-go/v7"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast-backup/holdfast/internal/s3"
)

// objects make BUCKET: makes a bucket of the server that s3server has started.
// objects load BUCKET DIR: puts the files below DIR into a new bucket.
// objects damage BUCKET: deletes three of its objects, cuts three short and alters three.
// objects equal BUCKET DIR: the bucket has the files below DIR and nothing else.
func cmdObjects(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: objects make|load|damage|equal BUCKET [DIR]")
	}
	ctx := context.Background()
	c, err := s3.New(ctx, s3.Options{Endpoint: ts.Getenv("S3"), Region: ts.Getenv("AWS_DEFAULT_REGION"), Style: s3.StylePath,
		AccessKey: ts.Getenv("S3_ACCESS"), SecretKey: ts.Getenv("S3_SECRET")})
	ts.Check(err)
	defer c.Close()
	name := args[1]
	put := func(key string, data []byte) {
		_, err := c.PutObject(ctx, name, key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
		ts.Check(err)
	}
	switch {
	case args[0] == "make" && len(args) == 2, args[0] == "load" && len(args) == 3:
		ts.Check(c.MakeBucket(ctx, name, minio.MakeBucketOptions{}))
		if len(args) == 3 {
			for key, data := range filesBelow(ts, args[2]) {
				put(key, data)
			}
		}
	case args[0] == "damage" && len(args) == 2:
		have := objectsOf(ctx, ts, c, name)
		n := 0
		for _, key := range slices.Sorted(maps.Keys(have)) {
			data := have[key]
			if len(data) < 10 {
				continue
			}
			switch n / 3 {
			case 0:
				ts.Check(c.RemoveObject(ctx, name, key, minio.RemoveObjectOptions{}))
			case 1:
				put(key, data[:5])
			case 2:
				data[3] ^= 0xff
				put(key, data)
			}
			n++
		}
	case args[0] == "equal" && len(args) == 3:
		have, want := objectsOf(ctx, ts, c, name), filesBelow(ts, args[2])
		for key, data := range want {
			if got, ok := have[key]; !ok || !bytes.Equal(got, data) {
				ts.Fatalf("object %s of %s: there %v, %d bytes, want %d", key, name, ok, len(got), len(data))
			}
		}
		for key := range have {
			if _, ok := want[key]; !ok {
				ts.Fatalf("object %s of %s should not be there", key, name)
			}
		}
		fmt.Fprintf(ts.Stdout(), "%d objects\n", len(have))
	default:
		ts.Fatalf("objects %q?", args)
	}
}

func filesBelow(ts *testscript.TestScript, dir string) map[string][]byte {
	out := map[string][]byte{}
	root := ts.MkAbs(dir)
	ts.Check(filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		key, err := filepath.Rel(root, path)
		if err == nil {
			out[key], err = os.ReadFile(path)
		}
		return err
	}))
	return out
}

func objectsOf(ctx context.Context, ts *testscript.TestScript, c *s3.Client, name string) map[string][]byte {
	out := map[string][]byte{}
	for o := range c.ListObjectsIter(ctx, name, minio.ListObjectsOptions{Recursive: true}) {
		ts.Check(o.Err)
		r, err := c.GetObject(ctx, name, o.Key, minio.GetObjectOptions{})
		ts.Check(err)
		data, err := io.ReadAll(r)
		r.Close()
		ts.Check(err)
		out[o.Key] = data
	}
	return out
}
