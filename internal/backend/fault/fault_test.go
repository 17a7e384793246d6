package fault_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

func TestLawsWithoutFaults(t *testing.T) {
	backendtest.Run(t, func(*testing.T) backend.Backend { return fault.New(mem.New()) })
}

func TestEffects(t *testing.T) {
	ctx := context.Background()
	data := []byte("0123456789")
	h := backend.Handle{Type: backend.PackFile, Name: id.Hash(data).String()}
	fb := fault.New(mem.New(), fault.Fault{Op: fault.Load, N: 1, Effect: fault.Short},
		fault.Fault{Op: fault.Load, N: 2, Effect: fault.Corrupt}, fault.Fault{Op: fault.Save, N: 2, Effect: fault.Fail})
	if err := fb.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	if got, err := backendtest.ReadAll(ctx, fb, h); err != nil || string(got) != "01234" {
		t.Errorf("short: %q, %v", got, err)
	}
	if got, err := backendtest.ReadAll(ctx, fb, h); err != nil || len(got) != 10 || bytes.Equal(got, data) {
		t.Errorf("corrupt: %q, %v", got, err)
	}
	if got, err := backendtest.ReadAll(ctx, fb, h); err != nil || !bytes.Equal(got, data) {
		t.Errorf("whole: %q, %v", got, err)
	}
	if left := fb.Unfired(); len(left) != 1 || left[0].Op != fault.Save {
		t.Errorf("unfired: %v", left)
	}
}

func TestKill(t *testing.T) {
	ctx := context.Background()
	for _, after := range []bool{false, true} {
		m := mem.New()
		fb := fault.New(m)
		if after {
			fb.KillAfter(2)
		} else {
			fb.KillBefore(2)
		}
		for i, s := range []string{"a", "b", "c"} {
			h := backend.Handle{Type: backend.PackFile, Name: id.Hash([]byte(s)).String()}
			err := fb.Save(ctx, h, []byte(s))
			if (i == 0) != (err == nil) || (i > 0 && !errors.Is(err, fault.ErrKilled)) {
				t.Errorf("Save %d: %v", i, err)
			}
			_, serr := m.Stat(ctx, h)
			if there := i == 0 || (i == 1 && after); there != (serr == nil) {
				t.Errorf("after=%v: file %d: %v", after, i, serr)
			}
		}
	}
}
