package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// h2Question is a request of HTTP/2 that is made again and again, and what is
// expected of its answer.
type h2Question struct {
	method, path string
	fields       [][2]string // besides those that every request has
	body         []byte
	down         int  // octets that the answer's content has
	calls        bool // of gRPC: the answer ends in trailers
	stands       bool // the answer begins, and never ends
}

// h2Request is the same request as the one of HTTP/1.1 with these sizes.
func h2Request(up, down int) *h2Question {
	q := &h2Question{method: "GET", path: "/v19/items/" + itoa(down), down: down}
	if up > 0 {
		q.method, q.path, q.body = "PUT", "/v20/items/0", make([]byte, up)
		q.fields = append(q.fields, [2]string{"content-length", itoa(up)})
	}
	q.fields = append(q.fields, [][2]string{
		{"user-agent", "narthex-bench/1.0"},
		{"accept", "application/json"},
		{"accept-encoding", "gzip"},
		{"accept-language", "en"},
		{"cookie", "session=0123456789abcdef; theme=dark"},
	}...)
	return q
}

// h2Standing is a request of which the answer has begun with 1 KiB and stands
// still.
func h2Standing() *h2Question {
	q := h2Request(0, kib)
	q.path, q.stands = "/v19/items/"+standing, true
	return q
}

// Two fields that differ from request to request, and that clients therefore
// do not put into the table (RFC 7541 §6.2.2): the path, whose name is entry 4
// of the static table, and the request's id.
const (
	h2LiteralPath = 0x04
	h2LiteralName = 0x00
)

const h2RequestID = "7f3c1a52-0d6e-4c1b-9a55-3c2f0c3a9d11"

// h2Client is the client's end of a connection.
type h2Client struct {
	*h2Endpoint
	last   uint32 // stream
	open   map[uint32]*h2Answer
	spare  []*h2Answer
	status string // of the section that was read last
	grpc   string // status, of the same
}

// h2Answer is one that is waited for.
type h2Answer struct {
	since  time.Time
	got    int // octets of content
	status string
}

// openH2 begins HTTP/2 on c and asks q once.
func openH2(c net.Conn, q *h2Question) (*h2Client, error) {
	h := &h2Client{last: 1<<32 - 1, open: map[uint32]*h2Answer{}}
	h.h2Endpoint = newH2Endpoint(bufio.NewReaderSize(c, 2*h2Frame), c, func(f hpack.HeaderField) {
		switch f.Name {
		case ":status":
			h.status = f.Value
		case "grpc-status":
			h.grpc = f.Value
		}
	})
	if _, err := h.out.WriteString(http2.ClientPreface); err != nil {
		return nil, err
	}
	if err := h.greet(http2.Setting{ID: http2.SettingEnablePush}); err != nil {
		return nil, err
	}
	for !h.settled {
		f, err := h.next(func() error { return nil })
		if err == nil {
			err = h.control(f)
		}
		if err != nil {
			return nil, fmt.Errorf("begin HTTP/2: %w", err)
		}
	}
	_, err := h.ask(q, 1, 1)
	return h, err
}

// ask makes n requests, no more than so many at a time, and returns how many
// µs each of them took until the whole answer was there.
func (h *h2Client) ask(q *h2Question, n, atATime int) (took []float64, err error) {
	if uint32(atATime) > h.streams {
		return nil, fmt.Errorf("the proxy takes %d streams at a time, %d are wanted", h.streams, atATime)
	}
	if int64(len(q.body)) > h.initial {
		return nil, fmt.Errorf("%d bytes do not fit into a stream's window of %d", len(q.body), h.initial)
	}
	took = make([]float64, 0, n)
	asked := 0
	more := func() error {
		for asked < n && asked-len(took) < atATime && h.window >= int64(len(q.body)) {
			asked++
			if err := h.send(q); err != nil {
				return err
			}
		}
		return nil
	}
	if err := more(); err != nil {
		return nil, err
	}
	for len(took) < n {
		f, err := h.next(more)
		if err != nil {
			return nil, err
		}
		if err := h.control(f); err != nil {
			return nil, err
		}
		done, err := h.take(f, q)
		if err != nil {
			return nil, err
		}
		if done != nil {
			took = append(took, microseconds(time.Since(done.since)))
		}
	}
	return took, nil
}

// send writes one request.
func (h *h2Client) send(q *h2Question) error {
	h.last += 2 // 1 is the first
	h.field(":method", q.method)
	h.field(":scheme", "https")
	h.field(":authority", "orders.example.org")
	h.literal(h2LiteralPath, "", q.path)
	for _, f := range q.fields {
		h.field(f[0], f[1])
	}
	h.literal(h2LiteralName, "x-request-id", h2RequestID)
	a := &h2Answer{}
	if k := len(h.spare); k > 0 {
		a, h.spare = h.spare[k-1], h.spare[:k-1]
	}
	*a = h2Answer{since: time.Now()}
	h.open[h.last] = a
	if err := h.headers(h.last, len(q.body) == 0); err != nil || len(q.body) == 0 {
		return err
	}
	body := q.body
	h.window -= int64(len(body))
	for len(body) > h2Frame {
		if err := h.framer.WriteData(h.last, false, body[:h2Frame]); err != nil {
			return err
		}
		body = body[h2Frame:]
	}
	return h.framer.WriteData(h.last, true, body)
}

// literal adds a field that stays out of the table.
func (h *h2Client) literal(kind byte, name, value string) {
	h.block.WriteByte(kind)
	for _, s := range []string{name, value} {
		if s == "" {
			continue
		}
		// Huffman (RFC 7541 §5.2); none of ours has 127 octets.
		h.block.WriteByte(0x80 | byte(hpack.HuffmanEncodeLength(s)))
		h.block.Write(hpack.AppendHuffmanString(h.block.AvailableBuffer(), s))
	}
}

// take reads what frames about streams bring. It returns an answer that is as
// it has to be.
func (h *h2Client) take(frame http2.Frame, q *h2Question) (*h2Answer, error) {
	id := frame.Header().StreamID
	a, ended := h.open[id], false
	switch f := frame.(type) {
	case *http2.HeadersFrame:
		h.status, h.grpc = "", ""
		if err := h.fields(f); err != nil {
			return nil, err
		}
		if a == nil {
			return nil, fmt.Errorf("an answer on stream %d, which is not open", id)
		}
		if a.status == "" {
			a.status = h.status
		}
		ended = f.StreamEnded()
	case *http2.DataFrame:
		if a == nil {
			return nil, fmt.Errorf("content on stream %d, which is not open", id)
		}
		a.got += len(f.Data())
		ended = f.StreamEnded() || q.stands && a.got == q.down
	case *http2.RSTStreamFrame:
		if a != nil {
			return nil, fmt.Errorf("stream %d was reset: %s", id, f.ErrCode)
		}
	case *http2.GoAwayFrame:
		return nil, fmt.Errorf("the connection ends: %s %q", f.ErrCode, f.DebugData())
	}
	if !ended {
		return nil, nil
	}
	delete(h.open, id)
	h.spare = append(h.spare, a)
	if a.status != "200" || a.got != q.down || q.calls && h.grpc != "0" {
		return nil, fmt.Errorf("the answer has status %q, %d bytes instead of %d, grpc-status %q", a.status, a.got, q.down, h.grpc)
	}
	return a, nil
}

// greetH2 asks q once.
func greetH2(q *h2Question) func(net.Conn) error {
	return func(c net.Conn) error {
		_, err := openH2(c, q)
		return err
	}
}

// holdH2 makes n connections, asks q once on each and keeps them until end is
// called.
func (c client) holdH2(ctx context.Context, n int, q *h2Question) (list []*h2Client, end func(), err error) {
	made := make(chan *h2Client, n)
	c.greet = func(conn net.Conn) error {
		h, err := openH2(conn, q)
		if err == nil {
			made <- h
		}
		return err
	}
	if _, end, err = c.hold(ctx, n); err != nil {
		return nil, nil, err
	}
	close(made)
	for h := range made {
		list = append(list, h)
	}
	return list, end, nil
}
