package importer

import (
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy/policy"
)

// bare returns the rules of a text, a line each: without comments, id, end and
// the rule of the calling end.
func bare(text []byte) []string {
	var rules []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		id, begins := strings.CutPrefix(line, "  - id: ")
		switch key := strings.TrimSpace(line); {
		case begins && strings.HasSuffix(id, "/outbound"):
			return rules
		case begins:
			rules = append(rules, "")
		case len(rules) == 0 || strings.HasPrefix(key, "#") || key == "at: inbound":
		default:
			last := &rules[len(rules)-1]
			*last = strings.TrimPrefix(*last+"; "+strings.TrimPrefix(key, "effect: "), "; ")
		}
	}
	return rules
}

func refusals(r *Result) string {
	var lines []string
	for i := range r.Refusals {
		lines = append(lines, r.Refusals[i].String())
	}
	return strings.Join(lines, "\n")
}

// loads fails unless the text is a policy.
func loads(t *testing.T, r *Result) *policy.Policy {
	t.Helper()
	p, err := policy.Parse("rules.yaml", r.Text)
	if err != nil {
		t.Fatalf("the text does not load: %v\n%s", err, r.Text)
	}
	return p
}

func TestBounds(t *testing.T) {
	t.Parallel()
	big := Input{"big.yaml", make([]byte, MaxSize/2+1)}
	for name, r := range map[string]*Result{
		"istio":      Istio([]Input{big, big}, IstioOptions{TrustDomains: []string{"example.org"}}),
		"consul":     Consul([]Input{big, big}, ConsulOptions{TrustDomain: "example.org"}),
		"ghostunnel": Ghostunnel(Input{"big", make([]byte, MaxSize+1)}, GhostunnelOptions{}),
	} {
		if got := refusals(r); !strings.Contains(got, "too large") || !r.Refused(true) {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// TestDepth has no file, however deep, end the process.
func TestDepth(t *testing.T) {
	t.Parallel()
	for name, deep := range map[string]string{
		"a.json": strings.Repeat("[", 1<<20),
		"b.json": strings.Repeat(`{"a":`, 1<<20),
		"a.yaml": "a: " + strings.Repeat("[", 1<<16),
		"b.yaml": strings.Repeat("- ", 1<<16) + "a",
		"a.hcl":  "a = " + strings.Repeat("[", 1<<20),
		"b.hcl":  strings.Repeat("a {", 1<<20),
	} {
		r := Consul([]Input{{name, []byte(deep)}}, ConsulOptions{TrustDomain: "example.org"})
		if got := refusals(r); !strings.Contains(got, "levels deep") {
			t.Errorf("%s: %.200s", name, got)
		}
	}
}

func TestFormats(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, in, want string }{
		{"bytes.yaml", "a: \xff", "bytes.yaml:1:4: not UTF-8 text"},
		{"control.hcl", "a = \"\x01\"", "control.hcl:1:6: control character U+0001"},
		{"twice.json", "{\"Kind\": \"x\",\n\"Kind\": \"y\"}", `twice.json:2:6: key "Kind" is here twice`},
		{"end.json", `{"Kind": `, "end.json:1:8: not valid JSON: unexpected EOF"},
		{"trailing.json", `{"Kind": "x"},`, "not valid JSON"},
		{"twice.yaml", "kind: a\nkind: b\n", "twice.yaml:2:1: not valid YAML"},
		{"anchor.yaml", "a: &x b\n", "anchor.yaml:1:4: anchors"},
		{"wrong.hcl", "Kind = \n}", "wrong.hcl:2:1: not valid HCL"},
		{"label.hcl", `Kind "a" { }`, "label.hcl:1:1: a block with labels"},
		{"none.hcl", "Name = \"x\"\n", "none.hcl:1:1: not a configuration entry: Kind is missing"},
	} {
		r := Consul([]Input{{tc.name, []byte(tc.in)}}, ConsulOptions{TrustDomain: "example.org"})
		if got := refusals(r); !strings.Contains(got, tc.want) || !r.Refused(true) {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestMeet(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ a, b, want string }{
		{"a/b", "a/b", "a/b"},
		{"a/b", "a/c", ""},
		{"a/b", "x/b", ""},
		{"a/*/c", "a/b/*", "a/b/c"},
		{"a/**", "a/b/*", "a/b/*"},
		{"a/b/**", "a/*/c/**", "a/b/c/**"},
		{"a/b/**", "a/b", ""},
		{"a/**", "a/**", "a/**"},
		{"a/*", "a/b/c", ""},
	} {
		for _, pair := range [][2]string{{tc.a, tc.b}, {tc.b, tc.a}} {
			got, ok := meet(scheme+pair[0], scheme+pair[1])
			if !ok {
				got = scheme
			}
			if got != scheme+tc.want {
				t.Errorf("%v: got %q, want %q", pair, got, tc.want)
			}
		}
	}
}

func TestPorts(t *testing.T) {
	t.Parallel()
	set := portSet([]int{443, 1, 443, 65535})
	if got := strings.Join(set.but().text(), " "); got != "2-442 444-65534" {
		t.Errorf("but: %s", got)
	}
	if got := strings.Join(set.but().and(portSet([]int{80, 443}).but()).text(), " "); got != "2-79 81-442 444-65534" {
		t.Errorf("and: %s", got)
	}
	if got := (ports{{1, 65535}}).but(); got == nil || len(got) != 0 {
		t.Errorf("nothing is left, which is not any: %v", got)
	}
}

// TestNoteOfHTTP: who imports rules for HTTP is told of listeners that see none.
func TestNoteOfHTTP(t *testing.T) {
	t.Parallel()
	const policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a, namespace: shop}\nspec: {rules: [{RULE}]}\n"
	for rule, want := range map[string]bool{
		"from: [{source: {namespaces: [shop]}}]":                                           false,
		"to: [{operation: {methods: [GET]}}]":                                              true,
		"when: [{key: 'request.headers[x-env]', values: [prod]}]":                          true,
		"to: [{operation: {ports: ['8080']}}], from: [{source: {ipBlocks: [10.0.0.0/8]}}]": false,
	} {
		r := Istio([]Input{{"p.yaml", []byte(strings.Replace(policy, "RULE", rule, 1))}}, IstioOptions{TrustDomains: []string{"example.org"}})
		loads(t, r)
		if got := strings.Contains(string(r.Text), "# Some of these rules ask for HTTP."); got != want || len(r.Refusals) > 0 {
			t.Errorf("%s: %v, %s", rule, got, refusals(r))
		}
	}
}
