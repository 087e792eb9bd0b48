package http1

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestAppendRequest(t *testing.T) {
	t.Parallel()
	const in = "POST http://A/%41?q=%41 HTTP/1.0\r\nHost: A\r\nX-Spiffe-ID: forged\r\nx_spiffe-id: forged\r\nX_Forwarded-Client_Cert: forged\r\n" +
		"X-Request-Id: theirs\r\nx_request_id: theirs\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\n" +
		"TE: trailers\r\nUpgrade: h2c\r\nX-Env: prod\r\nX-Env:  \r\nContent-Length: 3\r\n\r\n"
	const start = "POST /A?q=%41 HTTP/1.1\r\nhost: "
	for _, c := range []struct {
		why, want string
		edit      Edit
	}{
		{
			"nothing but hops", start + "a\r\nx-spiffe-id: forged\r\nx_spiffe-id: forged\r\nx_forwarded-client_cert: forged\r\n" +
				"x-request-id: theirs\r\nx_request_id: theirs\r\nx-env: prod\r\nx-env: \r\ncontent-length: 3\r\n\r\n", Edit{},
		},
		{
			"every spelling of an identity", start + "b:1\r\nx-env: prod\r\nx-env: \r\ncontent-length: 3\r\nx-request-id: ours\r\nx-spiffe-id: real\r\nconnection: close\r\n\r\n",
			Edit{Drop: identity, Host: "b:1", Set: []Field{{Name: "x-request-id", Value: "ours"}}, Append: []Field{{Name: "x-spiffe-id", Value: "real"}}, Close: true},
		},
		{
			"an upgrade", start + "a\r\ncontent-length: 3\r\nx-env: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
			Edit{Drop: identity, Set: []Field{{Name: "x-env", Value: "test"}}, Upgrade: "websocket"},
		},
	} {
		r, _, err := parseRequest(in)
		if err != nil {
			t.Fatal(err)
		}
		want := c.want
		if c.edit.Upgrade != "" {
			want = strings.Replace(want, "content-length", "x-request-id: theirs\r\nx_request_id: theirs\r\ncontent-length", 1)
		}
		if got := string(r.Append(nil, &c.edit)); got != want {
			t.Errorf("%s:\n got %q\nwant %q", c.why, got, want)
		}
	}
}

func TestAppendResponse(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		why, method, in, want string
		edit                  Edit
	}{
		{"counted", "GET", "HTTP/1.0 200 OK\r\nServer: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 OK\r\nserver: x\r\ncontent-length: 3\r\n\r\n", Edit{}},
		{"chunked", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", Edit{}},
		{"to 1.0", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n", Edit{Unchunked: true, Persist: true}},
		{"to 1.0, counted", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: keep-alive\r\n\r\n", Edit{Unchunked: true, Persist: true}},
		{"until close", "GET", "HTTP/1.1 200\r\n\r\n", "HTTP/1.1 200 \r\nconnection: close\r\n\r\n", Edit{}},
		{"HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", Edit{}},
		{"204", "GET", "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n", Edit{}},
		{"103", "GET", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n", Edit{}},
	} {
		var r Response
		if _, err := r.Parse([]byte(c.in), Asked{Method: c.method}); err != nil {
			t.Fatal(err)
		}
		if got := string(r.Append(nil, &c.edit)); got != c.want {
			t.Errorf("%s:\n got %q\nwant %q", c.why, got, c.want)
		}
	}
}

func TestAppendAnswer(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ method, id, wantID, body string }{
		{"GET", "r-1", "r-1", "431 Request Header Fields Too Large\nrequest r-1\n"},
		{"HEAD", "r-1", "r-1", ""},
		{"GET", "", "", "431 Request Header Fields Too Large\n"},
		{"GET", "a\r\nx: y", "", "431 Request Header Fields Too Large\n"},
		{"GET", strings.Repeat("a", 129), "", "431 Request Header Fields Too Large\n"},
	} {
		out := AppendAnswer(nil, &Answer{Status: http.StatusRequestHeaderFieldsTooLarge, ID: c.id, Head: c.method == "HEAD", Close: true})
		got, err := http.ReadResponse(bufio.NewReader(strings.NewReader(string(out))), &http.Request{Method: c.method})
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(got.Body)
		got.Body.Close()
		if err != nil || string(body) != c.body || got.StatusCode != 431 || !got.Close || got.Header.Get("X-Request-Id") != c.wantID || c.body != "" && got.ContentLength != int64(len(body)) {
			t.Errorf("%s %q: %v, %q, %v", c.method, c.id, got, body, err)
		}
		var ours Response
		if n, err := ours.Parse(out, Asked{Method: c.method}); err != nil || n+len(body) != len(out) {
			t.Errorf("%q is refused here: %v", out, err)
		}
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"x-spiffe-id": true, "x_spiffe_id": true, "x-spiffe_id": true, "x-forwarded-client-cert": true,
		"x-spiffe-idx": false, "spiffe-id": false, "x--spiffe-id": false, "": false, "_": false,
	} {
		if got := identity.Has(name); got != want {
			t.Errorf("%s: %t", name, got)
		}
	}
	if (*Names)(nil).Has("a") {
		t.Error("the nil set has a name")
	}
	if _, err := NewNames("a b"); err == nil {
		t.Error("a name that is no token is taken")
	}
}
