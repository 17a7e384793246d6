package mem_test

import (
	"context"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
)

func TestLaws(t *testing.T) {
	backendtest.Run(t, func(*testing.T) backend.Backend { return mem.New() })
}

func TestClone(t *testing.T) {
	ctx := context.Background()
	a := mem.New()
	h := backend.Handle{Type: backend.ConfigFile}
	if err := a.Save(ctx, h, []byte("x")); err != nil {
		t.Fatal(err)
	}
	b := a.Clone()
	if err := a.Remove(ctx, h); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Stat(ctx, h); err != nil {
		t.Errorf("the copy changed with the original: %v", err)
	}
}
