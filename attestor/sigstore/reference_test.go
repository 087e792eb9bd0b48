package sigstore

import (
	"net/url"
	"strings"
	"testing"
)

func TestParseReference(t *testing.T) {
	t.Parallel()
	sum := strings.Repeat("0123456789abcdef", 4)
	at := "@sha256:" + sum
	for _, c := range []struct{ image, want string }{
		{"docker.io/library/nginx" + at, "docker.io/library/nginx"},
		{"nginx" + at, "docker.io/library/nginx"},
		{"index.docker.io/team/app" + at, "docker.io/team/app"},
		{"team/app" + at, "docker.io/team/app"},
		{"docker-pullable://team/app" + at, "docker.io/team/app"},
		{"registry.k8s.io/kube-proxy:v1.34.0" + at, "registry.k8s.io/kube-proxy"},
		{"localhost/app" + at, "localhost/app"},
		{"10.0.0.1:5000/a/b/c" + at, "10.0.0.1:5000/a/b/c"},
		{"[fd00::1]:5000/a" + at, "[fd00::1]:5000/a"},
		{"sha256:" + sum, ""}, // loaded on the node: no repository
		{"app:1", ""},
		{"app@sha256:" + sum[1:], ""},
		{"app@sha256:" + strings.ToUpper(sum), ""},
		{"app@sha512:" + sum + sum, ""},
		{"a.b/../c" + at, ""},
		{"a.b/c?x=1" + at, ""},
		{"a.b/C" + at, ""},
		{"user@a.b/c" + at, ""},
		{"a.b:0/c" + at, ""},
		{"a..b/c" + at, ""},
		{"a.b/c:" + at, ""},
		{"https://a.b/c" + at, ""},
		{strings.Repeat("a", maxImage) + at, ""},
	} {
		ref, err := parseReference(c.image)
		got := ""
		if err == nil {
			got = ref.registry + "/" + ref.repository
		}
		if got != c.want || err == nil && ref.digest != sum {
			t.Errorf("%s: got %q, %v, want %q", c.image, got, err, c.want)
		}
	}
	if ref, err := parseReference("nginx" + at); err != nil || ref.host() != "registry-1.docker.io" {
		t.Errorf("Docker Hub is at %q, %v", ref.host(), err)
	}
}

func TestTokenServers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		image, named, realm string
		want                bool
	}{
		{"ghcr.io/a/b", "", "https://ghcr.io/token", true},
		{"nginx", "", "https://auth.docker.io/token", true},
		{"registry.gitlab.com/a/b", "", "https://gitlab.com/jwt/auth", true},
		{"quay.io/a/b", "", "https://quay.io:443/v2/auth", true},
		{"quay.io/a/b", "", "https://quay.io:8443/v2/auth", false},
		{"corp.azurecr.io/a/b", "", "https://evil.azurecr.io/token", false},
		{"registry.example.org:5000/a/b", "", "https://auth.example.org/token", false},
		{"registry.example.org:5000/a/b", "auth.example.org", "https://auth.example.org/token", true},
		{"registry.example.org:5000/a/b", "auth.example.org", "https://registry.example.org:5000/token", false},
		{"docker.io/a/b", "", "https://ghcr.io/token", false},
		{"registry.gitlab.com/a/b", "", "https://gitlab.com.evil.example/token", false},
	} {
		ref, err := parseReference(c.image + "@sha256:" + strings.Repeat("a", 64))
		if err != nil {
			t.Fatal(err)
		}
		realm, err := url.Parse(c.realm)
		if err != nil {
			t.Fatal(err)
		}
		s := &session{ref: ref, registry: &registry{Registry: Registry{TokenHost: c.named}}}
		if got := s.mayAsk(realm); got != c.want {
			t.Errorf("%s (%s) and %s: %v", c.image, c.named, c.realm, got)
		}
	}
}

func TestIdentities(t *testing.T) {
	t.Parallel()
	ids, err := compileIdentities(map[string][]string{
		"https://a.example":             {"x@a.example", "^https://github\\.com/o/.*$"},
		"https://(b|c).example":         {"loose.*"},
		"https://dots.are.text.example": {"x.y"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		issuer, subject string
		want            bool
	}{
		{"https://a.example", "x@a.example", true},
		{"https://a.example", "https://github.com/o/r", true},
		{"https://a.example", "https://evil.example/https://github.com/o/r", false},
		{"https://a.example", "loose", false},
		{"https://c.example", "also loose, as spire-agent has it", true},
		{"https://evil.example/?https://b.example", "loose", true}, // warned of
		{"https://dots.are.text.example", "xzy", false},
		{"https://d.example", "x@a.example", false},
	} {
		if got := allowed(ids, c.issuer, []string{"other", c.subject}); got != c.want {
			t.Errorf("%s of %s: %v", c.subject, c.issuer, got)
		}
	}
	for _, bad := range []map[string][]string{{"(": {"x"}}, {"a": {"["}}, {"a": nil}} {
		if _, err := compileIdentities(bad); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(c *Config) { c.AllowedIdentities = map[string][]string{"https://a.example": {"a.*", "^b.*$"}} })
	if got := h.verifier.Warnings(); len(got) != 1 || !strings.Contains(got[0], `"a.*"`) {
		t.Errorf("warnings %q", got)
	}
	for want, c := range map[string]Config{
		"no such file":          {TrustedRoot: h.root + "x"},
		"not a host":            {TrustedRoot: h.root, Registries: map[string]Registry{"https://a": {}}},
		"is there twice":        {TrustedRoot: h.root, Registries: map[string]Registry{"docker.io": {}, "index.docker.io": {}}},
		"and a password file":   {TrustedRoot: h.root, Registries: map[string]Registry{"a.b": {Username: "x"}}},
		"readable on the way":   {TrustedRoot: h.root, Registries: map[string]Registry{"a.b": {Username: "x", PasswordFile: "y", PlainHTTP: true}}},
		"no PEM certificate":    {TrustedRoot: h.root, Registries: map[string]Registry{"a.b": {CA: h.root}}},
		"no regular expression": {TrustedRoot: h.root, AllowedIdentities: map[string][]string{"a": {"("}}},
	} {
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	for want, content := range map[string]string{
		"not a trusted_root.json": "x",
		"no certificateAuth":      "{}",
		"has 0 certificates":      `{"certificateAuthorities":[{}]}`,
		"certificates[0]":         `{"certificateAuthorities":[{"certChain":{"certificates":[{"rawBytes":"AAAA"}]}}]}`,
	} {
		write(t, h.root, []byte(content))
		if _, err := New(Config{TrustedRoot: h.root}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", content, err, want)
		}
	}
}

func TestLoose(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		"^a.*$": false, "^(a|b)$": false, "^a$|^b.*$": false, "(^a.*$)": false,
		"a.*": true, "^a.*": true, "a.*$": true, "^a|b$": true, "^|x$": true, `^a.*\$`: true,
		"plain": false,
	} {
		p, err := compilePattern(text)
		if err != nil {
			t.Fatal(err)
		}
		if p.loose() != want {
			t.Errorf("%s: loose %t", text, p.loose())
		}
	}
}
