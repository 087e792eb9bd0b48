package policy

import (
	"fmt"
	"math"
	"slices"
	"strconv"
)

// Limit bounds what the identities that it matches may do at an inbound
// listener. The package only says which limits apply; whoever asks keeps the
// state and enforces them.
type Limit struct {
	ID          string
	Per         Per
	RPS         float64 // requests a second, on a tcp listener new connections; 0: unbounded
	Burst       int     // how many at once; at least 1 where RPS is set
	Connections int     // live at once; 0: unbounded
}

// Per says who shares a limit.
type Per uint8

// The sharers.
const (
	PerIdentity Per = iota // each SPIFFE ID has its own, plaintext each address it comes from
	PerAll                 // all that match have one together
)

// String returns the word that rule files use.
func (p Per) String() string {
	if p == PerAll {
		return "all"
	}
	return "identity"
}

// limit is a Limit with whom it is for.
type limit struct {
	Limit
	on       []string // sorted; none: every listener
	from, to subjects
	place    place
}

// Bounds of limits. All that may apply are asked of every connection.
const (
	maxLimits      = 256
	maxRPS         = 1e6
	maxBurst       = 1 << 20
	maxConnections = 1 << 24
)

// Limits appends the limits that apply to the request, by id. It allocates
// nothing where dst has room and no limit names a large group. The pointers stay good as long as the policy.
func (p *Policy) Limits(r *Request, dst []*Limit) []*Limit {
	if p == nil || r.Direction != Inbound {
		return dst
	}
	from, to := scanned{peer: &r.From}, scanned{peer: &r.To}
	for i := range p.limits {
		l := &p.limits[i]
		if (len(l.on) == 0 || slices.Contains(l.on, r.Listener)) && from.match(&l.from) && to.match(&l.to) {
			dst = append(dst, &l.Limit)
		}
	}
	return dst
}

// LimitListeners returns, for each limit, the listeners that it names in `on`,
// in the order of limit ids, with the limit's id as Rule and its place.
func (p *Policy) LimitListeners() []Mention {
	if p == nil {
		return nil
	}
	var mentions []Mention
	for i := range p.limits {
		l := &p.limits[i]
		for _, name := range l.on {
			mentions = append(mentions, Mention{name, l.ID, l.place.file, l.place.line, l.place.column})
		}
	}
	return mentions
}

// limit takes in one entry of limits.
func (l *loader) limit(n *node, path func() string) {
	m := limit{place: n.at}
	if len(l.limits) == maxLimits {
		l.findings.add(n.at, path(), "more than %d limits", maxLimits)
		return
	}
	var on []node
	seen, ok := l.block(n, path, limitKeyNames, func(p *pair, path func() string) {
		switch p.key {
		case "id":
			m.ID = l.id(&p.value, path, l.limitIDs)
		case "on":
			on = p.value.items
			m.on = l.listeners(&p.value, path)
		case "from":
			l.subjects(&m.from, groupRef{rule: -1, limit: len(l.limits), side: sideFrom}, &p.value, path)
		case "to":
			l.subjects(&m.to, groupRef{rule: -1, limit: len(l.limits), side: sideTo}, &p.value, path)
		case "per":
			l.per(&m, &p.value, path)
		case "rps":
			m.RPS = l.rate(&p.value, path)
		case "burst":
			m.Burst = l.number(&p.value, path, maxBurst)
		case "connections":
			m.Connections = l.number(&p.value, path, maxConnections)
		}
	})
	switch {
	case !ok:
		return
	case !slices.Contains(seen, "id"):
		l.findings.add(n.at, path(), "id is missing")
	case !slices.Contains(seen, "rps") && !slices.Contains(seen, "connections"):
		l.findings.add(n.at, path(), "rps or connections is missing: it limits nothing")
	case slices.Contains(seen, "burst") && !slices.Contains(seen, "rps"):
		l.findings.add(n.at, path(), "burst goes with rps")
	}
	if m.RPS > 0 && m.Burst == 0 {
		m.Burst = int(math.Ceil(max(1, m.RPS)))
	}
	l.mention(m.ID, on)
	slices.Sort(m.on)
	m.on = slices.Compact(m.on)
	l.limits = append(l.limits, m)
}

func (l *loader) per(m *limit, n *node, path func() string) {
	switch s, ok := l.text(n, path); {
	case !ok || s == PerIdentity.String():
	case s == PerAll.String():
		m.Per = PerAll
	default:
		l.findings.add(n.at, path(), "must be identity or all, not %s%s", n.describe(), didYouMean(s, "identity", "all"))
	}
}

func (l *loader) rate(n *node, path func() string) float64 {
	v, err := strconv.ParseFloat(n.text, 64)
	if n.kind != number || err != nil || !(v > 0 && v <= maxRPS) {
		l.findings.add(n.at, path(), "must be a number above 0, at most %d, not %s", int(maxRPS), n.describe())
		return 0
	}
	return v
}

// number reads a whole number from 1 to most.
func (l *loader) number(n *node, path func() string, most int) int {
	v, err := strconv.Atoi(n.text)
	if n.kind != number || err != nil || v < 1 || v > most {
		l.findings.add(n.at, path(), "must be a whole number from 1 to %d, not %s", most, n.describe())
		return 0
	}
	return v
}

// String says what the limit bounds, for a person.
func (l *Limit) String() string {
	switch {
	case l.RPS == 0:
		return fmt.Sprintf("%d connections per %s", l.Connections, l.Per)
	case l.Connections == 0:
		return fmt.Sprintf("%g a second per %s, %d at once", l.RPS, l.Per, l.Burst)
	}
	return fmt.Sprintf("%g a second per %s, %d at once, and %d connections", l.RPS, l.Per, l.Burst, l.Connections)
}
