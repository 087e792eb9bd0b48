package policy

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

func compiledSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	text, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("policy.schema.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("policy.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// jsonOf is a document as an editor sees it.
func jsonOf(n *node) any {
	switch n.kind {
	case text:
		return n.text
	case number:
		if i, err := strconv.ParseInt(n.text, 0, 64); err == nil {
			return i
		}
		f, _ := strconv.ParseFloat(n.text, 64)
		return f
	case truth:
		return strings.EqualFold(n.text, "true")
	case list:
		items := []any{}
		for i := range n.items {
			items = append(items, jsonOf(&n.items[i]))
		}
		return items
	case block:
		pairs := map[string]any{}
		for i := range n.pairs {
			pairs[n.pairs[i].key] = jsonOf(&n.pairs[i].value)
		}
		return pairs
	}
	return nil
}

func validate(t *testing.T, s *jsonschema.Schema, name, text string) error {
	t.Helper()
	n, problem := readNode(name, 0, []byte(text))
	if problem != nil {
		t.Fatalf("%v\n%s", problem, text)
	}
	return s.Validate(jsonOf(&n))
}

// documentedRules are the rule files that the docs and the README show. One
// without a version is a part of a file.
func documentedRules(t *testing.T) map[string]string {
	t.Helper()
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, page := range append(pages, "../../README.md") {
		data, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile("(?ms)^```yaml\n(.*?)^```").FindAllStringSubmatch(string(data), -1) {
			if regexp.MustCompile(`(?m)^version: 1$`).MatchString(m[1]) {
				found[page+" "+strconv.Itoa(len(found))] = m[1]
			}
		}
	}
	return found
}

// TestSchemaTakesGoodFiles: those of the docs, of testdata, and whatever the
// reader takes of random ones.
func TestSchemaTakesGoodFiles(t *testing.T) {
	t.Parallel()
	s := compiledSchema(t)
	files := documentedRules(t)
	if len(files) == 0 {
		t.Error("the docs have no rule file")
	}
	good, err := filepath.Glob("testdata/good/*.yaml")
	if err != nil || len(good) == 0 {
		t.Fatal(good, err)
	}
	for _, name := range good {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = string(data)
	}
	for name, text := range files {
		if err := validate(t, s, name, text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 1))
		for _, text := range worldPolicy(r).yaml(r, 1) {
			if err := validate(t, s, "random", text); err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
		}
	}
}

// TestSchemaRefuses: an editor marks the mistakes that people make, and none
// that the reader would not find.
func TestSchemaRefuses(t *testing.T) {
	t.Parallel()
	s := compiledSchema(t)
	const rule = "version: 1\nrules:\n  - {id: a, effect: deny, "
	const limit = "version: 1\nlimits:\n  - {id: a, "
	const test = "version: 1\ntests:\n  - {as: unauthenticated, expect: deny, "
	for _, text := range []string{
		"rules: [{id: a, effect: deny}]",
		"version: 2",
		"version: \"1\"",
		"version: 1\nrulse: []",
		"version: 1\nrules: []",
		"version: 1\nrules: {}",
		"version: 1\ngroups: {web: [web]}",
		"version: 1\ngroups: {web: [\"group:other\"]}",
		"version: 1\ntrust_domains: {Example.org: {ids: [/a]}}",
		"version: 1\ntrust_domains: {example.org: {}}",
		"version: 1\ntrust_domains: {example.org: {ids: [a]}}",
		"version: 1\nrevoked: [\"spiffe://example.org\"]",
		"version: 1\nrevoked: [{issuer: \"0a\"}]",
		"version: 1\nrevoked: [{issuer: \"0g\", serial: \"1\"}]",
		"version: 1\nrules: [{effect: deny}]",
		"version: 1\nrules: [{id: a}]",
		"version: 1\nrules: [{id: a, effect: allow}]",
		"version: 1\nrules: [{id: a b, effect: deny}]",
		"version: 1\nrules: [{id: 7, effect: deny}]",
		"version: 1\nrules: [{id: a, effect: permit}]",
		rule + "shadow: yes please}",
		rule + "on: orders}",
		rule + "at: both}",
		rule + "from: [\"spiffe://example.org/**/web\"]}",
		rule + "from: [\"spiffe://*/web\"]}",
		rule + "from: [example.org/web]}",
		rule + "to: [unauthenticated]}",
		rule + "http: {}}",
		rule + "http: {method: [GET]}}",
		rule + "http: {methods: [get]}}",
		rule + "http: {hosts: [\"a/b\"]}}",
		rule + "http: {paths: [v1]}}",
		rule + "http: {paths: [\"/v1?q=1\"]}}",
		rule + "http: {headers: {x-env: prod}}}",
		rule + "http: {headers: {\"x env\": [prod]}}}",
		rule + "http: {methods: [GET]}, grpc: {services: [shop.Orders]}}",
		rule + "grpc: {services: [\"shop.*\"]}}",
		rule + "grpc: {methods: [\"shop.Orders/Get\"]}}",
		rule + "source_ip: [everywhere]}",
		rule + "source_ip: [10.0.0.0/8], at: outbound}",
		rule + "ports: [0]}",
		rule + "ports: [65536]}",
		rule + "ports: [\"9000-\"]}",
		rule + "sni: [\"orders:443\"]}",
		rule + "when: true}",
		limit + "per: identity}",
		limit + "rps: 0}",
		limit + "rps: fast}",
		limit + "connections: 0}",
		limit + "connections: 5, burst: 5}",
		limit + "rps: 5, per: connection}",
		test + "do: /v1/orders}",
		test + "do: GET /, grpc: shop.Orders/Get}",
		test + "grpc: shop.Orders}",
		test + "host: orders}",
		test + "headers: {x-env: prod}}",
		test + "port: 70000}",
		test + "time: yesterday}",
		test + "reason: because}",
		"version: 1\ntests: [{expect: deny}]",
		"version: 1\ntests: [{as: web, expect: deny}]",
	} {
		if validate(t, s, "bad", text) == nil {
			t.Errorf("the schema takes %s", text)
		}
		if _, err := Parse("bad", []byte(text)); err == nil {
			t.Errorf("the reader takes %s", text)
		}
	}
}

// TestLanguageIsOneList: the reader knows every key that is listed, the schema
// has it with what it is about, and asks for those that the reader asks for.
func TestLanguageIsOneList(t *testing.T) {
	t.Parallel()
	example := map[string]string{"version": "version: 1", "effect": "effect: deny", "expect": "expect: deny", "as": "as: unauthenticated", "rps": "rps: 1"}
	for _, part := range []struct {
		keys   []key
		around string
	}{
		{topKeys, "%"},
		{ceilingKeys, "version: 1\ntrust_domains: {example.org: {%}}"},
		{ruleKeys, "version: 1\nrules: [{%}]"},
		{httpKeys, "version: 1\nrules: [{id: a, effect: deny, http: {%}}]"},
		{grpcKeys, "version: 1\nrules: [{id: a, effect: deny, grpc: {%}}]"},
		{limitKeys, "version: 1\nlimits: [{%}]"},
		{revokedKeys, "version: 1\nrevoked: [{%}]"},
		{testKeys, "version: 1\ntests: [{%}]"},
	} {
		for _, k := range part.keys {
			pair := example[k.name]
			if pair == "" {
				pair = k.name + ": {}" // the wrong kind of value, mostly: it is the key that counts
			}
			_, err := Parse("f", []byte(strings.Replace(part.around, "%", pair, 1)))
			if err != nil && strings.Contains(err.Error(), k.name+": unknown key") {
				t.Errorf("the reader does not know %s: %v", k.name, err)
			}
			if k.about == "" || !strings.HasSuffix(k.about, ".") {
				t.Errorf("%s: %q is no sentence", k.name, k.about)
			}
			// Without it, and with all others that are asked for.
			var others []string
			for _, o := range part.keys {
				if o.is.must && o.name != k.name {
					others = append(others, example[o.name])
				}
			}
			others = slices.DeleteFunc(others, func(s string) bool { return s == "" })
			_, err = Parse("f", []byte(strings.Replace(part.around, "%", strings.Join(others, ", "), 1)))
			missed := err != nil && (strings.Contains(err.Error(), k.name+" is missing") || strings.Contains(err.Error(), k.name+": missing"))
			if len(others) > 0 && missed != k.is.must {
				t.Errorf("%s: the reader misses it: %t, the schema: %t (%v)", k.name, missed, k.is.must, err)
			}
		}
	}
}

// TestSchemaIsOrdered: keys come in the order of the language, each with what
// it is about.
func TestSchemaIsOrdered(t *testing.T) {
	t.Parallel()
	text, err := Schema()
	if err != nil || !json.Valid(text) {
		t.Fatal(err)
	}
	rest := text
	for _, k := range topKeys {
		about, _ := json.Marshal(k.about)
		i := bytes.Index(rest, append([]byte(`"description": `), about...))
		if i < 0 {
			t.Fatalf("%s is missing, or not in its order", k.name)
		}
		rest = rest[i:]
	}
}
