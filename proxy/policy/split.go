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

	// The line of the key, and the comments above it, which the text of the
	// first piece of a key leaves out; nil in the pieces that follow.
	intro     []byte
	introBase int
}

// split cuts a file into pieces.
func split(file string, data []byte) ([]piece, *Error) {
	if len(data) <= wholeSize {
		return []piece{{text: data}}, nil
	}
	s := splitter{file: file, data: data, indent: -1}
	for s.end < len(data) {
		s.line()
	}
	if at := s.aboveKey; at.seen && s.key != "" {
		s.cut(at) // comments at the left edge belong to the file
		s.key = ""
	}
	s.cut(mark{offset: len(data), line: s.lines})
	return s.pieces, s.problem
}

// mark is the begin of a line.
type mark struct {
	seen         bool
	offset, line int // line counts from 0
}

type splitter struct {
	file    string
	data    []byte
	pieces  []piece
	problem *Error

	end   int // of the lines seen
	lines int // seen

	start  mark   // of the piece under way
	key    string // of the section under way, if its value is a block
	at     place
	body   mark // below the line of the key
	indent int  // of its entries; -1 until the first is seen
	dash   bool

	intro     []byte // of the section under way, until a piece has it
	introBase int

	// The first of the comments above the next line that belong to it, if it
	// is a key at the left edge, or an entry. A cut goes above them.
	aboveKey, aboveEntry mark
}

// line takes the next line, and ends the piece under way where one can.
func (s *splitter) line() {
	begin := mark{offset: s.end, line: s.lines}
	rest := s.data[s.end:]
	if i := bytes.IndexByte(rest, '\n'); i >= 0 {
		rest = rest[:i+1]
	}
	s.end, s.lines = s.end+len(rest), s.lines+1
	content := bytes.TrimLeft(rest, " ")
	indent := len(rest) - len(content)
	if content = bytes.TrimRight(content, " \t\r\n"); len(content) == 0 {
		return
	}
	if content[0] == '#' {
		s.comment(begin, indent)
		return
	}
	s.content(begin, content, indent)
	s.aboveKey, s.aboveEntry = mark{}, mark{}
}

// comment notes a line that may be a comment.
func (s *splitter) comment(begin mark, indent int) {
	begin.seen = true
	if indent == 0 && !s.aboveKey.seen {
		s.aboveKey = begin
	}
	if indent <= s.indent && !s.aboveEntry.seen {
		s.aboveEntry = begin
	}
}

func (s *splitter) content(begin mark, content []byte, indent int) {
	if key, open := topKey(content); key != "" && indent == 0 {
		if s.aboveKey.seen {
			s.cut(s.aboveKey)
		} else {
			s.cut(begin)
		}
		s.key, s.indent = "", -1
		if open {
			s.key, s.at = key, place{s.file, begin.line + 1, 1}
			s.body = mark{offset: s.end, line: s.lines}
		}
		return
	}
	if s.key == "" {
		return
	}
	dash := content[0] == '-' && (len(content) == 1 || content[1] == ' ')
	if s.indent < 0 {
		// The first entry: the line of the key itself goes. Comments between
		// them, or a stray text, do no harm in the piece.
		s.intro, s.introBase = s.data[s.start.offset:s.body.offset], s.start.line
		s.start = s.body
		s.indent, s.dash = indent, dash
		return
	}
	if indent == s.indent && dash == s.dash && begin.offset-s.start.offset >= pieceSize {
		if s.aboveEntry.seen {
			begin = s.aboveEntry
		}
		s.cut(begin)
	}
}

// cut ends the piece under way.
func (s *splitter) cut(at mark) {
	if at.offset > s.start.offset {
		p := piece{text: s.data[s.start.offset:at.offset], base: s.start.line}
		if s.key != "" && s.indent >= 0 {
			p.key, p.at, p.intro, p.introBase = s.key, s.at, s.intro, s.introBase
		}
		if len(p.text) > pieceMax && s.problem == nil {
			s.problem = &Error{File: s.file, Line: p.base + 1, Column: 1, Msg: fmt.Sprintf("an entry of more than %d MiB; use several", pieceMax>>20)}
		}
		s.pieces = append(s.pieces, p)
	}
	s.start, s.intro = at, nil
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
