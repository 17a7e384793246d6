package inplace

import (
	"encoding/json"
	"reflect"
	"testing"
)

// The lists as a server of the 1.0 era writes them, see "System storage" in the product reference.
const (
	ourSpace   = "b1f74ec4-dd7e-11ef-a543-03775734d0f7"
	otherSpace = "0f7b19a1-3e0d-4a55-9b2a-6d4d5a2e7c11"
	storageID  = "86bceda4-060f-43a0-9ab7-04f7d7731089"
)

func link(space, token string) string {
	share, _ := json.Marshal(`{"token":"` + token + `", "resourceId":{"storageId":"` + storageID + `", "opaqueId":"1fc1d317", "spaceId":"` + space + `"}}`)
	return `{"password":"$2a$11$x","share":` + string(share) + `}`
}

func TestMergeShares(t *testing.T) {
	ours, other := storageID+":"+ourSpace, storageID+":"+otherSpace
	for name, c := range map[string]struct {
		now, was, want string
		n              int
	}{
		"a public link comes back": {
			now:  `{"kept":` + link(ourSpace, "now") + `}`,
			was:  `{"gone":` + link(ourSpace, "t1") + `,"kept":` + link(ourSpace, "then") + `,"foreign":` + link(otherSpace, "t2") + `}`,
			want: `{"kept":` + link(ourSpace, "now") + `,"gone":` + link(ourSpace, "t1") + `}`, n: 1,
		},
		"public links in the older spelling": {
			now:  `{}`,
			was:  `{"a":{"share":"{\"resource_id\":{\"space_id\":\"` + ourSpace + `\"}}"},"b":{"share":"{\"resource_id\":{\"space_id\":\"` + otherSpace + `\"}}"},"c":{"share":"no JSON"}}`,
			want: `{"a":{"share":"{\"resource_id\":{\"space_id\":\"` + ourSpace + `\"}}"}}`, n: 1,
		},
		"no list now": {
			now: ``, was: `{"gone":` + link(ourSpace, "t1") + `}`, want: `{"gone":` + link(ourSpace, "t1") + `}`, n: 1,
		},
		"shares of the space": {
			now: `{"Shares":{"a":{"v":2}},"Etag":"x"}`, was: `{"Shares":{"a":{"v":1},"b":{"v":1}},"Etag":"y"}`,
			want: `{"Shares":{"a":{"v":2},"b":{"v":1}},"Etag":"x"}`, n: 1,
		},
		"received shares of this space alone": {
			now:  `{"Spaces":{"` + other + `":{"States":{"s":1}}}}`,
			was:  `{"Spaces":{"` + ours + `":{"States":{"s1":{"State":2}}},"` + other + `":{"States":{"s2":1}}}}`,
			want: `{"Spaces":{"` + other + `":{"States":{"s":1}},"` + ours + `":{"States":{"s1":{"State":2}}}}}`, n: 1,
		},
		"made shares, null now": {
			now: `{"UserShares":null}`, was: `{"UserShares":{"` + ours + `":{"IDs":{"x":{},"y":{}}}}}`,
			want: `{"UserShares":{"` + ours + `":{"IDs":{"x":{},"y":{}}}}}`, n: 2,
		},
		"nothing is missing": {
			now: `{"Shares":{"a":1},"New":7}`, was: `{"Shares":{"a":1}}`, want: `{"Shares":{"a":1},"New":7}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, n, err := mergeShares([]byte(c.now), []byte(c.was), ourSpace)
			if err != nil {
				t.Fatal(err)
			}
			var a, b any
			if err := json.Unmarshal(got, &a); err != nil {
				t.Fatalf("%s: %v", got, err)
			}
			if err := json.Unmarshal([]byte(c.want), &b); err != nil {
				t.Fatal(err)
			}
			if n != c.n || !reflect.DeepEqual(a, b) {
				t.Errorf("got %d, %s\nwant %d, %s", n, got, c.n, c.want)
			}
		})
	}
}

// What is not of a known form is not written back changed.
func TestMergeSharesRefuses(t *testing.T) {
	for _, c := range [][2]string{
		{`[]`, `{}`}, {`{`, `{}`}, {`{}`, `"x"`}, {`{"Shares":[]}`, `{"Shares":{"a":1}}`},
		{`{"Spaces":[]}`, `{"Spaces":{"x:` + ourSpace + `":{"States":{"a":1}}}}`}, {`{}`, `{"UserShares":{"x":"yyy"}}`},
	} {
		if got, _, err := mergeShares([]byte(c[0]), []byte(c[1]), ourSpace); err == nil {
			t.Errorf("now %s, was %s: got %s, want an error", c[0], c[1], got)
		}
	}
}
