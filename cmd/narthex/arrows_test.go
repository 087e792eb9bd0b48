package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/narthex-id/narthex/"

// rooms says which rooms of the house each room may import, and why no other.
// A room that is not listed may not exist: add it here with its reason.
var rooms = []struct {
	room   string
	may    string // rooms of this module, separated by spaces
	reason string
}{
	{"attestor", "", "reads other processes with the agent's privileges: the less it pulls in, the less can be attacked"},
	{"attestor/k8s", "attestor", "reads what a kubelet says of strangers' pods, on the standard library alone: a client of Kubernetes' own would be the largest thing in the agent"},
	{"attestor/sigstore", "", "verifies what registries send by keys from a file: it knows images, and nothing of processes, pods or entries"},
	{"agent/registry", "attestor internal/telemetry", "pure state: what a caller may have is decided without network, clock or goroutine"},
	{"agent/keys", "", "holds private keys"},
	{"agent/bootstrap", "internal/watch", "gets the bundle that decides which server is believed, from wherever it is: it knows nothing of what it is good for"},
	{"agent/spire", "agent/registry attestor internal/grpctext", "the one room that speaks the server's API; it makes calls and runs no loops"},
	{"agent/endpoint", "agent/registry attestor internal/socket internal/telemetry", "what the sockets need of the agent is an interface of their own"},
	{"agent", "agent/bootstrap agent/endpoint agent/keys agent/registry agent/spire attestor internal/telemetry", "the loop that ties the rooms of the agent together"},
	{"proxy/policy", "proxy/canonical", "a decision depends on the request and the rules, on nothing else; both are written in the canonical form"},
	{"proxy/policy/suggest", "proxy/policy proxy/canonical internal/telemetry", "reads back what the access log says: the rules themselves know no log"},
	{"proxy/canonical", "", "the one spelling of what a request asks for: whoever decides and whoever forwards share it, so it knows neither"},
	{"proxy/http1", "proxy/canonical", "bytes to messages and back: parses what strangers send, so it knows no connection, rule or identity"},
	{"proxy/http2", "proxy/canonical proxy/http1", "frames to heads and content, and back: as little as http1 does it know whose they are, and it has no socket to wait for"},
	{"proxy/forwarded", "proxy/canonical proxy/http1", "from who was proven to the fields that say so: pure, so that what a service believes can be read in one place"},
	{"proxy/policy/importer", "", "reads the files of other products and writes text: what the text means is asked of proxy/policy by the command"},
	{"proxy/proxyproto", "", "bytes to addresses and back: parses what comes before any proof of who sends it"},
	{"proxy/upstream", "internal/telemetry", "chooses and dials addresses: it knows nothing of what goes over them, so that every kind of listener can stand on it"},
	{"proxy/identity", "internal/grpctext internal/telemetry internal/watch", "whom to believe is decided by bundles and CRLs alone: it knows nothing of connections and rules"},
	{"proxy/extauthz", "proxy/canonical proxy/identity proxy/policy internal/socket internal/telemetry", "reads what Envoy says of strangers' requests: what is decided it asks of whoever made it, so that there is one answer and no way around it"},
	{"proxy", "proxy/canonical proxy/forwarded proxy/http1 proxy/http2 proxy/identity proxy/policy proxy/proxyproto proxy/upstream internal/telemetry", "parses what strangers send: it never shares a process with the agent, which holds every workload's key"},
	{"internal/csi", "internal/socket internal/watch", "mounts the Workload API's directory into pods; knows nothing of identities"},
	{"internal/config", "proxy/canonical proxy/policy", "the file and its types, where hosts and paths are words of the rules; what they mean to a half is wired in cmd/narthex"},
	{"internal/config/importer", "internal/config", "reads a spire-agent's file and writes text: which keys there are it asks of internal/config, and it opens nothing that the file names"},
	{"internal/config/gen", "internal/config proxy/policy", "makes the reference and the schemas from the types and the keys; only `go generate` and a test run it"},
	{"internal/fileset", "", "puts files in place as one, and knows nothing of what is in them"},
	{"internal/fetch", "internal/fileset internal/grpctext", "a client of any agent's Workload API: it knows nothing of ours"},
	{"internal/reload", "", "tells programs that files have changed, and knows nothing of the files"},
	{"internal/grpctext", "", "the words of a failed call, whoever made it"},
	{"internal/handover", "", "passes sockets from one process to the next, and knows nothing of what they are for"},
	{"internal/socket", "", "puts sockets in place, and knows nothing of who calls on them"},
	{"internal/testca", "", "certificates and tokens for tests: only they import it"},
	{"internal/watch", "", "tells that files may have changed, and knows nothing of what is in them"},
	{"internal/report", "", "writes findings in the formats of others, and knows nothing of what finds them"},
	{"internal/sandbox", "", "gives up what the process does not need, whatever the process is"},
	{"internal/devserver", "attestor", "stands where the real server stands: it knows nothing of the agent"},
	{"internal/telemetry", "", "anyone may import it, so it imports nobody"},
	{"internal/telemetry/expose", "internal/telemetry", "the only room that knows Prometheus and HTTP"},
	{"cmd/narthex", "*", "wires everything; nothing imports it"},
	{"integration", "*", "tests the product from outside"},
}

func TestArrows(t *testing.T) {
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); name == "testdata" || name == ".git" || name == "bin" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(file, ".go") {
			return nil
		}
		rel, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		checkFile(t, file, path.Dir(filepath.ToSlash(rel)), strings.HasSuffix(file, "_test.go"))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func checkFile(t *testing.T, file, room string, test bool) {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
	if err != nil {
		t.Errorf("%s: %v", file, err)
		return
	}
	allowed, reason, ok := allowance(room)
	if !ok {
		t.Errorf("%s: room %s is not in the plan: add it to the list in this test, with its reason", file, room)
		return
	}
	for _, spec := range parsed.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		target, ours := strings.CutPrefix(imported, module)
		// A test may stand on the room it tests and on its peers' fakes.
		if !ours || test || target == room || allowed == "*" {
			continue
		}
		if !strings.Contains(" "+allowed+" ", " "+target+" ") {
			t.Errorf("%s imports %s, but %s may import only [%s]: %s", file, target, room, allowed, reason)
		}
	}
}

func allowance(room string) (may, reason string, ok bool) {
	for _, r := range rooms {
		if room == r.room || r.room == "integration" && strings.HasPrefix(room, "integration/") {
			return r.may, r.reason, true
		}
	}
	return "", "", false
}

// TestForeignImports keeps foreign code out of the rooms that look into
// other processes or hold the rules' meaning.
func TestForeignImports(t *testing.T) {
	for room, may := range map[string][]string{
		"attestor":          {"golang.org/x/sys/"},
		"attestor/k8s":      {},
		"attestor/sigstore": {},
		"proxy/policy":      {"github.com/spiffe/go-spiffe/v2/spiffeid", "github.com/goccy/go-yaml", "cel.dev/cel-go/"},
		"proxy/policy/importer": {
			"github.com/spiffe/go-spiffe/v2/spiffeid", "github.com/goccy/go-yaml", "github.com/hashicorp/hcl/hcl",
		},
	} {
		files, err := filepath.Glob(filepath.Join("..", "..", filepath.FromSlash(room), "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			for _, spec := range parsed.Imports {
				imported, _ := strconv.Unquote(spec.Path.Value)
				foreign := strings.Contains(strings.SplitN(imported, "/", 2)[0], ".") && !strings.HasPrefix(imported, module)
				for _, prefix := range may {
					foreign = foreign && !strings.HasPrefix(imported, prefix)
				}
				if foreign {
					t.Errorf("%s imports %s: %s may import only the standard library and %v", file, imported, room, may)
				}
			}
		}
	}
}
