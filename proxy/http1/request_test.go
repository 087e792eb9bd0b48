package http1

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// parseRequest parses a copy of a request, in one piece.
func parseRequest(in string) (r *Request, n int, err error) {
	r = &Request{}
	n, err = r.Parse([]byte(in))
	return r, n, err
}

// refusal is the status and reason of an error; "" for none.
func refusal(t testing.TB, err error) string {
	t.Helper()
	if err == nil {
		return ""
	}
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("%v is no *Error", err)
	}
	for _, b := range []byte(e.Error()) {
		if b < ' ' || b > '~' {
			t.Fatalf("%q is not safe to print", e.Error())
		}
	}
	return fmt.Sprintf("%d %s", e.Status, e.Reason)
}

// summary is what was understood of a request.
func summary(r *Request) string {
	s := fmt.Sprintf("%s %s %s 1.%d", r.Method, r.Target, r.Host, r.Minor)
	for _, f := range r.Fields {
		s += fmt.Sprintf(" %s=%q", f.Name, f.Value)
		if f.Hop {
			s += "!"
		}
	}
	s += fmt.Sprintf(" body=%d,%d", r.Body, r.Length)
	for _, is := range []struct {
		it   bool
		name string
	}{{r.KeepAlive, "keep"}, {r.Continue, "continue"}, {r.Trailers, "trailers"}, {r.Upgrade != "", "upgrade=" + r.Upgrade}} {
		if is.it {
			s += " " + is.name
		}
	}
	return s
}

var requestCases = []struct{ in, want string }{
	{"GET / HTTP/1.1\r\nHost: a\r\n\r\n", `GET / a 1.1 host="a" body=0,0 keep`},
	{"GET /%41?q HTTP/1.1\r\nHOST:\tExample.ORG. \r\nX-A:\r\nX-a: b, c\r\n\r\n", `GET /A?q example.org 1.1 host="Example.ORG." x-a="" x-a="b, c" body=0,0 keep`},
	{"GET http://A:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", `GET / a:80 1.1 host="a:80" body=0,0 keep`},
	{"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", `OPTIONS * a 1.1 host="a" body=0,0 keep`},
	{"GET / HTTP/1.0\r\nHost: a\r\n\r\n", `GET / a 1.0 host="a" body=0,0`},
	{"GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n", `GET / a 1.0 host="a" connection="Keep-Alive"! body=0,0 keep`},
	{"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, , X-b\r\nx-B: 1\r\n\r\n", `GET / a 1.1 host="a" connection="close, , X-b"! x-b="1"! body=0,0`},
	{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\nExpect: 100-Continue\r\n\r\n", `POST / a 1.1 host="a" content-length="7"! expect="100-Continue" body=1,7 keep continue`},
	{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nExpect: 100-continue\r\n\r\n", `POST / a 1.1 host="a" content-length="0"! expect="100-continue" body=0,0 keep`},
	{"POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 7\r\nExpect: 100-continue\r\n\r\n", `POST / a 1.0 host="a" content-length="7"! expect="100-continue"! body=1,7`},
	{"GET / HTTP/1.0\r\nHost: a\r\nExpect: x\r\n\r\n", `GET / a 1.0 host="a" expect="x"! body=0,0`},
	{"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: CHUNKED\r\nTE: trailers\r\nTrailer: x-sum\r\n\r\n", `POST / a 1.1 host="a" transfer-encoding="CHUNKED"! te="trailers"! trailer="x-sum" body=2,0 keep trailers`},
	{"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", `GET / a 1.1 host="a" connection="Upgrade"! upgrade="websocket"! body=0,0 keep upgrade=websocket`},
	{"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c, websocket\r\n\r\n", `GET / a 1.1 host="a" connection="Upgrade"! upgrade="h2c, websocket"! body=0,0 keep`},
	{"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n", `GET / a 1.1 host="a" upgrade="websocket"! body=0,0 keep`},
	{"GET / HTTP/1.1\r\nHost: a\r\nx_forwarded_for: b\r\n\r\n", `GET / a 1.1 host="a" x_forwarded_for="b" body=0,0 keep`},
}

func TestRequest(t *testing.T) {
	t.Parallel()
	for _, c := range requestCases {
		r, n, err := parseRequest(c.in + "GET /next")
		if err != nil || n != len(c.in) || summary(r) != c.want {
			t.Errorf("%q: %d of %d, %v\n got %s\nwant %s", c.in, n, len(c.in), err, summary(r), c.want)
		}
	}
}

// with is a request with these lines behind its host.
func with(lines string) string { return "POST / HTTP/1.1\r\nHost: a\r\n" + lines + "\r\n" }

// smuggling are requests that two readers understand differently, or that
// pass for another one.
var smuggling = []struct{ in, want, why string }{
	{with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), "400 length_and_coding", "CL.TE"},
	{with("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"), "400 length_and_coding", "TE.CL"},
	{with("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n"), "400 length_and_coding", "TE.0"},
	{with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), "400 several_codings", "TE.TE: twice"},
	{with("Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n"), "400 several_codings", "TE.TE: the second hides the first"},
	{with("Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n"), "501 coding", "TE.TE: the first hides the second"},
	{with("Transfer-Encoding: xchunked\r\n"), "501 coding", "found by who looks for a part"},
	{with("Transfer-Encoding: chunked, identity\r\n"), "501 coding", "chunked is not last"},
	{with("Transfer-Encoding: identity\r\n"), "501 coding", "gone since RFC 7230"},
	{with("Transfer-Encoding: gzip, chunked\r\n"), "501 coding", "nobody decodes it"},
	{with("Transfer-Encoding: \"chunked\"\r\n"), "501 coding", "quoted"},
	{with("Transfer-Encoding:\r\n"), "400 bad_coding", "empty"},
	{with("Transfer-Encoding : chunked\r\n"), "400 not_token", "a space before the colon"},
	{with("Transfer-Encoding\t: chunked\r\n"), "400 not_token", "a tab before the colon"},
	{with("Transfer-Encoding:\x0bchunked\r\n"), "400 control", "a vertical tab that some trim"},
	{with("Transfer-Encoding: chunked\x00\r\n"), "400 control", "NUL"},
	{with("X: a\rTransfer-Encoding: chunked\r\n"), "400 control", "a bare CR that ends lines for some"},
	{with("X: a\nTransfer-Encoding: chunked\r\n"), "400 bare_lf", "a bare LF"},
	{with("Transfer-Encoding:\r\n chunked\r\n"), "400 bad_coding", "obs-fold"},
	{with("X: a\r\n b\r\n"), "400 obs_fold", "obs-fold"},
	{with("X: a\r\n\tb: c\r\n"), "400 obs_fold", "obs-fold with a tab"},
	{"POST / HTTP/1.1\r\n Host: a\r\n\r\n", "400 obs_fold", "white space before the first field"},
	{with("Transfer_Encoding: chunked\r\n"), "400 underscore", "_ for -"},
	{with("Content_Length: 5\r\n"), "400 underscore", "_ for -"},
	{with("Content-Length: 5\r\nContent-Length: 5\r\n"), "400 several_lengths", "two readers, two lines"},
	{with("Content-Length: 5\r\nContent-Length: 6\r\n"), "400 several_lengths", "two lengths"},
	{with("Content-Length: 5, 5\r\n"), "400 bad_length", "a list"},
	{with("Content-Length: +5\r\n"), "400 bad_length", "a sign"},
	{with("Content-Length: -1\r\n"), "400 bad_length", "a sign"},
	{with("Content-Length: 0x5\r\n"), "400 bad_length", "hexadecimal for some"},
	{with("Content-Length: 05\r\n"), "400 bad_length", "octal for some"},
	{with("Content-Length: 5 \x0b\r\n"), "400 control", "white space that some trim"},
	{with("Content-Length:\r\n"), "400 bad_length", "empty"},
	{with("Content-Length: 18446744073709551621\r\n"), "413 body_too_large", "5, where 64 bits overflow"},
	{"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", "400 coding_in_1_0", "1.0 has no codings"},
	{with("Host: a\r\n"), "400 several_hosts", "twice the same"},
	{with("Host: b\r\n"), "400 several_hosts", "two hosts"},
	{"GET / HTTP/1.1\r\n\r\n", "400 empty", "no host"},
	{"GET / HTTP/1.0\r\n\r\n", "400 empty", "no host: past rules that name one"},
	{"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", "400 host_conflict", "the target names another host"},
	{"GET http://b/ HTTP/1.1\r\n\r\n", "400 empty", "absolute-form alone"},
	{with("Connection: content-length\r\n"), "400 connection_option", "the next hop loses the length"},
	{with("Connection: close, Host\r\n"), "400 connection_option", "the next hop loses the host"},
	{with("Connection: " + strings.Repeat("a,", 33) + "\r\n"), "400 connection_option", "options times fields"},
	{with("Connection: a b\r\n"), "400 bad_list", "no list of tokens"},
	{with("Trailer: content-length\r\n"), "400 trailer", "a length behind the body"},
	{with("no colon\r\n"), "400 no_colon", "no field"},
	{with(": x\r\n"), "400 empty", "no name"},
	{"GET /a/../b HTTP/1.1\r\nHost: a\r\n\r\n", "400 dot_segment", "another path"},
	{"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "400 bad_version", "two spaces"},
	{"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", "400 bad_version", "a space at the end"},
	{"GET / a HTTP/1.1\r\nHost: a\r\n\r\n", "400 bad_version", "a space in the target"},
	{"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n", "400 not_token", "tabs for spaces"},
	{"GET /\r\n\r\n", "400 bad_version", "HTTP/0.9"},
	{"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "400 empty", "an empty line before"},
	{"get / HTTP/1.1\r\nHost: a\r\n\r\n", "400 lower_case", "GET to some"},
	{"GET / http/1.1\r\nHost: a\r\n\r\n", "400 bad_version", "lower case"},
	{"GET / HTTP/1.10\r\nHost: a\r\n\r\n", "400 bad_version", "1.1 to some"},
	{"GET / HTTP/1.2\r\nHost: a\r\n\r\n", "505 version", "unknown"},
	{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "505 version", "the preface of HTTP/2"},
	{"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", "501 connect", "a tunnel past the rules"},
	{"TRACE / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n", "400 trace_body", "a body of none"},
	{with("Expect: 200-ok\r\n"), "417 expectation", "nobody can meet it"},
	{"GET /" + strings.Repeat("a", maxRequestLine), "414 too_long", "never ends"},
	{"GET /" + strings.Repeat("a", 8<<10) + " HTTP/1.1\r\nHost: a\r\n\r\n", "414 too_long", "a long target"},
	{with("X: " + strings.Repeat("a", maxFieldLine)), "431 too_large", "a field that never ends"},
	{with(strings.Repeat("X: "+strings.Repeat("a", 16000)+"\r\n", 5)), "431 too_large", "a long head"},
	{with(strings.Repeat("X: a\r\n", MaxFields)), "431 too_large", "many fields"},
	{with(strings.Repeat("a", 257) + ": b\r\n"), "431 too_long", "a long name"},
	{"\x16\x03\x01\x00\xa5\x01\x00\x00\n", "400 bare_lf", "TLS"},
}

func TestSmuggling(t *testing.T) {
	t.Parallel()
	for _, c := range smuggling {
		_, n, err := parseRequest(c.in)
		if got := refusal(t, err); got != c.want || n != 0 {
			t.Errorf("%s: %.80q: %s, %v; want %s", c.why, c.in, got, err, c.want)
		}
	}
}

// trickle parses what arrives byte by byte, each time at another address.
func trickle(in string, parse func([]byte) (int, error)) (int, error) {
	for i := range len(in) + 1 {
		if n, err := parse([]byte(in[:i])); n != 0 || err != nil {
			return n, err
		}
	}
	return 0, nil
}

func TestRequestInPieces(t *testing.T) {
	t.Parallel()
	var r Request // one for all: nothing is left of the one before
	for _, c := range requestCases {
		n, err := trickle(c.in, r.Parse)
		if err != nil || n != len(c.in) || summary(&r) != c.want {
			t.Errorf("%q: %d, %v\n got %s\nwant %s", c.in, n, err, summary(&r), c.want)
		}
		for at := range len(c.in) { // two pieces
			if n, err := r.Parse([]byte(c.in[:at])); n != 0 || err != nil {
				t.Fatalf("%q: %d, %v", c.in[:at], n, err)
			}
			if n, err := r.Parse([]byte(c.in)); n != len(c.in) || err != nil || summary(&r) != c.want {
				t.Fatalf("%q after %d: %d, %v", c.in, at, n, err)
			}
		}
	}
	for _, c := range smuggling {
		if len(c.in) > 4<<10 {
			continue // byte by byte they are copied for seconds
		}
		if _, err := trickle(c.in, r.Parse); refusal(t, err) != c.want {
			t.Errorf("%q: %v; want %s", c.in, err, c.want)
		}
	}
}
