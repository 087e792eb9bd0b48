package proxy

import (
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/forwarded"
	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// call is one request of a client, whatever it came over: decided (ruling.go),
// lent a connection to an endpoint of the target (lending.go), recorded. Who
// moves its bytes embeds it.
type call struct {
	c      *conn
	q      *question // what of the connection is asked about the request
	w      *waits
	caller caller

	s     *settings // in force when it was decided
	began time.Time

	req   http1.Request
	asked policy.HTTP // what rules see of it
	told  http1.Edit  // what its service is told
	id    string      // of the request, for log and service
	notes []byte      // memory of told and id

	loan upstream.Loan
	b    *backend // over HTTP/1.1
	far  *far     // over HTTP/2; nil where b is not
	used bool     // it was sent something

	budget *upstream.Budget // of retries
	proof  identity.JWT     // the client's second one; the zero JWT where it has none
	tried  upstream.Tried
	tries  int

	resp http1.Response

	record telemetry.Access
	http   telemetry.AccessHTTP
	came   outcome
}

// caller is the client's connection, as far as what it came over makes a
// difference.
type caller interface {
	// makerFor returns what tells services of the client, as settings have it.
	makerFor(s *settings) *forwarded.Maker
	// version is that of HTTP: 1 or 2.
	version() int
}

// of begins the call for what is asked as q.
func (x *call) of(q *question, w *waits, from caller) {
	x.c, x.q, x.w, x.caller = q.c, q, w, from
	x.record.HTTP = &x.http
}

// spareCalls are for passages. That of HTTP/1.1 is part of its exchange.
var spareCalls = sync.Pool{New: func() any { return &call{} }}

// reset forgets the request but not the memory it was held in.
func (x *call) reset() {
	headers, notes, set, more := x.asked.Headers, x.notes, x.told.Set, x.told.Append
	clear(headers)
	x.req.Forget()
	x.resp.Forget()
	clear(set)
	clear(more)
	*x = call{
		req: x.req, resp: x.resp,
		notes: notes[:0], asked: policy.HTTP{Headers: headers[:0]}, told: http1.Edit{Set: set[:0], Append: more[:0]},
	}
	if cap(notes) > maxNotes {
		x.notes = nil
	}
}

// maxNotes is how much memory for fields of our own a call keeps, in bytes.
const maxNotes = 4 << 10

// explain says what an error of the service is.
func (x *call) explain(err error) string {
	var bad *http1.Error
	switch {
	case errors.As(err, &bad):
		return bad.Error()
	case isInterrupt(err):
		return "it sent nothing for too long"
	}
	return explainBroken(err)
}

// mayRetry reports whether a request of which all is there can be sent again:
// the client cannot tell by what comes of it.
func (x *call) mayRetry(fresh bool) bool {
	if !idempotent(x.req.Method) || x.req.Upgrade != "" {
		return false
	}
	if !fresh { // it was closed while it lay idle: that says nothing of the service
		return x.tries <= maxStale
	}
	return x.tries <= x.s.HTTP.Retries && x.budget.TakeRetry()
}

// maxStale bounds how many idle connections that turn out to be closed a
// request is sent on.
const maxStale = 3

// idempotent reports whether it makes no difference how often a request is
// carried out (RFC 9110, section 9.2.2).
func idempotent(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}
