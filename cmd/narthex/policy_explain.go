package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/proxy/policy"
)

// nearRules is how many rules that did not match are shown.
const nearRules = 5

func newPolicyExplain() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain -f POLICY --as ID [--to ID] [--do 'GET /path']",
		Short: "Say what the rules decide of a request, and why",
		Long: `Asks the rules what a proxy would ask them, and prints the decision, the rule,
and, where no rule allows it, of the allows that come nearest which of their
conditions do not hold. Without --do or --grpc it is asked as on a tcp listener,
where HTTP is not visible. With -c and --on, --to and --port are those of the
listener where they are left out.
Exit status: 0 when it is allowed, 1 when it is denied, 2 when there is no answer:
the call cannot be made sense of, or the rules cannot be read.`,
		Example: `  narthex policy explain -f rules.yaml --on orders --as spiffe://example.org/ns/shop/sa/web --to spiffe://example.org/ns/shop/sa/orders --do "GET /v1/orders/7"
  narthex policy explain -c /etc/narthex/narthex.yaml --on orders --as unauthenticated --source-ip 10.1.2.3
  narthex policy explain -f 'policies/*.yaml' --as spiffe://example.org/a --grpc shop.v1.Orders/Get --header x-env=prod --time 2026-01-02T03:00:00Z --format json`,
	}
	var files policyFiles
	var q policy.Question
	files.register(cmd)
	f := cmd.Flags()
	f.StringVar(&q.As, "as", "", "who it comes from: a SPIFFE ID, or unauthenticated (required)")
	f.StringVar(&q.To, "to", "", "the SPIFFE ID it goes to")
	f.StringVar(&q.On, "on", "", "the listener's name")
	f.StringVar(&q.At, "at", "inbound", "the end that is asked: inbound or outbound")
	f.StringVar(&q.SourceIP, "source-ip", "", "the client's address")
	f.Uint16Var(&q.Port, "port", 0, "the port of the mTLS side")
	f.StringVar(&q.SNI, "sni", "", "the TLS server name")
	f.StringVar(&q.Subject, "subject", "", "the SPIFFE ID that a JWT-SVID on the request speaks for (default no JWT-SVID)")
	f.StringVar(&q.Do, "do", "", "an HTTP request, like 'GET /v1/orders/7'")
	f.StringVar(&q.Host, "host", "", "the host of the request")
	f.StringVar(&q.GRPC, "grpc", "", "a gRPC call, like shop.v1.Orders/Get, in place of --do")
	headers := f.StringArray("header", nil, "a header of the request, name=value; may be given several times")
	at := f.String("time", "", "when it is asked, like 2026-01-02T09:00:00Z (default now)")
	format := f.String("format", "text", "text or json")
	all := f.Bool("all", false, "show every rule that did not match, not the nearest allows alone")
	completeWords(cmd, "at", "inbound", "outbound")
	completeWords(cmd, "format", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *format != "text" && *format != "json" {
			return usageError{fmt.Errorf("--format %q: want text or json", *format)}
		}
		if err := files.fill(&q); err != nil {
			return unanswered(cmd, err)
		}
		request, err := asked(&q, *headers, *at)
		if err != nil {
			return err
		}
		rules, err := files.read()
		if err != nil {
			return unanswered(cmd, err)
		}
		e := explained{Explanation: rules.Explain(request), all: *all, http: request.HTTP != nil}
		e.limits = rules.Limits(request, nil)
		if rules.TimeDependent() {
			e.time = request.Time.Format(time.RFC3339)
		}
		if *format == "json" {
			err = e.json(cmd.OutOrStdout())
		} else {
			err = e.text(cmd.OutOrStdout())
		}
		switch {
		case err != nil:
			return unanswered(cmd, err)
		case !e.Decision.Allow:
			return exitError{exitFailure}
		}
		return nil
	}
	return cmd
}

// explained is an explanation with what is printed beside it.
type explained struct {
	policy.Explanation
	limits []*policy.Limit
	time   string // empty: it does not matter
	all    bool
	http   bool // is visible
}

// unmatched returns the rules that did not match and are shown.
func (e *explained) unmatched() []policy.RuleNote {
	switch {
	case e.all:
		return slices.DeleteFunc(slices.Clone(e.Rules), func(n policy.RuleNote) bool { return n.Matched })
	case e.Decision.Reason == policy.NoRule:
		return e.Near(nearRules)
	}
	return nil
}

// asked makes the request of flags.
func asked(q *policy.Question, headers []string, at string) (*policy.Request, error) {
	q.Time = time.Now()
	if at != "" {
		var err error
		if q.Time, err = time.Parse(time.RFC3339, at); err != nil {
			return nil, usageError{fmt.Errorf("--time %q: want a time like 2026-01-02T09:00:00Z", at)}
		}
	}
	for _, h := range headers {
		name, value, ok := strings.Cut(h, "=")
		if !ok {
			return nil, usageError{fmt.Errorf("--header %q: want name=value", h)}
		}
		q.Headers = append(q.Headers, policy.Header{Name: name, Value: value})
	}
	request, err := q.Request()
	if wrong := (*policy.QuestionError)(nil); errors.As(err, &wrong) {
		flag := strings.ReplaceAll(strings.TrimSuffix(wrong.Field, "s"), "_", "-") // headers: --header
		if wrong.Field == "as" {
			flag = wrong.Field
		}
		return nil, usageError{fmt.Errorf("--%s %w", flag, wrong.Err)}
	}
	return request, err
}

func verdict(d *policy.Decision) string {
	if d.Allow {
		return "allow"
	}
	return "deny"
}

func (e *explained) text(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s\n", verdict(&e.Decision), e.Detail)
	if e.time != "" {
		fmt.Fprintf(&b, "  asked at %s; rules here go by the time\n", e.time)
	}
	if e.Decision.NeedsSubject {
		b.WriteString("  with a JWT-SVID it may be allowed: a listener that takes them answers 401; --subject asks with one\n")
	}
	for _, id := range e.Decision.Shadow {
		fmt.Fprintf(&b, "  shadow rule %q would decide otherwise\n", id)
	}
	if e.Decision.Allow {
		for _, l := range e.limits {
			fmt.Fprintf(&b, "  limit %q applies: %s\n", l.ID, l)
		}
	}
	for _, n := range e.Rules {
		if n.Matched && n.ID != e.Decision.Rule {
			fmt.Fprintf(&b, "  also matches: %s\n", ruleName(&n))
		}
		switch {
		case n.Granted && e.http:
			fmt.Fprintf(&b, "  rule %q asks whom a JWT-SVID speaks for, which the outbound end does not know: it counts as met\n", n.ID)
		case n.Granted:
			fmt.Fprintf(&b, "  rule %q asks for HTTP, which is not visible here and counts as met; --do or --grpc asks as a listener that sees it\n", n.ID)
		}
	}
	for _, n := range e.unmatched() {
		fmt.Fprintf(&b, "  does not match: %s\n", ruleName(&n))
		for _, m := range n.Misses {
			fmt.Fprintf(&b, "      %s: %s\n", m.Condition, m.Why)
		}
	}
	if left := e.left(); left > 0 && e.Decision.Reason == policy.NoRule {
		fmt.Fprintf(&b, "  %s more %s not match; --all shows all\n", count(left, "rule"), map[bool]string{true: "does", false: "do"}[left == 1])
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// left is how many rules did not match and are not shown.
func (e *explained) left() int {
	n := -len(e.unmatched())
	for i := range e.Rules {
		if !e.Rules[i].Matched {
			n++
		}
	}
	return n
}

func ruleName(n *policy.RuleNote) string {
	effect := "deny"
	if n.Allow {
		effect = "allow"
	}
	if n.Shadow {
		effect = "shadow " + effect
	}
	return fmt.Sprintf("%s %q (%s:%d:%d)", effect, n.ID, n.File, n.Line, n.Column)
}

// explanation is the JSON of an explanation.
type explanation struct {
	Decision string     `json:"decision"` // allow | deny
	Rule     string     `json:"rule"`
	Reason   string     `json:"reason"` // revoked | ceiling | rule | no_rule
	Detail   string     `json:"detail"`
	Time     string     `json:"time,omitempty"`          // when it was asked, where rules go by it
	Needs    bool       `json:"needs_subject,omitempty"` // with a JWT-SVID it may be allowed
	Shadow   []string   `json:"shadow"`
	Limits   []string   `json:"limits"` // ids of those that apply
	Rules    []ruleJSON `json:"rules"`  // those that match, then those that do not and are shown
	Omitted  int        `json:"omitted"`
}

type ruleJSON struct {
	ID      string     `json:"id"`
	Effect  string     `json:"effect"`
	Shadow  bool       `json:"shadow,omitempty"`
	File    string     `json:"file"`
	Line    int        `json:"line"`
	Column  int        `json:"column"`
	Matched bool       `json:"matched"`
	Granted bool       `json:"granted,omitempty"` // HTTP, or whom a JWT-SVID speaks for, is not visible, and what it asks of it counts as met
	Misses  []missJSON `json:"misses,omitempty"`
}

type missJSON struct {
	Condition string `json:"condition"`
	Why       string `json:"why"`
}

func (e *explained) json(w io.Writer) error {
	out := explanation{
		Decision: verdict(&e.Decision), Rule: e.Decision.Rule, Reason: e.Decision.Reason.Code(), Detail: e.Detail, Time: e.time, Needs: e.Decision.NeedsSubject,
		Shadow: append([]string{}, e.Decision.Shadow...), Limits: []string{}, Rules: []ruleJSON{}, Omitted: e.left(),
	}
	for _, l := range e.limits {
		if e.Decision.Allow {
			out.Limits = append(out.Limits, l.ID)
		}
	}
	add := func(n *policy.RuleNote) {
		r := ruleJSON{ID: n.ID, Effect: "deny", Shadow: n.Shadow, File: n.File, Line: n.Line, Column: n.Column, Matched: n.Matched, Granted: n.Granted}
		if n.Allow {
			r.Effect = "allow"
		}
		for _, m := range n.Misses {
			r.Misses = append(r.Misses, missJSON(m))
		}
		out.Rules = append(out.Rules, r)
	}
	for i := range e.Rules {
		if e.Rules[i].Matched {
			add(&e.Rules[i])
		}
	}
	for _, n := range e.unmatched() {
		add(&n)
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(out)
}
