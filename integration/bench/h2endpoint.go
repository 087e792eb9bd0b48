package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// What our ends of HTTP/2 connections let the other side send before we have
// read it, in octets. It is more than any message here has, so that nobody
// waits for us.
const (
	h2StreamWindow     = 16 * mib
	h2ConnectionWindow = 512 * mib
)

// What HTTP/2 begins with (RFC 9113 §6.5.2, §6.9.2), and the largest frames
// that we write, which every endpoint takes (§4.2).
const (
	h2FirstWindow = 65_535
	h2Frame       = 16 * kib
)

// h2Endpoint is what the client and the backend have in common on a connection
// of HTTP/2 (RFC 9113). One goroutine reads and writes it. It writes only when
// there is nothing more to read, so that what a batch of frames asks for goes
// out at once.
type h2Endpoint struct {
	in     *bufio.Reader
	out    *bufio.Writer
	framer *http2.Framer
	block  bytes.Buffer // what encode has written
	encode *hpack.Encoder
	decode *hpack.Decoder

	settled bool   // the other side has said how it wants it
	streams uint32 // how many it takes at a time
	initial int64  // octets that it takes on a stream at first
	window  int64  // octets that it takes on the connection now
	taken   uint32 // octets of DATA we have read and not yet given it back
}

// newH2Endpoint returns an endpoint that reads what in has, and hands every
// field of a field section to emit.
func newH2Endpoint(in *bufio.Reader, out io.Writer, emit func(hpack.HeaderField)) *h2Endpoint {
	e := &h2Endpoint{in: in, out: bufio.NewWriterSize(out, 2*h2Frame), streams: 1<<32 - 1, initial: h2FirstWindow, window: h2FirstWindow}
	e.framer = http2.NewFramer(e.out, in)
	e.framer.SetReuseFrames()
	e.framer.SetMaxReadFrameSize(h2Frame)
	e.encode = hpack.NewEncoder(&e.block)
	e.decode = hpack.NewDecoder(4096, emit)
	return e
}

// greet says what we want, settings besides. What it writes stays in the
// buffer.
func (e *h2Endpoint) greet(settings ...http2.Setting) error {
	settings = append(settings, http2.Setting{ID: http2.SettingInitialWindowSize, Val: h2StreamWindow})
	if err := e.framer.WriteSettings(settings...); err != nil {
		return err
	}
	return e.framer.WriteWindowUpdate(0, h2ConnectionWindow)
}

// next returns the next frame, which is good until the call after it. Before
// it waits for one, write is called, which may leave something to write.
func (e *h2Endpoint) next(write func() error) (http2.Frame, error) {
	if e.in.Buffered() == 0 {
		if err := write(); err != nil {
			return nil, err
		}
		if err := e.out.Flush(); err != nil {
			return nil, err
		}
	}
	return e.framer.ReadFrame()
}

// control does what frames about the connection ask for.
func (e *h2Endpoint) control(frame http2.Frame) error {
	switch f := frame.(type) {
	case *http2.SettingsFrame:
		if f.IsAck() {
			return nil
		}
		e.settled = true
		if err := f.ForeachSetting(e.set); err != nil {
			return err
		}
		return e.framer.WriteSettingsAck()
	case *http2.PingFrame:
		if !f.IsAck() {
			return e.framer.WritePing(true, f.Data)
		}
	case *http2.WindowUpdateFrame:
		if f.StreamID == 0 {
			e.window += int64(f.Increment)
		}
	case *http2.DataFrame:
		// Padding counts, too (RFC 9113 §6.9.1).
		e.taken += f.Length
		if e.taken >= h2ConnectionWindow/2 {
			n := e.taken
			e.taken = 0
			return e.framer.WriteWindowUpdate(0, n)
		}
	}
	return nil
}

func (e *h2Endpoint) set(s http2.Setting) error {
	switch s.ID {
	case http2.SettingHeaderTableSize:
		e.encode.SetMaxDynamicTableSizeLimit(s.Val)
	case http2.SettingMaxConcurrentStreams:
		e.streams = s.Val
	case http2.SettingInitialWindowSize:
		e.initial = int64(s.Val)
	}
	return nil
}

// field adds a field to the section that is being made. Those that a client
// says again and again are in the table of both ends after the first time.
func (e *h2Endpoint) field(name, value string) {
	_ = e.encode.WriteField(hpack.HeaderField{Name: name, Value: value}) // a bytes.Buffer takes all
}

// headers writes the section that was made, which fits into one frame.
func (e *h2Endpoint) headers(stream uint32, end bool) error {
	err := e.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: e.block.Bytes(), EndHeaders: true, EndStream: end})
	e.block.Reset()
	return err
}

// fields reads a field section.
func (e *h2Endpoint) fields(f *http2.HeadersFrame) error {
	if !f.HeadersEnded() {
		return errors.New("a field section in more than one frame")
	}
	if _, err := e.decode.Write(f.HeaderBlockFragment()); err != nil {
		return err
	}
	return e.decode.Close()
}
