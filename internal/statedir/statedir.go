// Package statedir is what must outlive a run: the directory for it, records there that a kill or a
// power cut leaves whole, and locks that tell whether the owner of a record lives.
package statedir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrLocked is returned by Lock and TryFlock when somebody else has the lock.
var ErrLocked = errors.New("locked by a process that lives")

// Default is $XDG_STATE_HOME/holdfast if that is set, else /var/lib/holdfast for root and
// ~/.local/state/holdfast for others.
//
// Errors: no home directory.
func Default() (string, error) {
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "holdfast"), nil
	}
	if os.Geteuid() == 0 {
		return "/var/lib/holdfast", nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("no place for records: %w; set XDG_STATE_HOME", err)
	}
	return filepath.Join(home, ".local", "state", "holdfast"), nil
}

// Path returns the directory sub of the state directory dir ("" is Default), absolute, and makes
// nothing.
func Path(dir, sub string) (string, error) {
	if dir == "" {
		var err error
		if dir, err = Default(); err != nil {
			return "", err
		}
	}
	return filepath.Abs(filepath.Join(dir, sub))
}

// Make is Path, and makes the directory for its owner alone.
func Make(dir, sub string) (string, error) {
	path, err := Path(dir, sub)
	if err == nil {
		err = os.MkdirAll(path, 0o700)
	}
	if err != nil {
		return "", fmt.Errorf("the state directory cannot be used: %w; set XDG_STATE_HOME to a place that can be written to", err)
	}
	return path, nil
}

// Names lists the entries of the directory sub that end in one of the suffixes, without them, each
// once, sorted. That there is no such directory is an empty list.
func Names(dir, sub string, suffixes ...string) (path string, names []string, err error) {
	if path, err = Path(dir, sub); err != nil {
		return "", nil, err
	}
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return path, nil, nil
	}
	if err != nil {
		return path, nil, err
	}
	seen := map[string]bool{}
	for _, e := range entries { // sorted
		for _, suffix := range suffixes {
			if name, ok := strings.CutSuffix(e.Name(), suffix); ok && !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
	}
	return path, names, nil
}

// Write puts v as JSON into the file at path, with mode 0600 and for good, or leaves what was there.
func Write(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, temporary(path)) // mode 0600
	if err != nil {
		return err
	}
	_, err = tmp.Write(append(data, '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return err
	}
	return syncDir(dir)
}

// temporary is the pattern of the names that Write uses, which are not those of records.
func temporary(path string) string {
	return strings.TrimSuffix(filepath.Base(path), filepath.Ext(path)) + ".*.tmp"
}

// Remove takes files away for good, in that order, and what killed writers left beside them. Those
// that are gone already are no error. All paths are in one directory.
func Remove(paths ...string) error {
	var errs []error
	removed := false
	for _, p := range paths {
		left, _ := filepath.Glob(filepath.Join(filepath.Dir(p), temporary(p)))
		for _, tmp := range left {
			_ = os.Remove(tmp)
		}
		switch err := os.Remove(p); {
		case err == nil:
			removed = true
		case !errors.Is(err, fs.ErrNotExist):
			errs = append(errs, err)
		}
	}
	if removed {
		errs = append(errs, syncDir(filepath.Dir(paths[0])))
	}
	return errors.Join(errs...)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Lock makes the file at path and takes its lock. The kernel gives that back however the owner ends;
// numbers of processes would mean nothing in another container. Closing the file gives it back.
//
// Errors: ErrLocked.
func Lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := TryFlock(f); err != nil {
		f.Close()
		if errors.Is(err, ErrLocked) {
			return nil, err
		}
		return nil, fmt.Errorf("lock %s: %w; the state directory must be on a filesystem with locks", path, err)
	}
	return f, nil
}

// TryFlock takes the lock of an open file.
//
// Errors: ErrLocked; those of flock(2).
func TryFlock(f *os.File) error {
	for {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EWOULDBLOCK):
			return ErrLocked
		default:
			return err
		}
	}
}
