package http1

import (
	"fmt"
	"strings"
	"testing"
)

// identity are the names of the tests that say who the peer is.
var identity = func() *Names {
	n, err := NewNames("X-Spiffe-ID", "x-forwarded-client-cert")
	if err != nil {
		panic(err)
	}
	return n
}()

// readBody feeds a body in pieces of a size, as a connection would, and
// returns what was passed on, the content, and what is left.
func readBody(in string, piece int, framing Framing, length int64) (raw, content, rest string, b *Body, err error) {
	var data Body
	b = &Body{}
	b.Start(framing, length, identity)
	data.Start(framing, length, identity)
	start, dataAt := 0, 0
	for end := 0; ; {
		end = min(end+piece, len(in))
		n, done, failed := b.Next([]byte(in[start:end]))
		raw += in[start : start+n]
		start += n
		for {
			got, n, _, failed := data.NextData([]byte(in[dataAt:end]))
			if dataAt += n; failed != nil || n == 0 || data.Done() {
				content += string(got)
				break
			}
			content += string(got)
		}
		if failed != nil || done || end == len(in) {
			return raw, content, in[start:], b, failed
		}
	}
}

func TestBody(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		framing            Framing
		length             int64
		in, content, rest  string
		trailers, why, end string // end: of Close, where the body has not ended
	}{
		{NoBody, 0, "GET /", "", "GET /", "[]", "none", ""},
		{Counted, 3, "abcGET /", "abc", "GET /", "[]", "pipelined", ""},
		{Counted, 9, "abc", "abc", "", "[]", "cut short", "400 cut_short"},
		{UntilClose, 0, "abc", "abc", "", "[]", "until the end", ""},
		{Chunked, 0, "3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\nGET /", "abc0123456789", "GET /", "[]", "chunks", ""},
		{Chunked, 0, "000\r\n\r\n", "", "", "[]", "zeros", ""},
		{Chunked, 0, "03\r\na\r\n\r\n00\r\nX-Sum: 1 \r\ngrpc-status: 0\r\n\r\nX", "a\r\n", "X", "[{x-sum 1 false false} {grpc-status 0 false false}]", "trailers", ""},
		{Chunked, 0, "3\r\nabc\r\n", "abc", "", "[]", "no last chunk", "400 cut_short"},
		{Chunked, 0, "0\r\nX: 1\r\n", "", "0\r\nX: 1\r\n", "[]", "trailers that do not end", "400 cut_short"},
	} {
		for piece := 1; piece <= len(c.in); piece++ {
			raw, content, rest, b, err := readBody(c.in, piece, c.framing, c.length)
			if err != nil || raw+rest != c.in || content != c.content || fmt.Sprint(b.Trailers) != c.trailers {
				t.Errorf("%s, %d at a time: %q, %q, %q, %v, %v", c.why, piece, raw, content, rest, b.Trailers, err)
			}
			if b.Done() && rest != "" && rest != c.rest[:len(rest)] {
				t.Errorf("%s: left %q, want %q", c.why, rest, c.rest)
			}
			if got := refusal(t, b.Close()); got != c.end {
				t.Errorf("%s: closed: %q, want %q", c.why, got, c.end)
			}
		}
	}
}

func TestBadChunks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ in, want, why string }{
		{"3;a=b\r\nabc\r\n0\r\n\r\n", "400 chunk_extension", "an extension"},
		{"3 ;a\r\n", "400 chunk_extension", "white space before one"},
		{"3\t\r\n", "400 chunk_extension", "white space"},
		{"0;a\r\n\r\n", "400 chunk_extension", "at the last chunk"},
		{"3\nabc\r\n", "400 chunk_size", "a bare LF"},
		{"3\rabc", "400 chunk_size", "a bare CR"},
		{"\r\n0\r\n\r\n", "400 chunk_size", "no size"},
		{"0x3\r\nabc\r\n", "400 chunk_size", "0x, which some skip"},
		{"+3\r\nabc\r\n", "400 chunk_size", "a sign"},
		{"-1\r\n", "400 chunk_size", "a sign"},
		{" 3\r\nabc\r\n", "400 chunk_size", "white space first"},
		{"3_0\r\n", "400 chunk_size", "an underscore, which some skip"},
		{"ffffffffffffffff\r\n", "400 chunk_size", "-1 in 64 bits"},
		{"0000000000000000\r\n\r\n", "400 chunk_size", "zeros without end"},
		{"3\r\nabcd\r\n0\r\n\r\n", "400 chunk_end", "longer than its size"},
		{"3\r\nabc\n0\r\n\r\n", "400 chunk_end", "a bare LF behind the data"},
		{"3\r\nabc0\r\n\r\n", "400 chunk_end", "no end of the data"},
		{"0\r\nContent-Length: 3\r\n\r\n", "400 trailer", "a length behind the body"},
		{"0\r\nTransfer-Encoding: chunked\r\n\r\n", "400 trailer", "a coding behind the body"},
		{"0\r\nHost: b\r\n\r\n", "400 trailer", "another host"},
		{"0\r\nAuthorization: x\r\n\r\n", "400 trailer", "credentials"},
		{"0\r\nSet_Cookie: x\r\n\r\n", "400 trailer", "_ for -"},
		{"0\r\nX-Spiffe-Id: x\r\n\r\n", "400 trailer_identity", "who the peer is"},
		{"0\r\nX_SPIFFE-ID: x\r\n\r\n", "400 trailer_identity", "in another spelling"},
		{"0\r\nX-Forwarded_Client_Cert: x\r\n\r\n", "400 trailer_identity", "in another spelling"},
		{"0\r\nX: a\n\r\n", "400 bare_lf", "a bare LF"},
		{"0\r\nX: a\r\n b\r\n\r\n", "400 obs_fold", "obs-fold"},
		{"0\r\nX : a\r\n\r\n", "400 not_token", "a space before the colon"},
		{"0\r\nX: a\rb\r\n\r\n", "400 control", "a bare CR"},
		{"0\r\nGET / HTTP/1.1\r\n\r\n", "400 no_colon", "a request for trailers"},
		{"0\r\n" + strings.Repeat("X: a\r\n", 33) + "\r\n", "431 too_large", "many"},
		{"0\r\nX: " + strings.Repeat("a", MaxTrailer), "431 too_large", "never end"},
	} {
		for _, piece := range []int{1, 2, 3, 7, len(c.in)} {
			if len(c.in) > 1<<10 {
				piece = max(piece, 100)
			}
			raw, _, _, b, err := readBody(c.in, piece, Chunked, 0)
			if refusal(t, err) != c.want {
				t.Errorf("%s: %.60q, %d at a time: %v; want %s", c.why, c.in, piece, err, c.want)
			}
			if strings.HasPrefix(c.in, "0") && raw != "" {
				t.Errorf("%s: passed on %q", c.why, raw)
			}
			if _, done, again := b.Next([]byte("0\r\n\r\n")); done || again == nil || b.Close() == nil {
				t.Errorf("%s: goes on after it was refused", c.why)
			}
		}
	}
}
