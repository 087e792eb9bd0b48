package http1

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"slices"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// FuzzRequest: what is accepted is understood alike in one piece and in two,
// by net/http, and by whoever it is written to.
func FuzzRequest(f *testing.F) {
	for _, c := range requestCases {
		f.Add(c.in+"GET /", 30)
	}
	for _, c := range smuggling {
		f.Add(c.in, 20)
	}
	for _, body := range []string{"3\r\nabc\r\n0\r\n\r\nGET /", "3\r\nabc\r\n0\r\nX: a\r\n\r\n", "3;a\r\nabc\r\n0\r\n\r\n", "3\r\nabc", "0\r\nX_Spiffe_Id: a\r\n\r\n"} {
		f.Add(with("Transfer-Encoding: chunked\r\n")+body, 60)
	}
	f.Add(with("Content-Length: 3\r\n")+"abcGET /", 50)
	f.Add(with("Content-Length: 3\r\n")+"ab", 50)
	f.Fuzz(func(t *testing.T, in string, at int) {
		r, n, err := parseRequest(in)
		var halves Request
		checkHalves(t, in, at, n, refusal(t, err), halves.Parse)
		if n == 0 {
			return
		}
		if got := summary(&halves); got != summary(r) {
			t.Fatalf("in two pieces it is\n%s, in one\n%s", got, summary(r))
		}
		checkWritten(t, r)
		from := bufio.NewReaderSize(strings.NewReader(in), 1<<20)
		std, err := http.ReadRequest(from)
		if err != nil {
			t.Fatalf("net/http refuses %q: %v", in[:n], err)
		}
		target, err := canonical.ParseTarget(std.Method, std.RequestURI, canonical.Options{})
		if err != nil || std.Method != r.Method || target != r.Target {
			t.Fatalf("%q: %s %s, %v", in[:n], std.Method, std.RequestURI, err)
		}
		if host, err := canonical.Host(std.Host); err != nil || host != r.Host {
			t.Fatalf("%q: host %q, %v; here %q", in[:n], std.Host, err, r.Host)
		}
		checkFields(t, r.Fields, std.Header)
		want := map[Framing]int64{Counted: r.Length, Chunked: -1}[r.Body]
		if std.ContentLength != want || slices.Equal(std.TransferEncoding, []string{"chunked"}) != (r.Body == Chunked) || std.Close == r.KeepAlive {
			t.Fatalf("%q: length %d, coding %q, close %t; here %s", in[:n], std.ContentLength, std.TransferEncoding, std.Close, summary(r))
		}
		checkBody(t, in[n:], at, r.Body, r.Length, std.Body, from)
	})
}

// FuzzResponse is FuzzRequest for responses.
func FuzzResponse(f *testing.F) {
	for _, c := range responseCases {
		f.Add(c.in+"3\r\nabc\r\n0\r\n\r\nHTTP/1.1 200 OK", 20, c.asked.Method == "HEAD", c.asked.Upgrade)
	}
	for _, c := range badResponses {
		f.Add(c.in, 20, c.asked.Method == "HEAD", c.asked.Upgrade)
	}
	f.Fuzz(func(t *testing.T, in string, at int, head, upgrade bool) {
		asked := Asked{Method: "GET", Upgrade: upgrade}
		if head {
			asked.Method = "HEAD"
		}
		var r, halves Response
		n, err := r.Parse([]byte(in), asked)
		checkHalves(t, in, at, n, refusal(t, err), func(b []byte) (int, error) { return halves.Parse(b, asked) })
		if n == 0 {
			return
		}
		if got := responseSummary(&halves); got != responseSummary(&r) {
			t.Fatalf("in two pieces it is\n%s, in one\n%s", got, responseSummary(&r))
		}
		edit := Edit{Upgrade: r.Upgrade, Close: !r.KeepAlive, Persist: r.Minor == 0}
		var again Response
		if _, err := again.Parse(r.Append(nil, &edit), asked); err != nil || again.Status != r.Status || again.Phrase != r.Phrase ||
			again.Body != r.Body || again.Length != r.Length || again.KeepAlive != r.KeepAlive || again.Upgrade != r.Upgrade || passedOn(again.Fields) != passedOn(r.Fields) {
			t.Fatalf("written, it is\n%s, %v, before\n%s", responseSummary(&again), err, responseSummary(&r))
		}
		from := bufio.NewReaderSize(strings.NewReader(in), 1<<20)
		std, err := http.ReadResponse(from, &http.Request{Method: asked.Method})
		if err != nil {
			t.Fatalf("net/http refuses %q: %v", in[:n], err)
		}
		defer std.Body.Close()
		if std.StatusCode != r.Status || std.Close == r.KeepAlive {
			t.Fatalf("%q: %d, close %t; here %s", in[:n], std.StatusCode, std.Close, responseSummary(&r))
		}
		checkFields(t, r.Fields, std.Header)
		checkBody(t, in[n:], at, r.Body, r.Length, std.Body, from)
	})
}

// FuzzChunked: a chunked body ends at the same byte however it arrives, and
// where net/http sees its end.
func FuzzChunked(f *testing.F) {
	for _, in := range []string{
		"3\r\nabc\r\n0\r\n\r\nGET /", "0\r\nX-Sum: 1\r\n\r\n", "0\r\nX_Spiffe-Id: 1\r\n\r\n", "3;a=b\r\nabc\r\n0\r\n\r\n", "fffffffffffffff\r\na", "03\nabc\r\n", "3\r\nabcd\r\n",
	} {
		f.Add(in, 3)
	}
	f.Fuzz(func(t *testing.T, in string, piece int) {
		from := bufio.NewReaderSize(strings.NewReader(with("Transfer-Encoding: chunked\r\n")+in), 1<<20)
		std, err := http.ReadRequest(from)
		if err != nil {
			t.Fatal(err)
		}
		checkBody(t, in, piece, Chunked, 0, std.Body, from)
	})
}

// checkHalves parses in two pieces what gave n and a refusal in one.
func checkHalves(t *testing.T, in string, at, n int, refused string, parse func([]byte) (int, error)) {
	t.Helper()
	at = max(0, min(at, len(in)))
	got, err := parse([]byte(in[:at]))
	if got == 0 && err == nil {
		got, err = parse([]byte(in))
	}
	if got != n || refusal(t, err) != refused {
		t.Fatalf("%q in two pieces at %d: %d, %v; in one: %d, %s", in, at, got, err, n, refused)
	}
}

// checkWritten checks that a request means the same when it is written.
func checkWritten(t *testing.T, r *Request) {
	t.Helper()
	out := r.Append(nil, &Edit{Upgrade: r.Upgrade, Close: !r.KeepAlive && r.Upgrade == ""})
	again, n, err := parseRequest(string(out))
	if err != nil || n != len(out) {
		t.Fatalf("%q is written as %q: %d, %v", summary(r), out, n, err)
	}
	target := r.Target
	target.Scheme, target.Host = "", ""
	if again.Method != r.Method || again.Target != target || again.Host != r.Host || again.Body != r.Body || again.Length != r.Length ||
		again.Upgrade != r.Upgrade || passedOn(again.Fields) != passedOn(r.Fields) {
		t.Fatalf("written, it is\n%s, before\n%s", summary(again), summary(r))
	}
}

// passedOn are the fields that reach the other side.
func passedOn(fields []Field) string {
	var s strings.Builder
	for _, f := range fields {
		if !f.Hop && f.Name != "host" {
			fmt.Fprintf(&s, "%s: %q\n", f.Name, f.Value)
		}
	}
	return s.String()
}

// checkFields checks that net/http read the same fields, but for those that it
// takes out or makes others of.
func checkFields(t *testing.T, fields []Field, std http.Header) {
	t.Helper()
	ours := http.Header{}
	for _, f := range fields {
		key := textproto.CanonicalMIMEHeaderKey(f.Name)
		ours[key] = append(ours[key], f.Value)
	}
	for _, h := range []http.Header{ours, std} {
		for _, name := range []string{"Host", "Transfer-Encoding", "Content-Length", "Trailer", "Pragma", "Cache-Control", "Connection"} {
			delete(h, name)
		}
	}
	if fmt.Sprint(ours) != fmt.Sprint(std) {
		t.Fatalf("net/http reads %q, here %q", std, ours)
	}
}

// checkBody checks that a body means the same to net/http, and ends at the
// same byte.
func checkBody(t *testing.T, in string, piece int, framing Framing, length int64, std io.Reader, from io.Reader) {
	t.Helper()
	whole, content, rest, b, err := readBody(in, max(1, len(in)), framing, length)
	raw, pieces, left, inPieces, failed := readBody(in, max(1, min(piece, len(in))), framing, length)
	if refusal(t, err) != refusal(t, failed) || inPieces.Done() != b.Done() {
		t.Fatalf("%q in pieces of %d: %v; in one: %v", in, piece, failed, err)
	}
	if err != nil {
		return
	}
	if pieces != content || fmt.Sprint(inPieces.Trailers) != fmt.Sprint(b.Trailers) || raw != whole || whole+rest != in {
		t.Fatalf("%q in pieces of %d: %q, %q, %q", in, piece, raw, pieces, left)
	}
	closed := b.Close()
	got, err := io.ReadAll(std)
	if (closed == nil) != (err == nil) {
		t.Fatalf("%q: net/http says %v, here %v", in, err, closed)
	}
	if closed != nil {
		return
	}
	behind, err := io.ReadAll(from)
	if err != nil || string(got) != content || string(behind) != rest {
		t.Fatalf("%q: net/http reads %q and leaves %q; here %q and %q", in, got, behind, content, rest)
	}
}
