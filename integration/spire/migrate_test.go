//go:build integration

package spire_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

const movingConf = `
agent {
  data_dir = "./data"
  log_level = "INFO"
  server_address = "%[1]s"
  server_port = "%[2]s"
  socket_path = "./public/api.sock"
  trust_bundle_path = "./bundle.pem"
  trust_domain = "%[3]s"
  %[4]s
  experimental { sync_interval = "1s" }
}
plugins {
  KeyManager "disk" { plugin_data { directory = "./keys" } }
  %[5]s
  WorkloadAttestor "unix" { plugin_data {} }
}
`

// moving is a host whose spire-agent is replaced.
type moving struct {
	t      *testing.T
	server *server
	dir    string
	id     string // of the agent
}

// newMoving prepares a host with one workload, root.
func newMoving(t *testing.T, s *server, id, agent, attestor string) *moving {
	t.Helper()
	m := &moving{t: t, server: s, dir: stage.Folder(t, "moving"), id: id}
	s.add(entry{path: "/root", parent: id, selector: "unix:uid:0"})
	host, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Fatal(err)
	}
	stage.WriteFile(t, filepath.Join(m.dir, "bundle.pem"), s.bundlePEM(), 0o644)
	stage.WriteFile(t, m.conf(), fmt.Sprintf(movingConf, host, port, s.td.Name(), agent, attestor), 0o600)
	return m
}

func (m *moving) conf() string    { return filepath.Join(m.dir, "agent.conf") }
func (m *moving) yaml() string    { return filepath.Join(m.dir, "narthex.yaml") }
func (m *moving) socket() string  { return filepath.Join(m.dir, "public", "api.sock") }
func (m *moving) dataDir() string { return filepath.Join(m.dir, "data") }

// stock starts the spire-agent and waits until it is healthy.
func (m *moving) stock() *stage.Process {
	m.t.Helper()
	agent := filepath.Join(tools, "spire-agent")
	// It is found by its configuration, whose paths are of its working directory.
	p := stage.Start(m.t, "spire-agent", "/bin/sh", []string{"-c", "cd " + m.dir + " && exec " + agent + " run -config ./agent.conf"})
	stage.Eventually(m.t, stage.Soon, "spire-agent is healthy", func() error {
		if err := p.Alive(); err != nil {
			return err
		}
		out, err := stage.Tell(m.t, agent, "healthcheck", "-socketPath", m.socket())
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	return p
}

func (m *moving) narthex() *stage.Process {
	m.t.Helper()
	return stage.Start(m.t, "narthex agent", stage.Narthex, []string{"agent", "-c", m.yaml()})
}

// serial is that of the SVID with which the server last knew the agent.
func (m *moving) serial() string {
	m.t.Helper()
	a, err := m.server.agent(m.id)
	if err != nil {
		m.t.Fatalf("%s: %v", m.id, err)
	}
	return a.X509SvidSerialNumber
}

// leftovers is what is in the files of the spire-agent.
func (m *moving) leftovers() string {
	m.t.Helper()
	return stage.ReadFile(m.t, filepath.Join(m.dataDir(), "agent-data.json")) + stage.ReadFile(m.t, filepath.Join(m.dir, "keys", "keys.json"))
}

// TestMigrate follows docs/migrate-spire-agent.md: there, and back.
func TestMigrate(t *testing.T) {
	t.Parallel()
	for kind, prepare := range map[string]func(t *testing.T, s *server) *moving{
		"join_token": func(t *testing.T, s *server) *moving {
			token, id := s.token()
			return newMoving(t, s, id, fmt.Sprintf("join_token = %q", token), `NodeAttestor "join_token" { plugin_data {} }`)
		},
		"x509pop": func(t *testing.T, s *server) *moving {
			cert, key, parsed := s.nodes.issue("moving", "")
			return newMoving(t, s, s.id("/spire/agent/x509pop/"+fingerprint(parsed)), "",
				fmt.Sprintf(`NodeAttestor "x509pop" { plugin_data { certificate_path = %q private_key_path = %q } }`, cert, key))
		},
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			migrate(t, prepare(t, newServer(t, serverOptions{cacheReload: time.Second})))
		})
	}
}

func migrate(t *testing.T, m *moving) {
	before := m.stock()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	workload, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+m.socket())))
	if err != nil {
		t.Fatal(err)
	}
	defer workload.Close()
	first, err := workload.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	serial, attested := m.serial(), m.server.Count("Agent attestation request completed")

	out := stage.Must(t, stage.Narthex, "import", m.conf(), "--dir", m.dir, "--data-dir", filepath.Join(m.dir, "new"), "-o", m.yaml())
	stage.Must(t, stage.Narthex, "check", "-c", m.yaml(), "--host")
	t.Log(out)

	// As long as the spire-agent runs, ours does not.
	early := m.narthex()
	early.Says(stage.Soon, "a spire-agent (pid", "stop it first")
	<-early.Done
	left := m.leftovers()

	before.Stop()
	after := m.narthex()
	after.Says(stage.Soon, "took over from spire-agent", m.id)
	select {
	case <-workload.Updated():
	case <-ctx.Done():
		t.Fatal("the workload heard nothing of the new agent")
	}
	second, err := workload.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	m.server.verify(second.Certificates, m.server.id("/root"))
	if first.Certificates[0].SerialNumber.Cmp(second.Certificates[0].SerialNumber) == 0 {
		t.Error("the workload's SVID is the one of the spire-agent")
	}
	m.unchanged(serial, attested, left)

	// And back, for nothing was renewed yet.
	after.Stop()
	m.stock()
	m.unchanged(serial, attested, left)
	if out := stage.Must(t, filepath.Join(tools, "spire-agent"), "api", "fetch", "x509", "-socketPath", m.socket()); !strings.Contains(out, m.server.id("/root")) {
		t.Errorf("the spire-agent that is back says %q", out)
	}
}

// unchanged fails the test unless the server knows one agent, by the SVID it
// had, and the spire-agent's files are as they were.
func (m *moving) unchanged(serial string, attested int, left string) {
	m.t.Helper()
	if got := m.serial(); got != serial {
		m.t.Errorf("the server knows the agent by %s, want %s", got, serial)
	}
	if got := m.server.Count("Agent attestation request completed"); got != attested || got == 0 {
		m.t.Errorf("%d attestations, want %d", got, attested)
	}
	if list := m.server.cli("agent", "list"); strings.Count(list, "SPIFFE ID") != 1 || !strings.Contains(list, m.id) {
		m.t.Errorf("`spire-server agent list` says %s", list)
	}
	if m.leftovers() != left {
		m.t.Error("what the spire-agent left was changed")
	}
	if _, err := os.Stat(filepath.Join(m.dir, "new", "agent.json")); err != nil {
		m.t.Error(err)
	}
}
