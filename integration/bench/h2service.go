package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// standing is asked for instead of a size by who wants an answer that begins
// and never ends.
const standing = "standing"

// h2Service is the backend's end of a connection of HTTP/2 in plaintext, with
// prior knowledge (RFC 9113 §3.3).
type h2Service struct {
	*h2Endpoint
	asked   string               // path of the section that was read last
	open    map[uint32]*h2Stream // of which the request or the answer has not ended
	sending []*h2Stream          // those with content to send
}

// h2Stream is one request and what is sent back.
type h2Stream struct {
	id     uint32
	left   int   // octets of content to send
	sent   int64 // octets of content
	given  int64 // octets that the window has grown by
	stands bool  // it does not end after that
}

// serveH2 answers the requests of a connection whose preface is the next that
// r has.
func serveH2(c net.Conn, r *bufio.Reader) error {
	s := &h2Service{open: map[uint32]*h2Stream{}}
	s.h2Endpoint = newH2Endpoint(r, c, func(f hpack.HeaderField) {
		if f.Name == ":path" {
			s.asked = f.Value
		}
	})
	var preface [len(http2.ClientPreface)]byte
	if _, err := io.ReadFull(r, preface[:]); err != nil {
		return err
	}
	if string(preface[:]) != http2.ClientPreface {
		return errors.New("no HTTP/2")
	}
	if err := s.greet(); err != nil {
		return err
	}
	for {
		f, err := s.next(s.send)
		if err == nil {
			err = s.control(f)
		}
		if err == nil {
			err = s.take(f)
		}
		if err != nil {
			return err
		}
	}
}

// take reads what frames about streams bring.
func (s *h2Service) take(frame http2.Frame) error {
	id := frame.Header().StreamID
	switch f := frame.(type) {
	case *http2.HeadersFrame:
		if err := s.fields(f); err != nil {
			return err
		}
		stream := &h2Stream{id: id, left: kib, stands: true}
		if what := s.asked[strings.LastIndexByte(s.asked, '/')+1:]; what != standing {
			size, err := strconv.Atoi(what)
			if err != nil || size < 0 || size > mib {
				return errors.New("no request")
			}
			stream.left, stream.stands = size, false
		}
		s.open[id] = stream
		if f.StreamEnded() {
			return s.answer(stream)
		}
	case *http2.DataFrame:
		if stream := s.open[id]; stream != nil && f.StreamEnded() {
			return s.answer(stream)
		}
	case *http2.WindowUpdateFrame:
		if stream := s.open[id]; stream != nil {
			stream.given += int64(f.Increment)
		}
	case *http2.RSTStreamFrame:
		delete(s.open, id)
		s.sending = slices.DeleteFunc(s.sending, func(stream *h2Stream) bool { return stream.id == id })
	}
	return nil
}

// answer begins the answer to a request that has ended.
func (s *h2Service) answer(stream *h2Stream) error {
	s.field(":status", "200")
	s.field("server", "backend")
	s.field("date", "Fri, 27 Nov 2026 12:00:00 GMT")
	s.field("content-type", "application/json")
	s.field("cache-control", "no-store")
	if !stream.stands {
		s.field("content-length", strconv.Itoa(stream.left))
	}
	if stream.left == 0 {
		delete(s.open, stream.id)
	} else {
		s.sending = append(s.sending, stream)
	}
	return s.headers(stream.id, stream.left == 0)
}

// content is what answers are made of.
var content = bytes.Repeat([]byte("x"), h2Frame)

// send writes as much of all answers as the other side takes, a frame of each
// in turn.
func (s *h2Service) send() error {
	var err error
	for sent := true; sent && err == nil; {
		sent = false
		s.sending = slices.DeleteFunc(s.sending, func(stream *h2Stream) bool {
			n := min(int64(stream.left), h2Frame, s.window, s.initial+stream.given-stream.sent)
			if n <= 0 || err != nil {
				return false
			}
			sent = true
			s.window -= n
			stream.sent += n
			stream.left -= int(n)
			err = s.framer.WriteData(stream.id, stream.left == 0 && !stream.stands, content[:n])
			if stream.left == 0 && !stream.stands {
				delete(s.open, stream.id)
			}
			return stream.left == 0
		})
	}
	return err
}
