package suggest

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// group is a set of paths that are called by the same methods.
type group struct {
	methods, paths   []string
	count, different int
	example          string
}

// manyValues is from how many values on that a segment stands for any: so many names
// are rarely those of a program.
const manyValues = 8

// generalise makes patterns of requests. Connections are one group without
// methods and paths.
func generalise(calls map[call]int) []group {
	if n, ok := calls[call{}]; ok && len(calls) == 1 {
		return []group{{count: n}}
	}
	root := &branch{}
	for c, n := range calls {
		if c != (call{}) {
			root.add(strings.Split(strings.TrimPrefix(c.path, "/"), "/"), c, n)
		}
	}
	root.fold()
	byMethods := map[string]*group{}
	root.each("", func(pattern string, b *branch) {
		methods := slices.Sorted(maps.Keys(b.methods))
		key := strings.Join(methods, " ")
		g := byMethods[key]
		if g == nil {
			g = &group{methods: methods}
			byMethods[key] = g
		}
		g.paths = append(g.paths, pattern)
		g.different += b.different
		best := 0
		for _, m := range methods {
			g.count += b.methods[m]
			best = max(best, b.methods[m])
		}
		if g.example == "" || b.top < cmp.Or(g.example, b.top) {
			g.example = b.top
		}
	})
	if n, ok := calls[call{}]; ok {
		byMethods[""] = &group{count: n}
	}
	var out []group
	for _, key := range slices.Sorted(maps.Keys(byMethods)) {
		slices.Sort(byMethods[key].paths)
		out = append(out, *byMethods[key])
	}
	return out
}

// branch is a segment of paths that were seen, with what follows it.
type branch struct {
	kids      map[string]*branch
	methods   map[string]int // of requests that end here
	different int
	top       string // one of them
}

func (b *branch) add(segments []string, c call, n int) {
	if len(segments) == 0 {
		if b.methods == nil {
			b.methods = map[string]int{}
		}
		b.methods[c.method] += n
		b.different++
		if text := c.method + " " + c.path; b.top == "" || text < b.top {
			b.top = text
		}
		return
	}
	if b.kids == nil {
		b.kids = map[string]*branch{}
	}
	kid := b.kids[segments[0]]
	if kid == nil {
		kid = &branch{}
		b.kids[segments[0]] = kid
	}
	kid.add(segments[1:], c, n)
}

// anySegment is the key of a segment that stands for any; no path holds it.
const anySegment = "{}"

// fold makes one branch of segments that look like identifiers, or that are
// many.
func (b *branch) fold() {
	var ids []string
	for name := range b.kids {
		if looksLikeID(name) {
			ids = append(ids, name)
		}
	}
	if len(b.kids) >= manyValues {
		ids = slices.Collect(maps.Keys(b.kids))
		ids = slices.DeleteFunc(ids, func(name string) bool { return name == "" })
	}
	slices.Sort(ids)
	for _, name := range ids {
		if b.kids[anySegment] == nil {
			b.kids[anySegment] = &branch{}
		}
		b.kids[anySegment].take(b.kids[name])
		delete(b.kids, name)
	}
	for _, kid := range b.kids {
		kid.fold()
	}
}

// take adds another branch to this one.
func (b *branch) take(o *branch) {
	for m, n := range o.methods {
		if b.methods == nil {
			b.methods = map[string]int{}
		}
		b.methods[m] += n
	}
	b.different += o.different
	if b.top == "" || o.top != "" && o.top < b.top {
		b.top = o.top
	}
	for name, kid := range o.kids {
		if b.kids == nil {
			b.kids = map[string]*branch{}
		}
		if b.kids[name] == nil {
			b.kids[name] = &branch{}
		}
		b.kids[name].take(kid)
	}
}

// each calls f for each pattern that something ended at.
func (b *branch) each(prefix string, f func(pattern string, b *branch)) {
	if b.methods != nil {
		f(cmp.Or(prefix, "/"), b)
	}
	for _, name := range slices.Sorted(maps.Keys(b.kids)) {
		segment := name
		if name == anySegment {
			segment = "{" + nameOf(prefix) + "}"
		}
		b.kids[name].each(prefix+"/"+segment, f)
	}
}

// nameOf names a segment after the one before it: of /orders it is order_id.
func nameOf(prefix string) string {
	word := strings.TrimSuffix(last(prefix), "s")
	for i := range len(word) {
		if c := word[i]; c < 'a' || c > 'z' {
			return "id"
		}
	}
	if word == "" {
		return "id"
	}
	return fmt.Sprintf("%s_id", word)
}

// looksLikeID reports whether a segment is a number, a UUID, a long
// hexadecimal number, or a long word with digits in it; or holds a star or an
// escaped slash, which no pattern can name.
func looksLikeID(s string) bool {
	if strings.Contains(s, "*") || strings.Contains(s, "%2F") {
		return true
	}
	digits, hex, letters := 0, 0, 0
	for i := range len(s) {
		switch c := s[i]; {
		case c >= '0' && c <= '9':
			digits++
		case c >= 'a' && c <= 'f', c >= 'A' && c <= 'F':
			hex++
		case c >= 'g' && c <= 'z', c >= 'G' && c <= 'Z':
			letters++
		case c != '-' && c != '_':
			return false
		}
	}
	switch n := len(s); {
	case digits == 0:
		return false
	case hex == 0 && letters == 0:
		return true
	case letters == 0:
		return n >= 8
	}
	return len(s) >= 16 && digits >= 4
}
