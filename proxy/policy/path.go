package policy

import (
	"errors"
	"fmt"
	"strings"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// pathPattern matches canonical paths segment by segment.
//
// The segments of a path are what stands behind each of its slashes: "/" has
// one, the empty one, and so a slash at the end makes one more. The zero
// pathPattern matches nothing.
type pathPattern struct {
	text     string // the same for two that match the same
	written  string
	segments []pathSegment
	below    bool // "/**" follows the segments
}

// pathSegment is a literal, or any one segment that is not empty.
type pathSegment struct {
	literal string
	any     bool
}

const maxPathPattern = 2048 // bytes

// parsePath reads a pattern such as /v1/orders/{id} or /v1/items/**. Literal
// segments come out in the form that requests have.
func parsePath(s string) (pathPattern, error) {
	switch {
	case s == "":
		return pathPattern{}, errors.New("empty; every path is /**")
	case len(s) > maxPathPattern:
		return pathPattern{}, fmt.Errorf("%d bytes long; at most %d are allowed", len(s), maxPathPattern)
	case s == "*" || s == "**":
		return pathPattern{}, errors.New("a path begins with a slash; every path is /**")
	case strings.Contains(s, "://"):
		return pathPattern{}, errors.New("write the path alone, like /v1/orders; hosts are named by hosts")
	case s[0] != '/':
		return pathPattern{}, fmt.Errorf("a path begins with a slash: /%s", clip(s))
	case strings.Contains(s, "?"):
		return pathPattern{}, errors.New("a path is matched without its query; leave out what begins with ?")
	}
	p := pathPattern{}
	words := strings.Split(s[1:], "/")
	for i, word := range words {
		last := i == len(words)-1
		switch {
		case word == many && last:
			p.below = true
			continue
		case word == many:
			return pathPattern{}, errors.New(`"**" must be the last segment; {name} stands for one segment in between`)
		case word == one:
			return pathPattern{}, errors.New(`"*" means nothing in a path; write {name} for one segment, and ** at the end for all that is below`)
		case len(word) > 1 && word[0] == ':' && checkSegmentName("{"+word[1:]+"}") == nil:
			return pathPattern{}, fmt.Errorf("segment %q: one segment of any name is written {%s}", clip(word), clip(word[1:]))
		case word == "" && !last:
			return pathPattern{}, errors.New("the path has an empty segment")
		case strings.ContainsAny(word, "{}"):
			if err := checkSegmentName(word); err != nil {
				return pathPattern{}, err
			}
			p.segments = append(p.segments, pathSegment{any: true})
			continue
		case strings.Contains(word, one):
			return pathPattern{}, fmt.Errorf(`segment %q: "*" stands for no part of a segment; write {name} for a whole one`, clip(word))
		}
		literal := word
		if word != "" {
			var err error
			if literal, err = canonical.PatternSegment(word); err != nil {
				return pathPattern{}, fmt.Errorf("segment %q: %w", clip(word), err)
			}
		}
		p.segments = append(p.segments, pathSegment{literal: literal})
	}
	p.text, p.written = p.spell(), s
	return p, nil
}

// checkSegmentName refuses what stands in braces and is no name: it has no
// meaning but for people.
func checkSegmentName(word string) error {
	name, opened := strings.CutPrefix(word, "{")
	name, closed := strings.CutSuffix(name, "}")
	if !opened || !closed || strings.ContainsAny(name, "{}") {
		return fmt.Errorf("segment %q: {name} stands for one whole segment, not for a part of one", clip(word))
	}
	for i := range len(name) {
		if c := name[i]; c != '_' && (c < 'a' || c > 'z') && (i == 0 || c < '0' || c > '9') {
			return fmt.Errorf("segment %q: a name is of a-z, 0-9 and _, and begins with no digit", clip(word))
		}
	}
	if name == "" {
		return fmt.Errorf("segment %q: a name is missing, like {id}", word)
	}
	return nil
}

// spell writes the pattern so that two that match the same are the same.
func (p *pathPattern) spell() string {
	var b strings.Builder
	for _, s := range p.segments {
		b.WriteByte('/')
		if s.any {
			b.WriteString(anySegment)
		} else {
			b.WriteString(s.literal)
		}
	}
	if p.below {
		b.WriteString("/" + many)
	}
	return b.String()
}

// match reports whether the pattern covers a path. A deny covers one slash
// more at the end, which most services pass over. It allocates nothing.
func (p *pathPattern) match(path string, deny bool) bool {
	for _, want := range p.segments {
		if path == "" || path[0] != '/' {
			return false
		}
		var have string
		have, path = cutSegment(path)
		if want.any && have == "" || !want.any && have != want.literal {
			return false
		}
	}
	switch {
	case p.text == "":
		return false
	case p.below:
		return path != "" && path[0] == '/'
	case path == "":
		return true
	}
	return deny && path == "/"
}
