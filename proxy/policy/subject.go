package policy

import "github.com/spiffe/go-spiffe/v2/spiffeid"

// This file is about whom a request speaks for. A peer proves who it is by its
// certificate. A JWT-SVID on a request proves more: that the peer itself sent
// it, or that it acts for another, as a gateway does for the service behind it.
// Who is allowed by itself is not allowed for everybody: an allow says for whom
// in http.subjects.

// proof is what a request shows of its subject.
type proof uint8

const (
	proofUnknown   proof = iota // nobody looked
	proofMissing                // there is no JWT-SVID on it
	proofOfPeer                 // it speaks for the peer itself
	proofOfAnother              // for somebody else
)

// proof says what h, an HTTP request on the connection, shows; h is nil where
// it is not known.
func (r *Request) proof(h *HTTP) proof {
	switch {
	case h == nil || h.NoProof || r.Direction != Inbound:
		return proofUnknown
	case h.Subject.IsZero():
		return proofMissing
	case !r.From.Unauthenticated && h.Subject == r.From.ID:
		return proofOfPeer
	}
	return proofOfAnother
}

// ofSubject asks whether the rule is for whom the request speaks for.
func (c *conditions) ofSubject(q *Request, h *HTTP, allow bool) answer {
	p := q.proof(h)
	if c.http == nil || c.http.subjects == nil {
		return certain(!allow || p != proofOfAnother)
	}
	switch p {
	case proofUnknown:
		return open
	case proofMissing:
		if allow {
			return unproven
		}
		return no
	}
	return certain(c.http.subjects.names(h.Subject))
}

// asksSubject reports whether the conditions ask whom a request speaks for.
func (c *conditions) asksSubject() bool {
	return c.http != nil && c.http.subjects != nil || c.when != nil && c.when.usesSubject
}

// speakers is a list of subjects. Those of from and to are found by the index;
// these are asked of one rule after the other, so the list itself is quick.
type speakers struct {
	subjects
	lookup *lookup // of the patterns
}

// names reports whether one of the list covers the ID. It allocates nothing.
func (s *speakers) names(id spiffeid.ID) bool {
	if s.lookup.match(s.patterns, id) {
		return true
	}
	for _, g := range s.groups {
		if g.lookup.match(g.patterns, id) {
			return true
		}
	}
	return false
}

// index makes the list quick, when its groups are known.
func (s *speakers) index() {
	s.lookup = newLookup(s.patterns)
	for _, g := range s.groups {
		if g.lookup == nil {
			g.lookup = newLookup(g.patterns)
		}
	}
}

// lookup finds whole IDs of a list of patterns by their text. A nil lookup is
// that of a short list.
type lookup struct {
	exact map[string]struct{}
	wild  []*member
}

// newLookup returns nil for what is as quickly looked through.
func newLookup(patterns []*member) *lookup {
	if len(patterns) <= fewPatterns {
		return nil
	}
	l := &lookup{exact: make(map[string]struct{}, len(patterns))}
	for _, p := range patterns {
		if p.wild {
			l.wild = append(l.wild, p)
		} else {
			l.exact[p.text] = struct{}{}
		}
	}
	return l
}

// match reports whether one of the patterns, which the lookup is made of, covers
// the ID.
func (l *lookup) match(patterns []*member, id spiffeid.ID) bool {
	if l != nil {
		if _, ok := l.exact[id.String()]; ok {
			return true
		}
		patterns = l.wild
	}
	for _, p := range patterns {
		if p.Match(id) {
			return true
		}
	}
	return false
}

// explainSubject tells miss whether the rule is for whom the request speaks
// for, where HTTP is visible.
func (c *conditions) explainSubject(q *Request, r *rule, miss func(met bool, key, format string, args ...any)) {
	if q.HTTP == nil {
		return
	}
	p, key := q.proof(q.HTTP), "http.subjects"
	if c.http == nil || c.http.subjects == nil {
		miss(!r.allow || p != proofOfAnother, key, "wants a request for the peer itself, and it speaks for %s: an allow says for whom", q.HTTP.Subject)
		return
	}
	if c.http.grpc {
		key = "grpc.subjects"
	}
	want := c.http.subjects.describe()
	switch p {
	case proofUnknown:
		miss(r.grants(q.Direction), key, "wants a JWT-SVID for %s, and none is looked for here", want)
	case proofMissing:
		miss(false, key, "wants a JWT-SVID for %s, and there is none", want)
	default:
		miss(c.http.subjects.names(q.HTTP.Subject), key, "wants a JWT-SVID for %s, not %s", want, q.HTTP.Subject)
	}
}
