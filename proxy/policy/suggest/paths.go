package suggest

import (
	"cmp"
	"maps"
	"slices"
	"strings"
)

// group is a set of paths that are called by the same methods.
type group struct {
	methods, paths           []string
	count, denied, different int
	example                  string
}

// manyValues is from how many values on that a segment stands for any: so many names
// are rarely those of a program.
const manyValues = 8

// generalise makes patterns of requests. What a method and pattern have fewer
// of than least is given to rare.
func generalise(calls map[call]*tally, least int, rare func(*tally)) []group {
	root := &branch{}
	for c, t := range calls {
		if c != (call{}) && !t.left {
			root.add(strings.Split(strings.TrimPrefix(c.path, "/"), "/"), c, t)
		}
	}
	root.fold()
	byMethods := map[string]*group{}
	root.each("", func(pattern string, b *branch) {
		methods := b.frequent(least, rare)
		if len(methods) == 0 {
			return
		}
		key := strings.Join(methods, " ")
		g := byMethods[key]
		if g == nil {
			g = &group{methods: methods}
			byMethods[key] = g
		}
		g.paths = append(g.paths, pattern)
		for _, m := range methods {
			g.take(b.methods[m])
		}
	})
	var out []group
	for _, key := range slices.Sorted(maps.Keys(byMethods)) {
		slices.Sort(byMethods[key].paths)
		out = append(out, *byMethods[key])
	}
	return out
}

func (g *group) take(e *endings) {
	g.count += e.count
	g.different += len(e.of)
	for _, t := range e.of {
		g.denied += t.denied
	}
	if g.example == "" || e.example < g.example {
		g.example = e.example
	}
}

// branch is a segment of paths that were seen, with what follows it.
type branch struct {
	kids    map[string]*branch
	methods map[string]*endings // of requests that end here
}

// endings are the requests of one method that end at a branch.
type endings struct {
	count   int
	of      []*tally
	example string // the smallest
}

func (b *branch) add(segments []string, c call, t *tally) {
	if len(segments) == 0 {
		b.end(c.method, &endings{t.count, []*tally{t}, c.method + " " + c.path})
		return
	}
	b.kid(segments[0]).add(segments[1:], c, t)
}

func (b *branch) kid(name string) *branch {
	if b.kids == nil {
		b.kids = map[string]*branch{}
	}
	if b.kids[name] == nil {
		b.kids[name] = &branch{}
	}
	return b.kids[name]
}

func (b *branch) end(method string, e *endings) {
	if b.methods == nil {
		b.methods = map[string]*endings{}
	}
	mine := b.methods[method]
	if mine == nil {
		b.methods[method] = e
		return
	}
	mine.count += e.count
	mine.of = append(mine.of, e.of...)
	mine.example = min(mine.example, e.example)
}

// frequent returns the methods that were seen often enough, sorted.
func (b *branch) frequent(least int, rare func(*tally)) []string {
	var methods []string
	for _, m := range slices.Sorted(maps.Keys(b.methods)) {
		if e := b.methods[m]; e.count < least {
			for _, t := range e.of {
				rare(t)
			}
			continue
		}
		methods = append(methods, m)
	}
	return methods
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
		kid := b.kids[name]
		delete(b.kids, name)
		b.kid(anySegment).take(kid)
	}
	for _, kid := range b.kids {
		kid.fold()
	}
}

// take adds another branch to this one.
func (b *branch) take(o *branch) {
	for m, e := range o.methods {
		b.end(m, e)
	}
	for name, kid := range o.kids {
		b.kid(name).take(kid)
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
	word := last(prefix)
	if word == "" || len(word) > maxWord || strings.Trim(word, "abcdefghijklmnopqrstuvwxyz") != "" {
		return "id"
	}
	if !strings.HasSuffix(word, "ss") {
		word = strings.TrimSuffix(word, "s")
	}
	return strings.TrimPrefix(word+"_id", "_")
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
