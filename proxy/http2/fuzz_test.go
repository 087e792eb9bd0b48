package http2

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy/http1"
)

// FuzzReceive: whatever a peer sends, in whatever pieces, is taken or refused
// without harm, and costs no more than the bounds say. What is sent in turn can
// be read, and nothing is left once the connection is over.
func FuzzReceive(f *testing.F) {
	for _, frames := range []string{
		"", asked(1, "/"), posted(1, "/hold") + content(1, "abc") + head(1, endStream, "x", "y"), posted(1, "/reset") + content(1, "abc"),
		asked(1, "/content") + update(1, 1) + raw(settings, 0, 0, setting(setInitialWindow, 1)) + reset(1, Cancel),
		raw(headers, endStream, 1, "") + raw(continuation, endHeaders, 1, block(request("GET", "/answer")...)) + raw(ping, 0, 0, "12345678"),
	} {
		f.Add([]byte(clientsOwn+frames), false, 3)
	}
	for _, frames := range []string{
		"", head(1, 0, ":status", "103") + head(1, 0, ":status", "200") + lastContent(1, "abc"), reset(1, RefusedStream), reset(1, NoError),
		head(1, endStream, ":status", "204") + raw(goAway, 0, 0, number(1)+number(0)), update(1, 1<<20) + update(0, 1<<20),
	} {
		f.Add([]byte(noSettings+frames), true, 100)
	}
	f.Fuzz(func(t *testing.T, sent []byte, client bool, piece int) {
		d := newDiary()
		if d.conn = NewServer(Settings{MaxStreams: 4}, d); client {
			d.conn = NewClient(Settings{}, d)
			s := d.ask(t, "POST", "/content", false)
			_, _ = s.Write(make([]byte, MaxUnsent), false)
			d.ask(t, "GET", "/hold", true)
		}
		c := d.conn
		for end, taken := 0, 0; end < len(sent) && c.Failed() == nil; {
			end = min(end+max(1, piece), len(sent))
			n, err := c.Receive(sent[taken:end])
			if taken += n; err == nil && end-taken > frameHead+MaxFrame {
				t.Fatalf("%d bytes are left, which are more than a frame", end-taken)
			}
			d.sent(t)
			checkBounds(t, c)
		}
		c.Cut("enough")
		d.sent(t)
		if c.Open() != 0 || c.recv+c.unacked > c.whole {
			t.Fatalf("%d streams are left, window %d and %d", c.Open(), c.recv, c.unacked)
		}
	})
}

func checkBounds(t *testing.T, c *Conn) {
	t.Helper()
	held := int64(0)
	for _, s := range c.streams {
		for _, chunk := range s.chunks {
			held += int64(len(*chunk))
		}
		if s.recv < 0 || s.recv+s.unacked > s.window || s.send > maxWindow {
			t.Fatalf("stream %d: windows %d and %d, %d not told", s.id, s.recv, s.send, s.unacked)
		}
	}
	if c.recv < 0 || c.send < 0 || c.send > maxWindow || held > c.whole || len(c.block) > MaxBlock || len(c.resets.ids) > maxResets || len(c.ended.ids) > maxEnded {
		t.Fatalf("windows %d and %d, %d bytes held, block of %d", c.recv, c.send, held, len(c.block))
	}
	if len(c.streams) > 4 || c.held > 8 || c.held < len(c.streams) {
		t.Fatalf("%d streams, %d held", len(c.streams), c.held)
	}
}

// FuzzHead: a head that is taken means the same when it is written for HTTP/2
// and for HTTP/1.1.
func FuzzHead(f *testing.F) {
	for _, fields := range [][]string{
		request("GET", "/"), request("POST", "/%41?q", "content-length", "3", "x", "", "cookie", "a", "cookie", "b"), request("OPTIONS", "*", "te", "trailers"),
		append([]string{":protocol", "websocket"}, request("CONNECT", "/chat")...),
		append([]string{":protocol", "websocket"}, request("CONNECT", "/chat", "sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")...),
	} {
		f.Add([]byte(block(fields...)), false, true)
		f.Add([]byte(block(fields...)), false, false)
	}
	f.Add([]byte(block(request("GET", "/")...)+"\x10\x01x\x01y"), false, false)
	for _, fields := range [][]string{{":status", "200"}, {":status", "304", "content-length", "3"}, {":status", "103", "link", "a"}, {":status", "200", "content-length", "3"}} {
		f.Add([]byte(block(fields...)), true, true)
		f.Add([]byte(block(fields...)), true, false)
	}
	f.Fuzz(func(t *testing.T, in []byte, response, ended bool) {
		d := newDecoder()
		if len(in) > MaxBlock || d.read(in, response, false, ended) != nil || d.bad != "" || d.large {
			return
		}
		if n := len(d.parts.Fields); n > MaxFields || d.size > MaxHead {
			t.Fatalf("%d fields, %d bytes", n, d.size)
		}
		if response {
			checkResponse(t, &d.parts)
		} else {
			checkRequest(t, &d.parts)
		}
	})
}

func checkRequest(t *testing.T, p *http1.Parts) {
	t.Helper()
	var r, again, lines http1.Request
	if r.Assemble(p) != nil {
		return
	}
	e := &http1.Edit{Upgrade: r.Upgrade}
	d := newDecoder()
	if err := d.read(appendRequest(nil, &r, e, "https"), false, false, p.Ended); err != nil || d.bad != "" {
		t.Fatalf("%s is written so that it cannot be read: %v, %s", requestLine(&r), err, d.bad)
	}
	if r.Upgrade != "" { // whose handshake has no key here (RFC 8441, section 5)
		r.Fields = slices.DeleteFunc(r.Fields, func(f http1.Field) bool { return f.Name == "sec-websocket-key" })
	}
	if err := again.Assemble(&d.parts); err != nil || requestLine(&again) != requestLine(&r) || again.Target != r.Target || again.Body != r.Body || again.Trailers != r.Trailers {
		t.Fatalf("%s is written as %s: %v", requestLine(&r), requestLine(&again), err)
	}
	if len(r.Fields) > MaxFields-4 { // host, framing and upgrade take lines of their own
		return
	}
	out := r.Append(nil, e)
	if n, err := lines.Parse(out); err != nil || n != len(out) || lines.Body != r.Body || withoutSensitive(requestLine(&lines)) != withoutSensitive(requestLine(&r)) {
		t.Fatalf("%s is written as %q: %s, %v", requestLine(&r), out, requestLine(&lines), err)
	}
}

// requestLine is what of a request is passed on.
func requestLine(r *http1.Request) string {
	return fmt.Sprintf("%s %s?%s %s %d %q:", r.Method, r.Target.Path, r.Target.Query, r.Host, r.Length, r.Upgrade) + fieldLines(r.Fields)
}

func fieldLines(fields []http1.Field) string {
	var s strings.Builder
	for _, f := range fields {
		if !f.Hop && f.Name != "host" {
			fmt.Fprintf(&s, " %s=%q", f.Name, f.Value)
			if f.Sensitive {
				s.WriteByte('\x01')
			}
		}
	}
	return s.String()
}

// withoutSensitive leaves out what HTTP/1.1 cannot say.
func withoutSensitive(s string) string { return strings.ReplaceAll(s, "\x01", "") }

func checkResponse(t *testing.T, p *http1.Parts) {
	t.Helper()
	for _, method := range []string{"GET", "HEAD"} {
		var r, again, lines http1.Response
		asked := http1.Asked{Method: method}
		if r.Assemble(p, asked) != nil {
			continue
		}
		d := newDecoder()
		if err := d.read(appendResponse(nil, &r, &http1.Edit{}), true, false, p.Ended); err != nil || d.bad != "" && method != "HEAD" {
			t.Fatalf("%s is written so that it cannot be read: %v, %s", responseLine(&r), err, d.bad)
		}
		if err := again.Assemble(&d.parts, asked); err != nil || responseLine(&again) != responseLine(&r) || again.Body != r.Body || again.Length != r.Length {
			t.Fatalf("%s is written as %s: %v", responseLine(&r), responseLine(&again), err)
		}
		if len(r.Fields) > MaxFields-4 {
			continue
		}
		out := r.Append(nil, &http1.Edit{})
		if n, err := lines.Parse(out, asked); err != nil || n != len(out) || lines.Body != r.Body || !lines.KeepAlive || withoutSensitive(responseLine(&lines)) != withoutSensitive(responseLine(&r)) {
			t.Fatalf("%s is written as %q: %s, %v", responseLine(&r), out, responseLine(&lines), err)
		}
	}
}

func responseLine(r *http1.Response) string { return fmt.Sprint(r.Status, ":") + fieldLines(r.Fields) }
