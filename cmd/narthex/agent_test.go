package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/config"
)

// Under `narthex run` both processes read the whole file.
func TestEachWarningIsLoggedByOneProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "narthex.yaml")
	if err := os.WriteFile(path, []byte(`trust_domain: example.org
agent:
  server: {address: "spire-server:8081", insecure_bootstrap: true}
  node_attestor: {join_token: {token_file: token}}
proxy:
  user: nobody
  policies: [rules.yaml]
  listeners:
    - {name: out, direction: outbound, bind: "0.0.0.0:8443", target: "far:8443", expect: ["spiffe://example.org/far"]}
telemetry: {listen: "0.0.0.0:9901"}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	const agent, proxy, telemetry = "agent.server.insecure_bootstrap", "proxy.listeners[0].bind", "telemetry.listen"
	for _, process := range []struct {
		name   string
		others []string
		want   []string
	}{
		{"narthex agent", notOfAgent(false), []string{agent, telemetry}},
		{"the agent of narthex run", notOfAgent(true), []string{agent}},
		{"the proxy", notOfProxy, []string{proxy, telemetry}},
	} {
		var log bytes.Buffer
		warn(hclog.New(&hclog.LoggerOptions{Output: &log}), c, process.others...)
		if n := strings.Count(log.String(), "\n"); n != len(process.want) {
			t.Errorf("%s logs %d lines, want %d: %s", process.name, n, len(process.want), &log)
		}
		for _, key := range process.want {
			if !strings.Contains(log.String(), ": "+key+": ") {
				t.Errorf("%s does not warn of %s: %s", process.name, key, &log)
			}
		}
	}
}
