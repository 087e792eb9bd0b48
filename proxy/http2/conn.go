package http2

import (
	"cmp"
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/narthex-id/narthex/proxy/http1"
)

// Settings are what an end wants. The zero value is good.
type Settings struct {
	MaxStreams int // that a client may have open at a time; MaxStreams
}

// Events are what a connection tells its owner from within Receive.
type Events interface {
	// Opened tells of a request: see Stream.Attend. The parts are good until it
	// returns; large says that they are not whole: the request has more fields
	// than it may have, and only its pseudo-fields can be relied on.
	Opened(s *Stream, p *http1.Parts, large bool)
	// Settled tells that the peer's settings came, for the first time or anew.
	Settled()
	// Leaving tells that the peer takes, or opens, no more streams.
	Leaving()
}

// Receiver is told what comes on a stream, in order and by one goroutine at a
// time, and may call the stream from within.
type Receiver interface {
	// Head tells of a response, of interim ones too. The parts are good until it
	// returns; large is as that of Events.Opened.
	Head(p *http1.Parts, large bool)
	// Data offers content, and with ended its end. It returns how much of it was
	// taken; what was not is held for Stream.Held and Stream.Next, and nothing
	// more is offered before. A take of all takes the end too, but for an end
	// without content: it is offered again by Held, and told by Next.
	Data(b []byte, ended bool) int
	// Trailers tells of the fields behind the content, which end it. The list is
	// good until it returns.
	Trailers(fields []http1.Field)
	// Room tells that Stream.Write, which took less than it was given, may take
	// more. Other than the rest it may come at any time from any goroutine.
	Room()
	// Ended tells that the stream was reset, or its connection ended, before its
	// time. It comes once at most, and not for what its owner reset. Like Room
	// it may come while another goroutine tells of something else.
	Ended(err *Error)
}

// Conn is one end of a connection.
type Conn struct {
	client bool
	ours   Settings
	events Events

	// The following belong to who calls Receive.
	begun   bool // the preface came
	settled bool // and SETTINGS
	acked   bool // ours were acknowledged
	decoder *decoder
	block   []byte // of the head that is coming in several frames
	opening frame  // that it began with; its stream is 0 while none is coming
	pieces  int

	mu       sync.Mutex // guards the following
	out      *[]byte    // what is to be sent; nil where nothing is
	control  int        // bytes of out that are no heads and no data
	streams  map[uint32]*Stream
	waiting  queue // streams that have more to send than there was room for
	last     uint32
	next     uint32 // of the streams that we open
	ended    memory // streams that ended
	resets   memory // those of them that we reset: what was on its way is passed over
	held     int    // places taken
	most     int    // places there are
	send     int64  // what we may send
	recv     int64  // what the peer may send
	whole    int64  // what it may send where all was taken
	wide     int    // streams of ours whose window is StreamWindow
	unacked  int64  // of what it has sent, what was taken and not told it yet
	window   int64  // of new streams, to send in
	table    int64  // the largest HPACK table that the peer takes, in bytes
	shrinks  bool   // our next head says that ours is empty
	connects bool   // the peer takes extended CONNECT
	patience patience
	leaving  bool   // no stream may be opened any more, by either
	final    uint32 // the last stream of the peer that is looked at, once leaving
	pumps    bool   // a stream may have room again

	failed atomic.Pointer[Error] // the connection is over; stored with mu held
}

// NewServer returns the end of a server.
func NewServer(s Settings, events Events) *Conn {
	if s.MaxStreams == 0 {
		s.MaxStreams = MaxStreams
	}
	return newConn(false, s, events)
}

// NewClient returns the end of a client, whose preface is there to be sent.
func NewClient(s Settings, events Events) *Conn {
	c := newConn(true, s, events)
	c.begun = true
	c.next = 1
	c.whole = clientsWindow
	c.recv = c.whole
	c.most = 100 // until the peer says otherwise (RFC 9113, section 6.5.2)
	c.greet(Preface)
	return c
}

func newConn(client bool, s Settings, events Events) *Conn {
	return &Conn{
		client: client, ours: s, events: events, decoder: newDecoder(), streams: map[uint32]*Stream{},
		most: s.MaxStreams, send: defaultWindow, recv: Window, whole: Window, window: defaultWindow, table: tableSize,
		patience: newPatience(s.MaxStreams), final: maxStreamID, ended: memory{most: maxEnded}, resets: memory{most: maxResets},
	}
}

// greet sends our settings and opens our window.
func (c *Conn) greet(preface string) {
	b := append(c.buffer(len(preface)+128), preface...)
	from := len(b)
	b = appendHead(b, settings, 0, 0, 0)
	b = appendSetting(b, setInitialWindow, uint32(c.streamWindow()))
	b = appendSetting(b, setMaxHead, MaxHead)
	if c.client {
		b = appendSetting(b, setPush, 0)
	} else {
		b = appendSetting(b, setMaxStreams, uint32(c.ours.MaxStreams))
		b = appendSetting(b, setConnect, 1)
	}
	appendHead(b[:from], settings, 0, 0, len(b)-from-frameHead)
	b = append32(appendHead(b, windowUpdate, 0, 0, 4), uint32(c.whole-defaultWindow))
	*c.out = b
}

// clientsWindow is the window of a connection on which we open streams: as much
// as those may hold altogether. Each is of another client, and those that read
// nothing are not to keep the others from what is theirs.
const clientsWindow = maxOpen*FirstWindow + MaxWide*(StreamWindow-FirstWindow)

// streamWindow returns how much of a new stream the peer may send.
func (c *Conn) streamWindow() int64 {
	if c.client {
		return FirstWindow
	}
	return StreamWindow
}

// Receive takes whole frames from the start of b, and returns how many bytes
// that were. What is left is to be given again with what follows it; it is
// never more than a frame of MaxFrame. An error is the connection's end:
// GOAWAY is there to be sent, and nothing more is to be received.
func (c *Conn) Receive(b []byte) (used int, err error) {
	for c.failed.Load() == nil {
		n, err := c.receiveOne(b[used:])
		if err == nil && n == 0 {
			break
		}
		used += n
		if err != nil {
			c.Fail(err)
			break
		}
	}
	if c.takePumps() {
		c.Pump()
	}
	if failed := c.Failed(); failed != nil {
		return used, failed
	}
	return used, nil
}

func (c *Conn) takePumps() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	pumps := c.pumps
	c.pumps = false
	return pumps
}

// receiveOne takes one frame, or the preface.
func (c *Conn) receiveOne(b []byte) (int, *Error) {
	if !c.begun {
		return c.receivePreface(b)
	}
	if len(b) < frameHead {
		return 0, nil
	}
	length := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
	switch {
	case !c.settled && strings.HasPrefix(string(b[:frameHead]), "HTTP/1."):
		return 0, broken(ProtocolError, "the peer answers in HTTP/1.1; set the protocol that it speaks")
	case length > MaxFrame:
		return 0, broken(FrameSizeError, "a frame that is larger than it may be")
	}
	if len(b) < frameHead+length {
		return 0, nil
	}
	f := frame{kind: kind(b[3]), flags: b[4], stream: binary.BigEndian.Uint32(b[5:]) & maxStreamID, payload: b[frameHead : frameHead+length]}
	err := c.take(&f)
	if err != nil && err.Stream != 0 {
		err = c.resetFor(err)
	}
	return frameHead + length, err
}

func (c *Conn) receivePreface(b []byte) (int, *Error) {
	n := min(len(b), len(Preface))
	if string(b[:n]) != Preface[:n] {
		return 0, broken(ProtocolError, "the connection does not begin as one of HTTP/2")
	}
	if n < len(Preface) {
		return 0, nil
	}
	c.begun = true
	c.mu.Lock()
	defer c.mu.Unlock()
	c.greet("")
	return n, nil
}

// take takes up a frame.
func (c *Conn) take(f *frame) *Error {
	switch {
	case !c.settled && (f.kind != settings || f.has(ack)):
		return broken(ProtocolError, "the first frame is not SETTINGS")
	case c.opening.stream != 0 && (f.kind != continuation || f.stream != c.opening.stream):
		return broken(ProtocolError, "a head that is interrupted by another frame")
	}
	switch f.kind {
	case data:
		return c.takeData(f)
	case headers:
		return c.takeHeaders(f)
	case continuation:
		return c.takeContinuation(f)
	case priority:
		return c.takePriority(f)
	case rstStream:
		return c.takeReset(f)
	case settings:
		return c.takeSettings(f)
	case ping:
		return c.takePing(f)
	case goAway:
		return c.takeGoAway(f)
	case windowUpdate:
		return c.takeWindowUpdate(f)
	case pushPromise:
		return broken(ProtocolError, "PUSH_PROMISE, which nobody asked for")
	}
	return c.spend() // of a kind that we do not know (RFC 9113, section 4.1)
}

// spend takes from the peer's patience for a frame that carries nothing.
func (c *Conn) spend() *Error { return c.spendOn(CostFrame) }

func (c *Conn) spendOn(n int) *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.spendLocked(n)
}

func (c *Conn) spendLocked(n int) *Error {
	if !c.patience.spend(n) {
		return broken(EnhanceYourCalm, "too many frames that carry nothing, heads that are too large, or streams that are reset")
	}
	return nil
}

// resetFor resets a stream for what was received on it. One that was never
// opened cannot be reset (RFC 9113, section 6.4): then it is the connection
// that is broken.
func (c *Conn) resetFor(err *Error) *Error {
	c.mu.Lock()
	if c.idle(err.Stream) {
		c.mu.Unlock()
		return broken(err.Code, err.why)
	}
	s := c.streams[err.Stream]
	if calm := c.spendLocked(c.costOfReset(s)); calm != nil {
		c.mu.Unlock()
		return calm
	}
	c.sendReset(err.Stream, err.Code)
	if s != nil {
		c.bury(s, err, true)
	} else {
		c.resets.note(err.Stream)
	}
	c.mu.Unlock()
	if s != nil {
		s.tell(err)
	}
	return nil
}

func (c *Conn) takePriority(f *frame) *Error {
	switch {
	case f.stream == 0:
		return broken(ProtocolError, "PRIORITY of no stream")
	case len(f.payload) != 5:
		return brokenStream(f.stream, FrameSizeError, "PRIORITY of a wrong length")
	case dependsOn(f.payload) == f.stream:
		return brokenStream(f.stream, ProtocolError, "a stream that depends on itself")
	}
	return c.spend()
}

func dependsOn(b []byte) uint32 { return binary.BigEndian.Uint32(b) & maxStreamID }

func (c *Conn) takeReset(f *frame) *Error {
	switch {
	case f.stream == 0:
		return broken(ProtocolError, "RST_STREAM of no stream")
	case len(f.payload) != 4:
		return broken(FrameSizeError, "RST_STREAM of a wrong length")
	}
	c.mu.Lock()
	if c.idle(f.stream) {
		c.mu.Unlock()
		return broken(ProtocolError, "RST_STREAM of a stream that was never opened")
	}
	s := c.streams[f.stream]
	cost := CostFrame
	if s != nil {
		cost = c.costOfReset(s)
	}
	if calm := c.spendLocked(cost); calm != nil || s == nil {
		c.mu.Unlock()
		return calm
	}
	code := Code(binary.BigEndian.Uint32(f.payload))
	err := &Error{Code: code, Stream: f.stream, Remote: true, Unseen: c.client && code == RefusedStream}
	over := code == NoError && s.recvEnded // a server that wants no more of a request that it has answered (RFC 9113, section 8.1)
	c.bury(s, err, false)
	c.mu.Unlock()
	if !over || !s.c.client {
		s.tell(err)
		return nil
	}
	s.receiver.Room() // which learns by writing that there is nothing to be written
	return nil
}

func (c *Conn) takePing(f *frame) *Error {
	switch {
	case f.stream != 0:
		return broken(ProtocolError, "PING on a stream")
	case len(f.payload) != 8:
		return broken(FrameSizeError, "PING of a wrong length")
	case f.has(ack):
		return c.spend()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.spendLocked(CostFrame); err != nil {
		return err
	}
	return c.put(append(appendHead(c.buffer(frameHead+8), ping, ack, 0, 8), f.payload...))
}

func (c *Conn) takeGoAway(f *frame) *Error {
	switch {
	case f.stream != 0:
		return broken(ProtocolError, "GOAWAY on a stream")
	case len(f.payload) < 8:
		return broken(FrameSizeError, "GOAWAY of a wrong length")
	}
	last, code := binary.BigEndian.Uint32(f.payload)&maxStreamID, Code(binary.BigEndian.Uint32(f.payload[4:]))
	c.mu.Lock()
	if err := c.spendLocked(CostFrame); err != nil {
		c.mu.Unlock()
		return err
	}
	c.leaving = c.leaving || c.client
	var unseen []*Stream
	for _, s := range c.inOrder() {
		if c.client && s.id > last {
			unseen = append(unseen, s)
			c.bury(s, &Error{Code: RefusedStream, Stream: s.id, Remote: true, Unseen: true}, false)
		}
	}
	c.mu.Unlock()
	for _, s := range unseen {
		s.tell(s.err)
	}
	if code != NoError && !c.client {
		return &Error{Code: code, Remote: true}
	}
	c.events.Leaving()
	return nil
}

func (c *Conn) takeWindowUpdate(f *frame) *Error {
	if len(f.payload) != 4 {
		return broken(FrameSizeError, "WINDOW_UPDATE of a wrong length")
	}
	n := int64(binary.BigEndian.Uint32(f.payload) & maxStreamID)
	c.mu.Lock()
	defer c.mu.Unlock()
	if n < SmallUpdate {
		if err := c.spendLocked(CostFrame); err != nil {
			return err
		}
	}
	if f.stream == 0 {
		switch c.send += n; {
		case n == 0:
			return broken(ProtocolError, "a WINDOW_UPDATE of nothing")
		case c.send > maxWindow:
			return broken(FlowControlError, "a window that is too large")
		}
		c.pumps = true
		return nil
	}
	s := c.streams[f.stream]
	switch {
	case s == nil && c.idle(f.stream):
		return broken(ProtocolError, "WINDOW_UPDATE of a stream that was never opened")
	case n == 0:
		return brokenStream(f.stream, ProtocolError, "a WINDOW_UPDATE of nothing")
	case s == nil:
		return c.spendLocked(CostFrame)
	case s.send+n > maxWindow:
		return brokenStream(f.stream, FlowControlError, "a window that is too large")
	}
	s.send += n
	c.pumps = true
	return nil
}

func (c *Conn) takeSettings(f *frame) *Error {
	switch {
	case f.stream != 0:
		return broken(ProtocolError, "SETTINGS on a stream")
	case f.has(ack) && len(f.payload) > 0, len(f.payload)%6 != 0:
		return broken(FrameSizeError, "SETTINGS of a wrong length")
	case f.has(ack) && c.acked:
		return broken(ProtocolError, "an acknowledgement of SETTINGS that were not sent")
	case f.has(ack):
		c.acked = true
		return nil
	}
	if err := c.setAll(f.payload); err != nil {
		return err
	}
	c.settled = true
	c.events.Settled()
	return nil
}

func (c *Conn) setAll(b []byte) *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.settled {
		if err := c.spendLocked(CostSettings + len(b)/6); err != nil {
			return err
		}
	}
	if !c.settled && c.client {
		c.most = maxOpen
	}
	for ; len(b) > 0; b = b[6:] {
		if err := c.set(binary.BigEndian.Uint16(b), binary.BigEndian.Uint32(b[2:])); err != nil {
			return err
		}
	}
	return c.put(appendHead(c.buffer(frameHead), settings, ack, 0, 0))
}

// set takes up one setting of the peer, with c.mu held.
func (c *Conn) set(id uint16, n uint32) *Error {
	switch id {
	case setTableSize:
		c.shrinks = c.shrinks || int64(n) < c.table
		c.table = int64(n)
	case setPush:
		if n > 1 || c.client && n != 0 {
			return broken(ProtocolError, "SETTINGS_ENABLE_PUSH: want 0 or 1, of a server 0")
		}
	case setMaxStreams:
		if c.client {
			c.most = int(min(n, maxOpen))
		}
	case setInitialWindow:
		if n > maxWindow {
			return broken(FlowControlError, "SETTINGS_INITIAL_WINDOW_SIZE is too large")
		}
		return c.setWindow(int64(n))
	case setMaxFrame:
		if n < 16<<10 || n > 1<<24-1 {
			return broken(ProtocolError, "SETTINGS_MAX_FRAME_SIZE: want 16384 to 16777215")
		}
	case setConnect:
		if n > 1 || n == 0 && c.connects {
			return broken(ProtocolError, "SETTINGS_ENABLE_CONNECT_PROTOCOL: want 1, for good")
		}
		c.connects = n == 1
	}
	return nil
}

// maxOpen bounds how many streams a client of ours has open, whatever its
// server would take.
const maxOpen = 1000

// setWindow changes what may be sent on each stream (RFC 9113, section 6.9.2).
func (c *Conn) setWindow(n int64) *Error {
	change := n - c.window
	c.window = n
	for _, s := range c.streams {
		if s.send += change; s.send > maxWindow {
			return broken(FlowControlError, "a window that is too large")
		}
	}
	c.pumps = true
	return nil
}

// idle reports whether a stream was never opened, with c.mu held.
func (c *Conn) idle(id uint32) bool {
	if id%2 == 0 {
		return true
	}
	if c.client {
		return id >= c.next
	}
	return id > c.last
}

// memory is the streams that something happened to last.
type memory struct {
	ids  []uint32
	at   int // the oldest, once they are as many as are kept
	most int
}

// How many are kept. Of those that we reset, as many may be told of as a peer
// can have open; there is no more than an error code in the others.
const (
	maxEnded  = 16
	maxResets = 1 << 10
)

func (m *memory) note(id uint32) {
	if len(m.ids) < m.most {
		m.ids = append(m.ids, id)
		return
	}
	m.ids[m.at] = id
	m.at = (m.at + 1) % m.most
}

func (m *memory) has(id uint32) bool { return slices.Contains(m.ids, id) }

// bury takes a stream out, with c.mu held.
func (c *Conn) bury(s *Stream, err *Error, byUs bool) {
	if s.over {
		return
	}
	s.over, s.err = true, err
	delete(c.streams, s.id)
	if c.client && s.window == StreamWindow {
		c.wide--
	}
	c.waiting.remove(s)
	if byUs {
		c.resets.note(s.id)
	} else {
		c.ended.note(s.id)
	}
}

// sendReset sends RST_STREAM, with c.mu held.
func (c *Conn) sendReset(id uint32, code Code) {
	_ = c.put(append32(appendHead(c.buffer(frameHead+4), rstStream, 0, id, 4), uint32(code))) // where there is too much already, the peer's next frame finds it out
}

// Fail ends the connection: GOAWAY is sent, and every stream told.
func (c *Conn) Fail(err *Error) {
	c.mu.Lock()
	if !c.failed.CompareAndSwap(nil, err) {
		c.mu.Unlock()
		return
	}
	c.leaving = true
	if !err.Remote {
		b := append32(appendHead(c.buffer(frameHead+8), goAway, 0, 0, 8), min(c.last, c.final))
		*c.out = append32(b, uint32(err.Code))
	}
	all := c.inOrder()
	for _, s := range all {
		c.bury(s, err, true)
	}
	c.mu.Unlock()
	for _, s := range all {
		s.tell(err)
	}
}

// inOrder returns the streams as they were opened, with c.mu held.
func (c *Conn) inOrder() []*Stream {
	return slices.SortedFunc(maps.Values(c.streams), func(a, b *Stream) int { return cmp.Compare(a.id, b.id) })
}

// Failed returns why the connection is over, or nil.
func (c *Conn) Failed() *Error { return c.failed.Load() }

// Cut ends the connection because there is nobody to send to any more: the
// network's error, told to every stream as one that the peer may have seen.
func (c *Conn) Cut(why string) {
	c.Fail(&Error{Code: InternalError, Remote: false, why: why})
}

// Leave tells the peer that no more streams are taken: those that it has opened
// before it could know are, and with final only those that came until now.
func (c *Conn) Leave(final bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed.Load() != nil || final && c.final != maxStreamID || !final && c.leaving {
		return
	}
	last := uint32(maxStreamID)
	if final {
		last = c.last
	}
	c.leaving, c.final = true, last
	b := append32(appendHead(c.buffer(frameHead+8), goAway, 0, 0, 8), last)
	*c.out = append32(b, uint32(NoError))
}

// Open returns how many streams there are.
func (c *Conn) Open() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams)
}

// Held returns how many places are taken: of streams that are open, or whose
// owner is not done with them.
func (c *Conn) Held() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.held
}

// Connects reports whether the peer takes extended CONNECT (RFC 8441).
func (c *Conn) Connects() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.connects
}

// ErrLeaving is why a stream cannot be opened: nothing of it was sent.
var ErrLeaving = errors.New("HTTP/2: the connection takes no more streams")

// Midway reports whether more is to come before anything can be understood: the
// preface, the first settings, or the rest of a head. It belongs to who calls
// Receive.
func (c *Conn) Midway() bool { return !c.settled || c.opening.stream != 0 }
