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
	known     names // whole identities
	domains   domains
	anyone    [2][]ref // of everybody, by side
	plain     [2][]ref // of an unauthenticated peer, beside those
	pairs     pairs
	buckets   []bucket          // from 1
	checks    []check           // of the rules; none where no rule asks for more than identities
	listeners map[string]uint32 // from 1; 0 stands for any
	serials   serials
	ids       []string // of the rules
}

// identity is what the index knows of one peer, on its side of a request.
type identity struct {
	refs     []ref    // that do not come from patterns with wildcards
	bags     [16]*bag // of patterns with wildcards that match
	n        int      // bags used
	overflow bool     // more match than there is room for

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

// list returns the i-th list of refs beside those of anyone; there are n+1.
func (id *identity) list(i int, where side) []ref {
	if i == 0 {
		return id.refs
	}
	return id.bags[i-1].refs[where]
}

// refCount is how many refs there are.
func (id *identity) refCount(where side) int {
	n := len(id.refs)
	for _, b := range id.bags[:id.n] {
		n += len(b.refs[where])
	}
	return n
}

// identify finds what matches a peer on its side of the request.
func (x *index) identify(p *Peer, w *wanted, where side, out *identity) {
	switch {
	case p.Unauthenticated:
		out.refs = x.plain[where]
		return
	case w.id == "":
		return
	}
	if s := x.known.find(w); s != nil {
		out.refs = x.known.of(s, where)
		out.revoked = s.tag&flagRevoked != 0
		out.outside = s.tag&flagOutside != 0
		out.overflow = s.tag&flagOverflow != 0
	} else {
		if t := x.domains.find(p.ID.TrustDomain().Name()); t != nil {
			t.find(p.ID.Path(), out)
			out.outside = t.ceiling && !out.inside
		}
	}
	if len(x.serials) > 0 && !out.revoked {
		out.revoked = x.serials.find(p) != nil
	}
}

// named marks the mask of an atom that stands in pairs at named listeners. The
// other bits are a summary of the atoms it is paired with.
const named uint64 = 1 << 63

// bit is the place of an atom at a listener in a mask.
func bit(atom, listener uint32) uint64 {
	return 1 << min((atom*0x9e3779b1+listener*0x85ebca6b)>>26, 62)
}

// bars says what stands in the way before any rule is asked; NoRule where
// nothing does. It finds what matches the two peers.
func (x *index) bars(r *Request, from, to *identity) Reason {
	f, t := x.known.want(&r.From), x.known.want(&r.To)
	x.identify(&r.From, &f, sideFrom, from)
	x.identify(&r.To, &t, sideTo, to)
	switch {
	case from.revoked:
		return RevokedFrom
	case to.revoked:
		return RevokedTo
	case from.outside || to.outside:
		return Ceiling
	}
	return NoRule
}

// barsSubject is bars for whom a request speaks for, where that is neither from
// nor to. barred is what stands in the way already.
func (x *index) barsSubject(id spiffeid.ID, barred Reason) Reason {
	if barred != NoRule && barred != Ceiling {
		return barred
	}
	var subject identity
	peer := Peer{ID: id}
	w := x.known.want(&peer)
	x.identify(&peer, &w, sideFrom, &subject)
	switch {
	case subject.revoked:
		return RevokedSubject
	case subject.outside:
		return Ceiling
	}
	return barred
}

// search looks the pairs of two identities up.
func (x *index) search(s *search, from, to *identity) {
	listener := none // looked up when it is needed
	for i := -1; i <= from.n; i++ {
		froms := x.anyone[sideFrom]
		if i >= 0 {
			froms = from.list(i, sideFrom)
		}
		for k := range froms {
			f := &froms[k]
			for j := -1; j <= to.n; j++ {
				tos := x.anyone[sideTo]
				if j >= 0 {
					tos = to.list(j, sideTo)
				}
				listener = x.pair(s, f, tos, listener)
			}
		}
	}
}

// pair looks up what one atom and each of others come to. It returns the number
// of the request's listener, once it is known.
func (x *index) pair(s *search, f *ref, tos []ref, listener uint32) uint32 {
	back := bit(f.atom, 0)
	for i := range tos {
		t := &tos[i]
		if t.mask&back != 0 && f.mask&bit(t.atom, 0) != 0 {
			x.take(s, pairKey{f.atom, t.atom, 0})
		}
		if f.mask&t.mask&named == 0 {
			continue
		}
		if listener == none {
			listener = x.listeners[s.q.Listener]
		}
		if listener != 0 && t.mask&bit(f.atom, listener) != 0 && f.mask&bit(t.atom, listener) != 0 {
			x.take(s, pairKey{f.atom, t.atom, listener})
		}
	}
	return listener
}

// take looks one pair up.
func (x *index) take(s *search, key pairKey) {
	if o := x.pairs.find(key); o != nil {
		d := s.q.Direction
		s.hit.deny = min(s.hit.deny, o.deny[d])
		if !s.another {
			s.hit.allow = min(s.hit.allow, o.allow[d])
		}
		if o.bucket != 0 {
			s.bucket(o.bucket)
		}
	}
}
