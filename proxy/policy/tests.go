package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// question is one entry of tests.
type question struct {
	name    string
	ask     Question
	request *Request

	allow  bool
	rule   string // empty: any
	reason string // likewise
	shadow []string
	given  map[string]bool // keys
	place  place
}

// TestResult is what came of one entry of a policy's tests.
type TestResult struct {
	Name         string // what is asked, where the entry has no name
	File         string
	Line, Column int
	Failures     []string // empty: it passed
	Duration     time.Duration
}

// Test asks what the policy's own tests ask, in the order of files and lines.
func (p *Policy) Test() []TestResult {
	if p == nil {
		return nil
	}
	results := make([]TestResult, len(p.tests))
	var d Decision
	for i := range p.tests {
		t := &p.tests[i]
		begin := time.Now()
		p.Decide(t.request, &d)
		results[i] = TestResult{
			Name: cmp.Or(t.name, t.request.describe()), File: t.place.file, Line: t.place.line, Column: t.place.column,
			Failures: t.failures(p, &d), Duration: time.Since(begin),
		}
	}
	return results
}

// reasonWords are the words of tests for a decision's reason.
var reasonWords = map[string][]Reason{
	"revoked": {RevokedFrom, RevokedTo, RevokedSubject},
	"ceiling": {Ceiling},
	"rule":    {DenyRule, AllowRule},
	"no_rule": {NoRule},
}

func (t *question) failures(p *Policy, d *Decision) []string {
	var out []string
	if d.Allow != t.allow {
		want := "deny"
		if t.allow {
			want = "allow"
		}
		out = append(out, fmt.Sprintf("want %s, but %s", want, p.detail(t.request, d)))
	}
	if t.rule != "" && d.Rule != t.rule && len(out) == 0 {
		out = append(out, fmt.Sprintf("want it by rule %q, but %s%s", t.rule, p.detail(t.request, d), p.whyNot(t.rule, t.request)))
	} else if t.rule != "" && d.Rule != t.rule {
		out[0] += p.whyNot(t.rule, t.request)
	}
	if t.reason != "" && !slices.Contains(reasonWords[t.reason], d.Reason) && len(out) == 0 {
		out = append(out, fmt.Sprintf("want reason %s, but %s", t.reason, p.detail(t.request, d)))
	}
	if t.given["shadow"] && !slices.Equal(t.shadow, d.Shadow) {
		out = append(out, fmt.Sprintf("want shadow [%s], but it is [%s]", strings.Join(t.shadow, ", "), strings.Join(d.Shadow, ", ")))
	}
	return out
}

// whyNot says why a rule did not match, for the end of a sentence.
func (p *Policy) whyNot(id string, q *Request) string {
	r := p.find(id)
	if r == nil {
		return fmt.Sprintf("; there is no rule %q", id)
	}
	n := r.note(q)
	if n.Matched {
		return ""
	}
	why := make([]string, len(n.Misses))
	for i, m := range n.Misses {
		why[i] = m.Condition + " " + m.Why
	}
	return fmt.Sprintf("; rule %q: %s", id, strings.Join(why, ", "))
}

// maxTestFailures bounds how many failed tests a load names.
const maxTestFailures = 20

// tested returns the policy unless one of its tests fails.
func tested(p *Policy, err error) (*Policy, error) {
	if err != nil {
		return nil, err
	}
	var f findings
	for _, r := range p.Test() {
		if len(r.Failures) > 0 {
			f.take(&Error{
				File: r.File, Line: r.Line, Column: r.Column, Path: "tests", Test: true,
				Msg: fmt.Sprintf("%s: %s", clip(r.Name), strings.Join(r.Failures, "; ")),
			})
		}
	}
	if len(f.list) > maxTestFailures {
		f.dropped += len(f.list) - maxTestFailures
		f.list = f.list[:maxTestFailures]
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	return p, nil
}

// test takes in one entry of tests.
func (l *loader) test(n *node, path func() string) {
	t := question{place: n.at, given: map[string]bool{}}
	seen, ok := l.block(n, path, testKeyNames, func(p *pair, path func() string) { l.testKey(&t, p, path) })
	if !ok {
		return
	}
	for _, key := range seen {
		t.given[key] = true
	}
	for _, key := range []string{"as", "expect"} {
		if !t.given[key] {
			l.findings.add(n.at, path(), "%s is missing", key)
			return
		}
	}
	if len(l.findings.list) > 0 {
		return
	}
	r, err := t.ask.Request()
	if err != nil {
		l.findings.add(n.at, path(), "%v", err)
		return
	}
	t.request = r
	l.tests = append(l.tests, t)
	l.check(&t, path)
}

func (l *loader) testKey(t *question, p *pair, path func() string) {
	n := &p.value
	if into := map[string]*string{
		"name": &t.name, "as": &t.ask.As, "to": &t.ask.To, "on": &t.ask.On, "at": &t.ask.At, "source_ip": &t.ask.SourceIP,
		"sni": &t.ask.SNI, "do": &t.ask.Do, "host": &t.ask.Host, "grpc": &t.ask.GRPC, "subject": &t.ask.Subject, "rule": &t.rule, "reason": &t.reason,
	}[p.key]; into != nil {
		*into, _ = l.text(n, path)
		return
	}
	switch p.key {
	case "port":
		t.ask.Port = uint16(l.number(n, path, 1<<16-1))
	case "expect":
		switch s, ok := l.text(n, path); {
		case !ok || s == "deny":
		case s == "allow":
			t.allow = true
		default:
			l.findings.add(n.at, path(), "must be allow or deny, not %s%s", n.describe(), didYouMean(s, "allow", "deny"))
		}
	case "shadow":
		if n.kind == list { // none is an expectation too
			for i := range n.items {
				s, _ := l.text(&n.items[i], path)
				t.shadow = append(t.shadow, s)
			}
			slices.Sort(t.shadow)
		} else {
			l.findings.add(n.at, path(), "must be a list, not %s", n.describe())
		}
	case "time":
		when, err := time.Parse(time.RFC3339, n.text)
		if err != nil || n.kind != text {
			l.findings.add(n.at, path(), "must be a time like 2026-01-02T09:00:00Z, not %s", n.describe())
		}
		t.ask.Time = when
	case "headers":
		l.testHeaders(t, n, path)
	}
}

func (l *loader) testHeaders(t *question, n *node, path func() string) {
	if n.kind != block {
		l.findings.add(n.at, path(), "must be a block of header names, not %s", n.describe())
		return
	}
	for i := range n.pairs {
		p := &n.pairs[i]
		values := []node{p.value}
		if p.value.kind == list {
			values = p.value.items
		}
		for j := range values {
			switch v := &values[j]; v.kind {
			case text, number, truth:
				t.ask.Headers = append(t.ask.Headers, Header{p.key, v.text})
			default:
				l.findings.add(v.at, path()+"."+clip(p.key), "must be a value or a list of values, not %s", v.describe())
			}
		}
	}
}

// check looks, when all files are read, at what a test says of rules.
func (l *loader) check(t *question, path func() string) {
	if t.reason != "" && reasonWords[t.reason] == nil {
		l.findings.add(t.place, path(), "reason: want revoked, ceiling, rule or no_rule, not %s", strconv.Quote(clip(t.reason)))
	}
	if t.rule == "" && len(t.shadow) == 0 {
		return
	}
	where, named := path(), *t
	l.checks = append(l.checks, func() {
		for _, id := range append([]string{named.rule}, named.shadow...) {
			if _, ok := l.ids[id]; !ok && id != "" {
				l.findings.add(named.place, where, "there is no rule %q", clip(id))
			}
		}
	})
}
