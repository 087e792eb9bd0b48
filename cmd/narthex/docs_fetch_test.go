package main

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/reload"
)

// TestFetchExamples holds every call of fetch and validate, in docs/fetch.md and in
// the help, against their flags and what they make of them.
func TestFetchExamples(t *testing.T) {
	var calls [][]string
	page := readPage(t, "docs/fetch.md")
	for _, m := range regexp.MustCompile(`(?m)^    (?:ExecStart(?:Pre)?=/usr/bin/)?narthex (.*)$`).FindAllStringSubmatch(page, -1) {
		calls = append(calls, callWords(t, m[1]))
	}
	for _, m := range regexp.MustCompile(`(?m)^ +args: (\[.*\])$`).FindAllStringSubmatch(page, -1) {
		var args []string
		if err := json.Unmarshal([]byte(m[1]), &args); err != nil {
			t.Errorf("%s: %v", m[1], err)
		}
		calls = append(calls, args)
	}
	if len(calls) < 15 {
		t.Errorf("only %d calls were found in docs/fetch.md", len(calls))
	}
	for _, parent := range []string{"fetch", "validate"} {
		of, _, err := newRoot().Find([]string{parent})
		if err != nil {
			t.Fatal(err)
		}
		for _, sub := range of.Commands() {
			for line := range strings.Lines(sub.Example) {
				line, _, _ = strings.Cut(line, " | jq")
				_, call, _ := strings.Cut(line, "narthex ")
				calls = append(calls, callWords(t, call))
			}
		}
	}
	for _, call := range calls {
		cmd, rest, err := newRoot().Find(call)
		if err == nil {
			err = cmd.ParseFlags(rest)
		}
		if err == nil {
			err = cmd.ValidateArgs(cmd.Flags().Args())
		}
		if err != nil || !cmd.Runnable() || cmd.HasSubCommands() && call[0] != cmd.Name() {
			t.Errorf("narthex %s: %v", strings.Join(call, " "), err)
		}
	}
}

// callWords splits an example up to what is said of it.
func callWords(t *testing.T, call string) []string {
	t.Helper()
	call, _, _ = strings.Cut(strings.TrimSpace(call), "  ")
	args, err := reload.Words(call)
	if err != nil {
		t.Fatal(err)
	}
	return args
}

// TestDefaultWorkloadAPI has fetch ask where an agent serves that was told nothing
// else.
func TestDefaultWorkloadAPI(t *testing.T) {
	c, err := config.Parse("narthex.yaml", []byte(`trust_domain: example.org
agent:
  server: {address: "spire-server:8081", insecure_bootstrap: true}
  node_attestor: {join_token: {token: x}}
`))
	if err != nil {
		t.Fatal(err)
	}
	if want := "unix:" + string(c.Agent.WorkloadAPI.Socket); defaultWorkloadAPI != want {
		t.Errorf("it asks at %s, want %s", defaultWorkloadAPI, want)
	}
}
