package endpoint

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

// A client says by HTTP/2's flow control (RFC 9113 §5.2) how much it takes. gRPC
// holds what is over that for as long as the connection lasts, also where the
// handler has returned long since: so a call counts until its answers are on
// their way, and a client that does not take them is hung up on.

// answer is an encoded message with a receipt, which gRPC gives to the codec.
type answer struct{ parts mem.BufferSlice }

// receipt is an empty end of an answer. gRPC frees it when it has written what is
// before it, or thrown it away.
type receipt struct {
	mem.SliceBuffer // of nothing
	refs            atomic.Int32
	size            int
	stream          *countedStream
}

// Ref implements mem.Buffer.
func (r *receipt) Ref() { r.refs.Add(1) }

// Free implements mem.Buffer.
func (r *receipt) Free() {
	if r.refs.Add(-1) == 0 {
		r.stream.taken(r.size)
	}
}

// unread is what gRPC holds of a call's answers.
type unread struct {
	mu       sync.Mutex // guards the following
	answers  int
	bytes    int
	ended    bool // the handler has returned
	released bool // the call counts no more
	late     *time.Timer
}

// pooled is up to how many bytes gRPC encodes into a buffer of about that size; for
// more it takes one of a MiB.
const pooled = 32 << 10

// SendMsg is called by one goroutine at a time, as gRPC has it. What is in a frame
// belongs to all who are sent the same, and is not counted in bytes.
func (s *countedStream) SendMsg(m any) error {
	parts, err := newCodec().Marshal(m)
	if err != nil {
		return status.Errorf(codes.Internal, "encode the answer: %v", err)
	}
	size := 0
	if _, isFrame := m.(*frame); !isFrame {
		size = parts.Len()
	}
	if size > pooled {
		exact := mem.SliceBuffer(parts.Materialize())
		parts.Free()
		parts = mem.BufferSlice{exact}
	}
	if err := s.hold(size); err != nil {
		parts.Free()
		return err
	}
	end := &receipt{size: size, stream: s}
	end.refs.Store(1)
	return s.ServerStream.SendMsg(&answer{append(slices.Clip(parts), end)})
}

// hold counts an answer that gRPC is to hold.
func (s *countedStream) hold(size int) error {
	if size > 0 {
		if err := s.conn.limits.holdAnswer(s.conn.user, size); err != nil {
			return err
		}
	}
	s.unread.mu.Lock()
	defer s.unread.mu.Unlock()
	s.unread.answers++
	s.unread.bytes += size
	return nil
}

// taken notes that gRPC holds an answer no more.
func (s *countedStream) taken(size int) {
	u := &s.unread
	u.mu.Lock()
	if u.released { // with all that it held
		u.mu.Unlock()
		return
	}
	u.answers--
	u.bytes -= size
	last := u.ended && u.answers == 0
	u.mu.Unlock()
	if size > 0 {
		s.conn.limits.freeAnswer(s.conn.user, size)
	}
	if last {
		s.conn.dismiss(s)
		s.release()
	}
}

// end is the end of the handler. The call counts on while its answers are there.
func (s *countedStream) end() {
	u := &s.unread
	u.mu.Lock()
	u.ended = true
	lingers := u.answers > 0
	if lingers {
		u.late = time.AfterFunc(s.conn.limits.Unread, func() { _ = s.conn.Close() })
	}
	u.mu.Unlock()
	if !lingers || !s.conn.await(s) {
		s.release()
	}
}

// release ends the counting of the call, once.
func (s *countedStream) release() {
	u := &s.unread
	u.mu.Lock()
	released, held := u.released, u.bytes
	u.released = true
	if u.late != nil {
		u.late.Stop()
	}
	u.mu.Unlock()
	if released {
		return
	}
	if held > 0 {
		s.conn.limits.freeAnswer(s.conn.user, held)
	}
	s.conn.limits.endStream(s.conn.user)
}

// await has the connection's end release the call. It returns false where that
// has come.
func (c *conn) await(s *countedStream) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	s.unread.mu.Lock()
	defer s.unread.mu.Unlock()
	if s.unread.answers == 0 { // who took the last releases it
		return true
	}
	if c.ended == nil {
		c.ended = map[*countedStream]struct{}{}
	}
	c.ended[s] = struct{}{}
	return true
}

func (c *conn) dismiss(s *countedStream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.ended, s)
}
