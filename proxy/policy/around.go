package policy

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of what AskAround makes up: a few seconds.
const (
	maxOverlaps = 500       // rules beside one that differs
	maxMeetings = 3_000_000 // pairs of rules, and of their patterns
	maxMadeUp   = 100_000   // requests in all
	maxScene    = 5000      // of those, about two rules
	maxSide     = 2000      // identities of one side of two rules
)

// around is AskAround at work.
type around struct {
	c     *Comparison
	http  bool // rules ask for HTTP
	speak bool // and whom it speaks for
	left  int  // of maxMeetings
	seen  map[[sha256.Size]byte]bool
	scene int // requests asked about the two rules at hand
}

// focus is a rule that differs, or what else does in the form of one.
type focus struct {
	*rule
	certificate *revocation // the peer has it
}

// AskAround asks requests made from the rules, revocations and ceilings that
// differ, and from the rules that overlap them: of each condition every value
// that a rule names, and one that it does not; for each wildcard somebody whom
// nothing else names. It finds what people mean by a difference, and is no
// proof that there is none: Incomplete says that not all were asked that could
// be made.
func (c *Comparison) AskAround() {
	all := slices.Concat(c.was.enforced(), c.is.enforced())
	a := around{c: c, left: maxMeetings, seen: map[[sha256.Size]byte]bool{}}
	a.http = slices.ContainsFunc(all, func(r *rule) bool {
		return r.more != nil && (r.more.http != nil || r.more.when != nil && r.more.when.usesHTTP)
	})
	a.speak = slices.ContainsFunc(all, func(r *rule) bool { return r.more != nil && r.more.asksSubject() })
	list := a.different()
	for _, f := range list { // what differs by itself first, while there is room
		a.ask(f, f.rule)
	}
	for _, f := range list {
		overlaps := 0
		for _, s := range all {
			if a.left--; a.left < 0 {
				c.Incomplete = true
				return
			}
			if s == f.rule || !a.ask(f, s) {
				continue
			}
			if overlaps++; overlaps == maxOverlaps {
				c.Incomplete = true
				break
			}
		}
	}
}

// different returns what one of the policies alone has.
func (a *around) different() []focus {
	var out []focus
	differ := a.c.Differences()
	names := slices.Concat(differ.Added, differ.Changed, differ.Removed)
	slices.Sort(names)
	for _, p := range []*Policy{a.c.was, a.c.is} {
		for _, r := range p.enforced() {
			if _, ok := slices.BinarySearch(names, r.id); !ok {
				continue
			}
			out = append(out, focus{rule: r})
			if r.more != nil && r.more.when != nil && !slices.Contains(a.c.Conditions, r.id) {
				a.c.Conditions = append(a.c.Conditions, r.id)
			}
		}
	}
	slices.Sort(a.c.Conditions)
	for _, p := range []*Policy{a.c.was, a.c.is} {
		bars := p.bars()
		for _, name := range slices.Sorted(maps.Keys(bars)) {
			if _, ok := slices.BinarySearch(names, name); !ok {
				continue
			}
			b := bars[name]
			side := subjects{given: b.certificate == nil, patterns: b.patterns}
			out = append(out, focus{&rule{at: bothEnds, from: side}, b.certificate}, focus{&rule{at: bothEnds, to: side}, b.certificate})
			if a.speak && b.certificate == nil {
				spoken := &httpCond{subjects: &speakers{subjects: side}}
				out = append(out, focus{rule: &rule{at: 1 << Inbound, more: &conditions{http: spoken}}})
			}
		}
	}
	return out
}

// ask asks requests that both are about, as far as can be. It returns false if
// there are none.
func (a *around) ask(f focus, s *rule) bool {
	ends := f.at & s.at
	on := commonNames(f.on, s.on)
	if ends == 0 || len(on) == 0 {
		return false
	}
	from := a.somebody(&f.from, &s.from)
	if len(from) == 0 {
		return false
	}
	to := a.somebody(&f.to, &s.to)
	if len(to) == 0 {
		return false
	}
	a.scene = 0
	spoken := a.spoken(f.rule, s)
	variants := variantsOf(a.http, f.rule, s)
	for _, q := range variants { // the first meets what both ask for
		for _, listener := range on {
			for _, t := range to {
				for _, from := range from {
					for _, d := range []Direction{Inbound, Outbound} {
						if !ends.has(d) || d == Outbound && from.Unauthenticated || t.Unauthenticated {
							continue
						}
						if a.scene++; a.scene > maxScene {
							a.c.Incomplete = true
							return true
						}
						q.Listener, q.Direction, q.From, q.To = listener, d, from, t
						a.once(f, q)
						a.onceFor(f, s, q, spoken)
					}
				}
			}
		}
		if q.HTTP != nil && len(spoken) > 1 {
			spoken = spoken[:1] // the first request is asked for all, others for whom both want
		}
	}
	return true
}

// spoken returns whom requests about both may speak for: those both name, those
// that one of them does, and somebody whom nothing names.
func (a *around) spoken(r, s *rule) []spiffeid.ID {
	if !a.speak {
		return nil
	}
	var nobody subjects
	sides := [2]*subjects{&nobody, &nobody}
	for i, r := range []*rule{r, s} {
		if r.more != nil && r.more.http != nil && r.more.http.subjects != nil {
			sides[i] = &r.more.http.subjects.subjects
		}
	}
	peers := a.somebody(sides[0], sides[1])
	for _, side := range sides {
		if side.given {
			peers = append(peers, a.somebody(side, side)...)
		}
	}
	out := make([]spiffeid.ID, 0, len(peers)+1)
	for _, p := range peers {
		if !p.ID.IsZero() {
			out = append(out, p.ID)
		}
	}
	return append(out, stranger)
}

// stranger is an identity that nothing names.
var stranger = spiffeid.RequireFromString(scheme + elsewhere + "/" + somewhere)

// onceFor asks the request for others, for the peer itself, and of each of them
// for itself, where it may have a JWT-SVID.
func (a *around) onceFor(f focus, s *rule, q Request, spoken []spiffeid.ID) {
	if !a.speak || q.HTTP == nil || q.Direction != Inbound {
		return
	}
	if q.From.Authenticated() {
		spoken = append(slices.Clip(spoken), q.From.ID)
	}
	h := *q.HTTP
	for _, id := range spoken {
		if a.scene++; a.scene > maxScene {
			a.c.Incomplete = true
			return
		}
		spoken := h
		spoken.Subject = id
		q.HTTP = &spoken
		a.once(f, q)
		if itself := (Peer{ID: id}); f.from.match(&itself) && s.from.match(&itself) {
			q := q
			q.From = itself
			a.once(f, q)
		}
	}
}

// once asks, unless the same was asked or there were too many.
func (a *around) once(f focus, q Request) {
	if f.certificate != nil {
		peer := &q.From
		if q.Direction == Outbound {
			peer = &q.To
		}
		peer.Serial, peer.Issuer = f.certificate.serial, f.certificate.issuer
	}
	key := a.keyOf(&q)
	if a.seen[key] {
		return
	}
	if len(a.seen) >= maxMadeUp {
		a.c.Incomplete = true
		return
	}
	a.seen[key] = true
	a.c.Ask(&q)
}

func (a *around) keyOf(q *Request) [sha256.Size]byte {
	d := newDigester()
	for _, s := range []string{
		q.From.describe(), q.From.Serial, q.From.Issuer, q.To.describe(), q.To.Serial, q.To.Issuer,
		q.Listener, q.Direction.String(), q.Source.Addr().String(), fmt.Sprint(q.Port), q.SNI, q.Time.String(),
	} {
		d.text(s)
	}
	if q.HTTP != nil {
		for _, s := range []string{q.HTTP.Method, q.HTTP.Host, q.HTTP.Path, q.HTTP.Subject.String()} {
			d.text(s)
		}
		for _, h := range q.HTTP.Headers {
			d.text(h.Name)
			d.text(h.Value)
		}
	}
	return d.sum()
}

// somebody returns peers whom both sides match: those they name, and some for
// each pattern.
func (a *around) somebody(one, other *subjects) []Peer {
	var out []Peer
	var known map[string]bool
	add := func(ids []string) bool {
		for _, id := range ids {
			if len(out) >= maxSide {
				a.c.Incomplete = true
				return false
			}
			if parsed, err := spiffeid.FromString(id); err == nil && !known[id] {
				if known == nil {
					known = map[string]bool{}
				}
				known[id] = true
				out = append(out, Peer{ID: parsed})
			}
		}
		return true
	}
	switch {
	case !one.given && !other.given:
		return []Peer{{}}
	case !one.given:
		one = other
	case !other.given:
		other = one
	}
	if one.unauthenticated && other.unauthenticated {
		out = append(out, Peer{Unauthenticated: true})
	}
	for p := range one.all() {
		if one == other {
			if !add(idsOf(p, p)) {
				return out
			}
			continue
		}
		for q := range other.all() {
			if a.left--; a.left < 0 {
				a.c.Incomplete = true
				return out
			}
			if p.meets(q) && !add(idsOf(p, q)) {
				return out
			}
		}
	}
	return out
}

// somewhere stands for a segment that nothing names.
const somewhere = "any"

// idsOf returns IDs that both patterns match, which meet: where both end in
// any number of segments, one with a single segment there and one with two;
// where both begin with any segment, one with that which SPIRE keeps.
func idsOf(p, q Pattern) []string {
	mine, its := p.text[p.path:], q.text[q.path:]
	domain, path := p.text[:p.path], ""
	top := false // both take any first segment
	for mine != "" || its != "" {
		a, b := somewhere, somewhere
		if mine != "" {
			a, mine = cutSegment(mine)
		}
		if its != "" {
			b, its = cutSegment(its)
		}
		top = top || path == "" && a == one && b == one
		switch {
		case a == many && b == many:
			path += "/" + somewhere
			return []string{domain + path, domain + path + "/" + somewhere}
		case a == many:
			a, mine = b, "/"+many
			if its == "" {
				mine = ""
			}
		case b == many:
			b, its = a, "/"+many
			if mine == "" {
				its = ""
			}
		}
		if a == one {
			a = b
		}
		if a == one {
			a = somewhere
		}
		path += "/" + a
	}
	if _, rest := cutSegment(path); top {
		return []string{domain + path, domain + "/" + reserved + rest}
	}
	return []string{domain + path}
}

// commonNames are the listeners that both name; the empty name is one that no
// rule has.
func commonNames(a, b []string) []string {
	switch {
	case len(a) == 0 && len(b) == 0:
		return []string{""}
	case len(a) == 0:
		return b
	case len(b) == 0:
		return a
	}
	return slices.DeleteFunc(slices.Clone(a), func(name string) bool { return !slices.Contains(b, name) })
}
