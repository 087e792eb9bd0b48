package proxy

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/narthex-id/narthex/proxy/http1"
)

// This file is what is particular to calls of gRPC: how their clients are told
// that they are refused, and how long they say that they wait.

// The status codes of gRPC that we answer with.
const (
	grpcInvalidArgument   = 3
	grpcDeadlineExceeded  = 4
	grpcPermissionDenied  = 7
	grpcResourceExhausted = 8
	grpcUnimplemented     = 12
	grpcInternal          = 13
	grpcUnavailable       = 14
	grpcUnauthenticated   = 16
)

// callCode is the status of gRPC for one of HTTP.
func callCode(status int) int {
	switch status {
	case http.StatusUnauthorized:
		return grpcUnauthenticated
	case http.StatusForbidden:
		return grpcPermissionDenied
	case http.StatusTooManyRequests, http.StatusRequestEntityTooLarge, http.StatusRequestHeaderFieldsTooLarge:
		return grpcResourceExhausted
	case http.StatusNotImplemented:
		return grpcUnimplemented
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusRequestTimeout:
		return grpcUnavailable
	}
	if status < http.StatusInternalServerError {
		return grpcInvalidArgument
	}
	return grpcInternal
}

// callStatus appends the fields that end a call: its status, and a message with
// the request's id, by which whoever reads the log finds why.
func (x *call) callStatus(fields []http1.Field, status int) []http1.Field {
	message := strconv.Itoa(status) + " " + http.StatusText(status)
	if x.id != "" {
		message += ", request " + x.id
	}
	code := callCode(status)
	if within, ok := x.callTime(); ok && code == grpcUnavailable && time.Since(x.began) >= within {
		code = grpcDeadlineExceeded // which is also why a service breaks off then
	}
	return append(fields,
		http1.Field{Name: "grpc-status", Value: strconv.Itoa(code)},
		http1.Field{Name: "grpc-message", Value: message})
}

// graceForAnswer is how much longer than its client a call is waited for, so
// that the client's own deadline comes first.
const graceForAnswer = time.Second

// answerWithin is how long the service may take to answer, or 0 for as long as
// it does. A call says so itself, or may be one that is answered whenever there
// is something to say.
func (x *call) answerWithin() time.Duration {
	if !x.asked.GRPC() {
		return x.s.responseWithin(x.bound())
	}
	if within, ok := x.callTime(); ok {
		return within + graceForAnswer
	}
	return 0
}

// callTime is how long the client of a call waits, if it says so.
func (x *call) callTime() (within time.Duration, ok bool) {
	for i := range x.asked.Headers {
		if h := &x.asked.Headers[i]; h.Name == "grpc-timeout" {
			return callTimeout(h.Value)
		}
	}
	return 0, false
}

// callTimeout reads a grpc-timeout: at most eight digits and a unit.
func callTimeout(s string) (time.Duration, bool) {
	const units = "HMSmun"
	of := [...]time.Duration{time.Hour, time.Minute, time.Second, time.Millisecond, time.Microsecond, time.Nanosecond}
	if len(s) < 2 || len(s) > 9 {
		return 0, false
	}
	unit := strings.IndexByte(units, s[len(s)-1])
	n, err := strconv.ParseUint(s[:len(s)-1], 10, 32)
	if unit < 0 || err != nil {
		return 0, false
	}
	if most := int64(1<<62) / int64(of[unit]); int64(n) > most {
		return time.Duration(1 << 62), true
	}
	return time.Duration(n) * of[unit], true
}
