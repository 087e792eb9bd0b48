package proxy

import (
	"io"
	"unsafe"
)

// intake is the bytes of an inlet that were read and are not used yet. Messages
// are read where they lie: a head is views of the buffer that is pinned until
// its message is done with.
type intake struct {
	src  inlet
	flow flow   // counts what is read
	b    []byte // not used yet
	err  error  // that came with the last bytes

	buf   *[]byte // of the pool, that b is a view of; nil where b has memory of its own
	class int
	head  *[]byte // of the pool, that is pinned
	large int     // class of head
}

// fill waits for more bytes and puts them behind b, which may move. The errors
// are those of inlet.next.
func (in *intake) fill() error {
	if len(in.b) == 0 {
		in.drop()
	}
	for {
		if err := in.err; err != nil {
			in.err = nil
			return err
		}
		data, err := in.src.next()
		if len(data) == 0 {
			if err != nil {
				return err
			}
			continue
		}
		in.err = err
		in.flow.add(len(data))
		if len(in.b) == 0 {
			in.b = data
			in.buf, in.class = in.src.keep()
		} else {
			in.join(data)
			in.src.release()
		}
		return nil
	}
}

// join puts data behind b.
func (in *intake) join(data []byte) {
	need := len(in.b) + len(data)
	if need <= cap(in.b) && in.buf != nil {
		in.b = append(in.b, data...)
		return
	}
	was := in.b
	if class := classOf(need); need <= bufferSizes[class] {
		to := takeBuffer(class)
		joined := append(append((*to)[:0], was...), data...)
		in.drop()
		in.b, in.buf, in.class = joined, to, class
		return
	}
	joined := append(append(make([]byte, 0, need), was...), data...)
	in.drop()
	in.b = joined
}

// take returns the first n bytes of b, which are used by that.
func (in *intake) take(n int) []byte {
	taken := in.b[:n]
	in.b = in.b[n:]
	return taken
}

// pin keeps the buffer of b, and with it what was taken of it, until unpin.
func (in *intake) pin() { in.head, in.large = in.buf, in.class }

func (in *intake) unpin() {
	if in.head != nil && in.head != in.buf {
		bufferPools[in.large].Put(in.head)
	}
	in.head = nil
	if len(in.b) == 0 {
		in.drop()
	}
}

// drop gives the buffer of b back.
func (in *intake) drop() {
	if in.buf != nil && in.buf != in.head {
		bufferPools[in.class].Put(in.buf)
	}
	in.b, in.buf = nil, nil
}

// outlet writes messages to an end: what is small leaves with what is before it.
type outlet struct {
	dst  end
	flow flow
}

// headClass is the class of the buffer in which heads are made.
const headClass = 1

// write writes a head, made in buf, and what of the body is there with it.
func (o *outlet) write(head, body []byte) error {
	n := len(head) + len(body)
	var err error
	switch room := maxPlaintext - len(head); {
	case len(body) <= room && n <= cap(head):
		_, err = o.dst.Write(append(head, body...))
	case room > 0 && maxPlaintext <= cap(head): // the first record is to be full
		err = writeBoth(o.dst, append(head, body[:room]...), body[room:])
	default:
		err = writeBoth(o.dst, head, body)
	}
	o.flow.add(n)
	return err
}

func writeBoth(dst end, first, second []byte) error {
	if s, ok := dst.(*secured); ok {
		_, err := s.wire.together(func() (int, error) {
			if n, err := s.Conn.Write(first); err != nil {
				return n, err
			}
			return s.Conn.Write(second)
		})
		return err
	}
	if _, err := dst.Write(first); err != nil {
		return err
	}
	_, err := dst.Write(second)
	return err
}

// pass writes body alone.
func (o *outlet) pass(body []byte) error {
	_, err := o.dst.Write(body)
	o.flow.add(len(body))
	return err
}

// cutShort is the error of a message whose sender left in the midst of it, in
// good order or not.
func cutShort(err error) error {
	if err == io.EOF { //nolint:errorlint // as inlet.next returns it
		return io.ErrUnexpectedEOF
	}
	return err
}

// viewOf is a string of bytes that are not written any more while it is used.
func viewOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) } //nolint:gosec // see above
