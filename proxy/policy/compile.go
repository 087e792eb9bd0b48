package policy

import (
	"encoding/binary"
	"slices"
)

// A side of a rule is stored pattern by pattern where that is cheap, and as
// one atom for the whole list where it is not.
const (
	// A group in more than groupUses sides of rules and with more than
	// groupSize patterns is an atom. Below that its patterns are stored
	// directly: an identity may well be in thousands of groups of one use, and
	// would have as many atoms.
	groupUses = 8
	groupSize = 4

	// maxPairs bounds the pairs of a rule; beyond, the longer list becomes an
	// atom. So the index grows with the text of a policy, not with its square.
	maxPairs = 64

	// mostListeners is up to how many listeners a rule that names them is
	// stored pair by pair.
	mostListeners = 16
)

// compiler builds an index.
type compiler struct {
	x        index
	pairs    map[pairKey]outcome
	atoms    []atom   // by number
	patterns []uint32 // their atoms, by number; 0: none yet
	groups   map[*group]uint32
	lists    [2]map[string]uint32 // of rules too large to store by pairs, by their sorted members
	gathered [][]uint32           // rules that share a bucket, by the number in outcome.bucket; from 1
	scratch  [2][]ref
}

// atom is an atom under construction.
type atom struct {
	pattern         Pattern     // zero for all but patterns
	mask            [2]uint64   // by the side it stands on; 0: it stands on none
	sets            [2][]uint32 // groups and lists it is in, as atoms
	revoked, inside bool
}

// compile builds the index of a policy whose rules are sorted by id.
func compile(p *Policy) index {
	c := compiler{
		x: index{
			listeners: map[string]uint32{},
			serials:   serials{},
		},
		pairs:    make(map[pairKey]outcome, len(p.rules)),
		atoms:    make([]atom, firstAtom, firstAtom+2*uint32(len(p.rules))),
		patterns: make([]uint32, p.members),
		groups:   map[*group]uint32{},
		lists:    [2]map[string]uint32{{}, {}},
		gathered: make([][]uint32, 1),
	}
	for i := range p.revoked {
		if r := &p.revoked[i]; r.serial != "" {
			c.x.serials.add(*r)
		} else {
			c.atoms[c.pattern(r.pattern)].revoked = true
		}
	}
	for _, ceiling := range p.ceilings {
		c.x.domains.grow(ceiling.domain).ceiling = true
		for _, pattern := range ceiling.patterns {
			c.atoms[c.pattern(pattern)].inside = true
		}
	}
	for i, m := range p.listeners {
		c.x.listeners[m.Listener] = uint32(i) + 1
	}
	c.x.ids = make([]string, len(p.rules))
	if slices.ContainsFunc(p.rules, func(r rule) bool { return r.more != nil || r.shadow }) {
		c.x.checks = make([]check, len(p.rules))
		for i := range p.rules {
			c.x.checks[i] = checkOf(&p.rules[i])
		}
	}
	for i := range p.rules {
		c.x.ids[i] = p.rules[i].id
		c.rule(uint32(i), &p.rules[i])
	}
	c.fill(p)
	c.finish()
	return c.x
}

func (c *compiler) newAtom() uint32 {
	c.atoms = append(c.atoms, atom{})
	return uint32(len(c.atoms) - 1)
}

func (c *compiler) pattern(p *member) uint32 {
	a := c.patterns[p.number]
	if a == 0 {
		a = c.newAtom()
		c.atoms[a].pattern = p.Pattern
		c.patterns[p.number] = a
	}
	return a
}

// rule stores one rule under all its pairs.
func (c *compiler) rule(number uint32, r *rule) {
	from, to := c.side(&r.from), c.side(&r.to)
	most := maxPairs
	if len(r.on) > mostListeners { // each pair is stored at each listener
		most = 1
	}
	if len(from)*len(to) > most {
		if len(from) >= len(to) || len(from) > most {
			from = c.list(from, sideFrom)
		}
		if len(to) > len(from) && len(from)*len(to) > most {
			to = c.list(to, sideTo)
		}
	}
	listeners := make([]uint32, 0, 8)
	for _, name := range r.on {
		listeners = append(listeners, c.x.listeners[name])
	}
	mark := named
	if len(listeners) == 0 {
		listeners, mark = append(listeners, 0), 0
	}
	for _, f := range from {
		for _, t := range to {
			for _, listener := range listeners {
				c.atoms[f].mask[sideFrom] |= bit(t, listener) | mark
				c.atoms[t].mask[sideTo] |= bit(f, listener) | mark
				c.pair(pairKey{f, t, listener}, number, r)
			}
		}
	}
}

func (c *compiler) pair(key pairKey, number uint32, r *rule) {
	o, ok := c.pairs[key]
	if !ok {
		o = emptyOutcome()
	}
	if r.more == nil && !r.shadow {
		o.add(number, r)
	} else {
		o.bucket = c.gather(o.bucket, number)
	}
	c.pairs[key] = o
}

// gather adds a rule to those that share a bucket, and returns the number that
// stands for them.
func (c *compiler) gather(code, number uint32) uint32 {
	switch {
	case code == 0:
		return direct | number
	case code&direct != 0:
		first := code &^ direct
		if first == number {
			return code
		}
		c.gathered = append(c.gathered, []uint32{first, number})
		return uint32(len(c.gathered) - 1)
	}
	if list := c.gathered[code]; list[len(list)-1] != number {
		c.gathered[code] = append(list, number)
	}
	return code
}

// fill makes the buckets. Pairs with the same rules have the same one.
func (c *compiler) fill(p *Policy) {
	codes := make([]uint32, len(c.gathered))
	known := map[string]uint32{}
	c.x.buckets = make([]bucket, 1)
	for i, numbers := range c.gathered {
		if numbers == nil {
			continue
		}
		key := keyOf(numbers)
		code, ok := known[key]
		if !ok {
			code = uint32(len(c.x.buckets))
			c.x.buckets = append(c.x.buckets, newBucket(p, numbers))
			known[key] = code
		}
		codes[i] = code
	}
	for key, o := range c.pairs {
		if o.bucket != 0 && o.bucket&direct == 0 {
			o.bucket = codes[o.bucket]
			c.pairs[key] = o
		}
	}
}

func keyOf(numbers []uint32) string {
	key := make([]byte, 0, 4*len(numbers))
	for _, n := range numbers {
		key = binary.NativeEndian.AppendUint32(key, n)
	}
	return string(key)
}

// side returns the atoms of one side of a rule, each once.
func (c *compiler) side(s *subjects) []uint32 {
	if !s.given {
		return []uint32{atomAnyone}
	}
	atoms := make([]uint32, 0, len(s.patterns)+len(s.groups)+1)
	if s.unauthenticated {
		atoms = append(atoms, atomUnauthenticated)
	}
	for _, p := range s.patterns {
		atoms = append(atoms, c.pattern(p))
	}
	for _, g := range s.groups {
		if g.uses > groupUses && len(g.patterns) > groupSize {
			atoms = append(atoms, c.group(g))
			continue
		}
		for _, p := range g.patterns {
			atoms = append(atoms, c.pattern(p))
		}
	}
	if len(atoms) > 1 {
		slices.Sort(atoms)
		atoms = slices.Compact(atoms)
	}
	return atoms
}

// group returns the atom of a group, which its members carry on both sides.
func (c *compiler) group(g *group) uint32 {
	a, ok := c.groups[g]
	if ok {
		return a
	}
	a = c.newAtom()
	c.groups[g] = a
	for _, p := range g.patterns {
		member := c.pattern(p)
		for s := range c.atoms[member].sets {
			c.atoms[member].sets[s] = append(c.atoms[member].sets[s], a)
		}
	}
	return a
}

// list returns the atom of a list of atoms, groups among them.
func (c *compiler) list(members []uint32, where side) []uint32 {
	key := keyOf(members)
	a, ok := c.lists[where][key]
	if !ok {
		a = c.newAtom()
		c.lists[where][key] = a
		for _, m := range members {
			c.atoms[m].sets[where] = append(c.atoms[m].sets[where], a)
		}
	}
	return []uint32{a}
}

// finish stores what each pattern stands for, when all masks are known.
func (c *compiler) finish() {
	c.x.pairs = newPairs(c.pairs)
	for s := range 2 {
		c.x.anyone[s] = c.refs(nil, atomAnyone, side(s))
		c.x.plain[s] = c.refs(nil, atomUnauthenticated, side(s))
	}
	var exact []uint32
	for number := firstAtom; number < uint32(len(c.atoms)); number++ {
		a := &c.atoms[number]
		switch p := a.pattern; {
		case p.text == "":
		case !p.wild:
			exact = append(exact, number)
		default:
			b := c.x.domains.grow(p.TrustDomain()).root.add(p.text[p.path:])
			b.revoked, b.inside = a.revoked, a.inside
			for s := range b.refs {
				b.refs[s] = c.refs(nil, number, side(s))
			}
		}
	}
	c.x.known = newNames(len(exact))
	for _, number := range exact {
		c.identity(number)
	}
}

// refs appends an atom that stands on that side, and the sets it is in, and
// those that these are in: a list may hold groups.
func (c *compiler) refs(to []ref, number uint32, where side) []ref {
	if mask := c.atoms[number].mask[where]; mask != 0 {
		to = append(to, ref{mask, number})
	}
	for _, set := range c.atoms[number].sets[where] {
		to = c.refs(to, set, where)
	}
	return to
}

// identity stores all that is known of an identity that the policy names.
func (c *compiler) identity(number uint32) {
	a := &c.atoms[number]
	var matched identity
	domain := c.x.domains.find(a.pattern.TrustDomain())
	if domain != nil {
		domain.find(a.pattern.text[a.pattern.path:], &matched)
	}
	for s := range c.scratch {
		refs := c.scratch[s][:0]
		for _, b := range matched.bags[:matched.n] {
			refs = append(refs, b.refs[s]...)
		}
		c.scratch[s] = c.refs(refs, number, side(s))
	}
	var flags uint32
	if a.revoked || matched.revoked {
		flags |= flagRevoked
	}
	if domain != nil && domain.ceiling && !a.inside && !matched.inside {
		flags |= flagOutside
	}
	if matched.overflow {
		flags |= flagOverflow
	}
	c.x.known.add(a.pattern.text, flags, c.scratch)
}
