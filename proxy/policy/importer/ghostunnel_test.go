package importer

import (
	"strings"
	"testing"
)

func tunnelOf(line string) *Result {
	return Ghostunnel(Input{"line", []byte(line)}, GhostunnelOptions{TrustDomains: []string{"example.org"}, Listener: "inventory"})
}

func TestGhostunnel(t *testing.T) {
	t.Parallel()
	const server, client = `allow; on: ["inventory"]; from: `, `allow; on: ["inventory"]; at: outbound; from: ["spiffe://example.org/**"]; to: `
	for _, tc := range []struct{ line, want string }{
		{
			"ghostunnel server --listen :8443 --target localhost:8080 --allow-uri spiffe://example.org/a --allow-uri=spiffe://example.org/ns/*/sa/web",
			server + `["spiffe://example.org/a", "spiffe://example.org/ns/*/sa/web"]`,
		},
		{"server --allow-uri-san spiffe://example.org/a/", server + `["spiffe://example.org/a"]`},
		{"server --allow-uri spiffe://example.org/ns/**", server + `["spiffe://example.org/ns", "spiffe://example.org/ns/**"]`},
		{"server --allow-uri spiffe://example.org/**", server + `["spiffe://example.org/**", "spiffe://example.org/spire", "spiffe://example.org/spire/**"]`},
		{"server --allow-uri spiffe://*/a", server + `["spiffe://example.org/a"]`},
		{"server --allow-all", server + `["spiffe://example.org/**", "spiffe://example.org/spire", "spiffe://example.org/spire/**"]`},
		{"# of the unit\n/usr/bin/ghostunnel --quiet=all \\\n  server '--allow-uri' \"spiffe://example.org/a\"", server + `["spiffe://example.org/a"]`},
		{"--use-workload-api client --target x:1 --verify-uri spiffe://example.org/b", client + `["spiffe://example.org/b"]`},
	} {
		r := tunnelOf(tc.line)
		if got := strings.Join(bare(r.Text), "\n"); got != tc.want || r.Refused(false) {
			t.Errorf("%s:\ngot  %s\nwant %s\n%s", tc.line, got, tc.want, refusals(r))
		}
		loads(t, r)
	}
	if text := tunnelOf("client --use-workload-api --verify-uri spiffe://example.org/b").Text; !strings.Contains(strings.ReplaceAll(string(text), "\n#", ""), `expect: ["spiffe://example.org/b"]`) {
		t.Errorf("expect is not said:\n%s", text)
	}
}

func TestGhostunnelRefuses(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		line, want string
		widens     bool
	}{
		{"server --allow-cn web", `line:1:8: server: --allow-cn: "web": a common name is no part of a SPIFFE ID`, false},
		{"server --allow-ou web", "--allow-ou", false},
		{"server --allow-dns web.example", "--allow-dns", false},
		{"server --allow-ip-san 10.0.0.1", "--allow-ip", false},
		{"server --allow-policy x --allow-query y", "Rego", false},
		{"server --allow-spki-pin sha256:x", "pinned key", false},
		{"server --disable-authentication", "permissive listener", false},
		{"server --allow-uri https://web.example/", "it would let in nobody", false},
		{"server --allow-uri spiffe://example.org/ns/a*", "is no segment", false},
		{"server --allow-uri spiffe://Example.org/a", "is no trust domain", false},
		{"server --allow-uri spiffe://example.org/", "no workload", false},
		{"server", "ghostunnel does not start so", true},
		{"server --allow-all --allow-uri spiffe://example.org/a", "excludes the other flags", true},
		{"server --verify-uri spiffe://example.org/a", "--verify-uri belongs to a client", true},
		{"--allow-all", "neither `server` nor `client`", true},
		{"server client", `"client": want flags`, true},
		{"server --colour red", "--colour is no known flag", true},
		{"server --no-allow-all", "leaving the flag out", true},
		{"server --allow-uri", "needs a value", true},
		{"server --allow-all=yes", "takes no value", true},
		{"server --allow-uri $ID", `line:1:20: "$"`, true},
		{"server --allow-uri 'x", "is not ended", true},
		{"client --verify-uri spiffe://example.org/a", "checks the host name", true},
		{"client --use-workload-api", "any server is taken", false},
		{"client --use-workload-api --verify-uri spiffe://example.org/*", "whole SPIFFE IDs", false},
		{"client --use-workload-api --verify-cn x", "--verify-cn", false},
		{"client --use-workload-api --verify-uri spiffe://example.org/a --disable-authentication", "shows its own SVID", false},
		{"client --allow-cn x", "belongs to a server", true},
	} {
		r := tunnelOf(tc.line)
		if got := refusals(r); !strings.Contains(got, tc.want) || !r.Refused(false) || r.Refused(true) != tc.widens {
			t.Errorf("%s:\ngot  %q, refused with --partial: %v\nwant %q, %v", tc.line, got, r.Refused(true), tc.want, tc.widens)
		}
	}
	open := Ghostunnel(CommandLine([]string{"server", "--allow-all"}), GhostunnelOptions{})
	if got := refusals(open); !strings.Contains(got, "name the trust domains") {
		t.Errorf("anybody, of no trust domain: %s", got)
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	args := []string{"server", "it's", `a "b" \`, "$x", "", "# no comment", "two\nlines"}
	in := CommandLine(args)
	words, at, problem := splitWords(&in)
	if problem != "" {
		t.Fatalf("%v: %s", at, problem)
	}
	if len(words) != len(args) {
		t.Fatalf("got %v", words)
	}
	for i := range args {
		if words[i].text != args[i] {
			t.Errorf("got %q, want %q", words[i].text, args[i])
		}
	}
}

func FuzzGhostunnel(f *testing.F) {
	f.Add("ghostunnel server --allow-uri 'spiffe://example.org/ns/*/sa/web' # x")
	f.Add("client --use-workload-api --verify-uri=\"spiffe://example.org/b\"")
	f.Fuzz(func(t *testing.T, line string) {
		safe(t, tunnelOf(line))
	})
}
