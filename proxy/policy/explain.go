package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Explanation is a decision and how it came about.
type Explanation struct {
	Decision Decision
	Detail   string     // one sentence: what decided, with the values it saw
	Rules    []RuleNote // every rule, by id
}

// RuleNote says of one rule whether it matched.
type RuleNote struct {
	ID           string
	Allow        bool // its effect
	Shadow       bool
	File         string
	Line, Column int
	Matched      bool
	Granted      bool   // it matched, and what it asks of HTTP, or of a JWT-SVID, which is not visible, counts as met
	Misses       []Miss // every condition that did not match, in the order of the language
}

// Miss is a condition that a request does not meet.
type Miss struct {
	Condition string // its key, such as from or http.paths
	Why       string // what it wants and what the request has
}

// Explain decides the request and says why, rule by rule. It asks each rule in
// turn, so it takes time in proportion to their number; it is for people and
// tests.
func (p *Policy) Explain(r *Request) Explanation {
	var e Explanation
	p.Decide(r, &e.Decision)
	if p == nil {
		e.Detail = e.Decision.Reason.String()
		return e
	}
	e.Rules = make([]RuleNote, len(p.rules))
	for i := range p.rules {
		e.Rules[i] = p.rules[i].note(r)
	}
	e.Detail = p.detail(r, &e.Decision)
	return e
}

func (p *Policy) detail(r *Request, d *Decision) string {
	switch d.Reason {
	case RevokedFrom:
		return p.revokedDetail("from", &r.From)
	case RevokedTo:
		return p.revokedDetail("to", &r.To)
	case RevokedSubject:
		return p.revokedDetail("subject", &Peer{ID: r.HTTP.Subject})
	case Ceiling:
		return p.ceilingDetail(r)
	case DenyRule, AllowRule:
		if r := p.find(d.Rule); r != nil {
			return fmt.Sprintf("%s %q (%s)", d.Reason, d.Rule, r.place)
		}
	}
	return fmt.Sprintf("%s: %s", d.Reason, r.describe())
}

// find returns the rule of that id; nil if there is none.
func (p *Policy) find(id string) *rule {
	i, ok := slices.BinarySearchFunc(p.rules, id, func(r rule, id string) int { return strings.Compare(r.id, id) })
	if !ok {
		return nil
	}
	return &p.rules[i]
}

func (p *Policy) revokedDetail(key string, peer *Peer) string {
	for i := range p.revoked {
		if v := &p.revoked[i]; v.pattern != nil && v.pattern.Match(peer.ID) {
			return fmt.Sprintf("%s %s is revoked by %s (%s)", key, peer.describe(), v.pattern, v.place)
		}
	}
	if v := p.index.serials.find(peer); v != nil {
		return fmt.Sprintf("%s %s: its certificate %s of authority %s is revoked (%s)", key, peer.describe(), v.serial, v.issuer, v.place)
	}
	return fmt.Sprintf("%s %s is revoked", key, peer.describe())
}

func (p *Policy) ceilingDetail(r *Request) string {
	type bounded struct {
		key  string
		peer *Peer
	}
	peers := []bounded{{"from", &r.From}, {"to", &r.To}}
	if r.proof(r.HTTP) == proofOfAnother {
		peers = append(peers, bounded{"subject", &Peer{ID: r.HTTP.Subject}})
	}
	for _, b := range peers {
		c := p.ceilings[b.peer.ID.TrustDomain().Name()]
		if c == nil || matchAny(c.patterns, b.peer) {
			continue
		}
		paths := make([]string, len(c.patterns))
		for i, pattern := range c.patterns {
			paths[i] = pattern.text[pattern.path:]
		}
		return fmt.Sprintf("%s %s is outside the ceiling of %s: %s (%s)", b.key, b.peer.describe(), c.domain, some(paths), c.place)
	}
	return Ceiling.String()
}

func (p *Peer) describe() string {
	switch {
	case p.Unauthenticated:
		return Unauthenticated
	case p.ID.IsZero():
		return "nobody"
	}
	return p.ID.String()
}

// Near returns, of the allows that did not match, those that miss the fewest
// conditions, at most most of them: what a person may have meant.
func (e *Explanation) Near(most int) []RuleNote {
	var near []RuleNote
	for _, n := range e.Rules {
		if n.Allow && !n.Shadow && !n.Matched {
			near = append(near, n)
		}
	}
	slices.SortStableFunc(near, func(a, b RuleNote) int { return cmp.Compare(len(a.Misses), len(b.Misses)) })
	return near[:min(most, len(near))]
}

func (r *rule) note(q *Request) RuleNote {
	n := RuleNote{ID: r.id, Allow: r.allow, Shadow: r.shadow, File: r.place.file, Line: r.place.line, Column: r.place.column}
	miss := func(met bool, key, format string, args ...any) {
		if !met {
			n.Misses = append(n.Misses, Miss{key, shown(fmt.Sprintf(format, args...))})
		}
	}
	miss(len(r.on) == 0 || slices.Contains(r.on, q.Listener), "on", "wants listener %s, not %q", some(r.on), q.Listener)
	miss(r.at.has(q.Direction), "at", "is for the other end, not %s", q.Direction)
	miss(r.from.match(&q.From), "from", "wants %s, not %s", r.from.describe(), q.From.describe())
	miss(r.to.match(&q.To), "to", "wants %s, not %s", r.to.describe(), q.To.describe())
	more := r.more
	if more == nil {
		more = &conditions{}
	}
	more.explain(q, r, miss)
	n.Matched = len(n.Misses) == 0
	switch {
	case !n.Matched:
	case q.HTTP == nil:
		n.Granted, _ = more.aboutHTTP()
	case q.proof(q.HTTP) == proofUnknown:
		n.Granted = more.asksSubject()
	}
	return n
}

// explain tells miss of every condition whether it holds.
func (c *conditions) explain(q *Request, r *rule, miss func(met bool, key, format string, args ...any)) {
	source := "unknown"
	if q.Source.Addr().IsValid() {
		source = q.Source.Addr().String()
	}
	miss(c.networks == nil || c.source(q, r.allow), "source_ip", "wants %s, and the source is %s", some(words(c.networks)), source)
	miss(c.notNetworks == nil || c.notSource(q, r.allow), "not_source_ip", "wants none of %s, and the source is %s", some(words(c.notNetworks)), source)
	miss(c.ports == nil || c.port(q, r.allow), "ports", "wants %s, and %s", some(words(c.ports)), portOf(q))
	miss(c.sni == nil || c.serverName(q, r.allow), "sni", "wants %s, and %s", some(words(c.sni)), serverNameOf(q))
	granted := q.HTTP == nil && r.grants(q.Direction)
	switch {
	case c.http == nil || granted:
	case q.HTTP == nil:
		miss(false, c.http.key(""), "asks for HTTP, which is not visible here")
	default:
		c.http.explain(q.HTTP, r.allow, miss)
	}
	c.explainSubject(q, r, miss)
	granted = granted || c.when != nil && c.when.usesSubject && q.proof(q.HTTP) == proofUnknown && r.grants(q.Direction)
	switch {
	case c.when == nil || c.when.usesHTTP && granted:
	case c.when.usesHTTP && q.HTTP == nil:
		miss(false, "when", "asks for HTTP, which is not visible here")
	case c.when.usesSubject && q.proof(q.HTTP) == proofUnknown:
		miss(false, "when", "asks whom a JWT-SVID speaks for, and none is looked for here")
	default:
		holds, err := c.when.eval(q)
		miss(err == nil || !r.allow, "when", "%s: %v", c.when.text, err)
		miss(err != nil || holds, "when", "%s is false", c.when.text)
	}
}

func portOf(q *Request) string {
	if q.Port == 0 {
		return "the port is not known"
	}
	return fmt.Sprintf("the port is %d", q.Port)
}

func serverNameOf(q *Request) string {
	if q.SNI == "" {
		return "no server name was sent"
	}
	return fmt.Sprintf("the server name is %s", q.SNI)
}

// key names a condition as it is written.
func (c *httpCond) key(name string) string {
	switch {
	case c.grpc:
		return "grpc"
	case name == "":
		return "http"
	}
	return "http." + name
}

func (c *httpCond) explain(h *HTTP, allow bool, miss func(met bool, key, format string, args ...any)) {
	miss(c.methods == nil || slices.Contains(c.methods, h.Method), c.key("methods"), "wants %s, not %s", some(c.methods), h.Method)
	miss(c.hosts == nil || matchHost(c.hosts, h.Host), c.key("hosts"), "wants %s, not %q", some(words(c.hosts)), h.Host)
	miss(c.paths == nil || c.matchPath(h.Path, !allow), c.key("paths"), "wants %s, not %s", some(words(c.paths)), h.Path)
	miss(!c.grpc || !allow || h.GRPC(), c.key(""), "wants a gRPC call: POST with content-type application/grpc")
	for i := range c.headers {
		w := &c.headers[i]
		miss(w.match(h, allow), c.key("headers."+w.name), "%s", w.explain(h))
	}
}

func (c *headerCond) explain(h *HTTP) string {
	var have []string
	for i := range h.Headers {
		if h.Headers[i].Name == c.name {
			have = append(have, fmt.Sprintf("%q", clip(h.Headers[i].Value)))
		}
	}
	is := "it is not there"
	if len(have) > 0 {
		is = "it is " + some(have)
	}
	switch c.want {
	case wantPresent:
		return "wants it present, and " + is
	case wantAbsent:
		return "wants it absent, and " + is
	}
	return fmt.Sprintf("wants %s, and %s", some(c.values), is)
}

// String returns the pattern as it was written.
func (p pathPattern) String() string { return p.written }

func words[T fmt.Stringer](list []T) []string {
	out := make([]string, len(list))
	for i := range list {
		out[i] = list[i].String()
	}
	return out
}

func (s *subjects) describe() string {
	var words []string
	if s.unauthenticated {
		words = append(words, Unauthenticated)
	}
	for _, p := range s.patterns {
		words = append(words, p.text)
	}
	for _, g := range s.groups {
		words = append(words, groupPrefix+g.name)
	}
	return some(words)
}

// some lists the first few words.
func some(words []string) string {
	const most = 5
	if len(words) > most {
		return fmt.Sprintf("%s or %d more", strings.Join(words[:most], ", "), len(words)-most)
	}
	return strings.Join(words, " or ")
}
