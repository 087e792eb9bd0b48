package http2

import (
	"strings"
	"testing"
)

// This file is what a receiver has to hold its peer to, section by section of
// RFC 9113.

func toServer(t testing.TB) *diary { return server(t, Settings{MaxStreams: 3}) }

func toNewServer(t testing.TB) *diary {
	d := newDiary()
	d.conn = NewServer(Settings{}, d)
	return d
}

func toNewClient(t testing.TB) *diary {
	d := newDiary()
	d.conn = NewClient(Settings{}, d)
	d.sent(t)
	d.lines = nil
	return d
}

// The errors of connections, as an end of a server with and without a stream
// says them.
const (
	none  = "GOAWAY 0 "
	first = "opened 1 POST /; "
)

// Section 3.4: the preface, and SETTINGS first.
func TestPreface(t *testing.T) {
	t.Parallel()
	greeting := "SETTINGS [INITIAL_WINDOW_SIZE = 262144] [MAX_HEADER_LIST_SIZE = 65536] [MAX_CONCURRENT_STREAMS = 250] [ENABLE_CONNECT_PROTOCOL = 1]; WINDOW_UPDATE 0 983041"
	check(t, toNewServer, []exchange{
		{"the preface", Preface, greeting},
		{"and settings", clientsOwn, greeting + "; SETTINGS ack"},
		{"HTTP/1.1", "GET / HTTP/1.1\r\n", none + "PROTOCOL_ERROR"},
		{"a preface that ends otherwise", strings.Replace(Preface, "SM", "XX", 1), none + "PROTOCOL_ERROR"},
		{"another frame first", Preface + raw(ping, 0, 0, "12345678"), greeting + "; " + none + "PROTOCOL_ERROR"},
		{"an acknowledgement first", Preface + raw(settings, ack, 0, ""), greeting + "; " + none + "PROTOCOL_ERROR"},
		{"a request first", Preface + asked(1, "/"), greeting + "; " + none + "PROTOCOL_ERROR"},
	})
	check(t, toNewClient, []exchange{
		{"settings", noSettings, "SETTINGS ack"},
		{"HTTP/1.1", "HTTP/1.1 400 Bad Request\r\n\r\n", none + "PROTOCOL_ERROR"},
		{"another frame first", update(0, 1), none + "PROTOCOL_ERROR"},
	})
}

// Sections 4.1 and 4.2: frames and their size.
func TestFrames(t *testing.T) {
	t.Parallel()
	check(t, toServer, []exchange{
		{"an unknown kind", raw(99, 0xff, 7, "what?") + raw(ping, 0, 0, "12345678"), "PING 3132333435363738 ack=true"},
		{"unknown flags", raw(ping, 0xfe, 0, "12345678"), "PING 3132333435363738 ack=true"},
		{"the reserved bit of the stream", "\x00\x00\x08\x06\x00\x80\x00\x00\x0012345678", "PING 3132333435363738 ack=true"},
		{"the largest frame", posted(1, "/") + content(1, strings.Repeat("a", MaxFrame)), first + "data of 1: 16384"},
		{"a larger one", posted(1, "/") + content(1, strings.Repeat("a", MaxFrame+1)), first + "ended 1 here: FRAME_SIZE_ERROR; GOAWAY 1 FRAME_SIZE_ERROR"},
		{"of an unknown kind", raw(99, 0, 0, strings.Repeat("a", MaxFrame+1)), none + "FRAME_SIZE_ERROR"},
	})
}

// Section 4.3: blocks are in one piece, and can be decoded.
func TestBlocks(t *testing.T) {
	t.Parallel()
	whole := block(request("GET", "/")...)
	half, rest := whole[:3], whole[3:]
	begin := raw(headers, endStream, 1, half)
	check(t, toServer, []exchange{
		{"in two frames", begin + raw(continuation, endHeaders, 1, rest), "opened 1 GET /"},
		{"in many", begin + strings.Repeat(raw(continuation, 0, 1, ""), MaxFragments-2) + raw(continuation, endHeaders, 1, rest), "opened 1 GET /"},
		{"in too many", begin + strings.Repeat(raw(continuation, 0, 1, ""), MaxFragments), none + "ENHANCE_YOUR_CALM"},
		{"too long", raw(headers, 0, 1, strings.Repeat("a", MaxFrame)) + strings.Repeat(raw(continuation, 0, 1, strings.Repeat("a", MaxFrame)), 4), none + "ENHANCE_YOUR_CALM"},
		{"interrupted by another frame", begin + raw(ping, 0, 0, "12345678"), none + "PROTOCOL_ERROR"},
		{"by one of an unknown kind", begin + raw(99, 0, 1, ""), none + "PROTOCOL_ERROR"},
		{"by another stream", begin + raw(continuation, endHeaders, 3, rest), none + "PROTOCOL_ERROR"},
		{"by another head", begin + asked(3, "/"), none + "PROTOCOL_ERROR"},
		{"section 6.10: a continuation of nothing", raw(continuation, endHeaders, 1, whole), none + "PROTOCOL_ERROR"},
		{"of a head that is whole", asked(1, "/") + raw(continuation, endHeaders, 1, ""), "opened 1 GET /; ended 1 here: PROTOCOL_ERROR; GOAWAY 1 PROTOCOL_ERROR"},
		{"of stream 0", begin + raw(continuation, endHeaders, 0, rest), none + "PROTOCOL_ERROR"},
		{"an index that there is not", raw(headers, endHeaders|endStream, 1, "\xff\x80\x01"), none + "COMPRESSION_ERROR"},
		{"an index of 0", raw(headers, endHeaders|endStream, 1, "\x80"), none + "COMPRESSION_ERROR"},
		{"cut off", raw(headers, endHeaders|endStream, 1, whole+"\x00\x7f"), none + "COMPRESSION_ERROR"},
		{"an integer that overflows", raw(headers, endHeaders|endStream, 1, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x0f"), none + "COMPRESSION_ERROR"},
		{"a table that is larger than it may be", raw(headers, endHeaders|endStream, 1, "\x3f\xe2\x1f"+whole), none + "COMPRESSION_ERROR"},
		{"a table of the largest size", raw(headers, endHeaders|endStream, 1, "\x3f\xe1\x1f"+whole), "opened 1 GET /"},
		{"a change of the table behind a field of it", raw(headers, endHeaders|endStream, 1, whole+"\x40\x01x\x01y\x20"), none + "COMPRESSION_ERROR"},
		{"a string of bad Huffman code", raw(headers, endHeaders|endStream, 1, whole+"\x00\x84\xff\xff\xff\xff\x00"), none + "COMPRESSION_ERROR"},
		{"the table is followed where a head is refused", raw(headers, endHeaders|endStream, 1, "\x40\x01x\x01y") + raw(headers, endHeaders|endStream, 3, whole+"\xbe"), "opened 3 GET /; RST_STREAM 1 PROTOCOL_ERROR"},
	})
}

// Section 5.1: what may come on a stream in which state.
func TestStates(t *testing.T) {
	t.Parallel()
	check(t, toServer, []exchange{
		{"idle: DATA", content(1, "a"), none + "PROTOCOL_ERROR"},
		{"idle: RST_STREAM", reset(1, Cancel), none + "PROTOCOL_ERROR"},
		{"idle: WINDOW_UPDATE", update(1, 1), none + "PROTOCOL_ERROR"},
		{"idle: PRIORITY", raw(priority, 0, 1, number(0)+"\x00") + asked(1, "/"), "opened 1 GET /"},
		{"half-closed: DATA", asked(1, "/") + content(1, "a"), "opened 1 GET /; ended 1 here: STREAM_CLOSED; RST_STREAM 1 STREAM_CLOSED"},
		{"half-closed: HEADERS", asked(1, "/") + head(1, endStream, "a", "b"), "opened 1 GET /; ended 1 here: STREAM_CLOSED; RST_STREAM 1 STREAM_CLOSED"},
		{"half-closed: others", asked(1, "/") + update(1, 1) + raw(priority, 0, 1, number(0)+"\x00") + reset(1, Cancel), "opened 1 GET /; ended 1 by the peer: CANCEL"},
		{"closed by both: DATA", asked(1, "/answer") + content(1, "a"), "opened 1 GET /answer; HEADERS 1: :status=204, ended; RST_STREAM 1 STREAM_CLOSED"},
		{"closed by both: HEADERS", asked(1, "/answer") + head(1, endStream, "a", "b"), "opened 1 GET /answer; HEADERS 1: :status=204, ended; GOAWAY 1 STREAM_CLOSED"},
		{"closed by both: others", asked(1, "/answer") + update(1, 1) + raw(priority, 0, 1, number(0)+"\x00") + reset(1, Cancel), "opened 1 GET /answer; HEADERS 1: :status=204, ended"},
		{"closed by its reset: DATA", posted(1, "/") + reset(1, Cancel) + content(1, "a"), first + "ended 1 by the peer: CANCEL; RST_STREAM 1 STREAM_CLOSED"},
		{"closed by its reset: HEADERS", posted(1, "/") + reset(1, Cancel) + head(1, endStream, "a", "b"), first + "ended 1 by the peer: CANCEL; GOAWAY 1 STREAM_CLOSED"},
		{"closed by its reset: another", posted(1, "/") + reset(1, Cancel) + reset(1, Cancel), first + "ended 1 by the peer: CANCEL"},
		{"closed by our reset: all that was on its way", posted(1, "/reset") + content(1, "a") + update(1, 1) + head(1, endStream, "a", "b") + reset(1, Cancel), "opened 1 POST /reset; RST_STREAM 1 CANCEL"},
		{"answered, and wanted no more of", posted(1, "/enough") + content(1, "a") + lastContent(1, ""), "opened 1 POST /enough; HEADERS 1: :status=204, ended; RST_STREAM 1 NO_ERROR"},
		{"answered, and open", posted(1, "/answer") + content(1, "a") + lastContent(1, ""), "opened 1 POST /answer; data of 1: 1; data of 1: 0, ended; HEADERS 1: :status=204, ended"},
		{"section 5.1.1: an even number", asked(2, "/"), none + "PROTOCOL_ERROR"},
		{"section 5.1.1: a lower number", asked(5, "/answer") + asked(3, "/"), "opened 5 GET /answer; HEADERS 5: :status=204, ended; GOAWAY 5 PROTOCOL_ERROR"},
		{"section 5.1.1: numbers left out", asked(5, "/") + content(3, "a"), "opened 5 GET /; RST_STREAM 3 STREAM_CLOSED"},
		{"section 5.1.2: too many streams", asked(1, "/") + asked(3, "/") + asked(5, "/") + asked(7, "/"), "opened 1 GET /; opened 3 GET /; opened 5 GET /; RST_STREAM 7 REFUSED_STREAM"},
		{"section 5.1.2: one after another", asked(1, "/answer") + asked(3, "/answer") + asked(5, "/") + asked(7, "/") + asked(9, "/"), "opened 1 GET /answer; opened 3 GET /answer; opened 5 GET /; opened 7 GET /; opened 9 GET /; HEADERS 1: :status=204, ended; HEADERS 3: :status=204, ended"},
		{"section 5.3.1: depends on itself", raw(headers, endHeaders|endStream|prioritize, 1, number(1)+"\x00"+block(request("GET", "/")...)), "RST_STREAM 1 PROTOCOL_ERROR"},
	})
	check(t, client1, []exchange{
		{"idle", head(7, endStream, ":status", "200"), "ended 1 here: PROTOCOL_ERROR; GOAWAY 0 PROTOCOL_ERROR"},
		{"an even number", head(2, endStream, ":status", "200"), "ended 1 here: PROTOCOL_ERROR; GOAWAY 0 PROTOCOL_ERROR"},
		{"idle: DATA", content(7, "a"), "ended 1 here: PROTOCOL_ERROR; GOAWAY 0 PROTOCOL_ERROR"},
		{"DATA before the head", content(1, "a"), "ended 1 here: PROTOCOL_ERROR; RST_STREAM 1 PROTOCOL_ERROR"},
	})
}

// client1 has one open stream, of a POST, whose content is to come.
func client1(t testing.TB) *diary {
	d := newDiary()
	d.conn = NewClient(Settings{}, d)
	d.ask(t, "POST", "/", false)
	d.receive(t, noSettings)
	d.lines = nil
	return d
}

// Sections 6.1 and 6.2: DATA, HEADERS and their padding.
func TestDataAndHeaders(t *testing.T) {
	t.Parallel()
	whole := block(request("POST", "/")...)
	check(t, toServer, []exchange{
		{"DATA of stream 0", content(0, "a"), none + "PROTOCOL_ERROR"},
		{"content and its end", posted(1, "/") + content(1, "abc") + lastContent(1, "de"), first + "data of 1: 3; data of 1: 2, ended"},
		{"padding", posted(1, "/") + raw(data, padded|endStream, 1, "\x03ab\x00\x00\x00"), first + "data of 1: 2, ended"},
		{"nothing but padding", posted(1, "/") + raw(data, padded|endStream, 1, "\x00"), first + "data of 1: 0, ended"},
		{"as much padding as there is of the frame", posted(1, "/") + raw(data, padded, 1, "\x04ab\x00"), first + "ended 1 here: PROTOCOL_ERROR; GOAWAY 1 PROTOCOL_ERROR"},
		{"no length of the padding", posted(1, "/") + raw(data, padded, 1, ""), first + "ended 1 here: FRAME_SIZE_ERROR; GOAWAY 1 FRAME_SIZE_ERROR"},
		{"HEADERS of stream 0", head(0, endStream, request("GET", "/")...), none + "PROTOCOL_ERROR"},
		{"HEADERS with padding", raw(headers, padded|endHeaders, 1, "\x02"+whole+"\x00\x00"), "opened 1 POST /"},
		{"HEADERS with padding and priority", raw(headers, padded|prioritize|endHeaders, 1, "\x02"+number(3|1<<31)+"\x09"+whole+"\x00\x00"), "opened 1 POST /"},
		{"HEADERS with too much padding", raw(headers, padded|endHeaders, 1, "\xff"+whole), none + "PROTOCOL_ERROR"},
		{"HEADERS without the priority that it says it has", raw(headers, prioritize|endHeaders, 1, "\x00\x00\x00\x00"), none + "FRAME_SIZE_ERROR"},
	})
}

// Sections 6.3 to 6.8: the frames that carry no message.
func TestControl(t *testing.T) {
	t.Parallel()
	open := posted(1, "/")
	check(t, toServer, []exchange{
		{"6.3: PRIORITY of stream 0", raw(priority, 0, 0, number(1)+"\x00"), none + "PROTOCOL_ERROR"},
		{"6.3: PRIORITY of a wrong length", open + raw(priority, 0, 1, number(3)), first + "ended 1 here: FRAME_SIZE_ERROR; RST_STREAM 1 FRAME_SIZE_ERROR"},
		{"6.3: of an idle stream, which cannot be reset", raw(priority, 0, 1, number(3)), none + "FRAME_SIZE_ERROR"},
		{"6.3: PRIORITY on itself", open + raw(priority, 0, 1, number(1)+"\x00"), first + "ended 1 here: PROTOCOL_ERROR; RST_STREAM 1 PROTOCOL_ERROR"},
		{"6.4: RST_STREAM of stream 0", reset(0, Cancel), none + "PROTOCOL_ERROR"},
		{"6.4: RST_STREAM of a wrong length", open + raw(rstStream, 0, 1, "abc"), first + "ended 1 here: FRAME_SIZE_ERROR; GOAWAY 1 FRAME_SIZE_ERROR"},
		{"6.4: RST_STREAM of a code that nobody knows", open + reset(1, 99), first + "ended 1 by the peer: code 99"},
		{"6.5: SETTINGS of a stream", raw(settings, 0, 1, ""), none + "PROTOCOL_ERROR"},
		{"6.5: SETTINGS of a wrong length", raw(settings, 0, 0, "abcde"), none + "FRAME_SIZE_ERROR"},
		{"6.5: an acknowledgement with settings", raw(settings, ack, 0, setting(setPush, 0)), none + "FRAME_SIZE_ERROR"},
		{"6.5.2: ENABLE_PUSH of 2", raw(settings, 0, 0, setting(setPush, 2)), none + "PROTOCOL_ERROR"},
		{"6.5.2: ENABLE_PUSH of 1", raw(settings, 0, 0, setting(setPush, 1)), "SETTINGS ack"},
		{"6.5.2: a window that is too large", raw(settings, 0, 0, setting(setInitialWindow, 1<<31)), none + "FLOW_CONTROL_ERROR"},
		{"6.5.2: frames that are too small", raw(settings, 0, 0, setting(setMaxFrame, 16<<10-1)), none + "PROTOCOL_ERROR"},
		{"6.5.2: frames that are too large", raw(settings, 0, 0, setting(setMaxFrame, 1<<24)), none + "PROTOCOL_ERROR"},
		{"6.5.2: an unknown one", raw(settings, 0, 0, setting(0xabcd, 1<<31)), "SETTINGS ack"},
		{"6.5.3: each is acknowledged", noSettings + raw(settings, 0, 0, setting(setMaxFrame, 1<<20)), "SETTINGS ack; SETTINGS ack"},
		{"6.5.3: ours are acknowledged", raw(settings, ack, 0, ""), ""},
		{"6.5.3: and others", raw(settings, ack, 0, "") + raw(settings, ack, 0, ""), none + "PROTOCOL_ERROR"},
		{"RFC 8441, section 3: ENABLE_CONNECT_PROTOCOL of 2", raw(settings, 0, 0, setting(setConnect, 2)), none + "PROTOCOL_ERROR"},
		{"RFC 8441, section 3: taken back", raw(settings, 0, 0, setting(setConnect, 1)+setting(setConnect, 0)), none + "PROTOCOL_ERROR"},
		{"6.6: PUSH_PROMISE by a client", raw(pushPromise, endHeaders, 1, number(2)), none + "PROTOCOL_ERROR"},
		{"6.7: PING", raw(ping, 0, 0, "abcdefgh"), "PING 6162636465666768 ack=true"},
		{"6.7: its acknowledgement", raw(ping, ack, 0, "abcdefgh"), ""},
		{"6.7: PING of a stream", raw(ping, 0, 1, "abcdefgh"), none + "PROTOCOL_ERROR"},
		{"6.7: PING of a wrong length", raw(ping, 0, 0, "abcdefg"), none + "FRAME_SIZE_ERROR"},
		{"6.8: GOAWAY", open + raw(goAway, 0, 0, number(0)+number(0)+"bye") + content(1, "a"), first + "leaving; data of 1: 1"},
		{"6.8: GOAWAY with an error", open + raw(goAway, 0, 0, number(0)+number(uint32(InternalError))), first + "ended 1 by the peer: INTERNAL_ERROR"},
		{"6.8: GOAWAY of a stream", raw(goAway, 0, 1, number(0)+number(0)), none + "PROTOCOL_ERROR"},
		{"6.8: GOAWAY of a wrong length", raw(goAway, 0, 0, number(0)), none + "FRAME_SIZE_ERROR"},
	})
	check(t, client1, []exchange{
		{"6.5.2: ENABLE_PUSH by a server", raw(settings, 0, 0, setting(setPush, 1)), "ended 1 here: PROTOCOL_ERROR; GOAWAY 0 PROTOCOL_ERROR"},
		{"6.6: PUSH_PROMISE", raw(pushPromise, endHeaders, 1, number(2)+block(request("GET", "/")...)), "ended 1 here: PROTOCOL_ERROR; GOAWAY 0 PROTOCOL_ERROR"},
		{"6.8: GOAWAY that has seen the stream", raw(goAway, 0, 0, number(1)+number(0)) + head(1, endStream, ":status", "200"), "leaving; head of 1: 200, ended"},
		{"6.8: GOAWAY that has not", raw(goAway, 0, 0, number(0)+number(uint32(EnhanceYourCalm))), "ended 1 by the peer, unseen: REFUSED_STREAM; leaving"},
		{"8.7: a stream that is refused", reset(1, RefusedStream), "ended 1 by the peer, unseen: REFUSED_STREAM"},
		{"8.1: a response, and no need of the rest of the request", head(1, endStream, ":status", "200") + reset(1, NoError), "head of 1: 200, ended"},
		{"8.1: without a response", reset(1, NoError), "ended 1 by the peer: NO_ERROR"},
	})
}

// Section 6.9: windows.
func TestWindows(t *testing.T) {
	t.Parallel()
	open := posted(1, "/hold")
	opened := "opened 1 POST /hold; "
	full := strings.Repeat(content(1, strings.Repeat("a", MaxFrame)), StreamWindow/MaxFrame)
	check(t, toServer, []exchange{
		{"6.9: WINDOW_UPDATE of a wrong length", raw(windowUpdate, 0, 0, "abc"), none + "FRAME_SIZE_ERROR"},
		{"6.9: of nothing", open + update(1, 0), opened + "ended 1 here: PROTOCOL_ERROR; RST_STREAM 1 PROTOCOL_ERROR"},
		{"6.9: of nothing, of the connection", update(0, 0), none + "PROTOCOL_ERROR"},
		{"6.9: the reserved bit", open + update(1, 1<<31), opened + "ended 1 here: PROTOCOL_ERROR; RST_STREAM 1 PROTOCOL_ERROR"},
		{"6.9.1: as much as there may be", open + full, "opened 1 POST /hold"},
		{"6.9.1: more, of a stream", open + full + content(1, "a"), opened + "ended 1 here: FLOW_CONTROL_ERROR; RST_STREAM 1 FLOW_CONTROL_ERROR; WINDOW_UPDATE 0 262145"},
		{"6.9.1: a window of the largest size", open + update(1, maxWindow-defaultWindow) + update(0, maxWindow-defaultWindow), "opened 1 POST /hold"},
		{"6.9.1: a larger one, of a stream", open + update(1, maxWindow-defaultWindow+1), opened + "ended 1 here: FLOW_CONTROL_ERROR; RST_STREAM 1 FLOW_CONTROL_ERROR"},
		{"6.9.1: a larger one, of the connection", update(0, maxWindow-defaultWindow) + update(0, 1), none + "FLOW_CONTROL_ERROR"},
		{"6.9.2: a larger one by settings", open + update(1, maxWindow-defaultWindow) + raw(settings, 0, 0, setting(setInitialWindow, defaultWindow+1)), opened + "ended 1 here: FLOW_CONTROL_ERROR; GOAWAY 1 FLOW_CONTROL_ERROR"},
		{"6.9.2: what is sent, within the window", raw(settings, 0, 0, setting(setInitialWindow, 10)) + asked(1, "/content"), "opened 1 GET /content; SETTINGS ack; HEADERS 1: :status=200; DATA 1: 10"},
		{"6.9.2: a window that is open again", raw(settings, 0, 0, setting(setInitialWindow, 10)) + asked(1, "/content") + update(1, 5), "opened 1 GET /content; SETTINGS ack; HEADERS 1: :status=200; DATA 1: 10; DATA 1: 5"},
		{"6.9.2: a larger one for all", raw(settings, 0, 0, setting(setInitialWindow, 10)) + asked(1, "/content") + raw(settings, 0, 0, setting(setInitialWindow, 12)), "opened 1 GET /content; SETTINGS ack; HEADERS 1: :status=200; DATA 1: 10; SETTINGS ack; DATA 1: 2"},
		{"6.9.2: less than nothing", raw(settings, 0, 0, setting(setInitialWindow, 10)) + asked(1, "/content") + raw(settings, 0, 0, setting(setInitialWindow, 0)) + update(1, 10) + update(1, 3), "opened 1 GET /content; SETTINGS ack; HEADERS 1: :status=200; DATA 1: 10; SETTINGS ack; DATA 1: 3"},
	})
	all := ""
	for id := uint32(1); id <= 7; id += 2 {
		all += strings.ReplaceAll(open+full, number(1), number(id)) // of four streams
	}
	check(t, func(t testing.TB) *diary { return server(t, Settings{}) }, []exchange{
		{
			"6.9.1: more, of the connection", all + posted(9, "/hold") + content(9, "a"),
			"opened 1 POST /hold; opened 3 POST /hold; opened 5 POST /hold; opened 7 POST /hold; opened 9 POST /hold; " +
				"ended 1 here: FLOW_CONTROL_ERROR; ended 3 here: FLOW_CONTROL_ERROR; ended 5 here: FLOW_CONTROL_ERROR; ended 7 here: FLOW_CONTROL_ERROR; ended 9 here: FLOW_CONTROL_ERROR; GOAWAY 9 FLOW_CONTROL_ERROR",
		},
	})
}

// Sections 8.1 to 8.5 and RFC 8441: messages.
func TestMessages(t *testing.T) {
	t.Parallel()
	var rows []exchange
	for _, bad := range []struct {
		why    string
		fields []string
	}{
		{"8.2.1: capitals", request("GET", "/", "X-A", "b")},
		{"8.2.1: a name with a space", request("GET", "/", "x a", "b")},
		{"8.2.1: a name with a colon", request("GET", "/", "x:a", "b")},
		{"8.2.1: no name", request("GET", "/", "", "b")},
		{"8.2.1: a line feed", request("GET", "/", "x", "a\nb")},
		{"8.2.1: a return", request("GET", "/", "x", "a\rb")},
		{"8.2.1: NUL", request("GET", "/", "x", "a\x00b")},
		{"8.2.1: white space before", request("GET", "/", "x", " a")},
		{"8.2.1: white space behind", request("GET", "/", "x", "a\t")},
		{"8.2.2: connection", request("GET", "/", "connection", "keep-alive")},
		{"8.2.2: proxy-connection", request("GET", "/", "proxy-connection", "keep-alive")},
		{"8.2.2: keep-alive", request("GET", "/", "keep-alive", "1")},
		{"8.2.2: transfer-encoding", request("GET", "/", "transfer-encoding", "chunked")},
		{"8.2.2: upgrade", request("GET", "/", "upgrade", "websocket")},
		{"8.2.2: te", request("GET", "/", "te", "trailers, deflate")},
		{"8.3: behind a field", append([]string{"x", "y"}, request("GET", "/")...)},
		{"8.3: an unknown one", append([]string{":x", "y"}, request("GET", "/")...)},
		{"8.3: of a response", append([]string{":status", "200"}, request("GET", "/")...)},
		{"8.3.1: no method", request("GET", "/")[2:]},
		{"8.3.1: no scheme", append([]string{":method", "GET"}, request("GET", "/")[4:]...)},
		{"8.3.1: no path", request("GET", "/")[:6]},
		{"8.3.1: an empty path", request("GET", "")},
		{"8.3.1: a scheme that nobody serves", append([]string{":method", "GET", ":scheme", "ftp"}, request("GET", "/")[4:]...)},
		{"8.3.1: two methods", append([]string{":method", "GET"}, request("GET", "/")...)},
		{"8.3.1: two paths", append([]string{":path", "/"}, request("GET", "/")...)},
		{"8.3.1: two authorities", append([]string{":authority", "a"}, request("GET", "/")...)},
		{"8.3.1: a line feed in the path", request("GET", "/a\nb")},
		{"8.5: CONNECT with a path", request("CONNECT", "/")},
		{"8.5: CONNECT without an authority", []string{":method", "CONNECT"}},
		{"RFC 8441, section 4: a protocol without CONNECT", append([]string{":protocol", "websocket"}, request("GET", "/")...)},
		{"RFC 8441, section 4: without a path", []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":authority", "a"}},
		{"RFC 8441, section 4: without an authority", []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":path", "/"}},
		{"8.1.1: two lengths", request("GET", "/", "content-length", "0", "content-length", "0")},
		{"8.1.1: no number", request("GET", "/", "content-length", "-1")},
		{"8.1.1: an empty number", request("GET", "/", "content-length", "")},
		{"8.1.1: a length, and no content", request("GET", "/", "content-length", "1")},
		{"no head at all", nil},
	} {
		rows = append(rows, exchange{bad.why, head(1, endStream, bad.fields...), "RST_STREAM 1 PROTOCOL_ERROR"})
	}
	check(t, toServer, rows)
	check(t, toServer, []exchange{
		{"8.2.2: te of trailers", head(1, endStream, request("GET", "/", "te", "trailers")...), "opened 1 GET /"},
		{"8.5: CONNECT", head(1, 0, ":method", "CONNECT", ":authority", "a:1"), "opened 1 CONNECT "},
		{"RFC 8441, section 4", head(1, 0, append([]string{":protocol", "websocket"}, request("CONNECT", "/chat")...)...), "opened 1 CONNECT /chat websocket"},
		{"8.1: trailers", posted(1, "/") + content(1, "a") + head(1, endStream, "x", "y"), first + "data of 1: 1; trailers of 1: 1"},
		{"8.1: trailers without content", posted(1, "/") + head(1, endStream, "x", "y"), first + "trailers of 1: 1"},
		{"8.1: trailers that do not end", posted(1, "/") + head(1, 0, "x", "y"), first + "ended 1 here: PROTOCOL_ERROR; RST_STREAM 1 PROTOCOL_ERROR"},
		{"8.1: pseudo-fields in trailers", posted(1, "/") + head(1, endStream, ":path", "/"), first + "ended 1 here: PROTOCOL_ERROR; RST_STREAM 1 PROTOCOL_ERROR"},
		{"8.1: trailers that are too many", posted(1, "/") + head(1, endStream, many(MaxFields+1)...), first + "ended 1 here: ENHANCE_YOUR_CALM; RST_STREAM 1 ENHANCE_YOUR_CALM"},
		{"8.1.1: as much content as it says", posted(1, "/", "content-length", "3") + content(1, "ab") + lastContent(1, "c"), first + "data of 1: 2; data of 1: 1, ended"},
		{"8.1.1: more", posted(1, "/", "content-length", "3") + content(1, "abcd"), first + "ended 1 here: PROTOCOL_ERROR; RST_STREAM 1 PROTOCOL_ERROR"},
		{"8.1.1: less", posted(1, "/", "content-length", "3") + lastContent(1, "ab"), first + "ended 1 here: PROTOCOL_ERROR; RST_STREAM 1 PROTOCOL_ERROR"},
		{"8.1.1: less, and trailers", posted(1, "/", "content-length", "3") + content(1, "ab") + head(1, endStream, "x", "y"), first + "data of 1: 2; ended 1 here: PROTOCOL_ERROR; RST_STREAM 1 PROTOCOL_ERROR"},
		{"as many fields as there may be", head(1, endStream, request("GET", "/", many(MaxFields)...)...), "opened 1 GET /"},
		{"more", head(1, endStream, request("GET", "/", many(MaxFields+1)...)...), "opened 1, too large"},
		{"fields that are too long", head(1, endStream, request("GET", "/", "x", strings.Repeat("a", 10<<10))...), "opened 1 GET /"},
	})
}

// many are so many fields.
func many(n int) []string {
	var fields []string
	for range n {
		fields = append(fields, "x", "y")
	}
	return fields
}

// Section 8.3.2: responses. Stream 1 is of a POST that is not whole, 3 of a GET
// and 5 of a HEAD.
func TestResponses(t *testing.T) {
	t.Parallel()
	const refused = "ended 3 here: PROTOCOL_ERROR; RST_STREAM 3 PROTOCOL_ERROR"
	check(t, client, []exchange{
		{"a response", head(3, 0, ":status", "200") + lastContent(3, "abc"), "head of 3: 200; data of 3: 3, ended"},
		{"with trailers", head(3, 0, ":status", "200") + content(3, "abc") + head(3, endStream, "grpc-status", "0"), "head of 3: 200; data of 3: 3; trailers of 3: 1"},
		{"8.1: interim ones", head(3, 0, ":status", "100") + head(3, 0, ":status", "103", "link", "a") + head(3, endStream, ":status", "200"), "head of 3: 100; head of 3: 103; head of 3: 200, ended"},
		{"8.1: an interim one that ends", head(3, endStream, ":status", "103"), refused},
		{"8.1: an interim one behind the final one", head(3, 0, ":status", "200") + head(3, 0, ":status", "103"), "head of 3: 200; " + refused},
		{"8.6: 101", head(3, 0, ":status", "101"), refused},
		{"8.3.2: no status", head(3, endStream, "x", "y"), refused},
		{"8.3.2: two", head(3, endStream, ":status", "200", ":status", "200"), refused},
		{"8.3.2: no number", head(3, endStream, ":status", "2x0"), refused},
		{"8.3.2: too short", head(3, endStream, ":status", "20"), refused},
		{"8.3.2: too low", head(3, endStream, ":status", "020"), refused},
		{"8.3.2: of a request", head(3, endStream, ":status", "200", ":path", "/"), refused},
		{"8.3.2: behind others", head(3, endStream, "x", "y", ":status", "200"), refused},
		{"8.2.2: connection", head(3, endStream, ":status", "200", "connection", "close"), refused},
		{"8.1.1: a length, and no content", head(3, endStream, ":status", "200", "content-length", "3"), refused},
		{"8.1.1: less content", head(3, 0, ":status", "200", "content-length", "3") + lastContent(3, "ab"), "head of 3: 200; " + refused},
		{"8.1.1: HEAD", head(5, endStream, ":status", "200", "content-length", "3"), "head of 5: 200, ended"},
		{"8.1.1: HEAD with an end of its own", head(5, 0, ":status", "200", "content-length", "3") + lastContent(5, ""), "head of 5: 200; data of 5: 0, ended"},
		{"8.1.1: HEAD with content", head(5, 0, ":status", "200", "content-length", "3") + lastContent(5, "abc"), "head of 5: 200; ended 5 here: PROTOCOL_ERROR; RST_STREAM 5 PROTOCOL_ERROR"},
		{"8.1.1: 304", head(3, endStream, ":status", "304", "content-length", "3"), "head of 3: 304, ended"},
		{"8.1.1: 304 with content", head(3, 0, ":status", "304", "content-length", "3") + lastContent(3, "abc"), "head of 3: 304; " + refused},
		{"8.1.1: 204 with content", head(3, 0, ":status", "204") + lastContent(3, "abc"), "head of 3: 204; " + refused},
		{"too many fields", head(3, endStream, append([]string{":status", "200"}, many(MaxFields+1)...)...), "head of 3, too large"},
		{"behind its end", head(1, endStream, ":status", "200") + content(1, "a"), "head of 1: 200, ended; ended 1 here: STREAM_CLOSED; RST_STREAM 1 STREAM_CLOSED"},
		{"a reset", reset(3, Cancel), "ended 3 by the peer: CANCEL"},
	})
}
