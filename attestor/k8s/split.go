package k8s

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// splitter cuts a JSON text (RFC 8259) into its values without looking into
// them: their ends are found by their brackets and quotes alone. So what was
// cut out is not known to be JSON until somebody has parsed it; but it takes a
// tenth of the time that parsing takes, and most pods are what they were when
// the kubelet was asked before.
type splitter struct {
	in  bounded
	buf []byte // what was read and not yet returned, from at on
	at  int
}

// bounded is a reader that ends with an error where the whole, or one pod of
// it, gets too long.
type bounded struct {
	r     io.Reader
	most  int64 // bytes of the whole
	each  int64 // bytes of a pod, or of what stands beside the list of them
	until int64 // offset that the value being read may not pass
	read  int64
}

// Read implements io.Reader.
func (b *bounded) Read(p []byte) (int, error) {
	left := min(b.most, b.until) - b.read
	if left <= 0 {
		if b.until < b.most {
			return 0, fmt.Errorf("a pod of more than %d KiB", b.each>>10)
		}
		return 0, fmt.Errorf("more than %d KiB", b.most>>10)
	}
	n, err := b.r.Read(p[:min(int64(len(p)), left)])
	b.read += int64(n)
	return n, err
}

// firstRead is how much is read at once, until a value takes more.
const firstRead = 64 << 10

func newSplitter(r io.Reader, most, each int64) *splitter {
	return &splitter{in: bounded{r: r, most: most, each: each, until: each}, buf: make([]byte, 0, firstRead)}
}

// more reads on. What is left moves to the front, or to where there is room.
func (s *splitter) more() error {
	left := s.buf[s.at:]
	if len(left) > cap(s.buf)/2 {
		s.buf = append(make([]byte, 0, 2*cap(s.buf)), left...)
	} else {
		s.buf = append(s.buf[:0], left...)
	}
	s.at = 0
	n, err := s.in.Read(s.buf[len(s.buf):cap(s.buf)])
	s.buf = s.buf[:len(s.buf)+n]
	if n > 0 {
		return nil // the error comes again
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// next returns the byte that comes next, white space apart, which stays next.
// The bound on one value begins anew with it.
func (s *splitter) next() (byte, error) {
	for {
		for ; s.at < len(s.buf); s.at++ {
			if c := s.buf[s.at]; c != ' ' && c != '\n' && c != '\r' && c != '\t' {
				s.in.until = s.in.read - int64(len(s.buf)-s.at) + s.in.each
				return c, nil
			}
		}
		if err := s.more(); err != nil {
			return 0, broken(err)
		}
	}
}

// take takes the byte that has to come next.
func (s *splitter) take(want byte) error {
	c, err := s.next()
	if err != nil {
		return err
	}
	if c != want {
		return fmt.Errorf("%q where %q should be", string(rune(c)), string(rune(want)))
	}
	s.at++
	return nil
}

// another tells whether there is a member more of an object or an array that
// ends with end, and takes the comma before it or that end. first says that
// none has been seen yet.
func (s *splitter) another(first bool, end byte) (bool, error) {
	c, err := s.next()
	switch {
	case err != nil:
		return false, err
	case c == end:
		s.at++
		return false, nil
	case first:
		return true, nil
	}
	if err := s.take(','); err != nil {
		return false, err
	}
	if c, err = s.next(); err == nil && c == end {
		err = fmt.Errorf("%q after a comma", string(rune(end)))
	}
	return true, err
}

// key returns the key of the next member of an object, and takes the colon
// behind it.
func (s *splitter) key() (string, error) {
	raw, err := s.value()
	if err != nil {
		return "", err
	}
	var key string
	if err := json.Unmarshal(raw, &key); err != nil {
		return "", fmt.Errorf("a key: %w", err)
	}
	return key, s.take(':')
}

// value returns the next value as it is written. It holds until the next call
// of any method.
func (s *splitter) value() ([]byte, error) {
	if _, err := s.next(); err != nil {
		return nil, err
	}
	var at span
	for from := 0; ; {
		n, ended := at.end(s.buf[s.at+from:])
		if from += n; ended {
			raw := s.buf[s.at : s.at+from]
			s.at += from
			return raw, nil
		}
		if err := s.more(); err != nil {
			return nil, broken(err)
		}
	}
}

// done makes sure that nothing follows. It reads to the end, so that the
// connection can be used again.
func (s *splitter) done() error {
	if _, err := s.next(); !errors.Is(err, errCutOff) {
		return errors.New("something follows the list")
	}
	return nil
}

// span is where in a value one is: the zero span at its beginning.
type span struct {
	depth   int
	quoted  bool // in a string
	escaped bool // behind a backslash there
	bare    bool // in a number or a word
}

// end goes on through b. It returns where the value ends, if it ends in b.
func (s *span) end(b []byte) (n int, ended bool) {
	for i := 0; i < len(b); i++ {
		if s.quoted {
			if i += s.quote(b[i:]); i == len(b) {
				break
			}
			if s.quoted = false; s.depth == 0 {
				return i + 1, true
			}
			continue
		}
		switch b[i] {
		case '"':
			s.quoted = true
		case '{', '[':
			s.depth++
		case '}', ']':
			if s.bare && s.depth == 0 {
				return i, true // of what is around it
			}
			if s.depth--; s.depth <= 0 {
				return i + 1, true
			}
		case ',', ' ', '\n', '\r', '\t', ':':
			if s.depth == 0 {
				return i, true
			}
		default:
			s.bare = true
		}
	}
	return len(b), false
}

// quote returns where in b the string ends that it begins in: the offset of
// the quote, or its length.
func (s *span) quote(b []byte) int {
	for i, c := range b {
		switch {
		case s.escaped:
			s.escaped = false
		case c == '"':
			return i
		case c == '\\':
			s.escaped = true
		}
	}
	return len(b)
}

// errCutOff says that JSON ended early, which package io calls by two names.
var errCutOff = errors.New("it ends in the middle")

func broken(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errCutOff
	}
	return err
}
