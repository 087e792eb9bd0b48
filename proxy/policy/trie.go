package policy

import "strings"

// bag is what a pattern with wildcards stands for.
type bag struct {
	refs    [2][]ref // by side
	revoked bool
	inside  bool // of its trust domain's ceiling
}

// ref is an atom of the index, with a summary of the atoms of the other side
// that rules pair it with.
type ref struct {
	mask uint64
	atom uint32
}

// domains are the tries of all trust domains.
type domains struct {
	few  []*trie          // compared one by one
	more map[string]*trie // the others
}

func (d *domains) find(name string) *trie {
	for _, t := range d.few {
		if t.name == name {
			return t
		}
	}
	return d.more[name]
}

// grow returns the trie of a trust domain, a new one if need be.
func (d *domains) grow(name string) *trie {
	t := d.find(name)
	if t != nil {
		return t
	}
	t = &trie{name: name}
	if len(d.few) < fewNames {
		d.few = append(d.few, t)
		return t
	}
	if d.more == nil {
		d.more = map[string]*trie{}
	}
	d.more[name] = t
	return t
}

// trie finds the patterns with wildcards that match an ID, for one trust
// domain. A level is a segment.
type trie struct {
	name    string
	root    trieNode
	ceiling bool
}

type trieNode struct {
	names []string             // of the first few literal children
	kids  []*trieNode          // by the index of names
	more  map[string]*trieNode // the other literal children
	star  *trieNode            // behind "*"
	here  *bag                 // of the pattern that ends here
	tail  *bag                 // of the one that goes on with "**"
}

// fewNames is how many names are compared one by one before a map is asked.
const fewNames = 4

func (n *trieNode) child(segment string) *trieNode {
	for i, name := range n.names {
		if name == segment {
			return n.kids[i]
		}
	}
	return n.more[segment]
}

// add returns the bag of a pattern's path, which begins with a slash.
func (n *trieNode) add(path string) *bag {
	for path != "" {
		var segment string
		segment, path = cutSegment(path)
		if segment == many {
			if n.tail == nil {
				n.tail = new(bag)
			}
			return n.tail
		}
		n = n.grow(segment)
	}
	if n.here == nil {
		n.here = new(bag)
	}
	return n.here
}

func (n *trieNode) grow(segment string) *trieNode {
	if segment == one {
		if n.star == nil {
			n.star = new(trieNode)
		}
		return n.star
	}
	if kid := n.child(segment); kid != nil {
		return kid
	}
	kid := new(trieNode)
	if len(n.names) < fewNames {
		n.names, n.kids = append(n.names, segment), append(n.kids, kid)
		return kid
	}
	if n.more == nil {
		n.more = map[string]*trieNode{}
	}
	n.more[segment] = kid
	return kid
}

// find adds what matches a path, which begins with a slash.
func (t *trie) find(path string, out *identity) {
	n := &t.root
	if path == "" {
		return
	}
	segment, rest := cutSegment(path)
	if n.tail != nil && segment != reserved {
		out.add(n.tail)
	}
	n.descend(segment, rest, out)
}

func (n *trieNode) descend(segment, rest string, out *identity) {
	if kid := n.child(segment); kid != nil {
		kid.walk(rest, out)
	}
	if n.star != nil {
		n.star.walk(rest, out)
	}
}

func (n *trieNode) walk(path string, out *identity) {
	if path == "" {
		if n.here != nil {
			out.add(n.here)
		}
		return
	}
	if n.tail != nil {
		out.add(n.tail)
	}
	if n.star == nil && len(n.names) == 0 {
		return
	}
	i := 1 + strings.IndexByte(path[1:], '/')
	if i == 0 {
		i = len(path)
	}
	n.descend(path[1:i], path[i:], out)
}
