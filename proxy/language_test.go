package proxy

import (
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/testca"
)

// This file has what a tcp listener sees of the rule language, by rule text.

// dialFrom comes in plaintext from an address of this host.
func dialFrom(t *testing.T, addr, ip string) net.Conn {
	t.Helper()
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}).Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestLimitOfNewConnections: a rate is each identity's, survives reloads, and
// its new figures hold at once.
func TestLimitOfNewConnections(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	rules := func(burst int) string {
		return allowAll + fmt.Sprintf("limits:\n  - {id: some, on: [orders], rps: 0.001, burst: %d}\n", burst)
	}
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, rules(2)), Identities: source(t, ca.SVID("/orders"), ca)})
	web, batch := clientConfig(ca.SVID("/web")), clientConfig(ca.SVID("/batch"))
	open := func(cc *tls.Config) {
		t.Helper()
		c := dialTLS(t, p.addr("orders"), cc)
		say(t, c, "hello")
		_ = c.Close()
		p.next()
	}
	const limited = "limit some: spiffe://example.org/web may open 0.001 connections a second, %d at once"
	open(web)
	open(web)
	wantRefused(t, p, web, fmt.Sprintf(limited, 2))
	open(batch)
	p.apply(rules(2) + "# another text\n")
	wantRefused(t, p, web, fmt.Sprintf(limited, 2))
	p.apply(rules(3))
	open(web)
	wantRefused(t, p, web, fmt.Sprintf(limited, 3))
	if got := p.metric("narthex_limited_total", "orders", "some"); got != 3 {
		t.Errorf("%v limited", got)
	}
	if got := p.metric("narthex_connections_total", "orders", "limited"); got != 3 {
		t.Errorf("%v connections limited", got)
	}
	p.apply(allowAll)
	open(web)
}

// TestLimitOfLiveConnections: those that live when a limit comes are counted,
// and none of them is ended for it.
func TestLimitOfLiveConnections(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.Enforcement = Audit // lifts no limit
	const one = allowAll + "limits:\n  - {id: one, per: all, connections: 1}\n"
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	web, batch := clientConfig(ca.SVID("/web")), clientConfig(ca.SVID("/batch"))
	first, second := dialTLS(t, p.addr("orders"), web), dialTLS(t, p.addr("orders"), batch)
	say(t, first, "hello")
	say(t, second, "hello")
	if applied := p.apply(one); applied.Closed != 0 || applied.NowRefused != 0 || applied.Asked != 2 {
		t.Errorf("applied %+v", applied)
	}
	const limited = "limit one: all that it is for together may have 1 live connections"
	wantRefused(t, p, web, limited)
	_ = first.Close()
	p.next()
	c := dialTLS(t, p.addr("orders"), web)
	gone(t, c)
	if a := p.next(); a.Limit != "one" || a.Decision != "allow" || a.Rule != "all" || a.Outcome != "failure" || a.Reason != limited {
		t.Errorf("access record %+v", a)
	}
	say(t, second, "it stays")
	_ = second.Close()
	p.next()
	third := dialTLS(t, p.addr("orders"), web)
	say(t, third, "in its place")
	p.apply(allowAll)
	p.apply(one)
	wantRefused(t, p, batch, limited)
	p.apply(denyAll + "limits:\n  - {id: one, per: all, connections: 1}\n")
	if got := p.metric("narthex_limited_total", "orders", "one"); got != 3 {
		t.Errorf("%v limited", got)
	}
	_ = third.Close()
	p.next()
	say(t, dialTLS(t, p.addr("orders"), web), "an audit lets it in")
	wantRefused(t, p, web, limited)
}

// TestLimitOfSources: plaintext is limited by where it comes from.
func TestLimitOfSources(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := permissive("orders", serve(t, echo))
	p := run(t, Config{
		Listeners: []Listener{in}, Policy: rulesOf(t, allowPlain+"limits:\n  - {id: one, from: [unauthenticated], connections: 1}\n"),
		Identities: source(t, ca.SVID("/orders"), ca),
	})
	say(t, dialFrom(t, p.addr("orders"), "127.0.0.2"), "hello")
	say(t, dialFrom(t, p.addr("orders"), "127.0.0.3"), "hello")
	c := dialFrom(t, p.addr("orders"), "127.0.0.2")
	_, _ = c.Write([]byte("hello"))
	gone(t, c)
	if a := p.next(); a.Limit != "one" || a.Reason != "limit one: 127.0.0.2 may have 1 live connections" {
		t.Errorf("access record %+v", a)
	}
}

// TestDeniedSpendsNothing: limits are asked after the rules.
func TestDeniedSpendsNothing(t *testing.T) {
	ca := testca.New(t, "example.org")
	p := run(t, Config{
		Listeners: []Listener{inbound("orders", serve(t, echo))}, Identities: source(t, ca.SVID("/orders"), ca),
		Policy: rulesOf(t, allowWeb+"limits:\n  - {id: one, per: all, rps: 0.001}\n"),
	})
	for range 3 {
		wantRefused(t, p, clientConfig(ca.SVID("/batch")), "policy: no rule allows it")
	}
	say(t, dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web"))), "hello")
}

// TestShadow: rules in shadow end nothing and let nobody in, and are seen.
func TestShadow(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	const shadows = allowWeb + `  - {id: no-web, effect: deny, shadow: true, from: ["spiffe://example.org/web"]}
  - {id: batch, effect: allow, shadow: true, from: ["spiffe://example.org/batch"]}
`
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowWeb), Identities: source(t, ca.SVID("/orders"), ca)})
	web := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, web, "hello")
	if applied := p.apply(shadows); applied.NowRefused != 0 {
		t.Errorf("applied %+v", applied)
	}
	say(t, web, "it stays")
	if got := p.Status().Listeners[0].Connections[0].Shadow; strings.Join(got, ",") != "no-web" {
		t.Errorf("the status names %v", got)
	}
	p.apply(shadows + "# another text\n") // asks again, which is no news
	if got := p.metric("narthex_policy_decisions_total", "orders", "no-web", "would_deny"); got != 1 {
		t.Errorf("%v would be denied", got)
	}
	_ = web.Close()
	if a := p.next(); strings.Join(a.Shadow, ",") != "no-web" || a.Decision != "allow" || a.Rule != "web" {
		t.Errorf("access record %+v", a)
	}
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/batch")))
	gone(t, c)
	if a := p.next(); strings.Join(a.Shadow, ",") != "batch" || a.Decision != "deny" {
		t.Errorf("access record %+v", a)
	}
	if got := p.metric("narthex_policy_decisions_total", "orders", "batch", "would_allow"); got != 1 {
		t.Errorf("%v would be allowed", got)
	}
}

// TestWhereItComesFromAndGoes: source, port and server name decide, the first
// time and later.
func TestWhereItComesFromAndGoes(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := permissive("orders", serve(t, echo))
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, denyAll), Identities: source(t, ca.SVID("/orders"), ca)})
	_, port, err := net.SplitHostPort(p.addr("orders"))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, conditions string
		ok               bool
	}{
		{"source", `source_ip: [127.0.0.2/32, "2001:db8::/32"]`, true},
		{"another source", `source_ip: [127.0.0.3]`, false},
		{"not from", `not_source_ip: [127.0.0.3]`, true},
		{"its own address is left out", `not_source_ip: [127.0.0.0/8]`, false},
		{"port", "ports: [" + port + "]", true},
		{"another port", "ports: [1]", false},
		{"no server name", `sni: ["*.example.org"]`, false},
		{"CEL", `when: 'source.ip == "127.0.0.2" && connection.port == ` + port + ` && !from.authenticated && connection.direction == "inbound"'`, true},
		{"CEL of another network", `when: 'inNetwork(source.ip, "10.0.0.0/8")'`, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			rules := "version: 1\nrules:\n  - {id: plain, effect: allow, from: [unauthenticated], on: [orders], " + test.conditions + "}\n"
			p.apply(rules)
			c := dialFrom(t, p.addr("orders"), "127.0.0.2")
			if err := trySay(c, "hello"); (err == nil) != test.ok {
				t.Fatalf("%v, want it to pass: %t", err, test.ok)
			}
			if test.ok {
				p.apply(rules + "# asked again\n")
				say(t, c, "still there")
				p.apply(denyAll)
				gone(t, c)
			}
			p.next()
		})
	}
	named := clientConfig(ca.SVID("/web"))
	named.ServerName = "Admin.Example.org"
	p.apply(allowAll + "  - {id: no-admin, effect: deny, sni: [admin.example.org]}\n")
	wantRefused(t, p, named, "policy: denied by a rule (no-admin)")
	wantRefused(t, p, clientConfig(ca.SVID("/web")), "policy: denied by a rule (no-admin)") // left out is no way around
	named.ServerName = "www.example.org"
	say(t, dialTLS(t, p.addr("orders"), named), "hello")
}

// TestTimeRules: who may come until a time is gone after it.
func TestTimeRules(t *testing.T) {
	ca := testca.New(t, "example.org")
	end := time.Now().Add(3 * time.Second)
	log := &lines{}
	p := run(t, Config{
		Listeners: []Listener{inbound("orders", serve(t, echo))}, Identities: source(t, ca.SVID("/orders"), ca),
		Policy: rulesOf(t, allowWeb+`  - id: until
    effect: allow
    from: ["spiffe://example.org/batch"]
    when: 'request.time < timestamp("`+end.UTC().Format(time.RFC3339Nano)+`")'
`), Log: hclog.New(&hclog.LoggerOptions{Output: log}),
	})
	batch := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/batch")))
	web := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, batch, "hello")
	say(t, web, "hello")
	p.askForTime()
	say(t, batch, "it is not yet time")
	p.until("the time is over", func() bool { return time.Now().After(end) })
	p.askForTime()
	gone(t, batch)
	if a := p.next(); a.Closed != "policy" || a.Reason != "policy: no rule allows it" {
		t.Errorf("access record %+v", a)
	}
	if log.count("time rules: connections are not allowed any more: connections_asked=2 connections_refused=1 connections_closed=1\n") != 1 {
		t.Errorf("log:\n%s", log.text.String())
	}
	say(t, web, "it stays")
	wantRefused(t, p, clientConfig(ca.SVID("/batch")), "policy: no rule allows it")
}

// TestChangedRulesAreTold: a reload says which rules are other, and whom they
// refuse.
func TestChangedRulesAreTold(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.OnPolicyChange = ActionKeep
	log := &lines{}
	p := run(t, Config{
		Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca), Log: hclog.New(&hclog.LoggerOptions{Output: log}),
	})
	web, batch := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web"))), dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/batch")))
	say(t, web, "hello")
	say(t, batch, "hello")
	applied := p.apply(`version: 1
rules:
  - {id: all, effect: allow, from: ["spiffe://example.org/web"]}
  - {id: new, effect: deny, from: ["spiffe://example.org/other"]}
`)
	if r := applied.Rules; strings.Join(r.Added, ",") != "new" || strings.Join(r.Changed, ",") != "all" || len(r.Removed) != 0 || applied.Asked != 2 || applied.NowRefused != 1 || applied.Closed != 0 || applied.Kept != 1 {
		t.Errorf("applied %+v", applied)
	}
	applied = p.apply(allowAll)
	if r := applied.Rules; len(r.Added) != 0 || strings.Join(r.Changed, ",") != "all" || strings.Join(r.Removed, ",") != "new" || applied.NowRefused != 0 {
		t.Errorf("applied %+v", applied)
	}
	if log.count("rules changed: 0 added, 1 changed, 1 removed: generation=3 rules=1 rules_changed=all rules_removed=new connections_asked=2 connections_refused=0 connections_closed=0\n") != 1 {
		t.Errorf("log:\n%s", log.text.String())
	}
	say(t, batch, "it stays")
}
