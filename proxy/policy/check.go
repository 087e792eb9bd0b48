package policy

import (
	"bytes"
	"slices"
	"strings"
)

// check is one line of memory that decides most rules that a bucket leads to.
// The rule and its conditions are spread over seven or more, which with a
// hundred thousand rules are all waited for.
type check struct {
	methods uint32 // a bit for each method that is allowed: see methodBit
	at      directions
	allow   bool
	size    uint8           // of path
	path    [checkRoom]byte // the text of the one pattern that there may be
	kind    checkKind
}

const checkRoom = 56

// checkKind says how much of a rule its check knows.
type checkKind uint8

const (
	asksMore  checkKind = iota // ask the rule
	knowsHTTP                  // all it asks is a method and a path
)

// methods that have a bit of their own. Others share the last one.
var methods = strings.Fields("GET HEAD POST PUT DELETE PATCH OPTIONS TRACE CONNECT")

const otherMethod = 1 << 31

func methodBit(method string) uint32 {
	if i := slices.Index(methods, method); i >= 0 {
		return 1 << i
	}
	return otherMethod
}

// checkOf returns the check of a rule.
func checkOf(r *rule) check {
	c := check{at: r.at, allow: r.allow}
	if r.shadow || r.more == nil || r.more.http == nil {
		return c
	}
	alone := *r.more
	alone.http = nil
	h := r.more.http
	switch {
	case !alone.empty(), h.hosts != nil, h.headers != nil, h.subjects != nil, h.grpc && r.allow, len(h.paths) > 1:
		return c
	case h.methods == nil:
		c.methods = ^uint32(0)
	}
	for _, m := range h.methods {
		c.methods |= methodBit(m)
	}
	if h.methods != nil && c.methods&otherMethod != 0 {
		return c
	}
	for i := range h.paths {
		text := h.paths[i].text
		if len(text) > checkRoom {
			return c
		}
		c.size = uint8(copy(c.path[:], text))
	}
	c.kind = knowsHTTP
	return c
}

// match is httpCond.match for a check that knows all of it.
func (c *check) match(method uint32, path string, byPath bool) bool {
	if c.methods&method == 0 {
		return false
	}
	return byPath || c.size == 0 || matchPathText(c.path[:c.size], path, !c.allow)
}

// matchPathText is pathPattern.match on the text of the pattern.
func matchPathText(pattern []byte, path string, deny bool) bool {
	for len(pattern) > 0 {
		if path == "" || path[0] != '/' {
			return false
		}
		want := pattern[1:]
		if i := bytes.IndexByte(want, '/'); i >= 0 {
			want, pattern = want[:i], want[i:]
		} else {
			pattern = nil
		}
		if string(want) == many {
			return true
		}
		var have string
		have, path = cutSegment(path)
		if takesAny := string(want) == anySegment; takesAny && have == "" || !takesAny && string(want) != have {
			return false
		}
	}
	return path == "" || deny && path == "/"
}

// anySegment is {name} in the text of a pattern. No path holds braces: they are
// escaped there.
const anySegment = "{}"
