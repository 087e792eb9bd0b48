package http2

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/proxy/http1"
)

// This file is what costs us more than the peer: that it ends soon, and what it
// costs until then; and what looks like it and is no attack.

// endsAfter repeats what a peer sends until the connection is over. It returns
// how often that was, and with which code.
func endsAfter(t *testing.T, d *diary, most int, reads bool, sends func(i int) string) (times int, code Code) {
	t.Helper()
	for i := range most {
		_, err := d.conn.Receive([]byte(sends(i)))
		if reads {
			d.sent(t)
			d.lines = d.lines[:0]
		}
		if n := d.conn.backlog(); n > maxBacklog+MaxFrame {
			t.Fatalf("%d bytes wait to be sent", n)
		}
		var broken *Error
		if errors.As(err, &broken) {
			return i, broken.Code
		}
	}
	return most, NoError
}

// of returns the number of the n-th stream.
func of(n int) uint32 { return uint32(2*n + 1) }

func TestAttacks(t *testing.T) {
	t.Parallel()
	const streams = 10
	all := Patience + CostReset*streams
	always := func(s string) func(int) string { return func(int) string { return s } }
	for _, c := range []struct {
		why   string
		from  func(testing.TB) *diary
		first string
		sends func(i int) string
		reads bool
		want  int
	}{
		{"PING", nil, "", always(raw(ping, 0, 0, "12345678")), true, all},
		{"acknowledgements of PING", nil, "", always(raw(ping, ack, 0, "12345678")), true, all},
		{"SETTINGS", nil, "", always(noSettings), true, all / CostSettings},
		{"many settings", nil, "", always(raw(settings, 0, 0, strings.Repeat(setting(setInitialWindow, 1), 96))), true, all / 100},
		{"PRIORITY", nil, "", func(i int) string { return raw(priority, 0, of(i), number(0)+"\x00") }, true, all},
		{"unknown kinds", nil, "", always(raw(99, 0, 0, "")), true, all},
		{"GOAWAY", nil, "", always(raw(goAway, 0, 0, number(0)+number(0))), true, all},
		{"DATA without any", nil, posted(1, "/"), always(content(1, "")), true, all},
		{"DATA of padding alone", nil, posted(1, "/"), always(raw(data, padded, 1, "\x03\x00\x00\x00")), true, all},
		{"DATA without any, behind our reset", nil, posted(1, "/reset"), always(content(1, "")), true, all},
		{"small WINDOW_UPDATEs", nil, asked(1, "/"), always(update(1, SmallUpdate-1)), true, all},
		{"small WINDOW_UPDATEs of the connection", nil, "", always(update(0, 1)), true, all},
		{"WINDOW_UPDATEs of a stream that is over", nil, asked(1, "/reset"), always(update(1, 1<<20)), true, all},
		{"tiny windows", nil, raw(settings, 0, 0, setting(setInitialWindow, 0)) + asked(1, "/content"), always(update(1, 1)), true, all - CostSettings - 1},
		{"rapid reset", nil, "", func(i int) string { return asked(of(i), "/") + reset(of(i), Cancel) }, true, all / CostReset},
		{"resets of streams that are over", nil, asked(1, "/reset"), always(reset(1, Cancel)), true, all},
		{"resets that we are made to send: bad heads", nil, "", func(i int) string { return head(of(i), endStream) }, true, all / CostReset},
		{"resets that we are made to send: windows", nil, "", func(i int) string { return posted(of(i), "/") + update(of(i), 0) }, true, all / (CostReset + CostFrame)},
		{"resets that we are made to send: behind the end", nil, "", func(i int) string { return asked(of(i), "/") + content(of(i), "a") }, true, all / CostReset},
		{"resets that we are made to send: too many streams", nil, "", func(i int) string { return asked(of(i), "/") }, true, streams + all/CostReset},
		{"heads that are too large", nil, "", func(i int) string { return head(of(i), endStream, tooMany("/reset")...) }, true, all / CostLarge},
		{"trailers that are too large", nil, "", func(i int) string {
			return posted(of(i), "/reset") + head(of(i), endStream, tooMany("/")[8:]...)
		}, true, all / (CostLarge + CostFrame)},
		{"trailers behind our reset", nil, posted(1, "/reset"), always(head(1, endStream, "x", "y")), true, all},
		{"interim responses", client, "", always(head(3, 0, ":status", "103")), true, Patience},
		{"heads of streams that we have left", client, reset(3, Cancel), always(head(3, endStream, ":status", "200")), true, Patience},
		{"answers to PING that are never read", nil, posted(1, "/"), always(raw(ping, 0, 0, "12345678") + content(1, "a")), false, MaxControl / 17},
	} {
		synctest.Test(t, func(t *testing.T) { // in which no time passes
			if c.from == nil {
				c.from = func(t testing.TB) *diary { return server(t, Settings{MaxStreams: streams}) }
			}
			d := c.from(t)
			if err := d.receive(t, c.first); err != nil {
				t.Fatal(err)
			}
			if got, code := endsAfter(t, d, 20_000, c.reads, c.sends); got != c.want || code != EnhanceYourCalm {
				t.Errorf("%s: ended with %s after %d, want %d", c.why, code, got, c.want)
			}
		})
	}
}

// tooMany is a request with more fields than it may have.
func tooMany(path string) []string {
	fields := request("GET", path)
	for range MaxFields + 1 {
		fields = append(fields, "x", "y")
	}
	return fields
}

// Who asks and never reads is not answered for ever.
func TestAnswersThatAreNeverRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := server(t, Settings{MaxStreams: 10})
		got, code := endsAfter(t, d, 100_000, false, func(i int) string { return asked(of(i), "/answer") })
		if least := maxBacklog / 32; got < least || code != EnhanceYourCalm {
			t.Errorf("ended with %s after %d", code, got)
		}
	})
}

// Content waits with whoever it is of.
func TestContentThatIsNeverRead(t *testing.T) {
	t.Parallel()
	d := server(t, Settings{MaxStreams: 100})
	if err := d.receive(t, update(0, maxWindow-defaultWindow)+raw(settings, 0, 0, setting(setInitialWindow, maxWindow))); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if _, err := d.conn.Receive([]byte(asked(of(i), "/content"))); err != nil {
			t.Fatal(err)
		}
	}
	if n := d.conn.backlog(); n > MaxUnsent+100*64 {
		t.Errorf("%d bytes wait to be sent", n)
	}
}

// An HPACK bomb: a table of large fields, and blocks that name them often.
func TestBomb(t *testing.T) {
	t.Parallel()
	d := server(t, Settings{})
	large := "\x40\x01x" + string(appendString(nil, strings.Repeat("a", 4000)))
	if err := d.receive(t, raw(headers, endHeaders|endStream, 1, block(request("GET", "/")...)+large)); err != nil {
		t.Fatal(err)
	}
	refs := strings.Repeat("\xbe", MaxFrame)
	bomb := raw(headers, endStream, 3, block(request("GET", "/")...)) + raw(continuation, 0, 3, refs) + raw(continuation, 0, 3, refs) + raw(continuation, endHeaders, 3, refs)
	if err := d.receive(t, bomb); err != nil {
		t.Fatal(err)
	}
	if got := d.lines[1]; got != "opened 3, too large" {
		t.Errorf("got %q", got)
	}
	if n := len(d.conn.decoder.parts.Fields); n > MaxHead/4000 {
		t.Errorf("%d fields were kept", n)
	}
}

// What is held costs no more than the bounds of hold.go, however it comes.
func TestHeld(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, smallChunk, smallChunk + 1, 4000, MaxFrame} {
		d := server(t, Settings{})
		var in strings.Builder
		total := 0
		for i := 0; i < MaxStreams && total+size <= Window; i++ {
			in.WriteString(posted(of(i), "/hold") + content(of(i), strings.Repeat("a", size)))
			total += size
		}
		if err := d.receive(t, in.String()); err != nil {
			t.Fatal(err)
		}
		costs := 0
		for _, s := range d.conn.streams {
			for _, chunk := range s.chunks {
				costs += cap(*chunk)
			}
		}
		bound := len(d.conn.streams) * smallChunk
		if size > smallChunk {
			bound = len(d.conn.streams) * chunkSize
		}
		if costs > total+bound {
			t.Errorf("%d bytes in frames of %d cost %d", total, size, costs)
		}
	}
}

// Of a service's answers that nobody takes nothing is kept from the others.
func TestAnswersThatNobodyTakes(t *testing.T) {
	t.Parallel()
	const many = 90
	d := newDiary()
	d.conn = NewClient(Settings{}, d)
	full := strings.Repeat("a", MaxFrame)
	var idle []*Stream
	in := noSettings
	for i := range many {
		idle = append(idle, d.ask(t, "GET", "/hold", true))
		in += head(of(i), 0, ":status", "200") + strings.Repeat(content(of(i), full), FirstWindow/MaxFrame)
	}
	if err := d.receive(t, in); err != nil {
		t.Fatal(err)
	}
	d.ask(t, "GET", "/", true)
	d.lines = nil
	one := of(many)
	if err := d.receive(t, head(one, 0, ":status", "200")+strings.Repeat(content(one, full), FirstWindow/MaxFrame)); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("WINDOW_UPDATE %d %d", one, FirstWindow/4+StreamWindow-FirstWindow); !strings.Contains(d.String(), want) {
		t.Errorf("got %s, want %s: it takes all", d, want)
	}
	if held := d.conn.whole - d.conn.recv - d.conn.unacked; held != many*FirstWindow {
		t.Errorf("%d bytes are held, want %d", held, many*FirstWindow)
	}
	if err := d.receive(t, content(of(0), "a")); err != nil || d.lines[len(d.lines)-1] != "RST_STREAM 1 FLOW_CONTROL_ERROR" {
		t.Errorf("more than may be held: %v, %s", err, d)
	}
	for _, s := range idle {
		s.Release(Cancel)
	}
	if held := d.conn.whole - d.conn.recv - d.conn.unacked; held != 0 {
		t.Errorf("%d bytes are held of nothing", held)
	}
}

// Few streams have much ahead of who takes them.
func TestWideStreams(t *testing.T) {
	t.Parallel()
	d := newDiary()
	d.conn = NewClient(Settings{}, d)
	in := noSettings
	var streams []*Stream
	for i := range MaxWide + 4 {
		streams = append(streams, d.ask(t, "GET", "/", true))
		in += head(of(i), 0, ":status", "200") + strings.Repeat(content(of(i), strings.Repeat("a", MaxFrame)), 2)
	}
	if err := d.receive(t, in); err != nil {
		t.Fatal(err)
	}
	wide := 0
	for _, s := range streams {
		if s.window == StreamWindow {
			wide++
		}
	}
	if wide != MaxWide || d.conn.wide != MaxWide {
		t.Errorf("%d have a large window, and %d are counted, want %d", wide, d.conn.wide, MaxWide)
	}
	for _, s := range streams {
		s.Release(Cancel)
	}
	if d.conn.wide != 0 {
		t.Errorf("%d are counted of none", d.conn.wide)
	}
}

// What many clients do is none of it.
func TestLegitimate(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		why   string
		first string
		times int
		every time.Duration
		sends func(i int) string
	}{
		{"short requests", "", 10_000, 0, func(i int) string { return asked(of(i), "/answer") }},
		{"and cancels of half of them", "", 10_000, 0, func(i int) string {
			return asked(of(2*i), "/answer") + asked(of(2*i+1), "/") + reset(of(2*i+1), Cancel)
		}},
		{"uploads, of which we want no more", "", 10_000, 0, func(i int) string {
			return posted(of(i), "/enough") + content(of(i), "abc") + content(of(i), "abc") + lastContent(of(i), "")
		}},
		{"gRPC's estimation of bandwidth: a PING for DATA", posted(1, "/"), 10_000, 0, func(int) string {
			return content(1, "message") + raw(ping, 0, 0, "12345678")
		}},
		{"keepalive", "", 2000, 10 * time.Second, func(int) string { return raw(ping, 0, 0, "12345678") }},
		{"cancels now and then", "", 2000, time.Second, func(i int) string { return asked(of(i), "/") + reset(of(i), Cancel) }},
		{"all streams cancelled at once", "", 10, time.Minute, func(i int) string {
			var opened, cancelled strings.Builder
			for j := range MaxStreams {
				opened.WriteString(asked(of(MaxStreams*i+j), "/"))
				cancelled.WriteString(reset(of(MaxStreams*i+j), Cancel))
			}
			return opened.String() + cancelled.String()
		}},
		{"priorities of a browser", strings.Repeat(raw(priority, 0, 3, number(0)+"\x00"), 6), 1000, time.Second, func(i int) string {
			return raw(headers, endHeaders|endStream|prioritize, of(i), number(0)+"\x10"+block(request("GET", "/answer")...)) + raw(0x10, 0, 0, "\x00\x00\x00\x01u=1")
		}},
		{"large windows", asked(1, "/"), 2000, 0, func(int) string { return update(0, 1<<20) + update(1, 1<<20) }},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := server(t, Settings{})
			if err := d.receive(t, c.first); err != nil {
				t.Fatal(err)
			}
			got, code := endsAfter(t, d, c.times, true, func(i int) string {
				time.Sleep(c.every)
				return c.sends(i)
			})
			if got != c.times {
				t.Errorf("%s: ended with %s after %d", c.why, code, got)
			}
		})
	}
}

// Some update both windows for each DATA, however small it was.
func TestSmallUpdates(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := server(t, Settings{})
		var s *Stream
		d.conn.events = openedBy(func(opened *Stream) { s = opened })
		if err := d.receive(t, asked(1, "/")); err != nil {
			t.Fatal(err)
		}
		if err := s.Answer(200, nil, false); err != nil {
			t.Fatal(err)
		}
		for i := range 10_000 {
			if n, err := s.Write(make([]byte, 100), false); n != 100 || err != nil {
				t.Fatal(i, n, err)
			}
			if err := d.receive(t, update(0, 100)+update(1, 100)); err != nil {
				t.Fatal(i, err)
			}
			d.lines = nil
		}
	})
}

// openedBy is the owner of a connection that is told of streams alone.
type openedBy func(*Stream)

func (f openedBy) Opened(s *Stream, _ *http1.Parts, _ bool) { f(s) }
func (openedBy) Settled()                                   {}
func (openedBy) Leaving()                                   {}

// What was on its way when we stopped taking requests harms nobody.
func TestLeave(t *testing.T) {
	t.Parallel()
	d := server(t, Settings{})
	d.conn.Leave(false)
	if err := d.receive(t, posted(1, "/")+posted(3, "/")); err != nil {
		t.Fatal(err)
	}
	d.conn.Leave(false)
	d.conn.Leave(true)
	d.conn.Leave(true)
	late := posted(5, "/") + content(5, "a") + update(5, 1) + head(5, endStream, "x", "y") + posted(7, "/") + reset(7, Cancel) + lastContent(1, "a")
	if err := d.receive(t, late); err != nil {
		t.Fatal(err)
	}
	d.conn.Fail(broken(InternalError, "enough"))
	d.sent(t)
	const want = "opened 1 POST /; opened 3 POST /; GOAWAY 2147483647 NO_ERROR; data of 1: 1, ended; GOAWAY 3 NO_ERROR; ended 1 here: INTERNAL_ERROR; ended 3 here: INTERNAL_ERROR; GOAWAY 3 INTERNAL_ERROR"
	if got := d.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if d.conn.recv+d.conn.unacked != Window {
		t.Errorf("%d bytes of the window are lost", Window-d.conn.recv-d.conn.unacked)
	}
}

// Nothing is looked at once the connection is over, from whatever goroutine that
// was said.
func TestCutWithin(t *testing.T) {
	t.Parallel()
	d := server(t, Settings{})
	told := ""
	d.conn.events = openedBy(func(s *Stream) {
		told += fmt.Sprint("opened ", s.ID())
		d.conn.Cut("the network is gone")
		s.Attend(&entry{d, s, "/"})
	})
	err := d.receive(t, asked(1, "/")+asked(3, "/"))
	if told += "; " + d.String(); told != "opened 1; ended 1 here: INTERNAL_ERROR; GOAWAY 1 INTERNAL_ERROR" || err == nil {
		t.Errorf("got %s, %v", told, err)
	}
	if d.conn.Open() != 0 || d.conn.Held() != 0 {
		t.Errorf("%d open, %d held", d.conn.Open(), d.conn.Held())
	}
}

// An end without content reaches a receiver that was not ready for it.
func TestEndIsHeld(t *testing.T) {
	t.Parallel()
	d := server(t, Settings{})
	var s *Stream
	d.conn.events = openedBy(func(opened *Stream) {
		s = opened
		s.Attend(&entry{d, s, "/hold"})
	})
	if err := d.receive(t, posted(1, "/hold")+lastContent(1, "")); err != nil {
		t.Fatal(err)
	}
	offered := ""
	s.Held(func(b []byte, ended bool) int {
		offered += fmt.Sprint(len(b), ended)
		return len(b)
	})
	if _, ended, _ := s.Next(make([]byte, 0, 10)); ended || offered != "0 true" {
		t.Errorf("offered %q, and again %t", offered, ended)
	}
	if err := d.receive(t, posted(3, "/hold")+content(3, "abc")); err != nil {
		t.Fatal(err)
	}
	if got, ended, _ := s.Next(make([]byte, 0, 10)); string(got) != "abc" || ended {
		t.Errorf("got %q, %t", got, ended)
	}
	if err := d.receive(t, lastContent(3, "")); err != nil {
		t.Fatal(err)
	}
	if got, ended, _ := s.Next(make([]byte, 0, 10)); len(got) > 0 || !ended {
		t.Errorf("got %q, %t", got, ended)
	}
}

// A table that the peer makes smaller is made so in our next head, once (RFC
// 9113, section 4.3.1).
func TestSmallerTable(t *testing.T) {
	t.Parallel()
	d := server(t, Settings{})
	in := raw(settings, 0, 0, setting(setTableSize, 1<<20)) + asked(1, "/answer") +
		raw(settings, 0, 0, setting(setTableSize, 0)) + asked(3, "/answer") + asked(5, "/answer")
	if _, err := d.conn.Receive([]byte(in)); err != nil {
		t.Fatal(err)
	}
	out := string(*d.conn.Take())
	answer := raw(headers, endHeaders|endStream, 1, block(":status", "204"))
	smaller := raw(headers, endHeaders|endStream, 3, "\x20"+block(":status", "204"))
	last := raw(headers, endHeaders|endStream, 5, block(":status", "204"))
	acked := raw(settings, ack, 0, "")
	if want := acked + answer + acked + smaller + last; out != want {
		t.Errorf("got %q\nwant %q", out, want)
	}
}
