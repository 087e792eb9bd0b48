package http1

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// Error is why a message is refused.
type Error struct {
	// Status is what to answer with: 4xx or 5xx; 502 for a response.
	Status int
	// Reason is one word for logs and the labels of metrics. It never changes
	// its meaning.
	Reason string
	// problem is what is wrong and what to do.
	problem string
	// cause is of proxy/canonical, or nil.
	cause error
}

// Error returns what is wrong and what to do. It is safe to print, whatever
// was refused.
func (e *Error) Error() string {
	if e.cause != nil {
		return e.cause.Error()
	}
	return e.problem
}

// Unwrap returns the [*canonical.Error] behind it, if there is one.
func (e *Error) Unwrap() error { return e.cause }

func refuse(status int, reason, problem string) error {
	return &Error{Status: status, Reason: reason, problem: problem}
}

func bad(reason, problem string) error { return refuse(http.StatusBadRequest, reason, problem) }

// uncanonical wraps an error of proxy/canonical.
func uncanonical(err error) error {
	var why *canonical.Error
	if !errors.As(err, &why) {
		return &Error{Status: http.StatusBadRequest, Reason: "canonical", cause: err}
	}
	status := http.StatusBadRequest
	if why.Reason == canonical.TooLong {
		switch why.Part {
		case canonical.PartTarget, canonical.PartPath, canonical.PartQuery:
			status = http.StatusRequestURITooLong
		case canonical.PartHeaderName, canonical.PartHeaderValue:
			status = http.StatusRequestHeaderFieldsTooLarge
		}
	}
	return &Error{Status: status, Reason: why.Reason.String(), cause: err}
}

// ofService turns a refusal into one of what a service sent: the client is
// told 502, whatever was wrong.
func ofService(err error) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	return &Error{
		Status: http.StatusBadGateway, Reason: e.Reason,
		problem: e.problem, cause: wrapResponse(e.cause),
	}
}

func wrapResponse(cause error) error {
	if cause == nil {
		return nil
	}
	return fmt.Errorf("response: %w", cause)
}
