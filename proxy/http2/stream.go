package http2

import (
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/narthex-id/narthex/proxy/http1"
)

// Stream is one request and its response.
type Stream struct {
	c        *Conn
	id       uint32
	receiver Receiver

	// Guarded by Conn.mu.
	send          int64 // what we may send
	recv          int64 // what the peer may send
	window        int64 // what it may send where all was taken
	unacked       int64 // as Conn.unacked
	length        int64 // what Content-Length says of what comes; -1: nothing
	got           int64 // bytes of content that came
	headed        bool  // the head came: of a response, the final one
	recvEnded     bool
	sentEnded     bool
	over          bool
	err           *Error // why, where it was before its time
	place         bool   // it holds one
	bare          bool   // the response has no content, whatever it says
	opening       bool   // its owner is being told of it
	untold        *Error // of a stream that ended meanwhile
	waits         bool
	before, after *Stream

	gone atomic.Bool // nobody wants what comes any more

	order    sync.Mutex // guards the following: what comes is told in its order
	chunks   []*[]byte  // content that nobody took yet
	heldEnd  bool       // which is all of it
	trailers []http1.Field
}

// ID returns its number.
func (s *Stream) ID() uint32 { return s.id }

// Attend has a receiver told what comes on a stream that a client has opened. It
// is to be called from Events.Opened; who is not attended is passed over.
func (s *Stream) Attend(r Receiver) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.receiver = r
}

// open makes a stream, with c.mu held.
func (c *Conn) open(id uint32, receiver Receiver) *Stream {
	s := &Stream{c: c, id: id, receiver: receiver, send: c.window, recv: c.streamWindow(), window: c.streamWindow(), length: -1}
	c.streams[id] = s
	return s
}

// takeHeaders takes the first frame of a head.
func (c *Conn) takeHeaders(f *frame) *Error {
	if f.stream == 0 {
		return broken(ProtocolError, "HEADERS of no stream")
	}
	block, err := unpadded(f)
	if err != nil {
		return err
	}
	if f.has(prioritize) {
		if len(block) < 5 {
			return broken(FrameSizeError, "HEADERS that are too short")
		}
		f.selfish = dependsOn(block) == f.stream
		block = block[5:]
	}
	if f.has(endHeaders) {
		return c.takeBlock(f, block)
	}
	c.opening, c.pieces = *f, 1
	c.opening.payload = nil
	c.block = append(c.block[:0], block...)
	return nil
}

func (c *Conn) takeContinuation(f *frame) *Error {
	if c.opening.stream == 0 {
		return broken(ProtocolError, "CONTINUATION of no head")
	}
	if c.pieces++; c.pieces > MaxFragments || len(c.block)+len(f.payload) > MaxBlock {
		return broken(EnhanceYourCalm, "a head in too many frames, or too long")
	}
	c.block = append(c.block, f.payload...)
	if !f.has(endHeaders) {
		return nil
	}
	opening, block := c.opening, c.block
	c.opening, c.block = frame{}, nil
	return c.takeBlock(&opening, block)
}

func unpadded(f *frame) ([]byte, *Error) {
	b := f.payload
	if !f.has(padded) {
		return b, nil
	}
	if len(b) == 0 {
		return nil, broken(FrameSizeError, "a padded frame without its length")
	}
	if int(b[0]) >= len(b) {
		return nil, broken(ProtocolError, "more padding than there is of the frame")
	}
	return b[1 : len(b)-int(b[0])], nil
}

// takeBlock takes a whole head: of a request, of a response, or trailers.
func (c *Conn) takeBlock(f *frame, block []byte) *Error {
	c.mu.Lock()
	s := c.streams[f.stream]
	idle := c.idle(f.stream)
	c.mu.Unlock()
	trailers := s != nil && s.headed // only Receive sets it
	if err := c.decoder.read(block, c.client, trailers, f.has(endStream)); err != nil {
		return err
	}
	if c.decoder.large && !c.client { // what a service answers is no fault of the others that it answers
		if err := c.spendOn(CostLarge); err != nil {
			return err
		}
	}
	if f.selfish {
		c.decoder.refuse("a stream that depends on itself")
	}
	switch {
	case s != nil && trailers:
		return c.takeTrailers(s, f)
	case s != nil:
		return c.takeResponse(s, f)
	case !idle:
		return c.takeLate(f)
	case c.client || f.stream%2 == 0:
		return broken(ProtocolError, "HEADERS of a stream that nobody opened")
	}
	return c.takeRequest(f)
}

// takeLate is for a head on a stream that has ended.
func (c *Conn) takeLate(f *frame) *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.client, c.resets.has(f.stream), f.stream > c.final: // it was on its way
		return c.spendLocked(CostFrame)
	case c.ended.has(f.stream):
		return broken(StreamClosed, "HEADERS of a stream that has ended")
	}
	return broken(ProtocolError, "a stream whose number is lower than that of one before")
}

func (c *Conn) takeRequest(f *frame) *Error {
	d := c.decoder
	c.mu.Lock()
	c.last = f.stream
	if f.stream > c.final || c.failed.Load() != nil { // it is not looked at, which the peer was told
		defer c.mu.Unlock()
		return c.spendLocked(CostFrame)
	}
	if err := c.refuses(f.stream); err != nil {
		c.mu.Unlock()
		return err
	}
	s := c.open(f.stream, nobody{})
	s.headed, s.length, s.recvEnded, s.place, s.opening = true, d.length, f.has(endStream), true, true
	c.held++
	c.mu.Unlock()
	c.opened(s)
	return nil
}

// refuses returns why a request is not taken up, with c.mu held. A place may be
// held for a moment longer than its stream is open: a client that opens the next
// one at once is not refused for that.
func (c *Conn) refuses(id uint32) *Error {
	switch {
	case c.decoder.bad != "":
		return brokenStream(id, ProtocolError, c.decoder.bad)
	case len(c.streams) >= c.ours.MaxStreams, c.held >= 2*c.ours.MaxStreams:
		return brokenStream(id, RefusedStream, "more streams than there may be")
	case c.backlog() >= maxBacklog:
		return brokenStream(id, RefusedStream, "more answers wait to be read than there may be")
	}
	return nil
}

// opened tells the owner of a request. The connection may end meanwhile, which
// its receiver is told once it is there.
func (c *Conn) opened(s *Stream) {
	s.order.Lock()
	c.events.Opened(s, &c.decoder.parts, c.decoder.large)
	s.unlock()
	c.mu.Lock()
	s.opening = false
	untold := s.untold
	c.mu.Unlock()
	if untold != nil {
		s.tell(untold)
	}
}

// nobody receives what comes on a stream that nobody attends.
type nobody struct{}

func (nobody) Head(*http1.Parts, bool)   {}
func (nobody) Data(b []byte, _ bool) int { return len(b) }
func (nobody) Trailers([]http1.Field)    {}
func (nobody) Room()                     {}
func (nobody) Ended(*Error)              {}

func (c *Conn) takeResponse(s *Stream, f *frame) *Error {
	d := c.decoder
	interim := d.parts.Status >= 100 && d.parts.Status < 200
	switch {
	case d.bad != "" && (!s.bare || d.bad != noContent):
		return brokenStream(f.stream, ProtocolError, d.bad)
	case interim && f.has(endStream):
		return brokenStream(f.stream, ProtocolError, "an interim response that ends its stream")
	case interim:
		if err := c.spend(); err != nil {
			return err
		}
	}
	c.mu.Lock()
	if !interim && !s.over {
		s.headed = true
		s.bare = s.bare || d.parts.Status == http.StatusNoContent || d.parts.Status == http.StatusNotModified
		if s.length = d.length; s.bare {
			s.length = -1
		}
		s.endRecv(f.has(endStream))
	}
	c.mu.Unlock()
	s.order.Lock()
	defer s.unlock()
	if !s.gone.Load() {
		s.receiver.Head(&d.parts, d.large)
	}
	return nil
}

func (c *Conn) takeTrailers(s *Stream, f *frame) *Error {
	d := c.decoder
	c.mu.Lock()
	switch {
	case s.over: // its owner has reset it since
		c.mu.Unlock()
		return nil
	case s.recvEnded:
		c.mu.Unlock()
		return brokenStream(f.stream, StreamClosed, "HEADERS behind the end of the stream")
	case !f.has(endStream):
		c.mu.Unlock()
		return brokenStream(f.stream, ProtocolError, "trailers that do not end the stream")
	case d.bad != "":
		c.mu.Unlock()
		return brokenStream(f.stream, ProtocolError, d.bad)
	case d.large:
		c.mu.Unlock()
		return brokenStream(f.stream, EnhanceYourCalm, "trailers that are too long")
	case s.length >= 0 && s.got != s.length:
		c.mu.Unlock()
		return brokenStream(f.stream, ProtocolError, "less content than content-length says")
	}
	s.endRecv(true)
	c.mu.Unlock()
	s.order.Lock()
	defer s.unlock()
	fields := d.parts.Fields
	if s.gone.Load() {
		return nil
	}
	if len(s.chunks) > 0 {
		s.trailers, s.heldEnd = slices.Clone(fields), true
		if s.trailers == nil {
			s.trailers = []http1.Field{}
		}
		return nil
	}
	s.receiver.Trailers(fields)
	return nil
}

func (c *Conn) takeData(f *frame) *Error {
	if f.stream == 0 {
		return broken(ProtocolError, "DATA of no stream")
	}
	b, err := unpadded(f)
	if err != nil {
		return err
	}
	ended := f.has(endStream)
	c.mu.Lock()
	s, err := c.countData(f, b, ended)
	if err != nil || s == nil {
		c.mu.Unlock()
		return err
	}
	c.mu.Unlock()
	if len(b) > 0 || ended {
		s.deliver(b, ended)
	}
	return nil
}

// countData holds DATA against its windows and its Content-Length, with c.mu
// held. It returns no stream where it is for one that is to get nothing more.
func (c *Conn) countData(f *frame, b []byte, ended bool) (*Stream, *Error) {
	size := int64(len(f.payload))
	if size > c.recv {
		return nil, broken(FlowControlError, "more data than the window of the connection")
	}
	c.recv -= size
	s := c.streams[f.stream]
	if s == nil || s.recvEnded {
		return nil, c.strayData(f, s, size)
	}
	if !s.headed {
		c.credit(nil, size)
		return nil, brokenStream(f.stream, ProtocolError, "DATA before the head")
	}
	if size > s.recv {
		c.credit(nil, size)
		return nil, brokenStream(f.stream, FlowControlError, "more data than the window of the stream")
	}
	s.recv -= size
	s.got += int64(len(b))
	if s.length >= 0 && (s.got > s.length || ended && s.got < s.length) {
		c.credit(nil, size)
		return nil, brokenStream(f.stream, ProtocolError, "more or less content than content-length says")
	}
	if s.bare && len(b) > 0 {
		c.credit(nil, size)
		return nil, brokenStream(f.stream, ProtocolError, "content in a response to HEAD, or of a status that has none")
	}
	if len(b) > 0 {
		c.patience.gain(gainData)
	} else if !ended {
		if calm := c.spendLocked(CostFrame); calm != nil {
			return nil, calm
		}
	}
	c.credit(s, size-int64(len(b))) // of the padding
	s.endRecv(ended)
	return s, nil
}

// strayData is for DATA that nobody waits for, with c.mu held.
func (c *Conn) strayData(f *frame, s *Stream, size int64) *Error {
	if s == nil && c.idle(f.stream) {
		return broken(ProtocolError, "DATA of a stream that was never opened")
	}
	c.credit(nil, size)
	if s == nil && (c.resets.has(f.stream) || !c.client && f.stream > c.final) { // it was on its way
		if size == 0 {
			return c.spendLocked(CostFrame)
		}
		return nil
	}
	return brokenStream(f.stream, StreamClosed, "DATA of a stream that has ended")
}

// endRecv notes that nothing more comes, with c.mu held.
func (s *Stream) endRecv(ended bool) {
	if ended {
		s.recvEnded = true
		s.settle()
	}
}

// settle takes the stream out where both sides have ended it, with c.mu held.
func (s *Stream) settle() {
	if s.recvEnded && s.sentEnded && !s.over {
		s.c.patience.gain(gainRequest)
		s.c.bury(s, nil, false)
	}
}

// credit tells the peer, in time, that so much of what it sent was taken, with
// c.mu held. Without a stream, or where that has ended, it is of the connection
// alone.
func (c *Conn) credit(s *Stream, n int64) {
	if n == 0 || c.failed.Load() != nil {
		return
	}
	if c.unacked += n; c.unacked >= Window/4 {
		c.open32(windowUpdate, 0, uint32(c.unacked))
		c.recv += c.unacked
		c.unacked = 0
	}
	if s == nil || s.recvEnded || s.over {
		return
	}
	if s.unacked += n; s.unacked < s.window/4 {
		return
	}
	if s.window < StreamWindow && c.wide < MaxWide {
		c.wide++
		s.unacked += StreamWindow - s.window
		s.window = StreamWindow
	}
	c.open32(windowUpdate, s.id, uint32(s.unacked))
	s.recv += s.unacked
	s.unacked = 0
}

// open32 sends a frame of one number, with c.mu held.
func (c *Conn) open32(k kind, stream, n uint32) {
	*c.out = append32(appendHead(c.buffer(frameHead+4), k, 0, stream, 4), n)
}

// tell tells the receiver that the stream has ended before its time.
func (s *Stream) tell(err *Error) {
	s.c.mu.Lock()
	receiver := s.receiver
	if s.opening {
		s.untold = err
		s.c.mu.Unlock()
		return
	}
	s.c.mu.Unlock()
	s.leave()
	receiver.Ended(err)
}

// leave drops what is held, now or once nobody is at it.
func (s *Stream) leave() {
	s.gone.Store(true)
	if s.order.TryLock() {
		s.unlock()
	}
}

// unlock gives s.order back, and drops what nobody wants any more.
func (s *Stream) unlock() {
	for {
		gone := s.gone.Load()
		if gone {
			s.drop()
		}
		s.order.Unlock()
		if gone || !s.gone.Load() || !s.order.TryLock() { // else it is gone since
			return
		}
	}
}
