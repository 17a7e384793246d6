package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"unicode"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/transport"
)

// What the callers of a client must tell apart. Errors from [Client.Explain] match them with errors.Is.
var (
	// ErrNotFound: there is no such object (or version).
	ErrNotFound = errors.New("no such object")
	// ErrNoBucket: there is no such bucket.
	ErrNoBucket = errors.New("no such bucket")
	// ErrAccessDenied: the credentials are good, but do not allow this.
	ErrAccessDenied = errors.New("access denied")
	// ErrBadCredentials: the server does not know the key, or the secret does not fit.
	ErrBadCredentials = errors.New("credentials refused")
	// ErrExists: an object is there although none must be (If-None-Match).
	ErrExists = errors.New("the object exists")
	// ErrChanged: the object is not the one that was asked for (If-Match).
	ErrChanged = errors.New("the object has changed")
	// ErrRange: the object is shorter than the wanted part.
	ErrRange = errors.New("the object has no such part")
	// ErrBusy: the server asks to come back later (SlowDown, 503), or failed inside (5xx).
	ErrBusy = errors.New("the server is overloaded or out of order")
	// ErrNoSpace: a quota, or the server's disks, are full.
	ErrNoSpace = errors.New("no space left on the server")
	// ErrUnsupported: the server does not know this request.
	ErrUnsupported = errors.New("not supported by the server")
	// ErrLocked: an object's retention or legal hold forbids it.
	ErrLocked = errors.New("the object is locked")
	// ErrClock: this machine's clock differs too much from the server's.
	ErrClock = errors.New("the clocks differ")
)

// Error is a request that failed.
type Error struct {
	Op          string // what was tried, e.g. "put"
	Endpoint    string
	Bucket, Key string
	Code        string // the server's, e.g. "SlowDown"; empty if there was no answer
	Status      int    // HTTP status; zero if there was no answer
	Message     string // the server's, made harmless
	Kind        error  // one of the above, or nil
	Err         error  // of the connection, if there was no answer
}

func (e *Error) Error() string {
	where := e.Endpoint + "/" + e.Bucket
	if e.Key != "" {
		where += "/" + clean(e.Key)
	}
	why := e.Message
	switch {
	case e.Status == 0 && e.Err != nil:
		why = e.Err.Error()
	case e.Code != "" && why != "" && e.Status >= 300:
		why = fmt.Sprintf("%s (%s, status %d)", why, clean(e.Code), e.Status)
	case e.Code != "" && why != "":
		why = fmt.Sprintf("%s (%s)", why, clean(e.Code))
	}
	return fmt.Sprintf("%s %s: %s", e.Op, where, why)
}

func (e *Error) Unwrap() []error {
	var out []error
	if e.Kind != nil {
		out = append(out, e.Kind)
	}
	if e.Err != nil {
		out = append(out, e.Err)
	}
	return out
}

// Permanent reports whether trying again is useless.
func (e *Error) Permanent() bool {
	if e.Status == 0 {
		_, permanent := transport.Explain(e.Err)
		return permanent
	}
	switch e.Kind {
	case ErrBusy:
		return false
	case nil:
		// Answers that mean "the request did not arrive as it was sent".
		switch e.Code {
		case "RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch", "ConditionalRequestConflict", "OperationAborted":
			return false
		}
		return e.Status >= 400 && e.Status < 500 && e.Status != http.StatusRequestTimeout && e.Status != http.StatusTooManyRequests && e.Status != http.StatusConflict
	}
	return true
}

// Hints says what to do next.
func (e *Error) Hints() []string {
	var h string
	switch e.Kind {
	case ErrNoBucket:
		h = fmt.Sprintf("Is the name of the bucket right, and is it at %s, in this region?", e.Endpoint)
	case ErrAccessDenied:
		h = "The credentials must allow to list, get, put and delete objects (s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject). Are they those of the right account, and does the bucket's policy name it?"
	case ErrBadCredentials:
		h = "The server refuses the credentials: look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or at the profile."
	case ErrClock:
		h = "Set this machine's clock: S3 refuses requests that are 15 minutes early or late."
	case ErrNoSpace:
		h = "Make room at the server, or raise the quota of the bucket."
	case ErrBusy:
		h = "Try again later. Fewer --connections put less load on the server."
	case ErrLocked:
		h = "The object's retention or legal hold forbids to delete or change it before it ends."
	default:
		if e.Status == 0 {
			h, _ = transport.Explain(e.Err)
		}
		if e.Status == http.StatusMovedPermanently || e.Status == http.StatusTemporaryRedirect || e.Code == "AuthorizationHeaderMalformed" || e.Code == "PermanentRedirect" {
			h = "The bucket is in another region: set --s3-region, or AWS_REGION."
		}
	}
	if h == "" {
		return nil
	}
	return []string{h}
}

// kinds of the servers' codes. A code that is not here goes by the status.
var kinds = map[string]error{
	"NoSuchKey": ErrNotFound, "NoSuchVersion": ErrNotFound, "NoSuchBucket": ErrNoBucket, "NotFound": ErrNotFound,
	"AccessDenied": ErrAccessDenied, "AllAccessDisabled": ErrAccessDenied, "AccountProblem": ErrAccessDenied,
	"InvalidAccessKeyId": ErrBadCredentials, "SignatureDoesNotMatch": ErrBadCredentials, "InvalidToken": ErrBadCredentials,
	"ExpiredToken": ErrBadCredentials, "XMinioInvalidIAMCredentials": ErrBadCredentials, "XAdminUserNotFound": ErrBadCredentials, "TokenRefreshRequired": ErrBadCredentials,
	"RequestTimeTooSkewed": ErrClock, "RequestExpired": ErrClock,
	"PreconditionFailed": ErrChanged, "InvalidRange": ErrRange,
	"SlowDown": ErrBusy, "SlowDownRead": ErrBusy, "SlowDownWrite": ErrBusy, "ServiceUnavailable": ErrBusy, "InternalError": ErrBusy,
	"Throttling": ErrBusy, "ThrottlingException": ErrBusy, "RequestLimitExceeded": ErrBusy, "RequestThrottled": ErrBusy,
	"TooManyRequests": ErrBusy, "BandwidthLimitExceeded": ErrBusy,
	"QuotaExceeded": ErrNoSpace, "XMinioStorageFull": ErrNoSpace, "XMinioAdminBucketQuotaExceeded": ErrNoSpace, "InsufficientStorage": ErrNoSpace,
	"NotImplemented": ErrUnsupported, "MethodNotAllowed": ErrUnsupported, "XNotImplemented": ErrUnsupported,
	"ObjectLocked": ErrLocked, "InvalidRequestObjectLocked": ErrLocked, "ObjectLockedByRetention": ErrLocked,
}

// Explain puts the error of a request into an *Error. It returns nil for nil. The end of a context stays
// what it is, with what was tried.
func (c *Client) Explain(op, bucket, key string, err error) error {
	if err == nil {
		return nil
	}
	var own *Error
	if errors.As(err, &own) {
		return err
	}
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("%s %s/%s/%s: %w", op, c.endpoint, bucket, clean(key), err)
	}
	e := &Error{Op: op, Endpoint: c.endpoint, Bucket: bucket, Key: key}
	var r minio.ErrorResponse
	if !errors.As(err, &r) {
		e.Err = err
		if errors.Is(err, io.EOF) {
			e.Err = io.ErrUnexpectedEOF // the end of a connection, not of a file
		}
		return e
	}
	e.Code, e.Status, e.Message = r.Code, r.StatusCode, clean(r.Error())
	e.Kind = kinds[r.Code]
	if e.Kind == ErrAccessDenied && strings.Contains(r.Message, "object lock") {
		e.Kind = ErrLocked // Amazon has no code of its own for it
	}
	if e.Kind == nil {
		switch {
		case r.StatusCode == http.StatusNotFound && r.Code == "":
			e.Kind = ErrNotFound // with another code, something else than the object may be missing
		case r.StatusCode == http.StatusForbidden:
			e.Kind = ErrAccessDenied
		case r.StatusCode == http.StatusUnauthorized:
			e.Kind = ErrBadCredentials
		case r.StatusCode == http.StatusPreconditionFailed:
			e.Kind = ErrChanged
		case r.StatusCode == http.StatusRequestedRangeNotSatisfiable:
			e.Kind = ErrRange
		case r.StatusCode == http.StatusInsufficientStorage:
			e.Kind = ErrNoSpace
		case r.StatusCode == http.StatusNotImplemented:
			e.Kind = ErrUnsupported
		case r.StatusCode >= 500 || r.StatusCode == http.StatusTooManyRequests:
			e.Kind = ErrBusy
		}
	}
	return e
}

// clean makes text from a server fit for one line of a message.
func clean(s string) string {
	const most = 300
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.TrimSpace(s))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
