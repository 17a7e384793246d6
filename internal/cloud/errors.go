package cloud

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// What an answer of the server can mean. A *StatusError is each of these by errors.Is.
var (
	// ErrNotFound is returned when there is no such thing, or the user may not see it.
	ErrNotFound = errors.New("not found")
	// ErrExists is returned when a folder is to be made where something is.
	ErrExists = errors.New("exists already")
	// ErrForbidden is returned when the user may not do it.
	ErrForbidden = errors.New("forbidden")
	// ErrUnauthorized is returned when the server does not take user and secret.
	ErrUnauthorized = errors.New("user or secret refused")
	// ErrLocked is returned when somebody holds a lock on the file.
	ErrLocked = errors.New("locked")
	// ErrNoParent is returned when the folder above is missing, or a folder is in the way of a file.
	ErrNoParent = errors.New("conflict with the folder above or a folder of that name")
	// ErrChecksum is returned when what arrived is not what was to be sent.
	ErrChecksum = errors.New("the server computed another checksum")
	// ErrQuota is returned when the space is full.
	ErrQuota = errors.New("no room left in the space")
	// ErrProcessing is returned while the server works on an upload.
	ErrProcessing = errors.New("the server still works on the file")
	// ErrPrecondition is returned when a file is there that was not to be replaced.
	ErrPrecondition = errors.New("a file is there")
	// ErrRejected is returned when the server finds the request itself wrong, such as a name that it does not allow.
	ErrRejected = errors.New("rejected by the server")
)

// ErrPlainHTTP is returned for a URL that would send the secret unprotected.
var ErrPlainHTTP = errors.New("refusing to send a secret without TLS")

// ErrName is returned for a name that no path of the API can hold.
var ErrName = errors.New("not a name that the API can take")

// errNotHere is returned for an address that OnlyLoopback forbids.
var errNotHere = errors.New("is not this machine")

// errStalled is the cause when nothing moved for the time allowed.
var errStalled = errors.New("nothing moved on the connection")

// StatusError is an answer that is no success.
type StatusError struct {
	Method  string
	What    string // what was asked for
	Status  int
	Message string // the server's own, "" if it gave none
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("%s %s: the server answers %d", e.Method, e.What, e.Status)
	if t := http.StatusText(e.Status); t != "" {
		s += " " + t
	}
	if e.Message != "" {
		s += fmt.Sprintf(" (%q)", e.Message)
	}
	return s
}

// Is tells what the status means.
func (e *StatusError) Is(target error) bool {
	switch e.Status {
	case http.StatusNotFound, http.StatusGone:
		return target == ErrNotFound
	case http.StatusMethodNotAllowed:
		return target == ErrExists && e.Method == "MKCOL"
	case http.StatusForbidden:
		return target == ErrForbidden
	case http.StatusUnauthorized:
		return target == ErrUnauthorized
	case http.StatusLocked:
		return target == ErrLocked
	case http.StatusConflict:
		return target == ErrNoParent
	case statusChecksumTUS, statusChecksumReva:
		return target == ErrChecksum
	case http.StatusInsufficientStorage, http.StatusRequestEntityTooLarge:
		return target == ErrQuota
	case http.StatusTooEarly:
		return target == ErrProcessing
	case http.StatusPreconditionFailed:
		return target == ErrPrecondition
	case http.StatusBadRequest:
		// WebDAV has one status for names and checksums; its message tells them apart.
		if strings.Contains(strings.ToLower(e.Message), "checksum") {
			return target == ErrChecksum
		}
		return target == ErrRejected
	case http.StatusUnsupportedMediaType:
		return target == ErrRejected
	}
	return false
}

// Checksum mismatch in TUS, and between the parts of the product.
const (
	statusChecksumTUS  = 460
	statusChecksumReva = 419
)

// messageLimit bounds what is read of an error's body, and shown of its message, in bytes.
const (
	bodyLimit    = 64 << 10
	messageLimit = 300
)

// statusError makes the error of an answer, and reads its body.
func statusError(method, what string, r *http.Response) *StatusError {
	e := &StatusError{Method: method, What: what, Status: r.StatusCode}
	body, _ := io.ReadAll(io.LimitReader(r.Body, bodyLimit))
	var x struct {
		Message string `xml:"message"`
	}
	var j struct {
		Error struct{ Message string }
	}
	switch {
	case xml.Unmarshal(body, &x) == nil && x.Message != "":
		e.Message = x.Message
	case json.Unmarshal(body, &j) == nil && j.Error.Message != "":
		e.Message = j.Error.Message
	case strings.HasPrefix(r.Header.Get("Content-Type"), "text/plain"):
		e.Message = string(body)
	}
	e.Message = strings.TrimSpace(e.Message)
	if len(e.Message) > messageLimit {
		e.Message = strings.ToValidUTF8(e.Message[:messageLimit], "") + "..."
	}
	if e.Status >= 300 && e.Status < 400 {
		e.Message = "a redirect to " + r.Header.Get("Location") + "; give that address as the server's URL if it is right"
	}
	return e
}
