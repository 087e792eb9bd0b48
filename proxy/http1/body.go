package http1

import (
	"bytes"
	"math"
)

// Body follows a body through the bytes that carry it, and finds its end. The
// zero value is a body that has ended.
//
// Extensions of chunks are refused: they have no meaning that anybody agreed
// on, and readers differ on where a line with one ends (RFC 9112, section
// 7.1.1).
type Body struct {
	// Trailers are there once the body has ended. Their names are in lower
	// case; they are views of the buffer, like the fields of a head.
	Trailers []Field

	identity *Names
	state    bodyState
	left     int64 // bytes of the body, or of the chunk
	scanned  int   // bytes of the trailer section in which line feeds were looked for
	err      error
}

type bodyState uint8

const (
	ended bodyState = iota
	counting
	open // until the connection closes
	chunkSize
	chunkData
	chunkEnd // the CR LF behind the data
	trailer  // the last chunk's line and all that follows
)

// Start begins a body of this framing and, where it is Counted, length. A
// trailer whose name is in identity, in any spelling, is refused.
func (b *Body) Start(framing Framing, length int64, identity *Names) {
	clear(b.Trailers)
	*b = Body{Trailers: b.Trailers[:0], identity: identity}
	switch framing {
	case NoBody:
	case Counted:
		b.state, b.left = counting, length
		b.settle()
	case Chunked:
		b.state = chunkSize
	case UntilClose:
		b.state, b.left = open, math.MaxInt64
	}
}

// Done reports whether the body has ended.
func (b *Body) Done() bool { return b.state == ended }

// Next takes what of buf belongs to the body. The caller passes buf[:n] on as
// it is, its chunks included, and gives the rest again with what follows it;
// a rest after the end is the next message. A chunk's line, and the last one
// with all trailers, are taken whole: a buffer of [MaxTrailer] bytes is enough
// to go on. Nothing of a trailer section that is refused is passed on, so the
// message never ends for whoever got the bytes before it.
//
// The error is an [*Error] of status 400, also of a response, whose sender is
// to be told 502 if anybody still can be.
func (b *Body) Next(buf []byte) (n int, done bool, err error) {
	for b.state != ended {
		size, _, err := b.step(buf[n:])
		if err != nil {
			return n, false, err
		}
		if size == 0 {
			return n, false, nil
		}
		n += size
	}
	return n, true, nil
}

// NextData is Next for who passes the content on without its chunks, such as
// to a client of HTTP/1.0. It takes n bytes, and returns one piece of content
// within them.
func (b *Body) NextData(buf []byte) (data []byte, n int, done bool, err error) {
	for b.state != ended {
		size, content, err := b.step(buf[n:])
		if err != nil {
			return nil, n, false, err
		}
		if size == 0 {
			return nil, n, false, nil
		}
		n += size
		if content {
			return buf[n-size : n], n, b.state == ended, nil
		}
	}
	return nil, n, true, nil
}

// Close tells that the connection ended. It returns nil where that ends the
// body, or nothing was missing, and an [*Error] otherwise.
func (b *Body) Close() error {
	if b.err != nil {
		return b.err
	}
	if b.state != ended && b.state != open {
		return bad("cut_short", "the connection ended within the body")
	}
	b.state = ended
	return nil
}

// step takes one unit: a chunk's line, what is there of the data, its end, or
// the trailers. It takes nothing where more must come first.
func (b *Body) step(buf []byte) (n int, content bool, err error) {
	if b.err != nil {
		return 0, false, b.err
	}
	switch b.state {
	case ended:
	case counting, chunkData, open:
		n, content = int(min(b.left, int64(len(buf)))), true
		if b.state != open {
			b.left -= int64(n)
			b.settle()
		}
	case chunkSize:
		n, err = b.takeSize(buf)
	case chunkEnd:
		n, err = b.takeEnd(buf)
	case trailer:
		n, err = b.takeTrailers(buf)
	}
	if err != nil {
		b.err = err
		return 0, false, err
	}
	if n == 0 && b.state == trailer && len(buf) > 0 && b.scanned == 0 {
		return b.step(buf) // the size was the last one: its line is taken with the trailers
	}
	return n, content, nil
}

// settle goes on where all data was taken.
func (b *Body) settle() {
	switch {
	case b.left > 0:
	case b.state == counting:
		b.state = ended
	case b.state == chunkData:
		b.state = chunkEnd
	}
}

// takeSize takes the line of a chunk. That of the last one stays for the
// trailers.
func (b *Body) takeSize(buf []byte) (int, error) {
	size, digits := int64(0), 0
	for digits < len(buf) && digits <= MaxChunk {
		d, ok := hexDigit(buf[digits])
		if !ok {
			break
		}
		size = size<<4 | int64(d)
		digits++
	}
	switch rest := buf[digits:]; {
	case digits > MaxChunk:
		return 0, bad("chunk_size", "a chunk's size has more than 15 digits; send smaller chunks")
	case len(rest) == 0:
		return 0, nil
	case digits == 0:
		return 0, bad("chunk_size", "want a chunk's size in hexadecimal digits")
	case rest[0] == ';' || rest[0] == ' ' || rest[0] == '\t':
		return 0, bad("chunk_extension", "chunk extensions are not served; leave them out")
	case rest[0] != '\r' || len(rest) > 1 && rest[1] != '\n':
		return 0, bad("chunk_size", "want CR LF behind a chunk's size")
	case len(rest) < 2:
		return 0, nil
	}
	if size == 0 {
		b.state, b.scanned = trailer, 0
		return 0, nil
	}
	b.state, b.left = chunkData, size
	return digits + 2, nil
}

func (b *Body) takeEnd(buf []byte) (int, error) {
	switch {
	case len(buf) > 0 && buf[0] != '\r', len(buf) > 1 && buf[1] != '\n':
		return 0, bad("chunk_end", "want CR LF behind a chunk's data: it is longer than its size says")
	case len(buf) < 2:
		return 0, nil
	}
	b.state = chunkSize
	return 2, nil
}

// takeTrailers takes the last chunk's line, the trailers, and the empty line
// that ends the body, all at once.
func (b *Body) takeTrailers(buf []byte) (int, error) {
	for {
		at := bytes.IndexByte(buf[b.scanned:], '\n')
		end := b.scanned + at + 1
		if at < 0 {
			end = len(buf)
		}
		switch {
		case end > MaxTrailer:
			return 0, tooLarge("the trailers are too long")
		case at < 0:
			return 0, nil
		}
		line := buf[b.scanned:end]
		first := b.scanned == 0
		b.scanned = end
		switch {
		case first: // the size, which takeSize has read
		case len(line) < 2 || line[len(line)-2] != '\r':
			return 0, bad("bare_lf", "a line ends in a bare line feed; end it with CR LF")
		case len(line) == 2:
			return end, b.readTrailers(buf[:end])
		}
	}
}

// readTrailers reads the section that takeTrailers has found.
func (b *Body) readTrailers(section []byte) error {
	_, rest, _ := bytes.Cut(section, []byte("\r\n"))
	for len(rest) > 2 {
		var line []byte
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		name, value, err := splitField(line, false)
		if err != nil {
			return err
		}
		if len(b.Trailers) == maxTrailers {
			return tooLarge("there are too many trailers")
		}
		if err := checkTrailerName(name); err != nil {
			return err
		}
		if b.identity.Has(name) {
			return bad("trailer_identity", "a trailer that says who the peer is; leave it out")
		}
		b.Trailers = append(b.Trailers, Field{Name: name, Value: value})
	}
	b.state = ended
	return nil
}

func hexDigit(b byte) (byte, bool) {
	switch {
	case '0' <= b && b <= '9':
		return b - '0', true
	case 'a' <= b|0x20 && b|0x20 <= 'f':
		return b | 0x20 - 'a' + 10, true
	}
	return 0, false
}
