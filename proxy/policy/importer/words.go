package importer

import (
	"fmt"
	"strings"
)

// splitWords splits text as a shell does: white space parts words, quotes and
// backslashes take it as it is, # begins a comment, and lines go on after a
// backslash at their end. Nothing is expanded, and what would be is an error.
func splitWords(in *Input) (words []word, at place, problem string) {
	s := wordReader{in: in, at: place{in.Name, 1, 1}}
	for s.i < len(in.Data) {
		if problem := s.step(); problem != "" {
			return nil, s.at, problem
		}
	}
	if s.quote != 0 {
		return nil, s.start, fmt.Sprintf("the text that %c begins is not ended", s.quote)
	}
	s.end()
	return s.words, place{}, ""
}

type wordReader struct {
	in    *Input
	i     int
	at    place
	words []word

	b     strings.Builder
	open  bool // a word is being read
	start place
	quote byte
}

func (s *wordReader) next() byte {
	c := s.in.Data[s.i]
	s.i++
	s.at.column++
	if c == '\n' {
		s.at.line, s.at.column = s.at.line+1, 1
	}
	return c
}

func (s *wordReader) put(c byte, at place) {
	if !s.open {
		s.open, s.start = true, at
	}
	s.b.WriteByte(c)
}

func (s *wordReader) end() {
	if s.open {
		s.words = append(s.words, word{s.b.String(), s.start})
		s.b.Reset()
		s.open = false
	}
}

func (s *wordReader) step() string {
	at := s.at
	c := s.next()
	switch {
	case s.quote == '\'' && c != '\'', s.quote == '"' && c != '"' && c != '\\' && c != '$' && c != '`':
		s.b.WriteByte(c)
	case c == s.quote && s.quote != 0:
		s.quote = 0
	case c == '\'' || c == '"':
		s.quote = c
		if !s.open {
			s.open, s.start = true, at
		}
	case c == '$' || c == '`' || s.quote == 0 && strings.IndexByte(";&|<>(){}", c) >= 0:
		s.at = at
		return fmt.Sprintf("%q: nothing is expanded or run here; write the flags as they reach the program", string(c))
	case c == '\\' && s.i == len(s.in.Data):
		s.at = at
		return "a backslash at the end"
	case c == '\\':
		if c = s.next(); c != '\n' {
			s.put(c, at)
		}
	case c == ' ' || c == '\t' || c == '\r' || c == '\n':
		s.end()
	case c == '#' && !s.open:
		for s.i < len(s.in.Data) && s.in.Data[s.i] != '\n' {
			s.next()
		}
	default:
		s.put(c, at)
	}
	return ""
}
