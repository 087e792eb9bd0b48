// Package suggest turns what an access log saw into rules.
//
//	var s suggest.Sightings
//	stats, err := suggest.Read(log, func(a *telemetry.Access) { s.Add(a) })
//	…
//	text := s.Rules(suggest.Options{})
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
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/policy"
)

// Stats is what became of the lines of an access log.
type Stats struct {
	Records int // that came to a decision
	Other   int // records that did not, such as failed handshakes
	Strange int // lines that are no records
}

// maxLine bounds a line, in bytes; the proxy writes none that is longer.
const maxLine = 256 << 10

// Read calls f for each record of a decision, in their order. A line that is no
// record is counted and passed over: a log may have been cut. The error is that
// of reading.
func Read(r io.Reader, f func(*telemetry.Access)) (Stats, error) {
	var stats Stats
	lines := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := readLine(lines)
		if len(bytes.TrimSpace(line)) > 0 {
			var a telemetry.Access
			switch {
			case a.UnmarshalJSON(line) != nil || a.Listener == "" || a.Action == "":
				stats.Strange++
			case a.Decision == "":
				stats.Other++
			default:
				stats.Records++
				f(&a)
			}
		}
		if errors.Is(err, io.EOF) {
			return stats, nil
		}
		if err != nil {
			return stats, fmt.Errorf("read access log: %w", err)
		}
	}
}

// readLine returns the next line, cut at maxLine.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line) < maxLine {
			line = append(line, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}

// Request returns what a record tells of a request. Headers are not logged, so
// that rules which ask for some cannot be held against it.
func Request(a *telemetry.Access) (*policy.Request, error) {
	r := &policy.Request{Listener: a.Listener, SNI: a.ServerName, Time: a.Time, Port: a.Port}
	if a.Direction == policy.Outbound.String() {
		r.Direction = policy.Outbound
	}
	var err error
	if a.Plaintext {
		r.From.Unauthenticated = true
	} else if r.From.ID, err = spiffeid.FromString(a.From); err != nil {
		return nil, fmt.Errorf("narthex.from: %w", err)
	}
	if r.To.ID, err = spiffeid.FromString(a.To); err != nil {
		return nil, fmt.Errorf("narthex.to: %w", err)
	}
	if ap, err := netip.ParseAddrPort(a.Source); err == nil {
		r.Source = ap
	}
	if peer := &r.From; a.Serial != "" {
		if r.Direction == policy.Outbound {
			peer = &r.To
		}
		peer.Serial = a.Serial
	}
	if h := a.HTTP; h != nil {
		path, err := canonical.Path(h.Path, canonical.Options{EncodedSlash: true, EmptySegments: true})
		if err != nil {
			return nil, fmt.Errorf("url.path: %w", err)
		}
		r.HTTP = &policy.HTTP{Method: h.Method, Host: h.Host, Path: path}
	}
	return r, nil
}

// Options of suggested rules. Zero means what stands beside it.
type Options struct {
	Denied   bool           // what was denied is to be allowed too; else only what passed
	Shadow   bool           // as shadow rules
	Policy   *policy.Policy // rules that are there: nothing is suggested for what they allow
	MinCount int            // what was seen less often is left out: 1
}

// Sightings are what was seen.
type Sightings struct {
	pairs map[pair]*seen
	first time.Time
	last  time.Time

	Taken   int // records that rules are suggested for
	Skipped int // that were denied, or are allowed already
	Odd     int // that no rule can be made of
}

// pair is who spoke to whom, where.
type pair struct{ from, to, listener, at string }

type seen struct {
	count  int
	denied int // of those, how many the rules of that time refused
	calls  map[call]int
}

// call is a request; the zero call is a connection.
type call struct{ method, host, path string }

// maxCalls bounds the different requests kept of one pair; what comes later
// counts towards the method alone.
const maxCalls = 50_000

// Add takes a record in.
func (s *Sightings) Add(a *telemetry.Access, o *Options) {
	q, err := Request(a)
	if err != nil || q.HTTP != nil && strings.Contains(q.HTTP.Path, "//") { // no pattern has empty segments
		s.Odd++
		return
	}
	if a.Decision == "deny" && !o.Denied {
		s.Skipped++
		return
	}
	if o.Policy != nil {
		var d policy.Decision
		if o.Policy.Decide(q, &d); d.Allow || d.Reason.Revoked() || d.Reason == policy.Ceiling || d.Reason == policy.DenyRule {
			s.Skipped++
			return
		}
	}
	s.Taken++
	if s.pairs == nil {
		s.pairs = map[pair]*seen{}
	}
	key := pair{a.From, a.To, a.Listener, a.Direction}
	p := s.pairs[key]
	if p == nil {
		p = &seen{calls: map[call]int{}}
		s.pairs[key] = p
	}
	p.count++
	if a.Decision != "allow" {
		p.denied++
	}
	var c call
	if q.HTTP != nil {
		c = call{q.HTTP.Method, q.HTTP.Host, q.HTTP.Path}
	}
	if _, ok := p.calls[c]; ok || len(p.calls) < maxCalls {
		p.calls[c]++
	}
	if s.first.IsZero() || a.Time.Before(s.first) {
		s.first = a.Time
	}
	if a.Time.After(s.last) {
		s.last = a.Time
	}
}

// Rule is one suggested rule.
type Rule struct {
	ID        string
	From      []string
	To        string
	On        []string
	At        string
	Methods   []string // nil: any, as for connections
	Paths     []string
	Count     int    // records that it allows
	Denied    int    // of those, refused at the time
	Example   string // a request, with its count
	Different int    // requests that differ
}

// Rules returns the rules that allow what was seen, by who is spoken to.
func (s *Sightings) Rules(o Options) []Rule {
	var rules []Rule
	for _, key := range slices.SortedFunc(maps.Keys(s.pairs), comparePairs) {
		p := s.pairs[key]
		if p.count < o.MinCount {
			continue
		}
		for _, g := range generalise(p.calls) {
			r := Rule{
				From: []string{key.from}, To: key.to, On: []string{key.listener}, At: key.at,
				Methods: g.methods, Paths: g.paths, Count: g.count, Different: g.different, Example: g.example,
			}
			if p.denied == p.count {
				r.Denied = r.Count
			} else if p.denied > 0 {
				r.Denied = min(p.denied, r.Count)
			}
			rules = append(rules, r)
		}
	}
	rules = merge(rules)
	name(rules)
	return rules
}

func comparePairs(a, b pair) int {
	return cmp.Or(strings.Compare(a.to, b.to), strings.Compare(a.listener, b.listener), strings.Compare(a.at, b.at), strings.Compare(a.from, b.from))
}

// merge makes one rule of those that differ in who calls.
func merge(rules []Rule) []Rule {
	var out []Rule
	at := map[string]int{}
	for _, r := range rules {
		key := fmt.Sprint(r.To, r.On, r.At, r.Methods, r.Paths, r.From[0] == policy.Unauthenticated)
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

// name gives each rule an id that says what it is about.
func name(rules []Rule) {
	taken := map[string]int{}
	for i := range rules {
		r := &rules[i]
		who := last(r.From[0])
		if len(r.From) > 1 {
			who = fmt.Sprintf("%s-and-%d", who, len(r.From)-1)
		}
		verb := "speaks-to"
		if len(r.Methods) > 0 && !slices.ContainsFunc(r.Methods, func(m string) bool { return m != "GET" && m != "HEAD" }) {
			verb = "reads"
		}
		id := who + "-" + verb + "-" + last(r.To)
		taken[id]++
		if n := taken[id]; n > 1 {
			id = fmt.Sprintf("%s-%d", id, n)
		}
		r.ID = id
	}
}

// last returns the last segment of an ID.
func last(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// Write writes rules as a rule file.
func (s *Sightings) Write(w io.Writer, rules []Rule, o Options) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# Suggested from %d records, %s to %s.\n", s.Taken, s.first.UTC().Format(time.RFC3339), s.last.UTC().Format(time.RFC3339))
	b.WriteString("# Each allows what was seen. Whether it should be is for you to say.\nversion: 1\nrules:\n")
	for i := range rules {
		r := &rules[i]
		fmt.Fprintf(&b, "  # %s\n  - id: %s\n    effect: allow\n", r.About(), r.ID)
		if o.Shadow {
			b.WriteString("    shadow: true\n")
		}
		fmt.Fprintf(&b, "    on: [%s]\n    at: %s\n    from: [%s]\n", plain(r.On), r.At, quote(r.From))
		fmt.Fprintf(&b, "    to: [%s]\n", quote([]string{r.To}))
		if r.Methods != nil {
			fmt.Fprintf(&b, "    http: {methods: [%s], paths: [%s]}\n", strings.Join(r.Methods, ", "), quote(r.Paths))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// About says what a rule would have allowed.
func (r *Rule) About() string {
	text := fmt.Sprintf("seen %d times", r.Count)
	if r.Count == 1 {
		text = "seen once"
	}
	if r.Denied > 0 {
		text += fmt.Sprintf(", %d of them refused by the rules of that time", r.Denied)
	}
	if r.Example != "" {
		text += fmt.Sprintf("; %d different requests, like %s", r.Different, r.Example)
	}
	return text
}

// plain writes names of listeners, which may hold what YAML gives a meaning.
func plain(names []string) string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = n
		if strings.Trim(n, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" || strings.Trim(n, "0123456789") == "" {
			out[i] = fmt.Sprintf("%q", n)
		}
	}
	return strings.Join(out, ", ")
}

func quote(words []string) string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = w
		if w != policy.Unauthenticated {
			out[i] = `"` + w + `"` // SPIFFE IDs and canonical paths hold nothing to escape
		}
	}
	return strings.Join(out, ", ")
}
