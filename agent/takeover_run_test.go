package agent_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/agent"
	"github.com/narthex-id/narthex/attestor"
)

// leave turns what an agent has left in its data_dir into what a spire-agent
// leaves, in another directory.
func (s *stage) leave() string {
	s.t.Helper()
	var ours struct {
		KeyID        string   `json:"key_id"`
		SVID, Bundle [][]byte // DER
	}
	data, err := os.ReadFile(filepath.Join(s.cfg.DataDir, "agent.json"))
	if err == nil {
		err = json.Unmarshal(data, &ours)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(s.cfg.DataDir, "keys", ours.KeyID+".key"))
	if err != nil {
		s.t.Fatal(err)
	}
	block, _ := pem.Decode(key)
	blocks := func(certs [][]byte) (out [][]byte) {
		for _, der := range certs {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
		}
		return out
	}
	dir := filepath.Join(s.dir, "stock")
	if err := os.Mkdir(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	for name, content := range map[string]any{
		"agent-data.json": map[string]any{"svid": blocks(ours.SVID), "bundle": blocks(ours.Bundle), "reattestable": false},
		"keys.json":       map[string]any{"keys": map[string][]byte{"agent-svid-A": block.Bytes}},
	} {
		data, err := json.Marshal(content)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o600)
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	return dir
}

func TestTakesOverOnce(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	a, stop := s.start()
	s.mustFetch()
	id := a.Status().ID
	stop()
	dir := s.leave()
	before := contentOf(t, dir)

	// The token is used up, and no bundle is asked for.
	s.cfg.DataDir, s.cfg.Bootstrap = filepath.Join(s.dir, "new"), nil
	s.cfg.Node = attestor.JoinToken{File: filepath.Join(s.dir, "nowhere")}
	s.cfg.TakeOver = &agent.TakeOver{DataDir: dir}
	a, stop = s.start()
	s.mustFetch()
	if got := a.Status().ID; got != id {
		t.Errorf("it goes on as %s, want %s", got, id)
	}
	stop()
	if contentOf(t, dir) != before {
		t.Error("what the spire-agent left was changed")
	}

	// What it has of its own counts from now on.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	_, stop = s.start()
	s.mustFetch()
	stop()
}

// Nothing to take over is a node that is new; what is there and no good is for a
// person to look at.
func TestTakeOverOfNothing(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	s.cfg.TakeOver = &agent.TakeOver{DataDir: filepath.Join(s.dir, "stock")}
	_, stop := s.start()
	s.mustFetch()
	stop()

	s.cfg.DataDir = filepath.Join(s.dir, "new")
	if err := os.Mkdir(filepath.Join(s.dir, "stock"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "stock", "agent-data.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := a.Run(ctx); err == nil || !strings.Contains(err.Error(), "agent-data.json") || !strings.Contains(err.Error(), "agent.take_over") {
		t.Errorf("Run: %v, want an error that names the file and the key", err)
	}
}

func contentOf(t *testing.T, dir string) string {
	t.Helper()
	var all strings.Builder
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all.WriteString(f.Name() + "\n" + string(data))
	}
	return all.String()
}
