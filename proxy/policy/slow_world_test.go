package policy

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Random policies and requests over a world so small that they meet.

var (
	worldDomains  = []string{"a.org", "b.org", "c"}
	worldSegments = []string{"ns", "sa", "web", "we", "web2", "spire", "x"}
	worldOn       = []string{"l1", "l2", "l3", "l4"}

	worldNetworks  = []string{"10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "192.0.2.0/24", "fd00::/8", "fd00::1", "0.0.0.0/0", "::/0"}
	worldAddresses = []string{"10.1.2.3", "10.9.0.1", "192.0.2.7", "fd00::1", "fd00::2", "2001:db8::1", "::ffff:10.1.2.3", "fe80::1%eth0"}
	worldPorts     = []string{"80", "8443", "9050", "9000-9100", "1-1023", "1024-65535"}
	worldNames     = []string{"shop.example", "a.shop.example", "b.a.shop.example", "pay.example", "ashop.example"}
	worldSuffixes  = []string{"*.shop.example", "*.a.shop.example", "*.example"}

	worldMethods      = []string{"GET", "HEAD", "POST", "PUT"}
	worldPathSegments = []string{"v1", "v2", "orders", "items", "7"}
	worldServices     = []string{"shop.Orders", "shop.Stock", "v1"}
	worldCalls        = []string{"Get", "Put", "orders"}
	worldHeaders      = map[string][]string{
		"x-env":        {"prod", "test", "dev"},
		"x-tag":        {"blue", "green", "Blue"},
		"x-count":      {"7", "3", "many"},
		"trace":        {"1", ""},
		"content-type": {"application/grpc", "application/grpc+proto", "application/grpc-web", "application/json"},
	}
	worldHeaderNames = slices.Sorted(maps.Keys(worldHeaders))
	worldWhens       = slices.Sorted(maps.Keys(slowWhens))
)

func pick[T any](r *rand.Rand, items []T) T { return items[r.IntN(len(items))] }

// pickSome picks up to n different items.
func pickSome(r *rand.Rand, n int, items []string) []string {
	items = slices.Clone(items)
	r.Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
	return items[:min(1+r.IntN(n), len(items))]
}

func several(r *rand.Rand, n int, f func(*rand.Rand) string) []string {
	out := make([]string, 1+r.IntN(n))
	for i := range out {
		out[i] = f(r)
	}
	return out
}

// different is several without repetition.
func different(r *rand.Rand, n int, f func(*rand.Rand) string) []string {
	out := several(r, n, f)
	slices.Sort(out)
	return slices.Compact(out)
}

func worldPath(r *rand.Rand, wild int) string {
	var b strings.Builder
	for n := 1 + r.IntN(4); n > 0; n-- {
		segment := pick(r, worldSegments)
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
	return "spiffe://" + pick(r, worldDomains) + worldPath(r, 35)
}

// worldURLPattern is a pattern of http.paths.
func worldURLPattern(r *rand.Rand) string {
	switch r.IntN(30) {
	case 0:
		return "/"
	case 1:
		return "/**"
	case 2:
		return "/v1/caf%C3%A9"
	}
	var b strings.Builder
	depth := 1 + r.IntN(4)
	for i := range depth {
		segment := pick(r, worldPathSegments)
		switch {
		case r.IntN(10) < 3:
			segment = fmt.Sprintf("{%s%d}", pick(r, []string{"id", "name", "x_"}), i)
		case i == depth-1 && r.IntN(4) == 0:
			segment = "**"
		case i == depth-1 && r.IntN(12) == 0:
			segment += "/"
		}
		b.WriteString("/" + segment)
	}
	return b.String()
}

// worldURL is the path of a request that has nothing to do with a pattern.
func worldURL(r *rand.Rand) string {
	switch r.IntN(30) {
	case 0:
		return "/"
	case 1:
		return "/v1/caf%C3%A9"
	case 2, 3:
		return "/" + pick(r, worldServices) + "/" + pick(r, worldCalls)
	}
	var b strings.Builder
	for range 1 + r.IntN(5) {
		b.WriteString("/" + pick(r, worldPathSegments))
	}
	switch r.IntN(20) {
	case 0, 1:
		b.WriteString("/")
	case 2:
		return strings.Replace(b.String(), "/", "//", 1)
	case 3:
		b.WriteString("//")
	}
	return b.String()
}

func worldHostPattern(r *rand.Rand) string {
	return pick(r, slices.Concat(worldNames, worldSuffixes, []string{"[fd00::1]", "10.1.2.3"})) + pick(r, []string{"", "", ":8443", ":80"})
}

func worldNamePattern(r *rand.Rand) string {
	return pick(r, slices.Concat(worldNames, worldSuffixes))
}

func worldPeer(r *rand.Rand) Peer {
	switch r.IntN(20) {
	case 0:
		return Peer{Unauthenticated: r.IntN(2) == 0}
	case 1:
		return Peer{ID: spiffeid.RequireFromString("spiffe://" + pick(r, worldDomains))}
	}
	p := peerNamed(r, "spiffe://"+pick(r, worldDomains)+worldPath(r, 0))
	p.Unauthenticated = r.IntN(30) == 0
	return p
}

func peerNamed(r *rand.Rand, id string) Peer {
	return Peer{ID: spiffeid.RequireFromString(id), Serial: fmt.Sprintf("%x", 1+r.IntN(40)), Issuer: fmt.Sprintf("a%d", r.IntN(3))}
}

// worldConnection is a request without HTTP.
func worldConnection(r *rand.Rand) Request {
	q := Request{
		Listener: pick(r, append(worldOn, "l5")), Direction: Direction(r.IntN(2)),
		From: worldPeer(r), To: worldPeer(r),
		Port: pick(r, []uint16{0, 80, 1023, 1024, 8443, 9000, 9050, 9100, 9101}),
		SNI:  pick(r, append(worldNames, "")),
		Time: time.Unix(1767225600+r.Int64N(4*86400), r.Int64N(1e9)).In(time.FixedZone("", 3600*(r.IntN(25)-12))), // from 1 January 2026
	}
	if r.IntN(8) > 0 {
		q.Source = netip.AddrPortFrom(netip.MustParseAddr(pick(r, worldAddresses)), pick(r, []uint16{1023, 1024, 40000}))
	}
	return q
}

func worldHTTP(r *rand.Rand) *HTTP {
	h := &HTTP{
		Method: pick(r, append(worldMethods, "get")),
		Host:   pick(r, slices.Concat(worldNames, []string{"[fd00::1]", "10.1.2.3", "example"})) + pick(r, []string{"", ":8443", ":80"}),
		Path:   worldURL(r),
	}
	if r.IntN(30) == 0 {
		h.Method, h.Path = "OPTIONS", "*"
	}
	for range r.IntN(4) {
		h.Headers = append(h.Headers, worldHeader(r))
	}
	if r.IntN(6) == 0 {
		h.Subject = spiffeid.RequireFromString("spiffe://" + pick(r, worldDomains) + worldPath(r, 0))
	}
	h.NoProof = r.IntN(16) == 0
	return h
}

func worldHeader(r *rand.Rand) Header {
	name := pick(r, worldHeaderNames)
	value := pick(r, worldHeaders[name])
	if r.IntN(4) == 0 {
		value += pick(r, []string{",", ", ", ",\t", " , "}) + pick(r, worldHeaders[name])
	}
	return Header{name, strings.Trim(value, " \t")}
}

// worldRequest is a request that has nothing to do with a policy.
func worldRequest(r *rand.Rand) Request {
	q := worldConnection(r)
	if r.IntN(4) > 0 {
		q.HTTP = worldHTTP(r)
	}
	return q
}

// likelyConnection is one that meets most of what some rule asks for: chance
// would seldom meet all conditions at once.
func (s *slowPolicy) likelyConnection(r *rand.Rand) Request {
	q := worldConnection(r)
	if len(s.revoked) > 0 && r.IntN(16) == 0 {
		*pick(r, []*Peer{&q.From, &q.To}) = s.likelyPeer(r, pick(r, s.revoked))
		return q
	}
	if len(s.rules) == 0 || r.IntN(8) == 0 {
		return q
	}
	rule := pick(r, s.rules)
	spoil := r.IntN(14) // what is left to chance; most often nothing
	meet := func(n int, given []string, f func(string)) {
		if given != nil && n != spoil {
			f(pick(r, given))
		}
	}
	meet(0, rule.on, func(name string) { q.Listener = name })
	meet(1, rule.from, func(subject string) { q.From = s.likelyPeer(r, subject) })
	meet(2, rule.to, func(subject string) { q.To = s.likelyPeer(r, subject) })
	meet(3, rule.sourceIP, func(network string) {
		near := slices.DeleteFunc(slices.Clone(worldAddresses), func(a string) bool {
			return !slowContains(network, slowAddress(&Request{Source: netip.AddrPortFrom(netip.MustParseAddr(a), 0)}))
		})
		q.Source = netip.AddrPortFrom(netip.MustParseAddr(pick(r, near)), 40000)
	})
	meet(4, rule.ports, func(ports string) {
		for !(&slowRule{effect: "allow", ports: []string{ports}}).portsHold(&q) {
			q.Port = pick(r, []uint16{80, 1023, 1024, 8443, 9000, 9050, 9100})
		}
	})
	meet(5, rule.sni, func(pattern string) { q.SNI = likelyName(r, pattern) })
	if rule.at != "" && spoil != 6 {
		q.Direction = map[string]Direction{"inbound": Inbound, "outbound": Outbound}[rule.at]
	} else if rule.sourceIP != nil || rule.notSourceIP != nil {
		q.Direction = Inbound
	}
	return q
}

func likelyName(r *rand.Rand, pattern string) string {
	suffix, ok := strings.CutPrefix(pattern, "*")
	switch {
	case !ok:
		return pattern
	case r.IntN(6) == 0:
		return suffix[1:]
	}
	return pick(r, []string{"a", "b.a", "q"}) + suffix
}

func (s *slowPolicy) likelyPeer(r *rand.Rand, subject string) Peer {
	if name, ok := strings.CutPrefix(subject, "group:"); ok {
		subject = pick(r, s.groups[name])
	}
	if subject == "unauthenticated" {
		return Peer{Unauthenticated: true}
	}
	words := strings.Split(subject, "/")
	for i, word := range words {
		switch word {
		case "*":
			words[i] = pick(r, worldSegments)
		case "**":
			words[i] = strings.Join(several(r, 2, func(r *rand.Rand) string { return pick(r, worldSegments) }), "/")
		}
	}
	return peerNamed(r, strings.Join(words, "/"))
}

// likelyHTTP is a request on a connection that meets most of what one of the
// rules asks for.
func (s *slowPolicy) likelyHTTP(r *rand.Rand, q *Request, rules []slowRule) *HTTP {
	h := worldHTTP(r)
	if id := q.From.ID; !q.From.Unauthenticated && r.IntN(8) == 0 {
		h.Subject = id
	}
	if len(rules) == 0 || r.IntN(10) == 0 {
		return h
	}
	rule := pick(r, rules)
	spoil := r.IntN(8)
	switch list := rule.subjects(); {
	case list == nil:
	case r.IntN(3) > 0:
		h.Subject = s.likelyPeer(r, pick(r, list)).ID
	default:
		h.Subject = spiffeid.ID{}
	}
	if len(s.revoked) > 0 && r.IntN(24) == 0 {
		h.Subject = s.likelyPeer(r, pick(r, s.revoked)).ID
	}
	if rule.grpc != nil {
		if spoil != 0 {
			h.Method = "POST"
		}
		if spoil != 1 {
			h.Headers = append(h.Headers, Header{"content-type", "application/grpc" + pick(r, []string{"", "+proto", "+json"})})
		}
		service, method := pick(r, append(rule.grpc.services, worldServices...)), pick(r, append(rule.grpc.methods, worldCalls...))
		h.Path = "/" + service + "/" + method + pick(r, []string{"", "", "", "", "", "", "", "", "/", "/x"})
	}
	if rule.http == nil {
		return h
	}
	if rule.http.methods != nil && spoil != 0 {
		h.Method = pick(r, rule.http.methods)
	}
	if rule.http.hosts != nil && spoil != 1 {
		name, port := slowSplitPort(pick(r, rule.http.hosts))
		if port == "" || r.IntN(8) == 0 {
			port = pick(r, []string{"", "80", "8443"})
		}
		h.Host = likelyName(r, name) + map[bool]string{true: ":" + port}[port != ""]
	}
	if rule.http.paths != nil && spoil != 2 {
		h.Path = likelyPath(r, pick(r, rule.http.paths))
	}
	if spoil != 3 {
		h.likelyHeaders(r, rule.http.headers)
	}
	return h
}

func likelyPath(r *rand.Rand, pattern string) string {
	words := strings.Split(pattern, "/")
	for i, word := range words {
		switch {
		case word == "**":
			words[i] = strings.Join(several(r, 3, func(r *rand.Rand) string { return pick(r, append(worldPathSegments, "")) }), "/")
		case strings.HasPrefix(word, "{"):
			words[i] = pick(r, worldPathSegments)
		}
	}
	path := strings.Join(words, "/")
	switch r.IntN(12) {
	case 0:
		return path + "/"
	case 1:
		if short := path[:strings.LastIndex(path, "/")]; short != "" {
			return short
		}
	}
	return path
}

func (h *HTTP) likelyHeaders(r *rand.Rand, wants []slowHeader) {
	for _, want := range wants {
		if want.word != "present" {
			h.Headers = slices.DeleteFunc(h.Headers, func(have Header) bool { return have.Name == want.name })
		}
		switch want.word {
		case "absent":
			continue
		case "present":
			h.Headers = append(h.Headers, Header{want.name, pick(r, worldHeaders[want.name])})
			continue
		}
		for range 1 + r.IntN(2) {
			value := pick(r, want.values)
			if r.IntN(8) == 0 {
				value = pick(r, worldHeaders[want.name])
			}
			h.Headers = append(h.Headers, Header{want.name, value})
		}
	}
	r.Shuffle(len(h.Headers), func(i, j int) { h.Headers[i], h.Headers[j] = h.Headers[j], h.Headers[i] })
}

// worldSubjects is a list for from or to.
func (s *slowPolicy) worldSubjects(r *rand.Rand, plaintext bool) []string {
	most := 3
	if r.IntN(10) == 0 {
		most = 30 // large enough to become a list
	}
	list := several(r, most, worldPattern)
	if names := slices.Sorted(maps.Keys(s.groups)); len(names) > 0 && r.IntN(3) == 0 {
		list = append(list, "group:"+pick(r, names))
		if r.IntN(2) == 0 {
			list = list[len(list)-1:]
		}
	}
	if plaintext && r.IntN(10) == 0 {
		list = append(list, "unauthenticated")
	}
	return list
}

// identityPolicy has rules that ask for on, at, from and to only.
func identityPolicy(r *rand.Rand) *slowPolicy {
	s := &slowPolicy{groups: map[string][]string{}, ceilings: map[string][]string{}}
	for i := range r.IntN(5) {
		s.groups[fmt.Sprintf("g%d", i)] = several(r, 10, worldPattern)
	}
	for i := range r.IntN(40) {
		rule := slowRule{id: fmt.Sprintf("r%d", i), effect: "allow"}
		if r.IntN(3) == 0 {
			rule.effect = "deny"
		}
		if r.IntN(3) == 0 {
			rule.at = pick(r, []string{"inbound", "outbound"})
		}
		if r.IntN(3) == 0 {
			rule.on = several(r, 3, func(r *rand.Rand) string { return pick(r, worldOn) })
		}
		if !rule.deny() || r.IntN(2) == 0 {
			rule.from = s.worldSubjects(r, rule.deny() || rule.at != "outbound")
		}
		if r.IntN(2) == 0 {
			rule.to = s.worldSubjects(r, false)
		}
		s.rules = append(s.rules, rule)
	}
	for range r.IntN(3) {
		s.revoked = append(s.revoked, "spiffe://"+pick(r, worldDomains)+worldPath(r, 10))
		s.certs = append(s.certs, [2]string{fmt.Sprintf("a%d", r.IntN(3)), fmt.Sprintf("%x", 1+r.IntN(40))})
	}
	for range r.IntN(2) {
		s.ceilings[pick(r, worldDomains)] = several(r, 4, func(r *rand.Rand) string { return worldPath(r, 50) })
	}
	return s
}

// mixedPolicy has rules that ask for anything, and limits.
func mixedPolicy(r *rand.Rand) *slowPolicy {
	s := identityPolicy(r)
	if r.IntN(2) == 0 {
		s.revoked, s.certs = nil, nil
	}
	for i := range s.rules {
		rule := &s.rules[i]
		if r.IntN(4) > 0 {
			rule.worldConditions(r)
			s.worldSpeakers(r, rule)
		}
		if rule.deny() && r.IntN(3) > 0 {
			rule.narrow(r)
		}
	}
	s.worldLimits(r)
	return s
}

// narrow gives a rule something to ask for: denies that ask for nothing leave
// nothing to the rest.
func (rule *slowRule) narrow(r *rand.Rand) {
	switch r.IntN(3) {
	case 0:
		rule.http = worldHTTPBlock(r)
		rule.grpc = nil
	case 1:
		rule.ports = different(r, 1, func(r *rand.Rand) string { return pick(r, worldPorts) })
	case 2:
		rule.when = pick(r, worldWhens)
	}
}

// pairPolicy has many rules on the same identities: they differ in what they
// ask of a request.
func pairPolicy(r *rand.Rand) *slowPolicy {
	s := &slowPolicy{groups: map[string][]string{"g": several(r, 3, worldPattern)}, ceilings: map[string][]string{}}
	var pairs [2][2][]string
	for i := range pairs {
		pairs[i] = [2][]string{s.worldSubjects(r, false), s.worldSubjects(r, false)}
	}
	paths := different(r, 12, worldURLPattern) // so few that rules share them
	onlyPaths, denies := r.IntN(3) == 0, pick(r, []int{3, 8, 40})
	for i := range 2 + r.IntN(59) {
		pair := pairs[min(r.IntN(5), 1)]
		rule := slowRule{id: fmt.Sprintf("r%d", i), effect: "allow", from: pair[0], to: pair[1]}
		if r.IntN(denies) == 0 {
			rule.effect = "deny"
		}
		rule.shadow = r.IntN(6) == 0
		rule.http = &slowHTTP{paths: pickSome(r, 2, paths)}
		if !onlyPaths || rule.deny() {
			rule.pairConditions(r)
			s.worldSpeakers(r, &rule)
		}
		s.rules = append(s.rules, rule)
	}
	s.worldLimits(r)
	return s
}

// worldSpeakers may let a rule ask whom requests speak for.
func (s *slowPolicy) worldSpeakers(r *rand.Rand, rule *slowRule) {
	if r.IntN(4) > 0 && (rule.grpc == nil || r.IntN(2) == 0) {
		return
	}
	list := s.worldSubjects(r, false)
	switch {
	case rule.grpc != nil:
		rule.grpc.subjects = list
	case rule.http != nil:
		rule.http.subjects = list
	default:
		rule.http = &slowHTTP{subjects: list}
	}
}

func (rule *slowRule) pairConditions(r *rand.Rand) {
	if r.IntN(2) == 0 {
		rule.http.methods = pickSome(r, 2, worldMethods)
	}
	if r.IntN(4) == 0 {
		rule.http.hosts = different(r, 2, worldHostPattern)
	}
	if r.IntN(3) == 0 {
		rule.http.headers = worldHeaderBlock(r)
	}
	switch r.IntN(16) {
	case 0:
		rule.http = &slowHTTP{headers: worldHeaderBlock(r)}
	case 1:
		rule.http, rule.grpc = nil, worldGRPC(r)
	case 2:
		rule.when = pick(r, worldWhens)
	case 3:
		rule.ports = pickSome(r, 2, worldPorts)
	case 4:
		rule.http, rule.when = nil, pick(r, worldWhens)
	}
}

// worldPolicy is a policy of any kind.
func worldPolicy(r *rand.Rand) *slowPolicy {
	return worldKinds[r.IntN(len(worldKinds))].policy(r)
}

var worldKinds = []struct {
	name   string
	policy func(*rand.Rand) *slowPolicy
}{
	{"identities", identityPolicy},
	{"pair", pairPolicy},
	{"mixed", mixedPolicy},
}

func (rule *slowRule) worldConditions(r *rand.Rand) {
	rule.shadow = r.IntN(5) == 0
	switch r.IntN(5) {
	case 0, 1:
		rule.http = worldHTTPBlock(r)
	case 2:
		rule.grpc = worldGRPC(r)
	}
	if rule.at != "outbound" && r.IntN(4) == 0 {
		rule.sourceIP = pickSome(r, 3, worldNetworks)
	}
	if rule.at != "outbound" && r.IntN(6) == 0 {
		rule.notSourceIP = pickSome(r, 2, worldNetworks[1:5])
	}
	if r.IntN(5) == 0 {
		rule.ports = pickSome(r, 2, worldPorts)
	}
	if r.IntN(5) == 0 {
		rule.sni = different(r, 2, worldNamePattern)
	}
	if r.IntN(4) == 0 {
		rule.when = pick(r, worldWhens)
	}
}

func worldHTTPBlock(r *rand.Rand) *slowHTTP {
	h := &slowHTTP{}
	if r.IntN(2) == 0 {
		h.methods = pickSome(r, 3, worldMethods)
	}
	if r.IntN(3) == 0 {
		h.hosts = different(r, 3, worldHostPattern)
	}
	if r.IntN(3) == 0 {
		h.headers = worldHeaderBlock(r)
	}
	if r.IntN(2) == 0 || h.methods == nil && h.hosts == nil && h.headers == nil {
		h.paths = different(r, 4, worldURLPattern)
	}
	return h
}

func worldHeaderBlock(r *rand.Rand) []slowHeader {
	var headers []slowHeader
	for _, name := range pickSome(r, 2, worldHeaderNames) {
		h := slowHeader{name: name}
		switch r.IntN(4) {
		case 0:
			h.word = "present"
		case 1:
			h.word = "absent"
		default:
			h.values = slices.DeleteFunc(pickSome(r, 2, worldHeaders[name]), func(v string) bool { return v == "" })
			if len(h.values) == 0 {
				h.values = []string{"1"}
			}
		}
		headers = append(headers, h)
	}
	return headers
}

func worldGRPC(r *rand.Rand) *slowGRPC {
	g := &slowGRPC{}
	if r.IntN(3) > 0 {
		g.services = pickSome(r, 2, worldServices)
	}
	if r.IntN(2) == 0 || g.services == nil {
		g.methods = pickSome(r, 2, worldCalls)
	}
	return g
}

func (s *slowPolicy) worldLimits(r *rand.Rand) {
	for i := range r.IntN(5) {
		l := slowLimit{id: fmt.Sprintf("r%d", i), per: pick(r, []string{"", "identity", "all"})} // limits and rules may have the same ids
		if r.IntN(2) == 0 {
			l.on = pickSome(r, 2, worldOn)
		}
		if r.IntN(2) == 0 {
			l.from = s.worldSubjects(r, true)
		}
		if r.IntN(3) == 0 {
			l.to = s.worldSubjects(r, false)
		}
		if r.IntN(3) > 0 {
			l.rps = pick(r, []string{"0.25", "1", "2.5", "50", "1000000"})
			if r.IntN(2) == 0 {
				l.burst = 1 + r.IntN(100)
			}
		}
		if l.rps == "" || r.IntN(2) == 0 {
			l.connections = 1 + r.IntN(100)
		}
		s.limits = append(s.limits, l)
	}
}

// slowConditions are the keys of a rule that narrow it.
var slowConditions = []struct {
	key  string
	drop func(*slowRule) bool // reports whether the rule had it
}{
	{"on", func(r *slowRule) bool { had := r.on != nil; r.on = nil; return had }},
	{"at", func(r *slowRule) bool { had := r.at != ""; r.at = ""; return had }},
	{"from", func(r *slowRule) bool { had := r.from != nil; r.from = nil; return had }},
	{"to", func(r *slowRule) bool { had := r.to != nil; r.to = nil; return had }},
	{"source_ip", func(r *slowRule) bool { had := r.sourceIP != nil; r.sourceIP = nil; return had }},
	{"not_source_ip", func(r *slowRule) bool { had := r.notSourceIP != nil; r.notSourceIP = nil; return had }},
	{"ports", func(r *slowRule) bool { had := r.ports != nil; r.ports = nil; return had }},
	{"sni", func(r *slowRule) bool { had := r.sni != nil; r.sni = nil; return had }},
	{"when", func(r *slowRule) bool { had := r.when != ""; r.when = ""; return had }},
	{"grpc", func(r *slowRule) bool { had := r.grpc != nil; r.grpc = nil; return had }},
	{"http.methods", dropHTTP(func(h *slowHTTP) *[]string { return &h.methods })},
	{"http.hosts", dropHTTP(func(h *slowHTTP) *[]string { return &h.hosts })},
	{"http.paths", dropHTTP(func(h *slowHTTP) *[]string { return &h.paths })},
	{"subjects", func(r *slowRule) bool {
		if r.grpc == nil || r.grpc.subjects == nil {
			return dropHTTP(func(h *slowHTTP) *[]string { return &h.subjects })(r)
		}
		g := *r.grpc
		g.subjects = nil
		r.grpc = &g
		return true
	}},
	{"http.headers", func(r *slowRule) bool {
		if r.http == nil || r.http.headers == nil {
			return false
		}
		h := *r.http
		h.headers = nil
		r.http = &h
		return true
	}},
}

func dropHTTP(field func(*slowHTTP) *[]string) func(*slowRule) bool {
	return func(r *slowRule) bool {
		if r.http == nil || *field(r.http) == nil {
			return false
		}
		h := *r.http
		*field(&h) = nil
		r.http = &h
		return true
	}
}

// TestWorldsMeet: the worlds are of use only where each condition, of either
// effect, often is the one that decides whether its rule matches.
func TestWorldsMeet(t *testing.T) {
	t.Parallel()
	decides := map[string]*[2]int{} // by effect and key: how often it does not hold, and holds
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 4))
		s := mixedPolicy(r)
		for range 40 {
			q := s.likelyConnection(r)
			if q.HTTP = s.likelyHTTP(r, &q, s.rules); r.IntN(5) == 0 {
				q.HTTP = nil
			}
			for i := range s.rules {
				s.rules[i].count(s, &q, decides)
			}
		}
	}
	for _, condition := range slowConditions {
		for _, effect := range []string{"allow", "deny"} {
			n := decides[effect+" "+condition.key]
			if n == nil || n[0] < 20 || n[1] < 20 {
				t.Errorf("%s of an %s: not held, and held, %v times where all else holds, want 20 of each", condition.key, effect, n)
			}
		}
	}
}

func (rule *slowRule) count(s *slowPolicy, q *Request, decides map[string]*[2]int) {
	holds := s.matches(rule, q)
	for _, condition := range slowConditions {
		rest := *rule
		if !condition.drop(&rest) || rest.http != nil && len(rest.http.methods)+len(rest.http.hosts)+len(rest.http.paths)+len(rest.http.headers)+len(rest.http.subjects) == 0 && q.HTTP == nil {
			continue
		}
		if !s.matches(&rest, q) {
			continue
		}
		key := rule.effect + " " + condition.key
		if decides[key] == nil {
			decides[key] = new([2]int)
		}
		if holds {
			decides[key][1]++
		} else {
			decides[key][0]++
		}
	}
}
