// Package suggest turns what an access log saw into rules.
//
//	s := suggest.New(suggest.Options{})
//	stats, err := suggest.Read(log, s.Add)
//	…
//	rules := s.Rules()
//	text := s.Text(rules)
//	err = s.Check(text)
//
// Every rule allows what was seen and as little more as can be said: identities
// are named whole, methods and paths are those of requests, and only segments
// that look like identifiers, or of which there are many, become {name}. What a
// rule would have allowed stands in a comment above it, for whoever reviews it.
//
// It also reads records back as requests, so that a changed policy can be asked
// what it would have said to them.
package suggest

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

// Options of suggested rules. Zero means what stands beside it.
type Options struct {
	Denied   bool           // what was denied is to be allowed too; else only what passed
	Shadow   bool           // as shadow rules
	Policy   *policy.Policy // rules that are there: nothing is suggested for what they allow
	MinCount int            // requests of one method and pattern, or connections, that were seen less often are left out: 1
}

// Sightings are what was seen. Every record that was added is in one of the
// counts, some of which are known once Rules was called.
type Sightings struct {
	options     Options
	pairs       map[pair]map[call]*tally
	calls       int
	requests    map[string]bool // listeners that saw requests
	shadows     map[string]*ShadowRule
	first, last time.Time

	Taken   int // records that rules are suggested for
	Allowed int // that Options.Policy allows already
	Denied  int // that were denied
	Barred  int // that a deny, a ceiling or a revocation refuses: an allow would change nothing
	Rare    int // that were seen less often than Options.MinCount
	Idle    int // connections to a listener of requests, which count in their place
	Odd     int // that no rule can be made of
	Beyond  int // that there was no room for
}

// pair is who spoke to whom, where.
type pair struct{ from, to, listener, at string }

// call is a request; the zero call is a connection.
type call struct{ method, path string }

// tally counts the records of a call.
type tally struct {
	count  int
	denied int  // of those, how many the rules of that time refused
	left   bool // out of the rules
}

// Bounds of what is kept; some 100 MB.
const (
	maxPairs   = 50_000  // who spoke to whom, where
	maxCalls   = 200_000 // different requests, and connections, of all pairs
	maxPath    = 768     // bytes; a pattern has three times the room
	maxShadows = 1000    // shadow rules
)

// New returns sightings of nothing.
func New(o Options) *Sightings {
	return &Sightings{options: o, pairs: map[pair]map[call]*tally{}, requests: map[string]bool{}, shadows: map[string]*ShadowRule{}}
}

// Add takes a record of a decision in.
func (s *Sightings) Add(a *telemetry.Access) {
	if s.first.IsZero() || a.Time.Before(s.first) {
		s.first = a.Time
	}
	if a.Time.After(s.last) {
		s.last = a.Time
	}
	s.addShadows(a)
	if a.HTTP != nil && isListener(a.Listener) {
		s.requests[a.Listener] = true
	}
	q, err := Request(a)
	switch {
	case err != nil:
		s.Odd++
	case a.Decision == denied && !s.options.Denied:
		s.Denied++
	case a.Decision != allowed && a.Rule != "": // a deny by name was meant
		s.Barred++
	case s.options.Policy != nil && s.decided(q):
	default:
		s.keep(q, a.Decision != allowed)
	}
}

// decided counts a record that needs no rule, or that none would help.
func (s *Sightings) decided(q *policy.Request) bool {
	var d policy.Decision
	switch s.options.Policy.Decide(q, &d); d.Reason {
	case policy.AllowRule:
		s.Allowed++
	case policy.NoRule:
		return false
	default:
		s.Barred++
	}
	return true
}

func (s *Sightings) keep(q *policy.Request, refused bool) {
	key := pair{q.From.ID.String(), q.To.ID.String(), q.Listener, q.Direction.String()}
	if q.From.Unauthenticated {
		key.from = policy.Unauthenticated
	}
	var c call
	if q.HTTP != nil {
		c = call{q.HTTP.Method, q.HTTP.Path}
	}
	t := s.pairs[key][c]
	switch {
	case t != nil:
	case s.pairs[key] == nil && !key.nameable() || !c.nameable():
		s.Odd++
		return
	case s.calls == maxCalls, s.pairs[key] == nil && len(s.pairs) == maxPairs:
		s.Beyond++
		return
	default:
		if s.pairs[key] == nil {
			s.pairs[key] = map[call]*tally{}
		}
		t = &tally{}
		s.pairs[key][c] = t
		s.calls++
	}
	s.Taken++
	t.count++
	if refused {
		t.denied++
	}
}

// nameable reports whether a rule can name them. A SPIFFE ID may be a trust
// domain alone, and nobody knows who wrote the log.
func (p pair) nameable() bool {
	for _, id := range []string{p.from, p.to} {
		if _, err := policy.ParsePattern(id); err != nil && id != policy.Unauthenticated {
			return false
		}
	}
	return isListener(p.listener)
}

// nameable reports whether a pattern can cover it: none has empty segments or
// is about OPTIONS *.
func (c call) nameable() bool {
	if c == (call{}) {
		return true
	}
	if len(c.path) > maxPath || strings.Contains(c.path, "//") || c.path == asterisk {
		return false
	}
	q := policy.Question{As: policy.Unauthenticated, Do: c.method + " /"}
	_, err := q.Request()
	return err == nil
}

// isListener reports whether a configuration may have a listener of that name.
func isListener(name string) bool {
	return name != "" && len(name) <= 63 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_") == ""
}

// Span returns when the first and the last of the records ended.
func (s *Sightings) Span() (first, last time.Time) { return s.first, s.last }

// Rule is one suggested rule.
type Rule struct {
	ID        string
	From      []string // SPIFFE IDs, or unauthenticated alone
	To        string
	On        string
	At        string
	Methods   []string // nil: any, as for connections
	Paths     []string
	Count     int    // records that it allows
	Denied    int    // of those, refused at the time
	Example   string // a request
	Different int    // requests that differ
}

// Rules returns the rules that allow what was seen, by who is spoken to.
func (s *Sightings) Rules() []Rule {
	var rules []Rule
	for _, key := range slices.SortedFunc(maps.Keys(s.pairs), comparePairs) {
		for _, g := range s.groups(key) {
			rules = append(rules, Rule{
				From: []string{key.from}, To: key.to, On: key.listener, At: key.at,
				Methods: g.methods, Paths: g.paths, Count: g.count, Denied: g.denied, Different: g.different, Example: g.example,
			})
		}
	}
	rules = merge(rules)
	s.name(rules)
	return rules
}

// groups returns what rules a pair needs, and leaves out what is to be.
func (s *Sightings) groups(key pair) []group {
	calls := s.pairs[key]
	var out []group
	if t := calls[call{}]; t != nil && !t.left {
		switch {
		case s.requests[key.listener]: // a rule without methods and paths would allow them all
			t.left = true
			s.Idle += t.count
			s.Taken -= t.count
		case t.count < s.options.MinCount:
			s.rare(t)
		default:
			out = append(out, group{count: t.count, denied: t.denied})
		}
	}
	return append(out, generalise(calls, s.options.MinCount, s.rare)...)
}

func (s *Sightings) rare(t *tally) {
	t.left = true
	s.Rare += t.count
	s.Taken -= t.count
}

func comparePairs(a, b pair) int {
	return cmp.Or(strings.Compare(a.to, b.to), strings.Compare(a.listener, b.listener), strings.Compare(a.at, b.at), strings.Compare(a.from, b.from))
}

// merge makes one rule of those that differ in who calls. Whom the rules of that
// time refused stands apart, for whoever decides on it.
func merge(rules []Rule) []Rule {
	var out []Rule
	at := map[string]int{}
	for _, r := range rules {
		key := fmt.Sprintf("%q %q %q %q %q %t %t", r.To, r.On, r.At, r.Methods, r.Paths, r.From[0] == policy.Unauthenticated, r.Denied == r.Count)
		i, ok := at[key]
		if !ok {
			at[key] = len(out)
			out = append(out, r)
			continue
		}
		out[i].From = append(out[i].From, r.From...)
		out[i].Count += r.Count
		out[i].Denied += r.Denied
		out[i].Different += r.Different
	}
	return out
}

// maxWord bounds what an id takes of an identity; in bytes.
const maxWord = 40

// name gives each rule an id that says what it is about, and that no rule has
// that is there.
func (s *Sightings) name(rules []Rule) {
	taken := map[string]bool{}
	for _, id := range s.options.Policy.Compare(nil).Added {
		taken[id] = true
	}
	word := func(id string) string { return last(id)[:min(maxWord, len(last(id)))] }
	tried := map[string]int{}
	for i := range rules {
		r := &rules[i]
		who := word(r.From[0])
		if len(r.From) > 1 {
			who = fmt.Sprintf("%s-and-%d", who, len(r.From)-1)
		}
		verb := "speaks-to"
		if len(r.Methods) > 0 && !slices.ContainsFunc(r.Methods, func(m string) bool { return m != "GET" && m != "HEAD" }) {
			verb = "reads"
		}
		base := who + "-" + verb + "-" + word(r.To)
		r.ID = base
		for n := max(2, tried[base]); taken[r.ID]; n++ {
			r.ID, tried[base] = fmt.Sprintf("%s-%d", base, n), n
		}
		taken[r.ID] = true
	}
}

// last returns the last segment of an ID.
func last(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// Check reports whether the text is a policy that allows every record which
// rules were suggested for. An error is a mistake of this package.
func (s *Sightings) Check(text string) error {
	p, err := policy.Parse("suggested rules", []byte(text))
	if err != nil {
		return err
	}
	for key, calls := range s.pairs {
		q, err := key.request()
		if err != nil {
			return err
		}
		for c, t := range calls {
			if t.left {
				continue
			}
			if q.HTTP = nil; c != (call{}) {
				q.HTTP = &policy.HTTP{Method: c.method, Path: c.path}
			}
			var d policy.Decision
			if p.Decide(q, &d); !d.Allow && (!s.options.Shadow || len(d.Shadow) == 0) {
				return fmt.Errorf("suggested rules do not allow what was seen: %s %s from %s to %s, %s on %q", c.method, c.path, key.from, key.to, key.at, key.listener)
			}
		}
	}
	return nil
}

func (p pair) request() (*policy.Request, error) {
	q := policy.Question{As: p.from, To: p.to, On: p.listener, At: p.at}
	return q.Request()
}
