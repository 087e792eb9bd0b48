package extauthz

import (
	"strings"
	"testing"

	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
)

func TestRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		status    int
		id, after string
		call      bool
		body      string
		headers   map[string]string
	}{
		"plain":          {403, "", "", false, "403 Forbidden\n", map[string]string{"content-type": "text/plain; charset=utf-8"}},
		"with an id":     {400, "2f6d", "", false, "400 Bad Request\nrequest 2f6d\n", map[string]string{"content-type": "text/plain; charset=utf-8", "x-request-id": "2f6d"}},
		"limited":        {429, "", "3", false, "429 Too Many Requests\n", map[string]string{"content-type": "text/plain; charset=utf-8", "retry-after": "3"}},
		"a call":         {403, "2f6d", "", true, "403 Forbidden, request 2f6d", map[string]string{"x-request-id": "2f6d"}},
		"a nameless one": {403, "", "", true, "403 Forbidden", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := refuses(c.status, c.id, c.after, c.call)
			d := r.GetDeniedResponse()
			if codes.Code(r.Status.Code) != codes.PermissionDenied || int(d.Status.Code) != c.status || d.Body != c.body {
				t.Errorf("got %v", r)
			}
			if len(d.Headers) != len(c.headers) {
				t.Errorf("headers %v, want %v", d.Headers, c.headers)
			}
			for _, h := range d.Headers {
				if c.headers[h.Header.Key] != h.Header.Value {
					t.Errorf("header %s: %q, want %q", h.Header.Key, h.Header.Value, c.headers[h.Header.Key])
				}
			}
		})
	}
}

func TestPasses(t *testing.T) {
	t.Parallel()
	r := passes()
	if r.Status.Code != int32(codes.OK) || len(r.GetOkResponse().Headers)+len(r.GetOkResponse().HeadersToRemove) != 0 || r.DynamicMetadata != nil {
		t.Errorf("it changes the request: %v", r)
	}
}

// TestCalls: what Envoy says of a gRPC call is read as one, so that its refusal
// is worded as a status.
func TestCalls(t *testing.T) {
	t.Parallel()
	for method, want := range map[string]bool{"POST": true, "GET": false} {
		q := &question{}
		call := of(func(h *auth.AttributeContext_HttpRequest) { h.Method = method })
		if wrong := q.read(envoys(call, header("content-type", "application/grpc+proto"))); wrong != nil {
			t.Fatal(wrong.err)
		}
		if q.http.GRPC() != want {
			t.Errorf("%s: %t, want %t", method, q.http.GRPC(), want)
		}
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		edit func(*auth.AttributeContext)
		want string
	}{
		"the header's":       {header("x-request-id", "2f6d"), "2f6d"},
		"Envoy's own":        {raw("a=b"), "7"},
		"none for a log":     {header("x-request-id", `a"b`), ""},
		"two":                {header("x-request-id", "a,b"), ""},
		"a long one":         {header("x-request-id", strings.Repeat("a", maxRequestID+1)), ""},
		"one that ends line": {raw("x-request-id=a b"), ""},
	} {
		q := &question{}
		sent := envoys(c.edit)
		if wrong := q.read(sent); wrong != nil {
			t.Fatal(name, wrong.err)
		}
		if got := requestID(q, sent.Attributes.Request.Http.Id); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
