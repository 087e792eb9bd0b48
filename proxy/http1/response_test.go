package http1

import (
	"fmt"
	"strings"
	"testing"
)

func responseSummary(r *Response) string {
	s := fmt.Sprintf("%d %q 1.%d", r.Status, r.Phrase, r.Minor)
	for _, f := range r.Fields {
		s += fmt.Sprintf(" %s=%q", f.Name, f.Value)
	}
	s += fmt.Sprintf(" body=%d,%d", r.Body, r.Length)
	if r.KeepAlive {
		s += " keep"
	}
	if r.Interim() {
		s += " interim"
	}
	if r.Upgrade != "" {
		s += " upgrade=" + r.Upgrade
	}
	return s
}

var responseCases = []struct {
	asked    Asked
	in, want string
}{
	{Asked{Method: "GET"}, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", `200 "OK" 1.1 content-length="3" body=1,3 keep`},
	{Asked{Method: "GET"}, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", `200 "OK" 1.1 content-length="0" body=0,0 keep`},
	{Asked{Method: "GET"}, "HTTP/1.1 200\r\nTransfer-Encoding: Chunked\r\n\r\n", `200 "" 1.1 transfer-encoding="Chunked" body=2,-1 keep`},
	{Asked{Method: "GET"}, "HTTP/1.1 404 Not  Found\r\n\r\n", `404 "Not  Found" 1.1 body=3,-1`},
	{Asked{Method: "GET"}, "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n", `200 "OK" 1.0 content-length="3" body=1,3`},
	{Asked{Method: "HEAD"}, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", `200 "OK" 1.1 content-length="3" body=0,3 keep`},
	{Asked{Method: "HEAD"}, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", `200 "OK" 1.1 transfer-encoding="chunked" body=0,-1 keep`},
	{Asked{Method: "GET"}, "HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", `304 "Not Modified" 1.1 content-length="3" body=0,3 keep`},
	{Asked{Method: "GET"}, "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", `204 "No Content" 1.1 content-length="0" body=0,-1 keep`},
	{Asked{Method: "GET"}, "HTTP/1.1 100 Continue\r\n\r\n", `100 "Continue" 1.1 body=0,-1 keep interim`},
	{Asked{Method: "GET"}, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", `103 "Early Hints" 1.1 link="</a>" body=0,-1 keep interim`},
	{Asked{Method: "GET", Upgrade: true}, "HTTP/1.1 101 \r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", `101 "" 1.1 connection="upgrade" upgrade="websocket" body=0,-1 keep upgrade=websocket`},
}

var badResponses = []struct {
	asked         Asked
	in, want, why string
}{
	{Asked{Method: "GET"}, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", "502 length_and_coding", "response splitting"},
	{Asked{Method: "GET"}, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n", "502 several_lengths", "two lines"},
	{Asked{Method: "GET"}, "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "502 coding_in_1_0", "1.0 has no codings"},
	{Asked{Method: "GET"}, "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "502 coding", "nobody decodes it"},
	{Asked{Method: "GET"}, "HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n", "502 body_of_none", "three bytes of the next response"},
	{Asked{Method: "GET"}, "HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: chunked\r\n\r\n", "502 body_of_none", "an interim body"},
	{Asked{Method: "GET"}, "HTTP/1.1 101 \r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", "502 unasked_upgrade", "a tunnel that nobody asked for"},
	{Asked{Method: "GET", Upgrade: true}, "HTTP/1.1 101 \r\nUpgrade: websocket\r\n\r\n", "502 unasked_upgrade", "not listed in Connection"},
	{Asked{Method: "CONNECT"}, "HTTP/1.1 200 OK\r\n\r\n", "502 connect", "a tunnel"},
	{Asked{Method: "GET"}, "HTTP/1.1 099 \r\n\r\n", "502 bad_status", "below 100"},
	{Asked{Method: "GET"}, "HTTP/1.1 600 \r\n\r\n", "502 bad_status", "above 599"},
	{Asked{Method: "GET"}, "HTTP/1.1 2000 \r\n\r\n", "502 bad_status", "four digits"},
	{Asked{Method: "GET"}, "HTTP/1.1 +20 \r\n\r\n", "502 bad_status", "a sign"},
	{Asked{Method: "GET"}, "HTTP/1.1  200 OK\r\n\r\n", "502 bad_status", "two spaces"},
	{Asked{Method: "GET"}, "HTTP/2.0 200 OK\r\n\r\n", "502 version", "another version"},
	{Asked{Method: "GET"}, "HTTP/1.1 200 O\rK\r\n\r\n", "502 control", "a bare CR"},
	{Asked{Method: "GET"}, "HTTP/1.1 200 OK\n\r\n", "502 bare_lf", "a bare LF"},
	{Asked{Method: "GET"}, "ICY 200 OK\r\n\r\n", "502 bad_status_line", "no HTTP"},
	{Asked{Method: "GET"}, "HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n", "502 obs_fold", "obs-fold"},
	{Asked{Method: "GET"}, "HTTP/1.1 200 " + strings.Repeat("a", 1<<10) + "\r\n\r\n", "502 too_long", "a long phrase"},
}

func TestResponse(t *testing.T) {
	t.Parallel()
	var r Response
	for _, c := range responseCases {
		parse := func(b []byte) (int, error) { return r.Parse(b, c.asked) }
		if n, err := parse([]byte(c.in + "HTTP/1.1")); err != nil || n != len(c.in) || responseSummary(&r) != c.want {
			t.Errorf("%q: %d, %v\n got %s\nwant %s", c.in, n, err, responseSummary(&r), c.want)
		}
		if n, err := trickle(c.in, parse); err != nil || n != len(c.in) || responseSummary(&r) != c.want {
			t.Errorf("%q in pieces: %d, %v\n got %s\nwant %s", c.in, n, err, responseSummary(&r), c.want)
		}
	}
	for _, c := range badResponses {
		parse := func(b []byte) (int, error) { return r.Parse(b, c.asked) }
		if _, err := parse([]byte(c.in)); refusal(t, err) != c.want {
			t.Errorf("%s: %q: %v; want %s", c.why, c.in, err, c.want)
		}
		if _, err := trickle(c.in, parse); refusal(t, err) != c.want {
			t.Errorf("%s: %q in pieces: %v; want %s", c.why, c.in, err, c.want)
		}
	}
}
