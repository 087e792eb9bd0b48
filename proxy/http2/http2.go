// Package http2 is one end of an HTTP/2 connection (RFC 9113): bytes to heads,
// data and resets of streams, and back. It has no network, no goroutine and no
// timer, and decides on nothing.
//
//	c := http2.NewServer(http2.Settings{}, events)
//	n, err := c.Receive(buf)    // takes whole frames; calls events and receivers
//	buf = c.Take(buf[:0])       // what is to be sent
//	c.Pump()                    // those who waited for room go on
//
// Heads are those of package http1: who passes them on between the two
// versions needs no third form. Receive belongs to one goroutine; everything
// else may be called from any, also from within Receive.
//
// What a peer sends costs it patience where it carries nothing (see Patience);
// every other bound stands below. Priorities are read, checked and ignored (RFC
// 9113, section 5.3.2); nothing is pushed.
package http2

import (
	"fmt"
)

// The bounds.
const (
	MaxFrame      = 16 << 10  // of a frame that a peer may send, and of ours; in bytes
	MaxBlock      = 64 << 10  // of the frames of one head, as they come; in bytes
	MaxHead       = 64 << 10  // of a head, as SETTINGS_MAX_HEADER_LIST_SIZE counts it; in bytes
	MaxFields     = 128       // of a head
	MaxFragments  = 32        // frames of one head
	StreamWindow  = 256 << 10 // bytes of a stream that a peer may send ahead of who takes them
	Window        = 1 << 20   // the same of all streams that a client has opened on a connection
	FirstWindow   = 64 << 10  // as StreamWindow, of a stream that we have opened, unless it is one of MaxWide
	MaxWide       = 16        // streams that we have opened on a connection and whose window is StreamWindow, because they need it
	MaxStreams    = 250       // at a time, of a client, where Settings say nothing
	MaxUnsent     = 64 << 10  // of data that waits to be sent; in bytes
	MaxControl    = 64 << 10  // of other frames that wait to be sent: who reads none is not answered for ever; in bytes
	maxBacklog    = 256 << 10 // of all that waits to be sent, from which on no request is taken up; in bytes
	defaultWindow = 65535     // RFC 9113, section 6.9.2
	maxWindow     = 1<<31 - 1
	tableSize     = 4 << 10 // of the HPACK table of what comes; in bytes
	maxStreamID   = 1<<31 - 1
)

// Preface is what a client's connection begins with (RFC 9113, section 3.4).
const Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Code is an error code (RFC 9113, section 7).
type Code uint32

// The codes.
const (
	NoError Code = iota
	ProtocolError
	InternalError
	FlowControlError
	SettingsTimeout
	StreamClosed
	FrameSizeError
	RefusedStream
	Cancel
	CompressionError
	ConnectError
	EnhanceYourCalm
	InadequateSecurity
	HTTP11Required
)

var codeNames = [...]string{
	"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR",
	"REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
}

// String returns the name that the standard gives it.
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("code %d", uint32(c))
}

// Error is why a stream, or with Stream 0 the connection, ended other than it
// should.
type Error struct {
	Code   Code
	Stream uint32
	Remote bool // the peer ended it, by RST_STREAM or GOAWAY
	// Unseen is set where the peer has not looked at the stream: its request can
	// be sent again, whatever it is (RFC 9113, section 8.7).
	Unseen bool
	why    string
}

// Error says what was wrong.
func (e *Error) Error() string {
	switch {
	case e.Remote && e.Stream == 0:
		return "HTTP/2: the peer ended the connection with " + e.Code.String()
	case e.Remote:
		return "HTTP/2: the peer reset the stream with " + e.Code.String()
	}
	return "HTTP/2: " + e.why + " (" + e.Code.String() + ")"
}

func broken(code Code, why string) *Error { return &Error{Code: code, why: why} }

func brokenStream(id uint32, code Code, why string) *Error {
	return &Error{Code: code, Stream: id, why: why}
}

// kind is the type of a frame (RFC 9113, section 6).
type kind uint8

const (
	data kind = iota
	headers
	priority
	rstStream
	settings
	pushPromise
	ping
	goAway
	windowUpdate
	continuation
)

// The flags of frames.
const (
	endStream  = 0x1
	ack        = 0x1
	endHeaders = 0x4
	padded     = 0x8
	prioritize = 0x20
)

// The settings (RFC 9113, section 6.5.2, and RFC 8441, section 3).
const (
	setTableSize     = 0x1
	setPush          = 0x2
	setMaxStreams    = 0x3
	setInitialWindow = 0x4
	setMaxFrame      = 0x5
	setMaxHead       = 0x6
	setConnect       = 0x8
)

const frameHead = 9

// frame is a frame whose payload is a view of what was received.
type frame struct {
	kind    kind
	flags   uint8
	stream  uint32
	payload []byte
	selfish bool // it says that its stream depends on itself
}

func (f *frame) has(flag uint8) bool { return f.flags&flag != 0 }

// appendHead appends the head of a frame.
func appendHead(dst []byte, k kind, flags uint8, stream uint32, length int) []byte {
	return append(dst, byte(length>>16), byte(length>>8), byte(length), byte(k), flags, byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func append32(dst []byte, n uint32) []byte {
	return append(dst, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

func appendSetting(dst []byte, id uint16, n uint32) []byte {
	return append32(append(dst, byte(id>>8), byte(id)), n)
}
