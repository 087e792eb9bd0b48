package http2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/narthex-id/narthex/proxy/http1"
)

// This file is how the tests say what comes in, and how they are told what came
// of it.

// raw is a frame.
func raw(k kind, flags uint8, stream uint32, payload string) string {
	return string(appendHead(nil, k, flags, stream, len(payload))) + payload
}

// number is 32 bits.
func number(n uint32) string { return string(append32(nil, n)) }

// setting is one of SETTINGS.
func setting(id uint16, n uint32) string { return string(appendSetting(nil, id, n)) }

// block is the block of a head, of names and values in turn.
func block(fields ...string) string {
	var b []byte
	for i := 0; i < len(fields); i += 2 {
		b = appendPair(b, fields[i], fields[i+1])
	}
	return string(b)
}

// head is a head in one frame.
func head(stream uint32, flags uint8, fields ...string) string {
	return raw(headers, flags|endHeaders, stream, block(fields...))
}

// request is a request for a path, with these fields too.
func request(method, path string, fields ...string) []string {
	return append([]string{":method", method, ":scheme", "https", ":authority", "a", ":path", path}, fields...)
}

// asked is a request that ends with its head.
func asked(stream uint32, path string) string {
	return head(stream, endStream, request("GET", path)...)
}

// posted is one whose content follows.
func posted(stream uint32, path string, fields ...string) string {
	return head(stream, 0, request("POST", path, fields...)...)
}

func content(stream uint32, b string) string { return raw(data, 0, stream, b) }

func lastContent(stream uint32, b string) string { return raw(data, endStream, stream, b) }

func reset(stream uint32, code Code) string { return raw(rstStream, 0, stream, number(uint32(code))) }

func update(stream, n uint32) string { return raw(windowUpdate, 0, stream, number(n)) }

var (
	noSettings = raw(settings, 0, 0, "")
	clientsOwn = Preface + noSettings
)

// diary is what an end was told and has sent, and the owner of its streams,
// which does what the path of a request says.
type diary struct {
	conn  *Conn
	lines []string
	heads *hpack.Decoder // what it sends is read with
}

func newDiary() *diary {
	d := &diary{}
	d.heads = hpack.NewDecoder(tableSize, nil)
	return d
}

func (d *diary) note(format string, args ...any) {
	d.lines = append(d.lines, fmt.Sprintf(format, args...))
}

func (d *diary) Settled() {}
func (d *diary) Leaving() { d.note("leaving") }

func (d *diary) Opened(s *Stream, p *http1.Parts, large bool) {
	switch {
	case large:
		d.note("opened %d, too large", s.ID())
	case p.Protocol != "":
		d.note("opened %d %s %s %s", s.ID(), p.Method, p.Path, p.Protocol)
	default:
		d.note("opened %d %s %s", s.ID(), p.Method, p.Path)
	}
	s.Attend(&entry{d, s, p.Path})
	switch p.Path {
	case "/answer":
		_ = s.Answer(http.StatusNoContent, nil, true)
		if p.Ended {
			s.Release(NoError)
		}
	case "/enough":
		_ = s.Answer(http.StatusNoContent, nil, true)
		s.Release(NoError)
	case "/reset":
		s.Release(Cancel)
	case "/content":
		_ = s.Answer(http.StatusOK, nil, false)
		_, _ = s.Write(make([]byte, MaxUnsent), false)
	}
}

// entry is the receiver of a stream.
type entry struct {
	d    *diary
	s    *Stream
	path string
}

func (e *entry) Head(p *http1.Parts, large bool) {
	switch {
	case large:
		e.d.note("head of %d, too large", e.s.ID())
	case p.Ended:
		e.d.note("head of %d: %d, ended", e.s.ID(), p.Status)
	default:
		e.d.note("head of %d: %d", e.s.ID(), p.Status)
	}
}

func (e *entry) Data(b []byte, ended bool) int {
	if e.path == "/hold" {
		return 0
	}
	e.d.note("data of %d: %d%s", e.s.ID(), len(b), map[bool]string{true: ", ended"}[ended])
	return len(b)
}

func (e *entry) Trailers(fields []http1.Field) {
	e.d.note("trailers of %d: %d", e.s.ID(), len(fields))
}

func (e *entry) Room() {
	if e.path == "/content" {
		_, _ = e.s.Write(make([]byte, MaxUnsent), false)
	}
}

func (e *entry) Ended(err *Error) {
	who := "here"
	if err.Remote {
		who = "by the peer"
	}
	if err.Unseen {
		who += ", unseen"
	}
	e.d.note("ended %d %s: %s", e.s.ID(), who, err.Code)
	e.s.Release(Cancel)
}

// sent notes the frames that were sent since.
func (d *diary) sent(t testing.TB) {
	t.Helper()
	for out := d.conn.Take(); out != nil; out = d.conn.Take() {
		b := strings.TrimPrefix(string(*out), Preface)
		d.conn.Sent(out)
		d.conn.Pump()
		framer := xhttp2.NewFramer(nil, strings.NewReader(b))
		framer.ReadMetaHeaders = d.heads
		for {
			f, err := framer.ReadFrame()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("what is sent cannot be read: %v", err)
			}
			d.lines = append(d.lines, frameLine(f))
		}
	}
}

// frameLine says what a frame is.
func frameLine(f xhttp2.Frame) string {
	id := f.Header().StreamID
	switch f := f.(type) {
	case *xhttp2.DataFrame:
		return fmt.Sprintf("DATA %d: %d%s", id, len(f.Data()), map[bool]string{true: ", ended"}[f.StreamEnded()])
	case *xhttp2.MetaHeadersFrame:
		line := fmt.Sprintf("HEADERS %d:", id)
		for _, field := range f.Fields {
			line += " " + field.Name + "=" + field.Value
		}
		return line + map[bool]string{true: ", ended"}[f.StreamEnded()]
	case *xhttp2.RSTStreamFrame:
		return fmt.Sprintf("RST_STREAM %d %s", id, Code(f.ErrCode))
	case *xhttp2.GoAwayFrame:
		return fmt.Sprintf("GOAWAY %d %s", f.LastStreamID, Code(f.ErrCode))
	case *xhttp2.WindowUpdateFrame:
		return fmt.Sprintf("WINDOW_UPDATE %d %d", id, f.Increment)
	case *xhttp2.PingFrame:
		return fmt.Sprintf("PING %x ack=%t", f.Data, f.IsAck())
	case *xhttp2.SettingsFrame:
		if f.IsAck() {
			return "SETTINGS ack"
		}
		line := "SETTINGS"
		_ = f.ForeachSetting(func(s xhttp2.Setting) error { line += " " + s.String(); return nil })
		return line
	}
	return f.Header().String()
}

// server returns an end that a client has greeted, with an empty diary.
func server(t testing.TB, s Settings) *diary {
	t.Helper()
	d := newDiary()
	d.conn = NewServer(s, d)
	d.receive(t, clientsOwn)
	d.lines = nil
	return d
}

// client returns an end that has asked for three things, of which the first has
// content to come, and that a server has greeted, with an empty diary.
func client(t testing.TB) *diary {
	t.Helper()
	d := newDiary()
	d.conn = NewClient(Settings{}, d)
	for _, method := range []string{"POST", "GET", "HEAD"} {
		d.ask(t, method, "/", method != "POST")
	}
	d.receive(t, noSettings)
	d.lines = nil
	return d
}

// ask opens a stream.
func (d *diary) ask(t testing.TB, method, path string, ended bool) *Stream {
	t.Helper()
	if !d.conn.Reserve() {
		t.Fatal("there is no place")
	}
	r := &http1.Request{}
	if err := r.Assemble(&http1.Parts{Method: method, Scheme: "https", Authority: "a", Path: path, Ended: ended}); err != nil {
		t.Fatal(err)
	}
	e := &entry{d: d, path: path}
	s, err := d.conn.Request(r, &http1.Edit{}, "https", ended, e)
	if err != nil {
		t.Fatal(err)
	}
	e.s = s
	return s
}

// receive gives in to the end, and notes what it sends.
func (d *diary) receive(t testing.TB, in string) error {
	t.Helper()
	n, err := d.conn.Receive([]byte(in))
	if err == nil && len(in)-n > frameHead+MaxFrame {
		t.Fatalf("%d bytes are left", len(in)-n)
	}
	d.sent(t)
	return err
}

func (d *diary) String() string { return strings.Join(d.lines, "; ") }

// exchange is one row of a table: what comes in, and what comes of it.
type exchange struct {
	why  string
	in   string
	want string
}

// check gives each row to an end of its own, whole and byte by byte.
func check(t *testing.T, start func(testing.TB) *diary, rows []exchange) {
	t.Helper()
	for _, row := range rows {
		d := start(t)
		_ = d.receive(t, row.in)
		if got := d.String(); got != row.want {
			t.Errorf("%s:\n got %s\nwant %s", row.why, got, row.want)
		}
		if d.conn.recv < 0 || d.conn.held < 0 {
			t.Errorf("%s: window %d, %d held", row.why, d.conn.recv, d.conn.held)
		}
		if _, pieces := inPieces(t, start, row.in, 1); pieces != row.want {
			t.Errorf("%s: byte by byte:\n got %s\nwant %s", row.why, pieces, row.want)
		}
	}
}

// inPieces gives in to an end in pieces of a size.
func inPieces(t testing.TB, start func(testing.TB) *diary, in string, size int) (*diary, string) {
	t.Helper()
	d := start(t)
	var buf bytes.Buffer
	for len(in) > 0 {
		piece := in[:min(size, len(in))]
		in = in[len(piece):]
		buf.WriteString(piece)
		n, err := d.conn.Receive(buf.Bytes())
		buf.Next(n)
		if err != nil {
			break
		}
	}
	d.sent(t)
	return d, d.String()
}

// uint32Of is the number that a payload begins with.
func uint32Of(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
