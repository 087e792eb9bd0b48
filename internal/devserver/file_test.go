package devserver

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

const goodFile = `# a development trust domain
trust_domain: dev.test
listen: 127.0.0.1:0
svid_ttl: 5m
agent_ttl: 1h
entries:
  - spiffe_id: spiffe://dev.test/orders
    selectors: ["unix:uid:1000", "unix:path:/usr/bin/orders"]
    ttl: 60s
    hint: internal
    dns_names: [orders.internal]
  - spiffe_id: spiffe://dev.test/inventory
    selectors:
      - unix:uid:1001
`

func load(t testing.TB, text string) (Config, string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "entries.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := LoadFile(path)
	return cfg, path, err
}

func TestLoadFile(t *testing.T) {
	cfg, _, err := load(t, goodFile)
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		TrustDomain: testTD, Listen: "127.0.0.1:0", SVIDTTL: 5 * time.Minute, AgentTTL: time.Hour,
		Entries: []Entry{{
			SPIFFEID:  spiffeid.RequireFromString("spiffe://dev.test/orders"),
			Selectors: []attestor.Selector{{Type: "unix", Value: "uid:1000"}, {Type: "unix", Value: "path:/usr/bin/orders"}},
			TTL:       time.Minute, Hint: "internal", DNSNames: []string{"orders.internal"},
		}, {
			SPIFFEID:  spiffeid.RequireFromString("spiffe://dev.test/inventory"),
			Selectors: []attestor.Selector{{Type: "unix", Value: "uid:1001"}},
		}},
	}
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("got  %+v\nwant %+v", cfg, want)
	}
	srv, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	srv.Close()
}

func TestLoadFileRefused(t *testing.T) {
	const entry = "trust_domain: dev.test\nentries:\n  - spiffe_id: spiffe://dev.test/a\n    selectors: [\"unix:uid:1\"]\n"
	tests := []struct{ name, text, want string }{
		{"empty", "", ":1:1: the file is empty"},
		{"comment only", "# nothing\n", "the file is empty"},
		{"no trust domain", "listen: 127.0.0.1:0\n", ":1:1: trust_domain: is missing"},
		{"unknown key", "trust_domain: dev.test\nsvidttl: 5m\n", `:2:1: unknown field "svidttl"; known keys are`},
		{"unknown key of an entry", entry + "    hints: a\n", `:5:5: unknown field "hints"; known keys are`},
		{"key twice", "trust_domain: dev.test\ntrust_domain: dev.test\n", ":2:1: "},
		{"syntax", "trust_domain: [\n", ":1:15: not YAML: "},
		{"tab", "trust_domain: dev.test\nentries:\n\t- a: b\n", ":3:1: "},
		{"two documents", "trust_domain: dev.test\n---\ntrust_domain: dev.test\n", ":2:1: a second document"},
		{"bad trust domain", "trust_domain: Dev Test\n", `:1:15: trust_domain: "Dev Test" is not the name of a trust domain`},
		{"a number", "trust_domain: 12\n", ":1:15: want a string"},
		{"null", "trust_domain:\n", ":1:1: trust_domain: is missing"},
		{"null selector", "trust_domain: dev.test\nentries:\n  - spiffe_id: spiffe://dev.test/a\n    selectors: [~]\n", `:3:16: selectors: selector ":" is not TYPE:VALUE`},
		{"a list", "trust_domain: [a]\n", ":1:15: want a string"},
		{"not loopback", "trust_domain: dev.test\nlisten: 0.0.0.0:8081\n", ":2:9: listen: "},
		{"not a duration", "trust_domain: dev.test\nsvid_ttl: soon\n", `:2:11: svid_ttl: "soon" is not a duration`},
		{"unit missing", "trust_domain: dev.test\nagent_ttl: \"60\"\n", `:2:12: agent_ttl: "60" is not a duration`},
		{"too short", "trust_domain: dev.test\nagent_ttl: 1ms\n", `:2:12: agent_ttl: 1ms is out of bounds`},
		{"entries not a list", "trust_domain: dev.test\nentries: a\n", ":2:10: want a list (each element after a dash) here, not text"},
		{"entries a number", "trust_domain: dev.test\nentries: 12\n", ":2:10: want a list (each element after a dash) here, not a number"},
		{"selectors not a list", "trust_domain: dev.test\nentries:\n  - spiffe_id: spiffe://dev.test/a\n    selectors: unix:uid:0\n", ":4:16: want a list (each element after a dash) here, not text"},
		{"a list of keys", "- a\n", ":1:1: want a block of keys here, not a list"},
		{"entry not a map", "trust_domain: dev.test\nentries: [a]\n", ":2:11: want a block of keys here, not text"},
		{"entry without ID", "trust_domain: dev.test\nentries:\n  - selectors: [\"unix:uid:1\"]\n", ":3:17: entries[0].spiffe_id: is missing"},
		{"malformed ID", "trust_domain: dev.test\nentries:\n  - spiffe_id: dev.test/a\n", `:3:16: spiffe_id: "dev.test/a" is not a SPIFFE ID, such as spiffe://dev.test/web: `},
		{"foreign ID", "trust_domain: dev.test\nentries:\n  - spiffe_id: spiffe://other/a\n", ":3:16: spiffe_id: spiffe://other/a is not in the trust domain"},
		{"no selectors", "trust_domain: dev.test\nentries:\n  - spiffe_id: spiffe://dev.test/a\n", ":3:16: entry spiffe://dev.test/a: it has no selector"},
		{"bad selector", "trust_domain: dev.test\nentries:\n  - spiffe_id: spiffe://dev.test/a\n    selectors: [\"unix:uid:1\", unix]\n", `:4:31: selectors: selector "unix:" is not TYPE:VALUE`},
		{"bad TTL", entry + "    ttl: 0s\n", ":5:10: ttl: 0s is out of bounds"},
		{"bad DNS name", entry + "    dns_names: [a, b_/c]\n", ":5:20: dns_names: "},
		{"long line", "trust_domain: dev.test\n# " + strings.Repeat("-", maxColumns), ":2:4096: the line is longer"},
		{"many brackets", "trust_domain: dev.test\nlisten: " + strings.Repeat("[", maxBrackets+1), ":2:1009: more than 1000 brackets"},
		{"what the library chokes on", "trust_domain: dev.test\nentries: !0 #\n", ":1:1: the file is not YAML that makes sense"},
		{"same entry twice", entry + "  - spiffe_id: spiffe://dev.test/a\n    selectors: [\"unix:uid:1\"]\n", ":5:16: spiffe_id: the entry on line 3 has the same"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, path, err := load(t, tt.text)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), path+":") {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestLoadFileUnreadable(t *testing.T) {
	if _, err := LoadFile(filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
	if _, err := LoadFile(t.TempDir()); err == nil {
		t.Error("read a directory")
	}
	if _, _, err := load(t, strings.Repeat("#\n", maxFile/2+1)); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Error(err)
	}
}

func FuzzParseFile(f *testing.F) {
	f.Add([]byte(goodFile))
	f.Add([]byte("trust_domain: &a dev.test\nlisten: *a\n"))
	f.Add([]byte("trust_domain: !!str 12\nentries: []\n<<: {a: b}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := parseFile(data)
		if err != nil {
			return
		}
		// What is accepted can be served.
		if err := cfg.complete(); err != nil {
			t.Fatal(err)
		}
		if _, err := loopback(cfg.Listen); err != nil {
			t.Fatal(err)
		}
		if err := newEntryList(cfg.TrustDomain, cfg.Now).set(cfg.Entries); err != nil {
			t.Fatal(err)
		}
	})
}
