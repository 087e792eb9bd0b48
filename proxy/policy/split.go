package policy

import (
	"bytes"
	"fmt"
	"sync"
)

// A large file is parsed in pieces, cut between the entries of its top-level
// lists and blocks: several are read at once, no tree of the whole is ever in
// memory, and where the YAML library has to read, it needs some ninety bytes
// for each byte of text, and time that grows faster than the text.
//
// A cut can only go wrong inside a quoted text or a bracket whose lines stand
// further left than YAML allows them to. The piece before it then has no end
// to its quote or bracket, which is an error: a wrong cut can refuse a file,
// never misread it.

const (
	wholeSize = 256 << 10 // up to this size a file is parsed whole
	pieceSize = 128 << 10 // at which a piece is ended
	pieceMax  = 4 << 20   // what one entry may have
	aheadSize = 1 << 20   // what is read before its turn
)

// piece is a part of a file that is a document of its own.
type piece struct {
	key  string // "" where the text holds its keys itself
	at   place  // of the key
	text []byte
	base int // lines before it
}

// split cuts a file into pieces.
func split(file string, data []byte) ([]piece, *Error) {
	if len(data) <= wholeSize {
		return []piece{{text: data}}, nil
	}
	s := splitter{file: file, data: data}
	for s.end < len(data) {
		s.line()
	}
	s.cut(len(data), s.lines)
	return s.pieces, s.problem
}

type splitter struct {
	file    string
	data    []byte
	pieces  []piece
	problem *Error

	end   int // of the lines seen
	lines int // seen

	start, base int    // of the piece under way: its offset, the lines before it
	key         string // of the section under way, if its value is a block
	at          place
	indent      int // of its entries; -1 until the first is seen
	dash        bool
}

// line takes the next line, and ends the piece under way where one can.
func (s *splitter) line() {
	begin, number := s.end, s.lines
	rest := s.data[begin:]
	if i := bytes.IndexByte(rest, '\n'); i >= 0 {
		rest = rest[:i+1]
	}
	s.end, s.lines = begin+len(rest), number+1
	content := bytes.TrimLeft(rest, " ")
	indent := len(rest) - len(content)
	if content = bytes.TrimRight(content, " \t\r\n"); len(content) == 0 || content[0] == '#' {
		return
	}
	if key, open := topKey(content); key != "" && indent == 0 {
		s.cut(begin, number)
		s.key = ""
		if open {
			s.key, s.at, s.indent = key, place{s.file, number + 1, 1}, -1
		}
		return
	}
	if s.key == "" {
		return
	}
	dash := content[0] == '-' && (len(content) == 1 || content[1] == ' ')
	if s.indent < 0 {
		// The first entry: the line of the key itself goes, unless comments
		// or a stray text stand between, which do no harm in the piece.
		s.start, s.base = begin, number
		s.indent, s.dash = indent, dash
		return
	}
	if indent == s.indent && dash == s.dash && begin-s.start >= pieceSize {
		s.cut(begin, number)
	}
}

// cut ends the piece under way before the given offset and line.
func (s *splitter) cut(end, line int) {
	if end > s.start {
		p := piece{text: s.data[s.start:end], base: s.base}
		if s.key != "" && s.indent >= 0 {
			p.key, p.at = s.key, s.at
		}
		if len(p.text) > pieceMax && s.problem == nil {
			s.problem = &Error{File: s.file, Line: s.base + 1, Column: 1, Msg: fmt.Sprintf("an entry of more than %d MiB; use several", pieceMax>>20)}
		}
		s.pieces = append(s.pieces, p)
	}
	s.start, s.base = end, line
}

// readPieces reads the pieces of a file and gives them to take in their order,
// up to the first that is wrong. While one is taken, the next are read.
//
// The library is asked for one piece at a time: it needs far more memory.
func readPieces(file string, pieces []piece, take func(node)) *Error {
	type reading struct {
		node node
		ok   bool
	}
	var readers sync.WaitGroup
	defer readers.Wait()
	readings := make([]chan reading, len(pieces))
	started, ahead := 0, 0
	for i, p := range pieces {
		for started < len(pieces) && (started == i || ahead+len(pieces[started].text) <= aheadSize) {
			next, done := pieces[started], make(chan reading, 1)
			readers.Go(func() {
				n, ok := quickNode(file, next.base, next.text)
				done <- reading{n, ok}
			})
			readings[started] = done
			ahead += len(next.text)
			started++
		}
		r := <-readings[i]
		ahead -= len(p.text)
		if !r.ok {
			var problem *Error
			if r.node, problem = readNode(file, p.base, p.text); problem != nil {
				return problem
			}
		}
		if p.key != "" {
			r.node = node{kind: block, at: p.at, pairs: []pair{{p.key, p.at, r.node}}}
		}
		take(r.node)
	}
	return nil
}

// topKey returns the key of a line such as "rules:", and whether its value
// begins on a later line.
func topKey(line []byte) (key string, open bool) {
	i := 0
	for i < len(line) && (line[i] >= 'a' && line[i] <= 'z' || line[i] == '_') {
		i++
	}
	if i == 0 || i == len(line) || line[i] != ':' {
		return "", false
	}
	rest := line[i+1:]
	if len(rest) > 0 && rest[0] != ' ' && rest[0] != '\t' {
		return "", false
	}
	rest = bytes.TrimLeft(rest, " \t")
	return string(line[:i]), len(rest) == 0 || rest[0] == '#'
}
