//go:build integration

package tcp_test

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestRulesFromTheLog walks from an audit to rules in force: what it logged
// becomes rules that allow the same, and refuse the rest.
func TestRulesFromTheLog(t *testing.T) {
	t.Parallel()
	d := newDoor(t, "mode: permissive", "enforcement: audit")
	other, stranger := d.ca.leaf("/other"), d.ca.leaf("/stranger")
	for range 3 {
		d.comesIn("the client", askTLS(d.address, d.client))
	}
	d.comesIn("another", askTLS(d.address, other))
	if got, err := say(d.address, "hello"); err != nil {
		t.Errorf("plaintext: %q, %v", got, err)
	}
	if err := askTLS(d.address, newAuthority(t, "example.org").leaf("/client")); err == nil {
		t.Error("whom nobody knows came in")
	}
	d.quiet()
	d.Record(0, "plaintext", func(a telemetry.Access) bool { return a.Plaintext })
	d.refused(0, "unknown authority")
	d.hasRecords(t, 6)

	// Rules for what the log has and the policy does not allow.
	suggested, said := output(t, 0, "suggest", "-f", d.file("rules.yaml"), d.AccessFile())
	for _, want := range []string{"5 records of decisions", "2 taken, for 2 rules", "3 allowed already", "1 more that came to no decision"} {
		if !strings.Contains(said, want) {
			t.Errorf("want %q in\n%s", want, said)
		}
	}

	// What they change, by the log: that the audit let pass, and nothing else.
	next := stage.Folder(t, "next")
	stage.WriteFile(t, next+"/rules.yaml", stage.ReadFile(t, d.file("rules.yaml")), 0o644)
	stage.WriteFile(t, next+"/suggested.yaml", suggested, 0o644)
	changes, _ := output(t, 1, "diff", d.file("rules.yaml"), next, "--replay", d.AccessFile())
	for _, want := range []string{"2 of 5 records would be decided otherwise", "ALLOWED BY NOW", "from unauthenticated to", "from " + other.id + " to"} {
		if !strings.Contains(changes, want) {
			t.Errorf("want %q in\n%s", want, changes)
		}
	}
	if strings.Contains(changes, "DENIED BY NOW") || strings.Contains(changes, "Note") {
		t.Errorf("want no more than allows in\n%s", changes)
	}
	output(t, 0, "diff", next, next, "--replay", d.AccessFile())

	// In force.
	more := strings.SplitN(suggested, "rules:\n", 2)
	if len(more) != 2 {
		t.Fatalf("suggested\n%s", suggested)
	}
	d.policy("rules:\n  - " + d.clientMay() + "\n" + more[1])
	d.change("mode: permissive")
	before := len(d.Records())
	d.comesIn("the client", askTLS(d.address, d.client))
	d.comesIn("another", askTLS(d.address, other))
	if _, err := say(d.address, "hello"); err != nil {
		t.Errorf("plaintext is refused: %v", err)
	}
	if err := askTLS(d.address, stranger); err == nil {
		t.Error("whom the log never saw came in")
	}
	d.refused(before, "policy: no rule allows it")
	for _, rule := range []string{"client-may", "other-speaks-to-server", "unauthenticated-speaks-to-server"} {
		d.Record(before, rule, func(a telemetry.Access) bool { return a.Decision == "allow" && a.Rule == rule })
	}
	nothing, _ := output(t, 0, "suggest", "-f", d.file("rules.yaml"), d.AccessFile())
	if strings.Contains(nothing, "- id:") {
		t.Errorf("suggested again:\n%s", nothing)
	}
}

func (d *door) comesIn(who string, err error) {
	d.t.Helper()
	if err != nil {
		d.t.Errorf("%s is refused: %v", who, err)
	}
}

// output runs a policy command, which must end with that status, and returns
// what it wrote to standard output and error.
func output(t *testing.T, status int, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	cmd := exec.CommandContext(t.Context(), stage.Narthex, append([]string{"policy"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != status {
		t.Errorf("policy %s: %v, want status %d\n%s%s", strings.Join(args, " "), err, status, out.String(), errs.String())
	}
	return out.String(), errs.String()
}
