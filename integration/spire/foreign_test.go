//go:build integration

package spire_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestWorkloadInNode has a client that knows nothing but workload.proto ask the
// agent for everything, with and without the header (testdata/workload.js).
func TestWorkloadInNode(t *testing.T) {
	t.Parallel()
	server := newServer(t, serverOptions{cacheReload: time.Second, features: []string{"wit-svid"}})
	n := startAgent(t, server,
		entry{path: "/web", selector: "unix:uid:0", hint: "internal"}, entry{path: "/admin", selector: "unix:uid:0"})
	module := strings.TrimSpace(stage.Must(t, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/spiffe/go-spiffe/v2"))
	out := stage.Must(t, "env", "NODE_PATH="+filepath.Join(grpcjs, "node_modules"), "node", stage.Testdata(t, "workload.js"),
		filepath.Join(module, "proto", "spiffe", "workload", "workload.proto"), n.api, server.td.Name())
	if strings.TrimSpace(out) != "ok" {
		t.Error(out)
	}
}
