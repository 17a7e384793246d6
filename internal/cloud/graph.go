package cloud

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/bcrypt"
)

// User is an account.
type User struct {
	ID   string `json:"id"`
	Name string `json:"onPremisesSamAccountName"` // what is typed to log in
	Full string `json:"displayName"`
	Mail string `json:"mail"`
}

// Group is a group of accounts.
type Group struct {
	ID   string `json:"id"`
	Name string `json:"displayName"`
}

// The types of a Drive.
const (
	Personal = "personal"
	Project  = "project"
)

// Drive is a space.
type Drive struct {
	ID          string `json:"id"` // <mount>$<space>
	Name        string `json:"name"`
	Type        string `json:"driveType"`
	Alias       string `json:"driveAlias"`
	Description string `json:"description"`
	Owner       struct {
		User User `json:"user"`
	} `json:"owner"`
	Quota struct {
		Total     int64 `json:"total"` // bytes; 0 is no limit
		Used      int64 `json:"used"`
		Remaining int64 `json:"remaining"`
	} `json:"quota"`
	Root struct {
		Deleted *struct {
			State string `json:"state"`
		} `json:"deleted"`
	} `json:"root"`
}

// Disabled tells whether the space was disabled.
func (d *Drive) Disabled() bool { return d.Root.Deleted != nil }

// Permission is what somebody may do with an item.
type Permission struct {
	ID          string   `json:"id"`
	Roles       []string `json:"roles"`
	Actions     []string `json:"@libre.graph.permissions.actions"`
	GrantedToV2 struct {
		User  *User  `json:"user"`
		Group *Group `json:"group"`
	} `json:"grantedToV2"`
	Expires *time.Time `json:"expirationDateTime"`
	Link    *struct {
		Type string `json:"type"`
		Name string `json:"@libre.graph.displayName"`
		URL  string `json:"webUrl"`
	} `json:"link"`
	HasPassword bool `json:"hasPassword"`
}

// Role is a set of rights that has a name.
type Role struct {
	ID   string `json:"id"`
	Name string `json:"displayName"`
	// Permissions are the rights for each kind of item.
	Permissions []struct {
		Actions   []string `json:"allowedResourceActions"`
		Condition string   `json:"condition"`
	} `json:"rolePermissions"`
}

// Status is what the server tells anybody.
type Status struct {
	Product string `json:"product"`
	Version string `json:"productversion"`
}

// jsonLimit bounds an answer of Graph, in bytes: a list of 50,000 spaces fits.
const jsonLimit = 256 << 20

// call sends in, if it is not nil, and fills out from the answer, if it is not nil.
func (c *Client) call(ctx context.Context, q request, in, out any) error {
	q.header = http.Header{}
	q.header.Set("Accept", "application/json")
	if in != nil {
		p, err := json.Marshal(in)
		if err != nil {
			return err
		}
		q.header.Set("Content-Type", "application/json")
		q.size = int64(len(p))
		q.body = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }
	}
	if q.want == nil {
		q.want = []int{200}
	}
	r, err := c.do(ctx, q)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(&allowance{r.Body, jsonLimit}).Decode(out); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("%s /%s: reading the answer: %w", q.method, q.path[len(q.path)-1], err)
	}
	return nil
}

func v1(path ...string) []string { return append([]string{"graph", "v1.0"}, path...) }

func beta(path ...string) []string { return append([]string{"graph", "v1beta1"}, path...) }

// Status asks for product and version.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, c.call(ctx, request{method: "GET", path: []string{"status.php"}}, nil, &s)
}

// MaxChunk is the most that one request of a resumable upload may hold, in bytes; 0 is no limit.
func (c *Client) MaxChunk(ctx context.Context) (int64, error) {
	var a struct {
		OCS struct {
			Data struct {
				Capabilities struct {
					Files struct {
						TUS struct {
							Max json.Number `json:"max_chunk_size"`
						} `json:"tus_support"`
					} `json:"files"`
				} `json:"capabilities"`
			} `json:"data"`
		} `json:"ocs"`
	}
	q := request{method: "GET", path: []string{"ocs", "v1.php", "cloud", "capabilities"}, query: url.Values{"format": {"json"}}}
	if err := c.call(ctx, q, nil, &a); err != nil {
		return 0, err
	}
	n, _ := a.OCS.Data.Capabilities.Files.TUS.Max.Int64()
	return n, nil
}

// Me is the user of the client.
//
// Errors: ErrUnauthorized.
func (c *Client) Me(ctx context.Context) (User, error) {
	var u User
	return u, c.call(ctx, request{method: "GET", path: v1("me")}, nil, &u)
}

// MyDrives lists the spaces that the user is in.
func (c *Client) MyDrives(ctx context.Context) ([]Drive, error) {
	return c.drives(ctx, v1("me", "drives"))
}

// Drives lists every space of the server. Needs an administrator.
func (c *Client) Drives(ctx context.Context) ([]Drive, error) {
	return c.drives(ctx, v1("drives"))
}

func (c *Client) drives(ctx context.Context, path []string) ([]Drive, error) {
	var a struct{ Value []Drive }
	return a.Value, c.call(ctx, request{method: "GET", path: path}, nil, &a)
}

// CreateDrive makes a project space. Its id is the server's choice.
//
// Errors: ErrForbidden.
func (c *Client) CreateDrive(ctx context.Context, name, description string) (Drive, error) {
	in := map[string]any{"name": name, "driveType": Project}
	if description != "" {
		in["description"] = description
	}
	var d Drive
	return d, c.call(ctx, request{method: "POST", path: v1("drives"), want: []int{201}, once: true}, in, &d)
}

// User finds an account by id or name.
//
// Errors: ErrNotFound.
func (c *Client) User(ctx context.Context, idOrName string) (User, error) {
	var u User
	return u, c.call(ctx, request{method: "GET", path: v1("users", idOrName)}, nil, &u)
}

// Users lists the accounts. Needs an administrator.
func (c *Client) Users(ctx context.Context) ([]User, error) {
	var a struct{ Value []User }
	return a.Value, c.call(ctx, request{method: "GET", path: v1("users")}, nil, &a)
}

// Groups lists the groups. Needs an administrator.
func (c *Client) Groups(ctx context.Context) ([]Group, error) {
	var a struct{ Value []Group }
	return a.Value, c.call(ctx, request{method: "GET", path: v1("groups")}, nil, &a)
}

// CheckTag refuses tags that break what the server lists: it writes them into XML as they are.
//
// Errors: ErrName.
func CheckTag(tag string) error {
	if strings.TrimSpace(tag) == "" || strings.ContainsAny(tag, "<>&,") || !utf8.ValidString(tag) || strings.ContainsFunc(tag, unicode.IsControl) {
		return fmt.Errorf("%w: tag %q", ErrName, tag)
	}
	return nil
}

// AddTags gives an item tags beside those that it has; one at least must be new to it.
//
// Errors: ErrName.
func (c *Client) AddTags(ctx context.Context, id string, tags []string) error {
	for _, t := range tags {
		if err := CheckTag(t); err != nil {
			return err
		}
	}
	in := map[string]any{"resourceId": id, "tags": tags}
	return c.call(ctx, request{method: "PUT", path: v1("extensions", "org.libregraph", "tags"), what: "tags of " + id}, in, nil)
}

// Roles lists the roles that can be given.
func (c *Client) Roles(ctx context.Context) ([]Role, error) {
	var out []Role
	return out, c.call(ctx, request{method: "GET", path: beta("roleManagement", "permissions", "roleDefinitions")}, nil, &out)
}

// itemPath is the address of an item's rights: of the whole space if item is "".
func itemPath(drive, item string, rest ...string) []string {
	if item == "" {
		return append(beta("drives", drive, "root"), rest...)
	}
	return append(beta("drives", drive, "items", item), rest...)
}

// Permissions lists who may do what with an item, or with the whole space if item is "".
func (c *Client) Permissions(ctx context.Context, drive, item string) ([]Permission, error) {
	var a struct{ Value []Permission }
	return a.Value, c.call(ctx, request{method: "GET", path: itemPath(drive, item, "permissions")}, nil, &a)
}

// Grantee is who gets rights.
type Grantee struct {
	ID    string
	Group bool
}

// Invite gives rights to an item, or to the whole space if item is "": a role, or single actions if
// role is "". The zero time never ends.
//
// Errors: ErrRejected, ErrForbidden, ErrNotFound.
func (c *Client) Invite(ctx context.Context, drive, item string, to Grantee, role string, actions []string, expires time.Time) error {
	kind := "user"
	if to.Group {
		kind = "group"
	}
	in := map[string]any{"recipients": []any{map[string]string{"objectId": to.ID, "@libre.graph.recipient.type": kind}}}
	if role != "" {
		in["roles"] = []string{role}
	} else {
		in["@libre.graph.permissions.actions"] = actions
	}
	if !expires.IsZero() {
		in["expirationDateTime"] = expires.UTC().Format(time.RFC3339)
	}
	return c.call(ctx, request{method: "POST", path: itemPath(drive, item, "invite"), once: true}, in, nil)
}

// Link is a public link to be made. Its address is the server's choice.
type Link struct {
	Type     string // view, upload, edit, createOnly, internal
	Name     string
	Password string    // "" is none, which the server may refuse
	Quick    bool      // the server gives the one that is there, if there is one
	Expires  time.Time // the day counts; zero is never
}

// CreateLink makes a public link to an item, or to the whole space if item is "".
//
// Errors: ErrRejected, ErrForbidden, ErrNotFound.
func (c *Client) CreateLink(ctx context.Context, drive, item string, l Link) (Permission, error) {
	in := map[string]any{"type": l.Type, "displayName": l.Name, "@libre.graph.quickLink": l.Quick}
	if l.Password != "" {
		in["password"] = l.Password
	}
	if !l.Expires.IsZero() {
		in["expirationDateTime"] = l.Expires.UTC().Format(time.RFC3339)
	}
	var out Permission
	return out, c.call(ctx, request{method: "POST", path: itemPath(drive, item, "createLink"), once: true}, in, &out)
}

// CreateToken makes an app token for another user, that ends by itself. Needs an administrator, and a
// server that allows impersonation.
//
// Errors: ErrForbidden, ErrNotFound.
func (c *Client) CreateToken(ctx context.Context, userID string, expiry time.Duration) (string, error) {
	if userID == "" { // the server would make one for the administrator
		return "", errors.New("no user was named to make a token for")
	}
	var a struct {
		Token string `json:"token"`
	}
	q := request{
		method: "POST", path: []string{"auth-app", "tokens"}, want: []int{200, 201}, once: true,
		query: url.Values{"expiry": {expiry.String()}, "userID": {userID}}, what: "/auth-app/tokens",
	}
	if err := c.call(ctx, q, nil, &a); err != nil {
		return "", err
	}
	if a.Token == "" {
		return "", errors.New("POST /auth-app/tokens: the server gave no token")
	}
	return a.Token, nil
}

// DeleteToken makes a token of the user's own useless. Some servers take the token itself, others want
// the hash that they list.
func (c *Client) DeleteToken(ctx context.Context, token string) error {
	path := []string{"auth-app", "tokens"}
	del := func(token string) error {
		q := request{method: "DELETE", path: path, query: url.Values{"token": {token}}, what: "/auth-app/tokens", once: true}
		return c.call(ctx, q, nil, nil)
	}
	err := del(token)
	if err == nil || errors.Is(err, ErrUnauthorized) || ctx.Err() != nil {
		return err
	}
	var list []struct {
		Token string `json:"token"`
	}
	if lerr := c.call(ctx, request{method: "GET", path: path}, nil, &list); lerr != nil {
		return lerr
	}
	for _, t := range list {
		if bcrypt.CompareHashAndPassword([]byte(t.Token), []byte(token)) == nil {
			return del(t.Token)
		}
	}
	return err
}
