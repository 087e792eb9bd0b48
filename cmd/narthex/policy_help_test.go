package main

import (
	"strings"
	"testing"
)

// TestPolicyExamples holds the examples in the help of the policy commands
// against their flags and arguments.
func TestPolicyExamples(t *testing.T) {
	seen := map[string]int{}
	parent, _, err := newRoot().Find([]string{"policy"})
	if err != nil {
		t.Fatal(err)
	}
	for _, sub := range append(parent.Commands(), parent) {
		for line := range strings.Lines(sub.Example) {
			_, call, ok := strings.Cut(line, "narthex policy ")
			if !ok {
				t.Errorf("%s: no call in %q", sub.Name(), line)
				continue
			}
			args := exampleWords(call)
			cmd, rest, err := newRoot().Find(append([]string{"policy"}, args...))
			if err == nil {
				err = cmd.ParseFlags(rest)
			}
			if err == nil {
				err = cmd.ValidateArgs(cmd.Flags().Args())
			}
			if err != nil || !strings.HasPrefix(cmd.CommandPath(), "narthex policy "+args[0]) {
				t.Errorf("%s: example %q: %v", sub.Name(), call, err)
			}
			seen[args[0]]++
		}
	}
	for _, sub := range parent.Commands() {
		if seen[sub.Name()] < 2 {
			t.Errorf("policy %s has %d examples", sub.Name(), seen[sub.Name()])
		}
	}
}

// exampleWords splits an example as a shell does, up to a redirection or to
// the spaces before what is said of it.
func exampleWords(line string) []string {
	line, _, _ = strings.Cut(line, "  ")
	line, _, _ = strings.Cut(line, " >")
	return shellWords(line)
}
