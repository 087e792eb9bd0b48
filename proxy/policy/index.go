package policy

import "github.com/spiffe/go-spiffe/v2/spiffeid"

// The index answers in a time that does not depend on the number of rules.
//
// Each side of a rule is a list of atoms: a pattern, a group, "anyone", or
// "unauthenticated". A rule is stored under each pair of its atoms, and under
// each listener it names, with the smallest ids that deny and that allow there.
// To decide, the atoms of both identities are found and their pairs looked up:
// an identity has few atoms however many rules there are. A mask of 64 bits
// with each atom tells which pairs cannot exist, so that of the dozen that
// could, one or two are looked up.
//
// The atoms of every identity that a policy names literally are found when it
// is loaded; those of others by a trie over the segments of patterns.

type side uint8

const (
	sideFrom side = iota
	sideTo
)

// Atoms that stand for no pattern. An atom 0 does not exist.
const (
	atomAnyone uint32 = 1 + iota
	atomUnauthenticated
	firstAtom
)

// index is never changed after compile.
type index struct {
	known     map[string]*bag // whole identities, by SPIFFE ID
	domains   map[string]*trie
	anyone    bag // of an identity that no pattern names
	plain     bag // of an unauthenticated peer
	pairs     map[pairKey]outcome
	listeners map[string]uint32 // from 1; 0 stands for any
	serials   serials
}

// pairKey is a pair of atoms at a listener.
type pairKey struct{ from, to, listener uint32 }

// outcome is the smallest deny and allow of a pair, by Direction.
type outcome struct{ deny, allow [2]uint32 }

// identity is what the index knows of one peer.
type identity struct {
	bags     [16]*bag
	n        int
	overflow bool // more bags than there is room for

	revoked, inside, outside bool
}

func (id *identity) add(b *bag) {
	id.revoked = id.revoked || b.revoked
	id.inside = id.inside || b.inside
	if id.n == len(id.bags) {
		id.overflow = true
		return
	}
	id.bags[id.n] = b
	id.n++
}

// identify finds what matches a peer on its side of the request.
func (x *index) identify(p *Peer, s side, out *identity) {
	if p.ID.IsZero() {
		out.add(&x.plain)
		return
	}
	if b, ok := x.known[p.ID.String()]; ok {
		out.add(b)
		out.outside, out.overflow = b.outside, b.overflow
	} else {
		x.identifyByPattern(p.ID, out)
	}
	if len(x.serials) > 0 && !out.revoked {
		out.revoked = x.serials.find(p) != nil
	}
}

func (x *index) identifyByPattern(id spiffeid.ID, out *identity) {
	if len(x.anyone.refs[sideFrom])+len(x.anyone.refs[sideTo]) > 0 {
		out.add(&x.anyone)
	}
	if t := x.domains[id.TrustDomain().Name()]; t != nil {
		t.find(id.Path(), out)
		out.outside = t.ceiling && !out.inside
	}
}

// bit is the place of an atom at a listener in a mask.
func bit(atom, listener uint32) uint64 {
	return 1 << ((atom*0x9e3779b1 + listener*0x85ebca6b) >> 26)
}

// search looks the pairs of two identities up.
func (x *index) search(r *Request, from, to *identity) hit {
	found := hit{none, none}
	if r.Direction > Outbound {
		return found
	}
	listener := x.listeners[r.Listener]
	for _, fromBag := range from.bags[:from.n] {
		for i := range fromBag.refs[sideFrom] {
			f := &fromBag.refs[sideFrom][i]
			for _, toBag := range to.bags[:to.n] {
				for j := range toBag.refs[sideTo] {
					t := &toBag.refs[sideTo][j]
					if f.mask&bit(t.atom, 0) != 0 && t.mask&bit(f.atom, 0) != 0 {
						x.take(&found, pairKey{f.atom, t.atom, 0}, r.Direction)
					}
					if listener != 0 && f.mask&bit(t.atom, listener) != 0 && t.mask&bit(f.atom, listener) != 0 {
						x.take(&found, pairKey{f.atom, t.atom, listener}, r.Direction)
					}
				}
			}
		}
	}
	return found
}

// take looks one pair up.
func (x *index) take(found *hit, key pairKey, d Direction) {
	if o, ok := x.pairs[key]; ok {
		found.deny = min(found.deny, o.deny[d])
		found.allow = min(found.allow, o.allow[d])
	}
}
