package importer

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// GhostunnelOptions says what the flags leave open.
type GhostunnelOptions struct {
	// TrustDomains are those that the proxy trusts, its own first. They are
	// needed where a flag means anybody, and for a client.
	TrustDomains []string
	// Listener is the name of the listener that takes the tunnel's place. Empty:
	// the rules are for all listeners.
	Listener string
}

// Ghostunnel imports the access flags of one ghostunnel, server or client, out
// of its command line.
func Ghostunnel(commandLine Input, o GhostunnelOptions) *Result {
	t := tunnel{draft: &draft{}, GhostunnelOptions: o}
	if t.options() && t.fits([]Input{commandLine}) {
		if at, problem := checkText(&commandLine); problem != "" {
			t.fail(at, "%s", problem)
		} else if words, at, problem := splitWords(&commandLine); problem != "" {
			t.fail(at, "%s", problem)
		} else {
			t.commandLine(&commandLine, words)
		}
	}
	return t.result("ghostunnel")
}

// CommandLine returns arguments as an Input for Ghostunnel, one a line.
func CommandLine(args []string) Input {
	var b strings.Builder
	for _, a := range args {
		b.WriteString("'" + strings.ReplaceAll(a, "'", `'\''`) + "'\n")
	}
	return Input{Name: "arguments", Data: []byte(b.String())}
}

// tunnel is an import from ghostunnel.
type tunnel struct {
	*draft
	GhostunnelOptions
	server  bool
	started word
	flags   map[string][]word // of access, by the name that is documented
}

func (t *tunnel) options() bool {
	good := len(t.TrustDomains) <= 64
	for _, domain := range t.TrustDomains {
		good = good && checkDomain(domain) == nil
	}
	if !good {
		t.refuse(Refusal{Msg: "trust domains: at most 64, each like example.org", Widens: true})
	}
	return good
}

func (t *tunnel) fail(at place, format string, args ...any) {
	t.refuse(Refusal{File: at.file, Line: at.line, Column: at.column, Msg: fmt.Sprintf(format, args...), Widens: true})
}

// The flags of ghostunnel that say who may pass, and whether they take a value.
// Those of the second table have no part in it.
var accessFlags = map[string]bool{
	"allow-all": false, "allow-cn": true, "allow-ou": true, "allow-dns": true, "allow-ip": true, "allow-uri": true,
	"allow-spki-pin": true, "allow-policy": true, "allow-query": true, "disable-authentication": false,
	"verify-cn": true, "verify-ou": true, "verify-dns": true, "verify-ip": true, "verify-uri": true,
	"verify-spki-pin": true, "verify-policy": true, "verify-query": true,
	"use-workload-api": false, "use-workload-api-addr": true,
}

var otherFlags = map[string]bool{
	"listen": true, "target": true, "target-status": true, "proxy-protocol": false, "proxy-protocol-mode": true,
	"unsafe-target": false, "unsafe-listen": false, "override-server-name": true, "proxy": true, "connect-proxy": true,
	"auto-acme-cert": true, "auto-acme-email": true, "auto-acme-agree-to-tos": false, "auto-acme-ca": true, "auto-acme-testca": true,
	"keystore": true, "cert": true, "key": true, "storepass": true, "cacert": true, "use-workload-api-timeout": true,
	"cipher-suites": true, "allow-unsafe-cipher-suites": false, "max-tls-version": true, "timed-reload": true,
	"shutdown-timeout": true, "connect-timeout": true, "close-timeout": true, "max-conn-lifetime": true, "max-concurrent-conns": true,
	"metrics-graphite": true, "metrics-url": true, "metrics-prefix": true, "metrics-interval": true,
	"status": true, "enable-pprof": false, "enable-shutdown": false, "quiet": true, "skip-resolve": false,
	"keychain-identity": true, "keychain-issuer": true, "keychain-require-token": false,
	"pkcs11-module": true, "pkcs11-token-label": true, "pkcs11-pin": true,
	"use-landlock": false, "disable-landlock": false, "syslog": false,
}

// oldNames are names of flags that ghostunnel still takes.
var oldNames = map[string]string{
	"allow-dns-san": "allow-dns", "allow-ip-san": "allow-ip", "allow-uri-san": "allow-uri",
	"verify-dns-san": "verify-dns", "verify-ip-san": "verify-ip", "verify-uri-san": "verify-uri",
}

// commandLine sorts the words and makes rules of them.
func (t *tunnel) commandLine(in *Input, words []word) {
	t.flags = map[string][]word{}
	mode := ""
	for i := 0; i < len(words); i++ {
		w := words[i]
		name, isFlag := strings.CutPrefix(w.text, "--")
		switch {
		case isFlag && name != "":
			skip, ok := t.flag(words, i, name)
			if !ok {
				return
			}
			i += skip
		case i == 0 && (w.text == "ghostunnel" || strings.HasSuffix(w.text, "/ghostunnel")):
		case mode == "" && (w.text == "server" || w.text == "client"):
			mode, t.started = w.text, w
		default:
			t.fail(w.at, "%q: want flags of ghostunnel, after `server` or `client`", clip(w.text))
			return
		}
	}
	if mode == "" {
		t.fail(place{in.Name, 1, 1}, "neither `server` nor `client` is there: want the command line of one ghostunnel")
		return
	}
	t.server = mode == "server"
	if t.server {
		t.serverRules()
	} else {
		t.clientRules()
	}
}

// flag takes in the flag at i, and returns how many words its value takes.
func (t *tunnel) flag(words []word, i int, name string) (skip int, ok bool) {
	w := words[i]
	name, value, given := strings.Cut(name, "=")
	if old := oldNames[name]; old != "" {
		name = old
	}
	takes, known := accessFlags[name]
	if !known {
		takes, known = otherFlags[name]
	}
	switch {
	case !known && strings.HasPrefix(name, "no-"):
		t.fail(w.at, "--%s: say without it what is meant, by leaving the flag out", clip(name))
		return 0, false
	case !known:
		t.fail(w.at, "--%s is no known flag of ghostunnel", clip(name))
		return 0, false
	case !takes && given:
		t.fail(w.at, "--%s takes no value", name)
		return 0, false
	case takes && !given && i+1 == len(words):
		t.fail(w.at, "--%s needs a value", name)
		return 0, false
	case takes && !given:
		value, skip = words[i+1].text, 1
	}
	if _, access := accessFlags[name]; access {
		t.flags[name] = append(t.flags[name], word{value, w.at})
	}
	return skip, true
}

// serverRules makes the rule of a server: any flag that matches is enough.
func (t *tunnel) serverRules() {
	t.note("A ghostunnel takes any certificate that its roots signed; here a peer has an SVID, and the flags stand for its SPIFFE ID.")
	p := &piece{draft: t.draft, object: "server"} // who is left out is not let in
	for _, f := range t.flags["disable-authentication"] {
		p.refuse(f.at, "--disable-authentication", "clients without certificates cannot be let in over TLS; a permissive listener takes plaintext, with `from: [unauthenticated]`")
	}
	t.unsayable(p, "allow")
	for _, name := range []string{"verify-cn", "verify-ou", "verify-dns", "verify-ip", "verify-uri", "verify-spki-pin", "verify-policy", "verify-query"} {
		for _, f := range t.flags[name] {
			t.fail(f.at, "--%s belongs to a client", name)
		}
	}
	all, uris := t.flags["allow-all"], t.flags["allow-uri"]
	if len(all) > 0 && len(t.flags["allow-cn"])+len(t.flags["allow-ou"])+len(t.flags["allow-dns"])+len(t.flags["allow-ip"])+len(uris) > 0 {
		t.fail(all[0].at, "--allow-all excludes the other flags, and ghostunnel does not start with both")
		return
	}
	var from []string
	if len(all) > 0 {
		from = t.anyone(p, all[0].at, "--allow-all")
	}
	for _, uri := range uris {
		from = append(from, t.patterns(p, uri, "--allow-uri")...)
	}
	if len(from) == 0 {
		if len(t.refusals) == 0 {
			t.fail(t.started.at, "no flag says who may pass, and ghostunnel does not start so")
		}
		return
	}
	t.rules = append(t.rules, rule{
		source: t.started.at, object: "ghostunnel server", id: "ghostunnel/server", allow: true, at: "inbound", on: t.on(), from: unique(from),
	})
}

// unsayable refuses the flags that ask for what a SPIFFE ID does not say.
func (t *tunnel) unsayable(p *piece, verb string) {
	for _, f := range []struct{ name, why string }{
		{"cn", "a common name is no part of a SPIFFE ID; name the SPIFFE ID of those who have it"},
		{"ou", "an organizational unit is no part of a SPIFFE ID; name the SPIFFE IDs of those who are in it"},
		{"dns", "a DNS name is no part of a SPIFFE ID; name the SPIFFE ID of those who have it"},
		{"ip", "an address in a certificate is no part of a SPIFFE ID; name the SPIFFE ID of those who have it"},
		{"spki-pin", "a pinned key has no identity, and SVIDs change their keys"},
		{"policy", "rules in Rego cannot be said"},
		{"query", "rules in Rego cannot be said"},
	} {
		name := verb + "-" + f.name
		for _, w := range t.flags[name] {
			p.refuse(w.at, "--"+name, "%q: %s", clip(w.text), f.why)
		}
	}
}

func (t *tunnel) on() []string {
	if t.Listener == "" {
		return nil
	}
	return []string{t.Listener}
}

// anyone returns the patterns of everybody who is trusted. A ** at the top
// leaves out the identities of SPIRE itself, which ghostunnel does not.
func (t *tunnel) anyone(p *piece, at place, flag string) []string {
	if len(t.TrustDomains) == 0 {
		p.refuse(at, flag, "means everybody who is trusted: name the trust domains with --trust-domain")
	}
	var out []string
	for _, domain := range t.TrustDomains {
		out = append(out, below(scheme+domain)...)
	}
	return out
}

// below returns the patterns of all that is below, where ** alone would leave
// out what is SPIRE's.
func below(domain string) []string {
	return []string{domain + "/**", domain + "/spire", domain + "/spire/**"}
}

// patterns returns the patterns that match what a pattern of ghostunnel does.
// Its * is one segment as here; its ** is none or more, where ours is one or
// more.
func (t *tunnel) patterns(p *piece, uri word, flag string) []string {
	refuse := func(format string, args ...any) []string {
		p.refuse(uri.at, flag, "%q: %s", clip(uri.text), fmt.Sprintf(format, args...))
		return nil
	}
	value := strings.TrimSuffix(uri.text, "/")
	rest, ok := strings.CutPrefix(value, scheme)
	switch {
	case value == many, value == scheme+many:
		return t.anyone(p, uri.at, flag)
	case !ok:
		return refuse("no SPIFFE ID, which is the one URI of an SVID: it would let in nobody")
	}
	domain, path, _ := strings.Cut(rest, "/")
	domains := []string{domain}
	switch {
	case domain == one && len(t.TrustDomains) == 0:
		return refuse("means any trust domain: name those that are trusted with --trust-domain")
	case domain == one:
		domains = t.TrustDomains
	case path == "":
		return refuse("a trust domain without a path is no workload")
	}
	var out []string
	for _, d := range domains {
		whole := scheme + d + "/" + path
		if path == "" {
			continue // spiffe://* is trust domains alone, which no SVID of a workload has
		}
		if err := checkPattern(whole); err != nil {
			return refuse("%v", err)
		}
		switch parent, all := strings.CutSuffix(whole, "/"+many); {
		case all && parent == scheme+d:
			out = append(out, below(parent)...)
		case all:
			out = append(out, parent, whole)
		default:
			out = append(out, whole)
		}
	}
	return out
}

// clientRules makes the rule of a client, and what its listener expects.
func (t *tunnel) clientRules() {
	p := &piece{draft: t.draft, object: "client"}
	t.unsayable(p, "verify")
	for name := range accessFlags {
		for _, f := range t.flags[name] {
			if strings.HasPrefix(name, "allow-") {
				t.fail(f.at, "--%s belongs to a server", name)
			}
		}
	}
	for _, f := range t.flags["disable-authentication"] {
		p.refuse(f.at, "--disable-authentication", "an outbound listener always shows its own SVID")
	}
	p.widens = true // who is left out of here was checked
	if len(t.flags["use-workload-api"])+len(t.flags["use-workload-api-addr"]) == 0 {
		p.refuse(t.started.at, "--use-workload-api", "without it ghostunnel checks the host name of the server's certificate as well, and here no name is proof; give the servers SVIDs and add the flag")
	}
	p.widens = false
	if len(t.TrustDomains) == 0 {
		p.refuse(t.started.at, "", "who calls is said by trust domain: name it with --trust-domain")
		return
	}
	uris := t.flags["verify-uri"]
	if len(uris) == 0 && len(t.refusals) == 0 {
		p.refuse(t.started.at, "", "any server is taken: an outbound listener expects servers by name, so name them with --verify-uri")
	}
	var to []string
	for _, uri := range uris {
		for _, pattern := range t.patterns(p, uri, "--verify-uri") {
			if !exact(pattern) {
				p.refuse(uri.at, "--verify-uri", "%q: `expect` of an outbound listener names whole SPIFFE IDs; name each server", clip(uri.text))
				break
			}
			to = append(to, pattern)
		}
	}
	if len(to) == 0 {
		return
	}
	to = unique(to)
	quoted := make([]string, len(to))
	for i, id := range to {
		quoted[i] = strconv.Quote(id)
	}
	t.note("The listener in narthex.yaml, direction: outbound, needs expect: [%s]", strings.Join(quoted, ", "))
	t.rules = append(t.rules, rule{
		source: t.started.at, object: "ghostunnel client", id: "ghostunnel/client", allow: true, at: "outbound", on: t.on(),
		from: []string{scheme + t.TrustDomains[0] + "/**"}, to: slices.Clone(to),
	})
}
