package drill

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Signed is a report as it is kept: the signature is over the bytes of Report, as they stand.
type Signed struct {
	Report    json.RawMessage `json:"report"`
	Algorithm string          `json:"algorithm"`  // ed25519
	PublicKey []byte          `json:"public_key"` // base64 in JSON
	Signature []byte          `json:"signature"`
}

const algorithm = "ed25519"

const pemType = "HOLDFAST DRILL KEY"

// LoadKey reads the key that signs the reports of this machine, and makes it if there is none. It is kept
// in the directory dir, for its owner alone.
func LoadKey(dir string) (ed25519.PrivateKey, error) {
	file := filepath.Join(dir, "report.key")
	p, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		_, key, gerr := ed25519.GenerateKey(rand.Reader)
		if gerr != nil {
			return nil, gerr
		}
		p = pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: key.Seed()})
		// Never over another one, which a second drill may just have made.
		f, cerr := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if cerr == nil {
			_, err = f.Write(p)
			if err == nil {
				err = f.Sync()
			}
			if cerr := f.Close(); err == nil {
				err = cerr
			}
			if err != nil {
				os.Remove(file)
			}
		} else if errors.Is(cerr, fs.ErrExist) {
			p, err = os.ReadFile(file)
		} else {
			err = cerr
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the key that signs reports: %w", err)
	}
	b, _ := pem.Decode(p)
	if b == nil || b.Type != pemType || len(b.Bytes) != ed25519.SeedSize {
		return nil, fmt.Errorf("%s is no key for reports; remove it to have a new one made", file)
	}
	return ed25519.NewKeyFromSeed(b.Bytes), nil
}

// Sign makes the file of a report.
func Sign(r *Report, key ed25519.PrivateKey) ([]byte, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return json.Marshal(Signed{body, algorithm, key.Public().(ed25519.PublicKey), ed25519.Sign(key, body)})
}

// ErrForged is returned for a report whose signature does not fit.
var ErrForged = errors.New("the signature does not fit: the report was changed")

// ErrOtherKey is returned for a report that another machine has signed, or somebody else.
var ErrOtherKey = errors.New("it is signed with another key")

// Verify reads a report and checks its signature. key is the one to expect.
//
// Errors: ErrForged, ErrOtherKey, each with the report as it is.
func Verify(file []byte, key ed25519.PublicKey) (*Report, error) {
	var s Signed
	if err := json.Unmarshal(file, &s); err != nil {
		return nil, fmt.Errorf("this is no report of a drill: %w", err)
	}
	r := new(Report)
	if err := json.Unmarshal(s.Report, r); err != nil {
		return nil, fmt.Errorf("this is no report of a drill: %w", err)
	}
	if s.Algorithm != algorithm || len(s.PublicKey) != ed25519.PublicKeySize || !ed25519.Verify(s.PublicKey, s.Report, s.Signature) {
		return r, ErrForged
	}
	if !bytes.Equal(key, s.PublicKey) {
		return r, ErrOtherKey
	}
	return r, nil
}
