package repo

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo/crypto"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// maxKeys is how many keys a password is tried on: each costs a tenth of a second and more.
const maxKeys = 20

// KeyInfo describes a key file.
type KeyInfo struct {
	ID       ID        `json:"id"`
	Created  time.Time `json:"created"`
	Username string    `json:"username"`
	Hostname string    `json:"hostname"`
	// Current is the key that opened the repository.
	Current bool `json:"current"`
	// Damaged says why the key file is of no use; it is empty for a good one.
	Damaged string `json:"damaged,omitempty"`
}

type keyFile struct {
	Created  time.Time `json:"created"`
	Username string    `json:"username"`
	Hostname string    `json:"hostname"`
	KDF      string    `json:"kdf"`
	N        int       `json:"N"`
	R        int       `json:"r"`
	P        int       `json:"p"`
	Salt     []byte    `json:"salt"`
	Data     []byte    `json:"data"`
}

func (k *keyFile) check() error {
	switch {
	case k.KDF != "scrypt":
		return fmt.Errorf("unknown key derivation %q", k.KDF)
	case len(k.Salt) != crypto.SaltSize:
		return fmt.Errorf("salt of %d bytes", len(k.Salt))
	case len(k.Data) < crypto.Overhead:
		return errors.New("no key in it")
	}
	return crypto.KDF{N: k.N, R: k.R, P: k.P}.Check()
}

// errBadKey marks a key file that was read as it is stored, and is of no use.
type errBadKey struct{ error }

// loadKey returns errBadKey where the file itself is at fault, and not the way to it.
func (r *Repository) loadKey(ctx context.Context, name ID) (*keyFile, error) {
	data, err := r.readFile(ctx, backend.Handle{Type: backend.KeyFile, Name: name.String()})
	var hm *hashError
	if errors.As(err, &hm) {
		return nil, errBadKey{err}
	}
	if err != nil {
		return nil, err
	}
	k := new(keyFile)
	if err := json.Unmarshal(data, k); err != nil {
		return nil, errBadKey{fmt.Errorf("key %s: %w", name.Short(), err)}
	}
	if err := k.check(); err != nil {
		return nil, errBadKey{fmt.Errorf("key %s: %w", name.Short(), err)}
	}
	return k, nil
}

// searchKey finds a key file that password opens. A file that cannot be used (unknown derivation,
// damaged) does not keep it from trying the others.
func (r *Repository) searchKey(ctx context.Context, password string) (*crypto.Key, ID, error) {
	var names []ID
	if err := r.ListFiles(ctx, backend.KeyFile, func(d ID, _ int64) error { names = append(names, d); return nil }); err != nil {
		return nil, ID{}, err
	}
	if len(names) == 0 {
		return nil, ID{}, errors.New("it has a config but no key; put back the files of its folder keys")
	}
	hint := strings.ToLower(r.opts.KeyHint)
	slices.SortStableFunc(names, func(a, b ID) int {
		return cmp.Compare(hinted(b, hint), hinted(a, hint))
	})
	var bad, failed []error
	tried := 0
	for _, name := range names {
		if tried == maxKeys {
			bad = append(bad, fmt.Errorf("only %d of %d keys were tried; name one with --key-hint", maxKeys, len(names)))
			break
		}
		k, err := r.loadKey(ctx, name)
		if ctx.Err() != nil {
			return nil, ID{}, context.Cause(ctx)
		}
		if err != nil {
			var eb errBadKey
			if errors.As(err, &eb) {
				bad = append(bad, err)
			} else {
				failed = append(failed, err)
			}
			continue
		}
		tried++
		u, err := crypto.KDF{N: k.N, R: k.R, P: k.P}.Derive(password, k.Salt)
		if err != nil {
			bad = append(bad, fmt.Errorf("key %s: %w", name.Short(), err))
			continue
		}
		plain, err := u.Open(k.Data)
		if err != nil {
			continue // not the password of this one
		}
		master := new(crypto.Key)
		if err := json.Unmarshal(plain, master); err != nil {
			bad = append(bad, fmt.Errorf("key %s: the password fits, but: %w", name.Short(), err))
			continue
		}
		return master, name, nil
	}
	switch {
	case len(failed) > 0: // the right one may be among them, so do not speak of a wrong password
		return nil, ID{}, fmt.Errorf("read the keys: %w", errors.Join(append(failed, bad...)...))
	case tried == 0:
		return nil, ID{}, fmt.Errorf("none of its %d keys can be used: %w", len(names), errors.Join(bad...))
	case len(bad) > 0:
		return nil, ID{}, fmt.Errorf("%w: it fits none of %d keys (others could not be used: %w)", ErrWrongPassword, tried, errors.Join(bad...))
	}
	return nil, ID{}, fmt.Errorf("%w: it fits none of %d keys", ErrWrongPassword, tried)
}

func hinted(d ID, hint string) int {
	if hint != "" && strings.HasPrefix(d.String(), hint) {
		return 1
	}
	return 0
}

// CurrentKey returns the key file that opened the repository.
func (r *Repository) CurrentKey() ID { return r.keyID }

// Keys lists the key files, oldest first.
func (r *Repository) Keys(ctx context.Context) ([]KeyInfo, error) {
	var names []ID
	if err := r.ListFiles(ctx, backend.KeyFile, func(d ID, _ int64) error { names = append(names, d); return nil }); err != nil {
		return nil, err
	}
	var list []KeyInfo
	for _, name := range names {
		info := KeyInfo{ID: name, Current: name == r.keyID}
		k, err := r.loadKey(ctx, name)
		var eb errBadKey
		switch {
		case errors.As(err, &eb):
			info.Damaged = err.Error()
		case errors.Is(err, backend.ErrNotExist):
			continue // removed meanwhile
		case err != nil:
			return nil, err
		default:
			info.Created, info.Username, info.Hostname = k.Created, k.Username, k.Hostname
		}
		list = append(list, info)
	}
	slices.SortStableFunc(list, func(a, b KeyInfo) int { return a.Created.Compare(b.Created) })
	return list, nil
}

// AddKey makes the repository open with another password as well.
func (r *Repository) AddKey(ctx context.Context, password string) (ID, error) {
	if password == "" {
		return ID{}, errors.New("an empty password protects nothing; choose another one")
	}
	k := keyFile{Created: r.clock.now().UTC(), KDF: "scrypt", N: r.kdf.N, R: r.kdf.R, P: r.kdf.P, Salt: make([]byte, crypto.SaltSize)}
	k.Username, k.Hostname = whoAmI()
	rand.Read(k.Salt)
	u, err := r.kdf.Derive(password, k.Salt)
	if err != nil {
		return ID{}, fmt.Errorf("make a key: %w", err)
	}
	master, err := json.Marshal(r.key)
	if err != nil {
		return ID{}, err
	}
	k.Data = u.Seal(nil, master)
	text, err := json.Marshal(k)
	if err != nil {
		return ID{}, err
	}
	if err := r.Settled(ctx); err != nil {
		return ID{}, err
	}
	name := id.Hash(text)
	if err := r.be.Save(ctx, backend.Handle{Type: backend.KeyFile, Name: name.String()}, text); err != nil {
		return ID{}, fmt.Errorf("store the new key: %w", err)
	}
	return name, nil
}

// RemoveKey makes a password invalid. It refuses the key that opened the repository, so that one
// that works is always left.
func (r *Repository) RemoveKey(ctx context.Context, name ID) error {
	if name == r.keyID {
		return fmt.Errorf("key %s is the one in use; open the repository with another password to remove it", name.Short())
	}
	if err := r.be.Remove(ctx, backend.Handle{Type: backend.KeyFile, Name: name.String()}); err != nil {
		return fmt.Errorf("remove key %s: %w", name.Short(), err)
	}
	return nil
}

// whoAmI returns what keys and locks tell of their maker.
func whoAmI() (username, hostname string) {
	if u, err := user.Current(); err == nil {
		username = u.Username
	}
	hostname, _ = os.Hostname() // "" says as much
	return username, hostname
}
