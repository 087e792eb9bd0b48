package extauthz

import (
	"net/http"
	"strconv"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	kind "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
)

// maxRequestID bounds an id that goes into answers and records, in bytes.
const maxRequestID = 128

// requestID returns the id that Envoy gave the request, or nothing where that
// cannot stand in a log or an answer.
func requestID(q *question, id string) string {
	for i := range q.http.Headers {
		if q.http.Headers[i].Name == "x-request-id" {
			id = q.http.Headers[i].Value
			break
		}
	}
	for i := range len(id) {
		switch c := id[i]; {
		case c <= ' ' || c > '~', c == '"', c == ',', c == ';', c == '\\':
			return ""
		}
	}
	if len(id) > maxRequestID {
		return ""
	}
	return id
}

// passes is the answer for a request that may go on: it changes nothing of it.
func passes() *auth.CheckResponse {
	return &auth.CheckResponse{
		Status:       &rpc.Status{Code: int32(codes.OK)},
		HttpResponse: &auth.CheckResponse_OkResponse{OkResponse: &auth.OkHttpResponse{}},
	}
}

// refuses is the answer for one that may not, and what its client gets in place
// of a response: the status, and the id by which whoever reads the log finds
// why.
func refuses(status int, id, after string, call bool) *auth.CheckResponse {
	body := strconv.Itoa(status) + " " + http.StatusText(status)
	switch {
	case call && id != "": // it becomes the message of a status, which is one line
		body += ", request " + id
	case call:
	case id != "":
		body += "\nrequest " + id + "\n"
	default:
		body += "\n"
	}
	denied := &auth.DeniedHttpResponse{Status: &kind.HttpStatus{Code: kind.StatusCode(status)}, Body: body}
	add := func(name, value string) {
		denied.Headers = append(denied.Headers, &core.HeaderValueOption{
			Header:       &core.HeaderValue{Key: name, Value: value},
			AppendAction: core.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		})
	}
	if !call {
		add("content-type", "text/plain; charset=utf-8")
	}
	if id != "" {
		add("x-request-id", id)
	}
	if after != "" {
		add("retry-after", after)
	}
	return &auth.CheckResponse{
		Status:       &rpc.Status{Code: int32(codes.PermissionDenied)},
		HttpResponse: &auth.CheckResponse_DeniedResponse{DeniedResponse: denied},
	}
}
