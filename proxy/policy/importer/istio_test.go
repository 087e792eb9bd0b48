package importer

import (
	"strings"
	"testing"
)

var mesh1 = IstioOptions{TrustDomains: []string{"example.org"}}

// istioPolicyText writes a policy in namespace shop around a spec.
func istioPolicyText(spec string) []Input {
	return []Input{{"p.yaml", []byte("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: " + spec + "\n")}}
}

// TestIstioFile is a whole file, as it comes out.
func TestIstioFile(t *testing.T) {
	t.Parallel()
	in := `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: orders
  namespace: shop
spec:
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/shop/sa/web"]
    - source:
        namespaces: ["billing"]
---
apiVersion: v1
kind: List
items:
- apiVersion: security.istio.io/v1beta1
  kind: AuthorizationPolicy
  metadata: {name: nothing, namespace: shop}
  spec: {}
- apiVersion: security.istio.io/v1beta1
  kind: AuthorizationPolicy
  metadata: {name: staging, namespace: istio-system}
  spec:
    action: DENY
    rules:
    - from: [{source: {namespaces: [staging]}}]
`
	want := `# Imported from Istio.
#
# Istio decides at the end that is called, and so do these rules (at: inbound).
# Identities are spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT.
#
# A workload that no ALLOW policy selects is open to all in Istio, but for DENY
# policies; here it is closed.
#
# AuthorizationPolicy shop/nothing allows nothing, which closes the workloads it
# selects: they are closed here anyhow.
#
# No ALLOW policy selects all workloads of istio-system: those that none selects
# lie open in Istio but for what DENY policies match, and are closed here. An
# ALLOW policy with ` + "`rules: [{}]`" + ` says in Istio that they should be open.
version: 1
rules:
  # p.yaml:8: AuthorizationPolicy shop/orders, spec.rules[0]
  - id: shop/orders/0
    effect: allow
    at: inbound
    from: ["spiffe://example.org/ns/billing/sa/*", "spiffe://example.org/ns/shop/sa/web"]
    to: ["spiffe://example.org/ns/shop/sa/*"]
  # p.yaml:27: AuthorizationPolicy istio-system/staging, spec.rules[0]
  - id: istio-system/staging/0
    effect: deny
    at: inbound
    from: ["spiffe://example.org/ns/staging/**"]
  # the calling end asks nothing: who may be called is said by ` + "`expect`" + ` and by the end that is called
  - id: istio/outbound
    effect: allow
    at: outbound
    from: ["spiffe://example.org/**"]
`
	r := Istio([]Input{{"p.yaml", []byte(in)}}, mesh1)
	if r.Refused(false) {
		t.Fatal(refusals(r))
	}
	if string(r.Text) != want {
		t.Errorf("got:\n%s\nwant:\n%s", r.Text, want)
	}
	loads(t, r)
}

// TestIstioIdentities tells what conditions on identities become. The rules are
// for workloads of namespace shop.
func TestIstioIdentities(t *testing.T) {
	t.Parallel()
	const (
		allowed = `; to: ["spiffe://example.org/ns/shop/sa/*"]`
		denied  = `; to: ["spiffe://example.org/ns/shop/**"]`
	)
	for _, tc := range []struct{ name, action, source, want string }{
		{"exact", "ALLOW", `principals: [cluster.local/ns/a/sa/b]`, `allow; from: ["spiffe://example.org/ns/a/sa/b"]` + allowed},
		{"own name", "ALLOW", `principals: [example.org/ns/a/sa/b]`, `allow; from: ["spiffe://example.org/ns/a/sa/b"]` + allowed},
		{"other domain", "ALLOW", `principals: [partner.example/ns/a/sa/b]`, `allow; from: ["spiffe://partner.example/ns/a/sa/b"]` + allowed},
		{"namespace prefix", "ALLOW", `principals: ["cluster.local/ns/a/*"]`, `allow; from: ["spiffe://example.org/ns/a/**"]` + allowed},
		{"domain prefix", "DENY", `principals: ["partner.example/*"]`, `deny; from: ["spiffe://partner.example/**"]` + denied},
		{"any domain", "ALLOW", `principals: ["*/ns/a/sa/b"]`, `allow; from: ["spiffe://example.org/ns/a/sa/b"]` + allowed},
		{"account", "ALLOW", `principals: ["*/sa/b"]`, `allow; from: ["spiffe://example.org/ns/*/sa/b"]` + allowed},
		{"anybody identified", "ALLOW", `principals: ["*"]`, `allow; from: ["group:everyone"]` + allowed},
		{"deny anybody identified", "DENY", `principals: ["*"]`, `deny` + denied + `; when: 'from.authenticated'`},
		{"plaintext", "ALLOW", `notPrincipals: ["*"]`, `allow; from: [unauthenticated]` + allowed},
		{"deny plaintext", "DENY", `notPrincipals: ["*"]`, `deny; from: [unauthenticated]` + denied},
		{"not", "ALLOW", `notPrincipals: [cluster.local/ns/a/sa/b, "x.org/ns/c/*", "*/sa/d"]`, `allow; from: ["group:everyone", unauthenticated]` + allowed +
			`; when: '!(from.id == "spiffe://example.org/ns/a/sa/b" || from.id.startsWith("spiffe://x.org/ns/c/") || from.id.endsWith("/sa/d"))'`},
		{"namespaces", "ALLOW", `namespaces: [a, b]`, `allow; from: ["spiffe://example.org/ns/a/sa/*", "spiffe://example.org/ns/b/sa/*"]` + allowed},
		{"deny namespace", "DENY", `namespaces: [a]`, `deny; from: ["spiffe://example.org/ns/a/**"]` + denied},
		{"not namespace", "DENY", `notNamespaces: [a]`, `deny` + denied + `; when: '!(from.path.startsWith("/ns/a/"))'`},
		{"accounts", "ALLOW", `serviceAccounts: [b, a/c]`, `allow; from: ["spiffe://example.org/ns/a/sa/c", "spiffe://example.org/ns/shop/sa/b"]` + allowed},
		{"not account", "ALLOW", `{notServiceAccounts: [b], namespaces: [shop]}`, `allow; from: ["spiffe://example.org/ns/shop/sa/*"]` + allowed + `; when: '!(from.path == "/ns/shop/sa/b")'`},
		{"trust domains", "ALLOW", `trustDomains: [cluster.local, x.org]`, `allow; from: ["spiffe://example.org/**", "spiffe://x.org/**"]` + allowed},
		{"not trust domain", "DENY", `notTrustDomains: [x.org]`, `deny` + denied + `; when: '!(from.trust_domain == "x.org")'`},
		{"both", "ALLOW", `{principals: ["cluster.local/ns/a/*", cluster.local/ns/b/sa/c], namespaces: [a]}`, `allow; from: ["spiffe://example.org/ns/a/sa/*"]` + allowed},
		{"nobody", "ALLOW", `{principals: [cluster.local/ns/b/sa/c], namespaces: [a]}`, ``},
		{"addresses", "ALLOW", `{ipBlocks: [10.1.2.3/8, 192.0.2.1], notIpBlocks: ["2001:db8::/32"]}`, `allow; from: ["group:everyone", unauthenticated]` + allowed +
			`; source_ip: ["10.0.0.0/8", "192.0.2.1/32"]; not_source_ip: ["2001:db8::/32"]`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := Istio(istioPolicyText("{action: "+tc.action+", rules: [{from: [{source: {"+strings.Trim(tc.source, "{}")+"}}]}]}"), mesh1)
			if got := strings.Join(bare(r.Text), "\n"); got != tc.want || r.Refused(false) {
				t.Errorf("got  %s\nwant %s\n%s", got, tc.want, refusals(r))
			}
			loads(t, r)
		})
	}
}

// TestIstioRequests tells what conditions on requests become.
func TestIstioRequests(t *testing.T) {
	t.Parallel()
	const (
		allowed = `allow; from: ["group:everyone", unauthenticated]; to: ["spiffe://example.org/ns/shop/sa/*"]; `
		denied  = `deny; to: ["spiffe://example.org/ns/shop/**"]; `
	)
	for _, tc := range []struct{ name, action, rule, want string }{
		{"methods", "ALLOW", `to: [{operation: {methods: [PUT, GET]}}]`, allowed + `http: {methods: [GET, PUT]}`},
		{"not methods", "DENY", `to: [{operation: {notMethods: [GET]}}]`, denied + `when: '!(request.method in ["GET"])'`},
		{"any method", "ALLOW", `to: [{operation: {methods: ["*"]}}]`, allowed + `when: 'request.method != ""'`},
		{"path", "ALLOW", `to: [{operation: {paths: [/v1/orders]}}]`, allowed + `http: {paths: ["/v1/orders"]}`},
		{"path in a deny", "DENY", `to: [{operation: {paths: [/v1/orders]}}]`, denied + `when: 'request.path == "/v1/orders"'`},
		{"slash", "ALLOW", `to: [{operation: {paths: [/, /v1/]}}]`, allowed + `when: '(request.path == "/" || request.path == "/v1/")'`},
		{"below", "ALLOW", `to: [{operation: {paths: ["/v1/*"]}}]`, allowed + `http: {paths: ["/v1/**"]}`},
		{"below in a deny", "DENY", `to: [{operation: {paths: ["/v1/*"]}}]`, denied + `http: {paths: ["/v1/**"]}`},
		{"every path", "DENY", `to: [{operation: {paths: ["/*"]}}]`, denied + `http: {paths: ["/**"]}`},
		{"prefix", "ALLOW", `to: [{operation: {paths: ["/info*"]}}]`, allowed + `when: 'request.path.startsWith("/info")'`},
		{"template", "ALLOW", `to: [{operation: {paths: ["/v1/{*}/items/{**}", /x]}}]`, allowed + `http: {paths: ["/x", "/v1/{s2}/items/**"]}`},
		{"not paths", "ALLOW", `to: [{operation: {notPaths: [/a, "/b/*"]}}]`, allowed + `when: '!(request.path == "/a" || request.path.startsWith("/b/"))'`},
		{"host", "ALLOW", `to: [{operation: {hosts: [Shop.example]}}]`, allowed + `when: 'request.host == "shop.example"'`},
		{"host of any port", "ALLOW", `to: [{operation: {hosts: [shop.example, "shop.example:*"]}}]`, allowed + `http: {hosts: ["shop.example"]}`},
		{"host suffix", "DENY", `to: [{operation: {hosts: ["*.shop.example"]}}]`, denied + `when: 'request.host.endsWith(".shop.example")'`},
		{"not host", "DENY", `to: [{operation: {notHosts: [a.example, "a.example:*"]}}]`, denied + `when: '!(request.host == "a.example" || request.host.startsWith("a.example:"))'`},
		{"ports", "ALLOW", `to: [{operation: {ports: ["8080", "9090"]}}]`, allowed + `ports: [8080, 9090]`},
		{"not ports", "DENY", `to: [{operation: {notPorts: ["8080"]}}]`, denied + `ports: ["1-8079", "8081-65535"]`},
		{"port twice", "ALLOW", `{to: [{operation: {ports: ["1", "2"]}}], when: [{key: destination.port, notValues: ["2"]}]}`, allowed + `ports: [1]`},
		{
			"tcp and http", "ALLOW", `to: [{operation: {ports: ["1"]}}, {operation: {methods: [GET]}}]`,
			allowed + `ports: [1]; when: 'request.method != ""'` + "\n" + allowed + `http: {methods: [GET]}`,
		},
		{
			"header", "ALLOW", `when: [{key: "request.headers[X-Env]", values: [prod, test]}]`,
			allowed + `when: '("x-env" in request.headers && request.headers["x-env"] == ["prod"] || "x-env" in request.headers && request.headers["x-env"] == ["test"])'`,
		},
		{"not header", "DENY", `when: [{key: "request.headers[x-env]", notValues: [prod]}]`, denied + `when: '!("x-env" in request.headers && request.headers["x-env"] == ["prod"])'`},
		{"header there", "DENY", `when: [{key: "request.headers[x-env]", values: ["*"]}]`, denied + `http: {headers: {"x-env": present}}`},
		{"header not there", "ALLOW", `when: [{key: "request.headers[x-env]", notValues: ["*"]}]`, allowed + `http: {headers: {"x-env": absent}}`},
		{"server name", "ALLOW", `when: [{key: connection.sni, values: [a.example, "*.b.example"]}]`, allowed + `sni: ["*.b.example", "a.example"]`},
		{"server name in a deny", "DENY", `when: [{key: connection.sni, values: [a.example]}]`, denied + `when: 'connection.sni == "a.example"'`},
		{
			"principal", "ALLOW", `{from: [{source: {namespaces: [a]}}], when: [{key: source.principal, values: [cluster.local/ns/a/sa/b]}]}`,
			`allow; from: ["spiffe://example.org/ns/a/sa/b"]; to: ["spiffe://example.org/ns/shop/sa/*"]`,
		},
		{"quote", "ALLOW", `when: [{key: "request.headers[x]", values: ["it's \"1\""]}]`, allowed + `when: '"x" in request.headers && request.headers["x"] == ["it''s \"1\""]'`},
		{"everybody", "ALLOW", ``, strings.TrimSuffix(allowed, "; ")},
		{"nobody", "DENY", ``, strings.TrimSuffix(denied, "; ")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			rule := tc.rule
			if !strings.HasPrefix(rule, "{") {
				rule = "{" + rule + "}"
			}
			r := Istio(istioPolicyText("{action: "+tc.action+", rules: ["+rule+"]}"), mesh1)
			if got := strings.Join(bare(r.Text), "\n"); got != tc.want || r.Refused(false) {
				t.Errorf("got  %s\nwant %s\n%s", got, tc.want, refusals(r))
			}
			loads(t, r)
		})
	}
}

// TestIstioRefuses tells what is refused, and whether leaving it out would allow
// more.
func TestIstioRefuses(t *testing.T) {
	t.Parallel()
	from := func(source string) string { return "rules: [{from: [{source: {" + source + "}}]}]" }
	to := func(operation string) string { return "rules: [{to: [{operation: {" + operation + "}}]}]" }
	when := func(condition string) string { return "rules: [{when: [{" + condition + "}]}]" }
	for _, tc := range []struct {
		spec, want string
		widens     bool
	}{
		{"action: CUSTOM, provider: {name: x}, rules: [{}]", "CUSTOM asks a service of its own", true},
		{"action: LOG, rules: [{}]", `must be ALLOW, DENY, AUDIT or CUSTOM, not "LOG"`, true},
		{"action: DENY, " + from("principals: [cluster.local/ns/a/sa/b*]"), "p.yaml:4:", true},
		{from("principals: [cluster.local/ns/a/sa/b*]"), "AuthorizationPolicy shop/p: spec.rules[0].from[0].source.principals: \"cluster.local/ns/a/sa/b*\": this is a prefix of text", false},
		{from(`principals: ["*b"]`), "an ending of text", false},
		{from(`principals: ["cluster.local/ns/*/sa/b"]`), "a * in the middle is a plain character", false},
		{from(`principals: ["spiffe://cluster.local/ns/a/sa/b"]`), "want DOMAIN/ns/NAMESPACE/sa/ACCOUNT", false},
		{from(`principals: []`), "an empty list asks for nothing", false},
		{from(`principals: [7]`), "must be text, not 7", false},
		{from(`namespaces: ["a-*"]`), "name each namespace", false},
		{from(`requestPrincipals: ["*"]`), "tokens (JWT)", false},
		{from(`remoteIpBlocks: [10.0.0.0/8]`), "X-Forwarded-For", false},
		{from(`ipBlocks: [10.0.0.0/33]`), "no address or network", false},
		{from(`colour: [red]`), "source.colour: unknown key", false},
		{from(``), "is empty", false},
		{to(``), "is empty", false},
		{to(`paths: ["*.html"]`), "an ending of a path", false},
		{to(`paths: ["/a/{**}/b"]`), "{**} before the end", false},
		{to(`paths: ["/a%20b"]`), "normalise", false},
		{to(`paths: ["/a//b"]`), "requests with it are refused", false},
		{to(`methods: [get]`), "upper case", false},
		{to(`ports: ["0"]`), "no port", false},
		{to(`ports: [8080]`), "must be text, not 8080", false},
		{"action: DENY, " + to(`paths: ["/a/{*}"]`), "would deny more", true},
		{"action: DENY, rules: [{from: [{source: {notNamespaces: [a]}}], to: [{operation: {notMethods: [GET]}}]}]", "one `when` on the connection and on the request", true},
		{when(`key: "request.auth.claims[iss]", values: [x]`), "tokens (JWT)", false},
		{when(`key: "request.headers[:method]", values: [x]`), "none of Envoy's own", false},
		{when(`key: "request.headers[x]", values: ["a*"]`), "parts of a value", false},
		{when(`key: "request.headers[x]", values: ["a,b"]`), "comma", false},
		{when(`key: destination.ip, values: [10.0.0.1]`), "name the workload", false},
		{when(`key: source.ip`), "values or notValues is missing", false},
		{when(`key: connection.sni, values: [A.example]`), "lower case", false},
		{"selector: {matchLabels: {app: x}}, rules: [{}]", "--to shop/p=spiffe://example.org/ns/shop/sa/…", false},
		{"targetRefs: [{kind: Gateway, name: x}], action: DENY, rules: [{}]", "--to shop/p=", true},
		{"rules: [null]", "write {} for a rule that always matches", false},
	} {
		r := Istio(istioPolicyText("{"+tc.spec+"}"), mesh1)
		if got := refusals(r); !strings.Contains(got, tc.want) || !r.Refused(false) || r.Refused(true) != tc.widens {
			t.Errorf("%s:\ngot  %q, refused with --partial: %v\nwant %q, %v", tc.spec, got, r.Refused(true), tc.want, tc.widens)
		}
		if rules := bare(r.Text); len(rules) > 0 {
			t.Errorf("%s: there are rules: %q", tc.spec, rules)
		}
	}
}

func TestIstioObjects(t *testing.T) {
	t.Parallel()
	selected := istioPolicyText("{selector: {matchLabels: {app: x}}, rules: [{}]}")
	with := mesh1
	with.To = map[string][]string{"shop/p": {"spiffe://example.org/ns/shop/sa/x"}}
	r := Istio(selected, with)
	if got := bare(r.Text); len(got) != 1 || got[0] != `allow; from: ["group:everyone", unauthenticated]; to: ["spiffe://example.org/ns/shop/sa/x"]` {
		t.Errorf("--to: %q\n%s", got, refusals(r))
	}
	with.To["shop/q"] = with.To["shop/p"]
	if r := Istio(selected, with); !strings.Contains(refusals(r), "--to shop/q: no policy of that name") {
		t.Errorf("--to of nobody: %s", refusals(r))
	}

	dry := []Input{{"p.json", []byte(`{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
		"metadata": {"name": "p", "namespace": "shop", "annotations": {"istio.io/dry-run": "true"}},
		"spec": {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["a"]}}]}]}}`)}}
	if got := strings.Join(bare(Istio(dry, mesh1).Text), "\n"); got != `deny; shadow: true; from: ["spiffe://example.org/ns/a/**"]; to: ["spiffe://example.org/ns/shop/**"]` {
		t.Errorf("dry run: %s", got)
	}

	audit := Istio(istioPolicyText("{action: AUDIT, rules: [{}]}"), mesh1)
	if audit.Refused(false) || len(bare(audit.Text)) != 0 || !strings.Contains(string(audit.Text), "AUDIT decides nothing") {
		t.Errorf("audit: %s", audit.Text)
	}

	own := mesh1
	own.MeshTrustDomain = "mesh.example"
	if r := Istio(istioPolicyText(`{rules: [{from: [{source: {principals: ["cluster.local/ns/a/*"]}}]}]}`), own); !strings.Contains(refusals(r), "names nobody") {
		t.Errorf("cluster.local in a prefix: %s", refusals(r))
	}
	if r := Istio(append(selected, selected...), mesh1); !strings.Contains(refusals(r), "is here twice; first at p.yaml:1") {
		t.Errorf("twice: %s", refusals(r))
	}
	other := []Input{{"x.yaml", []byte("kind: RequestAuthentication\napiVersion: security.istio.io/v1\n")}}
	if r := Istio(other, mesh1); !r.Refused(true) {
		t.Errorf("RequestAuthentication is passed over: %s", r.Text)
	}
}

func FuzzIstio(f *testing.F) {
	f.Add([]byte("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/b]}}]}]}\n"))
	f.Add([]byte(`{"kind":"List","items":[{"kind":"AuthorizationPolicy","apiVersion":"security.istio.io/v1","metadata":{"name":"a","namespace":"b"},"spec":{"action":"DENY","rules":[{"to":[{"operation":{"notPorts":["1"]}}]}]}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		// A long text only takes long.
		if len(data) > 1<<14 {
			return
		}
		safe(t, Istio([]Input{{"f", data}}, mesh1))
	})
}

// safe fails if a result that is not refused is no text of the form that was
// meant to be written.
func safe(t *testing.T, r *Result) {
	t.Helper()
	if r.Refused(true) {
		return
	}
	for line := range strings.Lines(string(r.Text)) {
		switch word, _, _ := strings.Cut(strings.TrimSpace(line), " "); word {
		case "#", "-", "version:", "rules:", "groups:", "everyone:", "effect:", "shadow:", "on:", "at:", "from:", "to:", "http:",
			"source_ip:", "not_source_ip:", "ports:", "sni:", "when:":
		default:
			t.Fatalf("the input broke out of its line: %q\n%s", line, r.Text)
		}
	}
	if _, _, problem := guarded(readYAML, &Input{"out", r.Text}); problem != "" {
		t.Fatalf("the text is no YAML: %s\n%s", problem, r.Text)
	}
}
