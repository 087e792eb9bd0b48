package importer

import (
	"strings"
	"testing"
)

var named = ConsulOptions{Template: "spiffe://example.org/ns/{namespace}/sa/{name}"}

func hcl(entries ...string) []Input {
	var files []Input
	for _, e := range entries {
		files = append(files, Input{"e.hcl", []byte("Kind = \"service-intentions\"\n" + e + "\n")})
	}
	return files
}

// TestConsulFormats has one intention in each of the formats.
func TestConsulFormats(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"a.hcl":  "Kind = \"service-intentions\"\nName = \"api\"\nSources = [{Name = \"web\", Action = \"allow\"}]\n",
		"b.hcl":  "kind = \"service-intentions\"\nname = \"api\"\nsources {\n name = \"web\"\n action = \"allow\"\n}\n",
		"c.json": `{"Kind": "service-intentions", "Name": "api", "Sources": [{"Name": "web", "Action": "allow", "Precedence": 9, "Type": "consul"}], "CreateIndex": 1, "ModifyIndex": 1}`,
		"d.json": `[{"Kind": "service-intentions", "Name": "api", "Sources": [{"Name": "web", "Action": "allow"}]}, {"Kind": "service-defaults", "Name": "api"}]`,
		"e.yaml": "apiVersion: consul.hashicorp.com/v1alpha1\nkind: ServiceIntentions\nmetadata: {name: api}\nspec:\n  destination: {name: api}\n  sources:\n  - name: web\n    action: allow\n",
		"f":      "Kind = \"service-intentions\"\nName = \"api\"\nSources { Name = \"web\"\n Action = \"allow\" }\n",
		"g":      `{"Kind": "service-intentions", "Name": "api", "Sources": [{"Name": "web", "Action": "allow"}]}`,
	} {
		r := Consul([]Input{{name, []byte(text)}}, named)
		want := `allow; from: ["spiffe://example.org/ns/default/sa/web"]; to: ["spiffe://example.org/ns/default/sa/api"]`
		if got := strings.Join(bare(r.Text), "\n"); got != want || r.Refused(false) {
			t.Errorf("%s: got %s\n%s", name, got, refusals(r))
		}
		loads(t, r)
	}
}

// TestConsulPrecedence tells how the order of intentions becomes rules without
// order.
func TestConsulPrecedence(t *testing.T) {
	t.Parallel()
	api := func(sources string) string { return "Name = \"api\"\nSources = [" + sources + "]" }
	all := func(sources string) string { return "Name = \"*\"\nSources = [" + sources + "]" }
	const (
		web      = `{Name = "web", Action = "allow"}`
		notWeb   = `{Name = "web", Action = "deny"}`
		any      = `{Name = "*", Action = "allow"}`
		nobody   = `{Name = "*", Action = "deny"}`
		webReads = `{Name = "web", Permissions = [{Action = "allow", HTTP { Methods = ["GET"] }}]}`
		id       = `"spiffe://example.org/ns/default/sa/`
	)
	for _, tc := range []struct {
		name    string
		entries []string
		want    []string
	}{
		{"deny alone says nothing", []string{api(nobody)}, nil},
		{"allow before deny", []string{api(web + "," + nobody)}, []string{`allow; from: [` + id + `web"]; to: [` + id + `api"]`}},
		{"deny before allow", []string{api(notWeb + "," + any)}, []string{
			`allow; from: [` + id + `*"]; to: [` + id + `api"]`,
			`deny; from: [` + id + `web"]; to: [` + id + `api"]`,
		}},
		{"allow before allow", []string{api(web + "," + any)}, []string{
			`allow; from: [` + id + `web"]; to: [` + id + `api"]`,
			`allow; from: [` + id + `*"]; to: [` + id + `api"]`,
		}},
		{"one service closed, all others open", []string{api(web + "," + nobody), all(any)}, []string{
			`allow; from: [` + id + `web"]; to: [` + id + `api"]`,
			`allow; from: [` + id + `*"]; to: [` + id + `*"]; when: '!(to.id == ` + id + `api")'`,
		}},
		{"reads alone, and all others", []string{api(webReads + "," + any)}, []string{
			`allow; from: [` + id + `web"]; to: [` + id + `api"]; http: {methods: [GET]}`,
			`allow; from: [` + id + `*"]; to: [` + id + `api"]; when: '!(from.id == ` + id + `web")'`,
		}},
		{"nothing is left over", []string{api(webReads), `Name = "*"` + "\nSources = [" + web + "]"}, []string{
			`allow; from: [` + id + `web"]; to: [` + id + `api"]; http: {methods: [GET]}`,
			`allow; from: [` + id + `web"]; to: [` + id + `*"]; when: '!(to.id == ` + id + `api")'`,
		}},
		{"namespaces", []string{"Name = \"api\"\nSources = [{Name = \"*\", Namespace = \"a\", Action = \"deny\"}, {Name = \"*\", Namespace = \"*\", Action = \"allow\"}]"}, []string{
			`allow; from: ["spiffe://example.org/ns/*/sa/*"]; to: [` + id + `api"]`,
			`deny; from: ["spiffe://example.org/ns/a/sa/*"]; to: [` + id + `api"]`,
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := Consul(hcl(tc.entries...), named)
			if got, want := strings.Join(bare(r.Text), "\n"), strings.Join(tc.want, "\n"); got != want || r.Refused(false) {
				t.Errorf("got:\n%s\nwant:\n%s\n%s", got, want, refusals(r))
			}
			loads(t, r)
		})
	}
}

// TestConsulPermissions tells what permissions become, in their order.
func TestConsulPermissions(t *testing.T) {
	t.Parallel()
	const rule = `allow; from: ["spiffe://example.org/ns/default/sa/web"]; to: ["spiffe://example.org/ns/default/sa/api"]; `
	for _, tc := range []struct{ name, permissions, want string }{
		{"exact", `{Action = "allow", HTTP { PathExact = "/v1" }}`, rule + `http: {paths: ["/v1"]}`},
		{"prefix", `{Action = "allow", HTTP { PathPrefix = "/v1" }}`, rule + `when: 'request.path.startsWith("/v1")'`},
		{"prefix of segments", `{Action = "allow", HTTP { PathPrefix = "/v1/" }}`, rule + `http: {paths: ["/v1/**"]}`},
		{"methods", `{Action = "allow", HTTP { Methods = ["get", "PUT"] }}`, rule + `http: {methods: [GET, PUT]}`},
		{
			"headers", `{Action = "allow", HTTP { Header = [{Name = "X-A", Present = true}, {Name = "x-b", Present = true, Invert = true}, {Name = "x-c", Exact = "1"}] }}`,
			rule + `http: {headers: {"x-a": present, "x-b": absent}}; when: '"x-c" in request.headers && request.headers["x-c"] == ["1"]'`,
		},
		{
			"deny first", `{Action = "deny", HTTP { PathPrefix = "/v2/admin", Methods = ["GET"] }}, {Action = "allow", HTTP { PathPrefix = "/v2/" }}, {Action = "deny", HTTP { PathExact = "/x" }}, {Action = "allow", HTTP { PathExact = "/y" }}`,
			rule + `http: {paths: ["/v2/**"]}; when: '!(request.method in ["GET"] && request.path.startsWith("/v2/admin"))'` + "\n" +
				rule + `http: {paths: ["/y"]}; when: '!(request.method in ["GET"] && request.path.startsWith("/v2/admin") || request.path == "/x")'`,
		},
		{"deny last", `{Action = "allow", HTTP { PathExact = "/v1" }}, {Action = "deny", HTTP { PathPrefix = "/" }}`, rule + `http: {paths: ["/v1"]}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := Consul(hcl("Name = \"api\"\nSources = [{Name = \"web\", Permissions = ["+tc.permissions+"]}]"), named)
			if got := strings.Join(bare(r.Text), "\n"); got != tc.want || r.Refused(false) {
				t.Errorf("got:\n%s\nwant:\n%s\n%s", got, tc.want, refusals(r))
			}
			loads(t, r)
		})
	}
}

func TestConsulRefuses(t *testing.T) {
	t.Parallel()
	permission := func(http string) string {
		return `Sources = [{Name = "web", Permissions = [{Action = "allow", HTTP { ` + http + ` }}]}]`
	}
	for _, tc := range []struct {
		entry, want string
		widens      bool
	}{
		{permission(`PathRegex = "/a.*"`), "service-intentions api: sources[0].permissions[0].http.pathregex: regular expressions", false},
		{permission(`PathExact = "/a%2f"`), "normalise", false},
		{permission(`PathExact = "/a", PathPrefix = "/b"`), "exclude each other", false},
		{permission(``), "is empty", false},
		{permission(`Header = [{Name = "a", Prefix = "b"}]`), "parts of a header's value", false},
		{permission(`Header = [{Name = "a", Exact = "b", Invert = true}]`), "Envoys differ", false},
		{permission(`Header = [{Name = "a", Exact = "b", IgnoreCase = true}]`), "by case", false},
		{permission(`Colour = "red"`), "unknown key", false},
		{`Sources = [{Name = "web", Permissions = [{Action = "allow", HTTP { PathExact = "/" }, JWT { Providers = [] }}]}]`, "tokens (JWT)", false},
		{"JWT { Providers = [] }\nSources = [{Name = \"web\", Action = \"allow\"}]", "tokens (JWT)", false},
		{`Sources = [{Name = "web", Action = "allow", Peer = "x"}]`, "sources[0].peer: services of a peer", false},
		{`Sources = [{Name = "web", Action = "deny", SamenessGroup = "x"}]`, "sources[0].samenessgroup", true},
		{`Sources = [{Name = "web", Action = "allow", SamenessGroup = "x"}]`, "sources[0].samenessgroup", false},
		{`Sources = [{Name = "web", Action = "allow", Partition = "x"}]`, "sources[0].partition", false},
		{`Sources = [{Name = "web", Action = "maybe"}]`, `must be allow or deny, not "maybe"`, false},
		{`Sources = [{Name = "we*", Action = "deny"}]`, "is no name of a service", true},
		{`Sources = [{Name = "web", Namespace = "*", Action = "deny"}]`, "cannot follow a wild namespace", true},
		{`Sources = [{Name = "web", Action = "allow"}, {Name = "web", Action = "deny"}]`, "default/web is here twice", true},
		{`Sources = []`, "an entry has a source", true},
		{`Name = "b"`, "name: is here twice", true},
		{`Colour = "red"`, "colour: unknown key", true},
	} {
		r := Consul(hcl("Name = \"api\"\n"+tc.entry), named)
		if got := refusals(r); !strings.Contains(got, tc.want) || !r.Refused(false) || r.Refused(true) != tc.widens {
			t.Errorf("%s:\ngot  %q, refused with --partial: %v\nwant %q, %v", tc.entry, got, r.Refused(true), tc.want, tc.widens)
		}
	}

	wide := hcl("Name = \"api\"\nSources = [{Name = \"*\", Action = \"deny\"}]", "Name = \"*\"\nSources = [{Name = \"web\", Action = \"allow\"}]")
	if got := refusals(Consul(wide, named)); !strings.Contains(got, "Consul's documentation and the rules that it gives to Envoy differ") {
		t.Errorf("a wide source before an exact one: %s", got)
	}
	unnamed := hcl("Name = \"api\"\nSources = [{Name = \"web\", Action = \"allow\"}, {Name = \"*\", Action = \"deny\"}]", "Name = \"*\"\nSources = [{Name = \"*\", Action = \"allow\"}]")
	if got := refusals(Consul(unnamed, ConsulOptions{TrustDomain: "x.consul"})); !strings.Contains(got, "give a template without wildcards") {
		t.Errorf("an identity that is not one: %s", got)
	}
	for _, template := range []string{"spiffe://example.org/x", "spiffe://example.org/sa-{name}", "https://x/{name}", "spiffe://{name}/a", "spiffe://example.org/{name}/**"} {
		if r := Consul(nil, ConsulOptions{Template: template}); !r.Refused(true) {
			t.Errorf("template %s is taken", template)
		}
	}
}

// TestConsulPartial has an intention that cannot be said stand before what it
// came before: it is taken for a deny.
func TestConsulPartial(t *testing.T) {
	t.Parallel()
	r := Consul(hcl(`Name = "api"
Sources = [
  {Name = "web", Permissions = [{Action = "allow", HTTP { PathRegex = "/a" }}]},
  {Name = "*", Action = "allow"},
]`), named)
	if !r.Refused(false) || r.Refused(true) {
		t.Fatal(refusals(r))
	}
	want := `allow; from: ["spiffe://example.org/ns/default/sa/*"]; to: ["spiffe://example.org/ns/default/sa/api"]
deny; from: ["spiffe://example.org/ns/default/sa/web"]; to: ["spiffe://example.org/ns/default/sa/api"]`
	if got := strings.Join(bare(r.Text), "\n"); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if !strings.Contains(string(r.Text), "#   e.hcl:4:") {
		t.Errorf("what was left out is not in the text:\n%s", r.Text)
	}
}

func FuzzConsul(f *testing.F) {
	f.Add("e.hcl", []byte("Kind = \"service-intentions\"\nName = \"api\"\nSources = [{Name = \"web\", Permissions = [{Action = \"allow\", HTTP { PathPrefix = \"/v1\" }}]}]\n"))
	f.Add("e.json", []byte(`{"Kind": "service-intentions", "Name": "*", "Sources": [{"Name": "web", "Action": "allow"}, {"Name": "*", "Action": "deny"}]}`))
	f.Add("e.yaml", []byte("apiVersion: consul.hashicorp.com/v1alpha1\nkind: ServiceIntentions\nspec: {destination: {name: api}, sources: [{name: web, action: allow}]}\n"))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		if len(data) > 1<<14 {
			return
		}
		safe(t, Consul([]Input{{name, data}}, named))
	})
}
