package policy

import (
	"hash/maphash"
	"sort"
	"strconv"
)

// source is a document as it was written, for who writes it again. The nodes
// that a policy is made of keep less: what they say, and where.
type source struct {
	root     element
	comments []comment
}

// element is a pair of a block, an item of a list, or the document itself.
type element struct {
	item     bool
	key      string // of a pair
	kind     kind   // of the value
	text     string // of a scalar, as in node
	children []element

	at           place // of the document
	line, column int   // of the key or dash; in brackets, of an item's first token
	first, last  int   // tokens
	open         int   // the token of the bracket around its children; -1: none
	spaced       bool  // an empty line stands above it, its comments included

	// Comments. An empty line between two of them, or between the last of the
	// head and the element, is "".
	head, foot []string
	side       string // behind it in its line
}

// comment is one comment.
type comment struct {
	text         string // from the # on
	line, column int
	alone        bool // nothing else stands in its line
	spaced       bool // an empty line stands above it
	token        int
	before       int // the token before it that is no comma and no comment
}

func (e *element) add(child element) {
	e.children = append(e.children, child)
	e.last = max(e.last, child.last)
}

// child returns the last child that begins before a token, and the index of
// the one after it.
func (e *element) child(token int) (before *element, after int) {
	after = sort.Search(len(e.children), func(i int) bool { return e.children[i].first >= token })
	if after > 0 {
		before = &e.children[after-1]
	}
	return before, after
}

// attach hangs each comment on the element it belongs to. One behind
// something belongs to the innermost element that this is of. One in a line of
// its own stands above the next element, unless it is indented further than
// that: then it is the end of what stands above it.
func (s *source) attach() {
	for i := 0; i < len(s.comments); {
		c := &s.comments[i]
		if owner := s.owner(c.before); !c.alone && owner != nil {
			owner.note(c)
			i++
			continue
		}
		end := i + 1
		for end < len(s.comments) && s.comments[end].alone && s.comments[end].token == s.comments[end-1].token+1 {
			end++
		}
		s.attachRun(s.comments[i:end])
		i = end
	}
}

// owner returns the innermost element that has a token; nil if only the
// document does.
func (s *source) owner(token int) *element {
	var owner *element
	for e := &s.root; ; owner = e {
		child, _ := e.child(token + 1)
		if child == nil || child.last < token {
			return owner
		}
		e = child
	}
}

// attachRun hangs comments that nothing stands between.
func (s *source) attachRun(run []comment) {
	token := run[0].token
	inside := &s.root
	above, next := inside.child(token)
	for above != nil && above.last > token {
		inside = above
		above, next = inside.child(token)
	}
	depth := run[0].column
	for i := range run {
		c := &run[i]
		depth = min(depth, c.column) // who has left a block does not come back
		switch {
		case next < len(inside.children):
			below := &inside.children[next]
			if above == nil || inside.open >= 0 || depth <= below.column {
				below.stand(run[i:])
				return
			}
			above.ending(depth).close(c)
		case inside != &s.root && (inside.open < 0 || token < inside.open):
			inside.stand(run[i:]) // between a key and its value
			return
		case inside == &s.root && inside.open < 0 && above != nil && above.column < depth:
			above.ending(depth).close(c)
		default:
			inside.close(c)
		}
	}
}

// note puts a comment behind an element. There is one such place; a second, as
// after both brackets of a list, comes to its end.
func (e *element) note(c *comment) {
	if e.side != "" {
		e.foot = append(e.foot, c.text)
		return
	}
	e.side = c.text
}

// stand puts comments above an element.
func (e *element) stand(run []comment) {
	first, spaced := len(e.head) == 0, e.spaced
	for i := range run {
		e.head = appendComment(e.head, &run[i])
	}
	if !first {
		return
	}
	if e.spaced = run[0].spaced; e.spaced {
		e.head = e.head[1:]
	}
	if spaced && run[len(run)-1].line < e.line {
		e.head = append(e.head, "")
	}
}

// close puts a comment at the end of an element.
func (e *element) close(c *comment) { e.foot = appendComment(e.foot, c) }

// ending returns the innermost of the last elements that stand further left
// than a comment.
func (e *element) ending(column int) *element {
	for e.open < 0 && len(e.children) > 0 {
		last := &e.children[len(e.children)-1]
		if last.column >= column {
			break
		}
		e = last
	}
	return e
}

func appendComment(list []string, c *comment) []string {
	if c.spaced {
		list = append(list, "")
	}
	return append(list, c.text)
}

// seed is that of all fingerprints.
var seed = maphash.MakeSeed()

// fingerprint tells whether two texts say the same, whatever the order of
// their keys, and hold the same comments, wherever they stand.
type fingerprint struct{ tree, comments uint64 }

// fingerprint returns a number for what an element says.
func (e *element) fingerprint() uint64 {
	sum := mix(e.key, uint64(e.kind), mix(e.text, 0, 0))
	var children uint64
	for i := range e.children {
		child := e.children[i].fingerprint()
		if e.kind == list {
			children = mix("", children, child)
		} else {
			children += child
		}
	}
	return mix("", sum, children)
}

func mix(s string, a, b uint64) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	_, _ = h.WriteString(strconv.FormatUint(a, 36) + " " + strconv.FormatUint(b, 36) + " " + s)
	return h.Sum64()
}
