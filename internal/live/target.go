package live

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/cloud"
)

// Space is the space of the snapshot that something was in.
type Space struct {
	ID    string
	Name  string
	Alias string
	Kind  string // cloud.Personal or cloud.Project
	// OwnerID and OwnerLogin are the owner's of a personal space; the login is "" if it is not known.
	OwnerID, OwnerLogin string
}

// NoSpaceError says that the instance has no place for what is to be put back.
type NoSpaceError struct {
	Space  Space
	Why    string
	Advice []string // sentences
}

func (e *NoSpaceError) Error() string {
	return fmt.Sprintf("the space %q (%s) %s", e.Space.Alias, e.Space.ID, e.Why)
}

// Hints says what to do about it.
func (e *NoSpaceError) Hints() []string { return e.Advice }

// FindDrive finds the space of the instance that s is, as the client's user sees it: the one with its id,
// or, for a personal space, that of the user who its owner is now.
//
// Errors: *NoSpaceError.
func FindDrive(ctx context.Context, c *cloud.Client, s Space, byName map[string]string) (cloud.Drive, error) {
	me, err := c.Me(ctx)
	if err != nil {
		return cloud.Drive{}, err
	}
	list, err := c.MyDrives(ctx)
	if err != nil {
		return cloud.Drive{}, err
	}
	none := func(why string, advice ...string) (cloud.Drive, error) {
		return cloud.Drive{}, &NoSpaceError{s, why, append(advice, "--into-space NAME makes a new project space for it.")}
	}
	for _, d := range list {
		if _, id, _ := strings.Cut(d.ID, "$"); id != s.ID {
			continue
		}
		if d.Disabled() {
			return none("is disabled in the instance", "An administrator can enable it again.")
		}
		return d, nil
	}
	if s.Kind != cloud.Personal {
		return none(fmt.Sprintf("is not there for the user %q", me.Name), "Either it was deleted, or this user is no member of it.")
	}
	// The same person can have a new id, and then has a new space.
	owner := s.OwnerLogin
	for _, key := range []string{s.OwnerID, s.OwnerLogin} {
		if to, ok := byName[key]; ok && key != "" {
			owner = to
		}
	}
	if owner == "" || owner != me.Name && owner != me.ID {
		return none(fmt.Sprintf("is not there for the user %q", me.Name),
			"Only its owner can write into a personal space: give the owner's token, or --as OWNER as an administrator.",
			"If the owner has another name now, --map-user OLD=NEW says so.")
	}
	for _, d := range list {
		if d.Type == cloud.Personal && (d.Owner.User.ID == me.ID || d.Owner.User.ID == "") && !d.Disabled() {
			return d, nil
		}
	}
	return none(fmt.Sprintf("is not there, and the user %q has no personal space", me.Name),
		"The server makes one when the user comes, but for some minutes after it was purged it still believes in the old one: run this again then.")
}

// NewDrive returns the project space of that name in which the client's user is, made if there is none:
// so a run that was interrupted goes on in the space that it made.
func NewDrive(ctx context.Context, c *cloud.Client, name, description string) (d cloud.Drive, isNew bool, err error) {
	list, err := c.MyDrives(ctx)
	if err != nil {
		return d, false, err
	}
	for _, x := range list {
		if x.Type != cloud.Project || x.Name != name || x.Disabled() {
			continue
		}
		if d.ID != "" {
			return d, false, fmt.Errorf("the instance has two project spaces with the name %q", name)
		}
		d = x
	}
	if d.ID != "" {
		return d, false, nil
	}
	if d, err = c.CreateDrive(ctx, name, description); err != nil {
		if errors.Is(err, cloud.ErrForbidden) {
			err = fmt.Errorf("this user may not make spaces: %w", err)
		}
		return d, false, err
	}
	return d, true, nil
}
