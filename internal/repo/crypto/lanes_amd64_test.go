package crypto

import (
	"bytes"
	"fmt"
	"testing"

	"golang.org/x/crypto/scrypt"
)

// Every way to compute scrypt gives the same keys, whatever this processor would choose.
func TestScryptOnOtherProcessors(t *testing.T) {
	lanes, rotate := hasLanes, hasRotate
	defer func() { hasLanes, hasRotate = lanes, rotate }()
	for _, way := range []struct{ lanes, rotate bool }{{false, false}, {true, false}, {true, true}} {
		if way.lanes && !lanes || way.rotate && !rotate {
			continue
		}
		hasLanes, hasRotate = way.lanes, way.rotate
		for _, f := range []KDF{{2, 1, 1}, {2, 3, 2}, {64, 5, 3}, {32, 16, 7}, {1024, 8, 4}, {4096, 1, 2}} {
			password, salt := fmt.Sprint(f), bytes.Repeat([]byte{byte(f.P)}, SaltSize)
			want, err := scrypt.Key([]byte(password), salt, f.N, f.R, f.P, 80)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := scryptKey(password, salt, f, 80); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%+v, %v: %x, not %x, %v", way, f, got, want, err)
			}
		}
	}
}
