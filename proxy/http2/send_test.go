package http2

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy/http1"
)

// streamOf returns an end of a server, and a stream of it whose request is whole.
func streamOf(t testing.TB) (*diary, *Stream) {
	t.Helper()
	d := server(t, Settings{})
	var s *Stream
	d.conn.events = openedBy(func(opened *Stream) {
		s = opened
		s.Attend(&entry{d, s, "/"})
	})
	if err := d.receive(t, asked(1, "/")); err != nil {
		t.Fatal(err)
	}
	return d, s
}

// response is one of a service.
func response(t testing.TB, status int, ended bool, fields ...http1.Field) *http1.Response {
	t.Helper()
	r := &http1.Response{}
	if err := r.Assemble(&http1.Parts{Status: status, Fields: fields, Ended: ended}, http1.Asked{Method: http.MethodGet}); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRespond(t *testing.T) {
	t.Parallel()
	d, s := streamOf(t)
	hidden, err := http1.NewNames("x-hidden")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*http1.Response{
		response(t, 103, false, http1.Field{Name: "link", Value: "a"}),
		response(t, 201, false, http1.Field{Name: "x-hidden", Value: "1"}, http1.Field{Name: "x-old", Value: "1"}, http1.Field{Name: "x-a", Value: "1"}, http1.Field{Name: "content-length", Value: "3"}),
	} {
		edit := &http1.Edit{Drop: hidden, Set: []http1.Field{{Name: "x-old", Value: "2"}}, Append: []http1.Field{{Name: "x-more", Value: "3"}}}
		if err := s.Respond(r, edit, false); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := s.Write([]byte("abc"), false); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	if err := s.Trailers([]http1.Field{{Name: "x-sum", Value: "1"}}); err != nil {
		t.Fatal(err)
	}
	d.sent(t)
	const want = "HEADERS 1: :status=103 link=a x-old=2 x-more=3; HEADERS 1: :status=201 x-a=1 x-old=2 x-more=3 content-length=3; DATA 1: 3; HEADERS 1: x-sum=1, ended"
	if got := d.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, err := range []error{s.Trailers(nil), s.Answer(200, nil, true)} {
		if err == nil || err.Error() != "HTTP/2: the stream has ended (STREAM_CLOSED)" {
			t.Errorf("behind the end: %v", err)
		}
	}
	if _, err := s.Write(nil, true); err == nil {
		t.Error("an end behind the end is taken")
	}
}

// Fields that may land in no table go on as such (RFC 7541, section 7.1.3).
func TestSensitive(t *testing.T) {
	t.Parallel()
	in := "\x82\x87\x01\x01a\x84" + "\x1f\x08\x01s" + "\x10\x01x\x01y" + "\x40\x01z\x01y" // authorization and x, never indexed; z, which is
	d := newDecoder()
	if err := d.read([]byte(in), false, false, true); err != nil || d.bad != "" {
		t.Fatal(err, d.bad)
	}
	var r http1.Request
	if err := r.Assemble(&d.parts); err != nil {
		t.Fatal(err)
	}
	want := "\x82\x87\x84\x01\x01a" + "\x1f\x08\x01s" + "\x10\x01x\x01y" + "\x00\x01z\x01y"
	if got := string(appendRequest(nil, &r, &http1.Edit{}, "https")); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A head that is too long for one frame goes in several.
func TestLongHeads(t *testing.T) {
	t.Parallel()
	for _, size := range []int{MaxFrame - 100, MaxFrame, 3 * MaxFrame} {
		d, s := streamOf(t)
		var fields []http1.Field
		for n := size; n > 0; n -= 8 << 10 {
			fields = append(fields, http1.Field{Name: "x", Value: strings.Repeat("a", min(n, 8<<10))})
		}
		if err := s.Answer(200, fields, true); err != nil {
			t.Fatal(err)
		}
		d.sent(t) // where it is read by another implementation
		if want := "HEADERS 1: :status=200"; len(d.lines) != 1 || !strings.HasPrefix(d.lines[0], want) || !strings.HasSuffix(d.lines[0], "a, ended") || len(d.lines[0]) < size {
			t.Errorf("%d bytes: %d lines", size, len(d.lines))
		}
	}
}

// Interim responses wait for nobody, and are not kept for who reads none.
func TestInterimIsLeftOut(t *testing.T) {
	t.Parallel()
	_, s := streamOf(t)
	hint := response(t, 103, false, http1.Field{Name: "link", Value: strings.Repeat("a", 8<<10)})
	for range 1000 {
		if err := s.Respond(hint, &http1.Edit{}, false); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.c.backlog(); n > MaxUnsent+MaxFrame {
		t.Errorf("%d bytes wait to be sent", n)
	}
}

// A peer that makes heads out of nothing but its own streams can have no more
// streams than places.
func TestPlaces(t *testing.T) {
	t.Parallel()
	d := newDiary()
	c := NewClient(Settings{}, d)
	d.conn = c
	places := 0
	for c.Reserve() {
		places++
	}
	if places != 100 {
		t.Errorf("%d places before SETTINGS, want 100", places)
	}
	if err := d.receive(t, raw(settings, 0, 0, setting(setMaxStreams, 101)+setting(setConnect, 1))); err != nil {
		t.Fatal(err)
	}
	if !c.Connects() || c.Midway() {
		t.Errorf("connects %t, midway %t", c.Connects(), c.Midway())
	}
	if !c.Reserve() || c.Reserve() {
		t.Error("want one more place, as SETTINGS say")
	}
	c.Unreserve()
	s := d.ask(t, "GET", "/", true)
	c.Leave(false)
	if _, err := c.Request(&http1.Request{}, &http1.Edit{}, "http", true, nobody{}); err != ErrLeaving { //nolint:errorlint // it is never wrapped
		t.Errorf("got %v, want ErrLeaving", err)
	}
	s.Release(Cancel)
	s.Release(Cancel)
	if got := c.Held(); got != 100 {
		t.Errorf("%d are held, want 100", got)
	}
	c.Cut("it is over")
	if _, err := c.Request(&http1.Request{}, &http1.Edit{}, "http", true, nobody{}); fmt.Sprint(err) != "HTTP/2: it is over (INTERNAL_ERROR)" {
		t.Errorf("got %v", err)
	}
}

// Trailers behind content that nobody took yet wait for that.
func TestTrailersAreHeld(t *testing.T) {
	t.Parallel()
	d := server(t, Settings{})
	var s *Stream
	d.conn.events = openedBy(func(opened *Stream) {
		s = opened
		s.Attend(&entry{d, s, "/hold"})
	})
	in := posted(1, "/") + content(1, "abcdef") + head(1, endStream, "x", "y")
	if err := d.receive(t, in); err != nil {
		t.Fatal(err)
	}
	take := func(n int) func([]byte, bool) int {
		return func(b []byte, ended bool) int {
			d.note("offered %d, %t", len(b), ended)
			return min(n, len(b))
		}
	}
	s.Held(take(4))
	s.Held(take(4))
	s.Held(take(4))
	if want := "offered 6, false; offered 2, false; trailers of 1: 1"; d.String() != want {
		t.Errorf("got %s, want %s", d, want)
	}
	if err := d.receive(t, strings.ReplaceAll(in, number(1), number(3))); err != nil {
		t.Fatal(err)
	}
	got, ended, _ := s.Next(make([]byte, 0, 4))
	if string(got) != "abcd" || ended {
		t.Errorf("got %q, %t", got, ended)
	}
	got, ended, trailers := s.Next(got[:0])
	if string(got) != "ef" || !ended || len(trailers) != 1 {
		t.Errorf("got %q, %t, %v", got, ended, trailers)
	}
}

// Who is not attended is passed over, and gives its window back.
func TestUnattended(t *testing.T) {
	t.Parallel()
	d := server(t, Settings{})
	var s *Stream
	d.conn.events = openedBy(func(opened *Stream) { s = opened })
	in := posted(1, "/") + strings.Repeat(content(1, strings.Repeat("a", MaxFrame)), 40) + head(1, endStream, "x", "y")
	if err := d.receive(t, in); err != nil {
		t.Fatal(err)
	}
	s.Release(Cancel)
	d.sent(t)
	if want := "RST_STREAM 1 CANCEL"; d.lines[len(d.lines)-1] != want || d.conn.recv+d.conn.unacked != Window || d.conn.Held() != 0 {
		t.Errorf("got %s, %d held", d, d.conn.Held())
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  *Error
		want string
	}{
		{broken(ProtocolError, "a frame"), "HTTP/2: a frame (PROTOCOL_ERROR)"},
		{&Error{Code: 99, Stream: 1, Remote: true}, "HTTP/2: the peer reset the stream with code 99"},
		{&Error{Code: HTTP11Required, Remote: true}, "HTTP/2: the peer ended the connection with HTTP_1_1_REQUIRED"},
	} {
		if got := c.err.Error(); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}
