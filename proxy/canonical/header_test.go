package canonical

import (
	"bufio"
	"net/http"
	"net/textproto"
	"strings"
	"testing"
)

func TestHeaderName(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		in, want string
		why      Reason
	}{
		{"x-env", "x-env", none},
		{"X-Env", "x-env", none},
		{"!#$%&'*+-.^_`|~09azAZ", "!#$%&'*+-.^_`|~09azaz", none},
		{strings.Repeat("A", MaxHeaderName), strings.Repeat("a", MaxHeaderName), none},
		{strings.Repeat("a", MaxHeaderName+1), "", TooLong},
		{"", "", Empty},
		{":path", "", NotToken},
		{"host ", "", NotToken},
		{" host", "", NotToken},
		{"host\t", "", NotToken},
		{"transfer-encoding\x0b", "", NotToken},
		{"transfer-encoding:", "", NotToken},
		{"transfer\r\nencoding", "", NotToken},
		{"x\x00", "", NotToken},
		{"x(y)", "", NotToken},
		{"\"x\"", "", NotToken},
		{"x/y", "", NotToken},
		{"x,y", "", NotToken},
		{"x;y", "", NotToken},
		{"x=y", "", NotToken},
		{"x@y", "", NotToken},
		{"x{y}", "", NotToken},
		{"é", "", NotToken},
		{"\u212aey", "", NotToken}, // the Kelvin sign, a k in lower case
		{"\x7f", "", NotToken},
	} {
		got, err := HeaderName(c.in)
		if got != c.want || reasonOf(t, err) != c.why {
			t.Errorf("%.60q: %q, %v; want %q, %v", c.in, got, err, c.want, c.why)
		}
	}
}

func TestHeaderValue(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		in, want string
		why      Reason
	}{
		{"prod", "prod", none},
		{"", "", none},
		{" \t ", "", none},
		{" \tprod, test\t ", "prod, test", none},
		{"a\tb  c", "a\tb  c", none},
		{"José \xe9", "José \xe9", none},
		{"\u00a0prod", "\u00a0prod", none}, // no white space to HTTP
		{strings.Repeat("a", MaxHeaderValue), strings.Repeat("a", MaxHeaderValue), none},
		{strings.Repeat(" ", MaxHeaderValue+1), "", TooLong},
		{"a\r\nx: y", "", Control},
		{"a\nx: y", "", Control},
		{"a\r", "", Control},
		{"\r\n a", "", Control}, // obs-fold
		{"a\x00", "", Control},
		{"chunked\x0b", "", Control},
		{"chunked\x0c", "", Control},
		{"a\x1b[31m", "", Control},
		{"a\x7f", "", Control},
	} {
		got, err := HeaderValue(c.in)
		if got != c.want || reasonOf(t, err) != c.why {
			t.Errorf("%.60q: %q, %v; want %q, %v", c.in, got, err, c.want, c.why)
		}
	}
}

// FuzzHeader: what is accepted has one form, and net/http reads it as such
// from the wire.
func FuzzHeader(f *testing.F) {
	for _, name := range []string{"X-Env", "host ", ":path", "transfer-encoding\x0b", "é"} {
		for _, value := range []string{"", " prod\t", "a\r\nb: c", "a\x00", "\u00a0é\xff"} {
			f.Add(name, value)
		}
	}
	f.Fuzz(func(t *testing.T, rawName, rawValue string) {
		name, err := HeaderName(rawName)
		nameReason := reasonOf(t, err)
		value, err := HeaderValue(rawValue)
		valueReason := reasonOf(t, err)
		if nameReason == none {
			if again, err := HeaderName(name); err != nil || again != name || !strings.EqualFold(name, rawName) {
				t.Fatalf("%q became %q, then %q, %v", rawName, name, again, err)
			}
		}
		if valueReason == none {
			if again, err := HeaderValue(value); err != nil || again != value || !strings.Contains(rawValue, value) {
				t.Fatalf("%q became %q, then %q, %v", rawValue, value, again, err)
			}
		}
		switch name {
		case "", "host", "content-length", "transfer-encoding", "pragma", "trailer", "connection":
			return // net/http takes these out, or makes others of them
		}
		if nameReason != none || valueReason != none {
			return
		}
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET / HTTP/1.1\r\nHost: a\r\n" + rawName + ":" + rawValue + "\r\n\r\n")))
		if err != nil {
			t.Fatalf("%q: %q: %v", rawName, rawValue, err)
		}
		if got := r.Header[textproto.CanonicalMIMEHeaderKey(name)]; len(r.Header) != 1 || len(got) != 1 || got[0] != value {
			t.Fatalf("%q: %q is %q: %q, which net/http reads as %q", rawName, rawValue, name, value, r.Header)
		}
	})
}
