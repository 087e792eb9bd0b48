package policy

import (
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
)

// The slow evaluator: the language's semantics written a second time, over
// plain strings, with nothing in common with the package but the meaning. It
// takes policies as they are written: nothing is compiled, every rule is asked,
// and each condition is read from its text again.

type slowRule struct {
	id, effect, at        string
	shadow                bool
	on, from, to          []string // nil: left out
	http                  *slowHTTP
	grpc                  *slowGRPC
	sourceIP, notSourceIP []string
	ports                 []string // "8443" or "9000-9100"
	sni                   []string
	when                  string // a text of slowWhens
}

type slowHTTP struct {
	methods, hosts, paths []string
	headers               []slowHeader
	subjects              []string
}

// slowHeader is one key of headers.
type slowHeader struct {
	name   string
	word   string   // present or absent
	values []string // where there is no word
}

type slowGRPC struct{ services, methods, subjects []string }

type slowLimit struct {
	id, per            string
	on, from, to       []string
	rps                string // decimal; "": left out
	burst, connections int    // 0: left out
}

type slowPolicy struct {
	groups   map[string][]string
	rules    []slowRule
	limits   []slowLimit
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

// matches reports whether every condition of the rule holds.
func (s *slowPolicy) matches(rule *slowRule, q *Request) bool {
	return (rule.on == nil || slices.Contains(rule.on, q.Listener)) &&
		(rule.at == "" || rule.at == map[Direction]string{Inbound: "inbound", Outbound: "outbound"}[q.Direction]) &&
		s.sideMatches(rule.from, subject(q.From)) && s.sideMatches(rule.to, subject(q.To)) &&
		rule.sourceHolds(q) && rule.portsHold(q) && rule.sniHolds(q) &&
		rule.httpHolds(q) && rule.grpcHolds(q) && rule.whenHolds(q) && s.subjectHolds(rule, q)
}

// hasProof reports whether somebody looked for a JWT-SVID, and speaksFor whom
// it speaks for; "" without one.
func hasProof(q *Request) bool { return q.HTTP != nil && !q.HTTP.NoProof && q.Direction == Inbound }

func speaksFor(q *Request) string {
	if !hasProof(q) {
		return ""
	}
	return q.HTTP.Subject.String()
}

func speaksForAnother(q *Request) bool {
	return speaksFor(q) != "" && speaksFor(q) != subject(q.From)
}

// subjects is whom the rule asks for; nil: nobody.
func (rule *slowRule) subjects() []string {
	switch {
	case rule.http != nil && rule.http.subjects != nil:
		return rule.http.subjects
	case rule.grpc != nil:
		return rule.grpc.subjects
	}
	return nil
}

func (s *slowPolicy) subjectHolds(rule *slowRule, q *Request) bool {
	switch {
	case rule.subjects() == nil && rule.deny():
		return true
	case rule.subjects() == nil:
		return !speaksForAnother(q)
	case !hasProof(q):
		return rule.invisible(q)
	}
	return s.sideMatches(rule.subjects(), speaksFor(q))
}

// needsSubject reports whether there is an allow whose conditions hold, but for
// those on the JWT-SVID that the request does not have.
func (s *slowPolicy) needsSubject(q *Request) bool {
	if !hasProof(q) || speaksFor(q) != "" {
		return false
	}
	return slices.ContainsFunc(s.rules, func(rule slowRule) bool {
		if rule.deny() || rule.shadow || rule.subjects() == nil && !slowWhens[rule.when].subject {
			return false
		}
		rest := rule
		if slowWhens[rule.when].subject {
			rest.when = ""
		}
		if rule.http != nil {
			http := *rule.http
			http.subjects = nil
			rest.http = &http
		}
		if rule.grpc != nil {
			grpc := *rule.grpc
			grpc.subjects = nil
			rest.grpc = &grpc
		}
		return s.matches(&rest, q)
	})
}

func (rule *slowRule) deny() bool { return rule.effect == "deny" }

func (rule *slowRule) sourceHolds(q *Request) bool {
	if rule.sourceIP == nil && rule.notSourceIP == nil {
		return true
	}
	if q.Direction != Inbound {
		return false
	}
	if !q.Source.Addr().IsValid() {
		return rule.deny() // nobody knows: fail closed
	}
	ip := slowAddress(q)
	if rule.sourceIP != nil && !slices.ContainsFunc(rule.sourceIP, func(n string) bool { return slowContains(n, ip) }) {
		return false
	}
	return !slices.ContainsFunc(rule.notSourceIP, func(n string) bool { return slowContains(n, ip) })
}

// slowAddress is the address of the client as text, without a zone, IPv4 as
// IPv4; "" where there is none.
func slowAddress(q *Request) string {
	if !q.Source.Addr().IsValid() {
		return ""
	}
	text, _, _ := strings.Cut(q.Source.Addr().String(), "%")
	return net.ParseIP(text).String() // writes mapped addresses as IPv4
}

// slowContains reports whether an address is in a network, which may be one
// address.
func slowContains(network, ip string) bool {
	if one := net.ParseIP(network); one != nil {
		return one.Equal(net.ParseIP(ip))
	}
	_, n, err := net.ParseCIDR(network)
	return err == nil && n.Contains(net.ParseIP(ip))
}

func (rule *slowRule) portsHold(q *Request) bool {
	if rule.ports == nil {
		return true
	}
	if q.Port == 0 {
		return rule.deny()
	}
	return slices.ContainsFunc(rule.ports, func(text string) bool {
		low, high, ok := strings.Cut(text, "-")
		if !ok {
			high = low
		}
		from, _ := strconv.Atoi(low)
		to, _ := strconv.Atoi(high)
		return from <= int(q.Port) && int(q.Port) <= to
	})
}

func (rule *slowRule) sniHolds(q *Request) bool {
	if rule.sni == nil {
		return true
	}
	if q.SNI == "" {
		return rule.deny() // else leaving it out would be the way around
	}
	return slices.ContainsFunc(rule.sni, func(p string) bool { return slowName(p, q.SNI) })
}

// slowName compares a host name with a name or *.suffix.
func slowName(pattern, name string) bool {
	pattern, name = strings.ToLower(pattern), strings.ToLower(name)
	if suffix, ok := strings.CutPrefix(pattern, "*"); ok {
		return strings.HasSuffix(name, suffix) && name != suffix
	}
	return pattern == name
}

// slowHost compares a host, perhaps with a port, with a pattern that may have
// one.
func slowHost(pattern, host string) bool {
	name, port := slowSplitPort(pattern)
	haveName, havePort := slowSplitPort(host)
	return slowName(name, haveName) && (port == "" || port == havePort)
}

func slowSplitPort(s string) (name, port string) {
	if i := strings.LastIndex(s, ":"); i > strings.LastIndex(s, "]") {
		return s[:i], s[i+1:]
	}
	return s, ""
}

// invisible is the answer of a rule with conditions on HTTP where there is no
// HTTP to see, if its other conditions hold.
func (rule *slowRule) invisible(q *Request) bool {
	return rule.deny() || q.Direction == Outbound
}

func (rule *slowRule) httpHolds(q *Request) bool {
	h := rule.http
	if h == nil {
		return true
	}
	if q.HTTP == nil {
		return rule.invisible(q)
	}
	for i := range h.headers {
		if !h.headers[i].holds(q.HTTP, rule.deny()) {
			return false
		}
	}
	return (h.methods == nil || slices.Contains(h.methods, q.HTTP.Method)) &&
		(h.hosts == nil || slices.ContainsFunc(h.hosts, func(p string) bool { return slowHost(p, q.HTTP.Host) })) &&
		(h.paths == nil || slices.ContainsFunc(h.paths, func(p string) bool { return slowPath(p, q.HTTP.Path, rule.deny()) }))
}

// slowPath compares a path with a pattern.
func slowPath(pattern, path string, deny bool) bool {
	if path == "*" {
		return false // OPTIONS * asks for no path
	}
	pattern = slowCanonical(pattern)
	if slowSegments(strings.Split(pattern[1:], "/"), strings.Split(path[1:], "/")) {
		return true
	}
	short, slash := strings.CutSuffix(path, "/")
	return deny && slash && short != "" && slowSegments(strings.Split(pattern[1:], "/"), strings.Split(short[1:], "/"))
}

func slowSegments(pattern, path []string) bool {
	for i, want := range pattern {
		switch {
		case i >= len(path):
			return false
		case want == "**":
			return true
		case strings.HasPrefix(want, "{"):
			if path[i] == "" {
				return false
			}
		case want != path[i]:
			return false
		}
	}
	return len(pattern) == len(path)
}

// slowCanonical writes a path as requests have it: percent-encoding only where
// it is needed, and then in upper case (RFC 3986, section 6.2.2).
func slowCanonical(path string) string {
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		c := path[i]
		encoded := c == '%'
		if encoded {
			n, _ := strconv.ParseUint(path[i+1:i+3], 16, 8)
			c, i = byte(n), i+2
		}
		unreserved := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0
		if encoded && !unreserved || c >= 0x80 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// slowValues returns the values of a header, in order.
func slowValues(h *HTTP, name string) []string {
	var values []string
	for _, header := range h.Headers {
		if strings.EqualFold(header.Name, name) {
			values = append(values, strings.Trim(header.Value, " \t"))
		}
	}
	return values
}

func (want *slowHeader) holds(h *HTTP, deny bool) bool {
	values := slowValues(h, want.name)
	switch {
	case want.word == "present":
		return len(values) > 0
	case want.word == "absent":
		return len(values) == 0
	case !deny:
		return len(values) > 0 && !slices.ContainsFunc(values, func(v string) bool { return !slices.Contains(want.values, v) })
	}
	for _, value := range values {
		for _, element := range append(strings.Split(value, ","), value) {
			if slices.Contains(want.values, strings.Trim(element, " \t")) {
				return true
			}
		}
	}
	return false
}

func (rule *slowRule) grpcHolds(q *Request) bool {
	g := rule.grpc
	if g == nil {
		return true
	}
	if q.HTTP == nil {
		return rule.invisible(q)
	}
	path := q.HTTP.Path
	if rule.deny() {
		path = strings.TrimSuffix(path, "/")
	}
	words := strings.Split(path, "/")
	if len(words) != 3 || words[0] != "" || words[1] == "" || words[2] == "" {
		return false
	}
	if g.services != nil && !slices.Contains(g.services, words[1]) || g.methods != nil && !slices.Contains(g.methods, words[2]) {
		return false
	}
	return rule.deny() || q.HTTP.Method == "POST" && slowIsGRPC(slowValues(q.HTTP, "content-type"))
}

func slowIsGRPC(types []string) bool {
	return len(types) == 1 && (types[0] == "application/grpc" || strings.HasPrefix(types[0], "application/grpc+") || strings.HasPrefix(types[0], "application/grpc;"))
}

func (rule *slowRule) whenHolds(q *Request) bool {
	if rule.when == "" {
		return true
	}
	when := slowWhens[rule.when]
	if when.http && q.HTTP == nil || when.subject && !hasProof(q) {
		return rule.invisible(q)
	}
	value, failed := when.eval(q)
	if failed {
		return rule.deny()
	}
	return value
}

func (rule *slowRule) asksHTTP() bool {
	return rule.http != nil || rule.grpc != nil || slowWhens[rule.when].http
}

// withoutHTTP is the rule with the conditions alone that a connection can meet
// before there is a request on it.
func (rule *slowRule) withoutHTTP() *slowRule {
	rest := *rule
	rest.http, rest.grpc = nil, nil
	if slowWhens[rest.when].http {
		rest.when = ""
	}
	return &rest
}

func (s *slowPolicy) decide(q *Request) (bool, string, Reason) {
	switch {
	case s.isRevoked(q.From):
		return false, "", RevokedFrom
	case s.isRevoked(q.To):
		return false, "", RevokedTo
	case speaksForAnother(q) && s.isRevoked(Peer{ID: q.HTTP.Subject}):
		return false, "", RevokedSubject
	case speaksForAnother(q) && s.isOutside(Peer{ID: q.HTTP.Subject}):
		return false, "", Ceiling
	case s.isOutside(q.From) || s.isOutside(q.To):
		return false, "", Ceiling
	}
	if ids := s.matching(q, "deny", false); len(ids) > 0 {
		return false, ids[0], DenyRule
	}
	if ids := s.matching(q, "allow", false); len(ids) > 0 {
		return true, ids[0], AllowRule
	}
	return false, "", NoRule
}

// matching returns the ids of the rules that match, sorted.
func (s *slowPolicy) matching(q *Request, effect string, shadow bool) []string {
	var ids []string
	for i := range s.rules {
		if rule := &s.rules[i]; rule.effect == effect && rule.shadow == shadow && s.matches(rule, q) {
			ids = append(ids, rule.id)
		}
	}
	slices.Sort(ids)
	return ids
}

// answer is the whole decision.
func (s *slowPolicy) answer(q *Request) Decision {
	var d Decision
	d.Allow, d.Rule, d.Reason = s.decide(q)
	switch d.Reason {
	case AllowRule:
		d.Shadow = s.matching(q, "deny", true)
	case NoRule:
		d.Shadow = s.matching(q, "allow", true)
		d.NeedsSubject = s.needsSubject(q)
	}
	d.Shadow = d.Shadow[:min(len(d.Shadow), 8)]
	return d
}

// dependsOnHTTP reports whether the requests to come can make a difference: an
// enforced rule asks for HTTP, and the connection meets all else it asks for.
func (s *slowPolicy) dependsOnHTTP(q *Request) bool {
	return slices.ContainsFunc(s.rules, func(rule slowRule) bool {
		return !rule.shadow && rule.asksHTTP() && s.matches(rule.withoutHTTP(), q)
	})
}

// limitsOf returns the limits that apply, by id.
func (s *slowPolicy) limitsOf(q *Request) []Limit {
	var limits []Limit
	for _, l := range s.limits {
		if q.Direction == Inbound && (l.on == nil || slices.Contains(l.on, q.Listener)) &&
			s.sideMatches(l.from, subject(q.From)) && s.sideMatches(l.to, subject(q.To)) {
			limits = append(limits, l.limit())
		}
	}
	slices.SortFunc(limits, func(a, b Limit) int { return strings.Compare(a.ID, b.ID) })
	return limits
}

func (l *slowLimit) limit() Limit {
	out := Limit{ID: l.id, Burst: l.burst, Connections: l.connections}
	if l.per == "all" {
		out.Per = PerAll
	}
	if l.rps != "" {
		out.RPS, _ = strconv.ParseFloat(l.rps, 64)
		if l.burst == 0 {
			out.Burst = max(1, int(math.Ceil(out.RPS)))
		}
	}
	return out
}
