package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The slow evaluator: the language's semantics written a second time, over
// plain strings, with nothing in common with the package but the meaning.

type slowRule struct {
	id, effect, at string
	on, from, to   []string // nil: left out
}

type slowPolicy struct {
	groups   map[string][]string
	rules    []slowRule
	revoked  []string    // patterns
	certs    [][2]string // issuer, serial
	ceilings map[string][]string
}

// slowMatch compares a pattern with an ID as lists of words.
func slowMatch(pattern, id string) bool {
	p := strings.Split(strings.TrimPrefix(pattern, "spiffe://"), "/")
	i := strings.Split(strings.TrimPrefix(id, "spiffe://"), "/")
	if p[0] != i[0] || id == "" {
		return false
	}
	p, i = p[1:], i[1:]
	if len(p) == 1 && p[0] == "**" && len(i) > 0 && i[0] == "spire" {
		return false
	}
	for n, word := range p {
		if n >= len(i) {
			return false
		}
		if word == "**" {
			return true
		}
		if word != "*" && word != i[n] {
			return false
		}
	}
	return len(p) == len(i)
}

// subject is what a peer is to a rule: its ID, the word for plaintext, or
// nothing.
func subject(p Peer) string {
	if p.Unauthenticated {
		return "unauthenticated"
	}
	return p.ID.String()
}

func (s *slowPolicy) sideMatches(list []string, id string) bool {
	if list == nil {
		return true
	}
	for _, item := range list {
		if name, ok := strings.CutPrefix(item, "group:"); ok {
			for _, member := range s.groups[name] {
				if id != "" && slowMatch(member, id) {
					return true
				}
			}
		} else if item == "unauthenticated" {
			if id == "unauthenticated" {
				return true
			}
		} else if id != "" && slowMatch(item, id) {
			return true
		}
	}
	return false
}

func (s *slowPolicy) isRevoked(p Peer) bool {
	id := p.ID.String()
	if id == "" || p.Unauthenticated {
		return false
	}
	for _, pattern := range s.revoked {
		if slowMatch(pattern, id) {
			return true
		}
	}
	return slices.Contains(s.certs, [2]string{p.Issuer, p.Serial})
}

func (s *slowPolicy) isOutside(p Peer) bool {
	id := p.ID.String()
	paths, bounded := s.ceilings[p.ID.TrustDomain().Name()]
	if id == "" || p.Unauthenticated || !bounded {
		return false
	}
	for _, path := range paths {
		if slowMatch("spiffe://"+p.ID.TrustDomain().Name()+path, id) {
			return false
		}
	}
	return true
}

func (s *slowPolicy) decide(r *Request) (bool, string, Reason) {
	switch {
	case s.isRevoked(r.From):
		return false, "", RevokedFrom
	case s.isRevoked(r.To):
		return false, "", RevokedTo
	case s.isOutside(r.From) || s.isOutside(r.To):
		return false, "", Ceiling
	}
	for _, effect := range []string{"deny", "allow"} {
		var ids []string
		for _, rule := range s.rules {
			if rule.effect == effect &&
				(rule.on == nil || slices.Contains(rule.on, r.Listener)) &&
				(rule.at == "" || rule.at == map[Direction]string{Inbound: "inbound", Outbound: "outbound"}[r.Direction]) &&
				s.sideMatches(rule.from, subject(r.From)) && s.sideMatches(rule.to, subject(r.To)) {
				ids = append(ids, rule.id)
			}
		}
		if len(ids) > 0 {
			return effect == "allow", slices.Min(ids), map[string]Reason{"deny": DenyRule, "allow": AllowRule}[effect]
		}
	}
	return false, "", NoRule
}

// yaml writes the policy into some files, in random order and style.
func (s *slowPolicy) yaml(r *rand.Rand, files int) []string {
	parts := make([]map[string][]string, files)
	for i := range parts {
		parts[i] = map[string][]string{}
	}
	put := func(key, text string) {
		part := parts[r.IntN(files)]
		part[key] = append(part[key], text)
	}
	list := func(items []string) string {
		items = slices.Clone(items)
		r.Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
		if r.IntN(2) == 0 {
			return " [" + strings.Join(items, ", ") + "]"
		}
		return "\n      - '" + strings.Join(items, "'\n      - '") + "'"
	}
	for name, members := range s.groups {
		put("groups", "  "+name+":"+list(members))
	}
	for name, paths := range s.ceilings {
		put("trust_domains", "  "+name+":\n    ids:"+list(paths))
	}
	for _, pattern := range s.revoked {
		put("revoked", "  - "+pattern)
	}
	for _, c := range s.certs {
		put("revoked", fmt.Sprintf("  - {issuer: %q, serial: %q}", c[0], c[1]))
	}
	for _, rule := range s.rules {
		fields := []string{"id: " + rule.id, "effect: " + rule.effect}
		if rule.at != "" {
			fields = append(fields, "at: "+rule.at)
		}
		for key, items := range map[string][]string{"on": rule.on, "from": rule.from, "to": rule.to} {
			if items != nil {
				fields = append(fields, key+":"+list(items))
			}
		}
		r.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
		put("rules", "  - "+strings.Join(fields, "\n    "))
	}
	out := make([]string, files)
	for i, part := range parts {
		blocks := []string{"version: 1\n"}
		for key, entries := range part {
			r.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
			blocks = append(blocks, key+":\n"+strings.Join(entries, "\n")+"\n")
		}
		r.Shuffle(len(blocks), func(i, j int) { blocks[i], blocks[j] = blocks[j], blocks[i] })
		out[i] = strings.Join(blocks, "")
	}
	return out
}

// Random policies and requests over a world so small that they meet.

var (
	worldDomains  = []string{"a.org", "b.org", "c"}
	worldSegments = []string{"ns", "sa", "web", "we", "web2", "spire", "x"}
	worldOn       = []string{"l1", "l2", "l3", "l4"}
)

func worldPath(r *rand.Rand, wild int) string {
	var b strings.Builder
	for n := 1 + r.IntN(4); n > 0; n-- {
		segment := worldSegments[r.IntN(len(worldSegments))]
		if r.IntN(100) < wild {
			segment = "*"
			if n == 1 && r.IntN(2) == 0 {
				segment = "**"
			}
		}
		b.WriteString("/" + segment)
	}
	return b.String()
}

func worldPattern(r *rand.Rand) string {
	return "spiffe://" + worldDomains[r.IntN(len(worldDomains))] + worldPath(r, 35)
}

func worldPeer(r *rand.Rand) Peer {
	switch r.IntN(20) {
	case 0:
		return Peer{Unauthenticated: r.IntN(2) == 0}
	case 1:
		return Peer{ID: spiffeid.RequireFromString("spiffe://" + worldDomains[r.IntN(3)])}
	}
	return Peer{
		Unauthenticated: r.IntN(30) == 0,
		ID:              spiffeid.RequireFromString("spiffe://" + worldDomains[r.IntN(3)] + worldPath(r, 0)),
		Serial:          fmt.Sprintf("%x", 1+r.IntN(40)), Issuer: fmt.Sprintf("a%d", r.IntN(3)),
	}
}

func worldRequest(r *rand.Rand) Request {
	return Request{
		Listener: append(worldOn, "l5")[r.IntN(5)], Direction: Direction(r.IntN(2)),
		From: worldPeer(r), To: worldPeer(r),
	}
}

func worldPolicy(r *rand.Rand) *slowPolicy {
	s := &slowPolicy{groups: map[string][]string{}, ceilings: map[string][]string{}}
	several := func(n int, f func(*rand.Rand) string) []string {
		out := make([]string, 1+r.IntN(n))
		for i := range out {
			out[i] = f(r)
		}
		return out
	}
	var names []string
	for i := range r.IntN(5) {
		name := fmt.Sprintf("g%d", i)
		names = append(names, name)
		s.groups[name] = several(10, worldPattern)
	}
	subjects := func(from bool) []string {
		most := 3
		if r.IntN(10) == 0 {
			most = 30 // large enough to become a list
		}
		list := several(most, worldPattern)
		if len(names) > 0 && r.IntN(3) == 0 {
			list = append(list, "group:"+names[r.IntN(len(names))])
			if r.IntN(2) == 0 {
				list = list[len(list)-1:]
			}
		}
		if from && r.IntN(10) == 0 {
			list = append(list, "unauthenticated")
		}
		return list
	}
	for i := range r.IntN(40) {
		rule := slowRule{id: fmt.Sprintf("r%d", i), effect: "allow"}
		if r.IntN(3) == 0 {
			rule.effect = "deny"
		}
		if r.IntN(3) == 0 {
			rule.at = []string{"inbound", "outbound"}[r.IntN(2)]
		}
		if r.IntN(3) == 0 {
			rule.on = several(3, func(r *rand.Rand) string { return worldOn[r.IntN(4)] })
		}
		if rule.effect == "allow" || r.IntN(2) == 0 {
			rule.from = subjects(rule.effect == "deny" || rule.at != "outbound")
		}
		if r.IntN(2) == 0 {
			rule.to = subjects(false)
		}
		s.rules = append(s.rules, rule)
	}
	for range r.IntN(3) {
		s.revoked = append(s.revoked, "spiffe://"+worldDomains[r.IntN(3)]+worldPath(r, 10))
		s.certs = append(s.certs, [2]string{fmt.Sprintf("a%d", r.IntN(3)), fmt.Sprintf("%x", 1+r.IntN(40))})
	}
	for range r.IntN(2) {
		s.ceilings[worldDomains[r.IntN(3)]] = several(4, func(r *rand.Rand) string { return worldPath(r, 50) })
	}
	return s
}
