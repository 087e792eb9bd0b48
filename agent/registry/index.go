package registry

import (
	"slices"
	"strings"

	"github.com/narthex-id/narthex/attestor"
)

// index finds the entries of a caller and the callers of an entry without
// looking at all of either.
//
// An entry is in the bucket of one of its selectors, the one whose bucket was
// smallest when it came. A caller can only match entries in the buckets of its
// own selectors, so a selector that all entries share costs nothing as long as
// each has a rarer one beside it. The other way round, an audience is listed
// under all its selectors, and an entry looks through the shortest list among
// those of its own.
type index struct {
	nodes map[attestor.Selector]*node
}

// node is one selector in use. Entries and audiences hold the selector as the
// node has it, so its text is in memory once.
type node struct {
	selector  attestor.Selector
	uses      int // entries and audiences that have it; the node goes with the last
	bucket    []*record
	audiences []member
}

// member is an audience and where the node stands among its selectors.
type member struct {
	of *audience
	at int
}

// record is an entry and what the registry knows about it. Most records of a
// large registry have no live part.
type record struct {
	entry *Entry
	node  *node // in whose bucket it is; nil if nobody may have the entry
	at    int   // where in the bucket
	live  *live // nil unless it has an SVID, a watch, or is to have an SVID
}

func (r *record) compareID(id string) int { return strings.Compare(r.entry.ID, id) }

// use returns the node of a selector and counts one more user.
func (x *index) use(s attestor.Selector) *node {
	n := x.nodes[s]
	if n == nil {
		n = &node{selector: s}
		x.nodes[s] = n
	}
	n.uses++
	return n
}

func (x *index) release(n *node) {
	if n.uses--; n.uses == 0 {
		delete(x.nodes, n.selector)
	}
}

// insert puts a record into the bucket of one of its selectors, and gives the
// entry the shared text of all of them.
func (x *index) insert(r *record) {
	if !r.entry.servable() {
		return
	}
	for i, s := range r.entry.Selectors {
		n := x.use(s)
		r.entry.Selectors[i] = n.selector
		if r.node == nil || len(n.bucket) < len(r.node.bucket) {
			r.node = n
		}
	}
	r.at = len(r.node.bucket)
	r.node.bucket = append(r.node.bucket, r)
}

func (x *index) remove(r *record) {
	if r.node == nil {
		return
	}
	b := r.node.bucket
	last := b[len(b)-1]
	b[r.at], last.at = last, r.at
	b[len(b)-1] = nil
	r.node.bucket = b[:len(b)-1]
	r.node = nil
	for _, s := range r.entry.Selectors {
		x.release(x.nodes[s])
	}
}

// matching returns the records whose selectors are all among those of the
// audience, in the order of their entry IDs.
func (x *index) matching(a *audience) []*record {
	var found []*record
	for _, n := range a.nodes {
		for _, r := range n.bucket {
			if a.includes(r.entry.Selectors) {
				found = append(found, r)
			}
		}
	}
	slices.SortFunc(found, func(a, b *record) int { return strings.Compare(a.entry.ID, b.entry.ID) })
	return slices.Clip(found)
}

// audiencesOf calls f for each audience that includes all selectors of the
// record. f must not add or remove audiences.
func (x *index) audiencesOf(r *record, f func(*audience)) {
	if r.node == nil {
		return
	}
	list := r.node.audiences
	for _, s := range r.entry.Selectors {
		if n := x.nodes[s]; len(n.audiences) < len(list) {
			list = n.audiences
		}
	}
	for _, m := range list {
		if m.of.includes(r.entry.Selectors) {
			f(m.of)
		}
	}
}

// audience returns the audience with exactly these normalised selectors, made
// now if there is none.
func (x *index) audience(selectors []attestor.Selector) (a *audience, made bool) {
	a = &audience{nodes: make([]*node, len(selectors)), at: make([]int, len(selectors))}
	var rarest *node
	for i, s := range selectors {
		a.nodes[i] = x.use(s)
		if rarest == nil || len(a.nodes[i].audiences) < len(rarest.audiences) {
			rarest = a.nodes[i]
		}
	}
	if rarest != nil {
		for _, m := range rarest.audiences {
			if slices.Equal(m.of.nodes, a.nodes) {
				x.leave(a)
				return m.of, false
			}
		}
	}
	for i, n := range a.nodes {
		a.at[i] = len(n.audiences)
		n.audiences = append(n.audiences, member{of: a, at: i})
	}
	return a, true
}

// leave gives back the use of the audience's selectors.
func (x *index) leave(a *audience) {
	for _, n := range a.nodes {
		x.release(n)
	}
}

// drop takes an audience off all lists.
func (x *index) drop(a *audience) {
	for i, n := range a.nodes {
		last := n.audiences[len(n.audiences)-1]
		n.audiences[a.at[i]] = last
		last.of.at[last.at] = a.at[i]
		n.audiences[len(n.audiences)-1] = member{}
		n.audiences = n.audiences[:len(n.audiences)-1]
	}
	x.leave(a)
}
