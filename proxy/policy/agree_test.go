package policy

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
)

// The package against the slow evaluator.

var (
	onlySeed  = flag.Int64("seed", -1, "of TestDecideAgreesWithTheSlowEvaluator: the one policy of each kind to look at")
	firstSeed = flag.Int64("first-seed", 0, "of TestDecideAgreesWithTheSlowEvaluator: where its seeds begin")
)

// agreement is one policy under test, in both forms.
type agreement struct {
	slow     *slowPolicy
	texts    []string
	policy   *Policy
	decision Decision // used again: nothing of the last answer may stay
	limits   []*Limit
}

// newAgreement parses what the writer makes of the slow policy.
func newAgreement(s *slowPolicy, w *yamlWriter, files int) (*agreement, error) {
	a := &agreement{slow: s, texts: w.policy(s, files)}
	var err error
	a.policy, err = parseAll(a.texts...)
	return a, err
}

// disagreement says what the package answers other than the slow evaluator;
// "" if nothing. It returns what both decide.
func (a *agreement) disagreement(q *Request) (Decision, string) {
	want, got := a.slow.answer(q), &a.decision
	a.policy.Decide(q, got)
	if got.Allow != want.Allow || got.Rule != want.Rule || got.Reason != want.Reason || got.NeedsSubject != want.NeedsSubject || !slices.Equal(got.Shadow, want.Shadow) {
		return want, fmt.Sprintf("Decide: %+v\nwant    %+v", *got, want)
	}
	a.limits = a.policy.Limits(q, a.limits[:0])
	limits := a.slow.limitsOf(q)
	if len(a.limits) != len(limits) {
		return want, fmt.Sprintf("Limits: %d, want %+v", len(a.limits), limits)
	}
	for i, have := range a.limits {
		if have.RPS == 0 {
			limits[i].Burst = have.Burst // means nothing
		}
		if *have != limits[i] {
			return want, fmt.Sprintf("Limits: %+v, want %+v", *have, limits[i])
		}
	}
	return want, ""
}

// disagreementOfNotes asks what Explain says of each rule.
func (a *agreement) disagreementOfNotes(q *Request) string {
	e := a.policy.Explain(q)
	if want := a.slow.answer(q); e.Decision.Allow != want.Allow || e.Decision.Rule != want.Rule || e.Decision.Reason != want.Reason || !slices.Equal(e.Decision.Shadow, want.Shadow) {
		return fmt.Sprintf("Explain: %+v\nwant     %+v", e.Decision, want)
	}
	if len(e.Rules) != len(a.slow.rules) {
		return fmt.Sprintf("Explain: %d notes of %d rules", len(e.Rules), len(a.slow.rules))
	}
	for _, note := range e.Rules {
		i := slices.IndexFunc(a.slow.rules, func(rule slowRule) bool { return rule.id == note.ID })
		if i < 0 || note.Matched != a.slow.matches(&a.slow.rules[i], q) {
			return fmt.Sprintf("Explain: %+v, want matched %v", note, !note.Matched)
		}
	}
	return ""
}

// disagreementOfAdmission holds what Admit says of a connection against the
// decisions on some requests on it.
func (a *agreement) disagreementOfAdmission(connection *Request, requests []*HTTP) string {
	q := *connection
	q.HTTP = nil
	admission := a.policy.Admit(&q)
	if admission > Always || admission == PerRequest && !a.slow.dependsOnHTTP(&q) {
		return fmt.Sprintf("Admit: %v, but no request can make a difference", admission)
	}
	for _, h := range requests {
		q.HTTP = h
		if other := a.policy.Admit(&q); other != admission {
			return fmt.Sprintf("Admit: %v, and %v with a request to see: %+v", admission, other, *h)
		}
		switch d := a.slow.answer(&q); {
		case d.Allow && admission == Never, !d.Allow && admission == Always && !speaksForAnother(&q):
			return fmt.Sprintf("Admit: %v, but %+v is answered %+v", admission, *h, d)
		}
	}
	return ""
}

// report is what is needed to see a disagreement again, with the smallest
// policy that shows it.
func (a *agreement) report(t *testing.T, seed int64, what string, q *Request, still func(*agreement) bool) {
	t.Helper()
	small := shrink(a, still)
	http := "not visible"
	if q.HTTP != nil {
		http = fmt.Sprintf("%+v", *q.HTTP)
	}
	shown := *q
	shown.HTTP = nil
	t.Fatalf("%s\nrequest: %+v\nhttp: %s\npolicy that is enough:\n%s\nwhole policy:\n%s\nagain: go test ./proxy/policy -run '%s' -seed %d",
		what, shown, http, strings.Join(small.texts, "\n---\n"), strings.Join(a.texts, "\n---\n"), t.Name(), seed)
}

// shrink takes rules, limits and conditions out of the policy as long as the
// two still disagree.
func shrink(a *agreement, still func(*agreement) bool) *agreement {
	try := func(s slowPolicy) bool {
		next, err := newAgreement(&s, &yamlWriter{r: rand.New(rand.NewPCG(1, 1))}, 1)
		if err != nil || !still(next) {
			return false
		}
		a = next
		return true
	}
	for smaller := true; smaller; {
		smaller = false
		for i := len(a.slow.rules) - 1; i >= 0; i-- {
			s := *a.slow
			s.rules = slices.Delete(slices.Clone(s.rules), i, i+1)
			if try(s) {
				smaller = true
				continue
			}
			for _, condition := range slowConditions {
				s := *a.slow
				s.rules = slices.Clone(s.rules)
				smaller = condition.drop(&s.rules[i]) && try(s) || smaller
			}
		}
		for i := len(a.slow.limits) - 1; i >= 0; i-- {
			s := *a.slow
			s.limits = slices.Delete(slices.Clone(s.limits), i, i+1)
			smaller = try(s) || smaller
		}
		for i := len(a.slow.revoked) - 1; i >= 0; i-- {
			s := *a.slow
			s.revoked = slices.Delete(slices.Clone(s.revoked), i, i+1)
			smaller = try(s) || smaller
		}
	}
	return a
}

const (
	agreeConnections = 40 // of each policy
	agreeRequests    = 9  // on each connection, and one without HTTP
	agreeShards      = 8  // that run beside each other
)

// agreePolicies is how many policies of each kind are tried: a million
// decisions together.
func agreePolicies() int64 {
	switch {
	case testing.Short():
		return 64
	case raceEnabled:
		return 96
	}
	return 850
}

// TestDecideAgreesWithTheSlowEvaluator holds every answer of the package
// against the slow evaluator, over random policies and requests.
func TestDecideAgreesWithTheSlowEvaluator(t *testing.T) {
	var seen [NoRule + 1]atomic.Int64
	var shadowed, needing, decided atomic.Int64
	t.Run("kind", func(t *testing.T) {
		for kind := range worldKinds {
			for shard := range int64(agreeShards) {
				t.Run(fmt.Sprintf("%s/%d", worldKinds[kind].name, shard), func(t *testing.T) {
					t.Parallel()
					for seed := *firstSeed; seed < *firstSeed+agreePolicies(); seed++ {
						if seed%agreeShards == shard && *onlySeed < 0 {
							agreeOn(t, kind, seed, func(d Decision) {
								seen[d.Reason].Add(1)
								decided.Add(1)
								if len(d.Shadow) > 0 {
									shadowed.Add(1)
								}
								if d.NeedsSubject {
									needing.Add(1)
								}
							})
						}
					}
					if *onlySeed >= 0 && *onlySeed%agreeShards == shard {
						agreeOn(t, kind, *onlySeed, func(Decision) {})
					}
				})
			}
		}
	})
	all := decided.Load()
	if t.Failed() || all < agreePolicies()*agreeConnections*agreeRequests*int64(len(worldKinds)) {
		return // not all of it was to run
	}
	for _, reason := range []Reason{RevokedFrom, RevokedTo, Ceiling, DenyRule, AllowRule, NoRule} {
		if n := seen[reason].Load(); n < all/200 {
			t.Errorf("only %d of %d decisions were %q: the test has little to say about it", n, all, reason)
		}
	}
	if n := needing.Load(); n < all/1000 {
		t.Errorf("only %d of %d decisions needed a JWT-SVID: the test has little to say about them", n, all)
	}
	if n := seen[RevokedSubject].Load(); n < all/2000 {
		t.Errorf("only %d of %d decisions were %q: the test has little to say about it", n, all, RevokedSubject)
	}
	if n := shadowed.Load(); n < all/100 {
		t.Errorf("only %d of %d decisions had shadow rules: the test has little to say about them", n, all)
	}
}

// agreeOn tries one policy.
func agreeOn(t *testing.T, kind int, seed int64, count func(Decision)) {
	r := rand.New(rand.NewPCG(uint64(seed), uint64(kind)))
	slow := worldKinds[kind].policy(r)
	a, err := newAgreement(slow, &yamlWriter{r: r, respell: true}, 1+r.IntN(3))
	if err != nil {
		t.Fatalf("seed %d: %v\n%s", seed, err, strings.Join(a.texts, "\n---\n"))
	}
	for range agreeConnections {
		q := slow.likelyConnection(r)
		candidates := slices.DeleteFunc(slices.Clone(slow.rules), func(rule slowRule) bool {
			return !rule.asksHTTP() || !slow.matches(rule.withoutHTTP(), &q)
		})
		var requests []*HTTP
		for i := range agreeRequests + 1 {
			if i > 0 {
				q.HTTP = slow.likelyHTTP(r, &q, candidates)
				requests = append(requests, q.HTTP)
			}
			decision, what := a.disagreement(&q)
			if what != "" {
				a.report(t, seed, what, &q, func(a *agreement) bool { _, what := a.disagreement(&q); return what != "" })
			}
			if r.IntN(16) == 0 {
				if what := a.disagreementOfNotes(&q); what != "" {
					a.report(t, seed, what, &q, func(a *agreement) bool { return a.disagreementOfNotes(&q) != "" })
				}
			}
			count(decision)
		}
		if what := a.disagreementOfAdmission(&q, requests); what != "" {
			a.report(t, seed, what, &q, func(a *agreement) bool { return a.disagreementOfAdmission(&q, requests) != "" })
		}
	}
}

// TestOrderDoesNotMatter shuffles rules, keys, list items and files: nothing
// is decided otherwise, and the policy is the same.
func TestOrderDoesNotMatter(t *testing.T) {
	t.Parallel()
	policies := uint64(60)
	if raceEnabled {
		policies = 12
	}
	for kind := range worldKinds {
		for seed := range policies {
			r := rand.New(rand.NewPCG(seed, uint64(kind)+100))
			slow := worldKinds[kind].policy(r)
			first, err := parseAll(slow.yaml(r, 1)...)
			if err != nil {
				t.Fatal(err)
			}
			for range 4 {
				texts := slow.yaml(r, 1+r.IntN(4))
				other, err := parseAll(texts...)
				if err != nil {
					t.Fatal(err)
				}
				if !first.Equal(other) || first.Hash() != other.Hash() {
					t.Fatalf("%s, seed %d: hash %x, then %x\n%s", worldKinds[kind].name, seed, first.Hash(), other.Hash(), strings.Join(texts, "\n---\n"))
				}
				sameAnswers(t, r, slow, first, other)
			}
		}
	}
}

func sameAnswers(t *testing.T, r *rand.Rand, slow *slowPolicy, first, other *Policy) {
	t.Helper()
	for range 60 {
		q := slow.likelyConnection(r)
		if r.IntN(4) > 0 {
			q.HTTP = slow.likelyHTTP(r, &q, slow.rules)
		}
		var a, b Decision
		first.Decide(&q, &a)
		other.Decide(&q, &b)
		if a.Allow != b.Allow || a.Rule != b.Rule || a.Reason != b.Reason || !slices.Equal(a.Shadow, b.Shadow) {
			t.Fatalf("%+v: %+v, then %+v", q, a, b)
		}
		if x, y := first.Admit(&q), other.Admit(&q); x != y {
			t.Fatalf("%+v: admission %v, then %v", q, x, y)
		}
	}
}
