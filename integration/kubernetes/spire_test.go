//go:build integration

package kubernetes_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

const trustDomain = "spiffe://example.org"

// nodes is the parent of all entries: an alias of every agent that attested
// by k8s_psat, so that entries are the same whichever agent serves.
const nodes = trustDomain + "/nodes"

// spire is the SPIRE Server in the cluster. The first test that needs it
// starts it.
var spire struct {
	once sync.Once
	ok   bool
}

// startServer starts the SPIRE Server, once.
func startServer(t *testing.T) {
	t.Helper()
	spire.once.Do(func() {
		k8s.apply(t, render(t, "spire-server.yaml", nil))
		k8s.rolledOut(t, "spire", "statefulset/spire-server")
		for _, cluster := range []string{"demo", "stock"} {
			server(t, "entry", "create", "-node", "-spiffeID", nodes, "-selector", "k8s_psat:cluster:"+cluster)
		}
		spire.ok = true
	})
	if !spire.ok {
		t.Fatal("SPIRE Server did not start, see the first test that needed it")
	}
}

// server runs the spire-server command in the server's pod.
func server(t *testing.T, args ...string) string {
	t.Helper()
	return k8s.exec(t, "spire", "spire-server-0", "spire-server", append([]string{"/spire-server"}, args...)...)
}

// entry is a registration entry as the tests write it.
type entry struct {
	path      string   // of the SPIFFE ID
	selectors []string // k8s:ns:shop
}

// register creates entries, which go with the test.
func register(t *testing.T, entries ...entry) {
	t.Helper()
	type selector struct {
		Type  string `json:"type"`
		Value string `json:"value"`
	}
	type wire struct {
		ParentID  string     `json:"parent_id"`
		SPIFFEID  string     `json:"spiffe_id"`
		Selectors []selector `json:"selectors"`
	}
	all := make([]wire, 0, len(entries))
	for _, e := range entries {
		w := wire{ParentID: nodes, SPIFFEID: trustDomain + e.path}
		for _, s := range e.selectors {
			kind, value, _ := strings.Cut(s, ":")
			w.Selectors = append(w.Selectors, selector{kind, value})
		}
		all = append(all, w)
	}
	text, err := json.Marshal(map[string]any{"entries": all})
	if err != nil {
		t.Fatal(err)
	}
	out, err := k8s.tryKubectl(string(text), "-n", "spire", "exec", "-i", "spire-server-0", "-c", "spire-server", "--",
		"/spire-server", "entry", "create", "-data", "-", "-output", "json")
	var made struct {
		Results []struct {
			Status struct {
				Code    int
				Message string
			}
			Entry struct{ ID string }
		}
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &made)
	}
	if err != nil || len(made.Results) != len(entries) {
		t.Fatalf("create entries: %v\n%s", err, out)
	}
	for _, r := range made.Results {
		if r.Status.Code != 0 {
			t.Fatalf("create entry: %s", r.Status.Message)
		}
	}
	t.Cleanup(func() {
		for _, r := range made.Results {
			server(t, "entry", "delete", "-entryID", r.Entry.ID)
		}
	})
}

// agents returns what the server knows of the agents that attested.
func agents(t *testing.T) []attested {
	t.Helper()
	var list struct{ Agents []attested }
	if err := json.Unmarshal([]byte(server(t, "agent", "list", "-output", "json")), &list); err != nil {
		t.Fatal(err)
	}
	return list.Agents
}

type attested struct {
	ID              struct{ Path string }
	AttestationType string `json:"attestation_type"`
	Banned          bool
	SerialNumber    string `json:"x509svid_serial_number"`
	Selectors       []struct{ Type, Value string }
	CanReattest     bool `json:"can_reattest"`
}

// bringBundle copies the bundle that the server keeps in its own namespace
// to the one of the agent that needs it.
func bringBundle(t *testing.T, namespace string) {
	t.Helper()
	var bundle struct{ Data map[string]string }
	stage.Eventually(t, ready, "the server writes its bundle", func() error {
		if err := k8s.get("/api/v1/namespaces/spire/configmaps/spire-bundle", &bundle); err != nil {
			return err
		}
		if !strings.Contains(bundle.Data["bundle.crt"], "BEGIN CERTIFICATE") {
			return fmt.Errorf("it holds %q", bundle.Data)
		}
		return nil
	})
	k8s.apply(t, render(t, "bundle.yaml", map[string]any{"Namespace": namespace, "Bundle": bundle.Data["bundle.crt"]}))
}
