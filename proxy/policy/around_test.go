package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func comparison(t *testing.T, was, is string) *Comparison {
	t.Helper()
	parse := func(text string) *Policy {
		p, err := Parse("p.yaml", []byte("version: 1\n"+text+"\n"))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	c := NewComparison(parse(was), parse(is))
	c.AskAround()
	return c
}

// TestAskAroundFinds: small differences, each of which changes a decision one
// way or both.
func TestAskAroundFinds(t *testing.T) {
	const (
		allow = "rules: [{id: a, effect: allow, from: ['" + web + "']%s}]"
		deny  = "rules: [{id: a, effect: allow, from: ['spiffe://example.org/**']}, {id: d, effect: deny%s}]"
		from  = "rules: [{id: a, effect: allow, from: [%s]}]"
	)
	var sixty []string
	for i := range 60 {
		sixty = append(sixty, fmt.Sprintf("'spiffe://example.org/n%d'", i))
	}
	for name, tt := range map[string]struct {
		rules, was, is string
		want           string // of: allow, deny
	}{
		"a network more":             {allow, ", source_ip: [10.0.0.0/8]", ", source_ip: [10.0.0.0/8, 192.168.0.0/16]", "allow"},
		"a longer network":           {allow, ", source_ip: [10.0.0.0/8]", ", source_ip: [10.0.0.0/9]", "deny"},
		"no network":                 {allow, ", at: inbound, source_ip: [10.0.0.0/8]", ", at: inbound", "allow"},
		"an excluded network":        {allow, ", not_source_ip: [10.0.0.0/8]", ", not_source_ip: [10.0.0.0/8, 'fd00::/8']", "deny"},
		"a denied network, excluded": {deny, ", at: inbound, source_ip: [10.0.0.0/8]", ", at: inbound", "deny"},
		"a port":                     {allow, ", ports: [8443]", ", ports: [8443, 9443]", "allow"},
		"a wider range":              {allow, ", ports: ['9000-9100']", ", ports: ['9000-9200']", "allow"},
		"a denied port":              {deny, ", ports: [1]", ", ports: [1, 2]", "deny"},
		"any port denied":            {deny, ", ports: [1]", "", "deny"},
		"a server name":              {allow, ", sni: [a.example]", ", sni: ['*.example']", "allow"},
		"a server name denied":       {deny, ", sni: [a.example, b.example]", ", sni: [a.example]", "allow"},
		"a method":                   {allow, ", http: {methods: [GET]}", ", http: {methods: [GET, PUT]}", "allow"},
		"another method":             {allow, ", http: {methods: [GET]}", ", http: {methods: [PUT]}", "allow deny"},
		"any method":                 {allow, ", http: {methods: [GET], paths: [/a]}", ", http: {paths: [/a]}", "allow"},
		"any denied method":          {deny, ", http: {methods: [GET], paths: [/a]}", ", http: {paths: [/a]}", "deny"},
		"a host":                     {allow, ", http: {hosts: [a.example]}", ", http: {hosts: [a.example, '*.b.example:80']}", "allow"},
		"a host's port":              {allow, ", http: {hosts: ['a.example:80']}", ", http: {hosts: [a.example]}", "allow"},
		"a path":                     {allow, ", http: {paths: [/a]}", ", http: {paths: [/a, /b]}", "allow"},
		"the ninth path":             {allow, ", http: {paths: [/a, /b, /c, /d, /e, /f, /g, /h]}", ", http: {paths: [/a, /b, /c, /d, /e, /f, /g, /h, /i]}", "allow"},
		"all below":                  {allow, ", http: {paths: ['/a/{x}']}", ", http: {paths: [/a/**]}", "allow"},
		"a slash at the end":         {allow, ", http: {paths: [/a]}", ", http: {paths: [/a, /a/]}", "allow"},
		"a denied path":              {deny, ", http: {paths: [/a]}", ", http: {paths: [/a, '/b/{x}/c']}", "deny"},
		"a header":                   {allow, ", http: {headers: {x-env: [prod]}}", ", http: {headers: {x-env: [prod, test]}}", "allow"},
		"no header":                  {allow, ", http: {paths: [/a], headers: {x-env: [prod]}}", ", http: {paths: [/a]}", "allow"},
		"presence":                   {allow, ", http: {headers: {x-env: present}}", ", http: {headers: {x-env: absent}}", "allow deny"},
		"a gRPC method":              {allow, ", grpc: {services: [a.B], methods: [C]}", ", grpc: {services: [a.B], methods: [C, D]}", "allow"},
		"gRPC no more":               {allow, ", grpc: {services: [a.B], methods: [C]}", ", http: {methods: [POST], paths: [/a.B/C]}", "allow"},
		"an end":                     {allow, ", at: inbound", "", "allow"},
		"a listener":                 {allow, ", on: [a, b]", ", on: [a, c]", "allow deny"},
		"any listener":               {allow, ", on: [a]", "", "allow"},
		"out of the shadow":          {deny, ", shadow: true", "", "deny"},
		"into the shadow":            {allow, "", ", shadow: true", "deny"},
		"one segment more":           {from, "'spiffe://example.org/a/*'", "'spiffe://example.org/a/**'", "allow"},
		"SPIRE's own":                {from, "'spiffe://example.org/*/*'", "'spiffe://example.org/**'", "allow deny"},
		"the last of many":           {from, strings.Join(sixty[:59], ", "), strings.Join(sixty, ", "), "allow"},
		"plaintext":                  {"rules: [{id: a, effect: allow, at: inbound, from: [%s]}]", "'" + web + "'", "'" + web + "', unauthenticated", "allow"},
		"whom":                       {allow, ", to: ['spiffe://example.org/a']", ", to: ['spiffe://example.org/*']", "allow"},
		"a certificate":              {"rules: [{id: a, effect: allow, from: ['" + web + "']}]%s", "", "\nrevoked: [{issuer: 'aa', serial: '01'}]", "deny"},
		"a subject":                  {allow, ", http: {subjects: ['" + orders + "']}", ", http: {subjects: ['" + orders + "', 'spiffe://example.org/u/*']}", "allow"},
		"any subject":                {allow, ", http: {subjects: ['" + orders + "']}", ", http: {subjects: ['spiffe://example.org/**', 'spiffe://partner.example/**']}", "allow"},
		"subjects no more":           {allow, ", at: inbound, http: {methods: [GET], subjects: ['" + orders + "']}", ", at: inbound, http: {methods: [GET]}", "allow deny"},
		"a denied subject":           {deny, ", http: {subjects: ['" + web + "']}", ", http: {subjects: ['" + web + "', 'spiffe://example.org/u']}", "deny"},
		"itself":                     {allow, ", at: inbound, when: request.subject == from.id", ", at: inbound, when: request.subject == \"\"", "allow deny"},
		"a subject revoked":          {"rules: [{id: a, effect: allow, from: ['" + web + "'], http: {subjects: ['spiffe://example.org/u/*']}}]%s", "", "\nrevoked: ['spiffe://example.org/u/7']", "deny"},
		"a revocation taken back":    {"rules: [{id: a, effect: allow, from: ['" + web + "']}]%s", "\nrevoked: ['" + web + "']", "", "allow"},
	} {
		t.Run(name, func(t *testing.T) {
			c := comparison(t, strings.Replace(tt.rules, "%s", tt.was, 1), strings.Replace(tt.rules, "%s", tt.is, 1))
			got := map[string]bool{}
			for _, change := range c.Changes() {
				got[map[bool]string{true: "allow", false: "deny"}[change.Is.Allow]] = true
				for i := range change.Examples { // are what they are said to be
					var was, is Decision
					c.was.Decide(&change.Examples[i], &was)
					c.is.Decide(&change.Examples[i], &is)
					if was.Allow == is.Allow || was.Rule != change.Was.Rule || is.Rule != change.Is.Rule {
						t.Errorf("%s is an example of %+v", change.Examples[i].describe(), change)
					}
				}
			}
			for _, word := range []string{"allow", "deny"} {
				if got[word] != slices.Contains(strings.Fields(tt.want), word) {
					t.Errorf("changes: %v, want %s", got, tt.want)
				}
			}
			if c.Incomplete {
				t.Error("incomplete")
			}
		})
	}
}

// TestAskAroundIsBounded: two large policies that have nothing in common, and
// a rule with many identities on both sides.
func TestAskAroundIsBounded(t *testing.T) {
	large := func(word string) string {
		var b strings.Builder
		b.WriteString("rules:\n")
		for i := range 20_000 {
			fmt.Fprintf(&b, "- {id: %s%d, effect: allow, from: ['spiffe://example.org/%s/n%d'], to: ['spiffe://example.org/s%d']}\n", word, i, word, i, i%50)
		}
		return b.String()
	}
	wide := func(n int) string {
		var ids []string
		for i := range n {
			ids = append(ids, fmt.Sprintf("'spiffe://example.org/n%d'", i))
		}
		list := strings.Join(ids, ", ")
		return "rules:\n- {id: a, effect: allow, from: [" + list + "], to: [" + list + "]}\n- {id: b, effect: deny, from: [" + list + "], to: [" + list + "]}"
	}
	for name, pair := range map[string][2]string{"large": {large("a"), large("b")}, "wide": {wide(3000), wide(2999)}} {
		c := comparison(t, pair[0], pair[1])
		if !c.Incomplete || c.Asked == 0 || c.Asked > maxMadeUp {
			t.Errorf("%s: asked %d, incomplete: %t", name, c.Asked, c.Incomplete)
		}
	}
}

func TestDifferences(t *testing.T) {
	c := comparison(t,
		"trust_domains: {a.example: {ids: [/x, /y]}, b.example: {ids: [/x]}}\nrules: [{id: a, effect: allow, from: ['"+web+"']}]\nrevoked: ['"+web+"', {issuer: 'aa', serial: '01'}]",
		"trust_domains: {a.example: {ids: [/y, /x]}, b.example: {ids: [/z]}}\nrules: [{id: a, effect: deny, from: ['"+web+"']}]\nlimits: [{id: l, rps: 1}]\nrevoked: ['"+orders+"']")
	got := fmt.Sprint(c.Differences())
	if want := "{[limit:l revoked:" + orders + "] [a trust_domain:b.example] [revoked:1@aa revoked:" + web + "]}"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestHeaderRules(t *testing.T) {
	c := comparison(t, "", `rules:
- {id: a, effect: allow, from: ['`+web+`'], http: {headers: {x-env: present}}}
- {id: b, effect: allow, from: ['`+web+`'], http: {methods: [GET]}}
- {id: c, effect: allow, from: ['`+web+`'], grpc: {services: [a.B]}}
- {id: d, effect: deny, grpc: {services: [a.B]}}
- {id: e, effect: deny, shadow: true, http: {headers: {x-env: present}}}`)
	if got := c.is.HeaderRules(); !slices.Equal(got, []string{"a", "c"}) {
		t.Errorf("%q", got)
	}
	if c.was.HeaderRules() != nil || c.is.RevokesCertificates() || (*Policy)(nil).RevokesCertificates() {
		t.Error("a policy without")
	}
}
