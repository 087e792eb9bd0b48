package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

// parseAll loads the texts as the files of one policy.
func parseAll(texts ...string) (*Policy, error) {
	var l loader
	for i, text := range texts {
		l.read(fmt.Sprintf("file%d.yaml", i), []byte(text))
	}
	return l.policy()
}

// TestScanFindsWhatTheIndexFinds: the way out of the index answers as it does.
func TestScanFindsWhatTheIndexFinds(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 1))
		slow := worldPolicy(r)
		p, err := parseAll(slow.yaml(r, 1)...)
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			q := slow.likelyConnection(r)
			q.HTTP = slow.likelyHTTP(r, &q, slow.rules)
			if _, _, reason := slow.decide(&q); reason >= DenyRule && p.scanAll(&q) != p.searchAll(&q) {
				t.Fatalf("seed %d: %+v: scan finds %v, index %v", seed, q, p.scanAll(&q), p.searchAll(&q))
			}
		}
	}
}

// matched is what a request comes to among the rules.
type matched struct {
	hit     hit
	shadows [2]shadows
}

func (s *search) matched() matched {
	if s.hit.deny != none {
		s.hit.allow = none // which no longer counts
	}
	return matched{s.hit, s.shadows}
}

// searchAll is what Decide does in its fourth and fifth step.
func (p *Policy) searchAll(q *Request) matched {
	var from, to identity
	p.index.bars(q, &from, &to)
	s := search{p: p, q: q}
	s.run(&from, &to)
	return s.matched()
}

// scanAll is the same without the index.
func (p *Policy) scanAll(q *Request) matched {
	s := search{p: p, q: q, hit: hit{none, none}}
	s.scan()
	return s.matched()
}

// TestManyPatterns asks about an identity that more patterns match than the
// index keeps room for, named by the policy and not.
func TestManyPatterns(t *testing.T) {
	words := []string{"a", "b", "c", "d", "e", "f"}
	var from []string
	for i := range 1 << len(words) {
		pattern := "spiffe://x.org"
		for j, w := range words {
			if i>>j&1 == 1 {
				w = "*"
			}
			pattern += "/" + w
		}
		from = append(from, pattern)
	}
	s := &slowPolicy{}
	for i, pattern := range from {
		s.rules = append(s.rules, slowRule{id: fmt.Sprintf("r%02d", i), effect: "allow", on: []string{fmt.Sprintf("l%d", i)}, from: []string{pattern}})
	}
	s.rules = append(s.rules, slowRule{id: "d", effect: "deny", on: []string{"l5"}, from: []string{"spiffe://x.org/a/**"}})
	s.revoked = []string{"spiffe://x.org/*/*/*/*/z/**"}
	for _, name := range []string{"named by the policy", "not named"} {
		p, err := parseAll(s.yaml(rand.New(rand.NewPCG(1, 1)), 1)...)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 70 {
			for _, id := range []string{"spiffe://x.org/a/b/c/d/e/f", "spiffe://x.org/q/b/c/d/e/f", "spiffe://x.org/a/b/c/d/z/f"} {
				q := request(id, "spiffe://x.org/t")
				q.Listener = fmt.Sprintf("l%d", i)
				var got Decision
				p.Decide(&q, &got)
				allow, rule, reason := s.decide(&q)
				if got.Allow != allow || got.Rule != rule || got.Reason != reason {
					t.Errorf("%s: %s on l%d: %+v, want %v %q %v", name, id, i, got, allow, rule, reason)
				}
			}
		}
		s.rules = s.rules[1:] // without the literal pattern
	}
}

// TestEqualHashes finds no identity by its hash alone.
func TestEqualHashes(t *testing.T) {
	long := web + strings.Repeat("x", slotID)
	for _, id := range []string{web, long} {
		table := newNames(1)
		table.add(id, 0, [2][]ref{})
		find := func(id string) *nameSlot {
			w := table.want(&Peer{ID: spiffeid.RequireFromString(id)})
			return table.find(&w)
		}
		if find(id) == nil || find(orders) != nil {
			t.Fatal("the table finds the wrong identity")
		}
		for i := range table.slots {
			if s := &table.slots[i]; s.tag != 0 { // another ID under the hash of this one
				s.id[s.size%slotID/2] ^= 1
				table.long = []string{orders, orders}
				if id == long {
					s.id = [slotID]byte{}
				}
			}
		}
		if find(id) != nil {
			t.Error("another identity of the same hash is taken for the one asked for")
		}
	}
}

// TestLargeLists stores rules of long lists and groups of many uses.
func TestLargeLists(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	id := func() string { return fmt.Sprintf("spiffe://x.org/ns/%d/sa/%d", r.IntN(12), r.IntN(12)) }
	ids := func(n int) (out []string) {
		for range n {
			s := id()
			if r.IntN(8) == 0 {
				s = s[:strings.LastIndex(s, "/")] + "/*"
			}
			out = append(out, s)
		}
		return out
	}
	s := &slowPolicy{groups: map[string][]string{}}
	for i := range 6 {
		s.groups[fmt.Sprintf("g%d", i)] = ids(12)
	}
	for i := range 120 {
		rule := slowRule{id: fmt.Sprintf("r%03d", i), effect: []string{"allow", "allow", "deny"}[r.IntN(3)]}
		rule.from = slices.Concat([]string{fmt.Sprintf("group:g%d", r.IntN(6))}, ids(r.IntN(14)))
		if r.IntN(2) == 0 {
			rule.from = append(rule.from, "unauthenticated")
		}
		rule.to = slices.Concat([]string{fmt.Sprintf("group:g%d", r.IntN(6))}, ids(r.IntN(14)))
		s.rules = append(s.rules, rule)
	}
	p, err := parseAll(s.yaml(r, 2)...)
	if err != nil {
		t.Fatal(err)
	}
	if most := tableSize(maxPairs * len(p.rules)); len(p.index.pairs.slots) > most {
		t.Errorf("%d slots of pairs for %d rules, want at most %d", len(p.index.pairs.slots), len(p.rules), most)
	}
	for i := range 20000 {
		q := request(id(), id())
		if i%50 == 0 {
			q.From = Peer{Unauthenticated: i%100 == 0}
		}
		var d Decision
		p.Decide(&q, &d)
		if allow, rule, reason := s.decide(&q); d.Allow != allow || d.Rule != rule || d.Reason != reason {
			t.Fatalf("%+v: %+v, want %v %q %v", q, d, allow, rule, reason)
		}
	}
}

// TestDecideAllocatesNothing keeps the decision off the heap.
func TestDecideAllocatesNothing(t *testing.T) {
	p, requests := mixed(t, rulemix.HTTP, 1000)
	p.SetGeneration(7)
	i := 0
	var d Decision
	if n := testing.AllocsPerRun(5000, func() {
		p.Decide(&requests[i&1023], &d)
		p.Admit(&requests[i&1023])
		i++
	}); n != 0 {
		t.Errorf("%v allocations per decision, want none", n)
	}
	if d.Generation != 7 {
		t.Errorf("generation %d, want 7", d.Generation)
	}
}

// TestHostileGroups asks about identities in so many groups, or matched by so
// many patterns, that all rules are asked.
func TestHostileGroups(t *testing.T) {
	t.Parallel()
	const n = 2000
	both := "version: 1\ngroups:\n" + numbered(n, "  g%d: [spiffe://a/b, spiffe://a/1, spiffe://a/2, spiffe://a/3, spiffe://a/4]\n") + "rules:\n"
	for i := range n {
		for j := range groupUses/2 + 1 {
			both += fmt.Sprintf("- {id: r%d-%d, effect: deny, at: outbound, from: [group:g%d], to: [group:g%d]}\n", i, j, i, i)
		}
	}
	both += "- {id: web, effect: allow, from: [spiffe://a/b], to: [group:g7]}\n- {id: web-no, effect: deny, shadow: true, from: [group:g9]}\n"
	one := "version: 1\ngroups:\n  g:\n" + numbered(n, "  - spiffe://a/%d\n") + "rules:\n" + numbered(n, "- {id: r%d, effect: deny, from: [group:g]}\n")
	for i := range 32 {
		one += fmt.Sprintf("- {id: w%d, effect: deny, at: outbound, from: [spiffe://a%s]}\n", i, strings.NewReplacer("0", "/b", "1", "/*").Replace(fmt.Sprintf("%05b", i)))
	}
	one += "- {id: web, effect: allow, from: [\"spiffe://a/b/b/**\"], to: [spiffe://a/7]}\n- {id: web-no, effect: deny, shadow: true, from: [\"spiffe://a/b/b/**\"]}\n"
	for _, c := range []struct{ name, text, from, to string }{
		{"both in many groups", both, "spiffe://a/b", "spiffe://a/b"},
		{"matched by many patterns", one, "spiffe://a/b/b/b/b/b", "spiffe://a/7"},
	} {
		p, err := parseAll(c.text)
		if err != nil {
			t.Fatal(err)
		}
		q := request(c.from, c.to)
		for range 3 {
			var d Decision
			if p.Decide(&q, &d); !d.Allow || d.Rule != "web" || !slices.Equal(d.Shadow, []string{"web-no"}) {
				t.Fatalf("%s: %+v", c.name, d)
			}
			if a := p.Admit(&q); a != Always {
				t.Fatalf("%s: admitted %v", c.name, a)
			}
		}
	}
}

// TestLimitsOfLargeGroups: a group that many limits name is looked through
// once, and no limit is missed or made up.
func TestLimitsOfLargeGroups(t *testing.T) {
	t.Parallel()
	const n = 20_000
	p, err := parseAll("version: 1\ngroups:\n  few: [\"spiffe://a/*/x\", spiffe://b/1]\n  large:\n" + numbered(n, "  - spiffe://a/%d\n") + "limits:\n" +
		numbered(200, "- {id: large-%d, rps: 1, from: [group:few, group:large]}\n") + "- {id: few, rps: 1, from: [group:few], to: [group:large]}\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		from, to string
		want     int
	}{
		{"spiffe://a/19999", "spiffe://b/b", 200},
		{"spiffe://a/20000", "spiffe://b/b", 0},
		{"spiffe://a/7/x", "spiffe://a/19999", 201},
		{"spiffe://b/1", "spiffe://a/20000", 200},
		{"", "spiffe://a/1", 0},
	} {
		q := request(c.from, c.to)
		if got := len(p.Limits(&q, nil)); got != c.want {
			t.Errorf("%+v: %d limits", c, got)
		}
	}
}
