package backend

import "fmt"

// IsName reports whether s can name a file: 64 lower-case hexadecimal digits.
func IsName(s string) bool {
	if len(s) != 64 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// Check returns an error unless h names a file that can exist. Drivers call it first, so that no
// name from a repository reaches a path or an URL unseen.
func (h Handle) Check() error {
	switch {
	case h.Type < ConfigFile || h.Type > PackFile:
		return &PermanentError{fmt.Errorf("unknown file type %d", h.Type)}
	case h.Type == ConfigFile && h.Name != "":
		return &PermanentError{fmt.Errorf("the config has no name, but %q was given", h.Name)}
	case h.Type != ConfigFile && !IsName(h.Name):
		return &PermanentError{fmt.Errorf("%q is no name of a file in %s", h.Name, h.Type.Dir())}
	}
	return nil
}
