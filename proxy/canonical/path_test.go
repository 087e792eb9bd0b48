package canonical

import (
	"errors"
	"net/url"
	"path"
	"strings"
	"testing"
)

// reasonOf returns why it was refused; none for no error.
func reasonOf(t *testing.T, err error) Reason {
	t.Helper()
	if err == nil {
		return none
	}
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("%v is no *Error", err)
	}
	if text := err.Error(); len(text) > 256 || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) {
		t.Fatalf("not safe to print: %q", text)
	}
	return e.Reason
}

var goodPaths = []struct{ in, want string }{
	{"/", "/"},
	{"/v1/orders/7", "/v1/orders/7"},
	{"/v1/orders/", "/v1/orders/"},
	{"/shop.Orders/Get", "/shop.Orders/Get"},
	{"/-._~!$&'()*+,=:@", "/-._~!$&'()*+,=:@"},
	{"/.well-known/x", "/.well-known/x"},
	{"/...", "/..."},
	{"/..a/b../.c./%20.a", "/..a/b../.c./%20.a"},
	{"/%2e%2E%2e", "/..."},
	{"/%61%5A%30%7e%2d%5f", "/aZ0~-_"},
	{"/a%2ejson", "/a.json"},
	{"/job%3Astop", "/job:stop"},
	{"/a%40b%2c%21%24%26%27%28%29%2A%2b%3d", "/a@b,!$&'()*+="},
	{"/a%20b", "/a%20b"},
	{"/%3f%23%22%3c%3e%5b%5d%5e%60%7b%7c%7d", "/%3F%23%22%3C%3E%5B%5D%5E%60%7B%7C%7D"},
	{"/caf%c3%a9", "/caf%C3%A9"},
	{"/%F0%9F%98%80", "/%F0%9F%98%80"},
	{"/%e2%80%a6", "/%E2%80%A6"}, // an ellipsis: three dots lead nowhere
	{"/100%25", "/100%25"},
	{"/100%25/20", "/100%25/20"},
	{"/%25%25", "/%25%25"},
	{"/%25g0%25u12", "/%25g0%25u12"},
	{"/" + strings.Repeat("a", MaxTarget-1), "/" + strings.Repeat("a", MaxTarget-1)},
	{strings.Repeat("/a", MaxSegments), strings.Repeat("/a", MaxSegments)},
}

var badPaths = []struct {
	in   string
	want Reason
}{
	{"", Empty},
	{"admin", NotAbsolute},
	{"*", NotAbsolute},
	{"%2fadmin", NotAbsolute},
	{"http://example.org/", NotAbsolute},
	{"\\admin", NotAbsolute},
	{"/" + strings.Repeat("a", MaxTarget), TooLong},
	{strings.Repeat("/a", MaxSegments+1), TooManySegments},
	{strings.Repeat("/a", MaxSegments) + "/", TooManySegments},

	// Traversal (CVE-2019-9901, CVE-2021-41773, CVE-2021-42013).
	{"/..", DotSegment},
	{"/.", DotSegment},
	{"/info/../private", DotSegment},
	{"/a/./b", DotSegment},
	{"/a/..", DotSegment},
	{"/a/../", DotSegment},
	{"/a/%2e%2e/b", DotSegment},
	{"/a/%2E./b", DotSegment},
	{"/a/.%2e/b", DotSegment},
	{"/a/%2e/b", DotSegment},
	{"/cgi-bin/.%2e/%2e%2e/etc/passwd", DotSegment},
	{"/cgi-bin/%%32%65%%32%65/etc/passwd", BadEscape},
	{"/a/..%20/b", DotSegment},
	{"/a/%20../b", DotSegment},
	{"/a/.%20./b", DotSegment},

	// A location /files without its slash, over an alias /data/files/.
	{"/files../secret", none},
	{"/files/../secret", DotSegment},
	{"/files..%2fsecret", EncodedSlash},

	// Path parameters (Tomcat, Jetty, Spring).
	{"/a/..;/manager/html", Parameter},
	{"/a/..;x=y/manager", Parameter},
	{"/a/.;/b", Parameter},
	{"/;/admin", Parameter},
	{"/admin;.css", Parameter},
	{"/admin%3b.css", Parameter},
	{"/admin%3Bjsessionid=1", Parameter},

	// Slashes, and what some take for one.
	{"//admin", EmptySegment},
	{"/a//b", EmptySegment},
	{"/a//", EmptySegment},
	{"//", EmptySegment},
	{"/a%2fb", EncodedSlash},
	{"/a%2Fb", EncodedSlash},
	{"/%2f/a", EncodedSlash},
	{"/a/..\\b", Backslash},
	{"/\\evil.example/x", Backslash},
	{"/a/..%5cb", Backslash},
	{"/a%5C..%5Cb", Backslash},

	// Decoded twice.
	{"/%252e%252e/a", DoubleEncoding},
	{"/a%252fb", DoubleEncoding},
	{"/a%255cb", DoubleEncoding},
	{"/a%2500", DoubleEncoding},
	{"/a%25252fb", DoubleEncoding},
	{"/a%25%32%66b", DoubleEncoding}, // it is %252f once the digits are decoded
	{"/a%25%32fb", DoubleEncoding},
	{"/a%25u002fb", DoubleEncoding},
	{"/a%25%75002fb", DoubleEncoding},
	{"/a%25%2541", DoubleEncoding},

	// Bad escapes, and those of IIS.
	{"/%", BadEscape},
	{"/a%2", BadEscape},
	{"/a%zz", BadEscape},
	{"/a%0x2f", BadEscape},
	{"/a%u002fb", BadEscape},
	{"/%u002e%u002e/a", BadEscape},
	{"/a%U002fb", BadEscape},
	{"/a%%2fb", BadEscape},
	{"/a%+2f", BadEscape},
	{"/a% 2", BadEscape},

	// Control characters and others that end or split what they stand in.
	{"/a%00.png", Control},
	{"/a\x00", Control},
	{"/a%0d%0aHost:%20evil", Control},
	{"/a\r\nHost: evil", Control},
	{"/a%09b", Control},
	{"/a\tb", Control},
	{"/a%7f", Control},
	{"/a\x7f", Control},
	{"/a%c2%85b", Control}, // NEL
	{"/a b", Space},
	{"/a HTTP/1.1", Space},
	{"/admin#", Fragment},
	{"/public#/../admin", Fragment},
	{"/a?b", QueryMark},
	{"/a?/../b", QueryMark},

	// Overlong and otherwise broken UTF-8.
	{"/a%c0%afb", NotUTF8},
	{"/a%C0%AE%C0%AE/b", NotUTF8},
	{"/a%e0%80%afb", NotUTF8},
	{"/a%f0%80%80%afb", NotUTF8},
	{"/a%c1%9cb", NotUTF8},
	{"/a%ed%a0%80", NotUTF8}, // a surrogate
	{"/a%f4%90%80%80", NotUTF8},
	{"/a%ff", NotUTF8},
	{"/a%c3", NotUTF8},
	{"/a%c3/%a9", NotUTF8},
	{"/a%c3%28", NotUTF8},
	{"/a%e2%82", NotUTF8},
	{"/a%fc%80%80%80%80%af", NotUTF8},
	{"/a\xc0\xaf", NotASCII},
	{"/café", NotASCII},
	{"/／admin", NotASCII},

	// Fullwidth and similar.
	{"/a%ef%bc%8fb", Lookalike},         // ／
	{"/%ef%bc%8e%ef%bc%8e/", Lookalike}, // ．．
	{"/a%ef%bc%bcb", Lookalike},         // ＼
	{"/..%ef%bc%9b/", Lookalike},        // ；
	{"/..%cd%be/", Lookalike},           // the Greek question mark
	{"/%ef%bc%852e", Lookalike},         // ％
	{"/%e2%80%a5/a", Lookalike},         // two dot leader
	{"/a%e2%88%95b", Lookalike},         // division slash
	{"/%e2%84%80", Lookalike},           // a/c
}

func TestPath(t *testing.T) {
	t.Parallel()
	for _, c := range goodPaths {
		got, err := Path(c.in, Options{})
		if err != nil || got != c.want {
			t.Errorf("%.60q: %.60q, %v; want %.60q", c.in, got, err, c.want)
		}
		if again, err := Path(got, Options{}); err != nil || again != got {
			t.Errorf("%.60q again: %.60q, %v", got, again, err)
		}
	}
}

func TestPathRefused(t *testing.T) {
	t.Parallel()
	for _, c := range badPaths {
		got, err := Path(c.in, Options{})
		if reason := reasonOf(t, err); reason != c.want || err != nil && got != "" {
			t.Errorf("%.60q: %.60q, %v; want %v, got %v", c.in, got, err, c.want, reason)
		}
	}
}

// TestPathEachByte: of the 256 bytes, raw and escaped, only those pass that
// RFC 3986 lets stand in a segment, and both ways lead to the same.
func TestPathEachByte(t *testing.T) {
	t.Parallel()
	const plain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,=:@"
	const kept = " \"#%<>?[]^`{|}"
	for b := range 256 {
		c := string([]byte{byte(b)})
		raw, rawErr := Path("/x"+c+"x", Options{})
		escaped, err := Path("/x"+string(appendEscape(nil, byte(b)))+"x", Options{})
		switch {
		case strings.Contains(plain, c):
			if want := "/x" + c + "x"; rawErr != nil || err != nil || raw != want || escaped != want {
				t.Errorf("%q: %q, %v; escaped %q, %v", c, raw, rawErr, escaped, err)
			}
		case strings.Contains(kept, c):
			if rawErr == nil || err != nil || escaped != "/x"+string(appendEscape(nil, byte(b)))+"x" {
				t.Errorf("%q: %q, %v; escaped %q, %v", c, raw, rawErr, escaped, err)
			}
		case c == "/":
			if rawErr != nil || reasonOf(t, err) != EncodedSlash {
				t.Errorf("a slash: %v, escaped %v", rawErr, err)
			}
		default:
			if rawErr == nil || err == nil {
				t.Errorf("%q: %q, escaped %q", c, raw, escaped)
			}
		}
	}
}

func TestPathOptions(t *testing.T) {
	t.Parallel()
	slash, empty := Options{EncodedSlash: true}, Options{EmptySegments: true}
	for _, c := range []struct {
		in   string
		o    Options
		want string
		why  Reason
	}{
		{"/group%2fproject", slash, "/group%2Fproject", none},
		{"/http%3a%2f%2fexample.org", slash, "/http:%2F%2Fexample.org", none},
		{"/%2f", slash, "/%2F", none},
		{"/a//b", slash, "", EmptySegment},
		{"/..%2fa", slash, "", DotSegment},
		{"/a%2f..", slash, "", DotSegment},
		{"/a%2f%2e%2E%2fb", slash, "", DotSegment},
		{"/a%2f.%2fb", slash, "", DotSegment},
		{"/a%2f..%20%2fb", slash, "", DotSegment},
		{"/a%2f..b", slash, "/a%2F..b", none},
		{"/a%2f...%2fb", slash, "/a%2F...%2Fb", none},
		{"/a%5cb", slash, "", Backslash},
		{"/a%252fb", slash, "", DoubleEncoding},
		{"/a%25%2f", slash, "/a%25%2F", none},
		{"//a//b//", empty, "//a//b//", none},
		{"//", empty, "//", none},
		{"/a%2fb", empty, "", EncodedSlash},
		{"/a//../b", empty, "", DotSegment},
		{strings.Repeat("/", MaxSegments+1), empty, "", TooManySegments},
	} {
		got, err := Path(c.in, c.o)
		if got != c.want || reasonOf(t, err) != c.why {
			t.Errorf("%.60q, %+v: %q, %v; want %q, %v", c.in, c.o, got, err, c.want, c.why)
		}
	}
}

func TestPatternSegment(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		in, want string
		why      Reason
	}{
		{"orders", "orders", none},
		{"", "", none},
		{"café", "caf%C3%A9", none},
		{"caf%c3%a9", "caf%C3%A9", none},
		{"日本", "%E6%97%A5%E6%9C%AC", none},
		{"job%3astop", "job:stop", none},
		{"a%20b", "a%20b", none},
		{"group%2fproject", "group%2Fproject", none},
		{"a b", "", Space},
		{"a/b", "", Character},
		{"{id", "", Character},
		{"..", "", DotSegment},
		{"%2e%2e", "", DotSegment},
		{"a%2f..", "", DotSegment},
		{"a;v=1", "", Parameter},
		{"100%", "", BadEscape},
		{"a%2500", "", DoubleEncoding},
		{"a?b", "", QueryMark},
		{"a\x00", "", Control},
		{"caf\xc3", "", NotUTF8},
		{"％41", "", Lookalike},
		{"a\u0085", "", Control},
		{strings.Repeat("é", MaxTarget/2), "", TooLong},
		{strings.Repeat("a", MaxTarget+1), "", TooLong},
	} {
		got, err := PatternSegment(c.in)
		if got != c.want || reasonOf(t, err) != c.why {
			t.Errorf("%.60q: %q, %v; want %q, %v", c.in, got, err, c.want, c.why)
		}
		if err != nil || got == "" {
			continue
		}
		if p, err := Path("/"+got, Options{EncodedSlash: true}); err != nil || p != "/"+got {
			t.Errorf("%q is a pattern of no request: %q, %v", got, p, err)
		}
	}
}

// checkPath holds what is true of every path that is accepted, with net/url
// as the service.
func checkPath(t *testing.T, raw, got string, o Options) {
	t.Helper()
	if len(got) > len(raw) {
		t.Fatalf("%q grew to %q", raw, got)
	}
	if again, err := Path(got, o); err != nil || again != got {
		t.Fatalf("%q became %q, then %q, %v", raw, got, again, err)
	}
	before, err := url.ParseRequestURI(raw)
	if err != nil {
		t.Fatalf("%q became %q, but net/url says %v", raw, got, err)
	}
	after, err := url.ParseRequestURI(got)
	if err != nil {
		t.Fatalf("%q became %q: %v", raw, got, err)
	}
	if before.Path != after.Path || after.Host != "" || after.RawQuery != "" || after.Fragment != "" {
		t.Fatalf("%q became %q, which is %q and not %q", raw, got, after.Path, before.Path)
	}
	// Who resolves the decoded path as files are resolved arrives where the
	// rules were asked.
	clean := path.Clean(after.Path)
	if strings.HasSuffix(after.Path, "/") && clean != "/" {
		clean += "/"
	}
	if o == (Options{}) && clean != after.Path {
		t.Fatalf("%q became %q, which resolves to %q", raw, got, clean)
	}
	if twice, err := url.PathUnescape(after.Path); err == nil && twice != after.Path {
		t.Fatalf("%q became %q, which decodes twice, to %q", raw, got, twice)
	}
	for _, segment := range strings.FieldsFunc(after.Path, func(r rune) bool { return r == '/' }) {
		if trimmed := strings.TrimSpace(segment); trimmed == "." || trimmed == ".." || strings.ContainsAny(segment, ";\\\x00\r\n") {
			t.Fatalf("%q became %q, with segment %q", raw, got, segment)
		}
	}
}

// FuzzPath: what is accepted has one form, means the same to net/url before
// and after, and leads nowhere else.
func FuzzPath(f *testing.F) {
	for _, c := range goodPaths {
		f.Add(c.in, false, false)
		f.Add(c.in, true, true)
	}
	for _, c := range badPaths {
		f.Add(c.in, false, false)
		f.Add(c.in, true, true)
	}
	f.Fuzz(func(t *testing.T, raw string, slash, empty bool) {
		o := Options{EncodedSlash: slash, EmptySegments: empty}
		got, err := Path(raw, o)
		if reasonOf(t, err) == none {
			checkPath(t, raw, got, o)
		}
		segment, err := PatternSegment(raw)
		if reasonOf(t, err) == none {
			o.EncodedSlash, o.EmptySegments = true, true
			if p, err := Path("/"+segment, o); err != nil || p != "/"+segment {
				if len(segment) < MaxTarget {
					t.Fatalf("pattern %q became %q, of no request: %v", raw, segment, err)
				}
			}
		}
	})
}
