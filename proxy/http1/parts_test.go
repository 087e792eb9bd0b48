package http1

import (
	"strings"
	"testing"
)

// get is a request in parts, with these fields.
func get(fields ...string) *Parts {
	return &Parts{Method: "GET", Scheme: "https", Authority: "a", Path: "/", Ended: true, Fields: listed(fields...)}
}

// listed are fields of names and values in turn.
func listed(fields ...string) []Field {
	var list []Field
	for i := 0; i < len(fields); i += 2 {
		list = append(list, Field{Name: fields[i], Value: fields[i+1]})
	}
	return list
}

// but changes parts.
func but(p *Parts, change func(*Parts)) *Parts {
	change(p)
	return p
}

func method(m string) func(*Parts) { return func(p *Parts) { p.Method = m } }
func target(t string) func(*Parts) { return func(p *Parts) { p.Path = t } }
func host(a string) func(*Parts)   { return func(p *Parts) { p.Authority = a } }
func protocol(n string) func(*Parts) {
	return func(p *Parts) { p.Method, p.Protocol, p.Ended = "CONNECT", n, false }
}
func going(p *Parts) { p.Ended = false }

var assembled = []struct {
	in   *Parts
	want string
}{
	{get(), `GET / a 1.1 body=0,0 keep`},
	{but(get("x-a", "1", "x-b", "", "x-a", "2"), target("/%41?q")), `GET /A?q a 1.1 x-a="1" x-b="" x-a="2" body=0,0 keep`},
	{but(get(), host("Example.ORG.:443")), `GET / example.org:443 1.1 body=0,0 keep`},
	{but(get("host", "A"), host("")), `GET / a 1.1 host="A" body=0,0 keep`},
	{get("host", "A"), `GET / a 1.1 host="A" body=0,0 keep`},
	{get("X-Upper", "1"), `GET / a 1.1 x-upper="1" body=0,0 keep`},
	{but(but(get(), method("OPTIONS")), target("*")), `OPTIONS * a 1.1 body=0,0 keep`},
	{but(get("content-length", "7"), going), `GET / a 1.1 content-length="7"! body=1,7 keep`},
	{get("content-length", "0"), `GET / a 1.1 content-length="0"! body=0,0 keep`},
	{but(get(), going), `GET / a 1.1 body=2,0 keep`},
	{but(get("te", "trailers", "content-type", "application/grpc"), going), `GET / a 1.1 te="trailers"! content-type="application/grpc" body=2,0 keep trailers`},
	{but(get("expect", "100-continue"), going), `GET / a 1.1 expect="100-continue" body=2,0 keep continue`},
	{get("cookie", "a=1", "x", "y", "cookie", "b=2", "cookie", "c=3"), `GET / a 1.1 cookie="a=1; b=2; c=3" x="y" body=0,0 keep`},
	{but(get(), protocol("websocket")), `GET / a 1.1 body=0,0 keep upgrade=websocket`},
	{but(get("content-length", "7"), protocol("connect-udp")), `GET / a 1.1 content-length="7"! body=0,0 keep upgrade=connect-udp`},
}

func TestAssemble(t *testing.T) {
	t.Parallel()
	var r Request // used again
	for _, c := range assembled {
		if err := r.Assemble(c.in); err != nil || summary(&r) != c.want {
			t.Errorf("%+v: %v\n got %s\nwant %s", *c.in, err, summary(&r), c.want)
			continue
		}
		checkWritten(t, &r)
	}
}

var badParts = []struct {
	in        *Parts
	want, why string
}{
	{but(get(), method("")), "400 empty", "no method"},
	{but(get(), method("get")), "400 lower_case", "get is GET to some"},
	{but(get(), method("GET /x HTTP/1.1\r\n")), "400 not_token", "a request within a method"},
	{but(get(), method("CONNECT")), "501 connect", "no path to decide on"},
	{but(get(), target("")), "400 empty", "no path"},
	{but(get(), target("*")), "400 form", "* of another method than OPTIONS"},
	{but(get(), target("http://b/")), "400 bad_path", "the path names another host"},
	{but(get(), target("a")), "400 bad_path", "no slash"},
	{but(get(), target("/a/../b")), "400 dot_segment", "another path"},
	{but(get(), target("/a b")), "400 space", "a space in the request line"},
	{but(get(), target("/a HTTP/1.1\r\nx: y")), "400 space", "a line within the path"},
	{but(get(), target("/"+strings.Repeat("a", 9<<10))), "414 too_long", "a path that no request line has room for"},
	{but(get(), host("")), "400 empty", "no host"},
	{but(get(), host("a b")), "400 space", "no host"},
	{but(get(), host("user@a")), "400 userinfo", "userinfo"},
	{get("host", "b"), "400 host_conflict", "two hosts"},
	{get("host", "a", "host", "a"), "400 several_hosts", "twice the same"},
	{get("", "a"), "400 empty", "no name"},
	{get(":path", "/b"), "400 not_token", "a part among the fields"},
	{get("a b", "c"), "400 not_token", "a space in a name"},
	{get("a", "b\r\nc: d"), "400 control", "a line within a value"},
	{get("a", "b\x00"), "400 control", "NUL"},
	{get("a", strings.Repeat("b", 17<<10)), "431 too_long", "a value that no line has room for"},
	{get("connection", "close"), "400 connection_field", "RFC 9113, section 8.2.2"},
	{get("Connection", "x-a", "x-a", "1"), "400 connection_field", "a field that is decided on, and lost"},
	{get("proxy-connection", "close"), "400 connection_field", "RFC 9113, section 8.2.2"},
	{get("keep-alive", "1"), "400 connection_field", "RFC 9113, section 8.2.2"},
	{get("upgrade", "websocket"), "400 connection_field", "a change of the protocol past :protocol"},
	{but(get("transfer-encoding", "chunked"), going), "400 connection_field", "a body with two ends"},
	{but(get("transfer-encoding", "chunked", "content-length", "3"), going), "400 connection_field", "TE.CL"},
	{get("content-length", "3"), "400 length_of_none", "the next request is the body"},
	{but(get("content-length", "3", "content-length", "3"), going), "400 several_lengths", "two readers, two lines"},
	{but(get("content-length", "03"), going), "400 bad_length", "octal for some"},
	{but(get("Content-Length", "+3"), going), "400 bad_length", "a sign"},
	{but(get("content_length", "3"), going), "400 underscore", "_ for -"},
	{get("transfer_encoding", "chunked"), "400 underscore", "_ for -"},
	{but(get("trailer", "content-length"), going), "400 trailer", "a length behind the body"},
	{but(get("expect", "x"), going), "417 expectation", "not served"},
	{but(but(get(), method("TRACE")), going), "400 trace_body", "RFC 9110, section 9.3.8"},
	{but(get(), protocol("a, b")), "400 bad_protocol", "several protocols"},
	{but(get(), protocol("a\r\nx: y")), "400 bad_protocol", "a line within a protocol"},
	{but(get(), func(p *Parts) { p.Fields = make([]Field, MaxFields+1) }), "431 too_large", "too many fields"},
	{get("cookie", strings.Repeat("a", 9<<10), "cookie", strings.Repeat("b", 9<<10)), "431 too_long", "cookies that no line has room for"},
}

func TestBadParts(t *testing.T) {
	t.Parallel()
	for _, c := range badParts {
		var r Request
		if got := refusal(t, r.Assemble(c.in)); got != c.want {
			t.Errorf("%s: got %q, want %q", c.why, got, c.want)
		}
	}
}

// answer is a response in parts.
func answer(status int, ended bool, fields ...string) *Parts {
	return &Parts{Status: status, Ended: ended, Fields: listed(fields...)}
}

func TestAssembleResponse(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		asked   string
		in      *Parts
		want    string
		written string // how HTTP/1.1 is told of its end
	}{
		{"GET", answer(200, false), `200 "OK" 1.1 body=2,-1 keep`, "transfer-encoding: chunked\r\n"},
		{"GET", answer(200, true), `200 "OK" 1.1 body=0,-1 keep`, "content-length: 0\r\n"},
		{"GET", answer(200, false, "content-length", "3"), `200 "OK" 1.1 content-length="3" body=1,3 keep`, "content-length: 3\r\n"},
		{"GET", answer(200, true, "content-length", "0"), `200 "OK" 1.1 content-length="0" body=0,0 keep`, "content-length: 0\r\n"},
		{"POST", answer(599, false, "x-a", "1"), `599 "" 1.1 x-a="1" body=2,-1 keep`, "transfer-encoding: chunked\r\n"},
		{"HEAD", answer(200, true, "content-length", "3"), `200 "OK" 1.1 content-length="3" body=0,3 keep`, "content-length: 3\r\n"},
		{"HEAD", answer(200, true), `200 "OK" 1.1 body=0,-1 keep`, ""},
		{"HEAD", answer(200, false), `200 "OK" 1.1 body=0,-1 keep`, ""},
		{"GET", answer(304, true, "content-length", "3"), `304 "Not Modified" 1.1 content-length="3" body=0,3 keep`, "content-length: 3\r\n"},
		{"GET", answer(304, false), `304 "Not Modified" 1.1 body=0,-1 keep`, ""},
		{"GET", answer(204, true), `204 "No Content" 1.1 body=0,-1 keep`, ""},
		{"GET", answer(204, false, "content-length", "0"), `204 "No Content" 1.1 content-length="0" body=0,-1 keep`, ""},
		{"GET", answer(103, false, "link", "</a>"), `103 "Early Hints" 1.1 link="</a>" body=0,-1 keep interim`, ""},
	} {
		var r Response
		if err := r.Assemble(c.in, Asked{Method: c.asked}); err != nil || responseSummary(&r) != c.want {
			t.Errorf("%s, %+v: %v\n got %s\nwant %s", c.asked, *c.in, err, responseSummary(&r), c.want)
			continue
		}
		out := string(r.Append(nil, &Edit{}))
		if framing := framingOf(out); framing != c.written {
			t.Errorf("%s, %+v is written with %q, want %q", c.asked, *c.in, framing, c.written)
		}
		var again Response
		if n, err := again.Parse([]byte(out), Asked{Method: c.asked}); err != nil || n != len(out) || again.Body != r.Body || passedOn(again.Fields) != passedOn(r.Fields) || !again.KeepAlive {
			t.Errorf("%q is read as %s, %v", out, responseSummary(&again), err)
		}
	}
}

// What takes an extended CONNECT is written so that HTTP/1.1 takes it for the
// change, whatever it says of its content.
func TestSwitch(t *testing.T) {
	t.Parallel()
	for _, in := range []*Parts{answer(200, false), answer(200, true), answer(200, false, "content-length", "3"), answer(299, false), answer(204, true)} {
		in.Fields = append(in.Fields, Field{Name: "sec-websocket-protocol", Value: "chat"})
		var r, again Response
		if err := r.Assemble(in, Asked{Method: "GET"}); err != nil {
			t.Fatal(err)
		}
		r.Switch("websocket")
		out := string(r.Append(nil, &Edit{Upgrade: r.Upgrade}))
		if want := "HTTP/1.1 101 Switching Protocols\r\nsec-websocket-protocol: chat\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"; out != want {
			t.Errorf("%+v is written as %q, want %q", *in, out, want)
		}
		if n, err := again.Parse([]byte(out), Asked{Method: "GET", Upgrade: true}); err != nil || n != len(out) || again.Upgrade != "websocket" {
			t.Errorf("%q is read as %s, %v", out, responseSummary(&again), err)
		}
	}
}

// framingOf are the lines that say where a message ends.
func framingOf(head string) string {
	var lines string
	for line := range strings.Lines(head) {
		if strings.HasPrefix(line, "transfer-encoding:") || strings.HasPrefix(line, "content-length:") {
			lines += line
		}
	}
	return lines
}

func TestBadResponseParts(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		in        *Parts
		want, why string
	}{
		{answer(0, true), "502 bad_status", "no status"},
		{answer(99, true), "502 bad_status", "too low"},
		{answer(600, true), "502 bad_status", "too high"},
		{answer(101, false), "502 bad_status", "RFC 9113, section 8.6"},
		{answer(200, true, "content-length", "3"), "502 length_of_none", "the next response is the body"},
		{answer(204, false, "content-length", "3"), "502 body_of_none", "a body where there is none"},
		{answer(103, false, "content-length", "3"), "502 body_of_none", "a body where there is none"},
		{answer(200, false, "transfer-encoding", "chunked"), "502 connection_field", "RFC 9113, section 8.2.2"},
		{answer(200, false, "connection", "close"), "502 connection_field", "RFC 9113, section 8.2.2"},
		{answer(200, false, "content-length", "3", "content-length", "3"), "502 several_lengths", "two readers, two lines"},
		{answer(200, false, "a", "b\r\nc: d"), "502 control", "a line within a value"},
		{answer(200, false, "a b", "c"), "502 not_token", "no name"},
		{answer(200, false, make([]string, 2*MaxFields+2)...), "502 too_large", "too many fields"},
	} {
		var r Response
		if got := refusal(t, r.Assemble(c.in, Asked{Method: "GET"})); got != c.want {
			t.Errorf("%s: got %q, want %q", c.why, got, c.want)
		}
	}
}

func TestCheckTrailer(t *testing.T) {
	t.Parallel()
	identity, err := NewNames("x-spiffe-id")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, value, want string }{
		{"grpc-status", "0", ""},
		{"x-sum", "", ""},
		{"content-length", "3", "400 trailer"},
		{"transfer_encoding", "chunked", "400 trailer"},
		{"cookie", "a", "400 trailer"},
		{"x-spiffe-id", "spiffe://a/b", "400 trailer_identity"},
		{"x_spiffe-id", "spiffe://a/b", "400 trailer_identity"},
		{":status", "200", "400 not_token"},
		{"a", "b\r\nc: d", "400 control"},
	} {
		if got := refusal(t, CheckTrailer(Field{Name: c.name, Value: c.value}, identity)); got != c.want {
			t.Errorf("%s: %q: got %q, want %q", c.name, c.value, got, c.want)
		}
	}
}
