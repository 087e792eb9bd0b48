package canonical

import (
	"bufio"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

var goodTargets = []struct {
	method, in string
	want       Target
	forward    string
}{
	{"GET", "/", Target{Path: "/"}, "/"},
	{"GET", "/a%7Eb?x=%2e%2e/&y", Target{Path: "/a~b", Query: "x=%2e%2e/&y", HasQuery: true}, "/a~b?x=%2e%2e/&y"},
	{"GET", "/a?", Target{Path: "/a", HasQuery: true}, "/a?"},
	{"GET", "/a??b?", Target{Path: "/a", Query: "?b?", HasQuery: true}, "/a??b?"},
	{"GET", "/a?[x]={\"y\"|'z'}\\", Target{Path: "/a", Query: "[x]={\"y\"|'z'}\\", HasQuery: true}, "/a?[x]={\"y\"|'z'}\\"},
	{"OPTIONS", "*", Target{Path: "*"}, "*"},
	{"OPTIONS", "/a", Target{Path: "/a"}, "/a"},
	{"GET", "http://example.org/a?b", Target{Path: "/a", Query: "b", HasQuery: true, Host: "example.org", Scheme: "http"}, "/a?b"},
	{"GET", "HtTpS://Example.ORG:8443", Target{Path: "/", Host: "example.org:8443", Scheme: "https"}, "/"},
	{"GET", "http://example.org?b", Target{Path: "/", Query: "b", HasQuery: true, Host: "example.org", Scheme: "http"}, "/?b"},
	{"OPTIONS", "http://example.org", Target{Path: "*", Host: "example.org", Scheme: "http"}, "*"},
	{"OPTIONS", "http://example.org/", Target{Path: "/", Host: "example.org", Scheme: "http"}, "/"},
	{"OPTIONS", "http://example.org?", Target{Path: "/", HasQuery: true, Host: "example.org", Scheme: "http"}, "/?"},
	{"GET", "http://[2001:DB8::1]/", Target{Path: "/", Host: "[2001:db8::1]", Scheme: "http"}, "/"},
}

var badTargets = []struct {
	method, in string
	part       Part
	want       Reason
}{
	{"GET", "", PartTarget, Empty},
	{"GET", "*", PartTarget, Form},
	{"options", "*", PartTarget, Form},
	{"OPTIONS", "**", PartTarget, Form},
	{"OPTIONS", "*?x", PartTarget, Form},
	{"CONNECT", "example.org:443", PartTarget, Form},
	{"CONNECT", "/", PartTarget, Form},
	{"GET", "example.org:80", PartTarget, Form},
	{"GET", "example.org", PartTarget, Form},
	{"GET", "@evil.example/", PartTarget, Form},
	{"GET", "?x", PartTarget, Form},
	{"GET", "#", PartTarget, Form},
	{"GET", " /", PartTarget, Form},
	{"GET", "ftp://example.org/", PartTarget, Form},
	{"GET", "file:///etc/passwd", PartTarget, Form},
	{"GET", "http:/a", PartTarget, Form},
	{"GET", "http:a", PartTarget, Form},
	{"GET", "http:\\\\example.org/", PartTarget, Form},
	{"GET", "httpſ://example.org/", PartTarget, Form}, // folds to an s in Unicode
	{"GET", "//evil.example/a", PartPath, EmptySegment},
	{"GET", "http:///a", PartHost, Empty},
	{"GET", "http://?a", PartHost, Empty},
	{"GET", "http://good.example@evil.example/", PartHost, Userinfo},
	{"GET", "http://evil.example\\@good.example/", PartHost, Userinfo},
	{"GET", "http://evil.example\\.good.example/", PartHost, Character},
	{"GET", "http://example.org#/a", PartTarget, Fragment},
	{"GET", "http://example.org/../a", PartPath, DotSegment},
	{"GET", "http://example.org//a", PartPath, EmptySegment},
	{"GET", "http://example.org:0/", PartHost, Port},
	{"GET", "/a#b", PartPath, Fragment},
	{"GET", "/a?b#c", PartQuery, Fragment},
	{"GET", "/a?b c", PartQuery, Space},
	{"GET", "/a?b\tc", PartQuery, Control},
	{"GET", "/a?b\r\nHost: evil", PartQuery, Control},
	{"GET", "/a?b\x00", PartQuery, Control},
	{"GET", "/a?é", PartQuery, NotASCII},
	{"GET", "http://example.org?b c", PartQuery, Space},
	{"GET", "/a?" + strings.Repeat("b", MaxTarget-2), PartTarget, TooLong},
}

func TestParseTarget(t *testing.T) {
	t.Parallel()
	for _, c := range goodTargets {
		got, err := ParseTarget(c.method, c.in, Options{})
		if err != nil || got != c.want || got.String() != c.forward {
			t.Errorf("%s %q: %+v, %v, forwarded %q; want %+v", c.method, c.in, got, err, got, c.want)
		}
	}
}

func TestParseTargetRefused(t *testing.T) {
	t.Parallel()
	for _, c := range badTargets {
		got, err := ParseTarget(c.method, c.in, Options{})
		if reasonOf(t, err) != c.want || !strings.HasPrefix(err.Error(), string(c.part)+": ") || got != (Target{}) {
			t.Errorf("%s %.60q: %+v, %v; want %s, %v", c.method, c.in, got, err, c.part, c.want)
		}
	}
}

// TestErrorsKeepSecrets: what may be one is not shown.
func TestErrorsKeepSecrets(t *testing.T) {
	t.Parallel()
	const secret = "hunter2"
	for _, target := range []string{
		"/a?token=" + secret + "#", "/a#?token=" + secret, "/a?token=" + secret + strings.Repeat("x", MaxTarget),
		"http://user:" + secret + "@example.org/", "user:" + secret + "@example.org", "http://example.org#" + secret,
	} {
		if _, err := ParseTarget("GET", target, Options{}); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%.40q: %v", target, err)
		}
	}
	if _, err := Path("/a?token="+secret, Options{}); err == nil || strings.Contains(err.Error(), secret) {
		t.Error(err)
	}
	if _, err := HeaderValue(secret + "\x00"); err == nil || strings.Contains(err.Error(), secret) {
		t.Error(err)
	}
}

// FuzzTarget: what is accepted, forwarded and parsed again is the same, and
// net/http reads the same path, query and host from it.
func FuzzTarget(f *testing.F) {
	for _, c := range goodTargets {
		f.Add(c.method, c.in, false, false)
	}
	for _, c := range badTargets {
		f.Add(c.method, c.in, true, true)
	}
	f.Fuzz(func(t *testing.T, method, raw string, slash, empty bool) {
		o := Options{EncodedSlash: slash, EmptySegments: empty}
		got, err := ParseTarget(method, raw, o)
		if reasonOf(t, err) != none {
			return
		}
		again, err := ParseTarget(method, got.String(), o)
		want := got
		want.Host, want.Scheme = "", ""
		if err != nil || again != want {
			t.Fatalf("%s %q became %+v, then %+v, %v", method, raw, got, again, err)
		}
		if got.Path != "*" {
			checkPath(t, got.Path, got.Path, o)
		}
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("OPTIONS " + got.String() + " HTTP/1.1\r\nHost: " + got.Host + "\r\n\r\n")))
		if err != nil {
			t.Fatalf("%s %q became %+v: %v", method, raw, got, err)
		}
		path, err := url.PathUnescape(got.Path)
		if err != nil || r.URL.Path != path || r.URL.RawQuery != got.Query || r.Host != got.Host || r.URL.Fragment != "" {
			t.Fatalf("%s %q became %+v, which net/http reads as %+v of %q", method, raw, got, r.URL, r.Host)
		}
		// Of absolute-form net/http takes more hosts than we do, and no others.
		if u, err := url.Parse(raw); err == nil && got.Scheme != "" {
			if host, err := Host(u.Host); err != nil || host != got.Host || u.Scheme != got.Scheme || u.User != nil {
				t.Fatalf("%q became %+v, which net/url reads as %+v", raw, got, u)
			}
		}
	})
}
